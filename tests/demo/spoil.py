# SPDX-License-Identifier: Apache-2.0
"""Makes wrong images of right ones, which the checker must refuse: one block of another instant, or half of them.

Only the writer's blocks are looked at; the images made here hold nothing else.
"""
import os
import struct

BLOCK = 4096


def read_list(path):
    """The places of the writer's blocks in the disk, by block."""
    with open(path, encoding="ascii") as f:
        return [int(line) for line in f]


def sequences(image, places):
    """What each of the writer's blocks holds in an image that the checker has accepted."""
    fd = os.open(image, os.O_RDONLY)
    try:
        return [struct.unpack("=Q", os.pread(fd, 8, place * BLOCK + 16))[0] for place in places]
    finally:
        os.close(fd)


def runs(places):
    """Blocks that lie one behind the other in the disk, as (first place, number of blocks)."""
    start = 0
    for i in range(1, len(places) + 1):
        if i == len(places) or places[i] != places[i - 1] + 1:
            yield places[start], i - start
            start = i


def copy_blocks(source, target, places):
    """Writes these places of `source` into `target`, which becomes as long as it."""
    to = os.open(target, os.O_WRONLY | os.O_CREAT, 0o644)
    fd = os.open(source, os.O_RDONLY)
    try:
        os.ftruncate(to, os.fstat(fd).st_size)
        for place, count in runs(places):
            at, end = place * BLOCK, (place + count) * BLOCK
            while at < end:
                data = os.pread(fd, min(end - at, 1 << 20), at)
                if not data:
                    raise EOFError(f"'{source}' has no block {place}")
                os.pwrite(to, data, at)
                at += len(data)
    finally:
        os.close(fd)
        os.close(to)


def exchange(places, image, other):
    """The block to take from another point so that `image` is wrong by it alone.

    From an older point: of the blocks that differ, the one that was written the longest time before the instant of
    `image`; so what replaced the old version was acknowledged long before. From a newer one: the version that was
    submitted last of all.
    """
    here, there = sequences(image, places), sequences(other, places)
    differ = [block for block in range(len(places)) if here[block] != there[block]]
    if not differ:
        raise ValueError(f"'{image}' and '{other}' hold the same blocks")
    if max(there) > max(here):
        return max(differ, key=lambda block: there[block])
    return min(differ, key=lambda block: here[block])


def mixed(places, image, other, out):
    """The first half of the blocks of one image, the second half of another one."""
    half = len(places) // 2
    copy_blocks(image, out, places[:half])
    copy_blocks(other, out, places[half:])
