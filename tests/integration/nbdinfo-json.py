# SPDX-License-Identifier: Apache-2.0
"""What nbdinfo says of exports."""
import json
import subprocess

import pytest
from nbd_support import MIB, Daemon


def nbdinfo(*words):
    return subprocess.run(["nbdinfo", *words], capture_output=True, text=True, timeout=60, check=True).stdout


@pytest.fixture
def daemon(tmp_path):
    with open(tmp_path / "disk.img", "wb") as f:
        f.truncate(4 * MIB)
        f.seek(MIB)
        f.write(b"d" * MIB)
    with Daemon() as d:
        d.qmp("blockdev-add", driver="file", node_name="disk", filename=str(tmp_path / "disk.img"))
        d.export("disk", writable=True, description="a disk")
        d.qmp("block-export-add", type="nbd", id="ro", node_name="disk", name="ro")
        yield d


def test_an_export(daemon):
    info = json.loads(nbdinfo("--json", daemon.uri("disk")))
    assert info["protocol"] == "newstyle-fixed" and info["structured"] and not info["TLS"]
    export = info["exports"][0]
    assert export["export-name"] == "disk" and export["description"] == "a disk"
    assert export["export-size"] == 4 * MIB and export["contexts"] == ["base:allocation"]
    for ability in ("cache", "df", "fast_zero", "flush", "fua", "multi_conn", "trim", "zero"):
        assert export[f"can_{ability}"] is True, ability
    assert export["is_read_only"] is False and export["is_rotational"] is False
    assert [export[f"block_size_{k}"] for k in ("minimum", "preferred", "maximum")] == [1, 4096, 32 * MIB]


def test_a_read_only_export(daemon):
    export = json.loads(nbdinfo("--json", daemon.uri("ro")))["exports"][0]
    assert export["is_read_only"] is True
    assert export["can_trim"] is export["can_zero"] is export["can_fast_zero"] is False
    assert export["can_flush"] is export["can_multi_conn"] is export["can_cache"] is True


def test_the_list(daemon):
    info = json.loads(nbdinfo("--json", "--list", daemon.uri("")))
    assert [e["export-name"] for e in info["exports"]] == ["disk", "ro"]


def test_the_map(daemon):
    extents = json.loads(nbdinfo("--json", "--map", daemon.uri("disk")))
    assert [(e["offset"], e["length"], e["type"]) for e in extents] == [
        (0, MIB, 3), (MIB, MIB, 0), (2 * MIB, 2 * MIB, 3)]
    totals = json.loads(nbdinfo("--json", "--map", "--totals", daemon.uri("disk")))
    assert {t["type"]: t["size"] for t in totals} == {0: MIB, 3: 3 * MIB}


def test_a_name_that_nobody_has(daemon):
    ended = subprocess.run(["nbdinfo", daemon.uri("nobody")], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode != 0 and "nobody" in ended.stderr
