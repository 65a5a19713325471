/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What points to clusters is mended.
 *
 * REPAIR-3 An entry is changed in place, and means the same in any mix of old and new sectors.
 * REPAIR-4 A copy is durable before anything points to it, and lies in space that is counted (REPAIR-1).
 * REPAIR-5 The marks "dirty" and "corrupt" go last, when all else is durable.
 * REPAIR-6 Before what the disk reads as changes, stored bitmaps, which do not record it, are durably IN_USE (P2).
 */
#include "base/alloc.h"
#include "base/checked.h"
#include "base/endian.h"
#include "formats/qcow2/check/qcow2-check-internal.h"
#include "formats/qcow2/qcow2-bitmap-dir.h"
#include "formats/qcow2/qcow2-snapshot.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#define SECTOR 512

static int cannot(struct error **err, int r, const char *what)
{
    if (r == -EINTR)
        return error_set(err, EINTR, "interrupted");
    return r < 0 ? error_set(err, -r, "cannot %s: %s", what, strerror(-r)) : 0;
}

static int co_fn write_in_pieces(struct check *x, uint64_t offset, const uint8_t *bytes, size_t len)
{
    int r = 0;

    for (size_t at = 0; at < len && r == 0; at += CHECK_PIECE)
        r = check_write_flat(x, offset + at, bytes + at, MIN(len - at, CHECK_PIECE));
    return r;
}

/* ---- editing tables ---- */

struct moves;

struct edit {
    struct check *x;
    /* Of L1 tables and L2 tables; either may be NULL. 1 if the entry was changed, 0, or a negative errno. */
    int (*l1)(struct edit *e, uint8_t *entry);
    int (*l2)(struct edit *e, const struct check_l2 *table, uint8_t *entry);
    bool active_only;

    uint64_t at; /* of the entry, in the file */
    struct moves *moves;
};

static int co_fn edit_piece(struct edit *e, const struct check_l2 *table, uint64_t offset,
                            struct iobuf *b, size_t len)
{
    size_t entry_len = table ? e->x->l2_entry : QCOW2_ENTRY_LEN;
    size_t from = len;
    size_t to = 0;
    int r = check_interrupted(e->x);

    if (r == 0)
        r = check_read(e->x, offset, b, len);
    for (size_t at = 0; at < len && r >= 0; at += entry_len) {
        e->at = offset + at;
        r = table ? e->l2(e, table, b->data + at) : e->l1(e, b->data + at);
        if (r > 0) {
            from = MIN(from, at);
            to = at + entry_len;
        }
    }
    if (r < 0 || to == 0)
        return MIN(r, 0);
    from = (size_t)align_down(from, SECTOR);
    to = (size_t)MIN(align_up(to, SECTOR), (uint64_t)len);
    return check_write(e->x, offset + from, b, from, to - from);
}

static int co_fn edit_table(struct edit *e, const struct check_l2 *table, uint64_t offset,
                            uint64_t len)
{
    struct iobuf *b = iobuf_new(CHECK_PIECE);
    int r = b ? 0 : -ENOMEM;

    for (uint64_t at = 0; at < len && r == 0; at += CHECK_PIECE)
        r = edit_piece(e, table, offset + at, b, (size_t)MIN(len - at, (uint64_t)CHECK_PIECE));
    iobuf_unref(b);
    return r;
}

static int co_fn edit_l1_tables(struct edit *e)
{
    struct check *x = e->x;
    int r = edit_table(e, NULL, x->h.l1_offset, (uint64_t)x->h.l1_size * QCOW2_ENTRY_LEN);

    for (uint32_t i = 0; i < x->snapshot_count && r == 0 && !e->active_only; i++) {
        const struct check_snapshot *s = &x->snapshots[i];

        if (!s->bad)
            r = edit_table(e, NULL, s->l1_offset, (uint64_t)s->l1_size * QCOW2_ENTRY_LEN);
    }
    return r;
}

static int co_fn edit_all(struct edit *e)
{
    struct check *x = e->x;
    int r = e->l1 ? edit_l1_tables(e) : 0;

    for (size_t i = 0; i < x->l2_count && r == 0 && e->l2; i++) {
        const struct check_l2 *t = &x->l2[i];

        if (!t->bad && (t->active || !e->active_only))
            r = edit_table(e, t, t->offset, x->cluster);
    }
    return r;
}

/* ---- entries that make no sense ---- */

/* The first ones that come keep their table. */
static bool is_one_too_many(struct check *x, const struct check_l2 *t)
{
    return t->uses > check_refcount_max(x) && x->l2[t - x->l2].kept++ >= check_refcount_max(x);
}

static int mend_l1_entry(struct edit *e, uint8_t *p)
{
    struct check *x = e->x;
    uint64_t entry = load_be64(p);
    uint64_t offset = entry & QCOW2_L1_OFFSET_MASK;
    uint64_t better = entry & ~QCOW2_L1_RESERVED_MASK;
    const struct check_l2 *t = offset ? check_l2_find(x, offset) : NULL;

    if (!t || t->bad || is_one_too_many(x, t))
        better = 0;
    if (better == entry)
        return 0;
    check_say(x, "Repairing l1_entry=%" PRIx64 ": now %" PRIx64, entry, better);
    store_be64(p, better);
    return 1;
}

/* What cannot be read any more reads as zeroes, not as something older; in version 2 that cannot be said. */
static void set_lost(const struct check *x, uint8_t *p)
{
    store_be64(p, x->h.version >= 3 && !check_has_extended_l2(x) ? QCOW2_L2_ZERO : 0);
    if (check_has_extended_l2(x))
        store_be64(p + 8, UINT64_C(0xffffffff00000000));
}

static bool is_lost(const struct check *x, uint64_t entry)
{
    uint64_t offset = entry & QCOW2_L2_OFFSET_MASK;
    uint64_t len = x->cluster;

    if (entry & QCOW2_L2_COMPRESSED) {
        check_compressed_place(x, entry, &offset, &len);
        return check_has_data_file(x) || !check_in_file(x, offset, len);
    }
    if (!check_is_aligned(x, offset))
        return true;
    return !check_has_data_file(x) && offset && !check_in_file(x, offset, len);
}

static int mend_subclusters(const struct check *x, uint64_t entry, uint8_t *p)
{
    uint64_t bitmap = load_be64(p + 8);
    uint64_t better = bitmap & ~((bitmap & UINT32_MAX) << 32); /* what is allocated is not zero */

    if (entry & QCOW2_L2_COMPRESSED)
        better = 0;
    else if (!(entry & QCOW2_L2_OFFSET_MASK) &&
             !(check_has_data_file(x) && entry & QCOW2_COPIED)) /* what is lost reads as zeroes */
        better = (bitmap | bitmap << 32) & ~(uint64_t)UINT32_MAX;
    store_be64(p + 8, better);
    return better != bitmap;
}

static int mend_l2_entry(struct edit *e, const struct check_l2 *table, uint8_t *p)
{
    struct check *x = e->x;
    uint64_t entry = load_be64(p);
    uint64_t better = entry & ~check_l2_reserved(x);
    int changed = 0;

    (void)table;
    if (is_lost(x, entry)) {
        check_say(x, "Repairing l2_entry=%" PRIx64 ": its data is lost, and now reads as zeroes",
                  entry);
        set_lost(x, p);
        return 1;
    }
    if (entry & QCOW2_L2_COMPRESSED)
        better = entry & ~QCOW2_COPIED;
    if (check_has_extended_l2(x))
        changed = mend_subclusters(x, entry, p);
    if (better == entry && !changed)
        return 0;
    check_say(x, "Repairing l2_entry=%" PRIx64 ": now %" PRIx64, entry, better);
    store_be64(p, better);
    return 1;
}

/* REPAIR-6 */
static int co_fn end_bitmaps(struct check *x)
{
    size_t len = (size_t)x->h.bitmap_directory_size;
    uint8_t *directory;
    int r;

    if (!x->h.has_bitmaps)
        return 0;
    directory = try_alloc(len, 1);
    r = directory ? check_read_flat(x, x->h.bitmap_directory_offset, directory, len) : -ENOMEM;
    if (r == 0 && qcow2_bitmap_set_in_use(directory, len)) {
        check_say(x, "Repairing bitmaps: what the disk reads as changes, they can only be removed");
        r = write_in_pieces(x, x->h.bitmap_directory_offset, directory, len);
        if (r == 0)
            r = check_flush(x);
    }
    free(directory);
    return r;
}

int check_mend_entries(struct check *x, struct error **err)
{
    struct edit e = {.x = x, .l1 = mend_l1_entry, .l2 = mend_l2_entry};
    int r = end_bitmaps(x);

    if (r == 0)
        r = edit_all(&e);
    return cannot(err, r == 0 ? check_flush(x) : r, "repair mappings");
}

/* ---- OFLAG_COPIED ---- */

static int mend_copied(struct check *x, const char *what, uint8_t *p, uint64_t offset)
{
    uint64_t entry = load_be64(p);
    uint64_t uses = qcow2_count(&x->counts, QCOW2_USED, offset >> x->h.cluster_bits);
    uint64_t better = uses == 1 ? entry | QCOW2_COPIED : entry & ~QCOW2_COPIED;

    if (offset == 0 || better == entry)
        return 0;
    check_say(x, "Repairing OFLAG_COPIED %s=%" PRIx64 " refcount=%" PRIu64, what, entry, uses);
    store_be64(p, better);
    return 1;
}

static int mend_l1_copied(struct edit *e, uint8_t *p)
{
    return mend_copied(e->x, "L2 cluster: l1_entry", p, load_be64(p) & QCOW2_L1_OFFSET_MASK);
}

static int mend_l2_copied(struct edit *e, const struct check_l2 *table, uint8_t *p)
{
    (void)table;
    if (load_be64(p) & QCOW2_L2_COMPRESSED)
        return 0;
    return mend_copied(e->x, "data cluster: l2_entry", p, load_be64(p) & QCOW2_L2_OFFSET_MASK);
}

int check_mend_copied(struct check *x, struct error **err)
{
    struct edit e = {.x = x, .l1 = mend_l1_copied, .active_only = true};
    int r;

    if (!check_has_data_file(x))
        e.l2 = mend_l2_copied;
    r = edit_all(&e);
    return cannot(err, r == 0 ? check_flush(x) : r, "repair mappings");
}

/* ---- copies ---- */

static bool clashes(struct check *x, uint64_t offset, uint64_t len)
{
    for (uint64_t n = offset >> x->h.cluster_bits; n <= (offset + len - 1) >> x->h.cluster_bits;
         n++) {
        if (qcow2_counts_bit(&x->counts, QCOW2_LEAF_META, n) ||
            qcow2_count(&x->counts, QCOW2_USED, n) > check_refcount_max(x))
            return true;
    }
    return false;
}

static int co_fn copy_data(struct check *x, uint64_t from, uint64_t to, uint64_t len)
{
    struct iobuf *b = iobuf_new((size_t)len);
    int r = b ? check_read(x, from, b, (size_t)len) : -ENOMEM;

    if (r == 0)
        r = check_write(x, to, b, 0, (size_t)len);
    iobuf_unref(b);
    return r;
}

struct move {
    uint64_t entry_at; /* in the file */
    uint64_t from;
    uint64_t to;
};

/* First the data are copied; when that is durable, the entries point there (REPAIR-4). */
struct moves {
    struct move *v;
    size_t count;
    size_t max;
    size_t done;
    uint64_t next_spare;
};

static void data_place(const struct check *x, uint64_t entry, uint64_t *ret_offset,
                       uint64_t *ret_len)
{
    *ret_offset = entry & QCOW2_L2_OFFSET_MASK;
    *ret_len = x->cluster;
    if (entry & QCOW2_L2_COMPRESSED)
        check_compressed_place(x, entry, ret_offset, ret_len);
}

static void forget_use(struct check *x, uint64_t offset, uint64_t len, uint64_t uses)
{
    for (uint64_t n = offset >> x->h.cluster_bits; n <= (offset + len - 1) >> x->h.cluster_bits;
         n++)
        qcow2_count_sub(&x->counts, QCOW2_USED, n, uses);
}

static int co_fn copy_l2_data(struct edit *e, const struct check_l2 *table, uint8_t *p)
{
    struct check *x = e->x;
    struct moves *m = e->moves;
    uint64_t entry = load_be64(p);
    bool compressed = entry & QCOW2_L2_COMPRESSED;
    uint64_t need = compressed ? 2 : 1;
    struct move move = {.entry_at = e->at};
    enum check_reference ref;
    uint64_t len;
    int r;

    data_place(x, entry, &move.from, &len);
    if (move.from == 0 || m->count == m->max || x->spare_count - m->next_spare < need ||
        !clashes(x, move.from, len))
        return 0;
    move.to = (x->spare + m->next_spare) << x->h.cluster_bits;
    if (compressed)
        move.to += move.from % QCOW2_COMPRESSED_SECTOR; /* as many sectors as before */
    m->next_spare += need;
    m->v[m->count++] = move;
    forget_use(x, move.from, len, table->uses);
    r = check_refer_data(x, move.to, len, table->uses, &ref);
    return r < 0 ? r : copy_data(x, move.from, move.to, len);
}

static int point_l2_entry(struct edit *e, const struct check_l2 *table, uint8_t *p)
{
    struct moves *m = e->moves;
    uint64_t entry = load_be64(p);
    const struct move *move = &m->v[m->done];

    if (m->done == m->count || move->entry_at != e->at)
        return 0;
    check_say(e->x, "Repairing l2_entry=%" PRIx64 ": copied from 0x%" PRIx64 " to 0x%" PRIx64,
              entry, move->from, move->to);
    m->done++;
    entry = (entry & ~QCOW2_COPIED) - move->from + move->to;
    if (table->uses == 1 && !(entry & QCOW2_L2_COMPRESSED))
        entry |= QCOW2_COPIED;
    store_be64(p, entry);
    return 1;
}

static int co_fn move_data(struct check *x, uint64_t first_spare)
{
    struct moves m = {.max = (size_t)x->data_clashes, .next_spare = first_spare};
    struct edit copy = {.x = x, .l2 = copy_l2_data, .moves = &m};
    struct edit point = {.x = x, .l2 = point_l2_entry, .moves = &m};
    int r;

    m.v = try_new_n(struct move, m.max);
    r = m.v ? edit_all(&copy) : -ENOMEM;
    if (r == 0)
        r = check_flush(x);
    if (r == 0)
        r = check_raise_again(x);
    if (r == 0)
        r = edit_all(&point);
    free(m.v);
    return r == 0 ? check_flush(x) : r;
}

/* ---- the snapshot table ---- */

/* What an entry becomes; its length, without padding. */
static size_t mend_snapshot(const struct check *x, const struct check_snapshot *s, uint8_t *ret)
{
    struct qcow2_snapshot entry;

    if (!s->incomplete) {
        memcpy(ret, x->snapshot_bytes + s->at, s->len);
        return s->len;
    }
    /* It is one: check_snapshot says so. */
    (void)qcow2_snapshot_parse(x->snapshot_bytes, x->snapshot_len, s->at, &entry);
    return qcow2_snapshot_complete(x->snapshot_bytes, &entry, x->h.size, ret);
}

/* At least what the new table needs. */
static uint64_t snapshot_table_max(const struct check *x)
{
    uint64_t len = 0;

    for (uint32_t i = 0; i < x->snapshot_count; i++) {
        if (!x->snapshots[i].bad)
            len += align_up(x->snapshots[i].len + QCOW2_SNAPSHOT_EXTRA_V3, 8);
    }
    return len;
}

static size_t fill_snapshot_table(struct check *x, uint8_t *bytes, uint32_t *ret_count)
{
    size_t len = 0;

    *ret_count = 0;
    for (uint32_t i = 0; i < x->snapshot_count; i++) {
        if (x->snapshots[i].bad) {
            check_say(x, "Repairing snapshot %" PRIu32 ": it cannot be used, and is dropped", i);
            continue;
        }
        len = (size_t)align_up(len, 8);
        len += mend_snapshot(x, &x->snapshots[i], bytes + len);
        ++*ret_count;
    }
    return len;
}

/* Into the first spare clusters; then the header points there, by 12 bytes within one sector. */
static int co_fn move_snapshot_table(struct check *x)
{
    uint64_t offset = x->spare << x->h.cluster_bits;
    uint8_t *bytes = try_alloc((size_t)snapshot_table_max(x) + 1, 1);
    uint8_t reference[12];
    uint32_t count;
    size_t len;
    int r;

    if (!bytes)
        return -ENOMEM;
    len = fill_snapshot_table(x, bytes, &count);
    r = write_in_pieces(x, offset, bytes, len);
    free(bytes);
    if (r == 0)
        r = check_flush(x);
    store_be32(reference, count);
    store_be64(reference + 4, count ? offset : 0);
    if (r == 0)
        r = check_write_flat(x, QCOW2_OFFSET_SNAPSHOT_COUNT, reference, sizeof(reference));
    return r == 0 ? check_flush(x) : r;
}

static uint64_t snapshot_clusters(const struct check *x)
{
    return x->bad_snapshots ? (snapshot_table_max(x) + x->cluster - 1) >> x->h.cluster_bits : 0;
}

/* With LUKS data cannot move: where it lies is part of the key. */
uint64_t check_copies_need(const struct check *x)
{
    return snapshot_clusters(x) + (x->h.crypt_method == QCOW2_CRYPT_LUKS ? 0 : x->data_clashes);
}

int check_make_copies(struct check *x, struct error **err)
{
    int r = 0;

    if (x->data_clashes && x->h.crypt_method != QCOW2_CRYPT_LUKS)
        r = move_data(x, snapshot_clusters(x));
    if (r == 0 && x->bad_snapshots)
        r = move_snapshot_table(x);
    x->spare_count = 0;
    return cannot(err, r, "move what overlaps with metadata");
}

/* ---- the header ---- */

int check_drop_bitmaps(struct check *x, struct error **err)
{
    uint8_t autoclear[8];
    int r;

    check_say(x, "Repairing bitmaps: they cannot be used, and are dropped");
    r = check_read_flat(x, QCOW2_OFFSET_AUTOCLEAR, autoclear, sizeof(autoclear));
    autoclear[7] &= (uint8_t)~QCOW2_AUTOCLEAR_BITMAPS;
    if (r == 0)
        r = check_write_flat(x, QCOW2_OFFSET_AUTOCLEAR, autoclear, sizeof(autoclear));
    return cannot(err, r == 0 ? check_flush(x) : r, "drop the bitmaps");
}

/* REPAIR-5 */
int check_clear_marks(struct check *x, struct error **err)
{
    uint64_t marks = QCOW2_INCOMPATIBLE_DIRTY | QCOW2_INCOMPATIBLE_CORRUPT;
    uint8_t incompatible[8];
    int r;

    if (!(x->h.incompatible & marks))
        return 0;
    store_be64(incompatible, x->h.incompatible & ~marks);
    r = check_flush(x);
    if (r == 0)
        r = check_write_flat(x, QCOW2_OFFSET_INCOMPATIBLE, incompatible, sizeof(incompatible));
    return cannot(err, r == 0 ? check_flush(x) : r, "clear the image's marks");
}
