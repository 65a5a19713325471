/* SPDX-License-Identifier: Apache-2.0 */
/* What a disk is made of, asked piece by piece from begin to end, fetched in bulk. */
#ifndef CAIRN_CLI_IMAGE_EXTENT_WALK_H
#define CAIRN_CLI_IMAGE_EXTENT_WALK_H

#include "base/context.h"
#include "graph/backend.h"

/* All zeroes but for the backend. */
struct extent_walk {
    struct backend *backend;
    struct extent v[256];
    struct extents list;
    unsigned next; /* in `list` */
};

/*
 * The extent at `offset`, cut to what begins there and to `len`; what lies beyond the end is zeroes, and not allocated. Cheap where
 * offsets go up.
 */
int co_fn extent_walk_at(struct extent_walk *w, uint64_t offset, uint64_t len, struct extent *ret);

#endif
