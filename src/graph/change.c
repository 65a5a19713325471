/* SPDX-License-Identifier: Apache-2.0 */
/* Carrying a change out: prepare, close and drain, persist, commit, open; or back. */
#include "graph/change.h"
#include "base/alloc.h"
#include "base/macros.h"
#include "graph/backend-internal.h"
#include "graph/chain.h"
#include "graph/graph-internal.h"
#include "graph/unended.h"
#include "loop/scope.h"

#include <assert.h>
#include <errno.h>
#include <stdarg.h>
#include <stdlib.h>

void change_init(struct change *c, struct graph *graph, const char *fmt, ...)
{
    va_list args;

    *c = (struct change){.graph = graph};
    list_init(&c->actions);
    list_init(&c->backends);
    va_start(args, fmt);
    c->what = xvasprintf(fmt, args);
    va_end(args);
    list_init(&c->link);
}

static bool more_roots(struct change *c)
{
    unsigned max = MAX(2 * c->root_max, 4u);
    const char **roots = try_new_n(const char *, max);

    if (!roots)
        return false;
    for (unsigned i = 0; i < c->root_count; i++)
        roots[i] = c->roots[i];
    free(c->roots);
    c->roots = roots;
    c->root_max = max;
    return true;
}

int change_add_root(struct change *c, const char *node_name, struct error **err)
{
    if (c->root_count == c->root_max && !more_roots(c))
        return error_set(err, ENOMEM, "%s: no memory for the names of %u nodes", c->what,
                         c->root_count + 1);
    c->roots[c->root_count++] = node_name;
    return 0;
}

void change_add_action(struct change *c, struct change_action *a,
                       const struct change_action_ops *ops)
{
    a->ops = ops;
    a->change = c;
    a->stage = CHANGE_NEW;
    list_append(&c->actions, &a->link);
}

void change_set_insider(struct change *c, struct backend *b, change_insider_fn *fn, void *arg)
{
    c->insider = b;
    c->insider_fn = fn;
    c->insider_arg = arg;
}

struct pass *action_pass(struct change_action *a)
{
    return &a->change->pass;
}

/* D3, G9: whose metadata is not for certain, or may still be written to by the host, is not written to. */
static int check_metadata(const struct change_action *a, struct error **err)
{
    unsigned unended = a->node && a->ops->co_persist ? node_unresolved_below(a->node) : 0;

    if (a->node && a->node->needs_reopen)
        return error_set(err, EIO,
                         "node '%s' must be opened anew: its metadata could not be written for "
                         "certain",
                         a->node->name);
    if (unended)
        return error_set(err, EBUSY, "node '%s': the host has not ended %u earlier operations",
                         a->node->name, unended);
    return 0;
}

static int co_fn control_fn prepare_all(struct change *c, struct error **err)
{
    struct change_action *a;

    list_for_each (&c->actions, a, link) {
        int r = 0;

        a->stage = CHANGE_PREPARED; /* also when it fails: abort takes back what there is */
        if (a->ops->co_prepare)
            r = a->ops->co_prepare(a, err);
        if (r == 0)
            r = check_metadata(a, err);
        if (r < 0)
            return r;
    }
    return 0;
}

/* The nodes that requests through these backends can be on their way to. */
static void walk_roots_up(struct change *c, uint64_t walk)
{
    for (unsigned i = 0; i < c->root_count; i++)
        graph_walk(graph_find(c->graph, c->roots[i]), WALK_UP, walk);
}

/* Those above what changes; the insider in any case. */
static void control_fn close_gates(struct change *c)
{
    uint64_t walk = graph_walk_begin(c->graph);
    struct backend *b;

    walk_roots_up(c, walk);
    list_for_each (&c->graph->backends, b, link) {
        if (b->root->node->walked[WALK_UP] != walk && b != c->insider)
            continue;
        list_append(&c->backends, &b->change_link);
        b->drained = false;
        if (b != c->insider)
            gate_close(&b->gate);
    }
}

/* Is everything drained that can still send requests into this node? */
static bool drained_above(struct change *c, struct node *node)
{
    uint64_t walk = graph_walk_begin(c->graph);
    const struct backend *b;

    graph_walk(node, WALK_UP, walk);
    list_for_each (&c->backends, b, change_link) {
        if (!b->drained && b->root->node->walked[WALK_UP] == walk)
            return false;
    }
    return true;
}

/*
 * G2: those first that no node owns, then those of nodes above which all is drained. What waits for the insider is left to a
 * second call.
 */
static int co_fn control_fn drain_gates(struct change *c, struct error **err)
{
    bool progress = true;
    struct backend *b;

    while (progress) {
        progress = false;
        list_for_each (&c->backends, b, change_link) {
            int r;

            if (b->drained || b == c->insider ||
                (b->owner_node && !drained_above(c, b->owner_node)))
                continue;
            r = gate_co_drained(&b->gate, b->owner, c->deadline_ns, err);
            if (r < 0)
                return r;
            b->drained = true;
            progress = true;
        }
    }
    return 0;
}

/* A step of a change that may take until the deadline and no longer. */
struct timed_call {
    int (*fn)(struct change *c, struct error **err);
    struct change *change;
    struct error **err;
    int result;
};

static void co_fn timed_main(void *arg)
{
    struct timed_call *call = arg;

    call->result = call->fn(call->change, call->err);
}

static int co_fn control_fn run_timed(struct change *c,
                                      int (*fn)(struct change *c, struct error **err),
                                      struct error **err)
{
    struct timed_call call = {.fn = fn, .change = c, .err = err};
    struct co_scope scope;
    int r;

    co_scope_init(&scope);
    co_scope_set_deadline(&scope, c->deadline_ns);
    r = co_scope_start(&scope, timed_main, &call);
    co_scope_join(&scope);
    return r < 0 ? error_set(err, -r, "%s: no memory for a coroutine", c->what) : call.result;
}

/* G3: the insider's last run. */
static int co_fn control_fn run_insider(struct change *c, struct error **err)
{
    return c->insider_fn(c, c->insider_arg, err);
}

/* Then its gate, and what nodes below it own. */
static int co_fn control_fn drain_insider(struct change *c, struct error **err)
{
    int r;

    if (!c->insider)
        return 0;
    r = run_timed(c, run_insider, err);
    if (r < 0)
        return r;
    gate_close(&c->insider->gate);
    r = gate_co_drained(&c->insider->gate, c->insider->owner, c->deadline_ns, err);
    if (r < 0)
        return r;
    c->insider->drained = true;
    return drain_gates(c, err);
}

static int co_fn control_fn persist_all(struct change *c, struct error **err)
{
    struct change_action *a;

    list_for_each (&c->actions, a, link) {
        int r;

        if (!a->ops->co_persist)
            continue;
        a->stage = CHANGE_PERSISTED; /* also when it fails: part of it may be on the disk */
        r = a->ops->co_persist(a, err);
        if (r < 0)
            return r;
    }
    return 0;
}

/*
 * D3: the old state is written back, last action first. Where that fails, or where a write of the node has not even ended
 * (G9), the node takes no more metadata writes.
 */
static void co_fn control_fn undo_persist(struct change *c)
{
    for (struct list *l = c->actions.prev; l != &c->actions; l = l->prev) {
        struct change_action *a = list_entry(l, struct change_action, link);
        AUTO(error_free) struct error *undo_error = NULL;
        int r = 0;

        if (a->stage != CHANGE_PERSISTED)
            continue;
        if (a->node && node_unresolved_below(a->node))
            r = -EIO;
        else if (a->ops->co_undo)
            r = a->ops->co_undo(a, &undo_error);
        if (r < 0 && a->node)
            a->node->needs_reopen = true;
    }
}

static int co_fn control_fn undo_timed(struct change *c, struct error **err)
{
    (void)err;
    undo_persist(c);
    return 0;
}

/*
 * Half a deadline more for the way back, which is gone whoever cancels the change: the gates stay closed no longer than that.
 */
static void co_fn control_fn undo(struct change *c)
{
    AUTO(error_free) struct error *ignored = NULL;
    struct change_action *a;

    c->deadline_ns = loop_clock() + c->graph->change_deadline_ns / 2;
    co_shield_begin();
    if (run_timed(c, undo_timed, &ignored) < 0) {
        list_for_each (&c->actions, a, link) { /* not even begun */
            if (a->stage == CHANGE_PERSISTED && a->node)
                a->node->needs_reopen = true;
        }
    }
    co_shield_end();
}

static void co_fn control_fn abort_all(struct change *c)
{
    for (struct list *l = c->actions.prev; l != &c->actions; l = l->prev) {
        struct change_action *a = list_entry(l, struct change_action, link);

        if (a->stage != CHANGE_NEW && a->ops->co_abort)
            a->ops->co_abort(a);
    }
}

static void control_fn open_gates(struct change *c)
{
    struct backend *b;

    while ((b = list_first(&c->backends, struct backend, change_link))) {
        list_remove(&b->change_link);
        if (gate_is_closed(&b->gate))
            gate_open(&b->gate);
    }
}

static int co_fn control_fn run_behind_gates(struct change *c, struct error **err)
{
    const struct backend *b;
    int r;

    close_gates(c);
    r = drain_gates(c, err);
    if (r < 0)
        return r;
    unended_tell_before(c);
    r = drain_insider(c, err);
    if (r < 0)
        return r;
    list_for_each (&c->backends, b, change_link)
        assert(b->drained); /* CHANGE-2 */
    r = run_timed(c, persist_all, err);
    if (r < 0)
        undo(c);
    return r;
}

static void co_fn control_fn finish_all(struct change *c)
{
    struct change_action *a;

    list_for_each (&c->actions, a, link) {
        if (a->ops->co_finish)
            a->ops->co_finish(a);
    }
}

int change_co_run(struct change *c, struct error **err)
{
    struct change_action *a;
    int r;

    c->upwards = true;
    r = change_co_reserve(c, err);
    if (r < 0)
        return r;
    c->deadline_ns = loop_clock() + c->graph->change_deadline_ns;
    r = run_timed(c, prepare_all, err);
    if (r == 0)
        r = run_behind_gates(c, err);
    list_for_each (&c->actions, a, link) {
        if (r == 0 && a->ops->commit)
            a->ops->commit(a);
    }
    if (r == 0)
        chain_all_changed(c->graph);
    unended_tell_after(c); /* what was cleared is set again */
    open_gates(c);
    co_shield_begin(); /* what is left to do is done, whoever cancels the change */
    if (r == 0)
        finish_all(c);
    else
        abort_all(c);
    co_shield_end();
    return r == 0 ? 0 : error_wrap(err, r, "%s", c->what);
}

void graph_set_change_deadline(struct graph *g, uint64_t ns)
{
    g->change_deadline_ns = ns;
}

uint64_t graph_change_deadline(const struct graph *g)
{
    return g->change_deadline_ns;
}
