/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Changes under load: clients on several loops come, read and write, compare with a flat array, and go, while the control
 * thread puts filters in and takes them out, resizes, adds and removes nodes, and has changes fail half-way.
 *
 * What must hold whatever the order (C7, G1-G6, D1): no request fails or is lost because of a change; each reads what was
 * acknowledged, whichever backend wrote it; nobody is inside while a change persists or commits; every change ends in time,
 * the failed ones as if they had never been; in the end nothing is counted and the disk holds what the model holds.
 *
 *     backends that come and go
 *        |                    |
 *     filters, put in and     |
 *     taken out again         |
 *        |                    |
 *      base -----------------/      a filter that counts who is inside; its users are what changes move
 *        |
 *      host                         a file on the simulated disk
 */
#include "base/checked.h"
#include "graph-fixture.h"
#include "graph/change.h"
#include "loop/sim/sim.h"
#include "protocols/list.h"
#include "seeds.h"
#include "sim-run.h"
#include "test-filter.h"

#include <stdio.h>

#define PATH      "/d/host.img"
#define LOOPS     3
#define CLIENTS   4 /* at a time */
#define SESSIONS  3 /* of each client, one after the other */
#define WORKERS   2 /* of each session, at once */
#define OPS       12
#define CHANGES   20 /* of each changer */
#define CHANGERS  3
#define AREA      ((uint64_t)1500) /* bytes that one worker has for itself; neighbours share blocks */
#define USED      (AREA * CLIENTS * WORKERS)
#define DISK_SIZE ((uint64_t)64 << 10)
#define DEADLINE  (5 * NS_PER_S)

static const struct driver *const test_drivers[] = {&test_filter_driver, NULL};
static const struct driver *const *const drivers[] = {test_drivers, protocol_drivers, NULL};

struct world {
    struct prng prng;
    struct graph *graph;
    struct loop_thread *threads[LOOPS];
    uint8_t flat[USED]; /* each byte only touched by its worker */
    bool direct;
    unsigned filters; /* made so far */
    unsigned backends;
    unsigned failed; /* changes that were made to fail */
    unsigned persisted;
    char tops[CHANGERS][NODE_NAME_MAX + 1]; /* which filter a changer has in; "" for none */
};

struct worker {
    struct world *world;
    struct backend *backend;
    uint64_t area;
    struct prng prng;
};

/* ---- clients ---- */

static void one_op(struct worker *k, uint8_t *flat)
{
    uint64_t at = prng_below(&k->prng, AREA);
    uint64_t len = 1 + prng_below(&k->prng, AREA - at);
    uint8_t data[AREA];

    switch (prng_below(&k->prng, 8)) {
    case 0:
    case 1:
    case 2:
        for (uint64_t i = 0; i < len; i++)
            data[i] = (uint8_t)prng_next(&k->prng);
        check(send_request(k->backend, REQUEST_WRITE,
                           prng_below(&k->prng, 4) ? 0 : (unsigned)REQUEST_FUA, k->area + at, len,
                           data) == 0);
        memcpy(flat + at, data, len);
        break;
    case 3:
        check(send_request(k->backend, REQUEST_WRITE_ZEROES, 0, k->area + at, len, NULL) == 0);
        memset(flat + at, 0, len);
        break;
    case 4:
        check(flush(k->backend) == 0);
        break;
    case 5:
        check(send_request(k->backend, REQUEST_DISCARD, 0, k->area + at, len, NULL) == 0);
        break; /* the nodes do not unmap: nothing has changed */
    default:
        check(read_at(k->backend, k->area + at, len, data) == 0);
        check(memcmp(data, flat + at, len) == 0);
        break;
    }
}

static void worker_main(void *arg)
{
    struct worker *k = arg;

    for (unsigned i = 0; i < OPS; i++) {
        one_op(k, k->world->flat + k->area);
        if (prng_below(&k->prng, 4) == 0)
            check(co_sleep_until(loop_clock() + prng_below(&k->prng, NS_PER_MS)) == 0);
    }
}

struct session {
    struct world *world;
    struct worker workers[WORKERS];
};

static void session_there(void *arg)
{
    struct session *s = arg;
    struct co_scope scope;

    check(backend_attach(s->workers[0].backend) == 0); /* G4: born closed, if a change is on */
    co_scope_init(&scope);
    for (unsigned i = 0; i < WORKERS; i++)
        check(co_scope_start(&scope, worker_main, &s->workers[i]) == 0);
    co_scope_join(&scope);
}

/* One that exists now: the base, or a filter. */
static const char *some_node(struct world *w)
{
    unsigned i = (unsigned)prng_below(&w->prng, CHANGERS + 1);

    return i < CHANGERS && w->tops[i][0] ? w->tops[i] : "base";
}

static struct backend *some_backend(struct world *w)
{
    for (;;) {
        AUTO(error_free) struct error *gone = NULL;
        char name[NODE_NAME_MAX + 1];
        char owner[32];
        struct backend *b;

        (void)snprintf(name, sizeof(name), "%s", some_node(w));
        (void)snprintf(owner, sizeof(owner), "client %u", w->backends++);
        if (backend_co_new(&b, w->graph, name, ACCESS_RW, owner, &gone) == 0)
            return b;
        check(strstr(error_text(gone), "there is no node")); /* taken out meanwhile */
    }
}

static void client_main(void *arg)
{
    struct worker *first = arg;
    struct world *w = first->world;

    for (unsigned i = 0; i < SESSIONS; i++) {
        struct session s = {.world = w};
        struct backend *b = some_backend(w);
        unsigned loop = (unsigned)prng_below(&w->prng, LOOPS);

        for (unsigned k = 0; k < WORKERS; k++) {
            s.workers[k] = *first;
            s.workers[k].area += k * AREA;
            s.workers[k].backend = b;
            s.workers[k].prng.state = prng_next(&w->prng);
        }
        check(loop_co_call(loop_thread_loop(w->threads[loop]), session_there, &s) == 0);
        check(backend_co_free(b) == NULL);
    }
}

/* ---- changes ---- */

/* Looks that nobody is inside, and fails if it is to. */
struct watch {
    struct change_action action;
    struct world *world;
    bool fails;
    bool sees; /* the requests that it keeps out are those that are counted */
};

static unsigned inside(struct world *w)
{
    /* Its own count, not the gates'. */
    return atomic_get(&test_filter_of(graph_find(w->graph, "base"))->inside);
}

static int watch_co_persist(struct change_action *a, struct error **err)
{
    struct watch *watch = container_of(a, struct watch, action);
    struct world *w = watch->world;

    w->persisted++;
    for (unsigned i = 0; i < 3; i++) {
        check(!watch->sees || inside(w) == 0);
        check(co_sleep_until(loop_clock() + prng_below(&w->prng, NS_PER_MS)) == 0);
    }
    check(!watch->sees || inside(w) == 0);
    return watch->fails ? error_set(err, EIO, "as it was told") : 0;
}

static void watch_commit(struct change_action *a)
{
    struct watch *watch = container_of(a, struct watch, action);

    check(!watch->fails && (!watch->sees || inside(watch->world) == 0));
}

static const struct change_action_ops watch_ops = {
    .co_persist = watch_co_persist,
    .commit = watch_commit,
};

static void watch_change(struct world *w, const char *node)
{
    AUTO(error_free) struct error *err = NULL;
    struct watch watch = {
        .world = w,
        .fails = prng_below(&w->prng, 2),
        .sees = strcmp(node, "base") == 0,
    };
    struct change c;
    int r;

    change_init(&c, w->graph, "watch");
    check(change_add_root(&c, node, &err) == 0);
    change_add_action(&c, &watch.action, &watch_ops);
    r = change_co_run(&c, &err);
    change_end(&c);
    check(r == (watch.fails ? -EIO : 0));
    w->failed += watch.fails;
}

/* In, and out again. */
static void toggle_filter(struct world *w, char *top)
{
    AUTO(error_free) struct error *err = NULL;
    char name[NODE_NAME_MAX + 1];

    if (!top[0]) {
        static const char *const minds[] = {"'offset':0", "'offset':1,'size':300000", "'offset':2"};

        (void)snprintf(name, sizeof(name), "filter%u", w->filters++);
        must_add(w->graph, "{'driver':'raw','node-name':'%s','file':'base',%s}", name,
                 minds[prng_below(&w->prng, ARRAY_SIZE(minds))]);
        check(graph_co_replace(w->graph, "base", name, &err) == 0);
        memcpy(top, name, sizeof(name));
        return;
    }
    memcpy(name, top, sizeof(name));
    top[0] = '\0'; /* no new clients for it */
    do {
        /* What it filters now: others come and go below it as well. By the time that it is done it may be anywhere. */
        char below[NODE_NAME_MAX + 1];

        error_free(&err);
        (void)snprintf(below, sizeof(below), "%s",
                       node_name(edge_node(node_file(graph_find(w->graph, name)))));
        (void)graph_co_replace(w->graph, name, below, &err);
        error_free(&err);
        check(co_sleep_until(loop_clock() + NS_PER_MS) == 0);
    } while (graph_co_del(w->graph, name, &err) < 0);
}

static void resize(struct world *w)
{
    AUTO(error_free) struct error *err = NULL;
    uint64_t size = align_up(USED, 4096) + 4096 * prng_below(&w->prng, 8);

    check(graph_co_resize(w->graph, "base", size, &err) == 0);
}

static void other_nodes(struct world *w, unsigned number)
{
    char name[NODE_NAME_MAX + 1];

    (void)snprintf(name, sizeof(name), "other%u", number);
    must_add(w->graph, "{'driver':'null-co','node-name':'%s'}", name);
    watch_change(w, name);
    must_del(w->graph, name);
}

struct changer {
    struct world *world;
    unsigned number;
};

static void changer_main(void *arg)
{
    struct changer *c = arg;
    struct world *w = c->world;

    for (unsigned i = 0; i < CHANGES; i++) {
        uint64_t began = loop_clock();

        switch (prng_below(&w->prng, 6)) {
        case 0:
            watch_change(w, "base");
            break;
        case 1:
            if (c->number == 0) /* sizes must be equal for the others' replacing */
                resize(w);
            break;
        case 2:
            other_nodes(w, c->number);
            break;
        default:
            if (c->number > 0)
                toggle_filter(w, w->tops[c->number]);
            break;
        }
        check(loop_clock() - began < 4 * DEADLINE); /* three changes, which wait for others */
        check(co_sleep_until(loop_clock() + prng_below(&w->prng, 2 * NS_PER_MS)) == 0);
    }
    if (w->tops[c->number][0])
        toggle_filter(w, w->tops[c->number]);
}

static void all_quiet(const struct backend *b, void *arg)
{
    (void)b;
    (void)arg;
    check(!"a backend is left");
}

static void body(void *arg)
{
    struct world *w = arg;
    struct worker clients[CLIENTS];
    struct changer changers[CHANGERS];
    struct error *err = NULL;
    struct co_scope scope;

    w->graph = graph_new(drivers);
    graph_set_change_deadline(w->graph, DEADLINE);
    for (unsigned i = 0; i < LOOPS; i++)
        check(loop_thread_start(&w->threads[i], "io", &err) == 0);
    must_add(w->graph, "{'driver':'file','node-name':'host','filename':'%s','cache':{'direct':%s}}",
             PATH, w->direct ? "true" : "false");
    must_add(w->graph, "{'driver':'raw','node-name':'base','file':'host'}");
    co_scope_init(&scope);
    for (unsigned i = 0; i < CLIENTS; i++) {
        clients[i] = (struct worker){.world = w, .area = AREA * WORKERS * i};
        check(co_scope_start(&scope, client_main, &clients[i]) == 0);
    }
    for (unsigned i = 0; i < CHANGERS; i++) {
        changers[i] = (struct changer){.world = w, .number = i};
        check(co_scope_start(&scope, changer_main, &changers[i]) == 0);
    }
    co_scope_join(&scope);
    graph_for_each_backend(w->graph, all_quiet, NULL);
    check(inside(w) == 0);
    must_del(w->graph, "base");
    must_del(w->graph, "host");
    w->graph = graph_co_free(w->graph);
    for (unsigned i = 0; i < LOOPS; i++)
        w->threads[i] = loop_thread_stop(w->threads[i]);
}

static void test_gate_model__changes_under_load_are_not_seen(void **state)
{
    (void)state;
    TEST_SEEDS (seed) {
        struct world *w = xnew(struct world);
        struct sim_disk *disk = sim_disk_new();
        struct sim_file_setup setup = {.type = FILE_TYPE_REGULAR, .size = DISK_SIZE};
        uint8_t data[USED];

        w->prng.state = seed;
        w->direct = prng_below(&w->prng, 2);
        sim_disk_make(disk, PATH, &setup);
        check(run_on(disk, seed, body, w) == SIM_RETURNED);
        check(sim_disk_read(disk, PATH, 0, data, USED) == 0);
        check(memcmp(data, w->flat, USED) == 0); /* C7 */
        sim_disk_free(disk);
        free(w);
    }
}
