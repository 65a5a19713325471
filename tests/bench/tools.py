# SPDX-License-Identifier: Apache-2.0
"""
The rows of the image tools: `cairn convert` beside qemu-img's at its best and dd; disks of which nothing, or little, is there.

All on tmpfs, a command at a time, in turn (M1). Files that were made just before are the target, so that the host does not have to
find their pages. What is judged is the time that a command takes, and CPU time where other work on the machine would be seen.
"""

import os
import resource
import subprocess
import time

import images
import rows as rowlib

DATA = 512 * images.MIB
PEER = ("qemu-img", "convert", "-W", "-m", "16", "-t", "none", "-T", "none")
COLD = ("qemu-img", "convert", "-W", "-m", "16")


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

    def compressible(self):
        with open(self.path("text"), "wb") as f:
            for i in range(DATA // 4 // 64):
                f.write(b"%-63d\n" % (i * 2654435761 % 1000003))

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
    words = ("-f", source, "-O", target, source, "out")
    points = {"cairn": ("cairn", "convert", *words), "cairn'": ("cairn", "convert", *words), "qemu-img": (*COLD, *words),
              "qemu-img -t none": (*PEER, *words), "dd": ("dd", f"if={source}", "of=out", "bs=1M")}
    judged = [rowlib.at_most("must", metric, peer, bound, what) for metric, what in (("wall_ms", "time"), ("cpu_ms", "CPU time"))
              for peer, bound in (("dd", 1 / 0.9), ("qemu-img", 1), ("qemu-img -t none", 1))]
    return images.Row(f"tool-convert-{source}-{target}", Commands, points, tuple(points), ("cairn", "cairn'"), (("cairn", judged),))


def _within(name, limit_ms, *command):
    bound = rowlib.Criterion("must", "wall_ms", f"time / {limit_ms} ms at most 1.00", lambda r: limit_ms, (), True, 1.0)
    points = {"cairn": ("cairn", *command), "qemu-img": ("qemu-img", *command)}
    return images.Row(f"tool-{name}", Commands, points, tuple(points), (), (("cairn", [bound]),))


def _like(name, points, first, metric, bound, text):
    return images.Row(f"tool-{name}", Commands, points, tuple(points), (),
                      (("cairn", [rowlib.at_most("must", metric, first, bound, text)]),))


_COMPRESS = ("convert", "-c", "-f", "raw", "-O", "qcow2", "text", "out")

ROWS = [
    *(_convert(source, target) for source in ("raw", "qcow2") for target in ("raw", "qcow2")),
    _like("convert-compressed", {"cairn": ("cairn", *_COMPRESS), "cairn on one CPU": ("taskset", "-c", "0", "cairn", *_COMPRESS),
                                 "qemu-img": (*COLD, *_COMPRESS[1:])}, "cairn on one CPU", "wall_ms", 0.6, "time"),
    _within("convert-empty-8T", 1000, "convert", "-O", "qcow2", "empty-8T", "out"),
    _like("convert-sparse-16T", {"cairn": ("cairn", "convert", "-O", "qcow2", "sparse-16T", "out"),
                                 "cairn dense": ("cairn", "convert", "-O", "qcow2", "qcow2", "out"),
                                 "qemu-img": (*COLD, "-O", "qcow2", "sparse-16T", "out")}, "cairn dense", "cpu_ms", 2.0, "CPU time"),
    _within("create-1P", 50, "create", "-q", "-f", "qcow2", "-o", "cluster_size=2M", "out", "1P"),
    *(_within(f"{words[0]}-1P", 50, *words, "empty-1P") for words in (("info",), ("map",), ("measure", "-O", "qcow2", "-o", "cluster_size=2M"),
                                                                     ("check",))),
]
