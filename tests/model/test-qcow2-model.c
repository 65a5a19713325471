/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Random operations from several loops on a random chain of qcow2 images, against a flat array; while the disk's size changes
 * under them. After it is closed, the judge finds neither error nor leak, layers below are as they were, the judge reads what
 * the array holds, and so does the driver when it opens the image again. Under sim by seed (T1), and on real threads (T2).
 *
 * Each byte below FLOOR has one actor that writes it, and neighbours belong to others: they share clusters all the time. What
 * lies above FLOOR belongs to the one who changes the size.
 *
 *      backends, some on each loop
 *          |
 *       qcow2 3 --backing--> qcow2 2 --backing--> qcow2 1 --backing--> qcow2 0     1 to 4 layers of any shape
 *          |                    |                    |                    |
 *         file                 file                 file                 file
 *
 * Some writes, and some reads, are copies by the host from another file and to it (graph/offload.h).
 */
#include "base/atomic.h"
#include "base/checked.h"
#include "formats/list.h"
#include "graph/offload.h"
#include "protocols/list.h"
#include "qcow2-fixture.h"
#include "seeds.h"

#define LOOPS      3
#define ACTORS     6
#define OPS        25
#define FLOOR      ((uint64_t)160 << 10)
#define SIZE_MAX_  ((uint64_t)256 << 10)
#define LAYERS_MAX 4
#define STRIPES    300
#define SESSIONS   2

static const struct driver *const *const drivers[] = {protocol_drivers, format_drivers, NULL};

struct range {
    uint64_t offset;
    uint64_t len;
};

struct model {
    uint64_t seed;
    struct sim_disk *disk; /* NULL: real threads */
    const char *dir;
    struct prng prng;

    /* Constant once the actors run. */
    unsigned layers;
    struct qcow2_shape shapes[LAYERS_MAX];
    char paths[LAYERS_MAX][80];
    char data[LAYERS_MAX][16];  /* names of external data files */
    uint8_t *below[LAYERS_MAX]; /* what the lower images held at first */
    size_t below_len[LAYERS_MAX];
    const char *options;           /* of the top */
    struct range stripes[STRIPES]; /* stripe i belongs to actor i % ACTORS */
    unsigned stripe_count;

    struct graph *graph;
    struct backend *backend;
    struct backend *well; /* a raw disk; each byte belongs to the actor that owns it in the other */
    char well_path[80];
    struct loop_thread *threads[LOOPS];
    uint64_t size; /* only touched by the one who changes it */
    uint8_t back[SIZE_MAX_];
    uint8_t flat[SIZE_MAX_]; /* each byte only touched by the actor that owns it */
    bool done;               /* atomic */
};

struct actor {
    struct model *model;
    unsigned number;
    struct prng prng;
};

static void fill_random(struct prng *prng, uint8_t *p, size_t len)
{
    for (size_t i = 0; i < len; i++)
        p[i] = (uint8_t)prng_next(prng);
}

static void die_unequal(const struct model *m, const char *what, const uint8_t *data,
                        const uint8_t *expected, uint64_t offset, uint64_t len)
{
    for (uint64_t i = 0; i < len; i++) {
        if (data[i] == expected[i])
            continue;
        fprintf(stderr, "%s: %u layers, clusters of 2^%u: byte %" PRIu64 " is %u, not %u\n", what,
                m->layers, m->shapes[m->layers - 1].cluster_bits, offset + i, data[i], expected[i]);
        abort();
    }
}

/* ---- one operation ---- */

static void read_and_compare(struct model *m, uint64_t offset, uint64_t len)
{
    uint8_t *data = xalloc(1, len);

    check(read_at(m->backend, offset, len, data) == 0);
    die_unequal(m, "read", data, m->flat + offset, offset, len);
    free(data);
}

static void write_random(struct model *m, struct prng *prng, unsigned flags, uint64_t offset,
                         uint64_t len)
{
    uint8_t *data = xalloc(1, len);

    fill_random(prng, data, len);
    check(send_request(m->backend, REQUEST_WRITE, flags, offset, len, data) == 0);
    memcpy(m->flat + offset, data, len);
    free(data);
}

/* How many copies of each direction the host has done; atomic. */
static unsigned copied_in;
static unsigned copied_out;

static void copy_in(struct model *m, struct prng *prng, unsigned flags, uint64_t offset,
                    uint64_t len)
{
    uint8_t *data = xalloc(1, len);
    int r;

    fill_random(prng, data, len);
    check(write_at(m->well, offset, len, data) == 0);
    r = backend_co_copy(m->well, offset, m->backend, offset, len, flags);
    check(r == 0 || r == -EOPNOTSUPP);
    if (r < 0)
        r = send_request(m->backend, REQUEST_WRITE, flags, offset, len, data);
    else
        atomic_add(&copied_in, 1u);
    check(r == 0);
    memcpy(m->flat + offset, data, len);
    free(data);
}

static void copy_out(struct model *m, uint64_t offset, uint64_t len)
{
    uint8_t *data = xalloc(1, len);
    int r = backend_co_copy(m->backend, offset, m->well, offset, len, 0);

    check(r == 0 || r == -EOPNOTSUPP);
    if (r == 0) {
        check(read_at(m->well, offset, len, data) == 0);
        die_unequal(m, "copy", data, m->flat + offset, offset, len);
        atomic_add(&copied_out, 1u);
    }
    free(data);
}

static void write_zeroes(struct model *m, struct prng *prng, unsigned flags, uint64_t offset,
                         uint64_t len)
{
    int r;

    flags |= prng_chance(prng, 500) ? REQUEST_MAY_UNMAP : 0;
    flags |= prng_chance(prng, 200) ? REQUEST_NO_FALLBACK : 0;
    r = send_request(m->backend, REQUEST_WRITE_ZEROES, flags, offset, len, NULL);
    if (r == -EOPNOTSUPP && (flags & REQUEST_NO_FALLBACK)) {
        read_and_compare(m, offset, len); /* then nothing has changed */
        return;
    }
    if (r < 0) {
        fprintf(stderr, "write-zeroes, flags %x: %s\n", flags, strerror(-r));
        abort();
    }
    memset(m->flat + offset, 0, len);
}

/* What was discarded is as it was, or zero: never what a layer below holds. */
static void discard(struct model *m, uint64_t offset, uint64_t len)
{
    uint8_t *flat = m->flat + offset;
    uint8_t *data = xalloc(1, len);

    check(send_request(m->backend, REQUEST_DISCARD, 0, offset, len, NULL) == 0);
    check(read_at(m->backend, offset, len, data) == 0);
    for (uint64_t i = 0; i < len; i++) {
        if (data[i] != 0)
            die_unequal(m, "discard", data + i, flat + i, offset + i, 1);
        flat[i] = data[i];
    }
    free(data);
}

/* What is said to be zero is zero, and all of the range is told of. */
static void look_at_extents(struct model *m, uint64_t offset, uint64_t len)
{
    struct extent v[16];
    struct extents e = {.v = v, .max = ARRAY_SIZE(v)};
    struct request req = {.kind = REQUEST_EXTENTS, .offset = offset, .len = len, .extents = &e};
    uint64_t pos = offset;

    check(backend_co_request(m->backend, &req) == 0);
    check(e.count > 0);
    for (unsigned i = 0; i < e.count; i++) {
        check(v[i].offset == pos && v[i].len > 0);
        check(!(v[i].flags & EXTENT_DATA) || !(v[i].flags & EXTENT_ZERO));
        pos += v[i].len;
        check(pos <= offset + len);
        for (uint64_t k = 0; k < v[i].len && (v[i].flags & EXTENT_ZERO); k++)
            check(m->flat[v[i].offset + k] == 0);
    }
    check(pos == offset + len || e.count == e.max);
}

static void operate(struct model *m, struct prng *prng, uint64_t offset, uint64_t len)
{
    unsigned flags = prng_chance(prng, 150) ? REQUEST_FUA : 0;

    switch (prng_below(prng, 13)) {
    case 0:
    case 1:
    case 2:
        read_and_compare(m, offset, len);
        break;
    case 3:
    case 4:
        write_zeroes(m, prng, flags, offset, len);
        break;
    case 5:
        discard(m, offset, len);
        break;
    case 6:
        look_at_extents(m, offset, len);
        break;
    case 7:
        check(flush(m->backend) == 0);
        break;
    case 8:
        copy_in(m, prng, flags, offset, len);
        break;
    case 9:
        copy_out(m, offset, len);
        break;
    default:
        write_random(m, prng, flags, offset, len);
        break;
    }
}

/* ---- who operates ---- */

static void act(void *arg)
{
    struct actor *a = arg;
    struct model *m = a->model;
    unsigned rounds = (m->stripe_count - a->number + ACTORS - 1) / ACTORS;

    if (!m->disk)
        sim_install_random_spins(m->seed * ACTORS + a->number + 1);
    check(backend_attach(m->backend) == 0 && backend_attach(m->well) == 0);
    for (unsigned i = 0; i < OPS; i++) {
        const struct range *s = &m->stripes[prng_below(&a->prng, rounds) * ACTORS + a->number];
        uint64_t skip = prng_chance(&a->prng, 500) ? 0 : prng_below(&a->prng, s->len);
        uint64_t len = s->len - skip;

        if (prng_chance(&a->prng, 400))
            len = 1 + prng_below(&a->prng, len);
        operate(m, &a->prng, s->offset + skip, len);
    }
    if (!m->disk)
        sim_install_random_spins(0);
}

static void act_there(void *arg)
{
    struct actor *a = arg;

    check(loop_co_call(loop_thread_loop(a->model->threads[a->number % LOOPS]), act, a) == 0);
}

static void wait_for_actors(void *arg)
{
    struct model *m = arg;
    struct actor actors[ACTORS];
    struct co_scope s;

    co_scope_init(&s);
    for (unsigned i = 0; i < ACTORS; i++) {
        actors[i] = (struct actor){m, i, {prng_next(&m->prng)}};
        check(co_scope_start(&s, act_there, &actors[i]) == 0);
    }
    co_scope_join(&s);
    atomic_set(&m->done, true);
}

/* Smaller or larger, and something written where it is new: what comes into being reads as zeroes. */
static void change_size(struct model *m, struct prng *prng)
{
    AUTO(error_free) struct error *err = NULL;
    uint64_t size = FLOOR + prng_below(prng, (SIZE_MAX_ - FLOOR) / 512 + 1) * 512;
    int r;

    r = graph_co_resize(m->graph, "top", size, &err);
    if (r == -EOPNOTSUPP && m->shapes[m->layers - 1].version == 2 && m->layers > 1)
        return; /* version 2 cannot hide what lies below */
    if (r < 0) {
        fprintf(stderr, "from %" PRIu64 " to %" PRIu64 ": %s\n", m->size, size, error_text(err));
        abort();
    }
    if (size < m->size)
        memset(m->flat + size, 0, m->size - size);
    m->size = size;
    check(backend_size(m->backend) == size);
    for (unsigned i = 0; i < 3 && size > FLOOR; i++) {
        uint64_t at = FLOOR + prng_below(prng, size - FLOOR);

        operate(m, prng, at, 1 + prng_below(prng, size - at));
    }
}

/* ---- the chain ---- */

static void node_of_layer(char *name, size_t len, const struct model *m, unsigned i)
{
    if (i == m->layers - 1)
        (void)snprintf(name, len, "top");
    else
        (void)snprintf(name, len, "l%u", i);
}

static void open_chain(struct model *m, unsigned first, bool read_only)
{
    char name[16], below[16];

    for (unsigned i = first; i < m->layers; i++) {
        node_of_layer(name, sizeof(name), m, i);
        if (i > 0)
            node_of_layer(below, sizeof(below), m, i - 1);
        layer_options = i == m->layers - 1 ? m->options : "";
        add_layer(m->graph, name, m->paths[i], i ? below : NULL, read_only || i < m->layers - 1);
    }
}

static void open_top(struct model *m, bool read_only)
{
    struct access access = {.wants = ACCESS_READ | (read_only ? 0 : ACCESS_WRITE),
                            .tolerates = ACCESS_ALL};

    m->graph = graph_new(drivers);
    open_chain(m, 0, read_only);
    m->backend = must_attach(m->graph, "top", access, "actor");
    add_or_die(m->graph, "{'driver':'file','node-name':'well','filename':'%s'}", m->well_path);
    m->well = must_attach(m->graph, "well", ACCESS_RW, "actor");
    check(backend_size(m->backend) == m->size);
}

static void close_top(struct model *m)
{
    m->backend = backend_co_free(m->backend);
    m->well = backend_co_free(m->well);
    m->graph = graph_co_free(m->graph);
}

static void cut_stripes(struct model *m)
{
    uint64_t pos = 0;

    for (m->stripe_count = 0; m->stripe_count < STRIPES && pos < FLOOR; m->stripe_count++) {
        uint64_t len = 1 + prng_below(&m->prng, prng_chance(&m->prng, 200) ? 9000 : 1200);

        if (prng_chance(&m->prng, 300))
            len = align_up(pos + len, 512) - pos;
        m->stripes[m->stripe_count] = (struct range){pos, MIN(len, FLOOR - pos)};
        pos += m->stripes[m->stripe_count].len;
    }
}

/* Images below are written through the driver, too, one at a time, from the lowest up. */
static void write_layer(struct model *m, unsigned i)
{
    char name[16] = "top", below[16];
    uint64_t size = m->shapes[i].size;

    m->graph = graph_new(drivers);
    layer_options = "";
    for (unsigned k = 0; k < i; k++) {
        (void)snprintf(name, sizeof(name), "l%u", k);
        (void)snprintf(below, sizeof(below), "l%u", k ? k - 1 : 0);
        add_layer(m->graph, name, m->paths[k], k ? below : NULL, true);
    }
    (void)snprintf(below, sizeof(below), "l%u", i ? i - 1 : 0);
    add_layer(m->graph, "top", m->paths[i], i ? below : NULL, false);
    m->backend = must_attach(m->graph, "top", ACCESS_RW, "maker");
    if (size < SIZE_MAX_)
        memset(m->flat + size, 0,
               SIZE_MAX_ - size); /* a smaller layer hides what is below its end */
    for (unsigned k = 0; k < 12; k++) {
        uint64_t at = prng_below(&m->prng, size);
        uint64_t len = 1 + prng_below(&m->prng, MIN(size - at, (uint64_t)20000));

        if (prng_chance(&m->prng, 250))
            write_zeroes(m, &m->prng, 0, at, len);
        else
            write_random(m, &m->prng, 0, at, len);
    }
    close_top(m);
}

static void remember_below(struct model *m)
{
    for (unsigned i = 0; i + 1 < m->layers; i++)
        m->below[i] = image_load(m->disk, m->paths[i], &m->below_len[i]);
}

static void compare_below(struct model *m)
{
    for (unsigned i = 0; i + 1 < m->layers; i++) {
        size_t len;
        uint8_t *bytes = image_load(m->disk, m->paths[i], &len);

        check(len == m->below_len[i] && memcmp(bytes, m->below[i], len) == 0);
        free(bytes);
        free(m->below[i]);
    }
}

static void judge_all(struct model *m)
{
    const char *paths[LAYERS_MAX];
    struct qcow2_verdict v = {.errors = 0};

    for (unsigned i = 0; i < m->layers; i++) {
        paths[m->layers - 1 - i] = m->paths[i];
        image_judge(m->disk, m->paths[i], NO_LEAKS, &v);
    }
    check(v.virtual_size == m->size);
    if (m->shapes[m->layers - 1].data_raw)
        image_judge_raw_data(m->disk, m->paths[m->layers - 1], m->size);
    image_read_guest(m->disk, paths, m->layers, 0, m->back, m->size);
    die_unequal(m, "judge", m->back, m->flat, 0, m->size);
}

/* ---- a whole life ---- */

static void one_session(struct model *m)
{
    struct prng prng = {prng_next(&m->prng)};
    struct co_scope s;

    open_top(m, false);
    cut_stripes(m);
    remember_below(m);
    atomic_set(&m->done, false);
    co_scope_init(&s);
    check(co_scope_start(&s, wait_for_actors, m) == 0);
    do {
        change_size(m, &prng);
        co_sleep_until(loop_clock() + prng_below(&prng, 2000) * NS_PER_US);
    } while (!atomic_get(&m->done));
    co_scope_join(&s);
    read_and_compare(m, 0, m->size);
    look_at_extents(m, 0, m->size);
    close_top(m);
    compare_below(m);
    judge_all(m);
}

static void run_model(void *arg)
{
    struct model *m = arg;
    struct error *err = NULL;

    for (unsigned i = 0; i < LOOPS; i++)
        check(loop_thread_start(&m->threads[i], "io", &err) == 0);
    image_put(m->disk, m->well_path, m->back, SIZE_MAX_);
    for (unsigned i = 0; i < m->layers; i++) {
        image_make(m->disk, m->paths[i], &m->shapes[i]);
        m->size = m->shapes[i].size;
        write_layer(m, i);
    }
    judge_all(m);
    for (unsigned i = 0; i < SESSIONS; i++)
        one_session(m);
    open_top(m, true);
    read_and_compare(m, 0, m->size);
    close_top(m);
    judge_all(m);
    for (unsigned i = 0; i < LOOPS; i++)
        loop_thread_stop(m->threads[i]);
}

static void plan_model(struct model *m)
{
    m->layers = 1 + (unsigned)prng_below(&m->prng, LAYERS_MAX);
    for (unsigned i = 0; i < m->layers; i++) {
        uint64_t size = FLOOR + prng_below(&m->prng, (SIZE_MAX_ - FLOOR) / 512) * 512;

        if (i < m->layers - 1 && prng_chance(&m->prng, 300))
            size = 512 + prng_below(&m->prng, FLOOR / 512) * 512; /* shorter than what is above */
        qcow2_shape_random(&m->shapes[i], &m->prng, size);
        if (i == 0 && prng_chance(&m->prng, 300))
            m->shapes[i].allocated = size >> m->shapes[i].cluster_bits;
        (void)snprintf(m->paths[i], sizeof(m->paths[i]), "%s/l%u.qcow2", m->dir, i);
    }
    (void)snprintf(m->well_path, sizeof(m->well_path), "%s/well", m->dir);
    for (unsigned i = 1; i < m->layers; i++)
        m->shapes[i].backing = m->paths[i - 1];
    m->options = "";
    if (m->shapes[m->layers - 1].version == 3 && prng_chance(&m->prng, 300))
        m->options = "'discard-no-unref':true,";
    else if (prng_chance(&m->prng, 100))
        m->options = "'pass-discard-request':false,";
    for (unsigned i = 0; i < m->layers; i++) {
        (void)snprintf(m->data[i], sizeof(m->data[i]), "l%u.data", i);
        qcow2_shape_data_file(&m->shapes[i], &m->prng, m->data[i], 250);
    }
}

static void test_qcow2_model__under_sim(void **state)
{
    (void)state;
    TEST_SEEDS (seed) {
        static struct model m;

        m = (struct model){.seed = seed, .prng = {seed}, .disk = sim_disk_new(), .dir = "/disk"};
        plan_model(&m);
        assert_int_equal(run_on(m.disk, seed, run_model, &m), SIM_RETURNED);
        sim_disk_free(m.disk);
    }
    printf("# %u copies to the image, %u from it\n", copied_in, copied_out);
    assert_true(!seeds_enough(50) || (copied_in > 50 && copied_out > 50));
}

static void on_real_threads(enum loop_engine engine, const char *where)
{
    TEST_SEEDS (seed) {
        static struct model m;
        char dir[64], data[1200];

        (void)snprintf(dir, sizeof(dir), "%s/test-qcow2-XXXXXX", where);
        assert_non_null(mkdtemp(dir));
        m = (struct model){.seed = seed, .prng = {seed}, .dir = dir};
        plan_model(&m);
        on_engine(engine, run_model, &m);
        for (unsigned i = 0; i < m.layers; i++) {
            unlink(m.paths[i]);
            image_beside(data, m.paths[i], m.data[i]);
            unlink(data);
        }
        unlink(m.well_path);
        rmdir(dir);
    }
}

static void test_qcow2_model__on_io_uring(void **state)
{
    (void)state;
    on_real_threads(LOOP_ENGINE_IO_URING, ".");
}

static void test_qcow2_model__on_threads_and_tmpfs(void **state)
{
    (void)state;
    on_real_threads(LOOP_ENGINE_THREADS, "/dev/shm");
}
