/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Copying a range from one disk to another without its bytes passing through our memory: the host copies between two files, or
 * shares what they hold.
 *
 * Two requests, one within the other. REQUEST_COPY_OUT goes down from the source as a read does, until a driver knows in which
 * file of the host the range lies; there it turns into REQUEST_COPY_IN, which goes down from the target as a write does, and ends
 * in the driver that has the other file.
 *
 * OFFLOAD-1 To the target it is a change like any write: its pass, its trackers, its locks, and the order of data and mappings.
 * OFFLOAD-2 All the time the source holds what the range lies in, as for a read (Q2): it is still what the source says there.
 * OFFLOAD-3 Nobody waits at one gate while he is inside the other: a change that closes both would wait for him.
 * OFFLOAD-4 Who holds a node as a source does not change it, since he might wait there for himself to leave.
 * OFFLOAD-5 A driver that has no such operation, filters too, refuses. What it would have to see or to change it must be given.
 */
#ifndef CAIRN_GRAPH_OFFLOAD_H
#define CAIRN_GRAPH_OFFLOAD_H

#include "base/context.h"
#include "graph/backend.h"
#include "loop/file.h"

#include <stdbool.h>

/* A copy under way, on the stack of backend_co_copy(). */
struct offload {
    struct backend *target;
    unsigned flags; /* of the write */
    struct pass pass;
    /* Once the source has found it. */
    struct file *file;
    const struct pass_frame *source; /* how it was found */
};

/*
 * Copies bytes from one disk to another, both attached to this loop; at most BACKEND_MAX_DATA. REQUEST_FUA is the only flag.
 * 0; -EOPNOTSUPP where this range cannot be copied so, and -EXDEV where no range of these two can: it is to be read and written
 * then. Otherwise as for a write, or a read. After an error a part may have been copied.
 *
 * While it goes on a change of the source waits for the target's host, too: whoever cannot have that sets a deadline.
 */
int co_fn backend_co_copy(struct backend *source, uint64_t source_offset, struct backend *target,
                          uint64_t offset, uint64_t len, unsigned flags);

/* For the driver that a REQUEST_COPY_OUT ends at: the range lies in this file, at the request's offset. */
int co_fn offload_co_hand_over(const struct request *out, struct file *file);

/* For the driver that a REQUEST_COPY_IN ends at: copies to its file, at the request's offset. */
int co_fn offload_co_take(const struct request *in, struct file *file);

/* For the core: is the node one of those that the range comes from (OFFLOAD-4)? */
bool offload_comes_from(const struct offload *o, const struct node *node);

#endif
