/* SPDX-License-Identifier: Apache-2.0 */
/* Reservations: changes against changes (G5, CHANGE-1). */
#include "base/alloc.h"
#include "base/macros.h"
#include "graph/backend-internal.h"
#include "graph/change.h"
#include "graph/graph-internal.h"
#include "loop/co.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>

/* A node that the change starts from, as the graph is now: others may have changed it while this one waited. */
static void walk_from(const struct change *c, struct node *root, uint64_t walk)
{
    graph_walk(root, WALK_DOWN, walk);
    if (c->upwards)
        graph_walk(root, WALK_UP, walk);
}

/* Marks all that a change touches. -ENOENT if a node that it names is not there. */
static int walk_touched(const struct change *c, uint64_t walk, struct error **err)
{
    for (unsigned i = 0; i < c->root_count; i++) {
        struct node *root;
        int r = graph_need(c->graph, c->roots[i], &root, err);

        if (r < 0)
            return r;
        walk_from(c, root, walk);
    }
    if (c->root_edge)
        walk_from(c, c->root_edge->node, walk);
    if (c->insider)
        walk_from(c, c->insider->root->node, walk);
    return 0;
}

static bool is_touched(const struct node *node, uint64_t walk)
{
    return node->walked[WALK_DOWN] == walk || node->walked[WALK_UP] == walk;
}

/* Does a change that came first and still waits want any of the nodes that are `touched`? */
static bool wants_touched(const struct change *other)
{
    AUTO(error_free) struct error *ignored = NULL;
    uint64_t walk = graph_walk_begin(other->graph);
    const struct node *node;

    (void)walk_touched(other, walk, &ignored); /* one that finds nothing wants nothing */
    list_for_each (&other->graph->nodes, node, link) {
        if (node->touched && is_touched(node, walk))
            return true;
    }
    return false;
}

/* 1: all is free. 0: *ret_holder holds some of it, or came first for it. */
static int can_hold(struct change *c, const char **ret_holder, struct error **err)
{
    uint64_t walk = graph_walk_begin(c->graph);
    struct change *other;
    struct node *node;
    int r = walk_touched(c, walk, err);

    if (r < 0)
        return r;
    list_for_each (&c->graph->nodes, node, link)
        node->touched = is_touched(node, walk);
    list_for_each (&c->graph->nodes, node, link) {
        if (node->touched && node->reserved_by && node->reserved_by != c->within) {
            *ret_holder = node->reserved_by->what;
            return 0;
        }
    }
    list_for_each (&c->graph->changes, other, link) {
        if (other == c || c->within)
            break;
        if (!other->holds && wants_touched(other)) {
            *ret_holder = other->what;
            return 0;
        }
    }
    return 1;
}

/* What can_hold() has just found to be free. */
static void take_touched(struct change *c)
{
    struct node *node;

    list_for_each (&c->graph->nodes, node, link) {
        if (node->touched && !node->reserved_by)
            node->reserved_by = c;
    }
    c->holds = true;
}

static int co_fn control_fn reserve_until(struct change *c, uint64_t deadline, struct error **err)
{
    const char *holder;
    int r;

    list_append(&c->graph->changes, &c->link);
    while ((r = can_hold(c, &holder, err)) == 0) {
        struct co_wait w;

        co_wait_init(&w, co_wait_leave);
        c->wait = &w;
        r = co_wait(&w, deadline);
        c->wait = NULL;
        if (r == -ETIMEDOUT)
            return error_set(err, EBUSY, "%s: its nodes are held by %s", c->what, holder);
        if (r < 0)
            return error_set(err, -r, "%s was cancelled", c->what);
    }
    if (r < 0)
        return r;
    take_touched(c);
    return 0;
}

int change_co_reserve(struct change *c, struct error **err)
{
    return reserve_until(c, loop_clock() + c->graph->change_deadline_ns, err);
}

void change_co_hold(struct change *c, const struct edge *edge)
{
    AUTO(error_free) struct error *ignored = NULL;

    c->root_edge = edge;
    co_shield_begin();
    (void)reserve_until(c, LOOP_FOREVER, &ignored); /* shielded, no deadline, and the node exists */
    co_shield_end();
    assert(c->holds);
}

void change_end(struct change *c)
{
    struct change *other;
    struct node *node;

    list_for_each (&c->graph->nodes, node, link) {
        if (node->reserved_by == c)
            node->reserved_by = NULL;
    }
    list_remove(&c->link);
    list_for_each (&c->graph->changes, other, link) {
        if (other->wait && !other->wait->ended)
            co_wait_end(other->wait, 0);
    }
    free(c->roots);
    free(c->what);
}
