/* SPDX-License-Identifier: Apache-2.0 */
/* Rounds of messages: see epoch.h. */
#include "graph/epoch.h"
#include "base/alloc.h"
#include "base/atomic.h"

#include <assert.h>
#include <stdlib.h>

void epoch_init(struct epoch *e)
{
    *e = (struct epoch){.joined = 0};
    wait_queue_init(&e->waiters);
}

static void begin_round(struct epoch *e);

/* One of those that a round waits for is done. The last one ends the round, and begins the next if somebody came meanwhile. */
static void one_is_back(struct epoch *e)
{
    bool again = false;

    tiny_lock_acquire(&e->lock);
    if (--e->out == 0) {
        e->passed = e->serving;
        again = e->drawn > e->passed;
        e->serving = again ? e->drawn : 0;
        e->out = again;
        wait_queue_wake_all(&e->waiters);
    }
    tiny_lock_release(&e->lock);
    if (again)
        begin_round(e);
}

void epoch_answer(struct epoch_slot *slot)
{
    if (slot->inside[!slot->phase])
        return;
    slot->asked = false;
    one_is_back(slot->epoch); /* the last touch */
}

/* On the slot's loop: those who come from now on find what is new. */
static void round_arrived(struct loop_message *m)
{
    struct epoch_slot *slot = container_of(m, struct epoch_slot, message);

    assert(!slot->inside[!slot->phase]);
    slot->phase = !slot->phase;
    slot->asked = true;
    epoch_answer(slot);
}

/* `out` counts us until all messages are posted, so that the round does not end under our hands. */
static void begin_round(struct epoch *e)
{
    /*
     * A loop whose slot we do not see below joins after this point, and finds what was replaced before: both sides change
     * `joined`, and whoever comes second has seen all that the first had done.
     */
    (void)atomic_add(&e->joined, 0u);
    for (unsigned i = 0; i < LOOP_MAX; i++) {
        struct epoch_slot *slot = atomic_get_acquire(&e->slots[i]); /* pairs with epoch_join() */

        if (!slot)
            continue;
        tiny_lock_acquire(&e->lock);
        e->out++;
        tiny_lock_release(&e->lock);
        loop_post(slot->loop, &slot->message);
    }
    one_is_back(e);
}

struct epoch_slot *epoch_join(struct epoch *e)
{
    struct epoch_slot *slot = try_new(struct epoch_slot);

    if (!slot)
        return NULL;
    slot->epoch = e;
    slot->loop = loop_self();
    slot->message.fn = round_arrived;
    atomic_set_release(&e->slots[loop_index(slot->loop)], slot); /* pairs with begin_round() */
    (void)atomic_add(&e->joined, 1u);
    return slot;
}

uint64_t epoch_ticket(struct epoch *e)
{
    uint64_t ticket;
    bool begin;

    tiny_lock_acquire(&e->lock);
    ticket = ++e->drawn;
    begin = !e->serving;
    if (begin) {
        e->serving = ticket;
        e->out = 1;
    }
    tiny_lock_release(&e->lock);
    if (begin)
        begin_round(e);
    return ticket;
}

uint64_t epoch_passed(struct epoch *e)
{
    uint64_t passed;

    tiny_lock_acquire(&e->lock);
    passed = e->passed;
    tiny_lock_release(&e->lock);
    return passed;
}

/* Until the grace of `ticket` has passed. */
static int co_fn wait_for(struct epoch *e, uint64_t ticket)
{
    int r = 0;

    tiny_lock_acquire(&e->lock);
    while (r == 0 && e->passed < ticket) {
        r = wait_queue_wait(&e->waiters, &e->lock, LOOP_FOREVER);
        tiny_lock_acquire(&e->lock);
    }
    tiny_lock_release(&e->lock);
    return r;
}

int epoch_co_pass(struct epoch *e)
{
    return wait_for(e, epoch_ticket(e));
}

void epoch_co_release(struct epoch *e)
{
    co_shield_begin();
    (void)wait_for(e, e->drawn);
    co_shield_end();
    for (unsigned i = 0; i < LOOP_MAX; i++) {
        if (e->slots[i])
            free(e->slots[i]->chain);
        free(e->slots[i]);
    }
}
