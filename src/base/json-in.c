/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The parser over trees. Each function fills one kind of value and leaves what it has filled when it fails: json_in() frees
 * the whole, as any prefix of a value can be freed.
 */
#include "base/json-in.h"

#include "base/alloc.h"
#include "base/json-text.h"
#include "base/number.h"

#include <assert.h>
#include <ctype.h>
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* What is quoted from the input in a message is cut to this many bytes. */
#define QUOTE_MAX 64

#define NEST_MAX 64

/* Where in the tree we are; lives on the stack of who goes down. */
struct place {
    const struct place *up;
    const char *name; /* NULL: an element of an array */
    size_t index;
    unsigned depth; /* structs above */
};

struct reader {
    enum json_in_mode mode;
    struct error **err;
};

static int in_value(const struct reader *rd, const struct schema_type *type,
                    const struct schema_limits *limits, const json_t *v, const struct place *at,
                    void *ret);

/* Writes "a.b[2].c" for a place; returns what does not fit as snprintf() does. */
static size_t place_text(const struct place *at, char *buf, size_t size)
{
    size_t used = 0;
    int n;

    if (at->up)
        used = place_text(at->up, buf, size);
    if (used >= size)
        return used;
    if (at->name)
        n = snprintf(buf + used, size - used, "%s%.*s", used ? "." : "", QUOTE_MAX, at->name);
    else
        n = snprintf(buf + used, size - used, "[%zu]", at->index);
    return used + (size_t)n;
}

/* Puts the path before the message that *rd->err holds. */
static int fail(const struct reader *rd, const struct place *at, int r)
{
    char path[1024] = "";

    (void)place_text(at, path, sizeof(path)); /* a longer path is cut */
    return path[0] ? error_wrap(rd->err, r, "%s", path) : r;
}

static const char *type_name(const json_t *v)
{
    if (json_big_integer(v))
        return "an integer";
    switch (json_typeof(v)) {
    case JSON_OBJECT:
        return "an object";
    case JSON_ARRAY:
        return "an array";
    case JSON_STRING:
        return "a string";
    case JSON_INTEGER:
        return "an integer";
    case JSON_REAL:
        return "a number";
    case JSON_TRUE:
    case JSON_FALSE:
        return "a boolean";
    case JSON_NULL:
        return "null";
    }
    return "an unknown type";
}

static int fail_type(const struct reader *rd, const struct place *at, const char *wanted,
                     const json_t *v)
{
    return fail(rd, at, error_set(rd->err, EINVAL, "expects %s, not %s", wanted, type_name(v)));
}

/* A string leaf of the command line: the text, or NULL where the strict rules hold. */
static const char *option_text(const struct reader *rd, const json_t *v)
{
    return rd->mode == JSON_IN_COMMAND_LINE && !json_big_integer(v) ? json_string_value(v) : NULL;
}

/* Copies text for a message: cut, and without control characters that would break the line. */
static const char *quoted(const char *text, char buf[static QUOTE_MAX + 4])
{
    size_t n = 0;

    for (; text[n] && n < QUOTE_MAX; n++)
        buf[n] = (char)(iscntrl((unsigned char)text[n]) ? '?' : text[n]);
    (void)stpcpy(buf + n, text[n] ? "..." : "");
    return buf;
}

static int in_bool(const struct reader *rd, const json_t *v, const struct place *at, void *ret)
{
    static const char *const words[] = {"off", "on", "false", "true", "no", "yes"};
    const char *text = option_text(rd, v);
    char quote[QUOTE_MAX + 4];
    bool value = json_is_true(v);

    if (text) {
        for (size_t i = 0; i < ARRAY_SIZE(words); i++) {
            if (strcmp(text, words[i]) == 0) {
                value = i % 2;
                memcpy(ret, &value, sizeof(value));
                return 0;
            }
        }
        return fail(
            rd, at,
            error_set(rd->err, EINVAL, "'%s' is neither 'on' nor 'off'", quoted(text, quote)));
    }
    if (!json_is_boolean(v))
        return fail_type(rd, at, "a boolean", v);
    memcpy(ret, &value, sizeof(value));
    return 0;
}

static int fail_limit(const struct reader *rd, const struct place *at, const char *value,
                      const char *relation, const char *limit, const char *unit)
{
    char quote[QUOTE_MAX + 4];

    if (unit)
        error_set(rd->err, ERANGE, "%s is %s than %s (%s)", quoted(value, quote), relation, limit,
                  unit);
    else
        error_set(rd->err, ERANGE, "%s is %s than %s", quoted(value, quote), relation, limit);
    return fail(rd, at, -ERANGE);
}

/* The text of an integer in any of its forms, for messages; `buf` serves if it must be made. */
static const char *integer_text(const json_t *v, char buf[static 32])
{
    const char *big = json_big_integer(v);

    if (big)
        return big;
    if (json_is_string(v))
        return json_string_value(v);
    snprintf(buf, 32, "%lld", (long long)json_integer_value(v));
    return buf;
}

static int fail_number_text(const struct reader *rd, const struct place *at, const char *text,
                            const char *what)
{
    char quote[QUOTE_MAX + 4];

    return fail(rd, at, error_set(rd->err, EINVAL, "'%s' is not %s", quoted(text, quote), what));
}

static int in_uint(const struct reader *rd, bool is_size, const struct schema_limits *limits,
                   const json_t *v, const struct place *at, void *ret)
{
    const char *text = option_text(rd, v);
    const char *big = json_big_integer(v);
    char made[32];
    char limit[32];
    uint64_t value = 0;
    int r = 0;

    if (!text && !big && !json_is_integer(v))
        return fail_type(rd, at, "an integer", v);
    if (text || big) {
        const char *digits = text ? text : big;

        if (digits[0] == '-' && number_from_text(digits + 1, &value) != -EINVAL)
            return fail_limit(rd, at, digits, "less", "0", limits->unit);
        r = is_size && text ? size_from_text(digits, &value) : number_from_text(digits, &value);
        if (r == -EINVAL)
            return fail_number_text(rd, at, digits,
                                    is_size ? "a size in bytes (k, M, G, T, P, E may follow)"
                                            : "an integer");
    } else {
        if (json_integer_value(v) < 0)
            return fail_limit(rd, at, integer_text(v, made), "less", "0", limits->unit);
        value = (uint64_t)json_integer_value(v);
    }
    if (r == -ERANGE || value > limits->max) {
        snprintf(limit, sizeof(limit), "%llu", (unsigned long long)limits->max);
        return fail_limit(rd, at, integer_text(v, made), "more", limit, limits->unit);
    }
    if (limits->min > 0 && value < (uint64_t)limits->min) {
        snprintf(limit, sizeof(limit), "%lld", (long long)limits->min);
        return fail_limit(rd, at, integer_text(v, made), "less", limit, limits->unit);
    }
    memcpy(ret, &value, sizeof(value));
    return 0;
}

static int in_int(const struct reader *rd, const struct schema_limits *limits, const json_t *v,
                  const struct place *at, void *ret)
{
    const char *text = option_text(rd, v);
    const char *big = json_big_integer(v);
    char made[32];
    char limit[32];
    int64_t value = json_integer_value(v);
    int r = 0;

    if (!text && !big && !json_is_integer(v))
        return fail_type(rd, at, "an integer", v);
    if (text || big)
        r = number_from_text_signed(text ? text : big, &value);
    if (r == -EINVAL)
        return fail_number_text(rd, at, text ? text : big, "an integer");
    if (r == -ERANGE)
        value = (text ? text : big)[0] == '-' ? INT64_MIN : INT64_MAX;
    if (value < limits->min || (r == -ERANGE && value < 0)) {
        snprintf(limit, sizeof(limit), "%lld", (long long)limits->min);
        return fail_limit(rd, at, integer_text(v, made), "less", limit, limits->unit);
    }
    if (r == -ERANGE || (value > 0 && (uint64_t)value > limits->max)) {
        snprintf(limit, sizeof(limit), "%llu", (unsigned long long)limits->max);
        return fail_limit(rd, at, integer_text(v, made), "more", limit, limits->unit);
    }
    memcpy(ret, &value, sizeof(value));
    return 0;
}

static int in_number(const struct reader *rd, const json_t *v, const struct place *at, void *ret)
{
    const char *text = option_text(rd, v);
    double value = json_number_value(v);

    if (text) {
        char *end;

        value = strtod(text, &end);
        if (end == text || *end || !isfinite(value))
            return fail_number_text(rd, at, text, "a number");
    } else if (json_big_integer(v)) {
        value = strtod(json_big_integer(v), NULL);
        if (!isfinite(value))
            return fail_number_text(rd, at, json_big_integer(v), "a number in range");
    } else if (!json_is_number(v)) {
        return fail_type(rd, at, "a number", v);
    }
    memcpy(ret, &value, sizeof(value));
    return 0;
}

static bool is_identifier(const char *text)
{
    if (!isascii((unsigned char)text[0]) || !isalpha((unsigned char)text[0]))
        return false;
    for (; *text; text++)
        if (!isascii((unsigned char)*text) ||
            (!isalnum((unsigned char)*text) && !strchr("-._", *text)))
            return false;
    return true;
}

static int in_string(const struct reader *rd, const struct schema_limits *limits, const json_t *v,
                     const struct place *at, void *ret)
{
    const char *text = json_string_value(v);
    size_t len = json_string_length(v);
    char quote[QUOTE_MAX + 4];
    char *copy;

    if (!text || json_big_integer(v))
        return fail_type(rd, at, "a string", v);
    if (len > limits->max)
        return fail(rd, at,
                    error_set(rd->err, ENAMETOOLONG, "'%s' has %zu bytes, more than %llu",
                              quoted(text, quote), len, (unsigned long long)limits->max));
    if (limits->min > 0 && len < (uint64_t)limits->min)
        return fail(rd, at,
                    error_set(rd->err, EINVAL, "'%s' has %zu bytes, less than %lld",
                              quoted(text, quote), len, (long long)limits->min));
    if (limits->identifier && !is_identifier(text))
        return fail(
            rd, at,
            error_set(rd->err, EINVAL,
                      "'%s' is not well-formed: a letter, then letters, digits, '-', '.', '_'",
                      quoted(text, quote)));
    copy = try_new_n(char, len + 1);
    if (!copy)
        return fail(rd, at, error_set(rd->err, ENOMEM, "not enough memory"));
    memcpy(copy, text, len + 1);
    memcpy(ret, &copy, sizeof(copy));
    return 0;
}

static const char *refusal(const struct schema_type *type, const char *name)
{
    for (const struct schema_refusal *r = type->refusals; r && r->name; r++)
        if (strcmp(r->name, name) == 0)
            return r->why;
    return NULL;
}

/* "a, b, c" of the values that are accepted. */
static char *value_list(const struct schema_type *type)
{
    char *list = xstrdup("");

    for (size_t i = 0; i < type->count; i++) {
        char *longer = xasprintf("%s%s%s", list, i ? ", " : "", type->values[i]);

        free(list);
        list = longer;
    }
    return list;
}

static int in_enum(const struct reader *rd, const struct schema_type *type, const json_t *v,
                   const struct place *at, void *ret)
{
    const char *text = json_string_value(v);
    AUTO(free_ptr) char *list = NULL;
    char quote[QUOTE_MAX + 4];
    const char *why;

    if (!text || json_big_integer(v))
        return fail_type(rd, at, "a string", v);
    for (unsigned i = 0; i < type->count; i++) {
        if (strcmp(text, type->values[i]) == 0) {
            memcpy(ret, &i, sizeof(i));
            return 0;
        }
    }
    why = refusal(type, text);
    if (why)
        return fail(
            rd, at,
            error_set(rd->err, ENOTSUP, "'%s' is not accepted: %s", quoted(text, quote), why));
    list = value_list(type);
    return fail(rd, at,
                error_set(rd->err, EINVAL, "'%s' is not one of: %s", quoted(text, quote), list));
}

static int in_array(const struct reader *rd, const struct schema_type *type,
                    const struct schema_limits *limits, const json_t *v, const struct place *at,
                    void *ret)
{
    struct schema_array array = {.count = json_array_size(v)};

    if (!json_is_array(v))
        return fail_type(rd, at, "an array", v);
    if (array.count > limits->max)
        return fail(rd, at,
                    error_set(rd->err, E2BIG, "has %zu elements, more than %llu", array.count,
                              (unsigned long long)limits->max));
    if (array.count == 0)
        return 0;
    array.items = try_alloc(array.count, type->element->size);
    if (!array.items)
        return fail(rd, at,
                    error_set(rd->err, ENOMEM, "not enough memory for %zu elements", array.count));
    memcpy(ret, &array, sizeof(array));
    for (size_t i = 0; i < array.count; i++) {
        struct place here = {.up = at, .index = i, .depth = at->depth};
        int r = in_value(rd, type->element, &type->element_limits, json_array_get(v, i), &here,
                         (char *)array.items + i * type->element->size);

        if (r < 0)
            return r;
    }
    return 0;
}

/* Fills a member, through a pointer of its own where it has one. */
static int in_member_value(const struct reader *rd, const struct schema_member *m, const json_t *v,
                           const struct place *at, char *object)
{
    void *value;

    if (!m->indirect)
        return in_value(rd, m->type, &m->limits, v, at, object + m->offset);
    value = try_alloc(1, m->type->size);
    if (!value)
        return fail(rd, at, error_set(rd->err, ENOMEM, "not enough memory"));
    memcpy(object + m->offset, &value, sizeof(value));
    return in_value(rd, m->type, &m->limits, v, at, value);
}

static int fill_default(const struct reader *rd, const struct schema_member *m,
                        const struct place *at, char *object)
{
    void *where = object + m->offset;
    bool flag = m->default_number != 0;
    unsigned choice = (unsigned)m->default_number;
    int r = 0;

    switch (m->type->kind) {
    case SCHEMA_BOOL:
        memcpy(where, &flag, sizeof(flag));
        break;
    case SCHEMA_INT:
    case SCHEMA_UINT:
    case SCHEMA_SIZE:
        memcpy(where, &m->default_number, sizeof(m->default_number));
        break;
    case SCHEMA_ENUM:
        memcpy(where, &choice, sizeof(choice));
        break;
    case SCHEMA_STRING: {
        json_t *text = json_string(m->default_string);

        r = text ? in_string(rd, &m->limits, text, at, where)
                 : fail(rd, at, error_set(rd->err, ENOMEM, "not enough memory"));
        json_decref(text);
        break;
    }
    case SCHEMA_STRUCT: {
        json_t *nothing = json_object();

        r = nothing ? in_value(rd, m->type, &m->limits, nothing, at, where)
                    : fail(rd, at, error_set(rd->err, ENOMEM, "not enough memory"));
        json_decref(nothing);
        break;
    }
    case SCHEMA_ARRAY:
        break; /* empty, as it lies */
    case SCHEMA_NUMBER:
    case SCHEMA_NULL:
    case SCHEMA_ANY:
    case SCHEMA_ALTERNATE:
        abort(); /* the generator gives these no default */
    }
    return r;
}

static int in_member(const struct reader *rd, const struct schema_member *m, const json_t *object,
                     const struct place *up, char *ret)
{
    struct place at = {.up = up, .name = m->name, .depth = up->depth};
    const json_t *v = json_object_get(object, m->name);
    bool has = true;

    if (!v) {
        switch (m->presence) {
        case SCHEMA_MANDATORY:
            return fail(rd, &at, error_set(rd->err, EINVAL, "missing, but mandatory"));
        case SCHEMA_OPTIONAL:
            return 0;
        case SCHEMA_DEFAULT:
            return fill_default(rd, m, &at, ret);
        }
    }
    if (m->flag_offset != SCHEMA_NO_FLAG)
        memcpy(ret + m->flag_offset, &has, sizeof(has));
    return in_member_value(rd, m, v, &at, ret);
}

static int in_members(const struct reader *rd, const struct schema_type *type, const json_t *object,
                      const struct place *at, char *ret)
{
    for (size_t i = 0; i < type->count; i++) {
        int r;

        if (&type->members[i] == type->tag)
            continue; /* it was read first */
        r = in_member(rd, &type->members[i], object, at, ret);
        if (r < 0)
            return r;
    }
    return 0;
}

static bool has_member(const struct schema_type *type, const char *name)
{
    for (size_t i = 0; type && i < type->count; i++)
        if (strcmp(type->members[i].name, name) == 0)
            return true;
    return false;
}

static int refuse_unknown(const struct reader *rd, const struct schema_type *type,
                          const struct schema_type *variant, const char *choice,
                          const json_t *object, const struct place *up)
{
    const char *name;
    json_t *v;

    json_object_foreach((json_t *)(uintptr_t)object, name, v)
    { /* the macro reads only */
        struct place at = {.up = up, .name = name, .depth = up->depth};
        char quote[QUOTE_MAX + 4];
        const char *why;

        if (has_member(type, name) || has_member(variant, name))
            continue;
        why = refusal(type, name);
        if (!why && variant)
            why = refusal(variant, name);
        at.name = quoted(name, quote);
        if (why)
            return fail(rd, &at, error_set(rd->err, ENOTSUP, "not accepted: %s", why));
        if (choice)
            return fail(
                rd, &at,
                error_set(rd->err, EINVAL, "unknown member (%s is '%s')", type->tag->name, choice));
        return fail(rd, &at, error_set(rd->err, EINVAL, "unknown member"));
    }
    return 0;
}

static int in_struct(const struct reader *rd, const struct schema_type *type, const json_t *v,
                     const struct place *up, char *ret)
{
    /* The same place, a level deeper: it adds nothing to the path. */
    struct place at = *up;
    const struct schema_variant *variant = NULL;
    const char *choice = NULL;
    int r;

    if (!json_is_object(v))
        return fail_type(rd, up, "an object", v);
    if (++at.depth > NEST_MAX)
        return fail(rd, up, error_set(rd->err, ELOOP, "nested more than %d deep", NEST_MAX));
    if (type->tag) {
        unsigned value;

        r = in_member(rd, type->tag, v, &at, ret);
        if (r < 0)
            return r;
        memcpy(&value, ret + type->tag->offset, sizeof(value));
        variant = &type->variants[value];
        choice = type->tag->type->values[value];
    }
    r = refuse_unknown(rd, type, variant ? variant->type : NULL, choice, v, &at);
    if (r < 0)
        return r;
    r = in_members(rd, type, v, &at, ret);
    if (r < 0 || !variant || !variant->type)
        return r;
    return in_members(rd, variant->type, v, &at, ret + variant->offset);
}

/* Whether a value of this JSON type can be meant for a member of this schema type. */
static bool kind_accepts(const struct reader *rd, enum schema_kind kind, const json_t *v)
{
    bool text = option_text(rd, v) != NULL;

    switch (kind) {
    case SCHEMA_BOOL:
        return text || json_is_boolean(v);
    case SCHEMA_INT:
    case SCHEMA_UINT:
    case SCHEMA_SIZE:
        return text || json_is_integer(v) || json_big_integer(v);
    case SCHEMA_NUMBER:
        return text || json_is_number(v) || json_big_integer(v);
    case SCHEMA_STRING:
    case SCHEMA_ENUM:
        return json_is_string(v) && !json_big_integer(v);
    case SCHEMA_NULL:
        return json_is_null(v);
    case SCHEMA_STRUCT:
        return json_is_object(v);
    case SCHEMA_ARRAY:
        return json_is_array(v);
    case SCHEMA_ANY:
        return true;
    case SCHEMA_ALTERNATE:
        return false; /* the generator nests none */
    }
    return false;
}

static const char *kind_name(enum schema_kind kind)
{
    switch (kind) {
    case SCHEMA_BOOL:
        return "a boolean";
    case SCHEMA_INT:
    case SCHEMA_UINT:
    case SCHEMA_SIZE:
        return "an integer";
    case SCHEMA_NUMBER:
        return "a number";
    case SCHEMA_STRING:
    case SCHEMA_ENUM:
        return "a string";
    case SCHEMA_NULL:
        return "null";
    case SCHEMA_STRUCT:
        return "an object";
    case SCHEMA_ARRAY:
        return "an array";
    case SCHEMA_ANY:
    case SCHEMA_ALTERNATE:
        break;
    }
    return "a value";
}

/* The first member that takes the value's JSON type; on a command line, where all is text, a string or enum goes first. */
static int in_alternate(const struct reader *rd, const struct schema_type *type, const json_t *v,
                        const struct place *at, char *ret)
{
    unsigned chosen = (unsigned)type->count;
    char wanted[128] = "";
    size_t used = 0;

    for (unsigned i = 0; i < type->count; i++) {
        enum schema_kind kind = type->members[i].type->kind;
        bool textual = kind == SCHEMA_STRING || kind == SCHEMA_ENUM;

        used += (size_t)snprintf(wanted + used, sizeof(wanted) - used, "%s%s", i ? " or " : "",
                                 kind_name(kind));
        assert(used < sizeof(wanted)); /* at most seven JSON types, once each */
        if (kind_accepts(rd, kind, v) && (chosen == type->count || textual))
            chosen = i;
    }
    if (chosen == type->count)
        return fail_type(rd, at, wanted, v);
    memcpy(ret, &chosen, sizeof(chosen));
    return in_member_value(rd, &type->members[chosen], v, at, ret);
}

static int in_value(const struct reader *rd, const struct schema_type *type,
                    const struct schema_limits *limits, const json_t *v, const struct place *at,
                    void *ret)
{
    json_t *held;

    switch (type->kind) {
    case SCHEMA_BOOL:
        return in_bool(rd, v, at, ret);
    case SCHEMA_INT:
        return in_int(rd, limits, v, at, ret);
    case SCHEMA_UINT:
    case SCHEMA_SIZE:
        return in_uint(rd, type->kind == SCHEMA_SIZE, limits, v, at, ret);
    case SCHEMA_NUMBER:
        return in_number(rd, v, at, ret);
    case SCHEMA_STRING:
        return in_string(rd, limits, v, at, ret);
    case SCHEMA_NULL:
        return json_is_null(v) ? 0 : fail_type(rd, at, "null", v);
    case SCHEMA_ANY:
        held = json_incref((json_t *)(uintptr_t)v); /* counted, not changed */
        memcpy(ret, &held, sizeof(json_t *));
        return 0;
    case SCHEMA_ENUM:
        return in_enum(rd, type, v, at, ret);
    case SCHEMA_STRUCT:
        return in_struct(rd, type, v, at, ret);
    case SCHEMA_ARRAY:
        return in_array(rd, type, limits, v, at, ret);
    case SCHEMA_ALTERNATE:
        return in_alternate(rd, type, v, at, ret);
    }
    return -EINVAL;
}

int json_in(const struct schema_type *type, const json_t *tree, enum json_in_mode mode,
            const char *root, void *ret_value, struct error **err)
{
    const struct reader rd = {.mode = mode, .err = err};
    const struct place at = {.name = root};
    const struct schema_limits any = {.min = INT64_MIN, .max = UINT64_MAX};
    int r;

    memset(ret_value, 0, type->size);
    r = in_value(&rd, type, &any, tree, &at, ret_value);
    if (r < 0)
        schema_free(type, ret_value);
    return r;
}
