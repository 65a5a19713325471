/* SPDX-License-Identifier: Apache-2.0 */
/* The protocol without sockets, on the sample schema: negotiation, the replies to every kind of bad input, order, ids. */
#include "schema-golden/sample-dispatch.c"
#include "schema-golden/sample-introspect.c"
#include "schema-golden/sample-types.c"

#include "base/alloc.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>

static unsigned stones_added;

int qmp_qmp_capabilities(struct qmp_session *session, const struct qmp_capabilities_args *args,
                         struct error **err)
{
    if (args->enable.count > 0)
        return error_set(err, ENOTSUP, "capability '%s' is not offered", args->enable.items[0]);
    qmp_session_negotiate(session);
    return 0;
}

int qmp_query_stones(struct qmp_session *session, struct report *ret, struct error **err)
{
    (void)session;
    (void)err;
    ret->total = UINT64_MAX;
    ret->stones.items = xnew_n(struct stone, 1);
    ret->stones.count = 1;
    ret->stones.items[0] = (struct stone){.name = xstrdup("x"), .shape = SHAPE_UNIX, .weight = 1};
    return 0;
}

int qmp_quit(struct qmp_session *session, struct error **err)
{
    (void)session;
    return error_set_class(err, ERROR_DEVICE_NOT_ACTIVE, EBUSY, "not in the mood");
}

int qmp_stone_add(struct qmp_session *session, const struct stone *args, struct error **err)
{
    (void)session;
    if (strcmp(args->name, "gone") == 0)
        return error_set_class(err, ERROR_DEVICE_NOT_FOUND, ENODEV, "stone 'gone' is not there");
    stones_added++;
    return 0;
}

/* Fails after it has put something into *ret. */
int qmp_stone_weigh(struct qmp_session *session, const struct stone_weigh_args *args,
                    struct uint_array *ret, struct error **err)
{
    (void)session;
    ret->items = xnew_n(uint64_t, args->times);
    ret->count = args->times;
    for (size_t i = 0; i < ret->count; i++)
        ret->items[i] = UINT64_MAX - i;
    return strcmp(args->name, "broken") == 0 ? error_set(err, EIO, "the scale is broken: '\xff'")
                                             : 0;
}

static struct qmp_service service = {.major = 9, .minor = 1, .micro = 2, .package = "test 1"};

static int group_setup(void **state)
{
    (void)state;
    service.commands = sample_dispatch;
    service.command_count = sample_dispatch_count;
    service.introspection = sample_introspection;
    return 0;
}

/* Handlers here never yield, so that no coroutine is needed: called by pointer, which the context check does not follow. */
static char *(*const answer_now)(const struct qmp_request *request,
                                 struct qmp_session *s) = qmp_request_run;

/* All that the session answers to the text, which comes in pieces; one string. */
static char *talk(struct qmp_session *s, const char *text, size_t piece)
{
    char *all = xstrdup("");
    size_t len = strlen(text);
    size_t pos = 0;

    while (pos < len) {
        size_t consumed;
        struct qmp_request *request;
        int r = qmp_session_feed(s, text + pos, MIN(len - pos, piece), &consumed, &request);

        assert_true(r >= 0);
        pos += consumed;
        if (r > 0) {
            char *line = answer_now(request, s);
            char *longer = xasprintf("%s%s", all, line);

            assert_non_null(line);
            assert_string_equal(line + strlen(line) - 2, "\r\n");
            free(line);
            free(all);
            all = longer;
            qmp_request_free(request);
        }
    }
    return all;
}

static void assert_talk(const char *text, bool negotiated, const char *expected)
{
    for (size_t piece = 1; piece < 100; piece += 33) {
        struct qmp_session s;
        AUTO(free_ptr) char *answer = NULL;

        qmp_session_init(&s, &service, false);
        s.negotiated = negotiated;
        answer = talk(&s, text, piece);
        assert_string_equal(answer, expected);
        qmp_session_release(&s);
    }
}

#define ANSWERS(text, expected) assert_talk(text, true, expected "\r\n")
#define ERROR_ID(class, desc, id)                                                                  \
    "{\"error\": {\"class\": \"" class "\", \"desc\": \"" desc "\"}" id "}"
#define ERROR(class, desc) ERROR_ID(class, desc, "")

static void test_qmp_protocol__greets(void **state)
{
    struct qmp_session s;
    AUTO(free_ptr) char *text = NULL;

    (void)state;
    qmp_session_init(&s, &service, false);
    text = qmp_session_greeting(&s);
    assert_string_equal(
        text, "{\"QMP\": {\"version\": {\"qemu\": {\"major\": 9, \"minor\": 1, \"micro\": 2}, "
              "\"package\": \"test 1\"}, \"capabilities\": []}}\r\n");
    qmp_session_release(&s);
}

static void test_qmp_protocol__wants_negotiation_first(void **state)
{
    (void)state;
    assert_talk("{\"execute\": \"query-stones\"}", false,
                ERROR("CommandNotFound",
                      "expecting capabilities negotiation with 'qmp_capabilities' first") "\r\n");
    assert_talk("{\"execute\": \"no-such\"}", false,
                ERROR("CommandNotFound",
                      "expecting capabilities negotiation with 'qmp_capabilities' first") "\r\n");
    assert_talk("{\"execute\": \"stone-add\", \"arguments\": {\"bad\": 1}}", false,
                ERROR("CommandNotFound",
                      "expecting capabilities negotiation with 'qmp_capabilities' first") "\r\n");
    assert_talk("{\"execute\": \"qmp_capabilities\", \"arguments\": {\"enable\": [\"oob\"]}}",
                false, ERROR("GenericError", "capability 'oob' is not offered") "\r\n");
    assert_talk("{\"execute\": \"qmp_capabilities\", \"arguments\": {\"enabel\": []}}", false,
                ERROR("GenericError", "arguments.enabel: unknown member") "\r\n");
    assert_talk("{\"execute\": \"qmp_capabilities\"} {\"execute\": \"qmp_capabilities\"}", false,
                "{\"return\": {}}\r\n" ERROR(
                    "CommandNotFound", "capabilities negotiation is already complete") "\r\n");
}

static void test_qmp_protocol__failed_negotiation_leaves_the_session_mute(void **state)
{
    struct qmp_session s;
    AUTO(free_ptr) char *answer = NULL;

    (void)state;
    qmp_session_init(&s, &service, false);
    answer = talk(&s, "{'execute': 'qmp_capabilities', 'arguments': {'enable': ['oob']}}", 1000);
    assert_false(s.negotiated);
    qmp_session_release(&s);
}

static void test_qmp_protocol__judges_the_envelope(void **state)
{
    (void)state;
    ANSWERS("{\"execute\": }",
            ERROR("GenericError", "JSON parse error at byte 13: unexpected token near '}'"));
    ANSWERS("[]", ERROR("GenericError", "a request must be a JSON object"));
    ANSWERS("7 ", ERROR("GenericError", "a request must be a JSON object"));
    ANSWERS("garbage\n",
            ERROR("GenericError", "JSON parse error at byte 7: invalid token near 'garbage'"));
    ANSWERS("\xff", ERROR("GenericError", "JSON parse error: the byte 0xFF is not allowed"));
    ANSWERS("{\"execute\": \"quit\", \"bogus\": 1}",
            ERROR("GenericError", "member 'bogus' is unexpected"));
    ANSWERS("{\"arguments\": {}}", ERROR("GenericError", "member 'execute' is missing"));
    ANSWERS("{\"execute\": \"quit\", \"exec-oob\": \"quit\"}",
            ERROR("GenericError",
                  "member 'exec-oob' is unexpected: out-of-band execution is not offered"));
    ANSWERS("{\"exec-oob\": \"quit\"}",
            ERROR("GenericError",
                  "member 'exec-oob' is unexpected: out-of-band execution is not offered"));
    ANSWERS("{\"execute\": 1}", ERROR("GenericError", "member 'execute' must be a string"));
    ANSWERS("{\"execute\": 18446744073709551615}",
            ERROR("GenericError", "member 'execute' must be a string"));
    ANSWERS("{\"execute\": \"quit\", \"arguments\": []}",
            ERROR("GenericError", "member 'arguments' must be an object"));
    ANSWERS("{\"execute\": \"no-such\"}",
            ERROR("CommandNotFound", "command 'no-such' does not exist"));
    /* In any state, and with the id where there was one. */
    assert_talk("{\"bogus\": 1, \"id\": 4}", false,
                ERROR_ID("GenericError", "member 'bogus' is unexpected", ", \"id\": 4") "\r\n");
}

static void test_qmp_protocol__judges_the_arguments(void **state)
{
    (void)state;
    ANSWERS("{\"execute\": \"stone-weigh\"}",
            ERROR("GenericError", "arguments.name: missing, but mandatory"));
    ANSWERS("{\"execute\": \"stone-weigh\", \"arguments\": {\"name\": \"a\", \"times\": 9}}",
            ERROR("GenericError", "arguments.times: 9 is more than 3 (times)"));
    ANSWERS("{\"execute\": \"quit\", \"arguments\": {\"now\": true}}",
            ERROR("GenericError", "arguments.now: unknown member"));
}

static void test_qmp_protocol__runs_commands(void **state)
{
    (void)state;
    stones_added = 0;
    ANSWERS("{'execute': 'stone-add', 'arguments': {'name': 'a', 'weight': 1, 'faces': []}}",
            "{\"return\": {}}");
    assert_int_equal(stones_added, 3); /* once for each way to cut the text */
    ANSWERS("{\"execute\": \"stone-weigh\", \"arguments\": {\"name\": \"a\", \"times\": 2}}",
            "{\"return\": [18446744073709551615, 18446744073709551614]}");
    ANSWERS(
        "{\"execute\": \"query-stones\", \"arguments\": {}}",
        "{\"return\": {\"stones\": [{\"name\": \"x\", \"shape\": \"unix\", \"weight\": 1, \"colour\": \"red\", "
        "\"place\": {\"x\": 0, \"y\": 0}, \"tags\": []}], \"total\": 18446744073709551615}}");
}

static void test_qmp_protocol__errors_keep_their_class(void **state)
{
    (void)state;
    ANSWERS("{\"execute\": \"quit\"}", ERROR("DeviceNotActive", "not in the mood"));
    ANSWERS("{'execute': 'stone-add', 'arguments': {'name': 'gone', 'weight': 1, 'faces': []}}",
            ERROR("DeviceNotFound", "stone 'gone' is not there"));
    ANSWERS("{\"execute\": \"stone-weigh\", \"arguments\": {\"name\": \"broken\"}}",
            ERROR("GenericError", "the scale is broken: '\\uFFFD'"));
}

static void test_qmp_protocol__echoes_ids(void **state)
{
    static const char *const ids[] = {
        "null",
        "0",
        "-1",
        "1.5",
        "\"x\"",
        "[\"any\", 1]",
        "{\"a\": {\"b\": []}}",
        "18446744073709551615",
        "[-99999999999999999999]",
        "\"\\u00E9}\"",
    };

    (void)state;
    for (size_t i = 0; i < ARRAY_SIZE(ids); i++) {
        AUTO(free_ptr)
        char *good = xasprintf("{\"execute\": \"stone-weigh\", \"arguments\": {\"name\": \"a\"}, "
                               "\"id\": %s}",
                               ids[i]);
        AUTO(free_ptr)
        char *good_answer =
            xasprintf("{\"return\": [18446744073709551615], \"id\": %s}\r\n", ids[i]);
        AUTO(free_ptr) char *bad = xasprintf("{\"execute\": \"quit\", \"id\": %s}", ids[i]);
        AUTO(free_ptr)
        char *bad_answer = xasprintf(
            ERROR_ID("DeviceNotActive", "not in the mood", ", \"id\": %s") "\r\n", ids[i]);

        assert_talk(good, true, good_answer);
        assert_talk(bad, true, bad_answer);
    }
}

static void test_qmp_protocol__answers_keep_the_order(void **state)
{
    (void)state;
    ANSWERS(
        "{\"execute\": \"quit\", \"id\": 1}\n@\n{\"execute\": \"no-such\", \"id\": 2}"
        "{\"execute\": \"stone-weigh\", \"id\": 3, \"arguments\": {\"name\": \"a\"}}",
        ERROR_ID("DeviceNotActive", "not in the mood", ", \"id\": 1") "\r\n" ERROR(
            "GenericError",
            "JSON parse error: expected a value") "\r\n" ERROR_ID("CommandNotFound",
                                                                  "command 'no-such' does not exist",
                                                                  ", \"id\": 2") "\r\n"
                                                                                 "{\"return\": [18446744073709551615], \"id\": 3}");
}

static void test_qmp_protocol__pretty_text_is_indented(void **state)
{
    struct qmp_session s;
    AUTO(free_ptr) char *answer = NULL;

    (void)state;
    qmp_session_init(&s, &service, true);
    s.negotiated = true;
    answer = talk(
        &s, "{\"execute\": \"stone-weigh\", \"arguments\": {\"name\": \"a\"}, \"id\": {}}", 1000);
    assert_string_equal(
        answer, "{\n    \"return\": [\n        18446744073709551615\n    ], \"id\": {}\n}\r\n");
    qmp_session_release(&s);
}

static void test_qmp_protocol__stamps_events(void **state)
{
    const struct stone_fell_event data = {.name = (char *)(uintptr_t) "x", .height = 3};
    AUTO(free_ptr) char *text = qmp_event_text(event_stone_fell(&data), false, 1700000000, 5);
    AUTO(free_ptr) char *unknown = qmp_event_text(event_night(), false, -1, -1);

    (void)state;
    assert_string_equal(text,
                        "{\"event\": \"STONE_FELL\", \"data\": {\"name\": \"x\", \"height\": 3}, "
                        "\"timestamp\": {\"seconds\": 1700000000, \"microseconds\": 5}}\r\n");
    assert_string_equal(
        unknown,
        "{\"event\": \"NIGHT\", \"timestamp\": {\"seconds\": -1, \"microseconds\": -1}}\r\n");
    assert_null(qmp_event_text(NULL, false, 0, 0));
}

static void test_qmp_protocol__names_the_command_of_a_request(void **state)
{
    struct qmp_session s;
    struct qmp_request *request;
    size_t consumed;

    (void)state;
    qmp_session_init(&s, &service, false);
    assert_int_equal(qmp_session_feed(&s, "{'execute': 'quit'}", 19, &consumed, &request), 1);
    assert_string_equal(qmp_request_command(request), "quit");
    assert_null(qmp_request_free(request));
    assert_int_equal(qmp_session_feed(&s, "[]", 2, &consumed, &request), 1);
    assert_null(qmp_request_command(request));
    qmp_request_free(request);
    qmp_session_release(&s);
}

/* A request whose id nests as deep as the scanner allows. */
static char *deep_request(void)
{
    char opened[1024] = "";
    char closed[1024] = "";

    memset(opened, '[', 1023);
    memset(closed, ']', 1023);
    return xasprintf("{\"execute\": \"quit\", \"id\": %s%s}", opened, closed);
}

static void *run_request(void *arg)
{
    void **both = arg;

    return answer_now(both[0], both[1]);
}

/* QMP-1: reading it takes a thread's stack, but answering fits into 64 KiB. */
static void test_qmp_protocol__deep_ids_need_no_stack_to_answer(void **state)
{
    AUTO(free_ptr) char *text = deep_request();
    struct qmp_session s;
    struct qmp_request *request;
    size_t consumed;
    pthread_attr_t attributes;
    pthread_t thread;
    void *answer;
    void *both[2];

    (void)state;
    qmp_session_init(&s, &service, false);
    s.negotiated = true;
    assert_int_equal(qmp_session_feed(&s, text, strlen(text), &consumed, &request), 1);
    both[0] = request;
    both[1] = &s;
    assert_int_equal(pthread_attr_init(&attributes), 0);
    assert_int_equal(pthread_attr_setstacksize(&attributes, 64 * KIB), 0);
    assert_int_equal(pthread_create(&thread, &attributes, run_request, both), 0);
    assert_int_equal(pthread_join(thread, &answer), 0);
    assert_non_null(strstr(answer, "\"desc\": \"not in the mood\"}, \"id\": [[[["));
    free(answer);
    pthread_attr_destroy(&attributes);
    qmp_request_free(request);
    qmp_session_release(&s);
}

/* Lets alloc_fail_at() reach the allocations of the JSON library. */
static void *allocate_for_jansson(size_t size)
{
    return try_alloc(1, size);
}

/* A long request in small pieces: what came before is kept. */
static void test_qmp_protocol__puts_long_requests_together(void **state)
{
    AUTO(free_ptr) char *text = deep_request();
    AUTO(free_ptr) char *whole = NULL;
    AUTO(free_ptr) char *pieces = NULL;
    struct qmp_session s;

    (void)state;
    qmp_session_init(&s, &service, false);
    s.negotiated = true;
    whole = talk(&s, text, SIZE_MAX);
    pieces = talk(&s, text, 7);
    assert_string_equal(whole, pieces);
    assert_null(s.text);
    qmp_session_release(&s);
}

/* Every allocation that the client's data sizes may fail: then there is an answer that says so, or -ENOMEM, and no leak. */
static void test_qmp_protocol__survives_each_failed_allocation(void **state)
{
    const char *expected = "{\"return\": [18446744073709551615], \"id\": 1}\r\n";
    const char *text = "{'execute': 'stone-weigh', 'id': 1, 'arguments': {'name': 'a'}}";
    unsigned failures = 0;
    unsigned calls;

    (void)state;
    json_set_alloc_funcs(allocate_for_jansson, free);
    do {
        struct qmp_session s;
        struct qmp_request *request = NULL;
        size_t consumed;
        char *answer = NULL;
        int r;

        qmp_session_init(&s, &service, false);
        s.negotiated = true;
        (void)alloc_fail_at(failures + 1);
        r = qmp_session_feed(&s, text, strlen(text), &consumed, &request);
        if (r == 1)
            answer = answer_now(request, &s);
        calls = alloc_fail_at(0);
        if (r != 1)
            assert_int_equal(r, -ENOMEM);
        /* jansson takes a string for which it has no memory for a mistake in the text. */
        if (answer && !strstr(answer, "not enough memory") && !strstr(answer, "JSON parse error") &&
            strcmp(answer, expected) != 0)
            fail_msg("%u: %s", failures, answer);
        free(answer);
        qmp_request_free(request);
        qmp_session_release(&s);
        failures++;
    } while (failures <= calls);
    json_set_alloc_funcs(malloc, free);
    assert_true(failures >= 30);
}

static void test_qmp_protocol__introspection_is_json(void **state)
{
    json_t *list = json_loads(sample_introspection, 0, NULL);
    size_t commands = 0;
    size_t i;
    json_t *entity;

    (void)state;
    assert_true(json_is_array(list));
    json_array_foreach(list, i, entity) commands +=
        strcmp(json_string_value(json_object_get(entity, "meta-type")), "command") == 0;
    assert_int_equal(commands, sample_command_count);
    json_decref(list);
}
