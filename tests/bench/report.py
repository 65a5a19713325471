# SPDX-License-Identifier: Apache-2.0
"""What bench.py found, as Markdown."""

import os
import platform
import statistics

import rows as rowlib

MADE_BY = "tests/bench/bench.py"


def machine():
    with open("/proc/cpuinfo", encoding="utf-8") as f:
        models = [line.split(":", 1)[1].strip() for line in f if line.startswith("model name")]
    with open("/proc/meminfo", encoding="ascii") as f:
        total_kib = int(f.readline().split()[1])
    return {"cpu": models[0] if models else platform.machine(), "cpus": os.cpu_count(),
            "memory_gib": total_kib / (1 << 20), "kernel": platform.release(), "load_before": os.getloadavg()[0]}


def _machine_lines(m):
    lines = [f"Machine: {m['cpus']} x {m['cpu']}, {m['memory_gib']:.0f} GiB, Linux {m['kernel']}."]
    if m["load_before"] > 0.5:
        lines.append(f"**Other work ran on the machine** (load {m['load_before']:.1f} before the start): the figures "
                     "are too high, the ratios less so.")
    return lines


def _median(reps, server, metric):
    values = [r[server][metric] for r in reps if server in r]
    return (statistics.median(values), min(values), max(values)) if values else None


def _cell(row, reps, server):
    if not any(server in r for r in reps):
        return "failed" if server in rowlib.servers_of(row, [server]) else "-"
    return _figures(reps, server, row.sequential)


def _figures(reps, server, sequential):
    cpu = _median(reps, server, "cpu_s_per_gib" if sequential else "cpu_us")
    p50 = _median(reps, server, "p50_us")[0]
    p99 = _median(reps, server, "p99_us")[0]
    if sequential:
        rate = f"{_median(reps, server, 'mb_per_s')[0]:.0f} MB/s"
    else:
        rate = f"{_median(reps, server, 'iops')[0] / 1e3:.1f}k"
    return f"**{cpu[0]:.2f}** ({cpu[1]:.2f}..{cpu[2]:.2f}); {rate}; {p50:.0f}/{p99:.0f}"


def _aa_cell(reps, server, twin):
    out = []
    for metric in ("cpu_us", "iops"):
        ratios = [r[twin][metric] / r[server][metric] for r in reps if server in r and twin in r]
        out.append(f"{100 * rowlib.spread(ratios):.0f} %" if ratios else "-")
    return " / ".join(out)


def _client_cell(reps, names):
    values = [m[0] for m in (_median(reps, n, "client_cpu_us") for n in names) if m]
    return f"{min(values):.1f}..{max(values):.1f}" if values else "-"


def _verdict_word(v):
    word = "holds" if v["holds"] else "**misses**"
    return f"{word} (within A/A)" if v["within_aa"] else word


def _points(data, rows, names, twin):
    lines = []
    for placement, head in (("one-cpu", "Servers and generator on one CPU"), ("free", "Placed by the scheduler")):
        placed = [r for r in rows if r.placement == placement]
        if not placed:
            continue
        lines += ["", f"## {head}", "", "| row | " + " | ".join(names) + " | A/A: CPU / IOPS | generator, us |",
                  "|---" * (len(names) + 3) + "|"]
        for row in placed:
            reps = data["results"][row.name]
            cells = [_cell(row, reps, n) for n in names]
            lines.append(f"| {row.name} | " + " | ".join(cells) +
                         f" | {_aa_cell(reps, data['twin_of'], twin)} | {_client_cell(reps, names)} |")
    return lines


def _images(data):
    lines = ["", "## qcow2", "",
             "On one CPU. A cell is as above. `'`: the same once more. `allocate` and `cow`: each write touches a new "
             "cluster of a new image. `working-set`: reads all over so much of a disk of 1 TiB, all "
             "of it data, in the same 512 MiB of the file. `virtual-size`: writes to the same "
             "64 MiB of disks of three sizes. `chain`: the data lie in the last of so many "
             "layers; `wide`: 4 GiB of them (holes). `tool`: commands, how long they take.", "",
             "| row | what | figures | A/A: CPU / IOPS |", "|---|---|---|---|"]
    for row, reps in data["results"].items():
        twin = next((n for r in reps for n in r if n.endswith("'")), None)
        for name in sorted({n for r in reps for n in r if n != twin}, key=data["order"][row].index):
            if all("wall_ms" in r[name] for r in reps if name in r):
                (wall, low, high), (cpu, *_) = (_median(reps, name, m) for m in ("wall_ms", "cpu_ms"))
                lines.append(f"| {row} | {name} | {wall:.0f} ({low:.0f}..{high:.0f}) ms; {cpu:.0f} ms of CPU | |")
                continue
            if all("start_ms" in r[name] for r in reps if name in r):
                ms = _median(reps, name, "start_ms")
                figures = f"{ms[0]:.0f} ({ms[1]:.0f}..{ms[2]:.0f}) ms"
            else:
                figures = _figures(reps, name, False)
            aa = _aa_cell(reps, name, twin) if twin and name == twin[:-1] else ""
            lines.append(f"| {row} | {name} | {figures} | {aa} |")
    return lines


def _verdicts(data):
    lines = ["| row | level | what | ratio (min..max) | A/A | verdict |", "|---|---|---|---|---|---|"]
    count = {"must": [0, 0], "aim": [0, 0]}
    of_images = data["images"].get("verdicts", {}) if data["subject"] == "cairnd" else {}
    for row, verdicts in {**data["verdicts"], **of_images}.items():
        for v in verdicts:
            count[v["level"].split()[0]][0] += v["holds"]
            count[v["level"].split()[0]][1] += 1
            aa = f"{100 * v['aa_spread']:.0f} %" if v["aa_spread"] is not None else "-"
            lines.append(f"| {row} | {v['level']} | {v['text']} | {v['ratio']:.2f} ({v['min']:.2f}.."
                         f"{v['max']:.2f}) | {aa} | {_verdict_word(v)} |")
    idle = data["starts"].get(data["subject"])
    for metric, text, bound in rowlib.IDLE_MUSTS if idle else ():
        values = idle[metric]
        held = statistics.median(values) < bound
        count["must"][0] += held
        count["must"][1] += 1
        lines.append(f"| idle | must | {text} | {statistics.median(values):.1f} ({min(values):.1f}.."
                     f"{max(values):.1f}) | - | {'holds' if held else '**misses**'} |")
    head = [f"{data['subject']}: {count['must'][0]} of {count['must'][1]} musts hold, "
            f"{count['aim'][0]} of {count['aim'][1]} aims.", ""]
    return head + lines


def _starts(data):
    lines = ["| server | start to first NBD greeting, ms (min..max) | idle RSS, MiB (min..max) |", "|---|---|---|"]
    for name, found in data["starts"].items():
        cells = [f"{statistics.median(v):.1f} ({min(v):.1f}..{max(v):.1f})"
                 for v in (found["start_ms"], found["rss_mib"])]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def compare(data, rows, names, twin):
    s = data["settings"]
    lines = ["# Performance", "",
             f"Written by `{MADE_BY}{' --quick' if data['quick'] else ''}`; do not edit.", "",
             *_machine_lines(data["machine"]), "",
             *[f"- {n}: {v}" for n, v in data["versions"].items()], "",
             f"{s['repetitions']} repetitions of {s['time_s']} s after {s['warm_s']} s of warm-up; in each repetition "
             "the servers take turns at each row, all of them running. Unix sockets; a file of "
             f"{s['size'] // (1 << 20)} MiB per server, filled before. `d16-c4`: 16 requests in flight on each of 4 "
             "connections.", "",
             "A cell: **server CPU** in microseconds per request (256k rows: seconds per GiB), median and (min..max); "
             "requests per second (256k rows: MB/s); latency p50/p99 in microseconds. CPU is the process CPU clock "
             "of the server over the measured window: all its threads and io_uring workers, not the kernel's own "
             f"threads. A/A: {data['twin_of']} run twice, the largest distance of a repetition's ratio from 1 but "
             "for one. "
             "generator: what the load generator itself spends per request. nbdkit has no O_DIRECT and is left out "
             "on ext4; the floor serves one request at a time there, so it is no floor.", "",
             "Where the scheduler puts client and server decides more than the servers do: waking a halted CPU of a "
             "virtual machine costs tens of microseconds on both sides, and the same server is found in either state "
             "from run to run. On one CPU the figures repeat to a few per cent; rows that end in `-free` are left to "
             "the scheduler."]
    lines += _points(data, rows, names, twin)
    lines += data["job_lines"]
    if data["images"].get("results"):
        lines += _images(data["images"])
    if data["starts"]:
        lines += ["", "## Start and idle", "",
                  "Fresh processes, one at a time. The time counts from before the fork and includes it.", ""]
        lines += _starts(data)
    if data["subject"]:
        lines += ["", "## Must and aim", "",
                  "Ratios are made inside each repetition; the median is judged. \"within A/A\": the ratio is nearer "
                  "to its bound than two runs of the same program are to each other, so the verdict may be luck.", ""]
        lines += _verdicts(data)
    if data["failures"]:
        lines += ["", "## Failures", "", *[f"- {f}" for f in data["failures"]]]
    return "\n".join(lines) + "\n"


def _middle(ratios):
    """The range without the outer tenth on each side."""
    ordered = sorted(ratios)
    cut = len(ordered) // 10
    return ordered[cut], ordered[len(ordered) - 1 - cut]


def ab_verdict(ab_ratios, aa_ratios):
    """M1: a claim smaller than the A/A spread is not distinguishable."""
    low, high = _middle(aa_ratios)
    aa_spread = max(abs(low - 1), abs(high - 1))
    change = statistics.median(ab_ratios) - 1
    if abs(change) <= aa_spread:
        return aa_spread, "not distinguishable"
    return aa_spread, f"B {'+' if change > 0 else '-'}{100 * abs(change):.1f} %"


def ab(data):
    lines = ["# A/B", "", *_machine_lines(data["machine"]), "",
             f"A: `{data['a']}`, B: `{data['b']}`; {data['pairs']} interleaved pairs of "
             f"{data['settings']['time_s']} s. A/A: a second instance of A against A, the same way; its spread is the "
             "largest distance from 1 without the outer tenth on each side.", "",
             "| row | metric | A | B | B / A median (min..max) | A/A median, spread | verdict |",
             "|---|---|---|---|---|---|---|"]
    for row, pairs in data["results"].items():
        for metric in ("cpu_us", "iops", "p50_us"):
            ab_ratios = [p["B"][metric] / p["A"][metric] for p in pairs]
            aa_ratios = [p["A'"][metric] / p["A"][metric] for p in pairs]
            aa_spread, verdict = ab_verdict(ab_ratios, aa_ratios)
            lines.append(
                f"| {row} | {metric} | {statistics.median(p['A'][metric] for p in pairs):.2f} "
                f"| {statistics.median(p['B'][metric] for p in pairs):.2f} "
                f"| {statistics.median(ab_ratios):.3f} ({min(ab_ratios):.3f}..{max(ab_ratios):.3f}) "
                f"| {statistics.median(aa_ratios):.3f}, {100 * aa_spread:.1f} % | {verdict} |")
    return "\n".join(lines) + "\n"
