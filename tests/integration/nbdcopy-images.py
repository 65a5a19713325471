# SPDX-License-Identifier: Apache-2.0
"""nbdcopy into exports, out of them and between them; a file system that went this way passes its own check."""
import os
import random
import subprocess

import pytest
from nbd_support import MIB, Daemon

SIZE = 64 * MIB


def run(*words):
    ended = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, (words, ended.stdout, ended.stderr)
    return ended.stdout


@pytest.fixture(scope="module")
def ext4(tmp_path_factory):
    """A file system with files in it."""
    where = tmp_path_factory.mktemp("ext4")
    rng = random.Random(6)
    for i in range(40):
        folder = where / "tree" / f"d{i % 5}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"f{i}").write_bytes(rng.randbytes(rng.randrange(400000)))
    image = where / "ext4.img"
    with open(image, "wb") as f:
        f.truncate(SIZE)
    run("mke2fs", "-q", "-t", "ext4", "-d", where / "tree", image)
    return image


@pytest.fixture(params=["unix", "tcp"])
def daemon(request):
    with Daemon(server=request.param, io_threads=4) as d:
        yield d


def empty(path):
    with open(path, "wb") as f:
        f.truncate(SIZE)
    return path


@pytest.mark.parametrize("options", [
    ("--connections=1", "--requests=1"), ("--connections=4", "--requests=64"), ("--synchronous",),
    ("--connections=8", "--requests=256", "--request-size=65536"), ("--allocated", "--destination-is-zero"),
])
def test_into_and_out_of_an_export(daemon, ext4, tmp_path, options):
    target = empty(tmp_path / "target.img")
    daemon.add("target", target, discard="unmap")
    run("nbdcopy", "--flush", *options, ext4, daemon.uri("target"))
    assert target.read_bytes() == ext4.read_bytes()
    run("e2fsck", "-fn", target)
    back = tmp_path / "back.img"
    run("nbdcopy", *[o for o in options if "destination" not in o], daemon.uri("target"), back)
    assert back.read_bytes() == ext4.read_bytes()


def test_between_two_exports(daemon, ext4, tmp_path):
    """Over a target full of other data: what is a hole in the source must be zero in the target."""
    target = tmp_path / "target.img"
    target.write_bytes(b"\xff" * SIZE)
    daemon.add("source", ext4, writable=False)
    daemon.add("target", target, discard="unmap")
    run("nbdcopy", "--connections=4", daemon.uri("source"), daemon.uri("target"))
    assert target.read_bytes() == ext4.read_bytes()
    run("e2fsck", "-fn", target)
    # Holes have come through, too.
    assert os.stat(target).st_blocks * 512 < SIZE // 2
