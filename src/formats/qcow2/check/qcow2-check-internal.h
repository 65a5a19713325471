/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One run of a check, for this folder alone.
 *
 *   qcow2-check.c          the run: header, refcounts, comparing, the rounds of a repair
 *   qcow2-check-online.c   the run on an image in use
 *   qcow2-check-io.c       reading and writing the file
 *   qcow2-check-tables.c   snapshots, bitmaps, other metadata
 *   qcow2-check-map.c      L1 and L2 tables
 *   qcow2-repair.c         refcounts: in place, or built anew
 *   qcow2-repair-map.c     entries, copies, the snapshot table, header bits
 *
 * References are counted in this order, so that who comes later is to blame where two overlap: header, active L1 table, LUKS
 * header, active L2 tables, snapshots with what is theirs, bitmaps, refcount table and blocks, guest data.
 */
#ifndef CAIRN_FORMATS_QCOW2_CHECK_INTERNAL_H
#define CAIRN_FORMATS_QCOW2_CHECK_INTERNAL_H

#include "formats/qcow2/check/qcow2-check.h"
#include "formats/qcow2/check/qcow2-counts.h"
#include "formats/qcow2/qcow2-header.h"
#include "loop/iobuf.h"
#include "loop/lock.h"

struct qcow2;

#define CHECK_PIECE ((size_t)1 << 20) /* the most that one read of metadata carries */

struct check_l2 {
    uint64_t offset;
    uint64_t uses; /* entries of L1 tables that point to it */
    bool active;
    bool known;    /* its reference is counted */
    bool bad;      /* lies where a table cannot be: not looked into */
    uint64_t kept; /* of a repair that takes uses away, where there are more than can be counted */
};

struct check_snapshot {
    size_t at; /* in snapshot_bytes */
    size_t len;
    uint64_t l1_offset;
    uint32_t l1_size;
    bool bad;        /* its L1 table cannot be used */
    bool incomplete; /* version 3: it does not say the size of the disk */
};

/* An entry that the refcounts, as they were first read, contradict. */
struct check_suspect {
    uint64_t cluster;
    uint64_t entry;
    uint64_t l1_index; /* or CHECK_OF_L2 */
};

#define CHECK_OF_L2 UINT64_MAX

/* What a check of an image in use has beyond others. */
struct check_online {
    struct backend *backend; /* of the image's node: each read has its pass */
    struct edge *file;
    struct qcow2 *q;       /* NULL: the node is read only */
    struct co_mutex *lock; /* no table that is read changes under it; or NULL */
    bool settled;          /* refcounts are as they are in the end */
    struct check_suspect *suspects;
    size_t suspect_count;
    size_t suspect_max;
};

struct check {
    const struct qcow2_check_options *options;
    /* One of the two. */
    struct backend *backend;
    struct edge *edge;
    const struct request *by;
    const char *name;
    bool quiet;                  /* a round in between, which tells nobody */
    struct check_online *online; /* of an image in use; else NULL */

    struct qcow2_header h;
    uint64_t file_size;
    uint64_t cluster;  /* bytes */
    uint64_t clusters; /* of the file, a last piece of one included */
    unsigned l2_entry; /* bytes */

    struct qcow2_check_result r;
    struct qcow2_counts counts;
    uint64_t *table; /* the refcount table */
    uint64_t table_size;
    struct check_l2 *l2; /* by offset, once they are collected */
    size_t l2_count;
    size_t l2_max;
    struct check_snapshot *snapshots;
    uint32_t snapshot_count; /* those that could be read */
    uint8_t *snapshot_bytes;
    size_t snapshot_len; /* bytes that are there */
    size_t snapshot_max;

    /* What is wrong, for a repair. */
    bool bad_bitmaps;
    bool bad_snapshots;
    bool bad_refcounts; /* the structure itself */
    uint64_t low;       /* refcounts */
    uint64_t bad_entries;
    uint64_t bad_copied;
    uint64_t data_clashes; /* clusters that copies need of what lies where it cannot be shared */

    /* Of a repair: free clusters at the end of the file that are counted already. */
    uint64_t spare;
    uint64_t spare_count;
};

static inline uint64_t check_block_entries(const struct check *x)
{
    return (x->cluster * 8) >> x->h.refcount_order;
}

static inline uint64_t check_refcount_max(const struct check *x)
{
    unsigned bits = 1U << x->h.refcount_order;

    return bits == 64 ? UINT64_MAX : (UINT64_C(1) << bits) - 1;
}

static inline bool check_has_extended_l2(const struct check *x)
{
    return x->h.incompatible & QCOW2_INCOMPATIBLE_EXTENDED_L2;
}

static inline bool check_has_data_file(const struct check *x)
{
    return x->h.incompatible & QCOW2_INCOMPATIBLE_DATA_FILE;
}

/* Of standard clusters. */
static inline uint64_t check_l2_reserved(const struct check *x)
{
    return QCOW2_L2_RESERVED_MASK | (check_has_extended_l2(x) ? QCOW2_L2_ZERO : 0);
}

/* ---- qcow2-check.c ---- */

void check_say(struct check *x, const char *fmt, ...) PRINTF_LIKE(2, 3);
/* A corruption. */
void check_found(struct check *x, const char *fmt, ...) PRINTF_LIKE(2, 3);
int check_interrupted(const struct check *x);
/* Finds everything that `r` and what follows it says. */
int co_fn check_round(struct check *x, struct error **err);
void check_forget(struct check *x);

bool check_in_file(const struct check *x, uint64_t offset, uint64_t len);

enum check_reference { CHECK_NOT_THERE, CHECK_CLASH, CHECK_FINE };

/*
 * References to all clusters of a range; that it is not in the file is told. A clash: some of it is used for other metadata
 * already, or more often than a refcount can say.
 */
int check_refer_meta(struct check *x, uint64_t offset, uint64_t len, uint64_t times,
                     enum check_reference *ret);
int check_refer_data(struct check *x, uint64_t offset, uint64_t len, uint64_t times,
                     enum check_reference *ret);

/* The steps of a round. */
int co_fn check_read_header(struct check *x, struct error **err);
int co_fn check_load_table(struct check *x);
int co_fn check_load_blocks(struct check *x); /* what x->table points to */
int co_fn check_refer_early(struct check *x); /* all that comes before the refcount structure */
int check_refer_refcounts(struct check *x);
int check_compare(struct check *x);
/* Why it failed; an error is set. */
int check_failed(struct check *x, int r, struct error **err);

/* ---- qcow2-check-io.c: 0, or a negative errno ---- */

uint64_t check_file_size(const struct check *x);
/* The same as it was when the round began, unless the image is in use. */
uint64_t check_known_size(const struct check *x);
/* Beyond the end of the file there are zeroes. */
int co_fn check_read(struct check *x, uint64_t offset, struct iobuf *b, size_t len);
int co_fn check_read_flat(struct check *x, uint64_t offset, void *ret, size_t len);
int co_fn check_write(struct check *x, uint64_t offset, struct iobuf *b, size_t at, size_t len);
/* At most CHECK_PIECE. */
int co_fn check_write_flat(struct check *x, uint64_t offset, const void *bytes, size_t len);
int co_fn check_flush(struct check *x);
/* -ENOSPC where the file cannot become larger. */
int co_fn check_grow(struct check *x, uint64_t size);

/* ---- qcow2-check-tables.c ---- */

int co_fn check_snapshot_table(struct check *x);
int co_fn check_bitmaps(struct check *x);
int co_fn check_luks_header(struct check *x);

/* ---- qcow2-check-map.c ---- */

/* Collects the L2 tables of an L1 table. */
int co_fn check_l1(struct check *x, uint64_t offset, uint32_t size, bool active);
/* References to those that came since the last call. */
int check_refer_l2_tables(struct check *x);
/* Looks into all of them. */
int co_fn check_l2_tables(struct check *x);
/* Of a compressed cluster. */
void check_compressed_place(const struct check *x, uint64_t entry, uint64_t *ret_offset,
                            uint64_t *ret_len);
bool check_is_aligned(const struct check *x, uint64_t offset);
/* Where the tables begin that a check has found; NULL if it is none. */
const struct check_l2 *check_l2_find(const struct check *x, uint64_t offset);

/* The flag "copied" of an entry of the active tables against the refcount of where it points to. */
int check_copied(struct check *x, uint64_t l1_index, uint64_t entry, uint64_t cluster);

/* ---- qcow2-repair.c ---- */

uint64_t check_refcount_get(const struct check *x, const uint8_t *block, uint64_t i);
void check_refcount_set(const struct check *x, uint8_t *block, uint64_t i, uint64_t value);
/* Refcounts that are too low become right; `spare` clusters are set aside. Builds them anew where need is. */
int co_fn check_raise_refcounts(struct check *x, uint64_t spare, struct error **err);
/* After a round that has found no damage: all of them, with another width. */
int co_fn check_change_width(struct check *x, unsigned order, struct error **err);
/* The same in place, for uses that came since the round. */
int co_fn check_raise_again(struct check *x);
/* Refcounts that are too high become right, where they can be changed in place. */
int co_fn check_lower_refcounts(struct check *x, struct error **err);

/* ---- qcow2-repair-map.c ---- */

int co_fn check_mend_entries(struct check *x, struct error **err);
int co_fn check_mend_copied(struct check *x, struct error **err);
int co_fn check_drop_bitmaps(struct check *x, struct error **err);
/* How many clusters they need. */
uint64_t check_copies_need(const struct check *x);
/* Makes the copies in the spare clusters: data that lies where metadata is, and the snapshot table. */
int co_fn check_make_copies(struct check *x, struct error **err);
int co_fn check_clear_marks(struct check *x, struct error **err);

#endif
