/* SPDX-License-Identifier: Apache-2.0 */
/* aio_read, aio_write and aio_flush: each request is a coroutine of its own, which says what became of it when it ends. */
#include "base/alloc.h"
#include "base/macros.h"
#include "cli/io/io.h"
#include "loop/co.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define PATTERN 0xcd

/* One that is under way. */
struct async {
    struct io *io;
    struct io_report report;
    struct io_check check;
    struct io_vector vector;
    struct io_transfer transfer;
    bool zeroes;
    bool invalid; /* it is only counted, as one that was refused */
    int pattern;
    bool has_pattern;
    int result; /* before it was sent */
};

static struct async *async_new(struct io *io)
{
    struct async *a = xnew(struct async);

    a->io = io;
    return a;
}

static void async_free(struct async *a)
{
    free(a->transfer.memory);
    free(a->vector.pieces);
    free(a);
}

static void co_fn control_fn run(void *arg)
{
    struct async *a = arg;
    int r = a->result;

    a->report.begun_ns = io_now_ns();
    if (r == 0 && a->zeroes)
        r = io_co_zero(a->io, a->transfer.offset, a->transfer.len, a->transfer.flags);
    else if (r == 0)
        r = io_co_transfer(a->io, &a->transfer);
    co_yield (); /* its result never comes before that of the command which started it */
    if (r < 0) {
        printf("%s failed: %s\n", a->transfer.writes ? "aio_write" : "readv", strerror(-r));
    } else {
        a->check.dump &= !a->report.quiet;
        (void)io_check_bytes(&a->check, a->transfer.memory, a->transfer.offset, a->transfer.len);
        io_report_print(&a->report);
    }
    (void)fflush(stdout); /* whoever waits for it may read us through a pipe */
    io_wake(a->io);
    async_free(a);
}

/* Takes it. Whatever becomes of the request, the command has succeeded when it is on its way. */
static int co_fn start(struct async *a)
{
    struct io *io = a->io;
    int r = 0;

    if (a->invalid) {
        printf("injecting invalid %s request\n", a->transfer.writes ? "write" : "read");
        backend_count_invalid(io->image.backend, a->transfer.writes ? REQUEST_WRITE : REQUEST_READ);
        async_free(a);
        return 0;
    }
    a->report.offset = a->transfer.offset;
    a->report.len = a->transfer.len = a->check.len = a->vector.len;
    a->transfer.pieces = a->vector.pieces;
    a->transfer.piece_count = a->vector.count;
    if (!a->zeroes)
        a->result = io_transfer_memory(io, &a->transfer, a->transfer.writes ? a->pattern : 0);
    r = co_scope_start(&io->async, run, a);
    if (r < 0) {
        async_free(a);
        return io_say("cannot start the request: %s", strerror(-r));
    }
    return 0;
}

/* What both commands have. */
static int common_option(struct async *a, const char *command, int opt)
{
    if (opt != 'i')
        return io_report_option(&a->report, command, opt);
    a->invalid = true;
    return 0;
}

static int read_range(struct async *a, int argc, char **argv)
{
    int r = io_read_size(argv[optind], &a->transfer.offset);

    if (r == 0 && a->zeroes) /* of any length: there is no memory */
        return io_read_size(argv[optind + 1], &a->vector.len);
    return r < 0 ? r : io_read_vector(&a->vector, argc - optind - 1, argv + optind + 1);
}

static int aio_read_arguments(struct async *a, int argc, char **argv)
{
    int r = 0;
    int opt;

    while (r == 0 && (opt = getopt(argc, argv, "CiP:qv")) != -1) {
        if (opt == 'P') {
            a->check.has_pattern = true;
            r = io_read_pattern(optarg, &a->check.pattern);
        } else if (opt == 'v') {
            a->check.dump = true;
        } else {
            r = common_option(a, argv[0], opt);
        }
    }
    if (r == 0 && optind > argc - 2)
        r = io_wrong_usage(argv[0]);
    return r < 0 || a->invalid ? r : read_range(a, argc, argv);
}

int co_fn control_fn io_cmd_aio_read(struct io *io, int argc, char **argv)
{
    struct async *a = async_new(io);
    int r = aio_read_arguments(a, argc, argv);

    if (r < 0) {
        async_free(a);
        return r;
    }
    a->report.verb = "read";
    return start(a);
}

static int check_zeroes(const struct async *a, int argc)
{
    if (a->zeroes && optind != argc - 2) {
        printf("-z supports only a single length parameter\n");
        return -EINVAL;
    }
    if (a->transfer.flags & REQUEST_MAY_UNMAP && !a->zeroes) {
        printf("-u requires -z to be specified\n");
        return -EINVAL;
    }
    if (a->zeroes && a->has_pattern) {
        printf("-z and -P cannot be specified at the same time\n");
        return -EINVAL;
    }
    return 0;
}

static int aio_write_arguments(struct async *a, int argc, char **argv)
{
    int r = 0;
    int opt;

    while (r == 0 && (opt = getopt(argc, argv, "CfiP:quz")) != -1) {
        if (opt == 'P') {
            a->has_pattern = true;
            r = io_read_pattern(optarg, &a->pattern);
        } else if (opt == 'f') {
            a->transfer.flags |= REQUEST_FUA;
        } else if (opt == 'u') {
            a->transfer.flags |= REQUEST_MAY_UNMAP;
        } else if (opt == 'z') {
            a->zeroes = true;
        } else {
            r = common_option(a, argv[0], opt);
        }
    }
    if (r == 0 && optind > argc - 2)
        r = io_wrong_usage(argv[0]);
    if (r == 0)
        r = check_zeroes(a, argc);
    return r < 0 || a->invalid ? r : read_range(a, argc, argv);
}

int co_fn control_fn io_cmd_aio_write(struct io *io, int argc, char **argv)
{
    struct async *a = async_new(io);
    int r;

    a->pattern = PATTERN;
    a->transfer.writes = true;
    a->transfer.flags = io->how.writethrough ? REQUEST_FUA : 0;
    r = aio_write_arguments(a, argc, argv);
    if (r < 0) {
        async_free(a);
        return r;
    }
    a->report.verb = "wrote";
    return start(a);
}

int co_fn control_fn io_cmd_aio_flush(struct io *io, int argc, char **argv)
{
    (void)argc;
    (void)argv;
    io_join(io);
    return 0;
}
