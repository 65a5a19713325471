/* SPDX-License-Identifier: Apache-2.0 */
/*
 * key=value options. Items are put into a tree of objects one by one; when all are there, objects whose keys are all numbers
 * become lists.
 */
#include "base/keyval.h"

#include "base/alloc.h"
#include "base/json-text.h"

#include <ctype.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define NAME_MAX_BYTES 127
#define NEST_MAX       64
/* Lists that a command line needs are short; the number is checked before anything is sized by it. */
#define LIST_MAX 4096

static bool is_number(const char *name)
{
    for (; *name; name++)
        if (!isdigit((unsigned char)*name))
            return false;
    return true;
}

static bool is_name_char(char c)
{
    return isascii((unsigned char)c) && (isalnum((unsigned char)c) || c == '-' || c == '_');
}

/* Takes the next name off the key: copies it to `ret_name` and moves *key behind the dot, or to NULL after the last. */
static int next_name(const char **key, const char *whole, char ret_name[static NAME_MAX_BYTES + 1],
                     struct error **err)
{
    const char *p = *key;
    size_t len = 0;

    while (is_name_char(p[len]))
        len++;
    if (len == 0 || (p[len] && p[len] != '.'))
        return error_set(err, EINVAL, "key '%s' is not well-formed", whole);
    if (len > NAME_MAX_BYTES)
        return error_set(err, EINVAL, "key '%s' has a name of more than %d bytes", whole,
                         NAME_MAX_BYTES);
    memcpy(ret_name, p, len);
    ret_name[len] = '\0';
    *key = p[len] ? p + len + 1 : NULL;
    return 0;
}

static int out_of_memory(struct error **err)
{
    return error_set(err, ENOMEM, "not enough memory for the options");
}

/* Puts a leaf where its key says, making the objects on the way. */
static int store(json_t *tree, const char *key, const char *value, struct error **err)
{
    char name[NAME_MAX_BYTES + 1];
    const char *rest = key;
    unsigned depth = 0;

    for (;;) {
        json_t *child;
        int r = next_name(&rest, key, name, err);

        if (r < 0)
            return r;
        child = json_object_get(tree, name);
        if (!rest)
            break;
        if (++depth > NEST_MAX)
            return error_set(err, ELOOP, "key '%.64s...' is nested more than %d deep", key,
                             NEST_MAX);
        if (child && !json_is_object(child))
            return error_set(err, EINVAL, "key '%s' goes below one that has a value", key);
        if (!child) {
            child = json_object();
            if (json_object_set_new(tree, name, child) < 0)
                return out_of_memory(err);
        }
        tree = child;
    }
    if (json_is_object(json_object_get(tree, name)))
        return error_set(err, EINVAL, "key '%s' has a value and keys below it", key);
    /* File names need not be UTF-8. */
    return json_object_set_new(tree, name, json_string_nocheck(value)) < 0 ? out_of_memory(err) : 0;
}

/* The end of a value: a comma that is not doubled. Doubled ones are halved in place; the text is ours. */
static char *end_value(char *value)
{
    char *in = value;
    char *out = value;
    char *next = NULL;

    for (; *in; in++) {
        if (*in == ',' && in[1] != ',') {
            next = in + 1;
            break;
        }
        if (*in == ',')
            in++;
        *out++ = *in;
    }
    *out = '\0';
    return next;
}

static int read_items(char *text, const char *implied_key, json_t *tree, struct error **err)
{
    const char *implied = implied_key;

    while (text && *text) {
        size_t key_len = strcspn(text, "=,");
        const char *key = text;
        char *value = text + key_len;
        int r;

        if (*value == '=') {
            *value++ = '\0';
        } else if (implied) {
            key = implied;
            value = text;
        } else {
            text[key_len] = '\0';
            return error_set(err, EINVAL, "'%s' lacks a value: expected key=value", text);
        }
        text = end_value(value);
        r = store(tree, key, value, err);
        if (r < 0)
            return r;
        implied = NULL;
    }
    return 0;
}

/* How many keys of the object are numbers. */
static size_t count_numbers(json_t *object)
{
    size_t numbers = 0;
    const char *name;
    json_t *v;

    json_object_foreach(object, name, v) numbers += is_number(name);
    return numbers;
}

static int list_from_object(json_t *object, const char *name, json_t **ret_list, struct error **err)
{
    size_t count = json_object_size(object);
    json_t *list;

    if (count > LIST_MAX)
        return error_set(err, E2BIG, "list '%s' has more than %d elements", name, LIST_MAX);
    list = json_array();
    for (size_t i = 0; list && i < count; i++) {
        char index[24];
        json_t *v;

        snprintf(index, sizeof(index), "%zu", i);
        v = json_object_get(object, index);
        if (!v) {
            json_decref(list);
            return error_set(err, EINVAL, "list '%s' has %zu elements, but none at %zu", name,
                             count, i);
        }
        if (json_array_append(list, v) < 0) {
            json_decref(list);
            list = NULL;
        }
    }
    if (!list)
        return out_of_memory(err);
    *ret_list = list;
    return 0;
}

static int make_lists(json_t *object, struct error **err)
{
    const char *name;
    void *tmp;
    json_t *v;

    json_object_foreach_safe(object, tmp, name, v)
    {
        size_t numbers;
        json_t *list = NULL;
        int r;

        if (!json_is_object(v))
            continue;
        r = make_lists(v, err);
        if (r < 0)
            return r;
        numbers = count_numbers(v);
        if (numbers == 0)
            continue;
        if (numbers < json_object_size(v))
            return error_set(err, EINVAL, "'%s' mixes numbered and named keys", name);
        r = list_from_object(v, name, &list, err);
        if (r < 0)
            return r;
        if (json_object_set_new(object, name, list) < 0)
            return out_of_memory(err);
    }
    return 0;
}

static int load_items(const char *text, const char *implied_key, json_t **ret_tree,
                      struct error **err)
{
    AUTO(free_ptr) char *copy = xstrdup(text);
    json_t *tree = json_object();
    int r = tree ? read_items(copy, implied_key, tree, err) : out_of_memory(err);

    if (r == 0)
        r = make_lists(tree, err);
    if (r < 0) {
        json_decref(tree);
        return r;
    }
    *ret_tree = tree;
    return 0;
}

/* The nesting that json_text_load() asks its caller to bound; quotes are not minded: more is refused than must be. */
static bool nests_too_deep(const char *text)
{
    unsigned depth = 0;

    for (; *text; text++) {
        if (*text == '{' || *text == '[')
            depth++;
        else if ((*text == '}' || *text == ']') && depth > 0)
            depth--;
        if (depth > 2 * NEST_MAX)
            return true;
    }
    return false;
}

int keyval_load(const char *text, const char *implied_key, json_t **ret_tree,
                enum json_in_mode *ret_mode, struct error **err)
{
    if (text[0] != '{') {
        *ret_mode = JSON_IN_COMMAND_LINE;
        return load_items(text, implied_key, ret_tree, err);
    }
    if (nests_too_deep(text))
        return error_set(err, ELOOP, "JSON is nested more than %d deep", 2 * NEST_MAX);
    *ret_mode = JSON_IN_STRICT;
    return json_text_load(text, strlen(text), ret_tree, err);
}

int keyval_in(const struct schema_type *type, const char *text, const char *implied_key,
              void *ret_value, struct error **err)
{
    enum json_in_mode mode;
    json_t *tree;
    int r = keyval_load(text, implied_key, &tree, &mode, err);

    if (r < 0)
        return r;
    r = json_in(type, tree, mode, "", ret_value, err);
    json_decref(tree);
    return r;
}
