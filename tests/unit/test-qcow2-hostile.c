/* SPDX-License-Identifier: Apache-2.0 */
/* Images that were made to cost whoever opens them time. */
#include "formats/list.h"
#include "protocols/list.h"
#include "qcow2-fixture.h"

#include <time.h>

#define TOP       "/disk/top"
#define TABLES    ((uint64_t)1 << 16) /* entries of the L1 table */
#define DISK_SIZE (TABLES * 512 / 8 * 512)

static const struct driver *const *const drivers[] = {protocol_drivers, format_drivers, NULL};

/* ---- an L1 table whose entries all want the same slots of a hash table ---- */

/* What a hash table with this multiplier puts into a 256th of its slots. */
#define KNOWN_MULTIPLIER UINT64_C(0x9e3779b97f4a7c15)

static bool is_crowded(uint64_t cluster)
{
    return !(cluster * KNOWN_MULTIPLIER >> 56);
}

static bool is_spread(uint64_t cluster)
{
    (void)cluster;
    return true;
}

static void open_for_writing(void *arg)
{
    struct graph *graph = graph_new(drivers);

    (void)arg;
    must_add(graph, "{'driver':'qcow2','node-name':'top','file':{'driver':'file','filename':'%s'}}",
             TOP);
    graph_co_free(graph);
}

/* CPU time of opening an image whose L1 table points to such clusters, far behind the end of the file. */
static double time_of(bool (*wanted)(uint64_t cluster))
{
    struct qcow2_shape shape = {
        .version = 3, .cluster_bits = 9, .refcount_order = 4, .size = DISK_SIZE};
    struct sim_disk *disk = sim_disk_new();
    struct sim_options o;
    uint64_t cluster = (uint64_t)1 << 24;
    clock_t begun;
    size_t len;
    uint8_t *image = qcow2_make(&shape, &len);
    uint8_t *l1 = image + load_be64(image + 40);

    assert_int_equal(load_be32(image + 36), TABLES);
    for (uint64_t i = 0; i < TABLES; i++) {
        while (!wanted(cluster))
            cluster++;
        store_be64(l1 + i * 8, cluster++ << 9);
    }
    image_put(disk, TOP, image, len);
    free(image);
    sim_options_init(&o, 1);
    o.disk = disk;
    begun = clock();
    assert_int_equal(sim_run(&o, open_for_writing, NULL), SIM_RETURNED);
    sim_disk_free(disk);
    return (double)(clock() - begun) / CLOCKS_PER_SEC;
}

/* GUARD-1, P6: a table that is looked into at each write is not slow for whom an image wants it to be. */
static void test_qcow2_hostile__tables_that_want_the_same_slots(void **state)
{
    double spread = time_of(is_spread);
    double crowded = time_of(is_crowded);

    (void)state;
    if (crowded > 0.2 + 5 * spread)
        fail_msg("the image takes %.2f s to open, another one %.2f s", crowded, spread);
}
