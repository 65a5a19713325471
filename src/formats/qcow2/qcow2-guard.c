/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Where metadata lies. Tables of one cluster (L2 tables, refcount blocks) are in a hash table, what is longer is a row of clusters
 * in one word, and the L1 tables of snapshots are sorted. One look costs a few words of each, and one slot for each cluster.
 */
#include "formats/qcow2/qcow2-guard.h"
#include "base/alloc.h"
#include "base/atomic.h"
#include "base/checked.h"
#include "base/log.h"
#include "base/macros.h"
#include "formats/qcow2/qcow2-header.h"
#include "formats/qcow2/qcow2-snapshot.h"
#include "formats/qcow2/qcow2.h"
#include "loop/loop.h"
#include "qcow2-options.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

/*
 * A slot: the cluster's number above 16 bits; in these, how often it is used as an active L2 table or refcount block (up to a
 * bound, where it stays), and the kinds of metadata that it is. 0 is free; without kinds it was used once.
 */
#define SLOT_CLUSTER_SHIFT 16
#define SLOT_USE           (UINT64_C(1) << 9)
#define SLOT_USES          (UINT64_C(0x7f) << 9)
#define SLOT_KINDS         ((uint64_t)QCOW2_GUARD_KINDS)

#define SLOTS_MIN 64

/* A row of clusters in a word: the first one's number, and how many follow it. As long as a snapshot table may be. */
#define ROW_SHIFT 17
#define ROW_MORE  (((uint64_t)1 << ROW_SHIFT) - 1)

struct qcow2_guard_table {
    struct list link; /* in guard.retired */
    uint64_t ticket;
    uint64_t slot_count; /* a power of two */
    /* Odd, and nobody who makes images knows it: he could have all tables want the same few slots (P6). */
    uint64_t multiplier;
    unsigned shift;   /* the highest bits of the product are the slot */
    uint64_t used;    /* Protected by guard.lock: slots that are not 0 */
    uint64_t slots[]; /* atomic */
};

struct qcow2_guard_rows {
    struct list link; /* in guard.retired, as a table's */
    uint64_t ticket;
    uint64_t count;
    uint64_t rows[]; /* sorted, apart from each other */
};

static const enum qcow2_guard_kind single_kinds[] = {
    [QCOW2_SINGLE_ACTIVE_L1] = QCOW2_GUARD_ACTIVE_L1,
    [QCOW2_SINGLE_REFCOUNT_TABLE] = QCOW2_GUARD_REFCOUNT_TABLE,
    [QCOW2_SINGLE_SNAPSHOT_TABLE] = QCOW2_GUARD_SNAPSHOT_TABLE,
    [QCOW2_SINGLE_BITMAP_DIRECTORY] = QCOW2_GUARD_BITMAP_DIRECTORY,
    [QCOW2_SINGLE_LUKS_HEADER] = QCOW2_GUARD_HEADER,
};

/* ---- words ---- */

static uint64_t row_first(uint64_t row)
{
    return row >> ROW_SHIFT;
}

static uint64_t row_last(uint64_t row)
{
    return (row >> ROW_SHIFT) + (row & ROW_MORE);
}

static bool row_hit(uint64_t row, uint64_t first, uint64_t last)
{
    return row && row_first(row) <= last && first <= row_last(row);
}

static uint64_t row_of(const struct qcow2 *q, uint64_t host_offset, uint64_t bytes)
{
    uint64_t first = host_offset >> q->cluster_bits;
    uint64_t last = (host_offset + bytes - 1) >> q->cluster_bits;

    return bytes ? first << ROW_SHIFT | MIN(last - first, ROW_MORE) : 0;
}

void qcow2_guard_set_single(struct qcow2 *q, enum qcow2_guard_single single, uint64_t host_offset,
                            uint64_t bytes)
{
    atomic_set(&q->guard.singles[single], row_of(q, host_offset, bytes));
}

/* ---- the hash table ---- */

static uint64_t slot_at(const struct qcow2_guard_table *t, uint64_t cluster)
{
    return cluster * t->multiplier >> t->shift;
}

/* Where it is, or would be; there is a free slot. */
static uint64_t *probe(struct qcow2_guard_table *t, uint64_t cluster)
{
    uint64_t i = slot_at(t, cluster);
    uint64_t slot;

    while ((slot = atomic_get_relaxed(&t->slots[i])) && slot >> SLOT_CLUSTER_SHIFT != cluster)
        i = (i + 1) & (t->slot_count - 1); /* relaxed: each word stands for itself */
    return &t->slots[i];
}

static struct qcow2_guard_table *table_new(uint64_t expected)
{
    struct qcow2_guard_table *t;
    uint64_t count = SLOTS_MIN;

    while (count < expected * 2)
        count *= 2;
    t = try_alloc(1, sizeof(*t) + (size_t)count * sizeof(uint64_t));
    if (t) {
        list_init(&t->link);
        loop_random(&t->multiplier, sizeof(t->multiplier));
        t->multiplier |= 1;
        t->slot_count = count;
        t->shift = 64 - (unsigned)__builtin_ctzll(count);
    }
    return t;
}

/* There is a free slot. Under the lock, or where nobody looks yet. */
static void table_add(struct qcow2_guard_table *t, enum qcow2_guard_kind kind, uint64_t cluster)
{
    uint64_t *at = probe(t, cluster);
    uint64_t slot = atomic_get_relaxed(at); /* only we change it */

    t->used += !slot;
    if (kind != QCOW2_GUARD_INACTIVE_L2 && (slot & SLOT_USES) != SLOT_USES)
        slot += SLOT_USE;
    atomic_set(at, cluster << SLOT_CLUSTER_SHIFT | (slot & (SLOT_USES | SLOT_KINDS)) | kind);
}

static bool table_is_full(const struct qcow2_guard_table *t)
{
    return (t->used + 1) * 2 > t->slot_count;
}

/* What is not metadata any more is left out. NULL without memory. */
static struct qcow2_guard_table *table_grown(const struct qcow2_guard_table *old)
{
    struct qcow2_guard_table *t = table_new(old->used * 2);

    for (uint64_t i = 0; t && i < old->slot_count; i++) {
        uint64_t slot = atomic_get_relaxed(&old->slots[i]); /* under the lock */

        if (!(slot & SLOT_KINDS))
            continue;
        *probe(t, slot >> SLOT_CLUSTER_SHIFT) = slot;
        t->used++;
    }
    return t;
}

/* ---- what is replaced: under the lock ---- */

static void free_retired(struct qcow2_guard *g, uint64_t passed)
{
    struct qcow2_guard_table *t;

    while ((t = list_first(&g->retired, struct qcow2_guard_table, link)) && t->ticket <= passed) {
        list_remove(&t->link);
        free(t);
    }
}

/* GUARD-3 */
static void retire(struct qcow2 *q, struct list *link, uint64_t *ticket)
{
    free_retired(&q->guard, epoch_passed(node_epoch(q->node)));
    *ticket = epoch_ticket(node_epoch(q->node));
    list_append(&q->guard.retired, link);
}

static void use_table(struct qcow2 *q, struct qcow2_guard_table *t)
{
    struct qcow2_guard_table *old = q->guard.table;

    atomic_set(&q->guard.table, t);
    if (old)
        retire(q, &old->link, &old->ticket);
}

static void use_rows(struct qcow2 *q, struct qcow2_guard_rows *rows)
{
    struct qcow2_guard_rows *old = q->guard.rows;

    atomic_set(&q->guard.rows, rows);
    if (old)
        retire(q, &old->link, &old->ticket);
}

int qcow2_guard_add(struct qcow2 *q, enum qcow2_guard_kind kind, uint64_t host_offset)
{
    struct qcow2_guard *g = &q->guard;
    int r = 0;

    co_mutex_lock(&g->lock);
    if (g->table && table_is_full(g->table)) {
        struct qcow2_guard_table *t = table_grown(g->table);

        if (t)
            use_table(q, t);
        else
            r = -ENOMEM;
    }
    if (g->table && r == 0)
        table_add(g->table, kind, host_offset >> q->cluster_bits);
    co_mutex_unlock(&g->lock);
    return r;
}

void qcow2_guard_remove(struct qcow2 *q, enum qcow2_guard_kind kind, uint64_t host_offset)
{
    struct qcow2_guard *g = &q->guard;

    co_mutex_lock(&g->lock);
    if (g->table) {
        uint64_t *at = probe(g->table, host_offset >> q->cluster_bits);
        uint64_t slot = atomic_get_relaxed(at); /* only we change it */
        uint64_t uses = slot & SLOT_USES;

        if (uses && uses != SLOT_USES)
            slot -= SLOT_USE;
        if (uses <= SLOT_USE)
            slot &= ~(uint64_t)kind;
        atomic_set(at, slot);
    }
    co_mutex_unlock(&g->lock);
}

/* ---- looking ---- */

static bool hits_rows(const struct qcow2_guard_rows *rows, uint64_t first, uint64_t last)
{
    uint64_t from = 0;
    uint64_t to = rows ? rows->count : 0;

    while (from < to) { /* the last row that begins at `last` or before it is from - 1 */
        uint64_t middle = from + (to - from) / 2;

        if (row_first(rows->rows[middle]) <= last)
            from = middle + 1;
        else
            to = middle;
    }
    return from && row_hit(rows->rows[from - 1], first, last);
}

/* What a slot says to who writes `own`. */
static unsigned slot_hit(uint64_t slot, unsigned own)
{
    unsigned kinds = (unsigned)(slot & SLOT_KINDS);

    /* Those who work on the tables of snapshots, too, find them shared. */
    if (kinds & own && (slot & SLOT_USES) > SLOT_USE && !(own & QCOW2_GUARD_INACTIVE_L2))
        return kinds;
    return kinds & ~own;
}

/* The kinds of metadata, but `own`, that lie there. Inside the epoch. */
static unsigned look_inside(struct qcow2_guard *g, unsigned own, uint64_t first, uint64_t last)
{
    struct qcow2_guard_table *t = atomic_get_acquire(&g->table); /* pairs with use_table() */
    unsigned hit = first ? 0 : QCOW2_GUARD_HEADER & ~own;

    if (!t)
        return 0;
    for (unsigned i = 0; i < QCOW2_SINGLES; i++) {
        /* Acquire: pairs with qcow2_guard_set_single(). */
        if (row_hit(atomic_get_acquire(&g->singles[i]), first, last))
            hit |= single_kinds[i] & ~own;
    }
    if (hits_rows(atomic_get_acquire(&g->rows), first, last)) /* pairs with use_rows() */
        hit |= QCOW2_GUARD_INACTIVE_L1 & ~own;
    for (uint64_t c = first; c <= last; c++)
        hit |= slot_hit(atomic_get_relaxed(probe(t, c)), own);
    return hit;
}

static int look(struct qcow2 *q, unsigned own, uint64_t first, uint64_t last, unsigned *ret)
{
    struct epoch_slot *slot = epoch_slot_here(node_epoch(q->node));
    unsigned phase;

    if (unlikely(!slot))
        return -ENOMEM;
    phase = epoch_enter(slot);
    *ret = look_inside(&q->guard, own, first, last);
    epoch_leave(slot, phase);
    return 0;
}

static const char *kind_text(unsigned kinds)
{
    static const char *const texts[] = {
        "the header",
        "the active L1 table",
        "an active L2 table",
        "the refcount table",
        "a refcount block",
        "the snapshot table",
        "an L1 table of a snapshot",
        "an L2 table of a snapshot",
        "the bitmap directory",
    };

    return texts[__builtin_ctz(kinds)];
}

int qcow2_guard_write(struct qcow2 *q, const struct request *by, unsigned own, uint64_t host_offset,
                      uint64_t bytes)
{
    unsigned hit = 0;
    int r = look(q, own, host_offset >> q->cluster_bits,
                 (host_offset + bytes - 1) >> q->cluster_bits, &hit);

    hit &= q->guard.looks_for;
    if (likely(!hit))
        return r;
    return qcow2_corrupt(q, by, host_offset, bytes, "a write of %s would change %s",
                         own ? "metadata" : "data", kind_text(hit));
}

int qcow2_guard_free(struct qcow2 *q, const struct request *by, uint64_t first, uint64_t count)
{
    unsigned hit = 0;
    int r = look(q, 0, first, first + count - 1, &hit);

    if (likely(!hit))
        return r;
    return qcow2_corrupt(q, by, first << q->cluster_bits, count << q->cluster_bits,
                         "%s lies in clusters that are free", kind_text(hit));
}

bool qcow2_guard_knows(struct qcow2 *q, uint64_t cluster)
{
    unsigned hit = 0;

    return look(q, 0, cluster, cluster, &hit) == 0 && hit;
}

/* ---- all of it ---- */

static int compare_words(const void *a, const void *b)
{
    const uint64_t *x = a;
    const uint64_t *y = b;

    return (*x > *y) - (*x < *y);
}

/* Rows of a damaged image may overlap: they become one, or several where one word is too short. */
static void sort_rows(struct qcow2_guard_rows *rows)
{
    uint64_t n = 0;

    qsort(rows->rows, (size_t)rows->count, sizeof(*rows->rows), compare_words);
    for (uint64_t i = 0; i < rows->count; i++) {
        uint64_t row = rows->rows[i];
        uint64_t end = n ? row_last(rows->rows[n - 1]) + 1 : 0;
        uint64_t first = MAX(row_first(row), end);

        if (row_last(row) >= first)
            rows->rows[n++] = first << ROW_SHIFT | (row_last(row) - first);
    }
    rows->count = n;
}

/* What snapshots have, while it is read. */
struct inactive {
    struct qcow2 *q;
    struct qcow2_guard_rows *rows;
    struct qcow2_guard_table *table;
    uint64_t entries; /* of L1 tables, that were looked at */
};

/* An image may claim any number: beyond these the rest is not known (P6). */
#define INACTIVE_SLOTS_MAX   ((uint64_t)16 << 20)
#define INACTIVE_ENTRIES_MAX ((uint64_t)64 << 20)

static int add_inactive_l2(struct inactive *in, uint64_t cluster)
{
    if (table_is_full(in->table)) {
        struct qcow2_guard_table *t = NULL;

        if (in->table->slot_count < INACTIVE_SLOTS_MAX)
            t = table_grown(in->table);
        if (!t)
            return -ENOMEM;
        free(in->table);
        in->table = t;
    }
    table_add(in->table, QCOW2_GUARD_INACTIVE_L2, cluster);
    return 0;
}

static int see_table(void *arg, uint64_t offset, uint64_t len, uint32_t count)
{
    struct inactive *in = arg;

    qcow2_guard_set_single(in->q, QCOW2_SINGLE_SNAPSHOT_TABLE, offset, len);
    in->rows = try_alloc(1, sizeof(*in->rows) + (size_t)count * sizeof(uint64_t));
    if (!in->rows)
        return -ENOMEM;
    list_init(&in->rows->link);
    return 0;
}

/* A snapshot that says that its table is anywhere must not keep the disk from being written. */
static bool can_lie(const struct qcow2 *q, uint64_t offset, uint64_t bytes)
{
    return bytes <= QCOW2_L1_BYTES_MAX && qcow2_is_cluster(q, offset) &&
           range_within(offset, bytes, node_size(edge_node(q->file)));
}

static int see_l1(void *arg, uint64_t offset, const uint64_t *l1, uint32_t count)
{
    struct inactive *in = arg;
    uint64_t bytes = (uint64_t)count * QCOW2_ENTRY_LEN;
    int r = 0;

    if (bytes && can_lie(in->q, offset, bytes))
        in->rows->rows[in->rows->count++] = row_of(in->q, offset, bytes);
    else if (bytes)
        log_warning("node '%s': a snapshot's L1 table cannot lie at %" PRIu64 " with %" PRIu64
                    " bytes, ignoring",
                    node_name(in->q->node), offset, bytes);
    if (!l1)
        return 0;
    in->entries += count;
    if (in->entries > INACTIVE_ENTRIES_MAX)
        return -ENOMEM;
    for (uint32_t i = 0; i < count && r == 0; i++) {
        if (l1[i] & QCOW2_L1_OFFSET_MASK)
            r = add_inactive_l2(in, (l1[i] & QCOW2_L1_OFFSET_MASK) >> in->q->cluster_bits);
    }
    return r;
}

/* What cannot be read is not known; the disk is as good as before. */
static void co_fn see_snapshots(struct qcow2 *q, const struct request *by, struct inactive *in)
{
    AUTO(error_free) struct error *why = NULL;
    const struct qcow2_snapshot_visitor visitor = {
        .wants_l1 = q->guard.looks_for & QCOW2_GUARD_INACTIVE_L2,
        .table = see_table,
        .l1 = see_l1,
        .arg = in,
    };
    int r;

    qcow2_guard_set_single(q, QCOW2_SINGLE_SNAPSHOT_TABLE, 0, 0);
    r = qcow2_snapshot_visit(q, by, &visitor, &why);
    if (r < 0)
        log_warning("node '%s': not all that its snapshots have is protected from overlaps: %s, "
                    "ignoring",
                    node_name(q->node), why ? error_text(why) : strerror(-r));
    if (in->rows)
        sort_rows(in->rows);
}

static uint64_t count_tables(const struct qcow2 *q)
{
    uint64_t n = 0;

    for (uint32_t i = 0; i < q->map.l1_size; i++)
        n += !!(q->map.l1[i] & QCOW2_L1_OFFSET_MASK);
    for (uint32_t i = 0; i < q->alloc.table_size; i++)
        n += !!q->alloc.table[i];
    return n;
}

static struct qcow2_guard_table *table_of_image(const struct qcow2 *q)
{
    struct qcow2_guard_table *t = table_new(count_tables(q) + SLOTS_MIN);

    for (uint32_t i = 0; t && i < q->map.l1_size; i++) {
        uint64_t l2 = q->map.l1[i] & QCOW2_L1_OFFSET_MASK;

        if (l2 >> q->cluster_bits) /* else it is damage, which its reader finds */
            table_add(t, QCOW2_GUARD_ACTIVE_L2, l2 >> q->cluster_bits);
    }
    for (uint32_t i = 0; t && i < q->alloc.table_size; i++) {
        if (q->alloc.table[i])
            table_add(t, QCOW2_GUARD_REFCOUNT_BLOCK, q->alloc.table[i] >> q->cluster_bits);
    }
    return t;
}

static int co_fn build(struct qcow2 *q, const struct request *by)
{
    struct inactive in = {.q = q, .table = table_of_image(q)};

    if (!in.table)
        return -ENOMEM;
    see_snapshots(q, by, &in);
    co_mutex_lock(&q->guard.lock);
    use_table(q, in.table);
    use_rows(q, in.rows);
    co_mutex_unlock(&q->guard.lock);
    return 0;
}

void qcow2_guard_rebuild(struct qcow2 *q, const struct request *by)
{
    int r = build(q, by);

    qcow2_online_break(q, "snapshots were made, applied or deleted");
    if (r == 0)
        return;
    log_warning("node '%s': its metadata is not protected from overlaps any more: %s, ignoring",
                node_name(q->node), strerror(-r));
    co_mutex_lock(&q->guard.lock);
    use_table(q, NULL);
    co_mutex_unlock(&q->guard.lock);
}

/* ---- opening and closing ---- */

static unsigned kinds_of_mode(enum qcow2_overlap_check_mode mode)
{
    const unsigned constant = QCOW2_GUARD_HEADER | QCOW2_GUARD_ACTIVE_L1 |
                              QCOW2_GUARD_REFCOUNT_TABLE | QCOW2_GUARD_SNAPSHOT_TABLE |
                              QCOW2_GUARD_BITMAP_DIRECTORY;

    switch (mode) {
    case QCOW2_OVERLAP_CHECK_MODE_NONE:
        return 0;
    case QCOW2_OVERLAP_CHECK_MODE_CONSTANT:
        return constant;
    case QCOW2_OVERLAP_CHECK_MODE_CACHED:
        return QCOW2_GUARD_KINDS & ~(unsigned)QCOW2_GUARD_INACTIVE_L2;
    case QCOW2_OVERLAP_CHECK_MODE_ALL:
        break;
    }
    return QCOW2_GUARD_KINDS;
}

static unsigned kinds_of_flags(const struct qcow2_overlap_check_flags *f)
{
    unsigned kinds = kinds_of_mode(f->template);

    const struct {
        bool given;
        bool value;
        enum qcow2_guard_kind kind;
    } flags[] = {
        {f->has_main_header, f->main_header, QCOW2_GUARD_HEADER},
        {f->has_active_l1, f->active_l1, QCOW2_GUARD_ACTIVE_L1},
        {f->has_active_l2, f->active_l2, QCOW2_GUARD_ACTIVE_L2},
        {f->has_refcount_table, f->refcount_table, QCOW2_GUARD_REFCOUNT_TABLE},
        {f->has_refcount_block, f->refcount_block, QCOW2_GUARD_REFCOUNT_BLOCK},
        {f->has_snapshot_table, f->snapshot_table, QCOW2_GUARD_SNAPSHOT_TABLE},
        {f->has_inactive_l1, f->inactive_l1, QCOW2_GUARD_INACTIVE_L1},
        {f->has_inactive_l2, f->inactive_l2, QCOW2_GUARD_INACTIVE_L2},
        {f->has_bitmap_directory, f->bitmap_directory, QCOW2_GUARD_BITMAP_DIRECTORY},
    };

    for (unsigned i = 0; i < ARRAY_SIZE(flags); i++) {
        if (flags[i].given && flags[i].value)
            kinds |= flags[i].kind;
        else if (flags[i].given)
            kinds &= ~(unsigned)flags[i].kind;
    }
    return kinds;
}

static unsigned kinds_of(const struct qcow2_overlap_checks *checks)
{
    if (!checks)
        return kinds_of_mode(QCOW2_OVERLAP_CHECK_MODE_CACHED);
    return checks->kind == QCOW2_OVERLAP_CHECKS_FLAGS ? kinds_of_flags(checks->flags)
                                                      : kinds_of_mode(checks->mode);
}

void qcow2_guard_prepare(struct qcow2 *q)
{
    co_mutex_init(&q->guard.lock);
    list_init(&q->guard.retired);
}

int qcow2_guard_init(struct qcow2 *q, const struct request *by, const struct qcow2_header *header,
                     const struct qcow2_options *opt, struct error **err)
{
    struct qcow2_guard *g = &q->guard;
    int r;

    g->looks_for = kinds_of(opt->overlap_check);
    if (header->has_bitmaps)
        qcow2_guard_set_single(q, QCOW2_SINGLE_BITMAP_DIRECTORY, header->bitmap_directory_offset,
                               header->bitmap_directory_size);
    qcow2_guard_set_single(q, QCOW2_SINGLE_ACTIVE_L1, q->map.l1_offset,
                           (uint64_t)q->map.l1_size * QCOW2_ENTRY_LEN);
    qcow2_guard_set_single(q, QCOW2_SINGLE_REFCOUNT_TABLE, q->alloc.table_offset,
                           (uint64_t)q->alloc.table_size * QCOW2_ENTRY_LEN);
    r = build(q, by);
    return r < 0 ? error_set(err, -r, "node '%s': no memory to know its tables", node_name(q->node))
                 : 0;
}

void qcow2_guard_release(struct qcow2 *q)
{
    struct qcow2_guard *g = &q->guard;

    if (g->retired.next)
        free_retired(g, UINT64_MAX);
    free(g->table);
    free(g->rows);
}
