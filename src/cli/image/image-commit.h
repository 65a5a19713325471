/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Committing: what the layers above a base hold goes into the base, and is durable there before the top is emptied; so whatever
 * happens in between, the disk shows what it showed.
 */
#ifndef CAIRN_CLI_IMAGE_IMAGE_COMMIT_H
#define CAIRN_CLI_IMAGE_IMAGE_COMMIT_H

#include "base/context.h"
#include "base/error.h"
#include "cli/image/extent-walk.h"
#include "cli/image/image.h"
#include "cli/image/tool.h"

#include <stdbool.h>
#include <stdint.h>

struct image_commit {
    /* Set by the caller. */
    struct image_spec spec; /* of the top, with IMAGE_WRITE and IMAGE_COMMIT */
    bool writethrough;
    bool keep;     /* the top is not emptied */
    bool progress; /* is shown */
    uint64_t rate; /* bytes per second; 0: no limit */

    /* Its own. */
    struct image image;
    struct extent_walk *layers; /* those above the base */
    struct backend *base;
};

/* 0, or a negative errno and *err, which says whether the disk is what it was. */
int co_fn control_fn image_co_commit(struct graph *g, struct image_commit *x, struct error **err);

#endif
