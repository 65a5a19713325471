/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Changes of the graph, under load (D1): prepare, close and drain, persist, commit, open. A change is a list of actions; all
 * of them are done, or all is undone. Control thread only.
 *
 * CHANGE-1 Before it prepares anything, a change reserves the nodes that it touches, all below them, and all between them
 *          and their backends (G5), so that it commits into the graph that it has seen. A backend that a node owns is on the
 *          way from that node. Disjoint changes run side by side; an
 *          overlapping one queues, FIFO, with a deadline, and a refusal names who holds the node.
 * CHANGE-2 All gates above close at once for roots; then they drain top-down: a backend that a node owns counts as drained
 *          only after all above that node (G2). An insider's gate stays open until it is done (G3).
 * CHANGE-3 One deadline covers prepare, draining, the insider and the persist writes. Past it the change is undone, the gates open,
 *          and the error names who is in the way.
 * CHANGE-4 Nothing that a request does starts or awaits a change.
 */
#ifndef CAIRN_GRAPH_CHANGE_H
#define CAIRN_GRAPH_CHANGE_H

#include "base/context.h"
#include "base/error.h"
#include "base/list.h"
#include "graph/gate.h"
#include "graph/graph.h"

/* How long a change may wait for another one, and then take until its gates open again. */
#define CHANGE_DEADLINE_DEFAULT_NS (10 * NS_PER_S)

struct backend;
struct change;
struct change_action;

/* What an action does in each step; steps that it does not have are NULL. */
struct change_action_ops {
    /* Makes everything that commit needs, off to the side (D1, D4). */
    int (*co_prepare)(struct change_action *a, struct error **err);
    /*
     * I/O behind closed gates, in the name of action_pass(). Each write leaves the old and the new graph readable with the
     * same content (D2).
     */
    int (*co_persist)(struct change_action *a, struct error **err);
    /* Writes the old state back after a later step failed, or this one did half-way (D3). */
    int (*co_undo)(struct change_action *a, struct error **err);
    /* Memory only; cannot fail. */
    void (*commit)(struct change_action *a);
    /* Lets go of what prepare made; also when that failed half-way. */
    void (*co_abort)(struct change_action *a);
    /* After the gates are open again: what can wait. */
    void (*co_finish)(struct change_action *a);
};

enum change_stage { CHANGE_NEW, CHANGE_PREPARED, CHANGE_PERSISTED };

/* Embedded by what an action needs to know. */
struct change_action {
    const struct change_action_ops *ops;
    struct node *node; /* whose metadata persist writes; or NULL */
    struct change *change;
    enum change_stage stage;
    struct list link;
};

/* Runs while all other gates are closed and drained, until it is done (G3). */
typedef int change_insider_fn(struct change *c, void *arg, struct error **err);

/* On the stack of the coroutine that carries the change out. */
struct change {
    struct graph *graph;
    char *what; /* as messages name it: "blockdev-add 'disk0'" */
    const char **roots;
    unsigned root_count;
    unsigned root_max;
    const struct edge *root_edge; /* or NULL: the node below it is a root, whichever that will be */
    const struct change
        *within;  /* what this one has reserved is free for us: we are a part of it */
    bool upwards; /* reserves what is above, too */
    bool holds;
    struct list link; /* in graph->changes: in order of arrival, holding or waiting */
    struct co_wait *wait;
    uint64_t deadline_ns;

    struct list actions;  /* struct change_action */
    struct list backends; /* those whose gates it closes: backend.change_link */
    struct backend *insider;
    change_insider_fn *insider_fn;
    void *insider_arg;
    struct pass pass; /* of the requests that persist sends */
};

void change_init(struct change *c, struct graph *graph, const char *fmt, ...) PRINTF_LIKE(3, 4);
/* Names a node to reserve, with all below it. The name must stay until change_end(). -ENOMEM. */
int change_add_root(struct change *c, const char *node_name, struct error **err);
void change_add_action(struct change *c, struct change_action *a,
                       const struct change_action_ops *ops);
/* Names the one insider; what it uses is reserved too. */
void change_set_insider(struct change *c, struct backend *b, change_insider_fn *fn, void *arg);

/* Carries the change out, all steps. Then change_end(). */
int co_fn control_fn change_co_run(struct change *c, struct error **err);

/*
 * For changes that no request can see, such as adding a node: reserves all roots and what is below them at once, and no
 * more. -ENOENT if one does not exist, -EBUSY at the deadline.
 */
int co_fn control_fn change_co_reserve(struct change *c, struct error **err);
/* As above for the node below an edge, as long as it takes: for what cannot fail. */
void co_fn control_fn change_co_hold(struct change *c, const struct edge *edge);
/* Gives everything back, and lets the next ones try. */
void control_fn change_end(struct change *c);

/* The pass for requests that a persist step sends. */
struct pass *action_pass(struct change_action *a);

void graph_set_change_deadline(struct graph *g, uint64_t ns);
uint64_t graph_change_deadline(const struct graph *g);

#endif
