/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Compressed clusters. Their mapping says in how many sectors of the file the compressed bytes lie; several of them share a
 * host cluster, whose refcount counts them. They are read as a whole, on worker threads, and never written to in place.
 *
 * COMPRESS-1 What was decompressed last is kept, by its mapping. Who frees compressed bytes has it forgotten, and whoever was
 *            decompressing meanwhile does not keep it: the same mapping may soon mean something else.
 * COMPRESS-2 Nothing of one cluster is left for the next one, also where the bytes are damaged: whoever decompresses begins anew.
 */
#include "base/alloc.h"
#include "base/checked.h"
#include "base/macros.h"
#include "formats/inflate.h"
#include "formats/qcow2/qcow2.h"
#include "loop/compute.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include <zlib.h>
#include <zstd.h>

/*
 * So much of a request is compressed by one call of another thread. A call costs as much as 20 KiB of zstd; deflate takes ten times
 * as long, and with less at a time all processors end together.
 */
#define GROUP_BYTES_ZSTD (256 * KIB)
#define GROUP_BYTES_ZLIB (64 * KIB)
#define GROUP_MAX        16

/* What a context of zstd may keep between two uses: the image says how much it needs. */
#define CODER_BYTES_MAX ((size_t)4 << 20)

/* Deflate without a header, as the format has it. */
#define DEFLATE_WINDOW (-12)

/* A decompressed cluster. */
struct qcow2_plain {
    unsigned refs; /* Protected by qcow2.lock. */
    uint64_t entry;
    uint8_t bytes[];
};

/* ---- the work of other threads ---- */

/* Contexts of zstd: making one, and clearing its tables, takes longer than some clusters do. There is one for each thread at most. */
struct qcow2_coder {
    struct qcow2_coder *next;
    ZSTD_CCtx *compressing; /* NULL: not used yet */
    ZSTD_DCtx *decompressing;
};

static struct qcow2_coder *coder_take(struct qcow2 *q)
{
    struct qcow2_coder *k;

    tiny_lock_acquire(&q->lock);
    k = q->coders;
    if (k)
        q->coders = k->next;
    tiny_lock_release(&q->lock);
    return k ? k : try_new(struct qcow2_coder);
}

static void coder_free(struct qcow2_coder *k)
{
    ZSTD_freeCCtx(k->compressing);
    ZSTD_freeDCtx(k->decompressing);
    free(k);
}

static void coder_put(struct qcow2 *q, struct qcow2_coder *k)
{
    if (ZSTD_sizeof_CCtx(k->compressing) + ZSTD_sizeof_DCtx(k->decompressing) > CODER_BYTES_MAX) {
        coder_free(k);
        return;
    }
    tiny_lock_acquire(&q->lock);
    k->next = q->coders;
    q->coders = k;
    tiny_lock_release(&q->lock);
}

void qcow2_coders_release(struct qcow2 *q)
{
    while (q->coders) {
        struct qcow2_coder *k = q->coders;

        q->coders = k->next;
        coder_free(k);
    }
}

struct coding {
    struct qcow2 *q;
    const uint8_t *in;
    size_t in_len;
    uint8_t *out;
    size_t out_len; /* room; of compressing: what it came to */
    int result;
};

static int inflate_all(struct coding *c)
{
    int64_t n = inflate_some(INFLATE_BARE, c->in, c->in_len, c->out, c->out_len);

    return n < 0 ? (int)n : (size_t)n == c->out_len ? 0 : -EIO;
}

static int unzstd_with(struct qcow2_coder *k, struct coding *c)
{
    ZSTD_outBuffer out = {.dst = c->out, .size = c->out_len};
    ZSTD_inBuffer in = {.src = c->in, .size = c->in_len};
    size_t r = 1;

    if (!k->decompressing)
        k->decompressing = ZSTD_createDCtx();
    if (!k->decompressing)
        return -ENOMEM;
    /* COMPRESS-2 */
    (void)ZSTD_DCtx_reset(k->decompressing, ZSTD_reset_session_only);
    while (out.pos < out.size && in.pos < in.size && !ZSTD_isError(r))
        r = ZSTD_decompressStream(k->decompressing, &out, &in);
    return !ZSTD_isError(r) && out.pos == out.size ? 0 : -EIO;
}

/* 1: it would not become smaller. */
static int deflate_all(struct coding *c)
{
    z_stream s = {.next_in = (uint8_t *)(uintptr_t)c->in, .avail_in = (uInt)c->in_len};
    int r;

    s.next_out = c->out;
    s.avail_out = (uInt)c->out_len;
    if (deflateInit2(&s, Z_DEFAULT_COMPRESSION, Z_DEFLATED, DEFLATE_WINDOW, 9,
                     Z_DEFAULT_STRATEGY) != Z_OK)
        return -ENOMEM;
    r = deflate(&s, Z_FINISH);
    (void)deflateEnd(&s);
    c->out_len -= s.avail_out;
    return r == Z_STREAM_END ? 0 : 1;
}

/* The same. */
static int zstd_with(struct qcow2_coder *k, struct coding *c)
{
    size_t n;

    if (!k->compressing)
        k->compressing = ZSTD_createCCtx();
    if (!k->compressing)
        return -ENOMEM;
    n = ZSTD_compressCCtx(k->compressing, c->out, c->out_len, c->in, c->in_len,
                          ZSTD_CLEVEL_DEFAULT);
    if (ZSTD_isError(n))
        return 1;
    c->out_len = n;
    return 0;
}

static int with_coder(struct coding *c, int (*fn)(struct qcow2_coder *k, struct coding *c))
{
    struct qcow2_coder *k = coder_take(c->q);
    int r;

    if (!k)
        return -ENOMEM;
    r = fn(k, c);
    coder_put(c->q, k);
    return r;
}

static void decompress(void *arg)
{
    struct coding *c = arg;

    c->result = c->q->compression_type == QCOW2_COMPRESSION_ZSTD ? with_coder(c, unzstd_with)
                                                                 : inflate_all(c);
}

/* Several clusters, one after the other. */
struct group {
    struct coding codings[GROUP_MAX];
    unsigned count;
};

static void compress_group(void *arg)
{
    struct group *g = arg;

    for (unsigned i = 0; i < g->count; i++) {
        struct coding *c = &g->codings[i];

        c->result = c->q->compression_type == QCOW2_COMPRESSION_ZSTD ? with_coder(c, zstd_with)
                                                                     : deflate_all(c);
    }
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
    struct coding c = {.q = q, .out = plain->bytes, .out_len = (size_t)qcow2_cluster_size(q)};
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
    edge_co_announce(q->file, EVENT_READ_COMPRESSED, by);
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

static int co_fn read_compressed(struct qcow2 *q, struct request *req, uint64_t entry)
{
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

int qcow2_co_read_encoded(struct node *node, struct request *req, uint64_t entry)
{
    struct qcow2 *q = node_state(node);

    return entry & QCOW2_L2_COMPRESSED ? read_compressed(q, req, entry)
                                       : qcow2_crypt_read(q, req, entry);
}

/* ---- writing ---- */

/* Whole clusters, from byte `done` of the request on; what lies beyond the end of the disk is zeroes. */
static struct iobuf *gather_clusters(const struct qcow2 *q, const struct request *req,
                                     uint64_t done, uint64_t len)
{
    size_t size = (size_t)align_up(len, qcow2_cluster_size(q));
    struct iobuf *b = iobuf_new(size);

    if (b) {
        memset(b->data + len, 0, size - (size_t)len);
        request_gather(req, done, b->data, (size_t)len);
    }
    return b;
}

/* The data is written, then the mapping is published (WRITE-2). */
static int co_fn store(struct qcow2 *q, const struct request *req, uint64_t cluster,
                       struct iobuf *b, size_t at, size_t len)
{
    unsigned bits = (unsigned)QCOW2_COMPRESSED_OFFSET_BITS(q->cluster_bits);
    struct overlap_range range;
    struct qcow2_slice *s = NULL;
    uint64_t sectors;
    uint64_t host;
    int r =
        overlap_begin(&q->ranges, &range, cluster << q->cluster_bits, qcow2_cluster_size(q), true);

    if (r < 0)
        return r;
    r = qcow2_slice_pin(q, req, cluster, true, &s);
    if (r == 0)
        r = qcow2_alloc_packed(q, req, len, &host);
    edge_co_announce(q->file, EVENT_WRITE_COMPRESSED, req);
    if (r == 0)
        r = qcow2_write_meta(q, req, host, b, at, len);
    if (r == 0) {
        sectors = (host + len - 1) / QCOW2_COMPRESSED_SECTOR - host / QCOW2_COMPRESSED_SECTOR;
        r = qcow2_replace(q, s, cluster,
                          (struct qcow2_l2){QCOW2_L2_COMPRESSED | sectors << bits | host, 0});
    }
    if (s)
        qcow2_slice_unpin(q, s);
    overlap_end(&q->ranges, &range);
    return r;
}

/* What of a group does not become smaller is written as it is, in runs. The first cluster is at byte `done` of the request. */
static int co_fn store_group(struct qcow2 *q, const struct request *req, uint64_t done,
                             uint64_t len, const struct group *g, struct iobuf *out)
{
    uint64_t size = qcow2_cluster_size(q);
    unsigned end;
    int r = 0;

    for (unsigned i = 0; r == 0 && i < g->count; i = end) {
        end = i + 1;
        r = g->codings[i].result;
        if (r == 0)
            r = store(q, req, ((req->offset + done) >> q->cluster_bits) + i, out, i * (size_t)size,
                      g->codings[i].out_len);
        if (r != 1)
            continue;
        while (end < g->count && g->codings[end].result == 1)
            end++;
        r = qcow2_write_plain(q, req, done + i * size, done + MIN(end * size, len));
    }
    return r;
}

static int co_fn write_group(struct qcow2 *q, const struct request *req, uint64_t done,
                             uint64_t len)
{
    size_t size = (size_t)qcow2_cluster_size(q);
    struct iobuf *in = gather_clusters(q, req, done, len);
    struct iobuf *out = iobuf_new((size_t)align_up(len, size));
    struct group g = {.count = (unsigned)((len + size - 1) >> q->cluster_bits)};
    int r = in && out ? 0 : -ENOMEM;

    for (unsigned i = 0; r == 0 && i < g.count; i++)
        g.codings[i] = (struct coding){
            .q = q,
            .in = in->data + i * size,
            .in_len = size,
            .out = out->data + i * size,
            .out_len = size - size / 32, /* else it saves nothing worth the time */
        };
    if (r == 0)
        r = loop_co_compute(compress_group, &g);
    if (r == 0)
        r = store_group(q, req, done, len, &g, out);
    iobuf_unref(out);
    iobuf_unref(in);
    return r;
}

/* Whole clusters, or to the end of the disk. */
static bool is_whole(const struct qcow2 *q, const struct request *req)
{
    uint64_t mask = qcow2_cluster_size(q) - 1;
    uint64_t end = req->offset + req->len;

    return !(req->offset & mask) && (!(end & mask) || end == node_size(q->node));
}

int qcow2_write_compressed(struct qcow2 *q, struct request *req)
{
    uint64_t cluster = qcow2_cluster_size(q);
    uint64_t bytes =
        q->compression_type == QCOW2_COMPRESSION_ZSTD ? GROUP_BYTES_ZSTD : GROUP_BYTES_ZLIB;
    uint64_t group = MIN(MAX(bytes, cluster), GROUP_MAX * cluster);
    int r = 0;

    if (!is_whole(q, req))
        return -EINVAL;
    for (uint64_t done = 0; r == 0 && done < req->len; done += group)
        r = write_group(q, req, done, MIN(req->len - done, group));
    if (r == 0)
        qcow2_flush_if_full(q, req);
    return r;
}
