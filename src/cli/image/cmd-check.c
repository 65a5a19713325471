/* SPDX-License-Identifier: Apache-2.0 */
/* cairn check: is an image sound? Repairs it on demand. What it prints, and its exit status, are those of `qemu-img check`. */
#include "cli/image/check-imported.h"
#include "cli/image/check-print.h"
#include "cli/image/tool.h"
#include "formats/qcow2/check/qcow2-check.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct check_command {
    struct image_spec spec;
    bool json;
    bool no_output;
    struct qcow2_check_options options;

    struct image image;
    struct qcow2_check_result result;
    enum check_status status;
};

/* ---- opening ---- */

static int co_fn control_fn open_file(struct check_command *c, struct graph *g, struct error **err)
{
    bool writes = c->spec.flags & IMAGE_WRITE;
    struct access access = {
        .wants = ACCESS_READ | (writes ? ACCESS_WRITE | ACCESS_RESIZE : 0),
        .tolerates =
            c->spec.flags & IMAGE_SHARE ? ACCESS_ALL : ACCESS_READ | ACCESS_WRITE_UNCHANGED,
    };
    int r = image_co_open(&c->image, g, "c", &c->spec, err);

    if (r == 0)
        r = image_co_backend(&c->image.backend, g, c->image.layers[0].file_node, access, err);
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

static int co_fn control_fn check_file(struct check_command *c, struct graph *g, struct error **err)
{
    int r = open_file(c, g, err);

    if (r < 0)
        return r;
    if (check_imported_is_for(image_format(&c->image))) {
        r = check_imported_co(&c->image, &c->result.corruptions, err);
        c->status = r < 0 ? CHECK_FAILED : check_status_of(&c->result);
        return r;
    }
    if (strcmp(image_format(&c->image), "qcow2") != 0) {
        c->status = CHECK_NOT_SUPPORTED;
        return error_set(err, ENOTSUP, "images of format '%s' cannot be checked",
                         image_format(&c->image));
    }
    r = qcow2_co_check(c->image.backend, &c->options, &c->result, err);
    if (r < 0)
        return error_wrap(err, r, "cannot check '%s'", c->spec.name);
    c->status = check_status_of(&c->result);
    return 0;
}

/* ---- what it prints ---- */

static void print_json(const struct check_command *c)
{
    const char *format = image_format(&c->image);
    json_t *o = json_pack("{s:s, s:s}", "filename", c->spec.name, "format", format);

    if (!o)
        o = json_pack("{s:s}", "format", format); /* the name is not UTF-8 */
    check_print_json(o, &c->result);
}

static int co_fn control_fn check(struct graph *g, void *arg, struct error **err)
{
    struct check_command *c = arg;
    int r = check_file(c, g, err);

    if (r == 0 && c->json)
        print_json(c); /* also with -q: it was asked for */
    else if (r == 0 && !c->no_output)
        check_print_text(&c->result);
    image_co_close(&c->image);
    return r;
}

/* ---- options ---- */

static int read_repair(struct check_command *c, struct error **err)
{
    c->spec.flags |= IMAGE_WRITE;
    if (strcmp(optarg, "leaks") == 0)
        c->options.repair = QCOW2_REPAIR_LEAKS;
    else if (strcmp(optarg, "all") == 0)
        c->options.repair = QCOW2_REPAIR_ALL;
    else
        return cli_usage(err, "-r %s: it is 'leaks' or 'all'", optarg);
    return 0;
}

static int read_option(struct check_command *c, int opt, struct error **err)
{
    switch (opt) {
    case 'r':
        return read_repair(c, err);
    case 'q':
        c->no_output = true;
        return 0;
    case 'T':
        return cli_usage(err, "-T: how the host caches does not matter to a check: leave it out");
    case TOOL_OUTPUT:
        return tool_read_output(optarg, &c->json, err);
    default:
        return tool_image_option(&c->spec, opt);
    }
}

static int read_options(struct check_command *c, int argc, char **argv, struct error **err)
{
    static const struct option options[] = {
        TOOL_LONG_OPTIONS,
        {"format", required_argument, NULL, 'f'},
        {"repair", required_argument, NULL, 'r'},
        {"quiet", no_argument, NULL, 'q'},
        {"force-share", no_argument, NULL, 'U'},
        {"output", required_argument, NULL, TOOL_OUTPUT},
        {NULL, 0, NULL, 0},
    };
    int opt;
    int r = 0;

    while (r == 0 && (opt = tool_next_option(argc, argv, "f:r:qUT:", options, err)) != -1)
        r = read_option(c, opt, err);
    if (r == 0 && c->options.repair != QCOW2_REPAIR_NOTHING && c->spec.flags & IMAGE_SHARE)
        r = error_set(err, EINVAL, "-U and -r exclude each other: who repairs shares nothing");
    if (r == 0)
        r = tool_only_image(&c->spec, argc, argv, err);
    return r;
}

static int check_run(int argc, char **argv, struct error **err)
{
    struct check_command c = {
        .spec.flags = IMAGE_FILE,
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
        r = tool_run(check, &c, err);
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
