/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Walks over the graph: which nodes lie above or below one. A node that has backends for its own use (G2) is above the nodes
 * that these lead to, as it is above its children: requests come down both ways. Each node is visited once, and without
 * recursion, since chains may be long and graphs may share much.
 */
#include "base/macros.h"
#include "graph/backend-internal.h"
#include "graph/graph-internal.h"

static void visit(struct node *node, enum walk_direction direction, uint64_t walk,
                  struct node **todo)
{
    if (node->walked[direction] == walk)
        return;
    node->walked[direction] = walk;
    node->walk_next = *todo;
    *todo = node;
}

static void visit_above(struct node *node, uint64_t walk, struct node **todo)
{
    const struct edge *e;

    list_for_each (&node->parents, e, child_link) {
        if (e->parent)
            visit(e->parent, WALK_UP, walk, todo);
        else if (e->backend->owner_node)
            visit(e->backend->owner_node, WALK_UP, walk, todo);
    }
}

static void visit_below(struct node *node, uint64_t walk, struct node **todo)
{
    const struct backend *b;
    const struct edge *e;

    list_for_each (&node->children, e, parent_link)
        visit(e->node, WALK_DOWN, walk, todo);
    list_for_each (&node->owned, b, owned_link)
        visit(b->root->node, WALK_DOWN, walk, todo);
}

void node_queue_add(struct node_queue *q, struct node *node)
{
    if (node->queued)
        return;
    node->queued = true;
    node->walk_next = NULL;
    if (q->first)
        q->last->walk_next = node;
    else
        q->first = node;
    q->last = node;
}

struct node *node_queue_take(struct node_queue *q)
{
    struct node *node = q->first;

    if (node) {
        q->first = node->walk_next;
        node->queued = false;
    }
    return node;
}

/* The longest way so far, and how much longer it can be. */
struct depths {
    struct node_queue queue;
    enum walk_direction direction;
    uint64_t walk;
    unsigned deepest;
};

static void deepen(struct depths *d, struct node *node, unsigned depth)
{
    if (node->walked[d->direction] == d->walk && node->depth >= depth)
        return;
    node->walked[d->direction] = d->walk;
    node->depth = depth;
    d->deepest = MAX(d->deepest, depth);
    node_queue_add(&d->queue, node);
}

static void deepen_next(struct depths *d, const struct node *node)
{
    const struct edge *e;

    if (d->direction == WALK_DOWN) {
        list_for_each (&node->children, e, parent_link)
            deepen(d, e->node, node->depth + !e->backing);
        return;
    }
    list_for_each (&node->parents, e, child_link) {
        if (e->parent)
            deepen(d, e->parent, node->depth + !e->backing);
    }
}

/* Chains are long, and what is common to many is looked at once, unless a longer way leads there. */
static unsigned depth_from(struct node *from, enum walk_direction direction)
{
    struct depths d = {.direction = direction, .walk = graph_walk_begin(from->graph)};
    const struct node *node;

    deepen(&d, from, 1);
    while ((node = node_queue_take(&d.queue))) {
        if (d.deepest <= GRAPH_DEPTH_MAX)
            deepen_next(&d, node);
    }
    return d.deepest;
}

unsigned node_depth_below(struct node *node)
{
    return depth_from(node, WALK_DOWN);
}

unsigned node_depth_above(struct node *node)
{
    return depth_from(node, WALK_UP);
}

uint64_t graph_walk_begin(struct graph *g)
{
    return ++g->walks;
}

void graph_walk(struct node *from, enum walk_direction direction, uint64_t walk)
{
    struct node *todo = NULL;
    struct node *node;

    visit(from, direction, walk, &todo);
    while ((node = todo)) {
        todo = node->walk_next;
        if (direction == WALK_UP)
            visit_above(node, walk, &todo);
        else
            visit_below(node, walk, &todo);
    }
}
