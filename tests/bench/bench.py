#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""
Measure NBD servers side by side (rule M1).

All servers run at once, each on a file of its own that was written before; inside a repetition the servers are
measured in turn at each row, so what disturbs the machine disturbs all. The primary figure is the server's processor
time per request. It is the server's process CPU clock (clock_getcpuclockid), which nbd-load reads at both ends of the
measured window: exact to the nanosecond, over all threads, with those that have ended and io_uring's workers (tried:
it equals the sum of schedstat over /proc/PID/task, where the workers are listed as iou-wrk). Work that the kernel does
in threads of its own (writeback, interrupts) is in nobody's figure.

Where the scheduler puts client and server decides more than the servers do: in a virtual machine waking a halted CPU
costs tens of microseconds on both sides, the same server is found in either state from run to run, and at depth 1 the
figures differ tenfold. So there are two placements: "one-cpu" pins servers and generator to one CPU, which is repeatable
to a few per cent and is what --quick judges; "free" leaves it to the scheduler, as users do.
"""

import argparse
import atexit
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import images
import jobs
import report
import rows as rowlib
import servers
import tools

MIB = 1 << 20
CPUS = os.sched_getaffinity(0)
ONE_CPU = {max(CPUS)}  # the first one takes most interrupts
images.ROWS.extend(tools.ROWS)

HERE = os.path.dirname(os.path.abspath(__file__))


class Settings:
    """Lengths and counts of a run."""

    def __init__(self, quick):
        self.repetitions = 5
        self.warm_s = 0.04 if quick else 0.1
        self.time_s = 0.12 if quick else 0.5
        self.size = (128 if quick else 512) * MIB
        self.starts = 5 if quick else 15


def fill(path, size):
    """Writes every block, so that no page and no extent is new when it is measured."""
    block = bytearray(random.Random(1).randbytes(MIB))
    with open(path, "wb") as f:
        for i in range(size // MIB):
            block[:8] = i.to_bytes(8, "little")
            f.write(block)
        f.flush()
        os.fsync(f.fileno())


class Field:
    """The servers of a run: programs by name, and one running instance per medium."""

    def __init__(self, programs, size, load, disk_dir):
        self.programs = programs
        self.size = size
        self.load = load
        self.dirs = {"tmpfs": tempfile.mkdtemp(prefix="cairn-bench-", dir="/dev/shm")}
        atexit.register(self.clean)
        self.dirs["ext4"] = tempfile.mkdtemp(prefix="cairn-bench-", dir=disk_dir)
        self.running = {}

    def clean(self):
        servers.stop_all()
        for path in self.dirs.values():
            shutil.rmtree(path, ignore_errors=True)

    def start(self, medium, name):
        base = os.path.join(self.dirs[medium], name.replace("'", "-twin"))
        fill(base + ".img", self.size)
        # Sockets on tmpfs for both media: their path has a length limit, and a directory of the user's may be deep.
        sock = os.path.join(self.dirs["tmpfs"], f"{medium}-{os.path.basename(base)}.sock")
        self.running[medium, name] = servers.Server(name, self.programs[name], base + ".img", sock,
                                                    direct=medium == "ext4")

    def measure(self, row, name, settings, seed):
        return self.running[row.medium, name].load(
            self.load, CPUS if row.placement == "free" else ONE_CPU, settings.time_s, settings.warm_s,
            ["--seed", str(seed), *row.load_options()])


def run_rows(field, rows, names, settings, failures):
    """All repetitions; returns {row name: [{server: metrics} per repetition]}."""
    for medium in dict.fromkeys(r.medium for r in rows):
        taking_part = {n for r in rows if r.medium == medium for n in rowlib.servers_of(r, names)}
        for name in names:
            if name in taking_part:
                field.start(medium, name)
    results = {row.name: [] for row in rows}
    for repetition in range(settings.repetitions):
        for row in rows:
            point = {}
            order = rowlib.servers_of(row, names)
            turn = repetition % len(order)
            for name in order[turn:] + order[:turn]:
                try:
                    point[name] = field.measure(row, name, settings, seed=repetition + 1)
                except (RuntimeError, subprocess.TimeoutExpired) as e:
                    failures.append(f"{row.name}: {e}")
            results[row.name].append(point)
        print(f"bench: repetition {repetition + 1} of {settings.repetitions} done", file=sys.stderr)
    return results


def measure_starts(programs, names, directory, count):
    """Start time and idle memory, each server alone on a small file."""
    path = os.path.join(directory, "start.img")
    fill(path, 16 * MIB)
    found = {n: {"start_ms": [], "rss_mib": []} for n in names}
    for _ in range(count):
        for name in names:
            server = servers.Server(name, programs[name], path, os.path.join(directory, "start.sock"), tied=False)
            time.sleep(0.05)
            found[name]["start_ms"].append(server.start_ms)
            found[name]["rss_mib"].append(server.rss_mib())
            server.stop()
    return found


def find_programs(args):
    """Programs by name, and the lines about their versions."""
    programs = {"qsd": servers.qsd_command, "nbdkit": servers.nbdkit_command,
                "floor": servers.floor_command(args.floor)}
    versions = {"qsd": servers.version_of(["qemu-storage-daemon"]) + ", aio=native, cache.direct=on",
                "nbdkit": servers.version_of(["nbdkit"]) + ", plugin file (page cache)",
                "floor": "tests/bench/floor-server.c"}
    if args.cairnd:
        programs["cairnd"] = servers.cairnd_command(args.cairnd)
        versions["cairnd"] = servers.version_of([args.cairnd]) + ", cache.direct=on"
    return programs, versions


def chosen_rows(args):
    return rowlib.select(rowlib.all_rows(), args.rows, args.placement)


def check_tools(args, names):
    for path in (args.load, args.floor, *([args.cairnd] if args.cairnd else []), *(args.ab or [])):
        if not os.access(path, os.X_OK):
            sys.exit(f"bench: cannot execute '{path}': build it first (meson option bench)")
    for name, program in (("qsd", "qemu-storage-daemon"), ("nbdkit", "nbdkit")):
        if name in names and shutil.which(program) is None:
            sys.exit(f"bench: '{program}' is not installed; leave it out with --servers")


def run_compare(args):
    settings = Settings(args.quick)
    programs, versions = find_programs(args)
    names = args.servers.split(",") if args.servers else list(programs)
    unknown = [n for n in names if n not in programs]
    if unknown:
        sys.exit(f"bench: unknown server '{unknown[0]}' (known: {', '.join(programs)}; cairnd needs --cairnd)")
    check_tools(args, names)
    rows = chosen_rows(args)
    subject = args.subject if args.subject in names else None
    twin_of = subject or names[0]
    twin = twin_of + "'"
    programs[twin] = programs[twin_of]
    machine = report.machine()
    field = Field(programs, settings.size, args.load, args.disk_dir)
    failures = []
    begin = time.monotonic()
    results = run_rows(field, rows, [*names, twin], settings, failures)
    servers.stop_all()
    job_names = jobs.select(args.rows)
    job_data, job_lines, job_failures = (
        jobs.run(job_names, args, settings, fill, field.dirs["tmpfs"]) if job_names else ({}, [], []))
    failures += job_failures
    image_names = images.select(args.rows) if args.cairnd else []
    image_data = images.run(image_names, args, settings, fill, field.dirs["tmpfs"], ONE_CPU) if image_names else {}
    failures += image_data.get("failures", [])
    starts = measure_starts(programs, names, field.dirs["tmpfs"], settings.starts) if not args.no_start else {}
    data = {
        "machine": machine, "versions": {n: versions[n] for n in names}, "quick": args.quick,
        "settings": vars(settings), "seconds": time.monotonic() - begin, "subject": subject, "twin_of": twin_of,
        "results": results, "jobs": job_data, "job_lines": job_lines, "images": image_data, "starts": starts,
        "failures": failures,
        "verdicts": {r.name: rowlib.judge(r, results[r.name], subject, twin) for r in rows} if subject else {},
    }
    text = report.compare(data, rows, names, twin)
    deliver(args, data, text)
    for failure in failures:
        print(f"bench: failed: {failure}", file=sys.stderr)
    return 1 if failures else 0


def run_ab(args):
    """Pairs of two builds of cairnd, A measured against B and against a second A."""
    settings = Settings(args.quick)
    check_tools(args, [])
    a, b = args.ab
    programs = {"A": servers.cairnd_command(a), "A'": servers.cairnd_command(a), "B": servers.cairnd_command(b)}
    rows = chosen_rows(args)
    machine = report.machine()
    field = Field(programs, settings.size, args.load, args.disk_dir)
    for medium in dict.fromkeys(r.medium for r in rows):
        for name in programs:
            field.start(medium, name)
    found = {}
    for row in rows:
        pairs = []
        for i in range(args.pairs):
            # Every order comes equally often, so that a warm-up or a drift favours nobody.
            order = [["A", "B", "A'"], ["B", "A'", "A"], ["A'", "A", "B"]][i % 3]
            pairs.append({n: field.measure(row, n, settings, seed=i + 1) for n in order})
        found[row.name] = pairs
        print(f"bench: {row.name} done", file=sys.stderr)
    data = {"machine": machine, "a": a, "b": b, "pairs": args.pairs, "settings": vars(settings), "results": found}
    deliver(args, data, report.ab(data))
    return 0


def deliver(args, data, text):
    print(text)
    if args.write:
        with open(args.write, "w", encoding="utf-8") as f:
            f.write(text)
    if args.json:
        with open(args.json, "w", encoding="utf-8") as f:
            json.dump(data, f, indent=1)


def parse_arguments():
    p = argparse.ArgumentParser(description="Measure NBD servers side by side.")
    p.add_argument("--load", default=os.path.join(HERE, "nbd-load"), help="the load generator")
    p.add_argument("--floor", default=os.path.join(HERE, "floor-server"), help="the floor server")
    p.add_argument("--cairnd", help="cairnd; left out when not given")
    p.add_argument("--quick", action="store_true", help="short windows and one placement, about six minutes")
    p.add_argument("--rows", default="*", help="shell patterns of row names, separated by commas")
    p.add_argument("--placement", choices=("one-cpu", "free", "both"),
                   help="where client and server run (default both; with --quick or --ab one-cpu)")
    p.add_argument("--servers", help="of qsd,nbdkit,floor,cairnd; default all that are there")
    p.add_argument("--subject", default="cairnd", help="the server that is judged (default cairnd)")
    p.add_argument("--no-start", action="store_true", help="leave out start time and idle memory")
    p.add_argument("--disk-dir", default="/var/tmp", help="a directory on the local disk for the ext4 rows")
    p.add_argument("--write", metavar="FILE", help="write the Markdown report there as well")
    p.add_argument("--json", metavar="FILE", help="write everything measured there")
    p.add_argument("--ab", nargs=2, metavar=("A", "B"), help="compare two builds of cairnd in interleaved pairs")
    p.add_argument("--pairs", type=int, default=15, help="for --ab, bitmaps and qcow2 (M1: at least 15)")
    p.add_argument("--list", action="store_true", help="print the names of the rows")
    args = p.parse_args()
    if args.ab and args.pairs < 1:
        p.error("--pairs wants a number above 0")
    if args.placement is None:
        args.placement = "one-cpu" if args.quick or args.ab else "both"
    if not chosen_rows(args) and (args.ab or not (jobs.select(args.rows) or images.select(args.rows))):
        p.error(f"no row matches '{args.rows}' with placement {args.placement} (see --list)")
    return args


def main():
    args = parse_arguments()
    if args.list:
        print("\n".join([*(r.name for r in chosen_rows(args)), *jobs.select(args.rows), *images.select(args.rows)]))
        return 0
    # A signal ends us through the atexit handlers, which stop the servers and remove the files.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(143))
    try:
        return run_ab(args) if args.ab else run_compare(args)
    except RuntimeError as e:
        sys.exit(f"bench: {e}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    sys.exit(main())
