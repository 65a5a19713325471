/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Dirty bitmaps: the named bitmaps of a node, which record what changes on its disk (P2). Control thread only, but for reading
 * the bits.
 *
 * DIRTY-1 All that requests could see changes behind closed gates, by an action of a change; several actions of one change
 *         happen at one instant, and each sees what the ones before it do (an `add` and then a `merge` into the new one).
 * DIRTY-2 Contents change in the persist step, in the order of the actions, and can be undone; names and who records change in
 *         the commit. All memory is taken before.
 * DIRTY-3 A bitmap that has an owner (a job, an export) is changed by nobody else.
 * DIRTY-4 What a disk had before it was cut and grown again is dirty: it has changed (P2). What it never had is clean.
 * DIRTY-5 While a node has bitmaps nobody else writes below it, in this process or, where locks tell, in another one (I5).
 * DIRTY-6 What an image says of a bitmap that it had in use when it was closed is not known to be all: such a bitmap is inconsistent, and
 *         can only be removed. Those of an image that is open for reading only stay what they are.
 */
#ifndef CAIRN_BITMAPS_DIRTY_BITMAP_H
#define CAIRN_BITMAPS_DIRTY_BITMAP_H

#include "base/context.h"
#include "base/error.h"
#include "bitmaps/bitmap.h"
#include "graph/change.h"
#include "graph/graph.h"
#include "graph/reshape.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define DIRTY_BITMAP_NAME_MAX         1023
#define DIRTY_BITMAP_GENERATION_BYTES 16

struct dirty_bitmap;
struct node_bitmaps;

/* Names of a node and of a bitmap that it has. */
struct dirty_bitmap_ref {
    const char *node;
    const char *name;
};

/* ---- actions ---- */

/*
 * Storage for one action: of who carries the change out, until change_end(), as are the strings. Each function below adds
 * the action to a change, and the nodes to what the change reserves: -ENOMEM. All else is checked in the prepare step.
 */
struct dirty_bitmap_action {
    struct change_action action;
    struct guard_action guard; /* add and remove */
    struct dirty_bitmap_ref ref;
    uint64_t granularity;
    bool enabled;
    const char *owner;
    const struct dirty_bitmap_ref *sources;
    size_t source_count;
    /* Set by the caller, after the function that adds it: */
    bool persistent;       /* add: it shall be stored in the node's image when that is closed */
    bool leaves_as_it_was; /* freeze: the job will not change it, so that it may be read-only */

    /* From prepare on. */
    struct dirty_bitmap *bitmap;
    struct dirty_bitmap **from;
    char *owner_copy;
    struct node_bitmaps *group; /* made in case the node has none, or left over */
    struct bitmap *spare; /* the content that the bitmap does not have: the next, or the last one */
};

/* Granularity 0: the default. -EEXIST, -EINVAL, -ENOMEM; if it shall be persistent, what the image has against it. */
int dirty_bitmap_action_add(struct change *c, struct dirty_bitmap_action *a,
                            struct dirty_bitmap_ref ref, uint64_t granularity, bool enabled,
                            struct error **err);
/*
 * These: -ENOENT, -EBUSY for a bitmap with an owner; -EROFS for a read-only one, but to enable it; -EINVAL for an inconsistent one, but
 * to remove it; clear and merge -ENOMEM.
 */
int dirty_bitmap_action_remove(struct change *c, struct dirty_bitmap_action *a,
                               struct dirty_bitmap_ref ref, struct error **err);
int dirty_bitmap_action_clear(struct change *c, struct dirty_bitmap_action *a,
                              struct dirty_bitmap_ref ref, struct error **err);
int dirty_bitmap_action_enable(struct change *c, struct dirty_bitmap_action *a,
                               struct dirty_bitmap_ref ref, bool enabled, struct error **err);
/* The sources may be none, on any node, of any granularity, and the target itself. -EINVAL for different sizes. */
int dirty_bitmap_action_merge(struct change *c, struct dirty_bitmap_action *a,
                              struct dirty_bitmap_ref ref, const struct dirty_bitmap_ref *sources,
                              size_t source_count, struct error **err);

/*
 * For a job that consumes a bitmap (I6). Freezing gives the bitmap an owner; from then on its content is constant, and what
 * changes on the disk is set in a successor, if the bitmap was enabled. Afterwards one of two: the bitmap has all of the old and the new content
 * (the job failed), or the new content (its success is durable). Both also take the owner away. Neither needs memory to
 * succeed: without, the bitmap reports more.
 */
int dirty_bitmap_action_freeze(struct change *c, struct dirty_bitmap_action *a,
                               struct dirty_bitmap_ref ref, const char *owner, struct error **err);
int dirty_bitmap_action_reclaim(struct change *c, struct dirty_bitmap_action *a,
                                struct dirty_bitmap_ref ref, struct error **err);
int dirty_bitmap_action_abdicate(struct change *c, struct dirty_bitmap_action *a,
                                 struct dirty_bitmap_ref ref, struct error **err);

/*
 * For the prepare steps of other actions: the bitmap, as it is after the actions before. `c` may be NULL: as it is now. -ENOENT;
 * -EBUSY if it has an owner or is being removed.
 */
int dirty_bitmap_need(const struct change *c, struct graph *graph, struct dirty_bitmap_ref ref,
                      struct dirty_bitmap **ret, struct error **err);

/* ---- for formats that store them (bitmaps/bitmap-store.h) ---- */

struct dirty_bitmap_loaded {
    const char *name; /* that no other one of the node has */
    bool enabled;
    bool inconsistent; /* nothing is known of its content */
    bool read_only;    /* as is its image */
};

/* In a format's co_open: a bitmap that its image has. Takes `bits`. -ENOMEM. */
int control_fn dirty_bitmap_load(struct node *node, const struct dirty_bitmap_loaded *how,
                                 struct bitmap *bits);
/* The persistent ones of a node, oldest first: the one after `d`, or the first; NULL: there are no more. */
struct dirty_bitmap *dirty_bitmap_next_persistent(const struct node *node,
                                                  const struct dirty_bitmap *d);
bool dirty_bitmap_inconsistent(const struct dirty_bitmap *d);
/* Nothing is in flight: with what a successor has (I6), whoever owns it. */
struct bitmap *dirty_bitmap_bits_to_store(struct dirty_bitmap *d);

/* ---- outside of changes ---- */

/* Gives it an owner, `owner` as messages name it, copied: then it stays, and only requests change its bits. As above. */
int co_fn control_fn dirty_bitmap_co_hold(struct graph *graph, struct dirty_bitmap_ref ref,
                                          const char *owner, struct dirty_bitmap **ret,
                                          struct error **err);
void control_fn dirty_bitmap_release(struct dirty_bitmap *d);

/* As dirty_bitmap_need(), also with an owner: to look at. Valid until the next yield. */
int control_fn dirty_bitmap_find(struct graph *graph, struct dirty_bitmap_ref ref,
                                 struct dirty_bitmap **ret, struct error **err);

/* The first node from this one down, through filters and backing nodes, that has a bitmap of this name; NULL: none. */
struct node *control_fn dirty_bitmap_find_below(struct node *node, const char *name);

const char *dirty_bitmap_name(const struct dirty_bitmap *d);
bool dirty_bitmap_enabled(const struct dirty_bitmap *d);
/* The content, without what a successor has. Constant while it has an owner, but not its bits. */
struct bitmap *dirty_bitmap_bits(const struct dirty_bitmap *d);

struct dirty_bitmap_picture {
    const char *name;
    uint64_t count_bytes;
    uint64_t granularity;
    bool recording;
    bool busy;
    bool persistent;
    bool inconsistent;
    /* New with each add, clear, enable and disable, and the successor's when a job has consumed it. */
    uint8_t generation[DIRTY_BITMAP_GENERATION_BYTES];
    bool has_successor; /* it is frozen by a job that consumes it */
    /* From the instant of freezing on, and new each time: the bitmap's generation if the job succeeds. */
    uint8_t successor_generation[DIRTY_BITMAP_GENERATION_BYTES];
};

/* The bitmaps of a node, oldest first; what a change that is not committed has made is not among them. */
typedef void dirty_bitmap_fn(const struct dirty_bitmap_picture *picture, void *arg);
void dirty_bitmap_for_each(const struct node *node, dirty_bitmap_fn *fn, void *arg);
unsigned dirty_bitmap_count(const struct node *node);

#endif
