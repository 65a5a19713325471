/* SPDX-License-Identifier: Apache-2.0 */
/* What a guest reads of a chain of images, for the judge. */
#include "base/endian.h"
#include "qcow2-see.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include <zlib.h>
#include <zstd.h>

/* What is mapped as a whole. */
static uint64_t unit_of(const struct see_header *h)
{
    return ((uint64_t)1 << h->cluster_bits) / (h->l2_entry == 16 ? 32 : 1);
}

/* What the L2 table says of a guest offset, and with subclusters of these; 0 if there is none. */
static int find_entry(const struct qcow2_file *f, const struct see_header *h, uint64_t offset,
                      uint64_t *ret, uint64_t *ret_bits)
{
    uint64_t n = offset >> h->cluster_bits;
    uint64_t entries = see_table_entries(h);
    uint64_t at;
    int r;

    *ret = *ret_bits = 0;
    if (n / entries >= h->l1_entries)
        return 0;
    r = see_entry(f, h->l1_offset + n / entries * 8, ret);
    if (r < 0 || !(*ret & L1_OFFSET)) {
        *ret = 0;
        return r;
    }
    at = (*ret & L1_OFFSET) + n % entries * h->l2_entry;
    r = see_entry(f, at, ret);
    return r < 0 || h->l2_entry == 8 ? r : see_entry(f, at + 8, ret_bits);
}

static bool inflates(const uint8_t *in, size_t in_len, uint8_t *out, size_t out_len)
{
    z_stream z = {.next_in = (uint8_t *)(uintptr_t)in, .avail_in = (uInt)in_len};

    z.next_out = out;
    z.avail_out = (uInt)out_len;
    if (inflateInit2(&z, -12) != Z_OK)
        return false;
    (void)inflate(&z, Z_SYNC_FLUSH);
    (void)inflateEnd(&z);
    return z.avail_out == 0;
}

/* Behind the frame there may be anything. */
static bool unpacks(const uint8_t *in, size_t in_len, uint8_t *out, size_t out_len)
{
    size_t n = ZSTD_findFrameCompressedSize(in, in_len);

    return !ZSTD_isError(n) && ZSTD_decompress(out, out_len, in, n) == out_len;
}

/* A whole cluster into `out`. */
static int read_compressed(const struct qcow2_file *f, const struct see_header *h, uint64_t entry,
                           uint8_t *out)
{
    size_t cluster = (size_t)1 << h->cluster_bits;
    uint64_t offset, len;
    uint8_t *in;
    bool fine;
    int r;

    see_compressed(h->cluster_bits, entry, &offset, &len);
    in = malloc((size_t)len);
    if (!in)
        return -ENOMEM;
    r = see_bytes(f, offset, in, (size_t)len);
    fine = r == 0 && (h->method == METHOD_ZSTD ? unpacks : inflates)(in, (size_t)len, out, cluster);
    free(in);
    return r < 0 ? r : fine ? 0 : -EIO;
}

/* Does it have data there? It may say that there are zeroes. */
static bool has_data(const struct see_header *h, uint64_t entry, uint64_t bits, unsigned sub,
                     bool *ret_zero)
{
    *ret_zero = h->l2_entry == 16 ? bits >> 32 >> sub & 1 : h->version > 2 && (entry & FLAG_ZERO);
    if (*ret_zero || (h->l2_entry == 16 && !(bits >> sub & 1)))
        return false;
    return entry & L1_OFFSET || (see_has_data_file(h) && entry & FLAG_COPIED);
}

/* A piece of one subcluster, if it lies in this layer; else 1. The buffer has zeroes. */
static int read_layer(const struct qcow2_layer *layer, const struct see_header *h, uint64_t offset,
                      void *buf, size_t len)
{
    const struct qcow2_file *f = &layer->file;
    uint64_t cluster = (uint64_t)1 << h->cluster_bits;
    uint64_t in_cluster = offset % cluster;
    uint8_t *plain;
    uint64_t entry, bits;
    bool zero;
    int r = find_entry(f, h, offset, &entry, &bits);

    if (r < 0)
        return r;
    if (!(entry & L2_COMPRESSED)) {
        if (!has_data(h, entry, bits, (unsigned)(in_cluster / (cluster / 32)), &zero))
            return zero ? 0 : 1;
        return see_bytes(see_has_data_file(h) ? &layer->data : f, (entry & L1_OFFSET) + in_cluster,
                         buf, len);
    }
    plain = malloc((size_t)1 << h->cluster_bits);
    if (!plain)
        return -ENOMEM;
    r = read_compressed(f, h, entry, plain);
    if (r == 0)
        memcpy(buf, plain + in_cluster, len);
    free(plain);
    return r;
}

static int read_piece(const struct qcow2_layer *layers, const struct see_header *headers,
                      unsigned count, uint64_t offset, void *buf, size_t len)
{
    memset(buf, 0, len);
    for (unsigned i = 0; i < count; i++) {
        const struct qcow2_file *f = &layers[i].file;
        uint64_t size = layers[i].raw ? f->size : headers[i].size;
        int r;

        if (offset >= size)
            return 0;
        if (len > size - offset)
            len = (size_t)(size - offset); /* the rest is zero, whatever lies below */
        if (layers[i].raw)
            return see_bytes(f, offset, buf, len);
        r = read_layer(&layers[i], &headers[i], offset, buf, len);
        if (r <= 0)
            return r;
    }
    return 0;
}

/* The header as it was then. */
static int use_snapshot(const struct qcow2_layer *layer, struct see_header *h)
{
    struct see_snapshot e;
    int r = see_snapshot(&layer->file, h, layer->snapshot, &e);

    if (r < 0)
        return r;
    h->l1_offset = e.l1_offset;
    h->l1_entries = e.l1_entries;
    if (e.disk_size != NO_SIZE)
        h->size = e.disk_size;
    return 0;
}

int qcow2_read_guest(const struct qcow2_layer *layers, unsigned count, uint64_t offset, void *buf,
                     size_t len)
{
    struct see_header *headers = calloc(count, sizeof(*headers));
    struct qcow2_verdict ignored;
    uint64_t step = (uint64_t)1 << 21;
    int r = headers ? 0 : -ENOMEM;

    for (unsigned i = 0; i < count && r == 0; i++) {
        memset(&ignored, 0, sizeof(ignored));
        if (layers[i].raw)
            continue;
        r = see_header(&layers[i].file, &headers[i], &ignored);
        if (r == 0 && layers[i].snapshot)
            r = use_snapshot(&layers[i], &headers[i]);
        if (r == 0 && see_has_data_file(&headers[i]) && !layers[i].data.read)
            r = -EINVAL;
        if (r == 0 && headers[i].encrypted)
            r = -EOPNOTSUPP;
        if (r == 0 && step > unit_of(&headers[i]))
            step = unit_of(&headers[i]);
    }
    if (r == 0 &&
        (count == 0 || offset + len > (layers[0].raw ? layers[0].file.size : headers[0].size)))
        r = -ERANGE;
    while (len && r == 0) {
        size_t n = (size_t)(step - offset % step);

        if (n > len)
            n = len;
        r = read_piece(layers, headers, count, offset, buf, n);
        offset += n;
        buf = (char *)buf + n;
        len -= n;
    }
    free(headers);
    return r;
}
