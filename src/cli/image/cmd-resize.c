/* SPDX-License-Identifier: Apache-2.0 */
/* cairn resize: another size for an image. */
#include "base/checked.h"
#include "base/macros.h"
#include "cli/image/create-options.h"
#include "cli/image/extent-walk.h"
#include "cli/image/tool.h"
#include "formats/qcow2/qcow2-preallocate.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

struct resize {
    struct image_spec spec;
    const char *text; /* of the size */
    uint64_t amount;
    enum preallocation preallocation;
    bool quiet;
    bool shrink;
};

static int new_size(const struct resize *x, uint64_t old, uint64_t *ret, struct error **err)
{
    *ret = x->amount;
    if (x->text[0] == '+' && !checked_add(old, x->amount, ret))
        return error_set(err, EFBIG, "the new size is too large");
    if (x->text[0] == '-')
        *ret = old - MIN(x->amount, old);
    if (!*ret)
        return error_set(err, EINVAL, "New image size must be positive");
    if (*ret < old && !x->shrink)
        return error_set(err, EINVAL,
                         "Use the --shrink option to perform a shrink operation: it deletes all "
                         "data beyond the new end.");
    return 0;
}

/* Clusters first, then space for what they are: all of it is mapped then, in whatever order it lies. */
static int co_fn control_fn preallocate_clusters(struct image *image, uint64_t from, uint64_t to,
                                                 enum preallocation how, struct error **err)
{
    struct extent_walk walk = {.backend = image->backend};
    int r = qcow2_co_preallocate(image->backend, from, to, err);

    if (r == 0 && how == PREALLOC_FULL)
        return create_co_preallocate(image->backend, image->layers[0].path, from, to, PREALLOC_FULL,
                                     err);
    while (r == 0 && how == PREALLOC_FALLOC && from < to) {
        struct extent e;

        r = extent_walk_at(&walk, from, to - from, &e);
        if (r < 0)
            return error_set(err, -r, "Failed to read block status: %s", strerror(-r));
        if (e.flags & EXTENT_OFFSET_VALID)
            r = create_co_preallocate(image->backend, node_filename(e.host), e.host_offset,
                                      e.host_offset + e.len, PREALLOC_FALLOC, err);
        from += e.len;
    }
    return r;
}

int image_co_resize(struct image *image, uint64_t size, enum preallocation how, struct error **err)
{
    bool is_luks = strcmp(image_format(image), "luks") == 0;
    bool is_raw = !is_luks && strcmp(image_format(image), "qcow2") != 0;
    uint64_t old = backend_size(image->backend);
    int r;

    if (size < image_size(image) && how != PREALLOC_OFF)
        return error_set(err, EINVAL, "Preallocation can only be used for growing images");
    if (how == PREALLOC_METADATA && is_raw)
        return error_set(err, EINVAL, "raw images have no metadata to preallocate");
    if (how != PREALLOC_OFF && is_luks)
        return error_set(err, ENOTSUP, "growing luks images with preallocation is not supported");
    if (how == PREALLOC_FALLOC && image->layers[0].header.crypt_method)
        return error_set(err, ENOTSUP,
                         "growing encrypted images with preallocation=falloc is not supported: use "
                         "metadata or full");
    if (!is_raw && size % 512)
        return error_set(err, EINVAL, "The new size must be a multiple of 512");
    r = graph_co_resize(image->graph, image->layers[0].node, size, err);
    if (r == 0 && is_raw)
        r = create_co_preallocate(image->backend, image->layers[0].path, old, size, how, err);
    else if (r == 0 && how != PREALLOC_OFF)
        r = preallocate_clusters(image, old, size, how, err);
    if (r == 0 && image_co_flush(image->backend) < 0)
        r = error_set(err, EIO, "cannot flush '%s'", image->layers[0].filename);
    return r;
}

static int co_fn control_fn resize(struct graph *g, void *arg, struct error **err)
{
    struct resize *x = arg;
    struct image image;
    uint64_t size = 0;
    int r = image_co_open(&image, g, "i", &x->spec, err);

    if (r == 0) {
        image_warn_probed(&image);
        r = new_size(x, image_size(&image), &size, err);
        if (r == 0)
            r = image_co_resize(&image, size, x->preallocation, err);
    }
    image_co_close(&image);
    if (r == 0 && !x->quiet)
        printf("Image resized.\n");
    return r;
}

enum { PREALLOCATION = TOOL_FIRST_FREE, SHRINK };

static int read_option(struct resize *x, int opt, struct error **err)
{
    switch (opt) {
    case 'q':
        x->quiet = true;
        return 0;
    case PREALLOCATION:
        return preallocation_read(optarg, &x->preallocation, err);
    case SHRINK:
        x->shrink = true;
        return 0;
    default:
        return tool_image_option(&x->spec, opt);
    }
}

static int resize_run(int argc, char **argv, struct error **err)
{
    static const struct option options[] = {
        TOOL_LONG_OPTIONS,
        {"preallocation", required_argument, NULL, PREALLOCATION},
        {"shrink", no_argument, NULL, SHRINK},
        {NULL, 0, NULL, 0},
    };
    struct resize x = {.spec.flags = IMAGE_WRITE};
    int opt;
    int r = 0;

    if (argc == 2 && (strcmp(argv[1], "-h") == 0 || strcmp(argv[1], "--help") == 0))
        return CLI_WANTS_HELP;
    if (argc < 3)
        return cli_usage(err, "Not enough arguments");
    x.text = argv[--argc]; /* it may begin with '-', and is no option */
    while (r == 0 && (opt = tool_next_option(argc, argv, "f:q", options, err)) != -1)
        r = read_option(&x, opt, err);
    if (r == 0 && argc - optind != 1)
        r = cli_usage(err, "Expecting image file name and size");
    if (r == 0)
        r = tool_check_format(&x.spec, err);
    if (r == 0)
        r = tool_read_size("image size", x.text + (*x.text == '+' || *x.text == '-'), &x.amount,
                           err);
    if (r < 0)
        return r;
    x.spec.name = argv[optind];
    return tool_run(resize, &x, err);
}

const struct cli_command resize_command = {
    .name = "resize",
    .summary = "change the size of an image",
    .arguments = "[OPTION]... FILE [+|-]SIZE",
    .help =
        "Gives an image another size, or makes it larger or smaller by SIZE. What is new reads as zeroes.\n"
        "\n"
        "  -f FORMAT                 of FILE: raw or qcow2; by default it is probed\n"
        "      --shrink              it may become smaller, and what is beyond its end is lost\n"
        "      --preallocation MODE  of what is new: off (default), metadata (qcow2), falloc, full\n"
        "  -q                        print nothing\n"
        "      --image-opts          FILE is options: driver=qcow2,file.filename=PATH\n"
        "      --allow DIR           what images refer to may lie in DIR, too\n"
        "  -h, --help                say this and exit\n",
    .is_image_tool = true,
    .run = resize_run,
};
