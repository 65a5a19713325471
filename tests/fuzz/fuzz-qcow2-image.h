/* SPDX-License-Identifier: Apache-2.0 */
/*
 * qcow2 images that begin sound and are patched where it hurts. An input is:
 *
 *     byte 0  version and cluster size              4  what else is in the image: enum fuzz_extra
 *          1  refcount width                        5  how much of the file is cut off
 *          2  how much is allocated                 6  what the header says of it: enum fuzz_mark
 *          3, 7  what the fuzzer does with it
 *
 * and then patches of 12 bytes: which structure, which place in it (2 bytes), how, what (8 bytes).
 */
#ifndef CAIRN_TESTS_FUZZ_QCOW2_IMAGE_H
#define CAIRN_TESTS_FUZZ_QCOW2_IMAGE_H

#include "../support/qcow2-make.h"
#include "base/macros.h"
#include "fuzz-luks.h"

#define FUZZ_IMAGE       "/disk/image"
#define FUZZ_DATA        "/disk/data"
#define FUZZ_SIZE        ((uint64_t)256 << 10)
#define FUZZ_HEAD        8
#define FUZZ_PATCH       12
#define FUZZ_PATCHES_MAX 64

enum fuzz_extra {
    FUZZ_SNAPSHOT = 1 << 0,   /* one, which has what the disk has */
    FUZZ_BITMAP = 1 << 1,     /* one; version 3 */
    FUZZ_ZSTD = 1 << 2,       /* version 3 */
    FUZZ_COMPRESSED = 1 << 3, /* every other mapping is to compressed bytes */
    FUZZ_DATA_FILE = 1 << 4,  /* version 3 */
    FUZZ_EXTENDED = 1 << 5,   /* version 3, clusters of 16 KiB at least */
    FUZZ_LUKS = 1 << 6,       /* version 3 */
};

/* Version 3. */
enum fuzz_mark {
    FUZZ_DIRTY =
        1 << 0, /* and what a snapshot shares is not counted, as lazy refcounts may leave it */
    FUZZ_CORRUPT = 1 << 1,
    FUZZ_DATA_RAW = 1 << 2,
};

/* Clusters behind the image: a snapshot table, its L1 table, a bitmap directory, its table, its data. */
#define FUZZ_EXTRA_CLUSTERS 5

struct fuzz_image {
    uint8_t *bytes;
    size_t len;
    uint64_t cluster;
    uint64_t extra;     /* offset of the clusters above */
    uint64_t luks;      /* offset of a LUKS header, or 0 */
    uint64_t file_len;  /* a LUKS header ends it, most of which is zeroes: `len` is less */
    uint8_t *extension; /* where the next one goes */
    bool has_data_file;
};

enum fuzz_place {
    FUZZ_PLACE_HEADER,
    FUZZ_PLACE_L1,
    FUZZ_PLACE_L2,
    FUZZ_PLACE_TABLE,
    FUZZ_PLACE_BLOCK,
    FUZZ_PLACE_SNAPSHOTS, /* and their L1 table behind */
    FUZZ_PLACE_BITMAPS,   /* and the table behind */
    FUZZ_PLACE_ANY,
    FUZZ_PLACE_LUKS,
    FUZZ_PLACES,
};

static uint64_t fuzz_place_offset(const struct fuzz_image *i, enum fuzz_place place)
{
    uint64_t l1 = load_be64(i->bytes + 40);
    uint64_t table = load_be64(i->bytes + 48);

    switch (place) {
    case FUZZ_PLACE_HEADER:
    case FUZZ_PLACE_ANY:
    case FUZZ_PLACES:
        break;
    case FUZZ_PLACE_L1:
        return l1;
    case FUZZ_PLACE_TABLE:
        return table;
    case FUZZ_PLACE_L2:
        return l1 < i->len - 8 ? load_be64(i->bytes + l1) & 0xfffffffffffe00 : 0;
    case FUZZ_PLACE_BLOCK:
        return table < i->len - 8 ? load_be64(i->bytes + table) & ~(uint64_t)0x1ff : 0;
    case FUZZ_PLACE_SNAPSHOTS:
        return i->extra;
    case FUZZ_PLACE_BITMAPS:
        return i->extra + 2 * i->cluster;
    case FUZZ_PLACE_LUKS:
        return i->luks;
    }
    return 0;
}

static void fuzz_patch(struct fuzz_image *i, const uint8_t *p)
{
    enum fuzz_place place = p[0] % FUZZ_PLACES;
    uint64_t index = load_be16(p + 1);
    uint64_t value = load_be64(p + 4);
    uint64_t at = fuzz_place_offset(i, place);

    at += place == FUZZ_PLACE_ANY
              ? index * 16
              : index % (place == FUZZ_PLACE_HEADER ? 256 : 1024) * (p[3] & 1 ? 1 : 8);
    if (at > i->len - 8)
        return;
    switch (p[3] >> 1 & 3) {
    case 0:
        store_be64(i->bytes + at, value);
        break;
    case 1: /* a cluster of the file, with flags */
        store_be64(i->bytes + at,
                   (value & 0xff) * i->cluster | (value >> 56) << 56 | (value >> 8 & 1));
        break;
    case 2:
        i->bytes[at] = (uint8_t)value;
        break;
    case 3:
        store_be32(i->bytes + at, (uint32_t)value);
        break;
    }
}

/* Where there is a block for it. */
static void fuzz_set_refcount(struct fuzz_image *i, unsigned order, uint64_t n, unsigned value)
{
    uint64_t per_block = i->cluster * 8 >> order;
    uint64_t table = load_be64(i->bytes + 48);
    unsigned bits = 1u << order;
    uint8_t *block;

    if (n / per_block >= load_be32(i->bytes + 56) * (i->cluster / 8) || (bits == 1 && value > 1))
        return;
    block = i->bytes + load_be64(i->bytes + table + n / per_block * 8);
    if (block == i->bytes)
        return;
    n %= per_block;
    if (bits >= 8) {
        block[(n + 1) * (bits / 8) - 1] = (uint8_t)value;
    } else {
        unsigned shift = (unsigned)(n * bits % 8);

        block[n * bits / 8] &= (uint8_t) ~(((1u << bits) - 1) << shift);
        block[n * bits / 8] |= (uint8_t)(value << shift);
    }
}

/* All tables and data of the disk are used twice: no mapping says any more that it may be written to. */
static void fuzz_share(struct fuzz_image *i, const struct qcow2_shape *shape, bool count)
{
    uint64_t entry_len = shape->extended ? 16 : 8;
    uint8_t *l1 = i->bytes + load_be64(i->bytes + 40);
    uint64_t l2 = load_be64(l1) & 0xfffffffffffe00;

    if (!shape->allocated)
        return;
    for (uint32_t n = 0; n < load_be32(i->bytes + 36); n++)
        l1[n * 8] &= 0x7f;
    for (uint64_t n = 0; n < shape->allocated; n++)
        i->bytes[l2 + n * entry_len] &= 0x7f;
    for (uint64_t n = l2 / i->cluster; count && n < i->extra / i->cluster; n++)
        fuzz_set_refcount(i, shape->refcount_order, n, 2);
}

static void fuzz_put_snapshot(struct fuzz_image *i, const struct qcow2_shape *shape, bool count)
{
    uint8_t *s = i->bytes + i->extra;
    uint32_t l1_size = load_be32(i->bytes + 36);

    store_be32(i->bytes + 60, 1);
    store_be64(i->bytes + 64, i->extra);
    store_be64(s, i->extra + i->cluster);
    store_be32(s + 8, l1_size);
    store_be16(s + 12, 1);
    store_be16(s + 14, 1);
    store_be32(s + 36, 16);
    store_be64(s + 48, FUZZ_SIZE);
    s[56] = '1';
    s[57] = 's';
    fuzz_share(i, shape, count);
    memcpy(s + i->cluster, i->bytes + load_be64(i->bytes + 40),
           MIN((size_t)l1_size * 8, (size_t)i->cluster));
    fuzz_set_refcount(i, shape->refcount_order, i->extra / i->cluster, 1);
    fuzz_set_refcount(i, shape->refcount_order, i->extra / i->cluster + 1, 1);
}

static void fuzz_put_bitmap(struct fuzz_image *i, const struct qcow2_shape *shape)
{
    uint64_t directory = i->extra + 2 * i->cluster;
    uint8_t *b = i->bytes + directory;

    i->bytes[95] |= 1;
    store_be32(i->extension, 0x23852875);
    store_be32(i->extension + 4, 24);
    store_be32(i->extension + 8, 1);
    store_be64(i->extension + 16, 32);
    store_be64(i->extension + 24, directory);
    i->extension += 32;
    store_be64(b, directory + i->cluster);
    store_be32(b + 8, 1);
    store_be32(b + 12, 2); /* it records */
    b[16] = 1;
    b[17] = 16;
    store_be16(b + 18, 1);
    b[24] = 'b';
    store_be64(b + i->cluster, directory + 2 * i->cluster);
    b[2 * i->cluster] = 0x5;
    for (unsigned n = 2; n < FUZZ_EXTRA_CLUSTERS; n++)
        fuzz_set_refcount(i, shape->refcount_order, i->extra / i->cluster + n, 1);
}

static void fuzz_put_luks(struct fuzz_image *i, const struct qcow2_shape *shape)
{
    const struct fuzz_luks *sound = fuzz_luks_sound();

    store_be32(i->bytes + 32, 2);
    store_be32(i->extension, 0x0537be77);
    store_be32(i->extension + 4, 16);
    store_be64(i->extension + 8, i->luks);
    store_be64(i->extension + 16, sound->len);
    i->extension += 24;
    memcpy(i->bytes + i->luks, sound->bytes, FUZZ_LUKS_BYTES);
    for (uint64_t at = i->luks; at < i->luks + sound->len; at += i->cluster)
        fuzz_set_refcount(i, shape->refcount_order, at / i->cluster, 1);
}

/* Stored blocks of deflate: what begins each cluster of data. */
static void fuzz_put_compressed(struct fuzz_image *i, const struct qcow2_shape *shape)
{
    uint64_t entry_len = shape->extended ? 16 : 8;
    uint8_t *l2 = i->bytes + (load_be64(i->bytes + load_be64(i->bytes + 40)) & 0xfffffffffffe00);

    for (uint64_t n = 1; n < shape->allocated && n < i->cluster / entry_len; n += 2) {
        uint8_t *entry = l2 + n * entry_len;
        uint64_t host = load_be64(entry) & 0xfffffffffffe00;

        store_be64(entry, (uint64_t)1 << 62 | (n & 1) << (62 - (shape->cluster_bits - 8)) | host |
                              (n & 0x1f));
        if (shape->extended)
            store_be64(entry + 8, 0);
    }
}

static void fuzz_shape(struct qcow2_shape *ret, const uint8_t *data)
{
    *ret = (struct qcow2_shape){
        .version = data[0] & 1 ? 2 : 3,
        .cluster_bits = 9 + (data[0] >> 1 & 7),
        .refcount_order = 4,
        .size = FUZZ_SIZE,
    };
    ret->allocated = (FUZZ_SIZE >> ret->cluster_bits) * data[2] / 255;
    if (ret->version == 2)
        return;
    ret->refcount_order = data[1] % 7;
    ret->zstd = data[4] & FUZZ_ZSTD;
    ret->extended = data[4] & FUZZ_EXTENDED && ret->cluster_bits >= 14;
    if (data[4] & FUZZ_DATA_FILE) {
        ret->data_file = "data";
        ret->data_raw = data[6] & FUZZ_DATA_RAW;
    }
}

static void fuzz_put_extras(struct fuzz_image *i, const struct qcow2_shape *shape,
                            const uint8_t *data)
{
    bool dirty = shape->version == 3 && data[6] & FUZZ_DIRTY;

    if (shape->version == 3)
        i->bytes[79] |= data[6] & (FUZZ_DIRTY | FUZZ_CORRUPT); /* as the format has them */
    i->extension = i->bytes + 112 + (shape->data_file ? 8 + 8 : 0);
    if (i->luks)
        fuzz_put_luks(i, shape);
    if (data[4] & FUZZ_SNAPSHOT)
        fuzz_put_snapshot(i, shape, !dirty);
    if (data[4] & FUZZ_BITMAP && shape->version == 3)
        fuzz_put_bitmap(i, shape);
    if (data[4] & FUZZ_COMPRESSED && shape->allocated)
        fuzz_put_compressed(i, shape);
}

/* Sound, but for what the marks say. The caller's to free. */
static void fuzz_make_sound(struct fuzz_image *ret, const uint8_t *data)
{
    struct qcow2_shape shape;
    uint8_t *sound;
    size_t len;

    fuzz_shape(&shape, data);
    sound = qcow2_make(&shape, &len);
    *ret = (struct fuzz_image){.cluster = (uint64_t)1 << shape.cluster_bits, .extra = len};
    ret->file_len = ret->len = len + FUZZ_EXTRA_CLUSTERS * ret->cluster;
    if (data[4] & FUZZ_LUKS && shape.version == 3) {
        ret->luks = ret->len;
        ret->len = ret->luks + FUZZ_LUKS_BYTES;
        ret->file_len = ret->luks + fuzz_luks_sound()->len;
    }
    ret->bytes = xalloc(1, ret->len);
    memcpy(ret->bytes, sound, len);
    free(sound);
    fuzz_put_extras(ret, &shape, data);
    ret->has_data_file = shape.data_file;
}

/* Makes it as a file of the disk, or two; false if the input is too short. */
static bool fuzz_make_image(struct sim_disk *disk, const uint8_t *data, size_t size)
{
    struct sim_file_setup setup = {.type = FILE_TYPE_REGULAR};
    struct fuzz_image i;

    if (size < FUZZ_HEAD)
        return false;
    fuzz_make_sound(&i, data);
    for (size_t at = FUZZ_HEAD; at + FUZZ_PATCH <= size && at < FUZZ_PATCHES_MAX * FUZZ_PATCH;
         at += FUZZ_PATCH)
        fuzz_patch(&i, data + at);
    if (i.luks)
        fuzz_luks_tame(i.bytes + i.luks);
    setup.size = i.file_len - i.file_len * data[5] / 256;
    sim_disk_make(disk, FUZZ_IMAGE, &setup);
    sim_disk_write(disk, FUZZ_IMAGE, 0, i.bytes, MIN((uint64_t)i.len, setup.size));
    free(i.bytes);
    setup.size = FUZZ_SIZE;
    if (i.has_data_file)
        sim_disk_make(disk, FUZZ_DATA, &setup);
    return true;
}

#endif
