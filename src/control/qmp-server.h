/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Serves the control protocol on a listening socket: several clients at a time, each with a session of its own. Commands of a
 * session run one after another, in order; sessions run beside each other. Control thread only.
 */
#ifndef CAIRN_CONTROL_QMP_SERVER_H
#define CAIRN_CONTROL_QMP_SERVER_H

#include "base/context.h"
#include "base/error.h"
#include "base/list.h"
#include "loop/scope.h"
#include "loop/socket.h"

#include <stdbool.h>

/* More clients at a time wait to be accepted. */
#define QMP_CLIENTS_MAX 64
/* A client that has more than this of unsent events is disconnected: it does not read them. */
#define QMP_UNSENT_EVENTS_MAX ((size_t)16 << 20)

struct control;

struct qmp_server {
    /* Constant. */
    struct control *control;
    struct socket *listener;
    struct list link; /* in control->servers */

    bool pretty;
    bool speaks;               /* qmp_server_start() was called */
    struct co_scope accepting; /* the coroutine that accepts */
    struct co_scope serving;   /* those of the clients */
    struct list clients;       /* struct qmp_client */
    unsigned client_count;
    struct co_wait *room_wait;  /* until there are fewer than QMP_CLIENTS_MAX */
    struct co_wait *quiet_wait; /* until a client has nothing unsent */
};

/* Listens; clients that connect are not accepted before qmp_server_start(). It belongs to `control`. */
int co_fn control_fn qmp_server_co_new(struct qmp_server **ret, struct control *control,
                                       const struct socket_address *address, struct error **err);
/* Begins to serve, once. `pretty`: what is sent is indented. -ENOMEM. */
int control_fn qmp_server_start(struct qmp_server *s, bool pretty, struct error **err);

/* The text of an event, or NULL if there was no memory for it, to all sessions that take events. */
void qmp_server_event(struct qmp_server *s, const char *text);

/* Accepts no more clients. */
void co_fn control_fn qmp_server_co_close(struct qmp_server *s);
/* Makes all that its clients wait for return -ECANCELED, which ends them. */
void control_fn qmp_server_cancel(struct qmp_server *s);
/* Sends what is to be sent, for a second at most; disconnects the clients. No command runs. Returns NULL. */
struct qmp_server *co_fn control_fn qmp_server_co_free(struct qmp_server *s);

#endif
