/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Children that may be declined: what an optional member of type `node-ref-or-null` says in a driver's options.
 *
 * Its pointer is NULL: nothing is said, so that the driver does what it does by default. node_ref_is_null(): there shall be
 * no such child. Otherwise the core has made the child before the driver opens, under the member's name.
 */
#ifndef CAIRN_GRAPH_NODE_REF_H
#define CAIRN_GRAPH_NODE_REF_H

#include "schema-shared.h"

#include <stdbool.h>

/* An empty name means null: on a command line there is no other way to say it. */
static inline bool node_ref_is_null(const struct node_ref_or_null *ref)
{
    return ref->kind == NODE_REF_OR_NULL_NULL ||
           (ref->kind == NODE_REF_OR_NULL_NAME && !*ref->name);
}

#endif
