# SPDX-License-Identifier: Apache-2.0
"""Calls that scripts make by mistake or by habit: what they get is what the peer gives, and no disk is harmed."""
import subprocess

import pytest
from image_support import need_peer, program, tools  # pylint: disable=unused-import

need_peer()


def content(path):
    with open(path, "rb") as f:
        return f.read()


@pytest.mark.parametrize("closed", ["2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams_do_not_become_disks(tools, closed):
    """The warning that the format was guessed once went to descriptor 2, and that was the image."""
    with open(tools.path("r.raw"), "wb") as f:
        f.write(b"\7" * (1 << 20))
    for command in ("io -c 'read -v 0 64k' -c bogus r.raw", "resize r.raw 1M", "bench -c 10 r.raw", "nbd -p 0 r.raw"):
        subprocess.run(f"'{program()}' {command} {closed}", shell=True, cwd=tools.directory, timeout=60, check=False)
        assert content(tools.path("r.raw")) == b"\7" * (1 << 20), command
    ended = subprocess.run(f"'{program()}' info r.raw >&-", shell=True, cwd=tools.directory, timeout=60, check=False,
                           stderr=subprocess.PIPE)
    assert ended.returncode == 1 and b"cannot write to standard output" in ended.stderr
