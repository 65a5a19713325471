/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Bytes of a hostile client through the whole way in: scanner, JSON, envelope, arguments of every command; and out again,
 * as the arguments come back as the answer. Input that starts with '=' is a command line's option instead.
 */
#include "schema-types.h"

#include "base/json-out.h"
#include "base/json-text.h"
#include "base/keyval.h"
#include "control/qmp-protocol.h"

#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define COMMANDS_MAX 64

/* What was parsed can be written, and is parsed again to the same text. */
static void go_round(const struct schema_type *type, const void *value)
{
    AUTO(error_free) struct error *err = NULL;
    json_t *first = json_out(type, value);
    json_t *second;
    void *again = calloc(1, type->size + 1);
    char *first_text;
    char *second_text;

    if (!first || json_in(type, first, JSON_IN_STRICT, "again", again, &err) < 0)
        abort();
    second = json_out(type, again);
    first_text = json_text_dump(first, false);
    second_text = json_text_dump(second, true);
    if (!first_text || !second_text)
        abort();
    json_decref(second);
    if (json_text_load(second_text, strlen(second_text), &second, &err) < 0 ||
        !json_equal(first, second))
        abort();
    free(first_text);
    free(second_text);
    json_decref(first);
    json_decref(second);
    schema_free(type, again);
    free(again);
}

/* The command whose turn it is: one handler serves all. */
static const struct schema_command *running;

static int run(struct qmp_session *session, const void *args, void *ret, struct error **err)
{
    (void)ret; /* an error returns nothing */
    qmp_session_negotiate(session);
    if (running->args)
        go_round(running->args, args);
    return error_set(err, EIO, "fuzzing");
}

static const struct qmp_service *fuzz_service(void)
{
    static struct qmp_command commands[COMMANDS_MAX];
    static struct qmp_service service = {.commands = commands, .package = "fuzz"};

    for (size_t i = 0; i < schema_command_count && i < COMMANDS_MAX; i++)
        commands[i] = (struct qmp_command){&schema_commands[i], run};
    service.command_count =
        schema_command_count < COMMANDS_MAX ? schema_command_count : COMMANDS_MAX;
    return &service;
}

static void find_running(const char *name)
{
    for (size_t i = 0; i < schema_command_count; i++)
        if (strcmp(schema_commands[i].name, name) == 0)
            running = &schema_commands[i];
}

/* Handlers here never yield, so that no coroutine is needed: called by pointer, which the context check does not follow. */
static char *(*const answer_now)(const struct qmp_request *request,
                                 struct qmp_session *s) = qmp_request_run;

static void fuzz_session(const char *bytes, size_t size)
{
    struct qmp_session s;
    size_t pos = 0;
    /* Where the first read ends; so that values are cut in all places. */
    size_t part = size > 0 ? (unsigned char)bytes[size - 1] : 0;

    qmp_session_init(&s, fuzz_service(), size % 2);
    s.negotiated = size % 3;
    while (pos < size) {
        struct qmp_request *request = NULL;
        size_t consumed;
        size_t n = part > 0 && part < size - pos ? part : size - pos;
        int r = qmp_session_feed(&s, bytes + pos, n, &consumed, &request);

        if (r < 0 || consumed > n)
            abort();
        pos += consumed;
        if (r > 0) {
            char *answer;

            if (qmp_request_command(request))
                find_running(qmp_request_command(request));
            answer = answer_now(request, &s);
            if (!answer || strcmp(answer + strlen(answer) - 2, "\r\n") != 0)
                abort();
            free(answer);
            qmp_request_free(request);
        }
    }
    qmp_session_release(&s);
}

static void fuzz_option(const char *text)
{
    AUTO(error_free) struct error *err = NULL;
    struct node_options options;

    if (keyval_in(&node_options_type, text, "driver", &options, &err) < 0)
        return;
    schema_free(&node_options_type, &options);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    char *text = malloc(size + 1);

    memcpy(text, data, size);
    text[size] = '\0';
    if (size > 0 && text[0] == '=')
        fuzz_option(text + 1);
    else
        fuzz_session(text, size);
    free(text);
    return 0;
}
