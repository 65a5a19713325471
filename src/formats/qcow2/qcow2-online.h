/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the allocator does for a check of an image that is being written to. docs/adr/0010-check-under-load.md says why that is
 * enough.
 *
 * ONLINE-1 While it runs, no refcount is lowered, and no cluster that a mapping or the header has pointed to is used again.
 * ONLINE-2 Writers go first: what would cost them space, or moves tables, ends the check instead.
 */
#ifndef CAIRN_FORMATS_QCOW2_ONLINE_H
#define CAIRN_FORMATS_QCOW2_ONLINE_H

#include "base/context.h"
#include "base/list.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct qcow2;

struct qcow2_online {
    /* Protected by alloc.lock. */
    struct list counted; /* struct qcow2_run: what was free when it began */
    bool lost;           /* there was no memory to note one of them */

    /* Protected by qcow2.lock. */
    uint64_t withheld; /* clusters that were freed and are kept */
    uint64_t withheld_max;

    const char *broken; /* atomic: why it cannot go on; NULL: it can */
};

/* Clusters that follow each other, outside of any list. */
struct qcow2_place {
    uint64_t first;
    uint64_t count;
};

/* Under alloc.lock and flush.lock: -EBUSY if there is one already. */
int qcow2_online_begin(struct qcow2 *q, struct qcow2_online *o);
/* Ends it, also one that is broken; what was withheld can be taken up. */
void co_fn qcow2_online_end(struct qcow2 *q, struct qcow2_online *o);
/* It cannot go on; takes alloc.lock. Nothing if there is none. */
void co_fn qcow2_online_break(struct qcow2 *q, const char *why);
/* The same under alloc.lock. */
void qcow2_online_break_locked(struct qcow2 *q, const char *why);
/* Under alloc.lock: these have been counted, and were free. */
void qcow2_online_counted(struct qcow2 *q, uint64_t first, uint64_t count);

/*
 * Under alloc.lock and flush.lock: counted clusters to which nothing on the disk needs to point: the pool, what was freed, what is
 * left of a row for compressed bytes. The array is the caller's; -ENOMEM.
 */
int qcow2_online_loose(struct qcow2 *q, struct qcow2_place **ret, size_t *ret_count);

#endif
