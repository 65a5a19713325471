/* SPDX-License-Identifier: Apache-2.0 */
/* key=value options: the tree they make, what the sample schema makes of it, and each refusal. */
#include "schema-golden/sample-types.c"

#include "base/alloc.h"
#include "base/json-text.h"
#include "base/keyval.h"
#include "base/prng.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>

static void assert_tree(const char *text, const char *implied, const char *expected)
{
    AUTO(error_free) struct error *err = NULL;
    AUTO(free_ptr) char *out = NULL;
    enum json_in_mode mode;
    json_t *tree;

    if (keyval_load(text, implied, &tree, &mode, &err) < 0)
        fail_msg("%s: %s", text, error_text(err));
    out = json_text_dump(tree, false);
    json_decref(tree);
    assert_string_equal(out, expected);
}

static void assert_refused(const char *text, const char *expected)
{
    AUTO(error_free) struct error *err = NULL;
    enum json_in_mode mode;
    json_t *tree;

    assert_true(keyval_load(text, NULL, &tree, &mode, &err) < 0);
    assert_string_equal(error_text(err), expected);
}

static void test_keyval__makes_a_tree(void **state)
{
    (void)state;
    assert_tree("", NULL, "{}");
    assert_tree("a=1", NULL, "{\"a\": \"1\"}");
    assert_tree("a=1,", NULL, "{\"a\": \"1\"}");
    assert_tree("driver=qcow2,node-name=d0,file.filename=x,file.cache.direct=on", NULL,
                "{\"driver\": \"qcow2\", \"node-name\": \"d0\", "
                "\"file\": {\"filename\": \"x\", \"cache\": {\"direct\": \"on\"}}}");
    assert_tree("a=,b==", NULL, "{\"a\": \"\", \"b\": \"=\"}");
    assert_tree("a=1,a=2", NULL, "{\"a\": \"2\"}");
}

static void test_keyval__doubled_commas_stand_for_one(void **state)
{
    (void)state;
    assert_tree("a=x,,y,b=,,", NULL, "{\"a\": \"x,y\", \"b\": \",\"}");
    assert_tree("a=,,,b=1", NULL, "{\"a\": \",\", \"b\": \"1\"}");
    assert_tree("a=,,,,", NULL, "{\"a\": \",,\"}");
}

static void test_keyval__first_key_may_be_implied(void **state)
{
    (void)state;
    assert_tree("qcow2,node-name=d0", "driver", "{\"driver\": \"qcow2\", \"node-name\": \"d0\"}");
    assert_tree("driver=qcow2", "driver", "{\"driver\": \"qcow2\"}");
    assert_tree("a,,b,c=1", "driver", "{\"driver\": \"a,b\", \"c\": \"1\"}");
}

static void test_keyval__numbered_keys_make_lists(void **state)
{
    (void)state;
    assert_tree("children.1=y,children.0=x", NULL, "{\"children\": [\"x\", \"y\"]}");
    assert_tree("a.0.b.0=1,a.0.c=2", NULL, "{\"a\": [{\"b\": [\"1\"], \"c\": \"2\"}]}");
    assert_refused("a.0=x,a.2=y", "list 'a' has 2 elements, but none at 1");
    assert_refused("a.01=x", "list 'a' has 1 elements, but none at 0");
    assert_refused("a.0=x,a.b=y", "'a' mixes numbered and named keys");
}

static void test_keyval__refuses_what_it_cannot_place(void **state)
{
    AUTO(free_ptr) char *long_name = malloc(140);
    AUTO(free_ptr) char *deep = malloc(200);

    (void)state;
    assert_refused("a", "'a' lacks a value: expected key=value");
    assert_refused("a=1,b,c=2", "'b' lacks a value: expected key=value");
    assert_refused("=1", "key '' is not well-formed");
    assert_refused("a..b=1", "key 'a..b' is not well-formed");
    assert_refused("a.=1", "key 'a.' is not well-formed");
    assert_refused("a b=1", "key 'a b' is not well-formed");
    assert_refused("a=1,a.b=2", "key 'a.b' goes below one that has a value");
    assert_refused("a.b=2,a=1", "key 'a' has a value and keys below it");
    memset(long_name, 'n', 128);
    strcpy(long_name + 128, "=1");
    {
        AUTO(free_ptr)
        char *expected = xasprintf("key '%.128s' has a name of more than 127 bytes", long_name);

        assert_refused(long_name, expected);
    }
    for (int i = 0; i < 66; i++)
        memcpy(deep + 2 * i, "a.", 2);
    strcpy(deep + 132, "a=1");
    {
        AUTO(free_ptr)
        char *expected = xasprintf("key '%.64s...' is nested more than 64 deep", deep);

        assert_refused(deep, expected);
    }
}

static int parse(const struct schema_type *type, const char *text, void *ret, char **ret_message)
{
    AUTO(error_free) struct error *err = NULL;
    int r = keyval_in(type, text, NULL, ret, &err);

    *ret_message = r < 0 ? xstrdup(error_text(err)) : NULL;
    return r;
}

static void test_keyval__leaves_become_what_members_want(void **state)
{
    AUTO(free_ptr) char *message = NULL;
    AUTO(stone_release) struct stone s;

    (void)state;
    if (parse(
            &stone_type,
            "name=b,weight=1.5G,heavy=on,place.x=-7,on.name=c,on.weight=0x10,on.shape=round,on.radius=9,tags.0=t,"
            "faces.0=red,colour=dark-grey",
            &s, &message) < 0)
        fail_msg("%s", message);
    assert_int_equal(s.weight, 3 * GIB / 2);
    assert_true(s.has_heavy && s.heavy);
    assert_int_equal(s.place.x, -7);
    assert_int_equal(s.on->kind, STONE_REF_DEFINITION);
    assert_int_equal(s.on->definition->weight, 16);
    assert_int_equal(s.on->definition->u.round.radius, 9);
    assert_string_equal(s.tags.items[0], "t");
    assert_int_equal(s.u.flat.faces.items[0], COLOUR_RED);
}

static void test_keyval__strings_win_in_alternates(void **state)
{
    AUTO(free_ptr) char *message = NULL;
    AUTO(node_release) struct node n;

    (void)state;
    assert_int_equal(parse(&node_type, "driver=pile,file=12", &n, &message), 0);
    assert_int_equal(n.u.pile.file.kind, STONE_REF_NAME);
    assert_string_equal(n.u.pile.file.name, "12");
}

static void assert_option_refused(const struct schema_type *type, const char *text,
                                  const char *expected)
{
    AUTO(free_ptr) void *value = malloc(type->size);
    AUTO(free_ptr) char *message = NULL;

    assert_true(parse(type, text, value, &message) < 0);
    assert_string_equal(message, expected);
}

#define STONE "name=a,weight=5,faces.0=red,"

static void test_keyval__bad_leaves_are_named(void **state)
{
    (void)state;
    assert_option_refused(&stone_type, STONE "heavy=maybe",
                          "heavy: 'maybe' is neither 'on' nor 'off'");
    assert_option_refused(&stone_type, STONE "weight=5x",
                          "weight: '5x' is not a size in bytes (k, M, G, T, P, E may follow)");
    assert_option_refused(&stone_type, STONE "weight=16E",
                          "weight: 16E is more than 18446744073709551615");
    assert_option_refused(&stone_type, STONE "weight=-1", "weight: -1 is less than 0");
    assert_option_refused(&stone_type, STONE "place.x=11", "place.x: 11 is more than 10 (m)");
    assert_option_refused(&stone_type, STONE "place.x=1k", "place.x: '1k' is not an integer");
    assert_option_refused(&stone_type, STONE "place=1", "place: expects an object, not a string");
    assert_option_refused(&stone_type, STONE "faces.1=pink",
                          "faces[1]: 'pink' is not accepted: stones are not pink");
    assert_option_refused(&stone_type, STONE "wieght=1",
                          "wieght: unknown member (shape is 'flat')");
    assert_option_refused(&stone_weigh_args_type, "name=a,times=1k",
                          "times: '1k' is not an integer");
    assert_option_refused(&report_type, "total=1,stones=x",
                          "stones: expects an array, not a string");
    assert_option_refused(&stone_type, "weight=1", "name: missing, but mandatory");
}

static void test_keyval__texts_become_numbers_and_flags(void **state)
{
    AUTO(free_ptr) char *message = NULL;
    AUTO(label_release) struct label l;

    (void)state;
    assert_int_equal(parse(&label_type, "amount=0.5,scale=2.5", &l, &message), 0);
    assert_true(l.has_scale && l.scale == 2.5);
    assert_int_equal(l.amount->kind, AMOUNT_EXACT);
    assert_true(l.amount->exact == 0.5);
    assert_option_refused(&label_type, "scale=2.5x", "scale: '2.5x' is not a number");
    assert_option_refused(&label_type, "scale=1e999", "scale: '1e999' is not a number");
}

static void test_keyval__long_lists_are_refused(void **state)
{
    AUTO(error_free) struct error *err = NULL;
    enum json_in_mode mode;
    json_t *tree;
    size_t size = 0;
    char *all = NULL;
    FILE *f = open_memstream(&all, &size);

    (void)state;
    for (int i = 0; i < 4097; i++)
        fprintf(f, "a.%d=x,", i);
    fclose(f);
    assert_int_equal(keyval_load(all, NULL, &tree, &mode, &err), -E2BIG);
    assert_string_equal(error_text(err), "list 'a' has more than 4096 elements");
    free(all);
}

/* Lets alloc_fail_at() reach the allocations of the JSON library. */
static void *allocate_for_jansson(size_t size)
{
    return try_alloc(1, size);
}

static void test_keyval__survives_each_failed_allocation(void **state)
{
    const char *text =
        "name=b,weight=5,on.name=c,on.weight=1,on.shape=round,on.radius=9,tags.0=t,tags.1=u,faces.0=red";
    unsigned failures = 0;
    unsigned calls;

    (void)state;
    json_set_alloc_funcs(allocate_for_jansson, free);
    do {
        AUTO(error_free) struct error *err = NULL;
        struct stone s;
        int r;

        (void)alloc_fail_at(failures + 1);
        r = keyval_in(&stone_type, text, NULL, &s, &err);
        calls = alloc_fail_at(0);
        if (r == 0)
            stone_release(&s);
        else
            assert_int_equal(r, -ENOMEM);
        failures++;
    } while (failures <= calls);
    json_set_alloc_funcs(malloc, free);
    assert_true(failures >= 30);
}

static void test_keyval__json_keeps_its_types(void **state)
{
    AUTO(free_ptr) char *message = NULL;
    struct place p;
    AUTO(free_ptr) char *deep = malloc(1001);

    (void)state;
    assert_int_equal(parse(&place_type, "{'x': 5}", &p, &message), 0);
    assert_int_equal(p.x, 5);
    assert_option_refused(&place_type, "{\"x\": \"5\"}", "x: expects an integer, not a string");
    assert_option_refused(&place_type, "{\"x\": 5",
                          "JSON parse error at byte 7: '}' expected near end of file");
    memset(deep, '[', 1000);
    deep[0] = '{';
    deep[1000] = '\0';
    assert_option_refused(&place_type, deep, "JSON is nested more than 128 deep");
}

static void test_keyval__file_names_need_not_be_utf_8(void **state)
{
    AUTO(free_ptr) char *message = NULL;
    AUTO(stone_weigh_args_release) struct stone_weigh_args args;

    (void)state;
    assert_int_equal(parse(&stone_weigh_args_type, "name=caf\xe9", &args, &message), 0);
    assert_string_equal(args.name, "caf\xe9");
}

static void test_keyval__random_text_never_breaks(void **state)
{
    static const char alphabet[] = "ab01.,,==-{}[]\":x\xff";

    (void)state;
    TEST_SEEDS (seed) {
        struct prng prng = {.state = seed};

        for (int round = 0; round < 200; round++) {
            AUTO(error_free) struct error *err = NULL;
            char text[40] = "";
            size_t len = prng_below(&prng, sizeof(text));
            enum json_in_mode mode;
            json_t *tree;

            for (size_t i = 0; i < len; i++)
                text[i] = alphabet[prng_below(&prng, sizeof(alphabet) - 1)];
            if (keyval_load(text, "driver", &tree, &mode, &err) == 0)
                json_decref(tree);
            else
                assert_non_null(err);
        }
    }
}
