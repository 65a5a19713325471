/* SPDX-License-Identifier: Apache-2.0 */
/* Reading and writing through a cipher. */
#include "formats/encrypted.h"
#include "base/checked.h"
#include "base/macros.h"
#include "graph/backend.h"
#include "graph/gate.h"
#include "loop/iobuf.h"

#include <errno.h>
#include <string.h>

#define SECTOR SECTOR_CIPHER_SECTOR

/* A request is encrypted in pieces of this size. */
#define WRITE_STEP MIB
#define READ_STEP  MIB
#define PIECE_IOV  16

/* ---- reading ---- */

/* Whole sectors into a buffer. */
static int co_fn read_sectors(const struct encrypted *e, const struct request *by, uint64_t offset,
                              struct iobuf *b, size_t len)
{
    uint64_t size = align_down(node_size(edge_node(e->file)), SECTOR);
    size_t inside = offset < size ? (size_t)MIN((uint64_t)len, size - offset) : 0;
    struct iovec iov = {b->data, inside};
    struct request read = request_for(by, REQUEST_READ, offset, inside);
    int r = 0;

    read.iov = &iov;
    read.iov_count = 1;
    read.hold = b;
    memset(b->data + inside, 0, len - inside);
    if (inside)
        r = edge_co_request(e->file, &read);
    if (r == 0 && inside)
        r = sector_cipher_co_decrypt(e->cipher, (offset - e->first) / SECTOR, &iov, 1);
    return r;
}

static int co_fn read_through_buffer(const struct encrypted *e, struct request *req,
                                     uint64_t host_offset)
{
    uint64_t end = host_offset + req->len;
    uint64_t pos = host_offset;
    struct iobuf *b = iobuf_new((size_t)MIN(req->len + 2 * (uint64_t)SECTOR, READ_STEP));
    int r = b ? 0 : -ENOMEM;

    while (r == 0 && pos < end) {
        uint64_t first = align_down(pos, SECTOR);
        uint64_t last = MIN(align_up(end, SECTOR), first + READ_STEP);
        size_t len = (size_t)(MIN(last, end) - pos);

        r = read_sectors(e, req, first, b, (size_t)(last - first));
        if (r == 0)
            request_scatter(req, pos - host_offset, b->data + (pos - first), len);
        pos += len;
    }
    iobuf_unref(b);
    return r;
}

int encrypted_co_read(const struct encrypted *e, struct request *req, uint64_t host_offset)
{
    bool whole = !((host_offset | req->len) & (SECTOR - 1));
    int r;

    if (unlikely(!whole || !range_within(host_offset, req->len, node_size(edge_node(e->file)))))
        return read_through_buffer(e, req, host_offset);
    r = edge_co_request_at(e->file, req, host_offset);
    return r < 0 ? r
                 : sector_cipher_co_decrypt(e->cipher, (host_offset - e->first) / SECTOR, req->iov,
                                            req->iov_count);
}

/* ---- writing ---- */

/* A piece of a request, encrypted, into a buffer. */
static int co_fn encrypt_piece(const struct encrypted *e, const struct request *req, uint64_t skip,
                               uint64_t sector, struct iobuf *b, size_t len)
{
    struct iovec iov[PIECE_IOV];
    struct request piece = *req;

    if (likely(request_slice(&piece, req, skip, len, iov, PIECE_IOV) == len))
        return sector_cipher_co_encrypt(e->cipher, sector, piece.iov, piece.iov_count, b->data);
    request_gather(req, skip, b->data, len); /* more vectors than fit */
    iov[0] = (struct iovec){b->data, len};
    return sector_cipher_co_encrypt(e->cipher, sector, iov, 1, b->data);
}

int encrypted_co_write(const struct encrypted *e, const struct request *req, uint64_t skip,
                       uint64_t len, uint64_t host_offset)
{
    struct iobuf *b = iobuf_new((size_t)MIN(len, WRITE_STEP));
    int r = b ? 0 : -ENOMEM;

    for (uint64_t done = 0; r == 0 && done < len;) {
        size_t step = (size_t)MIN(len - done, WRITE_STEP);
        struct iovec iov;
        struct request write = *req;

        iov = (struct iovec){b->data, step};
        r = encrypt_piece(e, req, skip + done, (host_offset + done - e->first) / SECTOR, b, step);
        write.offset = host_offset + done;
        write.len = step;
        write.iov = &iov;
        write.iov_count = 1;
        write.hold = b;
        if (r == 0)
            r = edge_co_request(e->file, &write);
        done += step;
    }
    iobuf_unref(b);
    return r;
}

/* ---- headers ---- */

static int co_fn send_now(const struct encrypted_store *s, struct request *req)
{
    struct pass pass = {0};
    int r;

    if (!s->file)
        return backend_co_request(s->backend, req);
    if (!s->backend) {
        req->pass = s->by->pass;
        req->frame = s->by->frame;
        return edge_co_request(s->file, req);
    }
    r = backend_co_enter(s->backend, &pass);
    if (r < 0)
        return r;
    req->pass = &pass;
    r = edge_co_request(s->file, req);
    backend_leave(s->backend, &pass);
    return r;
}

static int co_fn send_buffer(const struct encrypted_store *s, enum request_kind kind,
                             uint64_t offset, struct iobuf *b, size_t len)
{
    struct iovec iov = {b->data, len};
    struct request req = {.kind = kind,
                          .offset = s->offset + offset,
                          .len = len,
                          .iov = &iov,
                          .iov_count = 1,
                          .hold = b};

    return send_now(s, &req);
}

static int co_fn store_read(void *arg, uint64_t offset, struct iobuf *b, size_t len)
{
    const struct encrypted_store *s = arg;
    uint64_t size = s->file ? node_size(edge_node(s->file)) : backend_size(s->backend);
    uint64_t from = s->offset + offset;
    size_t inside = from < size ? (size_t)MIN((uint64_t)len, size - from) : 0;

    memset(b->data + inside, 0, len - inside);
    return inside ? send_buffer(s, REQUEST_READ, offset, b, inside) : 0;
}

static int co_fn store_write(void *arg, uint64_t offset, struct iobuf *b, size_t len)
{
    return send_buffer(arg, REQUEST_WRITE, offset, b, len);
}

static int co_fn store_sync(void *arg)
{
    struct request req = {.kind = REQUEST_FLUSH};

    return send_now(arg, &req);
}

struct luks_store encrypted_store(struct encrypted_store *s, uint64_t len)
{
    return (struct luks_store){.arg = s,
                               .len = len,
                               .co_read = store_read,
                               .co_write = store_write,
                               .co_sync = store_sync};
}

int encrypted_co_format(struct backend *b, uint64_t offset, const struct luks_format *f,
                        const struct secret *password, struct error **err)
{
    struct encrypted_store where = {.backend = b, .offset = offset};
    struct luks_store store;
    uint64_t len;
    int r = luks_area_len(f, &len, err);

    if (r < 0)
        return r;
    store = encrypted_store(&where, len);
    return luks_co_format(&store, f, password, err);
}
