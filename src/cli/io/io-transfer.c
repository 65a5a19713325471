/* SPDX-License-Identifier: Apache-2.0 */
/* Bytes to and from the image, in steps that one request may carry (G6). */
#include "base/checked.h"
#include "base/macros.h"
#include "cli/io/io.h"
#include "graph/node.h"

#include <errno.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>

/* More go as one piece: the memory is in a row anyway. */
#define PIECES_MAX IOV_MAX

/* Is it on the disk? Its size is one of whole sectors, as users of the peer know it. */
static bool on_disk(const struct io *io, uint64_t offset, uint64_t len)
{
    return range_within(offset, len, image_size(&io->image));
}

int io_transfer_memory(const struct io *io, struct io_transfer *t, int fill)
{
    if (!on_disk(io, t->offset, t->len))
        return -EIO;
    t->memory = fill ? malloc((size_t)MAX(t->len, (uint64_t)1))
                     : calloc(1, (size_t)MAX(t->len, (uint64_t)1));
    if (t->memory && fill)
        memset(t->memory, fill, (size_t)t->len);
    return t->memory ? 0 : -ENOMEM;
}

/* A raw file may end within its last sector: it is made as long as what is written there. */
static int co_fn control_fn reach(struct io *io, uint64_t end)
{
    AUTO(error_free) struct error *ignored = NULL; /* the caller says that it failed */

    if (end <= backend_size(io->image.backend))
        return 0;
    return graph_co_resize(io->image.graph, io->image.layers[0].node, end, &ignored);
}

/* One request with all pieces of a vector. */
static int co_fn transfer_vector(struct io *io, const struct io_transfer *t)
{
    struct iovec *iov = calloc((size_t)t->piece_count, sizeof(*iov));
    struct request req = {
        .kind = t->writes ? REQUEST_WRITE : REQUEST_READ,
        .flags = t->flags,
        .offset = t->offset,
        .len = t->len,
        .iov = iov,
    };
    uint8_t *at = t->memory;
    int r;

    if (!iov)
        return -ENOMEM;
    for (int i = 0; i < t->piece_count; i++) {
        if (t->pieces[i])
            iov[req.iov_count++] = (struct iovec){at, (size_t)t->pieces[i]};
        at += t->pieces[i];
    }
    r = backend_co_request(io->image.backend, &req);
    free(iov);
    return r;
}

static int co_fn transfer_flat(struct io *io, const struct io_transfer *t)
{
    struct backend *b = io->image.backend;
    uint64_t done = 0;
    int r = 0;

    while (r == 0 && done < t->len) {
        size_t step = (size_t)MIN(t->len - done, BACKEND_MAX_DATA);

        if (t->writes)
            r = image_co_write(b, t->offset + done, t->memory + done, step, t->flags, NULL);
        else
            r = image_co_read(b, t->offset + done, t->memory + done, step, NULL);
        done += step;
    }
    return r;
}

int io_co_transfer(struct io *io, const struct io_transfer *t)
{
    uint64_t end = t->offset + t->len;
    int r = 0;

    if (!on_disk(io, t->offset, t->len))
        return -EIO;
    if (!t->len)
        return 0;
    if (t->writes)
        r = reach(io, end);
    if (r < 0)
        return r;
    if (t->pieces && t->piece_count <= PIECES_MAX && t->len <= BACKEND_MAX_DATA &&
        end <= backend_size(io->image.backend))
        return transfer_vector(io, t);
    return transfer_flat(io, t);
}

int io_co_zero(struct io *io, uint64_t offset, uint64_t len, unsigned flags)
{
    int r;

    if (!on_disk(io, offset, len))
        return -EIO;
    r = reach(io, offset + len);
    return r < 0 ? r : image_co_zero(io->image.backend, offset, len, flags);
}

int io_co_discard(struct io *io, uint64_t offset, uint64_t len)
{
    uint64_t size = backend_size(io->image.backend);
    int r = 0;

    if (!on_disk(io, offset, len))
        return -EIO;
    len = offset < size ? MIN(len, size - offset) : 0;
    while (r == 0 && len) {
        struct request req = {
            .kind = REQUEST_DISCARD,
            .offset = offset,
            .len = MIN(len, BACKEND_MAX_RANGE),
        };

        r = backend_co_request(io->image.backend, &req);
        offset += req.len;
        len -= req.len;
    }
    return r;
}
