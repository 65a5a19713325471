/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Coroutines, locks, messages and scopes of several loops in random orders: under sim by seed (T1), and the same bodies on
 * real threads with random spins at each atomic (T2).
 *
 * What must hold, whatever the order: locks exclude; a wake is never lost and never given twice; who waits until a time is
 * not sent away before; cancelling reaches all; messages of one sender arrive in order; locks are granted in the order of
 * asking. That every wait ends is what ends the test: the simulator reports a deadlock, real threads run into the timeout.
 */
#include "base/alloc.h"
#include "base/atomic.h"
#include "check.h"
#include "loop/lock.h"
#include "loop/scope.h"
#include "loop/sim/sim.h"
#include "seeds.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>

#define LOOPS  4
#define ACTORS 12

/* ---- the loops of a world ---- */

struct world {
    uint64_t seed;
    bool real; /* threads: shorter sleeps, random spins */
    struct loop_thread *threads[LOOPS];
    void (*body)(struct world *w);
    void *state;
};

struct visit {
    struct world *world;
    unsigned number;
    void (*fn)(struct world *w, struct prng *prng, unsigned number);
};

static void visit_there(void *arg)
{
    const struct visit *v = arg;
    struct prng prng = {.state = v->world->seed * 1000 + v->number};

    v->fn(v->world, &prng, v->number);
}

static void visit_from_here(void *arg)
{
    struct visit *v = arg;

    check(loop_co_call(loop_thread_loop(v->world->threads[v->number % LOOPS]), visit_there, v) ==
          0);
}

/* Runs fn on the world's loops, `actors` times at once. */
static void visit_all(struct world *w, unsigned actors,
                      void (*fn)(struct world *w, struct prng *prng, unsigned number))
{
    struct visit *visits = xnew_n(struct visit, actors);
    struct co_scope s;

    co_scope_init(&s);
    for (unsigned i = 0; i < actors; i++) {
        visits[i] = (struct visit){w, i, fn};
        check(co_scope_start(&s, visit_from_here, &visits[i]) == 0);
    }
    co_scope_join(&s);
    free(visits);
}

static void spin_there(struct world *w, struct prng *prng, unsigned number)
{
    (void)prng;
    sim_install_random_spins(w->seed * LOOPS + number + 1);
}

static void world_main(void *arg)
{
    struct world *w = arg;
    struct error *err = NULL;

    for (unsigned i = 0; i < LOOPS; i++)
        check(loop_thread_start(&w->threads[i], "io", &err) == 0);
    if (w->real)
        visit_all(w, LOOPS, spin_there);
    w->body(w);
    for (unsigned i = 0; i < LOOPS; i++)
        loop_thread_stop(w->threads[i]);
}

static void run_in_sim(uint64_t seed, void (*body)(struct world *w))
{
    struct world w = {.seed = seed, .body = body};
    struct sim_options o;

    sim_options_init(&o, seed);
    check(sim_run(&o, world_main, &w) == SIM_RETURNED);
}

/* More loops than CPUs on most machines that run tests; both engines by turns. */
static void run_on_threads(void (*body)(struct world *w))
{
    for (unsigned i = 0; i < 6; i++) {
        struct world w = {.seed = i + 1, .body = body, .real = true};
        struct error *err = NULL;
        enum loop_engine engine = i % 2 ? LOOP_ENGINE_THREADS : LOOP_ENGINE_IO_URING;

        if (loop_run_main(engine, "main", world_main, &w, &err) < 0)
            fail_msg("%s", error_text(err));
    }
}

static void nap(struct world *w, struct prng *prng)
{
    switch (prng_below(prng, 3)) {
    case 0:
        break;
    case 1:
        co_yield ();
        break;
    default:
        co_sleep_until(loop_clock() + prng_below(prng, w->real ? 20000 : 200000));
        break;
    }
}

/* ---- mutex: exclusion, deadlines, cancellation ---- */

struct exclusion {
    struct co_mutex mutex;
    unsigned inside; /* atomic */
    uint64_t sum;    /* Protected by mutex. */
    uint64_t locked; /* atomic: how often it was */
};

static void hold_mutex(struct world *w, struct prng *prng, struct exclusion *e)
{
    uint64_t before;

    check(atomic_add(&e->inside, 1u) == 0);
    before = e->sum;
    nap(w, prng);
    e->sum = before + 1;
    atomic_add(&e->locked, (uint64_t)1);
    check(atomic_sub(&e->inside, 1u) == 1);
    co_mutex_unlock(&e->mutex);
}

static void lock_somehow(struct world *w, struct prng *prng, unsigned number)
{
    struct exclusion *e = w->state;

    (void)number;
    for (unsigned i = 0; i < 20; i++) {
        uint64_t until = loop_clock() + prng_below(prng, 100000);
        int r = 0;

        switch (prng_below(prng, 3)) {
        case 0:
            co_mutex_lock(&e->mutex);
            break;
        case 1:
            r = co_mutex_lock_until(&e->mutex, until);
            check(r == 0 || (r == -ETIMEDOUT && loop_clock() >= until));
            break;
        default:
            r = co_mutex_try_lock(&e->mutex) ? 0 : -EBUSY;
            break;
        }
        if (r == 0)
            hold_mutex(w, prng, e);
        nap(w, prng);
    }
}

static void mutex_body(struct world *w)
{
    struct exclusion e = {.sum = 0};

    co_mutex_init(&e.mutex);
    w->state = &e;
    visit_all(w, ACTORS, lock_somehow);
    check(e.sum == e.locked && e.sum > 0);
    check(co_mutex_try_lock(&e.mutex)); /* nobody has gone away with it */
}

static void test_loop_schedule__mutex_excludes(void **state)
{
    (void)state;
    TEST_SEEDS (seed)
        run_in_sim(seed, mutex_body);
}

static void test_loop_schedule__mutex_excludes_on_threads(void **state)
{
    (void)state;
    run_on_threads(mutex_body);
}

/* ---- rwlock ---- */

struct readers_writers {
    struct co_rwlock lock;
    unsigned readers; /* atomic */
    unsigned writers; /* atomic */
    unsigned together;
};

static void read_or_write(struct world *w, struct prng *prng, unsigned number)
{
    struct readers_writers *rw = w->state;

    (void)number;
    for (unsigned i = 0; i < 20; i++) {
        if (prng_chance(prng, 300)) {
            co_rwlock_write(&rw->lock);
            check(atomic_add(&rw->writers, 1u) == 0 && atomic_get(&rw->readers) == 0);
            nap(w, prng);
            check(atomic_sub(&rw->writers, 1u) == 1);
            co_rwlock_write_done(&rw->lock);
        } else {
            co_rwlock_read(&rw->lock);
            if (atomic_add(&rw->readers, 1u) > 0)
                atomic_set(&rw->together, 1u);
            check(atomic_get(&rw->writers) == 0);
            nap(w, prng);
            atomic_sub(&rw->readers, 1u);
            co_rwlock_read_done(&rw->lock);
        }
    }
}

static void rwlock_body(struct world *w)
{
    struct readers_writers rw = {.readers = 0};

    co_rwlock_init(&rw.lock);
    w->state = &rw;
    visit_all(w, ACTORS, read_or_write);
    check(rw.together); /* readers do share it */
    check(!rw.lock.readers && !rw.lock.writer && list_empty(&rw.lock.queue.waiters));
}

static void test_loop_schedule__rwlock_admits_readers_or_one_writer(void **state)
{
    (void)state;
    TEST_SEEDS (seed)
        run_in_sim(seed, rwlock_body);
}

static void test_loop_schedule__rwlock_admits_readers_or_one_writer_on_threads(void **state)
{
    (void)state;
    run_on_threads(rwlock_body);
}

/* ---- a wait queue: tokens are neither lost nor doubled (T4) ---- */

struct tokens {
    struct tiny_lock lock;
    uint64_t count; /* Protected by lock, as the queue. */
    struct wait_queue queue;
    uint64_t given; /* atomic, as `taken` */
    uint64_t taken;
    bool ended; /* Protected by lock. */
};

static void give(struct tokens *t)
{
    tiny_lock_acquire(&t->lock);
    t->count++;
    wait_queue_wake_one(&t->queue);
    tiny_lock_release(&t->lock);
    atomic_add(&t->given, (uint64_t)1);
}

/* 0: took one; 1: all has ended; -ETIMEDOUT or -ECANCELED: took none. */
static int take_token(struct tokens *t, uint64_t until)
{
    for (;;) {
        int r;

        tiny_lock_acquire(&t->lock);
        if (t->count) {
            t->count--;
            tiny_lock_release(&t->lock);
            atomic_add(&t->taken, (uint64_t)1);
            return 0;
        }
        if (t->ended) {
            tiny_lock_release(&t->lock);
            return 1;
        }
        r = wait_queue_wait(&t->queue, &t->lock, until);
        if (r < 0)
            return r;
    }
}

static void take_all(struct world *w, struct prng *prng, unsigned number)
{
    struct tokens *t = w->state;
    int r;

    (void)number;
    do {
        bool patient = prng_chance(prng, 700);
        uint64_t until = patient ? LOOP_FOREVER : loop_clock() + prng_below(prng, 100000);

        r = take_token(t, until);
        check(r >= 0 || (r == -ETIMEDOUT && !patient && loop_clock() >= until));
    } while (r != 1);
}

static void give_some(struct world *w, struct prng *prng, unsigned number)
{
    (void)number;
    for (unsigned i = 0; i < 30; i++) {
        give(w->state);
        nap(w, prng);
    }
}

static void give_or_take(struct world *w, struct prng *prng, unsigned number)
{
    if (number % 2)
        take_all(w, prng, number);
    else
        give_some(w, prng, number);
}

static void token_givers(void *arg)
{
    visit_all(arg, ACTORS, give_or_take);
}

static void token_body(struct world *w)
{
    struct tokens t = {.count = 0};
    struct co_scope s;

    wait_queue_init(&t.queue);
    w->state = &t;
    co_scope_init(&s);
    co_scope_start(&s, token_givers, w);
    while (atomic_get(&t.taken) < ACTORS / 2 * 30)
        co_sleep_until(loop_clock() + 100000);
    tiny_lock_acquire(&t.lock);
    t.ended = true;
    wait_queue_wake_all(&t.queue);
    tiny_lock_release(&t.lock);
    co_scope_join(&s);
    check(t.given == t.taken && t.count == 0 && list_empty(&t.queue.waiters));
}

static void test_loop_schedule__wakes_are_not_lost(void **state)
{
    (void)state;
    TEST_SEEDS (seed)
        run_in_sim(seed, token_body);
}

static void test_loop_schedule__wakes_are_not_lost_on_threads(void **state)
{
    (void)state;
    run_on_threads(token_body);
}

/*
 * A waiter for each token, all waiting before the first is given, and nobody to make up for a wake that got lost: the wait
 * of its waiter would never end.
 */
static void take_one(struct world *w, struct prng *prng, unsigned number)
{
    (void)prng;
    (void)number;
    check(take_token(w->state, LOOP_FOREVER) == 0);
}

static void takers(void *arg)
{
    visit_all(arg, ACTORS, take_one);
}

static unsigned queue_length(struct tiny_lock *lock, struct wait_queue *q)
{
    unsigned n = 0;

    tiny_lock_acquire(lock);
    for (struct list *l = q->waiters.next; l != &q->waiters; l = l->next)
        n++;
    tiny_lock_release(lock);
    return n;
}

static void exact_body(struct world *w)
{
    struct tokens t = {.count = 0};
    struct co_scope s;

    wait_queue_init(&t.queue);
    w->state = &t;
    co_scope_init(&s);
    co_scope_start(&s, takers, w);
    while (queue_length(&t.lock, &t.queue) < ACTORS)
        co_sleep_until(loop_clock() + 10000);
    for (unsigned i = 0; i < ACTORS; i++)
        give(&t);
    co_scope_join(&s);
    check(t.taken == ACTORS);
}

static void test_loop_schedule__each_waiter_gets_its_own_wake(void **state)
{
    (void)state;
    TEST_SEEDS (seed)
        run_in_sim(seed, exact_body);
}

static void test_loop_schedule__each_waiter_gets_its_own_wake_on_threads(void **state)
{
    (void)state;
    run_on_threads(exact_body);
}

/* ---- locks are granted in the order of asking ---- */

struct line {
    struct co_mutex mutex;
    struct co_rwlock rwlock;
    unsigned order[ACTORS];
    unsigned granted; /* Protected by mutex. */
    bool reads[ACTORS];
    unsigned first_reader[ACTORS]; /* of rwlock: how many were granted before, by writers alone */
};

static void stand_in_line(struct world *w, struct prng *prng, unsigned number)
{
    struct line *l = w->state;

    (void)prng;
    co_mutex_lock(&l->mutex);
    l->order[l->granted++] = number;
    co_mutex_unlock(&l->mutex);
}

static void fifo_body(struct world *w)
{
    struct line l = {.granted = 0};
    struct visit visits[ACTORS];
    struct co_scope s;

    co_mutex_init(&l.mutex);
    w->state = &l;
    co_scope_init(&s);
    co_mutex_lock(&l.mutex);
    for (unsigned i = 0; i < ACTORS; i++) {
        visits[i] = (struct visit){w, i, stand_in_line};
        check(co_scope_start(&s, visit_from_here, &visits[i]) == 0);
        while (queue_length(&l.mutex.lock, &l.mutex.queue) <= i)
            co_sleep_until(loop_clock() + 10000);
    }
    co_mutex_unlock(&l.mutex);
    co_scope_join(&s);
    for (unsigned i = 0; i < ACTORS; i++)
        check(l.order[i] == i);
}

static void test_loop_schedule__mutex_is_granted_in_order(void **state)
{
    (void)state;
    TEST_SEEDS (seed)
        run_in_sim(seed, fifo_body);
}

/* A reader that comes after a waiting writer does not overtake it, and all writers that wait come before it. */
static void read_or_write_in_line(struct world *w, struct prng *prng, unsigned number)
{
    struct line *l = w->state;

    (void)prng;
    if (l->reads[number]) {
        co_rwlock_read(&l->rwlock);
        l->first_reader[number] = atomic_get(&l->granted);
        co_rwlock_read_done(&l->rwlock);
    } else {
        co_rwlock_write(&l->rwlock);
        l->order[atomic_add(&l->granted, 1u)] = number;
        co_rwlock_write_done(&l->rwlock);
    }
}

static void rwlock_fifo_body(struct world *w)
{
    struct prng prng = {.state = w->seed};
    struct line l = {.granted = 0};
    struct visit visits[ACTORS];
    struct co_scope s;
    unsigned writers = 0;

    co_rwlock_init(&l.rwlock);
    w->state = &l;
    co_scope_init(&s);
    co_rwlock_read(&l.rwlock);
    for (unsigned i = 0; i < ACTORS; i++) {
        l.reads[i] = i > 0 && prng_chance(&prng, 500);
        visits[i] = (struct visit){w, i, read_or_write_in_line};
        check(co_scope_start(&s, visit_from_here, &visits[i]) == 0);
        while (queue_length(&l.rwlock.lock, &l.rwlock.queue) <= i)
            co_sleep_until(loop_clock() + 10000);
    }
    co_rwlock_read_done(&l.rwlock);
    co_scope_join(&s);
    for (unsigned i = 0; i < ACTORS; i++) {
        if (l.reads[i])
            check(l.first_reader[i] == writers);
        else
            check(l.order[writers++] == i);
    }
}

static void test_loop_schedule__rwlock_is_granted_in_order(void **state)
{
    (void)state;
    TEST_SEEDS (seed)
        run_in_sim(seed, rwlock_fifo_body);
}

/* ---- messages of one sender arrive in order, each once ---- */

#define LETTERS 40

struct letter {
    struct loop_message message;
    struct post *post;
    unsigned sender;
    unsigned number;
};

struct post {
    struct letter letters[ACTORS][LETTERS];
    unsigned next[ACTORS]; /* touched on the receiver's loop only */
    unsigned arrived;      /* atomic */
};

static void letter_arrived(struct loop_message *m)
{
    const struct letter *l = container_of(m, struct letter, message);

    check(l->post->next[l->sender]++ == l->number);
    atomic_add(&l->post->arrived, 1u);
}

static void send_letters(struct world *w, struct prng *prng, unsigned number)
{
    struct post *p = w->state;
    struct loop *to = loop_thread_loop(w->threads[(number + number / LOOPS) % LOOPS]);

    for (unsigned i = 0; i < LETTERS; i++) {
        struct letter *l = &p->letters[number][i];

        *l =
            (struct letter){.message.fn = letter_arrived, .post = p, .sender = number, .number = i};
        loop_post(to, &l->message);
        if (prng_chance(prng, 300))
            nap(w, prng);
    }
}

static void post_body(struct world *w)
{
    struct post *p = xnew(struct post);

    w->state = p;
    visit_all(w, ACTORS, send_letters);
    while (atomic_get(&p->arrived) < ACTORS * LETTERS)
        co_sleep_until(loop_clock() + 10000);
    free(p);
}

static void test_loop_schedule__messages_arrive_once_and_in_order(void **state)
{
    (void)state;
    TEST_SEEDS (seed)
        run_in_sim(seed, post_body);
}

static void test_loop_schedule__messages_arrive_once_and_in_order_on_threads(void **state)
{
    (void)state;
    run_on_threads(post_body);
}

/* ---- cancelling a scope reaches all that waits below it ---- */

struct tree {
    struct world *world;
    struct prng prng;
    unsigned depth;
    struct tokens *never; /* nobody gives any */
    struct co_mutex *held;
    unsigned *waiting; /* atomic: leaves that wait */
    unsigned *cancelled;
};

static void grow(void *arg);

static void leaf(struct tree *t)
{
    int r;

    atomic_add(t->waiting, 1u);
    switch (prng_below(&t->prng, 3)) {
    case 0:
        r = co_sleep_until(LOOP_FOREVER);
        break;
    case 1:
        r = take_token(t->never, LOOP_FOREVER);
        break;
    default:
        r = co_mutex_lock_until(t->held, LOOP_FOREVER);
        break;
    }
    check(r == -ECANCELED && co_cancelled() == -ECANCELED);
    atomic_add(t->cancelled, 1u);
    co_shield_begin(); /* clean-up may still wait */
    check(co_sleep_until(loop_clock() + 1000) == 0);
    co_shield_end();
}

static void grow_there(void *arg)
{
    const struct tree *t = arg;
    unsigned where = (unsigned)(t->prng.state >> 7) % LOOPS;

    check(loop_co_call(loop_thread_loop(t->world->threads[where]), grow, arg) == 0);
}

static void grow(void *arg)
{
    struct tree *t = arg;
    struct tree below[3];
    struct co_scope s;

    if (t->depth == 0) {
        leaf(t);
        return;
    }
    co_scope_init(&s);
    for (unsigned i = 0; i < ARRAY_SIZE(below); i++) {
        int r;

        below[i] = *t;
        below[i].depth--;
        below[i].prng.state = prng_next(&t->prng);
        r = co_scope_start(&s, prng_chance(&t->prng, 500) ? grow_there : grow, &below[i]);
        check(r == 0 || r == -ECANCELED);
    }
    co_scope_join(&s);
}

static void cancel_body(struct world *w)
{
    struct tokens never = {.count = 0};
    struct co_mutex held;
    unsigned waiting = 0;
    unsigned cancelled = 0;
    struct prng prng = {.state = w->seed};
    bool early = prng_chance(&prng, 500);
    struct tree root = {
        .world = w,
        .prng = prng,
        .depth = 3,
        .never = &never,
        .held = &held,
        .waiting = &waiting,
        .cancelled = &cancelled,
    };
    struct co_scope s;

    wait_queue_init(&never.queue);
    co_mutex_init(&held);
    co_mutex_lock(&held);
    co_scope_init(&s);
    check(co_scope_start(&s, grow, &root) == 0);
    if (early)
        nap(w, &prng);
    else
        while (atomic_get(&waiting) < 27)
            co_sleep_until(loop_clock() + 10000);
    co_scope_cancel(&s);
    co_scope_join(&s);
    check(cancelled == waiting && (early || cancelled == 27));
    check(list_empty(&never.queue.waiters) && list_empty(&held.queue.waiters));
}

static void test_loop_schedule__cancelling_reaches_all_below(void **state)
{
    (void)state;
    TEST_SEEDS (seed)
        run_in_sim(seed, cancel_body);
}

static void test_loop_schedule__cancelling_reaches_all_below_on_threads(void **state)
{
    (void)state;
    run_on_threads(cancel_body);
}

/* ---- wakes and cancellations that meet: nothing is lost between them ---- */

static void take_until_cancelled(void *arg)
{
    struct tokens *t = arg;

    while (take_token(t, LOOP_FOREVER) == 0)
        ;
}

static void take_and_cancel(struct world *w, struct prng *prng, unsigned number)
{
    (void)number;
    for (unsigned i = 0; i < 10; i++) {
        struct co_scope s;

        co_scope_init(&s);
        co_scope_start(&s, take_until_cancelled, w->state);
        co_scope_start(&s, take_until_cancelled, w->state);
        nap(w, prng);
        co_scope_cancel(&s);
        co_scope_join(&s);
    }
}

static void give_or_cancel(struct world *w, struct prng *prng, unsigned number)
{
    if (number % 3)
        take_and_cancel(w, prng, number);
    else
        give_some(w, prng, number);
}

static void cancel_meets_wake_body(struct world *w)
{
    struct tokens t = {.count = 0};

    wait_queue_init(&t.queue);
    w->state = &t;
    visit_all(w, ACTORS, give_or_cancel);
    check(t.given == t.taken + t.count && list_empty(&t.queue.waiters));
}

static void test_loop_schedule__cancelled_waiter_consumes_no_wake(void **state)
{
    (void)state;
    TEST_SEEDS (seed)
        run_in_sim(seed, cancel_meets_wake_body);
}

static void test_loop_schedule__cancelled_waiter_consumes_no_wake_on_threads(void **state)
{
    (void)state;
    run_on_threads(cancel_meets_wake_body);
}

/* ---- the same again, twice (S4) ---- */

static void test_loop_schedule__same_seed_gives_the_same_trace(void **state)
{
    (void)state;
    TEST_SEEDS (seed) {
        uint64_t first;
        void *moved;

        run_in_sim(seed, token_body);
        first = sim_trace_hash();
        moved = malloc(777);
        run_in_sim(seed, token_body);
        free(moved);
        assert_true(sim_trace_hash() == first);
    }
}
