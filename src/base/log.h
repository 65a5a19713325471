/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Logging. Lines go through a hook, since only the loop may touch files (S1); without a hook they are dropped. A line is for
 * a failure that we survive ("..., ignoring", "..., retrying") or for debugging; everything else is an error that is returned.
 */
#ifndef CAIRN_BASE_LOG_H
#define CAIRN_BASE_LOG_H

#include "base/macros.h"

enum log_level { LOG_WARNING, LOG_INFO, LOG_DEBUG };

typedef void log_hook_fn(enum log_level level, const char *line);

/* Called from any thread; the hook must be thread-safe. Set once at start. */
void log_set_hook(log_hook_fn *fn, enum log_level most);

void log_line(enum log_level level, const char *fmt, ...) PRINTF_LIKE(2, 3);

#define log_warning(...) log_line(LOG_WARNING, __VA_ARGS__)
#define log_info(...)    log_line(LOG_INFO, __VA_ARGS__)
#define log_debug(...)   log_line(LOG_DEBUG, __VA_ARGS__)

#endif
