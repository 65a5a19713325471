/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Trackers: who wants to know what changes on a node's disk. Bitmaps are trackers.
 *
 * C2: changed() is called before a change (write, write-zeroes, discard; not write-unchanged) is submitted and again before it
 * completes, also when it failed: whoever clears a bit between the two sees it set again. For a change that was left to the
 * host it is called once more when that has ended, and until then after each change of the graph that may have cleared bits
 * (UNENDED-3).
 *
 * A node's trackers come and go behind closed gates: in the commit of a change's action, or while the node has no users.
 */
#ifndef CAIRN_GRAPH_TRACKER_H
#define CAIRN_GRAPH_TRACKER_H

#include "base/context.h"
#include "graph/node.h"

#include <stdint.h>

/* Embedded in what tracks. Stays until it is detached from its node. */
struct tracker {
    /* On any loop, also on several at once; must not yield. The range lies within the node. */
    void (*changed)(struct tracker *t, uint64_t offset, uint64_t len);
    /* On the control thread behind closed gates: the node has another size now. Cannot fail. */
    void (*resized)(struct tracker *t, uint64_t size);
    /* On the control thread: the node is being closed, and the tracker is detached; may be NULL. */
    void (*closed)(struct tracker *t);

    struct tracker *next; /* of the same node; for the graph */
};

/* Memory only: for commits (D1). */
void control_fn node_attach_tracker(struct node *node, struct tracker *t);
void control_fn node_detach_tracker(struct node *node, struct tracker *t);

/* For what a driver changes by itself, with no request in flight. */
void node_tell_changed(struct node *node, uint64_t offset, uint64_t len);

/* On the control thread: the first one; the others by their `next`. */
struct tracker *node_trackers(const struct node *node);

#endif
