/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A fiber is a stack and the place where it stopped: what coroutines and simulated loops are made of. The switch is written
 * by hand for x86-64 and aarch64 and uses ucontext elsewhere (ADR 0001); ASan and TSan are told of each switch.
 *
 * A fiber never moves to another thread. Signal masks and floating-point control words are not switched: nothing here
 * changes them.
 */
#ifndef CAIRN_LOOP_FIBER_H
#define CAIRN_LOOP_FIBER_H

#include <stdbool.h>
#include <stddef.h>

typedef void fiber_entry_fn(void *arg);

struct fiber {
    void *sp;
    void *stack;
    size_t stack_size;
    void *asan_fake_stack;
    void *tsan_fiber;
    bool on_thread; /* the thread's own stack: made by nobody here */
};

/* Prepares a fiber that calls entry(arg) on the first switch to it. entry must never return. */
void fiber_init(struct fiber *f, void *stack, size_t stack_size, fiber_entry_fn *entry, void *arg);

/* Describes the calling thread's own stack, so that fibers can switch back to it. */
void fiber_init_thread(struct fiber *f);

/* Forgets a fiber that is not running; its stack is the caller's to free. */
void fiber_release(struct fiber *f);

/* Stops `from`, which is running, and continues `to`. Returns when something switches to `from`. */
void fiber_switch(struct fiber *from, struct fiber *to);

#endif
