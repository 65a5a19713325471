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
#include "graph/tracker.h"

#include <assert.h>
#include <inttypes.h>
#include <stdlib.h>

/* How often a closer looks whether the host has let go. */
#define LOOK_NS (20 * NS_PER_MS)

/* Lets go of the children; those of an orphan may be in a change's hands meanwhile. */
static void co_fn control_fn drop_children(struct node *node)
{
    struct edge *e;

    while ((e = list_first(&node->children, struct edge, parent_link))) {
        AUTO(error_free) struct error *ignored = NULL;
        struct change change;

        change_init(&change, node->graph, "close of '%s'", node->name);
        if (node->orphan_ns)
            change_co_hold(&change, e);
        (void)access_change(e, ACCESS_NONE, &ignored); /* asking for less cannot conflict */
        node_co_unref(edge_free(e));
        change_end(&change);
    }
}

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

/* The way to the end of a node, in a coroutine of its own, since it may take as long as the host likes. */
static void co_fn control_fn close_main(void *arg)
{
    struct node *node = arg;

    while (node_unresolved(node)) {
        if (co_sleep_until(loop_clock() + LOOK_NS) < 0) {
            node->abandoned = true;
            return;
        }
    }
    close_trackers(node);
    if (node->opened)
        node->driver->co_close(node);
    node->opened = false; /* queries come while the children close */
    drop_children(node);
    assert(list_empty(&node->parents) && list_empty(&node->owned));
    forget(node);
    if (node->close_wait && !node->close_wait->ended)
        co_wait_end(node->close_wait, 0);
    free(node->state);
    free(node);
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

void node_co_unref(struct node *node)
{
    struct graph *g = node->graph;
    struct co_wait w;

    if (--node->refs)
        return;
    if (node_unresolved(node))
        make_orphan(node);
    co_wait_init(&w, co_wait_leave);
    node->close_wait = &w;
    if (co_scope_start(&g->closers, close_main, node) < 0) {
        if (!node->orphan_ns)
            make_orphan(node); /* no memory for a coroutine: it stays, visibly */
        node->close_wait = NULL;
        return;
    }
    if (w.ended)
        return;
    if (node->orphan_ns) {
        node->close_wait = NULL;
        return;
    }
    co_shield_begin();
    if (co_wait(&w, loop_clock() + g->change_deadline_ns) < 0) {
        node->close_wait = NULL;
        make_orphan(node);
    }
    co_shield_end();
}

bool graph_abandon_orphans(struct graph *g)
{
    const struct node *node;

    co_scope_cancel(&g->closers);
    co_scope_join(&g->closers);
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
