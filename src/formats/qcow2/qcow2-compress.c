/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Compressed clusters. Their mapping says in how many sectors of the file the compressed bytes lie; several of them share a
 * host cluster, whose refcount counts them. They are read as a whole, on worker threads, and never written to in place.
 *
 * COMPRESS-1 What was decompressed last is kept, by its mapping. Who frees compressed bytes has it forgotten, and whoever was
 *            decompressing meanwhile does not keep it: the same mapping may soon mean something else.
 */
#include "base/alloc.h"
#include "base/macros.h"
#include "formats/qcow2/qcow2.h"
#include "loop/compute.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include <zlib.h>
#include <zstd.h>

/* Deflate without a header, as the format has it; the largest window reads what any was written with. */
#define INFLATE_WINDOW (-15)

/* A decompressed cluster. */
struct qcow2_plain {
    unsigned refs; /* Protected by qcow2.lock. */
    uint64_t entry;
    uint8_t bytes[];
};

/* ---- the work of other threads ---- */

struct coding {
    unsigned type; /* enum qcow2_compression */
    const uint8_t *in;
    size_t in_len;
    uint8_t *out;
    size_t out_len;
    int result;
};

static int inflate_all(struct coding *c)
{
    z_stream s = {.next_in = (uint8_t *)(uintptr_t)c->in, .avail_in = (uInt)c->in_len};
    int r;

    s.next_out = c->out;
    s.avail_out = (uInt)c->out_len;
    if (inflateInit2(&s, INFLATE_WINDOW) != Z_OK)
        return -ENOMEM;
    r = inflate(&s, Z_FINISH);
    (void)inflateEnd(&s);
    /* Behind the end there may be anything: sectors are filled up. */
    return (r == Z_STREAM_END || r == Z_BUF_ERROR) && !s.avail_out ? 0 : -EIO;
}

static int unzstd_all(struct coding *c)
{
    ZSTD_DCtx *d = ZSTD_createDCtx();
    ZSTD_outBuffer out = {.dst = c->out, .size = c->out_len};
    ZSTD_inBuffer in = {.src = c->in, .size = c->in_len};
    size_t r = 1;

    if (!d)
        return -ENOMEM;
    while (out.pos < out.size && in.pos < in.size && !ZSTD_isError(r))
        r = ZSTD_decompressStream(d, &out, &in);
    ZSTD_freeDCtx(d);
    return !ZSTD_isError(r) && out.pos == out.size ? 0 : -EIO;
}

static void decompress(void *arg)
{
    struct coding *c = arg;

    c->result = c->type == QCOW2_COMPRESSION_ZSTD ? unzstd_all(c) : inflate_all(c);
}

/* ---- reading ---- */

void qcow2_compressed_place(const struct qcow2 *q, uint64_t entry, uint64_t *ret_offset,
                            uint64_t *ret_len)
{
    unsigned bits = (unsigned)QCOW2_COMPRESSED_OFFSET_BITS(q->cluster_bits);
    uint64_t offset = entry & (((uint64_t)1 << bits) - 1);
    uint64_t sectors = ((entry & ~(QCOW2_COPIED | QCOW2_L2_COMPRESSED)) >> bits) +
                       1; /* also the one it begins in */

    *ret_offset = offset;
    *ret_len = sectors * QCOW2_COMPRESSED_SECTOR - offset % QCOW2_COMPRESSED_SECTOR;
}

static void plain_put_locked(struct qcow2_plain *p)
{
    if (p && !--p->refs)
        free(p);
}

void qcow2_plain_forget_locked(struct qcow2 *q)
{
    plain_put_locked(q->plain);
    q->plain = NULL;
    q->plain_turn++;
}

static struct qcow2_plain *plain_get(struct qcow2 *q, uint64_t entry, uint64_t *ret_turn)
{
    struct qcow2_plain *p = NULL;

    tiny_lock_acquire(&q->lock);
    *ret_turn = q->plain_turn;
    if (q->plain && q->plain->entry == entry) {
        p = q->plain;
        p->refs++;
    }
    tiny_lock_release(&q->lock);
    return p;
}

/* COMPRESS-1 */
static void plain_keep(struct qcow2 *q, struct qcow2_plain *p, uint64_t turn)
{
    tiny_lock_acquire(&q->lock);
    if (turn == q->plain_turn) {
        plain_put_locked(q->plain);
        q->plain = p;
        p->refs++;
    }
    tiny_lock_release(&q->lock);
}

static void plain_put(struct qcow2 *q, struct qcow2_plain *p)
{
    tiny_lock_acquire(&q->lock);
    plain_put_locked(p);
    tiny_lock_release(&q->lock);
}

static int co_fn decompress_entry(struct qcow2 *q, const struct request *by, uint64_t entry,
                                  struct qcow2_plain *plain)
{
    struct coding c = {
        .type = q->compression_type, .out = plain->bytes, .out_len = (size_t)qcow2_cluster_size(q)};
    struct iobuf *b;
    uint64_t offset;
    uint64_t len;
    int r;

    qcow2_compressed_place(q, entry, &offset, &len);
    if (offset >= node_size(edge_node(q->file)) || offset < qcow2_cluster_size(q))
        return qcow2_damaged(q, "compressed data lies at %llu, where none can be",
                             (unsigned long long)offset);
    b = iobuf_new((size_t)len);
    if (!b)
        return -ENOMEM;
    c.in = b->data;
    c.in_len = (size_t)len;
    r = qcow2_read_meta(q, by, offset, b, 0, (size_t)len);
    if (r == 0)
        r = loop_co_compute(decompress, &c);
    if (r == 0 && c.result == -EIO)
        r = qcow2_damaged(q, "the compressed data at %llu does not decompress to a cluster",
                          (unsigned long long)offset);
    else if (r == 0)
        r = c.result;
    iobuf_unref(b);
    return r;
}

int qcow2_co_read_encoded(struct node *node, struct request *req, uint64_t entry)
{
    struct qcow2 *q = node_state(node);
    uint64_t in_cluster = req->offset & (qcow2_cluster_size(q) - 1);
    uint64_t turn;
    struct qcow2_plain *p = plain_get(q, entry, &turn);
    int r = 0;

    if (!p) {
        p = try_alloc(1, sizeof(*p) + (size_t)qcow2_cluster_size(q));
        if (!p)
            return -ENOMEM;
        p->refs = 1;
        p->entry = entry;
        r = decompress_entry(q, req, entry, p);
        if (r == 0)
            plain_keep(q, p, turn);
    }
    if (r == 0)
        request_scatter(req, 0, p->bytes + in_cluster, (size_t)req->len);
    plain_put(q, p);
    return r;
}
