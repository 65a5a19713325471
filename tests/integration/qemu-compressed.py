# SPDX-License-Identifier: Apache-2.0
"""Compressed backups: QEMU reads and checks what we write, while a guest writes to the source."""
import os
import random
import subprocess

import nbd
import pytest
from nbd_support import Daemon, QmpError, wait_until

KIB, MIB = 1 << 10, 1 << 20
SIZE = 24 * MIB


def run(*words):
    return subprocess.run([str(word) for word in words], check=True, capture_output=True, text=True).stdout


def mixed(rng, size):
    """Some of it compresses well, some badly, some is nothing."""
    parts = []
    while sum(map(len, parts)) < size:
        unit = rng.randbytes(rng.choice([16, 500, 5000, 65536]))
        parts.append((unit * (65536 // len(unit) + 1))[:65536] if rng.random() < 0.8 else bytes(65536))
    return b"".join(parts)[:size]


@pytest.fixture
def daemon():
    with Daemon() as d:
        yield d


def source(daemon, tmp_path, data):
    (tmp_path / "disk").write_bytes(data)
    daemon.qmp("blockdev-add", driver="raw", node_name="d", file={"driver": "file", "filename": str(tmp_path / "disk")})
    daemon.export("d", writable=True)
    h = nbd.NBD()
    h.connect_uri(daemon.uri("d"))
    return h


def target(daemon, path, options, size=SIZE):
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, size)
    daemon.qmp("blockdev-add", driver="qcow2", node_name="t", file={"driver": "file", "filename": str(path)})


def compressed_clusters(path):
    return run("qemu-img", "check", "-f", "qcow2", "--output=json", path).count('"compressed-clusters": 0,') == 0


@pytest.mark.parametrize("options", [
    "cluster_size=64k", "cluster_size=4k", "cluster_size=512", "cluster_size=64k,compression_type=zstd",
    "cluster_size=64k,refcount_bits=1", "cluster_size=16k,refcount_bits=2", "cluster_size=64k,compat=0.10",
])
def test_qemu_reads_what_we_compress(daemon, tmp_path, options):
    rng = random.Random(options)
    before = mixed(rng, SIZE - 3 * 512)
    guest = source(daemon, tmp_path, before)
    image = tmp_path / "t.qcow2"
    target(daemon, image, options, len(before))
    daemon.qmp("blockdev-backup", job_id="j", device="d", target="t", sync="full", compress=True, speed=20 * MIB)
    while daemon.qmp("query-jobs"):
        guest.pwrite(rng.randbytes(rng.randrange(1, 20000)), rng.randrange(len(before) - 20000))
    guest.shutdown()
    wait_until(lambda: not daemon.clients("d"))
    daemon.qmp("blockdev-del", node_name="t")
    run("qemu-img", "check", "-f", "qcow2", image)
    raw = tmp_path / "back"
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, raw)
    assert raw.read_bytes() == before
    assert compressed_clusters(image)
    if "refcount_bits=1" not in options:  # there no two can share a cluster
        assert os.path.getsize(image) < len(before)


def test_compressed_clusters_are_replaced_and_given_back(daemon, tmp_path):
    """Backup over backup into one image: the old bytes are counted down, and their clusters used again."""
    rng = random.Random(7)
    data = mixed(rng, SIZE)
    guest = source(daemon, tmp_path, data)
    image = tmp_path / "t.qcow2"
    target(daemon, image, "cluster_size=64k")
    for turn in range(4):
        data = mixed(rng, SIZE)
        for at in range(0, SIZE, MIB):
            guest.pwrite(data[at:at + MIB], at)
        daemon.qmp("blockdev-backup", job_id=f"j{turn}", device="d", target="t", sync="full", compress=True)
        wait_until(lambda: not daemon.qmp("query-jobs"))
    daemon.qmp("blockdev-del", node_name="t")
    run("qemu-img", "check", "-f", "qcow2", image)
    raw = tmp_path / "back"
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, raw)
    assert raw.read_bytes() == data
    assert os.path.getsize(image) < 3 * SIZE


def test_what_does_not_compress_is_refused(daemon, tmp_path):
    guest = source(daemon, tmp_path, bytes(MIB))
    image = tmp_path / "t.qcow2"
    target(daemon, image, "cluster_size=2M", MIB)
    with pytest.raises(QmpError, match="clusters of 2097152 bytes"):
        daemon.qmp("blockdev-backup", job_id="j", device="d", target="t", sync="full", compress=True)
    guest.shutdown()
