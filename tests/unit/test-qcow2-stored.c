/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What closing an image writes of its bitmaps (STORED-8): what is on the disk already stays where it is, if it is the bitmap's own and
 * says what it should. And how long that may take: as long as the disk gets on.
 */
#include "bitmaps/dirty-bitmap.h"
#include "formats/list.h"
#include "protocols/list.h"
#include "qcow2-fixture.h"
#include "qcow2-see.h"

#define IMAGE_PATH "/disk/image"
#define SIZE       ((uint64_t)16 << 20)
#define BITS       ((size_t)SIZE / 512 / 8)
#define ENTRIES    8
#define COVERS     (SIZE / ENTRIES) /* what an entry stands for */
#define CLUSTER    512
#define DEADLINE   (10 * NS_PER_S) /* of a change */

static const struct driver *const *const drivers[] = {protocol_drivers, format_drivers, NULL};
static const char *const names[] = {"recording", "still"};

enum { RECORDING, STILL };

/* A bitmap as it is on the disk. */
struct stored {
    uint64_t at; /* of its entry in the directory */
    struct see_bitmap entry;
    uint64_t table[ENTRIES];
    struct qcow2_bitmap_seen seen;
    uint8_t bits[BITS];
};

struct world {
    struct sim_disk *disk;
    struct graph *graph;
    struct backend *backend;
    struct stored before[ARRAY_SIZE(names)];
    struct stored after[ARRAY_SIZE(names)];
    void (*body)(struct world *w);
};

/* ---- what is on the disk ---- */

static void look_at(struct world *w, struct stored *ret)
{
    struct qcow2_verdict ignored = {.errors = 0};
    struct see_header h;
    size_t len;
    uint8_t *bytes = image_load(w->disk, IMAGE_PATH, &len);
    struct qcow2_file f = qcow2_file_in_memory(bytes, len);
    uint64_t at;

    check(see_header(&f, &h, &ignored) == 0);
    at = h.bitmaps_offset;
    for (unsigned i = 0; i < h.bitmap_count && i < ARRAY_SIZE(names); i++) {
        struct stored *s = &ret[i];

        s->at = at;
        check(see_bitmap(&f, at, &s->entry) == 0 && s->entry.entries == ENTRIES);
        at = s->entry.end;
        for (unsigned k = 0; k < ENTRIES; k++)
            check(see_entry(&f, s->entry.table + k * 8ull, &s->table[k]) == 0);
        check(qcow2_see_bitmap(&f, i + 1, &s->seen, s->bits, BITS) == 0);
    }
    free(bytes);
}

static bool is_dirty(const struct stored *s, uint64_t offset)
{
    return s->bits[offset / 512 / 8] >> (offset / 512 % 8) & 1;
}

/* ---- sessions ---- */

static void open_it(struct world *w)
{
    w->graph = graph_new(drivers);
    add_layer(w->graph, "top", IMAGE_PATH, NULL, false);
    w->backend = must_attach(w->graph, "top", ACCESS_RW, "writer");
}

static void close_it(struct world *w)
{
    w->backend = backend_co_free(w->backend);
    check(!(w->graph = graph_co_free(w->graph)));
}

static void write_one(struct world *w, uint64_t offset)
{
    uint8_t data[512] = {7};

    check(write_at(w->backend, offset, sizeof(data), data) == 0);
}

static void change(struct world *w, unsigned which, bool remove)
{
    AUTO(error_free) struct error *err = NULL;
    struct dirty_bitmap_ref ref = {"top", names[which]};
    struct dirty_bitmap_action action;
    struct change c;

    change_init(&c, w->graph, "change");
    check((remove ? dirty_bitmap_action_remove(&c, &action, ref, &err)
                  : dirty_bitmap_action_enable(&c, &action, ref, false, &err)) == 0);
    check(change_co_run(&c, &err) == 0);
    change_end(&c);
}

/* Both have something in each of their entries. */
static void first_session(struct world *w)
{
    open_it(w);
    for (unsigned i = 0; i < ARRAY_SIZE(names); i++) {
        AUTO(error_free) struct error *err = NULL;
        struct dirty_bitmap_action action;
        struct change c;

        change_init(&c, w->graph, "add");
        check(dirty_bitmap_action_add(&c, &action, (struct dirty_bitmap_ref){"top", names[i]}, 512,
                                      true, &err) == 0);
        action.persistent = true;
        check(change_co_run(&c, &err) == 0);
        change_end(&c);
        for (unsigned k = 0; k < ENTRIES; k++)
            write_one(w, k * COVERS + 5120);
    }
    change(w, STILL, false);
    close_it(w);
    look_at(w, w->before);
}

static void run_main(void *arg)
{
    struct world *w = arg;

    first_session(w);
    w->body(w);
}

static void run(void (*body)(struct world *w))
{
    static const struct qcow2_shape shape = {
        .version = 3, .cluster_bits = 9, .refcount_order = 4, .size = SIZE};
    struct world *w = xnew(struct world);
    struct sim_options o;

    *w = (struct world){.disk = sim_disk_new(), .body = body};
    image_make(w->disk, IMAGE_PATH, &shape);
    sim_options_init(&o, 1);
    o.disk = w->disk;
    o.disk_max_ns = MIN(o.disk_max_ns, NS_PER_MS);
    check(sim_run(&o, run_main, w) == SIM_RETURNED);
    sim_disk_free(w->disk);
    free(w);
}

/* ---- what stays ---- */

static void judge(struct world *w, enum leaks leaks)
{
    struct qcow2_verdict v;

    image_judge(w->disk, IMAGE_PATH, leaks, &v);
    look_at(w, w->after);
}

/* One granule more, for the one that records. */
static void stays(struct world *w)
{
    const struct stored *recording = &w->after[RECORDING];
    const struct stored *still = &w->after[STILL];

    open_it(w);
    write_one(w, 3 * COVERS);
    close_it(w);
    judge(w, NO_LEAKS);
    check(!recording->seen.in_use && !still->seen.in_use);
    check(still->entry.table == w->before[STILL].entry.table);
    check(memcmp(still->table, w->before[STILL].table, sizeof(still->table)) == 0);
    check(recording->entry.table != w->before[RECORDING].entry.table);
    for (unsigned k = 0; k < ENTRIES; k++)
        check((recording->table[k] == w->before[RECORDING].table[k]) == (k != 3));
    check(is_dirty(recording, 3 * COVERS) && !is_dirty(still, 3 * COVERS));
    check(is_dirty(recording, 3 * COVERS + 5120) && is_dirty(still, 3 * COVERS + 5120));
}

static void test_qcow2_stored__what_did_not_change_stays(void **state)
{
    (void)state;
    run(stays);
}

/* Something has written into the bits, and into the table, of one that did not change. */
static void written_over(struct world *w)
{
    static const uint8_t zeroes[CLUSTER];
    const struct stored *still = &w->after[STILL];

    open_it(w);
    sim_disk_write(w->disk, IMAGE_PATH, w->before[STILL].table[2], zeroes, CLUSTER);
    sim_disk_write(w->disk, IMAGE_PATH, w->before[RECORDING].entry.table, zeroes, CLUSTER);
    close_it(w);
    look_at(w, w->after);
    check(!still->seen.in_use && still->table[2] != w->before[STILL].table[2]);
    for (unsigned k = 0; k < ENTRIES; k++) {
        check(is_dirty(still, k * COVERS + 5120));
        check(is_dirty(&w->after[RECORDING], k * COVERS + 5120));
    }
}

static void test_qcow2_stored__what_is_not_there_any_more_is_written_anew(void **state)
{
    (void)state;
    run(written_over);
}

/* A cluster of both of them, which the refcounts say is used once. */
static void share_a_cluster(struct world *w)
{
    uint8_t entry[8];

    store_be64(entry, w->before[RECORDING].table[0]);
    sim_disk_write(w->disk, IMAGE_PATH, w->before[STILL].entry.table, entry, sizeof(entry));
}

static void shared(struct world *w)
{
    share_a_cluster(w);
    open_it(w);
    write_one(w, 0);
    close_it(w);
    judge(w, LEAKS_ALLOWED); /* what the test has made one of */
    check(w->after[STILL].table[0] == w->before[RECORDING].table[0]);
    check(w->after[RECORDING].table[0] != w->before[RECORDING].table[0]);
    check(is_dirty(&w->after[RECORDING], 0) && is_dirty(&w->after[STILL], 5120));
}

static void test_qcow2_stored__what_another_one_keeps_is_not_given_back(void **state)
{
    (void)state;
    run(shared);
}

/* What was given back with the one is in the pool, and the other one leaves it. */
static void pooled(struct world *w)
{
    share_a_cluster(w);
    open_it(w);
    change(w, RECORDING, true);
    close_it(w);
    look_at(w, w->after);
    check(!w->after[0].seen.in_use && strcmp(w->after[0].seen.name, names[STILL]) == 0);
    check(w->after[0].table[0] != w->before[RECORDING].table[0]);
    check(is_dirty(&w->after[0], 5120));
}

static void test_qcow2_stored__what_is_in_the_pool_does_not_stay(void **state)
{
    (void)state;
    run(pooled);
}

/* ---- how long it may take ---- */

static void count_orphan(const struct node *node, uint64_t age_ns, unsigned unresolved, void *arg)
{
    unsigned *count = arg;

    (void)node;
    (void)age_ns;
    (void)unresolved;
    ++*count;
}

/* The node goes, and how many orphans there are then. */
static unsigned delete (struct world *w, uint64_t *ret_ns)
{
    AUTO(error_free) struct error *err = NULL;
    uint64_t began = loop_clock();
    unsigned orphans = 0;

    w->backend = backend_co_free(w->backend);
    check(graph_co_del(w->graph, "top", &err) == 0);
    graph_for_each_orphan(w->graph, count_orphan, &orphans);
    *ret_ns = loop_clock() - began;
    return orphans;
}

static void slow(struct world *w)
{
    struct sim_fault fault = {.name = IMAGE_PATH,
                              .ops = SIM_OP(IO_WRITE) | SIM_OP(IO_SYNC),
                              .kind = SIM_DELAY,
                              .delay_ns = 2 * NS_PER_S,
                              .at = 1,
                              .times = UINT64_MAX};
    uint64_t ns;

    open_it(w);
    write_one(w, 3 * COVERS);
    sim_fault_add(&fault);
    check(delete (w, &ns) == 0 && ns > 2 * DEADLINE);
    check(graph_closing_gets_on(w->graph));
    sim_fault_remove(&fault);
    check(!(w->graph = graph_co_free(w->graph)));
    judge(w, NO_LEAKS);
    check(!w->after[RECORDING].seen.in_use && is_dirty(&w->after[RECORDING], 3 * COVERS));
}

static void test_qcow2_stored__a_slow_disk_is_waited_for(void **state)
{
    (void)state;
    run(slow);
}

/* After some of it the disk hangs. */
static void hanging(struct world *w)
{
    struct sim_fault fault = {
        .name = IMAGE_PATH, .ops = SIM_OP(IO_WRITE), .kind = SIM_HANG, .at = 4};
    uint64_t ns;

    open_it(w);
    write_one(w, 3 * COVERS);
    sim_fault_add(&fault);
    check(delete (w, &ns) == 1 && ns < DEADLINE + NS_PER_S);
    sim_fault_remove(&fault);
    check(sim_unhang(IMAGE_PATH) == 1);
    check(co_sleep_until(loop_clock() + NS_PER_S) == 0);
    check(!(w->graph = graph_co_free(w->graph)));
    judge(w, NO_LEAKS);
    check(!w->after[RECORDING].seen.in_use && is_dirty(&w->after[RECORDING], 3 * COVERS));
}

static void test_qcow2_stored__a_disk_that_hangs_is_left(void **state)
{
    (void)state;
    run(hanging);
}
