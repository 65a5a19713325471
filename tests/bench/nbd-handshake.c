/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The client's side of the NBD handshake. It is done once per connection and before anything is
 * measured, so it is plain step-by-step code: each step waits in poll() with what is left of the
 * one deadline.
 */
#include "nbd-handshake.h"

#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "nbd-wire.h"

#define MAX_NAME_BYTES  4096u
#define MAX_REPLY_BYTES 65536u
#define MAX_REPLIES     64u /* to one option: a server may not keep us reading for ever */

uint64_t clock_now_ns(void)
{
    struct timespec ts;

    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

/* Returns 0 when fd is ready for events, or -ETIMEDOUT at the deadline. */
static int wait_ready(int fd, short events, uint64_t deadline_ns)
{
    for (;;) {
        struct pollfd p = {.fd = fd, .events = events};
        uint64_t now = clock_now_ns();
        int r;

        if (now >= deadline_ns)
            return -ETIMEDOUT;
        r = poll(&p, 1, (int)((deadline_ns - now) / 1000000u) + 1);
        if (r > 0)
            return 0;
        if (r < 0 && errno != EINTR)
            return -errno;
    }
}

static int read_full(int fd, void *buf, size_t len, uint64_t deadline_ns)
{
    uint8_t *p = buf;

    while (len > 0) {
        ssize_t n = recv(fd, p, len, 0);
        int r;

        if (n > 0) {
            p += n;
            len -= (size_t)n;
            continue;
        }
        if (n == 0)
            return -ECONNRESET;
        if (errno != EAGAIN && errno != EINTR)
            return -errno;
        r = wait_ready(fd, POLLIN, deadline_ns);
        if (r < 0)
            return r;
    }
    return 0;
}

static int write_full(int fd, const void *buf, size_t len, uint64_t deadline_ns)
{
    const uint8_t *p = buf;

    while (len > 0) {
        ssize_t n = send(fd, p, len, MSG_NOSIGNAL);
        int r;

        if (n >= 0) {
            p += n;
            len -= (size_t)n;
            continue;
        }
        if (errno != EAGAIN && errno != EINTR)
            return -errno;
        r = wait_ready(fd, POLLOUT, deadline_ns);
        if (r < 0)
            return r;
    }
    return 0;
}

static int connect_unix(const char *path, uint64_t deadline_ns)
{
    struct sockaddr_un addr = {.sun_family = AF_UNIX};
    int fd;

    if (strlen(path) >= sizeof(addr.sun_path))
        return -ENAMETOOLONG;
    memcpy(addr.sun_path, path, strlen(path) + 1);
    fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return -errno;
    while (connect(fd, (struct sockaddr *)&addr, sizeof(addr)) < 0) {
        int r = -errno;

        /* A full listen queue is EAGAIN here, and nothing to poll for. */
        if (r != -EAGAIN && r != -EINTR) {
            close(fd);
            return r;
        }
        if (clock_now_ns() >= deadline_ns) {
            close(fd);
            return -ETIMEDOUT;
        }
        nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
    }
    return fd;
}

static int connect_address(const struct addrinfo *ai, uint64_t deadline_ns)
{
    int fd = socket(ai->ai_family, ai->ai_socktype | SOCK_CLOEXEC | SOCK_NONBLOCK, ai->ai_protocol);
    socklen_t len = sizeof(int);
    int one = 1;
    int failure = 0;
    int r;

    if (fd < 0)
        return -errno;
    r = connect(fd, ai->ai_addr, ai->ai_addrlen) < 0 ? -errno : 0;
    if (r == -EINPROGRESS) {
        r = wait_ready(fd, POLLOUT, deadline_ns);
        if (r == 0 && getsockopt(fd, SOL_SOCKET, SO_ERROR, &failure, &len) < 0)
            r = -errno;
        if (r == 0)
            r = -failure;
    }
    if (r < 0) {
        close(fd);
        return r;
    }
    /* A burst is one send, so waiting for more only adds latency. */
    (void)setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one)); /* works without, slower */
    return fd;
}

static int connect_tcp(const char *host, const char *port, uint64_t deadline_ns)
{
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM};
    struct addrinfo *list = NULL;
    int fd = -EHOSTUNREACH;
    int r = getaddrinfo(host, port, &hints, &list);

    if (r != 0) {
        fprintf(stderr, "nbd-load: cannot resolve '%s:%s': %s\n", host, port, gai_strerror(r));
        return -EHOSTUNREACH;
    }
    for (const struct addrinfo *ai = list; ai != NULL && fd < 0; ai = ai->ai_next)
        fd = connect_address(ai, deadline_ns);
    freeaddrinfo(list);
    return fd;
}

static int option_send(int fd, enum nbd_option option, const uint8_t *data, uint32_t len,
                       uint64_t deadline_ns)
{
    uint8_t head[16];
    int r;

    put_be64(head, NBD_OPTION_MAGIC);
    put_be32(head + 8, (uint32_t)option);
    put_be32(head + 12, len);
    r = write_full(fd, head, sizeof(head), deadline_ns);
    return r < 0 ? r : write_full(fd, data, len, deadline_ns);
}

/* Reads one reply to option into buf (MAX_REPLY_BYTES long). */
static int option_reply(int fd, enum nbd_option option, uint8_t *buf, uint32_t *ret_type,
                        uint32_t *ret_len, uint64_t deadline_ns)
{
    uint8_t head[20];
    uint32_t len;
    int r = read_full(fd, head, sizeof(head), deadline_ns);

    if (r < 0)
        return r;
    len = get_be32(head + 16);
    if (get_be64(head) != NBD_OPTION_REPLY || get_be32(head + 8) != (uint32_t)option) {
        fprintf(stderr,
                "nbd-load: the server's answer to option %d has magic %#llx and option %u\n",
                (int)option, (unsigned long long)get_be64(head), get_be32(head + 8));
        return -EPROTO;
    }
    if (len > MAX_REPLY_BYTES) {
        fprintf(
            stderr,
            "nbd-load: the server's answer to option %d is %u bytes long, at most %u are read\n",
            (int)option, len, MAX_REPLY_BYTES);
        return -EPROTO;
    }
    r = read_full(fd, buf, len, deadline_ns);
    if (r < 0)
        return r;
    *ret_type = get_be32(head + 12);
    *ret_len = len;
    return 0;
}

/* Prints a refusal; what the server says is shown without its control characters. */
static int option_refused(enum nbd_option option, uint32_t type, const uint8_t *text, uint32_t len)
{
    fprintf(stderr, "nbd-load: the server refuses option %d with error %u: ", (int)option,
            type & ~NBD_REP_ERROR_BIT);
    for (uint32_t i = 0; i < len && i < 200; i++)
        fputc(text[i] >= 0x20 && text[i] < 0x7f ? text[i] : '?', stderr);
    fputc('\n', stderr);
    return -EPROTO;
}

static int negotiate_structured(int fd, uint64_t deadline_ns)
{
    static uint8_t buf[MAX_REPLY_BYTES];
    uint32_t type;
    uint32_t len;
    int r = option_send(fd, NBD_OPT_STRUCTURED_REPLY, NULL, 0, deadline_ns);

    if (r == 0)
        r = option_reply(fd, NBD_OPT_STRUCTURED_REPLY, buf, &type, &len, deadline_ns);
    if (r < 0)
        return r;
    if (type != NBD_REP_ACK)
        return option_refused(NBD_OPT_STRUCTURED_REPLY, type, buf, len);
    return 0;
}

static int negotiate_go(int fd, const char *name, uint64_t deadline_ns,
                        struct nbd_export *ret_export)
{
    static uint8_t buf[MAX_REPLY_BYTES];
    struct nbd_export export = {0};
    bool known = false;
    size_t name_len = strlen(name);
    int r;

    if (name_len > MAX_NAME_BYTES)
        return -ENAMETOOLONG;
    put_be32(buf, (uint32_t)name_len);
    memcpy(buf + 4, name, name_len);
    put_be16(buf + 4 + name_len, 0);
    r = option_send(fd, NBD_OPT_GO, buf, (uint32_t)name_len + 6, deadline_ns);
    for (unsigned i = 0; r == 0 && i < MAX_REPLIES; i++) {
        uint32_t type;
        uint32_t len;

        r = option_reply(fd, NBD_OPT_GO, buf, &type, &len, deadline_ns);
        if (r < 0)
            return r;
        if (type & NBD_REP_ERROR_BIT)
            return option_refused(NBD_OPT_GO, type, buf, len);
        if (type == NBD_REP_INFO && len == 12 && get_be16(buf) == NBD_INFO_EXPORT) {
            export.size_bytes = get_be64(buf + 2);
            export.flags = get_be16(buf + 10);
            known = true;
        }
        if (type == NBD_REP_ACK && known) {
            *ret_export = export;
            return 0;
        }
        if (type == NBD_REP_ACK)
            break;
    }
    if (r == 0)
        fprintf(stderr, "nbd-load: the server never described export '%s'\n", name);
    return r < 0 ? r : -EPROTO;
}

static int handshake(int fd, const struct nbd_target *target, uint64_t deadline_ns,
                     struct nbd_export *ret_export)
{
    uint8_t greeting[18];
    uint8_t flags[4];
    int r = read_full(fd, greeting, sizeof(greeting), deadline_ns);

    if (r < 0)
        return r;
    if (get_be64(greeting) != NBD_MAGIC || get_be64(greeting + 8) != NBD_OPTION_MAGIC ||
        !(get_be16(greeting + 16) & NBD_FIXED_NEWSTYLE)) {
        fprintf(stderr, "nbd-load: the server does not speak the fixed newstyle handshake\n");
        return -EPROTO;
    }
    put_be32(flags, get_be16(greeting + 16) & (NBD_FIXED_NEWSTYLE | NBD_NO_ZEROES));
    r = write_full(fd, flags, sizeof(flags), deadline_ns);
    if (r == 0 && target->structured)
        r = negotiate_structured(fd, deadline_ns);
    return r < 0 ? r : negotiate_go(fd, target->export_name, deadline_ns, ret_export);
}

int nbd_open(const struct nbd_target *target, uint64_t deadline_ns, struct nbd_export *ret_export)
{
    int fd = target->unix_path != NULL
                 ? connect_unix(target->unix_path, deadline_ns)
                 : connect_tcp(target->tcp_host, target->tcp_port, deadline_ns);
    int r;

    if (fd < 0) {
        fprintf(stderr, "nbd-load: cannot connect to '%s': %s\n",
                target->unix_path != NULL ? target->unix_path : target->tcp_host, strerror(-fd));
        return fd;
    }
    r = handshake(fd, target, deadline_ns, ret_export);
    if (r < 0) {
        fprintf(stderr, "nbd-load: handshake for export '%s' failed: %s\n", target->export_name,
                strerror(-r));
        close(fd);
        return r;
    }
    return fd;
}
