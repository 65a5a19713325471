/* SPDX-License-Identifier: Apache-2.0 */
/* Work that takes a processor longer than a tick should last: compression, keys. */
#ifndef CAIRN_LOOP_COMPUTE_H
#define CAIRN_LOOP_COMPUTE_H

#include "base/context.h"

#include <stdint.h>

typedef void compute_fn(void *arg);

/*
 * Runs fn(arg) on a thread of a pool that all loops share, one per processor, and waits for its end, whatever is cancelled: it
 * works in its caller's memory. fn touches nothing of the loop. 0, or -ENOMEM or -EAGAIN if it was not run. (Simulated: at
 * once.)
 */
int co_fn loop_co_compute(compute_fn *fn, void *arg);

/*
 * The same for work of seconds, which would keep others from the pool: on a thread of its own. *ret_cpu_ns is what processor time
 * it took. (Simulated: always the same.)
 */
int co_fn loop_co_compute_long(compute_fn *fn, void *arg, uint64_t *ret_cpu_ns);

#endif
