# SPDX-License-Identifier: Apache-2.0
"""tools/gen-test-main.py finds cases by name; the main that it writes chooses among them and prints seeds."""
import os
import subprocess
import sys
import tempfile
import unittest

ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", ".."))
SAMPLE = """\
#include <stdlib.h>
#include <unistd.h>

static int setup(void **state)
{
    *state = "set up";
    return 0;
}

/* static void test_sample__in_a_comment(void **state) */
static void test_sample__passes(void **state)
{
    assert_string_equal(*state, "set up");
}

static void test_sample__seeded(void **state)
{
    (void)state;
    TEST_SEEDS(seed) {
        if (getenv("FAIL"))
            assert_int_not_equal(seed, 37);
        if (getenv("ABORT") && seed == 38)
            abort();
        if (getenv("HANG") && seed == 39)
            kill(getpid(), SIGTERM);
    }
}
"""


class GenTestMain(unittest.TestCase):
    def generate(self, where, text, name="test-sample.c"):
        source = os.path.join(where, name)
        with open(source, "w", encoding="utf-8") as f:
            f.write(text)
        return subprocess.run(
            [sys.executable, os.path.join(ROOT, "tools/gen-test-main.py"), source, os.path.join(where, "main.c")],
            capture_output=True, text=True, check=False,
        )

    def refused(self, text, why):
        with tempfile.TemporaryDirectory() as where:
            done = self.generate(where, text)
            self.assertEqual(done.returncode, 1)
            self.assertIn(why, done.stderr)

    def test_refusals(self):
        self.refused("/* nothing */\n", "no case found")
        self.refused("static void test_other__a(void **state)\n{\n}\n", "starts with test_sample__")
        self.refused("static void test_sample__a(void **state)\n{\n}\n" * 2, "twice")

    def test_program(self):
        with tempfile.TemporaryDirectory() as where:
            done = self.generate(where, "#include <signal.h>\n" + SAMPLE)
            self.assertEqual(done.returncode, 0, done.stderr)
            program = os.path.join(where, "test-sample")
            support = os.path.join(ROOT, "tests/support")
            subprocess.run(
                ["gcc", "-Wall", "-Wextra", "-Werror", "-D_GNU_SOURCE", "-I", support, os.path.join(where, "main.c"),
                 os.path.join(support, "seeds.c"), "-lcmocka", "-o", program],
                check=True,
            )

            def run(*arguments, **env):
                done = subprocess.run(
                    [program, *arguments], capture_output=True, text=True, check=False, env={**os.environ, **env})
                return done.returncode, done.stdout, done.stderr

            env = {"CAIRN_SEEDS": "50", "CAIRN_SEED": "1"}
            status, output, _ = run(**env)
            self.assertEqual(status, 0)
            self.assertIn("1..2\nok 1 - test_sample__passes\n", output)
            self.assertIn("# test_sample__seeded: 50 seeds passed, from 1\n", output)

            status, output, _ = run("seed")
            self.assertEqual((status, output.splitlines()[0]), (0, "1..1"))
            self.assertEqual(run("test_*__passes")[1].splitlines()[0], "1..1")
            self.assertEqual(run("nothing")[0], 99)
            self.assertEqual(run(CAIRN_SEEDS="many")[0], 99)
            self.assertEqual(run(CAIRN_SEEDS="0")[0], 99)

            for how, seed, expected in (("FAIL", 37, 1), ("ABORT", 38, -6), ("HANG", 39, -15)):
                status, _, errors = run(**env, **{how: "1"})
                self.assertEqual(status, expected, how)
                self.assertIn(f"# test_sample__seeded: failed at seed {seed}; alone: CAIRN_SEED={seed} ", errors)
                alone = run("seeded", CAIRN_SEED=str(seed), CAIRN_SEEDS="1", **{how: "1"})
                self.assertEqual(alone[0], expected, how)


if __name__ == "__main__":
    unittest.main()
