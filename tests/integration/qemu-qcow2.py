# SPDX-License-Identifier: Apache-2.0
"""qcow2 images between QEMU's programs and cairnd, both ways: they write and we read, we write and they read and check, in
turns; what is where; locks; and what is refused rather than misread."""
import json
import os
import random
import shutil
import signal
import struct
import subprocess

import nbd
import pytest
from image_support import peer_creates_encrypted
from nbd_support import Daemon, QmpError, wait_until

for tool in ("qemu-img", "qemu-io", "qemu-nbd", "qemu-storage-daemon"):
    if not shutil.which(tool):
        print(f"requires {tool}")
        pytest.skip(tool, allow_module_level=True)

JUDGE = os.path.join(os.environ["CAIRN_BUILD"], "tests/qcow2-check")
SEED = int(os.environ.get("CAIRN_SEED", "1"))
MIB = 1 << 20
SIZE = 8 * MIB

SHAPES = [
    "cluster_size=512",
    "cluster_size=512,refcount_bits=1",
    "cluster_size=1k,compat=0.10",
    "cluster_size=4k,refcount_bits=64",
    "cluster_size=4k,preallocation=metadata",
    "cluster_size=64k",
    "cluster_size=64k,preallocation=falloc",
    "cluster_size=64k,compat=0.10,preallocation=full",
    "cluster_size=64k,lazy_refcounts=on",
    "cluster_size=2M,refcount_bits=8",
    "cluster_size=16k,extended_l2=on",
    "cluster_size=128k,extended_l2=on,refcount_bits=1",
    "cluster_size=32k,extended_l2=on,data_file=@",
    "cluster_size=64k,extended_l2=on,preallocation=metadata",
    "cluster_size=64k,data_file=@",
    "cluster_size=512,data_file=@",
    "cluster_size=4k,data_file=@,data_file_raw=on",
]


def run(*words, status=0, env=None):
    ended = subprocess.run([str(word) for word in words], capture_output=True, timeout=120, check=False, env=env)
    assert ended.returncode == status, (words, ended.returncode, ended.stdout[-2000:], ended.stderr)
    return ended.stdout


def create(path, options="cluster_size=64k", size=SIZE):
    """`@` is a file beside it."""
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options.replace("@", f"{path}.data"), path, size)
    return path


def over(path, below, options, size=SIZE):
    return create(path, f"{options},backing_file={below},backing_fmt=qcow2", size)


def choose(rng, size):
    """A range, often aligned to something, seldom long."""
    offset = rng.randrange(size)
    length = rng.choice([1, 512, 4096, 65536, rng.randrange(1, 100000), rng.randrange(1, 700000)])
    if rng.random() < 0.5:
        offset -= offset % rng.choice([512, 4096, 65536])
    return offset, min(length, size - offset)


def they_write(path, rng, count=30, size=SIZE):
    commands = []
    for _ in range(count):
        offset, length = choose(rng, size)
        kind = rng.choice([f"write -P {rng.randrange(1, 256)}"] * 4 + ["write -z", "write -zu", "discard"])
        commands += ["-c", f"{kind} {offset} {length}"]
    run("qemu-io", "-f", "qcow2", "-d", "unmap", *commands, path)


def they_read(path, raw):
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, raw)
    with open(raw, "rb") as f:
        return f.read()


def must_be_sound(*paths):
    for path in paths:
        run("qemu-img", "check", "-f", "qcow2", path)
        run(JUDGE, path)


def node(name, path, backing=None, **more):
    """Options of a node over a chain of files: `backing` is a list of paths, the next lower one first."""
    options = {"driver": "qcow2", "node_name": name, "discard": "unmap", **more,
               "file": {"driver": "file", "filename": str(path)}}
    below = None
    for lower in reversed(backing or []):
        below = {"driver": "qcow2", "file": {"driver": "file", "filename": str(lower)}, "backing": below}
    options["backing"] = below
    return options


class Disk:
    """A disk that cairnd serves, and a client of it."""

    def __init__(self, daemon, path, backing=None, name="disk", writable=True):
        self.daemon = daemon
        self.name = name
        daemon.qmp("blockdev-add", **node(name, path, backing, **({} if writable else {"read_only": True})))
        daemon.export(name, writable=writable)
        self.nbd = nbd.NBD()
        self.nbd.add_meta_context("base:allocation")
        self.nbd.connect_uri(daemon.uri(name))
        self.size = self.nbd.get_size()

    def read_all(self):
        return b"".join(self.nbd.pread(min(MIB, self.size - at), at) for at in range(0, self.size, MIB))

    def close(self):
        self.nbd.shutdown()
        wait_until(lambda: not self.daemon.clients(self.name))
        self.daemon.qmp("block-export-del", id=f"e-{self.name}")
        wait_until(lambda: not self.daemon.qmp("query-block-exports"))
        self.daemon.qmp("blockdev-del", node_name=self.name)

    def __enter__(self):
        return self

    def __exit__(self, kind, *rest):
        if kind is None:
            self.close()


def we_write(disk, flat, rng, count=60):
    for _ in range(count):
        offset, length = choose(rng, disk.size)
        kind = rng.randrange(8)
        if kind < 4:
            data = bytes([rng.randrange(1, 256)]) * length if kind < 3 else rng.randbytes(length)
            disk.nbd.pwrite(data, offset, nbd.CMD_FLAG_FUA if rng.random() < 0.1 else 0)
            flat[offset:offset + length] = data
        elif kind == 4:
            disk.nbd.zero(length, offset, nbd.CMD_FLAG_NO_HOLE if rng.random() < 0.5 else 0)
            flat[offset:offset + length] = bytes(length)
        elif kind == 5:
            disk.nbd.trim(length, offset)
            data = disk.nbd.pread(length, offset)
            assert all(new in (0, old) for new, old in zip(data, flat[offset:offset + length]))
            flat[offset:offset + length] = data
        elif kind == 6:
            disk.nbd.flush()
        else:
            assert disk.nbd.pread(length, offset) == flat[offset:offset + length]


@pytest.fixture
def daemon():
    with Daemon() as d:
        yield d


# ---- contents ----


@pytest.mark.parametrize("shape", SHAPES)
def test_they_write_and_we_read(daemon, tmp_path, shape):
    rng = random.Random(f"{SEED} {shape}")
    image = create(tmp_path / "a.qcow2", shape)
    they_write(image, rng)
    expected = they_read(image, tmp_path / "raw")
    before = image.read_bytes()
    with Disk(daemon, image, writable=False) as disk:
        assert disk.read_all() == expected
    assert image.read_bytes() == before
    with Disk(daemon, image) as disk:
        assert disk.read_all() == expected
    must_be_sound(image)
    assert they_read(image, tmp_path / "raw") == expected


@pytest.mark.parametrize("shape", SHAPES)
def test_we_write_and_they_read(daemon, tmp_path, shape):
    rng = random.Random(f"{SEED} {shape}")
    image = create(tmp_path / "a.qcow2", shape)
    flat = bytearray(SIZE)
    with Disk(daemon, image) as disk:
        we_write(disk, flat, rng)
        assert disk.read_all() == flat
    must_be_sound(image)
    assert they_read(image, tmp_path / "raw") == flat
    assert run(JUDGE, "--read", image) == flat
    if "data_file_raw" in shape:
        assert (tmp_path / "a.qcow2.data").read_bytes() == flat


@pytest.mark.parametrize("seed", range(4))
def test_in_turns_on_a_chain(daemon, tmp_path, seed):
    rng = random.Random(f"{SEED} {seed}")
    images = [create(tmp_path / "0.qcow2", rng.choice(SHAPES), rng.choice([SIZE, SIZE // 2 + 512]))]
    they_write(images[0], rng, size=SIZE // 2)
    for i in range(1, 4):
        images.append(over(tmp_path / f"{i}.qcow2", images[-1], rng.choice(["cluster_size=512", "cluster_size=4k", "cluster_size=64k", "cluster_size=64k,compat=0.10",
                                                                               "cluster_size=64k,extended_l2=on", "cluster_size=64k,data_file=@,extended_l2=on"])))
        they_write(images[-1], rng, 15)
    below = [path.read_bytes() for path in images[:-1]]
    top, *backing = reversed(images)
    for _ in range(3):
        flat = bytearray(they_read(top, tmp_path / "raw"))
        with Disk(daemon, top, backing) as disk:
            assert disk.read_all() == flat
            we_write(disk, flat, rng, 30)
            assert disk.read_all() == flat
        must_be_sound(top)
        assert they_read(top, tmp_path / "raw") == flat
        they_write(top, rng, 10)
        must_be_sound(top)
    assert [path.read_bytes() for path in images[:-1]] == below


def test_their_servers_serve_what_we_wrote(daemon, tmp_path):
    rng = random.Random(SEED)
    base = create(tmp_path / "base.qcow2", "cluster_size=4k")
    they_write(base, rng)
    image = over(tmp_path / "a.qcow2", base, "cluster_size=64k")
    flat = bytearray(they_read(image, tmp_path / "raw"))
    with Disk(daemon, image, [base]) as disk:
        we_write(disk, flat, rng)
    sock = tmp_path / "s"
    servers = [
        ["qemu-nbd", "-f", "qcow2", "-k", sock, "-r", "-t", "-x", "e", image],
        ["qemu-storage-daemon", "--blockdev",
         f"driver=qcow2,node-name=n,read-only=on,file.driver=file,file.filename={image}",
         "--nbd-server", f"addr.type=unix,addr.path={sock}", "--export", "type=nbd,id=e,node-name=n,name=e"],
    ]
    for words in servers:
        process = subprocess.Popen([str(word) for word in words])
        try:
            assert wait_until(sock.exists)
            assert run("nbdcopy", f"nbd+unix:///e?socket={sock}", "-") == flat
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(20)
        if sock.exists():
            sock.unlink()


def test_qemu_io_writes_through_us(daemon, tmp_path):
    image = create(tmp_path / "a.qcow2", "cluster_size=4k")
    with Disk(daemon, image) as disk:
        run("qemu-io", "-f", "raw", "-d", "unmap", "-c", "write -P 1 1000 70000", "-c", "write -z 8k 8k", "-c", "discard 32k 8k",
            "-c", "write -P 2 -f 40k 100", "-c", "read -P 1 1000 7192", "-c", "flush", daemon.uri("disk"))
        assert disk.nbd.pread(100, 40 << 10) == b"\2" * 100
    must_be_sound(image)
    run("qemu-io", "-f", "qcow2", "-c", "read -P 1 1000 7192", "-c", "read -P 0 8k 8k", "-c", "read -P 2 40k 100", image)


# ---- what is where ----


def states_of_image(path):
    """Of each 512 bytes: does it read as zeroes, by the metadata?"""
    states = []
    for extent in json.loads(run("qemu-img", "map", "--output=json", "-f", "qcow2", path)):
        states += [extent["zero"]] * (extent["length"] // 512)
    return states


def states_by_nbd(disk):
    states = []
    at = 0

    def add(context, offset, entries, error):
        nonlocal at
        assert context == "base:allocation" and offset == at
        for length, flags in zip(entries[::2], entries[1::2]):
            assert length % 512 == 0
            states.extend([bool(flags & nbd.STATE_ZERO)] * (length // 512))
            at += length

    while at < disk.size:
        disk.nbd.block_status(disk.size - at, at, add)
    return states[:disk.size // 512]


def test_holes_are_where_qemu_img_map_sees_them(daemon, tmp_path):
    rng = random.Random(SEED)
    base = create(tmp_path / "base.qcow2", "cluster_size=4k", SIZE // 2)
    image = over(tmp_path / "a.qcow2", base, "cluster_size=64k")
    for path, size in ((base, SIZE // 2), (image, SIZE)):
        commands = []
        for _ in range(20):
            offset, length = choose(rng, size)
            offset -= offset % 65536
            kind = rng.choice(["write -P 7", "write -P 7", "write -z"])
            commands += ["-c", f"{kind} {offset} {min(1 + length // 65536, (size - offset) // 65536) * 65536}"]
        run("qemu-io", "-f", "qcow2", *commands, path)
    expected = states_of_image(image)
    with Disk(daemon, image, [base], writable=False) as disk:
        assert states_by_nbd(disk) == expected
    assert True in expected and False in expected


# ---- locks ----


def refusal(daemon, **options):
    with pytest.raises(QmpError) as error:
        daemon.qmp("blockdev-add", **options)
    return str(error.value)


def test_locks_exclude_writers(daemon, tmp_path):
    image = create(tmp_path / "a.qcow2")
    with Disk(daemon, image):
        ended = subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write 0 4k", str(image)], capture_output=True, check=False)
        assert ended.returncode == 1 and b"lock" in ended.stderr + ended.stdout
        ended = subprocess.run(["qemu-img", "check", "-f", "qcow2", str(image)], capture_output=True, check=False)
        assert ended.returncode == 1 and b"lock" in ended.stderr
        run("qemu-img", "info", "-U", image)
    with subprocess.Popen(["qemu-io", "-f", "qcow2", str(image)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as peer:
        peer.stdin.write(b"write 0 4k\n")
        peer.stdin.flush()
        line = b""
        while b"wrote" not in line:
            line = peer.stdout.readline()
        # A format with metadata wants nobody else to write, even to read.
        for options in ({}, {"read_only": True}):
            assert "another process" in refusal(daemon, **node("n", image, **options))
        peer.stdin.close()
    with Disk(daemon, image, writable=False), Disk(daemon, image, name="other", writable=False):
        run("qemu-io", "-r", "-f", "qcow2", "-c", "read 0 4k", image)


# ---- what is refused ----


def patch(path, offset, fmt, *values):
    with open(path, "r+b") as f:
        f.seek(offset)
        f.write(struct.pack(">" + fmt, *values))


def field(path, offset, fmt):
    with open(path, "rb") as f:
        f.seek(offset)
        return struct.unpack(">" + fmt, f.read(struct.calcsize(fmt)))[0]


def with_feature_names(path, incompatible, names):
    """Sets an incompatible bit, in an image whose feature name table says these names: [(type, bit, name)]."""
    table = b"".join(struct.pack(">BB46s", kind, bit, name) for kind, bit, name in names)
    patch(path, 104 if field(path, 100, "I") == 104 else 112, "II", 0x6803F857, len(table))
    with open(path, "r+b") as f:
        f.seek(field(path, 100, "I") + 8)
        f.write(table + bytes(8))
    patch(path, 72, "Q", incompatible)


def left_dirty(path):
    create(path, "lazy_refcounts=on")
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write 0 1M", "-c", "abort"], stdout=subprocess.DEVNULL,
                   stderr=subprocess.DEVNULL, check=False)
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write 0 1M", "-c", "abort", str(path)], stdout=subprocess.DEVNULL,
                   stderr=subprocess.DEVNULL, check=False)
    if not field(path, 72, "Q") & 1:  # this version cleans up when it aborts
        patch(path, 72, "Q", 1)


def marked(offset, fmt, value):
    def make(path):
        create(path)
        patch(path, offset, fmt, value)
    return make


def of(options):
    return lambda path: create(path, options)


def with_data_file(path):
    create(path, f"data_file={path}.data")
    os.unlink(f"{path}.data")


def with_unknown_feature(path):
    create(path)
    with_feature_names(path, 1 << 37, [(1, 37, b"not this one"), (0, 37, b"time travel"), (2, 37, b"nor this")])


def with_snapshot(path):
    create(path)
    run("qemu-io", "-f", "qcow2", "-c", "write -P 3 0 1M", path)
    run("qemu-img", "snapshot", "-c", "one", path)


REFUSED = {
    "encrypted": (peer_creates_encrypted, "encrypt"),
    "data-file-is-gone": (with_data_file, "data-file"),
    "corrupt": (marked(72, "Q", 2), "corrupt"),
    "unknown": (with_unknown_feature, "time travel"),
    "unknown-without-name": (marked(72, "Q", 1 << 62), "62"),
    "version": (marked(4, "I", 4), "4"),
    "magic": (marked(0, "I", 0x514649FA), "qcow2"),
    "cluster-bits": (marked(20, "I", 40), "cluster"),
    "l1-too-small": (marked(36, "I", 0), "L1"),
    "refcount-table-nowhere": (marked(48, "Q", 1 << 60), "refcount"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_a_clear_line(daemon, tmp_path, case):
    make, text = REFUSED[case]
    image = tmp_path / "a.qcow2"
    make(image)
    before = image.read_bytes()
    said = refusal(daemon, **node("disk", image))
    assert text.lower() in said.lower() and "\n" not in said, said
    assert "'disk'" in said or str(image) in said
    assert image.read_bytes() == before


def test_dirty_image_is_repaired_by_the_open(tmp_path):
    image = tmp_path / "a.qcow2"
    left_dirty(image)
    assert field(image, 72, "Q") & 1
    with Daemon() as daemon:
        daemon.expected = ["not closed in order"]
        with Disk(daemon, image) as disk:
            assert disk.nbd.pread(4096, 0) == b"\xcd" * 4096
            disk.nbd.pwrite(b"\7" * 4096, 65536)
    assert not field(image, 72, "Q") & 1
    must_be_sound(image)


def test_snapshots_keep_what_they_hold(daemon, tmp_path):
    image = tmp_path / "a.qcow2"
    with_snapshot(image)
    with Disk(daemon, image) as disk:
        disk.nbd.pwrite(b"\4" * 100000, 200000)
        disk.nbd.trim(65536, 0)
        disk.nbd.zero(65536, 524288)
        disk.nbd.zero(65536, 655360, nbd.CMD_FLAG_NO_HOLE)
        disk.nbd.flush()
        disk.nbd.pwrite(b"\5" * 4096, 655360)
        now = disk.nbd.pread(2 * MIB, 0)
    run("qemu-img", "check", "-f", "qcow2", image)
    assert they_read(image, tmp_path / "out")[:2 * MIB] == now
    run("qemu-img", "snapshot", "-a", "one", image)
    assert they_read(image, tmp_path / "out")[:MIB] == b"\3" * MIB
    run("qemu-img", "check", "-f", "qcow2", image)


@pytest.mark.parametrize("options", ["cluster_size=64k", "compression_type=zstd", "cluster_size=512", "cluster_size=2M",
                                     "compat=0.10"])
def test_compressed_clusters_are_read_and_written_over(daemon, tmp_path, options):
    rng = random.Random(options)
    expected = bytearray(b"".join(bytes([rng.randrange(256)]) * rng.randrange(1, 400) for _ in range(20000))[:3 * MIB])
    raw, image = tmp_path / "raw", tmp_path / "a.qcow2"
    raw.write_bytes(expected)
    run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, raw, image)
    with Disk(daemon, image) as disk:
        assert disk.nbd.pread(len(expected), 0) == expected
        for _ in range(30):
            offset, length = rng.randrange(len(expected) - 70000), rng.randrange(1, 70000)
            expected[offset:offset + length] = data = rng.randbytes(length)
            disk.nbd.pwrite(data, offset)
        disk.nbd.zero(300000, 1000000)
        expected[1000000:1300000] = bytes(300000)
        disk.nbd.flush()
        disk.nbd.pwrite(b"x" * 65536, 1048576)
        expected[1048576:1048576 + 65536] = b"x" * 65536
        assert disk.nbd.pread(len(expected), 0) == expected
    run("qemu-img", "check", "-f", "qcow2", image)
    assert they_read(image, tmp_path / "out")[:len(expected)] == expected


def test_compressed_data_that_is_damaged_is_an_error(tmp_path):
    raw, image = tmp_path / "raw", tmp_path / "a.qcow2"
    raw.write_bytes(random.Random(1).randbytes(1000) * 66 + bytes(MIB))
    run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", raw, image)
    entry = field(image, field(image, field(image, 40, "Q"), "Q") & 0xFFFFFFFFFFFE00, "Q")
    patch(image, entry & (1 << 54) - 1, "Q", 0x0707070707070707)
    with Daemon() as d:
        d.expected = ["does not decompress"]
        with Disk(d, image) as disk:
            with pytest.raises(nbd.Error):
                disk.nbd.pread(512, 0)
            assert disk.nbd.pread(65536, MIB - 65536) == bytes(65536)


@pytest.mark.parametrize("bits", [1 << 7, 1 << 63 | 1 << 20])
def test_unknown_autoclear_bits(daemon, tmp_path, bits):
    image = create(tmp_path / "a.qcow2")
    patch(image, 88, "Q", bits)
    with Disk(daemon, image, writable=False):
        pass
    assert field(image, 88, "Q") == bits
    with Disk(daemon, image):
        assert field(image, 88, "Q") == 0
    assert field(image, 88, "Q") == 0
    must_be_sound(image)


def test_header_that_names_no_format_is_refused(daemon, tmp_path):
    create(tmp_path / "base.qcow2")
    image = over(tmp_path / "a.qcow2", "base.qcow2", "cluster_size=64k")
    at = 112
    while field(image, at, "I") != 0xE2792ACA:
        at += 8 + (field(image, at + 4, "I") + 7) // 8 * 8
    patch(image, at, "I", 0x12345678)  # unknown extensions are to be ignored
    options = node("n", image)
    del options["backing"]
    assert "format" in refusal(daemon, **options)
    daemon.qmp("blockdev-add", **node("n", image, [tmp_path / "base.qcow2"]))
    daemon.qmp("blockdev-del", node_name="n")


def test_backing_file_that_the_image_names(daemon, tmp_path):
    rng = random.Random(SEED)
    base = create(tmp_path / "base.qcow2")
    they_write(base, rng)
    image = over(tmp_path / "a.qcow2", "base.qcow2", "cluster_size=64k")
    expected = they_read(image, tmp_path / "raw")
    options = node("disk", image)
    del options["backing"]
    daemon.qmp("blockdev-add", **options)
    daemon.export("disk")
    client = nbd.NBD()
    client.connect_uri(daemon.uri("disk"))
    assert b"".join(client.pread(MIB, at) for at in range(0, SIZE, MIB)) == expected
    client.shutdown()


@pytest.mark.parametrize("name", ["/etc/passwd", "json:{\"driver\":\"file\",\"filename\":\"/etc/passwd\"}", "nbd://localhost/x"])
def test_backing_file_that_nobody_granted(daemon, tmp_path, name):
    image = create(tmp_path / "a.qcow2")
    run("qemu-img", "rebase", "-u", "-f", "qcow2", "-b", name, "-F", "raw", image)
    options = node("n", image)
    del options["backing"]
    said = refusal(daemon, **options)
    assert name.split(":")[0] in said, said
    daemon.qmp("blockdev-add", **node("n", image))  # null: what the image says does not matter
