/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What changes the dirty bitmaps of nodes: actions of a change (DIRTY-1, DIRTY-2), one after the other below. What they have in
 * common comes first.
 */
#include "base/alloc.h"
#include "base/checked.h"
#include "base/macros.h"
#include "bitmaps/bitmap-store.h"
#include "bitmaps/dirty-bitmap-internal.h"
#include "graph/driver.h"
#include "loop/loop.h"

#include <assert.h>
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

/* The granularity, where none is said, is that of the node's clusters within these; the latter if it has none. */
#define DEFAULT_GRANULARITY_MIN (4 * KIB)
#define DEFAULT_GRANULARITY_MAX (64 * KIB)

/* ---- what the actions of one change say together (DIRTY-1) ---- */

static const struct change_action_ops add_ops;
static const struct change_action_ops remove_ops;
static const struct change_action_ops freeze_ops;

/* The action before `until` (NULL: any) that does this to the bitmap, or to the one of this name. */
static const struct dirty_bitmap_action *pending(const struct change *c,
                                                 const struct change_action_ops *ops,
                                                 const struct dirty_bitmap *d,
                                                 const struct dirty_bitmap_ref *ref)
{
    struct change_action *action;

    if (!c)
        return NULL;
    list_for_each (&c->actions, action, link) {
        const struct dirty_bitmap_action *a;

        if (action->ops != ops || action->stage == CHANGE_NEW)
            continue;
        a = container_of(action, struct dirty_bitmap_action, action);
        if (!a->bitmap)
            continue; /* it has not got that far */
        if (ref ? strcmp(a->ref.node, ref->node) == 0 && strcmp(a->ref.name, ref->name) == 0
                : a->bitmap == d)
            return a;
    }
    return NULL;
}

static int find_ref(const struct change *c, struct graph *graph, const struct dirty_bitmap_ref *ref,
                    struct dirty_bitmap **ret, struct error **err)
{
    const struct dirty_bitmap_action *added = pending(c, &add_ops, NULL, ref);

    if (!added)
        return node_bitmaps_need(graph, ref, ret, err);
    *ret = added->bitmap;
    return 0;
}

/* One that nobody has and that is not on its way out. */
static int find_free(const struct change *c, struct graph *graph, struct dirty_bitmap_ref ref,
                     struct dirty_bitmap **ret, struct error **err)
{
    const struct dirty_bitmap_action *frozen;
    struct dirty_bitmap *d;
    const char *owner;
    int r = find_ref(c, graph, &ref, &d, err);

    if (r < 0)
        return r;
    frozen = pending(c, &freeze_ops, d, NULL);
    owner = frozen ? frozen->owner : d->owner;
    if (owner) {
        error_set(err, EBUSY, "dirty bitmap '%s' of node '%s' is in use by %s", ref.name, ref.node,
                  owner);
        return -EBUSY;
    }
    if (pending(c, &remove_ops, d, NULL)) {
        error_set(err, EBUSY, "dirty bitmap '%s' of node '%s' is being removed", ref.name,
                  ref.node);
        return -EBUSY;
    }
    *ret = d;
    return 0;
}

int dirty_bitmap_need(const struct change *c, struct graph *graph, struct dirty_bitmap_ref ref,
                      struct dirty_bitmap **ret, struct error **err)
{
    int r = find_free(c, graph, ref, ret, err);

    if (r == 0 && (*ret)->inconsistent) /* DIRTY-6 */
        return error_set(err, EINVAL,
                         "dirty bitmap '%s' of node '%s' is inconsistent: it may have missed "
                         "changes, and can only be removed",
                         ref.name, ref.node);
    return r;
}

/* What the image stores cannot change. */
static int check_writable(const struct dirty_bitmap_action *a, struct error **err)
{
    return a->bitmap->read_only
               ? error_set(err, EROFS,
                           "dirty bitmap '%s' is stored in the image of node '%s', which is open "
                           "for reading only",
                           a->ref.name, a->ref.node)
               : 0;
}

static struct dirty_bitmap_action *action_of(struct change_action *action)
{
    return container_of(action, struct dirty_bitmap_action, action);
}

static struct graph *graph_of(const struct dirty_bitmap_action *a)
{
    return a->action.change->graph;
}

/* The action's bitmap, which nobody else may use. */
static int prepare_bitmap(struct dirty_bitmap_action *a, struct error **err)
{
    struct dirty_bitmap *d;
    int r = dirty_bitmap_need(a->action.change, graph_of(a), a->ref, &d, err);

    if (r == 0)
        a->bitmap = d;
    return r;
}

/* The same, and its content is going to change. */
static int prepare_content(struct dirty_bitmap_action *a, struct error **err)
{
    int r = prepare_bitmap(a, err);

    return r < 0 ? r : check_writable(a, err);
}

static int control_fn prepare_only(struct change_action *action, struct error **err)
{
    return prepare_bitmap(action_of(action), err);
}

static int no_memory(struct dirty_bitmap_action *a, struct error **err)
{
    return error_set(err, ENOMEM, "no memory for dirty bitmap '%s' of node '%s'", a->ref.name,
                     a->ref.node);
}

/* The node is reserved. */
static struct node *node_in_commit(const struct dirty_bitmap_action *a)
{
    struct node *node = graph_find(graph_of(a), a->ref.node);

    assert(node);
    return node;
}

static struct node_bitmaps *group_in_commit(const struct dirty_bitmap_action *a)
{
    struct node_bitmaps *group = node_bitmaps_of(node_in_commit(a));

    assert(group);
    return group;
}

/* Content and spare change places. */
static void swap_content(struct dirty_bitmap_action *a)
{
    struct dirty_bitmap *d = a->bitmap;
    struct bitmap *last = d->bits;
    struct node_bitmaps *group = node_bitmaps_of(node_in_commit(a));

    d->bits = a->spare;
    a->spare = last;
    if (group)
        node_bitmaps_update(
            group); /* where requests set bits; what this change adds is not there yet */
}

static void action_release(struct change_action *action)
{
    struct dirty_bitmap_action *a = action_of(action);

    a->spare = bitmap_free(a->spare);
    free(take(&a->group));
    free(take(&a->from));
    free(take(&a->owner_copy));
}

static void begin(struct change *c, struct dirty_bitmap_action *a,
                  const struct change_action_ops *ops, struct dirty_bitmap_ref ref)
{
    *a = (struct dirty_bitmap_action){.ref = ref};
    change_add_action(c, &a->action, ops);
}

static int reserve(struct change *c, const char *node_name, struct error **err)
{
    for (unsigned i = 0; i < c->root_count; i++) {
        if (strcmp(c->roots[i], node_name) == 0)
            return 0;
    }
    return change_add_root(c, node_name, err);
}

/* ---- add ---- */

static uint64_t default_granularity(const struct node *node)
{
    const struct driver *driver = node_driver(node);
    uint64_t cluster = driver->cluster_bytes ? driver->cluster_bytes(node) : 0;

    if (!cluster)
        return DEFAULT_GRANULARITY_MAX;
    return MIN(MAX(cluster, DEFAULT_GRANULARITY_MIN), DEFAULT_GRANULARITY_MAX);
}

static int check_new(struct dirty_bitmap_action *a, const struct node *node, struct error **err)
{
    const char *name = a->ref.name;

    if (!name[0] || strlen(name) > DIRTY_BITMAP_NAME_MAX)
        return error_set(err, EINVAL,
                         "the name of a dirty bitmap has %zu bytes, 1 to %d are allowed",
                         strlen(name), DIRTY_BITMAP_NAME_MAX);
    if (node_bitmaps_find(node, name) || pending(a->action.change, &add_ops, NULL, &a->ref))
        return error_set(err, EEXIST, "node '%s' has a dirty bitmap '%s' already", a->ref.node,
                         name);
    if (a->granularity < BITMAP_GRANULARITY_MIN || a->granularity > BITMAP_GRANULARITY_MAX ||
        !is_power_of_2(a->granularity))
        return error_set(err, EINVAL,
                         "granularity %" PRIu64 " is not a power of two from %" PRIu64
                         " to %" PRIu64,
                         a->granularity, BITMAP_GRANULARITY_MIN, BITMAP_GRANULARITY_MAX);
    return 0;
}

/* What a format keeps its metadata in grows under load, and is no disk of anybody's. */
static int check_is_disk(const struct node *node, struct error **err)
{
    const struct node *user = node_metadata_user(node);

    if (user)
        return error_set(err, EBUSY,
                         "node '%s' is the file of node '%s': put the bitmap on that one",
                         node_name(node), node_name(user));
    return 0;
}

/* With those of the node that are stored, and that the actions before this one add. */
static int co_fn control_fn check_storable(const struct dirty_bitmap_action *a, struct node *node,
                                           struct error **err)
{
    const struct bitmap_store *store = node_driver(node)->bitmap_store;
    struct bitmap_store_new new = {
        .name = a->ref.name,
        .granularity = a->granularity,
        .count = 1,
        .name_bytes = strlen(a->ref.name),
    };
    struct dirty_bitmap *d = NULL;
    struct change_action *action;

    if (!store)
        return error_set(err, EOPNOTSUPP,
                         "dirty bitmap '%s' cannot be persistent: node '%s' cannot store bitmaps",
                         a->ref.name, a->ref.node);
    while ((d = dirty_bitmap_next_persistent(node, d))) {
        new.count++;
        new.name_bytes += strlen(d->name);
    }
    list_for_each (&a->action.change->actions, action, link) {
        const struct dirty_bitmap_action *other;

        if (action == &a->action)
            break;
        if (action->ops != &add_ops)
            continue;
        other = container_of(action, struct dirty_bitmap_action, action);
        if (other->persistent && strcmp(other->ref.node, a->ref.node) == 0) {
            new.count++;
            new.name_bytes += strlen(other->ref.name);
        }
    }
    return store->co_check_new(node, &new, err);
}

static int co_fn control_fn add_prepare(struct change_action *action, struct error **err)
{
    struct dirty_bitmap_action *a = action_of(action);
    struct dirty_bitmap *d;
    struct node *node;
    int r = graph_need(graph_of(a), a->ref.node, &node, err);

    if (r == 0)
        r = check_is_disk(node, err);
    if (r < 0)
        return r;
    if (!a->granularity)
        a->granularity = default_granularity(node);
    r = check_new(a, node, err);
    if (r == 0 && a->persistent)
        r = check_storable(a, node, err);
    if (r < 0)
        return r;
    a->group = node_bitmaps_new(); /* an action before this one may take the last bitmap away */
    if (!a->group)
        return no_memory(a, err);
    d = try_new(struct dirty_bitmap);
    if (!d)
        return no_memory(a, err);
    a->guard.node = node;
    a->bitmap = d;
    list_init(&d->link);
    d->name = xstrdup(a->ref.name);
    d->bits = bitmap_new(node_size(node), a->granularity);
    d->enabled = a->enabled;
    d->persistent = a->persistent;
    d->high_water = node_size(node);
    return d->bits ? 0 : no_memory(a, err);
}

static void control_fn add_commit(struct change_action *action)
{
    struct dirty_bitmap_action *a = action_of(action);
    struct node_bitmaps *group = node_bitmaps_of(node_in_commit(a));

    if (!group) {
        group = take(&a->group);
        assert(group);
        node_attach_tracker(node_in_commit(a), &group->tracker);
    }
    list_append(&group->bitmaps, &a->bitmap->link);
    dirty_bitmap_new_generation(a->bitmap);
    node_bitmaps_update(group);
}

static void add_abort(struct change_action *action)
{
    action_of(action)->bitmap = dirty_bitmap_free(action_of(action)->bitmap);
    action_release(action);
}

static const struct change_action_ops add_ops = {
    .co_prepare = add_prepare,
    .commit = add_commit,
    .co_abort = add_abort,
    .co_finish = action_release,
};

int dirty_bitmap_action_add(struct change *c, struct dirty_bitmap_action *a,
                            struct dirty_bitmap_ref ref, uint64_t granularity, bool enabled,
                            struct error **err)
{
    begin(c, a, &add_ops, ref);
    guard_action_add(c, &a->guard, 1); /* I5 */
    a->granularity = granularity;
    a->enabled = enabled;
    return reserve(c, ref.node, err);
}

/* ---- remove ---- */

static int control_fn remove_prepare(struct change_action *action, struct error **err)
{
    struct dirty_bitmap_action *a = action_of(action);
    int r = find_free(action->change, graph_of(a), a->ref, &a->bitmap, err);

    if (r == 0)
        r = check_writable(a, err);
    if (r < 0) {
        a->bitmap = NULL;
        return r;
    }
    a->guard.node = node_in_commit(a);
    if (a->bitmap->persistent)
        action->node = a->guard.node;
    return 0;
}

/* From the image. */
static int co_fn control_fn remove_persist(struct change_action *action, struct error **err)
{
    const struct dirty_bitmap_action *a = action_of(action);

    if (!a->bitmap->persistent)
        return 0;
    return node_driver(action->node)
        ->bitmap_store->co_remove(action->node, action_pass(action), a->ref.name, err);
}

static int co_fn control_fn remove_undo(struct change_action *action, struct error **err)
{
    const struct dirty_bitmap_action *a = action_of(action);

    (void)err;
    if (!a->bitmap->persistent)
        return 0;
    return node_driver(action->node)
        ->bitmap_store->co_remove_undo(action->node, action_pass(action), a->ref.name);
}

static void control_fn remove_commit(struct change_action *action)
{
    struct dirty_bitmap_action *a = action_of(action);
    struct node_bitmaps *group = group_in_commit(a);

    list_remove(&a->bitmap->link);
    node_bitmaps_update(group);
    if (!list_empty(&group->bitmaps))
        return;
    node_detach_tracker(node_in_commit(a), &group->tracker);
    a->group = group;
}

static void remove_finish(struct change_action *action)
{
    if (action->node)
        node_driver(action->node)->bitmap_store->removed(action->node, action_of(action)->ref.name);
    action_of(action)->bitmap = dirty_bitmap_free(action_of(action)->bitmap);
    action_release(action);
}

static const struct change_action_ops remove_ops = {
    .co_prepare = remove_prepare,
    .co_persist = remove_persist,
    .co_undo = remove_undo,
    .commit = remove_commit,
    .co_abort = action_release,
    .co_finish = remove_finish,
};

int dirty_bitmap_action_remove(struct change *c, struct dirty_bitmap_action *a,
                               struct dirty_bitmap_ref ref, struct error **err)
{
    begin(c, a, &remove_ops, ref);
    guard_action_add(c, &a->guard, -1);
    return reserve(c, ref.node, err);
}

/* ---- clear ---- */

static int control_fn clear_prepare(struct change_action *action, struct error **err)
{
    struct dirty_bitmap_action *a = action_of(action);
    int r = prepare_content(a, err);

    if (r < 0)
        return r;
    a->spare = bitmap_new(bitmap_size(a->bitmap->bits), bitmap_granularity(a->bitmap->bits));
    return a->spare ? 0 : no_memory(a, err);
}

static int control_fn clear_persist(struct change_action *action, struct error **err)
{
    (void)err;
    swap_content(action_of(action)); /* DIRTY-2 */
    return 0;
}

static int control_fn content_undo(struct change_action *action, struct error **err)
{
    (void)err;
    swap_content(action_of(action));
    return 0;
}

static void control_fn clear_commit(struct change_action *action)
{
    struct dirty_bitmap *d = action_of(action)->bitmap;

    d->high_water = bitmap_size(d->bits);
    dirty_bitmap_new_generation(d);
}

static const struct change_action_ops clear_ops = {
    .co_prepare = clear_prepare,
    .co_persist = clear_persist,
    .co_undo = content_undo,
    .commit = clear_commit,
    .co_abort = action_release,
    .co_finish = action_release,
};

int dirty_bitmap_action_clear(struct change *c, struct dirty_bitmap_action *a,
                              struct dirty_bitmap_ref ref, struct error **err)
{
    begin(c, a, &clear_ops, ref);
    return reserve(c, ref.node, err);
}

/* ---- enable and disable ---- */

static void control_fn enable_commit(struct change_action *action)
{
    struct dirty_bitmap_action *a = action_of(action);

    a->bitmap->enabled = a->enabled;
    dirty_bitmap_new_generation(a->bitmap);
    node_bitmaps_update(group_in_commit(a));
}

static const struct change_action_ops enable_ops = {
    .co_prepare = prepare_only,
    .commit = enable_commit,
    .co_abort = action_release,
    .co_finish = action_release,
};

int dirty_bitmap_action_enable(struct change *c, struct dirty_bitmap_action *a,
                               struct dirty_bitmap_ref ref, bool enabled, struct error **err)
{
    begin(c, a, &enable_ops, ref);
    a->enabled = enabled;
    return reserve(c, ref.node, err);
}

/* ---- merge ---- */

static int control_fn merge_prepare(struct change_action *action, struct error **err)
{
    struct dirty_bitmap_action *a = action_of(action);
    int r = prepare_content(a, err);

    if (r < 0)
        return r;
    a->from = try_new_n(struct dirty_bitmap *, a->source_count);
    if (!a->from)
        return no_memory(a, err);
    for (size_t i = 0; r == 0 && i < a->source_count; i++) {
        const struct dirty_bitmap_ref *ref = &a->sources[i];
        uint64_t size = bitmap_size(a->bitmap->bits);

        r = dirty_bitmap_need(action->change, graph_of(a), *ref, &a->from[i], err);
        if (r == 0 && bitmap_size(a->from[i]->bits) != size)
            r = error_set(err, EINVAL,
                          "dirty bitmap '%s' of node '%s' covers %" PRIu64 " bytes, '%s' of node "
                          "'%s' %" PRIu64 ": sizes must be equal",
                          ref->name, ref->node, bitmap_size(a->from[i]->bits), a->ref.name,
                          a->ref.node, size);
    }
    return r;
}

/* Behind closed gates, so that the sources are what they are at the instant of the change. */
static int control_fn merge_persist(struct change_action *action, struct error **err)
{
    struct dirty_bitmap_action *a = action_of(action);
    const struct bitmap *bits = a->bitmap->bits;
    struct bitmap *sum = bitmap_new(bitmap_size(bits), bitmap_granularity(bits));
    int r = sum ? bitmap_merge(sum, bits) : -ENOMEM;

    for (size_t i = 0; r == 0 && i < a->source_count; i++)
        r = bitmap_merge(sum, a->from[i]->bits);
    if (r < 0) {
        bitmap_free(sum);
        return no_memory(a, err);
    }
    a->spare = sum;
    swap_content(a); /* DIRTY-2 */
    return 0;
}

static int control_fn merge_undo(struct change_action *action, struct error **err)
{
    return action_of(action)->spare ? content_undo(action, err) : 0;
}

static const struct change_action_ops merge_ops = {
    .co_prepare = merge_prepare,
    .co_persist = merge_persist,
    .co_undo = merge_undo,
    .co_abort = action_release,
    .co_finish = action_release,
};

int dirty_bitmap_action_merge(struct change *c, struct dirty_bitmap_action *a,
                              struct dirty_bitmap_ref ref, const struct dirty_bitmap_ref *sources,
                              size_t source_count, struct error **err)
{
    int r;

    begin(c, a, &merge_ops, ref);
    a->sources = sources;
    a->source_count = source_count;
    r = reserve(c, ref.node, err);
    for (size_t i = 0; r == 0 && i < source_count; i++)
        r = reserve(c, sources[i].node, err);
    return r;
}

/* ---- successors (I6) ---- */

/* What it is when the job succeeds is known before that: who keeps the backup notes it while nothing has taken effect. */
static void new_successor_generation(struct dirty_bitmap *d)
{
    loop_random(d->successor_generation, sizeof(d->successor_generation));
}

static int control_fn freeze_prepare(struct change_action *action, struct error **err)
{
    struct dirty_bitmap_action *a = action_of(action);
    struct dirty_bitmap *d;
    int r = dirty_bitmap_need(action->change, graph_of(a), a->ref, &d, err);

    if (r < 0)
        return r;
    a->spare = bitmap_new(bitmap_size(d->bits), bitmap_granularity(d->bits));
    if (!a->spare)
        return no_memory(a, err);
    a->owner_copy = xstrdup(a->owner);
    a->bitmap = d;
    return a->leaves_as_it_was ? 0 : check_writable(a, err);
}

static void control_fn freeze_commit(struct change_action *action)
{
    struct dirty_bitmap_action *a = action_of(action);

    a->bitmap->successor = take(&a->spare);
    a->bitmap->owner = take(&a->owner_copy);
    new_successor_generation(a->bitmap);
    node_bitmaps_update(group_in_commit(a));
}

static const struct change_action_ops freeze_ops = {
    .co_prepare = freeze_prepare,
    .commit = freeze_commit,
    .co_abort = action_release,
    .co_finish = action_release,
};

int dirty_bitmap_action_freeze(struct change *c, struct dirty_bitmap_action *a,
                               struct dirty_bitmap_ref ref, const char *owner, struct error **err)
{
    begin(c, a, &freeze_ops, ref);
    a->owner = owner;
    return reserve(c, ref.node, err);
}

static int control_fn thaw_prepare(struct change_action *action, struct error **err)
{
    struct dirty_bitmap_action *a = action_of(action);
    int r = find_ref(action->change, graph_of(a), &a->ref, &a->bitmap, err);

    if (r == 0 && !a->bitmap->successor)
        r = error_set(err, EINVAL, "dirty bitmap '%s' of node '%s' is not frozen", a->ref.name,
                      a->ref.node);
    return r;
}

/* The job is done with it. What is left over is freed after the gates are open. */
static void thaw(struct dirty_bitmap_action *a, struct bitmap *content, struct bitmap *left_over)
{
    struct dirty_bitmap *d = a->bitmap;

    d->bits = content;
    d->successor = NULL;
    a->spare = left_over;
    free(take(&d->owner));
    node_bitmaps_update(group_in_commit(a));
}

static void control_fn reclaim_commit(struct change_action *action)
{
    struct dirty_bitmap_action *a = action_of(action);
    struct dirty_bitmap *d = a->bitmap;

    (void)bitmap_merge(d->successor, d->bits); /* without memory it has more, and that is right */
    thaw(a, d->successor, d->bits);
}

static void control_fn abdicate_commit(struct change_action *action)
{
    struct dirty_bitmap_action *a = action_of(action);
    struct dirty_bitmap *d = a->bitmap;

    thaw(a, d->successor, d->bits);
    d->high_water = bitmap_size(d->bits);
    memcpy(d->generation, d->successor_generation, sizeof(d->generation));
}

static const struct change_action_ops reclaim_ops = {
    .co_prepare = thaw_prepare,
    .commit = reclaim_commit,
    .co_abort = action_release,
    .co_finish = action_release,
};

static const struct change_action_ops abdicate_ops = {
    .co_prepare = thaw_prepare,
    .commit = abdicate_commit,
    .co_abort = action_release,
    .co_finish = action_release,
};

int dirty_bitmap_action_reclaim(struct change *c, struct dirty_bitmap_action *a,
                                struct dirty_bitmap_ref ref, struct error **err)
{
    begin(c, a, &reclaim_ops, ref);
    return reserve(c, ref.node, err);
}

int dirty_bitmap_action_abdicate(struct change *c, struct dirty_bitmap_action *a,
                                 struct dirty_bitmap_ref ref, struct error **err)
{
    begin(c, a, &abdicate_ops, ref);
    return reserve(c, ref.node, err);
}
