/* SPDX-License-Identifier: Apache-2.0 */
/* Names of events, and how they are told. */
#include "graph/event.h"
#include "graph/node-internal.h"

#include <string.h>

static const char *const names[EVENT_COUNT] = {
    [EVENT_NONE] = "none",
    [EVENT_READ_AIO] = "read_aio",
    [EVENT_READ_BACKING_AIO] = "read_backing_aio",
    [EVENT_READ_COMPRESSED] = "read_compressed",
    [EVENT_WRITE_AIO] = "write_aio",
    [EVENT_WRITE_COMPRESSED] = "write_compressed",
    [EVENT_COW_READ] = "cow_read",
    [EVENT_COW_WRITE] = "cow_write",
    [EVENT_L1_UPDATE] = "l1_update",
    [EVENT_L2_LOAD] = "l2_load",
    [EVENT_L2_UPDATE] = "l2_update",
    [EVENT_L2_ALLOC_COW_READ] = "l2_alloc_cow_read",
    [EVENT_L2_ALLOC_WRITE] = "l2_alloc_write",
    [EVENT_REFTABLE_GROW] = "reftable_grow",
    [EVENT_REFTABLE_UPDATE] = "reftable_update",
    [EVENT_REFBLOCK_LOAD] = "refblock_load",
    [EVENT_REFBLOCK_UPDATE_PART] = "refblock_update_part",
    [EVENT_REFBLOCK_ALLOC] = "refblock_alloc",
    [EVENT_REFBLOCK_ALLOC_WRITE_BLOCKS] = "refblock_alloc_write_blocks",
    [EVENT_REFBLOCK_ALLOC_WRITE_TABLE] = "refblock_alloc_write_table",
    [EVENT_REFBLOCK_ALLOC_SWITCH_TABLE] = "refblock_alloc_switch_table",
    [EVENT_CLUSTER_ALLOC] = "cluster_alloc",
    [EVENT_CLUSTER_ALLOC_BYTES] = "cluster_alloc_bytes",
    [EVENT_CLUSTER_FREE] = "cluster_free",
    [EVENT_FLUSH_TO_OS] = "flush_to_os",
    [EVENT_FLUSH_TO_DISK] = "flush_to_disk",
    [EVENT_PWRITEV] = "pwritev",
    [EVENT_PWRITEV_ZERO] = "pwritev_zero",
    [EVENT_PWRITEV_DONE] = "pwritev_done",
};

const char *event_name(enum event event)
{
    return names[event];
}

enum event event_from_name(const char *name)
{
    for (unsigned i = EVENT_NONE + 1; i < EVENT_COUNT; i++) {
        if (strcmp(name, names[i]) == 0)
            return (enum event)i;
    }
    return EVENT_NONE;
}

void edge_co_announce(const struct edge *edge, enum event event, const struct request *by)
{
    struct node *node = edge->node;

    while (unlikely(node->driver->kind == DRIVER_FILTER)) {
        if (node->driver->co_event)
            node->driver->co_event(node, event, by);
        node = node->file->node;
    }
}
