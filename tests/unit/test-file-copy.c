/* SPDX-License-Identifier: Apache-2.0 */
/* file_co_copy(): what the host copies between two files, on real ones and on the simulated disk with its faults. */
#include "base/macros.h"
#include "check.h"
#include "loop/scope.h"
#include "seeds.h"
#include "sim-fixture.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#define FROM "/disk/from"
#define TO   "/disk/to"
#define SIZE ((size_t)64 << 10)

/* ---- on real files ---- */

#define BIG ((size_t)9 << 20) /* several system calls */

struct pair {
    char from[80];
    char to[80];
};

static uint8_t byte_at(size_t i)
{
    return (uint8_t)(i * 31 + (i >> 12));
}

static void put(struct file *f, uint64_t offset, const uint8_t *data, size_t len)
{
    struct iovec iov = {(void *)(uintptr_t)data, len};

    check(file_co_write(f, offset, &iov, 1, false, NULL) == 0);
}

static size_t get(struct file *f, uint64_t offset, uint8_t *ret, size_t len)
{
    struct iovec iov = {ret, len};
    int64_t n = file_co_read(f, offset, &iov, 1, NULL);

    check(n >= 0);
    return (size_t)n;
}

static void copy_on_host(void *arg)
{
    const struct pair *p = arg;
    struct file *from = open_file(p->from, FILE_READ | FILE_WRITE | FILE_CREATE);
    struct file *to = open_file(p->to, FILE_READ | FILE_WRITE | FILE_CREATE);
    uint8_t *data = malloc(BIG);
    uint8_t *back = calloc(1, BIG);

    check(data && back);
    for (size_t i = 0; i < BIG; i++)
        data[i] = byte_at(i);
    put(from, 0, data, BIG);
    put(to, 0, back, 100);
    check(file_co_copy(to, 33, from, 7, BIG - 7) == (int64_t)BIG - 7);
    check(get(to, 33, back, BIG) == BIG - 7);
    check(memcmp(back, data + 7, BIG - 7) == 0);
    /* Where the file ends. */
    check(file_co_copy(to, 0, from, BIG - 10, 4096) == 10);
    check(file_co_copy(to, 0, from, BIG + 10, 4096) == 0);
    /* Not over itself. */
    check(file_co_copy(from, 10, from, 0, 4096) == -EXDEV);
    check(file_co_close(from) == 0 && file_co_close(to) == 0);
    from = open_file("/dev/zero", FILE_READ);
    to = open_file(p->to, FILE_READ | FILE_WRITE);
    check(file_co_copy(to, 0, from, 0, 4096) == -EXDEV);
    check(file_co_close(from) == 0 && file_co_close(to) == 0);
    free(data);
    free(back);
}

static void test_file_copy__copies_on_real_files(void **state)
{
    static const char *const dirs[] = {".", "/dev/shm"};

    static const enum loop_engine engines[] = {LOOP_ENGINE_IO_URING, LOOP_ENGINE_THREADS};

    (void)state;
    for (size_t i = 0; i < 4; i++) {
        struct error *err = NULL;
        struct pair p;
        char dir[40];

        (void)snprintf(dir, sizeof(dir), "%s/test-file-copy-XXXXXX", dirs[i / 2]);
        assert_non_null(mkdtemp(dir));
        (void)snprintf(p.from, sizeof(p.from), "%s/from", dir);
        (void)snprintf(p.to, sizeof(p.to), "%s/to", dir);
        assert_int_equal(loop_run_main(engines[i % 2], "control", copy_on_host, &p, &err), 0);
        unlink(p.from);
        unlink(p.to);
        rmdir(dir);
    }
}

/* ---- on the simulated disk ---- */

static struct sim_disk *make_disk(const struct sim_file_setup *from)
{
    struct sim_file_setup to = {.type = FILE_TYPE_REGULAR, .size = SIZE};
    struct sim_disk *d = sim_disk_new();
    static uint8_t data[SIZE];

    for (size_t i = 0; i < SIZE; i++)
        data[i] = byte_at(i);
    sim_disk_make(d, FROM, from);
    sim_disk_write(d, FROM, 0, data, SIZE);
    sim_disk_make(d, TO, &to);
    return d;
}

/* What lies in the target from `at` on is the source from `from` on, for so many bytes. */
static void must_be_copied(struct sim_disk *d, uint64_t at, uint64_t from, size_t len)
{
    static uint8_t data[SIZE];

    check(sim_disk_read(d, TO, at, data, len) >= 0);
    for (size_t i = 0; i < len; i++)
        check(data[i] == byte_at(from + i));
}

struct copying {
    struct sim_disk *disk;
    struct sim_fault *fault;
    int64_t expected;
};

static void copy_all(void *arg)
{
    struct copying *c = arg;
    struct file *from = open_file(FROM, FILE_READ);
    struct file *to = open_file(TO, FILE_READ | FILE_WRITE);

    check(file_co_copy(to, 0, from, 0, SIZE) == c->expected);
    if (c->expected == (int64_t)SIZE)
        must_be_copied(c->disk, 0, 0, SIZE);
    check(file_co_close(from) == 0 && file_co_close(to) == 0);
}

static void test_file_copy__goes_on_after_short_copies(void **state)
{
    (void)state;
    TEST_SEEDS (seed) {
        struct sim_file_setup from = {.type = FILE_TYPE_REGULAR, .size = SIZE};
        struct sim_fault fault = {
            .name = TO, .ops = SIM_OP(IO_COPY), .kind = SIM_SHORT, .per_mille = 700};
        struct copying c = {.disk = make_disk(&from), .expected = SIZE};

        assert_int_equal(run_with(&fault, c.disk, seed, copy_all, &c), SIM_RETURNED);
        assert_true(fault.seen);
        sim_disk_free(c.disk);
    }
}

/* As the kernel's words differ: there is one for all that mean "not here". */
static void test_file_copy__says_where_the_host_does_not(void **state)
{
    static const int errors[] = {EXDEV, EINVAL, EOPNOTSUPP, ENOSYS};
    static const struct sim_file_setup sources[] = {
        {.type = FILE_TYPE_REGULAR, .size = SIZE, .no_copy = true},
        {.type = FILE_TYPE_REGULAR, .size = SIZE, .tmpfs = true},
        {.type = FILE_TYPE_BLOCK, .size = SIZE},
    };
    struct sim_file_setup regular = {.type = FILE_TYPE_REGULAR, .size = SIZE};

    (void)state;
    for (size_t i = 0; i < ARRAY_SIZE(sources); i++) {
        struct copying c = {.disk = make_disk(&sources[i]), .expected = -EXDEV};

        assert_int_equal(run_on(c.disk, 1, copy_all, &c), SIM_RETURNED);
        sim_disk_free(c.disk);
    }
    for (size_t i = 0; i < ARRAY_SIZE(errors); i++) {
        struct copying c = {.disk = make_disk(&regular), .expected = -EXDEV};
        struct sim_fault fault = {
            .name = TO, .ops = SIM_OP(IO_COPY), .kind = SIM_ERROR, .error = errors[i], .at = 1};

        assert_int_equal(run_with(&fault, c.disk, 1, copy_all, &c), SIM_RETURNED);
        sim_disk_free(c.disk);
    }
}

static void test_file_copy__fails_with_either_file(void **state)
{
    static const char *const names[] = {FROM, TO};
    struct sim_file_setup regular = {.type = FILE_TYPE_REGULAR, .size = SIZE};

    (void)state;
    for (size_t i = 0; i < ARRAY_SIZE(names); i++) {
        struct copying c = {.disk = make_disk(&regular), .expected = -EIO};
        struct sim_fault fault = {
            .name = names[i], .ops = SIM_OP(IO_COPY), .kind = SIM_ERROR, .error = EIO, .at = 1};

        assert_int_equal(run_with(&fault, c.disk, 1, copy_all, &c), SIM_RETURNED);
        sim_disk_free(c.disk);
    }
}

/* ---- left to the host (G8) ---- */

struct leaving {
    struct file *from;
    struct file *to;
    int64_t result;
};

static void copy_in_vain(void *arg)
{
    struct leaving *l = arg;

    l->result = file_co_copy(l->to, 0, l->from, 0, SIZE);
}

static void leave_both(void *arg)
{
    struct leaving l = {
        .from = open_file(FROM, FILE_READ),
        .to = open_file(TO, FILE_READ | FILE_WRITE),
    };
    struct sim_disk *d = arg;
    struct co_scope scope;

    co_scope_init(&scope);
    co_scope_set_deadline(&scope, loop_clock() + 10 * NS_PER_MS);
    check(co_scope_start(&scope, copy_in_vain, &l) == 0);
    co_scope_join(&scope);
    check(l.result == -ETIMEDOUT || l.result == -ECANCELED);
    check(file_detached(l.from) == 1 && file_detached(l.to) == 1);
    /* Both stay for the host, although nobody else has them. */
    file_ref(l.from);
    check(file_co_close(l.to) == 0 && file_co_close(l.from) == 0);
    check(sim_unhang(TO) == 1);
    check(co_sleep_until(loop_clock() + NS_PER_S) == 0);
    check(file_detached(l.from) == 0);
    file_unref(l.from);
    must_be_copied(d, 0, 0, SIZE);
}

static void test_file_copy__is_left_with_both_files(void **state)
{
    (void)state;
    TEST_SEEDS (seed) {
        struct sim_file_setup from = {.type = FILE_TYPE_REGULAR, .size = SIZE};
        struct sim_fault fault = {.name = TO, .ops = SIM_OP(IO_COPY), .kind = SIM_HANG, .at = 1};
        struct sim_disk *d = make_disk(&from);
        struct sim_fault *faults[] = {&fault};
        struct sim_options o;

        sim_options_init(&o, seed);
        o.disk = d;
        o.short_per_mille = 0; /* nobody goes on after a part */
        o.faults = faults;
        o.fault_count = 1;
        assert_int_equal(sim_run(&o, leave_both, d), SIM_RETURNED);
        sim_disk_free(d);
    }
}

/* ---- what a power cut leaves ---- */

static void copy_and_sync_half(void *arg)
{
    struct file *from = open_file(FROM, FILE_READ);
    struct file *to = open_file(TO, FILE_READ | FILE_WRITE);

    (void)arg;
    check(file_co_copy(to, 0, from, 0, SIZE / 2) == (int64_t)SIZE / 2);
    check(file_co_sync(to) == 0);
    check(file_co_copy(to, SIZE / 2, from, SIZE / 2, SIZE / 2) == (int64_t)SIZE / 2);
    check(file_co_close(from) == 0 && file_co_close(to) == 0);
}

/* As what is written: durable by a sync, and not before it. */
static void test_file_copy__is_durable_by_a_sync(void **state)
{
    static uint8_t data[SIZE];
    bool lost = false;

    (void)state;
    TEST_SEEDS (seed) {
        struct sim_file_setup from = {.type = FILE_TYPE_REGULAR, .size = SIZE};
        struct sim_disk *d = make_disk(&from);

        assert_int_equal(run_on(d, seed, copy_and_sync_half, NULL), SIM_RETURNED);
        sim_disk_power_cut(d, seed);
        must_be_copied(d, 0, 0, SIZE / 2);
        assert_true(sim_disk_read(d, TO, 0, data, SIZE) >= 0);
        for (size_t i = SIZE / 2; i < SIZE; i++)
            lost |= data[i] != byte_at(i);
        sim_disk_free(d);
    }
    assert_true(!seeds_enough(20) || lost);
}
