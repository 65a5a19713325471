/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The mappings of guest clusters. Each L2 table is read once, however many L1 entries of snapshots point to it (P5, P6), in the
 * order of the file, several at a time.
 */
#include "base/alloc.h"
#include "base/checked.h"
#include "base/endian.h"
#include "formats/qcow2/check/qcow2-check-internal.h"
#include "loop/scope.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#define WALKERS 16
/* Tables with no more than this between them are read together. */
#define GAP_MAX (16 * KIB)

bool check_is_aligned(const struct check *x, uint64_t offset)
{
    return is_aligned(offset, x->cluster);
}

/* ---- L1 ---- */

static int add_l2(struct check *x, uint64_t offset, bool active)
{
    if (x->l2_count == x->l2_max) {
        size_t max = MAX(x->l2_max * 2, (size_t)256);
        struct check_l2 *v;

        if (max * sizeof(*v) > x->options->memory_max)
            return -ENOMEM;
        v = realloc(x->l2, max * sizeof(*v));
        if (!v)
            return -ENOMEM;
        x->l2 = v;
        x->l2_max = max;
    }
    x->l2[x->l2_count++] = (struct check_l2){.offset = offset, .uses = 1, .active = active};
    return 0;
}

/* Once more, when the refcounts are known as they are in the end. */
static int suspect(struct check *x, uint64_t l1_index, uint64_t entry, uint64_t cluster)
{
    struct check_online *o = x->online;

    if (o->suspect_count == o->suspect_max) {
        size_t max = o->suspect_max * 2 + 64;
        struct check_suspect *v = NULL;

        if (max * sizeof(*v) <= x->options->memory_max / 4)
            v = realloc(o->suspects, max * sizeof(*v));
        if (!v)
            return -ENOMEM;
        o->suspects = v;
        o->suspect_max = max;
    }
    o->suspects[o->suspect_count++] = (struct check_suspect){cluster, entry, l1_index};
    return 0;
}

int check_copied(struct check *x, uint64_t l1_index, uint64_t entry, uint64_t cluster)
{
    uint64_t count = qcow2_count(&x->counts, QCOW2_STORED, cluster);

    if (likely((count == 1) == !!(entry & QCOW2_COPIED)))
        return 0;
    if (x->online && !x->online->settled)
        return suspect(x, l1_index, entry, cluster);
    x->bad_copied++;
    if (l1_index == CHECK_OF_L2)
        check_found(x, "ERROR OFLAG_COPIED data cluster: l2_entry=%" PRIx64 " refcount=%" PRIu64,
                    entry, count);
    else
        check_found(x,
                    "ERROR OFLAG_COPIED L2 cluster: l1_index=%" PRIu64 " l1_entry=%" PRIx64
                    " refcount=%" PRIu64,
                    l1_index, entry, count);
    return 0;
}

static int take_l1_entry(struct check *x, uint64_t index, uint64_t entry, bool active)
{
    uint64_t offset = entry & QCOW2_L1_OFFSET_MASK;

    if (likely(entry == 0))
        return 0;
    if (entry & QCOW2_L1_RESERVED_MASK) {
        x->bad_entries++;
        check_found(x, "ERROR found L1 entry with reserved bits set: %" PRIx64, entry);
    }
    if (offset == 0) {
        if (entry & QCOW2_COPIED) {
            x->bad_entries++;
            check_found(x, "ERROR L1 entry says copied, but has no table: %" PRIx64, entry);
        }
        return 0;
    }
    if (!check_is_aligned(x, offset)) {
        x->bad_entries++;
        check_found(x,
                    "ERROR l2_offset=%" PRIx64 ": Table is not cluster aligned; L1 entry corrupted",
                    offset);
        return 0;
    }
    if (active) {
        int r = check_copied(x, index, entry, offset >> x->h.cluster_bits);

        if (r < 0)
            return r;
    }
    if (!check_in_file(x, offset, x->cluster)) {
        x->bad_entries++;
        check_found(x,
                    "ERROR: counting reference for region exceeding the end of the file by one "
                    "cluster or more: offset 0x%" PRIx64 " size 0x%" PRIx64,
                    offset, x->cluster);
        return 0;
    }
    return add_l2(x, offset, active);
}

int check_l1(struct check *x, uint64_t offset, uint32_t size, bool active)
{
    struct iobuf *b = iobuf_new(CHECK_PIECE);
    int r = b ? 0 : -ENOMEM;

    for (uint64_t at = 0; at < size && r == 0; at += CHECK_PIECE / QCOW2_ENTRY_LEN) {
        uint64_t n = MIN(size - at, (uint64_t)CHECK_PIECE / QCOW2_ENTRY_LEN);

        r = check_interrupted(x);
        if (r == 0)
            r = check_read(x, offset + at * QCOW2_ENTRY_LEN, b, (size_t)n * QCOW2_ENTRY_LEN);
        for (uint64_t i = 0; i < n && r == 0; i++)
            r = take_l1_entry(x, at + i, load_be64(b->data + i * QCOW2_ENTRY_LEN), active);
    }
    iobuf_unref(b);
    return r;
}

/* ---- the list of L2 tables ---- */

static int compare_l2(const void *a, const void *b)
{
    const struct check_l2 *x = a;
    const struct check_l2 *y = b;

    return (x->offset > y->offset) - (x->offset < y->offset);
}

const struct check_l2 *check_l2_find(const struct check *x, uint64_t offset)
{
    struct check_l2 key = {.offset = offset};

    return x->l2_count ? bsearch(&key, x->l2, x->l2_count, sizeof(key), compare_l2) : NULL;
}

/* A new one, which has come a number of times. */
static int refer_l2(struct check *x, struct check_l2 *t)
{
    enum check_reference ref;
    int r = check_refer_meta(x, t->offset, x->cluster, t->uses, &ref);

    if (r == 0 && ref == CHECK_CLASH) {
        t->bad = true;
        x->bad_entries++;
        check_found(x, "ERROR L2 table at offset 0x%" PRIx64 " overlaps with other metadata",
                    t->offset);
    }
    return r;
}

static void check_uses(struct check *x, const struct check_l2 *t)
{
    if (t->uses <= check_refcount_max(x))
        return;
    x->bad_entries++;
    check_found(x,
                "ERROR L2 table at offset 0x%" PRIx64 " is used %" PRIu64
                " times, more often than refcounts can say",
                t->offset, t->uses);
}

static int refer_again(struct check *x, const struct check_l2 *t, uint64_t times)
{
    return qcow2_count_add(&x->counts, QCOW2_USED, t->offset >> x->h.cluster_bits, times);
}

/* Those that were known have more than one use, or `known`; the list becomes sorted again, each table once. */
int check_refer_l2_tables(struct check *x)
{
    size_t n = 0;
    int r = 0;

    if (x->l2_count == 0)
        return 0;
    qsort(x->l2, x->l2_count, sizeof(*x->l2), compare_l2);
    for (size_t i = 0; i < x->l2_count && r == 0;) {
        struct check_l2 t = x->l2[i];
        struct check_l2 known = {.uses = 0};

        for (t.uses = 0; i < x->l2_count && x->l2[i].offset == t.offset; i++) {
            const struct check_l2 *e = &x->l2[i];

            t.active |= e->active;
            if (e->known)
                known = *e;
            else
                t.uses += e->uses;
        }
        if (known.uses && t.uses)
            r = refer_again(x, &t, t.uses);
        else if (!known.uses)
            r = refer_l2(x, &t);
        t.uses += known.uses;
        t.bad |= known.bad;
        t.known = true;
        check_uses(x, &t);
        x->l2[n++] = t;
    }
    x->l2_count = n;
    return r;
}

/* ---- L2 entries ---- */

struct l2_walk {
    struct check *x;
    size_t next; /* table */
    int result;
};

/* One table. */
struct l2_look {
    struct check *x;
    const struct check_l2 *table;
    uint64_t follows; /* where the next cluster would lie if nothing is fragmented; 0 at first */
};

void check_compressed_place(const struct check *x, uint64_t entry, uint64_t *ret_offset,
                            uint64_t *ret_len)
{
    unsigned bits = QCOW2_COMPRESSED_OFFSET_BITS(x->h.cluster_bits);
    uint64_t descriptor = entry & ~(QCOW2_COPIED | QCOW2_L2_COMPRESSED);
    uint64_t offset = descriptor & ((UINT64_C(1) << bits) - 1);
    uint64_t sectors = (descriptor >> bits) + 1;

    *ret_offset = offset;
    *ret_len = sectors * QCOW2_COMPRESSED_SECTOR - (offset & (QCOW2_COMPRESSED_SECTOR - 1));
}

static int refer_to_data(struct l2_look *l, uint64_t offset, uint64_t len)
{
    struct check *x = l->x;
    enum check_reference ref;
    int r = check_refer_data(x, offset, len, l->table->uses, &ref);

    if (ref == CHECK_NOT_THERE)
        x->bad_entries++;
    else if (ref == CHECK_CLASH)
        x->data_clashes += len == x->cluster ? 1 : 2;
    return r;
}

static int look_at_compressed(struct l2_look *l, uint64_t entry, uint64_t bitmap)
{
    struct check *x = l->x;
    uint64_t offset, len;

    check_compressed_place(x, entry, &offset, &len);
    if (entry & QCOW2_COPIED) {
        x->bad_entries++;
        check_found(x,
                    "ERROR: coffset=0x%" PRIx64
                    ": copied flag must never be set for compressed clusters",
                    offset);
    }
    if (bitmap) {
        x->bad_entries++;
        check_found(x,
                    "ERROR compressed cluster with non-zero subcluster allocation bitmap, "
                    "entry=0x%" PRIx64,
                    entry);
    }
    if (check_has_data_file(x)) {
        x->bad_entries++;
        check_found(x, "ERROR compressed cluster with data file, entry=0x%" PRIx64, entry);
        return 0;
    }
    if (l->table->active) {
        x->r.allocated_clusters++;
        x->r.compressed_clusters++;
        x->r.fragmented_clusters++;
    }
    return refer_to_data(l, offset, len);
}

/* What the second half of an extended entry says of the subclusters. */
static void look_at_subclusters(struct check *x, uint64_t entry, uint64_t bitmap)
{
    uint64_t offset = entry & QCOW2_L2_OFFSET_MASK;
    uint64_t allocated = bitmap & UINT32_MAX;
    bool placed = offset || (check_has_data_file(x) && entry & QCOW2_COPIED);

    if (allocated & bitmap >> 32) {
        x->bad_entries++;
        check_found(x,
                    "ERROR offset=%" PRIx64
                    ": Allocated cluster has corrupted subcluster allocation bitmap",
                    offset);
    } else if (allocated && !placed) {
        x->bad_entries++;
        check_found(x,
                    "ERROR: Unallocated cluster has corrupted subcluster allocation bitmap: "
                    "%" PRIx64,
                    bitmap);
    }
}

static void count_allocated(struct l2_look *l, uint64_t offset)
{
    struct check *x = l->x;

    x->r.allocated_clusters++;
    if (l->follows && offset != l->follows)
        x->r.fragmented_clusters++;
    l->follows = offset + x->cluster;
}

static int look_at_cluster(struct l2_look *l, uint64_t entry, uint64_t offset, bool zero)
{
    struct check *x = l->x;

    if (l->table->active)
        count_allocated(l, offset);
    if (unlikely(!check_is_aligned(x, offset))) {
        x->bad_entries++;
        check_found(x, "ERROR offset=%" PRIx64 ": %s is not properly aligned; L2 entry corrupted.",
                    offset, zero ? "Preallocated cluster" : "Data cluster");
    }
    if (check_has_data_file(x))
        return 0; /* it is in another file, where nothing is counted */
    if (l->table->active) {
        int r = check_copied(x, CHECK_OF_L2, entry, offset >> x->h.cluster_bits);

        if (r < 0)
            return r;
    }
    return refer_to_data(l, offset, x->cluster);
}

/* Most of a full table: a cluster that nobody uses yet, counted once, with the leaf at hand. False: look closer. */
static inline bool look_quickly(struct l2_look *l, uint64_t entry)
{
    struct check *x = l->x;
    uint64_t offset = entry & QCOW2_L2_OFFSET_MASK;
    uint64_t cluster = offset >> x->h.cluster_bits;
    struct qcow2_leaf *leaf = x->counts.last;
    unsigned i = cluster & (QCOW2_LEAF - 1);

    if (!leaf || leaf->index != cluster >> QCOW2_LEAF_BITS || entry != (offset | QCOW2_COPIED) ||
        offset == 0 || !check_is_aligned(x, offset) || leaf->narrow[QCOW2_USED][i] ||
        leaf->narrow[QCOW2_STORED][i] != 1 || leaf->wide[QCOW2_USED] || leaf->wide[QCOW2_STORED] ||
        cluster + 1 >= x->clusters || !l->table->active || l->table->uses != 1)
        return false;
    leaf->narrow[QCOW2_USED][i] = 1;
    count_allocated(l, offset);
    return true;
}

static int look_at_entry(struct l2_look *l, uint64_t entry, uint64_t bitmap)
{
    struct check *x = l->x;
    uint64_t offset = entry & QCOW2_L2_OFFSET_MASK;
    bool zero = (entry & QCOW2_L2_ZERO) && !check_has_extended_l2(x);

    if (entry & QCOW2_L2_COMPRESSED)
        return look_at_compressed(l, entry, bitmap);
    if (entry & check_l2_reserved(x)) {
        x->bad_entries++;
        check_found(x, "ERROR found l2 entry with reserved bits set: %" PRIx64, entry);
    }
    if (check_has_extended_l2(x))
        look_at_subclusters(x, entry, bitmap);
    if (offset == 0 && !(check_has_data_file(x) && (entry & QCOW2_COPIED)))
        return 0;
    return look_at_cluster(l, entry, offset, zero);
}

static int look_at_table(struct check *x, const struct check_l2 *t, const uint8_t *bytes)
{
    struct l2_look l = {.x = x, .table = t};
    bool extended = check_has_extended_l2(x);
    bool quick = !extended && !check_has_data_file(x);
    int r = 0;

    for (uint64_t at = 0; at < x->cluster && r == 0; at += x->l2_entry) {
        uint64_t entry = load_be64(bytes + at);
        uint64_t bitmap = extended ? load_be64(bytes + at + 8) : 0;

        if ((entry | bitmap) == 0 || (quick && likely(look_quickly(&l, entry))))
            continue;
        r = look_at_entry(&l, entry, bitmap);
    }
    return r;
}

/* ---- reading them ---- */

/* From table `first` on: how many are read together. */
static size_t run_length(const struct check *x, size_t first, uint64_t *ret_len)
{
    uint64_t start = x->l2[first].offset;
    size_t n = 1;

    while (first + n < x->l2_count &&
           x->l2[first + n].offset - x->l2[first + n - 1].offset - x->cluster <= GAP_MAX &&
           x->l2[first + n].offset + x->cluster - start <= MAX(CHECK_PIECE, (size_t)x->cluster))
        n++;
    *ret_len = x->l2[first + n - 1].offset + x->cluster - start;
    return n;
}

static int co_fn walk_run(struct l2_walk *w, struct iobuf *b, size_t first, size_t n, uint64_t len)
{
    struct check *x = w->x;
    uint64_t start = x->l2[first].offset;
    int r = check_read(x, start, b, (size_t)len);

    if (r < 0) { /* what it points to is not known; the rest may be read */
        x->r.check_errors++;
        check_say(x, "ERROR reading the L2 table at offset 0x%" PRIx64 ": %s", start, strerror(-r));
        return 0;
    }
    for (size_t i = first; i < first + n && r == 0; i++) {
        if (!x->l2[i].bad)
            r = look_at_table(x, &x->l2[i], b->data + (x->l2[i].offset - start));
    }
    return r;
}

static void co_fn walk(void *arg)
{
    struct l2_walk *w = arg;
    struct iobuf *b = iobuf_new(MAX(CHECK_PIECE, (size_t)w->x->cluster));
    int r = b ? 0 : -ENOMEM;

    while (r == 0 && w->result == 0 && w->next < w->x->l2_count) {
        uint64_t len;
        size_t first = w->next;
        size_t n = run_length(w->x, first, &len);

        w->next += n;
        r = check_interrupted(w->x);
        if (r == 0)
            r = walk_run(w, b, first, n, len);
        if (w->x->options->progress)
            w->x->options->progress(w->x->options->arg, w->next * w->x->cluster,
                                    w->x->l2_count * w->x->cluster);
    }
    if (r < 0 && w->result == 0)
        w->result = r;
    iobuf_unref(b);
}

int check_l2_tables(struct check *x)
{
    size_t walkers = x->online ? 1 : WALKERS; /* its reads would wait for each other */
    struct l2_walk w = {.x = x};
    struct co_scope s;

    co_scope_init(&s);
    for (unsigned i = 0; i < MIN(walkers, x->l2_count); i++) {
        int r = co_scope_start(&s, walk, &w);

        if (r < 0 && w.result == 0)
            w.result = r;
    }
    co_scope_join(&s);
    return w.result;
}
