/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Where the nodes of a bitmap's tree live: an array that grows by segments, each twice as long as the one before, and in which
 * a node is known by its index. Indices, not pointers, stand in the tree, so that it can lie in a mapping as well (I4).
 */
#ifndef CAIRN_BITMAPS_BITMAP_ARENA_H
#define CAIRN_BITMAPS_BITMAP_ARENA_H

#include "base/atomic.h"

#include <stdint.h>

#define BITMAP_NODE_BYTES   512
#define BITMAP_NODE_WORDS   (BITMAP_NODE_BYTES / 8)
#define BITMAP_NODE_ENTRIES (BITMAP_NODE_BYTES / 4)

/* Indices below this are not of nodes: the first segment is as long as the gap, so that its number follows from the index. */
#define BITMAP_ARENA_FIRST      16u
#define BITMAP_ARENA_FIRST_BITS 4
#define BITMAP_ARENA_SEGMENTS   (32 - BITMAP_ARENA_FIRST_BITS)

/* All atomic. */
struct bitmap_node {
    union {
        uint64_t words[BITMAP_NODE_WORDS];     /* of a leaf */
        uint32_t entries[BITMAP_NODE_ENTRIES]; /* of an inner node */
    };
};

struct bitmap_arena {
    /*
     * All atomic. A segment that is there stays until the arena is reset. It is held as the address that index 0 would have if
     * the segment went down to there, so that an index is turned into an address by one multiplication.
     */
    uintptr_t segments[BITMAP_ARENA_SEGMENTS];
    uint64_t free; /* the first node that was given back; the upper half counts changes (ABA) */
    uint32_t next; /* the first index that was never used */
    uint32_t used;
};

void bitmap_arena_init(struct bitmap_arena *a);
/* Nobody is in it any more. Frees all nodes and their memory. */
void bitmap_arena_reset(struct bitmap_arena *a);

/* Any thread. All words are `fill`. 0: no memory. */
uint32_t bitmap_arena_alloc(struct bitmap_arena *a, uint64_t fill);
/* Any thread. Nobody else can have the index. */
void bitmap_arena_free(struct bitmap_arena *a, uint32_t index);

uint64_t bitmap_arena_memory(const struct bitmap_arena *a);
/* Nodes in the list of what was given back. Nobody is in the arena. */
uint32_t bitmap_arena_free_count(const struct bitmap_arena *a);

/* The number of the segment that an index lies in. */
static inline unsigned bitmap_arena_segment(uint32_t index)
{
    return 31 - BITMAP_ARENA_FIRST_BITS - (unsigned)__builtin_clz(index);
}

static inline struct bitmap_node *bitmap_arena_node(const struct bitmap_arena *a, uint32_t index)
{
    /* Relaxed: the segment was put in place before its first index was, and that one was loaded in order. */
    uintptr_t origin = atomic_get_relaxed(&a->segments[bitmap_arena_segment(index)]);

    return (struct bitmap_node *)(origin + (uintptr_t)index * BITMAP_NODE_BYTES);
}

#endif
