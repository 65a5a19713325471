/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The end of jobs: all of a transaction take effect, or none (JOB-3). A single job has a transaction of its own.
 *
 * The coroutine of the job whose work ends last leads the end for all, so that nothing must be allocated for it.
 */
#include "base/alloc.h"
#include "base/macros.h"
#include "jobs/job-internal.h"
#include "loop/co.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>

struct job_txn *job_txn_new(void)
{
    struct job_txn *txn = xnew(struct job_txn);

    txn->refs = 1;
    list_init(&txn->jobs);
    return txn;
}

struct job_txn *job_txn_unref(struct job_txn *txn)
{
    if (txn && --txn->refs == 0) {
        assert(list_empty(&txn->jobs));
        free(txn);
    }
    return NULL;
}

void job_txn_add(struct job_txn *txn, struct job *job)
{
    assert(!txn->started);
    txn->refs++;
    txn->unended++;
    job->txn = txn;
    list_append(&txn->jobs, &job->txn_link);
}

void job_txn_remove(struct job *job)
{
    assert(!job->txn->started);
    job->txn->unended--;
    list_remove(&job->txn_link);
}

static void txn_wake(struct job_txn *txn)
{
    if (txn->waiting)
        co_wait_end(take(&txn->waiting), 0);
}

void job_txn_cancel(struct job_txn *txn)
{
    struct job *job;

    assert(!txn->finalizing);
    txn->failed = true;
    list_for_each (&txn->jobs, job, txn_link)
        job_cancel_work(job);
    txn_wake(txn);
}

void job_txn_finalize(struct job_txn *txn)
{
    assert(!txn->finalizing);
    txn->finalize = true;
    txn_wake(txn);
}

/* The others end with it. */
static void txn_fail(struct job_txn *txn, const struct job *culprit)
{
    struct job *job;

    if (txn->failed)
        return;
    txn->failed = true;
    list_for_each (&txn->jobs, job, txn_link) {
        if (job != culprit)
            job_cancel_work(job);
    }
}

/* True if it is finalized without a command. */
static bool txn_pend(struct job_txn *txn)
{
    struct job *job;
    bool automatic = true;

    list_for_each (&txn->jobs, job, txn_link) {
        job_take_step(job, JOB_STEP_PEND);
        if (!job->auto_finalize) {
            automatic = false;
            if (!job->ops->plain)
                job_send_event(job, JOB_EVENT_PENDING);
        }
    }
    return automatic;
}

/* C7: however long this takes, nothing has been prepared yet, and no gate is closed. */
static void co_fn wait_for_command(struct job_txn *txn)
{
    struct co_wait w;

    while (!txn->finalize && !txn->failed) {
        co_wait_init(&w, NULL);
        txn->waiting = &w;
        (void)co_wait(&w, LOOP_FOREVER); /* the flags tell */
    }
}

static void co_fn control_fn txn_prepare(struct job_txn *txn)
{
    struct job *job;

    list_for_each (&txn->jobs, job, txn_link) {
        struct error *err = NULL;
        int r = job->ops->co_prepare ? job->ops->co_prepare(job, &err) : 0;

        if (r < 0) {
            job_fail(job, r, &err);
            job_take_step(job, JOB_STEP_FAIL);
            txn_fail(txn, job);
            return;
        }
    }
}

static void co_fn control_fn conclude(struct job *job)
{
    bool dismiss = job->auto_dismiss && !job->ops->plain;

    if (job->result == 0 && job->ops->co_commit)
        job->ops->co_commit(job);
    if (job->result < 0 && job->ops->co_abort)
        job->ops->co_abort(job);
    job_keep_progress(job);
    if (job->ops->co_clean)
        job->ops->co_clean(job);
    if (!job->ops->plain)
        job_send_event(job, job->cancelled ? JOB_EVENT_CANCELLED : JOB_EVENT_COMPLETED);
    list_remove(&job->txn_link);
    job_take_step(job, JOB_STEP_CONCLUDE);
    if (dismiss)
        job_vanish(job);
}

static void co_fn control_fn txn_co_end(struct job_txn *txn)
{
    struct job *job;

    if (!txn->failed && !txn_pend(txn))
        wait_for_command(txn);
    txn->finalizing = true;
    if (!txn->failed)
        txn_prepare(txn);
    while ((job = list_first(&txn->jobs, struct job, txn_link)))
        conclude(job);
}

void job_txn_co_work_ended(struct job *job)
{
    struct job_txn *txn = job->txn;

    txn->refs++; /* the jobs, this one too, may be gone before it */
    if (job->result < 0) {
        job_take_step(job, JOB_STEP_FAIL);
        txn_fail(txn, job);
    } else {
        job_take_step(job, JOB_STEP_SUCCEED);
    }
    if (--txn->unended == 0)
        txn_co_end(txn);
    job_txn_unref(txn);
}
