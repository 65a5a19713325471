# SPDX-License-Identifier: Apache-2.0
"""Reads tools/layers: which folders of src/ there are, in order, and which of them each may use."""
import os


def read(path=None):
    """Returns {folder: set of the folders that it may include}, lowest first; a folder may include itself."""
    path = path or os.path.join(os.path.dirname(os.path.abspath(__file__)), "layers")
    sees = {}
    below = []
    with open(path, encoding="utf-8") as f:
        for number, line in enumerate(f, 1):
            line = line.strip()
            if not line or line.startswith("#"):
                continue
            folder, colon, names = (part.strip() for part in line.partition(":"))
            if folder in sees:
                raise SystemExit(f"{path}:{number}: {folder} stands there twice")
            if colon:
                for name in names.split():
                    if name not in sees:
                        raise SystemExit(f"{path}:{number}: {folder} sees {name}, which is not above it")
                sees[folder] = {folder, *names.split()}
            else:
                below.append(folder)
                sees[folder] = set(below)
    return sees
