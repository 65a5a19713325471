/* SPDX-License-Identifier: Apache-2.0 */
/* file and host_device: on real files of a disk and of tmpfs, and on a simulated disk where hosts fail. */
#include "base/checked.h"
#include "graph-fixture.h"
#include "loop/sim/sim.h"
#include "protocols/list.h"
#include "seeds.h"
#include "sim-run.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>

static const struct driver *const *const drivers[] = {protocol_drivers, NULL};

/* The file of the running case. */
static char path[64];

static void make_file(const char *dir, uint64_t size)
{
    int fd;

    (void)snprintf(path, sizeof(path), "%s/test-file-driver-XXXXXX", dir);
    fd = mkstemp(path);
    assert_true(fd >= 0);
    assert_int_equal(ftruncate(fd, (off_t)size), 0);
    close(fd);
}

/* On a disk's file system, most likely, and on tmpfs; with both engines. */
static void on_real_files(uint64_t size, co_entry_fn *body)
{
    static const char *const dirs[] = {".", "/dev/shm"};

    for (unsigned i = 0; i < ARRAY_SIZE(dirs); i++) {
        for (unsigned k = 0; k < 2; k++) {
            make_file(dirs[i], size);
            on_engine(k ? LOOP_ENGINE_THREADS : LOOP_ENGINE_IO_URING, body, NULL);
            unlink(path);
        }
    }
}

static struct stat stat_file(void)
{
    struct stat st;

    assert_int_equal(stat(path, &st), 0);
    return st;
}

/* ---- opening ---- */

static void open_wrong_things(void *arg)
{
    struct graph *g = graph_new(drivers);

    (void)arg;
    must_refuse(ENOENT, "cannot open node 'n': cannot open file '/nowhere/x'", g,
                "{'driver':'file','node-name':'n','filename':'/nowhere/x'}");
    must_refuse(EINVAL, "'/dev/null' is no regular file: use driver 'host_device'", g,
                "{'driver':'file','node-name':'n','filename':'/dev/null'}");
    must_refuse(EISDIR, "directory", g, "{'driver':'file','node-name':'n','filename':'/'}");
    must_refuse(EINVAL, "'/' is no regular file", g,
                "{'driver':'file','node-name':'n','filename':'/','read-only':true}");
    must_refuse(EINVAL, "is no device: use driver 'file'", g,
                "{'driver':'host_device','node-name':'n','filename':'%s'}", path);
    must_refuse(EINVAL, "does not support cache.direct", g,
                "{'driver':'file','node-name':'n','filename':'/proc/version','read-only':true,"
                "'cache':{'direct':true}}");
    assert_null(graph_find(g, "n"));
    graph_co_free(g);
}

static void test_file_driver__refuses_what_it_cannot_serve_and_says_why(void **state)
{
    (void)state;
    on_real_files(512, open_wrong_things);
}

static void open_read_only(void *arg)
{
    struct graph *g = graph_new(drivers);
    struct error *err = NULL;
    struct backend *b;

    (void)arg;
    must_refuse(EROFS, "cannot open file '/disk/ro'", g,
                "{'driver':'file','node-name':'n','filename':'/disk/ro'}");
    must_add(g, "{'driver':'file','node-name':'n','filename':'/disk/ro','auto-read-only':true}");
    assert_true(node_settings(graph_find(g, "n"))->read_only);
    assert_int_equal(backend_co_new(&b, g, "n", ACCESS_RW, "export 'e'", &err), -EPERM);
    must_say(err, "read-only");
    error_free(&err);
    must_add(g, "{'driver':'file','node-name':'m','filename':'/disk/ro','read-only':true}");
    graph_co_free(g);
}

static void test_file_driver__auto_read_only_falls_back(void **state)
{
    struct sim_file_setup setup = {.type = FILE_TYPE_REGULAR, .size = 4096, .read_only = true};
    struct sim_disk *d = sim_disk_new();

    (void)state;
    sim_disk_make(d, "/disk/ro", &setup);
    assert_int_equal(run_on(d, 1, open_read_only, NULL), SIM_RETURNED);
    sim_disk_free(d);
}

/* ---- data ---- */

static void write_and_read(void *arg)
{
    struct graph *g = graph_new(drivers);
    struct backend *b;
    uint8_t data[3000];
    uint8_t back[3000];

    (void)arg;
    for (size_t i = 0; i < sizeof(data); i++)
        data[i] = (uint8_t)(i * 13);
    must_add(g, "{'driver':'file','node-name':'n','filename':'%s'}", path);
    b = must_attach(g, "n", ACCESS_RW, "test");
    assert_int_equal(backend_size(b), 1 * MIB + 3);
    assert_int_equal(backend_alignment(b), 1);
    assert_int_equal(send_request(b, REQUEST_WRITE, REQUEST_FUA, 12345, 3000, data), 0);
    assert_int_equal(flush(b), 0);
    assert_int_equal(read_at(b, 12345, 3000, back), 0);
    assert_memory_equal(data, back, 3000);
    assert_int_equal(write_at(b, 1 * MIB, 4, data), -EIO);
    assert_int_equal(stat_file().st_size, 1 * MIB + 3);
    /* Somebody cuts it short: what is gone reads as zeroes, P6. */
    assert_int_equal(truncate(path, 13345), 0);
    memset(back, 0xff, sizeof(back));
    assert_int_equal(read_at(b, 12345, 3000, back), 0);
    assert_memory_equal(data, back, 1000);
    for (unsigned i = 1000; i < 3000; i++)
        assert_int_equal(back[i], 0);
    backend_co_free(b);
    graph_co_free(g);
}

static void test_file_driver__reads_what_was_written_and_zeroes_behind_the_end(void **state)
{
    (void)state;
    on_real_files(1 * MIB + 3, write_and_read);
}

static void direct(void *arg)
{
    struct graph *g = graph_new(drivers);
    struct backend *b;
    uint8_t data[700];
    uint8_t back[700];
    unsigned unit;

    (void)arg;
    must_add(g, "{'driver':'file','node-name':'n','filename':'%s','cache':{'direct':true}}", path);
    b = must_attach(g, "n", ACCESS_RW, "test");
    unit = backend_alignment(b);
    assert_int_equal(backend_size(b), align_up(10001, unit));
    for (size_t i = 0; i < sizeof(data); i++)
        data[i] = (uint8_t)(i * 13 + 1);
    assert_int_equal(write_at(b, 301, 700, data), 0);
    assert_int_equal(read_at(b, 301, 700, back), 0);
    assert_memory_equal(data, back, 700);
    /* The last unit: read in part beyond the file's end, then written there. */
    assert_int_equal(write_at(b, 9990, 11, data), 0);
    memset(back, 0xff, sizeof(back));
    assert_int_equal(read_at(b, 9990, backend_size(b) - 9990, back), 0);
    assert_memory_equal(data, back, 11);
    for (uint64_t i = 11; i < backend_size(b) - 9990; i++)
        assert_int_equal(back[i], 0);
    backend_co_free(b);
    graph_co_free(g);
}

static void test_file_driver__direct_rounds_the_size_up_to_whole_units(void **state)
{
    (void)state;
    on_real_files(10001, direct);
}

/* ---- zeroes and space ---- */

static void zero_and_punch(void *arg)
{
    struct graph *g = graph_new(drivers);
    struct backend *b;
    static uint8_t data[1 << 20];
    blkcnt_t full;
    int r;

    (void)arg;
    must_add(g, "{'driver':'file','node-name':'n','filename':'%s','discard':'unmap'}", path);
    b = must_attach(g, "n", ACCESS_RW, "test");
    memset(data, 3, sizeof(data));
    assert_int_equal(write_at(b, 0, 1 * MIB, data), 0);
    assert_int_equal(flush(b), 0);
    full = stat_file().st_blocks;
    /* Space is kept; tmpfs has no way to do that but writing. */
    r = send_request(b, REQUEST_WRITE_ZEROES, REQUEST_NO_FALLBACK, 0, 64 * KIB, NULL);
    if (strncmp(path, "/dev/shm", 8) == 0)
        assert_int_equal(r, -EOPNOTSUPP);
    assert_int_equal(send_request(b, REQUEST_WRITE_ZEROES, 0, 0, 64 * KIB, NULL), 0);
    assert_int_equal(stat_file().st_blocks, full);
    assert_int_equal(send_request(b, REQUEST_WRITE_ZEROES,
                                  REQUEST_MAY_UNMAP | REQUEST_FUA | REQUEST_NO_FALLBACK, 128 * KIB,
                                  128 * KIB, NULL),
                     0);
    assert_int_equal(stat_file().st_blocks, full - 256);
    assert_int_equal(send_request(b, REQUEST_DISCARD, 0, 512 * KIB, 128 * KIB, NULL), 0);
    assert_int_equal(stat_file().st_blocks, full - 512);
    assert_int_equal(read_at(b, 0, 1 * MIB, data), 0);
    for (unsigned i = 0; i < sizeof(data); i++) {
        bool zero =
            i < 64 * KIB || (i >= 128 * KIB && i < 256 * KIB) || (i >= 512 * KIB && i < 640 * KIB);

        assert_int_equal(data[i], zero ? 0 : 3);
    }
    backend_co_free(b);
    graph_co_free(g);
}

static void test_file_driver__zeroes_keep_space_unless_it_may_go(void **state)
{
    (void)state;
    on_real_files(1 * MIB, zero_and_punch);
}

/* In a graph of one file on the simulated disk. */
static struct backend *sim_node(struct graph **ret, const char *driver)
{
    struct graph *g = graph_new(drivers);

    must_add(g, "{'driver':'%s','node-name':'n','filename':'/disk/a','discard':'unmap'}", driver);
    *ret = g;
    return must_attach(g, "n", (struct access){.wants = ACCESS_ALL, .tolerates = ACCESS_ALL},
                       "test");
}

static struct sim_disk *run_sim(const struct sim_file_setup *setup, uint64_t seed,
                                struct sim_fault **faults, size_t count, co_entry_fn *body,
                                void *arg)
{
    struct sim_disk *d = sim_disk_new();
    struct sim_options o;

    sim_disk_make(d, "/disk/a", setup);
    sim_options_init(&o, seed);
    o.disk = d;
    o.faults = faults;
    o.fault_count = count;
    assert_int_equal(sim_run(&o, body, arg), SIM_RETURNED);
    return d;
}

static void ask_often(void *arg)
{
    struct graph *g;
    struct backend *b = sim_node(&g, "file");
    static uint8_t data[64 << 10];

    (void)arg;
    memset(data, 3, sizeof(data));
    assert_int_equal(write_at(b, 0, sizeof(data), data), 0);
    for (unsigned i = 0; i < 5; i++) {
        assert_int_equal(
            send_request(b, REQUEST_WRITE_ZEROES, REQUEST_MAY_UNMAP, i * 4096, 4096, NULL), 0);
        assert_int_equal(send_request(b, REQUEST_DISCARD, 0, 32768, 4096, NULL), 0);
    }
    assert_int_equal(read_at(b, 0, sizeof(data), data), 0);
    for (unsigned i = 0; i < sizeof(data); i++)
        assert_int_equal(data[i], i < 5 * 4096 ? 0 : 3);
    backend_co_free(b);
    graph_co_free(g);
}

static void test_file_driver__asks_no_more_for_what_the_host_refused(void **state)
{
    struct sim_file_setup setup = {.type = FILE_TYPE_REGULAR, .size = 64 << 10, .no_punch = true};

    (void)state;
    TEST_SEEDS (seed) {
        struct sim_fault count_punch = {.ops = SIM_OP(IO_PUNCH), .kind = SIM_LATE, .per_mille = 1};
        struct sim_fault count_zero = {.ops = SIM_OP(IO_ZERO), .kind = SIM_LATE, .per_mille = 1};
        struct sim_fault *faults[] = {&count_punch, &count_zero};

        sim_disk_free(run_sim(&setup, seed, faults, 2, ask_often, NULL));
        assert_int_equal(count_punch.seen, 2); /* once to zero, once to discard */
        assert_int_equal(count_zero.seen, 1);
    }
}

/* ---- durability ---- */

static void write_fua(void *arg)
{
    struct graph *g;
    struct backend *b = sim_node(&g, "file");
    uint8_t data[4096];

    (void)arg;
    memset(data, 3, sizeof(data));
    assert_int_equal(send_request(b, REQUEST_WRITE, REQUEST_FUA, 0, 4096, data), 0);
    assert_int_equal(send_request(b, REQUEST_WRITE, 0, 8192, 4096, data), 0);
    assert_int_equal(flush(b), 0);
    assert_int_equal(send_request(b, REQUEST_WRITE_ZEROES, REQUEST_FUA, 8192, 1024, NULL), 0);
    backend_co_free(b);
    graph_co_free(g);
}

static void test_file_driver__fua_and_flush_survive_a_power_cut(void **state)
{
    struct sim_file_setup setup = {.type = FILE_TYPE_REGULAR, .size = 64 << 10};

    (void)state;
    TEST_SEEDS (seed) {
        struct sim_disk *d = run_sim(&setup, seed, NULL, 0, write_fua, NULL);
        uint8_t data[16384];

        sim_disk_power_cut(d, seed);
        assert_int_equal(sim_disk_read(d, "/disk/a", 0, data, sizeof(data)), 0);
        for (unsigned i = 0; i < sizeof(data); i++)
            assert_int_equal(data[i], i < 4096 || (i >= 9216 && i < 12288) ? 3 : 0);
        sim_disk_free(d);
    }
}

static void flush_in_vain(void *arg)
{
    struct graph *g;
    struct backend *b = sim_node(&g, "file");
    uint8_t data[4096] = {1};

    (void)arg;
    assert_int_equal(write_at(b, 0, 4096, data), 0);
    assert_int_equal(flush(b), -EIO);
    assert_int_equal(write_at(b, 4096, 4096, data), 0);
    for (unsigned i = 0; i < 3; i++)
        assert_int_equal(flush(b), -EIO);
    assert_int_equal(send_request(b, REQUEST_WRITE_ZEROES, REQUEST_FUA, 0, 4096, NULL), -EIO);
    backend_co_free(b);
    graph_co_free(g);
}

static void test_file_driver__failed_flush_is_not_forgotten(void **state)
{
    struct sim_file_setup setup = {.type = FILE_TYPE_REGULAR, .size = 64 << 10};

    (void)state;
    TEST_SEEDS (seed) {
        struct sim_fault drops = {.ops = SIM_OP(IO_SYNC), .kind = SIM_SYNC_DROPS, .at = 1};
        struct sim_fault *faults[] = {&drops};

        sim_disk_free(run_sim(&setup, seed, faults, 1, flush_in_vain, NULL));
    }
}

/* ---- size ---- */

static void change_size(void *arg)
{
    struct graph *g = graph_new(drivers);
    struct access access = {.wants = ACCESS_ALL, .tolerates = ACCESS_ALL};
    struct backend *b;
    uint8_t data[512] = {1};

    (void)arg;
    must_add(g, "{'driver':'file','node-name':'n','filename':'%s'}", path);
    b = must_attach(g, "n", access, "test");
    assert_int_equal(send_request(b, REQUEST_RESIZE, 0, 70001, 0, NULL), 0);
    assert_int_equal(backend_size(b), 70001);
    assert_int_equal(stat_file().st_size, 70001);
    assert_int_equal(write_at(b, 70001 - 512, 512, data), 0);
    assert_int_equal(send_request(b, REQUEST_RESIZE, 0, 100, 0, NULL), 0);
    assert_int_equal(stat_file().st_size, 100);
    assert_int_equal(write_at(b, 100, 1, data), -EIO);
    backend_co_free(b);
    graph_co_free(g);
}

static void test_file_driver__resize_changes_the_file(void **state)
{
    (void)state;
    on_real_files(4096, change_size);
}

static void use_device(void *arg)
{
    struct graph *g;
    struct backend *b = sim_node(&g, "host_device");
    struct extent v[2];
    struct extents e = {.v = v, .max = 2};
    struct request req = {.kind = REQUEST_EXTENTS, .len = 64 << 10, .extents = &e};
    uint8_t data[1000];

    (void)arg;
    assert_int_equal(backend_size(b), 64 << 10);
    assert_int_equal(backend_alignment(b), 512);
    memset(data, 3, sizeof(data));
    assert_int_equal(write_at(b, 100, 1000, data), 0);
    assert_int_equal(send_request(b, REQUEST_WRITE_ZEROES, 0, 200, 700, NULL), 0);
    /* The kernel might write zeroes for it: not what was asked for. */
    assert_int_equal(send_request(b, REQUEST_WRITE_ZEROES, REQUEST_NO_FALLBACK, 0, 512, NULL),
                     -EOPNOTSUPP);
    assert_int_equal(read_at(b, 100, 1000, data), 0);
    for (unsigned i = 0; i < 1000; i++)
        assert_int_equal(data[i], i >= 100 && i < 800 ? 0 : 3);
    assert_int_equal(backend_co_request(b, &req), 0);
    assert_int_equal(e.count, 1);
    assert_true(v[0].flags & EXTENT_DATA);
    assert_int_equal(send_request(b, REQUEST_RESIZE, 0, 32 << 10, 0, NULL), -EOPNOTSUPP);
    assert_int_equal(send_request(b, REQUEST_RESIZE, 0, 64 << 10, 0, NULL), 0);
    must_refuse(EINVAL, "'/disk/a' is no regular file: use driver 'host_device'", g,
                "{'driver':'file','node-name':'m','filename':'/disk/a'}");
    backend_co_free(b);
    graph_co_free(g);
}

static void test_file_driver__device_has_blocks_and_a_size_of_its_own(void **state)
{
    struct sim_file_setup setup = {.type = FILE_TYPE_BLOCK, .size = 64 << 10};

    (void)state;
    TEST_SEEDS (seed)
        sim_disk_free(run_sim(&setup, seed, NULL, 0, use_device, NULL));
}

/* ---- extents ---- */

static void many_extents(void *arg)
{
    struct graph *g = graph_new(drivers);
    static struct extent v[500];
    struct extents e = {.v = v, .max = 500};
    struct request req = {.kind = REQUEST_EXTENTS, .len = 200 * 128 * KIB, .extents = &e};
    struct backend *b;
    uint8_t data[4096] = {1};

    (void)arg;
    must_add(g, "{'driver':'file','node-name':'n','filename':'%s'}", path);
    b = must_attach(g, "n", ACCESS_RW, "test");
    for (unsigned i = 0; i < 200; i++)
        assert_int_equal(write_at(b, i * 128 * KIB, 4096, data), 0);
    assert_int_equal(backend_co_request(b, &req), 0);
    assert_int_equal(e.count, 400);
    for (unsigned i = 0; i < e.count; i++) {
        assert_int_equal(v[i].flags & (EXTENT_DATA | EXTENT_ZERO),
                         i % 2 ? EXTENT_ZERO : EXTENT_DATA);
        assert_int_equal(v[i].host_offset, v[i].offset);
        assert_string_equal(node_name(v[i].host), "n");
    }
    backend_co_free(b);
    graph_co_free(g);
}

static void test_file_driver__all_holes_come_in_one_answer(void **state)
{
    (void)state;
    on_real_files(200 * 128 * KIB, many_extents);
}

/* ---- locks ---- */

/* Which of the bytes from `first` on others have locked, as bits. */
static unsigned locked_bytes(int fd, unsigned first)
{
    unsigned bits = 0;

    for (unsigned i = 0; i < 8; i++) {
        struct flock fl = {
            .l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = first + i, .l_len = 1};

        assert_int_equal(fcntl(fd, F_OFD_GETLK, &fl), 0);
        if (fl.l_type != F_UNLCK)
            bits |= 1u << i;
    }
    return bits;
}

static void lock_bytes(void *arg)
{
    struct access writer = {.wants = ACCESS_READ | ACCESS_WRITE,
                            .tolerates = ACCESS_READ | ACCESS_WRITE_UNCHANGED};
    struct graph *g = graph_new(drivers);
    struct error *err = NULL;
    struct backend *b;
    struct backend *c;
    int fd = open(path, O_RDWR);

    (void)arg;
    assert_true(fd >= 0);
    must_add(g, "{'driver':'file','node-name':'n','filename':'%s'}", path);
    must_add(g, "{'driver':'file','node-name':'m','filename':'%s'}", path);
    assert_int_equal(locked_bytes(fd, 100) | locked_bytes(fd, 200), 0);
    b = must_attach(g, "n", writer, "test");
    assert_int_equal(locked_bytes(fd, 100), ACCESS_READ | ACCESS_WRITE);
    assert_int_equal(locked_bytes(fd, 200), ACCESS_WRITE | ACCESS_RESIZE);

    /* Another open file is another user. */
    assert_int_equal(backend_co_new(&c, g, "m", ACCESS_RW, "test", &err), -EAGAIN);
    must_say(err, "cannot get write access to file");
    must_say(err, path);
    must_say(err, "is another process using it?");
    error_free(&err);
    assert_int_equal(backend_co_new(&c, g, "m",
                                    (struct access){.wants = 0, .tolerates = ACCESS_READ}, "test",
                                    &err),
                     -EAGAIN);
    must_say(err, "cannot keep others from write access to file");
    error_free(&err);
    assert_int_equal(locked_bytes(fd, 100), ACCESS_READ | ACCESS_WRITE); /* nothing was left */
    assert_int_equal(locked_bytes(fd, 200), ACCESS_WRITE | ACCESS_RESIZE);
    c = must_attach(g, "m", (struct access){.wants = ACCESS_READ, .tolerates = ACCESS_ALL}, "test");
    backend_co_free(c);

    backend_co_free(b);
    assert_int_equal(locked_bytes(fd, 100) | locked_bytes(fd, 200), 0);
    c = must_attach(g, "m", writer, "test");
    must_del(g, "n");
    assert_int_equal(locked_bytes(fd, 100), ACCESS_READ | ACCESS_WRITE);
    backend_co_free(c);
    close(fd);
    graph_co_free(g);
}

static void test_file_driver__lock_bytes_tell_others_what_it_does(void **state)
{
    (void)state;
    on_real_files(4096, lock_bytes);
}

struct rival {
    struct graph *graph;
    const char *node;
    struct backend *b;
    int result;
};

static void take_alone(void *arg)
{
    struct rival *rival = arg;
    struct error *err = NULL;

    rival->result = backend_co_new(&rival->b, rival->graph, rival->node,
                                   (struct access){.wants = ACCESS_WRITE, .tolerates = ACCESS_READ},
                                   "test", &err);
    error_free(&err);
}

/* LOCK-2: both may be refused, but never is neither. */
static void two_at_once(void *arg)
{
    struct graph *g = graph_new(drivers);
    struct rival rivals[2] = {{.graph = g, .node = "n"}, {.graph = g, .node = "m"}};
    struct co_scope s;
    unsigned *refused = arg;

    must_add(g, "{'driver':'file','node-name':'n','filename':'/disk/a'}");
    must_add(g, "{'driver':'file','node-name':'m','filename':'/disk/a'}");
    co_scope_init(&s);
    for (unsigned i = 0; i < 2; i++)
        assert_int_equal(co_scope_start(&s, take_alone, &rivals[i]), 0);
    co_scope_join(&s);
    *refused = 0;
    for (unsigned i = 0; i < 2; i++) {
        assert_true(rivals[i].result == 0 || rivals[i].result == -EAGAIN);
        *refused += rivals[i].result != 0;
        if (rivals[i].result == 0)
            backend_co_free(rivals[i].b);
    }
    graph_co_free(g);
}

static void test_file_driver__of_two_writers_at_once_one_is_refused(void **state)
{
    struct sim_file_setup setup = {.type = FILE_TYPE_REGULAR, .size = 4096};

    (void)state;
    TEST_SEEDS (seed) {
        unsigned refused = 0;

        sim_disk_free(run_sim(&setup, seed, NULL, 0, two_at_once, &refused));
        assert_true(refused > 0);
    }
}

static void no_locks(void *arg)
{
    struct access alone = {.wants = ACCESS_READ | ACCESS_WRITE, .tolerates = 0};
    struct graph *g = graph_new(drivers);
    struct backend *b[3];

    (void)arg;
    must_add(g, "{'driver':'file','node-name':'n','filename':'%s'}", path);
    must_add(g, "{'driver':'file','node-name':'off','filename':'%s','locking':'off'}", path);
    must_add(
        g,
        "{'driver':'file','node-name':'shared','filename':'%s','force-share':true,'read-only':true}",
        path);
    b[0] = must_attach(g, "n", alone, "test");
    b[1] = must_attach(g, "off", alone, "test");
    b[2] = must_attach(g, "shared", (struct access){.wants = ACCESS_READ, .tolerates = ACCESS_ALL},
                       "test");
    for (unsigned i = 0; i < ARRAY_SIZE(b); i++)
        backend_co_free(b[i]);
    graph_co_free(g);
}

static void test_file_driver__force_share_and_locking_off_lock_nothing(void **state)
{
    (void)state;
    on_real_files(4096, no_locks);
}

/* ---- a host that hangs ---- */

struct reader {
    struct backend *b;
    int result;
};

static void read_block(void *arg)
{
    struct reader *r = arg;
    uint8_t data[4096];

    r->result = read_at(r->b, 0, sizeof(data), data);
}

static void hang_one(void *arg)
{
    struct graph *g;
    struct backend *b = sim_node(&g, "file");
    struct reader stuck = {.b = b, .result = 1};
    struct reader free_one = {.result = 1};
    struct co_scope s;

    (void)arg;
    must_add(g, "{'driver':'file','node-name':'m','filename':'/disk/b'}");
    free_one.b = must_attach(g, "m", ACCESS_RW, "test");
    co_scope_init(&s);
    assert_int_equal(co_scope_start(&s, read_block, &stuck), 0);
    co_sleep_until(loop_clock() + 100 * NS_PER_MS);
    assert_int_equal(stuck.result, 1);
    read_block(&free_one);
    assert_int_equal(free_one.result, 0);
    backend_co_free(free_one.b);
    must_del(g, "m");
    assert_int_equal(sim_unhang("/disk/a"), 1);
    co_scope_join(&s);
    assert_int_equal(stuck.result, 0);
    backend_co_free(b);
    graph_co_free(g);
}

static void test_file_driver__hanging_file_holds_up_no_other_node(void **state)
{
    struct sim_file_setup setup = {.type = FILE_TYPE_REGULAR, .size = 64 << 10};

    (void)state;
    TEST_SEEDS (seed) {
        struct sim_fault hang = {
            .name = "/disk/a", .ops = SIM_OP(IO_READ), .kind = SIM_HANG, .at = 1};
        struct sim_fault *faults[] = {&hang};
        struct sim_disk *d = sim_disk_new();
        struct sim_options o;

        sim_disk_make(d, "/disk/a", &setup);
        sim_disk_make(d, "/disk/b", &setup);
        sim_options_init(&o, seed);
        o.disk = d;
        o.inline_per_mille = 0;
        o.faults = faults;
        o.fault_count = 1;
        assert_int_equal(sim_run(&o, hang_one, NULL), SIM_RETURNED);
        sim_disk_free(d);
    }
}
