/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Letting the image's file grow. The new clusters are counted, with all that their counts need: blocks, and a larger refcount
 * table where the old one is full.
 *
 * GROW-1 All of it is durable before anybody gets a cluster: a crash leaks what it was made for (Q4).
 * GROW-2 A refcount block is durable before the table points to it, and a table before the header does.
 */
#include "base/alloc.h"
#include "base/checked.h"
#include "base/endian.h"
#include "base/macros.h"
#include "formats/qcow2/qcow2.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

/*
 * New clusters at the end of the file: blocks that their refcounts need, a table for these, then those that are wanted: last, so
 * that what is left of them can be given back.
 */
struct growth {
    uint64_t first;
    uint64_t wanted;
    uint64_t blocks;
    uint64_t table_clusters;
    uint64_t table_size; /* entries */
    struct list made;    /* struct qcow2_refblock, by index */
};

static bool has_block(const struct qcow2 *q, uint64_t index)
{
    return index < q->alloc.table_size && q->alloc.table[index];
}

static uint64_t growth_total(const struct growth *g)
{
    return g->wanted + g->blocks + g->table_clusters;
}

/* What needs refcounts itself; so round and round until it is enough. */
static int plan(struct qcow2 *q, struct growth *g)
{
    uint64_t entries = qcow2_block_entries(q);
    uint64_t total;

    do {
        uint64_t last;

        total = growth_total(g);
        last = (g->first + total - 1) / entries;
        g->blocks = 0;
        for (uint64_t i = g->first / entries; i <= last; i++)
            g->blocks += !has_block(q, i);
        if (last >= q->alloc.table_size) {
            uint64_t most = QCOW2_REFCOUNT_TABLE_BYTES_MAX / QCOW2_ENTRY_LEN;
            uint64_t size = MAX(last + 1, MIN((uint64_t)q->alloc.table_size * 2, most));

            g->table_clusters =
                (size * QCOW2_ENTRY_LEN + qcow2_cluster_size(q) - 1) >> q->cluster_bits;
            g->table_size = (g->table_clusters << q->cluster_bits) / QCOW2_ENTRY_LEN;
        }
    } while (growth_total(g) != total);
    if (g->table_size * QCOW2_ENTRY_LEN > QCOW2_REFCOUNT_TABLE_BYTES_MAX)
        return -EFBIG;
    return 0;
}

/* Behind clusters that are counted although nobody can have written there. */
static int co_fn find_place(struct qcow2 *q, const struct request *by, struct growth *g)
{
    uint64_t entries = qcow2_block_entries(q);
    int r;

    g->first = q->alloc.end;
    for (uint64_t c = g->first; c < g->first + g->wanted; c++) {
        struct qcow2_refblock *block;

        if (!has_block(q, c / entries)) {
            c = (c / entries + 1) * entries - 1;
            continue;
        }
        r = qcow2_block_get(q, by, c / entries, &block);
        if (r < 0)
            return r;
        for (; c < g->first + g->wanted; c++) {
            if (qcow2_count_get(q, block->bytes, c % entries))
                g->first = c + 1;
            if (c % entries == entries - 1)
                break;
        }
    }
    return plan(q, g);
}

/* A file that does not grow has the room that it has. */
static int fit(struct qcow2 *q, struct growth *g, uint64_t least)
{
    uint64_t size = node_size(edge_node(q->file)) >> q->cluster_bits;
    int r = 0;

    while (r == 0 && !q->alloc.grows && g->first + growth_total(g) > size) {
        if (g->wanted <= least)
            return -ENOSPC;
        g->wanted = MAX(least, g->wanted / 2);
        r = plan(q, g);
    }
    if (g->first + growth_total(g) > QCOW2_HOST_OFFSET_END >> q->cluster_bits)
        return -EFBIG;
    return r;
}

static uint64_t new_block_offset(const struct qcow2 *q, const struct growth *g, uint64_t number)
{
    return (g->first + number) << q->cluster_bits;
}

/* Counts the clusters [first, end) in a block. */
static int co_fn count_in_block(struct qcow2 *q, const struct request *by,
                                struct qcow2_refblock *block, uint64_t offset, bool whole,
                                uint64_t first, uint64_t end)
{
    uint64_t base = block->index * qcow2_block_entries(q);
    uint64_t from = MAX(first, base) - base;
    uint64_t to = MIN(end, base + qcow2_block_entries(q)) - base;

    for (uint64_t i = from; i < to; i++)
        qcow2_count_set(q, block->bytes, i, 1);
    if (whole)
        return qcow2_block_write(q, by, offset, block, 0, qcow2_block_entries(q));
    return qcow2_block_write(q, by, offset, block, from, to - from);
}

static int co_fn write_counts(struct qcow2 *q, const struct request *by, struct growth *g)
{
    uint64_t end = g->first + growth_total(g);
    uint64_t entries = qcow2_block_entries(q);
    uint64_t number = 0;
    int r = 0;

    for (uint64_t i = g->first / entries; r == 0 && i <= (end - 1) / entries; i++) {
        struct qcow2_refblock *block = NULL;

        if (has_block(q, i)) {
            r = qcow2_block_get(q, by, i, &block);
            if (r == 0)
                r = count_in_block(q, by, block, q->alloc.table[i], false, g->first, end);
            continue;
        }
        block = qcow2_block_new(q, i);
        if (!block)
            return -ENOMEM;
        list_append(&g->made, &block->link);
        r = count_in_block(q, by, block, new_block_offset(q, g, number++), true, g->first, end);
    }
    return r;
}

static int co_fn write_table(struct qcow2 *q, const struct request *by, const uint64_t *table,
                             uint64_t offset, uint64_t first, uint64_t count)
{
    struct iobuf *b = iobuf_new((size_t)(count * QCOW2_ENTRY_LEN));
    int r;

    if (!b)
        return -ENOMEM;
    for (uint64_t i = 0; i < count; i++)
        store_be64(b->data + i * QCOW2_ENTRY_LEN, table[first + i]);
    r = qcow2_guard_write(q, by, QCOW2_GUARD_REFCOUNT_TABLE, offset + first * QCOW2_ENTRY_LEN,
                          count * QCOW2_ENTRY_LEN);
    if (r == 0)
        r = qcow2_write_meta(q, by, offset + first * QCOW2_ENTRY_LEN, b, 0,
                             (size_t)(count * QCOW2_ENTRY_LEN));
    iobuf_unref(b);
    return r;
}

static int co_fn point_header_to(struct qcow2 *q, const struct request *by, uint64_t offset,
                                 uint64_t clusters)
{
    struct iobuf *b = iobuf_new(12);
    int r;

    if (!b)
        return -ENOMEM;
    store_be64(b->data, offset);
    store_be32(b->data + 8, (uint32_t)clusters);
    r = qcow2_write_meta(q, by, QCOW2_OFFSET_REFCOUNT_TABLE_OFFSET, b, 0, 12);
    iobuf_unref(b);
    return r;
}

/* The blocks and the table are durable: ALLOC-4. */
static int co_fn change_table(struct qcow2 *q, const struct request *by, const struct growth *g,
                              uint64_t *table)
{
    uint64_t offset = (g->first + g->blocks) << q->cluster_bits;
    uint64_t old = q->alloc.table_offset;
    uint64_t old_clusters = (uint64_t)q->alloc.table_size * QCOW2_ENTRY_LEN >> q->cluster_bits;
    int r;

    edge_co_announce(q->file, EVENT_REFBLOCK_ALLOC_SWITCH_TABLE, by);
    r = point_header_to(q, by, offset, g->table_clusters);
    if (r == 0)
        r = qcow2_sync(q, by);
    if (r < 0)
        return r;
    free(q->alloc.table);
    q->alloc.table = table;
    q->alloc.table_size = (uint32_t)g->table_size;
    q->alloc.table_offset = offset;
    qcow2_guard_set_single(q, QCOW2_SINGLE_REFCOUNT_TABLE, offset, g->table_size * QCOW2_ENTRY_LEN);
    qcow2_alloc_put_table_locked(q, by, old, old_clusters);
    return 0;
}

static int co_fn extend_table(struct qcow2 *q, const struct request *by, const struct growth *g)
{
    uint64_t first = g->first / qcow2_block_entries(q);
    uint64_t last = (g->first + growth_total(g) - 1) / qcow2_block_entries(q);
    uint64_t unit = QCOW2_L1_UNIT / QCOW2_ENTRY_LEN;
    int r;

    first = align_down(first, unit);
    last = MIN(align_up(last + 1, unit), (uint64_t)q->alloc.table_size);
    edge_co_announce(q->file, EVENT_REFTABLE_UPDATE, by);
    r = write_table(q, by, q->alloc.table, q->alloc.table_offset, first, last - first);
    return r < 0 ? r : qcow2_sync(q, by);
}

static uint64_t *grown_table(const struct qcow2 *q, const struct growth *g)
{
    uint64_t *table = try_new_n(uint64_t, (size_t)g->table_size);

    if (table)
        memcpy(table, q->alloc.table, (size_t)q->alloc.table_size * sizeof(*table));
    return table;
}

static void enter_blocks(const struct qcow2 *q, const struct growth *g, uint64_t *table, bool enter)
{
    const struct qcow2_refblock *block;
    uint64_t number = 0;

    list_for_each (&g->made, block, link) {
        uint64_t offset = new_block_offset(q, g, number++);

        table[block->index] = enter ? offset : 0;
    }
}

/* New blocks and, if there is to be one, the new table; all durable before anything points to them. */
static int co_fn write_new(struct qcow2 *q, const struct request *by, struct growth *g,
                           uint64_t *table)
{
    uint64_t end = (g->first + growth_total(g)) << q->cluster_bits;
    struct request grow = request_for(by, REQUEST_RESIZE, end, 0);
    int r;

    grow.flags = REQUEST_GROW;
    r = q->alloc.grows ? edge_co_request(q->file, &grow) : 0;
    if (g->blocks)
        edge_co_announce(q->file, EVENT_REFBLOCK_ALLOC_WRITE_BLOCKS, by);
    if (r == 0)
        r = write_counts(q, by, g);
    if (r == 0 && table) {
        edge_co_announce(q->file, EVENT_REFBLOCK_ALLOC_WRITE_TABLE, by);
        enter_blocks(q, g, table, true);
        r = write_table(q, by, table, (g->first + g->blocks) << q->cluster_bits, 0, g->table_size);
    }
    return r < 0 ? r : qcow2_sync(q, by);
}

/* GUARD-2 */
static int co_fn guard_blocks(struct qcow2 *q, const struct growth *g)
{
    uint64_t n = 0;
    int r = 0;

    while (n < g->blocks && r == 0)
        r = qcow2_guard_add(q, QCOW2_GUARD_REFCOUNT_BLOCK, new_block_offset(q, g, n++));
    if (r < 0) { /* the place may become something else */
        while (--n > 0)
            qcow2_guard_remove(q, QCOW2_GUARD_REFCOUNT_BLOCK, new_block_offset(q, g, n - 1));
    }
    return r;
}

static int co_fn link_new(struct qcow2 *q, const struct request *by, struct growth *g,
                          uint64_t **table)
{
    int r;

    if (*table) {
        r = change_table(q, by, g, *table);
        if (r == 0)
            *table = NULL;
        return r;
    }
    if (list_empty(&g->made))
        return 0;
    enter_blocks(q, g, q->alloc.table, true);
    r = extend_table(q, by, g);
    if (r < 0)
        enter_blocks(q, g, q->alloc.table, false);
    return r;
}

/*
 * After a failure nothing points there, and it is as if nobody had tried, but for what the disk may say: that is put right when the
 * node is closed.
 */
static void forget_counts(struct qcow2 *q, const struct growth *g)
{
    uint64_t entries = qcow2_block_entries(q);
    uint64_t end = g->first + g->wanted;
    struct qcow2_refblock *block;

    list_for_each (&q->alloc.blocks, block, link) {
        uint64_t base = block->index * entries;

        for (uint64_t c = MAX(g->first, base); c < MIN(end, base + entries); c++)
            qcow2_count_set(q, block->bytes, c - base, 0);
    }
    q->alloc.tried_end = MAX(q->alloc.tried_end, end);
}

int qcow2_grow_settle(struct qcow2 *q, const struct request *by)
{
    uint64_t entries = qcow2_block_entries(q);
    uint64_t n;
    int r = 0;

    for (uint64_t c = q->alloc.end; r == 0 && c < q->alloc.tried_end; c += n) {
        struct qcow2_refblock *block;

        n = MIN(entries - c % entries, q->alloc.tried_end - c);
        if (!has_block(q, c / entries))
            continue;
        r = qcow2_block_get(q, by, c / entries, &block);
        if (r < 0)
            break;
        for (uint64_t i = 0; i < n; i++)
            qcow2_count_set(q, block->bytes, c % entries + i, 0);
        r = qcow2_block_write(q, by, q->alloc.table[block->index], block, c % entries, n);
    }
    return r;
}

/*
 * Makes `wanted` clusters at the end of the file ready, or fewer, but not less than `least`. If the table or the header may
 * point there after a failure, the place is not used again.
 */
int qcow2_grow(struct qcow2 *q, const struct request *by, uint64_t wanted, uint64_t least,
               struct qcow2_extent *ret)
{
    struct growth g = {.wanted = wanted};
    struct qcow2_refblock *block;
    uint64_t *table = NULL;
    int r;

    list_init(&g.made);
    r = find_place(q, by, &g);
    if (r == 0)
        r = fit(q, &g, least);
    if (g.blocks)
        edge_co_announce(q->file, EVENT_REFBLOCK_ALLOC, by);
    if (r == 0 && g.table_clusters) {
        edge_co_announce(q->file, EVENT_REFTABLE_GROW, by);
        table = grown_table(q, &g);
        r = table ? 0 : -ENOMEM;
    }
    if (r < 0)
        return r;
    r = qcow2_guard_free(q, by, g.first, growth_total(&g));
    if (r == 0)
        r = write_new(q, by, &g, table);
    if (r == 0)
        r = guard_blocks(q, &g);
    if (r < 0)
        forget_counts(q, &g);
    if (r == 0) {
        q->alloc.end = g.first + growth_total(&g);
        qcow2_online_counted(q, g.first, growth_total(&g));
        r = link_new(q, by, &g, &table);
    }
    free(table);
    while ((block = list_first(&g.made, struct qcow2_refblock, link))) {
        list_remove(&block->link);
        if (r == 0)
            qcow2_block_cache(q, block);
        else
            free(block);
    }
    ret->host_offset = (g.first + g.blocks + g.table_clusters) << q->cluster_bits;
    ret->count = g.wanted;
    ret->fresh = q->alloc.grows;
    return r;
}
