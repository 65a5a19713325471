# SPDX-License-Identifier: Apache-2.0
"""For tests of the tool `cairn`: running it, disks with a daemon, and killing either at a chosen message."""
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import threading

import pytest

from conftest import PATIENCE, wait_until

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


def alive(pid):
    """A process that is there and has not ended."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii") as f:
            return f.read().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


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
        ready = self.control + ".ready"
        wait_until(lambda: os.path.exists(ready) or self.process.poll() is not None, "the daemon to be ready")
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


class Proxy:
    """
    Between tool and daemon. Before, or after, it passes on the n-th message of either side, or the first one called `n`,
    it calls kill(). A message is called by its command, `COMMAND?` or `COMMAND!` for the answer, or by its event.
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
        pairs = ((tool, daemon), (daemon, tool))
        pumps = [threading.Thread(target=self.pump, args=pair, daemon=True) for pair in pairs]
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


def walk_over_messages(d, victim, kind, after=False):
    """Kills at each message in turn."""
    tool = d.tool
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
