/* SPDX-License-Identifier: Apache-2.0 */
/* The structs of nodes and edges, for src/graph alone. */
#ifndef CAIRN_GRAPH_NODE_INTERNAL_H
#define CAIRN_GRAPH_NODE_INTERNAL_H

#include "base/atomic.h"
#include "base/macros.h"
#include "graph/access.h"
#include "graph/driver.h"
#include "graph/epoch.h"
#include "graph/graph.h"
#include "graph/node.h"
#include "graph/overlap.h"
#include "graph/unended.h"
#include "loop/loop.h"

struct change;
struct tracker;

struct edge {
    struct node *node;       /* the child; counted */
    struct node *parent;     /* NULL: the parent is a backend */
    struct backend *backend; /* or NULL */
    char *name;
    bool backing; /* a format's child `backing`: it is walked, not called (Q3) */
    struct access access;

    uint32_t cut; /* atomic: requests that go down it get -EIO (G7) */

    /* Between the prepare and the commit of a change. */
    struct access pending;
    bool is_pending;
    struct node *moving_to; /* it leaves `node` for this one: in its `arriving` */
    struct list arriving_link;

    struct list parent_link; /* in parent->children */
    struct list child_link;  /* in node->parents */
};

struct node {
    /* Read by requests; constant while a gate above is open. */
    const struct driver *driver;
    void *state;
    struct edge *file;    /* the first child that is no backing node */
    struct edge *backing; /* the child `backing` of a format, or NULL */
    uint64_t size;        /* atomic: a format's file grows under load */
    unsigned align;
    unsigned memory_align;
    unsigned preferred_align; /* if larger than align: what a child needs */
    bool lies_below;          /* atomic: some node has, or has had, it as its backing node */
    struct node_settings settings;
    struct tracker *trackers;
    struct overlap overlap; /* what is being written, if align > 1 */
    struct unended unended; /* what the host may still write (G9) */
    struct epoch epoch;     /* who uses what co_map said (Q2) */

    /* Only touched on the control thread. */
    struct graph *graph;
    char name[NODE_NAME_MAX + 1];
    struct list children; /* struct edge */
    struct list parents;  /* struct edge */
    struct list arriving; /* struct edge: those that will be parents when the change commits */
    struct co_wait *close_wait;
    bool abandoned;
    bool closed; /* but for its children */
    struct node *unused_next;
    uint64_t orphan_ns;  /* when it was cut off; 0: it is part of the graph */
    uint64_t went_on_ns; /* when its driver last got somewhere while it closes; 0: never */
    struct list link;    /* in graph->nodes, oldest first */
    struct node *name_next;
    unsigned refs;
    struct list owned; /* struct backend: those that it has for its own use (G2) */
    /* Of the last walk over the graph that came here, by direction (walk.c). */
    uint64_t walked[2];
    struct node *walk_next;
    bool queued;          /* in a node_queue */
    unsigned depth;       /* as far as a walk for it has come */
    uint64_t access_walk; /* the last change of access that came here */
    unsigned guards;      /* while there are any, nobody else changes what is below it (I5) */
    char *wanted_file;    /* a backing file that the image names, and its format; or NULL */
    char *wanted_format;
    bool monitor_owned;
    bool opened;
    bool needs_reopen;          /* D3: takes no more metadata writes */
    struct change *reserved_by; /* G5 */
    struct access access;       /* of all users together, and its own (I5) */
    struct access told;         /* what a driver that guards it has been told last */
    struct node_load load;      /* as a query has seen it last */
    bool touched;               /* by the change that tries to reserve what it needs */
    bool told_late;             /* it is to be told when the host has ended what it left (G9) */
};

static inline bool edge_is_cut(const struct edge *edge)
{
    /* Relaxed: each loop is sent a message after the cut, and looks through its requests then. */
    return atomic_get_relaxed(&edge->cut);
}

/* All of a node's users together, and what it must rely on itself (I5), as it will be when what is pending is committed. */
struct access node_access_sum(const struct node *node);

/* Attaches a child with no access. Takes over a reference to the child. */
struct edge *edge_new(struct node *parent, struct backend *backend, struct node *child,
                      const char *name);
/* Detaches; the access must be none. Returns the child, whose reference is the caller's again. */
struct node *edge_free(struct edge *edge);

/* Operations of the node that their requests have left and that have not ended (G7, G9). */
unsigned node_unresolved(const struct node *node);
/* The same, with those of all that it calls: a backing node is another disk. At most GRAPH_DEPTH_MAX calls deep. */
unsigned node_unresolved_below(const struct node *node);

/* "node 'x'" or the owner of a backend, for messages. */
const char *edge_parent_text(const struct edge *edge);

#endif
