/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Gate and changes on real threads, more of them than CPUs, with random spins at each atomic (T2): clients on all loops, and
 * filters put in and taken out, changes that fail, backends that come and go meanwhile. TSan looks on in its build. The same
 * under sim is model/test-gate-model.
 */
#include "graph-fixture.h"
#include "graph/change.h"
#include "loop/sim/sim.h"
#include "protocols/list.h"
#include "test-filter.h"

#include <stdio.h>
#include <unistd.h>

#define LOOPS     6
#define CLIENTS   6
#define AREA      ((uint64_t)6144) /* neighbours share blocks where these are of 4096 bytes */
#define DISK_SIZE (AREA * CLIENTS + 4096)
#define RUN_NS    (700 * NS_PER_MS)
#define DEADLINE  (20 * NS_PER_S)

static const struct driver *const test_drivers[] = {&test_filter_driver, NULL};
static const struct driver *const *const drivers[] = {test_drivers, protocol_drivers, NULL};

struct world {
    struct graph *graph;
    struct loop_thread *threads[LOOPS];
    uint64_t end_ns;
    char path[64];
    uint8_t flat[AREA * CLIENTS]; /* each byte only touched by its client */
    unsigned changes;
};

struct client {
    struct world *world;
    unsigned number;
    struct backend *backend;
    uint64_t seed;
};

static void client_there(void *arg)
{
    struct client *c = arg;
    struct world *w = c->world;
    struct prng prng = {.state = c->seed};
    uint8_t *flat = w->flat + c->number * AREA;
    uint8_t data[AREA];

    sim_install_random_spins(c->seed);
    check(backend_attach(c->backend) == 0);
    for (unsigned i = 0; i < 40; i++) {
        uint64_t at = prng_below(&prng, AREA);
        uint64_t len = 1 + prng_below(&prng, AREA - at);

        if (prng_below(&prng, 2)) {
            memset(data, (int)prng_below(&prng, 256), len);
            check(write_at(c->backend, c->number * AREA + at, len, data) == 0);
            memcpy(flat + at, data, len);
        } else {
            check(read_at(c->backend, c->number * AREA + at, len, data) == 0);
            check(memcmp(data, flat + at, len) == 0);
        }
    }
    sim_install_random_spins(0);
}

static void client_main(void *arg)
{
    struct client *c = arg;
    struct world *w = c->world;

    while (loop_clock() < w->end_ns) {
        c->backend = must_attach(w->graph, "base", ACCESS_RW, "client");
        c->seed += CLIENTS;
        check(loop_co_call(loop_thread_loop(w->threads[c->seed % LOOPS]), client_there, c) == 0);
        check(backend_co_free(c->backend) == NULL);
    }
}

struct watch {
    struct change_action action;
    struct world *world;
    bool fails;
};

static int watch_co_persist(struct change_action *a, struct error **err)
{
    struct watch *watch = container_of(a, struct watch, action);
    struct world *w = watch->world;

    check(atomic_get(&test_filter_of(graph_find(w->graph, "base"))->inside) == 0);
    check(co_sleep_until(loop_clock() + NS_PER_MS / 4) == 0);
    check(atomic_get(&test_filter_of(graph_find(w->graph, "base"))->inside) == 0);
    return watch->fails ? error_set(err, EIO, "as it was told") : 0;
}

static const struct change_action_ops watch_ops = {.co_persist = watch_co_persist};

static void watch_change(struct world *w, bool fails)
{
    AUTO(error_free) struct error *err = NULL;
    struct watch watch = {.world = w, .fails = fails};
    struct change c;

    change_init(&c, w->graph, "watch");
    check(change_add_root(&c, "base", &err) == 0);
    change_add_action(&c, &watch.action, &watch_ops);
    check(change_co_run(&c, &err) == (fails ? -EIO : 0));
    change_end(&c);
}

static void must_replace(struct world *w, const char *from, const char *to)
{
    struct error *err = NULL;

    if (graph_co_replace(w->graph, from, to, &err) < 0)
        fail_msg("%s", error_text(err));
}

static void changer_main(void *arg)
{
    struct world *w = arg;

    while (loop_clock() < w->end_ns) {
        unsigned mind = w->changes++ % 3;

        must_add(w->graph, "{'driver':'raw','node-name':'f','file':'base','offset':%u%s}", mind,
                 mind == FILTER_PARK ? ",'size':200000" : "");
        must_replace(w, "base", "f");
        watch_change(w, mind == 0);
        graph_co_look(w->graph);
        must_replace(w, "f", "base");
        must_del(w->graph, "f");
    }
}

static void body(void *arg)
{
    struct world *w = arg;
    struct client clients[CLIENTS];
    struct error *err = NULL;
    struct co_scope scope;

    w->graph = graph_new(drivers);
    graph_set_change_deadline(w->graph, DEADLINE);
    w->end_ns = loop_clock() + RUN_NS;
    for (unsigned i = 0; i < LOOPS; i++)
        check(loop_thread_start(&w->threads[i], "io", &err) == 0);
    must_add(w->graph, "{'driver':'file','node-name':'host','filename':'%s'}", w->path);
    must_add(w->graph, "{'driver':'raw','node-name':'base','file':'host'}");
    co_scope_init(&scope);
    for (unsigned i = 0; i < CLIENTS; i++) {
        clients[i] = (struct client){.world = w, .number = i, .seed = 1 + i};
        check(co_scope_start(&scope, client_main, &clients[i]) == 0);
    }
    check(co_scope_start(&scope, changer_main, w) == 0);
    co_scope_join(&scope);
    check(w->changes > 0);
    w->graph = graph_co_free(w->graph);
    for (unsigned i = 0; i < LOOPS; i++)
        w->threads[i] = loop_thread_stop(w->threads[i]);
}

static void run_on(enum loop_engine engine)
{
    struct world *w = xnew(struct world);
    uint8_t *data = xalloc(1, sizeof(w->flat));
    int fd;

    (void)snprintf(w->path, sizeof(w->path), "/var/tmp/cairn-gate-threads.XXXXXX");
    fd = mkstemp(w->path);
    check(fd >= 0 && ftruncate(fd, (off_t)DISK_SIZE) == 0);
    on_engine(engine, body, w);
    check(pread(fd, data, sizeof(w->flat), 0) == (ssize_t)sizeof(w->flat));
    check(memcmp(data, w->flat, sizeof(w->flat)) == 0);
    check(close(fd) == 0 && unlink(w->path) == 0);
    free(data);
    free(w);
}

static void test_gate_threads__changes_under_load_on_io_uring(void **state)
{
    (void)state;
    run_on(LOOP_ENGINE_IO_URING);
}

static void test_gate_threads__changes_under_load_on_worker_threads(void **state)
{
    (void)state;
    run_on(LOOP_ENGINE_THREADS);
}
