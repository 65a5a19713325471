/* SPDX-License-Identifier: Apache-2.0 */
/* What the files of the life cycle share: who writes what of a job, and the calls between them. */
#ifndef CAIRN_JOBS_JOB_INTERNAL_H
#define CAIRN_JOBS_JOB_INTERNAL_H

#include "base/context.h"
#include "base/list.h"
#include "jobs/job-states.h"
#include "jobs/job.h"
#include "loop/lock.h"
#include "loop/scope.h"

#define IO_OPERATION_COUNT (IO_OPERATION_WRITE + 1)

struct jobs {
    /* Constant. */
    struct loop **loops;
    unsigned loop_count;
    struct loop *control;
    jobs_event_fn *event;
    void *event_arg;

    /* Control thread. */
    struct list list; /* struct job, the newest first */
    unsigned next_loop;
    bool closed;
    struct co_scope scope; /* a coroutine for each job */
};

struct job_txn {
    /* Control thread. */
    unsigned refs;
    struct list jobs;        /* those that have not concluded */
    unsigned unended;        /* of them, those whose work has not ended */
    bool started;            /* one of them has been */
    bool failed;             /* one of them has, or was cancelled: so do all */
    bool finalize;           /* by command */
    bool finalizing;         /* too late for commands */
    struct co_wait *waiting; /* who leads the end, until one of these is set */
};

/* An error that clients were told of; touched on the job's loop. */
struct job_told {
    bool any;
    enum job_error_action action;
    uint64_t at_ns;
    unsigned resumes; /* how many there had been */
};

struct job {
    /* Constant. */
    struct jobs *all;
    const struct job_ops *ops;
    char *id;
    bool auto_finalize;
    bool auto_dismiss;
    struct loop *loop;
    struct job_txn *txn;
    void *state;

    /* Control thread. */
    struct list link;     /* in all->list */
    struct list txn_link; /* in txn->jobs */
    enum job_status status;
    struct co_wait *start_wait;
    bool discarded;
    bool working; /* co_run runs, or is about to */
    bool live;    /* the same, until co_clean: ops->progress may be asked */
    int result;
    char *error;         /* text; NULL while result is 0 */
    struct co_scope run; /* in which the control thread waits for co_run */

    /* Written by co_run's end, on the job's loop; read when it has come home. */
    int run_result;
    struct error *run_error;

    /* Protected by lock. It is held for a few instructions, together with no other. */
    struct tiny_lock lock;
    bool user_pause;
    bool error_stop;
    bool
        cancelled; /* by force; written on the control thread alone, which may read it without the lock */
    bool is_ready;
    enum job_ask ask; /* as cancelled */
    unsigned workers; /* who come to pause points */
    unsigned resting; /* of them, in this pause */
    unsigned wakes;   /* how often `resting` began anew */
    unsigned resumes;
    struct wait_queue rest_queue;
    struct wait_queue sleep_queue;
    enum job_io_status io_status;

    struct {
        bool due;
        enum job_error_action action;
    } errors[IO_OPERATION_COUNT]; /* events to be sent */

    /* Atomic. */
    uint32_t attention; /* a pause or the end is wanted */
    uint32_t news;      /* `message` is on its way */
    uint64_t current;
    uint64_t total;
    uint64_t speed;

    /* Only touched on the job's loop. */
    struct job_told told[IO_OPERATION_COUNT];

    struct loop_message
        message; /* to the control thread: something has changed that it shall look at */
};

/* All on the control thread. */

/* Takes a step that must be possible, and tells clients. */
void job_take_step(struct job *job, enum job_step step);
void job_send_event(const struct job *job, enum job_event_kind kind);
/* It rests no more; if it has become ready meanwhile, that is told now. */
void job_go_on(struct job *job);
/* Cancelled by force: its work ends soon, or has ended. */
void job_cancel_work(struct job *job);
/* It is gone, after its last step; frees it. */
void job_vanish(struct job *job);
void job_free(struct job *job);
/* Keeps why it failed, unless that is known already. *err is taken if err is not NULL, and may be NULL. */
void job_fail(struct job *job, int result, struct error **err);
/* From here on what it has done does not change, and its state is not asked. */
void job_keep_progress(struct job *job);

/* The coroutine of a job, from job_new() on. */
void co_fn control_fn job_co_main(void *arg);
/* Any thread; job->lock is not held. */
bool job_wants_rest(struct job *job);

/* job-txn.c */
void job_txn_add(struct job_txn *txn, struct job *job);
/* It was not started. */
void job_txn_remove(struct job *job);
/* The work of a job has ended. The last one of a transaction leads its end. */
void co_fn control_fn job_txn_co_work_ended(struct job *job);
/* All jobs of the transaction are cancelled by force. */
void job_txn_cancel(struct job_txn *txn);
void job_txn_finalize(struct job_txn *txn);

#endif
