/* SPDX-License-Identifier: Apache-2.0 */
/* The two tables of a job's life. */
#include "jobs/job-states.h"
#include "base/macros.h"

#include <assert.h>
#include <stddef.h>

#define S(name) JOB_STATUS_##name

/* What is not here is JOB_STATUS_UNDEFINED, which no step leads to. */
static const enum job_status after[JOB_STATUS_COUNT][JOB_STEP_COUNT] = {
    [S(UNDEFINED)] = {[JOB_STEP_CREATE] = S(CREATED)},
    [S(CREATED)] =
        {
            [JOB_STEP_START] = S(RUNNING),
            [JOB_STEP_FAIL] = S(ABORTING),
            [JOB_STEP_VANISH] = S(NULL),
        },
    [S(RUNNING)] =
        {
            [JOB_STEP_REST] = S(PAUSED),
            [JOB_STEP_SYNC] = S(READY),
            [JOB_STEP_SUCCEED] = S(WAITING),
            [JOB_STEP_FAIL] = S(ABORTING),
        },
    [S(PAUSED)] = {[JOB_STEP_GO_ON] = S(RUNNING)},
    [S(READY)] =
        {
            [JOB_STEP_REST] = S(STANDBY),
            [JOB_STEP_SUCCEED] = S(WAITING),
            [JOB_STEP_FAIL] = S(ABORTING),
        },
    [S(STANDBY)] = {[JOB_STEP_GO_ON] = S(READY)},
    [S(WAITING)] = {[JOB_STEP_PEND] = S(PENDING), [JOB_STEP_FAIL] = S(ABORTING)},
    [S(PENDING)] = {[JOB_STEP_FAIL] = S(ABORTING), [JOB_STEP_CONCLUDE] = S(CONCLUDED)},
    /* Failing again, with the rest of its transaction, changes nothing. */
    [S(ABORTING)] = {[JOB_STEP_FAIL] = S(ABORTING), [JOB_STEP_CONCLUDE] = S(CONCLUDED)},
    [S(CONCLUDED)] = {[JOB_STEP_VANISH] = S(NULL)},
};

#define IN(name) (1u << S(name))
#define IN_WORK  (IN(CREATED) | IN(RUNNING) | IN(PAUSED) | IN(READY) | IN(STANDBY))

struct verb {
    const char *name;
    unsigned allowed; /* IN() of states */
};

static const struct verb verbs[JOB_VERB_COUNT] = {
    [JOB_VERB_CANCEL] = {"cancel", IN_WORK | IN(WAITING) | IN(PENDING)},
    [JOB_VERB_PAUSE] = {"pause", IN_WORK},
    [JOB_VERB_RESUME] = {"resume", IN_WORK},
    [JOB_VERB_SET_SPEED] = {"set-speed", IN_WORK},
    [JOB_VERB_COMPLETE] = {"complete", IN(READY) | IN(STANDBY)},
    [JOB_VERB_FINALIZE] = {"finalize", IN(PENDING)},
    [JOB_VERB_DISMISS] = {"dismiss", IN(CONCLUDED)},
};

enum job_status job_status_after(enum job_status status, enum job_step step)
{
    assert(status < JOB_STATUS_COUNT && step < JOB_STEP_COUNT);
    return after[status][step];
}

bool job_verb_allowed(enum job_status status, enum job_verb verb)
{
    assert(status < JOB_STATUS_COUNT && verb < JOB_VERB_COUNT);
    return verbs[verb].allowed & (1u << status);
}

const char *job_verb_name(enum job_verb verb)
{
    assert(verb < JOB_VERB_COUNT);
    return verbs[verb].name;
}
