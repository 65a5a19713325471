/* SPDX-License-Identifier: Apache-2.0 */
/* Mapping guest clusters before anybody writes to them: for users of images, past the graph's driver table. */
#ifndef CAIRN_FORMATS_QCOW2_PREALLOCATE_H
#define CAIRN_FORMATS_QCOW2_PREALLOCATE_H

#include "base/context.h"
#include "base/error.h"

#include <stdint.h>

struct backend;

/*
 * Bytes [from, to) of the disk, as far as they read as zeroes and have no clusters, get some, which read as zeroes. Durable when it
 * returns. -ENOTSUP for other formats; -ENOSPC and the like leave what was done.
 */
int co_fn qcow2_co_preallocate(struct backend *b, uint64_t from, uint64_t to, struct error **err);

#endif
