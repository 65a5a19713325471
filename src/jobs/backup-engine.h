/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a backup does, apart from being a job: it puts a copy-before-write filter above its source and catches the point in one
 * change (which may hold several backups and bitmap actions: one instant for all), copies the point to the target on a copy
 * loop, and takes the filter out again.
 *
 *   backup_co_new, backup_add_actions, change_co_run; backup_co_run on a copy loop; backup_co_end; backup_co_free
 */
#ifndef CAIRN_JOBS_BACKUP_ENGINE_H
#define CAIRN_JOBS_BACKUP_ENGINE_H

#include "base/context.h"
#include "base/error.h"
#include "bitmaps/bitmap.h"
#include "copy/copy.h"
#include "copy/point.h"
#include "graph/change.h"
#include "graph/graph.h"

#include <stdbool.h>
#include <stdint.h>

/* The unit of a backup's work; saved blocks are kept by regions of this size. */
#define BACKUP_CLUSTER ((uint64_t)64 << 10)

/* BACKUP_NONE: only what is about to be overwritten, to the target itself, until it is cancelled. */
enum backup_sync { BACKUP_FULL, BACKUP_TOP, BACKUP_BITMAP, BACKUP_NONE };

struct backup_options {
    const char *owner; /* as messages name it: "job 'b0'" */
    const char *source;
    const char *target;
    const char *filter_name; /* NULL: a made-up one */
    enum backup_sync sync;
    struct point_options point; /* the size is filled in */
    bool keeps_partial; /* what was copied counts after a failure, too: it is made durable then */
    bool compress;
    bool offload; /* the host copies what it can, without our seeing it */
    unsigned workers;
    uint64_t chunk;
    uint64_t speed;
    const struct copy_policy *policy; /* co_pause_point, worker and on_error are used */
    void *policy_arg;
};

struct backup;

/* -EINVAL if sizes differ, source and target are one, and what the graph says. Strings are copied. */
int co_fn control_fn backup_co_new(struct backup **ret, struct graph *g,
                                   const struct backup_options *o, struct error **err);
/* The source becomes a root of the change. */
int backup_add_actions(struct backup *b, struct change *c, struct error **err);
/* BACKUP_BITMAP: in a prepare step of the change; what it holds at the instant is copied. It stays until the change is done. */
void backup_set_bitmap(struct backup *b, const struct bitmap *bitmap);
/* On a copy loop. 0: the target has the point. */
int co_fn backup_co_run(struct backup *b);
/* Takes the filter out; `more` may add actions to the same change, or be NULL. On failure the filter stays in place. */
int co_fn control_fn backup_co_end(struct backup *b,
                                   int (*more)(struct change *c, void *arg, struct error **err),
                                   void *arg, struct error **err);
/* The filter is out, or never was in. Returns NULL. */
struct backup *co_fn control_fn backup_co_free(struct backup *b);

void backup_set_speed(struct backup *b, uint64_t bytes_per_second);
/* Bytes that are copied, and that are to be copied in all. Any thread. */
void backup_progress(const struct backup *b, uint64_t *ret_done, uint64_t *ret_total);
/* Whether all that was copied is on the target's disk (C3): after success, and after a failure if that could still be reached. */
bool backup_is_durable(const struct backup *b);
/* What was not copied, after backup_co_run() failed; and what errors that are ignored have left out. */
const struct bitmap *backup_uncopied(const struct backup *b);
const struct bitmap *backup_skipped(const struct backup *b);
/* The point is not needed any more: guests are free of it from now on. */
void backup_give_up(struct backup *b);
/* 0, or why the point is lost. */
int backup_point_error(const struct backup *b);
const char *backup_filter_name(const struct backup *b);

#endif
