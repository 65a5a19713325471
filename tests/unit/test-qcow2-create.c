/* SPDX-License-Identifier: Apache-2.0 */
/*
 * New qcow2 images: what is refused, what is in the file, what remains of it after failures; and that QEMU's tools take our
 * images, as we take theirs.
 */
#include "formats/qcow2/qcow2-create.h"
#include "sim-run.h"

#include "base/alloc.h"
#include "base/checked.h"
#include "base/endian.h"
#include "base/prng.h"
#include "formats/qcow2/qcow2-header.h"
#include "graph/node.h"
#include "loop/co.h"
#include "loop/loop.h"
#include "loop/scope.h"
#include "loop/sim/sim.h"
#include "seeds.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#define PIB (TIB << 10)

static struct qcow2_create_options defaults(uint64_t size)
{
    struct qcow2_create_options o = QCOW2_CREATE_OPTIONS_INIT;

    o.size = size;
    return o;
}

static struct qcow2_layout must_lay_out(const struct qcow2_create_options *o)
{
    struct qcow2_layout layout;
    struct error *err = NULL;

    memset(&layout, 0xee, sizeof(layout));
    if (qcow2_layout_make(o, &layout, &err) < 0)
        fail_msg("%s", error_text(err));
    return layout;
}

static void must_refuse(const struct qcow2_create_options *o, int errnum, const char *message)
{
    struct qcow2_layout layout;
    struct error *err = NULL;

    if (qcow2_layout_make(o, &layout, &err) == 0)
        fail_msg("accepted, but expected: %s", message);
    assert_string_equal(error_text(err), message);
    assert_int_equal(error_errno(err), errnum);
    error_free(&err);
}

static uint64_t bytes_in_segments(const struct qcow2_layout *l)
{
    uint64_t sum = 0;

    for (unsigned i = 0; i < l->segment_count; i++)
        sum += l->segments[i].len;
    return sum;
}

/* ---- the layout ---- */

static void test_qcow2_create__nonsense_is_refused(void **state)
{
    struct qcow2_create_options o = defaults(1 * GIB);
    char name[1025];

    (void)state;
    o.version = 4;
    must_refuse(&o, EINVAL, "qcow2 version is 4, expected 2 or 3");
    o = defaults(1 * GIB);
    o.cluster_bits = 8;
    must_refuse(&o, EINVAL, "cluster_bits is 8, expected 9 to 21 (512 bytes to 2 MiB)");
    o.cluster_bits = 22;
    must_refuse(&o, EINVAL, "cluster_bits is 22, expected 9 to 21 (512 bytes to 2 MiB)");
    o = defaults(1 * GIB);
    o.refcount_order = 7;
    must_refuse(&o, EINVAL, "refcount_order is 7, expected 6 at most (64 bits)");
    o.refcount_order = 3;
    o.version = 2;
    must_refuse(&o, EINVAL, "refcount_order is 3, but qcow2 version 2 has only 4 (16 bits)");
    o = defaults((uint64_t)NODE_SIZE_MAX + 1);
    must_refuse(&o, EINVAL,
                "size is 9223372035781033985 bytes, expected 9223372035781033984 at most");

    o = defaults(1 * GIB);
    o.backing_file = "base.img";
    must_refuse(&o, EINVAL,
                "backing file 'base.img' is given without its format, which is never guessed");
    o.backing_format = "";
    must_refuse(&o, EINVAL,
                "backing file 'base.img' is given without its format, which is never guessed");
    o.backing_format = "raw";
    o.preallocate_metadata = true;
    must_refuse(&o, ENOTSUP,
                "preallocation would hide backing file 'base.img': give one of them only");
    o.preallocate_metadata = false;
    o.backing_file = "";
    must_refuse(&o, EINVAL, "the backing file name has 0 bytes, expected 1 to 1023");
    memset(name, 'n', sizeof(name));
    name[1024] = '\0';
    o.backing_file = name;
    must_refuse(&o, EINVAL, "the backing file name has 1024 bytes, expected 1 to 1023");
    o.backing_file = NULL;
    must_refuse(&o, EINVAL, "backing format 'raw' is given, but no backing file");
    o.backing_file = "base.img";
    name[256] = '\0';
    o.backing_format = name;
    must_refuse(&o, EINVAL, "the backing format name has 256 bytes, expected 255 at most");
    o = defaults(1 * GIB);
    o.data_file = "data";
    o.data_file_raw = true;
    o.luks_len = 4096;
    must_refuse(&o, ENOTSUP,
                "data_file_raw and encryption are given: a raw data file holds what the disk "
                "shows, which is not encrypted");
}

static void test_qcow2_create__limits_are_those_of_opening(void **state)
{
    struct qcow2_create_options o = defaults(128 * GIB);
    struct qcow2_layout layout;
    char name[400];

    (void)state;
    o.cluster_bits = 9;
    layout = must_lay_out(&o);
    assert_int_equal(layout.l1_size, 4194304);
    o.size++;
    must_refuse(&o, EINVAL,
                "a disk of 137438953984 bytes is too large for clusters of 512 bytes, with which "
                "it has 137438953472 bytes at most");
    o = defaults(NODE_SIZE_MAX);
    o.cluster_bits = 21;
    must_refuse(&o, EINVAL,
                "a disk of 9223372035781033984 bytes is too large for clusters of 2097152 bytes, "
                "with which it has 2305843009213693952 bytes at most");
    o.size = (uint64_t)1 << 61;
    layout = must_lay_out(&o);
    assert_int_equal(layout.l1_size, 4194304);
    o.preallocate_metadata = true;
    o.refcount_order = 0;
    must_refuse(&o, EINVAL,
                "with preallocation the file would have 2305851942785515520 bytes, expected "
                "72057594037927936 at most");
    o = defaults(64 * GIB);
    o.cluster_bits = 9;
    o.refcount_order = 6;
    o.preallocate_metadata = true;
    must_refuse(&o, EINVAL,
                "the refcount table would have 17318400 bytes, expected 8388608 at most: use "
                "larger clusters or narrower refcounts");

    o = defaults(1 * MIB);
    o.cluster_bits = 9;
    o.backing_format = "raw";
    memset(name, 'n', sizeof(name));
    o.backing_file = name;
    name[377] = '\0';
    must_refuse(&o, EINVAL,
                "the backing file name has 377 bytes, clusters of 512 bytes have room for 376: "
                "use larger clusters");
    name[376] = '\0';
    (void)must_lay_out(&o);
}

static void test_qcow2_create__data_file(void **state)
{
    struct qcow2_create_options o = defaults(1 * MIB);
    struct qcow2_layout layout;
    char name[400];

    (void)state;
    o.data_file_raw = true;
    must_refuse(&o, EINVAL, "data_file_raw requires data_file");
    o.data_file = "x";
    layout = must_lay_out(&o);
    assert_int_equal(layout.mapped_clusters, 16); /* all of the disk is */
    assert_int_equal(layout.data_clusters, 0);
    o.version = 2;
    must_refuse(&o, EINVAL, "external data files need qcow2 version 3");
    o.version = 3;
    o.backing_file = "b";
    o.backing_format = "raw";
    must_refuse(
        &o, EINVAL,
        "backing file 'b' and data_file_raw are given: a raw data file holds all of the disk");
    o = defaults(1 * MIB);
    o.cluster_bits = 9;
    memset(name, 'n', sizeof(name));
    name[385] = '\0';
    o.data_file = name;
    must_refuse(
        &o, EINVAL,
        "the data file name has 385 bytes, clusters of 512 bytes have room for 384: use larger "
        "clusters");
    name[384] = '\0';
    (void)must_lay_out(&o);
}

static void test_qcow2_create__sizes_are_rounded_up_to_sectors(void **state)
{
    static const uint64_t sizes[][2] = {{0, 0}, {1, 512}, {512, 512}, {513, 1024}};

    (void)state;
    for (unsigned i = 0; i < ARRAY_SIZE(sizes); i++) {
        struct qcow2_create_options o = defaults(sizes[i][0]);

        assert_int_equal(must_lay_out(&o).size, sizes[i][1]);
    }
}

/* P5: what is written does not grow with the disk, but for what the format needs. */
static void test_qcow2_create__large_disks_cost_little(void **state)
{
    struct qcow2_create_options o = defaults(1 * PIB);
    struct qcow2_layout layout = must_lay_out(&o);

    (void)state;
    assert_int_equal(layout.l1_size, 2 * MIB);
    assert_true(bytes_in_segments(&layout) < 2 * KIB);
    /* 1 PiB of data has 128 GiB of L2 tables: they are told, not held. */
    o.preallocate_metadata = true;
    layout = must_lay_out(&o);
    assert_true(layout.file_size > 1 * PIB);
    assert_int_equal(layout.l2_tables, 2 * MIB);
}

static uint64_t refcount_of(const struct qcow2_layout *l, const uint8_t *file, uint64_t cluster)
{
    uint64_t per_block = ((uint64_t)8 << l->cluster_bits) >> l->refcount_order;
    uint64_t block = load_be64(file + l->refcount_table_offset + cluster / per_block * 8);
    uint64_t index = cluster % per_block;
    unsigned bits = 1u << l->refcount_order;
    uint64_t count = 0;

    if (block == 0)
        return 0;
    if (bits < 8)
        return file[block + index * bits / 8] >> (index * bits % 8) & ((1u << bits) - 1);
    for (unsigned i = 0; i < bits / 8; i++)
        count = count << 8 | file[block + index * (bits / 8) + i];
    return count;
}

/* Every cluster is counted once, and is used once: by the header, by a table, or as data. */
static void check_content(const struct qcow2_layout *l, const uint8_t *file)
{
    uint64_t cluster_size = (uint64_t)1 << l->cluster_bits;
    uint64_t clusters = l->file_size / cluster_size;
    uint8_t *used = xnew_n(uint8_t, clusters);
    uint64_t guest = 0;

#define USE(offset, len)                                                                           \
    do {                                                                                           \
        for (uint64_t at_ = (offset); at_ < (offset) + (len); at_ += cluster_size) {               \
            assert_true(is_aligned(at_, cluster_size));                                            \
            assert_true(at_ / cluster_size < clusters);                                            \
            used[at_ / cluster_size]++;                                                            \
        }                                                                                          \
    } while (0)

    USE((uint64_t)0, 1);
    USE(l->refcount_table_offset, l->refcount_table_clusters * cluster_size);
    USE(l->l1_offset, l->l1_size * 8);
    for (uint64_t i = 0; i < l->refcount_table_clusters * cluster_size / 8; i++) {
        uint64_t block = load_be64(file + l->refcount_table_offset + i * 8);

        if (block)
            USE(block, 1);
    }
    for (uint64_t i = 0; i < l->l1_size; i++) {
        uint64_t l1 = load_be64(file + l->l1_offset + i * 8);

        if (l1 == 0)
            continue;
        assert_true(l1 & QCOW2_COPIED);
        assert_false(l1 & QCOW2_L1_RESERVED_MASK);
        USE(l1 & QCOW2_L1_OFFSET_MASK, 1);
        for (uint64_t k = 0; k < cluster_size / 8; k++) {
            uint64_t l2 = load_be64(file + (l1 & QCOW2_L1_OFFSET_MASK) + k * 8);

            if (l2 == 0)
                continue;
            assert_int_equal(i * (cluster_size / 8) + k, guest);
            guest++;
            assert_true(l2 & QCOW2_COPIED);
            assert_int_equal(l2 & ~(QCOW2_COPIED | QCOW2_L2_OFFSET_MASK), 0);
            USE(l2 & QCOW2_L2_OFFSET_MASK, 1);
        }
    }
#undef USE
    assert_int_equal(guest, l->data_clusters);
    for (uint64_t i = 0; i < clusters; i++) {
        assert_int_equal(used[i], 1);
        assert_int_equal(refcount_of(l, file, i), 1);
    }
    /* The rest of the last block counts nothing. */
    while (clusters % (((uint64_t)8 << l->cluster_bits) >> l->refcount_order))
        assert_int_equal(refcount_of(l, file, clusters++), 0);
    free(used);
}

/* Any piece of the file is as the whole says, and what is outside of the segments is zeroes. */
static void check_pieces(const struct qcow2_layout *l, const uint8_t *file, struct prng *prng)
{
    uint8_t *rest = xnew_n(uint8_t, l->file_size);
    uint8_t piece[700];

    memcpy(rest, file, l->file_size);
    for (unsigned i = 0; i < l->segment_count; i++) {
        assert_true(l->segments[i].len > 0);
        assert_true(range_within(l->segments[i].offset, l->segments[i].len, l->file_size));
        assert_true(i == 0 ||
                    l->segments[i].offset >= l->segments[i - 1].offset + l->segments[i - 1].len);
        memset(rest + l->segments[i].offset, 0, l->segments[i].len);
    }
    for (uint64_t i = 0; i < l->file_size; i++) {
        if (rest[i])
            fail_msg("byte %" PRIu64 " is outside of the segments, but is 0x%02x", i, rest[i]);
    }
    free(rest);
    for (unsigned i = 0; i < 50; i++) {
        uint64_t offset = prng_below(prng, l->file_size);
        size_t len = (size_t)MIN(l->file_size - offset, prng_below(prng, sizeof(piece)));

        memset(piece, 0xee, sizeof(piece));
        qcow2_layout_read(l, offset, piece, len);
        assert_memory_equal(piece, file + offset, len);
        assert_true(len == sizeof(piece) || piece[len] == 0xee);
    }
}

static void check_header(const struct qcow2_create_options *o, const struct qcow2_layout *l,
                         const uint8_t *file)
{
    struct error *err = NULL;
    struct qcow2_header h;

    if (qcow2_header_parse(&h, file, (size_t)l->file_size, l->file_size, "x", &err) < 0 ||
        qcow2_header_check_supported(&h, false, "x", &err) < 0)
        fail_msg("%s", error_text(err));
    assert_int_equal(h.version, o->version);
    assert_int_equal(h.cluster_bits, o->cluster_bits);
    assert_int_equal(h.refcount_order, o->refcount_order);
    assert_int_equal(h.size, align_up(o->size, 512));
    assert_int_equal(h.incompatible | h.compatible | h.autoclear, 0);
    assert_int_equal(h.l1_size, l->l1_size);
    assert_int_equal(h.l1_offset, l->l1_offset);
    assert_int_equal(h.refcount_table_offset, l->refcount_table_offset);
    assert_int_equal(h.refcount_table_clusters, l->refcount_table_clusters);
    if (o->backing_file) {
        assert_string_equal(h.backing_file, o->backing_file);
        assert_string_equal(h.backing_format, o->backing_format);
    } else {
        assert_null(h.backing_file);
        assert_null(h.backing_format);
    }
    qcow2_header_release(&h);
}

static void check_image(const struct qcow2_create_options *o, struct prng *prng)
{
    struct qcow2_layout l = must_lay_out(o);
    uint8_t *file = xnew_n(uint8_t, l.file_size);

    assert_true(l.file_size < 64 * MIB);
    qcow2_layout_read(&l, 0, file, l.file_size);
    check_header(o, &l, file);
    check_content(&l, file);
    check_pieces(&l, file, prng);
    free(file);
}

static struct qcow2_create_options random_options(struct prng *prng)
{
    struct qcow2_create_options o = QCOW2_CREATE_OPTIONS_INIT;

    o.version = prng_chance(prng, 200) ? 2 : 3;
    o.cluster_bits = 9 + (unsigned)prng_below(prng, prng_chance(prng, 100) ? 13 : 8);
    if (o.version == 3)
        o.refcount_order = (unsigned)prng_below(prng, 7);
    if (prng_chance(prng, 300)) {
        o.backing_file = "some/where/base.img";
        o.backing_format = "qcow2";
    }
    o.preallocate_metadata = !o.backing_file && prng_chance(prng, 500);
    o.size = prng_below(prng, o.preallocate_metadata ? 4 * MIB : 1 * GIB);
    return o;
}

static void test_qcow2_create__every_cluster_is_counted_and_used_once(void **state)
{
    (void)state;
    TEST_SEEDS (seed) {
        struct prng prng = {.state = seed};
        struct qcow2_create_options o = random_options(&prng);

        check_image(&o, &prng);
    }
}

static void test_qcow2_create__features_are_named_where_there_is_room(void **state)
{
    struct qcow2_create_options o = defaults(1 * MIB);
    char buf[QCOW2_FEATURE_NAME_LEN + 1];
    uint8_t bytes[4096];

    (void)state;
    for (unsigned version = 2; version <= 3; version++) {
        for (o.cluster_bits = 9; o.cluster_bits <= 10; o.cluster_bits++) {
            struct error *err = NULL;
            struct qcow2_layout l;
            struct qcow2_header h;

            o.version = version;
            o.backing_file = "base.img";
            o.backing_format = "raw";
            l = must_lay_out(&o);
            qcow2_layout_read(&l, 0, bytes, sizeof(bytes));
            if (qcow2_header_parse(&h, bytes, 1024, l.file_size, "x", &err) < 0)
                fail_msg("%s", error_text(err));
            if (version == 3 && o.cluster_bits == 10)
                assert_string_equal(
                    qcow2_header_feature_name(&h, QCOW2_FEATURE_INCOMPATIBLE, 4, buf),
                    "extended L2 entries");
            else
                assert_null(qcow2_header_feature_name(&h, QCOW2_FEATURE_INCOMPATIBLE, 4, buf));
            qcow2_header_release(&h);
        }
    }
}

/* There may be bitmaps one day: names that nobody needs are left out for them. */
static void test_qcow2_create__there_is_room_for_another_extension(void **state)
{
    struct qcow2_create_options o = defaults(1 * MIB);
    struct error *err = NULL;
    struct qcow2_layout l;
    struct qcow2_header h;
    uint8_t bytes[512];
    size_t end;

    (void)state;
    o.cluster_bits = 9;
    l = must_lay_out(&o);
    qcow2_layout_read(&l, 0, bytes, sizeof(bytes));
    if (qcow2_header_parse(&h, bytes, sizeof(bytes), l.file_size, "x", &err) < 0)
        fail_msg("%s", error_text(err));
    end = h.header_length + QCOW2_EXTENSION_HEAD;
    for (unsigned i = 0; i < h.extension_count; i++)
        end += QCOW2_EXTENSION_HEAD + align_up(h.extensions[i].len, QCOW2_EXTENSION_ALIGN);
    assert_true(end + QCOW2_EXTENSION_HEAD + QCOW2_BITMAPS_LEN <= sizeof(bytes));
    qcow2_header_release(&h);
}

/* ---- the file, where hosts fail ---- */

#define PATH "/disk/new.qcow2"

struct creation {
    struct qcow2_create_options options;
    const char *path;
    int result;
    char message[256];
};

static void create(void *arg)
{
    struct creation *c = arg;
    struct error *err = NULL;

    c->result = qcow2_co_create(c->path ? c->path : PATH, &c->options, &err);
    c->message[0] = '\0';
    if (c->result < 0)
        (void)snprintf(c->message, sizeof(c->message), "%s", error_text(err));
    error_free(&err);
}

static bool is_complete(struct sim_disk *d, const struct qcow2_create_options *o)
{
    struct qcow2_layout l = must_lay_out(o);
    uint8_t *want = xnew_n(uint8_t, l.file_size);
    uint8_t *have = xnew_n(uint8_t, l.file_size);
    bool same = sim_disk_size(d, PATH) == (int64_t)l.file_size;

    qcow2_layout_read(&l, 0, want, l.file_size);
    if (same) {
        assert_int_equal(sim_disk_read(d, PATH, 0, have, l.file_size), 0);
        same = memcmp(want, have, l.file_size) == 0;
    }
    free(want);
    free(have);
    return same;
}

static struct creation a_creation(uint64_t seed)
{
    struct prng prng = {.state = seed};
    struct creation c = {.options = random_options(&prng), .result = 1};

    return c;
}

static void test_qcow2_create__survives_a_power_cut_when_it_has_returned(void **state)
{
    (void)state;
    TEST_SEEDS (seed) {
        struct creation c = a_creation(seed);
        struct sim_disk *d = sim_disk_new();

        assert_int_equal(run_on(d, seed, create, &c), SIM_RETURNED);
        assert_int_equal(c.result, 0);
        sim_disk_power_cut(d, seed);
        assert_true(is_complete(d, &c.options));
        sim_disk_free(d);
    }
}

/* With the power gone at any time the file is whole, or does not pass for an image. */
static void test_qcow2_create__half_made_file_is_no_image(void **state)
{
    (void)state;
    TEST_SEEDS (seed) {
        struct creation c = a_creation(seed);
        struct sim_disk *d = sim_disk_new();
        struct sim_options o;
        uint8_t magic[4] = {0};

        sim_options_init(&o, seed);
        o.disk = d;
        o.may_end_early = true;
        o.kill_at_op = 1 + seed % 12;
        (void)sim_run(&o, create, &c);
        sim_disk_power_cut(d, seed);
        if (sim_disk_size(d, PATH) >= 4)
            assert_int_equal(sim_disk_read(d, PATH, 0, magic, 4), 0);
        if (load_be32(magic) == QCOW2_MAGIC && !is_complete(d, &c.options)) {
            /* The header itself may be torn at 512 bytes; what it points to is there. */
            uint8_t tables[512];
            uint8_t want[512];
            struct qcow2_layout l = must_lay_out(&c.options);

            for (uint64_t at = l.refcount_table_offset; at < l.file_size; at += 512) {
                assert_int_equal(sim_disk_read(d, PATH, at, tables, 512), 0);
                qcow2_layout_read(&l, at, want, 512);
                assert_memory_equal(tables, want, 512);
            }
        }
        sim_disk_free(d);
    }
}

static void test_qcow2_create__failure_leaves_no_file(void **state)
{
    static const struct {
        unsigned ops;
        int error;
    } faults[] = {
        {SIM_OP(IO_OPEN), EACCES}, {SIM_OP(IO_TRUNCATE), EFBIG}, {SIM_OP(IO_WRITE), ENOSPC},
        {SIM_OP(IO_SYNC), EIO},    {SIM_OP(IO_CLOSE), EDQUOT},   {SIM_OP(IO_SYNC_DIR), EIO},
    };

    (void)state;
    TEST_SEEDS (seed) {
        unsigned which = (unsigned)(seed % ARRAY_SIZE(faults));
        struct sim_fault fault = {.ops = faults[which].ops,
                                  .kind = SIM_ERROR,
                                  .error = faults[which].error,
                                  .at = 1 + seed / ARRAY_SIZE(faults) % 3};
        struct sim_fault *list[] = {&fault};
        struct creation c = a_creation(seed);
        struct sim_disk *d = sim_disk_new();
        struct sim_options o;

        sim_options_init(&o, seed);
        o.disk = d;
        o.faults = list;
        o.fault_count = 1;
        assert_int_equal(sim_run(&o, create, &c), SIM_RETURNED);
        if (fault.fired) {
            assert_int_equal(c.result, -faults[which].error);
            assert_non_null(strstr(c.message, "'" PATH "': "));
            assert_int_equal(sim_disk_size(d, PATH), -ENOENT);
        } else {
            assert_int_equal(c.result, 0);
            assert_true(is_complete(d, &c.options));
        }
        sim_disk_free(d);
    }
}

static void cancel_a_creation(void *arg)
{
    struct co_scope s;

    co_scope_init(&s);
    assert_int_equal(co_scope_start(&s, create, arg), 0);
    (void)co_sleep_until(loop_clock() + prng_below(sim_prng(), 3 * NS_PER_MS));
    co_scope_cancel(&s);
    co_scope_join(&s);
}

static void test_qcow2_create__cancelled_leaves_no_file(void **state)
{
    (void)state;
    TEST_SEEDS (seed) {
        struct creation c = a_creation(seed);
        struct sim_disk *d = sim_disk_new();

        assert_int_equal(run_on(d, seed, cancel_a_creation, &c), SIM_RETURNED);
        if (c.result == 0) {
            assert_true(is_complete(d, &c.options));
        } else {
            if (c.result < 0)
                assert_int_equal(c.result, -ECANCELED);
            assert_int_equal(sim_disk_size(d, PATH), -ENOENT);
        }
        sim_disk_free(d);
    }
}

static void test_qcow2_create__never_touches_a_file_that_exists(void **state)
{
    struct creation c = {.options = defaults(1 * MIB)};
    struct sim_disk *d = sim_disk_new();
    char content[5] = "";

    (void)state;
    sim_disk_write(d, PATH, 0, "dear", 4);
    assert_int_equal(run_on(d, 1, create, &c), SIM_RETURNED);
    assert_int_equal(c.result, -EEXIST);
    assert_non_null(strstr(c.message, PATH));
    assert_int_equal(sim_disk_size(d, PATH), 4);
    assert_int_equal(sim_disk_read(d, PATH, 0, content, 4), 0);
    assert_string_equal(content, "dear");

    /* Nor does it make a file for options that are nonsense. */
    c.options.cluster_bits = 5;
    c.path = "/disk/other";
    assert_int_equal(run_on(d, 1, create, &c), SIM_RETURNED);
    assert_int_equal(c.result, -EINVAL);
    assert_string_equal(c.message, "cannot create '/disk/other': cluster_bits is 5, expected 9 to "
                                   "21 (512 bytes to 2 MiB)");
    assert_int_equal(sim_disk_size(d, "/disk/other"), -ENOENT);
    sim_disk_free(d);
}

/* ---- with QEMU's tools ---- */

static char dir[64];

/* Runs a program without a shell, puts what it prints into `ret_text`, and returns its exit status, 127 if it is not there. */
static int run(char *ret_text, size_t size, const char *const *argv)
{
    int pipe_fds[2];
    size_t len = 0;
    ssize_t n;
    int status;
    pid_t pid;

    assert_int_equal(pipe(pipe_fds), 0);
    pid = fork();
    assert_true(pid >= 0);
    if (pid == 0) {
        (void)dup2(pipe_fds[1], 1);
        (void)dup2(pipe_fds[1], 2);
        close(pipe_fds[0]);
        close(pipe_fds[1]);
        if (chdir(dir) == 0)
            execvp(argv[0], (char *const *)(uintptr_t)argv);
        _exit(127);
    }
    close(pipe_fds[1]);
    while ((n = read(pipe_fds[0], ret_text + len, size - 1 - len)) > 0)
        len += (size_t)n;
    ret_text[len] = '\0';
    close(pipe_fds[0]);
    assert_int_equal(waitpid(pid, &status, 0), pid);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128;
}

static void must_run(char *ret_text, size_t size, const char *const *argv)
{
    int status = run(ret_text, size, argv);

    if (status != 0)
        fail_msg("%s %s ... %s: exit status %d: %s", argv[0], argv[1], argv[4], status, ret_text);
}

static void with_qemu_img(void)
{
    static const char *const version[] = {"qemu-img", "--version", NULL};
    char text[4096];
    int fd;

    (void)snprintf(dir, sizeof(dir), "./test-qcow2-create-XXXXXX");
    assert_non_null(mkdtemp(dir));
    if (run(text, sizeof(text), version) != 0) {
        rmdir(dir);
        skip();
    }
    (void)snprintf(text, sizeof(text), "%s/base.img", dir);
    fd = open(text, O_CREAT | O_WRONLY, 0600);
    assert_true(fd >= 0);
    assert_int_equal(ftruncate(fd, 1 << 20), 0);
    close(fd);
}

static void without_qemu_img(void)
{
    char path[128];

    (void)snprintf(path, sizeof(path), "%s/base.img", dir);
    unlink(path);
    assert_int_equal(rmdir(dir), 0);
}

static const uint64_t sizes[] = {0, 1, 512, 65536 + 512, 1 * GIB, 1 * PIB};

/* The next of them: all cluster sizes with all refcount widths and both versions, the rest in turns. False at the end. */
static bool next_options(unsigned *i, struct qcow2_create_options *o)
{
    for (;;) {
        unsigned n = (*i)++;
        unsigned kind = n % 8; /* refcount orders, then version 2 */

        if (n / 8 > QCOW2_CLUSTER_BITS_MAX - QCOW2_CLUSTER_BITS_MIN)
            return false;
        *o = defaults(sizes[n * 5 / 8 % ARRAY_SIZE(sizes)]);
        o->cluster_bits = QCOW2_CLUSTER_BITS_MIN + n / 8;
        if (kind < 7)
            o->refcount_order = kind;
        else
            o->version = 2;
        if (n % 3 == 1) {
            o->backing_file = "base.img";
            o->backing_format = "raw";
        }
        /* With preallocation of as much as fits into a few thousand clusters. */
        if (n % 3 == 2) {
            o->preallocate_metadata = true;
            o->size = MIN(o->size, (uint64_t)3000 << o->cluster_bits);
        }
        /* The largest disk with such clusters. */
        o->size = MIN(o->size, (uint64_t)(4 * MIB) << (2 * o->cluster_bits - 3));
        return true;
    }
}

static void must_contain(const char *text, const char *fmt, ...) PRINTF_LIKE(2, 3);

static void must_contain(const char *text, const char *fmt, ...)
{
    va_list args;
    char *part;

    va_start(args, fmt);
    part = xvasprintf(fmt, args);
    va_end(args);
    if (!strstr(text, part))
        fail_msg("%s\nis not in\n%s", part, text);
    free(part);
}

static void create_one(const char *name, const struct qcow2_create_options *options, char *ret_path,
                       size_t size)
{
    struct creation c = {.options = *options, .path = ret_path, .result = 1};
    struct error *err = NULL;

    (void)snprintf(ret_path, size, "%s/%s", dir, name);
    if (loop_run_main(LOOP_ENGINE_THREADS, "test", create, &c, &err) < 0)
        fail_msg("%s", error_text(err));
    if (c.result < 0)
        fail_msg("%s", c.message);
}

static void check_by_qemu(const struct qcow2_create_options *o, unsigned n)
{
    static const char *const check[] = {"qemu-img", "check", "-f", "qcow2", "a", NULL};
    static const char *const info[] = {"qemu-img", "info",          "-f", "qcow2",
                                       "a",        "--output=json", NULL};
    struct qcow2_layout l = must_lay_out(o);
    char text[16384];
    char path[128];

    create_one("a", o, path, sizeof(path));
    must_run(text, sizeof(text), check);
    must_contain(text, "No errors were found on the image.\n");
    must_contain(text, "Image end offset: %" PRIu64 "\n", l.file_size);
    if (o->preallocate_metadata && o->size > 0)
        must_contain(text, "%" PRIu64 "/%" PRIu64 " = 100.00%% allocated", l.data_clusters,
                     l.data_clusters);
    if (n % 3 != 0) {
        unlink(path);
        return;
    }
    must_run(text, sizeof(text), info);
    unlink(path);
    must_contain(text, "\"virtual-size\": %" PRIu64 ",", align_up(o->size, 512));
    must_contain(text, "\"cluster-size\": %u,", 1u << o->cluster_bits);
    must_contain(text, "\"compat\": \"%s\"", o->version == 2 ? "0.10" : "1.1");
    if (o->version == 3)
        must_contain(text, "\"refcount-bits\": %u,", 1u << o->refcount_order);
    if (o->backing_file) {
        must_contain(text, "\"backing-filename\": \"base.img\"");
        must_contain(text, "\"backing-filename-format\": \"raw\"");
    }
}

static void test_qcow2_create__qemu_takes_our_images(void **state)
{
    struct qcow2_create_options o;
    unsigned n = 0;

    (void)state;
    with_qemu_img();
    while (next_options(&n, &o))
        check_by_qemu(&o, n / 3);
    without_qemu_img();
}

static void parse_file(const char *path, struct qcow2_header *ret)
{
    static uint8_t bytes[QCOW2_HEADER_BYTES_MAX];
    struct error *err = NULL;
    struct stat st;
    int fd = open(path, O_RDONLY);
    ssize_t len;

    assert_true(fd >= 0);
    assert_int_equal(fstat(fd, &st), 0);
    len = pread(fd, bytes, sizeof(bytes), 0);
    assert_true(len > 0);
    close(fd);
    if (qcow2_header_parse(ret, bytes, (size_t)len, (uint64_t)st.st_size, "x", &err) < 0 ||
        qcow2_header_check_supported(ret, false, "x", &err) < 0)
        fail_msg("%s", error_text(err));
}

static void parse_one_of_qemu(const struct qcow2_create_options *o)
{
    char settings[256];
    char size[32];
    const char *const argv[] = {"qemu-img", "create", "-f", "qcow2", "a",
                                "-o",       settings, size, NULL};
    char text[4096];
    char path[128];
    struct qcow2_header h;

    (void)snprintf(size, sizeof(size), "%" PRIu64, o->size);
    (void)snprintf(settings, sizeof(settings), "cluster_size=%u,refcount_bits=%u,compat=%s%s%s",
                   1u << o->cluster_bits, 1u << o->refcount_order, o->version == 2 ? "0.10" : "1.1",
                   o->backing_file ? ",backing_file=base.img,backing_fmt=raw" : "",
                   o->preallocate_metadata ? ",preallocation=metadata" : "");
    must_run(text, sizeof(text), argv);
    (void)snprintf(path, sizeof(path), "%s/a", dir);
    parse_file(path, &h);
    unlink(path);
    assert_int_equal(h.version, o->version);
    assert_int_equal(h.cluster_bits, o->cluster_bits);
    assert_int_equal(h.refcount_order, o->refcount_order);
    assert_int_equal(h.size, align_up(o->size, 512));
    assert_true((h.backing_file != NULL) == (o->backing_file != NULL));
    if (o->backing_file) {
        assert_string_equal(h.backing_file, "base.img");
        assert_string_equal(h.backing_format, "raw");
    }
    qcow2_header_release(&h);
}

static void test_qcow2_create__we_take_the_images_of_qemu(void **state)
{
    struct qcow2_create_options o;
    unsigned n = 0;

    (void)state;
    with_qemu_img();
    while (next_options(&n, &o)) {
        /* QEMU's own preallocation of larger tables takes it long. */
        if (o.size <= 1 * GIB || n % 4 == 0)
            parse_one_of_qemu(&o);
    }
    without_qemu_img();
}
