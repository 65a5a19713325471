# SPDX-License-Identifier: Apache-2.0
"""The main job on real input; started by ./demo. docs/demo.md says what it shows and what it does not.

An ext4 file system full of real files lies in a qcow2 disk. The daemon serves it; a writer writes over NBD into the blocks
of one big file of that file system and never stops. Meanwhile the disk is backed up, once in full and three times
incrementally; each point is restored, and the checker proves that it is the disk at one instant. In the end the writer is
held, and a fifth point must be the disk, byte by byte.
"""
import argparse
import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time

sys.dont_write_bytecode = True
import relay  # noqa: E402
import show  # noqa: E402
import spoil  # noqa: E402
from show import MIB, Bar, micros, mib  # noqa: E402

BLOCK = 4096
DISK_BYTES = 1 << 30
WRITER_BLOCKS = (256 * MIB) // BLOCK
FILES_BYTES = 200 * MIB  # of real files
FREE_BYTES = 4 << 30
REAL = ("/usr/share/doc", "/usr/lib/python3", "/usr/lib/python3.11", "/usr/include", "/usr/share/perl", "/usr/lib/gcc")
LIVE_POINTS = 4
TRIES = 3  # of a backup that breaks
EXPORT = "disk"  # so `cairn serve` calls that of disk.qcow2


class Failure(Exception):
    """What was to be shown does not hold, or a step failed."""


def run(*words, good=(0,)):
    """What a program prints; a Failure if it fails."""
    ended = subprocess.run([str(word) for word in words], stdin=subprocess.DEVNULL, capture_output=True, text=True,
                           check=False)
    if ended.returncode not in good:
        raise Failure(f"{' '.join(map(str, words))}: exit status {ended.returncode}\n{ended.stdout}{ended.stderr}")
    return ended.stdout


def end_process(process):
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def watch(words, progress, bar):
    """As run, and draws what progress() tells."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen([str(word) for word in words], stdin=subprocess.DEVNULL, stdout=out, stderr=err)
        try:
            while process.poll() is None:
                bar(*progress())
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.1)
        finally:
            end_process(process)
        out.seek(0)
        err.seek(0)
        said, complained = out.read(), err.read()
    if process.returncode != 0:
        raise Failure(f"{' '.join(map(str, words))}: exit status {process.returncode}\n{said}{complained}")
    return said


def used(path):
    """Bytes that a file takes; 0 if it is not there yet."""
    try:
        return os.stat(path).st_blocks * 512
    except FileNotFoundError:
        return 0


# The disk.


def copy_files(tree, bar):
    """Copies real files of this machine until there are enough. Returns (files, bytes)."""
    files = size = 0
    for top in REAL:
        for folder, folders, names in os.walk(top):
            to = os.path.join(tree, os.path.relpath(folder, "/"))
            os.makedirs(to, exist_ok=True)
            folders.sort()
            for name in sorted(names):
                source = os.path.join(folder, name)
                try:
                    kind = os.lstat(source)
                    if stat.S_ISREG(kind.st_mode):
                        shutil.copyfile(source, os.path.join(to, name))
                        size += kind.st_size
                    elif stat.S_ISLNK(kind.st_mode):
                        os.symlink(os.readlink(source), os.path.join(to, name))
                except PermissionError:  # not for us to read
                    continue
                files += 1
            bar(size / FILES_BYTES, f"{files} files, {mib(size)}")
            if size >= FILES_BYTES:
                return files, size
    return files, size


def file_places(image, path):
    """Where the blocks of a file lie in a file system: (first block of the file, first in the disk, count)."""
    for line in run("debugfs", "-R", f"dump_extents -l {path}", image).splitlines()[1:]:
        words = re.fullmatch(r"\s*\d+/\s*\d+\s+\d+/\s*\d+\s+(\d+)\s+-\s+\d+\s+(\d+)\s+-\s+\d+\s+(\d+)\s*", line)
        if not words:
            raise Failure(f"cannot read what debugfs says of {path}: {line}")
        yield tuple(int(word) for word in words.groups())


def write_list(image, path, out):
    places = []
    for first, place, count in file_places(image, path):
        if first != len(places):
            raise Failure(f"{path} has a hole at block {len(places)}")
        places += range(place, place + count)
    if len(places) != WRITER_BLOCKS:
        raise Failure(f"{path} has {len(places)} blocks, not {WRITER_BLOCKS}")
    with open(out, "w", encoding="ascii") as f:
        f.writelines(f"{place}\n" for place in places)
    return places


# The programs.


class Monitor:
    """A session of our own on the control socket, to look on."""

    def __init__(self, path):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(60)
        self.sock.connect(path)
        self.file = self.sock.makefile("rb")
        self.events = []
        self.file.readline()
        self("qmp_capabilities")

    def __call__(self, command, **arguments):
        self.sock.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        while True:
            line = self.file.readline()
            if not line:
                raise Failure("the daemon has closed its control socket")
            message = json.loads(line)
            if "event" in message:
                self.events.append(message)
            elif "error" in message:
                raise Failure(f"{command}: {message['error']['desc']}")
            else:
                return message["return"]

    def backup_ended(self):
        """There was one, and it has ended well."""
        self("query-jobs")  # what it answers is told after all events before
        ends = [e["data"] for e in self.events if e["event"] == "BLOCK_JOB_COMPLETED"]
        self.events.clear()
        if len(ends) != 1 or "error" in ends[0]:
            raise Failure(f"not one backup has ended well: {ends}")


class Writer:
    def __init__(self, program, work, socket_path, rate, depth):
        self.process = subprocess.Popen(
            [program, "--unix", socket_path, "--export", EXPORT, "--list", work / "list", "--log", work / "log",
             "--rate", str(rate), "--depth", str(depth)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )

    def say(self, line):
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        answer = self.process.stdout.readline()
        if not answer:
            raise Failure("the writer has ended: a write failed")
        return json.loads(answer)

    def phase(self, name):
        """Begins a phase; returns the figures of the one before."""
        return self.say(f"phase {name}")


class Demo:
    def __init__(self, options, work, stack):
        self.options = options
        self.work = work
        self.stack = stack
        self.cairn = os.path.join(options.build, "src/cli/cairn")
        self.tools = os.path.join(options.build, "tests/demo")
        self.original = work / "original.raw"
        self.disk = work / "disk.qcow2"
        self.store = work / "backups"
        self.places = []
        self.in_disk = 0
        self.rows = []
        self.controls = []
        self.points = []
        self.windows = []
        self.relay = None
        self.monitor = None
        self.writer = None
        self.daemon = None
        self.served = {}

    # Steps.

    def make_disk(self):
        tree = self.work / "tree"
        with Bar("real files of this machine") as bar:
            files, size = copy_files(tree, bar)
            bar.note = f"{files} files, {mib(size)}"
        with Bar("ext4 file system with them") as bar:
            run(f"{self.tools}/demo-writer", "--init", tree / "writer.bin", WRITER_BLOCKS)
            expected = size + WRITER_BLOCKS * BLOCK
            watch(["mke2fs", "-q", "-t", "ext4", "-b", BLOCK, "-d", tree, self.original, f"{DISK_BYTES // 1024}k"],
                  lambda: (used(self.original) / expected, ""), bar)
            self.places = write_list(self.original, "/writer.bin", self.work / "list")
            shutil.rmtree(tree)
            bar.note = f"{mib(used(self.original))}; /writer.bin has {WRITER_BLOCKS} blocks"
        with Bar("qcow2 disk") as bar:
            watch(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", self.original, self.disk],
                  lambda: (used(self.disk) / used(self.original), ""), bar)
            extents = json.loads(run("qemu-img", "map", "--output=json", self.disk))
            self.in_disk = sum(extent["length"] for extent in extents if extent["data"])
            with open(self.disk, "rb") as f:
                os.fsync(f.fileno())  # the writer's figures are to be of the backups, not of what was made here
            bar.note = f"{mib(self.in_disk)} of data in {mib(DISK_BYTES)}"

    def serve(self):
        with Bar("cairn serve disk.qcow2") as bar:
            self.start_daemon()
            self.relay = relay.Relay(str(self.work / "relay.sock"), self.served["control"])
            self.monitor = Monitor(self.served["control"])
            self.writer = Writer(f"{self.tools}/demo-writer", self.work, self.served["socket"], self.options.rate,
                                 self.options.depth)
            self.stack.callback(end_process, self.writer.process)
            bar.note = "writer started"

    def work_on(self, label, phase, seconds):
        """Lets the writer write for some time."""
        self.writer.phase(phase)
        begin = self.writer.say("status")["acknowledged"]
        with Bar(label) as bar:
            while (gone := time.monotonic() - bar.begin) < seconds:
                count = self.writer.say("status")["acknowledged"] - begin
                bar(gone / seconds, f"{count} writes")
                time.sleep(0.1)
            bar.note = f"{self.writer.say('status')['acknowledged'] - begin} writes"

    def backup(self, number, label):
        """One backup, during which the writer's figures are taken. Returns its row of the table."""
        before = self.writer.phase(f"backup-{number}")
        if number == 1:
            self.rows.append(["before", "", "", "", *latency(before), "no backup runs"])
        for attempt in range(1, TRIES + 1):
            self.relay.windows.clear()
            self.monitor.events.clear()
            with Bar(label) as bar:
                began = time.monotonic()
                point = self.run_backup(bar)
                seconds = time.monotonic() - began
                figures = self.writer.phase("between")
                bar.note = f"{mib(used(self.store / point['image']))} copied" if point else "broken: the writer went first (C5)"
            if point:
                break
            if attempt == TRIES:
                raise Failure(f"backup {number} broke {TRIES} times: the disk is too slow to save what the writer overwrites")
            self.writer.phase(f"backup-{number}")
        self.monitor.backup_ended()
        self.points.append(point)
        copied = used(self.point_file(number))
        if len(self.relay.windows) != 1:
            raise Failure(f"{len(self.relay.windows)} backup commands were seen, not one")
        if number <= LIVE_POINTS and 0 in (before["writes"], figures["writes"]):
            raise Failure(f"the writer stood still during backup {number} or before it")
        self.windows.append(self.relay.windows[0])
        kind = "full" if number == 1 else "incremental"
        if point["kind"] != kind:
            raise Failure(f"point {number} is {point['kind']}, not {kind}: {point.get('reason')}")
        row = [str(number), kind, mib(copied), f"{seconds:.2f} s", *latency(figures), ""]
        if attempt > 1:
            row[1] += f" (try {attempt})"
        self.rows.append(row)
        return row

    def restored(self, number):
        return self.work / f"point{number}.raw"

    def restore(self, number):
        out = self.restored(number)
        with Bar(f"cairn restore, point {number}") as bar:
            self.run_restore(number, out, bar)
            if os.path.getsize(out) != DISK_BYTES:
                raise Failure(f"{out} has {os.path.getsize(out)} bytes, not {DISK_BYTES}")

    def check(self, image, window, rest=True):
        """(verdict, what the checker says)"""
        ended = subprocess.run(
            [f"{self.tools}/demo-checker", "--log", self.work / "log", "--list", self.work / "list", "--window",
             *map(str, window), *(["--rest", self.original] if rest else []), image],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
        )
        if ended.returncode not in (0, 1):
            raise Failure(f"the checker cannot decide: {ended.stdout}{ended.stderr}")
        return ended.returncode == 0, ended.stdout.strip()

    def prove(self, number, row):
        with Bar(f"checker, point {number}") as bar:
            holds, says = self.check(self.restored(number), self.windows[number - 1])
            bar.note = says.splitlines()[0]
        if not holds:
            row[-1] = "NOT PROVED"
            raise Failure(f"point {number}: {says}")
        at = re.search(r"T = \d+ ns, ([\d.]+) us after", says)
        low, high = (float(word) for word in re.search(r"between (\S+) us and (\S+) us", says).groups())
        row[-1] = f"proved, T = command + {micros(float(at[1]))} (+- {micros((high - low) / 2)})"

    def live_points(self):
        for number in range(1, LIVE_POINTS + 1):
            kind = "full" if number == 1 else "incremental"
            row = self.backup(number, f"cairn backup, point {number} ({kind})")
            self.restore(number)
            self.prove(number, row)
            self.keep_blocks(number)
            self.work_on("the writer goes on", f"after-{number}", self.options.seconds)

    def keep_blocks(self, number):
        """Of a point that is proved only the writer's blocks are needed again."""
        blocks = self.work / f"blocks{number}.raw"
        spoil.copy_blocks(self.restored(number), blocks, self.places)
        self.restored(number).unlink()

    def quiesced_point(self):
        number = LIVE_POINTS + 1
        held = self.writer.say("pause")
        if held["submitted"] != held["acknowledged"]:
            raise Failure("the writer paused with writes under way")
        row = self.backup(number, f"cairn backup, point {number} (writer held)")
        self.restore(number)
        image = self.restored(number)
        with Bar("equal to the disk, e2fsck") as bar:
            run("qemu-img", "compare", "-f", "raw", "-F", "raw", image, self.served["nbd"])
            bar(0.5)
            run("e2fsck", "-fn", image)
            bar.note = "byte by byte, over NBD; e2fsck -fn is clean"
        total = self.writer.say("status")["acknowledged"]
        self.writer.say("stop")  # that is logged: the writer was held until after the window
        self.writer.process.wait()
        self.prove(number, row)
        row[-1] += "; equal to the disk; e2fsck clean"
        return total

    def spoil(self):
        """Three points that are wrong on purpose: the checker must refuse each."""
        middle, older, newer = (self.work / f"blocks{number}.raw" for number in (3, 2, 4))
        window = self.windows[2]
        image = self.work / "spoiled.raw"
        with Bar("points made wrong on purpose") as bar:
            spoil.copy_blocks(middle, image, self.places)
            if not self.check(image, window, rest=False)[0]:
                raise Failure("the checker refuses the copy of a point that it has accepted")
            # The windows are so wide that they hold both instants: only that there are two can be what is wrong.
            wide = {older: (self.windows[1][0], window[1]), newer: (window[0], self.windows[3][1])}
            for number, other in ((2, older), (4, newer)):
                block = spoil.exchange(self.places, middle, other)
                spoil.copy_blocks(other, image, [self.places[block]])
                self.must_refuse(f"point 3 with block {block} of point {number}", image, wide[other])
                spoil.copy_blocks(middle, image, [self.places[block]])
                bar(0.3 * len(self.controls))
            image.unlink()
            spoil.mixed(self.places, older, middle, image)
            self.must_refuse("half of point 2 and half of point 3", image, wide[older])
            bar.note = f"{len(self.controls)} of {len(self.controls)} refused"

    def must_refuse(self, what, image, window):
        holds, says = self.check(image, window, rest=False)
        if holds:
            raise Failure(f"the checker accepts {what}: {says}")
        self.controls.append((what, says))

    def end_daemon(self):
        """Ends it in order. What it leaves must be a sound qcow2 image that holds the fifth point."""
        with Bar("qemu-img on what is left") as bar:
            self.stop_daemon()
            image = self.restored(LIVE_POINTS + 1)
            run("qemu-img", "check", "-q", self.disk)
            bar(0.3)
            run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", image, self.disk)
            bar(0.6)
            run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", image, self.point_file(LIVE_POINTS + 1))
            bar.note = "disk.qcow2 and the chain of backups are sound, and equal to point 5"


    # What the user types.

    def start_daemon(self):
        """`cairn serve` says where it is as soon as it answers."""
        log = self.stack.enter_context(open(self.work / "serve.log", "w+", encoding="utf-8"))
        self.daemon = subprocess.Popen([self.cairn, "serve", self.disk, "--socket", self.work / "disk.nbd", "--json"],
                                       stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, text=True)
        self.stack.callback(end_process, self.daemon)
        line = self.daemon.stdout.readline()
        if not line:
            self.daemon.wait()
            raise Failure(f"cairn serve did not start: {(self.work / 'serve.log').read_text()}")
        self.served = json.loads(line)

    def stop_daemon(self):
        self.daemon.send_signal(signal.SIGINT)
        if self.daemon.wait(60) != 0:
            raise Failure(f"cairn serve ended badly: {(self.work / 'serve.log').read_text()}")

    def run_backup(self, bar):
        """Returns the new point as the tool describes it; None if it broke because the writer does not wait for it (C5)."""
        try:
            said = watch([self.cairn, "backup", self.work / "relay.sock", "--to", self.store, "--json"], self.job_progress,
                         bar)
        except Failure as failure:
            if "the point in time is lost" in str(failure):
                return None
            raise
        return json.loads(said)

    def job_progress(self):
        for job in self.monitor("query-block-jobs"):
            if job["len"]:
                return job["offset"] / job["len"], f"{mib(job['offset'])} of {mib(job['len'])}"
        return 0, ""

    def run_restore(self, number, out, bar):
        part = f"{out}.cairn-part"
        watch([self.cairn, "restore", self.store, "--at", self.points[number - 1]["id"], out, "--json"],
              lambda: (used(part) / self.in_disk, mib(used(part))), bar)

    def point_file(self, number):
        return self.store / self.points[number - 1]["image"]


def latency(figures):
    if figures["writes"] == 0:
        return ["-"] * 4
    return [f"{figures['writes'] / figures['seconds']:.0f}", micros(figures["p50_us"]), micros(figures["p99_us"]),
            micros(figures["max_us"])]


def parse_options():
    parser = argparse.ArgumentParser(prog="./demo", add_help=False, usage="./demo --help tells")
    parser.add_argument("--build", required=True)
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--rate", type=int, default=5000)
    parser.add_argument("--depth", type=int, default=16, choices=range(1, 257), metavar="1..256")
    return parser.parse_args()


def tell(demo, total, seconds):
    print(f"\nThe disk holds {mib(demo.in_disk)} of data in {mib(DISK_BYTES)}. The writer wrote {total} blocks of 4 KiB and stood still "
          "only for point 5.\n")
    show.table(["point", "backup", "copied", "took", "writes/s", "p50", "p99", "max", "verdict"], demo.rows)
    print("\nMade wrong on purpose, and refused by the checker:")
    for what, says in demo.controls:
        print(f"  {what}\n      {says}")
    print(f"\nAll is proved, in {seconds:.0f} s.")


def main():
    options = parse_options()
    os.environ["PATH"] += ":/usr/sbin:/sbin"  # where e2fsprogs lie, for everybody
    begin = time.monotonic()
    where = os.environ.get("TMPDIR") or "/var/tmp"
    free = os.statvfs(where)
    if free.f_bavail * free.f_frsize < FREE_BYTES:
        print(f"{where} has less than {FREE_BYTES >> 30} GiB free; TMPDIR may name another directory", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit("ended by SIGTERM"))
    work = pathlib.Path(tempfile.mkdtemp(prefix="cairn-demo.", dir=where))
    status = 1
    try:
        with contextlib.ExitStack() as stack:
            demo = Demo(options, work, stack)
            demo.make_disk()
            demo.serve()
            demo.work_on("the writer alone", "before", options.seconds)
            demo.live_points()
            total = demo.quiesced_point()
            demo.spoil()
            demo.end_daemon()
        tell(demo, total, time.monotonic() - begin)
        status = 0
    except Failure as failure:
        print(f"\nNOT SHOWN: {failure}", file=sys.stderr)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
    finally:
        if options.keep:
            print(f"kept: {work}")
        else:
            shutil.rmtree(work, ignore_errors=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
