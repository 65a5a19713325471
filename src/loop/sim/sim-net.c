/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The simulated network: listeners by address, connections of two byte pipes. What is sent arrives later, in order, in
 * pieces that need not be those of the sender. One machine, no routing: an address is found or refused.
 *
 * NET-1 Both sockets of a connection carry the listener's name for faults: "unix:PATH" or "HOST:PORT".
 * NET-2 A pipe holds at most `capacity` bytes between send and receive; a sender that finds it full waits for the receiver.
 */
#include "base/alloc.h"
#include "base/macros.h"
#include "loop/sim/sim-internal.h"

#include <assert.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define BACKLOG_MAX 128

struct segment {
    struct list link;
    struct timer timer;
    struct end *to;
    bool arrived;
    bool fin; /* the end of the stream, no data */
    size_t len;
    size_t used;
    uint8_t data[];
};

struct pipe {
    struct list segments; /* in order */
    uint64_t bytes;       /* sent and not received */
    uint64_t capacity;
    uint64_t last_arrival_ns;
};

/* One end of a connection: what a connected socket's `sim` points to. */
struct end {
    struct connection *connection;
    struct end *peer;
    struct pipe in;
    struct sim_io *recv_io;
    struct sim_io *send_io;
    bool shut;   /* socket_shutdown() */
    bool closed; /* socket_free(), or never accepted */
};

struct connection {
    struct list link; /* sim.connections */
    char *name;
    struct end ends[2];
    bool reset;
    bool half_open;
    struct list backlog_link; /* listener.backlog: ends[1] waits to be accepted */
};

/* What a listening socket's `sim` points to. */
struct listener {
    struct list link; /* sim.listeners */
    char *name;
    enum socket_family family;
    char *host;
    unsigned port;
    struct list backlog;
    struct sim_io *accept_io;
};

static uint64_t latency(void)
{
    const struct sim_options *o = &sim_self()->options;

    return sim_between(o->net_min_ns, o->net_max_ns);
}

/* ---- pipes ---- */

static void segment_free(struct segment *g)
{
    if (g->timer.armed)
        timer_heap_remove(&sim_self()->events, &g->timer);
    list_remove(&g->link);
    free(g);
}

static void pipe_clear(struct pipe *p)
{
    struct segment *g;

    while ((g = list_first(&p->segments, struct segment, link)))
        segment_free(g);
    p->bytes = 0;
}

static void end_progress(struct end *e);

static void segment_arrived(struct timer *t)
{
    struct segment *g = container_of(t, struct segment, timer);

    g->arrived = true;
    end_progress(g->to);
}

/* Gives the segment to the receiving end `to`. */
static void segment_send(struct end *to, struct segment *g)
{
    struct pipe *p = &to->in;

    g->to = to;
    list_append(&p->segments, &g->link);
    p->bytes += g->len;
    if (to->connection->half_open)
        return; /* it never arrives */
    p->last_arrival_ns = MAX(p->last_arrival_ns, sim_self()->now_ns + latency());
    g->timer.deadline_ns = p->last_arrival_ns;
    g->timer.fn = segment_arrived;
    timer_heap_insert(&sim_self()->events, &g->timer);
}

static void send_fin(struct end *to)
{
    struct segment *g = xalloc(1, sizeof(*g));

    g->fin = true;
    segment_send(to, g);
}

/* ---- connections ---- */

static void connection_free(struct connection *c)
{
    pipe_clear(&c->ends[0].in);
    pipe_clear(&c->ends[1].in);
    list_remove(&c->backlog_link);
    list_remove(&c->link);
    free(c->name);
    free(c);
}

static struct connection *connection_new(const char *name)
{
    struct connection *c = xnew(struct connection);

    c->name = xstrdup(name);
    list_init(&c->backlog_link);
    for (unsigned i = 0; i < 2; i++) {
        c->ends[i].connection = c;
        c->ends[i].peer = &c->ends[!i];
        list_init(&c->ends[i].in.segments);
        c->ends[i].in.capacity = sim_between(1, 64) * 4096;
    }
    list_append(&sim_self()->connections, &c->link);
    return c;
}

static void connection_reset(struct connection *c)
{
    c->reset = true;
    for (unsigned i = 0; i < 2; i++) {
        pipe_clear(&c->ends[i].in);
        end_progress(&c->ends[i]);
    }
}

/* Lets a fault have its way with the connection. True if the operation shall wait for ever. */
static bool struck(struct connection *c, const struct sim_strike *s)
{
    if (s->half_open)
        c->half_open = true;
    if (s->reset && !c->reset)
        connection_reset(c);
    return s->hang;
}

static size_t part_of(size_t len, bool be_short)
{
    return be_short && len > 1 ? sim_between(1, len - 1) : len;
}

static int64_t receive(struct end *e, uint8_t *buf, size_t len, bool be_short)
{
    struct segment *g;
    size_t want = part_of(len, be_short);
    size_t done = 0;

    if (e->connection->reset)
        return -ECONNRESET;
    while (done < want && (g = list_first(&e->in.segments, struct segment, link)) && g->arrived) {
        size_t here;

        if (g->fin)
            break;
        here = MIN(want - done, g->len - g->used);
        memcpy(buf + done, g->data + g->used, here);
        g->used += here;
        done += here;
        if (g->used == g->len)
            segment_free(g);
    }
    if (done) {
        e->in.bytes -= done;
        end_progress(e->peer);
        return (int64_t)done;
    }
    g = list_first(&e->in.segments, struct segment, link);
    return e->shut || (g && g->arrived && g->fin) ? 0 : -EAGAIN;
}

static int64_t transmit(struct end *e, const struct iovec *iov, int iov_count, bool be_short)
{
    struct end *to = e->peer;
    struct segment *g;
    size_t total = 0;
    size_t done = 0;

    for (int i = 0; i < iov_count; i++)
        total += iov[i].iov_len;
    if (e->connection->reset)
        return -ECONNRESET;
    if (e->shut || ((to->closed || to->shut) && !e->connection->half_open))
        return -EPIPE;
    if (!total)
        return 0;
    if (to->in.bytes >= to->in.capacity)
        return -EAGAIN; /* NET-2 */
    total = part_of(MIN(total, to->in.capacity - to->in.bytes), be_short);
    g = xalloc(1, sizeof(*g) + total);
    g->len = total;
    for (; done < total; iov++) {
        size_t here = MIN(iov->iov_len, total - done);

        memcpy(g->data + done, iov->iov_base, here);
        done += here;
    }
    sim_trace(TRACE_EFFECT, 0, total, sim_hash_bytes(0, g->data, total));
    segment_send(to, g);
    return (int64_t)total;
}

/* Ends waits of this end that need not go on. */
static void end_progress(struct end *e)
{
    struct sim_io *io = e->recv_io;
    int64_t n;

    if (io && !io->hung) {
        n = receive(e, io->op->iov->iov_base, io->op->iov->iov_len, io->strike.cut_short);
        if (n != -EAGAIN) {
            e->recv_io = NULL;
            sim_io_finish(io, n);
        }
    }
    io = e->send_io;
    if (io && !io->hung) {
        n = transmit(e, io->op->iov, io->op->iov_count, io->strike.cut_short);
        if (n != -EAGAIN) {
            e->send_io = NULL;
            sim_io_finish(io, n);
        }
    }
}

/* ---- listening, connecting, accepting ---- */

static struct socket *socket_new(void *sim)
{
    struct socket *s = xnew(struct socket);

    s->engine = &engine_sim;
    s->fd = -1;
    s->sim = sim;
    return s;
}

static bool is_any_host(const char *host)
{
    return !host || !*host || strcmp(host, "0.0.0.0") == 0 || strcmp(host, "::") == 0;
}

/* All names of this machine are one. */
static const char *host_name(const char *host)
{
    if (strcmp(host, "localhost") == 0 || strcmp(host, "::1") == 0)
        return "127.0.0.1";
    return host;
}

static bool hosts_meet(const char *a, const char *b)
{
    return is_any_host(a) || is_any_host(b) || strcmp(host_name(a), host_name(b)) == 0;
}

static bool parse_port(const char *text, unsigned *ret)
{
    char *end;
    unsigned long port;

    if (!text || !*text)
        return false;
    port = strtoul(text, &end, 10);
    if (*end || port > 65535)
        return false;
    *ret = (unsigned)port;
    return true;
}

static struct listener *find_listener(const struct socket_address *a, unsigned port)
{
    struct listener *l;

    list_for_each (&sim_self()->listeners, l, link)
        if (l->family == a->family &&
            (a->family == SOCKET_UNIX ? strcmp(l->host, a->path) == 0
                                      : l->port == port && hosts_meet(l->host, a->host)))
            return l;
    return NULL;
}

static int64_t do_listen(struct io_op *op)
{
    const struct socket_address *a = op->address;
    struct listener *l;
    unsigned port = 0;

    if (a->family == SOCKET_INHERITED)
        return -ENOTSOCK; /* nobody starts a simulated process */
    if (a->family == SOCKET_INET && !parse_port(a->port, &port))
        return -EADDRNOTAVAIL;
    if (a->family == SOCKET_INET && port == 0)
        port = sim_self()->next_port++;
    if (find_listener(a, port))
        return -EADDRINUSE;
    l = xnew(struct listener);
    l->family = a->family;
    l->port = port;
    l->host = xstrdup(a->family == SOCKET_UNIX ? a->path : a->host ? a->host : "");
    l->name = a->family == SOCKET_UNIX ? xasprintf("unix:%s", a->path)
                                       : xasprintf("%s:%u", l->host, port);
    list_init(&l->backlog);
    list_append(&sim_self()->listeners, &l->link);
    *op->ret_socket = socket_new(l);
    (*op->ret_socket)->listens = true;
    (*op->ret_socket)->port = port;
    return 0;
}

static void listener_progress(struct listener *l)
{
    struct sim_io *io = l->accept_io;
    struct connection *c = list_first(&l->backlog, struct connection, backlog_link);

    if (!io || !c || io->hung)
        return;
    l->accept_io = NULL;
    if (io->strike.error) {
        sim_io_finish(io, io->strike.error);
        return;
    }
    list_remove(&c->backlog_link);
    c->ends[1].closed = false;
    *io->op->ret_socket = socket_new(&c->ends[1]);
    (*io->op->ret_socket)->port = l->port;
    sim_io_finish(io, 0);
}

static uint64_t backlog_length(const struct listener *l)
{
    uint64_t n = 0;

    for (struct list *i = l->backlog.next; i != &l->backlog; i = i->next)
        n++;
    return n;
}

static int64_t do_connect(struct sim_io *io)
{
    const struct socket_address *a = io->op->address;
    struct listener *l;
    struct connection *c;
    unsigned port = 0;

    if (io->strike.error)
        return io->strike.error;
    if (a->family == SOCKET_INET && !parse_port(a->port, &port))
        return -EADDRNOTAVAIL;
    l = find_listener(a, port);
    if (!l)
        return a->family == SOCKET_UNIX ? -ENOENT : -ECONNREFUSED;
    if (backlog_length(l) >= BACKLOG_MAX)
        return a->family == SOCKET_UNIX ? -EAGAIN : -ECONNREFUSED;
    c = connection_new(l->name);
    list_append(&l->backlog, &c->backlog_link);
    *io->op->ret_socket = socket_new(&c->ends[0]);
    (*io->op->ret_socket)->port = l->family == SOCKET_INET ? sim_self()->next_port++ : 0;
    (void)struck(c, &io->strike);
    listener_progress(l);
    return 0;
}

static void address_effect(struct sim_io *io)
{
    struct io_op *op = io->op;

    if (io->hung) /* a connect, at its deadline */
        sim_io_finish(io, -ETIMEDOUT);
    else if (op->kind == IO_CONNECT)
        sim_io_finish(io, do_connect(io));
    else
        sim_io_finish(io, io->strike.error ? io->strike.error : do_listen(op));
}

static void submit_address(struct io_op *op)
{
    struct sim *sim = sim_self();
    const struct socket_address *a = op->address;
    char name[256];
    struct sim_io *io;

    if (a->family == SOCKET_UNIX)
        snprintf(name, sizeof(name), "unix:%s", a->path);
    else if (a->family == SOCKET_INHERITED)
        snprintf(name, sizeof(name), "descriptor %d", a->fd);
    else
        snprintf(name, sizeof(name), "%s:%s", a->host ? a->host : "", a->port ? a->port : "");
    io = sim_io_new(op, name);
    io->effect = address_effect;
    io->strike = sim_strike(op->kind, name);
    io->hung = io->strike.hang;
    if (!io->hung)
        sim_io_at(io, sim->now_ns + io->strike.delay_ns + latency());
    else if (op->kind == IO_CONNECT && op->len != LOOP_FOREVER)
        sim_io_at(io, op->len);
}

/* ---- the engine's calls ---- */

/* Keeps an operation on a socket from being tried, for ever or for a while. */
static void hold_back(struct sim_io *io, bool for_ever)
{
    io->hung = for_ever || io->strike.delay_ns;
    io->effect = sim_net_unhang;
    if (io->hung && !for_ever)
        sim_io_at(io, sim_self()->now_ns + io->strike.delay_ns);
}

void sim_net_submit(struct io_op *op)
{
    struct sim_io *io;
    struct end *e;

    if (!op->socket) {
        submit_address(op);
        return;
    }
    if (op->socket->listens) {
        struct listener *l = op->socket->sim;

        assert(op->kind == IO_ACCEPT && !l->accept_io);
        io = sim_io_new(op, l->name);
        io->strike = sim_strike(op->kind, l->name);
        l->accept_io = io;
        hold_back(io, io->strike.hang);
        listener_progress(l);
        return;
    }
    e = op->socket->sim;
    io = sim_io_new(op, e->connection->name);
    io->strike = sim_strike(op->kind, io->name);
    hold_back(io, struck(e->connection, &io->strike));
    if (io->strike.error) {
        sim_io_finish(io, io->strike.error);
        return;
    }
    if (op->kind == IO_RECV) {
        assert(!e->recv_io); /* one waiter for each direction */
        e->recv_io = io;
    } else {
        assert(!e->send_io);
        e->send_io = io;
    }
    end_progress(e);
}

void sim_net_unhang(struct sim_io *io)
{
    io->hung = false;
    if (io->op->socket->listens)
        listener_progress(io->op->socket->sim);
    else
        end_progress(io->op->socket->sim);
}

/* As a ring does: what waits for a socket is called off at once. A connect runs to its deadline. */
void sim_net_cancel(struct sim_io *io)
{
    struct socket *s = io->op->socket;

    if (!s || io->strike.late)
        return;
    if (s->listens) {
        struct listener *l = s->sim;

        l->accept_io = NULL;
    } else {
        struct end *e = s->sim;

        if (e->recv_io == io)
            e->recv_io = NULL;
        else
            e->send_io = NULL;
    }
    sim_io_finish(io, -ECANCELED);
}

/* An attempt that does not wait; a fault counts and strikes it like an operation. */
static bool try_struck(struct end *e, enum io_op_kind kind, struct sim_strike *ret, int64_t *result)
{
    *ret = sim_strike(kind, e->connection->name);
    *result = ret->error ? ret->error : -EAGAIN;
    return struck(e->connection, ret) || ret->error || ret->delay_ns;
}

int64_t sim_net_try_send(struct socket *s, const struct iovec *iov, int iov_count)
{
    struct end *e = s->sim;
    struct sim_strike strike;
    int64_t r;

    if (try_struck(e, IO_SEND, &strike, &r))
        return r;
    return transmit(e, iov, iov_count, strike.cut_short);
}

int64_t sim_net_try_recv(struct socket *s, void *buf, size_t len)
{
    struct end *e = s->sim;
    struct sim_strike strike;
    int64_t r;

    if (try_struck(e, IO_RECV, &strike, &r))
        return r;
    return receive(e, buf, len, strike.cut_short);
}

void sim_net_shutdown(struct socket *s)
{
    struct end *e;

    if (s->listens)
        return; /* nobody is connected */
    e = s->sim;
    if (e->shut || e->connection->reset)
        return;
    e->shut = true;
    send_fin(e->peer);
    end_progress(e);
    end_progress(e->peer);
}

static void listener_close(struct listener *l)
{
    struct connection *c;

    assert(!l->accept_io);
    while ((c = list_first(&l->backlog, struct connection, backlog_link))) {
        list_remove(&c->backlog_link);
        c->ends[1].closed = true;
        connection_reset(c);
        if (c->ends[0].closed)
            connection_free(c);
    }
    list_remove(&l->link);
    free(l->name);
    free(l->host);
    free(l);
}

void sim_net_close(struct socket *s)
{
    struct end *e = s->sim;
    struct connection *c;
    bool unread;

    if (s->listens) {
        listener_close(s->sim);
        return;
    }
    c = e->connection;
    assert(!e->recv_io && !e->send_io);
    unread = e->in.bytes > 0;
    e->closed = true;
    if (e->peer->closed && list_empty(&c->backlog_link)) {
        connection_free(c);
        return;
    }
    if (unread && !c->half_open)
        connection_reset(c); /* what was sent to it is lost: the peer is told */
    else if (!e->shut && !c->reset)
        send_fin(e->peer);
    end_progress(e->peer);
}

void sim_net_process_ended(void)
{
    struct sim *sim = sim_self();
    struct connection *c;
    struct listener *l;

    while ((c = list_first(&sim->connections, struct connection, link)))
        connection_free(c);
    while ((l = list_first(&sim->listeners, struct listener, link))) {
        l->accept_io = NULL;
        listener_close(l);
    }
}
