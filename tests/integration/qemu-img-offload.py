# SPDX-License-Identifier: Apache-2.0
"""convert -C beside qemu-img's: the host copies where it can, and the disks are the same where it cannot."""
import os
import random
import shutil
import tempfile

import pytest
from image_support import need_peer, peer_creates_encrypted, run, tools  # pylint: disable=unused-import

need_peer()

SEED = int(os.environ.get("CAIRN_SEED", "1"))


def bytes_by_host(tools, *arguments):
    """Runs ours; how many bytes the host has copied."""
    if not shutil.which("strace"):
        pytest.skip("strace is not installed")
    log = tools.path("calls")
    run("strace", "-f", "-qq", "-o", log, "-e", "trace=copy_file_range", tools.link,
        *map(str, arguments), cwd=tools.directory)
    copied = 0
    with open(log, encoding="utf-8") as f:
        for line in f:
            result = line.rsplit("=", 1)[-1].split()[0]
            if "copy_file_range" in line and result.isdigit():
                copied += int(result)
    return copied


def make_random(tools, name, shape, rng, size):
    tools.peer("create", "-q", "-f", "qcow2", *(["-o", shape] if shape else []), name, size)
    commands = []
    for _ in range(rng.randrange(4, 20)):
        offset = rng.randrange(size)
        length = rng.randrange(1, min(size - offset, 900000) + 1)
        commands.append(f"{rng.choice(['write -P %d' % rng.randrange(0, 4)] * 4 + ['write -z', 'discard'])} {offset} {length}")
    tools.io(name, *commands)


@pytest.mark.parametrize("target", [
    ["-O", "raw"], ["-O", "raw", "-W"], ["-O", "raw", "-m", "1"], ["-O", "raw", "-t", "none", "-T", "none"],
    ["-O", "qcow2"], ["-O", "qcow2", "-W", "-m", "16"], ["-O", "qcow2", "-o", "cluster_size=512"],
    ["-O", "qcow2", "-o", "cluster_size=2M,compat=0.10"], ["-O", "qcow2", "-o", "extended_l2=on,cluster_size=128k"],
    ["-O", "qcow2", "-t", "directsync"], ["-O", "qcow2", "-o", "preallocation=metadata"], ["-O", "qcow2", "-r", "200M"],
])
def test_disks_stay_the_same(tools, target):
    rng = random.Random(f"{SEED} {target}")
    out = "out.qcow2" if "qcow2" in target else "out.raw"
    for shape in ("", rng.choice(["cluster_size=512", "extended_l2=on"])):
        size = rng.randrange(1, 16 << 11) * 512
        make_random(tools, "in.qcow2", shape, rng, size)
        tools.ours("convert", "-C", *target, "in.qcow2", out)
        tools.equal("in.qcow2", out)
        tools.peer("convert", "-C", "-O", "raw", "in.qcow2", "in.raw")
        tools.ours("convert", "-C", "-f", "raw", *target, "in.raw", out)
        tools.equal("in.raw", out)
        # And back: what ours has made is copied by the peer's host, too.
        tools.peer("convert", "-C", "-O", "raw", out, "back.raw")
        tools.equal("in.raw", "back.raw")


def test_the_host_copies(tools):
    size = 24 << 20
    with open(tools.path("in.raw"), "wb") as f:
        f.write(random.Random(SEED).randbytes(size))
        f.truncate(2 * size)
    assert bytes_by_host(tools, "convert", "-f", "raw", "-C", "-O", "qcow2", "in.raw", "x.qcow2") == size
    assert bytes_by_host(tools, "convert", "-C", "-O", "raw", "x.qcow2", "x.raw") == size
    assert bytes_by_host(tools, "convert", "-O", "raw", "x.qcow2", "y.raw") == 0
    tools.equal("in.raw", "x.qcow2")
    tools.equal("in.raw", "x.raw")
    assert tools.disk_bytes("x.raw") < size + (1 << 20)


def test_chains_snapshots_and_targets_that_are_there(tools):
    tools.chain()
    tools.ours("convert", "-C", "-O", "qcow2", "top.qcow2", "flat.qcow2")
    tools.equal("top.qcow2", "flat.qcow2")
    tools.ours("convert", "-C", "-O", "qcow2", "-B", "base.qcow2", "-F", "qcow2", "top.qcow2", "thin.qcow2")
    tools.equal("top.qcow2", "thin.qcow2")
    assert tools.disk_bytes("thin.qcow2") < tools.disk_bytes("flat.qcow2")
    # Over what is there, and shared with a snapshot.
    tools.io("flat.qcow2", "write -P 8 0 3M")
    tools.peer("snapshot", "-c", "s", "flat.qcow2")
    tools.ours("convert", "-C", "-n", "-O", "qcow2", "top.qcow2", "flat.qcow2")
    tools.equal("top.qcow2", "flat.qcow2")
    tools.ours("convert", "-C", "-l", "s", "-O", "raw", "flat.qcow2", "then.raw")
    tools.peer("convert", "-l", "s", "-O", "raw", "flat.qcow2", "peer.raw")
    tools.equal("peer.raw", "then.raw")
    tools.ours("convert", "-C", "-O", "raw", "top.qcow2", "base.qcow2", "both.raw")
    tools.peer("convert", "-C", "-O", "raw", "top.qcow2", "base.qcow2", "peer.raw")
    tools.equal("peer.raw", "both.raw")


def test_where_the_host_cannot_bytes_are_copied(tools):
    """Another file system, what is compressed, and what is encrypted, at either end."""
    tools.chain()
    with tempfile.TemporaryDirectory(dir="/dev/shm") as elsewhere:
        out = os.path.join(elsewhere, "out.qcow2")
        tools.ours("convert", "-C", "-O", "qcow2", "top.qcow2", out)
        tools.equal("top.qcow2", out)
    tools.peer("convert", "-c", "-O", "qcow2", "top.qcow2", "small.qcow2")
    tools.ours("convert", "-C", "-O", "qcow2", "small.qcow2", "x.qcow2")
    tools.equal("top.qcow2", "x.qcow2")
    peer_creates_encrypted(tools.path("secret.qcow2"), size="100M")
    secret = ["--object", "secret,id=s,data=abc"]
    locked = "driver=qcow2,encrypt.key-secret=s,file.filename=secret.qcow2"
    tools.ours("convert", "-C", *secret, "-n", "--target-image-opts", "top.qcow2", locked)
    tools.ours("convert", "-C", *secret, "--image-opts", "-O", "raw", locked, "open.raw")
    tools.equal("top.qcow2", "open.raw")


@pytest.mark.parametrize("arguments", [["-C", "-c", "-O", "qcow2"], ["-C", "-S", "4k"], ["-S", "0", "-C"], ["-C", "--salvage"]])
def test_what_must_see_the_data_is_refused(tools, arguments):
    tools.chain()
    answer = tools.same("convert", *arguments, "top.qcow2", "x")
    assert "opy offloading" in answer.stderr
    assert not os.path.exists(tools.path("x"))
