/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Descriptors of schema types: what tools/schema.py makes from the TOML fragments and json-in and json-out walk.
 *
 * How a type lies in C memory:
 *
 *   bool               bool
 *   int                int64_t
 *   u8..u64, size      uint64_t
 *   number             double
 *   string             char *, owned
 *   enum               enum <name>; the value is the index in `values`
 *   struct             struct <name>, in place
 *   union              struct <name>: common members, then a C union of the variants; the tag member chooses
 *   array              struct <element>_array { <element> *items; size_t count; }
 *   alternate          struct <name> { enum <name>_kind kind; union { ... }; }; structs in it are pointers
 *   any                json_t *, owned (a reference)
 *
 * A member that may be absent has `bool has_<name>` beside it, except where a NULL pointer says so: strings and any, and structs,
 * unions and alternates, which are pointers when optional. All-zero memory is a valid "nothing yet" of each type, so that
 * schema_free() accepts what a failed parse left behind.
 */
#ifndef CAIRN_BASE_SCHEMA_H
#define CAIRN_BASE_SCHEMA_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum schema_kind {
    SCHEMA_BOOL,
    SCHEMA_INT,
    SCHEMA_UINT,
    SCHEMA_SIZE, /* as SCHEMA_UINT; on a command line it takes suffixes */
    SCHEMA_NUMBER,
    SCHEMA_STRING,
    SCHEMA_NULL,
    SCHEMA_ANY,
    SCHEMA_ENUM,
    SCHEMA_STRUCT,
    SCHEMA_ARRAY,
    SCHEMA_ALTERNATE,
};

enum schema_presence {
    SCHEMA_MANDATORY,
    SCHEMA_OPTIONAL,
    SCHEMA_DEFAULT, /* absent in JSON means default_number or default_string */
};

/* What a value must keep besides its type. */
struct schema_limits {
    int64_t min;  /* int: lowest value */
    uint64_t max; /* int and uint: highest value; string: bytes; array: items */
    const char *unit;
    bool identifier; /* string: a letter, then letters, digits, '-', '.', '_' */
};

#define SCHEMA_NO_FLAG ((size_t)-1)

struct schema_member {
    const char *name;
    const struct schema_type *type;
    size_t offset;
    size_t flag_offset; /* of has_<name>, or SCHEMA_NO_FLAG */
    enum schema_presence presence;
    bool indirect; /* the C member points to the value */
    struct schema_limits limits;
    uint64_t default_number; /* bool, enum, and the bits of an integer */
    const char *default_string;
};

struct schema_variant {
    const struct schema_type *type; /* a struct, or NULL: nothing besides the common members */
    size_t offset;
};

/* A member or an enum value that others know and we do not take, with the reason. */
struct schema_refusal {
    const char *name;
    const char *why;
};

struct schema_type {
    const char *name;
    enum schema_kind kind;
    size_t size; /* of the value in C */

    /* enum: `count` names. struct: `count` members. alternate: `count` members; kind is the index. */
    size_t count;
    const char *const *values;
    const struct schema_member *members;

    /* struct: ends with an entry without name; enum: the same for values; may be NULL. */
    const struct schema_refusal *refusals;

    /* struct that is a union: the tag's member, and a variant for each of its values. NULL otherwise. */
    const struct schema_member *tag;
    const struct schema_variant *variants;

    const struct schema_type *element; /* array */
    struct schema_limits element_limits;
};

/* How every generated array lies in memory. */
struct schema_array {
    void *items;
    size_t count;
};

extern const struct schema_type schema_bool;
extern const struct schema_type schema_int;
extern const struct schema_type schema_uint;
extern const struct schema_type schema_size;
extern const struct schema_type schema_number;
extern const struct schema_type schema_string;
extern const struct schema_type schema_null;
extern const struct schema_type schema_any;

/* A node driver's place in the schema. */
enum schema_driver_kind {
    SCHEMA_DRIVER_PROTOCOL,
    SCHEMA_DRIVER_FORMAT,
    SCHEMA_DRIVER_FILTER,
};

struct schema_driver {
    const char *name;
    enum schema_driver_kind kind;
    const struct schema_type *options;
};

/* A command of the control protocol; its handler is known to control/ only. */
struct schema_command {
    const char *name;
    const struct schema_type *args; /* NULL: takes none */
    const struct schema_type *ret;  /* NULL: returns {} */
};

/* Frees what a value holds, half-built ones too, and zeroes it. The value's own memory stays the caller's. */
void schema_free(const struct schema_type *type, void *value);

/* Where a member's value lies within `object`; NULL when it is absent. */
const void *schema_member_value(const struct schema_member *m, const void *object);

#endif
