/* SPDX-License-Identifier: Apache-2.0 */
/* cairn bitmap: changes a bitmap that an image stores. */
#include "base/alloc.h"
#include "base/macros.h"
#include "cli/image/image-bitmaps.h"
#include "cli/image/tool.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>

enum { ADD = TOOL_FIRST_FREE, REMOVE, CLEAR, ENABLE, DISABLE, MERGE };

struct bitmap_command {
    struct image_spec spec;
    struct image_spec from; /* name NULL: sources are in the same image */
    struct image_bitmap_change *changes;
    size_t count;
    bool adds;
    bool merges;
    uint64_t granularity;
};

static const char *action_name(enum image_bitmap_action action)
{
    static const char *const names[] = {
        [IMAGE_BITMAP_ADD] = "add",         [IMAGE_BITMAP_REMOVE] = "remove",
        [IMAGE_BITMAP_CLEAR] = "clear",     [IMAGE_BITMAP_ENABLE] = "enable",
        [IMAGE_BITMAP_DISABLE] = "disable", [IMAGE_BITMAP_MERGE] = "merge",
    };

    return names[action];
}

/* In order; those before one that fails stay done. */
static int co_fn control_fn change_all(const struct bitmap_command *x, struct image *image,
                                       const struct image *from, struct error **err)
{
    int r = 0;

    for (size_t i = 0; r == 0 && i < x->count; i++) {
        struct image_bitmap_change *change = &x->changes[i];

        change->granularity = x->granularity;
        change->from = from->graph ? from : NULL;
        r = image_bitmap_co_change(image, change, err);
        if (r < 0)
            return error_wrap(err, r, "Operation %s on bitmap %s failed",
                              action_name(change->action), change->name);
    }
    return r;
}

static int co_fn control_fn bitmap(struct graph *g, void *arg, struct error **err)
{
    const struct bitmap_command *x = arg;
    struct image image = {.graph = NULL};
    struct image from = {.graph = NULL};
    size_t usable = 0;
    bool changed;
    int r = image_co_open(&image, g, "i", &x->spec, err);

    if (r == 0 && x->from.name)
        r = image_co_open(&from, g, "s", &x->from, err);
    changed = r == 0;
    if (r == 0) {
        image_warn_probed(&image);
        r = change_all(x, &image, &from, err);
        usable = image_bitmaps_usable(&image);
    }
    image_co_close(&from);
    image_co_close(&image);
    if (changed && r == 0)
        r = image_bitmaps_co_check_stored(g, &x->spec, usable, err);
    return r;
}

static void add_change(struct bitmap_command *x, enum image_bitmap_action action)
{
    /* No more than there are arguments. */
    x->changes[x->count++] = (struct image_bitmap_change){.action = action, .source = optarg};
}

static int read_option(struct bitmap_command *x, int opt, struct error **err)
{
    switch (opt) {
    case ADD:
        x->adds = true;
        break;
    case MERGE:
        x->merges = true;
        break;
    case REMOVE:
    case CLEAR:
    case ENABLE:
    case DISABLE:
        break;
    case 'b':
        x->from.name = optarg;
        return 0;
    case 'F':
        x->from.format = optarg;
        return 0;
    case 'g':
        return tool_read_size("granularity", optarg, &x->granularity, err);
    default:
        return tool_image_option(&x->spec, opt);
    }
    add_change(x, (enum image_bitmap_action)(opt - ADD));
    return 0;
}

static int check(const struct bitmap_command *x, struct error **err)
{
    if (!x->count)
        return error_set(err, EINVAL,
                         "Need at least one of --add, --remove, --clear, --enable, --disable, or "
                         "--merge");
    if (x->granularity && !x->adds)
        return error_set(err, EINVAL, "granularity only supported with --add");
    if (x->from.format && !x->from.name)
        return error_set(err, EINVAL, "-F only supported with -b");
    if (x->from.name && !x->merges)
        return error_set(err, EINVAL, "Merge bitmap source file only supported with --merge");
    return tool_check_format(&x->spec, err);
}

static int bitmap_run(int argc, char **argv, struct error **err)
{
    static const struct option options[] = {
        TOOL_LONG_OPTIONS,
        {"add", no_argument, NULL, ADD},
        {"remove", no_argument, NULL, REMOVE},
        {"clear", no_argument, NULL, CLEAR},
        {"enable", no_argument, NULL, ENABLE},
        {"disable", no_argument, NULL, DISABLE},
        {"merge", required_argument, NULL, MERGE},
        {"source-file", required_argument, NULL, 'b'},
        {"source-format", required_argument, NULL, 'F'},
        {"granularity", required_argument, NULL, 'g'},
        {NULL, 0, NULL, 0},
    };
    struct bitmap_command x = {
        .spec.flags = IMAGE_WRITE | IMAGE_NO_BACKING,
        .from.flags = IMAGE_NO_BACKING,
        .changes = xnew_n(struct image_bitmap_change, (size_t)argc),
    };
    int opt;
    int r = 0;

    while (r == 0 && (opt = tool_next_option(argc, argv, "b:f:F:g:", options, err)) != -1)
        r = read_option(&x, opt, err);
    if (r == 0)
        r = check(&x, err);
    if (r == 0 && argc - optind != 2)
        r = error_set(err, EINVAL, "Expecting filename and bitmap name");
    if (r == 0) {
        x.spec.name = argv[optind];
        for (size_t i = 0; i < x.count; i++)
            x.changes[i].name = argv[optind + 1];
        r = tool_run(bitmap, &x, err);
    }
    free(x.changes);
    return r;
}

const struct cli_command bitmap_command = {
    .name = "bitmap",
    .summary = "change a bitmap that an image stores",
    .arguments = "[OPTION]... FILE BITMAP",
    .help =
        "Changes one of the dirty bitmaps that a qcow2 image stores, while nobody uses the image. What is to be done is done\n"
        "in order; what came before something that fails stays done.\n"
        "\n"
        "      --add              make it; it records. By default a bit is a cluster, 4k at least and 64k at most\n"
        "  -g SIZE                of a bit, with --add: a power of two\n"
        "      --remove           remove it, also one that is inconsistent\n"
        "      --clear            forget what it has\n"
        "      --enable, --disable  let it record, or no longer\n"
        "      --merge SOURCE     add what bitmap SOURCE has, of FILE or of the image that -b names\n"
        "  -b FILE, -F FORMAT     the image that has SOURCE, and its format\n"
        "  -f FORMAT              of FILE: qcow2; by default it is probed\n"
        "      --image-opts       FILE is options: driver=qcow2,file.filename=PATH\n"
        "      --allow DIR        what images refer to may lie in DIR, too\n"
        "  -h, --help             say this and exit\n",
    .is_image_tool = true,
    .run = bitmap_run,
};
