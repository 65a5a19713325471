/* SPDX-License-Identifier: Apache-2.0 */
/* The control sockets with a real graph, on all engines: order, sessions beside each other, bounds, events, the end. */
#include "base/alloc.h"
#include "base/log.h"
#include "base/macros.h"
#include "control/control.h"
#include "control/qmp-server.h"
#include "formats/list.h"
#include "graph/backend.h"
#include "graph/change.h"
#include "graph/driver.h"
#include "loop/co.h"
#include "loop/loop.h"
#include "loop/scope.h"
#include "loop/sim/sim.h"
#include "protocols/list.h"
#include "schema-types.h"
#include "seeds.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define SOON (loop_clock() + 20 * NS_PER_S)

static const enum loop_engine real_engines[] = {LOOP_ENGINE_IO_URING, LOOP_ENGINE_THREADS};

static void on_real(co_entry_fn *body)
{
    for (size_t i = 0; i < ARRAY_SIZE(real_engines); i++) {
        struct error *err = NULL;

        if (loop_run_main(real_engines[i], "test", body, NULL, &err) < 0)
            fail_msg("%s", error_text(err));
    }
}

static void on_all(co_entry_fn *body)
{
    on_real(body);
    TEST_SEEDS (seed) {
        struct sim_options o;

        sim_options_init(&o, seed);
        assert_int_equal(sim_run(&o, body, NULL), SIM_RETURNED);
    }
}

/* A daemon in this process, and what it said. */
struct fixture {
    struct loop_thread *io;
    struct control *control;
    struct qmp_server *server;
    unsigned quits;
    char path[64];
};

static void count_quit(void *arg)
{
    ((struct fixture *)arg)->quits++;
}

static void begin_with(struct fixture *f, const struct driver *const *const *drivers)
{
    struct error *err = NULL;
    struct socket_address address = {.family = SOCKET_UNIX, .path = f->path};
    struct loop *loop;

    *f = (struct fixture){.quits = 0};
    (void)snprintf(f->path, sizeof(f->path), "/tmp/test-qmp-server.%d.sock", (int)getpid());
    assert_int_equal(loop_thread_start(&f->io, "io", &err), 0);
    loop = loop_thread_loop(f->io);
    f->control = control_new(drivers, &loop, 1, &loop, 1, count_quit, f);
    assert_int_equal(qmp_server_co_new(&f->server, f->control, &address, &err), 0);
    assert_int_equal(qmp_server_start(f->server, false, &err), 0);
}

static void begin(struct fixture *f)
{
    static const struct driver *const *const drivers[] = {protocol_drivers, format_drivers, NULL};

    begin_with(f, drivers);
}

static void end(struct fixture *f)
{
    assert_null(control_co_free(f->control));
    loop_thread_stop(f->io);
}

struct client {
    struct socket *socket;
    char buf[4096];
    size_t len;
};

static void client_open(struct client *c, const struct fixture *f)
{
    struct socket_address address = {.family = SOCKET_UNIX, .path = f->path};
    struct error *err = NULL;

    c->len = 0;
    if (socket_co_connect(&c->socket, &address, SOON, &err) < 0)
        fail_msg("%s", error_text(err));
}

static void client_close(struct client *c)
{
    c->socket = socket_free(c->socket);
}

static void say(struct client *c, const char *text)
{
    struct iovec iov = {(char *)(uintptr_t)text, strlen(text)};

    assert_int_equal(socket_co_send(c->socket, &iov, 1, SOON), 0);
}

/* The next line, without its end. At the end of the stream: NULL. The caller's to free. */
static char *hear(struct client *c)
{
    char *line = NULL;
    size_t len = 0;

    for (;;) {
        char *newline = memchr(c->buf, '\n', c->len);
        size_t part = newline ? (size_t)(newline - c->buf) + 1 : c->len;
        int64_t n;

        line = realloc(line, len + part + 1);
        memcpy(line + len, c->buf, part);
        len += part;
        c->len -= part;
        memmove(c->buf, c->buf + part, c->len);
        if (newline) {
            assert_true(len >= 2 && line[len - 2] == '\r');
            line[len - 2] = '\0';
            return line;
        }
        n = socket_co_recv(c->socket, c->buf, sizeof(c->buf), SOON);
        if (n <= 0) {
            assert_true(n == 0 || n == -ECONNRESET || n == -EPIPE);
            free(line);
            return NULL;
        }
        c->len = (size_t)n;
    }
}

static void assert_hears(struct client *c, const char *part)
{
    char *line = hear(c);

    if (!line || !strstr(line, part))
        fail_msg("heard '%s' instead of '%s'", line ? line : "the end", part);
    free(line);
}

static void assert_ends(struct client *c)
{
    char *line = hear(c);

    if (line)
        fail_msg("heard '%s' instead of the end", line);
}

#define NEGOTIATE "{'execute': 'qmp_capabilities'}"

static void client_negotiate(struct client *c, const struct fixture *f)
{
    client_open(c, f);
    assert_hears(c, "{\"QMP\": ");
    say(c, NEGOTIATE);
    assert_hears(c, "{\"return\": {}}");
}

static void answers_in_order_body(void *arg)
{
    struct fixture f;
    struct client c;

    (void)arg;
    begin(&f);
    client_negotiate(&c, &f);
    say(&c, "{'execute': 'blockdev-add', 'arguments': {'driver': 'null-co', 'node-name': 'n0'}, "
            "'id': 1}"
            "{'execute': 'blockdev-add', 'arguments': {'driver': 'null-co', 'node-name': 'n0'}, "
            "'id': [2]}"
            "nonsense\n{'execute': 'query-block', 'id': null} {'execute': 'qui");
    assert_hears(&c, "{\"return\": {}, \"id\": 1}");
    assert_hears(&c, "there is a node 'n0' already\"}, \"id\": [2]}");
    assert_hears(&c, "\"class\": \"GenericError\"");
    assert_hears(&c, "{\"return\": [], \"id\": null}");
    assert_int_equal(f.quits, 0);
    say(&c, "t'}");
    assert_hears(&c, "{\"return\": {}}");
    assert_int_equal(f.quits, 1);
    client_close(&c);
    end(&f);
}

static void test_qmp_server__answers_in_order(void **state)
{
    (void)state;
    on_all(answers_in_order_body);
}

/* P4: a command that waits for a change holds up its own session only, and who holds the node can be asked for. */
static void sessions_beside_body(void *arg)
{
    struct error *err = NULL;
    struct change change;
    struct client waits;
    struct client asks;
    struct fixture f;

    (void)arg;
    begin(&f);
    client_negotiate(&waits, &f);
    client_negotiate(&asks, &f);
    say(&waits,
        "{'execute': 'blockdev-add', 'arguments': {'driver': 'null-co', 'node-name': 'n0'}}");
    assert_hears(&waits, "return");

    change_init(&change, f.control->graph, "the test");
    assert_int_equal(change_add_root(&change, "n0", &err), 0);
    assert_int_equal(change_co_reserve(&change, &err), 0);
    say(&waits, "{'execute': 'blockdev-del', 'arguments': {'node-name': 'n0'}, 'id': 'del'}"
                "{'execute': 'query-block', 'id': 'after'}");
    while (f.control->running < 1)
        co_yield ();
    for (int i = 0; i < 3; i++) {
        say(&asks, "{'execute': 'query-graph'}");
        assert_hears(&asks, "\"reserved-by\": \"the test\"");
    }
    assert_int_equal(f.control->running, 1);
    change_end(&change);
    assert_hears(&waits, "{\"return\": {}, \"id\": \"del\"}");
    assert_hears(&waits, "{\"return\": [], \"id\": \"after\"}");
    client_close(&waits);
    client_close(&asks);
    end(&f);
}

static void test_qmp_server__runs_sessions_beside_each_other(void **state)
{
    (void)state;
    on_all(sessions_beside_body);
}

static json_t *event(const char *id)
{
    char *copy = xstrdup(id);
    const struct block_export_deleted_event data = {.id = copy};
    json_t *e = event_block_export_deleted(&data);

    free(copy);
    return e;
}

static void events_body(void *arg)
{
    struct client in;
    struct client out;
    struct fixture f;

    (void)arg;
    begin(&f);
    client_negotiate(&in, &f);
    client_open(&out, &f); /* does not negotiate */
    assert_hears(&out, "{\"QMP\": ");
    control_event(f.control, event("e0"));
    control_event(f.control, event("e1"));
    assert_hears(&in, "\"data\": {\"id\": \"e0\"}, \"timestamp\": {\"seconds\": ");
    assert_hears(&in, "\"data\": {\"id\": \"e1\"}");
    say(&out, NEGOTIATE);
    assert_hears(&out, "return"); /* not the events: they were before */
    end(&f);
    assert_ends(&in);
    assert_ends(&out);
    client_close(&in);
    client_close(&out);
}

static void test_qmp_server__sends_events_to_who_negotiated(void **state)
{
    (void)state;
    on_all(events_body);
}

static unsigned warnings;

static void count_warning(enum log_level level, const char *line)
{
    warnings += level == LOG_WARNING && strstr(line, "does not read its events");
}

/* SERVER-2 */
static void slow_reader_body(void *arg)
{
    char *big = xnew_n(char, MIB + 1);
    struct client sleeps;
    struct client reads;
    struct fixture f;
    char *line;

    (void)arg;
    memset(big, 'x', MIB);
    warnings = 0;
    log_set_hook(count_warning, LOG_WARNING);
    begin(&f);
    client_negotiate(&sleeps, &f);
    client_negotiate(&reads, &f);
    for (unsigned i = 0; i < 2 * QMP_UNSENT_EVENTS_MAX / MIB; i++) {
        control_event(f.control, event(big));
        assert_hears(&reads, "xxxx");
    }
    assert_int_equal(warnings, 1);
    assert_int_equal(f.server->client_count, 1);
    while ((line = hear(&sleeps))) /* what was in the socket, then the end */
        free(line);
    client_close(&sleeps);
    client_close(&reads);
    end(&f);
    log_set_hook(NULL, LOG_WARNING);
    free(big);
}

static void test_qmp_server__drops_who_does_not_read_events(void **state)
{
    (void)state;
    on_real(slow_reader_body);
}

/*
 * SERVER-1: who does not read answers is not read from, and loses nothing. Padding and long answers fill what sockets hold,
 * which is megabytes.
 */
static void pipelined_body(void *arg)
{
    enum { COUNT = 600, BYTES = 32 << 10, TOTAL = COUNT * BYTES };

    char *all = xnew_n(char, TOTAL + 1);
    struct client c;
    struct fixture f;
    size_t len = 0;
    size_t sent = 0;
    int64_t n;

    (void)arg;
    for (unsigned i = 0; i < COUNT; i++, len += BYTES) {
        int text = sprintf(all + len, "{'execute': 'query-qmp-schema', 'id': %u}", i);

        memset(all + len + text, ' ', (size_t)(BYTES - text));
    }
    begin(&f);
    client_negotiate(&c, &f);
    do { /* until nothing goes any more for a while */
        struct iovec iov = {all + sent, len - sent};

        n = socket_try_send(c.socket, &iov, 1);
        if (n == -EAGAIN) {
            co_sleep_until(loop_clock() + 100 * NS_PER_MS);
            n = socket_try_send(c.socket, &iov, 1);
        }
        sent += n > 0 ? (size_t)n : 0;
    } while (n > 0 && sent < len);
    assert_int_equal(n, -EAGAIN);
    for (unsigned i = 0; i < sent / BYTES; i++) {
        char id[32];

        (void)snprintf(id, sizeof(id), "\"id\": %u}", i);
        assert_hears(&c, id);
    }
    client_close(&c);
    end(&f);
    free(all);
}

static void test_qmp_server__reads_no_further_than_it_answers(void **state)
{
    (void)state;
    on_real(pipelined_body);
}

/* As deep as the scanner allows: parsing it needs more stack than a coroutine has. */
static void deep_body(void *arg)
{
    char deep[2 * 1020 + 1];
    struct client c;
    struct fixture f;

    (void)arg;
    memset(deep, '[', 1020);
    memset(deep + 1020, ']', 1020);
    deep[sizeof(deep) - 1] = '\0';
    begin(&f);
    client_negotiate(&c, &f);
    say(&c, "{'execute': 'query-block', 'id': ");
    say(&c, deep);
    say(&c, "}");
    assert_hears(&c, deep);
    for (int i = 0; i < 100; i++)
        say(&c, deep);
    for (int i = 0; i < 100; i++)
        assert_hears(&c, "a request must be a JSON object");
    client_close(&c);
    end(&f);
}

static void test_qmp_server__takes_deep_nesting(void **state)
{
    (void)state;
    on_real(deep_body);
}

static void crowd_body(void *arg)
{
    static struct client clients[QMP_CLIENTS_MAX + 1];
    struct client *late = &clients[QMP_CLIENTS_MAX];
    struct fixture f;
    char byte;

    (void)arg;
    begin(&f);
    for (unsigned i = 0; i < QMP_CLIENTS_MAX; i++)
        client_negotiate(&clients[i], &f);
    client_open(late, &f);
    assert_int_equal(socket_co_recv(late->socket, &byte, 1, loop_clock() + 20 * NS_PER_MS),
                     -ETIMEDOUT);
    client_close(&clients[0]);
    assert_hears(late, "{\"QMP\": ");
    for (unsigned i = 1; i <= QMP_CLIENTS_MAX; i++)
        client_close(&clients[i]);
    end(&f);
}

static void test_qmp_server__lets_a_crowd_wait(void **state)
{
    (void)state;
    on_real(crowd_body);
}

/* A disk that never comes up. */
static int stuck_co_open(struct node *node, const void *options, struct error **err)
{
    int r = co_sleep_until(LOOP_FOREVER);

    (void)node;
    (void)options;
    return error_set(err, -r, "gave up");
}

static void stuck_co_close(struct node *node)
{
    (void)node;
    fail_msg("closed what was never opened");
}

/* The end comes although a command waits for ever; what was said before is still heard, then the stream ends. */
static void end_cancels_body(void *arg)
{
    static const struct driver stuck = {
        .name = "null-co",
        .kind = DRIVER_PROTOCOL,
        .state_size = 1,
        .options = &null_co_options_type,
        .co_open = stuck_co_open,
        .co_close = stuck_co_close,
    };
    static const struct driver *const list[] = {&stuck, NULL};
    static const struct driver *const *const drivers[] = {list, NULL};
    struct client waits;
    struct client c;
    struct fixture f;

    (void)arg;
    begin_with(&f, drivers);
    graph_set_change_deadline(f.control->graph, 20 * NS_PER_MS);
    client_negotiate(&waits, &f);
    client_negotiate(&c, &f);
    say(&waits,
        "{'execute': 'blockdev-add', 'arguments': {'driver': 'null-co', 'node-name': 'n0'}}");
    for (bool begun = false; !begun;) {
        char *line;

        say(&c, "{'execute': 'query-graph'}");
        line = hear(&c);
        assert_non_null(line);
        begun = strstr(line, "\"reserved-by\": \"blockdev-add 'n0'\"");
        free(line);
    }
    say(&c, "{'execute': 'quit'}");
    assert_hears(&c, "return");
    control_event(f.control, event("last"));
    end(&f);
    assert_hears(&c, "\"last\"");
    assert_ends(&c);
    client_close(&waits);
    client_close(&c);
}

static void test_qmp_server__ends_although_a_command_waits(void **state)
{
    (void)state;
    on_all(end_cancels_body);
}
