/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Jobs at random: some that work, fail, hang, become ready, meet errors or cannot be prepared, alone or in groups, and commands
 * to them at random times. Under sim by seed (T1), and the same on real threads with random spins at each atomic (T2).
 *
 * What must hold, whatever the order:
 *   - only the peer's transitions are told, and exactly one of COMPLETED and CANCELLED, right before concluded
 *   - a command is refused exactly when the tables say so, or for the few reasons beside them
 *   - what was started runs at most once, takes effect or is undone, and is cleaned, once; a group does so as one
 *   - nothing is prepared before it is finalized (C7); nothing works while it is paused; nothing runs on the control thread (C8)
 *   - all jobs end (P4): else the simulator reports a deadlock, and real threads run into the timeout
 */
#include "job-fixture.h"
#include "jobs/job-states.h"
#include "loop/sim/sim.h"
#include "seeds.h"

#define JOBS    6
#define ACTIONS 80

struct model {
    struct job_options options;
    char id[4];
    struct probe probe;
    struct job *job; /* NULL: not there (any more) */
    unsigned group;  /* the number of its first member */
    bool started;

    /* What was told. */
    enum job_status status;
    bool ready_told;
    bool end_told;    /* COMPLETED or CANCELLED */
    bool cancel_told; /* the latter */
    bool finalized;   /* by command */
    unsigned steps_at_rest;
};

static struct model models[JOBS];

static struct model *model_of(const struct job *job)
{
    return container_of(probe_of(job), struct model, probe);
}

/* The peer's table; the letters are in the order of the enum. */
static bool legal(enum job_status from, enum job_status to)
{
    static const char letters[] = "UCRPYSWDXEN";
    static const char *const next[] = {"C",  "RXN", "PYWX", "R", "SWX", "Y",
                                       "DX", "XE",  "E",    "N", ""};

    return strchr(next[from], letters[to]);
}

static bool group_is_manual(const struct model *m)
{
    for (unsigned i = 0; i < JOBS; i++) {
        if (models[i].group == m->group && models[i].probe.runs && !models[i].options.auto_finalize)
            return true;
    }
    return false;
}

static bool group_was_finalized(const struct model *m)
{
    for (unsigned i = 0; i < JOBS; i++) {
        if (models[i].group == m->group && models[i].finalized)
            return true;
    }
    return false;
}

static void watch_status(struct model *m, const struct job_picture *p)
{
    if (!legal(m->status, p->status))
        fail_msg("job '%s': from %s to %s", m->id, job_status_name(m->status),
                 job_status_name(p->status));
    if (p->status == JOB_STATUS_CONCLUDED)
        assert_true(m->end_told && m->probe.cleaned == 1);
    else
        assert_true(p->status == JOB_STATUS_NULL || !m->end_told);
    m->status = p->status;
    if (p->status == JOB_STATUS_PAUSED || p->status == JOB_STATUS_STANDBY)
        m->steps_at_rest = atomic_get(&m->probe.steps_done);
    if (p->status == JOB_STATUS_NULL)
        m->job = NULL;
}

static void watch(const struct job_event *e, const struct job_picture *p)
{
    struct model *m;

    if (p->status == JOB_STATUS_CREATED && e->kind == JOB_EVENT_STATUS_CHANGE)
        return; /* it does not know its probe yet */
    m = model_of(e->job);
    switch (e->kind) {
    case JOB_EVENT_STATUS_CHANGE:
        watch_status(m, p);
        break;
    case JOB_EVENT_COMPLETED:
    case JOB_EVENT_CANCELLED:
        assert_false(m->end_told);
        m->end_told = true;
        m->cancel_told = e->kind == JOB_EVENT_CANCELLED;
        assert_int_equal(m->status, p->error ? JOB_STATUS_ABORTING : JOB_STATUS_PENDING);
        break;
    case JOB_EVENT_READY:
        assert_false(m->ready_told);
        m->ready_told = true;
        assert_int_equal(m->status, JOB_STATUS_READY);
        break;
    case JOB_EVENT_PENDING:
        assert_int_equal(m->status, JOB_STATUS_PENDING);
        assert_false(m->options.auto_finalize);
        break;
    case JOB_EVENT_ERROR:
        assert_true(atomic_get(&m->probe.errors_met) > 0);
        break;
    }
}

/* ---- making them ---- */

static void choose_probe(struct prng *prng, struct probe *p)
{
    static const enum job_on_error policies[] = {JOB_ON_ERROR_REPORT, JOB_ON_ERROR_IGNORE,
                                                 JOB_ON_ERROR_ENOSPC, JOB_ON_ERROR_STOP};

    *p = (struct probe){
        .steps = (unsigned)prng_below(prng, 30),
        .workers = prng_chance(prng, 400) ? 1 + (unsigned)prng_below(prng, 4) : 0,
        .fail = prng_chance(prng, 200) ? -EIO : 0,
        .hangs = prng_chance(prng, 100),
        .deaf = prng_chance(prng, 50),
        .syncs = prng_chance(prng, 300),
        .fail_ready = prng_chance(prng, 100) ? -EPIPE : 0,
        .prepare = prng_chance(prng, 150) ? -EBUSY : 0,
        .prepare_ns = prng_chance(prng, 300) ? 1 + prng_below(prng, NS_PER_MS) : 0,
        .errors = prng_chance(prng, 300) ? (unsigned)prng_below(prng, 4) : 0,
        .error = prng_chance(prng, 500) ? -ENOSPC : -EIO,
        .policy = policies[prng_below(prng, ARRAY_SIZE(policies))],
    };
}

static void make_model(struct job_world *w, struct prng *prng, unsigned number, struct job_txn *txn,
                       unsigned group)
{
    struct model *m = &models[number];

    *m = (struct model){.group = group, .status = JOB_STATUS_CREATED};
    (void)snprintf(m->id, sizeof(m->id), "j%u", number % 10);
    m->options = (struct job_options){
        .id = m->id,
        .auto_finalize = prng_chance(prng, 700),
        .auto_dismiss = prng_chance(prng, 700),
        .txn = txn,
    };
    choose_probe(prng, &m->probe);
    m->job = make_job(w, &probe_ops, &m->options, &m->probe);
}

/* Some alone, some in groups, some of which are thrown away. Returns how many there are now. */
static unsigned make_group(struct job_world *w, struct prng *prng, unsigned count)
{
    unsigned size = (unsigned)MIN(1 + prng_below(prng, 3), (uint64_t)(JOBS - count));
    struct job_txn *txn = size > 1 ? job_txn_new() : NULL;
    bool thrown_away = prng_chance(prng, 100);

    for (unsigned i = count; i < count + size; i++)
        make_model(w, prng, i, txn, count);
    job_txn_unref(txn);
    if (prng_chance(prng, 150))
        must_accept_job(job_cancel(models[count].job, true, err));
    if (prng_chance(prng, 300))
        (void)co_sleep_until(loop_clock() + prng_below(prng, NS_PER_MS));
    for (unsigned i = count; i < count + size; i++) {
        models[i].started = !thrown_away;
        if (thrown_away)
            job_discard(models[i].job);
        else
            job_start(models[i].job);
    }
    return count + size;
}

/* ---- commands ---- */

static bool rests(const struct model *m)
{
    return m->status == JOB_STATUS_PAUSED || m->status == JOB_STATUS_STANDBY;
}

static int give(struct model *m, enum job_verb verb, bool force, struct error **err)
{
    switch (verb) {
    case JOB_VERB_CANCEL:
        return job_cancel(m->job, force, err);
    case JOB_VERB_PAUSE:
        return job_pause(m->job, err);
    case JOB_VERB_RESUME:
        return job_resume(m->job, err);
    case JOB_VERB_SET_SPEED:
        return job_set_speed(m->job, 4711, err);
    case JOB_VERB_COMPLETE:
        return job_complete(m->job, err);
    case JOB_VERB_FINALIZE:
        return job_finalize(m->job, err);
    case JOB_VERB_DISMISS:
        return job_dismiss(m->job, err);
    case JOB_VERB_COUNT:
        break;
    }
    return -EINVAL;
}

/* Why a command that the tables allow may be refused all the same. */
static bool other_reason(const struct error *e)
{
    static const char *const reasons[] = {
        "is already paused",          "is not paused",         "is paused: resume it first",
        "is being finalized already", "it is being cancelled",
    };

    for (size_t i = 0; i < ARRAY_SIZE(reasons); i++) {
        if (strstr(error_text(e), reasons[i]))
            return true;
    }
    return false;
}

static void command(struct model *m, enum job_verb verb, bool force)
{
    AUTO(error_free) struct error *e = NULL;
    enum job_status before = m->status;
    int r = give(m, verb, force, &e);

    if (r == 0 && verb == JOB_VERB_FINALIZE)
        m->finalized = true;
    if (r == 0 && !job_verb_allowed(before, verb))
        fail_msg("job '%s': %s was taken in %s", m->id, job_verb_name(verb),
                 job_status_name(before));
    if (r < 0 && !other_reason(e) && job_verb_allowed(before, verb))
        fail_msg("job '%s': %s", m->id, error_text(e));
}

/* What is seen of a job between commands. */
static void look(const struct model *m)
{
    struct job_picture p;

    job_picture(m->job, &p);
    assert_int_equal(p.status, m->status);
    assert_true(p.current <= p.total);
    if (rests(m)) {
        assert_true(p.paused && !p.busy);
        assert_int_equal(atomic_get(&m->probe.steps_done), m->steps_at_rest);
    }
    if (m->probe.prepared && group_is_manual(m))
        assert_true(group_was_finalized(m));                         /* C7 */
    assert_ptr_not_equal(atomic_get(&m->probe.ran_on), loop_self()); /* C8 */
}

/* Late in a test what has stopped is to go on, so that most jobs come to their end. */
static enum job_verb choose_verb(struct prng *prng, const struct model *m, bool late)
{
    if (late && rests(m) && prng_chance(prng, 700))
        return JOB_VERB_RESUME;
    if (late && m->status == JOB_STATUS_PENDING && prng_chance(prng, 700))
        return JOB_VERB_FINALIZE;
    if (late && m->status == JOB_STATUS_READY && prng_chance(prng, 700))
        return JOB_VERB_COMPLETE;
    if (prng_chance(prng, 980)) /* else most jobs would be cancelled */
        return JOB_VERB_PAUSE + (enum job_verb)prng_below(prng, JOB_VERB_COUNT - 1);
    return JOB_VERB_CANCEL;
}

static void act(struct prng *prng, unsigned count, bool late)
{
    struct model *m = &models[prng_below(prng, count)];

    if (!m->job)
        return;
    look(m);
    command(m, choose_verb(prng, m, late), prng_chance(prng, 200));
}

/* ---- the end ---- */

static void check_end(const struct model *m)
{
    const struct probe *p = &m->probe;
    const struct model *first = &models[m->group];

    assert_null(m->job);
    assert_int_equal(m->status, JOB_STATUS_NULL);
    assert_int_equal(p->running, 0);
    assert_true(p->runs <= 1);
    assert_int_equal(m->end_told, m->started);
    assert_int_equal(p->cleaned, m->started);
    assert_int_equal(p->committed + p->aborted, m->started);
    assert_true(p->prepared <= 1 && p->committed <= p->prepared);
    assert_int_equal(p->committed, first->probe.committed);
    if (p->committed)
        assert_true(!m->cancel_told && !p->prepare && (!p->fail || p->deaf));
}

static void body(struct prng *prng)
{
    struct job_world w;
    unsigned count = 0;

    memset(models, 0, sizeof(models));
    job_world_init(&w);
    w.watch = watch;
    for (unsigned i = 0; i < ACTIONS; i++) {
        if (count < JOBS && prng_chance(prng, 150))
            count = make_group(&w, prng, count);
        if (count)
            act(prng, count, i > ACTIONS / 2);
        if (prng_chance(prng, 400))
            (void)co_sleep_until(loop_clock() + prng_below(prng, 500 * NS_PER_US));
    }
    if (prng_chance(prng, 800))
        (void)co_sleep_until(loop_clock() + 3 * NS_PER_MS); /* what can end by itself does */
    jobs_co_cancel_all(w.jobs);
    for (unsigned i = 0; i < count; i++)
        check_end(&models[i]);
    job_world_release(&w);
}

static void in_sim(void *arg)
{
    (void)arg;
    body(sim_prng());
}

static void on_threads(void *arg)
{
    struct prng prng = {.state = *(const uint64_t *)arg};

    sim_install_random_spins(prng.state);
    body(&prng);
    sim_install_random_spins(0);
}

static void test_job_model__life_is_legal(void **state)
{
    (void)state;
    TEST_SEEDS (seed) {
        struct sim_options o;

        sim_options_init(&o, seed);
        assert_int_equal(sim_run(&o, in_sim, NULL), SIM_RETURNED);
    }
}

static void test_job_model__life_is_legal_on_threads(void **state)
{
    (void)state;
    for (uint64_t seed = 1; seed <= 20; seed++) {
        struct error *err = NULL;
        enum loop_engine engine = seed % 2 ? LOOP_ENGINE_THREADS : LOOP_ENGINE_IO_URING;

        if (loop_run_main(engine, "control", on_threads, &seed, &err) < 0)
            fail_msg("%s", error_text(err));
    }
}
