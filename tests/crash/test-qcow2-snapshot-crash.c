/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Power cuts while a snapshot is made, applied or deleted, or the disk emptied: after each operation of the disk in turn, so also at each boundary of a
 * flush. What was not flushed is kept, dropped or torn, each write by itself. Then the image is what it was, or what it becomes,
 * with leaks at most, and with COPIED flags that are not set where they might be (SNAP-2); the disk and all snapshots hold what they
 * held; and it can be written on.
 */
#include "crash-fixture.h"
#include "seeds.h"
#include "snapshot-model.h"

#define WRITES   10
#define CUTS_MAX 24 /* for each operation; all where there are no more */

/* An image with a past, and what is going to happen to it. */
struct plan {
    uint64_t seed;
    enum model_op op;
    struct snapshot_model m; /* as it was before */
    struct model_state after;
    uint8_t *bytes;
    size_t len;
    uint64_t ops; /* of the disk */
};

/* Over all seeds; shared with the children. */
static struct counts {
    uint64_t cuts;
    uint64_t before; /* that left the image as it was */
    uint64_t after;
    uint64_t leaking;
    uint64_t uncopied;
} * counts;

static int group_setup(void **state)
{
    (void)state;
    counts = shared_new(sizeof(*counts));
    return 0;
}

static void live_a_bit(void *arg)
{
    struct snapshot_model *m = arg;

    model_open(m);
    for (unsigned i = 0; i < 3; i++) {
        for (unsigned k = 0; k < WRITES; k++)
            model_write_somewhere(m);
        model_operate(m, (enum model_op)prng_below(&m->prng, MODEL_OPS));
    }
    for (unsigned k = 0; k < WRITES; k++)
        model_write_somewhere(m);
    if (prng_chance(&m->prng, 300))
        model_resize(m);
    model_close(m);
}

static void operate(void *arg)
{
    struct plan *p = arg;

    model_open(&p->m);
    model_operate(&p->m, p->op);
    model_close(&p->m);
}

static void write_on(void *arg)
{
    struct snapshot_model *m = arg;

    model_open(m);
    model_read(m);
    for (unsigned k = 0; k < WRITES; k++)
        model_write_somewhere(m);
    model_operate(m, (enum model_op)prng_below(&m->prng, MODEL_OPS));
    for (unsigned k = 0; k < WRITES; k++)
        model_write_somewhere(m);
    model_read(m);
    model_close(m);
}

static void judge(const struct snapshot_model *m, struct qcow2_verdict *ret)
{
    image_judge(m->disk, MODEL_PATH, LEAKS_AND_COPIES_ALLOWED, ret);
}

static void judge_crash(const struct plan *p, struct snapshot_model *m, const char *where)
{
    struct qcow2_verdict v;

    judge(m, &v);
    counts->leaking += v.leaks > 0;
    counts->uncopied += v.by_kind[QCOW2_ERROR_NOT_COPIED] > 0;
    if (model_is(m, &p->m.state)) {
        m->state = p->m.state;
        counts->before++;
    } else if (model_is(m, &p->after)) {
        m->state = p->after;
        counts->after++;
    } else {
        fprintf(stderr,
                "seed %" PRIu64 ", operation %d, %s: neither what it was nor what it becomes\n",
                p->seed, p->op, where);
        abort();
    }
    check(run_killed_at(m->disk, p->seed + 1, write_on, m, 0) == SIM_RETURNED);
    judge(m, &v);
    check(model_is(m, &m->state));
}

static void crash_at(const void *plan, uint64_t op, uint64_t cut)
{
    const struct plan *p = plan;
    static struct plan q;
    char where[40];

    q = *p;
    q.m.disk = sim_disk_new();
    image_put(q.m.disk, MODEL_PATH, p->bytes, p->len);
    if (run_killed_at(q.m.disk, p->seed, operate, &q, op) == SIM_KILLED) {
        sim_disk_power_cut(q.m.disk, cut);
        counts->cuts++;
        (void)snprintf(where, sizeof(where), "cut %" PRIu64 " at %" PRIu64, cut, op);
        judge_crash(p, &q.m, where);
    }
    sim_disk_free(q.m.disk);
}

/* The image, and what the operation makes of it when nothing is cut off. */
static void make_plan(struct plan *p)
{
    static struct plan whole;

    model_begin(&p->m, p->seed);
    if (p->m.shape.refcount_order < 2)
        p->m.shape.refcount_order = 2; /* room for a few */
    sim_disk_free(p->m.disk);
    p->m.disk = sim_disk_new();
    image_make(p->m.disk, MODEL_PATH, &p->m.shape);
    check(run_killed_at(p->m.disk, p->seed, live_a_bit, &p->m, 0) == SIM_RETURNED);
    p->bytes = image_load(p->m.disk, MODEL_PATH, &p->len);
    sim_disk_free(p->m.disk);
    whole = *p;
    whole.m.disk = sim_disk_new();
    image_put(whole.m.disk, MODEL_PATH, p->bytes, p->len);
    check(run_killed_at(whole.m.disk, p->seed, operate, &whole, 0) == SIM_RETURNED);
    p->ops = sim_disk_ops(whole.m.disk);
    p->after = whole.m.state;
    sim_disk_free(whole.m.disk);
}

static void make_and_crash(void *arg)
{
    struct plan *p = arg;

    make_plan(p);
    crash_everywhere(crash_at, p, p->seed, p->ops, CUTS_MAX);
}

static void crash_of(enum model_op op)
{
    static struct plan p;

    *counts = (struct counts){.cuts = 0};
    TEST_SEEDS (seed) {
        p = (struct plan){.seed = seed, .op = op};
        in_child(make_and_crash, &p);
    }
    printf("# %" PRIu64 " power cuts, %" PRIu64 " before and %" PRIu64 " after the change; %" PRIu64
           " left leaks, %" PRIu64 " flags that are not set\n",
           counts->cuts, counts->before, counts->after, counts->leaking, counts->uncopied);
    assert_true(!seeds_enough(20) ||
                (counts->before > 0 && counts->after > 0 && counts->leaking > 0));
}

static void test_qcow2_snapshot_crash__while_one_is_made(void **state)
{
    (void)state;
    crash_of(MODEL_CREATE);
}

static void test_qcow2_snapshot_crash__while_one_is_applied(void **state)
{
    (void)state;
    crash_of(MODEL_APPLY);
}

static void test_qcow2_snapshot_crash__while_the_disk_is_emptied(void **state)
{
    (void)state;
    crash_of(MODEL_EMPTY);
}

static void test_qcow2_snapshot_crash__while_one_is_deleted(void **state)
{
    (void)state;
    crash_of(MODEL_DELETE);
}
