/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The contexts that a function can run in, as part of its declaration.
 *
 *   co_fn       may yield: runs in a coroutine only
 *   control_fn  may change the graph: runs on the control thread only
 *   neither     pure: runs anywhere, never blocks
 *
 * Under clang both are capabilities, so that -Wthread-safety rejects a call from the wrong context at compile time.
 * The analysis cannot see through function pointers: a coroutine's entry and a driver's operations start anew there.
 */
#ifndef CAIRN_BASE_CONTEXT_H
#define CAIRN_BASE_CONTEXT_H

#if defined(__clang__)
struct __attribute__((capability("coroutine"))) co_context {
    int unused;
};

struct __attribute__((capability("control thread"))) control_context {
    int unused;
};
extern struct co_context co_context;
extern struct control_context control_context;
#define co_fn      __attribute__((requires_capability(co_context)))
#define control_fn __attribute__((requires_capability(control_context)))
#else
#define co_fn
#define control_fn
#endif

#endif
