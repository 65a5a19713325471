/* SPDX-License-Identifier: Apache-2.0 */
/* Copies that the host does (graph/offload.h), through formats: from what lies somewhere as it is, to whole units or fresh space. */
#include "formats/list.h"
#include "graph/offload.h"
#include "protocols/list.h"
#include "qcow2-fixture.h"

#define TOP     "/disk/top"
#define BASE    "/disk/base"
#define WELL    "/disk/well"
#define CLUSTER ((uint64_t)4096)
#define SIZE    (64 * CLUSTER)

static const struct driver *const *const drivers[] = {protocol_drivers, format_drivers, NULL};

/*
 *      top (qcow2) --backing--> base (qcow2)       well (raw)
 */
struct world {
    struct sim_disk *disk;
    struct graph *graph;
    struct backend *top;
    struct backend *well;
    struct backend *base;
    void (*body)(struct world *w);
};

static void world_main(void *arg)
{
    struct world *w = arg;
    struct access reads = {.wants = ACCESS_READ, .tolerates = ACCESS_ALL};

    w->graph = graph_new(drivers);
    add_layer(w->graph, "base", BASE, NULL, true);
    add_layer(w->graph, "top", TOP, "base", false);
    must_add(w->graph, "{'driver':'file','node-name':'well','filename':'" WELL "'}");
    w->base = must_attach(w->graph, "base", reads, "test");
    w->top = must_attach(w->graph, "top", ACCESS_RW, "test");
    w->well = must_attach(w->graph, "well", ACCESS_RW, "test");
    w->body(w);
    backend_co_free(w->base);
    backend_co_free(w->well);
    backend_co_free(w->top);
    graph_co_free(w->graph);
}

/* Every byte of the base's first `allocated` clusters, and of the well, is known. */
static void run(void (*body)(struct world *w), bool no_copy)
{
    struct sim_file_setup well = {.type = FILE_TYPE_REGULAR, .size = SIZE, .no_copy = no_copy};
    struct qcow2_shape base = {
        .version = 3, .cluster_bits = 12, .refcount_order = 4, .size = SIZE, .allocated = 32};
    struct qcow2_shape top = base;
    struct world w = {.disk = sim_disk_new(), .body = body};
    struct qcow2_verdict v;
    struct sim_options o;
    uint8_t *bytes;
    size_t len;

    top.allocated = 0;
    top.backing = BASE;
    bytes = qcow2_make(&base, &len);
    memset(bytes + len - base.allocated * CLUSTER, 'b', base.allocated * CLUSTER);
    image_put(w.disk, BASE, bytes, len);
    memset(bytes, 'w', SIZE < len ? SIZE : len);
    sim_disk_make(w.disk, WELL, &well);
    sim_disk_write(w.disk, WELL, 0, bytes, MIN((size_t)SIZE, len));
    free(bytes);
    image_make(w.disk, TOP, &top);
    sim_options_init(&o, 1);
    o.disk = w.disk;
    assert_int_equal(sim_run(&o, world_main, &w), SIM_RETURNED);
    image_judge(w.disk, TOP, NO_LEAKS, &v);
    sim_disk_free(w.disk);
}

static void fill(struct backend *b, uint64_t offset, uint64_t len, char c)
{
    uint8_t *data = xalloc(1, len);

    memset(data, c, len);
    assert_int_equal(write_at(b, offset, len, data), 0);
    free(data);
}

static void must_hold(struct backend *b, uint64_t offset, uint64_t len, char c)
{
    char *data = xalloc(1, len);

    assert_int_equal(read_at(b, offset, len, data), 0);
    for (uint64_t i = 0; i < len; i++) {
        if (data[i] != c)
            fail_msg("byte %" PRIu64 " is '%c', not '%c'", offset + i, data[i], c);
    }
    free(data);
}

/* ---- from an image ---- */

static void data_of_two_layers(struct world *w)
{
    fill(w->top, 4 * CLUSTER, 4 * CLUSTER, 't');
    assert_int_equal(backend_co_copy(w->top, 3 * CLUSTER, w->well, 7, 6 * CLUSTER, 0), 0);
    must_hold(w->well, 0, 7, 'w');
    must_hold(w->well, 7, CLUSTER, 'b');
    must_hold(w->well, 7 + CLUSTER, 4 * CLUSTER, 't');
    must_hold(w->well, 7 + 5 * CLUSTER, CLUSTER, 'b');
    must_hold(w->well, 7 + 6 * CLUSTER, 100, 'w');
}

static void test_qcow2_offload__copies_from_all_layers(void **state)
{
    (void)state;
    run(data_of_two_layers, false);
}

/* Zeroes lie nowhere; what is compressed, not as it is. */
static void not_as_it_is(struct world *w)
{
    char data[CLUSTER];

    assert_int_equal(backend_co_copy(w->top, 40 * CLUSTER, w->well, 0, CLUSTER, 0), -EOPNOTSUPP);
    assert_int_equal(backend_co_copy(w->top, 31 * CLUSTER, w->well, 0, 2 * CLUSTER, 0),
                     -EOPNOTSUPP);
    memset(data, 'c', sizeof(data));
    assert_int_equal(
        send_request(w->top, REQUEST_WRITE, REQUEST_COMPRESSED, CLUSTER, CLUSTER, data), 0);
    assert_int_equal(backend_co_copy(w->top, CLUSTER, w->well, 0, CLUSTER, 0), -EOPNOTSUPP);
}

static void test_qcow2_offload__leaves_zeroes_and_compressed_clusters_to_others(void **state)
{
    (void)state;
    run(not_as_it_is, false);
}

struct copying {
    struct world *world;
    int result;
};

static void copy_main(void *arg)
{
    struct copying *c = arg;

    c->result = backend_co_copy(c->world->top, 4 * CLUSTER, c->world->well, 0, CLUSTER, 0);
}

/*
 * OFFLOAD-2: the host takes its time; what it copies is discarded meanwhile, and others write. They get other space, as long as it
 * has not ended.
 */
static void discarded_meanwhile(struct world *w)
{
    struct sim_fault slow = {.name = WELL, .ops = SIM_OP(IO_COPY), .kind = SIM_HANG, .at = 1};
    struct copying c = {.world = w};
    struct co_scope scope;

    fill(w->top, 4 * CLUSTER, CLUSTER, 't');
    assert_int_equal(flush(w->top), 0);
    sim_fault_add(&slow);
    co_scope_init(&scope);
    assert_int_equal(co_scope_start(&scope, copy_main, &c), 0);
    assert_int_equal(co_sleep_until(loop_clock() + NS_PER_S), 0);
    assert_int_equal(send_request(w->top, REQUEST_DISCARD, 0, 4 * CLUSTER, CLUSTER, NULL), 0);
    for (uint64_t i = 8; i < 60; i++) {
        assert_int_equal(flush(w->top), 0);
        fill(w->top, i * CLUSTER, CLUSTER, 'x');
    }
    sim_fault_remove(&slow);
    assert_int_equal(sim_unhang(WELL), 1);
    co_scope_join(&scope);
    assert_int_equal(c.result, 0);
    must_hold(w->well, 0, CLUSTER, 't');
}

static void test_qcow2_offload__holds_what_is_copied(void **state)
{
    (void)state;
    run(discarded_meanwhile, false);
}

/* ---- to an image ---- */

static void whole_and_in_part(struct world *w)
{
    /* Whole clusters over the base's: allocated. Parts of one would need what is below. */
    assert_int_equal(backend_co_copy(w->well, 100, w->top, 0, 2 * CLUSTER, 0), 0);
    must_hold(w->top, 0, 2 * CLUSTER, 'w');
    assert_int_equal(backend_co_copy(w->well, 0, w->top, 5 * CLUSTER + 512, 512, 0), -EOPNOTSUPP);
    must_hold(w->top, 5 * CLUSTER, CLUSTER, 'b');
    /* In place any part will do. */
    fill(w->top, 8 * CLUSTER, CLUSTER, 't');
    assert_int_equal(backend_co_copy(w->well, 0, w->top, 8 * CLUSTER + 512, 1000, 0), 0);
    must_hold(w->top, 8 * CLUSTER, 512, 't');
    must_hold(w->top, 8 * CLUSTER + 512, 1000, 'w');
    must_hold(w->top, 8 * CLUSTER + 1512, CLUSTER - 1512, 't');
    /* In fresh space, too: the rest of it reads as zeroes, as the disk did there. */
    assert_int_equal(backend_co_copy(w->well, 0, w->top, 50 * CLUSTER + 512, 512, 0), 0);
    must_hold(w->top, 50 * CLUSTER, 512, 0);
    must_hold(w->top, 50 * CLUSTER + 512, 512, 'w');
    must_hold(w->top, 50 * CLUSTER + 1024, CLUSTER - 1024, 0);
}

static void test_qcow2_offload__allocates_as_a_write_does(void **state)
{
    (void)state;
    run(whole_and_in_part, false);
}

/* OFFLOAD-4: he would hold what he waits for to be let go of. From the layer below there is nothing to wait for. */
static void over_itself(struct world *w)
{
    fill(w->top, 4 * CLUSTER, CLUSTER, 't');
    assert_int_equal(backend_co_copy(w->top, 4 * CLUSTER, w->top, 6 * CLUSTER, CLUSTER, 0),
                     -EOPNOTSUPP);
    must_hold(w->top, 6 * CLUSTER, CLUSTER, 'b');
    assert_int_equal(backend_co_copy(w->base, 0, w->top, 6 * CLUSTER, CLUSTER, 0), 0);
    assert_int_equal(backend_co_copy(w->top, 9 * CLUSTER, w->top, 10 * CLUSTER, CLUSTER, 0),
                     -EOPNOTSUPP);
}

static void test_qcow2_offload__copies_no_node_onto_itself(void **state)
{
    (void)state;
    run(over_itself, false);
}

static void host_refuses(struct world *w)
{
    assert_int_equal(backend_co_copy(w->well, 0, w->top, 0, 4 * CLUSTER, 0), -EXDEV);
    assert_int_equal(backend_co_copy(w->top, 0, w->well, 0, 4 * CLUSTER, 0), -EXDEV);
    must_hold(w->top, 0, 4 * CLUSTER, 'b');
    fill(w->top, 0, 4 * CLUSTER, 't');
}

/* What was allocated for it is used by the next one. */
static void test_qcow2_offload__gives_back_what_the_host_does_not_fill(void **state)
{
    (void)state;
    run(host_refuses, true);
}

/* ---- raw ---- */

static void windows(struct world *w)
{
    struct backend *b;

    must_add(w->graph, "{'driver':'raw','node-name':'window','offset':512,'size':8192,"
                       "'file':{'driver':'file','filename':'/disk/other'}}");
    b = must_attach(w->graph, "window", ACCESS_RW, "test");
    assert_int_equal(backend_co_copy(w->well, 0, b, 100, 1000, 0), 0);
    must_hold(b, 0, 100, 'o');
    must_hold(b, 100, 1000, 'w');
    must_hold(b, 1100, 100, 'o');
    assert_int_equal(backend_co_copy(b, 100, w->top, 0, CLUSTER, 0), 0);
    must_hold(w->top, 0, 1000, 'w');
    must_hold(w->top, 1000, CLUSTER - 1000, 'o');
    assert_int_equal(backend_co_copy(w->well, 0, b, 8000, 1000, 0), -EIO);
    backend_co_free(b);
    must_del(w->graph, "window");
    /* Direct: whole units of the file. */
    must_add(w->graph, "{'driver':'file','node-name':'direct','filename':'/disk/other',"
                       "'cache':{'direct':true}}");
    b = must_attach(w->graph, "direct", ACCESS_RW, "test");
    assert_int_equal(backend_co_copy(w->well, 100, b, 0, 512, 0), 0);
    must_hold(b, 0, 512, 'w');
    assert_int_equal(backend_co_copy(w->well, 0, b, 100, 512, 0), -EOPNOTSUPP);
    assert_int_equal(backend_co_copy(b, 0, w->well, 0, 100, 0), -EOPNOTSUPP);
    backend_co_free(b);
    must_del(w->graph, "direct");
}

/* A file that ends within a unit: the node shows zeroes there, of which the host knows nothing. */
static void end_of_file(struct world *w)
{
    struct backend *b;

    must_add(w->graph, "{'driver':'file','node-name':'direct','filename':'/disk/odd',"
                       "'cache':{'direct':true}}");
    b = must_attach(w->graph, "direct", ACCESS_RW, "test");
    assert_int_equal(backend_size(b), 1024);
    assert_int_equal(backend_co_copy(b, 0, w->well, 0, 1024, 0), -EOPNOTSUPP);
    assert_int_equal(backend_co_copy(b, 0, w->well, 0, 512, 0), 0);
    must_hold(w->well, 0, 512, 'o');
    backend_co_free(b);
}

static void with_other_file(struct world *w)
{
    static char data[16384];

    memset(data, 'o', sizeof(data));
    sim_disk_write(w->disk, "/disk/other", 0, data, sizeof(data));
    sim_disk_write(w->disk, "/disk/odd", 0, data, 1000);
    windows(w);
    end_of_file(w);
}

static void test_qcow2_offload__knows_where_windows_lie(void **state)
{
    (void)state;
    run(with_other_file, false);
}
