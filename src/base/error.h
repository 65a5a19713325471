/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Errors of the control path. A function that takes `struct error **err` returns a status: test that, never *err. `err` is
 * never NULL and *err is NULL on entry. Who detects the failure writes the message; callers add what they know. The data
 * path uses negative errnos and nothing else.
 *
 * A good message names the object, the value found, the value expected, and the way out; one line, lower case, no full stop.
 */
#ifndef CAIRN_BASE_ERROR_H
#define CAIRN_BASE_ERROR_H

#include "base/macros.h"

struct error;

/* The classes of the control protocol; clients may branch on them. */
enum error_class {
    ERROR_GENERIC,
    ERROR_COMMAND_NOT_FOUND,
    ERROR_DEVICE_NOT_ACTIVE,
    ERROR_DEVICE_NOT_FOUND,
};

/*
 * Sets *err and returns -errnum. errnum is positive. This and error_wrap() are no functions, so that compilers and analyzers know
 * what they return: what is only set on success is not used after them.
 */
#define error_set(err, errnum, ...)                                                                \
    ({                                                                                             \
        int error_num_ = (errnum);                                                                 \
        error_put((err), error_num_, __VA_ARGS__);                                                 \
        -error_num_;                                                                               \
    })

/* As error_set(), with a class other than ERROR_GENERIC. */
int error_set_class(struct error **err, enum error_class class, int errnum, const char *fmt, ...)
    PRINTF_LIKE(4, 5);

/* Puts "<text>: " before the message of *err, which must be set. Returns r. */
#define error_wrap(err, r, ...)                                                                    \
    ({                                                                                             \
        int error_wrapped_ = (r);                                                                  \
        error_prefix((err), __VA_ARGS__);                                                          \
        error_wrapped_;                                                                            \
    })

/* What these two do besides. */
void error_put(struct error **err, int errnum, const char *fmt, ...) PRINTF_LIKE(3, 4);
void error_prefix(struct error **err, const char *fmt, ...) PRINTF_LIKE(2, 3);

const char *error_text(const struct error *err);
enum error_class error_get_class(const struct error *err);
/* Positive errno. */
int error_errno(const struct error *err);

/* Moves an error to another place; *from is NULL afterwards. */
void error_move(struct error **to, struct error **from);

/* Frees *err and sets it to NULL; safe when it is NULL. For AUTO(error_free). */
void error_free(struct error **err);

#endif
