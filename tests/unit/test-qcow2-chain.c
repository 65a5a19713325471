/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A chain of a thousand qcow2 images (Q3): opened by node names, read to the bottom, copied from on write, described, all on the
 * stacks that coroutines have. Layer i holds cluster i and nothing else.
 *
 *     backend -> l999 -> l998 -> ... -> l1 -> l0
 */
#include "formats/list.h"
#include "protocols/list.h"
#include "qcow2-fixture.h"
#include "sector-log.h"

#define LAYERS  1000
#define CLUSTER 512u

static const struct driver *const *const drivers[] = {protocol_drivers, format_drivers, NULL};

struct chain {
    struct sim_disk *disk;
    struct graph *graph;
    struct backend *backend;
    uint8_t data[LAYERS * CLUSTER];
};

static void path_of(char *path, size_t len, unsigned i)
{
    (void)snprintf(path, len, "/disk/%u.qcow2", i);
}

/* An image whose only cluster is guest cluster i. */
static void make_layer(struct chain *c, unsigned i)
{
    struct qcow2_shape shape = {.version = 3,
                                .cluster_bits = 9,
                                .refcount_order = 4,
                                .size = LAYERS * CLUSTER,
                                .allocated = 1};
    uint64_t l1, l1_entry, l2, l2_entry;
    char path[32];
    uint8_t *bytes;
    size_t len;

    bytes = qcow2_make(&shape, &len);
    l1 = load_be64(bytes + 40);
    l1_entry = load_be64(bytes + l1);
    l2 = l1_entry & 0xfffffffffffe00;
    l2_entry = load_be64(bytes + l2);
    store_be64(bytes + l1, 0);
    store_be64(bytes + l2, 0);
    store_be64(bytes + l1 + i / 64 * 8, l1_entry);
    store_be64(bytes + l2 + i % 64 * 8, l2_entry);
    log_fill(bytes + len - CLUSTER, i, i + 1);
    path_of(path, sizeof(path), i);
    image_put(c->disk, path, bytes, len);
    free(bytes);
}

static void open_chain(struct chain *c)
{
    char name[16], below[16], path[32];

    c->graph = graph_new(drivers);
    for (unsigned i = 0; i < LAYERS; i++) {
        (void)snprintf(name, sizeof(name), "l%u", i);
        (void)snprintf(below, sizeof(below), "l%u", i - 1);
        path_of(path, sizeof(path), i);
        add_layer(c->graph, name, path, i ? below : NULL, i < LAYERS - 1);
    }
    (void)snprintf(name, sizeof(name), "l%u", LAYERS - 1);
    c->backend = must_attach(c->graph, name, ACCESS_RW, "user");
}

static void must_hold(struct chain *c, unsigned from, unsigned to)
{
    for (unsigned i = from; i < to; i++)
        assert_int_equal(log_value(c->data + i * CLUSTER, i), i + 1);
}

static void read_all(struct chain *c)
{
    assert_int_equal(read_at(c->backend, 0, sizeof(c->data), c->data), 0);
    must_hold(c, 0, LAYERS);
}

/* Once it is known which layer answers, nobody else is asked. */
static void must_find_fast(struct chain *c)
{
    uint64_t before = sim_disk_ops(c->disk);

    assert_int_equal(read_at(c->backend, 0, CLUSTER, c->data), 0);
    must_hold(c, 0, 1);
    if (sim_disk_ops(c->disk) - before > 2)
        fail_msg("%" PRIu64 " file operations for a sector at the bottom",
                 sim_disk_ops(c->disk) - before);
}

/* Each layer's cluster is told of as that layer's, and where it lies; a few calls tell of all. */
static void describe(struct chain *c)
{
    struct extent *v = xalloc(2 * LAYERS, sizeof(*v));
    uint64_t pos = 0;
    unsigned calls = 0;

    while (pos < sizeof(c->data)) {
        struct extents e = {.v = v, .max = 2 * LAYERS, .layers = true};
        struct request req = {
            .kind = REQUEST_EXTENTS, .offset = pos, .len = sizeof(c->data) - pos, .extents = &e};

        assert_int_equal(backend_co_request(c->backend, &req), 0);
        assert_true(e.count > 0);
        for (unsigned i = 0; i < e.count; i++) {
            uint8_t sector[CLUSTER];
            const char *path;

            assert_int_equal(v[i].offset, pos);
            assert_true(v[i].flags & EXTENT_DATA);
            assert_true(v[i].flags & EXTENT_OFFSET_VALID);
            assert_int_equal(!!(v[i].flags & EXTENT_ALLOCATED), pos / CLUSTER == LAYERS - 1);
            assert_int_equal(v[i].below, LAYERS - 1 - pos / CLUSTER);
            assert_int_equal(v[i].len, CLUSTER);
            path = node_filename(v[i].host);
            assert_non_null(path);
            assert_true(sim_disk_read(c->disk, path, v[i].host_offset, sector, CLUSTER) >= 0);
            assert_int_equal(log_value(sector, pos / CLUSTER), pos / CLUSTER + 1);
            pos += v[i].len;
        }
        calls++;
    }
    free(v);
    if (calls > 4)
        fail_msg("%u calls to describe %u clusters", calls, LAYERS);
}

/* Half a cluster of the lowest layer, and of one in the middle. */
static void copy_on_write(struct chain *c)
{
    static const unsigned clusters[] = {0, 500};
    uint8_t half[CLUSTER / 2];
    uint8_t expected[CLUSTER];

    for (unsigned i = 0; i < ARRAY_SIZE(clusters); i++) {
        uint64_t at = (uint64_t)clusters[i] * CLUSTER;

        memset(half, 0xab, sizeof(half));
        assert_int_equal(write_at(c->backend, at + 100, sizeof(half), half), 0);
        log_fill(expected, clusters[i], clusters[i] + 1);
        memset(expected + 100, 0xab, sizeof(half));
        assert_int_equal(read_at(c->backend, at, CLUSTER, c->data + at), 0);
        assert_memory_equal(c->data + at, expected, CLUSTER);
    }
    assert_int_equal(flush(c->backend), 0);
    assert_int_equal(read_at(c->backend, 0, sizeof(c->data), c->data), 0);
    must_hold(c, 1, 500);
    must_hold(c, 501, LAYERS);
}

static void use_chain(void *arg)
{
    struct chain *c = arg;
    struct error *err = NULL;
    uint64_t begin;

    open_chain(c);
    /* The lowest first, while nobody knows where anything is. */
    assert_int_equal(read_at(c->backend, 0, CLUSTER, c->data), 0);
    must_hold(c, 0, 1);
    read_all(c);
    must_find_fast(c);
    describe(c);
    copy_on_write(c);
    begin = loop_clock();
    graph_co_look(c->graph);
    assert_true(loop_clock() - begin < 10 * NS_PER_S);
    if (graph_co_resize(c->graph, "l999", (LAYERS + 8) * CLUSTER, &err) < 0)
        fail_msg("%s", error_text(err));
    assert_int_equal(backend_size(c->backend), (LAYERS + 8) * CLUSTER);
    backend_co_free(c->backend);
    must_del(c->graph, "l999");
    graph_co_free(c->graph);
}

static void test_qcow2_chain__a_thousand_layers(void **state)
{
    static struct chain c;
    struct qcow2_verdict v;
    struct sim_options o;

    (void)state;
    c.disk = sim_disk_new();
    for (unsigned i = 0; i < LAYERS; i++)
        make_layer(&c, i);
    sim_options_init(&o, 1);
    o.disk = c.disk;
    o.max_steps *= 10;
    assert_int_equal(sim_run(&o, use_chain, &c), SIM_RETURNED);
    image_judge(c.disk, "/disk/999.qcow2", NO_LEAKS, &v);
    assert_int_equal(v.data_clusters, 3);
    sim_disk_free(c.disk);
}
