/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Closing nodes, and orphans (G7): a node that cannot be closed, because the host has not ended what its requests have left, or
 * because the close itself hangs, leaves the graph and its names. It lives on, listed with its age, until it can be closed.
 */
#include "base/alloc.h"
#include "base/log.h"
#include "base/macros.h"
#include "graph/change.h"
#include "graph/graph-internal.h"
#include "graph/late.h"
#include "graph/tracker.h"

#include <assert.h>
#include <inttypes.h>
#include <stdlib.h>

/* How often a closer looks whether the host has let go. */
#define LOOK_NS (20 * NS_PER_MS)
/* How long whoever closes a node waits for that before it becomes an orphan. */
#define MOMENT_NS (40 * NS_PER_MS)

static void close_trackers(struct node *node)
{
    struct tracker *t;

    while ((t = node->trackers)) {
        node->trackers = t->next;
        if (t->closed)
            t->closed(t);
    }
}

static void forget(struct node *node)
{
    if (!node->orphan_ns)
        graph_name_remove(node->graph, node);
    list_remove(&node->link);
}

static void node_free(struct node *node)
{
    assert(list_empty(&node->parents) && list_empty(&node->owned));
    forget(node);
    free(node->wanted_file);
    free(node->wanted_format);
    free(node->state);
    free(node);
}

/* A child that nobody else uses goes as it is; what it holds goes with it. True if that is so. */
static bool co_fn control_fn drop_child(struct edge *e)
{
    if (e->node->refs > 1)
        access_drop(e);
    return --edge_free(e)->refs == 0;
}

/* Those that nobody uses any more come into `unused`. */
static void co_fn control_fn drop_children(struct node *node, struct node **unused)
{
    struct edge *e;

    while ((e = list_first(&node->children, struct edge, parent_link))) {
        struct node *child = e->node;

        if (drop_child(e)) {
            child->unused_next = *unused;
            *unused = child;
        }
    }
}

/* The children of an orphan may be in a change's hands. */
static void co_fn control_fn drop_orphan(struct node *node)
{
    struct edge *e;

    while ((e = list_first(&node->children, struct edge, parent_link))) {
        struct change change;

        change_init(&change, node->graph, "close of '%s'", node->name);
        change_co_hold(&change, e);
        access_drop(e);
        node_co_unref(edge_free(e));
        change_end(&change);
    }
    node_free(node);
}

/*
 * The driver's part, in a coroutine of its own, since it may take as long as the host likes. What is left to do is done by the one
 * who waits for it, or here if nobody does.
 */
static void co_fn control_fn close_main(void *arg)
{
    struct node *node = arg;

    while (node_unresolved(node)) {
        if (co_sleep_until(loop_clock() + LOOK_NS) < 0) {
            node->abandoned = true;
            return;
        }
    }
    if (node->opened)
        node->driver->co_close(node);
    close_trackers(node); /* the driver may have stored what they know */
    epoch_co_release(&node->epoch);
    node->opened = false; /* queries come while the children close */
    node->closed = true;
    if (!node->close_wait)
        drop_orphan(node);
    else if (!node->close_wait->ended)
        co_wait_end(node->close_wait, 0);
}

static void make_orphan(struct node *node)
{
    log_warning("node '%s' cannot be closed yet: the host has not ended %u of its operations; "
                "it leaves the graph, and closes when they end",
                node->name, node_unresolved(node));
    graph_name_remove(node->graph, node);
    list_remove(&node->link);
    list_append(&node->graph->orphans, &node->link);
    node->orphan_ns = loop_clock();
    node->reserved_by = NULL;
}

/* A host that is well ends what a cancelled job has left in a moment: that is no orphan. */
static void co_fn control_fn wait_a_moment(const struct node *node, uint64_t deadline_ns)
{
    uint64_t until = MIN(deadline_ns, loop_clock() + MOMENT_NS);

    co_shield_begin();
    while (node_unresolved(node) && loop_clock() < until)
        (void)co_sleep_until(MIN(until, loop_clock() + LOOK_NS / 10));
    co_shield_end();
}

void node_closing_goes_on(struct node *node)
{
    node->went_on_ns = loop_clock();
    node->graph->closing_went_on_ns = node->went_on_ns;
}

bool graph_closing_gets_on(const struct graph *g)
{
    return g->closing_went_on_ns && g->closing_went_on_ns + g->change_deadline_ns > loop_clock();
}

/* A slow host is not one that hangs: each time that the driver gets somewhere the deadline begins anew. */
static uint64_t closed_until(const struct node *node, uint64_t deadline_ns)
{
    return node->went_on_ns ? MAX(deadline_ns, node->went_on_ns + node->graph->change_deadline_ns)
                            : deadline_ns;
}

static void co_fn control_fn wait_closed(struct node *node, uint64_t deadline_ns)
{
    uint64_t began = loop_clock();
    struct co_wait w;

    co_wait_init(&w, co_wait_leave);
    node->close_wait = &w;
    if (co_scope_start(&node->graph->closers, close_main, node) == 0) {
        co_shield_begin();
        (void)co_wait(&w, deadline_ns);
        /* It may have ended just when the deadline did. */
        while (!node->closed && closed_until(node, deadline_ns) > loop_clock()) {
            log_warning("node '%s' is being closed for %" PRIu64 " s now, and gets on: waiting",
                        node->name, (loop_clock() - began) / NS_PER_S);
            co_wait_init(&w, co_wait_leave);
            (void)co_wait(&w, closed_until(node, deadline_ns));
        }
        co_shield_end();
    }
    node->close_wait = NULL;
}

/* True: it is closed, but for its children. False: it is an orphan, and will see to itself. */
static bool co_fn control_fn close_by(struct node *node, uint64_t deadline_ns)
{
    wait_a_moment(node, deadline_ns);
    if (node_unresolved(node)) {
        make_orphan(node);
        /* no memory: it stays, visibly */
        (void)co_scope_start(&node->graph->closers, close_main, node);
        return false;
    }
    wait_closed(node, deadline_ns);
    if (!node->closed)
        make_orphan(node);
    return node->closed;
}

/*
 * Chains are long: what nobody uses any more is closed one after the other, parents first, not each from within the other. One
 * deadline for all, since one host may be behind many of them.
 */
void node_co_unref(struct node *node)
{
    struct node *unused = NULL;
    uint64_t deadline_ns = loop_clock() + node->graph->change_deadline_ns;

    if (--node->refs)
        return;
    node->unused_next = NULL;
    for (unused = node; (node = unused);) {
        unused = node->unused_next;
        if (close_by(node, deadline_ns)) {
            deadline_ns = closed_until(node, deadline_ns); /* its file has to wait no less */
            drop_children(node, &unused);
            node_free(node);
        }
    }
}

bool graph_abandon_orphans(struct graph *g)
{
    const struct node *node;

    co_scope_cancel(&g->closers);
    co_scope_join(&g->closers);
    late_co_end(g);
    damage_co_end(g);
    list_for_each (&g->orphans, node, link) {
        const char *file = node_filename(node);

        log_warning("node '%s': the host still holds buffers of it%s%s", node->name,
                    file ? ", of file " : "", file ? file : "");
    }
    return !list_empty(&g->orphans);
}

void graph_for_each_orphan(struct graph *g, graph_orphan_fn *fn, void *arg)
{
    uint64_t now = loop_clock();
    struct node *node;

    list_for_each (&g->orphans, node, link)
        fn(node, now - node->orphan_ns, node_unresolved(node), arg);
}
