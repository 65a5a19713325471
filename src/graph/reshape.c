/* SPDX-License-Identifier: Apache-2.0 */
/* Changes of the graph under load that come with the graph: replacing a node, guarding it, and resizing one. */
#include "graph/reshape.h"
#include "base/alloc.h"
#include "base/macros.h"
#include "graph/access-internal.h"
#include "graph/backend-internal.h"
#include "graph/change.h"
#include "graph/graph-internal.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

/* Replacing: the edges that move are marked in prepare, access is settled for what will be, and commit moves them. */

/* The users that lie below the new node stay, or it would come to use itself; so do backends that it owns. */
/* -EBUSY if another action of the same change moves them already. */
static int mark_users(struct replace_action *rp, struct error **err)
{
    uint64_t walk = graph_walk_begin(rp->to->graph);
    struct edge *e;

    list_for_each (&rp->from->parents, e, child_link) {
        if (e->moving_to)
            return error_set(err, EBUSY, "another action replaces node '%s' already",
                             rp->from->name);
    }
    graph_walk(rp->to, WALK_DOWN, walk);
    list_for_each (&rp->from->parents, e, child_link) {
        const struct node *user = e->parent ? e->parent : e->backend->owner_node;

        if (user && user->walked[WALK_DOWN] == walk)
            continue;
        e->moving_to = rp->to;
        list_append(&rp->to->arriving, &e->arriving_link);
    }
    return 0;
}

static void unmark_users(struct replace_action *rp)
{
    struct edge *e;

    while ((e = list_first(&rp->to->arriving, struct edge, arriving_link))) {
        list_remove(&e->arriving_link);
        e->moving_to = NULL;
    }
}

static int co_fn control_fn replace_co_prepare(struct change_action *a, struct error **err)
{
    struct replace_action *rp = container_of(a, struct replace_action, action);
    int r;

    if (!rp->to)
        rp->to = rp->from->file
                     ->node; /* G5: until now another change might have put something else there */
    if (rp->from == rp->to)
        return error_set(err, EINVAL, "node '%s' cannot replace itself", rp->to->name);
    if (rp->from->size != rp->to->size)
        return error_set(err, EINVAL,
                         "node '%s' has %" PRIu64 " bytes, node '%s' has %" PRIu64
                         ": sizes must be equal",
                         rp->to->name, rp->to->size, rp->from->name, rp->from->size);
    if (node_depth_above(rp->from) - 1 + node_depth_below(rp->to) > GRAPH_DEPTH_MAX)
        return error_set(err, EINVAL, "there would be more than %d nodes on top of each other",
                         GRAPH_DEPTH_MAX);
    rp->walk = try_new(struct access_walk);
    if (!rp->walk)
        return error_set(err, ENOMEM, "no memory");
    r = mark_users(rp, err);
    /* A filter that loses its users first stops guarding what is below it. */
    if (r == 0)
        r = access_walk_node(rp->walk, rp->from, err);
    if (r == 0)
        r = access_walk_node(rp->walk, rp->to, err);
    return r == 0 ? access_co_prepare(rp->walk, err) : r;
}

static void replace_commit(struct change_action *a)
{
    struct replace_action *rp = container_of(a, struct replace_action, action);
    struct edge *e;

    rp->from->refs++; /* the change's own, until the gates are open again */
    while ((e = list_first(&rp->to->arriving, struct edge, arriving_link))) {
        list_remove(&e->arriving_link);
        e->moving_to = NULL;
        list_remove(&e->child_link);
        list_append(&rp->to->parents, &e->child_link);
        e->node = rp->to;
        if (e->backing)
            atomic_set(&rp->to->lies_below, true);
        rp->to->refs++;
        rp->from->refs--;
    }
    access_commit(rp->walk);
}

static void co_fn control_fn replace_co_finish(struct change_action *a)
{
    struct replace_action *rp = container_of(a, struct replace_action, action);

    access_co_finish(rp->walk);
    free(rp->walk);
    node_co_unref(rp->from); /* what the change held */
}

static void co_fn control_fn replace_co_abort(struct change_action *a)
{
    struct replace_action *rp = container_of(a, struct replace_action, action);

    if (!rp->walk)
        return;
    unmark_users(rp);
    access_co_abort(rp->walk);
    free(rp->walk);
}

static const struct change_action_ops replace_ops = {
    .co_prepare = replace_co_prepare,
    .commit = replace_commit,
    .co_abort = replace_co_abort,
    .co_finish = replace_co_finish,
};

void replace_action_add(struct change *c, struct replace_action *rp, struct node *from,
                        struct node *to)
{
    *rp = (struct replace_action){.from = from, .to = to};
    change_add_action(c, &rp->action, &replace_ops);
}

/* By name: the nodes are looked up when they are reserved. */
struct replace_by_name {
    struct change_action action;
    const char *from;
    const char *to;
    struct replace_action replace;
};

static int co_fn control_fn find_co_prepare(struct change_action *a, struct error **err)
{
    struct replace_by_name *n = container_of(a, struct replace_by_name, action);
    int r = graph_need(a->change->graph, n->from, &n->replace.from, err);

    return r < 0 ? r : graph_need(a->change->graph, n->to, &n->replace.to, err);
}

static const struct change_action_ops find_ops = {.co_prepare = find_co_prepare};

int graph_co_replace(struct graph *g, const char *from, const char *to, struct error **err)
{
    struct replace_by_name n = {.from = from, .to = to};
    struct change change;
    int r;

    change_init(&change, g, "replacing node '%s' by '%s'", from, to);
    r = change_add_root(&change, from, err);
    if (r == 0)
        r = change_add_root(&change, to, err);
    if (r == 0) {
        change_add_action(&change, &n.action, &find_ops);
        replace_action_add(&change, &n.replace, NULL, NULL);
        r = change_co_run(&change, err);
    }
    change_end(&change);
    return r;
}

/* Guarding: who would be in the way is found in prepare, by what will be; so does a driver keep others out from then on. */

static int co_fn control_fn guard_co_prepare(struct change_action *a, struct error **err)
{
    struct guard_action *g = container_of(a, struct guard_action, action);
    int r;

    g->walk = try_new(struct access_walk);
    if (!g->walk)
        return error_set(err, ENOMEM, "no memory");
    g->node->guards += (unsigned)g->by;
    r = access_walk_node(g->walk, g->node, err);
    if (r == 0)
        r = access_co_prepare(g->walk, err);
    return r == 0 || g->by < 0
               ? r
               : error_wrap(err, r, "nobody else may write past node '%s'", g->node->name);
}

static void guard_commit(struct change_action *a)
{
    access_commit(container_of(a, struct guard_action, action)->walk);
}

static void co_fn control_fn guard_co_finish(struct change_action *a)
{
    struct guard_action *g = container_of(a, struct guard_action, action);

    access_co_finish(g->walk);
    free(g->walk);
}

static void co_fn control_fn guard_co_abort(struct change_action *a)
{
    struct guard_action *g = container_of(a, struct guard_action, action);

    if (!g->walk)
        return;
    g->node->guards -= (unsigned)g->by;
    access_co_abort(g->walk);
    free(g->walk);
}

static const struct change_action_ops guard_ops = {
    .co_prepare = guard_co_prepare,
    .commit = guard_commit,
    .co_abort = guard_co_abort,
    .co_finish = guard_co_finish,
};

void guard_action_add(struct change *c, struct guard_action *g, int by)
{
    *g = (struct guard_action){.by = by};
    change_add_action(c, &g->action, &guard_ops);
}

/* Resizing: the request is the persist step; a short-lived backend holds the access that it takes. */
struct resize {
    struct change_action action;
    const char *name;
    struct backend *backend;
    uint64_t size;
    uint64_t old_size;
};

static int co_fn control_fn resize_co_prepare(struct change_action *a, struct error **err)
{
    struct access access = {.wants = ACCESS_RESIZE, .tolerates = ACCESS_ALL};
    struct resize *rs = container_of(a, struct resize, action);
    int r = graph_need(a->change->graph, rs->name, &a->node, err);

    if (r < 0)
        return r;
    rs->old_size = a->node->size;
    rs->backend = backend_new(a->node, "block_resize");
    return access_change(rs->backend->root, access, err);
}

static int co_fn control_fn resize_to(struct resize *rs, uint64_t size)
{
    struct request req = {
        .kind = REQUEST_RESIZE,
        .offset = size,
        .pass = action_pass(&rs->action),
    };

    return edge_co_request(rs->backend->root, &req);
}

static int co_fn control_fn resize_co_persist(struct change_action *a, struct error **err)
{
    struct resize *rs = container_of(a, struct resize, action);
    int r = resize_to(rs, rs->size);

    if (r < 0)
        return error_set(err, -r, "cannot set the size of node '%s' to %" PRIu64 ": %s",
                         a->node->name, rs->size, strerror(-r));
    return 0;
}

static int co_fn control_fn resize_co_undo(struct change_action *a, struct error **err)
{
    struct resize *rs = container_of(a, struct resize, action);

    (void)err;
    return a->node->size == rs->old_size ? 0 : resize_to(rs, rs->old_size);
}

/* Filters above have the size of what they filter. */
static void resize_filters(const struct node *node)
{
    const struct edge *e;

    list_for_each (&node->parents, e, child_link) {
        struct node *above = e->parent;

        if (!above || above->driver->kind != DRIVER_FILTER || above->file != e ||
            above->size == node->size)
            continue;
        node_set_size(above, node->size);
        resize_filters(above);
    }
}

static void resize_commit(struct change_action *a)
{
    resize_filters(a->node);
}

static const struct change_action_ops resize_ops = {
    .co_prepare = resize_co_prepare,
    .co_persist = resize_co_persist,
    .co_undo = resize_co_undo,
    .commit = resize_commit,
};

int graph_co_resize(struct graph *g, const char *name, uint64_t size, struct error **err)
{
    struct resize rs = {.name = name, .size = size};
    struct change change;
    int r;

    if (size > (uint64_t)NODE_SIZE_MAX)
        return error_set(err, EFBIG, "size %" PRIu64 " is more than %lld bytes", size,
                         (long long)NODE_SIZE_MAX);
    change_init(&change, g, "block_resize of '%s'", name);
    r = change_add_root(&change, name, err);
    if (r == 0) {
        change_add_action(&change, &rs.action, &resize_ops);
        r = change_co_run(&change, err);
    }
    change_end(&change);
    rs.backend = backend_co_free(rs.backend);
    return r;
}
