# SPDX-License-Identifier: Apache-2.0
"""A disk whose host never answers, beside one in use on the same I/O thread (L1, P4)."""
import time

import pytest

from test_backup import BLOCK, Writer, nbd, stamped
from test_backup_faults import DEADLINE, NOISE, faulty, quit_ends, slowest  # pylint: disable=unused-import


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("way", ["keep", "ignore"])
def test_disk_that_hangs_beside_another(faulty, way, direct):
    """L1: nothing of one disk that waits for its host is waited for by the loop that they share."""
    faulty.must("blockdev-del", {"node-name": "t"})
    faulty.must("blockdev-add", {"driver": "file", "node-name": "t", "filename": faulty.path("t"),
                                 "cache": {"direct": direct}})
    faulty.must("block-export-add", {"type": "nbd", "id": "e-t", "node-name": "t", "writable": True})
    h = faulty.connect("t")
    faulty.stalling.tell(way)
    buffers = [nbd.Buffer.from_bytearray(bytearray(stamped(i, 1))) for i in range(64)]
    for i, buffer in enumerate(buffers):
        (h.aio_pread if i % 4 < 2 else h.aio_pwrite)(buffer, i * BLOCK)
    h.aio_flush()
    h.poll(100)
    since = time.monotonic()
    with Writer(faulty) as writer:
        writer.goes_on(200)
        faulty.queries_answer()
        faulty.timed("block-export-del", {"id": "e-t", "mode": "hard"})
        faulty.q.event("BLOCK_EXPORT_DELETED")
        faulty.timed("blockdev-del", {"node-name": "t"}, within=2 * DEADLINE + NOISE)
        writer.goes_on(200)
    assert slowest(writer, since) < NOISE
    assert time.monotonic() - since < 4 * DEADLINE + NOISE
    quit_ends(faulty, asked=False)
