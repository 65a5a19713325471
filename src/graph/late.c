/* SPDX-License-Identifier: Apache-2.0 */
/* The one who looks whether the host has ended what was left to it. */
#include "graph/late.h"
#include "base/atomic.h"
#include "base/macros.h"
#include "graph/access-internal.h"
#include "graph/change.h"
#include "graph/gate.h"
#include "graph/graph-internal.h"
#include "graph/unended.h"
#include "loop/co.h"

#include <stdio.h>

#define LOOK_NS (20 * NS_PER_MS)

/* A node whose writes have ended at last, and that no change is busy with; `ret_more`: there are others to come. */
static struct node *find_locked(struct graph *g, bool *ret_more)
{
    struct node *node;

    *ret_more = false;
    list_for_each (&g->nodes, node, link) {
        if (node->told_late && node->refs && !node->reserved_by && !node_unresolved(node))
            return node;
        *ret_more |= node->told_late;
    }
    return NULL;
}

static void co_fn control_fn unlock(struct graph *g, const char *node_name)
{
    AUTO(error_free) struct error *ignored = NULL;
    char name[NODE_NAME_MAX + 1]; /* the node may go while the change waits for it */
    struct change change;
    struct node *node;

    (void)snprintf(name, sizeof(name), "%s", node_name);
    change_init(&change, g, "unlocking of node '%s'", name);
    if (change_add_root(&change, name, &ignored) == 0 && change_co_reserve(&change, &ignored) == 0)
        access_co_settle(graph_find(g, name));
    else if ((node = graph_find(g, name)))
        node->told_late = true; /* once more */
    change_end(&change);
}

/* True if there is more to come. */
static bool co_fn control_fn look(struct graph *g)
{
    bool more = unended_look(g);
    bool locked;
    struct node *node = find_locked(g, &locked);

    if (!node)
        return more || locked;
    node->told_late = false;
    unlock(g, node->name);
    return true;
}

static void co_fn control_fn late_main(void *arg)
{
    struct graph *g = arg;

    while (co_sleep_until(loop_clock() + LOOK_NS) == 0 && look(g))
        ;
    g->watching = false;
}

void late_watch(struct graph *g)
{
    if (g->watching)
        return;
    g->watching = true;
    if (co_scope_start(&g->closers, late_main, g) < 0)
        g->watching = false; /* whoever comes next begins it, and finds all that there is */
}

static void control_fn wake_arrived(struct loop_message *m)
{
    struct graph *g = container_of(m, struct graph, wake);

    atomic_set(&g->wake_out, 0u);
    late_watch(g);
}

void late_wake(struct graph *g, const struct pass *pass)
{
    struct loop *control = pass->slot ? pass->slot->gate->control : loop_self();

    /* The one that is under way arrives after this, and finds what was added before it. */
    if (atomic_or(&g->wake_out, 1u))
        return;
    g->wake.fn = wake_arrived;
    loop_post(control, &g->wake);
}

void late_co_end(struct graph *g)
{
    while (atomic_get(&g->wake_out))
        co_yield ();
}
