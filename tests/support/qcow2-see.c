/* SPDX-License-Identifier: Apache-2.0 */
/* What a qcow2 image says, for the judge: its header, the entries of its tables, the names and bits that they lead to. */
#include "qcow2-see.h"

#include "base/endian.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define EXTENSION_BITMAPS 0x23852875u
#define EXTENSION_LUKS    0x0537be77u
#define EXTENSION_DATA    0x44415441u

bool see_has_data_file(const struct see_header *h)
{
    return h->incompatible & INCOMPAT_DATA;
}

uint64_t see_table_entries(const struct see_header *h)
{
    return ((uint64_t)1 << h->cluster_bits) / h->l2_entry;
}

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

int see_bytes(const struct qcow2_file *f, uint64_t offset, void *buf, size_t len)
{
    size_t there = 0;

    if (offset < f->size)
        there = f->size - offset < len ? (size_t)(f->size - offset) : len;
    memset((char *)buf + there, 0, len - there);
    return there ? f->read(f->arg, offset, buf, there) : 0;
}

int see_entry(const struct qcow2_file *f, uint64_t offset, uint64_t *ret)
{
    uint8_t bytes[8];
    int r = see_bytes(f, offset, bytes, sizeof(bytes));

    *ret = load_be64(bytes);
    return r;
}

/* ---- what is said of it ---- */

void __attribute__((format(printf, 2, 0)))
see_say(struct qcow2_verdict *v, const char *fmt, va_list args)
{
    size_t used = strlen(v->text);

    if (used + 120 > sizeof(v->text))
        return;
    (void)vsnprintf(v->text + used, sizeof(v->text) - used - 1, fmt, args);
    strcat(v->text, "\n");
}

int __attribute__((format(printf, 3, 4)))
see_refuse(struct qcow2_verdict *v, int error, const char *fmt, ...)
{
    va_list args;

    va_start(args, fmt);
    see_say(v, fmt, args);
    va_end(args);
    return -error;
}

/* ---- the header ---- */

/* Without the autoclear bit it says nothing. */
static int look_at_bitmaps(const struct qcow2_file *f, struct see_header *h, uint64_t at,
                           uint64_t len, struct qcow2_verdict *v)
{
    uint8_t b[24];
    int r = see_bytes(f, at, b, sizeof(b));

    if (r < 0 || !(h->autoclear & 1))
        return r;
    h->bitmap_count = load_be32(b);
    h->bitmaps_len = load_be64(b + 8);
    h->bitmaps_offset = load_be64(b + 16);
    if (len != 24 || load_be32(b + 4) || !h->bitmap_count || h->bitmap_count > 65535 ||
        h->bitmaps_len > (uint64_t)64 << 20)
        return see_refuse(v, EINVAL, "the extension for bitmaps makes no sense");
    return 0;
}

static int look_at_extensions(const struct qcow2_file *f, struct see_header *h, uint64_t at,
                              struct qcow2_verdict *v)
{
    uint64_t end = (uint64_t)1 << h->cluster_bits;

    h->bitmap_count = 0;
    while (at + 8 <= end) {
        uint8_t head[8];
        uint8_t place[16];
        int r = see_bytes(f, at, head, sizeof(head));

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
            r = see_bytes(f, at + 8, place, sizeof(place));
            if (r < 0)
                return r;
            h->luks_offset = load_be64(place);
            h->luks_len = load_be64(place + 8);
        }
        at += 8 + (((uint64_t)load_be32(head + 4) + 7) & ~(uint64_t)7);
        if (at > end)
            return see_refuse(v, EINVAL, "a header extension ends beyond the first cluster");
    }
    if ((h->autoclear & 1) && !h->bitmap_count)
        return see_refuse(v, EINVAL, "there are bitmaps, says a bit, but no extension");
    return 0;
}

static int check_header_sense(const struct qcow2_file *f, const struct see_header *h,
                              struct qcow2_verdict *v)
{
    uint64_t cluster = (uint64_t)1 << h->cluster_bits;
    uint64_t l2_covers = cluster * see_table_entries(h);
    uint64_t needed = h->size / l2_covers + (h->size % l2_covers ? 1 : 0);

    if (h->l1_entries < needed)
        return see_refuse(v, EINVAL, "L1 has %" PRIu64 " entries, the size needs %" PRIu64,
                          h->l1_entries, needed);
    if (h->l1_offset % cluster || h->table_offset % cluster)
        return see_refuse(v, EINVAL, "L1 or refcount table is misaligned");
    if (h->l1_entries && (h->l1_offset == 0 || h->l1_offset > f->size ||
                          h->l1_entries > (f->size + cluster - h->l1_offset) / 8))
        return see_refuse(v, EINVAL, "L1 is not in the file");
    if (h->table_offset == 0 || h->table_offset > f->size || h->table_clusters == 0 ||
        h->table_clusters > (f->size - h->table_offset + cluster - 1) / cluster)
        return see_refuse(v, EINVAL, "the refcount table is not in the file");
    return 0;
}

int see_header(const struct qcow2_file *f, struct see_header *h, struct qcow2_verdict *v)
{
    uint8_t b[112];
    uint64_t len = 72;
    int r = see_bytes(f, 0, b, sizeof(b));

    if (r < 0)
        return r;
    if (load_be32(b) != 0x514649fbu)
        return see_refuse(v, EINVAL, "no magic");
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
        return see_refuse(v, EINVAL, "version %u", h->version);
    if (h->cluster_bits < 9 || h->cluster_bits > 21)
        return see_refuse(v, EINVAL, "cluster_bits %u", h->cluster_bits);
    if (h->version == 3) {
        h->incompatible = load_be64(b + 72);
        h->autoclear = load_be64(b + 88);
        h->refcount_order = load_be32(b + 96);
        len = load_be32(b + 100);
        if (h->refcount_order > 6 || len < 104 || len % 8 || len > (uint64_t)1 << h->cluster_bits)
            return see_refuse(v, EINVAL, "refcount_order %u, header length %" PRIu64,
                              h->refcount_order, len);
        h->method = len > 104 ? b[104] : 0;
        if (h->method > METHOD_ZSTD || !(h->incompatible & INCOMPAT_METHOD) != !h->method)
            return see_refuse(v, EOPNOTSUPP, "compression type %u, features %" PRIx64, h->method,
                              h->incompatible);
    }
    h->l2_entry = h->incompatible & INCOMPAT_EXTEND ? 16 : 8;
    if (h->l2_entry == 16 && h->cluster_bits < 14)
        return see_refuse(v, EINVAL, "subclusters, and cluster_bits %u", h->cluster_bits);
    if (h->incompatible & ~(uint64_t)(INCOMPAT_DIRTY | INCOMPAT_BROKEN | INCOMPAT_FINE))
        return see_refuse(v, EOPNOTSUPP, "incompatible features %" PRIx64, h->incompatible);
    if (load_be32(b + 32))
        h->encrypted = true;
    if (load_be32(b + 32) > 2 || load_be32(b + 32) == 1)
        return see_refuse(v, EOPNOTSUPP, "encryption %u", load_be32(b + 32));
    h->snapshot_count = load_be32(b + 60);
    h->snapshots_offset = load_be64(b + 64);
    if (h->snapshot_count > 65536 ||
        (h->snapshot_count && h->snapshots_offset % ((uint64_t)1 << h->cluster_bits)))
        return see_refuse(v, EINVAL, "%" PRIu64 " snapshots at %" PRIx64, h->snapshot_count,
                          h->snapshots_offset);
    r = look_at_extensions(f, h, len, v);
    return r < 0 ? r : check_header_sense(f, h, v);
}

int qcow2_see_data_file(const struct qcow2_file *f, char ret_name[1024])
{
    struct qcow2_verdict ignored = {.errors = 0};
    struct see_header h;
    int r = see_header(f, &h, &ignored);

    memset(ret_name, 0, 1024);
    if (r < 0 || !see_has_data_file(&h) || !h.data_name)
        return r;
    return h.data_name_len < 1024 ? see_bytes(f, h.data_name, ret_name, h.data_name_len) : -EINVAL;
}

/* ---- entries of L2 tables ---- */

void see_compressed(unsigned cluster_bits, uint64_t entry, uint64_t *ret_offset, uint64_t *ret_len)
{
    unsigned x = 62 - (cluster_bits - 8);

    *ret_offset = entry & (((uint64_t)1 << x) - 1);
    *ret_len = (((entry & (L2_COMPRESSED - 1)) >> x) + 1) * 512 - *ret_offset % 512;
}

/* ---- snapshots ---- */

int see_next_snapshot(const struct qcow2_file *f, const struct see_header *h,
                      struct see_snapshot *ret)
{
    uint64_t at = ret->at ? (ret->at + ret->len + 7) / 8 * 8 : h->snapshots_offset;
    uint8_t b[40 + 16];
    uint64_t extra;
    int r = see_bytes(f, at, b, sizeof(b));

    if (r < 0)
        return r;
    extra = load_be32(b + 36);
    *ret = (struct see_snapshot){
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

int see_snapshot(const struct qcow2_file *f, const struct see_header *h, unsigned number,
                 struct see_snapshot *ret)
{
    int r = number && number <= h->snapshot_count ? 1 : -ENOENT;

    *ret = (struct see_snapshot){.at = 0};
    for (unsigned i = 0; i < number && r == 1; i++)
        r = see_next_snapshot(f, h, ret);
    return r == 0 ? -EINVAL : r < 0 ? r : 0;
}

int qcow2_see_snapshot(const struct qcow2_file *f, unsigned number, struct qcow2_snapshot_seen *ret)
{
    struct qcow2_verdict ignored = {.errors = 0};
    uint64_t names;
    struct see_header h;
    struct see_snapshot e = {.at = 0};
    int r = see_header(f, &h, &ignored);

    memset(ret, 0, sizeof(*ret));
    if (r == 0)
        r = see_snapshot(f, &h, number, &e);
    if (r < 0)
        return r;
    ret->disk_size = e.disk_size == NO_SIZE ? h.size : e.disk_size;
    if (e.id_len >= sizeof(ret->id) || e.name_len >= sizeof(ret->name))
        return -EINVAL;
    names = e.at + e.len - e.id_len - e.name_len;
    r = see_bytes(f, names, ret->id, e.id_len);
    return r < 0 ? r : see_bytes(f, names + e.id_len, ret->name, e.name_len);
}

/* ---- bitmaps ---- */

int see_bitmap(const struct qcow2_file *f, uint64_t at, struct see_bitmap *ret)
{
    uint8_t b[24];
    int r = see_bytes(f, at, b, sizeof(b));

    *ret = (struct see_bitmap){
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

/* What lies beyond `bytes` must be clean. */
static int read_bits(const struct qcow2_file *f, const struct see_header *h,
                     const struct see_bitmap *b, uint8_t *bits, size_t bytes)
{
    size_t cluster = (size_t)1 << h->cluster_bits;
    uint8_t *piece = malloc(cluster);
    int r = piece ? 0 : -ENOMEM;

    memset(bits, 0, bytes);
    for (uint64_t i = 0; i < b->entries && r == 0; i++) {
        uint64_t entry = 0;
        size_t left = i * cluster < bytes ? bytes - (size_t)(i * cluster) : 0;

        r = see_entry(f, b->table + i * 8, &entry);
        if (r < 0 || !entry)
            continue;
        memset(piece, 0xff, cluster);
        if (entry != 1)
            r = see_bytes(f, entry & L1_OFFSET, piece, cluster);
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
    struct see_bitmap b = {.end = 0};
    struct see_header h;
    int r = see_header(f, &h, &ignored);

    memset(ret, 0, sizeof(*ret));
    if (r == 0 && (!number || number > h.bitmap_count))
        r = -ENOENT;
    for (unsigned i = 0; i < number && r == 0; i++)
        r = see_bitmap(f, i ? b.end : h.bitmaps_offset, &b);
    if (r < 0)
        return r;
    if (b.name_len >= sizeof(ret->name))
        return -EINVAL;
    ret->in_use = b.flags & 1;
    ret->enabled = b.flags & 2;
    ret->granularity_bits = b.granularity_bits;
    r = see_bytes(f, b.name, ret->name, (size_t)b.name_len);
    return r < 0 || ret->in_use ? r : read_bits(f, &h, &b, bits, bytes);
}
