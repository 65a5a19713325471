# SPDX-License-Identifier: Apache-2.0
"""`cairn nbd` under the peer's name, beside the peer: what clients are told and given, how long it stays, how it fails."""
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

import image_support
from image_support import PATIENCE, program, run

for tool in ("qemu-nbd", "qemu-img", "qemu-io", "nbdinfo", "nbdcopy"):
    if not shutil.which(tool):
        print(f"requires {tool}")
        pytest.skip(tool, allow_module_level=True)
try:
    import nbd
except ImportError:
    print("requires python3-libnbd")
    pytest.skip("python3-libnbd", allow_module_level=True)

image_support.need_peer()

MIB = 1 << 20


def wait_until(what):
    end = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < end, what
        time.sleep(0.005)


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


class Place:
    """A directory with images, and both programs."""

    def __init__(self, directory):
        self.dir = str(directory)
        os.mkdir(self.path("bin"))
        os.symlink(program(), self.path("bin/qemu-nbd"))
        self.ours = self.path("bin/qemu-nbd")
        self.both = [shutil.which("qemu-nbd"), self.ours]
        self.running = []

    def path(self, name):
        return os.path.join(self.dir, name)

    def uri(self, name=""):
        return f"nbd+unix:///{name}?socket={self.path('s')}"

    def run(self, *command, ok=(0,), **options):
        return run(*map(str, command), ok=ok, cwd=self.dir, **options)

    def images(self):
        self.run("qemu-img", "create", "-q", "-f", "raw", "disk.raw", "4M")
        self.run("qemu-io", "-f", "raw", "-c", "write -P 1 0 64k", "-c", "write -P 2 512k 64k", "disk.raw")
        self.run("qemu-img", "create", "-q", "-f", "qcow2", "base.qcow2", "4M")
        self.run("qemu-io", "-f", "qcow2", "-c", "write -P 1 0 64k", "-c", "write -P 2 512k 128k", "-c",
                 "write -z 768k 64k", "base.qcow2")
        self.run("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "top.qcow2")
        self.run("qemu-io", "-f", "qcow2", "-c", "write -P 3 64k 64k", "-c", "write -z 512k 64k", "top.qcow2")

    def start(self, server, *words, ok=(0,)):
        """In the background: it has returned when clients can come. The pid of the server."""
        if os.path.exists(self.path("pid")):
            os.unlink(self.path("pid"))  # the peer leaves it
        done = self.run(server, "--fork", "--pid-file", self.path("pid"), "-k", self.path("s"), *words, ok=ok)
        if done.returncode:
            return None
        with open(self.path("pid")) as f:
            self.running.append(int(f.read()))
        return self.running[-1]

    def stop(self, pid):
        os.kill(pid, signal.SIGTERM)
        wait_until(lambda: not alive(pid))
        self.running.remove(pid)

    def close(self):
        for pid in self.running:
            if alive(pid):
                os.kill(pid, signal.SIGKILL)

    def told(self, server, *words, name="", maps=()):
        """All that nbdinfo says."""
        pid = self.start(server, "-t", *words)
        text = [self.run("nbdinfo", "--json", self.uri(name)).stdout]
        for context in maps:
            text.append(self.run("nbdinfo", f"--map={context}", self.uri(name)).stdout)
        text.append(self.run("nbdinfo", "--list", "--json", self.uri(name)).stdout)
        self.stop(pid)
        return text


@pytest.fixture
def place(tmp_path):
    p = Place(tmp_path)
    p.images()
    yield p
    p.close()


DEPTHS = ("base:allocation", "qemu:allocation-depth")


@pytest.mark.parametrize("words, name, maps", [
    (["-f", "raw", "disk.raw"], "", DEPTHS[:1]),
    (["-f", "qcow2", "top.qcow2"], "", DEPTHS[:1]),
    (["top.qcow2"], "", ()),
    (["-r", "-f", "raw", "disk.raw"], "", ()),
    (["-e", "0", "-f", "qcow2", "top.qcow2"], "", ()),
    (["-e", "2", "-r", "-f", "qcow2", "top.qcow2"], "", ()),
    (["-A", "-f", "qcow2", "top.qcow2"], "", DEPTHS),
    (["-A", "-f", "raw", "disk.raw"], "", DEPTHS),
    (["-A", "-s", "-f", "qcow2", "top.qcow2"], "", DEPTHS),
    (["-x", "a disk", "-D", "what it is", "-f", "raw", "disk.raw"], "a%20disk", ()),
    (["-o", "512", "-f", "raw", "disk.raw"], "", ()),
    (["--cache=writethrough", "--discard=unmap", "--detect-zeroes=off", "--aio=threads", "-f", "raw", "disk.raw"],
     "", ()),
    (["-n", "-r", "--image-opts", "driver=qcow2,file.filename=top.qcow2"], "", ()),
], ids=" ".join)
def test_clients_are_told_the_same(place, words, name, maps):
    peer, ours = (place.told(server, *words, name=name, maps=maps) for server in place.both)
    assert ours == peer


def test_a_window_into_a_chain_is_described(place):
    """The peer only says of the range that it is something."""
    pid = place.start(place.ours, "-t", "-A", "-o", "64k", "-f", "qcow2", "top.qcow2")
    h = nbd.NBD()
    for context in DEPTHS:
        h.add_meta_context(context)
    h.connect_uri(place.uri())
    assert h.get_size() == 4 * MIB - 65536
    found = {}
    h.block_status(h.get_size(), 0, lambda name, offset, entries, error: found.update({name: entries}) or 0)
    unit = 65536
    hole, data = 3, 0
    assert found[DEPTHS[0]] == [unit, data, 6 * unit, hole, unit, hole, unit, data, h.get_size() - 9 * unit, hole] or \
        found[DEPTHS[0]] == [unit, data, 7 * unit, hole, unit, data, h.get_size() - 9 * unit, hole]
    assert found[DEPTHS[1]] == [unit, 1, 6 * unit, 0, unit, 1, unit, 2, 2 * unit, 0, unit, 2,
                                h.get_size() - 12 * unit, 0]
    assert h.pread(unit, 0) == b"\3" * unit
    h.shutdown()
    place.stop(pid)


BITMAPS = tuple(f"qemu:dirty-bitmap:{name}" for name in ("old", "new"))


@pytest.mark.parametrize("words, maps", [
    (["-B", "old", "base.qcow2"], BITMAPS[:1]),
    (["-B", "old", "-B", "new", "base.qcow2"], BITMAPS),
    (["-r", "-A", "-B", "new", "-B", "old", "base.qcow2"], DEPTHS + BITMAPS),
    (["-r", "-B", "new", "top.qcow2"], BITMAPS[1:]),
    (["-A", "-B", "old", "top.qcow2"], DEPTHS + BITMAPS[:1]),
    (["-s", "-B", "old", "top.qcow2"], BITMAPS[:1]),
], ids=lambda v: " ".join(v) if isinstance(v, list) else None)
def test_bitmaps_in_images_are_shown(place, words, maps):
    """Of the image, or of one below it; those that record and those that do not."""
    for name in ("old", "new"):
        place.run("qemu-img", "bitmap", "--add", "-g", "64k", "base.qcow2", name)
        place.run("qemu-io", "-f", "qcow2", "-c", "write 1M 64k", "-c", "write 3M 192k", "base.qcow2")
    place.run("qemu-img", "bitmap", "--disable", "base.qcow2", "old")
    peer, ours = (place.told(server, "-f", "qcow2", *words, maps=maps) for server in place.both)
    assert ours == peer
    place.run("qemu-img", "check", "-q", "-f", "qcow2", "base.qcow2")


@pytest.mark.parametrize("words, image", [
    (["-f", "raw"], "disk.raw"),
    (["-f", "qcow2"], "top.qcow2"),
    (["-f", "raw", "-o", "65536"], "disk.raw"),
    (["-f", "qcow2", "-o", "65536"], "top.qcow2"),
    (["-f", "qcow2", "--discard=unmap", "--cache=none"], "top.qcow2"),
], ids=lambda v: " ".join(v) if isinstance(v, list) else v)
def test_what_clients_write_is_in_the_image(place, words, image):
    pictures = []
    for server in place.both:
        copy = place.path("copy")
        shutil.copy(place.path(image), copy)
        pid = place.start(server, "-t", *words, "copy")
        place.run("qemu-io", "-f", "raw", "-c", "write -P 7 1M 100k", "-c", "write -P 8 3000000 513", "-c",
                  "write -z 4k 8k", "-c", "discard 512k 64k", "-c", "flush", place.uri())
        place.run("nbdcopy", place.uri(), "out.raw")
        place.stop(pid)
        if words[1] == "qcow2":
            place.run("qemu-img", "check", "-q", "-f", "qcow2", "copy")
        place.run("qemu-img", "convert", "-f", words[1], "-O", "raw", "copy", "whole.raw")
        with open(place.path("out.raw"), "rb") as out, open(place.path("whole.raw"), "rb") as whole:
            pictures.append((out.read(), whole.read()))
    # What a discard leaves is up to each; without one it is nothing.
    assert pictures[0] == pictures[1]
    window = 65536 if "-o" in words else 0
    assert pictures[1][0] == pictures[1][1][window:]


def test_discards_are_ignored_unless_they_are_wanted(place):
    for words, gone in ((["-f", "raw"], False), (["-f", "raw", "--discard=unmap"], True)):
        for server in place.both:
            place.run("qemu-io", "-f", "raw", "-c", "write -P 5 0 4M", "disk.raw")
            before = os.stat(place.path("disk.raw")).st_blocks
            pid = place.start(server, "-t", *words, "disk.raw")
            place.run("qemu-io", "-f", "raw", "-d", "unmap", "-c", "discard 1M 1M", place.uri())
            place.stop(pid)
            blocks = os.stat(place.path("disk.raw")).st_blocks
            assert (blocks <= before - MIB // 512) == gone, (server, words)


def test_snapshot_leaves_the_image_alone(place):
    for server in place.both:
        before = place.run("sha256sum", "top.qcow2", "base.qcow2").stdout
        scratch = place.path("scratch")
        os.mkdir(scratch)
        os.environ["TMPDIR"] = scratch
        try:
            pid = place.start(server, "-t", "-s", "-f", "qcow2", "top.qcow2")
        finally:
            del os.environ["TMPDIR"]
        assert not os.listdir(scratch)
        place.run("qemu-io", "-f", "raw", "-c", "write -P 7 100k 1M", "-c", "flush", place.uri())
        place.run("qemu-io", "-f", "raw", "-c", "read -P 7 100k 1M", "-c", "read -P 3 64k 36k", place.uri())
        place.stop(pid)
        assert place.run("sha256sum", "top.qcow2", "base.qcow2").stdout == before
        os.rmdir(scratch)


def test_the_last_client_ends_it(place):
    for server in place.both:
        pid = place.start(server, "-e", "2", "-f", "raw", "disk.raw")
        # Who only looks has not come.
        place.run("nbdinfo", "--list", place.uri())
        probe = socket.socket(socket.AF_UNIX)
        probe.connect(place.path("s"))
        probe.close()
        first, second = nbd.NBD(), nbd.NBD()
        first.connect_uri(place.uri())
        second.connect_uri(place.uri())
        first.shutdown()
        assert second.pread(4, 0) == b"\1\1\1\1"
        assert alive(pid)
        second.shutdown()
        wait_until(lambda: not alive(pid))
        place.running.remove(pid)
        assert not os.path.exists(place.path("s"))


def test_persistent_stays(place):
    for server in place.both:
        pid = place.start(server, "-t", "-f", "raw", "disk.raw")
        for _ in range(3):
            h = nbd.NBD()
            h.connect_uri(place.uri())
            h.shutdown()
        assert alive(pid)
        place.stop(pid)
        assert not os.path.exists(place.path("s"))


@pytest.mark.parametrize("shared", [1, 2])
def test_more_clients_than_it_takes_wait(place, shared):
    for server in place.both:
        pid = place.start(server, "-t", "-e", shared, "-f", "raw", "disk.raw")
        inside = []
        for _ in range(shared):
            inside.append(nbd.NBD())
            inside[-1].connect_uri(place.uri())
        late = socket.socket(socket.AF_UNIX)
        late.settimeout(0.3)
        late.connect(place.path("s"))
        with pytest.raises(TimeoutError):
            late.recv(8)
        inside[0].shutdown()
        late.settimeout(PATIENCE)
        assert late.recv(8) == b"NBDMAGIC"
        late.close()
        place.stop(pid)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_it_in_order(place, number):
    """What was written and not flushed is there; the peer does so for SIGTERM alone."""
    served = subprocess.Popen([place.ours, "-t", "-k", place.path("s"), "-f", "qcow2", "--pid-file", "pid",
                               "top.qcow2"], cwd=place.dir)
    wait_until(lambda: os.path.exists(place.path("pid")))
    with open(place.path("pid")) as f:
        assert int(f.read()) == served.pid
    h = nbd.NBD()
    h.connect_uri(place.uri())
    h.pwrite(b"\x55" * 65536, 2 * MIB)
    served.send_signal(number)
    assert served.wait(PATIENCE) == 0
    assert not os.path.exists(place.path("s")) and not os.path.exists(place.path("pid"))
    place.run("qemu-img", "check", "-q", "-f", "qcow2", "top.qcow2")
    place.run("qemu-io", "-r", "-f", "qcow2", "-c", "read -P 0x55 2M 64k", "top.qcow2")


def test_a_read_only_export_takes_no_writes(place):
    pid = place.start(place.ours, "-t", "-r", "-f", "raw", "disk.raw")
    h = nbd.NBD()
    h.connect_uri(place.uri())
    h.set_strict_mode(0)
    with pytest.raises(nbd.Error):
        h.pwrite(b"x", 0)
    h.shutdown()
    # Others may read, too.
    place.run("qemu-io", "-r", "-f", "raw", "-c", "read 0 4k", "disk.raw")
    place.stop(pid)


def test_an_image_in_use_is_refused(place):
    pid = place.start(place.ours, "-t", "-f", "qcow2", "top.qcow2")
    for server in place.both:
        done = place.run(server, "--fork", "-k", place.path("s2"), "-f", "qcow2", "top.qcow2", ok=(1,))
        assert "another process" in done.stderr, done.stderr
    place.stop(pid)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_tcp(place):
    for server in place.both:
        port = free_port()
        place.run(server, "--fork", "-b", "127.0.0.1", "-p", port, "-f", "raw", "-x", "d", "disk.raw")
        place.run("qemu-io", "-f", "raw", "-c", "read -P 2 512k 64k", f"nbd://127.0.0.1:{port}/d")


@pytest.mark.parametrize("words, ok", [([], 0), (["-p", "1"], 1), (["-k", "s"], 1)], ids=["", "port", "socket"])
def test_socket_activation(place, words, ok):
    """By a program that takes the place of systemd."""
    start = ("import os, sys, socket\n"
             "os.environ.update(LISTEN_FDS='1', LISTEN_PID=str(os.getpid()))\n"
             "os.dup2(int(sys.argv[1]), 3)\n"
             "os.execv(sys.argv[2], sys.argv[2:])\n")
    for server in place.both:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(place.path("activated"))
        listener.listen(8)
        served = subprocess.Popen([sys.executable, "-c", start, str(listener.fileno()), server, *words, "-f", "raw",
                                   "disk.raw"], cwd=place.dir, pass_fds=[listener.fileno()],
                                  stderr=subprocess.DEVNULL)
        listener.close()
        if ok == 0:
            place.run("qemu-io", "-f", "raw", "-c", "read -P 1 0 64k",
                      f"nbd+unix:///?socket={place.path('activated')}")
        assert served.wait(PATIENCE) == ok
        os.unlink(place.path("activated"))


def test_activation_of_another_process_is_not_ours(place):
    environment = {**os.environ, "LISTEN_FDS": "1", "LISTEN_PID": "1"}
    done = place.run(place.ours, "--fork", "-k", place.path("s"), "-f", "raw", "disk.raw", env=environment)
    assert done.returncode == 0
    place.run("nbdinfo", place.uri())


WRONG = [
    [], ["disk.raw", "more"], ["nothing.raw"], ["-f", "nope", "disk.raw"], ["-e", "-1", "disk.raw"],
    ["-e", "x", "disk.raw"], ["-p", "x", "-f", "raw", "disk.raw"], ["-o", "x", "disk.raw"],
    ["-o", "8388608", "-f", "raw", "disk.raw"], ["--cache=x", "disk.raw"], ["-n", "--cache=none", "disk.raw"],
    ["--aio=x", "disk.raw"], ["--aio=threads", "--aio=threads", "disk.raw"], ["--discard=x", "disk.raw"],
    ["--detect-zeroes=x", "disk.raw"], ["--detect-zeroes=unmap", "disk.raw"],
    ["--detect-zeroes=unmap", "--discard=off", "disk.raw"], ["-x", "n" * 5000, "-f", "raw", "disk.raw"],
    ["-D", "n" * 5000, "-f", "raw", "disk.raw"], ["-B", "nope", "-f", "qcow2", "top.qcow2"],
    ["--image-opts", "-f", "raw", "file.filename=disk.raw"], ["--bogus", "disk.raw"],
    ["-k", "/" + "s" * 200, "-f", "raw", "disk.raw"], ["-k", "/no/such/s", "-f", "raw", "disk.raw"],
    ["--pid-file=/no/such/pid", "-k", "SOCKET", "-f", "raw", "disk.raw"], ["-f", "qcow2", "disk.raw"],
]


@pytest.mark.parametrize("words", WRONG, ids=lambda w: " ".join(w)[:40])
@pytest.mark.parametrize("fork", [[], ["--fork"]], ids=["", "fork"])
def test_what_is_wrong_is_told(place, words, fork):
    words = [place.path("s") if w == "SOCKET" else w for w in words]
    for server in place.both:
        done = place.run(server, *fork, *words, ok=(1,))
        assert done.stdout == "" and "qemu-nbd: " in done.stderr, done.stderr
        assert ("--help" in done.stderr) == (words in ([], ["disk.raw", "more"], ["--bogus", "disk.raw"]))
    assert not os.path.exists(place.path("s"))


@pytest.mark.parametrize("words, text", [
    (["-L"], "--list is not supported"), (["-c", "/dev/nbd0", "disk.raw"], "--connect"),
    (["-d", "/dev/nbd0"], "--disconnect"), (["--tls-creds", "t", "disk.raw"], "--tls-creds"),
    (["--tls-authz", "t", "disk.raw"], "--tls-authz"), (["--tls-hostname", "t", "disk.raw"], "--tls-hostname"),
    (["-T", "x", "disk.raw"], "--trace"), (["--selinux-label", "x", "-k", "s", "disk.raw"], "--selinux-label"),
    (["--aio=native", "disk.raw"], "--aio=native"),
])
def test_what_is_not_there_is_refused_by_name(place, words, text):
    done = place.run(place.ours, *words, ok=(1,))
    assert text in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def test_help_and_version(place):
    for option in ("-h", "--help"):
        assert "--allocation-depth" in place.run(place.ours, option).stdout
    for option in ("-V", "--version"):
        assert place.run(place.ours, option).stdout.startswith("qemu-nbd 7.2")
    with open("/dev/full", "w") as full:
        done = subprocess.run([place.ours, "--help"], stdout=full, stderr=subprocess.PIPE, check=False)
    assert done.returncode == 1 and b"standard output" in done.stderr


def test_under_its_own_name_references_are_granted(place):
    """Q6: a backing file elsewhere is refused, and --allow grants it."""
    os.mkdir(place.path("far"))
    shutil.move(place.path("base.qcow2"), place.path("far/base.qcow2"))
    place.run("qemu-img", "rebase", "-u", "-f", "qcow2", "-b", "far/base.qcow2", "-F", "qcow2", "top.qcow2")
    os.mkdir(place.path("here"))
    shutil.move(place.path("top.qcow2"), place.path("here/top.qcow2"))
    place.run("qemu-img", "rebase", "-u", "-f", "qcow2", "-b", "../far/base.qcow2", "-F", "qcow2", "here/top.qcow2")
    done = place.run(program(), "nbd", "--fork", "-k", place.path("s"), "here/top.qcow2", ok=(1,))
    assert "base.qcow2" in done.stderr and "allow" in done.stderr, done.stderr
    place.run(program(), "nbd", "--fork", "-k", place.path("s"), "--allow", "far", "here/top.qcow2")
    place.run("qemu-io", "-f", "raw", "-c", "read -P 1 0 64k", place.uri())


def test_verbose_says_what_is_served(place):
    served = subprocess.Popen([place.ours, "-v", "-r", "-k", place.path("s"), "-f", "qcow2", "top.qcow2"],
                              cwd=place.dir, stderr=subprocess.PIPE, text=True)
    line = served.stderr.readline()
    assert line == f"qemu-nbd: 'top.qcow2' (qcow2, {4 * MIB} bytes, read-only) is served at unix:{place.path('s')}\n"
    place.run("nbdinfo", "--size", place.uri())
    assert served.wait(PATIENCE) == 0
    assert served.stderr.read() == ""
    served.stderr.close()


def test_fork_gives_up_the_standard_streams(place):
    """Whoever reads them to their end does not wait for the server's."""
    done = place.run(place.ours, "--fork", "-v", "-t", "--pid-file", "pid", "-k", place.path("s"), "-f", "raw",
                     "disk.raw")
    assert "is served at" in done.stderr
    with open(place.path("pid")) as f:
        place.running.append(int(f.read()))
    place.stop(place.running[-1])
