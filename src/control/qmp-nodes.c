/* SPDX-License-Identifier: Apache-2.0 */
/* Commands that make, remove, resize and list nodes. */
#include "base/alloc.h"
#include "base/macros.h"
#include "control/control.h"
#include "control/describe-bitmaps.h"
#include "graph/driver.h"
#include "schema-dispatch.h"

#include <errno.h>

int qmp_blockdev_add(struct qmp_session *session, const struct node_options *args,
                     struct error **err)
{
    return graph_co_add(control_of(session)->graph, args, err);
}

int qmp_blockdev_del(struct qmp_session *session, const struct blockdev_del_args *args,
                     struct error **err)
{
    return graph_co_del(control_of(session)->graph, args->node_name, err);
}

int qmp_block_resize(struct qmp_session *session, const struct block_resize_args *args,
                     struct error **err)
{
    const char *name = args->node_name ? args->node_name : args->device;

    if (!args->node_name == !args->device)
        return error_set(err, EINVAL, "give one of 'device' and 'node-name': both name a node");
    return graph_co_resize(control_of(session)->graph, name, args->size, err);
}

/* The node that answers for this one when its own driver cannot: its file, and so on. NULL at the bottom. */
static const struct node *node_below(const struct node *node)
{
    const struct edge *file = node_file(node);

    return file ? edge_node(file) : NULL;
}

static char *file_text(const struct node *node)
{
    for (const struct node *n = node; n; n = node_below(n)) {
        const char *name = node_filename(n);

        if (name)
            return xstrdup(name);
    }
    return xasprintf("%s://", node_driver(node)->name);
}

static bool allocated(const struct node *node, uint64_t *ret_bytes)
{
    for (const struct node *n = node; n; n = node_below(n)) {
        if (node_allocated_bytes(n, ret_bytes))
            return true;
    }
    return false;
}

static void describe_backing(const struct node *node, struct block_device_info *ret)
{
    const struct edge *backing = node_backing(node);

    ret->backing_file = backing ? file_text(edge_node(backing)) : NULL;
    for (; backing; backing = node_backing(edge_node(backing)))
        ret->backing_file_depth++;
}

static enum detect_zeroes_mode detect_zeroes_mode(const struct node_settings *settings)
{
    if (!settings->detect_zeroes)
        return DETECT_ZEROES_MODE_OFF;
    return settings->unmap_detected ? DETECT_ZEROES_MODE_UNMAP : DETECT_ZEROES_MODE_ON;
}

static void describe(const struct node *node, struct block_device_info *ret)
{
    const struct node_settings *settings = node_settings(node);
    const struct driver *driver = node_driver(node);

    ret->file = file_text(node);
    ret->node_name = xstrdup(node_name(node));
    ret->ro = settings->read_only;
    ret->drv = xstrdup(driver->name);
    ret->encrypted = driver->encrypted && driver->encrypted(node);
    describe_backing(node, ret);
    ret->detect_zeroes = detect_zeroes_mode(settings);
    ret->image.filename = xstrdup(ret->file);
    ret->image.format = xstrdup(ret->drv);
    ret->image.virtual_size = node_size(node);
    ret->image.has_dirty_flag = true; /* and false: no driver keeps one */
    ret->image.has_actual_size = allocated(node, &ret->image.actual_size);
    ret->image.cluster_size = driver->cluster_bytes ? driver->cluster_bytes(node) : 0;
    ret->image.has_cluster_size = ret->image.cluster_size;
    ret->cache.writeback = true;
    ret->cache.direct = settings->direct;
    ret->cache.no_flush = settings->no_flush;
    ret->has_dirty_bitmaps = describe_bitmaps(node, &ret->dirty_bitmaps);
}

static void count_node(struct node *node, void *arg)
{
    (void)node;
    ++*(size_t *)arg;
}

static void add_description(struct node *node, void *arg)
{
    struct block_device_info_array *list = arg;

    describe(node, &list->items[list->count++]);
}

int qmp_query_named_block_nodes(struct qmp_session *session,
                                const struct query_named_block_nodes_args *args,
                                struct block_device_info_array *ret, struct error **err)
{
    struct graph *graph = control_of(session)->graph;
    size_t count = 0;

    (void)args; /* flat: backing images are listed as nodes only */
    graph_for_each_node(graph, count_node, &count);
    ret->items = try_new_n(struct block_device_info, MAX(count, (size_t)1));
    if (!ret->items)
        return error_set(err, ENOMEM, "no memory for a list of %zu nodes", count);
    graph_for_each_node(graph, add_description, ret);
    return 0;
}

int qmp_query_block(struct qmp_session *session, struct block_info_array *ret, struct error **err)
{
    (void)session;
    (void)ret; /* there are no devices: the list stays empty */
    (void)err;
    return 0;
}
