/* SPDX-License-Identifier: Apache-2.0 */
/* The list of a node's trackers. */
#include "graph/tracker.h"
#include "graph/node-internal.h"

#include <assert.h>

void node_attach_tracker(struct node *node, struct tracker *t)
{
    t->next = node->trackers;
    node->trackers = t;
}

void node_detach_tracker(struct node *node, struct tracker *t)
{
    struct tracker **at = &node->trackers;

    while (*at && *at != t)
        at = &(*at)->next;
    assert(*at);
    *at = t->next;
    t->next = NULL;
}

void node_tell_changed(struct node *node, uint64_t offset, uint64_t len)
{
    for (struct tracker *t = node->trackers; t; t = t->next)
        t->changed(t, offset, len);
}

struct tracker *node_trackers(const struct node *node)
{
    return node->trackers;
}
