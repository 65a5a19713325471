/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Events: points in a format's work where a filter between it and its file may stop a request, so that tests can bring requests
 * into an order that they choose. The names are QEMU's; each is announced before what it names is done. Those of QEMU's that only
 * belong to the opening of an image or to its resizing are not there: no other request is under way then.
 */
#ifndef CAIRN_GRAPH_EVENT_H
#define CAIRN_GRAPH_EVENT_H

#include "base/context.h"

#include <stdbool.h>

struct edge;
struct request;

enum event {
    EVENT_NONE,

    /* The guest's data. */
    EVENT_READ_AIO,         /* read in the format's file */
    EVENT_READ_BACKING_AIO, /* it is looked for below */
    EVENT_READ_COMPRESSED,
    EVENT_WRITE_AIO, /* written to the file, in place or to new space */
    EVENT_WRITE_COMPRESSED,
    EVENT_COW_READ,  /* what new space held before is read */
    EVENT_COW_WRITE, /* and written, with the guest's data over it */

    /* Tables. */
    EVENT_L1_UPDATE, /* a part of it is written */
    EVENT_L2_LOAD,
    EVENT_L2_UPDATE,         /* a part of one is written */
    EVENT_L2_ALLOC_COW_READ, /* one is copied, which a snapshot shares */
    EVENT_L2_ALLOC_WRITE,    /* a new one is written */
    EVENT_REFTABLE_GROW,
    EVENT_REFTABLE_UPDATE,
    EVENT_REFBLOCK_LOAD,
    EVENT_REFBLOCK_UPDATE_PART,
    EVENT_REFBLOCK_ALLOC,
    EVENT_REFBLOCK_ALLOC_WRITE_BLOCKS,
    EVENT_REFBLOCK_ALLOC_WRITE_TABLE,
    EVENT_REFBLOCK_ALLOC_SWITCH_TABLE,

    /* Space. */
    EVENT_CLUSTER_ALLOC,
    EVENT_CLUSTER_ALLOC_BYTES, /* for compressed data */
    EVENT_CLUSTER_FREE, /* zeroes, a discard or copy-on-write are about to let go of clusters */

    /* Flushes. */
    EVENT_FLUSH_TO_OS,   /* a guest's: changed tables are written */
    EVENT_FLUSH_TO_DISK, /* the file is flushed */

    /* Requests that come to the filter itself. */
    EVENT_PWRITEV,
    EVENT_PWRITEV_ZERO,
    EVENT_PWRITEV_DONE,

    EVENT_COUNT,
};

const char *event_name(enum event event);
/* EVENT_NONE: there is none of this name. */
enum event event_from_name(const char *name);

/* Tells the filters right below an edge, and waits until they let the request go on. Nothing is below but a file: one branch. */
void co_fn edge_co_announce(const struct edge *edge, enum event event, const struct request *by);

#endif
