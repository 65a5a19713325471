/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Writes that their requests have left and that the host has not ended (G8, G9): what lies in their ranges is indeterminate,
 * and whoever wants to change it waits, so that no late write comes over his. A few ranges per node; more become wider.
 */
#ifndef CAIRN_GRAPH_UNENDED_H
#define CAIRN_GRAPH_UNENDED_H

#include "base/atomic.h"
#include "base/context.h"
#include "loop/lock.h"

#include <stdbool.h>
#include <stdint.h>

#define UNENDED_MAX 8

struct node;
struct request;

/* All zero is empty. */
struct unended {
    struct tiny_lock lock;
    unsigned count; /* atomic; changed under lock */

    /* Protected by lock. */
    struct {
        uint64_t first;
        uint64_t end;
    } ranges[UNENDED_MAX];
};

static inline bool unended_any(const struct unended *u)
{
    /*
     * Relaxed: whoever writes where another loop's write was left has no order with it but what clients make themselves, by
     * waiting for its answer; that comes after the range was added, by messages or sockets.
     */
    return atomic_get_relaxed(&u->count);
}

void unended_add(struct unended *u, uint64_t first, uint64_t end);

/*
 * Waits until nothing of the kind is left in the request's range. 0; -ERESTART and -ECANCELED as co_park_until().
 */
int co_fn unended_co_wait(struct node *node, struct request *req);

#endif
