/* SPDX-License-Identifier: Apache-2.0 */
/* json-in, json-out and schema_free on the sample schema: every rule with the message that its breach gets. */
#include "schema-golden/sample-types.c"

#include "base/alloc.h"
#include "base/json-in.h"
#include "base/json-out.h"
#include "base/json-text.h"

#include <errno.h>
#include <stdlib.h>

/* Lets alloc_fail_at() reach the allocations of the JSON library. */
static void *allocate_for_jansson(size_t size)
{
    return try_alloc(1, size);
}

static json_t *load(const char *text)
{
    AUTO(error_free) struct error *err = NULL;
    json_t *tree;

    if (json_text_load(text, strlen(text), &tree, &err) < 0)
        fail_msg("%s: %s", text, error_text(err));
    return tree;
}

static int parse(const struct schema_type *type, const char *text, void *ret, struct error **err)
{
    json_t *tree = load(text);
    int r = json_in(type, tree, JSON_IN_STRICT, "arguments", ret, err);

    json_decref(tree);
    return r;
}

/* Parses text that is right, writes it out again, and frees it. The caller frees the result. */
static char *there_and_back(const struct schema_type *type, const char *text)
{
    AUTO(error_free) struct error *err = NULL;
    void *value = calloc(1, type->size);
    json_t *tree;
    char *out;

    if (parse(type, text, value, &err) < 0)
        fail_msg("%s: %s", text, error_text(err));
    tree = json_out(type, value);
    assert_non_null(tree);
    out = json_text_dump(tree, false);
    json_decref(tree);
    schema_free(type, value);
    free(value);
    return out;
}

static void assert_same(const struct schema_type *type, const char *text, const char *expected)
{
    AUTO(free_ptr) char *out = there_and_back(type, text);

    assert_string_equal(out, expected);
}

static void assert_refused(const struct schema_type *type, const char *text, const char *expected)
{
    AUTO(error_free) struct error *err = NULL;
    AUTO(free_ptr) unsigned char *value = malloc(type->size);

    memset(value, 0xaa, type->size);
    assert_true(parse(type, text, value, &err) < 0);
    assert_string_equal(error_text(err), expected);
    for (size_t i = 0; i < type->size; i++)
        assert_int_equal(value[i], 0); /* all or nothing */
}

#define FLAT "\"name\": \"a\", \"weight\": 5, \"faces\": []"

static void test_json_in__fills_a_union_with_defaults(void **state)
{
    AUTO(error_free) struct error *err = NULL;
    AUTO(stone_release) struct stone s;

    (void)state;
    assert_int_equal(parse(&stone_type, "{" FLAT "}", &s, &err), 0);
    assert_string_equal(s.name, "a");
    assert_int_equal(s.shape, SHAPE_FLAT);
    assert_int_equal(s.weight, 5);
    assert_int_equal(s.colour, COLOUR_DARK_GREY);
    assert_false(s.has_heavy);
    assert_int_equal(s.place.x, -3);
    assert_int_equal(s.place.y, 0);
    assert_null(s.last_place);
    assert_null(s.on);
    assert_int_equal(s.tags.count, 0);
    assert_null(s.u.flat.label);
}

static void test_json_in__fills_everything(void **state)
{
    const char *text =
        "{\"name\": \"b\", \"shape\": \"flat\", \"weight\": 7, \"colour\": \"red\", \"heavy\": true, "
        "\"place\": {\"x\": 10, \"y\": -5}, \"last-place\": {\"x\": -10, \"y\": 0}, "
        "\"on\": {\"name\": \"c\", \"shape\": \"round\", \"weight\": 18446744073709551615, "
        "\"colour\": \"dark-grey\", \"place\": {\"x\": -3, \"y\": 0}, \"on\": null, \"tags\": [], "
        "\"radius\": 65535}, \"tags\": [\"x\", \"y\"], \"label\": \"l\", \"faces\": [\"red\"]}";

    (void)state;
    assert_same(&stone_type, text, text);
}

static void test_json_in__takes_variants_by_the_tag(void **state)
{
    (void)state;
    assert_refused(&stone_type, "{\"shape\": \"round\", " FLAT "}",
                   "arguments.faces: unknown member (shape is 'round')");
    assert_refused(&stone_type, "{\"shape\": \"round\", \"name\": \"a\", \"weight\": 5}",
                   "arguments.radius: missing, but mandatory");
    assert_refused(&stone_type, "{\"shape\": \"unix\", " FLAT "}",
                   "arguments.faces: unknown member (shape is 'unix')");
    assert_refused(&stone_type, "{\"shape\": \"oval\", " FLAT "}",
                   "arguments.shape: 'oval' is not one of: round, flat, unix");
    assert_refused(&node_type, "{\"order\": \"up\"}", "arguments.driver: missing, but mandatory");
    assert_same(&node_type, "{\"driver\": \"heap\", \"file\": \"x\"}",
                "{\"driver\": \"heap\", \"file\": \"x\", \"order\": \"up\"}");
}

static void test_json_in__names_unknown_and_missing_members(void **state)
{
    (void)state;
    assert_refused(&stone_type, "{" FLAT ", \"wieght\": 1}",
                   "arguments.wieght: unknown member (shape is 'flat')");
    assert_refused(&place_type, "{\"z\": 1}", "arguments.z: unknown member");
    assert_refused(&place_type, "{\"a\\nb\": 1}", "arguments.a?b: unknown member");
    assert_refused(&stone_type, "{\"weight\": 5, \"faces\": []}",
                   "arguments.name: missing, but mandatory");
    assert_refused(&stone_type, "{" FLAT ", \"place\": {\"x\": 1, \"w\": 2}}",
                   "arguments.place.w: unknown member");
    assert_refused(&stone_type, "{" FLAT ", \"smell\": 1}",
                   "arguments.smell: not accepted: stones do not smell");
    assert_refused(&node_type, "{\"driver\": \"pile\", \"file\": \"x\", \"aio\": \"native\"}",
                   "arguments.aio: not accepted: piles do no I/O");
    assert_refused(&stone_type, "{" FLAT ", \"colour\": \"pink\"}",
                   "arguments.colour: 'pink' is not accepted: stones are not pink");
}

static void test_json_in__names_the_type_of_each_member(void **state)
{
    (void)state;
    assert_refused(&stone_type, "[]", "arguments: expects an object, not an array");
    assert_refused(&stone_type, "{\"name\": 1, \"weight\": 5, \"faces\": []}",
                   "arguments.name: expects a string, not an integer");
    assert_refused(&stone_type, "{\"name\": 18446744073709551615, \"weight\": 5, \"faces\": []}",
                   "arguments.name: expects a string, not an integer");
    assert_refused(&stone_type, "{\"name\": \"a\", \"weight\": \"5\", \"faces\": []}",
                   "arguments.weight: expects an integer, not a string");
    assert_refused(&stone_type, "{\"name\": \"a\", \"weight\": 5.0, \"faces\": []}",
                   "arguments.weight: expects an integer, not a number");
    assert_refused(&stone_type, "{\"name\": \"a\", \"weight\": null, \"faces\": []}",
                   "arguments.weight: expects an integer, not null");
    assert_refused(&stone_type, "{\"name\": \"a\", \"weight\": 5, \"faces\": {}}",
                   "arguments.faces: expects an array, not an object");
    assert_refused(&stone_type, "{\"name\": \"a\", \"weight\": 5, \"faces\": [\"red\", 2]}",
                   "arguments.faces[1]: expects a string, not an integer");
    assert_refused(&stone_type, "{" FLAT ", \"heavy\": \"on\"}",
                   "arguments.heavy: expects a boolean, not a string");
    assert_refused(&stone_type, "{" FLAT ", \"heavy\": 1}",
                   "arguments.heavy: expects a boolean, not an integer");
    assert_refused(&stone_type, "{" FLAT ", \"place\": true}",
                   "arguments.place: expects an object, not a boolean");
    assert_refused(
        &stone_type, "{" FLAT ", \"on\": true}",
        "arguments.on: expects a string or an object or null or an integer, not a boolean");
    assert_refused(&place_type, "{\"x\": \"1\"}", "arguments.x: expects an integer, not a string");
    assert_refused(&report_type, "{\"stones\": [], \"total\": 1, \"mean\": \"1\"}",
                   "arguments.mean: expects a number, not a string");
}

static void test_json_in__keeps_integers_in_their_range(void **state)
{
    (void)state;
    assert_refused(&stone_weigh_args_type, "{\"name\": \"a\", \"times\": 4}",
                   "arguments.times: 4 is more than 3 (times)");
    assert_refused(&stone_weigh_args_type, "{\"name\": \"a\", \"times\": -1}",
                   "arguments.times: -1 is less than 0 (times)");
    assert_refused(&stone_weigh_args_type, "{\"name\": \"a\", \"times\": 18446744073709551616}",
                   "arguments.times: 18446744073709551616 is more than 3 (times)");
    assert_refused(&stone_weigh_args_type, "{\"name\": \"a\", \"times\": -9223372036854775809}",
                   "arguments.times: -9223372036854775809 is less than 0 (times)");
    assert_refused(&stone_type, "{\"name\": \"a\", \"weight\": 0, \"faces\": []}",
                   "arguments.weight: 0 is less than 1");
    assert_refused(&place_type, "{\"x\": 11}", "arguments.x: 11 is more than 10 (m)");
    assert_refused(&place_type, "{\"x\": -11}", "arguments.x: -11 is less than -10 (m)");
    assert_refused(&place_type, "{\"y\": 9223372036854775808}",
                   "arguments.y: 9223372036854775808 is more than 9223372036854775807");
    assert_refused(&place_type, "{\"y\": -9223372036854775809}",
                   "arguments.y: -9223372036854775809 is less than -9223372036854775808");
    assert_same(&place_type, "{\"y\": -9223372036854775808}",
                "{\"x\": -3, \"y\": -9223372036854775808}");
    assert_same(&place_type, "{\"y\": 9223372036854775807}",
                "{\"x\": -3, \"y\": 9223372036854775807}");
}

static void test_json_in__takes_unsigned_integers_of_all_64_bits(void **state)
{
    static const char *const edges[] = {"0", "9223372036854775807", "9223372036854775808",
                                        "18446744073709551615"};

    (void)state;
    for (size_t i = 0; i < ARRAY_SIZE(edges); i++) {
        AUTO(error_free) struct error *err = NULL;
        AUTO(free_ptr) char *text = xasprintf("{\"stones\": [], \"total\": %s}", edges[i]);
        AUTO(report_release) struct report report;

        assert_int_equal(parse(&report_type, text, &report, &err), 0);
        assert_true(report.total == strtoull(edges[i], NULL, 10));
        assert_same(&report_type, text, text);
    }
    assert_refused(&report_type, "{\"stones\": [], \"total\": 18446744073709551616}",
                   "arguments.total: 18446744073709551616 is more than 18446744073709551615");
}

static void test_json_in__cuts_what_it_quotes(void **state)
{
    char digits[301];
    AUTO(free_ptr) char *text = NULL;
    AUTO(free_ptr) char *expected = NULL;

    (void)state;
    memset(digits, '7', 300);
    digits[300] = '\0';
    text = xasprintf("{\"stones\": [], \"total\": %s}", digits);
    expected = xasprintf("arguments.total: %.64s... is more than 18446744073709551615", digits);
    assert_refused(&report_type, text, expected);
}

static void test_json_in__bounds_strings_and_arrays(void **state)
{
    (void)state;
    assert_refused(&stone_type, "{\"name\": \"\", \"weight\": 5, \"faces\": []}",
                   "arguments.name: '' has 0 bytes, less than 1");
    assert_refused(&stone_type, "{\"name\": \"abcdefghi\", \"weight\": 5, \"faces\": []}",
                   "arguments.name: 'abcdefghi' has 9 bytes, more than 8");
    assert_refused(
        &stone_type, "{\"name\": \"1a\", \"weight\": 5, \"faces\": []}",
        "arguments.name: '1a' is not well-formed: a letter, then letters, digits, '-', '.', '_'");
    assert_refused(
        &stone_type, "{\"name\": \"a b\", \"weight\": 5, \"faces\": []}",
        "arguments.name: 'a b' is not well-formed: a letter, then letters, digits, '-', '.', '_'");
    assert_refused(&stone_type, "{" FLAT ", \"tags\": [\"1\", \"2\", \"3\", \"4\"]}",
                   "arguments.tags: has 4 elements, more than 3");
    assert_same(&stone_weigh_args_type, "{\"name\": \"a\\u00e4\\ud83d\\ude00\"}",
                "{\"name\": \"a\\u00E4\\uD83D\\uDE00\", \"times\": 1}");
}

static void test_json_in__chooses_alternates_by_json_type(void **state)
{
    (void)state;
    assert_same(&stone_ref_type, "\"x\"", "\"x\"");
    assert_same(&stone_ref_type, "null", "null");
    assert_same(&stone_ref_type, "18446744073709551615", "18446744073709551615");
    assert_refused(&stone_ref_type, "{\"name\": \"a\"}",
                   "arguments.weight: missing, but mandatory");
    assert_refused(&stone_ref_type, "[]",
                   "arguments: expects a string or an object or null or an integer, not an array");
}

static void test_json_in__keeps_any_value_as_it_came(void **state)
{
    const char *text =
        "{\"stones\": [], \"total\": 0, \"mean\": 0.5, \"note\": [{\"a\": [null, -18446744073709551616]}], "
        "\"limit\": -1}";

    (void)state;
    assert_same(&report_type, text, text);
}

/* n stones, each on the next. */
static char *tower(unsigned n)
{
    char *text = xstrdup("null");

    for (unsigned i = 0; i < n; i++) {
        char *longer = xasprintf("{" FLAT ", \"on\": %s}", text);

        free(text);
        text = longer;
    }
    return text;
}

static void test_json_in__bounds_nesting(void **state)
{
    AUTO(free_ptr) char *high = tower(63);
    AUTO(free_ptr) char *too_high = tower(65);
    AUTO(free_ptr) char *back = there_and_back(&stone_type, high);
    AUTO(error_free) struct error *err = NULL;
    struct stone s;

    (void)state;
    assert_non_null(strstr(back, "\"on\": null"));
    assert_int_equal(parse(&stone_type, too_high, &s, &err), -ELOOP);
    assert_non_null(strstr(error_text(err), ".on.on.place: nested more than 64 deep"));
}

/* D4's way: fail each allocation in turn; nothing leaks (the sanitizers look), and the last run succeeds. */
static void test_json_in__survives_each_failed_allocation(void **state)
{
    const char *text = "{\"name\": \"b\", \"weight\": 7, \"last-place\": {}, \"on\": {" FLAT
                       "}, \"tags\": [\"x\", \"y\"], "
                       "\"label\": \"l\", \"faces\": [\"red\"]}";
    unsigned failures = 0;

    (void)state;
    for (unsigned k = 1;; k++) {
        AUTO(error_free) struct error *err = NULL;
        json_t *tree = load(text);
        struct stone s;
        int r;

        (void)alloc_fail_at(k);
        r = json_in(&stone_type, tree, JSON_IN_STRICT, "arguments", &s, &err);
        (void)alloc_fail_at(0);
        json_decref(tree);
        if (r == 0) {
            stone_release(&s);
            break;
        }
        assert_int_equal(r, -ENOMEM);
        assert_non_null(strstr(error_text(err), "not enough memory"));
        failures++;
    }
    assert_true(failures >= 8);
}

static void test_json_in__fills_string_defaults_and_all_alternates(void **state)
{
    (void)state;
    assert_same(&label_type, "{}", "{\"title\": \"none\"}");
    assert_same(&label_type, "{\"amount\": 18446744073709551615, \"scale\": 2}",
                "{\"title\": \"none\", \"amount\": 1.8446744073709552e19, \"scale\": 2.0}");
    assert_same(&label_type, "{\"title\": \"\", \"amount\": false}",
                "{\"title\": \"\", \"amount\": false}");
    assert_same(&label_type, "{\"title\": \"x\", \"amount\": [18446744073709551615]}",
                "{\"title\": \"x\", \"amount\": [18446744073709551615]}");
    assert_refused(&label_type, "{\"amount\": \"1\"}",
                   "arguments.amount: expects a number or a boolean or an array, not a string");
    assert_refused(&label_type, "{\"amount\": [1, -1]}", "arguments.amount[1]: -1 is less than 0");
    assert_refused(&label_type, "{\"title\": \"abcdef\"}",
                   "arguments.title: 'abcdef' has 6 bytes, more than 5");
}

static void test_json_in__paths_of_any_length_are_cut(void **state)
{
    AUTO(error_free) struct error *err = NULL;
    AUTO(free_ptr) char *name = calloc(1, 100001);
    AUTO(free_ptr) char *text = NULL;
    struct place p;

    (void)state;
    memset(name, 'n', 100000);
    text = xasprintf("{\"%s\": 1}", name);
    assert_int_equal(parse(&place_type, text, &p, &err), -EINVAL);
    assert_true(strlen(error_text(err)) < 200);
}

/* As above, with jansson's own allocations failing too: what goes out is whole or nothing. */
static void test_json_in__output_survives_each_failed_allocation(void **state)
{
    const char *text = "{\"name\": \"b\", \"weight\": 18446744073709551615, \"on\": {" FLAT
                       "}, \"tags\": [\"x\", \"y\"], "
                       "\"label\": \"l\\u00e4\", \"faces\": [\"red\"]}";
    AUTO(error_free) struct error *err = NULL;
    AUTO(stone_release) struct stone s;
    unsigned failures = 0;
    unsigned calls;
    AUTO(free_ptr) char *expected = there_and_back(&stone_type, text);

    (void)state;
    assert_int_equal(parse(&stone_type, text, &s, &err), 0);
    json_set_alloc_funcs(allocate_for_jansson, free);
    do {
        AUTO(free_ptr) char *written = NULL;
        json_t *out;

        (void)alloc_fail_at(failures + 1);
        out = json_out(&stone_type, &s);
        calls = alloc_fail_at(0);
        written = out ? json_text_dump(out, false) : NULL;
        json_decref(out);
        if (out)
            assert_string_equal(written, expected);
        failures++;
    } while (failures <= calls);
    json_set_alloc_funcs(malloc, free);
    assert_true(failures >= 20);
}

static void test_json_in__events_have_their_data(void **state)
{
    const struct stone_fell_event data = {.name = (char *)(uintptr_t) "caf\xe9",
                                          .height = UINT64_MAX};
    json_t *fell = event_stone_fell(&data);
    json_t *night = event_night();
    AUTO(free_ptr) char *fell_text = json_text_dump(fell, false);
    AUTO(free_ptr) char *night_text = json_text_dump(night, false);

    (void)state;
    assert_string_equal(fell_text,
                        "{\"event\": \"STONE_FELL\", \"data\": {\"name\": \"caf\\uFFFD\", "
                        "\"height\": 18446744073709551615}}");
    assert_string_equal(night_text, "{\"event\": \"NIGHT\"}");
    json_decref(fell);
    json_decref(night);
}

static void test_json_in__tables_name_commands_and_drivers(void **state)
{
    (void)state;
    assert_int_equal(sample_command_count, 5);
    assert_string_equal(sample_commands[0].name, "qmp_capabilities");
    assert_string_equal(sample_commands[3].name, "stone-add");
    assert_ptr_equal(sample_commands[3].args, &stone_type);
    assert_null(sample_commands[3].ret);
    assert_ptr_equal(sample_commands[1].ret, &report_type);
    assert_int_equal(sample_driver_count, 2);
    assert_string_equal(sample_drivers[NODE_DRIVER_PILE].name, "pile");
    assert_int_equal(sample_drivers[NODE_DRIVER_PILE].kind, SCHEMA_DRIVER_FILTER);
    assert_ptr_equal(sample_drivers[NODE_DRIVER_HEAP].options,
                     sample_drivers[NODE_DRIVER_PILE].options);
    assert_string_equal(colour_name(COLOUR_DARK_GREY), "dark-grey");
}
