/* SPDX-License-Identifier: Apache-2.0 */
/* The simulator itself: it repeats, it reports, it cuts the power and kills (S4, S5, T1). */
#include "base/atomic.h"
#include "loop/lock.h"
#include "loop/scope.h"
#include "loop/socket.h"
#include "seeds.h"
#include "sim-fixture.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <errno.h>
#include <stdlib.h>
#include <string.h>

static char disk_byte(struct sim_disk *d, const char *path, uint64_t offset)
{
    char c = 0;

    assert_int_equal(sim_disk_read(d, path, offset, &c, 1), 0);
    return c;
}

/* ---- the same seed is the same run (S4) ---- */

struct busy {
    struct loop_thread *threads[3];
    struct co_mutex mutex;
    struct file *file;
    struct socket *listener;
    unsigned done;
};

static void busy_worker(void *arg)
{
    struct busy *b = arg;
    uint64_t where;

    for (unsigned i = 0; i < 10; i++) {
        loop_random(&where, sizeof(where));
        assert_int_equal(write_byte(b->file, where % 65536, 512, (char)i, false), 0);
        co_mutex_lock(&b->mutex);
        b->done++;
        co_sleep_until(loop_clock() + where % 10000);
        co_mutex_unlock(&b->mutex);
    }
    assert_int_equal(file_co_sync(b->file), 0);
}

static void busy_remote(void *arg)
{
    struct busy *b = arg;

    for (size_t i = 0; i < ARRAY_SIZE(b->threads); i++)
        assert_int_equal(loop_co_call(loop_thread_loop(b->threads[i]), busy_worker, b), 0);
}

static void busy_server(void *arg)
{
    struct busy *b = arg;
    struct socket *s;
    char buf[4096];
    int64_t n;

    assert_int_equal(socket_co_accept(b->listener, &s, LOOP_FOREVER), 0);
    while ((n = socket_co_recv(s, buf, sizeof(buf), LOOP_FOREVER)) > 0) {
        struct iovec iov = {buf, (size_t)n};

        assert_int_equal(socket_co_send(s, &iov, 1, LOOP_FOREVER), 0);
    }
    socket_free(s);
}

static void busy_client(const struct socket_address *a)
{
    struct error *err = NULL;
    struct socket *s;
    char out[3000] = "hello";
    char in[3000];
    struct iovec iov = {out, sizeof(out)};

    assert_int_equal(socket_co_connect(&s, a, LOOP_FOREVER, &err), 0);
    assert_int_equal(socket_co_send(s, &iov, 1, LOOP_FOREVER), 0);
    assert_int_equal(socket_co_recv_all(s, in, sizeof(in), LOOP_FOREVER), 0);
    assert_memory_equal(in, out, sizeof(in));
    socket_shutdown(s);
    socket_free(s);
}

static void busy_world(void *arg)
{
    struct socket_address a = {.family = SOCKET_UNIX, .path = "/sock"};
    struct busy b = {.done = 0};
    struct error *err = NULL;
    struct co_scope scope;

    (void)arg;
    co_mutex_init(&b.mutex);
    b.file = open_file(PATH, FILE_READ | FILE_WRITE | FILE_CREATE);
    assert_int_equal(socket_co_listen(&b.listener, &a, &err), 0);
    for (size_t i = 0; i < ARRAY_SIZE(b.threads); i++)
        assert_int_equal(loop_thread_start(&b.threads[i], "io", &err), 0);
    co_scope_init(&scope);
    for (unsigned i = 0; i < 3; i++)
        co_scope_start(&scope, busy_remote, &b);
    co_scope_start(&scope, busy_server, &b);
    busy_client(&a);
    co_scope_join(&scope);
    assert_int_equal(b.done, 3 * 3 * 10);
    for (size_t i = 0; i < ARRAY_SIZE(b.threads); i++)
        loop_thread_stop(b.threads[i]);
    socket_free(b.listener);
    assert_int_equal(file_co_close(b.file), 0);
}

static void test_sim__same_seed_gives_the_same_trace(void **state)
{
    uint64_t last = 0;

    (void)state;
    TEST_SEEDS (seed) {
        uint64_t first;
        char *moved;

        assert_int_equal(run_on(NULL, seed, busy_world, NULL), SIM_RETURNED);
        first = sim_trace_hash();
        moved = malloc(1000 + seed * 64); /* so that the second run gets other addresses */
        assert_int_equal(run_on(NULL, seed, busy_world, NULL), SIM_RETURNED);
        free(moved);
        if (sim_trace_hash() != first)
            fail_msg("seed %lu: %lx, then %lx", seed, first, sim_trace_hash());
        assert_int_not_equal(first, last); /* and another seed another one */
        last = first;
    }
}

static void sleep_for_a_year(void *arg)
{
    uint64_t begin = loop_clock();
    uint64_t wall = loop_wall_clock();

    (void)arg;
    assert_int_equal(co_sleep_until(begin + 31536000 * NS_PER_S), 0);
    assert_true(loop_clock() - begin >= 31536000 * NS_PER_S);
    assert_true(loop_wall_clock() - wall >= 31536000 * NS_PER_S);
}

static void test_sim__time_jumps_when_all_sleep(void **state)
{
    (void)state;
    TEST_SEEDS (seed)
        assert_int_equal(run_on(NULL, seed, sleep_for_a_year, NULL), SIM_RETURNED);
}

static void lock_twice(void *arg)
{
    struct co_mutex m;

    (void)arg;
    co_mutex_init(&m);
    co_mutex_lock(&m);
    co_mutex_lock(&m);
}

static void test_sim__deadlock_is_found_and_names_the_loop(void **state)
{
    struct sim_options o;

    (void)state;
    sim_options_init(&o, 7);
    o.may_end_early = true;
    assert_int_equal(sim_run(&o, lock_twice, NULL), SIM_DEADLOCK);
    assert_non_null(strstr(sim_report(), "seed 7"));
    assert_non_null(strstr(sim_report(), "loop 'main' sleeps"));
    assert_non_null(strstr(sim_report(), "cannot be cancelled"));
    assert_int_equal(run_on(NULL, 7, busy_world, NULL), SIM_RETURNED); /* nothing is left of it */
}

/* ---- atomics are scheduling points (T1) ---- */

struct unlocked {
    struct loop_thread *thread;
    unsigned value;
    unsigned scratch;
};

static void add_unlocked(void *arg)
{
    struct unlocked *u = arg;

    for (unsigned i = 0; i < 50; i++) {
        unsigned before = u->value;

        atomic_add(&u->scratch, 1u);
        u->value = before + 1;
    }
}

static void call_add_unlocked(void *arg)
{
    struct unlocked *u = arg;

    loop_co_call(loop_thread_loop(u->thread), add_unlocked, u);
}

static void race(void *arg)
{
    struct unlocked *u = arg;
    struct error *err = NULL;
    struct co_scope s;

    assert_int_equal(loop_thread_start(&u->thread, "io", &err), 0);
    co_scope_init(&s);
    co_scope_start(&s, call_add_unlocked, u);
    co_yield ();
    add_unlocked(u);
    co_scope_join(&s);
    loop_thread_stop(u->thread);
}

static void test_sim__loops_interleave_at_atomics(void **state)
{
    unsigned raced = 0;

    (void)state;
    TEST_SEEDS (seed) {
        struct unlocked u = {0};

        assert_int_equal(run_on(NULL, seed, race, &u), SIM_RETURNED);
        raced += u.value != 100;
    }
#ifdef CAIRN_SIM_POINTS
    assert_true(!seeds_enough(50) || (raced > 0));
#else
    assert_int_equal(raced, 0);
#endif
}

struct answer {
    struct loop_message message;
    uint64_t when_ns;
};

static void answer_arrived(struct loop_message *m)
{
    container_of(m, struct answer, message)->when_ns = loop_clock();
}

static void stalled_loop(void *arg)
{
    struct answer a = {.message.fn = answer_arrived};
    struct error *err = NULL;
    struct loop_thread *t;
    uint64_t until = loop_clock() + 200 * NS_PER_MS;

    (void)arg;
    assert_int_equal(loop_thread_start(&t, "io", &err), 0);
    sim_stall(loop_thread_loop(t), until);
    loop_post(loop_thread_loop(t), &a.message);
    co_sleep_until(until - NS_PER_MS);
    assert_int_equal(a.when_ns, 0);
    loop_thread_stop(t);
    assert_true(a.when_ns >= until);
}

static void test_sim__stalled_loop_is_silent(void **state)
{
    (void)state;
    TEST_SEEDS (seed) {
        struct sim_options o;

        sim_options_init(&o, seed);
        o.stall_per_mille = 0; /* which would hit the loop that looks, too */
        assert_int_equal(sim_run(&o, stalled_loop, NULL), SIM_RETURNED);
    }
}

/* ---- power cuts ---- */

static void write_flush_write(void *arg)
{
    struct file *f = open_file(PATH, FILE_READ | FILE_WRITE | FILE_CREATE);

    (void)arg;
    assert_int_equal(write_byte(f, 0, 8192, 'f', false), 0);
    assert_int_equal(file_co_sync(f), 0);
    assert_int_equal(file_co_sync_dir(PATH), 0);
    assert_int_equal(write_byte(f, 4096, 4096, 'u', false), 0);
    assert_int_equal(write_byte(f, 8192, 4096, 'v', false), 0);
    assert_int_equal(file_co_close(f), 0);
}

static void test_sim__power_cut_keeps_drops_and_tears_what_was_not_flushed(void **state)
{
    unsigned kept = 0;
    unsigned dropped = 0;
    unsigned torn = 0;
    unsigned reordered = 0;

    (void)state;
    TEST_SEEDS (seed) {
        struct sim_disk *d = sim_disk_new();
        struct sim_options o;
        unsigned sectors = 0;
        bool second;

        sim_options_init(&o, seed);
        o.disk = d;
        o.short_per_mille = 0; /* whose parts end within a sector */
        assert_int_equal(sim_run(&o, write_flush_write, NULL), SIM_RETURNED);
        assert_int_equal(disk_byte(d, PATH, 4096), 'u'); /* as seen before the cut */
        sim_disk_power_cut(d, seed);
        assert_true(sim_disk_size(d, PATH) >= 8192);
        for (unsigned i = 0; i < 4096; i++)
            assert_int_equal(disk_byte(d, PATH, i), 'f'); /* flushed is never lost (P1) */
        for (unsigned i = 0; i < 8; i++) {
            char c = disk_byte(d, PATH, 4096 + i * 512);

            assert_true(c == 'u' || c == 'f');
            assert_int_equal(disk_byte(d, PATH, 4096 + i * 512 + 511), c);
            sectors += c == 'u';
        }
        second = sim_disk_size(d, PATH) == 12288 && disk_byte(d, PATH, 12287) == 'v';
        kept += sectors == 8;
        dropped += sectors == 0;
        torn += sectors > 0 && sectors < 8;
        reordered += sectors == 0 && second;
        sim_disk_free(d);
    }
    assert_true(!seeds_enough(50) || (kept && dropped && torn && reordered));
}

static void durable_after_plain(void *arg)
{
    struct file *f = open_file(PATH, FILE_READ | FILE_WRITE | FILE_CREATE);

    (void)arg;
    assert_int_equal(file_co_sync_dir(PATH), 0);
    assert_int_equal(write_byte(f, 0, 4096, 'a', false), 0);
    assert_int_equal(write_byte(f, 2048, 1024, 'd', true), 0);
    assert_int_equal(file_co_close(f), 0);
}

static void test_sim__durable_write_makes_itself_durable_only(void **state)
{
    unsigned lost = 0;

    (void)state;
    TEST_SEEDS (seed) {
        struct sim_disk *d = sim_disk_new();

        assert_int_equal(run_on(d, seed, durable_after_plain, NULL), SIM_RETURNED);
        sim_disk_power_cut(d, seed);
        assert_true(sim_disk_size(d, PATH) >= 3072);
        for (unsigned i = 2048; i < 3072; i++)
            assert_int_equal(disk_byte(d, PATH, i), 'd');
        lost += disk_byte(d, PATH, 0) != 'a';
        sim_disk_free(d);
    }
    assert_true(!seeds_enough(50) || (lost > 0));
}

static void sync_fails_for_good(void *arg)
{
    struct file *f = open_file(PATH, FILE_READ | FILE_WRITE | FILE_CREATE);

    (void)arg;
    assert_int_equal(file_co_sync_dir(PATH), 0);
    assert_int_equal(write_byte(f, 0, 4096, 'a', false), 0);
    assert_int_equal(file_co_sync(f), -EIO);
    assert_int_equal(file_co_sync(f),
                     -EIO); /* the file remembers; who opens it anew is lied to (I3) */
    assert_int_equal(file_co_close(f), 0);
    f = open_file(PATH, FILE_READ | FILE_WRITE);
    assert_int_equal(file_co_sync(f), 0);
    assert_int_equal(file_co_close(f), 0);
}

static void test_sim__failed_sync_drops_pages_and_the_next_open_file_is_lied_to(void **state)
{
    unsigned lost = 0;
    unsigned shown = 0;

    (void)state;
    TEST_SEEDS (seed) {
        struct sim_fault f = {.ops = SIM_OP(IO_SYNC), .kind = SIM_SYNC_DROPS, .at = 1};
        struct sim_disk *d = sim_disk_new();
        bool seen;

        assert_int_equal(run_with(&f, d, seed, sync_fails_for_good, NULL), SIM_RETURNED);
        seen = disk_byte(d, PATH, 0) == 'a';
        sim_disk_power_cut(d, seed);
        if (disk_byte(d, PATH, 0) != 'a') {
            lost++;
            shown += seen; /* the page cache still showed it */
        }
        sim_disk_free(d);
    }
    assert_true(!seeds_enough(50) || (lost && shown && shown < lost));
}

struct naming {
    bool sync;
};

static void create_and_rename(void *arg)
{
    const struct naming *n = arg;
    struct file *f = open_file("/dir/new", FILE_WRITE | FILE_CREATE);

    assert_int_equal(write_byte(f, 0, 4, 'n', false), 0);
    assert_int_equal(file_co_sync(f), 0);
    assert_int_equal(file_co_close(f), 0);
    assert_int_equal(file_co_rename("/dir/new", "/dir/name"), 0);
    if (n->sync)
        assert_int_equal(file_co_sync_dir("/dir"), 0);
    f = open_file("/dir/extra", FILE_WRITE | FILE_CREATE);
    assert_int_equal(file_co_close(f), 0);
}

static void test_sim__names_are_lost_without_a_sync_of_the_directory(void **state)
{
    unsigned old = 0;
    unsigned new = 0;
    unsigned extra = 0;

    (void)state;
    TEST_SEEDS (seed) {
        struct naming n = {.sync = seed % 4 == 0};
        struct sim_disk *d = sim_disk_new();
        char c;

        sim_disk_write(d, "/dir/name", 0, "oooo", 4);
        assert_int_equal(run_on(d, seed, create_and_rename, &n), SIM_RETURNED);
        sim_disk_power_cut(d, seed);
        c = disk_byte(d, "/dir/name", 0); /* one or the other, never none */
        assert_true(c == 'n' || (c == 'o' && !n.sync));
        old += c == 'o';
        new += c == 'n' && !n.sync;
        if (n.sync || c == 'n')
            assert_int_equal(sim_disk_size(d, "/dir/new"), -ENOENT);
        extra += sim_disk_size(d, "/dir/extra") == -ENOENT;
        sim_disk_free(d);
    }
    assert_true(!seeds_enough(50) || (old && new &&extra));
}

static void test_sim__tmpfs_is_empty_after_a_power_cut(void **state)
{
    struct sim_disk *d = sim_disk_new();

    (void)state;
    sim_disk_write(d, "/run/cairn/bits", 0, "x", 1);
    sim_disk_write(d, "/var/bits", 0, "x", 1);
    sim_disk_power_cut(d, 1);
    assert_int_equal(sim_disk_size(d, "/run/cairn/bits"), -ENOENT);
    assert_int_equal(sim_disk_size(d, "/var/bits"), 1);
    sim_disk_free(d);
}

/* A record that counts up; after each step the old or the new value is there, whenever the process dies. */
static void count_up(void *arg)
{
    uint64_t *done = arg;
    struct file *f = open_file(PATH, FILE_READ | FILE_WRITE);

    for (unsigned i = 1; i <= 5; i++) {
        assert_int_equal(write_byte(f, 0, 512, (char)i, false), 0);
        assert_int_equal(file_co_sync(f), 0);
        *done = i;
    }
    assert_int_equal(file_co_close(f), 0);
}

static void test_sim__process_can_be_killed_at_each_operation(void **state)
{
    unsigned ahead = 0;

    (void)state;
    TEST_SEEDS (seed) {
        for (unsigned k = 1;; k++) {
            struct sim_disk *d = sim_disk_new();
            struct sim_options o;
            uint64_t done = 0;
            enum sim_end end;
            char c;

            sim_options_init(&o, seed);
            sim_disk_write(d, PATH, 0, "\0", 1);
            o.disk = d;
            o.may_end_early = true;
            o.kill_at_op = k;
            end = sim_run(&o, count_up, &done);
            sim_disk_power_cut(d, seed + k);
            c = disk_byte(d, PATH, 0);
            if (c < (char)done || c > (char)done + 1)
                fail_msg("killed at %u: %lu were done, %d is there", k, done, c);
            ahead += c > (char)done;
            sim_disk_free(d);
            if (end == SIM_RETURNED)
                break;
            assert_int_equal(end, SIM_KILLED);
        }
    }
    assert_true(!seeds_enough(50) || (ahead > 0));
}

static void sleep_long(void *arg)
{
    (void)arg;
    co_sleep_until(LOOP_FOREVER - 1);
}

static void kill_myself(void *arg)
{
    (void)arg;
    sim_kill();
}

static void test_sim__process_can_be_killed_at_a_time(void **state)
{
    struct sim_options o;

    (void)state;
    sim_options_init(&o, 1);
    o.may_end_early = true;
    o.kill_at_ns = 5 * NS_PER_S;
    assert_int_equal(sim_run(&o, sleep_long, NULL), SIM_KILLED);
    assert_int_equal(sim_run(&o, kill_myself, NULL), SIM_KILLED);
}
