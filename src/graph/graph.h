/* SPDX-License-Identifier: Apache-2.0 */
/* The graph: all nodes and backends of a process, by name. Control thread only. */
#ifndef CAIRN_GRAPH_GRAPH_H
#define CAIRN_GRAPH_GRAPH_H

#include "base/context.h"
#include "base/error.h"
#include "base/list.h"
#include "graph/node.h"

struct graph;
struct driver;
struct node_options; /* generated: what blockdev-add takes */

/* `drivers`: NULL-terminated lists of drivers, themselves NULL-terminated. All outlive the graph. */
struct graph *graph_new(const struct driver *const *const *drivers);
/* Closes all nodes, parents before children. There are no backends any more. Returns NULL. */
struct graph *co_fn control_fn graph_co_free(struct graph *g);

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
 * Walks all nodes, the youngest first. `fn` must not yield or change the graph.
 */
typedef void graph_node_fn(struct node *node, void *arg);
void graph_for_each_node(struct graph *g, graph_node_fn *fn, void *arg);
/* Edges between nodes of one parent, in order. */
typedef void graph_edge_fn(const struct node *parent, const struct edge *edge, struct access access,
                           void *arg);
void node_for_each_child(const struct node *node, graph_edge_fn *fn, void *arg);
/* The change that has reserved the node, as text; NULL if none. Borrowed. */
const char *node_reserved_by(const struct node *node);

#endif
