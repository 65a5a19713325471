/* SPDX-License-Identifier: Apache-2.0 */
/* cairn check-node: is the image of a daemon's node sound? While it is in use, by a job of the daemon. */
#include "base/alloc.h"
#include "cli/cli.h"
#include "cli/image/check-print.h"
#include "cli/progress.h"
#include "cli/session.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define UPDATE_MS 500

struct check_node {
    const char *socket;
    const char *node;
    char *id;
    bool json;
    bool quiet;
    struct cairn_client *client;
    struct progress progress;
};

static int command(struct check_node *c, const char *name, json_t *arguments, json_t **ret,
                   struct error **err)
{
    return session_command(c->client, name, arguments, ret, err);
}

/* The entry of ours in a list; borrowed; NULL: there is none. */
static const json_t *find(const struct check_node *c, const json_t *list)
{
    const json_t *entry;
    size_t i;

    json_array_foreach(list, i, entry)
    {
        const char *id = json_string_value(json_object_get(entry, "id"));

        if (id && strcmp(id, c->id) == 0)
            return entry;
    }
    return NULL;
}

static uint64_t number(const json_t *o, const char *member)
{
    json_int_t n = json_integer_value(json_object_get(o, member));

    return n > 0 ? (uint64_t)n : 0;
}

/* 1: it has concluded. Its error, if it has one. */
static int look(struct check_node *c, struct error **err)
{
    json_t *jobs = NULL;
    const json_t *job;
    const char *status;
    const char *error;
    int r = command(c, "query-jobs", NULL, &jobs, err);

    if (r < 0)
        return r;
    job = find(c, jobs);
    status = json_string_value(json_object_get(job, "status"));
    error = json_string_value(json_object_get(job, "error"));
    if (!status)
        r = error_set(err, ESRCH, "job '%s' is gone", c->id);
    else if (strcmp(status, "concluded") != 0)
        progress_show(&c->progress, number(job, "current-progress"), number(job, "total-progress"));
    else if (error)
        r = error_set(err, EIO, "%s", error);
    else
        r = 1;
    json_decref(jobs);
    return r;
}

/* To its end. A signal cancels it. */
static int wait_for_it(struct check_node *c, struct error **err)
{
    int r;

    while ((r = look(c, err)) == 0) {
        if (cli_interrupted())
            return cli_interrupted_error(err);
        r = session_wait_for_jobs(c->client, UPDATE_MS, err);
        if (r < 0)
            return r;
    }
    return r < 0 ? r : 0;
}

static void read_result(const json_t *o, struct qcow2_check_result *ret)
{
    *ret = (struct qcow2_check_result){
        .image_end_offset = number(o, "image-end-offset"),
        .total_clusters = number(o, "total-clusters"),
        .allocated_clusters = number(o, "allocated-clusters"),
        .fragmented_clusters = number(o, "fragmented-clusters"),
        .compressed_clusters = number(o, "compressed-clusters"),
        .corruptions = number(o, "corruptions"),
        .leaks = number(o, "leaks"),
        .check_errors = number(o, "check-errors"),
        .moved_clusters = number(o, "moved-clusters"),
    };
}

static void print_lines(const json_t *result)
{
    uint64_t more = number(result, "more-findings");
    const json_t *line;
    size_t i;

    json_array_foreach(json_object_get(result, "findings"), i, line)
    {
        const char *text = json_string_value(line);

        (void)fprintf(stderr, "%s\n", text ? text : "");
    }
    if (more)
        (void)fprintf(stderr, "... and %" PRIu64 " more\n", more);
}

/* As the other lines of its text. */
static void print_moved(const struct qcow2_check_result *found)
{
    if (found->moved_clusters)
        printf("%" PRIu64 " clusters were freed and given to others meanwhile: nothing is said of "
               "their refcounts.\n",
               found->moved_clusters);
}

static int print_result(struct check_node *c, struct error **err)
{
    struct qcow2_check_result found;
    json_t *checks = NULL;
    const json_t *result;
    int r = command(c, "query-block-checks", NULL, &checks, err);

    if (r < 0)
        return r;
    result = json_object_get(find(c, checks), "result");
    if (result) {
        read_result(result, &found);
        print_lines(result);
        if (c->json) {
            check_print_json(json_pack("{s:s, s:s, s:I}", "node-name", c->node, "format", "qcow2",
                                       "moved-clusters", (json_int_t)found.moved_clusters),
                             &found);
        } else if (!c->quiet) {
            check_print_text(&found);
            print_moved(&found);
        }
        cli_set_exit_status((int)check_status_of(&found));
    } else {
        r = error_set(err, EPROTO, "the daemon has no result of job '%s'", c->id);
    }
    json_decref(checks);
    return r;
}

/* One that was cancelled takes a moment to conclude. */
#define DISMISS_TRIES 10

/* Whatever became of it, nothing is left in the daemon. */
static void dismiss(struct check_node *c)
{
    AUTO(error_free) struct error *ignored = NULL;
    int r = -EAGAIN;

    if (cli_interrupted())
        (void)command(c, "job-cancel", json_pack("{s:s}", "id", c->id), NULL, &ignored);
    for (unsigned i = 0; r < 0 && i < DISMISS_TRIES; i++) {
        error_free(&ignored);
        r = command(c, "job-dismiss", json_pack("{s:s}", "id", c->id), NULL, &ignored);
        error_free(&ignored);
        if (r < 0)
            (void)session_wait_for_jobs(c->client, UPDATE_MS, &ignored);
    }
}

static int check(struct check_node *c, struct error **err)
{
    int r = command(c, "block-check",
                    json_pack("{s:s, s:s}", "job-id", c->id, "node-name", c->node), NULL, err);

    if (r < 0)
        return r;
    progress_begin(&c->progress, c->node, c->json || c->quiet);
    r = wait_for_it(c, err);
    progress_end(&c->progress);
    if (r == 0)
        r = print_result(c, err);
    dismiss(c);
    return r;
}

enum { OPTION_JSON = 256 };

static int read_options(struct check_node *c, int argc, char **argv, struct error **err)
{
    static const struct option options[] = {
        CLI_HELP_OPTION,
        {"json", no_argument, NULL, OPTION_JSON},
        {"quiet", no_argument, NULL, 'q'},
        {"repair", required_argument, NULL, 'r'},
        {NULL, 0, NULL, 0},
    };
    int opt;
    int r;

    while ((opt = cli_next_option(argc, argv, options, err)) >= 0) {
        switch (opt) {
        case OPTION_JSON:
            c->json = true;
            break;
        case 'q':
            c->quiet = true;
            break;
        case 'r':
            return cli_usage(err, "--repair: an image in use is not repaired: close its node, and "
                                  "use cairn check");
        }
    }
    if (opt != -1)
        return opt;
    r = cli_check_arguments(argc, 2, 2, "SOCKET NODE", err);
    if (r == 0) {
        c->socket = argv[optind];
        c->node = argv[optind + 1];
    }
    return r;
}

static int check_node_run(int argc, char **argv, struct error **err)
{
    struct check_node c = {.socket = NULL};
    int r = read_options(&c, argc, argv, err);

    if (r < 0)
        return r;
    cli_catch_signals();
    c.id = xasprintf("check-%ld", (long)getpid());
    r = session_open(&c.client, c.socket, err);
    if (r == 0)
        r = check(&c, err);
    session_close(&c.client);
    free(c.id);
    return r;
}

const struct cli_command check_node_command = {
    .name = "check-node",
    .summary = "look for damage in the image of a node, while it is in use",
    .arguments = "[OPTION]... SOCKET NODE",
    .help =
        "Lets the daemon at SOCKET check the qcow2 image of a node. Its users go on; nothing is "
        "repaired.\n"
        "\n"
        "      --json    print the result as JSON, in the form of qemu-img check\n"
        "  -q, --quiet   print nothing but findings and errors\n"
        "  -h, --help    say this and exit\n"
        "\n"
        "Exit status: 0: sound; 1: the check failed; 2: damage was found; 3: leaks only.\n",
    .run = check_node_run,
};
