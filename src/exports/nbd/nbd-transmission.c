/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The transmission phase, receiving side: one receive takes many requests, and a coroutine is started for each.
 *
 * The payload of a small write stays where it was received, in the receive buffer, which lives as long as a request refers to
 * it. A big one is received into a buffer of its own, without a copy.
 */
#include "base/alloc.h"
#include "base/endian.h"
#include "base/macros.h"
#include "exports/nbd/nbd-wire.h"
#include "exports/nbd/nbd.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define RX_BYTES ((size_t)256 << 10)

/* Payloads above this are received into their own buffer. */
#define IN_PLACE_MAX ((uint32_t)64 << 10)

/*
 * With more requests in flight than this the back end is not keeping up, and each might hold a whole receive buffer: their
 * payloads are copied out instead.
 */
#define IN_PLACE_REQUESTS 32

void nbd_request_free(struct nbd_request *req)
{
    struct nbd_connection *c = req->connection;

    c->request_count--;
    c->request_bytes -= req->cost;
    req->buf = iobuf_unref(req->buf);
    req->next = c->free_requests;
    c->free_requests = req;
    if (c->room && !c->room->ended)
        co_wait_end(c->room, 0);
}

static struct nbd_request *request_new(struct nbd_connection *c, const uint8_t *wire)
{
    struct nbd_request *req = c->free_requests;

    if (req) {
        c->free_requests = req->next;
    } else {
        req = try_new(struct nbd_request);
        if (!req)
            return NULL;
        req->connection = c;
    }
    req->flags = load_be16(wire + 4);
    req->type = load_be16(wire + 6);
    req->cookie = load_be64(wire + 8);
    req->offset = load_be64(wire + 16);
    req->len = load_be32(wire + 24);
    req->buf = NULL;
    req->data = NULL;
    req->payload = NULL;
    req->payload_len = 0;
    c->request_count++;
    req->cost = nbd_request_cost(req);
    c->request_bytes += req->cost;
    return req;
}

/* Moves what is left to be parsed to the start of the buffer, or of a new one if requests still refer to this one. */
static int make_room(struct nbd_connection *c)
{
    size_t left = c->rx_end - c->rx_start;

    if (c->rx->refs > 1) {
        struct iobuf *fresh = iobuf_new(RX_BYTES);

        if (!fresh)
            return -ENOMEM;
        memcpy(fresh->data, c->rx->data + c->rx_start, left);
        iobuf_unref(c->rx);
        c->rx = fresh;
    } else if (left && c->rx_start) {
        memmove(c->rx->data, c->rx->data + c->rx_start, left);
    }
    c->rx_start = 0;
    c->rx_end = left;
    return 0;
}

static int co_fn receive_more(struct nbd_connection *c)
{
    int64_t n;

    if (c->rx_start == c->rx_end || c->rx->size - c->rx_end < RX_BYTES / 4) {
        int r = make_room(c);

        if (r < 0)
            return r;
    }
    n = socket_co_recv(c->socket, c->rx->data + c->rx_end, c->rx->size - c->rx_end, LOOP_FOREVER);
    if (n <= 0)
        return n < 0 ? (int)n : -ECONNRESET;
    c->rx_end += (size_t)n;
    return 0;
}

/* The payload of a write whose header has been taken from the buffer. */
static int co_fn take_payload(struct nbd_connection *c, struct nbd_request *req)
{
    size_t here = MIN(c->rx_end - c->rx_start, (size_t)req->len);

    if (here == req->len && req->len <= IN_PLACE_MAX && c->request_count <= IN_PLACE_REQUESTS &&
        c->export->alignment == 1) {
        req->buf = iobuf_ref(c->rx);
        req->data = c->rx->data + c->rx_start;
        c->rx_start += here;
        return 0;
    }
    req->buf = iobuf_new(req->len);
    if (!req->buf)
        return -ENOMEM;
    req->data = req->buf->data;
    memcpy(req->data, c->rx->data + c->rx_start, here);
    c->rx_start += here;
    if (here == req->len)
        return 0;
    return socket_co_recv_all(c->socket, req->data + here, req->len - here, LOOP_FOREVER);
}

/* NBD-3: the client waits when it has asked for enough. */
static int co_fn wait_for_room(struct nbd_connection *c)
{
    int r = 0;

    while (r == 0 && (c->request_count >= NBD_MAX_REQUESTS || c->request_bytes >= NBD_MAX_BYTES)) {
        struct co_wait w;

        co_wait_init(&w, co_wait_leave);
        c->room = &w;
        r = co_wait(&w, LOOP_FOREVER);
        c->room = NULL;
    }
    return r;
}

/* 1: a request was started. 0: more bytes are needed. Negative: the connection is over. */
static int co_fn next_request(struct nbd_connection *c)
{
    const uint8_t *wire = c->rx->data + c->rx_start;
    size_t left = c->rx_end - c->rx_start;
    struct nbd_request *req;
    int r;

    if (left < NBD_REQUEST_BYTES)
        return 0;
    if (load_be32(wire) != NBD_REQUEST_MAGIC)
        return -EPROTO; /* where the next request begins is unknown */
    if (load_be16(wire + 6) == NBD_CMD_DISC)
        return -ESHUTDOWN;
    if (load_be16(wire + 6) == NBD_CMD_WRITE) {
        uint32_t len = load_be32(wire + 24);

        if (len > NBD_MAX_PAYLOAD)
            return -EMSGSIZE;
        if (len <= IN_PLACE_MAX && left < NBD_REQUEST_BYTES + len)
            return 0;
    }
    if (unlikely(c->request_count >= NBD_MAX_REQUESTS || c->request_bytes >= NBD_MAX_BYTES)) {
        r = wait_for_room(c);
        if (r < 0)
            return r;
    }
    req = request_new(c, wire);
    if (!req)
        return -ENOMEM;
    c->rx_start += NBD_REQUEST_BYTES;
    r = req->type == NBD_CMD_WRITE ? take_payload(c, req) : 0;
    if (r == 0)
        r = co_scope_start(&c->requests, nbd_request_run, req);
    if (r < 0) {
        nbd_request_free(req);
        return r;
    }
    return 1;
}

void nbd_co_transmission(struct nbd_connection *c)
{
    int r = 1;

    nbd_reply_init(c);
    c->rx = iobuf_new(RX_BYTES);
    while (c->rx && r >= 0 && !c->tx_broken) {
        r = next_request(c);
        if (r == 0)
            r = receive_more(c);
    }
    co_scope_join(&c->requests);
    nbd_reply_flush(c);
    co_scope_join(&c->sending); /* what the client has not read yet; nothing is added any more */
    loop_hook_cancel(&c->tx_hook);
    c->rx = iobuf_unref(c->rx);
    while (c->free_requests) {
        struct nbd_request *req = c->free_requests;

        c->free_requests = req->next;
        free(req);
    }
}
