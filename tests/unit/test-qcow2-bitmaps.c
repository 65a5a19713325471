/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The bitmaps extension in headers: after each step that puts one in, changes it or takes it out, and in the midst of it (STORED-3), the
 * header is the one that it was but for what it says of bitmaps. And entries of directories and tables.
 */
#include "base/alloc.h"
#include "base/endian.h"
#include "base/macros.h"
#include "base/prng.h"
#include "formats/qcow2/qcow2-bitmap-dir.h"
#include "formats/qcow2/qcow2-header-bitmaps.h"
#include "formats/qcow2/qcow2-header-write.h"
#include "seeds.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define CLUSTER   ((size_t)4096)
#define FILE_SIZE (64 * CLUSTER)
#define UNKNOWN   0x12345678u

/* A header as some program may have made it. */
struct sample {
    uint8_t bytes[CLUSTER];
    size_t extension; /* where the one for bitmaps is; 0: there is none */
    char name[300];   /* of the backing file; empty: none */
};

static size_t put_extension(uint8_t *b, size_t at, uint32_t type, const void *data, size_t len)
{
    store_be32(b + at, type);
    store_be32(b + at + 4, (uint32_t)len);
    memcpy(b + at + 8, data, len);
    return at + 8 + (len + 7) / 8 * 8;
}

static void put_place(uint8_t *data, const struct qcow2_bitmaps_place *place)
{
    memset(data, 0, QCOW2_BITMAPS_LEN);
    store_be32(data + QCOW2_BITMAPS_COUNT, place->count);
    store_be64(data + QCOW2_BITMAPS_DIRECTORY_SIZE, place->directory_size);
    store_be64(data + QCOW2_BITMAPS_DIRECTORY_OFFSET, place->directory_offset);
}

static const struct qcow2_bitmaps_place old_place = {2, 64, 20 * CLUSTER};
static const struct qcow2_bitmaps_place new_place = {3, 100, 30 * CLUSTER};
static const struct qcow2_bitmaps_place no_place = {0, 0, 0};

/* `before` and `behind`: bytes of other extensions around it. */
static void sample_make(struct sample *s, size_t before, bool has, bool counts, size_t behind,
                        size_t name_gap, size_t name_len)
{
    uint8_t data[CLUSTER / 2] = {7, 7, 7};
    size_t at = QCOW2_HEADER_LENGTH_V3;
    uint8_t *b = s->bytes;

    memset(s, 0, sizeof(*s));
    store_be32(b, QCOW2_MAGIC);
    store_be32(b + QCOW2_OFFSET_VERSION, 3);
    store_be32(b + QCOW2_OFFSET_CLUSTER_BITS, 12);
    store_be64(b + QCOW2_OFFSET_SIZE, MIB);
    store_be32(b + QCOW2_OFFSET_L1_SIZE, 1);
    store_be64(b + QCOW2_OFFSET_L1_OFFSET, 3 * CLUSTER);
    store_be64(b + QCOW2_OFFSET_REFCOUNT_TABLE_OFFSET, CLUSTER);
    store_be32(b + QCOW2_OFFSET_REFCOUNT_TABLE_CLUSTERS, 1);
    store_be64(b + QCOW2_OFFSET_AUTOCLEAR,
               (uint64_t)1 << 40 | (counts ? QCOW2_AUTOCLEAR_BITMAPS : 0));
    store_be32(b + QCOW2_OFFSET_REFCOUNT_ORDER, 4);
    store_be32(b + QCOW2_OFFSET_HEADER_LENGTH, QCOW2_HEADER_LENGTH_V3);
    if (before)
        at = put_extension(b, at, UNKNOWN, data, before);
    if (has) {
        put_place(data, &old_place);
        s->extension = at;
        at = put_extension(b, at, QCOW2_EXTENSION_BITMAPS, data, QCOW2_BITMAPS_LEN);
    }
    if (behind)
        at = put_extension(b, at, UNKNOWN + 1, data, behind);
    if (!name_len)
        return;
    at += 8 + name_gap;
    memset(s->name, 'n', name_len);
    memcpy(b + at, s->name, name_len);
    store_be64(b + QCOW2_OFFSET_BACKING_FILE_OFFSET, at);
    store_be32(b + QCOW2_OFFSET_BACKING_FILE_SIZE, (uint32_t)name_len);
}

static void parse(const uint8_t *bytes, struct qcow2_header *ret)
{
    struct error *err = NULL;

    if (qcow2_header_parse(ret, bytes, CLUSTER, FILE_SIZE, "x", &err) < 0)
        fail_msg("%s", error_text(err));
}

static bool is_place(const struct qcow2_header *h, const struct qcow2_bitmaps_place *place)
{
    if (!place->count)
        return !h->has_bitmaps;
    return h->has_bitmaps && h->bitmap_count == place->count &&
           h->bitmap_directory_size == place->directory_size &&
           h->bitmap_directory_offset == place->directory_offset;
}

/* Whatever it says of bitmaps, all else is as it was. */
static void must_be(const struct sample *s, const uint8_t *bytes,
                    const struct qcow2_bitmaps_place *was,
                    const struct qcow2_bitmaps_place *becomes, bool may_have_none)
{
    struct qcow2_header old = {0};
    struct qcow2_header h = {0};
    unsigned k = 0;

    parse(s->bytes, &old);
    parse(bytes, &h);
    assert_true(is_place(&h, was) || is_place(&h, becomes) || (may_have_none && !h.has_bitmaps));
    assert_true(h.autoclear >> 40 & 1);
    assert_true(!h.backing_file == !s->name[0] &&
                (!h.backing_file || strcmp(h.backing_file, s->name) == 0));
    for (unsigned i = 0; i < old.extension_count; i++) {
        if (old.extensions[i].type == QCOW2_EXTENSION_BITMAPS)
            continue;
        while (k < h.extension_count && h.extensions[k].type == QCOW2_EXTENSION_BITMAPS)
            k++;
        assert_true(k < h.extension_count && h.extensions[k].type == old.extensions[i].type &&
                    h.extensions[k].len == old.extensions[i].len &&
                    memcmp(h.extensions[k].data, old.extensions[i].data, old.extensions[i].len) ==
                        0);
        k++;
    }
    qcow2_header_release(&old);
    qcow2_header_release(&h);
}

/* Some of a step's sectors are written, others not. */
static void write_part(uint8_t *bytes, const struct qcow2_header_step *step, struct prng *prng,
                       bool all)
{
    for (size_t at = step->at; at < step->at + step->len;) {
        size_t end =
            MIN((at / QCOW2_HEADER_SECTOR + 1) * QCOW2_HEADER_SECTOR, step->at + step->len);

        if (all || prng_chance(prng, 500))
            memcpy(bytes + at, step->becomes + (at - step->at), end - at);
        at = end;
    }
}

static struct qcow2_header_steps *plan(const struct sample *s,
                                       const struct qcow2_bitmaps_place *place)
{
    struct qcow2_header_steps *steps = xnew(struct qcow2_header_steps);
    struct qcow2_header h = {0};
    struct error *err = NULL;

    parse(s->bytes, &h);
    if (qcow2_header_plan_bitmaps(&h, s->bytes, CLUSTER, place, steps, &err) < 0)
        fail_msg("%s", error_text(err));
    qcow2_header_release(&h);
    return steps;
}

static void walk(const struct sample *s, const struct qcow2_bitmaps_place *was,
                 const struct qcow2_bitmaps_place *becomes, bool may_have_none, struct prng *prng)
{
    struct qcow2_header_steps *steps = plan(s, becomes);
    uint8_t bytes[CLUSTER];
    uint8_t torn[CLUSTER];

    memcpy(bytes, s->bytes, CLUSTER);
    for (unsigned i = 0; i < steps->count; i++) {
        assert_memory_equal(steps->v[i].was, bytes + steps->v[i].at, steps->v[i].len);
        for (unsigned k = 0; k < 4; k++) {
            memcpy(torn, bytes, CLUSTER);
            write_part(torn, &steps->v[i], prng, false);
            must_be(s, torn, was, becomes, may_have_none);
        }
        write_part(bytes, &steps->v[i], prng, true);
        must_be(s, bytes, was, becomes, may_have_none);
    }
    must_be(s, bytes, becomes, becomes, false);
    for (unsigned i = steps->count; i-- > 0;) /* and back (D3) */
        memcpy(bytes + steps->v[i].at, steps->v[i].was, steps->v[i].len);
    must_be(s, bytes, was, was, false);
    free(steps);
}

static void test_qcow2_bitmaps__header_is_sound_at_every_step(void **state)
{
    static const size_t lens[] = {0, 8, 100, 336, 340, 344, 352, 376, 384, 392, 1000};

    (void)state;
    TEST_SEEDS (seed) {
        struct prng prng = {.state = seed};
        size_t before = lens[prng_below(&prng, ARRAY_SIZE(lens))];
        size_t behind = prng_chance(&prng, 300) ? lens[prng_below(&prng, ARRAY_SIZE(lens))] : 0;
        size_t gap = prng_chance(&prng, 500) ? 0 : (size_t)prng_below(&prng, 100);
        size_t name = prng_chance(&prng, 300) ? 0 : 1 + (size_t)prng_below(&prng, 299);
        bool has = prng_chance(&prng, 600);
        bool counts = has && prng_chance(&prng, 800);
        const struct qcow2_bitmaps_place *was = counts ? &old_place : &no_place;
        struct sample s;
        size_t data;

        sample_make(&s, before, has, counts, behind, gap, name);
        data = s.extension + QCOW2_EXTENSION_HEAD;
        /* Only where it cannot be one write may there be none meanwhile. */
        walk(&s, was, &new_place,
             !has ||
                 data / QCOW2_HEADER_SECTOR != (data + QCOW2_BITMAPS_LEN - 1) / QCOW2_HEADER_SECTOR,
             &prng);
        walk(&s, was, &no_place, false, &prng);
    }
}

static void test_qcow2_bitmaps__extension_goes_where_it_can(void **state)
{
    struct qcow2_header_steps *steps;
    struct qcow2_header h = {0};
    uint8_t bytes[CLUSTER];
    struct sample s;

    (void)state;
    sample_make(&s, 8, true, true, 8, 0, 0);
    steps = plan(&s, &no_place);
    memcpy(bytes, s.bytes, CLUSTER);
    for (unsigned i = 0; i < steps->count; i++)
        memcpy(bytes + steps->v[i].at, steps->v[i].becomes, steps->v[i].len);
    parse(bytes, &h);
    assert_int_equal(h.extension_count, 2);
    assert_int_equal(h.extensions[1].type, UNKNOWN + 1);
    qcow2_header_release(&h);
    free(steps);
}

static void must_have_no_room(struct sample *s)
{
    struct qcow2_header_steps *steps = xnew(struct qcow2_header_steps);
    struct qcow2_header h = {0};
    struct error *err = NULL;

    parse(s->bytes, &h);
    assert_int_equal(qcow2_header_plan_bitmaps(&h, s->bytes, CLUSTER, &new_place, steps, &err),
                     -ENOSPC);
    error_free(&err);
    qcow2_header_release(&h);
    free(steps);
}

static void test_qcow2_bitmaps__header_without_room_is_refused(void **state)
{
    struct sample s;

    (void)state;
    sample_make(&s, 2000, false, false, 1944, 0, 0);
    must_have_no_room(&s); /* for the extension */
    sample_make(&s, 2000, false, false, 1800, 0, 100);
    must_have_no_room(&s); /* for the name, beside itself */
    sample_make(&s, 8, false, false, 0, 0, 10);
    store_be64(s.bytes + QCOW2_OFFSET_BACKING_FILE_OFFSET, QCOW2_HEADER_LENGTH_V3 + 16);
    memset(s.bytes + QCOW2_HEADER_LENGTH_V3 + 16, 'n', 8);
    must_have_no_room(&s); /* what ends the extensions is the name */
}

static void test_qcow2_bitmaps__broken_extension_is_as_if_there_were_none(void **state)
{
    struct qcow2_header h = {0};
    struct error *err = NULL;
    struct sample s;

    (void)state;
    sample_make(&s, 8, true, true, 0, 0, 10);
    store_be32(s.bytes + s.extension + 8 + QCOW2_BITMAPS_COUNT, 0);
    assert_int_equal(qcow2_header_parse(&h, s.bytes, CLUSTER, FILE_SIZE, "x", &err), -EINVAL);
    error_free(&err);
    assert_int_equal(qcow2_header_parse_tolerant(&h, s.bytes, CLUSTER, FILE_SIZE, "x", &err), 0);
    assert_false(h.has_bitmaps);
    assert_non_null(strstr(h.bitmaps_problem, "there are 0 bitmaps"));
    assert_true(h.autoclear & QCOW2_AUTOCLEAR_BITMAPS);
    qcow2_header_release(&h);
    store_be32(s.bytes + QCOW2_OFFSET_L1_SIZE, 0);
    assert_int_equal(qcow2_header_parse_tolerant(&h, s.bytes, CLUSTER, FILE_SIZE, "x", &err),
                     -EINVAL);
    error_free(&err);
}

/* So are snapshots whose table cannot be, and both at once; each says what is wrong with it. */
static void test_qcow2_bitmaps__broken_table_of_snapshots_is_as_if_there_were_none(void **state)
{
    (void)state;
    for (unsigned both = 0; both < 2; both++) {
        struct qcow2_header h = {0};
        struct error *err = NULL;
        struct sample s;

        sample_make(&s, 8, true, true, 0, 0, 10);
        store_be32(s.bytes + QCOW2_OFFSET_SNAPSHOT_COUNT, 70000);
        if (both)
            store_be32(s.bytes + s.extension + 8 + QCOW2_BITMAPS_COUNT, 0);
        assert_int_equal(qcow2_header_parse_tolerant(&h, s.bytes, CLUSTER, FILE_SIZE, "x", &err),
                         0);
        assert_int_equal(h.snapshot_count, 0);
        assert_non_null(strstr(h.snapshots_problem, "there are 70000 snapshots"));
        assert_int_equal(h.has_bitmaps, !both);
        if (both)
            assert_non_null(strstr(h.bitmaps_problem, "there are 0 bitmaps"));
        else
            assert_null(h.bitmaps_problem);
        qcow2_header_release(&h);
    }
}

/* ---- the directory ---- */

static void test_qcow2_bitmaps__entries_are_read_as_they_were_put(void **state)
{
    static const uint8_t extra[] = {1, 2, 3};
    struct qcow2_bitmap_entry in = {
        .table_offset = 0x10000,
        .table_size = 5,
        .flags = QCOW2_BITMAP_AUTO | QCOW2_BITMAP_EXTRA_COMPATIBLE,
        .type = 1,
        .granularity_bits = 16,
        .name_len = 5,
        .extra_len = sizeof(extra),
        .extra = extra,
        .name = "abcde",
    };
    struct qcow2_bitmap_entry out;
    uint8_t bytes[64];
    size_t at = 0;

    (void)state;
    assert_int_equal(qcow2_bitmap_entry_put(bytes, &in), 32);
    assert_true(qcow2_bitmap_set_in_use(bytes, 32));
    assert_false(qcow2_bitmap_set_in_use(bytes, 32));
    assert_null(qcow2_bitmap_entry_next(bytes, 32, &at, &out));
    assert_int_equal(at, 32);
    assert_int_equal(out.flags, 7);
    assert_int_equal(out.table_offset, in.table_offset);
    assert_int_equal(out.table_size, 5);
    assert_int_equal(out.granularity_bits, 16);
    assert_memory_equal(out.name, "abcde", 5);
    assert_memory_equal(out.extra, extra, 3);
    for (size_t len = 0; len < 32; len++) {
        at = 0;
        assert_non_null(qcow2_bitmap_entry_next(bytes, len, &at, &out));
        assert_int_equal(at, 0);
    }
}

static void test_qcow2_bitmaps__what_cannot_be_used_is_found(void **state)
{
    const struct qcow2_bitmap_entry good = {
        .table_offset = 0x10000, .table_size = 2, .type = 1, .granularity_bits = 9, .name_len = 1};
    uint64_t size = (uint64_t)512 * 8 * 65536 + 1; /* more than one entry */
    struct qcow2_bitmap_entry e = good;

    (void)state;
#define problem() qcow2_bitmap_entry_problem(&e, size, 16, 0x20000)
    assert_null(problem());
    e.table_size = 3;
    assert_non_null(problem());
    e.flags = QCOW2_BITMAP_IN_USE;
    assert_null(problem());
    e = good;
    e.extra_len = 1;
    assert_non_null(problem());
    e.flags = QCOW2_BITMAP_EXTRA_COMPATIBLE;
    assert_null(problem());
    e = good;
    e.granularity_bits = 8;
    assert_non_null(problem());
    e = good;
    e.table_offset = 0x20000;
    assert_non_null(problem());
#undef problem
    assert_int_equal(qcow2_bitmap_table_entries(size, 9, 16), 2);
    assert_int_equal(qcow2_bitmap_table_entries(0, 9, 16), 0);
    assert_int_equal(qcow2_bitmap_table_entries((uint64_t)1 << 62, 31, 21), 1 << 7);
    assert_null(qcow2_bitmap_table_problem(0, 16, 0x20000));
    assert_null(qcow2_bitmap_table_problem(1, 16, 0x20000));
    assert_null(qcow2_bitmap_table_problem(0x10000, 16, 0x20000));
    assert_non_null(qcow2_bitmap_table_problem(0x10001, 16, 0x20000));
    assert_non_null(qcow2_bitmap_table_problem(0x10200, 16, 0x20000));
    assert_non_null(qcow2_bitmap_table_problem(0x20000, 16, 0x20000));
    assert_non_null(qcow2_bitmap_table_problem((uint64_t)1 << 56 | 0x10000, 16, 0x20000));
}
