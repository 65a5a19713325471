/* SPDX-License-Identifier: Apache-2.0 */
/* Operations: their pool, waiting for one, and leaving one that cannot be called off (G8). */
#include "loop/op.h"
#include "base/alloc.h"
#include "base/atomic.h"
#include "base/macros.h"
#include "loop/loop-internal.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

struct io_op *op_new(enum io_op_kind kind)
{
    struct loop *loop = loop_self();
    struct io_op *op = loop->free_ops;

    if (likely(op)) {
        loop->free_ops = op->next;
    } else {
        op = try_new(struct io_op);
        if (!op)
            return NULL;
    }
    op->kind = kind;
    op->loop = loop;
    op->next = NULL;
    return op;
}

/* Back to the pool, as op_new() promises it. */
static void op_free(struct io_op *op)
{
    struct loop *loop = op->loop;

    memset(op, 0, sizeof(*op));
    op->next = loop->free_ops;
    loop->free_ops = op;
}

void op_pool_release(struct loop *loop)
{
    while (loop->free_ops) {
        struct io_op *op = loop->free_ops;

        loop->free_ops = op->next;
        free(op);
    }
}

/* A file that is worked on by an operation whose waiter has left. */
static void hold_on(struct file *f)
{
    if (!f)
        return;
    file_ref(f);
    atomic_add(&f->detached, 1u);
}

static void let_go(struct file *f)
{
    if (!f)
        return;
    atomic_sub(&f->detached, 1u);
    file_unref(f);
}

void op_complete(struct io_op *op, int64_t result)
{
    struct loop *loop = op->loop;

    assert(loop == loop_self() && loop->live_ops);
    loop->live_ops--;
    op->result = result;
    if (op->is_sync)
        file_sync_end(op, result);
    if (!op->detached) {
        co_wait_end(&op->wait, 0);
        return;
    }
    op->hold = iobuf_unref(op->hold);
    let_go(op->file);
    let_go(op->source);
    op_free(op);
}

/* The waiter wants to leave: at once if the operation can live without it, else when it has ended. */
static bool op_cancel(struct co_wait *w)
{
    struct io_op *op = container_of(w, struct io_op, wait);

    loop_self()->engine->cancel(op);
    if (!op->owns_memory || op->wait.ended)
        return false;
    op->detached = true; /* G8 */
    if (op->hold)
        iobuf_ref(op->hold);
    hold_on(op->file);
    hold_on(op->source);
    op->loop->counters.detached_ops++;
    return true;
}

int64_t op_co_run(struct io_op *op, uint64_t deadline_ns)
{
    struct loop *loop = op->loop;
    int64_t result;
    int r;

    if (loop->engine->try_inline(op)) {
        loop->counters.inline_ops++;
        result = op->result;
        if (op->is_sync)
            file_sync_end(op, result);
        op_free(op);
        return result;
    }
    co_wait_init(&op->wait, op_cancel);
    loop->live_ops++;
    loop->counters.engine_ops++;
    loop->engine->submit(op);
    r = co_wait(&op->wait, deadline_ns);
    if (r < 0)
        return r; /* detached: the operation frees itself */
    result = op->result;
    op_free(op);
    if (unlikely(result == -ECANCELED)) {
        r = co_cancelled();
        return r ? r : -ETIMEDOUT;
    }
    return result;
}
