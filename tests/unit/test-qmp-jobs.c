/* SPDX-License-Identifier: Apache-2.0 */
/* Jobs over the control protocol: each command and each event has the peer's members, and errors have the peer's classes. */
#include "control/control.h"
#include "control/qmp-server.h"
#include "formats/list.h"
#include "job-fixture.h"
#include "loop/sim/sim.h"
#include "loop/socket.h"
#include "protocols/list.h"
#include "seeds.h"

#include <unistd.h>

#define HEARD_MAX 16
#define SOON      (loop_clock() + PATIENCE_NS)

static const struct driver *const *const drivers[] = {protocol_drivers, format_drivers, NULL};

struct fixture {
    struct loop_thread *io;
    struct loop_thread *copy;
    struct control *control;
    struct qmp_server *server;
    struct socket *client;
    char path[64];
    char buf[8192];
    size_t len;
    char *heard[HEARD_MAX]; /* lines that nobody has asked for yet */
    unsigned heard_count;
};

static void no_quit(void *arg)
{
    (void)arg;
}

/* The next line, without its end. */
static char *hear(struct fixture *f)
{
    char *newline;
    char *line;

    while (!(newline = memchr(f->buf, '\n', f->len))) {
        int64_t n = socket_co_recv(f->client, f->buf + f->len, sizeof(f->buf) - f->len, SOON);

        assert_true(n > 0);
        f->len += (size_t)n;
    }
    newline[-1] = '\0';
    line = xstrdup(f->buf);
    f->len -= (size_t)(newline + 1 - f->buf);
    memmove(f->buf, newline + 1, f->len);
    return line;
}

/* The next event, or the next answer: each come in order, but not both together. The caller's to free. */
static char *hear_next(struct fixture *f, bool event)
{
    for (;;) {
        for (unsigned i = 0; i < f->heard_count; i++) {
            char *line = f->heard[i];

            if ((strncmp(line, "{\"event\"", 8) == 0) != event)
                continue;
            f->heard_count--;
            memmove(&f->heard[i], &f->heard[i + 1], (f->heard_count - i) * sizeof(char *));
            return line;
        }
        assert_true(f->heard_count < HEARD_MAX);
        f->heard[f->heard_count++] = hear(f);
    }
}

static void must_hear_one(struct fixture *f, bool event, const char *part)
{
    AUTO(free_ptr) char *line = hear_next(f, event);

    if (!strstr(line, part))
        fail_msg("heard '%s' instead of '%s'", line, part);
}

/* As an answer. */
static void must_hear(struct fixture *f, const char *part)
{
    must_hear_one(f, false, part);
}

static void say(struct fixture *f, const char *text)
{
    struct iovec iov = {(char *)(uintptr_t)text, strlen(text)};

    assert_int_equal(socket_co_send(f->client, &iov, 1, SOON), 0);
}

/* The time in it is not looked at. */
static void must_hear_event(struct fixture *f, const char *name, const char *data)
{
    AUTO(free_ptr)
    char *part = xasprintf("\"event\": \"%s\", \"data\": %s, \"timestamp\": ", name, data);

    must_hear_one(f, true, part);
}

static void must_hear_status(struct fixture *f, const char *id, const char *status)
{
    AUTO(free_ptr) char *data = xasprintf("{\"id\": \"%s\", \"status\": \"%s\"}", id, status);

    must_hear_event(f, "JOB_STATUS_CHANGE", data);
}

static void begin(struct fixture *f)
{
    struct error *err = NULL;
    struct socket_address address = {.family = SOCKET_UNIX, .path = f->path};
    struct loop *io;
    struct loop *copy;

    *f = (struct fixture){.len = 0};
    (void)snprintf(f->path, sizeof(f->path), "/tmp/test-qmp-jobs.%d.sock", (int)getpid());
    assert_int_equal(loop_thread_start(&f->io, "io", &err), 0);
    assert_int_equal(loop_thread_start(&f->copy, "copy", &err), 0);
    io = loop_thread_loop(f->io);
    copy = loop_thread_loop(f->copy);
    f->control = control_new(drivers, &io, 1, &copy, 1, no_quit, NULL);
    assert_int_equal(qmp_server_co_new(&f->server, f->control, &address, &err), 0);
    assert_int_equal(qmp_server_start(f->server, false, &err), 0);
    assert_int_equal(socket_co_connect(&f->client, &address, SOON, &err), 0);
    must_hear(f, "{\"QMP\": ");
    say(f, "{'execute': 'qmp_capabilities'}");
    must_hear(f, "{\"return\": {}}");
}

static void end(struct fixture *f)
{
    assert_int_equal(f->heard_count, 0);
    f->client = socket_free(f->client);
    assert_null(control_co_free(f->control));
    loop_thread_stop(f->copy);
    loop_thread_stop(f->io);
}

static struct job *begin_job(struct fixture *f, const struct job_options *o, struct probe *p)
{
    struct job_world w = {.jobs = f->control->jobs};
    struct job *job = make_job(&w, &probe_ops, o, p);

    job_start(job);
    must_hear_status(f, o->id, "created");
    must_hear_status(f, o->id, "running");
    return job;
}

/* All commands to a job, and all events of one, in its life. */
static void life_body(void *arg)
{
    const struct job_options o = {.id = "m0", .speed = 4096};
    struct probe p = {
        .steps = 2,
        .errors = 1,
        .error = -ENOSPC,
        .policy = JOB_ON_ERROR_AUTO,
        .syncs = true,
    };
    struct fixture f;
    struct job *job;

    (void)arg;
    begin(&f);
    job = begin_job(&f, &o, &p);
    job_progress_set(job, 0, 100);
    must_hear_event(&f, "BLOCK_JOB_ERROR",
                    "{\"device\": \"m0\", \"operation\": \"write\", \"action\": \"stop\"}");
    must_hear_status(&f, "m0", "paused");
    job_progress_set(job, 2, 100);
    say(&f, "{'execute': 'query-block-jobs'}");
    must_hear(&f, "{\"return\": [{\"type\": \"mirror\", \"device\": \"m0\", \"len\": 100, "
                  "\"offset\": 2, \"busy\": false, \"paused\": true, \"speed\": 4096, "
                  "\"io-status\": \"nospace\", \"ready\": false, \"status\": \"paused\", "
                  "\"auto-finalize\": false, \"auto-dismiss\": false}]}");
    say(&f, "{'execute': 'block-job-pause', 'arguments': {'device': 'm0'}}");
    must_hear(&f, "{\"class\": \"GenericError\", \"desc\": \"job 'm0' is already paused\"}");
    say(&f, "{'execute': 'block-job-set-speed', 'arguments': {'device': 'm0', 'speed': 512}}");
    must_hear(&f, "{\"return\": {}}");
    say(&f, "{'execute': 'job-resume', 'arguments': {'id': 'm0'}}");
    must_hear_status(&f, "m0", "running");
    must_hear(&f, "{\"return\": {}}");
    must_hear_status(&f, "m0", "ready");
    must_hear_event(&f, "BLOCK_JOB_READY",
                    "{\"type\": \"mirror\", \"device\": \"m0\", \"len\": 100, \"offset\": 2, "
                    "\"speed\": 512}");
    say(&f, "{'execute': 'job-pause', 'arguments': {'id': 'm0'}}");
    must_hear(&f, "{\"return\": {}}");
    must_hear_status(&f, "m0", "standby");
    say(&f, "{'execute': 'block-job-resume', 'arguments': {'device': 'm0'}}");
    must_hear_status(&f, "m0", "ready");
    must_hear(&f, "{\"return\": {}}");
    say(&f, "{'execute': 'block-job-complete', 'arguments': {'device': 'm0'}}");
    must_hear(&f, "{\"return\": {}}");
    must_hear_status(&f, "m0", "waiting");
    must_hear_status(&f, "m0", "pending");
    must_hear_event(&f, "BLOCK_JOB_PENDING", "{\"type\": \"mirror\", \"id\": \"m0\"}");
    say(&f, "{'execute': 'query-jobs'}");
    must_hear(&f, "{\"return\": [{\"id\": \"m0\", \"type\": \"mirror\", \"status\": \"pending\", "
                  "\"current-progress\": 2, \"total-progress\": 100}]}");
    say(&f, "{'execute': 'job-finalize', 'arguments': {'id': 'm0'}}");
    must_hear(&f, "{\"return\": {}}");
    must_hear_event(&f, "BLOCK_JOB_COMPLETED",
                    "{\"type\": \"mirror\", \"device\": \"m0\", \"len\": 100, \"offset\": 2, "
                    "\"speed\": 512}");
    must_hear_status(&f, "m0", "concluded");
    say(&f, "{'execute': 'block-job-dismiss', 'arguments': {'id': 'm0'}}");
    must_hear_status(&f, "m0", "null");
    must_hear(&f, "{\"return\": {}}");
    end(&f);
}

static void ends_body(void *arg)
{
    const struct job_options fails = {.id = "b0"};
    const struct job_options hangs = {.id = "b1", .auto_dismiss = true};
    struct probe bad = {.fail = -EIO, .fail_text = "no \"luck\""};
    struct probe stuck = {.hangs = true};
    struct fixture f;

    (void)arg;
    begin(&f);
    (void)begin_job(&f, &fails, &bad);
    must_hear_status(&f, "b0", "aborting");
    must_hear_event(&f, "BLOCK_JOB_COMPLETED",
                    "{\"type\": \"mirror\", \"device\": \"b0\", \"len\": 0, \"offset\": 0, "
                    "\"speed\": 0, \"error\": \"no \\\"luck\\\"\"}");
    must_hear_status(&f, "b0", "concluded");
    say(&f, "{'execute': 'query-jobs'}");
    must_hear(&f, "\"error\": \"no \\\"luck\\\"\"}]}");
    (void)begin_job(&f, &hangs, &stuck);
    say(&f, "{'execute': 'block-job-cancel', 'arguments': {'device': 'b1'}}");
    must_hear(&f, "{\"return\": {}}");
    must_hear_status(&f, "b1", "aborting");
    must_hear_event(&f, "BLOCK_JOB_CANCELLED",
                    "{\"type\": \"mirror\", \"device\": \"b1\", \"len\": 0, \"offset\": 0, "
                    "\"speed\": 0}");
    must_hear_status(&f, "b1", "concluded");
    must_hear_status(&f, "b1", "null");
    end(&f); /* b0 is dismissed */
}

static void unknown_body(void *arg)
{
    static const char *const by_device[] = {"pause", "resume", "cancel", "complete", "set-speed"};
    static const char *const by_id[] = {"finalize", "dismiss"};
    static const char *const jobs[] = {"pause",    "resume",   "cancel",
                                       "complete", "finalize", "dismiss"};
    struct fixture f;

    (void)arg;
    begin(&f);
    for (size_t i = 0; i < ARRAY_SIZE(by_device) + ARRAY_SIZE(by_id); i++) {
        bool device = i < ARRAY_SIZE(by_device);
        AUTO(free_ptr)
        char *text = xasprintf("{'execute': 'block-job-%s', 'arguments': {'%s': 'x'%s}}",
                               device ? by_device[i] : by_id[i - ARRAY_SIZE(by_device)],
                               device ? "device" : "id", i == 4 ? ", 'speed': 1" : "");

        say(&f, text);
        must_hear(&f, "{\"class\": \"DeviceNotActive\", \"desc\": \"there is no block job 'x'\"}");
    }
    for (size_t i = 0; i < ARRAY_SIZE(jobs); i++) {
        AUTO(free_ptr)
        char *text = xasprintf("{'execute': 'job-%s', 'arguments': {'id': 'x'}}", jobs[i]);

        say(&f, text);
        must_hear(&f, "{\"class\": \"GenericError\", \"desc\": \"there is no job 'x'\"}");
    }
    say(&f, "{'execute': 'query-jobs'} {'execute': 'query-block-jobs'}");
    must_hear(&f, "{\"return\": []}");
    must_hear(&f, "{\"return\": []}");
    end(&f);
}

static void on_all(co_entry_fn *body)
{
    struct error *err = NULL;

    TEST_SEEDS (seed) {
        struct sim_options o;

        sim_options_init(&o, seed);
        assert_int_equal(sim_run(&o, body, NULL), SIM_RETURNED);
    }
    if (loop_run_main(LOOP_ENGINE_AUTO, "control", body, NULL, &err) < 0)
        fail_msg("%s", error_text(err));
}

static void test_qmp_jobs__life_is_told_as_the_peer_tells_it(void **state)
{
    (void)state;
    on_all(life_body);
}

static void test_qmp_jobs__ends_are_told_with_their_reason(void **state)
{
    (void)state;
    on_all(ends_body);
}

static void test_qmp_jobs__unknown_jobs_have_the_classes_of_the_peer(void **state)
{
    (void)state;
    on_all(unknown_body);
}
