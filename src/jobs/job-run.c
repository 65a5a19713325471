/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A job at work: co_run on a copy loop, where it rests at pause points, and the coroutine on the control thread that waits
 * for it.
 *
 * What the control thread wants (pause, end, completion) is in the job, under its lock; it wakes who rests or sleeps. What happens
 * on the loop is in the job too, and one message says that there is something to look at: settle() looks, and takes the
 * steps that bring the status in line. So a pause that is taken back before it took place leaves no trace.
 */
#include "base/alloc.h"
#include "base/atomic.h"
#include "base/macros.h"
#include "jobs/job-internal.h"
#include "loop/co.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>

/* Errors of the same kind are told this often. */
#define ERROR_TOLD_EVERY_NS NS_PER_S

static bool wants_rest_locked(const struct job *job)
{
    return (job->user_pause || job->error_stop) && !job->cancelled;
}

static bool rests_locked(const struct job *job)
{
    return wants_rest_locked(job) && job->resting > 0 && job->resting >= job->workers;
}

bool job_wants_rest(struct job *job)
{
    bool wants;

    tiny_lock_acquire(&job->lock);
    wants = wants_rest_locked(job);
    tiny_lock_release(&job->lock);
    return wants;
}

/* ---- the control thread ---- */

static void send_errors(struct job *job)
{
    for (unsigned i = 0; i < IO_OPERATION_COUNT; i++) {
        struct job_event e = {
            .kind = JOB_EVENT_ERROR,
            .job = job,
            .operation = (enum io_operation)i,
        };
        bool due;

        tiny_lock_acquire(&job->lock);
        due = job->errors[i].due;
        e.action = job->errors[i].action;
        job->errors[i].due = false;
        tiny_lock_release(&job->lock);
        if (due && !job->ops->plain)
            job->all->event(&e, job->all->event_arg);
    }
}

static void sync_if_ready(struct job *job)
{
    bool is_ready;

    tiny_lock_acquire(&job->lock);
    is_ready = job->is_ready;
    tiny_lock_release(&job->lock);
    if (!is_ready || job->status != JOB_STATUS_RUNNING)
        return;
    job_take_step(job, JOB_STEP_SYNC);
    if (!job->ops->plain)
        job_send_event(job, JOB_EVENT_READY);
}

void job_go_on(struct job *job)
{
    if (job->status == JOB_STATUS_PAUSED || job->status == JOB_STATUS_STANDBY)
        job_take_step(job, JOB_STEP_GO_ON);
    sync_if_ready(job);
}

/* Brings its status in line with what it does on its loop. */
static void settle(struct job *job)
{
    bool rests;

    tiny_lock_acquire(&job->lock);
    rests = rests_locked(job);
    tiny_lock_release(&job->lock);
    if (!rests)
        job_go_on(job);
    sync_if_ready(job);
    if (rests && (job->status == JOB_STATUS_RUNNING || job->status == JOB_STATUS_READY))
        job_take_step(job, JOB_STEP_REST);
}

static void news_arrived(struct loop_message *m)
{
    struct job *job = container_of(m, struct job, message);

    atomic_set(&job->news, 0u); /* what changes from here on is told anew */
    send_errors(job);
    if (job->working)
        settle(job);
}

static void co_fn run_on_loop(void *arg)
{
    struct job *job = arg;

    job->run_result = job->ops->co_run(job, &job->run_error);
}

static void co_fn call_run(void *arg)
{
    struct job *job = arg;
    int r = loop_co_call(job->loop, run_on_loop, job); /* C8 */

    if (r < 0)
        job->run_result = r;
}

static void co_fn control_fn job_co_work(struct job *job)
{
    int r;

    r = co_scope_start(&job->run, call_run, job); /* not if it was cancelled since its start */
    if (r < 0)
        job->run_result = r;
    co_scope_join(&job->run);
    job->working = false;
    job_go_on(job); /* its workers are gone, and whether they rest has no meaning any more */
    if (job->run_result < 0)
        job_fail(job, job->run_result, &job->run_error);
    error_free(&job->run_error);
}

void job_co_main(void *arg)
{
    struct job *job = arg;
    struct co_wait w;

    co_wait_init(&w, NULL);
    job->start_wait = &w;
    (void)co_wait(&w, LOOP_FOREVER); /* not cancellable: job_start() or job_discard() comes */
    if (job->discarded) {
        job_free(job);
        return;
    }
    if (job->working)
        job_co_work(job);
    if (job->cancelled && job->result == 0)
        job_fail(job, -ECANCELED, NULL);
    job_txn_co_work_ended(job);
}

/* ---- the job's loop ---- */

/* The message is free again before it is looked at, and co_run's end is a later one of the same sender. */
static void job_tell(struct job *job)
{
    assert(loop_self() == job->loop);
    if (atomic_swap(&job->news, 1u))
        return;
    job->message.fn = news_arrived;
    loop_post(job->all->control, &job->message);
}

bool job_should_pause(const struct job *job)
{
    return atomic_get(&job->attention);
}

/* The wait ended by itself: if that was not overtaken by the end of the pause, one rests less. */
static void rest_no_more(struct job *job, unsigned wakes)
{
    bool rested = false;

    tiny_lock_acquire(&job->lock);
    if (job->wakes == wakes) {
        rested = rests_locked(job);
        job->resting--;
    }
    tiny_lock_release(&job->lock);
    if (rested)
        job_tell(job);
}

/* 0: look again whether to go on. */
static int co_fn rest(struct job *job, unsigned wakes)
{
    int r;

    tiny_lock_acquire(&job->lock);
    if (job->wakes != wakes) {
        tiny_lock_release(&job->lock);
        return 0;
    }
    r = wait_queue_wait(&job->rest_queue, &job->lock, LOOP_FOREVER);
    if (r < 0)
        rest_no_more(job, wakes);
    return r;
}

int job_co_pause_point(struct job *job)
{
    int r = 0;

    while (r == 0 && job_should_pause(job)) {
        bool all_rest;
        unsigned wakes;

        tiny_lock_acquire(&job->lock);
        if (job->cancelled || !wants_rest_locked(job)) {
            r = job->cancelled ? -ECANCELED : 0;
            tiny_lock_release(&job->lock);
            break;
        }
        job->resting++;
        wakes = job->wakes;
        all_rest = rests_locked(job);
        tiny_lock_release(&job->lock);
        if (all_rest)
            job_tell(job);
        r = rest(job, wakes);
    }
    return r;
}

void job_worker_begin(struct job *job)
{
    tiny_lock_acquire(&job->lock);
    job->workers++;
    tiny_lock_release(&job->lock);
}

void job_worker_end(struct job *job)
{
    bool all_rest;

    tiny_lock_acquire(&job->lock);
    assert(job->workers > 0);
    job->workers--;
    all_rest = rests_locked(job);
    tiny_lock_release(&job->lock);
    if (all_rest)
        job_tell(job);
}

void job_set_ready(struct job *job)
{
    tiny_lock_acquire(&job->lock);
    job->is_ready = true;
    tiny_lock_release(&job->lock);
    job_tell(job);
}

enum job_ask job_asked(const struct job *job)
{
    return atomic_get(&job->ask);
}

int job_co_sleep_until(struct job *job, uint64_t deadline_ns)
{
    bool cancelled;
    int r = 0;

    tiny_lock_acquire(&job->lock);
    if (job_should_pause(job) || job->ask != JOB_ASK_NOTHING)
        tiny_lock_release(&job->lock);
    else
        r = wait_queue_wait(&job->sleep_queue, &job->lock, deadline_ns);
    tiny_lock_acquire(&job->lock);
    cancelled = job->cancelled;
    tiny_lock_release(&job->lock);
    if (cancelled)
        return -ECANCELED;
    return r == -ETIMEDOUT ? 0 : r;
}

/* ---- errors ---- */

static enum job_error_action action_for(enum job_on_error policy, int error)
{
    switch (policy) {
    case JOB_ON_ERROR_REPORT:
        return JOB_ERROR_ACTION_REPORT;
    case JOB_ON_ERROR_IGNORE:
        return JOB_ERROR_ACTION_IGNORE;
    case JOB_ON_ERROR_STOP:
        return JOB_ERROR_ACTION_STOP;
    case JOB_ON_ERROR_ENOSPC:
    case JOB_ON_ERROR_AUTO:
        break;
    }
    return error == -ENOSPC ? JOB_ERROR_ACTION_STOP : JOB_ERROR_ACTION_REPORT;
}

/* A pause that nobody was told of would be a riddle: each is told, other things only so often. */
static bool worth_telling(const struct job_told *told, const struct job_told *now)
{
    if (!told->any || told->action != now->action)
        return true;
    if (now->action == JOB_ERROR_ACTION_STOP)
        return told->resumes != now->resumes;
    return now->at_ns - told->at_ns >= ERROR_TOLD_EVERY_NS;
}

static void stop_locked(struct job *job, int error)
{
    if (job->io_status == JOB_IO_STATUS_OK)
        job->io_status = error == -ENOSPC ? JOB_IO_STATUS_NOSPACE : JOB_IO_STATUS_FAILED;
    job->error_stop = true;
    atomic_set(&job->attention, 1u);
    wait_queue_wake_all(&job->sleep_queue);
}

enum job_error_action job_error_action(struct job *job, enum job_on_error policy, int error,
                                       enum io_operation operation)
{
    struct job_told now = {
        .any = true,
        .action = action_for(policy, error),
        .at_ns = loop_clock(),
    };
    bool tell;

    tiny_lock_acquire(&job->lock);
    now.resumes = job->resumes;
    tell = worth_telling(&job->told[operation], &now);
    if (now.action == JOB_ERROR_ACTION_STOP && !job->cancelled)
        stop_locked(job, error);
    if (tell) {
        job->errors[operation].due = true;
        job->errors[operation].action = now.action;
    }
    tiny_lock_release(&job->lock);
    if (tell) {
        job->told[operation] = now;
        job_tell(job);
    }
    return now.action;
}
