# SPDX-License-Identifier: Apache-2.0
"""commit beside qemu-img's: the same data in base and top; and what is refused or fails leaves the disk what it was."""
import contextlib
import os
import re
import shutil
import subprocess

import pytest
from fuse_support import StallingFile
from image_support import need_peer, program, run, tools  # pylint: disable=unused-import

need_peer()

SHAPES = ["cluster_size=64k", "cluster_size=512", "cluster_size=4k", "cluster_size=2M", "compat=0.10", "compat=0.10,cluster_size=2M"]


def write_top(tools, image):
    tools.io(image, "write -P 3 64k 64k", "write -P 4 9M 1M", "write -z 5M 64k", "write -P 6 5000k 3k", "write -P 7 7M 512")


def copies(tools, *names):
    """The images twice: for ours in `o`, for the peer's in `p`."""
    for side in "op":
        os.mkdir(tools.path(side))
        for name in names:
            shutil.copy(tools.path(name), tools.path(f"{side}/{name}"))


def both(tools, *arguments, top="top.qcow2"):
    ours, peer = (f(*arguments, f"{side}/{top}") for f, side in ((tools.ours, "o"), (tools.peer, "p")))
    assert ours.stdout == peer.stdout


def same_disks(tools, *names):
    for name in names:
        tools.equal(f"o/{name}", f"p/{name}", *(["-f", "raw", "-F", "raw"] if name.endswith("raw") else []))


@pytest.mark.parametrize("top", SHAPES)
@pytest.mark.parametrize("base", ["raw", "qcow2", "qcow2,compat=0.10,cluster_size=2M", "qcow2,cluster_size=512"])
def test_the_base_becomes_what_the_disk_is(tools, top, base):
    fmt, _, shape = base.partition(",")
    name = f"base.{fmt}"
    tools.peer("create", "-q", "-f", fmt, *(["-o", shape] if shape else []), name, "10M")
    tools.io(name, "write -P 1 0 128k", "write -P 2 5M 1M", "write -P 9 7000k 1k", fmt=fmt)
    tools.peer("create", "-q", "-f", "qcow2", "-o", top, "-b", name, "-F", fmt, "top.qcow2")
    write_top(tools, "top.qcow2")
    tools.peer("convert", "-O", "raw", "top.qcow2", "before.raw")
    copies(tools, name, "top.qcow2")
    both(tools, "commit")
    same_disks(tools, name, "top.qcow2")
    tools.equal("before.raw", "o/top.qcow2")
    tools.equal("before.raw", f"o/{name}", "-f", "raw", "-F", fmt)
    # It holds nothing any more: what is written below shows.
    tools.io(f"o/{name}", "write -P 11 0 10M", fmt=fmt)
    tools.io("o/top.qcow2", "read -P 11 0 10M")
    tools.io("o/top.qcow2", "write -P 12 1M 1M", "read -P 11 0 1M", "read -P 12 1M 1M")
    tools.peer("check", "-q", "o/top.qcow2")


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
@pytest.mark.parametrize("sizes", [("3M", "10M"), ("10M", "3M"), ("3M", "1T")])
def test_sizes_that_differ(tools, fmt, sizes):
    base, top = sizes
    tools.peer("create", "-q", "-f", fmt, "base", base)
    tools.io("base", "write -P 1 0 3M", fmt=fmt)
    tools.peer("create", "-q", "-f", "qcow2", "-b", "base", "-F", fmt, "top.qcow2", top)
    tools.io("top.qcow2", "write -P 5 1M 1M")
    copies(tools, "base", "top.qcow2")
    both(tools, "commit", "-d")
    tools.equal("o/base", "p/base", "-f", fmt, "-F", fmt)
    tools.equal("o/base", "o/top.qcow2", "-f", fmt, "-F", "qcow2")


def chain_of_three(tools, middle="10M"):
    tools.peer("create", "-q", "-f", "qcow2", "base.qcow2", "10M")
    tools.io("base.qcow2", "write -P 1 0 10M")
    tools.peer("create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "mid.qcow2", middle)
    tools.io("mid.qcow2", "write -P 2 1M 1M", "write -z 2M 1M")
    tools.peer("create", "-q", "-f", "qcow2", "-b", "mid.qcow2", "-F", "qcow2", "top.qcow2", "10M")
    tools.io("top.qcow2", "write -P 3 1536k 1M", "write -P 4 9M 64k")


@pytest.mark.parametrize("middle", ["10M", "4M"])
@pytest.mark.parametrize("name", ["base.qcow2", "mid.qcow2"])
def test_through_layers(tools, middle, name):
    """Beyond the end of a layer there is nothing, also where the base has something."""
    chain_of_three(tools, middle)
    tools.peer("convert", "-O", "raw", "top.qcow2", "before.raw")
    copies(tools, "base.qcow2", "mid.qcow2", "top.qcow2")
    both(tools, "commit", "-b", name)
    same_disks(tools, "base.qcow2", "mid.qcow2")
    tools.equal("before.raw", f"o/{name}")
    assert "top.qcow2" in os.listdir(tools.path("o")) and "data" in tools.peer("map", "--output=json", "o/top.qcow2").stdout
    tools.peer("rebase", "-u", "-b", name, "-F", "qcow2", "o/top.qcow2")
    tools.equal("before.raw", "o/top.qcow2")


def test_snapshots_of_the_top_stay(tools):
    tools.chain()
    tools.peer("snapshot", "-c", "then", "top.qcow2")
    tools.io("top.qcow2", "write -P 8 64k 1M", "write -P 8 50M 64k")
    tools.peer("convert", "-O", "raw", "top.qcow2", "before.raw")
    tools.peer("convert", "-l", "then", "-O", "raw", "top.qcow2", "snapshot.raw")
    tools.ours("commit", "-q", "top.qcow2")
    tools.equal("before.raw", "top.qcow2")
    assert not [e for e in tools.same_json("map", "--output=json", "top.qcow2") if e["depth"] == 0]
    tools.peer("snapshot", "-a", "then", "top.qcow2")
    tools.io("top.qcow2", "read -P 3 64k 64k", "read -P 4 99M 1M", "read -P 0 5M 64k")
    tools.peer("check", "-q", "top.qcow2")


def test_compressed_and_shared_clusters(tools):
    tools.chain()
    tools.peer("convert", "-c", "-O", "qcow2", "-B", "base.qcow2", "-F", "qcow2", "top.qcow2", "small.qcow2")
    tools.peer("convert", "-O", "raw", "top.qcow2", "before.raw")
    tools.ours("commit", "-q", "small.qcow2")
    tools.equal("before.raw", "base.qcow2")
    tools.equal("before.raw", "small.qcow2")


def test_space_is_given_back(tools):
    tools.peer("create", "-q", "base.raw", "64M")
    tools.peer("create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "top.qcow2")
    tools.io("top.qcow2", "write -P 1 0 64M")
    tools.ours("commit", "-q", "top.qcow2")
    assert tools.disk_bytes("top.qcow2") < 2 << 20
    tools.io("base.raw", "read -P 1 0 64M", fmt="raw")


def test_a_top_with_a_data_file(tools):
    tools.chain()
    tools.peer("create", "-q", "-f", "qcow2", "-o", "data_file=d", "-b", "base.qcow2", "-F", "qcow2", "x.qcow2")
    write_top(tools, "x.qcow2")
    tools.peer("convert", "-O", "raw", "x.qcow2", "before.raw")
    tools.ours("commit", "-q", "x.qcow2")
    tools.equal("before.raw", "x.qcow2")
    tools.equal("before.raw", "base.qcow2")
    assert tools.disk_bytes("d") == 0
    tools.io("x.qcow2", "write -P 5 65k 1k", "read -P 5 65k 1k", "read -P 3 64k 1k", "read -P 3 66k 62k")


@pytest.mark.parametrize("words", [["-p"], ["-q"], ["-p", "-q"], ["-t", "writethrough"], ["-t", "none", "-d"], ["-r", "500M"]])
def test_says_the_same(tools, words):
    tools.chain()
    copies(tools, "base.qcow2", "top.qcow2")
    ours, peer = tools.ours("commit", *words, "o/top.qcow2").stdout, tools.peer("commit", *words, "p/top.qcow2").stdout
    assert re.sub(r"( +\(\d+\.\d\d/100%\)\r)+", "P", ours) == re.sub(r"( +\(\d+\.\d\d/100%\)\r)+", "P", peer)
    same_disks(tools, "base.qcow2", "top.qcow2")


@pytest.mark.parametrize("arguments", [
    [], ["base.qcow2"], ["none"], ["-b", "none", "top.qcow2"], ["-b", "top.qcow2", "top.qcow2"], ["-f", "raw", "top.qcow2"],
    ["-t", "what", "top.qcow2"], ["-r", "what", "top.qcow2"], ["top.qcow2", "base.qcow2"], ["--what", "top.qcow2"],
])
def test_refuses_the_same(tools, arguments):
    tools.chain()
    before = tools.peer("map", "--output=json", "top.qcow2").stdout
    tools.same("commit", *arguments)
    assert tools.peer("map", "--output=json", "top.qcow2").stdout == before


def test_image_options_and_json(tools):
    for words in (["--image-opts", "driver=qcow2,file.driver=file,file.filename=top.qcow2"],
                  ['json:{"driver":"qcow2","file":{"driver":"file","filename":"top.qcow2"}}'],
                  ['json:{"file":{"driver":"file","filename":"top.qcow2"},"driver":"qcow2","backing":{"driver":"qcow2",'
                   '"file":{"driver":"file","filename":"base.qcow2"}}}']):
        tools.chain()
        tools.peer("convert", "-O", "raw", "top.qcow2", "before.raw")
        tools.ours("commit", *words)
        tools.equal("before.raw", "base.qcow2")


def test_the_base_must_be_granted(tools):
    """Q6: a reference out of the image's directory is followed with --allow alone."""
    os.mkdir(tools.path("d"))
    tools.chain()
    tools.peer("create", "-q", "-f", "qcow2", "-b", tools.path("base.qcow2"), "-F", "qcow2", "d/x.qcow2")
    tools.io("d/x.qcow2", "write -P 8 0 1M")
    before = tools.peer("map", "--output=json", "base.qcow2").stdout
    assert "--allow" in tools.cairn("commit", "d/x.qcow2", ok=(1,)).stderr
    assert tools.peer("map", "--output=json", "base.qcow2").stdout == before
    tools.cairn("commit", "-q", "--allow", tools.directory, "d/x.qcow2")
    tools.io("base.qcow2", "read -P 8 0 1M")


@contextlib.contextmanager
def user_of(image, directory, *words):
    with subprocess.Popen(["qemu-io", "-f", "qcow2", *words, image], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=directory) as user:
        user.stdin.write(b"read 0 512\n")
        user.stdin.flush()
        assert b"read 512" in user.stdout.readline()
        yield
        user.communicate(b"quit\n")


@pytest.mark.parametrize("image,words", [("base.qcow2", ["-r"]), ("base.qcow2", []), ("top.qcow2", ["-r"]), ("mid.qcow2", [])])
def test_nobody_else_may_be_there(tools, image, words):
    chain_of_three(tools)
    tools.peer("convert", "-O", "raw", "top.qcow2", "before.raw")
    with user_of(image, tools.directory, *words):
        assert "another process" in tools.ours("commit", "-b", "base.qcow2", "top.qcow2", ok=(1,)).stderr
    tools.equal("before.raw", "top.qcow2")
    tools.io("base.qcow2", "read -P 1 0 10M")


def test_a_full_base_leaves_the_disk(tools):
    with StallingFile(tools.path("base.raw"), 8 << 20) as base:
        tools.peer("create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "top.qcow2", "8M")
        tools.io("top.qcow2", "write -P 7 1M 5M")
        base.tell("fail 28")
        done = tools.ours("commit", "top.qcow2", ok=(1,))
        assert "No space left" in done.stderr and "is what it was" in done.stderr
        base.tell("go")
        tools.io("top.qcow2", "read -P 7 1M 5M", "read -P 0 0 1M", "read -P 0 6M 2M")
        assert tools.ours("commit", "top.qcow2").stdout == "Image committed.\n"
        tools.io("top.qcow2", "read -P 7 1M 5M")
        tools.io("base.raw", "read -P 7 1M 5M", fmt="raw")


@pytest.mark.parametrize("after", [0.02, 0.05, 0.1])
def test_killed_the_disk_is_what_it_was(tools, after):
    tools.peer("create", "-q", "-f", "qcow2", "base.qcow2", "96M")
    tools.peer("create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "top.qcow2")
    tools.io("top.qcow2", "write -P 5 0 64M", "write -P 6 80M 8M")
    with subprocess.Popen([program(), "commit", "-r", "200M", "top.qcow2"], cwd=tools.directory, stdout=subprocess.DEVNULL) as tool:
        with contextlib.suppress(subprocess.TimeoutExpired):
            tool.wait(after)
        tool.kill()
    while "another process" in run("qemu-img", "check", "base.qcow2", ok=None, cwd=tools.directory).stderr:
        pass  # the host ends its I/O first
    for image in ("base.qcow2", "top.qcow2"):
        run("qemu-img", "check", "-q", image, ok=(0, 3), cwd=tools.directory)
    tools.io("top.qcow2", "read -P 5 0 64M", "read -P 6 80M 8M", "read -P 0 64M 16M", "read -P 0 88M 8M")
    tools.ours("commit", "-q", "top.qcow2")
    tools.io("base.qcow2", "read -P 5 0 64M", "read -P 6 80M 8M", "read -P 0 64M 16M")
