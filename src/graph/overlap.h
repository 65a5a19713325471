/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Who writes where: lets a read-modify-write have its blocks for itself. Writes that may overlap share; a read-modify-write
 * excludes all that overlap it. Across loops, FIFO among those that conflict.
 */
#ifndef CAIRN_GRAPH_OVERLAP_H
#define CAIRN_GRAPH_OVERLAP_H

#include "base/context.h"
#include "base/list.h"
#include "loop/lock.h"

#include <stdbool.h>
#include <stdint.h>

struct overlap {
    struct tiny_lock lock;
    /* Protected by lock. */
    struct list ranges; /* struct overlap_range, in order of arrival */
    unsigned exclusives;
    unsigned waiting;
};

/* On the stack of the one who writes. */
struct overlap_range {
    uint64_t offset;
    uint64_t len;
    bool exclusive;
    bool granted; /* Protected by lock. */
    struct list link;
    struct wait_queue waiter; /* the one coroutine, while not granted */
};

void overlap_init(struct overlap *o);

/* Waits until no earlier range overlaps that excludes this one. 0, or -ECANCELED: then there is nothing to end. */
int co_fn overlap_begin(struct overlap *o, struct overlap_range *r, uint64_t offset, uint64_t len,
                        bool exclusive);
void overlap_end(struct overlap *o, struct overlap_range *r);

#endif
