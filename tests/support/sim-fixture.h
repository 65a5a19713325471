/* SPDX-License-Identifier: Apache-2.0 */
/* For tests of the simulator: a file that is written byte by byte. */
#ifndef CAIRN_TESTS_SIM_FIXTURE_H
#define CAIRN_TESTS_SIM_FIXTURE_H

#include "loop/file.h"
#include "sim-run.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <string.h>

#define PATH "/disk/a.img"

static inline struct file *open_file(const char *path, unsigned flags)
{
    struct error *err = NULL;
    struct file *f;

    if (file_co_open(&f, path, flags, 0600, &err) < 0)
        fail_msg("%s", error_text(err));
    return f;
}

static inline int write_byte(struct file *f, uint64_t offset, size_t len, char c, bool durable)
{
    struct iobuf *b = iobuf_new(len);
    struct iovec iov = {b->data, len};
    int r;

    memset(b->data, c, len);
    r = file_co_write(f, offset, &iov, 1, durable, b);
    iobuf_unref(b);
    return r;
}

#endif
