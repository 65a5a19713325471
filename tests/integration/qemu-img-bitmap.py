# SPDX-License-Identifier: Apache-2.0
"""`bitmap`, `convert --bitmaps` and `measure` beside the peer's: the same images, the same lists, the same bits."""
import json

import pytest
from image_support import need_peer, tools  # noqa: F401

nbd = pytest.importorskip("nbd")
need_peer()


def bits(tools, image, name):
    """What is dirty, as the peer shows it to a client: (length, flags) from the start on."""
    h = nbd.NBD()
    h.add_meta_context("qemu:dirty-bitmap:" + name)
    h.connect_systemd_socket_activation(["qemu-nbd", "-r", "-f", "qcow2", "-B", name, tools.path(image)])
    found = []

    def extent(context, offset, entries, error):
        found.extend(zip(entries[::2], entries[1::2]))
        return 0

    while (at := sum(length for length, _ in found)) < h.get_size():
        h.block_status(h.get_size() - at, at, extent)
    h.shutdown()
    return found


def listed(tools, image):
    data = json.loads(tools.peer("info", "--output=json", image).stdout)["format-specific"]["data"]
    return sorted((b["name"], b["granularity"], sorted(b["flags"])) for b in data.get("bitmaps", []))


STEPS = [
    ["bitmap", "--add", "{}", "a"],
    ["bitmap", "--add", "--disable", "-g", "4k", "{}", "b"],
    ["bitmap", "--add", "-g", "512", "-f", "qcow2", "{}", "c"],
    "write 1M 300k",
    ["bitmap", "--merge", "c", "{}", "b"],
    ["bitmap", "--clear", "{}", "c"],
    "write 5M 1000",
    ["bitmap", "--enable", "--merge", "a", "--disable", "{}", "b"],
    ["bitmap", "--disable", "{}", "a"],
    "write -z 8M 1M",
    ["bitmap", "--add", "--merge", "a", "-b", "other", "-F", "qcow2", "{}", "d"],
    ["bitmap", "--add", "--image-opts", "driver=qcow2,file.filename={}", "e"],
    ["bitmap", "--remove", "{}", "e"],
]


def test_the_same_steps_have_the_same_effect(tools):
    """What one makes the other goes on with, too."""
    images = {"ours.qcow2": [tools.ours], "theirs.qcow2": [tools.peer], "turns.qcow2": [tools.ours, tools.peer]}
    tools.peer("create", "-q", "-f", "qcow2", "other", "16M")
    tools.peer("bitmap", "--add", "other", "a")
    tools.io("other", "write 12M 100k")
    for image, programs in images.items():
        tools.peer("create", "-q", "-f", "qcow2", image, "16M")
        for i, step in enumerate(STEPS):
            if isinstance(step, str):
                tools.io(image, step)
            else:
                programs[i % len(programs)](*[word.format(image) for word in step])
        tools.peer("check", "-q", image)
        assert listed(tools, image) == [("a", 65536, []), ("b", 4096, []), ("c", 512, ["auto"]), ("d", 65536, ["auto"])]
    for name in "abcd":
        found = [bits(tools, image, name) for image in images]
        assert found[0] == found[1] == found[2] and any(flags for _, flags in found[0]), name


@pytest.mark.parametrize("arguments", [
    ["x.qcow2", "b"], ["--add", "x.qcow2"], ["--add", "-g", "4k", "x.qcow2", "a"], ["--clear", "-g", "4k", "x.qcow2", "a"],
    ["--add", "-b", "x.qcow2", "x.qcow2", "b"], ["--add", "-F", "qcow2", "x.qcow2", "b"], ["--merge", "no", "x.qcow2", "a"],
    ["--remove", "x.qcow2", "no"], ["--add", "-g", "1000", "x.qcow2", "b"], ["--add", "x.raw", "b"], ["--add", "x.qcow2", ""],
    ["--add", "old.qcow2", "b"], ["--add", "-f", "qcow2", "--image-opts", "x.qcow2", "b"],
])
def test_the_same_is_refused(tools, arguments):
    tools.peer("create", "-q", "-f", "qcow2", "x.qcow2", "10M")
    tools.peer("create", "-q", "-f", "qcow2", "-o", "compat=0.10", "old.qcow2", "10M")
    tools.peer("create", "-q", "-f", "raw", "x.raw", "10M")
    tools.peer("bitmap", "--add", "x.qcow2", "a")
    tools.same("bitmap", *arguments)
    assert listed(tools, "x.qcow2") == [("a", 65536, ["auto"])]
    tools.peer("check", "-q", "x.qcow2")


@pytest.mark.parametrize("cluster", ["64k", "4k"])
def test_convert_takes_them_along(tools, cluster):
    tools.peer("create", "-q", "-f", "qcow2", "x.qcow2", "16M")
    for options in (["a"], ["b", "-g", "512"], ["c", "--disable"]):
        tools.peer("bitmap", "--add", *options[1:], "x.qcow2", options[0])
    tools.io("x.qcow2", "write 1M 300k", "write 9M 4k")
    tools.peer("bitmap", "--merge", "b", "x.qcow2", "c")
    for program, target in ((tools.peer, "theirs.qcow2"), (tools.ours, "ours.qcow2")):
        program("convert", "--bitmaps", "-O", "qcow2", "-o", f"cluster_size={cluster}", "x.qcow2", target)
        tools.equal("x.qcow2", target)
    assert listed(tools, "ours.qcow2") == listed(tools, "theirs.qcow2") == listed(tools, "x.qcow2")
    for name in "abc":
        assert bits(tools, "ours.qcow2", name) == bits(tools, "theirs.qcow2", name) == bits(tools, "x.qcow2", name)
    tools.same("measure", "-O", "qcow2", "-o", f"cluster_size={cluster}", "x.qcow2")
    tools.same_json("measure", "--output=json", "-O", "qcow2", "x.qcow2")
    for arguments in (["-O", "raw", "x.qcow2"], ["-O", "qcow2", "raw"], ["-O", "qcow2", "x.qcow2", "x.qcow2"]):
        tools.peer("create", "-q", "-f", "raw", "raw", "1M")
        tools.same("convert", "--bitmaps", *arguments, "never")
    tools.same("convert", "--skip-broken-bitmaps", "-O", "qcow2", "x.qcow2", "never")


def test_inconsistent_ones_are_left_out_on_request(tools):
    tools.peer("create", "-q", "-f", "qcow2", "x.qcow2", "16M")
    tools.peer("bitmap", "--add", "x.qcow2", "good")
    tools.peer("bitmap", "--add", "x.qcow2", "bad")
    with open(tools.path("x.qcow2"), "r+b") as f:
        data = f.read(4 << 20)
        at = data.index(b"bad")
        f.seek(at - 24 + 15)  # in the entry's flags
        f.write(bytes([3]))
    tools.same("convert", "--bitmaps", "-O", "qcow2", "x.qcow2", "never")
    for program, target in ((tools.peer, "theirs.qcow2"), (tools.ours, "ours.qcow2")):
        program("convert", "--bitmaps", "--skip-broken-bitmaps", "-O", "qcow2", "x.qcow2", target)
    assert listed(tools, "ours.qcow2") == listed(tools, "theirs.qcow2") == [("good", 65536, ["auto"])]
    tools.same("measure", "-O", "qcow2", "x.qcow2")
    tools.same("bitmap", "--clear", "x.qcow2", "bad")
    tools.ours("bitmap", "--remove", "x.qcow2", "bad")
    assert listed(tools, "x.qcow2") == [("good", 65536, ["auto"])]
    tools.peer("check", "-q", "x.qcow2")


@pytest.mark.parametrize("what", ["resize", "snapshot", "rebase", "commit"])
def test_the_other_tools_keep_them(tools, what):
    tools.peer("create", "-q", "-f", "raw", "base", "16M")
    tools.peer("create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", "x.qcow2")
    tools.peer("bitmap", "--add", "x.qcow2", "a")
    tools.io("x.qcow2", "write 1M 64k")
    {
        "resize": lambda: (tools.ours("resize", "--shrink", "x.qcow2", "8M")),
        "snapshot": lambda: (tools.ours("snapshot", "-c", "s", "x.qcow2"), tools.ours("snapshot", "-d", "s", "x.qcow2")),
        "rebase": lambda: tools.ours("rebase", "-b", "", "x.qcow2"),
        "commit": lambda: tools.ours("commit", "x.qcow2"),
    }[what]()
    assert listed(tools, "x.qcow2") == [("a", 65536, ["auto"])]
    tools.peer("check", "-q", "x.qcow2")
    assert (65536, 1) in bits(tools, "x.qcow2", "a")


def test_a_snapshot_that_is_applied_dirties_all(tools):
    tools.peer("create", "-q", "-f", "qcow2", "x.qcow2", "16M")
    tools.peer("snapshot", "-c", "s", "x.qcow2")
    tools.io("x.qcow2", "write 1M 64k")
    tools.peer("bitmap", "--add", "x.qcow2", "a")
    tools.peer("bitmap", "--add", "--disable", "x.qcow2", "still")
    tools.ours("snapshot", "-a", "s", "x.qcow2")
    assert bits(tools, "x.qcow2", "a") == [(16 << 20, 1)]
    assert bits(tools, "x.qcow2", "still") == [(16 << 20, 0)]


def test_no_room_in_the_header(tools):
    """A name that has to move has nowhere to go."""
    name = "n" * 250
    tools.peer("create", "-q", "-f", "raw", name, "1M")
    tools.peer("create", "-q", "-f", "qcow2", "-o", "cluster_size=512", "-b", name, "-F", "raw", "x.qcow2")
    assert "no room" in tools.ours("bitmap", "--add", "x.qcow2", "a", ok=(1,)).stderr
    assert listed(tools, "x.qcow2") == []
    tools.equal(name, "x.qcow2")


@pytest.mark.parametrize("name", ["base", "b" * 250, "./" * 200 + "base"])
def test_the_backing_files_name_makes_room(tools, name):
    tools.peer("create", "-q", "-f", "raw", name, "1M")
    tools.io(name, "write -P 3 0 64k", fmt="raw")
    tools.peer("create", "-q", "-f", "qcow2", "-b", name, "-F", "raw", "x.qcow2")
    for i in range(3):
        tools.ours("bitmap", "--add", "x.qcow2", f"a{i}")
        tools.peer("compare", "-q", "-F", "raw", "x.qcow2", name)
        assert json.loads(tools.peer("info", "--output=json", "x.qcow2").stdout)["backing-filename"] == name
    tools.ours("bitmap", "--remove", "x.qcow2", "a1")
    assert [entry[0] for entry in listed(tools, "x.qcow2")] == ["a0", "a2"]
    for i in (0, 2):
        tools.ours("bitmap", "--remove", "x.qcow2", f"a{i}")
    assert listed(tools, "x.qcow2") == [] and not tools.peer("info", "x.qcow2").stderr
    tools.peer("check", "-q", "x.qcow2")
