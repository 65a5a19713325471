/* SPDX-License-Identifier: Apache-2.0 */
/* The commands, and lines taken apart. Words are separated by blanks; there is no quoting. */
#include "base/alloc.h"
#include "base/macros.h"
#include "cli/cli.h"
#include "cli/io/io.h"
#include "loop/co.h"
#include "loop/loop.h"

#include <errno.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* Longer lines are refused. */
#define LINE_MAX_BYTES ((size_t)1 << 20)

#define BLANKS " \t\r"

static io_command_fn quit, sleep_for, raise_signal, end_at_once;

static const struct io_command commands[] = {
    {"abort", NULL, end_at_once, 0, 0, IO_NO_IMAGE, NULL, "simulate a program crash using abort(3)",
     NULL},
    {"aio_flush", NULL, io_cmd_aio_flush, 0, 0, 0, NULL, "completes all outstanding aio requests",
     NULL},
    {"aio_read", NULL, io_cmd_aio_read, 2, -1, 0, "[-Ciqv] [-P pattern] off len [len..]",
     "asynchronously reads a number of bytes",
     " Reads as readv does, and does not wait: what was read is printed when it is there. aio_flush waits\n"
     " for all of them. The command has succeeded when the request is on its way, whatever becomes of it.\n"
     "\n"
     " -C, -- report statistics in a machine parsable format\n"
     " -P, -- use a pattern to verify read data\n"
     " -i, -- count it as invalid, and send nothing\n"
     " -v, -- dump buffer to standard output\n"
     " -q, -- quiet mode, do not show I/O statistics\n"},
    {"aio_write", NULL, io_cmd_aio_write, 2, -1, IO_WRITES,
     "[-Cfiquz] [-P pattern] off len [len..]", "asynchronously writes a number of bytes",
     " Writes as writev does, and does not wait: what became of it is printed when it has ended. aio_flush\n"
     " waits for all of them. The command has succeeded when the request is on its way.\n"
     "\n"
     " -P, -- use different pattern to fill file\n"
     " -C, -- report statistics in a machine parsable format\n"
     " -f, -- use Force Unit Access semantics\n"
     " -i, -- count it as invalid, and send nothing\n"
     " -q, -- quiet mode, do not show I/O statistics\n"
     " -u, -- with -z, allow unmapping\n"
     " -z, -- write zeroes\n"},
    {"alloc", "a", io_cmd_alloc, 1, 2, 0, "offset [count]",
     "checks if offset is allocated in the file", NULL},
    {"break", NULL, io_cmd_break, 2, 2, 0, "event tag",
     "sets a breakpoint on event and tags the stopped request as tag",
     " Holds the first request of aio_read or aio_write that comes to the event; a command that waits for its\n"
     " own request is not held. The image's file is behind a filter then: driver=fault, or blkdebug::PATH.\n"},
    {"close", "c", io_cmd_close, 0, 0, 0, NULL, "close the current open file", NULL},
    {"discard", "d", io_cmd_discard, 2, -1, IO_WRITES, "[-Cq] off len",
     "discards a number of bytes at a specified offset",
     " Says that a range is not needed any more.\n"
     "\n"
     " Example:\n"
     " 'discard 512 1k' - discards 1 kilobyte from 512 bytes into the file\n"
     "\n"
     " -C, -- report statistics in a machine parsable format\n"
     " -q, -- quiet mode, do not show I/O statistics\n"},
    {"flush", "f", io_cmd_flush, 0, 0, 0, NULL, "flush all in-core file state to disk", NULL},
    {"help", "?", io_help, 0, 1, IO_NO_IMAGE, "[command]", "help for one or all commands", NULL},
    {"info", "i", io_cmd_info, 0, 0, 0, NULL, "prints information about the current file", NULL},
    {"length", "l", io_cmd_length, 0, 0, 0, NULL, "gets the length of the current file", NULL},
    {"map", NULL, io_cmd_map, 0, 0, 0, "", "prints the allocated areas of a file", NULL},
    {"open", "o", io_cmd_open, 1, -1, IO_NO_IMAGE,
     "[-rsCnkU] [-t cache] [-d discard] [-o options] [path]", "open the file specified by path",
     " Opens an image for the commands that follow.\n"
     "\n"
     " Example:\n"
     " 'open -n -o driver=raw /tmp/data' - opens raw data file read-write, uncached\n"
     "\n"
     " -r, -- open file read-only\n"
     " -n, -- disable host cache, short for -t none\n"
     " -U, -- although others write to it; with -r\n"
     " -t, -- use the given cache mode for the image\n"
     " -d, -- use the given discard mode for the image\n"
     " -o, -- options to be given to the block driver\n"
     " -s, -- write to a temporary snapshot\n"
     " -C, -k, -i -- refused\n"},
    {"quit", "q", quit, 0, -1, IO_NO_IMAGE, NULL, "exit the program", NULL},
    {"read", "r", io_cmd_read, 2, -1, 0, "[-abCqv] [-P pattern [-s off] [-l len]] off len",
     "reads a number of bytes at a specified offset",
     " Reads a range, and compares or shows it if that is wanted.\n"
     "\n"
     " Example:\n"
     " 'read -v 512 1k' - dumps 1 kilobyte read from 512 bytes into the file\n"
     "\n"
     " -b, -- refused: the state of a machine is not read\n"
     " -C, -- report statistics in a machine parsable format\n"
     " -l, -- length for pattern verification (only with -P)\n"
     " -p, -- ignored for backwards compatibility\n"
     " -P, -- use a pattern to verify read data\n"
     " -q, -- quiet mode, do not show I/O statistics\n"
     " -s, -- start offset for pattern verification (only with -P)\n"
     " -v, -- dump buffer to standard output\n"},
    {"readv", NULL, io_cmd_readv, 2, -1, 0, "[-Cqv] [-P pattern] off len [len..]",
     "reads a number of bytes at a specified offset",
     " Reads a range in one request, into a buffer of several pieces.\n"
     "\n"
     " Example:\n"
     " 'readv -v 512 1k 1k' - dumps 2 kilobytes read from 512 bytes into the file\n"
     "\n"
     " -C, -- report statistics in a machine parsable format\n"
     " -P, -- use a pattern to verify read data\n"
     " -v, -- dump buffer to standard output\n"
     " -q, -- quiet mode, do not show I/O statistics\n"},
    {"remove_break", NULL, io_cmd_remove_break, 1, 1, 0, "tag", "remove a breakpoint by tag", NULL},
    {"reopen", NULL, io_cmd_reopen, 0, -1, 0, "[(-r|-w)] [-c cache] [-o options]",
     "reopens an image with new options",
     " Closes the image when what is under way has ended, and opens it again.\n"
     "\n"
     " -r, -- Reopen the image read-only\n"
     " -w, -- Reopen the image read-write\n"
     " -c, -- Change the cache mode to the given value\n"
     " -o, -- refused: close the image, and open it\n"},
    {"resume", NULL, io_cmd_resume, 1, 1, 0, "tag", "resumes the request tagged as tag", NULL},
    {"sigraise", NULL, raise_signal, 1, 1, IO_NO_IMAGE, "signal", "raises a signal",
     " Example:\n"
     " 'sigraise 15' - raises SIGTERM\n"},
    {"sleep", NULL, sleep_for, 1, 1, IO_NO_IMAGE, NULL, "waits for the given value in milliseconds",
     NULL},
    {"truncate", "t", io_cmd_truncate, 1, 3, IO_WRITES, "[-m prealloc_mode] off",
     "truncates the current file at the given offset", NULL},
    {"wait_break", NULL, io_cmd_wait_break, 1, 1, 0, "tag", "waits for the suspension of a request",
     NULL},
    {"write", "w", io_cmd_write, 2, -1, IO_WRITES,
     "[-bcCfnquz] [-P pattern | -s source_file] off len",
     "writes a number of bytes at a specified offset",
     " Writes a range, with bytes of the value 0xcd if nothing else is said.\n"
     "\n"
     " Example:\n"
     " 'write 512 1k' - writes 1 kilobyte at 512 bytes into the open file\n"
     "\n"
     " -b, -- refused: the state of a machine is not written\n"
     " -c, -- store compressed\n"
     " -f, -- use Force Unit Access semantics\n"
     " -n, -- with -z, don't allow slow fallback\n"
     " -p, -- ignored for backwards compatibility\n"
     " -P, -- use different pattern to fill file\n"
     " -s, -- use a pattern file to fill the write buffer\n"
     " -C, -- report statistics in a machine parsable format\n"
     " -q, -- quiet mode, do not show I/O statistics\n"
     " -u, -- with -z, allow unmapping\n"
     " -z, -- write zeroes\n"},
    {"writev", NULL, io_cmd_writev, 2, -1, IO_WRITES, "[-Cfq] [-P pattern] off len [len..]",
     "writes a number of bytes at a specified offset",
     " Writes a range in one request, from a buffer of several pieces.\n"
     "\n"
     " Example:\n"
     " 'writev 512 1k 1k' - writes 2 kilobytes at 512 bytes into the open file\n"
     "\n"
     " -P, -- use different pattern to fill file\n"
     " -C, -- report statistics in a machine parsable format\n"
     " -f, -- use Force Unit Access semantics\n"
     " -q, -- quiet mode, do not show I/O statistics\n"},
};

/* What the peer has and we do not. */
static const struct {
    const char *name;
    const char *why;
} missing[] = {
    {"zone_report", "zoned devices are not supported"},
    {"zone_open", "zoned devices are not supported"},
    {"zone_close", "zoned devices are not supported"},
    {"zone_finish", "zoned devices are not supported"},
    {"zone_reset", "zoned devices are not supported"},
    {"zone_append", "zoned devices are not supported"},
};

int io_say(const char *fmt, ...)
{
    AUTO(free_ptr) char *text = NULL;
    va_list args;

    va_start(args, fmt);
    text = xvasprintf(fmt, args);
    va_end(args);
    (void)fflush(stdout);
    (void)fprintf(stderr, "%s: %s\n", cli_program, text);
    return -EINVAL;
}

static const struct io_command *find(const char *name)
{
    for (size_t i = 0; i < ARRAY_SIZE(commands); i++) {
        const struct io_command *c = &commands[i];

        if (strcmp(name, c->name) == 0 || (c->short_name && strcmp(name, c->short_name) == 0))
            return c;
    }
    return NULL;
}

static void print_usage(const struct io_command *c)
{
    printf("%s ", c->name);
    if (c->arguments)
        printf("%s ", c->arguments);
    printf("-- %s\n", c->summary);
}

int io_wrong_usage(const char *name)
{
    const struct io_command *c = find(name);

    if (c)
        print_usage(c);
    return -EINVAL;
}

int io_help(struct io *io, int argc, char **argv)
{
    const struct io_command *c = argc > 1 ? find(argv[1]) : NULL;

    (void)io;
    if (argc > 1 && !c) {
        printf("command %s not found\n", argv[1]);
        return -EINVAL;
    }
    if (c) {
        print_usage(c);
        if (c->help)
            printf("\n%s\n", c->help);
    } else {
        for (size_t i = 0; i < ARRAY_SIZE(commands); i++)
            print_usage(&commands[i]);
        printf("\nUse 'help commandname' for extended help.\n");
    }
    return 0;
}

/* ---- commands without an image ---- */

static int quit(struct io *io, int argc, char **argv)
{
    (void)argc;
    (void)argv;
    io->quit = true;
    return 0;
}

static int co_fn sleep_for(struct io *io, int argc, char **argv)
{
    char *end;
    long ms = strtol(argv[1], &end, 0);

    (void)io;
    (void)argc;
    if (end == argv[1] || *end || ms < 0 || ms > INT32_MAX) {
        printf("%s is not a valid number\n", argv[1]);
        return -EINVAL;
    }
    (void)co_sleep_until(loop_clock() + (uint64_t)ms * NS_PER_MS);
    return 0;
}

static int raise_signal(struct io *io, int argc, char **argv)
{
    uint64_t signal;

    (void)io;
    (void)argc;
    if (io_read_size(argv[1], &signal) < 0)
        return -EINVAL;
    if (signal > NSIG) {
        printf("signal argument '%s' is too large to be a valid signal\n", argv[1]);
        return -EINVAL;
    }
    (void)fflush(stdout);
    (void)raise((int)signal);
    return 0;
}

static int end_at_once(struct io *io, int argc, char **argv)
{
    (void)io;
    (void)argc;
    (void)argv;
    (void)fflush(stdout);
    abort();
}

/* ---- lines ---- */

static int wrong_count(const struct io_command *c, const char *name, int count)
{
    (void)fflush(stdout);
    (void)fprintf(stderr, "bad argument count %d to %s, expected ", count, name);
    if (c->arguments_max < 0)
        (void)fprintf(stderr, "at least %d arguments\n", c->arguments_min);
    else if (c->arguments_min == c->arguments_max)
        (void)fprintf(stderr, "%d arguments\n", c->arguments_min);
    else
        (void)fprintf(stderr, "between %d and %d arguments\n", c->arguments_min, c->arguments_max);
    return -EINVAL;
}

static int not_found(const char *name)
{
    for (size_t i = 0; i < ARRAY_SIZE(missing); i++) {
        if (strcmp(name, missing[i].name) == 0)
            return io_say("%s: %s", name, missing[i].why);
    }
    (void)fflush(stdout);
    (void)fprintf(stderr, "command \"%s\" not found\n", name);
    return -EINVAL;
}

static int co_fn control_fn run(struct io *io, int argc, char **argv)
{
    const struct io_command *c = find(argv[0]);

    if (!c)
        return not_found(argv[0]);
    if (argc - 1 < c->arguments_min || (c->arguments_max >= 0 && argc - 1 > c->arguments_max))
        return wrong_count(c, argv[0], argc - 1);
    if (!(c->flags & IO_NO_IMAGE) && !io->is_open) {
        (void)fflush(stdout);
        (void)fprintf(stderr, "no file open, try 'help open'\n");
        return -EINVAL;
    }
    if (c->flags & IO_WRITES && !(io->how.flags & IMAGE_WRITE))
        return io_say("%s: '%s' is open for reading only", c->name, io->how.name);
    optind = 0; /* getopt begins anew, and says itself what is wrong */
    opterr = 1;
    return c->run(io, argc, argv);
}

void io_init(struct io *io, struct graph *g)
{
    *io = (struct io){.graph = g, .co = co_self()};
    co_scope_init(&io->async);
}

void io_run_line(struct io *io, const char *line)
{
    AUTO(free_ptr) char *copy = NULL;
    AUTO(free_ptr) char **words = NULL;
    char *rest;
    int count = 0;

    if (strlen(line) > LINE_MAX_BYTES) {
        io->failed |= io_say("a line of more than %zu bytes", LINE_MAX_BYTES) < 0;
        return;
    }
    copy = xstrdup(line);
    words = xnew_n(char *, strlen(line) / 2 + 2);
    rest = copy;
    for (char *word; (word = strtok_r(rest, BLANKS, &rest));)
        words[count++] = word;
    if (count && run(io, count, words) < 0)
        io->failed = true;
    (void)fflush(stdout);
}
