/* SPDX-License-Identifier: Apache-2.0 */
/*
 * raw: the bytes of the child `file`, or a window of them.
 *
 * It takes any offset, whatever the child needs: a read-modify-write belongs to the node where all writers of the block meet,
 * and two windows may end within the same block.
 */
#include "base/checked.h"
#include "base/macros.h"
#include "graph/driver.h"
#include "raw-options.h"

#include <errno.h>
#include <inttypes.h>

struct raw {
    /* Set in open, then constant. */
    uint64_t offset; /* of the window, in the child */
    bool fixed_size; /* the user has said its size */
};

static int co_fn control_fn raw_co_open(struct node *node, const void *options, struct error **err)
{
    const struct raw_options *opt = options;
    const struct node *file = edge_node(node_file(node));
    struct raw *raw = node_state(node);
    uint64_t below = node_size(file);
    unsigned unit = node_preferred_alignment(file);

    if (opt->offset > below)
        return error_set(err, EINVAL,
                         "node '%s': offset %" PRIu64 " lies beyond the end of node '%s' (%" PRIu64
                         " bytes)",
                         node_name(node), opt->offset, node_name(file), below);
    if (opt->has_size && !range_within(opt->offset, opt->size, below))
        return error_set(err, EINVAL,
                         "node '%s': offset %" PRIu64 " and size %" PRIu64
                         " end beyond node '%s' (%" PRIu64 " bytes)",
                         node_name(node), opt->offset, opt->size, node_name(file), below);
    raw->offset = opt->offset;
    raw->fixed_size = opt->has_size;
    node_set_size(node, opt->has_size ? opt->size : below - opt->offset);
    /* A window that cuts the child's blocks has no unit that fits both. */
    if (is_aligned(opt->offset, unit))
        node_set_preferred_alignment(node, unit);
    return 0;
}

static void co_fn control_fn raw_co_close(struct node *node)
{
    (void)node; /* nothing is held but the child */
}

/* Read, write, write-zeroes, discard, copies and flush: the same, further on. The core has checked the range. */
static int co_fn raw_co_request(struct node *node, struct request *req)
{
    const struct raw *raw = node_state(node);

    return edge_co_request_at(node_file(node), req, req->offset + raw->offset);
}

/* The child's extents, in our offsets; they come into the free part of the same array. */
static int co_fn raw_co_extents(struct node *node, struct request *req)
{
    const struct raw *raw = node_state(node);
    struct extents *ours = req->extents;
    struct extents below = {
        .v = ours->v + ours->count, .max = ours->max - ours->count, .layers = ours->layers};
    struct request sub = *req;
    int r;

    sub.offset = req->offset + raw->offset;
    sub.extents = &below;
    r = edge_co_request(node_file(node), &sub);
    for (unsigned i = 0; i < below.count && r == 0; i++) {
        struct extent e = below.v[i];

        e.offset -= raw->offset;
        (void)extents_add(ours,
                          &e); /* there is room: ours->v + ours->count is not past below.v + i */
    }
    return r;
}

static int co_fn raw_co_resize(struct node *node, struct request *req)
{
    const struct raw *raw = node_state(node);
    uint64_t end;
    int r;

    if (raw->fixed_size)
        return -EOPNOTSUPP;
    if (!checked_add(req->offset, raw->offset, &end))
        return -EFBIG;
    r = edge_co_request_at(node_file(node), req, end);
    if (r == 0)
        node_set_size(node, req->offset);
    return r;
}

static bool raw_grows(const struct node *node)
{
    const struct raw *raw = node_state(node);

    return !raw->fixed_size && node_grows(edge_node(node_file(node)));
}

const struct driver raw_driver = {
    .name = "raw",
    .kind = DRIVER_FORMAT,
    .state_size = sizeof(struct raw),
    .options = &raw_options_type,
    .fua = true,
    .zeroes_fast = true,
    .co_open = raw_co_open,
    .co_close = raw_co_close,
    .co_read = raw_co_request,
    .co_write = raw_co_request,
    .co_write_zeroes = raw_co_request,
    .co_discard = raw_co_request,
    .co_copy_out = raw_co_request,
    .co_copy_in = raw_co_request,
    .co_flush = raw_co_request,
    .co_extents = raw_co_extents,
    .co_resize = raw_co_resize,
    .grows = raw_grows,
};
