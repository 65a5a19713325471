/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Dirty bitmaps of nodes: what requests leave in them (C2), actions of one change, successors (I6), and a chain of bitmaps
 * under load that misses nothing (P2). The node is a driver of the test's own, which calls the test back in the middle of a
 * change.
 */
#include "base/atomic.h"
#include "base/prng.h"
#include "bitmaps/dirty-bitmap.h"
#include "check.h"
#include "graph-fixture.h"
#include "loop/sim/sim.h"
#include "null-co-options.h"
#include "seeds.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>

#define DISK_SIZE (MIB)
#define BLOCK     ((uint64_t)4096)
#define BLOCKS    64u

/* ---- the node ---- */

static struct {
    void (*during)(struct graph *g); /* in the middle of each change */
    struct graph *graph;
    int result;
    bool naps;
    uint32_t versions[BLOCKS]; /* atomic: of the first blocks; a write makes one more */
} disk;

static int disk_co_open(struct node *node, const void *options, struct error **err)
{
    const struct null_co_options *opt = options;

    (void)err;
    node_set_size(node, opt->size);
    return 0;
}

static void disk_co_close(struct node *node)
{
    (void)node;
}

static int disk_co_change(struct node *node, struct request *req)
{
    uint64_t block = req->offset / BLOCK;

    (void)node;
    if (disk.naps)
        (void)co_sleep_until(loop_clock() + 10 * NS_PER_US);
    if (block < BLOCKS)
        (void)atomic_add(&disk.versions[block], 1u);
    if (disk.naps)
        (void)co_sleep_until(loop_clock() + 10 * NS_PER_US);
    if (disk.during)
        disk.during(disk.graph);
    return disk.result;
}

static int disk_co_resize(struct node *node, struct request *req)
{
    int r = disk.result;

    node_set_size(node, req->offset);
    disk.result = 0; /* the way back goes well */
    return r;
}

static int disk_co_nothing(struct node *node, struct request *req)
{
    (void)node;
    (void)req;
    return 0;
}

static const struct driver disk_driver = {
    .name = "null-co",
    .kind = DRIVER_PROTOCOL,
    .options = &null_co_options_type,
    .state_size = 1,
    .co_open = disk_co_open,
    .co_close = disk_co_close,
    .co_read = disk_co_nothing,
    .co_write = disk_co_change,
    .co_write_zeroes = disk_co_change,
    .co_discard = disk_co_change,
    .co_flush = disk_co_nothing,
    .co_resize = disk_co_resize,
};

static const struct driver *const list[] = {&disk_driver, NULL};
static const struct driver *const *const drivers[] = {list, NULL};

static void add_disk(struct graph *g, const char *name)
{
    must_add(g, "{'driver':'null-co','node-name':'%s','size':%" PRIu64 ",'discard':'unmap'}", name,
             (uint64_t)DISK_SIZE);
}

static struct graph *begin(void)
{
    struct graph *g = graph_new(drivers);

    memset(&disk, 0, sizeof(disk));
    disk.graph = g;
    add_disk(g, "d");
    add_disk(g, "e");
    return g;
}

/* ---- changes in a line ---- */

struct tx {
    struct change change;
    struct dirty_bitmap_action actions[8];
    unsigned count;
    int result;
    struct error *err;
};

static struct dirty_bitmap_ref named(const char *name)
{
    return (struct dirty_bitmap_ref){.node = "d", .name = name};
}

static void tx_begin(struct tx *t, struct graph *g)
{
    memset(t, 0, sizeof(*t));
    change_init(&t->change, g, "change");
}

/* tx_do(t, clear, named("a")) */
#define tx_do(t, what, ...)                                                                        \
    do {                                                                                           \
        if ((t)->result == 0)                                                                      \
            (t)->result = dirty_bitmap_action_##what(&(t)->change, &(t)->actions[(t)->count++],    \
                                                     __VA_ARGS__, &(t)->err);                      \
    } while (0)

static int tx_end(struct tx *t)
{
    if (t->result == 0)
        t->result = change_co_run(&t->change, &t->err);
    change_end(&t->change);
    return t->result;
}

static void tx_must(struct tx *t)
{
    if (tx_end(t) < 0)
        fail_msg("%s", error_text(t->err));
}

static void tx_refused(struct tx *t, int errnum, const char *text)
{
    assert_int_equal(tx_end(t), -errnum);
    must_say(t->err, text);
    error_free(&t->err);
}

#define must(g, what, ...)                                                                         \
    do {                                                                                           \
        struct tx must_tx;                                                                         \
                                                                                                   \
        tx_begin(&must_tx, (g));                                                                   \
        tx_do(&must_tx, what, __VA_ARGS__);                                                        \
        tx_must(&must_tx);                                                                         \
    } while (0)

#define must_be_refused(errnum, text, g, what, ...)                                                \
    do {                                                                                           \
        struct tx refused_tx;                                                                      \
                                                                                                   \
        tx_begin(&refused_tx, (g));                                                                \
        tx_do(&refused_tx, what, __VA_ARGS__);                                                     \
        tx_refused(&refused_tx, (errnum), (text));                                                 \
    } while (0)

static struct dirty_bitmap *get(struct graph *g, const char *name)
{
    struct error *err = NULL;
    struct dirty_bitmap *d;

    if (dirty_bitmap_find(g, named(name), &d, &err) < 0)
        fail_msg("%s", error_text(err));
    return d;
}

static uint64_t count_of(struct graph *g, const char *name)
{
    return bitmap_count(dirty_bitmap_bits(get(g, name)));
}

struct found {
    const char *name;
    struct dirty_bitmap_picture picture;
    unsigned count;
};

static void find_picture(const struct dirty_bitmap_picture *picture, void *arg)
{
    struct found *f = arg;

    if (strcmp(picture->name, f->name) == 0) {
        f->picture = *picture;
        f->count++;
    }
}

static struct dirty_bitmap_picture picture_of(struct graph *g, const char *name)
{
    struct found f = {.name = name};

    dirty_bitmap_for_each(graph_find(g, "d"), find_picture, &f);
    assert_int_equal(f.count, 1);
    return f.picture;
}

/* ---- C2 ---- */

static unsigned taken;

static void take_all(struct graph *g)
{
    uint64_t offset;
    uint64_t len;

    while (bitmap_claim(dirty_bitmap_bits(get(g, "a")), 0, UINT64_MAX, &offset, &len) == 1)
        taken += (unsigned)(len / BLOCK);
}

static void c2_body(void *arg)
{
    static const enum request_kind kinds[] = {REQUEST_WRITE, REQUEST_WRITE_ZEROES, REQUEST_DISCARD};

    static char data[2 * BLOCK];
    struct graph *g = begin();
    struct backend *b = must_attach(g, "d", ACCESS_RW, "client");

    (void)arg;
    must(g, add, named("a"), BLOCK, true);
    disk.during = take_all;
    for (unsigned i = 0; i < ARRAY_SIZE(kinds); i++) {
        for (int result = 0; result >= -EIO; result -= EIO) {
            taken = 0;
            disk.result = result;
            assert_int_equal(send_request(b, kinds[i], 0, BLOCK, 2 * BLOCK,
                                          kinds[i] == REQUEST_WRITE ? data : NULL),
                             result);
            assert_int_equal(taken, 2);                    /* it was set before */
            assert_int_equal(count_of(g, "a"), 2 * BLOCK); /* and again, also after a failure */
            take_all(g);
        }
    }
    disk.result = 0;
    disk.during = NULL;
    assert_int_equal(send_request(b, REQUEST_WRITE, REQUEST_UNCHANGED, 0, BLOCK, data), 0);
    assert_int_equal(read_at(b, 0, BLOCK, data), 0);
    assert_int_equal(flush(b), 0);
    assert_int_equal(count_of(g, "a"), 0);
    backend_co_free(b);
    graph_co_free(g);
}

static void test_dirty_bitmap__is_set_before_and_after_a_change(void **state)
{
    (void)state;
    on_both(c2_body, NULL);
}

/* ---- actions ---- */

static void actions_body(void *arg)
{
    struct dirty_bitmap_ref sources[] = {named("a"), {.node = "e", .name = "other"}};
    struct graph *g = begin();
    struct backend *b = must_attach(g, "d", ACCESS_RW, "client");
    struct tx t;
    char byte = 1;

    (void)arg;
    must(g, add, named("a"), 0, true);
    must(g, add, sources[1], BLOCK, true);
    assert_int_equal(write_at(b, 0, 1, &byte), 0);
    assert_int_equal(count_of(g, "a"), 64 * KIB);
    /* Each action finds what those before it have done; the new one holds what the old one had before it is cleared. */
    tx_begin(&t, g);
    tx_do(&t, add, named("new"), BLOCK, false);
    tx_do(&t, merge, named("new"), sources, 2);
    tx_do(&t, clear, named("a"));
    tx_do(&t, enable, named("new"), true);
    tx_do(&t, add, named("sum"), BLOCK, false);
    tx_do(&t, merge, named("sum"), sources, 1);
    tx_must(&t);
    assert_int_equal(count_of(g, "new"), 64 * KIB);
    assert_int_equal(count_of(g, "a"), 0);
    assert_int_equal(count_of(g, "sum"), 0);
    assert_int_equal(write_at(b, MIB - 1, 1, &byte), 0);
    assert_int_equal(count_of(g, "new"), 64 * KIB + BLOCK);
    assert_int_equal(count_of(g, "sum"), 0);

    must_be_refused(ENOENT, "no dirty bitmap 'x'", g, clear, named("x"));
    must_be_refused(EEXIST, "'a' already", g, add, named("a"), 0, true);
    must_be_refused(EINVAL, "power of two", g, add, named("x"), 1000, true);
    tx_begin(&t, g);
    tx_do(&t, remove, named("a"));
    tx_do(&t, clear, named("a"));
    tx_refused(&t, EBUSY, "is being removed");
    tx_begin(&t, g);
    tx_do(&t, add, named("x"), 0, true);
    tx_do(&t, add, named("x"), 0, true);
    tx_refused(&t, EEXIST, "'x' already");
    must(g, remove, named("a"));
    must(g, remove, named("new"));
    must(g, remove, named("sum"));
    assert_int_equal(dirty_bitmap_count(graph_find(g, "d")), 0);
    assert_int_equal(write_at(b, 0, 1, &byte), 0);
    backend_co_free(b);
    graph_co_free(g); /* with the one of 'e' */
}

static void test_dirty_bitmap__actions_of_one_change_see_each_other(void **state)
{
    (void)state;
    on_both(actions_body, NULL);
}

/* D4: no memory at the k-th allocation, for all k: all of it is done, or nothing. */
static void no_memory_body(void *arg)
{
    struct dirty_bitmap_ref sources[] = {named("b")};
    int r = -ENOMEM;
    unsigned k;

    (void)arg;
    for (k = 1; r < 0; k++) {
        struct graph *g = begin();
        struct tx t;

        assert_true(k < 1000);
        must(g, add, named("a"), 0, true);
        must(g, add, named("b"), 512, true);
        must(g, add, named("c"), 0, false);
        bitmap_set(dirty_bitmap_bits(get(g, "a")), 0, 1);
        bitmap_set(dirty_bitmap_bits(get(g, "b")), MIB - 1, 1);
        alloc_fail_at(k);
        tx_begin(&t, g);
        tx_do(&t, add, named("new"), 0, true);
        tx_do(&t, merge, named("a"), sources, 1);
        tx_do(&t, clear, named("b"));
        tx_do(&t, enable, named("c"), true);
        tx_do(&t, freeze, named("c"), "job 'j'");
        r = tx_end(&t);
        alloc_fail_at(0);
        error_free(&t.err);
        assert_int_equal(count_of(g, "a"), r == 0 ? 128 * KIB : 64 * KIB);
        assert_int_equal(count_of(g, "b"), r == 0 ? 0 : 512);
        assert_int_equal(dirty_bitmap_count(graph_find(g, "d")), r == 0 ? 4 : 3);
        assert_int_equal(picture_of(g, "c").recording, r == 0);
        assert_int_equal(picture_of(g, "c").busy, r == 0);
        if (r == 0)
            must(g, reclaim, named("c"));
        graph_co_free(g);
    }
    assert_true(k > 6);
}

static void test_dirty_bitmap__a_change_without_memory_does_nothing(void **state)
{
    (void)state;
    on_engine(LOOP_ENGINE_THREADS, no_memory_body, NULL);
}

/* A later action fails in the persist step, which has changed contents by then: they come back. */
static int fail_persist(struct change_action *a, struct error **err)
{
    (void)a;
    return error_set(err, EIO, "as asked");
}

static const struct change_action_ops failing_ops = {.co_persist = fail_persist};

static void undo_body(void *arg)
{
    struct dirty_bitmap_ref sources[] = {named("b")};
    struct change_action failing = {.node = NULL};
    struct graph *g = begin();
    struct backend *b = must_attach(g, "d", ACCESS_RW, "client");
    struct tx t;
    char byte = 1;

    (void)arg;
    must(g, add, named("a"), BLOCK, true);
    must(g, add, named("b"), BLOCK, false);
    bitmap_set(dirty_bitmap_bits(get(g, "b")), MIB - 1, 1);
    assert_int_equal(write_at(b, 0, 1, &byte), 0);
    tx_begin(&t, g);
    tx_do(&t, merge, named("a"), sources, 1);
    tx_do(&t, clear, named("b"));
    tx_do(&t, merge, named("a"), sources, 1);
    tx_do(&t, clear, named("a"));
    change_add_action(&t.change, &failing, &failing_ops);
    tx_refused(&t, EIO, "as asked");
    assert_int_equal(count_of(g, "a"), BLOCK);
    assert_int_equal(count_of(g, "b"), BLOCK);
    assert_int_equal(write_at(b, 8 * BLOCK, 1, &byte),
                     0); /* it still records, where it can be seen */
    assert_int_equal(count_of(g, "a"), 2 * BLOCK);
    backend_co_free(b);
    graph_co_free(g);
}

static void test_dirty_bitmap__contents_come_back_when_a_change_fails(void **state)
{
    (void)state;
    on_both(undo_body, NULL);
}

/* ---- successors (I6) ---- */

static bool same_generation(const uint8_t *a, const uint8_t *b)
{
    return memcmp(a, b, DIRTY_BITMAP_GENERATION_BYTES) == 0;
}

/* Known while nothing has taken effect, another one with each job, and what the bitmap has after a success only. */
static void successor_generation_body(void *arg)
{
    struct graph *g = begin();
    struct dirty_bitmap_picture first;
    struct dirty_bitmap_picture failed;
    struct dirty_bitmap_picture frozen;
    struct tx t;

    (void)arg;
    /* A bitmap that is made in the change that freezes it: that of a first backup. */
    tx_begin(&t, g);
    tx_do(&t, add, named("a"), BLOCK, true);
    tx_do(&t, freeze, named("a"), "job 'j'");
    tx_must(&t);
    first = picture_of(g, "a");
    assert_true(first.has_successor && first.busy);
    assert_false(same_generation(first.generation, first.successor_generation));
    must(g, reclaim, named("a"));
    failed = picture_of(g, "a");
    assert_false(failed.has_successor);
    assert_true(same_generation(failed.generation, first.generation));

    must(g, freeze, named("a"), "job 'k'");
    frozen = picture_of(g, "a");
    assert_true(frozen.has_successor);
    assert_false(same_generation(frozen.successor_generation, first.successor_generation));
    assert_true(same_generation(frozen.generation, first.generation));
    must(g, abdicate, named("a"));
    assert_false(picture_of(g, "a").has_successor);
    assert_true(same_generation(picture_of(g, "a").generation, frozen.successor_generation));
    graph_co_free(g);
}

static void test_dirty_bitmap__the_generation_of_a_success_is_known_before(void **state)
{
    (void)state;
    on_both(successor_generation_body, NULL);
}

static void successor_body(void *arg)
{
    struct graph *g = begin();
    struct backend *b = must_attach(g, "d", ACCESS_RW, "client");
    struct dirty_bitmap_picture before;
    char byte = 1;

    (void)arg;
    must(g, add, named("a"), BLOCK, true);
    assert_int_equal(write_at(b, 0, 1, &byte), 0);
    must(g, freeze, named("a"), "job 'j'");
    assert_true(picture_of(g, "a").busy && picture_of(g, "a").recording);
    assert_int_equal(write_at(b, BLOCK, 1, &byte), 0);
    assert_int_equal(count_of(g, "a"), BLOCK); /* what the job was given stays */
    must_be_refused(EBUSY, "in use by job 'j'", g, clear, named("a"));
    must_be_refused(EBUSY, "in use by job 'j'", g, remove, named("a"));
    must_be_refused(EBUSY, "in use by job 'j'", g, enable, named("a"), false);
    must_be_refused(EBUSY, "in use by job 'j'", g, freeze, named("a"), "job 'k'");
    before = picture_of(g, "a");
    must(g, reclaim, named("a"));
    assert_int_equal(count_of(g, "a"), 2 * BLOCK); /* old or new */
    assert_memory_equal(picture_of(g, "a").generation, before.generation,
                        sizeof(before.generation));
    must_be_refused(EINVAL, "is not frozen", g, reclaim, named("a"));

    must(g, freeze, named("a"), "job 'j'");
    assert_int_equal(write_at(b, 9 * BLOCK, 1, &byte), 0);
    must(g, abdicate, named("a"));
    assert_int_equal(count_of(g, "a"), BLOCK); /* the new */
    assert_memory_not_equal(picture_of(g, "a").generation, before.generation,
                            sizeof(before.generation));
    assert_int_equal(write_at(b, 20 * BLOCK, 1, &byte), 0);
    assert_int_equal(count_of(g, "a"), 2 * BLOCK);

    must(g, enable, named("a"), false);
    must(g, freeze, named("a"), "job 'j'");
    assert_int_equal(write_at(b, 30 * BLOCK, 1, &byte), 0);
    must(g, reclaim, named("a"));
    assert_int_equal(count_of(g, "a"), 2 * BLOCK); /* it was not enabled */
    backend_co_free(b);
    graph_co_free(g);
}

static void test_dirty_bitmap__a_job_gets_the_old_and_writes_go_to_a_successor(void **state)
{
    (void)state;
    on_both(successor_body, NULL);
}

/* ---- the node's life ---- */

static void life_body(void *arg)
{
    struct graph *g = begin();
    struct error *err = NULL;
    struct dirty_bitmap *held;

    (void)arg;
    must(g, add, named("a"), BLOCK, true);
    must(g, add, named("b"), BLOCK, false);
    bitmap_set(dirty_bitmap_bits(get(g, "b")), 0, MIB);
    assert_int_equal(graph_co_resize(g, "d", 2 * MIB, &err), 0);
    assert_int_equal(count_of(g, "a"), 0);
    assert_int_equal(count_of(g, "b"), MIB);
    assert_int_equal(graph_co_resize(g, "d", BLOCK + 1, &err), 0);
    assert_int_equal(count_of(g, "b"), 2 * BLOCK);
    disk.result = -EIO; /* after it has grown: it is cut again */
    assert_true(graph_co_resize(g, "d", 3 * MIB, &err) < 0);
    error_free(&err);
    assert_int_equal(graph_co_resize(g, "d", MIB, &err), 0);
    assert_int_equal(count_of(g, "a"), MIB - 2 * BLOCK + BLOCK); /* P2: what was cut has changed */
    must(g, clear, named("a"));
    assert_int_equal(graph_co_resize(g, "d", 2 * MIB, &err), 0);
    assert_int_equal(count_of(g, "a"), 0); /* since then it never had more */

    assert_int_equal(dirty_bitmap_co_hold(g, named("a"), "export 'x'", &held, &err), 0);
    must_be_refused(EBUSY, "in use by export 'x'", g, remove, named("a"));
    assert_int_equal(dirty_bitmap_co_hold(g, named("a"), "export 'y'", &held, &err), -EBUSY);
    error_free(&err);
    must_del(g, "d");
    assert_string_equal(dirty_bitmap_name(held), "a"); /* it stays for its owner */
    dirty_bitmap_release(held);
    add_disk(g, "d");
    assert_int_equal(dirty_bitmap_count(graph_find(g, "d")), 0);
    graph_co_free(g);
}

static void test_dirty_bitmap__goes_with_its_node(void **state)
{
    (void)state;
    on_both(life_body, NULL);
}

/* ---- a chain of bitmaps under load (P2) ---- */

#define WRITERS 3

struct load {
    struct graph *graph;
    struct backend *backend;
    struct loop_thread *threads[2];
    uint64_t seed;
    unsigned number; /* atomic */
    bool stop;       /* atomic */
};

static void writer_there(void *arg)
{
    struct load *l = arg;
    struct prng prng = {.state = l->seed * WRITERS + atomic_add(&l->number, 1u)};
    char byte = 1;

    check(backend_attach(l->backend) == 0);
    while (!atomic_get(&l->stop)) {
        check(write_at(l->backend, prng_below(&prng, BLOCKS) * BLOCK, 1, &byte) == 0);
        (void)co_sleep_until(loop_clock() + prng_below(&prng, 50) * NS_PER_US);
    }
}

static void writer(void *arg)
{
    struct load *l = arg;
    unsigned number = atomic_add(&l->number, 1u);

    check(loop_co_call(loop_thread_loop(l->threads[number % 2]), writer_there, l) == 0);
}

/* Copies what a bitmap has, as a client does that was given it. */
static void copy_versions(struct graph *g, const char *name, uint32_t *copy)
{
    uint64_t offset = 0;
    uint64_t len = 0;

    while (bitmap_next_dirty(dirty_bitmap_bits(get(g, name)), offset + len, MIB, &offset, &len)) {
        for (uint64_t i = offset / BLOCK; i < (offset + len) / BLOCK && i < BLOCKS; i++)
            copy[i] = atomic_get(&disk.versions[i]);
    }
}

/* Again and again, at one instant: the recording bitmap stops, and the next one begins. */
static void rotate_and_copy(struct load *l, uint32_t *copy)
{
    static const char *const names[] = {"even", "odd"};
    struct prng prng = {.state = l->seed};
    struct tx t;

    for (unsigned i = 0; i < 6; i++) {
        const char *old = names[i % 2];

        (void)co_sleep_until(loop_clock() + prng_below(&prng, 500) * NS_PER_US);
        tx_begin(&t, l->graph);
        if (prng_chance(&prng, 500)) {
            tx_do(&t, enable, named(old), false);
            tx_do(&t, add, named(names[(i + 1) % 2]), BLOCK, true);
        } else {
            tx_do(&t, add, named(names[(i + 1) % 2]), BLOCK, true);
            tx_do(&t, freeze, named(old), "job 'j'");
        }
        tx_must(&t);
        copy_versions(l->graph, old, copy);
        if (picture_of(l->graph, old).busy) { /* the job fails: its bitmap has both */
            struct dirty_bitmap_ref source = named(old);

            must(l->graph, reclaim, named(old));
            must(l->graph, merge, named(names[(i + 1) % 2]), &source, 1);
        }
        must(l->graph, remove, named(old));
    }
    atomic_set(&l->stop, true);
}

static void chain_body(void *arg)
{
    struct load l = {.graph = begin(), .seed = *(const uint64_t *)arg};
    struct error *err = NULL;
    uint32_t copy[BLOCKS] = {0};
    struct co_scope scope;

    disk.naps = true;
    for (unsigned i = 0; i < 2; i++)
        check(loop_thread_start(&l.threads[i], "io", &err) == 0);
    l.backend = must_attach(l.graph, "d", ACCESS_RW, "client");
    must(l.graph, add, named("even"), BLOCK, true);
    co_scope_init(&scope);
    for (unsigned i = 0; i < WRITERS; i++)
        check(co_scope_start(&scope, writer, &l) == 0);
    rotate_and_copy(&l, copy);
    co_scope_join(&scope);
    copy_versions(l.graph, "even", copy);
    for (unsigned i = 0; i < BLOCKS; i++)
        check(copy[i] == disk.versions[i]);
    backend_co_free(l.backend);
    for (unsigned i = 0; i < 2; i++)
        loop_thread_stop(l.threads[i]);
    graph_co_free(l.graph);
}

static void test_dirty_bitmap__a_chain_of_bitmaps_misses_nothing(void **state)
{
    (void)state;
    TEST_SEEDS (seed) {
        struct sim_options o;

        sim_options_init(&o, seed);
        check(sim_run(&o, chain_body, &seed) == SIM_RETURNED);
    }
}

static void test_dirty_bitmap__a_chain_of_bitmaps_misses_nothing_on_threads(void **state)
{
    uint64_t seed = 1;

    (void)state;
    on_both(chain_body, &seed);
}
