# SPDX-License-Identifier: Apache-2.0
"""`cairn io` under the name qemu-io beside the peer: both run the same commands on copies of the same images. Output, exit status and
what is on the disk afterwards are the same; messages of errors are each program's own."""
import difflib
import os
import random
import re
import shutil
import subprocess

import pytest
from image_support import PATIENCE, need_peer, program, run

need_peer()

PEER = shutil.which("qemu-io")
SIZE = 4 << 20

OFFSETS = "0 512 100 64k 65530 0x200 1M 1.5M 4194303 4M 5M 3.5k".split()
LENGTHS = "512 1 0 4k 64k 100 65536 0x400 128k 1M 200k".split()
WRONG = "abc 1kk 0x 1e3 99999999999999999999 9E 3G -1 1.5".split()
PATTERNS = "0 1 0xff 255 0xcd 17".split()
WRONG_PATTERNS = "256 -1 1x abc 0x".split()

NUMBERS = re.compile(r"; [0-9:.]+( sec)? \([0-9.]+ \w+/sec and [0-9.]+ ops/sec\)")
MACHINE = re.compile(r"^(\d+),1,\d+:\d\d:\d\d\.\d\d,[0-9.]+,[0-9.]+$", re.M)


def without_times(text):
    return MACHINE.sub(r"\1,1,T", NUMBERS.sub("; T", text))


class Pair:
    """Two directories with the same images: in one the peer works, in the other we do."""

    def __init__(self, directory, images):
        self.link = os.path.join(directory, "bin", "qemu-io")
        os.mkdir(os.path.dirname(self.link))
        os.symlink(program(), self.link)
        self.sides = [(PEER, os.path.join(directory, "peer")), (self.link, os.path.join(directory, "ours"))]
        for _, where in self.sides:
            shutil.copytree(images, where)
            os.mkdir(os.path.join(where, "tmp"))
        self.temporary = os.path.join(self.sides[1][1], "tmp")

    @staticmethod
    def result(side, commands, image, options, text=""):
        io, where = side
        words = [w for c in commands for w in ("-c", c)]
        done = subprocess.run([io, *options, *words, *([image] if image else [])], cwd=where, input=text.encode(),
                              env={**os.environ, "TMPDIR": os.path.join(where, "tmp")}, capture_output=True, timeout=PATIENCE,
                              check=False)
        return done.returncode, without_times(done.stdout.decode()), done.stderr.decode()

    def same(self, *commands, image="a.qcow2", options=(), text="", any_order=False):
        peer, ours = (self.result(side, commands, image, options, text) for side in self.sides)
        lines = [sorted(r[1].splitlines()) if any_order else r[1].splitlines() for r in (peer, ours)]
        changed = "\n".join(difflib.unified_diff(*lines, "peer", "ours", lineterm="", n=1))
        context = "\n".join([changed, *commands, image or "", *options, peer[2], ours[2]])
        assert lines[0] == lines[1] and ours[0] == peer[0] and bool(ours[2]) == bool(peer[2]), context
        return ours

    def ours(self, *commands, image="a.qcow2", options=()):
        return self.result(self.sides[1], commands, image, options)

    def same_disks(self, *images):
        (_, peer), (_, ours) = self.sides
        for image in images or ("a.qcow2", "b.qcow2", "r.raw", "odd.raw"):
            run("qemu-img", "compare", "-q", os.path.join(peer, image), os.path.join(ours, image))
            if image.endswith(".qcow2"):
                run("qemu-img", "check", "-q", os.path.join(ours, image))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    where = str(tmp_path_factory.mktemp("images"))
    create = ["qemu-img", "create", "-q", "-f", "qcow2"]
    run(*create, "a.qcow2", str(SIZE), cwd=where)
    run(*create, "base.qcow2", str(SIZE - (1 << 20)), cwd=where)
    run(PEER, "-f", "qcow2", "-c", "write -P 7 0 1M", "-c", "write -P 8 2M 64k", "base.qcow2", cwd=where)
    run(*create, "-F", "qcow2", "-b", "base.qcow2", "b.qcow2", str(SIZE), cwd=where)
    for name, size in (("r.raw", SIZE), ("odd.raw", 1000000), ("empty", 0)):
        with open(os.path.join(where, name), "wb") as f:
            f.truncate(size)
    with open(os.path.join(where, "pattern"), "wb") as f:
        f.write(b"abc")
    return where


@pytest.fixture
def pair(tmp_path, images):  # pylint: disable=redefined-outer-name
    return Pair(str(tmp_path), images)


def maybe(rng, text, one_in=4):
    return text if rng.randrange(one_in) == 0 else ""


def number(rng, words):
    return rng.choice(WRONG) if rng.randrange(20) == 0 else rng.choice(words)


def pattern(rng):
    return "-P " + (rng.choice(WRONG_PATTERNS) if rng.randrange(20) == 0 else rng.choice(PATTERNS))


def one_read(rng):
    words = ["read", maybe(rng, "-C"), maybe(rng, "-q"), maybe(rng, "-v", 12)]
    if rng.randrange(2):
        words += [pattern(rng), maybe(rng, "-s " + number(rng, LENGTHS)), maybe(rng, "-l " + number(rng, LENGTHS))]
    length = "100" if "-v" in words else number(rng, LENGTHS)
    return words + [number(rng, OFFSETS), length]


def one_write(rng):
    kind = rng.randrange(4)
    words = ["write", maybe(rng, "-C"), maybe(rng, "-q"), maybe(rng, "-f")]
    if kind == 0:
        words += ["-z", maybe(rng, "-u", 2)]
    elif kind == 1:
        words += ["-s", rng.choice(["pattern"] * 6 + ["empty", "nowhere"])]
    elif kind == 2:
        words += [pattern(rng), maybe(rng, "-u", 10), maybe(rng, "-n", 10), maybe(rng, "-z", 10)]
    lengths = LENGTHS if kind != 1 else [LENGTHS[0], LENGTHS[3]]  # nothing of a file is an error of the peer's
    return words + [number(rng, OFFSETS), number(rng, lengths)]


def one_vector(rng):
    words = [rng.choice(["readv", "writev"]), maybe(rng, "-C"), maybe(rng, "-q"), maybe(rng, pattern(rng), 2)]
    return words + [number(rng, OFFSETS)] + [number(rng, LENGTHS) for _ in range(rng.randrange(4))]


def one_other(rng, backed):
    choices = [["discard", maybe(rng, "-C"), maybe(rng, "-q"), number(rng, OFFSETS), number(rng, LENGTHS)],
               ["flush"], ["length"], ["info"], ["aio_flush"], ["sleep", "1"], ["sleep", "1x"], ["close", "again"],
               ["nothing"], [], ["help", "nothing"], ["help", "length"], ["read", "-x"], ["write", "1"],
               ["truncate", rng.choice(["4M", "4.5M", "3.5M", "4000000000000000000000", "x"])],
               ["reopen", rng.choice(["-r", "-w", "-c none", "-c writeback", "-c x", "-r -w"])]]
    if backed:  # elsewhere what reads as zeroes is not allocated here, if nothing needs it
        choices += [["alloc", number(rng, OFFSETS), maybe(rng, number(rng, LENGTHS), 2)], ["map"]]
    return rng.choice(choices)


def one_command(rng, backed):
    make = rng.choice([one_read, one_read, one_write, one_write, one_write, one_vector, None])
    return " ".join(w for w in (make(rng) if make else one_other(rng, backed)) if w)


@pytest.mark.parametrize("image,fmt", [("a.qcow2", "qcow2"), ("b.qcow2", "qcow2"), ("r.raw", "raw"), ("odd.raw", "raw")])
def test_generated_scripts_do_the_same(pair, image, fmt):
    for seed in range(8):
        rng = random.Random(f"{image} {seed}")
        commands = [one_command(rng, image == "b.qcow2") for _ in range(20)]
        options = ["-f", fmt, *rng.choice([[], [], ["-t", "writeback"], ["-d", "ignore"], ["-r"], ["-n"] if "odd" not in image else []])]
        pair.same(*commands, image=image, options=options)
        pair.same_disks(image)


@pytest.mark.parametrize("image", ["a.qcow2", "b.qcow2"])
def test_requests_that_nobody_waits_for(pair, image):
    """Their results come in any order, and all come before the end."""
    for seed in range(8):
        rng = random.Random(f"{image} {seed}")
        places = list(range(0, SIZE, 128 << 10))
        rng.shuffle(places)
        commands = []
        for at in places[:10]:
            what = rng.choice(["aio_read", "aio_write -P 5", "aio_write", "aio_write -f", "aio_read -P 7", "aio_read -i",
                               "aio_write -i", "aio_read -q", "aio_write -C"])
            commands.append(f"{what} {at} {rng.choice(LENGTHS)} {rng.choice(['', '512 1k'])}")
        commands.insert(5, "aio_flush")
        pair.same(*commands, any_order=True, image=image)
        pair.same_disks(image)


def test_their_results_do_not_fail_the_command(pair):
    pair.same("aio_read 5M 512", "aio_write 5M 512", "aio_read -P 1 0 512", "aio_flush", any_order=True)
    pair.same("aio_read -v 0 40", "length", "aio_flush")
    pair.same("aio_write -z 0 64k 64k")
    pair.same("aio_write -u 0 64k")
    pair.same("aio_write -P 300 0 64k")
    pair.same("aio_read -x 0 64k")
    pair.same("aio_write -z 0 3G", "aio_flush")
    assert pair.ours("aio_write -z 1M 64k", "aio_write -zu 3M 64k", "aio_flush")[0] == 0  # the peer's times are wrong


@pytest.mark.parametrize("commands", [
    ["open a.qcow2", "length", "open a.qcow2", "close", "length", "close"],
    ["open nowhere", "length"], ["open"], ["open -r"], ["open -r a.qcow2", "write 0 512", "read 0 512"], ["open a.qcow2 b"],
    ["open -t x a.qcow2", "length"], ["open -d x a.qcow2"], ["open -x a.qcow2"], ["open -r -U a.qcow2", "length"],
    ["open -U a.qcow2", "length"], ["open -n -t writeback -d unmap a.qcow2", "write 0 512"],
    ["open -o driver=qcow2 a.qcow2", "length"], ["open -o driver=qcow2,file.filename=a.qcow2", "info"],
    ["open -o driver=qcow2 -o file.filename=a.qcow2", "info"], ["open -o driver=raw r.raw", "map", "alloc 0 1M", "info"],
    ["open -o nothing=1 a.qcow2", "length"], ["quit", "length"], ["quit now"], ["nothing", "quit"], ["", "  ", " length "],
    ["help", "?"], ["sigraise x", "sigraise 9999"], ["sleep x"], ["sleep"], ["truncate -m x 1M"], ["flush now"], ["alloc"], ["alloc 1 2 3"],
    ["write 0 512", "discard 0 1", "truncate 1", "aio_write 0 1", "flush", "length"],
    ["l", "r 0 512", "open a.qcow2", "l", "r 0 512", "w 0 512", "d 0 512", "a 0", "f", "t 5M", "i", "c", "q", "l"],
])
def test_commands_without_an_image(pair, commands):
    pair.same(*commands, image=None)


@pytest.mark.parametrize("options,image", [
    ([], "nowhere"), (["-f", "x"], "a.qcow2"), (["-f", "qcow2"], "r.raw"), (["-f", "qcow2", "--image-opts"], "a.qcow2"),
    (["--image-opts"], "driver=qcow2,file.filename=a.qcow2"), (["-r"], "a.qcow2"), (["-t", "x"], "a.qcow2"),
    (["-d", "x"], "a.qcow2"), (["-U"], "a.qcow2"), (["-rU"], "a.qcow2"), (["-r", "--nocache", "--force-share"], "b.qcow2"),
    (["--format=raw", "--cache=directsync", "--discard=unmap", "--cmd=info"], "r.raw"),
])
def test_the_command_line(pair, options, image):
    pair.same("length", "map", "write -q 0 512", image=image, options=options)


@pytest.mark.parametrize("text", ["", "\n\n", "length\n", "length", "length\nquit\nlength\n", "read 5M 1\nquit\n", "nothing\n",
                                  "aio_read 0 512\n", "aio_write 0 512\nquit\n", "close\nopen a.qcow2\nread -v 0 20\n"])
def test_standard_input(pair, text):
    pair.same(text=text)


def test_a_dump_shows_all_bytes(pair):
    (_, peer), (_, ours) = pair.sides
    for where in peer, ours:
        with open(os.path.join(where, "all"), "wb") as f:
            f.write(bytes(range(256)))
    pair.same("readv 0" + " 1" * 1024, "readv 0" + " 1" * 1025, "writev 1" + " 1" * 1024)
    assert pair.ours("readv 0" + " 1" * 5000)[0] == 0  # the peer's fails
    pair.same("write -q -s all 1000 300", "read -v 990 310", "readv -v 1001 5 0 12")


def test_sizes_are_said_as_the_peer_says_them(pair):
    for size in "0 1 511 512 1000 1023 1024 1025 1536 1048575 1048576 12345678 1025024 1073741823 10G 1T 1.25T".split():
        pair.same(f"truncate {size}", "length", "map", "info", image="r.raw", options=["-f", "raw"])


def test_compressed_clusters(pair):
    pair.same("write -c -P 1 0 64k", "write -c -P 2 1M 128k", "write -c 100 64k", "write -c 0 100", "write -c 512 512",
              "write -c -f 0 64k", "write -c 4M 64k", "read -P 1 0 64k", "read -P 2 1M 128k")
    pair.same_disks("a.qcow2")
    pair.same("write -c 0 64k", image="r.raw", options=["-f", "raw"])
    # the peer refuses to write over what is there
    assert pair.ours("write -c -P 3 0 64k", "read -P 3 0 64k")[0] == 0


@pytest.mark.parametrize("options,survives", [([], True), (["-t", "writethrough"], True), (["-t", "writeback"], False)])
def test_what_survives_the_end_of_the_program(pair, options, survives):
    """Writes are durable by default."""
    (_, _), (io, where) = pair.sides
    for command in "abort", "sigraise 9":
        run("qemu-img", "create", "-q", "-f", "qcow2", "a.qcow2", "1M", cwd=where)
        done = run(io, *options, "-c", "write -P 5 0 64k", "-c", command, "-c", "length", "a.qcow2", cwd=where, ok=None)
        assert done.returncode < 0 and "wrote 65536/65536" in done.stdout and "MiB\n" not in done.stdout.splitlines()[-1]
        assert run(PEER, "-r", "-c", f"read -P {5 if survives else 0} 0 64k", "a.qcow2", cwd=where)


@pytest.mark.parametrize("image,fmt", [("b.qcow2", "qcow2"), ("r.raw", "raw"), ("odd.raw", "raw")])
def test_a_temporary_snapshot(pair, image, fmt):
    commands = ["write -P 9 0 64k", "write -z 128k 1000", "discard 192k 64k", "read -P 9 0 64k", "read -P 0 128k 1000", "length",
                "read -P 5 900000 10"]
    for options in [], ["-r"]:
        pair.same(*commands, image=image, options=["-s", "-f", fmt, *options])
    pair.same(f"open -s -o driver={fmt} {image}", *commands, "close", f"open -r {image}", "read -P 9 0 64k", image=None)
    pair.same("map", "alloc 0 1M", image="b.qcow2", options=["-s"])
    pair.same_disks()
    status, _, message = pair.ours("truncate 1M", image=image, options=["-s", "-f", fmt])
    assert status == 1 and "keeps its size" in message
    assert not os.listdir(pair.temporary)


def test_a_file_that_ends_within_a_sector(pair):
    pair.same("read 999990 10", "read -P 0 1000000 10", "read 999424 1024", "read 1000448 1", "length", "write 999936 64",
              "write 999936 128", "length", image="odd.raw", options=["-f", "raw"])
    pair.same_disks("odd.raw")


SUSPENDED = [
    ["break write_aio A", "aio_write 0 512", "wait_break A", "resume A", "aio_flush"],
    ["break write_aio A", "aio_write 0 512", "wait_break A", "remove_break A", "aio_flush"],
    ["break write_aio A", "aio_write 0 512", "wait_break A", "remove_break A", "remove_break A", "resume A", "close"],
    ["break write_aio A", "break write_aio B", "aio_write 0 512", "wait_break A", "resume A", "wait_break B", "resume B",
     "aio_flush"],
    ["break write_aio A", "aio_write 0 512", "aio_write 64k 512", "wait_break A", "resume A", "aio_flush"],
    ["break write_aio A", "remove_break A", "remove_break A", "aio_write -q 0 512", "aio_flush", "read -P 0xcd 0 512"],
    ["break nothing A"], ["resume A"], ["remove_break A"], ["break write_aio"], ["wait_break"], ["break a b c"],
    ["write -q 0 64k", "break read_aio A", "aio_read -P 0xcd 0 512", "wait_break A", "resume A", "aio_flush"],
    ["break cow_write A", "aio_write -P 5 512 512", "wait_break A", "write -q -P 6 1M 64k", "read -P 7 512 512", "resume A",
     "aio_flush", "read -P 5 512 512", "read -P 6 1M 64k", "read -P 7 1024 512"],
    ["info", "length", "map"],
]


@pytest.mark.parametrize("commands", SUSPENDED)
def test_suspended_requests(pair, commands):
    pair.same(*commands, image="blkdebug::b.qcow2", any_order=sum("aio_" in c for c in commands) > 2)
    pair.same_disks("b.qcow2")


# The peer waits for ever.
ENDS = [["quit"], [], ["aio_flush"], ["close"], ["truncate 5M", "length"], ["flush"], ["reopen -r", "read -P 0xcd 0 512"],
        ["discard 1M 64k", "write -q 2M 64k"]]


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("options", [[], ["-t", "writeback"]])
def test_nothing_waits_for_a_suspended_request(pair, end, options):
    status, output, message = pair.ours("break write_aio A", "aio_write 0 512", "wait_break A", *end, image="blkdebug::a.qcow2",
                                        options=options)
    assert (status, message) == (0, "")
    assert output.startswith("blkdebug: Suspended request 'A'\n") and "blkdebug: Resuming request 'A'\n" in output
    assert "wrote 512/512 bytes at offset 0\n" in output
    run("qemu-img", "check", "-q", os.path.join(pair.sides[1][1], "a.qcow2"))


EVENTS = [
    ("read_aio", ["write -q 0 64k"], "aio_read 0 512"), ("read_backing_aio", [], "aio_read 0 512"),
    ("read_compressed", ["write -q -c 0 64k"], "aio_read 0 512"), ("write_aio", [], "aio_write 0 64k"),
    ("cow_read", [], "aio_write 512 512"), ("cow_write", [], "aio_write 512 512"), ("l2_load", [], "aio_read 3M 512"),
    ("l2_alloc_write", [], "aio_write 0 512"), ("cluster_alloc", [], "aio_write 0 512"),
    ("refblock_update_part", [], "aio_write 0 512"), ("cluster_free", ["write -q 0 64k"], "aio_write -zu 0 64k"),
    ("flush_to_os", [], "aio_write -f 0 512"), ("flush_to_disk", [], "aio_write -f 0 512"), ("l2_update", [], "aio_write -f 0 512"),
    ("l1_update", [], "aio_write -f 0 512"), ("pwritev", [], "aio_write 0 512"), ("pwritev_done", [], "aio_write 0 512"),
]


@pytest.mark.parametrize("event,before,request_", EVENTS)
def test_events(pair, event, before, request_):
    """Each of them stops the request that comes there, and it ends as it should when it goes on."""
    image = "driver=qcow2,file.driver=fault,file.image.filename=b.qcow2"
    _, where = pair.sides[1]
    run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", "base.qcow2", "b.qcow2", "4M", cwd=where)
    if event == "l2_load":
        run(PEER, "-c", "write -q 3M 512", "b.qcow2", cwd=where)
    if before:  # in a process of its own, so that nothing is cached
        run(PEER, "-f", "qcow2", *[w for c in before for w in ("-c", c)], "b.qcow2", cwd=where)
    status, output, message = pair.ours(f"break {event} E", request_, "wait_break E", "resume E", "aio_flush", image=image,
                                        options=["--image-opts", "-t", "writeback"])
    assert (status, message) == (0, "") and "Suspended request 'E'\nblkdebug: Resuming request 'E'\n" in output
    assert re.search(r"(read|wrote) \d+/\d+ bytes", output)
    run("qemu-img", "check", "-q", os.path.join(where, "b.qcow2"))


@pytest.mark.parametrize("commands,what", [
    (["wait_break A"], "no breakpoint 'A'"), (["break write_aio A", "wait_break A"], "no request is under way"),
    (["break l2_update A", "aio_read 0 512", "wait_break A"], "no request is under way"),
    (["break vmstate_load A"], "does not happen here"),
])
def test_what_would_wait_for_ever(pair, commands, what):
    status, _, message = pair.ours(*commands, image="blkdebug::a.qcow2")
    assert status == 1 and what in message


def test_a_command_that_waits_is_not_suspended(pair):
    status, output, _ = pair.ours("break write_aio A", "write -P 3 0 512", "read -P 3 0 512", "aio_write 0 512", "wait_break A",
                                  image="blkdebug::a.qcow2", options=["-t", "writeback"])
    assert status == 0 and output.index("wrote") < output.index("Suspended")


@pytest.mark.parametrize("image,options,what", [
    ("blkdebug:rules:a.qcow2", [], "rules of blkdebug"), ("blkdebug:a.qcow2", [], "blkdebug::NAME"),
    ("blkdebug::", [], "empty"), ("driver=qcow2,file.driver=blkdebug,file.image.filename=a.qcow2", ["--image-opts"], "fault"),
    ("driver=qcow2,file.driver=fault,file.image.filename=a.qcow2,file.config=x", ["--image-opts"], "rules"),
    ("driver=qcow2,file.driver=fault", ["--image-opts"], "image"),
])
def test_rules_are_refused(pair, image, options, what):
    status, _, message = pair.ours("length", image=image, options=options)
    assert status == 1 and what in message and len(message.splitlines()) == 1


def test_without_the_filter_there_are_no_breakpoints(pair):
    for command in "break write_aio A", "resume A", "remove_break A", "wait_break A":
        status, output, message = pair.ours(command)
        assert status == 1 and ("Operation not supported" in output or "no breakpoint" in message)


REFUSED = [
    (["read -b 0 512"], "state of a machine"), (["write -b 0 512"], "state of a machine"), (["zone_report 0 1"], "zoned"),
    (["reopen -o lazy-refcounts=on"], "-o lazy-refcounts=on"),
]


@pytest.mark.parametrize("commands,what", REFUSED)
def test_commands_that_are_refused(pair, commands, what):
    status, _, message = pair.ours(*commands)
    assert status == 1 and re.search(what, message) and len(message.splitlines()) == 1


@pytest.mark.parametrize("option", [["-C"], ["-m"], ["-k"], ["-i", "native"], ["-T", "x"],
                                    ["--object", "iothread,id=s"], ["-x"]])
def test_options_that_are_refused(pair, option):
    status, output, message = pair.ours("length", options=option)
    assert status == 1 and not output and option[0].strip("-") in message


def test_under_our_own_name(pair):
    (_, _), (_, where) = pair.sides
    done = run(program(), "io", "-c", "read -P 7 0 1M", "base.qcow2", cwd=where)
    assert "read 1048576/1048576 bytes at offset 0\n" in done.stdout
    done = run(program(), "io", "base.qcow2", cwd=where, input=b"read -P 8 0 1\n", ok=(1,))
    assert done.stdout.startswith("cairn io> Pattern verification failed at offset 0, 1 bytes\n")
    assert "aio_flush" in run(program(), "io", "-c", "help").stdout
    assert "cairn io" in run(program(), "help", "io").stdout
