/* SPDX-License-Identifier: Apache-2.0 */
/* Nodes and edges: what drivers and users read and set of them. */
#include "graph/node.h"
#include "base/alloc.h"
#include "base/checked.h"
#include "base/macros.h"
#include "crypto/secret.h"
#include "graph/backend.h"
#include "graph/graph-internal.h"
#include "graph/tracker.h"

#include <assert.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const char *node_name(const struct node *node)
{
    return node->name;
}

const struct driver *node_driver(const struct node *node)
{
    return node->driver;
}

void *node_state(const struct node *node)
{
    return node->state;
}

const struct node_settings *node_settings(const struct node *node)
{
    return &node->settings;
}

uint64_t node_size(const struct node *node)
{
    /* Relaxed: whoever is told by a request's answer that a node has grown has that order from the answer. */
    return atomic_get_relaxed(&node->size);
}

unsigned node_alignment(const struct node *node)
{
    return node->align;
}

unsigned node_preferred_alignment(const struct node *node)
{
    return MAX(node->align, node->preferred_align);
}

int node_get_secret(const struct node *node, const char *id, struct secret *ret, struct error **err)
{
    int r = id ? secrets_get(node->graph->secrets, id, ret, err)
               : error_set(err, EINVAL, "'key-secret' is needed: the image is encrypted");

    return r < 0 ? error_wrap(err, r, "node '%s'", node->name) : 0;
}

struct edge *node_child(const struct node *node, const char *name)
{
    struct edge *e;

    list_for_each (&node->children, e, parent_link) {
        if (strcmp(e->name, name) == 0)
            return e;
    }
    return NULL;
}

struct edge *node_file(const struct node *node)
{
    return node->file;
}

struct edge *node_backing(const struct node *node)
{
    return node->backing;
}

struct epoch *node_epoch(struct node *node)
{
    return &node->epoch;
}

struct node *edge_node(const struct edge *edge)
{
    return edge->node;
}

const char *edge_name(const struct edge *edge)
{
    return edge->name;
}

bool node_grows(const struct node *node)
{
    if (node->settings.read_only)
        return false;
    if (node->driver->grows)
        return node->driver->grows(node);
    return node->driver->kind == DRIVER_FILTER && node->file && node_grows(node->file->node);
}

const struct node *node_metadata_user(const struct node *node)
{
    const struct edge *e;

    list_for_each (&node->parents, e, child_link) {
        const struct node *user = e->parent && e == e->parent->file ? e->parent : NULL;

        if (user && !user->driver->keeps_metadata)
            user = node_metadata_user(user);
        if (user)
            return user;
    }
    return NULL;
}

bool node_has_unresolved(const struct node *node)
{
    while (node && !node_unresolved(node))
        node = node->file ? node->file->node : NULL;
    return node;
}

void node_set_size(struct node *node, uint64_t size)
{
    assert(size <= (uint64_t)NODE_SIZE_MAX);
    atomic_set_relaxed(&node->size, size); /* as above */
    for (struct tracker *t = node->trackers; t; t = t->next)
        t->resized(t, size);
}

void node_guard(struct node *node)
{
    node->guards++;
}

void node_set_alignment(struct node *node, unsigned request, unsigned memory)
{
    assert(is_power_of_2(request) && is_power_of_2(memory));
    assert(request == 1 || memory <= request); /* blocks within a buffer are aligned as it is */
    node->align = request;
    node->memory_align = memory;
}

void node_set_preferred_alignment(struct node *node, unsigned request)
{
    assert(is_power_of_2(request));
    node->preferred_align = request;
}

void node_set_read_only(struct node *node)
{
    node->settings.read_only = true;
}

const char *node_filename(const struct node *node)
{
    return node->opened && node->driver->filename ? node->driver->filename(node) : NULL;
}

bool node_allocated_bytes(const struct node *node, uint64_t *ret)
{
    if (!node->opened || !node->driver->allocated_bytes)
        return false;
    *ret = node->driver->allocated_bytes(node);
    return true;
}

bool node_needs_reopen(const struct node *node)
{
    return node->needs_reopen;
}

const char *node_reserved_by(const struct node *node)
{
    return node->reserved_by ? node->reserved_by->what : NULL;
}

void node_for_each_child(const struct node *node, graph_edge_fn *fn, void *arg)
{
    const struct edge *e;

    list_for_each (&node->children, e, parent_link)
        fn(node, e, e->access, arg);
}

struct edge *edge_new(struct node *parent, struct backend *backend, struct node *child,
                      const char *name)
{
    struct edge *e = xnew(struct edge);

    e->node = child;
    e->parent = parent;
    e->backend = backend;
    e->name = xstrdup(name);
    e->backing = parent && strcmp(name, "backing") == 0;
    e->access = ACCESS_NONE;
    list_init(&e->parent_link);
    list_init(&e->arriving_link);
    list_append(&child->parents, &e->child_link);
    if (parent) {
        list_append(&parent->children, &e->parent_link);
        if (e->backing) {
            parent->backing = e;
            atomic_set(&child->lies_below, true);
        } else if (!parent->file) {
            parent->file = e;
        }
    }
    return e;
}

static struct edge *first_but_backing(const struct node *node)
{
    struct edge *e;

    list_for_each (&node->children, e, parent_link) {
        if (!e->backing)
            return e;
    }
    return NULL;
}

struct node *edge_free(struct edge *edge)
{
    struct node *child = edge->node;
    struct node *parent = edge->parent;

    list_remove(&edge->child_link);
    list_remove(&edge->parent_link);
    if (parent && parent->file == edge)
        parent->file = first_but_backing(parent);
    if (parent && parent->backing == edge)
        parent->backing = NULL;
    free(edge->name);
    free(edge);
    return child;
}

unsigned node_unresolved(const struct node *node)
{
    return node->driver->unresolved && node->opened ? node->driver->unresolved(node) : 0;
}

unsigned node_unresolved_below(const struct node *node)
{
    unsigned n = node_unresolved(node);
    const struct edge *e;

    list_for_each (&node->children, e, parent_link) {
        if (!e->backing)
            n += node_unresolved_below(e->node);
    }
    return n;
}

const char *edge_parent_text(const struct edge *edge)
{
    static char text[NODE_NAME_MAX + 16]; /* control thread only; used up in one message... */
    static char other[NODE_NAME_MAX + 16];
    static bool second; /* ...which names two at most */
    char *buf = second ? other : text;

    if (edge->backend)
        return backend_owner(edge->backend);
    second = !second;
    (void)snprintf(buf, sizeof(text), "node '%s'", edge->parent->name);
    return buf;
}
