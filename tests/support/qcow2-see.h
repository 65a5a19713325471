/* SPDX-License-Identifier: Apache-2.0 */
/* What the parts of the judge of qcow2 images share: the header, and the entries of the tables that it names. */
#ifndef CAIRN_TESTS_QCOW2_SEE_H
#define CAIRN_TESTS_QCOW2_SEE_H

#include "qcow2-check.h"

#include <stdarg.h>

#define L1_OFFSET       0x00fffffffffffe00u
#define L1_RESERVED     0x7f000000000001ffu
#define L2_RESERVED     0x3f000000000001feu
#define L2_COMPRESSED   ((uint64_t)1 << 62)
#define FLAG_COPIED     ((uint64_t)1 << 63)
#define FLAG_ZERO       ((uint64_t)1)
#define TABLE_RESERVED  ((uint64_t)0x1ff)
#define INCOMPAT_DIRTY  1u
#define INCOMPAT_BROKEN 2u
#define INCOMPAT_METHOD 8u
#define INCOMPAT_DATA   4u
#define INCOMPAT_EXTEND 16u
#define INCOMPAT_FINE   (INCOMPAT_METHOD | INCOMPAT_DATA | INCOMPAT_EXTEND)

#define METHOD_ZSTD 1

#define NO_SIZE UINT64_MAX

struct see_header {
    unsigned version;
    unsigned cluster_bits;
    unsigned refcount_order;
    unsigned method; /* of compression */
    uint64_t size;
    uint64_t l1_offset;
    uint64_t l1_entries;
    uint64_t table_offset;
    uint64_t table_clusters;
    uint64_t incompatible;
    uint64_t autoclear;
    uint64_t snapshot_count;
    uint64_t snapshots_offset;
    unsigned l2_entry; /* bytes */
    bool encrypted;
    uint64_t luks_offset;
    uint64_t luks_len;
    uint64_t data_name; /* where the name of the data file is; 0: it has none */
    uint64_t data_name_len;
    uint64_t bitmap_count; /* 0: there are none that count */
    uint64_t bitmaps_offset;
    uint64_t bitmaps_len;
};

/* An entry of the table of snapshots. */
struct see_snapshot {
    uint64_t at; /* in the file */
    uint64_t len;
    uint64_t l1_offset;
    uint64_t l1_entries;
    uint64_t disk_size; /* NO_SIZE: it does not say */
    unsigned id_len;
    unsigned name_len;
};

/* An entry of the directory of bitmaps. */
struct see_bitmap {
    uint64_t table;
    uint64_t entries;
    uint64_t flags;
    unsigned type;
    unsigned granularity_bits;
    uint64_t name_len;
    uint64_t extra_len;
    uint64_t name; /* in the file */
    uint64_t end;
};

bool see_has_data_file(const struct see_header *h);
/* The entries of an L2 table. */
uint64_t see_table_entries(const struct see_header *h);

/* Beyond the end of the file there are zeroes: its last cluster may be there in part. */
int see_bytes(const struct qcow2_file *f, uint64_t offset, void *buf, size_t len);
int see_entry(const struct qcow2_file *f, uint64_t offset, uint64_t *ret);

/* A line more of v->text. */
void __attribute__((format(printf, 2, 0)))
see_say(struct qcow2_verdict *v, const char *fmt, va_list args);
/* Why it is not judged; -error. */
int __attribute__((format(printf, 3, 4)))
see_refuse(struct qcow2_verdict *v, int error, const char *fmt, ...);

/* 0, or as qcow2_check(). */
int see_header(const struct qcow2_file *f, struct see_header *h, struct qcow2_verdict *v);

/* The next entry after *ret; zeroed, *ret is before the first one. 1: there is one, 0: it makes no sense. */
int see_next_snapshot(const struct qcow2_file *f, const struct see_header *h,
                      struct see_snapshot *ret);
/* By number, from 1 on. */
int see_snapshot(const struct qcow2_file *f, const struct see_header *h, unsigned number,
                 struct see_snapshot *ret);
/* The entry of the directory that begins at `at`; it may make no sense. */
int see_bitmap(const struct qcow2_file *f, uint64_t at, struct see_bitmap *ret);

/* The sectors that hold the compressed bytes; they begin anywhere in the first one. */
void see_compressed(unsigned cluster_bits, uint64_t entry, uint64_t *ret_offset, uint64_t *ret_len);

#endif
