/* SPDX-License-Identifier: Apache-2.0 */
/* vhdx: headers, regions, metadata, and the table of blocks. */
#include "base/alloc.h"
#include "base/checked.h"
#include "base/crc32c.h"
#include "base/endian.h"
#include "formats/vhdx/vhdx-internal.h"
#include "graph/gate.h"
#include "vhdx-options.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#define HEADER_LEN       4096
#define HEADER_SUM_AT    4
#define TABLE_LEN        ((size_t)64 << 10) /* of regions, and of metadata */
#define TABLE_SUM_AT     4
#define ENTRIES_MAX      2047
#define ENTRY_LEN        32
#define REGION_ENTRIES   16 /* where the entries begin */
#define METADATA_ENTRIES 32
#define VERSION          1
#define DISK_BYTES_MAX   ((uint64_t)64 << 40)
#define BLOCK_BYTES_MIN  ((uint64_t)1 << 20)
#define BLOCK_BYTES_MAX  ((uint64_t)256 << 20)

static const uint64_t header_places[] = {64 << 10, 128 << 10};
static const uint64_t region_places[] = {192 << 10, 256 << 10};

/* Where the fields of a header lie, those of a region's entry, and those of an entry of the metadata. */
enum {
    AT_NUMBER = 8,
    AT_LOG_GUID = 48,
    AT_LOG_VERSION = 64,
    AT_VERSION = 66,
    AT_LOG_LEN = 68,
    AT_LOG_OFFSET = 72,

    AT_REGION_COUNT = 8,
    AT_REGION_OFFSET = 16,
    AT_REGION_LEN = 24,
    AT_REGION_REQUIRED = 28,

    AT_ITEM_COUNT = 10,
    AT_ITEM_OFFSET = 16,
    AT_ITEM_LEN = 20,
    AT_ITEM_FLAGS = 24,
};

#define ITEM_REQUIRED (1u << 2)
#define HAS_PARENT    (1u << 1)

typedef uint8_t guid[VHDX_GUID_LEN];

/* As they lie in the file. */
static const guid region_bat = {0x66, 0x77, 0xc2, 0x2d, 0x23, 0xf6, 0x00, 0x42,
                                0x9d, 0x64, 0x11, 0x5e, 0x9b, 0xfd, 0x4a, 0x08};
static const guid region_metadata = {0x06, 0xa2, 0x7c, 0x8b, 0x90, 0x47, 0x9a, 0x4b,
                                     0xb8, 0xfe, 0x57, 0x5f, 0x05, 0x0f, 0x88, 0x6e};

enum item {
    ITEM_PARAMETERS,
    ITEM_SIZE,
    ITEM_SECTOR,
    ITEM_PAGE_83,
    ITEM_PHYSICAL,
    ITEM_PARENT,
    ITEMS
};

/* The first three are needed; the fourth and fifth are known and not looked at. */
static const struct {
    const char *name;
    guid id;
    uint32_t len;
} items[ITEMS] = {
    {"file parameters",
     {0x37, 0x67, 0xa1, 0xca, 0x36, 0xfa, 0x43, 0x4d, 0xb3, 0xb6, 0x33, 0xf0, 0xaa, 0x44, 0xe7,
      0x6b},
     8},
    {"size of the disk",
     {0x24, 0x42, 0xa5, 0x2f, 0x1b, 0xcd, 0x76, 0x48, 0xb2, 0x11, 0x5d, 0xbe, 0xd8, 0x3b, 0xf4,
      0xb8},
     8},
    {"size of a sector",
     {0x1d, 0xbf, 0x41, 0x81, 0x6f, 0xa9, 0x09, 0x47, 0xba, 0x47, 0xf2, 0x33, 0xa8, 0xfa, 0xab,
      0x5f},
     4},
    {"page 83 data",
     {0xab, 0x12, 0xca, 0xbe, 0xe6, 0xb2, 0x23, 0x45, 0x93, 0xef, 0xc3, 0x09, 0xe0, 0x00, 0xc7,
      0x46},
     16},
    {"size of a physical sector",
     {0xc7, 0x48, 0xa3, 0xcd, 0x5d, 0x44, 0x71, 0x44, 0x9c, 0xc9, 0xe9, 0x88, 0x52, 0x51, 0xc5,
      0x56},
     4},
    {"place of the parent",
     {0x2d, 0x5f, 0xd3, 0xa8, 0x0b, 0xb3, 0x4d, 0x45, 0xab, 0xf7, 0xd3, 0xd8, 0x48, 0x34, 0xab,
      0x0c},
     0},
};

/* What the metadata say. */
struct disk {
    bool present[ITEMS];
    uint32_t block;
    uint32_t flags;
    uint64_t size;
    uint32_t sector;
};

struct region {
    uint64_t offset;
    uint64_t len; /* 0: there is none */
};

uint32_t vhdx_sum(const uint8_t *bytes, size_t len, size_t at)
{
    static const uint8_t zeroes[4];
    uint32_t crc = crc32c(0, bytes, at);

    crc = crc32c(crc, zeroes, sizeof(zeroes));
    return crc32c(crc, bytes + at + 4, len - at - 4);
}

/* ---- the header ---- */

static bool is_header(const uint8_t *h)
{
    return memcmp(h, "head", 4) == 0 &&
           vhdx_sum(h, HEADER_LEN, HEADER_SUM_AT) == load_le32(h + HEADER_SUM_AT);
}

/* The one that was written last; the other one may have been torn by a crash. */
static int co_fn read_header(struct vhdx *v, const struct request *by, uint8_t *ret,
                             struct error **err)
{
    uint8_t h[HEADER_LEN];
    bool found = false;

    for (size_t i = 0; i < ARRAY_SIZE(header_places); i++) {
        int r = import_co_read_named(&v->import, by, "header", node_file(v->import.node),
                                     header_places[i], h, sizeof(h), err);

        if (r < 0)
            return r;
        if (!is_header(h) || (found && load_le64(h + AT_NUMBER) < load_le64(ret + AT_NUMBER)))
            continue;
        memcpy(ret, h, sizeof(h));
        found = true;
    }
    if (!found)
        return error_set(err, EINVAL, "node '%s': neither of the two headers is sound",
                         node_name(v->import.node));
    return 0;
}

static int co_fn open_log(struct vhdx *v, const struct request *by, const uint8_t *h,
                          struct error **err)
{
    static const guid none;
    const char *name = node_name(v->import.node);
    int r;

    if (load_le16(h + AT_VERSION) != VERSION)
        return error_set(err, ENOTSUP, "node '%s': the image has version %u, and only 1 is read",
                         name, load_le16(h + AT_VERSION));
    if (memcmp(h + AT_LOG_GUID, none, sizeof(none)) == 0)
        return 0; /* it was closed in order */
    if (load_le16(h + AT_LOG_VERSION) != 0)
        return error_set(err, ENOTSUP, "node '%s': the log has version %u, and only 0 is read",
                         name, load_le16(h + AT_LOG_VERSION));
    r = vhdx_log_load(v, by, load_le64(h + AT_LOG_OFFSET), load_le32(h + AT_LOG_LEN),
                      h + AT_LOG_GUID, err);
    if (r < 0)
        return r;
    v->import.patch = vhdx_log_patch;
    v->import.patch_arg = &v->log;
    v->file_size = MAX(v->file_size, v->log.file_size);
    return 0;
}

/* ---- regions ---- */

static bool is_region_table(const uint8_t *t)
{
    return memcmp(t, "regi", 4) == 0 &&
           vhdx_sum(t, TABLE_LEN, TABLE_SUM_AT) == load_le32(t + TABLE_SUM_AT);
}

/* One of two copies. */
static int co_fn read_region_table(struct vhdx *v, const struct request *by, uint8_t *ret,
                                   struct error **err)
{
    for (size_t i = 0; i < ARRAY_SIZE(region_places); i++) {
        int r = import_co_read_named(&v->import, by, "region table", node_file(v->import.node),
                                     region_places[i], ret, TABLE_LEN, err);

        if (r < 0 || is_region_table(ret))
            return r;
    }
    return error_set(err, EINVAL, "node '%s': neither of the two region tables is sound",
                     node_name(v->import.node));
}

static int take_region(const struct vhdx *v, const uint8_t *e, struct region *ret, const char *what,
                       struct error **err)
{
    struct region r = {load_le64(e + AT_REGION_OFFSET), load_le32(e + AT_REGION_LEN)};

    if (!r.len || !is_aligned(r.offset | r.len, MIB) || r.offset < MIB ||
        !range_within(r.offset, r.len, v->file_size)) /* IMPORT-2 */
        return error_set(err, EINVAL,
                         "node '%s': %s of %" PRIu64 " bytes cannot lie at %" PRIu64
                         " of a file of %" PRIu64 " bytes",
                         node_name(v->import.node), what, r.len, r.offset, v->file_size);
    *ret = r;
    return 0;
}

static int find_regions(const struct vhdx *v, const uint8_t *t, struct region *ret_bat,
                        struct region *ret_metadata, struct error **err)
{
    const char *name = node_name(v->import.node);
    uint32_t count = load_le32(t + AT_REGION_COUNT);
    int r = 0;

    if (count > ENTRIES_MAX)
        return error_set(err, EINVAL, "node '%s': a region table of %" PRIu32 " entries", name,
                         count);
    for (uint32_t i = 0; r == 0 && i < count; i++) {
        const uint8_t *e = t + REGION_ENTRIES + (size_t)i * ENTRY_LEN;

        if (memcmp(e, region_bat, sizeof(guid)) == 0)
            r = take_region(v, e, ret_bat, "the table of blocks", err);
        else if (memcmp(e, region_metadata, sizeof(guid)) == 0)
            r = take_region(v, e, ret_metadata, "metadata", err);
        else if (load_le32(e + AT_REGION_REQUIRED) & 1)
            r = error_set(err, ENOTSUP, "node '%s': the image needs a region that is not known",
                          name);
    }
    if (r == 0 && (!ret_bat->len || !ret_metadata->len))
        r = error_set(err, EINVAL, "node '%s': the image has no %s", name,
                      ret_bat->len ? "metadata" : "table of blocks");
    return r;
}

/* ---- metadata ---- */

static int co_fn read_item(struct vhdx *v, const struct request *by, const struct region *metadata,
                           const uint8_t *e, enum item item, struct disk *ret, struct error **err)
{
    uint64_t offset = load_le32(e + AT_ITEM_OFFSET);
    uint32_t len = load_le32(e + AT_ITEM_LEN);
    uint8_t data[8];
    int r;

    ret->present[item] = true;
    if (item > ITEM_SECTOR)
        return 0;
    if (len != items[item].len || offset < TABLE_LEN || !range_within(offset, len, metadata->len))
        return error_set(err, EINVAL, /* IMPORT-2 */
                         "node '%s': the %s, of %" PRIu32 " bytes, cannot lie at %" PRIu64
                         " of the metadata",
                         node_name(v->import.node), items[item].name, len, offset);
    r = import_co_read_named(&v->import, by, items[item].name, node_file(v->import.node),
                             metadata->offset + offset, data, len, err);
    if (r < 0)
        return r;
    if (item == ITEM_PARAMETERS) {
        ret->block = load_le32(data);
        ret->flags = load_le32(data + 4);
    } else if (item == ITEM_SIZE) {
        ret->size = load_le64(data);
    } else {
        ret->sector = load_le32(data);
    }
    return 0;
}

static int co_fn read_entry(struct vhdx *v, const struct request *by, const struct region *metadata,
                            const uint8_t *e, struct disk *ret, struct error **err)
{
    for (unsigned i = 0; i < ITEMS; i++) {
        if (memcmp(e, items[i].id, sizeof(guid)) == 0)
            return read_item(v, by, metadata, e, i, ret, err);
    }
    if (load_le32(e + AT_ITEM_FLAGS) & ITEM_REQUIRED)
        return error_set(err, ENOTSUP, "node '%s': the image needs metadata that are not known",
                         node_name(v->import.node));
    return 0;
}

static int co_fn read_metadata(struct vhdx *v, const struct request *by,
                               const struct region *metadata, struct disk *ret, struct error **err)
{
    const char *name = node_name(v->import.node);
    AUTO(free_ptr) uint8_t *t = try_new_n(uint8_t, TABLE_LEN);
    int r = t ? import_co_read_named(&v->import, by, "metadata", node_file(v->import.node),
                                     metadata->offset, t, TABLE_LEN, err)
              : error_set(err, ENOMEM, "no memory");

    if (r == 0 && (memcmp(t, "metadata", 8) != 0 || load_le16(t + AT_ITEM_COUNT) > ENTRIES_MAX))
        r = error_set(err, EINVAL, "node '%s': the table of metadata is damaged", name);
    for (unsigned i = 0; r == 0 && i < load_le16(t + AT_ITEM_COUNT); i++)
        r = read_entry(v, by, metadata, t + METADATA_ENTRIES + (size_t)i * ENTRY_LEN, ret, err);
    for (unsigned i = 0; r == 0 && i <= ITEM_SECTOR; i++) {
        if (!ret->present[i])
            r = error_set(err, EINVAL, "node '%s': the metadata do not say the %s", name,
                          items[i].name);
    }
    return r;
}

static int check_disk(const struct vhdx *v, const struct disk *d, struct error **err)
{
    const char *name = node_name(v->import.node);

    if (d->flags & HAS_PARENT || d->present[ITEM_PARENT])
        return error_set(err, ENOTSUP,
                         "node '%s': the image is a difference to another one, which is not "
                         "supported: merge them first",
                         name);
    if (d->sector != 512 && d->sector != 4096)
        return error_set(err, EINVAL,
                         "node '%s': sectors of %" PRIu32 " bytes, and not of 512 or 4096", name,
                         d->sector);
    if (!is_power_of_2(d->block) || d->block < BLOCK_BYTES_MIN || d->block > BLOCK_BYTES_MAX)
        return error_set(err, EINVAL,
                         "node '%s': blocks of %" PRIu32
                         " bytes, and not of a power of two from 1 MiB to 256 MiB",
                         name, d->block);
    if (!is_aligned(d->size, d->sector) || d->size > DISK_BYTES_MAX)
        return error_set(err, EINVAL,
                         "node '%s': a disk of %" PRIu64
                         " bytes, and not of whole sectors up to 64 TiB",
                         name, d->size);
    return 0;
}

/* ---- blocks ---- */

enum block_state {
    BLOCK_NOT_PRESENT = 0,
    BLOCK_UNDEFINED = 1,
    BLOCK_ZERO = 2,
    BLOCK_UNMAPPED = 3,
    BLOCK_PRESENT = 6,
};

static int entry_says(struct import *im, const struct import_blocks *b, uint64_t block,
                      const uint8_t *entry, struct mapping *ret)
{
    const struct vhdx *v = b->of;
    uint64_t e = load_le64(entry);
    uint64_t offset = align_down(e, MIB);
    unsigned state = e & 7;

    *ret = (struct mapping){.kind = MAPPING_ZERO};
    if (state <= BLOCK_UNMAPPED)
        return 0;
    if (state != BLOCK_PRESENT)
        return import_damaged(im, "block %" PRIu64 " has the state %u", block, state);
    if (!range_within(offset, (uint64_t)1 << b->block_bits, v->file_size)) /* IMPORT-2 */
        return import_damaged(
            im, "block %" PRIu64 " lies at %" PRIu64 ", beyond the end of the file", block, offset);
    *ret = (struct mapping){.kind = MAPPING_DATA, .host_offset = offset};
    return 0;
}

/* The log may have changes of blocks, too. */
static void map_changes(const struct vhdx *v, struct mapping *ret)
{
    const struct vhdx_change *c = vhdx_change_from(&v->log, ret->host_offset);

    if (!c || c->offset >= ret->host_offset + ret->len)
        return;
    if (c->offset > ret->host_offset) {
        ret->len = c->offset - ret->host_offset;
        return;
    }
    ret->len = MIN(ret->len, c->offset + c->len - ret->host_offset);
    ret->kind = c->data ? MAPPING_ENCODED : MAPPING_ZERO;
    if (!c->data)
        ret->host = NULL;
}

static int co_fn vhdx_co_map(struct node *node, const struct request *req, uint64_t offset,
                             uint64_t len, struct mapping *ret)
{
    struct vhdx *v = node_state(node);
    int r = import_map_blocks(&v->import, &v->blocks, req, offset, len, ret);

    if (r == 0 && ret->kind == MAPPING_DATA && v->log.count)
        map_changes(v, ret);
    return r;
}

static int co_fn vhdx_co_read_encoded(struct node *node, struct request *req, uint64_t host_offset)
{
    const struct vhdx *v = node_state(node);
    const struct vhdx_change *c = vhdx_change_from(&v->log, host_offset);

    request_scatter(req, 0, c->data + (host_offset - c->offset), (size_t)req->len);
    return 0;
}

/* ---- opening ---- */

static int set_blocks(struct vhdx *v, const struct disk *d, const struct region *bat,
                      struct error **err)
{
    uint64_t group = ((uint64_t)d->sector << 23) / d->block;
    uint64_t count = (d->size + d->block - 1) / d->block;

    if (count && (count + (count - 1) / group) * 8 > bat->len)
        return error_set(err, EINVAL,
                         "node '%s': a disk of %" PRIu64 " blocks, and a table of %" PRIu64
                         " bytes",
                         node_name(v->import.node), count, bat->len);
    v->blocks = (struct import_blocks){
        .file = node_file(v->import.node),
        .table = bat->offset,
        .entry_bytes = 8,
        .block_bits = (unsigned)__builtin_ctz(d->block),
        .holes = true,
        .group = group,
        .entry = entry_says,
        .of = v,
    };
    node_set_size(v->import.node, d->size);
    return 0;
}

static int co_fn open_regions(struct vhdx *v, const struct request *by, struct error **err)
{
    AUTO(free_ptr) uint8_t *table = try_new_n(uint8_t, TABLE_LEN);
    struct region bat = {0};
    struct region metadata = {0};
    struct disk disk = {.size = 0};
    int r = table ? read_region_table(v, by, table, err) : error_set(err, ENOMEM, "no memory");

    if (r == 0)
        r = find_regions(v, table, &bat, &metadata, err);
    if (r == 0)
        r = read_metadata(v, by, &metadata, &disk, err);
    if (r == 0)
        r = check_disk(v, &disk, err);
    return r < 0 ? r : set_blocks(v, &disk, &bat, err);
}

static int co_fn open_image(struct vhdx *v, const struct request *by, struct error **err)
{
    uint8_t header[HEADER_LEN];
    uint8_t type[8];
    int r = import_co_read_named(&v->import, by, "file type", node_file(v->import.node), 0, type,
                                 sizeof(type), err);

    if (r == 0 && memcmp(type, "vhdxfile", 8) != 0)
        r = error_set(err, EINVAL, "node '%s': this is no VHDX image", node_name(v->import.node));
    if (r == 0)
        r = read_header(v, by, header, err);
    if (r == 0)
        r = open_log(v, by, header, err);
    return r < 0 ? r : open_regions(v, by, err);
}

static void release(struct vhdx *v)
{
    vhdx_log_release(&v->log);
    import_release(&v->import);
}

static int co_fn control_fn vhdx_co_open(struct node *node, const void *options, struct error **err)
{
    struct vhdx *v = node_state(node);
    struct pass pass = {0};
    struct request by = {.pass = &pass};
    int r;

    (void)options;
    import_init(&v->import, node);
    v->file_size = node_size(edge_node(node_file(node)));
    r = open_image(v, &by, err);
    if (r < 0)
        release(v);
    return r;
}

static void co_fn control_fn vhdx_co_close(struct node *node)
{
    release(node_state(node));
}

static uint64_t vhdx_cluster_bytes(const struct node *node)
{
    const struct vhdx *v = node_state(node);

    return (uint64_t)1 << v->blocks.block_bits;
}

const struct driver vhdx_driver = {
    .name = "vhdx",
    .kind = DRIVER_FORMAT,
    .state_size = sizeof(struct vhdx),
    .options = &vhdx_options_type,
    .keeps_metadata = true,
    .only_reads = true,
    .co_open = vhdx_co_open,
    .co_close = vhdx_co_close,
    .co_map = vhdx_co_map,
    .co_read_encoded = vhdx_co_read_encoded,
    .filename = import_filename,
    .allocated_bytes = import_allocated_bytes,
    .cluster_bytes = vhdx_cluster_bytes,
};
