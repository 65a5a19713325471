# SPDX-License-Identifier: Apache-2.0
"""resize, rebase and bench beside qemu-img's, and the program under its name."""
import json
import re

import pytest
from image_support import need_peer, tools  # pylint: disable=unused-import

need_peer()


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
def test_sizes_change(tools, fmt):
    image = f"x.{fmt}"
    tools.peer("create", "-q", "-f", fmt, image, "10M")
    tools.io(image, "write -P 5 0 1M", "write -P 6 9M 1M", fmt=fmt)
    for size in ("+5M", "20M", "+1G"):
        assert tools.ours("resize", "-f", fmt, image, size).stdout == "Image resized.\n"
    assert tools.ours("resize", "-q", "-f", fmt, "--shrink", image, "-1014M").stdout == ""
    assert tools.peer("info", "-f", fmt, image).stdout.splitlines()[2] == "virtual size: 30 MiB (31457280 bytes)"
    tools.io(image, "read -P 5 0 1M", "read -P 6 9M 1M", "read -P 0 10M 20M", fmt=fmt)
    tools.ours("resize", "-f", fmt, "--shrink", image, "9728k")
    tools.ours("resize", "-f", fmt, image, "10M")
    tools.io(image, "read -P 6 9M 512k", "read -P 0 9728k 512k", fmt=fmt)
    if fmt == "qcow2":
        tools.peer("check", "-q", image)


@pytest.mark.parametrize("arguments", [
    [], ["base.qcow2"], ["base.qcow2", "what"], ["base.qcow2", "50M"], ["base.qcow2", "-1M"], ["--shrink", "base.qcow2", "-1G"],
    ["base.qcow2", "200000001"], ["--preallocation=what", "base.qcow2", "+1M"], ["--shrink", "--preallocation=metadata", "base.qcow2", "1M"],
    ["none", "+1M"],
])
def test_resize_refuses_the_same(tools, arguments):
    tools.chain()
    before = tools.peer("info", "base.qcow2").stdout
    tools.same("resize", *arguments)
    assert tools.peer("info", "base.qcow2").stdout == before


def test_raw_images_grow_with_their_space(tools):
    for mode in ("falloc", "full"):
        tools.peer("create", "-q", "x.raw", "1M")
        tools.ours("resize", "-f", "raw", f"--preallocation={mode}", "x.raw", "+4M")
        assert 4 << 20 <= tools.disk_bytes("x.raw") < 5 << 20
        tools.io("x.raw", "read -P 0 0 5M", fmt="raw")


def other_base(tools):
    tools.peer("create", "-q", "-f", "qcow2", "other.qcow2", "90M")
    tools.io("other.qcow2", "write -P 1 0 100k", "write -P 8 20M 1M")


SHAPES = ["cluster_size=64k", "cluster_size=512", "cluster_size=4k", "cluster_size=2M", "compat=0.10", "compat=0.10,cluster_size=2M"]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backed", [False, True])
def test_a_rebased_disk_stays_what_it_is(tools, shape, backed):
    tools.chain()
    other_base(tools)
    below = ["-b", "base.qcow2", "-F", "qcow2"] if backed else []
    tools.peer("create", "-q", "-f", "qcow2", "-o", shape, *below, "x.qcow2", "100M")
    tools.io("x.qcow2", "write -P 3 64k 64k", "write -P 4 99M 1M")
    tools.peer("convert", "-O", "raw", "x.qcow2", "x.raw")
    for base, words in (("other.qcow2", ["-F", "qcow2"]), ("base.qcow2", ["-F", "qcow2"]), ("", [])):
        tools.ours("rebase", "-b", base, *words, "x.qcow2")
        tools.equal("x.raw", "x.qcow2")
        said = re.findall("^backing file: (.*)$", tools.peer("info", "x.qcow2").stdout, re.M)
        assert said == ([base] if base else [])


@pytest.mark.parametrize("shape", ["cluster_size=64k", "cluster_size=4k", "compat=0.10,cluster_size=2M"])
def test_a_rebased_disk_is_compressed(tools, shape):
    tools.chain()
    other_base(tools)
    tools.peer("create", "-q", "-f", "qcow2", "-o", shape, "-b", "base.qcow2", "-F", "qcow2", "x.qcow2", "100M")
    tools.io("x.qcow2", "write -P 3 64k 64k", "write -P 4 99M 1M")
    tools.peer("convert", "-O", "raw", "x.qcow2", "x.raw")
    tools.ours("rebase", "-c", "-b", "other.qcow2", "-F", "qcow2", "x.qcow2")
    tools.equal("x.raw", "x.qcow2")
    checked = tools.ours("check", "--output=json", "x.qcow2").stdout
    assert json.loads(checked)["compressed-clusters"] > 0
    tools.ours("rebase", "-c", "-u", "-b", "", "x.qcow2", ok=(1,))


@pytest.mark.parametrize("shape", SHAPES)
def test_names_change_alone(tools, shape):
    tools.peer("create", "-q", "-f", "qcow2", "-u", "-o", shape, "-b", "one", "-F", "raw", "x.qcow2", "10M")
    peer_knows = tools.peer("info", "x.qcow2").stdout
    for name, fmt in (("two", "qcow2"), ("n" * 100, "raw"), ("", None), ("three", "qcow2"), ("one", "raw")):
        tools.ours("rebase", "-u", "-b", name, *(["-F", fmt] if fmt else []), "x.qcow2")
        text = tools.peer("info", "x.qcow2").stdout
        assert (f"backing file: {name}\n" in text and f"backing file format: {fmt}\n" in text) if name else "backing" not in text
    assert tools.peer("info", "x.qcow2").stdout == peer_knows
    tools.peer("create", "-q", "one", "10M")
    tools.peer("check", "-q", "x.qcow2")


def test_lists_survive_a_rebase(tools):
    tools.peer("create", "-q", "-f", "qcow2", "x.qcow2", "10M")
    tools.peer("snapshot", "-c", "s", "x.qcow2")
    tools.peer("bitmap", "--add", "x.qcow2", "b0")
    tools.ours("rebase", "-u", "-b", "below", "-F", "raw", "x.qcow2")
    text = tools.peer("info", "x.qcow2").stdout
    assert "name: b0" in text and "Snapshot list" in text and "backing file: below" in text


@pytest.mark.parametrize("arguments", [
    [], ["top.qcow2"], ["-u", "-b", "base.qcow2", "top.qcow2"], ["-b", "none", "-F", "qcow2", "top.qcow2"],
    ["-b", "base.qcow2", "-F", "what", "top.qcow2"], ["-f", "raw", "-b", "base.qcow2", "-F", "qcow2", "x.raw"],
])
def test_rebase_refuses_the_same(tools, arguments):
    tools.chain()
    tools.peer("create", "-q", "x.raw", "1M")
    tools.same("rebase", *arguments)
    assert "backing file: base.qcow2" in tools.peer("info", "top.qcow2").stdout


@pytest.mark.parametrize("arguments", [
    [], ["-c", "10"], ["-w", "-c", "200", "--flush-interval=64"], ["-w", "-c", "20", "-d", "4", "--no-drain", "--flush-interval=8"],
    ["-c", "20", "-s", "64k", "-S", "1M", "-o", "4k"], ["-t", "none", "-c", "10"], ["-w", "-t", "writethrough", "-c", "5"],
])
def test_bench_says_the_same(tools, arguments):
    tools.peer("create", "-q", "x.raw", "1G")
    words = ["bench", "-f", "raw", *(arguments or ["-c", "100"]), "x.raw"]
    ours, peer = tools.ours(*words).stdout, tools.peer(*words).stdout
    assert re.sub(r"\d+\.\d{3} seconds", "T", ours) == re.sub(r"\d+\.\d{3} seconds", "T", peer)


def test_bench_writes_its_pattern(tools):
    tools.peer("create", "-q", "x.raw", "1M")
    tools.ours("bench", "-q", "-w", "-f", "raw", "-c", "256", "--pattern", "171", "x.raw")
    tools.io("x.raw", "read -P 171 0 1M", fmt="raw")
    assert "queue depth" in tools.ours("bench", "-d", "0", "x.raw", ok=(1,)).stderr
    for words in (["--flush-interval=65"], ["-w", "--flush-interval=5"]):
        tools.same("bench", "-f", "raw", *words, "x.raw")


@pytest.mark.parametrize("arguments", [[], ["what"], ["--what"], ["create"], ["create", "--what"], ["compare", "a"]])
def test_wrong_usage_ends_the_same(tools, arguments):
    done = tools.same(*arguments)
    assert done.returncode == 1 and done.stderr.startswith("qemu-img: ")
    assert done.stderr.splitlines()[-1] == "Try 'qemu-img --help' for more information"


def test_versions_are_read_as_the_peers(tools):
    shape = r"qemu-img version \d+\.\d+\.\d+ "
    assert re.match(shape, tools.ours("--version").stdout) and re.match(shape, tools.peer("--version").stdout)
    assert re.match(shape + r".*\nusage: qemu-img ", tools.ours("--help").stdout)


def test_all_commands_are_there(tools):
    listed = tools.peer("--help").stdout.split("Command syntax:", 1)[1].split("Command parameters:", 1)[0]
    commands = re.findall(r"^  ([a-z]+) ", listed, re.M)
    assert len(commands) > 12
    for command in commands:
        assert "\nusage: qemu-img " in tools.ours(command, "--help").stdout
