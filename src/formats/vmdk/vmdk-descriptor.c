/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The descriptor: lines of KEY=VALUE, and a line for each extent:
 *
 *     RW 4192256 SPARSE "disk-s001.vmdk"
 *     RW 4192256 FLAT "disk-f001.vmdk" 0
 */
#include "base/alloc.h"
#include "base/checked.h"
#include "base/macros.h"
#include "formats/vmdk/vmdk.h"

#include <ctype.h>
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#define NO_PARENT 0xffffffffu

static const char *const create_types[] = {
    "monolithicSparse",     "monolithicFlat",     "streamOptimized",
    "twoGbMaxExtentSparse", "twoGbMaxExtentFlat", "vmfs",
};

static const struct {
    const char *type;
    enum vmdk_kind kind;
} kinds[] = {
    {"SPARSE", VMDK_SPARSE},
    {"FLAT", VMDK_FLAT},
    {"VMFS", VMDK_FLAT},
    {"ZERO", VMDK_ZERO},
};

void vmdk_descriptor_release(struct vmdk_descriptor *d)
{
    for (unsigned i = 0; i < d->count; i++)
        free(d->lines[i].name);
    free(d->lines);
    free(d->create_type);
    *d = (struct vmdk_descriptor){.lines = NULL};
}

/* ---- words of a line ---- */

/* Cuts off the next word, which ends at a blank. Returns it; empty at the end. */
static char *next_word(char **line)
{
    char *word = *line + strspn(*line, " \t");
    char *end = word + strcspn(word, " \t");

    *line = *end ? end + 1 : end;
    *end = '\0';
    return word;
}

/* What stands in quotes at the begin; NULL if nothing does. */
static char *next_quoted(char **line)
{
    char *begin = *line + strspn(*line, " \t");
    char *end = *begin == '"' ? strchr(begin + 1, '"') : NULL;

    if (!end)
        return NULL;
    *end = '\0';
    *line = end + 1;
    return begin + 1;
}

static bool read_number(const char *word, unsigned base, uint64_t *ret)
{
    char *end;

    if (!isxdigit((unsigned char)*word))
        return false;
    errno = 0;
    *ret = strtoull(word, &end, (int)base);
    return !errno && !*end;
}

/* The value if the line is this key's; blanks around it and its quotes are gone. */
static char *value_of(char *line, const char *key)
{
    size_t len = strlen(key);
    char *value;

    if (strncasecmp(line, key, len) != 0)
        return NULL;
    value = line + len + strspn(line + len, " \t");
    if (*value++ != '=')
        return NULL;
    value += strspn(value, " \t\"");
    value[strcspn(value, "\"")] = '\0';
    for (size_t end = strlen(value); end && isblank((unsigned char)value[end - 1]); end--)
        value[end - 1] = '\0';
    return value;
}

/* For messages: what an image says is not to reach a terminal. */
static void blank_controls(char *text)
{
    for (; *text; text++) {
        if (iscntrl((unsigned char)*text) && *text != '\n' && *text != '\t')
            *text = *text == '\r' ? '\n' : '?';
    }
}

/* ---- extents ---- */

static int read_kind(struct vmdk_line *x, const char *type, const char *node, struct error **err)
{
    for (size_t i = 0; i < ARRAY_SIZE(kinds); i++) {
        if (strcmp(type, kinds[i].type) == 0) {
            x->type = kinds[i].type;
            x->kind = kinds[i].kind;
            return 0;
        }
    }
    return error_set(err, ENOTSUP, "node '%s': extents of type '%.40s' are not supported", node,
                     type);
}

static int read_extent(struct vmdk_line *x, char *line, const char *node, struct error **err)
{
    const char *access = next_word(&line);
    const char *sectors = next_word(&line);
    const char *type = next_word(&line);
    const char *name;
    const char *first;
    int r;

    if (strcmp(access, "NOACCESS") == 0)
        return error_set(err, ENOTSUP, "node '%s': an extent is not to be accessed", node);
    if (!read_number(sectors, 10, &x->sectors) ||
        x->sectors > (uint64_t)NODE_SIZE_MAX / VMDK_SECTOR)
        return error_set(err, EINVAL, "node '%s': an extent of '%.40s' sectors", node, sectors);
    r = read_kind(x, type, node, err);
    if (r < 0 || x->kind == VMDK_ZERO)
        return r;
    name = next_quoted(&line);
    if (!name || !*name)
        return error_set(err, EINVAL, "node '%s': an extent has no file name", node);
    first = next_word(&line);
    if (*first &&
        (!read_number(first, 10, &x->first) || x->first > (uint64_t)NODE_SIZE_MAX / VMDK_SECTOR))
        return error_set(err, EINVAL, "node '%s': extent '%.200s' begins at sector '%.40s'", node,
                         name, first);
    x->name = xstrdup(name);
    return 0;
}

static bool is_extent(const char *line)
{
    static const char *const accesses[] = {"RW ", "RDONLY ", "NOACCESS "};

    for (size_t i = 0; i < ARRAY_SIZE(accesses); i++) {
        if (strncmp(line, accesses[i], strlen(accesses[i])) == 0)
            return true;
    }
    return false;
}

static int add_extent(struct vmdk_descriptor *d, char *line, const char *node, struct error **err)
{
    struct vmdk_line *larger;

    if (d->count == VMDK_EXTENTS_MAX)
        return error_set(err, E2BIG, "node '%s': there are more than %u extents", node,
                         VMDK_EXTENTS_MAX);
    larger = realloc(d->lines, (d->count + 1) * sizeof(*d->lines));
    if (!larger)
        return error_set(err, ENOMEM, "no memory");
    d->lines = larger;
    d->lines[d->count] = (struct vmdk_line){.name = NULL};
    return read_extent(&d->lines[d->count++], line, node, err);
}

/* ---- all of it ---- */

static int read_cid(const char *text, uint32_t *ret, const char *node, struct error **err)
{
    uint64_t v;

    if (!read_number(text, 16, &v) || v > UINT32_MAX)
        return error_set(err, EINVAL, "node '%s': the content ID '%.40s' is no number of 32 bits",
                         node, text);
    *ret = (uint32_t)v;
    return 0;
}

static int read_line(struct vmdk_descriptor *d, char *line, const char *node, struct error **err)
{
    const char *value;

    if (is_extent(line))
        return add_extent(d, line, node, err);
    if ((value = value_of(line, "CID")))
        return read_cid(value, &d->cid, node, err);
    if ((value = value_of(line, "parentCID")))
        return read_cid(value, &d->parent_cid, node, err);
    if ((value = value_of(line, "createType")) && !d->create_type)
        d->create_type = xstrdup(value);
    return 0;
}

static int check_whole(const struct vmdk_descriptor *d, const char *node, struct error **err)
{
    bool known = false;

    if (!d->create_type)
        return error_set(err, EINVAL, "node '%s': the descriptor does not say a type", node);
    for (size_t i = 0; i < ARRAY_SIZE(create_types); i++)
        known |= strcmp(d->create_type, create_types[i]) == 0;
    if (d->parent_cid != NO_PARENT)
        return error_set(err, ENOTSUP,
                         "node '%s': the image is a difference to another one, which is not "
                         "supported: merge them first",
                         node);
    if (!known)
        return error_set(err, ENOTSUP, "node '%s': images of type '%.40s' are not supported", node,
                         d->create_type);
    if (!d->count)
        return error_set(err, EINVAL, "node '%s': the descriptor names no extents", node);
    return 0;
}

int vmdk_descriptor_parse(struct vmdk_descriptor *ret, const uint8_t *text, size_t len,
                          const char *node, struct error **err)
{
    struct vmdk_descriptor d = {.parent_cid = NO_PARENT};
    AUTO(free_ptr) char *copy = try_new_n(char, len + 1);
    char *rest = copy;
    char *line;
    int r = 0;

    if (!copy)
        return error_set(err, ENOMEM, "no memory");
    memcpy(copy, text, len);
    blank_controls(copy);
    while (r == 0 && (line = strsep(&rest, "\n")))
        r = read_line(&d, line + strspn(line, " \t"), node, err);
    if (r == 0)
        r = check_whole(&d, node, err);
    if (r < 0)
        vmdk_descriptor_release(&d);
    else
        *ret = d;
    return r;
}
