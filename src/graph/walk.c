/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Walks over the graph: which nodes lie above or below one. A node that has backends for its own use (G2) is above the nodes
 * that these lead to, as it is above its children: requests come down both ways. Each node is visited once, and without
 * recursion, since chains may be long and graphs may share much.
 */
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
