/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What queries show of requests on their way: each loop describes its own when a message asks for it, so that requests pay
 * nothing. A loop that does not answer in time is left out (P4).
 */
#include "base/alloc.h"
#include "base/atomic.h"
#include "base/macros.h"
#include "graph/backend-internal.h"
#include "graph/gate.h"
#include "graph/graph-internal.h"

#include <stdio.h>
#include <string.h>

/* How long a query waits for the loops' answers, and how often it looks. */
#define ANSWER_NS (100 * NS_PER_MS)
#define LOOK_NS   NS_PER_MS

void gate_describe(const struct pass *pass, struct gate_oldest *ret)
{
    *ret = (struct gate_oldest){
        .kind = pass->kind,
        .offset = pass->offset,
        .len = pass->len,
        .arrived_ns = pass->arrived_ns,
    };
    if (pass->top)
        (void)snprintf(ret->node, sizeof(ret->node), "%s", node_name(edge_node(pass->top->edge)));
}

/* NULL when there are too many different nodes. */
static struct gate_view_node *view_node(struct gate_view *view, const char *name)
{
    struct gate_view_node *n;

    for (unsigned i = 0; i < view->count; i++) {
        if (strcmp(view->nodes[i].name, name) == 0)
            return &view->nodes[i];
    }
    if (view->count == GATE_VIEW_NODES)
        return NULL;
    n = &view->nodes[view->count++];
    *n = (struct gate_view_node){.in_flight = 0};
    (void)snprintf(n->name, sizeof(n->name), "%s", name);
    return n;
}

static void view_pass(struct gate_view *view, const struct pass *pass)
{
    for (const struct pass_frame *f = pass->top; f; f = f->older) {
        struct gate_view_node *n = view_node(view, node_name(edge_node(f->edge)));

        if (!n)
            continue;
        n->in_flight++;
        if (!n->oldest.arrived_ns || pass->arrived_ns < n->oldest.arrived_ns)
            gate_describe(pass, &n->oldest);
    }
}

void gate_fill_view(struct gate_slot *slot)
{
    const struct pass *pass;

    if (!slot->view)
        slot->view = try_new(struct gate_view);
    if (!slot->view)
        return; /* a query shows less */
    slot->view->count = 0;
    slot->view->taken_ns = loop_clock();
    list_for_each (&slot->inside, pass, link)
        view_pass(slot->view, pass);
}

static bool control_fn all_since(struct graph *g, uint64_t since_ns)
{
    struct backend *b;
    bool all = true;

    list_for_each (&g->backends, b, link)
        all &= gate_view_since(&b->gate, since_ns);
    return all;
}

static void add_view(struct graph *g, const struct gate_view *view)
{
    for (unsigned i = 0; i < view->count; i++) {
        const struct gate_view_node *n = &view->nodes[i];
        struct node *node = graph_find(g, n->name);

        if (!node)
            continue; /* gone since */
        node->load.in_flight += n->in_flight;
        if (!node->load.oldest.arrived_ns || n->oldest.arrived_ns < node->load.oldest.arrived_ns)
            node->load.oldest = n->oldest;
    }
}

void graph_co_look(struct graph *g)
{
    uint64_t began_ns = loop_clock();
    struct backend *b;
    struct node *node;

    while (!all_since(g, began_ns) && loop_clock() < began_ns + ANSWER_NS) {
        if (co_sleep_until(loop_clock() + LOOK_NS) < 0)
            break;
    }
    list_for_each (&g->nodes, node, link)
        node->load = (struct node_load){.in_flight = 0};
    list_for_each (&g->backends, b, link) {
        for (unsigned i = 0; i < LOOP_MAX; i++) {
            const struct gate_slot *slot = atomic_get(&b->gate.slots[i]);

            if (slot && slot->request_home && slot->view && slot->view->taken_ns >= began_ns)
                add_view(g, slot->view);
        }
    }
}

void node_load(const struct node *node, struct node_load *ret)
{
    *ret = node->load;
}
