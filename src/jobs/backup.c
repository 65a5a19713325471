/* SPDX-License-Identifier: Apache-2.0 */
/* The backup job: options, error policies, and the end of a backup; what it does in between is in backup-engine.c. */
#include "jobs/backup.h"
#include "base/alloc.h"
#include "base/log.h"
#include "base/macros.h"
#include "bitmaps/dirty-bitmap.h"
#include "jobs/backup-engine.h"
#include "schema-types.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define SCRATCH_DIR_DEFAULT "/var/tmp"
/* A small disk may be written all over before its backup has got far. */
#define SCRATCH_LEAST       GIB
#define CBW_TIMEOUT_DEFAULT (30 * NS_PER_S)
#define END_RETRY_NS        NS_PER_S
#define MAX_WORKERS_DEFAULT 16

/* The job's state. */
struct backup_job {
    struct job *job;
    struct backup *backup;
    enum job_on_error on_source_error;
    enum job_on_error on_target_error;
    char *owner; /* "job 'b0'" */

    /* Of a backup with a bitmap. */
    struct dirty_bitmap_ref bitmap; /* strings owned; name NULL: none */
    enum bitmap_sync_mode mode;
    bool succeeded;
    struct dirty_bitmap_action bitmap_action; /* of the change that is carried out */
    struct change_action look;                /* between freezing and catching the point */
};

static int co_fn job_pause_point(void *arg)
{
    struct backup_job *b = arg;

    return job_co_pause_point(b->job);
}

static void job_worker(void *arg, bool begins)
{
    struct backup_job *b = arg;

    if (begins)
        job_worker_begin(b->job);
    else
        job_worker_end(b->job);
}

static enum copy_error_action job_on_error(void *arg, int error, bool is_read)
{
    struct backup_job *b = arg;

    switch (job_error_action(b->job, is_read ? b->on_source_error : b->on_target_error, error,
                             is_read ? IO_OPERATION_READ : IO_OPERATION_WRITE)) {
    case JOB_ERROR_ACTION_IGNORE:
        return COPY_SKIP;
    case JOB_ERROR_ACTION_REPORT:
        return COPY_FAIL;
    case JOB_ERROR_ACTION_STOP:
        break;
    }
    return COPY_RETRY;
}

static const struct copy_policy job_policy = {
    .co_pause_point = job_pause_point,
    .worker = job_worker,
    .on_error = job_on_error,
};

static int co_fn backup_job_co_run(struct job *job, struct error **err)
{
    struct backup_job *b = job_state(job);
    int r = backup_co_run(b->backup);
    int broken = backup_point_error(b->backup);

    if (r == -ESTALE && broken)
        return error_set(
            err, EIO,
            "the point in time is lost, since a block could not be saved before a guest "
            "overwrote it: %s",
            strerror(-broken));
    return r;
}

/* C3: what was copied before a failure loses its bits only if it is durable. */
static bool begins_anew(const struct backup_job *b)
{
    return (b->mode == BITMAP_SYNC_MODE_ALWAYS && backup_is_durable(b->backup)) ||
           (b->mode == BITMAP_SYNC_MODE_ON_SUCCESS && b->succeeded);
}

/* What becomes of the bitmap, in the change that takes the filter out. */
static int end_bitmap(struct change *c, void *arg, struct error **err)
{
    struct backup_job *b = arg;

    if (!b->bitmap.name)
        return 0;
    return begins_anew(b) ? dirty_bitmap_action_abdicate(c, &b->bitmap_action, b->bitmap, err)
                          : dirty_bitmap_action_reclaim(c, &b->bitmap_action, b->bitmap, err);
}

/* What the target lacks stays dirty where the old bits went. Nothing else has run on the control thread since the change. */
static void keep_uncopied(struct backup_job *b)
{
    struct bitmap *bits;

    if (!b->bitmap.name || !begins_anew(b))
        return;
    bits = dirty_bitmap_bits(b->bitmap_action.bitmap);
    /* Without memory they report more than is dirty. */
    (void)bitmap_merge(bits, backup_skipped(b->backup));
    if (!b->succeeded)
        (void)bitmap_merge(bits, backup_uncopied(b->backup));
}

/* The filter must go whatever it takes: until then guests run through it, which costs them next to nothing. */
static void co_fn control_fn take_filter_out(struct backup_job *b)
{
    for (;;) {
        AUTO(error_free) struct error *err = NULL;

        if (backup_co_end(b->backup, end_bitmap, b, &err) == 0)
            break;
        log_warning("%s, retrying", error_text(err));
        co_shield_begin();
        (void)co_sleep_until(loop_clock() + END_RETRY_NS); /* shielded */
        co_shield_end();
    }
    keep_uncopied(b);
}

static void co_fn control_fn backup_job_co_commit(struct job *job)
{
    struct backup_job *b = job_state(job);

    b->succeeded = true;
    take_filter_out(b);
}

static void co_fn control_fn backup_job_co_abort(struct job *job)
{
    struct backup_job *b = job_state(job);

    backup_give_up(b->backup);
    take_filter_out(b);
}

static void co_fn control_fn release(struct backup_job *b)
{
    b->backup = backup_co_free(b->backup);
    free((char *)(uintptr_t)b->bitmap.node);
    free((char *)(uintptr_t)b->bitmap.name);
    free(b->owner);
    b->bitmap = (struct dirty_bitmap_ref){.node = NULL};
    b->owner = NULL;
}

static void co_fn control_fn backup_job_co_clean(struct job *job)
{
    release(job_state(job));
}

static void backup_job_set_speed(struct job *job, uint64_t bytes_per_second)
{
    const struct backup_job *b = job_state(job);

    if (b->backup)
        backup_set_speed(b->backup, bytes_per_second);
}

static void backup_job_progress(const struct job *job, uint64_t *ret_current, uint64_t *ret_total)
{
    const struct backup_job *b = job_state(job);

    backup_progress(b->backup, ret_current, ret_total);
}

static const struct job_ops backup_ops = {
    .type = JOB_TYPE_BACKUP,
    .state_size = sizeof(struct backup_job),
    .co_run = backup_job_co_run,
    .co_commit = backup_job_co_commit,
    .co_abort = backup_job_co_abort,
    .co_clean = backup_job_co_clean,
    .set_speed = backup_job_set_speed,
    .progress = backup_job_progress,
};

/* Which modes go with which sync: QEMU's rules. */
static int check_bitmap(const struct blockdev_backup_options *o, struct error **err)
{
    const char *sync = backup_sync_mode_name(o->sync);
    bool consumes = o->sync == BACKUP_SYNC_MODE_INCREMENTAL || o->sync == BACKUP_SYNC_MODE_BITMAP;

    if (!o->bitmap && consumes)
        return error_set(err, EINVAL, "sync=%s needs a bitmap", sync);
    if (!o->bitmap && o->has_bitmap_mode)
        return error_set(err, EINVAL, "bitmap-mode needs a bitmap");
    if (!o->bitmap)
        return 0;
    if (o->sync == BACKUP_SYNC_MODE_NONE)
        return error_set(err, EINVAL, "a bitmap has no meaning with sync=none");
    if (!o->has_bitmap_mode && o->sync != BACKUP_SYNC_MODE_INCREMENTAL)
        return error_set(err, EINVAL, "sync=%s with a bitmap needs a bitmap-mode", sync);
    if (o->sync == BACKUP_SYNC_MODE_INCREMENTAL && o->has_bitmap_mode &&
        o->bitmap_mode != BITMAP_SYNC_MODE_ON_SUCCESS)
        return error_set(err, EINVAL,
                         "sync=incremental has the bitmap-mode on-success, not %s: use sync=bitmap",
                         bitmap_sync_mode_name(o->bitmap_mode));
    if (!consumes && o->bitmap_mode == BITMAP_SYNC_MODE_NEVER)
        return error_set(err, EINVAL, "bitmap-mode=never has no meaning with sync=%s", sync);
    return 0;
}

static enum backup_sync sync_of(enum backup_sync_mode mode)
{
    switch (mode) {
    case BACKUP_SYNC_MODE_FULL:
        return BACKUP_FULL;
    case BACKUP_SYNC_MODE_TOP:
        return BACKUP_TOP;
    case BACKUP_SYNC_MODE_NONE:
        return BACKUP_NONE;
    case BACKUP_SYNC_MODE_INCREMENTAL:
    case BACKUP_SYNC_MODE_BITMAP:
        break;
    }
    return BACKUP_BITMAP;
}

static struct point_options point_options_of(const struct blockdev_backup_options *o, uint64_t size)
{
    struct point_options p = {
        .policy = o->cbw_policy == CBW_POLICY_BACKUP ? POINT_BACKUP_FIRST : POINT_GUEST_FIRST,
        .latency_bound_ns = o->cbw_latency_bound * NS_PER_MS,
        .timeout_ns = o->cbw_timeout ? o->cbw_timeout * NS_PER_S : CBW_TIMEOUT_DEFAULT,
        .ram_bytes = o->cbw_ram,
        .scratch_dir = o->cbw_scratch ? o->cbw_scratch : SCRATCH_DIR_DEFAULT,
        .scratch_max_bytes =
            o->has_cbw_scratch_max ? o->cbw_scratch_max : MAX(size / 10, SCRATCH_LEAST),
    };

    return p;
}

static int co_fn control_fn make_backup(struct backup_job *b, struct graph *g,
                                        const struct blockdev_backup_options *o, struct error **err)
{
    struct node *source;
    struct backup_options options = {
        .owner = b->owner,
        .source = o->device,
        .target = o->target,
        .filter_name = o->filter_node_name,
        .sync = sync_of(o->sync),
        .keeps_partial = b->bitmap.name && b->mode == BITMAP_SYNC_MODE_ALWAYS,
        .compress = o->compress,
        .offload = o->x_perf && o->x_perf->use_copy_range,
        .workers = o->x_perf ? (unsigned)o->x_perf->max_workers : MAX_WORKERS_DEFAULT,
        .chunk = o->x_perf && o->x_perf->max_chunk ? o->x_perf->max_chunk : COPY_CHUNK_DEFAULT,
        .speed = (uint64_t)o->speed,
        .policy = &job_policy,
        .policy_arg = b,
    };
    int r = graph_need(g, o->device, &source, err);

    if (r < 0)
        return r;
    if (options.chunk < BACKUP_CLUSTER || options.chunk % BACKUP_CLUSTER)
        return error_set(err, EINVAL, "x-perf.max-chunk: %llu is no multiple of 64 KiB",
                         (unsigned long long)options.chunk);
    options.point = point_options_of(o, node_size(source));
    return backup_co_new(&b->backup, g, &options, err);
}

int backup_job_co_new(struct backup_job **ret, struct jobs *jobs, struct graph *g,
                      const struct blockdev_backup_options *o, struct job_txn *txn,
                      struct error **err)
{
    struct job_options options = {
        .id = o->job_id,
        .auto_finalize = o->auto_finalize,
        .auto_dismiss = o->auto_dismiss,
        .speed = (uint64_t)o->speed,
        .txn = txn,
    };
    struct backup_job *b;
    struct job *job;
    int r = o->job_id ? check_bitmap(o, err) : error_set(err, EINVAL, "a backup needs a job-id");

    if (r == 0)
        r = job_new(&job, jobs, &backup_ops, &options, err);
    if (r < 0)
        return r;
    b = job_state(job);
    b->job = job;
    b->owner = xasprintf("job '%s'", o->job_id);
    if (o->bitmap) {
        b->bitmap.node = xstrdup(o->device);
        b->bitmap.name = xstrdup(o->bitmap);
        b->mode = o->has_bitmap_mode ? o->bitmap_mode : BITMAP_SYNC_MODE_ON_SUCCESS;
    }
    b->on_source_error = o->on_source_error;
    b->on_target_error = o->on_target_error;
    r = make_backup(b, g, o, err);
    if (r < 0) {
        backup_job_co_discard(b);
        return r;
    }
    *ret = b;
    return 0;
}

static int look_co_prepare(struct change_action *a, struct error **err)
{
    struct backup_job *b = container_of(a, struct backup_job, look);

    (void)err;
    backup_set_bitmap(b->backup, dirty_bitmap_bits(b->bitmap_action.bitmap));
    return 0;
}

static const struct change_action_ops look_ops = {.co_prepare = look_co_prepare};

int backup_job_add_actions(struct backup_job *b, struct change *c, struct error **err)
{
    int r = 0;

    if (b->bitmap.name) {
        r = dirty_bitmap_action_freeze(c, &b->bitmap_action, b->bitmap, b->owner, err);
        if (r < 0)
            return r;
        b->bitmap_action.leaves_as_it_was = b->mode == BITMAP_SYNC_MODE_NEVER;
        change_add_action(c, &b->look, &look_ops);
    }
    return backup_add_actions(b->backup, c, err);
}

void backup_job_start(struct backup_job *b)
{
    job_start(b->job);
}

void backup_job_co_discard(struct backup_job *b)
{
    struct job *job = b->job;

    release(b);
    job_discard(job);
}
