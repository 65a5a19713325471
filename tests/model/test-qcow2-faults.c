/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A host that fails, hangs and forgets, and users who give up: from several loops, requests to one qcow2 image are cancelled at
 * their deadlines, memory runs out, and reads and writes of the file fail or never end. What succeeded is there all the same, each
 * sector is a register (sector-log.h), and the image is sound, with leaks at most (P1), after the power was cut.
 */
#include "formats/list.h"
#include "logged-disk.h"
#include "protocols/list.h"
#include "seeds.h"

#define LOOPS   2
#define ACTORS  4
#define OPS     40
#define SECTORS ((uint64_t)256)
#define TOP     "/disk/top.qcow2"
#define BASE    "/disk/base.qcow2"

static const struct driver *const *const drivers[] = {protocol_drivers, format_drivers, NULL};

struct world {
    uint64_t seed;
    struct sim_disk *disk;
    struct qcow2_shape shape;
    bool has_base;
    struct sector_log log;
    struct graph *graph;
    struct backend *backend;
    struct loop_thread *threads[LOOPS];
    bool quiet; /* no more faults */
    unsigned failed;
    unsigned flushed;
};

struct actor {
    struct world *world;
    unsigned number;
    struct prng prng;
};

/* One request and what became of it. */
struct attempt {
    struct world *world;
    enum request_kind kind;
    unsigned flags;
    uint64_t first;
    uint64_t count;
    uint8_t *data;
    int result;
};

static void attempt_run(void *arg)
{
    struct attempt *t = arg;

    t->result = send_request(t->world->backend, t->kind, t->flags, t->first * LOG_SECTOR,
                             t->count * LOG_SECTOR, t->data);
}

/* In a scope that ends at a deadline. */
static int attempt_within(struct attempt *t, uint64_t ns)
{
    struct co_scope s;

    int r;

    co_scope_init(&s);
    r = co_scope_start(&s, attempt_run, t);
    if (r < 0)
        return t->result = r;
    co_scope_set_deadline(&s, loop_clock() + ns);
    co_scope_join(&s);
    return t->result;
}

static uint64_t random_deadline(struct prng *prng)
{
    return prng_chance(prng, 500) ? 10 * NS_PER_S : prng_below(prng, 20 * NS_PER_MS);
}

static void change(struct actor *a, struct attempt *t)
{
    struct world *w = a->world;
    uint64_t value = t->kind == REQUEST_WRITE ? log_new_value(&w->log) : 0;
    uint32_t op;

    for (uint64_t i = 0; t->data && i < t->count; i++)
        log_fill(t->data + i * LOG_SECTOR, t->first + i, value);
    op = log_begin(&w->log, t->first, t->count, value, t->kind == REQUEST_DISCARD);
    log_end(&w->log, op, false, attempt_within(t, random_deadline(&a->prng)) < 0);
}

static void look(struct actor *a, struct attempt *t)
{
    uint64_t start = log_tick(&a->world->log);

    if (attempt_within(t, random_deadline(&a->prng)) == 0)
        log_check_read(&a->world->log, t->first, t->count, t->data, start);
}

static void flush_some(struct actor *a, struct attempt *t)
{
    uint64_t start = log_tick(&a->world->log);

    t->first = t->count = 0;
    if (attempt_within(t, random_deadline(&a->prng)) == 0) {
        log_flushed(&a->world->log, start);
        a->world->flushed++;
    }
}

static void act_once(struct actor *a)
{
    struct world *w = a->world;
    struct attempt t = {.world = w};

    t.first = prng_below(&a->prng, prng_chance(&a->prng, 700) ? 48 : SECTORS);
    t.count = MIN(1 + prng_below(&a->prng, 24), SECTORS - t.first);
    if (prng_chance(&a->prng, 30))
        (void)alloc_fail_at(1 + (unsigned)prng_below(&a->prng, 6));
    switch (prng_below(&a->prng, 10)) {
    case 0:
        t.kind = REQUEST_DISCARD;
        change(a, &t);
        break;
    case 1:
        t.kind = REQUEST_WRITE_ZEROES;
        t.flags = prng_chance(&a->prng, 500) ? REQUEST_MAY_UNMAP : 0;
        change(a, &t);
        break;
    case 2:
    case 3:
        t.kind = REQUEST_FLUSH;
        flush_some(a, &t);
        break;
    case 4:
    case 5:
        t.data = xalloc(t.count, LOG_SECTOR);
        t.kind = REQUEST_READ;
        look(a, &t);
        break;
    default:
        t.data = xalloc(t.count, LOG_SECTOR);
        t.kind = REQUEST_WRITE;
        change(a, &t);
        break;
    }
    (void)alloc_fail_at(0);
    w->failed += t.result < 0;
    free(t.data);
}

static void act(void *arg)
{
    struct actor *a = arg;

    while (backend_attach(a->world->backend) < 0)
        (void)alloc_fail_at(0); /* another one's fault */
    for (unsigned i = 0; i < OPS; i++)
        act_once(a);
}

static void act_there(void *arg)
{
    struct actor *a = arg;

    check(loop_co_call(loop_thread_loop(a->world->threads[a->number % LOOPS]), act, a) == 0);
}

/* What hangs goes on after a while. */
static void let_go(void *arg)
{
    struct world *w = arg;

    while (!w->quiet) {
        (void)co_sleep_until(loop_clock() + 30 * NS_PER_MS);
        (void)sim_unhang(NULL);
    }
}

static void run_actors(struct world *w)
{
    struct sim_fault errors = {
        .ops = SIM_OP(IO_READ) | SIM_OP(IO_WRITE) | SIM_OP(IO_TRUNCATE) | SIM_OP(IO_PUNCH) |
               SIM_OP(IO_ZERO) | SIM_OP(IO_ALLOCATE),
        .kind = SIM_ERROR,
        .error = w->seed % 2 ? ENOSPC : EIO,
        .per_mille = 25,
    };
    struct sim_fault hangs = {.ops = SIM_OP(IO_READ) | SIM_OP(IO_WRITE) | SIM_OP(IO_TRUNCATE) |
                                     SIM_OP(IO_PUNCH) | SIM_OP(IO_SYNC),
                              .kind = SIM_HANG,
                              .per_mille = 25};
    struct actor actors[ACTORS];
    struct co_scope s, other;

    sim_fault_add(&errors);
    sim_fault_add(&hangs);
    co_scope_init(&s);
    co_scope_init(&other);
    check(co_scope_start(&other, let_go, w) == 0);
    for (unsigned i = 0; i < ACTORS; i++) {
        actors[i] = (struct actor){w, i, {w->seed * ACTORS + i}};
        check(co_scope_start(&s, act_there, &actors[i]) == 0);
    }
    co_scope_join(&s);
    w->quiet = true;
    co_scope_join(&other);
    sim_fault_remove(&errors);
    sim_fault_remove(&hangs);
    (void)sim_unhang(NULL);
}

static void run_world(void *arg)
{
    struct world *w = arg;
    struct error *err = NULL;

    for (unsigned i = 0; i < LOOPS; i++)
        check(loop_thread_start(&w->threads[i], "io", &err) == 0);
    w->graph = graph_new(drivers);
    if (w->has_base)
        add_layer(w->graph, "base", BASE, NULL, true);
    /* Direct, so that a write that fails, or is cut off, tears no sector. */
    add_or_die(w->graph,
               "{'driver':'qcow2','node-name':'top','discard':'unmap','cache':{'direct':true},"
               "'file':{'driver':'file','filename':'" TOP "'},'backing':%s}",
               w->has_base ? "'base'" : "null");
    w->backend = must_attach(w->graph, "top", ACCESS_RW, "actor");
    run_actors(w);
    check(logged_flush(w->backend, &w->log) == 0);
    check(logged_read(w->backend, &w->log, 0, SECTORS) == 0);
    check(co_sleep_until(loop_clock() + NS_PER_S) == 0);
    backend_co_free(w->backend);
    graph_co_free(w->graph);
    for (unsigned i = 0; i < LOOPS; i++)
        loop_thread_stop(w->threads[i]);
}

static void make_images(struct world *w)
{
    if (w->has_base) {
        logged_base_make(w->disk, BASE, &w->log, SECTORS);
        w->shape.backing = "base.qcow2";
    }
    image_make(w->disk, TOP, &w->shape);
}

/* What was flushed is there after a power cut, at the end or in the middle. */
static void judge(struct world *w)
{
    static const char *const paths[] = {TOP, BASE};
    uint8_t *data = xalloc(SECTORS, LOG_SECTOR);
    struct qcow2_verdict v;

    image_judge(w->disk, TOP, LEAKS_ALLOWED, &v);
    sim_disk_power_cut(w->disk, w->seed);
    image_judge(w->disk, TOP, LEAKS_ALLOWED, &v);
    image_read_guest(w->disk, paths, w->has_base ? 2 : 1, 0, data, SECTORS * LOG_SECTOR);
    log_check_survivors(&w->log, 0, SECTORS, data);
    free(data);
}

static void test_qcow2_faults__what_succeeded_is_there(void **state)
{
    unsigned failed = 0;
    unsigned flushed = 0;
    unsigned killed = 0;

    (void)state;
    TEST_SEEDS (seed) {
        static const unsigned bits[] = {9, 10, 12, 13};
        static struct world w;
        struct prng prng = {seed};
        struct sim_options o;

        w = (struct world){.seed = seed, .disk = sim_disk_new()};
        w.shape = (struct qcow2_shape){
            .version = prng_chance(&prng, 200) ? 2 : 3,
            .cluster_bits = bits[prng_below(&prng, ARRAY_SIZE(bits))],
            .refcount_order = 4,
            .size = SECTORS * LOG_SECTOR,
        };
        w.has_base = prng_chance(&prng, 500);
        log_init(&w.log, SECTORS);
        make_images(&w);
        sim_options_init(&o, seed);
        o.disk = w.disk;
        if (prng_chance(&prng, 700)) { /* the power goes in the middle */
            o.may_end_early = true;
            o.kill_at_op = sim_disk_ops(w.disk) + 20 + prng_below(&prng, 800);
        }
        killed += sim_run(&o, run_world, &w) == SIM_KILLED;
        (void)alloc_fail_at(0);
        judge(&w);
        failed += w.failed;
        flushed += w.flushed;
        sim_disk_free(w.disk);
        log_release(&w.log);
    }
    print_message("# %u requests failed, %u flushes succeeded, %u power cuts on the way\n", failed,
                  flushed, killed);
    if (seeds_enough(20)) {
        assert_true(killed > 0);
        assert_true(failed > 0);
        assert_true(flushed > 0);
    }
}
