/* SPDX-License-Identifier: Apache-2.0 */
/* Made by tools/schema.py from the schema's fragments: edit those. */
#ifndef CAIRN_GENERATED_SAMPLE_TYPES_H
#define CAIRN_GENERATED_SAMPLE_TYPES_H

#include "sample-shared.h"
#include "pile-options.h"

/* A driver and its options. */
struct node {
    /* Which one. */
    enum node_driver driver;
    union {
        struct pile_options heap;
        struct pile_options pile;
    } u;
};

extern const struct schema_type node_type;

/* Frees what the value holds; for AUTO(). */
static inline void node_release(struct node *value)
{
    schema_free(&node_type, value);
}

/* A stone fell. */
json_t *event_stone_fell(const struct stone_fell_event *data);

/* It gets dark. */
json_t *event_night(void);

/* All commands, by name. */
extern const struct schema_command sample_commands[];
extern const size_t sample_command_count;

/* All drivers of nodes, in the order of enum node_driver. */
extern const struct schema_driver sample_drivers[];
extern const size_t sample_driver_count;

#endif
