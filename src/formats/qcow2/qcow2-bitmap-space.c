/* SPDX-License-Identifier: Apache-2.0 */
/* Which clusters of the file bitmaps use: for giving them back. What a damaged image says of them is not believed. */
#include "base/alloc.h"
#include "base/checked.h"
#include "base/endian.h"
#include "base/macros.h"
#include "formats/qcow2/qcow2-bitmap.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define TABLE_PIECE ((size_t)64 << 10)

static int add_cluster(struct qcow2_bitmap_space *s, uint64_t cluster)
{
    if (s->count == s->max) {
        size_t max = MAX(2 * s->max, (size_t)64);
        uint64_t *larger = realloc(s->v, max * sizeof(*larger));

        if (!larger)
            return -ENOMEM;
        s->v = larger;
        s->max = max;
    }
    s->v[s->count++] = cluster;
    return 0;
}

int qcow2_bitmap_space_add_range(struct qcow2_bitmap_space *s, const struct qcow2 *q,
                                 uint64_t offset, uint64_t len)
{
    uint64_t first = offset >> q->cluster_bits;
    uint64_t count = align_up(len, qcow2_cluster_size(q)) >> q->cluster_bits;
    int r = 0;

    for (uint64_t i = 0; r == 0 && i < count; i++)
        r = add_cluster(s, first + i);
    return r;
}

/*
 * Those that `n` entries of a table point to, and its own. -EBADMSG: one of them makes no sense, or points to other metadata.
 */
static int add_table(struct qcow2_bitmap_space *s, struct qcow2 *q,
                     const struct qcow2_bitmap_entry *e, const uint8_t *table)
{
    uint64_t file_size = node_size(edge_node(q->file));
    uint64_t len = (uint64_t)e->table_size * QCOW2_ENTRY_LEN;
    int r = 0;

    for (uint32_t i = 0; r == 0 && i < e->table_size; i++) {
        uint64_t entry = load_be64(table + (size_t)i * QCOW2_ENTRY_LEN);
        uint64_t cluster = (entry & QCOW2_OFFSET_MASK) >> q->cluster_bits;

        if (qcow2_bitmap_table_problem(entry, q->cluster_bits, file_size) ||
            (cluster && qcow2_guard_knows(q, cluster)))
            return -EBADMSG;
        if (cluster)
            r = add_cluster(s, cluster);
    }
    for (uint64_t at = 0; r == 0 && at < len; at += qcow2_cluster_size(q)) {
        if (qcow2_guard_knows(q, (e->table_offset + at) >> q->cluster_bits))
            return -EBADMSG;
    }
    return r == 0 ? qcow2_bitmap_space_add_range(s, q, e->table_offset, len) : r;
}

static int co_fn read_table(struct qcow2 *q, const struct request *by,
                            const struct qcow2_bitmap_entry *e, struct iobuf *table)
{
    size_t len = (size_t)e->table_size * QCOW2_ENTRY_LEN;
    int r = 0;

    for (size_t at = 0; r == 0 && at < len; at += TABLE_PIECE)
        r = qcow2_read_meta(q, by, e->table_offset + at, table, at, MIN(len - at, TABLE_PIECE));
    return r;
}

int qcow2_bitmap_space_add(struct qcow2_bitmap_space *s, struct qcow2 *q, const struct request *by,
                           const struct qcow2_bitmap_entry *e, struct iobuf **ret_table)
{
    size_t before = s->count;
    struct iobuf *table;
    int r;

    *ret_table = NULL;
    if (qcow2_bitmap_entry_problem(e, node_size(q->node), q->cluster_bits,
                                   node_size(edge_node(q->file))))
        return 0;
    table = iobuf_new((size_t)e->table_size * QCOW2_ENTRY_LEN);
    if (!table)
        return -ENOMEM;
    r = read_table(q, by, e, table);
    if (r == 0)
        r = add_table(s, q, e, table->data);
    if (r == 0) {
        *ret_table = table;
        return 0;
    }
    iobuf_unref(table);
    s->count = before;
    return r == -EBADMSG ? 0 : r;
}

int qcow2_bitmap_space_add_all(struct qcow2_bitmap_space *s, const struct qcow2_bitmap_space *more)
{
    int r = 0;

    for (size_t i = 0; r == 0 && i < more->count; i++)
        r = add_cluster(s, more->v[i]);
    return r;
}

static int by_number(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a;
    uint64_t y = *(const uint64_t *)b;

    return x < y ? -1 : x > y;
}

/* Numbers that are there more than once go. */
static void keep_single(struct qcow2_bitmap_space *s)
{
    size_t kept = 0;

    if (s->count)
        qsort(s->v, s->count, sizeof(*s->v), by_number);
    for (size_t i = 0; i < s->count;) {
        size_t k = i + 1;

        while (k < s->count && s->v[k] == s->v[i])
            k++;
        if (k == i + 1)
            s->v[kept++] = s->v[i];
        i = k;
    }
    s->count = kept;
}

int qcow2_bitmap_space_settle(struct qcow2_bitmap_space *s, struct qcow2 *q,
                              const struct request *by)
{
    size_t kept = 0;
    int r;

    keep_single(s);
    r = co_mutex_lock_until(&q->alloc.lock, LOOP_FOREVER);
    if (r < 0)
        return r;
    for (size_t i = 0; r == 0 && i < s->count; i++) {
        uint64_t least = 0;
        uint64_t most = 0;

        r = qcow2_count_range(q, by, s->v[i], 1, &least, &most);
        if (r == 0 && most == 1)
            s->v[kept++] = s->v[i];
    }
    co_mutex_unlock(&q->alloc.lock);
    s->count = kept;
    return r;
}

bool qcow2_bitmap_space_has(const struct qcow2_bitmap_space *s, uint64_t cluster)
{
    return s->count && bsearch(&cluster, s->v, s->count, sizeof(*s->v), by_number);
}

void qcow2_bitmap_space_subtract(struct qcow2_bitmap_space *s, struct qcow2_bitmap_space *other)
{
    size_t kept = 0;

    if (other->count)
        qsort(other->v, other->count, sizeof(*other->v), by_number);
    for (size_t i = 0; i < s->count; i++) {
        if (!qcow2_bitmap_space_has(other, s->v[i]))
            s->v[kept++] = s->v[i];
    }
    s->count = kept;
}

void qcow2_bitmap_space_give_back(struct qcow2_bitmap_space *s, struct qcow2 *q)
{
    for (size_t i = 0; i < s->count;) {
        size_t n = 1;

        while (i + n < s->count && s->v[i + n] == s->v[i] + n)
            n++;
        qcow2_alloc_put(q, s->v[i] << q->cluster_bits, n);
        i += n;
    }
    qcow2_bitmap_space_release(s);
}

void qcow2_bitmap_space_release(struct qcow2_bitmap_space *s)
{
    free(s->v);
    *s = (struct qcow2_bitmap_space){.v = NULL};
}
