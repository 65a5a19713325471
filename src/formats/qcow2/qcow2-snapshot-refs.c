/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What L1 tables of snapshots and of the disk refer to: counted in memory, as refcounts, and in COPIED flags. On the disk, past what is
 * cached of mappings. qcow2-snapshot.c says in which order.
 */
#include "base/alloc.h"
#include "base/atomic.h"
#include "base/checked.h"
#include "base/endian.h"
#include "base/macros.h"
#include "formats/qcow2/qcow2-snapshot-internal.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#define READ_PIECE ((size_t)64 << 10)

int snap_failed(struct snap *s, int r, const char *what)
{
    return r < 0 ? error_set(s->err, -r, "cannot %s: %s", what, strerror(-r)) : 0;
}

/* Any length, in pieces. */
int snap_read_flat(struct snap *s, uint64_t offset, uint8_t *ret, size_t len)
{
    struct iobuf *b = iobuf_new(READ_PIECE);
    int r = b ? 0 : -ENOMEM;

    for (size_t at = 0; r == 0 && at < len; at += READ_PIECE) {
        size_t n = MIN(len - at, READ_PIECE);

        r = qcow2_read_meta(s->q, s->by, offset + at, b, 0, n);
        if (r == 0)
            memcpy(ret + at, b->data, n);
    }
    iobuf_unref(b);
    return r;
}

int snap_write_flat(struct snap *s, uint64_t offset, const uint8_t *bytes, size_t len)
{
    int r = 0;

    for (size_t at = 0; r == 0 && at < len; at += READ_PIECE) {
        size_t n = MIN(len - at, READ_PIECE);
        struct iobuf *b = iobuf_new(n); /* one for each: the host may keep it (G8) */

        if (!b)
            return -ENOMEM;
        memcpy(b->data, bytes + at, n);
        r = qcow2_write_meta(s->q, s->by, offset + at, b, 0, n);
        iobuf_unref(b);
    }
    return r;
}

/* ---- L1 and L2 tables ---- */

struct snap_l1 snap_active_l1(const struct qcow2 *q)
{
    return (struct snap_l1){q->map.l1, q->map.l1_size};
}

int snap_damaged(struct snap *s, const char *what, uint64_t at)
{
    return error_set(s->err, EIO, "the image is damaged: %s %" PRIu64 "; check it", what, at);
}

/* Of a snapshot, with `entries` of them, without flags; the caller's to free. */
int snap_read_l1(struct snap *s, const struct qcow2_snapshot *sn, uint32_t entries,
                 struct snap_l1 *ret)
{
    uint64_t bytes = (uint64_t)sn->l1_size * QCOW2_ENTRY_LEN;
    uint32_t count = MIN(entries, sn->l1_size);
    AUTO(free_ptr) uint8_t *raw = NULL;
    int r;

    *ret = (struct snap_l1){.v = NULL};
    if (bytes > QCOW2_L1_BYTES_MAX ||
        (bytes && (!qcow2_is_cluster(s->q, sn->l1_offset) ||
                   !range_within(sn->l1_offset, bytes, node_size(edge_node(s->q->file))))))
        return snap_damaged(s, "a snapshot's L1 table cannot lie at", sn->l1_offset);
    raw = try_alloc((size_t)count + 1, QCOW2_ENTRY_LEN);
    ret->v = try_new_n(uint64_t, (size_t)entries + 1);
    ret->count = entries;
    r = raw && ret->v ? snap_read_flat(s, sn->l1_offset, raw, (size_t)count * QCOW2_ENTRY_LEN)
                      : -ENOMEM;
    for (uint32_t i = 0; r == 0 && i < count; i++)
        ret->v[i] = load_be64(raw + (size_t)i * QCOW2_ENTRY_LEN) & ~QCOW2_COPIED;
    return snap_failed(s, r, "read a snapshot's L1 table");
}

static int co_fn visit_l2(struct snap *s, uint64_t offset, snap_l2_fn *fn, void *arg)
{
    size_t bytes = (size_t)qcow2_cluster_size(s->q);
    struct iobuf *b = iobuf_new(bytes);
    int r = b ? qcow2_read_meta(s->q, s->by, offset, b, 0, bytes) : -ENOMEM;

    r = snap_failed(s, r, "read an L2 table");
    if (r == 0)
        r = fn(s, b->data, arg);
    if (r == 1)
        r = snap_failed(s, qcow2_write_meta(s->q, s->by, offset, b, 0, bytes), "write an L2 table");
    iobuf_unref(b);
    return r;
}

/* Those that an L1 table points to. */
int snap_visit_tables(struct snap *s, struct snap_l1 l1, snap_l2_fn *fn, void *arg)
{
    int r = 0;

    for (uint32_t i = 0; r == 0 && i < l1.count; i++) {
        uint64_t l2 = atomic_get_relaxed(&l1.v[i]) & QCOW2_L1_OFFSET_MASK; /* nobody else is here */

        if (!l2)
            continue;
        if (!qcow2_is_cluster(s->q, l2))
            return snap_damaged(s, "no L2 table can lie at", l2);
        r = visit_l2(s, l2, fn, arg);
    }
    return r;
}

/* ---- references ---- */

int snap_tally(struct snap *s, struct qcow2_counts *c, uint64_t offset, uint64_t len)
{
    uint64_t end = (offset + len + qcow2_cluster_size(s->q) - 1) >> s->q->cluster_bits;
    int r = 0;

    for (uint64_t n = offset >> s->q->cluster_bits; r == 0 && n < end; n++)
        r = qcow2_count_add(c, QCOW2_USED, n, 1);
    return snap_failed(s, r, "count references");
}

/* Entry i of a table. */
static uint8_t *entry_at(const struct snap *s, uint8_t *table, size_t i)
{
    return table + (i * QCOW2_ENTRY_LEN << s->q->extended);
}

static int tally_entry(struct snap *s, struct qcow2_counts *c, const uint8_t *at)
{
    struct qcow2_l2 e = {load_be64(at), s->q->extended ? load_be64(at + QCOW2_ENTRY_LEN) : 0};
    uint64_t size = align_up(node_size(edge_node(s->q->file)), qcow2_cluster_size(s->q));
    enum qcow2_entry_kind kind = QCOW2_ENTRY_BELOW;
    uint64_t len = qcow2_cluster_size(s->q);
    uint64_t host;

    if (qcow2_entry_kind(s->q, 0, e, 0, &kind, &host) < 0) /* it has no data file */
        return snap_damaged(s, "an L2 entry points to", e.entry & QCOW2_L2_OFFSET_MASK);
    if (kind == QCOW2_ENTRY_COMPRESSED)
        qcow2_compressed_place(s->q, e.entry, &host, &len);
    if (kind == QCOW2_ENTRY_COMPRESSED && (!host || !range_within(host, len, size)))
        return snap_damaged(s, "no compressed data can lie at", host);
    return host != QCOW2_NOWHERE ? snap_tally(s, c, host, len) : 0;
}

static int tally_l2(struct snap *s, uint8_t *table, void *arg)
{
    int r = 0;

    for (size_t i = 0; r == 0 && i < (size_t)1 << s->q->l2_bits; i++)
        r = tally_entry(s, arg, entry_at(s, table, i));
    return r;
}

/* What an L1 table keeps: L2 tables, and what those point to. */
int snap_tally_l1(struct snap *s, struct qcow2_counts *c, struct snap_l1 l1)
{
    int r = qcow2_has_data_file(s->q) ? 0 : snap_visit_tables(s, l1, tally_l2, c);

    for (uint32_t i = 0; r == 0 && i < l1.count; i++) {
        uint64_t l2 = atomic_get_relaxed(&l1.v[i]) & QCOW2_L1_OFFSET_MASK; /* as above */

        if (l2)
            r = snap_tally(s, c, l2, 1);
    }
    return r;
}

/* ---- refcounts ---- */

/* Goes through the refcounts of what was counted, block by block. */
struct edit {
    struct snap *s;
    enum snap_change change;
    bool dry; /* only whether it can be done */
    struct qcow2_refblock *block;
    uint64_t index; /* of the block, if there is one */
    uint64_t from;  /* entries that have changed */
    uint64_t to;
};

static int co_fn edit_end(struct edit *e)
{
    struct qcow2 *q = e->s->q;
    int r = 0;

    if (e->block && !e->dry)
        r = qcow2_block_write(q, e->s->by, q->alloc.table[e->index], e->block, e->from,
                              e->to - e->from);
    e->block = NULL;
    return snap_failed(e->s, r, "write refcounts");
}

static int co_fn edit_begin(struct edit *e, uint64_t index)
{
    struct qcow2 *q = e->s->q;
    int r = edit_end(e);

    if (r < 0)
        return r;
    if (index >= q->alloc.table_size || !q->alloc.table[index])
        return snap_damaged(e->s, "there are no refcounts of what it uses, in block", index);
    r = qcow2_block_get(q, e->s->by, index, &e->block);
    e->index = index;
    e->from = UINT64_MAX;
    e->to = 0;
    return snap_failed(e->s, r, "read refcounts");
}

static int co_fn edit_one(struct edit *e, uint64_t cluster, uint64_t n)
{
    struct qcow2 *q = e->s->q;
    uint64_t most = UINT64_MAX >> (64 - (1u << q->refcount_order));
    uint64_t i = cluster % qcow2_block_entries(q);
    uint64_t value;
    int r = 0;

    if (!e->block || e->index != cluster / qcow2_block_entries(q))
        r = edit_begin(e, cluster / qcow2_block_entries(q));
    if (r < 0)
        return r;
    value = qcow2_count_get(q, e->block->bytes, i);
    if (!value || (e->change == SNAP_LOWER && n > value))
        return snap_damaged(e->s, "a refcount is too low: that of cluster", cluster);
    if (e->change == SNAP_RAISE && n > most - value)
        return error_set(
            e->s->err, EFBIG,
            "the image's refcounts have %u bit%s, too few for another snapshot: cluster "
            "%" PRIu64 " is used %" PRIu64 " times; an image with more bits "
            "(refcount_bits=16) has room for it",
            1u << q->refcount_order, q->refcount_order ? "s" : "", cluster, value + n);
    if (!e->dry)
        qcow2_count_set(q, e->block->bytes, i, e->change == SNAP_RAISE ? value + n : value - n);
    e->from = MIN(e->from, i);
    e->to = MAX(e->to, i + 1);
    return 0;
}

typedef int cluster_fn(void *arg, uint64_t cluster, uint64_t n);

/* All clusters that were counted, rising. */
static int co_fn for_each_counted(struct snap *s, const struct qcow2_counts *c, cluster_fn *fn,
                                  void *arg)
{
    AUTO(free_ptr) struct qcow2_leaf **v = qcow2_counts_sorted(c);
    int r = v ? 0 : snap_failed(s, -ENOMEM, "change refcounts");

    for (size_t k = 0; r == 0 && k < c->leaf_count; k++) {
        for (unsigned i = 0; r == 0 && i < QCOW2_LEAF; i++) {
            uint64_t n = qcow2_leaf_count(v[k], QCOW2_USED, i);

            if (n)
                r = fn(arg, (v[k]->index << QCOW2_LEAF_BITS) + i, n);
        }
    }
    return r;
}

static int co_fn edit_cluster(void *arg, uint64_t cluster, uint64_t n)
{
    return edit_one(arg, cluster, n);
}

int snap_change_counts(struct snap *s, const struct qcow2_counts *c, enum snap_change change,
                       bool dry)
{
    struct edit e = {.s = s, .change = change, .dry = dry};
    int r = co_mutex_lock_until(&s->q->alloc.lock, LOOP_FOREVER);

    if (r < 0)
        return snap_failed(s, r, "change refcounts");
    r = for_each_counted(s, c, edit_cluster, &e);
    if (r == 0)
        r = edit_end(&e);
    s->q->alloc.scan = 0; /* what has become free is found */
    co_mutex_unlock(&s->q->alloc.lock);
    if (r == 0 && !dry)
        r = snap_failed(s, qcow2_sync(s->q, s->by), "flush refcounts");
    return r;
}

/* Clusters in a row that are free. */
struct free_run {
    struct snap *s;
    uint64_t first;
    uint64_t count;
};

/* To the host, as far as it takes it. */
static void co_fn give_back(struct free_run *f)
{
    struct qcow2 *q = f->s->q;
    struct request discard = request_for(f->s->by, REQUEST_DISCARD, f->first << q->cluster_bits,
                                         f->count << q->cluster_bits);

    if (f->count)
        (void)edge_co_request(q->file, &discard); /* they are free, with or without it */
    f->count = 0;
}

#define FREE_RUN_BYTES_MAX GIB /* G6 */

static int co_fn give_back_cluster(void *arg, uint64_t cluster, uint64_t n)
{
    struct free_run *f = arg;
    struct qcow2 *q = f->s->q;
    uint64_t count = 1;

    (void)n;
    if (qcow2_refcount(q, f->s->by, cluster << q->cluster_bits, &count) < 0 || count) {
        give_back(f);
        return 0;
    }
    if (f->first + f->count != cluster || f->count << q->cluster_bits >= FREE_RUN_BYTES_MAX)
        give_back(f);
    if (!f->count)
        f->first = cluster;
    f->count++;
    return 0;
}

/* What was counted and is not used any more. Its refcounts are durable. */
void snap_give_back_free(struct snap *s, const struct qcow2_counts *c)
{
    struct free_run f = {.s = s};

    if (!s->q->passes_discards || for_each_counted(s, c, give_back_cluster, &f) < 0)
        return;
    give_back(&f);
}

/* ---- COPIED flags ---- */

int snap_clear_in_l2(struct snap *s, uint8_t *table, void *arg)
{
    int changed = 0;

    (void)arg;
    for (size_t i = 0; i < (size_t)1 << s->q->l2_bits; i++) {
        uint8_t *at = entry_at(s, table, i);
        uint64_t entry = load_be64(at);

        if ((entry & QCOW2_L2_COMPRESSED) || !(entry & QCOW2_COPIED))
            continue;
        store_be64(at, entry & ~QCOW2_COPIED);
        changed = 1;
    }
    return changed;
}

static int co_fn set_in_l2(struct snap *s, uint8_t *table, void *arg)
{
    int changed = 0;

    (void)arg;
    for (size_t i = 0; i < (size_t)1 << s->q->l2_bits; i++) {
        uint8_t *at = entry_at(s, table, i);
        uint64_t entry = load_be64(at);
        uint64_t host = entry & QCOW2_L2_OFFSET_MASK;
        uint64_t count;
        int r;

        if ((entry & (QCOW2_L2_COMPRESSED | QCOW2_COPIED)) || !host)
            continue;
        r = qcow2_refcount(s->q, s->by, host, &count);
        if (r < 0)
            return snap_failed(s, r, "read refcounts");
        if (count != 1)
            continue;
        store_be64(at, entry | QCOW2_COPIED);
        changed = 1;
    }
    return changed;
}

/* The entries with their flags, or without. */
int snap_write_l1(struct snap *s, struct snap_l1 l1, uint64_t offset, bool flags)
{
    AUTO(free_ptr) uint8_t *raw = try_alloc((size_t)l1.count + 1, QCOW2_ENTRY_LEN);
    int r = raw ? 0 : -ENOMEM;

    for (uint32_t i = 0; r == 0 && i < l1.count; i++) {
        uint64_t entry = atomic_get_relaxed(&l1.v[i]); /* nobody else is here */

        store_be64(raw + (size_t)i * QCOW2_ENTRY_LEN, flags ? entry : entry & ~QCOW2_COPIED);
    }
    if (r == 0)
        r = snap_write_flat(s, offset, raw, (size_t)l1.count * QCOW2_ENTRY_LEN);
    return snap_failed(s, r, "write an L1 table");
}

/* SNAP-2, of the active tables. */
int snap_clear_active_flags(struct snap *s)
{
    struct snap_l1 l1 = snap_active_l1(s->q);
    int r;

    for (uint32_t i = 0; i < l1.count; i++)
        atomic_set(&l1.v[i], l1.v[i] & ~QCOW2_COPIED);
    r = snap_visit_tables(s, l1, snap_clear_in_l2, NULL);
    if (r == 0)
        r = snap_write_l1(s, l1, s->q->map.l1_offset, true);
    return r < 0 ? r : snap_failed(s, qcow2_sync(s->q, s->by), "flush the image");
}

/* SNAP-5. A table that is used once may have entries that are, and no other can. */
int snap_set_active_flags(struct snap *s)
{
    struct snap_l1 l1 = snap_active_l1(s->q);
    int r = 0;

    for (uint32_t i = 0; r == 0 && i < l1.count; i++) {
        uint64_t l2 = l1.v[i] & QCOW2_L1_OFFSET_MASK;
        uint64_t count;

        if (!l2)
            continue;
        r = snap_failed(s, qcow2_refcount(s->q, s->by, l2, &count), "read refcounts");
        if (r < 0 || count != 1)
            continue;
        r = visit_l2(s, l2, set_in_l2, NULL);
        if (r == 0)
            atomic_set(&l1.v[i], l2 | QCOW2_COPIED);
    }
    if (r == 0)
        r = snap_write_l1(s, l1, s->q->map.l1_offset, true);
    return r < 0 ? r : snap_failed(s, qcow2_sync(s->q, s->by), "flush the image");
}
