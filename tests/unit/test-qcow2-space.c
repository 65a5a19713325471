/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Space that was freed: it is found before there is no space, it is not lost when who takes it up is cancelled, and rows of it are found
 * among many pieces.
 */
#include "formats/list.h"
#include "formats/qcow2/check/qcow2-check.h"
#include "protocols/list.h"
#include "qcow2-fixture.h"

#define TOP     "/disk/top"
#define CLUSTER ((uint64_t)512)

static const struct driver *const *const drivers[] = {protocol_drivers, format_drivers, NULL};

struct world {
    struct sim_disk *disk;
    const char *driver;
    struct graph *graph;
    struct backend *backend;
    void (*body)(struct world *w);
    uint64_t fails_at; /* the k-th write hangs */
    bool fired;
};

static void open_top(struct world *w)
{
    w->graph = graph_new(drivers);
    must_add(w->graph,
             "{'driver':'qcow2','node-name':'top','backing':null,'discard':'unmap',"
             "'file':{'driver':'%s','filename':'%s'}}",
             w->driver, TOP);
    w->backend = must_attach(w->graph, "top", ACCESS_RW, "guest");
}

static void close_top(struct world *w)
{
    backend_co_free(w->backend);
    graph_co_free(w->graph);
}

static void run_world(void *arg)
{
    struct world *w = arg;

    w->body(w);
}

static void in_sim(struct world *w)
{

    assert_int_equal(run_on(w->disk, 1, run_world, w), SIM_RETURNED);
}

static int write_cluster(struct world *w, uint64_t cluster)
{
    uint8_t data[CLUSTER];

    memset(data, (int)cluster | 1, sizeof(data));
    return write_at(w->backend, cluster * CLUSTER, CLUSTER, data);
}

static int discard(struct world *w, uint64_t cluster, uint64_t count)
{
    return send_request(w->backend, REQUEST_DISCARD, 0, cluster * CLUSTER, count * CLUSTER, NULL);
}

/* ---- a full device ---- */

#define DEVICE_CLUSTERS 1024u
#define FREED           16u

static void fill_then_swap(struct world *w)
{
    uint64_t full = 0;

    open_top(w);
    while (write_cluster(w, full) == 0)
        full++;
    assert_in_range(full, DEVICE_CLUSTERS / 2, DEVICE_CLUSTERS);
    assert_int_equal(flush(w->backend), 0);
    assert_int_equal(discard(w, 100, FREED), 0);
    for (unsigned i = 0; i < FREED; i++) /* nobody has flushed */
        assert_int_equal(write_cluster(w, full - full % 64 + 64 + i), i < FREED - 1 ? 0 : -ENOSPC);
    assert_int_equal(flush(w->backend), 0);
    close_top(w);
}

/* ---- and a check of it ---- */

struct beside {
    struct world *world;
    uint64_t full;
    bool done;
};

/* While the check runs: all that is freed is needed at once. */
static bool swap_beside(void *arg)
{
    struct beside *b = arg;

    if (b->done)
        return false;
    b->done = true;
    assert_int_equal(discard(b->world, 100, FREED), 0);
    for (unsigned i = 0; i < FREED - 1; i++)
        assert_int_equal(write_cluster(b->world, b->full - b->full % 64 + 64 + i), 0);
    assert_int_equal(flush(b->world->backend), 0);
    return false;
}

static void fill_then_check(struct world *w)
{
    struct access access = {.wants = ACCESS_READ, .tolerates = ACCESS_ALL};
    struct qcow2_check_options options = QCOW2_CHECK_OPTIONS_INIT;
    struct qcow2_check_result found;
    struct beside beside = {.world = w};
    struct error *err = NULL;
    struct backend *checker;

    open_top(w);
    while (write_cluster(w, beside.full) == 0)
        beside.full++;
    assert_int_equal(flush(w->backend), 0);
    checker = must_attach(w->graph, "top", access, "checker");
    options.interrupted = swap_beside;
    options.arg = &beside;
    assert_int_equal(qcow2_co_check_online(checker, &options, &found, &err), 0);
    assert_true(beside.done);
    assert_in_range(found.moved_clusters, 1, FREED);
    assert_int_equal(found.corruptions + found.leaks + found.check_errors, 0);
    backend_co_free(checker);
    close_top(w);
}

static void on_device(void (*body)(struct world *w))
{
    struct qcow2_shape shape = {
        .version = 3, .cluster_bits = 9, .refcount_order = 4, .size = 4096 * CLUSTER};
    struct sim_file_setup setup = {.type = FILE_TYPE_BLOCK, .size = DEVICE_CLUSTERS * CLUSTER};
    struct world w = {.disk = sim_disk_new(), .driver = "host_device", .body = body};
    size_t len;
    uint8_t *bytes = qcow2_make(&shape, &len);

    sim_disk_make(w.disk, TOP, &setup);
    sim_disk_write(w.disk, TOP, 0, bytes, len);
    free(bytes);
    in_sim(&w);
    sim_disk_free(w.disk);
}

/* One of what was freed becomes the L2 table that the new place needs. */
static void test_qcow2_space__freed_before_a_flush_is_found_when_there_is_no_other(void **state)
{
    (void)state;
    on_device(fill_then_swap);
}

static void test_qcow2_space__a_check_withholds_nothing_that_is_needed(void **state)
{
    (void)state;
    on_device(fill_then_check);
}

/* ---- cancelled while freed space is taken up ---- */

static void flush_there(void *arg)
{
    struct world *w = arg;

    (void)flush(w->backend);
}

static void discard_and_cancel(struct world *w)
{
    struct sim_fault fault = {
        .name = TOP, .ops = SIM_OP(IO_WRITE), .kind = SIM_HANG, .at = w->fails_at, .times = 1};
    struct co_scope scope;

    open_top(w);
    assert_int_equal(discard(w, 0, 1), 0);
    assert_int_equal(discard(w, 2, 1), 0);
    assert_int_equal(flush(w->backend), 0);
    assert_int_equal(co_sleep_until(loop_clock() + NS_PER_S), 0); /* no reader remembers them */
    sim_fault_add(&fault);
    co_scope_init(&scope);
    assert_int_equal(co_scope_start(&scope, flush_there, w), 0);
    co_scope_set_deadline(&scope, loop_clock() + NS_PER_S);
    co_scope_join(&scope);
    w->fired = fault.fired;
    sim_fault_remove(&fault);
    (void)sim_unhang(TOP);
    assert_int_equal(co_sleep_until(loop_clock() + NS_PER_S), 0); /* the host has ended */
    assert_int_equal(flush(w->backend), 0);
    close_top(w);
}

/* Guest clusters 0 and 1 share one of the host; 2 has its own. */
static void share_two(uint8_t *bytes)
{
    uint64_t l2 = load_be64(bytes + load_be64(bytes + 40)) & 0xfffffffffffe00;
    uint64_t host = load_be64(bytes + l2) & 0xfffffffffffe00;
    uint64_t block = load_be64(bytes + CLUSTER);

    store_be16(bytes + block + (load_be64(bytes + l2 + 8) & 0xfffffffffffe00) / CLUSTER * 2, 0);
    store_be64(bytes + l2, host);
    store_be64(bytes + l2 + 8, host);
    store_be16(bytes + block + host / CLUSTER * 2, 2);
}

/* The flag of the cluster that has one user left is not set; nothing is lost, and nothing is counted down twice. */
static void test_qcow2_space__cancelled_flush_loses_nothing_that_was_freed(void **state)
{
    struct qcow2_shape shape = {
        .version = 3, .cluster_bits = 9, .refcount_order = 4, .size = 64 * CLUSTER, .allocated = 3};
    struct world w = {.driver = "file", .body = discard_and_cancel, .fired = true};
    uint64_t k = 0;

    (void)state;
    while (w.fired) {
        struct qcow2_verdict v;
        size_t len;
        uint8_t *bytes = qcow2_make(&shape, &len);

        share_two(bytes);
        w.disk = sim_disk_new();
        image_put(w.disk, TOP, bytes, len);
        free(bytes);
        w.fails_at = ++k;
        in_sim(&w);
        image_judge(w.disk, TOP, LEAKS_AND_COPIES_ALLOWED, &v);
        assert_int_equal(v.leaks, 0);
        sim_disk_free(w.disk);
    }
    assert_in_range(k, 2, 100);
}

/* ---- a writer who has left ---- */

/* From memory that the host may keep (G8). */
static void write_there(void *arg)
{
    struct world *w = arg;
    struct iobuf *b = iobuf_new(CLUSTER);
    struct iovec iov = {b->data, CLUSTER};

    memset(b->data, 1, CLUSTER);
    for (uint64_t i = 1; i < 4; i++) {
        struct request req = {.kind = REQUEST_WRITE, .offset = 32 * i * CLUSTER, .len = CLUSTER};

        req.iov = &iov;
        req.iov_count = 1;
        req.hold = b;
        (void)backend_co_request(w->backend, &req);
    }
    iobuf_unref(b);
}

static void write_and_cancel(struct world *w)
{
    struct sim_fault fault = {.name = TOP,
                              .ops = SIM_OP(IO_WRITE) | SIM_OP(IO_SYNC) | SIM_OP(IO_TRUNCATE),
                              .kind = SIM_HANG,
                              .at = w->fails_at,
                              .times = 1};
    struct co_scope scope;

    open_top(w);
    sim_fault_add(&fault);
    co_scope_init(&scope);
    assert_int_equal(co_scope_start(&scope, write_there, w), 0);
    co_scope_set_deadline(&scope, loop_clock() + NS_PER_S);
    co_scope_join(&scope);
    w->fired = fault.fired;
    sim_fault_remove(&fault);
    (void)sim_unhang(TOP);
    close_top(w);
}

/* The host writes there for a while; when it has ended, the space is free as before. */
static void test_qcow2_space__cancelled_write_gives_its_place_back(void **state)
{
    struct qcow2_shape shape = {
        .version = 3, .cluster_bits = 12, .refcount_order = 4, .size = 128 * CLUSTER};
    struct world w = {.driver = "file", .body = write_and_cancel, .fired = true};
    uint64_t k = 0;

    (void)state;
    while (w.fired) {
        struct qcow2_verdict v;
        size_t len;
        uint8_t *bytes = qcow2_make(&shape, &len);

        w.disk = sim_disk_new();
        image_put(w.disk, TOP, bytes, len);
        free(bytes);
        w.fails_at = ++k;
        in_sim(&w);
        image_judge(w.disk, TOP, LEAKS_ALLOWED, &v);
        assert_int_equal(v.leaks, 0);
        sim_disk_free(w.disk);
    }
    assert_in_range(k, 5, 100);
}

/* ---- many pieces ---- */

#define PIECES   3000u
#define FREE_ROW 40u
#define ROW      24u
#define ROW_AT   6016u /* within one L2 table */

/* Where a guest cluster lies. */
static uint64_t host_of(struct world *w, uint64_t guest)
{
    size_t len;
    uint8_t *bytes = image_load(w->disk, TOP, &len);
    uint64_t l1 = load_be64(bytes + 40);
    uint64_t l2 = load_be64(bytes + l1 + guest / 64 * 8) & 0xfffffffffffe00;
    uint64_t host = load_be64(bytes + l2 + guest % 64 * 8) & 0xfffffffffffe00;

    free(bytes);
    return host;
}

static void free_pieces_and_a_row(struct world *w)
{
    uint64_t clusters = ROW_AT + FREE_ROW;
    uint8_t *data = xalloc(clusters, CLUSTER);
    uint64_t host;

    open_top(w);
    assert_int_equal(write_at(w->backend, 0, clusters * CLUSTER, data), 0);
    assert_int_equal(flush(w->backend), 0);
    host = host_of(w, ROW_AT);
    for (unsigned i = 0; i < PIECES; i++) {
        if (i == PIECES / 2)
            assert_int_equal(discard(w, ROW_AT, FREE_ROW), 0);
        assert_int_equal(discard(w, 2 * i, 1), 0);
    }
    assert_int_equal(flush(w->backend), 0);
    assert_int_equal(co_sleep_until(loop_clock() + NS_PER_S), 0);
    assert_int_equal(flush(w->backend), 0);
    assert_int_equal(write_at(w->backend, ROW_AT * CLUSTER, ROW * CLUSTER, data), 0);
    assert_int_equal(flush(w->backend), 0);
    for (unsigned i = 0; i < ROW; i++)
        assert_int_equal(host_of(w, ROW_AT + i), host + i * CLUSTER);
    close_top(w);
    free(data);
}

/* It lies in a row again, where it was: that is the only one that is long enough. */
static void test_qcow2_space__row_is_found_among_many_pieces(void **state)
{
    struct qcow2_shape shape = {
        .version = 3, .cluster_bits = 9, .refcount_order = 4, .size = 16384 * CLUSTER};
    struct world w = {.disk = sim_disk_new(), .driver = "file", .body = free_pieces_and_a_row};

    (void)state;
    image_make(w.disk, TOP, &shape);
    in_sim(&w);
    sim_disk_free(w.disk);
}
