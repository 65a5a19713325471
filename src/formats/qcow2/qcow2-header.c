/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Parsing of qcow2 headers. Nothing is believed (P6): a field is checked before anything is computed from it, in the order
 * fixed fields, tables, extensions, backing file name. The functions below say what is wrong; qcow2_header_parse() puts before
 * it in which image.
 */
#include "formats/qcow2/qcow2-header.h"

#include "base/alloc.h"
#include "base/checked.h"
#include "base/endian.h"
#include "graph/node.h"

#include <assert.h>
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

struct qcow2_source {
    const uint8_t *bytes;
    size_t len;
    uint64_t file_size;
    /* As found in the header; checked when the name is read. */
    uint64_t backing_file_offset;
    uint32_t backing_file_size;
};

const struct qcow2_feature qcow2_features[] = {
    {QCOW2_FEATURE_INCOMPATIBLE, 0, "dirty bit"},
    {QCOW2_FEATURE_INCOMPATIBLE, 1, "corrupt bit"},
    {QCOW2_FEATURE_INCOMPATIBLE, 2, "external data file"},
    {QCOW2_FEATURE_INCOMPATIBLE, 3, "compression type"},
    {QCOW2_FEATURE_INCOMPATIBLE, 4, "extended L2 entries"},
    {QCOW2_FEATURE_COMPATIBLE, 0, "lazy refcounts"},
    {QCOW2_FEATURE_AUTOCLEAR, 0, "bitmaps"},
    {QCOW2_FEATURE_AUTOCLEAR, 1, "raw external data"},
    {0, 0, ""},
};

/* Is it ours at all? Later functions may read QCOW2_HEADER_LENGTH_V2 bytes. */
static int qcow2_header_recognize(const struct qcow2_source *src, struct error **err)
{
    uint32_t magic;

    if (src->file_size == 0)
        return error_set(err, EINVAL, "the file is empty");
    if (src->len < sizeof(magic))
        return error_set(err, EINVAL, "the file has %zu bytes, a header has %d at least", src->len,
                         QCOW2_HEADER_LENGTH_V2);
    magic = load_be32(src->bytes + QCOW2_OFFSET_MAGIC);
    if (magic != QCOW2_MAGIC)
        return error_set(err, EINVAL, "it begins with 0x%08" PRIx32 ", expected 0x%08" PRIx32,
                         magic, QCOW2_MAGIC);
    if (src->len < QCOW2_HEADER_LENGTH_V2)
        return error_set(err, EINVAL,
                         "the header is cut short: the file has %zu bytes, a header %d at least",
                         src->len, QCOW2_HEADER_LENGTH_V2);
    return 0;
}

static int qcow2_header_parse_basics(struct qcow2_header *h, struct qcow2_source *src,
                                     struct error **err)
{
    const uint8_t *b = src->bytes;
    uint32_t version = load_be32(b + QCOW2_OFFSET_VERSION);
    uint32_t cluster_bits = load_be32(b + QCOW2_OFFSET_CLUSTER_BITS);
    uint32_t crypt_method = load_be32(b + QCOW2_OFFSET_CRYPT_METHOD);

    if (version < 2 || version > 3)
        return error_set(err, ENOTSUP, "version is %" PRIu32 ", this program reads 2 and 3",
                         version);
    if (cluster_bits < QCOW2_CLUSTER_BITS_MIN || cluster_bits > QCOW2_CLUSTER_BITS_MAX)
        return error_set(err, EINVAL, "cluster_bits is %" PRIu32 ", expected %d to %d",
                         cluster_bits, QCOW2_CLUSTER_BITS_MIN, QCOW2_CLUSTER_BITS_MAX);
    if (crypt_method > QCOW2_CRYPT_LUKS)
        return error_set(err, EINVAL, "crypt_method is %" PRIu32 ", expected 0 to %d", crypt_method,
                         QCOW2_CRYPT_LUKS);
    h->version = version;
    h->cluster_bits = cluster_bits;
    h->crypt_method = crypt_method;
    h->size = load_be64(b + QCOW2_OFFSET_SIZE);
    if (h->size > NODE_SIZE_MAX)
        return error_set(err, EINVAL, "size is %" PRIu64 " bytes, expected %" PRIu64 " at most",
                         h->size, (uint64_t)NODE_SIZE_MAX);
    src->backing_file_offset = load_be64(b + QCOW2_OFFSET_BACKING_FILE_OFFSET);
    src->backing_file_size = load_be32(b + QCOW2_OFFSET_BACKING_FILE_SIZE);
    return 0;
}

/* If, and only if, the feature says so, there is a type of compression other than 0. */
static int qcow2_header_parse_compression(struct qcow2_header *h, const struct qcow2_source *src,
                                          struct error **err)
{
    bool flagged = h->incompatible & QCOW2_INCOMPATIBLE_COMPRESSION_TYPE;

    if (h->header_length > QCOW2_OFFSET_COMPRESSION_TYPE)
        h->compression_type = src->bytes[QCOW2_OFFSET_COMPRESSION_TYPE];
    if (flagged && h->compression_type == 0)
        return error_set(err, EINVAL,
                         "incompatible feature 3 announces a compression type, but there is none");
    if (!flagged && h->compression_type != 0)
        return error_set(err, EINVAL,
                         "compression_type is %u, expected 0 without incompatible feature 3",
                         h->compression_type);
    return 0;
}

static int qcow2_header_parse_v3(struct qcow2_header *h, const struct qcow2_source *src,
                                 struct error **err)
{
    const uint8_t *b = src->bytes;
    uint32_t refcount_order;

    if (src->len < QCOW2_HEADER_LENGTH_V3_MIN)
        return error_set(
            err, EINVAL,
            "the header is cut short: the file has %zu bytes, a header of version 3 %d at least",
            src->len, QCOW2_HEADER_LENGTH_V3_MIN);
    refcount_order = load_be32(b + QCOW2_OFFSET_REFCOUNT_ORDER);
    h->header_length = load_be32(b + QCOW2_OFFSET_HEADER_LENGTH);
    if (refcount_order > QCOW2_REFCOUNT_ORDER_MAX)
        return error_set(err, EINVAL, "refcount_order is %" PRIu32 ", expected %d at most",
                         refcount_order, QCOW2_REFCOUNT_ORDER_MAX);
    if (h->header_length < QCOW2_HEADER_LENGTH_V3_MIN ||
        !is_aligned(h->header_length, QCOW2_EXTENSION_ALIGN))
        return error_set(err, EINVAL,
                         "header_length is %" PRIu32 ", expected %d or more, a multiple of %d",
                         h->header_length, QCOW2_HEADER_LENGTH_V3_MIN, QCOW2_EXTENSION_ALIGN);
    if (h->header_length > MIN(qcow2_header_cluster_size(h), (uint64_t)src->len))
        return error_set(err, EINVAL,
                         "header_length is %" PRIu32 ", but a cluster has %" PRIu64
                         " bytes, of which the file has %zu that a header may be in",
                         h->header_length, qcow2_header_cluster_size(h), src->len);
    h->refcount_order = refcount_order;
    h->incompatible = load_be64(b + QCOW2_OFFSET_INCOMPATIBLE);
    h->compatible = load_be64(b + QCOW2_OFFSET_COMPATIBLE);
    h->autoclear = load_be64(b + QCOW2_OFFSET_AUTOCLEAR);
    if ((h->incompatible & QCOW2_INCOMPATIBLE_EXTENDED_L2) &&
        h->cluster_bits < QCOW2_CLUSTER_BITS_EXTENDED_L2_MIN)
        return error_set(err, EINVAL,
                         "cluster_bits is %u, expected %d or more with extended L2 entries",
                         h->cluster_bits, QCOW2_CLUSTER_BITS_EXTENDED_L2_MIN);
    return qcow2_header_parse_compression(h, src, err);
}

static int qcow2_header_parse_fields(struct qcow2_header *h, struct qcow2_source *src,
                                     struct error **err)
{
    int r = qcow2_header_parse_basics(h, src, err);

    if (r < 0)
        return r;
    if (h->version >= 3)
        return qcow2_header_parse_v3(h, src, err);
    h->refcount_order = QCOW2_REFCOUNT_ORDER_V2;
    h->header_length = QCOW2_HEADER_LENGTH_V2;
    return 0;
}

static int qcow2_header_parse_l1(struct qcow2_header *h, const struct qcow2_source *src,
                                 struct error **err)
{
    uint64_t needed = qcow2_l1_entries_needed(h->size, h->cluster_bits,
                                              h->incompatible & QCOW2_INCOMPATIBLE_EXTENDED_L2);

    h->l1_size = load_be32(src->bytes + QCOW2_OFFSET_L1_SIZE);
    h->l1_offset = load_be64(src->bytes + QCOW2_OFFSET_L1_OFFSET);
    if (h->l1_size > QCOW2_L1_BYTES_MAX / QCOW2_ENTRY_LEN)
        return error_set(err, EINVAL,
                         "the L1 table has %" PRIu32 " entries, expected %" PRIu64 " at most",
                         h->l1_size, QCOW2_L1_BYTES_MAX / QCOW2_ENTRY_LEN);
    if (h->l1_size < needed)
        return error_set(err, EINVAL,
                         "the L1 table has %" PRIu32 " entries, a disk of %" PRIu64
                         " bytes needs %" PRIu64,
                         h->l1_size, h->size, needed);
    return 0;
}

static int qcow2_header_parse_refcount_table(struct qcow2_header *h, const struct qcow2_source *src,
                                             struct error **err)
{
    uint64_t most = QCOW2_REFCOUNT_TABLE_BYTES_MAX >> h->cluster_bits;

    h->refcount_table_offset = load_be64(src->bytes + QCOW2_OFFSET_REFCOUNT_TABLE_OFFSET);
    h->refcount_table_clusters = load_be32(src->bytes + QCOW2_OFFSET_REFCOUNT_TABLE_CLUSTERS);
    if (h->refcount_table_clusters < 1 || h->refcount_table_clusters > most)
        return error_set(err, EINVAL,
                         "the refcount table has %" PRIu32 " clusters, expected 1 to %" PRIu64,
                         h->refcount_table_clusters, most);
    return 0;
}

static int qcow2_header_parse_snapshots(struct qcow2_header *h, const struct qcow2_source *src,
                                        struct error **err)
{
    h->snapshot_count = load_be32(src->bytes + QCOW2_OFFSET_SNAPSHOT_COUNT);
    h->snapshots_offset = load_be64(src->bytes + QCOW2_OFFSET_SNAPSHOTS_OFFSET);
    if (h->snapshot_count > QCOW2_SNAPSHOTS_MAX)
        return error_set(err, EINVAL, "there are %" PRIu32 " snapshots, expected %d at most",
                         h->snapshot_count, QCOW2_SNAPSHOTS_MAX);
    return 0;
}

/* The next extension at *offset, which moves past it. 0 at the end of the area, 1 if there is one. */
static int qcow2_extension_next(const struct qcow2_header *h, const struct qcow2_source *src,
                                uint64_t *offset, struct qcow2_extension *ret, struct error **err)
{
    /* A backing file's name ends the area, too. */
    uint64_t end =
        src->backing_file_offset ? src->backing_file_offset : qcow2_header_cluster_size(h);
    uint64_t here = *offset;

    if (here >= end || end - here < QCOW2_EXTENSION_HEAD)
        return 0;
    if (!range_within(here, QCOW2_EXTENSION_HEAD, src->len))
        return error_set(err, EINVAL,
                         "the header extensions have no end within the first %zu bytes", src->len);
    ret->type = load_be32(src->bytes + here);
    ret->len = load_be32(src->bytes + here + 4);
    if (ret->type == QCOW2_EXTENSION_END)
        return 0;
    here += QCOW2_EXTENSION_HEAD;
    end = MIN(end, (uint64_t)src->len);
    if (!range_within(here, ret->len, end))
        return error_set(err, EINVAL,
                         "header extension 0x%08" PRIx32 " at offset %" PRIu64 " has %" PRIu32
                         " bytes, expected %" PRIu64 " at most",
                         ret->type, *offset, ret->len, end - here);
    ret->data = src->bytes + here;
    /* Its padding may be cut off by the end. */
    *offset = here + align_up(ret->len, QCOW2_EXTENSION_ALIGN);
    return 1;
}

static const struct qcow2_extension *qcow2_extension_find(const struct qcow2_header *h,
                                                          uint32_t type)
{
    for (unsigned i = 0; i < h->extension_count; i++) {
        if (h->extensions[i].type == type)
            return &h->extensions[i];
    }
    return NULL;
}

/* Of each type that the specification names there is one at most; of others we do not know. */
static int qcow2_extensions_check_unique(const struct qcow2_header *h, struct error **err)
{
    static const uint32_t known[] = {
        QCOW2_EXTENSION_BACKING_FORMAT, QCOW2_EXTENSION_FEATURE_NAMES, QCOW2_EXTENSION_BITMAPS,
        QCOW2_EXTENSION_ENCRYPTION,     QCOW2_EXTENSION_DATA_FILE,
    };

    for (unsigned k = 0; k < ARRAY_SIZE(known); k++) {
        unsigned count = 0;

        for (unsigned i = 0; i < h->extension_count; i++)
            count += h->extensions[i].type == known[k];
        if (count > 1)
            return error_set(err, EINVAL,
                             "header extension 0x%08" PRIx32 " is there %u times, expected one",
                             known[k], count);
    }
    return 0;
}

static int qcow2_header_parse_extensions(struct qcow2_header *h, const struct qcow2_source *src,
                                         struct error **err)
{
    struct qcow2_extension extension = {0};
    uint64_t offset = h->header_length;
    unsigned count = 0;
    int r;

    if (src->backing_file_offset && src->backing_file_offset < h->header_length)
        return error_set(err, EINVAL,
                         "the backing file name is at offset %" PRIu64
                         ", within the header, which has %" PRIu32 " bytes",
                         src->backing_file_offset, h->header_length);
    while ((r = qcow2_extension_next(h, src, &offset, &extension, err)) > 0)
        count++;
    if (r < 0)
        return r;

    h->bytes_len = (size_t)MIN(offset, (uint64_t)src->len);
    h->bytes = try_alloc(1, h->bytes_len);
    h->extensions = try_new_n(struct qcow2_extension, MAX(count, 1U));
    if (!h->bytes || !h->extensions)
        return error_set(err, ENOMEM, "no memory for %u header extensions", count);
    memcpy(h->bytes, src->bytes, h->bytes_len);
    offset = h->header_length;
    while (h->extension_count < count &&
           qcow2_extension_next(h, src, &offset, &extension, err) > 0) {
        extension.data = h->bytes + (extension.data - src->bytes);
        h->extensions[h->extension_count++] = extension;
    }
    return qcow2_extensions_check_unique(h, err);
}

/* What the bitmaps extension says counts only as long as the autoclear feature is set. */
static int qcow2_header_parse_bitmaps(struct qcow2_header *h, struct error **err)
{
    const struct qcow2_extension *e = qcow2_extension_find(h, QCOW2_EXTENSION_BITMAPS);

    if (!(h->autoclear & QCOW2_AUTOCLEAR_BITMAPS))
        return 0;
    if (!e)
        return error_set(err, EINVAL,
                         "autoclear feature 0 announces bitmaps, but there is no such extension");
    if (e->len != QCOW2_BITMAPS_LEN)
        return error_set(err, EINVAL, "the bitmaps extension has %" PRIu32 " bytes, expected %d",
                         e->len, QCOW2_BITMAPS_LEN);
    h->has_bitmaps = true;
    h->bitmap_count = load_be32(e->data + QCOW2_BITMAPS_COUNT);
    h->bitmap_directory_size = load_be64(e->data + QCOW2_BITMAPS_DIRECTORY_SIZE);
    h->bitmap_directory_offset = load_be64(e->data + QCOW2_BITMAPS_DIRECTORY_OFFSET);
    if (load_be32(e->data + QCOW2_BITMAPS_RESERVED) != 0)
        return error_set(err, EINVAL,
                         "the reserved field of the bitmaps extension is 0x%08" PRIx32
                         ", expected 0",
                         load_be32(e->data + QCOW2_BITMAPS_RESERVED));
    if (h->bitmap_count < 1 || h->bitmap_count > QCOW2_BITMAPS_MAX)
        return error_set(err, EINVAL, "there are %" PRIu32 " bitmaps, expected 1 to %d",
                         h->bitmap_count, QCOW2_BITMAPS_MAX);
    if (h->bitmap_directory_size < (uint64_t)h->bitmap_count * QCOW2_BITMAP_ENTRY_LEN_MIN ||
        h->bitmap_directory_size > QCOW2_BITMAPS_DIRECTORY_MAX)
        return error_set(err, EINVAL,
                         "the directory of %" PRIu32 " bitmaps has %" PRIu64
                         " bytes, expected %" PRIu64 " to %" PRIu64,
                         h->bitmap_count, h->bitmap_directory_size,
                         (uint64_t)h->bitmap_count * QCOW2_BITMAP_ENTRY_LEN_MIN,
                         QCOW2_BITMAPS_DIRECTORY_MAX);
    return 0;
}

struct qcow2_table {
    const char *name;
    uint64_t offset;
    uint64_t len; /* bytes; 0: it is not there */
};

static int qcow2_table_check(const struct qcow2_table *t, uint64_t cluster_size, uint64_t file_size,
                             struct error **err)
{
    if (!is_aligned(t->offset, cluster_size))
        return error_set(err, EINVAL,
                         "the %s is at offset %" PRIu64 ", expected a multiple of %" PRIu64,
                         t->name, t->offset, cluster_size);
    if (t->offset == 0)
        return error_set(err, EINVAL, "the %s is at offset 0, where the header is", t->name);
    if (!range_within(t->offset, t->len, file_size))
        return error_set(err, EINVAL,
                         "the %s is at offset %" PRIu64 " and has %" PRIu64
                         " bytes, but the file has only %" PRIu64,
                         t->name, t->offset, t->len, file_size);
    return 0;
}

/* All lie in the file and apart from each other. `luks`: the header of that, or none. */
static int qcow2_header_check_tables(const struct qcow2_header *h, uint64_t file_size,
                                     struct qcow2_table luks, struct error **err)
{
    uint64_t cluster_size = qcow2_header_cluster_size(h);
    struct qcow2_table tables[] = {
        {"refcount table", h->refcount_table_offset,
         (uint64_t)h->refcount_table_clusters << h->cluster_bits},
        {"L1 table", h->l1_offset, (uint64_t)h->l1_size * QCOW2_ENTRY_LEN},
        {"snapshot table", h->snapshots_offset,
         (uint64_t)h->snapshot_count * QCOW2_SNAPSHOT_LEN_MIN},
        {"bitmap directory", h->bitmap_directory_offset,
         h->has_bitmaps ? h->bitmap_directory_size : 0},
        luks,
    };

    for (unsigned i = 0; i < ARRAY_SIZE(tables); i++) {
        int r;

        if (tables[i].len == 0)
            continue;
        r = qcow2_table_check(&tables[i], cluster_size, file_size, err);
        if (r < 0)
            return r;
        tables[i].len = align_up(tables[i].len, cluster_size); /* it owns its last cluster */
        for (unsigned k = 0; k < i; k++) {
            if (tables[k].len != 0 &&
                ranges_overlap(tables[k].offset, tables[k].len, tables[i].offset, tables[i].len))
                return error_set(
                    err, EINVAL,
                    "the %s at offset %" PRIu64 " and the %s at offset %" PRIu64 " overlap",
                    tables[k].name, tables[k].offset, tables[i].name, tables[i].offset);
        }
    }
    return 0;
}

/* A string of the image, which ends by its length. */
static int qcow2_string_copy(char **ret, const char *what, const uint8_t *text, size_t len,
                             struct error **err)
{
    char *copy;

    if (memchr(text, '\0', len))
        return error_set(err, EINVAL, "the %s, of %zu bytes, contains a NUL byte", what, len);
    copy = try_alloc(len + 1, 1);
    if (!copy)
        return error_set(err, ENOMEM, "no memory for the %s", what);
    memcpy(copy, text, len);
    *ret = copy;
    return 0;
}

static int qcow2_header_parse_backing(struct qcow2_header *h, const struct qcow2_source *src,
                                      struct error **err)
{
    uint64_t cluster_size = qcow2_header_cluster_size(h);
    uint64_t offset = src->backing_file_offset;
    uint32_t len = src->backing_file_size;

    if (offset == 0)
        return 0;
    if (len < 1 || len > QCOW2_BACKING_FILE_MAX)
        return error_set(err, EINVAL,
                         "the backing file name has %" PRIu32 " bytes, expected 1 to %d", len,
                         QCOW2_BACKING_FILE_MAX);
    if (!range_within(offset, len, MIN(cluster_size, (uint64_t)src->len)))
        return error_set(err, EINVAL,
                         "the backing file name is at offset %" PRIu64 " and has %" PRIu32
                         " bytes, expected to end within the first %" PRIu64,
                         offset, len, MIN(cluster_size, (uint64_t)src->len));
    return qcow2_string_copy(&h->backing_file, "backing file name", src->bytes + offset, len, err);
}

/* An empty one says nothing. */
static int qcow2_header_parse_backing_format(struct qcow2_header *h, struct error **err)
{
    const struct qcow2_extension *e = qcow2_extension_find(h, QCOW2_EXTENSION_BACKING_FORMAT);

    if (!e || e->len == 0)
        return 0;
    if (e->len > QCOW2_BACKING_FORMAT_MAX)
        return error_set(err, EINVAL,
                         "the backing format name has %" PRIu32 " bytes, expected %d at most",
                         e->len, QCOW2_BACKING_FORMAT_MAX);
    return qcow2_string_copy(&h->backing_format, "backing format name", e->data, e->len, err);
}

/* Without the feature it means nothing. */
static int qcow2_header_parse_data_file(struct qcow2_header *h, struct error **err)
{
    const struct qcow2_extension *e = qcow2_extension_find(h, QCOW2_EXTENSION_DATA_FILE);

    if (!e || e->len == 0 || !qcow2_header_has_data_file(h))
        return 0;
    if (e->len > QCOW2_DATA_FILE_MAX)
        return error_set(err, EINVAL,
                         "the data file name has %" PRIu32 " bytes, expected %d at most", e->len,
                         QCOW2_DATA_FILE_MAX);
    return qcow2_string_copy(&h->data_file, "data file name", e->data, e->len, err);
}

static int qcow2_header_parse_all(struct qcow2_header *h, struct qcow2_source *src,
                                  struct error **err)
{
    int r;

    if ((r = qcow2_header_parse_fields(h, src, err)) < 0 ||
        (r = qcow2_header_parse_l1(h, src, err)) < 0 ||
        (r = qcow2_header_parse_refcount_table(h, src, err)) < 0 ||
        (r = qcow2_header_parse_snapshots(h, src, err)) < 0 ||
        (r = qcow2_header_parse_extensions(h, src, err)) < 0 ||
        (r = qcow2_header_parse_bitmaps(h, err)) < 0 ||
        (r = qcow2_header_check_tables(h, src->file_size, (struct qcow2_table){.len = 0}, err)) <
            0 ||
        (r = qcow2_header_parse_backing(h, src, err)) < 0 ||
        (r = qcow2_header_parse_backing_format(h, err)) < 0)
        return r;
    return qcow2_header_parse_data_file(h, err);
}

int qcow2_header_parse(struct qcow2_header *ret, const void *bytes, size_t len, uint64_t file_size,
                       const char *node_name, struct error **err)
{
    struct qcow2_source src = {
        .bytes = bytes,
        .len = (size_t)MIN((uint64_t)len, QCOW2_HEADER_BYTES_MAX),
        .file_size = file_size,
    };
    struct qcow2_header h = {0};
    int r;

    assert(file_size <= INT64_MAX && len <= file_size);
    r = qcow2_header_recognize(&src, err);
    if (r < 0)
        return error_wrap(err, r, "node '%s': not a qcow2 image", node_name);
    r = qcow2_header_parse_all(&h, &src, err);
    if (r < 0) {
        qcow2_header_release(&h);
        return error_wrap(err, r, "node '%s': qcow2 header", node_name);
    }
    *ret = h;
    return 0;
}

/* What a header is parsed without. */
#define WITHOUT_BITMAPS   1u
#define WITHOUT_SNAPSHOTS 2u

static int parse_without(struct qcow2_header *ret, unsigned what, const uint8_t *bytes, size_t len,
                         uint64_t file_size, const char *node_name, struct error **err)
{
    AUTO(free_ptr) uint8_t *copy = try_alloc(1, len);

    if (!copy)
        return error_set(err, ENOMEM, "no memory");
    memcpy(copy, bytes, len);
    if (what & WITHOUT_BITMAPS)
        store_be64(copy + QCOW2_OFFSET_AUTOCLEAR,
                   load_be64(copy + QCOW2_OFFSET_AUTOCLEAR) & ~QCOW2_AUTOCLEAR_BITMAPS);
    if (what & WITHOUT_SNAPSHOTS)
        store_be32(copy + QCOW2_OFFSET_SNAPSHOT_COUNT, 0);
    return qcow2_header_parse(ret, copy, len, file_size, node_name, err);
}

int qcow2_header_parse_tolerant(struct qcow2_header *ret, const void *bytes, size_t len,
                                uint64_t file_size, const char *node_name, struct error **err)
{
    /* By what it is parsed without: with neither of two broken ones the other one's error is left. */
    struct error *why[WITHOUT_BITMAPS + WITHOUT_SNAPSHOTS + 1] = {NULL};
    unsigned what = 0;
    int r = qcow2_header_parse(ret, bytes, len, file_size, node_name, err);
    bool has_features;

    if (r != -EINVAL || len < QCOW2_HEADER_LENGTH_V3_MIN)
        return r;
    has_features = load_be32((const uint8_t *)bytes + QCOW2_OFFSET_VERSION) >= 3;
    do {
        what++;
    } while (what < ARRAY_SIZE(why) &&
             ((what & WITHOUT_BITMAPS && !has_features) ||
              parse_without(ret, what, bytes, len, file_size, node_name, &why[what]) < 0));
    if (what < ARRAY_SIZE(why)) {
        bool both = what == (WITHOUT_BITMAPS | WITHOUT_SNAPSHOTS);

        if (what & WITHOUT_BITMAPS) {
            ret->autoclear |= QCOW2_AUTOCLEAR_BITMAPS;
            ret->bitmaps_problem = xstrdup(error_text(both ? why[WITHOUT_SNAPSHOTS] : *err));
        }
        if (what & WITHOUT_SNAPSHOTS)
            ret->snapshots_problem = xstrdup(error_text(both ? why[WITHOUT_BITMAPS] : *err));
        error_free(err);
        r = 0;
    }
    for (unsigned i = 0; i < ARRAY_SIZE(why); i++)
        error_free(&why[i]);
    return r;
}

void qcow2_header_release(struct qcow2_header *header)
{
    free(header->bitmaps_problem);
    free(header->snapshots_problem);
    free(header->backing_file);
    free(header->backing_format);
    free(header->data_file);
    free(header->extensions);
    free(header->bytes);
    *header = (struct qcow2_header){0};
}

const char *qcow2_header_feature_name(const struct qcow2_header *header,
                                      enum qcow2_feature_type type, unsigned bit,
                                      char buf[QCOW2_FEATURE_NAME_LEN + 1])
{
    const struct qcow2_extension *e = qcow2_extension_find(header, QCOW2_EXTENSION_FEATURE_NAMES);

    for (uint32_t i = 0; e && i < e->len / QCOW2_FEATURE_ENTRY_LEN; i++) {
        const uint8_t *entry = e->data + (size_t)i * QCOW2_FEATURE_ENTRY_LEN;
        unsigned n = 0;

        if (entry[0] != type || entry[1] != bit)
            continue;
        for (; n < QCOW2_FEATURE_NAME_LEN && entry[2 + n] != '\0'; n++) {
            char c = (char)entry[2 + n];

            buf[n] = '?';
            if (c >= ' ' && c <= '~')
                buf[n] = c;
        }
        buf[n] = '\0';
        return n > 0 ? buf : NULL;
    }
    return NULL;
}

/* By number, and by the name that the image has for it. */
static int qcow2_header_refuse_unknown(const struct qcow2_header *h, uint64_t unknown,
                                       const char *node_name, struct error **err)
{
    char *list = xstrdup("");
    int r;

    for (unsigned bit = 0; bit < 64; bit++) {
        char buf[QCOW2_FEATURE_NAME_LEN + 1];
        const char *name = qcow2_header_feature_name(h, QCOW2_FEATURE_INCOMPATIBLE, bit, buf);
        char *longer;

        if (!(unknown >> bit & 1))
            continue;
        longer = xasprintf("%s%s%u%s%s%s", list, *list ? ", " : "", bit, name ? " ('" : "",
                           name ? name : "", name ? "')" : "");
        free(list);
        list = longer;
    }
    r = error_set(err, ENOTSUP,
                  "node '%s': the image needs features that this program does not know: "
                  "incompatible feature %s",
                  node_name, list);
    free(list);
    return r;
}

static int qcow2_header_check_usable(const struct qcow2_header *h, const char *node_name,
                                     struct error **err)
{
    uint64_t unknown = h->incompatible & ~QCOW2_INCOMPATIBLE_KNOWN;

    if (unknown != 0)
        return qcow2_header_refuse_unknown(h, unknown, node_name, err);
    if (h->compression_type != QCOW2_COMPRESSION_ZLIB &&
        h->compression_type != QCOW2_COMPRESSION_ZSTD)
        return error_set(err, ENOTSUP,
                         "node '%s': the image's compression type is %u, only 0 (zlib) and 1 "
                         "(zstd) are supported",
                         node_name, h->compression_type);
    if (h->crypt_method == QCOW2_CRYPT_AES)
        return error_set(
            err, ENOTSUP,
            "node '%s': the image has AES encryption, which is weak, and not supported: "
            "convert it with qemu-img",
            node_name);
    return 0;
}

int qcow2_header_check_supported(const struct qcow2_header *header, bool read_only,
                                 const char *node_name, struct error **err)
{
    int r = qcow2_header_check_usable(header, node_name, err);

    if (r < 0 || read_only)
        return r;
    if (header->incompatible & QCOW2_INCOMPATIBLE_CORRUPT)
        return error_set(err, ENOTSUP,
                         "node '%s': the image is marked corrupt: open it with read-only=on, or "
                         "repair it with `cairn check -r all`",
                         node_name);
    if (qcow2_header_has_data_file(header) && (header->snapshot_count || header->snapshots_problem))
        return error_set(
            err, ENOTSUP,
            "node '%s': the image has internal snapshots beside an external data file, "
            "which cannot keep what they hold: open it with read-only=on",
            node_name);
    return 0;
}

int qcow2_header_encryption(const struct qcow2_header *header, uint64_t file_size,
                            uint64_t *ret_offset, uint64_t *ret_len, struct error **err)
{
    const struct qcow2_extension *e = qcow2_extension_find(header, QCOW2_EXTENSION_ENCRYPTION);
    struct qcow2_table luks = {.name = "LUKS header"};

    if (!e)
        return error_set(err, EINVAL,
                         "the image is encrypted, but does not say where its LUKS header is");
    if (e->len != QCOW2_ENCRYPTION_LEN)
        return error_set(err, EINVAL, "the encryption extension has %" PRIu32 " bytes, expected %d",
                         e->len, QCOW2_ENCRYPTION_LEN);
    luks.offset = load_be64(e->data + QCOW2_ENCRYPTION_OFFSET);
    luks.len = load_be64(e->data + QCOW2_ENCRYPTION_LENGTH);
    if (!luks.len || luks.len > QCOW2_LUKS_HEADER_MAX)
        return error_set(err, EINVAL,
                         "the LUKS header has %" PRIu64 " bytes, expected 1 to %" PRIu64, luks.len,
                         QCOW2_LUKS_HEADER_MAX);
    *ret_offset = luks.offset;
    *ret_len = luks.len;
    return qcow2_header_check_tables(header, file_size, luks, err);
}

uint64_t qcow2_header_autoclear_kept(void)
{
    return 0; /* that of bitmaps is, where they have been loaded (qcow2-bitmap.h) */
}
