/* SPDX-License-Identifier: Apache-2.0 */
/* Commands to jobs, and their events. An unknown job has the class DeviceNotActive where the command is a block-job one. */
#include "base/alloc.h"
#include "base/macros.h"
#include "control/control.h"
#include "jobs/job.h"
#include "schema-dispatch.h"
#include "schema-types.h"

#include <errno.h>
#include <stdlib.h>

/* Numbers of the protocol are signed. */
static int64_t signed_of(uint64_t value)
{
    return (int64_t)MIN(value, (uint64_t)INT64_MAX);
}

/* ---- events ---- */

static json_t *status_event(const struct job_picture *p, const char *id)
{
    const struct job_status_change_event data = {.id = (char *)(uintptr_t)id, .status = p->status};

    return event_job_status_change(&data);
}

static json_t *completed_event(const struct job_picture *p, const char *id)
{
    const struct block_job_completed_event data = {
        .type = p->type,
        .device = (char *)(uintptr_t)id,
        .len = signed_of(p->total),
        .offset = signed_of(p->current),
        .speed = signed_of(p->speed),
        .error = (char *)(uintptr_t)p->error,
    };

    return event_block_job_completed(&data);
}

static json_t *cancelled_event(const struct job_picture *p, const char *id)
{
    const struct block_job_cancelled_event data = {
        .type = p->type,
        .device = (char *)(uintptr_t)id,
        .len = signed_of(p->total),
        .offset = signed_of(p->current),
        .speed = signed_of(p->speed),
    };

    return event_block_job_cancelled(&data);
}

static json_t *ready_event(const struct job_picture *p, const char *id)
{
    const struct block_job_ready_event data = {
        .type = p->type,
        .device = (char *)(uintptr_t)id,
        .len = signed_of(p->total),
        .offset = signed_of(p->current),
        .speed = signed_of(p->speed),
    };

    return event_block_job_ready(&data);
}

static json_t *pending_event(const struct job_picture *p, const char *id)
{
    const struct block_job_pending_event data = {.type = p->type, .id = (char *)(uintptr_t)id};

    return event_block_job_pending(&data);
}

static json_t *error_event(const struct job_event *e, const char *id)
{
    const struct block_job_error_event data = {
        .device = (char *)(uintptr_t)id,
        .operation = e->operation,
        .action = e->action,
    };

    return event_block_job_error(&data);
}

static json_t *make_event(const struct job_event *e)
{
    struct job_picture p;

    job_picture(e->job, &p);
    switch (e->kind) {
    case JOB_EVENT_STATUS_CHANGE:
        return status_event(&p, p.id);
    case JOB_EVENT_COMPLETED:
        return completed_event(&p, p.id);
    case JOB_EVENT_CANCELLED:
        return cancelled_event(&p, p.id);
    case JOB_EVENT_READY:
        return ready_event(&p, p.id);
    case JOB_EVENT_PENDING:
        return pending_event(&p, p.id);
    case JOB_EVENT_ERROR:
        return error_event(e, p.id);
    }
    return NULL;
}

void control_job_event(const struct job_event *e, void *arg)
{
    control_event(arg, make_event(e));
}

/* ---- finding one ---- */

static int find_job(struct qmp_session *session, const char *id, struct job **ret,
                    struct error **err)
{
    *ret = jobs_find(control_of(session)->jobs, id);
    return *ret ? 0 : error_set(err, ENOENT, "there is no job '%s'", id);
}

static int find_block_job(struct qmp_session *session, const char *id, struct job **ret,
                          struct error **err)
{
    struct job_picture p;

    *ret = jobs_find(control_of(session)->jobs, id);
    if (*ret) {
        job_picture(*ret, &p);
        if (!p.plain)
            return 0;
    }
    return error_set_class(err, ERROR_DEVICE_NOT_ACTIVE, ENOENT, "there is no block job '%s'", id);
}

/* ---- commands ---- */

int qmp_job_pause(struct qmp_session *session, const struct job_pause_args *args,
                  struct error **err)
{
    struct job *job;
    int r = find_job(session, args->id, &job, err);

    return r < 0 ? r : job_pause(job, err);
}

int qmp_job_resume(struct qmp_session *session, const struct job_resume_args *args,
                   struct error **err)
{
    struct job *job;
    int r = find_job(session, args->id, &job, err);

    return r < 0 ? r : job_resume(job, err);
}

int qmp_job_cancel(struct qmp_session *session, const struct job_cancel_args *args,
                   struct error **err)
{
    struct job *job;
    int r = find_job(session, args->id, &job, err);

    return r < 0 ? r : job_cancel(job, true, err);
}

int qmp_job_complete(struct qmp_session *session, const struct job_complete_args *args,
                     struct error **err)
{
    struct job *job;
    int r = find_job(session, args->id, &job, err);

    return r < 0 ? r : job_complete(job, err);
}

int qmp_job_finalize(struct qmp_session *session, const struct job_finalize_args *args,
                     struct error **err)
{
    struct job *job;
    int r = find_job(session, args->id, &job, err);

    return r < 0 ? r : job_finalize(job, err);
}

int qmp_job_dismiss(struct qmp_session *session, const struct job_dismiss_args *args,
                    struct error **err)
{
    struct job *job;
    int r = find_job(session, args->id, &job, err);

    return r < 0 ? r : job_dismiss(job, err);
}

int qmp_block_job_pause(struct qmp_session *session, const struct block_job_pause_args *args,
                        struct error **err)
{
    struct job *job;
    int r = find_block_job(session, args->device, &job, err);

    return r < 0 ? r : job_pause(job, err);
}

int qmp_block_job_resume(struct qmp_session *session, const struct block_job_resume_args *args,
                         struct error **err)
{
    struct job *job;
    int r = find_block_job(session, args->device, &job, err);

    return r < 0 ? r : job_resume(job, err);
}

int qmp_block_job_cancel(struct qmp_session *session, const struct block_job_cancel_args *args,
                         struct error **err)
{
    struct job *job;
    int r = find_block_job(session, args->device, &job, err);

    return r < 0 ? r : job_cancel(job, args->force, err);
}

int qmp_block_job_complete(struct qmp_session *session, const struct block_job_complete_args *args,
                           struct error **err)
{
    struct job *job;
    int r = find_block_job(session, args->device, &job, err);

    return r < 0 ? r : job_complete(job, err);
}

int qmp_block_job_finalize(struct qmp_session *session, const struct block_job_finalize_args *args,
                           struct error **err)
{
    struct job *job;
    int r = find_block_job(session, args->id, &job, err);

    return r < 0 ? r : job_finalize(job, err);
}

int qmp_block_job_dismiss(struct qmp_session *session, const struct block_job_dismiss_args *args,
                          struct error **err)
{
    struct job *job;
    int r = find_block_job(session, args->id, &job, err);

    return r < 0 ? r : job_dismiss(job, err);
}

int qmp_block_job_set_speed(struct qmp_session *session,
                            const struct block_job_set_speed_args *args, struct error **err)
{
    struct job *job;
    int r = find_block_job(session, args->device, &job, err);

    return r < 0 ? r : job_set_speed(job, (uint64_t)args->speed, err);
}

/* ---- queries ---- */

static void count_job(const struct job *job, void *arg)
{
    (void)job;
    ++*(size_t *)arg;
}

static void add_job(const struct job *job, void *arg)
{
    struct job_info_array *list = arg;
    struct job_picture p;

    job_picture(job, &p);
    list->items[list->count++] = (struct job_info){
        .id = xstrdup(p.id),
        .type = p.type,
        .status = p.status,
        .current_progress = signed_of(p.current),
        .total_progress = signed_of(p.total),
        .error = p.error ? xstrdup(p.error) : NULL,
    };
}

int qmp_query_jobs(struct qmp_session *session, struct job_info_array *ret, struct error **err)
{
    const struct jobs *jobs = control_of(session)->jobs;
    size_t count = 0;

    jobs_for_each(jobs, count_job, &count);
    ret->items = try_new_n(struct job_info, MAX(count, (size_t)1));
    if (!ret->items)
        return error_set(err, ENOMEM, "no memory for a list of %zu jobs", count);
    jobs_for_each(jobs, add_job, ret);
    return 0;
}

static void add_block_job(const struct job *job, void *arg)
{
    struct block_job_info_array *list = arg;
    struct job_picture p;

    job_picture(job, &p);
    if (p.plain)
        return;
    list->items[list->count++] = (struct block_job_info){
        .type = p.type,
        .device = xstrdup(p.id),
        .len = signed_of(p.total),
        .offset = signed_of(p.current),
        .busy = p.busy,
        .paused = p.paused,
        .speed = signed_of(p.speed),
        .io_status = p.io_status,
        .ready = p.ready,
        .status = p.status,
        .auto_finalize = p.auto_finalize,
        .auto_dismiss = p.auto_dismiss,
        .error = p.error ? xstrdup(p.error) : NULL,
    };
}

int qmp_query_block_jobs(struct qmp_session *session, struct block_job_info_array *ret,
                         struct error **err)
{
    const struct jobs *jobs = control_of(session)->jobs;
    size_t count = 0;

    jobs_for_each(jobs, count_job, &count);
    ret->items = try_new_n(struct block_job_info, MAX(count, (size_t)1));
    if (!ret->items)
        return error_set(err, ENOMEM, "no memory for a list of %zu jobs", count);
    jobs_for_each(jobs, add_block_job, ret);
    return 0;
}
