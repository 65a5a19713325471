/* SPDX-License-Identifier: Apache-2.0 */
/* The allocator's side of a check of an image in use. */
#include "formats/qcow2/qcow2-online.h"
#include "base/alloc.h"
#include "base/atomic.h"
#include "base/macros.h"
#include "bitmaps/bitmap.h"
#include "formats/qcow2/qcow2.h"

#include <errno.h>
#include <stdlib.h>

/* What is noted of a cluster is a granule of a bitmap. */
#define GRANULE  BITMAP_GRANULARITY_MIN
#define GRANULES ((uint64_t)1 << 53) /* more clusters than a file can have */

int qcow2_online_begin(struct qcow2 *q, struct qcow2_online *o, uint64_t withheld_max)
{
    if (q->alloc.online)
        return -EBUSY;
    *o = (struct qcow2_online){.withheld_max = withheld_max};
    list_init(&o->kept);
    o->counted = bitmap_new(GRANULES * GRANULE, GRANULE);
    o->moved = bitmap_new(GRANULES * GRANULE, GRANULE);
    if (!o->counted || !o->moved) {
        o->counted = bitmap_free(o->counted);
        o->moved = bitmap_free(o->moved);
        return -ENOMEM;
    }
    tiny_lock_acquire(&q->lock);
    q->alloc.online = o;
    tiny_lock_release(&q->lock);
    return 0;
}

static void detach(struct qcow2 *q)
{
    struct qcow2_run *run;

    tiny_lock_acquire(&q->lock);
    while ((run = list_first(&q->alloc.online->kept, struct qcow2_run, link))) {
        list_remove(&run->link);
        list_prepend(&q->alloc.graced, &run->link);
    }
    q->alloc.online = NULL;
    tiny_lock_release(&q->lock);
}

void qcow2_online_end(struct qcow2 *q, struct qcow2_online *o)
{
    co_mutex_lock(&q->alloc.lock);
    if (q->alloc.online == o)
        detach(q);
    co_mutex_unlock(&q->alloc.lock);
    o->counted = bitmap_free(o->counted);
    o->moved = bitmap_free(o->moved);
}

void qcow2_online_break_locked(struct qcow2 *q, const char *why)
{
    if (!q->alloc.online)
        return;
    atomic_set(&q->alloc.online->broken, why);
    detach(q);
}

void qcow2_online_break(struct qcow2 *q, const char *why)
{
    co_mutex_lock(&q->alloc.lock);
    qcow2_online_break_locked(q, why);
    co_mutex_unlock(&q->alloc.lock);
}

/* ---- what is noted and withheld ---- */

bool qcow2_online_has(const struct bitmap *noted, uint64_t cluster)
{
    uint64_t offset;
    uint64_t len;

    return bitmap_next_dirty(noted, cluster * GRANULE, (cluster + 1) * GRANULE, &offset, &len);
}

uint64_t qcow2_online_count(const struct bitmap *noted)
{
    return bitmap_count(noted) / GRANULE;
}

void qcow2_online_counted(struct qcow2 *q, uint64_t first, uint64_t count)
{
    if (q->alloc.online)
        bitmap_set(q->alloc.online->counted, first * GRANULE, count * GRANULE);
}

bool qcow2_online_withholds(struct qcow2 *q)
{
    const struct qcow2_online *o = q->alloc.online;
    bool withholds;

    if (!o)
        return false;
    tiny_lock_acquire(&q->lock);
    withholds = !o->needed && o->withheld <= o->withheld_max;
    tiny_lock_release(&q->lock);
    return withholds;
}

void qcow2_online_need(struct qcow2 *q)
{
    if (!q->alloc.online)
        return;
    tiny_lock_acquire(&q->lock);
    q->alloc.online->needed = true;
    tiny_lock_release(&q->lock);
}

bool qcow2_online_give_up(struct qcow2 *q)
{
    bool keeps = false;

    if (q->alloc.online) {
        tiny_lock_acquire(&q->lock);
        keeps = !list_empty(&q->alloc.online->kept);
        tiny_lock_release(&q->lock);
    }
    if (keeps)
        qcow2_online_break_locked(q, "what was freed meanwhile is needed");
    return keeps;
}

bool qcow2_online_release(struct qcow2 *q, struct qcow2_run *run)
{
    struct qcow2_online *o = q->alloc.online;
    bool keep = o && run->table;

    if (!o)
        return true;
    tiny_lock_acquire(&q->lock);
    o->withheld -= MIN(o->withheld, run->count);
    if (keep)
        list_append(&o->kept, &run->link);
    tiny_lock_release(&q->lock);
    if (!keep)
        bitmap_set(o->moved, run->first * GRANULE, run->count * GRANULE);
    return !keep;
}

/* ---- what is loose ---- */

struct gathering {
    struct qcow2_place *v; /* NULL: they are only counted */
    size_t count;
    size_t max;
};

static void gather(struct gathering *g, uint64_t first, uint64_t count)
{
    if (count && g->count < g->max)
        g->v[g->count] = (struct qcow2_place){first, count};
    g->count += !!count;
}

static void gather_list(struct gathering *g, const struct list *l)
{
    const struct qcow2_run *run;

    list_for_each (l, run, link)
        gather(g, run->first, run->count);
}

static void gather_locked(const struct qcow2 *q, struct gathering *g)
{
    const struct qcow2_alloc *a = &q->alloc;
    uint64_t pack = a->pack >> q->cluster_bits;

    gather(g, a->fresh, a->fresh_end - a->fresh);
    gather(g, pack, (a->pack_end >> q->cluster_bits) - pack);
    for (unsigned i = 0; i < QCOW2_REUSE_LISTS; i++)
        gather_list(g, &a->reuse[i]);
    gather_list(g, &a->freed);
    gather_list(g, &a->graced);
    if (a->online)
        gather_list(g, &a->online->kept);
}

int qcow2_online_loose(struct qcow2 *q, struct qcow2_place **ret, size_t *ret_count)
{
    struct gathering g = {.count = 0};

    do {
        free(g.v);
        g.max = g.count * 2 + 64; /* writers go on freeing */
        g.v = try_new_n(struct qcow2_place, g.max);
        if (!g.v)
            return -ENOMEM;
        g.count = 0;
        tiny_lock_acquire(&q->lock);
        gather_locked(q, &g);
        tiny_lock_release(&q->lock);
    } while (g.count > g.max);
    *ret = g.v;
    *ret_count = g.count;
    return 0;
}
