/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The process that serves: it opens the disk, listens, tells the one who waits, accepts clients, and ends when a signal asks for it
 * or the last client has gone. Nobody is accepted before there is something to find, and the end is bounded as the daemon's (P4).
 */
#include "base/alloc.h"
#include "base/json-in.h"
#include "base/log.h"
#include "base/macros.h"
#include "cli/nbd/nbd.h"
#include "daemon/process.h"
#include "exports/export.h"
#include "graph/change.h"
#include "loop/co.h"
#include "loop/scope.h"
#include "schema-types.h"

#include <assert.h>
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* The end is given up after this many times the deadline of a change. */
#define STOP_PATIENCE 6

struct serving {
    const struct nbd_tool *tool;
    struct graph *graph;
    struct loop *loop;
    struct exports *exports;
    struct nbd_disk disk;

    struct co_scope setting_up;
    bool ending;
    struct co_wait *end_wait; /* of the main coroutine */
    struct loop_message signal_message;
    struct error *error; /* of the set-up */
};

/* ---- the end is asked for ---- */

static void ask_for_end(struct serving *s)
{
    if (s->ending)
        return;
    s->ending = true;
    co_scope_cancel(&s->setting_up);
    if (s->end_wait)
        co_wait_end(s->end_wait, 0);
}

static void signal_arrived(struct loop_message *m)
{
    ask_for_end(container_of(m, struct serving, signal_message));
}

/* On the thread that waits for signals; once. */
static void signal_came(int signal, void *arg)
{
    struct serving *s = arg;

    (void)signal; /* all mean the same */
    loop_post(s->loop, &s->signal_message);
}

static void last_client_left(void *arg)
{
    struct serving *s = arg;

    if (!s->tool->persistent)
        ask_for_end(s);
}

static void co_fn wait_for_end(struct serving *s)
{
    struct co_wait w;

    if (s->ending)
        return;
    co_wait_init(&w, NULL);
    s->end_wait = &w;
    (void)co_wait(&w, LOOP_FOREVER);
    s->end_wait = NULL;
}

/* ---- set-up ---- */

static void nobody_asks(const char *id, void *arg)
{
    (void)id; /* there is one export, and it goes with the process */
    (void)arg;
}

static int co_fn start_exports(struct serving *s, struct error **err)
{
    struct loop *loops[LOOP_MAX];
    unsigned count = process_usual_io_threads();
    int r = 0;

    if (s->tool->shared)
        count = MIN(count, s->tool->shared); /* a connection stays on one loop */
    for (unsigned i = 0; r == 0 && i < count; i++) {
        char name[16];

        (void)snprintf(name, sizeof(name), "io%u", i);
        r = tool_co_new_loop(&loops[i], name, err);
    }
    if (r == 0)
        s->exports = exports_new(s->graph, loops, count, nobody_asks, NULL);
    return r;
}

static int co_fn control_fn listen_for_clients(struct serving *s, struct error **err)
{
    const struct nbd_tool *t = s->tool;
    struct socket_address address = {
        .family = t->inherited_fd >= 0 ? SOCKET_INHERITED
                  : t->path            ? SOCKET_UNIX
                                       : SOCKET_INET,
        .path = t->path,
        .host = t->bind,
        .port = t->port,
        .fd = t->inherited_fd,
    };
    int r = exports_co_nbd_listen(s->exports, &address, t->shared, err);

    if (r == 0)
        exports_nbd_on_idle(s->exports, last_client_left, s);
    return r;
}

static int co_fn control_fn add_export(struct serving *s, struct error **err)
{
    const struct nbd_tool *t = s->tool;
    struct export_options options;
    json_t *bitmaps = json_array();
    json_t *definition;
    int r;

    for (size_t i = t->bitmap_count; i-- > 0;) /* the peer's clients see the last one first */
        json_array_append_new(bitmaps, json_string(t->bitmaps[i]));
    definition = json_pack("{s:s, s:s, s:s, s:b, s:b, s:s, s:s*, s:o, s:b}", "type", "nbd", "id",
                           "nbd", "node-name", s->disk.top, "writable", !t->read_only,
                           "writethrough", t->cache.writethrough, "name", t->name, "description",
                           t->description, "bitmaps", bitmaps, "allocation-depth", t->depth);
    if (!definition)
        return error_set(err, EINVAL, "a name is not UTF-8, and those of NBD are");
    r = json_in(&export_options_type, definition, JSON_IN_STRICT, "", &options, err);
    json_decref(definition);
    if (r < 0)
        return r;
    r = exports_co_add(s->exports, &options, err);
    schema_free(&export_options_type, &options);
    return r;
}

/* For --verbose. */
static void say_what(const struct export_picture *e, void *arg)
{
    const struct serving *s = arg;

    log_info("'%s' (%s, %" PRIu64 " bytes%s) is served at %s", s->tool->spec.name,
             image_format(&s->disk.image), backend_size(e->backend),
             e->writable ? "" : ", read-only", e->address);
}

static int co_fn control_fn set_up_steps(struct serving *s, struct error **err)
{
    const struct nbd_tool *t = s->tool;
    int r = nbd_disk_co_open(&s->disk, s->graph, t, err);

    if (r == 0)
        r = start_exports(s, err);
    if (r == 0)
        r = listen_for_clients(s, err);
    if (r == 0)
        r = add_export(s, err);
    if (r == 0 && t->pid_file) {
        r = process_write_pidfile(t->pid_file, err);
        if (r < 0)
            r = error_wrap(err, r, "--pid-file %s", t->pid_file);
    }
    return r;
}

/* An end that was asked for meanwhile is no error. */
static void co_fn control_fn set_up(void *arg)
{
    struct serving *s = arg;
    int r = set_up_steps(s, &s->error);

    if (r < 0 && s->ending)
        error_free(&s->error);
    if (r < 0)
        return;
    exports_for_each(s->exports, say_what, s);
    process_detach();
    exports_nbd_accept(s->exports);
}

/* ---- the end ---- */

static void co_fn watch_end(void *arg)
{
    struct serving *s = arg;

    for (unsigned i = 0; i < STOP_PATIENCE; i++) {
        do {
            if (co_sleep_until(loop_clock() + graph_change_deadline(s->graph)) < 0)
                return;
        } while (graph_closing_gets_on(s->graph));
        log_warning("still stopping, %u of %u times the deadline", i + 1, STOP_PATIENCE);
    }
    log_warning("gave up stopping in order: what was not flushed may be lost");
    process_remove_pidfile();
    _exit(CLI_FAILED);
}

static void co_fn control_fn take_down(struct serving *s)
{
    struct co_scope watch;

    co_scope_init(&watch);
    (void)co_scope_start(&watch, watch_end, s); /* without it, it is only less told */
    if (s->exports)
        s->exports = exports_co_free(s->exports);
    nbd_disk_co_close(&s->disk);
    co_scope_cancel(&watch);
    co_scope_join(&watch);
}

static int co_fn control_fn serve(struct graph *g, void *arg, struct error **err)
{
    struct serving *s = arg;
    int r;

    s->graph = g;
    s->loop = loop_self();
    s->signal_message.fn = signal_arrived;
    co_scope_init(&s->setting_up);
    r = process_watch_signals(signal_came, s, err);
    if (r < 0)
        return r;
    r = co_scope_start(&s->setting_up, set_up, s);
    if (r == 0)
        co_scope_join(&s->setting_up);
    else if (!s->ending)
        error_set(&s->error, -r, "not enough memory");
    if (!s->error)
        wait_for_end(s);
    take_down(s);
    process_unwatch_signals();
    process_remove_pidfile();
    if (!s->error)
        return 0;
    r = -error_errno(s->error);
    error_move(err, &s->error);
    return r;
}

int nbd_serve(const struct nbd_tool *t, struct error **err)
{
    struct serving s = {.tool = t};
    int r;

    process_block_signals();
    process_raise_limits();
    if (t->verbose)
        process_log_to_stderr(cli_program);
    r = t->fork ? process_daemonize(err) : 0;
    if (r < 0)
        return error_wrap(err, r, "--fork");
    return tool_run_on(t->engine, serve, &s, err);
}
