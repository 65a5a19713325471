/* SPDX-License-Identifier: Apache-2.0 */
/* Numbers from text: no locale, no leading spaces or signs that strtoull would take, no silent wrap. */
#include "base/number.h"

#include "base/checked.h"

#include <ctype.h>
#include <errno.h>
#include <stdbool.h>
#include <string.h>

static int digit_value(char c, unsigned base)
{
    int v = -1;

    if (c >= '0' && c <= '9')
        v = c - '0';
    else if (c >= 'a' && c <= 'f')
        v = c - 'a' + 10;
    else if (c >= 'A' && c <= 'F')
        v = c - 'A' + 10;
    return v >= 0 && (unsigned)v < base ? v : -1;
}

/* Reads digits up to the first other character, which *text then points to. */
static int read_digits(const char **text, unsigned base, uint64_t *ret_value)
{
    uint64_t value = 0;
    const char *p = *text;
    int d = digit_value(*p, base);

    if (d < 0)
        return -EINVAL;
    for (; d >= 0; d = digit_value(*++p, base))
        if (!checked_mul(value, base, &value) || !checked_add(value, (unsigned)d, &value))
            return -ERANGE;
    *text = p;
    *ret_value = value;
    return 0;
}

int number_from_text(const char *text, uint64_t *ret_value)
{
    uint64_t value;
    bool hex = text[0] == '0' && (text[1] == 'x' || text[1] == 'X');
    int r;

    if (hex)
        text += 2;
    r = read_digits(&text, hex ? 16 : 10, &value);
    if (r < 0)
        return r;
    if (*text)
        return -EINVAL;
    *ret_value = value;
    return 0;
}

int number_from_text_signed(const char *text, int64_t *ret_value)
{
    bool negative = text[0] == '-';
    uint64_t value;
    int r = number_from_text(text + negative, &value);

    if (r < 0)
        return r;
    if (value > (uint64_t)INT64_MAX + negative)
        return -ERANGE;
    *ret_value = negative ? (int64_t)(0 - value) : (int64_t)value;
    return 0;
}

/* The power of two that a suffix stands for, or -1. */
static int suffix_bits(char c)
{
    static const char suffixes[] = "bkmgtpe";
    const char *at = c ? strchr(suffixes, tolower((unsigned char)c)) : NULL;

    return at ? (int)(at - suffixes) * 10 : -1;
}

/* Digits after the point as a fraction of 10^18; further ones are below a byte of any unit and only checked. */
static int read_fraction(const char **text, uint64_t *ret_parts)
{
    uint64_t parts = 0;
    uint64_t weight = 100000000000000000u;
    const char *p = *text;

    if (digit_value(*p, 10) < 0)
        return -EINVAL;
    for (; digit_value(*p, 10) >= 0; p++) {
        parts += weight * (uint64_t)digit_value(*p, 10);
        weight /= 10;
    }
    *text = p;
    *ret_parts = parts;
    return 0;
}

int size_from_text(const char *text, uint64_t *ret_bytes)
{
    const uint64_t whole_parts = 1000000000000000000u;
    uint64_t whole;
    uint64_t parts = 0;
    bool fraction;
    int bits;
    int r;
    unsigned __int128 bytes;

    r = number_from_text(text, ret_bytes);
    if (r == 0 || r == -ERANGE)
        return r;
    r = read_digits(&text, 10, &whole);
    if (r < 0)
        return r;
    fraction = *text == '.';
    if (fraction) {
        text++;
        r = read_fraction(&text, &parts);
        if (r < 0)
            return r;
    }
    bits = suffix_bits(*text);
    if (bits < 0 || text[1] || (fraction && bits == 0))
        return -EINVAL;
    bytes = ((unsigned __int128)whole << bits) + ((unsigned __int128)parts << bits) / whole_parts;
    if (bytes > UINT64_MAX)
        return -ERANGE;
    *ret_bytes = (uint64_t)bytes;
    return 0;
}
