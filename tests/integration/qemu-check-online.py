# SPDX-License-Identifier: Apache-2.0
"""`cairn check-node`: images are checked while a daemon serves them and a guest writes. What is found is what qemu-img check finds when
the guest has gone."""
import json
import random
import threading
import time

import pytest

from image_support import need_peer, program, run, u64

nbd = pytest.importorskip("nbd")
need_peer()

MIB = 1 << 20
COPIED = 1 << 63


class Served:
    """A node `d` that an NBD client reaches; `control` is where the tool finds the daemon."""

    def __init__(self, daemon, path):
        self.daemon = daemon
        self.q = daemon.qmp()
        self.control = daemon.path
        self.uri = f"nbd+unix:///d?socket={daemon.directory}/n.sock"
        self.q.command("blockdev-add", driver="qcow2", node_name="d", discard="unmap", file={"driver": "file", "filename": path})
        self.q.command("nbd-server-start", addr={"type": "unix", "data": {"path": f"{daemon.directory}/n.sock"}})
        self.q.command("block-export-add", type="nbd", id="e", node_name="d", writable=True)

    def check(self, *options, ok=(0,)):
        return run(program(), "check-node", *options, self.control, "d", ok=ok)

    def json(self, ok=(0,)):
        return json.loads(self.check("--json", ok=ok).stdout)

    def close(self):
        self.q.command("nbd-server-stop")
        self.q.command("blockdev-del", node_name="d")


class Guest(threading.Thread):
    """Writes, discards and flushes from `first` on until it is told to stop."""

    def __init__(self, uri, first, size):
        super().__init__()
        self.h = nbd.NBD()
        self.h.connect_uri(uri)
        self.first, self.size = first, size
        self.stopped = threading.Event()
        self.requests = 0
        self.slowest = 0

    def run(self):
        r = random.Random(7)
        while not self.stopped.is_set():
            begin = time.monotonic()
            length = r.choice([4096, 65536, 200000])
            offset = r.randrange(self.first, self.size - length)
            kind = r.randrange(10)
            if kind < 6:
                self.h.pwrite(r.randbytes(length), offset)
            elif kind < 8:
                self.h.trim(length, offset)
            elif kind < 9:
                self.h.zero(length, offset)
            else:
                self.h.flush()
            self.requests += 1
            self.slowest = max(self.slowest, time.monotonic() - begin)

    def stop(self):
        self.stopped.set()
        self.join()
        self.h.shutdown()


def make(path, *options, size="256M"):
    run("qemu-img", "create", "-q", "-f", "qcow2", *options, path, size)
    run("qemu-io", "-f", "qcow2", "-c", "write -P 1 0 16M", path)


@pytest.mark.parametrize("options", [(), ("-o", "cluster_size=4k"), ("-o", "refcount_bits=64")])
def test_sound_image_is_sound_under_load(daemon, tmp_path, options):
    path = str(tmp_path / "a")
    make(path, *options)
    served = Served(daemon, path)
    guest = Guest(served.uri, 0, 256 * MIB)
    guest.start()
    before = guest.requests
    for _ in range(40):
        found = served.json()
        assert found["check-errors"] == 0 and "corruptions" not in found and "leaks" not in found, found
    assert guest.requests > before + 10 and guest.is_alive()
    guest.stop()
    assert "No errors were found on the image." in served.check().stdout
    served.close()
    run("qemu-img", "check", "-q", path)


def test_damage_is_found_under_load_and_nothing_else(daemon, tmp_path):
    path = str(tmp_path / "a")
    make(path)
    l2 = u64(path, u64(path, 40)) & 0x00fffffffffffe00
    u64(path, l2 + 8, u64(path, l2))  # one cluster twice, another lost
    served = Served(daemon, path)
    guest = Guest(served.uri, 32 * MIB, 256 * MIB)
    guest.start()
    for _ in range(4):
        found = served.json(ok=(2,))
        assert (found["corruptions"], found["leaks"]) == (1, 1), found
    guest.stop()
    done = served.check(ok=(2,))
    assert "refcount=1 reference=2" in done.stderr and "Leaked cluster" in done.stderr
    served.close()
    peer = json.loads(run("qemu-img", "check", "--output=json", path, ok=(2,)).stdout)
    assert (peer["corruptions"], peer["leaks"]) == (1, 1)


def test_result_stays_until_it_is_dismissed(daemon, tmp_path):
    path = str(tmp_path / "a")
    make(path)
    served = Served(daemon, path)
    served.q.command("block-check", job_id="c", node_name="d")
    while served.q.command("query-jobs")[0]["status"] != "concluded":
        time.sleep(0.01)
    check, = served.q.command("query-block-checks")
    assert (check["id"], check["node-name"]) == ("c", "d")
    result = check["result"]
    assert (result["corruptions"], result["leaks"], result["findings"]) == (0, 0, [])
    assert result["allocated-clusters"] == 256 and result["total-clusters"] == 4096
    served.q.command("job-dismiss", id="c")
    assert served.q.command("query-block-checks") == []
    served.close()


def test_what_cannot_be_checked_is_refused_by_name(daemon, tmp_path):
    path = str(tmp_path / "a")
    make(path)
    served = Served(daemon, path)
    served.q.command("blockdev-add", driver="null-co", node_name="n", size=MIB)
    assert "null-co" in run(program(), "check-node", served.control, "n", ok=(1,)).stderr
    assert "'nowhere'" in run(program(), "check-node", served.control, "nowhere", ok=(1,)).stderr
    assert "close its node" in run(program(), "check-node", "--repair=all", served.control, "d", ok=(2,)).stderr
    assert served.q.command("query-jobs") == []
    served.close()


def test_backing_node_that_is_only_read_can_be_checked(daemon, tmp_path):
    path = str(tmp_path / "a")
    make(path)
    q = daemon.qmp()
    q.command("blockdev-add", driver="qcow2", node_name="d", read_only=True, file={"driver": "file", "filename": path})
    found = json.loads(run(program(), "check-node", "--json", daemon.path, "d").stdout)
    assert found["allocated-clusters"] == 256 and found["node-name"] == "d"
    q.command("blockdev-del", node_name="d")
