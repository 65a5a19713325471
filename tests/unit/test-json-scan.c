/* SPDX-License-Identifier: Apache-2.0 */
/* The scanner: where values end, however the bytes arrive; limits; how it finds its feet again. */
#include "control/json-scan.h"

#include "base/alloc.h"
#include "base/prng.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Values found, each followed by '|', and errors as '!'. Fed in pieces of at most `piece` bytes. */
static char *scan(const char *text, size_t len, size_t piece)
{
    struct json_scan s = {0};
    char *found = calloc(1, 2 * len + 2);
    size_t value = 0; /* where the value that is being received begins in found */
    size_t end = 0;
    size_t pos = 0;

    while (pos < len) {
        size_t n = len - pos < piece ? len - pos : piece;
        size_t consumed;
        size_t start;
        size_t part;
        const char *error = NULL;
        enum json_scan_result r =
            json_scan_feed(&s, text + pos, n, &consumed, &start, &part, &error);

        assert_true(consumed <= n && start + part == consumed);
        assert_true(consumed > 0 || r == JSON_SCAN_VALUE);
        if (r == JSON_SCAN_ERROR) {
            assert_non_null(error);
            end = value;
            found[end++] = '!';
            value = end;
        } else {
            memcpy(found + end, text + pos + start, part);
            end += part;
        }
        if (r == JSON_SCAN_VALUE) {
            found[end++] = '|';
            value = end;
        }
        pos += consumed;
    }
    found[value] = '\0'; /* what is not complete does not count */
    return found;
}

static void assert_scan(const char *text, const char *expected)
{
    for (size_t piece = 1; piece <= strlen(text); piece++) {
        AUTO(free_ptr) char *found = scan(text, strlen(text), piece);

        assert_string_equal(found, expected);
    }
}

static void test_json_scan__finds_values_without_framing(void **state)
{
    (void)state;
    assert_scan("{}", "{}|");
    assert_scan("{\"a\":[1,{}]}{}\r\n [] ", "{\"a\":[1,{}]}|{}|[]|");
    assert_scan("{\"}\":\"]\\\"}\"} x", "{\"}\":\"]\\\"}\"}|");
    assert_scan("{'}':'\\'}\"'}", "{'}':'\\'}\"'}|");
    assert_scan("{\n  \"a\": 1\n}\n", "{\n  \"a\": 1\n}|");
}

static void test_json_scan__scalars_at_the_top_are_values(void **state)
{
    (void)state;
    assert_scan("1 true,", "1|true|!");
    assert_scan("\"a\\\\\"'b' 12{}", "\"a\\\\\"|'b'|12|{}|");
    assert_scan("12", ""); /* more digits may come */
}

static void test_json_scan__an_error_is_told_once(void **state)
{
    (void)state;
    assert_scan("@@@ @\n{}", "!{}|");
    assert_scan("}]}\n{}", "!{}|");
    assert_scan("{\"a\": ]}\n{}", "!{}|");
    assert_scan("[1, 2}{\"b\":1}", "!{\"b\":1}|");
    assert_scan("{\"a\": \"x\n{}", "!{}|");
    assert_scan("{\"a\": \"x\x01 rest of it\n{}", "!{}|");
    assert_scan(":{}", "!{}|");
}

static void test_json_scan__resynchronises_at_0xff(void **state)
{
    (void)state;
    assert_scan("{\"a\": [\xff{}", "!{}|");
    assert_scan("\"never closed \xff{}", "!{}|");
    assert_scan("\xff\xff{}", "!!{}|");
    assert_scan("12\xff{}", "!{}|");
    assert_scan("@ \xff{}", "!!{}|");
}

/* Feeds a value of the given middle and says what came: nothing but one error, and a good value behind it. */
static void assert_limit(size_t count, const char *unit, const char *close, const char *message)
{
    struct json_scan s = {0};
    const char *error = NULL;
    const char *told = NULL;
    char *text = malloc(count * strlen(unit) + count * strlen(close) + 16);
    char *p = text;
    size_t pos = 0;
    unsigned errors = 0;
    unsigned values = 0;
    size_t len;

    for (size_t i = 0; i < count; i++)
        p = stpcpy(p, unit);
    for (size_t i = 0; i < (close[0] == ']' ? count : 1); i++)
        p = stpcpy(p, close);
    p = stpcpy(p, "{}");
    len = (size_t)(p - text);
    while (pos < len) {
        size_t consumed;
        size_t start;
        size_t part;

        switch (json_scan_feed(&s, text + pos, len - pos, &consumed, &start, &part, &error)) {
        case JSON_SCAN_VALUE:
            values++;
            break;
        case JSON_SCAN_ERROR:
            errors++;
            told = error;
            break;
        case JSON_SCAN_MORE:
            break;
        }
        pos += consumed;
    }
    free(text);
    assert_int_equal(errors, message ? 1 : 0);
    assert_int_equal(values, message ? 1 : 2);
    if (message)
        assert_string_equal(told, message);
}

static void test_json_scan__bounds_depth(void **state)
{
    (void)state;
    assert_limit(1024, "[", "]", NULL);
    assert_limit(1025, "[", "]", "JSON is nested more than 1024 deep");
    assert_limit(100000, "[", "]", "JSON is nested more than 1024 deep");
}

/* A value that begins with one bracket and has n more tokens. */
static void feed_tokens(size_t n, const char *expected)
{
    struct json_scan s = {0};
    char *text = malloc(n + 4);
    const char *error = NULL;
    size_t consumed;
    size_t start;
    size_t part;

    memset(text, ',', n + 1);
    text[0] = '[';
    memcpy(text + n + 1, "]{}", 3);
    if (!expected) {
        assert_int_equal(json_scan_feed(&s, text, n + 4, &consumed, &start, &part, &error),
                         JSON_SCAN_VALUE);
        assert_int_equal(part, n + 2);
    } else {
        size_t pos;

        assert_int_equal(json_scan_feed(&s, text, n + 4, &consumed, &start, &part, &error),
                         JSON_SCAN_ERROR);
        assert_string_equal(error, expected);
        pos = consumed;
        assert_int_equal(
            json_scan_feed(&s, text + pos, n + 4 - pos, &consumed, &start, &part, &error),
            JSON_SCAN_VALUE);
        assert_memory_equal(text + pos + start, "{}",
                            2); /* the rest of the long one is passed over */
    }
    free(text);
}

static void test_json_scan__bounds_tokens(void **state)
{
    (void)state;
    feed_tokens(JSON_SCAN_MAX_TOKENS - 2, NULL);
    feed_tokens(JSON_SCAN_MAX_TOKENS + 50, "JSON value has more than 2097152 tokens");
}

static void test_json_scan__bounds_bytes(void **state)
{
    size_t len = JSON_SCAN_MAX_BYTES + 100;
    char *text = malloc(len);
    struct json_scan s = {0};
    const char *error = NULL;
    size_t consumed;
    size_t start;
    size_t part;
    size_t pos;

    (void)state;
    memset(text, '{', len);
    text[0] = '"';
    memcpy(text + len - 4, "\\\"\"7", 4);
    assert_int_equal(json_scan_feed(&s, text, len, &consumed, &start, &part, &error),
                     JSON_SCAN_ERROR);
    assert_string_equal(error, "JSON value has more than 64 MiB");
    assert_true(consumed <= JSON_SCAN_MAX_BYTES + 1);
    pos = consumed;
    assert_int_equal(json_scan_feed(&s, text + pos, len - pos, &consumed, &start, &part, &error),
                     JSON_SCAN_MORE);
    assert_int_equal(consumed, len - pos);
    assert_int_equal(part, 1); /* the 7 behind the string's end */
    free(text);
}

/* A long value's brackets within strings do not count, nor does what ends the string. */
static void test_json_scan__passes_over_the_rest_of_a_long_value(void **state)
{
    char text[1025 + 64] = "";
    const char *tail = "'}]\\'}' \"\\\"]\" 1, true";
    AUTO(free_ptr) char *found = NULL;
    char *p;

    (void)state;
    memset(text, '[', 1025);
    p = stpcpy(text + 1025, tail);
    found = scan(text, (size_t)(p - text), 3);
    assert_string_equal(found, "!"); /* still within it */
}

/* However random bytes are cut, the same is found. */
static void test_json_scan__pieces_do_not_matter(void **state)
{
    static const char alphabet[] = "{}[]{}[]\"'\\,: \n\x01\xff"
                                   "1a";

    (void)state;
    TEST_SEEDS (seed) {
        struct prng prng = {.state = seed};

        for (int round = 0; round < 50; round++) {
            char text[64];
            size_t len = 1 + prng_below(&prng, sizeof(text) - 1);
            AUTO(free_ptr) char *whole = NULL;
            AUTO(free_ptr) char *parts = NULL;

            for (size_t i = 0; i < len; i++)
                text[i] = alphabet[prng_below(&prng, sizeof(alphabet) - 1)];
            whole = scan(text, len, len);
            parts = scan(text, len, 1 + prng_below(&prng, 5));
            assert_string_equal(whole, parts);
        }
    }
}
