/* SPDX-License-Identifier: Apache-2.0 */
/* Damage on its way to the control thread. */
#include "graph/damage.h"
#include "base/alloc.h"
#include "base/atomic.h"
#include "base/macros.h"
#include "graph/graph-internal.h"
#include "loop/co.h"

#include <stdlib.h>
#include <string.h>

struct report {
    struct loop_message message;
    struct graph *graph;
    char node_name[NODE_NAME_MAX + 1];
    char *what;
    struct node_damage damage;
};

void graph_on_damage(struct graph *g, graph_damage_fn *fn, void *arg)
{
    g->control = loop_self();
    g->damage_fn = fn;
    g->damage_arg = arg;
}

static void control_fn report_arrived(struct loop_message *m)
{
    struct report *r = container_of(m, struct report, message);
    struct graph *g = r->graph;

    g->damage_fn(r->node_name, &r->damage, g->damage_arg);
    free(r->what);
    free(r);
    (void)atomic_sub(&g->damage_out, 1u);
}

void node_tell_damage(struct node *node, const struct node_damage *d)
{
    struct graph *g = node->graph;
    struct report *r;

    if (!g->damage_fn)
        return;
    r = xnew(struct report);
    r->message.fn = report_arrived;
    r->graph = g;
    memcpy(r->node_name, node->name, sizeof(r->node_name));
    r->what = xstrdup(d->what);
    r->damage = *d;
    r->damage.what = r->what;
    (void)atomic_add(&g->damage_out, 1u);
    loop_post(g->control, &r->message);
}

void damage_co_end(struct graph *g)
{
    while (atomic_get(&g->damage_out))
        co_yield ();
}
