/* SPDX-License-Identifier: Apache-2.0 */
/*
 * For tests of jobs: a kind of job that does what a test says, copy loops, and what clients were told, in order. All of it is
 * used within coroutines on the control thread's loop.
 */
#ifndef CAIRN_TESTS_JOB_FIXTURE_H
#define CAIRN_TESTS_JOB_FIXTURE_H

#include "base/alloc.h"
#include "base/atomic.h"
#include "base/macros.h"
#include "jobs/job.h"
#include "loop/co.h"
#include "loop/loop.h"
#include "loop/scope.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define COPY_LOOPS    2
#define PATIENCE_NS   (20 * NS_PER_S)
#define PROBE_STEP_NS (50 * NS_PER_US)

/* What a job of the tests shall do, and what became of it. Outlives the job. */
struct probe {
    /* Set by the test. */
    unsigned steps;   /* a sleep and a pause point each; 0: none */
    unsigned workers; /* coroutines that take the steps; 0: co_run itself */
    int fail;         /* negative errno, after the steps; in a worker of several: the first one */
    const char *fail_text;
    bool hangs;          /* after the steps, until cancelled */
    bool deaf;           /* cancelled or not, it goes on for a while after the steps */
    bool syncs;          /* becomes ready, and ends when it is asked to */
    int fail_ready;      /* fails instead when it is ready */
    int prepare;         /* what co_prepare returns */
    uint64_t prepare_ns; /* how long it takes */
    unsigned
        errors; /* I/O errors met after the steps, each tried again unless the policy says no */
    int error;
    enum job_on_error policy;

    /* Atomic: written on the job's loop. */
    unsigned runs;
    unsigned running;
    unsigned steps_done;
    unsigned errors_met;
    struct loop *ran_on;

    /* Control thread. */
    unsigned prepared;
    unsigned committed;
    unsigned aborted;
    unsigned cleaned;
    uint64_t speed;
};

struct probe_state {
    struct probe *probe;
};

static inline struct probe *probe_of(const struct job *job)
{
    const struct probe_state *s = job_state(job);

    return s->probe;
}

static inline int probe_take_steps(struct job *job)
{
    struct probe *p = probe_of(job);

    for (unsigned i = 0; i < p->steps; i++) {
        int r = job_co_pause_point(job);

        if (r == 0)
            r = co_sleep_until(loop_clock() + PROBE_STEP_NS);
        if (r < 0)
            return r;
        (void)atomic_add(&p->steps_done, 1u);
        job_progress_add(job, 1);
    }
    return job_co_pause_point(job);
}

struct probe_worker {
    struct job *job;
    int result;
};

static inline void probe_work(void *arg)
{
    struct probe_worker *w = arg;

    w->result = probe_take_steps(w->job);
    job_worker_end(w->job);
}

static inline int probe_run_workers(struct job *job)
{
    unsigned count = probe_of(job)->workers;
    struct probe_worker *workers = xnew_n(struct probe_worker, count);
    struct co_scope scope;
    int r = 0;

    co_scope_init(&scope);
    for (unsigned i = 0; i < count; i++) {
        int started;

        workers[i].job = job;
        job_worker_begin(job);
        started = co_scope_start(&scope, probe_work, &workers[i]);
        if (started < 0) {
            workers[i].result = started;
            job_worker_end(job);
        }
    }
    co_scope_join(&scope);
    for (unsigned i = 0; i < count; i++)
        r = r < 0 ? r : workers[i].result;
    free(workers);
    return r;
}

static inline int probe_meet_errors(struct job *job)
{
    struct probe *p = probe_of(job);

    for (unsigned i = 0; i < p->errors; i++) {
        int r;

        (void)atomic_add(&p->errors_met, 1u);
        if (job_error_action(job, p->policy, p->error, IO_OPERATION_WRITE) ==
            JOB_ERROR_ACTION_REPORT)
            return p->error;
        r = job_co_pause_point(job);
        if (r == 0)
            r = co_sleep_until(loop_clock() + PROBE_STEP_NS);
        if (r < 0)
            return r;
    }
    return 0;
}

static inline int probe_keep_ready(struct job *job)
{
    struct probe *p = probe_of(job);
    int r = 0;

    job_set_ready(job);
    if (p->fail_ready)
        return p->fail_ready;
    while (r == 0 && job_asked(job) == JOB_ASK_NOTHING) {
        r = job_co_sleep_until(job, loop_clock() + 10 * NS_PER_MS);
        if (r == 0)
            r = job_co_pause_point(job);
    }
    return r;
}

static inline int probe_do(struct job *job, struct error **err)
{
    struct probe *p = probe_of(job);
    int r = p->workers ? probe_run_workers(job) : probe_take_steps(job);

    if (p->deaf) {
        co_shield_begin();
        (void)co_sleep_until(loop_clock() + 5 * NS_PER_MS);
        co_shield_end();
        return 0;
    }
    if (r == 0)
        r = probe_meet_errors(job);
    if (r == 0 && p->hangs)
        r = co_sleep_until(LOOP_FOREVER);
    if (r == 0 && p->syncs)
        r = probe_keep_ready(job);
    if (r == 0 && p->fail)
        r = p->fail_text ? error_set(err, -p->fail, "%s", p->fail_text) : p->fail;
    return r;
}

static inline int probe_co_run(struct job *job, struct error **err)
{
    struct probe *p = probe_of(job);
    int r;

    (void)atomic_add(&p->runs, 1u);
    (void)atomic_add(&p->running, 1u);
    atomic_set(&p->ran_on, loop_self());
    r = probe_do(job, err);
    (void)atomic_sub(&p->running, 1u);
    return r;
}

static inline int probe_co_prepare(struct job *job, struct error **err)
{
    struct probe *p = probe_of(job);

    p->prepared++;
    if (p->prepare_ns)
        (void)co_sleep_until(loop_clock() + p->prepare_ns);
    return p->prepare ? error_set(err, -p->prepare, "it cannot be prepared") : 0;
}

static inline void probe_co_commit(struct job *job)
{
    probe_of(job)->committed++;
}

static inline void probe_co_abort(struct job *job)
{
    probe_of(job)->aborted++;
}

static inline void probe_co_clean(struct job *job)
{
    probe_of(job)->cleaned++;
}

static inline int probe_complete(struct job *job, struct error **err)
{
    (void)job;
    (void)err;
    return 0;
}

static inline void probe_set_speed(struct job *job, uint64_t bytes_per_second)
{
    probe_of(job)->speed = bytes_per_second;
}

static const struct job_ops probe_ops = {
    .type = JOB_TYPE_MIRROR,
    .state_size = sizeof(struct probe_state),
    .finishes_soft = true,
    .co_run = probe_co_run,
    .co_prepare = probe_co_prepare,
    .co_commit = probe_co_commit,
    .co_abort = probe_co_abort,
    .co_clean = probe_co_clean,
    .complete = probe_complete,
    .set_speed = probe_set_speed,
};

/* Copy loops, and the jobs on them. */
struct job_world {
    struct loop_thread *threads[COPY_LOOPS];
    struct jobs *jobs;
    char *log; /* "b0:created b0:running ..." */
    void (*watch)(const struct job_event *e, const struct job_picture *p); /* or NULL */
};

/* Statuses in small letters, other events in capitals. */
static inline void job_world_event(const struct job_event *e, void *arg)
{
    static const char *const names[] = {
        [JOB_EVENT_STATUS_CHANGE] = NULL,    [JOB_EVENT_COMPLETED] = "COMPLETED",
        [JOB_EVENT_CANCELLED] = "CANCELLED", [JOB_EVENT_READY] = "READY",
        [JOB_EVENT_PENDING] = "PENDING",     [JOB_EVENT_ERROR] = "ERROR",
    };
    struct job_world *w = arg;
    struct job_picture p;
    char *longer;

    job_picture(e->job, &p);
    if (e->kind == JOB_EVENT_ERROR)
        longer = xasprintf("%s%s:ERROR-%s-%s ", w->log, p.id, io_operation_name(e->operation),
                           job_error_action_name(e->action));
    else
        longer = xasprintf("%s%s:%s%s ", w->log, p.id,
                           names[e->kind] ? names[e->kind] : job_status_name(p.status),
                           e->kind == JOB_EVENT_COMPLETED && p.error ? "(failed)" : "");
    free(w->log);
    w->log = longer;
    if (w->watch)
        w->watch(e, &p);
}

static inline void job_world_init(struct job_world *w)
{
    static const char *const names[COPY_LOOPS] = {"copy0", "copy1"};
    struct loop *loops[COPY_LOOPS];

    for (unsigned i = 0; i < COPY_LOOPS; i++) {
        struct error *err = NULL;

        assert_int_equal(loop_thread_start(&w->threads[i], names[i], &err), 0);
        loops[i] = loop_thread_loop(w->threads[i]);
    }
    w->log = xstrdup("");
    w->watch = NULL;
    w->jobs = jobs_new(loops, COPY_LOOPS, job_world_event, w);
}

static inline void job_world_release(struct job_world *w)
{
    jobs_co_cancel_all(w->jobs);
    w->jobs = jobs_free(w->jobs);
    for (unsigned i = 0; i < COPY_LOOPS; i++)
        w->threads[i] = loop_thread_stop(w->threads[i]);
    free(w->log);
}

/* What was told of one job: "created running ..."; the caller's to free. */
static inline char *told_of(const struct job_world *w, const char *id)
{
    size_t len = strlen(id);
    char *told = xstrdup("");

    for (const char *p = w->log; *p; p = strchr(p, ' ') + 1) {
        if (strncmp(p, id, len) == 0 && p[len] == ':') {
            const char *name = p + len + 1;
            char *longer = xasprintf("%s%s%.*s", told, *told ? " " : "",
                                     (int)(strchr(name, ' ') - name), name);

            free(told);
            told = longer;
        }
    }
    return told;
}

static inline void must_be_told(const struct job_world *w, const char *id, const char *expected)
{
    AUTO(free_ptr) char *told = told_of(w, id);

    assert_string_equal(told, expected);
}

static inline struct job *make_job(struct job_world *w, const struct job_ops *ops,
                                   const struct job_options *o, struct probe *p)
{
    struct error *err = NULL;
    struct probe_state *s;
    struct job *job;

    if (job_new(&job, w->jobs, ops, o, &err) < 0)
        fail_msg("%s", error_text(err));
    s = job_state(job);
    s->probe = p;
    return job;
}

/* Made and started, with all that is automatic. */
static inline struct job *start_job(struct job_world *w, const char *id, struct probe *p)
{
    const struct job_options o = {.id = id, .auto_finalize = true, .auto_dismiss = true};
    struct job *job = make_job(w, &probe_ops, &o, p);

    job_start(job);
    return job;
}

static inline void wait_until_gone(struct job_world *w, const char *id)
{
    uint64_t deadline = loop_clock() + PATIENCE_NS;

    while (jobs_find(w->jobs, id)) {
        if (loop_clock() > deadline)
            fail_msg("job '%s' is still there: %s", id, w->log);
        assert_int_equal(co_sleep_until(loop_clock() + 20 * NS_PER_US), 0);
    }
}

static inline void wait_for_status(struct job_world *w, const char *id, enum job_status status)
{
    uint64_t deadline = loop_clock() + PATIENCE_NS;
    struct job_picture p;

    for (;;) {
        const struct job *job = jobs_find(w->jobs, id);

        if (!job)
            fail_msg("job '%s' is gone before it is %s: %s", id, job_status_name(status), w->log);
        job_picture(job, &p);
        if (p.status == status)
            return;
        if (loop_clock() > deadline)
            fail_msg("job '%s' is not %s: %s", id, job_status_name(status), w->log);
        assert_int_equal(co_sleep_until(loop_clock() + 20 * NS_PER_US), 0);
    }
}

/* A refusal with this in its text. */
#define must_refuse_job(call, text)                                                                \
    do {                                                                                           \
        AUTO(error_free) struct error *refuse_err = NULL;                                          \
        struct error **err = &refuse_err;                                                          \
                                                                                                   \
        if ((call) == 0)                                                                           \
            fail_msg("%s was not refused", #call);                                                 \
        if (!strstr(error_text(refuse_err), (text)))                                               \
            fail_msg("%s: '%s' does not say '%s'", #call, error_text(refuse_err), (text));         \
    } while (0)

#define must_accept_job(call)                                                                      \
    do {                                                                                           \
        AUTO(error_free) struct error *accept_err = NULL;                                          \
        struct error **err = &accept_err;                                                          \
                                                                                                   \
        if ((call) < 0)                                                                            \
            fail_msg("%s: %s", #call, error_text(accept_err));                                     \
    } while (0)

#endif
