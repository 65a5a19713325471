/* SPDX-License-Identifier: Apache-2.0 */
/* cairn check: is an image sound? Repairs it on demand. What it prints, and its exit status, are those of `qemu-img check`. */
#include "cli/cli.h"
#include "cli/image/image.h"
#include "formats/list.h"
#include "formats/qcow2/qcow2-check.h"
#include "graph/backend.h"
#include "graph/graph.h"
#include "loop/loop.h"
#include "protocols/list.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* As the peer's. */
enum check_status {
    CHECK_SOUND = 0,
    CHECK_FAILED = 1,
    CHECK_CORRUPT = 2,
    CHECK_LEAKS = 3,
    CHECK_NOT_SUPPORTED = 63,
};

struct check_command {
    const char *name;
    const char *format;
    bool image_options;
    bool share;
    bool json;
    bool no_output;
    struct qcow2_check_options options;

    struct graph *graph;
    struct image image;
    struct qcow2_check_result result;
    enum check_status status;
    int r;
    struct error *error;
};

/* ---- opening ---- */

static int co_fn control_fn open_file(struct check_command *c, struct error **err)
{
    bool repair = c->options.repair != QCOW2_REPAIR_NOTHING;
    struct image_spec spec = {
        .name = c->name,
        .format = c->format,
        .options = c->image_options,
        .flags = IMAGE_FILE | (repair ? IMAGE_WRITE : 0) | (c->share ? IMAGE_SHARE : 0),
    };
    struct access access = {
        .wants = ACCESS_READ | (repair ? ACCESS_WRITE | ACCESS_RESIZE : 0),
        .tolerates = c->share ? ACCESS_ALL : ACCESS_READ | ACCESS_WRITE_UNCHANGED,
    };
    int r = image_co_open(&c->image, c->graph, "c", &spec, err);

    if (r == 0)
        r = image_co_backend(&c->image.backend, c->graph, c->image.layers[0].file_node, access,
                             err);
    return r;
}

/* ---- checking ---- */

static void say(void *arg, const char *line)
{
    (void)arg;
    (void)fprintf(stderr, "%s\n", line);
}

static bool interrupted(void *arg)
{
    (void)arg;
    return cli_interrupted();
}

static enum check_status status_of(const struct qcow2_check_result *r)
{
    if (r->check_errors)
        return CHECK_FAILED;
    if (r->corruptions)
        return CHECK_CORRUPT;
    return r->leaks ? CHECK_LEAKS : CHECK_SOUND;
}

static int co_fn control_fn check_file(struct check_command *c, struct error **err)
{
    int r = open_file(c, err);

    if (r < 0)
        return r;
    if (strcmp(image_format(&c->image), "qcow2") != 0) {
        c->status = CHECK_NOT_SUPPORTED;
        return error_set(err, ENOTSUP, "images of format '%s' cannot be checked",
                         image_format(&c->image));
    }
    r = qcow2_co_check(c->image.backend, &c->options, &c->result, err);
    if (r < 0)
        return error_wrap(err, r, "cannot check '%s'", c->name);
    c->status = status_of(&c->result);
    return 0;
}

static void co_fn control_fn body(void *arg)
{
    static const struct driver *const *const drivers[] = {protocol_drivers, format_drivers, NULL};
    struct check_command *c = arg;

    c->graph = graph_new(drivers);
    c->r = check_file(c, &c->error);
    image_co_close(&c->image);
    c->graph = graph_co_free(c->graph);
}

/* ---- what it prints ---- */

static void set_count(json_t *object, const char *key, uint64_t value, bool always)
{
    if (value || always)
        json_object_set_new(object, key, json_integer((json_int_t)value));
}

static void print_json(const struct check_command *c)
{
    const struct qcow2_check_result *r = &c->result;
    json_t *o = json_pack("{s:s, s:s}", "filename", c->name, "format", "qcow2");

    if (!o)
        o = json_pack("{s:s}", "format", "qcow2"); /* the name is not UTF-8 */
    set_count(o, "check-errors", r->check_errors, true);
    set_count(o, "image-end-offset", r->image_end_offset, false);
    set_count(o, "corruptions", r->corruptions, false);
    set_count(o, "leaks", r->leaks, false);
    set_count(o, "corruptions-fixed", r->corruptions_fixed, false);
    set_count(o, "leaks-fixed", r->leaks_fixed, false);
    set_count(o, "total-clusters", r->total_clusters, false);
    set_count(o, "allocated-clusters", r->allocated_clusters, false);
    set_count(o, "fragmented-clusters", r->fragmented_clusters, false);
    set_count(o, "compressed-clusters", r->compressed_clusters, false);
    cli_print_json(o, true);
}

static void print_findings(const struct qcow2_check_result *r)
{
    if (!(r->corruptions || r->leaks || r->check_errors)) {
        printf("No errors were found on the image.\n");
        return;
    }
    if (r->corruptions)
        printf("\n%" PRIu64 " errors were found on the image.\n"
               "Data may be corrupted, or further writes to the image may corrupt it.\n",
               r->corruptions);
    if (r->leaks)
        printf("\n%" PRIu64 " leaked clusters were found on the image.\n"
               "This means waste of disk space, but no harm to data.\n",
               r->leaks);
    if (r->check_errors)
        printf("\n%" PRIu64 " internal errors have occurred during the check.\n", r->check_errors);
}

static double percent(uint64_t part, uint64_t whole)
{
    return (double)part * 100.0 / (double)whole;
}

static void print_text(const struct qcow2_check_result *r)
{
    if (r->corruptions_fixed || r->leaks_fixed)
        printf("The following inconsistencies were found and repaired:\n\n"
               "    %" PRIu64 " leaked clusters\n    %" PRIu64 " corruptions\n\n"
               "Double checking the fixed image now...\n",
               r->leaks_fixed, r->corruptions_fixed);
    print_findings(r);
    if (r->total_clusters && r->allocated_clusters)
        printf("%" PRIu64 "/%" PRIu64 " = %.2f%% allocated, %.2f%% fragmented, %.2f%% compressed "
               "clusters\n",
               r->allocated_clusters, r->total_clusters,
               percent(r->allocated_clusters, r->total_clusters),
               percent(r->fragmented_clusters, r->allocated_clusters),
               percent(r->compressed_clusters, r->allocated_clusters));
    if (r->image_end_offset)
        printf("Image end offset: %" PRIu64 "\n", r->image_end_offset);
}

static int run(struct check_command *c, struct error **err)
{
    int r = loop_run_main(LOOP_ENGINE_AUTO, "check", body, c, err);
    if (r < 0)
        return r;
    if (c->r < 0) {
        error_move(err, &c->error);
        return c->r;
    }
    if (c->json)
        print_json(c); /* also with -q: it was asked for */
    else if (!c->no_output)
        print_text(&c->result);
    return 0;
}

/* ---- options ---- */

enum { OPTION_OUTPUT = 256, OPTION_OBJECT, OPTION_IMAGE_OPTIONS };

static int read_repair(struct check_command *c, struct error **err)
{
    if (strcmp(optarg, "leaks") == 0)
        c->options.repair = QCOW2_REPAIR_LEAKS;
    else if (strcmp(optarg, "all") == 0)
        c->options.repair = QCOW2_REPAIR_ALL;
    else
        return cli_usage(err, "-r %s: it is 'leaks' or 'all'", optarg);
    return 0;
}

static int read_output(struct check_command *c, struct error **err)
{
    c->json = strcmp(optarg, "json") == 0;
    if (!c->json && strcmp(optarg, "human") != 0)
        return cli_usage(err, "--output %s: it is 'human' or 'json'", optarg);
    return 0;
}

static int read_option(struct check_command *c, int opt, struct error **err)
{
    switch (opt) {
    case 'f':
        c->format = optarg;
        return 0;
    case 'r':
        return read_repair(c, err);
    case 'q':
        c->no_output = true;
        return 0;
    case 'U':
        c->share = true;
        return 0;
    case 'T':
        return cli_usage(err, "-T: how the host caches does not matter to a check: leave it out");
    case OPTION_OUTPUT:
        return read_output(c, err);
    case OPTION_OBJECT:
        return cli_usage(err, "--object: a check needs no key, and no other object: leave it out");
    case OPTION_IMAGE_OPTIONS:
        c->image_options = true;
        return 0;
    }
    return opt;
}

static int read_options(struct check_command *c, int argc, char **argv, struct error **err)
{
    static const struct option options[] = {
        CLI_HELP_OPTION,
        {"format", required_argument, NULL, 'f'},
        {"repair", required_argument, NULL, 'r'},
        {"quiet", no_argument, NULL, 'q'},
        {"force-share", no_argument, NULL, 'U'},
        {"output", required_argument, NULL, OPTION_OUTPUT},
        {"object", required_argument, NULL, OPTION_OBJECT},
        {"image-opts", no_argument, NULL, OPTION_IMAGE_OPTIONS},
        {NULL, 0, NULL, 0},
    };
    int opt;
    int r = 0;

    opterr = 0; /* we say it ourselves */
    while (r == 0 && (opt = getopt_long(argc, argv, ":hf:r:qUT:", options, NULL)) != -1) {
        if (opt == 'h')
            return CLI_WANTS_HELP;
        if (opt == ':')
            return cli_usage(err, "option '%s' needs a value", argv[optind - 1]);
        if (opt == '?')
            return cli_usage(err, "option '%s' is not understood", argv[optind - 1]);
        r = read_option(c, opt, err);
    }
    if (r == 0)
        r = cli_check_arguments(argc, 1, 1, "FILE", err);
    if (r == 0 && c->image_options && c->format)
        r = cli_usage(err, "--image-opts and -f exclude each other");
    if (r == 0)
        c->name = argv[optind];
    return r;
}

static int check_run(int argc, char **argv, struct error **err)
{
    struct check_command c = {
        .options = QCOW2_CHECK_OPTIONS_INIT,
        .status = CHECK_FAILED,
    };
    int r = read_options(&c, argc, argv, err);

    if (r == CLI_WANTS_HELP)
        return r;
    c.options.say = say;
    c.options.interrupted = interrupted;
    if (r == 0) {
        cli_catch_signals();
        r = run(&c, err);
    }
    /* The status of a wrong call is another one elsewhere; here that means damage. */
    cli_set_exit_status(r == 0 || c.status == CHECK_NOT_SUPPORTED ? (int)c.status
                                                                  : (int)CHECK_FAILED);
    return r;
}

const struct cli_command check_command = {
    .name = "check",
    .summary = "look for damage in an image, and repair it",
    .arguments = "[OPTION]... FILE",
    .help =
        "Checks an image that nobody writes to: are its tables sound, does every cluster have the refcount that it\n"
        "should have?\n"
        "\n"
        "  -f, --format FORMAT   qcow2: do not probe\n"
        "  -r, --repair WHAT     leaks: give back what nothing uses; all: mend all that can be mended\n"
        "      --output FORMAT   human (default) or json\n"
        "  -q, --quiet           print nothing but errors\n"
        "  -U, --force-share     although others may write to the image: what is found may not be true then\n"
        "      --image-opts      FILE is a list of options: driver=qcow2,file.filename=NAME\n"
        "  -h, --help            say this and exit\n"
        "\n"
        "Exit status: 0: sound; 1: the check failed; 2: damage was found, or is left; 3: leaks only; 63: the format\n"
        "cannot be checked.\n",
    .run = check_run,
};
