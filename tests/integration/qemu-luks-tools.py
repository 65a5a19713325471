# SPDX-License-Identifier: Apache-2.0
"""The image tools with encrypted images beside the peer: LUKS volumes and encrypted qcow2."""
import json
import os

import pytest

from image_support import cryptsetup_creates, need_peer, peer_creates_encrypted, run, tools  # noqa: F401

need_peer()

SECRETS = ["--object", "secret,id=s,data=abc", "--object", "secret,id=t,data=def"]
QUICK = "iter-time=10"
LUKS_KINDS = ["", "cipher-alg=aes-128,hash-alg=sha512", "cipher-mode=cbc,ivgen-alg=essiv,ivgen-hash-alg=sha256", "cipher-alg=aes-192,ivgen-alg=plain"]
QCOW2_KINDS = ["", "cluster_size=512", "cluster_size=2M", "compat=0.10,cluster_size=4k", "preallocation=metadata", "extended_l2=on", "extended_l2=on,preallocation=metadata", "lazy_refcounts=on,refcount_bits=64"]


def joined(*options):
    return ",".join(o for o in options if o)


def luks(name, key="s"):
    return f"driver=luks,key-secret={key},file.filename={name}"


def qcow2(name, key="s", below=""):
    return joined(f"driver=qcow2,encrypt.format=luks,encrypt.key-secret={key},file.filename={name}", below)


def opts_of(name, key="s"):
    return luks(name, key) if name.endswith(".luks") else qcow2(name, key) if name.endswith(".enc") else f"driver={name.split('.')[-1]},file.filename={name}"


def peer_io(t, opts, *commands):
    words = [w for c in commands for w in ("-c", c)]
    done = run("qemu-io", *SECRETS, "--image-opts", *words, opts, cwd=t.directory)
    assert "failed" not in done.stdout and "mismatch" not in done.stdout, done.stdout


def our_io(t, opts, *commands):
    words = [w for c in commands for w in ("-c", c)]
    done = t.cairn("io", *SECRETS, "--image-opts", *words, opts)
    assert "failed" not in done.stdout and "mismatch" not in done.stdout, done.stdout


def create_luks(t, name, options="", size="8M", key="s"):
    return t.ours("create", "-f", "luks", *SECRETS, "-o", joined(f"key-secret={key}", options, QUICK), name, size)


def create_qcow2(t, name, options="", size="8M", key="s", *more):
    return t.ours("create", "-f", "qcow2", *SECRETS, *more, "-o",
                  joined(f"encrypt.format=luks,encrypt.key-secret={key},encrypt.{QUICK}", options), name, *([size] if size else []))


def source(t):
    """source.raw: data, zeroes and holes."""
    t.peer("create", "-q", "-f", "raw", "source.raw", "8M")
    t.io("source.raw", "write -P 1 0 100k", "write -P 2 3M 1M", "write -P 3 7000k 1500", fmt="raw")


def same_disk(t, one, other):
    t.peer("compare", *SECRETS, "--image-opts", opts_of(one), opts_of(other))
    t.ours("compare", *SECRETS, "--image-opts", opts_of(one), opts_of(other))


@pytest.mark.parametrize("options", LUKS_KINDS)
def test_volumes_are_the_peers(tools, options):  # noqa: F811
    said = create_luks(tools, "a.luks", options).stdout
    assert said == f"Formatting 'a.luks', fmt=luks size=8388608 key-secret=s {options.replace(',', ' ')}{options and ' '}iter-time=10\n".replace(
        "ivgen-alg=essiv ivgen-hash-alg=sha256", "ivgen-alg=essiv ivgen-hash-alg=sha256") or "hash-alg" in options
    tools.same("info", "a.luks")
    tools.same_json("info", "--output=json", "a.luks")
    peer_io(tools, luks("a.luks"), "write -P 7 1M 3M", "read -P 7 1M 3M")
    our_io(tools, luks("a.luks"), "read -P 7 1M 3M", "write -P 8 2000000 5000", "write -z 3M 64k")
    peer_io(tools, luks("a.luks"), "read -P 8 2000000 5000", "read -P 0 3M 64k", "read -P 7 3208k 100k")
    assert os.path.getsize(tools.path("a.luks")) > 8 << 20


@pytest.mark.parametrize("options", QCOW2_KINDS)
def test_images_are_the_peers(tools, options):  # noqa: F811
    create_qcow2(tools, "a.enc", options)
    tools.same("info", "a.enc")
    tools.same_json("info", "--output=json", "a.enc")
    peer_io(tools, qcow2("a.enc"), "read -P 0 0 8M", "write -P 7 1M 3M", "write -P 9 5M 700")
    our_io(tools, qcow2("a.enc"), "read -P 7 1M 3M", "read -P 9 5M 700", "write -P 8 2000000 5000", "write -z 3M 64k", "write -P 6 6M 1000",
           "discard 1M 64k")
    peer_io(tools, qcow2("a.enc"), "read -P 8 2000000 5000", "read -P 0 3M 64k", "read -P 6 6M 1000", "read -P 0 6292456 100000", "read -P 9 5M 700")
    tools.peer("check", *SECRETS, "--image-opts", qcow2("a.enc"))
    tools.ours("check", "a.enc")
    peer = tools.peer("map", "--output=json", *SECRETS, "--image-opts", qcow2("a.enc"))
    ours = tools.ours("map", "--output=json", *SECRETS, "--image-opts", qcow2("a.enc"))
    assert json.loads(ours.stdout) == json.loads(peer.stdout)


def test_what_the_peer_made_is_used(tools):  # noqa: F811
    peer_creates_encrypted(tools.path("a.enc"), "qcow2", "cluster_size=4k", "8M")
    our_io(tools, qcow2("a.enc"), "write -P 1 100 10000", "write -P 2 5M 1M")
    peer_io(tools, qcow2("a.enc"), "read -P 1 100 10000", "read -P 2 5M 1M", "read -P 0 10100 100k")
    tools.peer("check", *SECRETS, "--image-opts", qcow2("a.enc"))


@pytest.mark.parametrize("target", ["x.luks", "x.enc"])
def test_convert_from_and_to(tools, target):  # noqa: F811
    source(tools)
    options = f"key-secret=s,{QUICK}" if target == "x.luks" else f"encrypt.format=luks,encrypt.key-secret=s,encrypt.{QUICK},cluster_size=4k"
    tools.ours("convert", *SECRETS, "-O", "luks" if target == "x.luks" else "qcow2", "-o", options, "source.raw", target)
    same_disk(tools, "source.raw", target)
    tools.ours("convert", *SECRETS, "--image-opts", "-O", "qcow2", opts_of(target), "back.qcow2")
    same_disk(tools, "source.raw", "back.qcow2")
    # Over what is there already, by options.
    tools.io("source.raw", "write -P 5 1M 2M", fmt="raw")
    tools.ours("convert", *SECRETS, "-n", "--target-image-opts", "-f", "raw", "source.raw", opts_of(target))
    same_disk(tools, "source.raw", target)
    tools.ours("dd", *SECRETS, "--image-opts", f"if={opts_of(target)}", "of=part.raw", "bs=1M", "count=2", "skip=2")
    assert open(tools.path("part.raw"), "rb").read() == open(tools.path("source.raw"), "rb").read()[2 << 20:4 << 20]
    tools.ours("bench", *SECRETS, "--image-opts", "-c", "100", "-q", opts_of(target))


def test_each_layer_has_its_key(tools):  # noqa: F811
    create_qcow2(tools, "base.enc")
    our_io(tools, qcow2("base.enc"), "write -P 1 0 4M")
    create_qcow2(tools, "top.enc", "", None, "t", "-b", "base.enc", "-F", "qcow2")
    below = "backing.driver=qcow2,backing.file.filename=base.enc,backing.encrypt.format=luks,backing.encrypt.key-secret=s"
    our_io(tools, qcow2("top.enc", "t", below), "read -P 1 0 4M", "write -P 2 1M 100", "write -P 3 6M 100k")
    peer_io(tools, qcow2("top.enc", "t", below), "read -P 2 1M 100", "read -P 1 1048676 60000", "read -P 3 6M 100k", "read -P 1 3M 1M")
    # What the image names is opened with what is said of its key.
    our_io(tools, qcow2("top.enc", "t", "backing.encrypt.key-secret=s"), "read -P 2 1M 100", "read -P 1 3M 1M")
    refused = tools.ours("compare", *SECRETS, "--image-opts", qcow2("top.enc", "t"), qcow2("top.enc", "t"), ok=(2,))
    assert "is encrypted: `encrypt.key-secret` is needed" in refused.stderr
    # Stand-alone afterwards.
    tools.ours("convert", *SECRETS, "--image-opts", "-O", "raw", qcow2("top.enc", "t", below), "flat.raw")
    tools.ours("rebase", *SECRETS, "--image-opts", "-b", "", qcow2("top.enc", "t", "backing.encrypt.key-secret=s"))
    tools.peer("compare", *SECRETS, "--image-opts", qcow2("top.enc", "t"), "driver=raw,file.filename=flat.raw")
    tools.peer("check", *SECRETS, "--image-opts", qcow2("top.enc", "t"))


def test_snapshots_and_sizes(tools):  # noqa: F811
    create_qcow2(tools, "a.enc", "cluster_size=4k")
    our_io(tools, qcow2("a.enc"), "write -P 1 0 1M")
    tools.ours("snapshot", *SECRETS, "--image-opts", "-c", "one", qcow2("a.enc"))
    our_io(tools, qcow2("a.enc"), "write -P 2 1000 3000", "write -P 3 3M 64k")
    tools.ours("resize", *SECRETS, "--image-opts", qcow2("a.enc"), "+4M")
    tools.ours("resize", *SECRETS, "--image-opts", "--preallocation=metadata", qcow2("a.enc"), "+1M")
    peer_io(tools, qcow2("a.enc"), "read -P 2 1000 3000", "read -P 1 4000 100k", "read -P 0 8M 5M", "write -P 4 12M 1000", "read -P 0 12584000 3000")
    tools.peer("check", *SECRETS, "--image-opts", qcow2("a.enc"))
    tools.ours("snapshot", *SECRETS, "--image-opts", "-a", "one", qcow2("a.enc"))
    peer_io(tools, qcow2("a.enc"), "read -P 1 0 1M", "read -P 0 1M 7M")
    tools.ours("snapshot", *SECRETS, "--image-opts", "-d", "one", qcow2("a.enc"))
    tools.peer("check", *SECRETS, "--image-opts", qcow2("a.enc"))
    create_luks(tools, "a.luks")
    our_io(tools, luks("a.luks"), "write -P 1 7M 1M")
    tools.ours("resize", *SECRETS, "--image-opts", luks("a.luks"), "+1M")
    tools.ours("resize", *SECRETS, "--image-opts", "--shrink", luks("a.luks"), "8M")
    peer_io(tools, luks("a.luks"), "read -P 1 7M 1M")


def test_images_take_what_is_measured(tools):  # noqa: F811
    for i, options in enumerate(["", "cipher-alg=aes-128", "cipher-mode=cbc"]):
        measured = json.loads(tools.ours("measure", "--output=json", "-O", "luks", "-o", joined("key-secret=s", options), "--size", "1M").stdout)
        create_luks(tools, f"{i}.luks", options, "1M")
        assert measured == dict.fromkeys(["required", "fully-allocated"], os.path.getsize(tools.path(f"{i}.luks")))
        enc = joined("encrypt.format=luks,encrypt.key-secret=s", options and f"encrypt.{options}")
        measured = json.loads(tools.ours("measure", "--output=json", "-O", "qcow2", "-o", enc, "--size", "1M").stdout)
        tools.ours("create", "-q", "-f", "qcow2", *SECRETS, "-o", f"{enc},encrypt.{QUICK},preallocation=full", f"{i}.enc", "1M")
        assert measured["fully-allocated"] == os.path.getsize(tools.path(f"{i}.enc"))
        assert measured["required"] < measured["fully-allocated"] - 1000000


def test_what_is_refused_is_named(tools):  # noqa: F811
    create_luks(tools, "a.luks", size="1M")
    create_qcow2(tools, "a.enc", size="1M")
    tools.peer("create", "-q", "-f", "qcow2", "plain.qcow2", "1M")

    def refused(text, *words, status=1):
        said = tools.ours(*words, ok=(status,)).stderr
        assert text in said and "abc" not in said, said

    refused("'key-secret' is needed", "convert", "a.luks", "x.raw")
    refused("`encrypt.key-secret` is needed", "convert", "a.enc", "x.raw")
    refused("there is no secret 'u'", "convert", "--image-opts", luks("a.luks", "u"), "x.raw")
    refused("the password opens no key slot", "convert", *SECRETS, "--image-opts", qcow2("a.enc", "t"), "x.raw")
    refused("`encrypt` is given, but the image is not encrypted", "convert", *SECRETS, "--image-opts", qcow2("plain.qcow2"), "x.raw")
    refused("'aes'", "create", "-f", "qcow2", *SECRETS, "-o", "encrypt.format=aes,encrypt.key-secret=s", "x", "1M")
    refused("'key-secret' is required", "create", "-f", "luks", "x", "1M")
    refused("there is no secret 'u'", "create", "-q", "-f", "luks", "-o", "key-secret=u", "x", "1M")
    assert not os.path.exists(tools.path("x"))
    refused("cipher 'serpent-256'", "create", "-q", "-f", "luks", *SECRETS, "-o", "key-secret=s,cipher-alg=serpent-256", "x", "1M")
    refused("Invalid parameter 'cluster_size'", "create", "-q", "-f", "luks", *SECRETS, "-o", "key-secret=s,cluster_size=4k", "x", "1M")
    refused("preallocation of encrypted images needs", "create", "-q", "-f", "qcow2", *SECRETS, "-o",
            "compat=0.10,preallocation=metadata,encrypt.format=luks,encrypt.key-secret=s", "x", "1M")
    refused("Compression and encryption", "convert", "-c", "-O", "qcow2", *SECRETS, "-o", "encrypt.format=luks,encrypt.key-secret=s", "plain.qcow2", "x")
    refused("--object: ", "info", "--object", "secret,id=s,data=abc,frob=1", "a.luks")
    refused("secret 's': give one of", "convert", "--object", "secret,id=s", "a.luks", "x.raw")
    refused("", "check", "a.luks", status=63)
    with open(tools.path("a.enc"), "r+b") as f:
        f.seek(32)
        f.write((1).to_bytes(4, "big"))
    refused("AES encryption, which is weak", "convert", *SECRETS, "--image-opts", qcow2("a.enc"), "x.raw")


def opens(t, name, key):
    """Does each program open it with this secret?"""
    ours = t.cairn("io", *SECRETS, "--image-opts", "-c", "read 0 512", opts_of(name, key), ok=None).returncode
    theirs = run("qemu-io", *SECRETS, "--image-opts", "-c", "read 0 512", opts_of(name, key), cwd=t.directory, ok=None).returncode
    assert ours == theirs, (name, key)
    return ours == 0


@pytest.mark.parametrize("name", ["a.luks", "a.enc"])
def test_key_slots_are_amended(tools, name):  # noqa: F811
    create_luks(tools, "a.luks", size="1M")
    create_qcow2(tools, "a.enc", size="1M")
    our_io(tools, opts_of(name), "write -P 1 0 1M")
    prefix = "" if name == "a.luks" else "encrypt."

    def amend(options, *words, ok=(0,), key="s"):
        return tools.ours("amend", *SECRETS, *words, "--image-opts", "-o", ",".join(prefix + o for o in options.split(",")), opts_of(name, key),
                          ok=ok).stderr

    amend(f"state=active,new-secret=t,{QUICK}")
    assert opens(tools, name, "s") and opens(tools, name, "t")
    tools.same_json("info", "--output=json", name)
    assert "slot 1 is in use" in amend("state=active,new-secret=s,keyslot=1", ok=(1,))
    amend("state=inactive,old-secret=s", key="t")
    assert not opens(tools, name, "s") and opens(tools, name, "t")
    assert "no key slot would be left" in amend("state=inactive,old-secret=t", key="t", ok=(1,))
    assert "no key slot would be left" in amend("state=inactive,keyslot=1", key="t", ok=(1,))
    amend(f"state=active,new-secret=s,keyslot=1,{QUICK}", "--force", key="t")
    assert opens(tools, name, "s") and not opens(tools, name, "t")
    our_io(tools, opts_of(name), "read -P 1 0 1M")
    assert "Parameter 'state' is missing" in amend("new-secret=s", ok=(1,))
    assert "'keyslot'" in amend("state=inactive,keyslot=8", ok=(1,))
    assert "there is no secret 'u'" in amend("state=active,new-secret=u", ok=(1,))
    tools.ours("check", "a.enc")
    amend("state=inactive,keyslot=1", "--force")
    assert not opens(tools, name, "s")


def test_key_slots_of_others(tools):  # noqa: F811
    key = cryptsetup_creates(tools.path("a.luks"))
    with open(key + "2", "w", encoding="ascii") as f:
        f.write("def")
    tools.ours("amend", *SECRETS, "--image-opts", "-o", f"state=active,new-secret=t,keyslot=6,{QUICK}", luks("a.luks"))
    run("cryptsetup", "open", "--test-passphrase", "--key-slot", "6", "--key-file", key + "2", tools.path("a.luks"))
    run("cryptsetup", "-q", "luksAddKey", "--pbkdf-force-iterations", "1000", "--key-file", key + "2", tools.path("a.luks"), key)
    run("cryptsetup", "-q", "luksKillSlot", "--key-file", key, tools.path("a.luks"), "0")
    assert opens(tools, "a.luks", "s") and opens(tools, "a.luks", "t")
    tools.ours("amend", *SECRETS, "--image-opts", "-o", "state=inactive,old-secret=t", luks("a.luks"))
    dump = run("cryptsetup", "luksDump", tools.path("a.luks")).stdout
    assert dump.count("ENABLED") == 1
    peer_io(tools, luks("a.luks"), "read 0 512")
