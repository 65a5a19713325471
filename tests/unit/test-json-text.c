/* SPDX-License-Identifier: Apache-2.0 */
/* JSON text: the extensions, integers of any length, and hostile input. */
#include "base/json-text.h"

#include "base/alloc.h"
#include "base/macros.h"
#include "base/prng.h"

#include <errno.h>
#include <stdlib.h>

static void assert_through(const char *in, const char *expected)
{
    AUTO(error_free) struct error *err = NULL;
    AUTO(free_ptr) char *out = NULL;
    json_t *tree;

    if (json_text_load(in, strlen(in), &tree, &err) < 0)
        fail_msg("%s: %s", in, error_text(err));
    out = json_text_dump(tree, false);
    json_decref(tree);
    assert_string_equal(out, expected);
}

static void assert_refused(const char *in, size_t len, const char *expected)
{
    AUTO(error_free) struct error *err = NULL;
    json_t *tree;

    assert_int_equal(json_text_load(in, len, &tree, &err), -EINVAL);
    if (strncmp(error_text(err), expected, strlen(expected)) != 0)
        fail_msg("'%s' does not begin with '%s'", error_text(err), expected);
}

#define REFUSED(in, expected) assert_refused(in, strlen(in), expected)

static void test_json_text__takes_single_quotes(void **state)
{
    (void)state;
    assert_through("{'a': 'b'}", "{\"a\": \"b\"}");
    assert_through("'it\\'s \"x\" \\\\ \\n'", "\"it's \\\"x\\\" \\\\ \\n\"");
    assert_through("\"it\\'s\"", "\"it's\"");
    assert_through("{'a': \"it's\"}", "{\"a\": \"it's\"}");
}

static void test_json_text__keeps_integers_of_any_length(void **state)
{
    static const char *const literals[] = {
        "9223372036854775807",
        "9223372036854775808",
        "18446744073709551615",
        "18446744073709551616",
        "-9223372036854775808",
        "-9223372036854775809",
        "123456789012345678901234567890123456789012345678901234567890",
    };

    (void)state;
    for (size_t i = 0; i < ARRAY_SIZE(literals); i++) {
        AUTO(free_ptr) char *nested = xasprintf("[{\"a\": %s}, %s]", literals[i], literals[i]);

        assert_through(literals[i], literals[i]);
        assert_through(nested, nested);
    }
}

static void test_json_text__nobody_forges_a_big_integer(void **state)
{
    (void)state;
    REFUSED("[\"\\u000018446744073709551615\"]",
            "JSON parse error at byte 2: \\u0000 is not allowed in a string");
    REFUSED("['a\\u0000']", "JSON parse error at byte 3: \\u0000 is not allowed in a string");
    assert_refused("[\"\0005\"]", 6, "JSON parse error at byte");
    /* A backslash that is escaped makes no NUL. */
    assert_through("\"\\\\u00005\"", "\"\\\\u00005\"");
    /* A literal that is not well-formed is not rescued by being long. */
    REFUSED("00000000000000000000000000001", "JSON parse error at byte");
    REFUSED("[-00000000000000000000000001]", "JSON parse error at byte");
    REFUSED("{99999999999999999999: 1}", "JSON parse error at byte");
    REFUSED("99999999999999999999x", "JSON parse error at byte");
}

static void test_json_text__says_where_the_mistake_is(void **state)
{
    (void)state;
    REFUSED("{\"a\": 1,}", "JSON parse error at byte 9: string or '}' expected near '}'");
    /* Behind what was rewritten, the place is still one in the input. */
    REFUSED("{'a': 18446744073709551615, 'b': ?}",
            "JSON parse error at byte 34: invalid token near '?'");
    REFUSED("", "JSON parse error at byte 0");
    REFUSED("{} {}", "JSON parse error at byte");
    REFUSED("[1e999]", "JSON parse error at byte 6: real number overflow near '1e999'");
    REFUSED("{\"a\": 1, \"a\": 2}",
            "JSON parse error at byte 12: duplicate object key near '\"a\"'");
    REFUSED("\"\xff\"", "JSON parse error at byte");
    REFUSED("\"\\ud800\"", "JSON parse error at byte");
    REFUSED("'unterminated", "JSON parse error at byte");
    REFUSED("'\\", "JSON parse error at byte");
    REFUSED("\"a\nb\"", "JSON parse error at byte");
}

static void test_json_text__errors_are_one_line(void **state)
{
    AUTO(error_free) struct error *err = NULL;
    json_t *tree;

    (void)state;
    assert_int_equal(json_text_load("[\n\n\x01]", 5, &tree, &err), -EINVAL);
    assert_null(strpbrk(error_text(err), "\n\r\x01"));
}

static void test_json_text__unsigned_values_go_out_whole(void **state)
{
    static const uint64_t values[] = {0, INT64_MAX, (uint64_t)INT64_MAX + 1, UINT64_MAX};

    (void)state;
    for (size_t i = 0; i < ARRAY_SIZE(values); i++) {
        json_t *v = json_from_uint(values[i]);
        AUTO(free_ptr) char *text = json_text_dump(v, false);

        assert_true(strtoull(text, NULL, 10) == values[i]);
        json_decref(v);
    }
}

static void test_json_text__pretty_text_holds_big_integers_too(void **state)
{
    AUTO(error_free) struct error *err = NULL;
    AUTO(free_ptr) char *text = NULL;
    json_t *tree;

    (void)state;
    assert_int_equal(json_text_load("[18446744073709551615, 1]", 25, &tree, &err), 0);
    text = json_text_dump(tree, true);
    assert_string_equal(text, "[\n    18446744073709551615,\n    1\n]");
    json_decref(tree);
}

static void test_json_text__mends_text_that_is_not_utf_8(void **state)
{
    static const char *const cases[][2] = {
        {"plain", "plain"},
        {"\xc3\xa4", "\xc3\xa4"},
        {"a\xff", "a\xef\xbf\xbd"},
        {"\xc0\x80z", "\xef\xbf\xbd\xef\xbf\xbdz"},               /* overlong */
        {"\xed\xa0\x80", "\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd"}, /* surrogate */
        {"\xf4\x90\x80\x80", "\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd"},
        {"x\xe2\x82", "x\xef\xbf\xbd\xef\xbf\xbd"}, /* cut */
        {"\xf0\x9f\x98\x80\x80", "\xf0\x9f\x98\x80\xef\xbf\xbd"},
    };

    (void)state;
    for (size_t i = 0; i < ARRAY_SIZE(cases); i++) {
        json_t *v = json_string_lossy(cases[i][0]);

        assert_non_null(v);
        assert_string_equal(json_string_value(v), cases[i][1]);
        json_decref(v);
    }
}

/* Random bytes from an alphabet of what matters: never a crash, and what loads goes through unchanged the second time. */
static void test_json_text__random_text_is_stable(void **state)
{
    static const char alphabet[] =
        "{}[]:,\"'\\u0000189223372036854775808-+.eEtrufalsn \n\x01\xc3\xa4\xff";

    (void)state;
    TEST_SEEDS (seed) {
        struct prng prng = {.state = seed};

        for (int round = 0; round < 200; round++) {
            AUTO(error_free) struct error *err = NULL;
            char text[48];
            size_t len = prng_below(&prng, sizeof(text));
            json_t *tree;

            for (size_t i = 0; i < len; i++)
                text[i] = alphabet[prng_below(&prng, sizeof(alphabet) - 1)];
            if (json_text_load(text, len, &tree, &err) == 0) {
                AUTO(free_ptr) char *out = json_text_dump(tree, false);

                json_decref(tree);
                assert_through(out, out);
            }
        }
    }
}
