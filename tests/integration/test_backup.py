# SPDX-License-Identifier: Apache-2.0
"""Backups of disks in use: the instant that they hold, bitmaps, the verbs and errors of the job, transactions."""
import os
import random
import struct
import subprocess
import threading
import time
import zlib

import pytest

from conftest import PATIENCE, wait_until

nbd = pytest.importorskip("nbd")

KIB, MIB = 1 << 10, 1 << 20
BLOCK = 4 * KIB
CLUSTER = 64 * KIB
SIZE = 16 * MIB
SLOW = 2 * MIB  # a job at this speed takes 8 s, unless a test changes it


def stamped(block, sequence):
    head = struct.pack("<QQ", block, sequence)
    return (head + struct.pack("<Q", zlib.crc32(head))) * (BLOCK // 24) + bytes(BLOCK % 24)


def sequence_of(data, block):
    """Of a block that is whole."""
    sequence = struct.unpack_from("<Q", data, 8)[0]
    assert data == stamped(block, sequence), f"block {block} is torn or another one"
    return sequence


class Host:
    """A daemon with a disk `d`, whose blocks are stamped with sequence 0, and a writable export of it."""

    def __init__(self, daemon):
        self.daemon = daemon
        self.q = daemon.qmp()
        self.socket = os.path.join(daemon.directory, "nbd.sock")
        self.must("nbd-server-start", {"addr": {"type": "unix", "data": {"path": self.socket}}})
        self.disk("d", stamps=True)

    def do(self, command, arguments):
        self.q.send({"execute": command, "arguments": arguments})
        return self.q.answer()

    def must(self, command, arguments=None):
        answer = self.do(command, arguments or {})
        assert "return" in answer, (command, arguments, answer)
        return answer["return"]

    def refused(self, text, command, arguments):
        answer = self.do(command, arguments)
        assert "error" in answer and text in answer["error"]["desc"], (command, arguments, answer)
        return answer["error"]["desc"]

    def path(self, name):
        return os.path.join(self.daemon.directory, name)

    def node(self, name, path=None, size=SIZE, **more):
        path = path or self.path(name)
        with open(path, "ab") as f:
            f.truncate(size)
        self.must("blockdev-add", {"driver": "raw", "node-name": name, "discard": "unmap", **more,
                                   "file": {"driver": "file", "filename": path, "discard": "unmap"}})

    def disk(self, name, stamps=False, size=SIZE):
        """A node with a writable export."""
        with open(self.path(name), "wb") as f:
            if stamps:
                f.write(b"".join(stamped(block, 0) for block in range(size // BLOCK)))
        self.node(name, size=size)
        self.must("block-export-add", {"type": "nbd", "id": f"e-{name}", "node-name": name, "writable": True})

    def connect(self, name="d", *contexts):
        h = nbd.NBD()
        for context in contexts:
            h.add_meta_context(context)
        h.connect_uri(f"nbd+unix:///{name}?socket={self.socket}")
        return h

    def write(self, *blocks, sequence=1, name="d"):
        h = self.connect(name)
        for block in blocks:
            h.pwrite(stamped(block, sequence), block * BLOCK)
        h.shutdown()

    def content(self, name):
        with open(self.path(name), "rb") as f:
            return f.read()

    def nodes(self):
        return {node["node-name"]: node for node in self.must("query-named-block-nodes")}

    def count(self, name, node="d"):
        """Clusters that a bitmap has dirty; it is not in use."""
        for bitmap in self.nodes()[node]["dirty-bitmaps"]:
            if bitmap["name"] == name:
                assert not bitmap["busy"], bitmap
                return bitmap["count"] // CLUSTER
        raise KeyError(name)

    def bitmap(self, name, node="d"):
        self.must("block-dirty-bitmap-add", {"node": node, "name": name})

    def start(self, **more):
        self.must("blockdev-backup", job(**more))

    def status(self, name="b"):
        for info in self.must("query-jobs"):
            if info["id"] == name:
                return info["status"]
        return None

    def reach(self, status, name="b"):
        wait_until(lambda: self.status(name) == status, f"job '{name}' to be {status}")

    def progress(self, name="b"):
        return next(info for info in self.must("query-block-jobs") if info["device"] == name)

    def ended(self, name="b"):
        """The event that tells how a job has ended."""
        wait_until(lambda: self.status(name) in (None, "concluded"), f"job '{name}' to end")
        ends = [e for e in self.q.events if e["event"] in ("BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED")
                and e["data"]["device"] == name]
        assert len(ends) == 1, self.q.events
        self.q.events.remove(ends[0])
        return ends[0]

    def succeeded(self, name="b"):
        end = self.ended(name)
        assert end["event"] == "BLOCK_JOB_COMPLETED" and "error" not in end["data"], end
        assert end["data"]["offset"] == end["data"]["len"], end
        return end["data"]

    def failed(self, name="b"):
        end = self.ended(name)
        assert end["event"] == "BLOCK_JOB_COMPLETED" and end["data"].get("error"), end
        return end["data"]["error"]

    def cancelled(self, name="b"):
        assert self.ended(name)["event"] == "BLOCK_JOB_CANCELLED"

    def steps(self, name="b"):
        """The statuses that were told so far."""
        return [e["data"]["status"] for e in self.q.events
                if e["event"] == "JOB_STATUS_CHANGE" and e["data"]["id"] == name]

    def cancel(self, name="b"):
        self.must("job-cancel", {"id": name})
        self.cancelled(name)

    def no_filters(self):
        left = [name for name, node in self.nodes().items() if node["drv"] == "copy-before-write"]
        assert not left, left


def job(name="b", target="t", sync="full", device="d", **more):
    return {"job-id": name, "device": device, "target": target, "sync": sync,
            **{key.replace("_", "-"): value for key, value in more.items()}}


def action(kind, **data):
    return {"type": kind, "data": data}


class Writer:
    """Threads that write stamped blocks, each thread blocks of its own, and note when each write was under way."""

    def __init__(self, host, name="d", threads=2, size=SIZE, seed=1):
        self.blocks = size // BLOCK
        self.history = {}  # block: [(sequence, begin, end), ...]
        self.stopping = False
        self.errors = []
        self.threads = [
            threading.Thread(target=self.main, args=(host.connect(name), i, threads, seed)) for i in range(threads)
        ]
        self.written = 0

    def main(self, h, first, step, seed):
        rng = random.Random(seed * 100 + first)
        sequence = first + step
        try:
            while not self.stopping:
                block = rng.randrange(self.blocks // step) * step + first
                data = stamped(block, sequence)
                begin = time.monotonic()
                h.pwrite(data, block * BLOCK)
                self.history.setdefault(block, []).append((sequence, begin, time.monotonic()))
                sequence += step
                self.written += 1
                time.sleep(0.0005)
            h.shutdown()
        except nbd.Error as error:
            self.errors.append(str(error))

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        self.goes_on()
        return self

    def __exit__(self, *exception):
        self.stopping = True
        for thread in self.threads:
            thread.join(PATIENCE)
            assert not thread.is_alive(), "a write hangs"
        assert not self.errors, self.errors

    def goes_on(self, writes=20):
        """More writes are begun and acknowledged."""
        before = self.written
        wait_until(lambda: self.written >= before + writes or self.errors, "the writer to go on")
        assert not self.errors, self.errors

    def check_last(self, data):
        """The disk after the writer has stopped."""
        for block in range(self.blocks):
            expected = self.history[block][-1][0] if block in self.history else 0
            assert sequence_of(data[block * BLOCK:(block + 1) * BLOCK], block) == expected, block

    def check_instant(self, data, earliest, latest):
        """There is one instant T at which each block was what the data say; writes under way at T may be in or not."""
        for block in range(self.blocks):
            sequence = sequence_of(data[block * BLOCK:(block + 1) * BLOCK], block)
            history = [(0, 0, 0), *self.history.get(block, [])]
            index = next(i for i, write in enumerate(history) if write[0] == sequence)
            earliest = max(earliest, history[index][1])
            if index + 1 < len(history):
                latest = min(latest, history[index + 1][2])
        assert earliest <= latest, f"no instant: one block is {earliest - latest:.6f} s newer than another one"


@pytest.fixture
def host(start):
    return Host(start())


@pytest.fixture
def target(host):
    host.node("t")
    return host


@pytest.fixture
def tiny(host):
    """A directory with room for 1 MiB, and a target in it."""
    where = host.path("tiny")
    os.mkdir(where)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", where], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("tmpfs cannot be mounted")
    try:
        host.node("t", os.path.join(where, "t"))
        yield where
    finally:
        host.daemon.stop()
        subprocess.run(["umount", where], check=True)


def test_full_backup_of_a_quiet_disk_is_equal(target):
    target.write(1, 77, 4095)
    target.start()
    data = target.succeeded()
    assert data["type"] == "backup" and data["len"] == SIZE and data["speed"] == 0
    assert target.content("t") == target.content("d")
    target.no_filters()
    assert target.must("query-jobs") == []


def test_full_backup_of_a_sparse_disk_leaves_holes(host):
    host.disk("s")
    host.node("u")
    host.write(300, name="s")
    host.start(device="s", target="u")
    host.succeeded()
    assert host.content("u") == host.content("s")
    assert os.stat(host.path("u")).st_blocks * 512 <= 2 * CLUSTER


def test_full_backup_of_a_scattered_disk_leaves_holes(host):
    """Many workers, and many changes between data and holes."""
    host.disk("s", size=4 * SIZE)
    host.node("u", size=4 * SIZE)
    with open(host.path("s"), "r+b") as f:
        for cluster in range(0, 4 * SIZE // CLUSTER, 9):
            f.seek(cluster * CLUSTER)
            f.write(b"x" * CLUSTER)
    host.start(device="s", target="u")
    host.succeeded()
    assert host.content("u") == host.content("s")
    assert os.stat(host.path("u")).st_blocks <= os.stat(host.path("s")).st_blocks + CLUSTER // 512


@pytest.mark.parametrize("options", [
    {},
    {"speed": 12 * MIB},
    {"speed": 12 * MIB, "cbw-ram": 64 * KIB, "cbw-latency-bound": 5000},
    {"speed": 12 * MIB, "cbw-ram": 0, "cbw-latency-bound": 5000},
    {"speed": 12 * MIB, "x-perf": {"max-workers": 1, "max-chunk": 64 * KIB}, "cbw-latency-bound": 5000},
    {"speed": 12 * MIB, "cbw-policy": "backup", "cbw-timeout": 20},
    {"x-perf": {"use-copy-range": True}},
    {"speed": 12 * MIB, "x-perf": {"use-copy-range": True, "max-workers": 2, "max-chunk": 64 * KIB}, "cbw-latency-bound": 5000},
])
def test_backup_under_a_writer_is_one_instant(target, options):
    with Writer(target) as writer:
        begin = time.monotonic()
        target.start(**options)
        reply = time.monotonic()
        target.succeeded()
        writer.goes_on()
    writer.check_instant(target.content("t"), begin, reply)
    writer.check_last(target.content("d"))
    target.no_filters()


def test_writes_of_zeroes_and_discards_do_not_reach_the_point(target):
    before = target.content("d")
    target.start(speed=SLOW)
    h = target.connect()
    h.zero(3 * MIB + 512, 9 * MIB + 512)
    h.trim(2 * MIB, 13 * MIB)
    h.pwrite(b"x" * 1000, 7 * MIB + 300 if h.get_block_size(nbd.SIZE_MINIMUM) <= 1 else 7 * MIB)
    h.shutdown()
    target.must("block-job-set-speed", {"device": "b", "speed": 0})
    target.succeeded()
    assert target.content("t") == before
    assert target.content("d") != before


def test_incremental_backups_follow_a_writer(target):
    target.bitmap("m")
    with Writer(target) as writer:
        target.start(bitmap="m", bitmap_mode="on-success")
        target.succeeded()
        for _ in range(2):
            writer.goes_on(200)
            begin = time.monotonic()
            target.start(sync="incremental", bitmap="m")
            reply = time.monotonic()
            assert target.succeeded()["len"] < SIZE or writer.written > 256
            point = target.content("t")
            writer.check_instant(point, begin, reply)
    assert target.count("m") > 0
    target.start(sync="bitmap", bitmap="m", bitmap_mode="on-success")
    target.succeeded()
    writer.check_last(target.content("t"))
    assert target.content("t") == target.content("d")
    assert target.count("m") == 0


def test_dirty_extents_applied_to_the_full_backup_restore_the_disk(target):
    target.bitmap("m")
    target.start(bitmap="m", bitmap_mode="on-success")
    target.succeeded()
    restored = bytearray(target.content("t"))
    for number in (1, 2):
        target.write(number * 100, number * 1000, 4095, sequence=number)
        target.must("block-export-add", {"type": "nbd", "id": "map", "node-name": "d", "name": "map", "writable": True,
                                         "bitmaps": ["m"]})
        h = target.connect("map", "qemu:dirty-bitmap:m")
        extents = []
        h.block_status(SIZE, 0, lambda name, offset, entries, error: extents.extend(entries) and 0 or 0)
        h.shutdown()
        target.must("block-export-del", {"id": "map", "mode": "hard"})
        wait_until(lambda: "map" not in [e["id"] for e in target.must("query-block-exports")], "the export to be gone")
        assert sum(extents[::2]) == SIZE
        target.node(f"i{number}")
        target.start(sync="incremental", bitmap="m", target=f"i{number}")
        assert target.succeeded()["len"] == 3 * CLUSTER
        increment = target.content(f"i{number}")
        at = 0
        for length, dirty in zip(extents[::2], extents[1::2]):
            if dirty:
                restored[at:at + length] = increment[at:at + length]
            else:
                assert not any(increment[at:at + length]), "a clean extent was copied"
            at += length
        assert restored == target.content("d")
        assert target.count("m") == 0


# What is dirty before; one cluster of it is written again, and one more, while the job runs.
BEFORE = 32
EVERYTHING = SIZE // CLUSTER


@pytest.mark.parametrize("sync", ["bitmap", "full"])
@pytest.mark.parametrize("mode", ["on-success", "always", "never"])
@pytest.mark.parametrize("end", ["success", "cancel", "failure"])
def test_bitmap_mode(target, sync, mode, end):
    if sync == "full" and mode == "never":
        target.refused("bitmap-mode=never", "blockdev-backup", job(bitmap="m", bitmap_mode=mode))
        return
    total = BEFORE if sync == "bitmap" else EVERYTHING
    target.bitmap("m")
    target.write(*(i * 16 for i in range(BEFORE)))
    assert target.count("m") == BEFORE
    target.start(sync=sync, bitmap="m", bitmap_mode=mode, speed=SLOW, cbw_latency_bound=5000,
                 x_perf={"max-workers": 1, "max-chunk": 64 * KIB}, **({"cbw-ram": 0, "cbw-scratch-max": 4096}
                                                                     if end == "failure" else {}))
    target.refused("m", "block-dirty-bitmap-clear", {"node": "d", "name": "m"})  # it is in use
    if end == "failure":
        wait_until(lambda: target.progress()["offset"] >= 4 * CLUSTER, "some clusters to be copied")
        target.write(EVERYTHING * 16 - 16, BEFORE * 16 - 16, sequence=2)  # there is no room to save both
        if sync == "bitmap":  # the first is not of the backup
            target.write(BEFORE * 16 - 32, sequence=2)
        assert "point in time is lost" in target.failed()
        new = 2 if sync == "full" else 3
    else:
        wait_until(lambda: target.progress()["offset"] >= 4 * CLUSTER, "some clusters to be copied")
        target.write(EVERYTHING * 16 - 16, BEFORE * 16 - 16, sequence=2)
        new = 2
        if end == "cancel":
            target.cancel()
        else:
            target.must("block-job-set-speed", {"device": "b", "speed": 0})
            target.succeeded()
    count = target.count("m")
    if mode == "never" or (mode == "on-success" and end != "success"):
        assert count == BEFORE + 1
    elif end == "success":
        assert count == new
    else:
        assert new < count <= total - 4 + new
    # The bitmap is enough to bring the target up to date, unless it lacks what was never copied.
    if mode == "always" or (mode == "on-success" and end == "success" and sync == "full"):
        if sync == "bitmap":
            with open(target.path("t"), "r+b") as f:  # what a backup before would have left there
                data = target.content("d")
                for cluster in range(BEFORE, EVERYTHING):
                    f.seek(cluster * CLUSTER)
                    f.write(data[cluster * CLUSTER:(cluster + 1) * CLUSTER])
        target.start(name="c", sync="incremental", bitmap="m")
        target.succeeded("c")
        assert target.content("t") == target.content("d")


@pytest.mark.parametrize("options, text", [
    ({"sync": "incremental"}, "needs a bitmap"),
    ({"sync": "bitmap"}, "needs a bitmap"),
    ({"bitmap-mode": "always"}, "needs a bitmap"),
    ({"bitmap": "m"}, "needs a bitmap-mode"),
    ({"bitmap": "m", "sync": "bitmap"}, "needs a bitmap-mode"),
    ({"bitmap": "m", "sync": "incremental", "bitmap-mode": "never"}, "on-success"),
    ({"bitmap": "m", "sync": "incremental", "bitmap-mode": "always"}, "on-success"),
    ({"bitmap": "m", "bitmap-mode": "never"}, "never"),
    ({"bitmap": "nothing", "sync": "incremental"}, "nothing"),
    ({"target": "d"}, "one node"),
    ({"target": "nothing"}, "nothing"),
    ({"device": "nothing"}, "nothing"),
    ({"target": "smaller"}, "sizes must be equal"),
    ({"target": "larger"}, "sizes must be equal"),
    ({"target": "fixed"}, "fixed"),
    ({"filter-node-name": "t"}, "t"),
    ({"filter-node-name": "9"}, "9"),
    ({"x-perf": {"max-chunk": 4096}}, "max-chunk"),
    ({"x-perf": {"max-workers": 0}}, "max-workers"),
    ({"compress": True}, "compress"),
    ({"speed": -1}, "speed"),
    ({"cbw-scratch": "/nowhere/at/all"}, "/nowhere/at/all"),
    ({"job-id": "9"}, "9"),
])
def test_refused(target, options, text):
    target.bitmap("m")
    target.write(5)
    target.node("smaller", size=SIZE - BLOCK)
    target.node("larger", size=SIZE + BLOCK)
    target.node("fixed", **{"read-only": True})
    before = target.nodes()
    target.refused(text, "blockdev-backup", {**job(), **options})
    assert target.nodes() == before
    assert target.must("query-jobs") == []
    assert target.count("m") == 1
    target.write(6)
    target.start()  # nothing is in the way
    target.succeeded()
    assert target.count("m") == 1  # both blocks are in one cluster


def test_what_a_job_uses_is_not_for_others(target):
    target.bitmap("m")
    target.write(*range(0, 512, 16))
    target.node("u")
    target.start(sync="incremental", bitmap="m", speed=1, filter_node_name="f")
    assert target.nodes()["f"]["drv"] == "copy-before-write"
    target.write(6)
    for command in ("clear", "remove", "disable"):
        target.refused("m", f"block-dirty-bitmap-{command}", {"node": "d", "name": "m"})
    target.refused("m", "blockdev-backup", job(name="c", target="u", sync="incremental", bitmap="m"))
    target.refused("b", "blockdev-backup", job(target="u"))  # the job's name
    target.refused("f", "blockdev-backup", job(name="c", target="u", filter_node_name="f"))
    for node in ("d", "t", "f"):
        target.refused(node, "blockdev-del", {"node-name": node})
    for node in ("d", "t"):
        target.refused(node, "block_resize", {"node-name": node, "size": 2 * SIZE})
    # Who wrote to the disk itself now would go past the filter.
    export = {"type": "nbd", "id": "late", "node-name": "d", "name": "late", "writable": True}
    target.refused("d", "block-export-add", export)
    target.cancel()
    target.no_filters()
    assert target.count("m") == 32
    target.must("block-dirty-bitmap-clear", {"node": "d", "name": "m"})
    assert target.count("m") == 0
    target.must("block-export-add", export)
    target.must("blockdev-del", {"node-name": "t"})


@pytest.mark.parametrize("first_ends_first", [True, False])
def test_two_backups_of_one_disk_are_two_instants(target, first_ends_first):
    target.node("u")
    target.bitmap("m")
    names = ["b", "c"] if first_ends_first else ["c", "b"]
    instants = {}
    with Writer(target) as writer:
        for name, more in (("b", {"target": "t"}), ("c", {"target": "u", "bitmap": "m", "bitmap_mode": "on-success"})):
            begin = time.monotonic()
            target.start(name=name, speed=SLOW, cbw_latency_bound=5000, **more)
            instants[name] = (begin, time.monotonic())
            writer.goes_on(50)
        for name in names:
            target.must("block-job-set-speed", {"device": name, "speed": 0})
            target.succeeded(name)
            writer.goes_on(20)
    for name, node in (("b", "t"), ("c", "u")):
        writer.check_instant(target.content(node), *instants[name])
    writer.check_last(target.content("d"))
    target.no_filters()
    target.start(target="u", sync="incremental", bitmap="m")
    target.succeeded()
    assert target.content("u") == target.content("d")


def test_backup_of_a_backups_target(target):
    """A node is the target of one job and the source of another one."""
    before = target.content("d")
    target.node("u")
    target.start(speed=SLOW)
    target.start(name="c", device="t", target="u", cbw_latency_bound=5000, speed=SLOW)
    target.write(4095)
    for name in ("b", "c"):
        target.must("block-job-set-speed", {"device": name, "speed": 0})
    target.succeeded("b")
    target.succeeded("c")
    assert target.content("t") == before
    half = target.content("u")
    clusters = [half[at:at + CLUSTER] for at in range(0, SIZE, CLUSTER)]
    expected = [before[at:at + CLUSTER] for at in range(0, SIZE, CLUSTER)]
    assert all(have in (want, bytes(CLUSTER)) for have, want in zip(clusters, expected))
    assert bytes(CLUSTER) in clusters and target.nodes().keys() >= {"d", "t", "u"}
    target.no_filters()


def test_paused_job_at_a_low_speed_ends_at_once(target):
    target.start(speed=1)
    target.must("job-pause", {"id": "b"})
    target.reach("paused")
    target.cancel()
    target.no_filters()


def test_pause_speed_and_cancel(target):
    with Writer(target) as writer:
        target.start(speed=SLOW)
        assert target.progress()["speed"] == SLOW and target.progress()["io-status"] == "ok"
        target.must("job-pause", {"id": "b"})
        target.reach("paused")
        offset = target.progress()["offset"]
        assert offset < SIZE and target.progress()["paused"]
        writer.goes_on(50)
        assert target.progress()["offset"] == offset
        target.must("job-resume", {"id": "b"})
        target.reach("running")
        wait_until(lambda: target.progress()["offset"] > offset, "the job to go on")
        target.must("block-job-set-speed", {"device": "b", "speed": 1})
        assert target.progress()["speed"] == 1
        begin = time.monotonic()
        target.cancel()
        assert time.monotonic() - begin < 2
        target.no_filters()
        writer.goes_on()
    assert target.steps() == ["created", "running", "paused", "running", "aborting", "concluded", "null"]
    writer.check_last(target.content("d"))


def test_pending_job_holds_nothing(target):
    before = target.content("d")
    target.start(auto_finalize=False, auto_dismiss=False)
    target.reach("pending")
    target.q.event("BLOCK_JOB_PENDING")
    with Writer(target) as writer:
        writer.goes_on(100)  # over new connections
        target.must("job-finalize", {"id": "b"})
        target.reach("concluded")
        writer.goes_on(100)
    target.no_filters()
    writer.check_last(target.content("d"))  # C7
    assert target.content("t") == before
    target.refused("b", "job-finalize", {"id": "b"})
    assert target.must("query-jobs")[0]["current-progress"] == SIZE
    target.must("job-dismiss", {"id": "b"})
    assert target.must("query-jobs") == []
    target.succeeded()
    assert target.steps() == ["created", "running", "waiting", "pending", "concluded", "null"]


def test_pending_job_can_be_cancelled(target):
    target.bitmap("m")
    target.write(5)
    target.start(sync="incremental", bitmap="m", auto_finalize=False)
    target.reach("pending")
    target.write(900)
    target.cancel()
    target.no_filters()
    assert target.count("m") == 2


def test_quit_ends_a_running_job(target):
    with Writer(target) as writer:
        target.start(speed=1)
        writer.goes_on()
        target.must("quit")
        begin = time.monotonic()
        assert target.daemon.wait() == 0
        assert time.monotonic() - begin < 10
        writer.stopping = True
        for thread in writer.threads:
            thread.join(PATIENCE)
        writer.errors.clear()  # its connections were closed
    data = target.content("d")
    for block in range(SIZE // BLOCK):  # what was acknowledged is there; one write of each thread may be on its way
        sequence = sequence_of(data[block * BLOCK:(block + 1) * BLOCK], block)
        assert sequence >= (writer.history[block][-1][0] if block in writer.history else 0)


def test_quit_with_jobs_at_rest(target):
    target.disk("e", stamps=True)
    target.node("u")
    target.start(speed=1)
    target.must("job-pause", {"id": "b"})
    target.reach("paused")
    target.start(name="c", device="e", target="u", auto_finalize=False)
    target.reach("pending", "c")
    target.must("quit")
    assert target.daemon.wait() == 0


@pytest.mark.parametrize("ram, scratch", [(MIB, 0), (0, MIB)])
def test_saved_blocks_leave_for_the_target_first(target, ram, scratch):
    """More is overwritten than memory, or scratch, may hold at once: what was saved makes room in time."""
    before = target.content("d")
    target.start(cbw_ram=ram, cbw_scratch_max=scratch, cbw_latency_bound=5000, speed=3 * MIB,
                 x_perf={"max-workers": 1, "max-chunk": 64 * KIB})
    h = target.connect()
    for block in range(4095, 3071, -16):  # from the far end, where the copy comes last: 64 clusters
        h.pwrite(b"x" * 16 * BLOCK, (block - 15) * BLOCK)
        time.sleep(0.03)
    h.shutdown()
    target.must("block-job-set-speed", {"device": "b", "speed": 0})
    target.succeeded()
    assert target.content("t") == before


def test_target_without_space_fails_the_job_alone(tiny, host):
    host.bitmap("m")
    host.write(*range(0, 1024, 16))
    with Writer(host, threads=1) as writer:
        host.start(sync="bitmap", bitmap="m", bitmap_mode="never", on_target_error="report")
        assert "space" in host.failed()
        writer.goes_on()
    errors = [e["data"] for e in host.q.events if e["event"] == "BLOCK_JOB_ERROR"]
    assert errors and errors[0] == {"device": "b", "operation": "write", "action": "report"}
    host.no_filters()
    assert host.count("m") >= 64


@pytest.mark.parametrize("policy", ["stop", "enospc"])
def test_target_without_space_pauses_the_job(tiny, host, policy):
    with Writer(host, threads=1) as writer:
        begin = time.monotonic()
        host.start(on_target_error=policy, cbw_latency_bound=5000)
        reply = time.monotonic()
        host.reach("paused")
        assert host.progress()["io-status"] == "nospace" and host.progress()["paused"]
        error = host.q.event("BLOCK_JOB_ERROR")["data"]
        assert error == {"device": "b", "operation": "write", "action": "stop"}
        writer.goes_on(100)
        subprocess.run(["mount", "-o", "remount,size=32m", tiny], check=True)
        host.must("job-resume", {"id": "b"})
        host.succeeded()
        writer.goes_on()
    with open(os.path.join(tiny, "t"), "rb") as f:
        writer.check_instant(f.read(), begin, reply)
    host.no_filters()


def test_target_without_space_ignored_leaves_bits(tiny, host):
    host.bitmap("m")
    host.start(bitmap="m", bitmap_mode="on-success", on_target_error="ignore", auto_dismiss=False)
    host.reach("concluded")
    with open(os.path.join(tiny, "t"), "rb") as f:
        point = f.read()
    missing = sum(point[at:at + CLUSTER] != host.content("d")[at:at + CLUSTER] for at in range(0, SIZE, CLUSTER))
    assert missing > EVERYTHING // 2
    assert missing <= host.count("m") <= EVERYTHING - 1
    host.must("job-dismiss", {"id": "b"})
    host.ended()
    subprocess.run(["mount", "-o", "remount,size=32m", tiny], check=True)
    host.start(name="c", sync="incremental", bitmap="m")
    host.succeeded("c")
    with open(os.path.join(tiny, "t"), "rb") as f:
        assert f.read() == host.content("d")
    assert host.count("m") == 0


@pytest.mark.parametrize("ram", [0, 64 * KIB])
def test_backup_breaks_where_nothing_more_can_be_saved(target, ram):
    target.bitmap("m")
    target.write(*range(0, 4096, 16))
    with Writer(target) as writer:
        target.start(sync="incremental", bitmap="m", speed=KIB, cbw_ram=ram, cbw_scratch_max=8192,
                     cbw_latency_bound=5000)
        error = target.failed()
        assert "point in time is lost" in error and "space" in error
        writer.goes_on()
    target.no_filters()
    data = target.content("d")
    for block, history in writer.history.items():
        assert sequence_of(data[block * BLOCK:(block + 1) * BLOCK], block) == history[-1][0]
    assert target.count("m") == EVERYTHING


class Alternator(Writer):
    """Writes each sequence to one disk and, when that is acknowledged, to the other one."""

    def __init__(self, host, *names):
        super().__init__(host, threads=0)
        self.handles = [host.connect(name) for name in names]
        self.threads = [threading.Thread(target=self.alternate)]

    def alternate(self):
        sequence = 1
        try:
            while not self.stopping:
                block = sequence * 7 % self.blocks
                for h in self.handles:
                    h.pwrite(stamped(block, sequence), block * BLOCK)
                sequence += 1
                self.written += 1
                time.sleep(0.0005)
        except nbd.Error as error:
            self.errors.append(str(error))

    def newest(self, data):
        """The last sequence in the data; all before it are there too."""
        found = [sequence_of(data[b * BLOCK:(b + 1) * BLOCK], b) for b in range(self.blocks)]
        newest = max(found)
        expected = [0] * self.blocks
        for sequence in range(1, newest + 1):
            expected[sequence * 7 % self.blocks] = sequence
        assert found == expected
        return newest


def test_transaction_has_one_instant_for_two_disks(target):
    target.disk("e", stamps=True)
    target.node("u")
    with Alternator(target, "d", "e") as writer:
        for _ in range(3):
            target.must("transaction", {"actions": [
                action("blockdev-backup", **job(name="b", speed=24 * MIB, cbw_latency_bound=5000)),
                action("blockdev-backup", **job(name="c", device="e", target="u", cbw_latency_bound=5000)),
            ]})
            target.succeeded("b")
            target.succeeded("c")
            first, second = writer.newest(target.content("t")), writer.newest(target.content("u"))
            assert second <= first <= second + 1
            writer.goes_on(50)
    target.no_filters()


@pytest.mark.parametrize("grouped", [True, False])
def test_grouped_jobs_end_alike(target, grouped):
    target.disk("e", stamps=True)
    target.node("u")
    target.bitmap("m")
    target.bitmap("n", "e")
    target.write(5, 500)
    target.write(*range(0, 4096, 16), name="e")
    target.must("transaction", {
        "actions": [
            action("blockdev-backup", **job(sync="incremental", bitmap="m")),
            action("blockdev-backup", **job(name="c", device="e", target="u", sync="incremental", bitmap="n", speed=1,
                                            cbw_ram=0, cbw_scratch_max=4096, cbw_latency_bound=5000)),
        ],
        "properties": {"completion-mode": "grouped" if grouped else "individual"},
    })
    if grouped:
        target.reach("waiting")
    else:
        target.succeeded()
    target.write(4000, 3000, 3500, sequence=2, name="e")  # breaks the second one
    target.write(900)
    assert "point in time is lost" in target.failed("c")
    if grouped:
        target.cancelled()
    target.no_filters()
    assert target.count("m") == (3 if grouped else 1)
    assert target.count("n", "e") == EVERYTHING


def test_transaction_that_begins_a_new_bitmap(target):
    target.bitmap("old")
    with Writer(target) as writer:
        begin = time.monotonic()
        target.must("transaction", {"actions": [
            action("block-dirty-bitmap-add", node="d", name="new"),
            action("block-dirty-bitmap-disable", node="d", name="old"),
            action("blockdev-backup", **job(auto_finalize=True)),
        ]})
        reply = time.monotonic()
        target.succeeded()
        writer.goes_on()
    writer.check_instant(target.content("t"), begin, reply)
    assert target.count("new") > 0
    target.start(name="c", sync="incremental", bitmap="new")
    target.succeeded("c")
    assert target.content("t") == target.content("d")


def test_transaction_with_the_old_bitmap_disabled(target):
    """What the old bitmap has is copied; the new one has what was written since."""
    target.start(name="a")
    target.succeeded("a")
    target.bitmap("old")
    target.write(5, 500)
    target.must("transaction", {"actions": [
        action("block-dirty-bitmap-add", node="d", name="new"),
        action("block-dirty-bitmap-disable", node="d", name="old"),
        action("blockdev-backup", **job(sync="bitmap", bitmap="old", bitmap_mode="never", speed=64 * KIB)),
    ]})
    target.write(700, 5, sequence=2)
    target.must("block-job-set-speed", {"device": "b", "speed": 0})
    assert target.succeeded()["len"] == 2 * CLUSTER
    assert target.count("old") == 2 and target.count("new") == 2
    assert sequence_of(target.content("t")[5 * BLOCK:6 * BLOCK], 5) == 1
    target.start(name="c", sync="incremental", bitmap="new")
    target.succeeded("c")
    assert target.content("t") == target.content("d")


@pytest.mark.parametrize("last", [
    action("abort"),
    action("blockdev-backup", **job(name="c", target="nothing")),
    action("blockdev-backup", **job(name="c", target="small")),
    action("blockdev-backup", **job(name="b", target="u")),
    action("block-dirty-bitmap-add", node="d", name="m"),
])
def test_transaction_that_fails_starts_nothing(target, last):
    target.node("u")
    target.node("small", size=MIB)
    target.bitmap("m")
    target.write(5)
    before = target.nodes()
    answer = target.do("transaction", {"actions": [
        action("block-dirty-bitmap-add", node="d", name="new"),
        action("blockdev-backup", **job(sync="incremental", bitmap="m")),
        last,
    ]})
    assert "error" in answer, answer
    assert target.nodes() == before
    assert target.must("query-jobs") == []
    assert target.steps() in ([], ["created", "null"])
    assert target.count("m") == 1
    target.start(sync="incremental", bitmap="m")
    target.succeeded()
    assert target.count("m") == 0


def test_two_backups_of_one_disk_end_at_the_same_moment(start):
    """The filters of both lie on top of each other, and each is taken out while the other one is."""
    for pause in range(12):
        daemon = start()
        host = Host(daemon)
        host.node("t", size=SIZE)
        for job in "bc":
            host.must("blockdev-backup", {"job-id": job, "device": "d", "target": "t", "sync": "full"})
        time.sleep(pause / 5000)
        daemon.stop()
