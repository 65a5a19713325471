/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cairn map: where the disk's content lies, layer by layer. Each layer is opened alone and asked for what it answers itself; what
 * it does not is asked of the next one.
 */
#include "base/alloc.h"
#include "base/checked.h"
#include "base/macros.h"
#include "cli/image/extent-walk.h"
#include "cli/image/tool.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct map {
    struct image_spec spec;
    bool json;
    uint64_t start;
    uint64_t max_len;
    bool has_max;
};

struct entry {
    uint64_t start;
    uint64_t len;
    size_t depth;
    bool present;
    bool zero;
    bool data;
    bool has_offset;
    uint64_t offset;
    const char *filename; /* NULL: not as it is in a file */
};

/* A file that data lies in. */
struct host {
    const struct node *node;
    struct extent_walk walk;
    char *filename;
    struct host *next;
};

struct mapping_walk {
    const struct map *map;
    struct image image;
    struct extent_walk *formats; /* one for each layer */
    struct host *hosts;          /* those that were met */
    struct entry current;        /* not printed yet, as what follows may continue it */
    bool printed;
};

static void print_text(const struct entry *e)
{
    if (e->data && !e->zero && e->has_offset && e->filename)
        printf("%#-16" PRIx64 "%#-16" PRIx64 "%#-16" PRIx64 "%s\n", e->start, e->len, e->offset,
               e->filename);
}

static const char *word(bool b)
{
    return b ? "true" : "false";
}

static void print_json(struct mapping_walk *w, const struct entry *e)
{
    printf("%s{ \"start\": %" PRIu64 ", \"length\": %" PRIu64
           ", \"depth\": %zu, \"present\": %s, \"zero\": %s, \"data\": %s",
           w->printed ? ",\n" : "[", e->start, e->len, e->depth, word(e->present), word(e->zero),
           word(e->data));
    if (e->has_offset)
        printf(", \"offset\": %" PRIu64, e->offset);
    printf("}");
    w->printed = true;
}

static void print_current(struct mapping_walk *w)
{
    if (!w->current.len)
        return;
    if (w->map->json)
        print_json(w, &w->current);
    else
        print_text(&w->current);
    w->current.len = 0;
}

static bool same_file(const struct entry *a, const struct entry *b)
{
    return !a->filename || !b->filename || strcmp(a->filename, b->filename) == 0;
}

static bool continues(const struct entry *a, const struct entry *b)
{
    return a->len && a->depth == b->depth && a->present == b->present && a->zero == b->zero &&
           a->data == b->data && a->has_offset == b->has_offset &&
           (!a->has_offset || (a->offset + a->len == b->offset && same_file(a, b)));
}

static int add(struct mapping_walk *w, const struct entry *e, struct error **err)
{
    if (continues(&w->current, e)) {
        w->current.len += e->len;
        return 0;
    }
    print_current(w);
    w->current = *e;
    if (!w->map->json && e->data && !e->zero && !e->has_offset)
        return error_set(err, ENOTSUP, "File contains external, encrypted or compressed clusters.");
    return 0;
}

/* As the peer names it: as the image does, seen from where the image is. */
static char *host_name(const struct image_layer *l, const struct node *host)
{
    const char *path = node_filename(host);
    const char *slash = path ? strrchr(path, '/') : NULL;

    if (l->data_node && strcmp(node_name(host), l->data_node) == 0)
        return xstrdup(l->data_filename);
    if (!l->imported || !path || strcmp(node_name(host), l->file_node) == 0)
        return xstrdup(l->filename);
    return image_combine(l->path, slash ? slash + 1 : path); /* one of several */
}

static int co_fn control_fn find_host(struct mapping_walk *w, const struct image_layer *l,
                                      const struct node *node, struct host **ret)
{
    AUTO(error_free) struct error *ignored = NULL; /* the number says what is needed */
    struct host *h = w->hosts;
    int r;

    while (h && h->node != node)
        h = h->next;
    if (!h) {
        h = xnew(struct host);
        r = image_co_backend(&h->walk.backend, w->image.graph, node_name(node),
                             (struct access){ACCESS_READ, ACCESS_ALL}, &ignored);
        if (r < 0) {
            free(h);
            return r;
        }
        h->node = node;
        h->filename = host_name(l, node);
        h->next = w->hosts;
        w->hosts = h;
    }
    *ret = h;
    return 0;
}

/* Data may lie where the file itself has a hole: it then reads as zeroes, too. */
static int co_fn control_fn refine(struct mapping_walk *w, const struct image_layer *l,
                                   const struct node *node, struct entry *e)
{
    struct extent x;
    struct host *h;
    uint64_t size;
    int r;

    e->filename = l->filename;
    if (!e->has_offset || strcmp(l->node, l->file_node) == 0)
        return 0;
    r = find_host(w, l, node, &h);
    if (r < 0)
        return r;
    e->filename = h->filename;
    if (!e->data)
        return 0;
    size = backend_size(h->walk.backend);
    if (e->offset >= size) {
        e->zero = true;
        return 0;
    }
    r = extent_walk_at(&h->walk, e->offset, MIN(e->len, size - e->offset), &x);
    if (r == 0) {
        e->len = x.len;
        e->zero = x.flags & EXTENT_ZERO;
    }
    return r;
}

/* What lies at `offset`, of `len` bytes at most. */
static int co_fn control_fn find(struct mapping_walk *w, uint64_t offset, uint64_t len,
                                 struct entry *e)
{
    size_t last = w->image.count - 1;

    *e = (struct entry){.start = offset, .len = len, .depth = last, .zero = true};
    for (size_t i = 0; i <= last; i++) {
        struct extent_walk *a = &w->formats[i];
        uint64_t size = backend_size(a->backend);
        struct extent x;
        int r;

        if (offset >= size) { /* a short backing file shows nothing, and nothing below it does */
            if (i == 0 && offset < image_size(&w->image)) { /* the rest of the last sector */
                e->present = true;
                e->depth = 0;
                e->has_offset = w->image.layers[0].path;
                e->offset = offset;
            } else { /* the layer above says so, by reaching further */
                e->depth = i ? i - 1 : 0;
            }
            return 0;
        }
        r = extent_walk_at(a, offset, MIN(e->len, size - offset), &x);
        if (r < 0)
            return r;
        e->len = x.len;
        if (!(x.flags & EXTENT_ALLOCATED) && i < last)
            continue;
        e->depth = i;
        e->present = x.flags & EXTENT_ALLOCATED;
        e->data = x.flags & EXTENT_DATA;
        e->zero = x.flags & EXTENT_ZERO;
        e->has_offset = x.flags & EXTENT_OFFSET_VALID;
        e->offset = x.host_offset;
        return refine(w, &w->image.layers[i], x.host, e);
    }
    return 0;
}

static int co_fn control_fn walk(struct mapping_walk *w, struct error **err)
{
    uint64_t size = image_size(&w->image);
    uint64_t at = w->map->start;
    uint64_t end = at < size && w->map->has_max ? at + MIN(w->map->max_len, size - at) : size;
    int r = 0;

    while (r == 0 && at < end) {
        struct entry e;

        r = find(w, at, end - at, &e);
        if (r < 0)
            return error_set(err, -r, "Failed to read image metadata: %s", strerror(-r));
        r = add(w, &e, err);
        at += e.len;
        if (r == 0 && cli_interrupted())
            r = cli_interrupted_error(err);
    }
    if (r == 0)
        print_current(w);
    if (r == 0 && w->map->json && !w->printed)
        print_json(w, &(struct entry){.start = at}); /* an empty range is said to be one */
    return r;
}

static int co_fn control_fn open_layers(struct mapping_walk *w, struct error **err)
{
    struct access access = {.wants = ACCESS_READ,
                            .tolerates = ACCESS_READ | ACCESS_WRITE_UNCHANGED};
    struct image *image = &w->image;
    int r = 0;

    w->formats = xnew_n(struct extent_walk, image->count);
    for (size_t i = 0; r == 0 && i < image->count; i++) {
        struct image_layer *l = &image->layers[i];

        r = image_co_backend(&w->formats[i].backend, image->graph, l->node, access, err);
    }
    return r;
}

static void co_fn control_fn close_layers(struct mapping_walk *w)
{
    struct host *h;

    while ((h = w->hosts)) {
        w->hosts = h->next;
        (void)backend_co_free(h->walk.backend);
        free(h->filename);
        free(h);
    }
    for (size_t i = 0; w->formats && i < w->image.count; i++)
        (void)backend_co_free(w->formats[i].backend);
    free(w->formats);
}

static int co_fn control_fn map(struct graph *g, void *arg, struct error **err)
{
    struct mapping_walk w = {.map = arg};
    int r = image_co_open(&w.image, g, "i", &w.map->spec, err);

    if (r == 0)
        r = open_layers(&w, err);
    if (r == 0 && !w.map->json)
        printf("%-16s%-16s%-16s%s\n", "Offset", "Length", "Mapped to", "File");
    if (r == 0)
        r = walk(&w, err);
    if (r == 0 && w.map->json)
        printf("]\n");
    close_layers(&w);
    image_co_close(&w.image);
    return r;
}

static int read_option(struct map *m, int opt, struct error **err)
{
    switch (opt) {
    case 's':
        return tool_read_size("start offset", optarg, &m->start, err);
    case 'l':
        m->has_max = true;
        return tool_read_size("max length", optarg, &m->max_len, err);
    case TOOL_OUTPUT:
        return tool_read_output(optarg, &m->json, err);
    default:
        return tool_image_option(&m->spec, opt);
    }
}

static int map_run(int argc, char **argv, struct error **err)
{
    static const struct option options[] = {
        TOOL_LONG_OPTIONS,
        {"format", required_argument, NULL, 'f'},
        {"output", required_argument, NULL, TOOL_OUTPUT},
        {"force-share", no_argument, NULL, 'U'},
        {"start-offset", required_argument, NULL, 's'},
        {"max-length", required_argument, NULL, 'l'},
        {NULL, 0, NULL, 0},
    };
    struct map m = {.spec.flags = IMAGE_SEPARATE};
    int opt;
    int r = 0;

    while (r == 0 && (opt = tool_next_option(argc, argv, "f:s:l:U", options, err)) != -1)
        r = read_option(&m, opt, err);
    if (r == 0)
        r = tool_only_image(&m.spec, argc, argv, err);
    if (r < 0)
        return r;
    cli_catch_signals();
    return tool_run(map, &m, err);
}

const struct cli_command map_command = {
    .name = "map",
    .summary = "say where an image's data lies",
    .arguments = "[OPTION]... FILE",
    .help =
        "Lists the ranges of the disk, and which file of the chain holds them. The text lists data only.\n"
        "\n"
        "  -f FORMAT                 of FILE: raw, qcow2, vdi, vhdx, vmdk, vpc; by default it is probed\n"
        "  -s, --start-offset SIZE   begin there\n"
        "  -l, --max-length SIZE     so much of it\n"
        "      --output FORMAT       human (default) or json\n"
        "      --image-opts          FILE is options: driver=qcow2,file.filename=PATH\n"
        "  -U, --force-share         although others write to it\n"
        "      --allow DIR           what images refer to may lie in DIR, too\n"
        "  -h, --help                say this and exit\n",
    .is_image_tool = true,
    .run = map_run,
};
