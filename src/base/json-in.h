/* SPDX-License-Identifier: Apache-2.0 */
/* JSON tree to C struct, by a schema type: the one place where input from clients is judged member by member. */
#ifndef CAIRN_BASE_JSON_IN_H
#define CAIRN_BASE_JSON_IN_H

#include "base/error.h"
#include "base/schema.h"

#include <jansson.h>

enum json_in_mode {
    JSON_IN_STRICT,
    /* The tree came from key=value options: leaves are strings and are read as what the member wants. */
    JSON_IN_COMMAND_LINE,
};

/*
 * Fills the `type->size` bytes at `ret_value` from the tree, all of it or nothing: on error they are zeroed. Frees nothing
 * there before; schema_free() frees the result.
 *
 * Errors name the path from `root` ("arguments"; may be empty), the value and the rule:
 * `arguments.read-delay: 90000 is more than 60000 (ms)`. Unknown and missing members are errors. Structs nest at most 64 deep.
 */
int json_in(const struct schema_type *type, const json_t *tree, enum json_in_mode mode,
            const char *root, void *ret_value, struct error **err);

#endif
