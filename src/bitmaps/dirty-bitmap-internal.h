/* SPDX-License-Identifier: Apache-2.0 */
/* What the actions on dirty bitmaps share with the bitmaps of a node. */
#ifndef CAIRN_BITMAPS_DIRTY_BITMAP_INTERNAL_H
#define CAIRN_BITMAPS_DIRTY_BITMAP_INTERNAL_H

#include "base/list.h"
#include "bitmaps/dirty-bitmap.h"
#include "graph/tracker.h"

struct dirty_bitmap {
    struct list link; /* in group->bitmaps */
    char *name;
    struct bitmap *bits;
    struct bitmap *successor; /* while a job has it frozen */
    char *owner;              /* DIRTY-3; NULL: none */
    bool enabled;
    bool persistent;   /* its node's image stores it when it is closed */
    bool inconsistent; /* DIRTY-6, as the next one */
    bool read_only;
    uint64_t high_water; /* DIRTY-4: the largest size since it was clear */
    uint8_t generation[DIRTY_BITMAP_GENERATION_BYTES];
    uint8_t successor_generation[DIRTY_BITMAP_GENERATION_BYTES]; /* while there is a successor */

    /* Read by requests. */
    struct bitmap *live; /* where changes are set */
    struct dirty_bitmap *next_recording;
};

struct node_bitmaps {
    struct tracker tracker;
    struct list bitmaps; /* struct dirty_bitmap, oldest first */
    struct dirty_bitmap *recording;
};

/* With all that it has; takes NULL. Returns NULL. */
struct dirty_bitmap *dirty_bitmap_free(struct dirty_bitmap *d);
void dirty_bitmap_new_generation(struct dirty_bitmap *d);

/* Without bitmaps, and on no node. NULL: no memory. */
struct node_bitmaps *node_bitmaps_new(void);
/* NULL: the node has no bitmaps. */
struct node_bitmaps *node_bitmaps_of(const struct node *node);
/* NULL: it has none of this name. */
struct dirty_bitmap *node_bitmaps_find(const struct node *node, const char *name);
/* The same by the node's name: -ENOENT. */
int node_bitmaps_need(struct graph *graph, const struct dirty_bitmap_ref *ref,
                      struct dirty_bitmap **ret, struct error **err);
/* Behind closed gates: who records where, anew. */
void node_bitmaps_update(struct node_bitmaps *group);

#endif
