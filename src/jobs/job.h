/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Jobs: work on disks in use that takes long, can be paused, and takes effect in the end, or not at all.
 *
 * JOB-1 A job works on a copy loop, in co_run (C8). Its life (states, commands, the end) is led on the control thread.
 * JOB-2 All states and transitions are one table, jobs/job-states.h.
 * JOB-3 The end: when co_run of all jobs of a transaction has ended well, all are pending. Once they are finalized, by
 *       themselves or by command, co_prepare of all is called, then co_commit and co_clean of each. If one fails or is cancelled,
 *       the others are cancelled, and co_abort and co_clean of each is called instead. A job that was started gets co_clean
 *       exactly once, one that was discarded gets none of them.
 * JOB-4 While it is paused, in standby, ready or pending, this code holds nothing of a job but its place in a list (C7).
 * JOB-5 Nothing here waits for a job's I/O, except co_run's caller; what commands and queries need is in memory (P4).
 */
#ifndef CAIRN_JOBS_JOB_H
#define CAIRN_JOBS_JOB_H

#include "base/context.h"
#include "base/error.h"
#include "loop/loop.h"
#include "schema-shared.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct job;
struct jobs;
struct job_txn;

/* ---- what a kind of job is ---- */

/* Operations that a kind does not have are NULL. All but co_run are called on the control thread. */
struct job_ops {
    enum job_type type;
    bool plain; /* it has no events but JOB_STATUS_CHANGE, and waits to be dismissed always */
    size_t state_size; /* of job_state(), zeroed */
    bool
        finishes_soft; /* a cancel without force, when it is ready, lets it end well: JOB_ASK_FINISH */

    /*
     * The work, in a coroutine on a copy loop. 0, or a negative errno and, if errno's text is not enough, *err. When the job
     * is cancelled by force, all waits in it return -ECANCELED. When it returns, nothing of it runs any more.
     */
    int (*co_run)(struct job *job, struct error **err);

    /* The last that may fail. Sets *err when it does. Bounded in time: changes of the graph are (P4). */
    int (*co_prepare)(struct job *job, struct error **err);
    /* Takes effect. Also for a job in whose name nothing was prepared, since it has no co_prepare. */
    void (*co_commit)(struct job *job);
    /* Undoes all, whatever has been prepared; job_result() says why. */
    void (*co_abort)(struct job *job);
    /* Lets go of all that the job holds, after either. */
    void (*co_clean)(struct job *job);

    /* Frees what the state holds to the end, when the job is dismissed or discarded; NULL: nothing. */
    void (*release)(struct job *job);

    /* May job-complete be done now? NULL: a job of this kind is never completed. */
    int (*complete)(struct job *job, struct error **err);
    /* The limit, at the start and when it changes; NULL: co_run looks at job_speed(). */
    void (*set_speed)(struct job *job, uint64_t bytes_per_second);
    /* Any time between co_run's begin and co_clean. NULL: what job_progress_...() says. */
    void (*progress)(const struct job *job, uint64_t *ret_current, uint64_t *ret_total);
};

/* ---- all jobs of a process; control thread ---- */

enum job_event_kind {
    JOB_EVENT_STATUS_CHANGE,
    JOB_EVENT_COMPLETED,
    JOB_EVENT_CANCELLED,
    JOB_EVENT_READY,
    JOB_EVENT_PENDING,
    JOB_EVENT_ERROR,
};

struct job_event {
    enum job_event_kind kind;
    const struct job *job;
    enum io_operation operation; /* JOB_EVENT_ERROR, as action */
    enum job_error_action action;
};

/* Must not wait. */
typedef void jobs_event_fn(const struct job_event *e, void *arg);

/* The copy loops: at least one, none of them the control loop; the array is copied. */
struct jobs *jobs_new(struct loop *const *copy_loops, unsigned copy_loop_count,
                      jobs_event_fn *event, void *arg);
/*
 * Cancels all jobs by force, waits until they have ended, and dismisses those that wait for it. From then on no job can be
 * made. Nobody holds a job that has not been started.
 */
void co_fn control_fn jobs_co_cancel_all(struct jobs *all);
/* After jobs_co_cancel_all(). Returns NULL. */
struct jobs *jobs_free(struct jobs *all);

/* NULL: there is none. */
struct job *jobs_find(const struct jobs *all, const char *id);
/* The newest first. */
typedef void jobs_fn(const struct job *job, void *arg);
void jobs_for_each(const struct jobs *all, jobs_fn *fn, void *arg);

/* ---- making one; control thread ---- */

/* A transaction of jobs: all of them take effect, or none. Freed with its last job. */
struct job_txn *job_txn_new(void);
/* What the maker holds. Returns NULL. */
struct job_txn *job_txn_unref(struct job_txn *txn);

struct job_options {
    const char *id;
    bool auto_finalize;
    bool auto_dismiss;
    uint64_t speed;      /* bytes/s; 0: no limit */
    struct job_txn *txn; /* NULL: one of its own */
};

/*
 * Makes a job, of status created. Then job_start() or job_discard(). -EINVAL for an id that is none, -EEXIST for one that is
 * taken, -ENOMEM, -ESHUTDOWN.
 */
int control_fn job_new(struct job **ret, struct jobs *all, const struct job_ops *ops,
                       const struct job_options *o, struct error **err);
/* Lets it begin. Cannot fail. All jobs of a transaction are made before the first is started. */
void control_fn job_start(struct job *job);
/* It was not started: it is gone. */
void control_fn job_discard(struct job *job);

/* ---- commands; control thread. A refusal names job, status and command. ---- */

int control_fn job_pause(struct job *job, struct error **err);
int control_fn job_resume(struct job *job, struct error **err);
int control_fn job_cancel(struct job *job, bool force, struct error **err);
int control_fn job_complete(struct job *job, struct error **err);
int control_fn job_finalize(struct job *job, struct error **err);
int control_fn job_dismiss(struct job *job, struct error **err);
int control_fn job_set_speed(struct job *job, uint64_t bytes_per_second, struct error **err);

/* ---- what is known of it; control thread ---- */

/* Strings are borrowed until the next change. */
struct job_picture {
    const char *id;
    enum job_type type;
    bool plain;
    enum job_status status;
    bool busy;
    bool paused;
    bool ready;
    bool auto_finalize;
    bool auto_dismiss;
    enum job_io_status io_status;
    uint64_t current;
    uint64_t total;
    uint64_t speed;
    const char *error; /* NULL: it has not failed */
};

void job_picture(const struct job *job, struct job_picture *ret);
/* 0, or the negative errno that it failed for, -ECANCELED if it was cancelled. From co_run's end on. */
int job_result(const struct job *job);

/* ---- for the job itself; any thread ---- */

void *job_state(const struct job *job);
const char *job_id(const struct job *job);
uint64_t job_speed(const struct job *job);

void job_progress_set(struct job *job, uint64_t current, uint64_t total);
void job_progress_add(struct job *job, uint64_t done);

/* True if the next pause point will not return 0 at once: somebody wants a pause or the end. Cheap. */
bool job_should_pause(const struct job *job);

/* ---- for co_run and the coroutines that it starts, on the job's loop ---- */

/* Rests while the job is paused. 0, or -ECANCELED. Holds nothing meanwhile, and neither may the caller (C7). */
int co_fn job_co_pause_point(struct job *job);

/*
 * How many coroutines of the job come to pause points: its status is paused when at least one rests, and at least that many.
 * co_run that works alone need not say so. One that lets others work and waits for them is none itself; each of them begins
 * and ends.
 */
void job_worker_begin(struct job *job);
void job_worker_end(struct job *job);

/* The work is done and is kept up to date from now on: the job is ready. Once. */
void job_set_ready(struct job *job);

enum job_ask {
    JOB_ASK_NOTHING,
    JOB_ASK_COMPLETE, /* co_run shall return, and co_prepare pivot */
    JOB_ASK_FINISH,   /* co_run shall return, and nothing else change */
};

/* What a job that is ready is asked for. Also on the control thread. */
enum job_ask job_asked(const struct job *job);

/*
 * Waits until the deadline, or until there is something to look at: job_should_pause() or job_asked(). 0, or -ECANCELED.
 */
int co_fn job_co_sleep_until(struct job *job, uint64_t deadline_ns);

/*
 * An I/O error, a negative errno: what the policy says to do about it. Tells clients (at most once a second for the same,
 * but every pause), and keeps the io-status. After JOB_ERROR_ACTION_STOP the next pause point rests; the failed I/O is to be tried
 * again after it.
 */
enum job_error_action job_error_action(struct job *job, enum job_on_error policy, int error,
                                       enum io_operation operation);

#endif
