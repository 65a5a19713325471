/* SPDX-License-Identifier: Apache-2.0 */
/* Sockets of a real kernel: listening, connecting, non-blocking transfers. Descriptors block; MSG_DONTWAIT does not. */
#include "base/alloc.h"
#include "base/macros.h"
#include "loop/op.h"
#include "loop/real.h"

#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#define LISTEN_BACKLOG 128

/*
 * What a socket may hold that its peer has not read: enough for a big answer to leave at once, while it is still in the
 * processor's caches. The kernel takes memory for what is there, not for the bound; wmem_max may lower it.
 */
#define SEND_BUFFER_BYTES (2 << 20)

struct socket *real_socket_new(const struct engine *engine, int fd)
{
    struct socket *s = xnew(struct socket);
    struct sockaddr_storage sa;
    socklen_t len = sizeof(sa);
    const int one = 1;
    const int send_buffer = SEND_BUFFER_BYTES;

    s->engine = engine;
    s->fd = fd;
    (void)setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &send_buffer, sizeof(send_buffer)); /* only helps */
    if (getsockname(fd, (struct sockaddr *)&sa, &len) == 0) {
        if (sa.ss_family == AF_INET)
            s->port = ntohs(((struct sockaddr_in *)&sa)->sin_port);
        else if (sa.ss_family == AF_INET6)
            s->port = ntohs(((struct sockaddr_in6 *)&sa)->sin6_port);
        if (s->port) /* answers go out in whole batches: waiting for more would only delay them */
            (void)setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
    }
    return s;
}

static int unix_address(struct sockaddr_un *sun, const char *path)
{
    size_t len = strlen(path);

    if (!len)
        return -EINVAL;
    if (len >= sizeof(sun->sun_path))
        return -ENAMETOOLONG;
    memset(sun, 0, sizeof(*sun));
    sun->sun_family = AF_UNIX;
    memcpy(sun->sun_path, path, len + 1);
    return 0;
}

/* A socket that a dead process left behind; never anything else, and never one that somebody listens on. */
static void unlink_stale(const struct sockaddr_un *sun)
{
    struct stat st;
    int fd;
    int r;

    if (lstat(sun->sun_path, &st) < 0 || !S_ISSOCK(st.st_mode))
        return;
    fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return;
    r = connect(fd, (const struct sockaddr *)sun, sizeof(*sun));
    if (r < 0 && errno == ECONNREFUSED)
        (void)unlink(sun->sun_path); /* if it fails, bind tells */
    close(fd);
}

static int listen_unix(struct io_op *op)
{
    struct sockaddr_un sun;
    int r = unix_address(&sun, op->address->path);
    int fd;

    if (r < 0)
        return r;
    fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return -errno;
    unlink_stale(&sun);
    if (bind(fd, (struct sockaddr *)&sun, sizeof(sun)) < 0 || listen(fd, LISTEN_BACKLOG) < 0) {
        r = -errno;
        close(fd);
        return r;
    }
    *op->ret_socket = real_socket_new(op->loop->engine, fd);
    (*op->ret_socket)->unlink_path = xstrdup(sun.sun_path);
    return 0;
}

static int resolve(const struct socket_address *a, bool passive, struct addrinfo **ret)
{
    struct addrinfo hints = {
        .ai_socktype = SOCK_STREAM,
        .ai_flags = passive ? AI_PASSIVE : 0,
    };
    int r = getaddrinfo(a->host && *a->host ? a->host : NULL, a->port, &hints, ret);

    switch (r) {
    case 0:
        return 0;
    case EAI_SYSTEM:
        return -errno;
    case EAI_MEMORY:
        return -ENOMEM;
    case EAI_AGAIN:
        return -EAGAIN;
    default:
        return -EADDRNOTAVAIL;
    }
}

static int listen_inet(struct io_op *op)
{
    struct addrinfo *all;
    const int one = 1;
    int r = resolve(op->address, true, &all);

    if (r < 0)
        return r;
    r = -EADDRNOTAVAIL;
    for (struct addrinfo *ai = all; ai && r < 0; ai = ai->ai_next) {
        int fd = socket(ai->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);

        if (fd < 0) {
            r = -errno;
            continue;
        }
        (void)setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
        if (bind(fd, ai->ai_addr, ai->ai_addrlen) < 0 || listen(fd, LISTEN_BACKLOG) < 0) {
            r = -errno;
            close(fd);
            continue;
        }
        *op->ret_socket = real_socket_new(op->loop->engine, fd);
        r = 0;
    }
    freeaddrinfo(all);
    return r;
}

/* It listens already. */
static int listen_inherited(struct io_op *op)
{
    int fd = op->address->fd;
    int listens = 0;
    socklen_t len = sizeof(listens);

    if (getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &listens, &len) < 0)
        return -errno;
    if (!listens)
        return -EINVAL;
    /* Operations of a ring wait only on descriptors that block. */
    if (fcntl(fd, F_SETFD, FD_CLOEXEC) < 0 || fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) & ~O_NONBLOCK))
        return -errno;
    *op->ret_socket = real_socket_new(op->loop->engine, fd);
    return 0;
}

int64_t real_listen(struct io_op *op)
{
    switch (op->address->family) {
    case SOCKET_UNIX:
        return listen_unix(op);
    case SOCKET_INET:
        return listen_inet(op);
    case SOCKET_INHERITED:
        return listen_inherited(op);
    }
    return -EINVAL;
}

/* Connects without blocking for longer than the deadline. */
static int connect_until(int fd, const struct sockaddr *sa, socklen_t len, struct io_op *op)
{
    struct pollfd pfd = {.fd = fd, .events = POLLOUT};
    int error = 0;
    socklen_t error_len = sizeof(error);

    if (connect(fd, sa, len) == 0)
        return 0;
    if (errno != EINPROGRESS)
        return -errno;
    for (;;) {
        uint64_t now = real_clock(op->loop);
        int ms = -1;

        if (op->len != LOOP_FOREVER)
            ms = op->len > now ? (int)MIN((op->len - now) / NS_PER_MS + 1, (uint64_t)INT32_MAX) : 0;
        if (poll(&pfd, 1, ms) > 0)
            break;
        if (op->len != LOOP_FOREVER && real_clock(op->loop) >= op->len)
            return -ETIMEDOUT;
    }
    if (getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &error_len) < 0)
        return -errno;
    return -error;
}

static int connect_one(struct io_op *op, int family, const struct sockaddr *sa, socklen_t len)
{
    int fd = socket(family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    int r;

    if (fd < 0)
        return -errno;
    r = connect_until(fd, sa, len, op);
    if (r < 0) {
        close(fd);
        return r;
    }
    /* Operations of a ring wait only on descriptors that block. */
    (void)fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) & ~O_NONBLOCK);
    *op->ret_socket = real_socket_new(op->loop->engine, fd);
    return 0;
}

int64_t real_resolve_and_connect(struct io_op *op)
{
    struct sockaddr_un sun;
    struct addrinfo *all;
    int r;

    if (op->address->family == SOCKET_UNIX) {
        r = unix_address(&sun, op->address->path);
        return r < 0 ? r : connect_one(op, AF_UNIX, (struct sockaddr *)&sun, sizeof(sun));
    }
    r = resolve(op->address, false, &all);
    if (r < 0)
        return r;
    r = -EADDRNOTAVAIL;
    for (struct addrinfo *ai = all; ai && r < 0; ai = ai->ai_next)
        r = connect_one(op, ai->ai_family, ai->ai_addr, ai->ai_addrlen);
    freeaddrinfo(all);
    return r;
}

int64_t real_socket_try_send(struct socket *s, const struct iovec *iov, int iov_count)
{
    struct msghdr msg = {.msg_iov = (struct iovec *)(uintptr_t)iov,
                         .msg_iovlen = (size_t)iov_count};
    ssize_t n = sendmsg(s->fd, &msg, MSG_DONTWAIT | MSG_NOSIGNAL);

    return n < 0 ? -errno : n;
}

int64_t real_socket_try_recv(struct socket *s, void *buf, size_t len)
{
    ssize_t n = recv(s->fd, buf, len, MSG_DONTWAIT);

    return n < 0 ? -errno : n;
}

void real_socket_shutdown(struct socket *s)
{
    (void)shutdown(s->fd, SHUT_RDWR); /* not connected any more: then there is nothing to end */
}

void real_socket_close(struct socket *s)
{
    if (s->unlink_path)
        (void)unlink(s->unlink_path); /* gone already is as good */
    close(s->fd);
}
