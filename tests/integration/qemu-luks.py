# SPDX-License-Identifier: Apache-2.0
"""LUKS volumes in the daemon beside QEMU and cryptsetup: each opens and writes what the others made. And secrets."""
import base64
import os
import subprocess
import time

import pytest

from image_support import cryptsetup_creates, need_peer, peer_creates_encrypted, program, run

nbd = pytest.importorskip("nbd")
need_peer()

MIB = 1 << 20
KINDS = [("aes-xts-plain64", 512, "sha256"), ("aes-xts-plain64", 256, "sha1"), ("aes-cbc-essiv:sha256", 256, "sha384"),
         ("aes-cbc-plain", 128, "sha512"), ("aes-xts-plain", 512, "ripemd160"), ("aes-xts-essiv:sha256", 256, "sha256")]


class Host:
    def __init__(self, daemon):
        self.directory = daemon.directory
        self.daemon = daemon
        self.q = daemon.qmp()
        self.must = self.q.command
        self.must("nbd-server-start", addr={"type": "unix", "data": {"path": self.path("nbd.sock")}})

    def path(self, name):
        return os.path.join(self.directory, name)

    def refused(self, text, command, **arguments):
        desc = self.q.refused(command, **arguments)["desc"]
        assert text in desc, (command, arguments, desc)
        return desc

    def volume(self, name, **more):
        return dict({"driver": "luks", "node_name": "d", "key_secret": "s",
                     "file": {"driver": "file", "filename": self.path(name)}}, **more)

    def connect(self):
        self.must("block-export-add", type="nbd", id="e", node_name="d", writable=True)
        h = nbd.NBD()
        h.set_export_name("d")
        h.connect_unix(self.path("nbd.sock"))
        return h

    def remove(self, h):
        h.shutdown()
        self.must("block-export-del", id="e", mode="hard")
        self.q.event("BLOCK_EXPORT_DELETED")
        self.must("blockdev-del", node_name="d")

    def io(self, name, *commands):
        words = [w for c in commands for w in ("-c", c)]
        done = run("qemu-io", "--object", "secret,id=s,data=abc", "--image-opts", *words,
                   f"driver=luks,key-secret=s,file.filename={self.path(name)}")
        assert "failed" not in done.stdout and "mismatch" not in done.stdout, done.stdout


@pytest.fixture
def host(daemon):
    return Host(daemon)


def read_and_write(host):
    """Both of a disk of 16 MiB, in turn."""
    host.io("a.luks", "write -P 1 0 1M", "write -P 2 5000k 1k", "write -P 3 15M 1M")
    host.must("object-add", qom_type="secret", id="s", data="abc")
    host.must("blockdev-add", **host.volume("a.luks"))
    h = host.connect()
    assert h.get_size() >= 16 * MIB
    assert h.pread(MIB, 0) == b"\1" * MIB
    assert h.pread(3, 5000 * 1024 + 511) == b"\2\2\2"
    assert h.pread(MIB, 15 * MIB) == b"\3" * MIB
    h.pwrite(b"\4" * 1000, 4 * MIB + 1)  # within sectors
    h.pwrite(b"\5" * 3 * MIB, 7 * MIB)
    h.zero(64 * 1024, 0)
    h.flush()
    host.remove(h)
    host.io("a.luks", "read -P 4 4194305 1000", "read -P 5 7M 3M", "read -P 0 0 64k", "read -P 1 64k 960k", "read -P 3 15M 1M")


def test_what_qemu_made_is_read_and_written(host):
    peer_creates_encrypted(host.path("a.luks"), "luks", "cipher-alg=aes-192,hash-alg=sha224", "16M")  # cryptsetup has no such XTS
    read_and_write(host)


@pytest.mark.parametrize("cipher, bits, digest", KINDS)
def test_what_cryptsetup_made_is_read_and_written(host, cipher, bits, digest):
    key = cryptsetup_creates(host.path("a.luks"), cipher, bits, digest, 16 * MIB)
    read_and_write(host)
    run("cryptsetup", "open", "--test-passphrase", "--key-file", key, host.path("a.luks"))


def test_data_never_lies_there_as_it_is(host):
    cryptsetup_creates(host.path("a.luks"), size=4 * MIB)
    host.must("object-add", qom_type="secret", id="s", data="abc")
    host.must("blockdev-add", **host.volume("a.luks"))
    h = host.connect()
    h.pwrite(b"plain as day " * 5000, 12345)
    h.zero(MIB, 2 * MIB)
    host.remove(h)
    with open(host.path("a.luks"), "rb") as f:
        found = f.read()
    assert b"plain as day" not in found
    assert bytes(4096) not in found[-2 * MIB:-MIB]


def test_a_volume_is_resized(host):
    cryptsetup_creates(host.path("a.luks"), size=4 * MIB)
    host.must("object-add", qom_type="secret", id="s", data="abc")
    host.must("blockdev-add", **host.volume("a.luks"))
    before = os.path.getsize(host.path("a.luks"))
    host.must("block_resize", node_name="d", size=6 * MIB)
    assert os.path.getsize(host.path("a.luks")) == before + 2 * MIB
    h = host.connect()
    h.pwrite(b"\1" * 512, 6 * MIB - 512)
    host.remove(h)
    host.io("a.luks", "read -P 1 6290944 512")


def test_what_does_not_open_is_named(host):
    cryptsetup_creates(host.path("a.luks"))
    host.must("object-add", qom_type="secret", id="wrong", data="sesame")
    volume = host.volume("a.luks")
    host.refused("there is no secret 's'", "blockdev-add", **volume)
    told = host.refused("node 'd': the password opens no key slot", "blockdev-add", **dict(volume, key_secret="wrong"))
    assert "sesame" not in told
    del volume["key_secret"]
    host.refused("'key-secret' is needed", "blockdev-add", **volume)
    host.refused("there is no node 'x'", "blockdev-add", header="x", **volume)
    cryptsetup_creates(host.path("b.luks"), kind="luks2")
    host.must("object-add", qom_type="secret", id="s", data="abc")
    host.refused("LUKS version is 2, this program reads 1", "blockdev-add", **host.volume("b.luks"))
    cryptsetup_creates(host.path("c.luks"))
    with open(host.path("c.luks"), "r+b") as f:
        f.seek(8)
        f.write(b"serpent")
    host.refused("cipher 'serpent-256' is not supported", "blockdev-add", **host.volume("c.luks"))
    assert "sesame" not in host.daemon.stderr()


def test_secrets_are_made_and_deleted(host):
    cryptsetup_creates(host.path("a.luks"))
    master, iv = os.urandom(32), os.urandom(16)
    sealed = subprocess.run(["openssl", "enc", "-aes-256-cbc", "-a", "-K", master.hex(), "-iv", iv.hex()], input=b"abc", capture_output=True,
                            check=True).stdout
    host.must("object-add", qom_type="secret", id="m", data=base64.b64encode(master).decode(), format="base64")
    host.must("object-add", qom_type="secret", id="s", data=sealed.decode(), format="base64", keyid="m", iv=base64.b64encode(iv).decode())
    host.refused("there is an object 's' already", "object-add", qom_type="secret", id="s", data="x")
    host.refused("'iothread'", "object-add", qom_type="iothread", id="t")
    host.must("blockdev-add", **host.volume("a.luks"))
    host.must("object-del", id="m")
    host.must("object-del", id="s")  # in use: the node has its key
    host.refused("there is no object 's'", "object-del", id="s")
    h = host.connect()
    h.pwrite(b"\1" * 512, 0)
    assert h.pread(512, 0) == b"\1" * 512
    host.remove(h)
    host.refused("there is no secret 's'", "blockdev-add", **host.volume("a.luks"))


def test_secrets_on_the_command_line(start, tmp_path):
    cryptsetup_creates(tmp_path / "a.luks")
    (tmp_path / "key").write_text("abc", encoding="ascii")
    daemon = start("--object", f"secret,id=s,file={tmp_path}/key",
                   "--blockdev", f"luks,node-name=d,key-secret=s,file.driver=file,file.filename={tmp_path}/a.luks")
    assert daemon.qmp().command("query-named-block-nodes")[1]["node-name"] == "d"


def concluded(host, job):
    """The error of the job, or None."""
    while True:
        [info] = [j for j in host.must("query-jobs") if j["id"] == job]
        if info["status"] == "concluded":
            break
        time.sleep(0.02)
    assert info["type"] == "amend"
    host.must("job-dismiss", id=job)
    return info.get("error")


def amend(host, options, force=False, driver="luks"):
    host.must("x-blockdev-amend", job_id="a", node_name="d", options=dict({"driver": driver}, **options), force=force)
    return concluded(host, "a")


@pytest.mark.parametrize("driver", ["luks", "qcow2"])
def test_key_slots_are_changed_in_use(host, driver):
    for key, text in (("s", "abc"), ("t", "def")):
        host.must("object-add", qom_type="secret", id=key, data=text)
    if driver == "luks":
        cryptsetup_creates(host.path("a.luks"), size=4 * MIB)
        host.must("blockdev-add", **host.volume("a.luks"))
    else:
        run(program(), "create", "-q", "-f", "qcow2", "--object", "secret,id=s,data=abc", "-o",
            "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10", host.path("a.enc"), "4M")
        host.must("blockdev-add", driver="qcow2", node_name="d", encrypt={"format": "luks", "key-secret": "s"},
                  file={"driver": "file", "filename": host.path("a.enc")})

    def change(force=False, **options):
        options = {k.replace("_", "-"): v for k, v in options.items()}
        return amend(host, options if driver == "luks" else {"encrypt": options}, force, driver)

    [node] = [n for n in host.must("query-named-block-nodes") if n["node-name"] == "d"]
    assert node["encrypted"] is True
    h = host.connect()
    h.pwrite(b"\1" * 4096, 0)
    assert change(state="active", new_secret="t", iter_time=10, keyslot=6) is None
    assert "slot 6 is in use" in change(state="active", new_secret="s", keyslot=6)
    assert "opens no key slot" in change(state="inactive", old_secret="t", keyslot=0)
    assert change(state="inactive", keyslot=0) is None
    assert "no key slot would be left" in change(state="inactive", old_secret="t")
    assert h.pread(4096, 0) == b"\1" * 4096  # by the key that the node has
    host.remove(h)
    options = f"driver=luks,file.filename={host.path('a.luks')}," if driver == "luks" else f"driver=qcow2,file.filename={host.path('a.enc')},encrypt."
    for key, status in (("s", 1), ("t", 0)):
        run("qemu-io", "--object", "secret,id=s,data=abc", "--object", "secret,id=t,data=def", "--image-opts", "-c", "read -P 1 0 4k",
            f"{options}key-secret={key}", ok=(status,))


def test_what_cannot_be_amended_is_named(host):
    host.must("blockdev-add", driver="null-co", node_name="d")
    host.must("object-add", qom_type="secret", id="s", data="abc")
    options = {"driver": "luks", "state": "active", "new-secret": "s"}
    host.refused("node 'd' is of driver 'null-co', not 'luks'", "x-blockdev-amend", job_id="a", node_name="d", options=options)
    host.refused("there is no node 'e'", "x-blockdev-amend", job_id="a", node_name="e", options=options)
    host.refused("there is no secret 'u'", "x-blockdev-amend", job_id="a", node_name="d", options=dict(options, **{"new-secret": "u"}))
    host.refused("keyslot", "x-blockdev-amend", job_id="a", node_name="d", options=dict(options, keyslot=8))
    host.refused("nothing to amend", "x-blockdev-amend", job_id="a", node_name="d", options={"driver": "qcow2"})
    assert host.must("query-jobs") == []
