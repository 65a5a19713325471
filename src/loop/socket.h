/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Stream sockets, as awaitable I/O. A socket may be handed to another loop as long as nobody waits on it; each direction has
 * one waiter at most.
 */
#ifndef CAIRN_LOOP_SOCKET_H
#define CAIRN_LOOP_SOCKET_H

#include "base/context.h"
#include "base/error.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

struct socket;

enum socket_family { SOCKET_UNIX, SOCKET_INET, SOCKET_INHERITED };

struct socket_address {
    enum socket_family family;
    const char *path; /* SOCKET_UNIX: at most 107 bytes */
    const char *host; /* SOCKET_INET: name or address; "" or NULL to listen on all */
    const char *port; /* SOCKET_INET: number or service */
    int fd; /* SOCKET_INHERITED: what whoever started the process has left it, to listen on only; it is taken */
};

/*
 * Listens. A Unix path is unlinked first if it is a socket that nobody listens on; it is unlinked again when the socket
 * is closed. Yields.
 */
int co_fn socket_co_listen(struct socket **ret, const struct socket_address *address,
                           struct error **err);
int co_fn socket_co_accept(struct socket *listener, struct socket **ret, uint64_t deadline_ns);
int co_fn socket_co_connect(struct socket **ret, const struct socket_address *address,
                            uint64_t deadline_ns, struct error **err);

/* Returns the number of bytes, at least 1; 0 at the end of the stream. */
int64_t co_fn socket_co_recv(struct socket *s, void *buf, size_t len, uint64_t deadline_ns);
/* Receives exactly len bytes: 0; -ECONNRESET at an early end. */
int co_fn socket_co_recv_all(struct socket *s, void *buf, size_t len, uint64_t deadline_ns);
/* Sends all of it. The iov array is used up as it goes. */
int co_fn socket_co_send(struct socket *s, struct iovec *iov, int iov_count, uint64_t deadline_ns);

/* Send or receive what goes at once, without waiting: number of bytes, or -EAGAIN. */
int64_t socket_try_send(struct socket *s, const struct iovec *iov, int iov_count);
int64_t socket_try_recv(struct socket *s, void *buf, size_t len);

/* Ends both directions: waiters get 0 or an error. From the loop that the socket is used on. */
void socket_shutdown(struct socket *s);
/* Closes. No one may wait on it. Returns NULL; NULL is fine. */
struct socket *socket_free(struct socket *s);

/* "unix:PATH" or "HOST:PORT" of the peer or, for a listener, of itself; for messages. Valid as long as the socket. */
const char *socket_name(const struct socket *s);
/* The local port of a SOCKET_INET socket, else 0. */
unsigned socket_port(const struct socket *s);

#endif
