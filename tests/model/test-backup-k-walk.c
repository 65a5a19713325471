/* SPDX-License-Identifier: Apache-2.0 */
/*
 * D4, for the life of a backup job from its command to its end: k walks over every operation on the target's and the scratch
 * file and over every allocation that can fail, for each way to fail. Whatever it hits:
 *
 *   - no guest's write fails or waits longer than it may (C5, P3), and none is lost
 *   - the job cannot be made and says why, or it ends, cancelled if need be, within a bound (P4), and its filter is gone
 *   - what it calls a success is the source at its instant; else its bitmap has all that it had (P2), or what was not copied
 */
#include "base/atomic.h"
#include "bitmaps/dirty-bitmap.h"
#include "check.h"
#include "formats/list.h"
#include "graph-fixture.h"
#include "graph/change.h"
#include "jobs/backup-engine.h"
#include "jobs/backup.h"
#include "jobs/job.h"
#include "loop/sim/sim.h"
#include "protocols/list.h"
#include "schema-shared.h"
#include "seeds.h"

#include <errno.h>
#include <stdio.h>

#define DISK_SIZE ((uint64_t)512 << 10)
#define CLUSTERS  (DISK_SIZE / BACKUP_CLUSTER)
#define BLOCK     ((uint64_t)4096)
#define WRITES    12
#define DEADLINE  (2 * NS_PER_S) /* of changes */
#define LATENCY   (20 * NS_PER_MS)
#define SLACK     (200 * NS_PER_MS)

static const struct driver *const *const drivers[] = {protocol_drivers, format_drivers, NULL};

enum kind { FULL, INCREMENTAL, ALWAYS, NONE, KINDS };

enum way { WAY_EIO, WAY_ENOSPC, WAY_HANG, WAY_MEMORY };

struct world {
    enum kind kind;
    enum way way;
    const char *where; /* which file fails */
    unsigned k;
    bool struck;

    struct sim_disk *disk;
    struct graph *graph;
    struct backend *guest;
    struct loop_thread *io;
    struct loop_thread *copier;
    struct jobs *jobs;
    struct prng prng;
    bool ended;
    bool failed;
    bool dirty[CLUSTERS];   /* in the bitmap at the instant */
    bool written[CLUSTERS]; /* since then */
    bool flushes;
    bool may_hold[DISK_SIZE / BLOCK]
                 [256]; /* after a power cut: what was flushed, and all that was written since */
    uint8_t at_instant[DISK_SIZE];
    uint8_t now[DISK_SIZE];
    uint8_t target[DISK_SIZE];
    uint8_t source[DISK_SIZE];
};

static void job_event(const struct job_event *e, void *arg)
{
    struct world *w = arg;
    struct job_picture p;

    job_picture(e->job, &p);
    if (e->kind == JOB_EVENT_COMPLETED || e->kind == JOB_EVENT_CANCELLED) {
        w->ended = true;
        w->failed = e->kind == JOB_EVENT_CANCELLED || p.error;
        check(!p.error || p.error[0]);
    }
}

/* ---- guests ---- */

struct write {
    struct world *world;
    unsigned count;
    bool during;
};

/* One guest at a time writes. */
static void flush_guest(struct world *w)
{
    struct request req = {.kind = REQUEST_FLUSH};

    check(backend_co_request(w->guest, &req) == 0);
    for (uint64_t i = 0; i < DISK_SIZE / BLOCK; i++) {
        memset(w->may_hold[i], 0, sizeof(w->may_hold[i]));
        w->may_hold[i][w->now[i * BLOCK]] = true;
    }
}

static void write_main(void *arg)
{
    const struct write *wr = arg;
    struct world *w = wr->world;
    struct iobuf *b = iobuf_new(BLOCK);

    check(b);
    for (unsigned i = 0; i < wr->count; i++) {
        uint64_t offset = prng_below(&w->prng, DISK_SIZE / BLOCK) * BLOCK;
        struct iovec iov = {b->data, BLOCK};
        struct request req = {.kind = REQUEST_WRITE,
                              .offset = offset,
                              .len = BLOCK,
                              .iov = &iov,
                              .iov_count = 1,
                              .hold = b};
        uint64_t began = loop_clock();

        memset(b->data, 1 + (int)prng_below(&w->prng, 255), BLOCK);
        w->may_hold[offset / BLOCK][b->data[0]] = true;
        memcpy(w->now + offset, b->data, BLOCK);
        check(backend_co_request(w->guest, &req) == 0);
        if (w->flushes && i % 4 == 3)
            flush_guest(w);
        check(loop_clock() - began <= LATENCY + SLACK);
        (wr->during ? w->written : w->dirty)[offset / BACKUP_CLUSTER] = true;
        if (wr->during)
            check(co_sleep_until(loop_clock() + NS_PER_MS) == 0);
    }
    iobuf_unref(b);
}

static void call_writes(void *arg)
{
    const struct write *wr = arg;

    check(loop_co_call(loop_thread_loop(wr->world->io), write_main, arg) == 0);
}

static void attach_guest(void *arg)
{
    struct world *w = arg;

    check(backend_attach(w->guest) == 0);
}

/* ---- the job ---- */

struct picture {
    struct change_action action;
    struct world *world;
};

static void take_picture(struct change_action *a)
{
    struct world *w = container_of(a, struct picture, action)->world;

    memcpy(w->at_instant, w->now, DISK_SIZE);
}

static const struct change_action_ops picture_ops = {.commit = take_picture};

static void parse_options(struct world *w, struct blockdev_backup_options *o)
{
    static const char *const sync[KINDS] = {
        "'sync': 'full', 'bitmap': 'm', 'bitmap-mode': 'on-success'",
        "'sync': 'incremental', 'bitmap': 'm'",
        "'sync': 'bitmap', 'bitmap': 'm', 'bitmap-mode': 'always'",
        "'sync': 'none'",
    };
    struct error *err = NULL;
    char *text =
        xasprintf("{'job-id': 'b', 'device': 'src', 'target': 'dst', %s, 'speed': 8388608, "
                  "'cbw-ram': 8192, 'cbw-scratch': '/tmp', 'cbw-scratch-max': 65536}",
                  sync[w->kind]);
    json_t *tree;

    for (char *p = text; *p; p++)
        *p = *p == '\'' ? '"' : *p;
    tree = json_loads(text, 0, NULL);
    check(tree);
    check(json_in(&blockdev_backup_options_type, tree, JSON_IN_STRICT, "", o, &err) == 0);
    json_decref(tree);
    free(text);
}

static int start_job(struct world *w, const struct blockdev_backup_options *o, struct error **err)
{
    struct picture picture = {.world = w};
    struct backup_job *b = NULL;
    struct change change;
    int r;

    change_init(&change, w->graph, "start");
    r = backup_job_co_new(&b, w->jobs, w->graph, o, NULL, err);
    if (r == 0)
        r = backup_job_add_actions(b, &change, err);
    if (r == 0) {
        change_add_action(&change, &picture.action, &picture_ops);
        r = change_co_run(&change, err);
    }
    change_end(&change);
    if (r == 0)
        backup_job_start(b);
    else if (b)
        backup_job_co_discard(b);
    return r;
}

static void wait_for_end(struct world *w, uint64_t bound)
{
    uint64_t until = loop_clock() + bound;

    while (jobs_find(w->jobs, "b") && loop_clock() < until)
        check(co_sleep_until(loop_clock() + NS_PER_MS) == 0);
}

/* Cancelled unless it ends by itself. Closing scratch and target are bounded by the deadline of changes, each. */
static void end_job(struct world *w)
{
    AUTO(error_free) struct error *err = NULL;
    struct job *job;

    wait_for_end(w, 500 * NS_PER_MS);
    job = jobs_find(w->jobs, "b");
    if (job)
        (void)job_cancel(job, true, &err); /* it may be at its end */
    wait_for_end(w, 3 * DEADLINE + SLACK);
    check(!jobs_find(w->jobs, "b") && w->ended);
}

/* ---- what must hold ---- */

static void check_bitmap(struct world *w, bool succeeded)
{
    struct dirty_bitmap *d;
    AUTO(error_free) struct error *err = NULL;

    check(dirty_bitmap_find(w->graph, (struct dirty_bitmap_ref){"src", "m"}, &d, &err) == 0);
    for (uint64_t i = 0; i < CLUSTERS; i++) {
        uint64_t at = i * BACKUP_CLUSTER;
        uint64_t o;
        uint64_t l;
        bool is_dirty = bitmap_next_dirty(dirty_bitmap_bits(d), at, at + BACKUP_CLUSTER, &o, &l);

        check(is_dirty || !w->written[i]);
        if (succeeded || !w->dirty[i] || is_dirty)
            continue;
        /* Given up by a job that failed: it was copied. */
        check(w->kind == ALWAYS);
        check(memcmp(w->target + at, w->at_instant + at, BACKUP_CLUSTER) == 0);
    }
}

static void check_target(const struct world *w)
{
    for (uint64_t i = 0; i < CLUSTERS; i++) {
        uint64_t at = i * BACKUP_CLUSTER;

        if (w->kind == FULL || w->dirty[i])
            check(memcmp(w->target + at, w->at_instant + at, BACKUP_CLUSTER) == 0);
    }
}

static void count_node(struct node *node, void *arg)
{
    unsigned *count = arg;

    check(strcmp(node_driver(node)->name, "copy-before-write") != 0);
    (*count)++;
}

static void check_after(struct world *w, bool started)
{
    struct write again = {w, 2, true};
    unsigned nodes = 0;

    graph_for_each_node(w->graph, count_node, &nodes);
    check(nodes == 4);
    call_writes(&again);
    check(sim_disk_read(w->disk, "/src", 0, w->source, DISK_SIZE) == 0);
    check(memcmp(w->source, w->now, DISK_SIZE) == 0);
    check(sim_disk_read(w->disk, "/dst", 0, w->target, DISK_SIZE) == 0);
    check_bitmap(w, started && !w->failed);
    if (started && !w->failed && w->kind != NONE)
        check_target(w);
}

/* ---- the walk ---- */

static void open_all(struct world *w)
{
    struct access access = {.wants = ACCESS_READ | ACCESS_WRITE,
                            .tolerates = ACCESS_ALL & ~ACCESS_RESIZE};
    struct dirty_bitmap_action add;
    struct error *err = NULL;
    struct change change;
    struct loop *loop;

    w->graph = graph_new(drivers);
    graph_set_change_deadline(w->graph, DEADLINE);
    must_add(
        w->graph,
        "{'driver': 'raw', 'node-name': 'src', 'file': {'driver': 'file', 'filename': '/src'}}");
    must_add(
        w->graph,
        "{'driver': 'raw', 'node-name': 'dst', 'file': {'driver': 'file', 'filename': '/dst'}}");
    change_init(&change, w->graph, "bitmap");
    check(dirty_bitmap_action_add(&change, &add, (struct dirty_bitmap_ref){"src", "m"}, 0, true,
                                  &err) == 0);
    check(change_co_run(&change, &err) == 0);
    change_end(&change);
    check(backend_co_new(&w->guest, w->graph, "src", access, "guest", &err) == 0);
    check(loop_thread_start(&w->io, "io", &err) == 0);
    check(loop_thread_start(&w->copier, "copy", &err) == 0);
    loop = loop_thread_loop(w->copier);
    w->jobs = jobs_new(&loop, 1, job_event, w);
    check(loop_co_call(loop_thread_loop(w->io), attach_guest, w) == 0);
}

static void close_all(struct world *w)
{
    jobs_co_cancel_all(w->jobs);
    w->jobs = jobs_free(w->jobs);
    w->guest = backend_co_free(w->guest);
    loop_thread_stop(w->io);
    loop_thread_stop(w->copier);
    w->graph = graph_co_free(w->graph);
}

static void arm(struct world *w, struct sim_fault *f)
{
    if (w->way == WAY_MEMORY)
        alloc_fail_at(w->k);
    else
        sim_fault_add(f);
}

static void disarm(struct world *w, struct sim_fault *f)
{
    if (w->way == WAY_MEMORY) {
        w->struck = alloc_fail_at(0) >= w->k;
    } else {
        w->struck = f->fired > 0;
        sim_fault_remove(f);
    }
}

static void attempt(void *arg)
{
    struct world *w = arg;
    struct write before = {w, 6, false};
    struct write during = {w, WRITES, true};
    struct sim_fault fault = {.name = w->where,
                              .ops = SIM_ANY_OP,
                              .kind = w->way == WAY_HANG ? SIM_HANG : SIM_ERROR,
                              .error = w->way == WAY_EIO ? EIO : ENOSPC,
                              .at = w->k};
    struct blockdev_backup_options o = {.job_id = NULL};
    AUTO(error_free) struct error *err = NULL;
    struct co_scope guests;
    uint64_t began;
    int r;

    open_all(w);
    check(sim_disk_read(w->disk, "/src", 0, w->now, DISK_SIZE) == 0);
    call_writes(&before);
    co_scope_init(&guests);
    parse_options(w, &o);
    began = loop_clock();
    arm(w, &fault);
    r = start_job(w, &o, &err);
    check(loop_clock() - began <= 2 * DEADLINE + SLACK);
    check(r == 0 || error_text(err)[0]);
    if (r == 0) {
        check(co_scope_start(&guests, call_writes, &during) == 0);
        end_job(w);
    }
    co_scope_join(&guests);
    disarm(w, &fault);
    check(w->struck || (r == 0 && (!w->failed || w->kind == NONE)));
    (void)sim_unhang(NULL);
    check(co_sleep_until(loop_clock() + SLACK) == 0);
    check_after(w, r == 0);
    blockdev_backup_options_release(&o);
    close_all(w);
}

static void make_disks(struct sim_disk *d, uint64_t seed)
{
    struct sim_file_setup setup = {.type = FILE_TYPE_REGULAR, .size = DISK_SIZE};
    struct prng prng = {seed};
    uint8_t block[BLOCK];

    sim_disk_make(d, "/src", &setup);
    sim_disk_make(d, "/dst", &setup);
    for (uint64_t at = 0; at < DISK_SIZE; at += BLOCK) {
        memset(block, (int)prng_next(&prng), BLOCK);
        if (prng_chance(&prng, 800))
            sim_disk_write(d, "/src", at, block, BLOCK);
    }
}

static bool attempt_k(enum kind kind, enum way way, const char *where, uint64_t seed, unsigned k)
{
    struct world *w = calloc(1, sizeof(*w));
    struct sim_options o;
    bool struck;

    *w = (struct world){.kind = kind, .way = way, .where = where, .k = k, .prng = {seed}};
    w->disk = sim_disk_new();
    make_disks(w->disk, seed);
    sim_options_init(&o, seed);
    o.disk = w->disk;
    o.disk_max_ns = MIN(o.disk_max_ns, NS_PER_MS);
    o.disk_min_ns = MIN(o.disk_min_ns, o.disk_max_ns);
    o.inline_per_mille = 0; /* what is inline cannot hang */
    o.stall_per_mille = 0;
    o.short_per_mille = 0; /* the rest of a guest's own write would need memory */
    check(sim_run(&o, attempt, w) == SIM_RETURNED);
    sim_disk_free(w->disk);
    struck = w->struck;
    free(w);
    return struck;
}

/* Each seed takes one kind of job, and every third k from another start. */
static void walk(enum way way, const char *where)
{
    TEST_SEEDS (seed) {
        enum kind kind = (enum kind)(seed % KINDS);
        unsigned k = 1 + (unsigned)(seed / KINDS % 3);

        while (attempt_k(kind, way, where, seed, k)) {
            k += 3;
            check(k < 2000);
        }
    }
}

static void test_backup_k_walk__target_eio(void **state)
{
    (void)state;
    walk(WAY_EIO, "/dst");
}

static void test_backup_k_walk__target_hangs(void **state)
{
    (void)state;
    walk(WAY_HANG, "/dst");
}

static void test_backup_k_walk__scratch_enospc(void **state)
{
    (void)state;
    walk(WAY_ENOSPC, "/tmp/cairn-*");
}

static void test_backup_k_walk__scratch_hangs(void **state)
{
    (void)state;
    walk(WAY_HANG, "/tmp/cairn-*");
}

static void test_backup_k_walk__enomem(void **state)
{
    (void)state;
    walk(WAY_MEMORY, NULL);
}

/* ---- power cuts ---- */

static void live_and_die(void *arg)
{
    struct world *w = arg;
    struct write during = {w, WRITES, true};
    struct blockdev_backup_options o = {.job_id = NULL};
    AUTO(error_free) struct error *err = NULL;
    struct co_scope guests;

    open_all(w);
    parse_options(w, &o);
    co_scope_init(&guests);
    check(start_job(w, &o, &err) == 0);
    check(co_scope_start(&guests, call_writes, &during) == 0);
    end_job(w);
    co_scope_join(&guests);
    blockdev_backup_options_release(&o);
    close_all(w);
}

/* P1: a backup adds nothing to what a guest has to fear. */
static bool cut_k(enum kind kind, uint64_t seed, unsigned k)
{
    struct world *w = calloc(1, sizeof(*w));
    struct sim_options o;
    bool killed;

    *w = (struct world){.kind = kind, .prng = {seed}, .flushes = true};
    w->disk = sim_disk_new();
    make_disks(w->disk, seed);
    check(sim_disk_read(w->disk, "/src", 0, w->now, DISK_SIZE) == 0);
    for (uint64_t i = 0; i < DISK_SIZE / BLOCK; i++)
        w->may_hold[i][w->now[i * BLOCK]] = true;
    sim_options_init(&o, seed);
    o.disk = w->disk;
    o.disk_max_ns = MIN(o.disk_max_ns, NS_PER_MS);
    o.disk_min_ns = MIN(o.disk_min_ns, o.disk_max_ns);
    o.stall_per_mille = 0;
    o.may_end_early = true;
    o.kill_at_op = k;
    killed = sim_run(&o, live_and_die, w) == SIM_KILLED;
    sim_disk_power_cut(w->disk, seed * 1000 + k);
    check(sim_disk_read(w->disk, "/src", 0, w->source, DISK_SIZE) == 0);
    for (uint64_t i = 0; i < DISK_SIZE; i++)
        check(w->may_hold[i / BLOCK][w->source[i]]);
    sim_disk_free(w->disk);
    free(w);
    return killed;
}

static void test_backup_k_walk__power_cut_keeps_the_source(void **state)
{
    (void)state;
    TEST_SEEDS (seed) {
        unsigned k = 1 + (unsigned)(seed / KINDS % 5);

        while (cut_k((enum kind)(seed % KINDS), seed, k)) {
            k += 5;
            check(k < 4000);
        }
    }
}
