# SPDX-License-Identifier: Apache-2.0
"""amend beside qemu-img's: the same becomes of the same images, their disks and snapshots stay, and the same is refused."""
import re
import shutil
import subprocess

import pytest
from image_support import need_peer, tools, without_sizes  # pylint: disable=unused-import

need_peer()



def make(tools, options, backed=False, size="10M", compress=True):
    """x.qcow2 with data, zeroes with and without space, compressed clusters, and snapshots that share some of it."""
    below = []
    if backed:
        tools.peer("create", "-q", "-f", "qcow2", "base.qcow2", size)
        tools.io("base.qcow2", "write -P 1 0 10M")
        below = ["-b", "base.qcow2", "-F", "qcow2"]
    tools.peer("create", "-q", "-f", "qcow2", "-o", options, *below, "x.qcow2", size)
    zero = "-z" if "0.10" not in options else "-P 0"
    tools.io("x.qcow2", "write -P 3 1M 1M", f"write {zero} 1536k 256k", f"write {zero} 3M 2M", "write -P 4 8M 5k")
    if compress:
        tools.io("x.qcow2", "write -c -P 5 6M 2M")
    tools.peer("snapshot", "-c", "one", "x.qcow2")
    tools.io("x.qcow2", "write -P 6 3M 128k", f"write {zero} 4M 64k", f"write {zero} 9M 64k", "write -P 7 512k 64k")
    tools.peer("snapshot", "-c", "two", "x.qcow2")
    tools.io("x.qcow2", "write -P 8 9M 4k", f"write {zero} 1M 2M")


def content(tools, image="x.qcow2"):
    """What the disk and its snapshots hold, as hashes of raw files."""
    done = []
    for words in ([], ["-l", "one"], ["-l", "two"]):
        tools.peer("convert", *words, "-O", "raw", image, "content.raw")
        done.append(subprocess.run(["sha256sum", tools.path("content.raw")], capture_output=True, check=True).stdout)
    return done


def same_info(tools, one, other):
    def text(name):
        return without_sizes(tools.peer("info", name).stdout).replace(name, "X")
    assert text(one) == text(other)


def both(tools, options):
    shutil.copy(tools.path("x.qcow2"), tools.path("y.qcow2"))
    assert tools.ours("amend", "-o", options, "x.qcow2").stdout == tools.peer("amend", "-o", options, "y.qcow2").stdout
    same_info(tools, "x.qcow2", "y.qcow2")
    tools.equal("x.qcow2", "y.qcow2")


@pytest.mark.parametrize("backed", [False, True])
@pytest.mark.parametrize("size", ["cluster_size=64k", "cluster_size=4k", "cluster_size=2M"])
def test_versions_go_down_and_up(tools, size, backed):
    make(tools, size, backed)
    before = content(tools)
    for options in ("compat=0.10", "compat=1.1", "compat=v2", "compat=v3,lazy_refcounts=on"):
        shutil.copy(tools.path("x.qcow2"), tools.path("y.qcow2"))
        tools.ours("amend", "-o", options, "x.qcow2")
        tools.peer("amend", "-o", options, "y.qcow2")
        same_info(tools, "x.qcow2", "y.qcow2")  # the peer leaves wrong flags where snapshots share what it makes of zeroes
        tools.peer("check", "-q", "x.qcow2")
        assert content(tools) == before
        assert tools.cairn("check", "-q", "x.qcow2").stdout == ""
    tools.io("x.qcow2", "write -P 9 3M 2M", "read -P 9 3M 2M", "read -P 8 9M 4k", "discard 3M 1M")
    tools.peer("snapshot", "-a", "one", "x.qcow2")
    tools.peer("check", "-q", "x.qcow2")
    assert content(tools)[1:] == before[1:]


def test_what_is_shared_is_copied_by_writers(tools):
    """Entries that have come to share a cluster of zeroes part again."""
    tools.chain()
    tools.io("top.qcow2", "write -z 10M 20M")
    tools.ours("amend", "-o", "compat=0.10", "top.qcow2")
    assert tools.disk_bytes("top.qcow2") < 3 << 20
    tools.io("top.qcow2", "write -P 5 12M 100k", "write -P 6 20M 64k")
    for command in ("convert -O raw top.qcow2 a.raw", "check top.qcow2"):
        tools.ours(*command.split())
    tools.io("a.raw", "read -P 0 10M 2M", "read -P 5 12M 100k", "read -P 0 13M 7M", "read -P 6 20M 64k", "read -P 0 20544k 9M", fmt="raw")
    tools.equal("a.raw", "top.qcow2")
    tools.ours("resize", "top.qcow2", "--shrink", "15M")
    tools.peer("check", "-q", "top.qcow2")


@pytest.mark.parametrize("bits", [2, 8, 64])
@pytest.mark.parametrize("size", ["cluster_size=64k", "cluster_size=4k"])
def test_refcounts_of_all_widths(tools, size, bits):
    make(tools, size, compress=False)
    before = content(tools)
    tools.io("x.qcow2", "write -P 9 2M 1M")
    tools.io("x.qcow2", "discard 2M 1M")
    both(tools, f"refcount_bits={bits}")
    assert content(tools)[1:] == before[1:]
    tools.ours("snapshot", "-d", "one", "x.qcow2")
    tools.ours("snapshot", "-a", "two", "x.qcow2")
    assert f"refcount bits: {bits}" in tools.peer("info", "x.qcow2").stdout
    tools.peer("check", "-q", "x.qcow2")


def test_one_bit_is_for_images_without_snapshots(tools):
    make(tools, "cluster_size=64k", compress=False)
    before = tools.peer("info", "x.qcow2").stdout
    tools.same("amend", "-o", "refcount_bits=1", "x.qcow2")
    assert tools.peer("info", "x.qcow2").stdout == before
    for name in ("one", "two"):
        tools.ours("snapshot", "-d", name, "x.qcow2")
    for bits in (1, 64):
        both(tools, f"refcount_bits={bits}")


def test_everything_at_once(tools):
    make(tools, "compat=0.10")
    both(tools, "compat=1.1,refcount_bits=8,lazy_refcounts=on,size=20M")
    make(tools, "refcount_bits=64")
    tools.peer("snapshot", "-d", "one", "x.qcow2")
    tools.peer("snapshot", "-d", "two", "x.qcow2")
    both(tools, "compat=0.10,refcount_bits=16,lazy_refcounts=off,size=30M")


@pytest.mark.parametrize("options", [
    "", "backing_file=x", "backing_fmt=raw", "backing_file=base.qcow2,backing_fmt=qcow2", "backing_file=base.qcow2", "compat=what", "compat=0.10",
    "lazy_refcounts=what", "lazy_refcounts=on", "lazy_refcounts=off", "refcount_bits=3", "refcount_bits=0", "refcount_bits=128", "size=what",
    "size=1000", "size=5M", "size=20M", "data_file=x", "data_file_raw=on", "cluster_size=4k", "encrypt.state=active", "what=1",
    "preallocation=full", "compat=0.10,lazy_refcounts=on", "compat=0.10,refcount_bits=8", "lazy_refcounts=on,lazy_refcounts=off",
])
@pytest.mark.parametrize("shape", ["compat=1.1", "compat=0.10"])
def test_options_mean_the_same(tools, shape, options):
    tools.peer("create", "-q", "-f", "qcow2", "base.qcow2", "10M")
    results = []
    for run in (tools.peer, tools.ours):
        tools.peer("create", "-q", "-f", "qcow2", "-o", shape, "-b", "base.qcow2", "-F", "qcow2", "x.qcow2")
        tools.io("x.qcow2", "write -P 1 0 1M")
        done = run("amend", "-o", options, "x.qcow2", ok=None)
        results.append((done.returncode, done.stdout, without_sizes(tools.peer("info", "x.qcow2").stdout)))
        tools.peer("check", "-q", "x.qcow2")
    assert results[0] == results[1]


@pytest.mark.parametrize("arguments", [
    [], ["x.qcow2"], ["-o", "size=1M"], ["-o", "size=1M", "none"], ["-o", "size=1M", "x.raw"], ["-o", "size=1M", "x.qcow2", "x.raw"],
    ["-f", "raw", "-o", "help"], ["-o", "size=1M", "-t", "what", "x.qcow2"], ["-f", "what", "-o", "size=1M", "x.qcow2"], ["--what"],
    ["-p", "-o", "size=20M", "-q", "x.qcow2"],
])
def test_refuses_the_same(tools, arguments):
    make(tools, "compat=1.1")
    tools.peer("create", "-q", "x.raw", "1M")
    tools.same("amend", *arguments)


def test_progress_is_shown(tools):
    make(tools, "compat=1.1")
    ours = tools.ours("amend", "-p", "-o", "compat=0.10", "x.qcow2").stdout
    assert re.fullmatch(r"( +\(\d+\.\d\d/100%\)\r)+\n", ours) and "(100.00/100%)" in ours


@pytest.mark.parametrize("options,what", [("compression_type=zstd", "compression"), ("extended_l2=on", "extended L2"), ("data_file=d", "data file")])
def test_what_version_2_cannot_have_is_named(tools, options, what):
    tools.peer("create", "-q", "-f", "qcow2", "-o", options, "x.qcow2", "1M")
    assert what in tools.ours("amend", "-o", "compat=0.10", "x.qcow2", ok=(1,)).stderr
    tools.peer("check", "-q", "x.qcow2")


@pytest.mark.parametrize("options", ["data_file=other", "data_file_raw=off", "data_file_raw=on", "data_file=d", "refcount_bits=64", "lazy_refcounts=on",
                                     "size=2M", "compat=0.10"])
@pytest.mark.parametrize("raw", ["on", "off"])
def test_data_files(tools, raw, options):
    results = []
    for run in (tools.peer, tools.ours):
        tools.peer("create", "-q", "-f", "qcow2", "-o", f"data_file=d,data_file_raw={raw}", "x.qcow2", "1M")
        tools.io("x.qcow2", "write -P 3 64k 64k")
        shutil.copy(tools.path("d"), tools.path("other"))
        done = run("amend", "-o", options, "x.qcow2", ok=None)
        tools.io("x.qcow2", "read -P 3 64k 64k", "read -P 0 0 64k")
        results.append((done.returncode, done.stdout, without_sizes(tools.peer("info", "x.qcow2").stdout)))
        tools.peer("check", "-q", "x.qcow2")
    assert results[0] == results[1]


def test_bitmaps_prevent_version_2(tools):
    tools.peer("create", "-q", "-f", "qcow2", "x.qcow2", "1M")
    tools.peer("bitmap", "--add", "x.qcow2", "b")
    assert "bitmaps" in tools.ours("amend", "-o", "compat=0.10", "x.qcow2", ok=(1,)).stderr
    assert "name: b" in tools.peer("info", "x.qcow2").stdout


def test_snapshots_of_other_sizes_prevent_version_2(tools):
    make(tools, "compat=1.1")
    tools.peer("resize", "-q", "x.qcow2", "20M")
    before = content(tools)
    tools.same("amend", "-o", "compat=0.10", "x.qcow2")
    assert content(tools) == before


def test_a_dirty_image_is_repaired_first(tools):
    tools.peer("create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", "x.qcow2", "10M")
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -P 3 1M 1M", "-c", "sigraise 9", "x.qcow2"], cwd=tools.directory, check=False,
                   capture_output=True)
    assert "incompatible" in tools.peer("check", "-q", "x.qcow2", ok=None).stderr or tools.peer("check", "x.qcow2", ok=None).returncode
    tools.ours("amend", "-o", "compat=0.10", "x.qcow2")
    tools.io("x.qcow2", "read -P 3 1M 1M")
    tools.peer("check", "-q", "x.qcow2")
    assert "compat: 0.10" in tools.peer("info", "x.qcow2").stdout


def test_a_damaged_image_keeps_its_refcounts(tools):
    make(tools, "compat=1.1")
    with open(tools.path("x.qcow2"), "r+b") as f:
        f.seek(40)
        l1 = int.from_bytes(f.read(8), "big")
        f.seek(l1)
        l2 = int.from_bytes(f.read(8), "big") & 0xfffffffffffe00
        f.seek(l2 + 16 * 8)
        f.write((0x100).to_bytes(8, "big"))  # reserved bits
    assert "repair" in tools.ours("amend", "-o", "refcount_bits=32", "x.qcow2", ok=(1,)).stderr
    assert "refcount bits: 16" in tools.peer("info", "x.qcow2").stdout
