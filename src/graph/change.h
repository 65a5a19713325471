/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Changes of the graph against each other (G5): a change reserves the nodes that it touches before it prepares anything, so
 * that it commits into the graph that it has seen. Disjoint changes run side by side; an overlapping one queues, FIFO, with a
 * deadline, and a refusal names who holds the node. Control thread only.
 */
#ifndef CAIRN_GRAPH_CHANGE_H
#define CAIRN_GRAPH_CHANGE_H

#include "base/context.h"
#include "base/error.h"
#include "base/list.h"
#include "graph/graph.h"

/* How long a change waits for another one, or for requests to end. Settable. */
#define CHANGE_DEADLINE_DEFAULT_NS (10 * NS_PER_S)

/* How many nodes a change may start from. */
#define CHANGE_ROOTS 8

/* On the stack of the coroutine that carries the change out. */
struct change {
    struct graph *graph;
    char *what; /* as messages name it: "blockdev-add 'disk0'" */
    const char *roots[CHANGE_ROOTS];
    unsigned root_count;
    bool holds;
    struct list link; /* in graph->changes: in order of arrival, holding or waiting */
    struct co_wait *wait;
};

void change_init(struct change *c, struct graph *graph, const char *fmt, ...) PRINTF_LIKE(3, 4);
/* Names a node to reserve, with all below it. The name must stay until change_end(). -E2BIG. */
int change_add_root(struct change *c, const char *node_name, struct error **err);

/* Reserves all roots and what is below them at once. -ENOENT if one does not exist, -EBUSY at the deadline. */
int co_fn control_fn change_co_reserve(struct change *c, struct error **err);
/* As above for one node, as long as it takes: for what cannot fail. */
void co_fn control_fn change_co_hold(struct change *c, const struct node *node);
/* Gives everything back, and lets the next ones try. */
void control_fn change_end(struct change *c);

void graph_set_change_deadline(struct graph *g, uint64_t ns);
uint64_t graph_change_deadline(const struct graph *g);

#endif
