/* SPDX-License-Identifier: Apache-2.0 */
/* Ranges that the host may still write to; the design is in the header. */
#include "graph/unended.h"
#include "base/checked.h"
#include "base/macros.h"
#include "graph/change.h"
#include "graph/graph-internal.h"
#include "graph/late.h"
#include "graph/node-internal.h"
#include "graph/request.h"
#include "graph/tracker.h"

#include <errno.h>

/* How often a waiter looks whether the host has let go. */
#define LOOK_NS (20 * NS_PER_MS)

static uint64_t width(const struct unended_range *r)
{
    return r->end - r->first;
}

static struct unended_range both(const struct unended_range *a, const struct unended_range *b)
{
    return (struct unended_range){MIN(a->first, b->first), MAX(a->end, b->end)};
}

/* What covering both adds to what they cover themselves; 0 if they meet. */
static uint64_t gap(const struct unended_range *a, const struct unended_range *b)
{
    struct unended_range u = both(a, b);

    return width(&u) - MIN(width(&u), width(a) + width(b));
}

static void insert_locked(struct unended *u, struct unended_range range)
{
    unsigned best = 0;

    for (unsigned i = 1; i < u->count; i++) {
        if (gap(&u->ranges[i], &range) < gap(&u->ranges[best], &range))
            best = i;
    }
    u->added++;
    if (u->count == UNENDED_MAX || (u->count && gap(&u->ranges[best], &range) == 0)) {
        u->ranges[best] = both(&u->ranges[best], &range);
        return;
    }
    u->ranges[u->count] = range;
    atomic_set(&u->count, u->count + 1);
}

static void add_range(struct node *node, uint64_t first, uint64_t end)
{
    struct unended *u = &node->unended;

    tiny_lock_acquire(&u->lock);
    insert_locked(u, (struct unended_range){first, end});
    tiny_lock_release(&u->lock);
}

void unended_add(struct node *node, const struct request *req, uint64_t first, uint64_t end)
{
    add_range(node, first, end);
    late_wake(node->graph, req->pass);
}

static bool is_hit(struct unended *u, uint64_t first, uint64_t end)
{
    bool hit = false;

    tiny_lock_acquire(&u->lock);
    for (unsigned i = 0; i < u->count && !hit; i++)
        hit = first < u->ranges[i].end && u->ranges[i].first < end;
    tiny_lock_release(&u->lock);
    return hit;
}

/* A copy of what there is; the number of ranges. */
static unsigned take_copy(struct unended *u, struct unended_range *ret_ranges, unsigned *ret_added)
{
    unsigned n;

    tiny_lock_acquire(&u->lock);
    n = u->count;
    for (unsigned i = 0; i < n; i++)
        ret_ranges[i] = u->ranges[i];
    *ret_added = u->added;
    tiny_lock_release(&u->lock);
    return n;
}

static void tell(const struct node *node, const struct unended_range *ranges, unsigned count)
{
    uint64_t size = node_size(node);

    for (unsigned i = 0; i < count; i++) {
        uint64_t end = MIN(ranges[i].end, size);

        for (struct tracker *t = node->trackers; t && ranges[i].first < end; t = t->next)
            t->changed(t, ranges[i].first, end - ranges[i].first);
    }
}

static void tell_again(struct node *node)
{
    struct unended_range ranges[UNENDED_MAX];
    unsigned added;
    unsigned n = take_copy(&node->unended, ranges, &added);

    tell(node, ranges, n);
}

/*
 * One that is left meanwhile is counted by the node that has left it before it is added here: who adds finds that one counting,
 * and what was copied before it counted none had ended. What was added since then stays.
 */
static void forget_ended(struct node *node)
{
    struct unended *u = &node->unended;
    struct unended_range ranges[UNENDED_MAX];
    unsigned added;
    unsigned n = take_copy(u, ranges, &added);

    if (!n || node_unresolved_below(node))
        return;
    tell(node, ranges, n);
    tiny_lock_acquire(&u->lock);
    if (u->added == added)
        atomic_set(&u->count, 0u);
    tiny_lock_release(&u->lock);
}

int unended_co_wait(struct node *node, struct request *req)
{
    uint64_t first = align_down(req->offset, node->align);
    uint64_t end = align_up(req->offset + req->len, node->align);
    int r = 0;

    if (!node->driver->unresolved)
        return 0; /* it is a node below that knows where the host will write */
    while (r == 0) {
        forget_ended(node);
        if (!is_hit(&node->unended, first, end))
            break;
        if (req->kind == REQUEST_COPY_IN)
            return -EOPNOTSUPP; /* it would wait inside its source; a write waits as it should */
        r = co_park_until(req, loop_clock() + LOOK_NS); /* G6: it is no child that it waits for */
    }
    return r;
}

void unended_tell_before(const struct change *c)
{
    struct node *node;

    list_for_each (&c->graph->nodes, node, link) {
        if (node->reserved_by == c && unended_any(&node->unended))
            tell_again(node);
    }
}

/* Does a node that this one calls, at any depth, have changes of its own that have not ended? */
static bool any_below(const struct node *node)
{
    const struct edge *e;

    list_for_each (&node->children, e, parent_link) {
        if (!e->backing && (unended_any(&e->node->unended) || any_below(e->node)))
            return true;
    }
    return false;
}

void unended_tell_after(const struct change *c)
{
    struct node *node;

    list_for_each (&c->graph->nodes, node, link) {
        if (node->reserved_by != c || !node->trackers)
            continue;
        if (!unended_any(&node->unended) && any_below(node)) {
            add_range(node, 0, UINT64_MAX); /* UNENDED-4 */
            late_watch(c->graph);
        }
        tell_again(node);
    }
}

bool unended_look(struct graph *g)
{
    struct node *node;
    bool more = false;

    list_for_each (&g->nodes, node, link) {
        if (unended_any(&node->unended))
            forget_ended(node);
        more |= unended_any(&node->unended);
    }
    return more;
}
