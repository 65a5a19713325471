/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What drivers find wrong with the metadata of an image, on any loop, told to whoever speaks for the graph, on the control
 * thread. What is told is copied, so that the node may be gone by then.
 */
#ifndef CAIRN_GRAPH_DAMAGE_H
#define CAIRN_GRAPH_DAMAGE_H

#include "base/context.h"

#include <stdbool.h>
#include <stdint.h>

struct graph;
struct node;

struct node_damage {
    const char *what;
    bool has_place; /* offset and size, bytes of the file */
    uint64_t offset;
    uint64_t size;
    bool fatal; /* the node takes no more requests */
};

/* Must not wait. */
typedef void graph_damage_fn(const char *node_name, const struct node_damage *d, void *arg);

/* Before there are nodes; without it nobody is told. */
void graph_on_damage(struct graph *g, graph_damage_fn *fn, void *arg);
/* For drivers, from any loop. Does not wait. */
void node_tell_damage(struct node *node, const struct node_damage *d);
/* Waits until all that was told has arrived. There are no nodes any more. */
void co_fn control_fn damage_co_end(struct graph *g);

#endif
