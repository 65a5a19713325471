/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cairn serve: a daemon for one disk. The tool probes and resolves (Q6), the daemon is told all of it; the tool waits until the
 * daemon answers, says where, and stays in front of it until it ends.
 */
#include "base/alloc.h"
#include "base/json-text.h"
#include "base/keyval.h"
#include "base/macros.h"
#include "cli/cli.h"
#include "cli/layers.h"
#include "cli/progress.h"
#include "cli/session.h"
#include "schema-types.h"

#include <errno.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define TOP_NODE    "disk"
#define START_MS    30000
#define ALLOW_MAX   64
#define SECRETS_MAX 64
#define FORMATS     "raw, qcow2, luks, vdi, vhdx, vmdk or vpc"
#define NBD_SUFFIX  ".nbd"
#define QMP_SUFFIX  ".qmp"

struct serve {
    const char *disk;
    const char *format;
    char *name; /* of the export */
    char *nbd_path;
    char *qmp_path;
    bool read_only;
    bool json;
    const char *allowed[ALLOW_MAX];
    size_t allowed_count;
    const char *objects[SECRETS_MAX];
    size_t object_count;
    const char *keys[SECRETS_MAX];
    size_t key_count;
    struct layers layers;

    char **words; /* of the daemon's command line */
    size_t word_count;
    pid_t daemon;
};

/* ---- where the sockets are ---- */

/* The directory of the user's sockets, made if it is not there; nobody else can write to it. */
static int runtime_dir(char **ret, struct error **err)
{
    const char *base = getenv("XDG_RUNTIME_DIR");
    AUTO(free_ptr) char *dir = NULL;
    struct stat st;

    if (base && base[0] == '/')
        dir = xasprintf("%s/cairn", base);
    else if (geteuid() == 0)
        dir = xstrdup("/run/cairn");
    else
        dir = xasprintf("/tmp/cairn-%u", (unsigned)geteuid());
    if (mkdir(dir, 0700) < 0 && errno != EEXIST)
        return error_set(err, errno, "cannot make '%s': %s; give --socket", dir, strerror(errno));
    if (lstat(dir, &st) < 0 || !S_ISDIR(st.st_mode) || st.st_uid != geteuid() || (st.st_mode & 022))
        return error_set(err, EACCES,
                         "'%s' is no directory that only this user writes to; give --socket", dir);
    *ret = take(&dir);
    return 0;
}

/* The file's name without directory and suffix. */
static char *name_of(const char *disk)
{
    const char *slash = strrchr(disk, '/');
    char *name = xstrdup(slash ? slash + 1 : disk);
    char *dot = strrchr(name, '.');

    if (dot && dot != name)
        *dot = '\0';
    return name;
}

static char *beside(const char *nbd_path)
{
    size_t len = strlen(nbd_path);
    size_t cut = sizeof(NBD_SUFFIX) - 1;

    if (len > cut && strcmp(nbd_path + len - cut, NBD_SUFFIX) == 0)
        len -= cut;
    return xasprintf("%.*s" QMP_SUFFIX, (int)len, nbd_path);
}

static int choose_sockets(struct serve *s, struct error **err)
{
    if (!s->nbd_path) {
        AUTO(free_ptr) char *dir = NULL;
        AUTO(free_ptr) char *name = name_of(s->disk);
        int r = runtime_dir(&dir, err);

        if (r < 0)
            return r;
        s->nbd_path = xasprintf("%s/%s" NBD_SUFFIX, dir, name);
    }
    if (!s->qmp_path)
        s->qmp_path = beside(s->nbd_path);
    return 0;
}

static int check_not_served(const struct serve *s, struct error **err)
{
    struct cairn_client *c = NULL;

    if (cairn_client_open(&c, s->qmp_path, CLI_COMMAND_MS, NULL) < 0)
        return 0; /* nobody is there, or the daemon will say what is wrong */
    (void)cairn_client_close(c);
    return error_set(err, EADDRINUSE, "a daemon answers at '%s' already; give another --socket",
                     s->qmp_path);
}

/* ---- the daemon ---- */

/* Beside the tool, beside it in the build tree, or in PATH: as execvp() takes it. */
static char *daemon_program(void)
{
    static const char *const places[] = {"cairnd", "../daemon/cairnd"};
    char self[PATH_MAX];
    ssize_t len = readlink("/proc/self/exe", self, sizeof(self) - 1);
    char *slash;

    self[MAX(len, (ssize_t)0)] = '\0';
    slash = strrchr(self, '/');
    for (size_t i = 0; slash && i < ARRAY_SIZE(places); i++) {
        char *path = xasprintf("%.*s%s", (int)(slash - self + 1), self, places[i]);

        if (access(path, X_OK) == 0)
            return path;
        free(path);
    }
    return xstrdup("cairnd");
}

/* Takes the word. */
static void add_word(struct serve *s, char *word)
{
    s->words = realloc(s->words, (s->word_count + 2) * sizeof(*s->words));
    if (!s->words)
        abort(); /* as all small memory */
    s->words[s->word_count++] = word;
    s->words[s->word_count] = NULL;
}

static void add_words(struct serve *s, const char *option, const char *value)
{
    add_word(s, xstrdup(option));
    add_word(s, xstrdup(value));
}

/* Takes the value; NULL if what is in it cannot be said in JSON. */
static int add_option(struct serve *s, const char *option, json_t *value, struct error **err)
{
    char *text = value ? json_text_dump(value, false) : NULL;

    json_decref(value);
    if (!text)
        return error_set(err, EINVAL, "a path or a name is not UTF-8, and the control protocol is");
    add_word(s, xstrdup(option));
    add_word(s, text);
    return 0;
}

static int make_command_line(struct serve *s, struct error **err)
{
    json_t *address = json_pack("{s:s, s:s}", "type", "unix", "path", s->nbd_path);
    int r = 0;

    add_word(s, daemon_program());
    for (size_t i = 0; i < s->allowed_count; i++)
        add_words(s, "--allow", s->allowed[i]);
    for (size_t i = 0; i < s->object_count; i++)
        add_words(s, "--object", s->objects[i]);
    for (size_t i = s->layers.count; r == 0 && i-- > 0;)
        r = add_option(s, "--blockdev",
                       layers_definition(&s->layers, i, TOP_NODE, s->read_only, false), err);
    if (r == 0)
        r = add_option(s, "--nbd-server", json_pack("{s:O?}", "addr", address), err);
    if (r == 0)
        r = add_option(s, "--export",
                       json_pack("{s:s, s:s, s:s, s:s, s:b}", "type", "nbd", "id", "nbd",
                                 "node-name", TOP_NODE, "name", s->name, "writable", !s->read_only),
                       err);
    if (r == 0)
        r = add_option(s, "--chardev",
                       json_pack("{s:s, s:s, s:s, s:b, s:b}", "backend", "socket", "id", "control",
                                 "path", s->qmp_path, "server", 1, "wait", 0),
                       err);
    if (r == 0)
        r = add_option(s, "--monitor", json_pack("{s:s}", "chardev", "control"), err);
    json_decref(address);
    return r;
}

static int start_daemon(struct serve *s, struct error **err)
{
    pid_t parent = getpid();

    (void)fflush(stdout);
    s->daemon = fork();
    if (s->daemon < 0)
        return error_set(err, errno, "cannot make a process: %s", strerror(errno));
    if (s->daemon > 0)
        return 0;
    (void)signal(SIGPIPE, SIG_DFL);
    /* It ends in order when the tool is killed. */
    (void)prctl(PR_SET_PDEATHSIG, SIGTERM);
    if (getppid() != parent)
        _exit(CLI_FAILED);
    (void)execvp(s->words[0], s->words);
    (void)fprintf(stderr, "cairn: cannot run '%s': %s\n", s->words[0], strerror(errno));
    _exit(CLI_FAILED);
}

/* Asks it to end, when this process was. Waits until it has. Returns its exit status. */
static int wait_for_daemon(struct serve *s)
{
    bool asked = false;
    int status;

    for (;;) {
        if (cli_interrupted() && !asked)
            asked = kill(s->daemon, SIGTERM) == 0;
        if (waitpid(s->daemon, &status, 0) == s->daemon)
            break;
        /* Only a signal interrupts it. */
    }
    s->daemon = 0;
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

/* Until it answers, or has ended. 1: it answers. 0: it is to end, or has. */
static int wait_until_ready(const struct serve *s, struct error **err)
{
    const struct timespec moment = {.tv_nsec = 5000000L};
    uint64_t deadline = progress_now_ms() + START_MS;

    for (;;) {
        struct cairn_client *c = NULL;
        siginfo_t ended = {.si_pid = 0};

        if (waitid(P_PID, (id_t)s->daemon, &ended, WEXITED | WNOHANG | WNOWAIT) == 0 &&
            ended.si_pid)
            return 0;
        if (cli_interrupted())
            return 0;
        if (cairn_client_open(&c, s->qmp_path, START_MS, NULL) == 0) {
            (void)cairn_client_close(c);
            return 1;
        }
        if (progress_now_ms() > deadline)
            return error_set(err, ETIMEDOUT, "the daemon does not answer at '%s'", s->qmp_path);
        (void)nanosleep(&moment, NULL);
    }
}

/* A name in a URI: all but what needs no escape is escaped. */
static char *uri_escape(const char *text)
{
    char *out = xnew_n(char, 3 * strlen(text) + 1);
    char *to = out;

    for (const char *p = text; *p; p++) {
        if (strchr("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~/", *p))
            *to++ = *p;
        else
            to += snprintf(to, 4, "%%%02X", (unsigned char)*p);
    }
    return out;
}

/* Without following links. */
static char *absolute(const char *path)
{
    AUTO(free_ptr) char *here = path[0] == '/' ? NULL : getcwd(NULL, 0);

    return here ? xasprintf("%s/%s", strcmp(here, "/") == 0 ? "" : here, path) : xstrdup(path);
}

static void say_where(const struct serve *s)
{
    AUTO(free_ptr) char *name = uri_escape(s->name);
    AUTO(free_ptr) char *socket = absolute(s->nbd_path);
    AUTO(free_ptr) char *control = absolute(s->qmp_path);
    AUTO(free_ptr) char *path = uri_escape(socket);
    AUTO(free_ptr) char *uri = xasprintf("nbd+unix:///%s?socket=%s", name, path);

    if (s->json) {
        cli_print_json(json_pack("{s:s, s:s, s:s, s:s, s:s, s:i, s:b}", "nbd", uri, "socket",
                                 socket, "control", control, "node", TOP_NODE, "format",
                                 s->layers.v[0].format, "pid", (int)s->daemon, "read-only",
                                 s->read_only),
                       false);
    } else {
        printf("disk     %s (%s, %zu layer%s%s)\n", s->disk, s->layers.v[0].format, s->layers.count,
               s->layers.count == 1 ? "" : "s", s->read_only ? ", read-only" : "");
        printf("nbd      %s\n", uri);
        printf("control  %s\n", control);
    }
    (void)fflush(stdout);
}

static int run_daemon(struct serve *s, struct error **err)
{
    int r = start_daemon(s, err);
    int status;

    if (r < 0)
        return r;
    r = wait_until_ready(s, err);
    if (r == 1)
        say_where(s);
    if (r < 0)
        (void)kill(s->daemon, SIGTERM);
    status = wait_for_daemon(s);
    if (r >= 0 && status)
        r = error_set(err, EIO, "the daemon has ended with status %d", status);
    return MIN(r, 0);
}

/* ---- the command ---- */

static int prepare(struct serve *s, struct error **err)
{
    int r = layers_resolve(&s->layers, s->disk, s->format, s->read_only, s->allowed,
                           s->allowed_count, err);

    if (r == 0)
        r = layers_set_keys(&s->layers, s->keys, s->key_count, err);
    if (r < 0)
        return r;
    if (s->layers.v[0].probed && strcmp(s->layers.v[0].format, "raw") == 0 && !s->read_only)
        cli_warn(
            "the format of '%s' was not given and is taken to be raw: whoever writes to the disk can "
            "make it look like another format the next time; --format raw says that it is raw",
            s->disk);
    if (!s->name)
        s->name = name_of(s->disk);
    r = choose_sockets(s, err);
    if (r == 0)
        r = check_not_served(s, err);
    return r == 0 ? make_command_line(s, err) : r;
}

/* The daemon makes it. What it is told everybody on this host can see. */
static int add_object(struct serve *s, const char *text, struct error **err)
{
    struct object_options o = {.id = NULL};
    int r = keyval_in(&object_options_type, text, "qom-type", &o, err);

    if (r == 0 && o.u.secret.data && !o.u.secret.keyid)
        r = error_set(err, EINVAL,
                      "secret '%s': everybody could see its `data` in the list of processes: give "
                      "`file`",
                      o.id);
    schema_free(&object_options_type, &o);
    if (r < 0)
        return error_wrap(err, r, "--object");
    if (s->object_count == SECRETS_MAX)
        return cli_usage(err, "more than %d times --object", SECRETS_MAX);
    s->objects[s->object_count++] = text;
    return 0;
}

static int read_option(struct serve *s, int opt, struct error **err)
{
    switch (opt) {
    case 'a':
        if (s->allowed_count == ALLOW_MAX)
            return cli_usage(err, "more than %d times --allow", ALLOW_MAX);
        s->allowed[s->allowed_count++] = optarg;
        return 0;
    case 'c':
        free(s->qmp_path);
        s->qmp_path = xstrdup(optarg);
        return 0;
    case 'f':
        if (!layers_format_known(optarg))
            return cli_usage(err, "--format %s: it is " FORMATS, optarg);
        s->format = optarg;
        return 0;
    case 'j':
        s->json = true;
        return 0;
    case 'k':
        if (s->key_count == SECRETS_MAX)
            return cli_usage(err, "more than %d times --key-secret", SECRETS_MAX);
        s->keys[s->key_count++] = optarg;
        return 0;
    case 'n':
        free(s->name);
        s->name = xstrdup(optarg);
        return 0;
    case 'o':
        return add_object(s, optarg, err);
    case 'r':
        s->read_only = true;
        return 0;
    case 's':
        free(s->nbd_path);
        s->nbd_path = xstrdup(optarg);
        return 0;
    default:
        return opt;
    }
}

static void release(struct serve *s)
{
    layers_release(&s->layers);
    for (size_t i = 0; i < s->word_count; i++)
        free(s->words[i]);
    free(s->words);
    free(s->name);
    free(s->nbd_path);
    free(s->qmp_path);
}

static int serve_run(int argc, char **argv, struct error **err)
{
    static const struct option options[] = {
        CLI_HELP_OPTION,
        {"allow", required_argument, NULL, 'a'},
        {"control", required_argument, NULL, 'c'},
        {"format", required_argument, NULL, 'f'},
        {"json", no_argument, NULL, 'j'},
        {"key-secret", required_argument, NULL, 'k'},
        {"name", required_argument, NULL, 'n'},
        {"object", required_argument, NULL, 'o'},
        {"read-only", no_argument, NULL, 'r'},
        {"socket", required_argument, NULL, 's'},
        {NULL, 0, NULL, 0},
    };
    struct serve s = {.disk = NULL};
    AUTO(free_ptr) char *disk = NULL;
    int opt;
    int r = 0;

    while (r == 0 && (opt = cli_next_option(argc, argv, options, err)) != -1)
        r = read_option(&s, opt, err);
    if (r == 0)
        r = cli_check_arguments(argc, 1, 1, "DISK", err);
    if (r == 0) {
        disk = absolute(argv[optind]);
        s.disk = disk;
        r = prepare(&s, err);
    }
    if (r == 0) {
        cli_catch_signals();
        r = run_daemon(&s, err);
    }
    release(&s);
    return r;
}

const struct cli_command serve_command = {
    .name = "serve",
    .summary = "serve a disk over NBD, until Ctrl-C",
    .arguments = "DISK [OPTION]...",
    .help =
        "Opens the image DISK with its chain of backing files and serves it over NBD on a Unix socket; a socket of\n"
        "the control protocol lies beside that. Prints where both are, and stays until it is interrupted.\n"
        "\n"
        "The format is probed, as qemu-img does it. What an image refers to is opened if it is a regular file in\n"
        "the image's directory, or in or below a directory that --allow grants.\n"
        "\n"
        "      --socket PATH    the NBD socket; by default DISK's name and .nbd in the user's runtime directory\n"
        "      --control PATH   the control socket; by default as the NBD socket, with .qmp\n"
        "      --name NAME      the export's name; by default DISK's name without its suffix\n"
        "      --read-only      nobody may write\n"
        "      --allow DIR      what images refer to may lie there; may be given several times\n"
        "      --format FORMAT  DISK is " FORMATS "; it is not probed\n"
        "      --object secret,id=ID,file=PATH\n"
        "                       a password, or a key: what the file holds\n"
        "      --key-secret ID  the secret that opens the topmost encrypted image; given again: the next one below\n"
        "      --json           print where it is as JSON\n"
        "  -h, --help           say this and exit\n",
    .run = serve_run,
};
