/* SPDX-License-Identifier: Apache-2.0 */
/* Grants: the list of granted directories, and the judgement on references (Q6). */
#include "graph/grants.h"
#include "base/alloc.h"
#include "graph/graph-internal.h"
#include "loop/file.h"

#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

/* A granted directory: a canonical path. */
struct grant {
    struct list link;
    char *dir;
};

void grants_release(struct graph *g)
{
    struct grant *grant;

    while ((grant = list_first(&g->grants, struct grant, link))) {
        list_remove(&grant->link);
        free(grant->dir);
        free(grant);
    }
}

/* For messages: control characters would break the line that it stands in. */
static char *shown(const char *text)
{
    char *copy = xstrdup(text);

    for (char *p = copy; *p; p++) {
        if ((unsigned char)*p < ' ' || *p == 0x7f)
            *p = '?';
    }
    return copy;
}

int graph_co_grant(struct graph *g, const char *dir, struct error **err)
{
    AUTO(free_ptr) char *text = shown(dir);
    struct grant *grant;
    char *found = NULL;
    int r = file_co_resolve(dir, &found);

    if (r < 0)
        return error_set(err, -r, "cannot grant directory '%s': %s", text, strerror(-r));
    if (r != FILE_TYPE_DIRECTORY) {
        free(found);
        return error_set(err, ENOTDIR, "cannot grant '%s': it is no directory", text);
    }
    grant = xnew(struct grant);
    grant->dir = found;
    list_append(&g->grants, &grant->link);
    return 0;
}

/* The length of the path's directory; 0 of the root, and of a name without any. */
static size_t dir_len(const char *path)
{
    const char *slash = strrchr(path, '/');

    return slash ? (size_t)(slash - path) : 0;
}

/* Of canonical paths. Whole components count: /a/b is not above /a/bc. */
static bool is_below(const char *path, const char *dir)
{
    size_t len = strlen(dir);

    if (strcmp(dir, "/") == 0)
        return true;
    return strncmp(path, dir, len) == 0 && path[len] == '/'; /* Q6 */
}

static bool same_dir(const char *path, const char *other)
{
    return dir_len(path) == dir_len(other) && memcmp(path, other, dir_len(path)) == 0;
}

static bool granted(const struct graph *g, const char *image, const char *path)
{
    const struct grant *grant;

    if (same_dir(path, image))
        return true;
    list_for_each (&g->grants, grant, link) {
        if (is_below(path, grant->dir))
            return true;
    }
    return false;
}

/* The path that a reference means, not yet looked at. */
static int path_of(const char *image_path, const char *reference, char **ret, struct error **err)
{
    size_t len = strcspn(reference, ":/");
    size_t name_size;
    char *path;

    if (!image_path)
        return error_set(err, EACCES, "it lies in no file, and references are followed from files");
    if (strncmp(reference, "file:", 5) == 0) {
        reference += 5;
        image_path = ""; /* such a name begins at the working directory */
    } else if (reference[len] == ':') {
        AUTO(free_ptr) char *text = shown(reference);

        return error_set(err, EACCES,
                         "names with '%.*s:' are not followed from images; name a node instead",
                         (int)len, text);
    }
    if (!*reference)
        return error_set(err, EINVAL, "the name is empty");
    len = *reference == '/' || !strchr(image_path, '/') ? 0 : dir_len(image_path) + 1;
    name_size = strlen(reference) + 1;
    path = try_new_n(char, len + name_size);
    if (!path)
        return error_set(err, ENOMEM, "no memory for its path");
    memcpy(path, image_path, len);
    memcpy(path + len, reference, name_size);
    *ret = path;
    return 0;
}

static int judge(const struct graph *g, const char *image, const char *path, enum file_type type,
                 struct error **err)
{
    AUTO(free_ptr) char *text = shown(path);

    if (type != FILE_TYPE_REGULAR)
        return error_set(err, EACCES, "'%s' is no regular file; name a node instead", text);
    if (!granted(g, image, path))
        return error_set(err, EACCES,
                         "'%s' lies outside the image's directory and the granted ones; "
                         "'--allow %.*s' would grant it",
                         text, dir_len(text) ? (int)dir_len(text) : 1, text);
    return 0;
}

static int co_fn control_fn resolve(const char *what, const char *path, char **ret,
                                    struct error **err)
{
    AUTO(free_ptr) char *text = shown(path);
    int r = file_co_resolve(path, ret);

    return r < 0 ? error_set(err, -r, "cannot find %s '%s': %s", what, text, strerror(-r)) : r;
}

int grants_co_check(struct graph *g, const char *image_path, const char *reference, char **ret_path,
                    struct error **err)
{
    AUTO(free_ptr) char *path = NULL;
    AUTO(free_ptr) char *image = NULL;
    AUTO(free_ptr) char *found = NULL;
    int r = path_of(image_path, reference, &path, err);

    if (r == 0)
        r = resolve("the image", image_path, &image, err);
    if (r >= 0)
        r = resolve("file", path, &found, err); /* Q6: links are followed first */
    if (r >= 0)
        r = judge(g, image, found, (enum file_type)r, err);
    if (r < 0) {
        AUTO(free_ptr) char *image_text = shown(image_path ? image_path : "?");
        AUTO(free_ptr) char *text = shown(reference);

        return error_wrap(err, r, "image '%s' refers to '%s'", image_text, text);
    }
    *ret_path = take(&found);
    return 0;
}
