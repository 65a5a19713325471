/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Zeroes and discard: by changes of mappings, unit by unit, as qcow2-write.c says (WRITE-2, WRITE-3); what is smaller than a unit is
 * written.
 */
#include "base/atomic.h"
#include "base/checked.h"
#include "base/macros.h"
#include "formats/qcow2/qcow2.h"
#include "graph/chain.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* Does what is not mapped read as zeroes, for us and for whoever opens the image as it says? */
static bool unmapped_is_zero(const struct qcow2 *q)
{
    return !q->names_backing && !node_backing(q->node);
}

/* Version 2 has no zero clusters: what can be done without them? */
static bool can_clear(const struct qcow2 *q, enum qcow2_clearing how)
{
    return q->version >= 3 || (unmapped_is_zero(q) && how != QCOW2_ZERO);
}

static bool is_discard(enum qcow2_clearing how)
{
    return how == QCOW2_DISCARD || how == QCOW2_FORGET;
}

/* Does nothing have to be noted for clusters without an L2 table? */
static bool skips_unmapped(const struct qcow2 *q, enum qcow2_clearing how)
{
    return is_discard(how) || unmapped_is_zero(q);
}

/* One cluster, or some of its subclusters: what it is, and what becomes of it. */
struct clearing {
    struct qcow2_l2 was;
    enum qcow2_entry_kind kind;
    uint64_t host;
    struct qcow2_l2 becomes;
    bool frees; /* the cluster that it has is not needed any more */
    bool keeps; /* it does not go even so (discard-no-unref) */
    bool
        left; /* it keeps it, or its place in the data file, and units there hold nothing any more */
};

static void clear_word(const struct qcow2 *q, enum qcow2_clearing how, struct clearing *c)
{
    bool zero_is_none = unmapped_is_zero(q);
    bool placed = c->host != QCOW2_NOWHERE;

    c->becomes = c->was;
    c->frees = c->kind == QCOW2_ENTRY_COMPRESSED || (placed && how != QCOW2_ZERO && !c->keeps);
    if (placed && !c->frees)
        c->becomes.entry |= QCOW2_L2_ZERO;
    else if (c->frees || (c->kind != QCOW2_ENTRY_ZERO && !is_discard(how) && !zero_is_none))
        c->becomes.entry = zero_is_none || q->version < 3 ? 0 : QCOW2_L2_ZERO;
    c->left = placed;
}

static void clear_bits(const struct qcow2 *q, uint64_t mask, enum qcow2_clearing how,
                       struct clearing *c)
{
    bool placed = c->host != QCOW2_NOWHERE;
    uint64_t bits = c->kind == QCOW2_ENTRY_COMPRESSED ? QCOW2_ALL_DATA : c->was.bits;
    uint64_t data = bits & mask; /* that is lost */

    bits &= ~mask;
    if (!unmapped_is_zero(q))
        bits |= (is_discard(how) ? data : mask) << 32;
    else if (placed)
        bits |= data << 32; /* as long as there is a place, nobody looks what lies below */
    c->frees = c->kind == QCOW2_ENTRY_COMPRESSED ||
               (placed && how != QCOW2_ZERO && !c->keeps && !(bits & QCOW2_ALL_DATA) &&
                (data || mask == QCOW2_ALL_DATA));
    if (c->frees && unmapped_is_zero(q))
        bits = 0;
    c->becomes = (struct qcow2_l2){c->frees ? 0 : c->was.entry, bits};
    c->left = placed && data;
}

/* Whose space may be given back at once, since nobody else may come to use it: their range is held. */
struct left_places {
    uint64_t host_offset;
    uint64_t len;
};

static int co_fn give_back(struct qcow2 *q, const struct request *req, struct left_places *l)
{
    int r = qcow2_data_discard(q, req, l->host_offset, l->len);

    l->len = 0;
    return r;
}

static int co_fn leave(struct qcow2 *q, const struct request *req, struct left_places *l,
                       uint64_t host_offset, uint64_t len)
{
    int r = 0;

    if (l->len && l->host_offset + l->len != host_offset)
        r = give_back(q, req, l);
    if (!l->len)
        l->host_offset = host_offset;
    l->len += len;
    return r;
}

/* All of a cluster's units. */
static uint64_t all_units(const struct qcow2 *q)
{
    return q->extended ? QCOW2_ALL_DATA : 1;
}

static int set_cleared(struct qcow2 *q, struct qcow2_slice *s, uint64_t cluster, struct clearing *c)
{
    struct qcow2_run *run = NULL;
    int r = c->frees ? qcow2_run_of(q, c->was.entry, c->kind, c->host, &run) : 0;

    if (r < 0)
        return r;
    c->left &= !run;
    tiny_lock_acquire(&q->lock);
    qcow2_entry_set_locked(q, s, cluster, c->becomes, false);
    q->left_in_place += c->left; /* WRITE-3 */
    if (run) {
        qcow2_plain_forget_locked(q);
        qcow2_free_locked(q, run);
    }
    tiny_lock_release(&q->lock);
    return 0;
}

/* 1: some of the bytes of a compressed cluster have to be written. */
static int co_fn clear_cluster(struct qcow2 *q, const struct request *req, struct qcow2_slice *s,
                               uint64_t cluster, uint64_t mask, enum qcow2_clearing how,
                               struct left_places *left)
{
    struct clearing c = {.was = qcow2_entry(q, s, cluster),
                         .keeps = q->keeps_discarded && how != QCOW2_FORGET};
    int r = qcow2_entry_kind(q, cluster, c.was, 0, &c.kind, &c.host);

    if (r < 0)
        return r;
    if (c.kind == QCOW2_ENTRY_COMPRESSED && mask != all_units(q))
        return !is_discard(how);
    if (q->extended)
        clear_bits(q, mask, how, &c);
    else
        clear_word(q, how, &c);
    if (c.becomes.entry == c.was.entry && c.becomes.bits == c.was.bits)
        return 0;
    r = set_cleared(q, s, cluster, &c);
    /* What a snapshot holds as well stays; and what decrypts to something else if it is gone (WRITE-4). */
    if (r == 0 && c.left && how != QCOW2_ZERO && c.was.entry & QCOW2_COPIED && !q->crypt)
        r = leave(q, req, left, c.host + ((uint64_t)__builtin_ctzll(mask) << q->unit_bits),
                  (uint64_t)__builtin_popcountll(mask) << q->unit_bits);
    return r;
}

/* Clusters of one slice, all of the same units. 1: as above. */
static int co_fn clear_piece(struct qcow2 *q, const struct request *req, uint64_t first,
                             uint64_t count, uint64_t mask, enum qcow2_clearing how)
{
    struct left_places left = {.len = 0};
    struct qcow2_slice *s = NULL;
    struct overlap_range range;
    int r =
        overlap_begin(&q->ranges, &range, first << q->cluster_bits, count << q->cluster_bits, true);

    if (r < 0)
        return r;
    r = qcow2_slice_pin(q, req, first, !skips_unmapped(q, how), &s);
    if (r == 0 && s)
        edge_co_announce(q->file, EVENT_CLUSTER_FREE, req);
    for (uint64_t i = 0; r == 0 && s && i < count; i++)
        r = clear_cluster(q, req, s, first + i, mask, how, &left);
    if (r == 0)
        r = give_back(q, req, &left);
    chain_changed(q->node, first << q->cluster_bits, count << q->cluster_bits);
    if (s)
        qcow2_slice_unpin(q, s);
    overlap_end(&q->ranges, &range);
    if (r == 0)
        qcow2_flush_if_full(q, req);
    return r;
}

/* Some units of a cluster. */
static int co_fn clear_part(struct qcow2 *q, const struct request *req, uint64_t first,
                            uint64_t count, enum qcow2_clearing how)
{
    uint64_t cluster = first >> (q->cluster_bits - q->unit_bits);
    uint64_t mask = ((UINT64_C(1) << count) - 1) << qcow2_unit_in_cluster(q, first);
    uint64_t from = first << q->unit_bits;
    uint64_t to = MIN((first + count) << q->unit_bits, node_size(q->node));
    int r = clear_piece(q, req, cluster, 1, mask, how);

    return r == 1 ? qcow2_zero_part(q, req, from, to - MIN(from, to)) : r;
}

int qcow2_clear(struct qcow2 *q, const struct request *req, uint64_t first, uint64_t end,
                enum qcow2_clearing how)
{
    unsigned bits = q->cluster_bits - q->unit_bits;
    uint64_t units = (uint64_t)1 << bits;
    int r = unlikely(atomic_get(&q->corrupt)) ? -EIO : 0; /* CORRUPT-1: also what skips all of it */

    while (r == 0) {
        uint64_t cluster;
        uint64_t n;

        if (skips_unmapped(q, how))
            first = MAX(first, qcow2_next_mapped(q, first >> bits, align_up(end, units) >> bits)
                                   << bits);
        if (first >= end)
            break;
        cluster = first >> bits;
        n = MIN(end >> bits, (cluster | (qcow2_slice_entries(q) - 1)) + 1);
        if (qcow2_unit_in_cluster(q, first) || n <= cluster) {
            n = MIN(end, (cluster + 1) << bits) - first;
            r = clear_part(q, req, first, n, how);
        } else {
            n = (n - cluster) << bits;
            r = clear_piece(q, req, cluster, n >> bits, all_units(q), how);
        }
        first += n;
    }
    return r;
}

/* The units that lie in the range as a whole; the last one of the disk may end beyond it. */
static void whole_units(const struct qcow2 *q, const struct request *req, uint64_t *ret_first,
                        uint64_t *ret_end)
{
    uint64_t end = req->offset + req->len;

    if (end == node_size(q->node))
        end = align_up(end, qcow2_cluster_size(q));
    *ret_first = align_up(req->offset, qcow2_unit_size(q)) >> q->unit_bits;
    *ret_end = end >> q->unit_bits;
}

int qcow2_co_discard(struct node *node, struct request *req)
{
    struct qcow2 *q = node_state(node);
    uint64_t first;
    uint64_t end;

    if (q->data_raw)
        return qcow2_data_pass_on(q, req);
    whole_units(q, req, &first, &end);
    return can_clear(q, QCOW2_DISCARD) ? qcow2_clear(q, req, first, end, QCOW2_DISCARD) : 0;
}

int qcow2_zero_part(struct qcow2 *q, const struct request *req, uint64_t offset, uint64_t len)
{
    struct extent one = {.flags = 0};
    struct extents found = {.v = &one, .max = 1};
    struct request look = request_for(req, REQUEST_EXTENTS, offset, len);
    struct iobuf *zeroes;
    struct iovec iov;
    struct request write;
    int r;

    if (!len)
        return 0;
    look.extents = &found;
    r = chain_co_extents(q->node, &look);
    if (r < 0 || (found.count && one.flags & EXTENT_ZERO && one.len >= len))
        return r;
    zeroes = iobuf_new((size_t)len);
    if (!zeroes)
        return -ENOMEM;
    memset(zeroes->data, 0, (size_t)len);
    iov = (struct iovec){zeroes->data, (size_t)len};
    write = request_for(req, REQUEST_WRITE, offset, len);
    write.iov = &iov;
    write.iov_count = 1;
    write.hold = zeroes;
    r = qcow2_co_write(q->node, &write);
    iobuf_unref(zeroes);
    return r;
}

int qcow2_co_write_zeroes(struct node *node, struct request *req)
{
    struct qcow2 *q = node_state(node);
    enum qcow2_clearing how = req->flags & REQUEST_MAY_UNMAP ? QCOW2_ZERO_UNMAP : QCOW2_ZERO;
    uint64_t range_end = req->offset + req->len;
    uint64_t first;
    uint64_t end;
    int r;

    if (q->data_raw)
        return qcow2_data_pass_on(q, req);
    if (!can_clear(q, how))
        return -EOPNOTSUPP;
    whole_units(q, req, &first, &end);
    if (first >= end) { /* parts of one unit, or of two */
        uint64_t middle = MIN(first << q->unit_bits, range_end);

        r = qcow2_zero_part(q, req, req->offset, middle - req->offset);
        return r < 0 ? r : qcow2_zero_part(q, req, middle, range_end - middle);
    }
    r = qcow2_clear(q, req, first, end, how);
    if (r == 0)
        r = qcow2_zero_part(q, req, req->offset, (first << q->unit_bits) - req->offset);
    if (r == 0 && end << q->unit_bits < range_end)
        r = qcow2_zero_part(q, req, end << q->unit_bits, range_end - (end << q->unit_bits));
    return r;
}
