/* SPDX-License-Identifier: Apache-2.0 */
/* cairn bench: requests one after the other, many at a time, and how long they take. */
#include "base/alloc.h"
#include "base/macros.h"
#include "cli/image/tool.h"
#include "cli/progress.h"
#include "loop/iobuf.h"
#include "loop/scope.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#define DEPTH_MAX 1024

struct bench {
    struct image_spec spec;
    uint64_t count;
    uint64_t depth;
    uint64_t size;
    uint64_t step;
    uint64_t offset;
    uint64_t pattern;
    uint64_t flush_interval;
    struct tool_cache cache;
    bool writes;
    bool no_drain;
    bool has_pattern;
    bool quiet;

    struct image image;
    struct iobuf *buf; /* all requests use it, as the content does not matter */
    uint64_t sent;
    uint64_t round_end; /* no request goes out past it until all before it have ended */
    int result;
};

static int co_fn one(struct bench *b, uint64_t number)
{
    unsigned flags = b->cache.writethrough ? REQUEST_FUA : 0;
    uint64_t at = b->offset;
    int r;

    b->offset += b->step;
    if (b->offset + b->size > backend_size(b->image.backend))
        b->offset = 0;
    if (b->writes)
        r = image_co_write(b->image.backend, at, b->buf->data, b->size, flags, b->buf);
    else
        r = image_co_read(b->image.backend, at, b->buf->data, b->size, b->buf);
    if (r == 0 && b->no_drain && (number + 1) % b->flush_interval == 0)
        r = image_co_flush(b->image.backend);
    return r;
}

static void co_fn work(void *arg)
{
    struct bench *b = arg;

    while (b->result == 0 && b->sent < b->round_end) {
        int r = one(b, b->sent++);

        if (r == 0 && cli_interrupted())
            r = -EINTR;
        if (r < 0)
            b->result = r;
    }
}

static int co_fn run_round(struct bench *b)
{
    struct co_scope scope;

    co_scope_init(&scope);
    for (uint64_t i = 0; i < b->depth && b->result == 0; i++) {
        int r = co_scope_start(&scope, work, b);

        if (r < 0)
            b->result = r;
    }
    co_scope_join(&scope);
    return b->result;
}

static int co_fn run_all(struct bench *b)
{
    bool drains = b->flush_interval && !b->no_drain;
    int r = 0;

    while (r == 0 && b->sent < b->count) {
        b->round_end = drains ? MIN(b->sent + b->flush_interval, b->count) : b->count;
        r = run_round(b);
        if (r == 0 && drains)
            r = image_co_flush(b->image.backend);
    }
    return r;
}

static void announce(const struct bench *b)
{
    if (b->quiet)
        return;
    printf("Sending %" PRIu64 " %s requests, %" PRIu64 " bytes each, %" PRIu64
           " in parallel (starting at offset %" PRIu64 ", step size %" PRIu64 ")\n",
           b->count, b->writes ? "write" : "read", b->size, b->depth, b->offset, b->step);
    if (b->flush_interval)
        printf("Sending flush every %" PRIu64 " requests\n", b->flush_interval);
    (void)fflush(stdout);
}

static int co_fn control_fn bench(struct graph *g, void *arg, struct error **err)
{
    struct bench *b = arg;
    uint64_t begin;
    int r = image_co_open(&b->image, g, "i", &b->spec, err);

    if (r == 0 && b->offset + b->size > backend_size(b->image.backend))
        r = error_set(err, EINVAL,
                      "a request of %" PRIu64 " bytes at offset %" PRIu64
                      " ends beyond the image, of %" PRIu64 " bytes",
                      b->size, b->offset, backend_size(b->image.backend));
    b->buf = iobuf_new(b->size);
    if (r == 0 && !b->buf)
        r = error_set(err, ENOMEM, "no memory for requests of %" PRIu64 " bytes", b->size);
    if (r == 0) {
        memset(b->buf->data, (int)b->pattern, b->size);
        if (b->writes)
            image_warn_probed(&b->image);
        announce(b);
        begin = progress_now_ms();
        r = run_all(b);
        if (r < 0)
            r = error_set(err, -r, "Failed request: %s", strerror(-r));
        else if (!b->quiet)
            printf("Run completed in %3.3f seconds.\n", (double)(progress_now_ms() - begin) / 1000);
    }
    iobuf_unref(b->buf);
    image_co_close(&b->image);
    return r;
}

enum { FLUSH_INTERVAL = TOOL_FIRST_FREE, NO_DRAIN, PATTERN };

static int read_more(struct bench *b, int opt, struct error **err)
{
    switch (opt) {
    case 'i':
        return error_set(err, ENOTSUP, "-i %s: the way of doing I/O is chosen for all images",
                         optarg);
    case 'n':
        b->cache.flags |= IMAGE_DIRECT;
        return 0;
    case 't':
        return tool_read_cache(optarg, &b->cache, err);
    case 'w':
        b->writes = true;
        return 0;
    case 'q':
        b->quiet = true;
        return 0;
    case NO_DRAIN:
        b->no_drain = true;
        return 0;
    default:
        return tool_image_option(&b->spec, opt);
    }
}

static int read_option(struct bench *b, int opt, struct error **err)
{
    switch (opt) {
    case 'c':
        return tool_read_number("request count", optarg, 0, INT32_MAX, &b->count, err);
    case 'd':
        return tool_read_number("queue depth", optarg, 1, DEPTH_MAX, &b->depth, err);
    case 'o':
        return tool_read_size("offset", optarg, &b->offset, err);
    case 's':
        return tool_read_size("buffer size", optarg, &b->size, err);
    case 'S':
        return tool_read_size("step size", optarg, &b->step, err);
    case FLUSH_INTERVAL:
        return tool_read_number("flush interval", optarg, 0, INT32_MAX, &b->flush_interval, err);
    case PATTERN:
        b->has_pattern = true;
        return tool_read_number("pattern byte", optarg, 0, 255, &b->pattern, err);
    default:
        return read_more(b, opt, err);
    }
}

static int check(struct bench *b, struct error **err)
{
    if (!b->writes && b->flush_interval)
        return error_set(err, EINVAL, "--flush-interval is only available in write tests");
    if (!b->writes && b->has_pattern)
        return error_set(err, EINVAL, "--pattern is only available in write tests");
    if (b->flush_interval && b->flush_interval < b->depth)
        return error_set(err, EINVAL, "Flush interval can't be smaller than depth");
    if (b->no_drain && !b->flush_interval)
        return error_set(err, EINVAL, "--no-drain needs --flush-interval");
    if (!b->size || b->size > BACKEND_MAX_DATA)
        return error_set(err, EINVAL, "Invalid buffer size: 1 to %" PRIu64 " bytes",
                         BACKEND_MAX_DATA);
    if (b->writes && b->spec.flags & IMAGE_SHARE)
        return error_set(err, EINVAL, "-U and -w exclude each other");
    b->step = b->step ? b->step : b->size;
    b->spec.flags |= b->cache.flags | (b->writes ? (unsigned)IMAGE_WRITE : 0);
    return 0;
}

static int bench_run(int argc, char **argv, struct error **err)
{
    static const struct option options[] = {
        TOOL_LONG_OPTIONS,
        {"flush-interval", required_argument, NULL, FLUSH_INTERVAL},
        {"no-drain", no_argument, NULL, NO_DRAIN},
        {"pattern", required_argument, NULL, PATTERN},
        {"force-share", no_argument, NULL, 'U'},
        {NULL, 0, NULL, 0},
    };
    struct bench b = {.count = 75000, .depth = 64, .size = 4096};
    int opt;
    int r = 0;

    while (r == 0 &&
           (opt = tool_next_option(argc, argv, "c:d:f:i:no:qs:S:t:wU", options, err)) != -1)
        r = read_option(&b, opt, err);
    if (r == 0)
        r = tool_only_image(&b.spec, argc, argv, err);
    if (r == 0)
        r = check(&b, err);
    if (r < 0)
        return r;
    cli_catch_signals();
    return tool_run(bench, &b, err);
}

const struct cli_command bench_command = {
    .name = "bench",
    .summary = "time requests to an image",
    .arguments = "[OPTION]... FILE",
    .help =
        "Reads or writes a piece of an image after the other, several at a time, and says how long it took.\n"
        "\n"
        "  -w                        write; the content is lost\n"
        "  -c COUNT, -d DEPTH        so many requests (75000), so many of them at a time (64, at most 1024)\n"
        "  -s SIZE, -S STEP          of each one (4k), and from one to the next (SIZE)\n"
        "  -o OFFSET                 of the first one\n"
        "      --pattern BYTE        what is written\n"
        "      --flush-interval N    flush after each N writes, when these have ended\n"
        "      --no-drain            do not wait for that\n"
        "  -t CACHE, -n              none, writeback (default), writethrough, directsync, unsafe; -n is none\n"
        "  -f FORMAT                 of FILE: raw, qcow2, vdi, vhdx, vmdk, vpc; by default it is probed\n"
        "      --image-opts          FILE is options: driver=qcow2,file.filename=PATH\n"
        "  -q                        print nothing\n"
        "  -U, --force-share         although others write to it\n"
        "      --allow DIR           what images refer to may lie in DIR, too\n"
        "  -h, --help                say this and exit\n",
    .is_image_tool = true,
    .run = bench_run,
};
