/* SPDX-License-Identifier: Apache-2.0 */
/* copy-before-write: the filter that a backup puts above its source. */
#ifndef CAIRN_FILTERS_COPY_BEFORE_WRITE_H
#define CAIRN_FILTERS_COPY_BEFORE_WRITE_H

#include "graph/driver.h"

struct point;

/* What it is opened with: the point outlives the node. */
struct copy_before_write_options {
    struct point *point;
};

extern const struct driver copy_before_write_driver;

#endif
