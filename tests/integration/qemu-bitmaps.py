# SPDX-License-Identifier: Apache-2.0
"""Dirty bitmaps beside qemu-storage-daemon's: the same commands and writes give the same errors, counts, contents and block
status; and what clients do with them: an incremental copy, several contexts in one answer."""
import os
import random
import subprocess

import pytest

nbd = pytest.importorskip("nbd")

KIB, MIB = 1 << 10, 1 << 20
SIZE = 64 * MIB + 3 * 512  # ends within a granule of each size
EXPORT = {"type": "nbd", "id": "rw", "node-name": "d0", "name": "rw", "writable": True}


class Host:
    """A daemon with a disk `d0` and another one, `d1`, and a writable export of the first."""

    def __init__(self, daemon):
        self.daemon = daemon
        self.q = daemon.qmp()
        self.path = os.path.join(daemon.directory, "nbd.sock")
        for name, size in (("d0", SIZE), ("d1", SIZE), ("small", MIB)):
            path = os.path.join(daemon.directory, name)
            with open(path, "wb") as f:
                f.truncate(size)
            self.must("blockdev-add", {"driver": "raw", "node-name": name, "discard": "unmap",
                                       "file": {"driver": "file", "filename": path, "discard": "unmap"}})
        self.must("nbd-server-start", {"addr": {"type": "unix", "data": {"path": self.path}}})
        self.must("block-export-add", EXPORT)

    def do(self, command, arguments):
        return self.q.execute(command, **arguments)

    def must(self, command, arguments):
        return self.q.command(command, **arguments)

    def uri(self, name="rw"):
        return f"nbd+unix:///{name}?socket={self.path}"

    def io(self, *commands):
        words = [w for c in commands for w in ("-c", c)]
        subprocess.run(["qemu-io", "-d", "unmap", "-f", "raw", *words, self.uri()], check=True, timeout=60,
                       stdout=subprocess.DEVNULL)

    def connect(self, name, *contexts):
        h = nbd.NBD()
        for context in contexts:
            h.add_meta_context(context)
        h.connect_uri(self.uri(name))
        return h

    def state(self):
        """All that can be seen of the bitmaps, but what only we show."""
        seen = {}
        for node in self.must("query-named-block-nodes", {}):
            for b in node.get("dirty-bitmaps", []):
                b.pop("generation", None)
                b.pop("successor-generation", None)
                where = {"node": node["node-name"], "name": b["name"]}
                b["sha256"] = self.must("x-debug-block-dirty-bitmap-sha256", where)["sha256"]
                seen[node["node-name"], b["name"]] = b
        return seen

    def generation(self, name):
        for node in self.must("query-named-block-nodes", {}):
            for b in node.get("dirty-bitmaps", []):
                if b["name"] == name:
                    return b["generation"]
        return None

    def map(self, export, context):
        """(offset, length, flags) of the whole disk, as a client sees it."""
        h = self.connect(export, context)
        found = []

        def extent(name, offset, entries, error):
            assert name == context
            for length, flags in zip(entries[::2], entries[1::2]):
                if found and found[-1][2] == flags:
                    found[-1] = (found[-1][0], found[-1][1] + length, flags)
                else:
                    found.append((offset, length, flags))
                offset += length
            return 0

        while sum(e[1] for e in found) < h.get_size():
            at = sum(e[1] for e in found)
            h.block_status(h.get_size() - at, at, extent)
        h.shutdown()
        return found


def bitmap(name, node="d0"):
    return {"node": node, "name": name}


def action(kind, **data):
    return {"type": kind, "data": data}


@pytest.fixture
def both(start, peer):
    return Host(start(program=peer)), Host(start())


def writes(seed):
    rng = random.Random(seed)
    commands = []
    for _ in range(25):
        at = rng.randrange(0, SIZE // 512 - 1) * 512
        length = min(rng.choice([512, 4096, 70000 // 512 * 512, 3 * MIB]), SIZE - at)
        commands.append(f"{rng.choice(['write', 'write', 'write -z', 'write -z -u', 'discard'])} {at} {length}")
    return commands


def test_same_commands_have_the_same_effect(both):
    """Each step: a command, or a list of what qemu-io does. After each, all bitmaps are the same, and errors have the same class."""
    add, merge = "block-dirty-bitmap-add", "block-dirty-bitmap-merge"
    steps = [
        (add, bitmap("a")),
        (add, {**bitmap("fine"), "granularity": 512}),
        (add, {**bitmap("coarse"), "granularity": 1 << 31}),
        (add, {**bitmap("off"), "disabled": True}),
        (add, {**bitmap("other", "d1"), "granularity": 4096}),
        (add, bitmap("small", "small")),
        (add, bitmap("a")),
        (add, bitmap("")),
        (add, bitmap("x" * 1024)),
        (add, bitmap("x" * 1023)),
        (add, bitmap("x", "no-such-node")),
        (add, {**bitmap("x"), "granularity": 0}),
        (add, {**bitmap("x"), "granularity": 256}),
        (add, {**bitmap("x"), "granularity": 1000}),
        (add, {**bitmap("x"), "granularity": 1 << 32}),
        (add, {**bitmap("x"), "persistent": True}),
        (add, {"node": "d0"}),
        writes(1),
        ("block-dirty-bitmap-clear", bitmap("fine")),
        ("block-dirty-bitmap-clear", bitmap("no-such-bitmap")),
        writes(2),
        ("block-dirty-bitmap-disable", bitmap("a")),
        ("block-dirty-bitmap-disable", bitmap("a")),
        ("block-dirty-bitmap-enable", bitmap("off")),
        ("block-dirty-bitmap-enable", bitmap("no-such-bitmap")),
        writes(3),
        (merge, {"node": "d0", "target": "off", "bitmaps": ["a", {"node": "d1", "name": "other"}]}),
        (merge, {"node": "d1", "target": "other", "bitmaps": [bitmap("a"), "other", bitmap("fine")]}),
        (merge, {"node": "d0", "target": "fine", "bitmaps": [bitmap("other", "d1")]}),
        (merge, {"node": "d0", "target": "fine", "bitmaps": ["no-such-bitmap"]}),
        (merge, {"node": "d0", "target": "no-such-bitmap", "bitmaps": ["fine"]}),
        (merge, {"node": "d0", "target": "fine", "bitmaps": ["a", bitmap("small", "small")]}),  # sizes differ
        ("transaction", {"actions": []}),
        ("transaction", {"actions": [action("abort")]}),
        ("transaction", {"actions": [
            action(add, **bitmap("new")), action("block-dirty-bitmap-disable", **bitmap("off")),
            action(merge, node="d0", target="new", bitmaps=["off", "fine"]),
            action("block-dirty-bitmap-clear", **bitmap("off")),
        ]}),
        writes(4),
        ("transaction", {"actions": [
            action("block-dirty-bitmap-clear", **bitmap("new")), action(add, **bitmap("never")),
            action("block-dirty-bitmap-enable", **bitmap("off")), action("block-dirty-bitmap-remove", **bitmap("a")),
            action(merge, node="d0", target="fine", bitmaps=["new", "off"]), action("abort"),
        ]}),
        ("transaction", {"actions": [action("block-dirty-bitmap-clear", **bitmap("new")),
                                     action("block-dirty-bitmap-clear", **bitmap("no-such-bitmap"))]}),
        ("transaction", {"actions": [action("block-dirty-bitmap-remove", **bitmap("new")), action(add, **bitmap("new"))]}),
        ("transaction", {"actions": [action("block-dirty-bitmap-remove", **bitmap("new")),
                                     action("block-dirty-bitmap-clear", **bitmap("new"))]}),
        ("transaction", {"actions": [action(add, **bitmap("twice")), action(add, **bitmap("twice"))]}),
        ("transaction", {"actions": [action("block-dirty-bitmap-clear", **bitmap("new"))],
                         "properties": {"completion-mode": "grouped"}}),
        ("transaction", {"actions": [action("no-such-action")]}),
        ("transaction", {"actions": [action("block-dirty-bitmap-clear", **bitmap("new"))],
                         "properties": {"completion-mode": "individual"}}),
        writes(5),
        ("block-export-add", {"type": "nbd", "id": "e", "node-name": "d0", "name": "e", "bitmaps": ["fine"]}),
        ("block-dirty-bitmap-disable", bitmap("fine")),
        ("block-export-add", {"type": "nbd", "id": "e", "node-name": "d0", "name": "e", "bitmaps": ["no-such-bitmap"]}),
        ("block-export-add", {"type": "nbd", "id": "e", "node-name": "d0", "name": "e",
                              "bitmaps": ["fine", {"node": "d1", "name": "no-such-bitmap"}]}),
        ("block-export-add", {"type": "nbd", "id": "e", "node-name": "d0", "name": "e", "bitmaps": ["fine"]}),
        ("block-dirty-bitmap-clear", bitmap("fine")),
        ("block-dirty-bitmap-remove", bitmap("fine")),
        ("block-dirty-bitmap-enable", bitmap("fine")),
        ("block-export-add", {"type": "nbd", "id": "e2", "node-name": "d0", "name": "e2", "bitmaps": ["fine"]}),
        (merge, {"node": "d0", "target": "new", "bitmaps": ["fine"]}),
        ("block-export-add", {"type": "nbd", "id": "e3", "node-name": "d0", "name": "e3", "writable": True,
                              "bitmaps": ["new"]}),
        ("blockdev-del", {"node-name": "d1"}),
        ("blockdev-del", {"node-name": "d0"}),
        ("block-dirty-bitmap-remove", bitmap("coarse")),
    ]
    for step in steps:
        if isinstance(step, list):
            for host in both:
                host.io(*step)
        else:
            there, here = [host.do(*step) for host in both]
            assert ("error" in there) == ("error" in here), (step, there, here)
            if "error" in there:
                assert there["error"]["class"] == here["error"]["class"], (step, there, here)
        theirs, ours = [host.state() for host in both]
        assert theirs == ours, step
    assert len(ours) > 4 and any(b["count"] for b in ours.values())
    for export in (("e", "fine"), ("e3", "new")):
        theirs, ours = [host.map(export[0], f"qemu:dirty-bitmap:{export[1]}") for host in both]
        assert theirs == ours and len(ours) > 2


def test_nbdinfo_sees_what_the_peer_shows(both):
    maps = []
    for host in both:
        host.must("block-dirty-bitmap-add", {**bitmap("b"), "granularity": 4096})
        host.io(*writes(7))
        host.must("block-dirty-bitmap-disable", bitmap("b"))
        host.must("block-export-add", {"type": "nbd", "id": "r", "node-name": "d0", "name": "r", "bitmaps": ["b"]})
        words = ["nbdinfo", "--map=qemu:dirty-bitmap:b", "--json", host.uri("r")]
        maps.append(subprocess.run(words, check=True, capture_output=True, text=True, timeout=30).stdout)
    assert maps[0] == maps[1]
    assert maps[1].count('"offset"') > 5


@pytest.fixture
def host(start):
    return Host(start())


def test_an_incremental_copy_is_the_source(host, tmp_path):
    """What clients do: write, copy all, write more, and copy what the bitmap has; the first bitmap goes on recording."""
    copy = tmp_path / "copy"
    host.io("write -P 1 0 4M", "write -P 2 40M 1M")
    with open(os.path.join(host.daemon.directory, "d0"), "rb") as source:
        copy.write_bytes(source.read())
    host.must("block-dirty-bitmap-add", {**bitmap("since"), "granularity": 4096})
    rng = random.Random(5)
    for round_number in range(3):
        host.io(*[f"write -P {rng.randrange(256)} {rng.randrange(0, SIZE // 512 - 300) * 512} {rng.randrange(1, 300) * 512}"
                  for _ in range(40)], "write -z 2M 100k", f"write -P 9 {SIZE - 512} 512", "discard 41M 300k")
        # One instant: the old one stands still, a new one goes on.
        host.must("transaction", {"actions": [
            action("block-dirty-bitmap-add", **bitmap("next"), granularity=4096),
            action("block-dirty-bitmap-disable", **bitmap("since")),
        ]})
        host.must("block-export-add", {"type": "nbd", "id": "r", "node-name": "d0", "name": "r", "bitmaps": ["since"]})
        h = host.connect("r")
        copied = 0
        with open(copy, "r+b") as f:
            for offset, length, flags in host.map("r", "qemu:dirty-bitmap:since"):
                if flags & 1:
                    f.seek(offset)
                    for at in range(offset, offset + length, MIB):
                        f.write(h.pread(min(MIB, offset + length - at), at))
                    copied += length
        h.shutdown()
        assert 0 < copied < SIZE / 2
        with open(os.path.join(host.daemon.directory, "d0"), "rb") as source:
            assert source.read() == copy.read_bytes(), f"round {round_number}"
        host.must("block-export-del", {"id": "r"})
        host.q.event("BLOCK_EXPORT_DELETED")
        host.must("block-dirty-bitmap-remove", bitmap("since"))
        host.must("transaction", {"actions": [
            action("block-dirty-bitmap-add", **bitmap("since"), granularity=4096),
            action("block-dirty-bitmap-merge", node="d0", target="since", bitmaps=["next"]),
            action("block-dirty-bitmap-remove", **bitmap("next")),
        ]})


def test_several_contexts_come_in_one_answer(host):
    for name in ("b0", "b1"):
        host.must("block-dirty-bitmap-add", {**bitmap(name), "disabled": True})
    host.must("block-dirty-bitmap-enable", bitmap("b1"))
    host.io("write 1M 64k")
    host.must("block-export-add", {"type": "nbd", "id": "w", "node-name": "d0", "name": "w", "writable": True,
                                   "bitmaps": ["b0", {"node": "d0", "name": "b1"}]})
    names = ["base:allocation", "qemu:dirty-bitmap:b0", "qemu:dirty-bitmap:b1"]
    h = host.connect("w", *names)
    assert all(h.can_meta_context(name) for name in names)
    for flags in (0, nbd.CMD_FLAG_REQ_ONE):
        seen = {}
        h.block_status(4 * MIB, MIB - 4096, lambda name, offset, entries, error: seen.update({name: entries}) or 0, flags)
        assert set(seen) == set(names)
        last = {"b0": [4 * MIB, 0], "b1": [4096, 0, 64 * KIB, 1, 4 * MIB - 68 * KIB, 0]}
        for name, entries in last.items():
            assert seen[f"qemu:dirty-bitmap:{name}"] == (entries[:2] if flags else entries)
    h.pwrite(b"x", 2 * MIB)
    seen = {}
    h.block_status(MIB, 2 * MIB, lambda name, offset, entries, error: seen.update({name: entries}) or 0)
    assert seen["qemu:dirty-bitmap:b1"] == [64 * KIB, 1, MIB - 64 * KIB, 0]
    h.shutdown()


@pytest.mark.parametrize("query, expected", [
    ([], ["base:allocation", "qemu:dirty-bitmap:b0", "qemu:dirty-bitmap:b1"]),
    (["qemu:"], ["qemu:dirty-bitmap:b0", "qemu:dirty-bitmap:b1"]),
    (["qemu:dirty-bitmap:"], ["qemu:dirty-bitmap:b0", "qemu:dirty-bitmap:b1"]),
    (["qemu:dirty-bitmap:b1", "base:"], ["base:allocation", "qemu:dirty-bitmap:b1"]),
    (["qemu:dirty-bitmap:b"], []),
    (["qemu:dirty-bitmap"], []),
])
def test_contexts_are_listed(host, query, expected):
    for name in ("b0", "b1"):
        host.must("block-dirty-bitmap-add", {**bitmap(name), "disabled": True})
    host.must("block-export-add", {"type": "nbd", "id": "r", "node-name": "d0", "name": "r", "bitmaps": ["b0", "b1"]})
    h = nbd.NBD()
    h.set_opt_mode(True)
    for context in query:
        h.add_meta_context(context)
    h.connect_uri(host.uri("r"))
    found = []
    h.opt_list_meta_context(lambda name: found.append(name) or 0)
    assert found == expected
    h.opt_abort()


def test_an_empty_merge_does_nothing(host):  # it ends the peer
    host.must("block-dirty-bitmap-add", bitmap("b"))
    host.io("write 1M 1")
    before = host.state()
    host.must("block-dirty-bitmap-merge", {"node": "d0", "target": "b", "bitmaps": []})
    assert host.state() == before


def test_generations_are_new_when_a_bitmap_begins_anew(host):
    host.must("block-dirty-bitmap-add", bitmap("b"))
    seen = [host.generation("b")]
    for command in ("clear", "disable", "enable"):
        host.must(f"block-dirty-bitmap-{command}", bitmap("b"))
        seen.append(host.generation("b"))
    host.io("write 0 1M")
    host.must("block-dirty-bitmap-merge", {"node": "d0", "target": "b", "bitmaps": ["b"]})
    assert host.generation("b") == seen[-1]
    assert len(set(seen)) == 4 and all(len(g) == 32 for g in seen)
    host.must("block-dirty-bitmap-remove", bitmap("b"))
    host.must("block-dirty-bitmap-add", bitmap("b"))
    assert host.generation("b") not in seen


def test_what_was_cut_and_grown_again_is_dirty(host):
    """P2: it has changed. The peer calls it clean."""
    host.must("block-export-del", {"id": "rw"})
    host.q.event("BLOCK_EXPORT_DELETED")
    host.must("block-dirty-bitmap-add", bitmap("b", "d1"))
    host.must("block_resize", {"node-name": "d1", "size": 80 * MIB})
    assert host.state()["d1", "b"]["count"] == 0  # it never had that
    host.must("block_resize", {"node-name": "d1", "size": 10 * MIB})
    host.must("block_resize", {"node-name": "d1", "size": 100 * MIB})
    assert host.state()["d1", "b"]["count"] == 70 * MIB
    host.must("blockdev-del", {"node-name": "d1"})


def test_exports_hold_bitmaps_and_let_go(host):
    host.must("block-dirty-bitmap-add", {**bitmap("b", "d1"), "disabled": True})
    export = {"type": "nbd", "id": "r", "node-name": "d0", "name": "r", "bitmaps": [bitmap("b", "d1")]}
    host.must("block-export-add", export)
    assert host.state()["d1", "b"]["busy"]
    assert "export 'r'" in host.do("block-dirty-bitmap-remove", bitmap("b", "d1"))["error"]["desc"]
    assert "export 'r'" in host.do("block_resize", {"node-name": "d1", "size": MIB})["error"]["desc"]
    assert "error" in host.do("blockdev-del", {"node-name": "d1"})
    twice = {**export, "id": "x", "name": "x", "bitmaps": ["b"]}
    assert "no dirty bitmap 'b'" in host.do("block-export-add", twice)["error"]["desc"]
    host.must("block-export-del", {"id": "r"})
    host.q.event("BLOCK_EXPORT_DELETED")
    assert not host.state()["d1", "b"]["busy"]
    error = host.do("block-export-add", {**export, "node-name": "small"})["error"]
    assert "covers" in error["desc"]
    assert not host.state()["d1", "b"]["busy"]  # all or none
    host.must("block-dirty-bitmap-remove", bitmap("b", "d1"))
    host.must("blockdev-del", {"node-name": "d1"})
