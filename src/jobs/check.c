/* SPDX-License-Identifier: Apache-2.0 */
/* The check job: a walk over the tables of a qcow2 node, on a copy loop, with pause points between the pieces. */
#include "jobs/check.h"
#include "base/alloc.h"
#include "graph/backend.h"
#include "graph/driver.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define FINDINGS_MAX 100

struct check_job {
    struct job *job;
    struct backend *backend;
    char *owner; /* "job 'c0'" */
    char *node_name;

    /* Of the job's loop, until `done`. */
    struct qcow2_check_result result;
    char *findings[FINDINGS_MAX];
    uint64_t finding_count; /* also of those that are not kept */
    bool done;              /* control thread */
};

static void say(void *arg, const char *line)
{
    struct check_job *c = arg;

    if (c->finding_count < FINDINGS_MAX)
        c->findings[c->finding_count] = xstrdup(line);
    c->finding_count++;
}

static bool co_fn interrupted(void *arg)
{
    const struct check_job *c = arg;

    return job_co_pause_point(c->job) < 0;
}

static void progress(void *arg, uint64_t done, uint64_t total)
{
    const struct check_job *c = arg;

    job_progress_set(c->job, done, total);
}

static int co_fn check_job_co_run(struct job *job, struct error **err)
{
    struct check_job *c = job_state(job);
    struct qcow2_check_options options = QCOW2_CHECK_OPTIONS_INIT;
    int r = backend_attach(c->backend);

    if (r < 0)
        return error_set(err, -r, "no memory");
    options.memory_max /= 4; /* the guests' daemon */
    options.say = say;
    options.interrupted = interrupted;
    options.progress = progress;
    options.arg = c;
    return qcow2_co_check_online(c->backend, &options, &c->result, err);
}

static void co_fn control_fn check_job_co_commit(struct job *job)
{
    struct check_job *c = job_state(job);

    c->done = true;
}

static void co_fn control_fn check_job_co_clean(struct job *job)
{
    struct check_job *c = job_state(job);

    c->backend = backend_co_free(c->backend);
}

static void check_job_release(struct job *job)
{
    struct check_job *c = job_state(job);

    for (unsigned i = 0; i < FINDINGS_MAX; i++)
        free(c->findings[i]);
    free(c->owner);
    free(c->node_name);
}

static const struct job_ops check_ops = {
    .type = JOB_TYPE_CHECK,
    .plain = true,
    .state_size = sizeof(struct check_job),
    .co_run = check_job_co_run,
    .co_commit = check_job_co_commit,
    .co_clean = check_job_co_clean,
    .release = check_job_release,
};

static int co_fn control_fn take_node(struct check_job *c, struct graph *g, struct error **err)
{
    struct access access = {.wants = ACCESS_READ, .tolerates = ACCESS_ALL};
    struct node *node;
    int r = graph_need(g, c->node_name, &node, err);

    if (r == 0 && strcmp(node_driver(node)->name, "qcow2") != 0)
        return error_set(err, ENOTSUP, "node '%s' is of driver '%s': only qcow2 can be checked",
                         c->node_name, node_driver(node)->name);
    return r < 0 ? r : backend_co_new(&c->backend, g, c->node_name, access, c->owner, err);
}

int check_job_co_start(struct jobs *jobs, struct graph *g, const char *id, const char *node_name,
                       struct error **err)
{
    const struct job_options options = {.id = id, .auto_finalize = true};
    struct check_job *c;
    struct job *job;
    int r = job_new(&job, jobs, &check_ops, &options, err);

    if (r < 0)
        return r;
    c = job_state(job);
    c->job = job;
    c->owner = xasprintf("job '%s'", id);
    c->node_name = xstrdup(node_name);
    r = take_node(c, g, err);
    if (r < 0)
        job_discard(job);
    else
        job_start(job);
    return r;
}

void check_job_picture(const struct job *job, struct check_job_picture *ret)
{
    const struct check_job *c = job_state(job);
    uint64_t kept = c->finding_count < FINDINGS_MAX ? c->finding_count : FINDINGS_MAX;

    *ret = (struct check_job_picture){.node_name = c->node_name, .done = c->done};
    if (!c->done)
        return;
    ret->result = &c->result;
    ret->findings = c->findings;
    ret->finding_count = (size_t)kept;
    ret->more_findings = c->finding_count - kept;
}
