/* SPDX-License-Identifier: Apache-2.0 */
/* Schema descriptors: the built-in types, and freeing any value by its type. */
#include "base/schema.h"

#include <jansson.h>
#include <stdlib.h>
#include <string.h>

const struct schema_type schema_bool = {.name = "bool", .kind = SCHEMA_BOOL, .size = sizeof(bool)};
const struct schema_type schema_int = {.name = "int", .kind = SCHEMA_INT, .size = sizeof(int64_t)};
const struct schema_type schema_uint = {
    .name = "uint", .kind = SCHEMA_UINT, .size = sizeof(uint64_t)};
const struct schema_type schema_size = {
    .name = "size", .kind = SCHEMA_SIZE, .size = sizeof(uint64_t)};
const struct schema_type schema_number = {
    .name = "number", .kind = SCHEMA_NUMBER, .size = sizeof(double)};
const struct schema_type schema_string = {
    .name = "string", .kind = SCHEMA_STRING, .size = sizeof(char *)};
const struct schema_type schema_null = {.name = "null", .kind = SCHEMA_NULL, .size = 0};
const struct schema_type schema_any = {.name = "any", .kind = SCHEMA_ANY, .size = sizeof(json_t *)};

/* Pointers in generated structs have many types; they are read and written as bytes. */
static void *pointer_at(const void *where)
{
    void *p;

    memcpy(&p, where, sizeof(p));
    return p;
}

static void free_members(const struct schema_type *type, char *object)
{
    for (size_t i = 0; i < type->count; i++) {
        const struct schema_member *m = &type->members[i];

        if (m->indirect) {
            void *value = pointer_at(object + m->offset);

            if (value)
                schema_free(m->type, value);
            free(value);
        } else {
            schema_free(m->type, object + m->offset);
        }
    }
}

static void free_struct(const struct schema_type *type, char *object)
{
    if (type->tag) {
        unsigned choice;
        const struct schema_variant *variant;

        memcpy(&choice, object + type->tag->offset, sizeof(choice));
        variant = &type->variants[choice];
        if (variant->type)
            free_members(variant->type, object + variant->offset);
    }
    free_members(type, object);
}

static void free_alternate(const struct schema_type *type, char *object)
{
    unsigned kind;
    const struct schema_member *m;

    memcpy(&kind, object, sizeof(kind));
    m = &type->members[kind];
    if (m->indirect) {
        void *value = pointer_at(object + m->offset);

        if (value)
            schema_free(m->type, value);
        free(value);
    } else {
        schema_free(m->type, object + m->offset);
    }
}

static void free_array(const struct schema_type *type, const void *value)
{
    struct schema_array array;

    memcpy(&array, value, sizeof(array));
    for (size_t i = 0; i < array.count; i++)
        schema_free(type->element, (char *)array.items + i * type->element->size);
    free(array.items);
}

void schema_free(const struct schema_type *type, void *value)
{
    switch (type->kind) {
    case SCHEMA_BOOL:
    case SCHEMA_INT:
    case SCHEMA_UINT:
    case SCHEMA_SIZE:
    case SCHEMA_NUMBER:
    case SCHEMA_NULL:
    case SCHEMA_ENUM:
        break;
    case SCHEMA_STRING:
        free(pointer_at(value));
        break;
    case SCHEMA_ANY:
        json_decref(pointer_at(value));
        break;
    case SCHEMA_STRUCT:
        free_struct(type, value);
        break;
    case SCHEMA_ARRAY:
        free_array(type, value);
        break;
    case SCHEMA_ALTERNATE:
        free_alternate(type, value);
        break;
    }
    memset(value, 0, type->size);
}

const void *schema_member_value(const struct schema_member *m, const void *object)
{
    const char *where = (const char *)object + m->offset;
    bool has;

    if (m->flag_offset != SCHEMA_NO_FLAG) {
        memcpy(&has, (const char *)object + m->flag_offset, sizeof(has));
        return has ? where : NULL;
    }
    if (m->indirect)
        return pointer_at(where);
    if (m->presence == SCHEMA_OPTIONAL &&
        (m->type->kind == SCHEMA_STRING || m->type->kind == SCHEMA_ANY))
        return pointer_at(where) ? where : NULL;
    return where;
}
