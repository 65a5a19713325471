/* SPDX-License-Identifier: Apache-2.0 */
/* read and readv. */
#include "base/checked.h"
#include "base/macros.h"
#include "cli/io/io.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

int io_check_bytes(const struct io_check *c, const uint8_t *bytes, uint64_t offset, uint64_t len)
{
    int r = 0;

    for (uint64_t i = 0; c->has_pattern && r == 0 && i < c->len; i++) {
        if (bytes[c->skip + i] != c->pattern) {
            printf("Pattern verification failed at offset %" PRIu64 ", %" PRIu64 " bytes\n",
                   offset + c->skip, c->len);
            r = -EINVAL;
        }
    }
    if (c->dump)
        io_dump(bytes, offset, len);
    return r;
}

int io_read_vector(struct io_vector *v, int argc, char **argv)
{
    v->pieces = calloc((size_t)MAX(argc, 1), sizeof(*v->pieces));
    if (!v->pieces)
        return io_say("no memory");
    for (int i = 0; i < argc; i++) {
        int r = io_read_size(argv[i], &v->pieces[i]);

        if (r < 0)
            return r;
        if (v->pieces[i] > IO_LEN_MAX) {
            printf("Argument '%s' exceeds maximum size %d\n", argv[i], IO_LEN_MAX);
            return -EINVAL;
        }
        v->len += v->pieces[i];
        if (v->len > IO_LEN_MAX) {
            printf("The total number of bytes exceed the maximum size %d\n", IO_LEN_MAX);
            return -EINVAL;
        }
    }
    v->count = argc;
    return 0;
}

/* What the options of read and readv say. */
struct reading {
    struct io_check check;
    struct io_report report;
    bool has_skip;
    bool has_len;
};

static int reading_option(struct reading *o, const char *name, int opt)
{
    switch (opt) {
    case 'v':
        o->check.dump = true;
        return 0;
    case 'P':
        o->check.has_pattern = true;
        return io_read_pattern(optarg, &o->check.pattern);
    case 's':
        o->has_skip = true;
        return io_read_size(optarg, &o->check.skip);
    case 'l':
        o->has_len = true;
        return io_read_size(optarg, &o->check.len);
    case 'b':
        return io_say("read -b: the state of a machine is not read");
    default:
        return io_report_option(&o->report, name, opt);
    }
}

static int reading_options(struct reading *o, int argc, char **argv, const char *letters)
{
    int r = 0;
    int opt;

    while (r == 0 && (opt = getopt(argc, argv, letters)) != -1)
        r = reading_option(o, argv[0], opt);
    return r;
}

/* Reads, checks and says so. */
static int co_fn control_fn read_and_tell(struct io *io, struct reading *o,
                                          const struct io_vector *v, const char *failed)
{
    struct io_transfer t = {.offset = o->report.offset, .len = o->report.len};
    int r;

    if (v) {
        t.pieces = v->pieces;
        t.piece_count = v->count;
    }
    o->report.verb = "read";
    o->report.begun_ns = io_now_ns();
    r = io_transfer_memory(io, &t, 0);
    if (r == 0)
        r = io_co_transfer(io, &t);
    if (r < 0) {
        printf("%s failed: %s\n", failed, strerror(-r));
    } else {
        struct io_report report = o->report;

        report.begun_ns = io_now_ns() - report.begun_ns; /* checking takes time of its own */
        o->check.dump &= !report.quiet;
        r = io_check_bytes(&o->check, t.memory, t.offset, t.len);
        report.begun_ns = io_now_ns() - report.begun_ns;
        io_report_print(&report);
    }
    free(t.memory);
    return r;
}

int co_fn control_fn io_cmd_read(struct io *io, int argc, char **argv)
{
    struct reading o = {.has_len = false};
    int r = reading_options(&o, argc, argv, "bCl:pP:qs:v");

    if (r < 0)
        return r;
    if (optind != argc - 2)
        return io_wrong_usage(argv[0]);
    r = io_read_size(argv[optind], &o.report.offset);
    if (r == 0)
        r = io_read_size(argv[optind + 1], &o.report.len);
    if (r < 0)
        return r;
    if (o.report.len > IO_LEN_MAX) {
        printf("length cannot exceed %d, given %s\n", IO_LEN_MAX, argv[optind + 1]);
        return -EINVAL;
    }
    if (!o.check.has_pattern && (o.has_skip || o.has_len))
        return io_wrong_usage(argv[0]);
    if (!range_within(o.check.skip, o.check.len, o.report.len)) {
        printf("pattern verification range exceeds end of read data\n");
        return -EINVAL;
    }
    if (!o.has_len)
        o.check.len = o.report.len - o.check.skip;
    return read_and_tell(io, &o, NULL, "read");
}

int co_fn control_fn io_cmd_readv(struct io *io, int argc, char **argv)
{
    struct reading o = {.has_len = false};
    struct io_vector v = {.count = 0};
    int r = reading_options(&o, argc, argv, "CP:qv");

    if (r < 0)
        return r;
    if (optind > argc - 2)
        return io_wrong_usage(argv[0]);
    r = io_read_size(argv[optind], &o.report.offset);
    if (r == 0)
        r = io_read_vector(&v, argc - optind - 1, argv + optind + 1);
    o.report.len = o.check.len = v.len;
    if (r == 0)
        r = read_and_tell(io, &o, &v, "readv");
    free(v.pieces);
    return r;
}
