/* SPDX-License-Identifier: Apache-2.0 */
/* A check's requests: those of a client's backend, or of the driver's own, below an edge. */
#include "base/checked.h"
#include "formats/qcow2/check/qcow2-check-internal.h"
#include "graph/backend.h"
#include "graph/node.h"

#include <errno.h>
#include <string.h>

static struct node *file_node(const struct check *x)
{
    if (x->online)
        return edge_node(x->online->file);
    return x->backend ? backend_node(x->backend) : edge_node(x->edge);
}

/* Not while what it reads is written. Enters before it locks, or a drain would wait for both (G1). */
static int co_fn send_online(struct check_online *o, struct request *req)
{
    int r;

    do {
        struct pass pass = {0};

        r = backend_co_enter(o->backend, &pass);
        if (r < 0)
            return r;
        if (o->lock)
            r = co_mutex_lock_until(o->lock, LOOP_FOREVER);
        if (r == 0) {
            req->pass = &pass;
            r = edge_co_request(o->file, req);
            if (o->lock)
                co_mutex_unlock(o->lock);
        }
        backend_leave(o->backend, &pass);
    } while (r == -ERESTART);
    return r;
}

static int co_fn send(struct check *x, struct request *req)
{
    if (x->online)
        return send_online(x->online, req);
    if (x->backend)
        return backend_co_request(x->backend, req);
    req->pass = x->by->pass;
    req->frame = x->by->frame;
    return edge_co_request(x->edge, req);
}

static int co_fn transfer(struct check *x, enum request_kind kind, uint64_t offset, struct iobuf *b,
                          size_t at, size_t len)
{
    struct iovec iov = {b->data + at, len};
    struct request req = {
        .kind = kind, .offset = offset, .len = len, .iov = &iov, .iov_count = 1, .hold = b};

    return send(x, &req);
}

uint64_t check_file_size(const struct check *x)
{
    return node_size(file_node(x));
}

uint64_t check_known_size(const struct check *x)
{
    return x->online ? check_file_size(x) : x->file_size;
}

int check_read(struct check *x, uint64_t offset, struct iobuf *b, size_t len)
{
    uint64_t size = check_known_size(x);
    size_t inside = offset < size ? (size_t)MIN((uint64_t)len, size - offset) : 0;

    memset(b->data + inside, 0, len - inside);
    return inside ? transfer(x, REQUEST_READ, offset, b, 0, inside) : 0;
}

int check_read_flat(struct check *x, uint64_t offset, void *ret, size_t len)
{
    struct iobuf *b = iobuf_new(MIN(MAX(len, (size_t)1), CHECK_PIECE));
    int r = b ? 0 : -ENOMEM;

    for (size_t at = 0; at < len && r == 0; at += CHECK_PIECE) {
        size_t n = MIN(len - at, CHECK_PIECE);

        r = check_read(x, offset + at, b, n);
        if (r == 0)
            memcpy((uint8_t *)ret + at, b->data, n);
    }
    iobuf_unref(b);
    return r;
}

int check_write(struct check *x, uint64_t offset, struct iobuf *b, size_t at, size_t len)
{
    return transfer(x, REQUEST_WRITE, offset, b, at, len);
}

int check_write_flat(struct check *x, uint64_t offset, const void *bytes, size_t len)
{
    struct iobuf *b = iobuf_new(len);
    int r;

    if (!b)
        return -ENOMEM;
    memcpy(b->data, bytes, len);
    r = check_write(x, offset, b, 0, len);
    iobuf_unref(b);
    return r;
}

int check_flush(struct check *x)
{
    struct request req = {.kind = REQUEST_FLUSH};

    return send(x, &req);
}

int check_grow(struct check *x, uint64_t size)
{
    struct request req = {.kind = REQUEST_RESIZE, .flags = REQUEST_GROW, .offset = size};
    int r = 0;

    if (size <= check_file_size(x))
        return 0;
    if (!node_grows(file_node(x)))
        return -ENOSPC;
    r = send(x, &req);
    x->file_size = check_file_size(x);
    return r;
}
