/* SPDX-License-Identifier: Apache-2.0 */
/* Computing beside the loops: an operation for worker threads that makes no system call. */
#include "loop/compute.h"
#include "loop/op.h"

#include <errno.h>

int loop_co_compute(compute_fn *fn, void *arg)
{
    struct io_op *op = op_new(IO_COMPUTE);

    if (!op)
        return -ENOMEM;
    op->compute = fn;
    op->compute_arg = arg;
    return (int)op_co_run(op, LOOP_FOREVER);
}
