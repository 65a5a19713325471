/* SPDX-License-Identifier: Apache-2.0 */
/*
 * vpc: Microsoft's VHD images, fixed and dynamic, for reading. Integers are big endian.
 *
 *     fixed     data, footer
 *     dynamic   copy of the footer, dynamic header, table of blocks, blocks, footer
 *
 * An entry of the table is the sector where a block begins: with a bitmap that says which of its sectors were ever written,
 * and after it the sectors. Those that were not read as zeroes.
 */
#include "base/checked.h"
#include "base/endian.h"
#include "formats/import.h"
#include "graph/gate.h"
#include "vpc-options.h"

#include <errno.h>
#include <inttypes.h>
#include <string.h>

#define VPC_SECTOR          512
#define VPC_HEADER_LEN      1024
#define VPC_FOOTER_COOKIE   "conectix"
#define VPC_HEADER_COOKIE   "cxsparse"
#define VPC_VERSION_MAJOR   1
#define VPC_BLOCK_NOWHERE   0xffffffffu
#define VPC_BLOCK_BYTES_MAX ((uint32_t)1 << 30)

#define VPC_TYPE_FIXED      2
#define VPC_TYPE_DYNAMIC    3
#define VPC_TYPE_DIFFERENCE 4

/* Where the fields of the footer lie, and those of the dynamic header. */
enum {
    VPC_AT_VERSION = 12,
    VPC_AT_HEADER = 16,
    VPC_AT_CREATOR = 28,
    VPC_AT_SIZE = 48,
    VPC_AT_GEOMETRY = 56,
    VPC_AT_TYPE = 60,
    VPC_AT_CHECKSUM = 64,

    VPC_AT_TABLE = 16,
    VPC_AT_HEADER_VERSION = 24,
    VPC_AT_ENTRIES = 28,
    VPC_AT_BLOCK_SIZE = 32,
    VPC_AT_HEADER_CHECKSUM = 36,
};

struct vpc {
    /* Set in open, then constant. */
    struct import import;
    bool fixed;
    struct import_blocks blocks; /* of a dynamic image */
    uint64_t bitmap_bytes;       /* before the sectors of a block */
    uint64_t file_size;
};

/* ---- what it is ---- */

/* The one's complement of the sum of all other bytes. */
static uint32_t checksum(const uint8_t *bytes, size_t len, size_t at)
{
    uint32_t sum = 0;

    for (size_t i = 0; i < len; i++)
        sum += i < at || i >= at + 4 ? bytes[i] : 0;
    return ~sum;
}

static bool is_footer(const uint8_t *f)
{
    return memcmp(f, VPC_FOOTER_COOKIE, 8) == 0 &&
           checksum(f, VPC_SECTOR, VPC_AT_CHECKSUM) == load_be32(f + VPC_AT_CHECKSUM);
}

/* The copy at the start, else the footer itself: one of them may be damaged. */
static int co_fn read_footer(struct vpc *v, const struct request *by, uint8_t *ret,
                             struct error **err)
{
    struct edge *file = node_file(v->import.node);
    const char *name = node_name(v->import.node);
    bool cookie = false;
    int r = 0;

    if (v->file_size < VPC_SECTOR)
        return error_set(err, EINVAL, "node '%s': this is no VHD image: it has %" PRIu64 " bytes",
                         name, v->file_size);
    for (int i = 0; r == 0 && i < 2; i++) {
        r = import_co_read_named(&v->import, by, "footer", file, i ? v->file_size - VPC_SECTOR : 0,
                                 ret, VPC_SECTOR, err);
        if (r == 0 && is_footer(ret) && (i || load_be32(ret + VPC_AT_TYPE) != VPC_TYPE_FIXED))
            return 0;
        cookie |= r == 0 && memcmp(ret, VPC_FOOTER_COOKIE, 8) == 0;
    }
    if (r == 0 && cookie)
        return error_set(err, EINVAL, "node '%s': the checksum of the footer is wrong", name);
    return r < 0 ? r
                 : error_set(err, EINVAL,
                             "node '%s': this is no VHD image: neither begin nor end is a footer",
                             name);
}

/*
 * Virtual PC, Virtual Server and older QEMU show their guests what the geometry gives, and leave the rest. The largest geometry
 * stands for whatever is larger.
 */
static uint64_t disk_size(const uint8_t *f)
{
    static const char *const by_geometry[] = {"vpc ", "vs  ", "qemu"};
    uint64_t sectors =
        (uint64_t)load_be16(f + VPC_AT_GEOMETRY) * f[VPC_AT_GEOMETRY + 2] * f[VPC_AT_GEOMETRY + 3];

    for (size_t i = 0; i < ARRAY_SIZE(by_geometry); i++) {
        if (memcmp(f + VPC_AT_CREATOR, by_geometry[i], 4) == 0 &&
            sectors < (uint64_t)65535 * 16 * 255)
            return sectors * VPC_SECTOR;
    }
    return load_be64(f + VPC_AT_SIZE);
}

static int check_footer(const struct vpc *v, const uint8_t *f, struct error **err)
{
    const char *name = node_name(v->import.node);
    uint32_t type = load_be32(f + VPC_AT_TYPE);
    uint64_t size = disk_size(f);

    if (load_be16(f + VPC_AT_VERSION) != VPC_VERSION_MAJOR)
        return error_set(err, ENOTSUP, "node '%s': the image has version %u, and only 1 is read",
                         name, load_be16(f + VPC_AT_VERSION));
    if (type == VPC_TYPE_DIFFERENCE)
        return error_set(err, ENOTSUP,
                         "node '%s': the image is a difference to another one, which is not "
                         "supported: merge them first",
                         name);
    if (type != VPC_TYPE_FIXED && type != VPC_TYPE_DYNAMIC)
        return error_set(err, ENOTSUP,
                         "node '%s': the image is of type %" PRIu32
                         ", and only fixed (2) and dynamic (3) ones are read",
                         name, type);
    if (size > (uint64_t)NODE_SIZE_MAX || !is_aligned(size, VPC_SECTOR))
        return error_set(err, EINVAL, "node '%s': a disk of %" PRIu64 " bytes", name, size);
    if (type == VPC_TYPE_FIXED && size > v->file_size - VPC_SECTOR)
        return error_set(err, EINVAL,
                         "node '%s': a fixed disk of %" PRIu64 " bytes in a file of %" PRIu64, name,
                         size, v->file_size);
    return 0;
}

/* ---- dynamic images ---- */

static int check_header(const struct vpc *v, const uint8_t *h, uint64_t size, struct error **err)
{
    const char *name = node_name(v->import.node);
    uint64_t table = load_be64(h + VPC_AT_TABLE);
    uint64_t entries = load_be32(h + VPC_AT_ENTRIES);
    uint32_t block = load_be32(h + VPC_AT_BLOCK_SIZE);

    if (memcmp(h, VPC_HEADER_COOKIE, 8) != 0)
        return error_set(err, EINVAL, "node '%s': there is no dynamic header where it should be",
                         name);
    if (checksum(h, VPC_HEADER_LEN, VPC_AT_HEADER_CHECKSUM) !=
        load_be32(h + VPC_AT_HEADER_CHECKSUM))
        return error_set(err, EINVAL, "node '%s': the checksum of the dynamic header is wrong",
                         name);
    if (load_be16(h + VPC_AT_HEADER_VERSION) != VPC_VERSION_MAJOR)
        return error_set(err, ENOTSUP,
                         "node '%s': the dynamic header has version %u, and only 1 is read", name,
                         load_be16(h + VPC_AT_HEADER_VERSION));
    if (!is_power_of_2(block) || block < VPC_SECTOR || block > VPC_BLOCK_BYTES_MAX)
        return error_set(err, EINVAL,
                         "node '%s': blocks of %" PRIu32
                         " bytes, and not of a power of two from 512 to %" PRIu32,
                         name, block, VPC_BLOCK_BYTES_MAX);
    if (size > entries * block)
        return error_set(err, EINVAL,
                         "node '%s': a disk of %" PRIu64 " bytes, and %" PRIu64
                         " blocks of %" PRIu32 " bytes",
                         name, size, entries, block);
    if (!is_aligned(table, VPC_SECTOR) || !range_within(table, entries * 4, v->file_size))
        return error_set(err, EINVAL, /* IMPORT-2 */
                         "node '%s': a table of %" PRIu64 " blocks cannot lie at %" PRIu64
                         " of a file of %" PRIu64 " bytes",
                         name, entries, table, v->file_size);
    return 0;
}

/* The place of the bitmap. */
static int entry_says(struct import *im, const struct import_blocks *b, uint64_t block,
                      const uint8_t *entry, struct mapping *ret)
{
    const struct vpc *v = b->of;
    uint64_t at = (uint64_t)load_be32(entry) * VPC_SECTOR;

    *ret = (struct mapping){.kind = MAPPING_ZERO};
    if (load_be32(entry) == VPC_BLOCK_NOWHERE)
        return 0;
    if (!range_within(at, v->bitmap_bytes + ((uint64_t)1 << v->blocks.block_bits), v->file_size))
        return import_damaged(im, /* IMPORT-2 */
                              "block %" PRIu64 " lies at %" PRIu64 ", beyond the end of the file",
                              block, at);
    *ret = (struct mapping){.kind = MAPPING_DATA, .host_offset = at};
    return 0;
}

static bool bit_is_set(const uint8_t *byte, uint64_t sector)
{
    return *byte >> (7 - sector % 8) & 1; /* the first sector is the highest bit */
}

/* How far the bitmap at `bitmap` says of the sectors from `sector` to `end` what it says of the first one. */
static int co_fn run_of_sectors(struct vpc *v, const struct request *by, uint64_t bitmap,
                                uint64_t sector, uint64_t end, bool *ret_written, uint64_t *ret_end)
{
    struct import_page *page;
    const uint8_t *byte;
    uint64_t at = sector;
    int r = import_page_get(&v->import, by, v->blocks.file, bitmap + sector / 8, &page);

    if (r < 0)
        return r;
    byte = import_page_at(page, bitmap + sector / 8);
    *ret_written = byte && bit_is_set(byte, sector);
    while (byte && at < end && bit_is_set(byte, at) == *ret_written) {
        at++;
        byte = import_page_at(page, bitmap + at / 8);
    }
    import_page_put(&v->import, page);
    *ret_end = at;
    return 0;
}

/* A block's own bitmap decides. No run goes on in the next block: its bitmap lies between them. */
static int co_fn map_block(struct vpc *v, const struct request *req, uint64_t offset,
                           struct mapping *ret)
{
    uint64_t size = (uint64_t)1 << v->blocks.block_bits;
    uint64_t in_block = offset & (size - 1);
    uint64_t len = MIN(ret->len, size - in_block);
    uint64_t bitmap = ret->host_offset - in_block;
    uint64_t sector = in_block / VPC_SECTOR;
    uint64_t end = (in_block + len + VPC_SECTOR - 1) / VPC_SECTOR;
    uint64_t run_end;
    bool written;
    int r = run_of_sectors(v, req, bitmap, sector, end, &written, &run_end);

    if (r < 0)
        return r;
    ret->kind = written ? MAPPING_DATA : MAPPING_ZERO;
    if (!written)
        ret->host = NULL;
    ret->host_offset += v->bitmap_bytes;
    ret->len = MIN(len, run_end * VPC_SECTOR - in_block);
    return 0;
}

static int co_fn vpc_co_map(struct node *node, const struct request *req, uint64_t offset,
                            uint64_t len, struct mapping *ret)
{
    struct vpc *v = node_state(node);
    int r;

    if (v->fixed) {
        *ret = (struct mapping){.kind = MAPPING_DATA,
                                .len = len,
                                .host_offset = offset,
                                .host = node_file(node),
                                .holes = true};
        return 0;
    }
    r = import_map_blocks(&v->import, &v->blocks, req, offset, len, ret);
    return r < 0 || ret->kind != MAPPING_DATA ? r : map_block(v, req, offset, ret);
}

/* ---- opening ---- */

static int co_fn open_dynamic(struct vpc *v, const struct request *by, const uint8_t *footer,
                              struct error **err)
{
    struct edge *file = node_file(v->import.node);
    uint8_t h[VPC_HEADER_LEN];
    uint64_t sectors;
    int r = import_co_read_named(&v->import, by, "dynamic header", file,
                                 load_be64(footer + VPC_AT_HEADER), h, sizeof(h), err);

    if (r == 0)
        r = check_header(v, h, disk_size(footer), err);
    if (r < 0)
        return r;
    v->blocks = (struct import_blocks){
        .file = file,
        .table = load_be64(h + VPC_AT_TABLE),
        .entry_bytes = 4,
        .block_bits = (unsigned)__builtin_ctz(load_be32(h + VPC_AT_BLOCK_SIZE)),
        .entry = entry_says,
        .of = v,
    };
    sectors = load_be32(h + VPC_AT_BLOCK_SIZE) / VPC_SECTOR;
    v->bitmap_bytes = align_up((sectors + 7) / 8, VPC_SECTOR);
    return 0;
}

static int co_fn control_fn vpc_co_open(struct node *node, const void *options, struct error **err)
{
    struct vpc *v = node_state(node);
    struct pass pass = {0};
    struct request by = {.pass = &pass};
    uint8_t footer[VPC_SECTOR];
    int r;

    (void)options;
    import_init(&v->import, node);
    v->file_size = node_size(edge_node(node_file(node)));
    r = read_footer(v, &by, footer, err);
    if (r == 0)
        r = check_footer(v, footer, err);
    if (r < 0)
        return r;
    v->fixed = load_be32(footer + VPC_AT_TYPE) == VPC_TYPE_FIXED;
    node_set_size(node, disk_size(footer));
    return v->fixed ? 0 : open_dynamic(v, &by, footer, err);
}

static void co_fn control_fn vpc_co_close(struct node *node)
{
    struct vpc *v = node_state(node);

    import_release(&v->import);
}

static uint64_t vpc_cluster_bytes(const struct node *node)
{
    const struct vpc *v = node_state(node);

    return v->fixed ? 0 : (uint64_t)1 << v->blocks.block_bits;
}

const struct driver vpc_driver = {
    .name = "vpc",
    .kind = DRIVER_FORMAT,
    .state_size = sizeof(struct vpc),
    .options = &vpc_options_type,
    .keeps_metadata = true,
    .only_reads = true,
    .co_open = vpc_co_open,
    .co_close = vpc_co_close,
    .co_map = vpc_co_map,
    .filename = import_filename,
    .allocated_bytes = import_allocated_bytes,
    .cluster_bytes = vpc_cluster_bytes,
};
