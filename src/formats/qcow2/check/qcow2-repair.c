/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Refcounts become what the references say.
 *
 * REPAIR-1 In place a repair raises refcounts before anything new is pointed to, and lowers them after nothing points there any
 *          more; each refcount stands for itself, so that any mix of old and new sectors is as good as the old ones.
 * REPAIR-2 Where the structure itself is damaged, it is built anew beyond everything that is in use, made durable, and then the
 *          header points to it, by 12 bytes within one sector.
 */
#include "base/alloc.h"
#include "base/checked.h"
#include "base/endian.h"
#include "formats/qcow2/check/qcow2-check-internal.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#define SECTOR 512

uint64_t check_refcount_get(const struct check *x, const uint8_t *block, uint64_t i)
{
    unsigned order = x->h.refcount_order;

    switch (order) {
    case 3:
        return block[i];
    case 4:
        return load_be16(block + 2 * i);
    case 5:
        return load_be32(block + 4 * i);
    case 6:
        return load_be64(block + 8 * i);
    default:
        return (uint64_t)block[(i << order) / 8] >> ((i << order) % 8) &
               ((1U << (1U << order)) - 1);
    }
}

void check_refcount_set(const struct check *x, uint8_t *block, uint64_t i, uint64_t value)
{
    unsigned order = x->h.refcount_order;
    unsigned shift = (unsigned)(i << order) % 8;
    unsigned mask = order < 3 ? ((1U << (1U << order)) - 1) << shift : 0;
    uint8_t *byte = &block[(i << order) / 8];

    switch (order) {
    case 3:
        *byte = (uint8_t)value;
        break;
    case 4:
        store_be16(block + 2 * i, (uint16_t)value);
        break;
    case 5:
        store_be32(block + 4 * i, (uint32_t)value);
        break;
    case 6:
        store_be64(block + 8 * i, value);
        break;
    default:
        *byte = (uint8_t)((*byte & ~mask) | ((unsigned)value << shift & mask));
        break;
    }
}

static int cannot(struct error **err, int r, const char *what)
{
    return r < 0 ? error_set(err, -r, "cannot %s: %s", what, strerror(-r)) : 0;
}

/* ---- in place ---- */

/* Changes refcounts of clusters in rising order; a block is written when the next one begins. */
struct block_edit {
    struct check *x;
    struct iobuf *b;
    uint64_t index; /* of the block that is in b; UINT64_MAX: none */
    size_t from;    /* bytes of it that have changed */
    size_t to;
};

static int co_fn edit_end(struct block_edit *e)
{
    size_t from = (size_t)align_down(e->from, SECTOR);
    size_t to = (size_t)align_up(e->to, SECTOR);
    int r = 0;

    if (e->index != UINT64_MAX && to > from)
        r = check_write(e->x, e->x->table[e->index] + from, e->b, from, to - from);
    e->index = UINT64_MAX;
    return r;
}

static int co_fn edit_set(struct block_edit *e, uint64_t cluster, uint64_t value)
{
    struct check *x = e->x;
    uint64_t index = cluster / check_block_entries(x);
    uint64_t i = cluster % check_block_entries(x);
    size_t at = (size_t)((i << x->h.refcount_order) / 8);
    size_t len = MAX((size_t)1 << x->h.refcount_order, (size_t)8) / 8;
    int r;

    if (index != e->index) {
        r = edit_end(e);
        if (r == 0)
            r = check_read(x, x->table[index], e->b, (size_t)x->cluster);
        if (r < 0)
            return r;
        e->index = index;
        e->from = (size_t)x->cluster;
        e->to = 0;
    }
    check_refcount_set(x, e->b->data, i, value);
    e->from = MIN(e->from, at);
    e->to = MAX(e->to, at + len);
    return 0;
}

/* Is there a block for it that nothing else is in? */
static bool has_block(struct check *x, uint64_t cluster)
{
    uint64_t index = cluster / check_block_entries(x);

    return index < x->table_size && x->table[index] &&
           qcow2_count(&x->counts, QCOW2_USED, x->table[index] >> x->h.cluster_bits) == 1;
}

enum counts_change { COUNTS_RAISE, COUNTS_LOWER };

static int co_fn change_one(struct block_edit *e, struct qcow2_leaf *l, unsigned i,
                            enum counts_change how)
{
    uint64_t cluster = (l->index << QCOW2_LEAF_BITS) + i;
    uint64_t stored = qcow2_leaf_count(l, QCOW2_STORED, i);
    uint64_t used = MIN(qcow2_leaf_count(l, QCOW2_USED, i), check_refcount_max(e->x));

    if (how == COUNTS_RAISE ? stored >= used : stored <= used || !has_block(e->x, cluster))
        return 0;
    check_say(e->x, "Repairing cluster %" PRIu64 " refcount=%" PRIu64 " reference=%" PRIu64,
              cluster, stored, used);
    return edit_set(e, cluster, used);
}

static int co_fn change_counts(struct check *x, enum counts_change how)
{
    struct qcow2_leaf **v = qcow2_counts_sorted(&x->counts);
    struct block_edit e = {.x = x, .b = iobuf_new((size_t)x->cluster), .index = UINT64_MAX};
    int r = v && e.b ? 0 : -ENOMEM;

    for (size_t k = 0; r == 0 && k < x->counts.leaf_count; k++) {
        for (unsigned i = 0; i < QCOW2_LEAF && r == 0; i++)
            r = change_one(&e, v[k], i, how);
    }
    for (uint64_t i = 0; r == 0 && how == COUNTS_RAISE && i < x->spare_count; i++)
        r = edit_set(&e, x->spare + i, 1);
    if (r == 0)
        r = edit_end(&e);
    if (r == 0)
        r = check_flush(x);
    iobuf_unref(e.b);
    free(v);
    return r;
}

int check_raise_again(struct check *x)
{
    uint64_t spare = x->spare_count;
    int r;

    x->spare_count = 0; /* they are counted, and some of them more than once */
    r = change_counts(x, COUNTS_RAISE);
    x->spare_count = spare;
    return r;
}

int check_lower_refcounts(struct check *x, struct error **err)
{
    return cannot(err, change_counts(x, COUNTS_LOWER), "repair leaks");
}

/* ---- anew ---- */

struct rebuild {
    uint64_t *indices; /* of blocks that are needed, rising */
    uint64_t index_count;
    uint64_t table_clusters;
    uint64_t first; /* cluster: the spare ones, the blocks, the table */
    uint64_t spare;
    uint64_t end;
    bool new_width;
};

#define AT_WIDTH (QCOW2_OFFSET_REFCOUNT_ORDER - QCOW2_OFFSET_REFCOUNT_TABLE_OFFSET)

/* What is not there any more when the new one is in use. */
static void forget_old_structure(struct check *x)
{
    uint64_t first = x->h.refcount_table_offset >> x->h.cluster_bits;

    for (uint64_t i = 0; i < x->h.refcount_table_clusters; i++)
        qcow2_count_sub(&x->counts, QCOW2_USED, first + i, 1);
    for (uint64_t i = 0; i < x->table_size; i++) {
        if (x->table[i])
            qcow2_count_sub(&x->counts, QCOW2_USED, x->table[i] >> x->h.cluster_bits, 1);
    }
}

static int need_index(struct rebuild *b, uint64_t index, uint64_t *max)
{
    if (b->index_count && b->indices[b->index_count - 1] == index)
        return 0;
    if (b->index_count == *max) {
        uint64_t *v;

        *max = MAX(*max * 2, (uint64_t)64);
        v = realloc(b->indices, (size_t)*max * sizeof(*v));
        if (!v)
            return -ENOMEM;
        b->indices = v;
    }
    b->indices[b->index_count++] = index;
    return 0;
}

/* The blocks for what is in use. */
static int indices_in_use(struct check *x, struct rebuild *b, uint64_t *max)
{
    struct qcow2_leaf **v = qcow2_counts_sorted(&x->counts);
    int r = v ? 0 : -ENOMEM;

    for (size_t k = 0; r == 0 && k < x->counts.leaf_count; k++) {
        for (unsigned i = 0; i < QCOW2_LEAF && r == 0; i++) {
            if (qcow2_leaf_count(v[k], QCOW2_USED, i))
                r = need_index(b, ((v[k]->index << QCOW2_LEAF_BITS) + i) / check_block_entries(x),
                               max);
        }
    }
    free(v);
    return r;
}

/* Blocks and table have refcounts themselves. */
static int plan_rebuild(struct check *x, struct rebuild *b)
{
    uint64_t per_block = check_block_entries(x);
    uint64_t max = 0;
    uint64_t before = 0;
    int r = indices_in_use(x, b, &max);

    b->table_clusters = 1;
    do {
        before = b->index_count + b->table_clusters;
        b->end = b->first + b->spare + before;
        for (uint64_t i = b->first / per_block; r == 0 && i <= (b->end - 1) / per_block; i++) {
            if (b->index_count == 0 || i > b->indices[b->index_count - 1])
                r = need_index(b, i, &max);
        }
        if (r == 0)
            b->table_clusters =
                (b->indices[b->index_count - 1] * QCOW2_ENTRY_LEN >> x->h.cluster_bits) + 1;
    } while (r == 0 && b->index_count + b->table_clusters != before);
    if (r == 0 && (b->table_clusters << x->h.cluster_bits > QCOW2_REFCOUNT_TABLE_BYTES_MAX ||
                   b->end > QCOW2_HOST_OFFSET_END >> x->h.cluster_bits))
        r = -EFBIG;
    return r;
}

static void fill_block(struct check *x, const struct rebuild *b, uint64_t index, uint8_t *bytes)
{
    uint64_t per_block = check_block_entries(x);
    uint64_t n = index * per_block;
    uint64_t end = n + per_block;

    memset(bytes, 0, (size_t)x->cluster);
    while (n < end) {
        uint64_t stop = MIN(end, (n | (QCOW2_LEAF - 1)) + 1);
        struct qcow2_leaf *l = qcow2_leaf_find(&x->counts, n);

        for (; l && n < stop; n++) {
            uint64_t used = qcow2_leaf_count(l, QCOW2_USED, n & (QCOW2_LEAF - 1));

            if (used)
                check_refcount_set(x, bytes, n % per_block, MIN(used, check_refcount_max(x)));
        }
        n = stop;
    }
    for (n = MAX(b->first, index * per_block); n < MIN(b->end, end); n++)
        check_refcount_set(x, bytes, n % per_block, 1);
}

static int co_fn write_structure(struct check *x, const struct rebuild *b)
{
    uint64_t blocks = b->first + b->spare;
    uint64_t table = blocks + b->index_count;
    size_t table_len = (size_t)(b->table_clusters << x->h.cluster_bits);
    struct iobuf *block = iobuf_new((size_t)x->cluster);
    struct iobuf *bytes = iobuf_new(table_len);
    int r = block && bytes ? check_grow(x, b->end << x->h.cluster_bits) : -ENOMEM;

    if (r == 0)
        memset(bytes->data, 0, table_len);
    for (uint64_t i = 0; i < b->index_count && r == 0; i++) {
        uint64_t offset = (blocks + i) << x->h.cluster_bits;

        fill_block(x, b, b->indices[i], block->data);
        store_be64(bytes->data + b->indices[i] * QCOW2_ENTRY_LEN, offset);
        r = check_interrupted(x);
        if (r == 0)
            r = check_write(x, offset, block, 0, (size_t)x->cluster);
    }
    if (r == 0)
        r = check_write(x, table << x->h.cluster_bits, bytes, 0, table_len);
    iobuf_unref(block);
    iobuf_unref(bytes);
    return r;
}

/* REPAIR-2 */
static int co_fn switch_structure(struct check *x, const struct rebuild *b)
{
    uint8_t reference[AT_WIDTH + 4];
    size_t len = b->new_width ? sizeof(reference) : 12;
    int r = check_flush(x);

    if (r == 0 && b->new_width)
        r = check_read_flat(x, QCOW2_OFFSET_REFCOUNT_TABLE_OFFSET, reference, len);
    store_be32(reference + AT_WIDTH, x->h.refcount_order);
    store_be64(reference, (b->first + b->spare + b->index_count) << x->h.cluster_bits);
    store_be32(reference + 8, (uint32_t)b->table_clusters);
    if (r == 0)
        r = check_write_flat(x, QCOW2_OFFSET_REFCOUNT_TABLE_OFFSET, reference, len);
    return r == 0 ? check_flush(x) : r;
}

static int co_fn build_anew(struct check *x, struct rebuild *b)
{
    int r;

    b->first = x->r.image_end_offset >> x->h.cluster_bits;
    forget_old_structure(x);
    r = plan_rebuild(x, b);
    if (r == 0)
        r = write_structure(x, b);
    if (r == 0)
        r = switch_structure(x, b);
    free(b->indices);
    return r;
}

static int co_fn rebuild_refcounts(struct check *x, uint64_t spare)
{
    struct rebuild b = {.spare = spare};
    int r;

    check_say(x, "Rebuilding refcount structure");
    r = build_anew(x, &b);
    x->spare = b.first;
    x->spare_count = r == 0 ? spare : 0;
    return r;
}

/* Is nothing used more often than refcounts of this width can say? */
static int check_width_fits(struct check *x, struct error **err)
{
    struct qcow2_leaf **v = qcow2_counts_sorted(&x->counts);
    int r = v ? 0 : error_set(err, ENOMEM, "no memory");

    for (size_t k = 0; r == 0 && k < x->counts.leaf_count; k++) {
        for (unsigned i = 0; r == 0 && i < QCOW2_LEAF; i++) {
            uint64_t used = qcow2_leaf_count(v[k], QCOW2_USED, i);

            if (used > check_refcount_max(x))
                r = error_set(err, ERANGE,
                              "Cannot decrease refcount entry width to %u bits: cluster at offset "
                              "%#" PRIx64 " has a refcount of %" PRIu64,
                              1U << x->h.refcount_order,
                              ((v[k]->index << QCOW2_LEAF_BITS) + i) << x->h.cluster_bits, used);
        }
    }
    free(v);
    return r;
}

int check_change_width(struct check *x, unsigned order, struct error **err)
{
    struct rebuild b = {.new_width = true};
    int r;

    x->h.refcount_order = order;
    r = check_width_fits(x, err);
    return r < 0 ? r : cannot(err, build_anew(x, &b), "change the width of refcounts");
}

/* ---- either ---- */

static bool fits_in_place(struct check *x, uint64_t spare)
{
    uint64_t end = x->r.image_end_offset >> x->h.cluster_bits;
    struct qcow2_leaf **v;
    bool fits = !x->bad_refcounts;

    for (uint64_t i = 0; i < spare && fits; i++)
        fits = has_block(x, end + i);
    v = x->low && fits ? qcow2_counts_sorted(&x->counts) : NULL;
    for (size_t k = 0; v && fits && k < x->counts.leaf_count; k++) {
        for (unsigned i = 0; i < QCOW2_LEAF && fits; i++) {
            if (qcow2_leaf_count(v[k], QCOW2_STORED, i) < qcow2_leaf_count(v[k], QCOW2_USED, i))
                fits = has_block(x, (v[k]->index << QCOW2_LEAF_BITS) + i);
        }
    }
    free(v);
    return fits;
}

static int co_fn raise_in_place(struct check *x, uint64_t spare)
{
    uint64_t first = x->r.image_end_offset >> x->h.cluster_bits;
    int r = spare ? check_grow(x, (first + spare) << x->h.cluster_bits) : 0;

    if (r < 0)
        return r;
    x->spare = first;
    x->spare_count = spare;
    r = change_counts(x, COUNTS_RAISE);
    if (r < 0)
        x->spare_count = 0;
    return r;
}

int check_raise_refcounts(struct check *x, uint64_t spare, struct error **err)
{
    int r = fits_in_place(x, spare) ? raise_in_place(x, spare) : rebuild_refcounts(x, spare);

    if (r == -EINTR)
        return error_set(err, EINTR, "interrupted");
    return cannot(err, r, "repair refcounts");
}
