/* SPDX-License-Identifier: Apache-2.0 */
/* The faults that the simulator makes in files and sockets: each is seen to strike (S5). */
#include "base/alloc.h"
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

/* ---- faults of files ---- */

static void write_three(void *arg)
{
    int *results = arg;
    struct file *f = open_file(PATH, FILE_READ | FILE_WRITE | FILE_CREATE);

    for (unsigned i = 0; i < 3; i++)
        results[i] = write_byte(f, i * 4096, 4096, 'x', false);
    file_co_close(f);
}

static void test_sim_faults__kth_operation_fails(void **state)
{
    static const int errors[] = {EIO, ENOSPC};

    (void)state;
    TEST_SEEDS (seed) {
        struct sim_fault f = {
            .name = "*.img",
            .ops = SIM_OP(IO_WRITE),
            .kind = SIM_ERROR,
            .error = errors[seed % 2],
            .at = 2,
        };
        struct sim_options o;
        struct sim_fault *faults = &f;
        int results[3];

        sim_options_init(&o, seed);
        o.short_per_mille = 0; /* which would make more operations of one write */
        o.faults = &faults;
        o.fault_count = 1;
        assert_int_equal(sim_run(&o, write_three, results), SIM_RETURNED);
        assert_int_equal(results[0], 0);
        assert_int_equal(results[1], -f.error);
        assert_int_equal(results[2], 0);
        assert_int_equal(f.seen, 3);
        assert_int_equal(f.fired, 1);
    }
}

static void write_and_read_back(void *arg)
{
    struct file *f = open_file(PATH, FILE_READ | FILE_WRITE | FILE_CREATE);
    struct iobuf *b = iobuf_new(65536);
    struct iovec iov = {b->data, 65536};

    (void)arg;
    assert_int_equal(write_byte(f, 100, 65536, 'y', false), 0);
    assert_int_equal(file_co_read(f, 100, &iov, 1, b), 65536);
    for (unsigned i = 0; i < 65536; i++)
        assert_int_equal(b->data[i], 'y');
    iobuf_unref(b);
    file_co_close(f);
}

static void test_sim_faults__short_transfers_are_continued(void **state)
{
    uint64_t most = 0;

    (void)state;
    TEST_SEEDS (seed) {
        struct sim_fault f = {
            .ops = SIM_OP(IO_WRITE) | SIM_OP(IO_READ), .kind = SIM_SHORT, .per_mille = 800};

        assert_int_equal(run_with(&f, NULL, seed, write_and_read_back, NULL), SIM_RETURNED);
        most = f.seen > most ? f.seen : most;
    }
    assert_true(!seeds_enough(50) || (most > 4));
}

struct hang {
    struct file *file;
    struct iobuf *buf; /* NULL: a stack's memory */
    char bytes[512];
    int64_t result;
    bool ended;
};

static void hanging_read(void *arg)
{
    struct hang *h = arg;
    struct iovec iov = {h->buf ? h->buf->data : (void *)h->bytes, 512};

    h->result = file_co_read(h->file, 0, &iov, 1, h->buf);
    h->ended = true;
}

static void hang_with_pool_memory(void *arg)
{
    struct hang h = {.file = open_file(PATH, FILE_READ), .buf = iobuf_new(512)};
    struct co_scope s;

    (void)arg;
    co_scope_init(&s);
    co_scope_start(&s, hanging_read, &h);
    co_sleep_until(loop_clock() + NS_PER_S);
    assert_false(h.ended);
    co_scope_cancel(&s);
    co_scope_join(&s); /* at once: the buffer stays with the operation (G8) */
    assert_int_equal(h.result, -ECANCELED);
    assert_int_equal(file_detached(h.file), 1);
    iobuf_unref(h.buf);
    for (unsigned i = 0; i < 4; i++) { /* nobody else is given that memory meanwhile */
        struct iobuf *b = iobuf_new(512);

        assert_ptr_not_equal(b, h.buf);
        iobuf_unref(b);
    }
    assert_int_equal(sim_unhang("*.img"), 1);
    co_sleep_until(loop_clock() + NS_PER_S);
    assert_int_equal(file_detached(h.file), 0);
    file_co_close(h.file);
}

static void test_sim_faults__hanging_read_leaves_its_buffer_behind(void **state)
{
    (void)state;
    TEST_SEEDS (seed) {
        struct sim_fault f = {.ops = SIM_OP(IO_READ), .kind = SIM_HANG, .at = 1};
        struct sim_disk *d = sim_disk_new();

        sim_disk_write(d, PATH, 0, "data", 4);
        assert_int_equal(run_with(&f, d, seed, hang_with_pool_memory, NULL), SIM_RETURNED);
        sim_disk_free(d);
    }
}

static void hang_with_own_memory(void *arg)
{
    struct hang h = {.file = open_file(PATH, FILE_READ)};
    struct co_scope s;

    (void)arg;
    co_scope_init(&s);
    co_scope_start(&s, hanging_read, &h);
    co_scope_cancel(&s);
    co_sleep_until(loop_clock() + NS_PER_S);
    assert_false(h.ended); /* its memory is not the pool's: it must wait (G8) */
    sim_unhang(NULL);
    co_scope_join(&s);
    assert_int_equal(h.result, 4);
    assert_memory_equal(h.bytes, "data", 4);
    file_co_close(h.file);
}

static void test_sim_faults__hanging_read_into_own_memory_is_waited_for(void **state)
{
    struct sim_disk *d = sim_disk_new();

    (void)state;
    sim_disk_write(d, PATH, 0, "data", 4);
    TEST_SEEDS (seed) {
        struct sim_fault hang = {.ops = SIM_OP(IO_READ), .kind = SIM_HANG, .at = 1};
        struct sim_fault late = {.ops = SIM_OP(IO_READ), .kind = SIM_LATE, .per_mille = 1000};
        struct sim_fault *faults[] = {&hang, &late};
        struct sim_options o;

        sim_options_init(&o, seed);
        o.disk = d;
        o.short_per_mille = 0;
        o.faults = faults;
        o.fault_count = 2;
        assert_int_equal(sim_run(&o, hang_with_own_memory, NULL), SIM_RETURNED);
    }
    sim_disk_free(d);
}

static void hang_to_the_end(void *arg)
{
    struct hang h = {.file = open_file(PATH, FILE_READ), .buf = iobuf_new(512)};
    struct co_scope s;

    (void)arg;
    co_scope_init(&s);
    co_scope_start(&s, hanging_read, &h);
    co_scope_cancel(&s);
    co_scope_join(&s);
    iobuf_unref(h.buf);
    file_unref(h.file);
}

static void test_sim_faults__operations_may_outlive_the_process(void **state)
{
    struct sim_disk *d = sim_disk_new();

    (void)state;
    sim_disk_write(d, PATH, 0, "data", 4);
    TEST_SEEDS (seed) {
        struct sim_fault f = {.ops = SIM_OP(IO_READ), .kind = SIM_HANG, .at = 1};

        assert_int_equal(run_with(&f, d, seed, hang_to_the_end, NULL), SIM_RETURNED);
    }
    sim_disk_free(d);
}

static void late_writer(void *arg)
{
    struct hang *h = arg;
    struct iovec iov = {h->buf->data, 512};

    h->result = file_co_write(h->file, 0, &iov, 1, false, h->buf);
}

static void cancel_a_write(void *arg)
{
    struct hang h = {.file = open_file(PATH, FILE_READ | FILE_WRITE | FILE_CREATE),
                     .buf = iobuf_new(512)};
    struct co_scope s;
    unsigned *late = arg;
    struct file_info info;

    memset(h.buf->data, 'l', 512);
    co_scope_init(&s);
    co_scope_start(&s, late_writer, &h);
    co_scope_cancel(&s);
    co_scope_join(&s);
    assert_int_equal(h.result, -ECANCELED);
    iobuf_unref(h.buf);
    assert_int_equal(file_co_stat(h.file, &info), 0);
    co_sleep_until(loop_clock() + NS_PER_S);
    assert_int_equal(file_detached(h.file), 0);
    *late += info.size == 0;
    assert_int_equal(file_co_stat(h.file, &info), 0);
    assert_int_equal(info.size, 512); /* cancelled, and it happened all the same */
    file_co_close(h.file);
}

static void test_sim_faults__cancelled_write_may_complete_late(void **state)
{
    unsigned late = 0;

    (void)state;
    TEST_SEEDS (seed) {
        struct sim_fault slow = {
            .ops = SIM_OP(IO_WRITE), .kind = SIM_DELAY, .delay_ns = 50 * NS_PER_MS, .at = 1};
        struct sim_fault stubborn = {.ops = SIM_OP(IO_WRITE), .kind = SIM_LATE, .at = 1};
        struct sim_fault *faults[] = {&slow, &stubborn};
        struct sim_options o;

        sim_options_init(&o, seed);
        o.short_per_mille = 0;
        o.faults = faults;
        o.fault_count = 2;
        assert_int_equal(sim_run(&o, cancel_a_write, &late), SIM_RETURNED);
    }
    assert_true(!seeds_enough(50) || (late > 0));
}

static void misaligned(void *arg)
{
    struct file *f = open_file(PATH, FILE_READ | FILE_WRITE | FILE_DIRECT);
    struct iobuf *b = iobuf_new(8192);
    struct iovec iov = {b->data, 4096};

    (void)arg;
    assert_int_equal(file_info(f)->offset_align, 4096);
    assert_int_equal(file_info(f)->memory_align, 512);
    assert_int_equal(file_co_read(f, 4096, &iov, 1, b), 4096);
    assert_int_equal(file_co_read(f, 512, &iov, 1, b), -EINVAL);
    iov.iov_len = 512;
    assert_int_equal(file_co_write(f, 0, &iov, 1, false, b), -EINVAL);
    iov = (struct iovec){b->data + 8, 4096};
    assert_int_equal(file_co_write(f, 0, &iov, 1, false, b), -EINVAL);
    iobuf_unref(b);
    file_co_close(f);
}

static void test_sim_faults__misaligned_direct_io_fails(void **state)
{
    struct sim_file_setup setup = {.size = 65536, .offset_align = 4096};
    struct sim_disk *d = sim_disk_new();

    (void)state;
    sim_disk_make(d, PATH, &setup);
    TEST_SEEDS (seed)
        assert_int_equal(run_on(d, seed, misaligned, NULL), SIM_RETURNED);
    sim_disk_free(d);
}

static void block_device(void *arg)
{
    struct error *err = NULL;
    struct file *f = open_file("/dev/vdb", FILE_READ | FILE_WRITE);
    struct file *refused;
    struct iobuf *b = iobuf_new(8192);
    struct iovec iov = {b->data, 8192};

    (void)arg;
    assert_int_equal(file_info(f)->type, FILE_TYPE_BLOCK);
    assert_int_equal(file_info(f)->size, 1 << 20);
    assert_int_equal(file_info(f)->logical_block_size, 512);
    assert_int_equal(write_byte(f, (1 << 20) - 4096, 8192, 'x', false), -ENOSPC);
    assert_int_equal(file_co_read(f, (1 << 20) - 4096, &iov, 1, b), 4096);
    assert_int_equal(file_co_truncate(f, 1), -EINVAL);
    assert_int_equal(file_co_open(&refused, "/ro", FILE_WRITE, 0, &err), -EROFS);
    error_free(&err);
    iobuf_unref(b);
    file_co_close(f);
}

static void test_sim_faults__block_devices_end_where_they_end(void **state)
{
    struct sim_disk *d = sim_disk_new();

    (void)state;
    sim_disk_make(d, "/dev/vdb",
                  &(struct sim_file_setup){.type = FILE_TYPE_BLOCK, .size = 1 << 20});
    sim_disk_make(d, "/ro", &(struct sim_file_setup){.read_only = true});
    TEST_SEEDS (seed)
        assert_int_equal(run_on(d, seed, block_device, NULL), SIM_RETURNED);
    sim_disk_free(d);
}

static void split_locks(void *arg)
{
    struct file *a = open_file(PATH, FILE_READ | FILE_WRITE | FILE_CREATE);
    struct file *b = open_file(PATH, FILE_READ | FILE_WRITE);

    (void)arg;
    assert_int_equal(file_co_lock(a, 100, 100, FILE_LOCK_EXCLUSIVE), 0);
    assert_int_equal(file_co_lock(a, 150, 10, FILE_LOCK_NONE), 0);
    assert_int_equal(file_co_lock(b, 150, 10, FILE_LOCK_EXCLUSIVE), 0);
    assert_int_equal(file_co_lock(b, 149, 1, FILE_LOCK_SHARED), -EAGAIN);
    assert_int_equal(file_co_lock(b, 160, 0, FILE_LOCK_SHARED), -EAGAIN);
    assert_int_equal(file_co_lock(a, 160, 40, FILE_LOCK_SHARED), 0); /* less than before */
    assert_int_equal(file_co_lock(b, 160, 0, FILE_LOCK_SHARED), 0);
    assert_int_equal(file_co_lock_test(a, 199, 1, FILE_LOCK_EXCLUSIVE), -EAGAIN);
    assert_int_equal(file_co_close(b), 0);
    assert_int_equal(file_co_lock(a, 0, 0, FILE_LOCK_EXCLUSIVE), 0);
    assert_int_equal(file_co_close(a), 0);
}

static void test_sim_faults__locks_belong_to_the_open_and_split(void **state)
{
    (void)state;
    TEST_SEEDS (seed)
        assert_int_equal(run_on(NULL, seed, split_locks, NULL), SIM_RETURNED);
}

/* ---- faults of sockets ---- */

struct talk {
    struct socket *listener;
    struct socket *client;
    struct socket *server;
};

static void talk_begin(struct talk *t)
{
    struct socket_address a = {.family = SOCKET_INET, .host = "localhost", .port = "10809"};
    struct error *err = NULL;

    assert_int_equal(socket_co_listen(&t->listener, &a, &err), 0);
    a.host = "127.0.0.1";
    if (socket_co_connect(&t->client, &a, LOOP_FOREVER, &err) < 0)
        fail_msg("%s", error_text(err));
    assert_int_equal(socket_co_accept(t->listener, &t->server, LOOP_FOREVER), 0);
}

static void talk_end(struct talk *t)
{
    socket_free(t->client);
    socket_free(t->server);
    socket_free(t->listener);
}

static void reset_talk(void *arg)
{
    struct talk t;
    char c = 'x';
    struct iovec iov = {&c, 1};

    (void)arg;
    talk_begin(&t);
    assert_int_equal(socket_co_send(t.client, &iov, 1, LOOP_FOREVER), 0);
    iov = (struct iovec){&c, 1};
    assert_int_equal(socket_co_send(t.client, &iov, 1, LOOP_FOREVER), -ECONNRESET);
    assert_int_equal(socket_co_recv(t.server, &c, 1, LOOP_FOREVER), -ECONNRESET);
    talk_end(&t);
}

static void test_sim_faults__connection_is_reset_at_the_kth_send(void **state)
{
    (void)state;
    TEST_SEEDS (seed) {
        struct sim_fault f = {
            .name = "localhost:10809", .ops = SIM_OP(IO_SEND), .kind = SIM_RESET, .at = 2};

        assert_int_equal(run_with(&f, NULL, seed, reset_talk, NULL), SIM_RETURNED);
        assert_int_equal(f.fired, 1);
    }
}

static void half_open_talk(void *arg)
{
    struct talk t;
    char *buf = xalloc(1, 1 << 20);
    struct iovec iov = {buf, 1 << 20};

    (void)arg;
    talk_begin(&t);
    /* The buffers fill; nothing arrives; nobody is told. */
    assert_int_equal(socket_co_send(t.client, &iov, 1, loop_clock() + 60 * NS_PER_S), -ETIMEDOUT);
    assert_int_equal(socket_co_recv(t.server, buf, 1, loop_clock() + 60 * NS_PER_S), -ETIMEDOUT);
    free(buf);
    talk_end(&t);
}

static void test_sim_faults__half_open_connection_swallows_everything(void **state)
{
    (void)state;
    TEST_SEEDS (seed) {
        struct sim_fault f = {.ops = SIM_OP(IO_SEND), .kind = SIM_HALF_OPEN, .at = 1};

        assert_int_equal(run_with(&f, NULL, seed, half_open_talk, NULL), SIM_RETURNED);
    }
}

static void slow_talk(void *arg)
{
    struct talk t;
    char c = 'x';
    struct iovec iov = {&c, 1};
    uint64_t begin;

    (void)arg;
    talk_begin(&t);
    begin = loop_clock();
    assert_int_equal(socket_co_send(t.client, &iov, 1, LOOP_FOREVER), 0);
    assert_true(loop_clock() - begin >= 3 * NS_PER_S);
    assert_int_equal(socket_co_recv(t.server, &c, 1, LOOP_FOREVER), 1);
    talk_end(&t);
}

static void test_sim_faults__sends_can_be_slow(void **state)
{
    (void)state;
    TEST_SEEDS (seed) {
        struct sim_fault f = {.ops = SIM_OP(IO_SEND),
                              .kind = SIM_DELAY,
                              .delay_ns = 3 * NS_PER_S,
                              .at = 1,
                              .times = 2}; /* the attempt and the wait */

        assert_int_equal(run_with(&f, NULL, seed, slow_talk, NULL), SIM_RETURNED);
    }
}

static void connect_nowhere(void *arg)
{
    struct socket_address a = {.family = SOCKET_INET, .host = "127.0.0.1", .port = "1"};
    struct socket_address u = {.family = SOCKET_UNIX, .path = "/nobody"};
    struct error *err = NULL;
    struct socket *s;

    (void)arg;
    assert_int_equal(socket_co_connect(&s, &a, LOOP_FOREVER, &err), -ECONNREFUSED);
    error_free(&err);
    assert_int_equal(socket_co_connect(&s, &u, LOOP_FOREVER, &err), -ENOENT);
    error_free(&err);
}

static void test_sim_faults__connecting_to_nobody_is_refused(void **state)
{
    (void)state;
    TEST_SEEDS (seed)
        assert_int_equal(run_on(NULL, seed, connect_nowhere, NULL), SIM_RETURNED);
}

static void connect_hanging(void *arg)
{
    struct socket_address a = {.family = SOCKET_UNIX, .path = "/sock"};
    struct error *err = NULL;
    struct socket *listener;
    struct socket *s;
    uint64_t until = loop_clock() + 5 * NS_PER_S;

    (void)arg;
    assert_int_equal(socket_co_listen(&listener, &a, &err), 0);
    assert_int_equal(socket_co_listen(&s, &a, &err), -EADDRINUSE);
    error_free(&err);
    assert_int_equal(socket_co_connect(&s, &a, until, &err), -ETIMEDOUT);
    error_free(&err);
    assert_true(loop_clock() >= until);
    socket_free(listener);
}

static void test_sim_faults__hanging_connect_ends_at_its_deadline(void **state)
{
    (void)state;
    TEST_SEEDS (seed) {
        struct sim_fault f = {
            .name = "unix:/sock", .ops = SIM_OP(IO_CONNECT), .kind = SIM_HANG, .at = 1};

        assert_int_equal(run_with(&f, NULL, seed, connect_hanging, NULL), SIM_RETURNED);
    }
}

static void unread_at_close(void *arg)
{
    struct talk t;
    char c = 'x';
    struct iovec iov = {&c, 1};

    (void)arg;
    talk_begin(&t);
    assert_int_equal(socket_co_send(t.client, &iov, 1, LOOP_FOREVER), 0);
    t.server = socket_free(t.server);
    assert_int_equal(socket_co_recv(t.client, &c, 1, LOOP_FOREVER), -ECONNRESET);
    talk_end(&t);
}

static void test_sim_faults__closing_with_unread_data_resets(void **state)
{
    (void)state;
    TEST_SEEDS (seed)
        assert_int_equal(run_on(NULL, seed, unread_at_close, NULL), SIM_RETURNED);
}
