/* SPDX-License-Identifier: Apache-2.0 */
/* The structs of nodes and edges, for src/graph alone. */
#ifndef CAIRN_GRAPH_NODE_INTERNAL_H
#define CAIRN_GRAPH_NODE_INTERNAL_H

#include "base/macros.h"
#include "graph/access.h"
#include "graph/driver.h"
#include "graph/graph.h"
#include "graph/node.h"
#include "graph/overlap.h"
#include "loop/loop.h"

struct change;

struct edge {
    struct node *node;       /* the child; counted */
    struct node *parent;     /* NULL: the parent is a backend */
    struct backend *backend; /* or NULL */
    char *name;
    struct access access;

    struct access pending; /* Only within access_change(). */
    bool is_pending;

    struct list parent_link; /* in parent->children */
    struct list child_link;  /* in node->parents */
};

struct node {
    /* Read by requests; constant while a gate above is open. */
    const struct driver *driver;
    void *state;
    struct edge *file; /* the first child */
    uint64_t size;
    unsigned align;
    unsigned memory_align;
    unsigned preferred_align; /* if larger than align: what a child needs */
    struct node_settings settings;
    struct overlap overlap; /* what is being written, if align > 1 */

    /* Only touched on the control thread. */
    struct graph *graph;
    char name[NODE_NAME_MAX + 1];
    struct list children; /* struct edge */
    struct list parents;  /* struct edge */
    struct list link;     /* in graph->nodes, oldest first */
    struct node *name_next;
    unsigned refs;
    bool monitor_owned;
    bool opened;
    struct change *reserved_by; /* G5 */
    struct access access;       /* of all users together */
};

/* All of a node's users together, with one edge's access replaced by what is pending. */
struct access node_access_sum(const struct node *node);

/* Attaches a child with no access. Takes over a reference to the child. */
struct edge *edge_new(struct node *parent, struct backend *backend, struct node *child,
                      const char *name);
/* Detaches; the access must be none. Returns the child, whose reference is the caller's again. */
struct node *edge_free(struct edge *edge);

/* "node 'x'" or the owner of a backend, for messages. */
const char *edge_parent_text(const struct edge *edge);

#endif
