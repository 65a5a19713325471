/* SPDX-License-Identifier: Apache-2.0 */
/* The job that changes the key slots of an encrypted disk in use. */
#ifndef CAIRN_JOBS_AMEND_KEYS_H
#define CAIRN_JOBS_AMEND_KEYS_H

#include "base/context.h"
#include "base/error.h"
#include "graph/graph.h"
#include "jobs/job.h"

struct amend_options; /* generated */

struct amend_keys_request {
    const char *job_id;
    const char *node_name;
    const struct amend_options *options;
    bool force;
};

/* Makes the job and starts it; secrets are copied. -ENOENT, -EINVAL if the node has another driver. */
int co_fn control_fn amend_keys_co_start(struct jobs *jobs, struct graph *g,
                                         const struct amend_keys_request *request,
                                         struct error **err);

#endif
