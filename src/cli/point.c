/* SPDX-License-Identifier: Apache-2.0 */
/* The file of a point: JSON that is written here, and read without trust. */
#include "base/alloc.h"
#include "base/json-text.h"
#include "base/macros.h"
#include "cli/catalogue.h"

#include <assert.h>
#include <errno.h>
#include <inttypes.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>

#define POINT_VERSION 1

static bool is_digit(char c)
{
    return c >= '0' && c <= '9';
}

/* 20261120T234208Z, then nothing or -N, N from 2 to 9999. */
bool point_id_valid(const char *id)
{
    static const char shape[] = "ddddddddTddddddZ";
    size_t i;

    for (i = 0; i < sizeof(shape) - 1; i++) {
        if (shape[i] == 'd' ? !is_digit(id[i]) : id[i] != shape[i])
            return false;
    }
    if (!id[i])
        return true;
    if (id[i++] != '-' || id[i] < '1' || id[i] > '9' || strlen(id + i) > 4 || !strcmp(id + i, "1"))
        return false;
    while (is_digit(id[i]))
        i++;
    return !id[i];
}

static bool is_generation(const char *text)
{
    return strlen(text) == POINT_GENERATION_CHARS &&
           strspn(text, "0123456789abcdef") == POINT_GENERATION_CHARS;
}

/* 2026-11-20T23:42:08.123Z */
static bool is_time(const char *text)
{
    static const char shape[] = "dddd-dd-ddTdd:dd:dd.dddZ";

    if (strlen(text) != sizeof(shape) - 1)
        return false;
    for (size_t i = 0; text[i]; i++) {
        if (shape[i] == 'd' ? !is_digit(text[i]) : text[i] != shape[i])
            return false;
    }
    return true;
}

/* Text of the outside goes to terminals. */
static bool is_plain(const char *text)
{
    for (; *text; text++) {
        if ((unsigned char)*text < ' ' || *text == 0x7f)
            return false;
    }
    return true;
}

static int wrong(const char *member, const char *rule, struct error **err)
{
    return error_set(err, EINVAL, "member '%s' %s", member, rule);
}

/* Borrows nothing. Optional: NULL where it is missing. */
static int read_string(const json_t *tree, const char *member, bool optional, char **ret,
                       struct error **err)
{
    const json_t *value = json_object_get(tree, member);
    const char *text = json_string_value(value);

    if (!value && optional)
        return 0;
    if (!value)
        return wrong(member, "is missing", err);
    if (!text || json_big_integer(value) || strlen(text) != json_string_length(value))
        return wrong(member, "is no string", err);
    if (strlen(text) > PATH_MAX || !is_plain(text))
        return wrong(member, "is too long or has control characters", err);
    *ret = xstrdup(text);
    return 0;
}

static int read_number(const json_t *tree, const char *member, uint64_t *ret, struct error **err)
{
    const json_t *value = json_object_get(tree, member);

    if (!value)
        return wrong(member, "is missing", err);
    if (!json_is_integer(value) || json_integer_value(value) < 0)
        return wrong(member, "is no number of bytes", err);
    *ret = (uint64_t)json_integer_value(value);
    return 0;
}

static int check_version(const json_t *tree, struct error **err)
{
    const json_t *version = json_object_get(tree, "cairn-point");

    if (!json_is_integer(version))
        return error_set(err, EINVAL, "it is no point: member 'cairn-point' says no version");
    if (json_integer_value(version) != POINT_VERSION)
        return error_set(err, EINVAL,
                         "version %" PRId64 " of points is not understood, only version %d",
                         (int64_t)json_integer_value(version), POINT_VERSION);
    return 0;
}

static int read_members(struct point *p, const json_t *tree, struct error **err)
{
    AUTO(free_ptr) char *kind = NULL;
    AUTO(free_ptr) char *format = NULL;
    int r = check_version(tree, err);

    if (r < 0 || (r = read_string(tree, "id", false, &p->id, err)) < 0 ||
        (r = read_string(tree, "time", false, &p->time, err)) < 0 ||
        (r = read_string(tree, "kind", false, &kind, err)) < 0 ||
        (r = read_string(tree, "base", true, &p->base, err)) < 0 ||
        (r = read_string(tree, "image", false, &p->image, err)) < 0 ||
        (r = read_string(tree, "format", false, &format, err)) < 0 ||
        (r = read_number(tree, "size", &p->size, err)) < 0 ||
        (r = read_number(tree, "bytes", &p->bytes, err)) < 0 ||
        (r = read_string(tree, "disk", false, &p->disk, err)) < 0 ||
        (r = read_string(tree, "node", false, &p->node, err)) < 0 ||
        (r = read_string(tree, "bitmap", false, &p->bitmap, err)) < 0 ||
        (r = read_string(tree, "generation", false, &p->generation, err)) < 0 ||
        (r = read_string(tree, "reason", true, &p->reason, err)) < 0)
        return r;
    assert(kind && format); /* they are not optional */
    p->full = strcmp(kind, "full") == 0;
    if (!p->full && strcmp(kind, "incremental") != 0)
        return wrong("kind", "is neither 'full' nor 'incremental'", err);
    return strcmp(format, "qcow2") == 0 ? 0 : wrong("format", "is not 'qcow2'", err);
}

/* What the members say together. Names of files follow from ids: nothing leads out of the directory. */
static int check_members(const struct point *p, const char *id, struct error **err)
{
    AUTO(free_ptr) char *image = xasprintf("%s.qcow2", id);

    assert(p->id && p->time && p->image && p->generation); /* they are not optional */
    if (!point_id_valid(p->id) || strcmp(p->id, id) != 0)
        return wrong("id", "is not what the file is called", err);
    if (strcmp(p->image, image) != 0)
        return wrong("image", "is not the point's id and '.qcow2'", err);
    if (p->full != !p->base)
        return wrong("base", "does not go with the kind", err);
    if (p->base && (!point_id_valid(p->base) || strcmp(p->base, p->id) == 0))
        return wrong("base", "is no id of another point", err);
    if (!is_time(p->time))
        return wrong("time", "is no time", err);
    if (!is_generation(p->generation))
        return wrong("generation", "is not 32 hexadecimal digits", err);
    return 0;
}

int point_from_text(struct point *ret, const char *id, const char *text, size_t len,
                    struct error **err)
{
    struct point p = {.id = NULL};
    json_t *tree = NULL;
    int r = json_text_load(text, len, &tree, err);

    if (r == 0)
        r = json_is_object(tree) ? read_members(&p, tree, err)
                                 : error_set(err, EINVAL, "it is no JSON object");
    if (r == 0)
        r = check_members(&p, id, err);
    json_decref(tree);
    if (r < 0) {
        point_release(&p);
        return r;
    }
    *ret = p;
    return 0;
}

static void set_string(json_t *tree, const char *member, const char *text)
{
    if (text)
        json_object_set_new(tree, member, json_string_lossy(text));
}

json_t *point_to_json(const struct point *p)
{
    json_t *tree = json_object();

    json_object_set_new(tree, "cairn-point", json_integer(POINT_VERSION));
    set_string(tree, "id", p->id);
    set_string(tree, "time", p->time);
    set_string(tree, "kind", p->full ? "full" : "incremental");
    set_string(tree, "base", p->base);
    set_string(tree, "image", p->image);
    set_string(tree, "format", "qcow2");
    json_object_set_new(tree, "size", json_integer((json_int_t)p->size));
    json_object_set_new(tree, "bytes", json_integer((json_int_t)p->bytes));
    set_string(tree, "disk", p->disk);
    set_string(tree, "node", p->node);
    set_string(tree, "bitmap", p->bitmap);
    set_string(tree, "generation", p->generation);
    set_string(tree, "reason", p->reason);
    return tree;
}

void point_release(struct point *p)
{
    free(p->id);
    free(p->time);
    free(p->base);
    free(p->image);
    free(p->disk);
    free(p->node);
    free(p->bitmap);
    free(p->generation);
    free(p->reason);
    *p = (struct point){.id = NULL};
}
