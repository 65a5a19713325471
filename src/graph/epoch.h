/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Epochs: who has looked something up, and still uses what it found. A reader enters, looks up, uses, and leaves; it takes
 * no lock and touches only its own loop's counter (G10). Whoever has replaced what readers find asks for a grace: when it
 * has passed, every reader that may have found the old one has left (Q1, Q2).
 *
 * EPOCH-1 A slot's counts and phase are only touched on its loop. A round posts each slot's message; the loop begins a new
 *         phase, and sends the message back when the readers of the old one have left.
 * EPOCH-2 A round that begins after a ticket was drawn serves it; one round at a time.
 * EPOCH-3 Nobody waits for a grace inside, or for something that such a waiter holds.
 *
 * The loops that have entered outlive the epoch.
 */
#ifndef CAIRN_GRAPH_EPOCH_H
#define CAIRN_GRAPH_EPOCH_H

#include "base/context.h"
#include "loop/lock.h"
#include "loop/loop.h"

#include <stdbool.h>
#include <stdint.h>

struct chain_cache;
struct epoch;

/* What one loop knows. */
struct epoch_slot {
    struct epoch *epoch;
    struct loop *loop;

    /* Only touched on the loop. */
    unsigned inside[2];
    unsigned phase;
    bool asked;                /* the message is here, and goes back when the old phase is empty */
    struct chain_cache *chain; /* chain.c's; or NULL */

    struct loop_message message;
};

struct epoch {
    struct epoch_slot *slots[LOOP_MAX]; /* atomic; each is set once, by its own loop */
    unsigned joined;                    /* atomic: loops that have a slot */

    struct tiny_lock lock;
    /* Protected by lock. */
    uint64_t drawn;   /* the last ticket */
    uint64_t serving; /* the last ticket when the round began; 0: there is no round */
    uint64_t passed;  /* tickets up to this one have had their grace */
    unsigned out;     /* messages of the round that are not back, and the one who posts them */
    struct wait_queue waiters;
};

void epoch_init(struct epoch *e);
/* Waits until the last round is over, and frees the slots. Nobody is inside, nobody enters. */
void co_fn epoch_co_release(struct epoch *e);

/* Before the lookup. NULL when there is no memory for this loop's slot; that can only be at the loop's first time. */
struct epoch_slot *epoch_join(struct epoch *e);

static inline struct epoch_slot *epoch_slot_here(struct epoch *e)
{
    struct epoch_slot *slot = e->slots[loop_index(loop_self())];

    return slot ? slot : epoch_join(e);
}

/* Returns what epoch_leave() wants back. */
static inline unsigned epoch_enter(struct epoch_slot *slot)
{
    slot->inside[slot->phase]++;
    return slot->phase;
}

void epoch_answer(struct epoch_slot *slot);

static inline void epoch_leave(struct epoch_slot *slot, unsigned phase)
{
    slot->inside[phase]--;
    if (slot->asked && phase != slot->phase)
        epoch_answer(slot);
}

/*
 * Draws a ticket for what was replaced before, and sees to it that a round is under way. Any loop; does not wait.
 */
uint64_t epoch_ticket(struct epoch *e);
/* The graces of tickets up to this one have passed. */
uint64_t epoch_passed(struct epoch *e);
/* Waits for a grace from now on. Not inside (EPOCH-3). 0 or -ECANCELED. */
int co_fn epoch_co_pass(struct epoch *e);

#endif
