/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The event loop, one per thread. Coroutines run on it, messages from other threads arrive at it, its engine does its I/O.
 *
 * A tick: run what is ready; run the hooks that were deferred to the end of the tick; submit all I/O with one system call
 * and reap what is complete; take messages; fire timers. Time, randomness, threads, files and sockets are reached through
 * src/loop alone (S1), so that all of it runs under the `sim` engine.
 */
#ifndef CAIRN_LOOP_LOOP_H
#define CAIRN_LOOP_LOOP_H

#include "base/error.h"
#include "base/list.h"
#include "loop/timer.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* The most loops in one process; loop_index() is below it. */
#define LOOP_MAX 64

/* "Never", as a deadline. */
#define LOOP_FOREVER UINT64_MAX

enum loop_engine {
    LOOP_ENGINE_AUTO,     /* io_uring, or threads where io_uring is refused */
    LOOP_ENGINE_IO_URING, /* fails where the kernel refuses it */
    LOOP_ENGINE_THREADS,  /* epoll for sockets, worker threads for files */
    LOOP_ENGINE_SIM, /* virtual time and a simulated machine; tests only, through loop/sim/sim.h */
};

struct loop;

/* The calling thread's loop; NULL on a thread without one. */
struct loop *loop_self(void);

/* A small number that no other live loop has: index of per-loop slots. Constant. */
unsigned loop_index(const struct loop *loop);
/* "io_uring", "threads" or "sim". */
const char *loop_engine_name(const struct loop *loop);
const char *loop_name(const struct loop *loop);

/*
 * Monotonic time in ns. loop_now() is the time when the tick began or the clock was last read; loop_clock() reads the clock.
 * Both on the calling thread's loop.
 */
uint64_t loop_now(void);
uint64_t loop_clock(void);
/* Wall-clock time: ns since 1970. For what a user sees, never for deadlines. */
uint64_t loop_wall_clock(void);
/* Seeded under sim, else from the kernel. */
void loop_random(void *ret_bytes, size_t len);

/*
 * Threads. A loop thread runs a loop until loop_thread_stop(). Under sim it is a loop of the same simulated process.
 */
struct loop_thread;

/* Starts a thread whose loop has the same engine as the caller's loop. `name` is copied, at most 15 characters shown. */
int loop_thread_start(struct loop_thread **ret, const char *name, struct error **err);
struct loop *loop_thread_loop(struct loop_thread *t);
/* Stops the loop when it has nothing left to run, joins, frees. Yields when called from a coroutine. Returns NULL. */
struct loop_thread *loop_thread_stop(struct loop_thread *t);

/*
 * Makes a loop on the calling thread, runs main_fn(arg) in a coroutine on it until it returns, frees the loop. All
 * coroutines that main_fn started must have ended by then.
 */
typedef void co_entry_fn(void *arg);
int loop_run_main(enum loop_engine engine, const char *name, co_entry_fn *main_fn, void *arg,
                  struct error **err);

/*
 * Messages: fn(m) is called on the loop's thread, outside of coroutines; it must not block. The sender keeps *m valid until
 * then. Messages of one sender arrive in order. From any thread.
 */
struct loop_message;
typedef void loop_message_fn(struct loop_message *m);

struct loop_message {
    struct loop_message *next;
    loop_message_fn *fn;
};

void loop_post(struct loop *to, struct loop_message *m);

/* A hook that runs once at the end of the current tick, before the loop may sleep. Adding it twice is the same as once. */
struct loop_hook;
typedef void loop_hook_fn(struct loop_hook *h);

struct loop_hook {
    struct list link;
    loop_hook_fn *fn;
};

void loop_hook_init(struct loop_hook *h, loop_hook_fn *fn);
void loop_hook_defer(struct loop_hook *h);
void loop_hook_cancel(struct loop_hook *h);

/* Timers of the calling thread's loop; fn runs outside of coroutines. Removing a timer that is not armed does nothing. */
void loop_timer_arm(struct timer *t, uint64_t deadline_ns, timer_fn *fn);
void loop_timer_disarm(struct timer *t);

/*
 * Counters of one loop since its start, for statistics and tests. Read on its own thread, or torn but harmlessly from
 * another.
 */
struct loop_counters {
    uint64_t ticks;
    uint64_t coroutines;   /* started */
    uint64_t inline_ops;   /* I/O done at once (L2) */
    uint64_t engine_ops;   /* I/O given to the engine */
    uint64_t worker_ops;   /* I/O done by worker threads */
    uint64_t detached_ops; /* I/O that its waiter did not wait for (G8) */
    uint64_t system_calls; /* waits of the engine */
};
const struct loop_counters *loop_counters(const struct loop *loop);

#endif
