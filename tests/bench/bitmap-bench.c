/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What bitmaps cost a write: ns of CPU per 4 KiB range at random places, for 0, 1 and 8 bitmaps that are set before and after it (C2).
 * "set already" only loads; "clean" sets bits in leaves that are there; "empty" makes the leaves, too. Then the same for so many that
 * they do not fit into caches, with few writes, so that they fit into memory: ns per bitmap and write.
 */
#include "base/macros.h"
#include "base/prng.h"
#include "bitmaps/bitmap.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#define DISK    (64 * GIB)
#define WRITES  2000000u
#define REPEATS 5
#define BITMAPS 8
#define MANY    65535u      /* as an image can have */
#define SETS    (4u * MANY) /* of all bitmaps together, in one pass over many */

static uint64_t places[WRITES];

static double now_ns(void)
{
    struct timespec t;

    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (double)t.tv_sec * 1e9 + (double)t.tv_nsec;
}

/* Per write; two calls per bitmap. */
static double pass(struct bitmap **b, unsigned count, unsigned writes)
{
    double start = now_ns();

    for (unsigned i = 0; i < writes; i++) {
        for (unsigned k = 0; k < 2 * count; k++)
            bitmap_set(b[k % count], places[i], 4096);
        __asm__ volatile("" : : "r"(places[i]) : "memory");
    }
    return (now_ns() - start) / writes;
}

static void measure(unsigned count, uint64_t granularity)
{
    double set = 1e9;
    double clean = 1e9;
    double empty = 1e9;

    for (unsigned r = 0; r < REPEATS; r++) {
        struct bitmap *b[BITMAPS] = {NULL};
        uint64_t offset;
        uint64_t len;

        for (unsigned k = 0; k < count; k++)
            b[k] = bitmap_new(DISK, granularity);
        empty = MIN(empty, pass(b, count, WRITES));
        set = MIN(set, pass(b, count, WRITES));
        for (unsigned k = 0; k < count; k++) {
            offset = 0;
            len = 0;
            while (bitmap_claim(b[k], offset + len, UINT64_MAX, &offset, &len) == 1)
                ;
        }
        clean = MIN(clean, pass(b, count, WRITES));
        for (unsigned k = 0; k < count; k++)
            bitmap_free(b[k]);
    }
    printf("%u bitmaps, granularity %6" PRIu64
           ": ns per write: set already %6.1f, clean %6.1f, empty %6.1f\n",
           count, granularity, set, clean, empty);
}

static void measure_many(unsigned count)
{
    struct bitmap **b = calloc(count, sizeof(struct bitmap *));
    unsigned writes = MAX(SETS / count, 1u);
    double empty;
    double set;

    if (!b)
        abort();
    for (unsigned k = 0; k < count; k++)
        b[k] = bitmap_new(DISK, 64 * KIB);
    empty = pass(b, count, writes);
    set = pass(b, count, writes);
    printf("%u bitmaps: ns per bitmap and write: set already %6.1f, empty %6.1f\n", count,
           set / count, empty / count);
    for (unsigned k = 0; k < count; k++)
        bitmap_free(b[k]);
    free(b);
}

int main(int argc, char **argv)
{
    uint64_t working_set = argc > 1 ? strtoull(argv[1], NULL, 0) * GIB : DISK;
    struct prng prng = {.state = 1};

    for (unsigned i = 0; i < WRITES; i++)
        places[i] = prng_below(&prng, MIN(working_set, DISK) / 4096) * 4096;
    measure(0, 64 * KIB);
    for (unsigned count = 1; count <= BITMAPS; count += BITMAPS - 1) {
        measure(count, 64 * KIB);
        measure(count, 4096);
    }
    measure_many(100);
    measure_many(1000);
    measure_many(MANY);
    return 0;
}
