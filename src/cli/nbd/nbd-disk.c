/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What is served: the image with its chain; above it, where asked for, an overlay that takes the writes, and a window that leaves
 * out the beginning.
 *
 *   window -> overlay -> image -> ...
 */
#include "base/alloc.h"
#include "base/macros.h"
#include "cli/nbd/nbd.h"
#include "formats/qcow2/qcow2-create.h"
#include "graph/node.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define OVERLAY_NODE "overlay"
#define WINDOW_NODE  "window"

/* Of the nodes above the image. */
static const char *discard_mode(const struct nbd_tool *t)
{
    return t->discard ? t->discard : "ignore";
}

/*
 * The file loses its name as soon as it is open: it goes with the process, however that ends. Flushing what nobody can open again
 * would be of no use.
 */
static int co_fn control_fn open_overlay(struct nbd_disk *disk, const struct nbd_tool *t,
                                         const char *path, struct error **err)
{
    struct qcow2_create_options options = QCOW2_CREATE_OPTIONS_INIT;
    int r;

    options.size = image_size(&disk->image);
    r = qcow2_co_create(path, &options, err);
    if (r < 0)
        return r;
    r = image_co_add_node(disk->image.graph,
                          json_pack("{s:s, s:s, s:s, s:s, s:{s:s, s:s, s:{s:b}}}", "driver",
                                    "qcow2", "node-name", OVERLAY_NODE, "backing", disk->top,
                                    "discard", discard_mode(t), "file", "driver", "file",
                                    "filename", path, "cache", "no-flush", 1),
                          err);
    (void)unlink(path); /* at worst a file stays in the directory for temporary ones */
    return r;
}

static int co_fn control_fn add_overlay(struct nbd_disk *disk, const struct nbd_tool *t,
                                        struct error **err)
{
    const char *where = getenv("TMPDIR");
    AUTO(free_ptr)
    char *dir = xasprintf("%s/cairn-nbd-XXXXXX", where && *where ? where : "/var/tmp");
    AUTO(free_ptr) char *path = NULL;
    int r;

    if (!mkdtemp(dir))
        return error_set(err, errno, "cannot make the directory '%s': %s", dir, strerror(errno));
    path = xasprintf("%s/overlay.qcow2", dir);
    r = open_overlay(disk, t, path, err);
    (void)rmdir(dir); /* as above */
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
