/* SPDX-License-Identifier: Apache-2.0 */
/* Points and catalogues: what is read without trust (P6), and what a half made one leaves (CAT-1 to CAT-3). */
#include "base/alloc.h"
#include "base/json-text.h"
#include "base/macros.h"
#include "cli/catalogue.h"
#include "cli/target.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define ID   "20261120T234208Z"
#define ID_2 "20261120T234208Z-2"
#define ID_3 "20261120T234209Z"
#define GEN  "00112233445566778899aabbccddeeff"
#define SIZE MIB

static char dir[64];

static int setup(void **state)
{
    (void)state;
    (void)snprintf(dir, sizeof(dir), "/tmp/test-catalogue.XXXXXX");
    return mkdtemp(dir) ? 0 : -1;
}

static int teardown(void **state)
{
    AUTO(free_ptr) char *command = xasprintf("rm -rf '%s'", dir);

    (void)state;
    return system(command);
}

/* ---- the text of a point ---- */

static json_t *good(void)
{
    return json_pack("{s:i, s:s, s:s, s:s, s:s, s:s, s:I, s:I, s:s, s:s, s:s, s:s}", "cairn-point",
                     1, "id", ID, "time", "2026-11-20T23:42:08.123Z", "kind", "full", "image",
                     ID ".qcow2", "format", "qcow2", "size", (json_int_t)SIZE, "bytes",
                     (json_int_t)5, "disk", "/d.raw", "node", "disk", "bitmap", "cairn-0",
                     "generation", GEN);
}

/* Takes the tree. */
static int parse(json_t *tree, struct point *ret, struct error **err)
{
    AUTO(free_ptr) char *text = json_text_dump(tree, false);

    json_decref(tree);
    return point_from_text(ret, ID, text, strlen(text), err);
}

static void must_refuse(json_t *tree, const char *what)
{
    AUTO(error_free) struct error *err = NULL;
    struct point p = {.id = NULL};

    assert_int_equal(parse(tree, &p, &err), -EINVAL);
    assert_null(p.id);
    if (!strstr(error_text(err), what))
        fail_msg("'%s' does not say '%s'", error_text(err), what);
}

static json_t *with(const char *member, json_t *value)
{
    json_t *tree = good();

    json_object_set_new(tree, member, value);
    return tree;
}

static void test_catalogue__a_point_is_read_as_it_was_written(void **state)
{
    AUTO(error_free) struct error *err = NULL;
    AUTO(free_ptr) char *first = NULL;
    AUTO(free_ptr) char *second = NULL;
    json_t *tree = with("kind", json_string("incremental"));
    struct point p;
    json_t *again;

    (void)state;
    json_object_set_new(tree, "base", json_string(ID_2));
    json_object_set_new(tree, "reason", json_string("because \xe2\x82\xac"));
    first = json_text_dump(tree, false);
    assert_int_equal(parse(tree, &p, &err), 0);
    assert_false(p.full);
    assert_string_equal(p.base, ID_2);
    assert_int_equal(p.size, SIZE);
    again = point_to_json(&p);
    point_release(&p);
    assert_int_equal(parse(json_incref(again), &p, &err), 0);
    second = json_text_dump(again, false);
    json_decref(again);
    point_release(&p);
    assert_int_equal(strlen(first), strlen(second)); /* the same members, in another order */
}

static void test_catalogue__hostile_points_are_refused(void **state)
{
    static const char *const strings[] = {"id",   "time", "kind",   "image",     "format",
                                          "disk", "node", "bitmap", "generation"};
    static const char *const texts[] = {"",     "[]", "{", "nonsense", "{\"cairn-point\": 1}x",
                                        "\"s\""};
    char *long_text = xnew_n(char, 20000);

    (void)state;
    for (size_t i = 0; i < ARRAY_SIZE(texts); i++) {
        AUTO(error_free) struct error *err = NULL;
        struct point p;

        assert_true(point_from_text(&p, ID, texts[i], strlen(texts[i]), &err) < 0);
    }
    for (size_t i = 0; i < ARRAY_SIZE(strings); i++) {
        json_t *tree = good();

        json_object_del(tree, strings[i]);
        must_refuse(tree, "is missing");
        must_refuse(with(strings[i], json_integer(1)), "is no string");
        must_refuse(with(strings[i], json_stringn("a\0b", 3)), "u0000");
        must_refuse(with(strings[i], json_string("\x1b[2J")), "control characters");
    }
    memset(long_text, 'a', 19999);
    must_refuse(with("disk", json_string(long_text)), "too long");
    free(long_text);
    must_refuse(with("cairn-point", json_integer(2)), "version 2");
    must_refuse(with("cairn-point", json_string("1")), "no point");
    must_refuse(with("size", json_integer(-1)), "no number");
    must_refuse(with("bytes", json_real(1.5)), "no number");
    must_refuse(with("id", json_string(ID_2)), "is not what the file is called");
    must_refuse(with("image", json_string("../x.qcow2")), "'image'");
    must_refuse(with("image", json_string("/etc/passwd")), "'image'");
    must_refuse(with("format", json_string("raw")), "'format'");
    must_refuse(with("kind", json_string("half")), "'kind'");
    must_refuse(with("kind", json_string("incremental")), "'base'");
    must_refuse(with("base", json_string(ID_2)), "'base'");
    must_refuse(with("time", json_string("yesterday")), "'time'");
    must_refuse(with("generation", json_string("00112233445566778899AABBCCDDEEFF")),
                "'generation'");
}

static void test_catalogue__a_base_is_the_id_of_another_point(void **state)
{
    static const char *const bad[] = {ID, "", "..", "../" ID_2, ID_2 "/x", "20261120T234208Z-1"};

    (void)state;
    for (size_t i = 0; i < ARRAY_SIZE(bad); i++) {
        json_t *tree = with("kind", json_string("incremental"));

        json_object_set_new(tree, "base", json_string(bad[i]));
        must_refuse(tree, "'base'");
    }
}

static void test_catalogue__ids_have_one_shape(void **state)
{
    static const char *const good_ids[] = {ID, ID_2, ID "-10", ID "-9999"};
    static const char *const bad_ids[] = {"",      "2",      "20261120T234208", ID "-",   ID "-0",
                                          ID "-1", ID "-02", ID "-10000",       ID "-2x", ID "x",
                                          ".",     ID "/2"};

    (void)state;
    for (size_t i = 0; i < ARRAY_SIZE(good_ids); i++)
        assert_true(point_id_valid(good_ids[i]));
    for (size_t i = 0; i < ARRAY_SIZE(bad_ids); i++) {
        if (point_id_valid(bad_ids[i]))
            fail_msg("'%s' is taken for an id", bad_ids[i]);
    }
}

/* ---- a directory ---- */

static char *path_of(const char *name)
{
    return xasprintf("%s/%s", dir, name);
}

static bool exists(const char *name)
{
    AUTO(free_ptr) char *path = path_of(name);

    return access(path, F_OK) == 0;
}

static void put(const char *name, const char *text)
{
    AUTO(free_ptr) char *path = path_of(name);
    FILE *f = fopen(path, "w");

    assert_non_null(f);
    assert_int_equal(fwrite(text, 1, strlen(text), f), strlen(text));
    assert_int_equal(fclose(f), 0);
}

static void put_image(const char *name, const char *backing)
{
    AUTO(error_free) struct error *err = NULL;
    AUTO(free_ptr) char *path = path_of(name);

    if (target_create(path, SIZE, backing, &err) < 0)
        fail_msg("%s", error_text(err));
}

/* A point as its file says it. */
static void put_point(const char *id, const char *base, const char *generation)
{
    AUTO(free_ptr) char *name = xasprintf("%s.json", id);
    AUTO(free_ptr) char *image = xasprintf("%s.qcow2", id);
    AUTO(free_ptr) char *text = NULL;
    json_t *tree = good();

    json_object_set_new(tree, "id", json_string(id));
    json_object_set_new(tree, "image", json_string(image));
    json_object_set_new(tree, "generation", json_string(generation));
    if (base) {
        json_object_set_new(tree, "kind", json_string("incremental"));
        json_object_set_new(tree, "base", json_string(base));
    }
    text = json_text_dump(tree, true);
    json_decref(tree);
    put(name, text);
}

static struct catalogue *must_open(bool locked)
{
    AUTO(error_free) struct error *err = NULL;
    struct catalogue *c = NULL;
    int r = locked ? catalogue_open_locked(&c, dir, &err) : catalogue_open(&c, dir, &err);

    if (r < 0)
        fail_msg("%s", error_text(err));
    return c;
}

static void test_catalogue__a_point_needs_its_image_and_its_base(void **state)
{
    struct catalogue *c;

    (void)state;
    put_point(ID, NULL, GEN);
    put_image(ID ".qcow2", NULL);
    put_point(ID_2, ID, "11112233445566778899aabbccddeeff");
    put_image(ID_2 ".qcow2", ID ".qcow2");
    c = must_open(false);
    assert_int_equal(c->count, 2);
    assert_string_equal(catalogue_find_generation(c, "cairn-0", GEN)->id, ID);
    assert_null(catalogue_find_generation(c, "cairn-1", GEN));
    assert_null(catalogue_find_generation(c, "cairn-0", ""));
    catalogue_close(c);

    /* Whose image has another backing file; whose image is none; and what they carry. */
    put_point(ID_3, ID, GEN);
    put_image(ID_3 ".qcow2", NULL);
    c = must_open(false);
    assert_int_equal(c->count, 2);
    catalogue_close(c);
    put(ID ".qcow2", "no image");
    c = must_open(false);
    assert_int_equal(c->count, 0);
    catalogue_close(c);
}

static void test_catalogue__a_ring_of_bases_is_no_chain(void **state)
{
    struct catalogue *c;

    (void)state;
    put_point(ID, ID_2, GEN);
    put_image(ID ".qcow2", ID_2 ".qcow2");
    put_point(ID_2, ID, GEN);
    put_image(ID_2 ".qcow2", ID ".qcow2");
    c = must_open(false);
    assert_int_equal(c->count, 0);
    catalogue_close(c);
}

static void test_catalogue__links_and_huge_files_are_not_read(void **state)
{
    AUTO(free_ptr) char *link_path = path_of(ID_2 ".json");
    AUTO(free_ptr) char *huge = path_of(ID_3 ".json");
    AUTO(free_ptr) char *target = path_of("elsewhere");
    struct catalogue *c;

    (void)state;
    put_point(ID_2, NULL, GEN);
    put_image(ID_2 ".qcow2", NULL);
    assert_int_equal(rename(link_path, target), 0);
    assert_int_equal(symlink(target, link_path), 0);
    put_point(ID_3, NULL, GEN);
    put_image(ID_3 ".qcow2", NULL);
    assert_int_equal(truncate(huge, (off_t)1 << 40), 0);
    c = must_open(false);
    assert_int_equal(c->count, 0);
    catalogue_close(c);
}

static void test_catalogue__who_takes_the_lock_removes_what_is_half_made(void **state)
{
    AUTO(error_free) struct error *err = NULL;
    struct catalogue *c;
    struct catalogue *other = NULL;

    (void)state;
    put_point(ID, NULL, GEN);
    put_image(ID ".qcow2", NULL);
    put(ID_2 ".qcow2.part", "");
    put(ID_2 ".json.tmp", "");
    put(ID_3 ".qcow2", "the image of no point");
    put("notes.json.tmp", "somebody else's");
    put("mine.qcow2", "somebody else's");
    put_point(ID "-3", ID "-4", GEN);
    put(ID "-4.qcow2", "whose point is gone, but that is a base");
    c = must_open(false);
    assert_true(exists(ID_2 ".qcow2.part"));
    catalogue_close(c);

    c = must_open(true);
    assert_int_equal(c->count, 1);
    assert_false(exists(ID_2 ".qcow2.part"));
    assert_false(exists(ID_2 ".json.tmp"));
    assert_false(exists(ID_3 ".qcow2"));
    assert_true(exists("notes.json.tmp"));
    assert_true(exists("mine.qcow2"));
    assert_true(exists(ID "-4.qcow2"));
    assert_true(exists(ID ".qcow2"));
    assert_int_equal(strlen(c->id), CATALOGUE_ID_CHARS);
    assert_int_equal(catalogue_open_locked(&other, dir, &err), -EBUSY);
    catalogue_close(c);
}

static struct point new_point(const char *id)
{
    struct point p = {
        .id = xstrdup(id),
        .time = xstrdup("2026-11-20T23:42:08.123Z"),
        .full = true,
        .image = xasprintf("%s.qcow2", id),
        .size = SIZE,
        .disk = xstrdup("/d"),
        .node = xstrdup("d"),
        .bitmap = xstrdup("cairn-0"),
        .generation = xstrdup(GEN),
        .reason = xstrdup("the first one"),
    };

    return p;
}

static void test_catalogue__a_point_is_added_when_its_image_is_there(void **state)
{
    AUTO(error_free) struct error *err = NULL;
    struct point p = new_point(ID);
    char id[POINT_ID_MAX];
    char first_id[CATALOGUE_ID_CHARS + 1];
    struct catalogue *c = must_open(true);

    (void)state;
    memcpy(first_id, c->id, sizeof(first_id));
    assert_int_equal(catalogue_add(c, &p, &err), -ENOENT);
    assert_false(exists(ID ".json"));
    assert_false(exists(ID ".json.tmp"));
    error_free(&err);
    put_image(ID ".qcow2.part", NULL);
    assert_int_equal(catalogue_add(c, &p, &err), 0);
    assert_null(p.id);
    assert_true(exists(ID ".json") && exists(ID ".qcow2"));
    assert_false(exists(ID ".json.tmp") || exists(ID ".qcow2.part"));
    assert_int_equal(c->count, 1);
    catalogue_new_id(c, UINT64_C(1795218128) * NS_PER_S + 7, id); /* the same second */
    assert_string_equal(id, ID_2);
    catalogue_close(c);
    c = must_open(true);
    assert_int_equal(c->count, 1);
    assert_string_equal(c->id, first_id);
    assert_string_equal(c->points[0].reason, "the first one");
    catalogue_close(c);
}
