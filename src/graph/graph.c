/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The graph: names, adding nodes with their inline children, removing them.
 *
 * GRAPH-1 A node is in the namespace from before it is opened until after it is closed, reserved by the change that does it:
 *         nobody else finds it half-made.
 * GRAPH-2 A node is counted by its parents' edges and by the monitor; with the last reference it is closed (close.c).
 */
#include "graph/graph.h"
#include "base/alloc.h"
#include "base/json-in.h"
#include "base/macros.h"
#include "crypto/secret.h"
#include "graph/change.h"
#include "graph/grants.h"
#include "graph/graph-internal.h"
#include "graph/node-ref.h"
#include "graph/reshape.h"
#include "loop/file.h"
#include "schema-types.h"

#include <assert.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct graph *graph_new(const struct driver *const *const *drivers)
{
    struct graph *g = xnew(struct graph);

    g->drivers = drivers;
    list_init(&g->nodes);
    list_init(&g->backends);
    list_init(&g->changes);
    list_init(&g->orphans);
    list_init(&g->grants);
    g->secrets = secrets_new();
    co_scope_init(&g->closers);
    g->change_deadline_ns = CHANGE_DEADLINE_DEFAULT_NS;
    return g;
}

/* FNV-1a. */
static unsigned name_bucket(const char *name)
{
    uint32_t h = 2166136261u;

    for (; *name; name++)
        h = (h ^ (uint8_t)*name) * 16777619u;
    return h % GRAPH_NAME_BUCKETS;
}

void graph_name_insert(struct graph *g, struct node *node)
{
    struct node **bucket = &g->names[name_bucket(node->name)];

    node->name_next = *bucket;
    *bucket = node;
}

struct secrets *graph_secrets(struct graph *g)
{
    return g->secrets;
}

void graph_name_remove(struct graph *g, struct node *node)
{
    struct node **at = &g->names[name_bucket(node->name)];

    while (*at != node)
        at = &(*at)->name_next;
    *at = node->name_next;
}

struct node *graph_find(struct graph *g, const char *name)
{
    struct node *node = g->names[name_bucket(name)];

    while (node && strcmp(node->name, name) != 0)
        node = node->name_next;
    return node;
}

int graph_need(struct graph *g, const char *name, struct node **ret, struct error **err)
{
    *ret = graph_find(g, name);
    if (!*ret)
        return error_set(err, ENOENT, "there is no node '%s'", name);
    return 0;
}

void graph_for_each_node(struct graph *g, graph_node_fn *fn, void *arg)
{
    for (struct list *l = g->nodes.prev; l != &g->nodes; l = l->prev)
        fn(list_entry(l, struct node, link), arg);
}

static const struct driver *find_driver(const struct graph *g, const char *name)
{
    for (size_t i = 0; g->drivers[i]; i++) {
        for (size_t k = 0; g->drivers[i][k]; k++) {
            if (strcmp(g->drivers[i][k]->name, name) == 0)
                return g->drivers[i][k];
        }
    }
    return NULL;
}

/* What is in force: the node's own words, else its parent's, else the default. */
static struct node_settings settle(const struct node_options *o, const struct node_settings *parent)
{
    struct node_settings s = parent ? *parent : (struct node_settings){0};

    if (o->has_read_only)
        s.read_only = o->read_only;
    if (o->has_auto_read_only)
        s.auto_read_only = o->auto_read_only;
    if (o->has_force_share)
        s.force_share = o->force_share;
    if (o->cache && o->cache->has_direct)
        s.direct = o->cache->direct;
    if (o->cache && o->cache->has_no_flush)
        s.no_flush = o->cache->no_flush;
    if (o->has_discard)
        s.unmap = o->discard == DISCARD_MODE_UNMAP;
    s.detect_zeroes = o->detect_zeroes != DETECT_ZEROES_MODE_OFF;
    s.unmap_detected = o->detect_zeroes == DETECT_ZEROES_MODE_UNMAP;
    return s;
}

/* What contradicts itself, once it is settled. */
static int check_settings(const struct node *node, struct error **err)
{
    const struct node_settings *s = &node->settings;

    if (s->force_share && !s->read_only)
        return error_set(err, EINVAL, "node '%s': force-share needs read-only", node->name);
    if (s->unmap_detected && !s->unmap)
        return error_set(err, EINVAL,
                         "node '%s': detect-zeroes 'unmap' needs discard 'unmap', or nothing is "
                         "given back",
                         node->name);
    return 0;
}

static void auto_name(struct graph *g, char *name)
{
    do {
        (void)snprintf(name, NODE_NAME_MAX + 1, "#block%03u", g->next_auto_name++);
    } while (graph_find(g, name));
}

static int node_new(struct graph *g, const struct driver *driver, const char *name,
                    struct node_settings settings, struct change *change, struct node **ret,
                    struct error **err)
{
    struct node *node;

    if (name && graph_find(g, name))
        return error_set(err, EEXIST, "there is a node '%s' already", name);
    node = try_new(struct node);
    if (node)
        node->state = try_alloc(1, driver->state_size);
    if (!node || !node->state) {
        free(node);
        return error_set(err, ENOMEM, "no memory for a node");
    }
    if (name)
        (void)snprintf(node->name, sizeof(node->name), "%s", name);
    else
        auto_name(g, node->name);
    node->graph = g;
    node->driver = driver;
    node->settings = settings;
    node->align = 1;
    node->memory_align = 1;
    node->access = ACCESS_NONE;
    node->told = ACCESS_NONE;
    node->refs = 1;
    node->reserved_by = change; /* GRAPH-1 */
    overlap_init(&node->overlap);
    epoch_init(&node->epoch);
    list_init(&node->children);
    list_init(&node->parents);
    list_init(&node->arriving);
    list_init(&node->owned);
    list_append(&g->nodes, &node->link);
    graph_name_insert(g, node);
    *ret = node;
    return 0;
}

/* Before its children are opened: an inline one inherits what is settled here. */
static int settle_writing(struct node *node, struct error **err)
{
    if (!node->driver->only_reads || node->settings.read_only)
        return 0;
    if (!node->settings.auto_read_only)
        return error_set(err, EROFS,
                         "node '%s': images of format '%s' are never written: set read-only",
                         node->name, node->driver->name);
    node->settings.read_only = true;
    return 0;
}

static int co_fn control_fn node_co_open(struct graph *g, const struct node_options *o,
                                         const struct node_settings *parent, struct change *change,
                                         struct node **ret, struct error **err);

/* A backing node is opened for reading, whatever its user is opened for. */
static struct node_settings settings_below(const struct node *node, const char *child)
{
    struct node_settings s = node->settings;

    if (strcmp(child, "backing") == 0) {
        s.read_only = true;
        s.auto_read_only = false;
    }
    return s;
}

/* What a member of a driver's options says of a child: its name or its definition. Both are NULL if there shall be none. */
struct child_choice {
    const char *name;
    const struct node_options *definition;
};

static struct child_choice child_choice(const struct schema_member *m, const void *options)
{
    struct child_choice choice = {.name = NULL};

    if (m->type == &node_ref_type) {
        const struct node_ref *ref = schema_member_value(m, options);

        if (ref && ref->kind == NODE_REF_NAME)
            choice.name = ref->name;
        else if (ref)
            choice.definition = ref->definition;
    } else if (m->type == &node_ref_or_null_type) {
        const struct node_ref_or_null *ref = schema_member_value(m, options);

        if (ref && !node_ref_is_null(ref) && ref->kind == NODE_REF_OR_NULL_NAME)
            choice.name = ref->name;
        else if (ref && !node_ref_is_null(ref))
            choice.definition = ref->definition;
    }
    return choice;
}

/* Finds or opens the child that a member of the driver's options names. */
static int co_fn control_fn open_child(struct node *node, const struct schema_member *m,
                                       const struct child_choice *choice, struct error **err)
{
    const struct node_settings settings = settings_below(node, m->name);
    struct change *change = node->reserved_by;
    struct node *child = NULL;
    int r;

    if (choice->name) {
        r = graph_need(node->graph, choice->name, &child, err);
        if (child)
            child->refs++;
    } else {
        r = node_co_open(node->graph, choice->definition, &settings, change, &child, err);
    }
    if (!child)
        return error_wrap(err, r, "node '%s': child '%s'", node->name, m->name);
    (void)edge_new(node, NULL, child, m->name);
    return 0;
}

static int co_fn control_fn open_children(struct node *node, const void *options,
                                          struct error **err)
{
    const struct schema_type *type = node->driver->options;

    for (size_t i = 0; i < type->count; i++) {
        const struct schema_member *m = &type->members[i];
        const struct child_choice choice = child_choice(m, options);
        int r = choice.name || choice.definition ? open_child(node, m, &choice, err) : 0;

        if (r < 0)
            return r;
    }
    return 0;
}

/* From here on the children hold what an unused node of this kind holds of them. */
static int co_fn control_fn settle_access(struct node *node, struct error **err)
{
    struct edge *e;

    list_for_each (&node->children, e, parent_link) {
        int r = access_change(e, access_below(e), err);

        if (r < 0)
            return r;
    }
    return 0;
}

/* Nor does anybody follow what changes in it: it grows under load. */
static int check_untracked(const struct node *node, struct error **err)
{
    for (const struct node *n = node->file->node; n; n = n->file ? n->file->node : NULL) {
        if (n->trackers)
            return error_set(err, EBUSY, "node '%s': its file '%s' has dirty bitmaps: remove them",
                             node->name, n->name);
    }
    return 0;
}

/* A format with metadata of its own has the file for itself before it looks at it. */
static int co_fn control_fn open_driver(struct node *node, const void *options, struct error **err)
{
    const struct driver *driver = node->driver;
    int r = 0;

    if (driver->keeps_metadata) {
        node->settings.read_only |=
            node->settings.auto_read_only && node->file->node->settings.read_only;
        r = check_untracked(node, err);
        if (r == 0)
            r = settle_access(node, err);
    }
    if (r == 0) {
        r = driver->co_open(node, options, err);
        node->opened = r == 0;
    }
    /* What it has found in the image may guard it. */
    return r < 0 || (driver->keeps_metadata && !node->guards) ? r : settle_access(node, err);
}

/* Without what a reference in its image opens. */
static int co_fn control_fn node_co_open_one(struct graph *g, const struct node_options *o,
                                             const struct node_settings *parent,
                                             struct change *change, struct node **ret,
                                             struct error **err)
{
    const struct schema_variant *variant = &node_options_type.variants[o->driver];
    const void *options = (const char *)o + variant->offset;
    const char *driver_name = node_driver_name(o->driver);
    const struct driver *driver = find_driver(g, driver_name);
    struct node *node = NULL;
    int r;

    if (!driver)
        return error_set(err, ENOTSUP, "driver '%s' is not part of this program", driver_name);
    r = node_new(g, driver, o->node_name, settle(o, parent), change, &node, err);
    if (!node)
        return r;
    r = check_settings(node, err);
    if (r == 0)
        r = settle_writing(node, err);
    if (r == 0)
        r = open_children(node, options, err);
    if (r == 0 && node_depth_below(node) > GRAPH_DEPTH_MAX)
        r = error_set(err, EINVAL, "node '%s' would be on top of more than %d others", node->name,
                      GRAPH_DEPTH_MAX - 1);
    if (r == 0)
        r = open_driver(node, options, err);
    if (r < 0) {
        node_co_unref(node);
        return r;
    }
    *ret = node;
    return 0;
}

void node_want_backing(struct node *node, const char *file, const char *format)
{
    node->wanted_file = xstrdup(file);
    node->wanted_format = xstrdup(format);
}

/* The file that an image names, opened as a format that it names too. */
static int co_fn control_fn open_reference(struct node *node, const char *path, struct node **ret,
                                           struct error **err)
{
    const struct node_settings settings = settings_below(node, "backing");
    struct node_options options = {.node_name = NULL};
    json_t *tree = json_pack("{s:s, s:{s:s, s:s}}", "driver", node->wanted_format, "file", "driver",
                             "file", "filename", path);
    int r;

    if (!tree) /* a path that is no UTF-8 */
        return error_set(err, EINVAL, "node '%s': backing file '%s': no name for a file",
                         node->name, node->wanted_file);
    r = json_in(&node_options_type, tree, JSON_IN_STRICT, "", &options, err);
    if (r == 0)
        r = node_co_open_one(node->graph, &options, &settings, node->reserved_by, ret, err);
    schema_free(&node_options_type, &options);
    json_decref(tree);
    return r < 0 ? error_wrap(err, r, "node '%s': backing file '%s'", node->name, node->wanted_file)
                 : 0;
}

/* The definition of a node over a regular file; NULL if the path is no UTF-8. */
static json_t *file_definition(const char *path)
{
    return json_pack("{s:s, s:s}", "driver", "file", "filename", path);
}

/* A child over a file that a reference in the image has led to. */
static int co_fn control_fn attach_file(struct node *node, const char *child, const char *path,
                                        struct error **err)
{
    const struct node_settings settings = settings_below(node, child);
    struct node_options options = {.node_name = NULL};
    json_t *tree = file_definition(path);
    struct node *file = NULL;
    struct edge *e;
    int r;

    if (!tree)
        return error_set(err, EINVAL, "'%s' is no name for a file", path);
    r = json_in(&node_options_type, tree, JSON_IN_STRICT, "", &options, err);
    if (r == 0)
        r = node_co_open_one(node->graph, &options, &settings, node->reserved_by, &file, err);
    schema_free(&node_options_type, &options);
    json_decref(tree);
    if (!file)
        return r;
    e = edge_new(node, NULL, file, child);
    return access_change(e, access_below(e), err);
}

int node_co_attach_file(struct node *node, const char *child, const char *reference,
                        struct error **err)
{
    const char *name = node_filename(node->file->node);
    AUTO(free_ptr) char *image = NULL;
    AUTO(free_ptr) char *path = NULL;
    int r = name ? file_co_resolve(name, &image) : -EINVAL;

    if (r < 0)
        return error_set(err, -r,
                         "node '%s': its image names %s '%s', but has no file name itself that "
                         "this could be relative to: give `%s`",
                         node->name, child, reference, child);
    r = grants_co_check(node->graph, image, reference, &path, err);
    if (r == 0 && strcmp(image, path) == 0)
        r = error_set(err, EINVAL, "it is the image itself");
    if (r == 0)
        r = attach_file(node, child, path, err);
    return r < 0 ? error_wrap(err, r, "node '%s': %s '%s'", node->name, child, reference) : 0;
}

/* Refuses a file that is a layer of the chain already. Those below the top were opened by their canonical names. */
static int check_no_loop(const struct node *top, const char *top_path, const struct node *end,
                         const char *path, struct error **err)
{
    bool same = strcmp(top_path, path) == 0;

    for (const struct node *n = top; n != end && !same; n = n->backing->node)
        same = strcmp(node_filename(n->backing->node->file->node), path) == 0;
    if (same)
        return error_set(err, ELOOP, "node '%s': backing file '%s' is a layer above it already",
                         end->name, path);
    return 0;
}

static int co_fn control_fn open_wanted(struct node *top, const char *top_path, struct node *node,
                                        struct error **err)
{
    const char *image = node == top ? top_path : node_filename(node->file->node);
    struct node *child = NULL;
    char *path = NULL;
    int r = grants_co_check(node->graph, image, node->wanted_file, &path, err);

    if (r == 0)
        r = check_no_loop(top, top_path, node, path, err);
    if (r == 0)
        r = open_reference(node, path, &child, err);
    free(path);
    if (!child)
        return r;
    (void)edge_new(node, NULL, child, "backing");
    return access_change(node->backing, access_below(node->backing), err);
}

/* Follows the references in images, layer by layer: chains may be long (Q3). */
static int co_fn control_fn open_wanted_chain(struct node *top, struct error **err)
{
    const char *name = node_filename(top->file->node);
    char *top_path = NULL;
    int r = name ? file_co_resolve(name, &top_path) : -EINVAL;

    if (r < 0)
        return error_set(err, -r,
                         "node '%s': its image names backing file '%s', but has no file name "
                         "itself that this could be relative to: give `backing`",
                         top->name, top->wanted_file);
    for (struct node *node = top; r == 0 && node->wanted_file; node = node->backing->node) {
        r = open_wanted(top, top_path, node, err);
        if (r < 0)
            break;
    }
    free(top_path);
    return r;
}

static int co_fn control_fn node_co_open(struct graph *g, const struct node_options *o,
                                         const struct node_settings *parent, struct change *change,
                                         struct node **ret, struct error **err)
{
    struct node *node = NULL;
    int r = node_co_open_one(g, o, parent, change, &node, err);

    if (!node)
        return r;
    r = node->wanted_file ? open_wanted_chain(node, err) : 0;
    if (r < 0) {
        node_co_unref(node);
        return r;
    }
    *ret = node;
    return 0;
}

int graph_co_add_filter(struct change *c, const struct driver *driver, const void *options,
                        const char *name, struct node *child, struct node **ret, struct error **err)
{
    struct node_settings settings = {.unmap = true, .read_only = child->settings.read_only};
    struct node *node = NULL;
    int r = node_new(c->graph, driver, name, settings, c, &node, err);

    if (!node)
        return r;
    child->refs++;
    (void)edge_new(node, NULL, child, "file");
    r = driver->co_open(node, options, err);
    if (r < 0) {
        node_co_unref(node);
        return r;
    }
    node->opened = true;
    *ret = node;
    return 0;
}

void graph_co_drop(struct node *node)
{
    node_co_unref(node);
}

/* The existing nodes that a definition refers to, at any depth. */
static int add_roots(struct change *change, const struct node_options *o, struct error **err)
{
    const struct schema_variant *variant = &node_options_type.variants[o->driver];
    const void *options = (const char *)o + variant->offset;
    const struct schema_type *type = variant->type;

    for (size_t i = 0; type && i < type->count; i++) {
        const struct child_choice choice = child_choice(&type->members[i], options);
        int r = 0;

        if (choice.name)
            r = change_add_root(change, choice.name, err);
        else if (choice.definition)
            r = add_roots(change, choice.definition, err);
        if (r < 0)
            return r;
    }
    return 0;
}

int graph_co_add(struct graph *g, const struct node_options *options, struct error **err)
{
    struct change change;
    struct node *node = NULL;
    int r;

    if (!options->node_name)
        return error_set(err, EINVAL, "a node needs a node-name");
    change_init(&change, g, "blockdev-add '%s'", options->node_name);
    r = add_roots(&change, options, err);
    if (r == 0)
        r = change_co_reserve(&change, err);
    if (r == 0)
        r = node_co_open(g, options, NULL, &change, &node, err);
    if (node)
        node->monitor_owned = true;
    change_end(&change);
    return r;
}

/* May the monitor take the node away? */
static int check_removable(const struct node *node, struct error **err)
{
    const struct edge *user = list_first(&node->parents, struct edge, child_link);

    if (user)
        return error_set(err, EBUSY, "node '%s' is in use by %s", node->name,
                         edge_parent_text(user));
    if (!node->monitor_owned)
        return error_set(err, EPERM, "node '%s' was not made by blockdev-add", node->name);
    return 0;
}

int graph_co_del(struct graph *g, const char *name, struct error **err)
{
    struct change change;
    struct node *node = NULL;
    int r;

    change_init(&change, g, "blockdev-del '%s'", name);
    r = change_add_root(&change, name, err);
    if (r == 0)
        r = change_co_reserve(&change, err);
    if (r == 0)
        r = graph_need(g, name, &node, err);
    if (node)
        r = check_removable(node, err);
    if (node && r == 0) {
        node->monitor_owned = false;
        node_co_unref(node);
    }
    change_end(&change);
    return r;
}

/* The nodes of the monitor's that nobody uses, until there are none. */
static void co_fn control_fn remove_all(struct graph *g)
{
    struct node *node;
    bool progress = true;

    while (progress) {
        progress = false;
        list_for_each (&g->nodes, node, link) {
            if (node->monitor_owned && list_empty(&node->parents)) {
                AUTO(error_free) struct error *ignored = NULL;
                char name[NODE_NAME_MAX + 1];

                /* Closers may still be busy with it. One that does not come free is left to the orphans. */
                (void)snprintf(name, sizeof(name), "%s", node->name);
                progress = graph_co_del(g, name, &ignored) == 0;
                break;
            }
        }
    }
}

struct graph *graph_co_free(struct graph *g)
{
    assert(list_empty(&g->backends));
    remove_all(g);
    if (graph_abandon_orphans(g) || !list_empty(&g->nodes))
        return NULL; /* the host may still write into what it is made of */
    assert(list_empty(&g->changes));
    grants_release(g);
    g->secrets = secrets_free(g->secrets);
    free(g);
    return NULL;
}
