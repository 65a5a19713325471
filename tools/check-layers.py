#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""Checks every #include in src/ against the order of the folders in tools/layers.

    check-layers.py [ROOT]

A finding is one line, `file:line: what is wrong`; the exit status is 1 if there is one.

  order      a folder includes headers of itself and of the folders that tools/layers lets it see
  drivers    a driver (a sub-folder of protocols, formats, filters or exports) never includes another
             driver's header
  internal   a header named *-internal.h is included only within its own folder and what is below that
  written    an include of ours is written from src/ ("base/list.h") and names a file that exists, or one
             that the build makes (no slash in it: "delay-options.h", "config.h")
"""
import os
import re
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import layers  # noqa: E402

INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*([<"])([^>"]+)[>"]', re.M)
COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*", re.S)
DRIVER_FOLDERS = ("protocols", "formats", "filters", "exports")


def driver_of(path):
    """The driver that a file below src/ belongs to ("protocols/file"), or None."""
    parts = path.split("/")
    return "/".join(parts[:2]) if len(parts) > 2 and parts[0] in DRIVER_FOLDERS else None


def check_include(src, sees, path, quote, target):
    folder = path.split("/")[0]
    there = target.split("/")[0]

    if quote == "<":
        if there in sees and os.path.exists(os.path.join(src, target)):
            return f'<{target}> is ours: write "{target}"'
        if there == "cairn" and folder not in ("client", "cli"):
            return f"<{target}> is the client library's header, of use to client and cli only"
        return None
    if target.startswith("cairn/"):
        if folder not in ("client", "cli"):
            return f'"{target}" is the client library\'s header, of use to client and cli only'
        return None
    if "/" not in target:
        if os.path.exists(os.path.join(src, os.path.dirname(path), target)):
            return f'"{target}": write it from src/, as "{os.path.dirname(path)}/{target}"'
        return None  # made by the build
    if there not in sees:
        return f'"{target}": there is no folder {there} in tools/layers'
    if there not in sees[folder]:
        return f'"{target}": {folder} stands below {there} and must not know it'
    if not os.path.exists(os.path.join(src, target)):
        return f'"{target}": no such file in src/'
    if driver_of(path) and driver_of(target) and driver_of(target) != driver_of(path):
        return f'"{target}": {driver_of(path)} must not know another driver, {driver_of(target)}'
    if target.endswith("-internal.h") and not path.startswith(os.path.dirname(target) + "/"):
        return f'"{target}": internal to {os.path.dirname(target)}'
    return None


def check(root, sees):
    src = os.path.join(root, "src")
    findings = []
    files = 0
    for where, folders, names in os.walk(src):
        folders.sort()
        for name in sorted(names):
            if not name.endswith((".c", ".h", ".S")):
                continue
            full = os.path.join(where, name)
            path = os.path.relpath(full, src)
            files += 1
            if path.split("/")[0] not in sees:
                findings.append(f"src/{path}:1: its folder is not in tools/layers")
                continue
            with open(full, encoding="utf-8") as f:
                text = f.read()
            text = COMMENT.sub(lambda m: re.sub(r"[^\n]", " ", m.group()), text)
            for match in INCLUDE.finditer(text):
                wrong = check_include(src, sees, path, match.group(1), match.group(2))
                if wrong:
                    line = text.count("\n", 0, match.start(1)) + 1
                    findings.append(f"src/{path}:{line}: {wrong}")
    return files, findings


def main():
    root = sys.argv[1] if len(sys.argv) > 1 else os.path.join(os.path.dirname(__file__), "..")
    files, findings = check(root, layers.read(os.path.join(root, "tools", "layers")))
    for finding in findings:
        print(finding)
    if files == 0:
        sys.exit(f"{root}/src: no C file found")
    print(f"layers: {files} files, {len(findings)} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
