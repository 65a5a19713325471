/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Copying whole disks that nobody uses meanwhile, from sources one behind the other to a target. The sources' extents are walked as
 * the copy proceeds, so that the cost follows the data and no map is kept (P5); nothing is claimed from a bitmap as copy/ does, which
 * serves disks in use. A chunk is read once, however zeroes and data alternate in it.
 */
#ifndef CAIRN_CLI_IMAGE_IMAGE_COPY_H
#define CAIRN_CLI_IMAGE_IMAGE_COPY_H

#include "base/context.h"
#include "base/error.h"
#include "cli/image/extent-walk.h"
#include "cli/image/image.h"
#include "cli/image/tool.h"
#include "loop/lock.h"
#include "loop/loop.h"

#include <stdbool.h>
#include <stdint.h>

#define IMAGE_COPY_WORKERS_MAX 16
#define IMAGE_COPY_SPARSE_MAX  ((uint64_t)16 << 20)

struct image_copy_source {
    struct backend *backend;
    uint64_t from;  /* where in it the copy begins */
    uint64_t begin; /* of the target, where it goes */
    uint64_t size;
    bool is_full; /* nothing of it is a hole, so that nobody needs to ask */
};

struct image_copy {
    /* Set by the caller, then constant. */
    const struct image_copy_source *sources;
    size_t source_count;
    struct backend *target;
    const char *target_name;
    /*
     * What the target lies below: only what one of these holds is copied, the first one that does, and the one source says how large
     * all of it is. NULL: what the sources show.
     */
    struct extent_walk *layers;
    unsigned layer_count;
    uint64_t size;    /* what the sources have together, and the target at least */
    uint64_t sparse;  /* runs of zeroes from this length on are left out; 0: all is written */
    uint64_t unit;    /* what the target allocates at once, at least 512 */
    bool target_zero; /* it reads as zeroes already */
    bool
        only_own; /* what the first layer does not hold itself is left alone: the target has it by its backing file */
    bool in_order;     /* the target is written from its begin to its end */
    bool compress;     /* the target does, in whole units */
    bool salvage;      /* what cannot be read becomes zeroes */
    bool writethrough; /* each write is durable */
    unsigned workers;
    uint64_t rate;                  /* bytes per second; 0: no limit */
    struct tool_progress *progress; /* its `done` is atomic */
    struct loop *beside;            /* half of the workers run there; NULL: none does */

    /* Protected by `claim`. */
    size_t source; /* where the next piece comes from */
    uint64_t at;   /* in the target */
    struct extent_walk walk;
    uint64_t begun; /* pieces */

    struct co_mutex claim;
    struct tiny_lock lock; /* Protects the next two. */
    struct wait_queue turn;
    uint64_t ended; /* pieces */

    uint32_t offload;    /* atomic: data is copied by the host; until it says that it cannot */
    uint64_t started_ns; /* constant */
    uint64_t data_done;  /* atomic; for the rate */
    int result;          /* atomic; who sets it first sets `error`, too */
    struct error *error;
};

/* 0, or a negative errno and *err. */
int co_fn image_co_copy(struct image_copy *c, struct error **err);

#endif
