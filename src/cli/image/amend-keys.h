/* SPDX-License-Identifier: Apache-2.0 */
/* The options of amend that change key slots, of LUKS volumes and of encrypted qcow2 images. */
#ifndef CAIRN_CLI_IMAGE_AMEND_KEYS_H
#define CAIRN_CLI_IMAGE_AMEND_KEYS_H

#include "base/context.h"
#include "base/error.h"
#include "cli/image/image.h"

#include <jansson.h>
#include <stdbool.h>

/* Is it the name of such an option, without `encrypt.`? */
bool amend_keys_is_option(const char *name);
/* Lines for `-o help`. */
void amend_keys_help(const char *prefix);
/* Do they make sense? `keys` is an object of texts. */
int amend_keys_check(const json_t *keys, struct error **err);
/* Does it, with the secrets of the graph. The image is open for writing. */
int co_fn control_fn amend_keys_co(struct image *image, const json_t *keys, bool force,
                                   struct error **err);

#endif
