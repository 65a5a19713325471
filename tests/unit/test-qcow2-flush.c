/* SPDX-License-Identifier: Apache-2.0 */
/*
 * How many flushes of the image file a flush of the guest costs (Q4), counted by a filter between the two:
 *
 *     backend -> qcow2 -> watch -> file
 */
#include "crypt-fixture.h"
#include "formats/list.h"
#include "formats/qcow2/qcow2-snapshot.h"
#include "protocols/list.h"
#include "qcow2-fixture.h"

#define CLUSTER ((uint64_t)4096)
#define TOP     "/disk/top"
#define BASE    "/disk/base"
#define DATA    "top.data"
#define ROUNDS  200
#define BATCHES (2 * 4) /* 1 + 2 + 4 + 8 MiB are more than 3200 clusters and their tables */

static const struct driver *const test_drivers[] = {&flush_filter_driver, NULL};
static const struct driver *const *const drivers[] = {test_drivers, protocol_drivers,
                                                      format_drivers, NULL};

enum image_kind { ALONE, OVER_BASE, WITH_DATA_FILE, ENCRYPTED };

struct world {
    enum image_kind kind;
    struct sim_disk *disk;
    struct qcow2_shape shape;
    void (*body)(struct world *w);
    struct graph *graph;
    struct backend *backend;
    uint8_t data[16 * CLUSTER];
};

static void run_world(void *arg)
{
    struct world *w = arg;

    w->graph = graph_new(drivers);
    if (w->kind == OVER_BASE)
        add_layer(w->graph, "base", BASE, NULL, true);
    if (w->kind == ENCRYPTED) {
        crypt_add_secrets(w->graph);
        layer_options = "'encrypt':{'format':'luks','key-secret':'a'},";
    }
    add_watched_layer(w->graph, "top", TOP, w->kind == OVER_BASE ? "base" : NULL,
                      w->kind == WITH_DATA_FILE ? "/disk/" DATA : NULL);
    layer_options = "";
    w->backend = must_attach(w->graph, "top", ACCESS_RW, "guest");
    memset(w->data, 0x5a, sizeof(w->data));
    w->body(w);
    backend_co_free(w->backend);
    graph_co_free(w->graph);
}

static void make_images(struct world *w)
{
    if (w->kind == OVER_BASE) {
        w->shape.allocated = 4096;
        image_make(w->disk, BASE, &w->shape);
        w->shape.allocated = 0;
        w->shape.backing = BASE;
    } else if (w->kind == WITH_DATA_FILE) {
        w->shape.data_file = DATA;
    } else if (w->kind == ENCRYPTED) {
        crypt_put_qcow2(w->disk, TOP, "a", 3, 12, false, w->shape.size);
        return;
    }
    image_make(w->disk, TOP, &w->shape);
}

static void in_world(uint64_t allocated, enum image_kind kind, void (*body)(struct world *w))
{
    static struct world w;
    struct qcow2_verdict v;
    struct sim_options o;

    w = (struct world){.kind = kind, .disk = sim_disk_new(), .body = body};
    w.shape = (struct qcow2_shape){.version = 3,
                                   .cluster_bits = 12,
                                   .refcount_order = 4,
                                   .size = 4096 * CLUSTER,
                                   .allocated = allocated};
    make_images(&w);
    sim_options_init(&o, 1);
    o.disk = w.disk;
    o.max_steps *= 10;
    assert_int_equal(sim_run(&o, run_world, &w), SIM_RETURNED);
    image_judge(w.disk, TOP, NO_LEAKS, &v);
    sim_disk_free(w.disk);
}

static void must_write(struct world *w, uint64_t offset, uint64_t len)
{
    assert_int_equal(write_at(w->backend, offset, len, w->data), 0);
}

/* Flushes of the file that this flush of the guest makes. */
static unsigned cost_of_flush(struct world *w)
{
    unsigned before = flush_watch.flushes;

    assert_int_equal(flush(w->backend), 0);
    return flush_watch.flushes - before;
}

static void must_not_flush(unsigned before)
{
    assert_int_equal(flush_watch.flushes - before, 0);
}

static void overwrite(struct world *w)
{
    must_write(w, 0, CLUSTER); /* whatever the first write to an image costs */
    (void)cost_of_flush(w);
    for (unsigned i = 0; i < ROUNDS; i++) {
        unsigned before = flush_watch.flushes;

        for (unsigned k = 0; k < 8; k++)
            must_write(w, (i * 8 + k) % 2048 * CLUSTER + k * 100, CLUSTER);
        must_not_flush(before);
        assert_int_equal(cost_of_flush(w), 1);
    }
}

static void test_qcow2_flush__overwrites_cost_one(void **state)
{
    (void)state;
    in_world(4096, ALONE, overwrite);
}

/*
 * 200 guest flushes that cover 3200 new clusters cost 200. The writes themselves cost one flush, or two if there must be a new
 * refcount block, for each batch of refcounts that is made durable ahead: of 1 MiB of clusters, 2 MiB, 4 MiB, ...
 */
static void allocate_fresh(struct world *w)
{
    unsigned before = flush_watch.flushes;
    unsigned more;

    for (unsigned i = 0; i < ROUNDS; i++) {
        must_write(w, i * 16 * CLUSTER, 16 * CLUSTER);
        assert_int_equal(cost_of_flush(w), 1);
    }
    more = flush_watch.flushes - before - ROUNDS;
    print_message("# %u flushes more than %u, for 3200 clusters\n", more, ROUNDS);
    assert_in_range(more, 0, BATCHES);
}

static void test_qcow2_flush__fresh_space_costs_one(void **state)
{
    (void)state;
    in_world(0, ALONE, allocate_fresh);
}

/* Nothing lies below: what a partial write leaves of its cluster need not be copied from anywhere. */
static void allocate_in_part(struct world *w)
{
    unsigned before = flush_watch.flushes;
    unsigned more;

    for (unsigned i = 0; i < ROUNDS; i++) {
        for (unsigned k = 0; k < 16; k++)
            must_write(w, (i * 16 + k) * CLUSTER + 512, 512);
        assert_int_equal(cost_of_flush(w), 1);
    }
    more = flush_watch.flushes - before - ROUNDS;
    print_message("# %u flushes more than %u, for 3200 clusters in part\n", more, ROUNDS);
    assert_in_range(more, 0, BATCHES);
}

static void test_qcow2_flush__fresh_space_in_part_costs_one(void **state)
{
    (void)state;
    in_world(0, ALONE, allocate_in_part);
}

static void copy_on_write(struct world *w)
{
    unsigned before = flush_watch.flushes;

    for (unsigned i = 0; i < ROUNDS; i++) {
        for (unsigned k = 0; k < 16; k++)
            must_write(w, (i * 16 + k) * CLUSTER + 512, 512);
        assert_in_range(cost_of_flush(w), 1, 2);
    }
    print_message("# %u flushes for %u of the guest, with copies\n", flush_watch.flushes - before,
                  ROUNDS);
    /* Refcounts go ahead in batches, here as well. */
    assert_in_range(flush_watch.flushes - before, ROUNDS, 2 * ROUNDS + ROUNDS / 10);
}

static void test_qcow2_flush__copies_cost_two(void **state)
{
    (void)state;
    in_world(0, OVER_BASE, copy_on_write);
}

/* Space that was freed is used again. */
static void reuse(struct world *w)
{
    unsigned before;

    for (unsigned i = 0; i < 16; i++)
        must_write(w, i * 16 * CLUSTER, 16 * CLUSTER);
    (void)cost_of_flush(w);
    before = flush_watch.flushes;
    for (unsigned i = 0; i < ROUNDS; i++) {
        uint64_t at = i % 16 * 16 * CLUSTER;

        assert_int_equal(send_request(w->backend, REQUEST_DISCARD, 0, at, 16 * CLUSTER, NULL), 0);
        must_write(w, at, 16 * CLUSTER);
        assert_in_range(cost_of_flush(w), 1, 2);
    }
    print_message("# %u flushes for %u of the guest, with space used again\n",
                  flush_watch.flushes - before, ROUNDS);
    assert_in_range(flush_watch.flushes - before, ROUNDS, 2 * ROUNDS + ROUNDS / 10);
}

static void test_qcow2_flush__space_used_again_costs_two(void **state)
{
    (void)state;
    in_world(0, ALONE, reuse);
}

/* A write with FUA to what is allocated is one write with FUA, and no more. */
static void write_through(struct world *w)
{
    must_write(w, 0, CLUSTER);
    (void)cost_of_flush(w);
    for (unsigned i = 0; i < ROUNDS; i++) {
        unsigned before = flush_watch.flushes;

        assert_int_equal(
            send_request(w->backend, REQUEST_WRITE, REQUEST_FUA, i * CLUSTER, CLUSTER, w->data), 0);
        assert_int_equal(flush_watch.flushes - before, 1);
    }
}

static void test_qcow2_flush__fua_costs_one(void **state)
{
    (void)state;
    in_world(4096, ALONE, write_through);
}

/* ---- the rest of the table: two at most, however many there are ---- */

#define SOME 16 /* clusters in each round */

/* After as many rounds as that: they come in batches of refcounts, of which a few cost more. */
static void must_cost(struct world *w, unsigned least, unsigned most, uint64_t kind, unsigned flags)
{
    unsigned before = flush_watch.flushes;

    for (unsigned i = 0; i < ROUNDS; i++) {
        for (unsigned k = 0; k < SOME; k++) {
            const void *data = kind == REQUEST_WRITE ? w->data : NULL;

            assert_int_equal(send_request(w->backend, (enum request_kind)kind, flags,
                                          (i * SOME + k) * CLUSTER, CLUSTER, data),
                             0);
        }
        assert_in_range(cost_of_flush(w), least, most);
    }
    print_message("# %u flushes for %u of the guest\n", flush_watch.flushes - before, ROUNDS);
    assert_in_range(flush_watch.flushes - before, ROUNDS * least, ROUNDS * most + ROUNDS / 10);
}

static void zero_and_discard(struct world *w)
{
    must_cost(w, 1, 2, REQUEST_WRITE_ZEROES, 0);
    must_cost(w, 1, 2, REQUEST_WRITE, 0);
    must_cost(w, 1, 2, REQUEST_WRITE_ZEROES, REQUEST_MAY_UNMAP);
    must_cost(w, 1, 2, REQUEST_WRITE, 0);
    must_cost(w, 1, 2, REQUEST_DISCARD, 0);
}

static void test_qcow2_flush__zeroes_and_discards_cost_two_at_most(void **state)
{
    (void)state;
    in_world(4096, ALONE, zero_and_discard);
}

static void compress(struct world *w)
{
    must_cost(w, 2, 2, REQUEST_WRITE, REQUEST_COMPRESSED);
}

static void test_qcow2_flush__compressed_clusters_cost_two(void **state)
{
    (void)state;
    in_world(0, ALONE, compress);
}

/* Of clusters, and of their tables. */
static void write_what_is_kept(struct world *w)
{
    struct qcow2_snapshot_new how = {.name = "kept", .date_s = 1};
    struct error *err = NULL;

    assert_int_equal(qcow2_co_snapshot_create(w->backend, &how, &err), 0);
    must_cost(w, 1, 2, REQUEST_WRITE, 0);
}

static void test_qcow2_flush__what_snapshots_hold_costs_two(void **state)
{
    (void)state;
    in_world(4096, ALONE, write_what_is_kept);
}

/* DATA-2: that of the data file comes first, and is the one that mappings wait for. */
static void write_to_data_file(struct world *w)
{
    must_cost(w, 2, 2, REQUEST_WRITE, 0);
    must_cost(w, 1, 1, REQUEST_WRITE, 0); /* over it */
}

static void test_qcow2_flush__data_file_costs_one_each(void **state)
{
    (void)state;
    in_world(0, WITH_DATA_FILE, write_to_data_file);
}

static void write_encrypted(struct world *w)
{
    must_cost(w, 2, 2, REQUEST_WRITE, 0);
    must_cost(w, 1, 1, REQUEST_WRITE, 0); /* over it */
}

static void test_qcow2_flush__encrypted_allocations_cost_two(void **state)
{
    (void)state;
    in_world(0, ENCRYPTED, write_encrypted);
}
