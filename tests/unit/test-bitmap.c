/* SPDX-License-Identifier: Apache-2.0 */
/* The bitmap through its header: ranges, levels, memory, claims, merges, resizing; and no memory, at every allocation. */
#include "base/alloc.h"
#include "base/macros.h"
#include "base/prng.h"
#include "bitmaps/bitmap.h"
#include "seeds.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>

static struct bitmap *must_make(uint64_t size, uint64_t granularity)
{
    struct bitmap *b = bitmap_new(size, granularity);

    assert_non_null(b);
    return b;
}

/* The next run from `from` on is this one; len 0: there is none. */
static void must_find(const struct bitmap *b, uint64_t from, uint64_t offset, uint64_t len)
{
    uint64_t got_offset;
    uint64_t got_len;
    bool found = bitmap_next_dirty(b, from, UINT64_MAX, &got_offset, &got_len);

    if (found != (len > 0))
        fail_msg("from %" PRIu64 ": found %d", from, found);
    if (found && (got_offset != offset || got_len != len))
        fail_msg("from %" PRIu64 ": %" PRIu64 "+%" PRIu64 ", not %" PRIu64 "+%" PRIu64, from,
                 got_offset, got_len, offset, len);
}

static void must_claim(struct bitmap *b, uint64_t from, uint64_t max, uint64_t offset, uint64_t len)
{
    uint64_t got_offset = UINT64_MAX;
    uint64_t got_len = 0;
    int r = bitmap_claim(b, from, max, &got_offset, &got_len);

    assert_int_equal(r, len > 0);
    if (len && (got_offset != offset || got_len != len))
        fail_msg("%" PRIu64 "+%" PRIu64 ", not %" PRIu64 "+%" PRIu64, got_offset, got_len, offset,
                 len);
}

static uint64_t memory_of(const struct bitmap *b)
{
    struct bitmap_stats stats;

    bitmap_get_stats(b, &stats);
    return stats.memory_bytes;
}

static void test_bitmap__rounds_outward_and_ends_with_the_disk(void **state)
{
    struct bitmap *b = must_make(10 * 4096 + 100, 4096);

    (void)state;
    bitmap_set(b, 4095, 2);
    must_find(b, 0, 0, 8192);
    must_find(b, 5000, 5000, 8192 - 5000);
    must_find(b, 8192, 0, 0);
    bitmap_set(b, 40960 + 99, 1000);
    must_find(b, 8192, 40960, 100);
    bitmap_set(b, 50000, 4096); /* beyond the end */
    bitmap_set(b, 20000, 0);
    assert_int_equal(bitmap_count(b), 3 * 4096); /* the last granule in full */
    bitmap_set(b, 0, UINT64_MAX);
    assert_int_equal(bitmap_count(b), 11 * 4096);
    must_find(b, 0, 0, 40960 + 100);
    bitmap_check(b);
    bitmap_free(b);
}

static void test_bitmap__finds_runs_across_words_leaves_and_levels(void **state)
{
    uint64_t leaf = (uint64_t)4096 * 512;
    struct bitmap *b = must_make((uint64_t)1 << 62, 512);

    (void)state;
    for (unsigned level = 0; level < 5; level++) {
        uint64_t edge = leaf << 7 * level;

        bitmap_set(b, edge - 512, 1024);
        must_find(b, edge - 5000, edge - 512, 1024);
        must_find(b, edge, edge, 512);
    }
    assert_int_equal(bitmap_count(b), 5 * 1024);
    must_claim(b, 0, UINT64_MAX, leaf - 512, 1024);
    must_claim(b, 0, 512, (leaf << 7) - 512, 512);
    must_claim(b, 0, 511, leaf << 7, 512);
    bitmap_check(b);
    bitmap_free(b);
}

/* P5: what is set or cleared as a whole costs neither time nor memory. */
static void test_bitmap__whole_ranges_take_no_leaves(void **state)
{
    struct bitmap *b = must_make((uint64_t)1 << 63, 512);
    uint64_t before = memory_of(b);

    (void)state;
    bitmap_set(b, 0, (uint64_t)1 << 63);
    assert_int_equal(bitmap_count(b), (uint64_t)1 << 63);
    must_find(b, 12345, 12345, ((uint64_t)1 << 63) - 12345);
    assert_true(memory_of(b) < before + 100 * KIB);
    must_claim(b, 0, UINT64_MAX, 0, (uint64_t)1 << 63);
    must_find(b, 0, 0, 0);
    bitmap_set(b, 5 * GIB + 512, 2 * GIB);
    assert_true(memory_of(b) < before + 100 * KIB);
    assert_int_equal(bitmap_count(b), 2 * GIB);
    bitmap_check(b);
    bitmap_clear(b);
    assert_int_equal(memory_of(b), before);
    bitmap_free(b);
}

/* P5: 8 TiB at 64 KiB, a thousand writes here and there: a leaf for each, and not the 16 MiB of a flat bitmap. */
static void test_bitmap__memory_follows_what_is_dirty(void **state)
{
    struct bitmap *b = must_make(8 * TIB, 64 * KIB);
    struct bitmap_stats stats;

    (void)state;
    for (uint64_t i = 0; i < 1000; i++)
        bitmap_set(b, i * 8 * GIB, 4096);
    assert_int_equal(bitmap_count(b), 1000 * 64 * KIB);
    bitmap_get_stats(b, &stats);
    assert_in_range(stats.nodes, 1000, 1300);
    assert_in_range(stats.memory_bytes, 1000 * 512, 1200 * 1024);
    for (unsigned round = 0; round < 10; round++) {
        for (uint64_t i = 0; i < 1000; i++)
            bitmap_set(b, i * 8 * GIB, 4096);
    }
    assert_int_equal(bitmap_count(b), 1000 * 64 * KIB);
    bitmap_check(b);
    bitmap_free(b);
}

static void test_bitmap__claims_split_what_is_full(void **state)
{
    struct bitmap *b = must_make(1 * TIB, 64 * KIB);
    uint64_t offset;
    uint64_t len;
    uint64_t sum = 0;

    (void)state;
    bitmap_set(b, 0, 1 * TIB);
    must_claim(b, 100, MIB, 0, MIB); /* from within a granule: the granule */
    must_claim(b, 0, MIB, MIB, MIB);
    must_claim(b, 512 * GIB + MIB, MIB, 512 * GIB + MIB, MIB);
    must_find(b, 0, 2 * MIB, 512 * GIB - MIB);
    assert_int_equal(bitmap_count(b), 1 * TIB - 3 * MIB);
    bitmap_check(b);
    bitmap_set(b, 0, MIB); /* put back */
    offset = 0;
    len = 0;
    while (bitmap_claim(b, offset + len, 3 * MIB, &offset, &len) == 1) {
        assert_in_range(len, 1, 3 * MIB);
        sum += len;
    }
    assert_int_equal(sum, 1 * TIB - 2 * MIB);
    assert_int_equal(bitmap_count(b), 0);
    bitmap_check(b);
    bitmap_free(b);
}

static void test_bitmap__a_claim_is_cut_at_its_bound(void **state)
{
    struct bitmap *b = must_make(MIB, 512);
    uint64_t offset;
    uint64_t len;

    (void)state;
    bitmap_set(b, 512 * 60, 512 * 10); /* across a word */
    assert_int_equal(bitmap_claim(b, 0, 512 * 3, &offset, &len), 1);
    assert_int_equal(offset, 512 * 60);
    assert_int_equal(len, 512 * 3);
    must_claim(b, 512 * 65, UINT64_MAX, 512 * 65, 512 * 5);
    must_claim(b, 0, UINT64_MAX, 512 * 63, 512 * 2);
    must_claim(b, 0, UINT64_MAX, 0, 0);
    assert_false(bitmap_next_dirty(b, 0, MIB, &offset, &len));
    bitmap_set(b, 1024, 1024);
    assert_true(
        bitmap_next_dirty(b, 0, 1536, &offset, &len)); /* cut where the caller looks no further */
    assert_int_equal(offset, 1024);
    assert_int_equal(len, 512);
    assert_false(bitmap_next_dirty(b, 0, 1024, &offset, &len));
    assert_false(bitmap_next_dirty(b, 2048, 1024, &offset, &len));
    bitmap_free(b);
}

static void test_bitmap__merges_across_granularities(void **state)
{
    struct bitmap *fine = must_make(100 * MIB + 1, 512);
    struct bitmap *coarse = must_make(100 * MIB + 1, MIB);

    (void)state;
    bitmap_set(fine, 3 * MIB + 7, 1);
    bitmap_set(fine, 100 * MIB, 1);
    assert_int_equal(bitmap_merge(coarse, fine), 0);
    must_find(coarse, 0, 3 * MIB, MIB);
    must_find(coarse, 4 * MIB, 100 * MIB, 1);
    bitmap_set(coarse, 50 * MIB, 2);
    assert_int_equal(bitmap_merge(fine, coarse), 0);
    must_find(fine, 0, 3 * MIB, MIB);
    must_find(fine, 4 * MIB, 50 * MIB, MIB);
    must_find(fine, 51 * MIB, 100 * MIB, 1);
    assert_int_equal(bitmap_merge(fine, fine), 0);
    assert_int_equal(bitmap_count(fine), 2 * MIB + 512);
    bitmap_check(fine);
    bitmap_check(coarse);
    bitmap_free(fine);
    bitmap_free(coarse);
}

static void test_bitmap__merge_keeps_both(void **state)
{
    struct bitmap *a = must_make(TIB, 64 * KIB);
    struct bitmap *b = must_make(TIB, 64 * KIB);

    (void)state;
    bitmap_set(a, 0, 64 * KIB);
    bitmap_set(a, 100 * GIB, 64 * KIB); /* in what is full in b */
    bitmap_set(b, 64 * KIB, 64 * KIB);
    bitmap_set(b, 64 * GIB, 128 * GIB);
    bitmap_set(b, 700 * GIB, 64 * KIB);
    assert_int_equal(bitmap_merge(a, b), 0);
    must_find(a, 0, 0, 128 * KIB);
    must_find(a, 128 * KIB, 64 * GIB, 128 * GIB);
    must_find(a, 192 * GIB, 700 * GIB, 64 * KIB);
    assert_int_equal(bitmap_count(b), 128 * GIB + 128 * KIB);
    bitmap_check(a);
    bitmap_check(b);
    bitmap_free(a);
    bitmap_free(b);
}

static void test_bitmap__grown_area_is_clean_and_cut_area_forgotten(void **state)
{
    struct bitmap *b = must_make(10 * MIB, 64 * KIB);

    (void)state;
    bitmap_set(b, 0, 10 * MIB);
    bitmap_resize(b, 4 * TIB); /* more levels */
    assert_int_equal(bitmap_size(b), 4 * TIB);
    must_find(b, 0, 0, 10 * MIB);
    must_find(b, 10 * MIB, 0, 0);
    bitmap_check(b);
    bitmap_set(b, 0, 4 * TIB);
    bitmap_resize(b, 5 * MIB + 1);
    must_find(b, 0, 0, 5 * MIB + 1);
    bitmap_check(b);
    bitmap_resize(b, 1 * TIB);
    must_find(b, 0, 0, 5 * MIB + 64 * KIB); /* rounded outward */
    must_find(b, 6 * MIB, 0, 0);
    bitmap_resize(b, 0);
    must_find(b, 0, 0, 0);
    bitmap_set(b, 0, 100);
    bitmap_resize(b, MIB);
    must_find(b, 0, 0, 0);
    bitmap_check(b);
    bitmap_free(b);
}

/* BITMAP-2: with no memory at the k-th allocation, for all k, everything that was set is reported, and put back. */
static void test_bitmap__without_memory_it_reports_more(void **state)
{
    static const uint64_t spots[] = {0, 5 * GIB, 6 * TIB, 7 * TIB + 12345 * 512};
    struct bitmap_stats stats = {.inexact = 1};

    (void)state;
    for (unsigned k = 1; stats.inexact; k++) {
        struct bitmap *b = must_make(8 * TIB, 512);
        struct bitmap *copy = must_make(8 * TIB, 512);
        int r;

        alloc_fail_at(k);
        for (unsigned i = 0; i < ARRAY_SIZE(spots); i++)
            bitmap_set(b, spots[i], 512);
        r = bitmap_merge(copy, b);
        alloc_fail_at(0);
        bitmap_get_stats(b, &stats);
        assert_true(k > 1 || stats.inexact); /* the first one struck */
        if (!stats.inexact) {
            bitmap_get_stats(copy, &stats);
            assert_int_equal(r, stats.inexact ? -ENOMEM : 0);
        }
        for (unsigned i = 0; i < ARRAY_SIZE(spots); i++) {
            uint64_t offset;
            uint64_t len;

            assert_true(bitmap_next_dirty(b, spots[i], spots[i] + 512, &offset, &len));
            assert_true(bitmap_next_dirty(copy, spots[i], spots[i] + 512, &offset, &len));
        }
        bitmap_check(b);
        bitmap_check(copy);
        assert_true(k < 1000);
        bitmap_free(b);
        bitmap_free(copy);
    }
}

static void test_bitmap__a_claim_without_memory_takes_nothing(void **state)
{
    struct bitmap *b = must_make(8 * TIB, 512);
    uint64_t offset;
    uint64_t len;
    uint64_t i = 0;
    int r;

    (void)state;
    bitmap_set(b, 0, 8 * TIB);
    bitmap_clear(b); /* no segment is left */
    bitmap_set(b, 0, 8 * TIB);
    do { /* each takes a few nodes; the first segment has 16 */
        uint64_t before = bitmap_count(b);

        alloc_fail_at(1);
        r = bitmap_claim(b, i++ * 300 * GIB, MIB, &offset, &len);
        alloc_fail_at(0);
        bitmap_check(b);
        assert_int_equal(bitmap_count(b), r == 1 ? before - MIB : before);
    } while (r == 1);
    assert_int_equal(r, -ENOMEM);
    assert_true(i > 1);
    i--;
    must_claim(b, i * 300 * GIB, MIB, i * 300 * GIB, MIB);
    bitmap_check(b);
    bitmap_free(b);
}

/* Twice: from what is full without a node, and from a tree that has filled the first segment of nodes. */
static void test_bitmap__resizing_never_fails(void **state)
{
    unsigned calls;

    (void)state;
    for (unsigned k = 1; k == 1 || calls >= k - 1; k++) {
        for (unsigned nodes = 0; nodes < 2; nodes++) {
            struct bitmap *b = must_make(nodes ? 16 * GIB : 16 * MIB, 4096);
            uint64_t offset;
            uint64_t len;

            if (!nodes)
                bitmap_set(b, 0, 16 * MIB);
            for (uint64_t i = 0; nodes && i < 13; i++)
                bitmap_set(b, i * 16 * MIB + 5 * MIB, 4096);
            alloc_fail_at(k);
            bitmap_resize(b, 8 * TIB);
            bitmap_set(b, 7 * TIB, 4096);
            bitmap_resize(b, 64 * TIB);
            bitmap_resize(b, 7 * TIB + 8192);
            bitmap_resize(b, 9 * TIB);
            calls = alloc_fail_at(0);
            assert_true(calls > 0);
            assert_true(bitmap_next_dirty(b, 5 * MIB, 5 * MIB + 1, &offset, &len));
            assert_true(bitmap_next_dirty(b, 7 * TIB, 7 * TIB + 1, &offset, &len));
            bitmap_check(b);
            bitmap_free(b);
        }
    }
}

/* Also for a size that ends within a byte, and over what is there already. */
static void test_bitmap__what_was_read_can_be_written(void **state)
{
    (void)state;
    TEST_SEEDS (seed) {
        struct prng prng = {.state = seed};
        uint64_t size = 1 + prng_below(&prng, (uint64_t)100 << 20);
        struct bitmap *from = bitmap_new(size, 512);
        struct bitmap *to = bitmap_new(size, 512);
        size_t bytes = (size_t)((size + 4095) / 4096) + 100;
        uint8_t *bits = xalloc(1, bytes);
        uint64_t offset;
        uint64_t len = 0;

        for (unsigned i = 0; i < 30; i++)
            bitmap_set(from, prng_below(&prng, size), prng_below(&prng, size / 10 + 1));
        bitmap_read(from, 0, bits, bytes);
        memset(bits + bytes - 100, 0xff, 100); /* beyond the size: left out */
        for (size_t at = 0; at < bytes; at += 4096)
            bitmap_write(to, at * 8, bits + at, MIN(bytes - at, (size_t)4096));
        bitmap_check(to);
        assert_int_equal(bitmap_count(to), bitmap_count(from));
        for (offset = 0; bitmap_next_dirty(from, offset + len, size, &offset, &len);) {
            uint64_t seen;
            uint64_t seen_len;

            assert_true(bitmap_next_dirty(to, offset, size, &seen, &seen_len));
            assert_int_equal(seen, offset);
            assert_int_equal(seen_len, len);
        }
        free(bits);
        bitmap_free(from);
        bitmap_free(to);
    }
}
