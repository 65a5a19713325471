/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A check for where cmocka's asserts cannot be used: they leave by a long jump, which is right in a test's own stack only, and
 * not on other threads, in coroutines that others wait for, or in drivers.
 */
#ifndef CAIRN_TESTS_CHECK_H
#define CAIRN_TESTS_CHECK_H

#include <stdio.h>
#include <stdlib.h>

/* Ends the program, from any thread and stack; the seed is printed on the way. */
#define check(cond)                                                                                \
    do {                                                                                           \
        if (!(cond)) {                                                                             \
            fprintf(stderr, "%s:%d: does not hold: %s\n", __FILE__, __LINE__, #cond);              \
            abort();                                                                               \
        }                                                                                          \
    } while (0)

#endif
