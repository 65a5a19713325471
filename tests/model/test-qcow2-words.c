/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The two words of an extended L2 entry (WRITE-5), alone: one loop changes an entry as requests may, others read it. Each place is used
 * once, as within an epoch, and has the subclusters that were written to it; all of the cluster holds data or reads as zeroes at all
 * times. Whoever reads must never find data where a place has none, nor see what lies below. Under sim by seed (T1), and on real
 * threads (T2).
 */
#include "base/alloc.h"
#include "base/prng.h"
#include "check.h"
#include "formats/qcow2/qcow2.h"
#include "graph-fixture.h"
#include "loop/sim/sim.h"
#include "seeds.h"

#include <inttypes.h>
#include <stdio.h>

#define READERS 2
#define CHANGES 200
#define READS   600
#define CLUSTER ((uint64_t)1 << 16)

struct words {
    uint64_t seed;
    bool is_sim;
    struct qcow2 *q;
    struct qcow2_slice *s;
    uint64_t written[CHANGES + 2]; /* atomic; by place: subclusters that hold what they should */
    uint64_t places;
    struct loop_thread *threads[READERS + 1];
};

static uint64_t new_place(struct words *w, uint64_t mask)
{
    w->places++;
    atomic_set(&w->written[w->places], mask);
    return w->places * CLUSTER | QCOW2_COPIED;
}

/* What is not data reads as zeroes. */
static struct qcow2_l2 with_data(uint64_t entry, uint64_t mask)
{
    return (struct qcow2_l2){entry, mask | (~mask & QCOW2_ALL_DATA) << 32};
}

static struct qcow2_l2 next_entry(struct words *w, struct prng *prng, struct qcow2_l2 was)
{
    uint64_t mask = prng_next(prng) & prng_next(prng) & QCOW2_ALL_DATA;
    bool compressed = was.entry & QCOW2_L2_COMPRESSED;
    uint64_t place = compressed ? 0 : (was.entry & QCOW2_L2_OFFSET_MASK) / CLUSTER;

    switch (prng_below(prng, 5)) {
    case 0: /* discard */
        return (struct qcow2_l2){0, QCOW2_ALL_ZERO};
    case 1: /* compressed bytes */
        return (struct qcow2_l2){QCOW2_L2_COMPRESSED | new_place(w, 0), 0};
    case 2: /* zeroes in place */
        return place ? with_data(was.entry, was.bits & mask) : was;
    case 3: /* more in place */
        if (!place)
            return was;
        atomic_set(&w->written[place], w->written[place] | mask);
        return with_data(was.entry, (was.bits & QCOW2_ALL_DATA) | mask);
    default: /* all of it moves */
        mask |= compressed ? QCOW2_ALL_DATA : was.bits & QCOW2_ALL_DATA;
        return with_data(new_place(w, mask), mask);
    }
}

static void change_there(void *arg)
{
    struct words *w = arg;
    struct prng prng = {w->seed};
    struct qcow2_l2 now = {0, QCOW2_ALL_ZERO};

    if (!w->is_sim)
        sim_install_random_spins(w->seed + 1);
    for (unsigned i = 0; i < CHANGES; i++) {
        now = next_entry(w, &prng, now);
        tiny_lock_acquire(&w->q->lock);
        qcow2_entry_publish(w->s->entries, now);
        tiny_lock_release(&w->q->lock);
    }
    if (!w->is_sim)
        sim_install_random_spins(0);
}

static void check_entry(struct words *w, struct qcow2_l2 e)
{
    uint64_t data = e.bits & QCOW2_ALL_DATA;
    uint64_t place = (e.entry & QCOW2_L2_OFFSET_MASK) / CLUSTER;

    if (e.entry & QCOW2_L2_COMPRESSED)
        return;
    if ((data | e.bits >> 32) == QCOW2_ALL_DATA && !(data & e.bits >> 32) &&
        !(data & ~atomic_get(&w->written[place])))
        return;
    fprintf(stderr, "place %" PRIu64 " has %" PRIx64 ", bits are %" PRIx64 "\n", place,
            w->written[place], e.bits);
    abort();
}

static void read_there(void *arg)
{
    struct words *w = arg;

    if (!w->is_sim)
        sim_install_random_spins(w->seed + 2);
    for (unsigned i = 0; i < READS; i++)
        check_entry(w, qcow2_entry(w->q, w->s, 0));
    if (!w->is_sim)
        sim_install_random_spins(0);
}

struct there {
    struct words *w;
    unsigned number;
};

static void run_there(void *arg)
{
    struct there *t = arg;

    check(loop_co_call(loop_thread_loop(t->w->threads[t->number]),
                       t->number ? read_there : change_there, t->w) == 0);
}

static void run_words(void *arg)
{
    struct words *w = arg;
    struct there there[READERS + 1];
    struct error *err = NULL;
    struct co_scope s;

    for (unsigned i = 0; i <= READERS; i++)
        check(loop_thread_start(&w->threads[i], "io", &err) == 0);
    co_scope_init(&s);
    for (unsigned i = 0; i <= READERS; i++) {
        there[i] = (struct there){w, i};
        check(co_scope_start(&s, run_there, &there[i]) == 0);
    }
    co_scope_join(&s);
    for (unsigned i = 0; i <= READERS; i++)
        loop_thread_stop(w->threads[i]);
}

static void words_init(struct words *w, uint64_t seed, bool is_sim)
{
    *w = (struct words){.seed = seed, .is_sim = is_sim};
    w->q = xnew(struct qcow2);
    w->q->extended = true;
    w->q->cluster_bits = 16;
    w->s = xalloc(1, sizeof(*w->s) + 16);
    w->s->entries[1] = QCOW2_ALL_ZERO;
}

static void words_release(struct words *w)
{
    free(w->q);
    free(w->s);
}

static void test_qcow2_words__under_sim(void **state)
{
    (void)state;
    TEST_SEEDS (seed) {
        static struct words w;
        struct sim_options o;

        words_init(&w, seed, true);
        sim_options_init(&o, seed);
        assert_int_equal(sim_run(&o, run_words, &w), SIM_RETURNED);
        words_release(&w);
    }
}

static void test_qcow2_words__on_threads(void **state)
{
    (void)state;
    TEST_SEEDS (seed) {
        static struct words w;

        words_init(&w, seed, false);
        on_engine(LOOP_ENGINE_THREADS, run_words, &w);
        words_release(&w);
    }
}
