/* SPDX-License-Identifier: Apache-2.0 */
/* cairn convert: copies disks into an image of another kind. */
#include "base/alloc.h"
#include "base/checked.h"
#include "base/macros.h"
#include "cli/image/create-options.h"
#include "cli/image/image-bitmaps.h"
#include "cli/image/image-copy.h"
#include "cli/image/tool.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define SOURCES_MAX 256

/* What is copied at a time unless -m says otherwise. */
#define USUAL_WORKERS           8L
#define COMPRESSING_WORKERS_MAX 128L

/* Less is not worth a thread. */
#define SMALL ((uint64_t)8 << 20)

struct convert {
    struct image_spec source; /* of each one, without its name */
    char **names;
    size_t count;
    const char *target;
    const char *format;
    bool has_format;
    char *options; /* -o, all of them */
    const char *backing_file;
    const char *backing_format;
    struct tool_cache target_cache;
    struct tool_cache source_cache;
    bool no_create;
    bool target_is_zero;
    bool target_options; /* the target's name is options */
    bool progress;
    bool unordered;
    bool compress;
    bool salvage;
    bool offload;
    bool bitmaps;
    bool skip_broken_bitmaps;
    bool has_sparse;
    uint64_t sparse;
    uint64_t workers; /* 0: as many as is usual */
    uint64_t rate;

    struct create_options o;
    struct image *sources;
    struct image_spec target_spec;
    struct image image; /* the target */
    uint64_t total;
};

static int co_fn control_fn open_sources(struct graph *g, struct convert *c, struct error **err)
{
    struct image_spec spec = c->source;
    int r = 0;

    spec.flags |= c->source_cache.flags & IMAGE_DIRECT;
    for (size_t i = 0; r == 0 && i < c->count; i++) {
        AUTO(free_ptr) char *prefix = xasprintf("s%zu-", i);

        spec.name = c->names[i];
        r = image_co_open(&c->sources[i], g, prefix, &spec, err);
        if (r == 0 && !checked_add(c->total, image_size(&c->sources[i]), &c->total))
            r = error_set(err, EFBIG, "the images are too large together");
    }
    return r;
}

static int co_fn control_fn check_backing(struct graph *g, const struct convert *c,
                                          struct error **err)
{
    AUTO(free_ptr) char *path = image_combine(c->target, c->o.backing_file);
    struct image_spec spec = {.name = path, .format = c->o.backing_format, .flags = IMAGE_HEADERS};
    struct image backing;
    int r = image_co_open(&backing, g, "b", &spec, err);

    image_co_close(&backing);
    return r;
}

static int co_fn control_fn make_target(struct graph *g, struct convert *c, struct error **err)
{
    int r = 0;

    if (c->no_create)
        return 0;
    if (!c->o.has_size)
        c->o.size = c->total;
    if (c->o.backing_file)
        r = check_backing(g, c, err);
    if (r < 0)
        return r;
    r = create_co_image(g, c->target, &c->o, c->target_cache.flags, err);
    return r < 0 ? error_wrap(err, r, "%s: error while converting %s", c->target, c->format) : 0;
}

static int co_fn control_fn open_target(struct graph *g, struct convert *c, struct error **err)
{
    struct image_spec spec = {
        .name = c->target,
        .format = c->target_options ? NULL : c->format,
        .options = c->target_options,
        .key_secret = c->no_create ? NULL : c->o.encryption.key_secret,
        .flags = IMAGE_WRITE | c->target_cache.flags,
    };
    int r;

    /* What lies below a new image need not be opened: nothing is read of it. */
    if (!c->no_create && !c->o.backing_file)
        spec.flags |= IMAGE_NO_BACKING;
    c->target_spec = spec;
    r = image_co_open(&c->image, g, "t", &spec, err);
    if (r == 0 && image_size(&c->image) < c->total)
        r = error_set(err, EINVAL, "output file is smaller than input file");
    return r;
}

static bool is_device(const struct image *image)
{
    struct stat st;

    return image->layers[0].path && stat(image->layers[0].path, &st) == 0 && !S_ISREG(st.st_mode);
}

/* A raw file that has as much space as it is long. */
static bool is_full(const struct image_layer *top)
{
    return strcmp(top->format, "raw") == 0 && top->disk_bytes >= top->file_size;
}

/* With compression, no processor shall wait for the next piece. */
static unsigned usual_workers(const struct convert *c)
{
    long processors = c->compress ? sysconf(_SC_NPROCESSORS_ONLN) : 0;

    return (unsigned)MIN(MAX(2 * processors, USUAL_WORKERS), COMPRESSING_WORKERS_MAX);
}

static int co_fn control_fn copy(struct convert *c, struct error **err)
{
    struct image_copy_source *from = xnew_n(struct image_copy_source, c->count);
    const struct image_layer *top = &c->image.layers[0];
    struct tool_progress progress;
    struct image_copy copy = {
        .sources = from,
        .source_count = c->count,
        .target = c->image.backend,
        .target_name = c->target,
        .size = c->total,
        .sparse = c->sparse,
        .unit = top->header.version ? qcow2_header_cluster_size(&top->header) : 512,
        .target_zero =
            c->target_is_zero || (!c->no_create && !c->o.backing_file && !is_device(&c->image) &&
                                  strcmp(c->format, "luks") != 0),
        .only_own = c->o.backing_file,
        .in_order = !c->unordered && !c->compress, /* where compressed bytes lie is all the same */
        .salvage = c->salvage,
        .offload = c->offload,
        .compress = c->compress,
        .writethrough = c->target_cache.writethrough,
        .workers = c->workers ? (unsigned)c->workers : usual_workers(c),
        .rate = c->rate,
        .progress = &progress,
    };
    uint64_t at = 0;
    int r;

    if (top->header.version && strcmp(top->format, "raw") == 0)
        copy.unit = 512;
    /* Who waits for his turn all the time gains nothing by a second thread, and pays for each time he is woken. */
    if (!copy.in_order && c->total > SMALL)
        copy.beside = tool_co_second_loop();
    for (size_t i = 0; i < c->count; i++) {
        from[i] = (struct image_copy_source){
            .backend = c->sources[i].backend,
            .begin = at,
            .size = image_size(&c->sources[i]),
            .is_full = is_full(&c->sources[i].layers[0]),
        };
        at += from[i].size;
    }
    tool_progress_begin(&progress, c->progress, c->total);
    r = image_co_copy(&copy, err);
    if (r == 0) {
        r = image_co_flush(c->image.backend);
        if (r < 0)
            r = error_set(err, -r, "cannot flush '%s': %s", c->target, strerror(-r));
    }
    tool_progress_end(&progress, r == 0);
    free(from);
    return r;
}

/* An image that stores bitmaps does so when it is closed, which fails without a word to us. */
static int co_fn control_fn close_target(struct graph *g, struct convert *c, struct error **err)
{
    size_t usable = image_bitmaps_usable(&c->image);

    image_co_close(&c->image);
    return image_bitmaps_co_check_stored(g, &c->target_spec, usable, err);
}

static int co_fn control_fn convert(struct graph *g, void *arg, struct error **err)
{
    struct convert *c = arg;
    int r;

    c->sources = xnew_n(struct image, c->count);
    r = open_sources(g, c, err);
    if (r == 0 && !c->target_options)
        r = image_refuse_in_use(g, c->target, err);
    if (r == 0 && c->o.has_size && c->o.size < c->total)
        r = error_set(err, EINVAL, "output file is smaller than input file");
    if (r == 0 && c->bitmaps)
        r = image_bitmaps_check(&c->sources[0], c->skip_broken_bitmaps, err);
    if (r == 0)
        r = make_target(g, c, err);
    if (r == 0)
        r = open_target(g, c, err);
    if (r == 0)
        r = copy(c, err);
    if (r == 0 && c->bitmaps)
        r = image_bitmaps_co_copy(&c->sources[0], &c->image, err);
    if (r == 0 && c->bitmaps)
        r = close_target(g, c, err);
    image_co_close(&c->image);
    for (size_t i = 0; i < c->count; i++)
        image_co_close(&c->sources[i]);
    free(c->sources);
    return r;
}

/* ---- options ---- */

static int check_new(struct convert *c, struct error **err)
{
    int r = create_options_init(&c->o, c->format, err);

    if (r == 0 && c->options)
        r = create_options_read(&c->o, c->options, err);
    if (r < 0)
        return r;
    if (c->backing_file || c->backing_format) {
        if (strcmp(c->format, "qcow2") != 0)
            return error_set(err, EINVAL, "Backing file not supported for file format '%s'",
                             c->format);
        if (c->o.backing_file)
            return error_set(err, EINVAL, "-B and -o backing_file exclude each other");
        c->o.backing_file = c->backing_file ? xstrdup(c->backing_file) : NULL;
        if (c->backing_format) {
            free(c->o.backing_format);
            c->o.backing_format = xstrdup(c->backing_format);
        }
    }
    if (c->o.backing_file && !c->o.backing_format)
        return error_set(err, EINVAL, "Use of backing file requires explicit backing format");
    if (c->o.backing_file && c->count > 1)
        return error_set(err, EINVAL,
                         "Having a backing file for the target makes no sense when concatenating "
                         "multiple input images");
    return 0;
}

static int check_compress(const struct convert *c, struct error **err)
{
    if (!c->compress)
        return 0;
    if (!c->no_create && strcmp(c->format, "qcow2") != 0)
        return error_set(err, EINVAL, "Compression not supported for this file format");
    return 0;
}

/* What needs to see the data cannot leave it to the host. */
static int check_offload(const struct convert *c, struct error **err)
{
    if (c->offload && c->compress)
        return error_set(err, EINVAL, "Cannot enable copy offloading when -c is used");
    if (c->offload && c->has_sparse)
        return error_set(err, EINVAL, "Cannot enable copy offloading when -S is used");
    if (c->offload && c->salvage)
        return error_set(err, EINVAL, "Cannot use copy offloading in salvaging mode");
    return 0;
}

static int check(struct convert *c, struct error **err)
{
    int r = tool_check_format(&c->source, err);

    if (r == 0)
        r = check_offload(c, err);
    if (r < 0)
        return r;
    r = check_compress(c, err);
    if (r < 0)
        return r;
    if (c->skip_broken_bitmaps && !c->bitmaps)
        return error_set(err, EINVAL, "Use of --skip-broken-bitmaps requires --bitmaps");
    if (c->bitmaps && c->count > 1)
        return error_set(err, EINVAL, "Copying bitmaps only possible with single source");
    if (c->bitmaps && c->source.snapshot)
        return error_set(err, EINVAL, "--bitmaps: a snapshot has none");
    if (c->bitmaps && !c->no_create && strcmp(c->format, "qcow2") != 0)
        return error_set(err, ENOTSUP, "Format driver '%s' does not support bitmaps", c->format);
    if (c->target_options && !c->no_create)
        return error_set(err, EINVAL, "--target-image-opts requires use of -n flag");
    if (c->target_options && c->has_format)
        return error_set(err, EINVAL, "--target-image-opts and -O exclude each other");
    if (c->target_is_zero && !c->no_create)
        return error_set(err, EINVAL, "--target-is-zero requires use of -n flag");
    if (c->no_create && c->options)
        return error_set(err, EINVAL, "-o has no effect when skipping image creation");
    if (c->no_create && (c->backing_file || c->backing_format))
        return error_set(err, EINVAL, "-B and -F have no effect when skipping image creation");
    if (c->has_sparse && c->sparse && (c->sparse % 512 || c->sparse > IMAGE_COPY_SPARSE_MAX))
        return error_set(err, EINVAL,
                         "Invalid buffer size for sparse output specified. Valid sizes are "
                         "multiples of 512 up to %" PRIu64 ". Select 0 to disable sparse detection "
                         "(fully allocates output).",
                         IMAGE_COPY_SPARSE_MAX);
    if (!image_format_known(c->format))
        return error_set(err, EINVAL, "Unknown file format '%s'", c->format);
    r = c->no_create ? 0 : check_new(c, err);
    if (r == 0 && c->bitmaps && c->o.version == 2)
        r = error_set(err, ENOTSUP, "images of version 2 (compat=0.10) cannot store bitmaps");
    if (r == 0 && c->compress && encryption_is_given(&c->o.encryption))
        r = error_set(err, EINVAL, "Compression and encryption not supported at the same time");
    return r;
}

enum { TARGET_OPTS = TOOL_FIRST_FREE, TARGET_ZERO, SALVAGE, BITMAPS, SKIP_BROKEN };

static int read_more(struct convert *c, int opt, struct error **err)
{
    switch (opt) {
    case 'S':
        c->has_sparse = true;
        return tool_read_size("buffer size for sparse output", optarg, &c->sparse, err);
    case 'm':
        return tool_read_number("number of coroutines", optarg, 1, IMAGE_COPY_WORKERS_MAX,
                                &c->workers, err);
    case 'r':
        return tool_read_size("rate limit", optarg, &c->rate, err);
    case 't':
        return tool_read_cache(optarg, &c->target_cache, err);
    case 'T':
        return tool_read_cache(optarg, &c->source_cache, err);
    case 'l':
        c->source.snapshot = optarg;
        return 0;
    case 'W':
        c->unordered = true;
        return 0;
    case 'c':
        c->compress = true;
        return 0;
    case 'C':
        c->offload = true;
        return 0;
    case TARGET_OPTS:
        c->target_options = true;
        return 0;
    case TARGET_ZERO:
        c->target_is_zero = true;
        return 0;
    case SALVAGE:
        c->salvage = true;
        return 0;
    case BITMAPS:
        c->bitmaps = true;
        return 0;
    case SKIP_BROKEN:
        c->skip_broken_bitmaps = true;
        return 0;
    default:
        return tool_image_option(&c->source, opt);
    }
}

static int read_option(struct convert *c, int opt, struct error **err)
{
    switch (opt) {
    case 'O':
        c->format = optarg;
        c->has_format = true;
        return 0;
    case 'B':
        c->backing_file = optarg;
        return 0;
    case 'F':
        c->backing_format = optarg;
        return 0;
    case 'o':
        return tool_join_options(&c->options, optarg, err);
    case 'n':
        c->no_create = true;
        return 0;
    case 'p':
        c->progress = true;
        return 0;
    case 'q':
        c->progress = false;
        return 0;
    default:
        return read_more(c, opt, err);
    }
}

static int convert_run(int argc, char **argv, struct error **err)
{
    static const struct option options[] = {
        TOOL_LONG_OPTIONS,
        {"source-format", required_argument, NULL, 'f'},
        {"force-share", no_argument, NULL, 'U'},
        {"target-image-opts", no_argument, NULL, TARGET_OPTS},
        {"target-is-zero", no_argument, NULL, TARGET_ZERO},
        {"salvage", no_argument, NULL, SALVAGE},
        {"bitmaps", no_argument, NULL, BITMAPS},
        {"skip-broken-bitmaps", no_argument, NULL, SKIP_BROKEN},
        {NULL, 0, NULL, 0},
    };
    struct convert c = {
        .format = "raw",
        .sparse = 4096,
        .target_cache.flags = IMAGE_NO_FLUSH,
    };
    int opt;
    int r = 0;

    while (r == 0 && (opt = tool_next_option(argc, argv, "f:O:B:F:o:npqS:m:r:t:T:UWcCl:", options,
                                             err)) != -1)
        r = read_option(&c, opt, err);
    if (r == 0 && c.options && image_format_known(c.format) &&
        create_options_help(c.format, c.options)) {
        free(c.options);
        return 0;
    }
    c.count = argc - optind > 1 ? (size_t)(argc - optind - 1) : 0;
    if (r == 0 && !c.count)
        r = error_set(err, EINVAL, "Must specify image file name");
    if (r == 0 && c.count > SOURCES_MAX)
        r = error_set(err, E2BIG, "there are more than %d images", SOURCES_MAX);
    if (r == 0 && c.count > 1 && c.source.snapshot)
        r = error_set(err, ENOTSUP, "No support for concatenating multiple snapshot");
    if (r == 0) {
        c.names = argv + optind;
        c.target = argv[argc - 1];
        r = check(&c, err);
    }
    cli_catch_signals();
    if (r == 0)
        r = tool_run(convert, &c, err);
    create_options_release(&c.o);
    free(c.options);
    return r;
}

const struct cli_command convert_command = {
    .name = "convert",
    .summary = "copy images into one of another kind",
    .arguments = "[OPTION]... FILE... TARGET",
    .help =
        "Copies the disk of FILE, or of several one behind the other, to a new image TARGET, in place of what it is.\n"
        "What is zero is left out; the cost follows the data.\n"
        "\n"
        "  -f FORMAT, -O FORMAT      of FILE (by default it is probed), of TARGET (raw, the default, or qcow2)\n"
        "  -o OPTION,...             of the target's format; `-o help` lists them\n"
        "  -B FILE, -F FORMAT        TARGET gets this backing file; only what lies above it is copied\n"
        "  -n                        TARGET is there already\n"
        "      --target-is-zero      and reads as zeroes\n"
        "      --target-image-opts   and is named by options\n"
        "  -S SIZE                   runs of zeroes are left out from this length on (4k); 0: nothing is\n"
        "  -C                        the host copies the data, or shares it, where it can; zeroes in it are not looked for\n"
        "  -m NUMBER, -W             so many pieces at a time (8); in any order\n"
        "  -r RATE                   at most so many bytes per second\n"
        "  -t CACHE, -T CACHE        of TARGET (unsafe), of FILE (writeback): none, writeback, writethrough,\n"
        "                            directsync, unsafe\n"
        "      --salvage             what cannot be read becomes zeroes\n"
        "      --bitmaps             TARGET gets the bitmaps that FILE stores\n"
        "      --skip-broken-bitmaps but for those that are inconsistent\n"
        "  -p, -q                    show progress; do not\n"
        "      --image-opts          FILE is options: driver=qcow2,file.filename=PATH\n"
        "  -l SNAPSHOT               the disk as an internal snapshot of FILE has it: an ID, a name, or\n"
        "                            snapshot.id=ID,snapshot.name=NAME\n"
        "  -U, --force-share         although others write to FILE\n"
        "      --allow DIR           what images refer to may lie in DIR, too\n"
        "  -h, --help                say this and exit\n",
    .is_image_tool = true,
    .run = convert_run,
};
