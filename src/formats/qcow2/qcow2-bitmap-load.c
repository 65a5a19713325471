/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Reading the bitmaps of an image that is being opened. Hostile input (P6): what all of them together make us read is bounded, and
 * what makes no sense is told in one line of the log, and costs no more than the bitmap, or all of them.
 */
#include "base/alloc.h"
#include "base/checked.h"
#include "base/endian.h"
#include "base/log.h"
#include "base/macros.h"
#include "bitmaps/dirty-bitmap.h"
#include "formats/qcow2/qcow2-bitmap.h"
#include "loop/co.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#define TABLE_PIECE ((size_t)64 << 10)
#define DATA_PIECE  ((size_t)256 << 10)
/* Of a bitmap that says of its granularity nothing that makes sense. */
#define ANY_GRANULARITY (64 * KIB)

struct loading {
    struct qcow2 *q;
    const struct request *by;
    struct iobuf *table; /* TABLE_PIECE */
    struct iobuf *data;  /* DATA_PIECE, or a cluster */
    uint64_t table_bytes;
    uint64_t data_bytes;
    unsigned problems;
};

/* Entries of a bitmap's table, one after the other, whose clusters follow each other. */
struct data_run {
    struct bitmap *bits;
    uint64_t first; /* entry */
    uint64_t count;
    uint64_t offset; /* in the file */
};

/* ---- the directory ---- */

static int by_name(const void *a, const void *b)
{
    const struct qcow2_bitmap_entry *x = *(const struct qcow2_bitmap_entry *const *)a;
    const struct qcow2_bitmap_entry *y = *(const struct qcow2_bitmap_entry *const *)b;
    int order = memcmp(x->name, y->name, (size_t)MIN(x->name_len, y->name_len));

    return order ? order : (int)x->name_len - (int)y->name_len;
}

static int check_names(const struct qcow2_bitmap_entry *v, uint32_t count, const char **ret_problem)
{
    const struct qcow2_bitmap_entry **sorted = try_new_n(const struct qcow2_bitmap_entry *, count);

    if (!sorted)
        return -ENOMEM;
    for (uint32_t i = 0; i < count; i++)
        sorted[i] = &v[i];
    qsort(sorted, count, sizeof(struct qcow2_bitmap_entry *), by_name);
    for (uint32_t i = 1; i < count; i++) {
        if (by_name(&sorted[i - 1], &sorted[i]) == 0)
            *ret_problem = "two bitmaps have the same name";
    }
    free(sorted);
    return *ret_problem ? -EBADMSG : 0;
}

static int read_entries(struct qcow2_bitmap_entry *v, uint32_t count, const uint8_t *directory,
                        size_t len, const char **ret_problem)
{
    size_t at = 0;

    for (uint32_t i = 0; i < count && !*ret_problem; i++)
        *ret_problem = qcow2_bitmap_entry_next(directory, len, &at, &v[i]);
    if (!*ret_problem && at != len)
        *ret_problem = "the directory has more than the header says";
    return *ret_problem ? -EBADMSG : check_names(v, count, ret_problem);
}

int qcow2_bitmap_entries(const uint8_t *directory, size_t len, uint32_t count,
                         struct qcow2_bitmap_entry **ret, const char **ret_problem)
{
    int r;

    *ret_problem = NULL;
    *ret = try_new_n(struct qcow2_bitmap_entry, count);
    if (!*ret)
        return -ENOMEM;
    r = read_entries(*ret, count, directory, len, ret_problem);
    if (r < 0)
        free(take(ret));
    return r;
}

/* In pieces: it may be longer than a buffer. */
static int co_fn read_directory(struct loading *l, uint64_t offset, uint8_t *ret, size_t len)
{
    int r = 0;

    for (size_t at = 0; r == 0 && at < len; at += TABLE_PIECE) {
        size_t n = MIN(len - at, TABLE_PIECE);

        r = qcow2_read_meta(l->q, l->by, offset + at, l->table, 0, n);
        memcpy(ret + at, l->table->data, n);
    }
    return r;
}

/* ---- bits ---- */

static int co_fn read_run(struct loading *l, struct data_run *run)
{
    size_t len = (size_t)(run->count << l->q->cluster_bits);
    int r;

    if (!len)
        return 0;
    r = qcow2_read_meta(l->q, l->by, run->offset, l->data, 0, len);
    if (r == 0)
        bitmap_write(run->bits, run->first << (l->q->cluster_bits + 3), l->data->data, len);
    run->count = 0;
    co_yield ();
    return r;
}

static int co_fn take_entry(struct loading *l, struct data_run *run, uint64_t index, uint64_t entry)
{
    unsigned bits = l->q->cluster_bits;
    uint64_t offset = entry & QCOW2_OFFSET_MASK;
    uint64_t covers = bitmap_granularity(run->bits) << (bits + 3);
    int r = 0;

    if (!offset) {
        if (entry & QCOW2_BITMAP_TABLE_ONES)
            bitmap_set(run->bits, index * covers, covers);
        return 0;
    }
    if (run->count &&
        (index != run->first + run->count || offset != run->offset + (run->count << bits) ||
         (run->count + 1) << bits > MAX((uint64_t)DATA_PIECE, (uint64_t)1 << bits)))
        r = read_run(l, run);
    if (!run->count) {
        run->first = index;
        run->offset = offset;
    }
    run->count++;
    return r;
}

/* 0 and a problem, or 0 and the bits, or a negative errno. */
static int co_fn load_bits(struct loading *l, const struct qcow2_bitmap_entry *e,
                           struct bitmap *bits, const char **ret_problem)
{
    uint64_t file_size = node_size(edge_node(l->q->file));
    uint64_t len = (uint64_t)e->table_size * QCOW2_ENTRY_LEN;
    struct data_run run = {.bits = bits};
    int r = 0;

    l->table_bytes += len;
    if (l->table_bytes > QCOW2_BITMAP_TABLES_MAX)
        *ret_problem = "the tables of all bitmaps together are too large";
    for (uint64_t at = 0; r == 0 && !*ret_problem && at < len; at += TABLE_PIECE) {
        size_t n = (size_t)MIN(len - at, (uint64_t)TABLE_PIECE);

        r = qcow2_read_meta(l->q, l->by, e->table_offset + at, l->table, 0, n);
        for (size_t i = 0; r == 0 && !*ret_problem && i < n; i += QCOW2_ENTRY_LEN) {
            uint64_t entry = load_be64(l->table->data + i);

            *ret_problem = qcow2_bitmap_table_problem(entry, l->q->cluster_bits, file_size);
            if (entry & QCOW2_OFFSET_MASK)
                l->data_bytes += qcow2_cluster_size(l->q);
            if (l->data_bytes > QCOW2_BITMAP_DATA_MAX)
                *ret_problem = "all bitmaps together have too many bits";
            if (!*ret_problem)
                r = take_entry(l, &run, (at + i) / QCOW2_ENTRY_LEN, entry);
        }
    }
    return r == 0 && !*ret_problem ? read_run(l, &run) : r;
}

/* One line for all of them. */
static void tell_problem(struct loading *l, const char *name, const char *problem)
{
    if (!l->problems++)
        log_warning(
            "node '%s': bitmap '%s' of the image cannot be used: %s; it is inconsistent, as "
            "are others of which this is true; they can be removed, or all be dropped by "
            "cairn check -r all",
            node_name(l->q->node), name, problem);
}

static int co_fn control_fn load_entry(struct loading *l, const struct qcow2_bitmap_entry *e)
{
    struct node *node = l->q->node;
    const char *problem = qcow2_bitmap_entry_problem(e, node_size(node), l->q->cluster_bits,
                                                     node_size(edge_node(l->q->file)));
    uint64_t granularity = ANY_GRANULARITY;
    bool in_use = e->flags & QCOW2_BITMAP_IN_USE;
    char name[QCOW2_BITMAP_NAME_MAX + 1] = "";
    struct dirty_bitmap_loaded how = {
        .name = name,
        .enabled = e->flags & QCOW2_BITMAP_AUTO,
        .read_only = !l->q->writable,
    };
    struct bitmap *bits;
    int r = 0;

    memcpy(name, e->name, e->name_len);
    if (e->granularity_bits < 64 && (uint64_t)1 << e->granularity_bits >= BITMAP_GRANULARITY_MIN &&
        (uint64_t)1 << e->granularity_bits <= BITMAP_GRANULARITY_MAX)
        granularity = (uint64_t)1 << e->granularity_bits;
    bits = bitmap_new(node_size(node), granularity);
    if (!bits)
        return -ENOMEM;
    if (!in_use && !problem)
        r = load_bits(l, e, bits, &problem);
    if (r == -EIO) {
        problem = "it cannot be read";
        r = 0;
    }
    if (r < 0) {
        bitmap_free(bits);
        return r;
    }
    if (problem) {
        bitmap_clear(bits);
        tell_problem(l, name, problem);
    }
    how.inconsistent = in_use || problem;
    return dirty_bitmap_load(node, &how, bits);
}

/* ---- marking them ---- */

static int co_fn write_directory(struct loading *l, const struct qcow2_bitmaps *b)
{
    int r = 0;

    for (size_t at = 0; r == 0 && at < b->len; at += TABLE_PIECE) {
        size_t n = MIN(b->len - at, TABLE_PIECE);

        memcpy(l->table->data, b->directory + at, n);
        r = qcow2_guard_write(l->q, l->by, QCOW2_GUARD_BITMAP_DIRECTORY, b->offset + at, n);
        if (r == 0)
            r = qcow2_write_meta(l->q, l->by, b->offset + at, l->table, 0, n);
    }
    return r < 0 ? r : qcow2_sync(l->q, l->by);
}

int qcow2_bitmaps_co_mark(struct qcow2 *q, const struct request *by, struct error **err)
{
    struct loading l = {.q = q, .by = by};
    int r;

    if (!q->bitmaps->directory || !qcow2_bitmap_set_in_use(q->bitmaps->directory, q->bitmaps->len))
        return 0;
    l.table = iobuf_new(TABLE_PIECE);
    r = l.table ? write_directory(&l, q->bitmaps) : -ENOMEM;
    iobuf_unref(l.table);
    return r < 0
               ? error_set(err, -r, "node '%s': cannot mark the bitmaps of the image as in use: %s",
                           node_name(q->node), strerror(-r))
               : 0;
}

/* ---- all of it ---- */

static int co_fn control_fn load_entries(struct loading *l, const struct qcow2_bitmap_entry *v)
{
    int r = 0;

    for (uint32_t i = 0; r == 0 && i < l->q->bitmaps->count; i++)
        r = load_entry(l, &v[i]);
    return r;
}

/* All of them are lost. */
static void drop_all(struct loading *l, const char *problem)
{
    log_warning("node '%s': the bitmaps of the image cannot be used: %s; %s", node_name(l->q->node),
                problem, l->q->writable ? "they are dropped" : "ignoring them");
    free(take(&l->q->bitmaps->directory));
}

static int co_fn control_fn load_directory(struct loading *l, const struct qcow2_header *header)
{
    struct qcow2_bitmaps *b = l->q->bitmaps;
    struct qcow2_bitmap_entry *v;
    const char *problem;
    int r;

    b->len = (size_t)header->bitmap_directory_size;
    b->count = header->bitmap_count;
    b->offset = header->bitmap_directory_offset;
    b->directory = try_alloc(1, b->len);
    if (!b->directory)
        return -ENOMEM;
    r = read_directory(l, b->offset, b->directory, b->len);
    if (r == -EIO) {
        drop_all(l, "their directory cannot be read");
        return 0;
    }
    if (r < 0)
        return r;
    r = qcow2_bitmap_entries(b->directory, b->len, b->count, &v, &problem);
    if (r == -EBADMSG) {
        drop_all(l, problem);
        return 0;
    }
    if (r == 0)
        r = load_entries(l, v);
    free(v);
    return r;
}

int qcow2_bitmaps_co_load(struct qcow2 *q, const struct request *by,
                          const struct qcow2_header *header, struct error **err)
{
    struct loading l = {.q = q, .by = by};
    int r = 0;

    q->bitmaps = try_new(struct qcow2_bitmaps);
    if (!q->bitmaps)
        return error_set(err, ENOMEM, "node '%s': no memory", node_name(q->node));
    list_init(&q->bitmaps->removals);
    if (header->bitmaps_problem)
        drop_all(&l, header->bitmaps_problem);
    if (!header->has_bitmaps)
        return 0;
    l.table = iobuf_new(TABLE_PIECE);
    l.data = iobuf_new(MAX(DATA_PIECE, (size_t)qcow2_cluster_size(q)));
    r = l.table && l.data ? load_directory(&l, header) : -ENOMEM;
    iobuf_unref(l.table);
    iobuf_unref(l.data);
    return r < 0 ? error_set(err, -r, "node '%s': cannot load the bitmaps of the image: %s",
                             node_name(q->node), strerror(-r))
                 : 0;
}

uint64_t qcow2_bitmaps_autoclear_kept(const struct qcow2 *q)
{
    return q->bitmaps && q->bitmaps->directory ? QCOW2_AUTOCLEAR_BITMAPS : 0;
}
