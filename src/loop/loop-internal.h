/* SPDX-License-Identifier: Apache-2.0 */
/* What the parts of src/loop know of each other: the loop's fields and the engine's table. */
#ifndef CAIRN_LOOP_INTERNAL_H
#define CAIRN_LOOP_INTERNAL_H

#include "base/list.h"
#include "base/macros.h"
#include "loop/co.h"
#include "loop/fiber.h"
#include "loop/lock.h"
#include "loop/loop.h"
#include "loop/op.h"
#include "loop/scope.h"

struct worker_pool;
struct loop_mailbox;

/*
 * An engine: how a loop waits and does I/O. All calls are made on the loop's own thread. The real engines share what is in
 * real.h; `sim` is a world of its own.
 */
struct engine {
    const char *name;
    bool eventfds; /* its loops sleep on their mailbox's eventfd */

    /* On the thread that will run the loop. */
    int (*start)(struct loop *loop, struct error **err);
    void (*stop)(struct loop *loop);

    /* Submits everything, reaps completions; sleeps until there is one, a wake or the deadline. 0: never sleeps. */
    void (*poll)(struct loop *loop, uint64_t deadline_ns);
    /* Ends the poll under way, or the next one, of the loop with this mailbox; from any thread. The loop may be gone. */
    void (*wake)(struct loop_mailbox *box);
    /* Puts loop->ready into the order in which this tick runs it. NULL: as they became ready. */
    void (*order_ready)(struct loop *loop);

    /*
     * Reads or writes at once what need not wait for a disk (L2): the number of bytes, perhaps fewer than asked for, an
     * error, or -EAGAIN to take the long way.
     */
    int64_t (*inline_rw)(struct file *f, bool write, uint64_t offset, const struct iovec *iov,
                         int iov_count);
    /* The same for all other operations: sets op->result and returns true, or false. */
    bool (*try_inline)(struct io_op *op);
    void (*submit)(struct io_op *op);
    /* Asks for an early end, with -ECANCELED or what the operation came to. May do nothing. */
    void (*cancel)(struct io_op *op);

    uint64_t (*clock)(struct loop *loop);
    uint64_t (*wall_clock)(struct loop *loop);
    void (*random)(struct loop *loop, void *ret_bytes, size_t len);

    /* Runs loop_thread_main(t) on a new thread; returns when that has reported that its loop stands, or has failed. */
    int (*thread_start)(struct loop_thread *t, struct error **err);
    void (*thread_report)(struct loop_thread *t);
    /* Waits for its end; in a coroutine or not. */
    void (*thread_join)(struct loop_thread *t);

    void (*file_close)(struct file *f);
    int64_t (*socket_try_send)(struct socket *s, const struct iovec *iov, int iov_count);
    int64_t (*socket_try_recv)(struct socket *s, void *buf, size_t len);
    void (*socket_shutdown)(struct socket *s);
    void (*socket_close)(struct socket *s);
};

extern const struct engine engine_io_uring;
extern const struct engine engine_threads;

/* How long one tick may spend on inline I/O, and how much one request may move (L2). */
#define INLINE_TICK_NS   (200 * NS_PER_US)
#define INLINE_MAX_BYTES ((size_t)64 << 10)

/*
 * Where other threads reach a loop. Mailboxes are static, one per loop index, and their eventfd stays open: a sender may be
 * about to wake a loop that has just ended.
 */
struct loop_mailbox {
    struct loop_message *newest; /* a stack */
    int wake_fd;
} __attribute__((aligned(CACHE_LINE)));

struct loop {
    /* Set at start, then constant. */
    const struct engine *engine;
    struct loop_mailbox *mailbox;
    unsigned index;
    char name[16];
    struct fiber fiber; /* the loop's own stack */

    /* Only touched on the loop's thread. */
    uint64_t now_ns;
    uint64_t tick_ns;    /* when this tick began: the inline budget counts from here */
    struct list ready;   /* struct co */
    struct list all_cos; /* struct co, those in the pool too */
    struct list hooks;   /* struct loop_hook */
    struct timer_heap timers;
    struct co *current;
    struct co *free_cos;
    unsigned free_co_count;
    struct io_op *free_ops;
    struct iobuf *free_bufs[16];
    size_t free_buf_bytes;
    bool stopping;
    unsigned live_ops; /* given to engine or workers, not complete */
    struct loop_counters counters;
    void *engine_state;
};

struct loop_thread {
    struct loop *loop;
    const struct engine *engine;
    char name[16];
    struct error *start_error;
    int start_result;
    void *engine_data; /* the engine's handle of the thread */
};

/* A socket of any engine. */
struct socket {
    const struct engine *engine;
    int fd;
    unsigned port;
    char *name;
    char *unlink_path;
    struct io_op *recv_op; /* waiting for readiness: threads engine */
    struct io_op *send_op;
    struct loop *registered; /* with this loop's epoll: threads engine */
    bool listens;            /* sim engine, as below */
    void *sim;
};

/*
 * Who asks for data on stable storage, and who gets to know of the failure: the kernel tells of lost pages once per open file,
 * to the sync that asks first, and the next one succeeds without them. So one failure is final for all who ask later, and a
 * success counts only when nothing else that might have been told is still under way.
 *
 * SYNC-1 One sync at a time. Whoever asks meanwhile waits for the next one, which serves all of them.
 * SYNC-2 Durable writes are told as well. They are counted in the half of the current turn; a sync that succeeds begins a new
 *        turn and waits for those of the old one.
 * SYNC-3 Results are noted where operations complete, so that those whose waiters have left count too.
 */
struct file_sync {
    struct tiny_lock lock;
    /* Protected by lock. */
    struct wait_queue queue;
    bool running;   /* a sync, or the wait for durable writes after it: then */
    bool settling;  /* is true too */
    uint64_t begun; /* syncs, ever */
    uint64_t done;  /* the newest that has succeeded */
    unsigned turn;
    unsigned writes[2]; /* durable ones under way, by turn & 1 */
    int error;          /* of the first that failed: final */
};

struct file {
    const struct engine *engine;
    uint32_t refs;     /* atomic */
    uint32_t detached; /* atomic */
    int fd;
    unsigned flags;
    bool on_tmpfs;    /* inline I/O is memory copies (L2) */
    bool needs_async; /* not on a known local file system: its I/O may sleep in submission (L1) */
    bool nowait;      /* RWF_NOWAIT reads may hit the page cache (L2) */
    char *path;
    struct file_info info;
    struct worker_pool *workers;
    void *sim;
    struct file_sync sync;
};

/* Makes the loop of the calling thread, with this engine. */
int loop_new(struct loop **ret, const struct engine *engine, const char *name, void *engine_state,
             struct error **err);
/* False: it stays until the process ends, since the kernel still holds operations of it. */
bool loop_free(struct loop *loop);
/* For a simulated process that dies: forgets loop and coroutines, wherever they stand, with their stacks and pools. */
void loop_abandon(struct loop *loop);
/* As loop_run_main(), with any engine. */
int loop_run_on(const struct engine *engine, const char *name, void *engine_state,
                co_entry_fn *main_fn, void *arg, struct error **err);
/* Runs until loop->stopping and nothing is ready. */
void loop_run(struct loop *loop);
/* One tick; sleeps if nothing is ready and the loop shall not stop. */
void loop_tick(struct loop *loop);
void loop_set_self(struct loop *loop);
/* The body of a loop thread: makes the loop, reports in, runs it, frees it as loop_free() does. */
bool loop_thread_main(struct loop_thread *t);

/* The engine that a new loop of the calling thread would use. */
const struct engine *loop_engine_of(enum loop_engine engine);

/* The coroutine's side (co.c). */
void co_make_ready(struct co *co);
void co_run_ready(struct loop *loop);
void co_pool_release(struct loop *loop);
void co_abandon_all(struct loop *loop);
struct fiber *co_current_fiber(struct loop *loop);

/* The operations' and buffers' pools (op.c, iobuf.c). */
void op_pool_release(struct loop *loop);
void iobuf_pool_release(struct loop *loop);

/* Syncs and durable writes (file-sync.c): around each of them; its file is alive. */
void file_sync_init(struct file_sync *s);
void file_sync_begin(struct io_op *op);
void file_sync_end(const struct io_op *op, int64_t result);

/* Frees what a closed file or socket is made of. */
void file_release(struct file *f);

struct co {
    struct fiber fiber;
    struct fiber *caller; /* who gets control at the next suspend */
    struct loop *loop;
    co_entry_fn *entry;
    void *arg;
    struct co_scope *scope;
    struct list scope_link;
    struct list ready_link;
    struct list all_link;
    struct co_wait *wait; /* what it is suspended in */
    int wait_result;      /* of the last one that ended */
    unsigned shield;
    bool interrupted;
    bool ready;
    struct co *next_free;
    void *map;
    size_t map_size;
};

#endif
