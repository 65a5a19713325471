/* SPDX-License-Identifier: Apache-2.0 */
/* query-graph: who uses what, and who waits for what since when. */
#include "base/alloc.h"
#include "base/macros.h"
#include "control/control.h"
#include "graph/backend.h"
#include "graph/driver.h"
#include "loop/loop.h"
#include "schema-dispatch.h"

#include <errno.h>
#include <inttypes.h>

struct graph_walk {
    struct graph *graph;
    struct graph_info *info;
    size_t nodes;
    size_t edges;
    size_t backends;
    size_t orphans;
    uint64_t now_ns;
};

/* A clock that other threads have read later may be ahead of ours. */
static uint64_t age(const struct graph_walk *walk, uint64_t since_ns)
{
    return since_ns < walk->now_ns ? walk->now_ns - since_ns : 0;
}

static struct access_right_array rights(unsigned bits)
{
    struct access_right_array list = {.items = xnew_n(enum access_right, 4)};

    for (unsigned i = 0; i < 4; i++) {
        if (bits & 1u << i) /* access_bits and access-right have the same order */
            list.items[list.count++] = (enum access_right)i;
    }
    return list;
}

static void show_load(struct graph_walk *walk, const struct node *node, struct graph_node *shown)
{
    struct node_load load;

    node_load(node, &load);
    shown->in_flight = load.in_flight;
    shown->has_oldest_age_ns = load.oldest.arrived_ns > 0;
    if (!shown->has_oldest_age_ns)
        return;
    shown->oldest_age_ns = age(walk, load.oldest.arrived_ns);
    shown->waits_for = xasprintf("a %s of %" PRIu64 " bytes at %" PRIu64 ", in node '%s'",
                                 request_kind_name(load.oldest.kind), load.oldest.len,
                                 load.oldest.offset, load.oldest.node);
}

static void show_edge(const struct node *parent, const struct edge *edge, struct access access,
                      void *arg)
{
    struct graph_walk *walk = arg;

    walk->info->edges.items[walk->info->edges.count++] = (struct graph_edge){
        .parent = xstrdup(node_name(parent)),
        .child = xstrdup(node_name(edge_node(edge))),
        .name = xstrdup(edge_name(edge)),
        .wants = rights(access.wants),
        .tolerates = rights(access.tolerates),
    };
}

static void show_node(struct node *node, void *arg)
{
    struct graph_walk *walk = arg;
    struct graph_node *shown = &walk->info->nodes.items[walk->info->nodes.count++];
    const char *holder = node_reserved_by(node);

    *shown = (struct graph_node){
        .node_name = xstrdup(node_name(node)),
        .driver = xstrdup(node_driver(node)->name),
        .read_only = node_settings(node)->read_only,
        .reserved_by = holder ? xstrdup(holder) : NULL,
        .needs_reopen = node_needs_reopen(node),
    };
    show_load(walk, node, shown);
    node_for_each_child(node, show_edge, walk);
}

static void show_backend(const struct backend *b, void *arg)
{
    struct graph_walk *walk = arg;
    struct gate_picture picture;

    backend_gate_picture(b, &picture);
    walk->info->backends.items[walk->info->backends.count++] = (struct graph_backend){
        .owner = xstrdup(backend_owner(b)),
        .node_name = xstrdup(node_name(backend_node(b))),
        .in_flight = picture.inside,
        .queued = picture.queued,
        .has_oldest_age_ns = picture.oldest_ns > 0,
        .oldest_age_ns = picture.oldest_ns > 0 ? age(walk, picture.oldest_ns) : 0,
        .closed = backend_is_closed(b),
    };
}

static void count_edge(const struct node *parent, const struct edge *edge, struct access access,
                       void *arg)
{
    struct graph_walk *walk = arg;

    (void)parent;
    (void)edge;
    (void)access;
    walk->edges++;
}

static void count_node(struct node *node, void *arg)
{
    struct graph_walk *walk = arg;

    walk->nodes++;
    node_for_each_child(node, count_edge, walk);
}

static void count_backend(const struct backend *b, void *arg)
{
    struct graph_walk *walk = arg;

    (void)b;
    walk->backends++;
}

static void count_orphan(const struct node *node, uint64_t age_ns, unsigned unresolved, void *arg)
{
    struct graph_walk *walk = arg;

    (void)node;
    (void)age_ns;
    (void)unresolved;
    walk->orphans++;
}

static void show_orphan(const struct node *node, uint64_t age_ns, unsigned unresolved, void *arg)
{
    struct graph_walk *walk = arg;

    walk->info->orphans.items[walk->info->orphans.count++] = (struct graph_orphan){
        .node_name = xstrdup(node_name(node)),
        .age_ns = age_ns,
        .buffers = unresolved,
    };
}

int qmp_query_graph(struct qmp_session *session, struct graph_info *ret, struct error **err)
{
    struct graph_walk walk = {
        .graph = control_of(session)->graph,
        .info = ret,
    };

    graph_co_look(walk.graph);
    walk.now_ns = loop_clock();
    graph_for_each_node(walk.graph, count_node, &walk);
    graph_for_each_backend(walk.graph, count_backend, &walk);
    graph_for_each_orphan(walk.graph, count_orphan, &walk);
    ret->nodes.items = try_new_n(struct graph_node, MAX(walk.nodes, (size_t)1));
    ret->edges.items = try_new_n(struct graph_edge, MAX(walk.edges, (size_t)1));
    ret->backends.items = try_new_n(struct graph_backend, MAX(walk.backends, (size_t)1));
    ret->orphans.items = try_new_n(struct graph_orphan, MAX(walk.orphans, (size_t)1));
    if (!ret->nodes.items || !ret->edges.items || !ret->backends.items || !ret->orphans.items)
        return error_set(err, ENOMEM, "no memory for a graph of %zu nodes", walk.nodes);
    graph_for_each_node(walk.graph, show_node, &walk);
    graph_for_each_backend(walk.graph, show_backend, &walk);
    graph_for_each_orphan(walk.graph, show_orphan, &walk);
    return 0;
}
