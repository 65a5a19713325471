/* SPDX-License-Identifier: Apache-2.0 */
/* What `info` says of a LUKS header: a volume's, or that of an encrypted qcow2 image. No key is needed. */
#ifndef CAIRN_CLI_IMAGE_INFO_LUKS_H
#define CAIRN_CLI_IMAGE_INFO_LUKS_H

#include "base/context.h"
#include "base/error.h"
#include "cli/image/image.h"

#include <jansson.h>

/* *ret: the members that the peer prints, or NULL where there is no such header. */
int co_fn control_fn info_luks_co_read(json_t **ret, struct graph *g,
                                       const struct image_layer *layer, struct error **err);
/* As people read them, each line after `indent`. */
void info_print_luks(const json_t *luks, const char *indent);

#endif
