/* SPDX-License-Identifier: Apache-2.0 */
/* cairn io: the command line, under its own name and under the peer's. */
#include "base/alloc.h"
#include "base/macros.h"
#include "cli/cli.h"
#include "cli/image/personality.h"
#include "cli/image/tool.h"
#include "cli/io/io-peer.h"
#include "cli/io/io.h"
#include "config.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* What the command line says. */
struct io_run {
    struct io_open how;
    const char **lines; /* -c */
    size_t line_count;
};

/* Not an exit status of tools: what went wrong has been said. */
static void co_fn control_fn run_lines(struct io *io, const struct io_run *run)
{
    if (run->line_count) {
        for (size_t i = 0; i < run->line_count && !io->quit; i++)
            io_run_line(io, run->lines[i]);
        return;
    }
    while (!io->quit) {
        char *line;

        printf("%s> ", strcmp(cli_program, "cairn") == 0 ? "cairn io" : cli_program);
        (void)fflush(stdout);
        line = io_co_line();
        if (!line)
            break;
        io_run_line(io, line);
        free(line);
    }
}

static int co_fn control_fn io_main(struct graph *g, void *arg, struct error **err)
{
    struct io_run *run = arg;
    struct io io;
    int r = 0;

    io_init(&io, g);
    if (run->how.name)
        r = io_open_image(&io, &run->how, err);
    if (r == 0)
        run_lines(&io, run);
    io_close_image(&io);
    if (r == 0 && io.failed)
        cli_set_exit_status(CLI_FAILED);
    return r;
}

static void add_line(struct io_run *run, const char *line)
{
    size_t n = run->line_count;

    /* By doubling: there may be many. */
    if ((n & (n - 1)) == 0) {
        run->lines = realloc(run->lines, MAX(2 * n, (size_t)1) * sizeof(*run->lines));
        if (!run->lines)
            abort(); /* as all small memory */
    }
    run->lines[run->line_count++] = line;
}

static int read_option(struct io_run *run, int opt, struct error **err)
{
    int r;

    switch (opt) {
    case 'c':
        add_line(run, optarg);
        return 0;
    case 'f':
        free(run->how.format);
        run->how.format = xstrdup(optarg);
        return 0;
    case 'T':
        return error_set(err, ENOTSUP, "-T %s: there are no trace events", optarg);
    case TOOL_IMAGE_OPTS:
        run->how.options = true;
        return 0;
    default:
        r = io_open_option(&run->how, opt, optarg, err);
        return r > 0 ? opt : r;
    }
}

static int read_arguments(struct io_run *run, int argc, char **argv, struct error **err)
{
    static const struct option options[] = {
        TOOL_LONG_OPTIONS,
        {"cmd", required_argument, NULL, 'c'},
        {"format", required_argument, NULL, 'f'},
        {"read-only", no_argument, NULL, 'r'},
        {"snapshot", no_argument, NULL, 's'},
        {"nocache", no_argument, NULL, 'n'},
        {"copy-on-read", no_argument, NULL, 'C'},
        {"misalign", no_argument, NULL, 'm'},
        {"native-aio", no_argument, NULL, 'k'},
        {"aio", required_argument, NULL, 'i'},
        {"cache", required_argument, NULL, 't'},
        {"discard", required_argument, NULL, 'd'},
        {"trace", required_argument, NULL, 'T'},
        {"force-share", no_argument, NULL, 'U'},
        {NULL, 0, NULL, 0},
    };
    int opt;
    int r = 0;

    while (r == 0 &&
           (opt = tool_next_option(argc, argv, "c:f:rsnCmki:t:d:T:U", options, err)) != -1)
        r = read_option(run, opt, err);
    if (r < 0)
        return r;
    if (argc - optind > 1)
        return cli_usage(err, "more than one image");
    if (run->how.options && run->how.format)
        return error_set(err, EINVAL, "--image-opts and -f are mutually exclusive");
    if (optind < argc)
        run->how.name = xstrdup(argv[optind]);
    return 0;
}

static int io_run(int argc, char **argv, struct error **err)
{
    struct io_run run = {.how = io_open_default()};
    int r = read_arguments(&run, argc, argv, err);

    if (r == 0)
        r = tool_run(io_main, &run, err);
    io_open_release(&run.how);
    free(run.lines);
    return r;
}

const struct cli_command io_command = {
    .name = "io",
    .summary = "read and write pieces of an image, by commands",
    .arguments = "[OPTION]... [-c COMMAND]... [FILE]",
    .help =
        "Runs commands on an image: those of -c, or lines of standard input. `cairn io -c help` lists them.\n"
        "\n"
        "  -c, --cmd COMMAND     run it; may be given several times\n"
        "  -r, --read-only       open the image for reading only\n"
        "  -s, --snapshot        write to a temporary layer; the image stays as it is\n"
        "  -t, --cache CACHE     none, writeback, writethrough (default), directsync, unsafe\n"
        "  -n, --nocache         -t none\n"
        "  -d, --discard MODE    unmap (default) or ignore\n"
        "  -f, --format FORMAT   of FILE: raw, qcow2, vdi, vhdx, vmdk, vpc; by default it is probed\n"
        "      --image-opts      FILE is options: driver=qcow2,file.filename=PATH\n"
        "  -U, --force-share     although others write to it; with -r\n"
        "      --allow DIR       what images refer to may lie in DIR, too\n"
        "  -h, --help            say this and exit\n"
        "\n"
        "Exit status: 0; 1 if a command has failed.\n",
    .is_image_tool = true,
    .run = io_run,
};

/* ---- under the peer's name ---- */

bool io_called_as_peer(const char *argv0)
{
    const char *slash = strrchr(argv0, '/');

    return strcmp(slash ? slash + 1 : argv0, "qemu-io") == 0;
}

static void print_help(void)
{
    printf("Usage: qemu-io [OPTIONS]... [-c STRING]... [file]\n"
           "QEMU Disk exerciser, as cairn " CAIRN_VERSION " has it\n\n%s\n"
           "See 'qemu-io -c help' for information on available commands.\n",
           io_command.help);
}

int io_peer_main(int argc, char **argv)
{
    struct error *err = NULL;
    int r;

    cli_program = "qemu-io";
    image_follow_all();
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "-V") == 0 || strcmp(argv[i], "--version") == 0) {
            printf("qemu-io version " PEER_VERSION " (cairn " CAIRN_VERSION ")\n");
            return 0;
        }
    }
    r = io_run(argc, argv, &err);
    if (r == CLI_WANTS_HELP) {
        print_help();
        return 0;
    }
    if (err)
        (void)io_say("%s", error_text(err));
    if (r == CLI_WRONG_USAGE)
        (void)fprintf(stderr, "Try 'qemu-io --help' for more information\n");
    error_free(&err);
    if ((fflush(stdout) < 0 || ferror(stdout)) && r == 0)
        r = io_say("cannot write to standard output");
    return r || cli_exit_status() > 0 ? CLI_FAILED : 0;
}
