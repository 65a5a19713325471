# SPDX-License-Identifier: Apache-2.0
"""Calls that scripts make by mistake or by habit: what they get is what the peer gives, and no disk is harmed."""
import json
import os
import signal
import subprocess
import time

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


@pytest.mark.parametrize("command", [
    ["convert", "-U", "df.qcow2", "df.raw"], ["convert", "-U", "-n", "df.qcow2", "df.raw"],
    ["convert", "-U", "-O", "qcow2", "-o", "data_file=base.raw", "base.raw", "new.qcow2"],
    ["convert", "-U", "-O", "qcow2", "-o", "data_file=base.raw", "top.qcow2", "new.qcow2"],
    ["convert", "-U", "-n", "--target-image-opts", "top.qcow2", "driver=raw,file.filename=base.raw"],
    ["convert", "-U", "-n", "--target-image-opts", "df.raw", "driver=qcow2,file.filename=df.qcow2"],
    ["dd", "-U", "if=base.raw", "of=base.raw"], ["dd", "-U", "if=top.qcow2", "of=base.raw"], ["dd", "-U", "if=df.qcow2", "of=df.raw"],
    ["create", "-f", "qcow2", "-o", "data_file=base.raw", "-b", "base.raw", "-F", "raw", "new.qcow2"],
])
def test_what_is_read_is_not_overwritten(tools, command):
    """-U takes no locks that would keep it."""
    tools.peer("create", "-q", "base.raw", "1M")
    tools.io("base.raw", "write -P 5 0 1M", fmt="raw")
    tools.peer("create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "top.qcow2")
    tools.peer("create", "-q", "-f", "qcow2", "-o", "data_file=df.raw", "df.qcow2", "1M")
    tools.io("df.qcow2", "write -P 6 0 1M")
    before = {name: content(tools.path(name)) for name in ("base.raw", "df.raw", "top.qcow2", "df.qcow2")}
    said = tools.ours(*command, ok=(1,)).stderr
    assert "is read from, and would be overwritten" in said or "cannot be the data file, too" in said
    assert {name: content(tools.path(name)) for name in before} == before


@pytest.mark.parametrize("command", [
    # -o: lists that are none, and help among other options; a size that is given twice, or is nothing
    ["create", "-f", "qcow2", "-o", "", "x", "1M"], ["create", "-f", "qcow2", "-o", "cluster_size=4k,", "x", "1M"],
    ["create", "-f", "qcow2", "-o", ",cluster_size=4k", "x", "1M"], ["convert", "-O", "qcow2", "-o", "", "r.raw", "x"],
    ["create", "-f", "qcow2", "-o", "size=1M", "x", "2M"], ["create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=n", "x", "2M"],
    ["resize", "-f", "raw", "--shrink", "r.raw", "0"], ["resize", "-f", "raw", "--shrink", "r.raw", "-1M"],
    ["resize", "-f", "raw", "--shrink", "r.raw", "-2M"], ["resize", "-f", "raw", "empty", "+0"], ["create", "nothing", "0"],
    # what is said by wrong calls is not that disks differ
    ["compare", "-T", "what", "r.raw", "q.qcow2"], ["compare", "--image-opts", "-f", "raw", "r.raw", "q.qcow2"],
    ["check", "-U", "-r", "all", "q.qcow2"], ["convert", "--bitmaps", "-O", "qcow2", "-o", "compat=0.10", "q.qcow2", "x"],
    # options of images
    ["info", "--image-opts", "driver=qcow2,file.filename=q.qcow2,what=1"], ["info", "json:{\"driver\":\"qcow2\",\"what\":1}"],
    ["info", "json:{\"driver\":\"qcow2\",\"file.driver\":\"file\",\"file.filename\":\"q.qcow2\"}"],
    ["info", "json:{\"file.filename\":\"q.qcow2\"}"], ["info", "file:a b:c"], ["info", "--output=json", "./a b:c"], ["map", "file:a b:c"], ["info", "a b:c"],
])
def test_what_the_peer_makes_of_it(tools, command):
    tools.peer("create", "-q", "r.raw", "1M")
    tools.peer("create", "-q", "empty", "0")
    tools.peer("create", "-q", "-f", "qcow2", "q.qcow2", "1M")
    tools.peer("create", "-q", "./a b:c", "64k")
    tools.peer("bitmap", "--add", "q.qcow2", "b")
    tools.same(*command)
    assert len(content(tools.path("r.raw"))) == 1 << 20


def test_options_of_an_image_change_what_it_is(tools):
    tools.peer("create", "-q", "r.raw", "4M")
    tools.io("r.raw", "write -P 3 1M 64k", fmt="raw")
    window = "driver=raw,offset=1M,size=2M,file.filename=r.raw"
    for command in (["info"], ["measure", "-O", "qcow2"]):
        size = [json.loads(tool(*command, "--output=json", "--image-opts", window).stdout) for tool in (tools.peer, tools.ours)]
        name = "virtual-size" if command == ["info"] else "required"
        assert size[0][name] == size[1][name]
    tree = '{"driver":"raw","offset":1048576,"file.filename":"r.raw"}'
    assert json.loads(tools.ours("info", "--output=json", f"json:{tree}").stdout)["virtual-size"] == 3 << 20
    twice = '{"file.filename":"r.raw","file":{"filename":"r.raw"}}'
    assert "given twice" in tools.ours("info", f"json:{twice}", ok=(1,)).stderr
    tools.ours("create", "-q", "-f", "qcow2", "-b", f"json:{tree}", "-F", "raw", "top.qcow2")
    assert json.loads(tools.peer("info", "--output=json", "top.qcow2").stdout)["virtual-size"] == 3 << 20


def test_raw_images_are_whole_sectors(tools):
    for size in ("1", "511", "513", "10b"):
        for tool, name in ((tools.peer, "peer.raw"), (tools.ours, "ours.raw")):
            tool("create", "-q", name, size)
        assert content(tools.path("ours.raw")) == content(tools.path("peer.raw"))
    for tool, name in ((tools.peer, "peer.raw"), (tools.ours, "ours.raw")):
        tool("dd", "bs=100", "count=3", "if=ours.raw", f"of={name}.part")
    assert content(tools.path("ours.raw.part")) == content(tools.path("peer.raw.part"))


def test_help_says_the_version_and_all_formats(tools):
    said = tools.ours("--help").stdout
    assert said.splitlines()[0].startswith("qemu-img version ") and " luks " in said.splitlines()[-1]
    for text in ("help", "?", "cluster_size=4k,help"):
        assert "Supported qcow2 options:" in tools.ours("create", "-f", "qcow2", "-o", text, "x", "1M").stdout


def test_an_image_that_another_program_writes(tools):
    """What its header says may change; -U looks all the same. A raw one is refused, too, where the peer reads it."""
    tools.peer("create", "-q", "-f", "qcow2", "q.qcow2", "1M")
    tools.peer("create", "-q", "-f", "qcow2", "-b", "q.qcow2", "-F", "qcow2", "top.qcow2")
    tools.peer("create", "-q", "r.raw", "1M")
    for name, fmt in (("q.qcow2", "qcow2"), ("r.raw", "raw")):
        with subprocess.Popen(["qemu-io", "-f", fmt, name], cwd=tools.directory, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
            holder.stdin.write(b"length\n")
            holder.stdin.flush()
            assert holder.stdout.readline()
            if fmt == "qcow2":
                for command in (["info"], ["info", "-U"], ["snapshot", "-l"], ["snapshot", "-U", "-l"], ["map"], ["measure", "-O", "qcow2"],
                                ["map", "-U"], ["check", "-q"]):
                    tools.same(*command, name)
                tools.same("info", "top.qcow2")
                tools.same("info", "--backing-chain", "top.qcow2")
                tools.same("create", "-q", "-f", "qcow2", "-b", name, "-F", fmt, "new.qcow2")
            else:
                tools.same("info", name)
                tools.ours("convert", name, "x.raw", ok=(1,))
                tools.ours("convert", "-U", name, "x.raw")
            holder.communicate(b"quit\n")


def test_signals_that_the_caller_ignores_stay_so(tools):
    """nohup: a copy goes on when the terminal is gone, and so does a server."""
    tools.peer("create", "-q", "r.raw", "20M")
    tools.io("r.raw", "write -P 5 0 20M", fmt="raw")

    def ignore():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    for words in (["convert", "-r", "16M", "r.raw", "x.raw"], ["nbd", "-f", "raw", "-k", "s", "r.raw"]):
        made = tools.path("x.raw" if words[0] == "convert" else "s")
        with subprocess.Popen([program(), *words], cwd=tools.directory, preexec_fn=ignore) as one:
            deadline = time.monotonic() + 20
            while not os.path.exists(made) and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(0.2)
            one.send_signal(signal.SIGHUP)
            if words[0] == "nbd":
                time.sleep(0.3)
                assert one.poll() is None
                one.send_signal(signal.SIGTERM)
            assert one.wait(60) == 0
    tools.equal("r.raw", "x.raw", "-f", "raw")
