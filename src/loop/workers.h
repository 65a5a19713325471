/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Worker threads for system calls that may sleep. Each file has a pool of its own with few threads, so that a file that hangs
 * cannot take another's (L1). Threads are made when needed and end when idle.
 */
#ifndef CAIRN_LOOP_WORKERS_H
#define CAIRN_LOOP_WORKERS_H

#include "loop/op.h"

/* The most threads that one file's operations may occupy. */
#define WORKERS_PER_FILE 4

struct worker_pool;

struct worker_pool *worker_pool_new(unsigned max_threads);
/* Its threads end when they have done what was submitted; one that hangs does so by itself. Returns NULL. */
struct worker_pool *worker_pool_free(struct worker_pool *p);

/* Runs op_blocking() on a thread of the pool and completes the operation on its loop. -EAGAIN if no thread can be had. */
int worker_submit(struct worker_pool *p, struct io_op *op);

/*
 * As worker_submit(), for an operation that is of no file, or of two: on a thread for it alone, or, if it only computes and not for long, on one
 * of a pool.
 */
int worker_submit_elsewhere(struct io_op *op);

#endif
