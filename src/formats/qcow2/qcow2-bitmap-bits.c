/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Bits and tables of bitmaps on their way to the disk. Most of a bitmap is what it was when it was loaded: clusters of bits, and
 * tables, that have on the disk what they should have stay where they are (STORED-8). They are read to know that, rather than that somebody
 * notes what changes: reading takes no space, and an image may be damaged so that something else has written there.
 */
#include "base/alloc.h"
#include "base/checked.h"
#include "base/endian.h"
#include "base/macros.h"
#include "base/zeroes.h"
#include "bitmaps/bitmap.h"
#include "formats/qcow2/qcow2-bitmap.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* A flush takes no longer than so many bytes do: who waits for the image to be closed sees that it gets on (G7). */
#define SYNC_BYTES (4 * MIB)

/* Clusters that follow each other in the file. */
struct row {
    uint64_t offset;
    uint64_t first; /* entry of a table */
    uint64_t count;
};

/* One bitmap. */
struct table {
    struct qcow2_bitmap_writer *w;
    const struct bitmap *bits;
    uint32_t size; /* entries */
    struct iobuf *entries;
    struct row written; /* what of w->data is to be written */
    struct row read;    /* what w->was has */

    struct iobuf *old;             /* of the same size; NULL: there is none to compare with */
    struct qcow2_bitmap_space own; /* what the image has of it, where that can stay */
};

int qcow2_bitmap_writer_init(struct qcow2_bitmap_writer *w, struct qcow2 *q,
                             const struct request *by)
{
    size_t size = MAX(QCOW2_BITMAP_PIECE, (size_t)qcow2_cluster_size(q));

    *w = (struct qcow2_bitmap_writer){.q = q, .by = by};
    w->data = iobuf_new(size);
    w->was = iobuf_new(size);
    return w->data && w->was ? 0 : -ENOMEM;
}

void qcow2_bitmap_writer_release(struct qcow2_bitmap_writer *w)
{
    qcow2_bitmap_space_release(&w->taken);
    qcow2_bitmap_space_release(&w->stays);
    qcow2_bitmap_space_release(&w->freed);
    free(take(&w->pool));
    iobuf_unref(take(&w->data));
    iobuf_unref(take(&w->was));
}

int qcow2_bitmap_take_row(struct qcow2_bitmap_writer *w, uint64_t bytes, struct qcow2_extent *ret)
{
    uint64_t count = align_up(bytes, qcow2_cluster_size(w->q)) >> w->q->cluster_bits;
    int r = count == 1 ? qcow2_alloc_get(w->q, w->by, 1, ret)
                       : qcow2_alloc_get_row(w->q, w->by, count, ret);

    if (r < 0)
        return r;
    r = qcow2_bitmap_space_add_range(&w->taken, w->q, ret->host_offset, bytes);
    if (r < 0)
        qcow2_alloc_put(w->q, ret->host_offset, ret->count);
    return r;
}

int qcow2_bitmap_write_bytes(struct qcow2_bitmap_writer *w, uint64_t offset, struct iobuf *b,
                             size_t from, size_t len)
{
    int r = qcow2_write_meta(w->q, w->by, offset, b, from, len);

    w->unsynced += len;
    if (r < 0 || w->unsynced < SYNC_BYTES)
        return r;
    w->unsynced = 0;
    return qcow2_sync(w->q, w->by);
}

/* ---- what may stay ---- */

static int by_place(const void *a, const void *b)
{
    const struct qcow2_place *x = a;
    const struct qcow2_place *y = b;

    return x->first < y->first ? -1 : x->first > y->first;
}

/* In a damaged image the pool may have what a bitmap has, too. It is looked at once: it gets no more. */
static int co_fn know_pool(struct qcow2_bitmap_writer *w)
{
    size_t kept = 0;
    int r;

    if (w->pool)
        return 0;
    r = co_mutex_lock_until(&w->q->alloc.lock, LOOP_FOREVER);
    if (r < 0)
        return r;
    r = qcow2_online_loose(w->q, &w->pool, &w->pool_count);
    co_mutex_unlock(&w->q->alloc.lock);
    if (r < 0)
        return r;
    qsort(w->pool, w->pool_count, sizeof(*w->pool), by_place);
    for (size_t i = 0; i < w->pool_count; i++) {
        struct qcow2_place *last = kept ? &w->pool[kept - 1] : NULL;
        uint64_t end = w->pool[i].first + w->pool[i].count;

        if (last && w->pool[i].first <= last->first + last->count)
            last->count = MAX(last->first + last->count, end) - last->first;
        else
            w->pool[kept++] = w->pool[i];
    }
    w->pool_count = kept;
    return 0;
}

static int by_inside(const void *key, const void *element)
{
    uint64_t cluster = *(const uint64_t *)key;
    const struct qcow2_place *p = element;

    return cluster < p->first ? -1 : cluster - p->first >= p->count;
}

/* Does this cluster belong to the bitmap, and to nobody else? */
static bool is_own(const struct table *t, uint64_t offset)
{
    uint64_t cluster = offset >> t->w->q->cluster_bits;

    return qcow2_bitmap_space_has(&t->own, cluster) &&
           !bsearch(&cluster, t->w->pool, t->w->pool_count, sizeof(*t->w->pool), by_inside);
}

/* What the image has of it. */
static int co_fn load_old(struct table *t, const struct qcow2_bitmap_entry *old)
{
    struct qcow2_bitmap_writer *w = t->w;
    int r = know_pool(w);

    if (r == 0)
        r = qcow2_bitmap_space_add(&t->own, w->q, w->by, old, &t->old);
    if (r == 0)
        r = qcow2_bitmap_space_settle(&t->own, w->q, w->by);
    if (r == 0)
        r = qcow2_bitmap_space_add_all(&w->freed, &t->own);
    if (t->old && (old->table_size != t->size ||
                   (uint64_t)1 << old->granularity_bits != bitmap_granularity(t->bits)))
        iobuf_unref(take(&t->old));
    return r;
}

static uint64_t old_offset(const struct table *t, uint64_t index)
{
    return load_be64(t->old->data + index * QCOW2_ENTRY_LEN) & QCOW2_OFFSET_MASK;
}

/* The cluster of this entry, and those that follow it in table and file. */
static int co_fn read_old(struct table *t, uint64_t index)
{
    unsigned bits = t->w->q->cluster_bits;
    struct row row = {.offset = old_offset(t, index), .first = index, .count = 1};
    int r;

    while ((row.count + 1) << bits <= t->w->was->size && index + row.count < t->size &&
           old_offset(t, index + row.count) == row.offset + (row.count << bits))
        row.count++;
    t->read.count = 0;
    r = qcow2_read_meta(t->w->q, t->w->by, row.offset, t->w->was, 0, (size_t)(row.count << bits));
    if (r == 0)
        t->read = row;
    return r;
}

/* 1: this cluster of bits is on the disk; 0: not, or not where it could stay. */
static int co_fn is_there(struct table *t, uint64_t index, const uint8_t *bits)
{
    uint64_t offset = t->old ? old_offset(t, index) : 0;
    unsigned shift = t->w->q->cluster_bits;
    int r = 0;

    if (!offset || !is_own(t, offset))
        return 0;
    if (index - t->read.first >= t->read.count)
        r = read_old(t, index);
    if (r < 0 ||
        memcmp(t->w->was->data + ((index - t->read.first) << shift), bits, (size_t)1 << shift) != 0)
        return r == -EIO ? 0 : r;
    r = qcow2_bitmap_space_add_range(&t->w->stays, t->w->q, offset, (uint64_t)1 << shift);
    return r < 0 ? r : 1;
}

/* ---- bits ---- */

static int co_fn write_row(struct table *t)
{
    size_t len = (size_t)(t->written.count << t->w->q->cluster_bits);

    t->written.count = 0;
    return len ? qcow2_bitmap_write_bytes(t->w, t->written.offset, t->w->data, 0, len) : 0;
}

/* What is behind the row in w->data goes to a new cluster. */
static int co_fn append_cluster(struct table *t, uint64_t *ret_offset)
{
    struct qcow2_bitmap_writer *w = t->w;
    uint64_t len = t->written.count << w->q->cluster_bits;
    struct qcow2_extent at;
    int r = qcow2_bitmap_take_row(w, qcow2_cluster_size(w->q), &at);

    if (r == 0 && len && at.host_offset != t->written.offset + len) {
        r = write_row(t);
        memmove(w->data->data, w->data->data + len, (size_t)qcow2_cluster_size(w->q));
    }
    if (r < 0)
        return r;
    if (!t->written.count)
        t->written.offset = at.host_offset;
    t->written.count++;
    *ret_offset = at.host_offset;
    return 0;
}

/* A cluster of bits, which belongs to this entry. */
static int co_fn store_cluster(struct table *t, uint64_t index, uint64_t *ret_entry)
{
    unsigned bits = t->w->q->cluster_bits;
    uint8_t *data;
    int r = 0;

    if ((t->written.count + 1) << bits > t->w->data->size)
        r = write_row(t);
    if (r < 0)
        return r;
    data = t->w->data->data + (t->written.count << bits);
    bitmap_read(t->bits, index << (bits + 3), data, (size_t)1 << bits);
    r = is_there(t, index, data);
    if (r == 1)
        *ret_entry = old_offset(t, index);
    return r ? MIN(r, 0) : append_cluster(t, ret_entry);
}

/*
 * Fills a table of zeroes, and writes the bits that it points to. The cost follows what is dirty (P5). The last entry is never "all
 * ones" if it stands for more than the disk has: QEMU would set what lies beyond.
 */
static int co_fn store_bits(struct table *t)
{
    uint64_t covers = bitmap_granularity(t->bits) << (t->w->q->cluster_bits + 3);
    uint64_t size = bitmap_size(t->bits);
    uint8_t *entries = t->entries->data;
    uint64_t offset;
    uint64_t len;
    int r = 0;

    for (uint64_t at = 0; bitmap_next_dirty(t->bits, at, size, &offset, &len);) {
        uint64_t index = offset / covers;
        uint64_t end = offset + len;
        uint64_t entry = QCOW2_BITMAP_TABLE_ONES;

        at = (index + 1) * covers;
        if (offset > index * covers || end < at)
            r = store_cluster(t, index, &entry);
        if (r < 0)
            break;
        store_be64(entries + index * QCOW2_ENTRY_LEN, entry);
        for (; entry == QCOW2_BITMAP_TABLE_ONES && end - at >= covers; at += covers)
            store_be64(entries + at / covers * QCOW2_ENTRY_LEN, entry);
    }
    return r == 0 ? write_row(t) : r;
}

/* ---- the table ---- */

/* Where space reads as zeroes, what is zero is not written. */
static int co_fn write_table(struct table *t, const struct qcow2_extent *at)
{
    size_t len = (size_t)t->size * QCOW2_ENTRY_LEN;
    int r = 0;

    for (size_t from = 0; r == 0 && from < len; from += QCOW2_BITMAP_PIECE) {
        size_t n = MIN(len - from, QCOW2_BITMAP_PIECE);

        if (!at->fresh || !is_all_zeroes(t->entries->data + from, n))
            r = qcow2_bitmap_write_bytes(t->w, at->host_offset + from, t->entries, from, n);
    }
    return r;
}

static bool table_is_there(const struct table *t, uint64_t offset)
{
    size_t len = (size_t)t->size * QCOW2_ENTRY_LEN;

    if (!t->old || memcmp(t->old->data, t->entries->data, len) != 0)
        return false;
    for (size_t at = 0; at < len; at += qcow2_cluster_size(t->w->q)) {
        if (!is_own(t, offset + at))
            return false;
    }
    return true;
}

static int co_fn store_table(struct table *t, const struct qcow2_bitmap_entry *old,
                             struct qcow2_bitmap_entry *e)
{
    uint64_t len = (uint64_t)t->size * QCOW2_ENTRY_LEN;
    struct qcow2_extent at = {.count = 0};
    int r;

    if (old && table_is_there(t, old->table_offset)) {
        e->table_offset = old->table_offset;
        return qcow2_bitmap_space_add_range(&t->w->stays, t->w->q, old->table_offset, len);
    }
    r = qcow2_bitmap_take_row(t->w, len, &at);
    e->table_offset = at.host_offset;
    return r == 0 ? write_table(t, &at) : r;
}

int qcow2_bitmap_write(struct qcow2_bitmap_writer *w, const struct bitmap *bits,
                       const struct qcow2_bitmap_entry *old, struct qcow2_bitmap_entry *e)
{
    unsigned cluster_bits = w->q->cluster_bits;
    struct table t = {.w = w, .bits = bits};
    int r = 0;

    e->granularity_bits = (uint8_t)__builtin_ctzll(bitmap_granularity(bits));
    e->table_size = (uint32_t)MAX(
        qcow2_bitmap_table_entries(bitmap_size(bits), e->granularity_bits, cluster_bits),
        (uint64_t)1);
    if ((uint64_t)e->table_size << cluster_bits > QCOW2_BITMAP_BYTES_MAX)
        return -EFBIG; /* the disk has grown */
    t.size = e->table_size;
    t.entries = iobuf_new((size_t)t.size * QCOW2_ENTRY_LEN);
    if (!t.entries)
        return -ENOMEM;
    memset(t.entries->data, 0, (size_t)t.size * QCOW2_ENTRY_LEN);
    if (old)
        r = load_old(&t, old);
    if (r == 0)
        r = store_bits(&t);
    if (r == 0)
        r = store_table(&t, old, e);
    qcow2_bitmap_space_release(&t.own);
    iobuf_unref(t.old);
    iobuf_unref(t.entries);
    return r;
}
