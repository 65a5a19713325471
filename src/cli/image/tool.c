/* SPDX-License-Identifier: Apache-2.0 */
/* Options, progress and the loop of the image tools. */
#include "cli/image/tool.h"
#include "base/alloc.h"
#include "base/atomic.h"
#include "base/macros.h"
#include "base/number.h"
#include "cli/image/objects.h"
#include "filters/list.h"
#include "formats/list.h"
#include "loop/loop.h"
#include "protocols/list.h"

#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define LOOK_NS (100 * NS_PER_MS)

/* ---- options ---- */

int tool_next_option(int argc, char **argv, const char *letters, const struct option *options,
                     struct error **err)
{
    for (;;) {
        char list[64];
        int at = optind ? optind : 1;
        int opt;

        opterr = 0; /* we say it ourselves */
        (void)snprintf(list, sizeof(list), ":h%s", letters);
        opt = getopt_long(argc, argv, list, options, NULL);
        switch (opt) {
        case 'h':
            return CLI_WANTS_HELP;
        case ':':
            return cli_usage(err, "option '%s' needs a value", argv[optind - 1]);
        case '?':
            return cli_usage(err, "option '%s' is not understood",
                             argv[at < optind ? optind - 1 : at]);
        case TOOL_OBJECT:
            if (objects_read(optarg, err) < 0)
                return -EINVAL;
            break;
        case TOOL_ALLOW:
            image_allow(optarg);
            break;
        default:
            return opt;
        }
    }
}

int tool_image_option(struct image_spec *spec, int opt)
{
    switch (opt) {
    case 'f':
        spec->format = optarg;
        return 0;
    case 'U':
        spec->flags |= IMAGE_SHARE;
        return 0;
    case TOOL_IMAGE_OPTS:
        spec->options = true;
        return 0;
    default:
        return opt;
    }
}

/* A comma at an end would change its meaning with what comes next to it. */
static bool is_option_list(const char *text)
{
    const char *end = text + strlen(text);
    const char *p = end;

    while (p > text && p[-1] == ',')
        p--;
    return *text && *text != ',' && (end - p) % 2 == 0;
}

int tool_join_options(char **options, const char *text, struct error **err)
{
    char *joined;

    if (!is_option_list(text))
        return error_set(err, EINVAL, "Invalid option list: %s", text);
    joined = *options ? xasprintf("%s,%s", *options, text) : xstrdup(text);
    free(*options);
    *options = joined;
    return 0;
}

int tool_read_output(const char *text, bool *ret_json, struct error **err)
{
    *ret_json = strcmp(text, "json") == 0;
    if (!*ret_json && strcmp(text, "human") != 0)
        return error_set(err, EINVAL, "--output must be used with human or json as argument.");
    return 0;
}

int tool_read_size(const char *what, const char *text, uint64_t *ret, struct error **err)
{
    if (size_from_text(text, ret) < 0 || *ret > INT64_MAX)
        return error_set(err, EINVAL,
                         "Invalid %s specified: '%s'. You may use k, M, G, T, P or E suffixes",
                         what, text);
    return 0;
}

int tool_read_number(const char *what, const char *text, uint64_t min, uint64_t max, uint64_t *ret,
                     struct error **err)
{
    if (number_from_text(text, ret) < 0 || *ret < min || *ret > max)
        return error_set(err, EINVAL,
                         "Invalid %s specified: '%s', expected %" PRIu64 " to %" PRIu64, what, text,
                         min, max);
    return 0;
}

int tool_read_bool(const char *what, const char *text, bool *ret, struct error **err)
{
    *ret = strcmp(text, "on") == 0 || strcmp(text, "yes") == 0 || strcmp(text, "true") == 0 ||
           strcmp(text, "y") == 0;
    if (!*ret && strcmp(text, "off") != 0 && strcmp(text, "no") != 0 &&
        strcmp(text, "false") != 0 && strcmp(text, "n") != 0)
        return error_set(err, EINVAL, "Parameter '%s' expects 'on' or 'off'", what);
    return 0;
}

int tool_check_format(const struct image_spec *spec, struct error **err)
{
    if (spec->format && spec->options)
        return error_set(err, EINVAL, "--image-opts and --format are mutually exclusive");
    return 0;
}

int tool_only_image(struct image_spec *spec, int argc, char **argv, struct error **err)
{
    if (argc - optind != 1)
        return cli_usage(err, "Expecting one image file name");
    spec->name = argv[optind];
    return tool_check_format(spec, err);
}

int tool_read_cache(const char *text, struct tool_cache *ret, struct error **err)
{
    static const struct {
        const char *name;
        struct tool_cache cache;
    } modes[] = {
        {"none", {IMAGE_DIRECT, false}},
        {"off", {IMAGE_DIRECT, false}},
        {"writeback", {0, false}},
        {"writethrough", {0, true}},
        {"directsync", {IMAGE_DIRECT, true}},
        {"unsafe", {IMAGE_NO_FLUSH, false}},
    };

    for (size_t i = 0; i < ARRAY_SIZE(modes); i++) {
        if (strcmp(text, modes[i].name) == 0) {
            *ret = modes[i].cache;
            return 0;
        }
    }
    return error_set(err, EINVAL, "Invalid cache option: %s", text);
}

/* ---- running ---- */

struct run {
    tool_fn *fn;
    void *arg;
    int result;
    struct error *error;
};

/* Only touched on the first loop's thread. */
static struct loop_thread *threads[LOOP_MAX];
static unsigned thread_count;
static struct loop *second;

int tool_co_new_loop(struct loop **ret, const char *name, struct error **err)
{
    int r;

    if (thread_count == ARRAY_SIZE(threads))
        return error_set(err, EAGAIN, "there are %u threads already", thread_count);
    r = loop_thread_start(&threads[thread_count], name, err);
    if (r == 0)
        *ret = loop_thread_loop(threads[thread_count++]);
    return r;
}

struct loop *tool_co_second_loop(void)
{
    AUTO(error_free) struct error *ignored = NULL; /* one loop does it, too */

    if (!second && tool_co_new_loop(&second, "copy", &ignored) < 0)
        return NULL;
    return second;
}

static void co_fn control_fn run_body(void *arg)
{
    static const struct driver *const *const drivers[] = {protocol_drivers, format_drivers,
                                                          filter_drivers, NULL};
    struct run *run = arg;
    struct graph *g = graph_new(drivers);

    run->result = objects_co_make(g, &run->error);
    if (run->result == 0)
        run->result = run->fn(g, run->arg, &run->error);
    (void)graph_co_free(g);
    while (thread_count)
        (void)loop_thread_stop(threads[--thread_count]);
    second = NULL;
}

int tool_run_on(enum loop_engine engine, tool_fn *fn, void *arg, struct error **err)
{
    struct run run = {.fn = fn, .arg = arg};
    int r = loop_run_main(engine, "image", run_body, &run, err);

    if (r < 0)
        return r;
    if (run.error)
        error_move(err, &run.error);
    return run.result;
}

int tool_run(tool_fn *fn, void *arg, struct error **err)
{
    return tool_run_on(LOOP_ENGINE_AUTO, fn, arg, err);
}

void tool_size_text(char *buf, size_t size, uint64_t bytes)
{
    static const char *const units[] = {"", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"};
    double value = (double)bytes;
    unsigned unit = 0;

    /* As printf's %g with three digits would have it: 1000 to 1023 of a unit go to the next one. */
    while (unit + 1 < ARRAY_SIZE(units) && value >= 1000) {
        value /= 1024;
        unit++;
    }
    (void)snprintf(buf, size, "%0.3g %sB", value, units[unit]);
}

/* ---- progress ---- */

static volatile sig_atomic_t asked;

static void ask(int signal)
{
    (void)signal;
    asked = 1;
}

static void print_progress(struct tool_progress *p)
{
    double percent =
        p->total ? (double)MIN(atomic_get(&p->done), p->total) * 100 / (double)p->total : 100;

    if (p->shown &&
        (p->printed < 0 || percent >= p->printed + 1 || (asked && percent > p->printed))) {
        printf("    (%3.2f/100%%)\r", percent);
        (void)fflush(stdout);
        p->printed = percent;
    } else if (asked) {
        (void)fprintf(stderr, "    (%3.2f/100%%)\n", percent);
    }
    asked = 0;
}

static void co_fn watch(void *arg)
{
    struct tool_progress *p = arg;

    do {
        print_progress(p);
    } while (co_sleep_until(loop_clock() + LOOK_NS) == 0);
}

void tool_progress_begin(struct tool_progress *p, bool shown, uint64_t total)
{
    struct sigaction action = {.sa_handler = ask, .sa_flags = SA_RESTART};

    *p = (struct tool_progress){.shown = shown, .total = total, .printed = -1};
    (void)sigaction(SIGUSR1, &action, NULL);
    co_scope_init(&p->scope);
    (void)co_scope_start(&p->scope, watch, p); /* without it nothing is shown */
}

void tool_progress_end(struct tool_progress *p, bool whole)
{
    co_scope_cancel(&p->scope);
    co_scope_join(&p->scope);
    (void)signal(SIGUSR1, SIG_IGN); /* late askers do not end us */
    if (!p->shown)
        return;
    if (whole)
        printf("    (100.00/100%%)\r");
    printf("\n");
    (void)fflush(stdout);
}
