/* SPDX-License-Identifier: Apache-2.0 */
/* Compressed writes of many clusters at once: some become smaller, some do not, and the last one is there in part. */
#include "base/checked.h"
#include "formats/list.h"
#include "loop/sim/sim.h"
#include "protocols/list.h"
#include "qcow2-fixture.h"
#include "seeds.h"

#include <errno.h>

#define PATH     "/disk/a.qcow2"
#define CLUSTERS 37 /* more than two groups of any size */
#define WRITES   4

static const struct driver *const *const drivers[] = {protocol_drivers, format_drivers, NULL};

struct trial {
    uint64_t size;
    uint64_t cluster;
    uint8_t *data;
    uint64_t compressed; /* clusters */
    struct prng prng;
};

/* Whole clusters of the disk, from a random one on: `data` says what becomes smaller. */
static void fill(struct trial *t, uint64_t from, uint64_t to)
{
    t->compressed = 0;
    for (uint64_t at = from; at < to; at += t->cluster) {
        uint64_t end = MIN(at + t->cluster, to);
        /* The zeroes behind the end of the disk make the last one smaller. */
        bool random = prng_chance(&t->prng, 400) && end - at == t->cluster;
        uint8_t value = (uint8_t)(1 + prng_below(&t->prng, 255));

        for (uint64_t i = at; i < end; i++)
            t->data[i] = random ? (uint8_t)prng_next(&t->prng) : value;
        t->compressed += !random;
    }
}

static void write_and_read(void *arg)
{
    struct trial *t = arg;
    struct graph *g = graph_new(drivers);
    uint8_t *seen = xalloc(1, t->size);
    struct backend *b;

    add_layer(g, "disk", PATH, NULL, false);
    b = must_attach(g, "disk", ACCESS_RW, "test");
    for (unsigned i = 0; i < WRITES; i++) { /* the last one is all of the disk */
        uint64_t from = i + 1 < WRITES ? prng_below(&t->prng, CLUSTERS) * t->cluster : 0;

        fill(t, from, t->size);
        check(send_request(b, REQUEST_WRITE, REQUEST_COMPRESSED, from, t->size - from,
                           t->data + from) == 0);
        check(read_at(b, 0, t->size, seen) == 0);
        check(memcmp(seen, t->data, t->size) == 0);
    }
    backend_co_free(b);
    graph_co_free(g);
    free(seen);
}

static void one_seed(uint64_t seed)
{
    struct trial t = {.prng = {.state = seed}};
    struct qcow2_shape shape = {
        .version = 3, .refcount_order = 4, .zstd = prng_chance(&t.prng, 500)};
    struct qcow2_verdict v;
    struct sim_options o;

    shape.cluster_bits = 9 + (unsigned)prng_below(&t.prng, 8);
    t.cluster = (uint64_t)1 << shape.cluster_bits;
    t.size = shape.size = CLUSTERS * t.cluster - prng_below(&t.prng, t.cluster / 512) * 512;
    t.data = xalloc(1, t.size);
    memset(t.data, 0, t.size);
    sim_options_init(&o, seed);
    o.disk = sim_disk_new();
    image_make(o.disk, PATH, &shape);
    assert_int_equal(sim_run(&o, write_and_read, &t), SIM_RETURNED);
    image_judge(o.disk, PATH, NO_LEAKS, &v);
    assert_int_equal(v.compressed_clusters, t.compressed);
    assert_int_equal(v.data_clusters, CLUSTERS - t.compressed);
    sim_disk_free(o.disk);
    free(t.data);
}

static void test_qcow2_compress__clusters_of_a_request_are_stored_each_as_it_is(void **state)
{
    (void)state;
    TEST_SEEDS (seed)
        one_seed(seed);
}

/* ---- damage ---- */

#define FRAME_HEAD 7 /* bytes, where a frame of 64 KiB says how long it is */
#define TWO        ((uint64_t)2 << 16)

static void write_two(void *arg)
{
    struct graph *g = graph_new(drivers);
    struct backend *b;

    add_layer(g, "disk", PATH, NULL, false);
    b = must_attach(g, "disk", ACCESS_RW, "test");
    check(send_request(b, REQUEST_WRITE, REQUEST_COMPRESSED, 0, TWO, arg) == 0);
    backend_co_free(b);
    graph_co_free(g);
}

static void read_two(void *arg)
{
    struct graph *g = graph_new(drivers);
    const uint8_t *written = arg;
    uint8_t *seen = xalloc(1, TWO / 2);
    struct backend *b;

    add_layer(g, "disk", PATH, NULL, true);
    b = must_attach(g, "disk", (struct access){.wants = ACCESS_READ, .tolerates = ACCESS_ALL},
                    "test");
    for (unsigned i = 0; i < 4; i++) {
        check(read_at(b, 0, TWO / 2, seen) == -EIO);
        check(read_at(b, TWO / 2, TWO / 2, seen) == 0);
        check(memcmp(seen, written + TWO / 2, TWO / 2) == 0);
    }
    backend_co_free(b);
    graph_co_free(g);
    free(seen);
}

/* Whoever decompresses goes on with the next cluster after one that ends in the middle. */
static void test_qcow2_compress__damage_stays_where_it_is(void **state)
{
    static const uint8_t magic[] = {0x28, 0xb5, 0x2f, 0xfd};
    static const uint8_t endless[] = {0x05, 0x53, 0x07}; /* the last block has 60,000 bytes */
    struct qcow2_shape shape = {
        .version = 3, .cluster_bits = 16, .refcount_order = 4, .zstd = true, .size = TWO};
    uint8_t *data = xalloc(1, TWO);
    struct sim_options o;
    uint8_t *image, *frame;
    size_t len;

    (void)state;
    for (uint64_t i = 0; i < TWO; i++)
        data[i] = (uint8_t)((i >> 4) * (i >> 4)); /* some of it becomes smaller */
    sim_options_init(&o, 1);
    o.disk = sim_disk_new();
    image_make(o.disk, PATH, &shape);
    assert_int_equal(sim_run(&o, write_two, data), SIM_RETURNED);
    image = image_load(o.disk, PATH, &len);
    frame = memmem(image, len, magic, sizeof(magic));
    assert_non_null(frame);
    memcpy(frame + FRAME_HEAD, endless, sizeof(endless));
    sim_disk_write(o.disk, PATH, 0, image, len);
    assert_int_equal(sim_run(&o, read_two, data), SIM_RETURNED);
    sim_disk_free(o.disk);
    free(image);
    free(data);
}
