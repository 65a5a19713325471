#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""Applies each mutant, builds it, and requires that the tests which it names fail (rule T5).

    run.py [--rotate N] [--long] [--dir DIR] [--list] [PATCH...]

Without arguments all mutants run but the long ones. See README.md for what stands in a patch. One line per mutant:
    caught          every named test failed
    survived        a named test passed: nothing shows that the rule is obeyed
    does-not-apply  the code has changed: write the mutant anew
    does-not-build  the compiler refused it, which shows nothing about the tests
All but the first make the exit status 1, and so does a named test that fails without any mutant.
"""
import argparse
import fnmatch
import glob
import os
import re
import stat
import subprocess
import sys
import time

sys.dont_write_bytecode = True
HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))
from runner import FAIL, PASS, adopt_orphans, integration, meson_tests, run, single, tail  # noqa: E402

# How a mutant is built: plain unless it says `Build: asan`. Scheduling points are always there.
BUILDS = {
    "plain": ["-Doptimization=1"],
    "asan": ["-Doptimization=1", "-Db_sanitize=address,undefined"],
    "tsan": ["-Doptimization=1", "-Db_sanitize=thread"],
}
SANITIZER_ENV = {"UBSAN_OPTIONS": "halt_on_error=1", "TSAN_OPTIONS": "halt_on_error=1"}
KEYS = {"Rule", "Removes", "Tests", "Seeds", "Build", "Long"}
TEST_SECONDS = 60  # of one test of a mutant, as meson.build has it; a hang is a failure too


class Mutant:
    def __init__(self, path):
        self.path = path
        self.name = os.path.basename(path).removesuffix(".patch")
        with open(path, encoding="utf-8") as f:
            text = f.read()
        head = re.split(r"^(?:diff |--- )", text, maxsplit=1, flags=re.M)[0]
        fields = {}
        key = None
        for line in head.splitlines():
            if match := re.match(r"([A-Z]\w*):\s*(.*)", line):
                key = match[1]
                fields[key] = match[2].strip()
            elif key and line[:1].isspace():
                fields[key] += " " + line.strip()
            elif line.strip():
                sys.exit(f"{path}: '{line}' is neither `Key: value` nor its continuation")
        if unknown := fields.keys() - KEYS:
            sys.exit(f"{path}: unknown {', '.join(sorted(unknown))}; there are {', '.join(sorted(KEYS))}")
        for needed in ("Rule", "Removes", "Tests"):
            if not fields.get(needed):
                sys.exit(f"{path}: it does not say {needed}:")
        self.rule = fields["Rule"]
        self.removes = fields["Removes"]
        self.tests = fields["Tests"].split()
        self.seeds = fields.get("Seeds", "100")
        self.build = fields.get("Build", "plain")
        self.long = fields.get("Long", "no") == "yes"
        if not self.name.startswith(self.rule + "-"):
            sys.exit(f"{path}: the name starts with the rule: {self.rule}-what-is-gone.patch")
        if self.build not in BUILDS:
            sys.exit(f"{path}: Build: {self.build} is none of {', '.join(BUILDS)}")


class Scratch:
    """A copy of the tree, with a build directory per kind that lives on from mutant to mutant."""

    def __init__(self, root, where):
        self.root = root
        self.tree = os.path.join(where, "tree")
        self.where = where
        self.copied = set()

    def tracked(self):
        listed = subprocess.run(
            ["git", "-C", self.root, "ls-files", "-coz", "--exclude-standard"], check=True, capture_output=True
        ).stdout
        names = {name.decode() for name in listed.split(b"\0") if name}
        return {name for name in names if os.path.isfile(os.path.join(self.root, name))}

    def restore(self):
        """Makes the copy equal to the tree. What differs is written with the time of now, so that ninja sees it."""
        wanted = self.tracked()
        for folder, folders, names in os.walk(self.tree):
            for name in names:
                full = os.path.join(folder, name)
                if os.path.relpath(full, self.tree) not in wanted:
                    os.unlink(full)
        for name in wanted:
            source, target = os.path.join(self.root, name), os.path.join(self.tree, name)
            with open(source, "rb") as f:
                content = f.read()
            try:
                with open(target, "rb") as f:
                    if f.read() == content:
                        continue
            except FileNotFoundError:
                os.makedirs(os.path.dirname(target), exist_ok=True)
            with open(target, "wb") as f:
                f.write(content)
            os.chmod(target, stat.S_IMODE(os.stat(source).st_mode))

    def apply(self, patch):
        return run(["patch", "-p1", "--fuzz=2", "--no-backup-if-mismatch", "-f", "-i", patch], 30, cwd=self.tree)

    def build(self, kind):
        """Returns (directory, what went wrong or None)."""
        where = os.path.join(self.where, "build-" + kind)
        if not os.path.exists(os.path.join(where, "build.ninja")):
            ended = run(["meson", "setup", where, self.tree, "-Dsim_points=true", *BUILDS[kind]], 120)
            if ended.status != 0:
                return where, tail(ended.output)
        ended = run(["ninja", "-C", where, "-j", str(os.cpu_count() or 1)], 600)
        return where, None if ended.status == 0 else tail(ended.output)

    def run_test(self, test, build, seeds):
        """Runs the program of one entry of a `Tests:` line. Returns its cases and those that the entry names."""
        name, _, pattern = test.partition(":")
        env = {"CAIRN_SEEDS": seeds, **SANITIZER_ENV}
        if name.startswith("tools/"):
            cases = [single(name, run([os.path.join(self.tree, name), self.tree if "layers" in name else build], 60))]
        elif "/" in name:
            cases = integration(os.path.join(self.tree, "tests", name), build, TEST_SECONDS, env)
        else:
            cases, _ = meson_tests(build, TEST_SECONDS + 30, [name], env)
        prefix = os.path.basename(name).removesuffix(".py")
        return cases, [c for c in cases if not pattern or fnmatch.fnmatchcase(c.name, f"{prefix}:{pattern}")]


def passes(cases, named):
    """Whether a test is fit to catch a mutant: it runs, and passes as long as there is none."""
    return any(c.status == PASS for c in named) and not any(c.status == FAIL for c in cases)


def caught_by(cases, named):
    """The failures that count: of the named cases, or of the whole program if it died before their verdict."""
    failed = [c.name for c in named if c.status == FAIL]
    if not failed and not any(c.status == PASS for c in named):
        failed = [c.name + " ended early" for c in cases if c.status == FAIL]
    return failed


def run_mutant(scratch, mutant):
    """Returns (word, detail, output to show)."""
    ended = scratch.apply(mutant.path)
    if ended.status != 0:
        return "does-not-apply", mutant.removes, tail(ended.output)
    build, wrong = scratch.build(mutant.build)
    if wrong:
        return "does-not-build", mutant.removes, wrong
    how = []
    for test in mutant.tests:
        failed = caught_by(*scratch.run_test(test, build, mutant.seeds))
        if not failed:
            return "survived", f"{test} passes; removed was: {mutant.removes}", ""
        how += failed
    return "caught", "; ".join(how), ""


def choose(mutants, rotate, root):
    """`rotate` of the mutants, the next ones with each commit."""
    count = subprocess.run(
        ["git", "-C", root, "rev-list", "--count", "HEAD"], check=True, capture_output=True, text=True
    ).stdout
    first = int(count) * rotate
    return [mutants[(first + i) % len(mutants)] for i in range(min(rotate, len(mutants)))]


def main():
    parser = argparse.ArgumentParser(description="require that tests fail on each mutant (T5)")
    parser.add_argument("--rotate", type=int, metavar="N", help="only N of them, chosen by the number of commits")
    parser.add_argument("--long", action="store_true", help="also those that only a long run catches")
    parser.add_argument("--list", action="store_true", help="print rule, name and what is removed")
    parser.add_argument("--root", default=os.path.join(HERE, "..", ".."))
    parser.add_argument("--dir", help="scratch directory, kept for the next time (default build-mutants)")
    parser.add_argument("patches", nargs="*")
    args = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)

    root = os.path.abspath(args.root)
    paths = args.patches or sorted(glob.glob(os.path.join(root, "tests/mutants/*.patch")))
    mutants = [Mutant(os.path.abspath(path)) for path in paths]
    if args.list:
        for mutant in mutants:
            print(f"{mutant.rule:4} {mutant.name}: {mutant.removes}{' (long)' if mutant.long else ''}")
        return 0
    if not args.long and not args.patches:
        mutants = [mutant for mutant in mutants if not mutant.long]
    if args.rotate is not None and mutants:
        mutants = choose(mutants, args.rotate, root)
    if not mutants:
        print("mutants: there are none")
        return 0

    adopt_orphans()
    scratch = Scratch(root, os.path.abspath(args.dir or os.path.join(root, "build-mutants")))
    os.makedirs(scratch.tree, exist_ok=True)
    scratch.restore()
    begin = time.monotonic()
    sane = {}
    for kind, test, seeds in sorted({(m.build, t, m.seeds) for m in mutants for t in m.tests}):
        if kind not in sane:
            build, sane[kind] = scratch.build(kind)
            if sane[kind]:
                print(f"the tree does not build ({kind}):\n{sane[kind]}")
                return 1
        cases, named = scratch.run_test(test, os.path.join(scratch.where, "build-" + kind), seeds)
        if not passes(cases, named):
            print(f"{test} does not pass without any mutant, or is not there: mend that first")
            print("\n".join(f"    {c.name}: {c.status}: {c.detail}" for c in cases if c.status != PASS))
            return 1
    print(f"the tests pass without mutants ({time.monotonic() - begin:.1f} s)")

    counts = {}
    for mutant in mutants:
        begin = time.monotonic()
        try:
            word, detail, output = run_mutant(scratch, mutant)
        finally:
            scratch.restore()
        counts[word] = counts.get(word, 0) + 1
        print(f"{word:14} {mutant.name} ({time.monotonic() - begin:.1f} s): {detail}")
        if output:
            print("\n".join("    " + line for line in output.splitlines()))
    print("mutants: " + ", ".join(f"{count} {word}" for word, count in sorted(counts.items())))
    return 0 if set(counts) == {"caught"} else 1


if __name__ == "__main__":
    sys.exit(main())
