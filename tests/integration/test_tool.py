# SPDX-License-Identifier: Apache-2.0
"""The tool `cairn`: serving, backups and their protocol (docs/backup.md), restoring, jobs, and single commands."""
import json
import os
import pty
import random
import shutil
import signal
import socket
import struct
import subprocess
import threading
import time

import pytest

from conftest import PATIENCE, Qmp, wait_until

nbd = pytest.importorskip("nbd")

KIB, MIB = 1 << 10, 1 << 20
CLUSTER = 64 * KIB
SIZE = 2 * MIB


@pytest.fixture(scope="session")
def program():
    build = os.environ.get("CAIRN_BUILD")
    path = os.environ.get("CAIRN") or (build and os.path.join(build, "src/cli/cairn"))
    assert path and os.access(path, os.X_OK), "CAIRN_BUILD names no build directory with cairn in it"
    return os.path.abspath(path)


class Tool:
    """Runs the tool in a directory."""

    def __init__(self, program, directory):
        self.program = program
        self.directory = str(directory)

    def path(self, name):
        return os.path.join(self.directory, name)

    def start(self, *words, **more):
        return subprocess.Popen([self.program, *words], cwd=self.directory, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, text=True, **more)

    def run(self, *words, stdin=None):
        return subprocess.run([self.program, *words], cwd=self.directory, capture_output=True, text=True,
                              input=stdin, timeout=PATIENCE)

    def must(self, *words, warnings=False, **more):
        ended = self.run(*words, **more)
        assert ended.returncode == 0, (words, ended)
        assert warnings or not ended.stderr, (words, ended)
        return ended.stdout

    def json(self, *words, **more):
        return json.loads(self.must(*words, "--json", **more))

    def refused(self, status, text, *words, **more):
        """One line says why, and nothing else is said."""
        ended = self.run(*words, **more)
        assert ended.returncode == status, (words, ended)
        lines = [line for line in ended.stderr.splitlines() if not line.startswith("cairn: warning: ")]
        assert len(lines) == 1 and lines[0].startswith("cairn: ") and text in lines[0], (words, ended)
        assert not ended.stdout, (words, ended)
        return ended.stderr


@pytest.fixture
def tool(program, tmp_path):
    return Tool(program, tmp_path)


def stop(process, sig=signal.SIGTERM):
    if process.poll() is None:
        process.send_signal(sig)
    try:
        return process.wait(PATIENCE)
    finally:
        process.kill()
        for pipe in (process.stdout, process.stderr):
            if pipe:
                pipe.close()


def alive(pid):
    """A process that is there and has not ended."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii") as f:
            return f.read().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


@pytest.fixture
def serve(tool):
    """serve(DISK, OPTION...): what the tool says of where it serves; ends all of them in order."""
    processes = []

    def starter(disk, *options):
        processes.append(tool.start("serve", disk, "--json", *options))
        line = processes[-1].stdout.readline()
        assert line, processes[-1].stderr.read()
        where = json.loads(line)
        where["process"] = processes[-1]
        return where

    yield starter
    for process in processes:
        assert stop(process) == 0


def raw(path, size=SIZE, data=b""):
    with open(path, "wb") as f:
        f.write(data)
        f.truncate(size)


def content(path):
    with open(path, "rb") as f:
        return f.read()


def qemu_img(*words):
    return subprocess.run(["qemu-img", *words], capture_output=True, text=True, check=True).stdout


def pwrite(uri, data, offset):
    h = nbd.NBD()
    h.connect_uri(uri)
    h.pwrite(data, offset)
    h.shutdown()


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
    for fmt in ("vmdk", "vdi", "vhdx", "qed"):
        qemu_img("create", "-f", fmt, tool.path("x"), "64M")
        tool.refused(1, f"of format '{fmt}'", "serve", "x", "--socket", "x.nbd")
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
    disk["qmp"]("blockdev-add", "driver=raw", "node-name=r", "file.driver=null-co", 'file.size="1048576"'.replace('"', ""))
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


# ---- backups ----


def listens(path):
    with socket.socket(socket.AF_UNIX) as s:
        return s.connect_ex(path) == 0


class Disk:
    """A disk that is written to, its backups, and what it held at each of them."""

    def __init__(self, tool, cairnd, name="d", size=SIZE, seed=1):
        self.tool = tool
        self.cairnd = cairnd
        self.name = name
        self.size = size
        self.random = random.Random(seed)
        self.file = tool.path(name + ".raw")
        self.control = tool.path(name + ".qmp")
        self.uri = f"nbd+unix:///{name}?socket={tool.path(name)}.nbd"
        self.contents = {}  # of points, by directory and id
        raw(self.file, size, self.random.randbytes(size // 4))
        self.process = None
        self.start()

    def start(self):
        # What was killed may listen a moment longer, while the kernel ends its requests.
        for path in (self.control, self.tool.path(self.name) + ".nbd"):
            wait_until(lambda: not listens(path), f"the old daemon to leave '{path}'")
        if os.path.exists(self.control + ".ready"):
            os.unlink(self.control + ".ready")
        self.process = subprocess.Popen([
            self.cairnd, "--blockdev", f"driver=file,node-name=f,filename={self.file},discard=unmap",
            "--blockdev", "driver=raw,node-name=disk,file=f,discard=unmap",
            "--nbd-server", f"addr.type=unix,addr.path={self.tool.path(self.name)}.nbd",
            "--export", f"type=nbd,id=e,node-name=disk,name={self.name},writable=on",
            "--chardev", f"socket,id=c,path={self.control},server=on,wait=off", "--monitor", "chardev=c",
            "--pidfile", self.control + ".ready",
        ])
        wait_until(lambda: os.path.exists(self.control + ".ready") or self.process.poll() is not None, "the daemon")
        assert self.process.poll() is None

    def kill(self):
        self.process.kill()
        self.process.wait()

    def qmp(self, command, *words):
        return self.tool.json("qmp", self.control, command, *words)

    def write(self, count=3):
        h = nbd.NBD()
        h.connect_uri(self.uri)
        for _ in range(count):
            length = self.random.randrange(1, 40) * 512
            offset = self.random.randrange((self.size - length) // 512) * 512
            if self.random.random() < 0.25:
                h.zero(length, offset)
            else:
                h.pwrite(self.random.randbytes(length), offset)
        h.shutdown()

    def backup(self, *options, to="b", **more):
        point = self.tool.json("backup", self.control, "--to", to, *options, **more)
        self.contents[to, point["id"]] = content(self.file)
        return point

    def points(self, to="b"):
        return self.tool.json("backups", to)

    def check(self, point, to="b"):
        """Restored by the tool and read by qemu-img, it is what the disk was."""
        out = self.tool.path("restored")
        self.tool.must("restore", to, "--at", point["id"], out, "--force")
        assert content(out) == self.contents[to, point["id"]], f"point {point} does not hold what the disk held"

    def check_by_peer(self, point, to="b"):
        out = self.tool.path("converted")
        qemu_img("convert", "-O", "raw", self.tool.path(f"{to}/{point['image']}"), out)
        assert content(out) == self.contents[to, point["id"]], f"qemu-img reads point {point} otherwise"

    def check_clean(self, to="b"):
        """Nothing is left over, neither in the directory nor in the daemon."""
        files = {"cairn.json", ".cairn.lock"}
        for point in self.points(to):
            files |= {point["id"] + ".json", point["image"]}
        assert set(os.listdir(self.tool.path(to))) == files
        assert self.qmp("query-jobs") == []
        assert not [n for n in self.qmp("query-named-block-nodes") if n["node-name"].startswith("cairn-")]

    def bitmap(self, to="b"):
        with open(self.tool.path(f"{to}/cairn.json"), encoding="ascii") as f:
            return "cairn-" + json.load(f)["id"]


@pytest.fixture
def live(tool, cairnd):
    """Makes disks with a daemon each, which must end well unless they were killed."""
    disks = []

    def maker(**more):
        disks.append(Disk(tool, cairnd, **more))
        return disks[-1]

    yield maker
    for d in disks:
        assert stop(d.process) in (0, -signal.SIGKILL)


def test_first_full_then_incremental(tool, live):
    d = live()
    assert tool.must("backups", tool.directory) == "no backups\n"
    for i in range(6):
        point = d.backup()
        assert point["kind"] == ("incremental" if i else "full")
        assert ("reason" in point) == (i == 0) and ("base" in point) == (i > 0)
        assert i == 0 or 0 < point["bytes"] <= 6 * CLUSTER
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


# ---- kill -9 between any two steps ----


class Proxy:
    """
    Between tool and daemon. Before, or after, it passes on the n-th message of either side, or the first one called `n`, it
    calls kill(). A message is called by its command, `COMMAND?` or `COMMAND!` for the answer, or by its event.
    """

    def __init__(self, path, to, n, kill, after=False):
        self.to = to
        self.target = n
        self.count = 0
        self.commands = {}
        self.kill = kill
        self.after = after
        self.killed_at = None
        self.lock = threading.Lock()
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(path)
        self.listener.listen(1)
        self.path = path
        self.sockets = []
        self.threads = [threading.Thread(target=self.accept, daemon=True)]
        self.threads[0].start()

    def accept(self):
        try:
            tool, _ = self.listener.accept()
        except OSError:
            return
        daemon = socket.socket(socket.AF_UNIX)
        daemon.connect(self.to)
        self.sockets = [tool, daemon]
        pumps = [threading.Thread(target=self.pump, args=pair, daemon=True) for pair in ((tool, daemon), (daemon, tool))]
        self.threads += pumps
        for pump in pumps:
            pump.start()

    def pump(self, source, sink):
        try:
            for line in source.makefile("rb"):
                with self.lock:  # one message at a time: their order is that of the count
                    self.count += 1
                    name = self.name_of(json.loads(line))
                    here = self.target in (self.count, name) and not self.killed_at
                    if here and not self.after:
                        self.strike(name)
                    sink.sendall(line)
                    if here and self.after:
                        self.strike(name)
        except OSError:
            pass
        finally:
            for s in (source, sink):
                try:
                    s.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass

    def name_of(self, message):
        if "execute" in message:
            self.commands[message["id"]] = message["execute"]
            return message["execute"] + "?"
        if "id" in message:
            return self.commands[message["id"]] + "!"
        return message.get("event", "greeting")

    def strike(self, name):
        self.killed_at = name
        self.kill()

    def close(self):
        # Wakes accept().
        try:
            self.listener.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        for s in self.sockets:
            try:
                s.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
        for thread in self.threads:
            thread.join(PATIENCE)
        for s in [self.listener, *self.sockets]:
            s.close()
        os.unlink(self.path)


class KillWalk:
    """A backup that is killed at one place, and the next one, which must put all in order."""

    def __init__(self, disk):
        self.disk = disk
        self.tool = disk.tool
        self.known = set()

    def attempt(self, start):
        """start() begins a backup and waits for its end, one way or another; the disk does not change meanwhile."""
        d = self.disk
        d.write()
        at_attempt = content(d.file)
        start()
        points = {p["id"]: p for p in d.points()} if os.path.exists(self.tool.path("b")) else {}
        listed = set(points) - self.known
        assert len(listed) <= 1, listed
        for name in listed:
            d.contents["b", name] = at_attempt
            d.check(points[name])
        self.known |= listed
        return listed

    def recover(self):
        """The next backup: right, with nothing left over, and so are all points that are listed."""
        d = self.disk
        d.write()
        point = d.backup()
        points = {p["id"]: p for p in d.points()}
        assert set(points) == self.known | {point["id"]}, (set(points), self.known, point)
        self.known.add(point["id"])
        d.check(point)
        d.check_by_peer(point)
        d.check_clean()
        return point


def killed_backup(disk, victim, n, after):
    """Runs a backup through a proxy that kills the victim at message n. Returns that message, or None."""
    path = disk.tool.path("proxy")
    holder = {}
    kill = {"tool": lambda: os.kill(holder["tool"].pid, signal.SIGKILL), "daemon": disk.process.kill}[victim]
    proxy = Proxy(path, disk.control, n, kill, after)
    holder["tool"] = disk.tool.start("backup", path, "--to", "b", "--json")
    out, err = holder["tool"].communicate(timeout=PATIENCE)
    status = holder["tool"].returncode
    proxy.close()
    if victim == "tool":
        assert status == (-signal.SIGKILL if proxy.killed_at else 0), (n, proxy.killed_at, out, err)
    elif proxy.killed_at:
        disk.process.wait()
        # It failed, in one line, or the point was there already and it warned.
        assert status in (0, 1), (n, err)
        assert err.startswith("cairn: warning: the point is whole" if status == 0 else "cairn: ") or not err
        assert err.count("\n") <= 1, err
        disk.start()
    else:
        assert status == 0, err
    return proxy.killed_at


@pytest.mark.parametrize("victim,kind,after", [
    ("tool", "full", False), ("tool", "incremental", False), ("daemon", "full", False),
    ("daemon", "incremental", False), ("daemon", "incremental", True)])
def test_kill_at_each_message(tool, live, victim, kind, after):
    d = live()
    walk = KillWalk(d)
    places = []

    def once(n):
        """Returns whether there was such a message."""
        nonlocal walk
        if kind == "full" or (victim == "daemon" and len(places) % 8 == 0):
            shutil.rmtree(tool.path("b"), ignore_errors=True)
            walk = KillWalk(d)
        if kind == "incremental":  # what is continued
            walk.recover()
        found = []
        listed = walk.attempt(lambda: found.append(killed_backup(d, victim, n, after)))
        if found[0] is None:
            assert len(listed) == 1
            return False
        point = walk.recover()
        if kind == "incremental" and victim == "tool":
            assert point["kind"] == "incremental", (n, found, point)
        if victim == "daemon":
            assert point["kind"] == "full"
        places.append((found[0], bool(listed)))
        return True

    n = misses = 0
    while misses < 3:  # there are more and less of events
        n += 1
        misses = 0 if once(n) else misses + 1
    start = "transaction" if kind == "full" else "blockdev-backup"
    commands = ["qmp_capabilities", "query-named-block-nodes", "blockdev-add", start, "query-jobs", "job-finalize",
                "job-dismiss", "blockdev-del"]
    for name in ["greeting"] + [command + mark for command in commands for mark in "?!"]:
        if name not in (place for place, _ in places):
            assert once(name), name
    # Before the point is listed, and after.
    for place, listed in places:
        command = place.rstrip("?!")
        if command in ("greeting", "qmp_capabilities", "blockdev-add", start):
            assert not listed, place
        if command in ("job-finalize", "job-dismiss", "blockdev-del"):
            assert listed, place
    assert len(places) > 25


def test_kill_at_each_change_of_the_directory(tool, live):
    """The steps between messages: strace kills the tool at the k-th call of a kind."""
    if not shutil.which("strace"):
        pytest.skip("strace is not installed")
    d = live()
    walk = KillWalk(d)
    walk.recover()
    kills = {}
    for call in ("flock", "connect", "fsync", "renameat", "unlinkat"):
        for k in range(1, 100):
            ended = []

            def start():
                ended.append(subprocess.run(
                    ["strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={call}", "-e",
                     f"inject={call}:signal=KILL:when={k}", tool.program, "backup", d.control, "--to", "b", "--json"],
                    cwd=tool.directory, capture_output=True, text=True, timeout=PATIENCE))

            walk.attempt(start)
            if ended[0].returncode == 0:
                break
            assert ended[0].returncode == -signal.SIGKILL, ended
            assert walk.recover()["kind"] == "incremental"
            kills[call] = k
    # At least: the lock; image, point, and the directory twice; image and point.
    assert kills["flock"] >= 1 and kills["fsync"] >= 4 and kills["renameat"] >= 2, kills


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
