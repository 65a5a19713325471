/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The engine of the load generator: one thread, epoll, many connections, many requests on each.
 *
 * It must cost much less than the servers that it measures, so it works in bursts: one recv takes
 * as many answers as have come, each answer frees a slot, all free slots are filled anew, and one
 * sendmsg sends them all. Data that nobody checks is never touched.
 *
 * The server is not trusted: each length is checked before it is used, each answer must name a
 * request that is in flight on this connection, and a request that is not answered within the
 * timeout ends the run.
 */
#include "load.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define RX_BYTES       (256u * 1024u)
#define MAX_IOV        1024u
#define MAX_EVENTS     64
#define LOOK_AROUND_NS 100000000u /* how often ages are looked at */

/* Returns -EPROTO, so that a parser can end with it. */
static int broken(const struct load_conn *c, const char *what, uint64_t value)
{
    fprintf(stderr, "nbd-load: connection %u: %s (%#llx)\n", c->index, what,
            (unsigned long long)value);
    return -EPROTO;
}

static int conn_allocate(struct load *l, struct load_conn *c, unsigned index)
{
    c->index = index;
    c->fd = -1;
    c->slots = calloc(l->depth, sizeof(*c->slots));
    c->free = calloc(l->depth, sizeof(*c->free));
    c->tx = calloc(l->depth, sizeof(*c->tx));
    if (c->slots == NULL || c->free == NULL || c->tx == NULL)
        return -ENOMEM;
    for (uint32_t i = 0; i < l->depth; i++)
        c->free[i] = l->depth - 1 - i;
    c->n_free = l->depth;
    return 0;
}

int load_open(struct load *l)
{
    uint64_t deadline = clock_now_ns() + l->timeout_ns;

    l->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    l->rx = malloc(sizeof(l->conns->residue) + RX_BYTES);
    l->conns = calloc(l->n_conns, sizeof(*l->conns));
    if (l->epoll_fd < 0 || l->rx == NULL || l->conns == NULL) {
        fprintf(stderr, "nbd-load: no memory or no epoll\n");
        return -ENOMEM;
    }
    for (unsigned i = 0; i < l->n_conns; i++)
        l->conns[i].fd = -1;
    for (unsigned i = 0; i < l->n_conns; i++) {
        struct load_conn *c = &l->conns[i];
        struct epoll_event ev = {.events = EPOLLIN, .data.ptr = c};
        int r = conn_allocate(l, c, i);

        if (r < 0)
            return r;
        c->fd = nbd_open(&l->target, deadline, &l->export);
        if (c->fd < 0)
            return c->fd;
        if (epoll_ctl(l->epoll_fd, EPOLL_CTL_ADD, c->fd, &ev) < 0)
            return -errno;
    }
    return 0;
}

void load_close(struct load *l)
{
    for (unsigned i = 0; l->conns != NULL && i < l->n_conns; i++) {
        struct load_conn *c = &l->conns[i];

        if (c->fd >= 0) {
            uint8_t bye[NBD_REQUEST_BYTES] = {0};

            put_be32(bye, NBD_REQUEST_MAGIC);
            put_be16(bye + 6, NBD_CMD_DISC);
            /* After a failure the stream may be cut inside a request: the server sees the close. */
            if (c->tx_count == 0)
                (void)send(c->fd, bye, sizeof(bye), MSG_NOSIGNAL | MSG_DONTWAIT);
            close(c->fd);
        }
        free(c->slots);
        free(c->free);
        free(c->tx);
    }
    free(l->conns);
    free(l->rx);
    if (l->epoll_fd >= 0)
        close(l->epoll_fd);
    l->conns = NULL;
}

/* Sending */

static void slot_encode(struct load_slot *s, uint32_t index)
{
    put_be32(s->wire, NBD_REQUEST_MAGIC);
    put_be16(s->wire + 4, 0);
    put_be16(s->wire + 6, (uint16_t)s->command);
    put_be64(s->wire + 8, (uint64_t)s->generation << 32 | index);
    put_be64(s->wire + 16, s->offset);
    put_be32(s->wire + 24, s->length);
}

/* Takes free slots and fills them as long as the workload has something to do. */
static void conn_fill(struct load *l, struct load_conn *c, uint64_t now_ns)
{
    while (c->n_free > 0) {
        uint32_t index = c->free[c->n_free - 1];
        struct load_slot *s = &c->slots[index];
        uint32_t tail = c->tx_head + c->tx_count;

        s->start_ns = 0;
        if (!l->workload->next(l, c, s, now_ns))
            return;
        if (s->start_ns == 0)
            s->start_ns = now_ns;
        c->n_free--;
        s->busy = true;
        s->got = 0;
        s->error = 0;
        s->generation++;
        slot_encode(s, index);
        c->tx[tail < l->depth ? tail : tail - l->depth] = index;
        c->tx_count++;
        l->in_flight++;
    }
}

static size_t slot_tx_bytes(const struct load_slot *s)
{
    return NBD_REQUEST_BYTES + (s->command == NBD_CMD_WRITE ? s->length : 0);
}

/* Adds what is left of a slot's bytes after `skip`; returns the number of vectors. */
static unsigned slot_vectors(struct load_slot *s, size_t skip, struct iovec *iov)
{
    unsigned n = 0;

    if (skip < NBD_REQUEST_BYTES) {
        iov[n++] = (struct iovec){s->wire + skip, NBD_REQUEST_BYTES - skip};
        skip = 0;
    } else {
        skip -= NBD_REQUEST_BYTES;
    }
    if (s->command == NBD_CMD_WRITE)
        iov[n++] = (struct iovec){s->data + skip, s->length - skip};
    return n;
}

static void conn_sent(struct load *l, struct load_conn *c, size_t bytes)
{
    bytes += c->tx_sent;
    while (c->tx_count > 0) {
        size_t whole = slot_tx_bytes(&c->slots[c->tx[c->tx_head]]);

        if (bytes < whole)
            break;
        bytes -= whole;
        c->tx_head = c->tx_head + 1 < l->depth ? c->tx_head + 1 : 0;
        c->tx_count--;
    }
    c->tx_sent = bytes;
}

static int conn_want_out(struct load *l, struct load_conn *c, bool wants)
{
    struct epoll_event ev = {.events = EPOLLIN | (wants ? (uint32_t)EPOLLOUT : 0u), .data.ptr = c};

    if (c->wants_out == wants)
        return 0;
    c->wants_out = wants;
    return epoll_ctl(l->epoll_fd, EPOLL_CTL_MOD, c->fd, &ev) < 0 ? -errno : 0;
}

/* Sends what waits: as a rule all of it in one call. */
static int conn_flush(struct load *l, struct load_conn *c)
{
    static struct iovec iov[MAX_IOV];

    while (c->tx_count > 0) {
        struct msghdr msg = {.msg_iov = iov};
        size_t skip = c->tx_sent;
        uint32_t at = c->tx_head;
        ssize_t n;

        for (uint32_t i = 0; i < c->tx_count && msg.msg_iovlen + 2 <= MAX_IOV; i++) {
            msg.msg_iovlen += slot_vectors(&c->slots[c->tx[at]], skip, iov + msg.msg_iovlen);
            skip = 0;
            at = at + 1 < l->depth ? at + 1 : 0;
        }
        n = sendmsg(c->fd, &msg, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0 && errno == EAGAIN)
            return conn_want_out(l, c, true);
        if (n < 0)
            return broken(c, "send failed", (uint64_t)errno);
        l->n_sends++;
        conn_sent(l, c, (size_t)n);
    }
    return conn_want_out(l, c, false);
}

/* Receiving */

static int slot_finish(struct load *l, struct load_conn *c, struct load_slot *s, uint64_t now_ns)
{
    int r;

    if (s->command == NBD_CMD_READ && s->error == 0 && s->got != s->length)
        return broken(c, "a read was answered with too little data", s->got);
    s->busy = false;
    l->in_flight--;
    r = l->workload->done(l, c, s, now_ns);
    c->free[c->n_free++] = (uint32_t)(s - c->slots);
    return r;
}

static struct load_slot *conn_find(struct load *l, struct load_conn *c, uint64_t cookie)
{
    uint32_t index = (uint32_t)cookie;
    struct load_slot *s;

    if (index >= l->depth)
        return NULL;
    s = &c->slots[index];
    return s->busy && s->generation == cookie >> 32 ? s : NULL;
}

/* Hands over up to len bytes of a read's data; returns how many were taken. */
static size_t conn_take_data(struct load_conn *c, const uint8_t *p, size_t len)
{
    size_t n = len < c->rx_left ? len : (size_t)c->rx_left;

    if (c->rx_slot->data != NULL)
        memcpy(c->rx_slot->data + c->rx_at, p, n);
    c->rx_at += n;
    c->rx_left -= n;
    return n;
}

/* Returns the bytes taken, 0 when the header is not all there, or a negative errno. */
static ssize_t conn_simple(struct load *l, struct load_conn *c, const uint8_t *p, size_t len)
{
    struct load_slot *s;

    if (len < NBD_SIMPLE_REPLY_BYTES)
        return 0;
    s = conn_find(l, c, get_be64(p + 8));
    if (s == NULL)
        return broken(c, "an answer to no request of ours, cookie", get_be64(p + 8));
    if (l->target.structured && s->command == NBD_CMD_READ)
        return broken(c, "a simple answer to a read although structured ones were agreed, cookie",
                      get_be64(p + 8));
    s->error = get_be32(p + 4);
    c->rx_slot = s;
    c->rx_at = 0;
    c->rx_left = s->command == NBD_CMD_READ && s->error == 0 ? s->length : 0;
    c->rx_last = true;
    s->got = (uint32_t)c->rx_left;
    return NBD_SIMPLE_REPLY_BYTES;
}

/* A range inside a read's answer must lie in what was asked for. */
static int chunk_range(struct load_conn *c, const struct load_slot *s, uint64_t offset,
                       uint64_t len)
{
    if (s->command != NBD_CMD_READ)
        return broken(c, "data in answer to a request that reads nothing, offset", offset);
    if (offset < s->offset || len > s->length || offset - s->offset > s->length - len)
        return broken(c, "a chunk of data outside of what was asked for, offset", offset);
    if (s->got + len > s->length)
        return broken(c, "a read was answered with too much data, offset", offset);
    return 0;
}

/* OFFSET_DATA: 8 bytes of offset, then the data. body points behind the chunk's header. */
static int chunk_data(struct load_conn *c, struct load_slot *s, const uint8_t *body, uint32_t len)
{
    int r = chunk_range(c, s, get_be64(body), len - 8u);

    if (r < 0)
        return r;
    c->rx_at = get_be64(body) - s->offset;
    c->rx_left = len - 8u;
    s->got += len - 8u;
    return 0;
}

/* OFFSET_HOLE: 8 bytes of offset, 4 of length. */
static int chunk_hole(struct load_conn *c, struct load_slot *s, const uint8_t *body)
{
    uint32_t len = get_be32(body + 8);
    int r = chunk_range(c, s, get_be64(body), len);

    if (r < 0)
        return r;
    if (s->data != NULL)
        memset(s->data + (get_be64(body) - s->offset), 0, len);
    s->got += len;
    return 0;
}

/* As conn_simple, for one chunk of a structured answer. */
static ssize_t conn_chunk(struct load *l, struct load_conn *c, const uint8_t *p, size_t len)
{
    const uint8_t *body = p + NBD_CHUNK_BYTES;
    struct load_slot *s;
    uint32_t payload;
    uint32_t fixed; /* how much of the payload is taken with the header */
    uint16_t type;
    int r = 0;

    if (len < NBD_CHUNK_BYTES)
        return 0;
    type = get_be16(p + 6);
    payload = get_be32(p + 16);
    fixed = type == NBD_CHUNK_OFFSET_DATA   ? 8
            : type == NBD_CHUNK_OFFSET_HOLE ? 12
            : type & NBD_CHUNK_ERROR_BIT    ? 6
                                            : 0;
    if (!l->target.structured)
        return broken(c, "a structured answer that was not agreed, type", type);
    if (payload < fixed || (type == NBD_CHUNK_NONE && payload != 0) ||
        (type == NBD_CHUNK_OFFSET_HOLE && payload != fixed) ||
        (type & NBD_CHUNK_ERROR_BIT && payload > 65536))
        return broken(c, "a chunk with a length that its type forbids", payload);
    if (type > NBD_CHUNK_OFFSET_HOLE && !(type & NBD_CHUNK_ERROR_BIT))
        return broken(c, "a chunk of a type that was never agreed", type);
    if (len < NBD_CHUNK_BYTES + fixed)
        return 0;
    s = conn_find(l, c, get_be64(p + 8));
    if (s == NULL)
        return broken(c, "a chunk for no request of ours, cookie", get_be64(p + 8));
    c->rx_slot = s;
    c->rx_left = 0;
    if (type == NBD_CHUNK_OFFSET_DATA)
        r = chunk_data(c, s, body, payload);
    else if (type == NBD_CHUNK_OFFSET_HOLE)
        r = chunk_hole(c, s, body);
    else if (type & NBD_CHUNK_ERROR_BIT)
        s->error = get_be32(body);
    if (r < 0)
        return r;
    c->rx_skip = type & NBD_CHUNK_ERROR_BIT ? payload - fixed : 0;
    c->rx_last = (get_be16(p + 4) & NBD_CHUNK_DONE) != 0;
    return (ssize_t)(NBD_CHUNK_BYTES + fixed);
}

static ssize_t conn_header(struct load *l, struct load_conn *c, const uint8_t *p, size_t len)
{
    uint32_t magic;

    if (len < 4)
        return 0;
    magic = get_be32(p);
    if (magic == NBD_SIMPLE_REPLY_MAGIC)
        return conn_simple(l, c, p, len);
    if (magic == NBD_STRUCTURED_REPLY_MAGIC)
        return conn_chunk(l, c, p, len);
    return broken(c, "an answer with the magic", magic);
}

/* Parses all that came; the beginning of a header that is left over waits in the residue. */
static int conn_parse(struct load *l, struct load_conn *c, const uint8_t *p, size_t len,
                      uint64_t now_ns)
{
    while (len > 0) {
        ssize_t n;

        if (c->rx_left > 0) {
            n = (ssize_t)conn_take_data(c, p, len);
        } else if (c->rx_skip > 0) {
            n = (ssize_t)(len < c->rx_skip ? len : c->rx_skip);
            c->rx_skip -= (uint64_t)n;
        } else {
            n = conn_header(l, c, p, len);
            if (n < 0)
                return (int)n;
            if (n == 0)
                break;
        }
        p += n;
        len -= (size_t)n;
        if (c->rx_slot != NULL && c->rx_left == 0 && c->rx_skip == 0) {
            struct load_slot *s = c->rx_slot;

            c->rx_slot = NULL;
            if (c->rx_last) {
                int r = slot_finish(l, c, s, now_ns);

                if (r < 0)
                    return r;
            }
        }
    }
    memcpy(c->residue, p, len); /* less than the longest header, 32 bytes */
    c->residue_len = len;
    return 0;
}

static int conn_receive(struct load *l, struct load_conn *c)
{
    ssize_t n;

    memcpy(l->rx, c->residue, c->residue_len);
    n = recv(c->fd, l->rx + c->residue_len, RX_BYTES, MSG_DONTWAIT);
    if (n < 0 && (errno == EAGAIN || errno == EINTR))
        return 0;
    if (n < 0)
        return broken(c, "receive failed", (uint64_t)errno);
    if (n == 0)
        return broken(c, "the server closed the connection; requests without an answer",
                      l->in_flight);
    l->n_recvs++;
    return conn_parse(l, c, l->rx, c->residue_len + (size_t)n, clock_now_ns());
}

/* Running */

/* Fails when a request has been in flight for longer than the timeout. */
static int check_ages(const struct load *l, uint64_t now_ns)
{
    for (unsigned i = 0; i < l->n_conns; i++) {
        const struct load_conn *c = &l->conns[i];

        for (unsigned j = 0; j < l->depth; j++) {
            const struct load_slot *s = &c->slots[j];

            if (s->busy && now_ns > s->start_ns && now_ns - s->start_ns > l->timeout_ns) {
                fprintf(
                    stderr,
                    "nbd-load: connection %u: request at %llu, %u bytes, has had no answer for %.1f s\n",
                    i, (unsigned long long)s->offset, s->length,
                    (double)(now_ns - s->start_ns) / 1e9);
                return -ETIMEDOUT;
            }
        }
    }
    return 0;
}

static int fill_all(struct load *l)
{
    uint64_t now = clock_now_ns();

    for (unsigned i = 0; i < l->n_conns; i++) {
        int r;

        conn_fill(l, &l->conns[i], now);
        r = conn_flush(l, &l->conns[i]);
        if (r < 0)
            return r;
    }
    return 0;
}

static int handle_event(struct load *l, const struct epoll_event *ev)
{
    struct load_conn *c = ev->data.ptr;
    int r = 0;

    if (ev->events & (EPOLLIN | EPOLLHUP | EPOLLERR))
        r = conn_receive(l, c);
    if (r < 0)
        return r;
    conn_fill(l, c, clock_now_ns());
    /* While the socket is full, only EPOLLOUT makes another try worth its system call. */
    return c->wants_out && !(ev->events & EPOLLOUT) ? 0 : conn_flush(l, c);
}

int load_run(struct load *l)
{
    uint64_t look_ns = clock_now_ns() + LOOK_AROUND_NS;
    int r = fill_all(l);

    while (r == 0) {
        struct epoll_event events[MAX_EVENTS];
        uint64_t now = clock_now_ns();
        uint64_t wake_ns = look_ns;
        uint64_t wanted_ns = UINT64_MAX;
        struct timespec wait = {0};
        int n;

        if (now >= look_ns) {
            r = check_ages(l, now);
            if (r < 0)
                return r;
            look_ns = now + LOOK_AROUND_NS;
            wake_ns = look_ns;
        }
        r = l->workload->round(l, now, &wanted_ns);
        if (r != 0)
            return r < 0 ? r : 0;
        if (wanted_ns < wake_ns)
            wake_ns = wanted_ns;
        if (wake_ns > now)
            wait.tv_nsec = (long)(wake_ns - now); /* below LOOK_AROUND_NS */
        n = epoll_pwait2(l->epoll_fd, events, MAX_EVENTS, &wait, NULL);
        if (n < 0 && errno != EINTR)
            return -errno;
        for (int i = 0; i < n && r == 0; i++)
            r = handle_event(l, &events[i]);
        /* The workload's own time came: what it held back may go now, on any connection. */
        if (r == 0 && wanted_ns != UINT64_MAX && clock_now_ns() >= wanted_ns)
            r = fill_all(l);
    }
    return r;
}
