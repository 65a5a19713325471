/* SPDX-License-Identifier: Apache-2.0 */
/* Syncs of files, and failures that are not forgotten; the design is at struct file_sync. */
#include "base/atomic.h"
#include "loop/file.h"
#include "loop/loop-internal.h"
#include "loop/op.h"

#include <errno.h>

void file_sync_init(struct file_sync *s)
{
    *s = (struct file_sync){.begun = 0};
    wait_queue_init(&s->queue);
}

void file_sync_begin(struct io_op *op)
{
    struct file_sync *s = &op->file->sync;

    op->is_sync = true;
    if (op->kind == IO_SYNC)
        return; /* file_co_sync() has counted it */
    tiny_lock_acquire(&s->lock);
    op->sync_turn = s->turn & 1;
    s->writes[op->sync_turn]++;
    tiny_lock_release(&s->lock);
}

/*
 * Has it cost data that others wrote? Not if it was never carried out. A durable write takes other data with it only through
 * the page cache; a lack of space is its own.
 */
static bool is_final(const struct io_op *op, int64_t result)
{
    if (result >= 0 || result == -ECANCELED || result == -ENOMEM || result == -EAGAIN ||
        result == -EINTR)
        return false;
    return op->kind == IO_SYNC || (!(op->file->flags & FILE_DIRECT) && result == -EIO);
}

static void settle_locked(struct file_sync *s)
{
    s->done = s->begun;
    s->running = false;
    s->settling = false;
}

static void sync_ended_locked(struct file_sync *s, int64_t result)
{
    unsigned old = s->turn & 1;

    if (result < 0) {
        s->running = false;
        return;
    }
    s->turn++;
    s->settling = true;
    if (!s->writes[old])
        settle_locked(s);
}

static void write_ended_locked(struct file_sync *s, unsigned turn)
{
    s->writes[turn]--;
    if (s->settling && turn != (s->turn & 1) && !s->writes[turn])
        settle_locked(s);
}

void file_sync_end(const struct io_op *op, int64_t result)
{
    struct file_sync *s = &op->file->sync;

    tiny_lock_acquire(&s->lock);
    if (is_final(op, result) && !s->error)
        s->error = (int)result;
    if (op->kind == IO_SYNC)
        sync_ended_locked(s, result);
    else
        write_ended_locked(s, op->sync_turn);
    if (!s->running)
        wait_queue_wake_all(&s->queue);
    tiny_lock_release(&s->lock);
}

/* Carries one out. */
static int co_fn run_sync(struct file *f)
{
    struct io_op *op = op_new(IO_SYNC);

    if (!op) {
        tiny_lock_acquire(&f->sync.lock);
        f->sync.running = false;
        wait_queue_wake_all(&f->sync.queue);
        tiny_lock_release(&f->sync.lock);
        return -ENOMEM;
    }
    op->file = f;
    op->owns_memory = true;
    file_sync_begin(op);
    return (int)op_co_run(op, LOOP_FOREVER);
}

int file_co_sync(struct file *f)
{
    struct file_sync *s = &f->sync;
    uint64_t need;
    int r = 0;

    tiny_lock_acquire(&s->lock);
    need = s->begun + 1; /* one under way may have passed our data by */
    while (!s->error && s->done < need) {
        if (s->running) {
            r = wait_queue_wait(&s->queue, &s->lock, LOOP_FOREVER);
        } else {
            s->running = true;
            s->begun++;
            tiny_lock_release(&s->lock);
            r = run_sync(f);
        }
        if (r < 0)
            return r;
        tiny_lock_acquire(&s->lock);
    }
    r = s->error;
    tiny_lock_release(&s->lock);
    return r;
}
