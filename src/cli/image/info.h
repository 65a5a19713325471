/* SPDX-License-Identifier: Apache-2.0 */
/* What of `cairn info` others print as well. */
#ifndef CAIRN_CLI_IMAGE_INFO_H
#define CAIRN_CLI_IMAGE_INFO_H

#include "cli/image/image.h"
#include "cli/image/info-tables.h"

/* `Format specific information` of a qcow2 layer, for people. */
void info_print_specific(const struct image_layer *l, const struct info_tables *t);

#endif
