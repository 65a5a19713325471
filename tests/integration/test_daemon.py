# SPDX-License-Identifier: Apache-2.0
"""cairnd as a program: its command line, its start and its end."""
import os
import resource
import signal
import socket
import subprocess
import time

import pytest
from conftest import PATIENCE, Qmp, wait_until

MIB = 1 << 20


@pytest.fixture
def run(cairnd, tmp_path):
    """Runs to the end: (status, stdout, stderr)."""

    def runner(*options, program=cairnd):
        done = subprocess.run(
            [program, *options], capture_output=True, text=True, timeout=PATIENCE, cwd=tmp_path, check=False
        )
        return done.returncode, done.stdout, done.stderr

    return runner


def gone(pid):
    return not os.path.exists(f"/proc/{pid}") or " Z " in open(f"/proc/{pid}/stat", encoding="ascii").read()


# What is said without a daemon.


def test_says_its_version(run):
    for option in ("--version", "-V"):
        status, out, err = run(option)
        assert status == 0 and out.startswith("cairnd version 0.") and err == ""


def test_help_names_all_options_and_keys(run):
    status, out, err = run("--help")
    assert status == 0 and err == ""
    for text in ("--blockdev", "--export", "--nbd-server", "--chardev", "--monitor", "--daemonize", "--pidfile",
                 "--engine", "--io-threads", "--copy-threads", "--change-deadline", "--allow DIR", "filename=", "cache.direct=on|off", "addr.path=",
                 "max-connections=", "writable=on|off", "pretty=on|off", "[driver=]fault|file|host_device|"):
        assert text in out, text
    assert max(map(len, out.splitlines())) <= 110
    assert run("-h") == (status, out, err)


def test_takes_its_name_from_the_call(run, cairnd, tmp_path):
    link = tmp_path / "qemu-storage-daemon"
    link.symlink_to(cairnd)
    status, out, _ = run("--version", program=str(link))
    assert status == 0 and out.startswith("qemu-storage-daemon version")
    status, _, err = run("--frob", program=str(link))
    assert status == 1 and err.startswith("qemu-storage-daemon: ")


@pytest.mark.parametrize("options, part", [
    (["--frob"], "there is no option '--frob'"),
    (["-x"], "there is no option '-x'"),
    (["word"], "argument 'word' is not expected"),
    (["--pidfile"], "option '--pidfile' needs a value"),
    (["--object", "secret,id=s"], "--object: secret 's': give one of 'data' and 'file'"),
    (["--object", "iothread,id=t"], "--object: qom-type: "),
    (["--object", "secret,id=s,data=a", "--object", "secret,id=s,data=b"], "there is an object 's' already"),
    (["--trace", "x"], "--trace: "),
    (["-T", "x"], "--trace: "),
    (["--engine", "steam"], "--engine steam: "),
    (["--io-threads", "0"], "--io-threads 0: "),
    (["--io-threads", "x"], "--io-threads x: "),
    (["--io-threads", "33"], "from 1 to 32"),
    (["--copy-threads", "0"], "--copy-threads 0: "),
    (["--copy-threads", "17"], "from 1 to 16"),
    (["--change-deadline", "0"], "--change-deadline 0: "),
    (["--allow", "/", "--allow", "/nowhere"], "--allow: cannot grant directory '/nowhere': No such file or directory"),
    (["--allow", "/dev/null"], "--allow: cannot grant '/dev/null': it is no directory"),
    (["--allow", "a\nb"], "--allow: cannot grant directory 'a?b': "),
    (["--blockdev", "null-co"], "--blockdev null-co: "),
    (["--blockdev", "driver=null-co,node-name=n,frob=1"], "--blockdev driver=null-co,node-name=n,frob=1: frob: unknown"),
    (["--blockdev", "driver=nope,node-name=n"], "driver: 'nope' is not one of"),
    (["--blockdev", '{"driver": "null-co", "node-name": "n", "size": "1"}'], "size: "),
    (["--blockdev", '{"driver"'], "JSON"),
    (["--blockdev", "file,node-name=n,filename=/no/such"], "'/no/such'"),
    (["--blockdev", "raw,node-name=n,file=m", "--blockdev", "null-co,node-name=m"], "there is no node 'm'"),
    (["--blockdev", "null-co,node-name=n", "--blockdev", "null-co,node-name=n"], "there is a node 'n' already"),
    (["--export", "nbd,id=e,node-name=n"], "--export nbd,id=e,node-name=n: "),
    (["--nbd-server", "addr.type=unix"], "addr.path: missing"),
    (["--nbd-server", "addr.type=unix,addr.path=/no/such/s"], "/no/such/s"),
    (["--nbd-server", "addr.type=vsock,addr.cid=1,addr.port=1"], "not supported"),
    (["--nbd-server", "addr.type=unix,addr.path=s", "--nbd-server", "addr.type=unix,addr.path=t"], "already"),
    (["--chardev", "stdio,id=c"], "backend: 'stdio' is not one of: socket"),
    (["--chardev", "socket,id=c,path=s,wait=off"], "server must be on"),
    (["--chardev", "socket,id=c,path=s,server=on"], "wait must be off"),
    (["--chardev", "socket,id=c,server=on,wait=off"], "one of 'path' and 'host'"),
    (["--chardev", "socket,id=c,path=s,host=h,server=on,wait=off"], "one of 'path' and 'host'"),
    (["--chardev", "socket,id=c,host=h,server=on,wait=off"], "go together"),
    (["--chardev", "socket,id=c,path=s,server=on,wait=off", "--chardev", "socket,id=c,path=t,server=on,wait=off"],
     "there is a chardev 'c' already"),
    (["--monitor", "chardev=c"], "--monitor chardev=c: there is no chardev 'c'"),
    (["--monitor", "c,mode=readline"], "only mode=control is supported"),
    (["--chardev", "socket,id=c,path=s,server=on,wait=off", "--monitor", "c", "--monitor", "c"], "has a monitor already"),
    (["--pidfile", "/no/such/pid"], "--pidfile /no/such/pid: No such file"),
])
@pytest.mark.parametrize("extra", [[], ["--daemonize"]], ids=["foreground", "daemonize"])
def test_refuses_with_one_line(run, tmp_path, options, part, extra):
    status, out, err = run(*extra, *options)
    assert (status, out) == (1, "")
    assert err.startswith("cairnd: ") and part in err and err.count("\n") == 1, err
    assert os.listdir(tmp_path) == []  # no socket stays behind


def test_an_error_with_a_newline_is_one_line(run):
    status, _, err = run("--blockdev", '{"driver":\n"x"}')
    assert status == 1 and err.count("\n") == 1


# Running.


@pytest.mark.parametrize("engine", ["io_uring", "threads", "auto"])
def test_runs_on_each_engine(start, engine):
    daemon = start("--engine", engine, "--io-threads", "1", "--blockdev", "null-co,node-name=n,size=1M")
    assert daemon.qmp().command("query-named-block-nodes")[0]["image"]["virtual-size"] == MIB
    assert len(os.listdir(f"/proc/{daemon.process.pid}/task")) >= 3  # control, signals, one for I/O


def test_carries_out_its_options(start, tmp_path):
    disk = tmp_path / "disk,1"
    disk.write_bytes(b"\xab" * MIB)
    nbd = tmp_path / "nbd.sock"
    daemon = start(
        "--blockdev", "driver=file,node-name=f,filename=" + str(disk).replace(",", ",,") + ",cache.no-flush=on",
        "--blockdev", '{"driver": "raw", "node-name": "d", "file": "f", "offset": 512}',
        "--nbd-server", f"addr.type=unix,addr.path={nbd},max-connections=2",
        "--export", "nbd,id=e,node-name=d,name=disk,writable=on",
    )
    nodes = {n["node-name"]: n for n in daemon.qmp().command("query-named-block-nodes")}
    assert nodes["f"]["cache"]["no-flush"] and nodes["d"]["image"]["virtual-size"] == MIB - 512
    subprocess.run(
        ["qemu-io", "-f", "raw", "-c", "read -P 0xab 0 4k", "-c", "write -P 0x5a 0 512", f"nbd+unix:///disk?socket={nbd}"],
        check=True, capture_output=True, timeout=PATIENCE,
    )
    assert disk.read_bytes()[:1025] == b"\xab" * 512 + b"\x5a" * 512 + b"\xab"


def test_listens_on_tcp(start, tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    pidfile = tmp_path / "pid"
    start("--chardev", f"socket,id=c,host=127.0.0.1,port={port},server=on,wait=off", "--monitor", "c",
          "--pidfile", str(pidfile), qmp=False)
    wait_until(pidfile.exists, "the pidfile")
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as s:
        assert s.makefile("rb").readline().startswith(b'{"QMP"')


def test_warns_of_a_channel_that_nobody_speaks_on(start, tmp_path):
    daemon = start("--chardev", f"socket,id=idle,path={tmp_path}/idle,server=on,wait=off")
    daemon.qmp()
    assert "no --monitor speaks on chardev 'idle', ignoring" in daemon.stderr()


def test_is_small_when_idle(start):
    daemon = start("--blockdev", "null-co,node-name=n")
    daemon.qmp().command("query-qmp-schema")
    assert daemon.memory("VmRSS") < 12 * MIB


def test_raises_its_limit_of_files(start):
    daemon = start()
    daemon.qmp()
    soft, hard = resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE)
    assert soft == hard


def test_pidfile_comes_when_ready_and_goes_at_the_end(start, tmp_path):
    pidfile = tmp_path / "pid"
    daemon = start("--pidfile", str(pidfile))
    wait_until(lambda: pidfile.exists() and pidfile.read_text().endswith("\n"), "the pidfile")
    assert int(pidfile.read_text()) == daemon.process.pid
    other = subprocess.run(
        [daemon.program, "--pidfile", str(pidfile)], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert other.returncode == 1 and "another process has it" in other.stderr
    assert int(pidfile.read_text()) == daemon.process.pid
    daemon.stop()
    assert not pidfile.exists()


def test_takes_over_a_pidfile_that_nobody_has(start, tmp_path):
    pidfile = tmp_path / "pid"
    pidfile.write_text("4194304000 and more\n")
    daemon = start("--pidfile", str(pidfile))
    wait_until(lambda: pidfile.read_text() == f"{daemon.process.pid}\n", "the new process id")


def test_daemonize(run, tmp_path):
    path, pidfile = tmp_path / "qmp.sock", tmp_path / "pid"
    status, out, err = run("--daemonize", "--pidfile", str(pidfile), "--blockdev", "null-co,node-name=n",
                           "--chardev", "socket,id=c,path=qmp.sock,server=on,wait=off", "--monitor", "c")
    assert (status, out, err) == (0, "", "")
    pid = int(pidfile.read_text())  # it is there when the command returns
    try:
        q = Qmp(str(path))
        assert len(q.command("query-named-block-nodes")) == 1
        assert os.getsid(pid) != os.getsid(0)
        assert {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in range(3)} == {"/dev/null"}
        q.command("quit")
        assert q.receive() is None
        wait_until(lambda: gone(pid), "the end")
        assert not path.exists() and not pidfile.exists()
    finally:
        if not gone(pid):
            os.kill(pid, signal.SIGKILL)


# The end.


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_ends_at_a_signal(start, signum):
    daemon = start("--blockdev", "null-co,node-name=n")
    q = daemon.qmp()
    for _ in range(3):  # more of them do no harm
        daemon.process.send_signal(signum)
    assert q.receive() is None
    assert daemon.wait() == 0
    assert daemon.stderr() == ""
    assert not os.path.exists(daemon.path)


def test_ends_at_a_signal_at_any_time_of_its_start(cairnd, tmp_path):
    for microseconds in range(0, 20000, 500):
        process = subprocess.Popen(
            [cairnd, "--blockdev", "null-co,node-name=n", "--chardev", "socket,id=c,path=s,server=on,wait=off",
             "--monitor", "c", "--pidfile", "pid"], cwd=tmp_path,
        )
        time.sleep(microseconds / 1e6)
        process.terminate()
        # Before it has begun to wait for signals it dies of one, which leaves nothing either.
        assert process.wait(PATIENCE) in (0, -signal.SIGTERM)
        assert os.listdir(tmp_path) == []


def test_survives_sigpipe(start):
    daemon = start()
    daemon.process.send_signal(signal.SIGPIPE)
    assert daemon.qmp().command("query-block") == []


def test_ends_with_clients_at_work(start, tmp_path):
    nbd = tmp_path / "nbd.sock"
    daemon = start(
        "--blockdev", "null-co,node-name=n,size=1G,latency-ns=20000000",
        "--nbd-server", f"addr.type=unix,addr.path={nbd}", "--export", "nbd,id=e,node-name=n,writable=on",
    )
    q = daemon.qmp()
    client = subprocess.Popen(
        ["qemu-img", "bench", "-f", "raw", "-d", "8", "-c", "100000", f"nbd+unix:///n?socket={nbd}"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: q.command("query-blockstats", query_nodes=True)[0]["stats"]["rd_operations"] > 20, "reads")
        backend = q.command("query-graph")["backends"][0]
        assert backend["in-flight"] > 0 and backend["oldest-age-ns"] < PATIENCE * 10**9
        begin = time.monotonic()
        q.command("quit")
        assert daemon.wait() == 0
        assert time.monotonic() - begin < 5
    finally:
        client.kill()
        client.wait()
