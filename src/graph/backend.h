/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A backend is one client's handle on the graph: requests enter through it, past its gate. It holds an edge with the access
 * that its owner needs, and keeps statistics.
 */
#ifndef CAIRN_GRAPH_BACKEND_H
#define CAIRN_GRAPH_BACKEND_H

#include "base/context.h"
#include "base/error.h"
#include "graph/access.h"
#include "graph/gate.h"
#include "graph/graph.h"
#include "graph/request.h"
#include "graph/stats.h"

struct backend;

/* The most that one request may carry (G6). */
#define BACKEND_MAX_DATA ((uint64_t)32 << 20) /* read, write */
#define BACKEND_MAX_RANGE                                                                          \
    ((uint64_t)1 << 30) /* write-zeroes, discard: longer ones are issued in such steps */

/*
 * `owner` is how messages name it ("export 'e0'"), copied. -EPERM if the access conflicts with other users' or the node is
 * read-only.
 */
int co_fn control_fn backend_co_new(struct backend **ret, struct graph *graph,
                                    const char *node_name, struct access access, const char *owner,
                                    struct error **err);
/* Makes it a backend that a node has for its own use: it counts as drained only after all above that node (G2). */
void backend_set_owner_node(struct backend *b, struct node *owner);
/* No node's any more: before its owner goes. Also for one that was nobody's. */
void backend_clear_owner_node(struct backend *b);
/*
 * Waits for its requests, then lets go of the node. Requests that have not ended at the change deadline are answered -EIO,
 * and what the host still holds of them is left to it (G7). Nobody sends any more. Returns NULL.
 */
struct backend *co_fn control_fn backend_co_free(struct backend *b);

/* On each loop that will send requests, once before the first. -ENOMEM. */
int backend_attach(struct backend *b);

/*
 * Sends a request and waits for it. A root request has no pass: it gets one here, and may wait at the gate. One that is done for
 * another request, through a backend that a node owns, comes with that one's pass and waits at no gate (G1). On an attached loop. Reads and writes are at most BACKEND_MAX_DATA.
 * 0 or a negative errno, see edge_co_request(); -EINVAL for a longer one.
 */
int co_fn backend_co_request(struct backend *b, struct request *req);

/*
 * For several requests under one pass: enters past the gate, and leaves. In between, requests carry the pass and wait at no gate.
 * Whoever takes a lock that other requests wait for enters first, or a drain could wait for both. -ECANCELED.
 */
int co_fn backend_co_enter(struct backend *b, struct pass *pass);
void backend_leave(struct backend *b, struct pass *pass);

/* Counts a request that its client's checks refused. */
void backend_count_invalid(struct backend *b, enum request_kind kind);

uint64_t backend_size(const struct backend *b);
/* The unit of offsets and lengths that costs no read-modify-write; bytes. */
unsigned backend_alignment(const struct backend *b);
bool backend_read_only(const struct backend *b);
/* Whether write-zeroes never falls back to writing data, so that "fast only" can be promised. */
bool backend_zeroes_fast(const struct backend *b);
const char *backend_owner(const struct backend *b);
struct node *backend_node(const struct backend *b);

/* For queries. */
void backend_stats(const struct backend *b, struct stats *ret);
void backend_gate_picture(const struct backend *b, struct gate_picture *ret);
bool backend_is_closed(const struct backend *b);
typedef void graph_backend_fn(const struct backend *b, void *arg);
void graph_for_each_backend(struct graph *g, graph_backend_fn *fn, void *arg);

#endif
