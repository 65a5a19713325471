# SPDX-License-Identifier: Apache-2.0
"""The image tools beside the peer: both run with the same arguments on the same files."""
import contextlib
import json
import os
import re
import shutil
import struct
import subprocess

import pytest

PATIENCE = 60
PEER = shutil.which("qemu-img")


def program():
    build = os.environ.get("CAIRN_BUILD")
    path = os.environ.get("CAIRN") or (build and os.path.join(build, "src/cli/cairn"))
    assert path and os.access(path, os.X_OK), "CAIRN_BUILD names no build directory with cairn in it"
    return os.path.abspath(path)


def need_peer():
    for tool in ("qemu-img", "qemu-io"):
        if not shutil.which(tool):
            print(f"requires {tool}")
            pytest.skip(tool, allow_module_level=True)


def run(*command, ok=(0,), **options):
    done = subprocess.run(command, capture_output=True, timeout=PATIENCE, check=False, **options)
    done.stdout, done.stderr = done.stdout.decode(), done.stderr.decode()
    if ok is not None:
        assert done.returncode in ok, (command, done.returncode, done.stdout, done.stderr)
    return done


def u64(path, offset, value=None):
    """What a file has there, big-endian, or puts it there."""
    with open(path, "rb" if value is None else "r+b") as f:
        f.seek(offset)
        if value is None:
            return struct.unpack(">Q", f.read(8))[0]
        f.write(struct.pack(">Q", value))
    return value


def peer_makes_keys(*arguments, cwd=None):
    """qemu-img times its key derivation by the CPU clock, whose ticks are too coarse for it on some machines."""
    for _ in range(200):
        made = run("qemu-img", *map(str, arguments), ok=None, cwd=cwd)
        if made.returncode == 0:
            return
        assert "accurate CPU usage" in made.stderr, made.stderr
    raise AssertionError(made.stderr)


def peer_creates_encrypted(path, fmt="qcow2", options="", size="1M", cwd=None):
    """With the secret `abc`. `options`: the format's own, beside these."""
    names = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10" if fmt == "qcow2" else "key-secret=s,iter-time=10"
    peer_makes_keys("create", "-q", "-f", fmt, "--object", "secret,id=s,data=abc", "-o", f"{names}{options and ','}{options}",
                    path, size, cwd=cwd)


def cryptsetup_creates(path, cipher="aes-xts-plain64", bits=512, digest="sha256", size=1 << 20, kind="luks1"):
    """With the secret `abc`, a disk of `size` bytes, and at once. What there is to say about speed is said with few iterations."""
    with open(path, "wb") as f:
        f.truncate(size + (2 << 20 if kind == "luks1" else 16 << 20))
    key = f"{path}.key"
    with open(key, "w", encoding="ascii") as f:
        f.write("abc")
    run("cryptsetup", "-q", "luksFormat", "--type", kind, "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "--cipher", cipher,
        "--key-size", str(bits), "--hash", digest, str(path), key)
    return key


class Tools:
    """A directory with a link that is called as the peer is."""

    def __init__(self, directory):
        self.directory = str(directory)
        self.link = os.path.join(self.directory, "bin", "qemu-img")
        os.mkdir(os.path.dirname(self.link))
        os.symlink(program(), self.link)

    def ours(self, *arguments, ok=(0,)):
        return run(self.link, *map(str, arguments), ok=ok, cwd=self.directory)

    def cairn(self, *arguments, ok=(0,)):
        return run(program(), *map(str, arguments), ok=ok, cwd=self.directory)

    def peer(self, *arguments, ok=(0,)):
        return run(PEER, *map(str, arguments), ok=ok, cwd=self.directory)

    def io(self, image, *commands, fmt="qcow2"):
        words = [w for c in commands for w in ("-c", c)]
        run("qemu-io", "-f", fmt, "-d", "unmap", *words, image, cwd=self.directory)

    @contextlib.contextmanager
    def in_use(self, image, fmt="qcow2"):
        """The peer has the image open for writing, and does nothing."""
        with subprocess.Popen(["qemu-io", "-f", fmt, image], cwd=self.directory, stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE) as user:
            try:
                assert user.stdout.read(len("qemu-io> ")) == b"qemu-io> "
                yield
            finally:
                user.kill()

    def same(self, *arguments):
        """The same output and status; the messages are each program's own."""
        peer, ours = self.peer(*arguments, ok=None), self.ours(*arguments, ok=None)
        assert (ours.returncode, ours.stdout) == (peer.returncode, peer.stdout), (arguments, ours.stderr, peer.stderr)
        assert bool(ours.stderr) == bool(peer.stderr), (arguments, ours.stderr, peer.stderr)
        return ours

    def same_json(self, *arguments):
        """The same but for the order of members."""
        peer, ours = self.peer(*arguments), self.ours(*arguments)
        assert json.loads(ours.stdout) == json.loads(peer.stdout), arguments
        return json.loads(ours.stdout)

    def equal(self, one, other, *options):
        """The peer finds the same disk in both, and no damage."""
        self.peer("compare", *options, one, other)
        for image in (one, other):
            if str(image).endswith(".qcow2"):
                self.peer("check", "-q", "-f", "qcow2", image)

    def chain(self):
        """base.qcow2 and top.qcow2 above it, of 100 MiB, with data, zeroes and holes."""
        self.peer("create", "-q", "-f", "qcow2", "base.qcow2", "100M")
        self.io("base.qcow2", "write -P 1 0 128k", "write -z 1M 64k", "write -P 2 5M 1M", "write -P 9 7000k 1k")
        self.peer("create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "top.qcow2")
        self.io("top.qcow2", "write -P 3 64k 64k", "write -P 4 99M 1M", "write -z 5M 64k")

    def path(self, name):
        return os.path.join(self.directory, name)

    def disk_bytes(self, name):
        return os.stat(self.path(name)).st_blocks * 512


def without_sizes(text):
    """What `info` says, without what the host's file system decides."""
    return re.sub(r"disk size: .*", "disk size", text)


@pytest.fixture
def tools(tmp_path):
    return Tools(tmp_path)
