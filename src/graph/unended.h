/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Changes of data that their requests have left and that the host has not ended (G8, G9): what lies in their ranges is
 * indeterminate. A few ranges per node; more become wider.
 *
 * UNENDED-1 A node whose driver has left a change to the host notes its range. So does each node above that the request has come
 *           through, in its own offsets: its pass says that there is something (pass->left).
 * UNENDED-2 In the node itself, whoever wants to change such a range waits, so that no late write comes over his.
 * UNENDED-3 A late write changes the disk when C2 has long been obeyed, so that trackers are told again (P2): behind closed
 *           gates before and after a change commits, since bits may be taken and cleared there; and when the host has ended.
 *           Only then is the range forgotten.
 * UNENDED-4 A tracked node below which there are such changes that did not come through it, since it is younger or was not on
 *           their way, does not know which they are: all of it is told.
 */
#ifndef CAIRN_GRAPH_UNENDED_H
#define CAIRN_GRAPH_UNENDED_H

#include "base/atomic.h"
#include "base/context.h"
#include "loop/lock.h"

#include <stdbool.h>
#include <stdint.h>

#define UNENDED_MAX 8

struct change;
struct graph;
struct node;
struct request;

struct unended_range {
    uint64_t first;
    uint64_t end;
};

/* All zero is empty. */
struct unended {
    struct tiny_lock lock;
    unsigned count; /* atomic; changed under lock */

    /* Protected by lock. */
    unsigned added; /* so far */
    struct unended_range ranges[UNENDED_MAX];
};

static inline bool unended_any(const struct unended *u)
{
    /*
     * Relaxed: whoever writes where another loop's write was left has no order with it but what clients make themselves, by
     * waiting for its answer; that comes after the range was added, by messages or sockets.
     */
    return atomic_get_relaxed(&u->count);
}

/* UNENDED-1: for a request that was left, at this node or below. */
void unended_add(struct node *node, const struct request *req, uint64_t first, uint64_t end);

/*
 * Waits until nothing of the kind is left in the request's range (UNENDED-2). 0; -ERESTART and -ECANCELED as co_park_until().
 */
int co_fn unended_co_wait(struct node *node, struct request *req);

/* Behind closed gates: tells the trackers of all nodes that the change has reserved (UNENDED-3); afterwards also UNENDED-4. */
void control_fn unended_tell_before(const struct change *c);
void control_fn unended_tell_after(const struct change *c);

/* Tells and forgets what has ended. True if there is more to come. */
bool control_fn unended_look(struct graph *g);

#endif
