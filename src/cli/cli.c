/* SPDX-License-Identifier: Apache-2.0 */
/* Options, output and signals of the subcommands. */
#include "cli/cli.h"
#include "base/alloc.h"
#include "base/json-text.h"
#include "base/macros.h"
#include "base/number.h"

#include <errno.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

const char *cli_program = "cairn";

static int exit_status = -1;

void cli_set_exit_status(int status)
{
    exit_status = status;
}

int cli_exit_status(void)
{
    return exit_status;
}

int cli_usage(struct error **err, const char *fmt, ...)
{
    AUTO(free_ptr) char *text = NULL;
    va_list args;

    va_start(args, fmt);
    text = xvasprintf(fmt, args);
    va_end(args);
    (void)error_set(err, EINVAL, "%s", text);
    return CLI_WRONG_USAGE;
}

int cli_next_option(int argc, char **argv, const struct option *options, struct error **err)
{
    int at = optind ? optind : 1;
    int opt;

    opterr = 0; /* we say it ourselves */
    opt = getopt_long(argc, argv, ":h", options, NULL);
    if (opt == 'h')
        return CLI_WANTS_HELP;
    if (opt == ':')
        return cli_usage(err, "option '%s' needs a value", argv[optind - 1]);
    if (opt == '?') /* getopt has moved what is no option out of the way */
        return cli_usage(err, "option '%s' is not understood", argv[at < optind ? optind - 1 : at]);
    return opt;
}

int cli_check_arguments(int argc, int min, int max, const char *what, struct error **err)
{
    int count = argc - optind;

    if (count < min)
        return cli_usage(err, "%s missing", what);
    if (count > max)
        return cli_usage(err, "there are more arguments than %s", what);
    return 0;
}

int cli_read_size(const char *option, const char *text, uint64_t *ret, struct error **err)
{
    if (size_from_text(text, ret) < 0 || *ret > INT64_MAX)
        return cli_usage(err, "%s %s: it is a size in bytes, such as 1048576, 512k or 1.5G", option,
                         text);
    return 0;
}

void cli_print_json(json_t *value, bool pretty)
{
    AUTO(free_ptr) char *text = json_text_dump(value, pretty);

    json_decref(value);
    (void)puts(text ? text : "null"); /* main looks whether all was written */
}

void cli_warn(const char *fmt, ...)
{
    AUTO(free_ptr) char *text = NULL;
    va_list args;

    va_start(args, fmt);
    text = xvasprintf(fmt, args);
    va_end(args);
    (void)fflush(stdout);
    (void)fprintf(stderr, "%s: warning: %s\n", cli_program, text);
}

static volatile sig_atomic_t interrupted;

static void interrupt(int signal)
{
    (void)signal;
    interrupted = 1;
}

void cli_catch_signals(void)
{
    /* After the first one a signal does what it does by itself, so that nobody has to wait. */
    struct sigaction action = {.sa_handler = interrupt, .sa_flags = (int)SA_RESETHAND};
    static const int signals[] = {SIGINT, SIGTERM, SIGHUP};

    for (size_t i = 0; i < ARRAY_SIZE(signals); i++) {
        struct sigaction old;

        /* What the caller ignores stays so: nohup, and shells that start something in the background. */
        if (sigaction(signals[i], NULL, &old) == 0 && old.sa_handler != SIG_IGN)
            (void)sigaction(signals[i], &action, NULL);
    }
}

bool cli_interrupted(void)
{
    return interrupted != 0;
}

int cli_interrupted_error(struct error **err)
{
    return error_set(err, EINTR, "interrupted");
}
