/* SPDX-License-Identifier: Apache-2.0 */
/* Numbers and sizes from text. */
#include "base/number.h"

#include "base/macros.h"

#include <errno.h>

static void assert_size(const char *text, int status, uint64_t expected)
{
    uint64_t bytes = 0;
    int r = size_from_text(text, &bytes);

    if (r != status || (r == 0 && bytes != expected))
        fail_msg("'%s': %d, %llu", text, r, (unsigned long long)bytes);
}

static void test_number__reads_whole_texts_only(void **state)
{
    static const char *const bad[] = {"", " 1", "1 ", "+1", "-1", "0x", "1x", "0xg", "x", "1.0"};
    uint64_t v;

    (void)state;
    for (size_t i = 0; i < ARRAY_SIZE(bad); i++)
        assert_int_equal(number_from_text(bad[i], &v), -EINVAL);
    assert_int_equal(number_from_text("18446744073709551615", &v), 0);
    assert_true(v == UINT64_MAX);
    assert_int_equal(number_from_text("0xffffffffffffffff", &v), 0);
    assert_true(v == UINT64_MAX);
    assert_int_equal(number_from_text("010", &v), 0);
    assert_int_equal(v, 10);
    assert_int_equal(number_from_text("18446744073709551616", &v), -ERANGE);
    assert_int_equal(number_from_text("0x10000000000000000", &v), -ERANGE);
}

static void test_number__signed_range_is_exact(void **state)
{
    int64_t v;

    (void)state;
    assert_int_equal(number_from_text_signed("-9223372036854775808", &v), 0);
    assert_true(v == INT64_MIN);
    assert_int_equal(number_from_text_signed("9223372036854775807", &v), 0);
    assert_true(v == INT64_MAX);
    assert_int_equal(number_from_text_signed("-9223372036854775809", &v), -ERANGE);
    assert_int_equal(number_from_text_signed("9223372036854775808", &v), -ERANGE);
    assert_int_equal(number_from_text_signed("--1", &v), -EINVAL);
    assert_int_equal(number_from_text_signed("-", &v), -EINVAL);
}

static void test_number__sizes_take_suffixes_and_fractions(void **state)
{
    (void)state;
    assert_size("0", 0, 0);
    assert_size("512", 0, 512);
    assert_size("512b", 0, 512);
    assert_size("0x200", 0, 512);
    assert_size("1k", 0, KIB);
    assert_size("1K", 0, KIB);
    assert_size("64M", 0, 64 * MIB);
    assert_size("10G", 0, 10 * GIB);
    assert_size("3t", 0, 3 * TIB);
    assert_size("1P", 0, 1024 * TIB);
    assert_size("15E", 0, (uint64_t)15 << 60);
    assert_size("1.5G", 0, 3 * GIB / 2);
    assert_size("0.5k", 0, 512);
    assert_size("1.0009765625M", 0, MIB + KIB);
    assert_size("0.0000000000000000000001E", 0, 0);
    assert_size("15.999999999999999999E", 0, UINT64_MAX - 1);
}

static void test_number__sizes_refuse_the_rest(void **state)
{
    static const char *const bad[] = {"",     "k",   "1kk", "1 k", "-1k",  "1.5",
                                      "1.5b", "1.k", ".5k", "1e3", "0x1k", "1.5.5k"};

    (void)state;
    for (size_t i = 0; i < ARRAY_SIZE(bad); i++)
        assert_size(bad[i], -EINVAL, 0);
    assert_size("16E", -ERANGE, 0);
    assert_size("18446744073709551616", -ERANGE, 0);
    assert_size("18446744073709551615k", -ERANGE, 0);
}
