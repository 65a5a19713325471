/* SPDX-License-Identifier: Apache-2.0 */
/*
 * qcow2 on disk, as QEMU's docs/interop/qcow2 specifies it: places of fields, masks, and the limits that we set. All integers
 * are big endian.
 */
#ifndef CAIRN_FORMATS_QCOW2_FORMAT_H
#define CAIRN_FORMATS_QCOW2_FORMAT_H

#include "base/macros.h"

#include <stdint.h>

/* The header: offsets of its fields. Lengths are 4 or 8 bytes, as the gaps say; compression_type has 1. */
#define QCOW2_OFFSET_MAGIC                   0
#define QCOW2_OFFSET_VERSION                 4
#define QCOW2_OFFSET_BACKING_FILE_OFFSET     8
#define QCOW2_OFFSET_BACKING_FILE_SIZE       16
#define QCOW2_OFFSET_CLUSTER_BITS            20
#define QCOW2_OFFSET_SIZE                    24
#define QCOW2_OFFSET_CRYPT_METHOD            32
#define QCOW2_OFFSET_L1_SIZE                 36
#define QCOW2_OFFSET_L1_OFFSET               40
#define QCOW2_OFFSET_REFCOUNT_TABLE_OFFSET   48
#define QCOW2_OFFSET_REFCOUNT_TABLE_CLUSTERS 56
#define QCOW2_OFFSET_SNAPSHOT_COUNT          60
#define QCOW2_OFFSET_SNAPSHOTS_OFFSET        64
/* Since version 3. */
#define QCOW2_OFFSET_INCOMPATIBLE     72
#define QCOW2_OFFSET_COMPATIBLE       80
#define QCOW2_OFFSET_AUTOCLEAR        88
#define QCOW2_OFFSET_REFCOUNT_ORDER   96
#define QCOW2_OFFSET_HEADER_LENGTH    100
#define QCOW2_OFFSET_COMPRESSION_TYPE 104 /* there if header_length is more */

#define QCOW2_MAGIC UINT32_C(0x514649fb) /* "QFI\xfb" */

#define QCOW2_HEADER_LENGTH_V2     72  /* version 2: always */
#define QCOW2_HEADER_LENGTH_V3_MIN 104 /* version 3: at least */
#define QCOW2_HEADER_LENGTH_V3     112 /* what we write: with compression_type and padding */

#define QCOW2_REFCOUNT_ORDER_V2  4
#define QCOW2_REFCOUNT_ORDER_MAX 6

/* Features: bits. */
#define QCOW2_INCOMPATIBLE_DIRTY            (UINT64_C(1) << 0)
#define QCOW2_INCOMPATIBLE_CORRUPT          (UINT64_C(1) << 1)
#define QCOW2_INCOMPATIBLE_DATA_FILE        (UINT64_C(1) << 2)
#define QCOW2_INCOMPATIBLE_COMPRESSION_TYPE (UINT64_C(1) << 3)
#define QCOW2_INCOMPATIBLE_EXTENDED_L2      (UINT64_C(1) << 4)
#define QCOW2_INCOMPATIBLE_KNOWN            ((UINT64_C(1) << 5) - 1)

#define QCOW2_COMPATIBLE_LAZY_REFCOUNTS (UINT64_C(1) << 0)

#define QCOW2_AUTOCLEAR_BITMAPS  (UINT64_C(1) << 0)
#define QCOW2_AUTOCLEAR_RAW_DATA (UINT64_C(1) << 1)

enum qcow2_crypt_method { QCOW2_CRYPT_NONE, QCOW2_CRYPT_AES, QCOW2_CRYPT_LUKS };

enum qcow2_compression { QCOW2_COMPRESSION_ZLIB, QCOW2_COMPRESSION_ZSTD };

/* A header extension: type (4 bytes), length of its data (4 bytes), data, padding to a multiple of 8. */
#define QCOW2_EXTENSION_HEAD           8
#define QCOW2_EXTENSION_ALIGN          8
#define QCOW2_EXTENSION_END            UINT32_C(0x00000000)
#define QCOW2_EXTENSION_BACKING_FORMAT UINT32_C(0xe2792aca)
#define QCOW2_EXTENSION_FEATURE_NAMES  UINT32_C(0x6803f857)
#define QCOW2_EXTENSION_BITMAPS        UINT32_C(0x23852875)
#define QCOW2_EXTENSION_ENCRYPTION     UINT32_C(0x0537be77)
#define QCOW2_EXTENSION_DATA_FILE      UINT32_C(0x44415441)

/* The extension of encryption: where the LUKS header lies, and its length. */
#define QCOW2_ENCRYPTION_LEN    16
#define QCOW2_ENCRYPTION_OFFSET 0
#define QCOW2_ENCRYPTION_LENGTH 8

/* An entry of the feature name table: type (1 byte), bit (1 byte), name padded with zeroes. */
enum qcow2_feature_type {
    QCOW2_FEATURE_INCOMPATIBLE,
    QCOW2_FEATURE_COMPATIBLE,
    QCOW2_FEATURE_AUTOCLEAR,
};

#define QCOW2_FEATURE_ENTRY_LEN 48
#define QCOW2_FEATURE_NAME_LEN  46

/* The bitmaps extension. */
#define QCOW2_BITMAPS_LEN              24
#define QCOW2_BITMAPS_COUNT            0
#define QCOW2_BITMAPS_RESERVED         4
#define QCOW2_BITMAPS_DIRECTORY_SIZE   8
#define QCOW2_BITMAPS_DIRECTORY_OFFSET 16
#define QCOW2_BITMAP_ENTRY_LEN_MIN     24 /* in the directory, without name and extra data */

/* Entries of the L1 table and of the refcount table have 8 bytes, those of an L2 table too (16 with extended L2). */
#define QCOW2_ENTRY_LEN             8
#define QCOW2_L2_EXTENDED_ENTRY_LEN 16

/* Bits 9-55; a cluster's own low bits must be 0 as well. */
#define QCOW2_OFFSET_MASK UINT64_C(0x00fffffffffffe00)
/* L1 entry: the L2 table is used once. L2 entry: so is the cluster. */
#define QCOW2_COPIED UINT64_C(0x8000000000000000)

#define QCOW2_L1_OFFSET_MASK   QCOW2_OFFSET_MASK
#define QCOW2_L1_RESERVED_MASK UINT64_C(0x7f000000000001ff)

#define QCOW2_L2_COMPRESSED UINT64_C(0x4000000000000000)
/* Of standard clusters. */
#define QCOW2_L2_ZERO          UINT64_C(1) /* since version 3; not with extended L2 */
#define QCOW2_L2_OFFSET_MASK   QCOW2_OFFSET_MASK
#define QCOW2_L2_RESERVED_MASK UINT64_C(0x3f000000000001fe)

/*
 * Of compressed clusters: bits 0 to x-1 are the offset, of any alignment; bits x to 61 the number of sectors beyond the one
 * that the offset lies in. This is x.
 */
#define QCOW2_COMPRESSED_OFFSET_BITS(cluster_bits) (62 - ((cluster_bits)-8))
#define QCOW2_COMPRESSED_SECTOR                    512

/* What tables of mappings point to lies below this. */
#define QCOW2_HOST_OFFSET_END (UINT64_C(1) << 56)

#define QCOW2_REFCOUNT_TABLE_OFFSET_MASK   UINT64_C(0xfffffffffffffe00)
#define QCOW2_REFCOUNT_TABLE_RESERVED_MASK UINT64_C(0x00000000000001ff)

/* The snapshot table: the fixed part of an entry; extra data, the ID, the name and padding to a multiple of 8 follow it. */
#define QCOW2_SNAPSHOT_LEN_MIN       40
#define QCOW2_SNAPSHOT_L1_OFFSET     0
#define QCOW2_SNAPSHOT_L1_SIZE       8
#define QCOW2_SNAPSHOT_ID_LEN        12
#define QCOW2_SNAPSHOT_NAME_LEN      14
#define QCOW2_SNAPSHOT_DATE_S        16
#define QCOW2_SNAPSHOT_DATE_NS       20
#define QCOW2_SNAPSHOT_VM_CLOCK_NS   24
#define QCOW2_SNAPSHOT_VM_STATE_SIZE 32
#define QCOW2_SNAPSHOT_EXTRA_LEN     36
/* In the extra data. */
#define QCOW2_SNAPSHOT_EXTRA_VM_STATE_SIZE 0
#define QCOW2_SNAPSHOT_EXTRA_DISK_SIZE     8
#define QCOW2_SNAPSHOT_EXTRA_ICOUNT        16 /* instructions, all ones: not counted */
#define QCOW2_SNAPSHOT_EXTRA_V3            16 /* that version 3 wants */
#define QCOW2_SNAPSHOT_EXTRA_ALL           24 /* that we write */

/* Limits: the format's where it has one, else QEMU's, so that each reads what the other wrote. */
#define QCOW2_CLUSTER_BITS_MIN             9
#define QCOW2_CLUSTER_BITS_MAX             21
#define QCOW2_CLUSTER_BITS_EXTENDED_L2_MIN 14
#define QCOW2_L1_BYTES_MAX                 (32 * MIB)
#define QCOW2_REFCOUNT_TABLE_BYTES_MAX     (8 * MIB)
#define QCOW2_SNAPSHOTS_MAX                65536
#define QCOW2_SNAPSHOTS_BYTES_MAX          (64 * MIB)
#define QCOW2_SNAPSHOT_EXTRA_MAX           1024
#define QCOW2_SNAPSHOT_TEXT_MAX            1024 /* of an ID, of a name; QEMU has 127 and 255 */
#define QCOW2_BITMAPS_MAX                  65535
#define QCOW2_BITMAPS_DIRECTORY_MAX        (64 * MIB)
#define QCOW2_BACKING_FILE_MAX             1023
/* Ours. */
#define QCOW2_LUKS_HEADER_MAX    (64 * MIB)
#define QCOW2_BACKING_FORMAT_MAX 255
#define QCOW2_DATA_FILE_MAX      1023

#endif
