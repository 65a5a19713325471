# SPDX-License-Identifier: Apache-2.0
"""QEMU's tools as clients of the NBD server, contents compared: convert, compare, map, info, qemu-io, and a daemon in between."""
import json
import random
import subprocess

import nbd
import pytest
from nbd_support import MIB, Daemon, wait_until

SIZE = 32 * MIB


def run(*words, status=0):
    ended = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == status, (words, ended.returncode, ended.stdout, ended.stderr)
    return ended.stdout


@pytest.fixture
def daemon():
    with Daemon() as d:
        yield d


@pytest.fixture
def source(tmp_path):
    """Data, zeroes and holes."""
    path = tmp_path / "source.img"
    rng = random.Random(9)
    with open(path, "wb") as f:
        f.truncate(SIZE)
        for i in range(0, SIZE // MIB, 2):
            f.seek(i * MIB + rng.randrange(64) * 4096)
            f.write(rng.randbytes(300000))
        f.seek(5 * MIB)
        f.write(bytes(MIB))
    return path


def empty(tmp_path, name="target.img"):
    path = tmp_path / name
    with open(path, "wb") as f:
        f.truncate(SIZE)
    return path


@pytest.mark.parametrize("engine", ["io_uring", "threads"])
def test_convert_to_us_and_from_us(source, tmp_path, engine):
    with Daemon(engine=engine) as d:
        target = empty(tmp_path)
        d.add("target", target, discard="unmap")
        run("qemu-img", "convert", "-n", "-W", "-m", "16", "-f", "raw", "-O", "raw", source, d.uri("target"))
        assert target.read_bytes() == source.read_bytes()
        assert run("qemu-img", "compare", "-f", "raw", "-F", "raw", source, d.uri("target")) == "Images are identical.\n"
        back = tmp_path / "back.img"
        run("qemu-img", "convert", "-f", "raw", "-O", "raw", d.uri("target"), back)
        assert back.read_bytes() == source.read_bytes()
        with open(target, "r+b") as f:
            f.seek(20 * MIB)
            f.write(b"different")
        run("qemu-img", "compare", "-f", "raw", "-F", "raw", source, d.uri("target"), status=1)


def test_a_qcow2_image_inside_the_export(daemon, source, tmp_path):
    """The peer's format on our disk: its metadata writes, its flushes, its check."""
    target = empty(tmp_path)
    daemon.add("target", target, discard="unmap")
    run("qemu-img", "create", "-f", "qcow2", daemon.uri("target"), f"{SIZE // MIB}M")
    run("qemu-img", "convert", "-n", "-f", "raw", "-O", "qcow2", source, daemon.uri("target"))
    run("qemu-img", "check", "-f", "qcow2", daemon.uri("target"))
    assert "identical" in run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", source, daemon.uri("target"))
    assert "identical" in run("qemu-img", "compare", "-U", "-f", "raw", "-F", "qcow2", source, target)


def test_map_is_that_of_the_file(daemon, source):
    daemon.add("source", source, writable=False)
    theirs = json.loads(run("qemu-img", "map", "-U", "-f", "raw", "--output=json", source))
    ours = json.loads(run("qemu-img", "map", "-f", "raw", "--output=json", daemon.uri("source")))

    def shape(extents):
        return [(e["start"], e["length"], e["zero"], e["data"]) for e in extents]

    assert len(ours) > 20 and shape(ours) == shape(theirs)
    info = json.loads(run("qemu-img", "info", "-f", "raw", "--output=json", daemon.uri("source")))
    assert info["virtual-size"] == SIZE


@pytest.mark.parametrize("direct", [False, True])
def test_patterns_with_qemu_io(daemon, tmp_path, direct):
    target = empty(tmp_path)
    daemon.add("target", target, discard="unmap", cache={"direct": direct})
    words = ["qemu-io", "-f", "raw", daemon.uri("target")]
    for command in (
        "write -P 1 0 64k", "write -P 2 511 1025", "write -f -P 3 1M 2M", "write -z 1536k 512k", "write -z -u 2M 64k",
        "discard 8M 1M", "write -P 4 31M 1M", "aio_write -P 5 4M 64k", "aio_write -P 6 4160k 64k", "aio_flush", "flush",
        "writev -P 7 10M 4k 8k 512", "read -P 1 0 511", "read -P 2 511 1025", "read -P 3 1M 512k", "read -P 0 1536k 512k",
        "read -P 0 2M 64k", "read -P 3 2112k 960k", "read -P 4 31M 1M", "read -P 5 4M 64k", "read -P 6 4160k 64k",
        "read -P 7 10M 12800", "read -P 0 5M 3M",
    ):
        words += ["-c", command]
    out = run(*words)
    assert "Pattern verification failed" not in out and "failed" not in out, out
    data = target.read_bytes()
    assert data[MIB : MIB + 512 * 1024] == b"\3" * 512 * 1024 and data[31 * MIB :] == b"\4" * MIB
    daemon.qmp("block-export-add", type="nbd", id="ro", node_name="target", name="ro", writable=False)
    run("qemu-io", "-f", "raw", daemon.uri("ro"), "-c", "write -P 9 0 512", status=1)
    run("qemu-io", "-r", "-f", "raw", daemon.uri("ro"), "-c", "read -P 1 0 511")
    assert target.read_bytes() == data


def test_a_peer_daemon_between_us_and_the_client(daemon, source, tmp_path):
    """qemu-storage-daemon opens our export and exports it again; the client sees the same bytes through both."""
    target = empty(tmp_path)
    daemon.add("target", target, discard="unmap")
    path = f"{daemon.dir}/peer"
    peer = subprocess.Popen([
        "qemu-storage-daemon",
        "--blockdev", f"driver=nbd,node-name=n,discard=unmap,server.type=unix,server.path={daemon.path},export=target",
        "--nbd-server", f"addr.type=unix,addr.path={path}",
        "--export", "type=nbd,id=e,node-name=n,name=again,writable=on",
    ])
    try:
        def connect():
            h = nbd.NBD()
            h.add_meta_context("base:allocation")
            try:
                h.connect_uri(f"nbd+unix:///again?socket={path}")
            except nbd.Error:
                return None
            return h
        h = wait_until(connect)
        assert h.get_size() == SIZE
        data = source.read_bytes()
        for offset in range(0, SIZE, MIB):
            h.pwrite(data[offset : offset + MIB], offset)
        h.zero(MIB, 0, nbd.CMD_FLAG_FUA)
        h.trim(MIB, MIB)
        h.flush()
        assert h.pread(SIZE // 2, SIZE // 2) == data[SIZE // 2 :]
        extents = []
        h.block_status(SIZE, 0, lambda c, o, e, err: extents.extend(zip(e[::2], e[1::2])))
        pos = 0
        for length, state in extents:
            assert state == (3 if pos < 2 * MIB else state)
            pos += length
        assert pos == SIZE
        h.shutdown()
    finally:
        peer.terminate()
        peer.wait(30)
    assert target.read_bytes() == bytes(2 * MIB) + data[2 * MIB :]


def test_an_export_that_goes_away_under_qemu(daemon, tmp_path):
    """A peer's daemon with our export under it is told of errors when that is removed, and lives."""
    target = empty(tmp_path)
    daemon.add("target", target)
    process = subprocess.Popen(
        ["qemu-io", "-f", "raw", daemon.uri("target")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        stderr=subprocess.STDOUT,
    )
    process.stdin.write("write -P 1 0 64k\n")
    process.stdin.flush()
    assert wait_until(lambda: target.read_bytes()[:65536] == b"\1" * 65536)
    daemon.qmp("block-export-del", id="e-target", mode="hard")
    daemon.qmp.wait_event("BLOCK_EXPORT_DELETED", id="e-target")
    out = process.communicate("read -P 1 0 64k\nquit\n", timeout=30)[0]
    assert "read failed" in out, out
