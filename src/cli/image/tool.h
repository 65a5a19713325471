/* SPDX-License-Identifier: Apache-2.0 */
/* What the image tools have in common: options, a graph to work in, progress, how they end. */
#ifndef CAIRN_CLI_IMAGE_TOOL_H
#define CAIRN_CLI_IMAGE_TOOL_H

#include "base/context.h"
#include "base/error.h"
#include "cli/cli.h"
#include "cli/image/image.h"
#include "graph/graph.h"
#include "loop/loop.h"
#include "loop/scope.h"

#include <stdbool.h>
#include <stdint.h>

/* Values of options without a letter that several tools have. */
enum tool_option {
    TOOL_OBJECT = 256,
    TOOL_IMAGE_OPTS,
    TOOL_OUTPUT,
    TOOL_ALLOW,
    TOOL_FIRST_FREE,
};

/* The long options of every tool that opens images. */
#define TOOL_LONG_OPTIONS                                                                          \
    CLI_HELP_OPTION, {"object", required_argument, NULL, TOOL_OBJECT},                             \
        {"image-opts", no_argument, NULL, TOOL_IMAGE_OPTS},                                        \
    {                                                                                              \
        "allow", required_argument, NULL, TOOL_ALLOW                                               \
    }

/*
 * The next option: -1 when there is none left, CLI_WRONG_USAGE, CLI_WANTS_HELP. `letters` as getopt's, without what begins it.
 * --object and --allow are dealt with here.
 */
int tool_next_option(int argc, char **argv, const char *letters, const struct option *options,
                     struct error **err);
/* Of the image that the tool is about: -f, -U and --image-opts. 0; another option is returned as it is. */
int tool_image_option(struct image_spec *spec, int opt);
/* One more of several -o, behind a comma; freed by the caller. -EINVAL for what is no list. */
int tool_join_options(char **options, const char *text, struct error **err);
/* --output. */
int tool_read_output(const char *text, bool *ret_json, struct error **err);
/* A size as the peer takes them; `what` is named in the error. -EINVAL. */
int tool_read_size(const char *what, const char *text, uint64_t *ret, struct error **err);
/* A number from min to max. -EINVAL. */
int tool_read_number(const char *what, const char *text, uint64_t min, uint64_t max, uint64_t *ret,
                     struct error **err);
/* on, off and what else says so. -EINVAL. */
int tool_read_bool(const char *what, const char *text, bool *ret, struct error **err);
/* `format` and --image-opts exclude each other. */
int tool_check_format(const struct image_spec *spec, struct error **err);
/* After the options: the image is the only argument. As above. */
int tool_only_image(struct image_spec *spec, int argc, char **argv, struct error **err);

/* A cache mode: how a written image is treated. */
struct tool_cache {
    unsigned flags;    /* IMAGE_DIRECT, IMAGE_NO_FLUSH */
    bool writethrough; /* each write is durable */
};

/* `text` NULL is not allowed. -EINVAL. */
int tool_read_cache(const char *text, struct tool_cache *ret, struct error **err);

/* Runs fn(graph, arg) on a loop of its own, with a graph that is closed afterwards. What fn returns. */
typedef int tool_fn(struct graph *g, void *arg, struct error **err);
int tool_run(tool_fn *fn, void *arg, struct error **err);
int tool_run_on(enum loop_engine engine, tool_fn *fn, void *arg, struct error **err);
/* Another loop, on a thread of its own, which ends after the graph is closed; NULL if there can be none. */
struct loop *co_fn tool_co_second_loop(void);
/* One more with each call, in the same way. */
int co_fn tool_co_new_loop(struct loop **ret, const char *name, struct error **err);

/* `1.5 GiB` as the peer writes it: three digits. */
void tool_size_text(char *buf, size_t size, uint64_t bytes);

/*
 * How far a long operation is. -p prints it as the peer does; SIGUSR1 prints it once, on standard error without -p. Percentages
 * are of the weights done.
 */
struct tool_progress {
    bool shown;    /* -p */
    uint64_t done; /* atomic where several threads count */
    uint64_t total;
    double printed; /* percent; < 0: nothing yet */
    struct co_scope scope;
};

void tool_progress_begin(struct tool_progress *p, bool shown, uint64_t total);
void co_fn tool_progress_end(struct tool_progress *p, bool whole);

#endif
