/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The bitmap against a set: random operations one after another, compared after each; and several loops at once, under sim by
 * seed (T1) and on real threads with spins at each atomic (T2).
 *
 * What must hold when several are at it: what somebody has set and nobody has taken afterwards is dirty in the end; nothing
 * is dirty, or taken, that nobody has set; what is taken is taken by one.
 */
#include "base/alloc.h"
#include "base/atomic.h"
#include "base/macros.h"
#include "base/prng.h"
#include "bitmaps/bitmap.h"
#include "check.h"
#include "loop/scope.h"
#include "loop/sim/sim.h"
#include "seeds.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- one after another ---- */

#define UNITS 3000 /* the most granules that a model has */
#define STEPS 60

struct model {
    struct bitmap *b;
    uint64_t
        stretch;   /* every granule of the model is so many of the bitmap: so it has more levels */
    uint64_t size; /* bytes */
    uint64_t granularity;
    uint8_t dirty[UNITS]; /* one per `unit` */
};

static uint64_t unit(const struct model *m)
{
    return m->granularity * m->stretch;
}

static uint64_t units(const struct model *m)
{
    return (m->size + unit(m) - 1) / unit(m);
}

/* Sizes end anywhere, but with a stretch only at a unit: what is rounded is the granule, not the unit. */
static uint64_t some_size(struct prng *p, const struct model *m)
{
    uint64_t count = 1 + prng_below(p, UNITS - 1);

    return m->stretch > 1 ? count * unit(m) : count * unit(m) - prng_below(p, unit(m));
}

static void make(struct model *m, struct prng *p)
{
    static const uint64_t stretches[] = {1, 1, 64, 4096, 4096 * 128, 1000};

    memset(m, 0, sizeof(*m));
    m->granularity = BITMAP_GRANULARITY_MIN << prng_below(p, 8);
    m->stretch = stretches[prng_below(p, 6)];
    m->size = some_size(p, m);
    m->b = bitmap_new(m->size, m->granularity);
    check(m->b);
}

/* A range of whole units, or with granules for units of bytes. */
static void some_range(struct prng *p, const struct model *m, uint64_t *ret_offset,
                       uint64_t *ret_len)
{
    uint64_t first = prng_below(p, units(m));
    uint64_t count = 1 + prng_below(p, prng_chance(p, 500) ? 5 : units(m) - first);
    uint64_t skip = m->stretch == 1 ? prng_below(p, unit(m)) : 0;

    skip = MIN(skip, m->size - first * unit(m) - 1);
    *ret_offset = first * unit(m) + skip;
    *ret_len = count * unit(m) - skip;
    if (m->stretch == 1)
        *ret_len -= prng_below(p, unit(m) - skip);
}

static void model_set(struct model *m, uint64_t offset, uint64_t len)
{
    for (uint64_t i = offset / unit(m); i <= (offset + len - 1) / unit(m) && i < units(m); i++)
        m->dirty[i] = 1;
}

/* The run in the model that begins at or after a unit. False: none. */
static bool model_find(const struct model *m, uint64_t from, uint64_t *ret_first, uint64_t *ret_end)
{
    uint64_t i = from;

    while (i < units(m) && !m->dirty[i])
        i++;
    *ret_first = i;
    while (i < units(m) && m->dirty[i])
        i++;
    *ret_end = i;
    return *ret_first < units(m);
}

static void compare(const struct model *m)
{
    uint64_t pos = 0;
    uint64_t offset;
    uint64_t len;
    uint64_t first;
    uint64_t end = 0;
    uint64_t count = 0;

    bitmap_check(m->b);
    while (model_find(m, end, &first, &end)) {
        uint64_t end_bytes = MIN(end * unit(m), m->size);

        check(bitmap_next_dirty(m->b, pos, UINT64_MAX, &offset, &len));
        check(offset == first * unit(m));
        check(offset + len == end_bytes);
        pos = offset + len;
        count += (end - first) * unit(m);
    }
    check(!bitmap_next_dirty(m->b, pos, UINT64_MAX, &offset, &len));
    check(bitmap_count(m->b) == count);
}

static void step_claim(struct model *m, struct prng *p)
{
    uint64_t from = prng_below(p, units(m));
    uint64_t max = (1 + prng_below(p, 100)) * unit(m);
    uint64_t offset;
    uint64_t len;
    uint64_t first;
    uint64_t end;
    bool found = model_find(m, from, &first, &end);

    check(bitmap_claim(m->b, from * unit(m), max, &offset, &len) == (found ? 1 : 0));
    if (!found)
        return;
    check(offset == first * unit(m));
    end = MIN(end * unit(m), m->size);
    check(offset + len == MIN(end, offset + max));
    memset(&m->dirty[first], 0, (len + unit(m) - 1) / unit(m));
    if (prng_chance(p, 300)) { /* it failed */
        bitmap_set(m->b, offset, len);
        model_set(m, offset, len);
    }
}

static void step_resize(struct model *m, struct prng *p)
{
    m->size = some_size(p, m);
    bitmap_resize(m->b, m->size);
    memset(&m->dirty[units(m)], 0, UNITS - units(m));
}

/* Another one of the same size, and of the same or another granularity, is merged into this one. */
static void step_merge(struct model *m, struct prng *p)
{
    uint64_t granularity = m->granularity;
    struct bitmap *other;

    if (m->stretch == 1 && prng_chance(p, 500))
        granularity = BITMAP_GRANULARITY_MIN << prng_below(p, 8);
    other = bitmap_new(m->size, granularity);
    for (unsigned i = 0; i < 5; i++) {
        uint64_t offset;
        uint64_t len;
        uint64_t end;

        some_range(p, m, &offset, &len);
        bitmap_set(other, offset, len);
        end = MIN((offset + len + granularity - 1) & ~(granularity - 1), m->size);
        offset &= ~(granularity - 1);
        model_set(m, offset, end - offset);
    }
    check(bitmap_merge(m->b, other) == 0);
    bitmap_check(other);
    bitmap_free(other);
}

static void step(struct model *m, struct prng *p)
{
    uint64_t kind = prng_below(p, 100);
    uint64_t offset;
    uint64_t len;

    if (kind < 45) {
        some_range(p, m, &offset, &len);
        bitmap_set(m->b, offset, len);
        model_set(m, offset, len);
    } else if (kind < 80) {
        step_claim(m, p);
    } else if (kind < 90) {
        step_merge(m, p);
    } else if (kind < 98) {
        step_resize(m, p);
    } else {
        bitmap_clear(m->b);
        memset(m->dirty, 0, sizeof(m->dirty));
    }
}

static void test_bitmap_model__is_a_set(void **state)
{
    struct model *m = xnew(struct model);

    (void)state;
    TEST_SEEDS (seed) {
        struct prng prng = {.state = seed};

        make(m, &prng);
        for (unsigned i = 0; i < STEPS; i++) {
            step(m, &prng);
            compare(m);
        }
        m->b = bitmap_free(m->b);
    }
    free(m);
}

/* ---- several at once ---- */

#define LOOPS    4
#define ACTORS   8
#define GRANULE  ((uint64_t)512)
#define BLOCKS   200u
#define OPS      60
#define OPS_REAL 400

/*
 * Writers change the versions of blocks on a "disk" as C2 says; takers claim, and copy the versions of what they have got (C1).
 * When all is over and what is dirty still is copied, too, the copy is the disk.
 */
struct play {
    uint64_t seed;
    bool real;    /* threads: random spins */
    bool starved; /* now and then there is no memory */
    bool once;    /* each block is made dirty once */
    struct bitmap *b;
    uint64_t blocks;
    uint64_t spread; /* where a block begins, so that there are leaves and levels between them */
    uint64_t len;    /* and what a write to it makes dirty */
    uint32_t disk[BLOCKS];   /* atomic: grows with each write */
    uint32_t copy[BLOCKS];   /* atomic: the newest that was copied */
    uint32_t writes[BLOCKS]; /* atomic: how often it was made dirty, or a little less */
    uint32_t taken[BLOCKS];  /* atomic: how often its first granule was taken */
    struct loop_thread *threads[LOOPS];
};

struct actor {
    struct play *play;
    unsigned number;
    struct prng prng;
};

static void play_set(struct actor *a, uint64_t first, uint64_t count)
{
    struct play *w = a->play;

    for (uint64_t i = first; i < first + count; i++)
        (void)atomic_add(&w->writes[i], 1);
    if (w->starved && prng_chance(&a->prng, 300))
        alloc_fail_at(1 + (unsigned)prng_below(&a->prng, 3));
    bitmap_set(w->b, first * w->spread, (count - 1) * w->spread + w->len);
    alloc_fail_at(0);
}

/* C2 */
static void play_write(struct actor *a)
{
    struct play *w = a->play;
    uint64_t first = prng_below(&a->prng, w->blocks);
    uint64_t count =
        w->len < w->spread ? 1 : 1 + prng_below(&a->prng, MIN(w->blocks - first, (uint64_t)20));

    play_set(a, first, count);
    for (uint64_t i = first; i < first + count; i++)
        (void)atomic_add(&w->disk[i], 1);
    play_set(a, first, count);
}

static void copy_block(struct play *w, uint64_t i)
{
    uint32_t version = atomic_get(&w->disk[i]);
    uint32_t have = atomic_get(&w->copy[i]);

    while (have < version && !atomic_cas(&w->copy[i], &have, version))
        ;
}

/* C1. False: there was nothing. */
static bool play_take(struct play *w, uint64_t from, uint64_t max, uint64_t *ret_end)
{
    uint64_t offset;
    uint64_t len;

    if (bitmap_claim(w->b, from, max, &offset, &len) != 1)
        return false;
    *ret_end = offset + len;
    check(len <= max);
    for (uint64_t i = offset / w->spread; i < w->blocks && i * w->spread < offset + len; i++) {
        if (i * w->spread >= offset) {
            uint32_t taken = atomic_add(&w->taken[i], 1) + 1;

            check(w->starved || taken <= atomic_get(&w->writes[i]));
        }
        copy_block(w, i);
    }
    return true;
}

/* Half of the blocks are dirty from the start; writers set one each of the others, takers take. */
static void act_once(struct actor *a)
{
    struct play *w = a->play;
    uint64_t end;

    for (uint64_t i = 2 * a->number + 1; i < w->blocks; i += 2 * ACTORS) {
        play_set(a, i, 1);
        (void)play_take(w, prng_below(&a->prng, w->blocks) * w->spread, 3 * w->len, &end);
    }
}

static void act_there(void *arg)
{
    struct actor *a = arg;
    struct play *w = a->play;

    if (w->real)
        sim_install_random_spins(w->seed * ACTORS + a->number + 1);
    if (w->once) {
        act_once(a);
        return;
    }
    for (unsigned i = 0; i < (w->real ? OPS_REAL : OPS); i++) {
        uint64_t from = prng_below(&a->prng, w->blocks) * w->spread;
        uint64_t offset;
        uint64_t len;
        uint64_t end;

        if (a->number % 3 != 2)
            play_write(a);
        else if (prng_chance(&a->prng, 100))
            (void)bitmap_next_dirty(w->b, from, UINT64_MAX, &offset, &len);
        else
            (void)play_take(w, from,
                            GRANULE << prng_below(&a->prng, prng_chance(&a->prng, 500) ? 4 : 40),
                            &end);
    }
}

static void act(void *arg)
{
    struct actor *a = arg;

    check(loop_co_call(loop_thread_loop(a->play->threads[a->number % LOOPS]), act_there, a) == 0);
}

static void play_main(void *arg)
{
    struct play *w = arg;
    struct error *err = NULL;
    struct actor actors[ACTORS];
    struct co_scope s;
    uint64_t end = 0;

    for (unsigned i = 0; i < LOOPS; i++)
        check(loop_thread_start(&w->threads[i], "io", &err) == 0);
    co_scope_init(&s);
    for (unsigned i = 0; i < ACTORS; i++) {
        actors[i] = (struct actor){w, i, {.state = w->seed * ACTORS + i}};
        check(co_scope_start(&s, act, &actors[i]) == 0);
    }
    co_scope_join(&s);
    for (unsigned i = 0; i < LOOPS; i++)
        loop_thread_stop(w->threads[i]);
    bitmap_check(w->b);
    while (play_take(w, end, UINT64_MAX, &end))
        ;
    for (unsigned i = 0; i < w->blocks; i++)
        check(w->once ? w->taken[i] == 1 : w->copy[i] == w->disk[i]);
    bitmap_check(w->b);
}

static void play_begin(struct play *w, uint64_t seed)
{
    /* Granules side by side; some in each leaf; leaves far apart; blocks of a leaf and more. */
    static const struct {
        uint64_t spread;
        uint64_t len;
    } shapes[] = {
        {GRANULE, GRANULE},
        {GRANULE * 1000, GRANULE},
        {GRANULE << 25, GRANULE},
        {GRANULE << 12, GRANULE << 12},
        {GRANULE * 5000, GRANULE * 5000},
        {GRANULE << 19, GRANULE << 19},
    };
    struct prng p = {.state = seed};
    unsigned shape = (unsigned)prng_below(&p, 6);

    memset(w, 0, sizeof(*w));
    w->seed = seed;
    w->starved = prng_chance(&p, 300);
    w->spread = shapes[shape].spread;
    w->len = shapes[shape].len;
    w->blocks = prng_chance(&p, 500) ? 4 : BLOCKS; /* crowded, or each for itself */
    w->b = bitmap_new(w->blocks * w->spread, GRANULE);
    check(w->b);
}

static void test_bitmap_model__nothing_is_lost_or_taken_twice(void **state)
{
    (void)state;
    TEST_SEEDS (seed) {
        struct play w;
        struct sim_options o;

        play_begin(&w, seed);
        sim_options_init(&o, seed);
        check(sim_run(&o, play_main, &w) == SIM_RETURNED);
        bitmap_free(w.b);
    }
}

/* C1, to the letter: what is dirty once is taken once. */
static void once_begin(struct play *w, uint64_t seed)
{
    play_begin(w, seed);
    w->once = true;
    w->starved = false;
    for (uint64_t i = 0; i < w->blocks; i++)
        w->writes[i] = 1;
    for (uint64_t i = 0; i < w->blocks; i += 2)
        bitmap_set(w->b, i * w->spread, w->len);
}

static void test_bitmap_model__what_is_dirty_once_is_taken_once(void **state)
{
    (void)state;
    TEST_SEEDS (seed) {
        struct play w;
        struct sim_options o;

        once_begin(&w, seed);
        sim_options_init(&o, seed);
        check(sim_run(&o, play_main, &w) == SIM_RETURNED);
        bitmap_free(w.b);
    }
}

static void test_bitmap_model__what_is_dirty_once_is_taken_once_on_threads(void **state)
{
    (void)state;
    for (unsigned i = 0; i < 30; i++) {
        struct play w;
        struct error *err = NULL;

        once_begin(&w, i + 1);
        w.real = true;
        if (loop_run_main(LOOP_ENGINE_THREADS, "main", play_main, &w, &err) < 0)
            fail_msg("%s", error_text(err));
        bitmap_free(w.b);
    }
}

static void test_bitmap_model__nothing_is_lost_or_taken_twice_on_threads(void **state)
{
    (void)state;
    for (unsigned i = 0; i < 8; i++) {
        struct play w;
        struct error *err = NULL;

        play_begin(&w, i + 1);
        w.real = true;
        if (loop_run_main(LOOP_ENGINE_THREADS, "main", play_main, &w, &err) < 0)
            fail_msg("%s", error_text(err));
        bitmap_free(w.b);
    }
}
