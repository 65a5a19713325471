# SPDX-License-Identifier: Apache-2.0
"""External data files of qcow2 images: the tools beside the peer's, the daemon, and what may be opened (Q6). Contents with random
requests are compared in qemu-qcow2.py, where they are shapes among others."""
import json
import os
import shutil
import subprocess

import pytest
from image_support import need_peer, run, tools  # pylint: disable=unused-import
from nbd_support import Daemon, QmpError, wait_until

need_peer()

MIB = 1 << 20


def data_of(path):
    with open(path, "rb") as f:
        return f.read()


def make(tools, name="x.qcow2", options="data_file=x.data", size="4M"):
    tools.cairn("create", "-q", "-f", "qcow2", "-o", options, name, size)
    return name


def fill(tools, name="x.qcow2"):
    tools.io(name, "write -P 3 70k 4k", "write -P 7 0 4k", "write -z 128k 64k", "write -P 4 128k 64k", "discard 128k 64k",
             "write -P 5 192k 128k", "write -z -u 192k 64k", "write -P 9 1000k 300k")


def test_they_see_what_we_made(tools):
    make(tools)
    fill(tools)
    for command in (("info",), ("map",), ("map", "--output=json"), ("check",)):
        ours, peer = tools.ours(*command, "x.qcow2").stdout, tools.peer(*command, "x.qcow2").stdout
        assert ours == peer, command
    tools.same_json("info", "--output=json", "x.qcow2")
    tools.same_json("check", "--output=json", "x.qcow2")
    tools.cairn("convert", "-O", "raw", "x.qcow2", "ours.raw")
    tools.equal("x.qcow2", "ours.raw")


def test_convert_writes_it(tools):
    tools.chain()
    for options in ("data_file=c.data", "data_file=c.data,data_file_raw=on", "data_file=c.data,cluster_size=4k"):
        tools.cairn("convert", "-O", "qcow2", "-o", options, "top.qcow2", "c.qcow2")
        tools.equal("top.qcow2", "c.qcow2")
        tools.cairn("compare", "top.qcow2", "c.qcow2")
    assert "compress" not in tools.cairn("check", "c.qcow2").stderr
    assert tools.cairn("convert", "-c", "-O", "qcow2", "-o", "data_file=c.data", "top.qcow2", "c.qcow2", ok=(1,)).stderr


def test_raw_data_are_the_disk_at_all_times(tools):
    make(tools, options="data_file=x.data,data_file_raw=on,cluster_size=4k", size="1000k")
    assert os.path.getsize(tools.path("x.data")) == 1000 << 10

    def same():
        tools.cairn("convert", "-O", "raw", "x.qcow2", "flat")
        assert data_of(tools.path("flat")) == data_of(tools.path("x.data"))
        tools.peer("compare", "-f", "raw", "-F", "qcow2", "x.data", "x.qcow2")
        shown = json.loads(tools.peer("map", "--output=json", "x.qcow2").stdout)
        assert all(e["present"] for e in shown)
        tools.peer("check", "-q", "x.qcow2")

    fill_words = ["write -P 3 70k 4k", "write -P 9 100k 300k", "write -z 128k 64k", "discard 200k 64k"]
    tools.io("x.qcow2", *fill_words)
    same()
    with open(tools.path("x.data"), "r+b") as f:  # who has the raw disk writes to it as to one
        f.seek(500 << 10)
        f.write(b"raw" * 1000)
    same()
    for size in ("1500k", "3M", "900k", "2M"):
        tools.cairn("resize", "--shrink", "x.qcow2", size)
        same()
    assert "data file raw: true" in tools.peer("info", "x.qcow2").stdout


def test_the_data_file_has_the_size_of_the_disk(tools):
    make(tools)
    fill(tools)
    before = data_of(tools.path("x.data"))
    tools.cairn("resize", "x.qcow2", "6M")
    assert data_of(tools.path("x.data")) == before + bytes(2 * MIB)
    tools.cairn("resize", "--shrink", "x.qcow2", "1M")
    assert data_of(tools.path("x.data")) == before[:MIB]
    os.truncate(tools.path("x.data"), 100 << 10)  # whoever reads finds zeroes, whoever writes a file that is as long as the disk
    tools.cairn("convert", "-O", "raw", "x.qcow2", "flat")
    assert os.path.getsize(tools.path("x.data")) == 100 << 10
    tools.cairn("resize", "x.qcow2", str(MIB + 512))
    assert os.path.getsize(tools.path("x.data")) == MIB + 512


@pytest.mark.parametrize("mode", ["metadata", "falloc", "full"])
@pytest.mark.parametrize("options", ["cluster_size=64k", "cluster_size=4k,data_file=x.data"])
def test_resize_preallocates(tools, options, mode):
    make(tools, options=options, size="1M")
    tools.io("x.qcow2", "write -P 3 0 1M")
    before = sum(tools.disk_bytes(n) for n in ("x.qcow2", "x.data") if os.path.exists(tools.path(n)))
    tools.cairn("resize", f"--preallocation={mode}", "x.qcow2", "5M")
    tools.peer("check", "-q", "x.qcow2")
    shown = json.loads(tools.peer("map", "--output=json", "x.qcow2").stdout)
    assert sum(e["length"] for e in shown if e["present"] and e["data"]) == 5 * MIB
    after = sum(tools.disk_bytes(n) for n in ("x.qcow2", "x.data") if os.path.exists(tools.path(n)))
    assert (after - before >= 4 * MIB) == (mode != "metadata")
    assert data_of_disk(tools) == b"\3" * MIB + bytes(4 * MIB)


def data_of_disk(tools, name="x.qcow2"):
    tools.peer("convert", "-O", "raw", name, "disk.raw")
    return data_of(tools.path("disk.raw"))


def test_what_cannot_be_is_refused(tools):
    for options, text in (("data_file_raw=on", "requires data_file"), ("data_file=x.data,compat=0.10", "version 3"),
                          ("data_file=x.qcow2", "own data file"), ("data_file=", "empty"),
                          ("data_file=x.data,data_file_raw=on,backing_file=b,backing_fmt=raw", "raw data file")):
        said = tools.cairn("create", "-q", "-u", "-f", "qcow2", "-o", options, "x.qcow2", "1M", ok=(1,)).stderr
        assert text in said, (options, said)
        assert not os.path.exists(tools.path("x.qcow2"))
    make(tools, options="data_file=x.data,data_file_raw=on")
    assert "snapshots" in tools.cairn("snapshot", "-c", "one", "x.qcow2", ok=(1,)).stderr
    tools.cairn("create", "-q", "-f", "qcow2", "base.qcow2", "4M")
    assert "raw data file" in tools.cairn("rebase", "-u", "-F", "qcow2", "-b", "base.qcow2", "x.qcow2", ok=(1,)).stderr


def test_rebase_over_a_backing_file(tools):
    tools.chain()
    make(tools, "d.qcow2", "data_file=d.data,backing_file=top.qcow2,backing_fmt=qcow2", "100M")
    tools.io("d.qcow2", "write -P 8 5000k 300k", "discard 1M 64k", "write -z 64k 64k")
    tools.cairn("convert", "-O", "raw", "d.qcow2", "before.raw")
    tools.equal("d.qcow2", "before.raw")
    tools.cairn("rebase", "-F", "qcow2", "-b", "base.qcow2", "d.qcow2")
    tools.equal("d.qcow2", "before.raw")


def test_only_what_is_granted_is_opened(tools, tmp_path):
    """Q6: a regular file in the image's directory or a granted one."""
    secret = tmp_path / "elsewhere" / "secret"
    secret.parent.mkdir()
    secret.write_bytes(b"secret" * 100000)
    images = tmp_path / "images"
    images.mkdir()
    os.mkfifo(images / "fifo")
    (images / "link").symlink_to(secret)
    for name, text in ((str(secret), "--allow"), ("../elsewhere/secret", "--allow"), ("link", "--allow"),
                       ("fifo", "regular"), ("json:{\"driver\":\"file\"}", "json"), ("nbd:unix:/x", "nbd"),
                       ("x.qcow2", "itself"), ("nothing", "No such")):
        image = images / "x.qcow2"
        named = images / "made-with.raw"
        run("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={named}", str(image), "1M")
        rename_data_file(image, str(named), name)
        said = tools.cairn("convert", "-O", "raw", image, "out", ok=(1,)).stderr
        assert text in said and "\n" not in said.strip(), (name, said)
        assert not os.path.exists(tools.path("out"))
        assert tools.cairn("info", image).returncode == 0  # opens nothing but the image
        with Daemon() as daemon:
            with pytest.raises(QmpError) as error:
                daemon.qmp("blockdev-add", driver="qcow2", node_name="n", file={"driver": "file", "filename": str(image)})
            assert text in str(error.value), (name, error.value)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={named}", str(image), "1M")
    rename_data_file(image, str(named), "../elsewhere/secret")
    tools.cairn("convert", "-O", "raw", "--allow", secret.parent, image, "out")
    assert secret.read_bytes() == b"secret" * 100000


def rename_data_file(image, old, new):
    """In the header, byte by byte: in place of what stands there."""
    data = bytearray(image.read_bytes())
    at = data.index(b"DATA")
    length = int.from_bytes(data[at + 4:at + 8], "big")
    assert data[at + 8:at + 8 + length] == old.encode()
    room = (length + 7) // 8 * 8
    new = new.encode()
    assert len(new) <= room
    data[at + 4:at + 8] = len(new).to_bytes(4, "big")
    if (len(new) + 7) // 8 * 8 < room:  # an extension that nobody knows takes the rest
        rest = room - (len(new) + 7) // 8 * 8 - 8
        filler = b"FILL" + rest.to_bytes(4, "big") + bytes(rest)
    else:
        filler = b""
    padded = new + bytes(-len(new) % 8)
    data[at + 8:at + 8 + room] = padded + filler
    image.write_bytes(data)


def test_the_daemon_takes_it_as_a_child(tmp_path):
    image, data, other = tmp_path / "x.qcow2", tmp_path / "x.data", tmp_path / "moved"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={data}", str(image), "4M")
    run("qemu-io", "-f", "qcow2", "-c", "write -P 3 70k 4k", str(image))
    plain = tmp_path / "plain.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", str(plain), "4M")
    shutil.move(data, other)
    with Daemon() as daemon:
        def add(**options):
            daemon.qmp("blockdev-add", driver="qcow2", node_name="n", **options)
        file = {"driver": "file", "filename": str(image)}
        moved = {"driver": "file", "filename": str(other)}
        with pytest.raises(QmpError, match="has none"):
            add(file={"driver": "file", "filename": str(plain)}, data_file=moved)
        daemon.qmp("blockdev-add", node_name="d", **moved)
        add(file=file, data_file="d")
        with pytest.raises(QmpError, match="in use"):
            daemon.qmp("blockdev-del", node_name="d")
        said = subprocess.run(["qemu-io", "-f", "raw", "-c", "write 0 4k", str(other)], capture_output=True, check=False)
        assert said.returncode == 1 and b"lock" in said.stderr + said.stdout
        daemon.export("n", writable=True)
        run("qemu-io", "-f", "raw", "-c", "read -P 3 70k 4k", "-c", "write -P 8 3M 64k", "-c", "flush", daemon.uri("n"))
        wait_until(lambda: not daemon.clients("n"))
        daemon.qmp("block-export-del", id="e-n")
    shutil.move(other, data)
    run("qemu-io", "-f", "qcow2", "-c", "read -P 8 3M 64k", "-c", "read -P 3 70k 4k", str(image))
    run("qemu-img", "check", "-q", str(image))


def test_a_cluster_lies_where_it_belongs(tools):
    """P6: an entry that points elsewhere into the data file shows nothing, and is not written through."""
    make(tools)
    tools.io("x.qcow2", "write -P 3 0 64k", "write -P 5 64k 64k")
    path = tools.path("x.qcow2")
    image = bytearray(data_of(path))
    l1 = int.from_bytes(image[40:48], "big")
    l2 = int.from_bytes(image[l1:l1 + 8], "big") & ~(1 << 63)
    image[l2 + 8:l2 + 16] = (1 << 63 | 1 << 20).to_bytes(8, "big")
    with open(path, "wb") as f:
        f.write(image)
    said = tools.cairn("convert", "-O", "raw", "x.qcow2", "flat", ok=(1,)).stderr
    assert "guest cluster 1" in said, said
