/* SPDX-License-Identifier: Apache-2.0 */
/*
 * For tests of the NBD server: a daemon's worth of graph, loops and exports, and a client's end of the wire. All of it is used
 * within coroutines.
 */
#ifndef CAIRN_TESTS_NBD_FIXTURE_H
#define CAIRN_TESTS_NBD_FIXTURE_H

#include "base/endian.h"
#include "check.h"
#include "exports/export.h"
#include "exports/nbd/nbd-wire.h"
#include "exports/nbd/nbd.h"
#include "formats/list.h"
#include "graph-fixture.h"
#include "protocols/list.h"

#include <errno.h>

#define LOOPS     2
#define DISK_SIZE ((uint64_t)128 << 10)

static const struct driver *const *const drivers[] = {protocol_drivers, format_drivers, NULL};

/* A daemon's worth: a graph, loops, exports. */
struct world {
    struct graph *graph;
    struct exports *exports;
    struct loop_thread *threads[LOOPS];
    struct socket_address address;
    unsigned deleted;
};

static inline void count_deleted(const char *id, void *arg)
{
    struct world *w = arg;

    (void)id;
    w->deleted++;
}

/* It listens only: exports_nbd_accept() is left to the test. */
static inline void world_begin_closed(struct world *w, const char *socket_path)
{
    struct loop *loops[LOOPS];
    struct error *err = NULL;

    *w = (struct world){.address = {.family = SOCKET_UNIX, .path = socket_path}};
    for (unsigned i = 0; i < LOOPS; i++) {
        check(loop_thread_start(&w->threads[i], "io", &err) == 0);
        loops[i] = loop_thread_loop(w->threads[i]);
    }
    w->graph = graph_new(drivers);
    w->exports = exports_new(w->graph, loops, LOOPS, count_deleted, w);
    check(exports_co_nbd_listen(w->exports, &w->address, 0, &err) == 0);
}

static inline void world_begin(struct world *w, const char *socket_path)
{
    world_begin_closed(w, socket_path);
    exports_nbd_accept(w->exports);
}

static inline void world_end(struct world *w)
{
    w->exports = exports_co_free(w->exports);
    w->graph = graph_co_free(w->graph);
    for (unsigned i = 0; i < LOOPS; i++)
        loop_thread_stop(w->threads[i]);
}

static inline void world_export(struct world *w, const char *node)
{
    struct export_options o = {
        .type = EXPORT_TYPE_NBD,
        .id = (char *)(uintptr_t) "e",
        .node_name = (char *)(uintptr_t)node,
        .writable = true,
    };
    struct error *err = NULL;

    o.u.nbd.name = (char *)(uintptr_t) "disk";
    if (exports_co_add(w->exports, &o, &err) < 0)
        fail_msg("%s", error_text(err));
}

static inline void sum_clients(const struct export_picture *e, void *arg)
{
    *(unsigned *)arg += e->clients;
}

static inline unsigned world_clients(const struct world *w)
{
    unsigned n = 0;

    exports_for_each(w->exports, sum_clients, &n);
    return n;
}

static inline void pause_ns(uint64_t ns)
{
    (void)co_sleep_until(loop_clock() + ns);
}

/* ---- a client's end of the wire ---- */

static inline int wire_send(struct socket *s, const void *data, size_t len)
{
    struct iovec iov = {(void *)(uintptr_t)data, len};

    return socket_co_send(s, &iov, 1, LOOP_FOREVER);
}

static inline int wire_recv(struct socket *s, void *data, size_t len)
{
    return socket_co_recv_all(s, data, len, LOOP_FOREVER);
}

static inline size_t put_request(uint8_t *p, unsigned flags, unsigned type, uint64_t cookie,
                                 uint64_t offset, uint32_t len)
{
    store_be32(p, NBD_REQUEST_MAGIC);
    store_be16(p + 4, (uint16_t)flags);
    store_be16(p + 6, (uint16_t)type);
    store_be64(p + 8, cookie);
    store_be64(p + 16, offset);
    store_be32(p + 24, len);
    return NBD_REQUEST_BYTES;
}

static inline int send_option(struct socket *s, uint32_t option, const void *data, uint32_t len)
{
    uint8_t head[16];
    int r;

    store_be64(head, NBD_OPTION_MAGIC);
    store_be32(head + 8, option);
    store_be32(head + 12, len);
    r = wire_send(s, head, sizeof(head));
    return r < 0 || !len ? r : wire_send(s, data, len);
}

/* Reads replies up to the last one: its type, or negative. Counts those of this type. */
static inline int64_t option_result(struct socket *s, uint32_t counted, unsigned *count)
{
    for (;;) {
        uint8_t head[20];
        uint8_t data[512];
        uint32_t type;
        int r = wire_recv(s, head, sizeof(head));

        if (r < 0)
            return r;
        check(load_be64(head) == NBD_OPTION_REPLY_MAGIC);
        type = load_be32(head + 12);
        check(load_be32(head + 16) <= sizeof(data));
        r = wire_recv(s, data, load_be32(head + 16));
        if (r < 0)
            return r;
        if (count && type == counted)
            ++*count;
        if (type == NBD_REP_ACK || type & 0x80000000u)
            return type;
    }
}

/* To the transmission phase. 0, or negative where the connection broke. */
static inline int handshake(struct socket *s, bool structured, bool export_name)
{
    static const uint8_t go[] = "\0\0\0\4disk\0\0";
    static const uint8_t context[] = "\0\0\0\4disk\0\0\0\1\0\0\0\x0f"
                                     "base:allocation";
    uint8_t hello[18];
    uint8_t flags[4] = {0, 0, 0, 3};
    int64_t r = wire_recv(s, hello, sizeof(hello));
    unsigned contexts = 0;

    if (r < 0)
        return (int)r;
    check(load_be64(hello) == NBD_MAGIC && load_be64(hello + 8) == NBD_OPTION_MAGIC);
    r = wire_send(s, flags, sizeof(flags));
    if (r == 0 && structured) {
        r = send_option(s, NBD_OPT_STRUCTURED_REPLY, NULL, 0);
        r = r < 0 ? r : option_result(s, 0, NULL);
        check(r < 0 || r == NBD_REP_ACK);
        r = r < 0 ? r : send_option(s, NBD_OPT_SET_META_CONTEXT, context, sizeof(context) - 1);
        r = r < 0 ? r : option_result(s, NBD_REP_META_CONTEXT, &contexts);
        if (r == NBD_REP_ERR_UNKNOWN)
            return -ENOENT;
        check(r < 0 || (r == NBD_REP_ACK && contexts == 1));
    }
    if (r < 0)
        return (int)r;
    if (export_name) {
        uint8_t reply[10];

        r = send_option(s, NBD_OPT_EXPORT_NAME, "disk", 4);
        return r < 0 ? (int)r : wire_recv(s, reply, sizeof(reply));
    }
    r = send_option(s, NBD_OPT_GO, go, sizeof(go) - 1);
    r = r < 0 ? r : option_result(s, 0, NULL);
    check(r < 0 || r == NBD_REP_ACK || r == NBD_REP_ERR_UNKNOWN);
    return r < 0 ? (int)r : r == NBD_REP_ACK ? 0 : -ENOENT;
}

/* NULL if nobody listens. */
static inline struct socket *try_connect(const struct socket_address *a)
{
    AUTO(error_free) struct error *ignored = NULL;
    struct socket *s;

    return socket_co_connect(&s, a, LOOP_FOREVER, &ignored) == 0 ? s : NULL;
}

static inline struct socket *must_connect(const struct socket_address *a)
{
    struct socket *s = try_connect(a);

    check(s);
    return s;
}

#endif
