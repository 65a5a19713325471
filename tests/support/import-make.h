/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Images of the formats that are only read, made without a driver's code: small, sound ones, for tests to damage. A disk has
 * IMPORT_BLOCKS blocks; what a block holds is import_byte() where it is there at all.
 */
#ifndef CAIRN_TESTS_IMPORT_MAKE_H
#define CAIRN_TESTS_IMPORT_MAKE_H

#include "base/alloc.h"
#include "base/endian.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <zlib.h>

#define IMPORT_BLOCKS 16u

/* The file, and what the disk shows. Freed by image_bytes_free(). */
struct image_bytes {
    uint8_t *bytes;
    size_t len;
    uint8_t *disk;
    size_t disk_len;
};

static inline void image_bytes_free(struct image_bytes *i)
{
    free(i->bytes);
    free(i->disk);
}

static inline uint8_t import_byte(uint64_t offset)
{
    return (uint8_t)(offset / 512 * 7 + offset % 251 + 1);
}

/* Every third block is nowhere. */
static inline bool import_is_there(unsigned block)
{
    return block % 3 != 1;
}

static inline void import_fill(struct image_bytes *i, uint64_t at, uint64_t offset, size_t len)
{
    for (size_t k = 0; k < len; k++)
        i->bytes[at + k] = i->disk[offset + k] = import_byte(offset + k);
}

static inline struct image_bytes image_bytes_new(size_t len, size_t disk_len)
{
    struct image_bytes i = {
        .bytes = xalloc(len, 1), .len = len, .disk = xalloc(disk_len, 1), .disk_len = disk_len};

    return i;
}

/* ---- VDI ---- */

#define VDI_MAKE_BLOCK 4096u
#define VDI_MAKE_MAP   512u
#define VDI_MAKE_DATA  1024u

/* Blocks lie in the opposite order, so that no two are contiguous; a static one has all of them, in order. */
static inline struct image_bytes vdi_make(bool fixed)
{
    struct image_bytes i =
        image_bytes_new(VDI_MAKE_DATA + (size_t)IMPORT_BLOCKS * VDI_MAKE_BLOCK,
                        (size_t)IMPORT_BLOCKS * VDI_MAKE_BLOCK - 512); /* the last is cut */
    uint8_t *h = i.bytes;

    memcpy(h, "<<< an image of a test >>>\n", 27);
    store_le32(h + 64, 0xbeda107f);
    store_le32(h + 68, 0x00010001);
    store_le32(h + 72, 400);
    store_le32(h + 76, fixed ? 2 : 1);
    store_le32(h + 340, VDI_MAKE_MAP);
    store_le32(h + 344, VDI_MAKE_DATA);
    store_le32(h + 360, 512);
    store_le64(h + 368, i.disk_len);
    store_le32(h + 376, VDI_MAKE_BLOCK);
    store_le32(h + 384, IMPORT_BLOCKS);
    for (unsigned b = 0; b < IMPORT_BLOCKS; b++) {
        uint32_t index = fixed ? b : IMPORT_BLOCKS - 1 - b;
        size_t inside = b == IMPORT_BLOCKS - 1 ? VDI_MAKE_BLOCK - 512 : VDI_MAKE_BLOCK;

        if (!fixed && !import_is_there(b))
            index = b % 2 ? 0xffffffff : 0xfffffffe;
        else
            import_fill(&i, VDI_MAKE_DATA + (uint64_t)index * VDI_MAKE_BLOCK,
                        (uint64_t)b * VDI_MAKE_BLOCK, inside);
        store_le32(h + VDI_MAKE_MAP + (size_t)b * 4, index);
    }
    return i;
}

/* ---- VHD ---- */

#define VPC_MAKE_BLOCK  4096u
#define VPC_MAKE_HEADER 512u
#define VPC_MAKE_TABLE  1536u
#define VPC_MAKE_DATA   2048u

static inline void vpc_sum(uint8_t *bytes, size_t len, size_t at)
{
    uint32_t sum = 0;

    store_be32(bytes + at, 0);
    for (size_t i = 0; i < len; i++)
        sum += bytes[i];
    store_be32(bytes + at, ~sum);
}

static inline void vpc_footer(uint8_t *f, bool fixed, uint64_t size)
{
    memset(f, 0, 512);
    memcpy(f, "conectix", 8);
    store_be32(f + 8, 2);
    store_be32(f + 12, 0x10000);
    store_be64(f + 16, fixed ? UINT64_MAX : VPC_MAKE_HEADER);
    memcpy(f + 28, "win ", 4);
    store_be64(f + 40, size);
    store_be64(f + 48, size);
    store_be16(f + 56, 1); /* a geometry that says less */
    f[58] = 1;
    f[59] = 3;
    store_be32(f + 60, fixed ? 2 : 3);
    vpc_sum(f, 512, 64);
}

static inline void vpc_header(uint8_t *h)
{
    memcpy(h, "cxsparse", 8);
    store_be64(h + 8, UINT64_MAX);
    store_be64(h + 16, VPC_MAKE_TABLE);
    store_be32(h + 24, 0x10000);
    store_be32(h + 28, IMPORT_BLOCKS);
    store_be32(h + 32, VPC_MAKE_BLOCK);
    vpc_sum(h, 1024, 36);
}

/* Of block b only these sectors were written, the first being the highest bit. */
static inline uint8_t vpc_make_bitmap(unsigned block)
{
    return block % 2 ? 0xff : (uint8_t)(0x59 + block);
}

static inline struct image_bytes vpc_make(bool fixed)
{
    size_t disk = (size_t)IMPORT_BLOCKS * VPC_MAKE_BLOCK;
    size_t each = 512 + VPC_MAKE_BLOCK;
    struct image_bytes i =
        image_bytes_new(fixed ? disk + 512 : VPC_MAKE_DATA + IMPORT_BLOCKS * each + 512, disk);

    vpc_footer(i.bytes + i.len - 512, fixed, disk);
    if (fixed) {
        import_fill(&i, 0, 0, disk);
        return i;
    }
    memcpy(i.bytes, i.bytes + i.len - 512, 512);
    vpc_header(i.bytes + VPC_MAKE_HEADER);
    for (unsigned b = 0; b < IMPORT_BLOCKS; b++) {
        size_t at = VPC_MAKE_DATA + (IMPORT_BLOCKS - 1 - b) * each;

        memset(i.bytes + at + 512, 0xee, VPC_MAKE_BLOCK); /* what nobody is to see */
        i.bytes[at] = vpc_make_bitmap(b);
        for (unsigned s = 0; s < 8 && import_is_there(b); s++) {
            if (i.bytes[at] >> (7 - s) & 1)
                import_fill(&i, at + 512 + s * 512, (uint64_t)b * VPC_MAKE_BLOCK + s * 512, 512);
        }
        store_be32(i.bytes + VPC_MAKE_TABLE + (size_t)b * 4,
                   import_is_there(b) ? (uint32_t)(at / 512) : 0xffffffff);
    }
    return i;
}

/* ---- VMDK ---- */

#define VMDK_MAKE_GRAIN     4096u
#define VMDK_MAKE_ENTRIES   4u /* of a grain table */
#define VMDK_MAKE_TEXT      512u
#define VMDK_MAKE_TEXT_LEN  1024u
#define VMDK_MAKE_DIRECTORY 1536u
#define VMDK_MAKE_TABLES    2048u /* a sector each */
#define VMDK_MAKE_GRAINS    4096u

enum vmdk_make_kind { VMDK_MAKE_PLAIN, VMDK_MAKE_COMPRESSED, VMDK_MAKE_STREAM };

static inline void vmdk_header(uint8_t *h, enum vmdk_make_kind kind, uint64_t directory)
{
    memcpy(h, "KDMV", 4);
    store_le32(h + 4, kind == VMDK_MAKE_PLAIN ? 2 : 3);
    store_le32(h + 8, kind == VMDK_MAKE_PLAIN ? 0x5 : 0x30005); /* new lines, zero grains */
    store_le64(h + 12, IMPORT_BLOCKS * VMDK_MAKE_GRAIN / 512);
    store_le64(h + 20, VMDK_MAKE_GRAIN / 512);
    store_le64(h + 28, VMDK_MAKE_TEXT / 512);
    store_le64(h + 36, VMDK_MAKE_TEXT_LEN / 512);
    store_le32(h + 44, VMDK_MAKE_ENTRIES);
    store_le64(h + 56, directory);
    memcpy(h + 73, "\n \r\n", 4);
    store_le16(h + 77, kind == VMDK_MAKE_PLAIN ? 0 : 1);
}

/* Puts a grain at a sector; what it comes to, in sectors. */
static inline size_t vmdk_put_grain(struct image_bytes *i, bool compressed, unsigned grain,
                                    size_t sector)
{
    uint8_t plain[VMDK_MAKE_GRAIN];
    uLongf len = 2 * VMDK_MAKE_GRAIN;
    uint8_t *to = i->bytes + sector * 512;

    for (size_t k = 0; k < sizeof(plain); k++)
        plain[k] = import_byte((uint64_t)grain * VMDK_MAKE_GRAIN + k);
    memcpy(i->disk + (size_t)grain * VMDK_MAKE_GRAIN, plain, sizeof(plain));
    if (!compressed) {
        memcpy(to, plain, sizeof(plain));
        return sizeof(plain) / 512;
    }
    if (compress2(to + 12, &len, plain, sizeof(plain), 6) != Z_OK)
        abort();
    store_le64(to, (uint64_t)grain * VMDK_MAKE_GRAIN / 512);
    store_le32(to + 8, (uint32_t)len);
    return (12 + len + 511) / 512;
}

/* The third grain table is nowhere. */
static inline bool vmdk_is_there(unsigned grain)
{
    return import_is_there(grain) && grain / VMDK_MAKE_ENTRIES != 2;
}

static inline struct image_bytes vmdk_make(enum vmdk_make_kind kind)
{
    size_t sector = VMDK_MAKE_GRAINS / 512;
    struct image_bytes i =
        image_bytes_new(VMDK_MAKE_GRAINS + (size_t)IMPORT_BLOCKS * (VMDK_MAKE_GRAIN + 1024) + 1536,
                        (size_t)IMPORT_BLOCKS * VMDK_MAKE_GRAIN);

    vmdk_header(i.bytes, kind, kind == VMDK_MAKE_STREAM ? UINT64_MAX : VMDK_MAKE_DIRECTORY / 512);
    strcpy((char *)i.bytes + VMDK_MAKE_TEXT,
           "# Disk DescriptorFile\r\nversion=1\r\nCID=1234abcd\r\nparentCID=ffffffff\r\n"
           "createType=\"monolithicSparse\"\r\n\r\n# Extent description\r\n"
           "RW 128 SPARSE \"a disk.vmdk\"\r\n\r\nddb.adapterType = \"ide\"\r\n");
    for (unsigned t = 0; t < IMPORT_BLOCKS / VMDK_MAKE_ENTRIES; t++)
        store_le32(i.bytes + VMDK_MAKE_DIRECTORY + (size_t)t * 4,
                   t == 2 ? 0 : VMDK_MAKE_TABLES / 512 + t);
    for (unsigned g = IMPORT_BLOCKS; g-- > 0;) {
        uint8_t *entry = i.bytes + VMDK_MAKE_TABLES + (size_t)g / VMDK_MAKE_ENTRIES * 512 +
                         (size_t)(g % VMDK_MAKE_ENTRIES) * 4;

        if (!vmdk_is_there(g)) {
            store_le32(entry, g % 2);
            continue;
        }
        store_le32(entry, (uint32_t)sector);
        sector += vmdk_put_grain(&i, kind != VMDK_MAKE_PLAIN, g, sector);
    }
    i.len = sector * 512;
    if (kind == VMDK_MAKE_STREAM) { /* a marker, the footer, the end of the stream */
        store_le64(i.bytes + i.len, 1);
        store_le32(i.bytes + i.len + 12, 3);
        vmdk_header(i.bytes + i.len + 512, kind, VMDK_MAKE_DIRECTORY / 512);
        i.len += 1536;
    }
    return i;
}

#endif
