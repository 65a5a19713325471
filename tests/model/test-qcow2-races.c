/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Races within one qcow2 image (Q1, Q2): from several loops, many write, zero, discard and read the same few clusters, so that
 * host clusters are freed and given to others while requests that had looked them up are still under way. Each sector is a
 * register (sector-log.h): a read that finds another sector's content, a value that had been replaced before it began, or half of
 * one, is seen as what it is. Under sim by seed, and on real threads.
 *
 * In the cases about changes the size of the disk changes meanwhile, and snapshots are made, applied and deleted in between: the
 * actors race for clusters that snapshots hold, too, and these hold what they held.
 */
#include "formats/list.h"
#include "formats/qcow2/qcow2-snapshot.h"
#include "logged-disk.h"
#include "protocols/list.h"
#include "seeds.h"

#define LOOPS   3
#define ACTORS  8
#define OPS     40
#define SECTORS ((uint64_t)160)
#define TOP     "top.qcow2"
#define BASE    "base.qcow2"
#define DATA    "top.data"
#define ROUNDS  4 /* where there are changes */
#define RESIZES 3 /* in each of these */
#define KEPT    4

static const struct driver *const *const drivers[] = {protocol_drivers, format_drivers, NULL};

/* What a snapshot holds. */
struct kept {
    char name[16];
    uint64_t size;
    uint8_t *data;
};

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
    bool changes; /* of the size, and of snapshots */
    struct kept kept[KEPT];
    unsigned kept_count;
    unsigned named; /* snapshots so far */
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

/* The disk never becomes smaller than that. */
static uint64_t least_sectors(const struct race *r)
{
    return r->changes ? r->narrow / 2 : SECTORS;
}

/* What may lie beyond the end is refused. */
static bool is_right(const struct race *r, uint64_t first, uint64_t count, int result)
{
    return result == 0 || r->fails ||
           (first + count > least_sectors(r) && (result == -EIO || result == -EINVAL));
}

static void race_write(struct race *r, uint64_t first, uint64_t count, unsigned flags)
{
    int result = logged_write(r->backend, &r->log, first, count, flags);

    check(is_right(r, first, count, result));
}

/* Where flushes lose something, what it shows is anybody's guess. */
static int race_look(struct race *r, uint64_t first, uint64_t count)
{
    uint8_t *data;
    int result;

    if (!r->drops)
        return logged_read(r->backend, &r->log, first, count);
    data = xalloc(count, LOG_SECTOR);
    result = read_at(r->backend, first * LOG_SECTOR, count * LOG_SECTOR, data);
    free(data);
    return result;
}

static void race_read(struct race *r, uint64_t first, uint64_t count)
{
    check(is_right(r, first, count, race_look(r, first, count)));
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
    int result = logged_clear(r->backend, &r->log, kind, first, count, flags);

    check(is_right(r, first, count, result));
}

static void race_flush(struct race *r)
{
    int result = logged_flush(r->backend, &r->log);

    check(is_right(r, 0, 0, result));
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
    for (unsigned i = 0; i < (a->race->changes ? OPS / 2 : OPS); i++)
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
    if (r->has_base)
        logged_base_make(r->disk, r->base, &r->log, SECTORS);
    image_make(r->disk, r->top, &r->shape);
}

/* ---- changes ---- */

static void race_resize(struct race *r, struct prng *prng)
{
    AUTO(error_free) struct error *err = NULL;
    uint64_t old = backend_size(r->backend) / LOG_SECTOR;
    uint64_t least = least_sectors(r);
    uint64_t size =
        prng_chance(prng, 400) ? SECTORS : least + prng_below(prng, SECTORS + 1 - least);
    uint64_t first = MIN(old, size); /* what comes into sight is zero, as what is cut off was */
    uint32_t op = log_begin(&r->log, first, SECTORS - first, 0, false);
    int result = graph_co_resize(r->graph, "top", size * LOG_SECTOR, &err);

    if (result < 0) {
        fprintf(stderr, "resize: %s\n", error_text(err));
        abort();
    }
    log_end(&r->log, op, false, false);
}

static void keep_resizing(void *arg)
{
    struct race *r = arg;
    struct prng prng = {r->seed + 55};

    for (unsigned i = 0; i < RESIZES; i++) {
        check(co_sleep_until(loop_now() + prng_below(&prng, 4) * NS_PER_MS) == 0);
        race_resize(r, &prng);
    }
}

/* What follows on snapshots is done while no actor is there. */
static void race_keep(struct race *r)
{
    AUTO(error_free) struct error *err = NULL;
    struct kept *k = &r->kept[r->kept_count++];
    struct qcow2_snapshot_new how = {.name = k->name, .date_s = 1};

    (void)snprintf(k->name, sizeof(k->name), "s%u", r->named++);
    k->size = backend_size(r->backend);
    k->data = xalloc(1, SECTORS * LOG_SECTOR);
    check(read_at(r->backend, 0, k->size, k->data) == 0);
    check(qcow2_co_snapshot_create(r->backend, &how, &err) == 0);
}

static void race_drop(struct race *r, unsigned i)
{
    AUTO(error_free) struct error *err = NULL;

    check(qcow2_co_snapshot_delete(r->backend, r->kept[i].name, &err) == 0);
    free(r->kept[i].data);
    r->kept_count--;
    memmove(&r->kept[i], &r->kept[i + 1], (r->kept_count - i) * sizeof(r->kept[0]));
}

/* As if each sector were written anew; where there are pieces of several values nothing is done. */
static void race_apply(struct race *r, unsigned i)
{
    AUTO(error_free) struct error *err = NULL;
    const struct kept *k = &r->kept[i];
    bool vm_state;

    for (uint64_t n = 0; n < SECTORS; n++) {
        if (log_value(k->data + n * LOG_SECTOR, n) == LOG_ALIEN)
            return;
    }
    check(qcow2_co_snapshot_apply(r->backend, k->name, &vm_state, &err) == 0);
    check(backend_size(r->backend) == k->size);
    for (uint64_t n = 0; n < SECTORS; n++) {
        uint64_t value = log_value(k->data + n * LOG_SECTOR, n);

        log_end(&r->log, log_begin(&r->log, n, 1, value, false), false, false);
    }
}

static void change_snapshots(struct race *r, struct prng *prng)
{
    if (r->shape.data_file)
        return; /* there are none */
    if (r->kept_count == KEPT || (r->kept_count && prng_chance(prng, 300)))
        race_drop(r, (unsigned)prng_below(prng, r->kept_count));
    if (r->kept_count && prng_chance(prng, 300))
        race_apply(r, (unsigned)prng_below(prng, r->kept_count));
    race_keep(r);
}

/* By the judge, of the closed image. */
static void judge_kept(struct race *r)
{
    uint8_t *data = xalloc(SECTORS, LOG_SECTOR);
    struct qcow2_layer layers[2] = {{.snapshot = 0}};
    size_t len;
    uint8_t *top = image_load(r->disk, r->top, &len);
    uint8_t *base = NULL;

    layers[0].file = qcow2_file_in_memory(top, len);
    if (r->has_base) {
        base = image_load(r->disk, r->base, &len);
        layers[1].file = qcow2_file_in_memory(base, len);
    }
    for (unsigned i = 0; i < r->kept_count; i++) {
        struct kept *k = &r->kept[i];

        layers[0].snapshot = i + 1;
        check(qcow2_read_guest(layers, r->has_base ? 2 : 1, 0, data, (size_t)k->size) == 0);
        check(memcmp(data, k->data, (size_t)k->size) == 0);
        free(k->data);
    }
    free(base);
    free(top);
    free(data);
}

/* ---- the whole ---- */

static void race_round(struct race *r, unsigned number)
{
    struct actor actors[ACTORS];
    struct co_scope s;

    co_scope_init(&s);
    for (unsigned i = 0; i < ACTORS; i++) {
        actors[i] = (struct actor){r, i, {r->seed * ACTORS + i + number * UINT64_C(0x10000000)}};
        check(co_scope_start(&s, act_there, &actors[i]) == 0);
    }
    if (r->changes)
        check(co_scope_start(&s, keep_resizing, r) == 0);
    co_scope_join(&s);
}

static void run_race(void *arg)
{
    struct race *r = arg;
    struct prng prng = {r->seed + 66};
    struct error *err = NULL;

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
    for (unsigned i = 0; i < (r->changes ? ROUNDS : 1); i++) {
        if (i)
            change_snapshots(r, &prng);
        race_round(r, i);
    }
    check(race_look(r, 0, backend_size(r->backend) / LOG_SECTOR) == 0 || r->fails);
    backend_co_free(r->backend);
    graph_co_free(r->graph);
    for (unsigned i = 0; i < LOOPS; i++)
        loop_thread_stop(r->threads[i]);
}

static void race_init(struct race *r, uint64_t seed, struct sim_disk *disk, const char *dir,
                      bool changes)
{
    static const unsigned bits[] = {9, 10, 12, 13};
    struct prng prng = {seed};

    *r = (struct race){.seed = seed, .disk = disk, .changes = changes};
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
    if (changes && r->has_base)
        r->shape.version = 3; /* else it cannot grow */
    r->narrow = (unsigned)MIN(SECTORS, (2 + prng_below(&prng, 6)) << (r->shape.cluster_bits - 9));
    (void)snprintf(r->top, sizeof(r->top), "%s/" TOP, dir);
    (void)snprintf(r->base, sizeof(r->base), "%s/" BASE, dir);
    if (r->has_base)
        r->shape.backing = BASE;
    qcow2_shape_data_file(&r->shape, &prng, DATA, 250);
    log_init(&r->log, SECTORS);
    make_images(r);
}

static void race_under_sim(uint64_t seed, bool changes)
{
    static struct race r;
    struct qcow2_verdict v;

    race_init(&r, seed, sim_disk_new(), "/disk", changes);
    assert_int_equal(run_late(r.disk, seed, run_race, &r), SIM_RETURNED);
    image_judge(r.disk, r.top, NO_LEAKS, &v);
    judge_kept(&r);
    sim_disk_free(r.disk);
    log_release(&r.log);
}

static void test_qcow2_races__under_sim(void **state)
{
    (void)state;
    TEST_SEEDS (seed)
        race_under_sim(seed, false);
}

static void test_qcow2_races__with_changes_under_sim(void **state)
{
    (void)state;
    TEST_SEEDS (seed)
        race_under_sim(seed, true);
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

        race_init(&r, seed, sim_disk_new(), "/disk", false);
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

static void on_real_threads(enum loop_engine engine, const char *where, bool changes)
{
    TEST_SEEDS (seed) {
        static struct race r;
        struct qcow2_verdict v;
        char dir[64], data[1200];

        (void)snprintf(dir, sizeof(dir), "%s/test-qcow2-XXXXXX", where);
        assert_non_null(mkdtemp(dir));
        race_init(&r, seed, NULL, dir, changes);
        on_engine(engine, run_race, &r);
        image_judge(NULL, r.top, NO_LEAKS, &v);
        judge_kept(&r);
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
    on_real_threads(LOOP_ENGINE_IO_URING, ".", false);
}

static void test_qcow2_races__on_threads(void **state)
{
    (void)state;
    on_real_threads(LOOP_ENGINE_THREADS, "/dev/shm", false);
}

static void test_qcow2_races__with_changes_on_io_uring(void **state)
{
    (void)state;
    on_real_threads(LOOP_ENGINE_IO_URING, ".", true);
}

static void test_qcow2_races__with_changes_on_threads(void **state)
{
    (void)state;
    on_real_threads(LOOP_ENGINE_THREADS, "/dev/shm", true);
}
