/* SPDX-License-Identifier: Apache-2.0 */
/* Sparse counters of clusters. */
#include "formats/qcow2/check/qcow2-counts.h"
#include "base/alloc.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define SLOTS_MIN  64
#define NARROW_MAX 255

static size_t slot_of(const struct qcow2_counts *c, uint64_t index)
{
    return (size_t)(index * UINT64_C(0x9e3779b97f4a7c15) >> 20) & (c->slot_count - 1);
}

/* The slot where it is, or would be; there is a free one. */
static struct qcow2_leaf **probe(const struct qcow2_counts *c, uint64_t index)
{
    size_t i = slot_of(c, index);

    while (c->slots[i] && c->slots[i]->index != index)
        i = (i + 1) & (c->slot_count - 1);
    return &c->slots[i];
}

/* Counts against the bound; NULL when that is reached, too. */
static void *bounded_alloc(struct qcow2_counts *c, size_t count, size_t size)
{
    void *p;

    if (c->memory + (uint64_t)count * size > c->memory_max)
        return NULL;
    p = try_alloc(count, size);
    if (p)
        c->memory += (uint64_t)count * size;
    return p;
}

static int grow_slots(struct qcow2_counts *c)
{
    struct qcow2_counts old = *c;
    size_t count = MAX(old.slot_count * 2, (size_t)SLOTS_MIN);
    struct qcow2_leaf **slots = bounded_alloc(c, count, sizeof(struct qcow2_leaf *));

    if (!slots)
        return -ENOMEM;
    c->slots = slots;
    c->slot_count = count;
    for (size_t i = 0; i < old.slot_count; i++) {
        if (old.slots[i])
            *probe(c, old.slots[i]->index) = old.slots[i];
    }
    c->memory -= old.slot_count * sizeof(struct qcow2_leaf *);
    free(old.slots);
    return 0;
}

struct qcow2_leaf *qcow2_leaf_find_slow(struct qcow2_counts *c, uint64_t index)
{
    struct qcow2_leaf *l = c->slot_count ? *probe(c, index) : NULL;

    if (l)
        c->last = l;
    return l;
}

struct qcow2_leaf *qcow2_leaf_make(struct qcow2_counts *c, uint64_t index)
{
    struct qcow2_leaf *l = qcow2_leaf_find_slow(c, index);

    if (l)
        return l;
    if (c->leaf_count >= c->slot_count / 2 && grow_slots(c) < 0)
        return NULL;
    l = bounded_alloc(c, 1, sizeof(*l));
    if (!l)
        return NULL;
    l->index = index;
    *probe(c, index) = l;
    c->leaf_count++;
    c->last = l;
    return l;
}

static int widen(struct qcow2_counts *c, struct qcow2_leaf *l, enum qcow2_count_of of)
{
    l->wide[of] = bounded_alloc(c, QCOW2_LEAF, sizeof(uint64_t));
    if (!l->wide[of])
        return -ENOMEM;
    for (unsigned i = 0; i < QCOW2_LEAF; i++)
        l->wide[of][i] = l->narrow[of][i];
    return 0;
}

int qcow2_count_add(struct qcow2_counts *c, enum qcow2_count_of of, uint64_t cluster,
                    uint64_t times)
{
    unsigned i = cluster & (QCOW2_LEAF - 1);
    struct qcow2_leaf *l = qcow2_leaf_find(c, cluster);

    if (!l)
        l = qcow2_leaf_make(c, cluster >> QCOW2_LEAF_BITS);
    if (!l)
        return -ENOMEM;
    if (!l->wide[of]) {
        if (times <= (uint64_t)(NARROW_MAX - l->narrow[of][i])) {
            l->narrow[of][i] = (uint8_t)(l->narrow[of][i] + times);
            return 0;
        }
        if (widen(c, l, of) < 0)
            return -ENOMEM;
    }
    l->wide[of][i] += MIN(times, UINT64_MAX - l->wide[of][i]);
    return 0;
}

void qcow2_count_sub(struct qcow2_counts *c, enum qcow2_count_of of, uint64_t cluster,
                     uint64_t times)
{
    unsigned i = cluster & (QCOW2_LEAF - 1);
    struct qcow2_leaf *l = qcow2_leaf_find(c, cluster);
    uint64_t left;

    if (!l)
        return;
    left = qcow2_leaf_count(l, of, i);
    left -= MIN(left, times);
    if (l->wide[of])
        l->wide[of][i] = left;
    else
        l->narrow[of][i] = (uint8_t)left;
}

static int compare_leaves(const void *a, const void *b)
{
    const struct qcow2_leaf *const *x = a;
    const struct qcow2_leaf *const *y = b;

    return ((*x)->index > (*y)->index) - ((*x)->index < (*y)->index);
}

struct qcow2_leaf **qcow2_counts_sorted(const struct qcow2_counts *c)
{
    struct qcow2_leaf **v = try_new_n(struct qcow2_leaf *, c->leaf_count + 1);
    size_t n = 0;

    if (!v)
        return NULL;
    for (size_t i = 0; i < c->slot_count; i++) {
        if (c->slots[i])
            v[n++] = c->slots[i];
    }
    qsort(v, n, sizeof(struct qcow2_leaf *), compare_leaves);
    return v;
}

void qcow2_counts_release(struct qcow2_counts *c)
{
    for (size_t i = 0; i < c->slot_count; i++) {
        if (!c->slots[i])
            continue;
        for (unsigned of = 0; of < QCOW2_COUNTS; of++)
            free(c->slots[i]->wide[of]);
        free(c->slots[i]);
    }
    free(c->slots);
    *c = (struct qcow2_counts){.memory_max = c->memory_max};
}
