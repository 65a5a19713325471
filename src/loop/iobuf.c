/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The buffer pool: free lists by power of two from 4 KiB, per loop. A buffer keeps its memory while it is in the pool; beyond
 * POOL_MAX_BYTES of idle memory buffers go back to the kernel.
 */
#include "loop/iobuf.h"
#include "base/alloc.h"
#include "base/macros.h"
#include "loop/loop-internal.h"

#include <assert.h>
#include <stdlib.h>

#define SMALLEST_SHIFT 12
#define POOL_MAX_BYTES ((size_t)16 << 20)

static unsigned class_of(size_t size)
{
    if (size <= (size_t)1 << SMALLEST_SHIFT)
        return 0;
    return (unsigned)(64 - __builtin_clzl(size - 1)) - SMALLEST_SHIFT;
}

struct iobuf *iobuf_new(size_t size)
{
    struct loop *loop = loop_self();
    unsigned class = class_of(size);
    struct iobuf *b;

    if (size > IOBUF_MAX)
        return NULL;
    assert(class < ARRAY_SIZE(loop->free_bufs));
    b = loop->free_bufs[class];
    if (likely(b)) {
        loop->free_bufs[class] = b->next_free;
        loop->free_buf_bytes -= b->size;
        b->refs = 1;
        return b;
    }
    b = try_new(struct iobuf);
    if (!b)
        return NULL;
    b->size_class = class;
    b->size = (size_t)1 << (class + SMALLEST_SHIFT);
    b->data = aligned_alloc((size_t)1 << SMALLEST_SHIFT, b->size);
    if (!b->data) {
        free(b);
        return NULL;
    }
    b->refs = 1;
    return b;
}

static void iobuf_free(struct iobuf *b)
{
    free(b->data);
    free(b);
}

struct iobuf *iobuf_unref(struct iobuf *b)
{
    struct loop *loop;

    if (!b)
        return NULL;
    assert(b->refs);
    if (--b->refs)
        return NULL;
    loop = loop_self();
    if (loop->free_buf_bytes + b->size > POOL_MAX_BYTES) {
        iobuf_free(b);
        return NULL;
    }
    b->next_free = loop->free_bufs[b->size_class];
    loop->free_bufs[b->size_class] = b;
    loop->free_buf_bytes += b->size;
    return NULL;
}

void iobuf_pool_release(struct loop *loop)
{
    for (unsigned i = 0; i < ARRAY_SIZE(loop->free_bufs); i++) {
        while (loop->free_bufs[i]) {
            struct iobuf *b = loop->free_bufs[i];

            loop->free_bufs[i] = b->next_free;
            iobuf_free(b);
        }
    }
    loop->free_buf_bytes = 0;
}
