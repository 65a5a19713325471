# SPDX-License-Identifier: Apache-2.0
"""For tests of the NBD server: a daemon, its control socket, and a client that speaks the wire's bytes."""
import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import tempfile
import time

CAIRND = os.environ["CAIRND"]
# Programs under a sanitizer are slower and larger; what they print there is a failure.
SANITIZED = os.environ.get("CAIRN_SANITIZED") == "1"

MIB = 1 << 20


def wait_until(what, seconds=10.0):
    """Polls; what it waits for happens in another process, which has no other way to say so."""
    end = time.monotonic() + seconds
    while True:
        value = what()
        if value or time.monotonic() > end:
            return value
        time.sleep(0.005)


class QmpError(Exception):
    def __init__(self, error):
        super().__init__(error["desc"])
        self.cls = error["class"]


class Qmp:
    """A client of the control socket."""

    def __init__(self, path):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(60)
        self.sock.connect(path)
        self.file = self.sock.makefile("rb")
        self.events = []
        assert "QMP" in json.loads(self.file.readline())
        self("qmp_capabilities")

    def send(self, command, **arguments):
        message = {"execute": command, "arguments": {k.replace("_", "-"): v for k, v in arguments.items()}}
        self.sock.sendall(json.dumps(message).encode() + b"\n")

    def receive(self):
        while True:
            line = self.file.readline()
            if not line:
                raise EOFError("the daemon has closed the control socket")
            message = json.loads(line)
            if "event" not in message:
                break
            self.events.append(message)
        if "error" in message:
            raise QmpError(message["error"])
        return message["return"]

    def __call__(self, command, **arguments):
        self.send(command, **arguments)
        return self.receive()

    def wait_event(self, name, **data):
        while True:
            for event in self.events:
                if event["event"] == name and all(event["data"].get(k) == v for k, v in data.items()):
                    self.events.remove(event)
                    return event
            message = json.loads(self.file.readline())
            assert "event" in message, message
            self.events.append(message)

    def close(self):
        self.file.close()
        self.sock.close()


class Daemon:
    """cairnd with an NBD server on a Unix socket (or TCP) and a control socket; leaving the `with` ends and checks it."""

    count = 0

    def __init__(self, *options, server="unix", max_connections=None, engine=None, io_threads=2, env=None):
        # A short place of its own: a socket's path has 107 bytes at most.
        self.dir = tempfile.mkdtemp(prefix="d", dir=os.environ.get("TMPDIR"))
        self.qmp_path = f"{self.dir}/qmp"
        self.path = f"{self.dir}/nbd"
        self.log = open(f"{self.dir}/log", "w+b")
        self.expected = []  # in lines that it may print
        self.port = None
        words = [CAIRND, "--io-threads", str(io_threads), "--chardev",
                 f"socket,id=q,path={self.qmp_path},server=on,wait=off", "--monitor", "chardev=q"]
        if engine or os.environ.get("CAIRN_ENGINE"):
            words += ["--engine", engine or os.environ["CAIRN_ENGINE"]]
        extra = "" if max_connections is None else f",max-connections={max_connections}"
        if server == "unix":
            words += ["--nbd-server", f"addr.type=unix,addr.path={self.path}{extra}"]
        elif server == "tcp":
            with socket.socket() as probe:  # a port that is free now
                probe.bind(("127.0.0.1", 0))
                self.port = probe.getsockname()[1]
            words += ["--nbd-server", f"addr.type=inet,addr.host=127.0.0.1,addr.port={self.port}{extra}"]
        self.process = subprocess.Popen(
            words + list(options), stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log,
            env={**os.environ, **(env or {})},
        )
        self.qmp = wait_until(self.try_qmp)
        if not self.qmp:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"the daemon did not start: {self.output()}")

    def try_qmp(self):
        if self.process.poll() is not None:
            raise AssertionError(f"the daemon did not start: {self.output()}")
        try:
            return Qmp(self.qmp_path)
        except (FileNotFoundError, ConnectionRefusedError):
            return None

    def output(self):
        with open(f"{self.dir}/log", "rb") as f:
            return f.read().decode("utf-8", "replace")

    def uri(self, name):
        if self.port:
            return f"nbd://127.0.0.1:{self.port}/{name}"
        return f"nbd+unix:///{name}?socket={self.path}"

    def add(self, name, path, writable=True, **node):
        """A node of this name on a file, and an export of the same name."""
        self.qmp("blockdev-add", driver="file", node_name=name, filename=str(path), **node)
        self.export(name, writable=writable)

    def export(self, name, writable=True, **more):
        self.qmp("block-export-add", type="nbd", id=f"e-{name}", node_name=name, writable=writable, **more)

    def clients(self, name):
        return {e["id"]: e["clients"] for e in self.qmp("query-block-exports")}[f"e-{name}"]

    def rss(self):
        with open(f"/proc/{self.process.pid}/status", encoding="ascii") as f:
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith("VmRSS"))

    def fds(self):
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def connect(self):
        if self.port:
            sock = socket.create_connection(("127.0.0.1", self.port))
        else:
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(self.path)
        sock.settimeout(60)
        return sock

    def stop(self, sig=signal.SIGTERM):
        """Ends in order: status 0, and nothing said that the test does not expect."""
        with contextlib.suppress(OSError):
            self.qmp.close()
        if self.process.poll() is None:
            self.process.send_signal(sig)
        try:
            status = self.process.wait(120 if SANITIZED else 30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            status = "none: it did not end"
        output = self.output()
        self.log.close()
        unexpected = [line for line in output.splitlines() if not any(text in line for text in self.expected)]
        assert status == 0 and not unexpected, f"exit status {status}: {output}"

    def __enter__(self):
        return self

    def __exit__(self, kind, *rest):
        if kind is None:
            self.stop()
            return
        self.process.kill()
        self.process.wait()
        print("daemon said:", self.output())


# The wire.

NBD_MAGIC = 0x4E42444D41474943
OPTION_MAGIC = 0x49484156454F5054
OPTION_REPLY_MAGIC = 0x0003E889045565A9
REQUEST_MAGIC = 0x25609513
SIMPLE_MAGIC = 0x67446698
STRUCTURED_MAGIC = 0x668E33EF

EXPORT_NAME, ABORT, LIST, PEEK, STARTTLS, INFO, GO, STRUCTURED, LIST_META, SET_META, EXTENDED = range(1, 12)
REP_ACK, REP_SERVER, REP_INFO, REP_META = 1, 2, 3, 4
ERR_UNSUP, ERR_POLICY, ERR_INVALID, ERR_UNKNOWN, ERR_TOO_BIG = (0x80000000 + n for n in (1, 2, 3, 6, 9))
READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO = 1, 2, 4, 8, 16


def info_data(name, *items):
    name = name.encode()
    return struct.pack(">I", len(name)) + name + struct.pack(f">H{len(items)}H", len(items), *items)


def meta_data(name, *queries):
    name = name.encode()
    data = struct.pack(">I", len(name)) + name + struct.pack(">I", len(queries))
    for query in queries:
        data += struct.pack(">I", len(query)) + query.encode()
    return data


def option_bytes(option, data=b"", length=None):
    return struct.pack(">QII", OPTION_MAGIC, option, len(data) if length is None else length) + data


def request_bytes(command, cookie=0, offset=0, length=0, flags=0, data=b""):
    return struct.pack(">IHHQQI", REQUEST_MAGIC, flags, command, cookie, offset, length) + data


class Wire:
    """A client that says what it is told to, right or wrong."""

    def __init__(self, sock, greet=True, flags=3):
        self.sock = sock
        self.structured = False
        if greet:
            magic, option_magic, server_flags = struct.unpack(">QQH", self.recv(18))
            assert (magic, option_magic, server_flags) == (NBD_MAGIC, OPTION_MAGIC, 3)
            self.send(struct.pack(">I", flags))

    def send(self, data):
        self.sock.sendall(data)

    def recv(self, length):
        data = bytearray()
        while len(data) < length:
            piece = self.sock.recv(length - len(data))
            if not piece:
                raise EOFError(f"closed after {len(data)} of {length} bytes")
            data += piece
        return bytes(data)

    def is_closed(self):
        """True if the server closes, whatever it has said before; False if it does not within the socket's time."""
        try:
            while self.sock.recv(65536):
                pass
        except ConnectionResetError:
            pass
        except TimeoutError:
            return False
        return True

    def replies(self, option):
        """All replies to an option, as (type, data), up to ACK or an error."""
        got = []
        while True:
            magic, of, kind, length = struct.unpack(">QIII", self.recv(20))
            assert magic == OPTION_REPLY_MAGIC and of == option, (hex(magic), of)
            got.append((kind, self.recv(length)))
            if kind == REP_ACK or kind & 0x80000000:
                return got

    def option(self, option, data=b"", length=None):
        self.send(option_bytes(option, data, length))
        return self.replies(option)

    def result(self, option, data=b"", length=None):
        """The type of the last reply."""
        return self.option(option, data, length)[-1][0]

    def go(self, name, structured=True, context=False):
        """To the transmission phase. Returns (size, transmission flags)."""
        if structured:
            assert self.result(STRUCTURED) == REP_ACK
            self.structured = True
        if context:
            got = self.option(SET_META, meta_data(name, "base:allocation"))
            assert [kind for kind, _ in got] == [REP_META, REP_ACK], got
        got = self.option(GO, info_data(name))
        assert got[-1][0] == REP_ACK, got
        export = next(data for kind, data in got if kind == REP_INFO and data[:2] == b"\0\0")
        return struct.unpack(">QH", export[2:])

    def request(self, command, cookie=0, offset=0, length=0, flags=0, data=b""):
        self.send(request_bytes(command, cookie, offset, length, flags, data))

    def reply(self, read_length=0):
        """(cookie, error, data). data: of a read that succeeded, or descriptors as [(length, state)]."""
        magic = struct.unpack(">I", self.recv(4))[0]
        if magic == SIMPLE_MAGIC:
            assert not self.structured
            error, cookie = struct.unpack(">IQ", self.recv(12))
            return cookie, error, self.recv(read_length) if read_length and not error else b""
        assert magic == STRUCTURED_MAGIC and self.structured, hex(magic)
        flags, kind, cookie, length = struct.unpack(">HHQI", self.recv(16))
        payload = self.recv(length)
        assert flags == 1, "each reply is one chunk"
        if kind == 0:
            assert length == 0
            return cookie, 0, b""
        if kind == 1:
            return cookie, 0, payload[8:]
        if kind == 5:
            numbers = struct.unpack(f">{length // 4}I", payload)
            return cookie, 0, list(zip(numbers[1::2], numbers[2::2]))
        assert kind == 0x8001, kind
        error, text_length = struct.unpack(">IH", payload[:6])
        assert length == 6 + text_length
        return cookie, error, payload[6:]

    def ask(self, command, offset=0, length=0, flags=0, data=b""):
        """One request alone: (error, data)."""
        self.request(command, 0x1234, offset, length, flags, data)
        cookie, error, got = self.reply(length if command == READ else 0)
        assert cookie == 0x1234
        return error, got

    def close(self):
        self.sock.close()
