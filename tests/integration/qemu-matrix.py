# SPDX-License-Identifier: Apache-2.0
"""Every feature of qcow2 images with every operation, between QEMU's tools and ours: who made the image and who works on it are
each of both in turn; afterwards both find it sound, and both read the same. The table of what was found is
docs/interoperability.md; run this file with a build directory in CAIRN_BUILD to write it anew."""
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile

import pytest
from image_support import need_peer, program

if __name__ != "__main__":
    need_peer()

SIZE = 2560 * 1024 + 1536
WHO = ("ours", "theirs")
PAIRS = [("ours", "ours"), ("ours", "theirs"), ("theirs", "ours")]  # who has made it, who works on it
IMAGE = "disk.qcow2"
PAGE = os.path.join(os.path.dirname(__file__), "../../docs/interoperability.md")
SECRET = ("--object", "secret,id=key,data=secret")

# What the peer's tools do and ours refuse: (feature, operation): why. "*" is any.
REFUSED_HERE = {
    ("LUKS", "write compressed"): "compressed clusters are not encrypted: the peer writes what is secret as it is",
    ("LUKS", "to version 2"): "the image keeps what only newer programs understand",
}


class Feature:
    def __init__(self, options="", backing=None, prepare=(), key=False):
        self.options = options
        self.backing = backing
        self.prepare = prepare  # commands of io
        self.key = key


FEATURES = {
    "version 2": Feature("compat=0.10"),
    "version 3": Feature(),
    "clusters of 512 bytes": Feature("cluster_size=512"),
    "clusters of 4 KiB": Feature("cluster_size=4k"),
    "clusters of 2 MiB": Feature("cluster_size=2M"),
    "refcounts of 1 bit": Feature("refcount_bits=1"),
    "refcounts of 64 bits": Feature("refcount_bits=64"),
    "lazy refcounts": Feature("lazy_refcounts=on"),
    "preallocated metadata": Feature("preallocation=metadata"),
    "preallocated data": Feature("preallocation=falloc"),
    "backing file, qcow2": Feature(backing="qcow2"),
    "backing file, raw": Feature(backing="raw"),
    "backing file, version 2": Feature("compat=0.10", backing="qcow2"),
    "compressed, zlib": Feature(prepare=("write -c -P 85 1792k 64k",)),
    "compressed, zstd": Feature("compression_type=zstd", prepare=("write -c -P 85 1792k 64k",)),
    "subclusters": Feature("extended_l2=on,cluster_size=128k", backing="qcow2"),
    "data file": Feature("data_file=disk.data"),
    "data file, raw": Feature("data_file=disk.data,data_file_raw=on"),
    "LUKS": Feature("encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10", key=True),
}

CONTENT = ("write -P 17 0 200k", "write -P 34 600k 3k", "write -z 100k 64k", "write -P 51 2500k 20k", "write -P 52 1500000 77777")


class Tools:
    """One side's programs on the image of a directory."""

    def __init__(self, who, directory, feature):
        self.who = who
        self.directory = directory
        self.feature = feature
        self.options = f"driver=qcow2,discard=unmap,file.filename={IMAGE}" + (",encrypt.key-secret=key" if feature.key else "")

    def run(self, tool, *words):
        path = os.path.join(BIN, tool) if self.who == "ours" else shutil.which(tool)
        done = subprocess.run([path, *words], cwd=self.directory, capture_output=True, check=False, timeout=60,
                              stdin=subprocess.DEVNULL)
        done.text = (done.stdout + done.stderr).decode()
        return done

    def secret(self):
        return SECRET if self.feature.key else ()

    def img(self, command, *words):
        """The word IMAGE among them stands for the image."""
        return self.run("qemu-img", command, *self.secret(), "--image-opts",
                        *(self.options if w == IMAGE else w for w in words))

    def io(self, *commands):
        return self.run("qemu-io", *self.secret(), "--image-opts", *(w for c in commands for w in ("-c", c)), self.options)

    def create(self):
        f = self.feature
        if f.backing:
            must(self.run("qemu-img", "create", "-q", "-f", f.backing, "base", str(SIZE - 70144)))
            must(self.run("qemu-io", "-f", f.backing, "-c", "write -P 102 0 1000k", "-c", "write -P 119 1900000 50000", "base"))
        words = ["create", "-q", *self.secret(), "-f", "qcow2", *(["-o", f.options] if f.options else []),
                 *(["-b", "base", "-F", f.backing] if f.backing else []), IMAGE, str(SIZE)]
        for _ in range(100):
            made = self.run("qemu-img", *words)
            if "accurate CPU usage" not in made.text:  # the peer's clock is too coarse for it at times
                break
        return made if made.returncode else self.io(*f.prepare, *CONTENT)


def must(done):
    assert done.returncode == 0, (done.args, done.text)
    return done


def each(*steps):
    """An operation of several commands: the first that is refused ends it."""
    def run(tools):
        for step in steps:
            done = step(tools)
            if done.returncode:
                break
        return done
    return run


def io(*commands):
    return lambda tools: tools.io(*commands)


def img(command, *words):
    return lambda tools: tools.img(command, *words)


class Operation:
    def __init__(self, run, on=None, loose=False):
        self.run = run
        self.on = on or (lambda f: True)
        self.loose = loose  # what is read afterwards is up to who did it


OPERATIONS = {
    "read": Operation(img("check", "-q", IMAGE)),
    "write": Operation(io("write -P 68 190k 30k", "write -P 69 1M 64k", "write -P 70 1M 1", "write -P 71 2600000 20000")),
    "write zeroes": Operation(io("write -z 30k 100k", "write -z -u 190k 500k", "write -z 2000k 300k")),
    "discard": Operation(io("discard 0 128k", "discard 150k 600k"), loose=True),
    "write compressed": Operation(io("write -c -P 86 1024k 64k")),
    "make larger": Operation(each(img("resize", "-q", IMAGE, "+3M"), io("write -P 87 3M 100k"))),
    "make smaller": Operation(img("resize", "-q", "--shrink", IMAGE, "1100k")),
    "snapshot, make": Operation(each(img("snapshot", "-c", "one", IMAGE), io("write -P 90 0 300k"))),
    "snapshot, apply": Operation(each(img("snapshot", "-c", "one", IMAGE), io("write -P 90 0 300k"),
                                      img("snapshot", "-a", "one", IMAGE))),
    "snapshot, delete": Operation(each(img("snapshot", "-c", "one", IMAGE), io("write -P 90 0 300k"),
                                       img("snapshot", "-d", "one", IMAGE))),
    "bitmap": Operation(each(img("bitmap", "--add", "-g", "32k", IMAGE, "one"), io("write -P 91 64k 128k"),
                             img("bitmap", "--add", "--merge", "one", "-g", "64k", IMAGE, "two"))),
    "commit": Operation(img("commit", "-q", IMAGE), on=lambda f: f.backing),
    "rebase": Operation(img("rebase", "-b", "", IMAGE), on=lambda f: f.backing),
    # With clusters of 2 MiB the peer does not end.
    "amend": Operation(img("amend", "-o", "lazy_refcounts=off,refcount_bits=32", IMAGE),
                       on=lambda f: "0.10" not in f.options and "2M" not in f.options),
    "to version 2": Operation(img("amend", "-o", "compat=0.10", IMAGE), on=lambda f: "0.10" not in f.options),
    "to version 3": Operation(img("amend", "-o", "compat=1.1", IMAGE), on=lambda f: "0.10" in f.options),
}


def content(tools):
    """What the disk holds, as a program reads it."""
    must(tools.img("convert", "-O", "raw", IMAGE, "read.raw"))
    with open(os.path.join(tools.directory, "read.raw"), "rb") as f:
        found = hashlib.sha256(f.read()).hexdigest()
    os.unlink(os.path.join(tools.directory, "read.raw"))
    return found


def described(tools):
    info = json.loads(must(tools.img("info", "--output=json", IMAGE)).stdout)
    snapshots = [(s["name"], s["id"]) for s in info.get("snapshots", [])]
    data = info["format-specific"]["data"]
    return info["virtual-size"], snapshots, sorted((b["name"], b["granularity"], tuple(b["flags"])) for b in data.get("bitmaps", []))


def mapped(tools):
    """Where data lie, in as few pieces as can be. Ours also tells holes of the file within clusters, and the peer where clusters lie
    that read as zeroes."""
    joined = []
    for e in json.loads(must(tools.img("map", "--output=json", IMAGE)).stdout):
        e = {"start": e["start"], "length": e["length"], "depth": e["depth"], "data": e["data"],
             "offset": e.get("offset") if e["data"] else None}
        last = joined[-1] if joined else None
        follows = last and (e["offset"] == last["offset"] if e["offset"] is None or last["offset"] is None else
                            e["offset"] == last["offset"] + last["length"])
        if follows and (last["depth"], last["data"]) == (e["depth"], e["data"]):
            last["length"] += e["length"]
        else:
            joined.append(e)
    return joined


def judge(feature, directory, may_leak):
    """Both find it sound, and say the same of it. What they read."""
    both = [Tools(who, directory, feature) for who in WHO]
    for tools in both:
        done = tools.img("check", "-q", IMAGE)
        assert done.returncode == 0 or may_leak and done.returncode == 3, done.text
    for look in (described, mapped, content):
        ours, theirs = (look(tools) for tools in both)
        assert ours == theirs
    return ours


def prepared(name, who, cache):
    """A directory with the image that one side has made; None: it refuses to."""
    if (name, who) not in cache:
        directory = tempfile.mkdtemp(dir=cache["directory"])
        tools = Tools(who, directory, FEATURES[name])
        done = tools.create()
        cache[name, who] = directory if done.returncode == 0 else None
        cache[name, who, "why"] = done.text
    return cache[name, who]


def try_pair(name, operation, maker, doer, cache):
    """What the disk holds afterwards; None: the doer refuses, and nothing has changed; or nobody made it."""
    feature = FEATURES[name]
    origin = prepared(name, maker, cache)
    if origin is None:
        return None
    directory = os.path.join(origin, "work")
    shutil.copytree(origin, directory)
    try:
        done = OPERATIONS[operation].run(Tools(doer, directory, feature))
        cache[name, operation, doer, "why"] = done.text
        found = judge(feature, directory, done.returncode and doer == "theirs")  # it leaks what it had begun with
        return found if done.returncode == 0 else None
    finally:
        shutil.rmtree(directory)


def find(name, operation, cache):
    """The entry of the table; raises where what was found differs."""
    if not OPERATIONS[operation].on(FEATURES[name]):
        return ""
    found = {(m, d): try_pair(name, operation, m, d, cache) for m, d in PAIRS}
    does = {who: any(found[m, d] for m, d in PAIRS if d == who) for who in WHO}
    for m, d in PAIRS:
        assert bool(found[m, d]) == does[d] or not prepared(name, m, cache), found
    contents = {c for c in found.values() if c}
    assert OPERATIONS[operation].loose or len(contents) <= 1, found
    if does["ours"] and does["theirs"]:
        return "both"
    return "ours" if does["ours"] else "theirs" if does["theirs"] else "refused"


BIN = None


@pytest.fixture(scope="session", name="cache")
def cache_fixture():
    yield from with_cache()


def with_cache():
    global BIN  # pylint: disable=global-statement
    with tempfile.TemporaryDirectory(prefix="cairn-matrix-", dir="/dev/shm") as directory:
        BIN = os.path.join(directory, "bin")
        os.mkdir(BIN)
        for tool in ("qemu-img", "qemu-io"):
            os.symlink(program(), os.path.join(BIN, tool))
        yield {"directory": directory, "table": {}}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("feature", FEATURES)
def test_feature_and_operation(feature, operation, cache):
    found = find(feature, operation, cache)
    cache["table"][feature, operation] = found
    if found == "theirs":
        why = cache.get((feature, operation, "ours", "why"), "")
        assert any(k in REFUSED_HERE for k in ((feature, operation), ("*", operation), (feature, "*"))), why


def test_each_side_makes_each_feature(cache):
    for feature in FEATURES:
        for who in WHO:
            assert prepared(feature, who, cache) or (feature, "*") in REFUSED_HERE, (who, cache[feature, who, "why"])


def page(table):
    words = {"both": "both", "ours": "here only", "theirs": "QEMU only", "refused": "refused", "": "-"}
    lines = ["# What works between QEMU's tools and ours", "",
             "Written by `tests/integration/qemu-matrix.py`, which tries all of it; do not edit.", "",
             "Each image was made by either side, and worked on by either side; afterwards both sides found it sound, and both read",
             "the same, said the same of it, and told the same places of the data. *both*: whoever has made it. *here only*, *QEMU only*:",
             "the other side refuses, and leaves the image as it is. *refused*: both do. QEMU is version 7.2.", "",
             "| | " + " | ".join(OPERATIONS) + " |", "|---" * (len(OPERATIONS) + 1) + "|"]
    for feature in FEATURES:
        lines.append(f"| {feature} | " + " | ".join(words[table[feature, o]] for o in OPERATIONS) + " |")
    return "\n".join(lines) + "\n"


def test_the_page_says_what_was_found(cache):
    if len(cache["table"]) != len(FEATURES) * len(OPERATIONS):
        pytest.skip("not all of it was tried")
    with open(PAGE, encoding="utf-8") as f:
        assert f.read() == page(cache["table"]), "run this file to write it anew"


def main():
    caches = with_cache()
    cache = next(caches)
    table = {(f, o): find(f, o, cache) for f in FEATURES for o in OPERATIONS}
    with open(PAGE, "w", encoding="utf-8") as f:
        f.write(page(table))
    return 0


if __name__ == "__main__":
    sys.exit(main())
