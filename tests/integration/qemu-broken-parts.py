# SPDX-License-Identifier: Apache-2.0
"""A broken snapshot or bitmap never makes the disk unopenable: with any of their fields broken, it can be read and written, the
tool describes it and says what is broken, and `cairn check -r all` leaves an image that QEMU finds sound."""
import os
import shutil
import struct
import subprocess

import pytest

CAIRN = os.environ["CAIRN"]
CLUSTER = 4096

for tool in ("qemu-img", "qemu-io"):
    if not shutil.which(tool):
        print(f"requires {tool}")
        pytest.skip(tool, allow_module_level=True)


def run(*command):
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0 and "failed" not in done.stdout, (command, done)
    return done


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """The bytes of an image of QEMU's with two snapshots and two bitmaps."""
    path = str(tmp_path_factory.mktemp("sound") / "a.qcow2")
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"cluster_size={CLUSTER}", path, "1M")
    run("qemu-io", "-f", "qcow2", "-c", "write -P 1 0 64k", path)
    for name in ("one", "two"):
        run("qemu-img", "snapshot", "-c", name, path)
        run("qemu-io", "-f", "qcow2", "-c", "write -P 2 0 16k", path)
    run("qemu-img", "bitmap", "--add", path, "b0")
    run("qemu-img", "bitmap", "--add", "--disable", path, "b1")
    run("qemu-io", "-f", "qcow2", "-c", "write -P 3 4k 4k", path)
    with open(path, "rb") as f:
        return f.read()


def places(data):
    """Where the fields are, and how many bytes they have."""
    table = struct.unpack_from(">Q", data, 64)[0]
    extension = data.find(struct.pack(">I", 0x23852875), 72, CLUSTER)
    directory = struct.unpack_from(">Q", data, extension + 24)[0]
    return {
        "snapshots": (60, 4), "snapshot table": (64, 8),
        "snapshot L1 offset": (table, 8), "snapshot L1 size": (table + 8, 4), "snapshot ID length": (table + 12, 2),
        "snapshot name length": (table + 14, 2), "snapshot extra data": (table + 36, 4),
        "bitmaps": (extension + 8, 4), "reserved of bitmaps": (extension + 12, 4), "directory length": (extension + 16, 8),
        "directory": (extension + 24, 8), "bitmap table": (directory, 8), "bitmap table size": (directory + 8, 4),
        "bitmap flags": (directory + 12, 4), "bitmap type": (directory + 16, 1), "bitmap name length": (directory + 18, 2),
        "bitmap extra data": (directory + 20, 4),
    }


FIELDS = ["snapshots", "snapshot table", "snapshot L1 offset", "snapshot L1 size", "snapshot ID length", "snapshot name length",
          "snapshot extra data", "bitmaps", "reserved of bitmaps", "directory length", "directory", "bitmap table",
          "bitmap table size", "bitmap flags", "bitmap type", "bitmap name length", "bitmap extra data"]
# What describes the image has to say these; other damage is no business of a list.
TOLD = ["snapshots", "snapshot table", "snapshot ID length", "snapshot name length", "snapshot extra data", "bitmaps",
        "directory", "directory length", "bitmap name length", "bitmap extra data"]


@pytest.mark.parametrize("field", FIELDS)
def test_disk_opens_and_is_repaired(tmp_path, sound, field):
    at, size = places(sound)[field]
    path = str(tmp_path / "x.qcow2")
    for value in ((1 << 8 * size) - 1, (1 << 8 * size - 1) - 1, 1 << 40):  # all ones, huge, beyond the end
        if value >= 1 << 8 * size:
            continue
        with open(path, "wb") as f:
            f.write(sound[:at] + value.to_bytes(size, "big") + sound[at + size:])
        info = run(CAIRN, "info", path)
        assert "broken" in info.stderr or "cannot be used" in info.stderr or field not in TOLD, info
        run(CAIRN, "io", "-r", "-f", "qcow2", "-c", "read -P 3 4k 4k", "-c", "read -P 2 8k 8k", path)
        run(CAIRN, "io", "-f", "qcow2", "-c", "write -P 9 128k 4k", "-c", "read -P 3 4k 4k", path)
        run(CAIRN, "check", "-q", "-r", "all", path)
        run("qemu-img", "check", "-q", path)
        run("qemu-io", "-f", "qcow2", "-c", "read -P 3 4k 4k", "-c", "read -P 2 8k 8k", "-c", "read -P 9 128k 4k", path)
        run(CAIRN, "snapshot", "-l", path)


def test_broken_table_of_snapshots_is_not_changed(tmp_path, sound):
    """Nothing is made in a table that cannot be read, and nothing of it is given away."""
    path = str(tmp_path / "x.qcow2")
    with open(path, "wb") as f:
        f.write(sound[:64] + (1 << 40).to_bytes(8, "big") + sound[72:])
    done = subprocess.run([CAIRN, "snapshot", "-c", "three", path], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1 and "the table of snapshots is broken" in done.stderr, done
    run(CAIRN, "io", "-f", "qcow2", "-c", "write -P 8 0 512k", path)
    with open(path, "r+b") as f:
        f.seek(64)
        f.write(sound[64:72])
    run("qemu-img", "check", "-q", path)
    raw = str(tmp_path / "raw")
    run("qemu-img", "convert", "-l", "two", "-O", "raw", path, raw)
    with open(raw, "rb") as f:
        assert f.read(0x10000) == b"\2" * 0x4000 + b"\1" * 0xC000
