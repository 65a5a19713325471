/* SPDX-License-Identifier: Apache-2.0 */
/* Syncs of files (SYNC-1 to SYNC-3 in loop-internal.h): shared, and no success that hides what was lost (P1, I3). */
#include "base/macros.h"
#include "loop/loop-internal.h"
#include "loop/scope.h"
#include "loop/sim/sim.h"
#include "seeds.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <errno.h>
#include <string.h>

#define PATH   "/disk/a.img"
#define BLOCK  4096
#define BLOCKS 64

static struct file *open_file(const char *path)
{
    struct error *err = NULL;
    struct file *f;

    if (file_co_open(&f, path, FILE_READ | FILE_WRITE, 0600, &err) < 0)
        fail_msg("%s", error_text(err));
    return f;
}

static int write_block(struct file *f, uint64_t block, char c, bool durable)
{
    char data[BLOCK];
    struct iovec iov = {data, sizeof(data)};

    memset(data, c, sizeof(data));
    return file_co_write(f, block * BLOCK, &iov, 1, durable, NULL);
}

static struct sim_disk *new_disk(void)
{
    struct sim_file_setup setup = {.type = FILE_TYPE_REGULAR, .size = BLOCKS * BLOCK};
    struct sim_disk *d = sim_disk_new();

    sim_disk_make(d, PATH, &setup);
    return d;
}

/* With at most two faults. */
static void run_with(struct sim_disk *d, uint64_t seed, struct sim_fault *a, struct sim_fault *b,
                     co_entry_fn *body, void *arg)
{
    struct sim_fault *faults[] = {a, b};
    struct sim_options o;

    sim_options_init(&o, seed);
    o.disk = d;
    o.faults = faults;
    o.fault_count = b ? 2 : 1;
    assert_int_equal(sim_run(&o, body, arg), SIM_RETURNED);
}

struct asker {
    struct file *file;
    uint64_t at_ns; /* when it asks */
    int result;
};

static void ask(void *arg)
{
    struct asker *a = arg;

    co_sleep_until(a->at_ns);
    a->result = file_co_sync(a->file);
}

static void ask_ten_times(void *arg)
{
    struct file *f = open_file(PATH);
    struct asker askers[10];
    struct co_scope s;

    (void)arg;
    co_scope_init(&s);
    assert_int_equal(write_block(f, 0, 'a', false), 0);
    for (unsigned i = 0; i < ARRAY_SIZE(askers); i++) {
        askers[i] =
            (struct asker){.file = f, .at_ns = loop_clock() + NS_PER_MS + (i > 0), .result = 1};
        assert_int_equal(co_scope_start(&s, ask, &askers[i]), 0);
    }
    co_scope_join(&s);
    for (unsigned i = 0; i < ARRAY_SIZE(askers); i++)
        assert_int_equal(askers[i].result, 0);
    assert_int_equal(file_co_close(f), 0);
}

static void test_file_sync__those_who_ask_meanwhile_share_the_next(void **state)
{
    (void)state;
    TEST_SEEDS (seed) {
        struct sim_fault slow = {
            .ops = SIM_OP(IO_SYNC), .kind = SIM_DELAY, .delay_ns = 5 * NS_PER_MS};
        struct sim_disk *d = new_disk();

        slow.per_mille = 1000;
        run_with(d, seed, &slow, NULL, ask_ten_times, NULL);
        assert_int_equal(slow.seen, 2);
        sim_disk_free(d);
    }
}

static void leave_a_sync_that_fails(void *arg)
{
    struct file *f = open_file(PATH);
    struct asker first = {.file = f};
    struct co_scope s;

    (void)arg;
    co_scope_init(&s);
    assert_int_equal(write_block(f, 0, 'a', false), 0);
    assert_int_equal(co_scope_start(&s, ask, &first), 0);
    co_sleep_until(loop_clock() + NS_PER_MS);
    co_scope_cancel(&s);
    co_scope_join(&s);
    assert_int_equal(first.result, -ECANCELED);
    assert_int_equal(file_co_sync(f), -EIO);
    assert_int_equal(file_co_close(f), 0);
}

static void test_file_sync__failure_that_nobody_waited_for_is_told_to_the_next(void **state)
{
    (void)state;
    TEST_SEEDS (seed) {
        struct sim_fault drops = {.ops = SIM_OP(IO_SYNC), .kind = SIM_SYNC_DROPS, .at = 1};
        struct sim_fault late = {.ops = SIM_OP(IO_SYNC), .kind = SIM_LATE, .at = 1};
        struct sim_fault slow = {
            .ops = SIM_OP(IO_SYNC), .kind = SIM_DELAY, .delay_ns = 20 * NS_PER_MS, .at = 1};
        struct sim_fault *faults[] = {&drops, &late, &slow};
        struct sim_disk *d = new_disk();
        struct sim_options o;

        sim_options_init(&o, seed);
        o.disk = d;
        o.faults = faults;
        o.fault_count = ARRAY_SIZE(faults);
        assert_int_equal(sim_run(&o, leave_a_sync_that_fails, NULL), SIM_RETURNED);
        sim_disk_free(d);
    }
}

struct durable_writer {
    struct file *file;
    int result;
};

static void write_durably(void *arg)
{
    struct durable_writer *w = arg;

    w->result = write_block(w->file, 1, 'd', true);
}

static void sync_beside_a_durable_write(void *arg)
{
    struct file *f = open_file(PATH);
    struct durable_writer w = {.file = f};
    struct co_scope s;
    int *ret = arg;

    co_scope_init(&s);
    assert_int_equal(write_block(f, 0, 'a', false), 0);
    assert_int_equal(co_scope_start(&s, write_durably, &w), 0);
    co_yield ();
    *ret = file_co_sync(f);
    co_scope_join(&s);
    assert_int_equal(w.result, -EIO);
    assert_int_equal(file_co_sync(f), -EIO);
    assert_int_equal(file_co_close(f), 0);
}

static void test_file_sync__success_waits_for_a_durable_write_that_may_know_better(void **state)
{
    (void)state;
    TEST_SEEDS (seed) {
        /* The first write of two is the plain one. */
        struct sim_fault fails = {
            .ops = SIM_OP(IO_WRITE), .kind = SIM_ERROR, .error = EIO, .at = 2, .times = 1000};
        struct sim_fault slow = {.ops = SIM_OP(IO_WRITE),
                                 .kind = SIM_DELAY,
                                 .delay_ns = 50 * NS_PER_MS,
                                 .at = 2,
                                 .times = 1000};
        struct sim_disk *d = new_disk();
        struct sim_fault *faults[] = {&fails, &slow};
        struct sim_options o;
        int result = 1;

        sim_options_init(&o, seed);
        o.short_per_mille = 0;
        o.disk = d;
        o.faults = faults;
        o.fault_count = ARRAY_SIZE(faults);
        assert_int_equal(sim_run(&o, sync_beside_a_durable_write, &result), SIM_RETURNED);
        assert_int_equal(result, -EIO);
        sim_disk_free(d);
    }
}

/* Several loops write and sync; what a sync that succeeded has covered survives the power cut. */
#define WRITERS 4

struct history {
    struct file *file;
    uint64_t seed;
    char promised[BLOCKS]; /* each block has one writer */
    char written[BLOCKS];  /* what it was last given */
};

struct history_writer {
    struct history *history;
    unsigned number;
};

static void write_history(void *arg)
{
    const struct history_writer *w = arg;
    struct history *h = w->history;
    struct prng prng = {.state = h->seed * WRITERS + w->number};

    for (unsigned i = 0; i < 20; i++) {
        unsigned block = (unsigned)prng_below(&prng, BLOCKS / WRITERS) * WRITERS + w->number;
        bool durable = prng_chance(&prng, 200);
        int r;

        h->written[block]++;
        h->promised[block] = 0; /* until the next sync it may be the old one or the new one */
        r = write_block(h->file, block, h->written[block], durable);
        if (r == 0 && durable)
            h->promised[block] = h->written[block];
        if (prng_chance(&prng, 300) && file_co_sync(h->file) == 0) {
            for (unsigned k = w->number; k < BLOCKS; k += WRITERS)
                h->promised[k] = h->written[k];
        }
    }
}

static void write_history_on_loops(void *arg)
{
    struct history *h = arg;
    struct history_writer writers[WRITERS];
    struct co_scope s;

    h->file = open_file(PATH);
    co_scope_init(&s);
    for (unsigned i = 0; i < WRITERS; i++) {
        writers[i] = (struct history_writer){h, i};
        assert_int_equal(co_scope_start(&s, write_history, &writers[i]), 0);
    }
    co_scope_join(&s);
    (void)file_co_close(h->file);
}

static void test_file_sync__what_was_promised_survives_failing_syncs_and_a_power_cut(void **state)
{
    (void)state;
    TEST_SEEDS (seed) {
        struct sim_fault drops = {.ops = SIM_OP(IO_SYNC), .kind = SIM_SYNC_DROPS, .per_mille = 200};
        struct history h = {.seed = seed};
        struct sim_disk *d = new_disk();

        run_with(d, seed, &drops, NULL, write_history_on_loops, &h);
        sim_disk_power_cut(d, seed);
        for (unsigned i = 0; i < BLOCKS; i++) {
            char data[BLOCK];

            if (!h.promised[i])
                continue;
            assert_int_equal(sim_disk_read(d, PATH, (uint64_t)i * BLOCK, data, BLOCK), 0);
            for (unsigned k = 0; k < BLOCK; k++)
                assert_int_equal(data[k], h.promised[i]);
        }
        sim_disk_free(d);
    }
}
