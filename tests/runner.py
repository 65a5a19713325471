# SPDX-License-Identifier: Apache-2.0
"""Runs test programs and reads what they say; used by tests/run-suites and tests/mutants/run.py."""
import ctypes
import dataclasses
import json
import os
import re
import signal
import subprocess
import tempfile
import time
import xml.etree.ElementTree

PASS, FAIL, SKIP = "pass", "fail", "skip"
SKIP_STATUS = 77
TAP = re.compile(r"(?P<no>not )?ok\b\s*(?P<number>\d+)?\s*(?:-\s*)?(?P<name>[^#\s]*)\s*(?P<skip>#\s*SKIP\b\s*(?P<why>.*))?", re.I)
SEEDS = re.compile(r"^# \S+: (\d+) seeds passed", re.M)


@dataclasses.dataclass
class Case:
    name: str
    status: str
    detail: str = ""  # shown for what did not pass
    seconds: float = 0.0


@dataclasses.dataclass
class Ended:
    status: int  # as in subprocess; None after a timeout
    output: str
    seconds: float
    left: list  # processes that it left behind


def adopt_orphans():
    """From here on what a test leaves behind becomes our child, also a daemon, so that it can be found and ended."""
    for signum in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
        if signal.getsignal(signum) == signal.SIG_IGN:  # as in the background of a shell: programs under test would ignore it, too
            signal.signal(signum, signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL)
    pr_set_child_subreaper = 36
    ctypes.CDLL(None).prctl(pr_set_child_subreaper, 1, 0, 0, 0)


def end_group(process):
    for signum in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, signum)
            process.wait(5)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            pass


def end_children():
    """Ends and reaps every child that is left; returns their names."""
    names = []
    for _ in range(100):  # their children become ours in turn
        with open(f"/proc/self/task/{os.getpid()}/children", encoding="ascii") as f:
            children = [int(pid) for pid in f.read().split()]
        if not children:
            break
        for pid in children:
            try:
                with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as f:
                    stat = f.read()
                if stat.rpartition(")")[2].split()[0] != "Z":
                    names.append(f"{stat[stat.index('(') + 1:stat.rindex(')')]} ({pid})")
                os.kill(pid, signal.SIGKILL)
            except (FileNotFoundError, ProcessLookupError):
                pass
            try:
                os.waitpid(pid, 0)
            except ChildProcessError:
                pass
    return names


def run(command, timeout, env=None, cwd=None):
    """Runs a command in a session of its own. Nothing that it started lives on, even after a timeout."""
    begin = time.monotonic()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            [str(word) for word in command], stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            env={**os.environ, **(env or {})}, cwd=cwd, start_new_session=True,
        )
        try:
            status = process.wait(timeout)
        except subprocess.TimeoutExpired:
            status = None
            end_group(process)
        except BaseException:
            end_group(process)
            end_children()
            raise
        left = end_children()
        output.seek(0)
        text = output.read().decode("utf-8", "replace")
    if status is None:
        text += f"\n(ended after {timeout} s)\n"
    return Ended(status, text, time.monotonic() - begin, left)


SANITIZER = re.compile(r"(ERROR: \w+Sanitizer|WARNING: ThreadSanitizer|: runtime error: )")


def tail(text, lines=60):
    """The end of an output, or a sanitizer's report from its first line."""
    kept = text.rstrip().splitlines()
    for i, line in enumerate(kept):
        if SANITIZER.search(line):
            return "\n".join(kept[i : i + lines])
    if len(kept) > lines:
        kept = [f"... ({len(kept) - lines} lines before)"] + kept[-lines:]
    return "\n".join(kept)


def single(name, ended):
    """A command as one case, by its exit status."""
    if ended.status == 0:
        return Case(name, PASS, "", ended.seconds)
    if ended.status == SKIP_STATUS:
        why = ended.output.strip().splitlines()
        return Case(name, SKIP, why[-1] if why else "", ended.seconds)
    return Case(name, FAIL, tail(ended.output), ended.seconds)


def tap_cases(program, stdout, stderr):
    """The cases of one program. cmocka prints what went wrong after the `not ok` line."""
    cases = []
    for line in stdout.splitlines():
        match = TAP.match(line)
        if match and match["number"]:
            name = f"{program}:{match['name'] or (match['why'] or '').strip() or match['number']}"
            if match["skip"]:
                cases.append(Case(name, SKIP, (match["why"] or "").strip()))
            else:
                cases.append(Case(name, FAIL if match["no"] else PASS))
        elif cases and cases[-1].status == FAIL and line.startswith("#"):
            cases[-1].detail += line + "\n"
    for case in cases:
        if case.status == FAIL:
            case.detail = tail(case.detail + stderr)
    return cases


def meson_tests(build, timeout, names=(), env=None, multiplier=1.0, suites=()):
    """Runs tests of a build directory. Returns (cases, number of seeds that passed)."""
    log = os.path.join(build, "meson-logs", "testlog.json")
    if os.path.exists(log):
        os.unlink(log)
    command = ["meson", "test", "-C", build, "--no-rebuild", "--num-processes", str(os.cpu_count() or 1)]
    command += ["--timeout-multiplier", str(multiplier)]
    for suite in suites:
        command += ["--suite", suite]
    ended = run(command + list(names), timeout, env)

    cases = []
    seeds = 0
    if os.path.exists(log):
        with open(log, encoding="utf-8") as f:
            for line in f:
                test = json.loads(line)
                stdout, stderr = test.get("stdout", ""), test.get("stderr", "")
                name = test["name"].split(" / ")[-1]
                seeds += sum(int(n) for n in SEEDS.findall(stdout))
                found = tap_cases(name, stdout, stderr)
                bad = any(case.status == FAIL for case in found)
                if test["result"] == "SKIP":
                    found.append(Case(name, SKIP, stdout.strip()))
                elif test["result"] not in ("OK", "FAIL", "EXPECTEDFAIL") or test["returncode"] != 0:
                    if not bad or test["result"] in ("TIMEOUT", "INTERRUPT") or test["returncode"] < 0:
                        found.append(
                            Case(name, FAIL, f"{test['result']}, exit status {test['returncode']}\n"
                                 + tail(stdout + "\n" + stderr))
                        )
                elif not found:
                    found.append(Case(name, PASS if test["result"] == "OK" else FAIL, tail(stdout + stderr)))
                for case in found:
                    case.seconds = test["duration"] / len(found)
                cases += found
    if ended.status is None or (not cases and (names or ended.status != 0)):
        cases.append(Case("meson test", FAIL, tail(ended.output)))
    return cases, seeds


def pytest_cases(paths, timeout, env=None, cwd=None):
    """Runs pytest and returns its cases; one that hangs or dies is a failure."""
    whole = "pytest " + ", ".join(os.path.basename(path) for path in paths)
    with tempfile.NamedTemporaryFile(suffix=".xml") as report:
        ended = run(
            ["/usr/bin/python3", "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report.name}", *paths],
            timeout, env, cwd,
        )
        cases = []
        try:
            tree = xml.etree.ElementTree.parse(report.name)
        except xml.etree.ElementTree.ParseError:
            return [Case(whole, FAIL, tail(ended.output), ended.seconds)]
    for element in tree.iter("testcase"):
        name = f"{element.get('classname', '').split('.')[-1]}:{element.get('name')}"
        case = Case(name, PASS, "", float(element.get("time", 0)))
        for child in element:
            if child.tag in ("failure", "error"):
                case.status, case.detail = FAIL, tail(child.text or child.get("message", ""))
            elif child.tag == "skipped":
                case.status, case.detail = SKIP, child.get("message", "")
        cases.append(case)
    if ended.status != 0 and not any(case.status == FAIL for case in cases):
        cases.append(Case(whole, FAIL, tail(ended.output), ended.seconds))
    return cases


def integration(path, build, timeout=180, extra_env=None):
    """Runs one integration test (a .sh file or a pytest file) on the programs of a build directory."""
    build = os.path.abspath(build)
    path = os.path.abspath(path)
    with tempfile.TemporaryDirectory(prefix="cairn-test.") as scratch:
        env = {
            "CAIRN_BUILD": build,
            "CAIRND": os.path.join(build, "src/daemon/cairnd"),
            "CAIRN": os.path.join(build, "src/cli/cairn"),
            "TEST_DIR": os.path.dirname(path),
            "TMPDIR": scratch,
            "PYTHONDONTWRITEBYTECODE": "1",
            **(extra_env or {}),
        }
        if path.endswith(".py"):
            return pytest_cases([path], timeout, env, scratch)
        ended = run([path] if os.access(path, os.X_OK) else ["/bin/sh", path], timeout, env, scratch)
        case = single(os.path.basename(path), ended)
        if ended.left and case.status == PASS:
            case.status, case.detail = FAIL, "left running: " + ", ".join(ended.left)
        return [case]
