/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a daemon serves: a graph, exports of it, and the sockets over which both are controlled. The handlers of the commands,
 * a file for each group of them, reach it through their session. Control thread only.
 */
#ifndef CAIRN_CONTROL_CONTROL_H
#define CAIRN_CONTROL_CONTROL_H

#include "base/context.h"
#include "base/error.h"
#include "base/list.h"
#include "control/qmp-protocol.h"
#include "exports/export.h"
#include "graph/graph.h"
#include "loop/socket.h"

#include <jansson.h>
#include <stdbool.h>

struct driver;
struct job_event;
struct jobs;
struct loop;

/* A client asks for the end. Called once or more; it must not wait: the answer is still to be sent. */
typedef void control_quit_fn(void *arg);

struct control {
    struct graph *graph;
    struct exports *exports;
    struct jobs *jobs;

    /* For src/control alone. */
    struct qmp_service service;
    control_quit_fn *quit;
    void *quit_arg;
    struct list servers;       /* struct qmp_server */
    unsigned running;          /* commands */
    bool stopping;             /* no further command is begun */
    struct co_wait *idle_wait; /* until running is 0 */
};

/* `drivers` as for graph_new(), the loops as for exports_new() and jobs_new(). */
struct control *control_new(const struct driver *const *const *drivers,
                            struct loop *const *io_loops, unsigned io_loop_count,
                            struct loop *const *copy_loops, unsigned copy_loop_count,
                            control_quit_fn *quit, void *arg);

/*
 * The orderly end: commands that run end or, after the time that a change of the graph may take, are cancelled; exports are removed
 * and their clients disconnected; jobs are cancelled by force; all nodes are closed; what was sent to clients of the control sockets goes out, for a
 * second at most, and the sockets are closed. Returns NULL.
 */
struct control *co_fn control_fn control_co_free(struct control *c);

/* Sends an event, as made by a generated event_...() function, to all sessions that take events. Takes the event. */
void control_event(struct control *c, json_t *event);

/* Tells clients; `arg` is the control. */
void control_job_event(const struct job_event *e, void *arg);

static inline struct control *control_of(const struct qmp_session *session)
{
    return session->service->owner;
}

#endif
