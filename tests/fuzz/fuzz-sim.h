/* SPDX-License-Identifier: Apache-2.0 */
/* What fuzzers that run under sim have in common. */
#ifndef CAIRN_TESTS_FUZZ_SIM_H
#define CAIRN_TESTS_FUZZ_SIM_H

#include "loop/sim/sim.h"

#include <stdlib.h>

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
const char *__asan_default_options(void);

/* Of the address sanitizer; absent in other builds. */
extern int __asan_option_detect_stack_use_after_return __attribute__((weak));

/*
 * Each run makes and drops loops and coroutines, and the sanitizer keeps a second stack for each that has ever returned into
 * one: a megabyte for each input. The unit tests run with that check.
 */
int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    (void)argc;
    (void)argv;
    if (&__asan_option_detect_stack_use_after_return)
        __asan_option_detect_stack_use_after_return = 0;
    return 0;
}

/* What was freed is used again after 16 MiB: pages that were never touched cost time, and count as memory that an input took. */
const char *__asan_default_options(void)
{
    return "quarantine_size_mb=16";
}

/* Runs body(arg) with this disk, which is freed. A run that does not end is a finding. */
static inline void fuzz_run(struct sim_disk *disk, void (*body)(void *), void *arg)
{
    struct sim_options o;

    sim_options_init(&o, 1);
    o.disk = disk;
    o.max_steps = 1000000;
    if (sim_run(&o, body, arg) != SIM_RETURNED)
        abort();
    sim_disk_free(disk);
}

#endif
