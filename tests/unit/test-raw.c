/* SPDX-License-Identifier: Apache-2.0 */
/* raw: windows of a file. */
#include "formats/list.h"
#include "graph-fixture.h"
#include "loop/sim/sim.h"
#include "protocols/list.h"
#include "seeds.h"
#include "sim-run.h"

#include <errno.h>

#define PATH "/disk/a.img"

static const struct driver *const *const drivers[] = {protocol_drivers, format_drivers, NULL};

/* A file of this size on a simulated disk, and what to do with it there. */
static struct sim_disk *on_disk(uint64_t seed, uint64_t size, co_entry_fn *body, void *arg)
{
    struct sim_file_setup setup = {.type = FILE_TYPE_REGULAR, .size = size};
    struct sim_disk *d = sim_disk_new();

    sim_disk_make(d, PATH, &setup);
    assert_int_equal(run_on(d, seed, body, arg), SIM_RETURNED);
    return d;
}

static void run_on_disk(uint64_t size, co_entry_fn *body)
{
    TEST_SEEDS (seed)
        sim_disk_free(on_disk(seed, size, body, NULL));
}

#define FILE_OPTIONS "'driver':'file','filename':'" PATH "'"

static void whole(void *arg)
{
    struct graph *g = graph_new(drivers);
    struct backend *b;
    uint8_t data[1000];

    (void)arg;
    must_add(g, "{'driver':'raw','node-name':'r','file':{" FILE_OPTIONS "}}");
    b = must_attach(g, "r", ACCESS_RW, "test");
    assert_int_equal(backend_size(b), 10000);
    memset(data, 7, sizeof(data));
    assert_int_equal(write_at(b, 9000, 1000, data), 0);
    memset(data, 0, sizeof(data));
    assert_int_equal(read_at(b, 9000, 1000, data), 0);
    assert_int_equal(data[0], 7);
    assert_int_equal(data[999], 7);
    assert_int_equal(read_at(b, 9001, 1000, data), -EIO);
    assert_int_equal(flush(b), 0);
    backend_co_free(b);
    graph_co_free(g);
}

static void test_raw__is_the_file_by_default(void **state)
{
    (void)state;
    run_on_disk(10000, whole);
}

static void window(void *arg)
{
    struct graph *g = graph_new(drivers);
    struct backend *b;
    uint8_t data[3000];

    (void)arg;
    must_add(g, "{'driver':'raw','node-name':'r','offset':1001,'size':3000,'file':{" FILE_OPTIONS
                ",'discard':'unmap'},'discard':'unmap'}");
    b = must_attach(g, "r", ACCESS_RW, "test");
    assert_int_equal(backend_size(b), 3000);
    memset(data, 9, sizeof(data));
    assert_int_equal(write_at(b, 0, 3000, data), 0);
    assert_int_equal(write_at(b, 2999, 2, data), -EIO);
    assert_int_equal(read_at(b, 3000, 1, data), -EIO);
    assert_int_equal(send_request(b, REQUEST_WRITE_ZEROES, 0, 1000, 500, NULL), 0);
    assert_int_equal(send_request(b, REQUEST_DISCARD, 0, 2000, 500, NULL), 0);
    backend_co_free(b);
    graph_co_free(g);
}

static void test_raw__window_touches_nothing_beside_it(void **state)
{
    (void)state;
    TEST_SEEDS (seed) {
        struct sim_disk *d = on_disk(seed, 10000, window, NULL);
        uint8_t data[10000];

        assert_int_equal(sim_disk_read(d, PATH, 0, data, sizeof(data)), 0);
        for (unsigned i = 0; i < sizeof(data); i++) {
            bool inside = i >= 1001 && i < 4001;
            bool zeroed = (i >= 2001 && i < 2501) || (i >= 3001 && i < 3501);

            assert_int_equal(data[i], inside && !zeroed ? 9 : 0);
        }
        sim_disk_free(d);
    }
}

static void refuse(void *arg)
{
    struct graph *g = graph_new(drivers);

    (void)arg;
    must_add(g, "{'node-name':'f'," FILE_OPTIONS "}");
    must_refuse(EINVAL, "offset 10001 lies beyond the end of node 'f' (10000 bytes)", g,
                "{'driver':'raw','node-name':'r','offset':10001,'file':'f'}");
    must_refuse(EINVAL, "offset 9000 and size 1001 end beyond node 'f'", g,
                "{'driver':'raw','node-name':'r','offset':9000,'size':1001,'file':'f'}");
    must_refuse(
        EINVAL, "end beyond node 'f'", g,
        "{'driver':'raw','node-name':'r','offset':1,'size':9223372035781033984,'file':'f'}");
    must_add(g,
             "{'driver':'raw','node-name':'r','offset':10000,'file':'f'}"); /* empty, and right */
    assert_int_equal(node_size(graph_find(g, "r")), 0);
    graph_co_free(g);
}

static void test_raw__window_beyond_the_file_is_refused(void **state)
{
    (void)state;
    run_on_disk(10000, refuse);
}

static void resize(void *arg)
{
    struct graph *g = graph_new(drivers);
    struct access access = {.wants = ACCESS_ALL, .tolerates = ACCESS_ALL};
    struct backend *b;

    (void)arg;
    must_add(g, "{'driver':'raw','node-name':'r','offset':1000,'file':{" FILE_OPTIONS "}}");
    b = must_attach(g, "r", access, "test");
    assert_int_equal(backend_size(b), 9000);
    assert_int_equal(send_request(b, REQUEST_RESIZE, 0, 20000, 0, NULL), 0);
    assert_int_equal(backend_size(b), 20000);
    assert_int_equal(send_request(b, REQUEST_RESIZE, 0, (uint64_t)NODE_SIZE_MAX, 0, NULL), -EFBIG);
    assert_int_equal(backend_size(b), 20000);
    backend_co_free(b);
    must_del(g, "r");
    must_add(g, "{'driver':'raw','node-name':'r','size':1000,'file':{" FILE_OPTIONS "}}");
    b = must_attach(g, "r", access, "test");
    assert_int_equal(send_request(b, REQUEST_RESIZE, 0, 500, 0, NULL), -EOPNOTSUPP);
    backend_co_free(b);
    graph_co_free(g);
}

static void test_raw__resizes_only_without_a_size_of_its_own(void **state)
{
    (void)state;
    TEST_SEEDS (seed) {
        struct sim_disk *d = on_disk(seed, 10000, resize, NULL);

        assert_int_equal(sim_disk_size(d, PATH), 21000);
        sim_disk_free(d);
    }
}

static void extents(void *arg)
{
    struct graph *g = graph_new(drivers);
    struct backend *b;
    struct extent v[8];
    struct extents e = {.v = v, .max = 8};
    struct request req = {.kind = REQUEST_EXTENTS, .offset = 1000, .len = 95000, .extents = &e};
    const struct node *file;
    uint8_t data[4096];
    uint64_t pos = 1000;

    (void)arg;
    must_add(g, "{'node-name':'f'," FILE_OPTIONS "}");
    must_add(g, "{'driver':'raw','node-name':'r','offset':4096,'file':'f'}");
    file = graph_find(g, "f");
    b = must_attach(g, "r", ACCESS_RW, "test");
    memset(data, 1, sizeof(data));
    assert_int_equal(write_at(b, 8192, 4096, data), 0);
    assert_int_equal(write_at(b, 40960, 4096, data), 0);
    assert_int_equal(backend_co_request(b, &req), 0);
    assert_int_equal(e.count, 5); /* hole, data, hole, data, hole */
    for (unsigned i = 0; i < e.count; i++) {
        assert_int_equal(v[i].offset, pos);
        assert_int_equal(v[i].flags, EXTENT_ALLOCATED | EXTENT_OFFSET_VALID |
                                         (i % 2 ? EXTENT_DATA : EXTENT_ZERO));
        assert_ptr_equal(v[i].host, file);
        assert_int_equal(v[i].host_offset, v[i].offset + 4096);
        pos += v[i].len;
    }
    assert_int_equal(pos, 96000);
    assert_true(v[1].offset <= 8192 && v[1].offset + v[1].len >= 12288);
    e.count = 0;
    e.max = 2; /* full: the rest is asked for later */
    assert_int_equal(backend_co_request(b, &req), 0);
    assert_int_equal(e.count, 2);
    assert_int_equal(v[1].flags & EXTENT_DATA, EXTENT_DATA);
    backend_co_free(b);
    graph_co_free(g);
}

static void test_raw__extents_are_told_in_its_own_offsets(void **state)
{
    (void)state;
    run_on_disk(1 * MIB, extents);
}

/* Two windows meet within a block of a file with direct I/O: both write their part of it, again and again. */
struct half {
    struct backend *b;
    uint64_t at;
    uint8_t last;
    int result;
};

static void write_half(void *arg)
{
    struct half *h = arg;
    uint8_t data[100];

    for (unsigned i = 1; i <= 20 && h->result == 0; i++) {
        h->last = (uint8_t)i;
        memset(data, h->last, sizeof(data));
        h->result = write_at(h->b, h->at, sizeof(data), data);
    }
}

static void meet_in_a_block(void *arg)
{
    struct graph *g = graph_new(drivers);
    struct half halves[2] = {{.at = 512 * 7}, {.at = 0}};
    struct co_scope s;
    uint8_t data[200];

    (void)arg;
    must_add(g, "{'node-name':'f','cache':{'direct':true}," FILE_OPTIONS "}");
    must_add(g, "{'driver':'raw','node-name':'r0','size':3684,'file':'f'}");
    must_add(g, "{'driver':'raw','node-name':'r1','offset':3684,'file':'f'}");
    halves[0].b = must_attach(g, "r0", ACCESS_RW, "left");
    halves[1].b = must_attach(g, "r1", ACCESS_RW, "right");
    assert_int_equal(backend_alignment(halves[0].b), 512);
    assert_int_equal(backend_alignment(halves[1].b), 1); /* no unit fits */
    co_scope_init(&s);
    assert_int_equal(co_scope_start(&s, write_half, &halves[0]), 0);
    assert_int_equal(co_scope_start(&s, write_half, &halves[1]), 0);
    co_scope_join(&s);
    assert_int_equal(halves[0].result, 0);
    assert_int_equal(halves[1].result, 0);
    assert_int_equal(read_at(halves[0].b, 512 * 7, 100, data), 0);
    assert_int_equal(read_at(halves[1].b, 0, 100, data + 100), 0);
    for (unsigned i = 0; i < 200; i++)
        assert_int_equal(data[i], 20);
    backend_co_free(halves[0].b);
    backend_co_free(halves[1].b);
    graph_co_free(g);
}

static void test_raw__windows_that_meet_in_a_block_keep_each_others_bytes(void **state)
{
    (void)state;
    run_on_disk(65536, meet_in_a_block);
}
