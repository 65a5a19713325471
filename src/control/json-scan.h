/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Finds the end of each top-level JSON value in a stream of bytes, incrementally. The control protocol has no framing, so this
 * is its framing: brackets and quotes are followed, and what is between them is left for the parser to judge.
 */
#ifndef CAIRN_CONTROL_JSON_SCAN_H
#define CAIRN_CONTROL_JSON_SCAN_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define JSON_SCAN_MAX_BYTES  ((size_t)64 << 20)
#define JSON_SCAN_MAX_DEPTH  1024
#define JSON_SCAN_MAX_TOKENS ((size_t)2 << 20)

enum json_scan_state {
    JSON_SCAN_IDLE,   /* between values */
    JSON_SCAN_NESTED, /* within brackets, outside strings */
    JSON_SCAN_WORD,   /* in a number or name */
    JSON_SCAN_STRING,
    JSON_SCAN_ESCAPE,  /* behind a backslash in a string */
    JSON_SCAN_SKIP,    /* after an error: silent up to '{', a line's end or 0xFF */
    JSON_SCAN_DISCARD, /* a value past a limit: followed silently to its end */
};

/* All zero is the start. */
struct json_scan {
    enum json_scan_state state;
    char quote;
    bool discard_string; /* JSON_SCAN_DISCARD: within a string */
    bool discard_escape;
    size_t depth;
    size_t bytes; /* of the value so far */
    size_t tokens;
    uint8_t square[JSON_SCAN_MAX_DEPTH / 8]; /* per level: a bit, set for '[' */
};

enum json_scan_result {
    JSON_SCAN_MORE,  /* all consumed, the value goes on (or has not begun) */
    JSON_SCAN_VALUE, /* a value ends with the consumed bytes */
    JSON_SCAN_ERROR, /* what was consumed of the value so far is to be thrown away */
};

/*
 * Pure. Consumes at least one byte of a non-empty buffer, except that JSON_SCAN_VALUE may end a word at a byte that it leaves.
 * The text of a value is *ret_len bytes at *ret_start of each buffer in turn, to be put together by the caller; what is
 * not in it belongs to no value. On JSON_SCAN_ERROR *ret_error is a constant text.
 */
enum json_scan_result json_scan_feed(struct json_scan *s, const char *buf, size_t len,
                                     size_t *ret_consumed, size_t *ret_start, size_t *ret_len,
                                     const char **ret_error);

#endif
