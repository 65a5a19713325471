/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Coroutines: stacks, starting, suspending, waiting.
 *
 * CO-1 A coroutine runs only on the thread of its loop; the one that runs is loop->current.
 * CO-2 Starting one enters it at once; its first suspend returns to the starter, later ones to the loop.
 * CO-3 A wait is ended once: co_wait_end() takes it off the coroutine, so that no canceller finds it any more.
 * CO-4 Stacks are re-used, last freed first, so that a busy loop works on warm ones.
 */
#include "loop/co.h"
#include "base/checked.h"
#include "base/macros.h"
#include "loop/loop-internal.h"
#include "loop/scope.h"

#include <assert.h>
#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define CO_STACK_BYTES ((size_t)256 << 10)
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define CO_STACK_BYTES ((size_t)256 << 10)
#endif
#endif
#ifndef CO_STACK_BYTES
#define CO_STACK_BYTES ((size_t)64 << 10)
#endif

/* How many idle stacks a loop keeps; more are given back. */
#define CO_POOL_MAX 512

struct co *co_self(void)
{
    struct loop *loop = loop_self();

    return loop ? loop->current : NULL;
}

/* Of calls that only a coroutine makes. */
static struct co *running_co(void)
{
    struct co *co = loop_self()->current;

    assert(co);
    return co;
}

struct fiber *co_current_fiber(struct loop *loop)
{
    return loop->current ? &loop->current->fiber : &loop->fiber;
}

static void co_main(void *arg);

/* One mapping: a guard page, the stack, and the coroutine itself at its upper end. */
static struct co *co_new(struct loop *loop)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    size_t size = page + CO_STACK_BYTES;
    void *map =
        mmap(NULL, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
    struct co *co;

    if (map == MAP_FAILED)
        return NULL;
    if (mprotect((char *)map + page, CO_STACK_BYTES, PROT_READ | PROT_WRITE) < 0) {
        munmap(map, size);
        return NULL;
    }
    co = (struct co *)(void *)((char *)map + size - align_up(sizeof(struct co), CACHE_LINE));
    memset(co, 0, sizeof(*co));
    co->map = map;
    co->map_size = size;
    co->loop = loop;
    list_init(&co->scope_link);
    list_init(&co->ready_link);
    list_append(&loop->all_cos, &co->all_link);
    fiber_init(&co->fiber, (char *)map + page, (size_t)((char *)co - ((char *)map + page)), co_main,
               co);
    return co;
}

static void co_free(struct co *co)
{
    void *map = co->map;
    size_t size = co->map_size;

    list_remove(&co->all_link);
    fiber_release(&co->fiber);
    munmap(map, size);
}

void co_pool_release(struct loop *loop)
{
    while (loop->free_cos) {
        struct co *co = loop->free_cos;

        loop->free_cos = co->next_free;
        co_free(co);
    }
    loop->free_co_count = 0;
}

void co_abandon_all(struct loop *loop)
{
    struct co *co;

    while ((co = list_first(&loop->all_cos, struct co, all_link)))
        co_free(co);
}

/* Gives control to `co`, from a coroutine or from the loop. */
static void co_enter(struct co *co)
{
    struct loop *loop = co->loop;
    struct co *from = loop->current;

    assert(loop == loop_self() && co != from); /* CO-1 */
    co->caller = co_current_fiber(loop);
    loop->current = co;
    fiber_switch(co->caller, &co->fiber);
    loop->current = from;
}

/* Gives control back to whoever entered the running coroutine. */
static void co_suspend(struct co *co)
{
    fiber_switch(&co->fiber, co->caller);
}

static void co_main(void *arg)
{
    struct co *co = arg;

    for (;;) {
        co->entry(co->arg);
        assert(!co->wait && !co->shield);
        co->entry = NULL;
        co_suspend(co);
    }
}

/* After an entry or a resume: has it ended? Then the scope hears of it, and the stack goes back to the pool. */
static void co_reap(struct co *co)
{
    struct loop *loop = co->loop;
    struct co_scope *scope = co->scope;

    if (co->entry)
        return;
    list_remove(&co->scope_link);
    co->scope = NULL;
    if (loop->free_co_count < CO_POOL_MAX) {
        co->next_free = loop->free_cos;
        loop->free_cos = co; /* CO-4 */
        loop->free_co_count++;
    } else {
        co_free(co);
    }
    if (--scope->count == 0) {
        if (scope->joiner && !scope->joiner->ended)
            co_wait_end(scope->joiner, 0);
        if (scope->on_empty)
            scope->on_empty(scope);
    }
}

int co_scope_start(struct co_scope *s, co_entry_fn *entry, void *arg)
{
    struct loop *loop = loop_self();
    struct co *co;

    if (unlikely(s->cancelled))
        return s->cancelled;
    co = loop->free_cos;
    if (likely(co)) {
        loop->free_cos = co->next_free;
        loop->free_co_count--;
    } else {
        co = co_new(loop);
        if (!co)
            return -ENOMEM;
    }
    co->entry = entry;
    co->arg = arg;
    co->interrupted = false;
    co->scope = s;
    list_append(&s->members, &co->scope_link);
    s->count++;
    loop->counters.coroutines++;
    co_enter(co); /* CO-2 */
    co_reap(co);
    return 0;
}

void co_make_ready(struct co *co)
{
    assert(!co->ready);
    co->ready = true;
    list_append(&co->loop->ready, &co->ready_link);
}

/* Runs what is ready now; what becomes ready meanwhile waits for the next tick, so that I/O gets its turn. */
void co_run_ready(struct loop *loop)
{
    struct list batch = LIST_INIT(batch);
    struct co *co;

    list_splice(&batch, &loop->ready);
    while ((co = list_first(&batch, struct co, ready_link))) {
        list_remove(&co->ready_link);
        co->ready = false;
        co_enter(co);
        co_reap(co);
    }
}

void co_yield (void)
{
    struct co *co = running_co();

    co_make_ready(co);
    co_suspend(co);
}

int co_cancelled(void)
{
    struct co *co = running_co();

    if (unlikely(co->interrupted))
        return -ECANCELED;
    return co->shield ? 0 : co->scope->cancelled;
}

void co_interrupt(struct co *co)
{
    struct co_wait *w = co->wait;

    co->interrupted = true;
    if (w && w->cancel && w->cancel(w))
        co_wait_end(w, -ECANCELED);
}

void co_interrupt_end(void)
{
    running_co()->interrupted = false;
}

void co_shield_begin(void)
{
    running_co()->shield++;
}

void co_shield_end(void)
{
    struct co *co = running_co();

    assert(co->shield);
    co->shield--;
}

void co_wait_init(struct co_wait *w, co_wait_cancel_fn *cancel)
{
    w->co = running_co();
    w->cancel = cancel;
    w->result = 0;
    w->ended = false;
    w->timer.armed = false;
}

static void wait_timed_out(struct timer *t)
{
    struct co_wait *w = container_of(t, struct co_wait, timer);

    if (w->cancel(w))
        co_wait_end(w, -ETIMEDOUT);
}

bool co_wait_leave(struct co_wait *w)
{
    (void)w;
    return true;
}

int co_wait(struct co_wait *w, uint64_t deadline_ns)
{
    struct co *co = w->co;

    assert(co == running_co());
    if (w->ended)
        return w->result;
    if (w->cancel) {
        int reason = co_cancelled();

        if (unlikely(reason) && w->cancel(w))
            return reason;
        if (deadline_ns != LOOP_FOREVER)
            loop_timer_arm(&w->timer, deadline_ns, wait_timed_out);
    }
    co->wait = w;
    co_suspend(co);
    assert(!co->wait);
    return co
        ->wait_result; /* `w` may be gone: of an operation left behind, which has ended since (G8) */
}

void co_wait_end(struct co_wait *w, int result)
{
    struct co *co = w->co;

    assert(!w->ended && co->loop == loop_self()); /* CO-3 */
    w->ended = true;
    w->result = result;
    if (w->timer.armed)
        loop_timer_disarm(&w->timer);
    if (co->wait == w) {
        co->wait = NULL;
        co->wait_result = result;
        co_make_ready(co);
    }
}

int co_sleep_until(uint64_t deadline_ns)
{
    struct co_wait w;
    int r;

    co_wait_init(&w, co_wait_leave);
    r = co_wait(&w, deadline_ns);
    return r == -ETIMEDOUT && !co_cancelled() ? 0 : r;
}
