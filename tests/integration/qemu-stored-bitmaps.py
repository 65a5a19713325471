# SPDX-License-Identifier: Apache-2.0
"""Dirty bitmaps that qcow2 images store, beside the peer: what either stores the other reads, bit for bit; what a daemon does with
them from one start to the next; and images whose bitmaps are damaged."""
import json
import os
import random
import signal
import struct
import subprocess

import pytest

nbd = pytest.importorskip("nbd")

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
SIZE = 64 * MIB + 3 * 512
IN_USE, AUTO = 1, 2


def run(*command):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, (command, done)
    return done.stdout


def create(path, *options, size=SIZE):
    run("qemu-img", "create", "-q", "-f", "qcow2", *(["-o", ",".join(options)] if options else []), path, size)
    return str(path)


def must_be_sound(path):
    """To the peer: no damage, and no leaks."""
    run("qemu-img", "check", "-q", "-f", "qcow2", path)


def listed(path):
    """Name, granularity and flags, as the peer sees them."""
    data = json.loads(run("qemu-img", "info", "-U", "--output=json", path))["format-specific"]["data"]
    return [(b["name"], b["granularity"], sorted(b["flags"])) for b in data.get("bitmaps", [])]


def disk(path, read_only=False):
    return {"driver": "qcow2", "node-name": "d", "read-only": read_only, "discard": "unmap",
            "file": {"driver": "file", "filename": str(path), "discard": "unmap"}}


class Host:
    """A daemon, ours or the peer's, that has an image open as `d`."""

    def __init__(self, daemon, path=None, read_only=False):
        self.daemon = daemon
        self.q = daemon.qmp()
        self.socket = os.path.join(daemon.directory, "nbd.sock")
        self.must("nbd-server-start", {"addr": {"type": "unix", "data": {"path": self.socket}}})
        if path:
            self.open(path, read_only)

    def do(self, command, arguments):
        return self.q.execute(command, **arguments)

    def must(self, command, arguments):
        return self.q.command(command, **arguments)

    def refused(self, text, command, arguments):
        desc = self.q.refused(command, **arguments)["desc"]
        assert text in desc, (command, arguments, desc)

    def open(self, path, read_only=False):
        self.must("blockdev-add", disk(path, read_only))

    def close(self):
        self.must("blockdev-del", {"node-name": "d"})

    def bitmap(self, command, name, **more):
        return self.must("block-dirty-bitmap-" + command, {"node": "d", "name": name, **more})

    def state(self):
        """By name: what can be seen of each bitmap, but what only we show, and a hash of what is in it."""
        seen = {}
        for node in self.must("query-named-block-nodes", {}):
            for b in node.get("dirty-bitmaps", []):
                b.pop("generation", None)
                if not b.get("inconsistent"):
                    b["sha256"] = self.must("x-debug-block-dirty-bitmap-sha256", {"node": "d", "name": b["name"]})["sha256"]
                seen[b["name"]] = b
        return seen

    def io(self, *commands):
        self.must("block-export-add", {"type": "nbd", "id": "e", "node-name": "d", "name": "e", "writable": True})
        words = [w for c in commands for w in ("-c", c)]
        run("qemu-io", "-d", "unmap", "-f", "raw", *words, f"nbd+unix:///e?socket={self.socket}")
        self.must("block-export-del", {"id": "e", "mode": "hard"})
        self.q.event("BLOCK_EXPORT_DELETED")

    def map(self, name):
        """(offset, length) of what is dirty, as a client sees it."""
        context = "qemu:dirty-bitmap:" + name
        self.must("block-export-add", {"type": "nbd", "id": "m", "node-name": "d", "name": "m", "bitmaps": [name]})
        h = nbd.NBD()
        h.add_meta_context(context)
        h.connect_uri(f"nbd+unix:///m?socket={self.socket}")
        found, at = [], 0

        def extent(_, offset, entries, error):
            nonlocal at
            for length, flags in zip(entries[::2], entries[1::2]):
                if flags & 1 and found and sum(found[-1]) == at:
                    found[-1] = (found[-1][0], found[-1][1] + length)
                elif flags & 1:
                    found.append((at, length))
                at += length
            return 0

        while at < h.get_size():
            h.block_status(h.get_size() - at, at, extent)
        h.shutdown()
        self.must("block-export-del", {"id": "m", "mode": "hard"})
        self.q.event("BLOCK_EXPORT_DELETED")
        return found


def writes(seed, count=25):
    rng = random.Random(seed)
    commands = []
    for _ in range(count):
        at = rng.randrange(0, SIZE // 512 - 1) * 512
        length = min(rng.choice([512, 4096, 69632, 3 * MIB]), SIZE - at)
        commands.append(f"{rng.choice(['write', 'write', 'write -z', 'discard'])} {at} {length}")
    return commands


SHAPES = [("cluster_size=64k",), ("cluster_size=1k",), ("cluster_size=2M",), ("cluster_size=4k", "refcount_bits=1")]


def fill(host):
    """Bitmaps of all kinds: fine and coarse, full, empty, and not recording."""
    for name, granularity in (("fine", 512), ("usual", 65536), ("coarse", 1 << 31)):
        host.bitmap("add", name, granularity=granularity, persistent=True)
    host.bitmap("add", "näme " + "x" * 900, persistent=True)
    host.bitmap("add", "still", persistent=True, disabled=True)
    host.bitmap("add", "passing")
    host.io(*writes(1))
    host.bitmap("add", "full", granularity=4096, persistent=True)
    host.io("write -z 0 64M", f"write {SIZE - 512} 512")
    host.bitmap("add", "empty", persistent=True)
    host.bitmap("disable", "usual")


@pytest.mark.parametrize("shape", SHAPES, ids=" ".join)
@pytest.mark.parametrize("ours_first", [True, False])
def test_what_one_stores_the_other_reads(start, peer, tmp_path, shape, ours_first):
    path = create(tmp_path / "a.qcow2", *shape)
    first, second = (start(), start(program=peer)) if ours_first else (start(program=peer), start())
    host = Host(first, path)
    fill(host)
    before = host.state()
    assert not before.pop("passing")["persistent"]
    host.close()
    must_be_sound(path)
    assert {name[:5]: flags for name, _, flags in listed(path)} == {
        "fine": ["auto"], "usual": [], "coars": ["auto"], "näme ": ["auto"], "still": [], "full": ["auto"],
        "empty": ["auto"]}
    other = Host(second, path)
    assert other.state() == before
    other.bitmap("disable", "fine")
    fine = other.map("fine")
    other.close()
    must_be_sound(path)
    host.open(path, read_only=True)
    assert host.map("fine") == fine and len(fine) == 1
    again = host.state()
    before["fine"]["recording"] = False
    assert again == before
    host.close()


def test_many_runs_agree_bit_for_bit(start, peer, tmp_path):
    """The daemons take turns, and write more each time."""
    path = create(tmp_path / "a.qcow2")
    hosts = [Host(start()), Host(start(program=peer))]
    hosts[0].open(path)
    hosts[0].bitmap("add", "b", granularity=512, persistent=True)
    for turn in range(6):
        host, other = hosts[turn % 2], hosts[1 - turn % 2]
        host.io(*[c for c in writes(turn, 8) if "-z" not in c])
        before = host.state()
        host.close()
        must_be_sound(path)
        other.open(path)
        assert other.state() == before
    other.bitmap("disable", "b")
    found = other.map("b")
    other.close()
    host.open(path, read_only=True)
    assert host.map("b") == found and len(found) > 10
    host.close()


def test_killed_daemons_leave_them_inconsistent(start, peer, cairnd, tmp_path):
    """What was in use is known to be: by the peer, by us, and it can only be removed."""
    path = create(tmp_path / "a.qcow2")
    host = Host(start(), path)
    host.bitmap("add", "a", persistent=True)
    host.bitmap("add", "b", persistent=True)
    host.close()
    host.open(path)
    assert listed(path) == [("a", 65536, ["auto", "in-use"]), ("b", 65536, ["auto", "in-use"])]
    host.bitmap("add", "new", persistent=True)
    host.io("write 1M 1M")
    host.daemon.process.send_signal(signal.SIGKILL)
    host.daemon.process.wait()
    host.daemon.stop = lambda: None
    subprocess.run(["qemu-img", "check", "-q", "-r", "leaks", path], check=False, timeout=60)
    must_be_sound(path)
    assert listed(path) == [("a", 65536, ["auto", "in-use"]), ("b", 65536, ["auto", "in-use"])]
    theirs = Host(start(program=peer), path)
    there = theirs.state()
    theirs.close()
    host = Host(start(), path)
    assert host.state() == there
    assert there["a"]["inconsistent"] and not there["a"]["recording"] and there["a"]["persistent"]
    ref = {"node": "d", "name": "a"}
    for command in ("clear", "enable", "disable"):
        host.refused("is inconsistent", "block-dirty-bitmap-" + command, ref)
    host.bitmap("add", "t")
    host.refused("is inconsistent", "block-dirty-bitmap-merge", {"node": "d", "target": "t", "bitmaps": ["a"]})
    host.refused("is inconsistent", "block-dirty-bitmap-merge", {"node": "d", "target": "a", "bitmaps": ["t"]})
    host.refused("is inconsistent", "block-export-add",
                 {"type": "nbd", "id": "m", "node-name": "d", "name": "m", "bitmaps": ["a"]})
    host.bitmap("remove", "a")
    assert listed(path) == [("b", 65536, ["auto", "in-use"])]
    host.close()
    assert listed(path) == [("b", 65536, ["auto", "in-use"])]
    must_be_sound(path)
    host.open(path)
    host.bitmap("remove", "b")
    assert listed(path) == []
    host.close()
    must_be_sound(path)
    assert listed(path) == []


def test_changes_are_stored(start, tmp_path):
    """Add, remove, clear, enable, disable and merge, and what a transaction takes back."""
    path = create(tmp_path / "a.qcow2")
    host = Host(start(), path)
    for name in ("a", "b", "c", "gone"):
        host.bitmap("add", name, persistent=True)
    host.io("write 0 1M")
    host.close()
    host.open(path)
    host.refused("has a dirty bitmap 'a' already", "block-dirty-bitmap-add", {"node": "d", "name": "a"})
    host.bitmap("clear", "a")
    host.io("write 10M 64k")
    host.bitmap("disable", "b")
    host.must("block-dirty-bitmap-merge", {"node": "d", "target": "c", "bitmaps": ["a"]})
    ref = {"node": "d", "name": "gone"}
    host.do("transaction", {"actions": [
        {"type": "block-dirty-bitmap-remove", "data": ref},
        {"type": "block-dirty-bitmap-clear", "data": {"node": "d", "name": "b"}},
        {"type": "block-dirty-bitmap-add", "data": {"node": "d", "name": "never", "persistent": True}},
        {"type": "abort", "data": {}},
    ]})
    assert len(listed(path)) == 4
    host.must("transaction", {"actions": [
        {"type": "block-dirty-bitmap-remove", "data": ref},
        {"type": "block-dirty-bitmap-add", "data": {"node": "d", "name": "new", "persistent": True}},
    ]})
    assert [name for name, _, _ in listed(path)] == ["a", "b", "c"]
    must = host.state()
    host.close()
    must_be_sound(path)
    host.open(path)
    seen = host.state()
    assert seen == must and list(seen) == ["a", "b", "c", "new"]
    assert [seen[n]["count"] for n in seen] == [64 * KIB, MIB + 64 * KIB, MIB + 64 * KIB, 0]
    assert [seen[n]["recording"] for n in seen] == [True, False, True, True]


def test_read_only_images_keep_theirs(start, peer, tmp_path):
    path = create(tmp_path / "a.qcow2")
    host = Host(start(), path)
    host.bitmap("add", "b", persistent=True)
    host.io("write 0 1M")
    host.close()
    before = open(path, "rb").read()
    for program in (None, peer):
        host = Host(start(program=program) if program else start(), path, read_only=True)
        ref = {"node": "d", "name": "b"}
        for command in ("clear", "remove"):
            assert "error" in host.do("block-dirty-bitmap-" + command, ref)
        if program is None:
            host.refused("read-only", "block-dirty-bitmap-add", {"node": "d", "name": "new", "persistent": True})
        host.bitmap("disable", "b")
        assert [flags for _, _, flags in listed(path)] == [["auto"]]
        host.close()
    assert open(path, "rb").read() == before


def test_a_restart_does_not_end_incremental_backups(start, tmp_path):
    """Each backup is by another daemon, and takes what was written since the last one."""
    path, copy = create(tmp_path / "a.qcow2"), create(tmp_path / "copy.qcow2")
    target = {"driver": "qcow2", "node-name": "t", "file": {"driver": "file", "filename": copy}}
    for turn in range(4):
        daemon = start()
        host = Host(daemon, path)
        host.must("blockdev-add", target)
        if turn == 0:
            host.bitmap("add", "b", persistent=True)
        host.io(*writes(turn))
        sync = {"sync": "full"} if turn == 0 else {"sync": "incremental", "bitmap": "b"}
        if turn == 0:
            host.must("transaction", {"actions": [
                {"type": "block-dirty-bitmap-clear", "data": {"node": "d", "name": "b"}},
                {"type": "blockdev-backup", "data": {"job-id": "j", "device": "d", "target": "t", **sync}}]})
        else:
            assert 0 < host.state()["b"]["count"] < SIZE
            host.must("blockdev-backup", {"job-id": "j", "device": "d", "target": "t", **sync})
        assert host.q.event("BLOCK_JOB_COMPLETED")["data"].get("error") is None
        assert host.state()["b"]["count"] == 0
        if turn % 2:
            host.must("quit", {})
            daemon.wait()
        daemon.stop()
        run("qemu-img", "compare", "-q", path, copy)
        must_be_sound(path)


@pytest.mark.parametrize("cluster", ["64k", "512"])
def test_resizing(start, peer, tmp_path, cluster):
    """In one run as the peer, to the byte; what a disk gets after it was opened is dirty: it may have been larger before."""
    path, theirs = create(tmp_path / "a.qcow2", f"cluster_size={cluster}"), create(tmp_path / "b.qcow2", f"cluster_size={cluster}")
    if cluster == "512":  # here the header has no room, neither for the peer
        for host in (Host(start(), path), Host(start(program=peer), theirs)):
            answer = host.do("block-dirty-bitmap-add", {"node": "d", "name": "b", "persistent": True})
            host.close()
        assert "error" not in answer
        return
    hosts = [Host(start(), path), Host(start(program=peer), theirs)]
    for host in hosts:
        host.bitmap("add", "b", granularity=512, persistent=True)
        host.io("write 1M 64k", f"write {SIZE - 1024} 1024")
        host.must("block_resize", {"node-name": "d", "size": 6 * GIB})
        host.io("write 5G 64k")
    assert hosts[0].state() == hosts[1].state()
    for host in hosts:
        host.must("block_resize", {"node-name": "d", "size": 40 * MIB})
    before = hosts[0].state()
    assert before == hosts[1].state() and before["b"]["count"] == 64 * KIB
    for host, image in zip(hosts, (path, theirs)):
        host.close()
        must_be_sound(image)
    hosts[1].open(path)
    assert hosts[1].state() == before
    hosts[1].close()
    hosts[0].open(path)
    hosts[0].must("block_resize", {"node-name": "d", "size": 41 * MIB})
    hosts[0].bitmap("disable", "b")
    assert hosts[0].map("b") == [(MIB, 64 * KIB), (40 * MIB, MIB)]
    hosts[0].close()
    must_be_sound(path)


# ---- damage ----


def field(path, at, kind):
    with open(path, "rb") as f:
        f.seek(at)
        return struct.unpack(">" + kind, f.read(struct.calcsize(kind)))[0]


def patch(path, at, kind, value):
    with open(path, "r+b") as f:
        f.seek(at)
        f.write(struct.pack(">" + kind, value))


def extension(path):
    at = field(path, 100, "I")
    while field(path, at, "I") != 0x23852875:
        assert field(path, at, "I")
        at += 8 + (field(path, at + 4, "I") + 7) // 8 * 8
    return at + 8


def directory(path):
    return field(path, extension(path) + 16, "Q")


def stored(start, tmp_path):
    """An image with two bitmaps, `a` and `b`, of which the first has bits."""
    path = create(tmp_path / "a.qcow2")
    host = Host(start(), path)
    host.bitmap("add", "a", persistent=True)
    host.io("write 1M 64k", "write -P 7 20M 64k")
    host.bitmap("add", "b", persistent=True)
    host.close()
    return host, path


BROKEN = [  # of the first bitmap: where in its entry, as what, and with which value
    (0, "Q", 0), (0, "Q", 1 << 40), (0, "Q", 0x10001), (8, "I", 0), (8, "I", 7), (8, "I", 0xFFFFFFFF), (12, "I", 8),
    (16, "B", 2), (17, "B", 8), (17, "B", 32), (17, "B", 255),
]


@pytest.mark.parametrize("at, kind, value", BROKEN)
def test_a_broken_bitmap_costs_itself(start, tmp_path, at, kind, value):
    host, path = stored(start, tmp_path)
    patch(path, directory(path) + at, kind, value)
    host.open(path, read_only=True)
    assert "bitmap 'a' of the image cannot be used" in host.daemon.stderr()
    seen = host.state()
    assert seen["a"]["inconsistent"] and "inconsistent" not in seen["b"]
    host.close()
    host.open(path)
    assert host.state()["a"]["inconsistent"]
    host.bitmap("remove", "a")
    host.close()
    assert listed(path) == [("b", 65536, ["auto"])]
    run("qemu-img", "check", "-q", "-r", "leaks", path)
    must_be_sound(path)


@pytest.mark.parametrize("entry", [1 << 1, 1 << 60, (1 << 40) | 0, 0x10200, 0x10001])
def test_a_broken_table_costs_its_bitmap(start, tmp_path, entry):
    host, path = stored(start, tmp_path)
    patch(path, field(path, directory(path), "Q"), "Q", entry)
    host.open(path)
    seen = host.state()
    assert seen["a"]["inconsistent"] and "inconsistent" not in seen["b"]
    host.close()
    host.open(path)
    host.bitmap("remove", "a")
    host.close()
    assert listed(path) == [("b", 65536, ["auto"])]
    run("qemu-img", "check", "-q", "-r", "leaks", path)


@pytest.mark.parametrize("where, kind, value", [
    ("extension", "I", 0), ("extension", "I", 3), ("extension", "I", 70000), ("extension+4", "I", 1),
    ("extension+8", "Q", 1 << 40), ("extension+8", "Q", 40), ("extension+16", "Q", 3), ("extension+16", "Q", 1 << 50),
    ("extension+16", "Q", 0), ("directory+18", "H", 0), ("directory+18", "H", 2000), ("directory+20", "I", 1 << 30),
    ("directory+24", "B", 0), ("directory+24", "B", ord("b")),
])
def test_a_broken_directory_costs_all(start, tmp_path, where, kind, value):
    """Read-only the disk is readable; opened for writing they are dropped, which leaves leaks."""
    host, path = stored(start, tmp_path)
    base, _, offset = where.partition("+")
    patch(path, (extension if base == "extension" else directory)(path) + int(offset or 0), kind, value)
    host.open(path, read_only=True)
    assert "the bitmaps of the image cannot be used" in host.daemon.stderr()
    assert not host.state()
    host.close()
    host.open(path)
    assert field(path, 88, "Q") == 0
    host.io("read -P 7 20M 64k")
    host.bitmap("add", "new", persistent=True)
    host.close()
    assert listed(path) == [("new", 65536, ["auto"])]
    run("qemu-img", "check", "-q", "-r", "leaks", path)
    must_be_sound(path)


def test_a_repair_that_changes_the_disk_is_not_hidden(start, tmp_path):
    """What is lost reads as zeroes afterwards, and no bitmap has recorded that (P2)."""
    host, path = stored(start, tmp_path)
    entry = (field(path, field(path, 40, "Q"), "Q") & ~(1 << 63)) + 20 * 16 * 8
    patch(path, entry, "Q", 1 << 40 | 1 << 63)
    cairn = subprocess.run([os.environ["CAIRN"], "check", "-r", "all", path], capture_output=True, text=True, timeout=60, check=False)
    assert cairn.returncode == 0 and "now reads as zeroes" in cairn.stdout + cairn.stderr, cairn
    must_be_sound(path)
    assert listed(path) == [("a", 65536, ["auto", "in-use"]), ("b", 65536, ["auto", "in-use"])]
    host.open(path)
    host.io("read -P 0 20M 64k")
    assert all(bitmap["inconsistent"] for bitmap in host.state().values())
    host.close()


def test_what_is_refused(start, tmp_path):
    path = create(tmp_path / "a.qcow2", "compat=0.10")
    host = Host(start(), path)
    ref = {"node": "d", "name": "b", "persistent": True}
    host.refused("version 2", "block-dirty-bitmap-add", ref)
    host.close()
    raw = tmp_path / "raw"
    raw.write_bytes(bytes(MIB))
    host.must("blockdev-add", {"driver": "raw", "node-name": "d", "file": {"driver": "file", "filename": str(raw)}})
    host.refused("cannot store bitmaps", "block-dirty-bitmap-add", ref)
    host.close()
    host.open(create(tmp_path / "large.qcow2", size=16 << 40))
    host.refused("it would be larger than", "block-dirty-bitmap-add", {**ref, "granularity": 512})
    host.bitmap("add", "b", persistent=True, granularity=4096)
    host.close()
    must_be_sound(tmp_path / "large.qcow2")
    assert os.stat(tmp_path / "large.qcow2").st_blocks * 512 < 4 * MIB


@pytest.mark.parametrize("what", ["twice", "l1", "l2", "refcounts", "directory", "header"])
def test_a_damaged_table_gives_nothing_away(start, tmp_path, what):
    """Removing the bitmap gives back only what is its own: nobody else finds it among free clusters."""
    path = create(tmp_path / "a.qcow2", "cluster_size=4k")
    host = Host(start(), path)
    host.bitmap("add", "a", granularity=512, persistent=True)
    host.bitmap("add", "b", persistent=True)
    host.io("write -P 1 0 64k", "write -P 2 20M 64k")
    host.close()
    table = field(path, directory(path), "Q")
    l1 = field(path, 40, "Q")
    patch(path, table + 8, "Q", {
        "twice": field(path, table, "Q"), "l1": l1, "l2": field(path, l1, "Q") & 0xFFFFFFFFFFFE00,
        "refcounts": field(path, 48, "Q"), "directory": directory(path), "header": 0}[what])
    if what == "header":
        patch(path, directory(path), "Q", 0)
    host.open(path)
    host.bitmap("remove", "a")
    host.io(*[f"write -P {i + 3} {i * 8192 + (1 << 20)} 4k" for i in range(60)],
            *[f"read -P {i + 3} {i * 8192 + (1 << 20)} 4k" for i in range(60)], "read -P 1 0 64k", "read -P 2 20M 64k")
    host.close()
    subprocess.run(["qemu-img", "check", "-q", "-r", "leaks", path], check=False, timeout=60)
    must_be_sound(path)
    assert listed(path) == [("b", 4096, ["auto"])]
