# SPDX-License-Identifier: Apache-2.0
"""fio writes over NBD and verifies checksums of what it reads back, many requests deep and from several connections."""
import json
import subprocess

import pytest
from nbd_support import MIB, Daemon

SIZE = 64 * MIB


@pytest.mark.parametrize("engine,direct", [("io_uring", False), ("io_uring", True), ("threads", False), ("threads", True)])
def test_checksums(tmp_path, engine, direct):
    path = tmp_path / "disk.img"
    with open(path, "wb") as f:
        f.truncate(SIZE)
    with Daemon(engine=engine) as d:
        d.add("disk", path, discard="unmap", cache={"direct": direct})
        jobs = []
        for i in range(2):  # each its own half and its own connection
            jobs += [f"--name=j{i}", f"--offset={i * SIZE // 2}", f"--size={SIZE // 2}"]
        out = subprocess.run(
            ["fio", "--ioengine=nbd", f"--uri={d.uri('disk')}", "--rw=randrw", "--bsrange=512-128k", "--blockalign=512",
             "--iodepth=64", "--verify=crc32c", "--verify_backlog=64", "--verify_fatal=1", "--do_verify=1",
             "--random_generator=tausworthe64", "--randseed=7", "--fsync=100", "--norandommap=0", "--io_size=48m",
             "--output-format=json", *jobs],
            capture_output=True, text=True, timeout=120, cwd=tmp_path, check=False,
        )
        assert out.returncode == 0, out.stdout + out.stderr
        for job in json.loads(out.stdout[out.stdout.index("{"):])["jobs"]:
            assert job["error"] == 0 and job["write"]["io_bytes"] > MIB and job["read"]["io_bytes"] > MIB
