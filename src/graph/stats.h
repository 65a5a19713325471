/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Statistics of one backend on one loop: counts, bytes, times, and a latency histogram per kind. Written by its loop alone;
 * queries read them from the control thread, each number by itself correct at some recent moment.
 */
#ifndef CAIRN_GRAPH_STATS_H
#define CAIRN_GRAPH_STATS_H

#include "base/atomic.h"
#include "base/macros.h"

#include <stdint.h>

enum stats_kind { STATS_READ, STATS_WRITE, STATS_FLUSH, STATS_UNMAP, STATS_KINDS };

/*
 * Buckets grow by a quarter of a power of two: bucket i < 4 holds i ns; above, 4 buckets per power. The last one holds all
 * above 2^40 ns, 18 minutes.
 */
#define STATS_BUCKETS 160

struct stats_of_kind {
    uint64_t operations; /* succeeded */
    uint64_t failed;
    uint64_t invalid; /* refused before submission */
    uint64_t bytes;
    uint64_t total_ns;
    uint64_t histogram[STATS_BUCKETS];
};

struct stats {
    struct stats_of_kind kind[STATS_KINDS];
    uint64_t last_ns;         /* when the last one ended; 0: none yet */
    uint64_t highest_written; /* the highest end of a write, bytes */
};

static inline unsigned stats_bucket(uint64_t ns)
{
    unsigned log;
    unsigned bucket;

    if (ns < 4)
        return (unsigned)ns;
    log = 63u - (unsigned)__builtin_clzll(ns);
    bucket = (log - 1) * 4 + (unsigned)((ns >> (log - 2)) & 3);
    return MIN(bucket, (unsigned)STATS_BUCKETS - 1);
}

/* The lowest latency of a bucket. */
static inline uint64_t stats_bucket_ns(unsigned bucket)
{
    if (bucket < 4)
        return bucket;
    return (uint64_t)(4 + bucket % 4) << (bucket / 4 - 1);
}

/* Relaxed: one writer, and readers who want no more than a recent value. */
/* NOLINTNEXTLINE(readability-non-const-parameter): the store is not seen */
static inline void stats_add(uint64_t *counter, uint64_t n)
{
    atomic_set_relaxed(counter, *counter + n);
}

static inline void stats_account(struct stats *s, enum stats_kind kind, uint64_t bytes,
                                 uint64_t began_ns, uint64_t now_ns, int result)
{
    struct stats_of_kind *k = &s->kind[kind];

    atomic_set_relaxed(&s->last_ns, now_ns); /* as stats_add() */
    if (result < 0) {
        stats_add(&k->failed, 1);
        return;
    }
    stats_add(&k->operations, 1);
    stats_add(&k->bytes, bytes);
    stats_add(&k->total_ns, now_ns - began_ns);
    stats_add(&k->histogram[stats_bucket(now_ns - began_ns)], 1);
}

/* Adds one to another, for sums over loops. */
void stats_sum(struct stats *sum, const struct stats *s);

#endif
