# SPDX-License-Identifier: Apache-2.0
"""create, info, map and measure beside qemu-img's."""
import os

import pytest
from image_support import need_peer, run, tools, u64, without_sizes  # pylint: disable=unused-import

need_peer()

CREATED = [
    ("qcow2", "", "10M"),
    ("qcow2", "cluster_size=4k,refcount_bits=1,lazy_refcounts=on", "10M"),
    ("qcow2", "compression_type=zstd", "10M"),
    ("qcow2", "compat=0.10,cluster_size=512", "1500"),
    ("qcow2", "compat=v3,preallocation=metadata", "3M"),
    ("qcow2", "preallocation=full", "1M"),
    ("qcow2", "preallocation=falloc,cluster_size=2M", "5M"),
    ("qcow2", "cluster_size=2M,refcount_bits=64", "1P"),
    ("qcow2", "extended_l2=on,cluster_size=128k", "100M"),
    ("qcow2", "extended_l2=on,preallocation=metadata", "10M"),
    ("qcow2", "data_file=d.data", "3M"),
    ("qcow2", "data_file=d.data,data_file_raw=on,cluster_size=4k", "1000k"),
    ("qcow2", "data_file=d.data,preallocation=full", "2M"),
    ("raw", "", "3M"),
    ("raw", "preallocation=falloc", "1M"),
    ("raw", "preallocation=full", "1M"),
]


@pytest.mark.parametrize("fmt,options,size", CREATED)
def test_created_images_are_the_same(tools, fmt, options, size):
    words = ["create", "-f", fmt, *(["-o", options] if options else [])]
    ours = tools.ours(*words, "x.img", size).stdout
    seen = without_sizes(tools.peer("info", "-f", fmt, "x.img").stdout)
    if fmt == "qcow2" and size != "1P":
        tools.peer("check", "-q", "-f", "qcow2", "x.img")
    if "full" in options or "falloc" in options:
        assert tools.disk_bytes("d.data" if "data_file" in options else "x.img") >= 1 << 20
    os.unlink(tools.path("x.img"))
    assert ours == tools.peer(*words, "x.img", size).stdout
    assert seen == without_sizes(tools.peer("info", "-f", fmt, "x.img").stdout)


def test_a_backing_file_gives_its_size(tools):
    tools.chain()
    tools.same("create", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "new.qcow2")
    tools.ours("create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "new.qcow2")
    tools.equal("new.qcow2", "base.qcow2")
    tools.same("create", "-f", "qcow2", "-b", "nowhere", "-F", "raw", "new.qcow2")
    tools.same("create", "-f", "qcow2", "-u", "-b", "nowhere", "-F", "raw", "new.qcow2", "1M")
    tools.same("create", "-f", "qcow2", "-b", "base.qcow2", "new.qcow2")


def test_what_is_there_is_replaced_where_it_is(tools):
    tools.ours("create", "-q", "x.raw", "5M")
    os.chmod(tools.path("x.raw"), 0o600)
    before = os.stat(tools.path("x.raw"))
    tools.ours("create", "-q", "-f", "qcow2", "x.raw", "1M")
    after = os.stat(tools.path("x.raw"))
    assert (before.st_ino, before.st_mode) == (after.st_ino, after.st_mode)
    tools.peer("check", "-q", "-f", "qcow2", "x.raw")


def test_an_image_in_use_stays_what_it_is(tools):
    tools.ours("create", "-q", "-f", "qcow2", "x.qcow2", "1M")
    tools.io("x.qcow2", "write -P 5 0 64k")
    with open(tools.path("x.qcow2"), "rb") as f:
        before = f.read()
    with tools.in_use("x.qcow2"):
        refused = tools.ours("create", "-f", "qcow2", "x.qcow2", "2M", ok=None)
    assert refused.returncode == 1
    assert "x.qcow2" in refused.stderr
    with open(tools.path("x.qcow2"), "rb") as f:
        assert f.read() == before


@pytest.mark.parametrize("image", ["base.qcow2", "top.qcow2", "x.raw", "odd.raw", "old.qcow2", "listed.qcow2"])
def test_info_says_the_same(tools, image):
    tools.chain()
    tools.peer("create", "-q", "x.raw", "3M")
    with open(tools.path("odd.raw"), "wb") as f:
        f.write(b"x" * 1001)
    tools.peer("create", "-q", "-f", "qcow2", "-o", "compat=0.10", "old.qcow2", "1500")
    tools.peer("create", "-q", "-f", "qcow2", "listed.qcow2", "10M")
    tools.peer("snapshot", "-c", "one", "listed.qcow2")
    tools.peer("snapshot", "-c", "a second one", "listed.qcow2")
    tools.peer("bitmap", "--add", "-g", "32k", "listed.qcow2", "b0")
    tools.peer("bitmap", "--add", "--disable", "listed.qcow2", "b1")
    tools.same("info", image)
    tools.same("info", "--backing-chain", image)
    tools.same_json("info", "--output=json", image)
    tools.same_json("info", "--output=json", "--backing-chain", image)


@pytest.mark.parametrize("name", [
    ["file:base.qcow2"],
    ["--image-opts", "driver=qcow2,file.filename=base.qcow2"],
    ["--image-opts", "driver=qcow2,file.driver=file,file.filename=base.qcow2"],
    ['json:{"driver":"qcow2","file":{"driver":"file","filename":"base.qcow2"}}'],
    ["-f", "raw", "base.qcow2"],
])
def test_names_mean_the_same(tools, name):
    tools.chain()
    tools.same("info", *name)


@pytest.mark.parametrize("arguments", [
    ["nowhere"], ["nbd://localhost:1/x"], ["-f", "raw", "--image-opts", "driver=raw,file.filename=base.qcow2"],
    ["--output=xml", "base.qcow2"], [], ["base.qcow2", "top.qcow2"], ["--unknown"], ["-f"], ["-f", "what", "base.qcow2"],
    ["lost.qcow2"], ["--backing-chain", "lost.qcow2"], ["--backing-chain", "loop.qcow2"],
])
def test_info_refuses_the_same(tools, arguments):
    tools.chain()
    tools.peer("create", "-q", "-f", "qcow2", "-u", "-b", "gone", "-F", "raw", "lost.qcow2", "1M")
    tools.peer("create", "-q", "-f", "qcow2", "loop.qcow2", "1M")
    tools.peer("rebase", "-u", "-b", "loop.qcow2", "-F", "qcow2", "loop.qcow2")
    tools.same("info", *arguments)
    tools.same("create", "-q", "-f", "qcow2", "-u", "-b", "x.qcow2", "-F", "qcow2", "x.qcow2", "1M")


@pytest.mark.parametrize("image", ["base.qcow2", "top.qcow2", "top.raw", "odd.raw", "full.qcow2"])
def test_maps_are_the_same(tools, image):
    tools.chain()
    tools.peer("convert", "-O", "raw", "top.qcow2", "top.raw")
    tools.peer("convert", "-O", "qcow2", "-o", "preallocation=metadata,cluster_size=4k", "top.qcow2", "full.qcow2")
    with open(tools.path("odd.raw"), "wb") as f:
        f.write(b"x" * 1001)
    tools.same("map", image)
    tools.same("map", "--output=json", image)
    tools.same("map", "--output=json", "--start-offset=1M", "--max-length=64k", image)
    tools.same("map", "-s", "4M", "-l", "8M", image)
    tools.same("map", "-s", "200M", image)


def test_short_backing_files_are_mapped_the_same(tools):
    tools.peer("create", "-q", "-f", "qcow2", "short.qcow2", "1M")
    tools.io("short.qcow2", "write -P 1 0 64k")
    tools.peer("create", "-q", "-f", "qcow2", "-b", "short.qcow2", "-F", "qcow2", "long.qcow2", "5M")
    tools.io("long.qcow2", "write -P 1 2M 64k")
    tools.same("map", "--output=json", "long.qcow2")


@pytest.mark.parametrize("arguments", [
    ["-O", "qcow2", "base.qcow2"], ["-O", "qcow2", "top.qcow2"], ["-O", "raw", "top.qcow2"], ["-O", "qcow2", "top.raw"],
    ["--size", "1G", "-O", "qcow2"], ["--size", "8T", "-O", "qcow2"], ["--size", "1000", "-O", "raw"], ["--size", "0", "-O", "qcow2"],
    ["--size", "1G", "-O", "qcow2", "-o", "cluster_size=4k,preallocation=metadata,refcount_bits=1"],
    ["--size", "100G", "-O", "qcow2", "-o", "cluster_size=64k,extended_l2=on"],
    ["--size", "1G", "-O", "qcow2", "-o", "cluster_size=2M"], ["-O", "qcow2", "-o", "preallocation=full", "top.qcow2"],
    ["-O", "qcow2", "-o", "backing_file=base.qcow2,backing_fmt=qcow2", "top.qcow2"], [], ["--size", "1M", "base.qcow2"],
])
def test_measures_are_the_same(tools, arguments):
    tools.chain()
    tools.peer("convert", "-O", "raw", "top.qcow2", "top.raw")
    tools.same("measure", *arguments)
    if arguments and "base.qcow2" != arguments[-1]:
        tools.same_json("measure", "--output=json", *arguments)


def test_cost_follows_the_data(tools):
    """An empty disk of a PiB takes no time."""
    tools.ours("create", "-q", "-f", "qcow2", "-o", "cluster_size=2M", "huge.qcow2", "1P")
    done = run("timeout", "2", tools.link, "map", "--output=json", tools.path("huge.qcow2"))
    assert done.stdout.count("start") == 1
    run("timeout", "2", tools.link, "measure", "-O", "raw", tools.path("huge.qcow2"))
    run("timeout", "2", tools.link, "convert", "-O", "qcow2", "-o", "cluster_size=2M", tools.path("huge.qcow2"), tools.path("x.qcow2"))


def test_references_are_followed_where_they_are_granted(tools):
    os.mkdir(tools.path("a"))
    os.mkdir(tools.path("b"))
    tools.peer("create", "-q", "-f", "qcow2", "b/base.qcow2", "1M")
    tools.peer("create", "-q", "-f", "qcow2", "-b", "../b/base.qcow2", "-F", "qcow2", "a/top.qcow2")
    tools.same("map", "a/top.qcow2")
    refused = tools.cairn("map", "a/top.qcow2", ok=(1,))
    assert "--allow" in refused.stderr
    tools.cairn("map", "--allow", "b", "a/top.qcow2")


@pytest.mark.parametrize("extra", [1 << 20, 1000])
def test_info_of_a_snapshot_table_that_makes_no_sense(tools, extra):
    tools.peer("create", "-q", "-f", "qcow2", "a.qcow2", "1M")
    tools.peer("snapshot", "-c", "s", "a.qcow2")
    path = tools.path("a.qcow2")
    table = u64(path, 64)
    os.truncate(path, table + 100)  # the entry is shorter
    u64(path, table + 32, extra)  # 4 bytes of the machine's state, then 4 of the length of the extra data
    assert "entry 0 of its table of snapshots, which has 1, is broken" in tools.cairn("info", "a.qcow2").stderr
