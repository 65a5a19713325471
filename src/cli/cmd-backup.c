/* SPDX-License-Identifier: Apache-2.0 */
/* cairn backup: a point in time of a disk in use, into a directory. */
#include "base/macros.h"
#include "cli/backup-run.h"
#include "cli/cli.h"
#include "cli/session.h"

#include <stdio.h>

static void print_point(const struct point *p, bool json)
{
    char bytes[32];
    char size[32];

    if (json) {
        cli_print_json(point_to_json(p), false);
        return;
    }
    size_text(bytes, sizeof(bytes), p->bytes);
    size_text(size, sizeof(size), p->size);
    printf("%s: %s%s%s, %s of %s copied%s%s%s\n", p->id, p->full ? "full" : "incremental",
           p->base ? " since " : "", p->base ? p->base : "", bytes, size, p->reason ? " (" : "",
           p->reason ? p->reason : "", p->reason ? ")" : "");
}

static int run(const char *path, const char *dir, const struct backup_run_options *o,
               struct error **err)
{
    AUTO(session_close) struct cairn_client *client = NULL;
    const struct point *point = NULL;
    struct catalogue *c = NULL;
    int r = session_open(&client, path, err);

    if (r == 0)
        r = catalogue_open_locked(&c, dir, err);
    if (r == 0)
        r = backup_run(client, c, o, &point, err);
    if (r == 0)
        print_point(point, o->json);
    (void)catalogue_close(c);
    return r;
}

static int backup_run_command(int argc, char **argv, struct error **err)
{
    static const struct option options[] = {
        CLI_HELP_OPTION,
        {"disk", required_argument, NULL, 'd'},
        {"full", no_argument, NULL, 'f'},
        {"json", no_argument, NULL, 'j'},
        {"speed", required_argument, NULL, 's'},
        {"to", required_argument, NULL, 't'},
        {NULL, 0, NULL, 0},
    };
    struct backup_run_options o = {.node = NULL};
    const char *dir = NULL;
    int opt;
    int r = 0;

    while (r == 0 && (opt = cli_next_option(argc, argv, options, err)) != -1) {
        switch (opt) {
        case 'd':
            o.node = optarg;
            break;
        case 'f':
            o.full = true;
            break;
        case 'j':
            o.json = true;
            break;
        case 's':
            r = cli_read_size("--speed", optarg, &o.speed, err);
            break;
        case 't':
            dir = optarg;
            break;
        default:
            r = opt;
        }
    }
    if (r == 0)
        r = cli_check_arguments(argc, 1, 1, "SOCKET", err);
    if (r == 0 && !dir)
        r = cli_usage(err, "--to DIR missing: where shall the backup go?");
    if (r < 0)
        return r;
    cli_catch_signals();
    return run(argv[optind], dir, &o, err);
}

const struct cli_command backup_command = {
    .name = "backup",
    .summary = "back up a disk in use",
    .arguments = "SOCKET --to DIR [OPTION]...",
    .help =
        "Makes a point in time of a disk of the daemon with the control socket SOCKET, in the directory DIR, which\n"
        "is made if there is none. The first one is full; later ones hold what has changed since the one before,\n"
        "and are qcow2 images with that one as their backing file. Where the daemon cannot tell what has changed,\n"
        "the backup is full again and says why. Guests go on meanwhile.\n"
        "\n"
        "      --to DIR       where the backup goes\n"
        "      --disk NODE    the node to back up; not needed if the daemon exports one disk only\n"
        "      --full         a full one in any case\n"
        "      --speed SIZE   bytes per second at most, such as 100M\n"
        "      --json         print the point as JSON, and no progress\n"
        "  -h, --help         say this and exit\n",
    .run = backup_run_command,
};
