# SPDX-License-Identifier: Apache-2.0
"""A node with dirty bitmaps is alone in writing to its file (I5): two daemons on one file, and qemu-io beside one."""
import os
import shutil
import subprocess

import pytest

nbd = pytest.importorskip("nbd")

MIB = 1 << 20
CLUSTER = 64 << 10
KEPT_OUT = "cannot get write access to file '{}': is another process using it?"
IN_THE_WAY = "cannot keep others from write access to file '{}': is another process using it?"


class Host:
    """A daemon with the node `d` on a file that others may have open too."""

    def __init__(self, daemon, path, **more):
        self.daemon = daemon
        self.q = daemon.qmp()
        self.socket = os.path.join(daemon.directory, "nbd.sock")
        self.must("nbd-server-start", addr={"type": "unix", "data": {"path": self.socket}})
        self.must("blockdev-add", driver="raw", node_name="d", **more,
                       file={"driver": "file", "node-name": "f", "filename": str(path)})

    def do(self, command, arguments):
        self.q.send({"execute": command, "arguments": {k.replace("_", "-"): v for k, v in arguments.items()}})
        return self.q.answer()

    def must(self, command, /, **arguments):
        answer = self.do(command, arguments)
        assert "return" in answer, (command, arguments, answer)
        return answer["return"]

    def refused(self, command, /, **arguments):
        answer = self.do(command, arguments)
        assert "error" in answer, (command, arguments, answer)
        return answer["error"]

    def serve(self, how, writable=True):
        return how("block-export-add", type="nbd", id="e", node_name="d", writable=writable)

    def unserve(self):
        self.must("block-export-del", id="e", mode="hard")
        self.q.event("BLOCK_EXPORT_DELETED")

    def bitmap(self, how, name="b", verb="add", node="d"):
        return how(f"block-dirty-bitmap-{verb}", node=node, name=name)

    def write(self, offset, byte):
        h = nbd.NBD()
        h.connect_uri(f"nbd+unix:///d?socket={self.socket}")
        h.pwrite(byte * CLUSTER, offset)
        h.shutdown()

    def count(self):
        nodes = {n["node-name"]: n for n in self.must("query-named-block-nodes")}
        return nodes["d"]["dirty-bitmaps"][0]["count"]


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(4 * MIB))
    return path


@pytest.fixture
def pair(start, path):
    return Host(start(), path), Host(start(), path)


def test_without_bitmaps_daemons_share(pair):
    for host in pair:
        host.serve(host.must)
        host.write(0, b"x")


@pytest.mark.parametrize("in_use", [True, False])
def test_another_daemon_is_kept_out(pair, path, in_use):
    here, there = pair
    if in_use:
        here.serve(here.must)
    here.bitmap(here.must)
    error = there.serve(there.refused)
    assert KEPT_OUT.format(path) in error["desc"]
    there.serve(there.must, writable=False)  # who reads is welcome
    there.unserve()
    if in_use:
        here.write(MIB, b"y")
        assert here.count() == CLUSTER
    here.bitmap(here.must, verb="remove")
    there.serve(there.must)
    there.write(2 * MIB, b"z")


def test_the_last_bitmap_counts(pair, path):
    here, there = pair
    here.bitmap(here.must, "a")
    here.must("transaction", actions=[
        {"type": "block-dirty-bitmap-remove", "data": {"node": "d", "name": "a"}},
        {"type": "block-dirty-bitmap-add", "data": {"node": "d", "name": "b"}},
        {"type": "block-dirty-bitmap-add", "data": {"node": "d", "name": "c"}},
    ])
    here.bitmap(here.must, "b", "remove")
    assert KEPT_OUT.format(path) in there.serve(there.refused)["desc"]
    here.refused("transaction", actions=[
        {"type": "block-dirty-bitmap-remove", "data": {"node": "d", "name": "c"}}, {"type": "abort", "data": {}},
    ])
    assert KEPT_OUT.format(path) in there.serve(there.refused)["desc"]
    here.must("blockdev-del", node_name="d")
    there.serve(there.must)


def test_no_bitmap_while_another_daemon_writes(pair, path):
    here, there = pair
    there.serve(there.must)
    here.serve(here.must)
    error = here.bitmap(here.refused)
    assert IN_THE_WAY.format(path) in error["desc"] and "'d'" in error["desc"]
    for host, byte in ((here, b"1"), (there, b"2")):  # both go on as before
        host.write(0, byte)
    there.unserve()
    here.bitmap(here.must)
    assert KEPT_OUT.format(path) in there.serve(there.refused)["desc"]


def test_a_bitmap_of_the_file_itself(start, path):
    here, there = Host(start(), path), Host(start(), path)
    here.must("blockdev-del", node_name="d")
    here.must("blockdev-add", driver="file", node_name="d", filename=str(path))
    here.serve(here.must)
    here.bitmap(here.must)
    assert KEPT_OUT.format(path) in there.serve(there.refused)["desc"]
    here.write(0, b"x")
    assert here.count() == CLUSTER
    here.bitmap(here.must, verb="remove")
    there.serve(there.must)


def test_in_one_daemon_both_users_are_named(start, path):
    host = Host(start(), path)
    host.must("blockdev-add", driver="raw", node_name="other", file="f")
    host.bitmap(host.must)
    error = host.refused("block-export-add", type="nbd", id="o", node_name="other", writable=True)
    assert "node 'other' wants write access to node 'f', which node 'd' does not tolerate" in error["desc"]
    host.bitmap(host.must, verb="remove")
    host.must("block-export-add", type="nbd", id="o", node_name="other", writable=True)
    error = host.bitmap(host.refused)
    assert "node 'other' wants write access to node 'f', which node 'd' does not tolerate" in error["desc"]


def test_backups_go_on(start, path, tmp_path):
    """A job's filter comes and goes above the node, also one that has bitmaps of its own."""
    host = Host(start(), path)
    target = tmp_path / "target"
    target.write_bytes(bytes(4 * MIB))
    host.must("blockdev-add", driver="raw", node_name="t", file={"driver": "file", "filename": str(target)})
    host.serve(host.must)
    host.bitmap(host.must)
    host.write(0, b"a")
    host.write(3 * MIB, b"b")
    host.must("blockdev-backup", job_id="j", device="d", target="t", sync="incremental", bitmap="b",
                   filter_node_name="above", auto_finalize=False)
    host.write(0, b"c")
    host.bitmap(host.must, node="above")
    host.write(0, b"d")
    while [job["status"] for job in host.must("query-jobs")] != ["pending"]:
        host.q.event("JOB_STATUS_CHANGE")
    host.must("job-finalize", id="j")
    done = host.q.event("BLOCK_JOB_COMPLETED")
    assert "error" not in done["data"], done
    assert "above" not in [n["node-name"] for n in host.must("query-named-block-nodes")]
    assert host.count() == CLUSTER
    data = target.read_bytes()
    assert data[:CLUSTER] == b"a" * CLUSTER and data[3 * MIB:3 * MIB + CLUSTER] == b"b" * CLUSTER
    assert not any(data[CLUSTER:3 * MIB])


@pytest.mark.skipif(not shutil.which("qemu-io"), reason="qemu-io is not installed")
def test_qemu_io_is_kept_out(start, path):
    host = Host(start(), path)
    words = ["qemu-io", "-f", "raw", "-c", "write 0 64k", str(path)]
    assert subprocess.run(words, check=False, capture_output=True, timeout=30).returncode == 0
    host.bitmap(host.must)
    done = subprocess.run(words, check=False, capture_output=True, text=True, timeout=30)
    assert done.returncode and "lock" in done.stderr, done
    words = ["qemu-io", "-r", "-f", "raw", "-c", "read 0 64k", str(path)]
    assert subprocess.run(words, check=False, capture_output=True, timeout=30).returncode == 0
    host.bitmap(host.must, verb="remove")
    words = ["qemu-io", "-f", "raw", "-c", "write 0 64k", str(path)]
    assert subprocess.run(words, check=False, capture_output=True, timeout=30).returncode == 0


@pytest.mark.skipif(not shutil.which("qemu-img"), reason="qemu-img is not installed")
def test_nobody_writes_a_layer_below(start, path, tmp_path):
    overlay = tmp_path / "overlay.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(overlay), "4M"], check=True, timeout=30)
    host = Host(start(), path)
    host.must("blockdev-add", driver="qcow2", node_name="o", backing="d",
              file={"driver": "file", "filename": str(overlay)})
    host.serve(host.must)
    assert "node 'd', which node 'o' does not tolerate: it has dirty bitmaps" in host.bitmap(host.refused, node="o")["desc"]
    host.unserve()
    host.bitmap(host.must, node="o")
    assert "node 'd', which node 'o' does not tolerate: it has dirty bitmaps" in host.serve(host.refused)["desc"]
    host.bitmap(host.must, verb="remove", node="o")
    host.serve(host.must)
