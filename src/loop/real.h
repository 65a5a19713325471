/* SPDX-License-Identifier: Apache-2.0 */
/* What the io_uring and threads engines share: clocks, threads, descriptors, inline I/O. */
#ifndef CAIRN_LOOP_REAL_H
#define CAIRN_LOOP_REAL_H

#include "loop/loop-internal.h"

uint64_t real_clock(struct loop *loop);
uint64_t real_wall_clock(struct loop *loop);
void real_random(struct loop *loop, void *ret_bytes, size_t len);

void real_wake(struct loop_mailbox *box);

int real_thread_start(struct loop_thread *t, struct error **err);
void real_thread_report(struct loop_thread *t);
void real_thread_join(struct loop_thread *t);

/* L2. */
int64_t real_inline_rw(struct file *f, bool write, uint64_t offset, const struct iovec *iov,
                       int iov_count);
bool real_try_inline(struct io_op *op);
/* For operations that no ring takes: by the file's workers, or a thread alone. Completes with an error if there is none. */
void real_submit_to_worker(struct io_op *op);

void real_file_close(struct file *f);

int64_t real_socket_try_send(struct socket *s, const struct iovec *iov, int iov_count);
int64_t real_socket_try_recv(struct socket *s, void *buf, size_t len);
void real_socket_shutdown(struct socket *s);
void real_socket_close(struct socket *s);
/* A socket around a connected or accepted descriptor, which it takes. */
struct socket *real_socket_new(const struct engine *engine, int fd);

/* Blocking parts of socket operations, for worker threads: set *op->ret_socket. */
int64_t real_listen(struct io_op *op);
int64_t real_resolve_and_connect(struct io_op *op);

#endif
