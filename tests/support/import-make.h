/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Images of the formats that are only read, made without a driver's code: small, sound ones, for tests to damage. A disk has
 * IMPORT_BLOCKS blocks; what a block holds is import_byte() where it is there at all.
 */
#ifndef CAIRN_TESTS_IMPORT_MAKE_H
#define CAIRN_TESTS_IMPORT_MAKE_H

#include "base/alloc.h"
#include "base/endian.h"
#include "base/macros.h"

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

/* ---- VHDX ---- */

#define VHDX_MAKE_BLOCKS   5u
#define VHDX_MAKE_BLOCK    ((size_t)1 << 20)
#define VHDX_MAKE_LOG      ((size_t)1 << 20) /* where things lie; each has a MiB */
#define VHDX_MAKE_METADATA ((size_t)2 << 20)
#define VHDX_MAKE_BAT      ((size_t)3 << 20)
#define VHDX_MAKE_DATA     ((size_t)4 << 20)
#define VHDX_MAKE_ITEMS    (VHDX_MAKE_METADATA + 65536)

static const uint8_t vhdx_make_guids[][16] = {
    /* the table of blocks, metadata */
    {0x66, 0x77, 0xc2, 0x2d, 0x23, 0xf6, 0x00, 0x42, 0x9d, 0x64, 0x11, 0x5e, 0x9b, 0xfd, 0x4a, 8},
    {0x06, 0xa2, 0x7c, 0x8b, 0x90, 0x47, 0x9a, 0x4b, 0xb8, 0xfe, 0x57, 0x5f, 5, 0x0f, 0x88, 0x6e},
    /* file parameters, size, sector, page 83, physical sector */
    {0x37, 0x67, 0xa1, 0xca, 0x36, 0xfa, 0x43, 0x4d, 0xb3, 0xb6, 0x33, 0xf0, 0xaa, 0x44, 0xe7,
     0x6b},
    {0x24, 0x42, 0xa5, 0x2f, 0x1b, 0xcd, 0x76, 0x48, 0xb2, 0x11, 0x5d, 0xbe, 0xd8, 0x3b, 0xf4,
     0xb8},
    {0x1d, 0xbf, 0x41, 0x81, 0x6f, 0xa9, 0x09, 0x47, 0xba, 0x47, 0xf2, 0x33, 0xa8, 0xfa, 0xab,
     0x5f},
    {0xab, 0x12, 0xca, 0xbe, 0xe6, 0xb2, 0x23, 0x45, 0x93, 0xef, 0xc3, 0x09, 0xe0, 0x00, 0xc7,
     0x46},
    {0xc7, 0x48, 0xa3, 0xcd, 0x5d, 0x44, 0x71, 0x44, 0x9c, 0xc9, 0xe9, 0x88, 0x52, 0x51, 0xc5,
     0x56},
};

/* A log's own. */
static const uint8_t vhdx_make_log_guid[16] = {1, 2, 3, 4, 5, 6, 7, 8, 9};

/* Bit by bit, as the polynomial has it. */
static inline void vhdx_make_sum(uint8_t *bytes, size_t len)
{
    uint32_t crc = 0xffffffff;

    store_le32(bytes + 4, 0);
    for (size_t i = 0; i < len; i++) {
        crc ^= bytes[i];
        for (unsigned bit = 0; bit < 8; bit++)
            crc = crc >> 1 ^ (crc & 1 ? 0x82f63b78 : 0);
    }
    store_le32(bytes + 4, ~crc);
}

static inline void vhdx_make_headers(struct image_bytes *i, bool dirty)
{
    memcpy(i->bytes, "vhdxfile", 8);
    for (unsigned n = 0; n < 2; n++) {
        uint8_t *h = i->bytes + 65536 * (n + 1);

        memcpy(h, "head", 4);
        store_le64(h + 8, 7 + n);
        if (dirty && n) /* the other one is older, and knows nothing of it */
            memcpy(h + 48, vhdx_make_log_guid, 16);
        store_le16(h + 66, 1);
        store_le32(h + 68, 1 << 20);
        store_le64(h + 72, VHDX_MAKE_LOG);
        vhdx_make_sum(h, 4096);
    }
}

static inline void vhdx_make_regions(struct image_bytes *i)
{
    static const uint64_t places[] = {VHDX_MAKE_BAT, VHDX_MAKE_METADATA};
    uint8_t *t = i->bytes + ((size_t)192 << 10);

    memcpy(t, "regi", 4);
    store_le32(t + 8, 2);
    for (unsigned n = 0; n < 2; n++) {
        uint8_t *e = t + 16 + (size_t)n * 32;

        memcpy(e, vhdx_make_guids[n], 16);
        store_le64(e + 16, places[n]);
        store_le32(e + 24, 1 << 20);
        store_le32(e + 28, 1);
    }
    vhdx_make_sum(t, 65536);
    memcpy(t + 65536, t, 65536);
}

static inline void vhdx_make_metadata(struct image_bytes *i)
{
    static const uint32_t lens[] = {8, 8, 4, 16, 4};
    uint8_t *t = i->bytes + VHDX_MAKE_METADATA;
    uint8_t *items = i->bytes + VHDX_MAKE_ITEMS;

    memcpy(t, "metadata", 8);
    store_le16(t + 10, 5);
    for (unsigned n = 0; n < 5; n++) {
        uint8_t *e = t + 32 + (size_t)n * 32;

        memcpy(e, vhdx_make_guids[n + 2], 16);
        store_le32(e + 16, 65536 + n * 16);
        store_le32(e + 20, lens[n]);
        store_le32(e + 24, 4);
    }
    store_le32(items, VHDX_MAKE_BLOCK);
    store_le64(items + 16, i->disk_len);
    store_le32(items + 32, 512);
    store_le32(items + 64, 4096);
}

/* An entry of the log at a sector of it, with room for `sectors` of data; it may go round. */
struct vhdx_entry {
    uint8_t bytes[4 * 4096];
    uint32_t data;  /* sectors */
    uint32_t count; /* descriptors */
};

static inline void vhdx_entry_begin(struct vhdx_entry *e, uint64_t number, uint32_t tail_sector)
{
    memset(e, 0, sizeof(*e));
    memcpy(e->bytes, "loge", 4);
    store_le32(e->bytes + 12, tail_sector * 4096);
    store_le64(e->bytes + 16, number);
    memcpy(e->bytes + 32, vhdx_make_log_guid, 16);
}

/* `data` NULL: zeroes. */
static inline void vhdx_entry_add(struct vhdx_entry *e, uint64_t offset, uint64_t len,
                                  const uint8_t *data)
{
    uint8_t *d = e->bytes + 64 + (size_t)e->count++ * 32;
    uint64_t number = load_le64(e->bytes + 16);

    memcpy(d, data ? "desc" : "zero", 4);
    store_le64(d + 16, offset);
    store_le64(d + 24, number);
    if (data) {
        uint8_t *sector = e->bytes + (size_t)++e->data * 4096;

        memcpy(sector, data, 4096);
        memcpy(d + 8, sector, 8);
        memcpy(d + 4, sector + 4092, 4);
        memcpy(sector, "data", 4);
        store_le32(sector + 4, (uint32_t)(number >> 32));
        store_le32(sector + 4092, (uint32_t)number);
    } else {
        store_le64(d + 8, len);
    }
}

static inline void vhdx_entry_put(struct vhdx_entry *e, struct image_bytes *i, uint32_t sector)
{
    uint32_t len = (e->data + 1) * 4096;

    store_le32(e->bytes + 8, len);
    store_le32(e->bytes + 24, e->count);
    store_le64(e->bytes + 48, i->len);
    store_le64(e->bytes + 56, i->len);
    vhdx_make_sum(e->bytes, len);
    for (uint32_t at = 0; at < len; at += 4096)
        memcpy(i->bytes + VHDX_MAKE_LOG + (sector * (size_t)4096 + at) % (1 << 20), e->bytes + at,
               4096);
}

/*
 * What the table of blocks says is in the log, and some of the blocks, too. The log has: an older sequence, and one of two
 * entries that goes round and whose first entry is not its tail any more.
 */
static inline void vhdx_make_log(struct image_bytes *i)
{
    uint8_t *bat = i->bytes + VHDX_MAKE_BAT;
    struct vhdx_entry e;
    uint8_t garbage[4096];
    uint8_t data[4096];

    memset(garbage, 0xee, sizeof(garbage));
    vhdx_entry_begin(&e, 3, 4);
    vhdx_entry_add(&e, VHDX_MAKE_BAT, 0, garbage);
    vhdx_entry_put(&e, i, 4);
    vhdx_entry_begin(&e, 11, 250);
    vhdx_entry_add(&e, VHDX_MAKE_DATA, 8192, garbage); /* written to its place long ago */
    vhdx_entry_put(&e, i, 250);
    vhdx_entry_begin(&e, 12, 252);
    vhdx_entry_add(&e, VHDX_MAKE_DATA + 4096, (uint64_t)5 * 4096, NULL);
    vhdx_entry_add(&e, VHDX_MAKE_BAT, 0, garbage); /* the next one is right */
    vhdx_entry_put(&e, i, 252);
    for (unsigned k = 0; k < 4096; k++)
        data[k] = import_byte(99999 + k);
    vhdx_entry_begin(&e, 13, 252);
    vhdx_entry_add(&e, VHDX_MAKE_BAT, 0, bat);
    vhdx_entry_add(&e, VHDX_MAKE_DATA + (size_t)2 * 4096, 0, data);
    vhdx_entry_put(&e, i, 254); /* 254, 255, 0 */
    memset(bat, 0, 4096);
    memset(i->disk + 4096, 0, (size_t)5 * 4096);
    memcpy(i->disk + (size_t)2 * 4096, data, 4096);
}

/* Blocks 0, 3 and 4 are there, in the order 0, 4, 3. */
static inline struct image_bytes vhdx_make(bool dirty)
{
    static const unsigned places[VHDX_MAKE_BLOCKS] = {0, 0, 0, 2, 1};
    struct image_bytes i = image_bytes_new(VHDX_MAKE_DATA + 3 * VHDX_MAKE_BLOCK,
                                           VHDX_MAKE_BLOCKS * VHDX_MAKE_BLOCK - 1536);

    vhdx_make_headers(&i, dirty);
    vhdx_make_regions(&i);
    vhdx_make_metadata(&i);
    for (unsigned b = 0; b < VHDX_MAKE_BLOCKS; b++) {
        uint64_t at = VHDX_MAKE_DATA + places[b] * VHDX_MAKE_BLOCK;
        size_t start = b * VHDX_MAKE_BLOCK;
        uint64_t entry = b == 2 ? 2 : b == 1 ? 3 | at : 6 | at; /* zero, unmapped, present */

        store_le64(i.bytes + VHDX_MAKE_BAT + (size_t)b * 8, entry);
        if ((entry & 7) == 6)
            import_fill(&i, at, start, MIN(VHDX_MAKE_BLOCK, i.disk_len - start));
    }
    if (dirty)
        vhdx_make_log(&i);
    return i;
}

#endif
