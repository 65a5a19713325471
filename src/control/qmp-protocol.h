/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The control protocol without its sockets: one client's bytes in, lines of text out. Greeting, negotiation, framing, `id`,
 * error classes and dispatch are here; who reads and writes, and who broadcasts events, is the server.
 *
 *   text = qmp_session_greeting(&s);  send
 *   qmp_session_feed(&s, buf, len, &consumed, &request);   until all is consumed; each request, in order:
 *   text = qmp_request_run(request, &s);  send;  qmp_request_free(request)
 */
#ifndef CAIRN_CONTROL_QMP_PROTOCOL_H
#define CAIRN_CONTROL_QMP_PROTOCOL_H

#include "base/context.h"
#include "base/error.h"
#include "base/schema.h"
#include "control/json-scan.h"

#include <jansson.h>

struct qmp_session;

/* A command with its handler; the generated table has one entry for each. args and ret are of the schema's types. */
struct qmp_command {
    const struct schema_command *schema;
    int (*run)(struct qmp_session *session, const void *args, void *ret, struct error **err);
};

/* What all sessions of a daemon have in common. Constant; outlives the sessions. */
struct qmp_service {
    const struct qmp_command *commands;
    size_t command_count;
    const char *introspection; /* JSON text for query-qmp-schema */
    /* The version of QEMU's interface that we speak, and our own name and version. */
    unsigned major;
    unsigned minor;
    unsigned micro;
    const char *package;
    /* What the commands act on: for their handlers. */
    void *owner;
};

/* Embedded by the server in what it keeps for a connection. Only touched on the control thread. */
struct qmp_session {
    /* Set by qmp_session_init(), then constant. */
    const struct qmp_service *service;
    bool pretty;

    /* Between the first successful qmp_capabilities and the end. Events go only to sessions that have this set. */
    bool negotiated;

    /* The value that is being received. */
    struct json_scan scan;
    char *text;
    size_t text_len;
    size_t text_size;
};

struct qmp_request;

void qmp_session_init(struct qmp_session *s, const struct qmp_service *service, bool pretty);
void qmp_session_release(struct qmp_session *s);

/* All texts end in CR LF and are the caller's to free(); NULL when memory runs out. */
char *qmp_session_greeting(const struct qmp_session *s);

/*
 * An event as made by a generated event_...() function, which this takes, with the time when it happened. It is the text to
 * send to a session with this layout. NULL if event is NULL.
 */
char *qmp_event_text(json_t *event, bool pretty, int64_t seconds, int64_t microseconds);

/*
 * Takes bytes up to the end of one request at most. Returns 1 and a request, owned by the caller; 0 if more bytes are needed;
 * -ENOMEM. Input that is no request gives a request too, whose answer is the error, so that answers keep the order of
 * arrival. Deep nesting needs stack (json_text_load()): call it on the thread's own stack, never in a coroutine.
 */
int qmp_session_feed(struct qmp_session *s, const char *buf, size_t len, size_t *ret_consumed,
                     struct qmp_request **ret_request);

/* Runs the command, and makes the answer. Needs little stack. NULL when memory runs out: close the connection then. */
co_fn control_fn char *qmp_request_run(const struct qmp_request *request, struct qmp_session *s);

/* NULL if what came is not a request for a command that exists. */
const char *qmp_request_command(const struct qmp_request *request);

struct qmp_request *qmp_request_free(struct qmp_request *request);

/* Ends the negotiation: what the handler of qmp_capabilities calls. */
void qmp_session_negotiate(struct qmp_session *s);

#endif
