/* SPDX-License-Identifier: Apache-2.0 */
/* Each change is one of the graph, as the daemon's commands are. */
#include "cli/image/image-bitmaps.h"
#include "base/alloc.h"
#include "base/checked.h"
#include "base/macros.h"
#include "bitmaps/dirty-bitmap.h"
#include "cli/image/info-tables.h"
#include "cli/image/tool.h"
#include "graph/driver.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

static struct dirty_bitmap_ref ref_of(const struct image *image, const char *name)
{
    return (struct dirty_bitmap_ref){.node = image->layers[0].node, .name = name};
}

static int add_action(struct change *c, struct dirty_bitmap_action *a, struct image *image,
                      const struct image_bitmap_change *change,
                      const struct dirty_bitmap_ref *source, struct error **err)
{
    struct dirty_bitmap_ref ref = ref_of(image, change->name);
    int r;

    switch (change->action) {
    case IMAGE_BITMAP_ADD:
        r = dirty_bitmap_action_add(c, a, ref, change->granularity, true, err);
        a->persistent = true;
        return r;
    case IMAGE_BITMAP_REMOVE:
        return dirty_bitmap_action_remove(c, a, ref, err);
    case IMAGE_BITMAP_CLEAR:
        return dirty_bitmap_action_clear(c, a, ref, err);
    case IMAGE_BITMAP_ENABLE:
        return dirty_bitmap_action_enable(c, a, ref, true, err);
    case IMAGE_BITMAP_DISABLE:
        return dirty_bitmap_action_enable(c, a, ref, false, err);
    case IMAGE_BITMAP_MERGE:
        return dirty_bitmap_action_merge(c, a, ref, source, 1, err);
    }
    return error_set(err, EINVAL, "unknown action");
}

int image_bitmap_co_change(struct image *image, const struct image_bitmap_change *change,
                           struct error **err)
{
    struct dirty_bitmap_ref source = ref_of(change->from ? change->from : image, change->source);
    struct dirty_bitmap_action action;
    struct change c;
    int r;

    change_init(&c, image->graph, "bitmap '%s'", change->name);
    r = add_action(&c, &action, image, change, &source, err);
    if (r == 0)
        r = change_co_run(&c, err);
    change_end(&c);
    return r;
}

/* ---- copies ---- */

/* The names of an image's bitmaps: a change alters the list. */
struct names {
    struct dirty_bitmap_picture *v; /* names owned */
    size_t count;
};

static void add_name(const struct dirty_bitmap_picture *picture, void *arg)
{
    struct names *names = arg;

    if (!picture->persistent)
        return;
    names->v[names->count] = *picture;
    names->v[names->count++].name = xstrdup(picture->name);
}

static struct names control_fn names_of(const struct image *image)
{
    const struct node *node = graph_find(image->graph, image->layers[0].node);
    struct names names = {.v = xnew_n(struct dirty_bitmap_picture, dirty_bitmap_count(node) + 1)};

    dirty_bitmap_for_each(node, add_name, &names);
    return names;
}

static void names_release(struct names *names)
{
    for (size_t i = 0; i < names->count; i++)
        free((char *)(uintptr_t)names->v[i].name);
    free(names->v);
}

int image_bitmaps_check(const struct image *from, bool skip, struct error **err)
{
    const struct node *node = graph_find(from->graph, from->layers[0].node);
    struct names names;
    int r = 0;

    if (!node_driver(node)->bitmap_store)
        return error_set(err, ENOTSUP, "Format driver '%s' does not support bitmaps",
                         image_format(from));
    names = names_of(from);
    for (size_t i = 0; r == 0 && i < names.count; i++) {
        if (names.v[i].inconsistent && skip)
            cli_warn("Skipping inconsistent bitmap '%s'", names.v[i].name);
        else if (names.v[i].inconsistent)
            r = error_set(err, EINVAL,
                          "Cannot copy inconsistent bitmap '%s': try --skip-broken-bitmaps, or "
                          "remove it with `bitmap --remove`",
                          names.v[i].name);
    }
    names_release(&names);
    return r;
}

/* It records when it has all. */
static int co_fn control_fn copy_one(const struct image *from, struct image *to,
                                     const struct dirty_bitmap_picture *b, struct error **err)
{
    const struct image_bitmap_change changes[] = {
        {.action = IMAGE_BITMAP_ADD, .name = b->name, .granularity = b->granularity},
        {.action = IMAGE_BITMAP_DISABLE, .name = b->name},
        {.action = IMAGE_BITMAP_MERGE, .name = b->name, .from = from, .source = b->name},
        {.action = IMAGE_BITMAP_ENABLE, .name = b->name},
    };
    size_t count = ARRAY_SIZE(changes) - (b->recording ? 0 : 1);
    int r = 0;

    for (size_t i = 0; r == 0 && i < count; i++)
        r = image_bitmap_co_change(to, &changes[i], err);
    return r < 0 ? error_wrap(err, r, "Failed to copy bitmap '%s'", b->name) : 0;
}

int image_bitmaps_co_copy(const struct image *from, struct image *to, struct error **err)
{
    struct names names = names_of(from);
    int r = 0;

    for (size_t i = 0; r == 0 && i < names.count; i++) {
        if (!names.v[i].inconsistent)
            r = copy_one(from, to, &names.v[i], err);
    }
    names_release(&names);
    return r;
}

/* ---- what they take ---- */

uint64_t image_bitmaps_size(const struct image *image, uint64_t cluster)
{
    struct names names = names_of(image);
    uint64_t size = image_size(image);
    uint64_t directory = 0;
    uint64_t sum = 0;

    for (size_t i = 0; i < names.count; i++) {
        uint64_t granularity = names.v[i].granularity;
        uint64_t bytes = ((size + granularity - 1) / granularity + 7) / 8;
        uint64_t clusters = (bytes + cluster - 1) / cluster;

        sum += clusters * cluster + align_up(clusters * QCOW2_ENTRY_LEN, cluster);
        directory += align_up(QCOW2_BITMAP_ENTRY_LEN_MIN + strlen(names.v[i].name), 8);
    }
    names_release(&names);
    return sum + align_up(directory, cluster);
}

/* ---- after closing ---- */

static bool is_in_use(const json_t *bitmap)
{
    const json_t *flag;
    size_t i;

    json_array_foreach(json_object_get(bitmap, "flags"), i, flag)
    {
        if (strcmp(json_string_value(flag), "in-use") == 0)
            return true;
    }
    return false;
}

size_t image_bitmaps_usable(const struct image *image)
{
    struct names names = names_of(image);
    size_t usable = 0;

    for (size_t i = 0; i < names.count; i++)
        usable += !names.v[i].inconsistent;
    names_release(&names);
    return usable;
}

int image_bitmaps_co_check_stored(struct graph *g, const struct image_spec *spec, size_t usable,
                                  struct error **err)
{
    struct image_spec look = *spec;
    struct info_tables tables = {.bitmaps = NULL};
    struct image image;
    size_t stored = 0;
    int r;

    look.flags = IMAGE_HEADERS | IMAGE_NO_BACKING;
    r = image_co_open(&image, g, "l", &look, err);
    if (r == 0)
        r = info_tables_co_read(&tables, g, &image.layers[0], err);
    for (size_t i = 0; i < json_array_size(tables.bitmaps); i++)
        stored += !is_in_use(json_array_get(tables.bitmaps, i));
    info_tables_release(&tables);
    image_co_close(&image);
    if (r == 0 && stored != usable)
        return error_set(err, EIO, "'%s': its bitmaps could not be stored", spec->name);
    return r;
}
