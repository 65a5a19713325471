/* SPDX-License-Identifier: Apache-2.0 */
/* What the files of the driver vmdk share. */
#ifndef CAIRN_FORMATS_VMDK_VMDK_INTERNAL_H
#define CAIRN_FORMATS_VMDK_VMDK_INTERNAL_H

#include "formats/import.h"
#include "formats/vmdk/vmdk.h"

/* The largest grain, and the most entries of a grain table. */
#define VMDK_GRAIN_BYTES_MAX   ((uint64_t)16 << 20)
#define VMDK_TABLE_ENTRIES_MAX 512u

struct vmdk_extent {
    enum vmdk_kind kind;
    uint64_t start; /* in the disk; bytes, as all here */
    uint64_t len;
    struct edge *file;   /* VMDK_ZERO: NULL */
    uint64_t file_start; /* VMDK_FLAT */

    /* VMDK_SPARSE */
    uint64_t file_size;
    uint64_t directory; /* where it lies */
    unsigned grain_bits;
    unsigned table_entries;
    bool compressed;
    bool zero_grains;        /* the entry 1 means: reads as zeroes */
    bool first_sector_known; /* grains say where in the disk they belong */
};

/* A grain that was decompressed. */
struct vmdk_grain {
    unsigned refs;   /* Protected by import.lock. */
    uint64_t offset; /* in the disk */
    uint8_t bytes[];
};

struct vmdk {
    /* Set in open, then constant. */
    struct import import;
    struct vmdk_descriptor descriptor;
    bool one_file;
    struct vmdk_extent *extents;
    unsigned count;

    struct vmdk_grain *grain; /* the last one; protected by import.lock */
};

/* The extent that a place in the disk belongs to. */
const struct vmdk_extent *vmdk_extent_at(const struct vmdk *v, uint64_t offset);

/* Reads the header of a sparse extent, whose file is known. With `ret_text` its place for a descriptor; 0 if there is none. */
int co_fn vmdk_sparse_open(struct vmdk *v, const struct request *by, struct vmdk_extent *e,
                           uint64_t *ret_capacity, uint64_t *ret_text, uint64_t *ret_text_len,
                           struct error **err);
int co_fn vmdk_sparse_map(struct vmdk *v, const struct vmdk_extent *e, const struct request *req,
                          uint64_t offset, uint64_t len, struct mapping *ret);

int co_fn vmdk_co_read_encoded(struct node *node, struct request *req, uint64_t host_offset);
void vmdk_grain_release(struct vmdk *v);

#endif
