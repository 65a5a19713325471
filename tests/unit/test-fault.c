/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Breakpoints (filters/fault): requests that are held at events of a format, resumed, drained and cancelled; and what they are
 * for: requests of one image in an order that the test chooses, where Q1 and Q2 must hold.
 *
 *     backend -> qcow2 -> fault -> file
 */
#include "base/atomic.h"
#include "filters/fault/fault.h"
#include "filters/list.h"
#include "formats/list.h"
#include "graph/change.h"
#include "graph/reshape.h"
#include "protocols/list.h"
#include "qcow2-fixture.h"
#include "seeds.h"

#define CLUSTER ((uint64_t)4096)
#define TOP     "/disk/top"
#define BASE    "/disk/base"
#define LOOPS   3

static const struct driver *const *const drivers[] = {protocol_drivers, format_drivers,
                                                      filter_drivers, NULL};

struct world {
    struct sim_disk *disk;
    struct qcow2_shape shape;
    bool has_base;
    uint64_t seed;
    void (*body)(struct world *w);
    struct graph *graph;
    struct node *fault;
    struct backend *backend;
    struct co_scope scope;
    struct loop_thread *threads[LOOPS];
};

/* A request that nobody waits for. */
struct ask {
    struct backend *backend;
    enum request_kind kind;
    uint64_t offset;
    uint64_t len;
    uint8_t data[2 * CLUSTER];
    int result; /* 1: it has not ended */
};

static void run_ask(void *arg)
{
    struct ask *a = arg;
    bool has_data = a->kind == REQUEST_READ || a->kind == REQUEST_WRITE;

    a->result = send_request(a->backend, a->kind, 0, a->offset, a->len, has_data ? a->data : NULL);
}

static void start(struct world *w, struct ask *a, enum request_kind kind, uint64_t offset,
                  uint64_t len, uint8_t fill)
{
    *a = (struct ask){
        .backend = w->backend, .kind = kind, .offset = offset, .len = len, .result = 1};
    memset(a->data, fill, sizeof(a->data));
    assert_int_equal(co_scope_start(&w->scope, run_ask, a), 0);
}

static void pass_time(uint64_t ns)
{
    (void)co_sleep_until(loop_clock() + ns);
}

/* Until the request is held: the disk has its time. */
static void until_held(struct world *w, const char *tag)
{
    for (unsigned i = 0; !fault_holds(w->fault, tag); i++) {
        assert_true(i < 1000);
        pass_time(NS_PER_MS);
    }
}

static void must_break(struct world *w, const char *event, const char *tag)
{
    assert_int_not_equal(event_from_name(event), EVENT_NONE);
    assert_int_equal(fault_break(w->fault, event_from_name(event), tag), 0);
}

static void must_write(struct world *w, uint64_t offset, uint64_t len, uint8_t fill)
{
    uint8_t *data = xalloc(1, len);

    memset(data, fill, len);
    assert_int_equal(write_at(w->backend, offset, len, data), 0);
    free(data);
}

static void must_read(struct world *w, uint64_t offset, uint64_t len, uint8_t fill)
{
    uint8_t *data = xalloc(1, len);

    assert_int_equal(read_at(w->backend, offset, len, data), 0);
    for (uint64_t i = 0; i < len; i++)
        assert_int_equal(data[i], fill);
    free(data);
}

static void run_world(void *arg)
{
    struct world *w = arg;

    w->graph = graph_new(drivers);
    if (w->has_base)
        add_layer(w->graph, "base", BASE, NULL, true);
    must_add(w->graph, "{'driver':'fault','node-name':'fault','discard':'unmap',"
                       "'image':{'driver':'file','filename':'" TOP "'}}");
    must_add(w->graph,
             "{'driver':'qcow2','node-name':'top','discard':'unmap','file':'fault','backing':%s}",
             w->has_base ? "'base'" : "null");
    w->fault = fault_find(graph_find(w->graph, "top"));
    assert_ptr_equal(w->fault, graph_find(w->graph, "fault"));
    w->backend = must_attach(w->graph, "top", ACCESS_RW, "guest");
    co_scope_init(&w->scope);
    w->body(w);
    co_scope_join(&w->scope);
    w->backend = backend_co_free(w->backend);
    graph_co_free(w->graph);
    for (unsigned i = 0; i < LOOPS; i++)
        w->threads[i] = w->threads[i] ? loop_thread_stop(w->threads[i]) : NULL;
}

static void run_it(struct world *w)
{
    struct qcow2_verdict v;

    w->disk = sim_disk_new();
    w->shape.version = 3;
    w->shape.cluster_bits = 12;
    w->shape.refcount_order = 4;
    w->shape.size = 1024 * CLUSTER;
    if (w->has_base) {
        struct qcow2_shape below = w->shape;

        below.allocated = 1024;
        image_make(w->disk, BASE, &below);
        w->shape.backing = BASE;
    }
    image_make(w->disk, TOP, &w->shape);
    assert_int_equal(run_on(w->disk, w->seed, run_world, w), SIM_RETURNED);
    image_judge(w->disk, TOP, NO_LEAKS, &v);
    sim_disk_free(w->disk);
}

static void in_world(void (*body)(struct world *w))
{
    struct world w = {.body = body, .seed = 1};

    run_it(&w);
}

/* ---- breakpoints ---- */

static void hold_and_resume(struct world *w)
{
    struct ask a;
    struct ask b;

    must_break(w, "write_aio", "A");
    assert_true(fault_waits(w->fault, "A"));
    assert_int_equal(fault_resume(w->fault, "A"), -ENOENT);
    start(w, &a, REQUEST_WRITE, 0, CLUSTER, 0x11);
    until_held(w, "A");
    assert_false(fault_waits(w->fault, "A"));
    start(w, &b, REQUEST_WRITE, 8 * CLUSTER, CLUSTER, 0x22); /* it is used up */
    pass_time(NS_PER_S);
    assert_int_equal(a.result, 1);
    assert_int_equal(b.result, 0);
    assert_int_equal(fault_resume(w->fault, "B"), -ENOENT);
    assert_int_equal(fault_resume(w->fault, "A"), 0);
    co_scope_join(&w->scope);
    assert_int_equal(a.result, 0);
    assert_int_equal(fault_resume(w->fault, "A"), -ENOENT);
    must_read(w, 0, CLUSTER, 0x11);
}

static void test_fault__a_request_is_held_until_it_is_resumed(void **state)
{
    (void)state;
    in_world(hold_and_resume);
}

static void hold_twice(struct world *w)
{
    struct ask a;

    must_write(w, CLUSTER, CLUSTER, 0); /* space is made ready by flushes */
    must_break(w, "write_aio", "A");
    must_break(w, "write_aio", "B");
    must_break(w, "flush_to_disk", "C");
    start(w, &a, REQUEST_WRITE, 0, CLUSTER, 0x11);
    until_held(w, "A");
    assert_true(fault_holds(w->fault, "B"));
    assert_false(fault_holds(w->fault, "C"));
    assert_int_equal(fault_resume(w->fault, "A"), 0);
    pass_time(NS_PER_S);
    assert_int_equal(a.result, 1);
    assert_int_equal(fault_resume(w->fault, "B"), 0);
    co_scope_join(&w->scope);
    assert_int_equal(a.result, 0);
    assert_int_equal(fault_remove(w->fault, "C"), 0);
    assert_int_equal(flush(w->backend), 0);
}

static void test_fault__each_breakpoint_must_let_go(void **state)
{
    (void)state;
    in_world(hold_twice);
}

static void remove_some(struct world *w)
{
    struct ask a;
    struct ask b;

    must_break(w, "write_aio", "A");
    must_break(w, "write_aio", "A");
    assert_int_equal(fault_remove(w->fault, "A"), 0);
    assert_int_equal(fault_remove(w->fault, "A"), -ENOENT);
    must_write(w, 0, CLUSTER, 0x33); /* nothing holds it */

    must_break(w, "write_aio", "A");
    start(w, &a, REQUEST_WRITE, 0, CLUSTER, 0x11);
    until_held(w, "A");
    must_break(w, "read_aio", "A");
    start(w, &b, REQUEST_READ, 0, CLUSTER, 0);
    pass_time(NS_PER_MS);
    assert_int_equal(fault_remove(w->fault, "A"), -ENOENT); /* all that was left holds something */
    co_scope_join(&w->scope);
    assert_int_equal(a.result, 0);
    assert_int_equal(b.result, 0);

    must_break(w, "write_aio", "A");
    must_break(w, "read_aio", "B");
    start(w, &a, REQUEST_WRITE, 0, CLUSTER, 0x11);
    until_held(w, "A");
    fault_resume_all(w->fault);
    co_scope_join(&w->scope);
    assert_int_equal(a.result, 0);
    must_read(w, 0, CLUSTER, 0x11);
}

static void test_fault__what_is_removed_holds_nothing(void **state)
{
    (void)state;
    in_world(remove_some);
}

/* Who is told, in which order; and one that must not be held. */
struct diary {
    char text[64];
    bool holds;
};

static bool may_hold(void *arg, const struct request *by)
{
    const struct diary *d = arg;

    assert_non_null(by->pass);
    return d->holds;
}

static void note_held(void *arg, const char *tag)
{
    struct diary *d = arg;

    strcat(d->text, "+");
    strcat(d->text, tag);
}

static void note_resumed(void *arg, const char *tag)
{
    struct diary *d = arg;

    strcat(d->text, "-");
    strcat(d->text, tag);
}

static void keep_diary(struct world *w)
{
    struct diary d = {.holds = true};
    struct fault_watcher watcher = {may_hold, note_held, note_resumed, &d};
    struct ask a;

    fault_watch(w->fault, &watcher);
    must_break(w, "write_aio", "A");
    must_break(w, "write_aio", "B");
    start(w, &a, REQUEST_WRITE, 0, CLUSTER, 0x11);
    until_held(w, "A");
    assert_int_equal(fault_resume(w->fault, "A"), 0);
    assert_int_equal(fault_resume(w->fault, "B"), 0);
    co_scope_join(&w->scope);
    assert_string_equal(d.text, "+B+A-A-B");
    d.text[0] = '\0';
    d.holds = false;
    must_break(w, "write_aio", "C");
    must_write(w, 0, CLUSTER, 0x11);
    assert_true(fault_waits(w->fault, "C"));
    d.holds = true;
    start(w, &a, REQUEST_WRITE, 0, CLUSTER, 0x11);
    until_held(w, "C");
    fault_resume_all(w->fault);
    co_scope_join(&w->scope);
    assert_string_equal(d.text, "+C-C");
}

static void test_fault__whoever_watches_is_told(void **state)
{
    (void)state;
    in_world(keep_diary);
}

static void let_all_go(void *arg, const char *tag)
{
    struct world *w = arg;

    (void)tag;
    fault_resume_all(w->fault);
}

/* As another thread may: between the breakpoint and the wait. */
static void let_go_before_it_waits(struct world *w)
{
    struct fault_watcher watcher = {NULL, let_all_go, NULL, w};
    uint64_t begun = loop_clock();
    struct ask a;

    fault_watch(w->fault, &watcher);
    must_break(w, "write_aio", "A");
    start(w, &a, REQUEST_WRITE, 0, CLUSTER, 0x11);
    co_scope_set_deadline(&w->scope, loop_clock() + NS_PER_S);
    co_scope_join(&w->scope);
    assert_int_equal(a.result, 0);
    assert_true(loop_clock() - begun < NS_PER_S);
    co_scope_init(&w->scope);
}

static void test_fault__nobody_waits_after_all_were_let_go(void **state)
{
    (void)state;
    in_world(let_go_before_it_waits);
}

/* ---- drains, cancellation, the end ---- */

static void resize_while_held(struct world *w)
{
    struct error *err = NULL;
    uint64_t begun = loop_clock();
    struct ask a;

    must_break(w, "write_aio", "A");
    must_break(w, "l2_update", "B"); /* comes while the gate is closed */
    start(w, &a, REQUEST_WRITE, 0, CLUSTER, 0x11);
    until_held(w, "A");
    assert_int_equal(graph_co_resize(w->graph, "top", 2048 * CLUSTER, &err), 0);
    assert_true(loop_clock() - begun < NS_PER_S);
    assert_false(fault_holds(w->fault, "A"));
    co_scope_join(&w->scope);
    assert_int_equal(a.result, 0);
    must_read(w, 0, CLUSTER, 0x11);
    fault_resume_all(w->fault);
}

static void test_fault__a_drain_does_not_wait_for_it(void **state)
{
    (void)state;
    in_world(resize_while_held);
}

static void cancel_while_held(struct world *w)
{
    struct ask a;

    must_break(w, "cow_read", "A");
    start(w, &a, REQUEST_WRITE, 512, 512, 0x11);
    until_held(w, "A");
    co_scope_cancel(&w->scope);
    co_scope_join(&w->scope);
    assert_int_equal(a.result, -ECANCELED);
    assert_false(fault_holds(w->fault, "A"));
    co_scope_init(&w->scope);
    must_write(w, 512, 512, 0x11); /* it has let go of everything */
    must_read(w, 512, 512, 0x11);
}

static void test_fault__a_cancelled_request_goes_on(void **state)
{
    struct world w = {.body = cancel_while_held, .seed = 1, .has_base = true};

    (void)state;
    run_it(&w);
}

static void free_while_held(struct world *w)
{
    uint64_t begun = loop_clock();
    struct ask a;

    graph_set_change_deadline(w->graph, NS_PER_S);
    must_break(w, "write_aio", "A");
    start(w, &a, REQUEST_WRITE, 0, CLUSTER, 0x11);
    until_held(w, "A");
    w->backend = backend_co_free(w->backend);
    assert_true(loop_clock() - begun < 5 * NS_PER_S);
    co_scope_join(&w->scope);
    assert_int_not_equal(a.result, 1);
    must_break(w, "l2_update", "A"); /* closing is not held */
    w->backend = must_attach(w->graph, "top", ACCESS_RW, "guest");
}

static void test_fault__the_end_is_bounded(void **state)
{
    (void)state;
    in_world(free_while_held);
}

/* ---- several loops ---- */

#define EACH 12

struct crowd {
    struct world *w;
    struct loop *loop;
    unsigned number;
    unsigned failed;
};

static void work(void *arg)
{
    struct crowd *c = arg;
    uint8_t data[CLUSTER] = {0};

    assert_int_equal(backend_attach(c->w->backend), 0);
    for (unsigned i = 0; i < EACH; i++) {
        (void)fault_resume(c->w->fault, "A"); /* of the other loop */
        c->failed += write_at(c->w->backend, (c->number * EACH + i) * CLUSTER, CLUSTER, data) < 0;
    }
}

static void call_work(void *arg)
{
    struct crowd *c = arg;

    assert_int_equal(loop_co_call(c->loop, work, c), 0);
}

/* Whoever comes first ends a wait: who resumes it, or a drain. */
static void resume_and_drain(struct world *w)
{
    struct prng prng = {.state = w->seed};
    struct crowd crowd[LOOPS];
    struct error *err = NULL;

    for (unsigned i = 0; i < LOOPS; i++) {
        assert_int_equal(loop_thread_start(&w->threads[i], "io", &err), 0);
        crowd[i] = (struct crowd){.w = w, .loop = loop_thread_loop(w->threads[i]), .number = i};
        assert_int_equal(co_scope_start(&w->scope, call_work, &crowd[i]), 0);
    }
    for (unsigned i = 0; w->scope.count; i++) {
        assert_true(i < 100000);
        switch (prng_below(&prng, 8)) {
        case 0:
            must_break(w, prng_chance(&prng, 500) ? "write_aio" : "cluster_alloc", "A");
            break;
        case 1:
            assert_int_equal(graph_co_resize(w->graph, "top", (1025 + i) * CLUSTER, &err), 0);
            break;
        case 2:
            (void)fault_remove(w->fault, "A");
            break;
        case 3:
            if (prng_chance(&prng, 200))
                fault_resume_all(w->fault);
            break;
        case 4:
            (void)fault_resume(w->fault, "A");
            break;
        default:
            pass_time(prng_below(&prng, 20) * NS_PER_US);
        }
    }
    for (unsigned i = 0; i < LOOPS; i++)
        assert_int_equal(crowd[i].failed, 0);
    assert_false(fault_holds(w->fault, "A"));
}

static void test_fault__a_wait_ends_once(void **state)
{
    (void)state;
    TEST_SEEDS (seed) {
        struct world w = {.body = resume_and_drain, .seed = seed};

        run_it(&w);
    }
}

/* On real threads the filter holds what comes to itself. */
static void resume_from_threads(void *arg)
{
    struct world w = {.graph = graph_new(drivers)};
    struct prng prng = {.state = 1};
    struct crowd crowd[LOOPS];
    struct error *err = NULL;

    (void)arg;
    must_add(w.graph, "{'driver':'fault','node-name':'fault',"
                      "'image':{'driver':'null-co','size':1073741824}}");
    w.fault = graph_find(w.graph, "fault");
    w.backend = must_attach(w.graph, "fault", ACCESS_RW, "guest");
    co_scope_init(&w.scope);
    for (unsigned i = 0; i < LOOPS; i++) {
        assert_int_equal(loop_thread_start(&w.threads[i], "io", &err), 0);
        crowd[i] = (struct crowd){.w = &w, .loop = loop_thread_loop(w.threads[i]), .number = i};
        assert_int_equal(co_scope_start(&w.scope, call_work, &crowd[i]), 0);
    }
    while (w.scope.count) {
        must_break(&w, prng_chance(&prng, 500) ? "pwritev" : "pwritev_done", "A");
        (void)fault_resume(w.fault, "A");
        if (prng_chance(&prng, 100))
            (void)fault_remove(w.fault, "A");
        co_yield ();
    }
    co_scope_join(&w.scope);
    fault_resume_all(w.fault);
    w.backend = backend_co_free(w.backend);
    graph_co_free(w.graph);
    for (unsigned i = 0; i < LOOPS; i++) {
        assert_int_equal(crowd[i].failed, 0);
        w.threads[i] = loop_thread_stop(w.threads[i]);
    }
}

static void test_fault__a_wait_ends_once_on_threads(void **state)
{
    (void)state;
    for (unsigned i = 0; i < 20; i++)
        on_both(resume_from_threads, NULL);
}

/* ---- what it is for ---- */

/* Q1: a reader has looked up where the data lies; the cluster is freed, and others want space. */
static void free_what_is_read(struct world *w)
{
    struct ask reader;
    struct ask discard;

    must_write(w, 0, CLUSTER, 0x11);
    assert_int_equal(flush(w->backend), 0);
    must_break(w, "read_aio", "R");
    start(w, &reader, REQUEST_READ, 0, CLUSTER, 0);
    until_held(w, "R");
    start(w, &discard, REQUEST_DISCARD, 0, CLUSTER, 0);
    for (uint64_t i = 1; i < 600; i++) { /* more than what was made ready at once */
        must_write(w, i * CLUSTER, CLUSTER, 0x33);
        if (i % 50 == 0)
            assert_int_equal(flush(w->backend), 0);
    }
    assert_int_equal(discard.result, 0);
    assert_int_equal(reader.result, 1);
    assert_int_equal(fault_resume(w->fault, "R"), 0);
    co_scope_join(&w->scope);
    assert_int_equal(reader.result, 0);
    for (uint64_t i = 0; i < CLUSTER; i++)
        assert_int_equal(reader.data[i], 0x11);
    must_read(w, 0, CLUSTER, 0);
}

static void test_fault__what_is_being_read_is_not_reused(void **state)
{
    (void)state;
    in_world(free_what_is_read);
}

/* Q1, Q2: the same with a writer, who would write into somebody else's data. */
static void free_what_is_written(struct world *w)
{
    struct ask writer;
    struct ask discard;

    must_write(w, 0, CLUSTER, 0x11);
    assert_int_equal(flush(w->backend), 0);
    must_break(w, "write_aio", "W");
    start(w, &writer, REQUEST_WRITE, 0, CLUSTER, 0x22);
    until_held(w, "W");
    start(w, &discard, REQUEST_DISCARD, 0, CLUSTER, 0);
    for (uint64_t i = 1; i < 600; i++) {
        must_write(w, i * CLUSTER, CLUSTER, 0x33);
        if (i % 50 == 0)
            assert_int_equal(flush(w->backend), 0);
    }
    assert_int_equal(discard.result, 0);
    assert_int_equal(writer.result, 1);
    assert_int_equal(fault_resume(w->fault, "W"), 0);
    co_scope_join(&w->scope);
    assert_int_equal(writer.result, 0);
    must_read(w, CLUSTER, 599 * CLUSTER, 0x33);
}

static void test_fault__what_is_being_written_is_not_reused(void **state)
{
    (void)state;
    in_world(free_what_is_written);
}

/* Q2: copy-on-write holds its range at each of its steps; a discard of the cluster comes after it. */
static void discard_while_copying(struct world *w)
{
    static const char *const steps[] = {"cluster_alloc", "cow_read", "cow_write", "write_aio"};

    must_write(w, 100 * CLUSTER, CLUSTER, 0); /* else there is no table, and nothing to discard */
    for (uint64_t i = 0; i < ARRAY_SIZE(steps); i++) {
        struct ask writer;
        struct ask discard;

        must_break(w, steps[i], "C");
        start(w, &writer, REQUEST_WRITE, i * CLUSTER + 512, 512, 0x22);
        until_held(w, "C");
        start(w, &discard, REQUEST_DISCARD, i * CLUSTER, CLUSTER, 0);
        pass_time(NS_PER_S);
        assert_int_equal(discard.result, 1); /* it waits for the range */
        assert_int_equal(writer.result, 1);
        assert_int_equal(fault_resume(w->fault, "C"), 0);
        co_scope_join(&w->scope);
        assert_int_equal(writer.result, 0);
        assert_int_equal(discard.result, 0);
        must_read(w, i * CLUSTER, CLUSTER, 0); /* the discard was the last */
    }
}

static void test_fault__a_discard_comes_after_the_copy(void **state)
{
    struct world w = {.body = discard_while_copying, .seed = 1, .has_base = true};

    (void)state;
    run_it(&w);
}

/* Every event has a name of its own. */
static void test_fault__names_of_events(void **state)
{
    (void)state;
    for (unsigned i = EVENT_NONE + 1; i < EVENT_COUNT; i++) {
        assert_non_null(event_name((enum event)i));
        assert_int_equal(event_from_name(event_name((enum event)i)), i);
    }
    assert_int_equal(event_from_name("none"), EVENT_NONE);
    assert_int_equal(event_from_name("nothing"), EVENT_NONE);
}
