/* SPDX-License-Identifier: Apache-2.0 */
/* Memory: aborting and failing allocation, and the fault injection that tests use. */
#include "base/alloc.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static _Thread_local unsigned fail_at;
static _Thread_local unsigned calls;

static void out_of_memory(void)
{
    (void)fputs("cairn: out of memory\n", stderr);
    abort();
}

void *xalloc(size_t count, size_t size)
{
    void *p = calloc(count ? count : 1, size ? size : 1);

    if (!p)
        out_of_memory();
    return p;
}

void *try_alloc(size_t count, size_t size)
{
    calls++;
    if (unlikely(fail_at && calls == fail_at))
        return NULL;
    return calloc(count ? count : 1, size ? size : 1);
}

char *xstrdup(const char *s)
{
    char *copy = strdup(s);

    if (!copy)
        out_of_memory();
    return copy;
}

char *xvasprintf(const char *fmt, va_list args)
{
    char *s;

    if (vasprintf(&s, fmt, args) < 0)
        out_of_memory();
    return s;
}

char *xasprintf(const char *fmt, ...)
{
    va_list args;
    char *s;

    va_start(args, fmt);
    s = xvasprintf(fmt, args);
    va_end(args);
    return s;
}

unsigned alloc_fail_at(unsigned k)
{
    unsigned n = calls;

    fail_at = k;
    calls = 0;
    return n;
}

void free_ptr(void *pp)
{
    free(*(void **)pp);
}
