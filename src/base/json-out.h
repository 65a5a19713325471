/* SPDX-License-Identifier: Apache-2.0 */
/* C struct to JSON tree, by a schema type: return values and the data of events. */
#ifndef CAIRN_BASE_JSON_OUT_H
#define CAIRN_BASE_JSON_OUT_H

#include "base/schema.h"

#include <jansson.h>

/* The value as a new tree; NULL when memory runs out. Mandatory strings must be set. */
json_t *json_out(const struct schema_type *type, const void *value);

#endif
