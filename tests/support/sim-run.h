/* SPDX-License-Identifier: Apache-2.0 */
/* Runs on a simulated disk: without bad luck, with a fault, with late operations, and such as are killed. */
#ifndef CAIRN_TESTS_SIM_RUN_H
#define CAIRN_TESTS_SIM_RUN_H

#include "base/macros.h"
#include "loop/sim/sim.h"

static inline enum sim_end run_on(struct sim_disk *disk, uint64_t seed, co_entry_fn *fn, void *arg)
{
    struct sim_options o;

    sim_options_init(&o, seed);
    o.disk = disk;
    return sim_run(&o, fn, arg);
}

static inline enum sim_end run_with(struct sim_fault *fault, struct sim_disk *disk, uint64_t seed,
                                    co_entry_fn *fn, void *arg)
{
    struct sim_options o;

    sim_options_init(&o, seed);
    o.disk = disk;
    o.faults = &fault;
    o.fault_count = 1;
    return sim_run(&o, fn, arg);
}

/*
 * Some reads and writes are late, how many and by how much is up to the seed: who has looked something up uses it long after
 * others have freed it and given it away.
 */
static inline enum sim_end run_late(struct sim_disk *disk, uint64_t seed, co_entry_fn *fn,
                                    void *arg)
{
    struct sim_fault late = {
        .ops = SIM_OP(IO_READ) | SIM_OP(IO_WRITE),
        .kind = SIM_DELAY,
        .delay_ns = (2 + seed % 7 * 5) * NS_PER_MS,
        .per_mille = seed % 5 ? 60 * (seed % 5) : 0,
    };

    return run_with(&late, disk, seed, fn, arg);
}

/* To the end, or to that operation of the disk; 0: to the end. */
static inline enum sim_end run_killed_at(struct sim_disk *disk, uint64_t seed, co_entry_fn *fn,
                                         void *arg, uint64_t kill_at_op)
{
    struct sim_options o;

    sim_options_init(&o, seed);
    o.disk = disk;
    o.short_per_mille = 0; /* the host does not end within a sector when it is killed */
    o.may_end_early = true;
    o.kill_at_op = kill_at_op;
    return sim_run(&o, fn, arg);
}

#endif
