# SPDX-License-Identifier: Apache-2.0
"""Backups when things go wrong outside: targets that never answer or fail, and a daemon that is killed (P1, P3, P4, C5, L1)."""
import os
import resource
import signal
import subprocess
import time

import pytest

from conftest import PATIENCE, Daemon, wait_until
from fuse_support import StallingFile
from test_backup import BLOCK, CLUSTER, KIB, MIB, SIZE, SLOW, Host, Writer, nbd, sequence_of, stamped

DEADLINE = 2  # s: of changes
# What a machine that is busy adds to any latency.
NOISE = 1.0 if os.environ.get("CAIRN_SANITIZED") != "1" else 10.0
LATENCY = 0.02 + NOISE  # a guest's write: cbw-latency-bound
QUERY = NOISE


class Faulty(Host):
    """A daemon with a disk `d`, and `t` on a file that can stall."""

    def __init__(self, daemon):
        super().__init__(daemon)
        self.stalling = StallingFile(self.path("t"), SIZE)

    def timed(self, command, arguments=None, within=QUERY):
        begin = time.monotonic()
        answer = self.must(command, arguments)
        took = time.monotonic() - begin
        assert took < within, f"{command} took {took:.3f} s"
        return answer

    def queries_answer(self):
        for name in ("query-jobs", "query-block-jobs", "query-named-block-nodes", "query-graph", "query-block-exports"):
            self.timed(name)

    def ended_within(self, seconds):
        begin = time.monotonic()
        wait_until(lambda: self.status() in (None, "concluded"), "the job to end")
        assert time.monotonic() - begin < seconds


def slowest(writer, since):
    return max(end - begin for history in writer.history.values() for _, begin, end in history if end > since)


@pytest.fixture(params=["io_uring", "threads"])
def faulty(start, request):
    """One I/O thread, which all disks share."""
    daemon = start("--change-deadline", str(DEADLINE), "--io-threads", "1", "--engine", request.param)
    host = Faulty(daemon)
    with host.stalling:
        host.node("t")
        yield host


@pytest.mark.parametrize("end", ["job-cancel", "block-job-cancel", "force", "quit"])
@pytest.mark.parametrize("way", ["keep", "ignore"])
def test_target_that_hangs(faulty, way, end):
    """The guest goes on with its latency bounded, queries answer, the job and the daemon end; the target is an orphan."""
    with Writer(faulty) as writer:
        faulty.start(speed=SLOW * 4, cbw_ram=MIB)
        wait_until(lambda: faulty.progress()["offset"] > 0, "the job to work")
        faulty.stalling.tell(way)
        since = time.monotonic()
        writer.goes_on(300)
        faulty.queries_answer()
        writer.goes_on(100)
        if end == "quit":
            writer.stopping = True
            for thread in writer.threads:
                thread.join(PATIENCE)
            faulty.must("quit")
        elif end == "force":
            faulty.timed("block-job-cancel", {"device": "b", "force": True})
        else:
            faulty.timed(end, {"id" if end == "job-cancel" else "device": "b"})
        if end != "quit":
            faulty.ended_within(2 * DEADLINE + NOISE)
            faulty.no_filters()
            faulty.queries_answer()
            faulty.timed("blockdev-del", {"node-name": "t"}, within=2 * DEADLINE + NOISE)
            assert "t" not in faulty.nodes()
            writer.goes_on()
    assert slowest(writer, since) < LATENCY
    quit_ends(faulty, asked=end == "quit")
    writer.check_last(faulty.content("d"))


def quit_ends(faulty, asked):
    """The daemon does all that is up to it. The kernel lets its process go when the file has answered what was asked of it."""
    begin = time.monotonic()
    if not asked:
        faulty.must("quit")
    wait_until(lambda: not os.path.exists(faulty.path("ready")), "the daemon to end")  # its pidfile goes last
    assert time.monotonic() - begin < 3 * DEADLINE + NOISE
    assert "'t'" in faulty.daemon.stderr() or "/t\n" in faulty.daemon.stderr()
    faulty.stalling.tell("go")
    assert faulty.daemon.wait() == 0


@pytest.mark.parametrize("error, word", [(28, "space"), (5, "Input/output")])
def test_target_that_fails_and_recovers(faulty, error, word):
    """The job pauses, the guest does not; resumed, it copies the instant at which it began."""
    with Writer(faulty) as writer:
        begin = time.monotonic()
        faulty.start(on_target_error="stop", speed=SLOW * 4, cbw_latency_bound=5000)
        reply = time.monotonic()
        wait_until(lambda: faulty.progress()["offset"] > 0, "the job to work")
        faulty.stalling.tell(f"fail {error}")
        faulty.reach("paused")
        assert faulty.progress()["io-status"] == ("nospace" if error == 28 else "failed")
        since = time.monotonic()
        writer.goes_on(200)
        faulty.queries_answer()
        assert slowest(writer, since) < LATENCY
        faulty.stalling.tell("go")
        faulty.must("job-resume", {"id": "b"})
        faulty.must("block-job-set-speed", {"device": "b", "speed": 0})
        faulty.succeeded()
        writer.goes_on()
    writer.check_instant(faulty.content("t"), begin, reply)
    writer.check_last(faulty.content("d"))
    faulty.start(name="c", on_target_error="report", speed=SLOW * 4)
    faulty.stalling.tell(f"fail {error}")
    assert word in faulty.failed("c")
    faulty.no_filters()
    faulty.stalling.tell("go")


@pytest.mark.parametrize("engine", ["io_uring", "threads"])
def test_target_beyond_the_limit_of_file_sizes(start, engine):
    """RLIMIT_FSIZE: an error like others, not a signal that ends the daemon."""
    host = Host(start("--engine", engine))
    host.must("blockdev-add", {"driver": "raw", "node-name": "t", "offset": 2 * SIZE, "size": SIZE,
                               "file": {"driver": "file", "filename": sparse(host.path("t"), 3 * SIZE)}})
    resource.prlimit(host.daemon.process.pid, resource.RLIMIT_FSIZE, (2 * SIZE + SIZE // 2, resource.RLIM_INFINITY))
    with Writer(host) as writer:
        begin = time.monotonic()
        host.start(on_target_error="stop", cbw_latency_bound=5000)
        reply = time.monotonic()
        host.reach("paused")
        writer.goes_on(200)
        resource.prlimit(host.daemon.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        host.must("job-resume", {"id": "b"})
        host.succeeded()
        writer.goes_on()
    writer.check_instant(host.content("t")[2 * SIZE:], begin, reply)


def sparse(path, size):
    with open(path, "wb") as f:
        f.truncate(size)
    return path


@pytest.fixture
def doomed(cairnd, tmp_path):
    """A daemon that the test kills."""
    directory = tmp_path / "doomed"
    directory.mkdir()
    daemon = Daemon(cairnd, directory)
    try:
        yield Host(daemon)
    finally:
        daemon.process.kill()
        assert daemon.wait() == -signal.SIGKILL, daemon.stderr()


class Durable(Writer):
    """Flushes now and then, and notes how far each block's writes were flushed."""

    def __init__(self, host):
        self.flushed = {}  # block: sequence
        super().__init__(host, threads=1)

    def main(self, h, first, step, seed):
        sequence = 1
        try:
            while not self.stopping:
                pending = {}
                for _ in range(8):
                    block = sequence * 37 % self.blocks
                    h.pwrite(stamped(block, sequence), block * BLOCK)
                    pending[block] = sequence
                    self.history.setdefault(block, []).append((sequence, 0, 0))
                    sequence += 1
                h.flush()
                self.flushed.update(pending)
                self.written += 8
        except nbd.Error:
            pass  # the daemon is killed


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
@pytest.mark.parametrize("moment", [0.0, 0.05, 0.3])
def test_daemon_is_killed_during_a_backup(doomed, start, kind, moment):
    """What was acknowledged is there, the target is what it is, and nothing keeps a new daemon from either (P1)."""
    host = doomed
    target = host.path("t")
    if kind == "qcow2":
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", target, str(SIZE)], check=True)
        host.must("blockdev-add", {"driver": "qcow2", "node-name": "t", "file": {"driver": "file", "filename": target}})
    else:
        host.node("t")
    with Durable(host) as writer:
        host.start(speed=SLOW, cbw_ram=64 * KIB, cbw_latency_bound=5000)
        scratch = [os.readlink(f"/proc/{host.daemon.process.pid}/fd/{fd}")
                   for fd in os.listdir(f"/proc/{host.daemon.process.pid}/fd")]
        scratch = [path for path in scratch if "cairn-scratch" in path]
        assert len(scratch) == 1 and scratch[0].endswith("(deleted)"), "the scratch file has no name that could stay"
        time.sleep(moment)
        host.daemon.process.kill()
        host.daemon.wait()
        writer.stopping = True
    check_survivors(host, writer)
    again_after(host, start(), kind, target)


def check_survivors(host, writer):
    data = host.content("d")
    for block in range(SIZE // BLOCK):
        sequence = sequence_of(data[block * BLOCK:(block + 1) * BLOCK], block)
        acknowledged = [s for s, _, _ in writer.history.get(block, [])]
        assert sequence >= (acknowledged[-1] if acknowledged else 0) >= writer.flushed.get(block, 0)


def again_after(host, daemon, kind, target):
    """On the same files: nothing is locked, the target is claimed by nobody, and a new backup onto it is complete."""
    new = Host.__new__(Host)
    new.daemon, new.q = daemon, daemon.qmp()
    if kind == "qcow2":
        assert subprocess.run(["qemu-img", "check", "-q", target], check=False).returncode in (0, 3)  # 3: leaks, no more
    new.must("blockdev-add", {"driver": "file", "node-name": "d", "filename": host.path("d")})
    new.must("blockdev-add", {"driver": kind, "node-name": "t", "file": {"driver": "file", "filename": target}})
    assert new.must("query-jobs") == []
    new.no_filters()
    assert all(not node.get("dirty-bitmaps") for node in new.nodes().values())
    new.start()
    new.succeeded()
    new.must("blockdev-del", {"node-name": "t"})
    subprocess.run(["qemu-img", "compare", "-q", "-f", "raw", "-F", kind, host.path("d"), target], check=True)


@pytest.mark.parametrize("hangs", [False, True])
def test_cancelled_always_gives_up_bits_of_what_is_durable(faulty, hangs):
    """C3: the flush that a target never answers is not waited for; its bitmap keeps what the job began with."""
    faulty.bitmap("m")
    faulty.write(*range(0, SIZE // BLOCK, CLUSTER // BLOCK))
    faulty.start(sync="bitmap", bitmap="m", bitmap_mode="always", speed=SLOW)
    wait_until(lambda: faulty.progress()["offset"] > 0, "the job to work")
    if hangs:
        faulty.stalling.tell("ignore")
    faulty.timed("block-job-cancel", {"device": "b", "force": True})
    faulty.ended_within(2 * DEADLINE + NOISE)
    faulty.no_filters()
    count = faulty.count("m")
    assert count == SIZE // CLUSTER if hangs else 0 < count < SIZE // CLUSTER
    faulty.stalling.tell("go")
