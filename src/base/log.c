/* SPDX-License-Identifier: Apache-2.0 */
/* Logging through a hook. */
#include "base/log.h"

#include <stdarg.h>
#include <stdio.h>

static log_hook_fn *hook;
static enum log_level hook_most = LOG_WARNING;

void log_set_hook(log_hook_fn *fn, enum log_level most)
{
    hook = fn;
    hook_most = most;
}

void log_line(enum log_level level, const char *fmt, ...)
{
    char line[1024];
    va_list args;

    if (!hook || level > hook_most)
        return;
    va_start(args, fmt);
    (void)vsnprintf(line, sizeof(line), fmt,
                    args); /* a longer line is cut, which is better than none */
    va_end(args);
    hook(level, line);
}
