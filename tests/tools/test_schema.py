# SPDX-License-Identifier: Apache-2.0
"""tools/schema.py makes exactly the C that stands in tests/unit/schema-golden, and refuses fragments that are wrong.

After a change of the generator, make the golden files anew, and read the difference as C:

    tools/schema.py --prefix sample --out tests/unit/schema-golden tests/unit/schema-golden/*.toml
"""
import glob
import os
import subprocess
import sys
import tempfile
import unittest

ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", ".."))
TOOL = os.path.join(ROOT, "tools", "schema.py")
GOLDEN = os.path.join(ROOT, "tests", "unit", "schema-golden")

# What is wrong, and the fragment that is. `S` stands for a struct's head.
WRONG = [
    ("unknown table [strukt]", "[strukt.a]\ndoc = 'x'"),
    ("unknown key 'memebrs'", "[struct.a]\ndoc = 'x'\nmemebrs = {}"),
    ("struct.a: lacks doc", "[struct.a]\nmembers = {}"),
    ("a.b: lacks doc", "S.b = { type = 'bool' }"),
    ("a.b: unknown key 'defualt'", "S.b = { type = 'bool', defualt = true, doc = 'x' }"),
    ("a.b: no type 'blob'", "S.b = { type = 'blob', doc = 'x' }"),
    ("a.b: no type None", "S.b = { doc = 'x' }"),
    ("a.b: optional and default together", "S.b = { type = 'bool', optional = true, default = true, doc = 'x' }"),
    ("a.b: 'x' is no default for bool", "S.b = { type = 'bool', default = 'x', doc = 'x' }"),
    ("a.b: 5 is no default for u8", "S.b = { type = 'u8', max = 4, default = 5, doc = 'x' }"),
    ("a.b: True is no default for u8", "S.b = { type = 'u8', default = true, doc = 'x' }"),
    ("a.b: the limits are not in order", "S.b = { type = 'u8', min = 5, max = 4, doc = 'x' }"),
    ("a.b: the limits are not in order", "S.b = { type = 'u8', min = -1, doc = 'x' }"),
    ("a.b: max does not fit u8", "S.b = { type = 'u8', max = 256, doc = 'x' }"),
    ("a.b: bool has no limits", "S.b = { type = 'bool', max = 1, doc = 'x' }"),
    ("a.b: only a string is an identifier", "S.b = { type = 'bool', identifier = true, doc = 'x' }"),
    ("a.b: an array has one element type", "S.b = { type = ['bool', 'int'], doc = 'x' }"),
    ("a.b: arrays of arrays", "S.b = { type = [['bool']], doc = 'x' }"),
    ("arrays of u8 are not supported", "S.b = { type = ['u8'], doc = 'x' }"),
    ("a holds itself", "S.b = { type = 'a', doc = 'x' }"),
    ("the name is taken", "S.b = { type = 'bool', doc = 'x' }\n[enum.a]\ndoc = 'x'\nvalues.v = 'x'"),
    ("a: b is refused and taken", "S.b = { type = 'bool', doc = 'x' }\nrefused.b = 'why'"),
    ("lacks values with doc", "[enum.e]\ndoc = 'x'\nvalues.v = ''"),
    ("default {} lacks mandatory members", "S.b = { type = 'bool', doc = 'x' }\n[struct.c]\ndoc = 'x'\n"
     "members.d = { type = 'a', default = {}, doc = 'x' }"),
    ("the tag must be", "[union.u]\ndoc = 'x'\ntag = 't'\nvariants = {}\nmembers.t = { type = 'bool', doc = 'x' }"),
    ("nope is no value of e", "[enum.e]\ndoc = 'x'\nvalues.v = 'x'\n[union.u]\ndoc = 'x'\ntag = 't'\n"
     "members.t = { type = 'e', doc = 'x' }\nvariants.nope = 'u'"),
    ("variant v has a member twice", "[enum.e]\ndoc = 'x'\nvalues.v = 'x'\nS.t = { type = 'bool', doc = 'x' }\n"
     "[union.u]\ndoc = 'x'\ntag = 't'\nmembers.t = { type = 'e', doc = 'x' }\nvariants.v = 'a'"),
    ("each JSON type once", "[alternate.z]\ndoc = 'x'\nmembers.p = { type = 'u64', doc = 'x' }\n"
     "members.q = { type = 'int', doc = 'x' }"),
    ("no options of driver nope", "[filter.f]\ndoc = 'x'\noptions = 'nope'"),
    ("c: arguments are a struct or a union", "[command.c]\ndoc = 'x'\narguments = 'bool'"),
    ("Expected", "[struct.a"),
]


def generate(out, fragments):
    return subprocess.run(
        [sys.executable, TOOL, "--prefix", "sample", "--out", out, *fragments], capture_output=True, text=True, check=False
    )


class Schema(unittest.TestCase):
    def test_golden_files_are_what_the_generator_makes(self):
        with tempfile.TemporaryDirectory() as out:
            ended = generate(out, sorted(glob.glob(os.path.join(GOLDEN, "*.toml"))))
            self.assertEqual((ended.returncode, ended.stderr), (0, ""))
            made = sorted(os.listdir(out))
            self.assertIn("sample-types.c", made)
            kept = sorted(n for n in os.listdir(GOLDEN) if not n.endswith(".toml") and not n.startswith("."))
            self.assertEqual(made, kept)
            for name in made:
                with open(os.path.join(out, name), encoding="utf-8") as a:
                    with open(os.path.join(GOLDEN, name), encoding="utf-8") as b:
                        self.assertEqual(a.read(), b.read(), name)

    def test_wrong_fragments_are_refused_with_the_place(self):
        for expected, text in WRONG:
            text = text.replace("S.", "[struct.a]\ndoc = 'x'\nmembers.", 1)
            with self.subTest(expected), tempfile.TemporaryDirectory() as out:
                path = os.path.join(out, "f.toml")
                with open(path, "w", encoding="utf-8") as f:
                    f.write(text + "\n")
                ended = generate(os.path.join(out, "made"), [path])
                self.assertEqual(ended.returncode, 1, ended.stderr)
                self.assertTrue(ended.stderr.startswith("schema.py: "), ended.stderr)
                self.assertIn(expected, ended.stderr)

    def test_the_generator_stays_small(self):
        with open(TOOL, encoding="utf-8") as f:
            self.assertLess(len(f.readlines()), 1000)


if __name__ == "__main__":
    unittest.main()
