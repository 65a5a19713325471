/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a disk's sectors may hold while and after many write them at once: each sector is a register whose reads return the
 * last value that was written, or one that was being written meanwhile. After a power cut it holds a value that was not
 * replaced by one that had become durable. Content says which sector it is of and which value, so that a third value, or a
 * sector that has come to a wrong place, is seen as what it is.
 *
 * Any thread.
 */
#ifndef CAIRN_TESTS_SECTOR_LOG_H
#define CAIRN_TESTS_SECTOR_LOG_H

#include "base/alloc.h"
#include "base/endian.h"

#include <inttypes.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define LOG_SECTOR 512u
#define LOG_NEVER  UINT64_MAX
#define LOG_ALIEN  UINT64_MAX /* as a value: content that nobody wrote to this sector */

struct log_op {
    uint64_t value;
    uint64_t start;
    uint64_t end;
    bool durable;  /* by itself when it ended */
    bool optional; /* it may have left what was there: discards, and what failed */
};

struct log_sector {
    uint32_t *ops; /* indices */
    uint32_t count;
    uint32_t capacity;
    uint64_t initial;
};

struct log_flush {
    uint64_t start;
    uint64_t end;
};

struct sector_log {
    pthread_mutex_t lock;
    uint64_t clock;
    struct log_sector *sectors;
    uint64_t sector_count;
    struct log_op *ops;
    uint32_t op_count;
    uint32_t op_capacity;
    struct log_flush *flushes; /* those that succeeded */
    uint32_t flush_count;
    uint32_t flush_capacity;
    uint64_t next_value;
};

static inline void *log_grow(void *p, size_t bytes)
{
    p = realloc(p, bytes);
    if (!p)
        abort();
    return p;
}

static inline void log_init(struct sector_log *l, uint64_t sectors)
{
    *l = (struct sector_log){.clock = 1, .sector_count = sectors, .next_value = 1};
    pthread_mutex_init(&l->lock, NULL);
    l->sectors = xalloc(sectors, sizeof(*l->sectors));
}

static inline void log_release(struct sector_log *l)
{
    for (uint64_t i = 0; i < l->sector_count; i++)
        free(l->sectors[i].ops);
    free(l->sectors);
    free(l->ops);
    free(l->flushes);
    pthread_mutex_destroy(&l->lock);
}

/* ---- content ---- */

/* Words repeat within a sector, so that clusters of them can be compressed. */
static inline uint64_t log_word(uint64_t sector, uint64_t value, unsigned i)
{
    uint64_t x = (sector + 1) * 0x9e3779b97f4a7c15u ^ (value + i % 8) * 0xbf58476d1ce4e5b9u;

    x ^= x >> 29;
    return (x * 0x94d049bb133111ebu) | 1;
}

/* Value 0 is zeroes. */
static inline void log_fill(void *buf, uint64_t sector, uint64_t value)
{
    memset(buf, 0, LOG_SECTOR);
    if (value == 0)
        return;
    store_be64(buf, sector + 1);
    store_be64((char *)buf + 8, value);
    for (unsigned i = 2; i < LOG_SECTOR / 8; i++)
        store_be64((char *)buf + 8 * i, log_word(sector, value, i));
}

static inline bool log_is_zero(const char *sector)
{
    return sector[0] == 0 && memcmp(sector, sector + 1, LOG_SECTOR - 1) == 0;
}

static inline uint64_t log_value(const void *buf, uint64_t sector)
{
    uint8_t expected[LOG_SECTOR];
    uint64_t value = load_be64((const char *)buf + 8);

    if (log_is_zero(buf))
        return 0;
    log_fill(expected, sector, value);
    return memcmp(buf, expected, LOG_SECTOR) == 0 ? value : LOG_ALIEN;
}

/* ---- what happens ---- */

static inline uint64_t log_tick(struct sector_log *l)
{
    uint64_t now;

    pthread_mutex_lock(&l->lock);
    now = l->clock++;
    pthread_mutex_unlock(&l->lock);
    return now;
}

static inline uint64_t log_new_value(struct sector_log *l)
{
    uint64_t value;

    pthread_mutex_lock(&l->lock);
    value = l->next_value++;
    pthread_mutex_unlock(&l->lock);
    return value;
}

/* Begins a change of sectors; the number it returns ends it. */
static inline uint32_t log_begin(struct sector_log *l, uint64_t first, uint64_t count,
                                 uint64_t value, bool optional)
{
    uint32_t number;

    pthread_mutex_lock(&l->lock);
    if (l->op_count == l->op_capacity) {
        l->op_capacity = l->op_capacity ? l->op_capacity * 2 : 64;
        l->ops = log_grow(l->ops, l->op_capacity * sizeof(*l->ops));
    }
    number = l->op_count++;
    l->ops[number] = (struct log_op){value, l->clock++, LOG_NEVER, false, optional};
    for (uint64_t i = first; i < first + count; i++) {
        struct log_sector *s = &l->sectors[i];

        if (s->count == s->capacity) {
            s->capacity = s->capacity ? s->capacity * 2 : 8;
            s->ops = log_grow(s->ops, s->capacity * sizeof(*s->ops));
        }
        s->ops[s->count++] = number;
    }
    pthread_mutex_unlock(&l->lock);
    return number;
}

static inline void log_end(struct sector_log *l, uint32_t number, bool durable, bool failed)
{
    pthread_mutex_lock(&l->lock);
    l->ops[number].end = l->clock++;
    l->ops[number].durable = durable && !failed;
    if (failed)
        l->ops[number].optional = true;
    pthread_mutex_unlock(&l->lock);
}

/* A flush that began at this tick has succeeded. */
static inline void log_flushed(struct sector_log *l, uint64_t start)
{
    pthread_mutex_lock(&l->lock);
    if (l->flush_count == l->flush_capacity) {
        l->flush_capacity = l->flush_capacity ? l->flush_capacity * 2 : 16;
        l->flushes = log_grow(l->flushes, l->flush_capacity * sizeof(*l->flushes));
    }
    l->flushes[l->flush_count++] = (struct log_flush){start, l->clock++};
    pthread_mutex_unlock(&l->lock);
}

/* ---- what may be read ---- */

static inline bool log_is_durable(const struct sector_log *l, const struct log_op *op)
{
    if (op->durable)
        return true;
    for (uint32_t i = 0; i < l->flush_count; i++) {
        if (op->end < l->flushes[i].start)
            return true;
    }
    return false;
}

/* Was a value that was complete at `end` replaced for good? From `before` on it may not be seen any more. */
static inline bool log_replaced(const struct sector_log *l, const struct log_sector *s,
                                uint64_t end, uint64_t before, bool durably)
{
    for (uint32_t i = 0; i < s->count; i++) {
        const struct log_op *x = &l->ops[s->ops[i]];

        if (x->optional || x->start < end || end == LOG_NEVER)
            continue;
        if (durably ? log_is_durable(l, x) : x->end < before)
            return true;
    }
    return false;
}

static inline bool log_allows_locked(const struct sector_log *l, uint64_t sector, uint64_t value,
                                     uint64_t read_start, bool durably)
{
    const struct log_sector *s = &l->sectors[sector];

    if (value == s->initial && !log_replaced(l, s, 0, read_start, durably))
        return true;
    for (uint32_t i = 0; i < s->count; i++) {
        const struct log_op *op = &l->ops[s->ops[i]];

        if (op->value == value && !log_replaced(l, s, op->end, read_start, durably))
            return true;
    }
    return false;
}

static inline bool log_allows(struct sector_log *l, uint64_t sector, uint64_t value,
                              uint64_t read_start, bool durably)
{
    bool allowed;

    pthread_mutex_lock(&l->lock);
    allowed = log_allows_locked(l, sector, value, read_start, durably);
    pthread_mutex_unlock(&l->lock);
    return allowed;
}

static inline void log_print(struct sector_log *l, uint64_t sector, const char *what,
                             uint64_t value)
{
    const struct log_sector *s = &l->sectors[sector];

    fprintf(stderr, "sector %" PRIu64 " %s %s%" PRIu64 "; at first %" PRIu64 "\n", sector, what,
            value == LOG_ALIEN ? "something alien, " : "value ", value, s->initial);
    for (uint32_t i = 0; i < s->count; i++) {
        const struct log_op *op = &l->ops[s->ops[i]];

        fprintf(stderr, "  value %" PRIu64 " from %" PRIu64 " to %" PRIu64 "%s%s\n", op->value,
                op->start, op->end == LOG_NEVER ? 0 : op->end, op->optional ? ", optional" : "",
                log_is_durable(l, op) ? ", durable" : "");
    }
}

/*
 * Is each byte one of a value that is allowed? Writes at once may come in pieces, of any length, and reads see them between;
 * where nobody writes at the same time there is one such value.
 */
static inline bool log_allows_bytes(struct sector_log *l, uint64_t sector, const void *buf,
                                    uint64_t read_start, bool durably)
{
    const struct log_sector *s = &l->sectors[sector];
    uint8_t expected[LOG_SECTOR];
    bool right[LOG_SECTOR] = {false};
    bool all = true;

    pthread_mutex_lock(&l->lock);
    if (s->count == 0 && s->initial == 0) {
        pthread_mutex_unlock(&l->lock);
        return log_is_zero(buf);
    }
    for (uint32_t i = 0; i <= s->count; i++) {
        uint64_t value = i ? l->ops[s->ops[i - 1]].value : s->initial;

        if (!log_allows_locked(l, sector, value, read_start, durably))
            continue;
        log_fill(expected, sector, value);
        for (unsigned k = 0; k < LOG_SECTOR; k++)
            right[k] |= ((const uint8_t *)buf)[k] == expected[k];
    }
    pthread_mutex_unlock(&l->lock);
    for (unsigned k = 0; k < LOG_SECTOR; k++)
        all &= right[k];
    return all;
}

static inline void log_check(struct sector_log *l, uint64_t first, uint64_t count, const void *buf,
                             uint64_t read_start, bool durably, const char *what)
{
    for (uint64_t i = 0; i < count; i++) {
        const char *sector = (const char *)buf + i * LOG_SECTOR;

        if (log_allows_bytes(l, first + i, sector, read_start, durably))
            continue;
        log_print(l, first + i, what, log_value(sector, first + i));
        abort();
    }
}

/* Was it right to read this between read_start and now? Prints and aborts if not. */
static inline void log_check_read(struct sector_log *l, uint64_t first, uint64_t count,
                                  const void *buf, uint64_t read_start)
{
    log_check(l, first, count, buf, read_start, false, "was read as");
}

/* Is this what a power cut may have left? Prints and aborts if not. */
static inline void log_check_survivors(struct sector_log *l, uint64_t first, uint64_t count,
                                       const void *buf)
{
    log_check(l, first, count, buf, 0, true, "came back as");
}

#endif
