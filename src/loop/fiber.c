/* SPDX-License-Identifier: Apache-2.0 */
/* Fibers: the switch's first stack frame, and what the sanitizers must know. */
#include "loop/fiber.h"

#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__SANITIZE_ADDRESS__)
#define FIBER_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define FIBER_ASAN 1
#endif
#endif

#if defined(__SANITIZE_THREAD__)
#define FIBER_TSAN 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define FIBER_TSAN 1
#endif
#endif

#ifdef FIBER_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef FIBER_TSAN
#include <sanitizer/tsan_interface.h>
#endif

#if defined(__x86_64__) || defined(__aarch64__)

/* fiber-switch.S: saves the callee-saved registers on the stack, stores its end in *save_sp, continues at load_sp. */
void fiber_switch_stacks(void **save_sp, void *load_sp);
/* fiber-switch.S: the first return address of a new fiber; calls the entry with its argument. */
void fiber_begin(void);

static void *first_frame(void *stack, size_t stack_size, fiber_entry_fn *entry, void *arg)
{
    uintptr_t top = ((uintptr_t)stack + stack_size) & ~(uintptr_t)15;
#if defined(__x86_64__)
    /* r15 r14 r13 r12 rbx rbp, return address, and a zero that ends backtraces. */
    uintptr_t *frame = (uintptr_t *)(top - 8 * sizeof(uintptr_t));

    memset(frame, 0, 8 * sizeof(uintptr_t));
    frame[3] = (uintptr_t)entry;
    frame[4] = (uintptr_t)arg;
    frame[6] = (uintptr_t)fiber_begin;
#else
    /* x19..x28, x29, x30, d8..d15 */
    uintptr_t *frame = (uintptr_t *)(top - 20 * sizeof(uintptr_t));

    memset(frame, 0, 20 * sizeof(uintptr_t));
    frame[0] = (uintptr_t)entry;
    frame[1] = (uintptr_t)arg;
    frame[11] = (uintptr_t)fiber_begin;
#endif
    return frame;
}

#else

#include <ucontext.h>

struct ucontext_fiber {
    ucontext_t context;
    fiber_entry_fn *entry;
    void *arg;
};

static void ucontext_begin(unsigned high, unsigned low)
{
    struct ucontext_fiber *u = (struct ucontext_fiber *)(((uintptr_t)high << 16 << 16) | low);

    u->entry(u->arg);
}

static void *first_frame(void *stack, size_t stack_size, fiber_entry_fn *entry, void *arg)
{
    /* The context lives at the end of the stack that it describes. */
    uintptr_t top =
        ((uintptr_t)stack + stack_size - sizeof(struct ucontext_fiber)) & ~(uintptr_t)63;
    struct ucontext_fiber *u = (struct ucontext_fiber *)top;

    getcontext(&u->context);
    u->context.uc_stack.ss_sp = stack;
    u->context.uc_stack.ss_size = top - (uintptr_t)stack;
    u->context.uc_link = NULL;
    u->entry = entry;
    u->arg = arg;
    makecontext(&u->context, (void (*)(void))ucontext_begin, 2,
                (unsigned)((uintptr_t)u >> 16 >> 16), (unsigned)(uintptr_t)u);
    return u;
}

static void fiber_switch_stacks(void **save_sp, void *load_sp)
{
    struct ucontext_fiber here;

    *save_sp = &here;
    swapcontext(&here.context, &((struct ucontext_fiber *)load_sp)->context);
}

#endif

struct fiber_start {
    fiber_entry_fn *entry;
    void *arg;
};

#ifdef FIBER_ASAN
/* The first thing on a new stack: tell ASan that the switch is over. */
static void asan_entry(void *arg)
{
    struct fiber_start start = *(struct fiber_start *)arg;

    __sanitizer_finish_switch_fiber(NULL, NULL, NULL);
    free(arg);
    start.entry(start.arg);
}
#endif

void fiber_init(struct fiber *f, void *stack, size_t stack_size, fiber_entry_fn *entry, void *arg)
{
    memset(f, 0, sizeof(*f));
    f->stack = stack;
    f->stack_size = stack_size;
#ifdef FIBER_ASAN
    struct fiber_start *start = malloc(sizeof(*start));

    if (!start)
        abort();
    start->entry = entry;
    start->arg = arg;
    entry = asan_entry;
    arg = start;
#endif
#ifdef FIBER_TSAN
    f->tsan_fiber = __tsan_create_fiber(0);
#endif
    f->sp = first_frame(stack, stack_size, entry, arg);
}

void fiber_init_thread(struct fiber *f)
{
    memset(f, 0, sizeof(*f));
    f->on_thread = true;
#ifdef FIBER_ASAN
    pthread_attr_t attr;

    if (pthread_getattr_np(pthread_self(), &attr) == 0) {
        pthread_attr_getstack(&attr, &f->stack, &f->stack_size);
        pthread_attr_destroy(&attr);
    }
#endif
#ifdef FIBER_TSAN
    f->tsan_fiber = __tsan_get_current_fiber();
#endif
}

void fiber_release(struct fiber *f)
{
#ifdef FIBER_ASAN
    if (f->stack && !f->on_thread)
        __asan_unpoison_memory_region(f->stack, f->stack_size);
#endif
#ifdef FIBER_TSAN
    if (f->tsan_fiber && !f->on_thread)
        __tsan_destroy_fiber(f->tsan_fiber);
#endif
    f->tsan_fiber = NULL;
}

void fiber_switch(struct fiber *from, struct fiber *to)
{
#ifdef FIBER_ASAN
    __sanitizer_start_switch_fiber(&from->asan_fake_stack, to->stack, to->stack_size);
#endif
#ifdef FIBER_TSAN
    __tsan_switch_to_fiber(to->tsan_fiber, 0);
#endif
    fiber_switch_stacks(&from->sp, to->sp);
#ifdef FIBER_ASAN
    __sanitizer_finish_switch_fiber(from->asan_fake_stack, NULL, NULL);
#endif
}
