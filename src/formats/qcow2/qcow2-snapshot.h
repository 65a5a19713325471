/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Internal snapshots of a qcow2 image that nobody else uses: made, applied, deleted. docs/formats/qcow2.md says in which order
 * they write (SNAP-1 to SNAP-6).
 */
#ifndef CAIRN_FORMATS_QCOW2_SNAPSHOT_H
#define CAIRN_FORMATS_QCOW2_SNAPSHOT_H

#include "base/context.h"
#include "base/error.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct backend;

/* Bytes; the peer reads no longer ones. */
#define QCOW2_SNAPSHOT_NAME_MAX 255

/* An entry of the snapshot table. */
struct qcow2_snapshot {
    size_t at;  /* in the table */
    size_t len; /* without the padding to a multiple of 8 */
    uint64_t l1_offset;
    uint32_t l1_size; /* entries */
    const char *id;   /* in the table, not ended by a NUL */
    size_t id_len;
    const char *name; /* as the ID */
    size_t name_len;
    uint32_t date_s; /* since 1970 */
    uint32_t date_ns;
    uint64_t vm_clock_ns;
    uint64_t vm_state_size;
    bool has_disk_size; /* what version 3 wants */
    uint64_t disk_size;
    bool has_icount;
    uint64_t icount;
};

/*
 * The entry at byte `at` of a table of which `len` bytes are there. -ERANGE: there are more to it, ret->len bytes or more in all;
 * -EINVAL: it makes no sense. The places of its L1 table are not looked at (P6).
 */
int qcow2_snapshot_parse(const uint8_t *table, size_t len, size_t at, struct qcow2_snapshot *ret);
/* Into ret, up to QCOW2_SNAPSHOT_EXTRA_V3 bytes longer: with this size of the disk if it has none. Its length. */
size_t qcow2_snapshot_complete(const uint8_t *table, const struct qcow2_snapshot *s,
                               uint64_t disk_size, uint8_t *ret);

struct qcow2;
struct request;

/* What is told of the snapshots that the header on disk points to, in order. 0, or a negative errno, which ends it. */
struct qcow2_snapshot_visitor {
    bool wants_l1; /* the entries of L1 tables */
    int (*table)(void *arg, uint64_t offset, uint64_t len, uint32_t count);
    /* `entries`, without flags, is NULL unless they are wanted. */
    int (*l1)(void *arg, uint64_t offset, const uint64_t *entries, uint32_t count);
    void *arg;
};

/* Nothing is told where there are none. 0, or a negative errno, *err may be set then. */
int co_fn qcow2_snapshot_visit(struct qcow2 *q, const struct request *by,
                               const struct qcow2_snapshot_visitor *v, struct error **err);

/* What a new snapshot is called, and when that was. */
struct qcow2_snapshot_new {
    const char *name;
    uint32_t date_s; /* since 1970 */
    uint32_t date_ns;
};

/*
 * On a backend of the qcow2 node that may write; no request is in flight. 0, or -ENOTSUP for another driver, -EROFS, -ENOENT,
 * -EFBIG for what the image has no room for, -EIO for damage. After an error the image has what it had, and leaks at most, but
 * where the message says otherwise.
 */
int co_fn qcow2_co_snapshot_create(struct backend *b, const struct qcow2_snapshot_new *how,
                                   struct error **err);
/*
 * The disk becomes what it was, its size as well. By ID, or, if none has this one, by name. *ret_vm_state: the snapshot has the state
 * of a machine, which is left alone.
 */
int co_fn control_fn qcow2_co_snapshot_apply(struct backend *b, const char *id_or_name,
                                             bool *ret_vm_state, struct error **err);
/*
 * The disk holds nothing of its own any more, as if it were new: what lies below shows through. Snapshots keep what they have. As
 * safe, and as fast, as applying one. As above.
 */
int co_fn qcow2_co_empty(struct backend *b, struct error **err);
/* The first one that has this name. */
int co_fn qcow2_co_snapshot_delete(struct backend *b, const char *name, struct error **err);

#endif
