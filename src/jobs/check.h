/* SPDX-License-Identifier: Apache-2.0 */
/* The job that checks an image in use. It changes nothing; what it has found can be asked for until it is dismissed. */
#ifndef CAIRN_JOBS_CHECK_H
#define CAIRN_JOBS_CHECK_H

#include "base/context.h"
#include "base/error.h"
#include "formats/qcow2/check/qcow2-check.h"
#include "graph/graph.h"
#include "jobs/job.h"

/* Makes the job and starts it. -ENOENT, -ENOTSUP for what is no qcow2 node. */
int co_fn control_fn check_job_co_start(struct jobs *jobs, struct graph *g, const char *id,
                                        const char *node_name, struct error **err);

/* Of a job of this kind; borrowed. */
struct check_job_picture {
    const char *node_name;
    bool done;                               /* the rest is there */
    const struct qcow2_check_result *result; /* what was found */
    char *const *findings;                   /* lines, the first of them */
    size_t finding_count;
    uint64_t more_findings;
};

void check_job_picture(const struct job *job, struct check_job_picture *ret);

#endif
