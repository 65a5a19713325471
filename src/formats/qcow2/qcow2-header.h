/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The header of a qcow2 image: from hostile bytes (P6) to checked fields. Everything here is pure: no I/O, any thread.
 *
 * What a parsed header promises (each is an error otherwise):
 *   - all fields are within the limits of qcow2-format.h, sizes and offsets are below 2^63;
 *   - the L1 table is large enough for `size`;
 *   - refcount table, L1 table and the least that the snapshot table needs lie within the file, aligned to clusters, outside
 *     the header's cluster, and no two share a cluster.
 * What the tables contain is not looked at.
 */
#ifndef CAIRN_FORMATS_QCOW2_HEADER_H
#define CAIRN_FORMATS_QCOW2_HEADER_H

#include "base/error.h"
#include "formats/qcow2/qcow2-format.h"

#include <assert.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/*
 * The header, its extensions and the backing file's name are expected within this many bytes, and within the first cluster.
 * (The format bounds them by the cluster alone; with clusters of more than 64 KiB we refuse what lies further on.)
 */
#define QCOW2_HEADER_BYTES_MAX (64 * KIB)

struct qcow2_extension {
    uint32_t type;
    uint32_t len;
    const uint8_t *data; /* within the header's `bytes` */
};

struct qcow2_header {
    unsigned version; /* 2 or 3 */
    unsigned cluster_bits;
    uint64_t size;    /* of the virtual disk, bytes */
    uint32_t l1_size; /* entries */
    uint64_t l1_offset;
    uint64_t refcount_table_offset;
    uint32_t refcount_table_clusters;
    unsigned refcount_order; /* a refcount has 1 << refcount_order bits */
    uint32_t snapshot_count;
    uint64_t snapshots_offset; /* 0 or meaningless without snapshots */
    enum qcow2_crypt_method crypt_method;
    uint64_t incompatible; /* features; 0 in version 2, as the next two */
    uint64_t compatible;
    uint64_t autoclear;
    uint32_t header_length;    /* bytes; where the extensions begin */
    unsigned compression_type; /* enum qcow2_compression, or a value unknown to us */

    char *backing_file;   /* NULL: there is none */
    char *backing_format; /* NULL: the image does not say */
    char *
        data_file; /* name of the external data file; NULL: there is none, or the image does not say */

    /* Consistent only while `autoclear` says so; checked only then. */
    bool has_bitmaps;
    uint32_t bitmap_count;
    uint64_t bitmap_directory_offset;
    uint64_t bitmap_directory_size;
    char *
        bitmaps_problem; /* of qcow2_header_parse_tolerant(): why there are none although the feature is set */
    char *snapshots_problem; /* the same: why there are none although there is a number of them */

    /* All extensions but the end marker, known and unknown, in the image's order and byte by byte. */
    struct qcow2_extension *extensions;
    unsigned extension_count;
    uint8_t *bytes; /* the header and its extensions as they were found: header_length and more */
    size_t bytes_len;
};

/*
 * `bytes`: the first `len` bytes of the file, where len is at least the smaller of QCOW2_HEADER_BYTES_MAX and file_size (more
 * is ignored). `ret` is written on success only, and then owned by the caller, who ends it by qcow2_header_release().
 * -EINVAL: this is no qcow2 image, or a damaged one; -ENOTSUP: a version that is not read here; -ENOMEM.
 */
int qcow2_header_parse(struct qcow2_header *ret, const void *bytes, size_t len, uint64_t file_size,
                       const char *node_name, struct error **err);
/*
 * The same, but what is broken about the bitmaps only, or about the snapshots, however it may be, is as if there were none: see
 * bitmaps_problem and snapshots_problem.
 */
int qcow2_header_parse_tolerant(struct qcow2_header *ret, const void *bytes, size_t len,
                                uint64_t file_size, const char *node_name, struct error **err);
/* Also for a zeroed one. */
void qcow2_header_release(struct qcow2_header *header);

/*
 * -ENOTSUP, with a message that names it, for what the image needs and the driver does not do: for any use, or, unless
 * read_only, for writing.
 */
int qcow2_header_check_supported(const struct qcow2_header *header, bool read_only,
                                 const char *node_name, struct error **err);

/*
 * Where the LUKS header of an encrypted image lies. -EINVAL if it is not said, or lies where it cannot: not in the file, or on top
 * of another table that the header names.
 */
int qcow2_header_encryption(const struct qcow2_header *header, uint64_t file_size,
                            uint64_t *ret_offset, uint64_t *ret_len, struct error **err);

/*
 * The autoclear features that the driver maintains. Who opens an image for writing clears the other bits of `autoclear` in
 * the file, durably, before the first change: what they promise does not hold any more.
 */
uint64_t qcow2_header_autoclear_kept(void);

/* The features that the format's specification names. Ends with an empty name. */
struct qcow2_feature {
    enum qcow2_feature_type type;
    uint8_t bit;
    char name[QCOW2_FEATURE_NAME_LEN];
};
extern const struct qcow2_feature qcow2_features[];

/*
 * The image's own name for a feature; NULL if it has none. At most QCOW2_FEATURE_NAME_LEN bytes
 * and a NUL are written to `buf`, which is returned; what is not printable ASCII is replaced.
 */
const char *qcow2_header_feature_name(const struct qcow2_header *header,
                                      enum qcow2_feature_type type, unsigned bit,
                                      char buf[QCOW2_FEATURE_NAME_LEN + 1]);

static inline bool qcow2_header_has_data_file(const struct qcow2_header *header)
{
    return header->incompatible & QCOW2_INCOMPATIBLE_DATA_FILE;
}

/* Does the data file hold what the disk shows, so that it can be read without the image? */
static inline bool qcow2_header_data_is_raw(const struct qcow2_header *header)
{
    return qcow2_header_has_data_file(header) && header->autoclear & QCOW2_AUTOCLEAR_RAW_DATA &&
           !header->backing_file;
}

static inline uint64_t qcow2_header_cluster_size(const struct qcow2_header *header)
{
    return (uint64_t)1 << header->cluster_bits;
}

/* How many entries the L1 table needs for a disk of `size` bytes. */
static inline uint64_t qcow2_l1_entries_needed(uint64_t size, unsigned cluster_bits,
                                               bool extended_l2)
{
    /* Each L1 entry covers a cluster full of L2 entries, each of which covers a cluster. */
    unsigned covered_bits = 2 * cluster_bits - (extended_l2 ? 4 : 3);

    assert(cluster_bits >= QCOW2_CLUSTER_BITS_MIN && cluster_bits <= QCOW2_CLUSTER_BITS_MAX);
    return (size >> covered_bits) + ((size & (((uint64_t)1 << covered_bits) - 1)) != 0);
}

#endif
