/* SPDX-License-Identifier: Apache-2.0 */
/*
 * JSON text and trees. Input that uses an extension is first rewritten to what jansson takes, in two walks by the same code:
 * one that measures, one that writes. Most input uses none and goes to jansson as it is.
 */
#include "base/json-text.h"

#include "base/alloc.h"

#include <ctype.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* How jansson writes the NUL that marks a big integer, and the quote before it. */
#define BIG_MARK     "\"\\u0000"
#define BIG_MARK_LEN (sizeof(BIG_MARK) - 1)

struct rewrite {
    const char *in;
    size_t in_len;
    size_t in_pos;
    char *out; /* NULL: measure only */
    size_t out_len;
    bool changed;
};

static void emit(struct rewrite *w, const char *bytes, size_t len)
{
    if (w->out)
        memcpy(w->out + w->out_len, bytes, len);
    w->out_len += len;
}

static bool is_nul_escape(const char *at, size_t left)
{
    return left >= 6 && memcmp(at, "\\u0000", 6) == 0;
}

/* Copies an escape sequence; \' loses its backslash. */
static int rewrite_escape(struct rewrite *w, struct error **err)
{
    const char *at = w->in + w->in_pos;
    size_t left = w->in_len - w->in_pos;

    if (is_nul_escape(at, left))
        return error_set(err, EINVAL,
                         "JSON parse error at byte %zu: \\u0000 is not allowed in a string",
                         w->in_pos);
    if (left >= 2 && at[1] == '\'') {
        emit(w, "'", 1);
        w->changed = true;
        w->in_pos += 2;
    } else {
        emit(w, at, left >= 2 ? 2 : 1);
        w->in_pos += left >= 2 ? 2 : 1;
    }
    return 0;
}

/* Copies a string, whose quotes become double ones. One that does not end is left for jansson to refuse. */
static int rewrite_string(struct rewrite *w, struct error **err)
{
    char quote = w->in[w->in_pos++];

    if (quote == '\'')
        w->changed = true;
    emit(w, "\"", 1);
    while (w->in_pos < w->in_len) {
        char c = w->in[w->in_pos];

        if (c == '\\') {
            int r = rewrite_escape(w, err);

            if (r < 0)
                return r;
            continue;
        }
        w->in_pos++;
        if (c == quote) {
            emit(w, "\"", 1);
            return 0;
        }
        if (c == '"')
            emit(w, "\\\"", 2);
        else
            emit(w, &c, 1);
    }
    return 0;
}

/* True for a well-formed integer literal that int64 does not hold. */
static bool is_big_literal(const char *text, size_t len)
{
    size_t sign = len > 0 && text[0] == '-';
    size_t digits = len - sign;
    const char *limit = sign ? "9223372036854775808" : "9223372036854775807";

    if (digits < 19 || text[sign] == '0')
        return false;
    for (size_t i = sign; i < len; i++)
        if (text[i] < '0' || text[i] > '9')
            return false;
    return digits > 19 || memcmp(text + sign, limit, 19) > 0;
}

static void rewrite_word(struct rewrite *w)
{
    const char *word = w->in + w->in_pos;
    size_t len = 1;

    while (w->in_pos + len < w->in_len &&
           (isalnum((unsigned char)word[len]) || strchr("+-._", word[len])) && word[len])
        len++;
    if (is_big_literal(word, len)) {
        emit(w, BIG_MARK, BIG_MARK_LEN);
        emit(w, word, len);
        emit(w, "\"", 1);
        w->changed = true;
    } else {
        emit(w, word, len);
    }
    w->in_pos += len;
}

/* Stops when the output has reached `out_stop` bytes: so an offset in the output is found in the input. */
static int rewrite_text(struct rewrite *w, size_t out_stop, struct error **err)
{
    while (w->in_pos < w->in_len && w->out_len < out_stop) {
        char c = w->in[w->in_pos];

        if (c == '"' || c == '\'') {
            int r = rewrite_string(w, err);

            if (r < 0)
                return r;
        } else if (c == '-' || (c >= '0' && c <= '9')) {
            rewrite_word(w);
        } else {
            emit(w, &c, 1);
            w->in_pos++;
        }
    }
    return 0;
}

/* The place in the input that made byte `out_offset` of the rewritten text, to the nearest token. */
static size_t input_offset(const char *text, size_t len, size_t out_offset)
{
    struct rewrite w = {.in = text, .in_len = len};
    AUTO(error_free) struct error *ignored = NULL;

    (void)rewrite_text(&w, out_offset, &ignored); /* it went well before */
    return w.in_pos;
}

/* Messages of jansson quote the input: cut what a client could make long, keep to one line. */
static int parse_error(const char *text, size_t len, bool rewritten, const json_error_t *e,
                       struct error **err)
{
    size_t offset = e->position > 0 ? (size_t)e->position : 0;
    char what[sizeof(e->text)];
    size_t n = 0;

    for (; e->text[n] && n + 1 < sizeof(what); n++)
        what[n] = (char)(e->text[n] >= ' ' && e->text[n] < 0x7f ? e->text[n] : '?');
    what[n] = '\0';
    if (json_error_code(e) == json_error_out_of_memory ||
        !e->text[0]) /* jansson is silent in some places */
        return error_set(err, ENOMEM, "not enough memory to read %zu bytes of JSON", len);
    return error_set(err, EINVAL, "JSON parse error at byte %zu: %s",
                     rewritten ? input_offset(text, len, offset) : offset, what);
}

int json_text_load(const char *text, size_t len, json_t **ret_value, struct error **err)
{
    struct rewrite w = {.in = text, .in_len = len};
    AUTO(free_ptr) char *rewritten = NULL;
    const char *source = text;
    json_error_t e = {.position = 0};
    json_t *value;
    int r = rewrite_text(&w, SIZE_MAX, err);

    if (r < 0)
        return r;
    if (w.changed) {
        rewritten = try_new_n(char, w.out_len + 1);
        if (!rewritten)
            return error_set(err, ENOMEM, "not enough memory to read %zu bytes of JSON", len);
        w = (struct rewrite){.in = text, .in_len = len, .out = rewritten};
        r = rewrite_text(&w, SIZE_MAX, err);
        if (r < 0)
            return r;
        source = rewritten;
    }
    value = json_loadb(source, w.out_len, JSON_DECODE_ANY | JSON_ALLOW_NUL | JSON_REJECT_DUPLICATES,
                       &e);
    if (!value)
        return parse_error(text, len, rewritten != NULL, &e, err);
    *ret_value = value;
    return 0;
}

/* Turns each big integer's string back into its literal, in place. The quote before the mark tells it from any text. */
static void unmark_big_integers(char *text)
{
    char *mark = strstr(text, BIG_MARK);
    char *out = mark;
    const char *in = mark;

    while (mark) {
        size_t run = (size_t)(mark - in);

        memmove(out, in, run);
        out += run;
        in = mark + BIG_MARK_LEN;
        while (*in != '"')
            *out++ = *in++;
        in++;
        mark = strstr(in, BIG_MARK);
    }
    if (out)
        memmove(out, in, strlen(in) + 1);
}

char *json_text_dump(const json_t *value, bool pretty)
{
    size_t layout = pretty ? (size_t)JSON_INDENT(4) : (size_t)0;
    char *text = json_dumps(value, layout | JSON_ENCODE_ANY | JSON_ENSURE_ASCII);

    if (text)
        unmark_big_integers(text);
    return text;
}

json_t *json_from_uint(uint64_t value)
{
    char marked[32] = "";
    int len;

    if (value <= INT64_MAX)
        return json_integer((json_int_t)value);
    len = snprintf(marked + 1, sizeof(marked) - 1, "%llu", (unsigned long long)value);
    return json_stringn(marked, (size_t)len + 1);
}

const char *json_big_integer(const json_t *value)
{
    if (!json_is_string(value) || json_string_length(value) == 0 ||
        json_string_value(value)[0] != '\0')
        return NULL;
    return json_string_value(value) + 1;
}

/* The length of the well-formed UTF-8 sequence at p, or 0. */
static size_t utf8_length(const unsigned char *p)
{
    static const uint32_t lowest[] = {0, 0, 0x80, 0x800, 0x10000};
    size_t len = p[0] < 0x80   ? 1
                 : p[0] < 0xc0 ? 0
                 : p[0] < 0xe0 ? 2
                 : p[0] < 0xf0 ? 3
                 : p[0] < 0xf8 ? 4
                               : 0;
    uint32_t code;

    if (len < 2)
        return len;
    code = p[0] & (0xffu >> (len + 1));
    for (size_t i = 1; i < len; i++) {
        if ((p[i] & 0xc0) != 0x80)
            return 0;
        code = code << 6 | (p[i] & 0x3fu);
    }
    return code < lowest[len] || code > 0x10ffff || (code >= 0xd800 && code < 0xe000) ? 0 : len;
}

json_t *json_string_lossy(const char *text)
{
    AUTO(free_ptr) char *mended = NULL;
    const unsigned char *in = (const unsigned char *)text;
    char *out;
    json_t *value = json_string(text);

    if (value)
        return value;
    mended = try_new_n(char, 3 * strlen(text) + 1);
    if (!mended)
        return NULL;
    out = mended;
    while (*in) {
        size_t len = utf8_length(in);

        memcpy(out, len ? (const char *)in : "\xef\xbf\xbd", len ? len : 3);
        out += len ? len : 3;
        in += len ? len : 1;
    }
    return json_string(mended);
}
