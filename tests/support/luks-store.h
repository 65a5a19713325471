/* SPDX-License-Identifier: Apache-2.0 */
/* For tests of LUKS volumes: a store in memory that fails when it is told to, and remembers what a power cut may take. */
#ifndef CAIRN_TESTS_LUKS_STORE_H
#define CAIRN_TESTS_LUKS_STORE_H

#include "base/alloc.h"
#include "base/prng.h"
#include "crypto/luks.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define STORE_BYTES ((size_t)3 << 20)

struct memory_store {
    uint8_t *now;        /* what reads give */
    uint8_t *durable;    /* what is left after a cut, but for what follows */
    bool *dirty;         /* by sector: differs, perhaps */
    unsigned operations; /* writes and syncs so far */
    unsigned stop_at;    /* from this one on all fail; 0: none does */
};

static inline void memory_store_init(struct memory_store *m)
{
    *m = (struct memory_store){
        .now = xalloc(1, STORE_BYTES),
        .durable = xalloc(1, STORE_BYTES),
        .dirty = xalloc(STORE_BYTES / 512, sizeof(bool)),
    };
}

static inline void memory_store_release(struct memory_store *m)
{
    free(m->now);
    free(m->durable);
    free(m->dirty);
}

/* The lights go out: each sector that was not synced is there or not. */
static inline void memory_store_cut(struct memory_store *m, struct prng *prng)
{
    for (size_t i = 0; i < STORE_BYTES / 512; i++) {
        if (m->dirty[i] && prng_chance(prng, 500))
            memcpy(m->durable + i * 512, m->now + i * 512, 512);
        m->dirty[i] = false;
    }
    memcpy(m->now, m->durable, STORE_BYTES);
    m->stop_at = 0;
}

static inline bool memory_store_stops(struct memory_store *m)
{
    m->operations++;
    return m->stop_at && m->operations >= m->stop_at;
}

static inline int memory_store_read(void *arg, uint64_t offset, struct iobuf *b, size_t len)
{
    struct memory_store *m = arg;

    memset(b->data, 0, len);
    if (offset < STORE_BYTES)
        memcpy(b->data, m->now + offset, MIN(len, STORE_BYTES - (size_t)offset));
    return 0;
}

/* The one that fails may have been written all the same. */
static inline int memory_store_write(void *arg, uint64_t offset, struct iobuf *b, size_t len)
{
    struct memory_store *m = arg;
    bool stops = memory_store_stops(m);

    if (stops && m->operations > m->stop_at)
        return -EIO;
    if (offset + len > STORE_BYTES)
        return -EIO;
    memcpy(m->now + offset, b->data, len);
    for (size_t i = (size_t)offset / 512; i * 512 < offset + len; i++)
        m->dirty[i] = true;
    return stops ? -EIO : 0;
}

static inline int memory_store_sync(void *arg)
{
    struct memory_store *m = arg;

    if (memory_store_stops(m))
        return -EIO;
    for (size_t i = 0; i < STORE_BYTES / 512; i++) {
        if (m->dirty[i])
            memcpy(m->durable + i * 512, m->now + i * 512, 512);
        m->dirty[i] = false;
    }
    return 0;
}

static inline struct luks_store memory_store_of(struct memory_store *m)
{
    return (struct luks_store){.arg = m,
                               .len = STORE_BYTES,
                               .co_read = memory_store_read,
                               .co_write = memory_store_write,
                               .co_sync = memory_store_sync};
}

/* A secret of some text; borrowed. */
static inline struct secret secret_of(const char *text)
{
    return (struct secret){(uint8_t *)(uintptr_t)text, strlen(text)};
}

#endif
