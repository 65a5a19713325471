/* SPDX-License-Identifier: Apache-2.0 */
/* The commands of the transmission phase: from the wire's terms into requests to the backend, and back. */
#include "base/checked.h"
#include "base/endian.h"
#include "base/macros.h"
#include "exports/nbd/nbd-wire.h"
#include "exports/nbd/nbd.h"

#include <errno.h>
#include <string.h>

/* The step in which a range is read for NBD_CMD_CACHE. */
#define CACHE_STEP ((uint32_t)1 << 20)

/* What each command may carry as flags. */
static unsigned allowed_flags(uint16_t type)
{
    switch ((enum nbd_command)type) {
    case NBD_CMD_READ:
        return NBD_CMD_FLAG_FUA | NBD_CMD_FLAG_DF;
    case NBD_CMD_WRITE:
    case NBD_CMD_TRIM:
    case NBD_CMD_FLUSH:
    case NBD_CMD_CACHE:
        return NBD_CMD_FLAG_FUA;
    case NBD_CMD_WRITE_ZEROES:
        return NBD_CMD_FLAG_FUA | NBD_CMD_FLAG_NO_HOLE | NBD_CMD_FLAG_FAST_ZERO;
    case NBD_CMD_BLOCK_STATUS:
        return NBD_CMD_FLAG_FUA | NBD_CMD_FLAG_REQ_ONE;
    case NBD_CMD_DISC:
        break;
    }
    return 0;
}

static bool changes_data(uint16_t type)
{
    return type == NBD_CMD_WRITE || type == NBD_CMD_TRIM || type == NBD_CMD_WRITE_ZEROES;
}

/* 0, or what the client did wrong. */
static int check(const struct nbd_request *req)
{
    const struct nbd_connection *c = req->connection;

    if (req->type > NBD_CMD_BLOCK_STATUS || (req->flags & ~allowed_flags(req->type)))
        return -EINVAL;
    if ((req->flags & NBD_CMD_FLAG_DF) && !c->structured)
        return -EINVAL;
    if (changes_data(req->type) && !c->export->writable)
        return -EPERM;
    if (req->type == NBD_CMD_FLUSH)
        return req->offset || req->len ? -EINVAL : 0;
    if (!range_within(req->offset, req->len, c->export->size))
        return changes_data(req->type) ? -ENOSPC : -EINVAL;
    if (req->type == NBD_CMD_READ && req->len > NBD_MAX_PAYLOAD)
        return -EOVERFLOW;
    if (req->type == NBD_CMD_CACHE && req->len > NBD_MAX_PAYLOAD)
        return -EINVAL; /* it is read to the end, also for a client that has gone */
    if (req->type == NBD_CMD_BLOCK_STATUS && (!c->contexts || !req->len))
        return -EINVAL;
    return 0;
}

uint32_t nbd_request_cost(const struct nbd_request *req)
{
    switch (req->type) {
    case NBD_CMD_READ:
    case NBD_CMD_WRITE:
        return req->len <= NBD_MAX_PAYLOAD ? req->len : 0; /* longer ones are refused */
    case NBD_CMD_CACHE:
        return MIN(req->len, CACHE_STEP);
    case NBD_CMD_BLOCK_STATUS:
        return nbd_block_status_cost(req);
    default:
        return 0;
    }
}

static enum request_kind request_kind_of(uint16_t type)
{
    switch ((enum nbd_command)type) {
    case NBD_CMD_WRITE:
        return REQUEST_WRITE;
    case NBD_CMD_TRIM:
        return REQUEST_DISCARD;
    case NBD_CMD_WRITE_ZEROES:
        return REQUEST_WRITE_ZEROES;
    case NBD_CMD_FLUSH:
        return REQUEST_FLUSH;
    case NBD_CMD_BLOCK_STATUS:
        return REQUEST_EXTENTS;
    case NBD_CMD_READ:
    case NBD_CMD_CACHE:
    case NBD_CMD_DISC:
        break;
    }
    return REQUEST_READ;
}

static int co_fn command_read(struct nbd_request *req)
{
    struct iovec iov;
    struct request r = {
        .kind = REQUEST_READ,
        .offset = req->offset,
        .len = req->len,
        .iov = &iov,
        .iov_count = 1,
    };

    if (!req->len)
        return 0;
    req->buf = iobuf_new(req->len);
    if (!req->buf)
        return -ENOMEM;
    iov = (struct iovec){req->buf->data, req->len};
    r.hold = req->buf;
    req->payload = req->buf->data;
    req->payload_len = req->len;
    return backend_co_request(req->connection->backend, &r);
}

static int co_fn flush(struct nbd_connection *c)
{
    struct request r = {.kind = REQUEST_FLUSH};

    return backend_co_request(c->backend, &r);
}

static unsigned fua_flag(const struct nbd_request *req)
{
    return (req->flags & NBD_CMD_FLAG_FUA) || req->connection->export->writethrough ? REQUEST_FUA
                                                                                    : 0;
}

static int co_fn command_write(struct nbd_request *req)
{
    struct iovec iov = {req->data, req->len};
    struct request r = {
        .kind = REQUEST_WRITE,
        .flags = fua_flag(req),
        .offset = req->offset,
        .len = req->len,
        .iov = &iov,
        .iov_count = 1,
        .hold = req->buf,
    };

    return req->len ? backend_co_request(req->connection->backend, &r) : 0;
}

static int co_fn command_trim(struct nbd_request *req)
{
    struct request r = {.kind = REQUEST_DISCARD, .offset = req->offset, .len = req->len};
    int result = backend_co_request(req->connection->backend, &r);

    return result == 0 && fua_flag(req) ? flush(req->connection) : result;
}

static int co_fn command_write_zeroes(struct nbd_request *req)
{
    struct request r = {
        .kind = REQUEST_WRITE_ZEROES,
        .flags = fua_flag(req),
        .offset = req->offset,
        .len = req->len,
    };

    if (!(req->flags & NBD_CMD_FLAG_NO_HOLE))
        r.flags |= REQUEST_MAY_UNMAP;
    if (req->flags & NBD_CMD_FLAG_FAST_ZERO)
        r.flags |= REQUEST_NO_FALLBACK;
    return backend_co_request(req->connection->backend, &r);
}

/* Reads and forgets: what can cache on the way has it then. */
static int co_fn command_cache(struct nbd_request *req)
{
    struct iobuf *b = iobuf_new(MIN(req->len, CACHE_STEP));
    uint32_t done = 0;
    int result = b ? 0 : -ENOMEM;

    while (result == 0 && done < req->len) {
        struct iovec iov = {b->data, MIN(req->len - done, CACHE_STEP)};
        struct request r = {
            .kind = REQUEST_READ,
            .offset = req->offset + done,
            .len = iov.iov_len,
            .iov = &iov,
            .iov_count = 1,
            .hold = b,
        };

        result = backend_co_request(req->connection->backend, &r);
        done += (uint32_t)iov.iov_len;
    }
    iobuf_unref(b);
    return result;
}

static int co_fn command_run(struct nbd_request *req)
{
    switch ((enum nbd_command)req->type) {
    case NBD_CMD_READ:
        return command_read(req);
    case NBD_CMD_WRITE:
        return command_write(req);
    case NBD_CMD_FLUSH:
        return flush(req->connection);
    case NBD_CMD_TRIM:
        return command_trim(req);
    case NBD_CMD_CACHE:
        return command_cache(req);
    case NBD_CMD_WRITE_ZEROES:
        return command_write_zeroes(req);
    case NBD_CMD_BLOCK_STATUS:
        return nbd_co_block_status(req);
    case NBD_CMD_DISC:
        break;
    }
    return -EINVAL;
}

void nbd_request_run(void *request)
{
    struct nbd_request *req = request;
    int result = check(req);

    if (unlikely(result < 0))
        backend_count_invalid(req->connection->backend, request_kind_of(req->type));
    else
        result = command_run(req);
    nbd_reply_send(req, result);
}
