/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Options as command lines have them: `driver=qcow2,node-name=d0,file.filename=x,children.0=y`, or JSON.
 *
 *   - a key is names joined by '.'; a name is letters, digits, '-', '_'; all-digit names are places in a list, from 0
 *   - in a value `,,` stands for a comma; a key given twice keeps its last value
 *   - the first item may leave out its key where the option says which one is meant (`driver` of --blockdev)
 *   - text that starts with '{' is JSON, with the strict types of the control protocol
 */
#ifndef CAIRN_BASE_KEYVAL_H
#define CAIRN_BASE_KEYVAL_H

#include "base/error.h"
#include "base/json-in.h"

#include <jansson.h>

/* Reads either form into a tree, whose leaves are strings in the first, and says how json_in() must read it. */
int keyval_load(const char *text, const char *implied_key, json_t **ret_tree,
                enum json_in_mode *ret_mode, struct error **err);

/* keyval_load() and json_in() in one: an option's text becomes its struct. */
int keyval_in(const struct schema_type *type, const char *text, const char *implied_key,
              void *ret_value, struct error **err);

#endif
