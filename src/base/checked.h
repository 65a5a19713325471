/* SPDX-License-Identifier: Apache-2.0 */
/* Arithmetic on sizes from outside: nothing here wraps silently. */
#ifndef CAIRN_BASE_CHECKED_H
#define CAIRN_BASE_CHECKED_H

#include <stdbool.h>
#include <stdint.h>

/* These return false, and leave *ret undefined, when the result does not fit. */
static inline bool checked_add(uint64_t a, uint64_t b, uint64_t *ret)
{
    return !__builtin_add_overflow(a, b, ret);
}

static inline bool checked_mul(uint64_t a, uint64_t b, uint64_t *ret)
{
    return !__builtin_mul_overflow(a, b, ret);
}

/* True if [offset, offset + len) lies within [0, size). An empty range at the end does. */
static inline bool range_within(uint64_t offset, uint64_t len, uint64_t size)
{
    return offset <= size && len <= size - offset;
}

static inline bool ranges_overlap(uint64_t a, uint64_t a_len, uint64_t b, uint64_t b_len)
{
    return a < b + b_len && b < a + a_len;
}

static inline bool is_power_of_2(uint64_t v)
{
    return v && !(v & (v - 1));
}

/* `align` is a power of two. align_up() of a value within `align` of 2^64 wraps: check the range before. */
static inline uint64_t align_down(uint64_t v, uint64_t align)
{
    return v & ~(align - 1);
}

static inline uint64_t align_up(uint64_t v, uint64_t align)
{
    return (v + align - 1) & ~(align - 1);
}

static inline bool is_aligned(uint64_t v, uint64_t align)
{
    return !(v & (align - 1));
}

#endif
