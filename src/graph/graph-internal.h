/* SPDX-License-Identifier: Apache-2.0 */
/* The graph's own fields, for src/graph alone. */
#ifndef CAIRN_GRAPH_GRAPH_INTERNAL_H
#define CAIRN_GRAPH_GRAPH_INTERNAL_H

#include "base/list.h"
#include "graph/change.h"
#include "graph/damage.h"
#include "graph/graph.h"
#include "graph/node-internal.h"
#include "loop/scope.h"

#define GRAPH_NAME_BUCKETS 1024
#define CHAIN_GENERATIONS  256
#define CHAIN_REGION_SIZES 2

struct graph {
    const struct driver *const *const *drivers;
    struct list nodes;    /* struct node, oldest first */
    struct list backends; /* struct backend */
    struct list changes;  /* struct change */
    struct list orphans;  /* struct node (G7) */
    struct list grants;   /* struct grant (Q6) */
    struct secrets *secrets;
    struct co_scope closers;
    struct node *names[GRAPH_NAME_BUCKETS];
    unsigned next_auto_name;
    uint64_t change_deadline_ns;
    uint64_t closing_went_on_ns; /* when any node that is being closed last got somewhere */
    uint64_t chain_generations[CHAIN_REGION_SIZES]
                              [CHAIN_GENERATIONS]; /* atomic; of all chains (Q3) */
    uint64_t walks;                                /* begun so far */
    bool watching;                                 /* late.c */
    uint32_t wake_out;                             /* atomic: `wake` is under way */
    struct loop_message wake;
    struct loop *control; /* damage.c; constant once there are nodes, as the next two */
    graph_damage_fn *damage_fn;
    void *damage_arg;
    uint32_t damage_out; /* atomic: reports under way */
};

/*
 * A walk marks the nodes that it comes to, itself included, in node->walked[direction]. Several may have the same number; then
 * the marks are those of all of them. Up goes to parents, and to nodes that own the backends there; down likewise.
 */
enum walk_direction { WALK_DOWN, WALK_UP };

uint64_t graph_walk_begin(struct graph *g);
void graph_walk(struct node *from, enum walk_direction direction, uint64_t walk);

/*
 * Nodes that a walk has yet to go on from, first in, first out, each in it once at most. All zero is empty. One at a time, and
 * none while graph_walk() runs: the links are in the nodes.
 */
struct node_queue {
    struct node *first;
    struct node *last;
};

void node_queue_add(struct node_queue *q, struct node *node);
/* NULL: it is empty. */
struct node *node_queue_take(struct node_queue *q);

/* Drops a reference; the last one closes the node and lets go of its children. The node is reserved. */
void co_fn control_fn node_co_unref(struct node *node);

/* Gives up what the host still holds, naming it in the log. True if there is anything. */
bool co_fn control_fn graph_abandon_orphans(struct graph *g);

/* Requests go down by calls: how many nodes may lie on top of each other (Q3). */
#define GRAPH_DEPTH_MAX 64

/*
 * The most nodes on a path down from this one, or up from it, itself included, that call each other; not exact above
 * GRAPH_DEPTH_MAX. A backing node is not called by the one above it: both count as one.
 */
unsigned node_depth_below(struct node *node);
unsigned node_depth_above(struct node *node);

/* What a node must ask of its child so that its own users, and its own metadata, get what they need. */
struct access access_below(const struct edge *child);

/* Drops all grants. */
void grants_release(struct graph *g);

void graph_name_insert(struct graph *g, struct node *node);
void graph_name_remove(struct graph *g, struct node *node);

#endif
