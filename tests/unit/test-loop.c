/* SPDX-License-Identifier: Apache-2.0 */
/* The loop, with all three engines: coroutines, waits, scopes, messages, timers, locks, files, sockets. */
#include "base/alloc.h"
#include "base/atomic.h"
#include "loop/co.h"
#include "loop/file.h"
#include "loop/lock.h"
#include "loop/loop-internal.h"
#include "loop/scope.h"
#include "loop/sim/sim.h"
#include "loop/socket.h"
#include "seeds.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* For what depends on the order in which coroutines run, which the simulator shuffles. */
static void on_real(co_entry_fn *body, const void *arg)
{
    static const enum loop_engine engines[] = {LOOP_ENGINE_IO_URING, LOOP_ENGINE_THREADS};

    for (size_t i = 0; i < ARRAY_SIZE(engines); i++) {
        struct error *err = NULL;
        int r = loop_run_main(engines[i], "test", body, (void *)(uintptr_t)arg, &err);

        if (r < 0)
            fail_msg("%s", error_text(err));
    }
}

/* The contract: the same body on all engines, on the simulated one with many seeds. */
static void on_all(co_entry_fn *body, const void *arg)
{
    on_real(body, arg);
    TEST_SEEDS (seed) {
        struct sim_options o;

        sim_options_init(&o, seed);
        assert_int_equal(sim_run(&o, body, (void *)(uintptr_t)arg), SIM_RETURNED);
    }
}

struct counter {
    struct co_scope *scope;
    unsigned value;
    uint64_t until;
    int result;
};

static void add_after_yield(void *arg)
{
    struct counter *c = arg;

    c->value++;
    co_yield ();
    c->value += 10;
}

static void start_two(void *arg)
{
    struct counter a = {0};
    struct counter b = {0};
    struct co_scope s;

    (void)arg;
    co_scope_init(&s);
    assert_int_equal(co_scope_start(&s, add_after_yield, &a), 0);
    assert_int_equal(a.value, 1); /* it ran at once, up to its first wait */
    assert_int_equal(co_scope_start(&s, add_after_yield, &b), 0);
    co_scope_join(&s);
    assert_int_equal(a.value, 11);
    assert_int_equal(b.value, 11);
}

struct late {
    struct co_scope *scope;
    struct counter first;
    struct counter second;
    struct counter third;
};

/* Runs in the tick in which the joiner has been woken, and before it. */
static void start_late(void *arg)
{
    struct late *l = arg;

    co_yield ();
    assert_int_equal(co_scope_start(l->scope, add_after_yield, &l->second), 0);
    assert_int_equal(co_scope_start(l->scope, add_after_yield, &l->third), 0);
}

static void join_late(void *arg)
{
    struct co_scope joined;
    struct co_scope others;
    struct late l = {.scope = &joined};

    (void)arg;
    co_scope_init(&joined);
    co_scope_init(&others);
    assert_int_equal(co_scope_start(&joined, add_after_yield, &l.first), 0);
    assert_int_equal(co_scope_start(&others, start_late, &l), 0);
    co_scope_join(&joined);
    assert_int_equal(l.second.value, 11);
    assert_int_equal(l.third.value, 11);
    co_scope_join(&others);
}

static void test_loop__join_waits_for_those_started_after_the_last_had_ended(void **state)
{
    (void)state;
    on_real(join_late, NULL);
}

static void test_loop__scope_joins_all_that_it_started(void **state)
{
    (void)state;
    on_all(start_two, NULL);
}

static void sleeper(void *arg)
{
    struct counter *c = arg;

    c->result = co_sleep_until(c->until);
}

static void cancel_sleepers(void *arg)
{
    struct counter late = {.until = LOOP_FOREVER};
    struct counter soon = {.until = loop_clock() + NS_PER_MS};
    struct co_scope s;

    (void)arg;
    co_scope_init(&s);
    co_scope_start(&s, sleeper, &late);
    co_scope_start(&s, sleeper, &soon);
    co_sleep_until(loop_clock() + 5 * NS_PER_MS);
    co_scope_cancel(&s);
    co_scope_join(&s);
    assert_int_equal(soon.result, 0);
    assert_int_equal(late.result, -ECANCELED);
    assert_int_equal(co_scope_start(&s, sleeper, &soon), -ECANCELED);
}

static void test_loop__cancelled_scope_ends_waits_and_starts_nothing(void **state)
{
    (void)state;
    on_all(cancel_sleepers, NULL);
}

static void deadline_sleepers(void *arg)
{
    struct counter late = {.until = LOOP_FOREVER};
    struct co_scope s;

    (void)arg;
    co_scope_init(&s);
    co_scope_start(&s, sleeper, &late);
    co_scope_set_deadline(&s, loop_clock() + NS_PER_MS);
    co_scope_join(&s);
    assert_int_equal(late.result, -ETIMEDOUT);
}

static void test_loop__scope_deadline_ends_waits(void **state)
{
    (void)state;
    on_all(deadline_sleepers, NULL);
}

struct contest {
    struct co_mutex mutex;
    struct co_rwlock rwlock;
    unsigned value; /* Protected by mutex. */
    unsigned inside;
    unsigned rounds;
};

static void contend(void *arg)
{
    struct contest *c = arg;

    for (unsigned i = 0; i < c->rounds; i++) {
        unsigned before;

        co_mutex_lock(&c->mutex);
        before = c->value;
        co_yield ();
        c->value = before + 1;
        co_mutex_unlock(&c->mutex);
        if (i % 4) {
            co_rwlock_read(&c->rwlock);
            co_yield ();
            co_rwlock_read_done(&c->rwlock);
        } else {
            co_rwlock_write(&c->rwlock);
            assert_int_equal(atomic_add(&c->inside, 1u), 0);
            co_yield ();
            atomic_sub(&c->inside, 1u);
            co_rwlock_write_done(&c->rwlock);
        }
    }
}

struct remote {
    struct loop_thread *thread;
    struct contest *contest;
};

static void contend_remotely(void *arg)
{
    struct remote *r = arg;

    assert_int_equal(loop_co_call(loop_thread_loop(r->thread), contend, r->contest), 0);
}

static void locks_across_loops(void *arg)
{
    struct contest c = {.rounds = 200};
    struct remote remotes[4];
    struct co_scope s;

    (void)arg;
    co_mutex_init(&c.mutex);
    co_rwlock_init(&c.rwlock);
    co_scope_init(&s);
    for (size_t i = 0; i < ARRAY_SIZE(remotes); i++) {
        struct error *err = NULL;

        remotes[i].contest = &c;
        assert_int_equal(loop_thread_start(&remotes[i].thread, "io", &err), 0);
        for (unsigned k = 0; k < 3; k++)
            co_scope_start(&s, contend_remotely, &remotes[i]);
    }
    co_scope_join(&s);
    assert_int_equal(c.value, 4 * 3 * 200);
    for (size_t i = 0; i < ARRAY_SIZE(remotes); i++)
        loop_thread_stop(remotes[i].thread);
}

static void test_loop__locks_exclude_across_threads(void **state)
{
    (void)state;
    on_all(locks_across_loops, NULL);
}

static void remote_sleeper(void *arg)
{
    struct remote *r = arg;
    struct counter c = {.until = LOOP_FOREVER};

    assert_int_equal(loop_co_call(loop_thread_loop(r->thread), sleeper, &c), 0);
    assert_int_equal(c.result, -ECANCELED);
}

static void cancel_remote(void *arg)
{
    struct remote r;
    struct co_scope s;
    struct error *err = NULL;

    (void)arg;
    assert_int_equal(loop_thread_start(&r.thread, "io", &err), 0);
    co_scope_init(&s);
    co_scope_start(&s, remote_sleeper, &r);
    co_sleep_until(loop_clock() + 2 * NS_PER_MS);
    co_scope_cancel(&s);
    co_scope_join(&s);
    loop_thread_stop(r.thread);
}

static void test_loop__cancelling_reaches_a_call_on_another_loop(void **state)
{
    (void)state;
    on_all(cancel_remote, NULL);
}

struct mutex_timeout {
    struct co_mutex mutex;
    int result;
};

static void lock_with_deadline(void *arg)
{
    struct mutex_timeout *t = arg;

    t->result = co_mutex_lock_until(&t->mutex, loop_clock() + 2 * NS_PER_MS);
}

static void mutex_deadline(void *arg)
{
    struct mutex_timeout t;
    struct co_scope s;

    (void)arg;
    co_mutex_init(&t.mutex);
    co_mutex_lock(&t.mutex);
    co_scope_init(&s);
    co_scope_start(&s, lock_with_deadline, &t);
    co_scope_join(&s);
    assert_int_equal(t.result, -ETIMEDOUT);
    co_mutex_unlock(&t.mutex);
    assert_true(co_mutex_try_lock(&t.mutex));
}

static void test_loop__mutex_wait_ends_at_its_deadline(void **state)
{
    (void)state;
    on_all(mutex_deadline, NULL);
}

static void file_round_trip(void *arg)
{
    const char *dir = arg;
    AUTO(free_ptr) char *path = xasprintf("%s/cairn-test-loop.%d", dir, (int)getpid());
    struct error *err = NULL;
    struct file *f;
    struct file_info info;
    struct file_extent extents[8];
    struct iobuf *b = iobuf_new(1 << 20);
    struct iovec iov = {b->data, 1 << 20};
    int n;

    if (file_co_open(&f, path, FILE_READ | FILE_WRITE | FILE_CREATE | FILE_TRUNCATE, 0600, &err) <
        0)
        fail_msg("%s", error_text(err));
    memset(b->data, 0x5a, 1 << 20);
    assert_int_equal(file_co_truncate(f, 4 << 20), 0);
    assert_int_equal(file_co_write(f, 1 << 20, &iov, 1, false, b), 0);
    iov = (struct iovec){b->data, 4096};
    assert_int_equal(file_co_write(f, (4 << 20) - 4096, &iov, 1, true, b), 0);
    assert_int_equal(file_co_sync(f), 0);
    assert_int_equal(file_co_punch(f, 1 << 20, 65536), 0);
    assert_int_equal(file_co_stat(f, &info), 0);
    assert_int_equal(info.size, 4 << 20);
    n = file_co_extents(f, 0, 8 << 20, extents, 8);
    assert_int_equal(n, 5);
    assert_false(extents[0].data);
    assert_int_equal(extents[0].len, (1 << 20) + 65536);
    assert_true(extents[1].data);
    assert_false(extents[2].data);
    assert_true(extents[3].data);
    assert_int_equal(extents[3].len, 4096);
    assert_int_equal(extents[4].len, 4 << 20);
    memset(b->data, 0, 1 << 20);
    iov = (struct iovec){b->data, 1 << 20};
    assert_int_equal(file_co_read(f, 1 << 20, &iov, 1, b), 1 << 20);
    assert_int_equal(b->data[0], 0);
    assert_int_equal(b->data[65535], 0);
    assert_int_equal(b->data[65536], 0x5a);
    assert_int_equal(b->data[(1 << 20) - 1], 0x5a);
    assert_int_equal(file_co_read(f, (4 << 20) - 100, &iov, 1, b), 100); /* up to the end */
    assert_int_equal(file_co_lock(f, 100, 1, FILE_LOCK_EXCLUSIVE), 0);
    assert_int_equal(file_co_close(f), 0);
    assert_int_equal(file_co_unlink(path), 0);
    assert_int_equal(file_co_open(&f, path, FILE_READ, 0, &err), -ENOENT);
    assert_non_null(strstr(error_text(err), path));
    error_free(&err);
    iobuf_unref(b);
}

static void test_loop__files_on_tmpfs(void **state)
{
    (void)state;
    on_all(file_round_trip, "/dev/shm");
}

static void test_loop__files_on_disk(void **state)
{
    (void)state;
    on_all(file_round_trip, "/var/tmp");
}

/* Where `path` leads, and what is there. */
static void must_resolve(const char *path, const char *expected, enum file_type type)
{
    AUTO(free_ptr) char *found = NULL;

    assert_int_equal(file_co_resolve(path, &found), type);
    assert_string_equal(found, expected);
}

static void resolve_paths(void *arg)
{
    AUTO(free_ptr) char *dir = xasprintf("/dev/shm/cairn-test-resolve.%d", (int)getpid());
    AUTO(free_ptr) char *file = xasprintf("%s/file", dir);
    AUTO(free_ptr) char *link = xasprintf("%s/link", dir);
    AUTO(free_ptr) char *round = xasprintf("%s/round", dir);
    AUTO(free_ptr) char *longest = xalloc(1, PATH_MAX + 1);
    AUTO(free_ptr) char *dots = xasprintf("%s/.//../%s/link", dir, strrchr(dir, '/') + 1);
    char *found = NULL;
    int fd;

    (void)arg;
    assert_int_equal(mkdir(dir, 0700), 0);
    fd = open(file, O_CREAT | O_WRONLY, 0600);
    assert_true(fd >= 0);
    close(fd);
    assert_int_equal(symlink("file", link), 0);
    assert_int_equal(symlink("round", round), 0);
    must_resolve(file, file, FILE_TYPE_REGULAR);
    must_resolve(link, file, FILE_TYPE_REGULAR);
    must_resolve(dots, file, FILE_TYPE_REGULAR);
    must_resolve(dir, dir, FILE_TYPE_DIRECTORY);
    must_resolve("/", "/", FILE_TYPE_DIRECTORY);
    must_resolve("/dev/null", "/dev/null", FILE_TYPE_CHARACTER);
    assert_int_equal(file_co_resolve(round, &found), -ELOOP);
    assert_int_equal(file_co_resolve("", &found), -ENOENT);
    assert_int_equal(file_co_resolve("/dev/null/x", &found), -ENOTDIR);
    memset(longest, 'a', PATH_MAX);
    assert_int_equal(file_co_resolve(longest, &found), -ENAMETOOLONG);
    unlink(file);
    assert_int_equal(file_co_resolve(link, &found), -ENOENT);
    assert_null(found);
    unlink(link);
    unlink(round);
    rmdir(dir);
}

static void test_loop__resolves_paths(void **state)
{
    (void)state;
    on_real(resolve_paths, NULL);
}

static void locks_conflict(void *arg)
{
    AUTO(free_ptr) char *path = xasprintf("/dev/shm/cairn-test-lock.%d", (int)getpid());
    struct error *err = NULL;
    struct file *a;
    struct file *b;

    (void)arg;
    assert_int_equal(file_co_open(&a, path, FILE_READ | FILE_WRITE | FILE_CREATE, 0600, &err), 0);
    assert_int_equal(file_co_open(&b, path, FILE_READ | FILE_WRITE, 0, &err), 0);
    assert_int_equal(file_co_lock(a, 100, 1, FILE_LOCK_SHARED), 0);
    assert_int_equal(file_co_lock(b, 100, 1, FILE_LOCK_EXCLUSIVE), -EAGAIN);
    assert_int_equal(file_co_lock_test(b, 100, 1, FILE_LOCK_EXCLUSIVE), -EAGAIN);
    assert_int_equal(file_co_lock_test(b, 100, 1, FILE_LOCK_SHARED), 0);
    assert_int_equal(file_co_close(a), 0);
    assert_int_equal(file_co_lock(b, 100, 1, FILE_LOCK_EXCLUSIVE), 0);
    assert_int_equal(file_co_close(b), 0);
    file_co_unlink(path);
}

static void test_loop__file_locks_of_two_opens_conflict(void **state)
{
    (void)state;
    on_all(locks_conflict, NULL);
}

struct echo {
    struct socket *listener;
    size_t bytes;
};

static void echo_serve(void *arg)
{
    struct echo *e = arg;
    struct socket *s;
    char *buf = xalloc(1, 65536);
    int64_t n;

    assert_int_equal(socket_co_accept(e->listener, &s, LOOP_FOREVER), 0);
    while ((n = socket_co_recv(s, buf, 65536, LOOP_FOREVER)) > 0) {
        struct iovec iov[2] = {{buf, (size_t)n / 2}, {buf + n / 2, (size_t)(n - n / 2)}};

        assert_int_equal(socket_co_send(s, iov, 2, LOOP_FOREVER), 0);
        e->bytes += (size_t)n;
    }
    assert_int_equal(n, 0);
    socket_free(s);
    free(buf);
}

struct pump {
    struct socket *socket;
    const char *data;
    size_t len;
};

static void pump_send(void *arg)
{
    struct pump *p = arg;
    struct iovec iov = {(void *)(uintptr_t)p->data, p->len};

    assert_int_equal(socket_co_send(p->socket, &iov, 1, LOOP_FOREVER), 0);
}

static void echo_with(const struct socket_address *listen_at, bool tcp)
{
    struct echo e = {0};
    struct error *err = NULL;
    struct socket *s;
    struct socket_address to = *listen_at;
    struct co_scope scope;
    size_t len = 5 << 20;
    char *out = xalloc(1, len);
    char *in = xalloc(1, len);
    char port[16];

    for (size_t i = 0; i < len; i++)
        out[i] = (char)(i * 7 + (i >> 9));
    if (socket_co_listen(&e.listener, listen_at, &err) < 0)
        fail_msg("%s", error_text(err));
    if (tcp) {
        snprintf(port, sizeof(port), "%u", socket_port(e.listener));
        to.port = port;
    }
    co_scope_init(&scope);
    co_scope_start(&scope, echo_serve, &e);
    if (socket_co_connect(&s, &to, loop_clock() + NS_PER_S, &err) < 0)
        fail_msg("%s", error_text(err));
    struct pump p = {s, out, len};

    co_scope_start(&scope, pump_send, &p);
    assert_int_equal(socket_co_recv_all(s, in, len, LOOP_FOREVER), 0);
    assert_memory_equal(in, out, len);
    assert_int_equal(socket_co_recv(s, in, 1, loop_clock() + NS_PER_MS), -ETIMEDOUT);
    socket_shutdown(s);
    co_scope_join(&scope);
    assert_int_equal(e.bytes, len);
    socket_free(s);
    socket_free(e.listener);
    free(in);
    free(out);
}

static void echo_unix(void *arg)
{
    AUTO(free_ptr) char *path = xasprintf("/tmp/cairn-test-loop.%d.sock", (int)getpid());
    struct socket_address a = {.family = SOCKET_UNIX, .path = path};

    (void)arg;
    echo_with(&a, false);
    assert_int_equal(access(path, F_OK), -1);
}

static void echo_tcp(void *arg)
{
    struct socket_address a = {.family = SOCKET_INET, .host = "127.0.0.1", .port = "0"};

    (void)arg;
    echo_with(&a, true);
}

static void test_loop__unix_socket_echo(void **state)
{
    (void)state;
    on_all(echo_unix, NULL);
}

static void test_loop__tcp_socket_echo(void **state)
{
    (void)state;
    on_all(echo_tcp, NULL);
}

static void accept_cancelled(void *arg)
{
    struct socket_address a = {.family = SOCKET_INET, .host = "127.0.0.1", .port = "0"};
    struct socket *listener;
    struct socket *s;
    struct error *err = NULL;

    (void)arg;
    assert_int_equal(socket_co_listen(&listener, &a, &err), 0);
    assert_int_equal(socket_co_accept(listener, &s, loop_clock() + NS_PER_MS), -ETIMEDOUT);
    socket_free(listener);
}

static void test_loop__accept_ends_at_its_deadline(void **state)
{
    (void)state;
    on_all(accept_cancelled, NULL);
}

struct latency {
    bool stop;
    uint64_t worst_ns;
};

static void measure_latency(void *arg)
{
    struct latency *l = arg;

    while (!l->stop) {
        uint64_t until = loop_clock() + 100 * NS_PER_US;

        assert_int_equal(co_sleep_until(until), 0);
        if (loop_now() - until > l->worst_ns)
            l->worst_ns = loop_now() - until;
    }
}

static void read_much(void *arg)
{
    struct latency *l = arg;
    struct iobuf *b = iobuf_new(65536);
    struct iovec iov = {b->data, 65536};
    struct error *err = NULL;
    struct co_scope s;
    struct file *f;

    if (file_co_open(&f, "/dev/shm/f", FILE_READ | FILE_WRITE | FILE_CREATE, 0600, &err) < 0)
        fail_msg("%s", error_text(err));
    memset(b->data, 1, 65536);
    assert_int_equal(file_co_write(f, 0, &iov, 1, false, b), 0);
    co_scope_init(&s);
    co_scope_start(&s, measure_latency, l);
    for (unsigned i = 0; i < 1000; i++)
        assert_int_equal(file_co_read(f, 0, &iov, 1, b), 65536);
    l->stop = true;
    co_scope_join(&s);
    iobuf_unref(b);
    file_co_close(f);
}

/* L2: what is ready waits for the rest of one budget, and for one more if it comes last. */
static void test_loop__inline_io_keeps_its_budget(void **state)
{
    uint64_t worst_ns = 0;

    (void)state;
    TEST_SEEDS (seed) {
        struct latency l = {.stop = false};
        struct sim_options o;

        sim_options_init(&o, seed);
        o.preempt_per_mille = 0; /* no other loop takes the time */
        assert_int_equal(sim_run(&o, read_much, &l), SIM_RETURNED);
        worst_ns = MAX(worst_ns, l.worst_ns);
    }
    assert_in_range(worst_ns, 50 * NS_PER_US, 2 * INLINE_TICK_NS + 50 * NS_PER_US);
}

static void test_loop__timers_fire_in_order(void **state)
{
    struct timer t[200];
    struct timer_heap heap = {0};
    uint64_t last = 0;

    (void)state;
    for (unsigned i = 0; i < 200; i++) {
        t[i] = (struct timer){.deadline_ns = (i * 7919u) % 1009u};
        timer_heap_insert(&heap, &t[i]);
    }
    for (unsigned i = 0; i < 200; i += 3)
        timer_heap_remove(&heap, &t[i]);
    for (unsigned left = 200 - 67; left; left--) {
        assert_true(heap.root->deadline_ns >= last);
        last = heap.root->deadline_ns;
        timer_heap_remove(&heap, heap.root);
    }
    assert_null(heap.root);
}
