/* SPDX-License-Identifier: Apache-2.0 */
/* Refcounts as they are on disk: the table, its blocks, and a small cache of them. All under alloc.lock. */
#include "base/alloc.h"
#include "base/checked.h"
#include "base/endian.h"
#include "base/macros.h"
#include "formats/qcow2/qcow2.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

/* Refcount blocks that are cached. */
#define BLOCKS_MAX 16
/* Refcounts are written in units of this. */
#define COUNT_UNIT 512

/* Less than a byte: the lowest bits are the first. */
uint64_t qcow2_count_get(const struct qcow2 *q, const uint8_t *bytes, uint64_t i)
{
    unsigned bits = 1u << q->refcount_order;

    switch (q->refcount_order) {
    case 3:
        return bytes[i];
    case 4:
        return load_be16(bytes + i * 2);
    case 5:
        return load_be32(bytes + i * 4);
    case 6:
        return load_be64(bytes + i * 8);
    default:
        return (bytes[i * bits / 8] >> (i * bits % 8)) & ((1u << bits) - 1);
    }
}

void qcow2_count_set(const struct qcow2 *q, uint8_t *bytes, uint64_t i, uint64_t value)
{
    unsigned bits = 1u << q->refcount_order;
    uint8_t *at = bytes + i * bits / 8;

    switch (q->refcount_order) {
    case 3:
        *at = (uint8_t)value;
        break;
    case 4:
        store_be16(at, (uint16_t)value);
        break;
    case 5:
        store_be32(at, (uint32_t)value);
        break;
    case 6:
        store_be64(at, value);
        break;
    default:
        *at =
            (uint8_t)((*at & ~(((1u << bits) - 1) << (i * bits % 8))) | (value << (i * bits % 8)));
    }
}

struct qcow2_refblock *qcow2_block_new(struct qcow2 *q, uint64_t index)
{
    struct qcow2_refblock *block = try_alloc(1, sizeof(*block) + (size_t)qcow2_cluster_size(q));

    if (block) {
        block->index = index;
        list_init(&block->link);
    }
    return block;
}

void qcow2_block_cache(struct qcow2 *q, struct qcow2_refblock *block)
{
    list_append(&q->alloc.blocks, &block->link);
    if (q->alloc.block_count++ < BLOCKS_MAX)
        return;
    block = list_entry(q->alloc.blocks.next, struct qcow2_refblock, link);
    list_remove(&block->link);
    free(block);
    q->alloc.block_count--;
}

/* It stays until the next call. */
int qcow2_block_get(struct qcow2 *q, const struct request *by, uint64_t index,
                    struct qcow2_refblock **ret)
{
    size_t bytes = (size_t)qcow2_cluster_size(q);
    uint64_t offset = q->alloc.table[index];
    struct qcow2_refblock *block;
    struct iobuf *b;
    int r;

    list_for_each (&q->alloc.blocks, block, link) {
        if (block->index == index) {
            list_remove(&block->link);
            list_append(&q->alloc.blocks, &block->link);
            *ret = block;
            return 0;
        }
    }
    if (!qcow2_is_cluster(q, offset))
        return qcow2_damaged(q,
                             "entry %" PRIu64 " of the refcount table points to %" PRIu64
                             ", where no refcount block can be",
                             index, offset);
    edge_co_announce(q->file, EVENT_REFBLOCK_LOAD, by);
    b = iobuf_new(bytes);
    block = qcow2_block_new(q, index);
    r = b && block ? qcow2_read_meta(q, by, offset, b, 0, bytes) : -ENOMEM;
    if (r == 0) {
        memcpy(block->bytes, b->data, bytes);
        qcow2_block_cache(q, block);
        *ret = take(&block);
    }
    free(block);
    iobuf_unref(b);
    return r;
}

/* Writes the part of a block that these entries are in. */
int qcow2_block_write(struct qcow2 *q, const struct request *by, uint64_t offset,
                      const struct qcow2_refblock *block, uint64_t first, uint64_t count)
{
    unsigned bits = 1u << q->refcount_order;
    uint64_t from = align_down(first * bits / 8, COUNT_UNIT);
    uint64_t to = align_up(((first + count) * bits + 7) / 8, COUNT_UNIT);
    struct iobuf *b = iobuf_new((size_t)(to - from));
    int r;

    if (!b)
        return -ENOMEM;
    edge_co_announce(q->file, EVENT_REFBLOCK_UPDATE_PART, by);
    memcpy(b->data, block->bytes + from, (size_t)(to - from));
    r = qcow2_guard_write(q, by, QCOW2_GUARD_REFCOUNT_BLOCK, offset + from, to - from);
    if (r == 0)
        r = qcow2_write_meta(q, by, offset + from, b, 0, (size_t)(to - from));
    iobuf_unref(b);
    return r;
}

/* What is added to counts that lie in [least, most]. */
struct change {
    uint64_t least;
    uint64_t most;
    int64_t add;
};

/* False if one of them does not lie there; it is left. */
static bool change_entries(const struct qcow2 *q, struct qcow2_refblock *block, uint64_t from,
                           uint64_t n, const struct change *c)
{
    bool all = true;

    for (uint64_t i = from; i < from + n; i++) {
        uint64_t value = qcow2_count_get(q, block->bytes, i);

        if (value >= c->least && value <= c->most)
            qcow2_count_set(q, block->bytes, i, value + (uint64_t)c->add);
        else
            all = false;
    }
    return all;
}

/*
 * In one block. After a failure they are in memory what they were: what was to be counted down is a leak then, or is counted down
 * again, and what was to be counted up is not used.
 */
static int co_fn change_in_block(struct qcow2 *q, const struct request *by, uint64_t index,
                                 uint64_t from, uint64_t n, const struct change *c)
{
    const struct change back = {c->least + (uint64_t)c->add, c->most + (uint64_t)c->add, -c->add};
    struct qcow2_refblock *block;
    bool all;
    int r = qcow2_block_get(q, by, index, &block);

    if (r < 0)
        return r;
    all = change_entries(q, block, from, n, c);
    r = qcow2_block_write(q, by, q->alloc.table[index], block, from, n);
    if (!all)
        (void)qcow2_damaged(q, "a refcount near cluster %" PRIu64 " is not what it must be",
                            index * qcow2_block_entries(q) + from);
    else if (r < 0)
        (void)change_entries(q, block, from, n, &back);
    return r;
}

static int co_fn change_counts(struct qcow2 *q, const struct request *by, struct qcow2_run *run,
                               const struct change *c)
{
    uint64_t entries = qcow2_block_entries(q);
    int r = 0;

    while (run->count && r == 0) {
        uint64_t index = run->first / entries;
        uint64_t from = run->first % entries;
        uint64_t n = MIN(run->count, entries - from);

        if (index >= q->alloc.table_size || !q->alloc.table[index])
            return qcow2_damaged(q, "cluster %" PRIu64 " is in use and has no refcount",
                                 run->first);
        r = change_in_block(q, by, index, from, n, c);
        if (r == 0) {
            run->first += n;
            run->count -= n;
        }
    }
    return r;
}

int qcow2_recount(struct qcow2 *q, const struct request *by, uint64_t first, uint64_t count,
                  unsigned was, unsigned becomes)
{
    const struct change c = {was, was, (int64_t)becomes - was};
    struct qcow2_run run = {.first = first, .count = count};

    return change_counts(q, by, &run, &c);
}

int qcow2_count_range(struct qcow2 *q, const struct request *by, uint64_t first, uint64_t count,
                      uint64_t *ret_least, uint64_t *ret_most)
{
    uint64_t entries = qcow2_block_entries(q);

    *ret_least = UINT64_MAX;
    *ret_most = 0;
    for (uint64_t c = first; c < first + count;) {
        uint64_t end = MIN(first + count, (c / entries + 1) * entries);
        struct qcow2_refblock *block;
        int r;

        if (c / entries >= q->alloc.table_size || !q->alloc.table[c / entries]) {
            *ret_least = 0;
            c = end;
            continue;
        }
        r = qcow2_block_get(q, by, c / entries, &block);
        if (r < 0)
            return r;
        for (; c < end; c++) {
            uint64_t value = qcow2_count_get(q, block->bytes, c % entries);

            *ret_least = MIN(*ret_least, value);
            *ret_most = MAX(*ret_most, value);
        }
    }
    return 0;
}

int qcow2_count_up(struct qcow2 *q, const struct request *by, uint64_t cluster)
{
    uint64_t index = cluster / qcow2_block_entries(q);
    uint64_t most = UINT64_MAX >> (64 - (1u << q->refcount_order));
    struct qcow2_refblock *block;
    uint64_t i = cluster % qcow2_block_entries(q);
    uint64_t value;
    int r;

    if (index >= q->alloc.table_size || !q->alloc.table[index])
        return qcow2_damaged(q, "cluster %" PRIu64 " is in use and has no refcount", cluster);
    r = qcow2_block_get(q, by, index, &block);
    if (r < 0)
        return r;
    value = qcow2_count_get(q, block->bytes, i);
    if (value == most)
        return 1;
    qcow2_count_set(q, block->bytes, i, value + 1);
    r = qcow2_block_write(q, by, q->alloc.table[index], block, i, 1);
    if (r < 0)
        qcow2_count_set(q, block->bytes, i, value); /* nobody uses it */
    return r;
}

int qcow2_count_down(struct qcow2 *q, const struct request *by, struct qcow2_run *run)
{
    const struct change c = {1, UINT64_MAX, -1};

    return change_counts(q, by, run, &c);
}

int qcow2_count_none(struct qcow2 *q, const struct request *by, struct qcow2_run *run)
{
    const struct change c = {1, 1, -1};

    return change_counts(q, by, run, &c);
}

int qcow2_refcount(struct qcow2 *q, const struct request *by, uint64_t host_offset, uint64_t *ret)
{
    uint64_t cluster = host_offset >> q->cluster_bits;
    uint64_t index = cluster / qcow2_block_entries(q);
    struct qcow2_refblock *block;
    int r = co_mutex_lock_until(&q->alloc.lock, LOOP_FOREVER);

    if (r < 0)
        return r;
    *ret = 0;
    if (index < q->alloc.table_size && q->alloc.table[index]) {
        r = qcow2_block_get(q, by, index, &block);
        if (r == 0)
            *ret = qcow2_count_get(q, block->bytes, cluster % qcow2_block_entries(q));
    }
    co_mutex_unlock(&q->alloc.lock);
    return r;
}

int qcow2_read_refcount_table(struct qcow2 *q, const struct request *by)
{
    struct qcow2_alloc *a = &q->alloc;
    size_t bytes = (size_t)a->table_size * QCOW2_ENTRY_LEN;
    struct iobuf *b = iobuf_new(bytes);
    int r = b ? qcow2_read_meta(q, by, a->table_offset, b, 0, bytes) : -ENOMEM;

    for (uint32_t i = 0; r == 0 && i < a->table_size; i++) {
        uint64_t entry = load_be64(b->data + (size_t)i * QCOW2_ENTRY_LEN);

        if (entry & QCOW2_REFCOUNT_TABLE_RESERVED_MASK || (entry && !qcow2_is_cluster(q, entry)))
            r = qcow2_damaged(q, "entry %" PRIu32 " of the refcount table is %#" PRIx64, i, entry);
        a->table[i] = entry;
    }
    iobuf_unref(b);
    return r;
}
