/* SPDX-License-Identifier: Apache-2.0 */
/* Checks of images in use. */
#include "base/alloc.h"
#include "base/macros.h"
#include "control/control.h"
#include "jobs/check.h"
#include "jobs/job.h"
#include "schema-dispatch.h"

#include <errno.h>
#include <stdlib.h>

int qmp_block_check(struct qmp_session *session, const struct block_check_args *args,
                    struct error **err)
{
    struct control *c = control_of(session);

    return check_job_co_start(c->jobs, c->graph, args->job_id, args->node_name, err);
}

static void count_check(const struct job *job, void *arg)
{
    size_t *count = arg;
    struct job_picture p;

    job_picture(job, &p);
    *count += p.type == JOB_TYPE_CHECK;
}

static struct block_check_result *result_of(const struct check_job_picture *c)
{
    struct block_check_result *r = xnew(struct block_check_result);

    *r = (struct block_check_result){
        .check_errors = c->result->check_errors,
        .corruptions = c->result->corruptions,
        .leaks = c->result->leaks,
        .image_end_offset = c->result->image_end_offset,
        .total_clusters = c->result->total_clusters,
        .allocated_clusters = c->result->allocated_clusters,
        .fragmented_clusters = c->result->fragmented_clusters,
        .compressed_clusters = c->result->compressed_clusters,
        .moved_clusters = c->result->moved_clusters,
        .more_findings = c->more_findings,
    };
    r->findings.items = xnew_n(char *, c->finding_count + 1);
    for (size_t i = 0; i < c->finding_count; i++)
        r->findings.items[r->findings.count++] = xstrdup(c->findings[i]);
    return r;
}

static void add_check(const struct job *job, void *arg)
{
    struct block_check_info_array *list = arg;
    struct block_check_info *info = &list->items[list->count];
    struct check_job_picture c;
    struct job_picture p;

    job_picture(job, &p);
    if (p.type != JOB_TYPE_CHECK)
        return;
    check_job_picture(job, &c);
    info->id = xstrdup(p.id);
    info->node_name = xstrdup(c.node_name);
    if (c.done)
        info->result = result_of(&c);
    list->count++;
}

int qmp_query_block_checks(struct qmp_session *session, struct block_check_info_array *ret,
                           struct error **err)
{
    const struct jobs *jobs = control_of(session)->jobs;
    size_t count = 0;

    jobs_for_each(jobs, count_check, &count);
    ret->items = try_new_n(struct block_check_info, MAX(count, (size_t)1));
    if (!ret->items)
        return error_set(err, ENOMEM, "no memory for a list of %zu checks", count);
    jobs_for_each(jobs, add_check, ret);
    return 0;
}
