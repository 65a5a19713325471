/* SPDX-License-Identifier: Apache-2.0 */
/*
 * All atomics of the project (T1). Plain names are sequentially consistent; each weaker order says so in its name, and
 * each use of one has a comment that argues for it (T3).
 *
 * In builds with -Dsim_points=true every atomic is also a scheduling point: the simulator switches to another loop there,
 * and tests on real threads spin there for a random while (T2).
 */
#ifndef CAIRN_BASE_ATOMIC_H
#define CAIRN_BASE_ATOMIC_H

#include <stdbool.h>
#include <stdint.h>

#ifdef CAIRN_SIM_POINTS
/* Calls the hook that atomic_set_point_hook() installed on this thread, if any. */
void atomic_point(void);
#else
static inline void atomic_point(void) {}
#endif

typedef void atomic_point_fn(void *arg);

/* Installs what runs at each atomic of this thread, NULL for nothing. Without sim points in the build: no effect. */
void atomic_set_point_hook(atomic_point_fn *fn, void *arg);

#define atomic_get(p)                                                                              \
    ({                                                                                             \
        atomic_point();                                                                            \
        __atomic_load_n((p), __ATOMIC_SEQ_CST);                                                    \
    })
#define atomic_get_acquire(p)                                                                      \
    ({                                                                                             \
        atomic_point();                                                                            \
        __atomic_load_n((p), __ATOMIC_ACQUIRE);                                                    \
    })
#define atomic_get_relaxed(p) __atomic_load_n((p), __ATOMIC_RELAXED)

#define atomic_set(p, v)                                                                           \
    ({                                                                                             \
        atomic_point();                                                                            \
        __atomic_store_n((p), (v), __ATOMIC_SEQ_CST);                                              \
    })
#define atomic_set_release(p, v)                                                                   \
    ({                                                                                             \
        atomic_point();                                                                            \
        __atomic_store_n((p), (v), __ATOMIC_RELEASE);                                              \
    })
#define atomic_set_relaxed(p, v) __atomic_store_n((p), (v), __ATOMIC_RELAXED)

/* These return the value before. */
#define atomic_add(p, v)                                                                           \
    ({                                                                                             \
        atomic_point();                                                                            \
        __atomic_fetch_add((p), (v), __ATOMIC_SEQ_CST);                                            \
    })
#define atomic_sub(p, v)                                                                           \
    ({                                                                                             \
        atomic_point();                                                                            \
        __atomic_fetch_sub((p), (v), __ATOMIC_SEQ_CST);                                            \
    })
#define atomic_or(p, v)                                                                            \
    ({                                                                                             \
        atomic_point();                                                                            \
        __atomic_fetch_or((p), (v), __ATOMIC_SEQ_CST);                                             \
    })
#define atomic_and(p, v)                                                                           \
    ({                                                                                             \
        atomic_point();                                                                            \
        __atomic_fetch_and((p), (v), __ATOMIC_SEQ_CST);                                            \
    })
#define atomic_swap(p, v)                                                                          \
    ({                                                                                             \
        atomic_point();                                                                            \
        __atomic_exchange_n((p), (v), __ATOMIC_SEQ_CST);                                           \
    })

/* Stores desired if *p is *expected; else loads *p into *expected and returns false. Never fails spuriously. */
#define atomic_cas(p, expected, desired)                                                           \
    ({                                                                                             \
        atomic_point();                                                                            \
        __atomic_compare_exchange_n((p), (expected), (desired), false, __ATOMIC_SEQ_CST,           \
                                    __ATOMIC_SEQ_CST);                                             \
    })

#endif
