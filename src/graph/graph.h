/* SPDX-License-Identifier: Apache-2.0 */
/* The graph: all nodes and backends of a process, by name. Control thread only. */
#ifndef CAIRN_GRAPH_GRAPH_H
#define CAIRN_GRAPH_GRAPH_H

#include "base/context.h"
#include "base/error.h"
#include "base/list.h"
#include "graph/gate.h"
#include "graph/node.h"

struct graph;
struct driver;
struct secrets;

/* Requests that have come to a node, those included that have gone on below it; the oldest, and the node that it is in. */
struct node_load {
    unsigned in_flight;
    struct gate_oldest oldest;
};

struct node_options; /* generated: what blockdev-add takes */

/* `drivers`: NULL-terminated lists of drivers, themselves NULL-terminated. All outlive the graph. */
struct graph *graph_new(const struct driver *const *const *drivers);
/* Closes all nodes, parents before children. There are no backends any more. Returns NULL. */
struct graph *co_fn control_fn graph_co_free(struct graph *g);

/* The secrets that nodes are opened with. Borrowed. */
struct secrets *graph_secrets(struct graph *g);

/* NULL if there is none. Borrowed. */
struct node *graph_find(struct graph *g, const char *name);
/* As graph_find(), with an error that names what was asked for. */
int graph_need(struct graph *g, const char *name, struct node **ret, struct error **err);

/*
 * Opens a node with all inline children that its definition holds. At the top it must have a name; it then belongs to the
 * monitor until graph_co_del(). -EEXIST, -EINVAL, and what drivers say.
 */
int co_fn control_fn graph_co_add(struct graph *g, const struct node_options *options,
                                  struct error **err);
/* Closes a node of the monitor's, with the inline children that only it uses. -EBUSY if it has users. */
int co_fn control_fn graph_co_del(struct graph *g, const char *name, struct error **err);

/*
 * Changes the size of a node, behind closed gates. -EPERM if a user does not tolerate it, and what drivers say. On failure
 * the size is what it was.
 */
int co_fn control_fn graph_co_resize(struct graph *g, const char *name, uint64_t size,
                                     struct error **err);
/*
 * Lets all users of node `from` use node `to` instead, at once and under load, but those that lie below `to` or are `to`
 * itself: with `to` a filter above `from` this inserts it, with `to` the child of a filter `from` it takes the filter out.
 * -EINVAL if sizes differ; -EPERM on conflicts of access; -ETIMEDOUT if requests do not end in time. On failure nothing has
 * changed.
 */
int co_fn control_fn graph_co_replace(struct graph *g, const char *from, const char *to,
                                      struct error **err);

/*
 * Walks all nodes, the youngest first. `fn` must not yield or change the graph.
 */
typedef void graph_node_fn(struct node *node, void *arg);
void graph_for_each_node(struct graph *g, graph_node_fn *fn, void *arg);
/* Nodes that were cut off (G7), with their age and how many operations the host has not ended. */
typedef void graph_orphan_fn(const struct node *node, uint64_t age_ns, unsigned unresolved,
                             void *arg);
void graph_for_each_orphan(struct graph *g, graph_orphan_fn *fn, void *arg);
/* Has a node that is being closed got somewhere within the deadline of a change (node_closing_goes_on())? */
bool graph_closing_gets_on(const struct graph *g);
/* Edges between nodes of one parent, in order. */
typedef void graph_edge_fn(const struct node *parent, const struct edge *edge, struct access access,
                           void *arg);
void node_for_each_child(const struct node *node, graph_edge_fn *fn, void *arg);
/*
 * Looks what requests are on their way; node_load() shows it then. A loop that does not answer within 100 ms is left out.
 */
void co_fn control_fn graph_co_look(struct graph *g);
void node_load(const struct node *node, struct node_load *ret);
/* What the driver says of its file, for queries. NULL and false if it does not, or while the node opens or closes. Borrowed. */
const char *node_filename(const struct node *node);
bool node_allocated_bytes(const struct node *node, uint64_t *ret);
/* It takes no more metadata writes (D3). */
bool node_needs_reopen(const struct node *node);
/* The change that has reserved the node, as text; NULL if none. Borrowed. */
const char *node_reserved_by(const struct node *node);

#endif
