/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Random writes, changes of the size, and internal snapshots, that are made, applied and deleted in any order, against flat arrays.
 * After each session the judge finds neither error nor leak, and reads what the arrays hold: of the disk, and of each snapshot.
 *
 * And with the k-th operation of the file failing, or the k-th allocation, for each k (D4): the image is what it was or what it
 * becomes, and that only if the operation says so.
 */
#include "seeds.h"
#include "snapshot-model.h"

#define SESSIONS 6
#define OPS      14

static unsigned refused;

static void one_session(struct snapshot_model *m)
{
    struct qcow2_verdict v;

    model_open(m);
    for (unsigned i = 0; i < OPS; i++) {
        unsigned what = (unsigned)prng_below(&m->prng, 20);

        if (what < 12)
            model_write_somewhere(m);
        else if (what < 13)
            model_resize(m);
        else if (what < 15)
            check(flush(m->backend) == 0);
        else
            model_operate(m, (enum model_op)prng_below(&m->prng, MODEL_OPS));
        if (prng_chance(&m->prng, 300))
            model_read(m);
    }
    model_read(m);
    model_close(m);
    image_judge(m->disk, MODEL_PATH, NO_LEAKS, &v);
    check(model_is(m, &m->state));
}

static void run_model(void *arg)
{
    struct snapshot_model *m = arg;

    for (unsigned i = 0; i < SESSIONS; i++)
        one_session(m);
    refused += m->refused;
}

static void test_qcow2_snapshots__hold_what_the_disk_held(void **state)
{
    (void)state;
    TEST_SEEDS (seed) {
        static struct snapshot_model m;

        model_begin(&m, seed);
        assert_int_equal(run_on(m.disk, seed, run_model, &m), SIM_RETURNED);
        sim_disk_free(m.disk);
    }
    assert_true(!seeds_enough(50) || refused > 0);
}

/* ---- what fails ---- */

#define FAULTS_MAX 400

/* One operation with one failure in it. */
struct attempt {
    struct snapshot_model m; /* as it was before */
    struct model_state after;
    enum model_op op;
    struct sim_fault fault;
    unsigned allocation; /* that fails; 0: none */
    int result;
    char said[200];
    bool struck;
};

static int operate_once(struct attempt *a, struct error **err)
{
    struct snapshot_model *m = &a->m;
    struct qcow2_snapshot_new how = {.name = "another"};
    bool vm_state;

    if (a->op == MODEL_CREATE)
        return qcow2_co_snapshot_create(m->backend, &how, err);
    if (a->op == MODEL_APPLY)
        return qcow2_co_snapshot_apply(m->backend, m->state.snapshots[0].name, &vm_state, err);
    if (a->op == MODEL_EMPTY)
        return qcow2_co_empty(m->backend, err);
    return qcow2_co_snapshot_delete(m->backend, m->state.snapshots[0].name, err);
}

static void attempt_it(void *arg)
{
    AUTO(error_free) struct error *err = NULL;
    struct attempt *a = arg;

    model_open(&a->m);
    if (a->allocation)
        (void)alloc_fail_at(a->allocation);
    else if (a->fault.at)
        sim_fault_add(&a->fault);
    a->result = operate_once(a, &err);
    a->struck = a->allocation && alloc_fail_at(0) >= a->allocation;
    if (!a->allocation && a->fault.at) {
        sim_fault_remove(&a->fault);
        a->struck = a->fault.fired;
    }
    if (a->result < 0)
        (void)snprintf(a->said, sizeof(a->said), "%s", error_text(err));
    model_close(&a->m);
}

/* What it becomes when nothing fails. */
static void expect(struct attempt *a)
{
    struct model_state *s = &a->after;

    *s = a->m.state;
    if (a->op == MODEL_APPLY) {
        s->now = s->snapshots[0].disk;
    } else if (a->op == MODEL_DELETE) {
        s->count--;
        memmove(&s->snapshots[0], &s->snapshots[1], s->count * sizeof(s->snapshots[0]));
    } else if (a->op == MODEL_EMPTY) {
        memset(s->now.flat, 0, MODEL_SIZE_MAX);
    } else {
        s->snapshots[s->count].disk = s->now;
        (void)snprintf(s->snapshots[s->count].name, sizeof(s->snapshots[0].name), "another");
        s->count++;
    }
}

static void judge_attempt(const struct attempt *a)
{
    /* "The snapshot is deleted, but ..." */
    bool done = a->result == 0 || strstr(a->said, "but its space") ||
                strstr(a->said, "but space") ||
                (strstr(a->said, "it may have changed") && model_is(&a->m, &a->after));
    struct qcow2_verdict v;

    image_judge(a->m.disk, MODEL_PATH, LEAKS_AND_COPIES_ALLOWED, &v);
    if (model_is(&a->m, done ? &a->after : &a->m.state))
        return;
    fprintf(stderr, "operation %d, failure %" PRIu64 ", allocation %u: '%s', and it is not so\n",
            a->op, a->fault.at, a->allocation, a->said);
    abort();
}

/* For k = 1, 2, ... until nothing is struck any more. */
static void fail_each(const struct attempt *first, const uint8_t *bytes, size_t len, bool memory)
{
    static struct attempt a;
    unsigned k = 0;

    do {

        k++;
        a = *first;
        a.m.disk = sim_disk_new();
        a.allocation = memory ? k : 0;
        a.fault = (struct sim_fault){.kind = SIM_ERROR, .error = EIO, .at = memory ? 0 : k};
        image_put(a.m.disk, MODEL_PATH, bytes, len);
        check(run_on(a.m.disk, k, attempt_it, &a) == SIM_RETURNED);
        judge_attempt(&a);
        sim_disk_free(a.m.disk);
    } while (a.struck && k < FAULTS_MAX);
    check(k > 5 && a.result == 0);
}

static void make_past(void *arg)
{
    struct snapshot_model *m = arg;

    model_open(m);
    for (unsigned i = 0; i < 2; i++) {
        for (unsigned k = 0; k < 6; k++)
            model_write_somewhere(m);
        model_create(m);
    }
    for (unsigned k = 0; k < 6; k++)
        model_write_somewhere(m);
    model_close(m);
}

static void test_qcow2_snapshots__what_fails_says_what_is(void **state)
{
    (void)state;
    TEST_SEEDS (seed) {
        static struct attempt a;
        uint8_t *bytes;
        size_t len;

        if (seeds_enough(2) && seed % 5)
            continue; /* it takes long */
        a = (struct attempt){.op = (enum model_op)(seed / 5 % MODEL_OPS)};
        model_begin(&a.m, seed);
        a.m.shape.cluster_bits = 12;
        a.m.shape.extended = false;
        a.m.shape.refcount_order = 4;
        sim_disk_free(a.m.disk);
        a.m.disk = sim_disk_new();
        image_make(a.m.disk, MODEL_PATH, &a.m.shape);
        assert_int_equal(run_on(a.m.disk, seed, make_past, &a.m), SIM_RETURNED);
        bytes = image_load(a.m.disk, MODEL_PATH, &len);
        sim_disk_free(a.m.disk);
        expect(&a);
        fail_each(&a, bytes, len, false);
        fail_each(&a, bytes, len, true);
        free(bytes);
    }
}
