/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the allocator does for a check of an image that is being written to. docs/adr/0010-check-under-load.md says why that is
 * enough.
 *
 * ONLINE-1 While it runs, no refcount is lowered, and no cluster that a mapping or the header has pointed to is used again, but where
 *          that is noted: of such clusters the check says nothing. What may have been a table is never among them.
 * ONLINE-2 Writers go first: what is kept for the check is bounded, and taken back where it is needed. What moves tables ends the
 *          check.
 */
#ifndef CAIRN_FORMATS_QCOW2_ONLINE_H
#define CAIRN_FORMATS_QCOW2_ONLINE_H

#include "base/context.h"
#include "base/list.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct bitmap;
struct qcow2;
struct qcow2_run;

struct qcow2_online {
    /* A granule of 512 bytes for each cluster; set under alloc.lock. Without memory they have more (BITMAP-2). */
    struct bitmap *counted; /* what was free when it began, and is counted since */
    struct bitmap *moved;   /* what was counted down, or given to others */

    /* Protected by qcow2.lock. */
    uint64_t withheld; /* clusters that were freed and are kept */
    uint64_t withheld_max;
    bool needed;      /* nothing is, any more */
    struct list kept; /* struct qcow2_run: what may have been a table */

    const char *broken; /* atomic: why it cannot go on; NULL: it can */
};

/* Clusters that follow each other, outside of any list. */
struct qcow2_place {
    uint64_t first;
    uint64_t count;
};

/* Under alloc.lock and flush.lock; withheld_max in clusters. -EBUSY if there is one already, -ENOMEM. */
int qcow2_online_begin(struct qcow2 *q, struct qcow2_online *o, uint64_t withheld_max);
/* Ends it, also one that is broken; what was withheld can be taken up. */
void co_fn qcow2_online_end(struct qcow2 *q, struct qcow2_online *o);
/* What it has noted: of a cluster of this number. */
bool qcow2_online_has(const struct bitmap *noted, uint64_t cluster);
uint64_t qcow2_online_count(const struct bitmap *noted);
/* It cannot go on; takes alloc.lock. Nothing if there is none. */
void co_fn qcow2_online_break(struct qcow2 *q, const char *why);
/* The same under alloc.lock. */
void qcow2_online_break_locked(struct qcow2 *q, const char *why);
/* Under alloc.lock: these have been counted, and were free. */
void qcow2_online_counted(struct qcow2 *q, uint64_t first, uint64_t count);
/* Under alloc.lock: is what was freed withheld now? */
bool qcow2_online_withholds(struct qcow2 *q);
/* Under alloc.lock: a writer has nowhere else to go; nothing is withheld any more, but what is kept. */
void qcow2_online_need(struct qcow2 *q);
/* Under alloc.lock: nor is there any of that. Ends the check if something is kept: true. */
bool qcow2_online_give_up(struct qcow2 *q);
/* Under alloc.lock: this run, in no list, is about to be counted down or used again. False: it is kept, and must not be. */
bool qcow2_online_release(struct qcow2 *q, struct qcow2_run *run);

/*
 * Under alloc.lock and flush.lock: counted clusters to which nothing on the disk needs to point: the pool, what was freed, what is
 * left of a row for compressed bytes. The array is the caller's; -ENOMEM.
 */
int qcow2_online_loose(struct qcow2 *q, struct qcow2_place **ret, size_t *ret_count);

#endif
