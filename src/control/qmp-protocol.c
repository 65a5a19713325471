/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Requests are judged in two steps. When the text is complete: its envelope, the command's name, the arguments; the tree is
 * freed there. When its turn comes: whether the session may run it at all, then the command. So an error of the envelope is
 * answered in any state, and before negotiation every command is answered alike, whether it exists or not.
 *
 * The `id`, which may be any JSON value, is kept as text: it may nest as deep as the scanner allows, and answers are made
 * in coroutines, whose stacks do not hold that (QMP-1).
 */
#include "control/qmp-protocol.h"

#include "base/alloc.h"
#include "base/json-in.h"
#include "base/json-out.h"
#include "base/json-text.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define NEGOTIATION_COMMAND "qmp_capabilities"

struct qmp_request {
    char *id;                          /* JSON text, or NULL */
    const struct qmp_command *command; /* NULL if there is none of that name */
    void *args;                        /* of command's type; NULL after an error */
    /* Why it cannot run: found in the envelope, or in the command's name and arguments. At most one is set. */
    struct error *envelope_error;
    struct error *command_error;
};

void qmp_session_init(struct qmp_session *s, const struct qmp_service *service, bool pretty)
{
    *s = (struct qmp_session){.service = service, .pretty = pretty};
}

static void forget_text(struct qmp_session *s)
{
    free(s->text);
    s->text = NULL;
    s->text_len = 0;
    s->text_size = 0;
}

void qmp_session_release(struct qmp_session *s)
{
    forget_text(s);
}

void qmp_session_negotiate(struct qmp_session *s)
{
    s->negotiated = true;
}

/* A line from a tree, which this takes. */
static char *line_from_tree(json_t *tree, bool pretty)
{
    AUTO(free_ptr) char *text = tree ? json_text_dump(tree, pretty) : NULL;
    char *line = NULL;

    json_decref(tree);
    if (text) {
        line = try_new_n(char, strlen(text) + sizeof("\r\n"));
        if (line)
            (void)stpcpy(stpcpy(line, text), "\r\n");
    }
    return line;
}

char *qmp_session_greeting(const struct qmp_session *s)
{
    const struct qmp_service *v = s->service;

    return line_from_tree(json_pack("{s:{s:{s:{s:i, s:i, s:i}, s:s}, s:[]}}", "QMP", "version",
                                    "qemu", "major", (int)v->major, "minor", (int)v->minor, "micro",
                                    (int)v->micro, "package", v->package, "capabilities"),
                          s->pretty);
}

char *qmp_event_text(json_t *event, bool pretty, int64_t seconds, int64_t microseconds)
{
    json_t *timestamp = json_pack("{s:I, s:I}", "seconds", (json_int_t)seconds, "microseconds",
                                  (json_int_t)microseconds);

    if (event && json_object_set_new(event, "timestamp", timestamp) < 0) {
        json_decref(event);
        return NULL;
    }
    if (!event)
        json_decref(timestamp);
    return line_from_tree(event, pretty);
}

static const struct qmp_command *find_command(const struct qmp_service *service, const char *name)
{
    for (size_t i = 0; i < service->command_count; i++)
        if (strcmp(service->commands[i].schema->name, name) == 0)
            return &service->commands[i];
    return NULL;
}

static int check_envelope(const json_t *tree, struct error **err)
{
    const char *name;
    json_t *v;

    if (!json_is_object(tree))
        return error_set(err, EINVAL, "a request must be a JSON object");
    json_object_foreach((json_t *)(uintptr_t)tree, name, v)
    { /* the macro reads only */
        if (strcmp(name, "exec-oob") == 0)
            return error_set(
                err, EINVAL,
                "member 'exec-oob' is unexpected: out-of-band execution is not offered");
        if (strcmp(name, "execute") != 0 && strcmp(name, "arguments") != 0 &&
            strcmp(name, "id") != 0)
            return error_set(err, EINVAL, "member '%.64s' is unexpected", name);
    }
    v = json_object_get(tree, "execute");
    if (!v)
        return error_set(err, EINVAL, "member 'execute' is missing");
    if (!json_is_string(v) || json_big_integer(v))
        return error_set(err, EINVAL, "member 'execute' must be a string");
    v = json_object_get(tree, "arguments");
    if (v && !json_is_object(v))
        return error_set(err, EINVAL, "member 'arguments' must be an object");
    return 0;
}

static int parse_command(const struct qmp_service *service, const json_t *tree,
                         struct qmp_request *request, struct error **err)
{
    const char *name = json_string_value(json_object_get(tree, "execute"));
    const struct qmp_command *command = find_command(service, name);
    const struct schema_type no_arguments = {.name = "none", .kind = SCHEMA_STRUCT};
    json_t *given = json_object_get(tree, "arguments");
    json_t *nothing = given ? NULL : json_object();
    const struct schema_type *type;
    int r;

    if (!command) {
        json_decref(nothing);
        return error_set_class(err, ERROR_COMMAND_NOT_FOUND, ENOENT,
                               "command '%.64s' does not exist", name);
    }
    request->command = command;
    type = command->schema->args ? command->schema->args : &no_arguments;
    request->args = try_alloc(1, MAX(type->size, (size_t)1));
    if (!request->args || (!given && !nothing))
        r = error_set(err, ENOMEM, "not enough memory");
    else
        r = json_in(type, given ? given : nothing, JSON_IN_STRICT, "arguments", request->args, err);
    json_decref(nothing);
    if (r < 0) {
        free(request->args);
        request->args = NULL;
    }
    return r;
}

/* Fills the request from the text of one value. What is wrong with the value becomes the request's error. */
static int parse_request(const struct qmp_service *service, const char *text, size_t len,
                         struct qmp_request *request)
{
    json_t *tree;
    json_t *id;
    int r = json_text_load(text, len, &tree, &request->envelope_error);

    if (r < 0)
        return r == -ENOMEM ? r : 0;
    id = json_object_get(tree, "id");
    if (id) {
        request->id = json_text_dump(id, false); /* QMP-1 */
        if (!request->id) {
            json_decref(tree);
            return -ENOMEM;
        }
    }
    r = check_envelope(tree, &request->envelope_error);
    if (r == 0)
        (void)parse_command(service, tree, request,
                            &request->command_error); /* the error is the answer */
    json_decref(tree);
    return 0;
}

/* Adds to the value that is being received. The scanner bounds its length; memory grows with what has come, by halves. */
static int keep_text(struct qmp_session *s, const char *bytes, size_t len)
{
    if (s->text_size - s->text_len < len) {
        size_t size = s->text_len + s->text_len / 2 + len + 256;
        char *longer = try_new_n(char, size);

        if (!longer)
            return -ENOMEM;
        if (s->text_len > 0)
            memcpy(longer, s->text, s->text_len);
        free(s->text);
        s->text = longer;
        s->text_size = size;
    }
    if (len > 0)
        memcpy(s->text + s->text_len, bytes, len);
    s->text_len += len;
    return 0;
}

static int request_from_text(struct qmp_session *s, const char *scan_error,
                             struct qmp_request **ret_request)
{
    struct qmp_request *request = try_new(struct qmp_request);
    int r = request ? 0 : -ENOMEM;

    if (request && scan_error)
        error_set(&request->envelope_error, EINVAL, "%s", scan_error);
    else if (request)
        r = parse_request(s->service, s->text, s->text_len, request);
    forget_text(s);
    if (r < 0) {
        qmp_request_free(request);
        return r;
    }
    *ret_request = request;
    return 1;
}

int qmp_session_feed(struct qmp_session *s, const char *buf, size_t len, size_t *ret_consumed,
                     struct qmp_request **ret_request)
{
    size_t start;
    size_t part;
    const char *scan_error = NULL;
    int r;

    *ret_consumed = 0;
    if (len == 0)
        return 0;
    switch (json_scan_feed(&s->scan, buf, len, ret_consumed, &start, &part, &scan_error)) {
    case JSON_SCAN_MORE:
        return keep_text(s, buf + start, part);
    case JSON_SCAN_VALUE:
        r = keep_text(s, buf + start, part);
        return r < 0 ? r : request_from_text(s, NULL, ret_request);
    case JSON_SCAN_ERROR:
        break;
    }
    return request_from_text(s, scan_error, ret_request);
}

static const char *class_name(enum error_class class)
{
    switch (class) {
    case ERROR_GENERIC:
        return "GenericError";
    case ERROR_COMMAND_NOT_FOUND:
        return "CommandNotFound";
    case ERROR_DEVICE_NOT_ACTIVE:
        return "DeviceNotActive";
    case ERROR_DEVICE_NOT_FOUND:
        return "DeviceNotFound";
    }
    return "GenericError";
}

/* Puts the id's text into an answer's line, before the brace that closes it. */
static char *line_with_id(char *line, const char *id)
{
    char *brace;
    char *whole;

    if (!line || !id)
        return line;
    brace = strrchr(line, '}');
    while (brace > line && (brace[-1] == '\n' || brace[-1] == ' '))
        brace--;
    whole = try_new_n(char, strlen(line) + strlen(id) + sizeof(", \"id\": "));
    if (whole) {
        char *end = mempcpy(whole, line, (size_t)(brace - line));

        end = stpcpy(end, ", \"id\": ");
        end = stpcpy(end, id);
        (void)stpcpy(end, brace);
    }
    free(line);
    return whole;
}

static char *error_line(const struct error *err, const char *id, bool pretty)
{
    json_t *desc = json_string_lossy(error_text(err));
    json_t *tree = desc ? json_pack("{s:{s:s, s:o}}", "error", "class",
                                    class_name(error_get_class(err)), "desc", desc)
                        : NULL;

    return line_with_id(line_from_tree(tree, pretty), id);
}

static char *return_line(const struct schema_type *type, const void *ret, const char *id,
                         bool pretty)
{
    json_t *value = type ? json_out(type, ret) : json_object();

    return line_with_id(line_from_tree(value ? json_pack("{s:o}", "return", value) : NULL, pretty),
                        id);
}

/* Whether the session's state lets this request run; before negotiation nothing is told about other commands. */
static int check_state(const struct qmp_session *s, const struct qmp_request *request,
                       struct error **err)
{
    const char *name = qmp_request_command(request);
    bool negotiates = name && strcmp(name, NEGOTIATION_COMMAND) == 0;

    if (!s->negotiated && !negotiates)
        return error_set_class(err, ERROR_COMMAND_NOT_FOUND, EPERM,
                               "expecting capabilities negotiation with '" NEGOTIATION_COMMAND
                               "' first");
    if (s->negotiated && negotiates &&
        !request->command_error) /* which is told first, as the peer does */
        return error_set_class(err, ERROR_COMMAND_NOT_FOUND, EPERM,
                               "capabilities negotiation is already complete");
    return 0;
}

char *qmp_request_run(const struct qmp_request *request, struct qmp_session *s)
{
    AUTO(error_free) struct error *err = NULL;
    AUTO(free_ptr) void *ret = NULL;
    const struct schema_type *type;
    char *line;

    if (request->envelope_error)
        return error_line(request->envelope_error, request->id, s->pretty);
    if (check_state(s, request, &err) < 0)
        return error_line(err, request->id, s->pretty);
    if (request->command_error)
        return error_line(request->command_error, request->id, s->pretty);
    type = request->command->schema->ret;
    if (type) {
        ret = try_alloc(1, type->size);
        if (!ret)
            return NULL;
    }
    /* Yields: the server keeps the session while its request runs. */
    if (request->command->run(s, request->args, ret, &err) < 0)
        line = error_line(err, request->id, s->pretty);
    else
        line = return_line(type, ret, request->id, s->pretty);
    if (type)
        schema_free(type, ret);
    return line;
}

const char *qmp_request_command(const struct qmp_request *request)
{
    return request->command ? request->command->schema->name : NULL;
}

struct qmp_request *qmp_request_free(struct qmp_request *request)
{
    if (!request)
        return NULL;
    if (request->args && request->command->schema->args)
        schema_free(request->command->schema->args, request->args);
    free(request->args);
    free(request->id);
    error_free(&request->envelope_error);
    error_free(&request->command_error);
    free(request);
    return NULL;
}
