/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cairnd: the daemon. The main thread is the control thread; I/O threads serve clients; jobs work on copy threads.
 *
 * It sets up what the command line says, from left to right, waits until a signal or a client asks for the end, and takes all
 * down in order: exports, jobs, nodes, control sockets (control_co_free()). An end that is asked for during set-up cancels that.
 * How long the end may take is bounded: who holds it up is named, and at last the process ends without it (P4).
 */
#include "base/alloc.h"
#include "base/list.h"
#include "base/log.h"
#include "base/macros.h"
#include "config.h"
#include "control/address.h"
#include "control/control.h"
#include "control/qmp-server.h"
#include "crypto/secret.h"
#include "daemon/options.h"
#include "daemon/process.h"
#include "exports/export.h"
#include "filters/list.h"
#include "formats/list.h"
#include "graph/backend.h"
#include "graph/change.h"
#include "graph/grants.h"
#include "jobs/job.h"
#include "loop/co.h"
#include "loop/loop.h"
#include "loop/scope.h"
#include "protocols/list.h"
#include "schema-types.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* The end is given up after this many times the deadline of a change; each time, who holds it up is logged. */
#define STOP_PATIENCE 6

/* A listening socket with a name, for --monitor. */
struct channel {
    struct list link; /* in daemon->channels */
    const char *id;   /* the option's */
    struct qmp_server *server;
    const struct monitor_options *monitor; /* NULL: none yet */
};

struct daemon {
    const struct options *options;
    struct loop *loop;
    struct loop_thread **threads; /* I/O threads, then copy threads */
    unsigned thread_count;
    struct control *control;
    struct list channels;

    struct co_scope setting_up;
    struct co_scope stopping; /* the coroutine that watches it */
    bool stop_asked;
    struct co_wait *stop_wait; /* of the main coroutine */
    struct loop_message signal_message;

    /* What came out of it. */
    struct error *error;
    int status;
};

/* The end is asked for. */

static void daemon_stop(void *arg)
{
    struct daemon *d = arg;

    if (d->stop_asked)
        return;
    d->stop_asked = true;
    co_scope_cancel(&d->setting_up);
    if (d->stop_wait)
        co_wait_end(d->stop_wait, 0);
}

static void signal_arrived(struct loop_message *m)
{
    daemon_stop(container_of(m, struct daemon, signal_message));
}

/* On the thread that waits for signals; once. */
static void signal_came(int signal, void *arg)
{
    struct daemon *d = arg;

    (void)signal; /* all mean the same */
    loop_post(d->loop, &d->signal_message);
}

static void co_fn wait_for_stop(struct daemon *d)
{
    struct co_wait w;

    if (d->stop_asked)
        return;
    co_wait_init(&w, NULL);
    d->stop_wait = &w;
    (void)co_wait(&w, LOOP_FOREVER);
    d->stop_wait = NULL;
}

/* Set-up. */

static struct channel *find_channel(struct daemon *d, const char *id)
{
    struct channel *ch;

    list_for_each (&d->channels, ch, link) {
        if (strcmp(ch->id, id) == 0)
            return ch;
    }
    return NULL;
}

static int check_chardev(struct daemon *d, const struct chardev_options *o, struct error **err)
{
    if (find_channel(d, o->id))
        return error_set(err, EEXIST, "there is a chardev '%s' already", o->id);
    if (!o->server)
        return error_set(err, ENOTSUP,
                         "server must be on: channels that connect are not supported");
    if (o->wait)
        return error_set(err, ENOTSUP, "wait must be off: nobody waits for the first client");
    if (!o->path == !o->host)
        return error_set(err, EINVAL, "give one of 'path' and 'host'");
    if (!o->host != !o->port)
        return error_set(err, EINVAL, "'host' and 'port' go together");
    return 0;
}

static int co_fn control_fn do_chardev(struct daemon *d, const struct chardev_options *o,
                                       struct error **err)
{
    const struct socket_address address = {
        .family = o->path ? SOCKET_UNIX : SOCKET_INET,
        .path = o->path,
        .host = o->host,
        .port = o->port,
    };
    struct qmp_server *server = NULL;
    struct channel *ch;
    int r = check_chardev(d, o, err);

    if (r == 0)
        r = qmp_server_co_new(&server, d->control, &address, err);
    if (r < 0)
        return r;
    ch = xnew(struct channel);
    ch->id = o->id;
    ch->server = server;
    list_append(&d->channels, &ch->link);
    return 0;
}

static int do_monitor(struct daemon *d, const struct monitor_options *o, struct error **err)
{
    struct channel *ch = find_channel(d, o->chardev);
    const struct channel *other;

    if (!ch)
        return error_set(err, ENOENT, "there is no chardev '%s'", o->chardev);
    if (ch->monitor)
        return error_set(err, EBUSY, "chardev '%s' has a monitor already", o->chardev);
    list_for_each (&d->channels, other, link) {
        if (o->id && other->monitor && other->monitor->id && strcmp(other->monitor->id, o->id) == 0)
            return error_set(err, EEXIST, "there is a monitor '%s' already", o->id);
    }
    ch->monitor = o;
    return 0;
}

static int co_fn control_fn do_nbd_server(struct daemon *d, const struct nbd_server_options *o,
                                          struct error **err)
{
    struct socket_address address = address_of(&o->addr);

    return exports_co_nbd_start(d->control->exports, &address, (unsigned)o->max_connections, err);
}

static int co_fn control_fn do_object(struct daemon *d, const struct object_options *o,
                                      struct error **err)
{
    return secrets_co_add(graph_secrets(d->control->graph), o->id, &o->u.secret, err);
}

static int co_fn control_fn do_step(struct daemon *d, const struct step *s, struct error **err)
{
    switch (s->kind) {
    case STEP_BLOCKDEV:
        return graph_co_add(d->control->graph, s->value, err);
    case STEP_EXPORT:
        return exports_co_add(d->control->exports, s->value, err);
    case STEP_NBD_SERVER:
        return do_nbd_server(d, s->value, err);
    case STEP_CHARDEV:
        return do_chardev(d, s->value, err);
    case STEP_MONITOR:
        return do_monitor(d, s->value, err);
    case STEP_OBJECT:
        return do_object(d, s->value, err);
    }
    return 0;
}

static int control_fn start_monitors(struct daemon *d, struct error **err)
{
    struct channel *ch;
    int r = 0;

    list_for_each (&d->channels, ch, link) {
        if (!ch->monitor)
            log_warning("no --monitor speaks on chardev '%s', ignoring", ch->id);
        else if (r == 0)
            r = qmp_server_start(ch->server, ch->monitor->pretty, err);
    }
    return r;
}

/* Q6 */
static int co_fn control_fn grant_allowed(struct daemon *d, struct error **err)
{
    for (size_t i = 0; i < d->options->allowed_count; i++) {
        int r = graph_co_grant(d->control->graph, d->options->allowed[i], err);

        if (r < 0)
            return error_wrap(err, r, "--allow");
    }
    return 0;
}

static int co_fn control_fn set_up_steps(struct daemon *d, struct error **err)
{
    int r = grant_allowed(d, err);

    if (r < 0)
        return r;
    for (size_t i = 0; i < d->options->step_count; i++) {
        const struct step *s = &d->options->steps[i];

        r = do_step(d, s, err);

        if (r < 0)
            return step_wrap_error(s, err, r);
    }
    if (d->options->pidfile) {
        r = process_write_pidfile(d->options->pidfile, err);
        if (r < 0)
            return error_wrap(err, r, "--pidfile %s", d->options->pidfile);
    }
    return start_monitors(d, err);
}

/* An end that was asked for meanwhile is no error. */
static void co_fn control_fn set_up(void *arg)
{
    struct daemon *d = arg;
    int r = set_up_steps(d, &d->error);

    if (r < 0 && d->stop_asked)
        error_free(&d->error);
    else if (r < 0)
        d->status = 1;
    else
        process_detach();
}

static int co_fn start_kind_of_thread(struct daemon *d, const char *kind, unsigned count,
                                      struct error **err)
{
    for (unsigned i = 0; i < count; i++) {
        char name[16];
        int r;

        (void)snprintf(name, sizeof(name), "%s%u", kind, i);
        r = loop_thread_start(&d->threads[d->thread_count], name, err);
        if (r < 0)
            return r;
        d->thread_count++;
    }
    return 0;
}

static int co_fn start_threads(struct daemon *d, struct error **err)
{
    const struct options *o = d->options;
    int r;

    d->threads = xnew_n(struct loop_thread *, o->io_threads + o->copy_threads);
    r = start_kind_of_thread(d, "io", o->io_threads, err);
    return r < 0 ? r : start_kind_of_thread(d, "copy", o->copy_threads, err);
}

static void co_fn stop_threads(struct daemon *d)
{
    while (d->thread_count > 0)
        loop_thread_stop(d->threads[--d->thread_count]);
    free(d->threads);
}

static void control_start(struct daemon *d)
{
    static const struct driver *const *const drivers[] = {
        protocol_drivers,
        format_drivers,
        filter_drivers,
        NULL,
    };
    unsigned io_threads = d->options->io_threads;
    struct loop **loops = xnew_n(struct loop *, d->thread_count);

    for (unsigned i = 0; i < d->thread_count; i++)
        loops[i] = loop_thread_loop(d->threads[i]);
    d->control = control_new(drivers, loops, io_threads, loops + io_threads,
                             d->thread_count - io_threads, daemon_stop, d);
    graph_set_change_deadline(d->control->graph, d->options->change_deadline_ns);
    free(loops);
}

/* The end. */

static void name_holder(const struct backend *b, void *arg)
{
    struct gate_picture picture;
    uint64_t now = loop_clock();

    (void)arg;
    backend_gate_picture(b, &picture);
    log_warning(
        "still stopping: %s holds node '%s', with %u requests in flight, the oldest for %" PRIu64
        " ms",
        backend_owner(b), node_name(backend_node(b)), picture.inside,
        picture.oldest_ns && picture.oldest_ns < now ? (now - picture.oldest_ns) / NS_PER_MS : 0);
}

static void name_job(const struct job *job, void *arg)
{
    struct job_picture p;

    (void)arg;
    job_picture(job, &p);
    log_warning("still stopping: job '%s' is %s", p.id, job_status_name(p.status));
}

static void co_fn watch_stop(void *arg)
{
    struct daemon *d = arg;

    for (unsigned i = 0; i < STOP_PATIENCE; i++) {
        do {
            if (co_sleep_until(loop_clock() + d->options->change_deadline_ns) < 0)
                return;
        } while (d->control->graph && graph_closing_gets_on(d->control->graph));
        log_warning("still stopping, %u of %u times the deadline", i + 1, STOP_PATIENCE);
        if (d->control->graph)
            graph_for_each_backend(d->control->graph, name_holder, NULL);
        if (d->control->jobs)
            jobs_for_each(d->control->jobs, name_job, NULL);
    }
    log_warning("gave up stopping in order: what was not flushed may be lost");
    process_remove_pidfile();
    _exit(1);
}

static void co_fn control_fn stop(struct daemon *d)
{
    struct channel *ch;
    struct channel *next;

    co_scope_init(&d->stopping);
    (void)co_scope_start(&d->stopping, watch_stop, d); /* without it, it is only less told */
    d->control = control_co_free(d->control);
    co_scope_cancel(&d->stopping);
    co_scope_join(&d->stopping);
    list_for_each_safe (&d->channels, ch, next, link)
        free(ch);
    list_init(&d->channels);
}

static void co_fn control_fn daemon_main(void *arg)
{
    struct daemon *d = arg;
    int r;

    d->loop = loop_self();
    d->signal_message.fn = signal_arrived;
    co_scope_init(&d->setting_up);
    r = process_watch_signals(signal_came, d, &d->error);
    if (r < 0) {
        d->status = 1;
        return;
    }
    r = start_threads(d, &d->error);
    if (r == 0) {
        control_start(d);
        r = co_scope_start(&d->setting_up, set_up, d);
        if (r == 0)
            co_scope_join(&d->setting_up);
        else if (!d->stop_asked)
            error_set(&d->error, -r, "not enough memory");
        if (!d->error)
            wait_for_stop(d);
        stop(d);
    }
    if (d->error)
        d->status = 1;
    stop_threads(d);
    process_unwatch_signals();
    process_remove_pidfile();
}

static int say_error(const char *program, struct error **err)
{
    (void)fprintf(stderr, "%s: %s\n", program, error_text(*err));
    error_free(err);
    return 1;
}

static int run(const char *program, const struct options *o)
{
    struct daemon d = {.options = o};
    struct error *err = NULL;

    list_init(&d.channels);
    process_block_signals();
    process_raise_limits();
    if (o->daemonize && process_daemonize(&err) < 0) {
        (void)error_wrap(&err, -1, "--daemonize");
        return say_error(program, &err);
    }
    if (loop_run_main(o->engine, "control", daemon_main, &d, &err) < 0)
        return say_error(program, &err);
    if (d.error)
        return say_error(program, &d.error);
    return d.status;
}

static int say(const char *program, const struct options *o)
{
    AUTO(free_ptr)
    char *text =
        o->help ? options_help(program) : xasprintf("%s version " CAIRN_VERSION "\n", program);

    if (fputs(text, stdout) < 0 || fflush(stdout) < 0)
        return 1;
    return 0;
}

int main(int argc, char **argv)
{
    const char *slash = argc > 0 ? strrchr(argv[0], '/') : NULL;
    const char *program = slash ? slash + 1 : argc > 0 ? argv[0] : "cairnd";
    struct error *err = NULL;
    struct options o;
    int status;

    process_hold_standard_streams();
    process_log_to_stderr(program);
    if (options_parse(&o, argc, argv, &err) < 0)
        return say_error(program, &err);
    status = o.help || o.version ? say(program, &o) : run(program, &o);
    options_release(&o);
    return status;
}
