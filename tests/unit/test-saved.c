/* SPDX-License-Identifier: Apache-2.0 */
/* The store of saved blocks: what is in use never exceeds its bounds, and no two runs share scratch space. */
#include "base/alloc.h"
#include "base/prng.h"
#include "copy/saved.h"
#include "seeds.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <errno.h>
#include <stdlib.h>

#define REGIONS     24
#define SCRATCH_MAX (10 * SAVED_REGION)
#define BLOCKS      (SCRATCH_MAX / SAVED_BLOCK)

struct model {
    struct saved saved;
    struct prng prng;
    struct saved_run *owner[BLOCKS]; /* of each block of scratch */
    struct saved_run *held[4];       /* by readers */
    uint64_t done[REGIONS];          /* how much of each region is saved */
};

static void own(struct model *m, const struct saved_run *run, struct saved_run *from,
                struct saved_run *to)
{
    assert_int_equal(run->scratch_offset % SAVED_BLOCK, 0);
    assert_int_equal(run->scratch_len % SAVED_BLOCK, 0);
    assert_true(run->scratch_offset + run->scratch_len <= SCRATCH_MAX);
    for (uint64_t at = 0; at < run->scratch_len; at += SAVED_BLOCK) {
        assert_ptr_equal(m->owner[(run->scratch_offset + at) / SAVED_BLOCK], from);
        m->owner[(run->scratch_offset + at) / SAVED_BLOCK] = to;
    }
}

static uint64_t in_use(const struct model *m)
{
    uint64_t blocks = 0;

    for (unsigned i = 0; i < BLOCKS; i++)
        blocks += m->owner[i] != NULL;
    return blocks * SAVED_BLOCK;
}

static void save_some(struct model *m)
{
    uint64_t region = prng_below(&m->prng, REGIONS);
    uint64_t left = SAVED_REGION - m->done[region];
    struct saved_run *run;
    uint64_t len;
    int r;

    if (!left)
        return;
    len = MIN(left, (1 + prng_below(&m->prng, SAVED_LENGTHS)) * SAVED_BLOCK);
    run = saved_run_new(region * SAVED_REGION + m->done[region], len);
    assert_non_null(run);
    r = saved_take_scratch(&m->saved, run, SCRATCH_MAX);
    if (r < 0) {
        assert_int_equal(r, -ENOSPC);
        assert_int_equal(in_use(m), SCRATCH_MAX); /* nothing less than all of it */
        free(run);
        return;
    }
    assert_in_range(run->len, 1, len);
    assert_int_equal(run->len, run->scratch_len);
    own(m, run, NULL, run);
    saved_insert(&m->saved, run);
    m->done[region] += run->len;
}

static bool is_held(const struct model *m, const struct saved_run *run)
{
    bool held = false;

    for (unsigned i = 0; i < ARRAY_SIZE(m->held); i++)
        held = held || m->held[i] == run;
    return held;
}

static void forget_region(struct model *m)
{
    uint64_t region = prng_below(&m->prng, REGIONS);

    for (unsigned i = 0; i < BLOCKS; i++) {
        struct saved_run *run = m->owner[i];

        if (run && run->offset / SAVED_REGION == region && !is_held(m, run))
            m->owner[i] = NULL;
    }
    saved_forget(&m->saved, region * SAVED_REGION, SAVED_REGION);
    m->done[region] = 0;
}

/* A reader lets go of a run, which may be gone for everybody else, and takes another one. */
static void read_another(struct model *m)
{
    unsigned i = (unsigned)prng_below(&m->prng, ARRAY_SIZE(m->held));
    struct saved_run *run = m->held[i];

    m->held[i] = NULL;
    if (run) {
        if (run->removed && !is_held(m, run))
            own(m, run, run, NULL);
        saved_put(&m->saved, run);
    }
    m->held[i] = saved_get(&m->saved, prng_below(&m->prng, REGIONS * SAVED_REGION));
}

static void test_saved__scratch_is_given_out_once_at_a_time(void **state)
{
    (void)state;
    TEST_SEEDS (seed) {
        struct model *m = calloc(1, sizeof(*m));

        m->prng.state = seed;
        saved_init(&m->saved);
        for (unsigned i = 0; i < 3000; i++) {
            uint64_t what = prng_below(&m->prng, 10);

            if (what < 6)
                save_some(m);
            else if (what < 8)
                forget_region(m);
            else
                read_another(m);
            assert_int_equal(m->saved.scratch_bytes, in_use(m));
            assert_true(m->saved.scratch_end <= SCRATCH_MAX);
        }
        for (unsigned i = 0; i < ARRAY_SIZE(m->held); i++) {
            if (m->held[i])
                saved_put(&m->saved, m->held[i]);
        }
        saved_forget(&m->saved, 0, REGIONS * SAVED_REGION);
        assert_int_equal(m->saved.scratch_bytes, 0);
        assert_int_equal(m->saved.scratch_end, 0); /* SAVED-2 */
        saved_release(&m->saved);
        free(m);
    }
}

static void test_saved__memory_is_bounded_and_given_back(void **state)
{
    struct saved saved;

    (void)state;
    saved_init(&saved);
    for (unsigned turn = 0; turn < 3; turn++) {
        struct saved_run *first = saved_run_new(0, SAVED_REGION);
        struct saved_run *second = saved_run_new(SAVED_REGION, SAVED_BLOCK);
        uint64_t offset;
        uint64_t len;

        assert_true(saved_take_memory(&saved, first, SAVED_REGION));
        assert_false(saved_take_memory(&saved, second, SAVED_REGION));
        saved_insert(&saved, first);
        assert_false(saved_oldest(&saved, SAVED_REGION, 0, &offset, &len));
        assert_true(saved_oldest(&saved, SAVED_REGION - 1, 0, &offset, &len));
        saved_forget(&saved, 0, SAVED_REGION);
        alloc_fail_at(1);
        assert_false(saved_take_memory(&saved, second, SAVED_REGION));
        alloc_fail_at(0);
        assert_int_equal(saved.memory_bytes, 0);
        assert_int_equal(saved_take_scratch(&saved, second, 0), -ENOSPC);
        assert_int_equal(saved_take_scratch(&saved, second, SAVED_BLOCK), 0);
        saved_insert(&saved, second);
        assert_true(saved_oldest(&saved, 0, SAVED_BLOCK - 1, &offset, &len));
        assert_int_equal(offset, SAVED_REGION);
        saved_forget(&saved, SAVED_REGION, SAVED_BLOCK);
        assert_false(saved_oldest(&saved, 0, 0, &offset, &len));
    }
    saved_release(&saved);
}
