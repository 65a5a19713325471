/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the source says is zero is left alone in a target that is zeroes, so that holes stay holes and the cost follows the data
 * (P5).
 */
#include "cli/restore-copy.h"
#include "base/alloc.h"
#include "base/json-in.h"
#include "base/macros.h"
#include "bitmaps/bitmap.h"
#include "cli/cli.h"
#include "copy/copy.h"
#include "formats/list.h"
#include "graph/backend.h"
#include "graph/graph.h"
#include "loop/loop.h"
#include "loop/scope.h"
#include "protocols/list.h"
#include "schema-types.h"

#include <errno.h>
#include <string.h>

#define GRANULE ((uint64_t)64 << 10)
#define WORKERS 16
#define LOOK_NS (100 * NS_PER_MS)

struct restoration {
    struct restore_copy *what;
    struct graph *graph;
    struct backend *source;
    struct backend *target;
    struct bitmap *work;
    uint64_t total;
    struct copy copy;
    struct co_scope watching;
    int result;
    struct error *error;
};

/* ---- the graph ---- */

/* Takes the definition. */
static int co_fn control_fn add_node(struct restoration *x, json_t *definition, struct error **err)
{
    struct node_options options;
    int r;

    if (!definition)
        return error_set(err, EINVAL, "a path is not UTF-8");
    r = json_in(&node_options_type, definition, JSON_IN_STRICT, "", &options, err);
    json_decref(definition);
    if (r < 0)
        return r;
    r = graph_co_add(x->graph, &options, err);
    schema_free(&node_options_type, &options);
    return r;
}

static json_t *target_definition(const struct restore_copy *c)
{
    json_t *file = json_pack("{s:s, s:s, s:s}", "driver", c->target_driver, "filename",
                             c->target_path, "discard", "unmap");
    json_t *node;

    if (!file)
        return NULL;
    node = json_pack("{s:s, s:s, s:s, s:o}", "driver", c->target_format, "node-name", "target",
                     "discard", "unmap", "file", file);
    if (strcmp(c->target_format, "qcow2") == 0)
        json_object_set_new(node, "backing", json_null());
    return node;
}

static int co_fn control_fn open_all(struct restoration *x, struct error **err)
{
    struct access reads = {.wants = ACCESS_READ, .tolerates = ACCESS_ALL & ~ACCESS_RESIZE};
    struct access writes = {.wants = ACCESS_WRITE, .tolerates = ACCESS_READ};
    int r = 0;

    for (size_t i = x->what->source->count; r == 0 && i-- > 0;)
        r = add_node(x, layers_definition(x->what->source, i, "source", true, true), err);
    if (r == 0)
        r = add_node(x, target_definition(x->what), err);
    if (r == 0)
        r = backend_co_new(&x->source, x->graph, "source", reads, "restore", err);
    if (r == 0)
        r = backend_co_new(&x->target, x->graph, "target", writes, "restore", err);
    if (r == 0)
        r = backend_attach(x->source);
    if (r == 0)
        r = backend_attach(x->target);
    if (r == 0 && backend_size(x->target) < x->what->size)
        r = error_set(err, ENOSPC, "'%s' is smaller than the disk", x->what->target_path);
    return r;
}

/* ---- what to copy ---- */

static int co_fn find_data(struct restoration *x, struct error **err)
{
    uint64_t at = 0;

    while (at < x->what->size) {
        struct extent v[256];
        struct extents extents = {.v = v, .max = ARRAY_SIZE(v)};
        struct request req = {
            .kind = REQUEST_EXTENTS,
            .offset = at,
            .len = x->what->size - at,
            .extents = &extents,
        };
        int r = backend_co_request(x->source, &req);

        if (r < 0)
            return error_set(err, -r, "cannot read what the point holds: %s", strerror(-r));
        for (unsigned i = 0; i < extents.count; i++) {
            if (!(v[i].flags & EXTENT_ZERO))
                bitmap_set(x->work, v[i].offset, v[i].len);
        }
        at = extents_end(&extents, at);
        if (cli_interrupted())
            return cli_interrupted_error(err);
    }
    return 0;
}

/* The engine's word that a piece is zero is a hint: here is whether a first part of it is, and how long that is. */
static int co_fn look_at_zero(struct restoration *x, struct copy_piece *piece)
{
    struct extent v[1];
    struct extents extents = {.v = v, .max = 1};
    struct request req = {
        .kind = REQUEST_EXTENTS,
        .offset = piece->offset,
        .len = piece->len,
        .extents = &extents,
    };
    int r = backend_co_request(x->source, &req);

    if (r < 0)
        return r;
    piece->zero = extents.count && (v[0].flags & EXTENT_ZERO);
    if (extents.count)
        piece->len = MIN(piece->len, v[0].len);
    return 0;
}

static int co_fn pull(void *arg, struct copy_piece *piece, struct iobuf *buf)
{
    struct restoration *x = arg;
    struct iovec iov;
    int r = piece->zero ? look_at_zero(x, piece) : 0;
    struct request req = {
        .kind = REQUEST_READ,
        .offset = piece->offset,
        .iov = &iov,
        .iov_count = 1,
        .hold = buf,
    };

    if (r < 0 || piece->zero)
        return r;
    piece->len = MIN(piece->len, (uint64_t)buf->size);
    req.len = piece->len;
    iov = (struct iovec){buf->data, piece->len};
    return backend_co_request(x->source, &req);
}

static void pushed(void *arg, const struct copy_piece *piece, bool skipped)
{
    struct restoration *x = arg;

    (void)skipped; /* none is */
    x->what->copied += piece->len;
}

static int co_fn pause_point(void *arg)
{
    (void)arg;
    return cli_interrupted() ? -ECANCELED : 0;
}

static void worker(void *arg, bool begins)
{
    (void)arg;
    (void)begins;
}

static enum copy_error_action on_error(void *arg, int error, bool is_read)
{
    struct restoration *x = arg;

    if (!x->error)
        (void)error_set(&x->error, -error, "cannot %s: %s",
                        is_read ? "read the point" : "write to the target", strerror(-error));
    return COPY_FAIL;
}

static const struct copy_policy policy = {
    .co_pull = pull,
    .co_pushed = pushed,
    .co_pause_point = pause_point,
    .worker = worker,
    .on_error = on_error,
};

static void co_fn watch(void *arg)
{
    struct restoration *x = arg;

    do {
        progress_show(x->what->bar, x->what->copied, x->total);
    } while (co_sleep_until(loop_clock() + LOOK_NS) == 0);
}

static int co_fn copy_data(struct restoration *x)
{
    struct request flush = {.kind = REQUEST_FLUSH};
    int r;

    x->copy = (struct copy){
        .work = x->work,
        .source = x->source,
        .target = x->target,
        .policy = &policy,
        .arg = x,
        .size = x->what->size,
        .chunk = COPY_CHUNK_DEFAULT,
        .workers = WORKERS,
    };
    x->total = MIN(bitmap_count(x->work), x->what->size);
    co_scope_init(&x->watching);
    (void)co_scope_start(&x->watching, watch, x); /* without it nothing is shown */
    copy_init(&x->copy);
    r = copy_co_run(&x->copy);
    co_scope_cancel(&x->watching);
    co_scope_join(&x->watching);
    if (r == 0)
        r = backend_co_request(x->target, &flush);
    if (r == -ECANCELED && !x->error)
        return cli_interrupted_error(&x->error);
    if (r < 0 && !x->error)
        return error_set(&x->error, -r, "cannot write '%s': %s", x->what->target_path,
                         strerror(-r));
    return r;
}

static int co_fn control_fn restore(struct restoration *x)
{
    int r = open_all(x, &x->error);

    if (r < 0)
        return r;
    x->work = bitmap_new(x->what->size, GRANULE);
    if (!x->work)
        return error_set(&x->error, ENOMEM, "no memory");
    if (x->what->target_is_zero)
        r = find_data(x, &x->error);
    else
        bitmap_set(x->work, 0, x->what->size);
    return r == 0 ? copy_data(x) : r;
}

static void co_fn control_fn body(void *arg)
{
    static const struct driver *const *const drivers[] = {protocol_drivers, format_drivers, NULL};
    struct restoration *x = arg;

    x->graph = graph_new(drivers);
    x->result = restore(x);
    bitmap_free(x->work);
    x->target = backend_co_free(x->target);
    x->source = backend_co_free(x->source);
    x->graph = graph_co_free(x->graph);
}

int restore_copy_run(struct restore_copy *c, struct error **err)
{
    struct restoration x = {.what = c};
    int r = loop_run_main(LOOP_ENGINE_AUTO, "restore", body, &x, err);

    if (r < 0)
        return r;
    if (x.result < 0)
        error_move(err, &x.error);
    return x.result;
}
