/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A check of an image in use. References first, refcounts after that: since no refcount falls meanwhile and nothing is used again
 * (ONLINE-1), each reference that was seen, whenever that was, has had its count since before it was written, and has it still. Where
 * a refcount has fallen all the same, since so much was freed, that is known, and such clusters are left out.
 *
 *   begin   writers that allocate have ended, for a moment; what they did is on the disk; the allocator withholds from now on
 *   walk    refcounts, so that most entries need no second look; L1, L2, snapshots, bitmaps: each table as it is on the disk
 *   end     refcounts again; what the allocator has in hand is no leak; compare
 *
 * Tables are read under the lock that is held while they are written, so that no read is torn: those of mappings under
 * flush.lock, refcount blocks under alloc.lock, a piece at a time.
 */
#include "base/alloc.h"
#include "base/atomic.h"
#include "base/macros.h"
#include "formats/qcow2/check/qcow2-check-internal.h"
#include "formats/qcow2/qcow2.h"
#include "graph/backend.h"
#include "graph/change.h"
#include "loop/scope.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

extern const struct driver qcow2_driver;

/* So much of what is freed meanwhile is withheld, or this share of the file if it is more. */
#define WITHHELD_BYTES GIB
#define WITHHELD_SHARE 8

struct run {
    struct check x;
    struct check_online online;
    struct qcow2_online alloc;
    struct qcow2_counts loose; /* clusters that may be counted without a reference */
    int begun;
};

static int note_loose(struct run *c, uint64_t first, uint64_t count)
{
    int r = 0;

    for (uint64_t i = 0; i < count && r == 0; i++)
        r = qcow2_count_add(&c->loose, QCOW2_USED, first + i, 1);
    return r;
}

/* Under alloc.lock and flush.lock. */
static int note_all_loose(struct run *c)
{
    struct qcow2_place *v = NULL;
    size_t n = 0;
    int r = qcow2_online_loose(c->online.q, &v, &n);

    for (size_t i = 0; i < n && r == 0; i++)
        r = note_loose(c, v[i].first, v[i].count);
    free(v);
    return r;
}

static int co_fn lock_both(struct qcow2 *q)
{
    int r = co_mutex_lock_until(&q->alloc.lock, LOOP_FOREVER);

    if (r < 0)
        return r;
    r = co_mutex_lock_until(&q->flush.lock, LOOP_FOREVER);
    if (r < 0)
        co_mutex_unlock(&q->alloc.lock);
    return r;
}

static void unlock_both(struct qcow2 *q)
{
    co_mutex_unlock(&q->flush.lock);
    co_mutex_unlock(&q->alloc.lock);
}

/* ---- begin ---- */

/* In clusters. */
static uint64_t withheld_max(const struct run *c)
{
    uint64_t bytes = c->x.options->withheld_max;
    uint64_t share = node_size(edge_node(c->online.file)) / WITHHELD_SHARE;

    return (bytes ? bytes : MAX(share, WITHHELD_BYTES)) >> c->online.q->cluster_bits;
}

/* No writer has clusters in hand that are not mapped: the range is the whole disk. */
static int co_fn begin_alone(struct run *c, const struct request *by)
{
    struct qcow2 *q = c->online.q;
    int r = qcow2_flush_mappings(q, by);

    if (r == 0)
        r = lock_both(q);
    if (r < 0)
        return r;
    r = qcow2_online_begin(q, &c->alloc, withheld_max(c));
    if (r == 0) {
        r = note_all_loose(c);
        c->begun = 1;
    }
    unlock_both(q);
    return r;
}

static int co_fn begin_once(struct run *c)
{
    struct qcow2 *q = c->online.q;
    struct overlap_range range;
    struct pass pass = {0};
    struct request by = {.kind = REQUEST_FLUSH, .pass = &pass};
    int r = backend_co_enter(c->online.backend, &pass);

    if (r < 0)
        return r;
    r = qcow2_flush_mappings(q, &by); /* most of it, before others wait */
    if (r == 0)
        r = overlap_begin(&q->ranges, &range, 0, INT64_MAX, true);
    if (r == 0) {
        r = begin_alone(c, &by);
        overlap_end(&q->ranges, &range);
    }
    backend_leave(c->online.backend, &pass);
    return r;
}

struct beginning {
    struct run *c;
    int result;
};

static void co_fn begin(void *arg)
{
    struct beginning *b = arg;

    do
        b->result = begin_once(b->c);
    while (b->result == -ERESTART);
}

static int co_fn begin_in_time(struct run *c, struct error **err)
{
    struct beginning b = {.c = c};
    struct co_scope scope;
    int r;

    co_scope_init(&scope);
    co_scope_set_deadline(&scope, loop_clock() + CHANGE_DEADLINE_DEFAULT_NS);
    r = co_scope_start(&scope, begin, &b);
    co_scope_join(&scope);
    if (r == 0)
        r = b.result;
    if (r == -EBUSY)
        return error_set(err, EBUSY, "the image is being checked already");
    if (r == -ETIMEDOUT)
        return error_set(err, ETIMEDOUT, "the image's writers do not end in time");
    return r < 0 ? error_set(err, -r, "cannot flush the image: %s", strerror(-r)) : 0;
}

/* ---- walk and end ---- */

/* As they are on the disk now. */
static int co_fn load_stored_again(struct run *c)
{
    struct check *x = &c->x;
    struct qcow2 *q = c->online.q;
    int r;

    for (size_t i = 0; i < x->counts.slot_count; i++) {
        struct qcow2_leaf *l = x->counts.slots[i];

        if (!l)
            continue;
        memset(l->narrow[QCOW2_STORED], 0, sizeof(l->narrow[QCOW2_STORED]));
        if (l->wide[QCOW2_STORED])
            memset(l->wide[QCOW2_STORED], 0, QCOW2_LEAF * sizeof(uint64_t));
    }
    r = co_mutex_lock_until(&q->alloc.lock, LOOP_FOREVER);
    if (r < 0)
        return r;
    free(x->table);
    x->table = try_new_n(uint64_t, (size_t)q->alloc.table_size + 1);
    x->table_size = q->alloc.table_size;
    if (x->table)
        memcpy(x->table, q->alloc.table, (size_t)x->table_size * sizeof(*x->table));
    x->h.refcount_table_offset = q->alloc.table_offset;
    x->h.refcount_table_clusters =
        (uint32_t)((x->table_size * QCOW2_ENTRY_LEN) >> x->h.cluster_bits);
    x->file_size = check_file_size(x);
    x->clusters = (x->file_size + x->cluster - 1) >> x->h.cluster_bits;
    co_mutex_unlock(&q->alloc.lock);
    if (!x->table)
        return -ENOMEM;
    c->online.lock = &q->alloc.lock;
    return check_load_blocks(x);
}

/* What is counted and in the allocator's hands counts as used. */
static int co_fn settle_loose(struct run *c)
{
    struct qcow2 *q = c->online.q;
    int r = lock_both(q);

    if (r < 0)
        return r;
    r = note_all_loose(c);
    unlock_both(q);
    return r;
}

/* A cluster that has not as many counts as references: if nothing is to be said of that, it has. */
static void settle_one(struct run *c, struct qcow2_leaf *l, unsigned i)
{
    uint64_t cluster = (l->index << QCOW2_LEAF_BITS) + i;
    uint64_t stored = qcow2_leaf_count(l, QCOW2_STORED, i);
    uint64_t used = qcow2_leaf_count(l, QCOW2_USED, i);
    bool moved = qcow2_online_has(c->alloc.moved, cluster);

    if (stored > used && (moved || qcow2_count(&c->loose, QCOW2_USED, cluster) ||
                          qcow2_online_has(c->alloc.counted, cluster)))
        qcow2_count_sub(&c->x.counts, QCOW2_STORED, cluster, stored - used);
    else if (moved)
        qcow2_count_sub(&c->x.counts, QCOW2_USED, cluster, used - stored);
}

static void settle_leaf(struct run *c, struct qcow2_leaf *l)
{
    for (unsigned i = 0; i < QCOW2_LEAF; i++) {
        if (qcow2_leaf_count(l, QCOW2_STORED, i) != qcow2_leaf_count(l, QCOW2_USED, i))
            settle_one(c, l, i);
    }
}

static void settle_counts(struct run *c)
{
    for (size_t i = 0; i < c->x.counts.slot_count; i++) {
        if (c->x.counts.slots[i])
            settle_leaf(c, c->x.counts.slots[i]);
    }
    c->x.r.moved_clusters = MIN(qcow2_online_count(c->alloc.moved), c->x.clusters);
}

static int look_at_suspects(struct run *c)
{
    int r = 0;

    c->online.settled = true;
    for (size_t i = 0; i < c->online.suspect_count && r == 0; i++) {
        const struct check_suspect *s = &c->online.suspects[i];

        if (!qcow2_online_has(c->alloc.moved, s->cluster))
            r = check_copied(&c->x, s->l1_index, s->entry, s->cluster);
    }
    return r;
}

/* All references to guest data and tables; the refcounts as they are when it begins. */
static int co_fn walk(struct run *c)
{
    struct check *x = &c->x;
    int r;

    c->online.lock = c->online.q ? &c->online.q->alloc.lock : NULL;
    if ((r = check_load_table(x)) < 0 || (r = check_load_blocks(x)) < 0)
        return r;
    c->online.lock = c->online.q ? &c->online.q->flush.lock : NULL;
    if ((r = check_refer_early(x)) < 0)
        return r;
    return check_l2_tables(x);
}

static int co_fn finish(struct run *c)
{
    struct check *x = &c->x;
    int r;

    if (!c->online.q) {
        r = check_refer_refcounts(x);
    } else if ((r = load_stored_again(c)) == 0 && (r = settle_loose(c)) == 0) {
        r = check_refer_refcounts(x);
        if (r == 0)
            r = look_at_suspects(c);
        settle_counts(c);
    }
    return r == 0 ? check_compare(x) : r;
}

static const char *why_broken(struct run *c)
{
    if (!c->begun)
        return NULL;
    return atomic_get(&c->alloc.broken);
}

static int co_fn check_all(struct run *c, struct error **err)
{
    struct check *x = &c->x;
    int r;

    x->counts.memory_max = x->options->memory_max;
    x->file_size = check_file_size(x);
    c->online.lock = c->online.q ? &c->online.q->flush.lock : NULL;
    r = check_read_header(x, err);
    if (r < 0)
        return r;
    r = walk(c);
    if (r == 0)
        r = finish(c);
    if (why_broken(c)) { /* whatever was found may not be true */
        error_free(err);
        return error_set(err, EAGAIN, "%s: try again", why_broken(c));
    }
    return r < 0 ? check_failed(x, r, err) : 0;
}

/* What was withheld is taken up now, not only by the next flush. */
static void co_fn end(struct run *c)
{
    struct pass pass = {0};
    struct request by = {.kind = REQUEST_FLUSH, .pass = &pass};

    qcow2_online_end(c->online.q, &c->alloc);
    if (backend_co_enter(c->online.backend, &pass) < 0)
        return;
    (void)qcow2_alloc_settle(c->online.q, &by); /* the next flush tells */
    backend_leave(c->online.backend, &pass);
}

int qcow2_co_check_online(struct backend *b, const struct qcow2_check_options *options,
                          struct qcow2_check_result *ret, struct error **err)
{
    struct node *node = backend_node(b);
    struct run *c;
    struct qcow2 *q;
    int r = 0;

    *ret = (struct qcow2_check_result){0};
    if (node_driver(node) != &qcow2_driver)
        return error_set(err, ENOTSUP, "node '%s': images of this format cannot be checked",
                         node_name(node));
    q = node_state(node);
    c = try_new(struct run); /* more than a coroutine's stack should have */
    if (!c)
        return error_set(err, ENOMEM, "no memory");
    c->online = (struct check_online){.backend = b, .file = q->file, .q = q->writable ? q : NULL};
    c->x = (struct check){.options = options, .name = node_name(node), .online = &c->online};
    c->loose.memory_max = options->memory_max / 4;
    if (c->online.q)
        r = begin_in_time(c, err);
    if (r == 0)
        r = check_all(c, err);
    if (c->begun)
        end(c);
    *ret = c->x.r;
    check_forget(&c->x);
    qcow2_counts_release(&c->loose);
    free(c->online.suspects);
    free(c);
    return r < 0 ? error_wrap(err, r, "cannot check node '%s'", node_name(node)) : 0;
}
