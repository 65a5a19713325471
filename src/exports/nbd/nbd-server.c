/* SPDX-License-Identifier: Apache-2.0 */
/* The NBD server: accepting, spreading connections over the I/O loops, binding them to exports, and letting go. */
#include "base/alloc.h"
#include "base/macros.h"
#include "exports/nbd/nbd-wire.h"
#include "exports/nbd/nbd.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* After accept() failed for want of something that time may bring. */
#define ACCEPT_RETRY_NS (100 * NS_PER_MS)

struct nbd_export *nbd_server_find(const struct nbd_server *server, const char *name, size_t len)
{
    struct nbd_export *e;

    list_for_each (&server->exports, e, link) {
        if (!e->closing && strlen(e->name) == len && memcmp(e->name, name, len) == 0)
            return e;
    }
    return NULL;
}

struct bind_call {
    struct nbd_connection *connection;
    const char *name;
    size_t len;
    struct nbd_export *export;
};

static void release_export(struct nbd_connection *c)
{
    struct nbd_export *e = take(&c->bound);

    if (e && --e->clients == 0 && e->empty_wait && !e->empty_wait->ended)
        co_wait_end(e->empty_wait, 0);
}

static void bind_on_control(void *arg)
{
    struct bind_call *call = arg;
    struct nbd_export *e = nbd_server_find(call->connection->server, call->name, call->len);

    release_export(call->connection); /* of one whose unbinding failed */
    if (e)
        e->clients++; /* NBD-2 */
    call->connection->bound = e;
    call->export = e;
}

static void unbind_on_control(void *arg)
{
    release_export(arg);
}

int nbd_connection_co_bind(struct nbd_connection *c, const char *name, size_t len)
{
    struct bind_call call = {.connection = c, .name = name, .len = len};
    int r = loop_co_call(c->server->control, bind_on_control, &call);

    if (r < 0)
        return r;
    if (!call.export)
        return -ENOENT;
    r = backend_attach(call.export->backend);
    c->export = call.export;
    c->backend = call.export->backend;
    return r;
}

int nbd_connection_co_unbind(struct nbd_connection *c)
{
    c->export = NULL;
    c->backend = NULL;
    return loop_co_call(c->server->control, unbind_on_control, c);
}

/* The whole life of a connection, on its loop. */
static void co_fn connection_run(void *arg)
{
    struct nbd_connection *c = arg;

    if (nbd_co_handshake(c) == 0) {
        c->served = true;
        nbd_co_transmission(c);
    }
    c->socket = socket_free(c->socket);
}

/* NBD-1: on the control thread, when both messages are home. */
static void free_if_over(struct nbd_connection *c)
{
    struct nbd_server *server = c->server;
    bool served = c->served;

    if (!c->ended || c->shutdown_out)
        return;
    release_export(c);
    list_remove(&c->link);
    server->connection_count--;
    if (server->room_wait && !server->room_wait->ended)
        co_wait_end(server->room_wait, 0);
    if (!server->connection_count && server->empty_wait && !server->empty_wait->ended)
        co_wait_end(server->empty_wait, 0);
    free(c);
    if (served && !server->connection_count && server->idle)
        server->idle(server->idle_arg);
}

static void connection_ended(struct loop_message *m)
{
    struct nbd_connection *c = container_of(m, struct nbd_connection, end);

    c->ended = true;
    free_if_over(c);
}

static void report_end(struct nbd_connection *c)
{
    c->end.fn = connection_ended;
    loop_post(c->server->control, &c->end);
}

static void scope_empty(struct co_scope *s)
{
    report_end(container_of(s, struct nbd_connection, scope));
}

static void connection_start(struct loop_message *m)
{
    struct nbd_connection *c = container_of(m, struct nbd_connection, start);

    co_scope_init(&c->scope);
    co_scope_init(&c->requests);
    co_scope_init(&c->sending);
    c->scope.on_empty = scope_empty;
    if (co_scope_start(&c->scope, connection_run, c) < 0) {
        c->socket = socket_free(c->socket);
        report_end(c);
    }
}

static void shutdown_returned(struct loop_message *m)
{
    struct nbd_connection *c = container_of(m, struct nbd_connection, shutdown);

    c->shutdown_out = false;
    free_if_over(c);
}

/* Waits on the socket end; requests in flight are carried out, their replies go nowhere. */
static void shutdown_arrived(struct loop_message *m)
{
    struct nbd_connection *c = container_of(m, struct nbd_connection, shutdown);

    if (c->socket)
        socket_shutdown(c->socket);
    m->fn = shutdown_returned;
    loop_post(c->server->control, m);
}

static void abandon_arrived(struct loop_message *m)
{
    co_scope_cancel(&container_of(m, struct nbd_connection, shutdown)->requests);
    shutdown_arrived(m);
}

/* If the message is still out, its loop is silent: whoever waits for the connection's end asks again. */
static void send_shutdown(struct nbd_connection *c, loop_message_fn *fn)
{
    if (c->shutdown_out || c->ended)
        return;
    c->shutdown_out = true;
    c->shutdown.fn = fn;
    loop_post(c->loop, &c->shutdown);
}

static void shut_down_clients(struct nbd_server *server, const struct nbd_export *export,
                              loop_message_fn *fn)
{
    struct nbd_connection *c;

    list_for_each (&server->connections, c, link) {
        if (c->bound == export)
            send_shutdown(c, fn);
    }
}

void nbd_export_disconnect(struct nbd_server *server, const struct nbd_export *export)
{
    shut_down_clients(server, export, shutdown_arrived);
}

void nbd_export_abandon(struct nbd_server *server, const struct nbd_export *export)
{
    shut_down_clients(server, export, abandon_arrived);
}

static void connection_new(struct nbd_server *server, struct socket *socket)
{
    struct nbd_connection *c = try_new(struct nbd_connection);

    if (!c) {
        socket_free(socket);
        return;
    }
    c->server = server;
    c->socket = socket;
    c->loop = server->loops[server->next_loop++ % server->loop_count];
    list_append(&server->connections, &c->link);
    server->connection_count++;
    c->start.fn = connection_start;
    loop_post(c->loop, &c->start);
}

/* Clients stay in the listener's backlog before it may begin, and at max_connections. */
static int co_fn wait_for_room(struct nbd_server *server)
{
    int r = 0;

    while (r == 0 &&
           (!server->accepting ||
            (server->max_connections && server->connection_count >= server->max_connections))) {
        struct co_wait w;

        co_wait_init(&w, co_wait_leave);
        server->room_wait = &w;
        r = co_wait(&w, LOOP_FOREVER);
        server->room_wait = NULL;
    }
    return r;
}

static void co_fn accept_clients(void *arg)
{
    struct nbd_server *server = arg;

    while (wait_for_room(server) == 0) {
        struct socket *socket;
        int r = socket_co_accept(server->listener, &socket, LOOP_FOREVER);

        if (r == 0)
            connection_new(server, socket);
        else if (co_cancelled() || co_sleep_until(loop_clock() + ACCEPT_RETRY_NS) < 0)
            return;
    }
}

int nbd_server_co_start(struct nbd_server **ret, const struct socket_address *address,
                        unsigned max_connections, struct loop *const *loops, unsigned loop_count,
                        struct error **err)
{
    struct nbd_server *server;
    struct socket *listener;
    int r = socket_co_listen(&listener, address, err);

    if (r < 0)
        return error_wrap(err, r, "NBD server");
    server = xnew(struct nbd_server);
    server->listener = listener;
    server->control = loop_self();
    server->loops = loops;
    server->loop_count = loop_count;
    server->max_connections = max_connections;
    list_init(&server->exports);
    list_init(&server->connections);
    co_scope_init(&server->scope);
    r = co_scope_start(&server->scope, accept_clients, server);
    if (r < 0) {
        socket_free(listener);
        free(server);
        return error_set(err, -r, "NBD server: no memory for a coroutine");
    }
    *ret = server;
    return 0;
}

void nbd_server_accept(struct nbd_server *server)
{
    server->accepting = true;
    if (server->room_wait && !server->room_wait->ended)
        co_wait_end(server->room_wait, 0);
}

struct nbd_server *nbd_server_co_stop(struct nbd_server *server)
{
    struct nbd_connection *c;

    assert(list_empty(&server->exports));
    co_scope_cancel(&server->scope);
    co_scope_join(&server->scope);
    server->listener = socket_free(server->listener);
    list_for_each (&server->connections, c, link)
        send_shutdown(c, shutdown_arrived);
    while (server->connection_count) {
        struct co_wait w;

        co_wait_init(&w, NULL);
        server->empty_wait = &w;
        (void)co_wait(&w, LOOP_FOREVER); /* not cancellable */
        server->empty_wait = NULL;
    }
    free(server);
    return NULL;
}
