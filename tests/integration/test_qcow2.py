# SPDX-License-Identifier: Apache-2.0
"""qcow2 nodes in the daemon: what their images refer to, what is granted, what is refused, what queries show."""
import json
import os
import subprocess

import pytest

nbd = pytest.importorskip("nbd")

MIB = 1 << 20


def qemu_img(*args):
    subprocess.run(["qemu-img", *args], check=True, stdout=subprocess.DEVNULL)


class Host:
    def __init__(self, daemon):
        self.daemon = daemon
        self.q = daemon.qmp()
        self.must = self.q.command

    def refused(self, text, command, **arguments):
        desc = self.q.refused(command, **arguments)["desc"]
        assert text in desc, (command, arguments, desc)

    def path(self, name):
        return os.path.join(self.daemon.directory, name)

    def file(self, name):
        return {"driver": "file", "filename": self.path(name)}

    def create(self, name, *options, size="16M"):
        qemu_img("create", "-q", "-f", "qcow2", *options, self.path(name), *([size] if size else []))

    def add(self, name, image, **more):
        self.must("blockdev-add", driver="qcow2", node_name=name, file=self.file(image), **more)

    def not_added(self, text, image, **more):
        self.refused(text, "blockdev-add", driver="qcow2", node_name="x", file=self.file(image), **more)

    def nodes(self):
        return {n["node-name"]: n for n in self.must("query-named-block-nodes")}

    def read(self, node, offset, length):
        """Through an export of its own."""
        socket = self.path(f"{node}.sock")
        self.must("nbd-server-start", addr={"type": "unix", "data": {"path": socket}})
        self.must("block-export-add", type="nbd", id="e", node_name=node, writable=False)
        h = nbd.NBD()
        h.set_export_name(node)
        h.connect_unix(socket)
        data = bytes(h.pread(length, offset))
        h.shutdown()
        self.must("nbd-server-stop")
        return data


@pytest.fixture
def host(daemon):
    return Host(daemon)


def write(path, pattern, offset, length):
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", f"write -P {pattern} {offset} {length}", path], check=True,
                   stdout=subprocess.DEVNULL)


def chain(host):
    """base <- middle <- top, each with a MiB of its own."""
    host.create("base")
    write(host.path("base"), 1, 0, "1M")
    host.create("middle", "-b", "base", "-F", "qcow2", size=None)
    write(host.path("middle"), 2, "1M", "1M")
    host.create("top", "-b", "middle", "-F", "qcow2", size=None)
    write(host.path("top"), 3, "2M", "1M")


def test_backing_files_are_opened_as_the_images_say(host):
    chain(host)
    host.add("d", "top")
    assert host.read("d", 0, 4 * MIB) == b"".join(bytes([n]) * MIB for n in (1, 2, 3, 0))
    graph = host.must("query-graph")
    assert [e["name"] for e in graph["edges"]].count("backing") == 2
    below = [n for n in host.nodes().values() if n["drv"] == "qcow2" and n["node-name"] != "d"]
    assert len(below) == 2 and all(n["ro"] for n in below)
    assert host.nodes()["d"]["backing_file_depth"] == 2
    host.must("blockdev-del", node_name="d")
    assert host.nodes() == {}


def test_null_opens_none(host):
    chain(host)
    host.add("d", "top", backing=None)
    assert host.read("d", 0, 4 * MIB) == bytes(2 * MIB) + bytes([3]) * MIB + bytes(MIB)


def test_a_reference_without_format_is_not_guessed(host):
    chain(host)
    with open(host.path("top"), "r+b") as f:  # the header extension with the format gets an unknown type
        head = f.read(65536)
        f.seek(head.index(b"\xe2\x79\x2a\xca"))
        f.write(b"\x12\x34\x56\x78")
    host.not_added("without its format, which is never guessed: give `backing`", "top")
    host.add("d", "top", backing={"driver": "qcow2", "file": host.file("middle")}, read_only=True)
    assert host.read("d", 0, 1) == b"\1"


def test_what_was_not_granted_stays_shut(host, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    qemu_img("create", "-q", "-f", "qcow2", str(elsewhere / "base"), "16M")
    host.create("top", "-b", str(elsewhere / "base"), "-F", "qcow2", size=None)
    host.not_added(f"--allow {elsewhere}", "top")


def test_allow_grants_a_directory(start, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    qemu_img("create", "-q", "-f", "qcow2", str(elsewhere / "base"), "16M")
    write(str(elsewhere / "base"), 7, 0, "1M")
    host = Host(start("--allow", str(elsewhere)))
    host.create("top", "-b", str(elsewhere / "base"), "-F", "qcow2", size=None)
    host.add("d", "top")
    assert host.read("d", 0, 1) == b"\7"


def test_loops_are_refused(host):
    chain(host)
    qemu_img("rebase", "-u", "-b", "top", "-F", "qcow2", "-f", "qcow2", host.path("base"))
    host.not_added("is a layer above it already", "top")
    assert host.nodes() == {}


def test_bitmaps_belong_on_the_format(host):
    host.create("a")
    host.must("blockdev-add", node_name="f", **host.file("a"))
    host.must("block-dirty-bitmap-add", node="f", name="b")
    host.refused("has dirty bitmaps: remove them", "blockdev-add", driver="qcow2", node_name="d", file="f")
    host.must("block-dirty-bitmap-remove", node="f", name="b")
    host.must("blockdev-add", driver="qcow2", node_name="d", file="f")
    host.refused("put the bitmap on that one", "block-dirty-bitmap-add", node="f", name="b")
    host.must("block-dirty-bitmap-add", node="d", name="b")


def test_queries_show_the_image(host):
    host.create("a", "-o", "cluster_size=8k")
    host.add("d", "a")
    info = host.nodes()["d"]["image"]
    assert info["format"] == "qcow2" and info["cluster-size"] == 8192 and info["virtual-size"] == 16 * MIB
    peer = json.loads(subprocess.run(["qemu-img", "info", "-U", "--output=json", host.path("a")], check=True,
                                     capture_output=True).stdout)
    assert {k: peer[k] for k in ("format", "cluster-size", "virtual-size")} == \
        {k: info[k] for k in ("format", "cluster-size", "virtual-size")}


def test_options_that_mean_nothing_here_are_refused_by_name(host):
    host.create("a")
    for name, value in (("lazy-refcounts", True), ("cache-size", 1 << 20)):
        host.not_added(name, "a", **{name: value})
