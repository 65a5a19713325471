/* SPDX-License-Identifier: Apache-2.0 */
/* cairn backups: what points a directory holds. */
#include "base/macros.h"
#include "cli/catalogue.h"
#include "cli/cli.h"
#include "cli/progress.h"

#include <assert.h>
#include <stdio.h>

static void print_point(const struct point *p)
{
    char bytes[32];
    char size[32];

    size_text(bytes, sizeof(bytes), p->bytes);
    size_text(size, sizeof(size), p->size);
    printf("%-20s  %s  %-11s  %10s of %-10s  %s%s%s%s\n", p->id, p->time,
           p->full ? "full" : "incremental", bytes, size, p->disk, p->reason ? " (" : "",
           p->reason ? p->reason : "", p->reason ? ")" : "");
}

static int backups_run(int argc, char **argv, struct error **err)
{
    static const struct option options[] = {
        CLI_HELP_OPTION,
        {"json", no_argument, NULL, 'j'},
        {NULL, 0, NULL, 0},
    };
    struct catalogue *c = NULL;
    json_t *list = NULL;
    bool json = false;
    int opt;
    int r;

    while ((opt = cli_next_option(argc, argv, options, err)) >= 0)
        json = true;
    r = opt == -1 ? cli_check_arguments(argc, 1, 1, "DIR", err) : opt;
    if (r == 0)
        r = catalogue_open(&c, argv[optind], err);
    if (r < 0)
        return r;
    assert(c);
    if (json)
        list = json_array();
    else if (!c->count)
        printf("no backups\n");
    for (size_t i = 0; i < c->count; i++) {
        if (json)
            json_array_append_new(list, point_to_json(&c->points[i]));
        else
            print_point(&c->points[i]);
    }
    if (json)
        cli_print_json(list, false);
    (void)catalogue_close(c);
    return 0;
}

const struct cli_command backups_command = {
    .name = "backups",
    .summary = "list the points of a directory of backups",
    .arguments = "DIR [--json]",
    .help =
        "Lists the points in time that DIR holds, oldest first: name, time, kind, how much was copied, size of the\n"
        "disk, which disk, and why a full backup was full.\n"
        "\n"
        "      --json   a JSON list\n"
        "  -h, --help   say this and exit\n",
    .run = backups_run,
};
