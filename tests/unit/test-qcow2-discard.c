/* SPDX-License-Identifier: Apache-2.0 */
/* Options of discards: places that are kept (discard-no-unref), and what the host is told (pass-discard-request). */
#include "formats/list.h"
#include "graph/extents.h"
#include "protocols/list.h"
#include "qcow2-fixture.h"

#define TOP  "/disk/top"
#define SIZE ((uint64_t)2 * MIB)

static const struct driver *const *const drivers[] = {protocol_drivers, format_drivers, NULL};

struct world {
    struct sim_disk *disk;
    struct qcow2_shape shape;
    void (*fn)(struct world *w);
    struct graph *graph;
    struct backend *backend;
};

static void run_world(void *arg)
{
    struct world *w = arg;

    w->graph = graph_new(drivers);
    add_layer(w->graph, "top", TOP, NULL, false);
    w->backend = must_attach(w->graph, "top", ACCESS_RW, "test");
    w->fn(w);
    backend_co_free(w->backend);
    graph_co_free(w->graph);
}

static void in_world(void (*fn)(struct world *w), const char *options, bool extended)
{
    struct world w = {.disk = sim_disk_new(), .fn = fn};
    struct qcow2_verdict v;

    w.shape = (struct qcow2_shape){
        .version = 3, .cluster_bits = 16, .refcount_order = 4, .size = SIZE, .extended = extended};
    image_make(w.disk, TOP, &w.shape);
    layer_options = options;
    assert_int_equal(run_on(w.disk, 1, run_world, &w), SIM_RETURNED);
    layer_options = "";
    image_judge(w.disk, TOP, NO_LEAKS, &v);
    sim_disk_free(w.disk);
}

static struct extent look(struct world *w, uint64_t offset)
{
    struct extent e = {.len = 0};
    struct extents found = {.v = &e, .max = 1};
    struct request req = {
        .kind = REQUEST_EXTENTS, .offset = offset, .len = SIZE - offset, .extents = &found};

    check(backend_co_request(w->backend, &req) == 0);
    return e;
}

static void must_write(struct world *w, uint64_t offset, uint64_t len)
{
    uint8_t *data = xalloc(1, len);

    memset(data, 0x5a, len);
    check(write_at(w->backend, offset, len, data) == 0);
    free(data);
}

/* What is at `offset` of the image's file. */
static uint8_t byte_of_file(struct world *w, uint64_t offset)
{
    uint8_t b = 1;

    check(sim_disk_read(w->disk, TOP, offset, &b, 1) >= 0);
    return b;
}

static void keep_places(struct world *w)
{
    struct extent before, after;

    must_write(w, 0, 512 * KIB);
    before = look(w, 256 * KIB);
    check(byte_of_file(w, before.host_offset) == 0x5a);
    check(send_request(w->backend, REQUEST_DISCARD, 0, 256 * KIB, 64 * KIB, NULL) == 0);
    after = look(w, 256 * KIB);
    check(after.flags == (EXTENT_ZERO | EXTENT_ALLOCATED | EXTENT_OFFSET_VALID));
    check(after.host_offset == before.host_offset && after.len == 64 * KIB);
    check(byte_of_file(w, before.host_offset) == 0); /* the space is given back all the same */
    check(flush(w->backend) == 0);
    must_write(w, 1 * MIB, 64 * KIB); /* goes elsewhere */
    must_write(w, 256 * KIB, 64 * KIB);
    after = look(w, 256 * KIB);
    check(after.flags == (EXTENT_DATA | EXTENT_ALLOCATED | EXTENT_OFFSET_VALID));
    check(after.host_offset == before.host_offset);
    check(send_request(w->backend, REQUEST_WRITE_ZEROES, REQUEST_MAY_UNMAP, 320 * KIB, 64 * KIB,
                       NULL) == 0);
    check(look(w, 320 * KIB).host_offset == before.host_offset + 64 * KIB);
}

static void test_qcow2_discard__no_unref_keeps_the_place(void **state)
{
    (void)state;
    in_world(keep_places, "'discard-no-unref':true,", false);
    in_world(keep_places, "'discard-no-unref':true,", true);
}

/* What is cut off goes, whatever the option says: the judge finds no cluster beyond the end. */
static void cut_off(struct world *w)
{
    AUTO(error_free) struct error *err = NULL;
    int64_t before;

    must_write(w, 0, SIZE);
    check(flush(w->backend) == 0);
    before = sim_disk_size(w->disk, TOP);
    w->backend = backend_co_free(w->backend);
    check(graph_co_resize(w->graph, "top", 64 * KIB, &err) == 0);
    check(graph_co_resize(w->graph, "top", SIZE, &err) == 0);
    w->backend = must_attach(w->graph, "top", ACCESS_RW, "test");
    check(look(w, 64 * KIB).flags == EXTENT_ZERO);
    check(flush(w->backend) == 0);
    must_write(w, 64 * KIB, SIZE - 64 * KIB);
    check(flush(w->backend) == 0);
    check(sim_disk_size(w->disk, TOP) <= before);
}

static void test_qcow2_discard__what_is_cut_off_is_freed(void **state)
{
    (void)state;
    in_world(cut_off, "'discard-no-unref':true,", false);
}

static void tell_nobody(struct world *w)
{
    uint64_t host;

    must_write(w, 0, 64 * KIB);
    host = look(w, 0).host_offset;
    check(send_request(w->backend, REQUEST_DISCARD, 0, 0, 64 * KIB, NULL) == 0);
    check(look(w, 0).flags == EXTENT_ZERO);
    for (unsigned i = 0; i < 3; i++)
        check(flush(w->backend) == 0);
    check(byte_of_file(w, host) == 0x5a);
}

static void tell_the_host(struct world *w)
{
    uint64_t host;

    must_write(w, 0, 64 * KIB);
    host = look(w, 0).host_offset;
    check(send_request(w->backend, REQUEST_DISCARD, 0, 0, 64 * KIB, NULL) == 0);
    for (unsigned i = 0; i < 3; i++)
        check(flush(w->backend) == 0);
    check(byte_of_file(w, host) == 0);
}

static void test_qcow2_discard__the_host_is_told_if_it_shall_be(void **state)
{
    (void)state;
    in_world(tell_nobody, "'pass-discard-request':false,", false);
    in_world(tell_the_host, "'pass-discard-request':true,", false);
    in_world(tell_the_host, "", false);
}

static void open_version_2(void *arg)
{
    AUTO(error_free) struct error *err = NULL;
    struct graph *g = graph_new(drivers);

    (void)arg;
    check(add_node(g, &err,
                   "{'driver':'qcow2','node-name':'n','discard-no-unref':true,"
                   "'file':{'driver':'file','filename':'" TOP "'}}") == -EINVAL);
    check(strstr(error_text(err), "version 3"));
    graph_co_free(g);
}

static void test_qcow2_discard__no_unref_needs_version_3(void **state)
{
    struct qcow2_shape shape = {
        .version = 2, .cluster_bits = 16, .refcount_order = 4, .size = SIZE};
    struct sim_options o;

    (void)state;
    sim_options_init(&o, 1);
    o.disk = sim_disk_new();
    image_make(o.disk, TOP, &shape);
    assert_int_equal(sim_run(&o, open_version_2, NULL), SIM_RETURNED);
    sim_disk_free(o.disk);
}
