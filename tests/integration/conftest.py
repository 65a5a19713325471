# SPDX-License-Identifier: Apache-2.0
"""What the tests of the daemon share: starting it, and speaking QMP to it or to a peer."""
import json
import os
import shutil
import signal
import socket
import subprocess
import time

import pytest

PATIENCE = 30  # seconds, for what should take milliseconds


def wait_until(true, what):
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline, f"waited {PATIENCE} s for {what}"
        time.sleep(0.005)


class Qmp:
    """A client of a control socket. Events that come between answers are kept in `events`."""

    def __init__(self, path, negotiate=True):
        wait_until(lambda: self.connect(path), f"'{path}' to listen")
        self.file = self.socket.makefile("rb")
        self.events = []
        self.greeting = self.receive()
        if negotiate:
            assert self.command("qmp_capabilities") == {}

    def connect(self, path):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(PATIENCE)
        try:
            self.socket.connect(path)
        except ConnectionRefusedError:  # it is bound, and does not listen yet
            self.socket.close()
            return False
        return True

    def send(self, data):
        self.socket.sendall(data if isinstance(data, bytes) else json.dumps(data).encode())

    def receive(self):
        """The next message; None at the end."""
        line = self.file.readline()
        if not line:
            return None
        assert line.endswith(b"\r\n"), line
        return json.loads(line)

    def answer(self):
        """The next message that is no event."""
        while True:
            message = self.receive()
            if message is None or "event" not in message:
                return message
            self.events.append(message)

    def event(self, name):
        while True:
            for i, event in enumerate(self.events):
                if event["event"] == name:
                    return self.events.pop(i)
            message = self.receive()
            assert message and "event" in message, message
            self.events.append(message)

    def execute(self, name, /, **arguments):
        self.send({"execute": name, "arguments": {k.replace("_", "-"): v for k, v in arguments.items()}})
        return self.answer()

    def command(self, name, /, **arguments):
        """What a command that must succeed returns."""
        answer = self.execute(name, **arguments)
        assert "return" in answer, (name, arguments, answer)
        return answer["return"]

    def refused(self, name, /, **arguments):
        """The error of a command that must fail."""
        answer = self.execute(name, **arguments)
        assert "error" in answer, (name, arguments, answer)
        assert set(answer["error"]) == {"class", "desc"}
        return answer["error"]

    def close(self):
        self.file.close()
        self.socket.close()


class Daemon:
    """A daemon with a control socket, here or a peer's."""

    def __init__(self, program, directory, *options, qmp=True):
        self.directory = str(directory)
        self.path = os.path.join(self.directory, "qmp.sock")
        self.program = program
        self.clients = []
        monitor = ["--chardev", f"socket,id=c,path={self.path},server=on,wait=off", "--monitor", "chardev=c"]
        # A peer that is connected to before it is ready may greet twice.
        ready = os.path.join(self.directory, "ready")
        if "--pidfile" in options:
            ready = options[options.index("--pidfile") + 1]
        else:
            monitor += ["--pidfile", ready]
        self.stderr_path = os.path.join(self.directory, "stderr")
        with open(self.stderr_path, "wb") as stderr:
            self.process = subprocess.Popen(
                [program, *(monitor if qmp else []), *options], stderr=stderr, cwd=self.directory
            )
        if qmp:
            wait_until(lambda: os.path.exists(ready) or self.process.poll() is not None, "the daemon to be ready")
            assert self.process.poll() is None, self.stderr()

    def stderr(self):
        with open(self.stderr_path, encoding="utf-8") as f:
            return f.read()

    def qmp(self, negotiate=True):
        self.clients.append(Qmp(self.path, negotiate))
        return self.clients[-1]

    def memory(self, field):
        """VmRSS, VmHWM, ... in bytes."""
        with open(f"/proc/{self.process.pid}/status", encoding="ascii") as f:
            for line in f:
                if line.startswith(field + ":"):
                    return int(line.split()[1]) * 1024
        raise KeyError(field)

    def files(self):
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def wait(self):
        return self.process.wait(PATIENCE)

    def stop(self):
        """Ends it in order, if it still runs; it must end well."""
        for client in self.clients:
            client.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            status = self.wait()
        finally:
            self.process.kill()
        assert status == 0, f"status {status}: {self.stderr()}"


@pytest.fixture(scope="session")
def cairnd():
    """Path of the program."""
    build = os.environ.get("CAIRN_BUILD")
    path = os.environ.get("CAIRND") or (build and os.path.join(build, "src/daemon/cairnd"))
    assert path and os.access(path, os.X_OK), "CAIRN_BUILD names no build directory with cairnd in it"
    return os.path.abspath(path)


@pytest.fixture(scope="session")
def peer():
    path = shutil.which("qemu-storage-daemon")
    if not path:
        pytest.skip("qemu-storage-daemon is not installed")
    return path


@pytest.fixture
def start(cairnd, tmp_path):
    """Starts daemons, each in a directory of its own; all must end well. start(*options, qmp=..., program=...)"""
    daemons = []

    def starter(*options, program=cairnd, qmp=True):
        directory = tmp_path / str(len(daemons))
        directory.mkdir()
        daemons.append(Daemon(program, directory, *options, qmp=qmp))
        return daemons[-1]

    yield starter
    for daemon in daemons:
        daemon.stop()


@pytest.fixture
def daemon(start):
    return start()
