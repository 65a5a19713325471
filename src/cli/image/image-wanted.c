/* SPDX-License-Identifier: Apache-2.0 */
/* Names of images, and what is said of a layer by them, by options or in JSON. */
#include "cli/image/image-wanted.h"
#include "base/alloc.h"
#include "base/json-in.h"
#include "base/keyval.h"
#include "base/macros.h"
#include "cli/image/image.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

/* How deep options may be nested. */
#define DOTTED_MAX 256

/* ---- names ---- */

size_t wanted_protocol_len(const char *name)
{
    size_t len = strcspn(name, ":/");

    return name[len] == ':' ? len : 0;
}

bool wanted_has_protocol(const char *name, const char *protocol)
{
    size_t len = wanted_protocol_len(name);

    return len && len == strlen(protocol) && memcmp(name, protocol, len) == 0;
}

char *image_combine(const char *base, const char *name)
{
    const char *slash = base ? strrchr(base, '/') : NULL;

    if (*name == '/' || wanted_protocol_len(name) || !slash)
        return xstrdup(name);
    return xasprintf("%.*s%s", (int)(slash - base + 1), base, name);
}

bool image_format_written(const char *format)
{
    return strcmp(format, "raw") == 0 || strcmp(format, "qcow2") == 0 ||
           strcmp(format, "luks") == 0;
}

bool image_format_imported(const char *format)
{
    static const char *const formats[] = {"vdi", "vhdx", "vmdk", "vpc"};

    for (size_t i = 0; i < ARRAY_SIZE(formats); i++) {
        if (strcmp(format, formats[i]) == 0)
            return true;
    }
    return false;
}

bool image_format_known(const char *format)
{
    return image_format_written(format) || image_format_imported(format);
}

static bool is_protocol(const char *driver)
{
    return strcmp(driver, "file") == 0 || strcmp(driver, "host_device") == 0 ||
           strcmp(driver, "null-co") == 0;
}

static const char *driver_of_file(const char *path)
{
    struct stat st;

    return stat(path, &st) == 0 && (S_ISBLK(st.st_mode) || S_ISCHR(st.st_mode)) ? "host_device"
                                                                                : "file";
}

/* `blkdebug:RULES:NAME`, the peer's name for a filter: without rules it is our `fault`. */
static int fault_definition(const char *name, json_t **ret, struct error **err)
{
    const char *rules = strchr(name, ':') + 1;
    const char *below = strchr(rules, ':');
    json_t *image;
    int r;

    if (!below)
        return error_set(err, EINVAL, "'%s': it is blkdebug::NAME", name);
    if (below != rules)
        return error_set(err, ENOTSUP, "'%s': rules of blkdebug are not supported yet", name);
    r = image_file_definition(below + 1, &image, err);
    if (r == 0)
        *ret = json_pack("{s:s, s:o}", "driver", "fault", "image", image);
    return r;
}

int image_file_definition(const char *name, json_t **ret, struct error **err)
{
    const char *driver = NULL;

    if (wanted_has_protocol(name, "blkdebug"))
        return fault_definition(name, ret, err);
    if (wanted_has_protocol(name, "file")) {
        name += strlen("file:");
        driver = driver_of_file(name);
    } else if (wanted_has_protocol(name, "host_device")) {
        name += strlen("host_device:");
        driver = "host_device";
    } else if (wanted_protocol_len(name)) {
        return error_set(err, ENOTSUP, "'%s': protocol '%.*s' is not supported", name,
                         (int)wanted_protocol_len(name), name);
    } else {
        driver = driver_of_file(name);
    }
    if (!*name)
        return error_set(err, EINVAL, "the name of the image is empty");
    *ret = json_pack("{s:s, s:s}", "driver", driver, "filename", name);
    return *ret ? 0 : error_set(err, EINVAL, "'%s' is not UTF-8", name);
}

/* ---- what is said of a layer ---- */

void wanted_release(struct wanted *w)
{
    json_decref(w->file);
    json_decref(w->options);
    json_decref(w->backing);
    free(w->format);
}

static bool is_fault(const json_t *file)
{
    const char *driver = json_string_value(json_object_get(file, "driver"));

    return driver && strcmp(driver, "fault") == 0;
}

const json_t *wanted_bottom(const json_t *file)
{
    while (is_fault(file))
        file = json_object_get(file, "image");
    return file;
}

int wanted_complete_file(json_t *file, struct error **err)
{
    const char *filename = json_string_value(json_object_get(file, "filename"));
    const char *driver = json_string_value(json_object_get(file, "driver"));

    if (driver && strcmp(driver, "blkdebug") == 0)
        return error_set(err, ENOTSUP,
                         "driver 'blkdebug' is not supported yet: without rules it is 'fault'");
    if (is_fault(file)) {
        if (!json_is_object(json_object_get(file, "image")))
            return error_set(err, EINVAL, "driver 'fault' needs the options of its `image`");
        return wanted_complete_file(json_object_get(file, "image"), err);
    }
    if (driver)
        return 0;
    if (!filename)
        return error_set(err, EINVAL, "neither `driver` nor `filename` is given");
    json_object_set_new(file, "driver", json_string(driver_of_file(filename)));
    return 0;
}

int wanted_from_tree(struct wanted *w, json_t *tree, const char *format, struct error **err)
{
    const char *driver = json_string_value(json_object_get(tree, "driver"));
    json_t *file = json_object_get(tree, "file");

    w->options = tree;
    if (json_is_object(tree) && driver && is_protocol(driver)) {
        w->file = take(&w->options);
        w->bare = !format;
        w->format = xstrdup(format ? format : driver);
        return 0;
    }
    if (!json_is_object(tree))
        return error_set(err, EINVAL, "the options of the image are no object");
    if (driver && !image_format_known(driver))
        return error_set(err, ENOTSUP, "driver '%s' is not supported", driver);
    if (driver || format)
        w->format = xstrdup(driver ? driver : format);
    if (!file && !driver && json_object_get(tree, "filename")) {
        w->file = take(&w->options);
        return wanted_complete_file(w->file, err);
    }
    if (!json_is_object(file))
        return error_set(err, EINVAL, "the options of the image do not say what its `file` is");
    w->file = json_incref(file);
    w->backing = json_incref(json_object_get(tree, "backing"));
    json_object_del(tree, "file");
    json_object_del(tree, "backing");
    json_object_del(tree, "driver");
    return wanted_complete_file(w->file, err);
}

/* `a.b` becomes `b` in an object `a`. Takes the value. */
static int set_dotted(json_t *object, const char *key, size_t head_len, json_t *value,
                      struct error **err)
{
    AUTO(free_ptr) char *head = xasprintf("%.*s", (int)head_len, key);
    const char *rest = key + head_len + 1;
    json_t *child = json_object_get(object, head);

    if (!child) {
        child = json_object();
        json_object_set_new(object, head, child);
    }
    if (!json_is_object(child) || json_object_get(child, rest)) {
        json_decref(value);
        return error_set(err, EINVAL, "`%s` is given twice, in two ways", key);
    }
    json_object_set_new(child, rest, value);
    return 0;
}

/* As the peer, names in JSON may be written like those of --image-opts. */
static int nest_dotted(json_t *object, unsigned depth, struct error **err)
{
    const char *key;
    json_t *value;
    void *next;
    int r = 0;

    if (depth > DOTTED_MAX)
        return error_set(err, EINVAL, "the options of the image are nested too deep");
    json_object_foreach_safe(object, next, key, value)
    {
        const char *dot = strchr(key, '.');

        if (r == 0 && dot)
            r = set_dotted(object, key, (size_t)(dot - key), json_incref(value), err);
        if (dot)
            json_object_del(object, key);
    }
    json_object_foreach(object, key, value)
    {
        if (r == 0 && json_is_object(value))
            r = nest_dotted(value, depth + 1, err);
    }
    return r;
}

int wanted_from_text(struct wanted *w, const char *text, const char *format, struct error **err)
{
    enum json_in_mode mode;
    json_t *tree;
    int r = keyval_load(text, NULL, &tree, &mode, err);

    if (r == 0) {
        r = json_is_object(tree) ? nest_dotted(tree, 0, err) : 0;
        if (r < 0)
            json_decref(tree);
    }
    return r < 0 ? r : wanted_from_tree(w, tree, format, err);
}

int wanted_from_name(struct wanted *w, const char *name, const char *format, struct error **err)
{
    if (wanted_has_protocol(name, "json"))
        return wanted_from_text(w, name + strlen("json:"), format, err);
    if (format)
        w->format = xstrdup(format);
    return image_file_definition(name, &w->file, err);
}
