/* SPDX-License-Identifier: Apache-2.0 */
/* Sockets: whole sends out of partial ones, and the calls' way to the engine. */
#include "loop/socket.h"
#include "base/alloc.h"
#include "loop/loop-internal.h"
#include "loop/op.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* As people write it, for messages. */
static char *address_text(const struct socket_address *a)
{
    if (a->family == SOCKET_UNIX)
        return xasprintf("unix:%s", a->path);
    if (a->family == SOCKET_INHERITED)
        return xasprintf("descriptor %d", a->fd);
    return xasprintf("%s:%s", a->host ? a->host : "", a->port ? a->port : "");
}

static int co_fn address_op(enum io_op_kind kind, struct socket **ret,
                            const struct socket_address *address, uint64_t deadline_ns,
                            const char *verb, struct error **err)
{
    struct io_op *op = op_new(kind);
    int64_t r = -ENOMEM;

    if (op) {
        op->address = address;
        op->ret_socket = ret;
        op->len = deadline_ns;
        r = op_co_run(op, LOOP_FOREVER);
    }
    if (r < 0) {
        AUTO(free_ptr) char *text = address_text(address);

        return error_set(err, (int)-r, "cannot %s '%s': %s", verb, text, strerror((int)-r));
    }
    (*ret)->name = address_text(address);
    return 0;
}

int socket_co_listen(struct socket **ret, const struct socket_address *address, struct error **err)
{
    return address_op(IO_LISTEN, ret, address, LOOP_FOREVER, "listen on", err);
}

int socket_co_connect(struct socket **ret, const struct socket_address *address,
                      uint64_t deadline_ns, struct error **err)
{
    return address_op(IO_CONNECT, ret, address, deadline_ns, "connect to", err);
}

static struct io_op *socket_op(struct socket *s, enum io_op_kind kind)
{
    struct io_op *op = op_new(kind);

    if (op)
        op->socket = s;
    return op;
}

int socket_co_accept(struct socket *listener, struct socket **ret, uint64_t deadline_ns)
{
    struct io_op *op = socket_op(listener, IO_ACCEPT);

    if (!op)
        return -ENOMEM;
    op->ret_socket = ret;
    return (int)op_co_run(op, deadline_ns);
}

int64_t socket_co_recv(struct socket *s, void *buf, size_t len, uint64_t deadline_ns)
{
    struct io_op *op = socket_op(s, IO_RECV);

    if (!op)
        return -ENOMEM;
    op->iov_copy[0] = (struct iovec){buf, len};
    op->iov = op->iov_copy;
    op->iov_count = 1;
    return op_co_run(op, deadline_ns);
}

int socket_co_recv_all(struct socket *s, void *buf, size_t len, uint64_t deadline_ns)
{
    char *p = buf;

    while (len) {
        int64_t n = socket_co_recv(s, p, len, deadline_ns);

        if (n <= 0)
            return n < 0 ? (int)n : -ECONNRESET;
        p += n;
        len -= (size_t)n;
    }
    return 0;
}

int socket_co_send(struct socket *s, struct iovec *iov, int iov_count, uint64_t deadline_ns)
{
    int64_t n = socket_try_send(s, iov, iov_count);

    for (;;) {
        struct io_op *op;

        if (n < 0 && n != -EAGAIN)
            return (int)n;
        for (; n > 0; n = n > 0 && iov_count ? n : 0) {
            size_t here = (size_t)n < iov->iov_len ? (size_t)n : iov->iov_len;

            iov->iov_base = (char *)iov->iov_base + here;
            iov->iov_len -= here;
            n -= (int64_t)here;
            if (!iov->iov_len) {
                iov++;
                iov_count--;
            }
        }
        while (iov_count && !iov->iov_len) {
            iov++;
            iov_count--;
        }
        if (!iov_count)
            return 0;
        op = socket_op(s, IO_SEND);
        if (!op)
            return -ENOMEM;
        op->iov = iov;
        op->iov_count = iov_count;
        n = op_co_run(op, deadline_ns);
        if (n == 0)
            return -EPIPE;
    }
}

int64_t socket_try_send(struct socket *s, const struct iovec *iov, int iov_count)
{
    return s->engine->socket_try_send(s, iov, iov_count);
}

int64_t socket_try_recv(struct socket *s, void *buf, size_t len)
{
    return s->engine->socket_try_recv(s, buf, len);
}

void socket_shutdown(struct socket *s)
{
    s->engine->socket_shutdown(s);
}

struct socket *socket_free(struct socket *s)
{
    if (!s)
        return NULL;
    s->engine->socket_close(s);
    free(s->name);
    free(s->unlink_path);
    free(s);
    return NULL;
}

const char *socket_name(const struct socket *s)
{
    return s->name ? s->name : "";
}

unsigned socket_port(const struct socket *s)
{
    return s->port;
}
