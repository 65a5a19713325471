/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Ranges under way. The list is in order of arrival; a range waits for every earlier one that overlaps it if either of the two
 * is exclusive. So nobody starves, and there is no cycle: all wait for earlier ones.
 */
#include "graph/overlap.h"
#include "base/checked.h"

#include <assert.h>

void overlap_init(struct overlap *o)
{
    o->lock.held = 0;
    list_init(&o->ranges);
    o->exclusives = 0;
    o->waiting = 0;
}

/* Does an earlier range keep this one waiting? */
static bool must_wait_locked(const struct overlap *o, const struct overlap_range *r)
{
    const struct overlap_range *other;

    if (!o->exclusives)
        return false;
    list_for_each (&o->ranges, other, link) {
        if (other == r)
            return false;
        if ((r->exclusive || other->exclusive) &&
            ranges_overlap(r->offset, r->len, other->offset, other->len))
            return true;
    }
    return false;
}

int overlap_begin(struct overlap *o, struct overlap_range *r, uint64_t offset, uint64_t len,
                  bool exclusive)
{
    int result;

    r->offset = offset;
    r->len = len;
    r->exclusive = exclusive;
    wait_queue_init(&r->waiter);
    tiny_lock_acquire(&o->lock);
    list_append(&o->ranges, &r->link);
    o->exclusives += exclusive;
    r->granted = !must_wait_locked(o, r);
    if (r->granted) {
        tiny_lock_release(&o->lock);
        return 0;
    }
    o->waiting++;
    result = wait_queue_wait(&r->waiter, &o->lock, LOOP_FOREVER);
    if (result < 0)
        overlap_end(o, r);
    return result;
}

void overlap_end(struct overlap *o, struct overlap_range *r)
{
    struct overlap_range *other;

    tiny_lock_acquire(&o->lock);
    list_remove(&r->link);
    o->exclusives -= r->exclusive;
    o->waiting -= !r->granted;
    list_for_each (&o->ranges, other, link) {
        if (!o->waiting)
            break;
        if (!other->granted && !must_wait_locked(o, other)) {
            other->granted = true;
            o->waiting--;
            (void)wait_queue_wake_one(&other->waiter);
        }
    }
    tiny_lock_release(&o->lock);
}
