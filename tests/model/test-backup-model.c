/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A backup while guests write, under sim by seed: what the target holds in the end is what the source held at the instant,
 * byte for byte, and a guest never gets an error for the backup (C5, P3), whatever becomes of target and scratch.
 *
 *     guests        backup
 *       |          |      |
 *      raw -> cbw -+      |
 *       |                raw
 *      file              file
 */
#include "base/atomic.h"
#include "check.h"
#include "formats/list.h"
#include "graph-fixture.h"
#include "jobs/backup-engine.h"
#include "loop/scope.h"
#include "loop/sim/sim.h"
#include "protocols/list.h"
#include "seeds.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define DISK_SIZE ((uint64_t)1 << 20)
#define GUESTS    4
#define WRITES    30
#define CLUSTERS  (DISK_SIZE / BACKUP_CLUSTER)

static const struct driver *const *const drivers[] = {protocol_drivers, format_drivers, NULL};

struct world {
    struct sim_disk *disk;
    struct prng prng;
    struct graph *graph;
    struct backend *guest;
    struct loop_thread *io[2];
    struct loop_thread *copier;
    struct backup *backup;
    bool offload;
    bool errors_allowed; /* of the target's disk */
    uint64_t speed;
    enum backup_sync sync;
    unsigned writes;      /* of each guest; 0: WRITES */
    uint64_t scratch_max; /* 0: more than ever needed; else no memory is used */
    bool power_fails;     /* when the copy has ended */
    uint64_t cancel_ns;   /* after the start; 0: never */
    bool durable;
    bool copied[CLUSTERS];  /* as the engine says */
    unsigned guests_failed; /* atomic */
    uint8_t at_instant[DISK_SIZE];
    uint8_t target[DISK_SIZE];
    uint8_t source[DISK_SIZE]; /* in the end */
    int result;
};

static void add_disk(struct world *w, const char *name, const char *path)
{
    char json[256];

    snprintf(json, sizeof(json),
             "{'driver': 'raw', 'node-name': '%s', 'discard': 'unmap',"
             " 'file': {'driver': 'file', 'filename': '%s', 'discard': 'unmap'}}",
             name, path);
    must_add(w->graph, "%s", json);
}

struct guest {
    struct world *world;
    struct prng prng;
};

static void guest_write(struct guest *g)
{
    uint64_t offset = prng_below(&g->prng, DISK_SIZE);
    bool big = prng_chance(&g->prng, g->world->scratch_max ? 0 : 100);
    uint64_t len = 1 + prng_below(&g->prng, big ? 200000 : 9000);
    struct iobuf *b;
    struct iovec iov;
    struct request req = {.kind = REQUEST_WRITE, .offset = offset};

    req.len = MIN(len, DISK_SIZE - offset);
    b = iobuf_new(req.len);
    check(b);
    memset(b->data, (int)(1 + prng_below(&g->prng, 255)), req.len);
    iov = (struct iovec){b->data, req.len};
    if (prng_chance(&g->prng, 150)) {
        req.kind = REQUEST_WRITE_ZEROES;
        req.flags = REQUEST_MAY_UNMAP;
    } else if (prng_chance(&g->prng, 100)) {
        req.kind = REQUEST_DISCARD;
    } else {
        req.iov = &iov;
        req.iov_count = 1;
        req.hold = b;
    }
    if (backend_co_request(g->world->guest, &req) < 0)
        atomic_add(&g->world->guests_failed, 1u);
    iobuf_unref(b);
}

static void guest_main(void *arg)
{
    struct guest *g = arg;

    check(backend_attach(g->world->guest) == 0);
    for (unsigned i = 0; i < (g->world->writes ? g->world->writes : WRITES); i++) {
        guest_write(g);
        if (g->world->scratch_max)
            co_sleep_until(loop_clock() + prng_below(&g->prng, 8 * NS_PER_MS));
        else if (prng_chance(&g->prng, 500))
            co_sleep_until(loop_clock() + prng_below(&g->prng, 2 * NS_PER_MS));
    }
}

struct guest_call {
    struct guest guest;
    struct loop *loop;
};

static void call_guest(void *arg)
{
    struct guest_call *c = arg;

    check(loop_co_call(c->loop, guest_main, &c->guest) == 0);
}

/* Looks at the source while the gates are closed. */
static void take_picture(struct change_action *a);

static const struct change_action_ops picture_ops = {.commit = take_picture};

struct picture {
    struct change_action action;
    struct world *world;
};

static void take_picture(struct change_action *a)
{
    struct world *w = container_of(a, struct picture, action)->world;

    check(sim_disk_read(w->disk, "/src", 0, w->at_instant, DISK_SIZE) == 0);
}

static int pause_point(void *arg)
{
    (void)arg;
    co_yield ();
    return co_cancelled();
}

static enum copy_error_action on_error(void *arg, int error, bool is_read)
{
    struct world *w = arg;

    (void)error;
    (void)is_read;
    return prng_chance(&w->prng, 500) ? COPY_RETRY : COPY_FAIL;
}

static void worker(void *arg, bool begins)
{
    (void)arg;
    (void)begins;
}

static const struct copy_policy policy = {
    .co_pause_point = pause_point,
    .worker = worker,
    .on_error = on_error,
};

static void start_backup(struct world *w)
{
    struct backup_options o = {
        .owner = "job 'b'",
        .source = "src",
        .target = "dst",
        .filter_name = "cbw",
        .sync = w->sync,
        .keeps_partial = w->power_fails,
        .point =
            {
                .policy = POINT_BACKUP_FIRST,
                .latency_bound_ns = 20 * NS_PER_MS,
                .timeout_ns = 30 * NS_PER_S,
                .ram_bytes = w->scratch_max ? 0 : prng_below(&w->prng, 3) * 32768,
                .scratch_dir = "/tmp",
                .scratch_max_bytes = w->scratch_max ? w->scratch_max : DISK_SIZE * 2,
            },
        .offload = w->offload,
        .workers = 1 + (unsigned)prng_below(&w->prng, 4),
        .chunk = 65536u << prng_below(&w->prng, 3),
        .speed = w->speed,
        .policy = &policy,
        .policy_arg = w,
    };
    struct picture picture = {.world = w};
    struct error *err = NULL;
    struct change change;

    if (backup_co_new(&w->backup, w->graph, &o, &err) < 0)
        fail_msg("%s", error_text(err));
    change_init(&change, w->graph, "start");
    check(backup_add_actions(w->backup, &change, &err) == 0);
    change_add_action(&change, &picture.action, &picture_ops);
    if (change_co_run(&change, &err) < 0)
        fail_msg("%s", error_text(err));
    change_end(&change);
}

static void run_copy(void *arg)
{
    struct world *w = arg;

    w->result = backup_co_run(w->backup);
}

static void call_copy(void *arg)
{
    struct world *w = arg;

    check(loop_co_call(loop_thread_loop(w->copier), run_copy, w) == 0);
}

static void end_backup(struct world *w)
{
    struct error *err = NULL;

    if (backup_co_end(w->backup, NULL, NULL, &err) < 0)
        fail_msg("%s", error_text(err));
    w->backup = backup_co_free(w->backup);
    check(!graph_find(w->graph, "cbw"));
}

static void world_start(struct world *w)
{
    struct error *err = NULL;
    struct access access = {.wants = ACCESS_READ | ACCESS_WRITE,
                            .tolerates = ACCESS_ALL & ~ACCESS_RESIZE};

    w->graph = graph_new(drivers);
    add_disk(w, "src", "/src");
    add_disk(w, "dst", "/dst");
    check(backend_co_new(&w->guest, w->graph, "src", access, "guest", &err) == 0);
    for (unsigned i = 0; i < 2; i++)
        check(loop_thread_start(&w->io[i], "io", &err) == 0);
    check(loop_thread_start(&w->copier, "copy", &err) == 0);
}

static void world_stop(struct world *w)
{
    w->guest = backend_co_free(w->guest);
    for (unsigned i = 0; i < 2; i++)
        loop_thread_stop(w->io[i]);
    loop_thread_stop(w->copier);
    w->graph = graph_co_free(w->graph);
}

static void copy_or_cancel(struct world *w)
{
    struct co_scope copying;

    co_scope_init(&copying);
    check(co_scope_start(&copying, call_copy, w) == 0);
    if (w->cancel_ns) {
        check(co_sleep_until(loop_clock() + w->cancel_ns) == 0);
        co_scope_cancel(&copying);
    }
    co_scope_join(&copying);
}

static void look_at_result(struct world *w)
{
    w->durable = backup_is_durable(w->backup);
    for (uint64_t i = 0; i < CLUSTERS; i++) {
        uint64_t at = i * BACKUP_CLUSTER;
        uint64_t o;
        uint64_t l;

        w->copied[i] =
            !bitmap_next_dirty(backup_uncopied(w->backup), at, at + BACKUP_CLUSTER, &o, &l) &&
            !bitmap_next_dirty(backup_skipped(w->backup), at, at + BACKUP_CLUSTER, &o, &l);
    }
}

static void full_backup(void *arg)
{
    struct world *w = arg;
    struct guest_call guests[GUESTS];
    struct co_scope scope;

    world_start(w);
    co_scope_init(&scope);
    for (unsigned i = 0; i < GUESTS; i++) {
        guests[i] = (struct guest_call){{w, {prng_next(&w->prng)}}, loop_thread_loop(w->io[i % 2])};
        check(co_scope_start(&scope, call_guest, &guests[i]) == 0);
    }
    co_sleep_until(loop_clock() + prng_below(&w->prng, 5 * NS_PER_MS));
    start_backup(w);
    copy_or_cancel(w);
    if (w->power_fails) {
        look_at_result(w);
        sim_kill();
    }
    end_backup(w);
    co_scope_join(&scope);
    world_stop(w);
    check(sim_disk_read(w->disk, "/dst", 0, w->target, DISK_SIZE) == 0);
}

/* sync=none: the guests run to their end, then it is cancelled. */
static void copy_overwritten(void *arg)
{
    struct world *w = arg;
    struct guest_call guests[GUESTS];
    struct co_scope scope;
    struct co_scope copying;

    world_start(w);
    w->sync = BACKUP_NONE;
    start_backup(w);
    co_scope_init(&copying);
    check(co_scope_start(&copying, call_copy, w) == 0);
    co_scope_init(&scope);
    for (unsigned i = 0; i < GUESTS; i++) {
        guests[i] = (struct guest_call){{w, {prng_next(&w->prng)}}, loop_thread_loop(w->io[i % 2])};
        check(co_scope_start(&scope, call_guest, &guests[i]) == 0);
    }
    co_scope_join(&scope);
    co_scope_cancel(&copying);
    co_scope_join(&copying);
    end_backup(w);
    world_stop(w);
    check(sim_disk_read(w->disk, "/src", 0, w->source, DISK_SIZE) == 0);
    check(sim_disk_read(w->disk, "/dst", 0, w->target, DISK_SIZE) == 0);
}

static void fill(struct sim_disk *disk, const char *path, uint64_t seed)
{
    struct sim_file_setup setup = {.type = FILE_TYPE_REGULAR, .size = DISK_SIZE};
    struct prng prng = {seed};
    uint8_t block[16384];

    sim_disk_make(disk, path, &setup);
    for (uint64_t at = 0; at < DISK_SIZE; at += sizeof(block)) {
        if (prng_chance(&prng, 300))
            continue; /* a hole */
        memset(block, (int)prng_next(&prng) | 1, sizeof(block));
        sim_disk_write(disk, path, at, block, sizeof(block));
    }
}

static void run_world(uint64_t seed, co_entry_fn *body, struct sim_fault **faults, size_t count,
                      struct world *w)
{
    struct sim_options o;

    w->disk = sim_disk_new();
    w->prng.state = seed;
    w->offload = seed % 3;
    fill(w->disk, "/src", seed);
    fill(w->disk, "/dst", seed + 1);
    sim_options_init(&o, seed);
    o.disk = w->disk;
    o.faults = faults;
    o.fault_count = count;
    o.may_end_early = w->power_fails;
    check(sim_run(&o, body, w) == (w->power_fails ? SIM_KILLED : SIM_RETURNED));
    if (w->power_fails) {
        sim_disk_power_cut(w->disk, seed);
        check(sim_disk_read(w->disk, "/dst", 0, w->target, DISK_SIZE) == 0);
    }
    w->disk = sim_disk_free(w->disk);
}

static void test_backup_model__target_is_the_source_at_the_instant(void **state)
{
    uint64_t copies = 0;

    (void)state;
    TEST_SEEDS (seed) {
        struct world *w = calloc(1, sizeof(*w));
        struct sim_fault slow = {.name = "/dst",
                                 .ops = SIM_OP(IO_COPY),
                                 .kind = SIM_DELAY,
                                 .delay_ns = 3 * NS_PER_MS,
                                 .per_mille = 500};
        struct sim_fault *faults[] = {&slow};

        run_world(seed, full_backup, faults, 1, w);
        copies += slow.seen;
        assert_int_equal(w->result, 0);
        assert_int_equal(w->guests_failed, 0);
        for (uint64_t at = 0; at < DISK_SIZE; at++) {
            if (w->target[at] != w->at_instant[at])
                fail_msg("byte %lu is %u, was %u at the instant", (unsigned long)at, w->target[at],
                         w->at_instant[at]);
        }
        free(w);
    }
    assert_true(!seeds_enough(20) || copies > 20);
}

/* The target or the scratch file fails: the backup may fail, the guests must not (P3); what succeeds is true. */
static void test_backup_model__failing_target_and_scratch_harm_no_guest(void **state)
{
    (void)state;
    TEST_SEEDS (seed) {
        struct world *w = calloc(1, sizeof(*w));
        struct sim_fault target = {.name = "/dst",
                                   .ops = SIM_OP(IO_WRITE) | SIM_OP(IO_COPY),
                                   .kind = SIM_ERROR,
                                   .error = EIO,
                                   .per_mille = 100};
        struct sim_fault scratch = {.name = "/tmp/*",
                                    .ops = SIM_OP(IO_WRITE),
                                    .kind = SIM_ERROR,
                                    .error = ENOSPC,
                                    .per_mille = seed % 2 ? 200 : 0};
        struct sim_fault *faults[] = {&target, &scratch};

        run_world(seed, full_backup, faults, 2, w);
        assert_int_equal(w->guests_failed, 0);
        if (w->result == 0)
            assert_memory_equal(w->target, w->at_instant, DISK_SIZE);
        free(w);
    }
}

/*
 * P4: the host does not answer for a copy. The bound ends the wait, so that a change of the source goes through; and what the host
 * does in the end comes over nothing.
 */
static void copy_that_hangs(void *arg)
{
    struct world *w = arg;
    struct error *err = NULL;
    struct co_scope copying;
    struct change change;
    uint64_t began;

    world_start(w);
    start_backup(w);
    co_scope_init(&copying);
    check(co_scope_start(&copying, call_copy, w) == 0);
    check(co_sleep_until(loop_clock() + 100 * NS_PER_MS) == 0);
    began = loop_clock();
    change_init(&change, w->graph, "a change of the source");
    check(change_add_root(&change, "src", &err) == 0);
    check(change_co_run(&change, &err) == 0);
    change_end(&change);
    check(loop_clock() - began < 2 * NS_PER_S);
    check(sim_unhang("/dst") > 0);
    co_scope_join(&copying);
    end_backup(w);
    world_stop(w);
    check(sim_disk_read(w->disk, "/dst", 0, w->target, DISK_SIZE) == 0);
}

static void test_backup_model__copy_that_hangs_holds_up_no_change_of_the_source(void **state)
{
    (void)state;
    TEST_SEEDS (seed) {
        struct world *w = calloc(1, sizeof(*w));
        struct sim_fault hang = {
            .name = "/dst", .ops = SIM_OP(IO_COPY), .kind = SIM_HANG, .at = 1, .times = UINT64_MAX};
        struct sim_fault *faults[] = {&hang};

        run_world(3 * seed + 1, copy_that_hangs, faults, 1, w);
        assert_int_equal(w->result, 0);
        assert_memory_equal(w->target, w->at_instant, DISK_SIZE);
        free(w);
    }
}

/* What guests have overwritten is on the target as it was; with what they have not, that is the point. */
static void test_backup_model__sync_none_keeps_what_is_overwritten(void **state)
{
    (void)state;
    TEST_SEEDS (seed) {
        struct world *w = calloc(1, sizeof(*w));

        run_world(seed, copy_overwritten, NULL, 0, w);
        assert_int_equal(w->result, -ECANCELED);
        assert_int_equal(w->guests_failed, 0);
        for (uint64_t at = 0; at < DISK_SIZE; at++) {
            if (w->source[at] != w->at_instant[at] && w->target[at] != w->at_instant[at])
                fail_msg("byte %lu was %u, is %u, and %u on the target", (unsigned long)at,
                         w->at_instant[at], w->source[at], w->target[at]);
        }
        free(w);
    }
}

/* Scratch has little room, and is used again when the target has what it held: the point stays true, or breaks. */
static void test_backup_model__scratch_space_is_used_again(void **state)
{
    (void)state;
    TEST_SEEDS (seed) {
        struct world *w = calloc(1, sizeof(*w));

        w->writes = 60;
        w->scratch_max = (1 + seed % 4) * 49152;
        w->speed = DISK_SIZE * 12;
        run_world(seed, full_backup, NULL, 0, w);
        assert_int_equal(w->guests_failed, 0);
        assert_true(w->result == 0 || w->result == -ESTALE);
        if (w->result == 0)
            assert_memory_equal(w->target, w->at_instant, DISK_SIZE);
        free(w);
    }
}

/* C3, and what a tool may do when the job is pending: what is called copied is durable. */
static void copies_and_loses_power(bool fails)
{
    TEST_SEEDS (seed) {
        struct world *w = calloc(1, sizeof(*w));
        struct sim_fault drops = {.name = "/dst",
                                  .ops = SIM_OP(IO_SYNC),
                                  .kind = SIM_SYNC_DROPS,
                                  .per_mille = seed % 3 ? 0 : 500};
        struct sim_fault error = {.name = "/dst",
                                  .ops = SIM_OP(IO_WRITE),
                                  .kind = SIM_ERROR,
                                  .error = EIO,
                                  .at = fails && seed % 2 ? 1 + seed % 9 : UINT64_MAX,
                                  .times = UINT64_MAX};
        struct sim_fault *faults[] = {&drops, &error};

        w->power_fails = true;
        w->speed = DISK_SIZE * 50;
        w->cancel_ns = fails && seed % 2 == 0 ? seed % 20 * NS_PER_MS : 0;
        run_world(seed, full_backup, faults, 2, w);
        assert_true(w->durable || w->result < 0);
        for (uint64_t i = 0; w->durable && i < CLUSTERS; i++) {
            uint64_t at = i * BACKUP_CLUSTER;

            if (w->copied[i])
                assert_memory_equal(w->target + at, w->at_instant + at, BACKUP_CLUSTER);
            assert_true(w->copied[i] || w->result < 0);
        }
        free(w);
    }
}

static void test_backup_model__what_is_done_is_durable(void **state)
{
    (void)state;
    copies_and_loses_power(false);
}

static void test_backup_model__what_a_failure_leaves_is_durable_in_part(void **state)
{
    (void)state;
    copies_and_loses_power(true);
}
