/* SPDX-License-Identifier: Apache-2.0 */
/* Between the straight way of requests and the way round for unaligned ones. */
#ifndef CAIRN_GRAPH_REQUEST_INTERNAL_H
#define CAIRN_GRAPH_REQUEST_INTERNAL_H

#include "graph/node-internal.h"
#include "graph/request.h"

bool request_is_aligned(const struct node *node, const struct request *req);

/* The driver's read and write, for requests that fit its alignment; writes with FUA done. */
int co_fn node_co_read_aligned(struct node *node, struct request *req);
int co_fn node_co_write_aligned(struct node *node, struct request *req);

/* By whole blocks through a buffer; writes have these blocks for themselves meanwhile. */
int co_fn node_co_read_unaligned(struct node *node, const struct request *req);
int co_fn node_co_write_unaligned(struct node *node, const struct request *req);
/* Zeroes into parts of blocks. */
int co_fn node_co_zero_piece(struct node *node, const struct request *like, uint64_t offset,
                             uint64_t len);

#endif
