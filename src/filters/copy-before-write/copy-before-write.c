/* SPDX-License-Identifier: Apache-2.0 */
/* copy-before-write: saves what is about to be overwritten for a point in time (C5), then hands the change on. */
#include "filters/copy-before-write/copy-before-write.h"
#include "copy/point.h"

struct copy_before_write {
    struct point *point; /* constant */
};

static int co_fn control_fn cbw_co_open(struct node *node, const void *options, struct error **err)
{
    const struct copy_before_write_options *o = options;
    struct copy_before_write *s = node_state(node);
    const struct node *child = edge_node(node_file(node));

    (void)err;
    s->point = o->point;
    node_set_size(node, node_size(child));
    node_set_preferred_alignment(node, node_preferred_alignment(child));
    return 0;
}

static void co_fn control_fn cbw_co_close(struct node *node)
{
    (void)node;
}

/* The guest's change goes out whatever became of the point (P3). */
static int co_fn cbw_co_change(struct node *node, struct request *req)
{
    const struct copy_before_write *s = node_state(node);
    int r = point_co_save(s->point, node_file(node), req);

    return r < 0 ? r : edge_co_request(node_file(node), req);
}

/* As a read: what the disk holds now. */
static int co_fn cbw_co_copy_out(struct node *node, struct request *req)
{
    return edge_co_request(node_file(node), req);
}

const struct driver copy_before_write_driver = {
    .name = "copy-before-write",
    .kind = DRIVER_FILTER,
    .state_size = sizeof(struct copy_before_write),
    .reads_to_write = true,
    .guards_writes = true,
    .co_open = cbw_co_open,
    .co_close = cbw_co_close,
    .co_write = cbw_co_change,
    .co_write_zeroes = cbw_co_change,
    .co_discard = cbw_co_change,
    .co_copy_out = cbw_co_copy_out,
};
