/* SPDX-License-Identifier: Apache-2.0 */
/* Probing and following chains. Headers are hostile (P6): they are read by the format's own checks. */
#include "cli/layers.h"
#include "base/alloc.h"
#include "base/macros.h"
#include "formats/list.h"
#include "formats/qcow2/qcow2-header.h"
#include "graph/driver.h"
#include "graph/grants.h"
#include "graph/graph.h"
#include "loop/loop.h"
#include "protocols/list.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/fs.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

struct magic {
    const char *format;
    size_t offset;
    const char *bytes;
    size_t len;
};

#define MAGIC(format, offset, bytes)                                                               \
    {                                                                                              \
        format, offset, bytes, sizeof(bytes) - 1                                                   \
    }

/* As the formats' specifications have them. */
static const struct magic magics[] = {
    MAGIC("qed", 0, "QED\0"),
    MAGIC("vmdk", 0, "KDMV"),
    MAGIC("vmdk", 0, "COWD"),
    MAGIC("vmdk", 0, "# Disk DescriptorFile"),
    MAGIC("vdi", 64, "\x7f\x10\xda\xbe"),
    MAGIC("vhdx", 0, "vhdxfile"),
    MAGIC("vpc", 0, "conectix"),
    MAGIC("parallels", 0, "WithoutFreeSpace"),
    MAGIC("parallels", 0, "WithouFreSpacExt"),
    MAGIC("luks", 0, "LUKS\xba\xbe"),
    MAGIC("bochs", 0, "Bochs Virtual HD Image"),
    MAGIC("cloop", 0, "#!/bin/sh\n#V2.0 Format\nmodprobe cloop"),
};

static bool has_suffix(const char *path, const char *suffix)
{
    size_t len = strlen(path);
    size_t cut = strlen(suffix);

    return len >= cut && strcmp(path + len - cut, suffix) == 0;
}

const char *layers_probe(const char *path, const void *bytes, size_t len)
{
    const uint8_t *b = bytes;

    assert(b);
    if (len >= 8 && memcmp(b, "QFI\xfb", 4) == 0) {
        uint32_t version = (uint32_t)b[4] << 24 | (uint32_t)b[5] << 16 | (uint32_t)b[6] << 8 | b[7];

        return version == 1 ? "qcow" : "qcow2";
    }
    for (size_t i = 0; i < ARRAY_SIZE(magics); i++) {
        const struct magic *m = &magics[i];

        if (len >= m->offset + m->len && memcmp(b + m->offset, m->bytes, m->len) == 0)
            return m->format;
    }
    return has_suffix(path, ".dmg") ? "dmg" : "raw";
}

/* ---- one image ---- */

struct image {
    uint8_t *bytes; /* the start */
    size_t len;
    uint64_t size;
    const char *driver;
    dev_t dev;
    ino_t ino;
};

static int image_size(int fd, const struct stat *st, const char *path, struct image *image,
                      struct error **err)
{
    image->driver = "file";
    image->size = (uint64_t)st->st_size;
    if (S_ISREG(st->st_mode))
        return 0;
    image->driver = "host_device";
    if (!S_ISBLK(st->st_mode))
        return error_set(err, EINVAL, "'%s' is neither a regular file nor a block device", path);
    if (ioctl(fd, BLKGETSIZE64, &image->size) < 0)
        return error_set(err, errno, "'%s': %s", path, strerror(errno));
    return 0;
}

static int read_start(int fd, const char *path, struct image *image, struct error **err)
{
    image->bytes = xnew_n(uint8_t, QCOW2_HEADER_BYTES_MAX);
    while (image->len < QCOW2_HEADER_BYTES_MAX) {
        ssize_t n = pread(fd, image->bytes + image->len, QCOW2_HEADER_BYTES_MAX - image->len,
                          (off_t)image->len);

        if (n < 0 && errno != EINTR)
            return error_set(err, errno, "cannot read '%s': %s", path, strerror(errno));
        if (n == 0)
            break;
        image->len += (size_t)MAX(n, (ssize_t)0);
    }
    return 0;
}

static int image_read(const char *path, struct image *ret, struct error **err)
{
    struct image image = {.bytes = NULL};
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
    struct stat st;
    int r;

    if (fd < 0)
        return error_set(err, errno, "cannot open '%s': %s", path, strerror(errno));
    r = fstat(fd, &st) < 0 ? error_set(err, errno, "'%s': %s", path, strerror(errno))
                           : image_size(fd, &st, path, &image, err);
    if (r == 0)
        r = read_start(fd, path, &image, err);
    close(fd);
    if (r < 0) {
        free(image.bytes);
        return r;
    }
    image.dev = st.st_dev;
    image.ino = st.st_ino;
    *ret = image;
    return 0;
}

/* ---- the chain ---- */

struct seen {
    dev_t dev;
    ino_t ino;
};

struct resolution {
    struct layers layers;
    struct seen *seen;
    const char *path;
    const char *format;
    bool read_only;
    const char *const *allowed;
    size_t allowed_count;
    struct graph *graph;
    int result;
    struct error *error;
};

static const struct driver *find_format(const char *name)
{
    for (size_t i = 0; format_drivers[i]; i++) {
        if (strcmp(format_drivers[i]->name, name) == 0)
            return format_drivers[i];
    }
    return NULL;
}

bool layers_format_known(const char *format)
{
    return find_format(format);
}

static int set_format(struct layer *layer, const char *format, const char *path, bool writes,
                      struct error **err)
{
    const struct driver *driver = find_format(format);

    if (!driver)
        return error_set(err, ENOTSUP, "'%s' is of format '%s', which is not served", path, format);
    if (driver->only_reads && writes)
        return error_set(err, EROFS,
                         "'%s' is of format '%s', which is never written: give "
                         "--read-only",
                         path, format);
    layer->format = driver->name;
    layer->encrypted = strcmp(layer->format, "luks") == 0;
    return 0;
}

static int add_layer(struct resolution *x, const char *path, const char *format,
                     const struct image *image, struct error **err)
{
    struct layer layer = {.driver = image->driver, .probed = !format};
    struct layers *l = &x->layers;
    int r = set_format(&layer, format ? format : layers_probe(path, image->bytes, image->len), path,
                       !x->read_only && l->count == 0, err);

    if (r < 0)
        return r;
    for (size_t i = 0; i < l->count; i++) {
        if (x->seen[i].dev == image->dev && x->seen[i].ino == image->ino)
            return error_set(err, ELOOP, "'%s' names '%s' as its backing file, which is above it",
                             l->v[l->count - 1].path, path);
    }
    if (l->count == LAYERS_MAX)
        return error_set(err, E2BIG, "'%s' has more than %d backing files", x->path,
                         LAYERS_MAX - 1);
    l->v = realloc(l->v, (l->count + 1) * sizeof(*l->v));
    x->seen = realloc(x->seen, (l->count + 1) * sizeof(*x->seen));
    if (!l->v || !x->seen)
        abort(); /* as all small memory */
    layer.path = xstrdup(path);
    x->seen[l->count] = (struct seen){image->dev, image->ino};
    l->v[l->count++] = layer;
    return 0;
}

/* A layer, and where it leads: *path and *format become those of the next one, or NULL. */
static int co_fn control_fn take_layer(struct resolution *x, char **path, char **format,
                                       struct error **err)
{
    struct image image = {.bytes = NULL};
    struct qcow2_header header;
    struct layer *layer;
    char *next = NULL;
    char *next_format = NULL;
    int r = image_read(*path, &image, err);

    if (r < 0)
        return r;
    r = add_layer(x, *path, *format, &image, err);
    layer = r == 0 ? &x->layers.v[x->layers.count - 1] : NULL;
    if (layer && strcmp(layer->format, "qcow2") == 0) {
        r = qcow2_header_parse_tolerant(&header, image.bytes, image.len, image.size, *path, err);
        if (r == 0) {
            r = qcow2_header_check_supported(&header, x->read_only || x->layers.count > 1, *path,
                                             err);
            layer->encrypted = header.crypt_method != QCOW2_CRYPT_NONE;
            if (r == 0 && header.backing_file)
                r = grants_co_check(x->graph, *path, header.backing_file, &next, err);
            if (r == 0 && header.backing_file && header.backing_format)
                next_format = xstrdup(header.backing_format);
            qcow2_header_release(&header);
        }
    }
    free(image.bytes);
    free(*path);
    free(*format);
    *path = next;
    *format = next_format;
    return r;
}

static int co_fn control_fn resolve_chain(struct resolution *x, struct error **err)
{
    char *path = xstrdup(x->path);
    char *format = x->format ? xstrdup(x->format) : NULL;
    int r = 0;

    for (size_t i = 0; r == 0 && i < x->allowed_count; i++)
        r = graph_co_grant(x->graph, x->allowed[i], err);
    while (r == 0 && path)
        r = take_layer(x, &path, &format, err);
    free(path);
    free(format);
    return r;
}

static void co_fn control_fn resolve(void *arg)
{
    static const struct driver *const *const drivers[] = {protocol_drivers, format_drivers, NULL};
    struct resolution *x = arg;

    x->graph = graph_new(drivers);
    x->result = resolve_chain(x, &x->error);
    x->graph = graph_co_free(x->graph);
}

int layers_resolve(struct layers *ret, const char *path, const char *format, bool read_only,
                   const char *const *allowed, size_t allowed_count, struct error **err)
{
    struct resolution x = {
        .path = path,
        .format = format,
        .read_only = read_only,
        .allowed = allowed,
        .allowed_count = allowed_count,
    };
    int r = loop_run_main(LOOP_ENGINE_THREADS, "layers", resolve, &x, err);

    free(x.seen);
    if (r < 0)
        return r;
    if (x.result < 0) {
        error_move(err, &x.error);
        layers_release(&x.layers);
        return x.result;
    }
    *ret = x.layers;
    return 0;
}

void layers_release(struct layers *l)
{
    for (size_t i = 0; i < l->count; i++)
        free(l->v[i].path);
    free(l->v);
    *l = (struct layers){.v = NULL};
}

int layers_set_keys(struct layers *l, const char *const *ids, size_t count, struct error **err)
{
    size_t used = 0;

    for (size_t i = 0; i < l->count; i++) {
        struct layer *layer = &l->v[i];

        if (!layer->encrypted)
            continue;
        if (!count)
            return error_set(err, EINVAL,
                             "'%s' is encrypted: give --object secret,id=ID,file=PATH and "
                             "--key-secret ID",
                             layer->path);
        layer->key_secret = ids[MIN(used, count - 1)];
        used++;
    }
    if (used < count)
        return error_set(err, EINVAL, "--key-secret %s: %zu of the images %s encrypted", ids[used],
                         used, used == 1 ? "is" : "are");
    return 0;
}

/* Of the layer's node. */
static void set_key(json_t *node, const struct layer *layer)
{
    if (strcmp(layer->format, "luks") == 0)
        json_object_set_new(node, "key-secret", json_string(layer->key_secret));
    else
        json_object_set_new(
            node, "encrypt",
            json_pack("{s:s, s:s}", "format", "luks", "key-secret", layer->key_secret));
}

char *layers_node_name(const char *top, size_t i)
{
    return i == 0 ? xstrdup(top) : xasprintf("%s-%zu", top, i);
}

json_t *layers_definition(const struct layers *l, size_t i, const char *top, bool read_only,
                          bool force_share)
{
    AUTO(free_ptr) char *name = layers_node_name(top, i);
    AUTO(free_ptr) char *below = layers_node_name(top, i + 1);
    const struct layer *layer = &l->v[i];
    bool only_read = read_only || i > 0;
    json_t *file = json_pack("{s:s, s:s, s:b}", "driver", layer->driver, "filename", layer->path,
                             "read-only", only_read);
    json_t *node;

    if (!file)
        return NULL;
    node = json_pack("{s:s, s:s, s:b}", "driver", layer->format, "node-name", name, "read-only",
                     only_read);
    if (only_read && force_share) {
        json_object_set_new(file, "force-share", json_true());
        json_object_set_new(node, "force-share", json_true());
    }
    if (!only_read) {
        json_object_set_new(file, "discard", json_string("unmap"));
        json_object_set_new(node, "discard", json_string("unmap"));
    }
    if (strcmp(layer->format, "qcow2") == 0)
        json_object_set_new(node, "backing", i + 1 < l->count ? json_string(below) : json_null());
    if (layer->key_secret)
        set_key(node, layer);
    json_object_set_new(node, "file", file);
    return node;
}
