# SPDX-License-Identifier: Apache-2.0
"""What ./demo shows: bars while it works (on a terminal; lines elsewhere), a table at the end."""
import shutil
import sys
import time

MIB = 1 << 20


def mib(count):
    return f"{count / MIB:.0f} MiB"


def micros(us):
    return f"{us:.0f} us" if us < 1000 else f"{us / 1000:.1f} ms" if us < 1e6 else f"{us / 1e6:.2f} s"


class Bar:
    """One step of the work: `with Bar("...") as bar:`, then bar(done / all)."""

    width = 24

    def __init__(self, label):
        self.label = label
        self.note = ""
        self.begin = time.monotonic()
        self.live = sys.stdout.isatty()
        self.seconds = 0.0

    def __call__(self, fraction, note=""):
        if self.live:
            self.draw(fraction, note)

    def draw(self, fraction, note):
        full = round(min(max(fraction, 0), 1) * self.width)
        seconds = time.monotonic() - self.begin
        line = f"{self.label:<34} [{'#' * full}{'.' * (self.width - full)}] {seconds:5.1f} s  {note}"
        sys.stdout.write("\r" + line[:shutil.get_terminal_size().columns - 1] + "\x1b[K")
        sys.stdout.flush()

    def __enter__(self):
        self(0)
        return self

    def __exit__(self, kind, *rest):
        self.seconds = time.monotonic() - self.begin
        if self.live:
            sys.stdout.write("\r\x1b[K")
        if kind is None or self.live:
            print(f"{self.label:<34} {self.seconds:6.1f} s  {self.note}".rstrip(), flush=True)


def table(head, rows):
    """Columns are as wide as what is in them; the last one is free."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head) - 1)]
    for row in [head, ["-" * width for width in widths] + ["-" * len(head[-1])], *rows]:
        cells = [cell.ljust(width) if i < 2 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))]
        print("  ".join([*cells, row[-1]]).rstrip())
