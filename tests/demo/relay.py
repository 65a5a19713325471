# SPDX-License-Identifier: Apache-2.0
"""Looks at a control socket from outside: when was the backup command sent, when did its reply come?

The relay stands between the tool and the daemon and passes all bytes on. So the window in which the instant of a backup
must lie is as narrow as it can be, and nobody who is judged by it has measured it.
"""
import contextlib
import json
import socket
import threading
import time


def now_ns():
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC)


class Scanner:
    """Messages out of a stream of JSON values without framing."""

    def __init__(self):
        self.text = ""
        self.bytes = b""
        self.decoder = json.JSONDecoder()

    def feed(self, data):
        self.bytes += data
        try:
            self.text += self.bytes.decode()
            self.bytes = b""
        except UnicodeDecodeError:  # a character is cut in two
            return
        while True:
            self.text = self.text.lstrip()
            try:
                message, end = self.decoder.raw_decode(self.text)
            except ValueError:
                return
            self.text = self.text[end:]
            yield message


def starts_backup(message):
    if message.get("execute") == "transaction":
        return any(action.get("type") == "blockdev-backup" for action in message["arguments"]["actions"])
    return message.get("execute") == "blockdev-backup"


class Session:
    """One client: two threads, one for each direction."""

    def __init__(self, relay, client):
        self.relay = relay
        self.client = client
        self.daemon = socket.socket(socket.AF_UNIX)
        self.daemon.connect(relay.target)
        self.asked = []  # commands without a reply: [id, when the backup command was seen, or None]
        self.lock = threading.Lock()
        for source, sink, look in ((client, self.daemon, self.command), (self.daemon, client, self.answer)):
            threading.Thread(target=self.pass_on, args=(source, sink, look), daemon=True).start()

    def pass_on(self, source, sink, look):
        scanner = Scanner()
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                at = now_ns()
                for message in scanner.feed(data):
                    look(message, at)
                sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)

    def command(self, message, at):
        with self.lock:
            self.asked.append([message.get("id"), at if starts_backup(message) else None])

    def answer(self, message, at):
        if "return" not in message and "error" not in message:
            return
        with self.lock:
            index = next((i for i, (name, _) in enumerate(self.asked) if name == message.get("id")), None)
            if index is None:
                return
            _, begin = self.asked.pop(index)
        if begin is not None and "return" in message:
            self.relay.windows.append((begin, at))


class Relay:
    def __init__(self, path, target):
        self.target = target
        self.windows = []  # of the backup commands that succeeded: (before it was passed on, after the reply came)
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.bind(path)
        self.sock.listen()
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            client, _ = self.sock.accept()
            try:
                Session(self, client)
            except OSError:
                client.close()
