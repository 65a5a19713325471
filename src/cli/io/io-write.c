/* SPDX-License-Identifier: Apache-2.0 */
/* write, writev and discard. */
#include "base/macros.h"
#include "cli/io/io.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define SECTOR 512

/* What is written where nothing is said. */
#define PATTERN 0xcd

/* What the options of write and writev say. */
struct writing {
    struct io_report report;
    unsigned flags; /* enum request_flags */
    bool zeroes;
    int pattern;
    bool has_pattern;
    const char *source; /* a file whose bytes are written, over and over */
};

static int writing_option(struct writing *o, const char *name, int opt)
{
    switch (opt) {
    case 'c':
        o->flags |= REQUEST_COMPRESSED;
        return 0;
    case 'f':
        o->flags |= REQUEST_FUA;
        return 0;
    case 'n':
        o->flags |= REQUEST_NO_FALLBACK;
        return 0;
    case 'u':
        o->flags |= REQUEST_MAY_UNMAP;
        return 0;
    case 'z':
        o->zeroes = true;
        return 0;
    case 'P':
        o->has_pattern = true;
        return io_read_pattern(optarg, &o->pattern);
    case 's':
        o->source = optarg;
        return 0;
    case 'b':
        return io_say("write -b: the state of a machine is not written");
    default:
        return io_report_option(&o->report, name, opt);
    }
}

static int refuse(const char *text)
{
    printf("%s\n", text);
    return -EINVAL;
}

static int check_writing(const struct writing *o)
{
    if (o->flags & REQUEST_FUA && o->flags & REQUEST_COMPRESSED)
        return refuse("-f and -b or -c cannot be specified at the same time");
    if (o->flags & REQUEST_NO_FALLBACK && !o->zeroes)
        return refuse("-n requires -z to be specified");
    if (o->flags & REQUEST_MAY_UNMAP && !o->zeroes)
        return refuse("-u requires -z to be specified");
    if (o->zeroes + o->has_pattern + (o->source != NULL) > 1)
        return refuse("Only one of -z, -P, and -s can be specified at the same time");
    if (o->zeroes && o->flags & REQUEST_COMPRESSED)
        return refuse("-z and -c cannot be specified at the same time");
    return 0;
}

/* A file that is not empty; NULL, and it is said, if there is none. */
static FILE *open_source(const char *path)
{
    FILE *f = fopen(path, "rb");
    int c = f ? getc(f) : EOF;

    if (!f) {
        (void)io_say("%s: %s", path, strerror(errno));
    } else if (c == EOF) {
        (void)io_say(ferror(f) ? "%s: cannot be read" : "%s: file is empty", path);
        (void)fclose(f);
        f = NULL;
    } else {
        (void)ungetc(c, f);
    }
    return f;
}

/* Its bytes from the start of the memory on, again and again. */
static int fill_from(FILE *f, uint8_t *memory, uint64_t len)
{
    size_t have = fread(memory, 1, (size_t)len, f);

    if (ferror(f) || (!have && len))
        return -EIO;
    for (uint64_t at = have; at < len; at += have)
        memcpy(memory + at, memory, (size_t)MIN(len - at, (uint64_t)have));
    return 0;
}

static int co_fn control_fn write_bytes(struct io *io, struct writing *o, FILE *source,
                                        struct io_transfer *t)
{
    int r = io_transfer_memory(io, t, o->has_pattern ? o->pattern : PATTERN);

    if (r == 0 && source)
        r = fill_from(source, t->memory, t->len);
    o->report.begun_ns = io_now_ns();
    if (r == 0)
        r = io_co_transfer(io, t);
    free(t->memory);
    return r;
}

static int co_fn control_fn write_and_tell(struct io *io, struct writing *o,
                                           const struct io_vector *v, const char *failed)
{
    struct io_transfer t = {.writes = true, .offset = o->report.offset, .len = o->report.len};
    FILE *source = o->source ? open_source(o->source) : NULL;
    int r;

    if (o->source && !source)
        return -EINVAL;
    if (v) {
        t.pieces = v->pieces;
        t.piece_count = v->count;
    }
    t.flags = o->flags | (io->how.writethrough ? REQUEST_FUA : 0);
    o->report.verb = "wrote";
    o->report.begun_ns = io_now_ns();
    if (o->zeroes)
        r = io_co_zero(io, t.offset, t.len, t.flags);
    else
        r = write_bytes(io, o, source, &t);
    if (r < 0)
        printf("%s failed: %s\n", failed, strerror(-r));
    else
        io_report_print(&o->report);
    if (source)
        (void)fclose(source);
    return r;
}

static int not_a_sector(uint64_t value, const char *what)
{
    printf("%" PRIu64 " is not a sector-aligned value for '%s'\n", value, what);
    return -EINVAL;
}

static int check_range(const struct writing *o, const char *len_text)
{
    if (o->report.len > IO_LEN_MAX && !(o->flags & REQUEST_NO_FALLBACK)) {
        printf("length cannot exceed %d without -n, given %s\n", IO_LEN_MAX, len_text);
        return -EINVAL;
    }
    if (!(o->flags & REQUEST_COMPRESSED))
        return 0;
    if (o->report.offset % SECTOR)
        return not_a_sector(o->report.offset, "offset");
    return o->report.len % SECTOR ? not_a_sector(o->report.len, "count") : 0;
}

int co_fn control_fn io_cmd_write(struct io *io, int argc, char **argv)
{
    struct writing o = {.zeroes = false};
    int r = 0;
    int opt;

    while (r == 0 && (opt = getopt(argc, argv, "bcCfnpP:qs:uz")) != -1)
        r = writing_option(&o, argv[0], opt);
    if (r < 0)
        return r;
    if (optind != argc - 2)
        return io_wrong_usage(argv[0]);
    r = check_writing(&o);
    if (r == 0)
        r = io_read_size(argv[optind], &o.report.offset);
    if (r == 0)
        r = io_read_size(argv[optind + 1], &o.report.len);
    if (r == 0)
        r = check_range(&o, argv[optind + 1]);
    return r < 0 ? r : write_and_tell(io, &o, NULL, "write");
}

int co_fn control_fn io_cmd_writev(struct io *io, int argc, char **argv)
{
    struct writing o = {.zeroes = false};
    struct io_vector v = {.count = 0};
    int r = 0;
    int opt;

    while (r == 0 && (opt = getopt(argc, argv, "CfP:q")) != -1)
        r = writing_option(&o, argv[0], opt);
    if (r < 0)
        return r;
    if (optind > argc - 2)
        return io_wrong_usage(argv[0]);
    r = io_read_size(argv[optind], &o.report.offset);
    if (r == 0)
        r = io_read_vector(&v, argc - optind - 1, argv + optind + 1);
    o.report.len = v.len;
    if (r == 0)
        r = write_and_tell(io, &o, &v, "writev");
    free(v.pieces);
    return r;
}

int co_fn control_fn io_cmd_discard(struct io *io, int argc, char **argv)
{
    struct io_report report = {.verb = "discard"};
    int opt;
    int r = 0;

    while (r == 0 && (opt = getopt(argc, argv, "Cq")) != -1)
        r = io_report_option(&report, argv[0], opt);
    if (r == 0 && optind != argc - 2)
        r = io_wrong_usage(argv[0]);
    if (r == 0)
        r = io_read_size(argv[optind], &report.offset);
    if (r == 0)
        r = io_read_size(argv[optind + 1], &report.len);
    if (r < 0)
        return r;
    if (report.len > IO_LEN_MAX) {
        printf("length cannot exceed %d, given %s\n", IO_LEN_MAX, argv[optind + 1]);
        return -EINVAL;
    }
    report.begun_ns = io_now_ns();
    r = io_co_discard(io, report.offset, report.len);
    if (r < 0)
        printf("discard failed: %s\n", strerror(-r));
    else
        io_report_print(&report);
    return r;
}
