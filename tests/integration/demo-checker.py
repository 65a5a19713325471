# SPDX-License-Identifier: Apache-2.0
"""The demo's checker: it accepts images of one instant, and no others; on logs and images made here, and of the writer."""
import json
import os
import random
import re
import struct
import subprocess
import sys
import time
import zlib

import pytest
from nbd_support import Daemon, Qmp, QmpError

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "../demo"))
import relay  # noqa: E402
import spoil  # noqa: E402

CHECKER = os.path.join(os.environ["CAIRN_BUILD"], "tests/demo/demo-checker")
WRITER = os.path.join(os.environ["CAIRN_BUILD"], "tests/demo/demo-writer")
BLOCK = 4096
MARK = 2**64 - 1
BLOCKS = 8
PLACES = [40, 41, 3, 9, 8, 7, 20, 63]  # of the blocks in the disk
DISK_BLOCKS = 64


def stamped(block, sequence):
    """By this file's own hand: the checker must know the blocks by their description, not by the writer's code."""
    body = b"CAIRNBLK" + struct.pack("=QQ", block, sequence)
    body += random.Random(block << 32 | sequence).randbytes(BLOCK - 4 - len(body))
    return body + struct.pack("=I", zlib.crc32(body))


class Case:
    """A log, a list and an image of 8 blocks; what is not said otherwise holds sequence 0."""

    def __init__(self, where):
        self.where = where
        self.records = []
        self.content = [stamped(block, 0) for block in range(BLOCKS)]
        self.rest = bytearray(random.Random(1).randbytes(DISK_BLOCKS * BLOCK))
        self.places = PLACES
        self.head = b"CAIRNLOG" + struct.pack("=IIQQ", 1, 32, BLOCKS, 0)
        self.cut = None  # bytes of the log that are left
        self.padding = 320
        self.size = DISK_BLOCKS

    def write(self, block, submit, ack):
        """Logs a write; returns its sequence."""
        self.records.append((len(self.records) + 1, block, submit, ack))
        return len(self.records)

    def mark(self, at):
        self.write(MARK, at, at)

    def holds(self, block, sequence):
        self.content[block] = stamped(block, sequence)

    def files(self):
        log = self.head + b"".join(struct.pack("=4Q", *record) for record in self.records) + bytes(self.padding)
        image = bytearray(self.rest)
        for block, place in enumerate(self.places[:BLOCKS]):
            image[place * BLOCK:(place + 1) * BLOCK] = self.content[block]
        for name, data in (
            ("log", log[:self.cut]), ("image", image[:self.size * BLOCK]),
            ("list", b"".join(b"%d\n" % place for place in self.places)),
        ):
            (self.where / name).unlink(missing_ok=True)  # ext4 flushes a file that is written anew, at once
            (self.where / name).write_bytes(data)

    def check(self, begin, end, *more):
        """(exit status, what it says)"""
        self.files()
        return check(self.where, begin, end, *more)

    def one_instant(self, begin, end, low, high):
        """It is accepted, and the instant lies between exactly these two."""
        status, says = self.check(begin, end)
        assert status == 0 and says.startswith("one instant: T = "), says
        got = re.search(r"T lies between ([+-][\d.]+) us and ([+-][\d.]+) us", says)
        assert [round(float(word) * 1000) for word in got.groups()] == [low - begin, high - begin], says

    def none(self, text, begin=1000, end=2000):
        status, says = self.check(begin, end)
        assert status == 1 and text in says, says

    def cannot(self, text, begin=1000, end=2000):
        status, says = self.check(begin, end)
        assert status == 2 and text in says, says


def check(where, begin, end, *more, image="image"):
    ended = subprocess.run(
        [CHECKER, "--log", where / "log", "--list", where / "list", "--window", str(begin), str(end), *more,
         where / image],
        capture_output=True, text=True, timeout=60, check=False,
    )
    return ended.returncode, ended.stdout + ended.stderr


@pytest.fixture
def case(tmp_path):
    return Case(tmp_path)


@pytest.fixture
def busy(case):
    """Before the window 1 (acknowledged) and 2 to block 0; 3 and 4 under way at 1500, to blocks 1 and 2; 5 to block 0 later."""
    case.write(0, 100, 200)
    case.write(0, 300, 400)
    case.write(1, 1400, 1600)
    case.write(2, 1450, 1550)
    case.write(0, 1700, 1800)
    case.mark(9000)
    case.holds(0, 2)
    return case


# One instant.


def test_nothing_written(case):
    case.mark(9000)
    case.one_instant(1000, 2000, 1000, 2000)


def test_last_acknowledged_versions(busy):
    """1 and 2 are not yet to be seen: T is before their acknowledgements."""
    busy.one_instant(1000, 2000, 1000, 1550)


@pytest.mark.parametrize("one, two, low, high", [
    (0, 0, 1000, 1550), (3, 0, 1400, 1550), (0, 4, 1450, 1600), (3, 4, 1450, 1800),
])
def test_writes_under_way_may_be_in_or_not(busy, one, two, low, high):
    busy.holds(1, one)
    busy.holds(2, two)
    busy.one_instant(1000, 2000, low, high)


def test_bounds_belong_to_the_interval(case):
    case.write(0, 1000, 1500)
    case.write(1, 1500, 1600)
    case.mark(9000)
    case.holds(1, 2)
    case.one_instant(1000, 2000, 1500, 1500)
    case.one_instant(1500, 1500, 1500, 1500)


def test_write_without_acknowledgement_may_be_in_or_not(case):
    case.write(0, 100, 0)
    case.write(1, 1400, 0)
    case.mark(9000)
    case.one_instant(1000, 2000, 1000, 2000)
    case.holds(0, 1)
    case.one_instant(1000, 2000, 1000, 2000)
    case.holds(1, 2)
    case.one_instant(1000, 2000, 1400, 2000)


def test_acknowledgement_after_the_window_does_not_bound(case):
    case.write(0, 500, 5000)
    case.mark(9000)
    case.one_instant(1000, 2000, 1000, 2000)


def test_a_quiet_disk_must_hold_the_last(case):
    last = [case.write(block, 10 * block + 1, 10 * block + 5) for block in range(BLOCKS)]
    case.mark(9000)
    for block in range(BLOCKS):
        case.holds(block, last[block])
    case.one_instant(1000, 2000, 1000, 2000)
    case.holds(5, 0)
    case.none("block 5 (block 7 of the disk) still holds write 0, though write 6 was acknowledged")


# None.


def test_block_of_an_older_instant(busy):
    busy.holds(0, 1)
    busy.none("block 0 (block 40 of the disk) still holds write 1, though write 2 was acknowledged at -0.600 us")
    busy.holds(0, 0)
    busy.none("still holds write 0, though write 1 was acknowledged")


def test_block_of_a_newer_instant(busy):
    busy.holds(0, 5)
    busy.none("block 0 (block 40 of the disk) holds write 5, submitted at +0.700 us; block 2 (block 3 of the disk) still")


def test_block_of_after_the_window(busy):
    busy.write(3, 9500, 9600)
    busy.mark(9700)
    busy.holds(3, 7)
    busy.none("block 3 (block 9 of the disk) holds write 7, submitted at +8.500 us, after the reply", end=1400)


def test_mixed_from_two_instants(case):
    """Each half alone is right: T is before 1100 or after 1300."""
    case.write(0, 1000, 1100)
    case.write(1, 1300, 1400)
    case.mark(9000)
    case.one_instant(1000, 2000, 1000, 1100)
    case.holds(0, 1)
    case.one_instant(1000, 2000, 1000, 1400)
    case.holds(1, 2)
    case.one_instant(1000, 2000, 1300, 2000)
    case.holds(0, 0)
    case.none("block 1 (block 41 of the disk) holds write 2, submitted at +0.300 us; block 0 (block 40 of the disk) still")


def test_right_instant_outside_of_the_window(busy):
    busy.none("the command was sent at 0 us; block 2 (block 3 of the disk) still", begin=1560, end=2000)
    busy.holds(2, 4)
    busy.none("holds write 4, submitted at +0.450 us, after the reply", begin=1000, end=1440)


def test_versions_that_never_were(busy):
    for sequence in (7, 6, 3, 2**63, 2**64 - 1):
        busy.holds(3, sequence)
        busy.none(f"block 3 (block 9 of the disk) holds write {sequence}, which the log does not have for it")


def test_block_of_another_place(busy):
    busy.content[3] = stamped(4, 0)
    busy.none("block 3 (block 9 of the disk) holds block 4")
    busy.content[3] = stamped(2**64 - 1, 2**64 - 1)
    busy.none(f"holds block {2**64 - 1}")


@pytest.mark.parametrize("at", [9, 17, 24, 511, 512, 4091, 4092, 4095])
def test_damaged_block(busy, at):
    data = bytearray(busy.content[7])
    data[at] ^= 0x10
    busy.content[7] = bytes(data)
    busy.none("block 7 (block 63 of the disk) has a wrong checksum")


def test_torn_block(busy):
    busy.holds(1, 3)
    busy.content[1] = busy.content[1][:2048] + stamped(1, 0)[2048:]
    busy.none("block 1 (block 41 of the disk) has a wrong checksum")


@pytest.mark.parametrize("content", [bytes(BLOCK), b"\xff" * BLOCK, random.Random(3).randbytes(BLOCK)])
def test_foreign_block(busy, content):
    busy.content[6] = content
    busy.none("block 6 (block 20 of the disk) is none of the writer's")


def test_short_image(busy):
    busy.size = 63
    busy.none("block 7 (block 63 of the disk) lies beyond the image's end")


def test_place_out_of_this_world(busy):
    busy.content[7] = b""
    busy.files()
    text = (busy.where / "list").read_text().replace("63\n", f"{2**64 - 1}\n")
    (busy.where / "list").write_text(text)
    status, says = check(busy.where, 1000, 2000)
    assert status == 1 and "lies beyond the image's end" in says


def test_rest_of_the_disk(busy):
    busy.files()
    (busy.where / "original").write_bytes(busy.rest)
    original = ("--rest", busy.where / "original")
    status, says = busy.check(1000, 2000, *original)
    assert status == 0 and "the rest is what it was" in says
    busy.rest[50 * BLOCK + 4095] ^= 1
    status, says = busy.check(1000, 2000, *original)
    assert status == 1 and "the rest differs: block 50 of the disk" in says
    (busy.where / "original").write_bytes(busy.rest)
    status, says = busy.check(1000, 2000, *original)
    assert status == 0, says
    busy.rest += b"x"
    busy.size += 1
    status, says = busy.check(1000, 2000, *original)
    assert status == 1 and "the rest differs: the image has 262145 bytes" in says


def test_rest_with_holes(busy):
    """Between them, data that only one of the two has are found, wherever they are."""
    busy.rest = bytearray(4 << 20)
    busy.size = 1024
    for at, whose in ((0, "image"), (100, "original"), (700, "image"), (1023, "image"), (1023, "original")):
        busy.files()
        (busy.where / "image").unlink()
        for name in ("image", "original"):
            with open(busy.where / name, "wb") as f:
                f.truncate(4 << 20)
                for block, place in enumerate(PLACES if name == "image" else []):
                    f.seek(place * BLOCK)
                    f.write(busy.content[block])
                if name == whose:
                    f.seek(at * BLOCK + 77)
                    f.write(b"x")
        status, says = check(busy.where, 1000, 2000, "--rest", busy.where / "original")
        assert status == 1 and f"block {at} of the disk" in says, (at, whose, says)


# Cannot be decided.


def test_log_cut_short(busy):
    """Of each length: never accepted, even though what it lacks might be harmless."""
    whole = 32 * (1 + len(busy.records))
    for busy.cut in range(whole):
        status, says = busy.check(1000, 2000)
        assert status in (1, 2), (busy.cut, says)
    busy.cut = whole
    busy.one_instant(1000, 2000, 1000, 1550)


def test_log_that_ends_with_the_window(case):
    case.write(0, 1400, 1500)
    case.mark(2000)
    case.cannot("it ends before the window does")
    case.mark(2001)
    case.one_instant(1000, 2000, 1000, 1500)


def test_two_writes_of_a_block_at_once(case):
    case.write(0, 100, 300)
    case.write(0, 200, 400)
    case.mark(9000)
    case.holds(0, 2)
    case.cannot("block 0 had the writes 1 and 2 under way at once")


def test_write_after_one_that_was_never_acknowledged(case):
    case.write(0, 100, 0)
    case.write(0, 200, 400)
    case.mark(9000)
    case.holds(0, 2)
    case.cannot("block 0 had the writes 1 and 2 under way at once")


@pytest.mark.parametrize("records, text", [
    ([(2, 0, 100, 200)], "record 1 has the sequence 2"),
    ([(1, 0, 100, 200), (2, 1, 90, 200)], "record 2 was submitted before the one before it"),
    ([(1, 0, 100, 99)], "write 1 was acknowledged before it was submitted"),
    ([(1, BLOCKS, 100, 200)], f"write 1 is to block {BLOCKS} of {BLOCKS}"),
])
def test_log_that_contradicts_itself(case, records, text):
    case.records = records
    case.records.append((len(records) + 1, MARK, 9000, 9000))
    case.cannot(text)


@pytest.mark.parametrize("head", [
    bytes(32),
    b"CAIRNLOG" + struct.pack("=IIQQ", 2, 32, BLOCKS, 0),
    b"CAIRNLOG" + struct.pack("=IIQQ", 1, 40, BLOCKS, 0),
    b"CAIRNLOG" + struct.pack("=IIQQ", 1, 32, BLOCKS + 1, 0),
])
def test_log_of_something_else(busy, head):
    busy.head = head
    busy.cannot("it is ")


@pytest.mark.parametrize("text", ["", "1\n2\nx\n", "40\n41\n3\n9\n8\n7\n20\n63\n5\n"])
def test_list_of_something_else(busy, text):
    busy.files()
    (busy.where / "list").write_text(text)
    status, says = check(busy.where, 1000, 2000)
    assert status == 2 and "cannot decide: " in says


def test_usage(busy):
    busy.files()
    for words in ([], ["--window", "1000"], ["--window", "2000", "1000"], ["--window", "x", "1"], ["--what", "1"]):
        ended = subprocess.run(
            [CHECKER, "--log", busy.where / "log", "--list", busy.where / "list", *words, busy.where / "image"],
            capture_output=True, text=True, timeout=60, check=False,
        )
        assert ended.returncode == 2 and "usage: " in ended.stderr, words
    (busy.where / "image").unlink()
    status, says = check(busy.where, 1000, 2000)
    assert status == 2 and "No such file" in says


# Images of one instant at random, and what ./demo makes of them.


def test_random_histories(tmp_path):
    """Whatever a writer does: the disk as it is at an instant is accepted; a version too old or too new is not."""
    for seed in range(20):
        rng = random.Random(seed)
        case = Case(tmp_path)
        free = [0] * BLOCKS  # when a block's write was acknowledged
        now = 10
        for _ in range(200):
            now += rng.randrange(10)
            block = rng.randrange(BLOCKS)
            if free[block] < now:
                free[block] = now + rng.randrange(1, 60)
                case.write(block, now, free[block])
        case.mark(9000)
        instant = rng.randrange(20, now)
        for block in range(BLOCKS):
            past = [0] + [r[0] for r in case.records if r[1] == block and r[2] <= instant]
            if len(past) > 1 and case.records[past[-1] - 1][3] >= instant and rng.random() < 0.5:
                past.pop()  # under way, and not yet to be seen
            case.holds(block, past[-1])
        status, says = case.check(1, 8000)
        assert status == 0, (seed, says)
        low, high = (float(t) * 1000 + 1 for t in re.search(r"between (\S+) us and (\S+) us", says).groups())
        assert low - 60 <= instant <= high + 60, (seed, says)
        status, says = case.check(instant, instant)
        assert status == 0, (seed, says)

        right = list(case.content)
        for record in rng.sample(case.records[:-1], 30):
            case.content = list(right)
            case.holds(record[1], record[0])
            after = [r for r in case.records if r[1] == record[1] and r[0] > record[0]]
            may = record[2] <= instant and (not after or instant <= after[0][3])
            assert case.check(instant, instant)[0] == (0 if may else 1), (seed, record)


def demo_points(tmp_path):
    """Three images of one disk, as case objects; the windows are [1000, 1010], [2000, 2010], [3000, 3010]."""
    windows, images = [], []
    case = Case(tmp_path)
    now = 100
    for begin in (1000, 2000, 3000):
        last = [0] * BLOCKS
        while now < begin - 100:
            block = (now // 10) * 5 % BLOCKS
            last[block] = case.write(block, now, now + 9)
            now += 10
        for block in range(BLOCKS):
            if last[block]:
                case.holds(block, last[block])
        case.files()
        images.append(tmp_path / f"image{begin}")
        (tmp_path / "image").rename(images[-1])
        windows.append((begin, begin + 10))
        now = begin + 20
    case.mark(9000)
    case.files()
    return windows, [image.name for image in images]


def test_spoiled_images(tmp_path):
    """What ./demo makes of its points so that the checker must refuse them."""
    windows, names = demo_points(tmp_path)
    places = spoil.read_list(tmp_path / "list")
    assert places == PLACES
    for name, (begin, end) in zip(names, windows):
        assert check(tmp_path, begin, end, image=name)[0] == 0
    middle = tmp_path / names[1]
    copy = tmp_path / "copy"
    spoil.copy_blocks(middle, copy, places)
    assert check(tmp_path, *windows[1], image="copy")[0] == 0
    for other in (names[0], names[2]):
        block = spoil.exchange(places, middle, tmp_path / other)
        spoil.copy_blocks(tmp_path / other, copy, [places[block]])
        status, says = check(tmp_path, *windows[1], image="copy")
        assert status == 1 and f"block {block} " in says, says
        spoil.copy_blocks(middle, copy, [places[block]])
        assert check(tmp_path, *windows[1], image="copy")[0] == 0
    spoil.mixed(places, tmp_path / names[0], middle, tmp_path / "mixed")
    status, says = check(tmp_path, windows[0][0], windows[1][1], image="mixed")
    assert status == 1 and "no instant" in says, says
    with pytest.raises(ValueError):
        spoil.exchange(places, middle, middle)


# The writer.


class Writer:
    def __init__(self, daemon, where, *more):
        self.process = subprocess.Popen(
            [WRITER, "--unix", daemon.path, "--export", "d", "--list", where / "list", "--log", where / "log", *more],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )

    def say(self, line):
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


@pytest.mark.parametrize("more", [(), ("--rate", "20000", "--depth", "4")])
def test_writer_and_checker(tmp_path, more):
    blocks = 256
    subprocess.run([WRITER, "--init", tmp_path / "file", str(blocks)], check=True)
    first = (tmp_path / "file").read_bytes()
    places = [block * 3 % blocks for block in range(blocks)]
    (tmp_path / "list").write_text("".join(f"{place}\n" for place in places))
    disk = tmp_path / "disk"
    with open(disk, "wb") as f:
        f.truncate(blocks * BLOCK)
        for block, place in enumerate(places):
            f.seek(place * BLOCK)
            f.write(first[block * BLOCK:(block + 1) * BLOCK])
    with Daemon() as daemon:
        daemon.add("d", disk)
        writer = Writer(daemon, tmp_path, *more)
        while writer.say("status")["acknowledged"] < 2000:
            time.sleep(0.01)
        figures = writer.say("phase two")
        assert figures["phase"] == "start" and figures["writes"] >= 2000
        assert 0 < figures["p50_us"] <= figures["p99_us"] <= figures["max_us"]
        paused = writer.say("pause")
        assert paused["submitted"] == paused["acknowledged"]
        begin = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        (tmp_path / "point").write_bytes(disk.read_bytes())
        end = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        assert check(tmp_path, begin, end, image="point")[0] == 2  # nothing says yet that it stayed so
        writer.say("resume")
        while writer.say("status")["acknowledged"] < paused["acknowledged"] + 2000:
            time.sleep(0.01)
        status, says = check(tmp_path, begin, end, image="point")
        assert status == 0 and " 0 under way" in says, says
        now = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        time.sleep(0.01)
        status, says = check(tmp_path, now, now + 1000, image="point")
        assert status == 1 and "still holds" in says, says
        assert writer.say("stop")["phase"] == "two"
        assert writer.process.wait(10) == 0
    assert check(tmp_path, begin, end, image="point")[0] == 0


def test_writer_refuses(tmp_path):
    (tmp_path / "list").write_text("0\n9999\n")
    (tmp_path / "none").write_text("")
    with open(tmp_path / "disk", "wb") as f:
        f.truncate(1 << 20)
    with Daemon() as daemon:
        daemon.add("d", tmp_path / "disk")
        for name, more, text in [
            ("list", [], "lies beyond the disk's end"), ("none", [], "no number of a block"), ("gone", [], "cannot open"),
            ("list", ["--rate", "x"], "cannot use '--rate'"), ("list", ["--depth", "0"], "usage"),
            ("list", ["--seed"], "cannot use '--seed'"),
        ]:
            ended = subprocess.run(
                [WRITER, "--unix", daemon.path, "--export", "d", "--list", tmp_path / name, "--log", tmp_path / "log",
                 *more], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False)
            assert ended.returncode in (1, 2) and text in ended.stderr, (name, more, ended.stderr)
            (tmp_path / "log").unlink(missing_ok=True)


# The relay, which measures the window.


def test_scanner_of_messages_in_pieces():
    text = '{"execute": "a", "x": "\u00e9}{"}\r\n {"b": [1]}{"c": 2}'.encode()
    for size in (1, 2, 3, len(text)):
        scanner = relay.Scanner()
        got = [m for at in range(0, len(text), size) for m in scanner.feed(text[at:at + size])]
        assert got == [{"execute": "a", "x": "\u00e9}{"}, {"b": [1]}, {"c": 2}], size


def test_relay_sees_backup_commands(tmp_path):
    for name in ("d", "t"):
        with open(tmp_path / name, "wb") as f:
            f.truncate(1 << 20)
    with Daemon() as daemon:
        daemon.add("d", tmp_path / "d")
        daemon.qmp("blockdev-add", driver="file", node_name="t", filename=str(tmp_path / "t"))
        between = relay.Relay(os.path.join(daemon.dir, "relay"), daemon.qmp_path)
        backup = {"device": "d", "target": "t", "sync": "full"}
        q, other = Qmp(os.path.join(daemon.dir, "relay")), Qmp(os.path.join(daemon.dir, "relay"))
        q("query-jobs")
        other("query-named-block-nodes")
        assert between.windows == []
        with pytest.raises(QmpError):
            q("blockdev-backup", job_id="a", **{**backup, "target": "none"})
        assert between.windows == []
        for i in range(2):
            begin = relay.now_ns()
            if i:
                other("transaction", actions=[{"type": "blockdev-backup", "data": {**backup, "job-id": "c"}}])
            else:
                q("blockdev-backup", job_id="b", **backup)
            end = relay.now_ns()
            assert len(between.windows) == i + 1
            assert begin < between.windows[i][0] < between.windows[i][1] < end
            (other if i else q).wait_event("JOB_STATUS_CHANGE", status="null", id="bc"[i])
        q("blockdev-del", node_name="t")
        q.close()
        other.close()
