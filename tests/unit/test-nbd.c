/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The NBD server under sim: clients with random requests in random order against a flat array, on a network that cuts and
 * stalls and a disk that fails; and by itself each promise on bounds, deadlines and the end. The random part runs on real
 * threads, too (T2).
 */
#include "base/atomic.h"
#include "base/checked.h"
#include "base/endian.h"
#include "check.h"
#include "exports/export.h"
#include "exports/nbd/nbd-wire.h"
#include "exports/nbd/nbd.h"
#include "formats/list.h"
#include "graph-fixture.h"
#include "graph/change.h"
#include "loop/sim/sim.h"
#include "protocols/list.h"
#include "seeds.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <unistd.h>

#define LOOPS     2
#define CLIENTS   2
#define SLOTS     40
#define PART_SIZE ((uint64_t)64 << 10) /* of the disk, to each client */
#define DISK_SIZE (PART_SIZE * CLIENTS)
#define OPS       80
#define LEN_MAX   ((uint64_t)12 << 10)
#define SOCKET    "/nbd"

static const struct driver *const *const drivers[] = {protocol_drivers, format_drivers, NULL};

/* A daemon's worth: a graph, loops, exports. */
struct world {
    struct graph *graph;
    struct exports *exports;
    struct loop_thread *threads[LOOPS];
    struct socket_address address;
    unsigned deleted;
};

static void count_deleted(const char *id, void *arg)
{
    struct world *w = arg;

    (void)id;
    w->deleted++;
}

static void world_begin(struct world *w, const char *socket_path)
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
    check(exports_co_nbd_start(w->exports, &w->address, 0, &err) == 0);
}

static void world_end(struct world *w)
{
    w->exports = exports_co_free(w->exports);
    w->graph = graph_co_free(w->graph);
    for (unsigned i = 0; i < LOOPS; i++)
        loop_thread_stop(w->threads[i]);
}

static void world_export(struct world *w, const char *node)
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

static void sum_clients(const struct export_picture *e, void *arg)
{
    *(unsigned *)arg += e->clients;
}

static unsigned world_clients(const struct world *w)
{
    unsigned n = 0;

    exports_for_each(w->exports, sum_clients, &n);
    return n;
}

static void pause_ns(uint64_t ns)
{
    (void)co_sleep_until(loop_clock() + ns);
}

/* ---- a client's end of the wire ---- */

static int wire_send(struct socket *s, const void *data, size_t len)
{
    struct iovec iov = {(void *)(uintptr_t)data, len};

    return socket_co_send(s, &iov, 1, LOOP_FOREVER);
}

static int wire_recv(struct socket *s, void *data, size_t len)
{
    return socket_co_recv_all(s, data, len, LOOP_FOREVER);
}

static size_t put_request(uint8_t *p, unsigned flags, unsigned type, uint64_t cookie,
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

static int send_option(struct socket *s, uint32_t option, const void *data, uint32_t len)
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
static int64_t option_result(struct socket *s, uint32_t counted, unsigned *count)
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
static int handshake(struct socket *s, bool structured, bool export_name)
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
static struct socket *try_connect(const struct socket_address *a)
{
    AUTO(error_free) struct error *ignored = NULL;
    struct socket *s;

    return socket_co_connect(&s, a, LOOP_FOREVER, &ignored) == 0 ? s : NULL;
}

static struct socket *must_connect(const struct socket_address *a)
{
    struct socket *s = try_connect(a);

    check(s);
    return s;
}

/* ---- random clients against a flat array ---- */

struct slot {
    bool busy;
    unsigned type;
    unsigned flags;
    uint64_t offset;
    uint32_t len;
    unsigned wrong; /* the error that must come; 0: none */
    uint8_t data[LEN_MAX];
};

struct model;

struct client {
    struct model *model;
    struct prng prng;
    uint64_t begin; /* of its part of the disk */
    struct slot slots[SLOTS];
    /* What each byte is, or, where `doubt`, what else it may be. */
    uint8_t flat[PART_SIZE];
    uint8_t other[PART_SIZE];
    bool doubt[PART_SIZE];
    struct socket *socket;
    bool structured;
    bool broken;  /* the connection, as the sender or the receiver saw it */
    bool no_more; /* the sender has sent what it wants to */
    unsigned done;
    uint8_t out[SLOTS * (NBD_REQUEST_BYTES + LEN_MAX)];
};

struct model {
    struct prng prng;
    struct world world;
    char disk[64];
    char socket[80];
    bool faults;
    bool ending; /* the export is being removed: connections break and stay so */
    unsigned running;
    struct client clients[CLIENTS];
};

static bool changes(unsigned type)
{
    return type == NBD_CMD_WRITE || type == NBD_CMD_WRITE_ZEROES || type == NBD_CMD_TRIM;
}

static bool has_data(unsigned type)
{
    return changes(type) || type == NBD_CMD_READ || type == NBD_CMD_BLOCK_STATUS;
}

/* Two requests in flight may meet only where neither changes anything: else nobody knows what comes out. */
static bool conflicts(const struct client *c, unsigned type, uint64_t offset, uint32_t len)
{
    for (unsigned i = 0; i < SLOTS; i++) {
        const struct slot *s = &c->slots[i];

        if (s->busy && !s->wrong && has_data(s->type) && (changes(type) || changes(s->type)) &&
            ranges_overlap(s->offset, s->len, offset, len))
            return true;
    }
    return false;
}

static bool in_doubt(const struct client *c, uint64_t offset, uint32_t len)
{
    for (uint32_t i = 0; i < len; i++) {
        if (c->doubt[offset - c->begin + i])
            return true;
    }
    return false;
}

static void make_wrong(struct client *c, struct slot *s)
{
    switch (prng_below(&c->prng, 4)) {
    case 0:
        s->type = 8 + (unsigned)prng_below(&c->prng, 65528);
        s->wrong = NBD_EINVAL;
        break;
    case 1:
        s->type = NBD_CMD_READ;
        s->offset = DISK_SIZE - s->len + 1 + prng_below(&c->prng, UINT64_MAX - DISK_SIZE);
        s->wrong = NBD_EINVAL;
        break;
    case 2:
        s->type = prng_chance(&c->prng, 500) ? NBD_CMD_WRITE : NBD_CMD_TRIM;
        s->offset = DISK_SIZE - s->len + 1 + prng_below(&c->prng, UINT64_MAX - DISK_SIZE);
        s->wrong = NBD_ENOSPC;
        break;
    default:
        s->type = NBD_CMD_TRIM;
        s->flags = NBD_CMD_FLAG_FAST_ZERO;
        s->wrong = NBD_EINVAL;
        break;
    }
}

/* Chooses a request for a slot; false if what was chosen would meet another one. */
static bool choose(struct client *c, struct slot *s)
{
    static const unsigned types[] = {
        NBD_CMD_READ,  NBD_CMD_READ,         NBD_CMD_READ,         NBD_CMD_WRITE,
        NBD_CMD_WRITE, NBD_CMD_WRITE,        NBD_CMD_TRIM,         NBD_CMD_FLUSH,
        NBD_CMD_CACHE, NBD_CMD_WRITE_ZEROES, NBD_CMD_BLOCK_STATUS,
    };
    uint64_t most = prng_chance(&c->prng, 100) ? LEN_MAX : 700;

    s->type = types[prng_below(&c->prng, ARRAY_SIZE(types))];
    if (s->type == NBD_CMD_BLOCK_STATUS && !c->structured)
        s->type = NBD_CMD_READ;
    s->wrong = 0;
    s->flags = prng_chance(&c->prng, 100) ? NBD_CMD_FLAG_FUA : 0;
    s->len = 1 + (uint32_t)prng_below(&c->prng, most);
    s->offset = c->begin + prng_below(&c->prng, PART_SIZE - s->len + 1);
    if (prng_chance(&c->prng, 30))
        make_wrong(c, s);
    if (s->wrong)
        return true;
    if (changes(s->type) && in_doubt(c, s->offset, s->len))
        s->type = NBD_CMD_READ;
    if (s->type == NBD_CMD_FLUSH)
        s->offset = s->len = 0;
    if (s->type == NBD_CMD_WRITE_ZEROES) {
        s->flags |= prng_chance(&c->prng, 300) ? NBD_CMD_FLAG_NO_HOLE : 0;
        s->flags |= prng_chance(&c->prng, 300) ? NBD_CMD_FLAG_FAST_ZERO : 0;
    }
    if (s->type == NBD_CMD_BLOCK_STATUS)
        s->flags |= prng_chance(&c->prng, 300) ? NBD_CMD_FLAG_REQ_ONE : 0;
    return !has_data(s->type) || !conflicts(c, s->type, s->offset, s->len);
}

/* What was under way when the connection broke, or failed, may have happened in part. */
static void put_in_doubt(struct client *c, const struct slot *s)
{
    if (s->wrong || !changes(s->type))
        return;
    for (uint32_t i = 0; i < s->len; i++) {
        uint64_t at = s->offset - c->begin + i;

        c->doubt[at] = true;
        c->other[at] = s->type == NBD_CMD_WRITE ? s->data[i] : 0;
    }
}

/* Bytes as they were read: they must be what they can be, and that is what they are from now on. */
static void learn(struct client *c, uint64_t offset, const uint8_t *data, uint32_t len)
{
    for (uint32_t i = 0; i < len; i++) {
        uint64_t at = offset - c->begin + i;

        check(data[i] == c->flat[at] || (c->doubt[at] && data[i] == c->other[at]));
        c->flat[at] = data[i];
        c->doubt[at] = false;
    }
}

static void answered(struct client *c, const struct slot *s)
{
    uint8_t *flat = c->flat + (s->offset - c->begin);

    if (s->type == NBD_CMD_WRITE)
        memcpy(flat, s->data, s->len);
    else if (s->type == NBD_CMD_WRITE_ZEROES)
        memset(flat, 0, s->len);
    else if (s->type == NBD_CMD_TRIM)
        put_in_doubt(c, s);
}

/* An error that may come: what the request deserves, or what the disk did. */
static void failed(struct client *c, struct slot *s, uint32_t error)
{
    if (s->wrong) {
        check(error == s->wrong);
    } else if (error == NBD_ENOTSUP) {
        check(s->type == NBD_CMD_WRITE_ZEROES && (s->flags & NBD_CMD_FLAG_FAST_ZERO));
        put_in_doubt(c, s); /* an unaligned edge may have been written */
    } else {
        check(error == NBD_EIO && c->model->faults);
        put_in_doubt(c, s);
    }
}

static void check_descriptors(const struct client *c, const struct slot *s, const uint8_t *p,
                              size_t count)
{
    uint64_t pos = s->offset - c->begin;
    uint64_t end = pos + s->len;

    check(count > 0 && (count == 1 || !(s->flags & NBD_CMD_FLAG_REQ_ONE)));
    for (size_t i = 0; i < count; i++) {
        uint32_t len = load_be32(p + i * 8);
        uint32_t state = load_be32(p + i * 8 + 4);

        check(len > 0 && len <= end - pos);
        check(i == 0 || state != load_be32(p + (i - 1) * 8 + 4));
        for (uint32_t k = 0; k < len && (state & NBD_STATE_ZERO); k++)
            check(c->flat[pos + k] == 0 || (c->doubt[pos + k] && c->other[pos + k] == 0));
        pos += len;
    }
}

/* The rest of a structured reply: 0, or negative where the connection broke. */
static int take_chunk(struct client *c, struct slot *s, unsigned type, uint32_t len)
{
    uint8_t data[8 + LEN_MAX];
    int r;

    check(len <= sizeof(data));
    r = wire_recv(c->socket, data, len);
    if (r < 0)
        return r;
    if (type == NBD_REPLY_TYPE_ERROR) {
        check(len == 6);
        failed(c, s, load_be32(data));
        return 0;
    }
    check(!s->wrong);
    if (type == NBD_REPLY_TYPE_OFFSET_DATA) {
        check(s->type == NBD_CMD_READ && len == 8 + s->len && load_be64(data) == s->offset);
        learn(c, s->offset, data + 8, s->len);
    } else if (type == NBD_REPLY_TYPE_BLOCK_STATUS) {
        check(s->type == NBD_CMD_BLOCK_STATUS && len % 8 == 4);
        check_descriptors(c, s, data + 4, len / 8);
    } else {
        check(type == NBD_REPLY_TYPE_NONE && len == 0 && s->type != NBD_CMD_READ &&
              s->type != NBD_CMD_BLOCK_STATUS);
        answered(c, s);
    }
    return 0;
}

static int take_simple(struct client *c, struct slot *s, uint32_t error)
{
    uint8_t data[LEN_MAX];
    int r;

    if (error) {
        failed(c, s, error);
        return 0;
    }
    check(!s->wrong);
    if (s->type != NBD_CMD_READ) {
        answered(c, s);
        return 0;
    }
    r = wire_recv(c->socket, data, s->len);
    if (r == 0)
        learn(c, s->offset, data, s->len);
    return r;
}

static struct slot *slot_of(struct client *c, uint64_t cookie)
{
    struct slot *s;

    check(cookie < SLOTS);
    s = &c->slots[cookie];
    check(s->busy);
    return s;
}

static int take_reply(struct client *c)
{
    uint8_t head[20];
    struct slot *s;
    int r = wire_recv(c->socket, head, c->structured ? 20 : 16);

    if (r < 0)
        return r;
    if (c->structured) {
        check(load_be32(head) == NBD_STRUCTURED_REPLY_MAGIC);
        check(load_be16(head + 4) == NBD_REPLY_FLAG_DONE);
        s = slot_of(c, load_be64(head + 8));
        r = take_chunk(c, s, load_be16(head + 6), load_be32(head + 16));
    } else {
        check(load_be32(head) == NBD_SIMPLE_REPLY_MAGIC);
        s = slot_of(c, load_be64(head + 8));
        r = take_simple(c, s, load_be32(head + 4));
    }
    if (r == 0) {
        s->busy = false;
        c->done++;
    }
    return r;
}

static bool any_busy(const struct client *c)
{
    for (unsigned i = 0; i < SLOTS; i++) {
        if (c->slots[i].busy)
            return true;
    }
    return false;
}

static void receive_replies(void *arg)
{
    struct client *c = arg;

    while (!c->broken && (!c->no_more || any_busy(c))) {
        if (!any_busy(c)) {
            pause_ns(20 * NS_PER_US);
            continue;
        }
        if (prng_chance(&c->prng, 10))
            pause_ns(prng_below(&c->prng, 3 * NS_PER_MS)); /* it does not read for a while */
        if (take_reply(c) < 0)
            c->broken = true;
    }
}

/* Some requests in one piece, sent as the network likes it. */
static void send_some(struct client *c)
{
    unsigned want = 1 + (unsigned)prng_below(&c->prng, 12);
    size_t len = 0;

    for (unsigned i = 0; i < SLOTS && want; i++) {
        struct slot *s = &c->slots[i];

        if (s->busy || !choose(c, s))
            continue;
        s->busy = true;
        want--;
        len += put_request(c->out + len, s->flags, s->type, i, s->offset, s->len);
        if (s->type != NBD_CMD_WRITE)
            continue;
        for (uint32_t k = 0; k < s->len; k++)
            s->data[k] = (uint8_t)prng_next(&c->prng);
        memcpy(c->out + len, s->data, s->len);
        len += s->len;
    }
    if (len && wire_send(c->socket, c->out, len) < 0)
        c->broken = true;
}

static void send_disc(struct client *c)
{
    uint8_t disc[NBD_REQUEST_BYTES];

    put_request(disc, 0, NBD_CMD_DISC, 0, 0, 0);
    if (!c->broken && wire_send(c->socket, disc, sizeof(disc)) < 0)
        c->broken = true;
}

static void serve_connection(struct client *c)
{
    bool early = prng_chance(&c->prng, 500); /* a graceful end, with answers under way */
    struct co_scope receiving;
    uint8_t byte;

    co_scope_init(&receiving);
    c->no_more = false;
    check(co_scope_start(&receiving, receive_replies, c) == 0);
    while (!c->broken && c->done < OPS) {
        send_some(c);
        if (prng_chance(&c->prng, 300))
            pause_ns(prng_below(&c->prng, 500 * NS_PER_US));
        else
            co_yield ();
    }
    c->no_more = true;
    if (early)
        send_disc(c);
    co_scope_join(&receiving);
    if (!early)
        send_disc(c);
    if (!c->broken)
        check(socket_co_recv(c->socket, &byte, 1, LOOP_FOREVER) <= 0); /* the server closes */
    for (unsigned i = 0; i < SLOTS; i++) {
        if (c->slots[i].busy)
            put_in_doubt(c, &c->slots[i]);
        c->slots[i].busy = false;
    }
}

/* All connections of one client, one after the other. Requests of a broken one may still run: its end is waited for. */
static void client_run(void *arg)
{
    struct client *c = arg;
    struct model *m = c->model;

    while (c->done < OPS && !m->ending) {
        int r;

        c->socket = try_connect(&m->world.address);
        if (!c->socket) {
            check(m->ending);
            break;
        }
        c->structured = prng_chance(&c->prng, 600);
        c->broken = false;
        r = handshake(c->socket, c->structured, prng_chance(&c->prng, 300));
        if (r == 0)
            serve_connection(c);
        c->socket = socket_free(c->socket);
        check(r == 0 || m->faults || m->ending);
        while (!m->ending && c->done < OPS && world_clients(&m->world) > 0 && m->running == 1)
            pause_ns(100 * NS_PER_US);
        if (c->done < OPS && m->running > 1)
            break; /* who is in doubt cannot tell others' connections from his own: enough */
    }
    m->running--;
}

/* Puts a node between the export and its disk, and takes it out again. */
static void change_graph(struct model *m)
{
    struct error *err = NULL;

    must_add(m->world.graph,
             "{'driver':'raw','node-name':'between','file':'disk','discard':'unmap'}");
    if (graph_co_replace(m->world.graph, "disk", "between", &err) < 0)
        fail_msg("%s", error_text(err));
    pause_ns(prng_below(&m->prng, 500 * NS_PER_US));
    if (graph_co_replace(m->world.graph, "between", "disk", &err) < 0)
        fail_msg("%s", error_text(err));
    must_del(m->world.graph, "between");
}

static void end_exports(struct model *m, bool stop)
{
    struct error *err = NULL;

    m->ending = true;
    if (stop)
        check(exports_co_nbd_stop(m->world.exports, &err) == 0);
    else
        check(exports_del(m->world.exports, "e", true, &err) == 0);
}

static void run_model(void *arg)
{
    struct model *m = arg;
    unsigned end = (unsigned)prng_below(&m->prng, 4); /* 0: removed, 1: stopped under load */
    struct co_scope scope;

    world_begin(&m->world, m->socket);
    must_add(m->world.graph,
             "{'driver':'file','node-name':'disk','filename':'%s','cache':{'direct':%s},"
             "'discard':'unmap'}",
             m->disk, prng_chance(&m->prng, 500) ? "true" : "false");
    world_export(&m->world, "disk");
    co_scope_init(&scope);
    for (unsigned i = 0; i < CLIENTS; i++) {
        struct client *c = &m->clients[i];

        c->model = m;
        c->prng.state = prng_next(&m->prng);
        c->begin = i * PART_SIZE;
        m->running++;
        check(co_scope_start(&scope, client_run, c) == 0);
    }
    for (unsigned i = 0; m->running && (end > 1 || i < 3); i++) {
        pause_ns(prng_below(&m->prng, 2 * NS_PER_MS));
        if (prng_chance(&m->prng, 500))
            change_graph(m);
    }
    if (end <= 1)
        end_exports(m, end == 1);
    co_scope_join(&scope);
    world_end(&m->world);
    check(m->world.deleted == 1);
}

static void check_disk(const struct model *m, const uint8_t *data)
{
    for (unsigned i = 0; i < CLIENTS; i++) {
        const struct client *c = &m->clients[i];

        for (uint64_t k = 0; k < PART_SIZE; k++) {
            uint8_t is = data[c->begin + k];

            if (is != c->flat[k] && !(c->doubt[k] && is == c->other[k]))
                fail_msg("byte %" PRIu64 " is %02x, expected %02x%s", c->begin + k, is, c->flat[k],
                         c->doubt[k] ? " or another" : "");
        }
    }
}

static void test_nbd__random_requests_under_sim(void **state)
{
    (void)state;
    TEST_SEEDS (seed) {
        static struct model m;
        struct sim_file_setup setup = {.type = FILE_TYPE_REGULAR, .size = DISK_SIZE};
        struct sim_fault eio = {.name = "/disk/?", .kind = SIM_ERROR, .error = EIO};
        struct sim_fault reset = {.name = "unix:*", .kind = SIM_RESET, .times = 2};
        struct sim_fault *faults[] = {&eio, &reset};
        struct sim_disk *d = sim_disk_new();
        struct sim_options o;
        uint8_t data[DISK_SIZE];

        memset(&m, 0, sizeof(m));
        m.prng.state = seed;
        (void)snprintf(m.disk, sizeof(m.disk), "/disk/a");
        (void)snprintf(m.socket, sizeof(m.socket), SOCKET);
        setup.tmpfs = seed % 4 == 0;
        setup.no_punch = seed % 5 == 0;
        sim_disk_make(d, m.disk, &setup);
        sim_options_init(&o, seed);
        o.disk = d;
        eio.ops = SIM_OP(IO_READ) | SIM_OP(IO_WRITE);
        eio.per_mille = seed % 3 == 0 ? 10 : 0;
        reset.ops = SIM_OP(IO_SEND) | SIM_OP(IO_RECV);
        reset.per_mille = seed % 2 == 0 ? 5 : 0;
        m.faults = eio.per_mille || reset.per_mille;
        if (m.faults) {
            o.faults = faults;
            o.fault_count = 2;
        }
        assert_int_equal(sim_run(&o, run_model, &m), SIM_RETURNED);
        assert_int_equal(sim_disk_read(d, m.disk, 0, data, sizeof(data)), 0);
        check_disk(&m, data);
        sim_disk_free(d);
    }
}

static void on_real_threads(enum loop_engine engine)
{
    for (unsigned seed = 1; seed <= 6; seed++) {
        static struct model m;
        uint8_t data[DISK_SIZE];
        int fd;

        memset(&m, 0, sizeof(m));
        m.prng.state = seed;
        (void)snprintf(m.disk, sizeof(m.disk), "./test-nbd-disk-XXXXXX");
        fd = mkstemp(m.disk);
        assert_true(fd >= 0);
        assert_int_equal(ftruncate(fd, DISK_SIZE), 0);
        (void)snprintf(m.socket, sizeof(m.socket), "%s.sock", m.disk);
        on_engine(engine, run_model, &m);
        assert_int_equal(pread(fd, data, sizeof(data), 0), sizeof(data));
        close(fd);
        unlink(m.disk);
        check_disk(&m, data);
    }
}

static void test_nbd__random_requests_on_threads(void **state)
{
    (void)state;
    on_real_threads(LOOP_ENGINE_THREADS);
}

static void test_nbd__random_requests_on_io_uring(void **state)
{
    (void)state;
    on_real_threads(LOOP_ENGINE_IO_URING);
}

/* ---- promises, one by one ---- */

static void run_sim(uint64_t seed, co_entry_fn *body, void *arg)
{
    struct sim_options o;

    sim_options_init(&o, seed);
    assert_int_equal(sim_run(&o, body, arg), SIM_RETURNED);
}

struct slow_client {
    const struct socket_address *address;
    uint64_t pace_ns; /* between bytes; 0: it never sends */
    bool greedy;      /* asks for lists and does not read */
    uint64_t lived_ns;
};

static void slow_client_run(void *arg)
{
    struct slow_client *c = arg;
    struct socket *s = must_connect(c->address);
    uint64_t begin = loop_clock();
    uint8_t hello[18];
    uint8_t bytes[4 + 16] = {0, 0, 0, 3};
    size_t sent = 0;

    check(wire_recv(s, hello, sizeof(hello)) == 0);
    store_be64(bytes + 4, NBD_OPTION_MAGIC);
    store_be32(bytes + 12, NBD_OPT_LIST);
    if (c->greedy) {
        check(wire_send(s, bytes, sizeof(bytes)) == 0);
        while (wire_send(s, bytes + 4, 16) == 0)
            ; /* until it is cut off */
    }
    while (!c->greedy) {
        int64_t n =
            socket_co_recv(s, hello, 1, c->pace_ns ? loop_clock() + c->pace_ns : LOOP_FOREVER);

        if (n != -ETIMEDOUT)
            break;
        if (sent < sizeof(bytes) && wire_send(s, bytes + sent++, 1) < 0)
            break;
    }
    c->lived_ns = loop_clock() - begin;
    socket_free(s);
}

static void ten_seconds(void *arg)
{
    struct world w;
    struct slow_client clients[12];
    struct co_scope scope;

    (void)arg;
    world_begin(&w, SOCKET);
    must_add(w.graph, "{'driver':'null-co','node-name':'n'}");
    world_export(&w, "n");
    co_scope_init(&scope);
    for (unsigned i = 0; i < ARRAY_SIZE(clients); i++) {
        clients[i] = (struct slow_client){
            .address = &w.address, .pace_ns = i % 3 * NS_PER_S, .greedy = i % 4 == 3};
        check(co_scope_start(&scope, slow_client_run, &clients[i]) == 0);
    }
    co_scope_join(&scope);
    for (unsigned i = 0; i < ARRAY_SIZE(clients); i++)
        check(clients[i].lived_ns > 9900 * NS_PER_MS && clients[i].lived_ns < 10500 * NS_PER_MS);
    world_end(&w);
}

static void test_nbd__negotiation_takes_ten_seconds_at_most(void **state)
{
    (void)state;
    TEST_SEEDS (seed)
        run_sim(seed, ten_seconds, NULL);
}

/* A server by itself, so that one can look into its connections. */
struct bare {
    struct graph *graph;
    struct loop_thread *thread;
    struct loop *loops[1];
    struct nbd_server *server;
    struct nbd_export export;
    struct socket_address address;
};

static void bare_begin(struct bare *b, const char *node)
{
    struct access access = {.wants = ACCESS_READ | ACCESS_WRITE, .tolerates = ACCESS_ALL};
    struct error *err = NULL;

    *b = (struct bare){.address = {.family = SOCKET_UNIX, .path = SOCKET}};
    b->graph = graph_new(drivers);
    must_add(b->graph, "%s", node);
    check(loop_thread_start(&b->thread, "io", &err) == 0);
    b->loops[0] = loop_thread_loop(b->thread);
    check(nbd_server_co_start(&b->server, &b->address, 0, b->loops, 1, &err) == 0);
    b->export.name = (char *)(uintptr_t) "disk";
    b->export.writable = true;
    check(backend_co_new(&b->export.backend, b->graph, "n", access, "test", &err) == 0);
    b->export.size = backend_size(b->export.backend);
    b->export.alignment = backend_alignment(b->export.backend);
    list_append(&b->server->exports, &b->export.link);
}

static void bare_end(struct bare *b)
{
    while (b->export.clients)
        pause_ns(NS_PER_MS);
    list_remove(&b->export.link);
    backend_co_free(b->export.backend);
    nbd_server_co_stop(b->server);
    loop_thread_stop(b->thread);
    graph_co_free(b->graph);
}

struct burst {
    struct socket *socket;
    unsigned count;
    uint32_t len;
};

static void send_burst(void *arg)
{
    const struct burst *b = arg;
    uint8_t request[NBD_REQUEST_BYTES];

    for (unsigned i = 0; i < b->count; i++) {
        put_request(request, 0, NBD_CMD_READ, i, 0, b->len);
        check(wire_send(b->socket, request, sizeof(request)) == 0);
    }
}

/* What the connection holds, looked at on its own loop. */
struct look {
    struct nbd_connection *connection;
    unsigned count;
    size_t bytes;
};

static void look_there(void *arg)
{
    struct look *l = arg;

    l->count = l->connection->request_count;
    l->bytes = l->connection->request_bytes;
}

/* A client that does not read: it is held at the bound, and gets all its answers when it reads at last. */
static void hold_back(unsigned count, uint32_t len)
{
    struct bare b;
    struct burst burst = {.count = count, .len = len};
    struct look look;
    struct co_scope scope;
    uint8_t *data = xalloc(1, len);
    uint8_t head[16];
    unsigned most = 0;

    bare_begin(&b, "{'driver':'null-co','node-name':'n','size':67108864}");
    burst.socket = must_connect(&b.address);
    check(handshake(burst.socket, false, false) == 0);
    look.connection = list_first(&b.server->connections, struct nbd_connection, link);
    co_scope_init(&scope);
    check(co_scope_start(&scope, send_burst, &burst) == 0);
    for (unsigned i = 0; i < 50; i++) {
        pause_ns(2 * NS_PER_MS);
        check(loop_co_call(b.loops[0], look_there, &look) == 0);
        check(look.count <= NBD_MAX_REQUESTS); /* NBD-3 */
        check(look.bytes < NBD_MAX_BYTES + NBD_MAX_PAYLOAD);
        most = MAX(most, look.count);
    }
    check(most > 1);
    for (unsigned i = 0; i < count; i++) {
        check(wire_recv(burst.socket, head, sizeof(head)) == 0);
        check(load_be32(head + 4) == NBD_OK);
        check(wire_recv(burst.socket, data, len) == 0);
    }
    co_scope_join(&scope);
    free(data);
    socket_free(burst.socket);
    bare_end(&b);
}

static void hold_back_many(void *arg)
{
    (void)arg;
    hold_back(1200, 4096);
}

static void hold_back_big(void *arg)
{
    (void)arg;
    hold_back(8, 16 << 20);
}

static void test_nbd__requests_in_flight_are_bounded(void **state)
{
    (void)state;
    for (uint64_t seed = 1; seed <= 3; seed++)
        run_sim(seed, hold_back_many, NULL);
}

static void test_nbd__bytes_in_flight_are_bounded(void **state)
{
    (void)state;
    run_sim(1, hold_back_big, NULL);
}

/* Requests that the disk never answers, from a client that stays. */
static void send_hanging(struct socket *s)
{
    uint8_t request[NBD_REQUEST_BYTES + 600] = {0};

    put_request(request, 0, NBD_CMD_WRITE, 1, 512, 600);
    check(wire_send(s, request, sizeof(request)) == 0); /* stays in the receive buffer */
    put_request(request, 0, NBD_CMD_READ, 2, 0, 4096);
    for (unsigned i = 0; i < 300; i++)
        check(wire_send(s, request, NBD_REQUEST_BYTES) == 0);
}

static void removal_with_a_dead_disk(void *arg)
{
    bool stop = *(const bool *)arg;
    struct sim_fault hang = {.name = "/disk/?", .kind = SIM_HANG};
    struct sim_file_setup setup = {.type = FILE_TYPE_REGULAR, .size = DISK_SIZE};
    struct error *err = NULL;
    struct world w;
    struct socket *s;
    uint64_t begin;
    uint8_t byte;

    (void)setup;
    world_begin(&w, SOCKET);
    must_add(w.graph, "{'driver':'file','node-name':'n','filename':'/disk/a'}");
    world_export(&w, "n");
    s = must_connect(&w.address);
    check(handshake(s, true, false) == 0);
    hang.ops = SIM_OP(IO_READ) | SIM_OP(IO_WRITE);
    hang.per_mille = 1000;
    sim_fault_add(&hang);
    send_hanging(s);
    pause_ns(50 * NS_PER_MS);
    begin = loop_clock();
    if (stop)
        check(exports_co_nbd_stop(w.exports, &err) == 0);
    else
        check(exports_del(w.exports, "e", true, &err) == 0);
    while (!w.deleted)
        pause_ns(NS_PER_MS);
    /* P4: the drain's deadline, and not much more. */
    check(loop_clock() - begin < graph_change_deadline(w.graph) + NS_PER_S);
    while (socket_co_recv(s, &byte, 1, LOOP_FOREVER) > 0)
        ; /* answers that were under way */
    socket_free(s);
    sim_fault_remove(&hang);
    check(sim_unhang(NULL) > 0); /* into buffers that are still there (G8) */
    pause_ns(50 * NS_PER_MS);
    world_end(&w);
}

static void test_nbd__removal_does_not_wait_for_a_dead_disk(void **state)
{
    (void)state;
    TEST_SEEDS (seed) {
        struct sim_file_setup setup = {.type = FILE_TYPE_REGULAR, .size = DISK_SIZE};
        struct sim_disk *d = sim_disk_new();
        struct sim_options o;
        bool stop = seed % 2;

        sim_disk_make(d, "/disk/a", &setup);
        sim_options_init(&o, seed);
        o.disk = d;
        o.inline_per_mille = 0;
        assert_int_equal(sim_run(&o, removal_with_a_dead_disk, &stop), SIM_RETURNED);
        sim_disk_free(d);
    }
}

/* NBD-1: who tells the connection to go meets its own end. */
static void removal_meets_leaving(void *arg)
{
    struct prng prng = {*(const uint64_t *)arg};
    struct world w;

    world_begin(&w, SOCKET);
    must_add(w.graph, "{'driver':'null-co','node-name':'n','size':65536}");
    for (unsigned turn = 0; turn < 10; turn++) {
        struct socket *s[4];
        struct error *err = NULL;

        world_export(&w, "n");
        for (unsigned i = 0; i < ARRAY_SIZE(s); i++) {
            s[i] = must_connect(&w.address);
            check(handshake(s[i], false, i % 2) == 0);
        }
        for (unsigned i = 0; i < ARRAY_SIZE(s); i++)
            socket_free(s[i]);
        pause_ns(prng_below(&prng, 2) * prng_below(&prng, 400 * NS_PER_US));
        check(exports_del(w.exports, "e", true, &err) == 0);
        while (w.deleted <= turn)
            pause_ns(10 * NS_PER_US);
    }
    world_end(&w);
}

static void test_nbd__removal_meets_clients_that_leave(void **state)
{
    (void)state;
    TEST_SEEDS (seed)
        run_sim(seed, removal_meets_leaving, &seed);
}

/* The server is stopped while exports are added and removed, from other coroutines. */
struct adder {
    struct world *world;
    struct prng prng;
    unsigned turn;
    bool *over;
};

static void add_and_remove(void *arg)
{
    struct adder *a = arg;

    while (!*a->over) {
        char id[8];
        char node[8];
        struct export_options o = {.type = EXPORT_TYPE_NBD, .id = id, .node_name = node};
        AUTO(error_free) struct error *err = NULL;
        AUTO(error_free) struct error *ignored = NULL;

        (void)snprintf(id, sizeof(id), "x%u", a->turn);
        (void)snprintf(node, sizeof(node), "n%u", a->turn % 2);
        if (exports_co_add(a->world->exports, &o, &err) == 0) {
            pause_ns(prng_below(&a->prng, 100 * NS_PER_US));
            (void)exports_del(a->world->exports, id, false, &ignored); /* or it has been stopped */
        }
        pause_ns(prng_below(&a->prng, 50 * NS_PER_US));
    }
}

static void stop_meets_adding(void *arg)
{
    struct prng prng = {*(const uint64_t *)arg};
    struct world w;
    struct adder adders[4];
    struct co_scope scope;
    bool over = false;

    world_begin(&w, SOCKET);
    must_add(w.graph, "{'driver':'file','node-name':'n0','filename':'/disk/a','read-only':true}");
    must_add(w.graph, "{'driver':'null-co','node-name':'n1'}");
    co_scope_init(&scope);
    for (unsigned i = 0; i < ARRAY_SIZE(adders); i++) {
        adders[i] = (struct adder){&w, {prng_next(&prng)}, i, &over};
        check(co_scope_start(&scope, add_and_remove, &adders[i]) == 0);
    }
    for (unsigned turn = 0; turn < 10; turn++) {
        struct error *err = NULL;

        pause_ns(prng_below(&prng, 300 * NS_PER_US));
        check(exports_co_nbd_stop(w.exports, &err) == 0);
        check(exports_co_nbd_start(w.exports, &w.address, 0, &err) == 0);
    }
    over = true;
    co_scope_join(&scope);
    world_end(&w);
}

static void test_nbd__stopping_meets_exports_that_come(void **state)
{
    (void)state;
    TEST_SEEDS (seed) {
        struct sim_file_setup setup = {.type = FILE_TYPE_REGULAR, .size = DISK_SIZE};
        struct sim_disk *d = sim_disk_new();
        struct sim_options o;

        sim_disk_make(d, "/disk/a", &setup);
        sim_options_init(&o, seed);
        o.disk = d;
        assert_int_equal(sim_run(&o, stop_meets_adding, &seed), SIM_RETURNED);
        sim_disk_free(d);
    }
}
