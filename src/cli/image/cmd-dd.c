/* SPDX-License-Identifier: Apache-2.0 */
/* cairn dd: a part of a disk as a new image. */
#include "base/checked.h"
#include "base/macros.h"
#include "cli/image/create-options.h"
#include "cli/image/image-copy.h"
#include "cli/image/tool.h"

#include <errno.h>
#include <string.h>

struct dd {
    struct image_spec source;
    const char *target;
    const char *format;
    uint64_t block;
    bool has_count;
    uint64_t count;
    uint64_t skip;

    struct image from;
    struct image to;
};

/* Where it begins and how much it is. */
static void window(const struct dd *d, uint64_t *ret_from, uint64_t *ret_len)
{
    uint64_t size = image_size(&d->from);
    uint64_t from;
    uint64_t most;

    *ret_from = *ret_len = 0;
    if (!checked_mul(d->skip, d->block, &from) || from > size) {
        cli_warn("%s: cannot skip to specified offset", d->source.name);
        return;
    }
    *ret_from = from;
    *ret_len = size - from;
    if (d->has_count && checked_mul(d->count, d->block, &most))
        *ret_len = MIN(*ret_len, most);
}

static int co_fn control_fn copy(struct dd *d, uint64_t from, uint64_t len, struct error **err)
{
    struct image_copy_source source = {.backend = d->from.backend, .from = from, .size = len};
    const struct image_layer *top = &d->to.layers[0];
    struct tool_progress progress;
    struct image_copy copy = {
        .sources = &source,
        .source_count = 1,
        .target = d->to.backend,
        .target_name = d->target,
        .size = len,
        .sparse = 4096,
        .unit = top->header.version ? qcow2_header_cluster_size(&top->header) : 512,
        .in_order = true,
        .workers = 8,
        .progress = &progress,
        /* A device is not zeroes; what is new is. */
        .target_zero = top->header.version || graph_find(d->to.graph, top->file_node) == NULL ||
                       node_grows(graph_find(d->to.graph, top->file_node)),
    };
    int r;

    tool_progress_begin(&progress, false, len);
    r = image_co_copy(&copy, err);
    if (r == 0 && image_co_flush(d->to.backend) < 0)
        r = error_set(err, EIO, "cannot flush '%s'", d->target);
    tool_progress_end(&progress, r == 0);
    return r;
}

static int co_fn control_fn dd(struct graph *g, void *arg, struct error **err)
{
    struct dd *d = arg;
    struct create_options o;
    struct image_spec to = {
        .name = d->target,
        .format = d->format,
        .flags = IMAGE_WRITE | IMAGE_NO_BACKING,
    };
    uint64_t from = 0;
    uint64_t len = 0;
    int r = create_options_init(&o, d->format, err);

    if (r == 0)
        r = image_co_open(&d->from, g, "s", &d->source, err);
    if (r == 0) {
        window(d, &from, &len);
        o.size = len;
        r = create_co_image(g, d->target, &o, 0, err);
        if (r < 0)
            r = error_wrap(err, r, "%s: error while creating output image", d->target);
    }
    if (r == 0)
        r = image_co_open(&d->to, g, "t", &to, err);
    if (r == 0)
        r = copy(d, from, len, err);
    image_co_close(&d->to);
    image_co_close(&d->from);
    create_options_release(&o);
    return r;
}

static int read_operand(struct dd *d, const char *text, struct error **err)
{
    const char *value = strchr(text, '=');
    size_t len = value ? (size_t)(value++ - text) : 0;
    int r;

    if (len == 2 && memcmp(text, "if", 2) == 0) {
        d->source.name = value;
        return 0;
    }
    if (len == 2 && memcmp(text, "of", 2) == 0) {
        d->target = value;
        return 0;
    }
    if (len == 2 && memcmp(text, "bs", 2) == 0) {
        r = tool_read_size("bs", value, &d->block, err);
        if (r == 0 && (!d->block || d->block > INT32_MAX))
            r = error_set(err, EINVAL, "Invalid bs specified. Must be between 1 and 2147483647.");
        return r;
    }
    if (len == 5 && memcmp(text, "count", 5) == 0) {
        d->has_count = true;
        return tool_read_size("count", value, &d->count, err);
    }
    if (len == 4 && memcmp(text, "skip", 4) == 0)
        return tool_read_size("skip", value, &d->skip, err);
    return error_set(err, EINVAL, "unrecognized operand %s", text);
}

static int read_option(struct dd *d, int opt)
{
    switch (opt) {
    case 'O':
        d->format = optarg;
        return 0;
    default:
        return tool_image_option(&d->source, opt);
    }
}

static int dd_run(int argc, char **argv, struct error **err)
{
    static const struct option options[] = {
        TOOL_LONG_OPTIONS,
        {"force-share", no_argument, NULL, 'U'},
        {NULL, 0, NULL, 0},
    };
    struct dd d = {.format = "raw", .block = 512};
    int opt;
    int r = 0;

    while (r == 0 && (opt = tool_next_option(argc, argv, "f:O:U", options, err)) != -1)
        r = read_option(&d, opt);
    for (int i = optind; r == 0 && i < argc; i++)
        r = read_operand(&d, argv[i], err);
    if (r == 0 && (!d.source.name || !d.target))
        r = error_set(err, EINVAL, "Must specify both input and output files");
    if (r == 0)
        r = tool_check_format(&d.source, err);
    if (r < 0)
        return r;
    cli_catch_signals();
    return tool_run(dd, &d, err);
}

const struct cli_command dd_command = {
    .name = "dd",
    .summary = "copy a part of a disk to a new image",
    .arguments = "[OPTION]... [bs=SIZE] [count=N] [skip=N] if=FILE of=TARGET",
    .help =
        "Copies N blocks of SIZE bytes (512) of the disk of FILE, behind the first `skip` ones, to a new image TARGET.\n"
        "\n"
        "  -f FORMAT, -O FORMAT  of FILE (by default it is probed), of TARGET (raw, the default, or qcow2)\n"
        "      --image-opts      FILE is options: driver=qcow2,file.filename=PATH\n"
        "  -U, --force-share     although others write to FILE\n"
        "      --allow DIR       what images refer to may lie in DIR, too\n"
        "  -h, --help            say this and exit\n",
    .is_image_tool = true,
    .run = dd_run,
};
