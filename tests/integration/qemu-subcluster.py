# SPDX-License-Identifier: Apache-2.0
"""Extended L2 entries between us and the peer: what is where, subcluster by subcluster, the tools, snapshots and compression. Contents
with random requests are compared in qemu-qcow2.py, where they are shapes among others."""
import json
import random
import subprocess

import pytest
from image_support import need_peer, tools  # pylint: disable=unused-import
from nbd_support import Daemon, wait_until

need_peer()

KIB = 1 << 10
UNITS = ["cluster_size=16k", "cluster_size=128k", "cluster_size=64k,data_file=x.data"]


def make(tools, options, size="4M"):
    tools.cairn("create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "-o", options + ",extended_l2=on", "x.qcow2", size)


def through_us(tools, *commands):
    """qemu-io's commands, on the image as the daemon serves it."""
    with Daemon() as daemon:
        daemon.qmp("blockdev-add", driver="qcow2", node_name="n", discard="unmap",
                   file={"driver": "file", "filename": tools.path("x.qcow2")})
        daemon.export("n", writable=True)
        words = [w for c in commands for w in ("-c", c)]
        subprocess.run(["qemu-io", "-f", "raw", "-d", "unmap", *words, daemon.uri("n")], check=True, capture_output=True)
        wait_until(lambda: not daemon.clients("n"))
        daemon.qmp("block-export-del", id="e-n")


def some_requests(rng, count=25):
    words = []
    for _ in range(count):
        at, length = rng.randrange(0, 4000) * KIB, rng.choice([1, 2, 4, 5, 60, 300]) * KIB
        length = min(length, 4096 * KIB - at)
        words.append(f"{rng.choice(['write -P 5', 'write -P 6', 'write -z', 'write -z -u', 'discard'])} {at} {length}")
    return words


@pytest.mark.parametrize("options", UNITS)
def test_maps_agree(tools, options):
    """Whoever wrote it, both say the same of it."""
    rng = random.Random(options)
    tools.peer("create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", "base.qcow2", "4M")
    tools.io("base.qcow2", "write -P 1 0 1M", "write -P 2 3M 64k")
    make(tools, options)
    for _ in range(3):
        tools.io("x.qcow2", *some_requests(rng))
        through_us(tools, *some_requests(rng))
        tools.same("map", "--output=json", "x.qcow2")
        tools.same("map", "x.qcow2")
        tools.same("check", "x.qcow2")
        tools.cairn("convert", "-O", "raw", "x.qcow2", "ours.raw")
        tools.equal("x.qcow2", "ours.raw")
    assert "extended l2: true" in tools.same("info", "x.qcow2").stdout


def test_a_small_write_copies_a_subcluster(tools):
    """4 KiB into a cluster of 128 KiB over a backing file: nothing else comes into the image."""
    tools.peer("create", "-q", "-f", "qcow2", "base.qcow2", "4M")
    tools.io("base.qcow2", "write -P 1 0 4M")
    make(tools, "cluster_size=128k")
    through_us(tools, "write -P 9 1032k 4k", "write -P 8 2000k 1k")
    shown = json.loads(tools.peer("map", "--output=json", "x.qcow2").stdout)
    assert [(e["start"], e["length"]) for e in shown if e["depth"] == 0] == [(1032 * KIB, 4 * KIB), (2000 * KIB, 4 * KIB)]
    tools.peer("check", "-q", "x.qcow2")


def test_the_tools_make_and_change_them(tools):
    tools.chain()
    tools.cairn("convert", "-O", "qcow2", "-o", "extended_l2=on,cluster_size=32k", "top.qcow2", "c.qcow2")
    tools.equal("top.qcow2", "c.qcow2")
    tools.cairn("convert", "-c", "-O", "qcow2", "-o", "extended_l2=on", "top.qcow2", "c.qcow2")
    tools.equal("top.qcow2", "c.qcow2")
    tools.io("c.qcow2", "write -P 7 70k 3k", "discard 5M 64k", "write -z 6M 2k")  # over compressed clusters
    tools.same("check", "c.qcow2")
    tools.cairn("resize", "c.qcow2", "150M")
    tools.cairn("resize", "--shrink", "c.qcow2", "40M")
    tools.cairn("resize", "--preallocation=metadata", "c.qcow2", "60M")
    tools.peer("check", "-q", "c.qcow2")
    tools.cairn("convert", "-O", "raw", "c.qcow2", "ours.raw")
    tools.equal("c.qcow2", "ours.raw")


def test_snapshots_keep_their_subclusters(tools):
    tools.peer("create", "-q", "-f", "qcow2", "base.qcow2", "4M")
    tools.io("base.qcow2", "write -P 1 0 4M")
    make(tools, "cluster_size=64k")
    tools.io("x.qcow2", "write -P 2 64k 6k", "write -z 80k 4k")
    tools.cairn("convert", "-O", "raw", "x.qcow2", "one.raw")
    tools.cairn("snapshot", "-c", "one", "x.qcow2")
    tools.io("x.qcow2", "write -P 3 66k 4k", "discard 64k 2k")
    tools.peer("check", "-q", "x.qcow2")
    through_us(tools, "write -P 9 100k 4k")
    tools.peer("check", "-q", "x.qcow2")
    tools.cairn("snapshot", "-a", "one", "x.qcow2")
    tools.equal("x.qcow2", "one.raw")
    tools.cairn("snapshot", "-d", "one", "x.qcow2")
    tools.equal("x.qcow2", "one.raw")


def test_preallocation_shows_the_backing_file(tools):
    tools.chain()
    tools.cairn("create", "-q", "-f", "qcow2", "-b", "top.qcow2", "-F", "qcow2", "-o", "extended_l2=on,preallocation=metadata", "p.qcow2")
    tools.equal("p.qcow2", "top.qcow2")
    tools.cairn("compare", "p.qcow2", "top.qcow2")
    said = tools.cairn("create", "-q", "-f", "qcow2", "-o", "extended_l2=on,cluster_size=8k", "q.qcow2", "1M", ok=(1,)).stderr
    assert "16384" in said
    assert "version 3" in tools.cairn("create", "-q", "-f", "qcow2", "-o", "extended_l2=on,compat=v2", "q.qcow2", "1M", ok=(1,)).stderr
