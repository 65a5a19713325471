# SPDX-License-Identifier: Apache-2.0
"""Images of formats that are only read, made and written by QEMU: contents, map, size, checks and refusals."""
import json
import os
import struct

import pytest
from image_support import need_peer, run, tools  # pylint: disable=unused-import

need_peer()

MADE = [
    ("vdi", "", "10M"),
    ("vdi", "", "1"),
    ("vdi", "", "3000k"),
    ("vdi", "static=on", "5M"),
    ("vhdx", "", "10M"),
    ("vhdx", "block_size=1M", "3000k"),
    ("vhdx", "block_size=2M,block_state_zero=off", "5M"),
    ("vhdx", "subformat=fixed", "5M"),
    ("vmdk", "", "10M"),
    ("vmdk", "", "1"),
    ("vmdk", "", "3000k"),
    ("vmdk", "zeroed_grain=on", "5M"),
    ("vmdk", "subformat=monolithicFlat", "3000k"),
    ("vmdk", "subformat=twoGbMaxExtentSparse", "5M"),
    ("vmdk", "subformat=twoGbMaxExtentFlat", "5M"),
    ("vpc", "", "10M"),
    ("vpc", "force_size=on", "3000k"),
    ("vpc", "subformat=fixed", "5M"),
    ("vpc", "subformat=fixed,force_size=on", "3000k"),
]


def make(tools, fmt, options, size, *writes):
    words = ["-o", options] if options else []
    tools.peer("create", "-q", "-f", fmt, *words, "x.img", size)
    if writes:
        tools.io("x.img", *writes, fmt=fmt)


def writes(size):
    """Here and there, what fits."""
    bytes_ = {"1": 512, "3000k": 3000 << 10}.get(size) or int(size[:-1]) << 20
    return [f"write -P {pattern} {at} {length}" for pattern, at, length in (
        (1, 0, 512), (2, 1 << 20, 512), (3, (2 << 20) - 512, 1024), (4, 2500 << 10, 65536), (5, bytes_ - 512, 512),
    ) if at + length <= bytes_]


def same_content(tools, fmt):
    tools.peer("convert", "-f", fmt, "-O", "raw", "x.img", "peer.raw")
    tools.ours("convert", "-f", fmt, "-O", "raw", "x.img", "ours.raw")
    with open(tools.path("peer.raw"), "rb") as peer, open(tools.path("ours.raw"), "rb") as ours:
        assert peer.read() == ours.read()
    tools.ours("compare", "-f", fmt, "-F", "raw", "x.img", "peer.raw")


@pytest.mark.parametrize("fmt,options,size", MADE)
def test_what_the_peer_writes_is_read(tools, fmt, options, size):
    make(tools, fmt, options, size)
    same_content(tools, fmt)
    tools.io("x.img", *writes(size), fmt=fmt)
    same_content(tools, fmt)
    tools.same_json("info", "--output=json", "-f", fmt, "x.img")
    tools.same("info", "-f", fmt, "x.img")
    tools.same("compare", "-f", fmt, "-F", fmt, "x.img", "x.img")
    if fmt != "vhdx":  # of which the peer says that all is data
        tools.same("measure", "-f", fmt, "-O", "qcow2", "x.img")


@pytest.mark.parametrize("fmt,options,size", [m for m in MADE if m[0] in ("vdi", "vmdk")])
def test_maps_are_the_same(tools, fmt, options, size):
    make(tools, fmt, options, size, *writes(size))
    tools.same("map", "-f", fmt, "x.img")
    tools.same_json("map", "-f", fmt, "--output=json", "x.img")


def test_maps_of_vhd_images_tell_more_than_the_peers(tools):
    """The peer does not ask the file for holes within a block."""
    make(tools, "vpc", "", "10M", *writes("10M"))
    seen = [{}, {}]
    for told, program in zip(seen, (tools.ours, tools.peer)):
        for e in json.loads(program("map", "-f", "vpc", "--output=json", "x.img").stdout):
            for at in range(e["start"], e["start"] + e["length"], 512):
                told[at] = (e["present"], e["data"], e.get("offset", e["start"]) + at - e["start"])
    assert seen[0] == seen[1]


@pytest.mark.parametrize("size", ["64k", "65k", "3000k", "20M"])
def test_stream_optimized_images_are_read(tools, size):
    """Text and noise, zeroes between."""
    tools.peer("create", "-q", "x.raw", size)
    with open(tools.path("x.raw"), "r+b") as f:
        for at in range(0, os.path.getsize(f.name) - 60000, 150000):
            f.seek(at)
            f.write(os.urandom(20000) + b"a line of text\n" * 2000)
    tools.peer("convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized", "x.raw", "x.img")
    same_content(tools, "vmdk")
    tools.same("info", "x.img")
    tools.same_json("info", "--output=json", "x.img")
    tools.same_json("map", "--output=json", "x.img")
    tools.same("check", "x.img")
    for size in (512, 70000):
        tools.ours("dd", "-O", "raw", f"bs={size}", "if=x.img", "of=y.raw")
        tools.ours("compare", "-f", "raw", "-F", "raw", "x.raw", "y.raw")


@pytest.mark.parametrize("subformat", ["twoGbMaxExtentSparse", "twoGbMaxExtentFlat"])
def test_disks_of_several_extents_are_read_across_them(tools, subformat):
    make(tools, "vmdk", f"subformat={subformat}", "5G", "write -P 1 0 64k", "write -P 2 2047M 2M", "write -P 3 4095M 2M",
         "write -P 4 5119M 1M")
    for words in (("info",), ("map",), ("check",)):
        tools.same(*words, "x.img")
    for words in (("info",), ("map",)):
        tools.same_json(*words, "--output=json", "x.img")
    tools.ours("convert", "-O", "qcow2", "x.img", "x.qcow2")
    tools.peer("compare", "x.img", "x.qcow2")


def extents(tools):
    return sorted(n for n in os.listdir(tools.directory) if n.startswith("x-"))


def test_extents_must_lie_beside_their_descriptor(tools):
    make(tools, "vmdk", "subformat=monolithicFlat", "2M", "write -P 1 0 64k")
    name, = extents(tools)
    with open(tools.path("x.img"), encoding="utf-8") as f:
        text = f.read()
    elsewhere = tools.path("elsewhere")
    os.mkdir(elsewhere)
    os.rename(tools.path(name), os.path.join(elsewhere, name))
    refused = tools.ours("info", "x.img", ok=(1,))
    assert f"extents.0 '{name}'" in refused.stderr and "cannot find file" in refused.stderr
    for other in (f"elsewhere/{name}", os.path.join(elsewhere, name), f"file:{name}", "..", "x.img"):
        with open(tools.path("x.img"), "w", encoding="utf-8") as f:
            f.write(text.replace(name, other))
        assert tools.ours("info", "x.img", ok=(1,)).stderr, other
    with open(tools.path("x.img"), "w", encoding="utf-8") as f:
        f.write(text)
    os.symlink(os.path.join(elsewhere, name), tools.path(name))
    refused = tools.cairn("info", "x.img", ok=(1,))
    assert "--allow" in refused.stderr
    tools.cairn("info", "--allow", elsewhere, "x.img")


def damage(tools, at, value):
    with open(tools.path("x.img"), "r+b") as f:
        f.seek(at)
        f.write(value.to_bytes(4, "little"))


@pytest.mark.parametrize("fmt,at", [("vdi", 512), ("vmdk", 27 * 512)])
def test_check_finds_what_the_peer_finds(tools, fmt, at):
    make(tools, fmt, "", "10M", "write -P 9 0 64k", "write -P 9 5M 64k")
    tools.same("check", "x.img")
    tools.same_json("check", "--output=json", "x.img")
    damage(tools, at, 0x123456)
    ours = tools.ours("check", "-f", fmt, "--output=json", "x.img", ok=(2,))
    assert json.loads(ours.stdout)["corruptions"] == 1
    assert tools.ours("convert", "-O", "raw", "x.img", "y.raw", ok=(1,)).stderr
    tools.ours("convert", "--salvage", "-O", "raw", "x.img", "y.raw")


def test_vhdx_tables_have_entries_between(tools):
    """An entry for bitmaps follows those of each 16 blocks, if these have 256 MiB."""
    make(tools, "vhdx", "block_size=256M", "9G", "write -P 2 4095M 2M", "write -P 4 8700M 64k")
    tools.ours("convert", "-O", "qcow2", "x.img", "x.qcow2")
    for pattern, at in ((2, "4095M"), (2, "4096M"), (4, "8700M")):
        read = run("qemu-io", "-f", "qcow2", "-c", f"read -P {pattern} {at} 64k", tools.path("x.qcow2"))
        assert "Pattern" not in read.stdout
    present = [e for e in json.loads(tools.ours("map", "--output=json", "x.img").stdout) if e["data"]]
    assert sum(e["length"] for e in present) == 3 * 256 << 20
    tools.same("check", "x.img")
    tools.same_json("check", "--output=json", "x.img")


def crc32c(data):
    table = []
    for n in range(256):
        for _ in range(8):
            n = n >> 1 ^ (0x82F63B78 if n & 1 else 0)
        table.append(n)
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ table[(crc ^ byte) & 255]
    return crc ^ 0xFFFFFFFF


def summed(data):
    """With its own checksum at byte 4."""
    data = data[:4] + bytes(4) + data[8:]
    return data[:4] + struct.pack("<I", crc32c(data)) + data[8:]


def entry(number, tail, guid, size, writes):
    """Of a log: (place, sector) each."""
    descriptors, sectors = b"", b""
    for place, sector in writes:
        descriptors += b"desc" + sector[-4:] + sector[:8] + struct.pack("<QQ", place, number)
        sectors += b"data" + struct.pack("<I", number >> 32) + sector[8:-4] + struct.pack("<I", number & 0xFFFFFFFF)
    head = b"loge" + struct.pack("<IIIQII", 0, 4096 + len(sectors), tail, number, len(writes), 0)
    return summed((head + guid + struct.pack("<QQ", size, size) + descriptors).ljust(4096, b"\0") + sectors)


def test_a_vhdx_log_is_replayed_as_the_peer_does(tools):
    """The image as a crash leaves it: the table of blocks is in the log only."""
    make(tools, "vhdx", "block_size=1M", "64M", "write -P 1 0 64k")
    with open(tools.path("x.img"), "rb") as f:
        before = f.read()
    tools.io("x.img", "write -P 2 5M 64k", "write -P 3 63M 64k", fmt="vhdx")
    with open(tools.path("x.img"), "rb") as f:
        after = bytearray(f.read())
    tools.peer("convert", "-O", "raw", "x.img", "after.raw")
    newest = max((65536, 131072), key=lambda at: struct.unpack_from("<Q", after, at + 8))
    log_len, log = struct.unpack_from("<IQ", after, newest + 68)
    bat = next(struct.unpack_from("<Q", after, at + 16)[0] for at in range(196608 + 16, 196608 + 2000, 32)
               if after[at:at + 4] == b"\x66\x77\xc2\x2d")
    changed = [at for at in range(bat, bat + 65536, 4096) if before[at:at + 4096] != after[at:at + 4096]]
    assert changed
    guid = bytes(range(16))
    writes = [(at, bytes(after[at:at + 4096])) for at in changed]
    old = [(at, bytes(before[at:at + 4096])) for at in changed]
    for at in changed:
        after[at:at + 4096] = before[at:at + 4096]
    ring = (entry(7, log_len - 4096 * (1 + len(old)), guid, len(after), old) +
            entry(8, log_len - 4096 * (1 + len(old)), guid, len(after), writes))
    split = 4096 * (1 + len(old))
    after[log:log + log_len] = ring[split:].ljust(log_len - split, b"\0") + ring[:split]
    header = after[newest:newest + 48] + guid + after[newest + 64:newest + 4096]
    after[newest:newest + 4096] = summed(bytes(header))
    with open(tools.path("x.img"), "wb") as f:
        f.write(after)
    tools.ours("compare", "-f", "vhdx", "-F", "raw", "x.img", "after.raw")
    tools.ours("check", "x.img")
    with open(tools.path("x.img"), "rb") as f:
        assert f.read() == after  # ours has written nothing
    tools.io("x.img", "write -P 9 62M 512", fmt="vhdx")  # the peer replays when it writes
    run("qemu-io", "-f", "raw", "-c", "write -P 9 62M 512", tools.path("after.raw"))
    tools.peer("compare", "-f", "vhdx", "-F", "raw", "x.img", "after.raw")
    same_content(tools, "vhdx")


def test_vhd_images_cannot_be_checked(tools):
    make(tools, "vpc", "", "10M")
    assert tools.ours("check", "x.img", ok=(63,)).stderr
    assert tools.peer("check", "x.img", ok=(63,)).stderr


def test_formats_are_probed(tools):
    for fmt in ("vdi", "vhdx", "vmdk", "vpc"):
        make(tools, fmt, "", "10M", "write -P 9 1M 64k")
        assert json.loads(tools.ours("info", "--output=json", "x.img").stdout)["format"] == fmt
        tools.same("compare", "x.img", "x.img")
        if fmt != "vhdx":  # of which the peer says that all is data
            tools.same("measure", "-O", "qcow2", "x.img")


def test_they_are_sources_and_backing_files(tools):
    make(tools, "vdi", "", "10M", "write -P 9 1M 64k")
    tools.ours("convert", "-O", "qcow2", "x.img", "x.qcow2")
    tools.peer("compare", "x.img", "x.qcow2")
    tools.ours("create", "-q", "-f", "qcow2", "-b", "x.img", "-F", "vdi", "over.qcow2")
    tools.io("over.qcow2", "write -P 7 2M 4k")
    tools.same("map", "--output=json", "over.qcow2")
    tools.same("info", "--backing-chain", "over.qcow2")
    tools.ours("dd", "if=x.img", "of=x.raw", "bs=1M", "count=3")
    run("qemu-io", "-f", "raw", "-c", "read -P 9 1M 64k", tools.path("x.raw"))


@pytest.mark.parametrize("fmt", ["vdi", "vhdx", "vmdk", "vpc"])
def test_they_are_never_written_or_made(tools, fmt):
    make(tools, fmt, "", "10M")
    before = open(tools.path("x.img"), "rb").read()
    for words in (("resize", "-f", fmt, "x.img", "20M"), ("bench", "-w", "-f", fmt, "x.img"),
                  ("convert", "-n", "-O", fmt, "x.img", "x.img")):
        assert tools.ours(*words, ok=(1,)).stderr, words
    made = tools.ours("create", "-f", fmt, "new.img", "1M", ok=(1,))
    assert f"Images of format '{fmt}' can be read, but not made" in made.stderr
    made = tools.ours("convert", "-O", fmt, "x.img", "new.img", ok=(1,))
    assert f"Images of format '{fmt}' can be read, but not made" in made.stderr
    assert not os.path.exists(tools.path("new.img"))
    assert open(tools.path("x.img"), "rb").read() == before


def test_writers_are_kept_out(tools):
    make(tools, "vdi", "", "10M")
    with tools.in_use("x.img", "vdi"):
        refused = tools.ours("compare", "x.img", "x.img", ok=None)
        shared = tools.ours("info", "-U", "x.img", ok=None)
    assert refused.returncode > 1 and "is another process using it" in refused.stderr
    assert shared.returncode == 0
