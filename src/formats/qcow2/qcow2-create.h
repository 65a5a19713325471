/* SPDX-License-Identifier: Apache-2.0 */
/*
 * New qcow2 images. What goes into the file is a pure function of the options: a few segments, and zeroes (holes) everywhere
 * else. Segments are not kept in memory but filled piece by piece, so that the cost follows what the format needs (P5).
 */
#ifndef CAIRN_FORMATS_QCOW2_CREATE_H
#define CAIRN_FORMATS_QCOW2_CREATE_H

#include "base/context.h"
#include "base/error.h"
#include "formats/qcow2/qcow2-format.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct qcow2_create_options {
    uint64_t size; /* of the virtual disk, bytes; rounded up to a multiple of 512 */
    unsigned cluster_bits;
    unsigned refcount_order;
    unsigned version;
    const char *backing_file;   /* NULL: none */
    const char *backing_format; /* needed with a backing file, as nobody guesses (Q6) */
    bool preallocate_metadata;  /* the whole disk is mapped, to clusters that are holes */
    bool lazy_refcounts;        /* later writers may postpone refcounts; since version 3 */
    enum qcow2_compression
        compression_type; /* of what later writers compress; zstd: since version 3 */
    const char
        *data_file;     /* where guest clusters lie; NULL: in the image itself; since version 3 */
    bool data_file_raw; /* it holds what the disk shows: all of it is mapped */
    uint64_t luks_len;  /* bytes that a LUKS header takes; 0: the disk is not encrypted */
    bool
        extended_l2; /* clusters have subclusters; since version 3, with clusters of 16 KiB at least */
};

#define QCOW2_CREATE_OPTIONS_INIT                                                                  \
    {                                                                                              \
        .cluster_bits = 16, .refcount_order = 4, .version = 3                                      \
    }

struct qcow2_segment {
    uint64_t offset;
    uint64_t len;
};

/* Header, refcount table, refcount blocks, L1 table, L2 tables. */
#define QCOW2_LAYOUT_SEGMENTS_MAX 5

/* The whole image: areas one after the other, each of whole clusters, all with refcount 1, in the order of the fields. */
struct qcow2_layout {
    uint64_t file_size;
    /* Ascending. What lies outside of them is zeroes. */
    struct qcow2_segment segments[QCOW2_LAYOUT_SEGMENTS_MAX];
    unsigned segment_count;

    uint64_t size; /* of the virtual disk, bytes */
    unsigned version;
    unsigned cluster_bits;
    unsigned refcount_order;
    bool lazy_refcounts;
    enum qcow2_compression compression_type;
    bool data_file_raw;
    bool extended_l2;
    uint64_t refcount_table_offset;
    uint64_t refcount_table_clusters;
    uint64_t refcount_blocks_offset;
    uint64_t refcount_blocks; /* clusters */
    uint64_t l1_offset;       /* 0 if l1_size is */
    uint64_t l1_size;         /* entries */
    uint64_t
        luks_offset; /* of an encrypted image; what is there is written by encrypted_co_format() */
    uint64_t luks_len;
    uint64_t l2_offset; /* with preallocation only */
    uint64_t l2_tables;
    uint64_t data_offset; /* as l2_offset */
    uint64_t data_clusters;
    uint64_t mapped_clusters; /* of the disk: data_clusters, if they are not in a data file */

    /* Borrowed from the options. */
    const char *backing_file;
    const char *backing_format;
    const char *data_file;
};

/*
 * -EINVAL or -ENOTSUP with a message for what cannot be, or cannot be opened again: the limits are those of
 * qcow2_header_parse(). The strings of the options must outlive `ret`. Pure.
 */
int qcow2_layout_make(const struct qcow2_create_options *options, struct qcow2_layout *ret,
                      struct error **err);

/* The bytes [offset, offset + len) of the file, any of them. Pure. */
void qcow2_layout_read(const struct qcow2_layout *layout, uint64_t offset, void *buf, size_t len);

/*
 * Makes the file, which must not exist (-EEXIST), and returns when it and its name are durable. The header is written last:
 * a file that a crash leaves half made is no qcow2 image. On failure there is no file.
 */
int co_fn qcow2_co_create(const char *path, const struct qcow2_create_options *options,
                          struct error **err);

#endif
