/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a driver is: for authors of drivers. The core opens children, parses options, allocates the state, checks ranges and
 * alignment, and counts requests; a driver holds no such code. Drivers have no globals: two nodes never share state.
 *
 * An operation that is not set means pass-through to the first child for filters and "not supported" for the others, but for
 * these: no co_flush: nothing to flush; no co_extents: everything is data; no co_copy_out, no co_copy_in: not supported. Requests come from any loop, many at a time: state that they change is protected by co-locks.
 */
#ifndef CAIRN_GRAPH_DRIVER_H
#define CAIRN_GRAPH_DRIVER_H

#include "base/context.h"
#include "base/error.h"
#include "base/schema.h"
#include "graph/access.h"
#include "graph/event.h"
#include "graph/node.h"
#include "graph/request.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct bitmap_store;

enum driver_kind { DRIVER_PROTOCOL, DRIVER_FORMAT, DRIVER_FILTER };

/* Where a range of a format's disk lies. */
enum mapping_kind {
    MAPPING_DATA,    /* in the child `host`, from host_offset on, as it is */
    MAPPING_ZERO,    /* nowhere: it reads as zeroes */
    MAPPING_BELOW,   /* in the backing node; without one, and beyond its end, it reads as zeroes */
    MAPPING_ENCODED, /* in the node's file, otherwise than as it is: co_read_encoded reads it */
};

struct mapping {
    enum mapping_kind kind;
    uint64_t len;         /* bytes that the answer holds for; > 0 */
    uint64_t host_offset; /* MAPPING_ENCODED: what co_read_encoded wants to know */
    struct edge *host;    /* MAPPING_DATA; MAPPING_ZERO: NULL, or there is room for them */
    bool holes;           /* MAPPING_DATA: the child may have holes there, to be told as zeroes */
};

struct driver {
    const char *name;
    enum driver_kind kind;
    size_t state_size;
    const struct schema_type *options; /* generated; what open() gets */
    bool fua;            /* writes honour REQUEST_FUA; otherwise the core flushes after them */
    bool reads_to_write; /* a filter that reads its child before it changes it */
    bool
        guards_writes; /* a filter past which, while it has users, nobody else may change or resize its child */
    bool zeroes_fast;    /* write-zeroes never falls back to writing data, unless a child's does */
    bool compresses;     /* writes honour REQUEST_COMPRESSED */
    bool keeps_metadata; /* a format that keeps metadata of its own in its file */
    bool only_reads; /* a format that is never written: its nodes are read-only, or do not open */

    const struct bitmap_store
        *bitmap_store; /* bitmaps/bitmap-store.h; NULL: it stores no dirty bitmaps */

    /*
     * All operations may yield: those that do requests run on any loop, co_open, co_close and co_set_access on the control
     * thread. (The marks co_fn and control_fn cannot stand on pointers; the functions themselves have them.)
     *
     * Children are attached, with access none; sets the node's geometry by node_set_size() and node_set_alignment().
     * co_close is called if and only if co_open succeeded, when no request is left.
     */
    int (*co_open)(struct node *node, const void *options, struct error **err);
    void (*co_close)(struct node *node);

    int (*co_read)(struct node *node, struct request *req);
    /*
     * Instead of co_read and co_extents, for formats that may have a backing node (Q3): says where what is at `offset` lies, for
     * `len` bytes at most. Called inside the node's epoch; what it says holds until that is left (Q2). Its I/O is done for `req`.
     */
    int (*co_map)(struct node *node, const struct request *req, uint64_t offset, uint64_t len,
                  struct mapping *ret);
    /* Reads what co_map has just called encoded, inside the same epoch. */
    int (*co_read_encoded)(struct node *node, struct request *req, uint64_t host_offset);
    int (*co_write)(struct node *node, struct request *req);
    int (*co_write_zeroes)(struct node *node, struct request *req);
    int (*co_discard)(struct node *node, struct request *req);
    /*
     * The two halves of a copy by the host (graph/offload.h): hands a range over, or on; takes one. Where a driver has none the
     * range is read and written, filters too. Of formats with a map the core knows where a range lies.
     */
    int (*co_copy_out)(struct node *node, struct request *req);
    int (*co_copy_in)(struct node *node, struct request *req);
    int (*co_flush)(struct node *node, struct request *req);
    /* Adds extents for a part of the range at least, from its start. */
    int (*co_extents)(struct node *node, struct request *req);
    /* Behind closed gates: nothing else is in flight. */
    int (*co_resize)(struct node *node, struct request *req);

    /* For filters: a driver above is about to do this with its file (graph/event.h). It waits until this returns. */
    void (*co_event)(struct node *node, enum event event, const struct request *by);

    /*
     * For drivers that guard the access against other programs: what all users of the node together want and tolerate. Called
     * before it is granted, and again with the old values when that fails elsewhere.
     */
    int (*co_set_access)(struct node *node, struct access access, struct error **err);

    /* How many operations their requests have left (fenced, G7) and the host has not ended; NULL: there never are any. */
    unsigned (*unresolved)(const struct node *node);

    /*
     * Does REQUEST_GROW make it as large as is wanted, and does what is new read as zeroes? NULL: as the first child of a
     * filter, else no.
     */
    bool (*grows)(const struct node *node);

    /* What queries show; all may be NULL. The text belongs to the node. */
    const char *(*filename)(const struct node *node);
    bool (*encrypted)(const struct node *node);
    uint64_t (*allocated_bytes)(const struct node *node);
    uint64_t (*cluster_bytes)(
        const struct node *node); /* the unit of allocation; 0: there is none */
};

#endif
