#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""
Test of the load generator itself, against servers that misbehave: nbd-load must end in time, with the right exit
status, and --verify must see what is wrong. Usage: test-nbd-load.py NBD-LOAD FLOOR-SERVER
"""

import os
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time

SIZE = 1 << 20
GREETING = b"NBDMAGICIHAVEOPT" + struct.pack(">H", 3)
OK, IO_ERRORS, FAILED, MISMATCH = range(4)


def recv_all(conn, n):
    data = b""
    while len(data) < n:
        piece = conn.recv(n - len(data))
        if not piece:
            raise ConnectionError("the client has gone")
        data += piece
    return data


def handshake(conn):
    """A correct one: any option but GO is acknowledged, any name is our export."""
    conn.sendall(GREETING)
    recv_all(conn, 4)
    while True:
        _, option, length = struct.unpack(">QII", recv_all(conn, 16))
        recv_all(conn, length)
        if option == 7:
            info = struct.pack(">HQH", 0, SIZE, 0x105)
            conn.sendall(struct.pack(">QIII", 0x3e889045565a9, 7, 3, len(info)) + info)
        conn.sendall(struct.pack(">QIII", 0x3e889045565a9, option, 1, 0))
        if option == 7:
            return


def requests(conn):
    """(command, cookie, offset, length, data) until the client leaves."""
    while True:
        _, _, command, cookie, offset, length = struct.unpack(">IHHQQI", recv_all(conn, 28))
        if command == 2:
            return
        yield command, cookie, offset, length, recv_all(conn, length) if command == 1 else b""


def simple(cookie, error=0):
    return struct.pack(">IIQ", 0x67446698, error, cookie)


def chunk(cookie, kind, payload, done=True):
    return struct.pack(">IHHQI", 0x668e33ef, int(done), kind, cookie, len(payload)) + payload


def silent(conn):
    time.sleep(30)


def trickles_greeting(conn):
    for byte in GREETING * 100:
        conn.sendall(bytes([byte]))
        time.sleep(0.2)


def endless_options(conn):
    conn.sendall(GREETING)
    recv_all(conn, 4)
    while True:
        conn.sendall(struct.pack(">QIIIH", 0x3e889045565a9, 7, 3, 2, 9))


def huge_option(conn):
    conn.sendall(GREETING)
    recv_all(conn, 4)
    conn.sendall(struct.pack(">QIII", 0x3e889045565a9, 7, 3, 0xffffffff))
    time.sleep(30)


def never_answers(conn):
    handshake(conn)
    time.sleep(30)


def trickles_data(conn):
    handshake(conn)
    for _, cookie, _, length, _ in requests(conn):
        conn.sendall(simple(cookie))
        for _ in range(length):
            conn.sendall(b"x")
            time.sleep(0.1)


def answering(make):
    """A server that answers each read by make(cookie, offset, length)."""
    def serve(conn):
        handshake(conn)
        for _, cookie, offset, length, _ in requests(conn):
            conn.sendall(make(cookie, offset, length))
    return serve


def memory(spoil):
    """A server on memory; spoil(disk, number of the write, offset, data) does the writing."""
    def serve(conn):
        handshake(conn)
        disk = bytearray(SIZE)
        writes = 0
        for command, cookie, offset, length, data in requests(conn):
            if command == 1:
                writes += 1
                spoil(disk, writes, offset, data)
            conn.sendall(simple(cookie) + (bytes(disk[offset:offset + length]) if command == 0 else b""))
    return serve


def write_well(disk, _, offset, data):
    disk[offset:offset + len(data)] = data


def lose_one(disk, number, offset, data):
    if number != 300:
        write_well(disk, number, offset, data)


def misplace_one(disk, number, offset, data):
    write_well(disk, number, (offset + 4096) % SIZE if number == 300 else offset, data)


def tear_one(disk, number, offset, data):
    write_well(disk, number, offset, data[:2048] if number == 300 else data)


def data_chunk(cookie, offset, payload, done=True):
    return chunk(cookie, 1, struct.pack(">Q", offset) + payload, done)


CASES = [
    # name, server, options beyond the common ones, exit status
    ("silent_server", silent, [], FAILED),
    ("trickled_greeting", trickles_greeting, [], FAILED),
    ("endless_option_replies", endless_options, [], FAILED),
    ("huge_option_reply", huge_option, [], FAILED),
    ("request_never_answered", never_answers, [], FAILED),
    ("trickled_data", trickles_data, [], FAILED),
    ("bad_magic", answering(lambda c, o, n: b"\0" * 16), [], FAILED),
    ("unknown_cookie", answering(lambda c, o, n: simple(c ^ 1 << 40) + bytes(n)), [], FAILED),
    ("answered_twice", answering(lambda c, o, n: (simple(c) + bytes(n)) * 2), ["--time", "5"], FAILED),
    ("structured_not_agreed", answering(lambda c, o, n: data_chunk(c, o, bytes(n))), [], FAILED),
    ("error_reply", answering(lambda c, o, n: simple(c, 5)), [], IO_ERRORS),
    ("good_simple", answering(lambda c, o, n: simple(c) + bytes(n)), [], OK),
    ("good_structured", answering(lambda c, o, n: data_chunk(c, o + 512, bytes(n - 512), False) +
                                  chunk(c, 2, struct.pack(">QI", o, 512))), ["--structured"], OK),
    ("structured_error", answering(lambda c, o, n: chunk(c, 0x8001, struct.pack(">IH", 5, 3) + b"bad")),
     ["--structured"], IO_ERRORS),
    ("simple_though_structured", answering(lambda c, o, n: simple(c) + bytes(n)), ["--structured"], FAILED),
    ("chunk_outside", answering(lambda c, o, n: data_chunk(c, o + 1, bytes(n))), ["--structured"], FAILED),
    ("chunk_too_short", answering(lambda c, o, n: data_chunk(c, o, bytes(n - 1))), ["--structured"], FAILED),
    ("chunk_length_lies", answering(lambda c, o, n: struct.pack(">IHHQIQ", 0x668e33ef, 1, 1, c, 4, o)),
     ["--structured"], FAILED),
    ("hole_too_long", answering(lambda c, o, n: chunk(c, 2, struct.pack(">QI", o, 1 << 31))),
     ["--structured"], FAILED),
    ("stride_is_kept", answering(lambda c, o, n: simple(c, 5 if o % 65536 else 0) + (b"" if o % 65536 else bytes(n))),
     ["--stride", "65536"], OK),
    ("stride_below_bs", silent, ["--stride", "512"], FAILED),
    ("verify_good", memory(write_well), ["--verify", "--read-percent", "0"], OK),
    ("verify_lost_write", memory(lose_one), ["--verify", "--read-percent", "90"], MISMATCH),
    ("verify_misplaced_write", memory(misplace_one), ["--verify", "--read-percent", "90"], MISMATCH),
    ("verify_torn_write", memory(tear_one), ["--verify", "--read-percent", "90"], MISMATCH),
]


def serve_once(listener, serve):
    conn, _ = listener.accept()
    with conn:
        try:
            serve(conn)
        except (ConnectionError, BrokenPipeError):
            pass  # the client has given up, as it should


def run_case(load, directory, name, serve, options, want):
    path = os.path.join(directory, name)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        threading.Thread(target=serve_once, args=(listener, serve), daemon=True).start()
        begin = time.monotonic()
        r = subprocess.run([load, "--unix", path, "--depth", "4", "--warm", "0", "--time", "0.1", "--timeout", "1",
                            *options], capture_output=True, text=True, timeout=15, check=False)
        took = time.monotonic() - begin
    good = r.returncode == want and took < 8
    print(f"{'ok' if good else 'not ok'} - {name}")
    if not good:
        print(f"# exit status {r.returncode} after {took:.1f} s, expected {want}: {r.stdout}{r.stderr}")
    return good


def run_floor(load, floor, directory):
    """The two programs against each other, over many connections, with requests of many lengths."""
    good = True
    image = os.path.join(directory, "image")
    with open(image, "wb") as f:
        f.truncate(16 << 20)
    for number, options in enumerate((["--bs", "4096"], ["--bs", "262144"], ["--bs", "512", "--size", "1048576"])):
        sock = os.path.join(directory, f"floor{number}")
        server = subprocess.Popen([floor, sock, image])
        while not os.path.exists(sock):
            time.sleep(0.01)
        time.sleep(0.05)
        r = subprocess.run([load, "--unix", sock, "--verify", "--depth", "16", "--connections", "4", "--time", "0.2",
                            *options], capture_output=True, text=True, timeout=60, check=False)
        server.kill()
        server.wait()
        print(f"{'ok' if r.returncode == OK else 'not ok'} - floor_verifies_{options[1]}")
        if r.returncode != OK:
            print(f"# exit status {r.returncode}: {r.stdout}{r.stderr}")
            good = False
    return good


def main():
    load, floor = sys.argv[1:]
    with tempfile.TemporaryDirectory() as directory:
        print(f"1..{len(CASES) + 3}")
        results = [run_case(load, directory, *case) for case in CASES]
        results.append(run_floor(load, floor, directory))
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
