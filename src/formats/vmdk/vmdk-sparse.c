/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Sparse extents. The header says where the grain directory lies, or that a footer says it: a copy of the header, in the second
 * but last sector of a file that was written as a stream. An entry of the directory is the sector of a grain table, one of a
 * table the sector of a grain; 0 is nowhere.
 */
#include "base/checked.h"
#include "base/endian.h"
#include "formats/vmdk/vmdk-internal.h"

#include <errno.h>
#include <inttypes.h>
#include <string.h>

#define MAGIC_SPARSE     0x564d444bu /* "KDMV" */
#define MAGIC_ESX        0x44574f43u /* "COWD" */
#define VERSION_MAX      3
#define HEADER_LEN       512
#define DIRECTORY_AT_END UINT64_MAX
#define GRAIN_ZERO       1u
#define DEFLATE          1

/* Where the footer lies, from the end, and the marker before it. */
#define FOOTER_FROM_END 1024
#define MARKER_LEN      512
#define MARKER_FOOTER   3

enum header_flags {
    FLAG_NEWLINES =
        1 << 0, /* the four bytes below tell whether the file went through a text transfer */
    FLAG_ZERO_GRAINS = 1 << 2,
    FLAG_COMPRESSED = 1 << 16,
    FLAG_MARKERS = 1 << 17,
};

/* Where the fields lie. */
enum {
    AT_MAGIC = 0,
    AT_VERSION = 4,
    AT_FLAGS = 8,
    AT_CAPACITY = 12,
    AT_GRAIN = 20,
    AT_DESCRIPTOR = 28,
    AT_DESCRIPTOR_LEN = 36,
    AT_TABLE_ENTRIES = 44,
    AT_DIRECTORY = 56,
    AT_NEWLINES = 73,
    AT_COMPRESSION = 77,
};

static const uint8_t newlines[4] = {'\n', ' ', '\r', '\n'};

static int check_kind(const struct vmdk *v, const uint8_t *h, struct error **err)
{
    const char *name = node_name(v->import.node);
    uint32_t flags = load_le32(h + AT_FLAGS);
    bool compressed = flags & FLAG_COMPRESSED;

    if (load_le32(h + AT_MAGIC) == MAGIC_ESX)
        return error_set(err, ENOTSUP, "node '%s': sparse extents of ESX (COWD) are not supported",
                         name);
    if (load_le32(h + AT_MAGIC) != MAGIC_SPARSE)
        return error_set(err, EINVAL,
                         "node '%s': this is no VMDK extent: the signature is 0x%08" PRIx32, name,
                         load_le32(h + AT_MAGIC));
    if (!load_le32(h + AT_VERSION) || load_le32(h + AT_VERSION) > VERSION_MAX)
        return error_set(err, ENOTSUP,
                         "node '%s': the extent has version %" PRIu32 ", and 1 to %d are read",
                         name, load_le32(h + AT_VERSION), VERSION_MAX);
    if (flags & FLAG_NEWLINES && memcmp(h + AT_NEWLINES, newlines, 4) != 0)
        return error_set(err, EINVAL,
                         "node '%s': line ends were converted in this file: it was copied as text",
                         name);
    if (compressed && !(flags & FLAG_MARKERS))
        return error_set(err, ENOTSUP, "node '%s': compressed grains without markers", name);
    if (compressed && load_le16(h + AT_COMPRESSION) != DEFLATE)
        return error_set(err, ENOTSUP,
                         "node '%s': compression %u is not supported, but 1 (deflate) is", name,
                         load_le16(h + AT_COMPRESSION));
    return 0;
}

static int check_layout(const struct vmdk *v, const uint8_t *h, uint64_t file_size,
                        struct error **err)
{
    const char *name = node_name(v->import.node);
    uint64_t capacity = load_le64(h + AT_CAPACITY);
    uint64_t grain = load_le64(h + AT_GRAIN);
    uint64_t entries = load_le32(h + AT_TABLE_ENTRIES);
    uint64_t directory = load_le64(h + AT_DIRECTORY);
    uint64_t tables;

    if (!is_power_of_2(grain) || grain > VMDK_GRAIN_BYTES_MAX / VMDK_SECTOR)
        return error_set(err, EINVAL,
                         "node '%s': grains of %" PRIu64
                         " sectors, and not of a power of two to %" PRIu64,
                         name, grain, VMDK_GRAIN_BYTES_MAX / VMDK_SECTOR);
    if (!entries || entries > VMDK_TABLE_ENTRIES_MAX)
        return error_set(err, EINVAL,
                         "node '%s': grain tables of %" PRIu64 " entries, and not of 1 to %u", name,
                         entries, VMDK_TABLE_ENTRIES_MAX);
    if (capacity > (uint64_t)NODE_SIZE_MAX / VMDK_SECTOR)
        return error_set(err, EINVAL, "node '%s': an extent of %" PRIu64 " sectors", name,
                         capacity);
    tables = (capacity + grain * entries - 1) / (grain * entries);
    if (directory > file_size / VMDK_SECTOR ||
        !range_within(directory * VMDK_SECTOR, tables * 4, file_size)) /* IMPORT-2 */
        return error_set(err, EINVAL,
                         "node '%s': a directory of %" PRIu64
                         " grain tables cannot lie at sector %" PRIu64 " of a file of %" PRIu64
                         " bytes",
                         name, tables, directory, file_size);
    return 0;
}

/* A file that was written as a stream has the place of its directory at the end. */
static int co_fn read_footer(struct vmdk *v, const struct request *by, const struct vmdk_extent *e,
                             uint8_t *h, struct error **err)
{
    const char *name = node_name(v->import.node);
    uint8_t end[MARKER_LEN + HEADER_LEN];
    int r;

    if (e->file_size < FOOTER_FROM_END + MARKER_LEN)
        return error_set(err, EINVAL, "node '%s': the file ends before its footer", name);
    r = import_co_read_named(&v->import, by, "footer", e->file,
                             e->file_size - FOOTER_FROM_END - MARKER_LEN, end, sizeof(end), err);
    if (r < 0)
        return r;
    if (load_le32(end + 8) != 0 || load_le32(end + 12) != MARKER_FOOTER ||
        load_le64(end + MARKER_LEN + AT_DIRECTORY) == DIRECTORY_AT_END)
        return error_set(err, EINVAL,
                         "node '%s': there is no footer at the end of the file: it was cut off",
                         name);
    memcpy(h, end + MARKER_LEN, HEADER_LEN);
    return check_kind(v, h, err);
}

int vmdk_sparse_open(struct vmdk *v, const struct request *by, struct vmdk_extent *e,
                     uint64_t *ret_capacity, uint64_t *ret_text, uint64_t *ret_text_len,
                     struct error **err)
{
    uint8_t h[HEADER_LEN];
    uint32_t flags;
    int r;

    e->file_size = node_size(edge_node(e->file));
    r = import_co_read_named(&v->import, by, "header", e->file, 0, h, sizeof(h), err);
    if (r == 0)
        r = check_kind(v, h, err);
    *ret_text = load_le64(h + AT_DESCRIPTOR);
    *ret_text_len = load_le64(h + AT_DESCRIPTOR_LEN);
    if (r == 0 && load_le64(h + AT_DIRECTORY) == DIRECTORY_AT_END)
        r = read_footer(v, by, e, h, err);
    if (r == 0)
        r = check_layout(v, h, e->file_size, err);
    if (r < 0)
        return r;
    flags = load_le32(h + AT_FLAGS);
    e->directory = load_le64(h + AT_DIRECTORY) * VMDK_SECTOR;
    e->grain_bits = (unsigned)__builtin_ctzll(load_le64(h + AT_GRAIN) * VMDK_SECTOR);
    e->table_entries = load_le32(h + AT_TABLE_ENTRIES);
    e->compressed = flags & FLAG_COMPRESSED;
    e->zero_grains = flags & FLAG_ZERO_GRAINS;
    *ret_capacity = load_le64(h + AT_CAPACITY);
    return 0;
}

/* ---- the tables ---- */

static int entry_says(struct import *im, const struct import_blocks *b, uint64_t block,
                      const uint8_t *entry, struct mapping *ret)
{
    const struct vmdk_extent *e = b->of;
    uint64_t sector = load_le32(entry);

    *ret = (struct mapping){.kind = MAPPING_BELOW};
    if (!sector)
        return 0;
    if (sector == GRAIN_ZERO && e->zero_grains) {
        ret->kind = MAPPING_ZERO;
        return 0;
    }
    if (sector * VMDK_SECTOR >= e->file_size) /* IMPORT-2; the last grain may be cut */
        return import_damaged(im,
                              "entry %" PRIu64 " of the grain table at %" PRIu64
                              " points to %" PRIu64 ", beyond the end of its file",
                              block, b->table, sector * VMDK_SECTOR);
    *ret = (struct mapping){.kind = e->compressed ? MAPPING_ENCODED : MAPPING_DATA,
                            .host_offset = sector * VMDK_SECTOR};
    return 0;
}

/* The place of a grain table; 0: nowhere. */
static int co_fn find_table(struct vmdk *v, const struct vmdk_extent *e, const struct request *by,
                            uint64_t index, uint64_t *ret)
{
    struct import_page *page;
    int r = import_page_get(&v->import, by, e->file, e->directory + index * 4, &page);

    if (r < 0)
        return r;
    *ret = (uint64_t)load_le32(import_page_at(page, e->directory + index * 4)) * VMDK_SECTOR;
    import_page_put(&v->import, page);
    if (*ret && !range_within(*ret, (uint64_t)e->table_entries * 4, e->file_size)) /* IMPORT-2 */
        return import_damaged(&v->import,
                              "entry %" PRIu64 " of the grain directory at %" PRIu64
                              " points to %" PRIu64 ", beyond the end of its file",
                              index, e->directory, *ret);
    return 0;
}

int vmdk_sparse_map(struct vmdk *v, const struct vmdk_extent *e, const struct request *req,
                    uint64_t offset, uint64_t len, struct mapping *ret)
{
    uint64_t covers = (uint64_t)e->table_entries << e->grain_bits;
    uint64_t index = offset / covers;
    uint64_t in_table = offset - index * covers;
    struct import_blocks t = {.file = e->file,
                              .entry_bytes = 4,
                              .block_bits = e->grain_bits,
                              .entry = entry_says,
                              .of = e};
    int r = find_table(v, e, req, index, &t.table);

    if (r < 0)
        return r;
    len = MIN(len, covers - in_table);
    if (!t.table) {
        *ret = (struct mapping){.kind = MAPPING_BELOW, .len = len};
        return 0;
    }
    r = import_map_blocks(&v->import, &t, req, in_table, len, ret);
    if (ret->kind == MAPPING_ENCODED) /* it is read by its begin */
        ret->host_offset -= in_table & (((uint64_t)1 << e->grain_bits) - 1);
    return r;
}
