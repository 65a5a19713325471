/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Nodes and edges as drivers and users of the graph see them. The graph is made and changed on the control thread only; what
 * requests read of it is constant while a gate above is open.
 */
#ifndef CAIRN_GRAPH_NODE_H
#define CAIRN_GRAPH_NODE_H

#include "base/context.h"
#include "base/error.h"
#include "base/list.h"
#include "graph/access.h"

#include <stdbool.h>
#include <stdint.h>

struct driver;
struct edge;
struct epoch;
struct graph;
struct node;
struct secret;
struct node_options; /* generated: a node's definition */

/* The largest disk: below 2^63 by a margin, so that ends of ranges never wrap. QEMU's limit. */
#define NODE_SIZE_MAX (INT64_MAX - (INT64_MAX % ((int64_t)1 << 30)))

/* A node name has at most this many bytes. */
#define NODE_NAME_MAX 31

/* The attributes that all drivers have in common, as they are in force. Set before open, then constant. */
struct node_settings {
    bool read_only;
    bool auto_read_only;
    bool force_share;
    bool direct;
    bool no_flush;
    bool unmap;          /* discards are passed on */
    bool detect_zeroes;  /* in the data of writes; nobody inherits it */
    bool unmap_detected; /* ...and such space may be given back */
};

const char *node_name(const struct node *node);
const struct driver *node_driver(const struct node *node);
void *node_state(const struct node *node);
const struct node_settings *node_settings(const struct node *node);
uint64_t node_size(const struct node *node);
/* The unit of offsets and lengths that its driver takes; bytes, a power of two. */
unsigned node_alignment(const struct node *node);
/* The unit that costs no read-modify-write, here or below; bytes, a power of two. */
unsigned node_preferred_alignment(const struct node *node);

/* The edge to the child of this name, or the first one for "file". NULL if there is none. */
struct edge *node_child(const struct node *node, const char *name);
/* The first child that is no backing node: a filter's or format's `file`. */
struct edge *node_file(const struct node *node);
/* The child `backing` of a format; NULL if there is none. The core walks it, drivers do not call it (Q3). */
struct edge *node_backing(const struct node *node);
/* For formats with a map: who uses what it said (Q2). */
struct epoch *node_epoch(struct node *node);

struct node *edge_node(const struct edge *edge);
const char *edge_name(const struct edge *edge);

/* Does REQUEST_GROW work here, and does what is new read as zeroes? */
bool node_grows(const struct node *node);
/*
 * The format that keeps its metadata in this node, and lets it grow under load, also through raw and filters; NULL if there is
 * none. Nodes with trackers do not grow so: bitmaps belong on the format. Control thread.
 */
const struct node *node_metadata_user(const struct node *node);
/* Has the host not ended operations, of it or of its file, that their requests have left (G9)? Any loop. */
bool node_has_unresolved(const struct node *node);

/* For co_open and co_resize. */
void node_set_size(struct node *node, uint64_t size);
/* `memory`: of addresses; not more than `request`, unless that is 1. Both powers of two, bytes. */
void node_set_alignment(struct node *node, unsigned request, unsigned memory);
/*
 * For drivers that take any offset and hand requests on to a child that does not: the unit that costs no read-modify-write
 * there. That is left to the child, where it excludes all other writers.
 */
void node_set_preferred_alignment(struct node *node, unsigned request);
/* For co_open: opened for reading only after all. */
void node_set_read_only(struct node *node);
/* For co_open: a copy of the secret that its options name; secret_release() ends it. -EINVAL if they name none, -ENOENT. */
int node_get_secret(const struct node *node, const char *id, struct secret *ret,
                    struct error **err);
/*
 * For co_open of a format, when the options say nothing of a backing node: what its image names shall be opened, as a file of
 * that format, if grants allow it (Q6).
 */
void node_want_backing(struct node *node, const char *file, const char *format);
/* For co_open: it is guarded from now on, once more (see struct guard_action). */
void node_guard(struct node *node);
/*
 * For co_close, whenever it has got somewhere: another operation of the host has ended. Who waits for it waits on, for a change's
 * deadline from now; without it the node is an orphan after that time (G7).
 */
void node_closing_goes_on(struct node *node);
/*
 * For co_open of a format: opens the file that its image names for this child, as the node itself is opened, if grants allow it
 * (Q6), and attaches it.
 */
int co_fn control_fn node_co_attach_file(struct node *node, const char *child,
                                         const char *reference, struct error **err);

#endif
