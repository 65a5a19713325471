/* SPDX-License-Identifier: Apache-2.0 */
/* The gate by itself (graph/gate.h): counting, closing, draining, parking; under sim by seed, and on real threads. */
#include "base/atomic.h"
#include "graph-fixture.h"
#include "graph/gate.h"
#include "loop/sim/sim.h"
#include "seeds.h"

#include <errno.h>

#define LOOPS 3

/* A gate and some threads besides the control thread. */
struct world {
    struct gate gate;
    struct loop_thread *threads[LOOPS];
    uint64_t seed;
};

static void world_init(struct world *w)
{
    static const char *const names[LOOPS] = {"io0", "io1", "io2"};

    gate_init(&w->gate);
    for (unsigned i = 0; i < LOOPS; i++) {
        struct error *err = NULL;

        assert_int_equal(loop_thread_start(&w->threads[i], names[i], &err), 0);
    }
}

/* The gate is open, or closed and drained. */
static void world_release(struct world *w)
{
    struct error *err = NULL;

    if (!gate_is_closed(&w->gate))
        gate_close(&w->gate);
    assert_int_equal(gate_co_drained(&w->gate, "test", LOOP_FOREVER, &err), 0);
    gate_co_release(&w->gate);
    for (unsigned i = 0; i < LOOPS; i++)
        w->threads[i] = loop_thread_stop(w->threads[i]);
}

/* Under sim by seed, then once on each real engine. */
static void everywhere(co_entry_fn *body)
{
    struct world w;

    TEST_SEEDS (seed) {
        struct sim_options o;

        w.seed = seed;
        sim_options_init(&o, seed);
        assert_int_equal(sim_run(&o, body, &w), SIM_RETURNED);
    }
    on_both(body, &w);
}

/* One request of a test's. */
struct visitor {
    struct world *world;
    struct loop *loop;
    co_entry_fn *fn;
    uint64_t stay_ns;
    int result; /* of gate_enter(); 1: not yet */
    unsigned order;
    unsigned *next_order;
    uint64_t entered_ns;
};

static void visit(void *arg)
{
    struct visitor *v = arg;
    struct gate_slot *slot;
    struct pass pass = {.kind = REQUEST_WRITE};
    int r;

    v->result = 1;
    r = gate_attach(&v->world->gate, &slot);
    if (r == 0)
        r = gate_enter(slot, &pass);
    v->result = r;
    if (r < 0)
        return;
    v->entered_ns = loop_clock();
    if (v->next_order)
        v->order = (*v->next_order)++;
    co_sleep_until(loop_clock() + v->stay_ns);
    gate_leave(slot, &pass);
}

/* Runs a visitor on its own loop. */
static void visit_there(void *arg)
{
    struct visitor *v = arg;

    if (loop_co_call(v->loop, v->fn ? v->fn : visit, v) < 0)
        v->result = -ENOMEM;
}

/* ---- open, closed ---- */

static void pass_through_open(void *arg)
{
    struct world *w = arg;
    struct visitor v = {.world = w, .stay_ns = 2 * NS_PER_MS};
    struct gate_picture picture;
    struct co_scope scope;

    world_init(w);
    co_scope_init(&scope);
    assert_int_equal(co_scope_start(&scope, visit, &v), 0);
    assert_int_equal(v.result, 0); /* at once */
    gate_picture(&w->gate, &picture);
    assert_int_equal(picture.inside, 1);
    assert_int_equal(picture.queued, 0);
    assert_true(picture.oldest_ns > 0 && picture.oldest_ns <= loop_clock());
    co_scope_join(&scope);
    gate_picture(&w->gate, &picture);
    assert_int_equal(picture.inside, 0);
    assert_int_equal(picture.oldest_ns, 0);
    world_release(w);
}

static void test_gate__open_lets_in_and_counts(void **state)
{
    (void)state;
    everywhere(pass_through_open);
}

static void queue_up(void *arg)
{
    struct world *w = arg;
    struct visitor v[8];
    struct gate_picture picture;
    struct error *err = NULL;
    struct co_scope scope;
    unsigned order = 0;

    world_init(w);
    co_scope_init(&scope);
    v[0] = (struct visitor){.world = w};
    assert_int_equal(co_scope_start(&scope, visit, &v[0]), 0); /* attaches this loop */
    co_scope_join(&scope);
    gate_close(&w->gate);
    assert_int_equal(gate_co_drained(&w->gate, "test", LOOP_FOREVER, &err), 0);
    for (unsigned i = 0; i < ARRAY_SIZE(v); i++) {
        v[i] = (struct visitor){.world = w, .next_order = &order, .stay_ns = NS_PER_MS};
        assert_int_equal(co_scope_start(&scope, visit, &v[i]), 0);
    }
    co_sleep_until(loop_clock() + 2 * NS_PER_MS);
    gate_picture(&w->gate, &picture);
    assert_int_equal(picture.inside, 0);
    assert_int_equal(picture.queued, ARRAY_SIZE(v));
    gate_open(&w->gate);
    co_scope_join(&scope);
    for (unsigned i = 0; i < ARRAY_SIZE(v); i++) {
        assert_int_equal(v[i].result, 0);
        if (!w->seed) /* sim shuffles who runs first of those that were let in */
            assert_int_equal(v[i].order, i);
    }
    world_release(w);
}

static void test_gate__closed_queues_and_opening_lets_all_in(void **state)
{
    struct world w = {.seed = 0};

    (void)state;
    everywhere(queue_up);
    on_both(queue_up, &w);
}

/* The gate closes again as soon as it has opened: those who waited are inside, and counted. */
static void close_right_after_opening(void *arg)
{
    struct world *w = arg;
    struct visitor v = {.world = w, .stay_ns = 5 * NS_PER_MS, .loop = NULL};
    struct visitor first = {.world = w};
    struct error *err = NULL;
    struct co_scope scope;

    world_init(w);
    co_scope_init(&scope);
    first.loop = v.loop = loop_thread_loop(w->threads[0]);
    visit_there(&first);
    gate_close(&w->gate);
    assert_int_equal(co_scope_start(&scope, visit_there, &v), 0);
    assert_int_equal(gate_co_drained(&w->gate, "test", LOOP_FOREVER, &err), 0);
    co_sleep_until(loop_clock() + 2 * NS_PER_MS);
    gate_open(&w->gate);
    gate_close(&w->gate);
    assert_int_equal(gate_co_drained(&w->gate, "test", LOOP_FOREVER, &err), 0);
    if (v.result == 0) { /* it was let in for the moment: then it has had its time */
        assert_true(loop_clock() >= v.entered_ns + v.stay_ns);
    }
    gate_open(&w->gate);
    co_scope_join(&scope);
    assert_int_equal(v.result, 0);
    world_release(w);
}

static void test_gate__who_was_let_in_is_drained_by_the_next_close(void **state)
{
    (void)state;
    everywhere(close_right_after_opening);
}

/* ---- draining ---- */

static void drain_waits(void *arg)
{
    struct world *w = arg;
    struct visitor v[LOOPS];
    struct error *err = NULL;
    struct co_scope scope;
    uint64_t drained_ns;

    world_init(w);
    co_scope_init(&scope);
    for (unsigned i = 0; i < LOOPS; i++) {
        v[i] = (struct visitor){.world = w,
                                .loop = loop_thread_loop(w->threads[i]),
                                .result = 1,
                                .stay_ns = (300 + i) *
                                           NS_PER_MS}; /* all meet inside, on a busy machine too */
        assert_int_equal(co_scope_start(&scope, visit_there, &v[i]), 0);
    }
    for (unsigned inside = 0; inside < LOOPS;) {
        struct gate_picture picture;

        co_yield ();
        gate_picture(&w->gate, &picture);
        inside = picture.inside;
    }
    gate_close(&w->gate);
    assert_int_equal(gate_co_drained(&w->gate, "test", LOOP_FOREVER, &err), 0);
    drained_ns = loop_clock();
    co_scope_join(&scope);
    for (unsigned i = 0; i < LOOPS; i++)
        assert_true(drained_ns >= v[i].entered_ns + v[i].stay_ns);
    world_release(w);
}

static void test_gate__drain_waits_for_all_inside(void **state)
{
    (void)state;
    everywhere(drain_waits);
}

static void drain_in_vain(void *arg)
{
    struct world *w = arg;
    struct visitor v = {.world = w, .stay_ns = 60 * NS_PER_MS};
    struct error *err = NULL;
    struct co_scope scope;

    world_init(w);
    co_scope_init(&scope);
    assert_int_equal(co_scope_start(&scope, visit, &v), 0);
    co_sleep_until(loop_clock() + 10 * NS_PER_MS);
    gate_close(&w->gate);
    assert_int_equal(gate_co_drained(&w->gate, "export 'e'", loop_clock() + 10 * NS_PER_MS, &err),
                     -ETIMEDOUT);
    must_say(err, "export 'e'");
    must_say(err, "1 request");
    must_say(err, "in flight");
    error_free(&err);
    assert_true(gate_is_closed(&w->gate));
    gate_open(&w->gate); /* the change is given up */
    co_scope_join(&scope);
    world_release(w);
}

static void test_gate__drain_ends_at_its_deadline_and_says_what_is_left(void **state)
{
    (void)state;
    everywhere(drain_in_vain);
}

static uint32_t hogging; /* atomic: the loop looks up no more */

/* Keeps its loop from doing anything else. */
static void hog(void *arg)
{
    struct visitor *v = arg;
    struct gate_slot *slot;

    v->result = gate_attach(&v->world->gate, &slot);
    if (v->result == 0)
        co_yield ();
    atomic_set(&hogging, 1u);
    for (uint64_t until = loop_clock() + v->stay_ns; loop_clock() < until;)
        ;
}

static void silent_loop(void *arg)
{
    struct world *w = arg;
    struct visitor v = {.world = w, .fn = hog, .stay_ns = 1200 * NS_PER_MS, .result = 1};
    struct visitor attach = {.world = w};
    struct error *err = NULL;
    struct co_scope scope;

    atomic_set(&hogging, 0u);
    world_init(w);
    co_scope_init(&scope);
    attach.loop = v.loop = loop_thread_loop(w->threads[1]);
    visit_there(&attach);
    assert_int_equal(co_scope_start(&scope, visit_there, &v), 0);
    while (!atomic_get(&hogging))
        co_sleep_until(loop_clock() + NS_PER_MS);
    gate_close(&w->gate);
    assert_int_equal(gate_co_drained(&w->gate, "test", loop_clock() + 700 * NS_PER_MS, &err),
                     -ETIMEDOUT); /* on a busy machine the others may be late, too */
    must_say(err, "io1");
    must_say(err, "has not answered");
    error_free(&err);
    co_scope_join(&scope);
    assert_int_equal(gate_co_drained(&w->gate, "test", LOOP_FOREVER, &err), 0);
    world_release(w);
}

static void test_gate__silent_loop_is_named(void **state)
{
    struct world w;

    (void)state;
    on_both(silent_loop, &w); /* a loop that never looks up cannot be simulated */
}

/* ---- G4 ---- */

static void born_closed(void *arg)
{
    struct world *w = arg;
    struct visitor v = {.world = w, .result = 1};
    struct gate_picture picture;
    struct error *err = NULL;
    struct co_scope scope;

    world_init(w);
    co_scope_init(&scope);
    gate_close(&w->gate); /* no loop knows of it */
    assert_int_equal(gate_co_drained(&w->gate, "test", LOOP_FOREVER, &err), 0);
    v.loop = loop_thread_loop(w->threads[2]);
    assert_int_equal(co_scope_start(&scope, visit_there, &v), 0);
    co_sleep_until(loop_clock() + 5 * NS_PER_MS);
    assert_int_equal(v.result, 1);
    gate_picture(&w->gate, &picture);
    assert_int_equal(picture.inside, 0);
    assert_int_equal(picture.queued, 1);
    gate_open(&w->gate);
    co_scope_join(&scope);
    assert_int_equal(v.result, 0);
    world_release(w);
}

static void test_gate__slot_made_below_a_closed_gate_is_born_closed(void **state)
{
    (void)state;
    everywhere(born_closed);
}

/* ---- leaving the queue ---- */

static void give_up(void *arg)
{
    struct world *w = arg;
    struct visitor v = {.world = w};
    struct visitor stays = {.world = w};
    struct gate_picture picture;
    struct error *err = NULL;
    struct co_scope scope;
    struct co_scope other;

    world_init(w);
    co_scope_init(&scope);
    co_scope_init(&other);
    gate_close(&w->gate);
    assert_int_equal(co_scope_start(&scope, visit, &v), 0);
    assert_int_equal(co_scope_start(&other, visit, &stays), 0);
    co_sleep_until(loop_clock() + NS_PER_MS);
    co_scope_cancel(&scope);
    co_scope_join(&scope);
    assert_int_equal(v.result, -ECANCELED);
    gate_picture(&w->gate, &picture);
    assert_int_equal(picture.queued, 1);
    assert_int_equal(picture.inside, 0);
    assert_int_equal(gate_co_drained(&w->gate, "test", LOOP_FOREVER, &err), 0);
    gate_open(&w->gate);
    co_scope_join(&other);
    assert_int_equal(stays.result, 0);
    world_release(w);
}

static void test_gate__cancelled_while_queued_leaves_no_trace(void **state)
{
    (void)state;
    everywhere(give_up);
}

/* ---- parking (G6) ---- */

struct parker {
    struct visitor v;
    int parked; /* what gate_park() said */
    uint64_t deadline_ns;
};

static void park(void *arg)
{
    struct parker *p = container_of(arg, struct parker, v);
    struct gate_slot *slot;
    struct pass pass = {.kind = REQUEST_READ};

    p->parked = 1;
    p->v.result = gate_attach(&p->v.world->gate, &slot);
    if (p->v.result == 0)
        p->v.result = gate_enter(slot, &pass);
    if (p->v.result < 0)
        return;
    p->parked = gate_park_until(&pass, p->deadline_ns);
    if (p->parked == -ERESTART)
        p->v.result = gate_step_back(slot, &pass);
    if (p->v.result < 0)
        return;
    p->v.order = (*p->v.next_order)++;
    gate_leave(slot, &pass);
}

static void park_and_close(void *arg)
{
    struct world *w = arg;
    struct parker p = {.deadline_ns = LOOP_FOREVER};
    struct visitor later = {.world = w};
    struct error *err = NULL;
    struct co_scope scope;
    unsigned order = 0;

    world_init(w);
    co_scope_init(&scope);
    p.v = (struct visitor){.world = w, .next_order = &order};
    later.next_order = &order;
    assert_int_equal(co_scope_start(&scope, park, &p.v), 0);
    assert_int_equal(p.parked, 1);
    gate_close(&w->gate);
    /* The drain does not wait for what the parked one waits for. */
    assert_int_equal(gate_co_drained(&w->gate, "test", LOOP_FOREVER, &err), 0);
    assert_int_equal(p.parked, -ERESTART);
    assert_int_equal(co_scope_start(&scope, visit, &later), 0);
    gate_open(&w->gate);
    co_scope_join(&scope);
    assert_int_equal(p.v.result, 0);
    assert_int_equal(later.result, 0);
    if (!w->seed)
        assert_true(p.v.order < later.order); /* it came first */
    world_release(w);
}

static void test_gate__parked_one_steps_back_for_a_drain_and_keeps_its_place(void **state)
{
    struct world w = {.seed = 0};

    (void)state;
    everywhere(park_and_close);
    on_both(park_and_close, &w);
}

static void park_until_deadline(void *arg)
{
    struct world *w = arg;
    struct parker p = {.deadline_ns = loop_clock() + 3 * NS_PER_MS};
    unsigned order = 0;

    world_init(w);
    p.v = (struct visitor){.world = w, .next_order = &order};
    park(&p.v);
    assert_int_equal(p.parked, 0);
    assert_true(loop_clock() >= p.deadline_ns);
    world_release(w);
}

static void test_gate__parked_one_goes_on_at_its_deadline(void **state)
{
    (void)state;
    everywhere(park_until_deadline);
}

/* ---- many of everything ---- */

#define CROWD  12
#define CLOSES 20

struct crowd {
    struct world *world;
    unsigned inside; /* atomic */
    unsigned broken; /* atomic: passes while nobody should have been in */
    bool shut;       /* atomic: drained and not opened again */
    bool stop;       /* atomic */
    unsigned visits; /* atomic */
};

struct member {
    struct visitor v;
    struct crowd *crowd;
    unsigned number;
};

static void come_and_go(void *arg)
{
    struct member *m = container_of(arg, struct member, v);
    struct crowd *c = m->crowd;
    struct prng prng = {.state = m->v.world->seed * CROWD + m->number};
    struct gate_slot *slot;

    m->v.result = gate_attach(&m->v.world->gate, &slot);
    while (m->v.result == 0 && !atomic_get(&c->stop)) {
        struct pass pass = {.kind = REQUEST_READ};

        m->v.result = gate_enter(slot, &pass);
        if (m->v.result < 0)
            break;
        atomic_add(&c->inside, 1u);
        if (atomic_get(&c->shut))
            atomic_add(&c->broken, 1u);
        for (uint64_t n = prng_below(&prng, 4); n; n--)
            co_yield ();
        if (atomic_get(&c->shut))
            atomic_add(&c->broken, 1u);
        atomic_sub(&c->inside, 1u);
        atomic_add(&c->visits, 1u);
        gate_leave(slot, &pass);
        if (prng_chance(&prng, 300))
            co_sleep_until(loop_clock() + prng_below(&prng, 50) * NS_PER_US);
        else
            co_yield ();
    }
}

static void open_and_close(void *arg)
{
    struct world *w = arg;
    struct crowd crowd = {.world = w};
    struct member members[CROWD];
    struct prng prng = {.state = w->seed};
    struct co_scope scope;

    world_init(w);
    co_scope_init(&scope);
    for (unsigned i = 0; i < CROWD; i++) {
        unsigned where = i % (LOOPS + 1);

        members[i] = (struct member){.crowd = &crowd, .number = i};
        members[i].v.world = w;
        members[i].v.fn = come_and_go;
        members[i].v.loop = where == LOOPS ? loop_self() : loop_thread_loop(w->threads[where]);
        assert_int_equal(co_scope_start(&scope, visit_there, &members[i].v), 0);
    }
    for (unsigned i = 0; i < CLOSES; i++) {
        struct error *err = NULL;

        gate_close(&w->gate);
        assert_int_equal(gate_co_drained(&w->gate, "test", LOOP_FOREVER, &err), 0);
        atomic_set(&crowd.shut, true);
        assert_int_equal(atomic_get(&crowd.inside), 0);
        co_sleep_until(loop_clock() + prng_below(&prng, 100) * NS_PER_US);
        assert_int_equal(atomic_get(&crowd.inside), 0);
        atomic_set(&crowd.shut, false);
        gate_open(&w->gate);
        if (prng_chance(&prng, 700))
            co_sleep_until(loop_clock() + prng_below(&prng, 200) * NS_PER_US);
    }
    atomic_set(&crowd.stop, true);
    co_scope_join(&scope);
    assert_int_equal(crowd.broken, 0);
    assert_true(crowd.visits > 0);
    for (unsigned i = 0; i < CROWD; i++)
        assert_int_equal(members[i].v.result, 0);
    world_release(w);
}

static void test_gate__nobody_is_inside_between_drained_and_open(void **state)
{
    (void)state;
    everywhere(open_and_close);
}

/* The messages of a gate are its own memory: none may be under way when it goes. */
static void make_and_free(void *arg)
{
    struct world *w = arg;
    struct visitor v[LOOPS];

    world_init(w);
    for (unsigned round = 0; round < 10; round++) {
        struct error *err = NULL;

        if (round)
            gate_init(&w->gate);
        for (unsigned i = 0; i < LOOPS; i++) {
            v[i] = (struct visitor){.world = w, .loop = loop_thread_loop(w->threads[i])};
            visit_there(&v[i]);
            assert_int_equal(v[i].result, 0);
        }
        gate_close(&w->gate);
        assert_int_equal(gate_co_drained(&w->gate, "test", LOOP_FOREVER, &err), 0);
        if (round < 9)
            gate_co_release(&w->gate);
    }
    world_release(w);
}

static void test_gate__release_waits_for_its_messages(void **state)
{
    (void)state;
    everywhere(make_and_free);
}
