/* SPDX-License-Identifier: Apache-2.0 */
/* The writer over trees: the mirror image of json-in.c, over values of our own, so that nothing here is judged. */
#include "base/json-out.h"

#include "base/json-text.h"

#include <assert.h>
#include <string.h>

/* The alternate's and the indirect members' values are found through pointers of many types. */
static const void *target_of(const struct schema_member *m, const char *object)
{
    const void *value;

    if (!m->indirect)
        return object + m->offset;
    memcpy(&value, object + m->offset, sizeof(value));
    return value;
}

static int out_members(const struct schema_type *type, const char *object, json_t *tree)
{
    for (size_t i = 0; i < type->count; i++) {
        const struct schema_member *m = &type->members[i];
        const void *value = schema_member_value(m, object);

        if (!value) {
            assert(m->presence == SCHEMA_OPTIONAL);
            continue;
        }
        if (json_object_set_new(tree, m->name, json_out(m->type, value)) < 0)
            return -1;
    }
    return 0;
}

static json_t *out_struct(const struct schema_type *type, const char *object)
{
    json_t *tree = json_object();
    int r = tree ? out_members(type, object, tree) : -1;

    if (r == 0 && type->tag) {
        unsigned choice;
        const struct schema_variant *variant;

        memcpy(&choice, object + type->tag->offset, sizeof(choice));
        assert(choice < type->tag->type->count);
        variant = &type->variants[choice];
        if (variant->type)
            r = out_members(variant->type, object + variant->offset, tree);
    }
    if (r < 0) {
        json_decref(tree);
        return NULL;
    }
    return tree;
}

static json_t *out_array(const struct schema_type *type, const void *value)
{
    struct schema_array array;
    json_t *tree = json_array();

    memcpy(&array, value, sizeof(array));
    for (size_t i = 0; tree && i < array.count; i++) {
        const char *item = (const char *)array.items + i * type->element->size;

        if (json_array_append_new(tree, json_out(type->element, item)) < 0) {
            json_decref(tree);
            tree = NULL;
        }
    }
    return tree;
}

static json_t *out_alternate(const struct schema_type *type, const char *object)
{
    unsigned kind;

    memcpy(&kind, object, sizeof(kind));
    assert(kind < type->count);
    return json_out(type->members[kind].type, target_of(&type->members[kind], object));
}

static json_t *out_string(const void *value)
{
    const char *text;

    memcpy(&text, value, sizeof(text));
    assert(text);
    return json_string_lossy(text);
}

json_t *json_out(const struct schema_type *type, const void *value)
{
    bool flag;
    int64_t integer;
    uint64_t size;
    double number;
    unsigned choice;
    json_t *held;

    switch (type->kind) {
    case SCHEMA_BOOL:
        memcpy(&flag, value, sizeof(flag));
        return json_boolean(flag);
    case SCHEMA_INT:
        memcpy(&integer, value, sizeof(integer));
        return json_integer(integer);
    case SCHEMA_UINT:
    case SCHEMA_SIZE:
        memcpy(&size, value, sizeof(size));
        return json_from_uint(size);
    case SCHEMA_NUMBER:
        memcpy(&number, value, sizeof(number));
        return json_real(number);
    case SCHEMA_STRING:
        return out_string(value);
    case SCHEMA_NULL:
        return json_null();
    case SCHEMA_ANY:
        memcpy(&held, value, sizeof(json_t *));
        return json_incref(held);
    case SCHEMA_ENUM:
        memcpy(&choice, value, sizeof(choice));
        assert(choice < type->count);
        return json_string(type->values[choice]);
    case SCHEMA_STRUCT:
        return out_struct(type, value);
    case SCHEMA_ARRAY:
        return out_array(type, value);
    case SCHEMA_ALTERNATE:
        return out_alternate(type, value);
    }
    return NULL;
}
