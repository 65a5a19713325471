/* SPDX-License-Identifier: Apache-2.0 */
/* Backends: the way of a root request past the gate and into the graph, and its statistics. */
#include "graph/backend.h"
#include "base/alloc.h"
#include "base/atomic.h"
#include "base/log.h"
#include "base/macros.h"
#include "graph/backend-internal.h"
#include "graph/change.h"
#include "graph/graph-internal.h"
#include "loop/co.h"

#include <errno.h>
#include <stdlib.h>

struct backend *backend_new(struct node *node, const char *owner)
{
    struct backend *b = xnew(struct backend);

    gate_init(&b->gate);
    b->graph = node->graph;
    b->owner = xstrdup(owner);
    list_init(&b->change_link);
    list_init(&b->owned_link);
    list_append(&b->graph->backends, &b->link);
    node->refs++;
    b->root = edge_new(NULL, b, node, "root");
    return b;
}

int backend_co_new(struct backend **ret, struct graph *graph, const char *node_name,
                   struct access access, const char *owner, struct error **err)
{
    struct backend *b = NULL;
    struct change change;
    struct node *node;
    int r;

    change_init(&change, graph, "%s", owner);
    r = change_add_root(&change, node_name, err);
    if (r == 0)
        r = change_co_reserve(&change, err);
    if (r == 0)
        r = graph_need(graph, node_name, &node, err);
    if (r == 0) {
        b = backend_new(node, owner);
        r = access_change(b->root, access, err);
    }
    change_end(&change);
    if (r < 0) {
        (void)backend_co_free(b);
        return r;
    }
    *ret = b;
    return 0;
}

void backend_set_owner_node(struct backend *b, struct node *owner)
{
    b->owner_node = owner;
    list_append(&owner->owned, &b->owned_link);
}

void backend_clear_owner_node(struct backend *b)
{
    b->owner_node = NULL;
    list_remove(&b->owned_link);
}

/* G7: cuts what does not come to an end. */
static void co_fn control_fn drain_or_cut(struct backend *b)
{
    AUTO(error_free) struct error *late = NULL;
    AUTO(error_free) struct error *ignored = NULL;

    if (gate_co_drained(&b->gate, b->owner, loop_clock() + b->graph->change_deadline_ns, &late) ==
        0)
        return;
    log_warning("%s: cutting it off from node '%s', answering its requests with an error",
                error_text(late), b->root->node->name);
    atomic_set(&b->root->cut, 1u);
    gate_cut(&b->gate);
    (void)gate_co_drained(&b->gate, b->owner, LOOP_FOREVER,
                          &ignored); /* no deadline: cannot fail */
}

struct backend *backend_co_free(struct backend *b)
{
    struct change change;

    if (!b)
        return NULL;
    change_init(&change, b->graph, "removal of %s", b->owner);
    if (b->owner_node && !b->owner_node->refs)
        change.within = b->owner_node->reserved_by; /* its owner is being closed, by this one */
    change_co_hold(&change, b->root);
    co_shield_begin();
    gate_end(&b->gate);
    drain_or_cut(b);
    list_remove(
        &b->link); /* queries come while we wait: they would ask the gate, and its root goes, too */
    gate_co_release(&b->gate);
    access_drop(b->root);
    list_remove(&b->owned_link);
    node_co_unref(edge_free(b->root));
    co_shield_end();
    change_end(&change);
    for (unsigned i = 0; i < LOOP_MAX; i++)
        free(b->stats[i]);
    free(b->owner);
    free(b);
    return NULL;
}

int backend_attach(struct backend *b)
{
    unsigned i = loop_index(loop_self());
    struct gate_slot *slot;
    int r;

    if (!atomic_get(&b->stats[i])) {
        struct stats *stats = try_new(struct stats);

        if (!stats)
            return -ENOMEM;
        atomic_set(&b->stats[i], stats);
    }
    r = gate_attach(&b->gate, &slot);
    return r;
}

static enum stats_kind stats_kind_of(enum request_kind kind)
{
    switch (kind) {
    case REQUEST_READ:
    case REQUEST_EXTENTS:
    case REQUEST_COPY_OUT:
        return STATS_READ;
    case REQUEST_WRITE:
    case REQUEST_COPY_IN:
    case REQUEST_WRITE_ZEROES:
    case REQUEST_RESIZE:
        return STATS_WRITE;
    case REQUEST_DISCARD:
        return STATS_UNMAP;
    case REQUEST_FLUSH:
    case REQUEST_KINDS:
        break;
    }
    return STATS_FLUSH;
}

/* One pass. */
static int co_fn run_step(struct backend *b, struct request *req)
{
    unsigned i = loop_index(loop_self());
    struct gate_slot *slot = b->gate.slots[i];
    struct stats *stats = b->stats[i];
    struct pass pass;
    int r;

    pass.kind = req->kind;
    pass.offset = req->offset;
    pass.len = req->len;
    r = gate_enter(slot, &pass);
    if (unlikely(r < 0))
        return r;
    req->pass = &pass; /* dropped below: it is this request's alone */
    req->frame = NULL;
    do {
        r = edge_co_request(b->root, req);
        if (unlikely(r == -ERESTART)) {
            int back = gate_step_back(slot, &pass);

            if (back < 0) {
                req->pass = NULL;
                return back;
            }
        }
    } while (unlikely(r == -ERESTART));
    if (likely(req->kind != REQUEST_EXTENTS && req->kind != REQUEST_RESIZE)) {
        stats_account(stats, stats_kind_of(req->kind), req->len, pass.arrived_ns, loop_now(), r);
        if (req->kind == REQUEST_WRITE && r == 0 && req->offset + req->len > stats->highest_written)
            atomic_set_relaxed(&stats->highest_written, req->offset + req->len); /* see stats.h */
    }
    gate_leave(slot, &pass);
    req->pass = NULL;
    return r;
}

int backend_co_enter(struct backend *b, struct pass *pass)
{
    pass->kind = REQUEST_READ;
    pass->offset = 0;
    pass->len = 0;
    return gate_enter(gate_slot_here(&b->gate), pass);
}

void backend_leave(struct backend *b, struct pass *pass)
{
    gate_leave(gate_slot_here(&b->gate), pass);
}

int backend_co_request(struct backend *b, struct request *req)
{
    uint64_t end = req->offset + req->len;
    struct request step;
    int r = 0;

    if (req->pass)
        return edge_co_request(b->root, req); /* G1: its parent's pass counts for it */
    if (likely(req->kind == REQUEST_READ || req->kind == REQUEST_WRITE))
        return likely(req->len <= BACKEND_MAX_DATA) ? run_step(b, req) : -EINVAL;
    if ((req->kind != REQUEST_WRITE_ZEROES && req->kind != REQUEST_DISCARD) ||
        req->len <= BACKEND_MAX_RANGE)
        return run_step(b, req);
    step = *req;
    for (; r == 0 && step.offset < end; step.offset += step.len) { /* G6 */
        step.len = MIN(end - step.offset, BACKEND_MAX_RANGE);
        r = run_step(b, &step);
    }
    return r;
}

void backend_count_invalid(struct backend *b, enum request_kind kind)
{
    struct stats *stats = b->stats[loop_index(loop_self())];

    stats_add(&stats->kind[stats_kind_of(kind)].invalid, 1);
}

uint64_t backend_size(const struct backend *b)
{
    return node_size(b->root->node);
}

unsigned backend_alignment(const struct backend *b)
{
    return node_preferred_alignment(b->root->node);
}

bool backend_read_only(const struct backend *b)
{
    return b->root->node->settings.read_only;
}

/* A driver that hands zeroes on is as fast as its children. */
static bool zeroes_fast(const struct node *node)
{
    const struct edge *e;

    if (!node->driver->zeroes_fast)
        return false;
    list_for_each (&node->children, e, parent_link) {
        if (!e->backing && !zeroes_fast(e->node))
            return false;
    }
    return true;
}

bool backend_zeroes_fast(const struct backend *b)
{
    return zeroes_fast(b->root->node);
}

const char *backend_owner(const struct backend *b)
{
    return b->owner;
}

struct node *backend_node(const struct backend *b)
{
    return b->root->node;
}

void backend_stats(const struct backend *b, struct stats *ret)
{
    *ret = (struct stats){0};
    for (unsigned i = 0; i < LOOP_MAX; i++) {
        const struct stats *s = atomic_get(&b->stats[i]);

        if (s)
            stats_sum(ret, s);
    }
}

void backend_gate_picture(const struct backend *b, struct gate_picture *ret)
{
    gate_picture(&b->gate, ret);
}

bool backend_is_closed(const struct backend *b)
{
    return gate_is_closed(&b->gate);
}

void graph_for_each_backend(struct graph *g, graph_backend_fn *fn, void *arg)
{
    const struct backend *b;

    list_for_each (&g->backends, b, link)
        fn(b, arg);
}
