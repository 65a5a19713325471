/* SPDX-License-Identifier: Apache-2.0 */
/* cairn jobs: what the daemon works on, as a table that lives until there is nothing left. */
#include "base/alloc.h"
#include "base/macros.h"
#include "cli/cli.h"
#include "cli/progress.h"
#include "cli/session.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define UPDATE_MS 500

/* How fast each job goes, by its name, from one update to the next. */
struct seen {
    struct seen *next;
    char *id;
    struct rate rate;
};

struct view {
    struct seen *seen;
    bool json;
    bool terminal;
    size_t lines; /* that were drawn, and are overwritten */
    json_t *last; /* what was printed, where there is no terminal */
};

static struct rate *rate_of(struct view *v, const char *id)
{
    struct seen *s;

    for (s = v->seen; s; s = s->next) {
        if (strcmp(s->id, id) == 0)
            return &s->rate;
    }
    s = xnew(struct seen);
    s->id = xstrdup(id);
    s->next = v->seen;
    v->seen = s;
    return &s->rate;
}

static void view_release(struct view *v)
{
    while (v->seen) {
        struct seen *s = v->seen;

        v->seen = s->next;
        free(s->id);
        free(s);
    }
    json_decref(v->last);
}

static const char *text_of(const json_t *job, const char *member)
{
    const char *text = json_string_value(json_object_get(job, member));

    return text ? text : "?";
}

static uint64_t number_of(const json_t *job, const char *member)
{
    json_int_t n = json_integer_value(json_object_get(job, member));

    return n > 0 ? (uint64_t)n : 0;
}

static void print_job(struct view *v, const json_t *job)
{
    uint64_t done = number_of(job, "current-progress");
    struct rate *rate = rate_of(v, text_of(job, "id"));
    const char *error = json_string_value(json_object_get(job, "error"));
    unsigned width = v->terminal ? progress_columns() - 1 : 160;
    char label[96];
    char line[256];

    rate_see(rate, progress_now_ms(), done);
    /* The room of a terminal is for the bar. */
    if (width < 100)
        (void)snprintf(label, sizeof(label), "%-18.40s %-9s", text_of(job, "id"),
                       text_of(job, "status"));
    else
        (void)snprintf(label, sizeof(label), "%-20s %-7s %-9s", text_of(job, "id"),
                       text_of(job, "type"), text_of(job, "status"));
    progress_line(line, sizeof(line), width, label, done, number_of(job, "total-progress"),
                  strcmp(text_of(job, "status"), "running") == 0 ? rate->bytes_per_second : 0);
    printf("%s%s\n", line, v->terminal ? "\033[K" : "");
    v->lines++;
    if (!error)
        return;
    printf("%20s %s%s\n", "", error, v->terminal ? "\033[K" : "");
    v->lines++;
}

/* Takes the list. */
static void print_jobs(struct view *v, json_t *jobs)
{
    const json_t *job;
    size_t i;

    if (!v->terminal && v->last && json_equal(v->last, jobs)) {
        json_decref(jobs);
        return;
    }
    json_decref(v->last);
    v->last = jobs;
    if (v->json) {
        cli_print_json(json_incref(jobs), false);
        (void)fflush(stdout);
        return;
    }
    if (v->terminal && v->lines)
        printf("\033[%zuA", v->lines);
    v->lines = 0;
    json_array_foreach(jobs, i, job) print_job(v, job);
    if (v->terminal)
        printf("\033[J"); /* what is left of a longer table */
    (void)fflush(stdout);
}

static int watch(struct cairn_client *c, struct view *v, bool once, struct error **err)
{
    for (;;) {
        json_t *jobs = NULL;
        int r = session_command(c, "query-jobs", NULL, &jobs, err);
        bool none = json_array_size(jobs) == 0;

        if (r < 0)
            return r;
        if (none && !v->json && !v->terminal && !v->last)
            printf("no jobs\n");
        print_jobs(v, jobs);
        if (none || once || cli_interrupted())
            return 0;
        r = session_wait_for_jobs(c, UPDATE_MS, err);
        if (r == -EINTR) {
            error_free(err);
            return 0; /* that is how one leaves it */
        }
        if (r < 0)
            return r;
    }
}

static int jobs_run(int argc, char **argv, struct error **err)
{
    static const struct option options[] = {
        CLI_HELP_OPTION,
        {"json", no_argument, NULL, 'j'},
        {"once", no_argument, NULL, '1'},
        {NULL, 0, NULL, 0},
    };
    AUTO(session_close) struct cairn_client *c = NULL;
    struct view v = {.terminal = isatty(STDOUT_FILENO)};
    bool once = false;
    int opt;
    int r;

    while ((opt = cli_next_option(argc, argv, options, err)) >= 0) {
        if (opt == 'j')
            v.json = true;
        else
            once = true;
    }
    r = opt == -1 ? cli_check_arguments(argc, 1, 1, "SOCKET", err) : opt;
    if (r < 0)
        return r;
    v.terminal = v.terminal && !v.json;
    cli_catch_signals();
    r = session_open(&c, argv[optind], err);
    if (r == 0)
        r = watch(c, &v, once, err);
    view_release(&v);
    return r;
}

const struct cli_command jobs_command = {
    .name = "jobs",
    .summary = "show what the daemon works on",
    .arguments = "SOCKET [OPTION]...",
    .help =
        "Shows the jobs of the daemon with the control socket SOCKET, how fast they are and how long they still\n"
        "take, until there are none or Ctrl-C is typed. Where there is no terminal, lines are printed whenever\n"
        "something has changed.\n"
        "\n"
        "      --once   show them once\n"
        "      --json   a JSON list on a line, whenever something has changed\n"
        "  -h, --help   say this and exit\n",
    .run = jobs_run,
};
