# SPDX-License-Identifier: Apache-2.0
"""libnbd against the NBD server: every command and flag, both styles of reply, and what goes wrong on the wire."""
import errno
import os
import random
import struct
import subprocess

import nbd
import pytest
from nbd_support import (
    CACHE, DF, ERR_INVALID, ERR_POLICY, ERR_TOO_BIG, ERR_UNKNOWN, ERR_UNSUP, EXPORT_NAME, EXTENDED, FAST_ZERO, FLUSH,
    FUA, GO, INFO, LIST, LIST_META, MIB, NO_HOLE, PEEK, READ, REP_ACK, REP_INFO, REP_META, REP_SERVER, REQ_ONE,
    SET_META, STARTTLS, STRUCTURED, TRIM, WRITE, WRITE_ZEROES, BLOCK_STATUS, Daemon, Wire, info_data, meta_data,
    wait_until,
)

SIZE = 16 * MIB


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(random.Random(1).randbytes(SIZE))
    return path


@pytest.fixture(params=["unix", "tcp"])
def daemon(request):
    with Daemon(server=request.param) as d:
        yield d


@pytest.fixture
def unix_daemon():
    with Daemon() as d:
        yield d


def client(daemon, name, structured=True, context=True):
    h = nbd.NBD()
    h.set_request_structured_replies(structured)
    if context:
        h.add_meta_context("base:allocation")
    h.connect_uri(daemon.uri(name))
    assert h.get_structured_replies_negotiated() == structured
    return h


def fails(number, call, *args, **kwargs):
    with pytest.raises(nbd.Error) as caught:
        call(*args, **kwargs)
    assert caught.value.errnum == number, caught.value


def blocks(path):
    """Bytes that the file takes on its disk."""
    return os.stat(path).st_blocks * 512


@pytest.mark.parametrize("structured", [True, False])
@pytest.mark.parametrize("engine", ["io_uring", "threads"])
def test_every_command_writable(image, structured, engine):
    with Daemon(engine=engine) as d:
        d.add("disk", image, discard="unmap")
        data = bytearray(image.read_bytes())
        h = client(d, "disk", structured)
        assert h.get_size() == SIZE
        assert not h.is_read_only()
        assert h.can_flush() and h.can_fua() and h.can_trim() and h.can_zero() and h.can_fast_zero() and h.can_cache()
        assert h.can_multi_conn() and h.can_df() == structured
        assert h.can_meta_context("base:allocation") == structured

        assert h.pread(SIZE // 2, 0) + h.pread(SIZE // 2, SIZE // 2) == data
        for offset, length in [(0, 1), (511, 2), (4095, 4098), (SIZE - 1, 1), (12345, 65537), (3, 3 * MIB + 1)]:
            new = random.Random(offset).randbytes(length)
            h.pwrite(new, offset)
            data[offset : offset + length] = new
            assert h.pread(length, offset) == new
        h.pwrite(b"x" * 4096, 8192, nbd.CMD_FLAG_FUA)
        data[8192:12288] = b"x" * 4096
        h.flush()
        for offset, length, flags in [
            (0, 4096, 0),
            (65536, 65536, nbd.CMD_FLAG_NO_HOLE),
            (1 * MIB, MIB, nbd.CMD_FLAG_FUA),
            (2 * MIB + 1, 4097, nbd.CMD_FLAG_FUA | nbd.CMD_FLAG_NO_HOLE),
            (3 * MIB, 512 << 10, nbd.CMD_FLAG_FAST_ZERO),
        ]:
            h.zero(length, offset, flags)
            data[offset : offset + length] = bytes(length)
            assert h.pread(length, offset) == bytes(length)
        h.cache(SIZE, 0)
        h.trim(MIB, 8 * MIB)
        h.trim(MIB, 9 * MIB, nbd.CMD_FLAG_FUA)
        data[8 * MIB : 10 * MIB] = bytes(2 * MIB)  # what it is on a file
        if structured:
            chunks = []
            got = h.pread_structured(MIB, 100, lambda *chunk: chunks.append(chunk[1:3]), nbd.CMD_FLAG_DF)
            assert got == data[100 : 100 + MIB] and chunks == [(100, nbd.READ_DATA)]
        assert h.pread(SIZE, 0) == data
        h.shutdown()
        assert image.read_bytes() == data


def test_empty_requests(unix_daemon, image):
    unix_daemon.add("disk", image)
    for structured in (True, False):
        w = Wire(unix_daemon.connect())
        w.go("disk", structured=structured)
        for command in (READ, WRITE, TRIM, WRITE_ZEROES, CACHE):
            for offset in (0, 1, SIZE):
                assert w.ask(command, offset, 0) == (0, b""), (command, offset)
        assert w.ask(READ, 0, 16)[1] == image.read_bytes()[:16]
        w.close()


@pytest.mark.parametrize("structured", [True, False])
def test_read_only(daemon, image, structured):
    before = image.read_bytes()
    daemon.add("disk", image, writable=False)
    h = client(daemon, "disk", structured)
    assert h.is_read_only()
    assert not h.can_trim() and not h.can_zero() and not h.can_fast_zero()
    assert h.can_flush() and h.can_cache()
    h.set_strict_mode(0)
    fails(errno.EPERM, h.pwrite, b"y" * 512, 0)
    fails(errno.EPERM, h.pwrite, b"y" * 200000, 0)
    fails(errno.EPERM, h.trim, 512, 0)
    fails(errno.EPERM, h.zero, 512, 0)
    h.flush()
    assert h.pread(SIZE, 0) == before
    h.shutdown()
    assert image.read_bytes() == before


@pytest.mark.parametrize("structured", [True, False])
def test_errors_on_the_wire(daemon, image, structured):
    daemon.add("disk", image)
    h = client(daemon, "disk", structured)
    h.set_strict_mode(0)
    fails(errno.ENOSPC, h.pwrite, b"z" * 512, SIZE - 511)
    fails(errno.ENOSPC, h.pwrite, b"z", SIZE)
    fails(errno.ENOSPC, h.zero, 512, SIZE - 511)
    fails(errno.ENOSPC, h.trim, 512, SIZE - 511)
    fails(errno.EINVAL, h.pread, 512, SIZE - 511)
    fails(errno.EINVAL, h.pread, 1, SIZE)
    fails(errno.EINVAL, h.cache, 512, SIZE - 511)
    # The connection goes on, and nothing was written.
    assert h.pread(SIZE, 0) == image.read_bytes()
    h.shutdown()


def test_lengths_at_the_limits(unix_daemon, tmp_path):
    path = tmp_path / "big.img"
    path.touch()
    os.truncate(path, 5 << 30)
    unix_daemon.add("disk", path)
    for structured in (True, False):
        w = Wire(unix_daemon.connect())
        w.go("disk", structured=structured)
        assert w.ask(READ, 0, 32 * MIB) == (0, bytes(32 * MIB))
        assert w.ask(READ, 0, 32 * MIB + 1)[0] == errno.EOVERFLOW
        assert w.ask(READ, 0, 0xFFFFFFFF)[0] == errno.EOVERFLOW
        assert w.ask(CACHE, 0, 32 * MIB) == (0, b"")
        assert w.ask(CACHE, 0, 32 * MIB + 1)[0] == errno.EINVAL
        assert w.ask(WRITE, 1, 32 * MIB, data=b"q" * (32 * MIB)) == (0, b"")
        # These carry no data and take as much as the wire can say.
        assert w.ask(WRITE_ZEROES, 0, 0xFFFFFFFF) == (0, b"")
        assert w.ask(TRIM, 0, 0xFFFFFFFF) == (0, b"")
        assert w.ask(READ, 32 * MIB, 16) == (0, bytes(16))
        # There is no way to go on after a payload that is too long.
        w.request(WRITE, 0, 0, 32 * MIB + 1, data=b"")
        assert w.is_closed()
        w.close()


def test_unknown_commands_and_flags(unix_daemon, image):
    unix_daemon.add("disk", image)
    w = Wire(unix_daemon.connect())
    w.go("disk", context=True)
    for command in (8, 9, 255, 0x7FFF, 65535):
        assert w.ask(command, 0, 512)[0] == errno.EINVAL
    for command in (READ, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS):
        length = 0 if command == FLUSH else 512
        for bit in range(16):
            known = {READ: FUA | DF, WRITE_ZEROES: FUA | NO_HOLE | FAST_ZERO, BLOCK_STATUS: FUA | REQ_ONE}
            error = w.ask(command, 0, length, 1 << bit)[0]
            assert error == (0 if known.get(command, FUA) & (1 << bit) else errno.EINVAL), (command, bit)
    assert w.ask(FLUSH, 0, 1)[0] == errno.EINVAL
    assert w.ask(FLUSH, 1, 0)[0] == errno.EINVAL
    for offset in (SIZE + 1, 1 << 63, (1 << 64) - 1, (1 << 64) - 512):
        for command in (READ, CACHE, BLOCK_STATUS):
            assert w.ask(command, offset, 512)[0] == errno.EINVAL
            assert w.ask(command, offset, 0)[0] == errno.EINVAL
        for command in (TRIM, WRITE_ZEROES):
            assert w.ask(command, offset, 512)[0] == errno.ENOSPC
        assert w.ask(WRITE, offset, 4, data=b"abcd")[0] == errno.ENOSPC
    w.close()
    w = Wire(unix_daemon.connect())
    w.go("disk", structured=False)
    assert w.ask(READ, 0, 512, DF)[0] == errno.EINVAL  # it has not been negotiated
    assert w.ask(BLOCK_STATUS, 0, 512)[0] == errno.EINVAL
    w.close()


def test_names_descriptions_and_lists(daemon, image):
    long_name = "n" * 4096
    daemon.qmp("blockdev-add", driver="file", node_name="disk", filename=str(image), read_only=True)
    daemon.export("disk", writable=False)
    daemon.qmp("block-export-add", type="nbd", id="e2", node_name="disk", name="", description="the nameless")
    daemon.qmp("block-export-add", type="nbd", id="e3", node_name="disk", name=long_name, description="d" * 4096)
    daemon.qmp("block-export-add", type="nbd", id="e4", node_name="disk", name="grüße/ %20\\'\"")
    names = ["disk", "", long_name, "grüße/ %20\\'\""]
    descriptions = ["", "the nameless", "d" * 4096, ""]

    h = nbd.NBD()
    h.set_opt_mode(True)
    h.connect_uri(daemon.uri(""))
    listed = []
    assert h.opt_list(lambda name, text: listed.append((name, text))) == 4
    assert listed == list(zip(names, descriptions))
    for name, text in listed:
        h.set_export_name(name)
        h.set_full_info(True)
        h.opt_info()
        assert h.get_size() == SIZE
        assert h.get_canonical_export_name() == name
        if text:
            assert h.get_export_description() == text
        assert h.get_block_size(nbd.SIZE_MINIMUM) == 1
        assert h.get_block_size(nbd.SIZE_PREFERRED) == 4096
        assert h.get_block_size(nbd.SIZE_MAXIMUM) == 32 * MIB
    for name in ("no", "dis", "disk2", "n" * 4095):
        h.set_export_name(name)
        fails(errno.ENOENT, h.opt_info)
        fails(errno.ENOENT, h.opt_go)
    h.set_export_name(long_name)
    h.opt_go()
    assert h.pread(16, 0) == image.read_bytes()[:16]
    h.shutdown()

    # A name or description that is longer, or a name that is taken, is refused when the export is made.
    for more in ({"name": "n" * 4097}, {"name": "x", "description": "d" * 4097}, {"name": ""}):
        with pytest.raises(Exception, match="4097|longer|at most|already"):
            daemon.qmp("block-export-add", type="nbd", id="e5", node_name="disk", **more)


def test_options_by_their_bytes(unix_daemon, image):
    d = unix_daemon
    d.add("disk", image)
    w = Wire(d.connect())
    assert w.option(LIST) == [(REP_SERVER, struct.pack(">I", 4) + b"disk"), (REP_ACK, b"")]
    assert w.result(LIST, b"x") == ERR_INVALID
    assert w.result(STARTTLS) == ERR_POLICY
    for unknown in (PEEK, EXTENDED, 12, 0, 0xFFFFFFFF):
        assert w.result(unknown, b"whatever") == ERR_UNSUP
    assert w.result(LIST_META, meta_data("disk")) == ERR_INVALID  # before structured replies
    assert w.result(SET_META, meta_data("disk", "base:allocation")) == ERR_INVALID
    assert w.result(STRUCTURED, b"x") == ERR_INVALID
    assert w.result(STRUCTURED) == REP_ACK
    w.structured = True

    context = (REP_META, struct.pack(">I", 0) + b"base:allocation")
    for queries, found in [
        ((), True), (("base:",), True), (("base:allocation",), True), (("qemu:",), False), (("base",), False),
        (("base:allocatio",), False), (("base:allocation2",), False), (("",), False), (("x:y", "base:allocation"), True),
    ]:
        assert w.option(LIST_META, meta_data("disk", *queries)) == [context] * found + [(REP_ACK, b"")], queries
    for queries, found in [((), False), (("base:",), False), (("base:allocation",), True)]:
        assert w.option(SET_META, meta_data("disk", *queries)) == [context] * found + [(REP_ACK, b"")], queries
    assert w.result(LIST_META, meta_data("nobody")) == ERR_UNKNOWN
    assert w.result(SET_META, meta_data("nobody", "base:allocation")) == ERR_UNKNOWN

    good = info_data("disk", 3)
    for bad in (b"", good[:5], good[:-1], good + b"\0", struct.pack(">I", 5000) + good[4:], b"\xff" * 4 + good[4:]):
        assert w.result(INFO, bad) == ERR_INVALID
    good = meta_data("disk", "base:allocation")
    for bad in (b"", good[:-1], good + b"\0", good[:8] + struct.pack(">I", 2) + good[12:], b"\xff" * 4 + good[4:],
                good[:8] + b"\xff\xff\xff\xff" + good[12:], good[:12] + b"\xff\xff\xff\xff" + good[16:]):
        assert w.result(SET_META, bad) == ERR_INVALID, bad
    # Longer than anything can mean, up to the limit: read away.
    assert w.result(INFO, bytes(10000)) == ERR_TOO_BIG
    assert w.result(12345, bytes(32 * MIB)) == ERR_TOO_BIG

    infos = w.option(INFO, info_data("disk", 1, 2, 3, 77))
    kinds = [data[:2] for kind, data in infos if kind == REP_INFO]
    assert sorted(kinds) == [b"\0\0", b"\0\1", b"\0\3"] and infos[-1] == (REP_ACK, b"")  # it has no description
    assert w.result(GO, info_data("nobody")) == ERR_UNKNOWN
    assert w.result(GO, info_data("disk")) == REP_ACK
    assert w.ask(READ, 0, 3) == (0, image.read_bytes()[:3])
    w.close()
    assert wait_until(lambda: d.clients("disk") == 0)


def test_contexts_are_of_the_last_request_and_its_export(unix_daemon, image):
    d = unix_daemon
    d.qmp("blockdev-add", driver="file", node_name="disk", filename=str(image), read_only=True)
    d.export("disk", writable=False)
    d.qmp("block-export-add", type="nbd", id="other", node_name="disk", name="other")

    def status_after(*sets, go="disk"):
        w = Wire(d.connect())
        assert w.result(STRUCTURED) == REP_ACK
        w.structured = True
        for data in sets:
            w.option(SET_META, data)
        assert w.result(GO, info_data(go)) == REP_ACK
        error = w.ask(BLOCK_STATUS, 0, 512)[0]
        w.close()
        return error

    wanted = meta_data("disk", "base:allocation")
    assert status_after(wanted) == 0
    assert status_after() == errno.EINVAL
    assert status_after(wanted, wanted) == 0
    assert status_after(wanted, meta_data("disk")) == errno.EINVAL
    assert status_after(meta_data("other", "base:allocation")) == errno.EINVAL
    assert status_after(wanted, go="other") == errno.EINVAL
    # "replaces all previously-set metadata contexts (including when this command fails)"
    assert status_after(wanted, meta_data("nobody", "base:allocation")) == errno.EINVAL
    assert status_after(wanted, wanted + b"x") == errno.EINVAL
    assert status_after(wanted, bytes(10000)) == errno.EINVAL


def test_export_name_with_and_without_zeroes(unix_daemon, image):
    unix_daemon.add("disk", image)
    for flags, padding in ((3, 0), (1, 124)):
        w = Wire(unix_daemon.connect(), flags=flags)
        w.send(struct.pack(">QII", 0x49484156454F5054, EXPORT_NAME, 4) + b"disk")
        size, transmission = struct.unpack(">QH", w.recv(10))
        assert size == SIZE and transmission & 1
        assert w.recv(padding) == bytes(padding)
        assert w.ask(READ, 5, 100) == (0, image.read_bytes()[5:105])
        w.close()
    w = Wire(unix_daemon.connect())
    w.send(struct.pack(">QII", 0x49484156454F5054, EXPORT_NAME, 5) + b"disk2")
    assert w.is_closed()
    for flags in (0, 2, 4, 7, 0xFFFFFFFF):  # no fixed newstyle, or flags that nobody knows
        assert Wire(unix_daemon.connect(), flags=flags).is_closed()


def data_map(path):
    """What SEEK_HOLE and SEEK_DATA say: [(length, is data)]."""
    extents = []
    with open(path, "rb") as f:
        end = os.fstat(f.fileno()).st_size
        pos = 0
        while pos < end:
            try:
                data = os.lseek(f.fileno(), pos, os.SEEK_DATA)
            except OSError:
                data = end
            if data > pos:
                extents.append((data - pos, False))
            if data < end:
                hole = os.lseek(f.fileno(), data, os.SEEK_HOLE)
                extents.append((hole - data, True))
                pos = hole
            else:
                pos = end
    return extents


def test_block_status_is_what_the_file_says(unix_daemon, tmp_path):
    path = tmp_path / "sparse.img"
    rng = random.Random(7)
    with open(path, "wb") as f:
        f.truncate(64 * MIB)
        for _ in range(300):
            f.seek(rng.randrange(64 * MIB // 4096) * 4096)
            f.write(rng.randbytes(4096 * rng.randrange(1, 20))[: 64 * MIB - f.tell()])
    truth = data_map(path)
    assert len(truth) > 200
    unix_daemon.add("disk", path)
    h = client(unix_daemon, "disk")
    got = []

    def note(context, offset, entries, error):
        assert context == "base:allocation"
        got.extend(zip(entries[::2], entries[1::2]))

    h.block_status(64 * MIB, 0, note)
    assert got == [(length, 0 if data else 3) for length, data in truth]
    # Pieces of it, each with at most one descriptor.
    pos = 0
    for length, data in truth[:100]:
        got.clear()
        inside = rng.randrange(length)
        h.block_status(64 * MIB - pos - inside, pos + inside, note, nbd.CMD_FLAG_REQ_ONE)
        assert got == [(length - inside, 0 if data else 3)]
        got.clear()
        h.block_status(1, pos + inside, note)
        assert got == [(1, 0 if data else 3)]
        pos += length
    w = Wire(unix_daemon.connect())
    w.go("disk", context=True)
    assert w.ask(BLOCK_STATUS, 0, 0)[0] == errno.EINVAL
    assert w.ask(BLOCK_STATUS, 64 * MIB - 1, 2)[0] == errno.EINVAL
    w.close()
    h.shutdown()


def test_block_status_of_a_file_in_shreds(unix_daemon, tmp_path):
    """More extents than one answer holds: the rest is asked for again, and all of it is right."""
    path = tmp_path / "shreds.img"
    count = 6000
    with open(path, "wb") as f:
        f.truncate(count * 8192)
        for i in range(count):
            f.seek(i * 8192)
            f.write(b"s" * 4096)
    unix_daemon.add("disk", path, writable=False)
    h = client(unix_daemon, "disk")
    got = []
    while sum(length for length, _ in got) < count * 8192:
        at = sum(length for length, _ in got)
        before = len(got)
        h.block_status(count * 8192 - at, at, lambda c, o, e, err: got.extend(zip(e[::2], e[1::2])))
        assert len(got) > before
    assert got == [(4096, 0), (4096, 3)] * count
    h.shutdown()


@pytest.mark.parametrize("discard", ["unmap", "ignore"])
def test_trim_and_zeroes_in_the_blocks_of_the_file(unix_daemon, image, discard):
    unix_daemon.add("disk", image, discard=discard)
    given_back = 2 * MIB if discard == "unmap" else 0
    h = client(unix_daemon, "disk")
    h.flush()
    full = blocks(image)
    assert full >= SIZE
    h.zero(2 * MIB, 0, nbd.CMD_FLAG_NO_HOLE)
    h.flush()
    assert blocks(image) == full
    h.zero(2 * MIB, 0)
    h.flush()
    assert blocks(image) == full - given_back
    h.trim(4 * MIB, 4 * MIB)
    h.flush()
    assert blocks(image) == full - 3 * given_back
    h.zero(2 * MIB, 0, nbd.CMD_FLAG_NO_HOLE)
    h.flush()
    assert blocks(image) == full - 2 * given_back
    assert h.pread(2 * MIB, 0) == bytes(2 * MIB)
    h.shutdown()


def test_fast_zero_is_fast_or_refused(unix_daemon, tmp_path):
    """tmpfs punches holes at once, and has no other zeroes than written ones."""
    where = f"/dev/shm/cairn-test.{os.getpid()}"
    with open(where, "wb") as f:
        f.write(b"f" * MIB)
    try:
        unix_daemon.add("disk", where, discard="unmap")
        h = client(unix_daemon, "disk")
        fails(errno.ENOTSUP, h.zero, MIB, 0, nbd.CMD_FLAG_FAST_ZERO | nbd.CMD_FLAG_NO_HOLE)
        assert h.pread(MIB, 0) == b"f" * MIB
        h.zero(65536, 0, nbd.CMD_FLAG_NO_HOLE)
        assert h.pread(65537, 0) == bytes(65536) + b"f"
        assert blocks(where) == MIB
        h.zero(MIB // 2, 0, nbd.CMD_FLAG_FAST_ZERO)
        assert blocks(where) == MIB // 2
        assert h.pread(MIB, 0) == bytes(MIB // 2) + b"f" * (MIB // 2)
        h.shutdown()
    finally:
        os.unlink(where)


def syncs_during(daemon, action):
    """How often the daemon syncs a file while this runs."""
    trace = f"{daemon.dir}/strace"
    tracer = subprocess.Popen(
        ["strace", "-f", "-qq", "-e", "trace=fdatasync,fsync,pwritev2", "-o", trace, "-p", str(daemon.process.pid)],
        stderr=subprocess.PIPE,
    )
    tids = os.listdir(f"/proc/{daemon.process.pid}/task")

    def attached():
        for tid in tids:
            with open(f"/proc/{daemon.process.pid}/task/{tid}/status", encoding="ascii") as f:
                if f"TracerPid:\t{tracer.pid}\n" not in f.read():
                    return False
        return True

    assert wait_until(attached)
    action()
    tracer.terminate()
    tracer.wait()
    with open(trace, encoding="utf-8") as f:
        lines = f.read().splitlines()
    return [line for line in lines if "sync(" in line or "DSYNC" in line]


def test_flush_reaches_the_file_from_any_connection(image):
    """Multi-conn: what was answered on A is made durable by a flush on B: that flush is a sync of the whole file."""
    with Daemon(engine="threads") as d:
        d.add("disk", image)
        a, b = client(d, "disk"), client(d, "disk")
        assert a.can_multi_conn()

        def write_and_flush():
            a.pwrite(b"a" * 4096, 0)
            b.flush()

        assert syncs_during(d, lambda: a.pwrite(b"b" * 4096, 0)) == []
        assert len(syncs_during(d, write_and_flush)) == 1
        assert len(syncs_during(d, lambda: b.pwrite(b"c" * 4096, 0, nbd.CMD_FLAG_FUA))) == 1
        assert len(syncs_during(d, lambda: b.zero(4096, 0, nbd.CMD_FLAG_FUA))) == 1
        assert len(syncs_during(d, lambda: b.trim(4096, 0, nbd.CMD_FLAG_FUA))) == 1
        a.shutdown()
        b.shutdown()


def test_writethrough_syncs_each_write(image):
    with Daemon(engine="threads") as d:
        d.qmp("blockdev-add", driver="file", node_name="disk", filename=str(image))
        d.export("disk", writethrough=True)
        h = client(d, "disk")
        assert len(syncs_during(d, lambda: h.pwrite(b"b" * 4096, 0))) == 1
        h.shutdown()


def test_one_connection_only_is_not_multi_conn(image):
    with Daemon(max_connections=1) as d:
        d.add("disk", image)
        h = client(d, "disk")
        assert not h.can_multi_conn()
        h.shutdown()


def test_several_exports_at_once(unix_daemon, tmp_path):
    handles = []
    for i in range(8):
        path = tmp_path / f"{i}.img"
        path.write_bytes(bytes([i]) * MIB)
        unix_daemon.add(f"disk{i}", path)
        handles.append(client(unix_daemon, f"disk{i}"))
    for i, h in enumerate(handles):
        assert h.pread(MIB, 0) == bytes([i]) * MIB
        h.pwrite(b"new", i)
    for i, h in enumerate(handles):
        h.flush()
        h.shutdown()
        assert (tmp_path / f"{i}.img").read_bytes()[: i + 4] == bytes([i]) * i + b"new" + bytes([i])


@pytest.mark.parametrize("direct", [False, True])
def test_random_requests_in_flight(unix_daemon, image, direct):
    """Hundreds of requests under way on two connections, each to its own half, compared with an array in the end."""
    unix_daemon.add("disk", image, cache={"direct": direct})
    data = bytearray(image.read_bytes())
    rng = random.Random(3)
    half = SIZE // 2
    handles = [client(unix_daemon, "disk"), client(unix_daemon, "disk")]
    errors = []
    step = half // 512

    def done(error):
        errors.append(error.value)
        return 1  # retires it

    for _ in range(3):
        for i, h in enumerate(handles):
            for slot in rng.sample(range(512), 512):
                length = rng.randrange(1, step + 1)
                offset = i * half + slot * step + rng.randrange(step - length + 1)
                kind = rng.randrange(4)
                if kind == 0:
                    data[offset : offset + length] = bytes(length)
                    h.aio_zero(length, offset, done, rng.choice((0, nbd.CMD_FLAG_NO_HOLE, nbd.CMD_FLAG_FUA)))
                elif kind == 1:
                    h.aio_pread(nbd.Buffer(length), offset, done)
                else:
                    new = rng.randbytes(length)
                    data[offset : offset + length] = new
                    h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(new)), offset, done)
        for h in handles:
            while h.aio_in_flight():
                h.poll(-1)
    assert errors == [0] * (3 * 2 * 512)
    for h in handles:
        assert h.pread(SIZE, 0) == data
        h.shutdown()
    assert image.read_bytes() == data
