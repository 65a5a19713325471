/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Races within one qcow2 image (Q1, Q2): from several loops, many write, zero, discard and read the same few clusters, so that
 * host clusters are freed and given to others while requests that had looked them up are still under way. Each sector is a
 * register (sector-log.h): a read that finds another sector's content, a value that had been replaced before it began, or half of
 * one, is seen as what it is. Under sim by seed, and on real threads.
 */
#include "formats/list.h"
#include "protocols/list.h"
#include "qcow2-fixture.h"
#include "sector-log.h"
#include "seeds.h"

#define LOOPS   3
#define ACTORS  8
#define OPS     40
#define SECTORS ((uint64_t)160)
#define TOP     "top.qcow2"
#define BASE    "base.qcow2"
#define DATA    "top.data"

static const struct driver *const *const drivers[] = {protocol_drivers, format_drivers, NULL};

struct race {
    uint64_t seed;
    struct sim_disk *disk; /* NULL: real threads */
    char top[80];
    char base[80];
    struct qcow2_shape shape;
    bool has_base;
    bool fails; /* the disk does, now and then, once the image is open */
    bool
        drops; /* a flush that fails loses what was not flushed: reads may show anything until the image is opened again */
    struct sim_fault *faults;
    unsigned fault_count;
    unsigned narrow; /* sectors that most requests are about */
    struct sector_log log;
    struct graph *graph;
    struct backend *backend;
    struct loop_thread *threads[LOOPS];
};

struct actor {
    struct race *race;
    unsigned number;
    struct prng prng;
};

static void race_write(struct race *r, uint64_t first, uint64_t count, unsigned flags)
{
    uint64_t value = log_new_value(&r->log);
    uint8_t *data = xalloc(count, LOG_SECTOR);
    uint32_t op;
    int result;

    for (uint64_t i = 0; i < count; i++)
        log_fill(data + i * LOG_SECTOR, first + i, value);
    op = log_begin(&r->log, first, count, value, false);
    result = send_request(r->backend, REQUEST_WRITE, flags, first * LOG_SECTOR, count * LOG_SECTOR,
                          data);
    check(result == 0 || r->fails);
    log_end(&r->log, op, false, result < 0);
    free(data);
}

static void race_read(struct race *r, uint64_t first, uint64_t count)
{
    uint8_t *data = xalloc(count, LOG_SECTOR);
    uint64_t start = log_tick(&r->log);
    int result = read_at(r->backend, first * LOG_SECTOR, count * LOG_SECTOR, data);

    check(result == 0 || r->fails);
    if (result == 0 && !r->drops)
        log_check_read(&r->log, first, count, data, start);
    free(data);
}

/* The whole cluster, if there can be such. */
static void race_compress(struct race *r, uint64_t first, uint64_t per_cluster)
{
    first -= first % per_cluster;
    race_write(r, first, MIN(per_cluster, SECTORS - first),
               r->shape.data_file ? 0 : REQUEST_COMPRESSED);
}

static void race_clear(struct race *r, enum request_kind kind, unsigned flags, uint64_t first,
                       uint64_t count)
{
    uint32_t op = log_begin(&r->log, first, count, 0, kind == REQUEST_DISCARD);
    int result =
        send_request(r->backend, kind, flags, first * LOG_SECTOR, count * LOG_SECTOR, NULL);

    check(result == 0 || r->fails);
    log_end(&r->log, op, false, result < 0);
}

static void race_flush(struct race *r)
{
    uint64_t start = log_tick(&r->log);
    int result = flush(r->backend);

    check(result == 0 || r->fails);
    if (result == 0)
        log_flushed(&r->log, start);
}

static void race_once(struct actor *a)
{
    struct race *r = a->race;
    uint64_t per_cluster = ((uint64_t)1 << r->shape.cluster_bits) / LOG_SECTOR;
    uint64_t within = prng_chance(&a->prng, 800) ? r->narrow : SECTORS;
    uint64_t first = prng_below(&a->prng, within);
    uint64_t count = 1 + prng_below(&a->prng, 2 * per_cluster);

    if (r->shape.extended && prng_chance(&a->prng, 600)) {
        count = 1 + prng_below(&a->prng, 4);
    } else if (prng_chance(&a->prng, 600)) {
        first -= first % per_cluster;
        count = per_cluster;
    }
    count = MIN(count, SECTORS - first);
    switch (prng_below(&a->prng, 14)) {
    case 0:
    case 1:
    case 2:
        race_clear(r, REQUEST_DISCARD, 0, first, count);
        break;
    case 3:
        race_clear(r, REQUEST_WRITE_ZEROES, 0, first, count);
        break;
    case 4:
        race_clear(r, REQUEST_WRITE_ZEROES, REQUEST_MAY_UNMAP, first, count);
        break;
    case 5:
    case 12:
    case 13:
        race_flush(r);
        break;
    case 6:
    case 7:
    case 8:
        race_read(r, first, count);
        break;
    case 9:
        race_compress(r, first, per_cluster);
        break;
    default:
        race_write(r, first, count, 0);
        break;
    }
}

static void act(void *arg)
{
    struct actor *a = arg;

    if (!a->race->disk)
        sim_install_random_spins(a->race->seed * ACTORS + a->number + 1);
    check(backend_attach(a->race->backend) == 0);
    for (unsigned i = 0; i < OPS; i++)
        race_once(a);
    if (!a->race->disk)
        sim_install_random_spins(0);
}

static void act_there(void *arg)
{
    struct actor *a = arg;

    check(loop_co_call(loop_thread_loop(a->race->threads[a->number % LOOPS]), act, a) == 0);
}

static void make_images(struct race *r)
{
    struct qcow2_shape base = {.version = 3,
                               .cluster_bits = 9,
                               .refcount_order = 4,
                               .size = SECTORS * LOG_SECTOR,
                               .allocated = SECTORS};
    uint8_t *bytes;
    size_t len;

    if (r->has_base) {
        bytes = qcow2_make(&base, &len);
        for (uint64_t i = 0; i < SECTORS; i++) {
            r->log.sectors[i].initial = 1000000;
            log_fill(bytes + len - (SECTORS - i) * LOG_SECTOR, i, 1000000);
        }
        image_put(r->disk, r->base, bytes, len);
        free(bytes);
    }
    image_make(r->disk, r->top, &r->shape);
}

static void run_race(void *arg)
{
    struct race *r = arg;
    struct actor actors[ACTORS];
    struct error *err = NULL;
    struct co_scope s;

    for (unsigned i = 0; i < LOOPS; i++)
        check(loop_thread_start(&r->threads[i], "io", &err) == 0);
    r->graph = graph_new(drivers);
    if (r->has_base)
        add_layer(r->graph, "base", r->base, NULL, true);
    if (r->shape.version == 3 && r->seed % 4 == 0)
        layer_options = "'discard-no-unref':true,";
    add_layer(r->graph, "top", r->top, r->has_base ? "base" : NULL, false);
    layer_options = "";
    r->backend = must_attach(r->graph, "top", ACCESS_RW, "actor");
    for (unsigned i = 0; i < r->fault_count; i++)
        sim_fault_add(&r->faults[i]);
    co_scope_init(&s);
    for (unsigned i = 0; i < ACTORS; i++) {
        actors[i] = (struct actor){r, i, {r->seed * ACTORS + i}};
        check(co_scope_start(&s, act_there, &actors[i]) == 0);
    }
    co_scope_join(&s);
    race_read(r, 0, SECTORS);
    backend_co_free(r->backend);
    graph_co_free(r->graph);
    for (unsigned i = 0; i < LOOPS; i++)
        loop_thread_stop(r->threads[i]);
}

static void race_init(struct race *r, uint64_t seed, struct sim_disk *disk, const char *dir)
{
    static const unsigned bits[] = {9, 10, 12, 13};
    struct prng prng = {seed};

    *r = (struct race){.seed = seed, .disk = disk};
    r->shape = (struct qcow2_shape){
        .version = prng_chance(&prng, 200) ? 2 : 3,
        .cluster_bits = bits[prng_below(&prng, ARRAY_SIZE(bits))],
        .refcount_order = 4,
        .size = SECTORS * LOG_SECTOR,
    };
    if (r->shape.version == 3 && prng_chance(&prng, 400)) {
        r->shape.extended = true;
        r->shape.cluster_bits = 14; /* a subcluster is a sector */
    }
    r->has_base = prng_chance(&prng, 500);
    r->narrow = (unsigned)MIN(SECTORS, (2 + prng_below(&prng, 6)) << (r->shape.cluster_bits - 9));
    (void)snprintf(r->top, sizeof(r->top), "%s/" TOP, dir);
    (void)snprintf(r->base, sizeof(r->base), "%s/" BASE, dir);
    if (r->has_base)
        r->shape.backing = BASE;
    qcow2_shape_data_file(&r->shape, &prng, DATA, 250);
    log_init(&r->log, SECTORS);
    make_images(r);
}

static void test_qcow2_races__under_sim(void **state)
{
    (void)state;
    TEST_SEEDS (seed) {
        static struct race r;
        struct qcow2_verdict v;
        struct sim_options o;
        /* Who has looked something up uses it long after others have freed it and given it away. */
        struct sim_fault late = {
            .ops = SIM_OP(IO_READ) | SIM_OP(IO_WRITE),
            .kind = SIM_DELAY,
            .delay_ns = (2 + seed % 7 * 5) * NS_PER_MS,
            .per_mille = seed % 5 ? 60 * (seed % 5) : 0,
        };
        struct sim_fault *faults[] = {&late};

        race_init(&r, seed, sim_disk_new(), "/disk");
        sim_options_init(&o, seed);
        o.disk = r.disk;
        o.faults = faults;
        o.fault_count = ARRAY_SIZE(faults);
        assert_int_equal(sim_run(&o, run_race, &r), SIM_RETURNED);
        image_judge(r.disk, r.top, NO_LEAKS, &v);
        sim_disk_free(r.disk);
        log_release(&r.log);
    }
}

/* What there is when the disk has come to its senses, and the image is opened again. */
static void look_again(void *arg)
{
    struct race *r = arg;
    uint8_t *data = xalloc(SECTORS, LOG_SECTOR);

    r->graph = graph_new(drivers);
    if (r->has_base)
        add_layer(r->graph, "base", r->base, NULL, true);
    add_layer(r->graph, "top", r->top, r->has_base ? "base" : NULL, true);
    r->backend = must_attach(
        r->graph, "top", (struct access){.wants = ACCESS_READ, .tolerates = ACCESS_ALL}, "reader");
    check(read_at(r->backend, 0, SECTORS * LOG_SECTOR, data) == 0);
    log_check_survivors(&r->log, 0, SECTORS, data);
    free(data);
    backend_co_free(r->backend);
    graph_co_free(r->graph);
}

/* Writes, reads and flushes fail: leaks at most, and what was flushed is there (P1). */
static void test_qcow2_races__on_a_disk_that_fails(void **state)
{
    unsigned fired = 0;

    (void)state;
    TEST_SEEDS (seed) {
        static struct race r;
        struct qcow2_verdict v;
        struct sim_options o;
        struct sim_fault faults[] = {
            {.name = "*top*",
             .ops = SIM_OP(IO_WRITE) | SIM_OP(IO_PUNCH) | SIM_OP(IO_ZERO) | SIM_OP(IO_TRUNCATE),
             .kind = SIM_ERROR,
             .error = seed % 2 ? EIO : ENOSPC,
             .per_mille = seed % 3 * 15},
            {.name = "*top*",
             .ops = SIM_OP(IO_READ),
             .kind = SIM_ERROR,
             .error = EIO,
             .per_mille = seed % 4 * 8},
            {.name = "*top*",
             .ops = SIM_OP(IO_SYNC),
             .kind = seed % 2 ? SIM_SYNC_DROPS : SIM_ERROR,
             .error = EIO,
             .at = seed % 5 ? 0 : 1 + seed % 40},
        };

        race_init(&r, seed, sim_disk_new(), "/disk");
        r.fails = true;
        r.drops = faults[2].at && faults[2].kind == SIM_SYNC_DROPS;
        r.faults = faults;
        r.fault_count = ARRAY_SIZE(faults);
        sim_options_init(&o, seed);
        o.disk = r.disk;
        o.short_per_mille = 0; /* what a flush loses, it loses by sectors */
        assert_int_equal(sim_run(&o, run_race, &r), SIM_RETURNED);
        for (unsigned i = 0; i < ARRAY_SIZE(faults); i++)
            fired += faults[i].fired > 0;
        image_judge(r.disk, r.top, LEAKS_ALLOWED, &v);
        assert_int_equal(sim_run(&o, look_again, &r), SIM_RETURNED);
        sim_disk_free(r.disk);
        log_release(&r.log);
    }
    assert_true(!seeds_enough(20) || fired > 0);
}

static void on_real_threads(enum loop_engine engine, const char *where)
{
    TEST_SEEDS (seed) {
        static struct race r;
        struct qcow2_verdict v;
        char dir[64], data[1200];

        (void)snprintf(dir, sizeof(dir), "%s/test-qcow2-XXXXXX", where);
        assert_non_null(mkdtemp(dir));
        race_init(&r, seed, NULL, dir);
        on_engine(engine, run_race, &r);
        image_judge(NULL, r.top, NO_LEAKS, &v);
        unlink(r.top);
        unlink(r.base);
        image_beside(data, r.top, DATA);
        unlink(data);
        rmdir(dir);
        log_release(&r.log);
    }
}

static void test_qcow2_races__on_io_uring(void **state)
{
    (void)state;
    on_real_threads(LOOP_ENGINE_IO_URING, ".");
}

static void test_qcow2_races__on_threads(void **state)
{
    (void)state;
    on_real_threads(LOOP_ENGINE_THREADS, "/dev/shm");
}
