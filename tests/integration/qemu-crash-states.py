# SPDX-License-Identifier: Apache-2.0
"""`cairn check` and `qemu-img check` find the same in what power cuts leave. The images are samples of the crash tests: writers
with and without snapshots, resizes, and snapshots, bitmaps, commits and amendments on their way."""
import json
import os
import shutil
import struct
import subprocess

import pytest

CAIRN = os.environ["CAIRN"]
TESTS = os.path.join(os.environ["CAIRN_BUILD"], "tests")
SAMPLES = 40  # of each program

if not shutil.which("qemu-img"):
    print("requires qemu-img")
    pytest.skip("qemu-img", allow_module_level=True)

# What runs, and how many seeds give enough states.
SOURCES = {
    "writes": ("test-qcow2-crash", "writes_zeroes_discards", 2),
    "sizes": ("test-qcow2-crash", "while_the_size_changes", 4),
    "snapshots-between": ("test-qcow2-crash", "with_snapshots", 4),
    "snapshots": ("test-qcow2-snapshot-crash", "", 2),
    "bitmaps": ("test-qcow2-bitmap-crash", "", 6),
    "amend": ("test-qcow2-amend-crash", "", 2),
    "commit": ("test-commit-crash", "", 3),
}


def look(path):
    """What the header says: incompatible features, and whether it names a backing file."""
    with open(path, "rb") as f:
        header = f.read(104)
    version, backing = struct.unpack_from(">IQ", header, 4)
    features = struct.unpack_from(">Q", header, 72)[0] if version > 2 else 0
    return features, backing


def verdict(program, path):
    """Status and counts, of the image alone: what lies below is not there."""
    options = f"driver=qcow2,backing=,file.driver=file,file.filename={path}"
    done = subprocess.run([program, "check", "--output=json", "--image-opts", options], capture_output=True, check=False, timeout=60)
    assert done.returncode in (0, 2, 3), (path, done)
    found = json.loads(done.stdout)
    return done.returncode, found.get("corruptions", 0), found.get("leaks", 0)


@pytest.mark.parametrize("source", SOURCES)
def test_both_find_the_same(tmp_path, source):
    program, case, seeds = SOURCES[source]
    environment = dict(os.environ, CAIRN_CRASH_SAMPLES=str(tmp_path), CAIRN_SEEDS=str(seeds), CAIRN_SEED="1")
    subprocess.run([os.path.join(TESTS, program), *([case] if case else [])], env=environment, check=True,
                   stdout=subprocess.DEVNULL, timeout=120)
    paths = sorted(str(p) for p in tmp_path.glob("*.qcow2"))
    paths = [p for p in paths if not look(p)[0] & 4]  # no external data file: it was not kept
    assert len(paths) >= 10
    step = max(1, len(paths) // SAMPLES)
    found = set()
    for path in paths[::step]:
        ours, theirs = verdict(CAIRN, path), verdict("qemu-img", path)
        assert ours == theirs, (path, ours, theirs)
        found.add(ours[0])
    assert 3 in found or source == "commit"  # leaks, of which a power cut leaves some
