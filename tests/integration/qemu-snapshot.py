# SPDX-License-Identifier: Apache-2.0
"""Internal snapshots between qemu-img and cairn, both ways: each makes, applies and deletes those of the other, the disk's size
changes between, and after each step `qemu-img check` and `cairn check` find nothing, and all contents are what they were."""
import os
import random
import re
import shutil
import subprocess

import pytest

for program in ("qemu-img", "qemu-io"):
    if not shutil.which(program):
        print(f"requires {program}")
        pytest.skip(program, allow_module_level=True)

CAIRN = os.environ["CAIRN"]
JUDGE = os.path.join(os.environ["CAIRN_BUILD"], "tests/qcow2-check")
SEED = int(os.environ.get("CAIRN_SEED", "1"))
MIB = 1 << 20

SHAPES = [
    "cluster_size=512",
    "cluster_size=1k,compat=0.10",
    "cluster_size=4k,refcount_bits=64",
    "cluster_size=4k,refcount_bits=8,preallocation=metadata",
    "cluster_size=64k",
    "cluster_size=64k,compat=0.10",
    "cluster_size=2M,refcount_bits=4",
]


def run(*words, status=0):
    ended = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == status, (words, ended.returncode, ended.stdout[-2000:], ended.stderr)
    return ended.stdout


def theirs(*words, status=0):
    return run("qemu-img", "snapshot", *words, status=status)


def ours(*words, status=0):
    return run(CAIRN, "snapshot", *words, status=status)


def without_dates(text):
    return re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", "DATE", text)


def must_be_sound(path):
    assert "No errors" in run("qemu-img", "check", path)
    assert "No errors" in run(CAIRN, "check", path)
    assert ours("-l", path) == theirs("-l", path)


def create(path, options="cluster_size=64k", size=4 * MIB):
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, size)
    return path


def content(path, raw):
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, raw)
    with open(raw, "rb") as f:
        return f.read()


def content_then(path, name, raw):
    """As the peer reads it: as much as the disk has now."""
    run("qemu-img", "convert", "-l", f"snapshot.name={name}", "-f", "qcow2", "-O", "raw", path, raw)
    with open(raw, "rb") as f:
        return f.read()


def write(path, rng, size, count=12):
    commands = []
    for _ in range(count):
        offset = rng.randrange(size)
        length = min(rng.choice([512, 4096, 65536, rng.randrange(1, 300000)]), size - offset)
        kind = rng.choice([f"write -P {rng.randrange(1, 256)}"] * 4 + ["write -z", "write -zu", "discard"])
        commands += ["-c", f"{kind} {offset} {length}"]
    run("qemu-io", "-f", "qcow2", "-d", "unmap", *commands, path)


def compress(path, raw, options):
    """A compressed copy in its place."""
    run("qemu-img", "convert", "-c", "-f", "qcow2", "-O", "qcow2", "-o", options, path, raw)
    os.replace(raw, path)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("compressed", [False, True])
def test_each_uses_what_the_other_made(tmp_path, shape, compressed):
    rng = random.Random(f"{SEED} {shape} {compressed}")
    image, raw = create(tmp_path / "a.qcow2", shape), tmp_path / "raw"
    size = 4 * MIB
    write(image, rng, size)
    if compressed:
        compress(image, raw, shape.replace(",preallocation=metadata", ""))
    kept = {}
    for number in range(9):
        tool = rng.choice([ours, theirs])
        action = rng.choice(["create", "create", "apply", "delete"])
        if not kept:
            action = "create"
        if len(kept) == 4:
            action = "delete"
        if action == "create":
            name = f"number {number}"
            tool("-c", name, image)
            kept[name] = content(image, raw)
        else:
            name = rng.choice(list(kept))
            tool("-a" if action == "apply" else "-d", name, image)
            if action == "apply":
                assert content(image, raw) == kept[name]
                size = len(kept[name])
            else:
                del kept[name]
        must_be_sound(image)
        for name, data in kept.items():
            then = content_then(image, name, raw)
            common = min(len(then), len(data))
            assert then[:common] == data[:common]
        if rng.random() < 0.3 and "compat=0.10" not in shape: # the peer does not do that
            size = rng.choice([2 * MIB, 4 * MIB, 7 * MIB + 512])
            run("qemu-img", "resize", "-q", "--shrink", image, size)
        write(image, rng, size, 4)
        must_be_sound(image)
        if not compressed:
            assert run(JUDGE, image).startswith("errors 0 leaks 0 ")


def test_lists_are_the_same(tmp_path):
    """What both make of the same calls: IDs, order, names."""
    images = {tool: create(tmp_path / f"{tool.__name__}.qcow2") for tool in (ours, theirs)}
    lists = []
    for tool, image in images.items():
        for name in ("one", "two", "2", "", "one", "a longer name than the column is wide"):
            tool("-c", name, image)
        tool("-d", "two", image)
        tool("-d", "one", image)
        tool("-d", "1", image, status=1)
        tool("-c", "ü", image)
        tool("-d", "2", image)
        lists.append(without_dates(tool("-l", image)))
        assert "DATE" in lists[-1]
        must_be_sound(image)
    assert lists[0] == lists[1]


def test_an_id_goes_before_a_name(tmp_path):
    image, raw = create(tmp_path / "a.qcow2"), tmp_path / "raw"
    for pattern, name in ((1, "2"), (2, "other")):
        run("qemu-io", "-f", "qcow2", "-c", f"write -P {pattern} 0 64k", image)
        ours("-c", name, image)
    for tool in (ours, theirs):
        tool("-a", "2", image)
        assert content(image, raw)[0] == 2
        tool("-a", "1", image)
        assert content(image, raw)[0] == 1


def refused(text, *words):
    ended = subprocess.run([CAIRN, "snapshot", *map(str, words)], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1 and text in ended.stderr, ended


def test_what_cannot_be_done_changes_nothing(tmp_path):
    image = create(tmp_path / "a.qcow2", "refcount_bits=1")
    run("qemu-io", "-f", "qcow2", "-c", "write -P 1 0 64k", image)
    before = image.read_bytes()
    refused("refcounts have 1 bit", "-c", "one", image)
    assert image.read_bytes() == before
    must_be_sound(image)
    refused("snapshot not found", "-d", "one", image)
    refused("there is no snapshot", "-a", "one", image)
    refused("Cannot mix", "-l", "-c", "one", image)
    refused("-U", "-U", "-c", "one", image)
    refused("255", "-c", "n" * 256, image)
    refused("Expecting one image", "-l")
    run("qemu-img", "create", "-q", "-f", "raw", tmp_path / "raw", "64k")
    refused("cannot be changed so", "-f", "raw", "-c", "one", tmp_path / "raw")
    assert ours("-l", "-f", "raw", tmp_path / "raw") == ""


def test_damage_is_refused(tmp_path):
    image = create(tmp_path / "a.qcow2")
    run("qemu-io", "-f", "qcow2", "-c", "write -P 1 0 64k", image)
    ours("-c", "one", image)
    sound = image.read_bytes()
    table = int.from_bytes(sound[64:72], "big")
    for at, value, text in (
        (table, (1 << 40).to_bytes(8, "big"), "cannot lie"),
        (table, (4096).to_bytes(8, "big"), "cannot lie"),
        (table + 8, (1 << 31).to_bytes(4, "big"), "cannot lie"),
        (table + 36, (5000).to_bytes(4, "big"), "damaged"),
        (table + 14, (65535).to_bytes(2, "big"), None),
    ):
        image.write_bytes(sound[:at] + value + sound[at + len(value):])
        damaged = image.read_bytes()
        refused(text or "", "-d", "one", image)
        refused(text or "", "-a", "1", image)
        assert image.read_bytes()[:len(damaged)] == damaged


def test_the_state_of_a_machine_stays(tmp_path):
    """It is listed, kept in the table, and left where it is."""
    image, raw = create(tmp_path / "a.qcow2"), tmp_path / "raw"
    run("qemu-io", "-f", "qcow2", "-c", "write -P 1 0 64k", image)
    theirs("-c", "one", image)
    data = bytearray(image.read_bytes())
    table = int.from_bytes(data[64:72], "big")
    data[table + 24:table + 32] = (3723004000000).to_bytes(8, "big") # the machine's clock
    data[table + 40:table + 48] = (123456).to_bytes(8, "big")
    image.write_bytes(data)
    entry = bytes(data[table:table + 64])
    ours("-c", "two", image)
    data = image.read_bytes()
    table = int.from_bytes(data[64:72], "big")
    assert data[table:table + 64] == entry
    assert "01:02:03.004" in ours("-l", image)
    must_be_sound(image)
    run("qemu-io", "-f", "qcow2", "-c", "write -P 2 0 64k", image)
    for options, told in (((), True), (("-q",), False)):
        ended = subprocess.run([CAIRN, "snapshot", *options, "-a", "one", image], capture_output=True, text=True,
                               timeout=60, check=True)
        assert ("state of a machine" in ended.stderr) == told
        assert content(image, raw)[0] == 1
        must_be_sound(image)
    ours("-d", "one", image)
    must_be_sound(image)
