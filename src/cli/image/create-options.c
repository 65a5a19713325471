/* SPDX-License-Identifier: Apache-2.0 */
/* -o, and what it makes. */
#include "cli/image/create-options.h"
#include "base/alloc.h"
#include "base/checked.h"
#include "base/macros.h"
#include "base/number.h"
#include "cli/image/image.h"
#include "cli/image/tool.h"
#include "loop/iobuf.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define PIECE ((size_t)1 << 20)

/* ---- options ---- */

int preallocation_read(const char *text, enum preallocation *ret, struct error **err)
{
    static const char *const names[] = {"off", "metadata", "falloc", "full"};

    for (unsigned i = 0; i < ARRAY_SIZE(names); i++) {
        if (strcmp(text, names[i]) == 0) {
            *ret = (enum preallocation)i;
            return 0;
        }
    }
    return error_set(err, EINVAL, "Invalid preallocation mode '%s'", text);
}

static int read_bytes(const char *key, const char *text, uint64_t *ret, struct error **err)
{
    if (size_from_text(text, ret) < 0 || *ret > INT64_MAX)
        return error_set(err, EINVAL, "Parameter '%s' expects a size, not '%s'", key, text);
    return 0;
}

static void set_text(char **to, const char *text)
{
    free(*to);
    *to = xstrdup(text);
}

static int set_size(struct create_options *o, const char *text, struct error **err)
{
    o->has_size = true;
    return read_bytes("size", text, &o->size, err);
}

static int set_preallocation(struct create_options *o, const char *text, struct error **err)
{
    set_text(&o->preallocation_text, text);
    return preallocation_read(text, &o->preallocation, err);
}

static int set_backing_file(struct create_options *o, const char *text, struct error **err)
{
    (void)err;
    set_text(&o->backing_file, text);
    return 0;
}

static int set_backing_format(struct create_options *o, const char *text, struct error **err)
{
    (void)err;
    set_text(&o->backing_format, text);
    return 0;
}

static int set_compat(struct create_options *o, const char *text, struct error **err)
{
    set_text(&o->compat, text);
    if (strcmp(text, "0.10") == 0 || strcmp(text, "v2") == 0)
        o->version = 2;
    else if (strcmp(text, "1.1") == 0 || strcmp(text, "v3") == 0)
        o->version = 3;
    else
        return error_set(err, EINVAL, "Invalid compatibility level '%s'", text);
    return 0;
}

static int set_cluster_size(struct create_options *o, const char *text, struct error **err)
{
    int r = read_bytes("cluster_size", text, &o->cluster_size, err);

    if (r == 0 && (o->cluster_size < 512 || o->cluster_size > 2 * MIB ||
                   (o->cluster_size & (o->cluster_size - 1))))
        return error_set(err, EINVAL, "Cluster size must be a power of two between 512 and 2048k");
    return r;
}

static int set_refcount_bits(struct create_options *o, const char *text, struct error **err)
{
    if (number_from_text(text, &o->refcount_bits) < 0 || !o->refcount_bits ||
        o->refcount_bits > 64 || (o->refcount_bits & (o->refcount_bits - 1)))
        return error_set(err, EINVAL,
                         "Refcount width must be a power of two and may not exceed 64 bits");
    return 0;
}

static int set_lazy_refcounts(struct create_options *o, const char *text, struct error **err)
{
    return tool_read_bool("lazy_refcounts", text, &o->lazy_refcounts, err);
}

static int only_off(const char *key, const char *text, struct error **err)
{
    bool on;
    int r = tool_read_bool(key, text, &on, err);

    return r == 0 && on ? error_set(err, ENOTSUP, "'%s' is not supported yet", key) : r;
}

static int set_extended_l2(struct create_options *o, const char *text, struct error **err)
{
    return tool_read_bool("extended_l2", text, &o->extended_l2, err);
}

static int set_encryption(struct create_options *o, const char *text, struct error **err)
{
    (void)o;
    return only_off("encryption", text, err);
}

static int set_data_file(struct create_options *o, const char *text, struct error **err)
{
    if (!*text)
        return error_set(err, EINVAL, "the name of the data file is empty");
    set_text(&o->data_file, text);
    return 0;
}

static int set_data_file_raw(struct create_options *o, const char *text, struct error **err)
{
    return tool_read_bool("data_file_raw", text, &o->data_file_raw, err);
}

static int set_compression_type(struct create_options *o, const char *text, struct error **err)
{
    o->compression_type =
        strcmp(text, "zstd") == 0 ? QCOW2_COMPRESSION_ZSTD : QCOW2_COMPRESSION_ZLIB;
    return strcmp(text, "zlib") == 0 || o->compression_type == QCOW2_COMPRESSION_ZSTD
               ? 0
               : error_set(err, EINVAL, "compression type '%s' is neither zlib nor zstd", text);
}

static int set_detached_header(struct create_options *o, const char *text, struct error **err)
{
    return tool_read_bool("detached-header", text, &o->encryption.detached, err);
}

static int refuse(struct create_options *o, const char *text, struct error **err)
{
    (void)o;
    (void)text;
    return error_set(err, ENOTSUP, "it is not supported yet");
}

enum { FOR_RAW = 1 << 0, FOR_QCOW2 = 1 << 1, FOR_LUKS = 1 << 2 };

struct known_option {
    const char *name;
    int (*set)(struct create_options *o, const char *text, struct error **err);
    const char *help;
    unsigned formats; /* that have it */
};

static const struct known_option known[] = {
    {"backing_file", set_backing_file, "<str>     - File name of a base image", FOR_QCOW2},
    {"backing_fmt", set_backing_format, "<str>      - Image format of the base image", FOR_QCOW2},
    {"cluster_size", set_cluster_size, "<size>    - qcow2 cluster size", FOR_QCOW2},
    {"compat", set_compat, "<str>           - Compatibility level (v2 [0.10] or v3 [1.1])",
     FOR_QCOW2},
    {"compression_type", set_compression_type,
     "<str> - Compression method used for image cluster compression: zlib, zstd", FOR_QCOW2},
    {"data_file", set_data_file, "<str>        - File name of an external data file", FOR_QCOW2},
    {"data_file_raw", set_data_file_raw,
     "<bool (on/off)> - The external data file must stay valid as a raw image", FOR_QCOW2},
    {"extended_l2", set_extended_l2, "<bool (on/off)> - Extended L2 tables", FOR_QCOW2},
    {"lazy_refcounts", set_lazy_refcounts, "<bool (on/off)> - Postpone refcount updates",
     FOR_QCOW2},
    {"preallocation", set_preallocation,
     "<str>    - Preallocation mode (allowed values: off, metadata, falloc, full)",
     FOR_RAW | FOR_QCOW2},
    {"refcount_bits", set_refcount_bits, "<num>    - Width of a reference count entry in bits",
     FOR_QCOW2},
    {"size", set_size, "<size>            - Virtual disk size", FOR_RAW | FOR_QCOW2 | FOR_LUKS},
    {"detached-header", set_detached_header,
     "<bool (on/off)> - Make the header alone; the disk is another file", FOR_LUKS},
    /* What can only be off, or is refused; it is not shown. */
    {"encryption", set_encryption, NULL, FOR_QCOW2},
    {"extent_size_hint", refuse, NULL, FOR_RAW | FOR_QCOW2},
    {"nocow", refuse, NULL, FOR_RAW | FOR_QCOW2},
};

int create_options_init(struct create_options *o, const char *format, struct error **err)
{
    *o = (struct create_options){.version = 3, .cluster_size = 64 * KIB, .refcount_bits = 16};
    if (!image_format_known(format))
        return error_set(err, EINVAL, "Unknown file format '%s'", format);
    if (!image_format_written(format))
        return error_set(err, ENOTSUP, "Images of format '%s' can be read, but not made", format);
    o->format = strcmp(format, "raw") == 0     ? "raw"
                : strcmp(format, "qcow2") == 0 ? "qcow2"
                                               : "luks";
    return 0;
}

void create_options_release(struct create_options *o)
{
    free(o->preallocation_text);
    free(o->backing_file);
    free(o->backing_format);
    free(o->compat);
    free(o->data_file);
    encryption_release(&o->encryption);
}

static const char *encryption_prefix(const char *format)
{
    return strcmp(format, "qcow2") == 0 ? "encrypt." : "";
}

/* Does the format have it? Encrypted ones have the options of encryption beside it. */
static bool is_option_of(const struct known_option *k, const char *format)
{
    unsigned bit = strcmp(format, "raw") == 0     ? FOR_RAW
                   : strcmp(format, "qcow2") == 0 ? FOR_QCOW2
                                                  : FOR_LUKS;

    return k->formats & bit;
}

/* -ENOENT: it is no option of encryption. */
static int set_encryption_option(struct create_options *o, const char *item, const char *value)
{
    const char *prefix = encryption_prefix(o->format);

    if (strcmp(o->format, "raw") == 0 || strncmp(item, prefix, strlen(prefix)) != 0)
        return -ENOENT;
    return encryption_set(&o->encryption, item + strlen(prefix), value);
}

static int set_one(struct create_options *o, char *item, struct error **err)
{
    char *equals = strchr(item, '=');
    const char *value = equals ? equals + 1 : "on";

    if (equals)
        *equals = '\0';
    for (size_t i = 0; i < ARRAY_SIZE(known); i++) {
        const struct known_option *k = &known[i];

        if (strcmp(item, k->name) == 0 && is_option_of(k, o->format)) {
            int r = k->set(o, value, err);

            return r < 0 ? error_wrap(err, r, "option '%s'", k->name) : 0;
        }
    }
    return set_encryption_option(o, item, value) == 0
               ? 0
               : error_set(err, EINVAL, "Invalid parameter '%s'", item);
}

/* Cuts off the first item; `,,` in it becomes a comma. Returns what follows, or NULL. */
static char *cut_item(char *text)
{
    char *to = text;

    for (; *text; text++) {
        if (*text == ',' && *++text != ',') {
            *to = '\0';
            return text;
        }
        *to++ = *text;
    }
    *to = '\0';
    return NULL;
}

int create_options_read(struct create_options *o, const char *text, struct error **err)
{
    AUTO(free_ptr) char *copy = xstrdup(text);
    char *item = copy;
    int r = 0;

    while (r == 0 && item && *item) {
        char *next = cut_item(item);

        r = set_one(o, item, err);
        item = next;
    }
    return r;
}

/* Also where it is one of several. */
static bool asks_for_help(const char *text)
{
    AUTO(free_ptr) char *copy = xstrdup(text);

    for (char *item = copy; item && *item;) {
        char *next = cut_item(item);

        if (strcmp(item, "help") == 0 || strcmp(item, "?") == 0)
            return true;
        item = next;
    }
    return false;
}

bool create_options_help(const char *format, const char *text)
{
    if (!asks_for_help(text))
        return false;
    printf("Supported %s options:\n", format);
    for (size_t i = 0; i < ARRAY_SIZE(known); i++) {
        if (known[i].help && is_option_of(&known[i], format))
            printf("  %s=%s\n", known[i].name, known[i].help);
    }
    if (strcmp(format, "raw") != 0)
        encryption_help(encryption_prefix(format));
    return true;
}

static unsigned bits_of(uint64_t power)
{
    return (unsigned)__builtin_ctzll(power);
}

int create_options_luks_len(const struct create_options *o, uint64_t *ret, struct error **err)
{
    *ret = 0;
    if (strcmp(o->format, "luks") != 0 && !encryption_is_given(&o->encryption))
        return 0;
    if (strcmp(o->format, "qcow2") == 0 && !o->encryption.format)
        return error_set(err, EINVAL, "'encrypt.format' is needed: it is luks");
    return encryption_len(&o->encryption, ret, err);
}

int create_options_layout(const struct create_options *o, struct qcow2_layout *ret,
                          struct error **err)
{
    struct qcow2_create_options q = {
        .size = o->size,
        .cluster_bits = bits_of(o->cluster_size),
        .refcount_order = bits_of(o->refcount_bits),
        .version = o->version,
        .backing_file = o->backing_file,
        .backing_format = o->backing_format,
        .preallocate_metadata = o->preallocation != PREALLOC_OFF,
        .lazy_refcounts = o->lazy_refcounts,
        .compression_type = o->compression_type,
        .data_file = o->data_file,
        .data_file_raw = o->data_file_raw,
        .extended_l2 = o->extended_l2,
    };

    int r = create_options_luks_len(o, &q.luks_len, err);

    return r < 0 ? r : qcow2_layout_make(&q, ret, err);
}

static void print_escaped(const char *key, const char *value)
{
    if (!value)
        return;
    printf(" %s=", key);
    for (; *value; value++)
        printf(*value == ',' ? ",," : "%c", *value);
}

void create_options_print(const struct create_options *o, const char *filename)
{
    printf("Formatting '%s', fmt=%s", filename, o->format);
    if (strcmp(o->format, "raw") == 0) {
        printf(" size=%" PRIu64, o->size);
        print_escaped("preallocation", o->preallocation_text);
        printf("\n");
        return;
    }
    if (strcmp(o->format, "luks") == 0) {
        if (o->encryption.detached)
            printf(" detached-header=true");
        else
            printf(" size=%" PRIu64, o->size);
        encryption_print(&o->encryption, "");
        printf("\n");
        return;
    }
    encryption_print(&o->encryption, "encrypt.");
    printf(" cluster_size=%" PRIu64 " extended_l2=%s", o->cluster_size,
           o->extended_l2 ? "on" : "off");
    print_escaped("preallocation", o->preallocation_text);
    printf(" compression_type=%s size=%" PRIu64,
           o->compression_type == QCOW2_COMPRESSION_ZSTD ? "zstd" : "zlib", o->size);
    print_escaped("compat", o->compat);
    print_escaped("backing_file", o->backing_file);
    print_escaped("backing_fmt", o->backing_format);
    print_escaped("data_file", o->data_file);
    if (o->data_file_raw)
        printf(" data_file_raw=on");
    printf(" lazy_refcounts=%s refcount_bits=%" PRIu64 "\n", o->lazy_refcounts ? "on" : "off",
           o->refcount_bits);
}

/* ---- making images ---- */

static int allocate(const char *path, uint64_t from, uint64_t len, struct error **err)
{
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    int r;

    if (fd < 0)
        return error_set(err, errno, "cannot open '%s': %s", path, strerror(errno));
    r = posix_fallocate(fd, (off_t)from, (off_t)len);
    close(fd);
    return r ? error_set(err, r, "cannot preallocate '%s': %s", path, strerror(r)) : 0;
}

static int co_fn write_zeroes(struct backend *b, uint64_t from, uint64_t to)
{
    struct iobuf *buf = iobuf_new(PIECE);
    int r = buf ? 0 : -ENOMEM;

    if (buf)
        memset(buf->data, 0, PIECE);
    while (r == 0 && from < to) {
        size_t len = (size_t)MIN((uint64_t)PIECE, to - from);

        r = image_co_write(b, from, buf->data, len, 0, buf);
        from += len;
    }
    iobuf_unref(buf);
    return r;
}

int create_co_preallocate(struct backend *b, const char *path, uint64_t from, uint64_t to,
                          enum preallocation how, struct error **err)
{
    int r = 0;

    if (from >= to)
        return 0;
    if (how == PREALLOC_FALLOC)
        return allocate(path, from, to - from, err);
    if (how == PREALLOC_FULL)
        r = write_zeroes(b, from, to);
    return r < 0 ? error_set(err, -r, "cannot preallocate '%s': %s", path, strerror(-r)) : 0;
}

static int co_fn write_segment(struct backend *b, const struct qcow2_layout *l,
                               const struct qcow2_segment *s, struct iobuf *buf)
{
    for (uint64_t done = 0; done < s->len;) {
        size_t len = (size_t)MIN((uint64_t)PIECE, s->len - done);
        int r;

        qcow2_layout_read(l, s->offset + done, buf->data, len);
        r = image_co_write(b, s->offset + done, buf->data, len, 0, buf);
        if (r < 0)
            return r;
        done += len;
    }
    return 0;
}

/* The header last, when the rest is durable: what a crash leaves half made is no image. */
static int co_fn write_layout(struct backend *b, const struct qcow2_layout *l)
{
    struct iobuf *buf = iobuf_new(PIECE);
    int r = buf ? 0 : -ENOMEM;

    for (unsigned i = l->segment_count; r == 0 && i-- > 0;) {
        if (i == 0)
            r = image_co_flush(b);
        if (r == 0)
            r = write_segment(b, l, &l->segments[i], buf);
    }
    iobuf_unref(buf);
    return r < 0 ? r : image_co_flush(b);
}

struct creation {
    struct graph *graph;
    const char *filename;
    const char *path;
    const struct create_options *o;
    struct qcow2_layout layout; /* of qcow2 */
    uint64_t luks_len;          /* of luks */
    struct backend *backend;
    bool is_device;
};

/* The file empty and of its size; a device without an image that was there. */
static int co_fn control_fn make_room(struct creation *c, uint64_t size, uint64_t metadata,
                                      struct error **err)
{
    int r;

    if (!c->is_device) {
        r = graph_co_resize(c->graph, "new", 0, err);
        return r < 0 ? r : graph_co_resize(c->graph, "new", size, err);
    }
    if (backend_size(c->backend) < size)
        return error_set(err, ENOSPC, "the device has %" PRIu64 " bytes, %" PRIu64 " are needed",
                         backend_size(c->backend), size);
    r = image_co_zero(c->backend, 0, metadata, 0);
    return r < 0 ? error_set(err, -r, "%s", strerror(-r)) : 0;
}

static int co_fn control_fn fill_raw(struct creation *c, struct error **err)
{
    uint64_t size = align_up(c->o->size, 512); /* as users of the peer know it */
    int r = make_room(c, size, 0, err);

    return r < 0 ? r
                 : create_co_preallocate(c->backend, c->path, 0, size, c->o->preallocation, err);
}

static int co_fn control_fn fill_luks(struct creation *c, struct error **err)
{
    int r = make_room(c, c->luks_len + align_up(c->o->size, LUKS_SECTOR), c->luks_len, err);

    return r < 0 ? r : encryption_co_make(&c->o->encryption, c->graph, c->backend, 0, err);
}

static int co_fn control_fn fill_qcow2(struct creation *c, struct error **err)
{
    const struct qcow2_layout *l = &c->layout;
    int r = make_room(c, l->file_size, l->data_offset, err);

    if (r == 0)
        r = create_co_preallocate(c->backend, c->path, l->data_offset, l->file_size,
                                  c->o->preallocation, err);
    if (r == 0 && l->luks_len)
        r = encryption_co_make(&c->o->encryption, c->graph, c->backend, l->luks_offset, err);
    if (r < 0)
        return r;
    r = write_layout(c->backend, l);
    return r < 0 ? error_set(err, -r, "%s", strerror(-r)) : 0;
}

static int co_fn control_fn fill(struct creation *c, json_t *definition, struct error **err)
{
    struct access access = {.wants = ACCESS_READ | ACCESS_WRITE | ACCESS_RESIZE,
                            .tolerates = ACCESS_RESIZE};
    int r = image_co_add_node(c->graph, definition, err);

    if (r < 0)
        return r;
    r = image_co_backend(&c->backend, c->graph, "new", access, err);
    if (r == 0)
        r = strcmp(c->o->format, "raw") == 0     ? fill_raw(c, err)
            : strcmp(c->o->format, "qcow2") == 0 ? fill_qcow2(c, err)
                                                 : fill_luks(c, err);
    c->backend = backend_co_free(c->backend);
    if (r < 0) {
        AUTO(error_free) struct error *ignored = NULL; /* the first one is the one to tell */

        (void)graph_co_del(c->graph, "new", &ignored);
        return r;
    }
    return graph_co_del(c->graph, "new", err);
}

static bool is_same_file(const char *path, const char *other)
{
    struct stat a;
    struct stat b;

    return strcmp(path, other) == 0 || (stat(path, &a) == 0 && stat(other, &b) == 0 &&
                                        a.st_dev == b.st_dev && a.st_ino == b.st_ino);
}

/* The file that holds the data of the image, first: it is there when the image is. */
static int co_fn control_fn create_data_file(struct graph *g, const char *filename,
                                             const struct create_options *o, unsigned flags,
                                             struct error **err)
{
    AUTO(free_ptr) char *path = image_data_path(filename, o->data_file);
    AUTO(free_ptr)
    char *backing = o->backing_file ? image_combine(filename, o->backing_file) : NULL;
    struct create_options raw = {
        .format = "raw",
        .size = align_up(o->size, 512),
        .preallocation = o->preallocation == PREALLOC_METADATA ? PREALLOC_OFF : o->preallocation,
    };

    if (is_same_file(path, filename))
        return error_set(err, EINVAL, "an image cannot be its own data file");
    if (backing && is_same_file(path, backing))
        return error_set(err, EINVAL, "the backing file '%s' cannot be the data file, too",
                         backing);
    return create_co_image(g, path, &raw, flags, err);
}

static int check_qcow2(struct creation *c, struct error **err)
{
    /* What nobody has written decrypts to anything, and only version 3 can say that it is zeroes. */
    if (c->o->version < 3 && c->o->encryption.format && c->o->preallocation != PREALLOC_OFF)
        return error_set(err, EINVAL, "preallocation of encrypted images needs compat=1.1");
    return create_options_layout(c->o, &c->layout, err);
}

static int check(struct creation *c, struct error **err)
{
    const struct create_options *o = c->o;

    if (strcmp(o->format, "qcow2") == 0)
        return check_qcow2(c, err);
    if (o->encryption.detached && o->size)
        return error_set(err, EINVAL,
                         "detached-header: the disk is another file, and this one is the header "
                         "alone");
    if (strcmp(o->format, "luks") == 0)
        return create_options_luks_len(o, &c->luks_len, err);
    if (o->preallocation == PREALLOC_METADATA)
        return error_set(err, EINVAL, "raw images have no metadata to preallocate");
    return 0;
}

int create_co_image(struct graph *g, const char *filename, const struct create_options *o,
                    unsigned flags, struct error **err)
{
    struct creation c = {.graph = g, .filename = filename, .o = o};
    json_t *definition = NULL;
    const char *path;
    bool is_new;
    int fd;
    int r = check(&c, err);

    if (r == 0 && o->data_file)
        r = create_data_file(g, filename, o, flags, err);
    if (r == 0)
        r = image_file_definition(filename, &definition, err);
    if (r < 0)
        return r;
    c.path = path = json_string_value(json_object_get(definition, "filename"));
    if (!path) {
        json_decref(definition);
        return error_set(err, ENOTSUP, "'%s': images are made in files and devices only", filename);
    }
    c.is_device =
        strcmp(json_string_value(json_object_get(definition, "driver")), "host_device") == 0;
    r = image_refuse_in_use(g, path, err);
    if (r < 0) {
        json_decref(definition);
        return r;
    }
    is_new = access(path, F_OK) < 0;
    fd = c.is_device ? -1 : open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0644);
    if (fd < 0 && !c.is_device) {
        r = error_set(err, errno, "Could not create '%s': %s", path, strerror(errno));
        json_decref(definition);
        return r;
    }
    if (fd >= 0)
        close(fd);
    json_object_set_new(definition, "node-name", json_string("new"));
    json_object_set_new(definition, "discard", json_string("unmap"));
    json_object_set_new(definition, "cache",
                        json_pack("{s:b, s:b}", "direct", !!(flags & IMAGE_DIRECT), "no-flush",
                                  !!(flags & IMAGE_NO_FLUSH)));
    json_incref(definition); /* `path` is in it */
    r = fill(&c, definition, err);
    if (r < 0 && is_new && !c.is_device)
        (void)unlink(path); /* of no use to anyone */
    json_decref(definition);
    return r;
}
