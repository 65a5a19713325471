/* SPDX-License-Identifier: Apache-2.0 */
/* Whether memory holds nothing but zeroes. */
#ifndef CAIRN_BASE_ZEROES_H
#define CAIRN_BASE_ZEROES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* As fast as the host compares memory; data that is not zero says so at once, most often. */
static inline bool is_all_zeroes(const void *data, size_t len)
{
    const uint8_t *b = data;

    return !len || (b[0] == 0 && memcmp(b, b + 1, len - 1) == 0);
}

#endif
