/* SPDX-License-Identifier: Apache-2.0 */
/* Bitmaps that images store, for the image tools. An image that is open for writing stores them when it is closed. */
#ifndef CAIRN_CLI_IMAGE_IMAGE_BITMAPS_H
#define CAIRN_CLI_IMAGE_IMAGE_BITMAPS_H

#include "base/context.h"
#include "base/error.h"
#include "cli/image/image.h"

#include <stdbool.h>
#include <stdint.h>

enum image_bitmap_action {
    IMAGE_BITMAP_ADD,
    IMAGE_BITMAP_REMOVE,
    IMAGE_BITMAP_CLEAR,
    IMAGE_BITMAP_ENABLE,
    IMAGE_BITMAP_DISABLE,
    IMAGE_BITMAP_MERGE,
};

struct image_bitmap_change {
    enum image_bitmap_action action;
    const char *name;
    uint64_t granularity;     /* add: 0: the default */
    const struct image *from; /* merge: which image has the source, and its name */
    const char *source;
};

int co_fn control_fn image_bitmap_co_change(struct image *image,
                                            const struct image_bitmap_change *change,
                                            struct error **err);

/*
 * Those of one image to another one of the same size, which has none of their names. `skip`: inconsistent ones are left out, with a warning;
 * else they are an error. The first does nothing but see whether that could be done.
 */
int control_fn image_bitmaps_check(const struct image *from, bool skip, struct error **err);
int co_fn control_fn image_bitmaps_co_copy(const struct image *from, struct image *to,
                                           struct error **err);

/* What they take in a new image, by its cluster size; inconsistent ones, too, as the peer counts. */
uint64_t control_fn image_bitmaps_size(const struct image *image, uint64_t cluster);

/* How many of an image's bitmaps are to be stored with what they have. */
size_t control_fn image_bitmaps_usable(const struct image *image);
/* After it was closed: has the image so many of them? -EIO if not; the log says why. */
int co_fn control_fn image_bitmaps_co_check_stored(struct graph *g, const struct image_spec *spec,
                                                   size_t usable, struct error **err);

#endif
