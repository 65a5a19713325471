/* SPDX-License-Identifier: Apache-2.0 */
/*
 * vdi: VirtualBox's images, version 1.1, for reading. A header, a table of 32-bit numbers that say where in the data area each
 * block of the disk lies, and the blocks. Integers are little endian. Static images have the same layout.
 */
#include "base/checked.h"
#include "base/endian.h"
#include "formats/import.h"
#include "graph/gate.h"
#include "vdi-options.h"

#include <errno.h>
#include <inttypes.h>
#include <string.h>

#define VDI_SIGNATURE   0xbeda107fu
#define VDI_VERSION_1_1 0x00010001u
#define VDI_HEADER_LEN  512
#define VDI_SECTOR      512

#define VDI_TYPE_DYNAMIC 1
#define VDI_TYPE_STATIC  2

/* Entries from here on say that a block lies nowhere: one that was discarded, and one that was never written. */
#define VDI_BLOCK_DISCARDED 0xfffffffeu

/* Where the fields lie. */
enum {
    VDI_AT_SIGNATURE = 64,
    VDI_AT_VERSION = 68,
    VDI_AT_TYPE = 76,
    VDI_AT_MAP = 340,
    VDI_AT_DATA = 344,
    VDI_AT_SECTOR = 360,
    VDI_AT_SIZE = 368,
    VDI_AT_BLOCK_SIZE = 376,
    VDI_AT_BLOCK_EXTRA = 380,
    VDI_AT_BLOCKS = 384,
    VDI_AT_LINK_UUID = 424,
    VDI_AT_PARENT_UUID = 440,
};

struct vdi {
    /* Set in open, then constant. */
    struct import import;
    struct import_blocks blocks;
    uint64_t data; /* where the first block lies */
    uint64_t file_size;
};

/* In header order, so that what is told is what is wrong first. */
static int check_kind(const struct vdi *v, const uint8_t *h, struct error **err)
{
    static const uint8_t none[16];
    const char *name = node_name(v->import.node);
    uint32_t type = load_le32(h + VDI_AT_TYPE);

    if (load_le32(h + VDI_AT_SIGNATURE) != VDI_SIGNATURE)
        return error_set(err, EINVAL,
                         "node '%s': this is no VDI image: the signature is 0x%08" PRIx32, name,
                         load_le32(h + VDI_AT_SIGNATURE));
    if (load_le32(h + VDI_AT_VERSION) != VDI_VERSION_1_1)
        return error_set(err, ENOTSUP,
                         "node '%s': the image has version %u.%u, and only version 1.1 is read",
                         name, load_le16(h + VDI_AT_VERSION + 2), load_le16(h + VDI_AT_VERSION));
    if (memcmp(h + VDI_AT_LINK_UUID, none, 16) != 0 ||
        memcmp(h + VDI_AT_PARENT_UUID, none, 16) != 0)
        return error_set(err, ENOTSUP,
                         "node '%s': the image is a difference to another one, which is not "
                         "supported: merge them first",
                         name);
    if (type != VDI_TYPE_DYNAMIC && type != VDI_TYPE_STATIC)
        return error_set(err, ENOTSUP,
                         "node '%s': the image is of type %" PRIu32
                         ", and only dynamic (1) and static (2) ones are read",
                         name, type);
    return 0;
}

static int check_layout(const struct vdi *v, const uint8_t *h, struct error **err)
{
    const char *name = node_name(v->import.node);
    uint64_t size = load_le64(h + VDI_AT_SIZE);
    uint32_t block = load_le32(h + VDI_AT_BLOCK_SIZE);
    uint64_t blocks = load_le32(h + VDI_AT_BLOCKS);
    uint64_t map = load_le32(h + VDI_AT_MAP);

    if (load_le32(h + VDI_AT_SECTOR) != VDI_SECTOR)
        return error_set(err, ENOTSUP, "node '%s': sectors of %" PRIu32 " bytes, and not of 512",
                         name, load_le32(h + VDI_AT_SECTOR));
    if (!is_power_of_2(block) || block < VDI_SECTOR || load_le32(h + VDI_AT_BLOCK_EXTRA))
        return error_set(err, ENOTSUP,
                         "node '%s': blocks of %" PRIu32 " bytes with %" PRIu32
                         " more, and not of a power of two from 512 on with none",
                         name, block, load_le32(h + VDI_AT_BLOCK_EXTRA));
    if (size > blocks * block || size > (uint64_t)NODE_SIZE_MAX)
        return error_set(err, EINVAL,
                         "node '%s': a disk of %" PRIu64 " bytes, and %" PRIu64
                         " blocks of %" PRIu32 " bytes",
                         name, size, blocks, block);
    if (!is_aligned(map, VDI_SECTOR) || map < VDI_HEADER_LEN ||
        !range_within(map, blocks * 4, v->file_size)) /* IMPORT-2 */
        return error_set(err, EINVAL,
                         "node '%s': a table of %" PRIu64 " blocks cannot lie at %" PRIu64
                         " of a file of %" PRIu64 " bytes",
                         name, blocks, map, v->file_size);
    return 0;
}

static int entry_says(struct import *im, const struct import_blocks *b, uint64_t block,
                      const uint8_t *entry, struct mapping *ret)
{
    const struct vdi *v = b->of;
    uint64_t index = load_le32(entry);
    uint64_t size = (uint64_t)1 << v->blocks.block_bits;

    *ret = (struct mapping){.kind = MAPPING_ZERO};
    if (index >= VDI_BLOCK_DISCARDED)
        return 0;
    if (!range_within(v->data + index * size, size, v->file_size)) /* IMPORT-2 */
        return import_damaged(im,
                              "block %" PRIu64 " lies at %" PRIu64 ", beyond the end of the file",
                              block, v->data + index * size);
    *ret = (struct mapping){.kind = MAPPING_DATA, .host_offset = v->data + index * size};
    return 0;
}

static int co_fn vdi_co_map(struct node *node, const struct request *req, uint64_t offset,
                            uint64_t len, struct mapping *ret)
{
    struct vdi *v = node_state(node);

    return import_map_blocks(&v->import, &v->blocks, req, offset, len, ret);
}

static int co_fn control_fn vdi_co_open(struct node *node, const void *options, struct error **err)
{
    struct vdi *v = node_state(node);
    struct pass pass = {0};
    struct request by = {.pass = &pass};
    uint8_t h[VDI_HEADER_LEN];
    int r;

    (void)options;
    import_init(&v->import, node);
    v->file_size = node_size(edge_node(node_file(node)));
    r = import_co_read_named(&v->import, &by, "header", node_file(node), 0, h, sizeof(h), err);
    if (r == 0)
        r = check_kind(v, h, err);
    if (r == 0)
        r = check_layout(v, h, err);
    if (r < 0)
        return r;
    v->data = load_le32(h + VDI_AT_DATA);
    v->blocks = (struct import_blocks){
        .file = node_file(node),
        .table = load_le32(h + VDI_AT_MAP),
        .entry_bytes = 4,
        .block_bits = (unsigned)__builtin_ctz(load_le32(h + VDI_AT_BLOCK_SIZE)),
        .holes = load_le32(h + VDI_AT_TYPE) == VDI_TYPE_STATIC,
        .entry = entry_says,
        .of = v,
    };
    node_set_size(node, align_up(load_le64(h + VDI_AT_SIZE), VDI_SECTOR));
    return 0;
}

static void co_fn control_fn vdi_co_close(struct node *node)
{
    struct vdi *v = node_state(node);

    import_release(&v->import);
}

static uint64_t vdi_cluster_bytes(const struct node *node)
{
    const struct vdi *v = node_state(node);

    return (uint64_t)1 << v->blocks.block_bits;
}

const struct driver vdi_driver = {
    .name = "vdi",
    .kind = DRIVER_FORMAT,
    .state_size = sizeof(struct vdi),
    .options = &vdi_options_type,
    .keeps_metadata = true,
    .only_reads = true,
    .co_open = vdi_co_open,
    .co_close = vdi_co_close,
    .co_map = vdi_co_map,
    .filename = import_filename,
    .allocated_bytes = import_allocated_bytes,
    .cluster_bytes = vdi_cluster_bytes,
};
