/* SPDX-License-Identifier: Apache-2.0 */
/* cairn nbd: its command line, which is qemu-nbd's; and the program under that name. */
#include "base/macros.h"
#include "base/number.h"
#include "cli/cli.h"
#include "cli/image/personality.h"
#include "cli/nbd/nbd.h"
#include "config.h"

#include <errno.h>
#include <inttypes.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define PORT_USUAL "10809"
/* Those that are handed to a process begin there. */
#define FIRST_INHERITED_FD 3

enum nbd_option {
    OPT_CACHE = TOOL_FIRST_FREE,
    OPT_AIO,
    OPT_DISCARD,
    OPT_DETECT_ZEROES,
    OPT_FORK,
    OPT_PID_FILE,
    OPT_SELINUX_LABEL,
    OPT_TLS_CREDS,
    OPT_TLS_AUTHZ,
    OPT_TLS_HOSTNAME,
    OPT_COUNT,
};

/* No error, and nothing is left to be done. */
#define SAID_VERSION 1

/* Options that may stand once; -n is --cache. */
static bool seen[OPT_COUNT];

static int once(int opt, const char *name, struct error **err)
{
    if (seen[opt])
        return error_set(err, EINVAL, "%s can only be specified once", name);
    seen[opt] = true;
    return 0;
}

/* ---- one option ---- */

static int read_cache(struct nbd_tool *t, const char *mode, struct error **err)
{
    int r = once(OPT_CACHE, "-n and --cache", err);

    return r < 0 ? r : tool_read_cache(mode, &t->cache, err);
}

static int read_aio(struct nbd_tool *t, const char *mode, struct error **err)
{
    int r = once(OPT_AIO, "--aio", err);

    if (r < 0)
        return r;
    if (strcmp(mode, "io_uring") == 0)
        t->engine = LOOP_ENGINE_IO_URING;
    else if (strcmp(mode, "threads") == 0)
        t->engine = LOOP_ENGINE_THREADS;
    else if (strcmp(mode, "native") == 0)
        return error_set(err, ENOTSUP, "--aio=native is not supported: use io_uring or threads");
    else
        return error_set(err, EINVAL, "Invalid aio mode '%s'", mode);
    return 0;
}

static int read_discard(struct nbd_tool *t, const char *mode, struct error **err)
{
    int r = once(OPT_DISCARD, "--discard", err);

    if (r < 0)
        return r;
    if (strcmp(mode, "ignore") == 0 || strcmp(mode, "off") == 0)
        t->discard = "ignore";
    else if (strcmp(mode, "unmap") == 0 || strcmp(mode, "on") == 0)
        t->discard = "unmap";
    else
        return error_set(err, EINVAL, "Invalid discard mode '%s'", mode);
    return 0;
}

static int read_detect_zeroes(struct nbd_tool *t, const char *mode, struct error **err)
{
    if (strcmp(mode, "off") != 0 && strcmp(mode, "on") != 0 && strcmp(mode, "unmap") != 0)
        return error_set(err, EINVAL, "--detect-zeroes '%s': it is one of off, on, unmap", mode);
    t->detect_zeroes = mode;
    return 0;
}

static int read_shared(struct nbd_tool *t, const char *text, struct error **err)
{
    uint64_t n;

    if (number_from_text(text, &n) < 0 || n > INT_MAX)
        return error_set(err, EINVAL, "Invalid shared device number '%s'", text);
    t->shared = (unsigned)n;
    return 0;
}

/* A number, or the name of a service, which listening looks up. */
static int check_port(const char *text, struct error **err)
{
    uint64_t n;

    if (!*text || (number_from_text(text, &n) == 0 && (n < 1 || n > UINT16_MAX)))
        return error_set(err, EINVAL, "Invalid port '%s', expected 1 to %d or a service", text,
                         UINT16_MAX);
    return 0;
}

static int add_bitmap(struct nbd_tool *t, const char *name, struct error **err)
{
    if (t->bitmap_count == ARRAY_SIZE(t->bitmaps))
        return error_set(err, E2BIG, "more than %d times --bitmap", NBD_TOOL_BITMAPS_MAX);
    t->bitmaps[t->bitmap_count++] = name;
    return 0;
}

static int refuse(int opt, struct error **err)
{
    switch (opt) {
    case 'L':
        return error_set(err, ENOTSUP, "--list is not supported yet: nbdinfo --list does it");
    case 'c':
    case 'd':
        return error_set(err, ENOTSUP,
                         "--connect and --disconnect are not supported: nbd-client connects a "
                         "device of the kernel to a server");
    case 'T':
        return error_set(err, ENOTSUP, "--trace: there is no tracing of this kind");
    case OPT_SELINUX_LABEL:
        return error_set(err, ENOTSUP, "--selinux-label is not supported");
    default:
        return error_set(err, ENOTSUP,
                         "--tls-creds, --tls-authz and --tls-hostname: TLS is not "
                         "supported yet");
    }
}

/* What an option with a value says of the server and its export; what it has no word for it returns. */
static int read_value(struct nbd_tool *t, int opt, struct error **err)
{
    switch (opt) {
    case 'p':
        t->port = optarg;
        return check_port(optarg, err);
    case 'b':
        t->bind = optarg;
        return 0;
    case 'k':
        t->path = optarg;
        return *optarg ? 0 : error_set(err, EINVAL, "--socket: the path is empty");
    case 'e':
        return read_shared(t, optarg, err);
    case 'x':
        t->name = optarg;
        return 0;
    case 'D':
        t->description = optarg;
        return 0;
    case 'o':
        return tool_read_size("offset", optarg, &t->offset, err);
    case 'B':
        return add_bitmap(t, optarg, err);
    case 'f':
        t->spec.format = optarg;
        return 0;
    case 'l':
        t->spec.snapshot = optarg;
        t->read_only = true;
        return 0;
    case OPT_CACHE:
        return read_cache(t, optarg, err);
    case OPT_AIO:
        return read_aio(t, optarg, err);
    case OPT_DISCARD:
        return read_discard(t, optarg, err);
    case OPT_DETECT_ZEROES:
        return read_detect_zeroes(t, optarg, err);
    case OPT_PID_FILE:
        t->pid_file = optarg;
        return 0;
    default:
        return opt < 0 ? opt : refuse(opt, err);
    }
}

static int read_option(struct nbd_tool *t, int opt, struct error **err)
{
    switch (opt) {
    case 't':
        t->persistent = true;
        return 0;
    case 'A':
        t->depth = true;
        return 0;
    case 'v':
        t->verbose = true;
        return 0;
    case 'r':
        t->read_only = true;
        return 0;
    case 's':
        t->overlay = true;
        return 0;
    case 'n':
        return read_cache(t, "none", err);
    case OPT_FORK:
        t->fork = true;
        return 0;
    case TOOL_IMAGE_OPTS:
        t->spec.options = true;
        return 0;
    default:
        return read_value(t, opt, err);
    }
}

/* ---- all of them ---- */

/* A number that another program has put into the environment; 0 if there is none. */
static uint64_t from_environment(const char *name)
{
    const char *text = getenv(name);
    uint64_t n;

    return text && number_from_text(text, &n) == 0 ? n : 0;
}

/* Socket activation: whoever started the process listens already, and has said that this is for us. */
static int take_inherited(struct nbd_tool *t, struct error **err)
{
    uint64_t count = from_environment("LISTEN_FDS");

    if (!count || from_environment("LISTEN_PID") != (uint64_t)getpid())
        return 0;
    /* Not for those that this process may start. */
    (void)unsetenv("LISTEN_FDS");
    (void)unsetenv("LISTEN_PID");
    if (count > 1)
        return error_set(err, EINVAL, "%" PRIu64 " sockets are inherited, and one can be served",
                         count);
    if (t->path || t->bind || t->port)
        return error_set(err, EINVAL,
                         "--socket, --bind and --port are not for a socket that is inherited");
    t->inherited_fd = FIRST_INHERITED_FD;
    return 0;
}

static int check_detect_zeroes(const struct nbd_tool *t, struct error **err)
{
    bool unmaps = t->discard && strcmp(t->discard, "unmap") == 0;

    if (t->detect_zeroes && strcmp(t->detect_zeroes, "unmap") == 0 && !unmaps)
        return error_set(err, EINVAL, "--detect-zeroes=unmap needs --discard=unmap");
    return 0;
}

static int check_all(struct nbd_tool *t, int count, struct error **err)
{
    int r = count == 1 ? 0 : cli_usage(err, "Invalid number of arguments");

    if (r == 0 && t->spec.options && t->spec.format)
        r = error_set(err, EINVAL, "--image-opts and -f are mutually exclusive");
    if (r == 0 && t->overlay && t->spec.snapshot)
        r = error_set(err, EINVAL, "--snapshot and --load-snapshot are mutually exclusive");
    if (r == 0)
        r = check_detect_zeroes(t, err);
    if (r == 0)
        r = take_inherited(t, err);
    if (r < 0)
        return r;
    if (!t->bind)
        t->bind = "0.0.0.0";
    if (!t->port)
        t->port = PORT_USUAL;
    return 0;
}

/* Ends the reading of options. */
static int say_version(void)
{
    printf("qemu-nbd " PEER_VERSION " (cairn " CAIRN_VERSION ")\n");
    return SAID_VERSION;
}

static int nbd_run(int argc, char **argv, struct error **err)
{
    static const struct option options[] = {
        TOOL_LONG_OPTIONS,
        {"port", required_argument, NULL, 'p'},
        {"bind", required_argument, NULL, 'b'},
        {"socket", required_argument, NULL, 'k'},
        {"shared", required_argument, NULL, 'e'},
        {"persistent", no_argument, NULL, 't'},
        {"verbose", no_argument, NULL, 'v'},
        {"version", no_argument, NULL, 'V'},
        {"export-name", required_argument, NULL, 'x'},
        {"description", required_argument, NULL, 'D'},
        {"offset", required_argument, NULL, 'o'},
        {"allocation-depth", no_argument, NULL, 'A'},
        {"bitmap", required_argument, NULL, 'B'},
        {"list", no_argument, NULL, 'L'},
        {"tls-creds", required_argument, NULL, OPT_TLS_CREDS},
        {"tls-authz", required_argument, NULL, OPT_TLS_AUTHZ},
        {"tls-hostname", required_argument, NULL, OPT_TLS_HOSTNAME},
        {"trace", required_argument, NULL, 'T'},
        {"fork", no_argument, NULL, OPT_FORK},
        {"pid-file", required_argument, NULL, OPT_PID_FILE},
        {"selinux-label", required_argument, NULL, OPT_SELINUX_LABEL},
        {"connect", required_argument, NULL, 'c'},
        {"disconnect", no_argument, NULL, 'd'},
        {"format", required_argument, NULL, 'f'},
        {"read-only", no_argument, NULL, 'r'},
        {"snapshot", no_argument, NULL, 's'},
        {"load-snapshot", required_argument, NULL, 'l'},
        {"nocache", no_argument, NULL, 'n'},
        {"cache", required_argument, NULL, OPT_CACHE},
        {"aio", required_argument, NULL, OPT_AIO},
        {"discard", required_argument, NULL, OPT_DISCARD},
        {"detect-zeroes", required_argument, NULL, OPT_DETECT_ZEROES},
        {NULL, 0, NULL, 0},
    };
    struct nbd_tool t = {.name = "", .shared = 1, .inherited_fd = -1, .engine = LOOP_ENGINE_AUTO};
    int opt;
    int r = 0;

    while (r == 0 && (opt = tool_next_option(argc, argv, "p:b:k:e:tvVx:D:o:AB:LT:c:df:rsl:n",
                                             options, err)) != -1)
        r = opt == 'V' ? say_version() : read_option(&t, opt, err);
    if (r == 0)
        r = check_all(&t, argc - optind, err);
    if (r < 0)
        return r;
    if (r == SAID_VERSION)
        return 0;
    t.spec.name = argv[optind];
    return nbd_serve(&t, err);
}

const struct cli_command nbd_command = {
    .name = "nbd",
    .summary = "serve an image over NBD, as qemu-nbd does",
    .arguments = "[OPTION]... FILE",
    .help =
        "Serves FILE over NBD until the last client has gone, or SIGTERM, SIGINT or SIGHUP asks for the end.\n"
        "\n"
        "  -p, --port PORT           listen on this TCP port (10809)\n"
        "  -b, --bind ADDRESS        and on this address only (0.0.0.0)\n"
        "  -k, --socket PATH         listen on a Unix socket instead\n"
        "  -e, --shared N            so many clients at a time (1); 0: as many as come\n"
        "  -t, --persistent          stay when the last client has gone\n"
        "  -x, --export-name NAME    what clients ask for (the empty name)\n"
        "  -D, --description TEXT    for clients that list exports\n"
        "  -o, --offset SIZE         leave out so much of the beginning\n"
        "  -A, --allocation-depth    clients can ask which layer holds what they see\n"
        "  -B, --bitmap NAME         clients can read this dirty bitmap; may be given several times\n"
        "      --fork                go to the background when clients can come\n"
        "      --pid-file PATH       write the process id there\n"
        "  -f, --format FORMAT       of FILE: raw, qcow2, vdi, vhdx, vmdk, vpc; by default it is probed\n"
        "  -r, --read-only           nobody may write\n"
        "  -s, --snapshot            what is written goes to a temporary file, and with it\n"
        "  -l, --load-snapshot SNAP  an internal snapshot of FILE, by ID or name or\n"
        "                            snapshot.id=ID,snapshot.name=NAME; nobody may write\n"
        "  -n, --nocache             the same as --cache=none\n"
        "      --cache MODE          none, writeback (default), writethrough, directsync or unsafe\n"
        "      --aio MODE            how I/O is done: io_uring or threads\n"
        "      --discard MODE        ignore (default) or unmap\n"
        "      --detect-zeroes MODE  off (default), on or unmap: writes of zeroes become zeroes that\n"
        "                            take no space; unmap needs --discard unmap\n"
        "      --image-opts          FILE is options: driver=qcow2,file.filename=PATH\n"
        "      --allow DIR           what images refer to may lie in DIR, too\n"
        "  -v, --verbose             say on standard error what is served\n"
        "  -V, --version             say the version and exit\n"
        "  -h, --help                say this and exit\n",
    .is_image_tool = true,
    .run = nbd_run,
};

/* ---- under the peer's name ---- */

bool nbd_is_qemu_nbd(const char *argv0)
{
    const char *slash = strrchr(argv0, '/');

    return strcmp(slash ? slash + 1 : argv0, "qemu-nbd") == 0;
}

int nbd_qemu_nbd(int argc, char **argv)
{
    struct error *err = NULL;
    int r;

    image_follow_all();
    r = nbd_run(argc, argv, &err);
    if (r == CLI_WANTS_HELP) {
        printf("usage: qemu-nbd %s\n\n%s", nbd_command.arguments, nbd_command.help);
        r = 0;
    }
    if ((fflush(stdout) < 0 || ferror(stdout)) && r == 0)
        r = error_set(&err, EIO, "cannot write to standard output");
    if (err)
        (void)fprintf(stderr, "qemu-nbd: %s\n", error_text(err));
    if (r == CLI_WRONG_USAGE)
        (void)fprintf(stderr, "Try `qemu-nbd --help' for more information.\n");
    error_free(&err);
    return r == 0 ? 0 : CLI_FAILED;
}
