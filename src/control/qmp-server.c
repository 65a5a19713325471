/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The control protocol's sockets.
 *
 * A client has two coroutines: one receives and runs commands, one sends. What is sent is a queue of lines.
 *
 * SERVER-1 The next command is not begun, and nothing more received, before the answer to the last one is sent: so a client holds
 *          one answer and one buffer of input at most, however fast it asks and however slowly it reads.
 * SERVER-2 Events never wait for a reader. What a client does not read is bounded; past the bound it is disconnected.
 * SERVER-3 A client's end (`dead`) is noticed by whoever sends or receives first. A command that runs then ends in peace.
 */
#include "control/qmp-server.h"
#include "base/alloc.h"
#include "base/log.h"
#include "base/macros.h"
#include "control/control.h"
#include "control/qmp-protocol.h"
#include "loop/co.h"
#include "loop/loop.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define INPUT_BYTES ((size_t)16 << 10)
/* Lines per system call. */
#define SEND_LINES 16
/* After a failure to accept. */
#define ACCEPT_RETRY_NS (100 * NS_PER_MS)
/* How long the last lines may take to be sent. */
#define LAST_LINES_NS NS_PER_S

struct out_line {
    struct list link;
    char *text;
    size_t len;
    bool event;
};

struct qmp_client {
    struct qmp_server *server;
    struct list link; /* in server->clients */
    struct socket *socket;
    struct qmp_session session;

    struct list out;           /* struct out_line */
    size_t unsent_events;      /* bytes */
    bool dead;                 /* nothing is sent any more */
    bool ending;               /* nothing will be queued any more */
    struct co_wait *line_wait; /* the sender's, for a line */
    struct co_wait *sent_wait; /* the receiver's, until all is sent */

    char input[INPUT_BYTES];
};

/* Waiting at a pointer that others find: whoever ends the wait, or takes it back, leaves NULL there. */
struct spot_wait {
    struct co_wait wait;
    struct co_wait **spot;
};

static bool spot_cancel(struct co_wait *w)
{
    *container_of(w, struct spot_wait, wait)->spot = NULL;
    return true;
}

static int co_fn spot_co_wait(struct co_wait **spot, uint64_t deadline_ns)
{
    struct spot_wait w = {.spot = spot};

    assert(!*spot);
    co_wait_init(&w.wait, spot_cancel);
    *spot = &w.wait;
    return co_wait(&w.wait, deadline_ns);
}

static void spot_wake(struct co_wait **spot)
{
    struct co_wait *w = *spot;

    if (w) {
        *spot = NULL;
        co_wait_end(w, 0);
    }
}

/* Sending. */

static void client_kill(struct qmp_client *c)
{
    if (c->dead)
        return;
    c->dead = true;
    socket_shutdown(c->socket); /* ends what waits there */
    spot_wake(&c->line_wait);
}

/* Takes the text; NULL is what remains of a text that there was no memory for. */
static void client_queue(struct qmp_client *c, char *text, bool event)
{
    struct out_line *line = text && !c->dead ? try_new(struct out_line) : NULL;

    if (!line) {
        if (!c->dead)
            log_warning("control client on %s: no memory for an answer, disconnecting it",
                        socket_name(c->server->listener));
        free(text);
        client_kill(c);
        return;
    }
    line->text = text;
    line->len = strlen(text);
    line->event = event;
    list_append(&c->out, &line->link);
    if (event)
        c->unsent_events += line->len;
    spot_wake(&c->line_wait);
}

static void drop_line(struct qmp_client *c, struct out_line *line)
{
    list_remove(&line->link);
    if (line->event)
        c->unsent_events -= line->len;
    free(line->text);
    free(line);
}

static int co_fn send_some(struct qmp_client *c)
{
    struct iovec iov[SEND_LINES];
    struct out_line *line;
    struct out_line *next;
    int count = 0;
    int r;

    list_for_each (&c->out, line, link) {
        if (count == SEND_LINES)
            break;
        iov[count++] = (struct iovec){line->text, line->len};
    }
    /* Yields: lines are added behind these meanwhile. */
    r = socket_co_send(c->socket, iov, count, LOOP_FOREVER);
    list_for_each_safe (&c->out, line, next, link) {
        if (count-- == 0)
            break;
        drop_line(c, line);
    }
    return r;
}

static void co_fn client_send(void *arg)
{
    struct qmp_client *c = arg;
    int r = 0;

    while (r >= 0 && !c->dead) {
        if (!list_empty(&c->out)) {
            r = send_some(c);
        } else {
            spot_wake(&c->sent_wait);
            spot_wake(&c->server->quiet_wait);
            if (c->ending)
                return;
            r = spot_co_wait(&c->line_wait, LOOP_FOREVER);
        }
    }
    client_kill(c);
    spot_wake(&c->sent_wait);
    spot_wake(&c->server->quiet_wait);
}

void qmp_server_event(struct qmp_server *s, const char *text)
{
    struct qmp_client *c;

    list_for_each (&s->clients, c, link) {
        if (!c->session.negotiated || c->dead || c->ending)
            continue;
        if (c->unsent_events > QMP_UNSENT_EVENTS_MAX) { /* SERVER-2 */
            log_warning("control client on %s: it does not read its events, disconnecting it",
                        socket_name(s->listener));
            client_kill(c);
            continue;
        }
        client_queue(c, text ? strdup(text) : NULL, true);
    }
}

/* Receiving. */

struct feed_call {
    struct loop_message message;
    struct co_wait wait;
    struct qmp_session *session;
    const char *buf;
    size_t len;
    size_t consumed;
    struct qmp_request *request;
    int result;
};

static void feed_now(struct loop_message *m)
{
    struct feed_call *call = container_of(m, struct feed_call, message);

    call->result =
        qmp_session_feed(call->session, call->buf, call->len, &call->consumed, &call->request);
    co_wait_end(&call->wait, 0);
}

/* Parsing needs more stack than a coroutine has: messages are delivered on the thread's own. */
static int co_fn feed_on_thread(struct qmp_session *session, const char *buf, size_t len,
                                size_t *ret_consumed, struct qmp_request **ret_request)
{
    struct feed_call call = {
        .message.fn = feed_now,
        .session = session,
        .buf = buf,
        .len = len,
    };

    co_wait_init(&call.wait, NULL);
    loop_post(loop_self(), &call.message);
    (void)co_wait(&call.wait, LOOP_FOREVER); /* not cancellable, and over in this tick */
    *ret_consumed = call.consumed;
    *ret_request = call.request;
    return call.result;
}

/* Runs a request, which it frees, and sends the answer. Negative when the client has gone. */
static int co_fn control_fn client_answer(struct qmp_client *c, struct qmp_request *request)
{
    struct control *control = c->server->control;
    char *line;
    int r = 0;

    control->running++;
    line = qmp_request_run(request, &c->session);
    control->running--;
    if (control->running == 0 && control->idle_wait && !control->idle_wait->ended)
        co_wait_end(control->idle_wait, 0);
    qmp_request_free(request);
    client_queue(c, line, false);
    while (r == 0 && !c->dead && !list_empty(&c->out)) /* SERVER-1 */
        r = spot_co_wait(&c->sent_wait, LOOP_FOREVER);
    return c->dead ? -EPIPE : r;
}

/* Negative when the client has gone or the daemon is to end. */
static int co_fn control_fn client_take(struct qmp_client *c, size_t len)
{
    size_t pos = 0;

    while (pos < len) {
        struct qmp_request *request = NULL;
        size_t consumed;
        int r = feed_on_thread(&c->session, c->input + pos, len - pos, &consumed, &request);

        pos += consumed;
        if (r == -ENOMEM)
            log_warning("control client on %s: no memory for its request, disconnecting it",
                        socket_name(c->server->listener));
        if (r == 1 && c->server->control->stopping) {
            qmp_request_free(request);
            return -ESHUTDOWN;
        }
        if (r == 1)
            r = client_answer(c, request);
        if (r < 0)
            return r;
    }
    return 0;
}

static void co_fn control_fn client_receive(struct qmp_client *c)
{
    int64_t n;
    int r = 0;

    do {
        n = socket_co_recv(c->socket, c->input, sizeof(c->input), LOOP_FOREVER);
        if (n > 0)
            r = client_take(c, (size_t)n);
    } while (n > 0 && r == 0);
    if (r == -ESHUTDOWN)
        (void)co_sleep_until(LOOP_FOREVER); /* until cancelled: events are still sent */
}

static void client_free(struct qmp_client *c)
{
    struct out_line *line;
    struct out_line *next;

    list_for_each_safe (&c->out, line, next, link)
        drop_line(c, line);
    qmp_session_release(&c->session);
    socket_free(c->socket);
    list_remove(&c->link);
    c->server->client_count--;
    spot_wake(&c->server->room_wait);
    spot_wake(&c->server->quiet_wait);
    free(c);
}

static void co_fn control_fn client_main(void *arg)
{
    struct qmp_client *c = arg;
    struct co_scope sending;

    co_scope_init(&sending);
    if (co_scope_start(&sending, client_send, c) == 0) {
        client_queue(c, qmp_session_greeting(&c->session), false);
        client_receive(c);
        c->ending = true;
        client_kill(c);
        co_scope_join(&sending);
    }
    client_free(c);
}

/* Takes the socket. */
static void client_start(struct qmp_server *s, struct socket *socket)
{
    struct qmp_client *c = try_new(struct qmp_client);

    if (!c) {
        log_warning("control socket %s: no memory for a client, disconnecting it",
                    socket_name(s->listener));
        socket_free(socket);
        return;
    }
    c->server = s;
    c->socket = socket;
    list_init(&c->out);
    qmp_session_init(&c->session, &s->control->service, s->pretty);
    list_append(&s->clients, &c->link);
    s->client_count++;
    if (co_scope_start(&s->serving, client_main, c) < 0)
        client_free(c);
}

static void co_fn server_accept(void *arg)
{
    struct qmp_server *s = arg;
    bool failing = false;
    int r = 0;

    while (r != -ECANCELED) {
        struct socket *socket;

        if (s->client_count >= QMP_CLIENTS_MAX) {
            r = spot_co_wait(&s->room_wait, LOOP_FOREVER);
            continue;
        }
        r = socket_co_accept(s->listener, &socket, LOOP_FOREVER);
        if (r >= 0) {
            failing = false;
            client_start(s, socket);
            continue;
        }
        if (r == -ECANCELED)
            return;
        if (!failing) /* once */
            log_warning("control socket %s: cannot accept a client: %s, retrying",
                        socket_name(s->listener), strerror(-r));
        failing = true;
        r = co_sleep_until(loop_clock() + ACCEPT_RETRY_NS);
    }
}

/* Life. */

int qmp_server_co_new(struct qmp_server **ret, struct control *control,
                      const struct socket_address *address, struct error **err)
{
    struct socket *listener;
    struct qmp_server *s;
    int r = socket_co_listen(&listener, address, err);

    if (r < 0)
        return r;
    s = xnew(struct qmp_server);
    s->control = control;
    s->listener = listener;
    co_scope_init(&s->accepting);
    co_scope_init(&s->serving);
    list_init(&s->clients);
    list_append(&control->servers, &s->link);
    *ret = s;
    return 0;
}

int qmp_server_start(struct qmp_server *s, bool pretty, struct error **err)
{
    int r;

    assert(!s->speaks);
    s->pretty = pretty;
    s->speaks = true;
    r = co_scope_start(&s->accepting, server_accept, s);
    return r < 0 ? error_set(err, -r, "no memory for control socket %s", socket_name(s->listener))
                 : 0;
}

void qmp_server_co_close(struct qmp_server *s)
{
    co_scope_cancel(&s->accepting);
    co_scope_join(&s->accepting);
}

void qmp_server_cancel(struct qmp_server *s)
{
    co_scope_cancel(&s->serving);
}

static bool has_unsent(const struct qmp_server *s)
{
    const struct qmp_client *c;

    list_for_each (&s->clients, c, link) {
        if (!c->dead && !list_empty(&c->out))
            return true;
    }
    return false;
}

struct qmp_server *qmp_server_co_free(struct qmp_server *s)
{
    uint64_t deadline = loop_clock() + LAST_LINES_NS;

    qmp_server_co_close(s);
    while (has_unsent(s) && spot_co_wait(&s->quiet_wait, deadline) == 0)
        ; /* until all is sent, or the time is over */
    co_scope_cancel(&s->serving);
    co_scope_join(&s->serving);
    assert(list_empty(&s->clients));
    list_remove(&s->link);
    socket_free(s->listener);
    free(s);
    return NULL;
}
