/* SPDX-License-Identifier: Apache-2.0 */
/* cairn restore: a point of a directory of backups becomes an image again. */
#include "base/alloc.h"
#include "base/macros.h"
#include "cli/catalogue.h"
#include "cli/cli.h"
#include "cli/restore-copy.h"
#include "cli/target.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

struct restore {
    const char *dir;
    const char *out;
    const char *at; /* NULL: the last one */
    const char *format;
    bool force;
    bool json;

    struct catalogue *catalogue;
    const struct point *point;
    struct layers layers;
    bool is_device;
    char *part; /* what is written to: OUT itself if it is a device */
};

/* A name, a time, or the beginning of one: the last point that it fits. */
static int choose_point(struct restore *x, struct error **err)
{
    const struct catalogue *c = x->catalogue;

    if (!c->count)
        return error_set(err, ENOENT, "there is no backup in '%s'", c->dir);
    if (!x->at) {
        x->point = &c->points[c->count - 1];
        return 0;
    }
    x->point = catalogue_find(c, x->at);
    for (size_t i = c->count; !x->point && i-- > 0;) {
        if (x->at[0] && strncmp(c->points[i].time, x->at, strlen(x->at)) == 0)
            x->point = &c->points[i];
    }
    if (!x->point)
        return error_set(err, ENOENT, "there is no point '%s' in '%s': `cairn backups` lists them",
                         x->at, c->dir);
    return 0;
}

static void collect_layers(struct restore *x)
{
    const struct point *p = x->point;

    x->layers.v = xnew_n(struct layer, x->catalogue->count);
    for (;;) {
        x->layers.v[x->layers.count++] = (struct layer){
            .path = catalogue_image_path(x->catalogue, p->id),
            .format = "qcow2",
            .driver = "file",
        };
        if (p->full)
            return;
        p = catalogue_find(x->catalogue, p->base); /* CAT-2: it is there */
    }
}

/* What is at OUT now. */
static int check_out(struct restore *x, struct error **err)
{
    struct stat st;

    if (stat(x->out, &st) < 0) {
        if (errno != ENOENT)
            return error_set(err, errno, "'%s': %s", x->out, strerror(errno));
    } else {
        if (!x->force)
            return error_set(err, EEXIST, "'%s' is there already: --force overwrites it", x->out);
        x->is_device = S_ISBLK(st.st_mode);
        if (!x->is_device && !S_ISREG(st.st_mode))
            return error_set(err, EINVAL, "'%s' is neither a regular file nor a block device",
                             x->out);
    }
    if (x->is_device && strcmp(x->format, "raw") != 0)
        return error_set(err, EINVAL, "'%s' is a block device: only raw goes there", x->out);
    x->part = x->is_device ? xstrdup(x->out) : xasprintf("%s.cairn-part", x->out);
    return 0;
}

/* A new file under a name of its own, of which OUT becomes the name when it is whole. */
static int make_part(const struct restore *x, struct error **err)
{
    int fd;
    int r = 0;

    if (x->is_device)
        return 0;
    if (unlink(x->part) < 0 && errno != ENOENT)
        return error_set(err, errno, "cannot remove '%s': %s", x->part, strerror(errno));
    if (strcmp(x->format, "qcow2") == 0)
        return target_create(x->part, x->point->size, NULL, err);
    fd = open(x->part, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    if (fd < 0 || ftruncate(fd, (off_t)x->point->size) < 0)
        r = error_set(err, errno, "cannot make '%s': %s", x->part, strerror(errno));
    if (fd >= 0)
        close(fd);
    return r;
}

static int sync_directory_of(const char *path, struct error **err)
{
    const char *slash = strrchr(path, '/');
    AUTO(free_ptr)
    char *dir =
        slash ? xasprintf("%.*s", (int)MAX(slash - path, (ptrdiff_t)1), path) : xstrdup(".");
    int fd = open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    int r = 0;

    if (fd < 0 || fsync(fd) < 0)
        r = error_set(err, errno, "cannot sync '%s': %s", dir, strerror(errno));
    if (fd >= 0)
        close(fd);
    return r;
}

static int put_in_place(const struct restore *x, struct error **err)
{
    if (x->is_device)
        return 0;
    if (rename(x->part, x->out) < 0)
        return error_set(err, errno, "cannot rename '%s' to '%s': %s", x->part, x->out,
                         strerror(errno));
    return sync_directory_of(x->out, err);
}

static int copy(struct restore *x, uint64_t *ret_copied, struct error **err)
{
    struct progress bar;
    struct restore_copy c = {
        .source = &x->layers,
        .target_path = x->part,
        .target_format = x->format,
        .target_driver = x->is_device ? "host_device" : "file",
        .target_is_zero = !x->is_device,
        .size = x->point->size,
        .bar = &bar,
    };
    int r;

    progress_begin(&bar, "restore", x->json);
    r = restore_copy_run(&c, err);
    progress_end(&bar);
    *ret_copied = c.copied;
    return r;
}

static void say_done(const struct restore *x, uint64_t copied)
{
    char bytes[32];
    char size[32];

    if (x->json) {
        cli_print_json(json_pack("{s:s, s:s, s:s, s:I, s:I}", "point", x->point->id, "output",
                                 x->out, "format", x->format, "size", (json_int_t)x->point->size,
                                 "bytes", (json_int_t)copied),
                       false);
        return;
    }
    size_text(bytes, sizeof(bytes), copied);
    size_text(size, sizeof(size), x->point->size);
    printf("%s: %s as of %s, %s of data in %s\n", x->out, x->point->disk, x->point->time, bytes,
           size);
}

static int run(struct restore *x, struct error **err)
{
    uint64_t copied = 0;
    int r = catalogue_open(&x->catalogue, x->dir, err);

    if (r == 0)
        r = choose_point(x, err);
    if (r == 0)
        r = check_out(x, err);
    if (r < 0)
        return r;
    collect_layers(x);
    r = make_part(x, err);
    if (r == 0)
        r = copy(x, &copied, err);
    if (r == 0)
        r = put_in_place(x, err);
    if (r == 0)
        say_done(x, copied);
    else if (!x->is_device)
        (void)unlink(x->part); /* of no use to anyone */
    return r;
}

static int read_option(struct restore *x, int opt, struct error **err)
{
    switch (opt) {
    case 'a':
        x->at = optarg;
        return 0;
    case 'f':
        x->format = optarg;
        if (strcmp(optarg, "raw") != 0 && strcmp(optarg, "qcow2") != 0)
            return cli_usage(err, "--format %s: it is raw or qcow2", optarg);
        return 0;
    case 'F':
        x->force = true;
        return 0;
    case 'j':
        x->json = true;
        return 0;
    default:
        return opt;
    }
}

static int restore_run(int argc, char **argv, struct error **err)
{
    static const struct option options[] = {
        CLI_HELP_OPTION,
        {"at", required_argument, NULL, 'a'},
        {"force", no_argument, NULL, 'F'},
        {"format", required_argument, NULL, 'f'},
        {"json", no_argument, NULL, 'j'},
        {NULL, 0, NULL, 0},
    };
    struct restore x = {.format = "raw"};
    int opt;
    int r = 0;

    while (r == 0 && (opt = cli_next_option(argc, argv, options, err)) != -1)
        r = read_option(&x, opt, err);
    if (r == 0)
        r = cli_check_arguments(argc, 2, 2, "DIR and OUT", err);
    if (r < 0)
        return r;
    x.dir = argv[optind];
    x.out = argv[optind + 1];
    cli_catch_signals();
    r = run(&x, err);
    layers_release(&x.layers);
    (void)catalogue_close(x.catalogue);
    free(x.part);
    return r;
}

const struct cli_command restore_command = {
    .name = "restore",
    .summary = "make an image of a point in time",
    .arguments = "DIR [--at POINT] OUT [OPTION]...",
    .help =
        "Writes the disk as it was at a point in time to the file or block device OUT. OUT gets its name when it\n"
        "is whole; what is zero is left out where the target can have holes.\n"
        "\n"
        "      --at POINT       the point's name, or its time or the beginning of it; by default the last one\n"
        "      --format FORMAT  of OUT: raw (default) or qcow2\n"
        "      --force          overwrite what is there; a block device always is\n"
        "      --json           print what was done as JSON, and no progress\n"
        "  -h, --help           say this and exit\n",
    .run = restore_run,
};
