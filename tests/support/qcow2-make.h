/* SPDX-License-Identifier: Apache-2.0 */
/* qcow2 images for tests that no code of the driver has made, as bytes. */
#ifndef CAIRN_TESTS_QCOW2_MAKE_H
#define CAIRN_TESTS_QCOW2_MAKE_H

#include "base/alloc.h"
#include "base/endian.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

struct qcow2_shape {
    unsigned version;
    unsigned cluster_bits;
    unsigned refcount_order;
    uint64_t size;
    uint64_t
        allocated; /* so many guest clusters, from the start of the disk on, have a host cluster */
    uint64_t autoclear;
    bool zstd;           /* what is compressed; version 3 */
    const char *backing; /* name of the backing file in the header, or NULL; its format is qcow2 */
    bool extended;       /* L2 entries, with subclusters; version 3, clusters of 16 KiB at least */
    const char *data_file; /* name of the external data file, or NULL; version 3 */
    bool data_raw;         /* it is raw */
};

static inline void qcow2_put_refcount(uint8_t *block, unsigned order, uint64_t n)
{
    unsigned bits = 1u << order;

    if (bits < 8)
        block[n * bits / 8] |= (uint8_t)(1u << (n * bits % 8));
    else
        block[(n + 1) * (bits / 8) - 1] = 1;
}

static inline uint64_t div_up(uint64_t a, uint64_t b)
{
    return a / b + (a % b != 0);
}

static inline size_t qcow2_put_extension(uint8_t *b, size_t at, uint32_t type, const char *text)
{
    size_t len = strlen(text);

    store_be32(b + at, type);
    store_be32(b + at + 4, (uint32_t)len);
    memcpy(b + at + 8, text, len);
    return at + 8 + (len + 7) / 8 * 8;
}

/* Extensions and the name of the backing file. */
static inline void qcow2_put_backing(uint8_t *b, size_t at, const char *backing)
{
    at = qcow2_put_extension(b, at, 0xe2792aca, "qcow2") + 8; /* and the end of the extensions */
    store_be64(b + 8, at);
    store_be32(b + 16, (uint32_t)strlen(backing));
    memcpy(b + at, backing, strlen(backing));
}

/*
 * An empty image, or one with allocated clusters that hold zeroes: header, refcount table, refcount blocks, L1, L2 tables,
 * data. The caller's to free.
 */
static inline uint8_t *qcow2_make(const struct qcow2_shape *s, size_t *ret_len)
{
    uint64_t cluster = (uint64_t)1 << s->cluster_bits;
    uint64_t per_block = cluster * 8 >> s->refcount_order;
    uint64_t entry_len = s->extended ? 16 : 8;
    uint64_t l2_entries = cluster / entry_len;
    uint64_t in_file = s->data_file ? 0 : s->allocated;
    uint64_t l1_size = div_up(s->size, cluster * l2_entries);
    uint64_t l1_clusters = div_up(l1_size ? l1_size * 8 : 8, cluster);
    uint64_t l2_tables = div_up(s->allocated, l2_entries);
    uint64_t blocks = 1, table = 1, used, l1, l2, data;
    size_t end;
    uint8_t *b;

    do {
        used = 1 + table + blocks + l1_clusters + l2_tables + in_file;
        if (blocks * per_block >= used && table * (cluster / 8) >= blocks)
            break;
        blocks = div_up(used, per_block);
        table = div_up(blocks, cluster / 8);
    } while (true);
    l1 = 1 + table + blocks;
    l2 = l1 + l1_clusters;
    data = l2 + l2_tables;
    b = xalloc(1, used * cluster);
    store_be32(b, 0x514649fb);
    store_be32(b + 4, s->version);
    store_be32(b + 20, s->cluster_bits);
    store_be64(b + 24, s->size);
    store_be32(b + 36, (uint32_t)l1_size);
    store_be64(b + 40, l1 * cluster);
    store_be64(b + 48, cluster);
    store_be32(b + 56, (uint32_t)table);
    if (s->version == 3) {
        store_be64(b + 88, s->autoclear);
        store_be32(b + 96, s->refcount_order);
        store_be32(b + 100, 112);
        store_be64(b + 72, (s->zstd ? 8 : 0) | (s->extended ? 16 : 0) | (s->data_file ? 4 : 0));
        b[104] = s->zstd;
    }
    end = s->version == 3 ? 112 : 72;
    if (s->data_file) {
        store_be64(b + 88, s->autoclear | (s->data_raw ? 2 : 0));
        end = qcow2_put_extension(b, end, 0x44415441, s->data_file);
    }
    if (s->backing)
        qcow2_put_backing(b, end, s->backing);
    for (uint64_t i = 0; i < blocks; i++)
        store_be64(b + cluster + i * 8, (1 + table + i) * cluster);
    for (uint64_t i = 0; i < used; i++)
        qcow2_put_refcount(b + (1 + table + i / per_block) * cluster, s->refcount_order,
                           i % per_block);
    for (uint64_t i = 0; i < l2_tables; i++)
        store_be64(b + l1 * cluster + i * 8, (l2 + i) * cluster | (uint64_t)1 << 63);
    for (uint64_t i = 0; i < s->allocated; i++)
        store_be64(b + l2 * cluster + i * entry_len,
                   (s->data_file ? i : data + i) * cluster | (uint64_t)1 << 63);
    for (uint64_t i = 0; i < s->allocated && s->extended; i++)
        store_be64(b + l2 * cluster + i * 16 + 8, UINT32_MAX);
    *ret_len = used * cluster;
    return b;
}

#endif
