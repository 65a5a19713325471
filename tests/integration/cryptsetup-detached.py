# SPDX-License-Identifier: Apache-2.0
"""Detached LUKS headers beside cryptsetup and QEMU. This QEMU has none yet: it is shown header and disk in one file."""
import os
import shutil
import struct

import pytest

import image_support
from conftest import wait_until
from image_support import run, tools  # noqa: F401 pylint: disable=unused-import

if not shutil.which("cryptsetup"):
    print("requires cryptsetup")
    pytest.skip("cryptsetup", allow_module_level=True)

image_support.need_peer()

MIB = 1 << 20
PAYLOAD = 104  # where the header says where the disk begins
SECRET = ["--object", "secret,id=s,data=abc"]
DISK = "driver=luks,key-secret=s,file.filename=data,header.filename=header"
DATA = os.urandom(4096) * 256


def write(path, data):
    with open(path, "wb") as f:
        f.write(data)


def read(path):
    with open(path, "rb") as f:
        return f.read()


def opens(tools, password="abc"):
    write(tools.path("password"), password.encode())
    return run("cryptsetup", "open", "--test-passphrase", "--header", "header", "data", "-d", "password",
               ok=(0, 2), cwd=tools.directory).returncode == 0


def joined(tools):
    """Header and disk as one volume, which any LUKS reads."""
    header, data = read(tools.path("header")), read(tools.path("data"))
    assert struct.unpack_from(">I", header, PAYLOAD) == (0,) and len(header) % 512 == 0
    write(tools.path("joined"), header[:PAYLOAD] + struct.pack(">I", len(header) // 512) + header[PAYLOAD + 4:] + data)
    tools.peer("convert", *SECRET, "--image-opts", "driver=luks,key-secret=s,file.filename=joined", "-O", "raw", "plain")
    return read(tools.path("plain"))


def by_cryptsetup(tools):
    write(tools.path("data"), bytes(MIB))
    write(tools.path("header"), bytes(2 * MIB))
    write(tools.path("password"), b"abc")
    run("cryptsetup", "-q", "luksFormat", "--type", "luks1", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "--header",
        "header", "data", "password", cwd=tools.directory)


def by_us(tools):
    write(tools.path("data"), bytes(MIB))
    tools.cairn("create", "-q", "-f", "luks", *SECRET, "-o", "key-secret=s,iter-time=10,detached-header=true", "header")


@pytest.mark.parametrize("make", [by_cryptsetup, by_us])
def test_what_is_written_is_read_elsewhere(tools, make):
    make(tools)
    assert opens(tools) and not opens(tools, "xyz")
    before = read(tools.path("header"))
    write(tools.path("raw"), DATA)
    tools.cairn("convert", "-n", *SECRET, "--target-image-opts", "-f", "raw", "raw", DISK)
    tools.cairn("convert", *SECRET, "--image-opts", DISK, "-O", "raw", "back")
    assert read(tools.path("back")) == DATA
    assert joined(tools) == DATA
    assert read(tools.path("header")) == before and DATA[:512] not in read(tools.path("data"))


def test_what_the_peer_writes_is_read(tools):
    image_support.peer_creates_encrypted(tools.path("whole"), "luks")
    write(tools.path("raw"), DATA)
    tools.peer("convert", "-n", *SECRET, "--target-image-opts", "-f", "raw", "raw", "driver=luks,key-secret=s,file.filename=whole")
    whole = read(tools.path("whole"))
    start = struct.unpack_from(">I", whole, PAYLOAD)[0] * 512
    write(tools.path("header"), whole[:PAYLOAD] + bytes(4) + whole[PAYLOAD + 4:start])
    write(tools.path("data"), whole[start:])
    tools.cairn("convert", *SECRET, "--image-opts", DISK, "-O", "raw", "back")
    assert read(tools.path("back")) == DATA


def test_a_header_that_says_where_the_disk_begins(tools):
    """It need not begin at the start of its file."""
    by_us(tools)
    header = read(tools.path("header"))
    write(tools.path("header"), header[:PAYLOAD] + struct.pack(">I", 8192) + header[PAYLOAD + 4:])
    write(tools.path("data"), bytes(5 * MIB))
    assert tools.cairn("io", *SECRET, "-c", "length", "-c", "write -P 5 0 1M", "--image-opts", DISK).stdout.startswith("1 MiB\n")
    assert read(tools.path("data"))[:4 * MIB] == bytes(4 * MIB)
    assert read(tools.path("data"))[4 * MIB:].count(0) < 8192


def wait_for_job(q, job):
    wait_until(lambda: q.command("query-jobs")[0]["status"] == "concluded", "the job")
    assert "error" not in q.command("query-jobs")[0]
    q.send({"execute": "job-dismiss", "arguments": {"id": job}})
    assert q.answer() == {"return": {}}


def test_key_slots_are_changed_in_the_header(tools, daemon):
    """By a job of the daemon, with the disk in use; the disk stays as it is."""
    by_us(tools)
    q = daemon.qmp()
    for name, password in (("s", "abc"), ("new", "xyz")):
        q.send({"execute": "object-add", "arguments": {"qom-type": "secret", "id": name, "data": password}})
        assert q.answer() == {"return": {}}
    q.command("blockdev-add", driver="file", node_name="h", filename=tools.path("header"))
    q.command("blockdev-add", driver="luks", node_name="d", key_secret="s", header="h",
              file={"driver": "file", "filename": tools.path("data")})
    before = read(tools.path("data"))
    q.command("x-blockdev-amend", job_id="j", node_name="d",
              options={"driver": "luks", "state": "active", "new-secret": "new", "iter-time": 10})
    wait_for_job(q, "j")
    assert "in use" in q.refused("blockdev-del", node_name="h")["desc"]
    q.command("blockdev-del", node_name="d")
    q.command("blockdev-del", node_name="h")
    assert opens(tools) and opens(tools, "xyz")
    assert read(tools.path("data")) == before


def test_what_is_wrong_is_told(tools, daemon):
    by_us(tools)
    create = ["create", "-q", "-f", "luks", *SECRET, "-o", "key-secret=s,iter-time=10,detached-header=on"]
    for words, text in (([*create, "new", "1M"], "no size is given"),
                        (["create", "-q", "-f", "qcow2", "-o", "encrypt.detached-header=on", "new", "1M"], "encrypt.detached-header"),
                        (["create", "-q", "-f", "raw", "-o", "detached-header=on", "new", "1M"], "detached-header"),
                        (["convert", *SECRET, "-O", "luks", *create[-2:], "data", "new"], "the header alone"),
                        (["measure", *SECRET, "-O", "luks", *create[-2:], "data"], "another file"),
                        (["map", *SECRET, "--image-opts", "driver=luks,key-secret=s,file.filename=header"], "`header`"),
                        (["map", *SECRET, "--image-opts", DISK.replace("header.filename=header", "header.filename=data")],
                         "does not begin with a LUKS header")):
        done = tools.cairn(*words, ok=(1,))
        assert text in done.stderr and len(done.stderr.splitlines()) == 1, (words, done.stderr)
    assert not os.path.exists(tools.path("new"))
    assert "detached-header=<bool" in tools.cairn("create", "-f", "luks", "-o", "help").stdout
    assert "detached-header" not in tools.cairn("create", "-f", "qcow2", "-o", "help").stdout
    q = daemon.qmp()
    q.command("object-add", qom_type="secret", id="s", data="abc")
    q.command("blockdev-add", driver="file", node_name="h", filename=tools.path("header"))
    error = q.refused("blockdev-add", driver="luks", node_name="d", key_secret="s", header="h", file="h")
    assert "`header` and `file` are the same node" in error["desc"]
