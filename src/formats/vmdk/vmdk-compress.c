/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Compressed grains: the first sector of the disk that it holds (8 bytes), how many bytes follow (4), and these, as zlib makes
 * them. A grain is read as a whole, on a worker thread; the last one is kept for the next read.
 */
#include "base/alloc.h"
#include "base/checked.h"
#include "base/endian.h"
#include "formats/inflate.h"
#include "formats/vmdk/vmdk-internal.h"
#include "loop/compute.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>

#define GRAIN_HEADER_LEN 12

struct inflating {
    const uint8_t *in;
    size_t in_len;
    uint8_t *out;
    size_t out_len;
    int64_t result;
};

static void inflate_grain(void *arg)
{
    struct inflating *i = arg;

    i->result = inflate_some(INFLATE_ZLIB, i->in, i->in_len, i->out, i->out_len);
}

static void put_locked(struct vmdk_grain *g)
{
    if (g && !--g->refs)
        free(g);
}

static void grain_put(struct vmdk *v, struct vmdk_grain *g)
{
    tiny_lock_acquire(&v->import.lock);
    put_locked(g);
    tiny_lock_release(&v->import.lock);
}

static struct vmdk_grain *grain_find(struct vmdk *v, uint64_t offset)
{
    struct vmdk_grain *g = NULL;

    tiny_lock_acquire(&v->import.lock);
    if (v->grain && v->grain->offset == offset) {
        g = v->grain;
        g->refs++;
    }
    tiny_lock_release(&v->import.lock);
    return g;
}

static void grain_keep(struct vmdk *v, struct vmdk_grain *g)
{
    tiny_lock_acquire(&v->import.lock);
    put_locked(v->grain);
    v->grain = g;
    g->refs++;
    tiny_lock_release(&v->import.lock);
}

void vmdk_grain_release(struct vmdk *v)
{
    put_locked(v->grain);
    v->grain = NULL;
}

/* What stands before the compressed bytes: does it belong there, and can they be that long? */
static int check_header(struct vmdk *v, const struct vmdk_extent *e, const uint8_t *h,
                        uint64_t grain, uint64_t host_offset)
{
    uint64_t sector = load_le64(h);
    uint64_t len = load_le32(h + 8);

    if (e->first_sector_known && sector != grain / VMDK_SECTOR)
        return import_damaged(&v->import,
                              "the compressed grain at %" PRIu64 " is that of sector %" PRIu64
                              ", and not of %" PRIu64,
                              host_offset, sector, grain / VMDK_SECTOR);
    if (!len || len > (uint64_t)2 << e->grain_bits ||
        !range_within(host_offset + GRAIN_HEADER_LEN, len, e->file_size)) /* IMPORT-2 */
        return import_damaged(&v->import,
                              "the compressed grain at %" PRIu64 " has %" PRIu64 " bytes",
                              host_offset, len);
    return 0;
}

/* `g` gets the grain of an extent's place `grain`. */
static int co_fn read_grain(struct vmdk *v, const struct vmdk_extent *e, const struct request *by,
                            uint64_t grain, uint64_t host_offset, struct vmdk_grain *g)
{
    size_t size = (size_t)1 << e->grain_bits;
    struct inflating work = {.out = g->bytes, .out_len = size};
    AUTO(free_ptr) uint8_t *in = NULL;
    uint8_t h[GRAIN_HEADER_LEN];
    int r = import_co_read(&v->import, by, e->file, host_offset, h, sizeof(h));

    if (r == 0)
        r = check_header(v, e, h, grain, host_offset);
    if (r < 0)
        return r;
    work.in_len = load_le32(h + 8);
    work.in = in = try_new_n(uint8_t, work.in_len);
    if (!in)
        return -ENOMEM;
    r = import_co_read(&v->import, by, e->file, host_offset + sizeof(h), in, work.in_len);
    if (r == 0)
        r = loop_co_compute(inflate_grain, &work);
    if (r < 0 || work.result == -ENOMEM)
        return r < 0 ? r : -ENOMEM;
    if (work.result < (int64_t)MIN((uint64_t)size, e->len - grain))
        return import_damaged(&v->import,
                              "the compressed grain at %" PRIu64 " does not decompress to a grain",
                              host_offset);
    return 0;
}

int vmdk_co_read_encoded(struct node *node, struct request *req, uint64_t host_offset)
{
    struct vmdk *v = node_state(node);
    const struct vmdk_extent *e = vmdk_extent_at(v, req->offset);
    size_t size = (size_t)1 << e->grain_bits;
    uint64_t grain = align_down(req->offset - e->start, size);
    struct vmdk_grain *g = grain_find(v, e->start + grain);
    int r = 0;

    if (!g) {
        g = try_alloc(1, sizeof(*g) + size);
        if (!g)
            return -ENOMEM;
        g->refs = 1;
        g->offset = e->start + grain;
        r = read_grain(v, e, req, grain, host_offset, g);
        if (r == 0)
            grain_keep(v, g);
    }
    if (r == 0)
        request_scatter(req, 0, g->bytes + (req->offset - g->offset), (size_t)req->len);
    grain_put(v, g);
    return r;
}
