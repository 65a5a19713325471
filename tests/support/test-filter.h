/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A filter of many minds for tests of changes: what it does is chosen by the options of `raw`, under whose name it goes.
 * `offset` is the mind, `size` a number for it. It counts who is inside, and can be looked at from any loop.
 */
#ifndef CAIRN_TESTS_TEST_FILTER_H
#define CAIRN_TESTS_TEST_FILTER_H

#include "base/atomic.h"
#include "base/macros.h"
#include "check.h"
#include "graph/backend.h"
#include "graph/driver.h"
#include "loop/scope.h"
#include "raw-options.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>

enum filter_mind {
    FILTER_PASS,
    FILTER_PARK,  /* parks each request for `size` ns (G6), then pays a token for it */
    FILTER_SPLIT, /* reads and writes in two halves at once, in coroutines of their own */
    FILTER_COPY, /* each write goes through a backend of its own as well, with its parent's pass (G1) */
};

struct test_filter {
    enum filter_mind mind;
    uint64_t number;

    /* Atomic. */
    unsigned inside;
    unsigned arrived;  /* re-issues count */
    unsigned restarts; /* parks that a drain ended */
    unsigned tokens;   /* paid */
    uint64_t first_park_deadline_ns;
    uint64_t last_park_deadline_ns;

    struct backend *own; /* FILTER_COPY; set while the node has no users */
};

static inline struct test_filter *test_filter_of(struct node *node)
{
    return node_state(node);
}

static int test_filter_co_open(struct node *node, const void *options, struct error **err)
{
    const struct raw_options *opt = options;
    struct test_filter *f = node_state(node);

    (void)err;
    f->mind = (enum filter_mind)opt->offset;
    f->number = opt->has_size ? opt->size : 0;
    node_set_size(node, node_size(edge_node(node_file(node))));
    return 0;
}

static void test_filter_co_close(struct node *node)
{
    check(atomic_get(&test_filter_of(node)->inside) == 0);
}

static int test_filter_park(struct node *node, struct request *req)
{
    struct test_filter *f = node_state(node);
    uint64_t deadline = request_reached_ns(req, node) + f->number;
    int r;

    if (!atomic_get(&f->first_park_deadline_ns))
        atomic_set(&f->first_park_deadline_ns, deadline);
    atomic_set(&f->last_park_deadline_ns, deadline);
    r = co_park_until(req, deadline);
    if (r == -ERESTART)
        atomic_add(&f->restarts, 1u);
    if (r == 0)
        atomic_add(&f->tokens, 1u);
    return r;
}

struct half {
    struct node *node;
    struct request req;
    struct iovec iov;
    int result;
};

static void half_main(void *arg)
{
    struct half *h = arg;

    h->result = edge_co_request(node_file(h->node), &h->req);
}

/* The first half may end after the second and the other way round. */
static int test_filter_split(struct node *node, struct request *req)
{
    uint64_t cut = req->len / 2;
    struct half h[2];
    struct co_scope scope;

    if (req->iov_count != 1 || !cut)
        return edge_co_request(node_file(node), req);
    co_scope_init(&scope);
    for (unsigned i = 0; i < 2; i++) {
        h[i].node = node;
        h[i].req =
            request_for(req, req->kind, req->offset + (i ? cut : 0), i ? req->len - cut : cut);
        h[i].iov = (struct iovec){(char *)req->iov[0].iov_base + (i ? cut : 0), h[i].req.len};
        h[i].req.iov = &h[i].iov;
        h[i].req.iov_count = 1;
        h[i].req.hold = req->hold;
        h[i].req.flags = req->flags;
        if (co_scope_start(&scope, half_main, &h[i]) < 0)
            h[i].result = -ENOMEM;
    }
    co_scope_join(&scope);
    return h[0].result < 0 ? h[0].result : h[1].result;
}

static int test_filter_copy(struct node *node, struct request *req)
{
    struct test_filter *f = node_state(node);
    int r = edge_co_request(node_file(node), req);

    if (r == 0 && req->kind == REQUEST_WRITE && f->own) {
        struct request copy = request_for(req, REQUEST_WRITE, req->offset, req->len);

        copy.iov = req->iov;
        copy.iov_count = req->iov_count;
        copy.hold = req->hold;
        r = backend_co_request(f->own, &copy);
    }
    return r;
}

static int test_filter_co_request(struct node *node, struct request *req)
{
    struct test_filter *f = node_state(node);
    int r = 0;

    atomic_add(&f->arrived, 1u);
    atomic_add(&f->inside, 1u);
    switch (f->mind) {
    case FILTER_PARK:
        r = test_filter_park(node, req);
        if (r == 0)
            r = edge_co_request(node_file(node), req);
        break;
    case FILTER_SPLIT:
        r = req->kind == REQUEST_READ || req->kind == REQUEST_WRITE
                ? test_filter_split(node, req)
                : edge_co_request(node_file(node), req);
        break;
    case FILTER_COPY:
        r = test_filter_copy(node, req);
        break;
    case FILTER_PASS:
        r = edge_co_request(node_file(node), req);
        break;
    }
    atomic_sub(&f->inside, 1u);
    return r;
}

static const struct driver test_filter_driver = {
    .name = "raw",
    .kind = DRIVER_FILTER,
    .options = &raw_options_type,
    .state_size = sizeof(struct test_filter),
    .fua = true,
    .zeroes_fast = true,
    .co_open = test_filter_co_open,
    .co_close = test_filter_co_close,
    .co_read = test_filter_co_request,
    .co_write = test_filter_co_request,
    .co_write_zeroes = test_filter_co_request,
    .co_discard = test_filter_co_request,
    .co_flush = test_filter_co_request,
};

#endif
