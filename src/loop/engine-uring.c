/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The io_uring engine: all I/O of a tick is submitted, and the next completions awaited, by one system call.
 *
 * URING-1 The ring belongs to the loop's thread alone (SINGLE_ISSUER), and completions are run only when that thread asks
 *         (DEFER_TASKRUN), where the kernel has these.
 * URING-2 One read of the mailbox's eventfd is always under way, so that messages end the wait.
 * URING-3 What the ring cannot do (open, stat, locks, seeking for holes, ...) goes to worker threads. Files that are not on a
 *         known local file system or block device get IOSQE_ASYNC, since their submission may sleep (L1).
 */
#include "base/alloc.h"
#include "base/macros.h"
#include "loop/loop-internal.h"
#include "loop/real.h"

#include <assert.h>
#include <errno.h>
#include <liburing.h>
#include <linux/falloc.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define RING_ENTRIES    256
#define RING_CQ_ENTRIES 4096

/* Tags of completions that are no operation's. */
#define TAG_IGNORED ((uint64_t)0)
#define TAG_WAKE    ((uint64_t)1)

struct uring {
    struct io_uring ring;
    bool deferred;   /* DEFER_TASKRUN: completions need a call to appear */
    bool wake_armed; /* URING-2 */
    uint64_t wake_value;
};

static int ring_init(struct uring *u)
{
    static const unsigned flags[] = {
        IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN,
        IORING_SETUP_COOP_TASKRUN | IORING_SETUP_TASKRUN_FLAG,
        0,
    };
    int r = -EINVAL;

    for (size_t i = 0; i < ARRAY_SIZE(flags) && r == -EINVAL; i++) {
        struct io_uring_params params = {
            .flags = flags[i] | IORING_SETUP_CQSIZE,
            .cq_entries = RING_CQ_ENTRIES,
        };

        r = io_uring_queue_init_params(RING_ENTRIES, &u->ring, &params);
        if (r == 0 && !(params.features & IORING_FEAT_EXT_ARG)) {
            io_uring_queue_exit(&u->ring); /* older than 5.11: no timeout in the wait */
            return -ENOSYS;
        }
        u->deferred = flags[i] & IORING_SETUP_DEFER_TASKRUN;
    }
    return r;
}

static int uring_start(struct loop *loop, struct error **err)
{
    struct uring *u = xnew(struct uring);
    int r = ring_init(u);

    if (r < 0) {
        free(u);
        return error_set(err, -r, "loop '%s': the kernel refuses io_uring: %s", loop->name,
                         strerror(-r));
    }
    (void)io_uring_register_ring_fd(&u->ring); /* only saves time */
    loop->engine_state = u;
    return 0;
}

static void uring_stop(struct loop *loop)
{
    struct uring *u = loop->engine_state;

    io_uring_queue_exit(&u->ring);
    free(u);
}

static struct io_uring_sqe *get_sqe(struct uring *u)
{
    struct io_uring_sqe *sqe = io_uring_get_sqe(&u->ring);

    while (unlikely(!sqe)) {
        int r = io_uring_submit(&u->ring);

        assert(r >= 0 || r == -EAGAIN || r == -EBUSY || r == -EINTR);
        sqe = io_uring_get_sqe(&u->ring);
    }
    return sqe;
}

static void arm_wake(struct loop *loop, struct uring *u)
{
    struct io_uring_sqe *sqe;

    if (likely(u->wake_armed))
        return;
    sqe = get_sqe(u);
    io_uring_prep_poll_add(sqe, loop->mailbox->wake_fd, POLLIN);
    io_uring_sqe_set_data64(sqe, TAG_WAKE);
    u->wake_armed = true;
}

static void reap_one(struct loop *loop, struct uring *u, const struct io_uring_cqe *cqe)
{
    struct io_op *op;
    int64_t result = cqe->res;

    if (cqe->user_data == TAG_IGNORED)
        return;
    if (cqe->user_data == TAG_WAKE) {
        (void)!read(loop->mailbox->wake_fd, &u->wake_value, sizeof(u->wake_value));
        u->wake_armed = false;
        return;
    }
    op = (struct io_op *)(uintptr_t)cqe->user_data;
    if (op->kind == IO_ACCEPT && result >= 0) {
        *op->ret_socket = real_socket_new(loop->engine, (int)result);
        result = 0;
    }
    op_complete(op, result);
}

static void reap(struct loop *loop, struct uring *u)
{
    struct io_uring_cqe *cqe;
    unsigned head;
    unsigned n = 0;

    io_uring_for_each_cqe(&u->ring, head, cqe)
    {
        reap_one(loop, u, cqe);
        n++;
    }
    io_uring_cq_advance(&u->ring, n);
}

static void uring_poll(struct loop *loop, uint64_t deadline_ns)
{
    struct uring *u = loop->engine_state;
    struct __kernel_timespec ts;
    struct io_uring_cqe *cqe;

    arm_wake(loop, u);
    loop->counters.system_calls++;
    if (deadline_ns == 0) {
        if (u->deferred && (loop->live_ops || io_uring_sq_ready(&u->ring)))
            (void)io_uring_submit_and_get_events(&u->ring);
        else if (io_uring_sq_ready(&u->ring))
            (void)io_uring_submit(&u->ring);
    } else if (deadline_ns == LOOP_FOREVER) {
        (void)io_uring_submit_and_wait(&u->ring, 1);
    } else {
        uint64_t now = real_clock(loop);
        uint64_t ns = deadline_ns > now ? deadline_ns - now : 0;

        ts.tv_sec = (long long)(ns / NS_PER_S);
        ts.tv_nsec = (long long)(ns % NS_PER_S);
        (void)io_uring_submit_and_wait_timeout(&u->ring, &cqe, 1, &ts, NULL);
    }
    /* Errors (EINTR, ETIME, EAGAIN, EBUSY) need no treatment: what was not submitted stays queued for the next tick. */
    reap(loop, u);
}

static void prep_transfer(struct io_uring_sqe *sqe, struct io_op *op)
{
    bool write = op->kind == IO_WRITE;
    int flags = op->durable ? RWF_DSYNC : 0;

    if (op->iov_count == 1 && write) {
        io_uring_prep_write(sqe, op->file->fd, op->iov->iov_base, (unsigned)op->iov->iov_len,
                            op->offset);
        sqe->rw_flags = flags;
    } else if (op->iov_count == 1) {
        io_uring_prep_read(sqe, op->file->fd, op->iov->iov_base, (unsigned)op->iov->iov_len,
                           op->offset);
    } else if (write) {
        io_uring_prep_writev2(sqe, op->file->fd, op->iov, (unsigned)op->iov_count, op->offset,
                              flags);
    } else {
        io_uring_prep_readv(sqe, op->file->fd, op->iov, (unsigned)op->iov_count, op->offset);
    }
}

/* Does the ring take it? A block device's discard and zero are ioctls. */
static bool on_ring(const struct io_op *op)
{
    switch (op->kind) {
    case IO_READ:
    case IO_WRITE:
    case IO_SYNC:
    case IO_ALLOCATE:
    case IO_ACCEPT:
    case IO_RECV:
    case IO_SEND:
        return true;
    case IO_PUNCH:
    case IO_ZERO:
        return op->file->info.type != FILE_TYPE_BLOCK;
    case IO_COPY:
    case IO_TRUNCATE:
    case IO_EXTENTS:
    case IO_STAT:
    case IO_LOCK:
    case IO_LOCK_TEST:
    case IO_OPEN:
    case IO_CLOSE:
    case IO_RENAME:
    case IO_UNLINK:
    case IO_SYNC_DIR:
    case IO_RESOLVE:
    case IO_COMPUTE:
    case IO_LISTEN:
    case IO_CONNECT:
        break;
    }
    return false;
}

static void prep_send(struct io_uring_sqe *sqe, struct io_op *op)
{
    struct msghdr *msg = (struct msghdr *)(void *)op->msghdr_space;

    static_assert(sizeof(*msg) <= sizeof(op->msghdr_space), "it is kept there");
    memset(msg, 0, sizeof(*msg));
    msg->msg_iov = (struct iovec *)(uintptr_t)op->iov;
    msg->msg_iovlen = (size_t)op->iov_count;
    io_uring_prep_sendmsg(sqe, op->socket->fd, msg, MSG_NOSIGNAL);
}

/* Of an operation that is on_ring(). */
static void prep(struct io_uring_sqe *sqe, struct io_op *op)
{
    int mode = op->kind == IO_PUNCH  ? FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
               : op->kind == IO_ZERO ? FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE
                                     : 0;

    switch ((int)op->kind) {
    case IO_READ:
    case IO_WRITE:
        prep_transfer(sqe, op);
        break;
    case IO_SYNC:
        io_uring_prep_fsync(sqe, op->file->fd, IORING_FSYNC_DATASYNC);
        break;
    case IO_PUNCH:
    case IO_ZERO:
    case IO_ALLOCATE:
        io_uring_prep_fallocate(sqe, op->file->fd, mode, (off_t)op->offset, (off_t)op->len);
        break;
    case IO_ACCEPT:
        io_uring_prep_accept(sqe, op->socket->fd, NULL, NULL, SOCK_CLOEXEC);
        break;
    case IO_RECV:
        io_uring_prep_recv(sqe, op->socket->fd, op->iov->iov_base, op->iov->iov_len, 0);
        break;
    case IO_SEND:
        prep_send(sqe, op);
        break;
    }
}

static void uring_submit(struct io_op *op)
{
    struct uring *u = op->loop->engine_state;
    struct io_uring_sqe *sqe;

    if (!on_ring(op)) { /* URING-3 */
        real_submit_to_worker(op);
        return;
    }
    sqe = get_sqe(u);
    prep(sqe, op);
    if (op->file && op->file->needs_async)
        sqe->flags |= IOSQE_ASYNC; /* L1 */
    io_uring_sqe_set_data64(sqe, (uint64_t)(uintptr_t)op);
}

static void uring_cancel(struct io_op *op)
{
    struct uring *u = op->loop->engine_state;
    struct io_uring_sqe *sqe;

    if (!on_ring(op))
        return;
    sqe = get_sqe(u);
    io_uring_prep_cancel64(sqe, (uint64_t)(uintptr_t)op, 0);
    io_uring_sqe_set_data64(sqe, TAG_IGNORED);
}

const struct engine engine_io_uring = {
    .name = "io_uring",
    .eventfds = true,
    .start = uring_start,
    .stop = uring_stop,
    .poll = uring_poll,
    .wake = real_wake,
    .inline_rw = real_inline_rw,
    .try_inline = real_try_inline,
    .submit = uring_submit,
    .cancel = uring_cancel,
    .clock = real_clock,
    .wall_clock = real_wall_clock,
    .random = real_random,
    .thread_start = real_thread_start,
    .thread_report = real_thread_report,
    .thread_join = real_thread_join,
    .file_close = real_file_close,
    .socket_try_send = real_socket_try_send,
    .socket_try_recv = real_socket_try_recv,
    .socket_shutdown = real_socket_shutdown,
    .socket_close = real_socket_close,
};
