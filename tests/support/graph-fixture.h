/* SPDX-License-Identifier: Apache-2.0 */
/*
 * For tests of graphs: loops to run on, nodes from JSON text, requests in a line. All of it is used within coroutines on the
 * control thread's loop, unless it says otherwise.
 */
#ifndef CAIRN_TESTS_GRAPH_FIXTURE_H
#define CAIRN_TESTS_GRAPH_FIXTURE_H

#include "base/alloc.h"
#include "base/json-in.h"
#include "base/macros.h"
#include "graph/backend.h"
#include "graph/driver.h"
#include "graph/graph.h"
#include "loop/scope.h"
#include "schema-types.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <stdlib.h>
#include <string.h>

/* Runs the body in a coroutine on a loop of this engine. */
static inline void on_engine(enum loop_engine engine, co_entry_fn *body, const void *arg)
{
    struct error *err = NULL;

    if (loop_run_main(engine, "control", body, (void *)(uintptr_t)arg, &err) < 0)
        fail_msg("%s", error_text(err));
}

static inline void on_both(co_entry_fn *body, const void *arg)
{
    on_engine(LOOP_ENGINE_IO_URING, body, arg);
    on_engine(LOOP_ENGINE_THREADS, body, arg);
}

/* Adds a node as blockdev-add does; single quotes will do in the text. */
static inline int add_node(struct graph *g, struct error **err, const char *fmt, ...)
    PRINTF_LIKE(3, 4);

static inline int add_node(struct graph *g, struct error **err, const char *fmt, ...)
{
    struct node_options options = {.node_name = NULL};
    json_t *tree;
    va_list args;
    char *text;
    int r;

    va_start(args, fmt);
    text = xvasprintf(fmt, args);
    va_end(args);
    for (char *p = text; *p; p++) {
        if (*p == '\'')
            *p = '"';
    }
    tree = json_loads(text, 0, NULL);
    assert_non_null(tree);
    r = json_in(&node_options_type, tree, JSON_IN_STRICT, "", &options, err);
    if (r == 0)
        r = graph_co_add(g, &options, err);
    schema_free(&node_options_type, &options);
    json_decref(tree);
    free(text);
    return r;
}

#define must_add(g, ...)                                                                           \
    do {                                                                                           \
        struct error *add_err = NULL;                                                              \
                                                                                                   \
        if (add_node((g), &add_err, __VA_ARGS__) < 0)                                              \
            fail_msg("%s", error_text(add_err));                                                   \
    } while (0)

/* Adding fails with this errno and a message that has this in it. */
#define must_refuse(errnum, text, g, ...)                                                          \
    do {                                                                                           \
        struct error *add_err = NULL;                                                              \
                                                                                                   \
        assert_int_equal(add_node((g), &add_err, __VA_ARGS__), -(errnum));                         \
        must_say(add_err, (text));                                                                 \
        error_free(&add_err);                                                                      \
    } while (0)

static inline void must_say(const struct error *err, const char *text)
{
    if (!strstr(error_text(err), text))
        fail_msg("'%s' does not say '%s'", error_text(err), text);
}

static inline void must_del(struct graph *g, const char *name)
{
    struct error *err = NULL;

    if (graph_co_del(g, name, &err) < 0)
        fail_msg("%s", error_text(err));
}

#define ACCESS_RW ((struct access){.wants = ACCESS_READ | ACCESS_WRITE, .tolerates = ACCESS_ALL})

/* A backend, attached to this loop. */
static inline struct backend *must_attach(struct graph *g, const char *node, struct access access,
                                          const char *owner)
{
    struct error *err = NULL;
    struct backend *b;

    if (backend_co_new(&b, g, node, access, owner, &err) < 0)
        fail_msg("%s", error_text(err));
    assert_int_equal(backend_attach(b), 0);
    return b;
}

/* One request; data may be NULL where the kind has none. On any attached loop. */
static inline int send_request(struct backend *b, enum request_kind kind, unsigned flags,
                               uint64_t offset, uint64_t len, const void *data)
{
    struct iovec iov = {(void *)(uintptr_t)data, (size_t)len};
    struct request req = {
        .kind = kind,
        .flags = flags,
        .offset = offset,
        .len = len,
        .iov = &iov,
        .iov_count = data ? 1 : 0,
    };

    return backend_co_request(b, &req);
}

static inline int read_at(struct backend *b, uint64_t offset, uint64_t len, void *data)
{
    return send_request(b, REQUEST_READ, 0, offset, len, data);
}

static inline int write_at(struct backend *b, uint64_t offset, uint64_t len, const void *data)
{
    return send_request(b, REQUEST_WRITE, 0, offset, len, data);
}

static inline int flush(struct backend *b)
{
    return send_request(b, REQUEST_FLUSH, 0, 0, 0, NULL);
}

#endif
