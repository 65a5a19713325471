/* SPDX-License-Identifier: Apache-2.0 */
/* Opening and closing the image, its size, and what it is made of. */
#include "base/alloc.h"
#include "base/macros.h"
#include "cli/cli.h"
#include "cli/image/create-options.h"
#include "cli/image/extent-walk.h"
#include "cli/image/info.h"
#include "cli/image/tool.h"
#include "cli/io/io.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define SECTOR 512

#define OVERLAY_NODE "overlay"

/* ---- opening ---- */

void io_open_release(struct io_open *how)
{
    free(how->name);
    free(how->format);
    *how = (struct io_open){.name = NULL};
}

/* What the commands use: a temporary layer over the image. */
static int co_fn control_fn open_overlay(struct io *io, const struct io_open *how,
                                         struct error **err)
{
    struct access access = {.wants = ACCESS_READ, .tolerates = ACCESS_READ};
    int r = image_co_add_overlay(io->graph, OVERLAY_NODE, io->image.layers[0].node,
                                 image_size(&io->image),
                                 how->flags & IMAGE_NO_DISCARD ? "ignore" : "unmap", "off", err);

    if (r < 0)
        return r;
    io->has_overlay = true;
    access.wants |= how->flags & IMAGE_WRITE ? ACCESS_WRITE : 0;
    return image_co_backend(&io->image.backend, io->graph, OVERLAY_NODE, access, err);
}

static void co_fn control_fn close_all(struct io *io)
{
    AUTO(error_free) struct error *ignored = NULL; /* it is closed with the graph */

    if (io->has_overlay) {
        io->image.backend = backend_co_free(io->image.backend);
        (void)graph_co_del(io->graph, OVERLAY_NODE, &ignored);
    }
    io->has_overlay = false;
    image_co_close(&io->image);
}

int io_open_image(struct io *io, struct io_open *how, struct error **err)
{
    struct image_spec spec = {
        .name = how->name,
        .format = how->format,
        .options = how->options,
        .flags = how->flags,
    };
    int r;

    if (how->overlay)
        spec.flags = (spec.flags & ~(unsigned)IMAGE_WRITE) | IMAGE_NODES;
    else if (how->flags & IMAGE_SHARE && how->flags & IMAGE_WRITE)
        return error_set(err, EINVAL, "-U needs -r: what others write to is only read");
    r = image_co_open(&io->image, io->graph, "i", &spec, err);
    if (r == 0 && how->overlay)
        r = open_overlay(io, how, err);
    if (r < 0) {
        close_all(io);
        return r;
    }
    io->is_open = true;
    io->how = *how;
    *how = (struct io_open){.name = NULL};
    io_find_fault(io);
    if (spec.flags & IMAGE_WRITE)
        image_warn_probed(&io->image);
    return 0;
}

void io_close_image(struct io *io)
{
    if (!io->is_open)
        return;
    io_join(io);
    io->fault = NULL;
    close_all(io);
    io_open_release(&io->how);
    io->is_open = false;
}

struct io_open io_open_default(void)
{
    return (struct io_open){.flags = IMAGE_WRITE, .writethrough = true};
}

static int read_cache(struct io_open *how, const char *text, struct error **err)
{
    struct tool_cache cache;
    int r = tool_read_cache(text, &cache, err);

    if (r < 0)
        return r;
    how->flags &= ~(unsigned)(IMAGE_DIRECT | IMAGE_NO_FLUSH);
    how->flags |= cache.flags;
    how->writethrough = cache.writethrough;
    return 0;
}

static int read_discard(struct io_open *how, const char *text, struct error **err)
{
    bool unmaps = strcmp(text, "unmap") == 0 || strcmp(text, "on") == 0;

    if (!unmaps && strcmp(text, "ignore") != 0 && strcmp(text, "off") != 0)
        return error_set(err, EINVAL, "Invalid discard option: %s", text);
    how->flags &= ~(unsigned)IMAGE_NO_DISCARD;
    how->flags |= unmaps ? 0 : IMAGE_NO_DISCARD;
    return 0;
}

int io_open_option(struct io_open *how, int option, const char *value, struct error **err)
{
    switch (option) {
    case IO_OPEN_READ_ONLY:
        how->flags &= ~(unsigned)IMAGE_WRITE;
        return 0;
    case IO_OPEN_NO_CACHE:
        return read_cache(how, "none", err);
    case IO_OPEN_SHARE:
        how->flags |= IMAGE_SHARE;
        return 0;
    case IO_OPEN_CACHE:
        return read_cache(how, value, err);
    case IO_OPEN_DISCARD:
        return read_discard(how, value, err);
    case IO_OPEN_OVERLAY:
        how->overlay = true;
        return 0;
    case 'C':
        return error_set(err, ENOTSUP, "-C: copy-on-read is not supported yet");
    case 'm':
        return error_set(err, ENOTSUP, "-m: memory is aligned as the image needs it");
    case 'k':
        return error_set(err, ENOTSUP, "-k: the way of doing I/O is chosen for all images");
    case 'i':
        return error_set(err, ENOTSUP, "-i %s: the way of doing I/O is chosen for all images",
                         value);
    default:
        return 1;
    }
}

/* A path as a value among options. */
static char *with_path(const char *options, const char *path)
{
    char *doubled = xnew_n(char, 2 * strlen(path) + 1);
    char *text;
    size_t n = 0;

    for (; *path; path++) {
        doubled[n++] = *path;
        if (*path == ',')
            doubled[n++] = ',';
    }
    doubled[n] = '\0';
    text = xasprintf("%s,file.filename=%s", options, doubled);
    free(doubled);
    return text;
}

static void add_options(struct io_open *how, const char *text)
{
    char *all = how->name ? xasprintf("%s,%s", how->name, text) : xstrdup(text);

    free(how->name);
    how->name = all;
    how->options = true;
}

static int open_arguments(struct io_open *how, int argc, char **argv)
{
    struct error *err = NULL;
    int r = 0;
    int opt;

    while (r == 0 && (opt = getopt(argc, argv, "snCro:ki:t:d:U")) != -1) {
        if (opt == 'o')
            add_options(how, optarg);
        else
            r = opt == '?' ? 1 : io_open_option(how, opt, optarg, &err);
    }
    if (r > 0 || (r == 0 && argc - optind > 1))
        return io_wrong_usage(argv[0]);
    if (r == 0 && optind < argc) {
        char *name = how->options ? with_path(how->name, argv[optind]) : xstrdup(argv[optind]);

        free(how->name);
        how->name = name;
    }
    if (r < 0) {
        (void)io_say("%s", error_text(err));
        error_free(&err);
        return r;
    }
    return how->name ? 0 : io_say("can't open: no path is given, and no options");
}

int co_fn control_fn io_cmd_open(struct io *io, int argc, char **argv)
{
    struct io_open how = io_open_default();
    struct error *err = NULL;
    int r = open_arguments(&how, argc, argv);

    if (r == 0 && io->is_open)
        r = io_say("file open already, try 'help close'");
    else if (r == 0)
        r = io_open_image(io, &how, &err);
    if (r < 0 && err)
        (void)io_say("%s", error_text(err));
    error_free(&err);
    io_open_release(&how);
    return r;
}

int co_fn control_fn io_cmd_close(struct io *io, int argc, char **argv)
{
    (void)argc;
    (void)argv;
    io_close_image(io);
    return 0;
}

static int reopen_arguments(struct io_open *how, int argc, char **argv, struct error **err)
{
    bool has_mode = false;
    bool has_cache = false;
    int r = 0;
    int opt;

    while (r == 0 && (opt = getopt(argc, argv, "rwc:o:")) != -1) {
        switch (opt) {
        case 'r':
        case 'w':
            if (has_mode)
                return error_set(err, EINVAL, "Only one -r/-w option may be given");
            has_mode = true;
            how->flags &= ~(unsigned)IMAGE_WRITE;
            how->flags |= opt == 'w' ? IMAGE_WRITE : 0;
            break;
        case 'c':
            if (has_cache)
                return error_set(err, EINVAL, "Only one -c option may be given");
            has_cache = true;
            r = read_cache(how, optarg, err);
            break;
        case 'o':
            return error_set(err, ENOTSUP, "-o %s: close the image, and open it with other options",
                             optarg);
        default:
            return 1;
        }
    }
    return r == 0 && optind < argc ? 1 : r;
}

static struct io_open open_copy(const struct io_open *how)
{
    struct io_open copy = *how;

    copy.name = xstrdup(how->name);
    copy.format = how->format ? xstrdup(how->format) : NULL;
    return copy;
}

int co_fn control_fn io_cmd_reopen(struct io *io, int argc, char **argv)
{
    struct io_open before = open_copy(&io->how);
    struct io_open how = open_copy(&io->how);
    struct error *err = NULL;
    int r = reopen_arguments(&how, argc, argv, &err);

    if (r == 0) {
        io_close_image(io);
        r = io_open_image(io, &how, &err);
        if (r < 0) {
            AUTO(error_free) struct error *ignored = NULL; /* then it is closed */

            (void)io_open_image(io, &before, &ignored);
        }
    } else if (r > 0) {
        r = io_wrong_usage(argv[0]);
    }
    if (err)
        (void)io_say("%s", error_text(err));
    error_free(&err);
    io_open_release(&before);
    io_open_release(&how);
    return r;
}

/* ---- size ---- */

int co_fn control_fn io_cmd_flush(struct io *io, int argc, char **argv)
{
    int r = image_co_flush(io->image.backend);

    (void)argc;
    (void)argv;
    return r < 0 ? io_say("flush failed: %s", strerror(-r)) : 0;
}

int co_fn control_fn io_cmd_truncate(struct io *io, int argc, char **argv)
{
    enum preallocation preallocation = PREALLOC_OFF;
    struct error *err = NULL;
    uint64_t size;
    int r = 0;
    int opt;

    if (io->has_overlay)
        return io_say("truncate: a temporary snapshot keeps its size");
    while (r == 0 && (opt = getopt(argc, argv, "m:")) != -1) {
        if (opt != 'm')
            return io_wrong_usage(argv[0]);
        r = preallocation_read(optarg, &preallocation, &err);
    }
    if (r == 0 && optind != argc - 1)
        return io_wrong_usage(argv[0]);
    if (r == 0)
        r = io_read_size(argv[optind], &size);
    if (r == 0)
        r = image_co_resize(&io->image, size, preallocation, &err);
    if (err)
        (void)io_say("%s", error_text(err));
    error_free(&err);
    return r;
}

int io_cmd_length(struct io *io, int argc, char **argv)
{
    char text[64];

    (void)argc;
    (void)argv;
    io_size_text(text, sizeof(text), (double)image_size(&io->image));
    printf("%s\n", text);
    return 0;
}

/* ---- what it is ---- */

/* Where the state of a machine would lie: behind the disk, where a new L2 table begins. */
static uint64_t state_offset(const struct qcow2_header *h, uint64_t size)
{
    uint64_t cluster = qcow2_header_cluster_size(h);
    uint64_t covered = cluster * (cluster / sizeof(uint64_t)); /* by one L2 table */

    return (size + covered - 1) / covered * covered;
}

static int co_fn control_fn print_qcow2(struct io *io, struct error **err)
{
    const struct image_layer *top = &io->image.layers[0];
    struct info_tables tables;
    int r = info_tables_co_read(&tables, io->graph, top, err);

    if (r == 0)
        info_print_specific(top, &tables);
    info_tables_release(&tables);
    return r;
}

int co_fn control_fn io_cmd_info(struct io *io, int argc, char **argv)
{
    const struct image_layer *top = &io->image.layers[0];
    bool is_qcow2 = top->header.version != 0;
    struct error *err = NULL;
    char cluster[64];
    char state[64];
    int r = 0;

    (void)argc;
    (void)argv;
    io_size_text(cluster, sizeof(cluster),
                 is_qcow2 ? (double)qcow2_header_cluster_size(&top->header) : 0);
    io_size_text(state, sizeof(state),
                 is_qcow2 ? (double)state_offset(&top->header, image_size(&io->image)) : 0);
    printf("format name: %s\ncluster size: %s\nvm state offset: %s\n", top->format, cluster, state);
    if (is_qcow2)
        r = print_qcow2(io, &err);
    if (err)
        (void)io_say("%s", error_text(err));
    error_free(&err);
    return r;
}

/* ---- what is allocated ---- */

/* A format that has no layers holds everything itself. */
static bool has_layers(const struct io *io)
{
    return io->has_overlay || io->image.layers[0].header.version != 0;
}

/* How much from `offset` on is of one kind, at most `len`. */
static int co_fn allocated_run(struct io *io, struct extent_walk *w, uint64_t offset, uint64_t len,
                               bool *ret_allocated, uint64_t *ret_len)
{
    uint64_t at = offset;
    int r = 0;

    *ret_allocated = true;
    while (r == 0 && at < offset + len && has_layers(io)) {
        struct extent e;
        bool allocated;

        r = extent_walk_at(w, at, offset + len - at, &e);
        allocated = e.flags & EXTENT_ALLOCATED;
        if (r < 0 || (at > offset && allocated != *ret_allocated))
            break;
        *ret_allocated = allocated;
        at += e.len;
    }
    *ret_len = has_layers(io) ? at - offset : len;
    return r;
}

int co_fn control_fn io_cmd_alloc(struct io *io, int argc, char **argv)
{
    AUTO(free_ptr) struct extent_walk *w = xnew(struct extent_walk);
    uint64_t size = image_size(&io->image);
    uint64_t count = SECTOR;
    uint64_t sum = 0;
    uint64_t offset;
    char text[64];
    int r = io_read_size(argv[1], &offset);

    if (r == 0 && argc > 2)
        r = io_read_size(argv[2], &count);
    if (r < 0)
        return r;
    w->backend = io->image.backend;
    count = offset < size ? MIN(count, size - offset) : 0;
    for (uint64_t at = 0; at < count;) {
        bool allocated;
        uint64_t len;

        r = allocated_run(io, w, offset + at, count - at, &allocated, &len);
        if (r < 0)
            return io_say("alloc: cannot read the image's metadata: %s", strerror(-r));
        sum += allocated ? len : 0;
        at += len;
    }
    io_size_text(text, sizeof(text), (double)offset);
    printf("%" PRIu64 "/%" PRIu64 " bytes allocated at offset %s\n", sum, count, text);
    return 0;
}

int co_fn control_fn io_cmd_map(struct io *io, int argc, char **argv)
{
    AUTO(free_ptr) struct extent_walk *w = xnew(struct extent_walk);
    uint64_t size = image_size(&io->image);

    (void)argc;
    (void)argv;
    w->backend = io->image.backend;
    for (uint64_t at = 0; at < size;) {
        bool allocated;
        uint64_t len;
        char length[64];
        char offset[64];
        int r = allocated_run(io, w, at, size - at, &allocated, &len);

        if (r < 0)
            return io_say("map: cannot read the image's metadata: %s", strerror(-r));
        io_size_text(length, sizeof(length), (double)len);
        io_size_text(offset, sizeof(offset), (double)at);
        printf("%s (0x%" PRIx64 ") bytes %s allocated at offset %s (0x%" PRIx64 ")\n", length, len,
               allocated ? "   " : "not", offset, at);
        at += len;
    }
    return 0;
}
