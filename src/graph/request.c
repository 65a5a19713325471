/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The way of a request through one edge: checks, then the driver, with what the driver cannot do by itself done around it.
 *
 * The common case (aligned, within range, an operation that the driver has) goes straight through edge_co_request(); all
 * else is in functions of their own, request-unaligned.c among them.
 */
#include "graph/request.h"
#include "base/checked.h"
#include "base/macros.h"
#include "base/zeroes.h"
#include "graph/chain.h"
#include "graph/gate.h"
#include "graph/node-internal.h"
#include "graph/offload.h"
#include "graph/request-internal.h"
#include "graph/tracker.h"
#include "graph/unended.h"

#include <errno.h>
#include <string.h>

/* Zeroes that are written for drivers without write-zeroes: so many bytes at a time, from a buffer of this size. */
#define ZERO_STEP   ((uint64_t)1 << 20)
#define ZERO_BUFFER ((size_t)64 << 10)

const char *request_kind_name(enum request_kind kind)
{
    static const char *const names[REQUEST_KINDS] = {"read",    "write",    "write-zeroes",
                                                     "discard", "flush",    "extents",
                                                     "resize",  "copy-out", "copy-in"};

    return names[kind];
}

void request_zero_from(const struct request *req, uint64_t from)
{
    for (int i = 0; i < req->iov_count; i++) {
        const struct iovec *v = &req->iov[i];

        if (from < v->iov_len)
            memset((char *)v->iov_base + from, 0, v->iov_len - (size_t)from);
        from -= MIN(from, (uint64_t)v->iov_len);
    }
}

uint64_t request_slice(struct request *piece, const struct request *whole, uint64_t skip,
                       uint64_t len, struct iovec *iov, int max)
{
    uint64_t at = skip;
    uint64_t done = 0;
    int n = 0;

    if (whole->offload) {
        piece->offset = whole->offset + skip;
        piece->other = whole->other + skip;
        piece->len = len;
        return len;
    }
    for (int i = 0; i < whole->iov_count && n < max && done < len; i++) {
        const struct iovec *v = &whole->iov[i];

        if (skip >= v->iov_len) {
            skip -= v->iov_len;
            continue;
        }
        iov[n].iov_base = (char *)v->iov_base + skip;
        iov[n].iov_len = (size_t)MIN(len - done, (uint64_t)v->iov_len - skip);
        done += iov[n++].iov_len;
        skip = 0;
    }
    piece->offset = whole->offset + at;
    piece->iov = iov;
    piece->iov_count = n;
    piece->len = done;
    return done;
}

/* Copies between a place in a vector and flat memory. */
static void iov_copy(const struct iovec *iov, int count, uint64_t skip, void *flat, size_t len,
                     bool to_iov)
{
    char *p = flat;

    for (int i = 0; i < count && len; i++) {
        size_t piece;

        if (skip >= iov[i].iov_len) {
            skip -= iov[i].iov_len;
            continue;
        }
        piece = MIN(iov[i].iov_len - (size_t)skip, len);
        if (to_iov)
            memcpy((char *)iov[i].iov_base + skip, p, piece);
        else
            memcpy(p, (char *)iov[i].iov_base + skip, piece);
        p += piece;
        len -= piece;
        skip = 0;
    }
}

void request_gather(const struct request *req, uint64_t skip, void *ret, size_t len)
{
    iov_copy(req->iov, req->iov_count, skip, ret, len, false);
}

void request_scatter(const struct request *req, uint64_t skip, const void *data, size_t len)
{
    iov_copy(req->iov, req->iov_count, skip, (void *)(uintptr_t)data, len, true);
}

static bool memory_is_aligned(const struct node *node, const struct request *req)
{
    unsigned mask = node->memory_align - 1;

    if (likely(!mask))
        return true;
    for (int i = 0; i < req->iov_count; i++) {
        if (((uintptr_t)req->iov[i].iov_base | req->iov[i].iov_len) & mask)
            return false;
    }
    return true;
}

bool request_is_aligned(const struct node *node, const struct request *req)
{
    return !((req->offset | req->len) & (node->align - 1)) && memory_is_aligned(node, req);
}

/* A filter without the operation hands the request on. */
static int co_fn pass_through(struct node *node, struct request *req)
{
    if (node->driver->kind != DRIVER_FILTER)
        return -EOPNOTSUPP;
    return edge_co_request(node->file, req);
}

static int co_fn node_co_flush(struct node *node, struct request *req)
{
    if (node->settings.no_flush)
        return 0;
    if (node->driver->co_flush)
        return node->driver->co_flush(node, req);
    return node->driver->kind == DRIVER_FILTER ? edge_co_request(node->file, req) : 0;
}

/* For drivers without FUA: a flush after the write. */
static int co_fn finish_fua(struct node *node, struct request *req)
{
    struct request flush = request_for(req, REQUEST_FLUSH, 0, 0);

    if (!(req->flags & REQUEST_FUA) || node->driver->fua)
        return 0;
    return node_co_flush(node, &flush);
}

int node_co_read_aligned(struct node *node, struct request *req)
{
    if (node->driver->co_map)
        return chain_co_read(node, req);
    return node->driver->co_read ? node->driver->co_read(node, req) : pass_through(node, req);
}

int node_co_write_aligned(struct node *node, struct request *req)
{
    int r;

    if (unlikely(req->flags & REQUEST_COMPRESSED) && !node->driver->compresses &&
        node->driver->kind != DRIVER_FILTER)
        return -EOPNOTSUPP;
    r = node->driver->co_write ? node->driver->co_write(node, req) : pass_through(node, req);

    return unlikely(req->flags & REQUEST_FUA) && r == 0 ? finish_fua(node, req) : r;
}

/* Shares a range with other writers, out of the way of read-modify-writes; without alignment nobody does these. */
static int co_fn share_begin(struct node *node, struct overlap_range *range,
                             const struct request *req)
{
    if (node->align == 1)
        return 0;
    return overlap_begin(&node->overlap, range, req->offset, req->len, false);
}

static void share_end(struct node *node, struct overlap_range *range)
{
    if (node->align > 1)
        overlap_end(&node->overlap, range);
}

static int co_fn node_co_write(struct node *node, struct request *req)
{
    struct overlap_range range;
    int r;

    if (unlikely(!request_is_aligned(node, req)))
        return node_co_write_unaligned(node, req);
    r = share_begin(node, &range, req);
    if (r < 0)
        return r;
    r = node_co_write_aligned(node, req);
    share_end(node, &range);
    return r;
}

/* Zeroes as data, aligned. */
static int co_fn write_zero_data(struct node *node, const struct request *req)
{
    size_t size = (size_t)MIN(ZERO_BUFFER, req->len);
    struct iobuf *zeroes = iobuf_new(size);
    struct iovec iov[ZERO_STEP / ZERO_BUFFER];
    uint64_t end = req->offset + req->len;
    uint64_t pos = req->offset;
    int r = 0;

    if (!zeroes)
        return -ENOMEM;
    memset(zeroes->data, 0, size);
    while (r == 0 && pos < end) {
        uint64_t step = MIN(end - pos, ZERO_STEP);
        struct request write = request_for(req, REQUEST_WRITE, pos, step);

        write.iov = iov;
        write.hold = zeroes;
        write.flags = req->flags & (REQUEST_FUA | REQUEST_UNCHANGED);
        for (uint64_t left = step; left; write.iov_count++) {
            size_t piece = (size_t)MIN(left, (uint64_t)size);

            iov[write.iov_count] = (struct iovec){zeroes->data, piece};
            left -= piece;
        }
        r = node_co_write_aligned(node, &write);
        pos += step;
    }
    iobuf_unref(zeroes);
    return r;
}

/* The aligned middle of a write-zeroes; `req` is the driver's to see as it is. */
static int co_fn write_zeroes_aligned(struct node *node, struct request *req)
{
    int r;

    if (node->driver->co_write_zeroes)
        r = node->driver->co_write_zeroes(node, req);
    else
        r = pass_through(node, req);
    if (r == -EOPNOTSUPP && !(req->flags & REQUEST_NO_FALLBACK))
        return write_zero_data(node, req); /* its writes have seen to FUA */
    return r == 0 ? finish_fua(node, req) : r;
}

static int co_fn node_co_write_zeroes(struct node *node, const struct request *whole)
{
    uint64_t end = whole->offset + whole->len;
    uint64_t first = align_up(whole->offset, node->align);
    uint64_t last = align_down(end, node->align);
    struct request middle = *whole;
    struct overlap_range range;
    int r;

    if (!node->settings.unmap)
        middle.flags &= ~(unsigned)REQUEST_MAY_UNMAP;
    if (first > last)
        return node_co_zero_piece(node, &middle, whole->offset, whole->len); /* within one block */
    middle.offset = first;
    middle.len = last - first;
    r = middle.len ? share_begin(node, &range, &middle) : 0;
    if (r == 0 && middle.len) {
        r = write_zeroes_aligned(node, &middle);
        share_end(node, &range);
    }
    if (r == 0 && whole->offset < first)
        r = node_co_zero_piece(node, &middle, whole->offset, first - whole->offset);
    if (r == 0 && last < end)
        r = node_co_zero_piece(node, &middle, last, end - last);
    return r;
}

/* Blocks that are discarded in part only stay as they are. */
static int co_fn node_co_discard(struct node *node, const struct request *whole)
{
    uint64_t first = align_up(whole->offset, node->align);
    uint64_t last = align_down(whole->offset + whole->len, node->align);
    struct request req = *whole;
    struct overlap_range range;
    int r;

    if (!node->settings.unmap || first >= last)
        return 0;
    req.offset = first;
    req.len = last - first;
    r = share_begin(node, &range, &req);
    if (r < 0)
        return r;
    r = node->driver->co_discard ? node->driver->co_discard(node, &req) : pass_through(node, &req);
    share_end(node, &range);
    return r == -EOPNOTSUPP ? 0 : r; /* a discard is a hint */
}

static int co_fn node_co_copy_out(struct node *node, struct request *req)
{
    if (!request_is_aligned(node, req))
        return -EOPNOTSUPP;
    if (node->driver->co_map)
        return chain_co_copy_out(node, req);
    return node->driver->co_copy_out ? node->driver->co_copy_out(node, req) : -EOPNOTSUPP;
}

static int co_fn node_co_copy_in(struct node *node, struct request *req)
{
    struct overlap_range range;
    int r;

    r = share_begin(node, &range, req);
    if (r < 0)
        return r;
    r = node->driver->co_copy_in(node, req);
    if (r == 0)
        r = finish_fua(node, req);
    share_end(node, &range);
    return r;
}

/* Is it of no use to begin? Then nothing has changed, and nobody needs to be told. */
static bool refuses_copy(const struct node *node, const struct request *req)
{
    return !node->driver->co_copy_in || !request_is_aligned(node, req) ||
           node->settings.detect_zeroes || offload_comes_from(req->offload, node);
}

/* Asks the driver again until the range is covered or the list is full: many in one call. */
static int co_fn node_co_extents(struct node *node, struct request *whole)
{
    uint64_t end = whole->offset + whole->len;
    uint64_t pos = whole->offset;

    while (pos < end) {
        struct request req = *whole;
        int r;

        req.offset = pos;
        req.len = end - pos;
        if (node->driver->co_map) {
            r = chain_co_extents(node, &req);
        } else if (node->driver->co_extents) {
            r = node->driver->co_extents(node, &req);
        } else if (node->driver->kind == DRIVER_FILTER) {
            r = edge_co_request(node->file, &req);
        } else {
            struct extent all = {
                .offset = pos, .len = end - pos, .flags = EXTENT_DATA | EXTENT_ALLOCATED};

            (void)extents_add(req.extents, &all); /* full is as good */
            return 0;
        }
        if (r < 0)
            return r;
        if (extents_end(req.extents, whole->offset) == pos)
            return 0; /* full */
        pos = extents_end(req.extents, whole->offset);
    }
    return 0;
}

int co_park_until(struct request *req, uint64_t deadline_ns)
{
    return gate_park_until(req->pass, deadline_ns);
}

int co_park(const struct request *req, struct parked *p)
{
    return gate_park(req->pass, p, LOOP_FOREVER);
}

uint64_t request_reached_ns(struct request *req, const struct node *node)
{
    struct pass *pass = req->pass;

    for (unsigned i = 0; i < pass->reached_count; i++) {
        if (pass->reached[i].node == node)
            return pass->reached[i].ns;
    }
    if (pass->reached_count == PASS_REACHED)
        return pass->arrived_ns; /* no later than it was */
    pass->reached[pass->reached_count].node = node;
    pass->reached[pass->reached_count].ns = loop_now();
    return pass->reached[pass->reached_count++].ns;
}

static bool data_is_zero(const struct request *req)
{
    for (int i = 0; i < req->iov_count; i++) {
        if (!is_all_zeroes(req->iov[i].iov_base, req->iov[i].iov_len))
            return false;
    }
    return true;
}

/* detect-zeroes: the request as a whole is zeroes, or data. */
static int co_fn node_co_write_detecting(struct node *node, struct request *req)
{
    struct request zeroes = request_for(req, REQUEST_WRITE_ZEROES, req->offset, req->len);

    if ((!node->driver->co_write_zeroes && node->driver->kind != DRIVER_FILTER) || !req->len ||
        !data_is_zero(req))
        return node_co_write(node, req);
    zeroes.flags = req->flags & (REQUEST_FUA | REQUEST_UNCHANGED);
    if (node->settings.unmap_detected)
        zeroes.flags |= REQUEST_MAY_UNMAP;
    return node_co_write_zeroes(node, &zeroes);
}

static int co_fn change_untracked(struct node *node, struct request *req)
{
    if (likely(req->kind == REQUEST_WRITE))
        return likely(!node->settings.detect_zeroes) ? node_co_write(node, req)
                                                     : node_co_write_detecting(node, req);
    if (req->kind == REQUEST_DISCARD)
        return node_co_discard(node, req);
    if (req->kind == REQUEST_COPY_IN)
        return node_co_copy_in(node, req);
    return req->len ? node_co_write_zeroes(node, req) : 0;
}

static void tell_trackers(const struct node *node, const struct request *req)
{
    for (struct tracker *t = node->trackers; t; t = t->next)
        t->changed(t, req->offset, req->len);
}

static int co_fn change_tracked(struct node *node, struct request *req)
{
    int r;

    if (likely(!node->trackers) || (req->flags & REQUEST_UNCHANGED) || !req->len)
        return change_untracked(node, req);
    tell_trackers(node, req); /* C2: before and after */
    r = change_untracked(node, req);
    tell_trackers(node, req);
    return r;
}

/* Did its waiter leave a change to the host? */
static bool was_left(const struct node *node, int r)
{
    return (r == -ECANCELED || r == -ETIMEDOUT) && node_unresolved(node);
}

/* G9: not into what an earlier one may still change, if the host has that in its hands. */
static int co_fn node_co_change(struct node *node, struct request *req)
{
    unsigned left = req->pass->left;
    int r = 0;

    if (unlikely(unended_any(&node->unended)))
        r = unended_co_wait(node, req);
    if (r == 0)
        r = change_tracked(node, req);
    if (unlikely(r < 0) && was_left(node, r))
        req->pass->left++;
    if (unlikely(req->pass->left != left)) /* here or below: UNENDED-1 */
        unended_add(node, req, align_down(req->offset, node->align),
                    align_up(req->offset + req->len, node->align));
    return r;
}

/* The filter's size is its child's. */
static int co_fn node_co_resize(struct node *node, struct request *req)
{
    unsigned left = req->pass->left;
    int r;

    if (req->flags & REQUEST_GROW && req->offset <= node_size(node))
        return 0;
    r = node->driver->co_resize ? node->driver->co_resize(node, req) : pass_through(node, req);

    if (r == 0 && !node->driver->co_resize)
        node_set_size(node, node_size(node->file->node));
    if (unlikely(r < 0) && was_left(node, r))
        req->pass->left++;
    if (unlikely(req->pass->left != left))
        unended_add(node, req, req->offset, UINT64_MAX); /* it may still become shorter */
    return r;
}

static int co_fn node_co_request(struct node *node, struct request *req)
{
    if (unlikely(!range_within(req->offset, req->len, node_size(node))) &&
        req->kind != REQUEST_FLUSH && req->kind != REQUEST_RESIZE)
        return -EIO;
    switch (req->kind) {
    case REQUEST_READ:
        if (likely(request_is_aligned(node, req)))
            return node_co_read_aligned(node, req);
        return node_co_read_unaligned(node, req);
    case REQUEST_WRITE:
    case REQUEST_WRITE_ZEROES:
    case REQUEST_DISCARD:
        if (unlikely(node->settings.read_only))
            return -EPERM;
        return node_co_change(node, req);
    case REQUEST_COPY_OUT:
        return node_co_copy_out(node, req);
    case REQUEST_COPY_IN:
        if (node->settings.read_only)
            return -EPERM;
        return refuses_copy(node, req) ? -EOPNOTSUPP : node_co_change(node, req);
    case REQUEST_FLUSH:
        return node_co_flush(node, req);
    case REQUEST_EXTENTS:
        return node_co_extents(node, req);
    case REQUEST_RESIZE:
        if (unlikely(node->settings.read_only))
            return -EPERM;
        if (req->offset > (uint64_t)NODE_SIZE_MAX)
            return -EFBIG;
        return node_co_resize(node, req);
    case REQUEST_KINDS:
        break;
    }
    return -EINVAL;
}

/* G7: what is above the outermost cut goes on, with -EIO. */
static int co_fn leave_cut(const struct pass_frame *frame, int r)
{
    for (const struct pass_frame *f = frame->up; f; f = f->up) {
        if (edge_is_cut(f->edge))
            return r;
    }
    co_interrupt_end();
    return r < 0 ? -EIO : r;
}

static void frame_enter(struct pass *pass, struct pass_frame *frame)
{
    frame->older = pass->top;
    if (frame->older)
        frame->older->newer = frame;
    pass->top = frame;
}

static void frame_leave(struct pass *pass, struct pass_frame *frame)
{
    if (frame->older)
        frame->older->newer = frame->newer;
    if (unlikely(frame->newer))
        frame->newer->older = frame->older; /* a younger branch goes on */
    else
        pass->top = frame->older;
}

int edge_co_request(struct edge *edge, struct request *req)
{
    struct pass_frame frame = {.edge = edge, .up = req->frame};
    int r;

    if (unlikely(edge_is_cut(edge)))
        return -EIO;
    frame_enter(req->pass, &frame);
    req->frame = &frame;
    r = node_co_request(edge->node, req);
    req->frame = frame.up;
    frame_leave(req->pass, &frame);
    return unlikely(edge_is_cut(edge)) ? leave_cut(&frame, r) : r;
}
