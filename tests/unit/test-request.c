/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The way of a request (graph/request.c): what the core does around a driver, seen by a driver over a byte array that refuses
 * whatever its alignment does not allow.
 */
#include "base/atomic.h"
#include "base/checked.h"
#include "base/prng.h"
#include "graph-fixture.h"
#include "graph/tracker.h"
#include "loop/lock.h"
#include "null-co-options.h"
#include "seeds.h"

#include <errno.h>
#include <limits.h>

#define DISK_SIZE ((size_t)64 << 10)

/* The one disk of a case. */
static struct {
    unsigned align;
    unsigned memory_align;
    bool slow; /* yields within reads and writes */
    bool no_zeroes;

    struct tiny_lock lock;
    uint8_t data[DISK_SIZE]; /* Protected by lock while there are several loops. */
    /* Counted atomically. */
    unsigned misfits; /* requests that should not have come */
    unsigned reads;
    unsigned writes;
    unsigned fua_writes;
    unsigned zeroes;
    unsigned discards;
    unsigned flushes;
    unsigned last_flags; /* of a write-zeroes */
} disk;

static int disk_co_open(struct node *node, const void *options, struct error **err)
{
    (void)options;
    (void)err;
    node_set_size(node, DISK_SIZE);
    node_set_alignment(node, disk.align, disk.memory_align);
    return 0;
}

static void disk_co_close(struct node *node)
{
    (void)node;
}

static void check_fit(const struct request *req)
{
    bool fits = is_aligned(req->offset | req->len, disk.align) &&
                range_within(req->offset, req->len, DISK_SIZE);

    for (int i = 0; i < req->iov_count; i++) {
        fits &= is_aligned((uintptr_t)req->iov[i].iov_base, disk.memory_align);
        fits &= is_aligned(req->iov[i].iov_len, MIN(disk.memory_align, disk.align));
    }
    if (!fits)
        atomic_add(&disk.misfits, 1u);
}

static void transfer(const struct request *req, bool write)
{
    uint64_t pos = req->offset;

    check_fit(req);
    tiny_lock_acquire(&disk.lock);
    for (int i = 0; i < req->iov_count; i++) {
        const struct iovec *v = &req->iov[i];

        if (write)
            memcpy(disk.data + pos, v->iov_base, v->iov_len);
        else
            memcpy(v->iov_base, disk.data + pos, v->iov_len);
        pos += v->iov_len;
    }
    tiny_lock_release(&disk.lock);
}

static int disk_co_read(struct node *node, struct request *req)
{
    (void)node;
    atomic_add(&disk.reads, 1u);
    transfer(req, false);
    if (disk.slow)
        co_yield ();
    return 0;
}

static int disk_co_write(struct node *node, struct request *req)
{
    (void)node;
    atomic_add(&disk.writes, 1u);
    if (req->flags & REQUEST_FUA)
        atomic_add(&disk.fua_writes, 1u);
    if (disk.slow)
        co_yield ();
    transfer(req, true);
    return 0;
}

static int disk_co_write_zeroes(struct node *node, struct request *req)
{
    (void)node;
    atomic_add(&disk.zeroes, 1u);
    disk.last_flags = req->flags;
    if (disk.no_zeroes)
        return -EOPNOTSUPP;
    check_fit(req);
    memset(disk.data + req->offset, 0, req->len);
    return 0;
}

/* The content is undefined afterwards: as ugly as possible. */
static int disk_co_discard(struct node *node, struct request *req)
{
    (void)node;
    atomic_add(&disk.discards, 1u);
    check_fit(req);
    memset(disk.data + req->offset, 0xdd, req->len);
    return 0;
}

static int disk_co_flush(struct node *node, struct request *req)
{
    (void)node;
    (void)req;
    atomic_add(&disk.flushes, 1u);
    return 0;
}

/* They go by names of the schema. */
static const struct driver plain_driver = {
    .name = "null-co",
    .kind = DRIVER_PROTOCOL,
    .options = &null_co_options_type,
    .state_size = 1,
    .co_open = disk_co_open,
    .co_close = disk_co_close,
    .co_read = disk_co_read,
    .co_write = disk_co_write,
    .co_write_zeroes = disk_co_write_zeroes,
    .co_discard = disk_co_discard,
    .co_flush = disk_co_flush,
};

static const struct driver fua_driver = {
    .name = "null-co",
    .kind = DRIVER_PROTOCOL,
    .options = &null_co_options_type,
    .state_size = 1,
    .fua = true,
    .co_open = disk_co_open,
    .co_close = disk_co_close,
    .co_read = disk_co_read,
    .co_write = disk_co_write,
    .co_flush = disk_co_flush,
};

static const struct driver *const plain_list[] = {&plain_driver, NULL};
static const struct driver *const fua_list[] = {&fua_driver, NULL};
static const struct driver *const *const plain_drivers[] = {plain_list, NULL};
static const struct driver *const *const fua_drivers[] = {fua_list, NULL};

static struct graph *graph;
static struct backend *backend;

static void open_disk(const struct driver *const *const *drivers, unsigned align,
                      unsigned memory_align, const char *more)
{
    memset(&disk, 0, sizeof(disk));
    disk.align = align;
    disk.memory_align = memory_align;
    graph = graph_new(drivers);
    must_add(graph, "{'driver':'null-co','node-name':'d'%s}", more);
    backend = must_attach(graph, "d",
                          strstr(more, "read-only")
                              ? (struct access){.wants = ACCESS_READ, .tolerates = ACCESS_ALL}
                              : ACCESS_RW,
                          "test");
}

static void close_disk(void)
{
    assert_int_equal(disk.misfits, 0);
    backend = backend_co_free(backend);
    graph = graph_co_free(graph);
}

static void fill(void *p, size_t len, uint8_t seed)
{
    for (size_t i = 0; i < len; i++)
        ((uint8_t *)p)[i] = (uint8_t)(seed + i * 7);
}

/* ---- alignment ---- */

/* Each operation at each interesting place, against a flat array. */
static void odd_ranges(void *arg)
{
    static const unsigned at[] = {0, 1, 511, 512, 513, 1023, 4095, 4096, 4097, 8191};
    static const unsigned lens[] = {1, 2, 510, 511, 512, 513, 1025, 4095, 4096, 4097, 9000};
    static uint8_t flat[DISK_SIZE];
    static uint8_t data[DISK_SIZE + 64];
    const unsigned *aligns = arg;

    open_disk(plain_drivers, aligns[0], aligns[1], ",'discard':'unmap'");
    fill(flat, sizeof(flat), 3);
    memcpy(disk.data, flat, sizeof(flat));
    for (unsigned i = 0; i < ARRAY_SIZE(at); i++) {
        for (unsigned k = 0; k < ARRAY_SIZE(lens); k++) {
            uint8_t *odd = data + 1 + (i + k) % 7;

            assert_int_equal(read_at(backend, at[i], lens[k], odd), 0);
            assert_memory_equal(odd, flat + at[i], lens[k]);
            fill(odd, lens[k], (uint8_t)(i * 16 + k));
            memcpy(flat + at[i], odd, lens[k]);
            assert_int_equal(write_at(backend, at[i], lens[k], odd), 0);
            assert_memory_equal(disk.data, flat, sizeof(flat));
            if (k % 3)
                continue;
            memset(flat + at[i], 0, lens[k]);
            assert_int_equal(send_request(backend, REQUEST_WRITE_ZEROES, 0, at[i], lens[k], NULL),
                             0);
            assert_memory_equal(disk.data, flat, sizeof(flat));
        }
    }
    close_disk();
}

static void test_request__any_range_reaches_a_driver_with_any_alignment(void **state)
{
    static const unsigned aligns[][2] = {{1, 1},     {512, 1},   {1, 512},
                                         {512, 512}, {4096, 16}, {4096, 4096}};

    (void)state;
    for (unsigned i = 0; i < ARRAY_SIZE(aligns); i++)
        on_engine(LOOP_ENGINE_THREADS, odd_ranges, aligns[i]);
}

static void random_ranges(void *arg)
{
    static uint8_t flat[DISK_SIZE];
    static uint8_t data[DISK_SIZE];
    struct prng prng = {.state = *(const uint64_t *)arg};
    static const unsigned aligns[] = {1, 512, 4096};
    unsigned align;

    align = aligns[prng_below(&prng, 3)];
    open_disk(plain_drivers, align, align == 1 ? aligns[prng_below(&prng, 3)] : align, "");
    memset(flat, 0, sizeof(flat));
    for (unsigned i = 0; i < 30; i++) {
        uint64_t offset = prng_below(&prng, DISK_SIZE);
        uint64_t len = 1 + prng_below(&prng, DISK_SIZE - offset);
        uint64_t cut = prng_below(&prng, len + 1);
        struct iovec iov[] = {{data, cut}, {data + cut, len - cut}};
        struct request req = {.offset = offset, .len = len, .iov = iov, .iov_count = 2};

        if (prng_chance(&prng, 500)) {
            req.kind = REQUEST_READ;
            assert_int_equal(backend_co_request(backend, &req), 0);
            assert_memory_equal(data, flat + offset, len);
        } else {
            req.kind = REQUEST_WRITE;
            fill(data, len, (uint8_t)prng_next(&prng));
            memcpy(flat + offset, data, len);
            assert_int_equal(backend_co_request(backend, &req), 0);
            assert_memory_equal(disk.data, flat, DISK_SIZE);
        }
    }
    close_disk();
}

static void test_request__vectors_cut_anywhere(void **state)
{
    (void)state;
    TEST_SEEDS (seed)
        on_engine(LOOP_ENGINE_THREADS, random_ranges, &seed);
}

/* ---- what the core adds for drivers that lack it ---- */

static void count_flushes(void *arg)
{
    uint8_t data[4096] = {0};

    (void)arg;
    open_disk(plain_drivers, 512, 1, "");
    assert_int_equal(write_at(backend, 0, 4096, data), 0);
    assert_int_equal(disk.flushes, 0);
    assert_int_equal(send_request(backend, REQUEST_WRITE, REQUEST_FUA, 0, 4096, data), 0);
    assert_int_equal(disk.flushes, 1);
    assert_int_equal(send_request(backend, REQUEST_WRITE, REQUEST_FUA, 1, 100, data), 0);
    assert_int_equal(disk.flushes, 2);
    assert_int_equal(send_request(backend, REQUEST_WRITE_ZEROES, REQUEST_FUA, 0, 4096, NULL), 0);
    assert_int_equal(disk.flushes, 3);
    close_disk();

    open_disk(fua_drivers, 512, 1, "");
    assert_int_equal(send_request(backend, REQUEST_WRITE, REQUEST_FUA, 1, 100, data), 0);
    assert_int_equal(send_request(backend, REQUEST_WRITE_ZEROES, REQUEST_FUA, 0, 4096, NULL), 0);
    assert_int_equal(disk.flushes, 0);
    assert_int_equal(disk.fua_writes, 2);
    close_disk();
}

static void test_request__fua_is_a_flush_after_the_write_or_the_drivers_own(void **state)
{
    (void)state;
    on_both(count_flushes, NULL);
}

static void no_flush(void *arg)
{
    uint8_t data[512] = {0};

    (void)arg;
    open_disk(plain_drivers, 1, 1, ",'cache':{'no-flush':true}");
    assert_int_equal(flush(backend), 0);
    assert_int_equal(send_request(backend, REQUEST_WRITE, REQUEST_FUA, 0, 512, data), 0);
    assert_int_equal(disk.flushes, 0);
    close_disk();
}

static void test_request__no_flush_answers_without_flushing(void **state)
{
    (void)state;
    on_both(no_flush, NULL);
}

static void zeroes_as_data(void *arg)
{
    (void)arg;
    open_disk(plain_drivers, 512, 1, "");
    disk.no_zeroes = true;
    memset(disk.data, 0xaa, DISK_SIZE);
    assert_int_equal(
        send_request(backend, REQUEST_WRITE_ZEROES, REQUEST_NO_FALLBACK, 0, 8192, NULL),
        -EOPNOTSUPP);
    assert_int_equal(disk.writes, 0);
    assert_int_equal(disk.data[0], 0xaa);
    assert_int_equal(send_request(backend, REQUEST_WRITE_ZEROES, 0, 100, 8192, NULL), 0);
    for (unsigned i = 0; i < DISK_SIZE; i++)
        assert_int_equal(disk.data[i], i >= 100 && i < 8292 ? 0 : 0xaa);
    close_disk();

    open_disk(fua_drivers, 4096, 1, ""); /* which has no write-zeroes at all */
    memset(disk.data, 0xaa, DISK_SIZE);
    assert_int_equal(send_request(backend, REQUEST_WRITE_ZEROES, 0, 0, DISK_SIZE, NULL), 0);
    for (unsigned i = 0; i < DISK_SIZE; i++)
        assert_int_equal(disk.data[i], 0);
    close_disk();
}

static void test_request__zeroes_are_written_as_data_unless_the_client_forbids_it(void **state)
{
    (void)state;
    on_both(zeroes_as_data, NULL);
}

/* ---- zeroes that are noticed ---- */

/* Writes two vectors that are zeroes but for the byte at `mark`; UINT_MAX: all of it. Returns how many came as zeroes. */
static unsigned write_marked(unsigned flags, uint64_t offset, unsigned len, unsigned mark)
{
    static uint8_t data[DISK_SIZE];
    struct iovec iov[] = {{data, len / 3}, {data + len / 3, len - len / 3}};
    struct request req = {
        .kind = REQUEST_WRITE,
        .flags = flags,
        .offset = offset,
        .len = len,
        .iov = iov,
        .iov_count = 2,
    };
    unsigned before = disk.zeroes;

    memset(data, 0, sizeof(data));
    if (mark < len)
        data[mark] = 1;
    memset(disk.data, 0xaa, DISK_SIZE);
    assert_int_equal(backend_co_request(backend, &req), 0);
    assert_memory_equal(disk.data + offset, data, len);
    for (unsigned i = 0; i < DISK_SIZE; i++)
        assert_true((i >= offset && i < offset + len) || disk.data[i] == 0xaa);
    assert_ptr_equal(req.iov, iov);
    return disk.zeroes - before;
}

static void detect_zeroes(void *arg)
{
    (void)arg;
    for (unsigned align = 1; align <= 4096; align = align == 1 ? 512 : align * 8) {
        open_disk(plain_drivers, align, 1, ",'detect-zeroes':'on','discard':'unmap'");
        assert_int_equal(write_marked(0, 0, 8192, UINT_MAX), 1);
        assert_int_equal(disk.writes, 0);
        assert_false(disk.last_flags & REQUEST_MAY_UNMAP);
        assert_int_equal(write_marked(0, 0, 8192, 0), 0);
        assert_int_equal(write_marked(0, 0, 8192, 2730), 0);
        assert_int_equal(write_marked(0, 0, 8192, 8191), 0);
        assert_int_equal(write_marked(0, 4095, 8194, UINT_MAX), 1);
        assert_int_equal(write_marked(0, 4095, 8194, 5000), 0);
        assert_int_equal(write_marked(0, 0, 0, UINT_MAX), 0);
        assert_int_equal(write_marked(0, 7, 1, UINT_MAX), align == 1);
        close_disk();

        open_disk(plain_drivers, align, 1, "");
        assert_int_equal(write_marked(0, 0, 8192, UINT_MAX), 0);
        assert_int_equal(disk.writes, 1);
        close_disk();
    }
}

static void test_request__zeroes_are_noticed_in_the_whole_of_a_write_if_wanted(void **state)
{
    (void)state;
    on_both(detect_zeroes, NULL);
}

static void zeroes_keep_their_promises(void *arg)
{
    (void)arg;
    open_disk(plain_drivers, 512, 1, ",'detect-zeroes':'unmap','discard':'unmap'");
    assert_int_equal(write_marked(REQUEST_FUA, 0, 4096, UINT_MAX), 1);
    assert_true(disk.last_flags & REQUEST_MAY_UNMAP);
    assert_int_equal(disk.flushes, 1);
    disk.no_zeroes = true; /* then it is data after all */
    assert_int_equal(write_marked(REQUEST_FUA, 0, 4096, UINT_MAX), 1);
    assert_int_equal(disk.flushes, 2);
    assert_int_equal(disk.writes, 1);
    close_disk();

    open_disk(fua_drivers, 512, 1, ",'detect-zeroes':'on'"); /* which has no write-zeroes at all */
    assert_int_equal(write_marked(REQUEST_FUA, 0, DISK_SIZE, UINT_MAX), 0);
    assert_int_equal(disk.fua_writes, 1);
    close_disk();
}

static void test_request__noticed_zeroes_are_as_durable_as_the_write(void **state)
{
    (void)state;
    on_both(zeroes_keep_their_promises, NULL);
}

/* Who tracks changes hears of them as of any other. */
static struct {
    struct tracker tracker;
    unsigned told;
} heard;

static void heard_changed(struct tracker *t, uint64_t offset, uint64_t len)
{
    (void)t;
    assert_int_equal(offset, 512);
    assert_int_equal(len, 1024);
    heard.told++;
}

static void heard_resized(struct tracker *t, uint64_t size)
{
    (void)t;
    (void)size;
}

static void zeroes_are_tracked(void *arg)
{
    (void)arg;
    heard.tracker =
        (struct tracker){.changed = heard_changed, .resized = heard_resized, .next = NULL};
    heard.told = 0;
    open_disk(plain_drivers, 512, 1, ",'detect-zeroes':'on'");
    node_attach_tracker(graph_find(graph, "d"), &heard.tracker);
    assert_int_equal(write_marked(0, 512, 1024, UINT_MAX), 1);
    assert_int_equal(heard.told, 2); /* C2: before and after */
    node_detach_tracker(graph_find(graph, "d"), &heard.tracker);
    close_disk();
}

static void test_request__noticed_zeroes_are_changes(void **state)
{
    (void)state;
    on_both(zeroes_are_tracked, NULL);
}

static void detection_is_settled(void *arg)
{
    struct error *err = NULL;

    (void)arg;
    graph = graph_new(plain_drivers);
    assert_int_equal(
        add_node(graph, &err, "{'driver':'null-co','node-name':'d','detect-zeroes':'unmap'}"),
        -EINVAL);
    assert_string_equal(
        error_text(err),
        "node 'd': detect-zeroes 'unmap' needs discard 'unmap', or nothing is given back");
    error_free(&err);
    graph = graph_co_free(graph);
}

static void test_request__giving_back_noticed_zeroes_takes_discard(void **state)
{
    (void)state;
    on_both(detection_is_settled, NULL);
}

/* ---- what a node's settings say ---- */

static void discards(void *arg)
{
    (void)arg;
    open_disk(plain_drivers, 512, 1, ",'discard':'unmap'");
    memset(disk.data, 0xaa, DISK_SIZE);
    assert_int_equal(send_request(backend, REQUEST_DISCARD, 0, 100, 400, NULL), 0);
    assert_int_equal(disk.discards, 0);
    assert_int_equal(send_request(backend, REQUEST_DISCARD, 0, 100, 1500, NULL), 0);
    assert_int_equal(disk.discards, 1);
    for (unsigned i = 0; i < DISK_SIZE; i++)
        assert_int_equal(disk.data[i], i >= 512 && i < 1536 ? 0xdd : 0xaa);
    assert_int_equal(send_request(backend, REQUEST_WRITE_ZEROES, REQUEST_MAY_UNMAP, 0, 512, NULL),
                     0);
    assert_int_equal(disk.last_flags, REQUEST_MAY_UNMAP);
    close_disk();

    open_disk(plain_drivers, 512, 1, "");
    assert_int_equal(send_request(backend, REQUEST_DISCARD, 0, 0, 4096, NULL), 0);
    assert_int_equal(disk.discards, 0);
    assert_int_equal(send_request(backend, REQUEST_WRITE_ZEROES, REQUEST_MAY_UNMAP, 0, 512, NULL),
                     0);
    assert_int_equal(disk.last_flags, 0);
    close_disk();

    open_disk(fua_drivers, 1, 1, ",'discard':'unmap'"); /* which cannot: a discard is a hint */
    assert_int_equal(send_request(backend, REQUEST_DISCARD, 0, 0, 4096, NULL), 0);
    close_disk();
}

static void test_request__discard_keeps_to_whole_blocks_and_to_the_nodes_setting(void **state)
{
    (void)state;
    on_both(discards, NULL);
}

static void refuse_writes(void *arg)
{
    static const enum request_kind kinds[] = {REQUEST_WRITE, REQUEST_WRITE_ZEROES, REQUEST_DISCARD,
                                              REQUEST_RESIZE};

    uint8_t data[512];

    (void)arg;
    open_disk(plain_drivers, 512, 1, ",'read-only':true,'discard':'unmap'");
    for (unsigned i = 0; i < ARRAY_SIZE(kinds); i++)
        assert_int_equal(send_request(backend, kinds[i], 0, 0, 512, data), -EPERM);
    assert_int_equal(read_at(backend, 0, 512, data), 0);
    assert_int_equal(flush(backend), 0);
    assert_int_equal(disk.writes + disk.zeroes + disk.discards, 0);
    close_disk();
}

static void test_request__read_only_node_takes_no_change(void **state)
{
    (void)state;
    on_both(refuse_writes, NULL);
}

/* ---- limits ---- */

static void out_of_range(void *arg)
{
    static const enum request_kind kinds[] = {REQUEST_READ, REQUEST_WRITE, REQUEST_WRITE_ZEROES,
                                              REQUEST_DISCARD};

    static const uint64_t ranges[][2] = {{DISK_SIZE, 1},          {DISK_SIZE - 1, 2},
                                         {DISK_SIZE + 1, 0},      {UINT64_MAX, 1},
                                         {UINT64_MAX - 511, 512}, {1, DISK_SIZE}};
    static uint8_t data[DISK_SIZE];

    (void)arg;
    open_disk(plain_drivers, 512, 1, ",'discard':'unmap'");
    for (unsigned i = 0; i < ARRAY_SIZE(kinds); i++) {
        for (unsigned k = 0; k < ARRAY_SIZE(ranges); k++)
            assert_int_equal(send_request(backend, kinds[i], 0, ranges[k][0], ranges[k][1], data),
                             -EIO);
    }
    assert_int_equal(disk.reads + disk.writes + disk.zeroes + disk.discards, 0);
    for (unsigned i = 0; i < ARRAY_SIZE(kinds); i++)
        assert_int_equal(send_request(backend, kinds[i], 0, DISK_SIZE, 0, NULL), 0);
    assert_int_equal(send_request(backend, REQUEST_READ, 0, 0, BACKEND_MAX_DATA + 1, data),
                     -EINVAL);
    assert_int_equal(send_request(backend, REQUEST_RESIZE, 0, UINT64_MAX, 0, NULL), -EFBIG);
    assert_int_equal(send_request(backend, REQUEST_RESIZE, 0, 1024, 0, NULL), -EOPNOTSUPP);
    close_disk();
}

static void test_request__beyond_the_end_is_an_error_and_nothing_wraps(void **state)
{
    (void)state;
    on_both(out_of_range, NULL);
}

/* ---- writers of one block ---- */

#define THREADS 4
#define ROUNDS  200

struct writer {
    unsigned number;
    unsigned lost;
    int result;
    struct loop *loop;
};

/* Each has one byte of each of two blocks to itself, and no other way to write it than with the rest of the block. */
static void write_own_bytes(void *arg)
{
    struct writer *w = arg;

    w->result = backend_attach(backend);
    for (unsigned i = 1; i <= ROUNDS && w->result == 0; i++) {
        uint64_t offset = w->number + (i % 2) * 512;
        uint8_t value = (uint8_t)i;
        uint8_t back = 0;

        w->result = write_at(backend, offset, 1, &value);
        if (w->result == 0)
            w->result = read_at(backend, offset, 1, &back);
        w->lost += back != value;
    }
}

/* Writes the third block as a whole, which nobody else may undo; others change bytes of it. */
static void write_whole_block(void *arg)
{
    struct writer *w = arg;
    uint8_t block[512];

    w->result = backend_attach(backend);
    for (unsigned i = 1; i <= ROUNDS && w->result == 0; i++) {
        memset(block, (uint8_t)i, sizeof(block));
        w->result = write_at(backend, 1024, sizeof(block), block);
        if (w->result == 0)
            w->result = read_at(backend, 1024, sizeof(block), block);
        w->lost += block[300] != (uint8_t)i;
    }
}

static void write_into_that_block(void *arg)
{
    struct writer *w = arg;

    w->result = backend_attach(backend);
    for (unsigned i = 1; i <= ROUNDS && w->result == 0; i++) {
        uint8_t value = (uint8_t)i;

        w->result = write_at(backend, 1024 + w->number, 1, &value);
    }
}

static void call_writer(void *arg)
{
    static co_entry_fn *const fns[] = {write_own_bytes, write_own_bytes, write_whole_block,
                                       write_into_that_block};
    struct writer *w = arg;

    if (loop_co_call(w->loop, fns[w->number % ARRAY_SIZE(fns)], w) < 0)
        w->result = -ENOMEM;
}

static void write_from_all_sides(void *arg)
{
    struct loop_thread *threads[THREADS];
    struct writer writers[THREADS * 3];
    struct co_scope scope;

    (void)arg;
    open_disk(plain_drivers, 512, 1, "");
    disk.slow = true;
    co_scope_init(&scope);
    for (unsigned i = 0; i < THREADS; i++) {
        struct error *err = NULL;

        assert_int_equal(loop_thread_start(&threads[i], "io", &err), 0);
    }
    for (unsigned i = 0; i < ARRAY_SIZE(writers); i++) {
        writers[i] = (struct writer){.number = i, .loop = loop_thread_loop(threads[i / 3])};
        assert_int_equal(co_scope_start(&scope, call_writer, &writers[i]), 0);
    }
    co_scope_join(&scope);
    for (unsigned i = 0; i < ARRAY_SIZE(writers); i++) {
        assert_int_equal(writers[i].result, 0);
        /* Of those who write the whole third block there are several: their values are equal in each round only by chance. */
        if (i % 4 != 2)
            assert_int_equal(writers[i].lost, 0);
    }
    close_disk(); /* which the loops that were attached outlive */
    for (unsigned i = 0; i < THREADS; i++)
        threads[i] = loop_thread_stop(threads[i]);
}

static void test_request__read_modify_write_loses_nobodys_bytes(void **state)
{
    (void)state;
    on_both(write_from_all_sides, NULL);
}

/* One writer of the whole block against those of single bytes. */
static void one_whole_against_bytes(void *arg)
{
    struct writer whole = {.number = 2, .loop = loop_self()};
    struct writer bytes[3];
    struct co_scope scope;

    (void)arg;
    open_disk(plain_drivers, 512, 1, "");
    disk.slow = true;
    co_scope_init(&scope);
    assert_int_equal(co_scope_start(&scope, write_whole_block, &whole), 0);
    for (unsigned i = 0; i < ARRAY_SIZE(bytes); i++) {
        bytes[i] = (struct writer){.number = i * 4 + 3};
        assert_int_equal(co_scope_start(&scope, write_into_that_block, &bytes[i]), 0);
    }
    co_scope_join(&scope);
    assert_int_equal(whole.result, 0);
    assert_int_equal(whole.lost, 0);
    close_disk();
}

static void test_request__read_modify_write_undoes_no_whole_write(void **state)
{
    (void)state;
    on_both(one_whole_against_bytes, NULL);
}

/* ---- extents ---- */

static void default_extents(void *arg)
{
    struct extent v[2];
    struct extents e = {.v = v, .max = 2};
    struct request req = {.kind = REQUEST_EXTENTS, .offset = 5, .len = 1000, .extents = &e};

    (void)arg;
    open_disk(plain_drivers, 512, 1, "");
    assert_int_equal(backend_co_request(backend, &req), 0);
    assert_int_equal(e.count, 1);
    assert_int_equal(v[0].offset, 5);
    assert_int_equal(v[0].len, 1000);
    assert_int_equal(v[0].flags, EXTENT_DATA | EXTENT_ALLOCATED);
    close_disk();
}

static void test_request__without_extents_of_the_driver_all_is_data(void **state)
{
    (void)state;
    on_both(default_extents, NULL);
}
