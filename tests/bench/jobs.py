# SPDX-License-Identifier: Apache-2.0
"""
The rows of jobs and bitmaps: a backup alone, a guest's writes beside one, writes under eight bitmaps.

All on tmpfs, source and target written before; the servers run at once and take turns inside each repetition.
"""

import fnmatch
import json
import os
import socket
import statistics
import subprocess
import time

import rows as rowlib
import servers

MIB = 1 << 20
BACKUP = "job-backup-raw-raw"
GUEST = {"job-guest-randwrite-4k-d1": 1, "job-guest-randwrite-4k-d16": 16}
BITMAPS = "job-bitmaps-8-randwrite-4k-d16"
NAMES = [BACKUP, *GUEST, BITMAPS]
SPEED = 200 * MIB  # of the backup beside the guest
JOB_DEADLINE_S = 30


def select(patterns):
    return [n for n in NAMES if any(fnmatch.fnmatch(n, p) for p in patterns.split(","))]


def cpu_seconds(pid):
    """The process CPU clock: clock_getcpuclockid's number for it, which Python does not wrap."""
    return time.clock_gettime((~pid << 3) | 2)


class Qmp:
    """One QMP session; events are kept until they are waited for."""

    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(JOB_DEADLINE_S)
        self.socket.connect(path)
        self.file = self.socket.makefile("r", encoding="utf-8")
        self.events = []
        self.file.readline()
        self.command("qmp_capabilities")

    def _message(self):
        line = self.file.readline()
        if not line:
            raise RuntimeError("the server closed its QMP session")
        return json.loads(line)

    def command(self, execute, **arguments):
        self.socket.sendall(json.dumps({"execute": execute, "arguments": arguments}).encode() + b"\n")
        while "event" in (answer := self._message()):
            self.events.append(answer)
        if "error" in answer:
            raise RuntimeError(f"{execute}: {answer['error']['desc']}")
        return answer["return"]

    def backup(self, speed=0):
        self.events.clear()
        self.command("blockdev-backup", **{"job-id": "j", "device": "s", "target": "t", "sync": "full",
                                           "speed": speed})

    def wait_gone(self):
        """Until the job has left; fails when it did not complete well."""
        completed = False
        while True:
            e = self.events.pop(0) if self.events else self._message()
            if e.get("event") == "BLOCK_JOB_COMPLETED":
                if "error" in e["data"]:
                    raise RuntimeError(f"backup: {e['data']['error']}")
                completed = True
            if e.get("event") == "JOB_STATUS_CHANGE" and e["data"]["status"] == "null":
                if not completed:
                    raise RuntimeError("the backup left without completing")
                return


class Daemon:
    """A server with a disk 's', a target 't', a slow disk, and a QMP session."""

    def __init__(self, name, program, aio, directory):
        base = os.path.join(directory, name.replace("'", "-twin"))
        qmp = base + ".qmp"

        def disk(node):
            return ["--blockdev", f"driver=file,node-name={node}f,filename={base}.{node},cache.direct=on{aio}",
                    "--blockdev", f"driver=raw,node-name={node},file={node}f"]

        def export(node, disk_name):
            return ["--export", f"type=nbd,id=e{node},node-name={node},name={disk_name},writable=on"]

        def command(path, sock, direct):
            del path, direct
            return [program, *disk("s"), *disk("t"),
                    "--blockdev", "driver=null-co,node-name=n,latency-ns=10000000,size=1073741824",
                    "--chardev", f"socket,id=c,path={qmp},server=on,wait=off", "--monitor", "chardev=c",
                    "--nbd-server", f"addr.type=unix,addr.path={sock}", *export("s", ""), *export("n", "slow")]

        self.name = name
        self.server = servers.Server(name, command, None, base + ".sock")
        self.qmp = Qmp(qmp)

    def load_start(self, load, seconds, *options):
        return subprocess.Popen([load, "--unix", self.server.sock, "--server-pid", str(self.server.pid), "--warm",
                                 "0.05", "--time", str(seconds), *options], stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, text=True)

    def load_end(self, process):
        out, err = process.communicate(timeout=60)
        if process.returncode != 0:
            raise RuntimeError(f"{self.name}: {err.strip()}")
        raw = json.loads(out)
        return {"iops": raw["iops"], "cpu_us": raw["server_cpu_us_per_io"],
                **{k: raw["latency_us"][k] for k in ("p50", "p99", "max")}}


def measure_backup(daemon, size):
    cpu, begin = cpu_seconds(daemon.server.pid), time.monotonic()
    daemon.qmp.backup()
    daemon.qmp.wait_gone()
    seconds = time.monotonic() - begin
    return {"mb_per_s": size / seconds / 1e6,
            "cpu_s_per_gib": (cpu_seconds(daemon.server.pid) - cpu) * 1024 * MIB / size}


def measure_dd(base, size):
    begin = time.monotonic()
    subprocess.run(["dd", f"if={base}.s", f"of={base}.t", "bs=1M", "conv=notrunc", "status=none"], check=True)
    return {"mb_per_s": size / (time.monotonic() - begin) / 1e6}


def measure_guest(daemon, load, depth, seconds):
    found = {}
    for state in ("idle", "busy"):
        if state == "busy":
            daemon.qmp.backup(SPEED)
        slow = daemon.load_start(load, seconds, "--export", "slow")
        guest = daemon.load_start(load, seconds, "--op", "randwrite", "--depth", str(depth))
        found[state], found[state + "_slow"] = daemon.load_end(guest), daemon.load_end(slow)
        if state == "busy":
            ended = not daemon.qmp.command("query-jobs")
            daemon.qmp.wait_gone()  # says why, when it failed
            if ended:
                raise RuntimeError("the backup ended before the measurement")
    return found


def measure_bitmaps(cairnd, load, settings, directory, pairs):
    field = {n: Daemon(n, cairnd, "", directory) for n in ("A", "B", "A'")}
    for i in range(8):
        field["B"].qmp.command("block-dirty-bitmap-add", node="s", name=f"b{i}")
    for d in field.values():  # a first pass over the disk: the bitmaps are dirty before the measurement
        d.load_end(d.load_start(load, 0.5, "--op", "write", "--bs", str(MIB), "--depth", "4"))
    found = []
    for i in range(pairs):
        order = [["A", "B", "A'"], ["B", "A'", "A"], ["A'", "A", "B"]][i % 3]
        found.append({n: field[n].load_end(field[n].load_start(
            load, settings.time_s, "--op", "randwrite", "--depth", "16", "--seed", str(i + 1))) for n in order})
    return found


def run(names, args, settings, fill, directory):
    """All the chosen rows; returns (data, Markdown lines, failures)."""
    size = (512 if args.quick else 2048) * MIB
    data, failures = {n: [] for n in names}, []
    programs = {"qsd": ("qemu-storage-daemon", ",aio=native")}
    if args.cairnd:
        programs = {"cairnd": (args.cairnd, ""), **programs}
    for name in programs if set(names) - {BITMAPS} else ():
        for node in "st":
            fill(os.path.join(directory, f"{name}.{node}"), size)
    field = [Daemon(n, *p, directory) for n, p in programs.items()] if set(names) - {BITMAPS} else []
    for repetition in range(settings.repetitions):
        for row in names:
            if row == BITMAPS:
                continue
            point = {}
            for d in field[repetition % 2:] + field[:repetition % 2]:
                try:
                    point[d.name] = (measure_backup(d, size) if row == BACKUP else
                                     measure_guest(d, args.load, GUEST[row], settings.time_s))
                except (RuntimeError, OSError, subprocess.TimeoutExpired) as e:
                    failures.append(f"{row}: {d.name}: {e}")
            if row == BACKUP:
                point["dd"] = measure_dd(os.path.join(directory, "qsd"), size)
            data[row].append(point)
    servers.stop_all()
    if BITMAPS in names and args.cairnd:
        for name in ("A", "B", "A-twin"):
            for node in "st":
                fill(os.path.join(directory, f"{name}.{node}"), 64 * MIB)
        data[BITMAPS] = measure_bitmaps(args.cairnd, args.load, settings, directory, args.pairs)
        servers.stop_all()
    return data, _report(data), failures


def _verdict(row, level, text, ratios, holds, within_aa=False):
    return (f"| {row} | {level} | {text} | {statistics.median(ratios):.3f} ({min(ratios):.3f}..{max(ratios):.3f}) "
            f"| {'holds' if holds(statistics.median(ratios)) else '**misses**'}"
            f"{' (within A/A)' if within_aa else ''} |")


def _report(data):
    lines = ["", "## Jobs and bitmaps", "", f"Load average at the end: {os.getloadavg()[0]:.2f}.", "",
             "| row | server | figures (medians) |", "|---|---|---|"]
    verdicts = ["", "| row | level | what | median (min..max) | verdict |", "|---|---|---|---|---|"]
    for row, reps in data.items():
        for name in dict.fromkeys(n for r in reps for n in r):
            have = [r[name] for r in reps if name in r]
            if row in GUEST:
                for state in have[0]:
                    m = {k: statistics.median(h[state][k] for h in have) for k in have[0][state]}
                    lines.append(f"| {row} | {name} {state} | {m['iops']:.0f} IOPS; p50/p99/max {m['p50']:.0f}/"
                                 f"{m['p99']:.0f}/{m['max']:.0f} us; {m['cpu_us']:.2f} CPU us |")
            else:
                lines.append(f"| {row} | {name} | " + "; ".join(
                    f"{k} {statistics.median(h[k] for h in have):.2f}" for k in have[0]) + " |")
        whole = [r for r in reps if "cairnd" in r and "qsd" in r]
        if row == BACKUP and whole:
            verdicts += [
                _verdict(row, "must", "MB/s / qsd's at least 3",
                         [r["cairnd"]["mb_per_s"] / r["qsd"]["mb_per_s"] for r in whole], lambda v: v >= 3),
                _verdict(row, "must", "CPU s/GiB at most 0.25",
                         [r["cairnd"]["cpu_s_per_gib"] for r in whole], lambda v: v <= 0.25),
                _verdict(row, "aim", "MB/s / dd's at least 0.9",
                         [r["cairnd"]["mb_per_s"] / r["dd"]["mb_per_s"] for r in whole], lambda v: v >= 0.9)]
        if row in GUEST:
            for name in ("cairnd", "qsd"):
                kept = [r[name]["busy"]["iops"] / r[name]["idle"]["iops"] for r in reps if name in r]
                if kept:
                    verdicts.append(_verdict(row, "aim" if name == "cairnd" else "beside",
                                             f"{name}: IOPS beside a backup / idle at least 0.5", kept,
                                             lambda v: v >= 0.5))
        if row == BITMAPS and reps:
            ab = [r["B"]["cpu_us"] / r["A"]["cpu_us"] for r in reps]
            spread = rowlib.spread([r["A'"]["cpu_us"] / r["A"]["cpu_us"] for r in reps])
            verdicts.append(_verdict(row, "must", f"CPU per write with 8 bitmaps / none at most 1.05 (A/A "
                                     f"{100 * spread:.1f} %)", ab, lambda v: v <= 1.05,
                                     abs(statistics.median(ab) / 1.05 - 1) <= spread))
    return lines + verdicts
