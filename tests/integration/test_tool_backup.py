# SPDX-License-Identifier: Apache-2.0
"""Backups by the tool `cairn`: what they hold, when they are incremental, and restoring them."""
import json
import os
import pty
import shutil
import signal
import socket
import subprocess
import time

from conftest import PATIENCE, Qmp, wait_until
from tool_support import (  # noqa: F401
    CLUSTER, MIB, SIZE, Proxy, content, live, program, pwrite, qemu_img, raw, stop, tool)


# ---- backups ----


def test_first_full_then_incremental(tool, live):
    d = live()
    assert tool.must("backups", tool.directory) == "no backups\n"
    for i in range(6):
        point = d.backup()
        assert point["kind"] == ("incremental" if i else "full")
        assert ("reason" in point) == (i == 0) and ("base" in point) == (i > 0)
        assert 0 < point["bytes"] <= (6 * CLUSTER if i else SIZE * 3 // 4)  # zeroes do not count
        d.write()
    idle = d.backup()
    assert d.backup()["bytes"] == 0 and idle["bytes"] > 0
    assert [p["kind"] for p in d.points()] == ["full"] + 7 * ["incremental"]
    for point in d.points():
        d.check(point)
        d.check_by_peer(point)
        qemu_img("check", tool.path(f"b/{point['image']}"))
    d.check_clean()
    text = tool.must("backups", "b")
    assert text.count("\n") == 8 and text.count("incremental") == 7 and d.file in text
    assert "full, " in tool.must("backup", d.control, "--to", "b", "--full")


def test_a_full_backup_says_why(tool, live):
    d = live()
    assert d.backup()["reason"] == "the first one of this disk here"
    d.write()
    assert d.backup("--full")["reason"] == "asked for"
    d.write()
    assert d.backup()["kind"] == "incremental"
    for command in ("clear", "disable"):
        d.write()
        d.qmp(f"block-dirty-bitmap-{command}", "node=disk", "name=" + d.bitmap())
        d.write()
        assert "begun anew" in d.backup()["reason"]
    d.write()
    assert d.backup()["kind"] == "incremental"
    # Disabled and enabled again: it looks as before.
    d.qmp("block-dirty-bitmap-disable", "node=disk", "name=" + d.bitmap())
    d.write()
    d.qmp("block-dirty-bitmap-enable", "node=disk", "name=" + d.bitmap())
    assert "begun anew" in d.backup()["reason"]
    d.qmp("block-dirty-bitmap-remove", "node=disk", "name=" + d.bitmap())
    d.write()
    assert "no bitmap" in d.backup()["reason"]
    d.kill()
    d.start()
    d.write()
    assert "no bitmap" in d.backup()["reason"]
    d.qmp("block-export-del", "id=e")
    d.qmp("block_resize", "node-name=disk", f"size={SIZE + MIB}")
    d.qmp("block-export-add", "type=nbd", "id=e", "node-name=disk", "name=d", "writable=true")
    d.size = SIZE + MIB
    assert "bytes now" in d.backup()["reason"]
    d.write()
    assert d.backup()["kind"] == "incremental"
    for point in d.points():
        d.check(point)
    d.check_clean()


def test_two_directories_do_not_disturb_each_other(live):
    d = live()
    for to in ("b", "c", "b", "c", "c", "b"):
        d.write()
        d.backup(to=to)
    for to in ("b", "c"):
        assert [p["kind"] for p in d.points(to)] == ["full", "incremental", "incremental"]
        for point in d.points(to):
            d.check(point, to)


def test_two_disks_in_one_directory(live):
    disks = [live(name="x"), live(name="y", seed=2)]
    for _ in range(3):
        for d in disks:
            d.write()
            d.backup()
    points = disks[0].points()
    assert len(points) == 6
    for d in disks:
        own = [p for p in points if p["disk"] == d.file]
        assert [p["kind"] for p in own] == ["full", "incremental", "incremental"]
        for point in own:
            d.check(point)


def test_which_disk(tool, live):
    d = live()
    d.qmp("blockdev-add", "driver=null-co", "node-name=n", "size=1048576")
    d.qmp("block-export-add", "type=nbd", "id=n", "node-name=n")
    tool.refused(1, "several disks", "backup", d.control, "--to", "b")
    tool.refused(1, "no node 'zz'", "backup", d.control, "--to", "b", "--disk", "zz")
    assert d.backup("--disk", "disk")["node"] == "disk"
    assert tool.json("backup", d.control, "--to", "b", "--disk", "n")["size"] == MIB
    d.qmp("block-export-del", "id=n")
    d.qmp("block-export-del", "id=e")
    tool.refused(1, "exports no disk", "backup", d.control, "--to", "b")
    d.check_clean()


def test_sizes(tool, live):
    odd = live(name="odd", size=MIB + 512)
    odd.write()
    odd.backup()
    odd.write()
    for point in (odd.backup(), *odd.points()):
        odd.check(point)
    none = live(name="none", size=1000)
    tool.refused(1, "1000 bytes, which is no multiple of 512", "backup", none.control, "--to", "c")
    assert tool.json("backups", "c") == []
    huge = live(name="huge", size=1 << 20)
    huge.qmp("block-export-del", "id=e")
    raw(tool.path("sparse"), 1 << 42)
    huge.qmp("blockdev-add", "driver=file", "node-name=sparse", "filename=" + tool.path("sparse"))
    begin = time.monotonic()
    point = tool.json("backup", huge.control, "--to", "s", "--disk", "sparse")
    tool.must("restore", "s", "sparse.out")
    assert time.monotonic() - begin < 20  # P5: it follows the data, of which there is none
    assert point["size"] == os.path.getsize(tool.path("sparse.out")) == 1 << 42
    assert os.stat(tool.path("sparse.out")).st_blocks == 0


def test_a_qcow2_disk_with_a_chain(tool):
    raw(tool.path("base.raw"), data=os.urandom(SIZE // 2))
    qemu_img("create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", tool.path("d.qcow2"))
    serving = tool.start("serve", "d.qcow2", "--json", "--socket", "d.nbd")
    where = json.loads(serving.stdout.readline())
    contents = {}
    for i in range(3):
        pwrite(where["nbd"], bytes([i + 1]) * 5000, i * 300000)
        point = tool.json("backup", "d.qmp", "--to", "b")
        subprocess.run(["nbdcopy", where["nbd"], tool.path(f"now{i}")], check=True)
        contents[point["id"]] = content(tool.path(f"now{i}"))
    assert stop(serving) == 0
    assert [p["kind"] for p in tool.json("backups", "b")] == ["full", "incremental", "incremental"]
    for name, data in contents.items():
        tool.must("restore", "b", "--at", name, "out", "--force")
        assert content(tool.path("out")) == data
        qemu_img("convert", "-O", "raw", tool.path(f"b/{name}.qcow2"), tool.path("peer"))
        assert content(tool.path("peer")) == data


def test_a_backup_that_fails_leaves_nothing(tool, live):
    d = live()
    first = d.backup()
    d.write()
    # Somebody cancels it.
    process = tool.start("backup", d.control, "--to", "b", "--full", "--speed", "64k")
    wait_until(lambda: [j for j in d.qmp("query-jobs") if j["status"] == "running"], "the job to run")
    tool.refused(1, "another backup", "backup", d.control, "--to", "b")
    d.qmp("job-cancel", "id=" + d.bitmap())
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1 and err.startswith("cairn: ") and not out, (out, err)
    assert d.points() == [first]
    d.check_clean()
    # The tool is interrupted.
    process = tool.start("backup", d.control, "--to", "b", "--full", "--speed", "64k")
    wait_until(lambda: [j for j in d.qmp("query-jobs") if j["status"] == "running"], "the job to run")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out, err) == (1, "", "cairn: interrupted\n")
    d.check_clean()
    # What was dirty is still.
    assert d.backup()["kind"] == "incremental"
    for point in d.points():
        d.check(point)


def test_a_bar_on_a_terminal(tool, live):
    d = live()
    controller, terminal = pty.openpty()
    process = subprocess.Popen([tool.program, "backup", d.control, "--to", tool.path("b"), "--speed", "1M"],
                               stdout=terminal, stderr=subprocess.PIPE)
    os.close(terminal)
    seen = b""
    while b" copied" not in seen:
        seen += os.read(controller, 4096)
    assert process.wait(PATIENCE) == 0
    process.stderr.close()
    os.close(controller)
    assert b"full [" in seen and b"/s  " in seen and b"\r\033[K" in seen


# ---- restore ----


def test_restore(tool, live):
    d = live(size=64 * MIB)  # with holes
    first = d.backup()
    d.write()
    second = d.backup()
    result = tool.json("restore", "b", "out.raw")
    assert result["point"] == second["id"] and content(tool.path("out.raw")) == d.contents["b", second["id"]]
    assert os.stat(tool.path("out.raw")).st_blocks * 512 < 24 * MIB
    tool.refused(1, "--force", "restore", "b", "out.raw")
    tool.must("restore", "b", "--at", first["time"], "out.raw", "--force")
    assert content(tool.path("out.raw")) == d.contents["b", first["id"]]
    tool.must("restore", "b", "--at", second["time"][:10], "out.qcow2", "--format", "qcow2")
    qemu_img("check", tool.path("out.qcow2"))
    assert "backing" not in qemu_img("info", "--output=json", tool.path("out.qcow2"))
    qemu_img("convert", "-O", "raw", tool.path("out.qcow2"), tool.path("out2.raw"))
    assert content(tool.path("out2.raw")) == d.contents["b", second["id"]]
    tool.refused(1, "no point 'x'", "restore", "b", "--at", "x", "new.raw")
    tool.refused(1, "no point ''", "restore", "b", "--at", "", "new.raw")
    tool.refused(1, "no backup", "restore", ".", "new.raw")
    tool.refused(1, "No such file", "restore", "nowhere", "new.raw")
    tool.refused(2, "--format vdi", "restore", "b", "new.raw", "--format", "vdi")
    tool.refused(1, "neither a regular file", "restore", "b", ".", "--force")
    assert not [f for f in os.listdir(tool.directory) if "part" in f or f == "new.raw"]


def test_a_restore_that_fails_leaves_what_was_there(tool, live):
    d = live()
    d.backup()
    raw(tool.path("out"), data=b"precious")
    before = content(tool.path("out"))
    point = d.points()[0]
    with open(tool.path(f"b/{point['image']}"), "r+b") as f:
        f.truncate(4 * CLUSTER)  # the data is cut off
    ended = tool.run("restore", "b", "out", "--force")
    assert ended.returncode == 1 and ended.stderr.startswith("cairn: "), ended
    assert content(tool.path("out")) == before and not os.path.exists(tool.path("out.cairn-part"))


def test_points_that_are_not_right_are_left_out(tool, live):
    d = live()
    for _ in range(4):
        d.backup()
        d.write()
    points = d.points()
    broken = points[2]
    shutil.copy(tool.path(f"b/{points[0]['image']}"), tool.path(f"b/{broken['image']}"))  # another backing file
    with open(tool.path("b/20000101T000000Z.json"), "w", encoding="ascii") as f:
        f.write("{")
    ended = tool.run("backups", "b", "--json")
    assert ended.returncode == 0 and ended.stderr.count("cairn: warning: ") == 3, ended
    assert json.loads(ended.stdout) == points[:2]
    tool.refused(1, "no point", "restore", "b", "--at", broken["id"], "out")
    # The bitmap continues a point that is none: the next backup does not.
    point = d.backup(warnings=True)
    assert point["kind"] == "full"
    ended = tool.run("restore", "b", "--at", point["id"], "out")
    assert ended.returncode == 0 and content(tool.path("out")) == d.contents["b", point["id"]]


# ---- someone else ----


def test_someone_else_clears_the_bitmap_between_look_and_job(tool, live):
    """Step 6 of the protocol: the job has begun with a bitmap that is another one by now."""
    d = live()
    d.backup()
    d.write()
    path = tool.path("proxy")
    q = Qmp(d.control)

    class Meddler(Proxy):
        done = False

        def pump(self, source, sink):
            for line in source.makefile("rb"):
                if b'"blockdev-backup"' in line and not self.done:
                    self.done = True
                    q.send({"execute": "block-dirty-bitmap-clear",
                            "arguments": {"node": "disk", "name": d.bitmap()}})
                    assert q.answer() == {"return": {}}
                sink.sendall(line)
            sink.shutdown(socket.SHUT_WR)

    proxy = Meddler(path, d.control, 0, None)
    point = tool.json("backup", path, "--to", "b")
    proxy.close()
    q.close()
    assert proxy.done and point["kind"] == "full" and "begun anew" in point["reason"]
    d.contents["b", point["id"]] = content(d.file)
    d.check(point)
    d.check_clean()
