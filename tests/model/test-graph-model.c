/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Random operations from several loops, through several backends at different heights of a random graph of raw windows over
 * one file, against a flat array; while nodes are put between and taken out again. Under sim by seed (T1), and on real
 * threads and files (T2).
 *
 * Each byte has one actor that writes it, and neighbours belong to others: whoever touches a block as a whole must not touch
 * what is beside his bytes.
 *
 *     backend    backend
 *        |          |
 *       raw 2 ...   |
 *        |          |
 *       raw 1 ------+      each a window of the one below
 *        |
 *       file               direct or not
 */
#include "base/atomic.h"
#include "base/checked.h"
#include "check.h"
#include "formats/list.h"
#include "graph-fixture.h"
#include "loop/sim/sim.h"
#include "protocols/list.h"
#include "seeds.h"
#include "sim-run.h"

#include <errno.h>
#include <stdio.h>
#include <unistd.h>

#define LOOPS     3
#define ACTORS    6
#define OPS       25
#define DISK_SIZE ((uint64_t)64 << 10)
#define DEPTH_MAX 3
#define BACKENDS  3
#define STRIPES   200

static const struct driver *const *const drivers[] = {protocol_drivers, format_drivers, NULL};

struct range {
    uint64_t offset; /* in the file */
    uint64_t len;
};

struct model {
    uint64_t seed;
    bool spins; /* real threads */
    char path[64];
    struct prng prng;

    /* Constant once the actors run. */
    struct graph *graph;
    unsigned depth; /* node 0 is the file, node `depth` the highest */
    struct range nodes[DEPTH_MAX + 1];
    struct backend *backends[BACKENDS];
    struct range windows[BACKENDS];
    struct range stripes[STRIPES]; /* stripe i belongs to actor i % ACTORS */
    unsigned stripe_count;
    struct loop_thread *threads[LOOPS];

    uint8_t back[DISK_SIZE];
    uint8_t flat[DISK_SIZE]; /* each byte only touched by the actor that owns it */
    bool done;               /* atomic */
};

struct actor {
    struct model *model;
    unsigned number;
    struct prng prng;
};

/* ---- one operation ---- */

/* Some bytes of the actor's own that the backend can reach. */
static bool choose_range(struct actor *a, const struct range *window, struct range *ret)
{
    const struct model *m = a->model;
    unsigned rounds = (m->stripe_count - a->number + ACTORS - 1) / ACTORS;
    const struct range *s = &m->stripes[prng_below(&a->prng, rounds) * ACTORS + a->number];
    uint64_t from = MAX(s->offset, window->offset);
    uint64_t to = MIN(s->offset + s->len, window->offset + window->len);

    if (from >= to)
        return false;
    ret->offset = from + prng_below(&a->prng, to - from);
    ret->len = 1 + prng_below(&a->prng, to - ret->offset);
    return true;
}

static void fill_random(struct prng *prng, uint8_t *p, size_t len)
{
    for (size_t i = 0; i < len; i++)
        p[i] = (uint8_t)prng_next(prng);
}

static void read_and_compare(struct actor *a, struct backend *b, uint64_t at, const struct range *r)
{
    uint8_t data[DISK_SIZE / 8];

    check(r->len <= sizeof(data));
    check(read_at(b, at, r->len, data) == 0);
    check(memcmp(data, a->model->flat + r->offset, r->len) == 0);
}

/* What was discarded is as it was, or zero. */
static void discard(struct actor *a, struct backend *b, uint64_t at, const struct range *r)
{
    uint8_t *flat = a->model->flat + r->offset;
    uint8_t data[DISK_SIZE / 8];

    check(send_request(b, REQUEST_DISCARD, 0, at, r->len, NULL) == 0);
    check(read_at(b, at, r->len, data) == 0);
    for (uint64_t i = 0; i < r->len; i++) {
        check(data[i] == flat[i] || data[i] == 0);
        flat[i] = data[i];
    }
}

/* What is said to be zero is zero, and all of the range is told of. */
static void look_at_extents(struct actor *a, struct backend *b, uint64_t at, const struct range *r)
{
    struct extent v[16];
    struct extents e = {.v = v, .max = ARRAY_SIZE(v)};
    struct request req = {.kind = REQUEST_EXTENTS, .offset = at, .len = r->len, .extents = &e};
    uint64_t pos = at;

    check(backend_co_request(b, &req) == 0);
    check(e.count > 0);
    for (unsigned i = 0; i < e.count; i++) {
        check(v[i].offset == pos && v[i].len > 0);
        pos += v[i].len;
        for (uint64_t k = 0; k < v[i].len && (v[i].flags & EXTENT_ZERO); k++)
            check(a->model->flat[r->offset + (v[i].offset - at) + k] == 0);
    }
    check(pos == at + r->len || (e.count == e.max && pos < at + r->len));
}

static void operate(struct actor *a)
{
    struct model *m = a->model;
    unsigned which = (unsigned)prng_below(&a->prng, BACKENDS);
    struct backend *b = m->backends[which];
    unsigned flags = prng_chance(&a->prng, 200) ? REQUEST_FUA : 0;
    uint8_t data[DISK_SIZE / 8];
    struct range r;
    uint64_t at;

    if (!choose_range(a, &m->windows[which], &r))
        return;
    at = r.offset - m->windows[which].offset;
    switch (prng_below(&a->prng, 10)) {
    case 0:
    case 1:
    case 2:
        read_and_compare(a, b, at, &r);
        break;
    case 3:
        flags |= prng_chance(&a->prng, 500) ? REQUEST_MAY_UNMAP : 0;
        check(send_request(b, REQUEST_WRITE_ZEROES, flags, at, r.len, NULL) == 0);
        memset(m->flat + r.offset, 0, r.len);
        break;
    case 4:
        discard(a, b, at, &r);
        break;
    case 5:
        look_at_extents(a, b, at, &r);
        break;
    case 6:
        check(flush(b) == 0);
        break;
    default:
        fill_random(&a->prng, data, r.len);
        check(send_request(b, REQUEST_WRITE, flags, at, r.len, data) == 0);
        memcpy(m->flat + r.offset, data, r.len);
        break;
    }
}

static void act(void *arg)
{
    struct actor *a = arg;
    struct model *m = a->model;

    if (m->spins)
        sim_install_random_spins(m->seed * ACTORS + a->number + 1);
    for (unsigned i = 0; i < BACKENDS; i++)
        check(backend_attach(m->backends[i]) == 0);
    for (unsigned i = 0; i < OPS; i++)
        operate(a);
    if (m->spins)
        sim_install_random_spins(0);
}

static void act_there(void *arg)
{
    struct actor *a = arg;

    check(loop_co_call(loop_thread_loop(a->model->threads[a->number % LOOPS]), act, a) == 0);
}

/* ---- the graph ---- */

static const char *unmap_option(struct model *m)
{
    return prng_chance(&m->prng, 700) ? ",'discard':'unmap'" : "";
}

static void build_graph(struct model *m)
{
    m->graph = graph_new(drivers);
    must_add(m->graph, "{'driver':'file','node-name':'n0','filename':'%s','cache':{'direct':%s}%s}",
             m->path, prng_chance(&m->prng, 500) ? "true" : "false", unmap_option(m));
    m->nodes[0] = (struct range){0, DISK_SIZE};
    m->depth = (unsigned)prng_below(&m->prng, DEPTH_MAX + 1);
    for (unsigned i = 1; i <= m->depth; i++) {
        const struct range *below = &m->nodes[i - 1];
        uint64_t skip = prng_chance(&m->prng, 300) ? 0 : prng_below(&m->prng, below->len / 3);
        uint64_t len = below->len - skip;

        if (prng_chance(&m->prng, 400))
            skip = align_down(skip, 512);
        if (prng_chance(&m->prng, 500))
            len -= prng_below(&m->prng, len / 3);
        must_add(m->graph,
                 "{'driver':'raw','node-name':'n%u','file':'n%u','offset':%llu,'size':%llu%s}", i,
                 i - 1, (unsigned long long)skip, (unsigned long long)len, unmap_option(m));
        m->nodes[i] = (struct range){below->offset + skip, len};
    }
    for (unsigned i = 0; i < BACKENDS; i++) {
        unsigned height = i ? (unsigned)prng_below(&m->prng, m->depth + 1) : m->depth;
        char name[16];

        (void)snprintf(name, sizeof(name), "n%u", height);
        m->backends[i] = must_attach(m->graph, name, ACCESS_RW, "actor");
        m->windows[i] = m->nodes[height];
    }
}

static void cut_stripes(struct model *m)
{
    uint64_t pos = 0;

    for (m->stripe_count = 0; m->stripe_count < STRIPES && pos < DISK_SIZE; m->stripe_count++) {
        uint64_t len = 1 + prng_below(&m->prng, prng_chance(&m->prng, 200) ? 6000 : 900);

        m->stripes[m->stripe_count] = (struct range){pos, MIN(len, DISK_SIZE - pos)};
        pos += m->stripes[m->stripe_count].len;
    }
}

/* Puts a node above another one, under the feet of those who use it, and takes it out again. */
static void change_graph(struct model *m)
{
    struct error *err = NULL;
    char name[16];

    (void)snprintf(name, sizeof(name), "n%u", (unsigned)prng_below(&m->prng, m->depth + 1));
    must_add(m->graph, "{'driver':'raw','node-name':'between','file':'%s','discard':'unmap'}",
             name);
    if (graph_co_replace(m->graph, name, "between", &err) < 0)
        fail_msg("%s", error_text(err));
    co_sleep_until(loop_clock() + prng_below(&m->prng, 2000) * NS_PER_US);
    if (graph_co_replace(m->graph, "between", name, &err) < 0)
        fail_msg("%s", error_text(err));
    must_del(m->graph, "between");
}

static void wait_for_actors(void *arg)
{
    struct model *m = arg;
    struct actor actors[ACTORS];
    struct co_scope s;

    co_scope_init(&s);
    for (unsigned i = 0; i < ACTORS; i++) {
        actors[i] = (struct actor){m, i, {m->seed * ACTORS + i}};
        check(co_scope_start(&s, act_there, &actors[i]) == 0);
    }
    co_scope_join(&s);
    atomic_set(&m->done, true);
}

static void run_model(void *arg)
{
    struct model *m = arg;
    struct co_scope s;

    for (unsigned i = 0; i < LOOPS; i++) {
        struct error *err = NULL;

        assert_int_equal(loop_thread_start(&m->threads[i], "io", &err), 0);
    }
    build_graph(m);
    cut_stripes(m);
    co_scope_init(&s);
    assert_int_equal(co_scope_start(&s, wait_for_actors, m), 0);
    do {
        change_graph(m);
        co_sleep_until(loop_clock() + prng_below(&m->prng, 2000) * NS_PER_US);
    } while (!atomic_get(&m->done));
    co_scope_join(&s);
    for (unsigned i = 0; i < BACKENDS; i++) {
        assert_int_equal(read_at(m->backends[i], 0, m->windows[i].len, m->back), 0);
        assert_memory_equal(m->back, m->flat + m->windows[i].offset, m->windows[i].len);
        backend_co_free(m->backends[i]);
    }
    graph_co_free(m->graph);
    for (unsigned i = 0; i < LOOPS; i++)
        loop_thread_stop(m->threads[i]);
}

static void test_graph_model__under_sim(void **state)
{
    (void)state;
    TEST_SEEDS (seed) {
        static struct model m;
        struct sim_file_setup setup = {.type = FILE_TYPE_REGULAR, .size = DISK_SIZE};
        struct sim_disk *d = sim_disk_new();
        uint8_t data[DISK_SIZE];

        m = (struct model){.seed = seed, .prng = {seed}, .path = "/disk/a"};
        setup.tmpfs = seed % 4 == 0;
        setup.no_punch = seed % 5 == 0;
        sim_disk_make(d, m.path, &setup);
        assert_int_equal(run_on(d, seed, run_model, &m), SIM_RETURNED);
        assert_int_equal(sim_disk_read(d, m.path, 0, data, sizeof(data)), 0);
        assert_memory_equal(data, m.flat, sizeof(data));
        sim_disk_free(d);
    }
}

static void on_real_threads(const char *dir, enum loop_engine engine)
{
    TEST_SEEDS (seed) {
        static struct model m;
        int fd;

        m = (struct model){.seed = seed, .prng = {seed}, .spins = true};
        (void)snprintf(m.path, sizeof(m.path), "%s/test-graph-model-XXXXXX", dir);
        fd = mkstemp(m.path);
        assert_true(fd >= 0);
        assert_int_equal(ftruncate(fd, DISK_SIZE), 0);
        close(fd);
        on_engine(engine, run_model, &m);
        unlink(m.path);
    }
}

static void test_graph_model__on_threads_and_a_disk(void **state)
{
    (void)state;
    on_real_threads(".", LOOP_ENGINE_THREADS);
}

static void test_graph_model__on_io_uring_and_a_disk(void **state)
{
    (void)state;
    on_real_threads(".", LOOP_ENGINE_IO_URING);
}

static void test_graph_model__on_io_uring_and_tmpfs(void **state)
{
    (void)state;
    on_real_threads("/dev/shm", LOOP_ENGINE_IO_URING);
}
