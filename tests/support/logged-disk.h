/* SPDX-License-Identifier: Apache-2.0 */
/* A disk whose every request is in a sector log: what is written says where and when, what is read is judged by it. */
#ifndef CAIRN_TESTS_LOGGED_DISK_H
#define CAIRN_TESTS_LOGGED_DISK_H

#include "graph-fixture.h"
#include "qcow2-fixture.h"
#include "sector-log.h"

/* In sectors. All return what the request does, on any attached loop. */
static inline int logged_write(struct backend *b, struct sector_log *l, uint64_t first,
                               uint64_t count, unsigned flags)
{
    uint64_t value = log_new_value(l);
    uint8_t *data = xalloc(count, LOG_SECTOR);
    uint32_t op;
    int r;

    for (uint64_t i = 0; i < count; i++)
        log_fill(data + i * LOG_SECTOR, first + i, value);
    op = log_begin(l, first, count, value, false);
    r = send_request(b, REQUEST_WRITE, flags, first * LOG_SECTOR, count * LOG_SECTOR, data);
    log_end(l, op, flags & REQUEST_FUA, r < 0);
    free(data);
    return r;
}

/* Zeroes, or a discard, after which there may be what there was. */
static inline int logged_clear(struct backend *b, struct sector_log *l, enum request_kind kind,
                               uint64_t first, uint64_t count, unsigned flags)
{
    uint32_t op = log_begin(l, first, count, 0, kind == REQUEST_DISCARD);
    int r = send_request(b, kind, flags, first * LOG_SECTOR, count * LOG_SECTOR, NULL);

    log_end(l, op, false, r < 0);
    return r;
}

/* Aborts if it is not what the disk may hold. */
static inline int logged_read(struct backend *b, struct sector_log *l, uint64_t first,
                              uint64_t count)
{
    uint8_t *data = xalloc(count, LOG_SECTOR);
    uint64_t start = log_tick(l);
    int r = read_at(b, first * LOG_SECTOR, count * LOG_SECTOR, data);

    if (r == 0)
        log_check_read(l, first, count, data, start);
    free(data);
    return r;
}

static inline int logged_flush(struct backend *b, struct sector_log *l)
{
    uint64_t start = log_tick(l);
    int r = flush(b);

    if (r == 0)
        log_flushed(l, start);
    return r;
}

/* A backing file for a disk of that many sectors, all of one value that no writer has. */
static inline void logged_base_make(struct sim_disk *disk, const char *path, struct sector_log *l,
                                    uint64_t sectors)
{
    const uint64_t value = (uint64_t)1 << 40;
    struct qcow2_shape base = {.version = 3,
                               .cluster_bits = 9,
                               .refcount_order = 4,
                               .size = sectors * LOG_SECTOR,
                               .allocated = sectors};
    size_t len;
    uint8_t *bytes = qcow2_make(&base, &len);

    for (uint64_t i = 0; i < sectors; i++) {
        l->sectors[i].initial = value;
        log_fill(bytes + len - (sectors - i) * LOG_SECTOR, i, value);
    }
    image_put(disk, path, bytes, len);
    free(bytes);
}

#endif
