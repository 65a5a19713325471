/* SPDX-License-Identifier: Apache-2.0 */
/* cairn create: a new image. */
#include "base/alloc.h"
#include "base/macros.h"
#include "cli/image/create-options.h"
#include "cli/image/tool.h"

#include <errno.h>
#include <string.h>
#include <sys/stat.h>

struct create {
    const char *format;
    const char *filename;
    const char *options; /* -o, all of them */
    char *joined;
    const char *backing_file;
    const char *backing_format;
    const char *size;
    bool quiet;
    bool unsafe; /* the backing file is not looked at */
    struct create_options o;
};

static int refuse_itself(const struct create *c, struct error **err)
{
    AUTO(free_ptr) char *path = image_combine(c->filename, c->o.backing_file);
    struct stat a;
    struct stat b;

    if (strcmp(path, c->filename) == 0 || (stat(path, &a) == 0 && stat(c->filename, &b) == 0 &&
                                           a.st_dev == b.st_dev && a.st_ino == b.st_ino))
        return error_set(err, EINVAL, "an image cannot be its own backing file");
    return 0;
}

/* Whether it is there, and how large it is: as the new image will find it. */
static int co_fn control_fn look_at_backing(struct graph *g, struct create *c, struct error **err)
{
    AUTO(free_ptr) char *path = image_combine(c->filename, c->o.backing_file);
    struct image_spec spec = {.name = path, .format = c->o.backing_format, .flags = IMAGE_HEADERS};
    struct image backing;
    int r = image_co_open(&backing, g, "b", &spec, err);

    if (r < 0)
        return r;
    if (!c->o.has_size) {
        c->o.size = image_size(&backing);
        c->o.has_size = true;
    }
    image_co_close(&backing);
    return 0;
}

static int co_fn control_fn create(struct graph *g, void *arg, struct error **err)
{
    struct create *c = arg;
    int r = 0;

    if (c->o.backing_file)
        r = refuse_itself(c, err);
    if (r == 0 && c->o.backing_file && !c->unsafe)
        r = look_at_backing(g, c, err);
    if (r == 0 && c->o.has_size && c->o.encryption.detached)
        r = error_set(err, EINVAL, "detached-header: no size is given: the disk is another file");
    if (r == 0 && !c->o.has_size && !c->o.encryption.detached)
        r = error_set(err, EINVAL, "Image creation needs a size parameter");
    if (r < 0)
        return r;
    if (!c->quiet)
        create_options_print(&c->o, c->filename);
    return create_co_image(g, c->filename, &c->o, 0, err);
}

static int read_all(struct create *c, struct error **err)
{
    int r = create_options_init(&c->o, c->format, err);

    if (r == 0 && c->joined)
        r = create_options_read(&c->o, c->joined, err);
    if (r == 0 && (c->backing_file || c->backing_format) && strcmp(c->format, "qcow2") != 0)
        return error_set(err, EINVAL, "Backing file not supported for file format '%s'", c->format);
    if (r == 0 && c->backing_file) {
        free(c->o.backing_file);
        c->o.backing_file = xstrdup(c->backing_file);
    }
    if (r == 0 && c->backing_format) {
        free(c->o.backing_format);
        c->o.backing_format = xstrdup(c->backing_format);
    }
    if (r == 0 && c->o.backing_format && !image_format_known(c->o.backing_format))
        r = error_set(err, EINVAL, "Unknown backing file format '%s'", c->o.backing_format);
    if (r == 0 && c->o.backing_file && !c->o.backing_format)
        r = error_set(err, EINVAL,
                      "Backing file specified without backing format, which is never guessed");
    if (r == 0 && c->size && c->o.has_size)
        r = error_set(err, EINVAL, "The image size must be specified only once");
    if (r == 0 && c->size) {
        r = tool_read_size("image size", c->size, &c->o.size, err);
        c->o.has_size = true;
    }
    return r;
}

static int read_option(struct create *c, int opt, struct error **err)
{
    switch (opt) {
    case 'f':
        c->format = optarg;
        return 0;
    case 'b':
        c->backing_file = optarg;
        return 0;
    case 'F':
        c->backing_format = optarg;
        return 0;
    case 'o':
        return tool_join_options(&c->joined, optarg, err);
    case 'q':
        c->quiet = true;
        return 0;
    case 'u':
        c->unsafe = true;
        return 0;
    case TOOL_IMAGE_OPTS:
        return cli_usage(err, "create takes no --image-opts");
    default:
        return opt;
    }
}

static int create_run(int argc, char **argv, struct error **err)
{
    static const struct option options[] = {TOOL_LONG_OPTIONS, {NULL, 0, NULL, 0}};
    struct create c = {.format = "raw"};
    int opt;
    int r = 0;

    while (r == 0 && (opt = tool_next_option(argc, argv, "f:b:F:o:qu", options, err)) != -1)
        r = read_option(&c, opt, err);
    if (r == 0 && c.joined && image_format_known(c.format) &&
        create_options_help(c.format, c.joined)) {
        free(c.joined);
        return 0;
    }
    if (r == 0 && argc - optind < 1)
        r = cli_usage(err, "Expecting image file name");
    if (r == 0 && argc - optind > 2)
        r = cli_usage(err, "Unexpected argument: %s", argv[optind + 2]);
    if (r == 0) {
        c.filename = argv[optind];
        c.size = argv[optind + 1]; /* or NULL */
        r = read_all(&c, err);
        if (r == 0)
            r = tool_run(create, &c, err);
        if (r < 0)
            r = error_wrap(err, r, "%s", c.filename);
        create_options_release(&c.o);
    }
    free(c.joined);
    return r;
}

const struct cli_command create_command = {
    .name = "create",
    .summary = "make an empty image",
    .arguments = "[OPTION]... FILE [SIZE]",
    .help =
        "Makes an empty image in place of what FILE is. SIZE is in bytes or with a suffix (10G); it is that of the\n"
        "backing file where there is one.\n"
        "\n"
        "  -f FORMAT            raw (default), qcow2 or luks\n"
        "  -b FILE, -F FORMAT   the backing file, and its format\n"
        "  -u                   do not look at the backing file\n"
        "  -o OPTION,...        the format's own options; `-o help` lists them\n"
        "  -q                   print nothing\n"
        "      --allow DIR      what images refer to may lie in DIR, too\n"
        "  -h, --help           say this and exit\n",
    .is_image_tool = true,
    .run = create_run,
};
