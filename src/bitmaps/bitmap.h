/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A bitmap: which parts of a disk are dirty, a bit per granule (I7).
 *
 * BITMAP-1 A radix tree of nodes of 512 bytes: leaves of 4096 bits, inner nodes of 128 entries, as many levels as the size
 *          needs. An entry is empty (all below is clean), full (all below is dirty), or the index of a node in the arena.
 * BITMAP-2 Bits are set by atomics, from any thread, without locks. A node is made off to the side and put in place by CAS;
 *          while others may be in the tree, no entry stops pointing to its node. Where no node can be had, the entry becomes
 *          full: the bitmap reports more than is dirty, never less.
 * BITMAP-3 Setting what is set already only loads.
 * BITMAP-4 What lies beyond the size is never reported. Memory follows what was dirty, not the size (P5); it comes back when
 *          the bitmap is cleared.
 *
 * "Drained" means: nobody else is in the bitmap; for one that is on a node, the gates above are closed.
 */
#ifndef CAIRN_BITMAPS_BITMAP_H
#define CAIRN_BITMAPS_BITMAP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define BITMAP_GRANULARITY_MIN ((uint64_t)1 << 9)
#define BITMAP_GRANULARITY_MAX ((uint64_t)1 << 31)

struct bitmap;

/* All clean. Size and granularity in bytes, the latter a power of two within the limits above. NULL: no memory. */
struct bitmap *bitmap_new(uint64_t size, uint64_t granularity);
/* Drained; takes NULL. Returns NULL. */
struct bitmap *bitmap_free(struct bitmap *b);

uint64_t bitmap_size(const struct bitmap *b);
uint64_t bitmap_granularity(const struct bitmap *b);

/* Any thread. Makes the range dirty, rounded outward to granules; what lies beyond the size is left out. Never fails. */
void bitmap_set(struct bitmap *b, uint64_t offset, uint64_t len);

/*
 * Any thread (C1). Takes the first dirty run at or after the granule of `from` away from the bitmap: atomically, so that nobody else
 * gets any of it, and what is set meanwhile stays, or is set again. The run has whole granules, but at the end of the disk, at
 * most max_bytes of them (one at least), and may be shorter than what is dirty. bitmap_set() puts it back.
 * 1: taken. 0: nothing is dirty there. -ENOMEM: there is no memory to take a part of what is full.
 */
int bitmap_claim(struct bitmap *b, uint64_t from, uint64_t max_bytes, uint64_t *ret_offset,
                 uint64_t *ret_len);

/*
 * Any thread. Finds the first dirty run in [from, end), whole as far as it lies in there, without taking it. What changes
 * meanwhile may be seen or not. False: there is none.
 */
bool bitmap_next_dirty(const struct bitmap *b, uint64_t from, uint64_t end, uint64_t *ret_offset,
                       uint64_t *ret_len);

/* Any thread. Granules that are dirty, in bytes: the last one counts in full. Walks the tree. */
uint64_t bitmap_count(const struct bitmap *b);

/* Any thread. The bits from granule `first`, a multiple of 8, on: least significant first, clean beyond the size. */
void bitmap_read(const struct bitmap *b, uint64_t first, void *buf, size_t bytes);

/*
 * Any thread. The reverse: makes dirty what is set in `buf`, for granules from `first` on, a multiple of 64. What lies beyond the
 * size is left out. Never fails (BITMAP-2).
 */
void bitmap_write(struct bitmap *b, uint64_t first, const void *buf, size_t bytes);

/*
 * Drained, both. Makes dirty in `dst` what is dirty in `src`, rounded outward to dst's granules. Sizes and granularities may
 * differ; they may be the same one. -ENOMEM: all of that is done, but there was no memory to be exact (BITMAP-2).
 */
int bitmap_merge(struct bitmap *dst, const struct bitmap *src);

/* Drained. All clean; gives the memory back. */
void bitmap_clear(struct bitmap *b);
/* Drained. Beyond the old size all is clean, or dirty where no memory was to be had. Never fails. */
void bitmap_resize(struct bitmap *b, uint64_t size);

struct bitmap_stats {
    uint64_t nodes;        /* in use */
    uint64_t memory_bytes; /* allocated */
    uint64_t inexact;      /* how often there was no node to be had, since it was cleared */
};

void bitmap_get_stats(const struct bitmap *b, struct bitmap_stats *ret);

/* For tests. Drained: asserts that the tree is one, and that each node is in use once, or free. */
void bitmap_check(const struct bitmap *b);

#endif
