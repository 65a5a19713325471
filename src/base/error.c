/* SPDX-License-Identifier: Apache-2.0 */
/* Errors: an errno, a class and a line of text. */
#include "base/error.h"
#include "base/alloc.h"

#include <assert.h>
#include <stdarg.h>
#include <stdlib.h>

struct error {
    int errnum;
    enum error_class class;
    char *text;
};

static int PRINTF_LIKE(4, 0) error_vset(struct error **err, enum error_class class, int errnum,
                                        const char *fmt, va_list args)
{
    assert(err && !*err && errnum > 0);
    *err = xnew(struct error);
    (*err)->errnum = errnum;
    (*err)->class = class;
    (*err)->text = xvasprintf(fmt, args);
    return -errnum;
}

void error_put(struct error **err, int errnum, const char *fmt, ...)
{
    va_list args;

    va_start(args, fmt);
    (void)error_vset(err, ERROR_GENERIC, errnum, fmt, args);
    va_end(args);
}

int error_set_class(struct error **err, enum error_class class, int errnum, const char *fmt, ...)
{
    va_list args;
    int r;

    va_start(args, fmt);
    r = error_vset(err, class, errnum, fmt, args);
    va_end(args);
    return r;
}

void error_prefix(struct error **err, const char *fmt, ...)
{
    AUTO(free_ptr) char *prefix = NULL;
    char *text;
    va_list args;

    assert(err && *err);
    va_start(args, fmt);
    prefix = xvasprintf(fmt, args);
    va_end(args);
    text = xasprintf("%s: %s", prefix, (*err)->text);
    free((*err)->text);
    (*err)->text = text;
}

const char *error_text(const struct error *err)
{
    return err->text;
}

enum error_class error_get_class(const struct error *err)
{
    return err->class;
}

int error_errno(const struct error *err)
{
    return err->errnum;
}

void error_move(struct error **to, struct error **from)
{
    assert(!*to);
    *to = take(from);
}

void error_free(struct error **err)
{
    struct error *e = take(err);

    if (!e)
        return;
    free(e->text);
    free(e);
}
