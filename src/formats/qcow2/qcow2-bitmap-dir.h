/* SPDX-License-Identifier: Apache-2.0 */
/* The bitmap directory of a qcow2 image: from hostile bytes (P6) to entries, and back. Pure: no I/O, any thread. */
#ifndef CAIRN_FORMATS_QCOW2_BITMAP_DIR_H
#define CAIRN_FORMATS_QCOW2_BITMAP_DIR_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define QCOW2_BITMAP_NAME_MAX 1023

/* Flags of an entry. */
#define QCOW2_BITMAP_IN_USE           (UINT32_C(1) << 0)
#define QCOW2_BITMAP_AUTO             (UINT32_C(1) << 1)
#define QCOW2_BITMAP_EXTRA_COMPATIBLE (UINT32_C(1) << 2)
#define QCOW2_BITMAP_FLAGS_KNOWN      UINT32_C(7)

#define QCOW2_BITMAP_TYPE_DIRTY 1

/* An entry of a bitmap's table: a cluster of the image, or what all bits are that it would hold. */
#define QCOW2_BITMAP_TABLE_ONES     UINT64_C(1)
#define QCOW2_BITMAP_TABLE_RESERVED UINT64_C(0xff000000000001fe)

/* Of a bitmap; as QEMU's. */
#define QCOW2_BITMAP_TABLE_MAX UINT32_C(0x8000000) /* entries */
#define QCOW2_BITMAP_BYTES_MAX (512 * MIB)         /* of bits */

struct qcow2_bitmap_entry {
    uint64_t table_offset;
    uint32_t table_size; /* entries */
    uint32_t flags;
    uint8_t type;
    uint8_t granularity_bits;
    uint16_t name_len;
    uint32_t extra_len;
    const uint8_t *extra; /* in the directory */
    const char *name;     /* likewise, not ended by a NUL */
};

/* Bytes that an entry takes. */
uint64_t qcow2_bitmap_entry_len(uint64_t name_len, uint64_t extra_len);

/*
 * The entry at byte *at of a directory, which moves past it. NULL: there it is; else why there is none that could be told from what
 * follows. A name has 1 to QCOW2_BITMAP_NAME_MAX bytes, none of them NUL. All else is not looked at.
 */
const char *qcow2_bitmap_entry_next(const uint8_t *directory, size_t len, size_t *at,
                                    struct qcow2_bitmap_entry *ret);

/* Appends it, at qcow2_bitmap_entry_len() bytes that there are. Returns how many. */
size_t qcow2_bitmap_entry_put(uint8_t *to, const struct qcow2_bitmap_entry *e);

/* All entries of a directory that has been looked at. True: some were not. */
bool qcow2_bitmap_set_in_use(uint8_t *directory, size_t len);

/* How many entries the table of a bitmap has, for a disk of `size` bytes; at most 2^63 / 2^9 / 8 / 2^9. */
uint64_t qcow2_bitmap_table_entries(uint64_t size, unsigned granularity_bits,
                                    unsigned cluster_bits);

/*
 * What is against using it, or NULL: flags, type, granularity, extra data, and whether the table has the size that the disk's asks for
 * and lies in the file. For one that is in use the size of the table may be another.
 */
const char *qcow2_bitmap_entry_problem(const struct qcow2_bitmap_entry *e, uint64_t disk_size,
                                       unsigned cluster_bits, uint64_t file_size);

/* Likewise, of an entry of a table. */
const char *qcow2_bitmap_table_problem(uint64_t entry, unsigned cluster_bits, uint64_t file_size);

#endif
