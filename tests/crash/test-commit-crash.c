/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Power cuts while an image is committed into its backing file: after each operation of the disk in turn. What was not flushed is
 * kept, dropped or torn, each write by itself. Then both images are sound, with leaks at most; the disk holds what it held; and
 * committing again ends what was begun.
 */
#include "cli/image/image-commit.h"
#include "crash-fixture.h"
#include "formats/list.h"
#include "protocols/list.h"
#include "qcow2-fixture.h"
#include "seeds.h"

#define TOP       "/disk/top"
#define BASE      "/disk/base"
#define SIZE_MAX_ ((uint64_t)96 << 10)
#define WRITES    12
#define CUTS_MAX  24 /* for each image; all where there are no more */

static const struct driver *const *const drivers[] = {protocol_drivers, format_drivers, NULL};

struct file {
    uint8_t *bytes;
    size_t len;
};

struct plan {
    uint64_t seed;
    struct prng prng;
    struct sim_disk *disk;
    uint64_t base_size;
    uint64_t size;
    uint8_t flat[SIZE_MAX_]; /* what the disk holds, zeroes beyond its size */
    struct file top;
    struct file base;
    uint64_t ops; /* of the disk, for a commit */
    int result;
};

/* Over all seeds; shared with the children. */
static struct counts {
    uint64_t cuts;
    uint64_t full;  /* after which the top still held something */
    uint64_t empty; /* ...and held nothing */
    uint64_t leaking;
} * counts;

static int group_setup(void **state)
{
    (void)state;
    image_follow_all();
    counts = shared_new(sizeof(*counts));
    return 0;
}

static void write_somewhere(struct plan *p, struct backend *b, uint64_t size)
{
    uint64_t at = prng_below(&p->prng, size);
    uint64_t len = MIN(1 + prng_below(&p->prng, 9000), size - at);
    uint8_t *data = xalloc(1, len);

    for (uint64_t i = 0; i < len; i++)
        data[i] = (uint8_t)prng_next(&p->prng);
    if (prng_chance(&p->prng, 250)) {
        check(send_request(b, REQUEST_WRITE_ZEROES, REQUEST_MAY_UNMAP, at, len, NULL) == 0);
        memset(p->flat + at, 0, len);
    } else {
        check(send_request(b, REQUEST_WRITE, 0, at, len, data) == 0);
        memcpy(p->flat + at, data, len);
    }
    free(data);
}

static void fill_one(struct plan *p, const char *backing, uint64_t size)
{
    struct graph *g = graph_new(drivers);
    struct backend *b;

    if (backing)
        add_layer(g, "below", backing, NULL, true);
    add_layer(g, "x", backing ? TOP : BASE, backing ? "below" : NULL, false);
    b = must_attach(g, "x", ACCESS_RW, "writer");
    for (unsigned i = 0; i < WRITES; i++)
        write_somewhere(p, b, size);
    b = backend_co_free(b);
    g = graph_co_free(g);
}

static void fill(void *arg)
{
    struct plan *p = arg;

    fill_one(p, NULL, p->base_size);
    memset(p->flat + p->size, 0, SIZE_MAX_ - p->size); /* the top may be shorter */
    fill_one(p, BASE, p->size);
}

static void commit(void *arg)
{
    AUTO(error_free) struct error *err = NULL;
    struct plan *p = arg;
    struct graph *g = graph_new(drivers);
    struct image_commit x = {
        .spec = {.name = TOP, .format = "qcow2", .flags = IMAGE_WRITE | IMAGE_COMMIT},
    };

    p->result = image_co_commit(g, &x, &err);
    if (p->result < 0)
        fprintf(stderr, "%s\n", error_text(err));
    g = graph_co_free(g);
}

static bool holds(struct sim_disk *disk, const char *const *paths, unsigned count,
                  const struct plan *p)
{
    uint8_t *data = xalloc(1, SIZE_MAX_);
    bool same;

    image_read_guest(disk, paths, count, 0, data, (size_t)p->size);
    same = memcmp(data, p->flat, (size_t)p->size) == 0;
    free(data);
    return same;
}

static void judge(struct plan *p, uint64_t op)
{
    static const char *const chain[] = {TOP, BASE};
    struct qcow2_verdict base;
    struct qcow2_verdict top;

    image_judge(p->disk, BASE, LEAKS_ALLOWED, &base);
    image_judge(p->disk, TOP, LEAKS_ALLOWED, &top);
    counts->leaking += base.leaks || top.leaks;
    counts->full += top.l2_tables > 0;
    counts->empty += top.l2_tables == 0;
    if (!holds(p->disk, chain, 2, p)) {
        fprintf(stderr, "seed %" PRIu64 ", cut at %" PRIu64 ": the disk is not what it was\n",
                p->seed, op);
        abort();
    }
    check(run_killed_at(p->disk, p->seed, commit, p, 0) == SIM_RETURNED && p->result == 0);
    image_judge(p->disk, BASE, LEAKS_ALLOWED, &base);
    image_judge(p->disk, TOP, LEAKS_ALLOWED, &top);
    check(top.l2_tables == 0);
    check(holds(p->disk, chain, 2, p) && holds(p->disk, chain + 1, 1, p));
}

static void put_files(struct plan *p)
{
    p->disk = sim_disk_new();
    image_put(p->disk, BASE, p->base.bytes, p->base.len);
    image_put(p->disk, TOP, p->top.bytes, p->top.len);
}

static void crash_at(const void *plan, uint64_t op, uint64_t cut)
{
    static struct plan q;

    q = *(const struct plan *)plan;
    put_files(&q);
    if (run_killed_at(q.disk, q.seed, commit, &q, op) == SIM_KILLED) {
        sim_disk_power_cut(q.disk, cut);
        counts->cuts++;
        judge(&q, op);
    }
    sim_disk_free(q.disk);
}

static void make_plan(struct plan *p)
{
    struct qcow2_shape shape;

    p->disk = sim_disk_new();
    p->base_size = (1 + prng_below(&p->prng, SIZE_MAX_ / 512)) * 512;
    p->size = (1 + prng_below(&p->prng, SIZE_MAX_ / 512)) * 512;
    qcow2_shape_random(&shape, &p->prng, p->base_size);
    shape.version = 3; /* of version 2, what is shorter than its backing file cannot grow */
    image_make(p->disk, BASE, &shape);
    qcow2_shape_random(&shape, &p->prng, p->size);
    shape.backing = "base";
    image_make(p->disk, TOP, &shape);
    check(run_killed_at(p->disk, p->seed, fill, p, 0) == SIM_RETURNED);
    p->top.bytes = image_load(p->disk, TOP, &p->top.len);
    p->base.bytes = image_load(p->disk, BASE, &p->base.len);
    sim_disk_free(p->disk);
    put_files(p);
    check(run_killed_at(p->disk, p->seed, commit, p, 0) == SIM_RETURNED && p->result == 0);
    p->ops = sim_disk_ops(p->disk);
    sim_disk_free(p->disk);
}

static void make_and_crash(void *arg)
{
    struct plan *p = arg;

    make_plan(p);
    crash_everywhere(crash_at, p, p->seed, p->ops, CUTS_MAX);
}

static void test_commit_crash__leaves_the_disk_what_it_was(void **state)
{
    static struct plan p;

    (void)state;
    *counts = (struct counts){.cuts = 0};
    TEST_SEEDS (seed) {
        p = (struct plan){.seed = seed, .prng = {seed}};
        if (!seeds_enough(20) || seed % 5 == 0) /* it takes long */
            in_child(make_and_crash, &p);
    }
    printf("# %" PRIu64 " power cuts, %" PRIu64 " left the top full and %" PRIu64 " empty; %" PRIu64
           " left leaks\n",
           counts->cuts, counts->full, counts->empty, counts->leaking);
    assert_true(!seeds_enough(20) ||
                (counts->full > 0 && counts->empty > 0 && counts->leaking > 0));
}
