/* SPDX-License-Identifier: Apache-2.0 */
/* Ranges that the host may still write to (G9). */
#include "graph/unended.h"
#include "base/checked.h"
#include "base/macros.h"
#include "graph/node-internal.h"
#include "graph/request.h"

/* How often a waiter looks whether the host has let go. */
#define LOOK_NS (20 * NS_PER_MS)

void unended_add(struct unended *u, uint64_t first, uint64_t end)
{
    unsigned n;

    tiny_lock_acquire(&u->lock);
    n = u->count;
    if (n < UNENDED_MAX) {
        u->ranges[n].first = first;
        u->ranges[n].end = end;
        atomic_set(&u->count, n + 1);
    } else {
        u->ranges[n - 1].first = MIN(u->ranges[n - 1].first, first);
        u->ranges[n - 1].end = MAX(u->ranges[n - 1].end, end);
    }
    tiny_lock_release(&u->lock);
}

static bool is_hit(struct unended *u, uint64_t first, uint64_t end)
{
    bool hit = false;

    tiny_lock_acquire(&u->lock);
    for (unsigned i = 0; i < u->count && !hit; i++)
        hit = first < u->ranges[i].end && u->ranges[i].first < end;
    tiny_lock_release(&u->lock);
    return hit;
}

/*
 * All of them have ended. One that is left meanwhile is counted by the node before it is added here: who adds finds the node
 * counting, and what is dropped here had ended before.
 */
static void drop_if_ended(struct node *node)
{
    struct unended *u = &node->unended;

    tiny_lock_acquire(&u->lock);
    if (!node_unresolved(node))
        atomic_set(&u->count, 0u);
    tiny_lock_release(&u->lock);
}

int unended_co_wait(struct node *node, struct request *req)
{
    uint64_t first = align_down(req->offset, node->align);
    uint64_t end = align_up(req->offset + req->len, node->align);
    int r = 0;

    while (r == 0) {
        drop_if_ended(node);
        if (!is_hit(&node->unended, first, end))
            break;
        r = co_park_until(req, loop_clock() + LOOK_NS); /* G6: it is no child that it waits for */
    }
    return r;
}
