/* SPDX-License-Identifier: Apache-2.0 */
/* Options: what the command line says, before anything is done. */
#include "daemon/options.h"
#include "base/alloc.h"
#include "base/keyval.h"
#include "base/macros.h"
#include "base/number.h"
#include "daemon/process.h"
#include "graph/change.h"
#include "option-help.h"
#include "schema-types.h"

#include <errno.h>
#include <getopt.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

/* One loop each; the control thread has another. Together less than LOOP_MAX. */
#define IO_THREADS_MAX   32
#define COPY_THREADS_MAX 16
/* When nothing is said: no more than this, however many CPUs there are. */
#define COPY_THREADS_USUAL 1
/* A day. */
#define CHANGE_DEADLINE_MAX_S 86400

struct step_syntax {
    const char *option;
    const struct schema_type *type;
    const char *implied_key; /* the first item's key may be left out */
};

static const struct step_syntax syntaxes[] = {
    [STEP_BLOCKDEV] = {"--blockdev", &node_options_type, "driver"},
    [STEP_EXPORT] = {"--export", &export_options_type, "type"},
    [STEP_NBD_SERVER] = {"--nbd-server", &nbd_server_options_type, NULL},
    [STEP_CHARDEV] = {"--chardev", &chardev_options_type, "backend"},
    [STEP_MONITOR] = {"--monitor", &monitor_options_type, "chardev"},
    [STEP_OBJECT] = {"--object", &object_options_type, "qom-type"},
};

/* getopt's values: steps are their kind. */
enum {
    OPT_DAEMONIZE = 128,
    OPT_PIDFILE,
    OPT_ENGINE,
    OPT_IO_THREADS,
    OPT_COPY_THREADS,
    OPT_CHANGE_DEADLINE,
    OPT_ALLOW,
    OPT_STEP, /* + enum step_kind */
};

static const struct option long_options[] = {
    {"blockdev", required_argument, NULL, OPT_STEP + STEP_BLOCKDEV},
    {"export", required_argument, NULL, OPT_STEP + STEP_EXPORT},
    {"nbd-server", required_argument, NULL, OPT_STEP + STEP_NBD_SERVER},
    {"chardev", required_argument, NULL, OPT_STEP + STEP_CHARDEV},
    {"monitor", required_argument, NULL, OPT_STEP + STEP_MONITOR},
    {"daemonize", no_argument, NULL, OPT_DAEMONIZE},
    {"pidfile", required_argument, NULL, OPT_PIDFILE},
    {"engine", required_argument, NULL, OPT_ENGINE},
    {"io-threads", required_argument, NULL, OPT_IO_THREADS},
    {"copy-threads", required_argument, NULL, OPT_COPY_THREADS},
    {"change-deadline", required_argument, NULL, OPT_CHANGE_DEADLINE},
    {"allow", required_argument, NULL, OPT_ALLOW},
    {"object", required_argument, NULL, OPT_STEP + STEP_OBJECT},
    {"trace", required_argument, NULL, 'T'},
    {"help", no_argument, NULL, 'h'},
    {"version", no_argument, NULL, 'V'},
    {NULL, 0, NULL, 0},
};

int step_wrap_error(const struct step *s, struct error **err, int r)
{
    AUTO(free_ptr) char *text = xstrdup(s->text);

    if (s->kind == STEP_OBJECT)
        return error_wrap(err, r, "%s", syntaxes[s->kind].option);
    for (char *p = text; *p; p++) {
        if ((unsigned char)*p < ' ')
            *p = ' ';
    }
    return error_wrap(err, r, "%s %s", syntaxes[s->kind].option, text);
}

static int add_step(struct options *o, enum step_kind kind, const char *text, struct error **err)
{
    const struct step_syntax *syntax = &syntaxes[kind];
    struct step *s =
        &o->steps[o->step_count++]; /* there is one for each word of the command line */
    int r;

    s->kind = kind;
    s->text = text;
    s->value = xalloc(1, syntax->type->size);
    r = keyval_in(syntax->type, text, syntax->implied_key, s->value, err);
    return r < 0 ? step_wrap_error(s, err, r) : 0;
}

static int read_engine(const char *text, enum loop_engine *ret, struct error **err)
{
    if (strcmp(text, "auto") == 0)
        *ret = LOOP_ENGINE_AUTO;
    else if (strcmp(text, "io_uring") == 0)
        *ret = LOOP_ENGINE_IO_URING;
    else if (strcmp(text, "threads") == 0)
        *ret = LOOP_ENGINE_THREADS;
    else
        return error_set(err, EINVAL, "--engine %s: it is one of io_uring, threads, auto", text);
    return 0;
}

static int read_number(const char *option, const char *text, uint64_t max, uint64_t *ret,
                       struct error **err)
{
    int r = number_from_text(text, ret);

    if (r < 0 || *ret < 1 || *ret > max)
        return error_set(err, EINVAL, "%s %s: it is a number from 1 to %" PRIu64, option, text,
                         max);
    return 0;
}

static int read_option(struct options *o, int opt, const char *word, struct error **err)
{
    uint64_t number;
    int r;

    switch (opt) {
    case 'h':
        o->help = true;
        return 0;
    case 'V':
        o->version = true;
        return 0;
    case 'T':
        return error_set(err, ENOTSUP, "--trace: there is no tracing of this kind");
    case OPT_DAEMONIZE:
        o->daemonize = true;
        return 0;
    case OPT_PIDFILE:
        o->pidfile = optarg;
        return 0;
    case OPT_ENGINE:
        return read_engine(optarg, &o->engine, err);
    case OPT_IO_THREADS:
        r = read_number("--io-threads", optarg, IO_THREADS_MAX, &number, err);
        o->io_threads = (unsigned)number;
        return r;
    case OPT_COPY_THREADS:
        r = read_number("--copy-threads", optarg, COPY_THREADS_MAX, &number, err);
        o->copy_threads = (unsigned)number;
        return r;
    case OPT_CHANGE_DEADLINE:
        r = read_number("--change-deadline", optarg, CHANGE_DEADLINE_MAX_S, &number, err);
        o->change_deadline_ns = number * NS_PER_S;
        return r;
    case OPT_ALLOW:
        o->allowed[o->allowed_count++] = optarg; /* as with steps */
        return 0;
    case ':':
        return error_set(err, EINVAL, "option '%s' needs a value", word);
    case '?':
        return error_set(err, EINVAL, "there is no option '%s', see --help", word);
    default:
        return add_step(o, (enum step_kind)(opt - OPT_STEP), optarg, err);
    }
}

int options_parse(struct options *ret, int argc, char **argv, struct error **err)
{
    struct options o = {
        .engine = LOOP_ENGINE_AUTO,
        .io_threads = process_usual_io_threads(),
        .copy_threads = COPY_THREADS_USUAL,
        .change_deadline_ns = CHANGE_DEADLINE_DEFAULT_NS,
        .allowed = xnew_n(const char *, (size_t)MAX(argc, 1)),
        .steps = xnew_n(struct step, (size_t)MAX(argc, 1)),
    };
    int r = 0;
    int opt;

    opterr = 0; /* we say it ourselves */
    while (r == 0) {
        int at = MAX(optind, 1);

        opt = getopt_long(argc, argv, "+:hT:V", long_options, NULL);
        if (opt == -1)
            break;
        r = read_option(&o, opt, at < argc ? argv[at] : "", err);
    }
    if (r == 0 && optind < argc)
        r = error_set(err, EINVAL, "argument '%s' is not expected, see --help", argv[optind]);
    if (r < 0) {
        options_release(&o);
        return r;
    }
    *ret = o;
    return 0;
}

void options_release(struct options *o)
{
    for (size_t i = 0; i < o->step_count; i++) {
        struct step *s = &o->steps[i];

        schema_free(syntaxes[s->kind].type, s->value);
        free(s->value);
    }
    free(o->steps);
    o->steps = NULL;
    o->step_count = 0;
    free(o->allowed);
    o->allowed = NULL;
    o->allowed_count = 0;
}

char *options_help(const char *program)
{
    return xasprintf(
        "usage: %s [OPTION]...\n"
        "\n"
        "Opens virtual disks as a graph of nodes and serves them. Options are carried out from left to\n"
        "right. What follows an option with KEY=VALUE,... may be JSON instead.\n"
        "\n"
        "%s"
        "  --daemonize           go to the background when all of this is done\n"
        "  --pidfile PATH        write the process id there when all of this is done\n"
        "  --engine ENGINE       how I/O is done: io_uring, threads, or auto (default)\n"
        "  --io-threads N        threads that serve clients; the default here is %u\n"
        "  --copy-threads N      threads that jobs work on; default %u\n"
        "  --change-deadline S   seconds that a change of the graph may wait; default %u\n"
        "  --allow DIR           let images refer to files in DIR and below it; may be repeated\n"
        "  -V, --version         say the version and exit\n"
        "  -h, --help            say this and exit\n",
        program, option_help, process_usual_io_threads(), COPY_THREADS_USUAL,
        (unsigned)(CHANGE_DEADLINE_DEFAULT_NS / NS_PER_S));
}
