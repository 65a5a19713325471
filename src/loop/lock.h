/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What coroutines of several loops wait on together: wait queues, and the locks made of them.
 *
 * All work across threads. A waiter is woken by one message to its own loop, always (T4): there is no "wake if sleeping".
 * co_mutex and co_rwlock may be held across a yield and are fair: FIFO. The struct that holds one says which fields it
 * protects and what comes before it in lock order.
 */
#ifndef CAIRN_LOOP_LOCK_H
#define CAIRN_LOOP_LOCK_H

#include "base/context.h"
#include "base/list.h"
#include "loop/co.h"
#include "loop/loop.h"

/* Held for a few instructions, never across a yield or a system call. */
struct tiny_lock {
    uint32_t held;
};

void tiny_lock_acquire(struct tiny_lock *l);
void tiny_lock_release(struct tiny_lock *l);

/* A place to wait for something that other loops bring about. */
struct wait_queue {
    struct list waiters;
};

void wait_queue_init(struct wait_queue *q);

/*
 * Waits until woken. `lock` protects the queue and the condition: it is held on entry, dropped while waiting, and not held on
 * return. Returns 0, -ETIMEDOUT or -ECANCELED; then this waiter has consumed no wake.
 */
int co_fn wait_queue_wait(struct wait_queue *q, struct tiny_lock *lock, uint64_t deadline_ns);

/* Wakes the first waiter; false if there is none. The lock is held. */
bool wait_queue_wake_one(struct wait_queue *q);
void wait_queue_wake_all(struct wait_queue *q);

struct co_mutex {
    struct tiny_lock lock;
    bool held; /* Protected by lock, as the queue. */
    struct wait_queue queue;
};

void co_mutex_init(struct co_mutex *m);
/* 0, -ETIMEDOUT, or -ECANCELED: then it is not held. */
int co_fn co_mutex_lock_until(struct co_mutex *m, uint64_t deadline_ns);
/* Takes it whatever happens to the scope. */
void co_fn co_mutex_lock(struct co_mutex *m);
bool co_mutex_try_lock(struct co_mutex *m);
/* Hands it to the first waiter, if there is one. From any loop. */
void co_mutex_unlock(struct co_mutex *m);

/* Many readers or one writer. FIFO: a reader that comes after a waiting writer waits too. */
struct co_rwlock {
    struct tiny_lock lock;
    unsigned readers; /* Protected by lock, as all below. */
    bool writer;
    struct wait_queue queue;
};

void co_rwlock_init(struct co_rwlock *l);
void co_fn co_rwlock_read(struct co_rwlock *l);
void co_fn co_rwlock_write(struct co_rwlock *l);
void co_rwlock_read_done(struct co_rwlock *l);
void co_rwlock_write_done(struct co_rwlock *l);

#endif
