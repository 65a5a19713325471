# SPDX-License-Identifier: Apache-2.0
"""detect-zeroes beside the peer: what its writes leave in images of each kind, and how the daemon shows it."""
import json
import os
import shutil
import subprocess

import pytest

import image_support
from conftest import wait_until
from image_support import PATIENCE, run

for tool in ("qemu-nbd", "qemu-img", "qemu-io", "qemu-storage-daemon"):
    if not shutil.which(tool):
        print(f"requires {tool}")
        pytest.skip(tool, allow_module_level=True)

image_support.need_peer()

KIB = 1 << 10
MIB = 1 << 20

IMAGES = {
    "raw": "qemu-img create -q -f raw IMAGE 4M",
    "qcow2": "qemu-img create -q -f qcow2 IMAGE 4M",
    "old qcow2": "qemu-img create -q -f qcow2 -o compat=0.10 IMAGE 4M",
    "layer": "qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 IMAGE",
    "subclusters": "qemu-img create -q -f qcow2 -o extended_l2=on IMAGE 4M",
}
MODES = {
    "off": [],
    "on": ["--detect-zeroes=on"],
    "on, unmap": ["--detect-zeroes=on", "--discard=unmap"],
    "unmap": ["--discard=unmap", "--detect-zeroes=unmap"],
}
# Offset, length, and where a byte is not zero.
WRITES = [(0, 64 * KIB, None), (128 * KIB, 256 * KIB, None), (512 * KIB, 64 * KIB, 65535), (MIB, 4 * KIB, None),
          (MIB + 64 * KIB, 100 * KIB, None), (2 * MIB + 32 * KIB, 64 * KIB, None), (3 * MIB, 64 * KIB, 0),
          (3 * MIB + 512, 1024, None)]


def writes(length, dirty):
    data = bytearray(length)
    if dirty is not None:
        data[dirty] = 7
    return data


@pytest.fixture(name="tools")
def tools_fixture(tmp_path):
    ours = tmp_path / "bin" / "qemu-io"
    ours.parent.mkdir()
    ours.symlink_to(image_support.program())
    (tmp_path / "bin" / "qemu-nbd").symlink_to(image_support.program())
    return {"ours": str(tmp_path / "bin"), "peer": os.path.dirname(shutil.which("qemu-nbd"))}


def served(server, directory, image, fmt, words):
    """Serves an image, sends the writes, and waits until the server has gone."""
    nbd = pytest.importorskip("nbd")
    path = os.path.join(directory, "s")
    with subprocess.Popen([server, "-k", path, "-f", fmt, *words, image], cwd=directory) as process:
        wait_until(lambda: os.path.exists(path) or process.poll() is not None, "the server")
        h = nbd.NBD()
        h.connect_uri(f"nbd+unix://?socket={path}")
        for offset, length, dirty in WRITES:
            h.pwrite(writes(length, dirty), offset)
        h.flush()
        h.shutdown()
        assert process.wait(PATIENCE) == 0


def left(directory, image, fmt):
    """What reads give, and what a map says of it."""
    path = os.path.join(directory, image)
    run("qemu-img", "convert", "-f", fmt, "-O", "raw", path, path + ".raw")
    if fmt == "qcow2":
        run("qemu-img", "check", "-q", "-f", fmt, path)
    found = []
    for e in json.loads(run("qemu-img", "map", "--output=json", "-f", fmt, path).stdout):
        what = (e["data"], e["zero"])
        if found and found[-1][1] == what:
            found[-1][0] += e["length"]
        else:
            found.append([e["length"], what])
    with open(path + ".raw", "rb") as f:
        return f.read(), found


def make(directory, kind):
    fmt = "raw" if kind == "raw" else "qcow2"
    if kind == "layer":
        run("qemu-img", "create", "-q", "-f", "qcow2", "base.qcow2", "4M", cwd=directory)
        run("qemu-io", "-f", "qcow2", "-c", "write -P 9 0 3M", "base.qcow2", cwd=directory)
    run(*[w.replace("IMAGE", "image") for w in IMAGES[kind].split()], cwd=directory)
    if kind != "layer":
        run("qemu-io", "-f", fmt, "-c", "write -P 5 0 3M", "image", cwd=directory)
    return fmt


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", IMAGES)
def test_images_become_what_the_peer_makes_of_them(tmp_path, tools, kind, mode):
    found = {}
    for who, where in tools.items():
        directory = tmp_path / who
        directory.mkdir()
        fmt = make(directory, kind)
        served(os.path.join(where, "qemu-nbd"), directory, "image", fmt, MODES[mode])
        found[who] = left(directory, "image", fmt)
    flat = bytearray((b"\5" if kind != "layer" else b"\11") * (3 * MIB) + bytes(MIB))
    for offset, length, dirty in WRITES:
        flat[offset:offset + length] = writes(length, dirty)
    for data, _ in found.values():
        assert data == flat
    if kind == "old qcow2" and mode.startswith("on"):
        mode = "off"  # it has no word for zeroes but to give the space back, which nobody has allowed
    else:
        assert found["ours"][1] == found["peer"][1]
    assert (found["ours"][1][0][0] >= 3 * MIB) == (mode == "off")  # all data


@pytest.mark.parametrize("words", [["-s"], ["-s", "-o", "64k"], ["-o", "64k"]], ids=" ".join)
def test_the_node_that_holds_what_is_written_detects(tmp_path, tools, words):
    """Also an overlay, or below a window."""
    nbd = pytest.importorskip("nbd")
    make(tmp_path, "qcow2")
    path = str(tmp_path / "s")
    with subprocess.Popen([os.path.join(tools["ours"], "qemu-nbd"), "-k", path, "-f", "qcow2", "--detect-zeroes=on", *words,
                           "image"], cwd=tmp_path) as process:
        wait_until(lambda: os.path.exists(path) or process.poll() is not None, "the server")
        h = nbd.NBD()
        h.add_meta_context("base:allocation")
        h.connect_uri(f"nbd+unix://?socket={path}")
        h.pwrite(bytes(128 * KIB), 512 * KIB)
        status = []
        h.block_status(128 * KIB, 512 * KIB, lambda name, offset, entries, error: status.extend(entries) or 0)
        assert h.pread(128 * KIB, 512 * KIB) == bytes(128 * KIB)
        h.shutdown()
        assert process.wait(PATIENCE) == 0
    assert status[0] >= 128 * KIB and status[1] & nbd.STATE_ZERO


def test_a_node_shows_it_and_bitmaps_see_it(daemon):
    """By the control protocol; an inline child does not inherit it."""
    q = daemon.qmp()
    path = os.path.join(daemon.directory, "d.qcow2")
    run("qemu-img", "create", "-q", "-f", "qcow2", path, "4M")
    q.command("blockdev-add", driver="qcow2", node_name="d", discard="unmap", detect_zeroes="unmap",
              file={"driver": "file", "filename": path, "node-name": "f"})
    q.command("blockdev-add", driver="null-co", node_name="on", detect_zeroes="on")
    shown = {n["node-name"]: n["detect_zeroes"] for n in q.command("query-named-block-nodes")}
    assert shown == {"d": "unmap", "f": "off", "on": "on"}
    q.send({"execute": "block-dirty-bitmap-add", "arguments": {"node": "d", "name": "b", "granularity": 65536}})
    assert q.answer() == {"return": {}}
    socket = os.path.join(daemon.directory, "nbd.sock")
    q.command("nbd-server-start", addr={"type": "unix", "data": {"path": socket}})
    q.command("block-export-add", type="nbd", id="e", node_name="d", writable=True)
    uri = f"nbd+unix:///d?socket={socket}"
    run("qemu-io", "-f", "raw", "-c", "write -P 1 0 256k", "-c", "write -P 0 64k 128k", "-c", "read -P 0 64k 128k", uri)
    status = json.loads(run("nbdinfo", "--map", "--json", uri).stdout)
    assert [(e["offset"], e["length"], e["type"] & 2) for e in status[:3]] == \
        [(0, 65536, 0), (65536, 131072, 2), (196608, 65536, 0)]
    bitmap = next(n for n in q.command("query-named-block-nodes") if n["node-name"] == "d")["dirty-bitmaps"][0]
    assert bitmap["count"] == 256 * KIB


def test_the_peer_refuses_what_we_refuse(daemon):
    """unmap without discard, on the command line of the peer's daemon and over our control protocol."""
    done = subprocess.run(["qemu-storage-daemon", "--blockdev", "driver=null-co,node-name=n,detect-zeroes=unmap"],
                          stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
                          timeout=PATIENCE)
    assert done.returncode == 1 and "discard" in done.stderr
    q = daemon.qmp()
    error = q.refused("blockdev-add", driver="null-co", node_name="n", detect_zeroes="unmap")
    assert error["class"] == "GenericError" and "discard" in error["desc"]
    assert not q.command("query-named-block-nodes")
