# SPDX-License-Identifier: Apache-2.0
"""
The rows of qcow2: an allocated image against raw, allocation, large working sets, large disks, long chains.

All on tmpfs, servers and generator on one CPU, in pairs (M1). The images are made by qemu-img, each server has its own,
and what is read was written before; what a guest allocates takes pages that were given back just before.
"""

import dataclasses
import fnmatch
import os
import shutil
import struct
import subprocess
import sys

import rows as rowlib
import servers

GIB = 1 << 30
MIB = 1 << 20
KIB = 1 << 10
CLUSTER = 64 * KIB
DISK = 64 * GIB  # that is allocated: more than is written in the time
TOUCH_PER_S = 4 * GIB  # more than is allocated in a second
LAYERS = (1, 10, 100, 1000)
SECRET = "of no interest"
QSD_LAYERS = 100  # with 1,000 it answers 57 requests per second
CPU = "CPU per I/O"


@dataclasses.dataclass(frozen=True)
class Row:
    """points: what is measured in turn. same: two that are the same thing, or none. judged: (point, its criteria)."""

    name: str
    family: type
    options: tuple
    points: tuple
    same: tuple
    judged: tuple


class Family:
    """Images of one kind, and the servers on them; a subclass makes them and knows a point's server by its name."""

    def __init__(self, args, settings, fill, directory, cpus):
        self.settings = settings
        self.program = args.load
        self.cairnd = args.cairnd
        self.fill = fill
        self.cpus = cpus
        self.directory = os.path.join(directory, "images")
        os.mkdir(self.directory)
        self.servers = {}
        self.set_up()

    def set_up(self):
        """For a subclass."""

    def path(self, name):
        return os.path.join(self.directory, name)

    def qemu_img(self, *args):
        r = subprocess.run(["qemu-img", *args], cwd=self.directory, capture_output=True, text=True, check=False)
        if r.returncode != 0:
            raise RuntimeError(f"qemu-img {' '.join(args)}: {(r.stderr or r.stdout).strip()}")

    def create(self, name, size, *options):
        self.qemu_img("create", "-q", "-f", "qcow2", *options, name, *([str(size)] if size else []))

    def serve(self, point, image, driver="qcow2", tied=True, **how):
        """Starts the server that a point's name begins with."""
        command = (servers.qsd_command if point.startswith("qsd") else servers.cairnd_command(self.cairnd))
        sock = self.path(point.replace("'", "-twin").replace(" ", "-") + ".sock")
        server = servers.Server(point, lambda *a: command(*a, driver=driver, **how), self.path(image), sock, tied=tied)
        self.servers[point] = server
        return server

    def must_equal(self, point, raw):
        """What was made to be read is what the server shows."""
        self.qemu_img("compare", "-q", "-f", "raw", raw, "-F", "raw", f"nbd+unix:///?socket={self.servers[point].sock}")

    def load(self, server, options):
        return server.load(self.program, self.cpus, self.settings.time_s, self.settings.warm_s, options)

    def measure(self, row, point, seed):
        return self.load(self.servers[point], [*row.options, "--seed", str(seed)])


class Allocated(Family):
    """The same data as raw files and in images."""

    def set_up(self):
        self.fill(self.path("raw"), self.settings.size)
        for point in ("cairnd qcow2", "cairnd qcow2'", "qsd qcow2"):
            image = point.replace(" ", "-")
            self.qemu_img("convert", "-f", "raw", "-O", "qcow2", "raw", image)
            self.serve(point, image)
            self.must_equal(point, "raw")
        self.serve("cairnd raw", "raw", driver="raw")


class Encrypted(Family):
    """The same data in images that are encrypted, as a whole or inside qcow2. Each server has its own, by the same key."""

    KINDS = {"luks": ("luks,key-secret=key", "key-secret=key,iter-time=200"),
             "qcow2": ("qcow2,encrypt.format=luks,encrypt.key-secret=key",
                      "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=200")}

    def set_up(self):
        self.fill(self.path("raw"), self.settings.size)
        for kind, (driver, options) in self.KINDS.items():
            self.make(kind, options)
            for point in (f"cairnd {kind}", f"cairnd {kind}'", f"qsd {kind}"):
                image = point.replace(" ", "-")
                shutil.copyfile(self.path(kind), self.path(image))
                self.serve(point, image, driver, secret=SECRET)
                self.must_equal(point, "raw")

    def make(self, kind, options):
        """Several times if need be: beside other work qemu-img sometimes finds no CPU time to choose the iterations by."""
        for attempt in range(10):
            try:
                self.qemu_img("convert", "--object", f"secret,id=key,data={SECRET}", "-f", "raw", "-O", kind, "-o", options, "raw",
                              kind)
                return
            except RuntimeError:
                if attempt == 9:
                    raise

    def measure(self, row, point, seed):
        kind = row.name.split("-")[1]
        name, twin = point.rstrip("'"), "'" if point.endswith("'") else ""
        return self.load(self.servers[f"{name} {kind}{twin}"], [*row.options, "--seed", str(seed)])


class Allocating(Family):
    """A new image, and a new server, for each measurement: every write touches a new cluster."""

    size = DISK

    def make(self, image):
        self.create(image, self.size)

    def make_raw(self, file):
        self.qemu_img("create", "-q", "-f", "raw", file, str(self.size))

    def touch_memory(self):
        """Pages that are given back just before they are taken anew: the host does not have to find them."""
        path = self.path("pages")
        with open(path, "wb", buffering=0) as f:
            for _ in range(int(TOUCH_PER_S * (self.settings.warm_s + self.settings.time_s)) // MIB):
                f.write(bytes(MIB))
        os.unlink(path)

    def measure(self, row, point, seed):
        self.touch_memory()
        raw = point.endswith(" raw")  # what the pages alone cost
        (self.make_raw if raw else self.make)("new")
        server = self.serve(point, "new", driver="raw" if raw else "qcow2")
        try:
            found = self.load(server, [*row.options, "--stride", str(CLUSTER)])
        finally:
            server.stop()
            os.unlink(self.path("new"))
        if found["iops"] * (self.settings.warm_s + self.settings.time_s) > 0.8 * self.size / CLUSTER:
            raise RuntimeError(f"{point}: the disk is too small to allocate all the time")
        return found


class CopyingOnWrite(Allocating):
    """The same over a raw file that holds data everywhere."""

    size = 2 * GIB

    def make(self, image):
        self.create(image, None, "-b", "below", "-F", "raw")

    def set_up(self):
        self.fill(self.path("below"), self.size)


class WorkingSet(Family):
    """A disk of 1 TiB all of which is data: the same 512 MiB again and again, so that more metadata is all that more of it costs."""

    def set_up(self):
        self.make("disk")
        self.qemu_img("check", "-q", "-f", "qcow2", "disk")
        for name in ("cairnd", "qsd"):
            server = self.serve(name, "disk", read_only=True)
            server.load(self.program, self.cpus, 1, 0, ["--depth", "16"])  # all the tables were seen

    def make(self, name):
        """Header, refcount table and block, L1, L2 tables, data."""
        entries, data = CLUSTER // 8, 512 * MIB // CLUSTER
        tables = 1024 * GIB // CLUSTER // entries
        used = 4 + tables + data
        header = struct.pack(">4sIQIIQIIQQIIQQQQII", b"QFI\xfb", 3, 0, 0, 16, 1024 * GIB, 0, tables, 3 * CLUSTER, CLUSTER, 1,
                             0, 0, 0, 0, 0, 4, 104)
        counts = [1] * (4 + tables) + [tables * entries // data] * data
        mappings = struct.pack(f">{entries}Q", *((4 + tables + i % data) * CLUSTER for i in range(entries)))
        with open(self.path(name), "wb") as f:
            for part in (header, struct.pack(">Q", 2 * CLUSTER), struct.pack(f">{used}H", *counts),
                         struct.pack(f">{tables}Q", *((4 + i) * CLUSTER | 1 << 63 for i in range(tables)))):
                f.write(part.ljust(CLUSTER, b"\0"))
            for _ in range(tables):
                f.write(mappings)
            for i in range(data):
                f.write(bytes([i % 255 + 1]) * CLUSTER)

    def measure(self, row, point, seed):
        name, amount, unit = point.rstrip("'").split(" ")
        size = int(amount) * {"GiB": GIB, "TiB": 1024 * GIB}[unit]
        return self.load(self.servers[name], [*row.options, "--seed", str(seed), "--size", str(size)])


class VirtualSize(Family):
    """Images of different sizes whose first 64 MiB were written."""

    def set_up(self):
        self.fill(self.path("raw"), 64 * MIB)
        for point in ("cairnd 1G", "cairnd 1G'", "cairnd 16T", "cairnd 1P", "qsd 1G", "qsd 16T", "qsd 1P"):
            image = point.replace(" ", "-")
            self.qemu_img("convert", "-f", "raw", "-O", "qcow2", "raw", image)
            self.qemu_img("resize", "-q", "-f", "qcow2", image, point.rstrip("'").split(" ")[1])
            self.serve(point, image)


class Chain(Family):
    """Long chains over one image with data; the layers between are empty, and each names the one below it."""

    size = 128 * MIB

    def make_last(self, name):
        self.fill(self.path("raw"), self.size)
        self.qemu_img("convert", "-f", "raw", "-O", "qcow2", "raw", name)

    def set_up(self):
        self.make_last("layer-0000")
        self.create("overlay", self.size, "-u", "-b", "layer-0000", "-F", "qcow2")
        with open(self.path("overlay"), "rb") as f:
            overlay = f.read()
        for i in range(1, max(LAYERS)):
            with open(self.path(f"layer-{i:04}"), "wb") as f:
                f.write(overlay.replace(b"layer-0000", b"layer-%04d" % (i - 1)))

    def serve_layers(self, point, **how):
        layers = int(point.rstrip("'").split(" ")[1])
        return self.serve(point, f"layer-{layers - 1:04}", read_only=True, **how)


class ReadingChain(Chain):
    """Each server has shown all the data through its chain."""

    def set_up(self):
        super().set_up()
        for point in (*CHAIN_POINTS, *QSD_CHAIN_POINTS):
            self.serve_layers(point)
            self.must_equal(point, "raw")


class WideChain(Chain):
    """More is read than a cache of what lies where in the chain may hold; the data are holes."""

    size = 4 * GIB

    def make_last(self, name):
        self.create(name, self.size, "-o", "preallocation=metadata")

    def set_up(self):
        super().set_up()
        for point in WIDE_POINTS:
            server = self.serve_layers(point)
            server.load(self.program, self.cpus, 0.5, 0, ["--op", "read", "--stride", str(CLUSTER), "--depth", "16"])


class OpeningChain(Chain):
    """From the fork to the first NBD greeting."""

    def measure(self, row, point, seed):
        server = self.serve_layers(point, tied=False)
        server.stop()
        return {"start_ms": server.start_ms}


CHAIN_POINTS = (*(f"cairnd {n}" for n in LAYERS), f"cairnd {LAYERS[0]}'")
WIDE_POINTS = (CHAIN_POINTS[0], CHAIN_POINTS[-1], CHAIN_POINTS[-2])
QSD_CHAIN_POINTS = tuple(f"qsd {n}" for n in LAYERS if n <= QSD_LAYERS)


def _allocated(op, depth):
    bounds = (("aim", 1.1), ("must", 1.15))
    return Row(f"qcow2-{op}-4k-d{depth}", Allocated, ("--op", op, "--depth", str(depth)),
               ("cairnd raw", "cairnd qcow2", "cairnd qcow2'", "qsd qcow2"), ("cairnd qcow2", "cairnd qcow2'"),
               (("cairnd qcow2", [rowlib.at_most(level, "cpu_us", "cairnd raw", bound, CPU)
                                  for level, bound in bounds]),))


def _encrypted(kind, op):
    return Row(f"encrypted-{kind}-{op}-4k-d16", Encrypted, ("--op", op, "--depth", "16"), ("cairnd", "cairnd'", "qsd"),
               ("cairnd", "cairnd'"), (("cairnd", [rowlib.at_most("must", "cpu_us", "qsd", 1 / 3, CPU),
                                                   rowlib.at_least("must", "iops", "qsd", 3, "IOPS")]),))


def _allocating(name, family, block, bound, beside=()):
    return Row(f"qcow2-{name}-d16", family, ("--op", "write", "--bs", str(block), "--depth", "16"),
               ("cairnd", "cairnd'", "qsd", *beside), ("cairnd", "cairnd'"),
               (("cairnd", [rowlib.at_least("must", "iops", "qsd", bound, "IOPS")]),))


def _like_first(name, family, options, points, beside, first, bound=1.15):
    """Each point of ours costs what the first one costs."""
    return Row(f"qcow2-{name}", family, (*options, "--depth", "16"), (*points, *beside), (first, first + "'"),
               tuple((p, [rowlib.at_most("must", "cpu_us", first, bound, f"{p}: {CPU}")])
                     for p in points if p.rstrip("'") != first))


ROWS = [
    *(_allocated(op, depth) for op in ("randread", "randwrite") for depth in (1, 16)),
    *(_encrypted(kind, op) for kind in Encrypted.KINDS for op in ("randread", "randwrite")),
    _allocating("allocate-4k", Allocating, 4 * KIB, 3, ("cairnd raw",)),
    _allocating("allocate-64k", Allocating, 64 * KIB, 2, ("cairnd raw",)),
    _allocating("cow-4k", CopyingOnWrite, 4 * KIB, 2),
    _like_first("working-set-randread-4k-d16", WorkingSet, (), ("cairnd 10 GiB", "cairnd 10 GiB'",
                "cairnd 1 TiB"), ("qsd 10 GiB", "qsd 1 TiB"), "cairnd 10 GiB"),
    _like_first("virtual-size-randwrite-4k-d16", VirtualSize, ("--op", "randwrite", "--size", str(64 * MIB)),
                ("cairnd 1G", "cairnd 1G'", "cairnd 16T", "cairnd 1P"), ("qsd 1G", "qsd 16T", "qsd 1P"), "cairnd 1G"),
    _like_first("chain-randread-4k-d16", ReadingChain, (), CHAIN_POINTS, QSD_CHAIN_POINTS,
                f"cairnd {LAYERS[0]}"),
    _like_first("wide-chain-randread-4k-d16", WideChain, (), WIDE_POINTS, (), f"cairnd {LAYERS[0]}"),
    Row("qcow2-open-chain", OpeningChain, (), (f"cairnd {LAYERS[-1]}",), (),
        ((f"cairnd {LAYERS[-1]}", [rowlib.Criterion(
            "must", "start_ms", "start with 1,000 layers / 1 s at most 1.00", lambda r: 1000, (), True, 1.0)]),)),
]


def select(patterns):
    return [r.name for r in ROWS if any(fnmatch.fnmatch(r.name, p) for p in patterns.split(","))]


def _measure_family(family, rows, pairs, results, failures):
    for i in range(pairs):
        for row in rows:
            point = {}
            turn = i % len(row.points)
            for name in row.points[turn:] + row.points[:turn]:
                try:
                    point[name] = family.measure(row, name, i + 1)
                except (RuntimeError, OSError, subprocess.TimeoutExpired) as e:
                    failures.append(f"{row.name}: {e}")
            results[row.name].append(point)


def run(names, args, settings, fill, directory, cpus):
    """All the chosen rows; returns what report.py shows: results, verdicts, failures."""
    missing = [n for n in ("qemu-img", "qemu-storage-daemon") if shutil.which(n) is None]
    if missing:
        return {"failures": [f"qcow2: '{missing[0]}' is not installed"]}
    rows = [r for r in ROWS if r.name in names]
    results, failures = {r.name: [] for r in rows}, []
    for kind in dict.fromkeys(r.family for r in rows):
        try:
            family = kind(args, settings, fill, directory, cpus)
            _measure_family(family, [r for r in rows if r.family is kind], args.pairs, results, failures)
        except (RuntimeError, OSError, subprocess.TimeoutExpired) as e:
            failures.append(f"{kind.__name__}: {e}")
        finally:
            servers.stop_all()
            shutil.rmtree(os.path.join(directory, "images"))
        print(f"bench: qcow2: {kind.__name__} done", file=sys.stderr)
    return {
        "results": results, "failures": failures, "order": {r.name: r.points for r in rows},
        "verdicts": {r.name: [v for point, criteria in r.judged
                              for v in rowlib.judge_by(criteria, results[r.name], point, r.same)] for r in rows},
    }
