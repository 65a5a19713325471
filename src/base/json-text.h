/* SPDX-License-Identifier: Apache-2.0 */
/*
 * JSON text to a jansson tree and back, with the two things that jansson does not do: single-quoted strings in the input (an
 * extension of the control protocol) and integers outside int64.
 *
 * Such an integer is kept as a *big integer*: a string whose first byte is NUL and whose rest is the literal. No text can forge
 * one, as "\u0000" in the input is an error and jansson takes no raw NUL; no C string can either. Dumping writes the literal
 * again, so that a tree goes through unchanged.
 */
#ifndef CAIRN_BASE_JSON_TEXT_H
#define CAIRN_BASE_JSON_TEXT_H

#include "base/error.h"

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/*
 * Reads one JSON value, which must fill all of the text but for white space. The caller bounds its nesting: 1,024 levels
 * need about 330 KiB of stack (jansson calls itself for each, here and when the tree is freed), which no coroutine has.
 */
int json_text_load(const char *text, size_t len, json_t **ret_value, struct error **err);

/* Writes the value as text, one line or indented; everything outside ASCII is escaped. NULL when memory runs out. */
char *json_text_dump(const json_t *value, bool pretty);

/* An integer of the whole range; a big integer where int64 does not hold it. NULL when memory runs out. */
json_t *json_from_uint(uint64_t value);

/* The literal of a big integer, borrowed; NULL if the value is anything else. */
const char *json_big_integer(const json_t *value);

/* A string from bytes that may not be UTF-8 (file names): what is not becomes U+FFFD. NULL when memory runs out. */
json_t *json_string_lossy(const char *text);

#endif
