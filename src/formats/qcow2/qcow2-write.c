/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Requests that change data.
 * What is mapped by itself is a unit: a cluster, or one of its subclusters.
 *
 * WRITE-1 A unit that is mapped and used once is written to in place, without a lock, inside the node's epoch (Q2).
 * WRITE-2 Whoever changes a mapping holds the guest range: he looks again when he has it, writes the data first, and then
 *         publishes the mapping. Until then readers find the old one.
 * WRITE-3 The cluster that a mapping no longer points to goes through the flush and the epoch before it is touched (Q1). One
 *         that stays its guest cluster's without being mapped to, as it reads as zeroes or lies in a data file, is only touched
 *         after an epoch.
 * WRITE-4 Of an encrypted image nothing reads as zeroes because nothing was written there: where a place is new, all of the cluster is
 *         written, and the mapping waits for it; what was written stays as long as it is somebody's place, discarded or not.
 */
#include "base/alloc.h"
#include "base/atomic.h"
#include "base/checked.h"
#include "base/macros.h"
#include "formats/qcow2/qcow2.h"
#include "graph/chain.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* So many bytes are allocated in one step, if clusters are not larger. */
#define ALLOC_STEP (2 * MIB)

#define PIECE_IOV 16

/* ---- in place ---- */

/* Writes what can be written in place from byte `done` of the request on; *ret_len 0: nothing. */
static int co_fn write_in_place(struct qcow2 *q, struct request *req, uint64_t done,
                                uint64_t *ret_len)
{
    struct epoch_slot *slot = epoch_slot_here(node_epoch(q->node));
    struct iovec iov[PIECE_IOV];
    struct request piece = *req;
    struct mapping map;
    unsigned phase;
    int r;

    *ret_len = 0;
    if (unlikely(!slot))
        return -ENOMEM;
    phase = epoch_enter(slot);
    r = qcow2_map_run(q, req, req->offset + done, req->len - done, true, &map);
    if (likely(r == 0 && map.kind == MAPPING_DATA)) {
        *ret_len = map.len;
        if (map.len < req->len && likely(!q->crypt))
            *ret_len = request_slice(&piece, req, done, map.len, iov, PIECE_IOV);
        piece.flags &= ~(unsigned)REQUEST_FUA; /* the core flushes: the mapping counts, too */
        edge_co_announce(q->file, EVENT_WRITE_AIO, req);
        if (likely(!qcow2_has_data_file(q)))
            r = qcow2_guard_write(q, req, 0, map.host_offset, *ret_len);
        if (unlikely(q->crypt) && r == 0)
            r = qcow2_crypt_write(q, req, done, map.len, map.host_offset);
        else if (likely(r == 0))
            r = edge_co_request_at(q->data, &piece, map.host_offset);
    }
    epoch_leave(slot, phase);
    return r;
}

/* ---- allocating ---- */

/* Guest clusters that get a new place, on the stack of their writer, who holds their range. */
struct placing {
    struct qcow2_slice *slice; /* pinned */
    uint64_t cluster;          /* the first guest cluster */
    uint64_t count;
    uint64_t
        limit; /* of the disk, bytes: what comes then is not theirs to write; 0: where they end */
    uint64_t
        from; /* of the disk, bytes: what is written, in whole units, unless fresh space has it already */
    uint64_t to;
    bool was_zero; /* they read as zeroes: so does what is not written */
    bool reuses;   /* they keep the host clusters that they have */
    struct qcow2_run
        *replaces; /* what they have is shared or compressed, and is freed then; or NULL */
    struct qcow2_extent at;
};

static struct qcow2_run *new_run(uint64_t first, uint64_t count, bool shared)
{
    struct qcow2_run *run = try_new(struct qcow2_run);

    if (run) {
        list_init(&run->link);
        run->first = first;
        run->count = count;
        run->shared = shared;
    }
    return run;
}

int qcow2_run_of(const struct qcow2 *q, uint64_t entry, enum qcow2_entry_kind kind, uint64_t host,
                 struct qcow2_run **ret)
{
    uint64_t first;
    uint64_t len;

    *ret = NULL;
    if (kind == QCOW2_ENTRY_COMPRESSED) {
        qcow2_compressed_place(q, entry, &host, &len);
        first = host >> q->cluster_bits;
        *ret = new_run(first, ((host + len - 1) >> q->cluster_bits) - first + 1, true);
    } else if (host == QCOW2_NOWHERE || qcow2_has_data_file(q)) {
        return 0;
    } else {
        *ret = new_run(host >> q->cluster_bits, 1, !(entry & QCOW2_COPIED));
    }
    return *ret ? 0 : -ENOMEM;
}

/* WRITE-3: waits until nobody who looked up earlier writes to places that mappings have left. */
static int co_fn wait_for_left(struct qcow2 *q)
{
    uint64_t left;
    bool passed;
    int r;

    tiny_lock_acquire(&q->lock);
    left = q->left_in_place;
    passed = q->left_passed == left;
    tiny_lock_release(&q->lock);
    if (passed)
        return 0;
    r = epoch_co_pass(node_epoch(q->node));
    tiny_lock_acquire(&q->lock);
    if (r == 0)
        q->left_passed = MAX(q->left_passed, left);
    tiny_lock_release(&q->lock);
    return r;
}

/* One cluster, which keeps its content elsewhere until the new place has it. */
static int replace_first(struct qcow2 *q, struct placing *p, uint64_t entry,
                         enum qcow2_entry_kind kind, uint64_t host)
{
    p->count = 1;
    p->was_zero = kind == QCOW2_ENTRY_ZERO;
    return qcow2_run_of(q, entry, kind, host, &p->replaces);
}

/* Of a cluster that a mapping points to. */
static int co_fn count_uses(struct qcow2 *q, const struct request *req, uint64_t host,
                            uint64_t *ret)
{
    int r = qcow2_refcount(q, req, host, ret);

    if (r < 0 || *ret)
        return r;
    return qcow2_corrupt(q, req, host, qcow2_cluster_size(q),
                         "a cluster that is in use has refcount 0");
}

/* Is it used by others as well? If not, it is noted as ours, and looked at once more: 0 clusters. */
static int co_fn look_at_shared(struct qcow2 *q, const struct request *req, struct placing *p,
                                struct qcow2_l2 e, uint64_t host)
{
    uint64_t refcount = 1;
    int r = qcow2_has_data_file(q) ? 0 : count_uses(q, req, host, &refcount);

    if (r < 0)
        return r;
    if (refcount != 1)
        return replace_first(q, p, e.entry, QCOW2_ENTRY_DATA, host);
    e.entry |= QCOW2_COPIED;
    tiny_lock_acquire(&q->lock);
    qcow2_entry_set_locked(q, p->slice, p->cluster, e, false);
    tiny_lock_release(&q->lock);
    p->count = 0;
    return 0;
}

/* Zeroes with a cluster of their own: it is taken if nobody else uses it. */
static int co_fn look_at_zeroes(struct qcow2 *q, const struct request *req, struct placing *p,
                                uint64_t entry, uint64_t host)
{
    uint64_t refcount = 1;
    int r = qcow2_has_data_file(q) ? 0 : count_uses(q, req, host, &refcount);

    if (r < 0)
        return r;
    if (refcount != 1)
        return replace_first(q, p, entry & ~QCOW2_COPIED, QCOW2_ENTRY_ZERO, host);
    p->count = 1;
    p->was_zero = true;
    p->reuses = true;
    p->at = (struct qcow2_extent){.host_offset = host, .count = 1};
    return 0;
}

/* Subclusters without data in a cluster that is ours: as many as there are from this one on. */
static void fill_units(const struct qcow2 *q, struct placing *p, uint64_t unit,
                       const struct qcow2_l2 *e, uint64_t host)
{
    unsigned first = qcow2_unit_in_cluster(q, unit);
    unsigned n = (unsigned)__builtin_ctzll((e->bits & QCOW2_ALL_DATA) >> first |
                                           UINT64_C(1) << (QCOW2_SUBCLUSTERS - first));

    p->count = 1;
    p->limit = (unit + n) << q->unit_bits;
    p->reuses = true;
    p->at = (struct qcow2_extent){.host_offset = host, .count = 1};
}

/* What is the first cluster, if it has a place? 0: it has none. */
static int co_fn look_at_first(struct qcow2 *q, const struct request *req, struct placing *p,
                               uint64_t unit)
{
    struct qcow2_l2 e = qcow2_entry(q, p->slice, p->cluster);
    enum qcow2_entry_kind kind;
    uint64_t host;
    int r = qcow2_entry_kind(q, p->cluster, e, qcow2_unit_in_cluster(q, unit), &kind, &host);

    if (r < 0)
        return r;
    if (kind == QCOW2_ENTRY_COMPRESSED) {
        r = replace_first(q, p, e.entry, kind, 0);
    } else if (host == QCOW2_NOWHERE) {
        return 0;
    } else if (kind == QCOW2_ENTRY_DATA && e.entry & QCOW2_COPIED) {
        p->count = 0; /* somebody was faster */
    } else if (kind == QCOW2_ENTRY_DATA || (q->extended && !(e.entry & QCOW2_COPIED))) {
        r = look_at_shared(q, req, p, e, host);
    } else if (q->extended) {
        fill_units(q, p, unit, &e, host);
    } else {
        r = look_at_zeroes(q, req, p, e.entry, host);
    }
    return r < 0 ? r : 1;
}

/* What are the clusters, as far as they are of one kind? 0 clusters: look once more, from the start. */
static int co_fn look_again(struct qcow2 *q, const struct request *req, struct placing *p,
                            uint64_t unit)
{
    uint64_t most = p->count;
    int r = look_at_first(q, req, p, unit);

    if (r)
        return r < 0 ? r : 0;
    for (p->count = 0; p->count < most; p->count++) {
        struct qcow2_l2 e = qcow2_entry(q, p->slice, p->cluster + p->count);
        enum qcow2_entry_kind kind;
        uint64_t host;
        bool zero;

        if (qcow2_entry_kind(q, p->cluster + p->count, e, 0, &kind, &host) < 0)
            break; /* its own request tells */
        zero = q->extended ? e.bits == QCOW2_ALL_ZERO : kind == QCOW2_ENTRY_ZERO;
        if (host != QCOW2_NOWHERE || kind == QCOW2_ENTRY_COMPRESSED ||
            (p->count && zero != p->was_zero))
            break;
        p->was_zero = zero;
    }
    return 0;
}

int qcow2_place_get(struct qcow2 *q, const struct request *by, uint64_t guest_cluster,
                    uint64_t count, struct qcow2_extent *ret)
{
    if (!qcow2_has_data_file(q))
        return qcow2_alloc_get(q, by, count, ret);
    /* What is there may be anything: left from before, or by a crash. */
    *ret = (struct qcow2_extent){.host_offset = guest_cluster << q->cluster_bits, .count = count};
    return wait_for_left(q);
}

void qcow2_place_put(struct qcow2 *q, const struct qcow2_extent *at)
{
    if (!qcow2_has_data_file(q))
        qcow2_alloc_put(q, at->host_offset, at->count);
}

static int co_fn choose_place(struct qcow2 *q, const struct request *req, struct placing *p)
{
    return p->reuses ? wait_for_left(q) : qcow2_place_get(q, req, p->cluster, p->count, &p->at);
}

/* What a part of the clusters held before, which the request does not write. */
static int co_fn read_old(struct qcow2 *q, const struct request *req, const struct placing *p,
                          uint64_t offset, uint64_t len, struct iobuf *b, size_t at)
{
    uint64_t inside = offset < node_size(q->node) ? MIN(len, node_size(q->node) - offset) : 0;
    struct iovec iov = {b->data + at, (size_t)inside};
    struct request old = request_for(req, REQUEST_READ, offset, inside);

    memset(b->data + at + inside, 0, (size_t)(len - inside));
    if (p->was_zero) {
        memset(b->data + at, 0, (size_t)inside);
        return 0;
    }
    old.iov = &iov;
    old.iov_count = 1;
    old.hold = b;
    return inside ? chain_co_read(q->node, &old) : 0; /* what is published still */
}

/* Where a byte of the disk will lie. */
static uint64_t host_of(const struct qcow2 *q, const struct placing *p, uint64_t offset)
{
    return p->at.host_offset + (offset - (p->cluster << q->cluster_bits));
}

/* The units that the request writes to, and with them what moves to the new place. */
static void choose_span(struct qcow2 *q, struct placing *p, uint64_t offset, uint64_t len)
{
    uint64_t start = p->cluster << q->cluster_bits;
    struct qcow2_l2 e;
    uint32_t data;

    p->from = align_down(offset, qcow2_unit_size(q));
    p->to = align_up(offset + len, qcow2_unit_size(q));
    if (p->replaces && q->extended) {
        e = qcow2_entry(q, p->slice, p->cluster);
        data = e.entry & QCOW2_L2_COMPRESSED ? UINT32_MAX : (uint32_t)e.bits;
        if (data) {
            unsigned last = 31 - (unsigned)__builtin_clz(data);

            p->from = MIN(p->from, start + ((uint64_t)__builtin_ctz(data) << q->unit_bits));
            p->to = MAX(p->to, start + ((uint64_t)(last + 1) << q->unit_bits));
        }
    }
    if (qcow2_has_data_file(q))
        p->to = MIN(p->to, node_size(q->node)); /* DATA-1 */
}

/* All of that: what was there before, with the request's data over it. */
static int co_fn write_mixed(struct qcow2 *q, const struct request *req, const struct placing *p,
                             uint64_t done, uint64_t len)
{
    uint64_t bytes = p->to - p->from;
    uint64_t head = req->offset + done - p->from;
    uint64_t tail = bytes - head - len;
    struct iobuf *b = iobuf_new((size_t)bytes);
    int r = b ? 0 : -ENOMEM;

    edge_co_announce(q->file, EVENT_COW_READ, req);
    if (r == 0 && head)
        r = read_old(q, req, p, p->from, head, b, 0);
    if (r == 0 && tail)
        r = read_old(q, req, p, p->to - tail, tail, b, (size_t)(head + len));
    if (r == 0) {
        struct iovec iov = {b->data, (size_t)bytes};
        struct request write = request_for(req, REQUEST_WRITE, host_of(q, p, p->from), bytes);

        request_gather(req, done, b->data + head, (size_t)len);
        write.iov = &iov;
        write.iov_count = 1;
        write.hold = b;
        edge_co_announce(q->file, EVENT_COW_WRITE, req);
        edge_co_announce(q->file, EVENT_WRITE_AIO, req);
        r = q->crypt ? qcow2_crypt_write(q, &write, 0, bytes, write.offset)
                     : edge_co_request(q->data, &write);
    }
    iobuf_unref(b);
    return r;
}

/* Is the rest of the clusters right if nothing is written there (WRITE-4)? */
static bool rest_is_right(const struct qcow2 *q, const struct placing *p)
{
    return p->was_zero && p->at.fresh && !q->crypt;
}

static int co_fn write_data(struct qcow2 *q, struct request *req, const struct placing *p,
                            uint64_t done, uint64_t len)
{
    uint64_t offset = req->offset + done;
    bool whole = offset == p->from && offset + len == p->to;
    struct iovec iov[PIECE_IOV];
    struct request piece = *req;

    if (!whole && !rest_is_right(q, p))
        return req->offload ? -EOPNOTSUPP : write_mixed(q, req, p, done, len);
    if (q->crypt)
        return qcow2_crypt_write(q, req, done, len, host_of(q, p, offset));
    piece.flags &= ~(unsigned)REQUEST_FUA;
    if (len < req->len && request_slice(&piece, req, done, len, iov, PIECE_IOV) < len)
        return write_mixed(q, req, p, done, len); /* more vectors than fit */
    edge_co_announce(q->file, EVENT_WRITE_AIO, req);
    return edge_co_request_at(q->data, &piece, host_of(q, p, offset));
}

/* Of one of the clusters. */
static struct qcow2_l2 placed_entry_locked(const struct qcow2 *q, const struct placing *p,
                                           uint64_t i)
{
    uint64_t first = (p->cluster + i) << (q->cluster_bits - q->unit_bits);
    struct qcow2_l2 e = {(p->at.host_offset + (i << q->cluster_bits)) | QCOW2_COPIED, 0};
    struct qcow2_l2 was;
    uint64_t from;
    uint64_t to;
    uint64_t mask;

    if (!q->extended)
        return e;
    e.bits = QCOW2_ALL_DATA;
    if (rest_is_right(q, p))
        return e; /* the space has the zeroes of all of them */
    was = qcow2_entry_locked(q, p->slice, p->cluster + i);
    from = MAX(p->from >> q->unit_bits, first) - first;
    to =
        MIN(align_up(p->to, qcow2_unit_size(q)) >> q->unit_bits, first + QCOW2_SUBCLUSTERS) - first;
    mask = ((UINT64_C(1) << (to - from)) - 1) << from;
    e.bits = was.entry & QCOW2_L2_COMPRESSED ? 0 : was.bits;
    e.bits = (e.bits | mask) & ~(mask << 32);
    return e;
}

/* WRITE-2. What pointed to zeroes may point to fresh space before the data is there: it reads the same. */
static void publish(struct qcow2 *q, struct placing *p)
{
    bool ordered = !rest_is_right(q, p);

    tiny_lock_acquire(&q->lock);
    for (uint64_t i = 0; i < p->count; i++)
        qcow2_entry_set_locked(q, p->slice, p->cluster + i, placed_entry_locked(q, p, i), ordered);
    if (p->replaces) {
        qcow2_plain_forget_locked(q);
        qcow2_free_locked(q, p->replaces);
        p->replaces = NULL;
    }
    tiny_lock_release(&q->lock);
    chain_changed(q->node, p->cluster << q->cluster_bits, p->count << q->cluster_bits);
}

/* With the range held and the slice pinned. *ret_len 0: look once more. */
static int co_fn place_held(struct qcow2 *q, struct request *req, struct placing *p, uint64_t done,
                            uint64_t *ret_len)
{
    uint64_t offset = req->offset + done;
    uint64_t end;
    int r = look_again(q, req, p, offset >> q->unit_bits);

    *ret_len = 0;
    if (r < 0 || !p->count)
        return r;
    if (!p->was_zero && !p->replaces && !p->reuses) {
        r = chain_co_zero_below(q->node, req, p->cluster << q->cluster_bits,
                                p->count << q->cluster_bits);
        p->was_zero = r == 1;
    }
    if (r >= 0)
        r = choose_place(q, req, p);
    if (r < 0)
        return r;
    p->count = p->at.count;
    end = p->limit ? p->limit : (p->cluster + p->count) << q->cluster_bits;
    *ret_len = MIN(req->len - done, end - offset);
    choose_span(q, p, offset, *ret_len);
    r = write_data(q, req, p, done, *ret_len);
    if (r == 0 && p->replaces)
        edge_co_announce(q->file, EVENT_CLUSTER_FREE, req);
    if (r == 0)
        publish(q, p);
    else if (!p->reuses)
        qcow2_place_put(q, &p->at);
    return r;
}

/* Gives clusters from byte `done` of the request on a place, and writes to it; *ret_len 0: look once more. */
static int co_fn write_placing(struct qcow2 *q, struct request *req, uint64_t done,
                               uint64_t *ret_len)
{
    uint64_t offset = req->offset + done;
    uint64_t first = offset >> q->cluster_bits;
    uint64_t last = (req->offset + req->len - 1) >> q->cluster_bits;
    uint64_t slice_end = (first | (qcow2_slice_entries(q) - 1)) + 1;
    struct placing p = {.cluster = first};
    struct overlap_range range;
    int r;

    p.count = MIN(last + 1, slice_end) - first;
    p.count = MIN(p.count, MAX(ALLOC_STEP >> q->cluster_bits, (uint64_t)1));
    r = overlap_begin(&q->ranges, &range, first << q->cluster_bits, p.count << q->cluster_bits,
                      true);
    if (r < 0)
        return r;
    r = qcow2_slice_pin(q, req, first, true, &p.slice);
    if (r == 0 && p.slice) {
        r = place_held(q, req, &p, done, ret_len);
        free(p.replaces); /* it was not */
        qcow2_slice_unpin(q, p.slice);
    }
    overlap_end(&q->ranges, &range);
    if (r == 0)
        qcow2_flush_if_full(q, req);
    return r;
}

static int co_fn write_all(struct qcow2 *q, struct request *req)
{
    uint64_t done = 0;
    int r = 0;

    while (r == 0 && done < req->len) {
        uint64_t len;

        r = write_in_place(q, req, done, &len);
        if (unlikely(r == 0 && !len))
            r = write_placing(q, req, done, &len);
        if (r == 0)
            done += len;
    }
    return r;
}

int qcow2_write_plain(struct qcow2 *q, const struct request *req, uint64_t from, uint64_t to)
{
    int r = 0;

    while (r == 0 && from < to) {
        struct iovec iov[PIECE_IOV];
        struct request part = *req;

        part.flags &= ~(unsigned)REQUEST_COMPRESSED;
        from += request_slice(&part, req, from, to - from, iov, PIECE_IOV);
        r = write_all(q, &part);
    }
    return r;
}

int qcow2_co_write(struct node *node, struct request *req)
{
    struct qcow2 *q = node_state(node);

    if (unlikely(req->flags & REQUEST_COMPRESSED))
        return q->crypt || qcow2_has_data_file(q) ? -EOPNOTSUPP : qcow2_write_compressed(q, req);
    return write_all(q, req);
}

int qcow2_co_copy_in(struct node *node, struct request *req)
{
    struct qcow2 *q = node_state(node);

    return q->crypt ? -EOPNOTSUPP : write_all(q, req);
}

int qcow2_replace(struct qcow2 *q, struct qcow2_slice *s, uint64_t cluster, struct qcow2_l2 becomes)
{
    struct qcow2_l2 e = qcow2_entry(q, s, cluster);
    struct qcow2_run *run = NULL;
    enum qcow2_entry_kind kind;
    uint64_t host;
    int r = qcow2_entry_kind(q, cluster, e, 0, &kind, &host);

    if (r == 0)
        r = qcow2_run_of(q, e.entry, kind, host, &run);
    if (r < 0)
        return r;
    tiny_lock_acquire(&q->lock);
    qcow2_entry_set_locked(q, s, cluster, becomes, true);
    if (run) {
        qcow2_plain_forget_locked(q);
        qcow2_free_locked(q, run);
    }
    tiny_lock_release(&q->lock);
    chain_changed(q->node, cluster << q->cluster_bits, qcow2_cluster_size(q));
    return 0;
}
