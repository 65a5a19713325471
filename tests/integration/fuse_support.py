# SPDX-License-Identifier: Apache-2.0
"""A file that stops answering, or fails: a FUSE file system of one file, mounted over a regular file. Needs /dev/fuse and root.

    fuse_support.py FILE SIZE       then lines on stdin, each answered by "ok": keep, ignore, fail ERRNO, go

It speaks the kernel's protocol itself (linux/fuse.h, 7.19), so that it can leave requests unanswered in both ways that there are:
`keep` takes them and says nothing, so that the kernel's wait cannot even be killed; `ignore` does not take them.
"""
import ctypes
import errno
import os
import select
import signal
import struct
import subprocess
import sys

import pytest

(GETATTR, SETATTR, OPEN, READ, WRITE, STATFS, RELEASE, FSYNC, FLUSH, INIT, INTERRUPT, FORGET, FALLOCATE, LSEEK, BATCH_FORGET) = (
    3, 4, 14, 15, 16, 17, 18, 20, 25, 26, 36, 2, 43, 46, 42)
IN = struct.Struct("<IIQQIIII")
MODE = 0o100600
MAX_WRITE = 1 << 17
MNT_FORCE, MNT_DETACH = 1, 2

libc = ctypes.CDLL(None, use_errno=True)


class Server:
    def __init__(self, path, size):
        self.content = bytearray(size)
        self.device = os.open("/dev/fuse", os.O_RDWR)
        self.kept = []  # requests that are not answered
        self.way = "go"
        self.error = 0
        options = f"fd={self.device},rootmode={MODE:o},user_id=0,group_id=0"
        if libc.mount(b"stalls", path.encode(), b"fuse.stalls", 0, options.encode()) < 0:
            raise OSError(ctypes.get_errno(), "mount")

    def attributes(self):
        """With no time of validity: struct fuse_attr_out."""
        attr = struct.pack("<6Q10I", 1, len(self.content), len(self.content) // 512, 0, 0, 0, 0, 0, 0, MODE, 1, 0, 0, 0, 4096, 0)
        return struct.pack("<QII", 0, 0, 0) + attr

    def reply(self, unique, data=b"", error=0):
        try:
            os.write(self.device, struct.pack("<IiQ", 16 + len(data), -error, unique) + data)
        except FileNotFoundError:
            pass  # it was interrupted meanwhile

    def change(self, opcode, body):
        if opcode == SETATTR:
            valid, _, _, size = struct.unpack_from("<IIQQ", body)
            if valid & 8:
                self.content[size:] = bytes(max(0, size - len(self.content)))
            return self.attributes()
        _, offset, length = struct.unpack_from("<QQI" if opcode == WRITE else "<QQQ", body)
        data = body[40:40 + length] if opcode == WRITE else bytes(length)
        mode = struct.unpack_from("<I", body, 24)[0] if opcode == FALLOCATE else 0
        if mode & 1:  # FALLOC_FL_KEEP_SIZE
            data = data[:max(0, len(self.content) - offset)]
        self.content[offset:offset + len(data)] = data
        return struct.pack("<II", length, 0) if opcode == WRITE else b""

    def handle(self, message):
        _, opcode, unique, *_ = IN.unpack_from(message)
        body = message[IN.size:]
        if opcode in (FORGET, BATCH_FORGET, INTERRUPT):
            return
        if opcode == INIT:
            answer = struct.pack("<IIIIHHIIHHI28x", 7, 19, 0, 1, 64, 48, MAX_WRITE, 1, 0, 0, 0)
            self.reply(unique, answer[:24])  # 1: FUSE_ASYNC_READ
        elif opcode in (WRITE, SETATTR, FALLOCATE) and self.error:
            self.reply(unique, error=self.error)
        elif opcode in (WRITE, SETATTR, FALLOCATE):
            self.reply(unique, self.change(opcode, body))
        elif opcode == GETATTR:
            self.reply(unique, self.attributes())
        elif opcode == OPEN:
            self.reply(unique, struct.pack("<QII", 0, 0, 0))
        elif opcode == READ:
            _, offset, length = struct.unpack_from("<QQI", body)
            self.reply(unique, bytes(self.content[offset:offset + length]))
        elif opcode == STATFS:
            self.reply(unique, struct.pack("<5Q4I24x", 1 << 20, 1 << 19, 1 << 19, 10, 5, 4096, 255, 4096, 0))
        elif opcode in (RELEASE, FSYNC, FLUSH):
            self.reply(unique)
        else:
            self.reply(unique, error=errno.ENOSYS)

    def obey(self, line):
        self.way, *rest = line.split()
        self.error = int(rest[0]) if self.way == "fail" else 0
        if self.way in ("go", "fail"):
            kept, self.kept = self.kept, []
            for message in kept:
                self.handle(message)
        print("ok", flush=True)

    def serve(self):
        while True:
            wanted = [sys.stdin] if self.way == "ignore" else [sys.stdin, self.device]
            ready, _, _ = select.select(wanted, [], [])
            if sys.stdin in ready:
                line = sys.stdin.readline()
                if not line:
                    return
                self.obey(line)
            elif self.device in ready:
                message = os.read(self.device, MAX_WRITE + 4096)
                if self.way == "keep":
                    self.kept.append(message)
                else:
                    self.handle(message)


class StallingFile:
    """The same, for tests: one that runs in a process of its own, and is gone after the `with`."""

    def __init__(self, path, size):
        self.path = path
        with open(path, "wb"):
            pass
        self.process = subprocess.Popen([sys.executable, __file__, path, str(size)], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        if self.process.stdout.readline() != "ready\n":
            why = self.process.communicate()[1]
            pytest.skip(f"no FUSE file system can be mounted: {why.splitlines()[-1] if why else 'it ended'}")

    def tell(self, line):
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "ok\n"

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.process.communicate()  # its input ends


def main():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    server = Server(sys.argv[1], int(sys.argv[2]))
    try:
        print("ready", flush=True)
        server.serve()
    finally:  # also when the test was killed; all that waits ends
        libc.umount2(sys.argv[1].encode(), MNT_FORCE | MNT_DETACH)


if __name__ == "__main__":
    main()
