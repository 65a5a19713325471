/* SPDX-License-Identifier: Apache-2.0 */
/* The hook behind the scheduling points of atomics (T1, T2). */
#include "base/atomic.h"
#include "base/context.h"

#include <stddef.h>

#ifdef CAIRN_SIM_POINTS
static _Thread_local atomic_point_fn *point_fn;
static _Thread_local void *point_arg;

void atomic_point(void)
{
    if (point_fn)
        point_fn(point_arg);
}

void atomic_set_point_hook(atomic_point_fn *fn, void *arg)
{
    point_fn = fn;
    point_arg = arg;
}
#else
void atomic_set_point_hook(atomic_point_fn *fn, void *arg)
{
    (void)fn;
    (void)arg;
}
#endif

#if defined(__clang__)
struct co_context co_context;
struct control_context control_context;
#endif
