/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What is served: the image with its chain; above it, where asked for, an overlay that takes the writes, and a window that leaves
 * out the beginning.
 *
 *   window -> overlay -> image -> ...
 */
#include "base/macros.h"
#include "cli/nbd/nbd.h"
#include "graph/node.h"

#include <errno.h>
#include <inttypes.h>
#include <string.h>

#define OVERLAY_NODE "overlay"
#define WINDOW_NODE  "window"

/* Of the nodes above the image. */
static const char *discard_mode(const struct nbd_tool *t)
{
    return t->discard ? t->discard : "ignore";
}

static int co_fn control_fn add_overlay(struct nbd_disk *disk, const struct nbd_tool *t,
                                        struct error **err)
{
    int r =
        image_co_add_overlay(disk->image.graph, OVERLAY_NODE, disk->top, image_size(&disk->image),
                             discard_mode(t), t->detect_zeroes ? t->detect_zeroes : "off", err);

    if (r < 0)
        return error_wrap(err, r, "--snapshot");
    disk->overlay = true;
    disk->top = OVERLAY_NODE;
    return 0;
}

static int co_fn control_fn add_window(struct nbd_disk *disk, const struct nbd_tool *t,
                                       struct error **err)
{
    uint64_t size = node_size(graph_find(disk->image.graph, disk->top));
    int r;

    if (t->offset >= size)
        return error_set(err, EINVAL,
                         "--offset %" PRIu64 ": it has to be less than the size of the disk, "
                         "%" PRIu64,
                         t->offset, size);
    r = image_co_add_node(disk->image.graph,
                          json_pack("{s:s, s:s, s:s, s:I, s:s, s:b}", "driver", "raw", "node-name",
                                    WINDOW_NODE, "file", disk->top, "offset", (json_int_t)t->offset,
                                    "discard", discard_mode(t), "read-only", t->read_only),
                          err);
    if (r == 0) {
        disk->window = true;
        disk->top = WINDOW_NODE;
    }
    return r;
}

int nbd_disk_co_open(struct nbd_disk *disk, struct graph *g, const struct nbd_tool *t,
                     struct error **err)
{
    struct image_spec spec = t->spec;
    int r;

    *disk = (struct nbd_disk){.top = NULL};
    spec.flags |= IMAGE_NODES | t->cache.flags;
    spec.detect_zeroes = t->detect_zeroes;
    if (!t->read_only && !t->overlay)
        spec.flags |= IMAGE_WRITE;
    if (strcmp(discard_mode(t), "ignore") == 0)
        spec.flags |= IMAGE_NO_DISCARD;
    r = image_co_open(&disk->image, g, "i", &spec, err);
    if (r < 0)
        return r;
    if (spec.flags & IMAGE_WRITE)
        image_warn_probed(&disk->image);
    disk->top = disk->image.layers[0].node;
    if (t->overlay)
        r = add_overlay(disk, t, err);
    if (r == 0 && t->offset)
        r = add_window(disk, t, err);
    if (r < 0)
        nbd_disk_co_close(disk);
    return r;
}

static void co_fn control_fn close_node(struct nbd_disk *disk, bool *there, const char *name)
{
    AUTO(error_free) struct error *ignored = NULL; /* it is closed with the graph */

    if (*there)
        (void)graph_co_del(disk->image.graph, name, &ignored);
    *there = false;
}

void nbd_disk_co_close(struct nbd_disk *disk)
{
    close_node(disk, &disk->window, WINDOW_NODE);
    close_node(disk, &disk->overlay, OVERLAY_NODE);
    image_co_close(&disk->image);
}
