/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Dirty bitmaps of nodes. A node that has any has one tracker for all of them (struct node_bitmaps), with a list of those
 * that record. What changes them is in dirty-bitmap-actions.c.
 */
#include "base/alloc.h"
#include "base/macros.h"
#include "bitmaps/dirty-bitmap-internal.h"
#include "graph/driver.h"
#include "loop/loop.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* ---- the bitmaps of a node ---- */

struct dirty_bitmap *dirty_bitmap_free(struct dirty_bitmap *d)
{
    if (!d)
        return NULL;
    bitmap_free(d->bits);
    bitmap_free(d->successor);
    free(d->owner);
    free(d->name);
    free(d);
    return NULL;
}

static void group_changed(struct tracker *t, uint64_t offset, uint64_t len)
{
    const struct node_bitmaps *group = container_of(t, struct node_bitmaps, tracker);

    for (const struct dirty_bitmap *d = group->recording; d; d = d->next_recording)
        bitmap_set(d->live, offset, len);
}

static void resize_content(struct dirty_bitmap *d, struct bitmap *bits, uint64_t size)
{
    uint64_t old = bitmap_size(bits);

    bitmap_resize(bits, size);
    if (size > old && old < d->high_water) /* DIRTY-4 */
        bitmap_set(bits, old, MIN(size, d->high_water) - old);
}

static void group_resized(struct tracker *t, uint64_t size)
{
    const struct node_bitmaps *group = container_of(t, struct node_bitmaps, tracker);
    struct dirty_bitmap *d;

    list_for_each (&group->bitmaps, d, link) {
        resize_content(d, d->bits, size);
        if (d->successor)
            resize_content(d, d->successor, size);
        d->high_water = MAX(d->high_water, size);
    }
}

static void group_closed(struct tracker *t)
{
    struct node_bitmaps *group = container_of(t, struct node_bitmaps, tracker);
    struct dirty_bitmap *d;
    struct dirty_bitmap *next;

    list_for_each_safe (&group->bitmaps, d, next, link) {
        list_remove(&d->link);
        if (!d->owner) /* else it is freed by dirty_bitmap_release() */
            dirty_bitmap_free(d);
    }
    free(group);
}

struct node_bitmaps *node_bitmaps_new(void)
{
    struct node_bitmaps *group = try_new(struct node_bitmaps);

    if (!group)
        return NULL;
    group->tracker = (struct tracker){
        .changed = group_changed,
        .resized = group_resized,
        .closed = group_closed,
    };
    list_init(&group->bitmaps);
    return group;
}

struct node_bitmaps *node_bitmaps_of(const struct node *node)
{
    for (struct tracker *t = node_trackers(node); t; t = t->next) {
        if (t->changed == group_changed)
            return container_of(t, struct node_bitmaps, tracker);
    }
    return NULL;
}

struct dirty_bitmap *node_bitmaps_find(const struct node *node, const char *name)
{
    const struct node_bitmaps *group = node_bitmaps_of(node);
    struct dirty_bitmap *d;

    if (!group)
        return NULL;
    list_for_each (&group->bitmaps, d, link) {
        if (strcmp(d->name, name) == 0)
            return d;
    }
    return NULL;
}

int node_bitmaps_need(struct graph *graph, const struct dirty_bitmap_ref *ref,
                      struct dirty_bitmap **ret, struct error **err)
{
    struct dirty_bitmap *d;
    struct node *node;
    int r = graph_need(graph, ref->node, &node, err);

    if (r < 0)
        return r;
    d = node_bitmaps_find(node, ref->name);
    if (!d)
        return error_set(err, ENOENT, "node '%s' has no dirty bitmap '%s'", ref->node, ref->name);
    *ret = d;
    return 0;
}

void node_bitmaps_update(struct node_bitmaps *group)
{
    struct dirty_bitmap *d;

    group->recording = NULL;
    list_for_each (&group->bitmaps, d, link) {
        d->live = d->successor ? d->successor : d->bits;
        if (!d->enabled)
            continue;
        d->next_recording = group->recording;
        group->recording = d;
    }
}

void dirty_bitmap_new_generation(struct dirty_bitmap *d)
{
    loop_random(d->generation, sizeof(d->generation));
}

/* ---- for formats that store them ---- */

int dirty_bitmap_load(struct node *node, const struct dirty_bitmap_loaded *how, struct bitmap *bits)
{
    struct node_bitmaps *group = node_bitmaps_of(node);
    struct dirty_bitmap *d = try_new(struct dirty_bitmap);

    if (!group && d) {
        group = node_bitmaps_new();
        if (group)
            node_attach_tracker(node, &group->tracker);
    }
    if (!group || !d) {
        free(d);
        bitmap_free(bits);
        return -ENOMEM;
    }
    d->name = xstrdup(how->name);
    d->bits = bits;
    d->enabled = how->enabled && !how->inconsistent;
    d->persistent = true;
    d->inconsistent = how->inconsistent;
    d->read_only = how->read_only;
    d->high_water = UINT64_MAX; /* DIRTY-4: the image does not say how large the disk once was */
    d->live = bits;
    dirty_bitmap_new_generation(d);
    list_append(&group->bitmaps, &d->link);
    if (d->enabled) { /* as node_bitmaps_update(), but there may be many */
        d->next_recording = group->recording;
        group->recording = d;
    }
    if (!how->read_only)
        node_guard(node); /* I5 */
    return 0;
}

struct dirty_bitmap *dirty_bitmap_next_persistent(const struct node *node,
                                                  const struct dirty_bitmap *d)
{
    const struct node_bitmaps *group = node_bitmaps_of(node);

    if (!group)
        return NULL;
    for (struct list *l = d ? d->link.next : group->bitmaps.next; l != &group->bitmaps;
         l = l->next) {
        struct dirty_bitmap *next = list_entry(l, struct dirty_bitmap, link);

        if (next->persistent)
            return next;
    }
    return NULL;
}

bool dirty_bitmap_inconsistent(const struct dirty_bitmap *d)
{
    return d->inconsistent;
}

struct bitmap *dirty_bitmap_bits_to_store(struct dirty_bitmap *d)
{
    if (d->successor)
        (void)bitmap_merge(d->successor, d->bits); /* without memory it has more */
    return d->successor ? d->successor : d->bits;
}

/* ---- outside of changes ---- */

int dirty_bitmap_co_hold(struct graph *graph, struct dirty_bitmap_ref ref, const char *owner,
                         struct dirty_bitmap **ret, struct error **err)
{
    struct change change;
    struct dirty_bitmap *d;
    int r;

    /* Reserved for a moment: no change that wants to remove it is under way then. */
    change_init(&change, graph, "%s", owner);
    r = change_add_root(&change, ref.node, err);
    if (r == 0)
        r = change_co_reserve(&change, err);
    if (r == 0)
        r = dirty_bitmap_need(NULL, graph, ref, &d, err);
    if (r == 0) {
        d->owner = xstrdup(owner);
        *ret = d;
    }
    change_end(&change);
    return r;
}

void dirty_bitmap_release(struct dirty_bitmap *d)
{
    assert(d->owner && !d->successor);
    free(take(&d->owner));
    if (list_empty(&d->link)) /* its node is gone */
        dirty_bitmap_free(d);
}

int dirty_bitmap_find(struct graph *graph, struct dirty_bitmap_ref ref, struct dirty_bitmap **ret,
                      struct error **err)
{
    return node_bitmaps_need(graph, &ref, ret, err);
}

struct node *dirty_bitmap_find_below(struct node *node, const char *name)
{
    while (node && !node_bitmaps_find(node, name)) {
        bool filter = node_driver(node)->kind == DRIVER_FILTER;
        struct edge *below = filter ? node_file(node) : node_backing(node);

        node = below ? edge_node(below) : NULL;
    }
    return node;
}

const char *dirty_bitmap_name(const struct dirty_bitmap *d)
{
    return d->name;
}

bool dirty_bitmap_enabled(const struct dirty_bitmap *d)
{
    return d->enabled;
}

struct bitmap *dirty_bitmap_bits(const struct dirty_bitmap *d)
{
    return d->bits;
}

static void describe(const struct dirty_bitmap *d, struct dirty_bitmap_picture *ret)
{
    ret->name = d->name;
    ret->count_bytes = bitmap_count(d->bits);
    ret->granularity = bitmap_granularity(d->bits);
    ret->recording = d->enabled;
    ret->busy = d->owner != NULL;
    ret->persistent = d->persistent;
    ret->inconsistent = d->inconsistent;
    memcpy(ret->generation, d->generation, sizeof(ret->generation));
    ret->has_successor = d->successor != NULL;
    if (ret->has_successor)
        memcpy(ret->successor_generation, d->successor_generation,
               sizeof(ret->successor_generation));
}

void dirty_bitmap_for_each(const struct node *node, dirty_bitmap_fn *fn, void *arg)
{
    const struct node_bitmaps *group = node_bitmaps_of(node);
    const struct dirty_bitmap *d;

    if (!group)
        return;
    list_for_each (&group->bitmaps, d, link) {
        struct dirty_bitmap_picture picture;

        describe(d, &picture);
        fn(&picture, arg);
    }
}

unsigned dirty_bitmap_count(const struct node *node)
{
    const struct node_bitmaps *group = node_bitmaps_of(node);
    const struct dirty_bitmap *d;
    unsigned count = 0;

    if (!group)
        return 0;
    list_for_each (&group->bitmaps, d, link)
        count++;
    return count;
}
