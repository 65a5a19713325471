/* SPDX-License-Identifier: Apache-2.0 */
/* A small seeded generator (SplitMix64) for simulation and tests: the same seed gives the same sequence everywhere. */
#ifndef CAIRN_BASE_PRNG_H
#define CAIRN_BASE_PRNG_H

#include <stdbool.h>
#include <stdint.h>

struct prng {
    uint64_t state;
};

static inline uint64_t prng_next(struct prng *p)
{
    uint64_t z = (p->state += 0x9e3779b97f4a7c15u);

    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

/* 0 .. n - 1; n > 0. The bias is below n / 2^32. */
static inline uint64_t prng_below(struct prng *p, uint64_t n)
{
    return n <= UINT32_MAX ? ((prng_next(p) >> 32) * n) >> 32 : prng_next(p) % n;
}

/* True in `per_mille` of 1000 calls. */
static inline bool prng_chance(struct prng *p, unsigned per_mille)
{
    return prng_below(p, 1000) < per_mille;
}

#endif
