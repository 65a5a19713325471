# SPDX-License-Identifier: Apache-2.0
"""An internal snapshot as a disk that is only read: convert -l, measure -l, nbd -l, and the daemon's nodes. What it shows is what
the disk was, whoever made it; the image stays as it is, and what is damaged is refused."""
import os
import random
import shutil
import subprocess

import pytest

import image_support
from image_support import Tools, program, run
from nbd_support import MIB, Daemon, QmpError, wait_until

image_support.need_peer()
for tool in ("qemu-nbd", "nbdcopy"):
    if not shutil.which(tool):
        print(f"requires {tool}")
        pytest.skip(tool, allow_module_level=True)

SEED = int(os.environ.get("CAIRN_SEED", "1"))
SHAPES = ["cluster_size=512", "cluster_size=1k,compat=0.10", "cluster_size=64k", "cluster_size=4k,refcount_bits=64"]


@pytest.fixture
def tools(tmp_path):
    t = Tools(tmp_path)
    os.symlink(program(), t.path("bin/qemu-nbd"))
    return t


def content(path):
    with open(path, "rb") as f:
        return f.read()


def write_some(tools, prng, image, size):
    commands = []
    for _ in range(6):
        at = prng.randrange(size // 512) * 512
        length = min(prng.choice([512, 4096, 65536, 200 * 1024]), size - at)
        commands.append(prng.choice([f"write -P {prng.randrange(1, 256)} {at} {length}", f"write -z {at} {length}",
                                     f"discard {at} {length}"]))
    tools.io(image, *commands)


def as_raw(tools, image, *words):
    tools.peer("convert", *words, "-f", "qcow2", "-O", "raw", image, "raw")
    return content(tools.path("raw"))


def digest(tools, *names):
    return run("sha256sum", *names, cwd=tools.directory).stdout


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("maker", ["ours", "peer"])
def test_each_snapshot_is_what_the_disk_was(tools, shape, maker):
    """Above a backing file, with clusters that are compressed; disks that grow and shrink between."""
    print("seed", SEED)
    prng = random.Random(f"{SEED} {shape} {maker}")
    size = 1 * MIB
    tools.peer("create", "-q", "-f", "qcow2", "base.qcow2", "2M")
    write_some(tools, prng, "base.qcow2", 2 * MIB)
    tools.peer("create", "-q", "-f", "qcow2", "-o", shape, "-b", "base.qcow2", "-F", "qcow2", "top.qcow2", "1M")
    tools.io("top.qcow2", "write -c -P 77 0 64k")
    was = {}
    for i in range(4):
        write_some(tools, prng, "top.qcow2", size)
        was[f"s{i}"] = as_raw(tools, "top.qcow2")
        getattr(tools, maker)("snapshot", "-c", f"s{i}", "top.qcow2")
        if "compat" not in shape and i % 2:  # the peer cannot resize these
            size = prng.choice([MIB // 2, 3 * MIB // 2])
            tools.ours("resize", "-q", "--shrink", "-f", "qcow2", "top.qcow2", size)
    before = digest(tools, "top.qcow2", "base.qcow2")
    for i, (name, data) in enumerate(was.items()):
        for word in (name, str(i + 1), f"snapshot.name={name}", f"snapshot.id={i + 1},snapshot.name={name}"):
            tools.ours("convert", "-f", "qcow2", "-l", word, "-O", "raw", "top.qcow2", "out.raw")
            assert content(tools.path("out.raw")) == data, (name, word)
        socket = tools.path("s")
        run(tools.path("bin/qemu-nbd"), "--fork", "-l", name, "-k", socket, "-f", "qcow2", "top.qcow2",
            cwd=tools.directory)
        run("nbdcopy", f"nbd+unix:///?socket={socket}", "out.raw", cwd=tools.directory)
        assert content(tools.path("out.raw")) == data, name
    assert digest(tools, "top.qcow2", "base.qcow2") == before
    tools.peer("check", "-q", "-f", "qcow2", "top.qcow2")


@pytest.fixture
def two(tools):
    """Two snapshots, the second with the first one's ID as its name."""
    tools.peer("create", "-q", "-f", "qcow2", "two.qcow2", "4M")
    for value, name in ((1, "one"), (2, "1")):
        tools.io("two.qcow2", f"write -P {value} 0 {value * 64}k")
        tools.peer("snapshot", "-c", name, "two.qcow2")
    tools.io("two.qcow2", "write -P 9 0 1M")
    return tools


@pytest.mark.parametrize("word", ["one", "1", "2", "nope", "", "snapshot.id=1", "snapshot.name=1", "snapshot.id=one",
                                  "snapshot.id=1,snapshot.name=one", "snapshot.id=2,snapshot.name=one",
                                  "snapshot.bogus=1", "snapshot.id=1,x=2", "snapshot."])
def test_the_same_one_is_meant(two, word):
    found = []
    for tool in (two.peer, two.ours):
        out = two.path("out.raw")
        if os.path.exists(out):
            os.unlink(out)
        done = tool("convert", "-l", word, "-O", "raw", "two.qcow2", "out.raw", ok=(0, 1))
        found.append((done.returncode, content(out) if done.returncode == 0 else None))
        assert bool(done.stderr) == bool(done.returncode)
    assert found[0] == found[1]


def test_measure(two):
    for word in ("one", "2"):
        for output in ("raw", "qcow2"):
            two.same_json("measure", "--output=json", "-l", word, "-O", output, "two.qcow2")
    for words in (["-l", "nope", "two.qcow2"], ["-l", "one", "--size", "1M"], ["-l", "one", "-f", "raw", "two.qcow2"]):
        two.same("measure", "-O", "qcow2", *words)


def test_what_is_wrong(two):
    for words in (["-l", "one", "two.qcow2", "two.qcow2", "out.raw"], ["-l", "one", "-f", "raw", "two.qcow2", "out.raw"]):
        two.same("convert", "-O", "raw", *words)
    for server in (shutil.which("qemu-nbd"), two.path("bin/qemu-nbd")):
        for words in (["-l", "nope"], ["-l", "one", "-s"]):
            run(server, "--fork", "-k", two.path("s"), "-f", "qcow2", *words, "two.qcow2", ok=(1,), cwd=two.directory)


def test_nobody_writes_to_a_snapshot(two):
    before = digest(two, "two.qcow2")
    done = run(two.path("bin/qemu-nbd"), "--fork", "-t", "--pid-file", "pid", "-l", "one", "-k", two.path("s"), "two.qcow2",
               cwd=two.directory)
    assert not done.stderr
    uri = f"nbd+unix:///?socket={two.path('s')}"
    assert '"is_read_only": true' in run("nbdinfo", "--json", uri).stdout
    failed = subprocess.run(["qemu-io", "-f", "raw", "-c", "write 0 4k", uri], capture_output=True, check=False)
    assert failed.returncode == 1
    with open(two.path("pid")) as f:
        os.kill(int(f.read()), 15)
    assert wait_until(lambda: not os.path.exists(two.path("pid")))
    assert digest(two, "two.qcow2") == before


def test_nodes_of_the_daemon(two):
    with Daemon() as daemon:
        def add(name, **options):
            daemon.qmp("blockdev-add", driver="qcow2", node_name=name, **options,
                       file={"driver": "file", "filename": two.path("two.qcow2"), "read-only": True})

        with pytest.raises(QmpError, match="a snapshot can only be read"):
            daemon.qmp("blockdev-add", driver="qcow2", node_name="w", snapshot="one",
                       file={"driver": "file", "filename": two.path("two.qcow2")})
        with pytest.raises(QmpError, match="no such snapshot"):
            add("n", read_only=True, snapshot="nope")
        with pytest.raises(QmpError, match="no such snapshot"):
            add("n", read_only=True, snapshot={})
        add("past", read_only=True, snapshot={"id": "1", "name": "one"})
        add("now", read_only=True)
        for node, value, length in (("past", 1, 64), ("now", 9, 1024)):
            daemon.qmp("block-export-add", type="nbd", id=node, node_name=node)
            run("qemu-io", "-r", "-f", "raw", "-c", f"read -P {value} 0 {length}k", "-c",
                f"read -P 0 {length}k 64k", f"nbd+unix:///{node}?socket={daemon.path}")


@pytest.mark.parametrize("at, value", [(0, 1 << 40), (0, 3), (8, 0x7fffffff), (48, (1 << 64) - 1), (48, 1 << 60)],
                         ids=["l1-beyond", "l1-askew", "l1-size", "size", "too-large"])
def test_damage_is_told_and_harms_nothing(two, at, value):
    """P6: of the L1 table's place and length, and the size of the disk."""
    with open(two.path("two.qcow2"), "r+b") as f:
        f.seek(64)
        table = int.from_bytes(f.read(8), "big")
        f.seek(table + at)
        f.write(value.to_bytes(4 if at == 8 else 8, "big"))
    done = two.ours("convert", "-l", "one", "-O", "raw", "two.qcow2", "out.raw", ok=(1,))
    assert "damaged" in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    two.ours("convert", "-l", "2", "-O", "raw", "two.qcow2", "out.raw")
    two.ours("convert", "-O", "raw", "two.qcow2", "out.raw")
