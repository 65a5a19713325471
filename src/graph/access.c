/* SPDX-License-Identifier: Apache-2.0 */
/* Who may do what with a node: sums, conflicts, and how access goes down. */
#include "graph/access.h"
#include "base/macros.h"
#include "graph/graph-internal.h"

#include <errno.h>
#include <stdio.h>
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

/* What is being asked for, before it is granted. */
static struct access edge_access(const struct edge *e)
{
    return e->is_pending ? e->pending : e->access;
}

struct access node_access_sum(const struct node *node)
{
    struct access sum = ACCESS_NONE;
    const struct edge *e;

    list_for_each (&node->parents, e, child_link) {
        struct access a = edge_access(e);

        sum.wants |= a.wants;
        sum.tolerates &= a.tolerates;
    }
    return sum;
}

struct access access_below(const struct node *parent)
{
    struct access sum = node_access_sum(parent);

    /* A format reads its own metadata there; nobody may change the size under it. */
    if (parent->driver->kind == DRIVER_FORMAT)
        sum.tolerates &= ~(unsigned)ACCESS_RESIZE;
    return sum;
}

static int conflict(const struct node *node, const struct edge *wanter, const struct edge *refuser,
                    struct error **err)
{
    char wants[ACCESS_TEXT_BYTES];

    access_text(edge_access(wanter).wants & ~edge_access(refuser).tolerates, wants);
    return error_set(err, EPERM, "%s wants %s access to node '%s', which %s does not tolerate",
                     edge_parent_text(wanter), wants, node->name, edge_parent_text(refuser));
}

/* Linear: a conflict is a bit that one edge wants and another one refuses. */
static int check_node(const struct node *node, struct error **err)
{
    struct access sum = node_access_sum(node);
    const struct edge *a;
    const struct edge *b;

    if (node->settings.read_only && (sum.wants & (ACCESS_WRITE | ACCESS_RESIZE)))
        return error_set(err, EPERM, "node '%s' is read-only", node->name);
    if (!(sum.wants & ~sum.tolerates))
        return 0;
    list_for_each (&node->parents, a, child_link) {
        if (!(edge_access(a).wants & ~sum.tolerates))
            continue;
        list_for_each (&node->parents, b, child_link) {
            if (a != b && (edge_access(a).wants & ~edge_access(b).tolerates))
                return conflict(node, a, b, err);
        }
    }
    return 0;
}

/* The edges of one access_change(), to be committed or forgotten together, in the order in which they were reached. */
#define WALK_MAX 256

struct access_walk {
    struct edge *edges[WALK_MAX];
    unsigned count;
};

static int walk_down(struct access_walk *walk, struct edge *edge, struct access access,
                     struct error **err)
{
    struct node *node = edge->node;
    struct edge *child;
    int r;

    if (!edge->is_pending) {
        if (walk->count == WALK_MAX)
            return error_set(err, E2BIG, "more than %d edges below node '%s'", WALK_MAX,
                             node->name);
        walk->edges[walk->count++] = edge;
    }
    edge->is_pending = true;
    edge->pending = access;
    r = check_node(node, err);
    if (r < 0)
        return r;
    list_for_each (&node->children, child, parent_link) {
        struct access below = access_below(node);

        if (below.wants == edge_access(child).wants &&
            below.tolerates == edge_access(child).tolerates)
            continue;
        r = walk_down(walk, child, below, err);
        if (r < 0)
            return r;
    }
    return 0;
}

/* Drivers that guard their access: those before the failing one get their old access back, which they held a moment ago. */
static int co_fn control_fn tell_drivers(struct access_walk *walk, struct error **err)
{
    unsigned i;
    int r = 0;

    for (i = 0; i < walk->count && r == 0; i++) {
        struct node *node = walk->edges[i]->node;

        if (node->driver->co_set_access)
            r = node->driver->co_set_access(node, node_access_sum(node), err);
    }
    while (r < 0 && --i > 0) {
        struct node *node = walk->edges[i - 1]->node;
        AUTO(error_free) struct error *ignored = NULL;

        if (node->driver->co_set_access)
            (void)node->driver->co_set_access(node, node->access, &ignored);
    }
    return r;
}

int access_change(struct edge *edge, struct access access, struct error **err)
{
    struct access_walk walk = {.count = 0};
    int r = walk_down(&walk, edge, access, err);

    if (r == 0)
        r = tell_drivers(&walk, err);
    for (unsigned i = 0; i < walk.count; i++) {
        struct edge *e = walk.edges[i];

        if (r == 0)
            e->access = e->pending;
        e->is_pending = false;
    }
    for (unsigned i = 0; i < walk.count && r == 0; i++)
        walk.edges[i]->node->access = node_access_sum(walk.edges[i]->node);
    return r;
}
