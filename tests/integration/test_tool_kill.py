# SPDX-License-Identifier: Apache-2.0
"""kill -9 of the tool between any two steps of a backup (docs/backup.md)."""
import shutil
import signal
import subprocess

import pytest

from conftest import PATIENCE
from tool_support import KillWalk, live, program, tool, walk_over_messages  # noqa: F401


@pytest.mark.parametrize("kind", ["full", "incremental"])
def test_kill_the_tool_at_each_message(live, kind):
    walk_over_messages(live(), "tool", kind)


def test_kill_at_each_change_of_the_directory(tool, live):
    """The steps between messages: strace kills the tool at the k-th call of a kind."""
    if not shutil.which("strace"):
        pytest.skip("strace is not installed")
    d = live()
    walk = KillWalk(d)
    walk.recover()
    kills = {}
    for call in ("flock", "connect", "fsync", "renameat", "unlinkat"):
        for k in range(1, 100):
            ended = []

            def start():
                ended.append(subprocess.run(
                    ["strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={call}", "-e",
                     f"inject={call}:signal=KILL:when={k}", tool.program, "backup", d.control, "--to", "b", "--json"],
                    cwd=tool.directory, capture_output=True, text=True, timeout=PATIENCE))

            walk.attempt(start)
            if ended[0].returncode == 0:
                break
            assert ended[0].returncode == -signal.SIGKILL, ended
            assert walk.recover()["kind"] == "incremental"
            kills[call] = k
    # At least: the lock; image, point, and the directory twice; image and point.
    assert kills["flock"] >= 1 and kills["fsync"] >= 4 and kills["renameat"] >= 2, kills
