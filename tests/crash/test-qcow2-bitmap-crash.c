/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Power cuts in the life of stored bitmaps: while an image is opened, written to, resized, while bitmaps are added, removed and
 * changed, and while it is closed; after each operation of the disk in turn, so also at each boundary of a flush. What was not
 * flushed is kept, dropped or torn, each write by itself. Then the image is sound but for leaks, and of each bitmap it says the truth: it is in use, or
 * it is what it was, and then the disk is, too, or what it becomes. None is lost but those that were being removed.
 */
#include "bitmaps/dirty-bitmap.h"
#include "crash-fixture.h"
#include "formats/list.h"
#include "protocols/list.h"
#include "qcow2-fixture.h"
#include "seeds.h"

#include <stdio.h>

#define IMAGE_PATH "/disk/image"
#define SIZE_MAX_  ((uint64_t)1 << 20)
#define SECTORS    (SIZE_MAX_ / 512)
#define BITMAPS    4
#define WRITES     8
#define CUTS_MAX   20 /* for each seed; all where there are no more */

/* What one of them has: a bit for each granule, as the image would say. */
struct expected {
    bool there;
    bool enabled;
    unsigned granularity_bits;
    uint8_t bits[SECTORS / 8];
};

struct life_state {
    uint64_t size;
    uint8_t data[SIZE_MAX_];
    struct expected bitmaps[BITMAPS];
};

struct life {
    uint64_t seed;
    struct prng prng;
    struct prng live_prng; /* as it was when the last session began */
    struct sim_disk *disk;
    struct qcow2_shape shape;
    struct graph *graph;
    struct backend *backend;
    struct life_state before; /* the last time that it was closed */
    struct life_state now;
    bool removed[BITMAPS]; /* since then: by a change that has at least begun */
    uint8_t *bytes;
    size_t len;
    uint64_t ops;
};

/* Over all seeds; shared with the children. */
static struct counts {
    uint64_t cuts;
    uint64_t in_use;
    uint64_t before;
    uint64_t after;
    uint64_t gone;
    uint64_t leaking;
} * counts;

static int group_setup(void **state)
{
    (void)state;
    counts = shared_new(sizeof(*counts));
    return 0;
}

static const struct driver *const *const drivers[] = {protocol_drivers, format_drivers, NULL};

/* ---- the disk and what it should be ---- */

static const char *name_of(unsigned i)
{
    static const char *const names[BITMAPS] = {"a", "b", "a name that is longer than others", "d"};

    return names[i];
}

static size_t bytes_of(const struct life_state *s, const struct expected *e)
{
    uint64_t granules = (s->size + ((uint64_t)1 << e->granularity_bits) - 1) >> e->granularity_bits;

    return (size_t)((granules + 7) / 8);
}

static void note_dirty(struct expected *e, uint64_t offset, uint64_t len)
{
    for (uint64_t g = offset >> e->granularity_bits; g <= (offset + len - 1) >> e->granularity_bits;
         g++)
        e->bits[g / 8] |= (uint8_t)(1u << g % 8);
}

static void change_data(struct life *l)
{
    uint64_t size = l->now.size;
    uint64_t at = prng_below(&l->prng, size);
    uint64_t len = MIN(1 + prng_below(&l->prng, 20000), size - at);
    uint8_t *data = xalloc(1, (size_t)len);

    memset(data, (int)(1 + prng_below(&l->prng, 255)), (size_t)len);
    check(write_at(l->backend, at, len, data) == 0);
    memcpy(l->now.data + at, data, (size_t)len);
    free(data);
    for (unsigned i = 0; i < BITMAPS; i++) {
        if (l->now.bitmaps[i].there && l->now.bitmaps[i].enabled)
            note_dirty(&l->now.bitmaps[i], at, len);
    }
    if (prng_chance(&l->prng, 200))
        check(flush(l->backend) == 0);
}

static void resize(struct life *l, uint64_t size)
{
    AUTO(error_free) struct error *err = NULL;
    uint64_t old = l->now.size;

    check(graph_co_resize(l->graph, "top", size, &err) == 0);
    memset(l->now.data + size, 0, SIZE_MAX_ - size);
    l->now.size = size;
    for (unsigned i = 0; i < BITMAPS; i++) {
        struct expected *e = &l->now.bitmaps[i];
        uint64_t granules =
            (size + ((uint64_t)1 << e->granularity_bits) - 1) >> e->granularity_bits;

        for (uint64_t g = granules; size < old && g < SECTORS; g++)
            e->bits[g / 8] &= (uint8_t) ~(1u << g % 8);
    }
}

static struct dirty_bitmap_ref ref_of(unsigned i)
{
    return (struct dirty_bitmap_ref){.node = "top", .name = name_of(i)};
}

static void must_be_done(int r, const struct error *err)
{
    if (r < 0) {
        fprintf(stderr, "%s\n", error_text(err));
        abort();
    }
}

/* Adds the one of this number, or changes it in some way. */
static void change_bitmap(struct life *l, unsigned i)
{
    AUTO(error_free) struct error *err = NULL;
    struct expected *e = &l->now.bitmaps[i];
    unsigned what = (unsigned)prng_below(&l->prng, 4);
    struct dirty_bitmap_action action;
    struct change change;
    int r;

    change_init(&change, l->graph, "bitmap");
    if (!e->there) {
        *e = (struct expected){
            .there = true,
            .enabled = what != 0,
            .granularity_bits = 9 + (unsigned)prng_below(&l->prng, 8),
        };
        r = dirty_bitmap_action_add(&change, &action, ref_of(i), (uint64_t)1 << e->granularity_bits,
                                    e->enabled, &err);
        action.persistent = true;
    } else if (what < 2) {
        l->removed[i] = true;
        e->there = false;
        r = dirty_bitmap_action_remove(&change, &action, ref_of(i), &err);
    } else if (what == 2) {
        memset(e->bits, 0, sizeof(e->bits));
        r = dirty_bitmap_action_clear(&change, &action, ref_of(i), &err);
    } else {
        e->enabled = !e->enabled;
        r = dirty_bitmap_action_enable(&change, &action, ref_of(i), e->enabled, &err);
    }
    must_be_done(r, err);
    r = change_co_run(&change, &err);
    must_be_done(r, err);
    change_end(&change);
}

static void life_open(struct life *l)
{
    l->graph = graph_new(drivers);
    add_layer(l->graph, "top", IMAGE_PATH, NULL, false);
    l->backend = must_attach(l->graph, "top", ACCESS_RW, "writer");
    check(backend_size(l->backend) == l->now.size);
}

static void life_close(struct life *l)
{
    l->backend = backend_co_free(l->backend);
    l->graph = graph_co_free(l->graph);
}

/* One session. What a disk gets in a later one is dirty in what was stored before: it only shrinks. */
static void live(void *arg)
{
    struct life *l = arg;

    l->before = l->now;
    memset(l->removed, 0, sizeof(l->removed));
    life_open(l);
    for (unsigned i = 0; i < 3; i++) {
        for (unsigned k = 0; k < WRITES; k++)
            change_data(l);
        change_bitmap(l, (unsigned)prng_below(&l->prng, BITMAPS));
    }
    if (prng_chance(&l->prng, 300))
        resize(l, (l->now.size / 1024 + 1) * 512);
    change_data(l);
    life_close(l);
}

/* ---- after a cut ---- */

static bool same_data(struct life *l, const struct life_state *s)
{
    struct qcow2_layer layer = {.snapshot = 0};
    uint8_t *data = xalloc(1, SIZE_MAX_);
    struct qcow2_verdict v;
    size_t len;
    uint8_t *bytes = image_load(l->disk, IMAGE_PATH, &len);
    bool same;

    layer.file = qcow2_file_in_memory(bytes, len);
    same = qcow2_check(&layer.file, &v) == 0 && v.virtual_size == s->size &&
           qcow2_read_guest(&layer, 1, 0, data, (size_t)s->size) == 0 &&
           memcmp(data, s->data, (size_t)s->size) == 0;
    free(bytes);
    free(data);
    return same;
}

static void fail_bitmap(const struct life *l, const char *where, const char *name, const char *what)
{
    fprintf(stderr, "seed %" PRIu64 ", clusters of 2^%u, %s: bitmap '%s' %s\n", l->seed,
            l->shape.cluster_bits, where, name, what);
    abort();
}

static bool is_as(const struct life_state *s, const struct expected *e,
                  const struct qcow2_bitmap_seen *seen, const uint8_t *bits)
{
    return e->there && e->enabled == seen->enabled &&
           e->granularity_bits == seen->granularity_bits &&
           memcmp(e->bits, bits, bytes_of(s, e)) == 0;
}

static void judge_bitmap(struct life *l, const char *where, unsigned i,
                         const struct qcow2_bitmap_seen *seen, const uint8_t *bits)
{
    if (seen->in_use) {
        counts->in_use++;
        if (!l->before.bitmaps[i].there)
            fail_bitmap(l, where, seen->name, "was never stored");
    } else if (is_as(&l->now, &l->now.bitmaps[i], seen, bits) && same_data(l, &l->now)) {
        counts->after++;
    } else if (is_as(&l->before, &l->before.bitmaps[i], seen, bits)) {
        counts->before++;
        if (!same_data(l, &l->before))
            fail_bitmap(l, where, seen->name, "misses what has changed");
    } else {
        fail_bitmap(l, where, seen->name, "is neither what it was nor what it becomes");
    }
}

static void judge_bitmaps(struct life *l, const char *where)
{
    uint8_t *bits = xalloc(1, SECTORS / 8);
    bool found[BITMAPS] = {false};
    size_t len;
    uint8_t *bytes = image_load(l->disk, IMAGE_PATH, &len);
    struct qcow2_file f = qcow2_file_in_memory(bytes, len);
    struct qcow2_bitmap_seen seen;
    int r;

    for (unsigned k = 1; (r = qcow2_see_bitmap(&f, k, &seen, bits, SECTORS / 8)) == 0; k++) {
        for (unsigned i = 0; i < BITMAPS; i++) {
            if (strcmp(seen.name, name_of(i)) == 0) {
                found[i] = true;
                judge_bitmap(l, where, i, &seen, bits);
            }
        }
    }
    check(r == -ENOENT);
    for (unsigned i = 0; i < BITMAPS; i++) {
        if (found[i] || !l->before.bitmaps[i].there)
            continue;
        counts->gone++;
        if (!l->removed[i])
            fail_bitmap(l, where, name_of(i), "is lost");
    }
    free(bytes);
    free(bits);
}

static void open_and_close(void *arg)
{
    struct life *l = arg;
    AUTO(free_ptr) uint8_t *data = xalloc(1, SIZE_MAX_);

    l->graph = graph_new(drivers);
    add_layer(l->graph, "top", IMAGE_PATH, NULL, false);
    l->backend = must_attach(l->graph, "top", ACCESS_RW, "writer");
    check(read_at(l->backend, 0, backend_size(l->backend), data) == 0);
    check(write_at(l->backend, 0, 512, data) == 0);
    life_close(l);
}

static void crash_at(const void *arg, uint64_t op, uint64_t cut)
{
    const struct life *plan = arg;
    static struct life l;
    struct qcow2_verdict v;
    char where[48];

    l = *plan;
    l.disk = sim_disk_new();
    image_put(l.disk, IMAGE_PATH, plan->bytes, plan->len);
    l.prng = plan->live_prng;
    l.now = plan->before;
    if (run_killed_at(l.disk, l.seed, live, &l, op) == SIM_KILLED) {
        sim_disk_power_cut(l.disk, cut);
        counts->cuts++;
        l.now = plan->now; /* what it would have become */
        memcpy(l.removed, plan->removed, sizeof(l.removed));
        (void)snprintf(where, sizeof(where), "cut %" PRIu64 " at %" PRIu64, cut, op);
        image_judge(l.disk, IMAGE_PATH, LEAKS_ALLOWED, &v);
        counts->leaking += v.leaks > 0;
        judge_bitmaps(&l, where);
        check(run_killed_at(l.disk, l.seed + 1, open_and_close, &l, 0) == SIM_RETURNED);
        image_judge(l.disk, IMAGE_PATH, LEAKS_ALLOWED, &v);
    }
    sim_disk_free(l.disk);
}

/* Two sessions that end well, and what a third one makes of it when nothing is cut off. */
static void make_plan(struct life *l)
{
    struct qcow2_verdict v;

    l->disk = sim_disk_new();
    l->now.size = (1 + prng_below(&l->prng, SECTORS)) * 512;
    qcow2_shape_random(&l->shape, &l->prng, l->now.size);
    l->shape.version = 3;
    image_make(l->disk, IMAGE_PATH, &l->shape);
    for (unsigned i = 0; i < 3; i++) {
        free(l->bytes);
        l->bytes = image_load(l->disk, IMAGE_PATH, &l->len);
        sim_disk_free(l->disk);
        l->disk = sim_disk_new();
        image_put(l->disk, IMAGE_PATH, l->bytes, l->len);
        l->live_prng = l->prng;
        check(run_killed_at(l->disk, l->seed, live, l, 0) == SIM_RETURNED);
        image_judge(l->disk, IMAGE_PATH, NO_LEAKS, &v);
        judge_bitmaps(l, "closed in order");
    }
    l->ops = sim_disk_ops(l->disk);
    sim_disk_free(l->disk);
}

static void make_and_crash(void *arg)
{
    struct life *plan = arg;

    make_plan(plan);
    crash_everywhere(crash_at, plan, plan->seed, plan->ops, CUTS_MAX);
}

static void test_qcow2_bitmap_crash__each_is_right_or_in_use(void **state)
{
    static struct life plan;

    (void)state;
    *counts = (struct counts){.cuts = 0};
    TEST_SEEDS (seed) {
        plan = (struct life){.seed = seed, .prng = {seed}};
        in_child(make_and_crash, &plan);
    }
    printf("# %" PRIu64 " power cuts; bitmaps: %" PRIu64 " in use, %" PRIu64 " as before, %" PRIu64
           " as after, %" PRIu64 " removed; %" PRIu64 " cuts left leaks\n",
           counts->cuts, counts->in_use, counts->before, counts->after, counts->gone,
           counts->leaking);
    assert_true(!seeds_enough(20) || (counts->in_use && counts->before && counts->after &&
                                      counts->gone && counts->leaking));
}
