# SPDX-License-Identifier: Apache-2.0
"""kill -9 of the daemon between any two steps of a backup (docs/backup.md)."""
import pytest

from tool_support import live, program, tool, walk_over_messages  # noqa: F401


@pytest.mark.parametrize("kind,after", [("full", False), ("incremental", False), ("incremental", True)])
def test_kill_the_daemon_at_each_message(live, kind, after):
    walk_over_messages(live(), "daemon", kind, after)
