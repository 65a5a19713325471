# SPDX-License-Identifier: Apache-2.0
"""The same dialogue with cairnd and with qemu-storage-daemon: the same commands succeed and fail, with the same error classes, and
what the peer returns we return too, under the same names and of the same types."""
import json
import os
import subprocess

import pytest

MIB = 1 << 20

# What the peer returns and we do not, each with the reason.
LEFT_OUT = {
    "image.actual-size": "null-co takes nothing on the host, and says nothing of it",
    "driver-specific": "counts of the peer's own I/O engine",
}

# Each step: command, arguments. FILE and SOCKET stand for paths of the daemon's own.
NODE = {"driver": "null-co", "node-name": "n", "size": MIB, "read-zeroes": True}
EXPORT = {"type": "nbd", "id": "e", "node-name": "n"}
SERVER = {"addr": {"type": "unix", "data": {"path": "SOCKET"}}}
DIALOGUE = [
    ("query-version", {}),
    ("query-block", {}),
    ("query-named-block-nodes", {}),
    ("query-block-exports", {}),
    ("query-blockstats", {}),
    ("query-blockstats", {"query-nodes": True}),
    ("qmp_capabilities", {}),
    ("no-such-command", {}),
    ("query-block", {"unknown": 1}),
    ("blockdev-add", {}),
    ("blockdev-add", {"driver": "no-such", "node-name": "x"}),
    ("blockdev-add", {"driver": "null-co"}),
    ("blockdev-add", {"driver": "null-co", "node-name": 7}),
    ("blockdev-add", {"driver": "null-co", "node-name": ""}),
    ("blockdev-add", {"driver": "null-co", "node-name": "1abc"}),
    ("blockdev-add", {"driver": "null-co", "node-name": "x" * 32}),
    ("blockdev-add", {"driver": "null-co", "node-name": "x", "unknown": 1}),
    ("blockdev-add", {"driver": "null-co", "node-name": "x", "size": "many"}),
    ("blockdev-add", {"driver": "null-co", "node-name": "x", "cache": {"direct": 1}}),
    ("blockdev-add", {"driver": "file", "node-name": "x"}),
    ("blockdev-add", {"driver": "file", "node-name": "x", "filename": "/no/such/file"}),
    ("blockdev-add", {"driver": "raw", "node-name": "x", "file": "no-such-node"}),
    ("blockdev-add", {"driver": "raw", "node-name": "x", "file": {"driver": "null-co", "size": 512}, "offset": 4096}),
    ("blockdev-add", NODE),
    ("blockdev-add", NODE),
    ("blockdev-add", {"driver": "file", "node-name": "f", "filename": "FILE"}),
    ("blockdev-add", {"driver": "raw", "node-name": "r", "file": "f", "read-only": True}),
    ("blockdev-add", {"driver": "raw", "node-name": "i", "file": {"driver": "null-co"}}),
    ("query-named-block-nodes", {}),
    ("query-named-block-nodes", {"flat": True}),
    ("query-blockstats", {"query-nodes": True}),
    ("query-block", {}),
    ("blockdev-del", {"node-name": "f"}),
    ("blockdev-del", {"node-name": "no-such-node"}),
    ("blockdev-del", {}),
    ("block_resize", {"size": MIB}),
    ("block_resize", {"size": MIB, "node-name": "no-such-node"}),
    ("block_resize", {"size": -1, "node-name": "f"}),
    ("block_resize", {"size": 2 * MIB, "node-name": "r"}),
    ("blockdev-del", {"node-name": "r"}),
    ("block_resize", {"size": 2 * MIB, "node-name": "f"}),
    ("block-export-add", EXPORT),
    ("nbd-server-stop", {}),
    ("nbd-server-start", {"addr": {"type": "unix", "data": {"path": "/no/such/directory/s"}}}),
    ("nbd-server-start", {"addr": {"type": "unix"}}),
    ("nbd-server-start", {"addr": {"type": "carrier-pigeon", "data": {}}}),
    ("nbd-server-start", SERVER),
    ("nbd-server-start", SERVER),
    ("block-export-add", {**EXPORT, "type": "no-such"}),
    ("block-export-add", {**EXPORT, "id": "1 x"}),
    ("block-export-add", {**EXPORT, "node-name": "no-such-node"}),
    ("block-export-add", {**EXPORT, "name": "x" * 4097}),
    ("block-export-add", {**EXPORT, "writable": "yes"}),
    ("block-export-add", {**EXPORT, "writable": True, "name": "disk", "description": "a disk"}),
    ("block-export-add", EXPORT),
    ("block-export-add", {**EXPORT, "id": "e2", "name": "disk"}),
    ("block-export-add", {**EXPORT, "id": "e2", "name": "disk2"}),
    ("query-block-exports", {}),
    ("blockdev-del", {"node-name": "n"}),
    ("block_resize", {"size": 2 * MIB, "node-name": "n"}),
    ("block-export-del", {"id": "no-such-export"}),
    ("block-export-del", {"id": "e", "mode": "gently"}),
    ("block-export-del", {"id": "e"}),
    ("query-block-exports", {}),
    ("nbd-server-stop", {}),
    ("query-block-exports", {}),
    ("blockdev-del", {"node-name": "n"}),
    ("blockdev-del", {"node-name": "i"}),
    ("blockdev-del", {"node-name": "f"}),
    ("query-named-block-nodes", {}),
    ("quit", {}),
]


def kind(value):
    return "bool" if isinstance(value, bool) else "number" if isinstance(value, (int, float)) else type(value).__name__


def compare(theirs, ours, path=""):
    """What of theirs is not in ours, or is of another type."""
    if kind(theirs) != kind(ours):
        return [f"{path}: {kind(theirs)} there, {kind(ours)} here"]
    wrong = []
    if isinstance(theirs, dict):
        for key, value in theirs.items():
            where = f"{path}.{key}".lstrip(".")
            if key in ours:
                wrong += compare(value, ours[key], where)
            elif not any(where == left or where.endswith("." + left) for left in LEFT_OUT):
                wrong.append(f"{where}: only there")
    elif isinstance(theirs, list):
        if len(theirs) != len(ours):
            wrong.append(f"{path}: {len(theirs)} there, {len(ours)} here")
        for a, b in zip(theirs, ours):
            wrong += compare(a, b, path)
    return wrong


def talk(daemon, dialogue):
    """All answers, and the events."""
    file = os.path.join(daemon.directory, "file")
    with open(file, "wb") as f:
        f.truncate(MIB)
    paths = {'"FILE"': f'"{file}"', '"SOCKET"': f'"{os.path.join(daemon.directory, "nbd.sock")}"'}
    q = daemon.qmp()
    answers = []
    for command, arguments in dialogue:
        text = json.dumps({"execute": command, "arguments": arguments, "id": len(answers)})
        for word, path in paths.items():
            text = text.replace(word, path)
        q.send(text.encode())
        answers.append(q.answer())
        if command == "block-export-del" and "return" in answers[-1]:
            q.event("BLOCK_EXPORT_DELETED")
    events = q.events
    while (message := q.receive()) is not None:
        events.append(message)
    assert daemon.wait() == 0
    return answers, events


def sorted_nodes(value):
    """Lists of nodes are compared by name: automatic names differ, and are left out."""
    if isinstance(value, list) and value and isinstance(value[0], dict) and "node-name" in value[0]:
        return sorted((v for v in value if not v["node-name"].startswith("#")), key=lambda v: v["node-name"])
    return value


def test_answers_as_the_peer_does(start, peer):
    theirs, their_events = talk(start(program=peer), DIALOGUE)
    ours, our_events = talk(start(), DIALOGUE)
    wrong = []
    for (command, arguments), there, here in zip(DIALOGUE, theirs, ours):
        step = f"{command} {arguments}"
        if ("error" in there) != ("error" in here):
            wrong.append(f"{step}: {there} there, {here} here")
        elif "error" in there:
            if there["error"]["class"] != here["error"]["class"] or set(there["error"]) != set(here["error"]):
                wrong.append(f"{step}: {there['error']} there, {here['error']} here")
        else:
            differences = compare(sorted_nodes(there["return"]), sorted_nodes(here["return"]))
            wrong += [f"{step}: {difference}" for difference in differences]
        assert there["id"] == here["id"]
    assert not wrong, "\n".join(wrong)
    assert [e["event"] for e in our_events] == [e["event"] for e in their_events]
    for there, here in zip(their_events, our_events):
        assert not compare(there, here)


BROKEN = [
    b'{"execute": "query-block" "id": 1}\n', b"[1]", b"7 ", b'"x"', b'{"execute": 1}', b'{"id": 1}', b'{"execute": "x", "y": 1}',
    b'{"exec-oob": "query-block"}', b'{"execute": "x", "exec-oob": "y"}', b'{"execute": "query-block", "arguments": []}',
    b'{"execute": "qmp_capabilities", "arguments": {"enable": ["no-such"]}}', b'{"execute": "no-such"}', b"]\n", b"}\n",
    b"{'execute': 'query-block', 'id': 'it\\'s'}",
]


@pytest.mark.parametrize("negotiated", [False, True], ids=["new", "negotiated"])
@pytest.mark.parametrize("text", BROKEN)
def test_refuses_broken_requests_as_the_peer_does(start, peer, negotiated, text):
    answers = []
    for program in ({"program": peer}, {}):
        q = start(**program).qmp(negotiate=negotiated)
        q.send(text)
        answers.append(q.answer())
    there, here = answers
    assert there.get("id") == here.get("id")
    assert set(there) == set(here)
    if "error" in there:
        assert there["error"]["class"] == here["error"]["class"], (there, here)


# Members of ours, see docs/compatibility.md.
ADDITIONS = {("blockdev-backup", f"cbw-{m}") for m in ("policy", "latency-bound", "timeout", "ram", "scratch", "scratch-max")}


def test_introspection_describes_what_the_peer_describes(start, peer):
    """For the commands that we have: arguments of the same names, less what we refuse by name."""
    described = []
    for program in ({"program": peer}, {}):
        entities = {e["name"]: e for e in start(**program).qmp().command("query-qmp-schema")}
        commands = {}
        for e in entities.values():
            if e["meta-type"] == "command":
                commands[e["name"]] = {
                    m["name"]: "default" in m for m in entities[e["arg-type"]].get("members", [])
                }
        described.append(commands)
    theirs, ours = described
    shared = set(theirs) & set(ours)
    assert len(shared) >= 14
    assert set(ours) - set(theirs) == {"block-check", "query-block-checks", "query-graph"}
    for name in shared:
        for member, optional in ours[name].items():
            if (name, member) in ADDITIONS:
                assert optional  # nobody needs to know of it
            else:
                assert optional == theirs[name].get(member), f"{name}.{member}"


def test_command_line_does_what_the_peers_does(start, peer, tmp_path):
    sizes = []
    for program in ({"program": peer}, {}):
        path = tmp_path / f"nbd{len(sizes)}.sock"
        disk = tmp_path / f"disk{len(sizes)}"
        disk.write_bytes(b"\x77" * MIB)
        start(
            "--blockdev", f"driver=file,node-name=f,filename={disk}",
            "--blockdev", "driver=raw,node-name=r,file=f,offset=65536,size=524288",
            "--nbd-server", f"addr.type=unix,addr.path={path},max-connections=3",
            "--export", "type=nbd,id=e,node-name=r,name=x,writable=on", **program,
        )
        uri = f"nbd+unix:///x?socket={path}"
        info = subprocess.run(["nbdinfo", "--json", uri], capture_output=True, text=True, timeout=30, check=True)
        export = json.loads(info.stdout)["exports"][0]
        sizes.append((export["export-size"], export["is_read_only"], export["can_flush"], export["can_multi_conn"]))
    assert sizes[0] == sizes[1]
