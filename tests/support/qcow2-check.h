/* SPDX-License-Identifier: Apache-2.0 */
/*
 * An independent judge of qcow2 images, written from the format's specification alone; it shares no code with the driver.
 *
 * It knows what the driver of this stage may write: versions 2 and 3, standard, zero and compressed clusters, subclusters, backing
 * files, external data files, internal snapshots, bitmaps; of an encrypted image all but what a guest reads.
 */
#ifndef CAIRN_TESTS_QCOW2_CHECK_H
#define CAIRN_TESTS_QCOW2_CHECK_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* An image file, or what stands for one. */
struct qcow2_file {
    /* Reads what lies within `size`; 0 or a negative errno. */
    int (*read)(void *arg, uint64_t offset, void *buf, size_t len);
    void *arg;
    uint64_t size;
};

/* A file that lies in memory as a whole. */
struct qcow2_file qcow2_file_in_memory(const void *bytes, uint64_t size);
/* An open file; `fd` is put into *arg, which outlives the result. */
struct qcow2_file qcow2_file_of_fd(int *fd);

enum qcow2_error {
    QCOW2_ERROR_REFCOUNT_LOW, /* lower than the references: to be given away while in use */
    QCOW2_ERROR_USED_TWICE,
    QCOW2_ERROR_MISALIGNED,
    QCOW2_ERROR_BEYOND_END, /* an entry names a cluster that begins at the end of the file or later */
    QCOW2_ERROR_COPIED,     /* OFLAG_COPIED where the refcount is not 1 */
    QCOW2_ERROR_NOT_COPIED, /* no OFLAG_COPIED although the refcount is 1: a copy too many, no harm */
    QCOW2_ERROR_NOWHERE,    /* OFLAG_COPIED without a cluster */
    QCOW2_ERROR_RESERVED,   /* a reserved bit is set */
    QCOW2_ERROR_ZERO_V2,    /* the zero flag in version 2, which has none */
    QCOW2_ERROR_DIRTY,      /* the dirty or the corrupt bit is set */
    QCOW2_ERROR_SNAPSHOT,   /* the table of snapshots, or an entry, makes no sense */
    QCOW2_ERROR_SUBCLUSTER, /* both allocated and zero, or allocated nowhere */
    QCOW2_ERROR_DATA_FILE, /* there is a data file, and a cluster is not at its guest offset in it, or is compressed */
    QCOW2_ERROR_BITMAP, /* the directory of bitmaps, or a table, makes no sense */
    QCOW2_ERRORS,
};

struct qcow2_verdict {
    unsigned errors;
    unsigned leaks;        /* clusters whose refcount is higher than their references */
    unsigned leaks_beyond; /* those of them that lie beyond the end of the file */
    unsigned by_kind[QCOW2_ERRORS];

    /* What the image is made of. */
    unsigned version;
    unsigned cluster_bits;
    unsigned refcount_bits;
    uint64_t virtual_size;
    uint64_t autoclear;
    uint64_t l1_entries;
    uint64_t snapshots;
    uint64_t bitmaps;
    uint64_t refcount_table_clusters;
    uint64_t refcount_blocks;
    uint64_t l2_tables;
    uint64_t data_clusters; /* with a host cluster, those that read as zeroes included */
    uint64_t zero_clusters; /* that read as zeroes */
    uint64_t compressed_clusters;
    uint64_t partial_clusters; /* some subclusters have data, and some have not */
    bool has_data_file;

    char text[2000]; /* the first findings, a line each */
};

/*
 * Walks the header, L1, L2, the refcount table and blocks, and compares. 0: judged, see *ret. -EINVAL: the header is no qcow2
 * header or makes no sense, -EOPNOTSUPP: not judged, -ENOMEM, or what reading says; ret->text says why.
 */
int qcow2_check(const struct qcow2_file *f, struct qcow2_verdict *ret);

/* One image of a chain. */
struct qcow2_layer {
    struct qcow2_file file;
    bool raw;
    unsigned snapshot; /* the disk as it was then: 1 is the first in the table; 0: as it is now */
    struct qcow2_file data; /* the external data file, if there is one */
};

/*
 * What a guest reads at [offset, offset + len) of layers[0], whose backing file is layers[1], and so on. Beyond the end of a
 * backing file, and below the last layer, there are zeroes. 0, or as above; -ERANGE beyond the end of the disk.
 */
int qcow2_read_guest(const struct qcow2_layer *layers, unsigned count, uint64_t offset, void *buf,
                     size_t len);

/* A snapshot, by its place in the table from 1 on. */
struct qcow2_snapshot_seen {
    char id[32];
    char name[256];
    uint64_t disk_size;
};

/* 0, or as qcow2_check(); -ENOENT: there are not so many. */
int qcow2_see_snapshot(const struct qcow2_file *f, unsigned number,
                       struct qcow2_snapshot_seen *ret);

/* The name of the external data file; the empty one if there is none. 0, or as qcow2_check(). */
int qcow2_see_data_file(const struct qcow2_file *f, char ret_name[1024]);

/* A bitmap, by its place in the directory from 1 on. */
struct qcow2_bitmap_seen {
    char name[1024];
    bool in_use;
    bool enabled;
    unsigned granularity_bits;
};

/*
 * As qcow2_see_snapshot(). Its bits, of which there are `bytes` bytes, if it is not in use; ones for more than the disk has are an
 * error, -EINVAL.
 */
int qcow2_see_bitmap(const struct qcow2_file *f, unsigned number, struct qcow2_bitmap_seen *ret,
                     void *bits, size_t bytes);

#endif
