/* SPDX-License-Identifier: Apache-2.0 */
/* What the engines on a real kernel share: clocks, threads, inline file I/O (L2), the way to the workers. */
#include "loop/real.h"
#include "base/alloc.h"
#include "base/macros.h"
#include "loop/workers.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>
#include <unistd.h>

static uint64_t clock_ns(clockid_t id)
{
    struct timespec t;

    clock_gettime(id, &t);
    return (uint64_t)t.tv_sec * NS_PER_S + (uint64_t)t.tv_nsec;
}

uint64_t real_clock(struct loop *loop)
{
    (void)loop;
    return clock_ns(CLOCK_MONOTONIC);
}

uint64_t real_wall_clock(struct loop *loop)
{
    (void)loop;
    return clock_ns(CLOCK_REALTIME);
}

void real_random(struct loop *loop, void *ret_bytes, size_t len)
{
    char *p = ret_bytes;

    (void)loop;
    while (len) {
        ssize_t n = getrandom(p, len, 0);

        if (n < 0) {
            if (errno == EINTR)
                continue;
            abort(); /* the kernel has it since 3.17; without randomness nothing here is safe */
        }
        p += n;
        len -= (size_t)n;
    }
}

void real_wake(struct loop_mailbox *box)
{
    const uint64_t one = 1;

    (void)!write(box->wake_fd, &one, sizeof(one)); /* LOOP-2; it cannot overflow */
}

enum thread_end {
    THREAD_RUNS,
    THREAD_ENDS,
    THREAD_HANGS, /* within its exit, for as long as the host likes; its struct real_thread is left */
};

/* The starter waits until the loop stands or has failed, the joiner until it has run. */
struct real_thread {
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t news;
    bool reported;       /* Protected by lock. */
    enum thread_end end; /* Protected by lock. */
};

static void *thread_main(void *arg)
{
    struct loop_thread *t = arg;

    struct real_thread *rt = t->engine_data;
    bool freed;

    (void)pthread_setname_np(pthread_self(), t->name); /* for debuggers; nothing depends on it */
    freed = loop_thread_main(t);
    pthread_mutex_lock(&rt->lock);
    rt->end = freed ? THREAD_ENDS : THREAD_HANGS;
    pthread_cond_signal(&rt->news);
    pthread_mutex_unlock(&rt->lock);
    return NULL;
}

void real_thread_report(struct loop_thread *t)
{
    struct real_thread *rt = t->engine_data;

    pthread_mutex_lock(&rt->lock);
    rt->reported = true;
    pthread_cond_signal(&rt->news);
    pthread_mutex_unlock(&rt->lock);
}

static void real_thread_free(struct real_thread *rt)
{
    pthread_mutex_destroy(&rt->lock);
    pthread_cond_destroy(&rt->news);
    free(rt);
}

int real_thread_start(struct loop_thread *t, struct error **err)
{
    struct real_thread *rt = xnew(struct real_thread);
    sigset_t all;
    sigset_t before;
    int r;

    pthread_mutex_init(&rt->lock, NULL);
    pthread_cond_init(&rt->news, NULL);
    t->engine_data = rt;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are the main thread's business */
    r = pthread_create(&rt->thread, NULL, thread_main, t);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (r) {
        real_thread_free(rt);
        return error_set(err, r, "cannot start thread '%s': %s", t->name, strerror(r));
    }
    pthread_mutex_lock(&rt->lock);
    while (!rt->reported)
        pthread_cond_wait(&rt->news, &rt->lock);
    pthread_mutex_unlock(&rt->lock);
    if (t->start_result < 0) {
        pthread_join(rt->thread, NULL);
        real_thread_free(rt);
        error_move(err, &t->start_error);
        return t->start_result;
    }
    return 0;
}

void real_thread_join(struct loop_thread *t)
{
    struct real_thread *rt = t->engine_data;
    bool hangs;

    pthread_mutex_lock(&rt->lock);
    while (rt->end == THREAD_RUNS)
        pthread_cond_wait(&rt->news, &rt->lock);
    hangs = rt->end == THREAD_HANGS;
    pthread_mutex_unlock(&rt->lock);
    /* P4: its exit waits for the ring's own threads, and one of those may be stuck in a write. */
    if (hangs) {
        (void)pthread_detach(rt->thread);
        return;
    }
    pthread_join(rt->thread, NULL);
    real_thread_free(rt);
}

/* L2: memory copies on tmpfs, and page-cache hits that the kernel promises not to sleep for. */
int64_t real_inline_rw(struct file *f, bool write, uint64_t offset, const struct iovec *iov,
                       int iov_count)
{
    struct loop *loop = loop_self();
    struct iovec first;
    int64_t n;

    if (f->on_tmpfs) {
        if (iov->iov_len > INLINE_MAX_BYTES) {
            first = (struct iovec){iov->iov_base, INLINE_MAX_BYTES};
            iov = &first;
            iov_count = 1;
        }
        if (iov_count == 1)
            n = write ? pwrite(f->fd, iov->iov_base, iov->iov_len, (off_t)offset)
                      : pread(f->fd, iov->iov_base, iov->iov_len, (off_t)offset);
        else
            n = write ? pwritev(f->fd, iov, iov_count, (off_t)offset)
                      : preadv(f->fd, iov, iov_count, (off_t)offset);
    } else if (f->nowait && !write && iov->iov_len <= INLINE_MAX_BYTES && iov_count == 1 &&
               loop->now_ns - loop->tick_ns < INLINE_TICK_NS) {
        n = preadv2(f->fd, iov, iov_count, (off_t)offset, RWF_NOWAIT);
        if (n < 0 && errno == EOPNOTSUPP) {
            f->nowait = false;
            return -EAGAIN;
        }
    } else {
        return -EAGAIN;
    }
    loop->now_ns = clock_ns(CLOCK_MONOTONIC);
    return n < 0 ? -errno : n;
}

bool real_try_inline(struct io_op *op)
{
    struct loop *loop = op->loop;

    switch (op->kind) {
    case IO_SYNC:
    case IO_PUNCH:
    case IO_ZERO:
    case IO_TRUNCATE:
    case IO_EXTENTS:
    case IO_STAT:
    case IO_LOCK:
    case IO_LOCK_TEST:
        if (!op->file->on_tmpfs || loop->now_ns - loop->tick_ns >= INLINE_TICK_NS)
            return false;
        op->result = op_blocking(op);
        loop->now_ns = clock_ns(CLOCK_MONOTONIC);
        return true;
    default:
        return false;
    }
}

static void worker_refused(struct loop_message *m)
{
    op_complete(container_of(m, struct io_op, message), -EAGAIN);
}

void real_submit_to_worker(struct io_op *op)
{
    /* L1: a copy is of two files, and neither may take the other's workers. */
    bool of_one_file = op->file && op->kind != IO_COPY;
    int r = of_one_file ? worker_submit(op->file->workers, op) : worker_submit_elsewhere(op);

    if (r < 0) {
        op->message.fn = worker_refused;
        loop_post(op->loop, &op->message);
    }
}

void real_file_close(struct file *f)
{
    if (f->fd >= 0)
        close(f->fd);
    f->fd = -1;
}
