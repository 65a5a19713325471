/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The states of a job's life: which step leads from which state to which, and which command is allowed in which.
 *
 *   undefined -> created -> running <-> paused        ready <-> standby
 *                              |  \                     |
 *                              |   +---> ready ---------+
 *                              v                        v
 *                           waiting -> pending -> concluded -> null      any of them -> aborting -> concluded
 */
#ifndef CAIRN_JOBS_JOB_STATES_H
#define CAIRN_JOBS_JOB_STATES_H

#include "schema-shared.h"

#include <stdbool.h>

#define JOB_STATUS_COUNT (JOB_STATUS_NULL + 1)

/* What happens to a job. */
enum job_step {
    JOB_STEP_CREATE,
    JOB_STEP_START,
    JOB_STEP_REST,    /* all of it is at pause points */
    JOB_STEP_GO_ON,   /* and no more */
    JOB_STEP_SYNC,    /* it is ready */
    JOB_STEP_SUCCEED, /* its work has ended well */
    JOB_STEP_PEND,    /* so has that of its whole transaction */
    JOB_STEP_FAIL,    /* it has failed, or is cancelled */
    JOB_STEP_CONCLUDE,
    JOB_STEP_VANISH,
    JOB_STEP_COUNT,
};

enum job_verb {
    JOB_VERB_CANCEL,
    JOB_VERB_PAUSE,
    JOB_VERB_RESUME,
    JOB_VERB_SET_SPEED,
    JOB_VERB_COMPLETE,
    JOB_VERB_FINALIZE,
    JOB_VERB_DISMISS,
    JOB_VERB_COUNT,
};

/* Where a step leads; JOB_STATUS_UNDEFINED: nowhere, it is not possible in this state. */
enum job_status job_status_after(enum job_status status, enum job_step step);

bool job_verb_allowed(enum job_status status, enum job_verb verb);
const char *job_verb_name(enum job_verb verb);

#endif
