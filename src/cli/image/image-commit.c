/* SPDX-License-Identifier: Apache-2.0 */
/* Copying into the base, flushing it, emptying the top. */
#include "cli/image/image-commit.h"
#include "base/alloc.h"
#include "base/macros.h"
#include "cli/image/image-copy.h"
#include "formats/qcow2/qcow2-snapshot.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define WORKERS 8

/* Less is not worth a thread. */
#define SMALL ((uint64_t)8 << 20)

static int co_fn control_fn open_layers(struct image_commit *x, struct error **err)
{
    struct access reads = {.wants = ACCESS_READ, .tolerates = ACCESS_READ | ACCESS_WRITE_UNCHANGED};
    struct access writes = {.wants = ACCESS_READ | ACCESS_WRITE | ACCESS_RESIZE,
                            .tolerates = ACCESS_READ | ACCESS_WRITE_UNCHANGED | ACCESS_RESIZE};
    struct image *image = &x->image;
    int r = 0;

    x->layers = xnew_n(struct extent_walk, image->base);
    for (size_t i = 0; r == 0 && i < image->base; i++)
        r = image_co_backend(&x->layers[i].backend, image->graph, image->layers[i].node,
                             i == 0 ? writes : reads, err);
    if (r == 0)
        r = image_co_backend(&x->base, image->graph, image->layers[image->base].node, writes, err);
    return r;
}

static void co_fn control_fn close_layers(struct image_commit *x)
{
    for (size_t i = 0; x->layers && i < x->image.base; i++)
        (void)backend_co_free(x->layers[i].backend);
    (void)backend_co_free(x->base);
    free(x->layers);
}

static int co_fn control_fn grow_base(struct image_commit *x, uint64_t size, struct error **err)
{
    const struct image_layer *base = &x->image.layers[x->image.base];
    int r = 0;

    if (backend_size(x->base) < size)
        r = graph_co_resize(x->image.graph, base->node, size, err);
    return r < 0 ? error_wrap(err, r, "cannot make '%s' as large as the image", base->filename) : 0;
}

static int co_fn control_fn copy(struct image_commit *x, uint64_t size, struct error **err)
{
    const struct image_layer *base = &x->image.layers[x->image.base];
    struct image_copy_source from = {.backend = x->layers[0].backend, .size = size};
    struct tool_progress progress;
    struct image_copy copy = {
        .sources = &from,
        .source_count = 1,
        .layers = x->layers,
        .layer_count = (unsigned)x->image.base,
        .target = x->base,
        .target_name = base->filename,
        .size = size,
        .sparse = 4096,
        .unit = base->header.version ? qcow2_header_cluster_size(&base->header) : 512,
        .writethrough = x->writethrough,
        .workers = WORKERS,
        .rate = x->rate,
        .progress = &progress,
        .beside = size > SMALL ? tool_co_second_loop() : NULL,
    };
    int r;

    tool_progress_begin(&progress, x->progress, size);
    r = image_co_copy(&copy, err);
    if (r == 0) {
        r = image_co_flush(x->base);
        if (r < 0)
            r = error_set(err, -r, "cannot flush '%s': %s", base->filename, strerror(-r));
    }
    tool_progress_end(&progress, r == 0);
    return r;
}

static int co_fn control_fn commit(struct image_commit *x, struct error **err)
{
    uint64_t size;
    int r = open_layers(x, err);

    if (r < 0)
        return r;
    size = backend_size(x->layers[0].backend);
    r = grow_base(x, size, err);
    if (r == 0)
        r = copy(x, size, err);
    if (r < 0)
        return error_wrap(err, r, "Could not commit '%s', which is what it was", x->spec.name);
    if (x->keep)
        return 0;
    r = qcow2_co_empty(x->layers[0].backend, err);
    return r < 0
               ? error_wrap(err, r, "All is committed, but '%s' could not be emptied", x->spec.name)
               : 0;
}

int image_co_commit(struct graph *g, struct image_commit *x, struct error **err)
{
    int r = image_co_open(&x->image, g, "i", &x->spec, err);

    if (r == 0)
        r = commit(x, err);
    close_layers(x);
    image_co_close(&x->image);
    return r;
}
