/* SPDX-License-Identifier: Apache-2.0 */
/* Beginning and end of what a daemon serves, and what is broadcast from it. */
#include "control/control.h"
#include "base/alloc.h"
#include "base/macros.h"
#include "config.h"
#include "control/qmp-server.h"
#include "graph/change.h"
#include "graph/damage.h"
#include "jobs/job.h"
#include "loop/co.h"
#include "loop/loop.h"
#include "schema-dispatch.h"

#include <stdlib.h>

/* The version of QEMU's interface that is spoken, and that its clients look at. */
#define INTERFACE_MAJOR 9
#define INTERFACE_MINOR 0
#define INTERFACE_MICRO 0

static void export_deleted(const char *id, void *arg)
{
    AUTO(free_ptr) char *copy = xstrdup(id);
    const struct block_export_deleted_event data = {.id = copy};

    control_event(arg, event_block_export_deleted(&data));
}

/* CORRUPT-3 and the like: a driver has found damage. */
static void image_damaged(const char *node, const struct node_damage *d, void *arg)
{
    AUTO(free_ptr) char *name = xstrdup(node);
    AUTO(free_ptr) char *what = xstrdup(d->what);
    char none[] = "";
    const struct block_image_corrupted_event data = {
        .device = none,
        .node_name = name,
        .msg = what,
        .has_offset = d->has_place,
        .offset = (int64_t)d->offset,
        .has_size = d->has_place,
        .size = (int64_t)d->size,
        .fatal = d->fatal,
    };

    control_event(arg, event_block_image_corrupted(&data));
}

struct control *control_new(const struct driver *const *const *drivers,
                            struct loop *const *io_loops, unsigned io_loop_count,
                            struct loop *const *copy_loops, unsigned copy_loop_count,
                            control_quit_fn *quit, void *arg)
{
    struct control *c = xnew(struct control);

    c->service = (struct qmp_service){
        .commands = schema_dispatch,
        .command_count = schema_dispatch_count,
        .introspection = schema_introspection,
        .major = INTERFACE_MAJOR,
        .minor = INTERFACE_MINOR,
        .micro = INTERFACE_MICRO,
        .package = "Cairn " CAIRN_VERSION,
        .owner = c,
    };
    c->quit = quit;
    c->quit_arg = arg;
    list_init(&c->servers);
    c->graph = graph_new(drivers);
    graph_on_damage(c->graph, image_damaged, c);
    c->exports = exports_new(c->graph, io_loops, io_loop_count, export_deleted, c);
    c->jobs = jobs_new(copy_loops, copy_loop_count, control_job_event, c);
    return c;
}

static bool idle_wait_cancel(struct co_wait *w)
{
    (void)w; /* only idle_wait points to it, and its waiter clears that */
    return true;
}

/* True if no command runs any more. */
static bool co_fn wait_for_commands(struct control *c, uint64_t deadline_ns)
{
    struct co_wait w;

    if (c->running > 0) {
        co_wait_init(&w, idle_wait_cancel);
        c->idle_wait = &w;
        (void)co_wait(&w, deadline_ns); /* what counts is looked at below */
        c->idle_wait = NULL;
    }
    return c->running == 0;
}

/* Nothing holds a change of the graph any more when this returns: exports and nodes can go. */
static void co_fn control_fn end_commands(struct control *c)
{
    struct qmp_server *server;

    c->stopping = true;
    list_for_each (&c->servers, server, link)
        qmp_server_co_close(server);
    if (wait_for_commands(c, loop_clock() + graph_change_deadline(c->graph)))
        return;
    list_for_each (&c->servers, server, link)
        qmp_server_cancel(server);
    (void)wait_for_commands(c, LOOP_FOREVER); /* cancelled: they end */
}

struct control *control_co_free(struct control *c)
{
    struct qmp_server *server;

    if (!c)
        return NULL;
    end_commands(c);
    c->exports = exports_co_free(c->exports);
    jobs_co_cancel_all(c->jobs);
    c->jobs = jobs_free(c->jobs);
    c->graph = graph_co_free(c->graph);
    while ((server = list_first(&c->servers, struct qmp_server, link)))
        qmp_server_co_free(server);
    free(c);
    return NULL;
}

void control_event(struct control *c, json_t *event)
{
    uint64_t now = loop_wall_clock();
    int64_t seconds = (int64_t)(now / NS_PER_S);
    int64_t microseconds = (int64_t)(now % NS_PER_S / NS_PER_US);
    struct qmp_server *server;

    for (int pretty = 0; pretty < 2; pretty++) {
        AUTO(free_ptr)
        char *text = qmp_event_text(json_incref(event), pretty, seconds, microseconds);

        list_for_each (&c->servers, server, link) {
            if (server->pretty == pretty)
                qmp_server_event(server, text);
        }
    }
    json_decref(event);
}

int qmp_quit(struct qmp_session *session, struct error **err)
{
    struct control *c = control_of(session);

    (void)err; /* cannot fail */
    c->quit(c->quit_arg);
    return 0;
}
