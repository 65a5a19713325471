/* SPDX-License-Identifier: Apache-2.0 */
/* cairn commit: what an image holds goes into its backing file. */
#include "cli/image/image-commit.h"
#include "cli/image/tool.h"

#include <stdio.h>

struct commit {
    struct image_commit how;
    struct tool_cache cache;
    bool quiet;
};

static int co_fn control_fn commit(struct graph *g, void *arg, struct error **err)
{
    struct commit *x = arg;
    int r = image_co_commit(g, &x->how, err);

    if (r == 0 && !x->quiet)
        printf("Image committed.\n");
    return r;
}

static int read_option(struct commit *x, int opt, struct error **err)
{
    switch (opt) {
    case 't':
        return tool_read_cache(optarg, &x->cache, err);
    case 'b':
        x->how.spec.base = optarg;
        x->how.keep = true; /* who names a base may have others above it */
        return 0;
    case 'd':
        x->how.keep = true;
        return 0;
    case 'p':
        x->how.progress = true;
        return 0;
    case 'q':
        x->quiet = true;
        return 0;
    case 'r':
        return tool_read_size("rate limit", optarg, &x->how.rate, err);
    default:
        return tool_image_option(&x->how.spec, opt);
    }
}

static int commit_run(int argc, char **argv, struct error **err)
{
    static const struct option options[] = {
        TOOL_LONG_OPTIONS,
        {NULL, 0, NULL, 0},
    };
    struct commit x = {.how.spec.flags = IMAGE_WRITE | IMAGE_COMMIT};
    int opt;
    int r = 0;

    while (r == 0 && (opt = tool_next_option(argc, argv, "f:t:b:dpqr:", options, err)) != -1)
        r = read_option(&x, opt, err);
    if (r == 0)
        r = tool_only_image(&x.how.spec, argc, argv, err);
    if (r < 0)
        return r;
    x.how.progress = x.how.progress && !x.quiet;
    x.how.spec.flags |= x.cache.flags;
    x.how.writethrough = x.cache.writethrough;
    cli_catch_signals();
    return tool_run(commit, &x, err);
}

const struct cli_command commit_command = {
    .name = "commit",
    .summary = "write what an image holds into its backing file",
    .arguments = "[OPTION]... FILE",
    .help =
        "Writes what FILE holds itself into its backing file, which grows if it is smaller, and then empties FILE, so that the\n"
        "disk shows what it showed. Until all is durable in the backing file, FILE is what it was. What others see through the\n"
        "backing file changes.\n"
        "\n"
        "  -b BASE            write into BASE, further down in the chain, what all layers above it hold; implies -d. The\n"
        "                     layers between do not show anything useful any more\n"
        "  -d                 do not empty FILE\n"
        "  -r RATE            at most so many bytes per second\n"
        "  -f FORMAT          of FILE: qcow2; by default it is probed\n"
        "  -t CACHE           of all layers (writeback): none, writeback, writethrough, directsync, unsafe\n"
        "  -p, -q             show progress; print nothing\n"
        "      --image-opts   FILE is options: driver=qcow2,file.filename=PATH\n"
        "      --allow DIR    what images refer to may lie in DIR, too\n"
        "  -h, --help         say this and exit\n",
    .is_image_tool = true,
    .run = commit_run,
};
