/* SPDX-License-Identifier: Apache-2.0 */
/* Computing beside the loops: an operation for worker threads that makes no system call. */
#include "loop/compute.h"
#include "base/macros.h"
#include "loop/loop-internal.h"
#include "loop/op.h"

#include <errno.h>
#include <time.h>

/* What long work takes in a world without processors. */
#define SIMULATED_NS (100 * NS_PER_MS)

int loop_co_compute(compute_fn *fn, void *arg)
{
    struct io_op *op = op_new(IO_COMPUTE);

    if (!op)
        return -ENOMEM;
    op->compute = fn;
    op->compute_arg = arg;
    return (int)op_co_run(op, LOOP_FOREVER);
}

struct timed {
    compute_fn *fn;
    void *arg;
    uint64_t cpu_ns;
};

/* On a thread that does nothing else. */
static void run_timed(void *arg)
{
    struct timed *t = arg;
    struct timespec now = {.tv_sec = 0};

    t->fn(t->arg);
    (void)clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    t->cpu_ns = (uint64_t)now.tv_sec * NS_PER_S + (uint64_t)now.tv_nsec;
}

int loop_co_compute_long(compute_fn *fn, void *arg, uint64_t *ret_cpu_ns)
{
    struct timed t = {.fn = fn, .arg = arg};
    struct io_op *op = op_new(IO_COMPUTE);
    bool simulated = !loop_self()->engine->eventfds;
    int r;

    if (!op)
        return -ENOMEM;
    op->alone = true;
    op->compute = simulated ? fn : run_timed;
    op->compute_arg = simulated ? arg : &t;
    r = (int)op_co_run(op, LOOP_FOREVER);
    *ret_cpu_ns = simulated ? SIMULATED_NS : t.cpu_ns;
    return r;
}
