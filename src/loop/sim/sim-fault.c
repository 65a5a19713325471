/* SPDX-License-Identifier: Apache-2.0 */
/* Which operations a fault strikes (S5), and random spins for tests on real threads (T2). */
#include "base/atomic.h"
#include "base/macros.h"
#include "loop/sim/sim-internal.h"

#include <assert.h>
#include <fnmatch.h>
#include <sched.h>

void sim_fault_add(struct sim_fault *f)
{
    f->seen = 0;
    f->fired = 0;
    list_append(&sim_self()->faults, &f->link);
}

void sim_fault_remove(struct sim_fault *f)
{
    list_remove(&f->link);
}

static bool applies(const struct sim_fault *f, enum io_op_kind kind, const char *name)
{
    return (!f->ops || (f->ops & SIM_OP(kind))) &&
           (!f->name || (name && fnmatch(f->name, name, 0) == 0));
}

bool sim_fault_watches(enum io_op_kind kind, const char *name)
{
    const struct sim_fault *f;

    list_for_each (&sim_self()->faults, f, link)
        if (applies(f, kind, name))
            return true;
    return false;
}

static bool fires(struct sim_fault *f)
{
    uint64_t times = f->times;

    f->seen++;
    if (f->at) {
        if (!times)
            times = 1;
        if (f->seen < f->at)
            return false;
    } else if (!sim_chance(f->per_mille)) {
        return false;
    }
    if (times && f->fired >= times)
        return false;
    f->fired++;
    return true;
}

static void strike(struct sim_strike *s, const struct sim_fault *f)
{
    switch (f->kind) {
    case SIM_ERROR:
        assert(f->error > 0);
        s->error = -f->error;
        break;
    case SIM_SHORT:
        s->cut_short = true;
        break;
    case SIM_HANG:
        s->hang = true;
        break;
    case SIM_DELAY:
        s->delay_ns += f->delay_ns;
        break;
    case SIM_LATE:
        s->late = true;
        break;
    case SIM_SYNC_DROPS:
        s->sync_drops = true;
        break;
    case SIM_RESET:
        s->reset = true;
        break;
    case SIM_HALF_OPEN:
        s->half_open = true;
        break;
    }
}

struct sim_strike sim_strike(enum io_op_kind kind, const char *name)
{
    struct sim_strike s = {.cut_short = sim_chance(sim_self()->options.short_per_mille)};
    struct sim_fault *f;

    list_for_each (&sim_self()->faults, f, link)
        if (applies(f, kind, name) && fires(f))
            strike(&s, f);
    return s;
}

unsigned sim_unhang(const char *name)
{
    struct sim *sim = sim_self();
    struct sim_io *io;
    struct sim_io *next;
    unsigned n = 0;

    list_for_each_safe (&sim->ios, io, next, link) {
        if (!io->hung || (name && fnmatch(name, io->name, 0) != 0))
            continue;
        n++;
        io->hung = false;
        io->strike.hang = false;
        if (io->timer.armed)
            timer_heap_remove(&sim->events, &io->timer);
        if (io->op->socket)
            sim_net_unhang(io);
        else
            sim_io_at(io, sim->now_ns +
                              sim_between(sim->options.disk_min_ns, sim->options.disk_max_ns));
    }
    return n;
}

static _Thread_local struct prng spin_prng;

static void random_spin(void *arg)
{
    uint64_t spins;

    (void)arg;
    if (!prng_chance(&spin_prng, 100))
        return;
    if (prng_chance(&spin_prng, 100)) {
        sched_yield();
        return;
    }
    spins = (uint64_t)1 << prng_below(&spin_prng, 11);
    for (volatile uint64_t i = 0; i < spins; i = i + 1)
        ;
}

void sim_install_random_spins(uint64_t seed)
{
    spin_prng.state = seed;
    atomic_set_point_hook(seed ? random_spin : NULL, NULL);
}
