/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Memory. xnew() and its kin are for small control-plane objects and abort when there is none (ADR 0004); try_new() returns
 * NULL and serves everything whose size or number a client or an image chooses, and all of a change's prepare (D4).
 * All memory is zeroed and freed by free().
 */
#ifndef CAIRN_BASE_ALLOC_H
#define CAIRN_BASE_ALLOC_H

#include "base/macros.h"

#include <stdarg.h>
#include <stddef.h>

void *xalloc(size_t count, size_t size) __attribute__((malloc, alloc_size(1, 2), returns_nonnull));
void *try_alloc(size_t count, size_t size) __attribute__((malloc, alloc_size(1, 2)));
char *xstrdup(const char *s) __attribute__((malloc, returns_nonnull));
char *xasprintf(const char *fmt, ...) PRINTF_LIKE(1, 2) __attribute__((malloc, returns_nonnull));
char *xvasprintf(const char *fmt, va_list args) PRINTF_LIKE(1, 0)
    __attribute__((malloc, returns_nonnull));

#define xnew(type)         ((type *)xalloc(1, sizeof(type)))
#define xnew_n(type, n)    ((type *)xalloc((n), sizeof(type)))
#define try_new(type)      ((type *)try_alloc(1, sizeof(type)))
#define try_new_n(type, n) ((type *)try_alloc((n), sizeof(type)))

/*
 * Fault injection for tests (D4): the k-th try_alloc from now fails, counted from 1; 0 turns it off. Returns how many calls
 * there were since the last setting. Per thread.
 */
unsigned alloc_fail_at(unsigned k);

/* For AUTO(): frees what the pointer points to. */
void free_ptr(void *pp);

#endif
