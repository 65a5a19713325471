/* SPDX-License-Identifier: Apache-2.0 */
/* cairn compare: do two images show the same disk? The exit status says: 0 yes, 1 no, 2 to 4 it could not be told. */
#include "base/macros.h"
#include "cli/image/extent-walk.h"
#include "cli/image/image-copy.h"
#include "cli/image/tool.h"
#include "loop/iobuf.h"

#include <errno.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#define CHUNK  ((uint64_t)1 << 20)
#define SECTOR 512

enum compare_status {
    COMPARE_SAME,
    COMPARE_DIFFERENT,
    COMPARE_CANNOT_OPEN,
    COMPARE_CANNOT_ASK,
    COMPARE_CANNOT_READ,
};

struct compare {
    struct image_spec specs[2];
    bool strict;
    bool quiet;
    bool progress;

    struct image images[2];
    struct extent_walk walks[2];
    struct iobuf *bufs[2];
    struct tool_progress bar;
};

static void PRINTF_LIKE(2, 3) say(const struct compare *c, const char *fmt, ...)
{
    va_list args;

    va_start(args, fmt);
    if (!c->quiet)
        (void)vprintf(fmt, args);
    va_end(args);
}

static int co_fn read_both(struct compare *c, uint64_t at, size_t len, const struct extent e[2],
                           struct error **err)
{
    for (unsigned i = 0; i < 2; i++) {
        int r = 0;

        if (e[i].flags & EXTENT_ZERO)
            memset(c->bufs[i]->data, 0, len);
        else
            r = image_co_read(c->images[i].backend, at, c->bufs[i]->data, len, c->bufs[i]);
        if (r < 0) {
            cli_set_exit_status(COMPARE_CANNOT_READ);
            return error_set(err, -r, "Error while reading offset %" PRIu64 " of %s: %s", at,
                             c->specs[i].name, strerror(-r));
        }
    }
    return 0;
}

/* Who was interrupted has found no difference. */
static int refuse_interrupted(struct error **err)
{
    if (!cli_interrupted())
        return 0;
    cli_set_exit_status(COMPARE_CANNOT_READ);
    return cli_interrupted_error(err);
}

/* 1: they are different, and it is said where. */
static int co_fn compare_data(struct compare *c, uint64_t at, uint64_t len,
                              const struct extent e[2], struct error **err)
{
    for (uint64_t end = at + len; at < end;) {
        size_t n = (size_t)MIN(CHUNK, end - at);
        int r = refuse_interrupted(err);

        if (r == 0)
            r = read_both(c, at, n, e, err);
        if (r < 0)
            return r;
        for (size_t i = 0; memcmp(c->bufs[0]->data, c->bufs[1]->data, n) != 0; i += SECTOR) {
            if (memcmp(c->bufs[0]->data + i, c->bufs[1]->data + i, MIN(n - i, (size_t)SECTOR)) == 0)
                continue;
            say(c, "Content mismatch at offset %" PRIu64 "!\n", at + i);
            return 1;
        }
        at += n;
        c->bar.done += n;
    }
    return 0;
}

/* What strict mode compares. Data may come from any layer. */
static unsigned status(const struct extent *e)
{
    unsigned own = e->flags & EXTENT_ZERO ? EXTENT_ALLOCATED : 0;

    return e->flags & (EXTENT_DATA | EXTENT_ZERO | own);
}

static int co_fn compare_all(struct compare *c, struct error **err)
{
    uint64_t sizes[2] = {image_size(&c->images[0]), image_size(&c->images[1])};
    uint64_t size = MAX(sizes[0], sizes[1]);
    uint64_t common = MIN(sizes[0], sizes[1]);

    bool warned = false;

    if (sizes[0] != sizes[1] && c->strict) {
        say(c, "Strict mode: Image size mismatch!\n");
        return 1;
    }
    for (uint64_t at = 0; at < size;) {
        struct extent e[2];
        uint64_t len = at < common ? common - at : size - at;
        int r;

        r = refuse_interrupted(err);
        if (r < 0)
            return r;
        if (at >= common && !warned)
            say(c, "Warning: Image size mismatch!\n");
        warned = at >= common;
        for (unsigned i = 0; i < 2; i++) {
            r = extent_walk_at(&c->walks[i], at, len, &e[i]);
            if (r < 0) {
                cli_set_exit_status(COMPARE_CANNOT_ASK);
                return error_set(err, -r, "Sector allocation test failed for %s: %s",
                                 c->specs[i].name, strerror(-r));
            }
            len = e[i].len;
        }
        if (c->strict && status(&e[0]) != status(&e[1])) {
            say(c, "Strict mode: Offset %" PRIu64 " block status mismatch!\n", at);
            return 1;
        }
        if (!(e[0].flags & e[1].flags & EXTENT_ZERO)) {
            r = compare_data(c, at, len, e, err);
            if (r != 0)
                return r;
        } else {
            c->bar.done += len;
        }
        at += len;
    }
    say(c, "Images are identical.\n");
    return 0;
}

static int co_fn control_fn compare(struct graph *g, void *arg, struct error **err)
{
    static const char *const prefixes[] = {"a", "b"};
    struct compare *c = arg;
    int r = 0;

    for (unsigned i = 0; r == 0 && i < 2; i++) {
        c->bufs[i] = iobuf_new(CHUNK);
        r = c->bufs[i] ? image_co_open(&c->images[i], g, prefixes[i], &c->specs[i], err)
                       : error_set(err, ENOMEM, "no memory");
        c->walks[i].backend = c->images[i].backend;
    }
    if (r == 0) {
        cli_set_exit_status(COMPARE_DIFFERENT);
        tool_progress_begin(&c->bar, c->progress,
                            MAX(image_size(&c->images[0]), image_size(&c->images[1])));
        r = compare_all(c, err);
        tool_progress_end(&c->bar, r == 0);
        if (r == 0)
            cli_set_exit_status(COMPARE_SAME);
    }
    for (unsigned i = 0; i < 2; i++) {
        image_co_close(&c->images[i]);
        iobuf_unref(c->bufs[i]);
    }
    return MIN(r, 0);
}

static int read_option(struct compare *c, int opt, struct error **err)
{
    struct tool_cache cache;
    int r = 0;

    switch (opt) {
    case 'f':
    case 'F':
        c->specs[opt == 'F'].format = optarg;
        return 0;
    case 'T':
        r = tool_read_cache(optarg, &cache, err);
        for (unsigned i = 0; r == 0 && i < 2; i++)
            c->specs[i].flags |= cache.flags & IMAGE_DIRECT;
        if (r < 0)
            cli_set_exit_status(COMPARE_CANNOT_OPEN);
        return r;
    case 'p':
        c->progress = true;
        return 0;
    case 'q':
        c->quiet = true;
        return 0;
    case 's':
        c->strict = true;
        return 0;
    case 'U':
        c->specs[0].flags |= IMAGE_SHARE;
        c->specs[1].flags |= IMAGE_SHARE;
        return 0;
    case TOOL_IMAGE_OPTS:
        c->specs[0].options = true;
        c->specs[1].options = true;
        return 0;
    default:
        return opt;
    }
}

static int compare_run(int argc, char **argv, struct error **err)
{
    static const struct option options[] = {
        TOOL_LONG_OPTIONS,
        {"force-share", no_argument, NULL, 'U'},
        {NULL, 0, NULL, 0},
    };
    struct compare c = {.strict = false};
    int opt;
    int r = 0;

    while (r == 0 && (opt = tool_next_option(argc, argv, "f:F:T:pqsU", options, err)) != -1)
        r = read_option(&c, opt, err);
    if (r == 0 && argc - optind != 2)
        r = cli_usage(err, "Expecting two image file names");
    if (r < 0)
        return r;
    cli_set_exit_status(COMPARE_CANNOT_OPEN);
    r = tool_check_format(&c.specs[0], err);
    if (r == 0)
        r = tool_check_format(&c.specs[1], err);
    if (r < 0)
        return r;
    c.specs[0].name = argv[optind];
    c.specs[1].name = argv[optind + 1];
    c.progress = c.progress && !c.quiet;
    cli_catch_signals();
    return tool_run(compare, &c, err);
}

const struct cli_command compare_command = {
    .name = "compare",
    .summary = "say whether two images show the same disk",
    .arguments = "[OPTION]... FILE FILE",
    .help =
        "Compares the disks of two images. Where one is longer, the rest of it must be zeroes.\n"
        "Exit status: 0 the same, 1 different, 2 an image cannot be opened, 3 or 4 it cannot be read.\n"
        "\n"
        "  -f FORMAT, -F FORMAT  of the first and the second FILE; by default they are probed\n"
        "  -s                    strict: sizes and what is allocated must be the same, too\n"
        "  -T CACHE              none and directsync read past the host's cache\n"
        "  -p, -q                show progress; print nothing\n"
        "      --image-opts      FILE is options: driver=qcow2,file.filename=PATH\n"
        "  -U, --force-share     although others write to them\n"
        "      --allow DIR       what images refer to may lie in DIR, too\n"
        "  -h, --help            say this and exit\n",
    .is_image_tool = true,
    .run = compare_run,
};
