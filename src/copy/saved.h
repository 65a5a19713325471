/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What was saved of a point: blocks in memory or in the scratch file, found by region of 64 KiB. Any thread.
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

/* A run of blocks within one region. Constant after saved_insert(). */
struct saved_run {
    struct list bucket_link;
    struct list age_link; /* those in memory, oldest first */
    uint64_t offset;
    uint64_t len;
    uint64_t scratch_offset; /* if data is NULL */
    uint8_t *data;
    unsigned users; /* Protected by the store's lock: readers at work. */
    bool removed;   /* the last user frees it */
};

struct saved {
    struct tiny_lock lock;
    struct list buckets[SAVED_BUCKETS]; /* Protected by lock, as all below. */
    struct list in_memory;
    uint64_t memory_bytes;
};

void saved_init(struct saved *s);
void saved_release(struct saved *s);

/* A run with memory for its data if `in_memory`. NULL: no memory. */
struct saved_run *saved_run_new(uint64_t offset, uint64_t len, bool in_memory);
void saved_insert(struct saved *s, struct saved_run *run);

/* The run that holds the block at `offset`, kept until saved_put(). NULL: there is none. */
struct saved_run *saved_get(struct saved *s, uint64_t offset);
void saved_put(struct saved *s, struct saved_run *run);

/* Forgets all runs that lie within the range. */
void saved_forget(struct saved *s, uint64_t offset, uint64_t len);

/* Reserves memory: false if there would be more than max. saved_insert() of a run takes the reservation over. */
bool saved_reserve(struct saved *s, uint64_t bytes, uint64_t max);
/* The oldest run in memory, if more than `above` bytes are in use. */
bool saved_oldest(struct saved *s, uint64_t above, uint64_t *ret_offset, uint64_t *ret_len);

#endif
