/* SPDX-License-Identifier: Apache-2.0 */
/* Made by tools/schema.py from the schema's fragments: edit those. */
#ifndef CAIRN_GENERATED_PILE_OPTIONS_H
#define CAIRN_GENERATED_PILE_OPTIONS_H

#include "sample-shared.h"

/* The order of a pile. */
enum pile_order {
    /* Largest below. */
    PILE_ORDER_UP,
    /* Largest above. */
    PILE_ORDER_DOWN,
};

extern const struct schema_type pile_order_type;

static inline const char *pile_order_name(enum pile_order value)
{
    return pile_order_type.values[value];
}

/* The options of driver pile. */
struct pile_options {
    /* The stone below. */
    struct stone_ref file;
    /* How it is piled. */
    enum pile_order order;
};

extern const struct schema_type pile_options_type;

/* Frees what the value holds; for AUTO(). */
static inline void pile_options_release(struct pile_options *value)
{
    schema_free(&pile_options_type, value);
}

#endif
