/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Structured concurrency: a coroutine that starts others does it in a scope, and leaves after all of them have ended.
 * Cancelling a scope makes the waits in it, and in scopes that its coroutines have opened, return -ECANCELED.
 *
 * A scope belongs to one loop and is only touched there.
 */
#ifndef CAIRN_LOOP_SCOPE_H
#define CAIRN_LOOP_SCOPE_H

#include "base/context.h"
#include "base/list.h"
#include "loop/co.h"

struct co_scope {
    struct list members; /* struct co */
    unsigned count;
    int cancelled; /* 0, or the negative errno that waits return */
    struct co_wait *joiner;
    void (*on_empty)(
        struct co_scope *s); /* the last touch when the last coroutine has ended; may be NULL */
    struct timer timer;
};

void co_scope_init(struct co_scope *s);

/*
 * Starts entry(arg) in a new coroutine, which runs at once until its first wait. Returns 0, -ENOMEM, or the scope's reason
 * if it is cancelled: then entry is not called.
 */
int co_scope_start(struct co_scope *s, co_entry_fn *entry, void *arg);

/*
 * Waits until all coroutines of the scope have ended. When the caller's own scope is cancelled meanwhile, this one is
 * cancelled too, and the wait goes on.
 */
void co_fn co_scope_join(struct co_scope *s);

/* Makes current and later waits in the scope return -ECANCELED. Does not wait. */
void co_scope_cancel(struct co_scope *s);

/* Cancels the scope at this time, with -ETIMEDOUT as reason. LOOP_FOREVER takes a deadline back. */
void co_scope_set_deadline(struct co_scope *s, uint64_t deadline_ns);

/*
 * Runs fn(arg) in a coroutine on another loop and waits until it has ended. Cancelling the caller's scope cancels fn's
 * waits. Returns 0, or -ENOMEM if it could not be started.
 */
int co_fn loop_co_call(struct loop *on, co_entry_fn *fn, void *arg);

#endif
