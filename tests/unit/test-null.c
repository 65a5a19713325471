/* SPDX-License-Identifier: Apache-2.0 */
/* null-co: zeroes, and nothing else; with a latency. */
#include "graph-fixture.h"
#include "loop/sim/sim.h"
#include "protocols/list.h"

#include <errno.h>

static const struct driver *const *const drivers[] = {protocol_drivers, NULL};

static bool all_zero(const uint8_t *p, size_t len)
{
    for (size_t i = 0; i < len; i++) {
        if (p[i])
            return false;
    }
    return true;
}

static void read_nothing(void *arg)
{
    struct graph *g = graph_new(drivers);
    struct backend *b;
    uint8_t data[5000];

    must_add(g, "{'driver':'null-co','node-name':'n','size':10000%s}", (const char *)arg);
    b = must_attach(g, "n", ACCESS_RW, "test");
    assert_int_equal(backend_size(b), 10000);
    memset(data, 0x5a, sizeof(data));
    assert_int_equal(write_at(b, 3, sizeof(data), data), 0);
    assert_int_equal(read_at(b, 3, sizeof(data), data), 0);
    assert_true(all_zero(data, sizeof(data))); /* P6: also without read-zeroes */
    assert_int_equal(flush(b), 0);
    assert_int_equal(send_request(b, REQUEST_WRITE_ZEROES, REQUEST_NO_FALLBACK, 0, 10000, NULL), 0);
    assert_int_equal(read_at(b, 9999, 2, data), -EIO);
    assert_true(backend_zeroes_fast(b));
    backend_co_free(b);
    graph_co_free(g);
}

static void test_null__reads_give_zeroes_and_never_foreign_data(void **state)
{
    (void)state;
    on_both(read_nothing, "");
    on_both(read_nothing, ",'read-zeroes':true");
}

static void ask_extents(void *arg)
{
    struct graph *g = graph_new(drivers);
    struct extent v[4];
    static const char *const nodes[] = {"n", "z"};
    static const unsigned flags[] = {EXTENT_DATA | EXTENT_ALLOCATED,
                                     EXTENT_ZERO | EXTENT_ALLOCATED};

    (void)arg;
    must_add(g, "{'driver':'null-co','node-name':'n'}");
    must_add(g, "{'driver':'null-co','node-name':'z','read-zeroes':true}");
    for (unsigned i = 0; i < 2; i++) {
        struct backend *b = must_attach(g, nodes[i], ACCESS_RW, "test");
        struct extents e = {.v = v, .max = 4};
        struct request req = {.kind = REQUEST_EXTENTS, .offset = 7, .len = 1 * MIB, .extents = &e};

        assert_int_equal(backend_size(b), 1 * GIB);
        assert_int_equal(backend_co_request(b, &req), 0);
        assert_int_equal(e.count, 1);
        assert_int_equal(v[0].offset, 7);
        assert_int_equal(v[0].len, 1 * MIB);
        assert_int_equal(v[0].flags, flags[i]);
        backend_co_free(b);
    }
    graph_co_free(g);
}

static void test_null__extents_say_zero_where_it_is_promised(void **state)
{
    (void)state;
    on_both(ask_extents, NULL);
}

static void resize(void *arg)
{
    struct graph *g = graph_new(drivers);
    struct access access = {.wants = ACCESS_ALL, .tolerates = ACCESS_ALL};
    struct backend *b;
    uint8_t byte;

    (void)arg;
    must_add(g, "{'driver':'null-co','node-name':'n','size':512}");
    b = must_attach(g, "n", access, "test");
    assert_int_equal(read_at(b, 600, 1, &byte), -EIO);
    assert_int_equal(send_request(b, REQUEST_RESIZE, 0, 1 * MIB, 0, NULL), 0);
    assert_int_equal(backend_size(b), 1 * MIB);
    assert_int_equal(read_at(b, 600, 1, &byte), 0);
    backend_co_free(b);
    graph_co_free(g);
}

static void test_null__takes_any_size(void **state)
{
    (void)state;
    on_both(resize, NULL);
}

static void take_time(void *arg)
{
    static const enum request_kind kinds[] = {REQUEST_READ, REQUEST_WRITE, REQUEST_FLUSH,
                                              REQUEST_DISCARD, REQUEST_WRITE_ZEROES};
    struct graph *g = graph_new(drivers);
    struct backend *b;
    uint8_t data[512] = {0};

    (void)arg;
    must_add(g, "{'driver':'null-co','node-name':'n','latency-ns':3000000,'discard':'unmap'}");
    b = must_attach(g, "n", ACCESS_RW, "test");
    for (unsigned i = 0; i < ARRAY_SIZE(kinds); i++) {
        uint64_t began_ns = loop_clock();

        assert_int_equal(send_request(b, kinds[i], 0, 0, 512, data), 0);
        assert_true(loop_clock() - began_ns >= 3 * NS_PER_MS);
        assert_true(loop_clock() - began_ns < 4 * NS_PER_MS); /* virtual time: exact enough */
    }
    backend_co_free(b);
    graph_co_free(g);
}

static void test_null__each_request_takes_the_latency(void **state)
{
    struct sim_options o;

    (void)state;
    sim_options_init(&o, 1);
    o.stall_per_mille = 0;
    assert_int_equal(sim_run(&o, take_time, NULL), SIM_RETURNED);
}
