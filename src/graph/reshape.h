/* SPDX-License-Identifier: Apache-2.0 */
/* Pieces of changes for those who put their own together: filters that come and go with a job. Control thread only. */
#ifndef CAIRN_GRAPH_RESHAPE_H
#define CAIRN_GRAPH_RESHAPE_H

#include "base/context.h"
#include "base/error.h"
#include "graph/access.h"
#include "graph/change.h"
#include "graph/node.h"

struct access_walk;
struct driver;

/*
 * Opens a filter above a node that the change has reserved: for an action's prepare. Nobody uses it yet, and it wants nothing of
 * the child until somebody does. `name` NULL: a made-up one. The caller has a reference, dropped by graph_co_drop().
 */
int co_fn control_fn graph_co_add_filter(struct change *c, const struct driver *driver,
                                         const void *options, const char *name, struct node *child,
                                         struct node **ret, struct error **err);
/* Drops a reference to a node that is reserved, or that nobody else knows. */
void co_fn control_fn graph_co_drop(struct node *node);

/* All users of one node use another one from the commit on; see graph_co_replace(). */
struct replace_action {
    struct change_action action;
    struct node *from; /* may be set by an earlier action's prepare */
    struct node *to;   /* NULL: what `from`, a filter, has as its child when that is reserved */
    struct access_walk *walk;
};

void replace_action_add(struct change *c, struct replace_action *rp, struct node *from,
                        struct node *to);

/*
 * I5: while a node is guarded, which is counted, nobody changes what is below it but the node itself: its children's edges do
 * not tolerate it, and a driver that tells other programs is told. Its own users write as they do. One more guard (+1) or one less
 * (-1) from the commit on; -EPERM and the errors of drivers if somebody else writes there already. The node stays until the change has
 * ended.
 */
struct guard_action {
    struct change_action action;
    struct node *node; /* set by an earlier action's prepare */
    int by;
    struct access_walk *walk;
};

void guard_action_add(struct change *c, struct guard_action *g, int by);

#endif
