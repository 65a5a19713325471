/* SPDX-License-Identifier: Apache-2.0 */
/* An independent judge of qcow2 images: counts references and compares them with what the image says. */
#include "base/endian.h"
#include "qcow2-see.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#define CLUSTERS_MAX ((uint64_t)1 << 26) /* of the file: memory for the references */

/* What a cluster is used for: for one thing; by compressed bytes as often as there are some that touch it. */
enum use { USE_NOTHING, USE_META, USE_L2, USE_DATA, USE_COMPRESSED };

struct walk {
    const struct qcow2_file *f;
    struct see_header h;
    uint64_t cluster;
    uint64_t clusters; /* of the file, a last piece of one included */
    uint32_t *references;
    uint32_t *walk; /* the last L1 table on whose behalf it was referred to: 1 is the active one */
    uint8_t *use;   /* enum use */
    uint32_t now;   /* 0: nobody's */
    uint8_t *block; /* the last refcount block that was looked at; block_at: 0 before the first */
    uint64_t block_at;
    struct qcow2_verdict *v;
};

/* ---- findings ---- */

static void __attribute__((format(printf, 3, 4)))
found(struct walk *w, enum qcow2_error kind, const char *fmt, ...)
{
    va_list args;

    w->v->errors++;
    w->v->by_kind[kind]++;
    va_start(args, fmt);
    see_say(w->v, fmt, args);
    va_end(args);
}

static void __attribute__((format(printf, 2, 3))) leaked(struct walk *w, const char *fmt, ...)
{
    va_list args;

    w->v->leaks++;
    va_start(args, fmt);
    see_say(w->v, fmt, args);
    va_end(args);
}

/* ---- references ---- */

/* Does a cluster of the file hold nothing but zeroes? Several guest clusters may share such a one, if none may write to it. */
static bool is_zeroes(const struct walk *w, uint64_t n)
{
    uint8_t *bytes = malloc(w->cluster);
    bool zero = bytes && see_bytes(w->f, n * w->cluster, bytes, w->cluster) == 0;

    for (uint64_t i = 0; zero && i < w->cluster; i++)
        zero = bytes[i] == 0;
    free(bytes);
    return zero;
}

/* May guest data, or whatever `use` says, be where something is already? Each snapshot may use once what others use, for the same. */
static bool may_share(const struct walk *w, uint64_t n, enum use use)
{
    if (use == USE_META || w->use[n] != use)
        return false;
    return w->walk[n] != w->now || use == USE_COMPRESSED || (use == USE_DATA && is_zeroes(w, n));
}

/* A reference to `count` clusters from `offset` on; false if there is no such cluster. */
static bool refer(struct walk *w, uint64_t offset, uint64_t count, enum use use, const char *what,
                  uint64_t where)
{
    if (offset % w->cluster) {
        found(w, QCOW2_ERROR_MISALIGNED, "%s %" PRIu64 " is misaligned: %" PRIx64, what, where,
              offset);
        return false;
    }
    for (uint64_t i = 0; i < count; i++) {
        uint64_t n = offset / w->cluster + i;

        if (n >= w->clusters) {
            found(w, QCOW2_ERROR_BEYOND_END, "%s %" PRIu64 " is beyond the end: %" PRIx64, what,
                  where, offset);
            return false;
        }
        if (w->references[n]++ && !may_share(w, n, use))
            found(w, QCOW2_ERROR_USED_TWICE, "cluster %" PRIu64 " is used twice, by %s %" PRIu64, n,
                  what, where);
        w->use[n] = (uint8_t)use;
        w->walk[n] = w->now;
    }
    return true;
}

static uint64_t refcount_in(const struct walk *w, uint64_t n)
{
    unsigned bits = 1u << w->h.refcount_order;
    const uint8_t *p = w->block + n * bits / 8;
    uint64_t value = 0;

    if (bits < 8)
        return (uint64_t)(*p >> (n * bits % 8)) & ((1u << bits) - 1);
    for (unsigned i = 0; i < bits / 8; i++)
        value = value << 8 | p[i];
    return value;
}

static int stored_refcount(struct walk *w, uint64_t n, uint64_t *ret)
{
    uint64_t per_block = w->cluster * 8 >> w->h.refcount_order;
    uint64_t index = n / per_block;
    uint64_t block;
    int r;

    *ret = 0;
    if (index >= w->h.table_clusters * (w->cluster / 8))
        return 0;
    r = see_entry(w->f, w->h.table_offset + index * 8, &block);
    block &= ~TABLE_RESERVED;
    if (r < 0 || block == 0 || block % w->cluster || block >= w->f->size)
        return r;
    if (block != w->block_at) {
        w->block_at = 0;
        r = see_bytes(w->f, block, w->block, w->cluster);
        if (r < 0)
            return r;
        w->block_at = block;
    }
    *ret = refcount_in(w, n % per_block);
    return 0;
}

static int check_copied(struct walk *w, uint64_t entry, uint64_t offset, const char *what,
                        uint64_t where)
{
    uint64_t count;
    int r = stored_refcount(w, offset / w->cluster, &count);

    /* Snapshots' own tables may say what they like. */
    if (r == 0 && w->now == 1 && (count == 1) != !!(entry & FLAG_COPIED))
        found(w, count == 1 ? QCOW2_ERROR_NOT_COPIED : QCOW2_ERROR_COPIED,
              "%s %" PRIu64 ": copied is %d, the refcount %" PRIu64, what, where,
              !!(entry & FLAG_COPIED), count);
    return r;
}

static void walk_compressed(struct walk *w, uint64_t entry, uint64_t guest)
{
    uint64_t offset, len, first, last;

    see_compressed(w->h.cluster_bits, entry, &offset, &len);
    first = offset / w->cluster;
    last = (offset + len - 1) / w->cluster;
    w->v->compressed_clusters += w->now == 1;
    if (entry & FLAG_COPIED)
        found(w, QCOW2_ERROR_COPIED, "guest cluster %" PRIu64 " is compressed, and copied", guest);
    (void)refer(w, first * w->cluster, last - first + 1, USE_COMPRESSED, "compressed cluster",
                guest);
}

/* It has the place that belongs to it, and no refcount. */
static void walk_external(struct walk *w, uint64_t entry, uint64_t guest)
{
    if ((entry & L1_OFFSET) != guest * w->cluster)
        found(w, QCOW2_ERROR_DATA_FILE, "guest cluster %" PRIu64 " is at %" PRIx64, guest, entry);
    if (!(entry & FLAG_COPIED))
        found(w, QCOW2_ERROR_NOT_COPIED, "guest cluster %" PRIu64 " is not copied", guest);
}

static void walk_subclusters(struct walk *w, bool placed, uint64_t bits, uint64_t guest)
{
    uint64_t data = bits & UINT32_MAX;

    if (data & bits >> 32 || (data && !placed))
        found(w, QCOW2_ERROR_SUBCLUSTER, "guest cluster %" PRIu64 ": subclusters %" PRIx64, guest,
              bits);
    w->v->partial_clusters += w->now == 1 && data && data != UINT32_MAX;
}

static int walk_l2_entry(struct walk *w, uint64_t entry, uint64_t bits, uint64_t guest)
{
    uint64_t offset = entry & L1_OFFSET;
    bool external = see_has_data_file(&w->h);

    if (entry & L2_COMPRESSED) {
        if (external)
            found(w, QCOW2_ERROR_DATA_FILE, "guest cluster %" PRIu64 " is compressed", guest);
        if (bits)
            found(w, QCOW2_ERROR_SUBCLUSTER, "guest cluster %" PRIu64 ": compressed, %" PRIx64,
                  guest, bits);
        walk_compressed(w, entry, guest);
        return 0;
    }
    if (entry & L2_RESERVED || (w->h.l2_entry == 16 && entry & FLAG_ZERO))
        found(w, QCOW2_ERROR_RESERVED, "L2 entry of guest cluster %" PRIu64 ": %" PRIx64, guest,
              entry);
    if (w->h.l2_entry == 16)
        walk_subclusters(w, offset || (external && entry & FLAG_COPIED), bits, guest);
    if (w->h.version == 2 && (entry & FLAG_ZERO))
        found(w, QCOW2_ERROR_ZERO_V2, "guest cluster %" PRIu64 " is zero in version 2", guest);
    if (w->h.version > 2 && (entry & FLAG_ZERO))
        w->v->zero_clusters += w->now == 1;
    if (external && (offset || entry & FLAG_COPIED)) {
        w->v->data_clusters += w->now == 1;
        walk_external(w, entry, guest);
        return 0;
    }
    if (offset == 0) {
        if (entry & FLAG_COPIED)
            found(w, QCOW2_ERROR_NOWHERE, "guest cluster %" PRIu64 " is copied to nowhere", guest);
        return 0;
    }
    w->v->data_clusters += w->now == 1;
    if (!refer(w, offset, 1, USE_DATA, "guest cluster", guest))
        return 0;
    return check_copied(w, entry, offset, "guest cluster", guest);
}

static int walk_l2(struct walk *w, uint64_t l2, uint64_t index)
{
    uint64_t entries = see_table_entries(&w->h);
    unsigned bytes = w->h.l2_entry;
    uint8_t *table = malloc(w->cluster);
    int r = table ? see_bytes(w->f, l2, table, w->cluster) : -ENOMEM;

    for (uint64_t i = 0; i < entries && r == 0; i++)
        r = walk_l2_entry(w, load_be64(table + i * bytes),
                          bytes == 16 ? load_be64(table + i * bytes + 8) : 0, index * entries + i);
    free(table);
    return r;
}

/* On behalf of number `now`. */
static int walk_l1(struct walk *w, uint32_t now, uint64_t l1_offset, uint64_t entries)
{
    uint64_t bytes = entries * 8;

    w->now = now;
    if (bytes && !refer(w, l1_offset, (bytes + w->cluster - 1) / w->cluster, USE_META, "L1", now))
        return 0;
    for (uint64_t i = 0; i < entries; i++) {
        uint64_t entry, offset;
        int r = see_entry(w->f, l1_offset + i * 8, &entry);

        if (r < 0)
            return r;
        if (entry & L1_RESERVED)
            found(w, QCOW2_ERROR_RESERVED, "L1 entry %" PRIu64 ": %" PRIx64, i, entry);
        offset = entry & L1_OFFSET;
        if (offset == 0) {
            if (entry & FLAG_COPIED)
                found(w, QCOW2_ERROR_NOWHERE, "L1 entry %" PRIu64 " is copied to nowhere", i);
            continue;
        }
        if (!refer(w, offset, 1, USE_L2, "L2 table", i))
            continue;
        w->v->l2_tables += now == 1;
        r = check_copied(w, entry, offset, "L2 table", i);
        if (r == 0)
            r = walk_l2(w, offset, i);
        if (r < 0)
            return r;
    }
    return 0;
}

/* ---- snapshots ---- */

static int walk_snapshots(struct walk *w)
{
    struct see_snapshot e = {.at = 0};
    uint64_t end = w->h.snapshots_offset;
    int r = 0;

    for (uint32_t i = 0; i < w->h.snapshot_count; i++) {
        r = see_next_snapshot(w->f, &w->h, &e);
        if (r == 0)
            found(w, QCOW2_ERROR_SNAPSHOT, "snapshot %u at %" PRIx64 " makes no sense", i + 1,
                  e.at);
        if (r <= 0)
            return r;
        end = e.at + e.len;
        r = walk_l1(w, i + 2, e.l1_offset, e.l1_entries);
        if (r < 0)
            return r;
    }
    w->now = 0;
    if (w->h.snapshot_count)
        (void)refer(w, w->h.snapshots_offset,
                    (end - w->h.snapshots_offset + w->cluster - 1) / w->cluster, USE_META,
                    "table of snapshots", 0);
    return 0;
}

/* ---- bitmaps ---- */

/* As the size of the disk asks for, but one that is in use may be what it was for another size. */
static bool bitmap_makes_sense(const struct see_header *h, const struct see_bitmap *b)
{
    uint64_t granules, bytes;

    if (b->type != 1 || b->granularity_bits < 9 || b->granularity_bits > 31 || !b->name_len ||
        b->name_len > 1023 || b->extra_len || b->flags > 3 || !b->entries || !b->table)
        return false;
    granules = (h->size + ((uint64_t)1 << b->granularity_bits) - 1) >> b->granularity_bits;
    bytes = (granules + 7) / 8;
    return (b->flags & 1) ||
           b->entries == (bytes + ((uint64_t)1 << h->cluster_bits) - 1) >> h->cluster_bits ||
           (b->entries == 1 && !bytes);
}

static int walk_bitmap(struct walk *w, const struct see_bitmap *b, uint64_t number)
{
    if (!refer(w, b->table, (b->entries * 8 + w->cluster - 1) / w->cluster, USE_META,
               "table of bitmap", number))
        return 0;
    for (uint64_t i = 0; i < b->entries; i++) {
        uint64_t entry;
        int r = see_entry(w->f, b->table + i * 8, &entry);

        if (r < 0)
            return r;
        if (entry == 0 || entry == 1)
            continue;
        if (entry & ~(uint64_t)L1_OFFSET)
            found(w, QCOW2_ERROR_BITMAP, "bitmap %" PRIu64 " has entry %" PRIx64, number, entry);
        (void)refer(w, entry & L1_OFFSET, 1, USE_META, "bits of bitmap", number);
    }
    return 0;
}

static int walk_bitmaps(struct walk *w)
{
    uint64_t at = w->h.bitmaps_offset;
    uint64_t end = at + w->h.bitmaps_len;

    w->now = 0;
    if (!w->h.bitmap_count || !refer(w, at, (w->h.bitmaps_len + w->cluster - 1) / w->cluster,
                                     USE_META, "directory of bitmaps", 0))
        return 0;
    for (uint64_t i = 0; i < w->h.bitmap_count; i++) {
        struct see_bitmap b;
        int r = see_bitmap(w->f, at, &b);

        if (r < 0)
            return r;
        if (b.end > end || !bitmap_makes_sense(&w->h, &b)) {
            found(w, QCOW2_ERROR_BITMAP, "bitmap %" PRIu64 " makes no sense", i + 1);
            return 0;
        }
        r = walk_bitmap(w, &b, i + 1);
        if (r < 0)
            return r;
        at = b.end;
    }
    if (at != end)
        found(w, QCOW2_ERROR_BITMAP, "the directory of bitmaps ends elsewhere");
    return 0;
}

/* ---- refcounts ---- */

static int walk_refcount_table(struct walk *w)
{
    uint64_t entries = w->h.table_clusters * (w->cluster / 8);

    (void)refer(w, w->h.table_offset, w->h.table_clusters, USE_META, "refcount table", 0);
    for (uint64_t i = 0; i < entries; i++) {
        uint64_t entry;
        int r = see_entry(w->f, w->h.table_offset + i * 8, &entry);

        if (r < 0)
            return r;
        if (entry & TABLE_RESERVED)
            found(w, QCOW2_ERROR_RESERVED, "refcount table entry %" PRIu64 ": %" PRIx64, i, entry);
        entry &= ~TABLE_RESERVED;
        if (entry == 0)
            continue;
        w->v->refcount_blocks++;
        (void)refer(w, entry, 1, USE_META, "refcount block", i);
    }
    return 0;
}

/* Refcounts of all clusters of the file, and of what the refcount blocks cover beyond its end. */
static int compare_refcounts(struct walk *w)
{
    uint64_t per_block = w->cluster * 8 >> w->h.refcount_order;
    uint64_t entries = w->h.table_clusters * (w->cluster / 8);

    for (uint64_t i = 0; i < entries || i * per_block < w->clusters; i++) {
        uint64_t block = 0;
        int r = i < entries ? see_entry(w->f, w->h.table_offset + i * 8, &block) : 0;

        if (r < 0)
            return r;
        if ((block & ~TABLE_RESERVED) == 0 && i * per_block >= w->clusters)
            continue;
        for (uint64_t n = i * per_block; n < (i + 1) * per_block; n++) {
            uint64_t references = n < w->clusters ? w->references[n] : 0;
            uint64_t count;

            r = stored_refcount(w, n, &count);
            if (r < 0)
                return r;
            w->v->leaks_beyond += n >= w->clusters && count > 0;
            if (count < references)
                found(w, QCOW2_ERROR_REFCOUNT_LOW,
                      "cluster %" PRIu64 ": refcount %" PRIu64 ", references %" PRIu64, n, count,
                      references);
            else if (count > references)
                leaked(w, "cluster %" PRIu64 ": refcount %" PRIu64 ", references %" PRIu64, n,
                       count, references);
        }
    }
    return 0;
}

static void describe(struct walk *w)
{
    w->v->version = w->h.version;
    w->v->cluster_bits = w->h.cluster_bits;
    w->v->refcount_bits = 1u << w->h.refcount_order;
    w->v->virtual_size = w->h.size;
    w->v->autoclear = w->h.autoclear;
    w->v->l1_entries = w->h.l1_entries;
    w->v->snapshots = w->h.snapshot_count;
    w->v->has_data_file = see_has_data_file(&w->h);
    w->v->bitmaps = w->h.bitmap_count;
    w->v->refcount_table_clusters = w->h.table_clusters;
}

static void release(struct walk *w)
{
    free(w->references);
    free(w->walk);
    free(w->use);
    free(w->block);
}

int qcow2_check(const struct qcow2_file *f, struct qcow2_verdict *ret)
{
    struct walk w = {.f = f, .v = ret};
    int r;

    memset(ret, 0, sizeof(*ret));
    r = see_header(f, &w.h, ret);
    if (r < 0)
        return r;
    describe(&w);
    w.cluster = (uint64_t)1 << w.h.cluster_bits;
    w.clusters = f->size / w.cluster + (f->size % w.cluster ? 1 : 0);
    if (w.clusters > CLUSTERS_MAX)
        return see_refuse(ret, EOPNOTSUPP, "%" PRIu64 " clusters are too many", w.clusters);
    w.references = calloc(w.clusters, sizeof(*w.references));
    w.walk = calloc(w.clusters, sizeof(*w.walk));
    w.use = calloc(w.clusters, sizeof(*w.use));
    w.block = malloc(w.cluster);
    if (!w.references || !w.walk || !w.use || !w.block) {
        release(&w);
        return -ENOMEM;
    }
    if (w.h.incompatible & ~(uint64_t)INCOMPAT_FINE)
        found(&w, QCOW2_ERROR_DIRTY, "it is marked as dirty or corrupt: %" PRIx64,
              w.h.incompatible);
    (void)refer(&w, 0, 1, USE_META, "header", 0);
    if (w.h.encrypted)
        (void)refer(&w, w.h.luks_offset, (w.h.luks_len + w.cluster - 1) / w.cluster, USE_META,
                    "LUKS header", 0);
    r = walk_refcount_table(&w);
    if (r == 0)
        r = walk_l1(&w, 1, w.h.l1_offset, w.h.l1_entries);
    if (r == 0)
        r = walk_snapshots(&w);
    if (r == 0)
        r = walk_bitmaps(&w);
    if (r == 0)
        r = compare_refcounts(&w);
    release(&w);
    return r;
}
