/* SPDX-License-Identifier: Apache-2.0 */
/* Made by tools/schema.py from the schema's fragments: edit those. */
#ifndef CAIRN_GENERATED_SAMPLE_SHARED_H
#define CAIRN_GENERATED_SAMPLE_SHARED_H

#include "base/schema.h"

#include <jansson.h>

struct amount;
struct colour_array;
struct flat_shape;
struct label;
struct node;
struct pile_options;
struct place;
struct qmp_capabilities_args;
struct report;
struct round_shape;
struct stone;
struct stone_array;
struct stone_fell_event;
struct stone_ref;
struct stone_weigh_args;
struct string_array;
struct uint_array;

/* The drivers of nodes. */
enum node_driver {
    /* As a pile. */
    NODE_DRIVER_HEAP,
    /* A pile of stones. */
    NODE_DRIVER_PILE,
};

extern const struct schema_type node_driver_type;

static inline const char *node_driver_name(enum node_driver value)
{
    return node_driver_type.values[value];
}

enum stone_ref_kind {
    STONE_REF_NAME,
    STONE_REF_DEFINITION,
    STONE_REF_GROUND,
    STONE_REF_DEPTH,
};

/* A stone by name or by definition; null is the ground. */
struct stone_ref {
    enum stone_ref_kind kind;
    union {
        /* Name of a stone. */
        char *name;
        /* A stone made for the occasion. */
        struct stone *definition;
        /* A hole of this depth. */
        uint64_t depth;
    };
};

extern const struct schema_type stone_ref_type;

/* Frees what the value holds; for AUTO(). */
static inline void stone_ref_release(struct stone_ref *value)
{
    schema_free(&stone_ref_type, value);
}

/* Colours of a stone. */
enum colour {
    /* Like iron. */
    COLOUR_RED,
    /* Like slate. */
    COLOUR_DARK_GREY,
};

extern const struct schema_type colour_type;

static inline const char *colour_name(enum colour value)
{
    return colour_type.values[value];
}

/* Shapes. */
enum shape {
    /* No edges. */
    SHAPE_ROUND,
    /* Two faces. */
    SHAPE_FLAT,
    /* A name that C does not like. */
    SHAPE_UNIX,
};

extern const struct schema_type shape_type;

static inline const char *shape_name(enum shape value)
{
    return shape_type.values[value];
}

/* Where a stone lies. */
struct place {
    /* East. */
    int64_t x;
    /* North. */
    int64_t y;
};

extern const struct schema_type place_type;

/* Frees what the value holds; for AUTO(). */
static inline void place_release(struct place *value)
{
    schema_free(&place_type, value);
}

/* A round one. */
struct round_shape {
    /* Half of its width. */
    uint64_t radius;
};

extern const struct schema_type round_shape_type;

/* Frees what the value holds; for AUTO(). */
static inline void round_shape_release(struct round_shape *value)
{
    schema_free(&round_shape_type, value);
}

struct colour_array {
    enum colour *items;
    size_t count;
};

extern const struct schema_type colour_array_type;

/* Frees what the value holds; for AUTO(). */
static inline void colour_array_release(struct colour_array *value)
{
    schema_free(&colour_array_type, value);
}

/* A flat one. */
struct flat_shape {
    /* What is written on it. */
    char *label;
    /* Its faces. */
    struct colour_array faces;
};

extern const struct schema_type flat_shape_type;

/* Frees what the value holds; for AUTO(). */
static inline void flat_shape_release(struct flat_shape *value)
{
    schema_free(&flat_shape_type, value);
}

struct stone_array {
    struct stone *items;
    size_t count;
};

extern const struct schema_type stone_array_type;

/* Frees what the value holds; for AUTO(). */
static inline void stone_array_release(struct stone_array *value)
{
    schema_free(&stone_array_type, value);
}

/* All that one can say. */
struct report {
    /* The stones. */
    struct stone_array stones;
    /* Sum of the weights. */
    uint64_t total;
    /* Mean weight. */
    bool has_mean;
    double mean;
    /* As it came. */
    json_t *note;
    /* A number that may be absent. */
    bool has_limit;
    int64_t limit;
};

extern const struct schema_type report_type;

/* Frees what the value holds; for AUTO(). */
static inline void report_release(struct report *value)
{
    schema_free(&report_type, value);
}

/* A label. */
struct label {
    /* What it says. */
    char *title;
    /* How much is there. */
    struct amount *amount;
    /* How much larger than life. */
    bool has_scale;
    double scale;
};

extern const struct schema_type label_type;

/* Frees what the value holds; for AUTO(). */
static inline void label_release(struct label *value)
{
    schema_free(&label_type, value);
}

struct string_array {
    char **items;
    size_t count;
};

extern const struct schema_type string_array_type;

/* Frees what the value holds; for AUTO(). */
static inline void string_array_release(struct string_array *value)
{
    schema_free(&string_array_type, value);
}

/* A stone; its shape chooses more members. */
struct stone {
    /* Its name. */
    char *name;
    /* Its shape. */
    enum shape shape;
    /* Bytes, for want of another unit. */
    uint64_t weight;
    /* Its colour. */
    enum colour colour;
    /* A flag that may be absent. */
    bool has_heavy;
    bool heavy;
    /* In place, with its defaults. */
    struct place place;
    /* Behind a pointer. */
    struct place *last_place;
    /* What it lies on. */
    struct stone_ref *on;
    /* Words. */
    struct string_array tags;
    union {
        struct round_shape round;
        struct flat_shape flat;
    } u;
};

extern const struct schema_type stone_type;

/* Frees what the value holds; for AUTO(). */
static inline void stone_release(struct stone *value)
{
    schema_free(&stone_type, value);
}

struct uint_array {
    uint64_t *items;
    size_t count;
};

extern const struct schema_type uint_array_type;

/* Frees what the value holds; for AUTO(). */
static inline void uint_array_release(struct uint_array *value)
{
    schema_free(&uint_array_type, value);
}

enum amount_kind {
    AMOUNT_EXACT,
    AMOUNT_SOME,
    AMOUNT_EACH,
};

/* How much, in whatever form. */
struct amount {
    enum amount_kind kind;
    union {
        /* A number. */
        double exact;
        /* Some, or none. */
        bool some;
        /* Of each. */
        struct uint_array each;
    };
};

extern const struct schema_type amount_type;

/* Frees what the value holds; for AUTO(). */
static inline void amount_release(struct amount *value)
{
    schema_free(&amount_type, value);
}

/* The arguments of stone-weigh. */
struct stone_weigh_args {
    /* Which one. */
    char *name;
    /* How often. */
    uint64_t times;
};

extern const struct schema_type stone_weigh_args_type;

/* Frees what the value holds; for AUTO(). */
static inline void stone_weigh_args_release(struct stone_weigh_args *value)
{
    schema_free(&stone_weigh_args_type, value);
}

/* The arguments of qmp_capabilities. */
struct qmp_capabilities_args {
    /* Capabilities. */
    struct string_array enable;
};

extern const struct schema_type qmp_capabilities_args_type;

/* Frees what the value holds; for AUTO(). */
static inline void qmp_capabilities_args_release(struct qmp_capabilities_args *value)
{
    schema_free(&qmp_capabilities_args_type, value);
}

/* The data of STONE_FELL. */
struct stone_fell_event {
    /* Which one. */
    char *name;
    /* How deep. */
    uint64_t height;
};

extern const struct schema_type stone_fell_event_type;

/* Frees what the value holds; for AUTO(). */
static inline void stone_fell_event_release(struct stone_fell_event *value)
{
    schema_free(&stone_fell_event_type, value);
}

#endif
