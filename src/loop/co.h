/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Coroutines, and the one way in which they wait.
 *
 * A coroutine belongs to the loop that started it and stays there. It is started in a scope (loop/scope.h), never into the
 * void. Its stack comes from a pool of the loop and has a guard page below it.
 *
 * Waiting: put a `struct co_wait` where the one who ends the wait finds it, then call co_wait(). Whoever ends it calls
 * co_wait_end() on the same loop. Cancellation and deadlines end a wait through its cancel function, which takes it back from
 * where it was put.
 */
#ifndef CAIRN_LOOP_CO_H
#define CAIRN_LOOP_CO_H

#include "base/context.h"
#include "loop/loop.h"

#include <stdbool.h>
#include <stdint.h>

struct co;

/* The running coroutine; NULL outside of coroutines. */
struct co *co_self(void);

/* Lets everything else that is ready, and the loop's I/O, have a turn. Not cancellable. */
void co_fn co_yield (void);

struct co_wait;

/*
 * Takes the wait back, so that nobody else will end it; returns false if it is too late for that (an end is on its way, or
 * the operation cannot be called off: then it may hurry it). Runs on the waiter's loop.
 */
typedef bool co_wait_cancel_fn(struct co_wait *w);

struct co_wait {
    struct co *co;
    co_wait_cancel_fn *cancel; /* NULL: neither deadline nor cancellation ends this wait */
    int result;
    bool ended;
    struct timer timer;
};

/* A cancel function for waits that nobody but the waiter needs to be told of: it can always leave. */
co_wait_cancel_fn co_wait_leave;

/* Prepares a wait of the running coroutine. */
void co_wait_init(struct co_wait *w, co_wait_cancel_fn *cancel);

/*
 * Waits until co_wait_end(), and returns its result; -ETIMEDOUT when the loop's clock passes deadline_ns, -ECANCELED when
 * the coroutine's scope is cancelled, both only if the cancel function takes the wait back. May return without yielding if
 * the wait has ended already.
 */
int co_fn co_wait(struct co_wait *w, uint64_t deadline_ns);

/* Ends a wait; once, on the waiter's loop, from a coroutine or outside of one. */
void co_wait_end(struct co_wait *w, int result);

/* Sleeps until the deadline: 0, or -ECANCELED. */
int co_fn co_sleep_until(uint64_t deadline_ns);

/*
 * Between these, cancellation of the scope does not end waits of this coroutine: for clean-up that must be done all the
 * same. They nest.
 */
void co_fn co_shield_begin(void);
void co_fn co_shield_end(void);

/*
 * Ends the wait of another coroutine of this loop with -ECANCELED, and all its later ones, shielded or not, until it calls
 * co_interrupt_end() itself (G7). Waits that cannot be cancelled go on.
 */
void co_interrupt(struct co *co);
void co_fn co_interrupt_end(void);

/* -ECANCELED or the scope's reason if the coroutine was interrupted, or its scope is cancelled and no shield is up; else 0. */
int co_fn co_cancelled(void);

#endif
