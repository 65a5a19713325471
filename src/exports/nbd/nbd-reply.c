/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Replies: made into a queue, sent in batches (NBD-3). A batch goes out at the end of the tick, or earlier when it is big enough
 * for the client to be worth waking: then server and client work at the same time.
 */
#include "base/endian.h"
#include "base/macros.h"
#include "exports/nbd/nbd-wire.h"
#include "exports/nbd/nbd.h"

#include <assert.h>
#include <errno.h>
#include <string.h>

#define BATCH_IOV   256
#define EARLY_BYTES ((size_t)128 << 10)

static enum nbd_error wire_error(int result)
{
    switch (-result) {
    case 0:
        return NBD_OK;
    case EPERM:
    case EROFS:
        return NBD_EPERM;
    case ENOMEM:
        return NBD_ENOMEM;
    case EINVAL:
        return NBD_EINVAL;
    case ENOSPC:
    case EDQUOT:
    case EFBIG:
        return NBD_ENOSPC;
    case EOVERFLOW:
        return NBD_EOVERFLOW;
    case EOPNOTSUPP:
        return NBD_ENOTSUP;
    case ESHUTDOWN:
        return NBD_ESHUTDOWN;
    default:
        return NBD_EIO;
    }
}

static void simple_head(struct nbd_request *req, enum nbd_error error)
{
    store_be32(req->head, NBD_SIMPLE_REPLY_MAGIC);
    store_be32(req->head + 4, error);
    store_be64(req->head + 8, req->cookie);
    req->head_len = 16;
}

void nbd_chunk_head(uint8_t *out, unsigned flags, unsigned type, uint64_t cookie, size_t len)
{
    store_be32(out, NBD_STRUCTURED_REPLY_MAGIC);
    store_be16(out + 4, (uint16_t)flags);
    store_be16(out + 6, (uint16_t)type);
    store_be64(out + 8, cookie);
    store_be32(out + 16, (uint32_t)len);
}

static void chunk_head(struct nbd_request *req, unsigned type, size_t len)
{
    nbd_chunk_head(req->head, NBD_REPLY_FLAG_DONE, type, req->cookie, len);
    req->head_len = 20;
}

/* A reply is one chunk, but for block status, whose payload has all its chunks: with DF a read's must be, without it may. */
static void structured_head(struct nbd_request *req, enum nbd_error error)
{
    if (error) {
        chunk_head(req, NBD_REPLY_TYPE_ERROR, 6);
        store_be32(req->head + 20, error);
        store_be16(req->head + 24, 0); /* no text */
        req->head_len = 26;
    } else if (req->type == NBD_CMD_READ && req->len) {
        chunk_head(req, NBD_REPLY_TYPE_OFFSET_DATA, 8 + req->payload_len);
        store_be64(req->head + 20, req->offset);
        req->head_len = 28;
    } else if (req->type == NBD_CMD_BLOCK_STATUS) {
        req->head_len = 0;
    } else {
        chunk_head(req, NBD_REPLY_TYPE_NONE, 0);
    }
}

static size_t reply_bytes(const struct nbd_request *req)
{
    return req->head_len + req->payload_len;
}

void nbd_reply_send(struct nbd_request *req, int result)
{
    struct nbd_connection *c = req->connection;
    enum nbd_error error = wire_error(result);

    if (error)
        req->payload_len = 0;
    if (c->structured)
        structured_head(req, error);
    else
        simple_head(req, error);
    req->next = NULL;
    *c->tx_last = req;
    c->tx_last = &req->next;
    c->tx_bytes += reply_bytes(req);
    if (c->tx_bytes >= EARLY_BYTES)
        nbd_reply_flush(c);
    else
        loop_hook_defer(&c->tx_hook);
}

/* The unsent part of the queue, as far as the vector reaches. */
static int gather(const struct nbd_connection *c, struct iovec *iov, size_t *ret_bytes)
{
    size_t skip = c->tx_skip;
    size_t bytes = 0;
    int n = 0;

    for (struct nbd_request *req = c->tx_first; req && n + 2 <= BATCH_IOV; req = req->next) {
        size_t head_skip = MIN(skip, (size_t)req->head_len);
        size_t payload_skip = skip - head_skip;

        if (req->head_len > head_skip)
            iov[n++] = (struct iovec){req->head + head_skip, req->head_len - head_skip};
        if (req->payload_len > payload_skip)
            iov[n++] = (struct iovec){(char *)(uintptr_t)req->payload + payload_skip,
                                      req->payload_len - payload_skip};
        bytes += reply_bytes(req) - skip;
        skip = 0;
    }
    *ret_bytes = bytes;
    return n;
}

/* These bytes of the queue have gone out. */
static void consume(struct nbd_connection *c, size_t bytes)
{
    c->tx_bytes -= bytes;
    c->tx_skip += bytes;
    while (c->tx_first && c->tx_skip >= reply_bytes(c->tx_first)) {
        struct nbd_request *req = c->tx_first;

        c->tx_skip -= reply_bytes(req);
        c->tx_first = req->next;
        if (!c->tx_first)
            c->tx_last = &c->tx_first;
        nbd_request_free(req);
    }
}

/* The client is gone. What is queued, and what will be, is dropped; the reader notices by itself. */
static void give_up(struct nbd_connection *c)
{
    if (!c->tx_broken)
        socket_shutdown(c->socket);
    c->tx_broken = true;
    consume(c, c->tx_bytes);
}

/* Waits for a socket that is full. */
static void co_fn send_rest(void *arg)
{
    struct nbd_connection *c = arg;
    struct iovec iov[BATCH_IOV];

    while (c->tx_first && !c->tx_broken) {
        size_t bytes;
        int n = gather(c, iov, &bytes);

        if (socket_co_send(c->socket, iov, n, LOOP_FOREVER) < 0)
            give_up(c);
        else
            consume(c, bytes);
    }
    c->tx_sending = false;
    if (c->tx_broken)
        give_up(c);
}

void nbd_reply_flush(struct nbd_connection *c)
{
    struct iovec iov[BATCH_IOV];

    if (c->tx_broken) {
        if (!c->tx_sending)
            give_up(c);
        return;
    }
    while (c->tx_first && !c->tx_sending) {
        size_t bytes;
        int n = gather(c, iov, &bytes);
        int64_t sent = socket_try_send(c->socket, iov, n);

        if (sent < 0 && sent != -EAGAIN) {
            give_up(c);
            return;
        }
        if (sent > 0)
            consume(c, (size_t)sent);
        if (sent == (int64_t)bytes)
            continue;
        c->tx_sending = true;
        if (co_scope_start(&c->sending, send_rest, c) < 0) {
            c->tx_sending = false;
            give_up(c);
        }
    }
}

static void flush_hook(struct loop_hook *h)
{
    nbd_reply_flush(container_of(h, struct nbd_connection, tx_hook));
}

void nbd_reply_init(struct nbd_connection *c)
{
    c->tx_last = &c->tx_first;
    loop_hook_init(&c->tx_hook, flush_hook);
}
