/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Power cuts, and failures, while an image is amended: another version, other refcounts. After each operation of the disk in turn; what
 * was not flushed is kept, dropped or torn, each write by itself. Then the image is of the one kind or of the other, with leaks at
 * most, and with COPIED flags that are not set where they might be; the disk and all snapshots hold what they held; it can be written
 * on; and amending again ends what was begun.
 */
#include "crash-fixture.h"
#include "formats/qcow2/qcow2-amend.h"
#include "seeds.h"
#include "snapshot-model.h"

#define WRITES     10
#define CUTS_MAX   24 /* for each image; all where there are no more */
#define FAULTS_MAX 400

enum kind { KIND_UPGRADE, KIND_DOWNGRADE, KIND_DOWNGRADE_BASED, KIND_WIDTH, KIND_LAZY };

struct plan {
    uint64_t seed;
    enum kind kind;
    struct qcow2_amendment what;
    struct snapshot_model m;
    struct model_disk base;
    uint8_t *bytes;
    size_t len;
    struct qcow2_verdict was;
    uint64_t ops; /* of the disk */

    struct sim_fault fault;
    unsigned allocation; /* that fails; 0: none */
    bool in_use;         /* before and after, in one session */
    int result;
    bool struck;
};

/* Over all seeds; shared with the children. */
static struct counts {
    uint64_t cuts;
    uint64_t before; /* that left the image as it was */
    uint64_t after;
    uint64_t leaking;
    uint64_t failures;
} * counts;

static int group_setup(void **state)
{
    (void)state;
    counts = shared_new(sizeof(*counts));
    return 0;
}

static void live_a_bit(void *arg)
{
    struct plan *p = arg;
    struct snapshot_model *m = &p->m;

    model_open(m);
    for (unsigned i = 0; i < 3; i++) {
        for (unsigned k = 0; k < WRITES; k++)
            model_write_somewhere(m);
        model_operate(m, i == 0 ? MODEL_CREATE : (enum model_op)prng_below(&m->prng, MODEL_OPS));
    }
    for (unsigned k = 0; k < WRITES; k++)
        model_write_somewhere(m);
    model_close(m);
}

static void amend(void *arg)
{
    AUTO(error_free) struct error *err = NULL;
    struct plan *p = arg;

    model_open(&p->m);
    for (unsigned k = 0; k < WRITES && p->in_use; k++)
        model_write_somewhere(&p->m);
    if (p->allocation)
        (void)alloc_fail_at(p->allocation);
    else if (p->fault.at)
        sim_fault_add(&p->fault);
    p->result = qcow2_co_amend(p->m.backend, &p->what, &err);
    p->struck = p->allocation && alloc_fail_at(0) >= p->allocation;
    if (!p->allocation && p->fault.at) {
        sim_fault_remove(&p->fault);
        p->struck = p->fault.fired;
    }
    if (p->result < 0 && !p->fault.at && !p->allocation)
        fprintf(stderr, "%s\n", error_text(err));
    for (unsigned k = 0; k < WRITES && p->in_use; k++)
        model_write_somewhere(&p->m);
    model_close(&p->m);
}

static void write_on(void *arg)
{
    struct plan *p = arg;
    struct snapshot_model *m = &p->m;

    model_open(m);
    model_read(m);
    for (unsigned k = 0; k < WRITES; k++)
        model_write_somewhere(m);
    if (m->state.count > 1)
        model_operate(m, MODEL_DELETE);
    for (unsigned k = 0; k < WRITES; k++)
        model_write_somewhere(m);
    model_read(m);
    model_close(m);
}

static bool is_amended(const struct plan *p, const struct qcow2_verdict *v)
{
    if (p->what.change_lazy) {
        size_t len;
        uint8_t *bytes = image_load(p->m.disk, MODEL_PATH, &len);
        bool lazy = bytes[80 + 7] & 1;

        free(bytes);
        return lazy;
    }
    if (p->what.refcount_bits)
        return v->refcount_bits == p->what.refcount_bits;
    return v->version == p->what.version;
}

static void die(const struct plan *p, const char *what, uint64_t where)
{
    fprintf(stderr, "seed %" PRIu64 ", kind %d, at %" PRIu64 ": %s\n", p->seed, p->kind, where,
            what);
    abort();
}

/* Sound, of the one kind or the other, with the same content; and it can be used and amended. */
static void judge(struct plan *p, uint64_t where)
{
    struct qcow2_verdict v;

    image_judge(p->m.disk, MODEL_PATH, LEAKS_AND_COPIES_ALLOWED, &v);
    counts->leaking += v.leaks > 0;
    if (is_amended(p, &v))
        counts->after++;
    else
        counts->before++;
    if (v.version != p->was.version && v.version != p->what.version)
        die(p, "a third version", where);
    if (v.refcount_bits != p->was.refcount_bits && v.refcount_bits != p->what.refcount_bits)
        die(p, "a third width", where);
    if (!model_is(&p->m, &p->m.state))
        die(p, "it does not hold what it held", where);
    check(run_killed_at(p->m.disk, p->seed + 1, write_on, p, 0) == SIM_RETURNED);
    image_judge(p->m.disk, MODEL_PATH, LEAKS_AND_COPIES_ALLOWED, &v);
    p->fault.at = p->allocation = 0;
    p->in_use = true;
    if (p->kind == KIND_WIDTH && v.by_kind[QCOW2_ERROR_NOT_COPIED])
        return; /* it wants to be repaired first */
    check(run_killed_at(p->m.disk, p->seed + 2, amend, p, 0) == SIM_RETURNED && p->result == 0);
    image_judge(p->m.disk, MODEL_PATH, LEAKS_AND_COPIES_ALLOWED, &v);
    check(model_is(&p->m, &p->m.state) && is_amended(p, &v));
    check(run_killed_at(p->m.disk, p->seed + 3, write_on, p, 0) == SIM_RETURNED);
    image_judge(p->m.disk, MODEL_PATH, LEAKS_AND_COPIES_ALLOWED, &v);
    check(model_is(&p->m, &p->m.state));
}

static void crash_at(const void *plan, uint64_t op, uint64_t cut)
{
    const struct plan *p = plan;
    static struct plan q;

    q = *p;
    model_put(&q.m, p->bytes, p->len);
    if (run_killed_at(q.m.disk, p->seed, amend, &q, op) == SIM_KILLED) {
        sim_disk_power_cut(q.m.disk, cut);
        counts->cuts++;
        judge(&q, op);
    }
    sim_disk_free(q.m.disk);
}

/* For k = 1, 2, ... until nothing is struck any more. */
static void fail_each(const struct plan *p, bool memory)
{
    static struct plan q;
    unsigned k = 0;
    bool struck;

    do {
        k++;
        q = *p;
        model_put(&q.m, p->bytes, p->len);
        q.allocation = memory ? k : 0;
        q.fault = (struct sim_fault){.kind = SIM_ERROR, .error = EIO, .at = memory ? 0 : k};
        check(run_killed_at(q.m.disk, p->seed, amend, &q, 0) == SIM_RETURNED);
        struck = q.struck;
        counts->failures += struck;
        if (struck)
            judge(&q, k);
        sim_disk_free(q.m.disk);
    } while (struck && k < FAULTS_MAX);
    check(k > 1 && q.result == 0);
}

/* As writers of version 2 leave it: no snapshot has extra data. */
static void strip_snapshots(uint8_t *bytes)
{
    uint32_t count = load_be32(bytes + 60);
    uint8_t *from = bytes + load_be64(bytes + 64);
    uint8_t *to = from;

    for (uint32_t i = 0; i < count; i++) {
        uint32_t extra = load_be32(from + 36);
        size_t text = (size_t)load_be16(from + 12) + load_be16(from + 14);
        size_t whole = 40 + extra + text;

        memmove(to, from, 40);
        store_be32(to + 36, 0);
        memmove(to + 40, from + 40 + extra, text);
        from += (whole + 7) / 8 * 8;
        to += (40 + text + 7) / 8 * 8;
    }
}

static void choose(struct plan *p)
{
    struct qcow2_shape *s = &p->m.shape;

    switch (p->kind) {
    case KIND_UPGRADE:
        s->version = 2;
        s->extended = false;
        s->refcount_order = 4;
        p->what.version = 3;
        break;
    case KIND_DOWNGRADE:
    case KIND_DOWNGRADE_BASED:
        s->version = 3;
        s->extended = false; /* version 2 cannot have it */
        s->refcount_order = 4;
        p->what.version = 2;
        break;
    case KIND_WIDTH:
        s->version = 3;
        s->refcount_order = 3 + (unsigned)prng_below(&p->m.prng, 4);
        p->what.refcount_bits = 1u << (3 + (s->refcount_order - 2) % 4);
        break;
    case KIND_LAZY:
        s->version = 3;
        p->what.change_lazy = true;
        p->what.lazy_refcounts = true;
        s->refcount_order = 4;
        break;
    }
}

/* The image, and how many operations amending it takes. */
static void make_plan(struct plan *p)
{
    static struct plan whole;

    model_begin(&p->m, p->seed);
    choose(p);
    model_begin_with(&p->m, p->kind == KIND_DOWNGRADE_BASED ? &p->base : NULL);
    check(run_killed_at(p->m.disk, p->seed, live_a_bit, p, 0) == SIM_RETURNED);
    p->bytes = image_load(p->m.disk, MODEL_PATH, &p->len);
    if (p->kind == KIND_UPGRADE && p->seed % 4)
        strip_snapshots(p->bytes);
    sim_disk_free(p->m.disk);
    whole = *p;
    model_put(&whole.m, p->bytes, p->len);
    image_judge(whole.m.disk, MODEL_PATH, LEAKS_ALLOWED, &p->was);
    check(run_killed_at(whole.m.disk, p->seed, amend, &whole, 0) == SIM_RETURNED &&
          whole.result == 0);
    p->ops = sim_disk_ops(whole.m.disk);
    sim_disk_free(whole.m.disk);
}

static void crash_and_fail(void *arg)
{
    struct plan *p = arg;

    make_plan(p);
    crash_everywhere(crash_at, p, p->seed, p->ops, CUTS_MAX);
    if (p->seed % 50 == 10) {
        fail_each(p, false);
        fail_each(p, true);
    }
}

static void crash_of(enum kind kind)
{
    static struct plan p;

    *counts = (struct counts){.cuts = 0};
    TEST_SEEDS (seed) {
        p = (struct plan){.seed = seed, .kind = kind};
        if (!seeds_enough(20) || seed % 5 == 0) /* it takes long */
            in_child(crash_and_fail, &p);
    }
    printf("# %" PRIu64 " power cuts, %" PRIu64 " failures: %" PRIu64 " before and %" PRIu64
           " after the change; %" PRIu64 " left leaks\n",
           counts->cuts, counts->failures, counts->before, counts->after, counts->leaking);
    assert_true(!seeds_enough(20) || (counts->before > 0 && counts->after > 0));
}

static void test_qcow2_amend_crash__while_it_becomes_version_3(void **state)
{
    (void)state;
    crash_of(KIND_UPGRADE);
}

static void test_qcow2_amend_crash__while_it_becomes_version_2(void **state)
{
    (void)state;
    crash_of(KIND_DOWNGRADE);
}

static void test_qcow2_amend_crash__while_zeroes_become_data(void **state)
{
    (void)state;
    crash_of(KIND_DOWNGRADE_BASED);
}

static void test_qcow2_amend_crash__while_refcounts_change_their_width(void **state)
{
    (void)state;
    crash_of(KIND_WIDTH);
}

static void test_qcow2_amend_crash__while_refcounts_may_be_late(void **state)
{
    (void)state;
    crash_of(KIND_LAZY);
}
