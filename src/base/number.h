/* SPDX-License-Identifier: Apache-2.0 */
/* Numbers and sizes as people write them on a command line. */
#ifndef CAIRN_BASE_NUMBER_H
#define CAIRN_BASE_NUMBER_H

#include <stdint.h>

/* Decimal, or hexadecimal after 0x; nothing before or after. -EINVAL, or -ERANGE when it does not fit. */
int number_from_text(const char *text, uint64_t *ret_value);
int number_from_text_signed(const char *text, int64_t *ret_value);

/*
 * A size in bytes: a number as above, or a decimal one with a suffix k, M, G, T, P, E (powers of 1024, either case) or b/B
 * (bytes). A decimal fraction is allowed before a suffix other than b: 1.5G. Results are rounded down to whole bytes.
 */
int size_from_text(const char *text, uint64_t *ret_bytes);

#endif
