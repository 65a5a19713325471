/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Dirty bitmaps that a qcow2 image stores, for src/formats/qcow2 alone. docs/formats/qcow2.md says in which order they reach the
 * disk. All of it runs on the control thread.
 *
 *   qcow2-bitmap-load.c    when the image is opened
 *   qcow2-bitmap-store.c   when it is closed, and when one is removed
 *   qcow2-bitmap-bits.c    bits and table of one that is stored
 *   qcow2-bitmap-space.c   which clusters they use
 *   qcow2-bitmap-dir.c     the directory; qcow2-header-bitmaps.c: what the header says of it
 *
 * STORED-1 While an image is open for writing, all bitmaps that it lists are IN_USE on the disk; durably, before anything else is
 *          written.
 * STORED-2 Bits, tables and the directory are written to new places, and durable before the header points to them. Clusters of bits and
 *          tables that have on the disk what they should have stay where they are (STORED-8).
 * STORED-3 The header changes from one directory to another by one write within one sector. Where it cannot, the autoclear bit is cleared
 *          before, and set after that, so that the image has no bitmaps meanwhile.
 * STORED-4 What the old directory pointed to is given back after the header has changed durably, and only what has one user.
 * STORED-5 What we cannot use is kept, IN_USE, byte by byte, until it is removed.
 * STORED-6 Bits are stored when nothing can change the disk any more, and after all of the disk is durable.
 * STORED-7 Where bitmaps cannot be kept right, the autoclear bit is cleared, durably, before anything else is written.
 * STORED-8 What stays is read and compared when the image is closed, and belongs to this bitmap alone, as the refcounts and the pool say.
 */
#ifndef CAIRN_FORMATS_QCOW2_BITMAP_H
#define CAIRN_FORMATS_QCOW2_BITMAP_H

#include "base/error.h"
#include "bitmaps/bitmap-store.h"
#include "formats/qcow2/qcow2-bitmap-dir.h"
#include "formats/qcow2/qcow2-header.h"
#include "formats/qcow2/qcow2.h"

/* What an image may make us read, of all its bitmaps together: ours (P6). */
#define QCOW2_BITMAP_TABLES_MAX (1 * GIB) /* bytes of tables */
#define QCOW2_BITMAP_DATA_MAX   (4 * GIB) /* bytes of bits */

struct bitmap;

struct qcow2_bitmaps {
    uint8_t *directory; /* as on disk; NULL: the image has none that counts */
    size_t len;
    uint32_t count;
    uint64_t offset;
    struct list removals; /* struct qcow2_bitmap_removal: by changes that are being carried out */
};

/* ---- qcow2-bitmap-load.c ---- */

/*
 * When the image is opened: puts its bitmaps on the node. Those that are damaged are told, once, and are inconsistent; none of that
 * keeps the disk from being opened.
 */
int co_fn control_fn qcow2_bitmaps_co_load(struct qcow2 *q, const struct request *by,
                                           const struct qcow2_header *header, struct error **err);
/* STORED-1: the last step of an open for writing. */
int co_fn control_fn qcow2_bitmaps_co_mark(struct qcow2 *q, const struct request *by,
                                           struct error **err);
/* Also of a node that has not loaded any. */
void qcow2_bitmaps_release(struct qcow2 *q);
/* The autoclear bit, if the bitmaps are kept right (STORED-7). */
uint64_t qcow2_bitmaps_autoclear_kept(const struct qcow2 *q);

/*
 * The entries of a directory, which owns their bytes, in order; the caller's to free. -EBADMSG: they make no sense, see *ret_problem;
 * -ENOMEM.
 */
int qcow2_bitmap_entries(const uint8_t *directory, size_t len, uint32_t count,
                         struct qcow2_bitmap_entry **ret, const char **ret_problem);

/* ---- qcow2-bitmap-space.c ---- */

/* Clusters that some bitmaps use, and use alone. */
struct qcow2_bitmap_space {
    uint64_t *v; /* their numbers */
    size_t count;
    size_t max;
};

/*
 * Adds those of an entry's table and bits, and gives the table, as it is on the disk, which is the caller's. None, and NULL, if they make
 * no sense. -ENOMEM, -EIO, ...
 */
int co_fn qcow2_bitmap_space_add(struct qcow2_bitmap_space *s, struct qcow2 *q,
                                 const struct request *by, const struct qcow2_bitmap_entry *e,
                                 struct iobuf **ret_table);
/* Adds a range of the file, or all of another one. -ENOMEM. */
int qcow2_bitmap_space_add_range(struct qcow2_bitmap_space *s, const struct qcow2 *q,
                                 uint64_t offset, uint64_t len);
int qcow2_bitmap_space_add_all(struct qcow2_bitmap_space *s, const struct qcow2_bitmap_space *more);
/* What is there twice, or has another refcount than 1, is left out: it leaks, or is somebody else's. It is in order then. */
int co_fn qcow2_bitmap_space_settle(struct qcow2_bitmap_space *s, struct qcow2 *q,
                                    const struct request *by);
/* Of one that is in order. */
bool qcow2_bitmap_space_has(const struct qcow2_bitmap_space *s, uint64_t cluster);
/* Leaves out what the other one has, which comes into order. */
void qcow2_bitmap_space_subtract(struct qcow2_bitmap_space *s, struct qcow2_bitmap_space *other);
/* Back to the pool, and released. */
void qcow2_bitmap_space_give_back(struct qcow2_bitmap_space *s, struct qcow2 *q);
void qcow2_bitmap_space_release(struct qcow2_bitmap_space *s);

/* ---- qcow2-bitmap-bits.c ---- */

/* What is being written for a new directory: one bitmap after the other. */
struct qcow2_bitmap_writer {
    struct qcow2 *q;
    const struct request *by;
    struct iobuf *data; /* QCOW2_BITMAP_PIECE, or a cluster */
    struct iobuf *was;  /* likewise: what is compared */
    uint64_t unsynced;  /* bytes */

    /* Clusters: that are written; of the old directory's, all, and those that the new one has, too (STORED-8). */
    struct qcow2_bitmap_space taken;
    struct qcow2_bitmap_space freed;
    struct qcow2_bitmap_space stays;

    /* What the allocator had in hand when it began, in order; NULL: not known yet. */
    struct qcow2_place *pool;
    size_t pool_count;
};

#define QCOW2_BITMAP_PIECE ((size_t)256 << 10)

/* -ENOMEM. To be released also after an error. */
int co_fn qcow2_bitmap_writer_init(struct qcow2_bitmap_writer *w, struct qcow2 *q,
                                   const struct request *by);
void qcow2_bitmap_writer_release(struct qcow2_bitmap_writer *w);
/*
 * When nothing else uses the image: bits and table of one; sets where they are, in *e. `old`: what the image has of it, or NULL: that is freed, or stays. -EFBIG: the
 * format has no room for so many bits; -ENOMEM, -EIO, ...
 */
int co_fn qcow2_bitmap_write(struct qcow2_bitmap_writer *w, const struct bitmap *bits,
                             const struct qcow2_bitmap_entry *old, struct qcow2_bitmap_entry *e);
/* Clusters in a row, for so many bytes, which are `taken`; and bytes into them. */
int co_fn qcow2_bitmap_take_row(struct qcow2_bitmap_writer *w, uint64_t bytes,
                                struct qcow2_extent *ret);
int co_fn qcow2_bitmap_write_bytes(struct qcow2_bitmap_writer *w, uint64_t offset, struct iobuf *b,
                                   size_t from, size_t len);

/* ---- qcow2-bitmap-store.c ---- */

/* For closing: see STORED-6. */
int co_fn control_fn qcow2_bitmaps_co_store(struct qcow2 *q, const struct request *by,
                                            struct error **err);
extern const struct bitmap_store qcow2_bitmap_store;

#endif
