# SPDX-License-Identifier: Apache-2.0
"""./check counts what passed, failed and was skipped, and ends what a test leaves behind."""
import contextlib
import importlib.machinery
import importlib.util
import io
import os
import subprocess
import sys
import tempfile
import time
import unittest

TESTS = os.path.abspath(os.path.join(os.path.dirname(__file__), ".."))


def load():
    sys.path.insert(0, TESTS)
    loader = importlib.machinery.SourceFileLoader("run_suites", os.path.join(TESTS, "run-suites"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("run_suites", loader))
    loader.exec_module(module)
    return module


suites = load()


def setUpModule():
    suites.adopt_orphans()


class Integration(unittest.TestCase):
    def run_script(self, text, timeout=20, name="peer-what.sh"):
        with tempfile.TemporaryDirectory() as where:
            path = os.path.join(where, name)
            with open(path, "w", encoding="utf-8") as f:
                f.write(text)
            return suites.integration(path, where, timeout)

    def test_by_exit_status(self):
        for text, status in (("exit 0", suites.PASS), ("exit 1", suites.FAIL), ("echo no qemu; exit 77", suites.SKIP)):
            with self.subTest(text):
                self.assertEqual([case.status for case in self.run_script(text)], [status])

    def test_environment(self):
        script = 'test "$PWD" = "$TMPDIR" && test -z "$(ls)" && case $CAIRND in "$CAIRN_BUILD"/*) ;; *) exit 1 ;; esac'
        self.assertEqual([case.status for case in self.run_script(script)], [suites.PASS])

    def test_left_behind(self):
        for text in ("sleep 4321 &", "setsid sleep 4321 & sleep 0.2"):
            with self.subTest(text):
                case = self.run_script(text)[0]
                self.assertEqual(case.status, suites.FAIL)
                self.assertRegex(case.detail, r"left running: (sleep|sh|setsid) \(\d+\)")
                pid = case.detail.split("(")[1].split(")")[0]
                self.assertFalse(os.path.exists(f"/proc/{pid}"))

    def test_hang(self):
        begin = time.monotonic()
        case = self.run_script("sleep 4321", timeout=1)[0]
        self.assertEqual(case.status, suites.FAIL)
        self.assertIn("ended after 1 s", case.detail)
        self.assertLess(time.monotonic() - begin, 15)

    def test_pytest_cases_are_counted(self):
        cases = self.run_script(
            "import pytest\n"
            "def test_a(): pass\n"
            "def test_b(): assert 1 == 2\n"
            "def test_c(): pytest.skip('why')\n",
            name="peer_what.py",
        )
        self.assertEqual([case.status for case in cases], [suites.PASS, suites.FAIL, suites.SKIP])
        self.assertIn("1 == 2", cases[1].detail)


class Counting(unittest.TestCase):
    def count(self, cases, skips=()):
        suites.SUITES["planted"] = lambda: cases
        self.addCleanup(suites.SUITES.pop, "planted", None)
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            counts, _ = suites.run_suite("planted", list(skips))
        return tuple(counts[s] for s in (suites.PASS, suites.FAIL, suites.SKIP)), output.getvalue()

    def test_tap(self):
        found = sys.modules["runner"].tap_cases(
            "t", "1..4\nok 1 - a\nnot ok 2 - b\n# 1 != 2\n# f.c:3: error: Failure!\nnot ok 3 # SKIP c\nok - t\n", "")
        self.assertEqual([(c.name, c.status) for c in found],
                         [("t:a", "pass"), ("t:b", "fail"), ("t:c", "skip")])
        self.assertIn("1 != 2", found[1].detail)

    def test_skip_needs_a_reason(self):
        skipped = [suites.Case("a", suites.PASS), suites.Case("b.sh", suites.SKIP, "no kernel module")]
        counts, output = self.count([suites.Case(**vars(case)) for case in skipped])
        self.assertEqual(counts, (1, 1, 0))
        self.assertIn("tests/skips does not list planted/b.sh", output)
        counts, _ = self.count([suites.Case(**vars(case)) for case in skipped], ["planted/b.*"])
        self.assertEqual(counts, (1, 0, 1))

    def test_skips_file(self):
        with tempfile.NamedTemporaryFile("w", suffix=".skips") as f:
            f.write("# comment\nintegration/x.sh: no such device here\n")
            f.flush()
            self.assertEqual(suites.read_skips(f.name), ["integration/x.sh"])
            f.write("integration/y.sh:\n")
            f.flush()
            with self.assertRaises(SystemExit):
                suites.read_skips(f.name)


class Command(unittest.TestCase):
    def test_unknown_suite(self):
        done = subprocess.run(
            [os.path.join(TESTS, "run-suites"), "nothing-of-this-name"], capture_output=True, text=True, check=False)
        self.assertEqual(done.returncode, 1)
        self.assertIn("no suite 'nothing-of-this-name'", done.stderr)


if __name__ == "__main__":
    unittest.main()
