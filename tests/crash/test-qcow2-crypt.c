/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Encrypted disks: qcow2 over an encrypted base with another key, and LUKS volumes. Several loops write at once, bytes that share
 * sectors, and a flat array says what is there; nothing of it is in the files as it is. Then the power fails, and each sector is
 * one of the values that it may have: never what decrypts to something else (WRITE-4). The loops also run on threads of their own.
 */
#include "base/checked.h"
#include "crash-fixture.h"
#include "crypt-fixture.h"
#include "formats/list.h"
#include "logged-disk.h"
#include "protocols/list.h"
#include "seeds.h"

#define TOP    "/disk/top"
#define BASE   "/disk/base"
#define SIZE   ((uint64_t)192 << 10)
#define ACTORS 4
#define OPS    20
#define STRIPE 700u /* bytes: neighbours share sectors */
#define WORD   "never in the file"
#define CUTS   2

static const struct driver *const *const drivers[] = {protocol_drivers, format_drivers, NULL};

/* Where the images are: on the simulated disk, but for one case. */
static char top_path[80] = TOP;
static char base_path[80] = BASE;

struct model {
    uint64_t seed;
    struct sim_disk *disk;
    bool is_luks;
    bool has_base;
    struct graph *graph;
    struct backend *backend;
    struct loop_thread *threads[ACTORS];
    uint8_t flat[SIZE]; /* stripe i belongs to actor i % ACTORS */
};

struct actor {
    struct model *model;
    unsigned number;
    struct prng prng;
};

static void open_disk(struct model *m)
{
    m->graph = graph_new(drivers);
    crypt_add_secrets(m->graph);
    if (m->is_luks) {
        crypt_add_luks(m->graph, "top", top_path, "a");
    } else {
        if (m->has_base)
            crypt_add_qcow2(m->graph, "base", base_path, "b", NULL, true);
        crypt_add_qcow2(m->graph, "top", top_path, "a", m->has_base ? "base" : NULL, false);
    }
    m->backend = must_attach(m->graph, "top", ACCESS_RW, "actor");
    check(backend_size(m->backend) == SIZE);
}

static void close_disk(struct model *m)
{
    m->backend = backend_co_free(m->backend);
    m->graph = graph_co_free(m->graph);
}

/* ---- against a flat array ---- */

static void compare(struct model *m, uint64_t offset, uint64_t len)
{
    uint8_t *data = xalloc(1, len);

    check(read_at(m->backend, offset, len, data) == 0);
    for (uint64_t i = 0; i < len; i++) {
        if (data[i] != m->flat[offset + i]) {
            fprintf(stderr, "byte %" PRIu64 " is %u, not %u\n", offset + i, data[i],
                    m->flat[offset + i]);
            abort();
        }
    }
    free(data);
}

/* In several vectors, more than fit into one piece at times. */
static void write_vectors(struct model *m, struct prng *prng, uint64_t offset, uint64_t len)
{
    uint8_t *data = xalloc(1, len);
    struct iovec iov[40];
    struct request req = {.kind = REQUEST_WRITE, .offset = offset, .len = len, .iov = iov};
    uint64_t most = 1 + prng_below(prng, 9000);
    uint64_t at = 0;

    for (uint64_t i = 0; i < len; i++)
        data[i] = i % 32 < sizeof(WORD) ? (uint8_t)WORD[i % 32] : (uint8_t)prng_next(prng);
    while (at < len) {
        uint64_t piece = MIN(len - at, 1 + prng_below(prng, most));

        if (req.iov_count + 1 == ARRAY_SIZE(iov))
            piece = len - at;
        iov[req.iov_count++] = (struct iovec){data + at, piece};
        at += piece;
    }
    check(backend_co_request(m->backend, &req) == 0);
    memcpy(m->flat + offset, data, len);
    free(data);
}

static void discard(struct model *m, uint64_t offset, uint64_t len)
{
    uint8_t *data = xalloc(1, len);

    check(send_request(m->backend, REQUEST_DISCARD, 0, offset, len, NULL) == 0);
    check(read_at(m->backend, offset, len, data) == 0);
    for (uint64_t i = 0; i < len; i++) {
        check(data[i] == 0 || data[i] == m->flat[offset + i]);
        m->flat[offset + i] = data[i];
    }
    free(data);
}

static void operate(struct actor *a, uint64_t offset, uint64_t len)
{
    struct model *m = a->model;
    unsigned unmap = prng_chance(&a->prng, 500) ? REQUEST_MAY_UNMAP : 0;

    switch (prng_below(&a->prng, 9)) {
    case 0:
    case 1:
        compare(m, offset, len);
        break;
    case 2:
        check(send_request(m->backend, REQUEST_WRITE_ZEROES, unmap, offset, len, NULL) == 0);
        memset(m->flat + offset, 0, len);
        break;
    case 3:
        discard(m, offset, len);
        break;
    case 4:
        check(flush(m->backend) == 0);
        break;
    default:
        write_vectors(m, &a->prng, offset, len);
        break;
    }
}

static void act(void *arg)
{
    struct actor *a = arg;

    check(backend_attach(a->model->backend) == 0);
    for (unsigned i = 0; i < OPS; i++) {
        uint64_t stripe = prng_below(&a->prng, SIZE / STRIPE / ACTORS) * ACTORS + a->number;
        uint64_t skip = prng_below(&a->prng, STRIPE);

        operate(a, stripe * STRIPE + skip, 1 + prng_below(&a->prng, STRIPE - skip));
    }
}

static void act_there(void *arg)
{
    struct actor *a = arg;

    check(loop_co_call(loop_thread_loop(a->model->threads[a->number]), act, a) == 0);
}

/* Alone, and longer than any stripe: whole clusters, and what is computed on other threads. */
static void act_alone(struct model *m, struct prng *prng)
{
    struct actor a = {m, 0, {prng_next(prng)}};

    for (unsigned i = 0; i < 6; i++) {
        uint64_t offset = prng_below(prng, SIZE);

        operate(&a, offset, 1 + prng_below(prng, SIZE - offset));
    }
}

static void write_base(struct model *m)
{
    static const uint8_t data[3000] = "of the base";
    const struct model own = *m;

    m->graph = graph_new(drivers);
    crypt_add_secrets(m->graph);
    crypt_add_qcow2(m->graph, "base", base_path, "b", NULL, false);
    m->backend = must_attach(m->graph, "base", ACCESS_RW, "maker");
    for (uint64_t at = 100; at + sizeof(data) < SIZE; at += 5 * sizeof(data)) {
        check(send_request(m->backend, REQUEST_WRITE, 0, at, sizeof(data), data) == 0);
        memcpy(m->flat + at, data, sizeof(data));
    }
    close_disk(m);
    m->graph = own.graph;
}

/* What comes into sight is zero, but of a volume, and the image stays encrypted. */
static void grow_and_shrink(struct model *m)
{
    static const uint8_t zeroes[4096];
    uint8_t data[sizeof(zeroes)];
    struct error *err = NULL;

    check(graph_co_resize(m->graph, "top", 2 * SIZE, &err) == 0);
    check(read_at(m->backend, SIZE, sizeof(data), data) == 0);
    check(m->is_luks || memcmp(data, zeroes, sizeof(data)) == 0);
    check(send_request(m->backend, REQUEST_WRITE, 0, 2 * SIZE - 700, 300,
                       WORD WORD WORD WORD WORD WORD WORD WORD WORD WORD WORD WORD WORD WORD WORD
                           WORD WORD WORD WORD) == 0);
    check(graph_co_resize(m->graph, "top", SIZE, &err) == 0);
}

static void run_model(void *arg)
{
    struct model *m = arg;
    struct prng prng = {m->seed};
    struct actor actors[ACTORS];
    struct error *err = NULL;
    struct co_scope s;

    if (m->has_base)
        write_base(m);
    open_disk(m);
    if (m->is_luks) /* whatever was in the file */
        check(read_at(m->backend, 0, SIZE, m->flat) == 0);
    act_alone(m, &prng);
    co_scope_init(&s);
    for (unsigned i = 0; i < ACTORS; i++) {
        check(loop_thread_start(&m->threads[i], "io", &err) == 0);
        actors[i] = (struct actor){m, i, {prng_next(&prng)}};
        check(co_scope_start(&s, act_there, &actors[i]) == 0);
    }
    co_scope_join(&s);
    act_alone(m, &prng);
    compare(m, 0, SIZE);
    grow_and_shrink(m);
    close_disk(m);
    open_disk(m);
    compare(m, 0, SIZE);
    close_disk(m);
    for (unsigned i = 0; i < ACTORS; i++)
        loop_thread_stop(m->threads[i]);
}

static bool has_word(const uint8_t *bytes, size_t len)
{
    return memmem(bytes, len, WORD, strlen(WORD)) || memmem(bytes, len, "of the base", 11);
}

static void look_for_words(struct model *m, const char *path)
{
    size_t len;
    uint8_t *bytes = image_load(m->disk, path, &len);

    check(!has_word(bytes, len));
    free(bytes);
}

static void make_image(struct sim_disk *disk, const char *path, const char *password,
                       unsigned version, struct prng *prng)
{
    static const unsigned sizes[] = {9, 9, 10, 12, 14, 16};
    unsigned bits = sizes[prng_below(prng, ARRAY_SIZE(sizes))];

    crypt_put_qcow2(disk, path, password, version, bits,
                    version == 3 && bits >= 14 && prng_chance(prng, 600), SIZE);
}

static void make_disks(struct sim_disk *disk, struct prng *prng, bool is_luks, bool has_base)
{
    unsigned version = has_base || prng_chance(prng, 600) ? 3 : 2;

    if (is_luks) {
        crypt_put_luks(disk, top_path, "a", SIZE);
        return;
    }
    make_image(disk, top_path, "a", version, prng);
    if (has_base)
        make_image(disk, base_path, "b", 3, prng);
}

/* On a simulated disk, or, without one, on threads. */
static void model_of(uint64_t seed, struct sim_disk *disk, bool is_luks)
{
    struct model *m = xnew(struct model);
    struct prng prng = {seed};
    struct qcow2_verdict v;

    m->seed = seed;
    m->disk = disk;
    m->is_luks = is_luks;
    m->has_base = !is_luks && prng_chance(&prng, 500);
    make_disks(m->disk, &prng, is_luks, m->has_base);
    if (disk)
        assert_int_equal(run_on(m->disk, seed, run_model, m), SIM_RETURNED);
    else
        on_engine(LOOP_ENGINE_THREADS, run_model, m);
    look_for_words(m, top_path);
    if (!is_luks)
        image_judge(m->disk, top_path, NO_LEAKS, &v);
    if (m->has_base)
        look_for_words(m, base_path);
    sim_disk_free(disk);
    free(m);
}

static void test_qcow2_crypt__image_is_a_flat_array(void **state)
{
    (void)state;
    TEST_SEEDS (seed)
        model_of(seed, sim_disk_new(), false);
}

static void test_qcow2_crypt__volume_is_a_flat_array(void **state)
{
    (void)state;
    TEST_SEEDS (seed)
        model_of(seed, sim_disk_new(), true);
}

static void test_qcow2_crypt__on_threads(void **state)
{
    (void)state;
    TEST_SEEDS (seed) {
        char dir[] = "/dev/shm/test-crypt-XXXXXX";

        assert_non_null(mkdtemp(dir));
        (void)snprintf(top_path, sizeof(top_path), "%s/top", dir);
        (void)snprintf(base_path, sizeof(base_path), "%s/base", dir);
        model_of(seed, NULL, seed % 2);
        unlink(top_path);
        unlink(base_path);
        rmdir(dir);
    }
    (void)snprintf(top_path, sizeof(top_path), TOP);
    (void)snprintf(base_path, sizeof(base_path), BASE);
}

/* ---- neighbours within a sector ---- */

#define NEIGHBOUR ((uint64_t)256) /* bytes of sector 0 from here on never change */

static void write_beside(void *arg)
{
    struct actor *a = arg;
    uint8_t data[NEIGHBOUR];

    check(backend_attach(a->model->backend) == 0);
    for (unsigned i = 0; i < OPS; i++) {
        memset(data, (int)i, sizeof(data));
        check(write_at(a->model->backend, 0, sizeof(data), data) == 0);
    }
}

static void read_beside(void *arg)
{
    struct actor *a = arg;
    uint64_t from = NEIGHBOUR + prng_below(&a->prng, 100);

    check(backend_attach(a->model->backend) == 0);
    for (unsigned i = 0; i < OPS; i++)
        compare(a->model, from, 100);
}

static void write_there(void *arg)
{
    struct actor *a = arg;

    check(loop_co_call(loop_thread_loop(a->model->threads[a->number]), write_beside, a) == 0);
}

static void read_there(void *arg)
{
    struct actor *a = arg;

    check(loop_co_call(loop_thread_loop(a->model->threads[a->number]), read_beside, a) == 0);
}

static void run_neighbours(void *arg)
{
    struct model *m = arg;
    struct actor actors[2];
    struct error *err = NULL;
    struct co_scope s;

    open_disk(m);
    memset(m->flat, 0x5a, LOG_SECTOR);
    check(write_at(m->backend, 0, LOG_SECTOR, m->flat) == 0);
    co_scope_init(&s);
    for (unsigned i = 0; i < ARRAY_SIZE(actors); i++) {
        check(loop_thread_start(&m->threads[i], "io", &err) == 0);
        actors[i] = (struct actor){m, i, {m->seed}};
        check(co_scope_start(&s, i ? read_there : write_there, &actors[i]) == 0);
    }
    co_scope_join(&s);
    close_disk(m);
    for (unsigned i = 0; i < ARRAY_SIZE(actors); i++)
        loop_thread_stop(m->threads[i]);
}

/* A sector that is half written decrypts to something else, also where it does not change. */
static void test_qcow2_crypt__no_sector_is_read_half_written(void **state)
{
    (void)state;
    TEST_SEEDS (seed) {
        struct model *m = xnew(struct model);
        struct prng prng = {seed};
        struct sim_options o;

        m->seed = seed;
        m->disk = sim_disk_new();
        m->is_luks = seed % 2;
        make_disks(m->disk, &prng, m->is_luks, false);
        sim_options_init(&o, seed);
        o.disk = m->disk;
        o.short_per_mille = 500;
        assert_int_equal(sim_run(&o, run_neighbours, m), SIM_RETURNED);
        m->disk = sim_disk_free(m->disk);
        free(m);
    }
}

/* ---- damage ---- */

static void write_much(void *arg)
{
    struct model *m = arg;
    uint8_t *data = xalloc(1, SIZE);
    int r;

    open_disk(m);
    r = send_request(m->backend, REQUEST_WRITE, 0, 0, SIZE, data);
    check(r == -EIO);
    close_disk(m);
    free(data);
}

/* Even where it is said to be free: what is lost there is all of the disk. */
static void test_qcow2_crypt__luks_header_is_never_written_over(void **state)
{
    struct model *m = xnew(struct model);
    uint64_t len = crypt_header_len();
    uint8_t *bytes;
    size_t size;

    (void)state;
    m->disk = sim_disk_new();
    crypt_put_qcow2(m->disk, TOP, "a", 3, 12, false, SIZE);
    crypt_free_header(m->disk, TOP);
    assert_int_equal(run_on(m->disk, 1, write_much, m), SIM_RETURNED);
    bytes = image_load(m->disk, TOP, &size);
    assert_non_null(memmem(bytes, size, crypt_header("a"), len));
    free(bytes);
    m->disk = sim_disk_free(m->disk);
    free(m);
}

/* ---- power cuts ---- */

struct run {
    struct model m;
    struct sector_log log;
};

static void write_sectors(struct run *r, struct prng *prng)
{
    uint64_t first = prng_below(prng, SIZE / LOG_SECTOR);
    uint64_t count = 1 + prng_below(prng, MIN(SIZE / LOG_SECTOR - first, (uint64_t)60));
    int result = prng_chance(prng, 850)
                     ? logged_write(r->m.backend, &r->log, first, count, 0)
                     : logged_clear(r->m.backend, &r->log, REQUEST_WRITE_ZEROES, first, count, 0);

    check(result == 0);
}

static void run_until_cut(void *arg)
{
    struct run *r = arg;
    struct prng prng = {r->m.seed};

    open_disk(&r->m);
    for (unsigned i = 0; i < 24; i++) {
        if (prng_chance(&prng, 250))
            check(logged_flush(r->m.backend, &r->log) == 0);
        else
            write_sectors(r, &prng);
    }
    close_disk(&r->m);
}

static void look(void *arg)
{
    struct run *r = arg;
    uint8_t *data = xalloc(1, SIZE);

    open_disk(&r->m);
    check(read_at(r->m.backend, 0, SIZE, data) == 0);
    log_check_survivors(&r->log, 0, SIZE / LOG_SECTOR, data);
    close_disk(&r->m);
    free(data);
}

/* 0: it was not cut off. */
static uint64_t run_cut_at(uint64_t seed, uint64_t kill_at)
{
    static struct run r;
    struct prng prng = {seed};
    struct qcow2_verdict v;
    uint64_t ops = 0;

    r = (struct run){.m = {.seed = seed, .disk = sim_disk_new()}};
    log_init(&r.log, SIZE / LOG_SECTOR);
    make_disks(r.m.disk, &prng, false, false);
    if (run_killed_at(r.m.disk, seed, run_until_cut, &r, kill_at) == SIM_KILLED) {
        sim_disk_power_cut(r.m.disk, 1 + prng_next(&prng) % 1000000);
        image_judge(r.m.disk, TOP, LEAKS_ALLOWED, &v);
        check(run_on(r.m.disk, seed + 1, look, &r) == SIM_RETURNED);
    } else {
        ops = sim_disk_ops(r.m.disk);
    }
    log_release(&r.log);
    r.m.disk = sim_disk_free(r.m.disk);
    return ops;
}

static void cut_often(void *arg)
{
    uint64_t seed = *(const uint64_t *)arg;
    struct prng prng = {seed + 9};
    uint64_t ops = run_cut_at(seed, 0);

    for (unsigned i = 0; i < CUTS; i++)
        (void)run_cut_at(seed, 1 + prng_below(&prng, ops));
}

static void test_qcow2_crypt__power_cuts_show_nothing_else(void **state)
{
    (void)state;
    (void)crypt_header("a");
    TEST_SEEDS (seed)
        in_child(cut_often, &seed);
}
