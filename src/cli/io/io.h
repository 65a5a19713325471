/* SPDX-License-Identifier: Apache-2.0 */
/*
 * `cairn io`: commands that read, write and look at one image, from the command line or standard input. It speaks the language of
 * qemu-io; lines that programs read are that tool's of version 7.2.
 *
 *   cmd-io.c       the command line, and how it begins and ends
 *   io-command.c   the commands: their table, lines taken apart, help
 *   io-image.c     open, close and what is asked of the image
 *   io-transfer.c  bytes to and from the image
 *   io-read.c, io-write.c   commands that do that, and wait for it
 *   io-async.c     those that do not wait
 *   io-fault.c     breakpoints
 *   io-text.c      numbers as they are read and printed
 *   io-lines.c     standard input
 */
#ifndef CAIRN_CLI_IO_IO_H
#define CAIRN_CLI_IO_IO_H

#include "base/context.h"
#include "base/error.h"
#include "cli/image/image.h"
#include "loop/scope.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* The most that one command transfers: QEMU's limit. */
#define IO_LEN_MAX 2147483136

/* An image as it was opened; `name` is its own. */
struct io_open {
    char *name;
    char *format; /* NULL: it is probed */
    bool options; /* `name` is options */
    unsigned flags;
    bool writethrough; /* each write is durable */
    bool overlay;      /* writes go to a temporary layer */
};

struct io {
    struct graph *graph;
    struct image image;
    struct io_open how;
    bool is_open;
    bool has_overlay;      /* there is a node for it */
    struct co_scope async; /* commands that nobody waits for */
    struct co *co;         /* runs the commands */
    struct node *fault;    /* in the image; or NULL */
    struct co_wait *pause; /* of wait_break: ended by whatever may be what it waits for */
    bool failed;           /* a command has */
    bool quit;
};

/* All print what they have to say. 0, or a negative number: the command has failed. */
typedef int io_command_fn(struct io *io, int argc, char **argv);

enum io_command_flags {
    IO_NO_IMAGE = 1 << 0, /* works without an open image */
    IO_WRITES = 1 << 1,   /* needs one that is open for writing */
};

struct io_command {
    const char *name;
    const char *short_name; /* or NULL */
    io_command_fn *run;     /* a coroutine on the control thread */
    int arguments_min;
    int arguments_max; /* < 0: any number */
    unsigned flags;
    const char *arguments; /* or NULL */
    const char *summary;
    const char *help; /* more, or NULL */
};

/* ---- io-command.c ---- */

/* Runs one line. */
void co_fn control_fn io_run_line(struct io *io, const char *line);
/* `help`. */
int co_fn control_fn io_help(struct io *io, int argc, char **argv);
/* Prints the command's usage line. -EINVAL. */
int io_wrong_usage(const char *name);
/* A message behind the program's name. -EINVAL. */
int io_say(const char *fmt, ...) PRINTF_LIKE(1, 2);

/* On the coroutine that will run the lines. */
void co_fn io_init(struct io *io, struct graph *g);

/* ---- io-fault.c ---- */

int co_fn control_fn io_cmd_break(struct io *io, int argc, char **argv);
int co_fn control_fn io_cmd_remove_break(struct io *io, int argc, char **argv);
int co_fn control_fn io_cmd_resume(struct io *io, int argc, char **argv);
int co_fn control_fn io_cmd_wait_break(struct io *io, int argc, char **argv);
/* After opening: finds the image's breakpoints. */
void io_find_fault(struct io *io);
/* What breakpoints hold goes on, and all have ended when it returns. */
void co_fn io_join(struct io *io);
/* Something has happened that wait_break may wait for. */
void io_wake(struct io *io);

/* ---- io-image.c ---- */

void io_open_release(struct io_open *how);
int co_fn control_fn io_open_image(struct io *io, struct io_open *how, struct error **err);
/* What was started ends first. */
void co_fn control_fn io_close_image(struct io *io);

/* What all options that say how an image is opened have in common. */
enum io_open_option {
    IO_OPEN_READ_ONLY = 'r',
    IO_OPEN_OVERLAY = 's',
    IO_OPEN_NO_CACHE = 'n',
    IO_OPEN_SHARE = 'U',
    IO_OPEN_CACHE = 't',
    IO_OPEN_DISCARD = 'd',
};

/* How it is opened when nothing is said. */
struct io_open io_open_default(void);
/* Takes one of the above; also says what of the peer's options is not there. 1: another one. */
int io_open_option(struct io_open *how, int option, const char *value, struct error **err);

int co_fn control_fn io_cmd_open(struct io *io, int argc, char **argv);
int co_fn control_fn io_cmd_close(struct io *io, int argc, char **argv);
int co_fn control_fn io_cmd_reopen(struct io *io, int argc, char **argv);
int co_fn control_fn io_cmd_flush(struct io *io, int argc, char **argv);
int co_fn control_fn io_cmd_truncate(struct io *io, int argc, char **argv);
int co_fn control_fn io_cmd_length(struct io *io, int argc, char **argv);
int co_fn control_fn io_cmd_info(struct io *io, int argc, char **argv);
int co_fn control_fn io_cmd_alloc(struct io *io, int argc, char **argv);
int co_fn control_fn io_cmd_map(struct io *io, int argc, char **argv);

/* ---- io-transfer.c ---- */

/* What a command moves, and where. */
struct io_transfer {
    bool writes;
    unsigned flags; /* enum request_flags */
    uint64_t offset;
    uint64_t len;
    uint8_t *memory;        /* `len` bytes */
    const uint64_t *pieces; /* their lengths in memory; NULL: it is one piece */
    int piece_count;
};

/*
 * Memory for a transfer, all bytes `fill`; free()d by the caller. -EIO beyond the end of the image, before any is taken; -ENOMEM.
 */
int io_transfer_memory(const struct io *io, struct io_transfer *t, int fill);
/* In steps that one request may carry. -EIO beyond the end of the image. */
int co_fn control_fn io_co_transfer(struct io *io, const struct io_transfer *t);
int co_fn control_fn io_co_zero(struct io *io, uint64_t offset, uint64_t len, unsigned flags);
int co_fn io_co_discard(struct io *io, uint64_t offset, uint64_t len);

/* ---- io-read.c, io-write.c, io-async.c ---- */

/* What is wanted of bytes that were read. */
struct io_check {
    bool has_pattern;
    int pattern;
    uint64_t skip; /* of what was read; the pattern begins there */
    uint64_t len;  /* so long it is */
    bool dump;
};

/* Verifies, and says what is wrong; prints the bytes if wanted. -EINVAL. */
int io_check_bytes(const struct io_check *c, const uint8_t *bytes, uint64_t offset, uint64_t len);

/* The lengths of a vector, from arguments on; said what is wrong. */
struct io_vector {
    uint64_t *pieces;
    int count;
    uint64_t len; /* of all */
};

int io_read_vector(struct io_vector *v, int argc, char **argv);

int co_fn control_fn io_cmd_read(struct io *io, int argc, char **argv);
int co_fn control_fn io_cmd_readv(struct io *io, int argc, char **argv);
int co_fn control_fn io_cmd_write(struct io *io, int argc, char **argv);
int co_fn control_fn io_cmd_writev(struct io *io, int argc, char **argv);
int co_fn control_fn io_cmd_discard(struct io *io, int argc, char **argv);
int co_fn control_fn io_cmd_aio_read(struct io *io, int argc, char **argv);
int co_fn control_fn io_cmd_aio_write(struct io *io, int argc, char **argv);
int co_fn control_fn io_cmd_aio_flush(struct io *io, int argc, char **argv);

/* ---- io-text.c ---- */

/* A size or offset. Prints what is wrong. -EINVAL. */
int io_read_size(const char *text, uint64_t *ret);
/* A byte. */
int io_read_pattern(const char *text, int *ret);
/* `64 KiB`, `1.500 KiB`. */
void io_size_text(char *buf, size_t size, double bytes);

/* What a command did, and how long it took. */
struct io_report {
    const char *verb; /* as the line begins */
    bool quiet;
    bool machine; /* for programs */
    uint64_t offset;
    uint64_t len;
    uint64_t begun_ns;
};

/* -C and -q, and -p, which has no meaning with the peer either; for another option the command's usage. 0 or -EINVAL. */
int io_report_option(struct io_report *r, const char *command, int opt);
uint64_t io_now_ns(void);
/* Unless it is quiet. */
void io_report_print(const struct io_report *r);
void io_dump(const uint8_t *bytes, uint64_t offset, uint64_t len);

/* ---- io-lines.c ---- */

/* The next line of standard input, without its end; NULL: there is none. The loop goes on meanwhile. Freed with free(). */
char *co_fn io_co_line(void);

#endif
