/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a format that stores dirty bitmaps in its images offers, by its driver's table. It makes those that an image has known in its
 * co_open (dirty_bitmap_load()), and stores those that are persistent in its co_close. In between the image needs to hear only of
 * what is asked of it below.
 */
#ifndef CAIRN_BITMAPS_BITMAP_STORE_H
#define CAIRN_BITMAPS_BITMAP_STORE_H

#include "base/context.h"
#include "base/error.h"

#include <stdint.h>

struct node;
struct pass;

/* A bitmap that shall be stored one day, and how many there would be then. */
struct bitmap_store_new {
    const char *name;
    uint64_t granularity;
    uint64_t count;      /* with this one */
    uint64_t name_bytes; /* of all names together */
};

/* Control thread, all. */
struct bitmap_store {
    /* Is there room for it in the image? -EROFS, -EOPNOTSUPP, -EFBIG, -ENOSPC. */
    int (*co_check_new)(struct node *node, const struct bitmap_store_new *new, struct error **err);
    /*
     * For a change that removes a bitmap. The persist step, behind closed gates: the image has it no more (D2); one that was never
     * stored is fine. Undo: it has it again, the one that went last. And when the change is done: its space is free; memory only.
     */
    int (*co_remove)(struct node *node, struct pass *pass, const char *name, struct error **err);
    int (*co_remove_undo)(struct node *node, struct pass *pass, const char *name);
    void (*removed)(struct node *node, const char *name);
};

#endif
