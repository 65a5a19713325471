# SPDX-License-Identifier: Apache-2.0
"""
The rows of the image tools: `cairn convert` beside qemu-img's at its best and dd; disks of which nothing, or little, is there.

All on tmpfs, a command at a time, in turn (M1). Files that were made just before are the target, so that the host does not have to
find their pages. What is judged is the time that a command takes, and CPU time where other work on the machine would be seen.
"""

import array
import os
import random
import resource
import struct
import subprocess
import time

import images
import rows as rowlib

DATA = 512 * images.MIB
BEST = ("qemu-img", "convert", "-W", "-m", "16")


class Commands(images.Family):
    """A point is a command, by its first word and what stands in it for files; `out` is made by it."""

    def set_up(self):
        self.cairn = os.path.join(os.path.dirname(self.cairnd), "..", "cli", "cairn")
        self.fill(self.path("raw"), DATA)
        self.qemu_img("convert", "-f", "raw", "-O", "qcow2", "raw", "qcow2")
        self.compressible()
        self.create("empty-8T", 8 << 40)
        self.create("sparse-16T", 16 << 40)
        commands = [w for i in range(DATA // images.MIB) for w in ("-c", f"write -q -P {i % 255 + 1} {i * (16 << 40) // 512} 1M")]
        self.run(["qemu-io", "-f", "qcow2", *commands, "sparse-16T"])
        self.create("empty-1P", 1 << 50, "-o", "cluster_size=2M")
        self.create("full-100G", 100 << 30, "-o", "preallocation=metadata")
        self.create("shuffled-100G", 100 << 30, "-o", "preallocation=metadata")
        self.shuffle("shuffled-100G")
        for kind in ("zlib", "zstd"):
            self.qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", "-o", f"compression_type={kind}", "hex", kind)

    def compressible(self):
        """Some that becomes a tenth, and some that becomes a half."""
        with open(self.path("text"), "wb") as f:
            for i in range(DATA // 4 // 64):
                f.write(b"%-63d\n" % (i * 2654435761 % 1000003))
        source = random.Random(1)
        with open(self.path("hex"), "wb") as f:
            for _ in range(DATA // 4 // images.MIB):
                f.write(source.randbytes(images.MIB // 2).hex().encode())

    def shuffle(self, name):
        """Its data lie in no order, as those of a disk do after years."""
        with open(self.path(name), "r+b") as f:
            size, at = struct.unpack(">36xIQ", f.read(48))
            f.seek(at)
            tables = [entry & ~(1 << 63) for entry in struct.unpack(f">{size}Q", f.read(8 * size))]
            entries = array.array("Q")
            for table in tables:
                f.seek(table)
                entries.frombytes(f.read(images.CLUSTER))
            random.Random(1).shuffle(entries)
            for i, table in enumerate(tables):
                f.seek(table)
                f.write(entries[i * images.CLUSTER // 8:(i + 1) * images.CLUSTER // 8].tobytes())

    def run(self, command):
        subprocess.run(command, cwd=self.directory, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    def measure(self, row, point, seed):
        command = [self.cairn if w == "cairn" else w for w in row.options[point]]
        if os.path.exists(self.path("out")):
            os.unlink(self.path("out"))
        before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
        try:
            self.run(command)
        except subprocess.CalledProcessError as e:
            raise RuntimeError(f"{' '.join(command)}: {e.stderr.decode().strip()}") from e
        wall, after = time.monotonic() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return {"wall_ms": 1000 * wall, "cpu_ms": 1000 * cpu}


def _convert(source, target):
    """In order against dd, and qemu-img in order; in any order against qemu-img at its best. dd's way takes one processor, as ours."""
    words = ("-f", source, "-O", target, source, "out")
    points = {"cairn": ("cairn", "convert", *words), "cairn'": ("cairn", "convert", *words), "cairn -W": ("cairn", "convert", "-W", *words),
              "qemu-img": ("qemu-img", "convert", *words), "qemu-img -W": (*BEST, *words),
              "qemu-img -W -t none": (*BEST, "-t", "none", "-T", "none", *words), "dd": ("dd", f"if={source}", "of=out", "bs=1M")}
    beside = {"cairn": (("dd", 1 / 0.9), ("qemu-img", 1)), "cairn -W": (("qemu-img -W", 1), ("qemu-img -W -t none", 1))}
    return images.Row(f"tool-convert-{source}-{target}", Commands, points, tuple(points), ("cairn", "cairn'"), tuple(
        (point, [rowlib.at_most("must", metric, peer, bound, f"{point}: {what}")
                 for metric, what in (("wall_ms", "time"), ("cpu_ms", "CPU time")) for peer, bound in peers])
        for point, peers in beside.items()))


def _within(name, limit_ms, *command):
    bound = rowlib.Criterion("must", "wall_ms", f"time / {limit_ms} ms at most 1.00", lambda r: limit_ms, (), True, 1.0)
    points = {"cairn": ("cairn", *command), "qemu-img": ("qemu-img", *command)}
    return images.Row(f"tool-{name}", Commands, points, tuple(points), (), (("cairn", [bound]),))


def _like(name, points, *judged):
    """judged: level, what is compared, with which point, bound, in words."""
    return images.Row(f"tool-{name}", Commands, points, tuple(points), (),
                      (("cairn", [rowlib.at_most(*j) for j in judged]),))


def _and_on_one_cpu(*command):
    return {"cairn": ("cairn", *command), "cairn on one CPU": ("taskset", "-c", "0", "cairn", *command), "qemu-img": (*BEST, *command[1:])}


def _compress(kind, source):
    """Two processors do it in the time that one takes, by 1.8; and never more slowly than qemu-img's best."""
    points = _and_on_one_cpu("convert", "-c", "-f", "raw", "-O", "qcow2", "-o", f"compression_type={kind}", source, "out")
    return _like(f"convert-compress-{kind}", points, ("must", "wall_ms", "cairn on one CPU", 0.6, "time"),
                 ("aim", "wall_ms", "cairn on one CPU", 1 / 1.8, "time"), ("must", "wall_ms", "qemu-img", 1, "time"))


def _decompress(kind):
    """Most of the time may be that of writing to one file, which does not scale."""
    points = _and_on_one_cpu("convert", "-W", "-f", "qcow2", "-O", "raw", kind, "out")
    return _like(f"convert-decompress-{kind}", points, ("must", "wall_ms", "qemu-img", 1, "time"))


ROWS = [
    *(_convert(source, target) for source in ("raw", "qcow2") for target in ("raw", "qcow2")),
    _compress("zlib", "text"),
    _compress("zstd", "hex"),
    *(_decompress(kind) for kind in ("zlib", "zstd")),
    _within("convert-empty-8T", 1000, "convert", "-O", "qcow2", "empty-8T", "out"),
    _like("convert-sparse-16T", {"cairn": ("cairn", "convert", "-O", "qcow2", "sparse-16T", "out"),
                                 "cairn dense": ("cairn", "convert", "-O", "qcow2", "qcow2", "out"),
                                 "qemu-img": (*BEST, "-O", "qcow2", "sparse-16T", "out")},
          ("must", "cpu_ms", "cairn dense", 2.0, "CPU time")),
    # Where the data lie in no order, qemu-img takes more than a minute.
    _like("check-100G", {"cairn": ("cairn", "check", "full-100G"), "cairn shuffled": ("cairn", "check", "shuffled-100G"),
                         "qemu-img": ("qemu-img", "check", "full-100G")}, ("must", "wall_ms", "qemu-img", 0.5, "time")),
    _within("create-1P", 50, "create", "-q", "-f", "qcow2", "-o", "cluster_size=2M", "out", "1P"),
    *(_within(f"{words[0]}-1P", 50, *words, "empty-1P") for words in (("info",), ("map",), ("measure", "-O", "qcow2", "-o", "cluster_size=2M"),
                                                                     ("check",))),
]
