/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Subclusters: what a write copies, what zeroes and discards change, and what is said of them. The top has clusters of 128 KiB, and
 * so units of 4 KiB; it lies over a base with a value in each sector.
 */
#include "formats/list.h"
#include "graph/extents.h"
#include "protocols/list.h"
#include "qcow2-fixture.h"

#define TOP     "/disk/top"
#define BASE    "/disk/base"
#define UNIT    ((uint64_t)4 * KIB)
#define CLUSTER ((uint64_t)128 * KIB)
#define SIZE    (4 * CLUSTER)

static const struct driver *const test_drivers[] = {&flush_filter_driver, NULL};
static const struct driver *const *const drivers[] = {test_drivers, protocol_drivers,
                                                      format_drivers, NULL};

struct world {
    struct sim_disk *disk;
    bool has_base;
    void (*fn)(struct world *w);
    struct graph *graph;
    struct backend *backend;
};

static uint8_t base_byte(uint64_t offset)
{
    return (uint8_t)(1 + offset / 512 % 250);
}

static void run_world(void *arg)
{
    struct world *w = arg;

    flush_watch = (struct flush_watch){.flushes = 0};
    w->graph = graph_new(drivers);
    if (w->has_base)
        add_layer(w->graph, "base", BASE, NULL, true);
    add_watched_layer(w->graph, "top", TOP, w->has_base ? "base" : NULL, NULL);
    w->backend = must_attach(w->graph, "top", ACCESS_RW, "test");
    w->fn(w);
    backend_co_free(w->backend);
    graph_co_free(w->graph);
}

static void in_world(void (*fn)(struct world *w), bool has_base, uint64_t allocated)
{
    struct world w = {.disk = sim_disk_new(), .has_base = has_base, .fn = fn};
    struct qcow2_shape base = {.version = 3, .cluster_bits = 9, .refcount_order = 4, .size = SIZE};
    struct qcow2_shape top = {.version = 3,
                              .cluster_bits = 17,
                              .refcount_order = 4,
                              .size = SIZE,
                              .extended = true,
                              .allocated = allocated,
                              .backing = has_base ? BASE : NULL};
    struct qcow2_verdict v;
    uint8_t *bytes;
    size_t len;

    base.allocated = SIZE / 512;
    bytes = qcow2_make(&base, &len);
    for (uint64_t i = 0; i < SIZE; i++)
        bytes[len - SIZE + i] = base_byte(i);
    image_put(w.disk, BASE, bytes, len);
    free(bytes);
    image_make(w.disk, TOP, &top);
    assert_int_equal(run_on(w.disk, 1, run_world, &w), SIM_RETURNED);
    image_judge(w.disk, TOP, NO_LEAKS, &v);
    sim_disk_free(w.disk);
}

static void must_write(struct world *w, uint64_t offset, uint64_t len, uint8_t value)
{
    uint8_t *data = xalloc(1, len);

    memset(data, value, len);
    check(write_at(w->backend, offset, len, data) == 0);
    free(data);
}

/* 0 as `value`: what the base holds. */
static void must_read(struct world *w, uint64_t offset, uint64_t len, int value)
{
    uint8_t *data = xalloc(1, len);

    check(read_at(w->backend, offset, len, data) == 0);
    for (uint64_t i = 0; i < len; i++)
        check(data[i] == (value < 0 ? base_byte(offset + i) : value));
    free(data);
}

static void must_send(struct world *w, enum request_kind kind, unsigned flags, uint64_t offset,
                      uint64_t len)
{
    check(send_request(w->backend, kind, flags, offset, len, NULL) == 0);
}

/* What is at `offset`, and how far it goes. */
static void must_extend(struct world *w, uint64_t offset, unsigned flags, uint64_t len)
{
    struct extent e = {.len = 0};
    struct extents found = {.v = &e, .max = 1};
    struct request req = {
        .kind = REQUEST_EXTENTS, .offset = offset, .len = SIZE - offset, .extents = &found};

    check(backend_co_request(w->backend, &req) == 0);
    e.flags &= EXTENT_DATA | EXTENT_ZERO | EXTENT_ALLOCATED;
    if (e.flags != flags || e.len != len) {
        fprintf(stderr, "at %" PRIu64 ": %x for %" PRIu64 ", not %x for %" PRIu64 "\n", offset,
                e.flags, e.len, flags, len);
        abort();
    }
}

/* ---- a write copies its subclusters at most ---- */

static void one_unit(struct world *w)
{
    unsigned reads;

    must_write(w, CLUSTER + 8 * UNIT, UNIT, 0xaa); /* whole: nothing is copied */
    must_read(w, CLUSTER, 8 * UNIT, -1);
    must_read(w, CLUSTER + 8 * UNIT, UNIT, 0xaa);
    must_read(w, CLUSTER + 9 * UNIT, CLUSTER - 9 * UNIT, -1);
    must_extend(w, CLUSTER + 8 * UNIT, EXTENT_DATA | EXTENT_ALLOCATED, UNIT);
    must_write(w, CLUSTER + 100, 1, 0xbb); /* its subcluster is copied */
    must_read(w, CLUSTER, 100, -1);
    must_read(w, CLUSTER + 100, 1, 0xbb);
    must_read(w, CLUSTER + 101, 8 * UNIT - 101, -1);
    must_extend(w, CLUSTER, EXTENT_DATA | EXTENT_ALLOCATED, UNIT);
    must_extend(w, CLUSTER + UNIT, EXTENT_DATA, 7 * UNIT); /* below */
    reads = flush_watch.reads;
    must_write(w, CLUSTER + 6 * UNIT + 50, 2 * UNIT + 50, 0xcc); /* two are new, one in place */
    check(flush_watch.reads == reads); /* where others may write in place nothing is copied */
    must_read(w, CLUSTER + 6 * UNIT, 50, -1);
    must_read(w, CLUSTER + 6 * UNIT + 50, 2 * UNIT + 50, 0xcc);
    must_read(w, CLUSTER + 8 * UNIT + 100, UNIT - 100, 0xaa);
    must_extend(w, CLUSTER + 6 * UNIT, EXTENT_DATA | EXTENT_ALLOCATED, 3 * UNIT);
}

static void test_qcow2_subcluster__copies_no_more_than_subclusters(void **state)
{
    (void)state;
    in_world(one_unit, true, 0);
}

/* ---- zeroes and discards ---- */

static void clear_units(struct world *w)
{
    must_write(w, 0, CLUSTER, 0x11);
    must_send(w, REQUEST_WRITE_ZEROES, 0, 4 * UNIT, 2 * UNIT);
    must_send(w, REQUEST_DISCARD, 0, 10 * UNIT + 1, 3 * UNIT); /* two of them as a whole */
    must_extend(w, 0, EXTENT_DATA | EXTENT_ALLOCATED, 4 * UNIT);
    must_extend(w, 4 * UNIT, EXTENT_ZERO | EXTENT_ALLOCATED, 2 * UNIT);
    must_extend(w, 6 * UNIT, EXTENT_DATA | EXTENT_ALLOCATED, 5 * UNIT);
    must_extend(w, 11 * UNIT, EXTENT_ZERO | EXTENT_ALLOCATED, 2 * UNIT);
    must_read(w, 4 * UNIT, 2 * UNIT, 0);
    must_read(w, 10 * UNIT, UNIT, 0x11);
    must_send(w, REQUEST_WRITE_ZEROES, REQUEST_MAY_UNMAP, 2 * UNIT + 512, UNIT); /* of two a part */
    must_read(w, 2 * UNIT, 512, 0x11);
    must_read(w, 2 * UNIT + 512, UNIT, 0);
    must_read(w, 3 * UNIT + 512, UNIT - 512, 0x11);
    must_extend(w, 0, EXTENT_DATA | EXTENT_ALLOCATED, 4 * UNIT);
    must_write(w, 5 * UNIT + 700, 100, 0x22); /* what is zero comes back as data */
    must_read(w, 5 * UNIT, 700, 0);
    must_read(w, 5 * UNIT + 700, 100, 0x22);
    must_read(w, 5 * UNIT + 800, UNIT - 800, 0);
    must_send(w, REQUEST_WRITE_ZEROES, 0, CLUSTER + UNIT, 3 * UNIT); /* where nothing was */
    must_extend(w, CLUSTER + UNIT, EXTENT_ZERO | EXTENT_ALLOCATED, 3 * UNIT);
    must_read(w, CLUSTER, UNIT, -1);
    must_read(w, CLUSTER + 4 * UNIT, UNIT, -1);
}

static void test_qcow2_subcluster__zeroes_and_discards_go_by_subclusters(void **state)
{
    (void)state;
    in_world(clear_units, true, 0);
}

/* When the last subcluster with data goes, so does the cluster: the close finds no leak, and the file is as small as before. */
static void free_by_units(struct world *w)
{
    int64_t before;

    check(flush(w->backend) == 0);
    before = sim_disk_size(w->disk, TOP);
    for (unsigned i = 0; i < 200; i++) {
        must_write(w, 3 * UNIT, 2 * UNIT, (uint8_t)i);
        must_send(w, REQUEST_DISCARD, 0, 3 * UNIT, UNIT);
        must_send(w, REQUEST_DISCARD, 0, 4 * UNIT, UNIT);
        must_extend(w, 3 * UNIT, EXTENT_ZERO | EXTENT_ALLOCATED, 2 * UNIT);
        must_extend(w, 5 * UNIT, EXTENT_DATA, SIZE - 5 * UNIT);
        check(flush(w->backend) == 0);
    }
    check(sim_disk_size(w->disk, TOP) <= before + (int64_t)(16 * MIB));
}

static void test_qcow2_subcluster__the_last_one_frees_the_cluster(void **state)
{
    (void)state;
    in_world(free_by_units, true, 0);
}

/* ---- a part of a compressed cluster ---- */

static void part_of_compressed(struct world *w)
{
    uint8_t *data = xalloc(1, CLUSTER);

    memset(data, 0x33, CLUSTER);
    check(send_request(w->backend, REQUEST_WRITE, REQUEST_COMPRESSED, 0, CLUSTER, data) == 0);
    must_send(w, REQUEST_DISCARD, 0, UNIT, UNIT); /* stays */
    must_read(w, 0, CLUSTER, 0x33);
    must_send(w, REQUEST_WRITE_ZEROES, REQUEST_MAY_UNMAP, 2 * UNIT, UNIT);
    must_read(w, 0, 2 * UNIT, 0x33);
    must_read(w, 2 * UNIT, UNIT, 0);
    must_read(w, 3 * UNIT, CLUSTER - 3 * UNIT, 0x33);
    free(data);
}

static void test_qcow2_subcluster__zeroes_in_compressed_clusters_are_written(void **state)
{
    (void)state;
    in_world(part_of_compressed, true, 0);
}

/* ---- flushes (Q4) ---- */

static void count_flushes(struct world *w)
{
    unsigned before;

    must_write(w, 0, UNIT, 1); /* makes table and space ready */
    check(flush(w->backend) == 0);
    before = flush_watch.flushes;
    must_write(w, UNIT, UNIT, 2); /* all of the cluster read as zeroes, and is data now */
    check(flush(w->backend) == 0);
    check(flush_watch.flushes == before + 1);
    must_write(w, CLUSTER + UNIT, UNIT, 3); /* fresh space */
    check(flush(w->backend) == 0);
    check(flush_watch.flushes == before + 2);
}

static void test_qcow2_subcluster__fresh_space_costs_one_flush(void **state)
{
    (void)state;
    in_world(count_flushes, false, 0);
}

/* ---- what cannot be (P6) ---- */

static void read_damaged(struct world *w)
{
    uint8_t data[512];

    check(read_at(w->backend, 0, 512, data) == -EIO);
    check(write_at(w->backend, UNIT, 512, data) == -EIO);
    must_read(w, CLUSTER, UNIT, 0);
}

static void damaged(uint64_t entry, uint64_t bits)
{
    struct world w = {.disk = sim_disk_new(), .fn = read_damaged};
    struct qcow2_shape top = {.version = 3,
                              .cluster_bits = 17,
                              .refcount_order = 4,
                              .size = SIZE,
                              .extended = true,
                              .allocated = 2};
    uint8_t *bytes;
    uint64_t l2;
    size_t len;

    bytes = qcow2_make(&top, &len);
    l2 = load_be64(bytes + load_be64(bytes + 40)) & ~((uint64_t)1 << 63);
    store_be64(bytes + l2, entry == 1 ? load_be64(bytes + l2) | 1 : entry);
    store_be64(bytes + l2 + 8, bits);
    image_put(w.disk, TOP, bytes, len);
    free(bytes);
    assert_int_equal(run_on(w.disk, 1, run_world, &w), SIM_RETURNED);
    sim_disk_free(w.disk);
}

static void test_qcow2_subcluster__bits_that_cannot_be_are_damage(void **state)
{
    (void)state;
    damaged(0, 1);                          /* data nowhere */
    damaged(0, UINT64_C(1) << 32 | 1);      /* both */
    damaged(1, UINT32_MAX);                 /* the zero flag of other images */
    damaged(UINT64_C(1) << 50, UINT32_MAX); /* beyond the file */
}
