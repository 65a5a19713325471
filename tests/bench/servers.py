# SPDX-License-Identifier: Apache-2.0
"""The servers that bench.py compares: how each is started, asked whether it is there, and ended."""

import atexit
import ctypes
import functools
import json
import os
import signal
import socket
import subprocess
import time

START_DEADLINE_S = 10
_libc = ctypes.CDLL(None, use_errno=True)
_running = []


def _die_with_parent():
    """Runs in the child: whatever ends bench.py ends its servers."""
    PR_SET_PDEATHSIG = 1
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _daemon_options(path, sock, aio, driver, read_only, secret):
    access = ",read-only=on" if read_only else ""
    return [
        *(["--object", f"secret,id=key,data={secret}"] if secret else []),
        "--blockdev", f"driver=file,node-name=f,filename={path},cache.direct=on{aio}{access}",
        "--blockdev", f"driver={driver},node-name=r,file=f{access}",
        "--nbd-server", f"addr.type=unix,addr.path={sock}",
        "--export", f"type=nbd,id=e,node-name=r,name=,writable={'off' if read_only else 'on'}",
    ]


def qsd_command(path, sock, direct, driver="raw", read_only=False, secret=None):
    del direct  # always O_DIRECT
    return ["qemu-storage-daemon", *_daemon_options(path, sock, ",aio=native", driver, read_only, secret)]


def nbdkit_command(path, sock, direct):
    if direct:
        raise ValueError("nbdkit's file plugin has no O_DIRECT")
    return ["nbdkit", "-f", "-U", sock, "file", path]


def floor_command(binary):
    return lambda path, sock, direct: [binary, *(["--direct"] if direct else []), sock, path]


def cairnd_command(binary):
    return lambda path, sock, direct, driver="raw", read_only=False, secret=None: [
        binary, *_daemon_options(path, sock, "", driver, read_only, secret)]


def nbd_greets(sock):
    """True when an NBD server answers on this socket."""
    with socket.socket(socket.AF_UNIX) as s:
        s.settimeout(START_DEADLINE_S)
        try:
            s.connect(sock)
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        return s.recv(18, socket.MSG_WAITALL)[:8] == b"NBDMAGIC"


class Server:
    """One running server; start_ms is the time from its fork to its NBD greeting."""

    def __init__(self, name, command, path, sock, direct=False, tied=True):
        self.name = name
        self.sock = sock
        self.cpus = None
        self.log = open(sock + ".log", "wb+")
        begin = time.perf_counter()
        # preexec_fn makes the fork slow, so a server whose start is measured goes without it.
        self.process = subprocess.Popen(
            command(path, sock, direct), stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log,
            preexec_fn=_die_with_parent if tied else None)
        _running.append(self)
        while not nbd_greets(sock):
            if self.process.poll() is not None or time.perf_counter() - begin > START_DEADLINE_S:
                self.fail("did not start")
            time.sleep(0.0002)
        self.start_ms = (time.perf_counter() - begin) * 1e3

    def fail(self, what):
        self.log.seek(0)
        said = self.log.read().decode(errors="replace").strip()
        self.stop()
        raise RuntimeError(f"{self.name} {what}: {said or 'it said nothing'}")

    @property
    def pid(self):
        return self.process.pid

    def alive(self):
        return self.process.poll() is None

    def place(self, cpus):
        """Pins all threads; those that they start later inherit it."""
        if self.cpus == cpus:
            return
        self.cpus = set(cpus)
        for task in os.listdir(f"/proc/{self.pid}/task"):
            try:
                os.sched_setaffinity(int(task), cpus)
            except OSError:
                pass  # it has ended, or is a worker of io_uring, which the kernel places

    def load(self, program, cpus, seconds, warm_s, options):
        """Has nbd-load ask it for this long, both pinned to these processors; returns the metrics."""
        if not self.alive():
            raise RuntimeError(f"{self.name} has died (status {self.process.returncode})")
        self.place(cpus)
        # nbd-load has a timeout of its own, much shorter than this one.
        r = subprocess.run(
            [program, "--unix", self.sock, "--server-pid", str(self.pid), "--warm", str(warm_s), "--time",
             str(seconds), "--timeout", "5", *options],
            capture_output=True, text=True, timeout=60 + seconds, check=False,
            preexec_fn=functools.partial(os.sched_setaffinity, 0, cpus))
        if r.returncode != 0:
            raise RuntimeError(f"{self.name}: {r.stderr.strip()}")
        raw = json.loads(r.stdout)
        if raw["ios"] == 0:
            raise RuntimeError(f"{self.name}: no request was answered in the measured time")
        gib_requests = (1 << 30) / raw["bs"]
        return {
            "cpu_us": raw["server_cpu_us_per_io"], "iops": raw["iops"], "mb_per_s": raw["mb_per_s"],
            "p50_us": raw["latency_us"]["p50"], "p99_us": raw["latency_us"]["p99"],
            "client_cpu_us": raw["client_cpu_us_per_io"],
            "cpu_s_per_gib": raw["server_cpu_us_per_io"] * gib_requests / 1e6,
        }

    def rss_mib(self):
        with open(f"/proc/{self.pid}/status", encoding="ascii") as f:
            fields = dict(line.split(":", 1) for line in f)
        return int(fields["VmRSS"].split()[0]) / 1024

    def stop(self):
        if self in _running:
            _running.remove(self)
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(2)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.log.close()
        for path in (self.sock, self.sock + ".log"):
            if os.path.exists(path):
                os.unlink(path)


def stop_all():
    for server in list(_running):
        server.stop()


def version_of(command):
    """The first line of what the program says about itself."""
    try:
        r = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "not there"
    lines = (r.stdout or r.stderr).splitlines()
    return lines[0] if lines else "says no version"


atexit.register(stop_all)
