/* SPDX-License-Identifier: Apache-2.0 */
/* An independent judge of qcow2 images: counts references and compares them with what the image says. */
#include "qcow2-check.h"

#include "base/endian.h"

#include <errno.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include <zlib.h>
#include <zstd.h>

#define CLUSTERS_MAX ((uint64_t)1 << 26) /* of the file: memory for the references */

#define L1_OFFSET       0x00fffffffffffe00u
#define L1_RESERVED     0x7f000000000001ffu
#define L2_RESERVED     0x3f000000000001feu
#define L2_COMPRESSED   ((uint64_t)1 << 62)
#define FLAG_COPIED     ((uint64_t)1 << 63)
#define FLAG_ZERO       ((uint64_t)1)
#define TABLE_RESERVED  ((uint64_t)0x1ff)
#define INCOMPAT_DIRTY  1u
#define INCOMPAT_BROKEN 2u
#define INCOMPAT_METHOD 8u
#define INCOMPAT_DATA   4u
#define INCOMPAT_EXTEND 16u
#define INCOMPAT_FINE   (INCOMPAT_METHOD | INCOMPAT_DATA | INCOMPAT_EXTEND)

#define METHOD_ZSTD 1

#define EXTENSION_BITMAPS 0x23852875u
#define EXTENSION_LUKS    0x0537be77u
#define EXTENSION_DATA    0x44415441u

struct header {
    unsigned version;
    unsigned cluster_bits;
    unsigned refcount_order;
    unsigned method; /* of compression */
    uint64_t size;
    uint64_t l1_offset;
    uint64_t l1_entries;
    uint64_t table_offset;
    uint64_t table_clusters;
    uint64_t incompatible;
    uint64_t autoclear;
    uint64_t snapshot_count;
    uint64_t snapshots_offset;
    unsigned l2_entry; /* bytes */
    bool encrypted;
    uint64_t luks_offset;
    uint64_t luks_len;
    uint64_t data_name; /* where the name of the data file is; 0: it has none */
    uint64_t data_name_len;
    uint64_t bitmap_count; /* 0: there are none that count */
    uint64_t bitmaps_offset;
    uint64_t bitmaps_len;
};

static bool has_data_file(const struct header *h)
{
    return h->incompatible & INCOMPAT_DATA;
}

/* What is mapped as a whole. */
static uint64_t unit_of(const struct header *h)
{
    return ((uint64_t)1 << h->cluster_bits) / (h->l2_entry == 16 ? 32 : 1);
}

static uint64_t table_entries(const struct header *h)
{
    return ((uint64_t)1 << h->cluster_bits) / h->l2_entry;
}

/* An entry of the table of snapshots. */
struct entry {
    uint64_t at; /* in the file */
    uint64_t len;
    uint64_t l1_offset;
    uint64_t l1_entries;
    uint64_t disk_size; /* NO_SIZE: it does not say */
    unsigned id_len;
    unsigned name_len;
};

#define NO_SIZE UINT64_MAX

/* What a cluster is used for: for one thing; by compressed bytes as often as there are some that touch it. */
enum use { USE_NOTHING, USE_META, USE_L2, USE_DATA, USE_COMPRESSED };

struct walk {
    const struct qcow2_file *f;
    struct header h;
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

/* ---- files ---- */

static int read_memory(void *arg, uint64_t offset, void *buf, size_t len)
{
    memcpy(buf, (const char *)arg + offset, len);
    return 0;
}

struct qcow2_file qcow2_file_in_memory(const void *bytes, uint64_t size)
{
    return (struct qcow2_file){read_memory, (void *)(uintptr_t)bytes, size};
}

static int read_fd(void *arg, uint64_t offset, void *buf, size_t len)
{
    ssize_t n = pread(*(int *)arg, buf, len, (off_t)offset);

    if (n < 0)
        return -errno;
    return (size_t)n == len ? 0 : -EIO;
}

struct qcow2_file qcow2_file_of_fd(int *fd)
{
    struct stat st = {.st_size = 0};

    if (fstat(*fd, &st) < 0)
        st.st_size = 0;
    return (struct qcow2_file){read_fd, fd, (uint64_t)st.st_size};
}

/* Beyond the end of the file there are zeroes: its last cluster may be there in part. */
static int file_read(const struct qcow2_file *f, uint64_t offset, void *buf, size_t len)
{
    size_t there = 0;

    if (offset < f->size)
        there = f->size - offset < len ? (size_t)(f->size - offset) : len;
    memset((char *)buf + there, 0, len - there);
    return there ? f->read(f->arg, offset, buf, there) : 0;
}

static int file_entry(const struct qcow2_file *f, uint64_t offset, uint64_t *ret)
{
    uint8_t bytes[8];
    int r = file_read(f, offset, bytes, sizeof(bytes));

    *ret = load_be64(bytes);
    return r;
}

/* ---- findings ---- */

static void __attribute__((format(printf, 2, 0)))
say(struct qcow2_verdict *v, const char *fmt, va_list args)
{
    size_t used = strlen(v->text);

    if (used + 120 > sizeof(v->text))
        return;
    (void)vsnprintf(v->text + used, sizeof(v->text) - used - 1, fmt, args);
    strcat(v->text, "\n");
}

static int __attribute__((format(printf, 3, 4)))
unjudged(struct qcow2_verdict *v, int error, const char *fmt, ...)
{
    va_list args;

    va_start(args, fmt);
    say(v, fmt, args);
    va_end(args);
    return -error;
}

static void __attribute__((format(printf, 3, 4)))
found(struct walk *w, enum qcow2_error kind, const char *fmt, ...)
{
    va_list args;

    w->v->errors++;
    w->v->by_kind[kind]++;
    va_start(args, fmt);
    say(w->v, fmt, args);
    va_end(args);
}

static void __attribute__((format(printf, 2, 3))) leaked(struct walk *w, const char *fmt, ...)
{
    va_list args;

    w->v->leaks++;
    va_start(args, fmt);
    say(w->v, fmt, args);
    va_end(args);
}

/* ---- the header ---- */

/* Without the autoclear bit it says nothing. */
static int look_at_bitmaps(const struct qcow2_file *f, struct header *h, uint64_t at, uint64_t len,
                           struct qcow2_verdict *v)
{
    uint8_t b[24];
    int r = file_read(f, at, b, sizeof(b));

    if (r < 0 || !(h->autoclear & 1))
        return r;
    h->bitmap_count = load_be32(b);
    h->bitmaps_len = load_be64(b + 8);
    h->bitmaps_offset = load_be64(b + 16);
    if (len != 24 || load_be32(b + 4) || !h->bitmap_count || h->bitmap_count > 65535 ||
        h->bitmaps_len > (uint64_t)64 << 20)
        return unjudged(v, EINVAL, "the extension for bitmaps makes no sense");
    return 0;
}

static int look_at_extensions(const struct qcow2_file *f, struct header *h, uint64_t at,
                              struct qcow2_verdict *v)
{
    uint64_t end = (uint64_t)1 << h->cluster_bits;

    h->bitmap_count = 0;
    while (at + 8 <= end) {
        uint8_t head[8];
        uint8_t place[16];
        int r = file_read(f, at, head, sizeof(head));

        if (r < 0)
            return r;
        if (load_be32(head) == 0)
            break;
        if (load_be32(head) == EXTENSION_BITMAPS)
            r = look_at_bitmaps(f, h, at + 8, load_be32(head + 4), v);
        if (r < 0)
            return r;
        if (load_be32(head) == EXTENSION_DATA) {
            h->data_name = at + 8;
            h->data_name_len = load_be32(head + 4);
        }
        if (load_be32(head) == EXTENSION_LUKS) {
            r = file_read(f, at + 8, place, sizeof(place));
            if (r < 0)
                return r;
            h->luks_offset = load_be64(place);
            h->luks_len = load_be64(place + 8);
        }
        at += 8 + (((uint64_t)load_be32(head + 4) + 7) & ~(uint64_t)7);
        if (at > end)
            return unjudged(v, EINVAL, "a header extension ends beyond the first cluster");
    }
    if ((h->autoclear & 1) && !h->bitmap_count)
        return unjudged(v, EINVAL, "there are bitmaps, says a bit, but no extension");
    return 0;
}

static int check_header_sense(const struct qcow2_file *f, const struct header *h,
                              struct qcow2_verdict *v)
{
    uint64_t cluster = (uint64_t)1 << h->cluster_bits;
    uint64_t l2_covers = cluster * table_entries(h);
    uint64_t needed = h->size / l2_covers + (h->size % l2_covers ? 1 : 0);

    if (h->l1_entries < needed)
        return unjudged(v, EINVAL, "L1 has %" PRIu64 " entries, the size needs %" PRIu64,
                        h->l1_entries, needed);
    if (h->l1_offset % cluster || h->table_offset % cluster)
        return unjudged(v, EINVAL, "L1 or refcount table is misaligned");
    if (h->l1_entries && (h->l1_offset == 0 || h->l1_offset > f->size ||
                          h->l1_entries > (f->size + cluster - h->l1_offset) / 8))
        return unjudged(v, EINVAL, "L1 is not in the file");
    if (h->table_offset == 0 || h->table_offset > f->size || h->table_clusters == 0 ||
        h->table_clusters > (f->size - h->table_offset + cluster - 1) / cluster)
        return unjudged(v, EINVAL, "the refcount table is not in the file");
    return 0;
}

static int read_header(const struct qcow2_file *f, struct header *h, struct qcow2_verdict *v)
{
    uint8_t b[112];
    uint64_t len = 72;
    int r = file_read(f, 0, b, sizeof(b));

    if (r < 0)
        return r;
    if (load_be32(b) != 0x514649fbu)
        return unjudged(v, EINVAL, "no magic");
    h->version = load_be32(b + 4);
    h->cluster_bits = load_be32(b + 20);
    h->refcount_order = 4;
    h->size = load_be64(b + 24);
    h->l1_entries = load_be32(b + 36);
    h->l1_offset = load_be64(b + 40);
    h->table_offset = load_be64(b + 48);
    h->table_clusters = load_be32(b + 56);
    h->incompatible = h->autoclear = h->data_name = 0;
    if (h->version != 2 && h->version != 3)
        return unjudged(v, EINVAL, "version %u", h->version);
    if (h->cluster_bits < 9 || h->cluster_bits > 21)
        return unjudged(v, EINVAL, "cluster_bits %u", h->cluster_bits);
    if (h->version == 3) {
        h->incompatible = load_be64(b + 72);
        h->autoclear = load_be64(b + 88);
        h->refcount_order = load_be32(b + 96);
        len = load_be32(b + 100);
        if (h->refcount_order > 6 || len < 104 || len % 8 || len > (uint64_t)1 << h->cluster_bits)
            return unjudged(v, EINVAL, "refcount_order %u, header length %" PRIu64,
                            h->refcount_order, len);
        h->method = len > 104 ? b[104] : 0;
        if (h->method > METHOD_ZSTD || !(h->incompatible & INCOMPAT_METHOD) != !h->method)
            return unjudged(v, EOPNOTSUPP, "compression type %u, features %" PRIx64, h->method,
                            h->incompatible);
    }
    h->l2_entry = h->incompatible & INCOMPAT_EXTEND ? 16 : 8;
    if (h->l2_entry == 16 && h->cluster_bits < 14)
        return unjudged(v, EINVAL, "subclusters, and cluster_bits %u", h->cluster_bits);
    if (h->incompatible & ~(uint64_t)(INCOMPAT_DIRTY | INCOMPAT_BROKEN | INCOMPAT_FINE))
        return unjudged(v, EOPNOTSUPP, "incompatible features %" PRIx64, h->incompatible);
    if (load_be32(b + 32))
        h->encrypted = true;
    if (load_be32(b + 32) > 2 || load_be32(b + 32) == 1)
        return unjudged(v, EOPNOTSUPP, "encryption %u", load_be32(b + 32));
    h->snapshot_count = load_be32(b + 60);
    h->snapshots_offset = load_be64(b + 64);
    if (h->snapshot_count > 65536 ||
        (h->snapshot_count && h->snapshots_offset % ((uint64_t)1 << h->cluster_bits)))
        return unjudged(v, EINVAL, "%" PRIu64 " snapshots at %" PRIx64, h->snapshot_count,
                        h->snapshots_offset);
    r = look_at_extensions(f, h, len, v);
    return r < 0 ? r : check_header_sense(f, h, v);
}

/* ---- references ---- */

/* Does a cluster of the file hold nothing but zeroes? Several guest clusters may share such a one, if none may write to it. */
static bool is_zeroes(const struct walk *w, uint64_t n)
{
    uint8_t *bytes = malloc(w->cluster);
    bool zero = bytes && file_read(w->f, n * w->cluster, bytes, w->cluster) == 0;

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
    r = file_entry(w->f, w->h.table_offset + index * 8, &block);
    block &= ~TABLE_RESERVED;
    if (r < 0 || block == 0 || block % w->cluster || block >= w->f->size)
        return r;
    if (block != w->block_at) {
        w->block_at = 0;
        r = file_read(w->f, block, w->block, w->cluster);
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

/* The sectors that hold the compressed bytes; they begin anywhere in the first one. */
static void compressed_place(unsigned cluster_bits, uint64_t entry, uint64_t *ret_offset,
                             uint64_t *ret_len)
{
    unsigned x = 62 - (cluster_bits - 8);

    *ret_offset = entry & (((uint64_t)1 << x) - 1);
    *ret_len = (((entry & (L2_COMPRESSED - 1)) >> x) + 1) * 512 - *ret_offset % 512;
}

static void walk_compressed(struct walk *w, uint64_t entry, uint64_t guest)
{
    uint64_t offset, len, first, last;

    compressed_place(w->h.cluster_bits, entry, &offset, &len);
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
    bool external = has_data_file(&w->h);

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
    uint64_t entries = table_entries(&w->h);
    unsigned bytes = w->h.l2_entry;
    uint8_t *table = malloc(w->cluster);
    int r = table ? file_read(w->f, l2, table, w->cluster) : -ENOMEM;

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
        int r = file_entry(w->f, l1_offset + i * 8, &entry);

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

/* The next entry after *ret; zeroed, *ret is before the first one. 1: there is one, 0: it makes no sense. */
static int next_snapshot(const struct qcow2_file *f, const struct header *h, struct entry *ret)
{
    uint64_t at = ret->at ? (ret->at + ret->len + 7) / 8 * 8 : h->snapshots_offset;
    uint8_t b[40 + 16];
    uint64_t extra;
    int r = file_read(f, at, b, sizeof(b));

    if (r < 0)
        return r;
    extra = load_be32(b + 36);
    *ret = (struct entry){
        .at = at,
        .l1_offset = load_be64(b),
        .l1_entries = load_be32(b + 8),
        .disk_size = extra >= 16 ? load_be64(b + 48) : NO_SIZE,
        .id_len = load_be16(b + 12),
        .name_len = load_be16(b + 14),
    };
    ret->len = 40 + extra + ret->id_len + ret->name_len;
    if (extra > 1024 || at + ret->len > f->size || ret->l1_entries > ((uint64_t)32 << 20) / 8 ||
        (h->version > 2 && extra < 16))
        return 0;
    return ret->l1_offset % ((uint64_t)1 << h->cluster_bits) == 0;
}

/* By number, from 1 on. */
static int find_snapshot(const struct qcow2_file *f, const struct header *h, unsigned number,
                         struct entry *ret)
{
    int r = number && number <= h->snapshot_count ? 1 : -ENOENT;

    *ret = (struct entry){.at = 0};
    for (unsigned i = 0; i < number && r == 1; i++)
        r = next_snapshot(f, h, ret);
    return r == 0 ? -EINVAL : r < 0 ? r : 0;
}

static int walk_snapshots(struct walk *w)
{
    struct entry e = {.at = 0};
    uint64_t end = w->h.snapshots_offset;
    int r = 0;

    for (uint32_t i = 0; i < w->h.snapshot_count; i++) {
        r = next_snapshot(w->f, &w->h, &e);
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

int qcow2_see_data_file(const struct qcow2_file *f, char ret_name[1024])
{
    struct qcow2_verdict ignored = {.errors = 0};
    struct header h;
    int r = read_header(f, &h, &ignored);

    memset(ret_name, 0, 1024);
    if (r < 0 || !has_data_file(&h) || !h.data_name)
        return r;
    return h.data_name_len < 1024 ? file_read(f, h.data_name, ret_name, h.data_name_len) : -EINVAL;
}

int qcow2_see_snapshot(const struct qcow2_file *f, unsigned number, struct qcow2_snapshot_seen *ret)
{
    struct qcow2_verdict ignored = {.errors = 0};
    uint64_t names;
    struct header h;
    struct entry e = {.at = 0};
    int r = read_header(f, &h, &ignored);

    memset(ret, 0, sizeof(*ret));
    if (r == 0)
        r = find_snapshot(f, &h, number, &e);
    if (r < 0)
        return r;
    ret->disk_size = e.disk_size == NO_SIZE ? h.size : e.disk_size;
    if (e.id_len >= sizeof(ret->id) || e.name_len >= sizeof(ret->name))
        return -EINVAL;
    names = e.at + e.len - e.id_len - e.name_len;
    r = file_read(f, names, ret->id, e.id_len);
    return r < 0 ? r : file_read(f, names + e.id_len, ret->name, e.name_len);
}

/* ---- bitmaps ---- */

/* An entry of the directory. */
struct bitmap {
    uint64_t table;
    uint64_t entries;
    uint64_t flags;
    unsigned type;
    unsigned granularity_bits;
    uint64_t name_len;
    uint64_t extra_len;
    uint64_t name; /* in the file */
    uint64_t end;
};

static int read_bitmap(const struct qcow2_file *f, uint64_t at, struct bitmap *ret)
{
    uint8_t b[24];
    int r = file_read(f, at, b, sizeof(b));

    *ret = (struct bitmap){
        .table = load_be64(b),
        .entries = load_be32(b + 8),
        .flags = load_be32(b + 12),
        .type = b[16],
        .granularity_bits = b[17],
        .name_len = load_be16(b + 18),
        .extra_len = load_be32(b + 20),
    };
    ret->name = at + 24 + ret->extra_len;
    ret->end = at + (24 + ret->extra_len + ret->name_len + 7) / 8 * 8;
    return r;
}

/* As the size of the disk asks for, but one that is in use may be what it was for another size. */
static bool bitmap_makes_sense(const struct header *h, const struct bitmap *b)
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

static int walk_bitmap(struct walk *w, const struct bitmap *b, uint64_t number)
{
    if (!refer(w, b->table, (b->entries * 8 + w->cluster - 1) / w->cluster, USE_META,
               "table of bitmap", number))
        return 0;
    for (uint64_t i = 0; i < b->entries; i++) {
        uint64_t entry;
        int r = file_entry(w->f, b->table + i * 8, &entry);

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
        struct bitmap b;
        int r = read_bitmap(w->f, at, &b);

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

/* What lies beyond `bytes` must be clean. */
static int read_bits(const struct qcow2_file *f, const struct header *h, const struct bitmap *b,
                     uint8_t *bits, size_t bytes)
{
    size_t cluster = (size_t)1 << h->cluster_bits;
    uint8_t *piece = malloc(cluster);
    int r = piece ? 0 : -ENOMEM;

    memset(bits, 0, bytes);
    for (uint64_t i = 0; i < b->entries && r == 0; i++) {
        uint64_t entry = 0;
        size_t left = i * cluster < bytes ? bytes - (size_t)(i * cluster) : 0;

        r = file_entry(f, b->table + i * 8, &entry);
        if (r < 0 || !entry)
            continue;
        memset(piece, 0xff, cluster);
        if (entry != 1)
            r = file_read(f, entry & L1_OFFSET, piece, cluster);
        for (size_t k = left; k < cluster; k++)
            r = r == 0 && piece[k] ? -EINVAL : r;
        if (left)
            memcpy(bits + i * cluster, piece, left < cluster ? left : cluster);
    }
    free(piece);
    return r;
}

int qcow2_see_bitmap(const struct qcow2_file *f, unsigned number, struct qcow2_bitmap_seen *ret,
                     void *bits, size_t bytes)
{
    struct qcow2_verdict ignored = {.errors = 0};
    struct bitmap b = {.end = 0};
    struct header h;
    int r = read_header(f, &h, &ignored);

    memset(ret, 0, sizeof(*ret));
    if (r == 0 && (!number || number > h.bitmap_count))
        r = -ENOENT;
    for (unsigned i = 0; i < number && r == 0; i++)
        r = read_bitmap(f, i ? b.end : h.bitmaps_offset, &b);
    if (r < 0)
        return r;
    if (b.name_len >= sizeof(ret->name))
        return -EINVAL;
    ret->in_use = b.flags & 1;
    ret->enabled = b.flags & 2;
    ret->granularity_bits = b.granularity_bits;
    r = file_read(f, b.name, ret->name, (size_t)b.name_len);
    return r < 0 || ret->in_use ? r : read_bits(f, &h, &b, bits, bytes);
}

/* ---- refcounts ---- */

static int walk_refcount_table(struct walk *w)
{
    uint64_t entries = w->h.table_clusters * (w->cluster / 8);

    (void)refer(w, w->h.table_offset, w->h.table_clusters, USE_META, "refcount table", 0);
    for (uint64_t i = 0; i < entries; i++) {
        uint64_t entry;
        int r = file_entry(w->f, w->h.table_offset + i * 8, &entry);

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
        int r = i < entries ? file_entry(w->f, w->h.table_offset + i * 8, &block) : 0;

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
    w->v->has_data_file = has_data_file(&w->h);
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
    r = read_header(f, &w.h, ret);
    if (r < 0)
        return r;
    describe(&w);
    w.cluster = (uint64_t)1 << w.h.cluster_bits;
    w.clusters = f->size / w.cluster + (f->size % w.cluster ? 1 : 0);
    if (w.clusters > CLUSTERS_MAX)
        return unjudged(ret, EOPNOTSUPP, "%" PRIu64 " clusters are too many", w.clusters);
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

/* ---- reading ---- */

/* What the L2 table says of a guest offset, and with subclusters of these; 0 if there is none. */
static int find_entry(const struct qcow2_file *f, const struct header *h, uint64_t offset,
                      uint64_t *ret, uint64_t *ret_bits)
{
    uint64_t n = offset >> h->cluster_bits;
    uint64_t entries = table_entries(h);
    uint64_t at;
    int r;

    *ret = *ret_bits = 0;
    if (n / entries >= h->l1_entries)
        return 0;
    r = file_entry(f, h->l1_offset + n / entries * 8, ret);
    if (r < 0 || !(*ret & L1_OFFSET)) {
        *ret = 0;
        return r;
    }
    at = (*ret & L1_OFFSET) + n % entries * h->l2_entry;
    r = file_entry(f, at, ret);
    return r < 0 || h->l2_entry == 8 ? r : file_entry(f, at + 8, ret_bits);
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
static int read_compressed(const struct qcow2_file *f, const struct header *h, uint64_t entry,
                           uint8_t *out)
{
    size_t cluster = (size_t)1 << h->cluster_bits;
    uint64_t offset, len;
    uint8_t *in;
    bool fine;
    int r;

    compressed_place(h->cluster_bits, entry, &offset, &len);
    in = malloc((size_t)len);
    if (!in)
        return -ENOMEM;
    r = file_read(f, offset, in, (size_t)len);
    fine = r == 0 && (h->method == METHOD_ZSTD ? unpacks : inflates)(in, (size_t)len, out, cluster);
    free(in);
    return r < 0 ? r : fine ? 0 : -EIO;
}

/* Does it have data there? It may say that there are zeroes. */
static bool has_data(const struct header *h, uint64_t entry, uint64_t bits, unsigned sub,
                     bool *ret_zero)
{
    *ret_zero = h->l2_entry == 16 ? bits >> 32 >> sub & 1 : h->version > 2 && (entry & FLAG_ZERO);
    if (*ret_zero || (h->l2_entry == 16 && !(bits >> sub & 1)))
        return false;
    return entry & L1_OFFSET || (has_data_file(h) && entry & FLAG_COPIED);
}

/* A piece of one subcluster, if it lies in this layer; else 1. The buffer has zeroes. */
static int read_layer(const struct qcow2_layer *layer, const struct header *h, uint64_t offset,
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
        return file_read(has_data_file(h) ? &layer->data : f, (entry & L1_OFFSET) + in_cluster, buf,
                         len);
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

static int read_piece(const struct qcow2_layer *layers, const struct header *headers,
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
            return file_read(f, offset, buf, len);
        r = read_layer(&layers[i], &headers[i], offset, buf, len);
        if (r <= 0)
            return r;
    }
    return 0;
}

/* The header as it was then. */
static int use_snapshot(const struct qcow2_layer *layer, struct header *h)
{
    struct entry e;
    int r = find_snapshot(&layer->file, h, layer->snapshot, &e);

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
    struct header *headers = calloc(count, sizeof(*headers));
    struct qcow2_verdict ignored;
    uint64_t step = (uint64_t)1 << 21;
    int r = headers ? 0 : -ENOMEM;

    for (unsigned i = 0; i < count && r == 0; i++) {
        memset(&ignored, 0, sizeof(ignored));
        if (layers[i].raw)
            continue;
        r = read_header(&layers[i].file, &headers[i], &ignored);
        if (r == 0 && layers[i].snapshot)
            r = use_snapshot(&layers[i], &headers[i]);
        if (r == 0 && has_data_file(&headers[i]) && !layers[i].data.read)
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
