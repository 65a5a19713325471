/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Extended L2 entries: two words for each cluster, of which the second says for each of its 32 subclusters whether it holds data, reads
 * as zeroes, or neither.
 *
 * WRITE-5 The words of an entry are published one by one, the place before the bits: a new place has all that the old bits call data,
 *         so that each instant is a mapping that holds, or calls data what has no place, which nobody believes. Readers, who are
 *         inside the epoch, take the first word, the second, and the first again. If it is the same, it was there all the time, as no
 *         place comes back while they are inside (Q1), and the second belongs to it. Only the places of a data file may come back,
 *         which are always the same, and "no place". The bits of compressed entries mean nothing; so that they are never taken for
 *         those of no place, they call all data while they are in memory. Whoever finds no two words that belong together looks
 *         under the lock.
 *
 * On disk, an entry lies within one sector, so that a power cut leaves it old or new as a whole: tables begin at clusters, and 16 divides
 * 512. A picture of it is taken under the lock (FLUSH-1).
 */
#include "base/atomic.h"
#include "base/endian.h"
#include "base/macros.h"
#include "formats/qcow2/qcow2.h"

#include <errno.h>
#include <inttypes.h>

static uint32_t data_of(uint64_t bits)
{
    return (uint32_t)bits;
}

static uint32_t zero_of(uint64_t bits)
{
    return (uint32_t)(bits >> 32);
}

/* Can the two words be of one entry? Of a damaged image they may not be. */
static bool belongs(const struct qcow2 *q, struct qcow2_l2 e)
{
    return e.entry & QCOW2_L2_COMPRESSED || !data_of(e.bits) || qcow2_has_place(q, e.entry);
}

struct qcow2_l2 qcow2_entry_extended(struct qcow2 *q, const struct qcow2_slice *s,
                                     uint64_t guest_cluster)
{
    const uint64_t *words = &s->entries[2 * (guest_cluster & (qcow2_slice_entries(q) - 1))];
    /* Acquire: pair with qcow2_entry_publish(), each with the next. */
    uint64_t first = atomic_get_acquire(&words[0]);
    struct qcow2_l2 e = {.bits = atomic_get_acquire(&words[1])};

    e.entry = atomic_get_acquire(&words[0]); /* as above */
    if (likely(first == e.entry && belongs(q, e)))
        return e;
    tiny_lock_acquire(&q->lock);
    e = qcow2_entry_locked(q, s, guest_cluster);
    tiny_lock_release(&q->lock);
    return e;
}

void qcow2_bits_load(struct qcow2_slice *s, size_t words)
{
    for (size_t i = 0; i < words; i += 2) {
        if (s->entries[i] & QCOW2_L2_COMPRESSED)
            s->entries[i + 1] = QCOW2_ALL_DATA;
    }
}

void qcow2_bits_store(uint8_t *bytes, size_t len)
{
    for (size_t at = 0; at < len; at += QCOW2_L2_EXTENDED_ENTRY_LEN) {
        if (load_be64(bytes + at) & QCOW2_L2_COMPRESSED)
            store_be64(bytes + at + QCOW2_ENTRY_LEN, 0);
    }
}

/* WRITE-5 */
void qcow2_entry_publish(uint64_t *words, struct qcow2_l2 becomes)
{
    atomic_set(&words[0], becomes.entry);
    atomic_set(&words[1], becomes.entry & QCOW2_L2_COMPRESSED ? QCOW2_ALL_DATA : becomes.bits);
}

int qcow2_entry_kind_extended(struct qcow2 *q, uint64_t guest_cluster, struct qcow2_l2 e,
                              unsigned unit, enum qcow2_entry_kind *ret, uint64_t *ret_host)
{
    bool placed = qcow2_has_place(q, e.entry);

    *ret_host = QCOW2_NOWHERE;
    *ret = QCOW2_ENTRY_COMPRESSED;
    if (e.entry & QCOW2_L2_COMPRESSED)
        return qcow2_has_data_file(q)
                   ? qcow2_damaged(q, "it has compressed clusters beside an external data file")
                   : 0;
    if (e.entry & (QCOW2_L2_RESERVED_MASK | QCOW2_L2_ZERO))
        return qcow2_damaged(q, "an L2 entry has reserved bits set: %#" PRIx64, e.entry);
    if (data_of(e.bits) & zero_of(e.bits) || (data_of(e.bits) && !placed))
        return qcow2_damaged(q,
                             "the L2 entry of guest cluster %" PRIu64
                             " says of its subclusters what cannot be: %#" PRIx64,
                             guest_cluster, e.bits);
    *ret = data_of(e.bits) >> unit & 1   ? QCOW2_ENTRY_DATA
           : zero_of(e.bits) >> unit & 1 ? QCOW2_ENTRY_ZERO
                                         : QCOW2_ENTRY_BELOW;
    if (!placed)
        return 0;
    *ret_host = e.entry & QCOW2_L2_OFFSET_MASK;
    if (unlikely(!qcow2_can_lie(q, guest_cluster, *ret_host)))
        return qcow2_damaged(q,
                             "the L2 entry of guest cluster %" PRIu64 " points to %" PRIu64
                             ", where it cannot be",
                             guest_cluster, *ret_host);
    return 0;
}

unsigned qcow2_unit_run(uint64_t bits, enum qcow2_entry_kind kind, unsigned unit)
{
    uint32_t like = kind == QCOW2_ENTRY_DATA   ? data_of(bits)
                    : kind == QCOW2_ENTRY_ZERO ? zero_of(bits)
                                               : ~(data_of(bits) | zero_of(bits));
    uint32_t unlike = ~like >> unit;

    if (kind == QCOW2_ENTRY_COMPRESSED || !unlike)
        return QCOW2_SUBCLUSTERS - unit;
    return (unsigned)__builtin_ctz(unlike);
}

/* The kind of one unit, and how far that goes within the cluster. */
static int look_at_unit(struct qcow2 *q, uint64_t cluster, struct qcow2_l2 e, unsigned unit,
                        bool for_writing, struct mapping *ret)
{
    static const enum mapping_kind kinds[] = {
        [QCOW2_ENTRY_BELOW] = MAPPING_BELOW,
        [QCOW2_ENTRY_ZERO] = MAPPING_ZERO,
        [QCOW2_ENTRY_DATA] = MAPPING_DATA,
        [QCOW2_ENTRY_COMPRESSED] = MAPPING_ENCODED,
    };

    enum qcow2_entry_kind kind = QCOW2_ENTRY_BELOW;
    uint64_t host;
    int r = qcow2_entry_kind_extended(q, cluster, e, unit, &kind, &host);

    *ret = (struct mapping){
        .kind = kinds[kind],
        .host = host != QCOW2_NOWHERE ? q->data : NULL,
        .host_offset =
            kind == QCOW2_ENTRY_COMPRESSED ? e.entry : host + ((uint64_t)unit << q->unit_bits),
        .len = (uint64_t)qcow2_unit_run(e.bits, kind, unit) << q->unit_bits,
    };
    if (for_writing && !(e.entry & QCOW2_COPIED))
        ret->kind = MAPPING_BELOW;
    return r;
}

static bool continues(const struct mapping *m, const struct mapping *next)
{
    if (next->kind != m->kind || m->kind == MAPPING_ENCODED)
        return false;
    return m->kind == MAPPING_BELOW ||
           (next->host == m->host && (!m->host || next->host_offset == m->host_offset + m->len));
}

int qcow2_map_extended(struct qcow2 *q, const struct qcow2_slice *s, uint64_t offset, uint64_t len,
                       bool for_writing, struct mapping *ret)
{
    uint64_t cluster = offset >> q->cluster_bits;
    uint64_t slice_end = (cluster | (qcow2_slice_entries(q) - 1)) + 1;
    uint64_t in_unit = offset & (qcow2_unit_size(q) - 1);
    unsigned unit = qcow2_unit_in_cluster(q, offset >> q->unit_bits);
    struct mapping next;
    int r = look_at_unit(q, cluster, qcow2_entry(q, s, cluster), unit, for_writing, ret);

    if (ret->kind != MAPPING_ENCODED)
        ret->host_offset += in_unit;
    ret->len -= in_unit;
    /* As far as the cluster goes, what follows may continue it. */
    while (r == 0 && ret->len < len && !((offset + ret->len) & (qcow2_cluster_size(q) - 1)) &&
           ++cluster < slice_end) {
        if (look_at_unit(q, cluster, qcow2_entry(q, s, cluster), 0, for_writing, &next) < 0 ||
            !continues(ret, &next))
            break; /* its own request tells */
        ret->len += next.len;
    }
    ret->len = MIN(ret->len, len);
    return r;
}
