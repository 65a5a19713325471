/* SPDX-License-Identifier: Apache-2.0 */
/*
 * floor-server: the least that an NBD server can cost on this machine; a yardstick, not a product.
 *
 * One thread, one epoll. A round on a connection is one recv, a pread or pwrite for each request in
 * it, and one send with all answers. Reads go straight into the send buffer, writes straight out of
 * the receive buffer, in pieces as they come. With --direct the file is opened with O_DIRECT and
 * data passes through an aligned buffer, one request at a time.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#include "nbd-wire.h"

#define MAX_REQUEST (2u * 1024u * 1024u)
#define RX_BYTES    (256u * 1024u)
#define TX_BYTES    (MAX_REQUEST + 2u * RX_BYTES)
#define TX_ENOUGH   RX_BYTES /* send when this much has gathered */
#define MAX_EVENTS  64
#define ALIGNMENT   4096u

struct floor {
    int file_fd;
    uint64_t size_bytes;
    bool direct;
    int epoll_fd;
    int listen_fd;
    uint8_t *bounce; /* --direct: one aligned request */
};

struct conn {
    int fd;
    bool wants_out;

    /* Received and not yet parsed. */
    uint8_t *rx;
    size_t rx_start;
    size_t rx_len;

    /* Answers that are not sent yet. */
    uint8_t *tx;
    size_t tx_start;
    size_t tx_len;

    /* The write whose data is coming. */
    bool writing;
    uint64_t cookie;
    uint64_t offset;
    uint32_t left;
    uint32_t filled; /* --direct: bytes in the connection's own buffer */
    uint8_t *payload;
    uint32_t error;
    bool fua;
};

static struct conn *conn_free(struct floor *f, struct conn *c)
{
    (void)f;
    if (c == NULL)
        return NULL;
    close(c->fd); /* leaves the epoll set by itself */
    free(c->rx);
    free(c->tx);
    free(c->payload);
    free(c);
    return NULL;
}

static struct conn *conn_new(struct floor *f, int fd)
{
    struct conn *c = calloc(1, sizeof(*c));

    if (c == NULL) {
        close(fd);
        return NULL;
    }
    c->fd = fd;
    c->rx = malloc(RX_BYTES);
    c->tx = malloc(TX_BYTES);
    c->payload = f->direct ? aligned_alloc(ALIGNMENT, MAX_REQUEST) : NULL;
    if (c->rx == NULL || c->tx == NULL || (f->direct && c->payload == NULL))
        return conn_free(f, c);
    return c;
}

/* Handshake: blocking, with the socket's own timeout; nothing is measured here. */

static int read_full(int fd, void *buf, size_t len)
{
    return recv(fd, buf, len, MSG_WAITALL) == (ssize_t)len ? 0 : -EIO;
}

static int write_full(int fd, const void *buf, size_t len)
{
    return send(fd, buf, len, MSG_NOSIGNAL) == (ssize_t)len ? 0 : -EIO;
}

static int reply(int fd, uint32_t option, uint32_t type, const void *data, uint32_t len)
{
    uint8_t buf[64];

    put_be64(buf, NBD_OPTION_REPLY);
    put_be32(buf + 8, option);
    put_be32(buf + 12, type);
    put_be32(buf + 16, len);
    if (len > 0)
        memcpy(buf + 20, data, len); /* at most 14 bytes */
    return write_full(fd, buf, 20 + len);
}

static uint16_t export_flags(void)
{
    return NBD_EXPORT_HAS_FLAGS | NBD_EXPORT_FLUSH | NBD_EXPORT_FUA | NBD_EXPORT_MULTI_CONN;
}

/* INFO and GO: any name is our one export. */
static int reply_info(const struct floor *f, int fd, uint32_t option)
{
    uint8_t info[14];
    int r;

    put_be16(info, NBD_INFO_BLOCK_SIZE);
    put_be32(info + 2, f->direct ? 512 : 1);
    put_be32(info + 6, 4096);
    put_be32(info + 10, MAX_REQUEST);
    r = reply(fd, option, NBD_REP_INFO, info, 14);
    if (r < 0)
        return r;
    put_be16(info, NBD_INFO_EXPORT);
    put_be64(info + 2, f->size_bytes);
    put_be16(info + 10, export_flags());
    r = reply(fd, option, NBD_REP_INFO, info, 12);
    return r < 0 ? r : reply(fd, option, NBD_REP_ACK, NULL, 0);
}

/* The oldest way in: no reply header, the export's description follows at once. */
static int reply_export_name(const struct floor *f, int fd, bool zeroes)
{
    uint8_t buf[10 + 124] = {0};

    put_be64(buf, f->size_bytes);
    put_be16(buf + 8, export_flags());
    return write_full(fd, buf, zeroes ? sizeof(buf) : 10);
}

/* Answers one option. Returns 1 when transmission begins, 0 to go on, negative to hang up. */
static int negotiate_option(const struct floor *f, int fd, bool zeroes)
{
    uint8_t head[16];
    uint8_t data[8192];
    uint32_t option;
    uint32_t len;
    int r = read_full(fd, head, sizeof(head));

    if (r < 0)
        return r;
    option = get_be32(head + 8);
    len = get_be32(head + 12);
    if (get_be64(head) != NBD_OPTION_MAGIC || len > sizeof(data))
        return -EPROTO;
    if (len > 0 && read_full(fd, data, len) < 0)
        return -EIO;
    switch (option) {
    case NBD_OPT_GO:
        r = reply_info(f, fd, option);
        return r < 0 ? r : 1;
    case NBD_OPT_INFO:
        return reply_info(f, fd, option);
    case NBD_OPT_EXPORT_NAME:
        r = reply_export_name(f, fd, zeroes);
        return r < 0 ? r : 1;
    case NBD_OPT_LIST:
        r = reply(fd, option, NBD_REP_SERVER, "\0\0\0\0", 4);
        return r < 0 ? r : reply(fd, option, NBD_REP_ACK, NULL, 0);
    case NBD_OPT_ABORT:
        (void)reply(fd, option, NBD_REP_ACK, NULL, 0); /* we hang up in any case */
        return -ECONNABORTED;
    default:
        return reply(fd, option, NBD_REP_ERR_UNSUP, NULL, 0);
    }
}

static int handshake(const struct floor *f, int fd)
{
    struct timeval limit = {.tv_sec = 5};
    int buffer_bytes = 2 * 1024 * 1024;
    uint8_t greeting[18];
    uint8_t flags[4];
    int r;

    if (setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit)) < 0)
        return -errno;
    /* So that a whole 256 KiB answer goes out at once; less works too. */
    (void)setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &buffer_bytes, sizeof(buffer_bytes));
    put_be64(greeting, NBD_MAGIC);
    put_be64(greeting + 8, NBD_OPTION_MAGIC);
    put_be16(greeting + 16, NBD_FIXED_NEWSTYLE | NBD_NO_ZEROES);
    r = write_full(fd, greeting, sizeof(greeting));
    if (r == 0)
        r = read_full(fd, flags, sizeof(flags));
    while (r == 0)
        r = negotiate_option(f, fd, !(get_be32(flags) & NBD_NO_ZEROES));
    return r;
}

/* Transmission */

static int want_out(struct floor *f, struct conn *c, bool wants)
{
    /* A client that does not take its answers gets no more of them: then only EPOLLOUT counts. */
    struct epoll_event ev = {.events = wants ? EPOLLOUT : EPOLLIN, .data.ptr = c};

    if (c->wants_out == wants)
        return 0;
    c->wants_out = wants;
    return epoll_ctl(f->epoll_fd, EPOLL_CTL_MOD, c->fd, &ev) < 0 ? -errno : 0;
}

/* Sends what has gathered. Returns 1 when the socket is full, 0 when all is out. */
static int conn_flush(struct floor *f, struct conn *c)
{
    while (c->tx_len > 0) {
        ssize_t n = send(c->fd, c->tx + c->tx_start, c->tx_len, MSG_NOSIGNAL | MSG_DONTWAIT);
        int r;

        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0 && errno == EAGAIN) {
            r = want_out(f, c, true);
            return r < 0 ? r : 1;
        }
        if (n < 0)
            return -errno;
        c->tx_start += (size_t)n;
        c->tx_len -= (size_t)n;
    }
    c->tx_start = 0;
    return want_out(f, c, false);
}

/* Appends an answer's header; there is room, see conn_room. */
static uint8_t *put_reply(struct conn *c, uint64_t cookie, uint32_t error)
{
    uint8_t *p = c->tx + c->tx_start + c->tx_len;

    put_be32(p, NBD_SIMPLE_REPLY_MAGIC);
    put_be32(p + 4, error);
    put_be64(p + 8, cookie);
    c->tx_len += NBD_SIMPLE_REPLY_BYTES;
    return p;
}

static uint32_t nbd_error(int err)
{
    return err == ENOSPC ? NBD_ENOSPC : NBD_EIO;
}

static bool range_ok(const struct floor *f, uint64_t offset, uint32_t len)
{
    return len <= MAX_REQUEST && offset <= f->size_bytes && len <= f->size_bytes - offset;
}

static void do_read(struct floor *f, struct conn *c, uint64_t cookie, uint64_t offset, uint32_t len)
{
    uint8_t *head = put_reply(c, cookie, 0);
    uint8_t *to = f->direct ? f->bounce : head + NBD_SIMPLE_REPLY_BYTES;

    if (!range_ok(f, offset, len)) {
        put_be32(head + 4, NBD_EINVAL);
        return;
    }
    if (pread(f->file_fd, to, len, (off_t)offset) != (ssize_t)len) {
        put_be32(head + 4, NBD_EIO);
        return;
    }
    if (f->direct)
        memcpy(head + NBD_SIMPLE_REPLY_BYTES, to, len);
    c->tx_len += len;
}

static void begin_write(const struct floor *f, struct conn *c, const uint8_t *p)
{
    c->writing = true;
    c->cookie = get_be64(p + 8);
    c->offset = get_be64(p + 16);
    c->left = get_be32(p + 24);
    c->filled = 0;
    c->error = range_ok(f, c->offset, c->left) ? 0 : NBD_EINVAL;
    c->fua = (get_be16(p + 4) & NBD_CMD_FLAG_FUA) != 0;
}

/* Takes n bytes of the write's data. */
static void take_data(struct floor *f, struct conn *c, const uint8_t *p, uint32_t n)
{
    if (c->error == 0 && f->direct) {
        memcpy(c->payload + c->filled, p, n);
        c->filled += n;
    } else if (c->error == 0) {
        if (pwrite(f->file_fd, p, n, (off_t)c->offset) != (ssize_t)n)
            c->error = nbd_error(errno);
        c->offset += n;
    }
    c->left -= n;
}

static void finish_write(struct floor *f, struct conn *c)
{
    if (c->error == 0 && f->direct &&
        pwrite(f->file_fd, c->payload, c->filled, (off_t)c->offset) != (ssize_t)c->filled)
        c->error = nbd_error(errno);
    if (c->error == 0 && c->fua && fdatasync(f->file_fd) < 0)
        c->error = NBD_EIO;
    c->writing = false;
    put_reply(c, c->cookie, c->error);
}

/* Handles one request's header. Returns 0, or negative to hang up. */
static int do_request(struct floor *f, struct conn *c, const uint8_t *p)
{
    uint64_t cookie = get_be64(p + 8);

    if (get_be32(p) != NBD_REQUEST_MAGIC)
        return -EPROTO;
    switch (get_be16(p + 6)) {
    case NBD_CMD_READ:
        do_read(f, c, cookie, get_be64(p + 16), get_be32(p + 24));
        return 0;
    case NBD_CMD_WRITE:
        begin_write(f, c, p);
        return 0;
    case NBD_CMD_FLUSH:
        put_reply(c, cookie, fdatasync(f->file_fd) < 0 ? NBD_EIO : 0);
        return 0;
    case NBD_CMD_DISC:
        return -ECONNABORTED;
    default:
        put_reply(c, cookie, NBD_ENOTSUP);
        return 0;
    }
}

/* The longest answer must fit behind what has gathered. */
static bool conn_room(const struct conn *c)
{
    return c->tx_start + c->tx_len + NBD_SIMPLE_REPLY_BYTES + MAX_REQUEST <= TX_BYTES;
}

/*
 * Parses what was received. Returns 1 when the socket is full, 0 when more input is needed, negative
 * to hang up.
 */
static int conn_parse(struct floor *f, struct conn *c)
{
    for (;;) {
        const uint8_t *p = c->rx + c->rx_start;
        size_t n = NBD_REQUEST_BYTES;
        int r;

        if (c->tx_len >= TX_ENOUGH || !conn_room(c)) {
            r = conn_flush(f, c);
            if (r != 0)
                return r;
        }
        if (c->writing && c->left == 0) {
            finish_write(f, c);
            continue;
        }
        if (c->writing) {
            n = c->rx_len < c->left ? c->rx_len : c->left;
            if (n == 0)
                return 0;
            take_data(f, c, p, (uint32_t)n);
        } else {
            if (c->rx_len < n)
                return 0;
            r = do_request(f, c, p);
            if (r < 0)
                return r;
        }
        c->rx_start += n;
        c->rx_len -= n;
    }
}

static int conn_receive(struct conn *c)
{
    ssize_t n;

    /* What is left over is the beginning of a header. */
    memmove(c->rx, c->rx + c->rx_start, c->rx_len);
    c->rx_start = 0;
    n = recv(c->fd, c->rx + c->rx_len, RX_BYTES - c->rx_len, MSG_DONTWAIT);
    if (n < 0 && (errno == EAGAIN || errno == EINTR))
        return 0;
    if (n <= 0)
        return -ECONNRESET;
    c->rx_len += (size_t)n;
    return 0;
}

/* One round on a connection. Returns negative to hang up. */
static int conn_event(struct floor *f, struct conn *c)
{
    int r;

    if (c->wants_out) {
        r = conn_flush(f, c);
        if (r != 0)
            return r < 0 ? r : 0;
    } else {
        r = conn_receive(c);
        if (r < 0)
            return r;
    }
    r = conn_parse(f, c);
    if (r == 0)
        r = conn_flush(f, c);
    return r < 0 ? r : 0;
}

/* Start and listen */

static void accept_client(struct floor *f)
{
    int fd = accept4(f->listen_fd, NULL, NULL, SOCK_CLOEXEC);
    struct epoll_event ev = {.events = EPOLLIN};
    struct conn *c;

    if (fd < 0)
        return;
    if (handshake(f, fd) < 0) {
        close(fd);
        return;
    }
    c = conn_new(f, fd);
    if (c == NULL)
        return;
    ev.data.ptr = c;
    if (epoll_ctl(f->epoll_fd, EPOLL_CTL_ADD, fd, &ev) < 0)
        conn_free(f, c);
}

static int listen_unix(const char *path)
{
    struct sockaddr_un addr = {.sun_family = AF_UNIX};
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

    if (fd < 0 || strlen(path) >= sizeof(addr.sun_path))
        return -1;
    memcpy(addr.sun_path, path, strlen(path) + 1);
    if (bind(fd, (struct sockaddr *)&addr, sizeof(addr)) < 0 || listen(fd, 128) < 0) {
        close(fd);
        return -1;
    }
    return fd;
}

static int floor_open(struct floor *f, const char *file, const char *socket_path)
{
    struct epoll_event ev = {.events = EPOLLIN, .data.ptr = NULL};
    struct stat st;

    f->file_fd = open(file, O_RDWR | O_CLOEXEC | (f->direct ? O_DIRECT : 0));
    if (f->file_fd < 0 || fstat(f->file_fd, &st) < 0) {
        fprintf(stderr, "floor-server: cannot open '%s': %s\n", file, strerror(errno));
        return -1;
    }
    f->size_bytes = (uint64_t)st.st_size;
    f->bounce = aligned_alloc(ALIGNMENT, MAX_REQUEST);
    f->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    f->listen_fd = listen_unix(socket_path);
    if (f->bounce == NULL || f->epoll_fd < 0 || f->listen_fd < 0 ||
        epoll_ctl(f->epoll_fd, EPOLL_CTL_ADD, f->listen_fd, &ev) < 0) {
        fprintf(stderr, "floor-server: cannot listen on '%s': %s\n", socket_path, strerror(errno));
        return -1;
    }
    return 0;
}

static int floor_run(struct floor *f)
{
    for (;;) {
        struct epoll_event events[MAX_EVENTS];
        int n = epoll_wait(f->epoll_fd, events, MAX_EVENTS, -1);

        if (n < 0 && errno != EINTR)
            return -errno;
        for (int i = 0; i < n; i++) {
            struct conn *c = events[i].data.ptr;

            if (c == NULL)
                accept_client(f);
            else if (conn_event(f, c) < 0)
                conn_free(f, c);
        }
    }
}

int main(int argc, char **argv)
{
    struct floor f = {0};
    int at = 1;

    if (at < argc && strcmp(argv[at], "--direct") == 0) {
        f.direct = true;
        at++;
    }
    if (argc - at != 2) {
        fprintf(stderr, "usage: floor-server [--direct] SOCKET FILE\n");
        return 2;
    }
    if (floor_open(&f, argv[at + 1], argv[at]) < 0)
        return 1;
    floor_run(&f);
    return 1;
}
