/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What was saved of a point: blocks in memory or in the scratch file, found by region of 64 KiB. Any thread.
 *
 * SAVED-1 Scratch space is given out in blocks, and again when the run that had it is gone and has no users. A run that was
 *         never inserted keeps its space for good: its write may have failed only for the one who waited, and come later.
 * SAVED-2 A free piece is a run without content, in the list of its length. Adjacent ones are not joined; when nothing is in
 *         use the file begins anew.
 */
#ifndef CAIRN_COPY_SAVED_H
#define CAIRN_COPY_SAVED_H

#include "base/list.h"
#include "loop/file.h"
#include "loop/lock.h"

#include <stdbool.h>
#include <stdint.h>

#define SAVED_REGION  ((uint64_t)64 << 10)
#define SAVED_BUCKETS 1024
#define SAVED_BLOCK   ((uint64_t)4096)
#define SAVED_LENGTHS (SAVED_REGION / SAVED_BLOCK)

/* A run of blocks within one region. Constant after saved_insert(). */
struct saved_run {
    struct list bucket_link;
    struct list age_link; /* those in memory, and those in scratch, oldest first */
    uint64_t offset;
    uint64_t len;
    uint64_t scratch_offset;
    uint64_t scratch_len; /* what it has of the scratch file; 0 if data is not NULL */
    uint8_t *data;
    unsigned users; /* Protected by the store's lock: readers at work. */
    bool removed;   /* the last user frees it */
};

struct saved {
    struct tiny_lock lock;
    struct list buckets[SAVED_BUCKETS]; /* Protected by lock, as all below. */
    struct list in_memory;
    struct list in_scratch;
    struct list holes[SAVED_LENGTHS]; /* of 1, 2, ... blocks */
    uint64_t memory_bytes;
    uint64_t scratch_bytes; /* in use */
    uint64_t scratch_end;   /* nothing beyond it was ever in use */
};

void saved_init(struct saved *s);
void saved_release(struct saved *s);

/* A run without a place. NULL: no memory. */
struct saved_run *saved_run_new(uint64_t offset, uint64_t len);
/* Takes memory, if there would be no more than max in use. */
bool saved_take_memory(struct saved *s, struct saved_run *run, uint64_t max);
/* Takes scratch space, below max, for the run or a first part of it, which it is shortened to then. -ENOSPC. */
int saved_take_scratch(struct saved *s, struct saved_run *run, uint64_t max);
void saved_insert(struct saved *s, struct saved_run *run);

/* The run that holds the block at `offset`, kept until saved_put(). NULL: there is none. */
struct saved_run *saved_get(struct saved *s, uint64_t offset);
void saved_put(struct saved *s, struct saved_run *run);

/* Forgets all runs that lie within the range. */
void saved_forget(struct saved *s, uint64_t offset, uint64_t len);

/* The oldest run in memory, if more than this is in use there; else the same of scratch. */
bool saved_oldest(struct saved *s, uint64_t memory_above, uint64_t scratch_above,
                  uint64_t *ret_offset, uint64_t *ret_len);

#endif
