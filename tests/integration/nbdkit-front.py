# SPDX-License-Identifier: Apache-2.0
"""nbdkit's nbd plugin in front of us, with and without filters that cut requests up: contents compared through both."""
import random
import subprocess

import nbd
import pytest
from nbd_support import MIB, Daemon, wait_until

SIZE = 16 * MIB


@pytest.mark.parametrize("filters", [
    (), ("--filter=blocksize", "maxdata=4096"), ("--filter=fua", "fuamode=force"), ("--filter=noextents",),
    ("--filter=nozero", "zeromode=emulate"), ("--filter=multi-conn", "multi-conn-mode=plugin"),
])
def test_contents_through_nbdkit(tmp_path, filters):
    path = tmp_path / "disk.img"
    data = bytearray(random.Random(8).randbytes(SIZE))
    path.write_bytes(data)
    with Daemon() as d:
        d.add("disk", path, discard="unmap")
        sock = f"{d.dir}/kit"
        words = [word for word in filters if word.startswith("--")]
        words += ["nbd", f"socket={d.path}", "export=disk"] + [w for w in filters if not w.startswith("--")]
        kit = subprocess.Popen(["nbdkit", "--exit-with-parent", "-f", "-U", sock, *words])
        try:
            def connect():
                h = nbd.NBD()
                h.add_meta_context("base:allocation")
                try:
                    h.connect_uri(f"nbd+unix:///?socket={sock}")
                except nbd.Error:
                    return None
                return h
            h = wait_until(connect)
            assert h.get_size() == SIZE
            rng = random.Random(9)
            for _ in range(60):
                offset = rng.randrange(SIZE)
                length = rng.randrange(1, min(200000, SIZE - offset) + 1)
                kind = rng.randrange(4)
                if kind == 0:
                    h.zero(length, offset)
                    data[offset : offset + length] = bytes(length)
                elif kind == 1:
                    assert h.pread(length, offset) == data[offset : offset + length]
                else:
                    new = rng.randbytes(length)
                    h.pwrite(new, offset, nbd.CMD_FLAG_FUA if kind == 2 else 0)
                    data[offset : offset + length] = new
            h.cache(MIB, 0)
            h.flush()
            total = []
            h.block_status(SIZE, 0, lambda c, o, e, err: total.extend(e[::2]))
            assert sum(total) == SIZE
            assert h.pread(SIZE, 0) == data
            h.shutdown()
        finally:
            kit.kill()
            kit.wait(30)
        assert path.read_bytes() == data
