/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Overlap protection: images whose tables or refcounts would let a write hit metadata. The write fails, the image is marked, it
 * is told once, and nothing of the metadata has changed.
 */
#include "formats/list.h"
#include "formats/qcow2/qcow2-snapshot.h"
#include "graph/damage.h"
#include "protocols/list.h"
#include "qcow2-fixture.h"

#define TOP      "/disk/top"
#define CLUSTER  ((uint64_t)4096)
#define CLUSTERS 16u /* of the file */
#define DATA     4u  /* guest clusters with a place */
#define SIZE     MIB

/* Where things lie in the image: as qcow2_make() does it, and behind that. */
enum place {
    AT_HEADER,
    AT_REFCOUNT_TABLE,
    AT_REFCOUNT_BLOCK,
    AT_L1,
    AT_L2,
    AT_DATA,
    AT_SNAPSHOTS = AT_DATA + DATA,
    AT_INACTIVE_L1,
    AT_INACTIVE_L2,
    AT_DIRECTORY,
    AT_BITMAP_TABLE,
    AT_FREE,
};

#define COPIED ((uint64_t)1 << 63)

static const struct driver *const *const drivers[] = {protocol_drivers, format_drivers, NULL};

struct world {
    struct sim_disk *disk;
    struct graph *graph;
    struct backend *backend;
    const char *options;
    unsigned told; /* events */
    unsigned told_fatal;
    struct node_damage last;
    char what[200];
    void (*body)(struct world *w);
    /* What the body is to do. */
    uint64_t offset;
    enum place hit;
};

/* ---- images ---- */

static void put_snapshot(uint8_t *image)
{
    uint8_t *e = image + AT_SNAPSHOTS * CLUSTER;

    store_be32(image + 60, 1);
    store_be64(image + 64, AT_SNAPSHOTS * CLUSTER);
    store_be64(e, AT_INACTIVE_L1 * CLUSTER);
    store_be32(e + 8, 1);
    store_be16(e + 12, 1);
    store_be16(e + 14, 1);
    store_be32(e + 36, 16);
    store_be64(e + 48, SIZE);
    memcpy(e + 56, "1s", 2);
    store_be64(image + AT_INACTIVE_L1 * CLUSTER, AT_INACTIVE_L2 * CLUSTER);
}

static void put_bitmap(uint8_t *image)
{
    uint8_t *extension = image + load_be32(image + 100);
    uint8_t *e = image + AT_DIRECTORY * CLUSTER;

    store_be64(image + 88, 1);
    store_be32(extension, 0x23852875);
    store_be32(extension + 4, 24);
    store_be32(extension + 8, 1);
    store_be64(extension + 16, 32);
    store_be64(extension + 24, AT_DIRECTORY * CLUSTER);
    store_be64(e, AT_BITMAP_TABLE * CLUSTER);
    store_be32(e + 8, 1);
    e[16] = 1;
    e[17] = 16;
    store_be16(e + 18, 1);
    e[24] = 'b';
}

static void set_count(uint8_t *image, unsigned cluster, uint16_t count)
{
    store_be16(image + AT_REFCOUNT_BLOCK * CLUSTER + cluster * 2, count);
}

static void set_entry(uint8_t *image, unsigned guest, uint64_t entry)
{
    store_be64(image + AT_L2 * CLUSTER + guest * 8, entry);
}

/* A sound one. The caller's to free. */
static uint8_t *make_image(void)
{
    struct qcow2_shape shape = {
        .version = 3, .cluster_bits = 12, .refcount_order = 4, .size = SIZE, .allocated = DATA};
    size_t len;
    uint8_t *made = qcow2_make(&shape, &len);
    uint8_t *image = xalloc(CLUSTERS, CLUSTER);

    assert_int_equal(len, AT_SNAPSHOTS * CLUSTER);
    memcpy(image, made, len);
    free(made);
    put_snapshot(image);
    put_bitmap(image);
    for (unsigned i = AT_SNAPSHOTS; i < AT_FREE; i++)
        set_count(image, i, 1);
    for (unsigned i = 0; i < DATA; i++)
        memset(image + (AT_DATA + i) * CLUSTER, (int)i + 1, CLUSTER);
    return image;
}

/* ---- nodes ---- */

static void hear(const char *node_name, const struct node_damage *d, void *arg)
{
    struct world *w = arg;

    assert_string_equal(node_name, "top");
    w->told++;
    w->told_fatal += d->fatal;
    w->last = *d;
    (void)snprintf(w->what, sizeof(w->what), "%s", d->what);
}

static void open_top(struct world *w)
{
    w->graph = graph_new(drivers);
    graph_on_damage(w->graph, hear, w);
    must_add(w->graph,
             "{'driver':'qcow2','node-name':'top','discard':'unmap','backing':null,"
             "'file':{'driver':'file','filename':'%s'}%s}",
             TOP, w->options ? w->options : "");
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

/* Runs on a disk with this image, which is freed. */
static void on_image(struct world *w, uint8_t *image)
{
    w->disk = sim_disk_new();
    image_put(w->disk, TOP, image, CLUSTERS * CLUSTER);
    free(image);
    in_sim(w);
}

static uint64_t incompatible(struct world *w)
{
    uint8_t bytes[8];

    assert_int_equal(sim_disk_read(w->disk, TOP, 72, bytes, sizeof(bytes)), 0);
    return load_be64(bytes);
}

static int write_byte(struct world *w, uint64_t offset)
{
    uint8_t data[512];

    memset(data, 0xaa, sizeof(data));
    return write_at(w->backend, offset, sizeof(data), data);
}

static void nothing_works(struct world *w)
{
    uint8_t data[512];

    assert_int_equal(read_at(w->backend, 3 * CLUSTER, sizeof(data), data), -EIO);
    assert_int_equal(write_byte(w, 3 * CLUSTER), -EIO);
    assert_int_equal(write_byte(w, SIZE - CLUSTER), -EIO);
    assert_int_equal(send_request(w->backend, REQUEST_DISCARD, 0, 0, CLUSTER, NULL), -EIO);
    assert_int_equal(send_request(w->backend, REQUEST_WRITE_ZEROES, 0, 0, CLUSTER, NULL), -EIO);
    assert_int_equal(flush(w->backend), -EIO);
}

/* The request at `offset` finds it. */
static void find_it(struct world *w)
{
    uint8_t *before;
    uint8_t *after;
    size_t len;

    open_top(w);
    before = image_load(w->disk, TOP, &len);
    assert_int_equal(write_byte(w, w->offset), -EIO);
    nothing_works(w);
    assert_int_equal(incompatible(w), 2); /* durable, while it is open */
    close_top(w);
    assert_int_equal(w->told, 1);
    assert_int_equal(w->told_fatal, 1);
    after = image_load(w->disk, TOP, &len);
    after[79] = before[79]; /* the mark is all that has changed */
    assert_memory_equal(before, after, AT_FREE * CLUSTER);
    free(before);
    free(after);
}

static void find_it_and_look(struct world *w)
{
    find_it(w);
    w->graph = graph_new(drivers);
    must_refuse(ENOTSUP, "corrupt", w->graph,
                "{'driver':'qcow2','node-name':'top','file':{'driver':'file','filename':'%s'}}",
                TOP);
    must_add(w->graph,
             "{'driver':'qcow2','node-name':'top','read-only':true,"
             "'file':{'driver':'file','filename':'%s'}}",
             TOP);
    graph_co_free(w->graph);
}

/* ---- data that lies in metadata ---- */

static void hit(enum place place, const char *options, const char *says)
{
    struct world w = {.body = find_it_and_look, .options = options, .offset = 512};
    uint8_t *image = make_image();

    set_entry(image, 0, place * CLUSTER | COPIED);
    on_image(&w, image);
    assert_true(w.last.has_place);
    assert_int_equal(w.last.offset, place * CLUSTER + 512);
    assert_int_equal(w.last.size, 512);
    if (!strstr(w.what, says))
        fail_msg("'%s' does not say '%s'", w.what, says);
    sim_disk_free(w.disk);
}

static void test_qcow2_guard__data_in_metadata_is_not_written(void **state)
{
    (void)state;
    hit(AT_REFCOUNT_TABLE, NULL, "the refcount table");
    hit(AT_REFCOUNT_BLOCK, NULL, "a refcount block");
    hit(AT_L1, NULL, "the active L1 table");
    hit(AT_L2, NULL, "an active L2 table");
    hit(AT_SNAPSHOTS, NULL, "the snapshot table");
    hit(AT_INACTIVE_L1, NULL, "an L1 table of a snapshot");
    hit(AT_INACTIVE_L2, ",'overlap-check':'all'", "an L2 table of a snapshot");
    hit(AT_DIRECTORY, NULL, "the bitmap directory");
}

/* ---- what the option names ---- */

static void write_there(struct world *w)
{
    uint8_t data[512];

    open_top(w);
    assert_int_equal(write_byte(w, 512), 0);
    assert_int_equal(read_at(w->backend, 512, sizeof(data), data), 0);
    assert_int_equal(data[0], 0xaa);
    backend_co_free(w->backend);
    graph_co_free(w->graph);
    assert_int_equal(incompatible(w), 0);
    assert_int_equal(w->told, 0);
}

static void do_not_look(enum place place, const char *options)
{
    struct world w = {.body = write_there, .options = options};
    uint8_t *image = make_image();

    set_entry(image, 0, place * CLUSTER | COPIED);
    on_image(&w, image);
    sim_disk_free(w.disk);
}

static void test_qcow2_guard__looks_for_what_the_option_names(void **state)
{
    (void)state;
    do_not_look(AT_SNAPSHOTS, ",'overlap-check':'none'");
    do_not_look(AT_INACTIVE_L2, "");
    do_not_look(AT_INACTIVE_L2, ",'overlap-check':'cached'");
    do_not_look(AT_INACTIVE_L1, ",'overlap-check':'constant'");
    do_not_look(AT_INACTIVE_L1, ",'overlap-check':{'inactive-l1':false}");
    do_not_look(AT_SNAPSHOTS, ",'overlap-check':{'template':'all','snapshot-table':false}");
    hit(AT_SNAPSHOTS, ",'overlap-check':'constant'", "the snapshot table");
    hit(AT_SNAPSHOTS, ",'overlap-check':{'template':'none','snapshot-table':true}", "snapshot");
    hit(AT_L2, ",'overlap-check':{'template':'none','active-l2':true}", "L2");
    hit(AT_INACTIVE_L2, ",'overlap-check':{'inactive-l2':true}", "L2");
}

/* ---- refcounts that call metadata free ---- */

static void free_metadata(enum place place, const char *options, const char *says)
{
    struct world w = {.body = find_it, .options = options, .offset = 100 * CLUSTER};
    uint8_t *image = make_image();

    set_count(image, place, 0);
    on_image(&w, image);
    if (!strstr(w.what, says))
        fail_msg("'%s' does not say '%s'", w.what, says);
    sim_disk_free(w.disk);
}

static void test_qcow2_guard__metadata_is_not_handed_out(void **state)
{
    (void)state;
    free_metadata(AT_HEADER, NULL, "the header");
    free_metadata(AT_REFCOUNT_TABLE, NULL, "the refcount table");
    free_metadata(AT_REFCOUNT_BLOCK, NULL, "a refcount block");
    free_metadata(AT_L1, NULL, "the active L1 table");
    free_metadata(AT_L2, NULL, "an active L2 table");
    free_metadata(AT_SNAPSHOTS, NULL, "the snapshot table");
    free_metadata(AT_INACTIVE_L1, NULL, "an L1 table of a snapshot");
    free_metadata(AT_INACTIVE_L2, ",'overlap-check':'all'", "an L2 table of a snapshot");
    free_metadata(AT_DIRECTORY, NULL, "the bitmap directory");
    free_metadata(AT_L1, ",'overlap-check':'none'", "the active L1 table");
}

/* ---- tables that came later ---- */

/* A mapping to where the file ends: the next table is made there. */
static void write_where_a_table_comes(struct world *w)
{
    open_top(w);
    assert_int_equal(write_byte(w, 512 * CLUSTER), 0); /* has no L2 table yet */
    assert_int_equal(flush(w->backend), 0);
    assert_int_equal(write_byte(w, 0), -EIO);
    assert_int_equal(send_request(w->backend, REQUEST_DISCARD, 0, 4 * MIB, CLUSTER, NULL), -EIO);
    close_top(w);
    assert_int_equal(w->told_fatal, 1);
    assert_int_equal(incompatible(w), 2);
}

static void test_qcow2_guard__new_tables_are_known(void **state)
{
    struct world w = {.body = write_where_a_table_comes};
    uint8_t *image = make_image();

    (void)state;
    store_be64(image + 24, 6 * MIB);
    store_be32(image + 36, 3);
    for (unsigned i = AT_FREE; i < CLUSTERS; i++)
        set_count(image, i, 1);
    set_entry(image, 0, CLUSTERS * CLUSTER | COPIED);
    on_image(&w, image);
    if (!strstr(w.what, "an active L2 table"))
        fail_msg("'%s'", w.what);
    sim_disk_free(w.disk);
}

/* ---- tables that are not used any more ---- */

static void resize_it(struct world *w)
{
    AUTO(error_free) struct error *err = NULL;

    open_top(w);
    assert_int_equal(graph_co_resize(w->graph, "top", 2 * GIB, &err), -EIO);
    assert_int_equal(incompatible(w), 2);
    close_top(w);
}

static void make_snapshot(struct world *w)
{
    const struct qcow2_snapshot_new how = {.name = "n"};
    AUTO(error_free) struct error *err = NULL;

    open_top(w);
    assert_int_equal(qcow2_co_snapshot_create(w->backend, &how, &err), 0);
    assert_int_equal(incompatible(w), 2);
    close_top(w);
}

/* A snapshot's L1 table lies in a table that another one takes the place of: it is not handed out. */
static void replace_table(enum place place, void (*body)(struct world *w))
{
    struct world w = {.body = body};
    uint8_t *image = make_image();

    store_be64(image + AT_SNAPSHOTS * CLUSTER, place * CLUSTER);
    on_image(&w, image);
    assert_int_equal(w.told_fatal, 1);
    if (!strstr(w.what, "an L1 table of a snapshot lies in clusters that are free"))
        fail_msg("'%s'", w.what);
    sim_disk_free(w.disk);
}

static void test_qcow2_guard__old_table_that_is_something_else_is_not_handed_out(void **state)
{
    (void)state;
    replace_table(AT_L1, resize_it);
    replace_table(AT_SNAPSHOTS, make_snapshot);
}

static void refuse_it(struct world *w)
{
    w->graph = graph_new(drivers);
    must_refuse(EIO, "bitmaps", w->graph,
                "{'driver':'qcow2','node-name':'top','file':{'driver':'file','filename':'%s'}}",
                TOP);
    graph_co_free(w->graph);
}

/* It would be written to by the open. */
static void test_qcow2_guard__bitmap_directory_that_is_a_table_is_not_marked(void **state)
{
    struct world w = {.body = refuse_it};
    uint8_t *image = make_image();
    uint8_t flags[4];

    (void)state;
    store_be64(image + AT_L1 * CLUSTER, AT_DIRECTORY * CLUSTER | COPIED);
    on_image(&w, image);
    assert_int_equal(incompatible(&w), 2);
    assert_int_equal(sim_disk_read(w.disk, TOP, AT_DIRECTORY * CLUSTER + 12, flags, 4), 0);
    assert_int_equal(load_be32(flags), 0);
    sim_disk_free(w.disk);
}

/* One table for two entries of the L1 table, each of which claims it alone. */
static void write_both_and_flush(struct world *w)
{
    open_top(w);
    assert_int_equal(write_byte(w, 10 * CLUSTER), 0);
    assert_int_equal(flush(w->backend), -EIO);
    nothing_works(w);
    close_top(w);
    assert_int_equal(w->told_fatal, 1);
    assert_int_equal(incompatible(w), 2);
}

static void test_qcow2_guard__table_that_is_used_twice_is_not_written(void **state)
{
    struct world w = {.body = write_both_and_flush};
    uint8_t *image = make_image();

    (void)state;
    store_be64(image + 24, 4 * MIB);
    store_be32(image + 36, 2);
    store_be64(image + AT_L1 * CLUSTER + 8, AT_L2 * CLUSTER | COPIED);
    on_image(&w, image);
    sim_disk_free(w.disk);
}

/* ---- what is freed ---- */

static void discard_and_flush(struct world *w)
{
    open_top(w);
    assert_int_equal(send_request(w->backend, REQUEST_DISCARD, 0, w->offset, CLUSTER, NULL), 0);
    for (unsigned i = 0; i < 3 && !w->told; i++) {
        (void)flush(w->backend);
        assert_int_equal(co_sleep_until(loop_clock() + NS_PER_S), 0);
    }
    nothing_works(w);
    close_top(w);
    assert_int_equal(w->told, 1);
    assert_int_equal(w->told_fatal, 1);
    assert_int_equal(incompatible(w), 2);
}

static void test_qcow2_guard__freed_cluster_without_refcount_is_damage(void **state)
{
    struct world w = {.body = discard_and_flush, .offset = CLUSTER};
    uint8_t *image = make_image();

    (void)state;
    set_count(image, AT_DATA + 1, 0);
    on_image(&w, image);
    sim_disk_free(w.disk);
}

static void test_qcow2_guard__freed_metadata_is_not_discarded(void **state)
{
    struct world w = {.body = discard_and_flush, .offset = CLUSTER};
    uint8_t *image = make_image();
    uint8_t byte;

    (void)state;
    set_entry(image, 1, AT_SNAPSHOTS * CLUSTER | COPIED);
    on_image(&w, image);
    assert_int_equal(sim_disk_read(w.disk, TOP, AT_SNAPSHOTS * CLUSTER + 56, &byte, 1), 0);
    assert_int_equal(byte, '1');
    sim_disk_free(w.disk);
}

static void copy_on_write(uint64_t entry)
{
    struct world w = {.body = find_it, .offset = CLUSTER};
    uint8_t *image = make_image();

    set_count(image, AT_DATA + 1, 0);
    set_entry(image, 1, entry);
    on_image(&w, image);
    assert_int_equal(w.last.offset, (AT_DATA + 1) * CLUSTER);
    sim_disk_free(w.disk);
}

static void test_qcow2_guard__used_cluster_without_refcount_is_damage(void **state)
{
    (void)state;
    copy_on_write((AT_DATA + 1) * CLUSTER);              /* shared, it says */
    copy_on_write((AT_DATA + 1) * CLUSTER | 1 | COPIED); /* zeroes with a cluster */
}

/* ---- the mark ---- */

static void mark_later(struct world *w)
{
    struct sim_fault fault = {
        .name = TOP, .ops = SIM_OP(IO_WRITE), .kind = SIM_ERROR, .error = EIO, .at = 1, .times = 1};

    open_top(w);
    sim_fault_add(&fault);
    assert_int_equal(write_byte(w, 0), -EIO);
    sim_fault_remove(&fault);
    assert_int_equal(fault.seen, 1);
    assert_int_equal(incompatible(w), 0);
    close_top(w);
    assert_int_equal(incompatible(w), 2);
    assert_int_equal(w->told, 1);
}

static void test_qcow2_guard__mark_that_failed_is_written_at_the_end(void **state)
{
    struct world w = {.body = mark_later};
    uint8_t *image = make_image();

    (void)state;
    set_entry(image, 0, AT_L1 * CLUSTER | COPIED);
    on_image(&w, image);
    sim_disk_free(w.disk);
}

/* ---- damage that only one request meets ---- */

static void read_damage(struct world *w)
{
    uint8_t data[512];

    open_top(w);
    for (unsigned i = 0; i < 3; i++) {
        assert_int_equal(read_at(w->backend, 0, sizeof(data), data), -EIO);
        assert_int_equal(read_at(w->backend, CLUSTER, sizeof(data), data), 0);
        assert_int_equal(write_byte(w, CLUSTER), 0);
        assert_int_equal(co_sleep_until(loop_clock() + NS_PER_S), 0);
    }
    assert_int_equal(w->told, 1);
    assert_false(w->last.fatal);
    assert_int_equal(write_byte(w, 2 * CLUSTER), -EIO); /* worse: told again, and last */
    nothing_works(w);
    assert_int_equal(read_at(w->backend, 0, sizeof(data), data), -EIO);
    close_top(w);
    assert_int_equal(w->told, 2);
    assert_int_equal(w->told_fatal, 1);
}

static void test_qcow2_guard__damaged_entry_is_told_once(void **state)
{
    struct world w = {.body = read_damage};
    uint8_t *image = make_image();

    (void)state;
    set_entry(image, 0, (AT_DATA * CLUSTER + 512) | COPIED);
    set_entry(image, 2, AT_L1 * CLUSTER | COPIED);
    on_image(&w, image);
    sim_disk_free(w.disk);
}
