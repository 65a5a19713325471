/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The steps of a backup. After a crash of tool or daemon between any two of them the next run finds one of the cases that
 * docs/backup.md lists; what it does about them is steps 2 and 3.
 */
#include "cli/backup-run.h"
#include "base/alloc.h"
#include "base/log.h"
#include "base/macros.h"
#include "cli/cli.h"
#include "cli/session.h"
#include "cli/target.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* Without events of the job, how often it is asked for; and how long it may take to end when it shall. */
#define LOOK_MS      1000
#define LOOK_SHOW_MS 200
#define END_MS       60000
/* Someone else may change the bitmap between the look at it and the job's begin, but hardly each time. */
#define TRIES 3

struct run {
    struct cairn_client *client;
    struct catalogue *catalogue;
    const struct backup_run_options *options;
    /* `cairn-` and the catalogue's id: job, target node and bitmap of this directory in a daemon. */
    char name[sizeof("cairn-") + CATALOGUE_ID_CHARS];
    char *node; /* the disk's */
    uint64_t size;
    bool has_bitmap;
    bool recording;
    const struct point *base; /* NULL: a full backup */
    struct point point;       /* the new one */

    /* What must be undone. */
    bool made_image;
    bool added_node;
    bool started_job;
};

static const char *text_of(const json_t *object, const char *member)
{
    const char *text = json_string_value(json_object_get(object, member));

    return text ? text : "";
}

static json_t *named(const char *member, const char *text)
{
    return json_pack("{s:s}", member, text);
}

/* ---- jobs ---- */

/* The job as query-jobs has it, owned; NULL if there is none. */
static int find_job(struct run *run, json_t **ret, struct error **err)
{
    json_t *jobs = NULL;
    const json_t *job;
    size_t i;
    int r = session_command(run->client, "query-jobs", NULL, &jobs, err);

    *ret = NULL;
    if (r < 0)
        return r;
    json_array_foreach(jobs, i, job)
    {
        if (strcmp(text_of(job, "id"), run->name) == 0)
            *ret = json_incref((json_t *)(uintptr_t)job);
    }
    json_decref(jobs);
    return 0;
}

static int job_command(struct run *run, const char *command, struct error **err)
{
    return session_command(run->client, command, named("id", run->name), NULL, err);
}

/* Waits until the job has concluded, well or not: 0; 1: there is none. `cancel`: sees to it. */
static int end_job(struct run *run, bool cancel, struct error **err)
{
    uint64_t deadline = progress_now_ms() + END_MS;
    bool asked = false;

    for (;;) {
        json_t *job = NULL;
        bool gone;
        bool ended;
        int r = find_job(run, &job, err);

        if (r < 0)
            return r;
        gone = !job;
        ended = strcmp(text_of(job, "status"), "concluded") == 0;
        json_decref(job);
        if (gone || ended)
            return gone ? 1 : 0;
        if (cancel && !asked) {
            AUTO(error_free) struct error *refused = NULL;

            /* Refused if it has just ended, or is about to. */
            asked = job_command(run, "job-cancel", &refused) == 0;
        }
        if (progress_now_ms() > deadline)
            return error_set(err, ETIMEDOUT, "job '%s' does not end within %d s", run->name,
                             END_MS / 1000);
        r = session_wait_for_jobs(run->client, LOOK_MS, err);
        if (r == -EINTR)
            error_free(err); /* this must be waited for, and is bounded */
        else if (r < 0)
            return r;
    }
}

/* ---- step 2: what an earlier run has left in the daemon ---- */

static int query_nodes(struct run *run, json_t **ret, struct error **err)
{
    return session_command(run->client, "query-named-block-nodes", json_pack("{s:b}", "flat", 1),
                           ret, err);
}

/* Borrowed; NULL. */
static const json_t *bitmap_of(const struct run *run, const json_t *node)
{
    const json_t *bitmap;
    size_t i;

    json_array_foreach(json_object_get(node, "dirty-bitmaps"), i, bitmap)
    {
        if (strcmp(text_of(bitmap, "name"), run->name) == 0)
            return bitmap;
    }
    return NULL;
}

/* The job is pending: has the run that started it listed its point? */
static bool is_listed(const struct run *run, const json_t *nodes)
{
    const json_t *node;
    size_t i;

    json_array_foreach(nodes, i, node)
    {
        const json_t *bitmap = bitmap_of(run, node);

        if (bitmap && catalogue_find_generation(run->catalogue, run->name,
                                                text_of(bitmap, "successor-generation")))
            return true;
    }
    return false;
}

static bool has_node(const json_t *nodes, const char *name)
{
    const json_t *node;
    size_t i;

    json_array_foreach(nodes, i, node)
    {
        if (strcmp(text_of(node, "node-name"), name) == 0)
            return true;
    }
    return false;
}

static int end_old_job(struct run *run, const json_t *nodes, struct error **err)
{
    AUTO(error_free) struct error *refused = NULL;
    json_t *job = NULL;
    bool finalize;
    int r = find_job(run, &job, err);

    if (r < 0 || !job)
        return r;
    finalize = strcmp(text_of(job, "status"), "pending") == 0 && is_listed(run, nodes);
    json_decref(job);
    if (finalize)
        (void)job_command(run, "job-finalize", &refused); /* it may be at it already */
    r = end_job(run, !finalize, err);
    if (r == 0)
        r = job_command(run, "job-dismiss", err);
    return MIN(r, 0);
}

static int delete_target(struct run *run, struct error **err)
{
    return session_command(run->client, "blockdev-del", named("node-name", run->name), NULL, err);
}

static int recover(struct run *run, struct error **err)
{
    json_t *nodes = NULL;
    int r = query_nodes(run, &nodes, err);

    if (r == 0)
        r = end_old_job(run, nodes, err);
    if (r == 0 && has_node(nodes, run->name))
        r = delete_target(run, err);
    json_decref(nodes);
    return r;
}

/* ---- step 3: full or incremental ---- */

/* The one that exports have, if it is one. */
static int choose_node(struct run *run, struct error **err)
{
    AUTO(free_ptr) char *names = xstrdup("");
    json_t *exports = NULL;
    const json_t *export;
    size_t i;
    int r;

    if (run->options->node) {
        run->node = xstrdup(run->options->node);
        return 0;
    }
    r = session_command(run->client, "query-block-exports", NULL, &exports, err);
    if (r < 0)
        return r;
    json_array_foreach(exports, i, export)
    {
        const char *name = text_of(export, "node-name");
        char *more;

        if (!run->node) {
            run->node = xstrdup(name);
        } else if (strcmp(run->node, name) != 0) {
            more = xasprintf("%s, '%s'", names, name);
            free(names);
            names = more;
        }
    }
    json_decref(exports);
    if (!run->node)
        return error_set(err, ENOENT, "the daemon exports no disk: name a node by --disk");
    if (names[0])
        return error_set(err, EINVAL,
                         "the daemon exports several disks: name one by --disk: '%s'%s", run->node,
                         names);
    return 0;
}

static char *reason_for_full(const struct run *run, const json_t *bitmap)
{
    const struct point *last = NULL;
    const struct point *base;

    for (size_t i = 0; i < run->catalogue->count; i++) {
        if (strcmp(run->catalogue->points[i].disk, run->point.disk) == 0)
            last = &run->catalogue->points[i];
    }
    if (run->options->full)
        return xstrdup("asked for");
    if (!last)
        return xstrdup("the first one of this disk here");
    if (!bitmap)
        return xstrdup(
            "the daemon has no bitmap since the last one: it was started anew, or somebody has "
            "removed it");
    base = catalogue_find_generation(run->catalogue, run->name, text_of(bitmap, "generation"));
    if (!base)
        return xstrdup(
            "the bitmap has begun anew since the last one, and not by a backup that is here");
    if (base->size != run->size)
        return xasprintf("the disk has %" PRIu64 " bytes now, and had %" PRIu64, run->size,
                         base->size);
    return xstrdup("the bitmap does not record");
}

static void choose_kind(struct run *run, const json_t *bitmap)
{
    const struct point *base =
        bitmap ? catalogue_find_generation(run->catalogue, run->name, text_of(bitmap, "generation"))
               : NULL;

    run->has_bitmap = bitmap != NULL;
    run->recording = json_is_true(json_object_get(bitmap, "recording"));
    if (run->options->full || (base && base->size != run->size) || !run->recording)
        base = NULL;
    run->base = base;
    run->point.full = !base;
    if (base)
        run->point.base = xstrdup(base->id);
    else
        run->point.reason = reason_for_full(run, bitmap);
}

static int look_at_disk(struct run *run, struct error **err)
{
    json_t *nodes = NULL;
    const json_t *node;
    bool found = false;
    size_t i;
    int r = query_nodes(run, &nodes, err);

    if (r < 0)
        return r;
    json_array_foreach(nodes, i, node)
    {
        const json_t *size = json_object_get(json_object_get(node, "image"), "virtual-size");

        if (strcmp(text_of(node, "node-name"), run->node) != 0)
            continue;
        found = true;
        run->size = run->point.size = (uint64_t)json_integer_value(size);
        run->point.disk = xstrdup(text_of(node, "file"));
        run->point.node = xstrdup(run->node);
        run->point.bitmap = xstrdup(run->name);
        choose_kind(run, bitmap_of(run, node));
    }
    json_decref(nodes);
    if (!found)
        return error_set(err, ENOENT, "the daemon has no node '%s'", run->node);
    if (run->size % 512)
        return error_set(err, EINVAL,
                         "node '%s' has %" PRIu64
                         " bytes, which is no multiple of 512: no qcow2 image has such a size",
                         run->node, run->size);
    return 0;
}

/* ---- steps 4 to 6: target and job ---- */

static uint64_t wall_ns(void)
{
    struct timespec t;

    (void)clock_gettime(CLOCK_REALTIME, &t); /* there always is one */
    return (uint64_t)t.tv_sec * NS_PER_S + (uint64_t)t.tv_nsec;
}

static char *time_of(uint64_t ns)
{
    time_t seconds = (time_t)(ns / NS_PER_S);
    char text[32];
    struct tm tm;

    (void)gmtime_r(&seconds, &tm);
    (void)strftime(text, sizeof(text), "%Y-%m-%dT%H:%M:%S", &tm);
    return xasprintf("%s.%03uZ", text, (unsigned)(ns % NS_PER_S / NS_PER_MS));
}

static int make_image(struct run *run, struct error **err)
{
    AUTO(free_ptr) char *path = NULL;
    AUTO(free_ptr) char *base = run->base ? xasprintf("%s.qcow2", run->base->id) : NULL;
    char id[POINT_ID_MAX];
    int r;

    catalogue_new_id(run->catalogue, wall_ns(), id);
    run->point.id = xstrdup(id);
    run->point.image = xasprintf("%s.qcow2", id);
    path = catalogue_part_path(run->catalogue, id);
    r = target_create(path, run->size, base, err);
    run->made_image = r == 0;
    return r;
}

static int add_target(struct run *run, struct error **err)
{
    AUTO(free_ptr) char *path = catalogue_part_path(run->catalogue, run->point.id);
    json_t *file =
        json_pack("{s:s, s:s, s:s}", "driver", "file", "filename", path, "discard", "unmap");
    json_t *node;

    if (!file)
        return error_set(err, EINVAL, "'%s' is not UTF-8, and the control protocol is", path);
    /* Without a backing node: what the job writes is whole clusters, and nothing below is asked. */
    node = json_pack("{s:s, s:s, s:n, s:s, s:o}", "driver", "qcow2", "node-name", run->name,
                     "backing", "discard", "unmap", "file", file);
    run->added_node = true; /* or perhaps: the answer may get lost */
    return session_command(run->client, "blockdev-add", node, NULL, err);
}

static json_t *job_options(const struct run *run)
{
    json_t *o = json_pack("{s:s, s:s, s:s, s:s, s:s, s:s, s:I, s:b, s:b}", "job-id", run->name,
                          "device", run->node, "target", run->name, "bitmap", run->name, "sync",
                          run->base ? "bitmap" : "full", "bitmap-mode", "on-success", "speed",
                          (json_int_t)run->options->speed, "auto-finalize", 0, "auto-dismiss", 0);

    return o;
}

static json_t *bitmap_action(const struct run *run)
{
    return json_pack("{s:s, s:{s:s, s:s}}", "type",
                     run->has_bitmap ? "block-dirty-bitmap-enable" : "block-dirty-bitmap-add",
                     "data", "node", run->node, "name", run->name);
}

/* The bitmap is made in the change that catches the point, so that no write lies between. */
static int start_job(struct run *run, struct error **err)
{
    json_t *actions;

    run->point.time = time_of(wall_ns());
    run->started_job = true; /* or perhaps: the answer may get lost */
    if (run->has_bitmap && run->recording)
        return session_command(run->client, "blockdev-backup", job_options(run), NULL, err);
    actions = json_pack("{s:[o, {s:s, s:o}]}", "actions", bitmap_action(run), "type",
                        "blockdev-backup", "data", job_options(run));
    return session_command(run->client, "transaction", actions, NULL, err);
}

/*
 * The job has frozen the bitmap: nobody else changes it now. 0: it is what the choice was made for, and the generation that
 * begins at the instant is known. -ESTALE: it had changed before.
 */
static int read_generation(struct run *run, struct error **err)
{
    json_t *nodes = NULL;
    const json_t *node;
    const json_t *bitmap = NULL;
    size_t i;
    int r = query_nodes(run, &nodes, err);

    if (r < 0)
        return r;
    json_array_foreach(nodes, i, node)
    {
        if (strcmp(text_of(node, "node-name"), run->node) == 0)
            bitmap = bitmap_of(run, node);
    }
    if (strlen(text_of(bitmap, "successor-generation")) != POINT_GENERATION_CHARS)
        r = error_set(err, EPROTO, "the daemon does not say the generation of bitmap '%s'",
                      run->name);
    else if (run->base && strcmp(text_of(bitmap, "generation"), run->base->generation) != 0)
        r = error_set(err, ESTALE, "bitmap '%s' has begun anew just now", run->name);
    else
        run->point.generation = xstrdup(text_of(bitmap, "successor-generation"));
    json_decref(nodes);
    return r;
}

/* ---- step 7 ---- */

/* 1: it is pending. 0: it works. */
static int judge_job(struct run *run, const json_t *job, struct progress *bar, struct error **err)
{
    json_int_t done = json_integer_value(json_object_get(job, "current-progress"));
    json_int_t total = json_integer_value(json_object_get(job, "total-progress"));
    const char *status = text_of(job, "status");
    const char *error = text_of(job, "error");

    if (!job)
        return error_set(err, ENOENT, "job '%s' is gone: somebody has ended it", run->name);
    progress_show(bar, (uint64_t)MAX(done, (json_int_t)0), (uint64_t)MAX(total, (json_int_t)0));
    run->point.bytes = (uint64_t)MAX(done, (json_int_t)0);
    if (strcmp(status, "pending") == 0)
        return 1;
    if (strcmp(status, "concluded") == 0 || strcmp(status, "aborting") == 0)
        return error_set(err, EIO, "the backup has failed: %s",
                         error[0] ? error : "it was cancelled");
    return 0;
}

static int wait_until_pending(struct run *run, struct error **err)
{
    struct progress bar;
    int r = 0;

    progress_begin(&bar, run->base ? "incremental" : "full", run->options->json);
    while (r == 0) {
        json_t *job = NULL;

        if (cli_interrupted()) {
            r = cli_interrupted_error(err);
            break;
        }
        r = find_job(run, &job, err);
        if (r == 0)
            r = judge_job(run, job, &bar, err);
        json_decref(job);
        if (r == 0)
            r = session_wait_for_jobs(run->client, bar.shown ? LOOK_SHOW_MS : LOOK_MS, err);
    }
    progress_end(&bar);
    return r < 0 ? r : 0;
}

/* ---- step 9 ---- */

static int finish(struct run *run, struct error **err)
{
    json_t *job = NULL;
    int r = job_command(run, "job-finalize", err);

    if (r == 0)
        r = end_job(run, false, err);
    if (r == 0)
        r = find_job(run, &job, err);
    if (r == 0 && !job)
        r = 1;
    if (r == 1)
        return error_set(err, ENOENT, "job '%s' is gone: somebody has dismissed it", run->name);
    if (r == 0 && text_of(job, "error")[0])
        r = error_set(err, EIO, "job '%s' has failed at its end: %s", run->name,
                      text_of(job, "error"));
    json_decref(job);
    if (r == 0)
        r = job_command(run, "job-dismiss", err);
    return r == 0 ? delete_target(run, err) : r;
}

/* As much as can be; the next run does the rest. */
static void undo(struct run *run)
{
    AUTO(error_free) struct error *job_error = NULL;
    AUTO(error_free) struct error *node_error = NULL;
    int r = 0;

    if (run->started_job)
        r = end_job(run, true, &job_error);
    if (run->started_job && r == 0)
        r = job_command(run, "job-dismiss", &job_error);
    if (run->added_node && r >= 0)
        (void)delete_target(run, &node_error);
    if (run->made_image && run->point.id) /* else it is a point's image now */
        catalogue_discard(run->catalogue, run->point.id);
}

/* The job counts what it was to copy; zeroes take no space. */
static int count_bytes(struct run *run, struct error **err)
{
    uint64_t allocated;
    int r = catalogue_part_allocated(run->catalogue, run->point.id, &allocated, err);

    if (r == 0)
        run->point.bytes = MIN(run->point.bytes, allocated);
    return r;
}

static int make_point(struct run *run, struct error **err)
{
    int r = look_at_disk(run, err);

    if (r == 0)
        r = make_image(run, err);
    if (r == 0)
        r = add_target(run, err);
    if (r == 0)
        r = start_job(run, err);
    if (r == 0)
        r = read_generation(run, err);
    if (r == 0)
        r = wait_until_pending(run, err);
    if (r == 0)
        r = count_bytes(run, err);
    if (r == 0)
        r = catalogue_add(run->catalogue, &run->point, err);
    return r;
}

static int try_backup(struct run *run, struct error **err)
{
    int r = make_point(run, err);

    if (r < 0) {
        undo(run);
        point_release(&run->point);
        run->made_image = run->added_node = run->started_job = false;
    }
    return r;
}

int backup_run(struct cairn_client *client, struct catalogue *c, const struct backup_run_options *o,
               const struct point **ret_point, struct error **err)
{
    AUTO(error_free) struct error *late = NULL;
    struct run run = {.client = client, .catalogue = c, .options = o};
    int r;

    (void)snprintf(run.name, sizeof(run.name), "cairn-%s", c->id);
    r = recover(&run, err);
    if (r == 0)
        r = choose_node(&run, err);
    if (r == 0)
        r = try_backup(&run, err);
    for (unsigned i = 1; r == -ESTALE && i < TRIES; i++) {
        error_free(err);
        r = try_backup(&run, err);
    }
    free(run.node);
    if (r < 0)
        return r;
    *ret_point = &c->points[c->count - 1];
    if (finish(&run, &late) < 0)
        log_warning("the point is whole and listed, but: %s", error_text(late));
    return 0;
}
