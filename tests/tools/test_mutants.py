# SPDX-License-Identifier: Apache-2.0
"""tests/mutants/run.py tells a caught mutant from the others, and restores what it patched."""
import os
import subprocess
import sys
import tempfile
import unittest

ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", ".."))
TREE = {
    "meson_options.txt": "option('sim_points', type: 'boolean', value: false)\n",
    "meson.build": "project('p', 'c')\ntest('test-sum', executable('t', 'test.c', 'sum.c'), protocol: 'tap')\n",
    "sum.c": "int sum(int a, int b)\n{\n    int s = a;\n\n    s += b;\n    return s;\n}\n",
    "test.c": """\
#include <stdio.h>
int sum(int a, int b);
int main(void)
{
    printf("1..2\\n");
    printf("%sok 1 - test_sum__adds\\n", sum(2, 3) == 5 ? "" : "not ");
    printf("%sok 2 - test_sum__zero\\n", sum(0, 0) == 0 ? "" : "not ");
    return 0;
}
""",
}
HEADER = "Rule: X1\nRemoves: the sum\nTests: {tests}\n\n"
DIFF = """\
--- a/sum.c
+++ b/sum.c
@@ -2,6 +2,6 @@
 {
     int s = a;
 
-    s += b;
+    %s
     return s;
 }
"""


class Mutants(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.scratch = tempfile.TemporaryDirectory()
        cls.root = os.path.join(cls.scratch.name, "tree")
        for path, text in TREE.items():
            os.makedirs(cls.root, exist_ok=True)
            with open(os.path.join(cls.root, path), "w", encoding="utf-8") as f:
                f.write(text)
        subprocess.run(["git", "init", "-q", cls.root], check=True)

    @classmethod
    def tearDownClass(cls):
        cls.scratch.cleanup()

    def run_mutant(self, change, tests="test-sum:test_sum__adds", name="X1-sum", diff=DIFF):
        patch = os.path.join(self.scratch.name, name + ".patch")
        with open(patch, "w", encoding="utf-8") as f:
            f.write(HEADER.format(tests=tests) + diff % change)
        done = subprocess.run(
            [sys.executable, os.path.join(ROOT, "tests/mutants/run.py"), "--root", self.root,
             "--dir", os.path.join(self.scratch.name, "work"), patch],
            capture_output=True, text=True, check=False,
        )
        output = done.stdout + done.stderr
        words = [line.split()[0] for line in output.splitlines() if f" {name} (" in line]
        return done.returncode, words[0] if words else output

    def test_caught(self):
        self.assertEqual(self.run_mutant("s -= b;"), (0, "caught"))
        self.assertEqual(self.run_mutant("s -= b;", "test-sum"), (0, "caught"))

    def test_survived(self):
        self.assertEqual(self.run_mutant("s = a + b;"), (1, "survived"))

    def test_survived_in_the_named_case(self):
        self.assertEqual(self.run_mutant("s -= b;", "test-sum:test_sum__zero"), (1, "survived"))
        self.assertEqual(self.run_mutant("s -= b;", "test-sum:test_sum__adds test-sum:test_sum__zero"), (1, "survived"))

    def test_death_counts_as_failure(self):
        self.assertEqual(self.run_mutant("__builtin_trap();"), (0, "caught"))

    def test_does_not_apply(self):
        self.assertEqual(
            self.run_mutant("s -= b;", diff=DIFF.replace("int s = a", "int x = 9").replace("return s", "return x")
                            .replace("-    s +=", "-    x +=")),
            (1, "does-not-apply"),
        )

    def test_does_not_build(self):
        self.assertEqual(self.run_mutant("s -= nothing;"), (1, "does-not-build"))

    def test_header(self):
        self.assertEqual(self.run_mutant("s -= b;", name="Y2-sum")[0], 1)

    def test_unknown_test(self):
        status, output = self.run_mutant("s -= b;", "test-other")
        self.assertEqual(status, 1)
        self.assertIn("test-other", output)


if __name__ == "__main__":
    unittest.main()
