/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The threads engine, for places where io_uring is forbidden: sockets by epoll, files by each file's own worker threads.
 *
 * THREADS-1 A socket is in the epoll set edge-triggered, for both directions, from its first wait on this loop on. An
 *           operation is tried first and waits for the next edge only after -EAGAIN, so that no edge is missed.
 */
#include "base/alloc.h"
#include "base/macros.h"
#include "loop/loop-internal.h"
#include "loop/real.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#define EVENTS_PER_POLL 64

struct threads_engine {
    int epoll_fd;
    struct list now; /* operations that are to complete in the next poll: io_op.engine_link */
};

static int threads_start(struct loop *loop, struct error **err)
{
    struct threads_engine *e = xnew(struct threads_engine);
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = NULL};

    list_init(&e->now);
    e->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    if (e->epoll_fd < 0 ||
        epoll_ctl(e->epoll_fd, EPOLL_CTL_ADD, loop->mailbox->wake_fd, &event) < 0) {
        int r = error_set(err, errno, "loop '%s': cannot make an epoll set: %s", loop->name,
                          strerror(errno));

        if (e->epoll_fd >= 0)
            close(e->epoll_fd);
        free(e);
        return r;
    }
    loop->engine_state = e;
    return 0;
}

static void threads_stop(struct loop *loop)
{
    struct threads_engine *e = loop->engine_state;

    close(e->epoll_fd);
    free(e);
}

/* One attempt that does not block. */
static int64_t socket_attempt(struct io_op *op)
{
    int fd;

    switch ((int)op->kind) {
    case IO_RECV:
        return real_socket_try_recv(op->socket, op->iov->iov_base, op->iov->iov_len);
    case IO_SEND:
        return real_socket_try_send(op->socket, op->iov, op->iov_count);
    default:
        fd = accept4(op->socket->fd, NULL, NULL, SOCK_CLOEXEC);
        if (fd < 0)
            return -errno;
        *op->ret_socket = real_socket_new(op->loop->engine, fd);
        return 0;
    }
}

static struct io_op **waiting_slot(const struct io_op *op)
{
    return op->kind == IO_SEND ? &op->socket->send_op : &op->socket->recv_op;
}

static void complete_soon(struct io_op *op, int64_t result)
{
    struct threads_engine *e = op->loop->engine_state;

    op->engine_data = (uint64_t)result;
    list_append(&e->now, &op->engine_link);
}

static int register_socket(struct io_op *op)
{
    struct threads_engine *e = op->loop->engine_state;
    struct socket *s = op->socket;
    struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET, .data.ptr = s};

    if (s->registered == op->loop)
        return 0;
    if (op->kind == IO_ACCEPT)
        (void)fcntl(s->fd, F_SETFL, fcntl(s->fd, F_GETFL) | O_NONBLOCK);
    if (s->registered) {
        struct threads_engine *before = s->registered->engine_state;

        (void)epoll_ctl(before->epoll_fd, EPOLL_CTL_DEL, s->fd, NULL);
    }
    if (epoll_ctl(e->epoll_fd, EPOLL_CTL_ADD, s->fd, &event) < 0)
        return -errno;
    s->registered = op->loop;
    return 0;
}

static void submit_socket(struct io_op *op)
{
    int64_t r = register_socket(op);

    list_init(&op->engine_link);
    if (r == 0)
        r = socket_attempt(op);
    if (r != -EAGAIN) {
        complete_soon(op, r);
        return;
    }
    assert(!*waiting_slot(op));
    *waiting_slot(op) = op; /* THREADS-1 */
}

static void threads_submit(struct io_op *op)
{
    if (op->socket)
        submit_socket(op);
    else
        real_submit_to_worker(op);
}

static void threads_cancel(struct io_op *op)
{
    if (!op->socket || *waiting_slot(op) != op)
        return; /* a worker's, or about to complete */
    *waiting_slot(op) = NULL;
    complete_soon(op, -ECANCELED);
}

static void retry(struct io_op **slot)
{
    struct io_op *op = *slot;
    int64_t r;

    if (!op)
        return;
    r = socket_attempt(op);
    if (r == -EAGAIN)
        return;
    *slot = NULL;
    complete_soon(op, r);
}

static void handle_event(struct loop *loop, const struct epoll_event *event)
{
    struct socket *s = event->data.ptr;
    uint64_t value;

    if (!s) {
        (void)!read(loop->mailbox->wake_fd, &value, sizeof(value));
        return;
    }
    if (event->events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR))
        retry(&s->recv_op);
    if (event->events & (EPOLLOUT | EPOLLHUP | EPOLLERR))
        retry(&s->send_op);
}

static int timeout_ms(struct loop *loop, uint64_t deadline_ns)
{
    uint64_t now;

    if (deadline_ns == LOOP_FOREVER)
        return -1;
    now = real_clock(loop);
    if (deadline_ns <= now)
        return 0;
    return (int)MIN((deadline_ns - now + NS_PER_MS - 1) / NS_PER_MS, (uint64_t)60000);
}

static void threads_poll(struct loop *loop, uint64_t deadline_ns)
{
    struct threads_engine *e = loop->engine_state;
    struct epoll_event events[EVENTS_PER_POLL];
    struct io_op *op;
    int n;

    loop->counters.system_calls++;
    n = epoll_wait(e->epoll_fd, events, EVENTS_PER_POLL,
                   list_empty(&e->now) ? timeout_ms(loop, deadline_ns) : 0);
    for (int i = 0; i < n; i++)
        handle_event(loop, &events[i]);
    while ((op = list_first(&e->now, struct io_op, engine_link))) {
        list_remove(&op->engine_link);
        op_complete(op, (int64_t)op->engine_data);
    }
}

const struct engine engine_threads = {
    .name = "threads",
    .eventfds = true,
    .start = threads_start,
    .stop = threads_stop,
    .poll = threads_poll,
    .wake = real_wake,
    .inline_rw = real_inline_rw,
    .try_inline = real_try_inline,
    .submit = threads_submit,
    .cancel = threads_cancel,
    .clock = real_clock,
    .wall_clock = real_wall_clock,
    .random = real_random,
    .thread_start = real_thread_start,
    .thread_report = real_thread_report,
    .thread_join = real_thread_join,
    .file_close = real_file_close,
    .socket_try_send = real_socket_try_send,
    .socket_try_recv = real_socket_try_recv,
    .socket_shutdown = real_socket_shutdown,
    .socket_close = real_socket_close,
};
