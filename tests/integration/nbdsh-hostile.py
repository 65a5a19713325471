# SPDX-License-Identifier: Apache-2.0
"""
Clients that lie, stall and vanish, and exports that go while they are used: nobody else is harmed. A well-behaved client
writes, reads and verifies all along.
"""
import concurrent.futures
import errno
import random
import select
import signal
import socket
import struct
import threading
import time

import pytest
from nbd_support import (
    BLOCK_STATUS, CACHE, DISC, EXPORT_NAME, FLUSH, GO, INFO, LIST, LIST_META, MIB, READ, REP_ACK, SANITIZED, SET_META,
    STRUCTURED, TRIM, WRITE, WRITE_ZEROES, Daemon, Qmp, QmpError, Wire, info_data, meta_data, option_bytes,
    request_bytes, wait_until,
)

SIZE = 8 * MIB
# More than one connection's bounds (64 MiB in flight, one more payload, buffers), and much less than it could ask for.
RSS_BOUND = 200 * MIB


class Witness:
    """The well-behaved client, on a disk of its own."""

    def __init__(self, daemon, path):
        self.path = path
        path.write_bytes(bytes(MIB))
        daemon.add("witness", path)
        self.wire = Wire(daemon.connect())
        self.wire.go("witness", context=True)
        self.rounds = 0
        self.slowest = 0.0
        self.failure = None
        self.stopping = threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True)

    def run(self):
        rng = random.Random(11)
        data = bytearray(MIB)
        try:
            while not self.stopping.is_set():
                begin = time.monotonic()
                offset = rng.randrange(MIB)
                new = rng.randbytes(rng.randrange(1, min(65536, MIB - offset + 1)))
                data[offset : offset + len(new)] = new
                assert self.wire.ask(WRITE, offset, len(new), data=new)[0] == 0
                if self.rounds % 16 == 0:
                    assert self.wire.ask(FLUSH) == (0, b"")
                    assert self.wire.ask(READ, 0, MIB) == (0, data)
                assert self.wire.ask(READ, offset, len(new)) == (0, new)
                self.rounds += 1
                self.slowest = max(self.slowest, time.monotonic() - begin)
                time.sleep(0.001)  # it shares the machine
        except BaseException as failure:
            self.failure = failure
        self.data = data

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, kind, *rest):
        self.stopping.set()
        self.thread.join(60)
        self.wire.close()
        if kind is None:
            assert self.failure is None, repr(self.failure)
            assert not self.thread.is_alive() and self.rounds > 0
            assert self.slowest < (20 if SANITIZED else 5), self.slowest
            assert self.path.read_bytes() == self.data


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(random.Random(2).randbytes(SIZE))
    return path


@pytest.fixture
def daemon(image, tmp_path):
    """With a disk to attack, and a witness who must not notice."""
    with Daemon() as d:
        d.add("disk", image, discard="unmap")
        with Witness(d, tmp_path / "witness.img"):
            yield d
            assert wait_until(lambda: d.clients("disk") == 0, 30), "a client was never let go"


def raw(daemon):
    return daemon.connect()


def is_closed(sock, seconds=5.0):
    sock.settimeout(seconds)
    return Wire(sock, greet=False).is_closed()


GOOD = (
    struct.pack(">I", 3)
    + option_bytes(STRUCTURED)
    + option_bytes(LIST)
    + option_bytes(SET_META, meta_data("disk", "base:allocation"))
    + option_bytes(INFO, info_data("disk", 1, 2, 3))
    + option_bytes(GO, info_data("disk"))
    + request_bytes(READ, 1, 0, 4096)
    + request_bytes(WRITE, 2, 4096, 600, data=b"w" * 600)
    + request_bytes(BLOCK_STATUS, 3, 0, SIZE)
    + request_bytes(FLUSH, 4)
    + request_bytes(DISC)
)


def test_a_session_cut_at_every_byte(daemon):
    for cut in range(len(GOOD)):
        with raw(daemon) as sock:
            sock.sendall(GOOD[:cut])
            if cut % 3 == 0:
                sock.shutdown(socket.SHUT_WR)
                assert is_closed(sock), cut  # the server has seen the end and answered what it could
            elif cut % 3 == 1:
                sock.shutdown(socket.SHUT_RDWR)
            # else: closed with replies unread, which resets


def test_a_session_byte_by_byte(daemon):
    with raw(daemon) as sock:
        for i in range(len(GOOD)):
            sock.sendall(GOOD[i : i + 1])
        assert is_closed(sock)


def test_a_session_with_each_byte_wrong(daemon):
    rng = random.Random(5)
    at = GOOD.index(b"w" * 600)
    for i in range(len(GOOD)):
        if at + 8 <= i < at + 600:
            continue  # the payload can say what it likes
        bad = bytearray(GOOD)
        bad[i] ^= rng.randrange(1, 256)
        with raw(daemon) as sock:
            sock.sendall(bad)
            sock.shutdown(socket.SHUT_WR)
            assert is_closed(sock), i


LIES = (0, 1, 3, 4, 5, 6, 7, 8, 255, 4096, 4097, 8255, 8256, 8257, 65536, 32 * MIB, 32 * MIB + 1, 1 << 31, (1 << 32) - 1)


def test_every_length_lies(daemon):
    name = meta_data("disk", "base:allocation")
    for lie in LIES:
        number = struct.pack(">I", lie)
        sessions = [
            option_bytes(option, info_data("disk"), length=lie)
            for option in (EXPORT_NAME, LIST, INFO, GO, STRUCTURED, LIST_META, SET_META, 77)
        ]
        sessions += [
            option_bytes(STRUCTURED) + option_bytes(option, data)
            for option in (INFO, GO, LIST_META, SET_META)
            for data in (number + name[4:], name[:8] + number + name[12:], name[:12] + number + name[16:],
                         name[:8] + number, info_data("disk")[:8] + number[2:])
        ]
        for session in sessions:
            with raw(daemon) as sock:
                sock.sendall(struct.pack(">I", 3) + session)
                sock.shutdown(socket.SHUT_WR)
                assert is_closed(sock), (lie, session[:64])


def test_huge_options_and_millions_of_queries(daemon):
    before = daemon.rss()
    w = Wire(daemon.connect())
    assert w.result(STRUCTURED) == REP_ACK
    queries = 8 * MIB - 8
    data = meta_data("disk")[:8] + struct.pack(">I", queries) + bytes(4 * queries)
    for option in (LIST_META, SET_META, INFO, 99):
        assert w.result(option, data) & 0x80000000
    # As many as fit in what is read at all.
    fit = (2 * 4096 + 64 - 12) // 4
    for option in (LIST_META, SET_META):
        assert w.result(option, meta_data("disk", *[""] * fit)) == REP_ACK
        assert w.result(option, meta_data("disk")[:8] + b"\xff\xff\xff\xff" + bytes(4 * fit)) & 0x80000000
    assert daemon.rss() - before < 16 * MIB or SANITIZED
    w.send(option_bytes(SET_META, b"", length=32 * MIB + 1))
    assert w.is_closed()
    w.close()


def test_slow_clients_are_closed_after_ten_seconds(image, tmp_path):
    """Silent ones, ones that send a byte now and then, and ones that do not read the answers."""
    with Daemon() as d:
        d.add("disk", image)
        # A long list, so that answers fill a socket soon.
        d.qmp("blockdev-add", driver="null-co", node_name="n")
        for i in range(50):
            d.qmp("block-export-add", type="nbd", id=f"n{i}", node_name="n", name=f"n{i}", description="d" * 4000)
        with Witness(d, tmp_path / "witness.img"):
            begin = time.monotonic()
            socks = [raw(d) for _ in range(150)]
            greedy = struct.pack(">I", 3) + option_bytes(LIST) * 1000
            for sock in socks[100:]:
                sock.setblocking(False)
                try:
                    sock.send(greedy)
                except BlockingIOError:
                    pass
            closed = {}
            sent = 0
            poller = select.poll()
            for sock in socks:
                poller.register(sock, select.POLLRDHUP | select.POLLHUP)
            by_fd = {sock.fileno(): sock for sock in socks}
            while len(closed) < len(socks) and time.monotonic() - begin < 20:
                for fd, _ in poller.poll(100):
                    poller.unregister(fd)
                    closed[fd] = time.monotonic() - begin
                sent += 1
                if sent % 3 == 0:
                    for sock in socks[50:100]:
                        if sock.fileno() not in closed:
                            try:
                                sock.send(GOOD[sent // 3 - 1 : sent // 3])
                            except OSError:
                                pass
            assert len(closed) == len(socks)
            assert min(closed.values()) > 9.5 and max(closed.values()) < 12, (min(closed.values()), max(closed.values()))
            for sock in by_fd.values():
                sock.close()


def test_a_thousand_connections_come_and_vanish(daemon):
    w = Wire(daemon.connect())  # what is made once is made now
    w.go("disk")
    fds = daemon.fds()
    before = daemon.rss()
    rng = random.Random(4)
    for _ in range(10):
        socks = [raw(daemon) for _ in range(100)]
        for sock in socks:
            sock.sendall(GOOD[: rng.randrange(len(GOOD))])
        rng.shuffle(socks)
        for sock in socks:
            sock.close()
    assert wait_until(lambda: daemon.fds() == fds, 20), (daemon.fds(), fds)
    assert daemon.rss() - before < 64 * MIB or SANITIZED
    assert w.ask(READ, 0, 512)[0] == 0
    w.close()


def test_connections_beyond_the_limit_wait(image):
    with Daemon(max_connections=2) as d:
        d.add("disk", image)
        first, second = Wire(d.connect()), Wire(d.connect())
        first.go("disk")
        second.go("disk")
        third = d.connect()
        third.settimeout(0.3)
        with pytest.raises(TimeoutError):
            third.recv(1)
        first.close()
        third.settimeout(10)
        w = Wire(third)
        w.go("disk")
        assert w.ask(READ, 0, 16)[0] == 0
        assert second.ask(READ, 0, 16)[0] == 0
        # Those that are closed while they wait are found dead when it is their turn, and take no place.
        for _ in range(20):
            d.connect().close()
        second.close()
        w.close()
        for _ in range(5):
            w = Wire(d.connect())
            w.go("disk")
            assert w.ask(READ, 0, 16)[0] == 0
            w.close()
        assert wait_until(lambda: d.clients("disk") == 0)


def test_wrong_magic_between_requests(daemon, image):
    for position in range(4):
        w = Wire(daemon.connect())
        w.go("disk", structured=bool(position % 2))
        assert w.ask(READ, 0, 512) == (0, image.read_bytes()[:512])
        bad = bytearray(request_bytes(READ, 0, 0, 512))
        bad[position] ^= 0x40
        w.send(request_bytes(READ, 7, 0, 512) + bad + request_bytes(WRITE_ZEROES, 8, 0, 512))
        assert w.reply(512)[:2] == (7, 0)  # what came before is answered, what comes after is not carried out
        assert w.is_closed()
        w.close()
    assert image.read_bytes()[:512] != bytes(512)


def test_writes_without_their_payload(daemon, image):
    before = image.read_bytes()
    for length in (1, 28, 4096, 65536, 65537, MIB, 32 * MIB):
        for given in (0, 1, length // 2, length - 1):
            if given == length:
                continue
            with raw(daemon) as sock:
                w = Wire(sock)
                w.go("disk")
                w.send(request_bytes(WRITE, 0, 0, length) + bytes(given))
    assert wait_until(lambda: daemon.clients("disk") == 0)
    assert image.read_bytes() == before  # nothing was written in part


def flood(wire, piece, total):
    """Sends the same piece again and again and reads nothing, until `total` bytes are gone or nothing goes for a second."""
    wire.sock.setblocking(False)
    sent = 0
    view = memoryview(piece)
    while sent < total:
        if not select.select([], [wire.sock], [], 1.0)[1]:
            break
        try:
            sent += wire.sock.send(view[sent % len(piece) :])
        except BlockingIOError:
            pass
    wire.sock.setblocking(True)
    wire.sock.settimeout(60)
    return sent


@pytest.mark.parametrize("what", ["reads", "small reads", "writes", "big writes", "status"])
def test_a_client_that_never_reads(daemon, image, what):
    """It is stopped by its socket; what the server keeps for it is bounded, and all is there when it reads at last."""
    expected = image.read_bytes()
    w = Wire(daemon.connect())
    w.go("disk", context=True)
    before = daemon.rss()
    if what == "reads":
        count, one = 64, request_bytes(READ, 9, MIB, 4 * MIB)
    elif what == "small reads":
        count, one = 4096, request_bytes(READ, 9, MIB, 512)
    elif what == "writes":
        count, one = 64, request_bytes(WRITE, 9, MIB, 4096, data=expected[MIB : MIB + 4096])
    elif what == "big writes":
        count, one = 1, request_bytes(WRITE, 9, MIB, 4 * MIB, data=expected[MIB : 5 * MIB])
    else:
        count, one = 4096, request_bytes(BLOCK_STATUS, 9, 0, SIZE)
    sent = flood(w, one * count, 1 << 30)
    assert daemon.rss() - before < RSS_BOUND or SANITIZED
    if sent % len(one) and not what.endswith("writes"):
        w.sock.setblocking(True)
    # It reads at last, while the rest of the last request is sent.
    rest = one[sent % len(one) :] if sent % len(one) else b""
    sender = threading.Thread(target=w.send, args=(rest,))
    sender.start()
    for _ in range((sent + len(rest)) // len(one)):
        cookie, error, data = w.reply()
        assert (cookie, error) == (9, 0)
        if what == "reads":
            assert data == expected[MIB : 5 * MIB]
        elif what == "small reads":
            assert data == expected[MIB : MIB + 512]
    sender.join()
    assert w.ask(READ, 0, 512) == (0, expected[:512])
    w.close()
    assert image.read_bytes() == expected


def test_a_client_that_never_reads_vanishes(daemon, image):
    for _ in range(5):
        w = Wire(daemon.connect())
        w.go("disk")
        flood(w, request_bytes(READ, 9, 0, MIB) * 64, 200000)
        w.close()
    assert wait_until(lambda: daemon.clients("disk") == 0)


@pytest.mark.parametrize("count", [255, 256, 257, 1000, 5000])
def test_more_requests_than_are_taken_at_once(daemon, image, count):
    data = image.read_bytes()
    w = Wire(daemon.connect())
    w.go("disk")
    batch = b"".join(request_bytes(READ, i, i * 512, 1024) for i in range(count))
    sender = threading.Thread(target=w.send, args=(batch,))
    sender.start()
    seen = set()
    for _ in range(count):
        cookie, error, got = w.reply()
        assert error == 0 and got == data[cookie * 512 : cookie * 512 + 1024]
        seen.add(cookie)
    sender.join()
    assert len(seen) == count
    w.close()


def test_disconnect_answers_what_came_before(daemon, image):
    w = Wire(daemon.connect())
    w.go("disk")
    w.send(b"".join(request_bytes(READ, i, 0, 65536) for i in range(300)) + request_bytes(DISC))
    assert sorted(w.reply()[0] for _ in range(300)) == list(range(300))
    assert w.is_closed()
    w.close()


def test_removal_of_a_busy_export(daemon, image):
    w = Wire(daemon.connect())
    w.go("disk")
    with pytest.raises(QmpError, match="1 clients"):
        daemon.qmp("block-export-del", id="e-disk")
    with pytest.raises(QmpError, match="disk"):
        daemon.qmp("blockdev-del", node_name="disk")
    assert w.ask(READ, 0, 512)[0] == 0
    w.close()
    assert wait_until(lambda: daemon.clients("disk") == 0)
    daemon.qmp("block-export-del", id="e-disk")
    daemon.qmp.wait_event("BLOCK_EXPORT_DELETED", id="e-disk")
    with pytest.raises(QmpError, match="e-disk"):
        daemon.qmp("block-export-del", id="e-disk")
    probe = Wire(daemon.connect())
    assert probe.result(GO, info_data("disk")) & 0x80000000
    probe.close()
    daemon.export("disk", writable=True)  # for the check at the end


@pytest.mark.parametrize("reads", [True, False])
def test_forced_removal_with_requests_in_flight(daemon, image, reads):
    for turn in range(10):
        wires = [Wire(daemon.connect()) for _ in range(4)]
        for w in wires:
            w.go("disk")
            if reads:
                flood(w, request_bytes(READ, 1, 0, MIB) * 40, 40 * 28)
            else:
                flood(w, request_bytes(WRITE, 1, 0, 65536, data=bytes(65536)) * 16, 2 * MIB + turn)
        half = Wire(daemon.connect())  # still negotiating: not of this export
        daemon.qmp("block-export-del", id="e-disk", mode="hard")
        daemon.qmp.wait_event("BLOCK_EXPORT_DELETED", id="e-disk")
        for w in wires:
            assert w.is_closed()
            w.close()
        assert half.result(STRUCTURED) == REP_ACK
        half.close()
        daemon.qmp("blockdev-del", node_name="disk")
        daemon.add("disk", image, discard="unmap")


def test_removal_does_not_wait_for_a_dead_disk():
    """A request that does not end for a minute: the export is gone after the change deadline all the same."""
    with Daemon("--change-deadline", "1") as d:
        d.expected = ["requests that do not end", "still stopping"]
        d.qmp("blockdev-add", driver="null-co", node_name="slow", size=MIB, latency_ns=60 * 10**9)
        for end in ("del", "stop"):
            d.export("slow")
            w = Wire(d.connect())
            w.go("slow")
            w.send(request_bytes(READ, 1, 0, 512) * 400)  # some of them are not even taken
            assert wait_until(lambda: d.clients("slow") == 1)
            begin = time.monotonic()
            if end == "del":
                d.qmp("block-export-del", id="e-slow", mode="hard")
                d.qmp.wait_event("BLOCK_EXPORT_DELETED", id="e-slow")
            else:
                d.qmp("nbd-server-stop")
            assert time.monotonic() - begin < (20 if SANITIZED else 5)
            assert "export 'e-slow': 1 clients have requests that do not end" in d.output()
            assert w.is_closed()
            w.close()
        d.qmp("blockdev-del", node_name="slow")
        # The process itself ends in time, too.
        d.qmp("nbd-server-start", addr={"type": "unix", "data": {"path": d.path}})
        d.qmp("blockdev-add", driver="null-co", node_name="slow", size=MIB, latency_ns=60 * 10**9)
        d.export("slow")
        w = Wire(d.connect())
        w.go("slow")
        w.send(request_bytes(WRITE, 1, 0, 4, data=b"abcd"))
        begin = time.monotonic()
        d.process.send_signal(signal.SIGTERM)
        assert d.process.wait(30) == 0
        assert time.monotonic() - begin < (20 if SANITIZED else 5)
        w.close()


def test_stopping_the_server_with_clients(image, tmp_path):
    with Daemon() as d:
        d.qmp("blockdev-add", driver="null-co", node_name="n", size=MIB)
        for turn in range(20):
            for i in range(5):  # several without any client, which go at once
                d.qmp("block-export-add", type="nbd", id=f"n{i}", node_name="n", name=f"n{i}")
            d.add("disk", image)
            wires = [Wire(d.connect()) for _ in range(3)]
            wires[0].go("disk")
            wires[1].go("n3")
            flood(wires[0], request_bytes(READ, 1, 0, MIB) * 40, 40 * 28)
            with pytest.raises(QmpError, match="already"):
                d.qmp("nbd-server-start", addr={"type": "unix", "data": {"path": d.path + "2"}})
            d.qmp("nbd-server-stop")
            for w in wires:
                assert w.is_closed()
                w.close()
            assert d.qmp("query-block-exports") == []
            with pytest.raises(QmpError, match="no NBD server"):
                d.qmp("nbd-server-stop")
            with pytest.raises(QmpError, match="no NBD server"):
                d.export("disk")
            with pytest.raises((ConnectionRefusedError, FileNotFoundError)):
                d.connect()
            d.qmp("blockdev-del", node_name="disk")
            d.qmp("nbd-server-start", addr={"type": "unix", "data": {"path": d.path}})


def test_exports_come_while_the_server_goes(image):
    """Two control clients: one adds exports, the other stops and starts the server under them."""
    with Daemon() as d:
        for i in range(4):
            d.qmp("blockdev-add", driver="file", node_name=f"d{i}", filename=str(image), read_only=True)
        other = Qmp(d.qmp_path)
        for turn in range(100):
            for i in range(4):
                other.send("block-export-add", type="nbd", id=f"x{i}", node_name=f"d{i}")
            d.qmp("nbd-server-stop")
            d.qmp("nbd-server-start", addr={"type": "unix", "data": {"path": d.path}})
            for i in range(4):
                try:
                    other.receive()
                except QmpError:
                    pass  # it met no server, or one that was going
        names = {e["id"] for e in d.qmp("query-block-exports")}
        for name in names:
            d.qmp("block-export-del", id=name)
            d.qmp.wait_event("BLOCK_EXPORT_DELETED", id=name)
        other.close()


@pytest.mark.parametrize("engine", ["io_uring", "threads"])
def test_the_daemon_ends_under_load(image, engine):
    for sig in (signal.SIGTERM, signal.SIGINT):
        with Daemon(engine=engine) as d:
            d.add("disk", image)
            wires = [Wire(d.connect()) for _ in range(8)]
            for w in wires[:6]:
                w.go("disk")
            for w in wires[:3]:
                flood(w, request_bytes(WRITE, 1, MIB, 65536, data=bytes(65536)) * 4, 2 * MIB + 17)
            for w in wires[3:6]:
                flood(w, request_bytes(READ, 1, 0, MIB) * 100, 2800)
            d.stop(sig)
            for w in wires:
                assert w.is_closed()
                w.close()
            d.log = open(f"{d.dir}/log", "rb")  # stop() comes once more


def test_many_at_once(daemon, image):
    """All of it at the same time, seeded."""

    def one(seed):
        rng = random.Random(seed)
        for _ in range(15):
            with raw(daemon) as sock:
                kind = rng.randrange(4)
                if kind == 0:
                    sock.sendall(GOOD[: rng.randrange(len(GOOD))])
                elif kind == 1:
                    sock.sendall(rng.randbytes(rng.randrange(2000)))
                else:
                    w = Wire(sock)
                    w.go("disk", structured=bool(rng.randrange(2)))
                    for _ in range(rng.randrange(40)):
                        command = rng.choice((READ, WRITE, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS, 9, 65535))
                        offset = rng.choice((0, SIZE - 1, rng.randrange(SIZE), (1 << 64) - 1, rng.randrange(1 << 64)))
                        length = rng.choice((0, 1, 512, rng.randrange(MIB), (1 << 32) - 1))
                        data = b""
                        if command == WRITE:
                            length = min(length, MIB)
                            data = bytes(length)
                        w.send(request_bytes(command, 0, offset, length, rng.choice((0, 0, 1, 2, 4, 8, 16, 65535)), data))
                    if kind == 2:
                        w.send(b"\0" * 28)
                        assert w.is_closed()

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(one, seed) for seed in range(16)]:
            done.result()
