/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Random writes, changes of the size, and internal snapshots, that are made, applied and deleted in any order, against flat arrays.
 * After each session the judge finds neither error nor leak, and reads what the arrays hold: of the disk, and of each snapshot.
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
        struct sim_options o;

        model_begin(&m, seed);
        sim_options_init(&o, seed);
        o.disk = m.disk;
        assert_int_equal(sim_run(&o, run_model, &m), SIM_RETURNED);
        sim_disk_free(m.disk);
    }
    assert_true(!seeds_enough(50) || refused > 0);
}
