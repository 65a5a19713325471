/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What is easy to get wrong in qcow2: header writes that fail half-way, refcounts that are wrong, space that is nearly gone, a
 * cache that is too small for what is dirty.
 */
#include "formats/list.h"
#include "protocols/list.h"
#include "qcow2-fixture.h"

#define TOP     "/disk/top"
#define CLUSTER 512u

static const struct driver *const *const drivers[] = {protocol_drivers, format_drivers, NULL};

struct world {
    struct sim_disk *disk;
    uint64_t seed;
    struct graph *graph;
    struct backend *backend;
    void *arg;
    void (*body)(struct world *w);
};

static void open_top(struct world *w, const char *driver, const char *more)
{
    w->graph = graph_new(drivers);
    must_add(w->graph,
             "{'driver':'qcow2','node-name':'top','discard':'unmap','backing':null,"
             "'file':{'driver':'%s','filename':'%s'}%s}",
             driver, TOP, more);
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

    assert_int_equal(run_on(w->disk, w->seed, run_world, w), SIM_RETURNED);
}

/* Each cluster says which it is. */
static void fill_guest(uint8_t *data, uint64_t offset, size_t len)
{
    for (size_t i = 0; i < len; i += 8)
        store_be64(data + i, (offset + i) * 0x9e3779b97f4a7c15ull | 1);
}

static void write_guest(struct world *w, uint64_t offset, size_t len)
{
    uint8_t *data = xalloc(1, len);

    fill_guest(data, offset, len);
    assert_int_equal(write_at(w->backend, offset, len, data), 0);
    free(data);
}

static void must_have_guest(struct world *w, uint64_t offset, size_t len)
{
    uint8_t *want = xalloc(1, len);
    uint8_t *have = xalloc(1, len);

    fill_guest(want, offset, len);
    assert_int_equal(read_at(w->backend, offset, len, have), 0);
    assert_memory_equal(have, want, len);
    free(want);
    free(have);
}

/* ---- D3: a new size whose header write fails, and may have happened all the same ---- */

#define OLD_SIZE (64 * KIB)

struct resizing {
    struct graph *graph;
    uint64_t to;
    enum sim_fault_kind how;
    uint64_t fails_at; /* the k-th write */
    uint64_t writes;   /* that there were */
    int result;
    bool flushed;
};

static void resize(void *arg)
{
    struct resizing *z = arg;
    struct error *err = NULL;

    z->result = graph_co_resize(z->graph, "top", z->to, &err);
    error_free(&err);
}

/* Gives up after a while. */
static void try_to_resize(struct resizing *z)
{
    struct co_scope scope;

    co_scope_init(&scope);
    assert_int_equal(co_scope_start(&scope, resize, z), 0);
    co_scope_set_deadline(&scope, loop_clock() + 10 * NS_PER_S);
    co_scope_join(&scope);
}

static void resize_and_go_on(struct world *w)
{
    struct resizing *z = w->arg;
    struct sim_fault fault = {.name = TOP,
                              .ops = SIM_OP(IO_WRITE),
                              .kind = z->how,
                              .error = EIO,
                              .at = z->fails_at,
                              .times = 1};

    open_top(w, "file", "");
    sim_fault_add(&fault);
    z->graph = w->graph;
    try_to_resize(z);
    sim_fault_remove(&fault);
    z->writes = fault.seen;
    z->flushed = false;
    (void)sim_unhang(TOP);
    assert_int_equal(co_sleep_until(loop_clock() + NS_PER_S), 0); /* the host has ended */
    if (z->result < 0) {
        uint8_t *data = xalloc(1, OLD_SIZE);

        fill_guest(data, 0, OLD_SIZE);
        z->flushed = write_at(w->backend, 0, OLD_SIZE, data) == 0 && flush(w->backend) == 0;
        free(data);
    }
    close_top(w);
}

static void look_at_old_size(struct world *w)
{
    open_top(w, "file", "");
    must_have_guest(w, 0, OLD_SIZE);
    close_top(w);
}

/* Returns how often the disk could be used on. */
static unsigned resize_with_failures(uint64_t to, enum sim_fault_kind how)
{
    struct qcow2_shape shape = {
        .version = 3, .cluster_bits = 9, .refcount_order = 4, .size = OLD_SIZE};
    unsigned kept = 0;

    for (uint64_t seed = 1; seed <= 20; seed++) {
        struct resizing z = {.to = to, .how = how, .fails_at = 1};

        do {
            struct world w = {.disk = sim_disk_new(), .seed = seed, .arg = &z};

            image_make(w.disk, TOP, &shape);
            w.body = resize_and_go_on;
            in_sim(&w);
            w.body = look_at_old_size;
            if (z.flushed)
                in_sim(&w);
            kept += z.flushed;
            sim_disk_free(w.disk);
        } while (z.fails_at++ <= z.writes);
    }
    return kept;
}

static void test_qcow2_review__a_failed_growth_loses_nothing(void **state)
{
    (void)state;
    assert_in_range(resize_with_failures(16 * OLD_SIZE, SIM_ERROR), 20, 1000);
    assert_in_range(resize_with_failures(16 * OLD_SIZE, SIM_HANG), 20, 1000);
}

static void test_qcow2_review__a_failed_shrinking_loses_nothing(void **state)
{
    (void)state;
    assert_in_range(resize_with_failures(OLD_SIZE / 2, SIM_ERROR), 20, 1000);
    /* The header's write is the only one: who knows what it does in the end? */
    assert_int_equal(resize_with_failures(OLD_SIZE / 2, SIM_HANG), 0);
}

/* ---- a device whose only free space lies behind many full refcount blocks ---- */

#define DEVICE_SIZE ((uint64_t)4096 * CLUSTER)
#define DISK_SIZE   ((uint64_t)8192 * CLUSTER)
#define HOLE        ((uint64_t)2000 * CLUSTER)

static void fill_device(struct world *w)
{
    uint64_t *last = w->arg;
    uint8_t data[CLUSTER];

    open_top(w, "host_device", "");
    for (*last = 0;; *last += CLUSTER) {
        fill_guest(data, *last, CLUSTER);
        if (write_at(w->backend, *last, CLUSTER, data) < 0)
            break;
    }
    *last -= CLUSTER;
    assert_int_equal(send_request(w->backend, REQUEST_DISCARD, 0, HOLE, CLUSTER, NULL), 0);
    close_top(w);
}

static void use_last_space(struct world *w)
{
    const uint64_t *last = w->arg;

    open_top(w, "host_device", "");
    write_guest(w, HOLE, CLUSTER);
    assert_int_equal(flush(w->backend), 0);
    must_have_guest(w, 0, (size_t)*last + CLUSTER);
    close_top(w);
}

static void test_qcow2_review__the_last_free_cluster_is_found(void **state)
{
    struct qcow2_shape shape = {
        .version = 3, .cluster_bits = 9, .refcount_order = 4, .size = DISK_SIZE};
    struct sim_file_setup setup = {.type = FILE_TYPE_BLOCK, .size = DEVICE_SIZE};
    uint64_t last;
    struct world w = {.disk = sim_disk_new(), .seed = 1, .arg = &last};
    size_t len;
    uint8_t *bytes = qcow2_make(&shape, &len);

    (void)state;
    sim_disk_make(w.disk, TOP, &setup);
    sim_disk_write(w.disk, TOP, 0, bytes, len);
    free(bytes);
    w.body = fill_device;
    in_sim(&w);
    assert_in_range(last, 3000 * CLUSTER, DEVICE_SIZE);
    w.body = use_last_space;
    in_sim(&w);
    sim_disk_free(w.disk);
}

/* ---- more dirty tables than the cache holds, since they cannot be written ---- */

#define SLICE_COVERS ((uint64_t)512 * MIB)

static void dirty_all_of_the_cache(struct world *w)
{
    struct sim_fault fault = {
        .name = TOP, .ops = SIM_OP(IO_SYNC), .kind = SIM_ERROR, .error = EIO, .at = 1, .times = 1};
    uint8_t data[512] = {1};

    open_top(w, "file", ",'l2-cache-size':1048576");
    write_guest(w, 0, 16 * MIB); /* from here on there is enough space that is counted */
    sim_fault_add(&fault);
    for (unsigned i = 1; i < 40; i++)
        (void)write_at(w->backend, i * SLICE_COVERS, sizeof(data), data);
    sim_fault_remove(&fault);
    assert_int_not_equal(flush(w->backend), 0);
    close_top(w);
}

static void test_qcow2_review__tables_that_cannot_be_written_hang_nobody(void **state)
{
    struct qcow2_shape shape = {
        .version = 3, .cluster_bits = 16, .refcount_order = 4, .size = 64 * SLICE_COVERS};
    struct world w = {.disk = sim_disk_new(), .seed = 1, .body = dirty_all_of_the_cache};

    (void)state;
    image_make(w.disk, TOP, &shape);
    in_sim(&w);
    sim_disk_free(w.disk);
}

/* ---- refcounts that are wrong ---- */

#define SMALL_SIZE ((uint64_t)256 * CLUSTER)

static void discard_one_of_two(struct world *w)
{
    open_top(w, "file", "");
    assert_int_equal(send_request(w->backend, REQUEST_DISCARD, 0, 0, CLUSTER, NULL), 0);
    assert_int_equal(flush(w->backend), 0);
    write_guest(w, 2 * CLUSTER, 100 * CLUSTER);
    assert_int_equal(flush(w->backend), 0);
    must_have_guest(w, 2 * CLUSTER, 100 * CLUSTER);
    must_have_guest(w, CLUSTER, CLUSTER);
    close_top(w);
}

/* Two guest clusters share one of the host, as after a crash while a snapshot was made; `count` is what its refcount says. */
static void share_a_cluster(uint16_t count)
{
    struct qcow2_shape shape = {
        .version = 3, .cluster_bits = 9, .refcount_order = 4, .size = SMALL_SIZE, .allocated = 2};
    struct world w = {.disk = sim_disk_new(), .seed = 1, .body = discard_one_of_two};
    size_t len;
    uint8_t *bytes = qcow2_make(&shape, &len);
    uint64_t l1 = load_be64(bytes + 40);
    uint64_t l2 = load_be64(bytes + l1) & 0xfffffffffffe00;
    uint64_t host = load_be64(bytes + l2 + 8) & 0xfffffffffffe00;
    uint64_t block = load_be64(bytes + CLUSTER);

    fill_guest(bytes + host, CLUSTER, CLUSTER);
    store_be64(bytes + l2, host);
    store_be64(bytes + l2 + 8, host);
    store_be16(bytes + block + host / CLUSTER * 2, count);
    image_put(w.disk, TOP, bytes, len);
    free(bytes);
    in_sim(&w);
    sim_disk_free(w.disk);
}

static void test_qcow2_review__shared_clusters_are_not_used_again(void **state)
{
    (void)state;
    share_a_cluster(2);
}
