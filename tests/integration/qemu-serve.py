# SPDX-License-Identifier: Apache-2.0
"""`cairn serve` of what QEMU and cryptsetup have made: encrypted images, and those of formats that are only read."""
import os
import shutil
import struct
import subprocess

import pytest

import image_support
from tool_support import (KIB, MIB, alive, content, nbd, program, pwrite, qemu_img, raw, serve,  # noqa: F401
                          stop, tool)

image_support.need_peer()


def secret(tool, name, text):
    with open(tool.path(name), "w", encoding="ascii") as f:
        f.write(text)
    return ["--object", f"secret,id={name},file={name}", "--key-secret", name]


def keys(tool):
    return secret(tool, "abc", "abc")


def encrypted(tool, name, fmt="luks", password="abc", *more):
    """Made by us: the peer takes seconds for it where the CPU is busy."""
    names = "key-secret=s,iter-time=10" if fmt == "luks" else "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"
    tool.must("create", "-q", "-u", "-f", fmt, "--object", f"secret,id=s,data={password}", "-o", names, *more, name, "1M")


def plain(tool, image, fmt):
    """The disk as the peer reads it, with the secret abc."""
    options = f"driver={fmt},{'' if fmt == 'luks' else 'encrypt.'}key-secret=s,file.filename={tool.path(image)}"
    qemu_img("convert", "--object", "secret,id=s,data=abc", "--image-opts", options, "-O", "raw", tool.path("plain"))
    return content(tool.path("plain"))


def through_nbd(uri):
    return subprocess.run(["nbdcopy", uri, "-"], capture_output=True, check=True).stdout


DATA = b"what is written " * 4096


@pytest.mark.parametrize("made", ["peer luks", "peer qcow2", "cryptsetup"])
def test_encrypted_disks_are_written_and_read(tool, serve, made):
    fmt = "qcow2" if made == "peer qcow2" else "luks"
    if made == "cryptsetup":
        if not shutil.which("cryptsetup"):
            pytest.skip("cryptsetup")
        image_support.cryptsetup_creates(tool.path("d"))
    else:
        image_support.peer_creates_encrypted(tool.path("d"), fmt)
    where = serve("d", "--socket", "d.nbd", *keys(tool))
    assert where["format"] == fmt
    pwrite(where["nbd"], DATA, 100 * KIB)
    assert through_nbd(where["nbd"])[100 * KIB:].startswith(DATA)
    nodes = {n["node-name"]: n for n in tool.json("qmp", where["control"], "query-named-block-nodes")}
    assert nodes["disk"]["encrypted"] is True
    assert stop(where["process"]) == 0
    assert DATA[:512] not in content(tool.path("d"))
    assert plain(tool, "d", fmt)[100 * KIB:].startswith(DATA)


def test_each_layer_has_its_key(tool, serve):
    """base (raw in LUKS) <- middle (not encrypted) <- top; the keys are given from the top down."""
    encrypted(tool, "base")
    top = secret(tool, "xyz", "xyz")
    qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", "base", "-F", "luks", tool.path("middle"), "1M")
    encrypted(tool, "top", "qcow2", "xyz", "-b", "middle", "-F", "qcow2")
    where = serve("base", "--socket", "b.nbd", *keys(tool))
    pwrite(where["nbd"], (b"below" * 1024).ljust(MIB, b"\0"), 0)
    assert stop(where["process"]) == 0
    where = serve("top", "--socket", "t.nbd", *top, *keys(tool))
    pwrite(where["nbd"], b"above" * 1024, 512 * KIB)
    assert through_nbd(where["nbd"]) == (b"below" * 1024).ljust(512 * KIB, b"\0") + (b"above" * 1024).ljust(512 * KIB, b"\0")
    assert stop(where["process"]) == 0
    tool.refused(1, "--key-secret xyz: 2 of the images are encrypted", "serve", "top", "--socket", "t.nbd", *top, *keys(tool),
                 *top[2:])


def test_one_key_may_be_for_all(tool, serve):
    encrypted(tool, "base")
    encrypted(tool, "top", "qcow2", "abc", "-b", "base", "-F", "luks")
    where = serve("top", "--socket", "t.nbd", "--read-only", *keys(tool))
    assert len(through_nbd(where["nbd"])) == MIB


def test_no_password_is_shown(tool, serve):
    encrypted(tool, "d")
    where = serve("d", "--socket", "d.nbd", "--object", '{"qom-type": "secret", "id": "abc", "file": "pw"}'.replace("pw", keys(tool)[3]),
                  "--key-secret", "abc")
    for pid in (where["pid"], where["process"].pid):
        words = content(f"/proc/{pid}/cmdline").split(b"\0")
        assert any(b"file" in w for w in words) and not any(b"data" in w for w in words)
    text = tool.refused(1, "give `file`", "serve", "d", "--object", "secret,id=k,data=pass-word", "--key-secret", "k")
    assert "pass-word" not in text


def test_what_is_wrong_with_keys(tool):
    encrypted(tool, "d")
    raw(tool.path("r"))
    there = ["serve", "d", "--socket", "d.nbd"]
    tool.refused(1, "give --object secret,id=ID,file=PATH and --key-secret ID", *there)
    tool.refused(1, "give --object secret,id=ID,file=PATH and --key-secret ID", *there, *keys(tool)[:2])
    tool.refused(1, "--key-secret abc: 0 of the images are encrypted", "serve", "r", "--socket", "d.nbd", "--format", "raw",
                 *keys(tool))
    tool.refused(1, "not supported", *there, "--object", "secret_keyring,id=k,serial=1")
    tool.refused(1, "--object", *there, "--object", "secret,id=k,frob=1")
    for words, text in ((secret(tool, "wrong", "wrong"), "password"), (["--key-secret", "nobody"], "nobody"),
                        (["--object", "secret,id=k,file=/no/such", "--key-secret", "k"], "/no/such")):
        ended = tool.run(*there, *words)
        said = ended.stderr.splitlines()
        assert ended.returncode == 1 and not ended.stdout
        assert len(said) == 2 and text in said[0] and "the daemon has ended" in said[1], said
    if shutil.which("cryptsetup"):
        image_support.cryptsetup_creates(tool.path("two"), kind="luks2")
        ended = tool.run("serve", "two", "--socket", "d.nbd", *keys(tool))
        assert ended.returncode == 1 and "LUKS version is 2" in ended.stderr.splitlines()[0]


def test_a_hostile_image_does_not_hold_the_end(tool):
    """P4: eight slots want as many iterations as a header may say, which takes many minutes."""
    encrypted(tool, "d")
    with open(tool.path("d"), "r+b") as f:
        in_use = f.read(1024)[208:212]
        for i in range(8):
            f.seek(208 + 48 * i)
            f.write(in_use + struct.pack(">I", 1 << 27))
    process = tool.start("serve", "d", "--socket", "d.nbd", *keys(tool))
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    assert stop(process) == 0
    assert not os.path.exists(tool.path("d.nbd"))


IMPORTED = [("vdi", ""), ("vhdx", ""), ("vmdk", ""), ("vmdk", "subformat=twoGbMaxExtentSparse"),
            ("vmdk", "subformat=monolithicFlat"), ("vmdk", "subformat=streamOptimized"), ("vpc", "force_size=on")]


@pytest.mark.parametrize("fmt, options", IMPORTED)
def test_imported_disks_are_read(tool, serve, fmt, options):
    raw(tool.path("raw"), 4 * MIB, DATA)
    qemu_img("convert", "-f", "raw", "-O", fmt, *(["-o", options] if options else []), tool.path("raw"), tool.path("d"))
    tool.refused(1, f"'{tool.path('d')}' is of format '{fmt}', which is never written: give --read-only", "serve", "d", "--socket", "d.nbd")
    where = serve("d", "--socket", "d.nbd", "--read-only")
    assert where["format"] == fmt and where["read-only"]
    assert through_nbd(where["nbd"]) == content(tool.path("raw"))
    h = nbd.NBD()
    h.connect_uri(where["nbd"])
    assert h.is_read_only()
    h.shutdown()


def test_a_layer_above_an_imported_disk_is_written(tool, serve):
    raw(tool.path("raw"), 4 * MIB, DATA)
    qemu_img("convert", "-f", "raw", "-O", "vmdk", tool.path("raw"), tool.path("base.vmdk"))
    before = content(tool.path("base.vmdk"))
    qemu_img("create", "-q", "-f", "qcow2", "-b", "base.vmdk", "-F", "vmdk", tool.path("top"))
    where = serve("top", "--socket", "d.nbd")
    pwrite(where["nbd"], b"new" * 512, MIB)
    assert through_nbd(where["nbd"]) == DATA.ljust(MIB, b"\0") + (b"new" * 512).ljust(3 * MIB, b"\0")
    assert stop(where["process"]) == 0
    assert content(tool.path("base.vmdk")) == before
    qemu_img("compare", tool.path("top"), tool.path("top"))
    assert qemu_img("check", "-f", "qcow2", tool.path("top"))


def test_formats_that_are_said(tool, serve):
    """A fixed VHD has no mark at its start."""
    qemu_img("create", "-q", "-f", "vpc", "-o", "subformat=fixed,force_size=on", tool.path("d"), "4M")
    assert serve("d", "--socket", "d.nbd", "--read-only")["format"] == "raw"
    assert serve("d", "--socket", "e.nbd", "--read-only", "--format", "vpc")["format"] == "vpc"
    tool.refused(2, "--format qed: it is raw, qcow2, luks, vdi, vhdx, vmdk or vpc", "serve", "d", "--format", "qed")


def test_data_files_lie_where_is_granted(tool, serve):
    os.mkdir(tool.path("data"))
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"data_file={tool.path('data/d')}", tool.path("top"), "1M")
    ended = tool.run("serve", "top", "--socket", "d.nbd")
    assert ended.returncode == 1 and "--allow" in ended.stderr
    where = serve("top", "--socket", "d.nbd", "--allow", "data")
    pwrite(where["nbd"], DATA, 0)
    assert stop(where["process"]) == 0 and not alive(where["pid"])
    assert DATA in content(tool.path("data/d"))
