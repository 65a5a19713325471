/* SPDX-License-Identifier: Apache-2.0 */
/* Copies of whole images: what is copied at a time, where something is waited for and where nothing is. */
#include "cli/image/image-copy.h"
#include "formats/list.h"
#include "graph-fixture.h"
#include "loop/sim/sim.h"
#include "protocols/list.h"
#include "seeds.h"

#include <stdlib.h>
#include <unistd.h>

#define PIECE   (256 * KIB) /* what a worker takes at a time */
#define PIECES  32
#define WORKERS 8
#define WAIT_NS (20 * NS_PER_MS)

static const struct driver *const *const drivers[] = {protocol_drivers, format_drivers, NULL};

struct trial {
    const char *from;
    const char *to;
    bool in_order;
    uint64_t ns;      /* how long it took */
    uint64_t started; /* coroutines */
};

static void copy(void *arg)
{
    struct trial *t = arg;
    struct graph *g = graph_new(drivers);
    struct tool_progress progress = {.shown = false};
    struct image_copy_source from = {.size = PIECES * PIECE};
    struct image_copy copy = {
        .sources = &from,
        .source_count = 1,
        .target_name = "target",
        .size = PIECES * PIECE,
        .unit = 512,
        .in_order = t->in_order,
        .workers = WORKERS,
        .progress = &progress,
    };
    struct error *err = NULL;
    uint64_t begun;

    must_add(g, "{'driver':'file','node-name':'s','filename':'%s'}", t->from);
    must_add(g, "{'driver':'file','node-name':'t','filename':'%s'}", t->to);
    from.backend = must_attach(g, "s", ACCESS_RW, "source");
    copy.target = must_attach(g, "t", ACCESS_RW, "target");
    begun = loop_clock();
    t->started = loop_counters(loop_self())->coroutines;
    assert_int_equal(image_co_copy(&copy, &err), 0);
    t->started = loop_counters(loop_self())->coroutines - t->started;
    t->ns = loop_clock() - begun;
    assert_int_equal(progress.done, PIECES * PIECE);
    backend_co_free(from.backend);
    backend_co_free(copy.target);
    graph_co_free(g);
}

static uint8_t byte_of(uint64_t piece)
{
    return (uint8_t)(piece * 7 + 1);
}

static void fill(void *ret, uint64_t piece)
{
    memset(ret, byte_of(piece), PIECE);
}

static void test_image_copy__waits_are_shared_by_all_workers(void **state)
{
    struct sim_file_setup setup = {.type = FILE_TYPE_REGULAR, .size = PIECES * PIECE};
    uint8_t *bytes = xnew_n(uint8_t, PIECE);

    (void)state;
    TEST_SEEDS (seed) {
        struct trial t = {.from = "/disk/a", .to = "/disk/b", .in_order = seed % 2};
        struct sim_fault slow = {.name = t.from,
                                 .ops = SIM_OP(IO_READ),
                                 .kind = SIM_DELAY,
                                 .delay_ns = WAIT_NS,
                                 .per_mille = 1000};
        struct sim_fault *faults[] = {&slow};
        struct sim_disk *d = sim_disk_new();
        struct sim_options o;

        sim_disk_make(d, t.to, &setup);
        for (uint64_t i = 0; i < PIECES; i++) {
            fill(bytes, i);
            sim_disk_write(d, t.from, i * PIECE, bytes, PIECE);
        }
        sim_options_init(&o, seed);
        o.short_per_mille = 0; /* or they are waited for again */
        o.disk = d;
        o.faults = faults;
        o.fault_count = 1;
        assert_int_equal(sim_run(&o, copy, &t), SIM_RETURNED);
        assert_in_range(t.ns, PIECES / WORKERS * WAIT_NS, 2 * PIECES / WORKERS * WAIT_NS);
        for (uint64_t i = 0; i < PIECES; i++) {
            assert_int_equal(sim_disk_read(d, t.to, i * PIECE, bytes, PIECE), 0);
            assert_int_equal(bytes[0], byte_of(i));
            assert_int_equal(bytes[PIECE - 1], byte_of(i));
        }
        sim_disk_free(d);
    }
    free(bytes);
}

static void make_file(char *path, bool filled)
{
    uint8_t *bytes = xnew_n(uint8_t, PIECE);
    int fd = mkstemp(path);

    assert_true(fd >= 0);
    assert_int_equal(ftruncate(fd, PIECES * PIECE), 0);
    for (uint64_t i = 0; filled && i < PIECES; i++) {
        fill(bytes, i);
        assert_int_equal(pwrite(fd, bytes, PIECE, (off_t)(i * PIECE)), PIECE);
    }
    close(fd);
    free(bytes);
}

static void test_image_copy__one_worker_does_where_nobody_waits(void **state)
{
    char from[] = "/dev/shm/test-image-copy-XXXXXX";
    char to[] = "/dev/shm/test-image-copy-XXXXXX";
    struct trial t = {.from = from, .to = to, .in_order = true};

    (void)state;
    make_file(from, true);
    make_file(to, false);
    on_engine(LOOP_ENGINE_IO_URING, copy, &t);
    unlink(from);
    unlink(to);
    assert_int_equal(t.started, 1);
}
