/* SPDX-License-Identifier: Apache-2.0 */
/* A change of access in steps, for changes of the graph: walk, prepare, then commit and finish, or abort. */
#ifndef CAIRN_GRAPH_ACCESS_INTERNAL_H
#define CAIRN_GRAPH_ACCESS_INTERNAL_H

#include "graph/access.h"
#include "graph/node-internal.h"

/* What one change of access touches, in the order in which it was reached. All zero is empty. */
struct access_walk {
    uint64_t number; /* marks the nodes that are in it */
    struct edge **edges;
    struct node **nodes;
    unsigned edge_count;
    unsigned edge_max;
    unsigned node_count;
    unsigned node_max;
    unsigned told; /* nodes whose drivers know, the failing one included */
};

/*
 * Sets what is pending on an edge and all below it that follows from it. Then prepare or abort. -ENOMEM. Goes no further than
 * the consequences do: where a node asks for what it has, nothing below it is looked at.
 */
int access_walk_edge(struct access_walk *walk, struct edge *edge, struct access access,
                     struct error **err);
/* The same for a node whose users change. */
int access_walk_node(struct access_walk *walk, struct node *node, struct error **err);

/*
 * Checks what is pending, all of it together, and tells the drivers that guard their access what they will need beside what
 * they hold. Then commit or abort.
 */
int co_fn control_fn access_co_prepare(struct access_walk *walk, struct error **err);
/* Memory only. */
void access_commit(struct access_walk *walk);
/* Tells the drivers what they need no more. This and abort are the last, and release what the walk holds. */
void co_fn control_fn access_co_finish(struct access_walk *walk);
void co_fn control_fn access_co_abort(struct access_walk *walk);

/* Tells the driver of a node that is reserved what its users hold now, if it does not know; or sees to it that it is told late. */
void co_fn control_fn access_co_settle(struct node *node);

#endif
