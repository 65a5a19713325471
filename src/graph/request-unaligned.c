/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Requests that do not fit their node's alignment, in place or in memory: through a buffer, step by step. A write reads the
 * blocks at its two ends first and excludes every other write to its blocks meanwhile. So does a read of encrypted blocks: of one
 * that is half written nothing can be read, not even what nobody changes (CIPHER-3, docs/formats/luks.md).
 */
#include "base/checked.h"
#include "base/macros.h"
#include "graph/request-internal.h"

#include <errno.h>
#include <string.h>

#define BOUNCE_STEP ((uint64_t)1 << 20)

static int co_fn transfer_blocks(struct node *node, const struct request *like,
                                 enum request_kind kind, uint64_t offset, struct iobuf *b,
                                 size_t at, size_t len)
{
    struct iovec iov = {b->data + at, len};
    struct request req = request_for(like, kind, offset, len);

    req.iov = &iov;
    req.iov_count = 1;
    req.hold = b;
    if (kind == REQUEST_READ)
        return node_co_read_aligned(node, &req);
    req.flags = like->flags & (REQUEST_FUA | REQUEST_UNCHANGED);
    return node_co_write_aligned(node, &req);
}

/* The next step of a range: whole blocks, at most BOUNCE_STEP of them. */
static uint64_t step_end(const struct node *node, uint64_t from, uint64_t end)
{
    return MIN(align_up(end, node->align),
               align_down(from, node->align) + MAX(BOUNCE_STEP, (uint64_t)node->align));
}

static bool is_encrypted(const struct node *node)
{
    return node->driver->encrypted && node->driver->encrypted(node);
}

static bool is_in_part(const struct node *node, const struct request *req)
{
    return (req->offset | req->len) & (node->align - 1);
}

/* All blocks that a request touches. */
static int co_fn blocks_begin(struct node *node, struct overlap_range *range,
                              const struct request *req, bool exclusive)
{
    uint64_t first = align_down(req->offset, node->align);

    return overlap_begin(&node->overlap, range, first,
                         align_up(req->offset + req->len, node->align) - first, exclusive);
}

static int co_fn read_steps(struct node *node, const struct request *req)
{
    uint64_t end = req->offset + req->len;
    uint64_t pos = req->offset;
    struct iobuf *b = iobuf_new((size_t)(step_end(node, pos, end) - align_down(pos, node->align)));
    int r = b ? 0 : -ENOMEM;

    while (r == 0 && pos < end) {
        uint64_t first = align_down(pos, node->align);
        uint64_t last = step_end(node, pos, end);
        size_t len = (size_t)(MIN(last, end) - pos);

        r = transfer_blocks(node, req, REQUEST_READ, first, b, 0, (size_t)(last - first));
        if (r == 0)
            request_scatter(req, pos - req->offset, b->data + (pos - first), len);
        pos += len;
    }
    iobuf_unref(b);
    return r;
}

int node_co_read_unaligned(struct node *node, const struct request *req)
{
    struct overlap_range range;
    int r;

    if (!is_in_part(node, req) || !is_encrypted(node))
        return read_steps(node, req);
    r = blocks_begin(node, &range, req, true);
    if (r < 0)
        return r;
    r = read_steps(node, req);
    overlap_end(&node->overlap, &range);
    return r;
}

/* Reads what a step keeps of its first and last block. */
static int co_fn read_ends(struct node *node, const struct request *req, struct iobuf *b,
                           uint64_t first, uint64_t last, uint64_t pos, uint64_t step_last)
{
    uint64_t tail = last - node->align;
    int r = 0;

    if (pos > first)
        r = transfer_blocks(node, req, REQUEST_READ, first, b, 0, node->align);
    if (r == 0 && step_last < last && (tail > first || pos == first))
        r = transfer_blocks(node, req, REQUEST_READ, tail, b, (size_t)(tail - first), node->align);
    return r;
}

int node_co_write_unaligned(struct node *node, const struct request *req)
{
    uint64_t end = req->offset + req->len;
    uint64_t pos = req->offset;
    struct iobuf *b = iobuf_new((size_t)(step_end(node, pos, end) - align_down(pos, node->align)));
    struct overlap_range range;
    int r;

    if (!b)
        return -ENOMEM;
    /* Whole blocks from memory at a wrong address are only copied: nothing is read that others might be writing. */
    r = blocks_begin(node, &range, req, is_in_part(node, req));
    if (r < 0) {
        iobuf_unref(b);
        return r;
    }
    while (r == 0 && pos < end) {
        uint64_t first = align_down(pos, node->align);
        uint64_t last = step_end(node, pos, end);
        uint64_t step_last = MIN(last, end);

        r = read_ends(node, req, b, first, last, pos, step_last);
        if (r < 0)
            break;
        request_gather(req, pos - req->offset, b->data + (pos - first), (size_t)(step_last - pos));
        r = transfer_blocks(node, req, REQUEST_WRITE, first, b, 0, (size_t)(last - first));
        pos = step_last;
    }
    overlap_end(&node->overlap, &range);
    iobuf_unref(b);
    return r;
}

int node_co_zero_piece(struct node *node, const struct request *like, uint64_t offset, uint64_t len)
{
    struct iobuf *zeroes = iobuf_new((size_t)len); /* less than a block on each side of one */
    struct request req = request_for(like, REQUEST_WRITE, offset, len);
    struct iovec iov;
    int r;

    if (!zeroes)
        return -ENOMEM;
    memset(zeroes->data, 0, (size_t)len);
    iov = (struct iovec){zeroes->data, (size_t)len};
    req.iov = &iov;
    req.iov_count = 1;
    req.hold = zeroes;
    req.flags = like->flags & REQUEST_FUA;
    r = node_co_write_unaligned(node, &req);
    iobuf_unref(zeroes);
    return r;
}
