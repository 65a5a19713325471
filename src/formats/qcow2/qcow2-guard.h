/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Overlap protection: where the metadata of an open image lies, so that nothing else is written there. docs/formats/qcow2.md
 * ("Overlap protection") says what is looked at, and when.
 *
 * GUARD-1 Whoever writes looks first, in a time that depends neither on the disk's size nor on that of its tables.
 * GUARD-2 A table is known before anybody can find it, until nobody can.
 * GUARD-3 What looks takes no lock: it is inside the node's epoch, and what it reads is replaced, never changed but in single
 *         words.
 */
#ifndef CAIRN_FORMATS_QCOW2_GUARD_H
#define CAIRN_FORMATS_QCOW2_GUARD_H

#include "base/context.h"
#include "base/list.h"
#include "loop/lock.h"

#include <stdbool.h>
#include <stdint.h>

struct error;
struct qcow2;
struct qcow2_header;
struct qcow2_options;
struct request;

/* Kinds of metadata. Those that the option names, in its order. */
enum qcow2_guard_kind {
    QCOW2_GUARD_HEADER = 1 << 0,
    QCOW2_GUARD_ACTIVE_L1 = 1 << 1,
    QCOW2_GUARD_ACTIVE_L2 = 1 << 2,
    QCOW2_GUARD_REFCOUNT_TABLE = 1 << 3,
    QCOW2_GUARD_REFCOUNT_BLOCK = 1 << 4,
    QCOW2_GUARD_SNAPSHOT_TABLE = 1 << 5,
    QCOW2_GUARD_INACTIVE_L1 = 1 << 6,
    QCOW2_GUARD_INACTIVE_L2 = 1 << 7,
    QCOW2_GUARD_BITMAP_DIRECTORY = 1 << 8,
    QCOW2_GUARD_KINDS = (1 << 9) - 1,
};

/* Kinds of which there is one, in a row. */
enum qcow2_guard_single {
    QCOW2_SINGLE_ACTIVE_L1,
    QCOW2_SINGLE_REFCOUNT_TABLE,
    QCOW2_SINGLE_SNAPSHOT_TABLE,
    QCOW2_SINGLE_BITMAP_DIRECTORY,
    QCOW2_SINGLE_LUKS_HEADER,
    QCOW2_SINGLES,
};

struct qcow2_guard_table;
struct qcow2_guard_rows;

struct qcow2_guard {
    /* Set in open, then constant. */
    unsigned looks_for; /* enum qcow2_guard_kind: what writers look for */

    /* Atomic; 0: there is none. */
    uint64_t singles[QCOW2_SINGLES];
    /* Atomic; set under the lock below. */
    struct qcow2_guard_table *table; /* metadata of one cluster each; NULL: nothing is known */
    struct qcow2_guard_rows *rows;   /* L1 tables of snapshots; NULL: there are none */

    struct co_mutex lock; /* held for a moment: nothing is read or written under it */
    struct list retired;  /* Protected by lock: what may still be looked into */
};

/* Before there is anything; release is for that, too. */
void qcow2_guard_prepare(struct qcow2 *q);
/* The tables are in memory. The kinds that the options ask for. */
int co_fn qcow2_guard_init(struct qcow2 *q, const struct request *by,
                           const struct qcow2_header *header, const struct qcow2_options *opt,
                           struct error **err);
void qcow2_guard_release(struct qcow2 *q);
/* Snapshots have changed, nobody else is here. Without memory nothing is known afterwards. */
void co_fn qcow2_guard_rebuild(struct qcow2 *q, const struct request *by);

/* A cluster that becomes a table, or is none any more. -ENOMEM. */
int co_fn qcow2_guard_add(struct qcow2 *q, enum qcow2_guard_kind kind, uint64_t host_offset);
void co_fn qcow2_guard_remove(struct qcow2 *q, enum qcow2_guard_kind kind, uint64_t host_offset);
/* Bytes; none: there is no such table. */
void qcow2_guard_set_single(struct qcow2 *q, enum qcow2_guard_single single, uint64_t host_offset,
                            uint64_t bytes);

/*
 * Before a write of metadata of the kinds `own`, or of data, 0: -EIO if it would hit other metadata, and the image is marked
 * corrupt then. -ENOMEM.
 */
int co_fn qcow2_guard_write(struct qcow2 *q, const struct request *by, unsigned own,
                            uint64_t host_offset, uint64_t bytes);
/* The same before clusters are handed out, or given back to the host: for all that is known, whatever the options say. */
int co_fn qcow2_guard_free(struct qcow2 *q, const struct request *by, uint64_t first,
                           uint64_t count);
/* Is this cluster metadata? */
bool qcow2_guard_knows(struct qcow2 *q, uint64_t cluster);

#endif
