/* SPDX-License-Identifier: Apache-2.0 */
/* Wait queues across loops, and co_mutex and co_rwlock on top of them. */
#include "loop/lock.h"
#include "base/atomic.h"
#include "base/macros.h"
#include "loop/loop-internal.h"

#include <assert.h>
#include <sched.h>

#define SPINS_BEFORE_YIELD 64

void tiny_lock_acquire(struct tiny_lock *l)
{
    unsigned spins = 0;

    while (atomic_swap(&l->held, 1u)) {
        /* The holder may have lost its CPU: give it ours rather than spin for a time slice. */
        if (++spins >= SPINS_BEFORE_YIELD)
            sched_yield();
    }
}

void tiny_lock_release(struct tiny_lock *l)
{
    atomic_set(&l->held, 0u);
}

void wait_queue_init(struct wait_queue *q)
{
    list_init(&q->waiters);
}

struct queue_waiter {
    struct list link;
    struct co_wait wait;
    struct loop *loop;
    struct loop_message message;
    struct tiny_lock *lock;
    bool queued; /* Protected by lock. */
    bool writer; /* of a co_rwlock */
};

static void waiter_arrived(struct loop_message *m)
{
    co_wait_end(&container_of(m, struct queue_waiter, message)->wait, 0);
}

/* T4: one message per waiter, whatever its loop is doing. */
static void waiter_wake_locked(struct queue_waiter *w)
{
    list_remove(&w->link);
    w->queued = false;
    w->message.fn = waiter_arrived;
    loop_post(w->loop, &w->message);
}

static bool waiter_cancel(struct co_wait *wait)
{
    struct queue_waiter *w = container_of(wait, struct queue_waiter, wait);
    bool taken_back;

    tiny_lock_acquire(w->lock);
    taken_back = w->queued;
    if (taken_back) {
        list_remove(&w->link);
        w->queued = false;
    }
    tiny_lock_release(w->lock);
    return taken_back;
}

static int co_fn queue_wait(struct wait_queue *q, struct tiny_lock *lock, uint64_t deadline_ns,
                            bool writer, bool cancellable)
{
    struct queue_waiter w = {.loop = loop_self(), .lock = lock, .queued = true, .writer = writer};

    co_wait_init(&w.wait, cancellable ? waiter_cancel : NULL);
    list_append(&q->waiters, &w.link);
    tiny_lock_release(lock);
    return co_wait(&w.wait, deadline_ns);
}

int wait_queue_wait(struct wait_queue *q, struct tiny_lock *lock, uint64_t deadline_ns)
{
    return queue_wait(q, lock, deadline_ns, false, true);
}

bool wait_queue_wake_one(struct wait_queue *q)
{
    struct queue_waiter *w = list_first(&q->waiters, struct queue_waiter, link);

    if (!w)
        return false;
    waiter_wake_locked(w);
    return true;
}

void wait_queue_wake_all(struct wait_queue *q)
{
    while (wait_queue_wake_one(q))
        ;
}

void co_mutex_init(struct co_mutex *m)
{
    m->lock.held = 0;
    m->held = false;
    wait_queue_init(&m->queue);
}

bool co_mutex_try_lock(struct co_mutex *m)
{
    bool got;

    tiny_lock_acquire(&m->lock);
    got = !m->held;
    m->held = true;
    tiny_lock_release(&m->lock);
    return got;
}

static int co_fn mutex_lock(struct co_mutex *m, uint64_t deadline_ns, bool cancellable)
{
    tiny_lock_acquire(&m->lock);
    if (!m->held) {
        m->held = true;
        tiny_lock_release(&m->lock);
        return 0;
    }
    /* A wake hands the mutex over: `held` stays set. */
    return queue_wait(&m->queue, &m->lock, deadline_ns, false, cancellable);
}

int co_mutex_lock_until(struct co_mutex *m, uint64_t deadline_ns)
{
    return mutex_lock(m, deadline_ns, true);
}

void co_mutex_lock(struct co_mutex *m)
{
    (void)mutex_lock(m, LOOP_FOREVER, false); /* cannot fail: not cancellable, no deadline */
}

void co_mutex_unlock(struct co_mutex *m)
{
    tiny_lock_acquire(&m->lock);
    assert(m->held);
    if (!wait_queue_wake_one(&m->queue))
        m->held = false;
    tiny_lock_release(&m->lock);
}

void co_rwlock_init(struct co_rwlock *l)
{
    l->lock.held = 0;
    l->readers = 0;
    l->writer = false;
    wait_queue_init(&l->queue);
}

/* Hands the lock to the first waiter if it is free for it, and to all readers that follow a first reader. */
static void rwlock_hand_on_locked(struct co_rwlock *l)
{
    struct queue_waiter *w;

    while ((w = list_first(&l->queue.waiters, struct queue_waiter, link))) {
        if (l->writer || (w->writer && l->readers))
            return;
        if (w->writer)
            l->writer = true;
        else
            l->readers++;
        waiter_wake_locked(w);
    }
}

void co_rwlock_read(struct co_rwlock *l)
{
    tiny_lock_acquire(&l->lock);
    if (!l->writer && list_empty(&l->queue.waiters)) {
        l->readers++;
        tiny_lock_release(&l->lock);
        return;
    }
    (void)queue_wait(&l->queue, &l->lock, LOOP_FOREVER, false, false); /* not cancellable */
}

void co_rwlock_write(struct co_rwlock *l)
{
    tiny_lock_acquire(&l->lock);
    if (!l->writer && !l->readers) {
        l->writer = true;
        tiny_lock_release(&l->lock);
        return;
    }
    (void)queue_wait(&l->queue, &l->lock, LOOP_FOREVER, true, false); /* not cancellable */
}

void co_rwlock_read_done(struct co_rwlock *l)
{
    tiny_lock_acquire(&l->lock);
    assert(l->readers);
    l->readers--;
    rwlock_hand_on_locked(l);
    tiny_lock_release(&l->lock);
}

void co_rwlock_write_done(struct co_rwlock *l)
{
    tiny_lock_acquire(&l->lock);
    assert(l->writer);
    l->writer = false;
    rwlock_hand_on_locked(l);
    tiny_lock_release(&l->lock);
}
