/* SPDX-License-Identifier: Apache-2.0 */
/* All jobs of a process, and the commands to a job. */
#include "jobs/job.h"
#include "base/alloc.h"
#include "base/atomic.h"
#include "base/macros.h"
#include "jobs/job-internal.h"
#include "loop/co.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define ID_MAX 127

/* ---- all of them ---- */

struct jobs *jobs_new(struct loop *const *copy_loops, unsigned copy_loop_count,
                      jobs_event_fn *event, void *arg)
{
    struct jobs *all = xnew(struct jobs);

    assert(copy_loop_count > 0);
    all->loops = xnew_n(struct loop *, copy_loop_count);
    memcpy(all->loops, copy_loops, copy_loop_count * sizeof(struct loop *));
    all->loop_count = copy_loop_count;
    all->control = loop_self();
    all->event = event;
    all->event_arg = arg;
    list_init(&all->list);
    co_scope_init(&all->scope);
    return all;
}

static void cancel_all(struct jobs *all)
{
    struct job *job;

    list_for_each (&all->list, job, link) {
        if (job_verb_allowed(job->status, JOB_VERB_CANCEL) && !job->txn->finalizing)
            job_txn_cancel(job->txn);
    }
}

void jobs_co_cancel_all(struct jobs *all)
{
    struct job *job;

    all->closed = true;
    cancel_all(all);
    co_scope_join(&all->scope);
    while ((job = list_first(&all->list, struct job, link)))
        job_vanish(job);
}

struct jobs *jobs_free(struct jobs *all)
{
    if (!all)
        return NULL;
    assert(list_empty(&all->list) && all->scope.count == 0);
    free(all->loops);
    free(all);
    return NULL;
}

struct job *jobs_find(const struct jobs *all, const char *id)
{
    struct job *job;

    list_for_each (&all->list, job, link) {
        if (strcmp(job->id, id) == 0)
            return job;
    }
    return NULL;
}

void jobs_for_each(const struct jobs *all, jobs_fn *fn, void *arg)
{
    const struct job *job;

    list_for_each (&all->list, job, link)
        fn(job, arg);
}

/* ---- making and forgetting one ---- */

static bool is_id(const char *id)
{
    static const char letters[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ";
    static const char others[] = "0123456789-._";

    if (!*id || !strchr(letters, *id) || strlen(id) > ID_MAX)
        return false;
    for (; *id; id++) {
        if (!strchr(letters, *id) && !strchr(others, *id))
            return false;
    }
    return true;
}

static int check_new(const struct jobs *all, const struct job_options *o, struct error **err)
{
    if (!o->id || !*o->id)
        return error_set(err, EINVAL, "a job needs a name: give 'job-id'");
    if (!is_id(o->id))
        return error_set(err, EINVAL,
                         "job-id '%.*s' is not well-formed: a letter, then letters, digits, '-', "
                         "'.', '_', at most %d",
                         ID_MAX, o->id, ID_MAX);
    if (jobs_find(all, o->id))
        return error_set(err, EEXIST, "there is a job '%s' already", o->id);
    if (all->closed)
        return error_set(err, ESHUTDOWN, "job '%s': no job can begin any more", o->id);
    return 0;
}

static struct job *job_alloc(struct jobs *all, const struct job_ops *ops,
                             const struct job_options *o)
{
    struct job *job = xnew(struct job);
    struct job_txn *txn = o->txn ? o->txn : job_txn_new();

    job->all = all;
    job->ops = ops;
    job->id = xstrdup(o->id);
    job->auto_finalize = o->auto_finalize;
    job->auto_dismiss = o->auto_dismiss && !ops->plain;
    job->loop = all->loops[all->next_loop++ % all->loop_count];
    job->state = xalloc(1, MAX(ops->state_size, (size_t)1));
    job->speed = o->speed;
    wait_queue_init(&job->rest_queue);
    wait_queue_init(&job->sleep_queue);
    co_scope_init(&job->run);
    list_prepend(&all->list, &job->link);
    job_txn_add(txn, job);
    job->cancelled = txn->failed; /* already: then it ends with the others */
    if (!o->txn)
        job_txn_unref(txn);
    return job;
}

int job_new(struct job **ret, struct jobs *all, const struct job_ops *ops,
            const struct job_options *o, struct error **err)
{
    struct job *job;
    int r = check_new(all, o, err);

    if (r < 0)
        return r;
    job = job_alloc(all, ops, o);
    r = co_scope_start(&all->scope, job_co_main, job); /* it waits for the start */
    if (r < 0) {
        job_txn_remove(job);
        job_free(job);
        return error_set(err, -r, "job '%s': no memory to begin", o->id);
    }
    job_take_step(job, JOB_STEP_CREATE);
    *ret = job;
    return 0;
}

void job_start(struct job *job)
{
    assert(job->status == JOB_STATUS_CREATED && job->start_wait);
    job->txn->started = true;
    if (!job->cancelled) {
        job->working = true;
        job->live = true;
        if (job->ops->set_speed)
            job->ops->set_speed(job, job_speed(job));
        job_take_step(job, JOB_STEP_START);
    }
    co_wait_end(take(&job->start_wait), 0);
}

void job_discard(struct job *job)
{
    assert(job->status == JOB_STATUS_CREATED && job->start_wait);
    job_txn_remove(job);
    job_take_step(job, JOB_STEP_VANISH);
    list_remove(&job->link);
    job->discarded = true;
    co_wait_end(take(&job->start_wait), 0); /* who waits frees it */
}

void job_free(struct job *job)
{
    list_remove(&job->link);
    job_txn_unref(job->txn);
    free(job->error);
    if (job->ops->release)
        job->ops->release(job);
    free(job->state);
    free(job->id);
    free(job);
}

void job_vanish(struct job *job)
{
    job_take_step(job, JOB_STEP_VANISH);
    job_free(job);
}

/* ---- its life ---- */

void job_send_event(const struct job *job, enum job_event_kind kind)
{
    const struct job_event e = {.kind = kind, .job = job};

    job->all->event(&e, job->all->event_arg);
}

void job_take_step(struct job *job, enum job_step step)
{
    enum job_status next = job_status_after(job->status, step);

    assert(next != JOB_STATUS_UNDEFINED); /* JOB-2 */
    if (next == job->status)
        return;
    job->status = next;
    job_send_event(job, JOB_EVENT_STATUS_CHANGE);
}

void job_fail(struct job *job, int result, struct error **err)
{
    if (job->result == 0) {
        job->result = result;
        job->error = xstrdup(err && *err ? error_text(*err) : strerror(-result));
    }
    if (err)
        error_free(err);
}

void job_keep_progress(struct job *job)
{
    if (job->live && job->ops->progress)
        job->ops->progress(job, &job->current, &job->total);
    job->live = false;
}

/* Whoever rests or sleeps looks again. */
static void wake_locked(struct job *job)
{
    atomic_set(&job->attention, job->user_pause || job->error_stop || job->cancelled ? 1u : 0u);
    wait_queue_wake_all(&job->sleep_queue);
    if (job->cancelled || !(job->user_pause || job->error_stop)) {
        job->wakes++;
        job->resting = 0;
        wait_queue_wake_all(&job->rest_queue);
    }
}

void job_cancel_work(struct job *job)
{
    if (job->status == JOB_STATUS_ABORTING)
        return;
    tiny_lock_acquire(&job->lock);
    job->cancelled = true;
    wake_locked(job);
    tiny_lock_release(&job->lock);
    if (job->status == JOB_STATUS_WAITING || job->status == JOB_STATUS_PENDING) {
        job_fail(job, -ECANCELED, NULL);
        job_take_step(job, JOB_STEP_FAIL);
        return;
    }
    job_go_on(job);
    co_scope_cancel(&job->run);
}

/* ---- commands ---- */

static int check_verb(const struct job *job, enum job_verb verb, struct error **err)
{
    if (!job_verb_allowed(job->status, verb))
        return error_set(err, EPERM, "job '%s' in state '%s' cannot accept command verb '%s'",
                         job->id, job_status_name(job->status), job_verb_name(verb));
    if (job->status == JOB_STATUS_PENDING && job->txn->finalizing)
        return error_set(err, EBUSY, "job '%s' is being finalized already", job->id);
    return 0;
}

int job_pause(struct job *job, struct error **err)
{
    int r = check_verb(job, JOB_VERB_PAUSE, err);

    if (r < 0)
        return r;
    if (job_wants_rest(job))
        return error_set(err, EALREADY, "job '%s' is already paused", job->id);
    tiny_lock_acquire(&job->lock);
    job->user_pause = true;
    wake_locked(job);
    tiny_lock_release(&job->lock);
    return 0;
}

int job_resume(struct job *job, struct error **err)
{
    int r;

    if (!job_wants_rest(job))
        return error_set(err, EINVAL, "job '%s' is not paused", job->id);
    r = check_verb(job, JOB_VERB_RESUME, err);
    if (r < 0)
        return r;
    tiny_lock_acquire(&job->lock);
    job->user_pause = false;
    job->error_stop = false;
    job->io_status = JOB_IO_STATUS_OK;
    job->resumes++;
    wake_locked(job);
    tiny_lock_release(&job->lock);
    job_go_on(job); /* even if it rests again already: that is another pause, and is told */
    return 0;
}

static void ask(struct job *job, enum job_ask what)
{
    tiny_lock_acquire(&job->lock);
    atomic_set(&job->ask, what);
    wait_queue_wake_all(&job->sleep_queue);
    tiny_lock_release(&job->lock);
}

int job_cancel(struct job *job, bool force, struct error **err)
{
    int r;

    if (!force && job_wants_rest(job))
        return error_set(err, EBUSY, "job '%s' is paused: resume it first, or cancel it by force",
                         job->id);
    r = check_verb(job, JOB_VERB_CANCEL, err);
    if (r < 0)
        return r;
    if (!force && !job->cancelled && job->ops->finishes_soft && job->status == JOB_STATUS_READY)
        ask(job, JOB_ASK_FINISH);
    else
        job_txn_cancel(job->txn);
    return 0;
}

int job_complete(struct job *job, struct error **err)
{
    int r = check_verb(job, JOB_VERB_COMPLETE, err);

    if (r < 0)
        return r;
    if (!job->ops->complete || job->cancelled || job_asked(job) == JOB_ASK_FINISH)
        return error_set(err, EBUSY, "job '%s' cannot be completed%s", job->id,
                         job->ops->complete ? ": it is being cancelled" : "");
    r = job->ops->complete(job, err);
    if (r == 0)
        ask(job, JOB_ASK_COMPLETE);
    return r;
}

int job_finalize(struct job *job, struct error **err)
{
    int r = check_verb(job, JOB_VERB_FINALIZE, err);

    if (r == 0)
        job_txn_finalize(job->txn);
    return r;
}

int job_dismiss(struct job *job, struct error **err)
{
    int r = check_verb(job, JOB_VERB_DISMISS, err);

    if (r == 0)
        job_vanish(job);
    return r;
}

int job_set_speed(struct job *job, uint64_t bytes_per_second, struct error **err)
{
    int r = check_verb(job, JOB_VERB_SET_SPEED, err);

    if (r < 0)
        return r;
    atomic_set(&job->speed, bytes_per_second);
    if (job->live && job->ops->set_speed)
        job->ops->set_speed(job, bytes_per_second);
    return 0;
}

/* ---- what is known of it ---- */

void job_picture(const struct job *job, struct job_picture *ret)
{
    struct job *j = (struct job *)(uintptr_t)job; /* for its lock */
    bool rests;

    *ret = (struct job_picture){
        .id = job->id,
        .type = job->ops->type,
        .plain = job->ops->plain,
        .status = job->status,
        .auto_finalize = job->auto_finalize,
        .auto_dismiss = job->auto_dismiss,
        .current = atomic_get(&j->current),
        .total = atomic_get(&j->total),
        .speed = job_speed(job),
        .error = job->error,
    };
    tiny_lock_acquire(&j->lock);
    rests = j->resting > 0 && j->resting >= j->workers;
    ret->paused = (j->user_pause || j->error_stop) && !j->cancelled;
    ret->io_status = j->io_status;
    tiny_lock_release(&j->lock);
    /* Workers that rest may be on their way out already, and the status not know it yet: then it is what counts. */
    rests |= job->status == JOB_STATUS_PAUSED || job->status == JOB_STATUS_STANDBY;
    ret->busy = job->working && !rests;
    ret->ready = job->status == JOB_STATUS_READY || job->status == JOB_STATUS_STANDBY;
    if (job->live && job->ops->progress)
        job->ops->progress(job, &ret->current, &ret->total);
    ret->total = MAX(ret->total, ret->current);
}

int job_result(const struct job *job)
{
    return job->result;
}

void *job_state(const struct job *job)
{
    return job->state;
}

const char *job_id(const struct job *job)
{
    return job->id;
}

uint64_t job_speed(const struct job *job)
{
    return atomic_get(&job->speed);
}

void job_progress_set(struct job *job, uint64_t current, uint64_t total)
{
    atomic_set(&job->current, current);
    atomic_set(&job->total, total);
}

void job_progress_add(struct job *job, uint64_t done)
{
    (void)atomic_add(&job->current, done);
}
