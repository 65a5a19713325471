/* SPDX-License-Identifier: Apache-2.0 */
/* One operation on tables while nobody else is here, for qcow2-snapshot*.c and qcow2-amend.c alone. */
#ifndef CAIRN_FORMATS_QCOW2_SNAPSHOT_INTERNAL_H
#define CAIRN_FORMATS_QCOW2_SNAPSHOT_INTERNAL_H

#include "formats/qcow2/check/qcow2-counts.h"
#include "formats/qcow2/qcow2-header-write.h"
#include "formats/qcow2/qcow2-snapshot.h"
#include "formats/qcow2/qcow2.h"

/* One operation. */
struct snap {
    struct qcow2 *q;
    const struct request *by;
    struct error **err;

    uint8_t header[QCOW2_HEADER_SECTOR]; /* the first of the image, as on disk */
    uint64_t table_offset;
    uint8_t *table; /* as on disk */
    size_t table_len;
    size_t table_max;
    struct qcow2_snapshot *v;
    uint32_t count;
};

/* The entries of an L1 table, in the host's byte order. */
struct snap_l1 {
    uint64_t *v;
    uint32_t count;
};

/* ---- qcow2-snapshot.c: 0, or a negative errno and the operation's error ---- */

/* The image is quiet (SNAP-1), and the snapshot table read. snap_end() also after an error. */
int co_fn snap_begin(struct snap *s, struct backend *b);
void co_fn snap_end(struct snap *s);

/* Clusters in a row; none for no bytes. One alone is taken where there is a free one. Counted when the next flush is done. */
int co_fn snap_alloc_row(struct snap *s, uint64_t bytes, struct qcow2_extent *ret);
/* Nothing points there: but after a header that we are not sure of. */
void snap_put_row(struct snap *s, const struct qcow2_extent *row);
/* Bytes of the header, within one sector, durably; what it was, `s->header`, if that fails (SNAP-4, D3). */
int co_fn snap_change_header(struct snap *s, const uint8_t *header, size_t from, size_t to);
/* The header points to another table of snapshots, which is durable. */
int co_fn snap_change_table(struct snap *s, uint32_t count, uint64_t offset);
/* Each snapshot says how large its disk is, as version 3 wants it. */
int co_fn snap_complete_table(struct snap *s);

/* ---- qcow2-snapshot-refs.c: 0, or a negative errno and the operation's error ---- */

/* What a negative errno means for the operation. */
int snap_failed(struct snap *s, int r, const char *what);
int snap_damaged(struct snap *s, const char *what, uint64_t at);

/* Of the file, any length, without an error of the operation's. */
int co_fn snap_read_flat(struct snap *s, uint64_t offset, uint8_t *ret, size_t len);
int co_fn snap_write_flat(struct snap *s, uint64_t offset, const uint8_t *bytes, size_t len);

struct snap_l1 snap_active_l1(const struct qcow2 *q);
/* Of a snapshot, with `entries` of them, without flags; the caller's to free, also after an error. */
int co_fn snap_read_l1(struct snap *s, const struct qcow2_snapshot *sn, uint32_t entries,
                       struct snap_l1 *ret);
/* The entries with their flags, or without. */
int co_fn snap_write_l1(struct snap *s, struct snap_l1 l1, uint64_t offset, bool flags);

/* What is done with an L2 table, in memory; 1 if it has changed and shall be written. */
typedef int snap_l2_fn(struct snap *s, uint8_t *table, void *arg);
/* With those that an L1 table points to. */
int co_fn snap_visit_tables(struct snap *s, struct snap_l1 l1, snap_l2_fn *fn, void *arg);
int snap_clear_in_l2(struct snap *s, uint8_t *table, void *arg);

/* References to the clusters of a range, and to what an L1 table keeps: L2 tables, and what those point to. */
int snap_tally(struct snap *s, struct qcow2_counts *c, uint64_t offset, uint64_t len);
int co_fn snap_tally_l1(struct snap *s, struct qcow2_counts *c, struct snap_l1 l1);

enum snap_change { SNAP_RAISE, SNAP_LOWER };

/* Refcounts of what was counted, durably; `dry`: only whether it can be done. */
int co_fn snap_change_counts(struct snap *s, const struct qcow2_counts *c, enum snap_change change,
                             bool dry);
/* To the host, what was counted and is not used any more. Its refcounts are durable. */
void co_fn snap_give_back_free(struct snap *s, const struct qcow2_counts *c);

/* SNAP-2, SNAP-5: of the active tables, durably. */
int co_fn snap_clear_active_flags(struct snap *s);
int co_fn snap_set_active_flags(struct snap *s);

#endif
