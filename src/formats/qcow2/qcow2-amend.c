/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Amending. It works on the tables as they are on disk, as operations on snapshots do.
 *
 * AMEND-1 The header goes from one sound image to another in the write of its first sector; what follows that sector is durable before,
 *         and does not disturb the old one.
 * AMEND-2 For version 2, which cannot say that a cluster reads as zeroes, such entries come to point to a few clusters of zeroes that
 *         many of them share. Those are written and counted, for all their users, durably, before the first entry changes; each entry
 *         stands for itself; what the entries had is counted down after they are durable.
 * AMEND-3 The width of refcounts changes with the structure: a new one is durable before the header has its place and its width, in one
 *         write (REPAIR-2).
 */
#include "formats/qcow2/qcow2-amend.h"
#include "base/alloc.h"
#include "base/atomic.h"
#include "base/checked.h"
#include "base/endian.h"
#include "base/macros.h"
#include "formats/qcow2/check/qcow2-check.h"
#include "formats/qcow2/qcow2-snapshot-internal.h"
#include "graph/backend.h"
#include "graph/gate.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#define MEMORY_MAX GIB /* for counting, each */

/* ---- the header ---- */

/* The start of the file, and what it says. */
struct header_bytes {
    uint8_t *bytes;
    size_t len;
    struct qcow2_header h;
};

static void header_bytes_release(struct header_bytes *b)
{
    free(b->bytes);
    qcow2_header_release(&b->h);
}

static int co_fn read_header(struct snap *s, struct header_bytes *ret)
{
    uint64_t size = node_size(edge_node(s->q->file));
    int r;

    ret->len = (size_t)MIN(size, QCOW2_HEADER_BYTES_MAX);
    ret->bytes = try_alloc(ret->len, 1);
    r = ret->bytes ? snap_read_flat(s, 0, ret->bytes, ret->len) : -ENOMEM;
    if (r < 0)
        return snap_failed(s, r, "read the header");
    r = qcow2_header_parse(&ret->h, ret->bytes, ret->len, size, node_name(s->q->node), s->err);
    ret->len = (size_t)MIN((uint64_t)ret->len, qcow2_cluster_size(s->q));
    return r;
}

/* AMEND-1 */
static int co_fn put_new_header(struct snap *s, const struct qcow2_header_new *new)
{
    struct header_bytes old = {.len = 0};
    uint8_t *bytes = NULL;
    int r = read_header(s, &old);

    if (r == 0) {
        bytes = try_alloc(old.len, 1);
        r = bytes ? qcow2_header_rewrite(&old.h, old.bytes, old.len, new, bytes, s->err)
                  : snap_failed(s, -ENOMEM, "make a header");
    }
    if (r == 0 && old.len > QCOW2_HEADER_SECTOR) {
        r = snap_write_flat(s, QCOW2_HEADER_SECTOR, bytes + QCOW2_HEADER_SECTOR,
                            old.len - QCOW2_HEADER_SECTOR);
        if (r == 0)
            r = qcow2_sync(s->q, s->by);
        r = snap_failed(s, r, "write the header");
    }
    if (r == 0)
        r = snap_change_header(s, bytes, 0, QCOW2_HEADER_SECTOR);
    if (r == 0)
        s->q->version = new->version;
    header_bytes_release(&old);
    free(bytes);
    return r;
}

/* ---- to version 3 ---- */

static int co_fn upgrade(struct snap *s)
{
    struct qcow2_header_new new = {.version = 3};
    int r = snap_complete_table(s);

    return r < 0 ? r : put_new_header(s, &new);
}

/* ---- late refcounts ---- */

static int co_fn change_lazy(struct snap *s, bool lazy)
{
    uint64_t compatible = load_be64(s->header + QCOW2_OFFSET_COMPATIBLE);
    uint8_t header[QCOW2_HEADER_SECTOR];

    if (s->q->version < 3 && !lazy)
        return 0;
    if (s->q->version < 3)
        return error_set(s->err, ENOTSUP,
                         "Lazy refcounts only supported with compatibility level 1.1 and above "
                         "(use compat=1.1 or greater)");
    compatible &= ~QCOW2_COMPATIBLE_LAZY_REFCOUNTS;
    compatible |= lazy ? QCOW2_COMPATIBLE_LAZY_REFCOUNTS : 0;
    memcpy(header, s->header, sizeof(header));
    store_be64(header + QCOW2_OFFSET_COMPATIBLE, compatible);
    return snap_change_header(s, header, QCOW2_OFFSET_COMPATIBLE, QCOW2_OFFSET_COMPATIBLE + 8);
}

/* ---- the data file ---- */

static int co_fn change_data_file(struct snap *s, const struct qcow2_amendment *what)
{
    struct qcow2_header_new new = {
        .version = s->q->version,
        .compatible = s->q->version < 3 ? 0 : load_be64(s->header + QCOW2_OFFSET_COMPATIBLE),
        .data_file = what->data_file,
        .data_not_raw = what->data_not_raw,
    };

    if (!qcow2_has_data_file(s->q))
        return what->data_file ? error_set(s->err, EINVAL,
                                           "data-file can only be set for images that use an "
                                           "external data file")
                               : 0;
    return put_new_header(s, &new);
}

/* ---- the width of refcounts ---- */

/* What the driver knows of refcounts becomes what the header says. */
static int co_fn take_up_refcounts(struct snap *s)
{
    struct qcow2 *q = s->q;
    int r = snap_read_flat(s, 0, s->header, sizeof(s->header));

    r = snap_failed(s, r, "read the header");
    if (r == 0) {
        q->refcount_order = load_be32(s->header + QCOW2_OFFSET_REFCOUNT_ORDER);
        r = qcow2_alloc_reopen(q, s->by, load_be64(s->header + QCOW2_OFFSET_REFCOUNT_TABLE_OFFSET),
                               load_be32(s->header + QCOW2_OFFSET_REFCOUNT_TABLE_CLUSTERS), s->err);
    }
    if (r < 0) {
        atomic_set(&q->needs_reopen, true);
        return r;
    }
    qcow2_guard_set_single(q, QCOW2_SINGLE_REFCOUNT_TABLE, q->alloc.table_offset,
                           (uint64_t)q->alloc.table_size * QCOW2_ENTRY_LEN);
    qcow2_guard_rebuild(q, s->by);
    return 0;
}

/* AMEND-3. D3: where it fails the old header is written again; its structure was not touched. */
static int co_fn change_width(struct snap *s, unsigned order)
{
    AUTO(error_free) struct error *ignored = NULL; /* who cannot write it says so by needs_reopen */
    struct error **err = s->err;
    int r = qcow2_co_change_refcount_width(s->q->file, s->by, node_name(s->q->node), order, err);

    if (r == 0)
        return take_up_refcounts(s);
    s->err = &ignored;
    (void)snap_change_header(s, s->header, QCOW2_OFFSET_REFCOUNT_TABLE_OFFSET,
                             QCOW2_OFFSET_REFCOUNT_ORDER + 4);
    s->err = err;
    return r;
}

static int co_fn change_refcounts(struct snap *s, unsigned bits)
{
    unsigned order = 0;

    while (order <= QCOW2_REFCOUNT_ORDER_MAX && 1u << order != bits)
        order++;
    if (order > QCOW2_REFCOUNT_ORDER_MAX)
        return error_set(s->err, EINVAL,
                         "Refcount width must be a power of two and may not exceed 64 bits");
    if (order == s->q->refcount_order)
        return 0;
    if (s->q->version < 3)
        return error_set(s->err, ENOTSUP,
                         "Refcount widths other than 16 bits require compatibility level 1.1 or "
                         "above (use compat=1.1 or greater)");
    return change_width(s, order);
}

/* ---- entries that read as zeroes ---- */

/* A cluster of zeroes that entries share. */
struct zero_cluster {
    uint64_t users;
    uint64_t host_offset;
};

struct expansion {
    struct snap *s;
    bool has_backing;
    struct qcow2_counts
        tables; /* how often each L2 table is used; those that were looked at are marked */
    enum qcow2_leaf_bits mark;
    uint64_t uses; /* of the table that is being looked at */

    bool found;               /* an entry */
    struct qcow2_counts gone; /* what entries had, with the uses that they had of it */
    struct zero_cluster *zeroes;
    size_t count;
    size_t max;
    size_t at;   /* the one that entries get now */
    uint64_t in; /* users that it has so far */
};

/* So that both times that tables are looked at the same entries share a cluster. */
static void expansion_rewind(struct expansion *x, enum qcow2_leaf_bits mark)
{
    x->mark = mark;
    x->at = 0;
    x->in = 0;
}

/* zeroes[at] is what another entry gets, which has as many users as its table. -ENOMEM, but not where it was planned before. */
static int expansion_next(struct expansion *x)
{
    uint64_t most = UINT64_MAX >> (64 - (1u << x->s->q->refcount_order));

    if (x->in + x->uses > most) {
        x->at++;
        x->in = 0;
    }
    if (x->at == x->max) {
        size_t max = MAX(x->max * 2, (size_t)16);
        struct zero_cluster *v = realloc(x->zeroes, max * sizeof(*v));

        if (!v)
            return -ENOMEM;
        x->zeroes = v;
        x->max = max;
    }
    if (x->at == x->count)
        x->zeroes[x->count++] = (struct zero_cluster){.users = 0};
    x->in += x->uses;
    return 0;
}

/* 1: an entry reads as zeroes. *ret_host: what it has all the same, or QCOW2_NOWHERE. */
static int is_zero_entry(struct snap *s, uint64_t entry, uint64_t *ret_host)
{
    enum qcow2_entry_kind kind = QCOW2_ENTRY_BELOW;

    /* It has no data file, and no subclusters. */
    if (qcow2_entry_kind(s->q, 0, (struct qcow2_l2){entry, 0}, 0, &kind, ret_host) < 0)
        return snap_damaged(s, "an L2 entry points to", entry & QCOW2_L2_OFFSET_MASK);
    return kind == QCOW2_ENTRY_ZERO;
}

static int plan_entry(struct expansion *x, uint64_t host)
{
    int r = 0;

    x->found = true;
    if (host != QCOW2_NOWHERE)
        r = qcow2_count_add(&x->gone, QCOW2_USED, host >> x->s->q->cluster_bits, x->uses);
    if (r == 0 && x->has_backing) {
        r = expansion_next(x);
        if (r == 0)
            x->zeroes[x->at].users += x->uses;
    }
    return r;
}

/* The first time: what is needed. */
static int plan_entries(struct snap *s, uint8_t *table, void *arg)
{
    struct expansion *x = arg;

    for (size_t i = 0; i < (size_t)1 << s->q->l2_bits; i++) {
        uint64_t host;
        int r = is_zero_entry(s, load_be64(table + i * QCOW2_ENTRY_LEN), &host);

        if (r < 0)
            return r;
        if (r == 1)
            r = plan_entry(x, host);
        if (r < 0)
            return snap_failed(s, r, "count references");
    }
    return 0;
}

/* The second time: they change. */
static int change_entries(struct snap *s, uint8_t *table, void *arg)
{
    struct expansion *x = arg;
    int changed = 0;

    for (size_t i = 0; i < (size_t)1 << s->q->l2_bits; i++) {
        uint64_t becomes = 0; /* nothing lies below that it would have to hide */
        uint64_t host;
        int r = is_zero_entry(s, load_be64(table + i * QCOW2_ENTRY_LEN), &host);

        if (r == 1 && x->has_backing) {
            (void)expansion_next(x);                /* planned before */
            becomes = x->zeroes[x->at].host_offset; /* flags are set when all is done */
        }
        if (r < 0)
            return r;
        if (r == 1) {
            store_be64(table + i * QCOW2_ENTRY_LEN, becomes);
            changed = 1;
        }
    }
    return changed;
}

typedef int l1_fn(struct expansion *x, struct snap_l1 l1);

/* With the L1 table of the disk, and with those of all snapshots. */
static int co_fn for_each_l1(struct expansion *x, l1_fn *fn)
{
    struct snap *s = x->s;
    int r = fn(x, snap_active_l1(s->q));

    for (uint32_t i = 0; r == 0 && i < s->count; i++) {
        struct snap_l1 l1;

        r = snap_read_l1(s, &s->v[i], s->v[i].l1_size, &l1);
        if (r == 0)
            r = fn(x, l1);
        free(l1.v);
    }
    return r;
}

static int co_fn count_tables(struct expansion *x, struct snap_l1 l1)
{
    int r = 0;

    for (uint32_t i = 0; r == 0 && i < l1.count; i++) {
        uint64_t l2 = atomic_get_relaxed(&l1.v[i]) & QCOW2_L1_OFFSET_MASK; /* nobody else is here */

        if (l2)
            r = qcow2_count_add(&x->tables, QCOW2_USED, l2 >> x->s->q->cluster_bits, 1);
    }
    return snap_failed(x->s, r, "count references");
}

/* Each table once, however many use it. */
static int co_fn visit_once(struct expansion *x, struct snap_l1 l1, snap_l2_fn *fn)
{
    unsigned bits = x->s->q->cluster_bits;
    int r = 0;

    for (uint32_t i = 0; r == 0 && i < l1.count; i++) {
        uint64_t l2 = atomic_get_relaxed(&l1.v[i]) & QCOW2_L1_OFFSET_MASK; /* as above */
        struct qcow2_leaf *leaf = l2 ? qcow2_leaf_find(&x->tables, l2 >> bits) : NULL;
        unsigned n = (l2 >> bits) & (QCOW2_LEAF - 1);

        if (!leaf || qcow2_leaf_bit(leaf, x->mark, n))
            continue;
        qcow2_leaf_mark(leaf, x->mark, n);
        x->uses = qcow2_leaf_count(leaf, QCOW2_USED, n);
        r = snap_visit_tables(x->s, (struct snap_l1){&l2, 1}, fn, x);
    }
    return r;
}

static int co_fn plan_l1(struct expansion *x, struct snap_l1 l1)
{
    return visit_once(x, l1, plan_entries);
}

static int co_fn change_l1(struct expansion *x, struct snap_l1 l1)
{
    return visit_once(x, l1, change_entries);
}

/* Zeroes, counted once. Nothing points there yet. */
static int co_fn make_zero_cluster(struct snap *s, struct zero_cluster *z)
{
    struct qcow2_extent row = {.count = 0};
    uint8_t *zeroes = try_alloc(1, (size_t)qcow2_cluster_size(s->q));
    int r = zeroes ? snap_alloc_row(s, 1, &row) : snap_failed(s, -ENOMEM, "make zeroes");

    if (r == 0) {
        z->host_offset = row.host_offset;
        r = snap_write_flat(s, row.host_offset, zeroes, (size_t)qcow2_cluster_size(s->q));
        r = snap_failed(s, r, "write zeroes");
    }
    free(zeroes);
    return r;
}

static void put_zero_clusters(struct expansion *x)
{
    for (size_t i = 0; i < x->count; i++) {
        struct qcow2_extent row = {.host_offset = x->zeroes[i].host_offset, .count = 1};

        if (row.host_offset)
            snap_put_row(x->s, &row);
    }
}

/* AMEND-2: what entries will point to, counted for all of them. */
static int co_fn make_zero_clusters(struct expansion *x)
{
    struct qcow2_counts more = {.memory_max = MEMORY_MAX};
    unsigned bits = x->s->q->cluster_bits;
    int r = 0;

    for (size_t i = 0; r == 0 && i < x->count; i++) {
        r = make_zero_cluster(x->s, &x->zeroes[i]);
        if (r == 0 && x->zeroes[i].users > 1)
            r = snap_failed(x->s,
                            qcow2_count_add(&more, QCOW2_USED, x->zeroes[i].host_offset >> bits,
                                            x->zeroes[i].users - 1),
                            "count references");
    }
    if (r < 0)
        put_zero_clusters(x);
    if (r == 0)
        r = snap_change_counts(x->s, &more, SNAP_RAISE, false);
    if (r == 0) /* they may all have one user */
        r = snap_failed(x->s, qcow2_sync(x->s->q, x->s->by), "flush the image");
    qcow2_counts_release(&more);
    return r;
}

static int co_fn change_and_free(struct expansion *x)
{
    struct snap *s = x->s;
    int r = snap_change_counts(s, &x->gone, SNAP_LOWER, true);

    if (r == 0)
        r = make_zero_clusters(x);
    expansion_rewind(x, QCOW2_LEAF_CLASH);
    if (r == 0)
        r = for_each_l1(x, change_l1);
    if (r == 0)
        r = snap_failed(s, qcow2_sync(s->q, s->by), "flush the image");
    if (r == 0)
        r = snap_change_counts(s, &x->gone, SNAP_LOWER, false);
    if (r == 0)
        snap_give_back_free(s, &x->gone);
    return r == 0 ? snap_set_active_flags(s) : r;
}

static int co_fn expand_zeroes(struct snap *s, bool has_backing)
{
    struct expansion x = {
        .s = s,
        .has_backing = has_backing,
        .tables = {.memory_max = MEMORY_MAX},
        .gone = {.memory_max = MEMORY_MAX},
    };
    int r = for_each_l1(&x, count_tables);

    expansion_rewind(&x, QCOW2_LEAF_META);
    if (r == 0)
        r = for_each_l1(&x, plan_l1);
    if (r == 0 && x.found)
        r = change_and_free(&x);
    qcow2_counts_release(&x.tables);
    qcow2_counts_release(&x.gone);
    free(x.zeroes);
    return r;
}

/* ---- to version 2 ---- */

int qcow2_check_downgrade(const struct qcow2_header *header, struct error **err)
{
    static const struct {
        uint64_t bit;
        const char *what;
    } features[] = {
        {QCOW2_INCOMPATIBLE_DATA_FILE, "an external data file"},
        {QCOW2_INCOMPATIBLE_COMPRESSION_TYPE, "another compression than zlib"},
        {QCOW2_INCOMPATIBLE_EXTENDED_L2, "extended L2 entries"},
    };

    for (size_t i = 0; i < ARRAY_SIZE(features); i++) {
        if (header->incompatible & features[i].bit)
            return error_set(err, ENOTSUP,
                             "Cannot downgrade the image: it has %s, which compat=0.10 cannot have",
                             features[i].what);
    }
    if (header->has_bitmaps && header->bitmap_count)
        return error_set(err, ENOTSUP,
                         "Cannot downgrade the image: it has bitmaps, which compat=0.10 cannot "
                         "have; remove them first");
    if (header->crypt_method != QCOW2_CRYPT_NONE)
        return error_set(err, ENOTSUP, "Cannot downgrade the image: it is encrypted");
    return 0;
}

static int check_snapshots_v2(struct snap *s)
{
    for (uint32_t i = 0; i < s->count; i++) {
        const struct qcow2_snapshot *sn = &s->v[i];

        if (sn->vm_state_size > UINT32_MAX ||
            (sn->has_disk_size && sn->disk_size != node_size(s->q->node)))
            return error_set(s->err, ENOTSUP,
                             "Internal snapshots prevent downgrade of image: '%.*s' has a disk of "
                             "another size, or too much state of a machine",
                             (int)sn->name_len, sn->name);
    }
    return 0;
}

static int co_fn downgrade(struct snap *s)
{
    struct qcow2_header_new new = {.version = 2};
    struct header_bytes now = {.len = 0};
    int r = read_header(s, &now);

    if (r == 0)
        r = qcow2_check_downgrade(&now.h, s->err);
    if (r == 0 && s->q->refcount_order != QCOW2_REFCOUNT_ORDER_V2)
        r = error_set(s->err, ENOTSUP, "compat=0.10 requires refcount_bits=16");
    if (r == 0)
        r = check_snapshots_v2(s);
    if (r == 0)
        r = expand_zeroes(s, now.h.backing_file);
    header_bytes_release(&now);
    return r == 0 ? put_new_header(s, &new) : r;
}

int qcow2_co_amend(struct backend *b, const struct qcow2_amendment *what, struct error **err)
{
    struct pass pass = {0};
    struct request by = {.kind = REQUEST_FLUSH, .pass = &pass};
    struct snap s = {.by = &by, .err = err};
    int r = snap_begin(&s, b);

    if (r == 0 && what->version == 3 && s.q->version < 3)
        r = upgrade(&s);
    if (r == 0 && what->refcount_bits)
        r = change_refcounts(&s, what->refcount_bits);
    if (r == 0 && what->change_lazy)
        r = change_lazy(&s, what->lazy_refcounts);
    if (r == 0 && (what->data_file || what->data_not_raw))
        r = change_data_file(&s, what);
    if (r == 0 && what->version == 2 && s.q->version > 2)
        r = downgrade(&s);
    snap_end(&s);
    return r;
}
