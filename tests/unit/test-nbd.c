/* SPDX-License-Identifier: Apache-2.0 */
/* The NBD server under sim: each promise on bounds, deadlines and the end, by itself. */
#include "base/endian.h"
#include "base/prng.h"
#include "loop/scope.h"
#include "loop/sim/sim.h"
#include "nbd-fixture.h"
#include "seeds.h"
#include "sim-run.h"

#include <errno.h>
#include <stdio.h>

#define SOCKET "/nbd"

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
    nbd_server_accept(b->server);
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

        sim_disk_make(d, "/disk/a", &setup);
        assert_int_equal(run_on(d, seed, stop_meets_adding, &seed), SIM_RETURNED);
        sim_disk_free(d);
    }
}

/* ---- the first client and the last one (NBD-4) ---- */

static void count_idle(void *arg)
{
    ++*(unsigned *)arg;
}

/* Until the server has seen what the clients did. */
static void settle(void)
{
    pause_ns(200 * NS_PER_MS);
}

static void come_and_go(void *arg)
{
    uint8_t hello[18];
    unsigned idle = 0;
    struct world w;
    struct socket *early;
    struct socket *late;

    (void)arg;
    world_begin_closed(&w, SOCKET);
    exports_nbd_on_idle(w.exports, count_idle, &idle);
    early = must_connect(&w.address);
    check(socket_co_recv(early, hello, 1, loop_clock() + 5 * NS_PER_S) == -ETIMEDOUT);
    must_add(w.graph, "{'driver':'null-co','node-name':'n'}");
    world_export(&w, "n");
    exports_nbd_accept(w.exports);
    check(handshake(early, true, false) == 0);

    /* One that never came to the export does not count, whether another is there or not. */
    late = must_connect(&w.address);
    check(wire_recv(late, hello, sizeof(hello)) == 0);
    socket_free(late);
    settle();
    check(idle == 0);
    late = must_connect(&w.address);
    check(handshake(late, true, false) == 0);
    socket_free(early);
    settle();
    check(idle == 0); /* the other one is still there */
    socket_free(late);
    settle();
    check(idle == 1);
    late = must_connect(&w.address);
    check(wire_recv(late, hello, sizeof(hello)) == 0);
    socket_free(late);
    settle();
    check(idle == 1);
    world_end(&w);
}

static void test_nbd__nobody_comes_too_early_and_the_last_one_is_told(void **state)
{
    (void)state;
    TEST_SEEDS (seed)
        run_sim(seed, come_and_go, NULL);
}
