# SPDX-License-Identifier: Apache-2.0
"""tools/check-symbols.py finds calls that rule S1 denies, in the variants that a compiler makes of them."""
import os
import subprocess
import sys
import tempfile
import unittest

ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", ".."))
HEAD = """\
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>
"""
CLEAN = {
    "base/text.c": "int text_len(const char *s) { return (int)strlen(s); } int own_read(void) { return 0; }",
    "loop/clock.c": "int loop_clock(struct timespec *t) { return clock_gettime(CLOCK_MONOTONIC, t); }",
    "graph/node.c": "int own_read(void); void *node_new(void) { own_read(); return malloc(5); }",
    "daemon/main.c": "int daemon_open(const char *f) { return open(f, O_RDONLY); }",
}


class CheckSymbols(unittest.TestCase):
    def run_on(self, extra, allowed="", flags=()):
        with tempfile.TemporaryDirectory() as root:
            libraries = {}
            for path, code in (CLEAN | extra).items():
                source = os.path.join(root, path.replace("/", "_"))
                with open(source, "w", encoding="utf-8") as f:
                    f.write(HEAD + code + "\n")
                subprocess.run(["gcc", "-O2", "-w", *flags, "-c", source, "-o", source + ".o"], check=True)
                libraries.setdefault(path.split("/")[0], []).append(source + ".o")
            os.mkdir(os.path.join(root, "src"))
            for folder, objects in libraries.items():
                subprocess.run(["ar", "rcT", os.path.join(root, "src", f"libcairn-{folder}.a"), *objects], check=True)
            allow = os.path.join(root, "allowed")
            with open(allow, "w", encoding="utf-8") as f:
                f.write(allowed)
            done = subprocess.run(
                [sys.executable, os.path.join(ROOT, "tools", "check-symbols.py"), root, "--allow", allow],
                capture_output=True, text=True, check=False,
            )
            return done.returncode, done.stdout.splitlines()[:-1]

    def refused(self, path, code, expected, **kwargs):
        status, findings = self.run_on({path: code}, **kwargs)
        self.assertEqual(status, 1)
        self.assertEqual(len(findings), 1, findings)
        self.assertIn(expected, findings[0])

    def test_clean(self):
        self.assertEqual(self.run_on({}), (0, []))

    def test_each_category(self):
        for code, expected in (
            ("long f(void) { return time(NULL); }", "calls time (time)"),
            ("long f(char *b) { return getrandom(b, 8, 0); }", "calls getrandom (randomness)"),
            ("int f(pthread_mutex_t *m) { return pthread_mutex_lock(m); }", "calls pthread_mutex_lock (threads)"),
            ("int f(void) { return unlink(\"x\"); }", "calls unlink (files)"),
            ("int f(void) { return socket(AF_UNIX, SOCK_STREAM, 0); }", "calls socket (sockets)"),
            ("void *f(void) { return mmap(0, 9, 1, 2, -1, 0); }", "calls mmap (memory mappings)"),
            ("int f(void) { return getpid(); }", "calls getpid (processes and signals)"),
        ):
            with self.subTest(expected):
                self.refused("graph/bad.c", code, "graph: graph_bad.c " + expected)

    def test_variants(self):
        large = ("-D_FILE_OFFSET_BITS=64",)
        fortified = ("-D_FORTIFY_SOURCE=2",)
        self.refused("graph/bad.c", "int f(char *n) { return open(n, 0); }", "open64 (files)",
                     flags=("-D_LARGEFILE64_SOURCE", "-Dopen=open64"))
        self.refused("graph/bad.c", "long f(int d, void *b) { return pread(d, b, 9, 0); }", "pread64 (files)",
                     flags=large)
        self.refused("graph/bad.c", "long f(int d, long n) { char b[9]; long r = read(d, b, n); return r + b[0]; }",
                     "__read_chk (files)", flags=fortified)
        self.refused("graph/bad.c", "int f(int d, void *b, long n) { char c[8]; return recv(d, c, n, 0) + c[0]; }",
                     "__recv_chk (sockets)", flags=fortified)
        self.refused("graph/bad.c", "int f(FILE *s) { int i; return fscanf(s, \"%d\", &i); }",
                     "__isoc99_fscanf (files)", flags=("-std=c17",))
        self.refused("graph/bad.c", "int f(const char *n, int g) { return open(n, g); }", "calls __open_2 (files)",
                     flags=fortified)
        self.refused("graph/bad.c", "void f(int i) { printf(\"%d\", i); }", "__printf_chk (files)", flags=fortified)

    def test_instruction(self):
        self.refused("base/bad.c", "unsigned long long f(void) { return __builtin_ia32_rdtsc(); }", "instruction rdtsc")

    def test_upward(self):
        self.refused("base/bad.c", "void *node_new(void); void *f(void) { return node_new(); }",
                     "uses node_new of graph, which it must not know")

    def test_allowed_with_reason(self):
        bad = {"graph/bad.c": "long f(void) { return time(NULL); }"}
        self.assertEqual(self.run_on(bad, allowed="graph/bad.c time: a test\n"), (0, []))
        status, findings = self.run_on(bad, allowed="graph/other.c time: another file's\n")
        self.assertEqual((status, len(findings)), (1, 2), findings)
        status, findings = self.run_on({}, allowed="graph/node.c time: used no more\n")
        self.assertEqual((status, len(findings)), (1, 1), findings)
        status, _ = self.run_on(bad, allowed="graph/bad.c time:\n")
        self.assertEqual(status, 1)


if __name__ == "__main__":
    unittest.main()
