/* SPDX-License-Identifier: Apache-2.0 */
/* The protocol's own commands over the real schema: each answer is built, and introspection describes what exists. */
#include "schema-dispatch.h"

#include "base/alloc.h"
#include "base/json-text.h"

#include <errno.h>
#include <stdlib.h>

/* The commands of other files are only named here, never run. */
static int never_run(struct qmp_session *session, const void *args, void *ret, struct error **err)
{
    (void)session;
    (void)args;
    (void)ret;
    return error_set(err, EPERM, "not a command of this test");
}

static int co_fn control_fn run_capabilities(struct qmp_session *session, const void *args,
                                             void *ret, struct error **err)
{
    (void)ret;
    return qmp_qmp_capabilities(session, args, err);
}

static int co_fn control_fn run_version(struct qmp_session *session, const void *args, void *ret,
                                        struct error **err)
{
    (void)args;
    return qmp_query_version(session, ret, err);
}

static int co_fn control_fn run_commands(struct qmp_session *session, const void *args, void *ret,
                                         struct error **err)
{
    (void)args;
    return qmp_query_commands(session, ret, err);
}

static int co_fn control_fn run_schema(struct qmp_session *session, const void *args, void *ret,
                                       struct error **err)
{
    (void)args;
    return qmp_query_qmp_schema(session, ret, err);
}

static struct qmp_command commands[64];
static struct qmp_service service = {.commands = commands, .major = 9, .package = "cairn test"};

static int group_setup(void **state)
{
    (void)state;
    for (size_t i = 0; i < schema_command_count; i++) {
        const char *name = schema_commands[i].name;

        commands[i].schema = &schema_commands[i];
        commands[i].run = strcmp(name, "qmp_capabilities") == 0   ? run_capabilities
                          : strcmp(name, "query-version") == 0    ? run_version
                          : strcmp(name, "query-commands") == 0   ? run_commands
                          : strcmp(name, "query-qmp-schema") == 0 ? run_schema
                                                                  : never_run;
    }
    service.command_count = schema_command_count;
    service.introspection = schema_introspection;
    return 0;
}

/* Handlers here never yield, so that no coroutine is needed: called by pointer, which the context check does not follow. */
static char *(*const answer_now)(const struct qmp_request *request,
                                 struct qmp_session *s) = qmp_request_run;

/* The last answer to some requests of a new session, as a tree. */
static json_t *ask(const char *text)
{
    struct qmp_session s;
    json_t *tree = NULL;
    size_t pos = 0;

    qmp_session_init(&s, &service, false);
    while (pos < strlen(text)) {
        AUTO(free_ptr) char *answer = NULL;
        struct qmp_request *request;
        size_t consumed;

        assert_int_equal(qmp_session_feed(&s, text + pos, strlen(text) - pos, &consumed, &request),
                         1);
        pos += consumed;
        answer = answer_now(request, &s);
        json_decref(tree);
        tree = json_loads(answer, 0, NULL);
        assert_non_null(tree);
        qmp_request_free(request);
    }
    qmp_session_release(&s);
    return tree;
}

#define NEGOTIATE "{\"execute\": \"qmp_capabilities\"}"

static json_t *ask_for_list(const char *text, json_t **ret_answer)
{
    *ret_answer = ask(text);
    assert_true(json_is_array(json_object_get(*ret_answer, "return")));
    return json_object_get(*ret_answer, "return");
}

static void test_qmp_basic__offers_no_capability(void **state)
{
    json_t *answer =
        ask("{\"execute\": \"qmp_capabilities\", \"arguments\": {\"enable\": [\"oob\"]}}");
    const char *desc = json_string_value(json_object_get(json_object_get(answer, "error"), "desc"));

    (void)state;
    assert_string_equal(desc, "capability 'oob' is not offered");
    json_decref(answer);
    answer = ask("{\"execute\": \"qmp_capabilities\", \"arguments\": {\"enable\": [\"x\"]}}");
    desc = json_string_value(json_object_get(json_object_get(answer, "error"), "desc"));
    assert_string_equal(desc, "arguments.enable[0]: 'x' is not one of: oob");
    json_decref(answer);
}

static void test_qmp_basic__tells_versions(void **state)
{
    json_t *answer = ask(NEGOTIATE "{\"execute\": \"query-version\"}");
    int major;
    const char *package;

    (void)state;
    assert_int_equal(json_unpack(answer, "{s:{s:{s:i}, s:s}}", "return", "qemu", "major", &major,
                                 "package", &package),
                     0);
    assert_int_equal(major, 9);
    assert_string_equal(package, "cairn test");
    json_decref(answer);
}

static void test_qmp_basic__lists_all_commands(void **state)
{
    json_t *answer;
    json_t *list = ask_for_list(NEGOTIATE "{\"execute\": \"query-commands\"}", &answer);

    (void)state;
    assert_int_equal(json_array_size(list), schema_command_count);
    for (size_t i = 0; i < schema_command_count; i++)
        assert_string_equal(json_string_value(json_object_get(json_array_get(list, i), "name")),
                            schema_commands[i].name);
    json_decref(answer);
}

static json_t *entity(json_t *list, const char *name)
{
    size_t i;
    json_t *e;

    json_array_foreach(
        list, i, e) if (strcmp(json_string_value(json_object_get(e, "name")), name) == 0) return e;
    fail_msg("no entity %s", name);
    return NULL;
}

static json_t *member(json_t *object, const char *name)
{
    return entity(json_object_get(object, "members"), name);
}

static json_t *type_of(json_t *list, json_t *from, const char *key)
{
    return entity(list, json_string_value(json_object_get(from, key)));
}

static void test_qmp_basic__introspection_describes_blockdev_add(void **state)
{
    json_t *answer;
    json_t *list = ask_for_list(NEGOTIATE "{\"execute\": \"query-qmp-schema\"}", &answer);
    json_t *options = type_of(list, entity(list, "blockdev-add"), "arg-type");
    json_t *driver = type_of(list, member(options, "driver"), "type");
    json_t *variants = json_object_get(options, "variants");
    json_t *raw = NULL;
    json_t *ref;
    size_t i;
    json_t *v;

    (void)state;
    assert_string_equal(json_string_value(json_object_get(options, "meta-type")), "object");
    assert_string_equal(json_string_value(json_object_get(options, "tag")), "driver");
    assert_true(json_is_null(json_object_get(member(options, "read-only"), "default")));
    assert_null(json_object_get(member(options, "driver"), "default"));
    assert_int_equal(json_array_size(json_object_get(driver, "values")), schema_driver_count);
    json_array_foreach(variants, i, v) if (strcmp(json_string_value(json_object_get(v, "case")),
                                                  "raw") == 0) raw = type_of(list, v, "type");
    assert_string_equal(json_string_value(json_object_get(member(raw, "size"), "type")), "int");
    ref = type_of(list, member(raw, "file"), "type");
    assert_string_equal(json_string_value(json_object_get(ref, "meta-type")), "alternate");
    assert_ptr_equal(type_of(list, json_array_get(json_object_get(ref, "members"), 1), "type"),
                     options);
    json_decref(answer);
}

/* Every type that is named is there, and once. */
static void test_qmp_basic__introspection_is_complete(void **state)
{
    json_t *answer;
    json_t *list = ask_for_list(NEGOTIATE "{\"execute\": \"query-qmp-schema\"}", &answer);
    static const char *const keys[] = {"arg-type", "ret-type", "element-type"};
    json_t *names = json_object();
    size_t i;
    size_t j;
    json_t *e;
    json_t *m;

    (void)state;
    json_array_foreach(list, i, e)
    {
        const char *name = json_string_value(json_object_get(e, "name"));

        assert_null(json_object_get(names, name));
        json_object_set_new(names, name, json_true());
        for (size_t k = 0; k < ARRAY_SIZE(keys); k++)
            if (json_object_get(e, keys[k]))
                (void)type_of(list, e, keys[k]);
        json_array_foreach(json_object_get(e, "members"), j,
                           m) if (json_object_get(m, "type"))(void) type_of(list, m, "type");
        json_array_foreach(json_object_get(e, "variants"), j, m)(void) type_of(list, m, "type");
    }
    json_decref(names);
    json_decref(answer);
}
