# SPDX-License-Identifier: Apache-2.0
"""The tool `cairn`: how it is called, serving disks, jobs, and single commands."""
import json
import os
import pty
import random
import signal
import subprocess

import pytest

from conftest import PATIENCE, wait_until
from tool_support import (CLUSTER, MIB, SIZE, alive, content, program, pwrite, qemu_img, raw, serve,  # noqa: F401
                          stop, tool)


# ---- how it is called ----


def test_wrong_usage_has_status_2(tool):
    tool.refused(2, "which command?")
    tool.refused(2, "no command 'frobnicate'", "frobnicate")
    tool.refused(2, "no command 'frobnicate'", "help", "frobnicate")
    for command in ("serve", "backup", "backups", "restore", "jobs", "qmp"):
        tool.refused(2, "missing", command)
        tool.refused(2, "'--frobnicate' is not understood", command, "--frobnicate")
        assert tool.must(command, "--help") == tool.must("help", command)
        assert f"usage: cairn {command}" in tool.must("help", command)
    tool.refused(2, "'--to' needs a value", "backup", "s", "--to")
    tool.refused(2, "--to DIR missing", "backup", "s")
    tool.refused(2, "--speed x", "backup", "s", "--to", "d", "--speed", "x")
    tool.refused(2, "more arguments", "backups", "a", "b")
    assert "cairn version" in tool.must("--version")
    assert all(f"  {c} " in tool.must("--help") for c in ("serve", "backup", "restore", "jobs", "qmp"))


def test_nobody_at_the_socket(tool):
    tool.refused(1, "No such file", "jobs", "nothing.qmp")
    tool.refused(1, "No such file", "qmp", "nothing.qmp", "quit")
    tool.refused(1, "No such file", "backup", "nothing.qmp", "--to", "b")
    assert not os.path.exists(tool.path("b"))


def test_standard_output_that_is_full(tool):
    with open("/dev/full", "wb") as full:
        ended = subprocess.run([tool.program, "help"], stdout=full, stderr=subprocess.PIPE)
    assert ended.returncode == 1 and ended.stderr == b"cairn: cannot write to standard output\n"


# ---- serve ----


def test_serve_says_where_and_ends_in_order(tool):
    raw(tool.path("d.raw"))
    process = tool.start("serve", "d.raw", "--socket", "d.nbd", "--format", "raw")
    lines = [process.stdout.readline() for _ in range(3)]
    assert [line.split()[0] for line in lines] == ["disk", "nbd", "control"]
    pwrite(lines[1].split()[1], b"x" * 512, 512)
    assert tool.json("qmp", "d.qmp", "query-block-exports")[0]["writable"]
    assert stop(process, signal.SIGINT) == 0
    assert content(tool.path("d.raw"))[512:1024] == b"x" * 512
    assert not os.path.exists(tool.path("d.nbd")) and not os.path.exists(tool.path("d.qmp"))


def test_serve_in_the_runtime_directory(tool, serve, monkeypatch):
    runtime = tool.path("run")
    os.mkdir(runtime, 0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", runtime)
    raw(tool.path("some disk.raw"))
    where = serve("some disk.raw", "--format", "raw", "--read-only")
    assert where["socket"] == runtime + "/cairn/some disk.nbd"
    assert where["control"] == runtime + "/cairn/some disk.qmp"
    assert json.loads(subprocess.run(["nbdinfo", "--json", where["nbd"]], capture_output=True, check=True).stdout)[
        "exports"][0]["export-name"] == "some disk"
    assert not tool.json("qmp", where["control"], "query-block-exports")[0]["writable"]
    tool.refused(1, "a daemon answers", "serve", "some disk.raw", "--format", "raw", "--read-only")
    os.chmod(runtime + "/cairn", 0o777)
    tool.refused(1, "only this user", "serve", "some disk.raw", "--format", "raw")
    os.chmod(runtime + "/cairn", 0o700)


def test_the_daemon_does_not_outlive_its_tool(tool):
    raw(tool.path("d.raw"))
    process = tool.start("serve", "d.raw", "--json", "--socket", "d.nbd", "--format", "raw")
    daemon = json.loads(process.stdout.readline())["pid"]
    stop(process, signal.SIGKILL)
    wait_until(lambda: not alive(daemon), "the daemon to end")


def test_a_daemon_that_ends_is_told(tool):
    raw(tool.path("d.raw"))
    process = tool.start("serve", "d.raw", "--json", "--socket", "d.nbd", "--format", "raw")
    os.kill(json.loads(process.stdout.readline())["pid"], signal.SIGKILL)
    assert process.wait(PATIENCE) == 1
    assert "cairn: the daemon has ended with status 137\n" == process.stderr.read()
    stop(process)
    # And one that does not begin: somebody else writes to the disk.
    qemu_img("create", "-f", "qcow2", tool.path("e"), "1M")
    holder = tool.start("serve", "e", "--json", "--socket", "e.nbd")
    holder.stdout.readline()
    ended = tool.run("serve", "e", "--socket", "f.nbd")
    assert ended.returncode == 1 and "cairn: the daemon has ended with status 1" in ended.stderr
    assert stop(holder) == 0


def test_formats_are_probed_as_qemu_img_does(tool, serve):
    raw(tool.path("d.img"))
    where = serve("d.img", "--socket", "d.nbd")
    assert where["format"] == "raw"
    stop_process = where["process"]
    assert stop(stop_process) == 0
    warned = tool.start("serve", "d.img", "--json", "--socket", "d.nbd")
    warned.stdout.readline()
    warned.send_signal(signal.SIGTERM)
    assert "warning: the format of" in warned.communicate()[1]
    for options in (["--read-only"], ["--format", "raw"]):
        quiet = tool.start("serve", "d.img", "--json", "--socket", "d.nbd", *options)
        quiet.stdout.readline()
        quiet.send_signal(signal.SIGTERM)
        assert quiet.communicate()[1] == ""
    qemu_img("create", "-f", "qcow2", tool.path("q.img"), "1M")
    assert serve("q.img", "--socket", "q.nbd")["format"] == "qcow2"
    for fmt, why in (("vmdk", "never written"), ("vdi", "never written"), ("vhdx", "never written"), ("qed", "not served")):
        qemu_img("create", "-f", fmt, tool.path("x"), "64M")
        tool.refused(1, f"of format '{fmt}', which is {why}", "serve", "x", "--socket", "x.nbd")
        os.unlink(tool.path("x"))
    tool.refused(1, "neither a regular file", "serve", ".", "--socket", "x.nbd")


def test_a_chain_is_served(tool, serve):
    raw(tool.path("base.raw"), data=b"base" * 16384)
    previous, fmt = "base.raw", "raw"
    for i in range(40):
        # Every other layer does not say the format of its backing file.
        qemu_img("create", "-q", "-f", "qcow2", "-b", previous, "-F", fmt, tool.path(f"l{i}.qcow2"))
        if i % 2:
            with open(tool.path(f"l{i}.qcow2"), "r+b") as f:  # the extension becomes one that nobody knows
                head = f.read(4096)
                assert head.count(b"\xe2\x79\x2a\xca") == 1
                f.seek(0)
                f.write(head.replace(b"\xe2\x79\x2a\xca", b"none"))
        previous, fmt = f"l{i}.qcow2", "qcow2"
    where = serve(previous, "--socket", "c.nbd")
    pwrite(where["nbd"], b"top" + bytes(509), CLUSTER)
    nodes = {n["node-name"]: n for n in tool.json("qmp", where["control"], "query-named-block-nodes")}
    assert len([n for n in nodes if n.startswith("disk")]) == 41
    assert nodes["disk-40"]["drv"] == "raw" and nodes["disk-40"]["ro"] and not nodes["disk"]["ro"]
    out = subprocess.run(["nbdcopy", where["nbd"], "-"], capture_output=True, check=True).stdout
    assert out == (b"base" * 16384 + b"top").ljust(SIZE, b"\0")


def test_references_open_only_what_is_granted(tool, serve, tmp_path):
    (tmp_path / "secret").mkdir()
    (tmp_path / "images" / "below").mkdir(parents=True)
    raw(tool.path("secret/key"), 1 * MIB)
    raw(tool.path("images/below/base"), 1 * MIB)
    qemu_img("create", "-q", "-f", "qcow2", "-b", tool.path("secret/key"), "-F", "raw", tool.path("images/a.qcow2"))
    qemu_img("create", "-q", "-f", "qcow2", "-b", "below/base", "-F", "raw", tool.path("images/b.qcow2"))
    qemu_img("create", "-q", "-f", "qcow2", "-b", "link", "-F", "raw", "-u", tool.path("images/c.qcow2"), "1M")
    os.symlink("../secret/key", tool.path("images/link"))
    for image, directory in (("a", "secret"), ("b", "images/below"), ("c", "secret")):
        for _ in range(1):
            text = tool.refused(1, "would grant it", "serve", f"images/{image}.qcow2", "--socket", "x.nbd")
            assert f"'--allow {tool.path(directory)}'" in text
        where = serve(f"images/{image}.qcow2", "--socket", f"{image}.nbd", "--allow", directory, "--read-only")
        assert where["format"] == "qcow2"
    qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", "nbd://localhost/x", "-F", "raw", tool.path("p.qcow2"), "1M")
    tool.refused(1, "'nbd:'", "serve", "p.qcow2", "--socket", "x.nbd")
    qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", "json:{}", "-F", "raw", tool.path("p.qcow2"), "1M")
    tool.refused(1, "'json:'", "serve", "p.qcow2", "--socket", "x.nbd")
    qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", "/dev/null", "-F", "raw", tool.path("p.qcow2"), "1M")
    tool.refused(1, "no regular file", "serve", "p.qcow2", "--socket", "x.nbd")
    qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", "nowhere", "-F", "raw", tool.path("p.qcow2"), "1M")
    tool.refused(1, "nowhere", "serve", "p.qcow2", "--socket", "x.nbd")


def test_a_chain_that_comes_back_is_refused(tool):
    for name, backing in (("a", "b"), ("b", "c"), ("c", "b"), ("self", "self")):
        qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", backing, "-F", "qcow2", tool.path(name), "1M")
    tool.refused(1, "which is above it", "serve", "a", "--socket", "x.nbd")
    tool.refused(1, "which is above it", "serve", "self", "--socket", "x.nbd")


# ---- qmp and jobs ----


@pytest.fixture
def disk(tool, serve):
    """A raw disk with random content, served."""
    raw(tool.path("d.raw"), data=random.Random(1).randbytes(SIZE))
    where = serve("d.raw", "--format", "raw", "--socket", tool.path("d.nbd"))
    where["qmp"] = lambda command, *words: tool.json("qmp", where["control"], command, *words)
    return where


def test_qmp_arguments(tool, disk):
    qmp = disk["control"]
    assert tool.json("qmp", qmp, "blockdev-add", "driver=null-co", "node-name=n", "size=1048576",
                     "read-zeroes=true") == {}
    disk["qmp"]("blockdev-add", "driver=raw", "node-name=r", "file.driver=null-co", "file.size=1048576")
    disk["qmp"]("block-dirty-bitmap-add", "node=n", 'name="7"')
    disk["qmp"]("block-dirty-bitmap-add", "node=n", "name=a,b=c")
    disk["qmp"]("transaction", 'actions=[{"type": "block-dirty-bitmap-clear", "data": {"node": "n", "name": "7"}}]')
    disk["qmp"]("block-dirty-bitmap-merge", "node=n", "target=a,b=c", "bitmaps.0=\"7\"")
    nodes = {n["node-name"]: n for n in disk["qmp"]("query-named-block-nodes")}
    assert [b["name"] for b in nodes["n"]["dirty-bitmaps"]] == ["7", "a,b=c"]
    tool.refused(1, "block-dirty-bitmap-add: GenericError", "qmp", qmp, "block-dirty-bitmap-add", "node=n", "name=7")
    tool.refused(1, "frobnicate: CommandNotFound", "qmp", qmp, "frobnicate")
    tool.refused(2, "KEY=VALUE", "qmp", qmp, "query-jobs", "x")
    tool.refused(2, "KEY=VALUE", "qmp", qmp, "query-jobs", "=x")
    tool.refused(2, "cairn: ", "qmp", qmp, "query-jobs", "a=1", "a.b=2")


def test_qmp_from_standard_input(tool, disk):
    qmp = disk["control"]
    out = tool.must("qmp", qmp, "-", stdin='{"execute": "query-block", "arguments": {}}')
    assert json.loads(out) == []
    indented = tool.must("qmp", qmp, "query-version")
    assert json.loads(indented) == tool.json("qmp", qmp, "query-version") and indented.count("\n") > 3
    tool.refused(1, "standard input", "qmp", qmp, "-", stdin="{")
    tool.refused(1, "a command is", "qmp", qmp, "-", stdin="{}")
    tool.refused(1, "'frob'", "qmp", qmp, "-", stdin='{"execute": "x", "frob": 1}')
    tool.refused(2, "stand there", "qmp", qmp, "-", "a=b", stdin="{}")


def slow_backup(tool, disk):
    raw(tool.path("target"))
    disk["qmp"]("blockdev-add", "driver=file", "node-name=t", "filename=" + tool.path("target"))
    disk["qmp"]("blockdev-backup", "job-id=j", "device=disk", "target=t", "sync=full", "speed=65536")


def test_jobs_where_there_is_no_terminal(tool, disk):
    assert tool.must("jobs", disk["control"]) == "no jobs\n"
    assert tool.json("jobs", disk["control"]) == []
    slow_backup(tool, disk)
    line = tool.must("jobs", disk["control"], "--once")
    assert line.split()[:3] == ["j", "backup", "running"] and line.count("\n") == 1 and "\033" not in line
    assert tool.json("jobs", disk["control"], "--once")[0]["id"] == "j"
    watcher = tool.start("jobs", disk["control"], "--json")
    assert json.loads(watcher.stdout.readline())[0]["status"] == "running"
    disk["qmp"]("job-cancel", "id=j")
    lines = watcher.communicate(timeout=PATIENCE)[0].splitlines()
    assert watcher.returncode == 0 and lines[-1] == "[]"


def test_jobs_on_a_terminal_until_interrupted(tool, disk):
    slow_backup(tool, disk)
    controller, terminal = pty.openpty()
    process = subprocess.Popen([tool.program, "jobs", disk["control"]], stdout=terminal, stderr=subprocess.PIPE)
    os.close(terminal)
    seen = b""
    while b"%" not in seen or b"KiB/s" not in seen or b"left" not in seen:
        seen += os.read(controller, 4096)
    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE) == 0 and process.stderr.read() == b""
    process.stderr.close()
    os.close(controller)
    assert b"[#" in seen or b"[." in seen
    disk["qmp"]("job-cancel", "id=j")
