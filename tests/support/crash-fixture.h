/* SPDX-License-Identifier: Apache-2.0 */
/* For crash tests: runs that are killed at an operation of the disk, at each in turn, in children, and what these count. */
#ifndef CAIRN_TESTS_CRASH_FIXTURE_H
#define CAIRN_TESTS_CRASH_FIXTURE_H

#include "base/prng.h"
#include "check.h"
#include "sim-run.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#define SECOND_CUT 7 /* each so many is judged with another cut, too */

/* Zeroes, which children share with the test; there until the program ends. */
static inline void *shared_new(size_t len)
{
    void *p = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);

    check(p != MAP_FAILED);
    return p;
}

/* What a test does at an operation of the disk; `cut` is the seed of the power cut. */
typedef void crash_fn(const void *plan, uint64_t op, uint64_t cut);

/* At each of that many operations, or, where there are more than `max`, at about so many. */
static inline void crash_everywhere(crash_fn *crash_at, const void *plan, uint64_t seed,
                                    uint64_t ops, unsigned max)
{
    struct prng prng = {seed + 9};

    for (uint64_t op = 1; op <= ops; op++) {
        if (ops > max && prng_below(&prng, ops) >= max)
            continue;
        crash_at(plan, op, 1 + prng_next(&prng) % 1000000);
        if (op % SECOND_CUT == 0)
            crash_at(plan, op, 1 + prng_next(&prng) % 1000000);
    }
}

/*
 * In a child: what killed runs had allocated stays until it ends. CAIRN_CRASH_NO_FORK=1 in the environment is for debuggers.
 */
static inline void in_child(void (*fn)(void *arg), void *arg)
{
    pid_t child;
    int status;

    if (getenv("CAIRN_CRASH_NO_FORK")) {
        fn(arg);
        return;
    }
    fflush(NULL);
    child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        fn(arg);
        fflush(NULL);
        _exit(0);
    }
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_int_equal(status, 0);
}

#endif
