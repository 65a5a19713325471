# SPDX-License-Identifier: Apache-2.0
"""Overlap protection in the daemon, and what qemu-img and `cairn check` make of the image afterwards: the event, the mark, and that
nothing but the mark was written. The peer meets the same images, and marks them, too."""
import json
import os
import shutil

import pytest

from image_support import need_peer, program, run, u64

nbd = pytest.importorskip("nbd")
need_peer()

CLUSTER = 65536
COPIED = 1 << 63


def l2_table(path):
    return u64(path, u64(path, 40)) & 0x00fffffffffffe00


def make(path):
    """Two clusters of data; a snapshot, so that there are inactive tables."""
    run("qemu-img", "create", "-q", "-f", "qcow2", path, "64M")
    run("qemu-io", "-f", "qcow2", "-c", "write -P 1 0 128k", path)
    run("qemu-img", "snapshot", "-c", "s", path)
    run("qemu-io", "-f", "qcow2", "-c", "write -P 2 0 128k", path)


PLACES = {
    "refcount-table": lambda p: u64(p, 48),
    "refcount-block": lambda p: u64(p, u64(p, 48)),
    "active-l1": lambda p: u64(p, 40),
    "active-l2": l2_table,
    "snapshot-table": lambda p: u64(p, 64),
    "inactive-l1": lambda p: u64(p, u64(p, 64)),
}


def is_marked(path):
    return bool(u64(path, 72) & 2)


def check(path, *options, ok):
    return json.loads(run(program(), "check", "--output=json", *options, path, ok=ok).stdout)


class Disk:
    def __init__(self, daemon, path, **more):
        self.q = daemon.qmp()
        socket = os.path.join(daemon.directory, "n.sock")
        self.q.command("blockdev-add", driver="qcow2", **{"node-name": "d"}, file={"driver": "file", "filename": path}, **more)
        self.q.command("nbd-server-start", addr={"type": "unix", "data": {"path": socket}})
        self.q.command("block-export-add", type="nbd", id="e", **{"node-name": "d"}, writable=True)
        self.h = nbd.NBD()
        self.h.set_export_name("d")
        self.h.connect_unix(socket)

    def fails(self, call, *arguments):
        with pytest.raises(nbd.Error) as e:
            call(*arguments)
        assert e.value.errno == "EIO", e.value

    def close(self):
        self.h.shutdown()
        self.q.command("nbd-server-stop")
        self.q.command("blockdev-del", **{"node-name": "d"})


@pytest.mark.parametrize("kind", PLACES)
def test_write_into_metadata_marks_the_image(daemon, tmp_path, kind):
    path = str(tmp_path / "a")
    make(path)
    place = PLACES[kind](path)
    u64(path, l2_table(path), place | COPIED)
    twin = str(tmp_path / "twin")
    shutil.copy(path, twin)
    with open(path, "rb") as f:
        before = bytearray(f.read())
    disk = Disk(daemon, path)
    disk.fails(disk.h.pwrite, b"x" * 4096, 4096)
    event = disk.q.event("BLOCK_IMAGE_CORRUPTED")["data"]
    assert (event["device"], event["node-name"], event["fatal"]) == ("", "d", True)
    assert (event["offset"], event["size"]) == (place + 4096, 4096) and event["msg"]
    assert is_marked(path)
    disk.fails(disk.h.pread, 4096, 65536)
    disk.fails(disk.h.pwrite, b"x" * 4096, 65536)
    disk.fails(disk.h.flush)
    disk.close()
    with open(path, "rb") as f:
        after = bytearray(f.read())
    before[72:80] = after[72:80]
    assert before == after, "something else was written"
    # The peer does the same.
    run("qemu-io", "-f", "qcow2", "-c", "write -P 3 4k 4k", twin, ok=(1,))
    assert is_marked(twin)
    # Writers are refused, readers are not; a repair ends it.
    q = daemon.qmp()
    error = q.execute("blockdev-add", driver="qcow2", **{"node-name": "d"}, file={"driver": "file", "filename": path})["error"]
    assert "corrupt" in error["desc"]
    run("qemu-io", "-r", "-f", "qcow2", "-c", "read -P 2 64k 64k", path)
    run("qemu-img", "check", "-q", path, ok=(2,))
    check(path, ok=(2,))
    check(path, "-r", "all", ok=(0,))
    assert not is_marked(path)
    run("qemu-img", "check", "-q", path)
    run("qemu-io", "-f", "qcow2", "-c", "read -P 2 64k 64k", path)


def test_events_of_mere_damage_come_once_and_are_not_fatal(daemon, tmp_path):
    path = str(tmp_path / "a")
    make(path)
    u64(path, l2_table(path), (1 << 20) + 512 | COPIED)
    disk = Disk(daemon, path)
    for _ in range(3):
        disk.fails(disk.h.pread, 4096, 0)
    disk.h.pwrite(b"x" * 4096, 65536)
    event = disk.q.event("BLOCK_IMAGE_CORRUPTED")["data"]
    assert event["fatal"] is False and "offset" not in event
    disk.h.flush()
    disk.close()
    assert not is_marked(path)
    assert daemon.stderr().count("damaged") == 1


def test_options_are_taken_as_the_peer_takes_them(daemon, tmp_path):
    path = str(tmp_path / "a")
    make(path)
    q = daemon.qmp()
    for value in ("none", "constant", "cached", "all", {}, {"template": "all", "active-l2": False},
                  {f"{name}": True for name in (*PLACES, "inactive-l2", "main-header", "bitmap-directory")}):
        q.command("blockdev-add", driver="qcow2", **{"node-name": "d", "overlap-check": value},
                  file={"driver": "file", "filename": path})
        q.command("blockdev-del", **{"node-name": "d"})
    for value in ("most", {"template": "most"}, {"active-l3": True}, True):
        error = q.execute("blockdev-add", driver="qcow2", **{"node-name": "d", "overlap-check": value},
                          file={"driver": "file", "filename": path})["error"]
        assert "overlap-check" in error["desc"]


def test_dotted_options_of_the_command_line(start, tmp_path):
    path = str(tmp_path / "a")
    make(path)
    file = f"file.driver=file,file.filename={path}"
    start("--blockdev", f"driver=qcow2,node-name=d,overlap-check.template=none,overlap-check.active-l1=on,{file}").stop()
    start("--blockdev", f"driver=qcow2,node-name=d,overlap-check=all,{file}").stop()
