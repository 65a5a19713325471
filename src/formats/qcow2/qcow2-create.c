/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Making empty images. The layout is arithmetic:
 *
 *   | header | refcount table | refcount blocks | L1 table | LUKS header | L2 tables | data |
 *                                         (of encrypted images)  (the last two with preallocation only)
 *
 * All clusters of the file have refcount 1. The blocks that say so are part of the file themselves, hence the search for the
 * number of blocks that covers all.
 */
#include "formats/qcow2/qcow2-create.h"

#include "base/alloc.h"
#include "base/checked.h"
#include "base/endian.h"
#include "formats/qcow2/qcow2-header.h"
#include "graph/node.h"
#include "loop/co.h"
#include "loop/file.h"

#include <assert.h>
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#define QCOW2_SECTOR 512

/* Whoever writes the image does it in pieces of this size. */
#define QCOW2_CREATE_PIECE ((size_t)MIB)

/* Header and extensions never fill more. A backing file's name follows. */
#define QCOW2_CREATE_HEADER_MAX 2048

static uint64_t qcow2_div_up(uint64_t a, uint64_t b)
{
    return a / b + (a % b != 0);
}

/* --- The header's cluster --- */

static size_t qcow2_header_put_extension(uint8_t *at, uint32_t type, const void *data, size_t len)
{
    store_be32(at, type);
    store_be32(at + 4, (uint32_t)len);
    memcpy(at + QCOW2_EXTENSION_HEAD, data, len);
    return QCOW2_EXTENSION_HEAD + (size_t)align_up(len, QCOW2_EXTENSION_ALIGN);
}

static size_t qcow2_header_put_encryption(const struct qcow2_layout *l, uint8_t *at)
{
    uint8_t place[QCOW2_ENCRYPTION_LEN];

    store_be64(place + QCOW2_ENCRYPTION_OFFSET, l->luks_offset);
    store_be64(place + QCOW2_ENCRYPTION_LENGTH, l->luks_len);
    return qcow2_header_put_extension(at, QCOW2_EXTENSION_ENCRYPTION, place, sizeof(place));
}

static size_t qcow2_header_put_features(uint8_t *at)
{
    uint8_t table[8 * QCOW2_FEATURE_ENTRY_LEN] = {0};
    size_t len = 0;

    for (const struct qcow2_feature *f = qcow2_features; f->name[0]; f++) {
        assert(len + QCOW2_FEATURE_ENTRY_LEN <= sizeof(table));
        table[len] = (uint8_t)f->type;
        table[len + 1] = f->bit;
        memcpy(table + len + 2, f->name, QCOW2_FEATURE_NAME_LEN);
        len += QCOW2_FEATURE_ENTRY_LEN;
    }
    return qcow2_header_put_extension(at, QCOW2_EXTENSION_FEATURE_NAMES, table, len);
}

static size_t qcow2_header_put_v3(const struct qcow2_layout *l, uint8_t *at)
{
    uint64_t incompatible = 0;

    if (l->compression_type != QCOW2_COMPRESSION_ZLIB)
        incompatible |= QCOW2_INCOMPATIBLE_COMPRESSION_TYPE;
    if (l->data_file)
        incompatible |= QCOW2_INCOMPATIBLE_DATA_FILE;
    if (l->extended_l2)
        incompatible |= QCOW2_INCOMPATIBLE_EXTENDED_L2;
    store_be64(at + QCOW2_OFFSET_INCOMPATIBLE, incompatible);
    store_be64(at + QCOW2_OFFSET_COMPATIBLE,
               l->lazy_refcounts ? QCOW2_COMPATIBLE_LAZY_REFCOUNTS : 0);
    store_be64(at + QCOW2_OFFSET_AUTOCLEAR, l->data_file_raw ? QCOW2_AUTOCLEAR_RAW_DATA : 0);
    store_be32(at + QCOW2_OFFSET_REFCOUNT_ORDER, l->refcount_order);
    store_be32(at + QCOW2_OFFSET_HEADER_LENGTH, QCOW2_HEADER_LENGTH_V3);
    at[QCOW2_OFFSET_COMPRESSION_TYPE] = (uint8_t)l->compression_type;
    return QCOW2_HEADER_LENGTH_V3;
}

static size_t qcow2_header_put_fields(const struct qcow2_layout *l, uint8_t *at)
{
    store_be32(at + QCOW2_OFFSET_MAGIC, QCOW2_MAGIC);
    store_be32(at + QCOW2_OFFSET_VERSION, l->version);
    store_be32(at + QCOW2_OFFSET_CLUSTER_BITS, l->cluster_bits);
    store_be64(at + QCOW2_OFFSET_SIZE, l->size);
    store_be32(at + QCOW2_OFFSET_CRYPT_METHOD, l->luks_len ? QCOW2_CRYPT_LUKS : QCOW2_CRYPT_NONE);
    store_be32(at + QCOW2_OFFSET_L1_SIZE, (uint32_t)l->l1_size);
    store_be64(at + QCOW2_OFFSET_L1_OFFSET, l->l1_offset);
    store_be64(at + QCOW2_OFFSET_REFCOUNT_TABLE_OFFSET, l->refcount_table_offset);
    store_be32(at + QCOW2_OFFSET_REFCOUNT_TABLE_CLUSTERS, (uint32_t)l->refcount_table_clusters);
    return l->version < 3 ? QCOW2_HEADER_LENGTH_V2 : qcow2_header_put_v3(l, at);
}

/*
 * Writes header and extensions to `head` and returns their length, end marker and all. `features`: with the table of their
 * names, which small clusters have no room for.
 */
static size_t qcow2_header_build(const struct qcow2_layout *l, bool features,
                                 uint8_t head[QCOW2_CREATE_HEADER_MAX])
{
    size_t len;

    memset(head, 0, QCOW2_CREATE_HEADER_MAX);
    len = qcow2_header_put_fields(l, head);
    if (l->backing_format)
        len += qcow2_header_put_extension(head + len, QCOW2_EXTENSION_BACKING_FORMAT,
                                          l->backing_format, strlen(l->backing_format));
    if (l->luks_len)
        len += qcow2_header_put_encryption(l, head + len);
    if (l->data_file)
        len += qcow2_header_put_extension(head + len, QCOW2_EXTENSION_DATA_FILE, l->data_file,
                                          strlen(l->data_file));
    if (features)
        len += qcow2_header_put_features(head + len);
    len += QCOW2_EXTENSION_HEAD; /* the end marker is zeroes */
    if (l->backing_file) {
        store_be64(head + QCOW2_OFFSET_BACKING_FILE_OFFSET, len);
        store_be32(head + QCOW2_OFFSET_BACKING_FILE_SIZE, (uint32_t)strlen(l->backing_file));
    }
    return len;
}

/*
 * The same, with the features' names if there is room for them and for an extension of bitmaps, which may come later. Returns the
 * length with the backing file's name.
 */
static size_t qcow2_header_fit(const struct qcow2_layout *l, uint8_t head[QCOW2_CREATE_HEADER_MAX],
                               size_t *ret_head_len)
{
    size_t name_len = l->backing_file ? strlen(l->backing_file) : 0;

    *ret_head_len = qcow2_header_build(l, l->version >= 3, head);
    if (*ret_head_len + name_len + QCOW2_EXTENSION_HEAD + QCOW2_BITMAPS_LEN >
        (size_t)1 << l->cluster_bits)
        *ret_head_len = qcow2_header_build(l, false, head);
    return *ret_head_len + name_len;
}

/* --- The layout --- */

static int qcow2_create_check_backing(const struct qcow2_create_options *o, struct error **err)
{
    if (!o->backing_file && o->backing_format)
        return error_set(err, EINVAL, "backing format '%s' is given, but no backing file",
                         o->backing_format);
    if (!o->backing_file)
        return 0;
    if (o->backing_file[0] == '\0' || strlen(o->backing_file) > QCOW2_BACKING_FILE_MAX)
        return error_set(err, EINVAL, "the backing file name has %zu bytes, expected 1 to %d",
                         strlen(o->backing_file), QCOW2_BACKING_FILE_MAX);
    if (!o->backing_format || o->backing_format[0] == '\0')
        return error_set(err, EINVAL,
                         "backing file '%s' is given without its format, which is never guessed",
                         o->backing_file);
    if (strlen(o->backing_format) > QCOW2_BACKING_FORMAT_MAX)
        return error_set(err, EINVAL, "the backing format name has %zu bytes, expected %d at most",
                         strlen(o->backing_format), QCOW2_BACKING_FORMAT_MAX);
    if (o->preallocate_metadata && !o->extended_l2)
        return error_set(err, ENOTSUP,
                         "preallocation would hide backing file '%s': give one of them only",
                         o->backing_file);
    return 0;
}

static int qcow2_create_check_data_file(const struct qcow2_create_options *o, struct error **err)
{
    if (o->data_file_raw && !o->data_file)
        return error_set(err, EINVAL, "data_file_raw requires data_file");
    if (o->data_file_raw && o->luks_len)
        return error_set(err, ENOTSUP,
                         "data_file_raw and encryption are given: a raw data file holds what the "
                         "disk shows, which is not encrypted");
    if (!o->data_file)
        return 0;
    if (o->version < 3)
        return error_set(err, EINVAL, "external data files need qcow2 version 3");
    if (o->data_file[0] == '\0' || strlen(o->data_file) > QCOW2_DATA_FILE_MAX)
        return error_set(err, EINVAL, "the data file name has %zu bytes, expected 1 to %d",
                         strlen(o->data_file), QCOW2_DATA_FILE_MAX);
    if (o->data_file_raw && o->backing_file)
        return error_set(
            err, EINVAL,
            "backing file '%s' and data_file_raw are given: a raw data file holds all of "
            "the disk",
            o->backing_file);
    return 0;
}

static int qcow2_create_check(const struct qcow2_create_options *o, struct error **err)
{
    int r;

    if (o->version < 2 || o->version > 3)
        return error_set(err, EINVAL, "qcow2 version is %u, expected 2 or 3", o->version);
    if (o->cluster_bits < QCOW2_CLUSTER_BITS_MIN || o->cluster_bits > QCOW2_CLUSTER_BITS_MAX)
        return error_set(err, EINVAL, "cluster_bits is %u, expected %d to %d (512 bytes to 2 MiB)",
                         o->cluster_bits, QCOW2_CLUSTER_BITS_MIN, QCOW2_CLUSTER_BITS_MAX);
    if (o->refcount_order > QCOW2_REFCOUNT_ORDER_MAX)
        return error_set(err, EINVAL, "refcount_order is %u, expected %d at most (64 bits)",
                         o->refcount_order, QCOW2_REFCOUNT_ORDER_MAX);
    if (o->version < 3 && o->refcount_order != QCOW2_REFCOUNT_ORDER_V2)
        return error_set(err, EINVAL,
                         "refcount_order is %u, but qcow2 version 2 has only %d (16 bits)",
                         o->refcount_order, QCOW2_REFCOUNT_ORDER_V2);
    if (o->version < 3 && o->lazy_refcounts)
        return error_set(err, EINVAL, "lazy refcounts need qcow2 version 3");
    if (o->version < 3 && o->compression_type != QCOW2_COMPRESSION_ZLIB)
        return error_set(err, EINVAL, "compression other than zlib needs qcow2 version 3");
    if (o->size > NODE_SIZE_MAX)
        return error_set(err, EINVAL, "size is %" PRIu64 " bytes, expected %" PRIu64 " at most",
                         o->size, (uint64_t)NODE_SIZE_MAX);
    if (o->extended_l2 && (o->version < 3 || o->cluster_bits < QCOW2_CLUSTER_BITS_EXTENDED_L2_MIN))
        return error_set(
            err, EINVAL,
            "extended L2 entries need qcow2 version 3 and clusters of %d bytes at least",
            1 << QCOW2_CLUSTER_BITS_EXTENDED_L2_MIN);
    r = qcow2_create_check_data_file(o, err);
    return r < 0 ? r : qcow2_create_check_backing(o, err);
}

/* How many refcount blocks, and clusters of the table that points to them, make a file with `others` further clusters whole. */
static void qcow2_layout_count_refcounts(struct qcow2_layout *l, uint64_t others)
{
    uint64_t per_block = (uint64_t)1 << (l->cluster_bits + 3 - l->refcount_order);
    uint64_t per_table_cluster = (uint64_t)1 << (l->cluster_bits - 3);

    l->refcount_blocks = 1;
    for (;;) {
        uint64_t blocks;

        l->refcount_table_clusters = qcow2_div_up(l->refcount_blocks, per_table_cluster);
        blocks = qcow2_div_up(others + l->refcount_table_clusters + l->refcount_blocks, per_block);
        if (blocks <= l->refcount_blocks)
            return;
        l->refcount_blocks = blocks; /* grows towards what is needed, and never beyond */
    }
}

static void qcow2_layout_add(struct qcow2_layout *l, uint64_t offset, uint64_t len)
{
    if (len > 0)
        l->segments[l->segment_count++] = (struct qcow2_segment){offset, len};
}

static uint64_t qcow2_layout_l2_entry(const struct qcow2_layout *l)
{
    return l->extended_l2 ? QCOW2_L2_EXTENDED_ENTRY_LEN : QCOW2_ENTRY_LEN;
}

/* Gives each area its place, and says where there is something to write. */
static void qcow2_layout_place(struct qcow2_layout *l, size_t header_len)
{
    unsigned bits = l->cluster_bits;
    uint64_t l1_clusters = qcow2_div_up(l->l1_size * QCOW2_ENTRY_LEN, (uint64_t)1 << bits);
    uint64_t end;

    l->refcount_table_offset = (uint64_t)1 << bits;
    l->refcount_blocks_offset = l->refcount_table_offset + (l->refcount_table_clusters << bits);
    end = l->refcount_blocks_offset + (l->refcount_blocks << bits);
    l->l1_offset = l->l1_size ? end : 0;
    end += l1_clusters << bits;
    l->luks_offset = l->luks_len ? end : 0;
    end += align_up(l->luks_len, (uint64_t)1 << bits);
    l->l2_offset = end;
    l->data_offset = l->l2_offset + (l->l2_tables << bits);
    l->file_size = l->data_offset + (l->data_clusters << bits);

    qcow2_layout_add(l, 0, header_len);
    qcow2_layout_add(l, l->refcount_table_offset, l->refcount_blocks * QCOW2_ENTRY_LEN);
    qcow2_layout_add(l, l->refcount_blocks_offset,
                     qcow2_div_up((l->file_size >> bits) << l->refcount_order, 8));
    qcow2_layout_add(l, l->l1_offset, l->l2_tables * QCOW2_ENTRY_LEN);
    qcow2_layout_add(l, l->l2_offset, l->mapped_clusters * qcow2_layout_l2_entry(l));
}

/* The tables' sizes, within the limits. */
static int qcow2_layout_count(struct qcow2_layout *l, bool preallocate, struct error **err)
{
    unsigned bits = l->cluster_bits;
    uint64_t cluster_size = (uint64_t)1 << bits;

    l->l1_size = qcow2_l1_entries_needed(l->size, bits, l->extended_l2);
    if (l->l1_size > QCOW2_L1_BYTES_MAX / QCOW2_ENTRY_LEN)
        return error_set(err, EINVAL,
                         "a disk of %" PRIu64 " bytes is too large for clusters of %" PRIu64
                         " bytes, with which it has %" PRIu64 " bytes at most",
                         l->size, cluster_size,
                         (QCOW2_L1_BYTES_MAX / QCOW2_ENTRY_LEN)
                             << (2 * bits - (l->extended_l2 ? 4 : 3)));
    if (preallocate) {
        l->l2_tables = l->l1_size;
        l->mapped_clusters = qcow2_div_up(l->size, cluster_size);
        l->data_clusters = l->data_file ? 0 : l->mapped_clusters;
    }
    qcow2_layout_count_refcounts(l, 1 + qcow2_div_up(l->l1_size * QCOW2_ENTRY_LEN, cluster_size) +
                                        qcow2_div_up(l->luks_len, cluster_size) + l->l2_tables +
                                        l->data_clusters);
    if (l->refcount_table_clusters > QCOW2_REFCOUNT_TABLE_BYTES_MAX >> bits)
        return error_set(err, EINVAL,
                         "the refcount table would have %" PRIu64 " bytes, expected %" PRIu64
                         " at most: use larger clusters or narrower refcounts",
                         l->refcount_table_clusters << bits, QCOW2_REFCOUNT_TABLE_BYTES_MAX);
    return 0;
}

/* They do not fit: which is to blame? */
static int qcow2_layout_refuse_names(const struct qcow2_layout *l, size_t cluster_size,
                                     size_t head_len, struct error **err)
{
    bool is_backing = head_len < cluster_size;
    const char *name = is_backing ? l->backing_file : l->data_file;
    size_t others =
        head_len -
        (is_backing || !name ? 0 : (size_t)align_up(strlen(name), QCOW2_EXTENSION_ALIGN));

    return error_set(err, EINVAL,
                     "the %s file name has %zu bytes, clusters of %zu bytes have room for %zu: use "
                     "larger clusters",
                     is_backing ? "backing" : "data", name ? strlen(name) : 0, cluster_size,
                     cluster_size - MIN(others, cluster_size));
}

int qcow2_layout_make(const struct qcow2_create_options *options, struct qcow2_layout *ret,
                      struct error **err)
{
    struct qcow2_layout l;
    uint8_t head[QCOW2_CREATE_HEADER_MAX];
    size_t head_len;
    size_t header_len;
    size_t cluster_size;
    int r = qcow2_create_check(options, err);

    if (r < 0)
        return r;
    cluster_size = (size_t)1 << options->cluster_bits;
    l = (struct qcow2_layout){
        .size = align_up(options->size, QCOW2_SECTOR),
        .version = options->version,
        .cluster_bits = options->cluster_bits,
        .refcount_order = options->refcount_order,
        .lazy_refcounts = options->lazy_refcounts,
        .compression_type = options->compression_type,
        .luks_len = options->luks_len,
        .backing_file = options->backing_file,
        .backing_format = options->backing_format,
        .data_file = options->data_file,
        .data_file_raw = options->data_file_raw,
        .extended_l2 = options->extended_l2,
    };
    header_len = qcow2_header_fit(&l, head, &head_len);
    if (header_len > cluster_size)
        return qcow2_layout_refuse_names(&l, cluster_size, head_len, err);
    r = qcow2_layout_count(&l, options->preallocate_metadata || options->data_file_raw, err);
    if (r < 0)
        return r;
    qcow2_layout_place(&l, header_len);
    if (l.data_clusters > 0 && l.file_size > QCOW2_HOST_OFFSET_END)
        return error_set(err, EINVAL,
                         "with preallocation the file would have %" PRIu64
                         " bytes, expected %" PRIu64 " at most",
                         l.file_size, QCOW2_HOST_OFFSET_END);
    *ret = l;
    return 0;
}

/* --- The content --- */

/* Entry `index` of a table is target + index * step, as far as there are `count` of them; then 0. Some have a second word. */
struct qcow2_table_content {
    uint64_t count;
    uint64_t target;
    uint64_t step;
    bool extended;
    uint64_t second;
};

static uint64_t qcow2_table_word(const struct qcow2_table_content *t, uint64_t word)
{
    uint64_t index = t->extended ? word / 2 : word;

    if (index >= t->count)
        return 0;
    return t->extended && word % 2 ? t->second : t->target + index * t->step;
}

static void qcow2_table_fill(const struct qcow2_table_content *t, uint64_t at, uint8_t *buf,
                             size_t len)
{
    while (len > 0) {
        size_t within = at % QCOW2_ENTRY_LEN;
        size_t n = MIN(len, QCOW2_ENTRY_LEN - within);
        uint8_t entry[QCOW2_ENTRY_LEN];

        store_be64(entry, qcow2_table_word(t, at / QCOW2_ENTRY_LEN));
        memcpy(buf, entry + within, n);
        at += n;
        buf += n;
        len -= n;
    }
}

/* A byte of the refcount blocks: 1 for each cluster of the file, 0 for others. */
static uint8_t qcow2_refcount_byte(const struct qcow2_layout *l, uint64_t at)
{
    uint64_t clusters = l->file_size >> l->cluster_bits;
    uint64_t first =
        at * 8 >> l->refcount_order; /* the cluster whose count begins here, or began */
    unsigned width = 1u << l->refcount_order;
    unsigned byte = 0;

    if (width >= 8) /* big endian: the last byte of each is 1 */
        return first < clusters && (at + 1) % (width / 8) == 0;
    for (unsigned i = 0; i < 8 / width && first + i < clusters; i++)
        byte |= 1u << (i * width);
    return (uint8_t)byte;
}

static void qcow2_header_cluster_fill(const struct qcow2_layout *l, uint64_t at, uint8_t *buf,
                                      size_t len)
{
    uint8_t bytes[QCOW2_CREATE_HEADER_MAX + QCOW2_BACKING_FILE_MAX];
    uint8_t head[QCOW2_CREATE_HEADER_MAX];
    size_t head_len;
    size_t total = qcow2_header_fit(l, head, &head_len);

    memcpy(bytes, head, head_len);
    if (l->backing_file)
        memcpy(bytes + head_len, l->backing_file, strlen(l->backing_file));
    if (at < total)
        memcpy(buf, bytes + at, MIN(len, (size_t)(total - at)));
}

static bool qcow2_cut(uint64_t offset, size_t len, uint64_t area, uint64_t area_len,
                      uint64_t *ret_start, size_t *ret_len)
{
    uint64_t start = MAX(offset, area);
    uint64_t end = MIN(offset + len, area + area_len);

    if (start >= end)
        return false;
    *ret_start = start;
    *ret_len = (size_t)(end - start);
    return true;
}

/* What nobody has written decrypts to anything: it is said to be zeroes (WRITE-4). */
static uint64_t qcow2_data_flags(const struct qcow2_layout *l)
{
    return QCOW2_COPIED | (l->luks_len && !l->extended_l2 ? QCOW2_L2_ZERO : 0);
}

/* Through clusters without data or zeroes a backing file is seen. */
static uint64_t qcow2_data_bits(const struct qcow2_layout *l)
{
    if (l->backing_file)
        return 0;
    return l->luks_len ? UINT64_C(0xffffffff00000000) : UINT32_MAX; /* as above */
}

void qcow2_layout_read(const struct qcow2_layout *layout, uint64_t offset, void *buf, size_t len)
{
    const struct qcow2_layout *l = layout;
    uint64_t cluster_size = (uint64_t)1 << l->cluster_bits;
    uint64_t blocks_len = l->refcount_blocks << l->cluster_bits;

    const struct {
        uint64_t offset;
        struct qcow2_table_content content;
    } tables[] = {
        {
            .offset = l->refcount_table_offset,
            .content = {.count = l->refcount_blocks,
                        .target = l->refcount_blocks_offset,
                        .step = cluster_size},
        },
        {
            .offset = l->l1_offset,
            .content = {.count = l->l2_tables,
                        .target = l->l2_offset | QCOW2_COPIED,
                        .step = cluster_size},
        },
        {
            .offset = l->l2_offset,
            .content = {.count = l->mapped_clusters,
                        .target = (l->data_file ? 0 : l->data_offset) | qcow2_data_flags(l),
                        .step = cluster_size,
                        .extended = l->extended_l2,
                        .second = qcow2_data_bits(l)},
        },
    };

    uint8_t *bytes = buf;
    uint64_t start;
    size_t n;

    memset(buf, 0, len);
    if (qcow2_cut(offset, len, 0, cluster_size, &start, &n))
        qcow2_header_cluster_fill(l, start, bytes + (start - offset), n);
    for (unsigned i = 0; i < ARRAY_SIZE(tables); i++) {
        uint64_t entry_len =
            tables[i].content.extended ? qcow2_layout_l2_entry(l) : QCOW2_ENTRY_LEN;

        if (qcow2_cut(offset, len, tables[i].offset, tables[i].content.count * entry_len, &start,
                      &n))
            qcow2_table_fill(&tables[i].content, start - tables[i].offset, bytes + (start - offset),
                             n);
    }
    if (qcow2_cut(offset, len, l->refcount_blocks_offset, blocks_len, &start, &n)) {
        for (size_t i = 0; i < n; i++)
            bytes[start - offset + i] =
                qcow2_refcount_byte(l, start - l->refcount_blocks_offset + i);
    }
}

/* --- The file --- */

static int co_fn qcow2_co_write_segment(struct file *f, const struct qcow2_layout *l,
                                        const struct qcow2_segment *s, uint8_t *piece)
{
    for (uint64_t done = 0; done < s->len;) {
        size_t n = (size_t)MIN(s->len - done, (uint64_t)QCOW2_CREATE_PIECE);
        struct iovec iov = {piece, n};
        int r;

        qcow2_layout_read(l, s->offset + done, piece, n);
        r = file_co_write(f, s->offset + done, &iov, 1, false, NULL);
        if (r < 0)
            return r;
        done += n;
    }
    return 0;
}

static int co_fn qcow2_co_write_layout(struct file *f, const struct qcow2_layout *l)
{
    AUTO(free_ptr) uint8_t *piece = try_alloc(1, QCOW2_CREATE_PIECE);
    int r;

    if (!piece)
        return -ENOMEM;
    r = file_co_truncate(f, l->file_size);
    if (r < 0)
        return r;
    /* The header, segment 0, is last, and nothing of it is there before the rest is durable. */
    for (unsigned i = l->segment_count; i-- > 0;) {
        if (i == 0)
            r = file_co_sync(f);
        if (r == 0)
            r = qcow2_co_write_segment(f, l, &l->segments[i], piece);
        if (r < 0)
            return r;
    }
    return file_co_sync(f);
}

static int co_fn qcow2_co_fill_file(struct file *f, const struct qcow2_layout *l)
{
    int r = qcow2_co_write_layout(f, l);
    int closed;

    co_shield_begin();
    closed = file_co_close(f);
    co_shield_end();
    return r < 0 ? r : closed;
}

int co_fn qcow2_co_create(const char *path, const struct qcow2_create_options *options,
                          struct error **err)
{
    struct qcow2_layout layout = {0};
    struct file *f;
    int r = qcow2_layout_make(options, &layout, err);

    if (r < 0)
        return error_wrap(err, r, "cannot create '%s'", path);
    co_shield_begin(); /* an open that its waiter has left may still make the file */
    r = file_co_open(&f, path, FILE_READ | FILE_WRITE | FILE_CREATE | FILE_EXCLUSIVE, 0644, err);
    co_shield_end();
    if (r < 0)
        return r;
    r = qcow2_co_fill_file(f, &layout);
    if (r == 0)
        r = file_co_sync_dir(path);
    if (r < 0) {
        co_shield_begin();
        (void)file_co_unlink(path); /* the first failure is the one to tell */
        co_shield_end();
        return error_set(err, -r, "cannot create '%s': %s", path, strerror(-r));
    }
    return 0;
}
