/* SPDX-License-Identifier: Apache-2.0 */
/* cairn snapshot: internal snapshots of an image that is not in use. */
#include "base/macros.h"
#include "cli/image/info-tables.h"
#include "cli/image/tool.h"
#include "formats/qcow2/qcow2-snapshot.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

enum action { ACTION_LIST, ACTION_CREATE, ACTION_APPLY, ACTION_DELETE };

struct snapshot {
    struct image_spec spec;
    enum action action;
    bool chosen;
    const char *name;
    bool quiet;
};

static int co_fn control_fn list(const struct snapshot *x, struct image *image, struct error **err)
{
    struct info_tables tables = {.snapshots = NULL};
    int r = info_co_refuse_writers(image->graph, &image->layers[0], err);

    if (r == 0)
        r = info_tables_co_read(&tables, image->graph, &image->layers[0], err);

    (void)x;
    if (r == 0)
        info_print_snapshots(tables.snapshots);
    info_tables_release(&tables);
    return r;
}

static int co_fn control_fn create(const struct snapshot *x, struct image *image,
                                   struct error **err)
{
    struct qcow2_snapshot_new how = {.name = x->name};
    struct timespec now = {.tv_sec = 0};
    int r;

    (void)clock_gettime(CLOCK_REALTIME, &now);
    how.date_s = (uint32_t)now.tv_sec;
    how.date_ns = (uint32_t)now.tv_nsec;
    r = qcow2_co_snapshot_create(image->backend, &how, err);
    return r < 0 ? error_wrap(err, r, "Could not create snapshot '%s'", x->name) : 0;
}

static int co_fn control_fn apply(const struct snapshot *x, struct image *image, struct error **err)
{
    bool vm_state = false;
    int r = qcow2_co_snapshot_apply(image->backend, x->name, &vm_state, err);

    if (r < 0)
        return error_wrap(err, r, "Could not apply snapshot '%s'", x->name);
    if (vm_state && !x->quiet)
        cli_warn("snapshot '%s' has the state of a machine beside the disk's: only the disk's is "
                 "restored",
                 x->name);
    return 0;
}

static int co_fn control_fn delete (const struct snapshot *x, struct image *image,
                                    struct error **err)
{
    int r = qcow2_co_snapshot_delete(image->backend, x->name, err);

    return r < 0 ? error_wrap(err, r, "Could not delete snapshot '%s'", x->name) : 0;
}

static int co_fn control_fn snapshot(struct graph *g, void *arg, struct error **err)
{
    struct snapshot *x = arg;
    struct image image;
    int r = image_co_open(&image, g, "i", &x->spec, err);

    if (r < 0)
        return r;
    if (x->action != ACTION_LIST)
        image_warn_probed(&image);
    switch (x->action) {
    case ACTION_LIST:
        r = list(x, &image, err);
        break;
    case ACTION_CREATE:
        r = create(x, &image, err);
        break;
    case ACTION_APPLY:
        r = apply(x, &image, err);
        break;
    case ACTION_DELETE:
        r = delete (x, &image, err);
        break;
    }
    image_co_close(&image);
    return r;
}

static int choose(struct snapshot *x, enum action action, struct error **err)
{
    if (x->chosen)
        return cli_usage(err, "Cannot mix '-l', '-a', '-c', '-d'");
    x->chosen = true;
    x->action = action;
    x->name = optarg;
    return 0;
}

static int read_option(struct snapshot *x, int opt, struct error **err)
{
    switch (opt) {
    case 'l':
        return choose(x, ACTION_LIST, err);
    case 'c':
        return choose(x, ACTION_CREATE, err);
    case 'a':
        return choose(x, ACTION_APPLY, err);
    case 'd':
        return choose(x, ACTION_DELETE, err);
    case 'q':
        x->quiet = true;
        return 0;
    default:
        return tool_image_option(&x->spec, opt);
    }
}

static int snapshot_run(int argc, char **argv, struct error **err)
{
    static const struct option options[] = {
        TOOL_LONG_OPTIONS,
        {"force-share", no_argument, NULL, 'U'},
        {NULL, 0, NULL, 0},
    };
    struct snapshot x = {.spec.flags = IMAGE_NO_BACKING};
    int opt;
    int r = 0;

    while (r == 0 && (opt = tool_next_option(argc, argv, "la:c:d:f:qU", options, err)) != -1)
        r = read_option(&x, opt, err);
    if (r == 0)
        r = tool_only_image(&x.spec, argc, argv, err);
    if (r == 0 && x.action != ACTION_LIST && (x.spec.flags & IMAGE_SHARE))
        r = error_set(err, EINVAL, "-U (--force-share) can only be used with -l");
    if (r < 0)
        return r;
    x.spec.flags |= x.action == ACTION_LIST ? IMAGE_HEADERS : IMAGE_WRITE;
    return tool_run(snapshot, &x, err);
}

const struct cli_command snapshot_command = {
    .name = "snapshot",
    .summary = "list, make, apply and delete snapshots in an image",
    .arguments = "[OPTION]... [-l | -c NAME | -a SNAPSHOT | -d NAME] FILE",
    .help =
        "Works on the internal snapshots of a qcow2 image that nobody uses: those that lie in the image's own file.\n"
        "\n"
        "  -l                 list them (default)\n"
        "  -c NAME            make one of what the disk holds now\n"
        "  -a SNAPSHOT        the disk becomes what it was, also its size; by ID or name. What it holds now is lost.\n"
        "                     A machine's state that the snapshot has is left in it\n"
        "  -d NAME            delete the first one that has this name\n"
        "  -f FORMAT          of FILE: qcow2; by default it is probed\n"
        "      --image-opts   FILE is options: driver=qcow2,file.filename=PATH\n"
        "  -U, --force-share  list, although others write to it\n"
        "      --allow DIR    what images refer to may lie in DIR, too\n"
        "  -q                 print nothing but the list and errors\n"
        "  -h, --help         say this and exit\n",
    .is_image_tool = true,
    .run = snapshot_run,
};
