/* SPDX-License-Identifier: Apache-2.0 */
/* The struct of backends, for src/graph alone. */
#ifndef CAIRN_GRAPH_BACKEND_INTERNAL_H
#define CAIRN_GRAPH_BACKEND_INTERNAL_H

#include "graph/backend.h"
#include "graph/node-internal.h"

struct backend {
    struct edge *root; /* changes behind the closed gate */
    struct gate gate;
    struct stats *stats[LOOP_MAX]; /* each set once, by its own loop; atomic */

    /* Control thread. */
    struct graph *graph;
    struct list link; /* in graph->backends */
    char *owner;
    struct node *owner_node; /* the node that has it for its own use (G2); NULL: a client */
    struct list owned_link;  /* in owner_node->owned */
    struct list change_link; /* in change->backends */
    bool drained;            /* within a change */
};

/* Attached to a node, with no access: for changes that have reserved it. */
struct backend *control_fn backend_new(struct node *node, const char *owner);

#endif
