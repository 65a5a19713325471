/* SPDX-License-Identifier: Apache-2.0 */
/* The life of jobs: both tables in full, what clients are told, commands, transactions; under sim by seed and on real threads. */
#include "job-fixture.h"
#include "jobs/job-states.h"
#include "loop/sim/sim.h"
#include "seeds.h"

/* Runs body(world) under sim by seed, then on each real engine. */
typedef void world_fn(struct job_world *w);

static void in_world(void *arg)
{
    world_fn *body = *(world_fn **)arg;
    struct job_world w;

    job_world_init(&w);
    body(&w);
    job_world_release(&w);
}

static void on_real(world_fn *body)
{
    static const enum loop_engine engines[] = {LOOP_ENGINE_IO_URING, LOOP_ENGINE_THREADS};

    for (size_t i = 0; i < ARRAY_SIZE(engines); i++) {
        struct error *err = NULL;

        if (loop_run_main(engines[i], "control", in_world, &body, &err) < 0)
            fail_msg("%s", error_text(err));
    }
}

static void everywhere(world_fn *body)
{
    TEST_SEEDS (seed) {
        struct sim_options o;

        sim_options_init(&o, seed);
        assert_int_equal(sim_run(&o, in_world, &body), SIM_RETURNED);
    }
    on_real(body);
}

static const struct job_options automatic = {.auto_finalize = true, .auto_dismiss = true};

static struct job_options named(const char *id, bool auto_finalize, bool auto_dismiss)
{
    struct job_options o = automatic;

    o.id = id;
    o.auto_finalize = auto_finalize;
    o.auto_dismiss = auto_dismiss;
    return o;
}

static void must_be_counted(const struct probe *p, unsigned prepared, unsigned committed,
                            unsigned aborted)
{
    assert_int_equal(p->prepared, prepared);
    assert_int_equal(p->committed, committed);
    assert_int_equal(p->aborted, aborted);
    assert_int_equal(p->cleaned, 1);
    assert_int_equal(atomic_get(&p->running), 0);
}

/* ---- the tables ---- */

/* The letters of the states, in the order of the enum: undefined, created, running, paused, ready, standby, ... */
#define LETTERS "UCRPYSWDXEN"

static enum job_status status_of(char letter)
{
    return (enum job_status)(strchr(LETTERS, letter) - LETTERS);
}

static bool steps_lead(enum job_status from, enum job_status to)
{
    for (int step = 0; step < JOB_STEP_COUNT; step++) {
        if (job_status_after(from, (enum job_step)step) == to)
            return true;
    }
    return false;
}

static void test_job__transitions_are_the_peers(void **state)
{
    static const char *const rows[] = {
        "U C", "C RXN", "R PYWX", "P R", "Y SWX", "S Y", "W DX", "D XE", "X XE", "E N", "N ",
    };

    (void)state;
    assert_int_equal(ARRAY_SIZE(rows), JOB_STATUS_COUNT);
    for (size_t i = 0; i < ARRAY_SIZE(rows); i++) {
        enum job_status from = status_of(rows[i][0]);

        for (const char *to = &LETTERS[1]; *to; to++) {
            bool legal = strchr(rows[i] + 2, *to);

            if (steps_lead(from, status_of(*to)) != legal)
                fail_msg("%s to %s: %d expected", job_status_name(from),
                         job_status_name(status_of(*to)), legal);
        }
    }
}

static void test_job__verbs_are_the_peers(void **state)
{
    static const struct {
        enum job_verb verb;
        const char *name;
        const char *allowed;
    } rows[] = {
        {JOB_VERB_CANCEL, "cancel", "CRPYSWD"}, {JOB_VERB_PAUSE, "pause", "CRPYS"},
        {JOB_VERB_RESUME, "resume", "CRPYS"},   {JOB_VERB_SET_SPEED, "set-speed", "CRPYS"},
        {JOB_VERB_COMPLETE, "complete", "YS"},  {JOB_VERB_FINALIZE, "finalize", "D"},
        {JOB_VERB_DISMISS, "dismiss", "E"},
    };

    (void)state;
    assert_int_equal(ARRAY_SIZE(rows), JOB_VERB_COUNT);
    for (size_t i = 0; i < ARRAY_SIZE(rows); i++) {
        assert_string_equal(job_verb_name(rows[i].verb), rows[i].name);
        for (const char *in = LETTERS; *in; in++) {
            bool allowed = strchr(rows[i].allowed, *in);

            if (job_verb_allowed(status_of(*in), rows[i].verb) != allowed)
                fail_msg("%s in %s: %d expected", rows[i].name, job_status_name(status_of(*in)),
                         allowed);
        }
    }
}

/* ---- what clients are told ---- */

static void success(struct job_world *w)
{
    struct probe p = {.steps = 3};

    start_job(w, "b0", &p);
    wait_until_gone(w, "b0");
    must_be_told(w, "b0", "created running waiting pending COMPLETED concluded null");
    must_be_counted(&p, 1, 1, 0);
    assert_int_equal(p.runs, 1);
    assert_int_equal(p.steps_done, 3);
}

static void test_job__success_is_told_in_order(void **state)
{
    (void)state;
    everywhere(success);
}

static void ready_and_completed(struct job_world *w)
{
    struct probe p = {.steps = 2, .syncs = true};
    struct job *job = start_job(w, "m0", &p);

    must_refuse_job(job_complete(job, err),
                    "job 'm0' in state 'running' cannot accept command verb 'complete'");
    wait_for_status(w, "m0", JOB_STATUS_READY);
    must_accept_job(job_complete(job, err));
    wait_until_gone(w, "m0");
    must_be_told(w, "m0", "created running ready READY waiting pending COMPLETED concluded null");
    must_be_counted(&p, 1, 1, 0);
}

static void test_job__ready_waits_to_be_completed(void **state)
{
    (void)state;
    everywhere(ready_and_completed);
}

static void failure(struct job_world *w)
{
    struct probe plain = {.steps = 2, .fail = -ENOSPC};
    struct probe text = {.steps = 1, .fail = -EIO, .fail_text = "the target is full of bees"};
    struct probe late = {.syncs = true, .fail_ready = -EIO};
    struct job_options o = named("b1", true, false);
    struct job_picture picture;
    struct job *job;

    start_job(w, "b0", &plain);
    job = make_job(w, &probe_ops, &o, &text);
    job_start(job);
    start_job(w, "m0", &late);
    wait_until_gone(w, "b0");
    wait_until_gone(w, "m0");
    wait_for_status(w, "b1", JOB_STATUS_CONCLUDED);
    must_be_told(w, "b0", "created running aborting COMPLETED(failed) concluded null");
    must_be_told(w, "b1", "created running aborting COMPLETED(failed) concluded");
    must_be_told(w, "m0", "created running ready READY aborting COMPLETED(failed) concluded null");
    must_be_counted(&plain, 0, 0, 1);
    must_be_counted(&text, 0, 0, 1);
    must_be_counted(&late, 0, 0, 1);
    job_picture(job, &picture);
    assert_string_equal(picture.error, "the target is full of bees");
    assert_int_equal(job_result(job), -EIO);
    must_accept_job(job_dismiss(job, err));
}

static void test_job__failure_is_told_with_its_reason(void **state)
{
    (void)state;
    everywhere(failure);
}

/* C7: between pending and finalize nothing has been prepared, so that nothing is held. */
static void manual_end(struct job_world *w)
{
    struct probe p = {.steps = 1};
    struct job_options o = named("b0", false, false);
    struct job_options same = named("b0", true, true);
    struct job *job = make_job(w, &probe_ops, &o, &p);
    struct job *other;

    must_refuse_job(job_finalize(job, err), "in state 'created' cannot accept");
    job_start(job);
    wait_for_status(w, "b0", JOB_STATUS_PENDING);
    assert_int_equal(co_sleep_until(loop_clock() + 5 * NS_PER_MS), 0);
    must_be_told(w, "b0", "created running waiting pending PENDING");
    assert_int_equal(p.prepared, 0);
    must_refuse_job(job_dismiss(job, err),
                    "in state 'pending' cannot accept command verb 'dismiss'");
    must_accept_job(job_finalize(job, err));
    wait_for_status(w, "b0", JOB_STATUS_CONCLUDED);
    must_be_counted(&p, 1, 1, 0);
    must_refuse_job(job_cancel(job, true, err), "in state 'concluded' cannot accept");
    must_refuse_job(job_new(&other, w->jobs, &probe_ops, &same, err),
                    "there is a job 'b0' already");
    must_accept_job(job_dismiss(job, err));
    assert_null(jobs_find(w->jobs, "b0"));
    must_be_told(w, "b0", "created running waiting pending PENDING COMPLETED concluded null");
}

static void test_job__pending_prepares_nothing_before_finalize(void **state)
{
    (void)state;
    everywhere(manual_end);
}

static void plain_job(struct job_world *w)
{
    struct job_ops ops = probe_ops;
    struct probe good = {.steps = 1, .errors = 1, .error = -EIO, .policy = JOB_ON_ERROR_IGNORE};
    struct probe bad = {.fail = -EIO};
    struct job_options a = named("c0", true, true);
    struct job_options b = named("c1", true, true);

    ops.type = JOB_TYPE_CREATE;
    ops.plain = true;
    job_start(make_job(w, &ops, &a, &good));
    job_start(make_job(w, &ops, &b, &bad));
    wait_for_status(w, "c0", JOB_STATUS_CONCLUDED);
    wait_for_status(w, "c1", JOB_STATUS_CONCLUDED);
    must_be_told(w, "c0", "created running waiting pending concluded");
    must_be_told(w, "c1", "created running aborting concluded");
    jobs_co_cancel_all(w->jobs); /* their operations end here */
}

static void test_job__plain_ones_tell_their_status_only(void **state)
{
    (void)state;
    everywhere(plain_job);
}

static void discard(struct job_world *w)
{
    struct probe p = {.steps = 0};
    struct job_options o = named("b0", true, true);

    job_discard(make_job(w, &probe_ops, &o, &p));
    assert_null(jobs_find(w->jobs, "b0"));
    must_be_told(w, "b0", "created null");
    assert_int_equal(p.runs + p.prepared + p.committed + p.aborted + p.cleaned, 0);
}

static void test_job__discarded_it_is_as_if_never_made(void **state)
{
    (void)state;
    everywhere(discard);
}

static void bad_ids(struct job_world *w)
{
    static const char *const ids[] = {"", "0a", "a b", "-", "a/b", "\303\244"};
    char longest[130];
    struct job_options o = automatic;
    struct job *job;

    must_refuse_job(job_new(&job, w->jobs, &probe_ops, &o, err), "a job needs a name");
    for (size_t i = 0; i < ARRAY_SIZE(ids); i++) {
        o.id = ids[i];
        must_refuse_job(job_new(&job, w->jobs, &probe_ops, &o, err),
                        *ids[i] ? "is not well-formed" : "a job needs a name");
    }
    memset(longest, 'x', sizeof(longest));
    longest[128] = '\0';
    o.id = longest;
    must_refuse_job(job_new(&job, w->jobs, &probe_ops, &o, err), "is not well-formed");
    assert_string_equal(w->log, "");
}

static void test_job__needs_a_name_that_is_one(void **state)
{
    (void)state;
    on_real(bad_ids);
}

/* ---- pause ---- */

static void pause_and_resume(struct job_world *w)
{
    struct probe p = {.steps = 40};
    struct job *job = start_job(w, "b0", &p);
    struct job_picture picture;
    unsigned done;

    must_refuse_job(job_resume(job, err), "job 'b0' is not paused");
    must_accept_job(job_pause(job, err));
    must_refuse_job(job_pause(job, err), "job 'b0' is already paused");
    wait_for_status(w, "b0", JOB_STATUS_PAUSED);
    done = atomic_get(&p.steps_done);
    job_picture(job, &picture);
    assert_true(picture.paused);
    assert_false(picture.busy);
    assert_int_equal(co_sleep_until(loop_clock() + 10 * NS_PER_MS), 0);
    assert_int_equal(atomic_get(&p.steps_done), done);
    must_refuse_job(job_cancel(job, false, err), "job 'b0' is paused");
    must_accept_job(job_resume(job, err));
    job_picture(job, &picture);
    assert_int_equal(picture.status, JOB_STATUS_RUNNING);
    assert_false(picture.paused);
    wait_until_gone(w, "b0");
    must_be_told(w, "b0",
                 "created running paused running waiting pending COMPLETED concluded null");
    assert_int_equal(p.steps_done, 40);
}

static void test_job__paused_it_does_nothing(void **state)
{
    (void)state;
    everywhere(pause_and_resume);
}

/* With several workers it is paused when all of them rest, and not before. */
static void pause_of_workers(struct job_world *w)
{
    struct probe p = {.steps = 30, .workers = 5};
    struct job *job = start_job(w, "b0", &p);

    for (unsigned i = 0; i < 4; i++) {
        unsigned done;

        assert_int_equal(co_sleep_until(loop_clock() + 4 * PROBE_STEP_NS), 0);
        must_accept_job(job_pause(job, err));
        wait_for_status(w, "b0", JOB_STATUS_PAUSED);
        done = atomic_get(&p.steps_done);
        assert_int_equal(co_sleep_until(loop_clock() + 4 * PROBE_STEP_NS), 0);
        assert_int_equal(atomic_get(&p.steps_done), done);
        must_accept_job(job_resume(job, err));
    }
    wait_until_gone(w, "b0");
    assert_int_equal(p.steps_done, 150);
    must_be_told(w, "b0",
                 "created running paused running paused running paused running paused running "
                 "waiting pending COMPLETED concluded null");
}

static void test_job__is_paused_when_all_workers_rest(void **state)
{
    (void)state;
    TEST_SEEDS (seed) {
        static world_fn *body = pause_of_workers;
        struct sim_options o;

        sim_options_init(&o, seed);
        o.stall_per_mille = 0; /* a stall makes the job end before it is paused */
        assert_int_equal(sim_run(&o, in_world, &body), SIM_RETURNED);
    }
}

/* A pause that is taken back at once leaves no trace, or one pair of events. */
static void pause_taken_back(struct job_world *w)
{
    struct probe p = {.steps = 20};
    struct job *job = start_job(w, "b0", &p);

    must_accept_job(job_pause(job, err));
    must_accept_job(job_resume(job, err));
    wait_until_gone(w, "b0");
    must_be_told(w, "b0", "created running waiting pending COMPLETED concluded null");
}

static void test_job__pause_taken_back_leaves_no_trace(void **state)
{
    (void)state;
    everywhere(pause_taken_back);
}

static void standby(struct job_world *w)
{
    struct probe p = {.syncs = true};
    struct job *job = start_job(w, "m0", &p);

    wait_for_status(w, "m0", JOB_STATUS_READY);
    must_accept_job(job_pause(job, err));
    wait_for_status(w, "m0", JOB_STATUS_STANDBY);
    must_accept_job(job_complete(job, err)); /* it does when it is resumed */
    assert_int_equal(co_sleep_until(loop_clock() + 5 * NS_PER_MS), 0);
    must_be_told(w, "m0", "created running ready READY standby");
    must_accept_job(job_resume(job, err));
    wait_until_gone(w, "m0");
    must_be_told(w, "m0",
                 "created running ready READY standby ready waiting pending COMPLETED concluded "
                 "null");
}

static void test_job__standby_is_the_pause_of_ready(void **state)
{
    (void)state;
    everywhere(standby);
}

static void paused_before_the_start(struct job_world *w)
{
    struct probe p = {.steps = 1};
    struct job_options o = named("b0", true, true);
    struct job *job = make_job(w, &probe_ops, &o, &p);

    must_accept_job(job_pause(job, err));
    job_start(job);
    wait_for_status(w, "b0", JOB_STATUS_PAUSED);
    assert_int_equal(atomic_get(&p.steps_done), 0);
    must_accept_job(job_resume(job, err));
    wait_until_gone(w, "b0");
    must_be_told(w, "b0",
                 "created running paused running waiting pending COMPLETED concluded null");
}

static void test_job__can_be_paused_before_its_start(void **state)
{
    (void)state;
    everywhere(paused_before_the_start);
}

/* ---- cancel ---- */

static void cancel_anywhere(struct job_world *w)
{
    struct probe hangs = {.hangs = true};
    struct probe rests = {.steps = 100};
    struct probe ready = {.syncs = true};
    struct probe standing = {.syncs = true};
    struct probe pends = {.steps = 1};
    struct probe unstarted = {.steps = 1};
    struct job_options manual = named("pends", false, true);
    struct job_options later = named("unstarted", true, true);
    struct job *job;

    start_job(w, "hangs", &hangs);
    job = start_job(w, "rests", &rests);
    must_accept_job(job_pause(job, err));
    start_job(w, "ready", &ready);
    job = start_job(w, "standing", &standing);
    wait_for_status(w, "standing", JOB_STATUS_READY);
    must_accept_job(job_pause(job, err));
    job_start(make_job(w, &probe_ops, &manual, &pends));
    job = make_job(w, &probe_ops, &later, &unstarted);
    wait_for_status(w, "rests", JOB_STATUS_PAUSED);
    wait_for_status(w, "ready", JOB_STATUS_READY);
    wait_for_status(w, "standing", JOB_STATUS_STANDBY);
    wait_for_status(w, "pends", JOB_STATUS_PENDING);

    must_accept_job(job_cancel(jobs_find(w->jobs, "hangs"), true, err));
    must_accept_job(job_cancel(jobs_find(w->jobs, "rests"), true, err));
    must_accept_job(job_cancel(jobs_find(w->jobs, "ready"), true, err));
    must_accept_job(job_cancel(jobs_find(w->jobs, "standing"), true, err));
    must_accept_job(job_cancel(jobs_find(w->jobs, "pends"), true, err));
    must_accept_job(job_cancel(job, true, err));
    job_start(job);
    wait_until_gone(w, "hangs");
    wait_until_gone(w, "rests");
    wait_until_gone(w, "ready");
    wait_until_gone(w, "standing");
    wait_until_gone(w, "pends");
    wait_until_gone(w, "unstarted");
    must_be_told(w, "hangs", "created running aborting CANCELLED concluded null");
    must_be_told(w, "rests", "created running paused running aborting CANCELLED concluded null");
    must_be_told(w, "ready", "created running ready READY aborting CANCELLED concluded null");
    must_be_told(w, "standing",
                 "created running ready READY standby ready aborting CANCELLED concluded null");
    must_be_told(w, "pends",
                 "created running waiting pending PENDING aborting CANCELLED concluded null");
    must_be_told(w, "unstarted", "created aborting CANCELLED concluded null");
    must_be_counted(&hangs, 0, 0, 1);
    must_be_counted(&rests, 0, 0, 1);
    must_be_counted(&ready, 0, 0, 1);
    must_be_counted(&standing, 0, 0, 1);
    must_be_counted(&pends, 0, 0, 1);
    must_be_counted(&unstarted, 0, 0, 1);
    assert_int_equal(unstarted.runs, 0);
}

static void test_job__is_cancelled_in_every_state(void **state)
{
    (void)state;
    everywhere(cancel_anywhere);
}

/* It cannot be stopped, and ends well: it was cancelled all the same. */
static void cancel_deaf(struct job_world *w)
{
    struct probe p = {.steps = 1, .deaf = true};
    struct job_options o = named("b0", true, false);
    struct job *job = make_job(w, &probe_ops, &o, &p);
    struct job_picture picture;

    job_start(job);
    while (atomic_get(&p.steps_done) == 0)
        assert_int_equal(co_sleep_until(loop_clock() + 20 * NS_PER_US), 0);
    must_accept_job(job_cancel(job, true, err));
    must_accept_job(job_cancel(job, true, err));
    wait_for_status(w, "b0", JOB_STATUS_CONCLUDED);
    must_be_told(w, "b0", "created running aborting CANCELLED concluded");
    must_be_counted(&p, 0, 0, 1);
    job_picture(job, &picture);
    assert_string_equal(picture.error, strerror(ECANCELED));
}

static void test_job__cancelled_it_does_not_succeed(void **state)
{
    (void)state;
    everywhere(cancel_deaf);
}

static void soft_cancel(struct job_world *w)
{
    struct probe early = {.hangs = true};
    struct probe p = {.syncs = true};
    struct job *job = start_job(w, "m0", &early);

    must_accept_job(job_cancel(job, false, err));
    wait_until_gone(w, "m0");
    must_be_told(w, "m0", "created running aborting CANCELLED concluded null");

    job = start_job(w, "m1", &p);
    wait_for_status(w, "m1", JOB_STATUS_READY);
    must_accept_job(job_cancel(job, false, err));
    must_refuse_job(job_complete(job, err), "it is being cancelled");
    wait_until_gone(w, "m1");
    must_be_told(w, "m1", "created running ready READY waiting pending COMPLETED concluded null");
    must_be_counted(&p, 1, 1, 0);
}

static void test_job__soft_cancel_of_a_ready_one_lets_it_end_well(void **state)
{
    (void)state;
    everywhere(soft_cancel);
}

/* While it takes effect it is too late for commands; they are refused, and do not wait (P4). */
static void too_late(struct job_world *w)
{
    struct probe p = {.prepare_ns = 20 * NS_PER_MS};
    struct job *job = start_job(w, "b0", &p);

    wait_for_status(w, "b0", JOB_STATUS_PENDING);
    while (!p.prepared)
        assert_int_equal(co_sleep_until(loop_clock() + 20 * NS_PER_US), 0);
    must_refuse_job(job_cancel(job, true, err), "is being finalized already");
    must_refuse_job(job_finalize(job, err), "is being finalized already");
    wait_until_gone(w, "b0");
    must_be_counted(&p, 1, 1, 0);
}

static void test_job__takes_no_commands_while_it_takes_effect(void **state)
{
    (void)state;
    everywhere(too_late);
}

/* ---- errors ---- */

static void stop_on_error(struct job_world *w)
{
    struct probe p = {.errors = 3, .error = -ENOSPC, .policy = JOB_ON_ERROR_ENOSPC};
    struct job *job = start_job(w, "b0", &p);
    struct job_picture picture;

    for (unsigned i = 1; i <= 3; i++) {
        wait_for_status(w, "b0", JOB_STATUS_PAUSED);
        assert_int_equal(atomic_get(&p.errors_met), i);
        job_picture(job, &picture);
        assert_int_equal(picture.io_status, JOB_IO_STATUS_NOSPACE);
        assert_true(picture.paused);
        must_refuse_job(job_pause(job, err), "is already paused");
        must_accept_job(job_resume(job, err));
    }
    job_picture(job, &picture); /* after the last one */
    assert_int_equal(picture.io_status, JOB_IO_STATUS_OK);
    wait_until_gone(w, "b0");
    must_be_told(w, "b0",
                 "created running ERROR-write-stop paused running ERROR-write-stop paused running "
                 "ERROR-write-stop paused running waiting pending COMPLETED concluded null");
}

static void test_job__stops_at_an_error_until_resumed(void **state)
{
    (void)state;
    everywhere(stop_on_error);
}

static void report_error(struct job_world *w)
{
    struct probe reports = {.errors = 1, .error = -EIO, .policy = JOB_ON_ERROR_ENOSPC};
    struct probe full = {.errors = 1, .error = -ENOSPC, .policy = JOB_ON_ERROR_REPORT};
    struct probe stops = {.errors = 1, .error = -EIO, .policy = JOB_ON_ERROR_STOP};
    struct job_picture picture;
    struct job *job;

    start_job(w, "b0", &reports);
    start_job(w, "b1", &full);
    job = start_job(w, "b2", &stops);
    wait_for_status(w, "b2", JOB_STATUS_PAUSED);
    job_picture(job, &picture);
    assert_int_equal(picture.io_status, JOB_IO_STATUS_FAILED);
    wait_until_gone(w, "b0");
    wait_until_gone(w, "b1");
    must_be_told(w, "b0",
                 "created running ERROR-write-report aborting COMPLETED(failed) concluded null");
    must_be_told(w, "b1",
                 "created running ERROR-write-report aborting COMPLETED(failed) concluded null");
    jobs_co_cancel_all(w->jobs); /* the probes end here */
}

static void test_job__error_policies_choose(void **state)
{
    (void)state;
    everywhere(report_error);
}

/* Errors that go on and on are told once a second: 50 us a piece are 60,000 in three seconds of virtual time. */
static void endless_errors(struct job_world *w)
{
    struct probe p = {.errors = 60000, .error = -EIO, .policy = JOB_ON_ERROR_IGNORE};
    uint64_t began = loop_clock();
    unsigned told = 0;
    unsigned seconds;

    start_job(w, "b0", &p);
    while (jobs_find(w->jobs, "b0"))
        assert_int_equal(co_sleep_until(loop_clock() + 10 * NS_PER_MS), 0);
    seconds = (unsigned)((loop_clock() - began) / NS_PER_S);
    for (const char *at = w->log; (at = strstr(at, "ERROR-write-ignore")); at++)
        told++;
    assert_true(seconds >= 3);
    assert_in_range(told, 3, seconds + 1);
}

static void test_job__endless_errors_are_told_once_a_second(void **state)
{
    static world_fn *body = endless_errors;
    struct sim_options o;

    (void)state;
    sim_options_init(&o, 1);
    o.preempt_per_mille = 0;
    assert_int_equal(sim_run(&o, in_world, &body), SIM_RETURNED);
}

/* ---- transactions ---- */

struct group {
    struct job *jobs[3];
    struct probe probes[3];
};

static const char *const group_ids[] = {"a", "b", "c"};

static void group_start(struct job_world *w, struct group *g, bool last_is_manual)
{
    struct job_txn *txn = job_txn_new();

    for (unsigned i = 0; i < 3; i++) {
        struct job_options o = named(group_ids[i], i < 2 || !last_is_manual, true);

        o.txn = txn;
        g->jobs[i] = make_job(w, &probe_ops, &o, &g->probes[i]);
    }
    job_txn_unref(txn);
    for (unsigned i = 0; i < 3; i++)
        job_start(g->jobs[i]);
}

static void group_wait(struct job_world *w)
{
    for (unsigned i = 0; i < 3; i++)
        wait_until_gone(w, group_ids[i]);
}

/* The first status of one job that comes after that of another in the log. */
static void must_come_after(const struct job_world *w, const char *later, const char *earlier)
{
    const char *a = strstr(w->log, earlier);
    const char *b = strstr(w->log, later);

    if (!a || !b || b < a)
        fail_msg("'%s' is not after '%s': %s", later, earlier, w->log);
}

static void group_succeeds(struct job_world *w)
{
    struct group g = {.probes = {{.steps = 1}, {.steps = 20}, {.steps = 3}}};

    group_start(w, &g, false);
    group_wait(w);
    for (unsigned i = 0; i < 3; i++) {
        must_be_told(w, group_ids[i], "created running waiting pending COMPLETED concluded null");
        must_be_counted(&g.probes[i], 1, 1, 0);
    }
    must_come_after(w, "a:pending", "b:waiting");
    must_come_after(w, "b:pending", "c:waiting");
    must_come_after(w, "a:COMPLETED", "c:pending");
}

static void test_job__group_takes_effect_together(void **state)
{
    (void)state;
    everywhere(group_succeeds);
}

static void group_fails(struct job_world *w)
{
    struct group g = {.probes = {{.steps = 1}, {.steps = 10, .fail = -EIO}, {.hangs = true}}};

    group_start(w, &g, false);
    group_wait(w);
    must_be_told(w, "b", "created running aborting COMPLETED(failed) concluded null");
    must_be_told(w, "c", "created running aborting CANCELLED concluded null");
    for (unsigned i = 0; i < 3; i++)
        must_be_counted(&g.probes[i], 0, 0, 1);
}

static void test_job__one_failure_cancels_its_group(void **state)
{
    (void)state;
    everywhere(group_fails);
}

static void group_member_waited(struct job_world *w)
{
    struct group g = {.probes = {{.steps = 0}, {.hangs = true}, {.syncs = true}}};

    group_start(w, &g, false);
    wait_for_status(w, "a", JOB_STATUS_WAITING);
    wait_for_status(w, "c", JOB_STATUS_READY);
    must_accept_job(job_cancel(g.jobs[1], true, err));
    group_wait(w);
    must_be_told(w, "a", "created running waiting aborting CANCELLED concluded null");
    must_be_told(w, "b", "created running aborting CANCELLED concluded null");
    must_be_told(w, "c", "created running ready READY aborting CANCELLED concluded null");
}

static void test_job__cancel_reaches_those_that_wait_for_their_group(void **state)
{
    (void)state;
    everywhere(group_member_waited);
}

/* One is to be finalized by command: all wait for it, and a command to any of them will do. */
static void group_manual(struct job_world *w)
{
    struct group g = {.probes = {{.steps = 1}, {.steps = 2}, {.steps = 3}}};

    group_start(w, &g, true);
    wait_for_status(w, "a", JOB_STATUS_PENDING);
    wait_for_status(w, "c", JOB_STATUS_PENDING);
    assert_int_equal(co_sleep_until(loop_clock() + 2 * NS_PER_MS), 0);
    must_be_told(w, "a", "created running waiting pending");
    must_be_told(w, "c", "created running waiting pending PENDING");
    assert_int_equal(g.probes[0].prepared, 0);
    must_accept_job(job_finalize(g.jobs[0], err));
    group_wait(w);
    for (unsigned i = 0; i < 3; i++)
        must_be_counted(&g.probes[i], 1, 1, 0);
}

static void test_job__group_waits_for_a_command_if_one_member_does(void **state)
{
    (void)state;
    everywhere(group_manual);
}

static void group_not_prepared(struct job_world *w)
{
    struct group g = {.probes = {{.steps = 1}, {.prepare = -EBUSY}, {.steps = 3}}};

    group_start(w, &g, false);
    group_wait(w);
    must_be_told(w, "a", "created running waiting pending aborting CANCELLED concluded null");
    must_be_told(w, "b",
                 "created running waiting pending aborting COMPLETED(failed) concluded null");
    must_be_told(w, "c", "created running waiting pending aborting CANCELLED concluded null");
    must_be_counted(&g.probes[0], 1, 0, 1);
    must_be_counted(&g.probes[1], 1, 0, 1);
    must_be_counted(&g.probes[2], 0, 0, 1);
}

static void test_job__group_is_undone_if_one_cannot_be_prepared(void **state)
{
    (void)state;
    everywhere(group_not_prepared);
}

/* Cancelled between being made and being started. */
static void group_cancelled_early(struct job_world *w)
{
    struct probe probes[2] = {{.steps = 1}, {.steps = 1}};
    struct job_txn *txn = job_txn_new();
    struct job_options a = named("a", true, true);
    struct job_options b = named("b", true, true);
    struct job *first;
    struct job *second;

    a.txn = txn;
    b.txn = txn;
    first = make_job(w, &probe_ops, &a, &probes[0]);
    must_accept_job(job_cancel(first, true, err));
    second = make_job(w, &probe_ops, &b, &probes[1]);
    job_txn_unref(txn);
    job_start(first);
    job_start(second);
    wait_until_gone(w, "a");
    wait_until_gone(w, "b");
    must_be_told(w, "a", "created aborting CANCELLED concluded null");
    must_be_told(w, "b", "created aborting CANCELLED concluded null");
    assert_int_equal(probes[0].runs + probes[1].runs, 0);
}

static void test_job__group_cancelled_before_its_start_never_runs(void **state)
{
    (void)state;
    everywhere(group_cancelled_early);
}

/* ---- the rest ---- */

/* C8: not on the control thread, and not all on one loop. */
static void on_copy_loops(struct job_world *w)
{
    struct probe probes[4] = {{.steps = 1}, {.steps = 1}, {.steps = 1}, {.steps = 1}};
    unsigned on_first = 0;

    for (unsigned i = 0; i < 4; i++) {
        AUTO(free_ptr) char *id = xasprintf("b%u", i);

        start_job(w, id, &probes[i]);
        wait_until_gone(w, id);
        assert_ptr_not_equal(probes[i].ran_on, loop_self());
        if (probes[i].ran_on == loop_thread_loop(w->threads[0]))
            on_first++;
    }
    assert_int_equal(on_first, 2);
}

static void test_job__works_on_copy_loops_only(void **state)
{
    (void)state;
    everywhere(on_copy_loops);
}

static void speed_and_progress(struct job_world *w)
{
    struct probe p = {.steps = 4, .hangs = true};
    struct job_options o = named("b0", true, false);
    struct job_picture picture;
    struct job *job;

    o.speed = 1000;
    job = make_job(w, &probe_ops, &o, &p);
    job_progress_set(job, 0, 7);
    must_accept_job(job_set_speed(job, 2000, err));
    assert_int_equal(p.speed, 0); /* its engine may not be there yet */
    job_start(job);
    assert_int_equal(p.speed, 2000);
    must_accept_job(job_set_speed(job, 0, err));
    assert_int_equal(p.speed, 0);
    while (atomic_get(&p.steps_done) < 4)
        assert_int_equal(co_sleep_until(loop_clock() + 20 * NS_PER_US), 0);
    assert_int_equal(co_sleep_until(loop_clock() + 5 * NS_PER_MS), 0);
    job_picture(job, &picture);
    assert_int_equal(picture.current, 4);
    assert_int_equal(picture.total, 7);
    assert_int_equal(picture.speed, 0);
    assert_true(picture.busy);
    must_accept_job(job_cancel(job, true, err));
    wait_for_status(w, "b0", JOB_STATUS_CONCLUDED);
    must_refuse_job(job_set_speed(job, 1, err), "in state 'concluded' cannot accept");
}

static void test_job__speed_and_progress_are_told(void **state)
{
    (void)state;
    on_real(speed_and_progress);
}

static void add_id(const struct job *job, void *arg)
{
    (void)strcat(strcat(arg, job_id(job)), " ");
}

static void newest_first(struct job_world *w)
{
    struct probe probes[3] = {{.hangs = true}, {.hangs = true}, {.hangs = true}};
    char ids[32] = "";

    start_job(w, "a", &probes[0]);
    start_job(w, "b", &probes[1]);
    start_job(w, "c", &probes[2]);
    jobs_for_each(w->jobs, add_id, ids);
    assert_string_equal(ids, "c b a ");
    jobs_co_cancel_all(w->jobs); /* the probes end here */
}

static void test_job__are_listed_newest_first(void **state)
{
    (void)state;
    on_real(newest_first);
}

/* At the end of the process, whatever jobs are doing. */
static void cancel_all(struct job_world *w)
{
    struct probe probes[5] = {
        {.hangs = true}, {.steps = 1000}, {.steps = 1}, {.fail = -EIO}, {.prepare_ns = NS_PER_MS},
    };
    struct job_options manual = named("pends", false, false);
    struct job_options kept = named("kept", true, false);
    struct job_options late = named("late", true, true);
    struct job *job;

    start_job(w, "hangs", &probes[0]);
    job = start_job(w, "rests", &probes[1]);
    must_accept_job(job_pause(job, err));
    job_start(make_job(w, &probe_ops, &manual, &probes[2]));
    job_start(make_job(w, &probe_ops, &kept, &probes[3]));
    wait_for_status(w, "rests", JOB_STATUS_PAUSED);
    wait_for_status(w, "pends", JOB_STATUS_PENDING);
    wait_for_status(w, "kept", JOB_STATUS_CONCLUDED);
    start_job(w, "ends", &probes[4]);
    wait_for_status(w, "ends", JOB_STATUS_PENDING);
    jobs_co_cancel_all(w->jobs);
    jobs_for_each(w->jobs, add_id, NULL); /* there is none */
    for (unsigned i = 0; i < 5; i++)
        assert_int_equal(probes[i].cleaned, 1);
    must_be_told(w, "kept", "created running aborting COMPLETED(failed) concluded null");
    must_be_told(w, "pends",
                 "created running waiting pending PENDING aborting CANCELLED concluded null");
    must_refuse_job(job_new(&job, w->jobs, &probe_ops, &late, err), "no job can begin any more");
}

static void test_job__all_end_when_the_process_does(void **state)
{
    (void)state;
    everywhere(cancel_all);
}
