/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Checks of a qcow2 image in use: while several loops write, compress, zero, discard and flush, each check finds what is wrong from the
 * beginning, and nothing else: neither damage nor leaks that come from looking at tables at different times. In half of the worlds more is
 * freed than may be withheld. Under sim by seed, and on real threads.
 */
#include "formats/list.h"
#include "formats/qcow2/check/qcow2-check.h"
#include "protocols/list.h"
#include "qcow2-fixture.h"
#include "seeds.h"

#define LOOPS    3
#define ACTORS   6
#define OPS      40
#define CHECKS   4
#define CLUSTERS ((uint64_t)400)
#define KEPT     ((uint64_t)8) /* guest clusters that nobody touches */

static const struct driver *const *const drivers[] = {protocol_drivers, format_drivers, NULL};

struct world {
    uint64_t seed;
    struct sim_disk *disk; /* NULL: real threads */
    char path[80];
    struct qcow2_shape shape;
    bool damaged; /* two guest clusters have one place, and a cluster is lost */
    uint64_t narrow;
    uint64_t withheld_max; /* small: more is freed than is withheld */
    uint64_t moved;        /* clusters that checks have left out */
    struct graph *graph;
    struct backend *guest;
    struct backend *checker;
    struct loop_thread *threads[LOOPS];
    unsigned done; /* atomic: actors */
};

struct actor {
    struct world *w;
    unsigned number;
    struct prng prng;
};

static void act_once(struct actor *a)
{
    struct world *w = a->w;
    uint64_t cluster = (uint64_t)1 << w->shape.cluster_bits;
    uint64_t within = prng_chance(&a->prng, 700) ? w->narrow : CLUSTERS - KEPT;
    uint64_t first = KEPT + prng_below(&a->prng, within);
    uint64_t count = MIN(1 + prng_below(&a->prng, 6), CLUSTERS - first);
    uint64_t offset = first * cluster;
    uint8_t *data = xalloc(count, cluster);
    int r = 0;

    memset(data, (int)a->number + 1, cluster / 2); /* compresses well */
    switch (prng_below(&a->prng, 8)) {
    case 0:
        r = send_request(w->guest, REQUEST_DISCARD, 0, offset, count * cluster, NULL);
        break;
    case 1:
        r = send_request(w->guest, REQUEST_WRITE_ZEROES, REQUEST_MAY_UNMAP, offset, count * cluster,
                         NULL);
        break;
    case 2:
        r = send_request(w->guest, REQUEST_WRITE, REQUEST_COMPRESSED, offset, cluster, data);
        break;
    case 3:
    case 4:
        r = flush(w->guest);
        break;
    case 5:
        r = write_at(w->guest, offset, 512, data);
        break;
    default:
        r = write_at(w->guest, offset, count * cluster, data);
        break;
    }
    check(r == 0);
    free(data);
}

static void act(void *arg)
{
    struct actor *a = arg;

    if (!a->w->disk)
        sim_install_random_spins(a->w->seed * ACTORS + a->number + 1);
    check(backend_attach(a->w->guest) == 0);
    for (unsigned i = 0; i < OPS; i++)
        act_once(a);
    if (!a->w->disk)
        sim_install_random_spins(0);
    (void)atomic_add(&a->w->done, 1u);
}

static void act_there(void *arg)
{
    struct actor *a = arg;

    check(loop_co_call(loop_thread_loop(a->w->threads[a->number % LOOPS]), act, a) == 0);
}

static void print(void *arg, const char *line)
{
    (void)arg;
    fprintf(stderr, "%s\n", line);
}

static void check_once(struct world *w)
{
    struct qcow2_check_options options = QCOW2_CHECK_OPTIONS_INIT;
    struct qcow2_check_result found;
    struct error *err = NULL;
    uint64_t wrong = w->damaged ? 1 : 0;
    int r;

    options.say = w->damaged ? NULL : print;
    options.withheld_max = w->withheld_max;
    r = qcow2_co_check_online(w->checker, &options, &found, &err);
    if (r < 0) {
        fprintf(stderr, "%s\n", error_text(err));
        abort();
    }
    if (found.corruptions != wrong || found.leaks != wrong || found.check_errors) {
        fprintf(stderr, "%" PRIu64 " corruptions, %" PRIu64 " leaks\n", found.corruptions,
                found.leaks);
        abort();
    }
    w->moved += found.moved_clusters;
    check(w->withheld_max || !found.moved_clusters);
}

static void keep_checking(void *arg)
{
    struct world *w = arg;

    for (unsigned i = 0; i < CHECKS || atomic_get(&w->done) < ACTORS; i++)
        check_once(w);
}

static void make_image(struct world *w)
{
    size_t len;
    uint8_t *bytes = qcow2_make(&w->shape, &len);
    uint64_t l2 = load_be64(bytes + load_be64(bytes + 40)) & 0xfffffffffffe00;

    if (w->damaged)
        memcpy(bytes + l2 + 8, bytes + l2, 8);
    image_put(w->disk, w->path, bytes, len);
    free(bytes);
}

static void run_world(void *arg)
{
    struct world *w = arg;
    struct access access = {.wants = ACCESS_READ, .tolerates = ACCESS_ALL};
    struct actor actors[ACTORS];
    struct error *err = NULL;
    struct co_scope s;

    for (unsigned i = 0; i < LOOPS; i++)
        check(loop_thread_start(&w->threads[i], "io", &err) == 0);
    w->graph = graph_new(drivers);
    add_layer(w->graph, "top", w->path, NULL, false);
    w->guest = must_attach(w->graph, "top", ACCESS_RW, "actor");
    w->checker = must_attach(w->graph, "top", access, "checker");
    co_scope_init(&s);
    for (unsigned i = 0; i < ACTORS; i++) {
        actors[i] = (struct actor){w, i, {w->seed * ACTORS + i}};
        check(co_scope_start(&s, act_there, &actors[i]) == 0);
    }
    check(co_scope_start(&s, keep_checking, w) == 0);
    co_scope_join(&s);
    backend_co_free(w->checker);
    backend_co_free(w->guest);
    graph_co_free(w->graph);
    for (unsigned i = 0; i < LOOPS; i++)
        loop_thread_stop(w->threads[i]);
}

static void world_init(struct world *w, uint64_t seed, struct sim_disk *disk, const char *dir)
{
    static const unsigned bits[] = {9, 9, 10, 12, 13};
    struct prng prng = {seed};

    *w = (struct world){.seed = seed, .disk = disk};
    w->damaged = seed % 3 == 0;
    w->shape = (struct qcow2_shape){
        .version = 3,
        .cluster_bits = bits[prng_below(&prng, ARRAY_SIZE(bits))],
        .refcount_order = 4,
        .allocated = KEPT,
    };
    w->shape.size = CLUSTERS << w->shape.cluster_bits;
    w->narrow = 2 + prng_below(&prng, 12);
    if (prng_chance(&prng, 500))
        w->withheld_max = (1 + prng_below(&prng, 12)) << w->shape.cluster_bits;
    (void)snprintf(w->path, sizeof(w->path), "%s/top", dir);
    make_image(w);
}

static void test_qcow2_online__finds_what_is_wrong_and_nothing_else(void **state)
{
    uint64_t moved = 0;

    (void)state;
    TEST_SEEDS (seed) {
        static struct world w;

        world_init(&w, seed, sim_disk_new(), "/disk");
        assert_int_equal(run_late(w.disk, seed, run_world, &w), SIM_RETURNED);
        sim_disk_free(w.disk);
        moved += w.moved;
    }
    assert_true(moved > 0 || !seeds_enough(10));
}

static void test_qcow2_online__on_threads(void **state)
{
    (void)state;
    TEST_SEEDS (seed) {
        static struct world w;
        char dir[] = "/dev/shm/test-qcow2-XXXXXX";

        assert_non_null(mkdtemp(dir));
        world_init(&w, seed, NULL, dir);
        on_engine(LOOP_ENGINE_THREADS, run_world, &w);
        unlink(w.path);
        rmdir(dir);
    }
}
