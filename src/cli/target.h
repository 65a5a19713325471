/* SPDX-License-Identifier: Apache-2.0 */
/* New images, made by the tool. */
#ifndef CAIRN_CLI_TARGET_H
#define CAIRN_CLI_TARGET_H

#include "base/error.h"

#include <stdint.h>

/* A qcow2 image that must not exist yet, durable; `backing` is the name of its qcow2 backing file, or NULL. */
int target_create(const char *path, uint64_t size, const char *backing, struct error **err);

#endif
