/* SPDX-License-Identifier: Apache-2.0 */
/*
 * How often each cluster of an image file is used, and how often its refcounts say that it is: for checks. Memory follows what
 * is in use (P5): a leaf of some 9 KiB for each 4096 clusters of which one is used or counted, more where a number is above 255,
 * and never more than `memory_max` in all (P6).
 */
#ifndef CAIRN_FORMATS_QCOW2_COUNTS_H
#define CAIRN_FORMATS_QCOW2_COUNTS_H

#include "base/macros.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define QCOW2_LEAF_BITS 12
#define QCOW2_LEAF      (1U << QCOW2_LEAF_BITS)

enum qcow2_count_of { QCOW2_USED, QCOW2_STORED, QCOW2_COUNTS };

enum qcow2_leaf_bits {
    QCOW2_LEAF_META,  /* holds metadata */
    QCOW2_LEAF_CLASH, /* ... and something else beside it */
    QCOW2_LEAF_BIT_KINDS,
};

struct qcow2_leaf {
    uint64_t index;               /* cluster >> QCOW2_LEAF_BITS */
    uint64_t *wide[QCOW2_COUNTS]; /* once a number is above 255: then they count */
    uint64_t bits[QCOW2_LEAF_BIT_KINDS][QCOW2_LEAF / 64];
    uint8_t narrow[QCOW2_COUNTS][QCOW2_LEAF];
};

struct qcow2_counts {
    struct qcow2_leaf **slots; /* a hash table, open, of a power of two */
    size_t slot_count;
    size_t leaf_count;
    struct qcow2_leaf *last; /* the one that was used last */
    uint64_t memory;         /* bytes */
    uint64_t memory_max;
};

/* Zeroed, with memory_max set, it is empty. */
void qcow2_counts_release(struct qcow2_counts *c);

/* The leaf of a cluster: NULL if there is none, or no memory for it. */
struct qcow2_leaf *qcow2_leaf_find_slow(struct qcow2_counts *c, uint64_t index);
struct qcow2_leaf *qcow2_leaf_make(struct qcow2_counts *c, uint64_t index);

static inline struct qcow2_leaf *qcow2_leaf_find(struct qcow2_counts *c, uint64_t cluster)
{
    uint64_t index = cluster >> QCOW2_LEAF_BITS;

    if (likely(c->last && c->last->index == index))
        return c->last;
    return qcow2_leaf_find_slow(c, index);
}

/* -ENOMEM. */
int qcow2_count_add(struct qcow2_counts *c, enum qcow2_count_of of, uint64_t cluster,
                    uint64_t times);
/* To less; what is not there is 0 already. */
void qcow2_count_sub(struct qcow2_counts *c, enum qcow2_count_of of, uint64_t cluster,
                     uint64_t times);

static inline uint64_t qcow2_leaf_count(const struct qcow2_leaf *l, enum qcow2_count_of of,
                                        unsigned i)
{
    return unlikely(l->wide[of]) ? l->wide[of][i] : l->narrow[of][i];
}

static inline uint64_t qcow2_count(struct qcow2_counts *c, enum qcow2_count_of of, uint64_t cluster)
{
    const struct qcow2_leaf *l = qcow2_leaf_find(c, cluster);

    return l ? qcow2_leaf_count(l, of, cluster & (QCOW2_LEAF - 1)) : 0;
}

static inline bool qcow2_leaf_bit(const struct qcow2_leaf *l, enum qcow2_leaf_bits which,
                                  unsigned i)
{
    return l->bits[which][i / 64] >> (i % 64) & 1;
}

static inline void qcow2_leaf_mark(struct qcow2_leaf *l, enum qcow2_leaf_bits which, unsigned i)
{
    l->bits[which][i / 64] |= UINT64_C(1) << (i % 64);
}

/* False also without a leaf. */
static inline bool qcow2_counts_bit(struct qcow2_counts *c, enum qcow2_leaf_bits which,
                                    uint64_t cluster)
{
    const struct qcow2_leaf *l = qcow2_leaf_find(c, cluster);

    return l && qcow2_leaf_bit(l, which, cluster & (QCOW2_LEAF - 1));
}

/* All leaves in the order of their clusters: an array that the caller frees; NULL without memory. */
struct qcow2_leaf **qcow2_counts_sorted(const struct qcow2_counts *c);

#endif
