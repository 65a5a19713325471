/* SPDX-License-Identifier: Apache-2.0 */
/*
 * null-co: a disk that keeps nothing, for measuring what lies above it.
 *
 * Reads always give zeroes. A buffer that is left as it was would hold what the memory held before, perhaps another client's
 * data (P6); so `read-zeroes` only decides whether the extents promise zeroes.
 */
#include "graph/driver.h"
#include "loop/co.h"
#include "null-co-options.h"

struct null_co {
    /* Set in open, then constant. */
    uint64_t latency_ns;
    bool read_zeroes;
};

static int co_fn control_fn null_co_co_open(struct node *node, const void *options,
                                            struct error **err)
{
    const struct null_co_options *opt = options;
    struct null_co *n = node_state(node);

    (void)err;
    n->latency_ns = opt->latency_ns;
    n->read_zeroes = opt->read_zeroes;
    node_set_size(node, opt->size);
    return 0;
}

static void co_fn control_fn null_co_co_close(struct node *node)
{
    (void)node; /* nothing is held */
}

/* What every request does: takes its time. */
static int co_fn null_co_co_wait(struct node *node, struct request *req)
{
    const struct null_co *n = node_state(node);

    (void)req;
    return n->latency_ns ? co_sleep_until(loop_clock() + n->latency_ns) : 0;
}

static int co_fn null_co_co_read(struct node *node, struct request *req)
{
    int r = null_co_co_wait(node, req);

    if (r == 0)
        request_zero_from(req, 0);
    return r;
}

static int co_fn null_co_co_extents(struct node *node, struct request *req)
{
    const struct null_co *n = node_state(node);
    struct extent all = {
        .offset = req->offset,
        .len = req->len,
        .flags = EXTENT_ALLOCATED | (n->read_zeroes ? EXTENT_ZERO : EXTENT_DATA),
    };

    (void)extents_add(req->extents, &all); /* full is as good */
    return 0;
}

static int co_fn null_co_co_resize(struct node *node, struct request *req)
{
    node_set_size(node, req->offset);
    return 0;
}

static const char *null_co_filename(const struct node *node)
{
    (void)node;
    return "null-co://";
}

const struct driver null_co_driver = {
    .name = "null-co",
    .kind = DRIVER_PROTOCOL,
    .state_size = sizeof(struct null_co),
    .options = &null_co_options_type,
    .fua = true,
    .zeroes_fast = true,
    .co_open = null_co_co_open,
    .co_close = null_co_co_close,
    .co_read = null_co_co_read,
    .co_write = null_co_co_wait,
    .co_write_zeroes = null_co_co_wait,
    .co_discard = null_co_co_wait,
    .co_flush = null_co_co_wait,
    .co_extents = null_co_co_extents,
    .co_resize = null_co_co_resize,
    .filename = null_co_filename,
};
