/* SPDX-License-Identifier: Apache-2.0 */
/* A latency histogram: 64 buckets per power of two, so a percentile is right to 1.6 %. */
#ifndef BENCH_HISTOGRAM_H
#define BENCH_HISTOGRAM_H

#include <stdint.h>

#define HISTOGRAM_SUB_BITS 6u
#define HISTOGRAM_SUB      (1u << HISTOGRAM_SUB_BITS)
#define HISTOGRAM_BUCKETS  ((64u - HISTOGRAM_SUB_BITS + 1u) * HISTOGRAM_SUB)

struct histogram {
    uint64_t count;
    uint64_t sum_ns;
    uint64_t max_ns;
    uint64_t buckets[HISTOGRAM_BUCKETS];
};

/* Values below 64 have a bucket each; above, the six bits after the leading one choose it. */
static inline unsigned histogram_bucket(uint64_t ns)
{
    unsigned shift;

    if (ns < HISTOGRAM_SUB)
        return (unsigned)ns;
    shift = 63u - (unsigned)__builtin_clzll(ns) - HISTOGRAM_SUB_BITS;
    return (shift + 1u) * HISTOGRAM_SUB + ((unsigned)(ns >> shift) & (HISTOGRAM_SUB - 1u));
}

/* The middle of a bucket. */
static inline double histogram_value(unsigned bucket)
{
    unsigned shift = bucket / HISTOGRAM_SUB;
    double low = bucket % HISTOGRAM_SUB;

    if (shift == 0)
        return low;
    return (low + HISTOGRAM_SUB + 0.5) * (double)(1ULL << (shift - 1u));
}

static inline void histogram_add(struct histogram *h, uint64_t ns)
{
    h->count++;
    h->sum_ns += ns;
    if (ns > h->max_ns)
        h->max_ns = ns;
    h->buckets[histogram_bucket(ns)]++;
}

/* The value that `fraction` of the samples do not exceed; 0 without samples. */
static inline double histogram_percentile(const struct histogram *h, double fraction)
{
    double want = fraction * (double)h->count;
    uint64_t seen = 0;

    for (unsigned i = 0; i < HISTOGRAM_BUCKETS; i++) {
        seen += h->buckets[i];
        if (seen > 0 && (double)seen >= want)
            return histogram_value(i) < (double)h->max_ns ? histogram_value(i) : (double)h->max_ns;
    }
    return 0;
}

#endif
