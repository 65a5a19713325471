/* SPDX-License-Identifier: Apache-2.0 */
/* Checking an image of a format that is only read: does everything that it refers to lie in its files? */
#ifndef CAIRN_CLI_IMAGE_CHECK_IMPORTED_H
#define CAIRN_CLI_IMAGE_CHECK_IMPORTED_H

#include "base/context.h"
#include "base/error.h"
#include "cli/image/image.h"

/* Can images of this format be checked so? The peer's can. */
bool check_imported_is_for(const char *format);
/* How many units of allocation cannot be read for that reason. */
int co_fn control_fn check_imported_co(const struct image *image, uint64_t *ret_damaged,
                                       struct error **err);

#endif
