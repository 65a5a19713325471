/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One I/O operation on its way through an engine. Only for src/loop: files, sockets and engines.
 *
 * An operation comes from a pool of its loop, so that it outlives a waiter who leaves early (G8). It completes on its loop,
 * exactly once, through op_complete().
 */
#ifndef CAIRN_LOOP_OP_H
#define CAIRN_LOOP_OP_H

#include "loop/co.h"
#include "loop/compute.h"
#include "loop/file.h"
#include "loop/socket.h"

enum io_op_kind {
    IO_READ,
    IO_WRITE,
    IO_SYNC,
    IO_PUNCH,
    IO_ZERO,
    IO_ALLOCATE,
    IO_COPY,
    IO_TRUNCATE,
    IO_EXTENTS,
    IO_STAT,
    IO_LOCK,
    IO_LOCK_TEST,
    IO_OPEN,
    IO_CLOSE,
    IO_RENAME,
    IO_UNLINK,
    IO_SYNC_DIR,
    IO_RESOLVE,
    IO_COMPUTE,
    IO_LISTEN,
    IO_ACCEPT,
    IO_CONNECT,
    IO_RECV,
    IO_SEND,
};

/* Vectors up to this long are copied into the operation. */
#define IO_OP_IOV 8

struct io_op {
    enum io_op_kind kind;
    bool detached;    /* the waiter has left */
    bool durable;     /* IO_WRITE */
    bool is_sync;     /* between file_sync_begin() and file_sync_end() */
    bool any_content; /* IO_PUNCH: the range need not read as zeroes */
    bool alone;       /* IO_COMPUTE: on a thread of its own */
    bool owns_memory; /* all memory that it refers to lives as long as the operation */
    struct loop *loop;
    int64_t result;
    struct co_wait wait;
    struct iobuf *hold;

    /* What it works on: one of these, or paths. */
    struct file *file;
    struct socket *socket;

    struct file *source;    /* IO_COPY: from here to `file` */
    uint64_t source_offset; /* IO_COPY */
    uint64_t offset;
    uint64_t len;
    const struct iovec *iov; /* IO_READ, IO_WRITE, IO_RECV, IO_SEND */
    int iov_count;
    struct iovec iov_copy[IO_OP_IOV];

    unsigned sync_turn; /* a durable write's */
    enum file_lock lock;
    struct file_extent *extents; /* IO_EXTENTS: `len` bytes from `offset`, at most `extents_max` */
    unsigned extents_max;
    const char *path;
    const char *path2;
    char *ret_path; /* IO_RESOLVE: PATH_MAX bytes */
    struct file_info *ret_info;
    compute_fn *compute; /* IO_COMPUTE */
    void *compute_arg;
    const struct socket_address *address;
    struct socket **ret_socket;

    /* Only for the engine that carries it out. */
    struct loop_message message;
    struct io_op *next;
    struct list engine_link;
    uint64_t engine_data;
    void *engine_ptr;
    char msghdr_space[64]; /* a struct msghdr, for engines that pass one to the kernel */
};

/* From the running loop's pool; -ENOMEM is NULL. All fields zero but kind, loop. */
struct io_op *op_new(enum io_op_kind kind);

/*
 * Carries the operation out and frees it: its result, or -ETIMEDOUT, -ECANCELED. If `owns_memory` the wait may end while
 * the operation goes on.
 */
int64_t co_fn op_co_run(struct io_op *op, uint64_t deadline_ns);

/* For engines: the operation has ended. On its loop. */
void op_complete(struct io_op *op, int64_t result);

/* Does the operation with blocking system calls: for worker threads. Sets nothing but what `ret` members point to. */
int64_t op_blocking(struct io_op *op);

#endif
