/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A point in time of a disk in use (C5): what its content was when the gates were closed, for as long as somebody copies it
 * away. What a guest is about to overwrite is saved first, to memory and then to a scratch file, never to the target.
 *
 * POINT-1 `uncaught` has a bit for each block of 4 KiB that only the source holds. Bits are only ever cleared: by a guest's
 *         write when it has saved the block, by a reader when it has read it into memory. Whoever does so holds the block's
 *         range exclusively from looking at the bit until it is cleared; a write to blocks without a bit takes no lock.
 * POINT-2 The saved blocks are found by region; what the target has is forgotten.
 * POINT-3 Saving a guest's write is bounded in time, memory and scratch space. Beyond the bound the point breaks: nothing is
 *         saved any more, readers get an error, and the guest goes on (P3).
 * POINT-4 Who copies without the range looks at the bits afterwards, with the range: those that are still there have been there all
 *         the time, and no change of their blocks had gone out before.
 */
#ifndef CAIRN_COPY_POINT_H
#define CAIRN_COPY_POINT_H

#include "base/context.h"
#include "base/error.h"
#include "bitmaps/bitmap.h"
#include "copy/copy.h"
#include "graph/backend.h"
#include "graph/request.h"

#include <stdbool.h>
#include <stdint.h>

#define POINT_BLOCK ((uint64_t)4096)

enum point_policy {
    POINT_GUEST_FIRST,  /* at the latency bound the point breaks */
    POINT_BACKUP_FIRST, /* the guest waits for timeout_ns first */
};

struct point_options {
    uint64_t size;
    /*
     * What is saved goes to this backend, within the bounds, before the change goes out, for those who read the target
     * meanwhile; NULL: to memory and scratch. The filter owns it (G2), since changes of its node wait for guests then.
     */
    struct backend *through;
    enum point_policy policy;
    uint64_t latency_bound_ns;
    uint64_t timeout_ns;
    uint64_t ram_bytes;
    const char *scratch_dir; /* where the scratch file is made; NULL: none */
    uint64_t scratch_max_bytes;
    uint64_t close_ns; /* how long its close may take */
};

struct point;

/*
 * A point with nothing to catch. Makes the scratch file, which has no name any more when this returns. -ENOMEM, and what
 * making a file comes to.
 */
int co_fn control_fn point_co_new(struct point **ret, const struct point_options *o,
                                  struct error **err);
/* Nobody uses it any more. Returns NULL. */
struct point *co_fn point_co_free(struct point *p);

/* What is to be caught, for the owner to fill in behind closed gates. */
struct bitmap *point_uncaught(struct point *p);

/*
 * Before a change of the source goes out: saves what it would overwrite, reading through `source`, in the request's name. 0
 * when the change may go on, which is always, but for -ERESTART and -ECANCELED, to be handed up.
 */
int co_fn point_co_save(struct point *p, struct edge *source, struct request *req);

/* Gets a piece of the point, as copy_policy.co_pull; `source` leads to the same node. -ESTALE when the point is broken. */
int co_fn point_co_pull(struct point *p, struct backend *source, struct copy_piece *piece,
                        struct iobuf *buf);
/*
 * As a pull and a push together, for what only the source holds: the host copies it to the target, or a first part of it. The copy is
 * made first, without keeping guests from the range; it counts if the source has been the only one to hold the range until after it
 * (POINT-4). -EOPNOTSUPP where it does not count, and what the copy comes to: then a pull says what the point holds.
 */
int co_fn point_co_offload(struct point *p, struct backend *source, struct backend *target,
                           struct copy_piece *piece);
/* Nobody will ask for this range: it is not saved any more, and what was saved of it can go. Waits for saves under way. */
void co_fn point_co_leave_out(struct point *p, uint64_t offset, uint64_t len);
/* The target has this: what was saved of it can go. */
void point_release(struct point *p, uint64_t offset, uint64_t len);
/* A saved range that should leave memory or scratch soon: there is, when half of either is in use. */
bool point_urgent(struct point *p, uint64_t *ret_offset, uint64_t *ret_len);

/* 0, or why the point broke: a negative errno. Any thread. */
int point_broken(const struct point *p);
void point_break(struct point *p, int error);

#endif
