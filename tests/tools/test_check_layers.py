# SPDX-License-Identifier: Apache-2.0
"""tools/check-layers.py finds each kind of violation that is planted, and nothing in a tree without one."""
import os
import subprocess
import sys
import tempfile
import unittest

ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", ".."))
LAYERS = """\
base
loop
graph
protocols
control
client: base
cli: base graph client
"""
CLEAN = {
    "base/list.h": "",
    "base/list.c": '#include "base/list.h"\n#include <stddef.h>\n',
    "loop/loop.h": '#include "base/list.h"\n',
    "loop/loop-internal.h": "",
    "loop/sim/sim.c": '#include "loop/loop-internal.h"\n',
    "graph/node.h": "",
    "graph/node-internal.h": "",
    "graph/node.c": '#include "graph/node.h"\n#include "graph/node-internal.h"\n',
    "protocols/list.c": '#include "protocols/file/file.h"\n',
    "protocols/file/file.h": "",
    "protocols/file/file.c": '#include "file-options.h"\n#include "protocols/file/file.h"\n#include "loop/loop.h"\n',
    "protocols/null/null.c": '/* #include "control/qmp.h" */\n#include "graph/node.h"\n',
    "control/qmp.h": "",
    "client/client.c": '#include "base/list.h"\n#include <cairn/cairn.h>\n',
    "cli/cli.c": '#include "graph/node.h"\n#include "cairn/cairn.h"\n',
}


class CheckLayers(unittest.TestCase):
    def run_on(self, extra):
        with tempfile.TemporaryDirectory() as root:
            files = {"tools/layers": LAYERS}
            files |= {f"src/{path}": text for path, text in (CLEAN | extra).items()}
            for path, text in files.items():
                full = os.path.join(root, path)
                os.makedirs(os.path.dirname(full), exist_ok=True)
                with open(full, "w", encoding="utf-8") as f:
                    f.write(text)
            done = subprocess.run(
                [sys.executable, os.path.join(ROOT, "tools", "check-layers.py"), root],
                capture_output=True, text=True, check=False,
            )
            return done.returncode, done.stdout.splitlines()

    def refused(self, path, text, line, why):
        status, output = self.run_on({path: text})
        self.assertEqual(status, 1, output)
        self.assertEqual(len(output), 2, output)
        self.assertTrue(output[0].startswith(f"src/{path}:{line}: "), output)
        self.assertIn(why, output[0])

    def test_clean_tree(self):
        status, output = self.run_on({})
        self.assertEqual((status, output), (0, [f"layers: {len(CLEAN)} files, 0 findings"]))

    def test_upward(self):
        self.refused("graph/bad.c", '\n#include "control/qmp.h"\n', 2, "graph stands below control")
        self.refused("base/bad.h", '#  include "loop/loop.h"\n', 1, "base stands below loop")

    def test_folder_with_its_own_list(self):
        self.refused("client/bad.c", '#include "graph/node.h"\n', 1, "must not know it")
        self.refused("cli/bad.c", '#include "loop/loop.h"\n', 1, "must not know it")

    def test_driver_and_driver(self):
        self.refused("protocols/null/bad.c", '#include "protocols/file/file.h"\n', 1, "another driver")

    def test_internal_header(self):
        self.refused("protocols/file/bad.c", '#include "graph/node-internal.h"\n', 1, "internal to graph")
        self.refused("graph/bad.c", '#include "loop/loop-internal.h"\n', 1, "internal to loop")

    def test_client_header_below(self):
        self.refused("graph/bad.c", "#include <cairn/cairn.h>\n", 1, "client library")

    def test_spelling(self):
        self.refused("graph/bad.c", '#include "node.h"\n', 1, 'as "graph/node.h"')
        self.refused("graph/bad.c", "#include <base/list.h>\n", 1, 'write "base/list.h"')
        self.refused("graph/bad.c", '#include "base/lsit.h"\n', 1, "no such file")
        self.refused("graph/bad.c", '#include "../base/list.h"\n', 1, "no folder ..")

    def test_unknown_folder(self):
        self.refused("misc/bad.c", "", 1, "not in tools/layers")


if __name__ == "__main__":
    unittest.main()
