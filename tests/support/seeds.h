/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Seeds for random tests. A case that uses randomness runs once per seed:
 *
 *     TEST_SEEDS(seed) {
 *         struct prng prng = {.state = seed};
 *         ...
 *     }
 *
 * CAIRN_SEED is the first seed (default 1) and CAIRN_SEEDS how many there are per case (default 100). When a case fails,
 * aborts or is killed, the generated main prints the seed and how to run it alone.
 */
#ifndef CAIRN_TESTS_SEEDS_H
#define CAIRN_TESTS_SEEDS_H

#include <stdbool.h>
#include <stdint.h>

#define TEST_SEEDS(seed) for (uint64_t seed = seeds_begin(); seeds_running(); seed = seeds_next())

uint64_t seeds_begin(void);
uint64_t seeds_next(void);
bool seeds_running(void);

/*
 * After TEST_SEEDS: has the case run so many? What shows in some of many worlds may be asserted then: it need not show in
 * each handful of them.
 */
bool seeds_enough(unsigned count);

/* Names the case that runs now; for the generated main. */
void seeds_enter_case(const char *name);

/* Says which seeds the case ran, if it asked for any, and which one it did not finish; for the generated main. */
void seeds_leave_case(void);

/* From here on a fatal signal prints the running seed before it ends the program. */
void seeds_report_on_death(void);

#endif
