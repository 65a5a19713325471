/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Access is data: each edge says what its parent wants from the node and what it tolerates that others do. One function
 * decides (access_change()); its message names both users.
 */
#ifndef CAIRN_GRAPH_ACCESS_H
#define CAIRN_GRAPH_ACCESS_H

#include "base/context.h"
#include "base/error.h"

/* The bits have QEMU's numbers: they are the numbers of the lock bytes on image files. */
enum access_bits {
    ACCESS_READ = 1 << 0,            /* reads must be consistent */
    ACCESS_WRITE = 1 << 1,           /* changes data */
    ACCESS_WRITE_UNCHANGED = 1 << 2, /* writes what is there already */
    ACCESS_RESIZE = 1 << 3,          /* changes the size */
    ACCESS_ALL = 15,
};

struct access {
    unsigned wants;
    unsigned tolerates;
};

#define ACCESS_NONE ((struct access){.wants = 0, .tolerates = ACCESS_ALL})

/* "read, write" and the like into a static-size buffer, for messages. */
#define ACCESS_TEXT_BYTES 64
const char *access_text(unsigned bits, char *buf);

struct edge;
struct node;

/*
 * Gives one edge a new access and carries the consequences down: what each node below must ask of its children follows from
 * all of its parents. Checks every node that is touched against its read-only state and all its users; drivers that
 * guard their access against other programs do so here. All or nothing. The nodes below are reserved by the caller.
 * -EPERM on a conflict between users; -ENOMEM; -EACCES, -EAGAIN and the like from drivers.
 */
int co_fn control_fn access_change(struct edge *edge, struct access access, struct error **err);
/* The same for an edge that goes: it wants nothing any more, and nobody can be against that. Needs no memory. */
void co_fn control_fn access_drop(struct edge *edge);

#endif
