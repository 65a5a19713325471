/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Who may do what with a node: sums, conflicts, and how access goes down. Everything here is computed for the graph as it
 * will be: with what is pending on edges, and with edges at the nodes that they are about to move to.
 */
#include "graph/access.h"
#include "base/alloc.h"
#include "base/macros.h"
#include "graph/access-internal.h"
#include "graph/graph-internal.h"
#include "graph/late.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const char *access_text(unsigned bits, char *buf)
{
    static const char *const names[] = {"read", "write", "write-unchanged", "resize"};
    size_t n = 0;

    buf[0] = '\0';
    for (unsigned i = 0; i < ARRAY_SIZE(names); i++) {
        if (bits & 1u << i)
            n += (size_t)snprintf(buf + n, ACCESS_TEXT_BYTES - n, "%s%s", n ? ", " : "", names[i]);
    }
    return buf;
}

static struct access edge_access(const struct edge *e)
{
    return e->is_pending ? e->pending : e->access;
}

/* The users that a node will have: its parents that stay, then those that arrive. */
static const struct edge *user_at(const struct node *node, struct list *l)
{
    for (; l != &node->parents; l = l->next) {
        const struct edge *e = container_of(l, struct edge, child_link);

        if (!e->moving_to)
            return e;
    }
    return list_first(&node->arriving, struct edge, arriving_link);
}

static const struct edge *first_user(const struct node *node)
{
    return user_at(node, node->parents.next);
}

static const struct edge *next_user(const struct node *node, const struct edge *e)
{
    if (e->moving_to != node)
        return user_at(node, e->child_link.next);
    return e->arriving_link.next == &node->arriving
               ? NULL
               : list_entry(e->arriving_link.next, struct edge, arriving_link);
}

static struct access users_sum(const struct node *node)
{
    struct access sum = ACCESS_NONE;

    for (const struct edge *e = first_user(node); e; e = next_user(node, e)) {
        struct access a = edge_access(e);

        sum.wants |= a.wants;
        sum.tolerates &= a.tolerates;
    }
    return sum;
}

/*
 * I5. A filter that guards writes by itself stops when it loses its users: it comes and goes with a job, which a bitmap of somebody
 * else's must not keep from ending (P3). The bitmap goes with it.
 */
static bool is_guarded(const struct node *node)
{
    return node->guards && !node->driver->guards_writes;
}

struct access node_access_sum(const struct node *node)
{
    struct access sum = users_sum(node);

    if (is_guarded(node))
        sum.tolerates &= ~(unsigned)(ACCESS_WRITE | ACCESS_RESIZE);
    return sum;
}

/* Q3: what lies below is read for users who read, and by copy-on-write. It may change only if they are prepared for that. */
static struct access access_of_backing(struct access users)
{
    struct access a = {.tolerates = ACCESS_READ | ACCESS_WRITE_UNCHANGED};

    if (users.wants & (ACCESS_READ | ACCESS_WRITE))
        a.wants = ACCESS_READ;
    if (users.tolerates & ACCESS_WRITE)
        a.tolerates |= ACCESS_WRITE | ACCESS_RESIZE;
    return a;
}

/*
 * The files of a format with metadata of its own: they are read, and written to, also when nobody uses the node, and nobody else
 * may change them. The same locks as QEMU's follow from it.
 */
static struct access access_of_metadata(const struct node *parent, struct access users)
{
    users.wants |= ACCESS_READ;
    if (!parent->settings.read_only)
        users.wants |= ACCESS_WRITE | ACCESS_RESIZE;
    users.tolerates &= ~(unsigned)(ACCESS_WRITE | ACCESS_RESIZE);
    return users;
}

struct access access_below(const struct edge *child)
{
    const struct node *parent = child->parent;
    struct access sum = node_access_sum(parent);

    if (child->backing)
        return access_of_backing(sum);
    if (parent->driver->keeps_metadata)
        return access_of_metadata(parent, sum);
    /* A format reads its own metadata there; nobody may change the size under it. */
    if (parent->driver->kind == DRIVER_FORMAT)
        sum.tolerates &= ~(unsigned)ACCESS_RESIZE;
    if (parent->driver->reads_to_write && (sum.wants & ACCESS_WRITE))
        sum.wants |= ACCESS_READ;
    if (parent->driver->guards_writes && sum.wants)
        sum.tolerates &= ~(unsigned)(ACCESS_WRITE | ACCESS_RESIZE);
    return sum;
}

static int conflict(const struct node *node, const struct edge *wanter, const struct edge *refuser,
                    struct error **err)
{
    unsigned bits = edge_access(wanter).wants & ~edge_access(refuser).tolerates;
    bool guarded =
        refuser->parent && is_guarded(refuser->parent) && (bits & (ACCESS_WRITE | ACCESS_RESIZE));
    char wants[ACCESS_TEXT_BYTES];

    access_text(bits, wants);
    return error_set(err, EPERM, "%s wants %s access to node '%s', which %s does not tolerate%s",
                     edge_parent_text(wanter), wants, node->name, edge_parent_text(refuser),
                     guarded ? ": it has dirty bitmaps" : "");
}

/* A conflict is a bit that one edge wants and another one refuses. Linear when there is none. */
static int check_node(const struct node *node, struct error **err)
{
    struct access sum = users_sum(node); /* who uses a node that is guarded is no stranger to it */

    if (node->settings.read_only && (sum.wants & (ACCESS_WRITE | ACCESS_RESIZE)))
        return error_set(err, EPERM, "node '%s' is read-only", node->name);
    if (!(sum.wants & ~sum.tolerates))
        return 0;
    for (const struct edge *a = first_user(node); a; a = next_user(node, a)) {
        if (!(edge_access(a).wants & ~sum.tolerates))
            continue;
        for (const struct edge *b = first_user(node); b; b = next_user(node, b)) {
            if (a != b && (edge_access(a).wants & ~edge_access(b).tolerates))
                return conflict(node, a, b, err);
        }
    }
    return 0;
}

/* Room for one more pointer. False: no memory, and the array is as it was. */
static bool make_room(void *array, unsigned count, unsigned *max)
{
    unsigned wanted = MAX(2 * *max, 8u);
    void **old;
    void **larger;

    if (count < *max)
        return true;
    larger = try_new_n(void *, wanted);
    if (!larger)
        return false;
    memcpy(&old, array, sizeof(old));
    if (count)
        memcpy(larger, old, count * sizeof(*larger));
    memcpy(array, &larger, sizeof(larger));
    free(old);
    *max = wanted;
    return true;
}

/* Its children are to be looked at. */
static int reach_node(struct access_walk *walk, struct node_queue *queue, struct node *node)
{
    if (!walk->number)
        walk->number = graph_walk_begin(node->graph);
    if (node->access_walk != walk->number) {
        if (!make_room(&walk->nodes, walk->node_count, &walk->node_max))
            return -ENOMEM;
        walk->nodes[walk->node_count++] = node;
        node->access_walk = walk->number;
    }
    node_queue_add(queue, node);
    return 0;
}

static int reach_edge(struct access_walk *walk, struct node_queue *queue, struct edge *edge,
                      struct access access)
{
    if (!edge->is_pending) {
        if (!make_room(&walk->edges, walk->edge_count, &walk->edge_max))
            return -ENOMEM;
        walk->edges[walk->edge_count++] = edge;
    }
    edge->is_pending = true;
    edge->pending = access;
    return reach_node(walk, queue, edge->moving_to ? edge->moving_to : edge->node);
}

static int reach_children(struct access_walk *walk, struct node_queue *queue, struct node *node)
{
    struct edge *child;

    list_for_each (&node->children, child, parent_link) {
        struct access below = access_below(child);
        int r;

        if (below.wants == edge_access(child).wants &&
            below.tolerates == edge_access(child).tolerates)
            continue;
        r = reach_edge(walk, queue, child, below);
        if (r < 0)
            return r;
    }
    return 0;
}

/* What follows, until nothing more does. `r`: how reaching the first one went. */
static int reach_all(struct access_walk *walk, struct node_queue *queue, int r, struct error **err)
{
    struct node *node;

    while ((node = node_queue_take(queue))) {
        if (r == 0)
            r = reach_children(walk, queue, node);
    }
    return r < 0 ? error_set(err, -r, "no memory to change the access of %u nodes",
                             walk->node_count + 1)
                 : 0;
}

int access_walk_edge(struct access_walk *walk, struct edge *edge, struct access access,
                     struct error **err)
{
    struct node_queue queue = {NULL, NULL};
    int r = reach_edge(walk, &queue, edge, access);

    return reach_all(walk, &queue, r, err);
}

int access_walk_node(struct access_walk *walk, struct node *node, struct error **err)
{
    struct node_queue queue = {NULL, NULL};
    int r = reach_node(walk, &queue, node);

    return reach_all(walk, &queue, r, err);
}

static int co_fn control_fn tell(struct node *node, struct access access, struct error **err)
{
    int r;

    if (!node->driver->co_set_access ||
        (access.wants == node->told.wants && access.tolerates == node->told.tolerates))
        return 0;
    r = node->driver->co_set_access(node, access, err);
    if (r == 0)
        node->told = access;
    return r;
}

static int check_all(const struct access_walk *walk, struct error **err)
{
    for (unsigned i = 0; i < walk->node_count; i++) {
        int r = check_node(walk->nodes[i], err);

        if (r < 0)
            return r;
    }
    return 0;
}

/* What was held stays held beside what will be: until the commit the old users write, and there may be a way back. */
int access_co_prepare(struct access_walk *walk, struct error **err)
{
    int checked = check_all(walk, err);

    if (checked < 0)
        return checked;
    for (; walk->told < walk->node_count; walk->told++) {
        struct node *node = walk->nodes[walk->told];
        struct access both = node_access_sum(node);
        int r;

        both.wants |= node->told.wants;
        both.tolerates &= node->told.tolerates;
        r = tell(node, both, err);
        if (r < 0)
            return r;
    }
    return 0;
}

static void co_fn control_fn tell_current_main(void *arg)
{
    struct node *node = arg;
    AUTO(error_free) struct error *ignored = NULL;

    (void)tell(node, node->access, &ignored); /* less than it holds: nobody is against it */
}

/* Whoever cancels it; but a host that hangs holds up nobody for long. */
static void co_fn control_fn tell_current(struct node *node, uint64_t deadline_ns)
{
    struct co_scope scope;

    co_shield_begin();
    co_scope_init(&scope);
    co_scope_set_deadline(&scope, deadline_ns);
    (void)co_scope_start(&scope, tell_current_main, node); /* if there is no memory: late */
    co_scope_join(&scope);
    co_shield_end();
}

static bool is_told(const struct node *node)
{
    return !node->driver->co_set_access || (node->told.wants == node->access.wants &&
                                            node->told.tolerates == node->access.tolerates);
}

static void control_fn leave_for_later(struct node *node)
{
    node->told_late = true;
    late_watch(node->graph);
}

/*
 * Tells a driver what its users hold now, which is no more than it has been told. While writes of its node have not ended it
 * keeps what it holds: nobody else may come near what they will still change (G9).
 */
static void co_fn control_fn settle(struct node *node, uint64_t deadline_ns)
{
    if (is_told(node))
        return;
    if (!node_unresolved(node))
        tell_current(node, deadline_ns);
    if (!is_told(node))
        leave_for_later(node);
}

static uint64_t settle_deadline(const struct graph *g)
{
    return loop_clock() + g->change_deadline_ns / 4;
}

void access_co_settle(struct node *node)
{
    settle(node, settle_deadline(node->graph));
}

/* The first `count` nodes of a walk, the last one first. One host may be behind many of them: one deadline for all. */
static void co_fn control_fn settle_all(const struct access_walk *walk, unsigned count)
{
    uint64_t deadline_ns = count ? settle_deadline(walk->nodes[0]->graph) : 0;

    while (count)
        settle(walk->nodes[--count], deadline_ns);
}

void access_commit(struct access_walk *walk)
{
    for (unsigned i = 0; i < walk->edge_count; i++) {
        walk->edges[i]->access = walk->edges[i]->pending;
        walk->edges[i]->is_pending = false;
    }
    for (unsigned i = 0; i < walk->node_count; i++)
        walk->nodes[i]->access = node_access_sum(walk->nodes[i]);
}

static void walk_release(struct access_walk *walk)
{
    free(walk->edges);
    free(walk->nodes);
    *walk = (struct access_walk){.number = 0};
}

void access_co_finish(struct access_walk *walk)
{
    settle_all(walk, walk->node_count);
    walk_release(walk);
}

/* Those that were told get their old access back, which they hold still. */
void access_co_abort(struct access_walk *walk)
{
    for (unsigned i = 0; i < walk->edge_count; i++)
        walk->edges[i]->is_pending = false;
    settle_all(walk, walk->told);
    walk_release(walk);
}

/* Memory only; which drivers are to be told, in `walk`, or left for later if it has no room. */
static void control_fn drop_below(struct access_walk *walk, struct node *from)
{
    struct node_queue queue = {NULL, NULL};
    struct node *node = from;

    walk->number = graph_walk_begin(from->graph);
    for (; node; node = node_queue_take(&queue)) {
        struct edge *child;

        node->access = node_access_sum(node);
        list_for_each (&node->children, child, parent_link) {
            struct access below = access_below(child);

            if (below.wants == child->access.wants && below.tolerates == child->access.tolerates)
                continue;
            child->access = below;
            node_queue_add(&queue, child->node);
        }
        if (is_told(node) || node->access_walk == walk->number)
            continue;
        node->access_walk = walk->number;
        if (make_room(&walk->nodes, walk->node_count, &walk->node_max))
            walk->nodes[walk->node_count++] = node;
        else
            leave_for_later(node);
    }
}

void access_drop(struct edge *edge)
{
    struct access_walk walk = {.number = 0};

    edge->access = ACCESS_NONE;
    drop_below(&walk, edge->node);
    access_co_finish(&walk);
}

int access_change(struct edge *edge, struct access access, struct error **err)
{
    struct access_walk walk = {.number = 0};
    int r = access_walk_edge(&walk, edge, access, err);

    if (r == 0)
        r = access_co_prepare(&walk, err);
    if (r == 0) {
        access_commit(&walk);
        access_co_finish(&walk);
    } else {
        access_co_abort(&walk);
    }
    return r;
}
