/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The NBD server against a flat array: clients with random requests in random order, on a network that cuts and stalls and a
 * disk that fails, while the graph changes below and exports end. Under sim, and on real threads (T2).
 */
#include "base/checked.h"
#include "base/endian.h"
#include "base/prng.h"
#include "loop/scope.h"
#include "loop/sim/sim.h"
#include "nbd-fixture.h"
#include "seeds.h"

#include <inttypes.h>
#include <stdio.h>
#include <unistd.h>

#define CLIENTS   2
#define SLOTS     40
#define PART_SIZE (DISK_SIZE / CLIENTS) /* of the disk, to each client */
#define OPS       80
#define LEN_MAX   ((uint64_t)12 << 10)
#define SOCKET    "/nbd"

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

static void test_nbd_model__random_requests_under_sim(void **state)
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

static void test_nbd_model__random_requests_on_threads(void **state)
{
    (void)state;
    on_real_threads(LOOP_ENGINE_THREADS);
}

static void test_nbd_model__random_requests_on_io_uring(void **state)
{
    (void)state;
    on_real_threads(LOOP_ENGINE_IO_URING);
}
