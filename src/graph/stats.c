/* SPDX-License-Identifier: Apache-2.0 */
/* Sums of statistics. */
#include "graph/stats.h"

static uint64_t recent(const uint64_t *counter)
{
    return atomic_get_relaxed(counter); /* see stats.h */
}

void stats_sum(struct stats *sum, const struct stats *s)
{
    for (unsigned i = 0; i < STATS_KINDS; i++) {
        sum->kind[i].operations += recent(&s->kind[i].operations);
        sum->kind[i].failed += recent(&s->kind[i].failed);
        sum->kind[i].invalid += recent(&s->kind[i].invalid);
        sum->kind[i].bytes += recent(&s->kind[i].bytes);
        sum->kind[i].total_ns += recent(&s->kind[i].total_ns);
        for (unsigned b = 0; b < STATS_BUCKETS; b++)
            sum->kind[i].histogram[b] += recent(&s->kind[i].histogram[b]);
    }
    sum->last_ns = MAX(sum->last_ns, recent(&s->last_ns));
    sum->highest_written = MAX(sum->highest_written, recent(&s->highest_written));
}
