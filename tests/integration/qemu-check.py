# SPDX-License-Identifier: Apache-2.0
"""`cairn check` beside `qemu-img check`: each kind of damage is found by both alike, mended by ours, and then both find nothing;
and so for images that were damaged at random places."""
import json
import os
import random
import shutil
import struct
import subprocess

import pytest
from image_support import peer_creates_encrypted

CAIRN = os.environ["CAIRN"]
SEED = int(os.environ.get("CAIRN_SEED", "1"))
DAMAGES = 150
SOUND, FAILED, CORRUPT, LEAKS, NOT_SUPPORTED = 0, 1, 2, 3, 63
COPIED = 1 << 63

for tool in ("qemu-img", "qemu-io"):
    if not shutil.which(tool):
        print(f"requires {tool}")
        pytest.skip(tool, allow_module_level=True)


def run(*command, ok=(0,)):
    done = subprocess.run(command, capture_output=True, check=False, timeout=120)
    assert done.returncode in ok, (command, done.returncode, done.stdout, done.stderr)
    return done


def verdict(program, path, *options):
    """Exit status, and the counts that it names."""
    done = subprocess.run([*program, "check", "-f", "qcow2", "--output=json", *options, path], capture_output=True, check=False,
                          timeout=120)
    assert done.returncode in (SOUND, FAILED, CORRUPT, LEAKS, NOT_SUPPORTED), done
    try:
        found = json.loads(done.stdout)
    except ValueError:
        found = {}
    for key in ("filename", "format"):
        found.pop(key, None)
    return done.returncode, found, done.stderr.decode()


def ours(path, *options):
    return verdict([CAIRN], path, *options)


def theirs(path, *options):
    return verdict(["qemu-img"], path, *options)


def u64(data, at):
    return int.from_bytes(data[at:at + 8].ljust(8, b"\0"), "big")


class Image:
    """An image of the peer's making, and where its metadata lies."""

    def __init__(self, path, options, *commands, size="1M", snapshots=(), bitmaps=()):
        self.path = str(path)
        run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, self.path, size)
        self.io(*commands)
        for name in snapshots:
            run("qemu-img", "snapshot", "-c", name, self.path)
            self.io("write -P 7 0 4k")
        for name in bitmaps:
            run("qemu-img", "bitmap", "--add", self.path, name)
        if bitmaps:
            self.io("write -P 9 8k 4k")
        self.look()

    def io(self, *commands):
        if commands:
            run("qemu-io", "-f", "qcow2", "-d", "unmap", *[x for c in commands for x in ("-c", c)], self.path)

    def look(self):
        with open(self.path, "rb") as f:
            data = self.data = f.read()
        self.cluster = 1 << struct.unpack_from(">I", data, 20)[0]
        self.l1, self.table = u64(data, 40), u64(data, 48)
        self.l2 = u64(data, self.l1) & 0xFFFFFFFFFFFE00
        self.block = u64(data, self.table)
        self.entry = u64(data, self.l2)
        self.l1_entry = u64(data, self.l1)
        self.snapshots = u64(data, 64)
        self.extension = data.find(struct.pack(">I", 0x23852875), 72, self.cluster)
        self.directory = u64(data, self.extension + 24) if self.extension > 0 else 0
        self.bitmap_table = u64(data, self.directory) if self.extension > 0 else 0

    def put(self, at, value, size=8):
        with open(self.path, "r+b") as f:
            f.seek(at)
            f.write(value.to_bytes(size, "big"))


def plain(path):
    return Image(path, "cluster_size=4k", "write -P 1 0 256k", "write -z 512k 64k")


def with_snapshots(path):
    return Image(path, "cluster_size=4k", "write -P 1 0 64k", snapshots=("one", "two"))


def with_bitmaps(path):
    return Image(path, "cluster_size=4k", "write -P 1 0 64k", bitmaps=("b0", "b1"))


def compressed(path):
    return Image(path, "cluster_size=64k", "write -c -P 1 0 256k", "write -P 1 512k 64k")


def extended(path):
    return Image(path, "cluster_size=64k,extended_l2=on", "write -P 1 0 8k", "write -P 2 128k 64k")


BEYOND = 1 << 30
# What is damaged, how, and how alike the two are: in all counts, in the exit status, or not at all (the peer cannot open it, or
# does not look for it).
COUNTS, STATUS, OURS_ALONE = range(3)
DAMAGE = {
    "data-beyond-end": (plain, lambda i: i.put(i.l2, i.entry + BEYOND), COUNTS),
    "data-misaligned": (plain, lambda i: i.put(i.l2, i.entry + 512), COUNTS),
    "data-reserved-low": (plain, lambda i: i.put(i.l2, i.entry | 2), COUNTS),
    "data-reserved-high": (plain, lambda i: i.put(i.l2, i.entry | 1 << 57), COUNTS),
    "data-not-copied": (plain, lambda i: i.put(i.l2, i.entry & ~COPIED), COUNTS),
    "data-used-twice": (plain, lambda i: i.put(i.l2 + 8, i.entry), COUNTS),
    "data-gone": (plain, lambda i: i.put(i.l2, 0), COUNTS),
    "data-on-l1": (plain, lambda i: i.put(i.l2, i.l1 | COPIED), COUNTS),
    "data-on-l2": (plain, lambda i: i.put(i.l2, i.l2 | COPIED), COUNTS),
    "data-on-refcounts": (plain, lambda i: i.put(i.l2, i.block | COPIED), STATUS),
    "l1-beyond-end": (plain, lambda i: i.put(i.l1, i.l1_entry + BEYOND), COUNTS),
    "l1-misaligned": (plain, lambda i: i.put(i.l1, i.l1_entry + 512), STATUS),
    "l1-reserved": (plain, lambda i: i.put(i.l1, i.l1_entry | 2), COUNTS),
    "l1-not-copied": (plain, lambda i: i.put(i.l1, i.l1_entry & ~COPIED), COUNTS),
    "l1-gone": (plain, lambda i: i.put(i.l1, 0), COUNTS),
    "l1-on-data": (plain, lambda i: i.put(i.l1, i.entry), STATUS),
    "l1-on-header": (plain, lambda i: i.put(i.l1, i.table | COPIED), STATUS),
    "table-beyond-end": (plain, lambda i: i.put(i.table, i.block + BEYOND), COUNTS),
    "table-misaligned": (plain, lambda i: i.put(i.table + 8, i.block + 512), COUNTS),
    "table-first-misaligned": (plain, lambda i: i.put(i.table, i.block + 512), OURS_ALONE),
    "table-reserved": (plain, lambda i: i.put(i.table, i.block | 2), STATUS),
    "table-empty": (plain, lambda i: i.put(i.table, 0), COUNTS),
    "table-block-twice": (plain, lambda i: i.put(i.table + 8, i.block), COUNTS),
    "table-on-data": (plain, lambda i: i.put(i.table, i.entry & ~COPIED), STATUS),
    "table-on-l2": (plain, lambda i: i.put(i.table + 8, i.l2), COUNTS),
    "table-lost": (plain, lambda i: i.put(48, i.cluster * 100000), OURS_ALONE),
    "refcount-low": (plain, lambda i: i.put(i.block + 2 * 8, 0), COUNTS),
    "refcount-high": (plain, lambda i: i.put(i.block + 2 * 8, 0x0003000200010001), COUNTS),
    "refcount-high-of-metadata": (plain, lambda i: i.put(i.block, 0x0001000100020001), COUNTS),
    "compressed-copied": (compressed, lambda i: i.put(i.l2, i.entry | COPIED), COUNTS),
    "compressed-beyond-end": (compressed, lambda i: i.put(i.l2, i.entry + BEYOND), COUNTS),
    "compressed-on-l1": (compressed, lambda i: i.put(i.l2, 1 << 62 | i.l1), STATUS),
    "subclusters-both": (extended, lambda i: i.put(i.l2 + 8, 0x300000003), COUNTS),
    "snapshot-l1-beyond-end": (with_snapshots, lambda i: i.put(i.snapshots, BEYOND), COUNTS),
    "snapshot-l1-misaligned": (with_snapshots, lambda i: i.put(i.snapshots, u64(i.data, i.snapshots) + 512), COUNTS),
    "snapshot-l1-too-large": (with_snapshots, lambda i: i.put(i.snapshots + 8, 5000000, 4), COUNTS),
    "snapshot-l1-is-active-l1": (with_snapshots, lambda i: i.put(i.snapshots, i.l1), STATUS),
    "snapshot-incomplete": (with_snapshots, lambda i: i.put(60, 3, 4), COUNTS),
    "snapshot-extra-huge": (with_snapshots, lambda i: i.put(i.snapshots + 36, BEYOND, 4), OURS_ALONE),
    "snapshot-table-misaligned": (with_snapshots, lambda i: i.put(64, i.snapshots + 512), OURS_ALONE),
    "snapshot-table-beyond-end": (with_snapshots, lambda i: i.put(64, BEYOND), STATUS),
    "bitmap-table-beyond-end": (with_bitmaps, lambda i: i.put(i.directory, BEYOND), COUNTS),
    "bitmap-data-beyond-end": (with_bitmaps, lambda i: i.put(i.bitmap_table, BEYOND), COUNTS),
    "bitmap-table-misaligned": (with_bitmaps, lambda i: i.put(i.directory, i.bitmap_table + 512), OURS_ALONE),
    "bitmap-table-reserved": (with_bitmaps, lambda i: i.put(i.bitmap_table, u64(i.data, i.bitmap_table) | 2), OURS_ALONE),
    "bitmap-flags": (with_bitmaps, lambda i: i.put(i.directory + 12, 0xF0, 4), OURS_ALONE),
    "bitmap-type": (with_bitmaps, lambda i: i.put(i.directory + 16, 7, 1), OURS_ALONE),
    "bitmap-without-name": (with_bitmaps, lambda i: i.put(i.directory + 18, 0, 2), OURS_ALONE),
    "bitmap-count": (with_bitmaps, lambda i: i.put(i.extension + 8, 3, 4), OURS_ALONE),
    "bitmap-directory-misaligned": (with_bitmaps, lambda i: i.put(i.extension + 24, i.directory + 512), OURS_ALONE),
    "bitmap-directory-beyond-end": (with_bitmaps, lambda i: i.put(i.extension + 24, BEYOND), OURS_ALONE),
    "bitmap-extension-reserved": (with_bitmaps, lambda i: i.put(i.extension + 12, 1, 4), OURS_ALONE),
    "bitmaps-not-kept": (with_bitmaps, lambda i: i.put(88, 0), COUNTS),
}


def assert_sound(path, what):
    status, found, text = theirs(path)
    assert status == SOUND, (what, found, text)
    status, found, text = ours(path)
    assert status == SOUND and not text, (what, found, text)


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_alike_and_mended(tmp_path, kind):
    make, harm, alike = DAMAGE[kind]
    image = make(tmp_path / "a.qcow2")
    assert_sound(image.path, "before")
    harm(image)
    their_status, their_counts, their_text = theirs(image.path)
    status, counts, text = ours(image.path)
    said = f"{counts}\n{text}\n--\n{their_counts}\n{their_text}"
    assert status in (CORRUPT, LEAKS), said
    if alike != OURS_ALONE:
        assert status == their_status, said
    if alike == COUNTS:
        assert counts == their_counts, said
    # Flags that are wrong alone are mended with leaks, and become right with refcounts that are too high.
    if status == CORRUPT and kind not in ("refcount-high", "data-not-copied", "l1-not-copied"):
        mended = ours(image.path, "-r", "leaks")
        assert mended[0] == CORRUPT and mended[1]["corruptions"] >= 1, mended
    status, counts, text = ours(image.path, "-r", "all")
    assert status == SOUND, (counts, text)
    assert counts.get("corruptions-fixed", 0) + counts.get("leaks-fixed", 0) > 0
    assert_sound(image.path, text)


def test_leaks_alone_are_mended_by_either_repair(tmp_path):
    for how in ("leaks", "all"):
        image = plain(tmp_path / how)
        image.put(image.l2, 0)
        status, counts, _ = ours(image.path, "-r", how)
        assert status == SOUND and counts["leaks-fixed"] == 1 and "corruptions-fixed" not in counts
        assert_sound(image.path, how)


def test_data_survive_a_repair(tmp_path):
    """What the damage did not touch reads as before; what shared a cluster with metadata, too."""
    for kind in ("table-empty", "table-on-data", "table-on-l2", "table-lost", "refcount-low", "data-not-copied", "data-used-twice",
                 "snapshot-l1-beyond-end", "bitmap-flags", "data-on-l1"):
        make, harm, _ = DAMAGE[kind]
        image = make(tmp_path / kind)
        before = str(tmp_path / "before")
        harm(image)
        if DAMAGE[kind][2] == OURS_ALONE:  # nothing else can read it: as it was before
            make(tmp_path / "sound")
            run("qemu-img", "convert", "-O", "raw", str(tmp_path / "sound"), before)
        else:
            run("qemu-img", "convert", "-O", "raw", image.path, before)
        assert ours(image.path, "-r", "all")[0] == SOUND
        after = str(tmp_path / "after")
        run("qemu-img", "convert", "-O", "raw", image.path, after)
        with open(before, "rb") as a, open(after, "rb") as b:
            was, now = a.read(), b.read()
        if kind == "data-on-l1":  # the table that it shared a cluster with has changed meanwhile
            was, now = was[4096:], now[4096:]
        assert was == now, kind


def test_snapshots_that_are_sound_stay(tmp_path):
    image = with_snapshots(tmp_path / "a.qcow2")
    image.put(image.snapshots, BEYOND)
    assert ours(image.path, "-r", "all")[0] == SOUND
    listed = run("qemu-img", "snapshot", "-l", image.path).stdout.decode()
    assert "two" in listed and "one" not in listed
    run("qemu-img", "snapshot", "-a", "two", image.path)
    assert_sound(image.path, "applied")


def test_images_with_all_features_are_sound(tmp_path):
    peer_creates_encrypted(tmp_path / "luks")
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={tmp_path}/raw", str(tmp_path / "data"), "1M")
    run("qemu-io", "-f", "qcow2", "-c", "write 0 128k", str(tmp_path / "data"))
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "compression_type=zstd", str(tmp_path / "zstd"), "1M")
    run("qemu-io", "-f", "qcow2", "-c", "write -c 0 128k", str(tmp_path / "zstd"))
    run("qemu-img", "create", "-q", "-f", "qcow2", str(tmp_path / "empty"), "0")
    run("qemu-img", "create", "-q", "-f", "qcow2", str(tmp_path / "huge"), "1P")
    for bits in (1, 2, 4, 8, 16, 32, 64):
        Image(tmp_path / f"bits{bits}", f"cluster_size=512,refcount_bits={bits}", "write 0 100k", "write 300k 1")
    Image(tmp_path / "v2", "compat=0.10,preallocation=metadata", snapshots=("a",))
    for make in (plain, with_snapshots, with_bitmaps, compressed, extended):
        make(tmp_path / make.__name__)
    names = sorted(p.name for p in tmp_path.iterdir() if p.name != "raw")
    for name in names:
        status, counts, text = ours(str(tmp_path / name))
        assert (status, text) == (SOUND, ""), (name, counts, text)
        if name != "luks":  # the peer wants the key
            assert counts == theirs(str(tmp_path / name))[1], name


def test_dirty_and_corrupt_marks_go_when_the_image_is_sound(tmp_path):
    for mark in (1, 2, 3):
        image = plain(tmp_path / str(mark))
        image.put(72, mark)
        image.put(image.block + 2 * 8, 0)
        assert ours(image.path)[0] == CORRUPT
        assert ours(image.path, "-r", "leaks")[0] == CORRUPT
        image.look()
        assert u64(image.data, 72) == mark
        assert ours(image.path, "-r", "all")[0] == SOUND
        image.look()
        assert u64(image.data, 72) == 0
        assert_sound(image.path, mark)


def printed(program, path, *options):
    done = run(*program, "check", *options, path, ok=(0, 1, 2, 3, 63))
    return done.returncode, done.stdout.decode(), sorted(done.stderr.decode().splitlines())


def test_text_is_the_peers(tmp_path):
    cases = [k for k in DAMAGE if DAMAGE[k][2] == COUNTS and not k.startswith(("snapshot", "bitmap"))]
    for kind in cases:
        make, harm, _ = DAMAGE[kind]
        image = make(tmp_path / kind)
        for damaged in (False, True):
            if damaged:
                harm(image)
            assert printed([CAIRN], image.path) == printed(["qemu-img"], image.path), kind
    leak = plain(tmp_path / "leak")
    leak.put(leak.l2, 0)
    shutil.copyfile(leak.path, tmp_path / "copy")
    assert printed([CAIRN], leak.path, "-r", "all")[:2] == printed(["qemu-img"], str(tmp_path / "copy"), "-r", "all")[:2]


def test_options(tmp_path):
    image = plain(tmp_path / "a.qcow2")
    raw = tmp_path / "raw"
    raw.write_bytes(bytes(65536))
    assert run(CAIRN, "check", "-q", image.path).stdout == b""
    assert run(CAIRN, "check", "--image-opts", f"driver=qcow2,file.filename={image.path}").returncode == SOUND
    assert run(CAIRN, "check", "--image-opts", f"driver=qcow2,file.driver=file,file.filename={image.path}").returncode == SOUND
    assert run(CAIRN, "check", f'json:{{"driver":"qcow2","file":{{"driver":"file","filename":"{image.path}"}}}}').returncode == SOUND
    run(CAIRN, "check", str(raw), ok=(NOT_SUPPORTED,))
    run(CAIRN, "check", "-f", "raw", image.path, ok=(NOT_SUPPORTED,))
    for wrong in (["-r", "some"], ["--output", "xml"], ["-T", "none"], ["--object", "secret,id=s"], ["-x"],
                  ["-f", "qcow2", "--image-opts"], ["-f", "qcow2", str(tmp_path / "nowhere")], ["-f", "qcow2", str(raw)]):
        done = run(CAIRN, "check", *wrong, *([] if wrong[-1].startswith("/") else [image.path]), ok=(FAILED,))
        assert done.stderr.startswith(b"cairn: ") and done.stdout == b"", wrong
    run(CAIRN, "check", "--image-opts", f"driver=qcow2,file.filename={image.path},lazy-refcounts=on", ok=(FAILED,))
    assert b"Exit status" in run(CAIRN, "check", "--help").stdout


def test_an_image_in_use_is_not_checked(tmp_path):
    image = plain(tmp_path / "a.qcow2")
    with subprocess.Popen(["qemu-io", "-f", "qcow2", image.path], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as user:
        user.stdin.write(b"read 0 512\n")
        user.stdin.flush()
        user.stdout.readline()
        try:
            assert b"another process" in run(CAIRN, "check", image.path, ok=(FAILED,)).stderr
            run(CAIRN, "check", "-r", "all", image.path, ok=(FAILED,))
            run(CAIRN, "check", "-U", image.path)
        finally:
            user.stdin.close()
            user.wait()


SHAPES = ["cluster_size=512", "cluster_size=512,refcount_bits=1", "cluster_size=4k,refcount_bits=8", "cluster_size=64k",
          "cluster_size=1k,compat=0.10", "cluster_size=4k,refcount_bits=64", "cluster_size=16k,extended_l2=on"]


def make_random(path, rng, number):
    shape = SHAPES[number % len(SHAPES)]
    size = 256 << 10
    narrow = "refcount_bits=1" in shape
    commands = [] if narrow or rng.random() < 0.6 else ["write -c -P 5 0 64k"]
    for _ in range(rng.randrange(1, 12)):
        at = rng.randrange(size)
        kind = rng.choice(["write -P %d" % rng.randrange(1, 256)] * 3 + ["write -z", "write -zu", "discard"])
        commands.append(f"{kind} {at} {rng.randrange(1, min(size - at, 60000) + 1)}")
    snapshots = ("s", "t") if not narrow and rng.random() < 0.4 else ()
    return Image(path, shape, *commands, size=str(size), snapshots=snapshots)


def harm_at_random(image, rng):
    """Changes an entry of the metadata; says what."""
    image.look()
    size = len(image.data)
    tables = [image.l1, image.l2, image.l2, image.table, image.block, image.snapshots or image.l1]
    table = rng.choice([t for t in tables if 0 < t < size])
    entries = [a for a in range(table, min(table + image.cluster, size - 8), 8) if u64(image.data, a)]
    at = rng.choice(entries or [table])
    value = u64(image.data, at)
    kind = rng.randrange(6)
    if kind == 0:
        value ^= 1 << rng.randrange(64)
    elif kind == 1:
        value ^= COPIED
    elif kind == 2:
        value = 0
    elif kind == 3:
        value = u64(image.data, rng.choice(entries or [table]))
    elif kind == 4:
        value += image.cluster * rng.randrange(1, 20)
    else:
        value = rng.randrange(size // image.cluster) * image.cluster | rng.choice([0, COPIED])
    image.put(at, value & (1 << 64) - 1)
    return f"{at:#x} (table {table:#x}): {u64(image.data, at):#x} -> {value:#x}"




def test_random_damage_is_mended(tmp_path):
    rng = random.Random(SEED)
    alike = seen = mended = 0
    for i in range(DAMAGES):
        path = tmp_path / "image"
        if i % 5 == 0:
            make_random(tmp_path / "sound", rng, i // 5)
        shutil.copyfile(tmp_path / "sound", path)
        image = Image.__new__(Image)
        image.path = str(path)
        what = [harm_at_random(image, rng) for _ in range(rng.choice([1, 1, 1, 2, 3]))]
        their_status, their_counts, their_text = theirs(str(path))
        status, counts, text = ours(str(path))
        said = f"{i}: {what}\n{counts}\n{text}\n--\n{their_counts}\n{their_text}"
        if FAILED not in (status, their_status):
            seen += 1
            alike += status == their_status
            # We see more at times, never less.
            assert status == their_status or status == CORRUPT, said
        shutil.copyfile(path, tmp_path / "harmed")
        if status == FAILED:
            continue
        status, counts, text = ours(str(path), "-r", "all")
        assert status == SOUND, f"{said}\n== {counts}\n{text}"
        mended += 1
        assert_sound(str(path), said + text)
    print(f"seed {SEED}: {seen} judged by both, {alike} alike, {mended} of {DAMAGES} mended")
    assert alike > seen * 0.9 and mended > DAMAGES * 0.8
