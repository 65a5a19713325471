/* SPDX-License-Identifier: Apache-2.0 */
/* What can be done with a node of the driver `luks` besides requests. */
#ifndef CAIRN_FORMATS_LUKS_DRIVER_H
#define CAIRN_FORMATS_LUKS_DRIVER_H

#include "base/context.h"
#include "base/error.h"
#include "crypto/luks.h"

struct backend;

/*
 * On a backend of the luks node that may write: changes its key slots. -ENOTSUP for another driver, and what luks_co_amend() says.
 */
int co_fn luks_node_co_amend(struct backend *b, const struct luks_amend *a, struct error **err);

#endif
