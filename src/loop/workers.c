/* SPDX-License-Identifier: Apache-2.0 */
/* Pools of worker threads. */
#include "loop/workers.h"
#include "base/alloc.h"
#include "base/macros.h"
#include "loop/loop-internal.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#define IDLE_SECONDS 2

struct worker_pool {
    pthread_mutex_t lock;
    pthread_cond_t more;
    /* All below: protected by lock. */
    struct io_op *first;
    struct io_op **last;
    unsigned max_threads;
    unsigned threads;
    unsigned idle;
    unsigned queued;
    bool closed; /* the last thread frees the pool */
};

struct worker_pool *worker_pool_new(unsigned max_threads)
{
    struct worker_pool *p = xnew(struct worker_pool);
    pthread_condattr_t attr;

    pthread_mutex_init(&p->lock, NULL);
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&p->more, &attr);
    pthread_condattr_destroy(&attr);
    p->last = &p->first;
    p->max_threads = max_threads;
    return p;
}

static void pool_destroy(struct worker_pool *p)
{
    pthread_cond_destroy(&p->more);
    pthread_mutex_destroy(&p->lock);
    free(p);
}

struct worker_pool *worker_pool_free(struct worker_pool *p)
{
    bool last;

    if (!p)
        return NULL;
    pthread_mutex_lock(&p->lock);
    p->closed = true;
    last = !p->threads;
    pthread_cond_broadcast(&p->more);
    pthread_mutex_unlock(&p->lock);
    if (last)
        pool_destroy(p);
    return NULL;
}

static void worker_done(struct loop_message *m)
{
    struct io_op *op = container_of(m, struct io_op, message);

    op_complete(op, (int64_t)op->engine_data);
}

/* Waits for work; NULL when the thread should end. */
static struct io_op *next_op_locked(struct worker_pool *p)
{
    struct timespec until;

    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += IDLE_SECONDS;
    while (!p->first) {
        int r = 0;

        if (p->closed)
            return NULL;
        p->idle++;
        r = pthread_cond_timedwait(&p->more, &p->lock, &until);
        p->idle--;
        if (r == ETIMEDOUT && !p->first)
            return NULL;
    }
    struct io_op *op = p->first;

    p->first = op->next;
    p->queued--;
    if (!p->first)
        p->last = &p->first;
    op->next = NULL;
    return op;
}

static void *worker_main(void *arg)
{
    struct worker_pool *p = arg;
    struct io_op *op;
    bool last;

    pthread_mutex_lock(&p->lock);
    while ((op = next_op_locked(p))) {
        pthread_mutex_unlock(&p->lock);
        op->engine_data = (uint64_t)op_blocking(op);
        op->message.fn = worker_done;
        loop_post(op->loop, &op->message);
        pthread_mutex_lock(&p->lock);
    }
    last = --p->threads == 0 && p->closed;
    pthread_mutex_unlock(&p->lock);
    if (last)
        pool_destroy(p);
    return NULL;
}

/* Signals are the main thread's business. */
static int start_thread(struct worker_pool *p)
{
    sigset_t all;
    sigset_t before;
    pthread_attr_t attr;
    pthread_t thread;
    int r;

    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_attr_init(&attr);
    pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED);
    pthread_attr_setstacksize(&attr, (size_t)256 << 10);
    r = pthread_create(&thread, &attr, worker_main, p);
    pthread_attr_destroy(&attr);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return -r;
}

int worker_submit(struct worker_pool *p, struct io_op *op)
{
    unsigned idle = 0;
    int r = 0;

    pthread_mutex_lock(&p->lock);
    if (p->queued >= p->idle && p->threads < p->max_threads) {
        r = start_thread(p);
        if (r == 0)
            p->threads++;
        else if (p->threads)
            r = 0; /* one of those that there are will do it */
    }
    if (r == 0) {
        op->loop->counters.worker_ops++;
        op->next = NULL;
        p->queued++;
        *p->last = op;
        p->last = &op->next;
        idle = p->idle;
    }
    pthread_mutex_unlock(&p->lock);
    /* Now, or who wakes would wait for the lock. The pool is there as long as the operation is, which ends on this thread. */
    if (idle)
        pthread_cond_signal(&p->more);
    return r;
}

/* Lives as long as the process. */
static struct worker_pool *computing_pool;
static pthread_once_t computing_once = PTHREAD_ONCE_INIT;

static void make_computing_pool(void)
{
    long processors = sysconf(_SC_NPROCESSORS_ONLN);

    computing_pool = worker_pool_new(processors > 0 ? (unsigned)processors : 1);
}

int worker_submit_elsewhere(struct io_op *op)
{
    struct worker_pool *p;
    int r;

    if (op->kind == IO_COMPUTE && !op->alone) {
        (void)pthread_once(&computing_once, make_computing_pool);
        return worker_submit(computing_pool, op);
    }
    p = worker_pool_new(1);
    r = worker_submit(p, op);

    worker_pool_free(p);
    return r;
}
