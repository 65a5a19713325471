# SPDX-License-Identifier: Apache-2.0
"""The judge of qcow2 images that other tests rely on (tests/support/qcow2-check.c) against qemu-img check: on sound images, and
on images that were damaged at random places of their metadata."""
import json
import os
import random
import shutil
import struct
import subprocess

import pytest

JUDGE = os.path.join(os.environ["CAIRN_BUILD"], "tests/qcow2-check")
SEED = int(os.environ.get("CAIRN_SEED", "1"))
DAMAGES = 400

for tool in ("qemu-img", "qemu-io"):
    if not shutil.which(tool):
        print(f"requires {tool}")
        pytest.skip(tool, allow_module_level=True)

SOUND, LEAKS, ERRORS, NOT_JUDGED = range(4)
SHAPES = [
    "cluster_size=512",
    "cluster_size=512,refcount_bits=1",
    "cluster_size=512,refcount_bits=64",
    "cluster_size=1k,compat=0.10",
    "cluster_size=4k,refcount_bits=2",
    "cluster_size=4k,refcount_bits=8,preallocation=metadata",
    "cluster_size=64k",
    "cluster_size=64k,compat=0.10,preallocation=metadata",
    "cluster_size=2M,refcount_bits=32",
    "cluster_size=16k,compression_type=zstd",
]


def run(*command, ok=(0,)):
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    assert done.returncode in ok, (command, done.returncode, done.stdout)
    return done


def judge(path):
    done = run(JUDGE, path, ok=(SOUND, LEAKS, ERRORS, NOT_JUDGED))
    return done.returncode, done.stdout.decode()


def said_alone(text):
    """Is what was found only what qemu-img does not look for? Refcounts beyond the end of the file, OFLAG_COPIED on entries
    without a cluster, zero flags in version 2."""
    words = text.split("\n")[0].split()
    counts = dict(zip(words[::2], map(int, words[1::2])))
    return counts["errors"] == counts["nowhere"] + counts["zero_v2"] and counts["leaks"] == counts["leaks_beyond"]


def qemu(path):
    done = subprocess.run(["qemu-img", "check", "-f", "qcow2", "--output=json", path], capture_output=True, check=False)
    verdict = {0: SOUND, 3: LEAKS, 2: ERRORS}.get(done.returncode, NOT_JUDGED)
    return verdict, (done.stdout + done.stderr).decode()


def field(path, offset, kind):
    with open(path, "rb") as f:
        f.seek(offset)
        return struct.unpack(">" + kind, f.read(struct.calcsize(kind)))[0]


def make(path, shape, rng, size=1 << 20):
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", shape, path, str(size))
    cluster = 1 << field(path, 20, "I")
    commands = []
    if "preallocation" not in shape:  # the peer compresses only what has no cluster yet
        for guest in rng.sample(range(0, size, cluster), min(rng.randrange(6), size // cluster)):
            commands += ["-c", f"write -c -P {rng.randrange(256)} {guest} {min(cluster, size - guest)}"]
    for _ in range(rng.randrange(1, 12)):
        offset = rng.randrange(size)
        length = rng.randrange(1, min(size - offset, 100000) + 1)
        kind = rng.choice(["write -P %d" % rng.randrange(1, 256)] * 3 + ["write -z", "write -zu", "discard"])
        commands += ["-c", f"{kind} {offset} {length}"]
    run("qemu-io", "-f", "qcow2", "-d", "unmap", *commands, path)


@pytest.mark.parametrize("shape", SHAPES)
def test_sound_images_are_sound_and_read_the_same(tmp_path, shape):
    rng = random.Random(f"{SEED} {shape}")
    image, raw = str(tmp_path / "a.qcow2"), str(tmp_path / "a.raw")
    for _ in range(4):
        make(image, shape, rng)
        assert qemu(image)[0] == SOUND
        assert judge(image)[0] == SOUND, judge(image)
        run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, raw)
        with open(raw, "rb") as f:
            assert run(JUDGE, "--read", image).stdout == f.read()


def test_chains_read_the_same(tmp_path):
    rng = random.Random(SEED)
    images = [str(tmp_path / f"{i}.qcow2") for i in range(4)]
    make(images[0], "cluster_size=4k", rng, 500 << 10)  # smaller than what lies above it
    for below, image in zip(images, images[1:]):
        make(image, rng.choice(["cluster_size=512", "cluster_size=64k"]) + f",backing_file={below},backing_fmt=qcow2", rng)
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", images[-1], str(tmp_path / "raw"))
    assert run(JUDGE, "--read", *reversed(images)).stdout == (tmp_path / "raw").read_bytes()


class Image:
    """The places of an image's metadata, for who wants to damage it."""

    def __init__(self, data):
        self.data = data
        (self.version,) = struct.unpack(">I", data[4:8])
        (self.bits,) = struct.unpack(">I", data[20:24])
        self.cluster = 1 << self.bits
        l1_size, self.l1, self.table, self.table_clusters = struct.unpack(">IQQI", data[36:60])
        self.l1_entries = [self.l1 + 8 * i for i in range(l1_size)]
        self.table_entries = [self.table + 8 * i for i in range(self.table_clusters * self.cluster // 8)]
        self.l2_tables = [self.entry(e) & 0xFFFFFFFFFFFE00 for e in self.l1_entries]
        self.blocks = [self.entry(e) for e in self.table_entries]

    def entry(self, offset):
        return struct.unpack(">Q", self.data[offset:offset + 8].ljust(8, b"\0"))[0]


def damage(path, rng):
    """Changes a few bytes of metadata; says what."""
    with open(path, "r+b") as f:
        image = Image(f.read())
        l2 = [t + 8 * rng.randrange(image.cluster // 8) for t in image.l2_tables if t]
        used_l2 = [t + 8 * i for t in image.l2_tables if t for i in range(image.cluster // 8) if image.entry(t + 8 * i)]
        blocks = [b + rng.randrange(min(image.cluster, 64)) for b in image.blocks if b]
        used_entries = [e for e in image.l1_entries + image.table_entries if image.entry(e)]
        place = rng.choice([l2, used_l2, used_l2, blocks, blocks, used_entries])
        if not place:
            return None
        at = rng.choice(place)
        value = image.entry(at)
        kind = rng.randrange(6)
        if place is blocks:
            f.seek(at)
            f.write(bytes([rng.choice([0, 1, 2, image.data[at] ^ 1 << rng.randrange(8)])]))
            return f"refcounts at {at:#x}"
        if kind == 0:
            value ^= 1 << rng.randrange(64)
        elif kind == 1:
            value ^= 1 << 63
        elif kind == 2:
            value = 0
        elif kind == 3:
            other = rng.choice(used_l2 or used_entries)
            value = image.entry(other)
        elif kind == 4:
            value += image.cluster * rng.randrange(1, 20)
        else:
            value += 512
        f.seek(at)
        f.write(struct.pack(">Q", value & (1 << 64) - 1))
        return f"entry at {at:#x} from {image.entry(at):#x} to {value:#x}"


def test_damaged_images_are_judged_alike(tmp_path):
    rng = random.Random(SEED)
    sound, image = str(tmp_path / "sound"), str(tmp_path / "image")
    counts = [0] * 4
    for i in range(DAMAGES):
        if i % 8 == 0:
            make(sound, SHAPES[i // 8 % len(SHAPES)], rng, 256 << 10)
        shutil.copyfile(sound, image)
        what = damage(image, rng)
        (theirs, their_text), (ours, our_text) = qemu(image), judge(image)
        if NOT_JUDGED not in (theirs, ours):
            expected = SOUND if said_alone(our_text) else ours
            assert theirs == expected, f"{i}: {what}\n{their_text}\n{our_text}"
        counts[ours] += 1
    print(f"sound {counts[SOUND]}, leaks {counts[LEAKS]}, errors {counts[ERRORS]}, not judged {counts[NOT_JUDGED]}")
    assert counts[LEAKS] > DAMAGES // 40 and counts[ERRORS] > DAMAGES // 4
