/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Requests: what travels through the graph. A request is made by a backend (graph/backend.h) or by a driver for its children,
 * lives on the coroutine's stack, and goes down by calls of edge_co_request() and up as their return.
 *
 * Here, once for all drivers: range checks, read-modify-write of what a node's alignment does not allow, bounce buffers for
 * memory that it does not allow, flush after writes for drivers without FUA, zero writes for drivers without write-zeroes,
 * and what `discard`, `detect-zeroes`, `cache.no-flush` and read-only say of a node.
 */
#ifndef CAIRN_GRAPH_REQUEST_H
#define CAIRN_GRAPH_REQUEST_H

#include "base/context.h"
#include "base/list.h"
#include "graph/extents.h"
#include "loop/co.h"
#include "loop/iobuf.h"
#include "loop/loop.h"

#include <stdbool.h>
#include <stdint.h>
#include <sys/uio.h>

enum request_kind {
    REQUEST_READ,
    REQUEST_WRITE,
    REQUEST_WRITE_ZEROES,
    REQUEST_DISCARD, /* afterwards the content is undefined unless the driver says zero by its extents */
    REQUEST_FLUSH,
    REQUEST_EXTENTS,
    REQUEST_RESIZE, /* `offset` is the new size */
    /* The two halves of a copy that the host does (graph/offload.h); -EOPNOTSUPP where that cannot be, or be aligned. */
    REQUEST_COPY_OUT, /* as a read, but what is there goes to `other` of the target */
    REQUEST_COPY_IN,  /* as a write; what is to be there lies at `other` of the source's file */
    REQUEST_KINDS,
};

enum request_flags {
    REQUEST_FUA = 1 << 0,         /* write, write-zeroes: durable when it completes */
    REQUEST_MAY_UNMAP = 1 << 1,   /* write-zeroes: the space may be given back */
    REQUEST_NO_FALLBACK = 1 << 2, /* write-zeroes: -EOPNOTSUPP rather than writing zeroes */
    REQUEST_UNCHANGED = 1 << 3,   /* write: the data is what reads give already */
    /* resize: never to less; others may be in flight meanwhile, but no other resize */
    REQUEST_GROW = 1 << 4,
    /* write: whole clusters, stored compressed if that saves space; -EOPNOTSUPP where nothing compresses */
    REQUEST_COMPRESSED = 1 << 5,
};

struct edge;
struct node;
struct pass;
struct pass_frame;

struct request {
    enum request_kind kind;
    unsigned flags;
    uint64_t offset; /* bytes */
    uint64_t len;    /* bytes; of a read or write: what iov holds */
    const struct iovec *iov;
    int iov_count;
    struct iobuf *hold;      /* pool memory that all of iov lies in, or NULL (G8) */
    struct extents *extents; /* REQUEST_EXTENTS */
    struct offload *offload; /* of the two kinds of copies, which have no iov; else NULL */
    uint64_t other;          /* of these: the offset where the other end is */
    struct pass *pass;       /* G1: that of the root request that this one is done for */
    struct pass_frame
        *frame; /* the core's: where the request is, or the one that this one is done for */
};

/*
 * Sends a request to the node below an edge. 0, or a negative errno: -EIO beyond the end of the node, -EPERM to write what
 * is read-only, -EOPNOTSUPP, -ENOSPC, -ERESTART (G6: hand it up untouched), and what the host says. A request may be
 * changed while it is under way; it is restored when it returns.
 */
int co_fn edge_co_request(struct edge *edge, struct request *req);

/* A request done for another one, with its pass; iov as said. */
static inline struct request request_for(const struct request *parent, enum request_kind kind,
                                         uint64_t offset, uint64_t len)
{
    struct request req = {
        .kind = kind,
        .offset = offset,
        .len = len,
        .pass = parent->pass,
        .frame = parent->frame,
    };

    return req;
}

/* The request with another offset, as a driver that shifts its child's data sends it on. */
static inline int co_fn edge_co_request_at(struct edge *edge, const struct request *req,
                                           uint64_t offset)
{
    struct request sub = *req;

    sub.offset = offset;
    return edge_co_request(edge, &sub);
}

/*
 * Makes `piece`, a copy of `whole`, the part of it from byte `skip` on: at most `len` bytes in at most `max` vectors, which
 * `iov` holds; of a copy, `len` bytes. Returns its length.
 */
uint64_t request_slice(struct request *piece, const struct request *whole, uint64_t skip,
                       uint64_t len, struct iovec *iov, int max);

/* Copies `len` bytes of a request's memory, from byte `skip` of it on, to flat memory, or from there. */
void request_gather(const struct request *req, uint64_t skip, void *ret, size_t len);
void request_scatter(const struct request *req, uint64_t skip, const void *data, size_t len);

/* Fills what lies in the iov from byte `from` on with zeroes: for drivers whose data ends before the request does. */
void request_zero_from(const struct request *req, uint64_t from);

/*
 * Waits for something else than a child's answer (G6): 0 at the deadline; -ERESTART when a drain begins and -ECANCELED, both to
 * be handed up untouched. After the change the request comes again from the top.
 */
int co_fn co_park_until(struct request *req, uint64_t deadline_ns);

/*
 * The same, but for as long as somebody else wants: on the waiter's stack, who lists it where those find it, under a lock of the
 * driver's. `take_back` unlists it, on the waiter's loop, since something else ends the wait; false if parked_end() has been called.
 */
struct parked;
typedef bool parked_take_back_fn(struct parked *p);

struct parked {
    parked_take_back_fn *take_back; /* NULL: nobody else ends it */
    struct loop *loop;
    struct co_wait wait;
    struct loop_message message;
    struct list link; /* of the slot */
};

/* Before it is listed. */
void parked_init(struct parked *p, parked_take_back_fn *take_back);
/* Once, from any loop, by whoever has unlisted it. */
void parked_end(struct parked *p);
/* 0 when it was ended so; else as co_park_until(), also at once if a drain has begun. */
int co_fn co_park(const struct request *req, struct parked *p);
/* When this request first reached the node, also over re-issues, in the loop's time: where deadlines count from. */
uint64_t request_reached_ns(struct request *req, const struct node *node);

const char *request_kind_name(enum request_kind kind);

#endif
