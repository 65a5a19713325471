/* SPDX-License-Identifier: Apache-2.0 */
/* Reservations: changes against changes (G5, CHANGE-1). */
#include "base/alloc.h"
#include "base/macros.h"
#include "graph/change.h"
#include "graph/graph-internal.h"
#include "loop/co.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>

typedef const char *subtree_fn(struct node *node, struct change *c);

/* Calls fn for a node and all below it until one returns non-NULL, which is returned. */
static const char *for_subtree(struct node *node, subtree_fn *fn, struct change *c)
{
    const char *found = fn(node, c);
    const struct edge *e;

    list_for_each (&node->children, e, parent_link) {
        if (found)
            break;
        found = for_subtree(e->node, fn, c);
    }
    return found;
}

/* The same for a node and all above it. */
static const char *for_ancestors(struct node *node, subtree_fn *fn, struct change *c)
{
    const char *found = fn(node, c);
    const struct edge *e;

    list_for_each (&node->parents, e, child_link) {
        if (found)
            break;
        if (e->parent)
            found = for_ancestors(e->parent, fn, c);
    }
    return found;
}

/* All that a change from this root touches. */
static const char *for_touched(struct node *root, subtree_fn *fn, struct change *c)
{
    const char *found = for_subtree(root, fn, c);

    return found || !c->upwards ? found : for_ancestors(root, fn, c);
}

static const char *holder_of(struct node *node, struct change *c)
{
    return node->reserved_by && node->reserved_by != c ? node->reserved_by->what : NULL;
}

static const char *take_node(struct node *node, struct change *c)
{
    node->reserved_by = c;
    return NULL;
}

static bool subtree_has(const struct node *node, const struct node *other)
{
    const struct edge *e;

    if (node == other)
        return true;
    list_for_each (&node->children, e, parent_link) {
        if (subtree_has(e->node, other))
            return true;
    }
    return false;
}

/* Do the nodes of two waiting changes overlap? Conservative: compares each one's roots with the other's subtrees. */
static bool changes_overlap(const struct change *a, const struct change *b)
{
    for (unsigned i = 0; i < a->root_count; i++) {
        for (unsigned k = 0; k < b->root_count; k++) {
            const struct node *na = graph_find(a->graph, a->roots[i]);
            const struct node *nb = graph_find(b->graph, b->roots[k]);

            if (na && nb && (subtree_has(na, nb) || subtree_has(nb, na)))
                return true;
        }
    }
    return false;
}

/* 1: all is free. 0: *ret_holder holds some of it, or came first for it. */
static int can_hold(struct change *c, const char **ret_holder, struct error **err)
{
    struct change *other;

    for (unsigned i = 0; i < c->root_count; i++) {
        struct node *root;
        int r = graph_need(c->graph, c->roots[i], &root, err);

        if (r < 0)
            return r;
        *ret_holder = for_touched(root, holder_of, c);
        if (*ret_holder)
            return 0;
    }
    list_for_each (&c->graph->changes, other, link) {
        if (other == c)
            break;
        if (!other->holds && changes_overlap(other, c)) {
            *ret_holder = other->what;
            return 0;
        }
    }
    return 1;
}

static bool wait_cancel(struct co_wait *w)
{
    (void)w;
    return true;
}

static int co_fn control_fn reserve_until(struct change *c, uint64_t deadline, struct error **err)
{
    const char *holder;
    int r;

    list_append(&c->graph->changes, &c->link);
    while ((r = can_hold(c, &holder, err)) == 0) {
        struct co_wait w;

        co_wait_init(&w, wait_cancel);
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
    for (unsigned i = 0; i < c->root_count; i++)
        (void)for_touched(graph_find(c->graph, c->roots[i]), take_node, c);
    c->holds = true;
    return 0;
}

int change_co_reserve(struct change *c, struct error **err)
{
    return reserve_until(c, loop_clock() + c->graph->change_deadline_ns, err);
}

void change_co_hold(struct change *c, const struct node *node)
{
    AUTO(error_free) struct error *ignored = NULL;

    c->roots[c->root_count++] = node->name;
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
    free(c->what);
}
