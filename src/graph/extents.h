/* SPDX-License-Identifier: Apache-2.0 */
/* What a range of a disk is made of: many extents in one call. */
#ifndef CAIRN_GRAPH_EXTENTS_H
#define CAIRN_GRAPH_EXTENTS_H

#include <stdbool.h>
#include <stdint.h>

struct node;

enum extent_flags {
    EXTENT_DATA = 1 << 0,      /* reads come from stored data */
    EXTENT_ZERO = 1 << 1,      /* reads as zeroes */
    EXTENT_ALLOCATED = 1 << 2, /* the answer comes from this node, not from below it */
    EXTENT_OFFSET_VALID =
        1
        << 3, /* host and host_offset say where the bytes lie, as they are; of zeroes, where there is room for them */
};

struct extent {
    uint64_t offset;
    uint64_t len; /* > 0 */
    unsigned flags;
    const struct node *host;
    uint64_t host_offset;
    unsigned
        below; /* so many layers below the node is the one that answers; 0 unless `layers` is set */
};

/* The caller gives the array. The extents follow each other without gaps from the start of the request. */
struct extents {
    struct extent *v;
    unsigned count;
    unsigned max;
    bool layers; /* tell in which layer each one lies */
};

/* Appends, or lengthens the last one if it continues it. False when it is full. */
bool extents_add(struct extents *e, const struct extent *next);

/* The end of the last one; `from` when there is none. */
uint64_t extents_end(const struct extents *e, uint64_t from);

#endif
