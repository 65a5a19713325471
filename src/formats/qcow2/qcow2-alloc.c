/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Host clusters: who has them, in memory and on disk.
 *
 * Writers take clusters from a pool. The pool is filled, under alloc.lock, from what was freed, from clusters that the refcounts
 * call free, and by letting the file grow.
 *
 * ALLOC-1 What is fresh was never used, reads as zeroes, and is counted durably, in batches: a crash leaks what is left (Q4).
 * ALLOC-2 What is to be reused has refcount 1 at least in the image's blocks, written before it is handed out. Mappings to it are
 *         written after a device flush that covers that (FLUSH-1).
 * ALLOC-3 What was freed keeps its refcount until no mapping on disk points to it and no request that found one is on its way
 *         (Q1). Then it is reused, or its refcount becomes 0.
 * ALLOC-4 A refcount block is durable before the table points to it, and a table before the header does.
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

/* The file grows by so much at a time: at first, and at most. */
#define BATCH_FIRST (1 * MIB)
#define BATCH_MAX   (64 * MIB)
/* What is kept for reuse rather than counted down: at most so many bytes. */
#define REUSE_MAX (64 * MIB)
/* Refcount blocks that are cached. */
#define BLOCKS_MAX 16
/* Blocks that are looked through for free clusters before the file grows. */
#define SCAN_BLOCKS 4
/* Refcounts are written in units of this. */
#define COUNT_UNIT 512

/* ---- refcounts ---- */

static uint64_t block_entries(const struct qcow2 *q)
{
    return (qcow2_cluster_size(q) * 8) >> q->refcount_order;
}

/* Less than a byte: the lowest bits are the first. */
static uint64_t count_get(const struct qcow2 *q, const uint8_t *bytes, uint64_t i)
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

static void count_set(const struct qcow2 *q, uint8_t *bytes, uint64_t i, unsigned value)
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
        store_be32(at, value);
        break;
    case 6:
        store_be64(at, value);
        break;
    default:
        *at =
            (uint8_t)((*at & ~(((1u << bits) - 1) << (i * bits % 8))) | (value << (i * bits % 8)));
    }
}

static struct qcow2_refblock *block_new(struct qcow2 *q, uint64_t index)
{
    struct qcow2_refblock *block = try_alloc(1, sizeof(*block) + (size_t)qcow2_cluster_size(q));

    if (block) {
        block->index = index;
        list_init(&block->link);
    }
    return block;
}

static void block_cache(struct qcow2 *q, struct qcow2_refblock *block)
{
    list_append(&q->alloc.blocks, &block->link);
    if (q->alloc.block_count++ < BLOCKS_MAX)
        return;
    block = list_first(&q->alloc.blocks, struct qcow2_refblock, link);
    list_remove(&block->link);
    free(block);
    q->alloc.block_count--;
}

/* It stays until the next call. */
static int co_fn block_get(struct qcow2 *q, const struct request *by, uint64_t index,
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
    b = iobuf_new(bytes);
    block = block_new(q, index);
    r = b && block ? qcow2_read_meta(q, by, offset, b, 0, bytes) : -ENOMEM;
    if (r == 0) {
        memcpy(block->bytes, b->data, bytes);
        block_cache(q, block);
        *ret = take(&block);
    }
    free(block);
    iobuf_unref(b);
    return r;
}

/* Writes the part of a block that these entries are in. */
static int co_fn block_write(struct qcow2 *q, const struct request *by, uint64_t offset,
                             const struct qcow2_refblock *block, uint64_t first, uint64_t count)
{
    unsigned bits = 1u << q->refcount_order;
    uint64_t from = align_down(first * bits / 8, COUNT_UNIT);
    uint64_t to = align_up(((first + count) * bits + 7) / 8, COUNT_UNIT);
    struct iobuf *b = iobuf_new((size_t)(to - from));
    int r;

    if (!b)
        return -ENOMEM;
    memcpy(b->data, block->bytes + from, (size_t)(to - from));
    r = qcow2_write_meta(q, by, offset + from, b, 0, (size_t)(to - from));
    iobuf_unref(b);
    return r;
}

/* The counts of clusters that have a block each, from `was` to `becomes`; what is otherwise is left, and told. */
static int co_fn recount(struct qcow2 *q, const struct request *by, uint64_t first, uint64_t count,
                         unsigned was, unsigned becomes)
{
    uint64_t entries = block_entries(q);
    int r = 0;

    while (count && r == 0) {
        uint64_t index = first / entries;
        uint64_t in_block = first % entries;
        uint64_t n = MIN(count, entries - in_block);
        struct qcow2_refblock *block;
        bool other = false;

        if (index >= q->alloc.table_size || !q->alloc.table[index])
            return qcow2_damaged(q, "cluster %" PRIu64 " is in use and has no refcount", first);
        r = block_get(q, by, index, &block);
        for (uint64_t i = in_block; r == 0 && i < in_block + n; i++) {
            if (count_get(q, block->bytes, i) == was)
                count_set(q, block->bytes, i, becomes);
            else
                other = true;
        }
        if (r == 0)
            r = block_write(q, by, q->alloc.table[index], block, in_block, n);
        if (other)
            (void)qcow2_damaged(q, "a refcount near cluster %" PRIu64 " is not %u", first, was);
        first += n;
        count -= n;
    }
    return r;
}

int qcow2_refcount(struct qcow2 *q, const struct request *by, uint64_t host_offset, uint64_t *ret)
{
    uint64_t cluster = host_offset >> q->cluster_bits;
    uint64_t index = cluster / block_entries(q);
    struct qcow2_refblock *block;
    int r = co_mutex_lock_until(&q->alloc.lock, LOOP_FOREVER);

    if (r < 0)
        return r;
    *ret = 0;
    if (index < q->alloc.table_size && q->alloc.table[index]) {
        r = block_get(q, by, index, &block);
        if (r == 0)
            *ret = count_get(q, block->bytes, cluster % block_entries(q));
    }
    co_mutex_unlock(&q->alloc.lock);
    return r;
}

/* ---- the pool ---- */

static struct qcow2_run *run_new(uint64_t first, uint64_t count)
{
    struct qcow2_run *run = try_new(struct qcow2_run);

    if (!run)
        return NULL;
    run->first = first;
    run->count = count;
    list_init(&run->link);
    return run;
}

/* Appends, or lengthens the last one. */
static void run_append(struct list *l, struct qcow2_run *run)
{
    struct qcow2_run *last = list_last(l, struct qcow2_run, link);

    if (last && last->first + last->count == run->first && last->ticket == run->ticket) {
        last->count += run->count;
        free(run);
    } else {
        list_append(l, &run->link);
    }
}

static bool take_reuse_locked(struct qcow2 *q, uint64_t want, bool less, struct qcow2_extent *ret)
{
    struct qcow2_run *run;

    list_for_each (&q->alloc.reuse, run, link) {
        uint64_t n = MIN(want, run->count);

        if (n < want && !less)
            continue;
        *ret = (struct qcow2_extent){.host_offset = run->first << q->cluster_bits, .count = n};
        run->first += n;
        run->count -= n;
        q->alloc.reuse_count -= n;
        if (!run->count) {
            list_remove(&run->link);
            free(run);
        }
        return true;
    }
    return false;
}

static bool take_fresh_locked(struct qcow2 *q, uint64_t want, struct qcow2_extent *ret)
{
    uint64_t n = MIN(want, q->alloc.fresh_end - q->alloc.fresh);

    *ret = (struct qcow2_extent){
        .host_offset = q->alloc.fresh << q->cluster_bits, .count = n, .fresh = q->alloc.grows};
    q->alloc.fresh += n;
    return n;
}

static bool take_from_pool(struct qcow2 *q, uint64_t want, struct qcow2_extent *ret)
{
    bool got;

    tiny_lock_acquire(&q->lock);
    got = take_reuse_locked(q, want, false, ret) || take_fresh_locked(q, want, ret) ||
          take_reuse_locked(q, want, true, ret);
    tiny_lock_release(&q->lock);
    return got;
}

static bool pool_is_empty(struct qcow2 *q)
{
    bool empty;

    tiny_lock_acquire(&q->lock);
    empty = !q->alloc.reuse_count && q->alloc.fresh == q->alloc.fresh_end;
    tiny_lock_release(&q->lock);
    return empty;
}

static void reuse(struct qcow2 *q, struct qcow2_run *run)
{
    run->ticket = 0;
    tiny_lock_acquire(&q->lock);
    q->alloc.reuse_count += run->count;
    run_append(&q->alloc.reuse, run);
    tiny_lock_release(&q->lock);
}

void qcow2_alloc_put(struct qcow2 *q, uint64_t host_offset, uint64_t count)
{
    struct qcow2_run *run = run_new(host_offset >> q->cluster_bits, count);

    /* G9: the host may still write there. Without memory they leak, too, as after a crash. */
    if (!run || node_has_unresolved(edge_node(q->file)))
        free(run);
    else
        reuse(q, run);
}

void qcow2_free_locked(struct qcow2 *q, struct qcow2_run *run)
{
    run_append(&q->alloc.freed, run);
}

/* ---- what was freed ---- */

static struct qcow2_run *next_graced(struct qcow2 *q)
{
    struct qcow2_run *run;

    tiny_lock_acquire(&q->lock);
    run = list_first(&q->alloc.graced, struct qcow2_run, link);
    if (run && !epoch_has_passed(node_epoch(q->node), run->ticket))
        run = NULL;
    if (run)
        list_remove(&run->link);
    tiny_lock_release(&q->lock);
    return run;
}

/* ALLOC-3, under alloc.lock. */
static int co_fn settle_run(struct qcow2 *q, const struct request *by, struct qcow2_run *run)
{
    struct request discard = request_for(by, REQUEST_DISCARD, run->first << q->cluster_bits,
                                         run->count << q->cluster_bits);
    bool keep;
    int r;

    if (node_settings(q->node)->unmap) {
        r = edge_co_request(q->file, &discard);
        if (r == -ECANCELED || r == -ERESTART) {
            tiny_lock_acquire(&q->lock);
            list_prepend(&q->alloc.graced, &run->link);
            tiny_lock_release(&q->lock);
            return r;
        }
    }
    tiny_lock_acquire(&q->lock);
    keep = q->alloc.reuse_count + run->count <= REUSE_MAX >> q->cluster_bits;
    tiny_lock_release(&q->lock);
    if (keep) {
        reuse(q, run);
        return 0;
    }
    r = recount(q, by, run->first, run->count, 1, 0);
    q->alloc.scan = MIN(q->alloc.scan, run->first);
    free(run);
    return r;
}

static int co_fn settle_locked(struct qcow2 *q, const struct request *by)
{
    struct qcow2_run *run;
    int r = 0;

    while (r == 0 && (run = next_graced(q)))
        r = settle_run(q, by, run);
    return r;
}

int qcow2_alloc_settle(struct qcow2 *q, const struct request *by)
{
    bool any;
    int r;

    tiny_lock_acquire(&q->lock);
    any = !list_empty(&q->alloc.graced);
    tiny_lock_release(&q->lock);
    if (!any)
        return 0;
    r = co_mutex_lock_until(&q->alloc.lock, LOOP_FOREVER);
    if (r < 0)
        return r;
    r = settle_locked(q, by);
    co_mutex_unlock(&q->alloc.lock);
    return r;
}

/* ---- clusters that the refcounts call free ---- */

/* Takes the first run of free clusters at or after alloc.scan in its block. */
static int co_fn scan_block(struct qcow2 *q, const struct request *by, struct qcow2_refblock *block)
{
    struct qcow2_alloc *a = &q->alloc;
    uint64_t entries = block_entries(q);
    uint64_t base = block->index * entries;
    uint64_t end = MIN(entries, a->end - base);
    uint64_t first = a->scan - base;
    struct qcow2_run *run;
    uint64_t n = 0;
    int r;

    while (first < end && count_get(q, block->bytes, first))
        first++;
    while (first + n < end && n < a->batch && !count_get(q, block->bytes, first + n))
        n++;
    a->scan = base + first + n;
    if (first == end)
        a->scan = base + entries;
    if (!n)
        return 0;
    run = run_new(base + first, n);
    r = run ? recount(q, by, base + first, n, 0, 1) : -ENOMEM;
    if (r < 0)
        free(run); /* a leak, if some of it was written */
    else
        reuse(q, run);
    return r;
}

static int co_fn scan(struct qcow2 *q, const struct request *by)
{
    struct qcow2_alloc *a = &q->alloc;
    int r = 0;

    for (unsigned i = 0; r == 0 && i < SCAN_BLOCKS && a->scan < a->end; i++) {
        uint64_t index = a->scan / block_entries(q);
        struct qcow2_refblock *block;

        if (index >= a->table_size || !a->table[index]) {
            a->scan = (index + 1) * block_entries(q); /* no refcounts: left alone */
            continue;
        }
        r = block_get(q, by, index, &block);
        if (r == 0)
            r = scan_block(q, by, block);
        if (r == 0 && !pool_is_empty(q))
            break;
    }
    return r;
}

/* ---- growing ---- */

/* New clusters at the end of the file: those that are wanted, then blocks that their refcounts need, then a table for these. */
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
    uint64_t entries = block_entries(q);
    uint64_t total;

    do {
        uint64_t last;

        total = growth_total(g);
        last = (g->first + total - 1) / entries;
        g->blocks = 0;
        for (uint64_t i = g->first / entries; i <= last; i++)
            g->blocks += !has_block(q, i);
        if (last >= q->alloc.table_size) {
            uint64_t size = MAX(last + 1, (uint64_t)q->alloc.table_size * 2);

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
    uint64_t entries = block_entries(q);
    int r;

    g->first = q->alloc.end;
    for (uint64_t c = g->first; c < g->first + g->wanted; c++) {
        struct qcow2_refblock *block;

        if (!has_block(q, c / entries)) {
            c = (c / entries + 1) * entries - 1;
            continue;
        }
        r = block_get(q, by, c / entries, &block);
        if (r < 0)
            return r;
        for (; c < g->first + g->wanted; c++) {
            if (count_get(q, block->bytes, c % entries))
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
    return (g->first + g->wanted + number) << q->cluster_bits;
}

/* Counts the clusters [first, end) in a block. */
static int co_fn count_in_block(struct qcow2 *q, const struct request *by,
                                struct qcow2_refblock *block, uint64_t offset, bool whole,
                                uint64_t first, uint64_t end)
{
    uint64_t base = block->index * block_entries(q);
    uint64_t from = MAX(first, base) - base;
    uint64_t to = MIN(end, base + block_entries(q)) - base;

    for (uint64_t i = from; i < to; i++)
        count_set(q, block->bytes, i, 1);
    if (whole)
        return block_write(q, by, offset, block, 0, block_entries(q));
    return block_write(q, by, offset, block, from, to - from);
}

static int co_fn write_counts(struct qcow2 *q, const struct request *by, struct growth *g)
{
    uint64_t end = g->first + growth_total(g);
    uint64_t entries = block_entries(q);
    uint64_t number = 0;
    int r = 0;

    for (uint64_t i = g->first / entries; r == 0 && i <= (end - 1) / entries; i++) {
        struct qcow2_refblock *block = NULL;

        if (has_block(q, i)) {
            r = block_get(q, by, i, &block);
            if (r == 0)
                r = count_in_block(q, by, block, q->alloc.table[i], false, g->first, end);
            continue;
        }
        block = block_new(q, i);
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
    uint64_t offset = (g->first + g->wanted + g->blocks) << q->cluster_bits;
    uint64_t old = q->alloc.table_offset;
    uint64_t old_clusters = (uint64_t)q->alloc.table_size * QCOW2_ENTRY_LEN >> q->cluster_bits;
    int r = point_header_to(q, by, offset, g->table_clusters);

    if (r == 0)
        r = qcow2_sync(q, by);
    if (r < 0)
        return r;
    free(q->alloc.table);
    q->alloc.table = table;
    q->alloc.table_size = (uint32_t)g->table_size;
    q->alloc.table_offset = offset;
    qcow2_alloc_put(q, old, old_clusters);
    return 0;
}

static int co_fn extend_table(struct qcow2 *q, const struct request *by, const struct growth *g)
{
    uint64_t first = g->first / block_entries(q);
    uint64_t last = (g->first + growth_total(g) - 1) / block_entries(q);
    uint64_t unit = QCOW2_L1_UNIT / QCOW2_ENTRY_LEN;
    int r;

    first = align_down(first, unit);
    last = MIN(align_up(last + 1, unit), (uint64_t)q->alloc.table_size);
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
    if (r == 0)
        r = write_counts(q, by, g);
    if (r == 0 && table) {
        enter_blocks(q, g, table, true);
        r = write_table(q, by, table, (g->first + g->wanted + g->blocks) << q->cluster_bits, 0,
                        g->table_size);
    }
    return r < 0 ? r : qcow2_sync(q, by);
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
 * Makes `wanted` clusters at the end of the file ready, or fewer, but not less than `least`. If the table or the header may
 * point there after a failure, the place is not used again.
 */
static int co_fn grow(struct qcow2 *q, const struct request *by, uint64_t wanted, uint64_t least,
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
    if (r == 0 && g.table_clusters) {
        table = grown_table(q, &g);
        r = table ? 0 : -ENOMEM;
    }
    if (r < 0)
        return r;
    r = write_new(q, by, &g, table);
    if (r == 0) {
        q->alloc.end = g.first + growth_total(&g);
        r = link_new(q, by, &g, &table);
    }
    free(table);
    while ((block = list_first(&g.made, struct qcow2_refblock, link))) {
        list_remove(&block->link);
        if (r == 0)
            block_cache(q, block);
        else
            free(block);
    }
    *ret = (struct qcow2_extent){
        .host_offset = g.first << q->cluster_bits, .count = g.wanted, .fresh = q->alloc.grows};
    return r;
}

/* ---- for writers ---- */

/* The next batch is twice as large. */
static int co_fn grow_pool(struct qcow2 *q, const struct request *by)
{
    struct qcow2_extent got;
    int r = grow(q, by, q->alloc.batch, 1, &got);

    if (r < 0)
        return r;
    q->alloc.batch = MAX(MIN(q->alloc.batch * 2, BATCH_MAX >> q->cluster_bits), (uint64_t)1);
    tiny_lock_acquire(&q->lock);
    q->alloc.fresh = got.host_offset >> q->cluster_bits; /* the last one was used up */
    q->alloc.fresh_end = q->alloc.fresh + got.count;
    tiny_lock_release(&q->lock);
    return 0;
}

static int co_fn refill(struct qcow2 *q, const struct request *by)
{
    int r = 0;

    if (pool_is_empty(q))
        r = settle_locked(q, by);
    if (r == 0 && pool_is_empty(q))
        r = scan(q, by);
    if (r == 0 && pool_is_empty(q))
        r = grow_pool(q, by);
    return r;
}

int qcow2_alloc_get(struct qcow2 *q, const struct request *by, uint64_t want,
                    struct qcow2_extent *ret)
{
    int r = 0;

    while (r == 0 && !take_from_pool(q, want, ret)) {
        r = co_mutex_lock_until(&q->alloc.lock, LOOP_FOREVER);
        if (r < 0)
            break;
        r = refill(q, by);
        co_mutex_unlock(&q->alloc.lock);
    }
    return r;
}

int qcow2_alloc_get_row(struct qcow2 *q, const struct request *by, uint64_t count,
                        struct qcow2_extent *ret)
{
    int r = co_mutex_lock_until(&q->alloc.lock, LOOP_FOREVER);

    if (r < 0)
        return r;
    r = grow(q, by, count, count, ret);
    co_mutex_unlock(&q->alloc.lock);
    return r;
}

/* ---- opening and closing ---- */

/* Of a file that does not grow: behind the last cluster that is counted. */
static int co_fn find_end(struct qcow2 *q, const struct request *by)
{
    uint64_t entries = block_entries(q);

    for (uint64_t i = q->alloc.table_size; i-- > 0;) {
        struct qcow2_refblock *block;
        int r;

        if (!q->alloc.table[i])
            continue;
        r = block_get(q, by, i, &block);
        if (r < 0)
            return r;
        for (uint64_t k = entries; k-- > 0;) {
            if (count_get(q, block->bytes, k)) {
                q->alloc.end = i * entries + k + 1;
                return 0;
            }
        }
    }
    return 0;
}

static int co_fn read_table(struct qcow2 *q, const struct request *by)
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

int qcow2_alloc_init(struct qcow2 *q, const struct request *by, uint64_t table_offset,
                     uint32_t table_clusters, struct error **err)
{
    struct qcow2_alloc *a = &q->alloc;
    uint64_t size = node_size(edge_node(q->file));
    int r;

    a->table_offset = table_offset;
    a->table_size = (uint32_t)(((uint64_t)table_clusters << q->cluster_bits) / QCOW2_ENTRY_LEN);
    a->table = try_new_n(uint64_t, a->table_size);
    a->grows = node_grows(edge_node(q->file));
    a->end = align_up(size, qcow2_cluster_size(q)) >> q->cluster_bits;
    a->batch = MAX(BATCH_FIRST >> q->cluster_bits, (uint64_t)4);
    r = a->table ? read_table(q, by) : -ENOMEM;
    if (r == 0 && !a->grows)
        r = find_end(q, by);
    return r < 0 ? error_set(err, -r, "node '%s': cannot read the refcounts: %s",
                             node_name(q->node), strerror(-r))
                 : 0;
}

/* What nobody uses any more is counted so; the end of the file, too, is given back. */
int qcow2_alloc_settle_all(struct qcow2 *q, const struct request *by)
{
    struct qcow2_alloc *a = &q->alloc;
    uint64_t end = a->end;
    struct request shrink;
    struct qcow2_run *run;
    bool moved = true;
    int r = epoch_co_pass(node_epoch(q->node));

    if (r == 0)
        r = settle_locked(q, by);
    if (r == 0 && a->fresh < a->fresh_end)
        r = recount(q, by, a->fresh, a->fresh_end - a->fresh, 1, 0);
    list_for_each (&a->reuse, run, link) {
        if (r == 0)
            r = recount(q, by, run->first, run->count, 1, 0);
    }
    if (r == 0)
        r = qcow2_sync(q, by);
    if (r < 0 || !a->grows)
        return r;
    if (a->fresh_end == end)
        end = a->fresh;
    while (moved) {
        moved = false;
        list_for_each (&a->reuse, run, link) {
            if (run->first + run->count == end) {
                end = run->first;
                moved = true;
            }
        }
    }
    if (end == a->end)
        return 0;
    shrink = request_for(by, REQUEST_RESIZE, end << q->cluster_bits, 0);
    return edge_co_request(q->file, &shrink);
}

static void free_runs(struct list *l)
{
    struct qcow2_run *run;

    while (l->next && (run = list_first(l, struct qcow2_run, link))) {
        list_remove(&run->link);
        free(run);
    }
}

void qcow2_alloc_release(struct qcow2 *q)
{
    struct qcow2_alloc *a = &q->alloc;
    struct qcow2_refblock *block;

    while (a->blocks.next && (block = list_first(&a->blocks, struct qcow2_refblock, link))) {
        list_remove(&block->link);
        free(block);
    }
    free_runs(&a->reuse);
    free_runs(&a->freed);
    free_runs(&a->graced);
    free(a->table);
}
