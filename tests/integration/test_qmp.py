# SPDX-License-Identifier: Apache-2.0
"""The control sockets of cairnd: protocol, commands and their errors, hostile clients."""
import os
import re
import socket
import subprocess
import time

import pytest
from conftest import wait_until

MIB = 1 << 20


def raw_file(daemon, name="disk.raw", size=MIB):
    path = os.path.join(daemon.directory, name)
    with open(path, "wb") as f:
        f.truncate(size)
    return path


def nbd_path(daemon):
    return os.path.join(daemon.directory, "nbd.sock")


def serve(daemon, q, latency_ns=0, **options):
    """A node `n`, an NBD server and an export `e` of it; returns the URI."""
    q.command("blockdev-add", driver="null-co", node_name="n", size=MIB, latency_ns=latency_ns)
    q.command("nbd-server-start", addr={"type": "unix", "data": {"path": nbd_path(daemon)}})
    q.command("block-export-add", type="nbd", id="e", node_name="n", **options)
    return f"nbd+unix:///n?socket={nbd_path(daemon)}"


# The protocol.


def test_greets(daemon):
    greeting = daemon.qmp(negotiate=False).greeting
    assert set(greeting) == {"QMP"}
    assert greeting["QMP"]["version"]["qemu"] == {"major": 9, "minor": 0, "micro": 0}
    assert greeting["QMP"]["version"]["package"].startswith("Cairn ")
    assert greeting["QMP"]["capabilities"] == []


@pytest.mark.parametrize("request_text, error_class, part", [
    (b'{"execute": "query-version"}', "CommandNotFound", "negotiation"),
    (b'{"execute": "no-such"}', "CommandNotFound", "negotiation"),
    (b'{"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}}', "GenericError", "'oob' is not offered"),
    (b'{"execute": "qmp_capabilities", "arguments": {"enable": ["x"]}}', "GenericError", "'x' is not one of"),
    (b'{"execute": "qmp_capabilities", "arguments": {"x": 1}}', "GenericError", "arguments.x: unknown member"),
    (b'{"execute": ]}\n', "GenericError", "JSON"),
    (b'{"execute" 1}', "GenericError", "JSON"),
    (b'[1]', "GenericError", "must be a JSON object"),
    (b'7 ', "GenericError", "must be a JSON object"),
    (b'{"execute": "x", "frob": 1}', "GenericError", "'frob' is unexpected"),
    (b'{"arguments": {}}', "GenericError", "'execute' is missing"),
    (b'{"exec-oob": "x"}', "GenericError", "'exec-oob' is unexpected"),
    (b'{"execute": 1}', "GenericError", "'execute' must be a string"),
    (b'{"execute": "x", "arguments": 1}', "GenericError", "'arguments' must be an object"),
])
def test_refuses_before_negotiation(daemon, request_text, error_class, part):
    q = daemon.qmp(negotiate=False)
    q.send(request_text)
    error = q.answer()["error"]
    assert error["class"] == error_class
    assert part in error["desc"]
    assert q.command("qmp_capabilities") == {}  # the session lives on


@pytest.mark.parametrize("command, arguments, error_class, part", [
    ("qmp_capabilities", {}, "CommandNotFound", "already complete"),
    ("no-such", {}, "CommandNotFound", "'no-such' does not exist"),
    ("query-block", {"x": 1}, "GenericError", "arguments.x: unknown member"),
    ("blockdev-del", {}, "GenericError", "arguments.node-name: missing"),
    ("blockdev-del", {"node-name": 1}, "GenericError", "arguments.node-name: "),
    ("block-export-del", {"id": "e", "mode": "never"}, "GenericError", "'never' is not one of: safe, hard"),
    ("blockdev-add", {"driver": "nope", "node-name": "n"}, "GenericError", "arguments.driver: 'nope' is not one of"),
    ("blockdev-add", {"driver": "raw", "node-name": "n", "file": 1}, "GenericError", "arguments.file: "),
    ("block_resize", {"node-name": "n", "size": -1}, "GenericError", "arguments.size: -1"),
])
def test_refuses_after_negotiation(daemon, command, arguments, error_class, part):
    q = daemon.qmp()
    q.send({"execute": command, "arguments": arguments})
    error = q.answer()["error"]
    assert error["class"] == error_class
    assert part in error["desc"]


@pytest.mark.parametrize("value", [None, 0, 18446744073709551615, -1.5, "x", [], {}, [1, {"a": [None]}], "\u00e9\U0001f600"])
def test_echoes_the_id(daemon, value):
    q = daemon.qmp()
    q.send({"execute": "query-block", "id": value})
    assert q.answer() == {"return": [], "id": value}
    q.send({"execute": "no-such", "id": value})
    assert q.answer()["id"] == value
    q.send({"execute": "query-block"})
    assert "id" not in q.answer()


def test_describes_itself(daemon):
    q = daemon.qmp()
    names = {c["name"] for c in q.command("query-commands")}
    assert {"blockdev-add", "query-graph", "quit"} <= names
    entities = q.command("query-qmp-schema")
    assert {e["name"] for e in entities if e["meta-type"] == "command"} == names
    assert q.command("query-version") == q.greeting["QMP"]["version"]


def test_indents_when_asked(start, tmp_path):
    path = tmp_path / "pretty.sock"
    daemon = start("--chardev", f"socket,id=p,path={path},server=on,wait=off", "--monitor", "chardev=p,pretty=on")
    daemon.qmp()  # it answers when all is set up
    with socket.socket(socket.AF_UNIX) as s:
        s.settimeout(30)
        s.connect(str(path))
        text = s.recv(4096)
    assert text.startswith(b'{\n    "QMP": {\n') or text.startswith(b'{\r\n    "QMP": {'), text


# Nodes.


def test_adds_and_removes_nodes(daemon):
    q = daemon.qmp()
    path = raw_file(daemon)
    q.command("blockdev-add", driver="file", node_name="f", filename=path)
    q.command("blockdev-add", driver="raw", node_name="r", file="f", offset=4096)
    nodes = {n["node-name"]: n for n in q.command("query-named-block-nodes")}
    assert set(nodes) == {"f", "r"}
    assert nodes["f"]["image"]["virtual-size"] == MIB
    assert nodes["r"]["image"]["virtual-size"] == MIB - 4096
    assert nodes["r"]["file"] == nodes["f"]["file"] == path
    assert nodes["r"]["drv"] == "raw" and not nodes["r"]["ro"]
    assert "'f' is in use by node 'r'" in q.refused("blockdev-del", node_name="f")["desc"]
    q.command("blockdev-del", node_name="r")
    q.command("blockdev-del", node_name="f")
    assert q.command("query-named-block-nodes") == []


def test_inline_children_go_with_their_parent(daemon):
    q = daemon.qmp()
    path = raw_file(daemon)
    q.command("blockdev-add", driver="raw", node_name="r", file={"driver": "file", "filename": path})
    nodes = [n["node-name"] for n in q.command("query-named-block-nodes")]
    assert len(nodes) == 2 and "r" in nodes
    child = next(n for n in nodes if n != "r")
    assert child.startswith("#block")
    assert "in use" in q.refused("blockdev-del", node_name=child)["desc"]
    q.command("blockdev-del", node_name="r")
    assert q.command("query-named-block-nodes") == []


@pytest.mark.parametrize("arguments, part", [
    ({"driver": "null-co"}, "node-name"),
    ({"driver": "null-co", "node-name": "taken"}, "there is a node 'taken' already"),
    ({"driver": "null-co", "node-name": "1x"}, "arguments.node-name: '1x'"),
    ({"driver": "null-co", "node-name": "x" * 32}, "arguments.node-name: "),
    ({"driver": "null-co", "node-name": "n", "size": 1 << 63}, "arguments.size: "),
    ({"driver": "file", "node-name": "n"}, "arguments.filename: missing"),
    ({"driver": "file", "node-name": "n", "filename": "/no/such/file"}, "'/no/such/file'"),
    ({"driver": "file", "node-name": "n", "filename": "/"}, "'/'"),
    ({"driver": "file", "node-name": "n", "filename": "x", "aio": "native"}, "arguments.aio: "),
    ({"driver": "host_device", "node-name": "n", "filename": "/etc/passwd"}, "'/etc/passwd'"),
    ({"driver": "raw", "node-name": "n", "file": "nobody"}, "there is no node 'nobody'"),
    ({"driver": "raw", "node-name": "n", "file": {"driver": "null-co"}, "offset": 1 << 50}, "offset"),
    ({"driver": "null-co", "node-name": "n", "force-share": True}, "force-share needs read-only"),
    ({"driver": "null-co", "node-name": "n", "detect-zeroes": "unmap"}, "needs discard 'unmap'"),
    ({"driver": "null-co", "node-name": "n", "detect-zeroes": "yes"}, "arguments.detect-zeroes: 'yes'"),
])
def test_refuses_nodes(daemon, arguments, part):
    q = daemon.qmp()
    q.command("blockdev-add", driver="null-co", node_name="taken")
    q.send({"execute": "blockdev-add", "arguments": arguments})
    error = q.answer()["error"]
    assert error["class"] == "GenericError"
    assert part in error["desc"]
    assert [n["node-name"] for n in q.command("query-named-block-nodes")] == ["taken"]


def nested(depth):
    node = {"driver": "null-co"}
    for _ in range(depth):
        node = {"driver": "raw", "file": node}
    return dict(node, **{"node-name": "top"})


def test_bounds_the_depth_of_the_graph(daemon):
    """Requests go down by calls: what lies on top of each other is bounded, however it is said."""
    q = daemon.qmp()
    q.send({"execute": "blockdev-add", "arguments": nested(300)})
    assert "nested more than 64 deep" in q.answer()["error"]["desc"]
    q.command("blockdev-add", driver="null-co", **{"node-name": "n0"})
    for i in range(1, 64):
        name = "top" if i == 63 else f"n{i}"
        q.command("blockdev-add", driver="raw", file=f"n{i - 1}", **{"node-name": name})
    q.send({"execute": "blockdev-add", "arguments": {"driver": "raw", "node-name": "over", "file": "top"}})
    assert "on top of more than 63 others" in q.answer()["error"]["desc"]
    assert len(q.command("query-named-block-nodes")) == 64


def test_resizes(daemon):
    q = daemon.qmp()
    path = raw_file(daemon)
    q.command("blockdev-add", driver="file", node_name="f", filename=path)
    q.command("block_resize", node_name="f", size=3 * MIB)
    assert os.path.getsize(path) == 3 * MIB
    q.command("block_resize", device="f", size=MIB)
    assert os.path.getsize(path) == MIB
    assert q.command("query-named-block-nodes")[0]["image"]["virtual-size"] == MIB
    assert "give one of" in q.refused("block_resize", size=1)["desc"]
    assert "give one of" in q.refused("block_resize", size=1, device="f", node_name="f")["desc"]
    assert "there is no node 'x'" in q.refused("block_resize", size=1, node_name="x")["desc"]
    assert "is more than" in q.refused("block_resize", size=(1 << 63) - 1, node_name="f")["desc"]
    q.command("blockdev-add", driver="file", node_name="ro", filename=path, read_only=True)
    assert "read-only" in q.refused("block_resize", size=1, node_name="ro")["desc"]
    assert os.path.getsize(path) == MIB


def test_resize_is_refused_by_an_export(daemon):
    q = daemon.qmp()
    serve(daemon, q)
    error = q.refused("block_resize", node_name="n", size=2 * MIB)
    assert re.search(r"block_resize wants .*resize.* access to node 'n', which .*'e' does not tolerate", error["desc"])


def test_lists_no_devices(daemon):
    q = daemon.qmp()
    q.command("blockdev-add", driver="null-co", node_name="n")
    assert q.command("query-block") == []
    assert q.command("query-blockstats") == []


# Exports.


def test_exports(daemon):
    q = daemon.qmp()
    uri = serve(daemon, q, writable=True)
    assert q.command("query-block-exports") == [{
        "id": "e", "type": "nbd", "node-name": "n", "shutting-down": False, "writable": True, "clients": 0,
        "address": f"unix:{nbd_path(daemon)}",
    }]
    size = subprocess.run(["nbdinfo", "--size", uri], capture_output=True, text=True, timeout=30, check=True)
    assert int(size.stdout) == MIB
    assert "in use by export 'e'" in q.refused("blockdev-del", node_name="n")["desc"]
    q.command("block-export-del", id="e")
    event = q.event("BLOCK_EXPORT_DELETED")
    assert event["data"] == {"id": "e"}
    assert abs(event["timestamp"]["seconds"] + event["timestamp"]["microseconds"] / 1e6 - time.time()) < 60
    assert q.command("query-block-exports") == []
    q.command("nbd-server-stop")
    assert not os.path.exists(nbd_path(daemon))
    q.command("blockdev-del", node_name="n")


def test_refuses_exports(daemon):
    q = daemon.qmp()
    q.command("blockdev-add", driver="null-co", node_name="ro", read_only=True)
    assert "no NBD server" in q.refused("block-export-add", type="nbd", id="x", node_name="ro")["desc"]
    assert "no NBD server" in q.refused("nbd-server-stop")["desc"]
    bad = {"type": "unix", "data": {"path": "/no/such/directory/s"}}
    assert "/no/such/directory/s" in q.refused("nbd-server-start", addr=bad)["desc"]
    tls = q.refused("nbd-server-start", addr=bad, tls_creds="t")
    assert "TLS is not supported yet" in tls["desc"]
    serve(daemon, q)
    again = {"type": "unix", "data": {"path": nbd_path(daemon) + "2"}}
    assert "already" in q.refused("nbd-server-start", addr=again)["desc"]
    add = {"type": "nbd", "node_name": "n"}
    assert "'e'" in q.refused("block-export-add", id="e", **add)["desc"]
    assert "'n'" in q.refused("block-export-add", id="x", **add)["desc"]  # the name is taken
    assert "arguments.id" in q.refused("block-export-add", id="1 x", **add)["desc"]
    assert "there is no node 'y'" in q.refused("block-export-add", type="nbd", id="x", node_name="y")["desc"]
    error = q.refused("block-export-add", type="nbd", id="x", node_name="ro", writable=True)
    assert "'ro' is read-only" in error["desc"]
    fuse = q.refused("block-export-add", type="fuse", id="x", node_name="n", mountpoint="/x")
    assert "not supported yet" in fuse["desc"]
    assert "'nobody'" in q.refused("block-export-del", id="nobody")["desc"]
    assert [e["id"] for e in q.command("query-block-exports")] == ["e"]


def test_safe_removal_spares_clients(daemon):
    q = daemon.qmp()
    uri = serve(daemon, q)
    client = subprocess.Popen(
        ["/usr/bin/python3", "-c", "import nbd, sys\nh = nbd.NBD()\nh.connect_uri(sys.argv[1])\n"
         "print('up', flush=True)\nsys.stdin.read()", uri],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )
    try:
        assert client.stdout.readline() == b"up\n"
        assert q.command("query-block-exports")[0]["clients"] == 1
        assert "client" in q.refused("block-export-del", id="e")["desc"]
        q.command("block-export-del", id="e", mode="hard")
        assert q.event("BLOCK_EXPORT_DELETED")["data"] == {"id": "e"}
    finally:
        client.kill()
        client.communicate()


def test_counts_what_clients_do(daemon):
    q = daemon.qmp()
    uri = serve(daemon, q, latency_ns=1000000, writable=True)
    commands = ["-c", "write 0 4k", "-c", "read 0 8k", "-c", "read 0 8k", "-c", "flush"]
    subprocess.run(["qemu-io", "-f", "raw", *commands, uri], check=True, capture_output=True, timeout=30)
    (entry,) = q.command("query-blockstats", query_nodes=True)
    assert entry["node-name"] == "n" and "parent" not in entry
    stats = entry["stats"]
    assert (stats["wr_operations"], stats["wr_bytes"], stats["wr_highest_offset"]) == (1, 4096, 4096)
    assert stats["rd_operations"] >= 2 and stats["rd_bytes"] >= 16384
    assert stats["flush_operations"] >= 1
    assert stats["rd_total_time_ns"] >= stats["rd_operations"] * 1000000 and stats["idle_time_ns"] > 0
    histogram = stats["rd_latency_histogram"]
    assert len(histogram["bins"]) == len(histogram["boundaries"]) + 1
    assert sum(histogram["bins"]) == stats["rd_operations"]
    assert all(b & (b - 1) == 0 for b in histogram["boundaries"])
    assert histogram["boundaries"] == sorted(histogram["boundaries"])


def test_statistics_name_what_lies_below(daemon):
    q = daemon.qmp()
    q.command("blockdev-add", driver="null-co", node_name="n")
    q.command("blockdev-add", driver="raw", node_name="r", file="n")
    by_name = {e["node-name"]: e for e in q.command("query-blockstats", query_nodes=True)}
    assert by_name["r"]["parent"]["node-name"] == "n"
    assert "rd_latency_histogram" not in by_name["r"]["stats"]


def test_shows_the_graph(daemon):
    q = daemon.qmp()
    serve(daemon, q, writable=True)
    q.command("blockdev-add", driver="raw", node_name="r", file={"driver": "null-co"}, read_only=True)
    graph = q.command("query-graph")
    assert {n["node-name"]: n["driver"] for n in graph["nodes"] if n["node-name"] in "nr"} == {"n": "null-co", "r": "raw"}
    assert {n["node-name"] for n in graph["nodes"] if n["read-only"]} >= {"r"}
    (edge,) = graph["edges"]
    assert edge["parent"] == "r" and edge["name"] == "file" and edge["child"].startswith("#block")
    (backend,) = graph["backends"]
    assert backend["node-name"] == "n" and "'e'" in backend["owner"]
    assert backend["in-flight"] == backend["queued"] == 0 and not backend["closed"]
    assert graph["orphans"] == []


# Several clients, and bad ones.


def test_serves_several_clients(daemon):
    one, two, three = daemon.qmp(), daemon.qmp(negotiate=False), daemon.qmp()
    one.command("blockdev-add", driver="null-co", node_name="n")
    assert two.refused("query-block")["class"] == "CommandNotFound"
    assert [n["node-name"] for n in three.command("query-named-block-nodes")] == ["n"]
    one.command("nbd-server-start", addr={"type": "unix", "data": {"path": nbd_path(daemon)}})
    one.command("block-export-add", type="nbd", id="e", node_name="n")
    three.command("block-export-del", id="e")
    assert one.event("BLOCK_EXPORT_DELETED") == three.event("BLOCK_EXPORT_DELETED")
    assert two.command("qmp_capabilities") == {} and two.events == []


def test_commands_may_come_together(daemon):
    q = daemon.qmp()
    q.send(b"".join(b'{"execute":"query-block","id":%d}' % i for i in range(500)))
    assert [q.answer()["id"] for _ in range(500)] == list(range(500))


def test_takes_commands_in_pieces(daemon):
    q = daemon.qmp()
    for byte in b' {"execute"\r\n:"query-block", "id" : \'it"s\' } ':
        q.send(bytes([byte]))
    assert q.answer() == {"return": [], "id": 'it"s'}


DIALOGUE = (
    b'{"execute": "qmp_capabilities"}\n{"execute": "blockdev-add", "arguments": {"driver": "null-co", "node-name": "n"}}\n'
    b'{"execute": "query-named-block-nodes", "id": [1, "x"]}\n{"execute": "blockdev-del", "arguments": {"node-name": "n"}}\n'
)


def test_survives_a_disconnect_at_every_byte(daemon):
    q = daemon.qmp()
    files = daemon.files()
    for length in range(len(DIALOGUE) + 1):
        with socket.socket(socket.AF_UNIX) as s:
            s.connect(daemon.path)
            s.sendall(DIALOGUE[:length])
            if length % 2:
                s.shutdown(socket.SHUT_WR)
    wait_until(lambda: daemon.files() == files, "all sessions to end")
    q.execute("blockdev-del", node_name="n")
    assert q.command("query-named-block-nodes") == []


def test_answers_all_before_a_half_close(daemon):
    with socket.socket(socket.AF_UNIX) as s:
        s.settimeout(30)
        s.connect(daemon.path)
        s.sendall(DIALOGUE + b'{"execute": "quer')
        s.shutdown(socket.SHUT_WR)
        lines = s.makefile("rb").read().splitlines()
    assert len(lines) == 5 and all(b'"return"' in line for line in lines[1:])


@pytest.mark.parametrize("first, garbage", [
    (b"", b"x"), (b'"', b"y"), (b"[", b"1,"), (b"", b"[1,"), (b"", b'{"a":'), (b"", b" "),
], ids=["word", "string", "list", "lists", "objects", "space"])
def test_survives_garbage_without_end(daemon, first, garbage):
    """100 MB that are no request: what is kept of it is bounded, and the session lives on."""
    q = daemon.qmp()
    q.send(first)
    block = garbage * (MIB // len(garbage))
    q.socket.setblocking(False)
    sent, answers = 0, b""
    while sent < 100 * MIB:
        try:
            sent += q.socket.send(block)
        except BlockingIOError:
            try:
                answers += q.socket.recv(MIB)
            except BlockingIOError:
                time.sleep(0.001)
    q.socket.settimeout(30)
    assert daemon.memory("VmHWM") < 250 * MIB
    q.send(b'\xff{"execute": "query-block", "id": "after"}')
    while b'"after"' not in answers:
        answers += q.socket.recv(MIB)
    assert b'{"return": [], "id": "after"}' in answers
    assert daemon.memory("VmRSS") < 50 * MIB
    assert daemon.qmp().command("query-block") == []


@pytest.mark.parametrize("opener, closer", [(b"[", b"]"), (b'{"a":', b"}")])
def test_survives_deep_nesting(daemon, opener, closer):
    q = daemon.qmp()
    for depth in (1000, 1022, 1500, 100000):
        middle = b"1" if opener != b"[" else b""
        q.send(b'{"execute": "query-block", "id": ' + opener * depth + middle + closer * depth + b"}\n")
        answer = q.file.readline()  # too deep for this side's parser
        assert (b'"return"' in answer) == (depth < 1024), (depth, answer[:200])
    assert q.command("query-block") == []


def test_ff_throws_away_what_came_before(daemon):
    q = daemon.qmp()
    q.send(b'{"execute": "query-\xff{"execute": "query-block", "id": 1}')
    assert q.answer()["error"]["class"] == "GenericError"
    assert q.answer() == {"return": [], "id": 1}


def test_survives_what_is_not_utf8(daemon):
    q = daemon.qmp()
    q.send(b'{"execute": "\xc3\x28"}\n{"execute": "query-block", "id": 1}')
    assert q.answer()["error"]["class"] == "GenericError"
    assert q.answer() == {"return": [], "id": 1}


def test_a_reader_that_sleeps_harms_nobody(daemon):
    sleeper = daemon.qmp()
    sleeper.socket.setblocking(False)
    try:
        while True:  # until its answers fill the socket and it is not read from any more
            sleeper.socket.send(b'{"execute": "query-qmp-schema"}' * 100)
    except BlockingIOError:
        pass
    q = daemon.qmp()
    assert q.command("query-block") == []
    assert daemon.memory("VmRSS") < 50 * MIB


# The end.


def test_quit_answers_then_ends(daemon):
    q = daemon.qmp()
    other = daemon.qmp()
    serve(daemon, q)
    assert q.command("quit") == {}
    assert q.event("BLOCK_EXPORT_DELETED")["data"] == {"id": "e"}
    assert q.receive() is None
    assert other.event("BLOCK_EXPORT_DELETED")["data"] == {"id": "e"}
    assert other.receive() is None
    assert daemon.wait() == 0
    assert not os.path.exists(daemon.path) and not os.path.exists(nbd_path(daemon))
    assert daemon.stderr() == ""
