# SPDX-License-Identifier: Apache-2.0
"""What is measured, and what the subject must and aims to reach at each row."""

import dataclasses
import fnmatch
import statistics


@dataclasses.dataclass(frozen=True)
class Row:
    name: str
    medium: str  # "tmpfs" or "ext4"
    op: str
    block: int
    depth: int
    connections: int
    placement: str  # "one-cpu" or "free"

    @property
    def sequential(self):
        return self.block > 4096

    def load_options(self):
        return ["--op", self.op, "--bs", str(self.block), "--depth", str(self.depth),
                "--connections", str(self.connections)]


@dataclasses.dataclass(frozen=True)
class Criterion:
    """subject's metric against a target made of the others' metrics; holds when the ratio keeps to the bound."""

    level: str  # "must" or "aim"
    metric: str
    text: str
    target: object  # function(results by server) -> number to compare with
    needs: tuple
    at_most: bool
    bound: float

    def ratio(self, subject, results):
        target = self.target(results)
        return results[subject][self.metric] / target if target else float("inf")

    def holds(self, ratio):
        return ratio <= self.bound if self.at_most else ratio >= self.bound


def all_rows():
    points = [("tmpfs", op, 4096, depth, connections)
              for op in ("randread", "randwrite") for depth in (1, 16, 64) for connections in (1, 4)]
    points += [("tmpfs", op, 262144, 8, 1) for op in ("read", "write")]
    points += [("ext4", op, 4096, 16, 1) for op in ("randread", "randwrite")]
    return [Row(f"{medium}-{op}-{block // 1024}k-d{depth}-c{connections}{suffix}", medium, op, block, depth,
                connections, placement)
            for placement, suffix in (("one-cpu", ""), ("free", "-free"))
            for medium, op, block, depth, connections in points]


def select(rows, patterns, placement):
    """Rows of one placement, or "both", whose name matches one of the comma-separated shell patterns."""
    return [r for r in rows if placement in (r.placement, "both")
            and any(fnmatch.fnmatch(r.name, p) for p in patterns.split(","))]


def servers_of(row, names):
    """Who takes part: nbdkit has no O_DIRECT, so on ext4 it would be measured on the page cache."""
    return [n for n in names if not (row.medium == "ext4" and n == "nbdkit")]


def at_most(level, metric, server, bound, label):
    return Criterion(level, metric, f"{label} / {server}'s at most {bound:.2f}", lambda r: r[server][metric],
                     (server,), True, bound)


def at_least(level, metric, server, bound, label):
    return Criterion(level, metric, f"{label} / {server}'s at least {bound:.2f}", lambda r: r[server][metric],
                     (server,), False, bound)


def criteria(row):
    if row.medium == "ext4":
        return [at_most("must", "cpu_us", "qsd", 0.70, "CPU per I/O")]
    if row.sequential:
        return [at_least("must", "mb_per_s", "qsd", 2.5, "MB/s"),
                at_least("aim", "mb_per_s", "floor", 0.9, "MB/s")]
    if row.depth == 1:
        return [at_most("must", "cpu_us", "qsd", 0.80, "CPU per I/O"),
                Criterion("must", "p50_us", "median latency / the better of qsd's and nbdkit's at most 1.00",
                          lambda r: min(r["qsd"]["p50_us"], r["nbdkit"]["p50_us"]), ("qsd", "nbdkit"), True, 1.0)]
    return [at_most("must", "cpu_us", "qsd", 1 / 3, "CPU per I/O"),
            at_most("must", "cpu_us", "nbdkit", 2 / 3, "CPU per I/O"),
            Criterion("must", "iops", "IOPS / min(3 x qsd's, 0.6 x floor's) at least 1.00",
                      lambda r: min(3 * r["qsd"]["iops"], 0.6 * r["floor"]["iops"]), ("qsd", "floor"), False, 1.0),
            at_most("aim", "cpu_us", "floor", 1.5, "CPU per I/O"),
            at_least("aim", "iops", "floor", 0.8, "IOPS")]


IDLE_MUSTS = (("rss_mib", "idle RSS below 12 MiB", 12.0), ("start_ms", "start to first NBD greeting below 20 ms", 20.0))


def spread(ratios):
    """How far repetitions of the same thing lie from 1, at the most; of five or more the farthest does not count."""
    distances = sorted(abs(r - 1) for r in ratios)
    return distances[-2] if len(distances) >= 5 else distances[-1]


def judge(row, reps, subject, twin):
    """Verdicts for one row."""
    return judge_by(criteria(row), reps, subject, (subject, twin))


def judge_by(criteria_, reps, subject, same):
    """
    Verdicts by these criteria. reps: for each repetition {server: metrics}. The ratio is made inside each repetition,
    whose points were measured next to each other; its median is judged. Verdicts closer to the bound than the A/A
    spread say so; it comes from `same`, the names of two instances of the same thing, or none.
    """
    verdicts = []
    for c in criteria_:
        usable = [r for r in reps if subject in r and all(n in r for n in c.needs)]
        if not usable:
            continue
        ratios = [c.ratio(subject, r) for r in usable]
        median = statistics.median(ratios)
        twins = [r[same[1]][c.metric] / r[same[0]][c.metric] for r in usable if same and all(n in r for n in same)]
        verdicts.append({
            "level": c.level, "text": c.text, "ratio": median, "min": min(ratios), "max": max(ratios),
            "holds": c.holds(median), "aa_spread": spread(twins) if twins else None,
            "within_aa": bool(twins) and abs(median / c.bound - 1) <= spread(twins),
        })
    return verdicts
