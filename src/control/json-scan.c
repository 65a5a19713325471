/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The scanner's states.
 *
 *   IDLE --'{' '['--> NESTED --last bracket--> IDLE (value)
 *   IDLE --quote----> STRING --same quote----> IDLE (value)      a string at the top is a value, if a useless one
 *   IDLE --letter---> WORD   --anything else-> IDLE (value)
 *   NESTED --quote--> STRING --same quote----> NESTED
 *
 * SCAN-1: one error is reported per mistake: after it, input is skipped up to the next '{', line end or 0xFF.
 * SCAN-2: 0xFF, which no UTF-8 text holds, puts the scanner back to the start from any state, with an error.
 * SCAN-3: the caller never has to keep more than JSON_SCAN_MAX_BYTES; a longer value is reported at once and followed to its
 *         end without being kept, so that its tail is not taken for commands.
 */
#include "control/json-scan.h"

#include <ctype.h>
#include <string.h>

#define RESYNC 0xFF

static bool is_word(unsigned char c)
{
    return isascii(c) && (isalnum(c) || c == '-' || c == '+' || c == '.' || c == '_');
}

static bool is_space(unsigned char c)
{
    return c == ' ' || c == '\t' || c == '\r' || c == '\n';
}

static void start_over(struct json_scan *s, enum json_scan_state state)
{
    s->state = state;
    s->depth = 0;
    s->bytes = 0;
    s->tokens = 0;
}

static enum json_scan_result fail(struct json_scan *s, enum json_scan_state next, const char *text,
                                  const char **ret_error)
{
    *ret_error = text;
    if (next == JSON_SCAN_DISCARD) {
        s->discard_string = s->state == JSON_SCAN_STRING || s->state == JSON_SCAN_ESCAPE;
        s->discard_escape = s->state == JSON_SCAN_ESCAPE;
        s->state = next;
    } else {
        start_over(s, next);
    }
    return JSON_SCAN_ERROR;
}

static enum json_scan_result value_ends(struct json_scan *s)
{
    start_over(s, JSON_SCAN_IDLE);
    return JSON_SCAN_VALUE;
}

static enum json_scan_result open_bracket(struct json_scan *s, unsigned char c,
                                          const char **ret_error)
{
    size_t level = s->depth;
    uint8_t bit = (uint8_t)(1u << (level % 8));

    s->state = JSON_SCAN_NESTED;
    s->depth++;
    if (s->depth > JSON_SCAN_MAX_DEPTH)
        return fail(s, JSON_SCAN_DISCARD, "JSON is nested more than 1024 deep", ret_error);
    if (c == '[')
        s->square[level / 8] |= bit;
    else
        s->square[level / 8] &= (uint8_t)~bit;
    return JSON_SCAN_MORE;
}

static enum json_scan_result close_bracket(struct json_scan *s, unsigned char c,
                                           const char **ret_error)
{
    size_t level = s->depth - 1;
    bool square = s->square[level / 8] >> (level % 8) & 1;

    if (square != (c == ']'))
        return fail(s, JSON_SCAN_SKIP,
                    square ? "JSON parse error: '}' closes '['"
                           : "JSON parse error: ']' closes '{'",
                    ret_error);
    s->depth--;
    return s->depth == 0 ? value_ends(s) : JSON_SCAN_MORE;
}

static void open_string(struct json_scan *s, unsigned char c)
{
    s->quote = (char)c;
    s->state = JSON_SCAN_STRING;
}

/* A byte where a token may begin: at the top, or between brackets. */
static enum json_scan_result token_byte(struct json_scan *s, unsigned char c,
                                        const char **ret_error)
{
    if (is_space(c))
        return JSON_SCAN_MORE;
    if (c == '{' || c == '[') {
        s->tokens++;
        return open_bracket(s, c, ret_error);
    }
    if (c == '"' || c == '\'') {
        s->tokens++;
        open_string(s, c);
        return JSON_SCAN_MORE;
    }
    if (is_word(c)) {
        s->tokens++;
        s->state = JSON_SCAN_WORD;
        return JSON_SCAN_MORE;
    }
    if (s->depth == 0)
        return fail(s, JSON_SCAN_SKIP, "JSON parse error: expected a value", ret_error);
    s->tokens++;
    if (c == '}' || c == ']')
        return close_bracket(s, c, ret_error);
    return JSON_SCAN_MORE; /* ',' and ':' and what the parser will refuse */
}

static enum json_scan_result string_byte(struct json_scan *s, unsigned char c,
                                         const char **ret_error)
{
    if (c < 0x20) {
        /* The quote was probably never closed: the line's end is where sense begins again. */
        return fail(s, c == '\n' ? JSON_SCAN_IDLE : JSON_SCAN_SKIP,
                    "JSON parse error: control character in a string", ret_error);
    }
    if (s->state == JSON_SCAN_ESCAPE) {
        s->state = JSON_SCAN_STRING;
    } else if (c == '\\') {
        s->state = JSON_SCAN_ESCAPE;
    } else if (c == (unsigned char)s->quote) {
        if (s->depth == 0)
            return value_ends(s);
        s->state = JSON_SCAN_NESTED;
    }
    return JSON_SCAN_MORE;
}

/* Follows a value that is past a limit. Brackets are only counted: their kinds are known to 1,024 levels. */
static void discard_byte(struct json_scan *s, unsigned char c)
{
    if (s->discard_string) {
        if (s->discard_escape)
            s->discard_escape = false;
        else if (c == '\\')
            s->discard_escape = true;
        else if (c == (unsigned char)s->quote || c < 0x20)
            s->discard_string = false;
        if (!s->discard_string && s->depth == 0)
            start_over(s, JSON_SCAN_IDLE);
        return;
    }
    if (c == '{' || c == '[') {
        s->depth++;
    } else if (c == '}' || c == ']') {
        if (s->depth > 0)
            s->depth--;
        if (s->depth == 0)
            start_over(s, JSON_SCAN_IDLE);
    } else if (c == '"' || c == '\'') {
        s->discard_string = true;
        s->quote = (char)c;
    } else if (s->depth == 0 && !is_word(c)) {
        start_over(s, JSON_SCAN_IDLE);
    }
}

static enum json_scan_result check_limits(struct json_scan *s, const char **ret_error)
{
    if (s->bytes > JSON_SCAN_MAX_BYTES)
        return fail(s, JSON_SCAN_DISCARD, "JSON value has more than 64 MiB", ret_error);
    if (s->tokens > JSON_SCAN_MAX_TOKENS)
        return fail(s, JSON_SCAN_DISCARD, "JSON value has more than 2097152 tokens", ret_error);
    return JSON_SCAN_MORE;
}

/* One byte of a value, or of the space between. *ret_taken is false when the byte only ended a word. */
static enum json_scan_result value_byte(struct json_scan *s, unsigned char c, bool *ret_taken,
                                        const char **ret_error)
{
    enum json_scan_result r;

    *ret_taken = true;
    if (s->state == JSON_SCAN_STRING || s->state == JSON_SCAN_ESCAPE) {
        r = string_byte(s, c, ret_error);
    } else if (s->state == JSON_SCAN_WORD && is_word(c)) {
        r = JSON_SCAN_MORE;
    } else if (s->state == JSON_SCAN_WORD && s->depth == 0) {
        *ret_taken = false;
        return value_ends(s);
    } else {
        if (s->depth > 0)
            s->state = JSON_SCAN_NESTED;
        r = token_byte(s, c, ret_error);
    }
    if (r != JSON_SCAN_MORE || s->state == JSON_SCAN_IDLE)
        return r;
    s->bytes++;
    return check_limits(s, ret_error);
}

enum json_scan_result json_scan_feed(struct json_scan *s, const char *buf, size_t len,
                                     size_t *ret_consumed, size_t *ret_start, size_t *ret_len,
                                     const char **ret_error)
{
    enum json_scan_result r = JSON_SCAN_MORE;
    size_t start = 0;
    size_t i = 0;

    while (i < len && r == JSON_SCAN_MORE) {
        unsigned char c = (unsigned char)buf[i];
        bool taken = true;

        if (c == RESYNC) {
            i++;
            r = fail(s, JSON_SCAN_IDLE, "JSON parse error: the byte 0xFF is not allowed",
                     ret_error); /* SCAN-2 */
            break;
        }
        if (s->state == JSON_SCAN_SKIP && (c == '{' || c == '\n'))
            s->state = JSON_SCAN_IDLE;
        if (s->state == JSON_SCAN_SKIP || s->state == JSON_SCAN_DISCARD) {
            if (s->state == JSON_SCAN_DISCARD)
                discard_byte(s, c);
            i++;
            start = i;
            continue;
        }
        r = value_byte(s, c, &taken, ret_error);
        i += taken;
        if (s->state == JSON_SCAN_IDLE && r == JSON_SCAN_MORE)
            start = i;
    }
    *ret_consumed = i;
    *ret_start = start;
    *ret_len = i - start;
    return r;
}
