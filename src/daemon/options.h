/* SPDX-License-Identifier: Apache-2.0 */
/* cairnd's command line: that of qemu-storage-daemon, and a few options of our own. */
#ifndef CAIRN_DAEMON_OPTIONS_H
#define CAIRN_DAEMON_OPTIONS_H

#include "base/error.h"
#include "loop/loop.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* What is done in the order of the command line. */
enum step_kind {
    STEP_BLOCKDEV,
    STEP_EXPORT,
    STEP_NBD_SERVER,
    STEP_CHARDEV,
    STEP_MONITOR,
    STEP_OBJECT
};

struct step {
    enum step_kind kind;
    const char *text; /* the option's value, as it was given; borrowed */
    void *value;      /* of the schema's type for it */
};

/* What holds for the whole run, wherever it stands on the command line. */
struct options {
    bool help;
    bool version;
    bool daemonize;
    const char *pidfile; /* borrowed, or NULL */
    enum loop_engine engine;
    unsigned io_threads;
    unsigned copy_threads;
    uint64_t change_deadline_ns;
    const char **allowed; /* directories that images may refer to; borrowed */
    size_t allowed_count;

    struct step *steps;
    size_t step_count;
};

/* Reads and checks all of it, and does nothing. argv outlives the result. */
int options_parse(struct options *ret, int argc, char **argv, struct error **err);
void options_release(struct options *o);

/* Puts `--blockdev VALUE: ` before an error of this step, on one line; without the value where it holds a secret. Returns r. */
int step_wrap_error(const struct step *s, struct error **err, int r);

/* The text for --help. Owned by the caller. */
char *options_help(const char *program);

#endif
