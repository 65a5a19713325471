/* SPDX-License-Identifier: Apache-2.0 */
/* What the subcommands of `cairn` have in common: how they are called, how they fail, how they print. */
#ifndef CAIRN_CLI_CLI_H
#define CAIRN_CLI_CLI_H

#include "base/error.h"

#include <getopt.h>
#include <jansson.h>
#include <stdbool.h>

/* Exit status: 0, or one of these. */
enum cli_status { CLI_FAILED = 1, CLI_USAGE = 2 };

/* What a command returns instead of a negative errno: how it was called is wrong (with *err); its help is asked for (without). */
#define CLI_WRONG_USAGE (-100000)
#define CLI_WANTS_HELP  (-100001)

/* How long the daemon may take for one command. Changes of its graph are bounded (10 s if nothing else is said). */
#define CLI_COMMAND_MS 60000

struct cli_command {
    const char *name;
    const char *summary;   /* a few words */
    const char *arguments; /* behind the name, in the usage line */
    const char *help;      /* the lines of the options */
    bool is_image_tool; /* wrong usage ends with the status 1, as in the peer's tool for images */
    /* argv[0] is the name. 0, or a negative errno and *err, or one of the above. */
    int (*run)(int argc, char **argv, struct error **err);
};

extern const struct cli_command backup_command;
extern const struct cli_command backups_command;
extern const struct cli_command check_command;
extern const struct cli_command check_node_command;
extern const struct cli_command jobs_command;
extern const struct cli_command qmp_command;
extern const struct cli_command amend_command;
extern const struct cli_command bench_command;
extern const struct cli_command commit_command;
extern const struct cli_command compare_command;
extern const struct cli_command convert_command;
extern const struct cli_command create_command;
extern const struct cli_command dd_command;
extern const struct cli_command info_command;
extern const struct cli_command io_command;
extern const struct cli_command map_command;
extern const struct cli_command measure_command;
extern const struct cli_command nbd_command;
extern const struct cli_command rebase_command;
extern const struct cli_command resize_command;
extern const struct cli_command restore_command;
extern const struct cli_command serve_command;
extern const struct cli_command snapshot_command;
extern const struct cli_command bitmap_command;

/* The program's exit status, for a command whose statuses mean more than cli_status; an error is still printed. */
void cli_set_exit_status(int status);
/* -1: none was set. */
int cli_exit_status(void);

/* Sets *err; returns CLI_WRONG_USAGE. */
int cli_usage(struct error **err, const char *fmt, ...) PRINTF_LIKE(2, 3);

/*
 * The next option: its value; -1 when there is none left; CLI_WRONG_USAGE; CLI_WANTS_HELP. The list has CLI_HELP_OPTION, and
 * options without a letter have values from 256 on.
 */
int cli_next_option(int argc, char **argv, const struct option *options, struct error **err);
#define CLI_HELP_OPTION                                                                            \
    {                                                                                              \
        "help", no_argument, NULL, 'h'                                                             \
    }

/* Wants from `min` to `max` arguments behind the options; `what` names them. 0 or CLI_WRONG_USAGE. */
int cli_check_arguments(int argc, int min, int max, const char *what, struct error **err);

/* A size with a suffix (1M), for an option. 0 or CLI_WRONG_USAGE. */
int cli_read_size(const char *option, const char *text, uint64_t *ret, struct error **err);

/* One line, or indented. Takes the value. */
void cli_print_json(json_t *value, bool pretty);
/* How messages name the program; `cairn` unless it is called by another name. */
extern const char *cli_program;
/* `cairn: warning: ...` on standard error. */
void cli_warn(const char *fmt, ...) PRINTF_LIKE(1, 2);

/* SIGINT, SIGTERM and SIGHUP ask for an end in order; a second one ends the program at once. */
void cli_catch_signals(void);
bool cli_interrupted(void);
/* Sets *err. Returns -EINTR. */
int cli_interrupted_error(struct error **err);

#endif
