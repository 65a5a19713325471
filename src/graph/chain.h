/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Backing chains: a format says where a range lies, and goes no further; here the layers are asked one after the other, in a
 * loop of constant stack (Q3). For formats that copy on write, and for the core.
 */
#ifndef CAIRN_GRAPH_CHAIN_H
#define CAIRN_GRAPH_CHAIN_H

#include "base/context.h"
#include "graph/graph.h"
#include "graph/node.h"
#include "graph/request.h"

/* Does what lies below read as zeroes, as far as that can be told without reading it? 1, 0, or a negative errno. */
int co_fn chain_co_zero_below(struct node *node, const struct request *req, uint64_t offset,
                              uint64_t len);

/*
 * For a format: its own answers for a range have changed, and are published. Whoever remembers that this layer said "below"
 * looks again.
 */
void chain_changed(struct node *node, uint64_t offset, uint64_t len);
/* The same for all of every chain, behind closed gates: layers have come, gone, or have another size. */
void chain_all_changed(struct graph *g);

/* Requests to a node whose driver has co_map: for the core, and for a format that reads what it shows. */
int co_fn chain_co_read(struct node *top, struct request *req);
/* The same for a copy by the host: -EOPNOTSUPP where a part of the range is not data as it is in some file. */
int co_fn chain_co_copy_out(struct node *top, struct request *req);
/* Adds an extent at least, from the start of the range; none if the array is full. */
int co_fn chain_co_extents(struct node *top, struct request *req);

#endif
