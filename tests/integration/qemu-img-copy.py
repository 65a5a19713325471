# SPDX-License-Identifier: Apache-2.0
"""convert, dd and compare beside qemu-img's: the same disks, statuses and lines."""
import json
import os
import random
import signal
import subprocess
import time

import pytest
from image_support import need_peer, tools  # pylint: disable=unused-import

need_peer()

SEED = int(os.environ.get("CAIRN_SEED", "1"))


def make_random(tools, name, shape, rng, size):
    tools.peer("create", "-q", "-f", "qcow2", *(["-o", shape] if shape else []), name, size)
    commands = []
    for _ in range(rng.randrange(1, 14)):
        offset = rng.randrange(size)
        length = rng.randrange(1, min(size - offset, 200000) + 1)
        commands.append(f"{rng.choice(['write -P %d' % rng.randrange(0, 4)] * 3 + ['write -z', 'discard'])} {offset} {length}")
    tools.io(name, *commands)


@pytest.mark.parametrize("target", [
    ["-O", "raw"], ["-O", "qcow2"], ["-O", "qcow2", "-W", "-m", "16"], ["-O", "raw", "-W", "-m", "1"], ["-O", "raw", "-S", "0"],
    ["-O", "qcow2", "-S", "0"], ["-O", "raw", "-S", "64k"], ["-O", "qcow2", "-S", "512", "-o", "cluster_size=512"],
    ["-O", "qcow2", "-o", "compat=0.10,cluster_size=2M"], ["-O", "qcow2", "-o", "preallocation=metadata"],
    ["-O", "raw", "-t", "none", "-T", "none"], ["-O", "qcow2", "-t", "directsync"], ["-O", "qcow2", "-r", "100M"],
])
def test_disks_stay_the_same(tools, target):
    rng = random.Random(f"{SEED} {target}")
    out = "out.qcow2" if "qcow2" in target else "out.raw"
    for shape in ("", "cluster_size=512,compat=0.10"):
        size = rng.randrange(1, 6 << 11) * 512
        make_random(tools, "in.qcow2", shape, rng, size)
        tools.ours("convert", *target, "in.qcow2", out)
        tools.equal("in.qcow2", out)
        assert tools.peer("info", "--output=json", out).stdout.count(f'"virtual-size": {size}') == 1
        tools.peer("convert", "-O", "raw", "in.qcow2", "in.raw")
        tools.ours("convert", "-f", "raw", *target, "in.raw", out)
        tools.equal("in.raw", out)
        if target[1:] == ["raw"] or target[1:] == ["qcow2"]:
            assert tools.disk_bytes(out) <= tools.disk_bytes("in.qcow2") + (1 << 20)
        if "0" in target:
            assert tools.disk_bytes(out) >= size // 4096 * 4096


def test_chains_become_one_image_or_stay_two(tools):
    tools.chain()
    tools.ours("convert", "-O", "qcow2", "top.qcow2", "flat.qcow2")
    tools.equal("top.qcow2", "flat.qcow2")
    tools.ours("convert", "-O", "qcow2", "-B", "base.qcow2", "-F", "qcow2", "top.qcow2", "thin.qcow2")
    tools.equal("top.qcow2", "thin.qcow2")
    assert "backing file: base.qcow2" in tools.peer("info", "thin.qcow2").stdout
    assert tools.disk_bytes("thin.qcow2") < tools.disk_bytes("flat.qcow2")


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
def test_what_was_in_a_target_is_gone(tools, fmt):
    tools.chain()
    tools.peer("create", "-q", "-f", fmt, f"out.{fmt}", "100M")
    tools.io(f"out.{fmt}", "write -P 7 0 100M", fmt=fmt)
    tools.ours("convert", "-n", "-O", fmt, "top.qcow2", f"out.{fmt}")
    tools.equal("top.qcow2", f"out.{fmt}")


def test_images_one_behind_the_other(tools):
    tools.chain()
    with open(tools.path("odd.raw"), "wb") as f:
        f.write(b"x" * 1001)
    images = ["base.qcow2", "odd.raw", "top.qcow2"]
    tools.ours("convert", "-O", "qcow2", *images, "ours.qcow2")
    tools.peer("convert", "-O", "qcow2", *images, "peer.qcow2")
    tools.equal("ours.qcow2", "peer.qcow2")
    assert json.loads(tools.peer("info", "--output=json", "ours.qcow2").stdout)["virtual-size"] == 200 * (1 << 20) + 1024


def test_targets_by_options(tools):
    tools.chain()
    tools.peer("create", "-q", "-f", "qcow2", "out.qcow2", "100M")
    name = "driver=qcow2,file.filename=out.qcow2"
    tools.ours("convert", "-n", "--target-image-opts", "--target-is-zero", "top.qcow2", name)
    tools.equal("top.qcow2", "out.qcow2")


def test_progress_is_told(tools):
    tools.chain()
    text = tools.ours("convert", "-p", "-O", "raw", "top.qcow2", "x.raw").stdout
    assert text.startswith("    (0.00/100%)\r") and text.endswith("    (100.00/100%)\r\n")
    assert tools.ours("convert", "-p", "-q", "-O", "raw", "top.qcow2", "x.raw").stdout == ""


@pytest.mark.parametrize("arguments", [
    [], ["top.qcow2"], ["-O", "what", "top.qcow2", "x"], ["-f", "what", "top.qcow2", "x"], ["-n", "-O", "raw", "top.qcow2", "none"],
    ["-S", "1", "top.qcow2", "x"], ["-m", "17", "top.qcow2", "x"], ["-O", "qcow2", "-B", "base.qcow2", "top.qcow2", "x"],
    ["-n", "-o", "size=1M", "top.qcow2", "x"], ["--target-is-zero", "top.qcow2", "x"], ["--target-image-opts", "top.qcow2", "x"],
    ["-O", "qcow2", "-o", "what=1", "top.qcow2", "x"], ["top.qcow2", "top.qcow2"], ["-n", "-O", "raw", "top.qcow2", "small.raw"],
    ["-t", "what", "top.qcow2", "x"],
])
def test_convert_refuses_the_same(tools, arguments):
    tools.chain()
    tools.peer("create", "-q", "small.raw", "1M")
    tools.same("convert", *arguments)
    tools.peer("check", "-q", "top.qcow2")


@pytest.mark.parametrize("option", [["--object", "iothread,id=x"]])
def test_what_is_not_there_is_refused_by_name(tools, option):
    tools.chain()
    refused = tools.ours("convert", *option, "-O", "qcow2", "top.qcow2", "x.qcow2", ok=(1,))
    assert option[0] in refused.stderr
    assert not os.path.exists(tools.path("x.qcow2"))


@pytest.mark.parametrize("options", [[], ["-W"], ["-o", "cluster_size=2M"], ["-o", "cluster_size=512"], ["-S", "0"], ["-n"]])
def test_convert_compresses(tools, options):
    """What the source holds need not begin or end where the target's clusters do."""
    rng = random.Random(str(options))
    with open(tools.path("source"), "wb") as f:
        for _ in range(200):
            f.seek(rng.randrange(16 << 20) & ~4095)
            f.write((rng.randbytes(rng.choice([20, 3000, 40000])) * 3000)[:rng.randrange(1, 90000)])
        f.truncate((16 << 20) + 1536)
    if "-n" in options:
        tools.peer("create", "-q", "-f", "qcow2", "x.qcow2", str((16 << 20) + 1536))
    tools.ours("convert", "-c", *options, "-O", "qcow2", "source", "x.qcow2")
    tools.peer("check", "-q", "x.qcow2")
    tools.peer("compare", "-q", "source", "x.qcow2")
    checked = json.loads(tools.peer("check", "--output=json", "x.qcow2").stdout)
    assert checked.get("compressed-clusters", 0) > 0


def test_an_interrupted_copy_says_so(tools):
    tools.chain()
    with subprocess.Popen([tools.link, "convert", "-r", "64k", "-O", "raw", "-S", "0", "top.qcow2", "x.raw"], cwd=tools.directory,
                          stderr=subprocess.PIPE, text=True) as copy:
        while not os.path.exists(tools.path("x.raw")):
            time.sleep(0.01)
        time.sleep(0.3)
        copy.send_signal(signal.SIGUSR1)
        time.sleep(0.3)
        copy.send_signal(signal.SIGINT)
        text = copy.communicate(timeout=120)[1]
    assert copy.returncode == 1
    assert "/100%)" in text and "interrupted" in text and "'x.raw' is written in part only" in text


def test_dd_copies_windows(tools):
    tools.chain()
    tools.peer("convert", "-O", "raw", "top.qcow2", "top.raw")
    with open(tools.path("top.raw"), "rb") as f:
        whole = f.read()
    for bs, count, skip in ((65536, 16, 1), (512, 3, 128), (1 << 20, None, 98), (1000, 70, 60), (4096, 5, 0)):
        words = [f"bs={bs}", f"skip={skip}"] + ([f"count={count}"] if count else [])
        tools.ours("dd", "if=top.qcow2", "of=part.raw", *words)
        begin = bs * skip
        with open(tools.path("part.raw"), "rb") as f:
            part = whole[begin:begin + bs * count if count else None]
            assert f.read() == part + bytes(-len(part) % 512), words  # images are whole sectors
    tools.ours("dd", "-O", "qcow2", "if=top.qcow2", "of=part.qcow2", "bs=1M")
    tools.equal("top.qcow2", "part.qcow2")


@pytest.mark.parametrize("arguments", [["if=top.qcow2"], ["what=1"], ["bs=0", "if=top.qcow2", "of=x"], ["bs=x", "if=top.qcow2", "of=x"],
                                       ["if=top.qcow2", "of=x", "bs=1M", "skip=200"], ["if=none", "of=x"]])
def test_dd_refuses_the_same(tools, arguments):
    tools.chain()
    tools.same("dd", *arguments)


def test_compare_tells_the_same(tools):
    tools.chain()
    tools.peer("convert", "-O", "raw", "top.qcow2", "top.raw")
    tools.peer("create", "-q", "small.raw", "3M")
    tools.peer("create", "-q", "large.raw", "5M")
    tools.io("large.raw", "write -P 1 4M 512", fmt="raw")
    tools.peer("create", "-q", "zero.raw", "6M")
    for pair in (["base.qcow2", "top.qcow2"], ["top.qcow2", "top.raw"], ["small.raw", "large.raw"], ["large.raw", "small.raw"],
                 ["small.raw", "zero.raw"], ["-s", "small.raw", "zero.raw"], ["-s", "top.qcow2", "top.qcow2"], ["-q", "base.qcow2", "top.qcow2"],
                 ["-f", "raw", "-F", "raw", "base.qcow2", "top.raw"], ["none", "top.raw"], ["top.raw", "none"], ["top.raw"], ["--what"],
                 ["-s", "top.qcow2", "top.raw"], ["top.raw", "base.qcow2"]):
        tools.same("compare", *pair)


def test_compare_says_what_it_cannot_read(tools):
    """An L2 table that lies nowhere: 4, or 3 where it is asked for first."""
    tools.chain()
    with open(tools.path("base.qcow2"), "r+b") as f:
        f.seek(40)
        l1 = int.from_bytes(f.read(8), "big")
        f.seek(l1)
        f.write((1 << 63 | 1 << 50).to_bytes(8, "big"))
    assert tools.ours("compare", "top.qcow2", "top.qcow2", ok=(3, 4)).stderr


@pytest.mark.parametrize("options", ["cluster_size=64k", "cluster_size=4k", "cluster_size=2M,compression_type=zstd"])
def test_several_sources_are_compressed_together(tools, options):
    """Units of the target lie across their borders."""
    sizes = [1536 * 5, 100 * 1024, 3 << 20, 512, 512, 5 << 20]
    names = [f"s{i}.raw" for i in range(len(sizes))]
    for i, (name, size) in enumerate(zip(names, sizes)):
        tools.peer("create", "-q", name, size)
        tools.io(name, f"write -P {i + 1} {size // 1024 * 512} {(size - size // 1024 * 512) // 512 * 512}", fmt="raw")
    tools.ours("convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, *names, "ours.qcow2")
    tools.peer("convert", "-f", "raw", "-O", "raw", *names, "plain.raw")
    tools.equal("plain.raw", "ours.qcow2")
    assert tools.disk_bytes("ours.qcow2") < 3 << 20
