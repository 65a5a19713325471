/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Opening. A chain is resolved from the top: each layer's file is opened as a node of its own, its start is read, and that says
 * what the next layer is. Then the formats are opened from the bottom, above nodes that are there already.
 */
#include "base/alloc.h"
#include "base/checked.h"
#include "base/json-in.h"
#include "base/keyval.h"
#include "base/macros.h"
#include "cli/cli.h"
#include "cli/image/image-wanted.h"
#include "cli/image/image.h"
#include "cli/layers.h"
#include "crypto/luks-header.h"
#include "graph/driver.h"
#include "graph/grants.h"
#include "loop/iobuf.h"
#include "schema-types.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#define SECTOR 512

static bool follow_all;
static const char **allowed;
static size_t allowed_count;

void image_follow_all(void)
{
    follow_all = true;
}

void image_allow(const char *dir)
{
    allowed = realloc(allowed, (allowed_count + 1) * sizeof(*allowed));
    if (!allowed)
        abort(); /* as all small memory */
    allowed[allowed_count++] = dir;
}

char *image_data_path(const char *base, const char *name)
{
    return follow_all ? xstrdup(name) : image_combine(base, name);
}

/* ---- nodes ---- */

/* Takes the definition. */
static int read_definition(json_t *definition, struct node_options *ret, struct error **err)
{
    int r;

    if (!definition)
        return error_set(err, EINVAL, "a path is not UTF-8");
    r = json_in(&node_options_type, definition, JSON_IN_COMMAND_LINE, "", ret, err);
    json_decref(definition);
    return r;
}

int image_co_add_node(struct graph *g, json_t *definition, struct error **err)
{
    struct node_options options;
    int r = read_definition(definition, &options, err);

    if (r < 0)
        return r;
    r = graph_co_add(g, &options, err);
    schema_free(&node_options_type, &options);
    return r;
}

int image_co_backend(struct backend **ret, struct graph *g, const char *node, struct access access,
                     struct error **err)
{
    int r = backend_co_new(ret, g, node, access, "this program", err);

    if (r == 0 && backend_attach(*ret) < 0) {
        *ret = backend_co_free(*ret);
        return error_set(err, ENOMEM, "no memory");
    }
    return r;
}

static bool is_written(const struct image *image, size_t i)
{
    return (image->flags & IMAGE_WRITE) && (i == 0 || i == image->base);
}

/* What all nodes of a layer have in common. The user's own words go first. */
static void set_common(json_t *def, const struct image *image, size_t i)
{
    bool writes = is_written(image, i);

    if (!writes)
        json_object_set_new(def, "read-only", json_true());
    if (!writes && (image->flags & IMAGE_SHARE) && !json_object_get(def, "force-share"))
        json_object_set_new(def, "force-share", json_true());
    if (writes && !(image->flags & IMAGE_NO_DISCARD) && !json_object_get(def, "discard"))
        json_object_set_new(def, "discard", json_string("unmap"));
    if ((image->flags & (IMAGE_DIRECT | IMAGE_NO_FLUSH)) && !json_object_get(def, "cache"))
        json_object_set_new(def, "cache",
                            json_pack("{s:b, s:b}", "direct", !!(image->flags & IMAGE_DIRECT),
                                      "no-flush", !!(image->flags & IMAGE_NO_FLUSH)));
}

/* Of the node that users write to. */
static void set_detect_zeroes(json_t *def, const struct image *image, size_t i)
{
    if (i == 0 && image->detect_zeroes && (image->flags & IMAGE_WRITE))
        json_object_set_new(def, "detect-zeroes", json_string(image->detect_zeroes));
}

static bool is_same_file(const char *a, const char *b)
{
    struct stat x;
    struct stat y;

    return stat(a, &x) == 0 && stat(b, &y) == 0 && x.st_dev == y.st_dev && x.st_ino == y.st_ino;
}

struct file_search {
    const char *path;
    bool found;
};

static void look_for_file(struct node *node, void *arg)
{
    struct file_search *s = arg;
    const char *path = node_filename(node);

    s->found = s->found || (path && is_same_file(path, s->path));
}

int image_refuse_in_use(struct graph *g, const char *path, struct error **err)
{
    struct file_search s = {.path = path};
    struct stat st;

    if (stat(path, &st) < 0 || S_ISCHR(st.st_mode))
        return 0;
    graph_for_each_node(g, look_for_file, &s);
    return s.found ? error_set(err, EINVAL, "'%s' is read from, and would be overwritten", path)
                   : 0;
}

static int co_fn control_fn open_file_node(struct image *image, size_t i, json_t *file,
                                           struct error **err)
{
    struct image_layer *layer = &image->layers[i];
    json_t *def;
    int r = layer->path && is_written(image, i)
                ? image_refuse_in_use(image->graph, layer->path, err)
                : 0;

    if (r < 0)
        return r;
    def = json_deep_copy(file);
    if (!def)
        return error_set(err, ENOMEM, "no memory");
    json_object_set_new(def, "node-name", json_string(layer->file_node));
    set_common(def, image, i);
    if (layer->node == layer->file_node)
        set_detect_zeroes(def, image, i);
    return image_co_add_node(image->graph, def, err);
}

/* The definition of the data file's node: what the command line says, or what the image names (Q6). */
static int co_fn control_fn define_data_file(const struct image *image,
                                             const struct image_layer *layer, json_t *given,
                                             json_t **ret, struct error **err)
{
    AUTO(free_ptr) char *path = NULL;
    int r = 0;

    if (given) {
        *ret = json_deep_copy(given);
        return *ret ? wanted_complete_file(*ret, err) : error_set(err, ENOMEM, "no memory");
    }
    if (follow_all)
        return image_file_definition(layer->header.data_file, ret, err);
    r = grants_co_check(image->graph, layer->path, layer->header.data_file, &path, err);
    return r < 0 ? r : image_file_definition(path, ret, err);
}

static int co_fn control_fn open_data_file(struct image *image, size_t i, struct error **err)
{
    struct image_layer *layer = &image->layers[i];
    json_t *given = json_object_get(layer->options, "data-file");
    json_t *def = NULL;
    const char *name;
    int r;

    if (!qcow2_header_has_data_file(&layer->header) || (given && !json_is_object(given)) ||
        (!given && !layer->header.data_file))
        return 0; /* the format says what is wrong, if anything is */
    r = define_data_file(image, layer, given, &def, err);
    if (r < 0)
        return error_wrap(err, r, "data file of '%s'", layer->filename);
    name = json_string_value(json_object_get(def, "filename"));
    if (layer->path && name && is_same_file(layer->path, name)) {
        json_decref(def);
        return error_set(err, EINVAL, "data file of '%s': it is the image itself", layer->filename);
    }
    r = name && is_written(image, i) ? image_refuse_in_use(image->graph, name, err) : 0;
    if (r < 0) {
        json_decref(def);
        return error_wrap(err, r, "data file of '%s'", layer->filename);
    }
    layer->data_filename = xstrdup(!given ? layer->header.data_file : name ? name : "data-file");
    layer->data_node = xasprintf("%s%zu.data", image->prefix, i);
    json_object_set_new(def, "node-name", json_string(layer->data_node));
    set_common(def, image, i);
    return image_co_add_node(image->graph, def, err);
}

static void set_key(json_t *def, const struct image_layer *layer, const char *secret)
{
    if (strcmp(layer->format, "luks") == 0)
        json_object_set_new(def, "key-secret", json_string(secret));
    else
        json_object_set_new(def, "encrypt",
                            json_pack("{s:s, s:s}", "format", "luks", "key-secret", secret));
}

static json_t *format_definition(const struct image *image, size_t i)
{
    const struct image_layer *layer = &image->layers[i];
    json_t *def = layer->options ? json_deep_copy(layer->options) : json_object();
    bool below = !(image->flags & IMAGE_SEPARATE) && i >= image->base && i + 1 < image->count;

    if (!def)
        return NULL;
    json_object_set_new(def, "driver", json_string(layer->format));
    json_object_set_new(def, "node-name", json_string(layer->node));
    json_object_set_new(def, "file", json_string(layer->file_node));
    if (strcmp(layer->format, "qcow2") == 0)
        json_object_set_new(def, "backing",
                            below ? json_string(image->layers[i + 1].node) : json_null());
    if (i == 0 && image->snapshot)
        json_object_set(def, "snapshot", image->snapshot);
    if (layer->data_node)
        json_object_set_new(def, "data-file", json_string(layer->data_node));
    if (i == 0 && image->key_secret)
        set_key(def, layer, image->key_secret);
    set_common(def, image, i);
    set_detect_zeroes(def, image, i);
    return def;
}

/* Are the options such as its driver has? They are not needed. */
static int check_format_options(const struct image *image, struct error **err)
{
    struct node_options options;
    int r;

    if (!image->layers[0].options || !image_format_known(image->layers[0].format))
        return 0;
    r = read_definition(format_definition(image, 0), &options, err);
    if (r == 0)
        schema_free(&node_options_type, &options);
    return r;
}

/* Such a format has no header of its own here, or options that change what it is: its node says what the disk is. */
static bool node_says(const struct image_layer *layer)
{
    return image_format_imported(layer->format) ||
           (layer->options && strcmp(layer->format, "raw") == 0 &&
            (json_object_get(layer->options, "offset") || json_object_get(layer->options, "size")));
}

static int co_fn control_fn open_imported(struct image *image, size_t i, struct error **err)
{
    struct image_layer *layer = &image->layers[i];
    int r = image_co_add_node(image->graph, format_definition(image, i), err);
    const struct node *node;

    if (r < 0)
        return r;
    node = graph_find(image->graph, layer->node);
    layer->imported = true;
    layer->imported_size = node_size(node);
    (void)node_allocated_bytes(node, &layer->disk_bytes); /* there may be several files */
    if (node_driver(node)->cluster_bytes)
        layer->imported_cluster = node_driver(node)->cluster_bytes(node);
    return 0;
}

/* ---- what a file holds ---- */

int image_co_read(struct backend *b, uint64_t offset, void *data, size_t len, struct iobuf *buf)
{
    uint64_t size = backend_size(b);
    size_t inside = offset < size ? (size_t)MIN((uint64_t)len, size - offset) : 0;
    struct iovec iov = {data, inside};
    struct request req = {
        .kind = REQUEST_READ,
        .offset = offset,
        .len = inside,
        .iov = &iov,
        .iov_count = 1,
        .hold = buf,
    };

    memset((uint8_t *)data + inside, 0, len - inside);
    return inside ? backend_co_request(b, &req) : 0;
}

int image_co_write(struct backend *b, uint64_t offset, void *data, size_t len, unsigned flags,
                   struct iobuf *buf)
{
    struct iovec iov = {data, len};
    struct request req = {
        .kind = REQUEST_WRITE,
        .flags = flags,
        .offset = offset,
        .len = len,
        .iov = &iov,
        .iov_count = 1,
        .hold = buf,
    };

    return len ? backend_co_request(b, &req) : 0;
}

int image_co_zero(struct backend *b, uint64_t offset, uint64_t len, unsigned flags)
{
    int r = 0;

    while (r == 0 && len) {
        struct request req = {
            .kind = REQUEST_WRITE_ZEROES,
            .flags = flags,
            .offset = offset,
            .len = MIN(len, BACKEND_MAX_RANGE),
        };

        r = backend_co_request(b, &req);
        offset += req.len;
        len -= req.len;
    }
    return r;
}

int image_co_flush(struct backend *b)
{
    struct request req = {.kind = REQUEST_FLUSH};

    return backend_co_request(b, &req);
}

static int look_at_luks(struct image_layer *layer, const uint8_t *bytes, size_t len,
                        struct error **err)
{
    json_t *detached = json_object_get(layer->options, "header");
    struct luks_header h;
    int r;

    if (detached) /* what is here is the disk alone */
        return json_is_object(detached) ? wanted_complete_file(detached, err) : 0;
    r = luks_header_parse(&h, bytes, len, layer->file_size, err);

    if (r < 0)
        return error_wrap(err, r, "'%s'", layer->filename);
    layer->luks_payload = MIN((uint64_t)h.payload_sector * LUKS_SECTOR, layer->file_size);
    return 0;
}

static int co_fn look_at_bytes(struct image_layer *layer, const uint8_t *bytes, size_t len,
                               unsigned flags, struct error **err)
{
    int r;

    if (!layer->format) {
        layer->format = xstrdup(layers_probe(layer->path ? layer->path : "", bytes, len));
        layer->probed = true;
    }
    if (flags & IMAGE_FILE)
        return 0;
    if (strcmp(layer->format, "luks") == 0)
        return look_at_luks(layer, bytes, len, err);
    if (strcmp(layer->format, "qcow2") != 0) {
        if (!image_format_known(layer->format))
            return error_set(err, ENOTSUP, "'%s': format '%s' is not supported", layer->filename,
                             layer->format);
        return 0;
    }
    r = qcow2_header_parse_tolerant(&layer->header, bytes, len, layer->file_size, layer->filename,
                                    err);
    if (r == 0 && layer->header.backing_file)
        layer->backing_filename = image_combine(layer->path, layer->header.backing_file);
    if (r == 0 && layer->header.backing_format)
        layer->backing_format = xstrdup(layer->header.backing_format);
    return r;
}

static int co_fn control_fn look_at(struct image *image, size_t i, struct error **err)
{
    struct image_layer *layer = &image->layers[i];
    struct access access = {.wants = ACCESS_READ, .tolerates = ACCESS_ALL};
    struct backend *b = NULL;
    struct iobuf *buf;
    size_t len;
    int r = image_co_backend(&b, image->graph, layer->file_node, access, err);

    if (r < 0)
        return r;
    layer->file_size = backend_size(b);
    (void)node_allocated_bytes(backend_node(b), &layer->disk_bytes);
    len = (size_t)MIN(layer->file_size, QCOW2_HEADER_BYTES_MAX);
    buf = iobuf_new(QCOW2_HEADER_BYTES_MAX);
    r = buf ? image_co_read(b, 0, buf->data, len, buf) : -ENOMEM;
    if (r < 0)
        r = error_set(err, -r, "cannot read '%s': %s", layer->filename, strerror(-r));
    else
        r = look_at_bytes(layer, buf->data, len, image->flags, err);
    iobuf_unref(buf);
    (void)backend_co_free(b);
    return r;
}

/* ---- the chain ---- */

static int refuse_loop(const struct image *image, const char *path, struct error **err)
{
    for (size_t i = 0; path && i + 1 < image->count; i++) {
        const struct image_layer *layer = &image->layers[i];

        if (layer->path && is_same_file(layer->path, path))
            return error_set(err, ELOOP, "'%s' is its own backing file, by way of '%s'", path,
                             image->layers[image->count - 2].filename);
    }
    return 0;
}

/* Is a layer that was added the base of a commit? -b means the same file as the name in the layer above would. */
static bool is_base(const struct image *image, size_t i)
{
    const struct image_layer *layer = &image->layers[i];
    AUTO(free_ptr) char *path = NULL;
    struct stat a;
    struct stat b;

    if (!(image->flags & IMAGE_COMMIT) || image->base || i == 0)
        return false;
    if (!image->base_name || strcmp(image->base_name, layer->filename) == 0)
        return true;
    path = image_combine(image->layers[i - 1].path, image->base_name);
    return layer->path && stat(path, &a) == 0 && stat(layer->path, &b) == 0 &&
           a.st_dev == b.st_dev && a.st_ino == b.st_ino;
}

static int refuse_missing_base(const struct image *image, struct error **err)
{
    if (!(image->flags & IMAGE_COMMIT) || image->base)
        return 0;
    if (image->base_name)
        return error_set(err, EINVAL, "Did not find '%s' in the backing chain of '%s'",
                         image->base_name, image->layers[0].filename);
    return error_set(err, EINVAL, "Image does not have a backing file");
}

static struct image_layer *append_layer(struct image *image)
{
    size_t i = image->count;

    /* By doubling: a chain may be long. */
    if ((i & (i - 1)) == 0) {
        image->layers = realloc(image->layers, MAX(2 * i, (size_t)1) * sizeof(*image->layers));
        if (!image->layers)
            abort(); /* as all small memory */
    }
    image->layers[i] = (struct image_layer){.format = NULL};
    image->count++;
    return &image->layers[i];
}

static void layer_release(struct image_layer *l)
{
    free(l->filename);
    free(l->path);
    free(l->format);
    if (l->node != l->file_node)
        free(l->node);
    free(l->file_node);
    qcow2_header_release(&l->header);
    free(l->backing_filename);
    free(l->backing_format);
    free(l->data_node);
    free(l->data_filename);
    json_decref(l->options);
    json_decref(l->backing);
}

/* Adds what is wanted as the next layer. Takes what is in it. */
static int co_fn control_fn add_layer(struct image *image, struct wanted *w, struct error **err)
{
    size_t i = image->count;
    struct image_layer *layer = append_layer(image);
    const char *path = json_string_value(json_object_get(wanted_bottom(w->file), "filename"));
    int r;

    if (i == IMAGE_LAYERS_MAX)
        return error_set(err, E2BIG, "there are more than %d backing files", IMAGE_LAYERS_MAX - 1);
    if (path) {
        layer->path = xstrdup(path);
        /* So that it can be given to a tool again. */
        layer->filename = xasprintf("%s%s", !w->shown && wanted_protocol_len(path) ? "./" : "",
                                    w->shown ? w->shown : path);
    } else {
        AUTO(free_ptr) char *text = json_dumps(w->file, JSON_COMPACT);

        layer->filename = xasprintf("json:%s", text ? text : "");
    }
    layer->format = take(&w->format);
    layer->options = take(&w->options);
    layer->backing = take(&w->backing);
    layer->file_node = xasprintf("%s%zu.file", image->prefix, i);
    layer->node = w->bare ? layer->file_node : xasprintf("%s%zu", image->prefix, i);
    r = refuse_loop(image, layer->path, err);
    if (is_base(image, i))
        image->base = i;
    if (r == 0)
        r = open_file_node(image, i, w->file, err);
    if (r == 0 && w->bare) {
        struct node *node = graph_find(image->graph, layer->file_node);

        layer->file_size = node_size(node);
        (void)node_allocated_bytes(node, &layer->disk_bytes);
        return 0;
    }
    if (r == 0)
        r = look_at(image, i, err);
    return r == 0 && node_says(layer) ? open_imported(image, i, err) : r;
}

/* Does it say more of the backing file that the image names, such as its key, and not which file that is? */
static bool json_is_more(const json_t *backing)
{
    return !json_object_get(backing, "file") && !json_object_get(backing, "driver") &&
           !json_object_get(backing, "filename");
}

/* Whether there is a layer below the last one, and what it is. */
static int co_fn control_fn next_layer(struct image *image, struct wanted *w, struct error **err)
{
    struct image_layer *layer = &image->layers[image->count - 1];
    const char *name = layer->backing_filename;
    char *path = NULL;
    int r;

    if (layer->backing && !json_is_object(layer->backing)) {
        const char *text = json_string_value(layer->backing);

        if (json_is_null(layer->backing) || (text && !*text))
            return 0;
        return error_set(err, EINVAL, "`backing` is neither null nor the options of an image");
    }
    if (layer->backing && !(name && json_is_more(layer->backing)))
        r = wanted_from_tree(w, json_incref(layer->backing), NULL, err);
    else if (!name)
        return 0;
    else if (follow_all)
        r = wanted_from_name(w, name, layer->backing_format, err);
    else {
        r = grants_co_check(image->graph, layer->path, layer->header.backing_file, &path, err);
        if (r == 0)
            r = wanted_from_name(w, path, layer->backing_format, err);
        free(path);
        w->shown = name;
    }
    if (r == 0 && layer->backing && !w->options) {
        w->options = json_deep_copy(layer->backing);
        w->backing = json_incref(json_object_get(layer->backing, "backing"));
        json_object_del(w->options, "backing");
    }
    return r < 0 ? r : 1;
}

static int co_fn control_fn resolve_chain(struct image *image, struct wanted *w, struct error **err)
{
    int r = add_layer(image, w, err);

    while (r == 0 && !(image->flags & (IMAGE_NO_BACKING | IMAGE_FILE))) {
        struct wanted next = {.file = NULL};

        r = next_layer(image, &next, err);
        if (r <= 0) {
            wanted_release(&next);
            break;
        }
        r = add_layer(image, &next, err);
        wanted_release(&next);
        if (r < 0)
            r = error_wrap(err, r, "backing file of '%s'",
                           image->layers[image->count - 2].filename);
    }
    return r;
}

static int co_fn control_fn open_formats(struct image *image, struct error **err)
{
    for (size_t i = image->count; i-- > 0;) {
        int r;

        if (image->layers[i].node == image->layers[i].file_node || image->layers[i].imported)
            continue;
        r = open_data_file(image, i, err);
        if (r == 0)
            r = image_co_add_node(image->graph, format_definition(image, i), err);
        if (r < 0)
            return r;
    }
    return 0;
}

static int co_fn control_fn open_backend(struct image *image, struct error **err)
{
    struct access access = {.wants = ACCESS_READ,
                            .tolerates = ACCESS_READ | ACCESS_WRITE_UNCHANGED};

    if (image->flags & IMAGE_WRITE) {
        access.wants |= ACCESS_WRITE | ACCESS_RESIZE;
        access.tolerates |= ACCESS_RESIZE; /* our own change of the size */
    }
    return image_co_backend(&image->backend, image->graph, image->layers[0].node, access, err);
}

static int co_fn control_fn open_all(struct image *image, const struct image_spec *spec,
                                     struct error **err)
{
    struct wanted w = {.file = NULL};
    int r = 0;

    for (size_t i = 0; r == 0 && i < allowed_count; i++)
        r = graph_co_grant(image->graph, allowed[i], err);
    if (r == 0)
        r = spec->options && !wanted_has_protocol(spec->name, "json")
                ? wanted_from_text(&w, spec->name, NULL, err)
                : wanted_from_name(&w, spec->name, spec->format, err);
    if (r == 0 && w.format && !w.bare && !(image->flags & IMAGE_FILE) &&
        !image_format_known(w.format))
        r = error_set(err, ENOTSUP, "format '%s' is not supported", w.format);
    if (r == 0)
        r = resolve_chain(image, &w, err);
    wanted_release(&w);
    if (r == 0)
        r = refuse_missing_base(image, err);
    if (r == 0 && image->snapshot && strcmp(image_format(image), "qcow2") != 0)
        r = error_set(err, ENOTSUP, "images of format %s have no snapshots", image_format(image));
    if (r == 0 && image->flags & (IMAGE_FILE | IMAGE_HEADERS))
        r = check_format_options(image, err);
    if (image->flags & IMAGE_FILE)
        return r;
    if (r == 0 && !(image->flags & IMAGE_HEADERS))
        r = open_formats(image, err);
    if (r == 0 && !(image->flags & (IMAGE_HEADERS | IMAGE_SEPARATE | IMAGE_COMMIT | IMAGE_NODES)))
        r = open_backend(image, err);
    return r;
}

/* ID or name, or `snapshot.id=ID,snapshot.name=NAME`, one of them at least. */
static int read_snapshot(struct image *image, const char *text, struct error **err)
{
    enum json_in_mode mode;
    json_t *tree;
    int r;

    if (strncmp(text, "snapshot.", strlen("snapshot.")) != 0) {
        image->snapshot = json_string(text);
        return image->snapshot ? 0 : error_set(err, EINVAL, "snapshot '%s' is not UTF-8", text);
    }
    r = keyval_load(text, NULL, &tree, &mode, err);
    if (r < 0)
        return r;
    image->snapshot = json_incref(json_object_get(tree, "snapshot"));
    if (json_object_size(tree) != 1 || !json_is_object(image->snapshot))
        r = error_set(err, EINVAL, "'%s' names no snapshot: expected snapshot.id, snapshot.name",
                      text);
    json_decref(tree);
    return r;
}

int image_co_open(struct image *image, struct graph *g, const char *prefix,
                  const struct image_spec *spec, struct error **err)
{
    int r;

    *image = (struct image){
        .graph = g,
        .prefix = xstrdup(prefix),
        .flags = spec->flags,
        .base_name = spec->base,
        .key_secret = spec->key_secret,
        .detect_zeroes = spec->detect_zeroes,
    };
    r = spec->snapshot ? read_snapshot(image, spec->snapshot, err) : 0;
    if (r == 0)
        r = open_all(image, spec, err);
    if (r < 0) {
        image_co_close(image);
        return error_wrap(err, r, "Could not open '%s'", spec->name);
    }
    return 0;
}

static void co_fn control_fn close_node(struct image *image, const char *name)
{
    AUTO(error_free) struct error *ignored = NULL; /* it is closed with the graph */

    if (name && graph_find(image->graph, name))
        (void)graph_co_del(image->graph, name, &ignored);
}

void image_co_close(struct image *image)
{
    if (!image->graph)
        return;
    image->backend = backend_co_free(image->backend);
    for (size_t i = 0; i < image->count; i++) {
        struct image_layer *layer = &image->layers[i];

        if (layer->node != layer->file_node)
            close_node(image, layer->node);
        close_node(image, layer->data_node);
        close_node(image, layer->file_node);
        layer_release(layer);
    }
    free(image->layers);
    json_decref(image->snapshot);
    free(image->prefix);
    *image = (struct image){.graph = NULL};
}

uint64_t image_size(const struct image *image)
{
    const struct image_layer *top = &image->layers[0];

    if (image->backend)
        return align_up(backend_size(image->backend), SECTOR);
    if (top->imported)
        return top->imported_size;
    return align_up(top->header.version ? top->header.size : top->file_size - top->luks_payload,
                    SECTOR);
}

const char *image_format(const struct image *image)
{
    return image->layers[0].format;
}

void image_warn_probed(const struct image *image)
{
    const struct image_layer *top = &image->layers[0];

    if (top->probed && strcmp(top->format, "raw") == 0)
        cli_warn("'%s' has the format of none that is known and is taken as raw: -f raw says so",
                 top->filename);
}
