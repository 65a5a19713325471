# SPDX-License-Identifier: Apache-2.0
"""Backups of qcow2 disks with a backing file, by sync mode and kind of target: the content of the instant, images that QEMU
finds in order, and what is allocated as QEMU's own backup allocates it."""
import json
import os
import random
import shutil
import subprocess

import pytest

from conftest import Daemon, Qmp, wait_until

nbd = pytest.importorskip("nbd")
for tool in ("qemu-img", "qemu-io", "qemu-storage-daemon"):
    if not shutil.which(tool):
        pytest.skip(f"{tool} is not installed", allow_module_level=True)

KIB, MIB = 1 << 10, 1 << 20
CLUSTER = 64 * KIB
SIZE = 8 * MIB
CLUSTERS = SIZE // CLUSTER
# backed: with the source's backing node below; apart: its header names the source's backing file, it is opened without.
TARGETS = ["raw", "qcow2", "backed", "apart"]


def run(*words):
    subprocess.run([str(word) for word in words], check=True, stdout=subprocess.DEVNULL)


class Host:
    """A daemon, ours or QEMU's, with the disk `top` over `base`, an export of it, and targets."""

    def __init__(self, program, directory):
        directory.mkdir()
        self.daemon = Daemon(program, directory)
        self.q = Qmp(self.daemon.path)
        self.socket = self.path("nbd.sock")
        self.make_images()
        self.do("nbd-server-start", addr={"type": "unix", "data": {"path": self.socket}})
        for name, below in (("base", None), ("top", "base")):
            self.add(name, "qcow2", below)
        self.export("top", True)

    def do(self, command, /, **arguments):
        self.q.send({"execute": command, "arguments": {k.replace("_", "-"): v for k, v in arguments.items()}})
        answer = self.q.answer()
        assert "return" in answer, (command, arguments, answer)
        return answer["return"]

    def path(self, name):
        return os.path.join(self.daemon.directory, name)

    def make_images(self):
        """The same in each directory: data, zeroes and nothing, in the top, in the base, or in both."""
        rng = random.Random(7)
        run("qemu-img", "create", "-q", "-f", "qcow2", self.path("base"), SIZE)
        run("qemu-img", "create", "-q", "-f", "qcow2", "-b", self.path("base"), "-F", "qcow2", self.path("top"), SIZE)
        for name, byte in (("base", 1), ("top", 100)):
            words = []
            for cluster in rng.sample(range(CLUSTERS), CLUSTERS // 3):
                words += ["-c", f"write -q -P {byte + cluster % 99} {cluster * CLUSTER} {CLUSTER}"]
            for cluster in rng.sample(range(CLUSTERS), CLUSTERS // 12):
                words += ["-c", f"write -q -z {cluster * CLUSTER} {CLUSTER}"]
            run("qemu-io", "-f", "qcow2", *words, self.path(name))

    def add(self, name, driver, below=None, size=None):
        if size:
            run("qemu-img", "create", "-q", "-f", driver, self.path(name), size)
        more = {} if driver == "raw" else {"backing": below}
        self.do("blockdev-add", driver=driver, node_name=name, discard="unmap", **more,
                       file={"driver": "file", "filename": self.path(name), "discard": "unmap"})

    def target(self, kind, below="base"):
        if kind == "apart":
            run("qemu-img", "create", "-q", "-f", "qcow2", "-b", self.path("base"), "-F", "qcow2", self.path("t"), SIZE)
        self.add("t", "raw" if kind == "raw" else "qcow2", below if kind == "backed" else None,
                 None if kind == "apart" else SIZE)

    def export(self, name, writable=False):
        self.do("block-export-add", type="nbd", id=f"e-{name}", node_name=name, writable=writable)

    def connect(self, name="top"):
        h = nbd.NBD()
        h.connect_uri(f"nbd+unix:///{name}?socket={self.socket}")
        return h

    def content(self, name):
        if name != "top":
            self.export(name)
        h = self.connect(name)
        data = h.pread(SIZE, 0)
        h.shutdown()
        if name != "top":
            self.do("block-export-del", id=f"e-{name}", mode="hard")
            self.q.event("BLOCK_EXPORT_DELETED")
        return data

    def backup(self, sync, **more):
        self.do("blockdev-backup", job_id="b", device="top", target="t", sync=sync, **more)

    def end(self, expected="BLOCK_JOB_COMPLETED"):
        wait_until(lambda: not self.do("query-jobs"), "the job to end")
        event = self.q.event(expected)
        assert "error" not in event["data"], event

    def stop(self):
        self.q.close()
        self.daemon.stop()

    def check(self, kind):
        """After the end."""
        for name in ("top", "base") if kind == "raw" else ("top", "base", "t"):
            run("qemu-img", "check", "-q", "-f", "qcow2", self.path(name))

    def content_apart(self):
        """After the end: with the backing file that its header names."""
        run("qemu-img", "convert", "-O", "raw", "-f", "qcow2", self.path("t"), self.path("t.raw"))
        with open(self.path("t.raw"), "rb") as f:
            return f.read()

    def map(self, kind):
        """Of each cluster of the target: in it or not, and whether it reads as zeroes."""
        out = subprocess.run(["qemu-img", "map", "--output=json", "--image-opts",
                              f"driver={'raw' if kind == 'raw' else 'qcow2'},file.filename={self.path('t')}"],
                             check=True, capture_output=True).stdout
        found = {}
        for e in json.loads(out):
            for at in range(e["start"], e["start"] + e["length"], CLUSTER):
                found[at // CLUSTER] = (e["data"], e["zero"], e.get("present", True))
        return found


@pytest.fixture
def hosts(cairnd, tmp_path):
    made = []

    def make(program=cairnd):
        made.append(Host(program, tmp_path / str(len(made))))
        return made[-1]

    yield make
    for host in made:
        host.stop()


def disturb(host, seed, count=60):
    """A guest that writes, zeroes and discards all over the disk."""
    rng = random.Random(seed)
    h = host.connect()
    for _ in range(count):
        offset = rng.randrange(SIZE // 4096) * 4096
        length = min(rng.choice([4096, 12288, CLUSTER, 3 * CLUSTER]), SIZE - offset)
        what = rng.choice(["write", "write", "zero", "trim"])
        if what == "write":
            h.pwrite(bytes([rng.randrange(200, 256)]) * length, offset)
        elif what == "zero":
            h.zero(length, offset)
        else:
            h.trim(length, offset)
    h.flush()
    h.shutdown()


def allocated_in_top(host):
    """Clusters, as QEMU sees them; the daemon has the image open."""
    out = subprocess.run(["qemu-img", "map", "-U", "--output=json", "-f", "qcow2", host.path("top")],
                         check=True, capture_output=True).stdout
    return {at // CLUSTER for e in json.loads(out) if e["depth"] == 0 and e.get("present", True)
            for at in range(e["start"], e["start"] + e["length"], CLUSTER)}


def pieces(data):
    return [data[at:at + CLUSTER] for at in range(0, SIZE, CLUSTER)]


SLOW = {"speed": MIB, "cbw_latency_bound": 5000, "cbw_scratch_max": SIZE}


def stop_and_check(host, kind, after):
    assert pieces(host.content("top")) == after
    host.stop()
    host.check(kind)


@pytest.mark.parametrize("sync", ["full", "top", "incremental", "bitmap", "always"])
@pytest.mark.parametrize("kind", TARGETS)
def test_instant_under_a_guest(hosts, kind, sync):
    host = hosts()
    host.target(kind)
    more = {}
    copied = set(range(CLUSTERS))
    if sync == "top":
        copied = allocated_in_top(host)
        assert 0 < len(copied) < CLUSTERS
    elif sync != "full":
        host.do("block-dirty-bitmap-add", node="top", name="m")
        h = host.connect()
        copied = set(range(3, CLUSTERS, 5))
        for cluster in copied:
            (h.pwrite(b"\x77" * 4096, cluster * CLUSTER + 8192) if cluster % 2 else h.trim(CLUSTER, cluster * CLUSTER))
        h.shutdown()
        more = {"incremental": {"bitmap": "m"}, "bitmap": {"bitmap": "m", "bitmap_mode": "never"},
                "always": {"bitmap": "m", "bitmap_mode": "always"}}[sync]
    before = pieces(host.content("top"))
    host.backup("bitmap" if sync == "always" else sync, **SLOW, **more)
    disturb(host, len(sync))
    after = pieces(host.content("top"))
    assert after != before
    host.do("block-job-set-speed", device="b", speed=0)
    host.end()
    got = pieces(host.content("t"))
    base = pieces(host.content("base"))
    stop_and_check(host, kind, after)
    if kind == "apart":
        got = pieces(host.content_apart())
    below = base if kind in ("backed", "apart") else [bytes(CLUSTER)] * CLUSTERS
    wrong = [i for i in range(CLUSTERS) if got[i] != (before[i] if i in copied else below[i])]
    assert not wrong, (wrong, sorted(copied))
    if kind in ("backed", "apart") and sync == "top":
        assert got == before


@pytest.mark.parametrize("kind", ["raw", "qcow2", "backed"])
def test_incremental_again_and_again(hosts, kind):
    host = hosts()
    host.target(kind)
    host.do("block-dirty-bitmap-add", node="top", name="m")
    host.backup("full", bitmap="m", bitmap_mode="on-success")
    host.end()
    for turn in range(4):
        disturb(host, turn, 10)
        before = host.content("top")
        host.backup("incremental", bitmap="m", **SLOW)
        disturb(host, turn + 100, 10)
        host.do("block-job-set-speed", device="b", speed=0)
        host.end()
        assert host.content("t") == before
    host.stop()
    host.check(kind)


@pytest.mark.parametrize("below", ["top", "base", None])
def test_what_is_overwritten_is_kept(hosts, below):
    """sync=none. With the source below the target, the target shows the instant all the time (C5)."""
    host = hosts()
    host.target("backed", below)
    host.export("t")
    before = host.content("top")
    host.backup("none", cbw_latency_bound=5000)
    h = host.connect("t")
    for turn in range(3):
        disturb(host, turn, 20)
        after = host.content("top")
        got = h.pread(SIZE, 0)
        if below == "top":
            assert got == before
        wrong = [i for i, (was, now, saved) in enumerate(zip(pieces(before), pieces(after), pieces(got)))
                 if was != now and saved != was and not same_blocks(was, now, saved)]
        assert not wrong
    h.shutdown()
    host.do("job-cancel", id="b")
    host.end("BLOCK_JOB_CANCELLED")
    assert host.content("top") == after
    host.stop()
    host.check("qcow2")


def same_blocks(was, now, saved):
    """What has changed of a cluster is as it was: the rest may be anything that it was or is."""
    return all(saved[at:at + 4096] == was[at:at + 4096] for at in range(0, CLUSTER, 4096)
               if was[at:at + 4096] != now[at:at + 4096])


@pytest.mark.parametrize("sync", ["full", "top", "incremental"])
@pytest.mark.parametrize("kind", TARGETS)
def test_same_as_the_peers(hosts, peer, kind, sync):
    """
    Of a disk at rest: the same content, and the same clusters in the target. Where nothing is below, QEMU makes clusters of
    zeroes of what was zeroed, and we leave it out of the image.
    """
    seen = []
    for host in (hosts(), hosts(peer)):
        host.target(kind)
        more = {}
        if sync == "incremental":
            host.do("block-dirty-bitmap-add", node="top", name="m")
            disturb(host, 5, 12)
            more = {"bitmap": "m"}
        host.backup(sync, **more)
        host.end()
        content = host.content("t")
        host.stop()
        host.check(kind)
        seen.append((content, host.map(kind)))
    ours, theirs = seen
    assert ours[0] == theirs[0]
    if kind == "qcow2":
        for found in (ours[1], theirs[1]):
            found.update({i: (data, zero, data) for i, (data, zero, _) in found.items()})
    different = {i: (ours[1][i], theirs[1][i]) for i in range(CLUSTERS) if ours[1][i] != theirs[1][i]}
    assert not different
