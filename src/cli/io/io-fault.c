/* SPDX-License-Identifier: Apache-2.0 */
/* break, wait_break, resume and remove_break: requests that are held at events of the image's format. */
#include "base/macros.h"
#include "cli/io/io.h"
#include "filters/fault/fault.h"
#include "graph/gate.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

/* Events that the peer has, and that do not happen here. */
static const char *const foreign[] = {
    "l1_grow_alloc_table",
    "l1_grow_write_table",
    "l1_grow_activate_table",
    "l1_shrink_write_table",
    "l1_shrink_free_l2_clusters",
    "l2_update_compressed",
    "vmstate_load",
    "vmstate_save",
    "reftable_load",
    "refblock_update",
    "refblock_alloc_hookup",
    "refblock_alloc_write",
    "pwritev_rmw_head",
    "pwritev_rmw_after_head",
    "pwritev_rmw_tail",
    "pwritev_rmw_after_tail",
    "empty_image_prepare",
    "cor_write",
    "cluster_alloc_space",
};

/* A command that waits for its own request cannot be followed by the one that would resume it. */
static bool may_hold(void *arg, const struct request *by)
{
    const struct io *io = arg;

    return by->pass->co != io->co;
}

static void held(void *arg, const char *tag)
{
    printf("blkdebug: Suspended request '%s'\n", tag);
    io_wake(arg);
}

static void resumed(void *arg, const char *tag)
{
    (void)arg;
    printf("blkdebug: Resuming request '%s'\n", tag);
}

void io_wake(struct io *io)
{
    if (io->pause)
        co_wait_end(io->pause, 0);
    io->pause = NULL;
}

void io_find_fault(struct io *io)
{
    struct fault_watcher watcher = {may_hold, held, resumed, io};

    io->fault = fault_find(graph_find(io->graph, io->image.layers[0].file_node));
    if (io->fault)
        fault_watch(io->fault, &watcher);
}

void io_join(struct io *io)
{
    if (io->fault)
        fault_resume_all(io->fault);
    co_scope_join(&io->async);
}

static bool is_foreign(const char *event)
{
    for (size_t i = 0; i < ARRAY_SIZE(foreign); i++) {
        if (strcmp(event, foreign[i]) == 0)
            return true;
    }
    return false;
}

int io_cmd_break(struct io *io, int argc, char **argv)
{
    enum event event = event_from_name(argv[1]);
    int r = io->fault ? -ENOENT : -ENOTSUP;

    (void)argc;
    if (io->fault && is_foreign(argv[1]))
        return io_say("break: event '%s' does not happen here", argv[1]);
    if (io->fault && event != EVENT_NONE)
        r = fault_break(io->fault, event, argv[2]);
    if (r < 0)
        printf("Could not set breakpoint: %s\n", strerror(-r));
    return r;
}

int io_cmd_remove_break(struct io *io, int argc, char **argv)
{
    int r = io->fault ? fault_remove(io->fault, argv[1]) : -ENOTSUP;

    (void)argc;
    if (r < 0)
        printf("Could not remove breakpoint %s: %s\n", argv[1], strerror(-r));
    return r;
}

int io_cmd_resume(struct io *io, int argc, char **argv)
{
    int r = io->fault ? fault_resume(io->fault, argv[1]) : -ENOTSUP;

    (void)argc;
    if (r < 0)
        printf("Could not resume request: %s\n", strerror(-r));
    return r;
}

/* Until a request is held; there must be one that may come there. */
int io_cmd_wait_break(struct io *io, int argc, char **argv)
{
    (void)argc;
    while (!io->fault || !fault_holds(io->fault, argv[1])) {
        struct co_wait wait;

        if (!io->fault || !fault_waits(io->fault, argv[1]))
            return io_say("wait_break: there is no breakpoint '%s'", argv[1]);
        if (!io->async.count)
            return io_say("wait_break: no request is under way that could come to '%s'", argv[1]);
        co_wait_init(&wait, NULL);
        io->pause = &wait;
        (void)co_wait(&wait, LOOP_FOREVER); /* the requests end it */
    }
    return 0;
}
