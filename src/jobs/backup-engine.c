/* SPDX-License-Identifier: Apache-2.0 */
/* Backups: catching the point, copying it, and letting go. */
#include "jobs/backup-engine.h"
#include "base/alloc.h"
#include "base/atomic.h"
#include "base/checked.h"
#include "base/macros.h"
#include "filters/copy-before-write/copy-before-write.h"
#include "graph/backend.h"
#include "graph/reshape.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>

/* How often a backup without work of its own looks whether its point still stands. */
#define LOOK_NS (50 * NS_PER_MS)
/* How long a backup that has failed waits for its target's flush. */
#define LAST_FLUSH_NS NS_PER_S

struct backup {
    /* Set by backup_co_new(), then constant. */
    struct graph *graph;
    char *source_name;
    char *filter_name; /* or NULL */
    enum backup_sync sync;
    bool keeps_partial;
    const struct bitmap *bitmap; /* within the change */
    const struct copy_policy *policy;
    void *policy_arg;
    struct backend *source;
    struct backend *target;
    struct point *point;
    struct bitmap *work;
    struct bitmap *skipped; /* what errors that are ignored have left out */
    uint64_t size;

    /* Control thread. */
    struct node *filter; /* a reference while it is there */
    struct change_action insert;
    struct replace_action replace;

    struct copy copy;
    bool durable;   /* set before backup_co_run() returns */
    uint64_t done;  /* atomic */
    uint64_t total; /* atomic */
};

static int check_compresses(const struct backup_options *o, const struct node *target,
                            struct error **err)
{
    const struct driver *driver = node_driver(target);

    if (!driver->compresses)
        return error_set(err, ENOTSUP, "%s: target '%s' is %s, which does not compress", o->owner,
                         o->target, driver->name);
    if (driver->cluster_bytes(target) > BACKUP_CLUSTER)
        return error_set(err, ENOTSUP,
                         "%s: target '%s' has clusters of %" PRIu64
                         " bytes: compressed backups take 64 KiB at most",
                         o->owner, o->target, driver->cluster_bytes(target));
    return 0;
}

static int check_nodes(struct graph *g, const struct backup_options *o, uint64_t *ret_size,
                       struct error **err)
{
    struct node *source;
    struct node *target;
    int r = graph_need(g, o->source, &source, err);

    if (r == 0)
        r = graph_need(g, o->target, &target, err);
    if (r < 0)
        return r;
    if (source == target)
        return error_set(err, EINVAL, "%s: source and target are one node, '%s'", o->owner,
                         o->source);
    if (node_size(source) != node_size(target))
        return error_set(err, EINVAL,
                         "%s: source '%s' has %" PRIu64 " bytes, target '%s' has %" PRIu64
                         ": sizes must be equal",
                         o->owner, o->source, node_size(source), o->target, node_size(target));
    *ret_size = node_size(source);
    return o->compress ? check_compresses(o, target, err) : 0;
}

static int co_fn control_fn make_parts(struct backup *b, const struct backup_options *o,
                                       struct error **err)
{
    struct point_options point = o->point;
    struct access reads = {.wants = ACCESS_READ, .tolerates = ACCESS_ALL & ~ACCESS_RESIZE};
    struct access writes = {.wants = ACCESS_WRITE, .tolerates = ACCESS_ALL & ~ACCESS_RESIZE};
    int r;

    point.size = b->size;
    point.close_ns = graph_change_deadline(b->graph);
    b->work = bitmap_new(b->size, BACKUP_CLUSTER);
    b->skipped = bitmap_new(b->size, BACKUP_CLUSTER);
    if (!b->work || !b->skipped)
        return error_set(err, ENOMEM, "%s: no memory for its work", o->owner);
    r = backend_co_new(&b->source, b->graph, o->source, reads, o->owner, err);
    if (r == 0)
        r = backend_co_new(&b->target, b->graph, o->target, writes, o->owner, err);
    if (b->sync == BACKUP_NONE)
        point.through = b->target;
    return r < 0 ? r : point_co_new(&b->point, &point, err);
}

struct make {
    struct backup *backup;
    const struct backup_options *options;
    int result;
    struct error *error;
};

static void co_fn control_fn make_main(void *arg)
{
    struct make *m = arg;

    m->result = make_parts(m->backup, m->options, &m->error);
}

/* P4: the files of target and scratch are the host's, and may hang. */
static int co_fn control_fn make_parts_in_time(struct backup *b, const struct backup_options *o,
                                               struct error **err)
{
    struct make m = {.backup = b, .options = o};
    struct co_scope scope;
    int r;

    co_scope_init(&scope);
    co_scope_set_deadline(&scope, loop_clock() + graph_change_deadline(b->graph));
    r = co_scope_start(&scope, make_main, &m);
    co_scope_join(&scope);
    if (r < 0)
        return error_set(err, -r, "%s: no memory for a coroutine", o->owner);
    if (m.result < 0)
        error_move(err, &m.error);
    return m.result;
}

static int backup_pull(void *arg, struct copy_piece *piece, struct iobuf *buf);
static int backup_offload(void *arg, struct copy_piece *piece);
static void backup_co_pushed(void *arg, const struct copy_piece *piece, bool skipped);
static void backup_worker(void *arg, bool begins);
static int backup_pause_point(void *arg);
static enum copy_error_action backup_on_error(void *arg, int error, bool is_read);
static bool backup_urgent(void *arg, uint64_t *ret_offset, uint64_t *ret_len);

static const struct copy_policy engine_policy = {
    .co_pull = backup_pull,
    .co_offload = backup_offload,
    .co_pushed = backup_co_pushed,
    .co_pause_point = backup_pause_point,
    .worker = backup_worker,
    .on_error = backup_on_error,
    .urgent = backup_urgent,
};

int backup_co_new(struct backup **ret, struct graph *g, const struct backup_options *o,
                  struct error **err)
{
    struct backup *b;
    uint64_t size = 0;
    int r = check_nodes(g, o, &size, err);

    if (r < 0)
        return r;
    b = xnew(struct backup);
    b->graph = g;
    b->source_name = xstrdup(o->source);
    b->filter_name = o->filter_name ? xstrdup(o->filter_name) : NULL;
    b->sync = o->sync;
    b->keeps_partial = o->keeps_partial;
    b->policy = o->policy;
    b->policy_arg = o->policy_arg;
    b->size = size;
    r = make_parts_in_time(b, o, err);
    if (r < 0) {
        (void)backup_co_free(b);
        return error_wrap(err, r, "%s", o->owner);
    }
    b->copy = (struct copy){
        .work = b->work,
        .source = b->source,
        .target = b->target,
        .policy = &engine_policy,
        .arg = b,
        .size = size,
        .chunk = o->chunk,
        .workers = o->workers,
        .compress = o->compress,
        .offload = o->offload && !o->compress,
        .speed = o->speed,
    };
    *ret = b;
    return 0;
}

struct backup *backup_co_free(struct backup *b)
{
    if (!b)
        return NULL;
    b->target = backend_co_free(b->target);
    b->source = backend_co_free(b->source);
    (void)point_co_free(b->point);
    bitmap_free(b->work);
    bitmap_free(b->skipped);
    free(b->source_name);
    free(b->filter_name);
    free(b);
    return NULL;
}

/* The filter, with nobody above it yet. */
static int co_fn control_fn insert_co_prepare(struct change_action *a, struct error **err)
{
    struct backup *b = container_of(a, struct backup, insert);
    struct copy_before_write_options options = {.point = b->point};
    struct node *source;
    int r = graph_need(b->graph, b->source_name, &source, err);

    if (r == 0)
        r = graph_co_add_filter(a->change, &copy_before_write_driver, &options, b->filter_name,
                                source, &b->filter, err);
    if (r < 0)
        return r;
    b->replace.from = source;
    b->replace.to = b->filter;
    if (b->sync == BACKUP_NONE)
        backend_set_owner_node(b->target, b->filter);
    return 0;
}

/* Behind the closed gates the point is what the disk holds now: nobody writes until they open. */
static int co_fn control_fn insert_co_persist(struct change_action *a, struct error **err)
{
    struct backup *b = container_of(a, struct backup, insert);
    int r = 0;

    switch (b->sync) {
    case BACKUP_FULL:
    case BACKUP_TOP:
        bitmap_set(b->work, 0, b->size);
        break;
    case BACKUP_BITMAP:
        r = bitmap_merge(b->work, b->bitmap);
        break;
    case BACKUP_NONE:
        bitmap_set(point_uncaught(b->point), 0, b->size);
        break;
    }
    if (r == 0)
        r = bitmap_merge(point_uncaught(b->point), b->work);
    atomic_set(&b->total, MIN(bitmap_count(b->work), b->size));
    return r < 0 ? error_set(err, -r, "no memory for the blocks to copy") : 0;
}

static void co_fn control_fn drop_filter(struct backup *b)
{
    backend_clear_owner_node(b->target);
    graph_co_drop(b->filter);
    b->filter = NULL;
}

static void co_fn control_fn insert_co_abort(struct change_action *a)
{
    struct backup *b = container_of(a, struct backup, insert);

    if (b->filter)
        drop_filter(b);
}

static const struct change_action_ops insert_ops = {
    .co_prepare = insert_co_prepare,
    .co_persist = insert_co_persist,
    .co_abort = insert_co_abort,
};

int backup_add_actions(struct backup *b, struct change *c, struct error **err)
{
    int r = change_add_root(c, b->source_name, err);

    if (r < 0)
        return r;
    change_add_action(c, &b->insert, &insert_ops);
    replace_action_add(c, &b->replace, NULL, NULL); /* insert_co_prepare() says what */
    return 0;
}

/* After the filter's users have left it. */
static void co_fn control_fn remove_co_finish(struct change_action *a)
{
    struct backup *b = container_of(a, struct backup, insert);

    drop_filter(b);
}

static const struct change_action_ops remove_ops = {.co_finish = remove_co_finish};

int backup_co_end(struct backup *b, int (*more)(struct change *c, void *arg, struct error **err),
                  void *arg, struct error **err)
{
    struct change change;
    int r;

    change_init(&change, b->graph, "end of the backup of '%s'", b->source_name);
    r = change_add_root(&change, node_name(b->filter), err);
    if (r == 0 && more)
        r = more(&change, arg, err);
    if (r == 0) {
        replace_action_add(&change, &b->replace, b->filter, NULL);
        change_add_action(&change, &b->insert, &remove_ops);
        r = change_co_run(&change, err);
    }
    change_end(&change);
    return r;
}

static int co_fn backup_pull(void *arg, struct copy_piece *piece, struct iobuf *buf)
{
    struct backup *b = arg;

    return point_co_pull(b->point, b->source, piece, buf);
}

static int co_fn backup_offload(void *arg, struct copy_piece *piece)
{
    struct backup *b = arg;

    return point_co_offload(b->point, b->source, b->target, piece);
}

static void co_fn backup_co_pushed(void *arg, const struct copy_piece *piece, bool skipped)
{
    struct backup *b = arg;

    if (skipped) {
        bitmap_set(b->skipped, piece->offset, piece->len);
        point_co_leave_out(b->point, piece->offset, piece->len);
    } else {
        point_release(b->point, piece->offset, piece->len);
    }
    (void)atomic_add(&b->done, piece->len);
}

static void backup_worker(void *arg, bool begins)
{
    struct backup *b = arg;

    b->policy->worker(b->policy_arg, begins);
}

static int co_fn backup_pause_point(void *arg)
{
    struct backup *b = arg;
    int r = point_broken(b->point);

    if (r < 0)
        return -ESTALE; /* there is nothing left that could be copied truthfully */
    r = b->policy->co_pause_point(b->policy_arg);
    return r;
}

static enum copy_error_action backup_on_error(void *arg, int error, bool is_read)
{
    struct backup *b = arg;

    if (error == -ESTALE && point_broken(b->point))
        return COPY_FAIL;
    return b->policy->on_error(b->policy_arg, error, is_read);
}

static bool backup_urgent(void *arg, uint64_t *ret_offset, uint64_t *ret_len)
{
    struct backup *b = arg;

    return point_urgent(b->point, ret_offset, ret_len);
}

/*
 * Clusters that nobody has changed since the instant: what the source says of them now was so then. (A guest's discard may
 * have given back a cluster that was there, and that has been saved.)
 */
static int co_fn leave_out(struct backup *b, uint64_t first, uint64_t last)
{
    uint64_t same;
    uint64_t same_len;
    int r = 0;

    while (r == 0 && first < last &&
           bitmap_next_dirty(point_uncaught(b->point), first, last, &same, &same_len)) {
        uint64_t from = align_up(same, BACKUP_CLUSTER);
        uint64_t to = align_down(same + same_len, BACKUP_CLUSTER);
        uint64_t offset;
        uint64_t len;

        first = same + same_len;
        while (r == 0 && from < to && bitmap_next_dirty(b->work, from, to, &offset, &len)) {
            r = bitmap_claim(b->work, offset, len, &offset, &len);
            if (r < 0)
                break;
            r = 0;
            from = offset + len;
            (void)atomic_sub(&b->total, len);
            point_co_leave_out(b->point, offset, len);
        }
    }
    return r;
}

/* BACKUP_TOP: what the source does not hold itself is not copied. */
static int co_fn leave_out_unallocated(struct backup *b)
{
    uint64_t at = 0;
    int r = 0;

    while (r == 0 && at < b->size) {
        struct extent v[64];
        struct extents extents = {.v = v, .max = ARRAY_SIZE(v)};
        struct request req = {
            .kind = REQUEST_EXTENTS,
            .offset = at,
            .len = b->size - at,
            .extents = &extents,
        };

        r = b->policy->co_pause_point(b->policy_arg);
        if (r == 0)
            r = backend_co_request(b->source, &req);
        for (unsigned i = 0; r == 0 && i < extents.count; i++) {
            at = v[i].offset + v[i].len;
            if (!(v[i].flags & EXTENT_ALLOCATED))
                r = leave_out(b, v[i].offset, at);
        }
    }
    return r;
}

/* BACKUP_NONE: the guests do the work. */
static int co_fn wait_for_cancel(struct backup *b)
{
    int r;

    do {
        r = backup_pause_point(b);
        if (r == 0)
            r = co_sleep_until(loop_clock() + LOOK_NS);
    } while (r == 0);
    return r;
}

static int co_fn flush_target(struct backup *b)
{
    struct request flush = {.kind = REQUEST_FLUSH};
    int r = backend_co_request(b->target, &flush);

    b->durable = r == 0;
    return r;
}

static void co_fn flush_main(void *arg)
{
    (void)flush_target(arg); /* b->durable tells */
}

/* C3: bits of what was copied are given up only when the target has it. Whoever cancels waits no longer than this (P4). */
static void co_fn flush_after_failure(struct backup *b)
{
    struct co_scope scope;

    co_scope_init(&scope);
    co_scope_set_deadline(&scope, loop_clock() + LAST_FLUSH_NS);
    co_shield_begin();
    (void)co_scope_start(&scope, flush_main, b); /* no memory: it is not durable */
    co_scope_join(&scope);
    co_shield_end();
}

static int co_fn copy_all(struct backup *b)
{
    int r = backend_attach(b->source);

    if (r == 0)
        r = backend_attach(b->target);
    if (r == 0 && b->sync == BACKUP_TOP)
        r = leave_out_unallocated(b);
    if (r == 0 && b->sync == BACKUP_NONE)
        r = wait_for_cancel(b);
    if (r < 0)
        return r;
    copy_init(&b->copy);
    r = copy_co_run(&b->copy);
    if (r == 0)
        r = flush_target(b); /* what is reported as done is on the target's disk */
    if (r == 0 && point_broken(b->point))
        r = -ESTALE;
    return r;
}

int backup_co_run(struct backup *b)
{
    int r = copy_all(b);

    if (r < 0 && b->keeps_partial && !b->durable && atomic_get(&b->done))
        flush_after_failure(b);
    return r;
}

void backup_set_bitmap(struct backup *b, const struct bitmap *bitmap)
{
    b->bitmap = bitmap;
}

void backup_set_speed(struct backup *b, uint64_t bytes_per_second)
{
    copy_set_speed(&b->copy, bytes_per_second);
}

void backup_progress(const struct backup *b, uint64_t *ret_done, uint64_t *ret_total)
{
    *ret_done = atomic_get(&b->done);
    *ret_total = MAX(atomic_get(&b->total), *ret_done);
}

bool backup_is_durable(const struct backup *b)
{
    return b->durable;
}

const struct bitmap *backup_uncopied(const struct backup *b)
{
    return b->work;
}

const struct bitmap *backup_skipped(const struct backup *b)
{
    return b->skipped;
}

void backup_give_up(struct backup *b)
{
    point_break(b->point, -ECANCELED);
}

int backup_point_error(const struct backup *b)
{
    return point_broken(b->point);
}

const char *backup_filter_name(const struct backup *b)
{
    return b->filter ? node_name(b->filter) : NULL;
}
