/* SPDX-License-Identifier: Apache-2.0 */
/* The allocator's side of a check of an image in use. */
#include "formats/qcow2/qcow2-online.h"
#include "base/alloc.h"
#include "base/atomic.h"
#include "base/macros.h"
#include "formats/qcow2/qcow2.h"

#include <errno.h>
#include <stdlib.h>

/* So much may be freed meanwhile, or this share of the file if it is more. */
#define WITHHELD_BYTES GIB
#define WITHHELD_SHARE 8

int qcow2_online_begin(struct qcow2 *q, struct qcow2_online *o)
{
    uint64_t share = node_size(edge_node(q->file)) / WITHHELD_SHARE;

    if (q->alloc.online)
        return -EBUSY;
    *o = (struct qcow2_online){.withheld_max = MAX(share, WITHHELD_BYTES) >> q->cluster_bits};
    list_init(&o->counted);
    tiny_lock_acquire(&q->lock);
    q->alloc.online = o;
    tiny_lock_release(&q->lock);
    return 0;
}

static void detach(struct qcow2 *q)
{
    tiny_lock_acquire(&q->lock);
    q->alloc.online = NULL;
    tiny_lock_release(&q->lock);
}

void qcow2_online_end(struct qcow2 *q, struct qcow2_online *o)
{
    struct qcow2_run *run;

    co_mutex_lock(&q->alloc.lock);
    if (q->alloc.online == o)
        detach(q);
    while ((run = list_first(&o->counted, struct qcow2_run, link))) {
        list_remove(&run->link);
        free(run);
    }
    co_mutex_unlock(&q->alloc.lock);
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

void qcow2_online_counted(struct qcow2 *q, uint64_t first, uint64_t count)
{
    struct qcow2_run *run;

    if (!q->alloc.online)
        return;
    run = try_new(struct qcow2_run);
    if (!run) {
        q->alloc.online->lost = true;
        return;
    }
    run->first = first;
    run->count = count;
    list_init(&run->link);
    list_append(&q->alloc.online->counted, &run->link);
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
