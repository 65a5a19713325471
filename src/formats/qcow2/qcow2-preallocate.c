/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Preallocation: guest clusters that read as zeroes and have no place get one that reads as zeroes, so that later writes find all
 * metadata there. The rules are those of writers (WRITE-2, WRITE-3); the data are zeroes, which fresh space has already.
 */
#include "formats/qcow2/qcow2-preallocate.h"
#include "base/checked.h"
#include "base/macros.h"
#include "formats/qcow2/qcow2.h"
#include "graph/backend.h"
#include "graph/chain.h"
#include "graph/gate.h"

#include <errno.h>
#include <string.h>

extern const struct driver qcow2_driver;

/* 1: it reads as zeroes and has no place. */
static int co_fn is_empty(struct qcow2 *q, const struct request *by, const struct qcow2_slice *s,
                          uint64_t cluster)
{
    uint64_t start = cluster << q->cluster_bits;
    uint64_t size = node_size(q->node);
    enum qcow2_entry_kind kind = QCOW2_ENTRY_BELOW;
    uint64_t host;
    struct qcow2_l2 e = qcow2_entry(q, s, cluster);
    int r = qcow2_entry_kind(q, cluster, e, 0, &kind, &host);

    if (r < 0 || host != QCOW2_NOWHERE || kind == QCOW2_ENTRY_COMPRESSED)
        return r;
    if (q->extended ? e.bits == QCOW2_ALL_ZERO : kind == QCOW2_ENTRY_ZERO)
        return 1;
    return chain_co_zero_below(q->node, by, start, MIN(qcow2_cluster_size(q), size - start));
}

static int co_fn make_zero(struct qcow2 *q, const struct request *by, const struct qcow2_extent *at)
{
    uint64_t bytes = at->count << q->cluster_bits;
    struct request zero = request_for(by, REQUEST_WRITE_ZEROES, at->host_offset, bytes);

    if (at->fresh)
        return 0;
    if (qcow2_has_data_file(q))
        zero.len = MIN(bytes, node_size(q->node) - at->host_offset); /* DATA-1 */
    zero.flags = REQUEST_MAY_UNMAP;
    return edge_co_request(q->data, &zero);
}

/* The place has zeroes; but of an encrypted image what is not written yet is said to be so (WRITE-4). */
static void say_zero(const struct qcow2 *q, struct qcow2_l2 *e)
{
    e->entry |= QCOW2_COPIED;
    if (q->extended)
        e->bits = q->crypt ? QCOW2_ALL_ZERO : QCOW2_ALL_DATA;
    else if (q->crypt)
        e->entry |= QCOW2_L2_ZERO;
}

/* Up to `count` clusters that are empty get a place. Their range is held, the slice pinned. */
static int co_fn place(struct qcow2 *q, const struct request *by, struct qcow2_slice *s,
                       uint64_t first, uint64_t count, uint64_t *ret_count)
{
    struct qcow2_extent at;
    int r = q->crypt && q->version < 3 ? -EOPNOTSUPP : 0;

    if (r == 0)
        r = qcow2_place_get(q, by, first, count, &at);
    if (r < 0)
        return r;
    if (!q->crypt)
        r = make_zero(q, by, &at);
    if (r < 0) {
        qcow2_place_put(q, &at);
        return r;
    }
    tiny_lock_acquire(&q->lock);
    for (uint64_t i = 0; i < at.count; i++) {
        struct qcow2_l2 e = {at.host_offset + (i << q->cluster_bits), 0};

        say_zero(q, &e);
        qcow2_entry_set_locked(q, s, first + i, e, !at.fresh);
    }
    tiny_lock_release(&q->lock);
    chain_changed(q->node, first << q->cluster_bits, at.count << q->cluster_bits);
    *ret_count = at.count;
    return 0;
}

static int co_fn map_pinned(struct qcow2 *q, const struct request *by, struct qcow2_slice *s,
                            uint64_t first, uint64_t end)
{
    int r = 0;

    while (r >= 0 && first < end) {
        uint64_t n = 0;

        while (first + n < end && (r = is_empty(q, by, s, first + n)) == 1)
            n++;
        if (r >= 0 && n)
            r = place(q, by, s, first, n, &n);
        first += MAX(n, (uint64_t)1);
    }
    return MIN(r, 0);
}

/* Clusters of one slice. */
static int co_fn map_piece(struct qcow2 *q, const struct request *by, uint64_t first, uint64_t end)
{
    struct qcow2_slice *s = NULL;
    struct overlap_range range;
    int r = overlap_begin(&q->ranges, &range, first << q->cluster_bits,
                          (end - first) << q->cluster_bits, true);

    if (r < 0)
        return r;
    r = qcow2_slice_pin(q, by, first, true, &s);
    if (r == 0) {
        r = map_pinned(q, by, s, first, end);
        qcow2_slice_unpin(q, s);
    }
    overlap_end(&q->ranges, &range);
    if (r == 0)
        qcow2_flush_if_full(q, by);
    return r;
}

int qcow2_map_ahead(struct qcow2 *q, const struct request *by, uint64_t from, uint64_t to)
{
    uint64_t first = from >> q->cluster_bits;
    uint64_t end = align_up(to, qcow2_cluster_size(q)) >> q->cluster_bits;
    int r = 0;

    while (r == 0 && first < end) {
        uint64_t next = MIN(end, (first | (qcow2_slice_entries(q) - 1)) + 1);

        r = map_piece(q, by, first, next);
        first = next;
    }
    return r;
}

int qcow2_co_preallocate(struct backend *b, uint64_t from, uint64_t to, struct error **err)
{
    struct node *node = backend_node(b);
    struct qcow2 *q = node_state(node);
    struct pass pass = {0};
    struct request by = {.kind = REQUEST_FLUSH, .pass = &pass};
    int r;

    if (node_driver(node) != &qcow2_driver)
        return error_set(err, ENOTSUP, "this format has no metadata to preallocate");
    r = q->writable ? qcow2_map_ahead(q, &by, from, MIN(to, node_size(node))) : -EROFS;
    if (r == 0)
        r = qcow2_co_flush(node, &by);
    return r < 0 ? error_set(err, -r, "cannot preallocate metadata: %s", strerror(-r)) : 0;
}
