/* SPDX-License-Identifier: Apache-2.0 */
/*
 * I/O buffers: page-aligned memory from a pool of the loop, counted. Whoever lends a buffer to the kernel holds a reference
 * until it is given back, so that a waiter may leave early (G8). Only touched on the loop that made it.
 */
#ifndef CAIRN_LOOP_IOBUF_H
#define CAIRN_LOOP_IOBUF_H

#include <stddef.h>
#include <stdint.h>

struct iobuf {
    uint8_t *data; /* aligned to 4 KiB */
    size_t size;   /* at least what was asked for */
    unsigned refs;
    unsigned size_class;
    struct iobuf *next_free;
};

/* The largest buffer: 33 MiB, a 32 MiB request and its framing. */
#define IOBUF_MAX ((size_t)33 << 20)

/* NULL when there is no memory, or size is above IOBUF_MAX. The content is undefined. */
struct iobuf *iobuf_new(size_t size);

static inline struct iobuf *iobuf_ref(struct iobuf *b)
{
    b->refs++;
    return b;
}

/* Returns NULL; NULL is fine. */
struct iobuf *iobuf_unref(struct iobuf *b);

#endif
