/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The virtual size. Behind closed gates; a crash between any two steps leaves an image of the old size or of the new one, with
 * the same content as far as both go (D2). The header is written last when the disk grows, first when it shrinks.
 */
#include "base/alloc.h"
#include "base/atomic.h"
#include "base/checked.h"
#include "base/endian.h"
#include "base/log.h"
#include "base/macros.h"
#include "formats/qcow2/qcow2-header.h"
#include "formats/qcow2/qcow2.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* Size and L1 table stand together, in one sector: all of it changes or nothing. */
static int co_fn write_header(struct qcow2 *q, const struct request *req, uint64_t size,
                              uint32_t l1_size, uint64_t l1_offset)
{
    size_t len = QCOW2_OFFSET_L1_OFFSET + 8 - QCOW2_OFFSET_SIZE;
    struct iobuf *b = iobuf_new(len);
    int r;

    if (!b)
        return -ENOMEM;
    memset(b->data, 0, len);
    store_be32(b->data + QCOW2_OFFSET_CRYPT_METHOD - QCOW2_OFFSET_SIZE,
               q->crypt ? QCOW2_CRYPT_LUKS : QCOW2_CRYPT_NONE);
    store_be64(b->data, size);
    store_be32(b->data + QCOW2_OFFSET_L1_SIZE - QCOW2_OFFSET_SIZE, l1_size);
    store_be64(b->data + QCOW2_OFFSET_L1_OFFSET - QCOW2_OFFSET_SIZE, l1_offset);
    r = qcow2_write_meta(q, req, QCOW2_OFFSET_SIZE, b, 0, len);
    iobuf_unref(b);
    return r < 0 ? r : qcow2_sync(q, req);
}

/*
 * D3: a write that has failed may have happened all the same; so the header that is in force, `size` and the L1 table that
 * we use, is written again. If that fails too, what we would write could be out of sight of who opens the image next.
 */
static int co_fn change_header(struct qcow2 *q, const struct request *req, uint64_t old,
                               uint64_t size, uint32_t l1_size, uint64_t l1_offset)
{
    int r = write_header(q, req, size, l1_size, l1_offset);

    if (r < 0 && write_header(q, req, old, q->map.l1_size, q->map.l1_offset) < 0) {
        atomic_set(&q->needs_reopen, true);
        log_warning(
            "node '%s': its size may have changed on disk, or not: nothing is written to its "
            "tables any more until it is opened again",
            node_name(q->node));
    }
    return r;
}

static int co_fn write_new_l1(struct qcow2 *q, const struct request *req, uint64_t offset,
                              uint64_t bytes)
{
    struct iobuf *b = iobuf_new((size_t)bytes);
    int r;

    if (!b)
        return -ENOMEM;
    memset(b->data, 0, (size_t)bytes);
    for (uint32_t i = 0; i < q->map.l1_size; i++)
        store_be64(b->data + (size_t)i * QCOW2_ENTRY_LEN, q->map.l1[i]);
    r = qcow2_write_meta(q, req, offset, b, 0, (size_t)bytes);
    iobuf_unref(b);
    return r < 0 ? r : qcow2_sync(q, req);
}

/* Room for more entries, with what there is. Nothing else is in flight. */
static bool make_wider(const struct qcow2 *q, uint64_t entries, struct qcow2_room *room)
{
    if (!qcow2_room_make(q, room, entries))
        return false;
    memcpy(room->l1, q->map.l1, (size_t)q->map.l1_size * sizeof(*room->l1));
    memcpy(room->slices, q->map.slices, (size_t)q->map.slice_count * sizeof(struct qcow2_slice *));
    return true;
}

/* A longer L1 table, somewhere else. What changed in the old one is durable before: qcow2_co_resize() has flushed. */
static int co_fn move_l1(struct qcow2 *q, const struct request *req, uint64_t entries)
{
    uint64_t bytes = align_up(entries * QCOW2_ENTRY_LEN, qcow2_cluster_size(q));
    uint64_t old_bytes =
        align_up((uint64_t)q->map.l1_size * QCOW2_ENTRY_LEN, qcow2_cluster_size(q));
    uint64_t old = q->map.l1_offset;
    struct qcow2_extent at;
    struct qcow2_room room = {.l1 = NULL};
    int r = make_wider(q, entries, &room) ? 0 : -ENOMEM;

    if (r == 0)
        r = qcow2_alloc_get_row(q, req, bytes >> q->cluster_bits, &at);
    if (r < 0) {
        qcow2_room_release(&room);
        return r;
    }
    r = write_new_l1(q, req, at.host_offset, bytes);
    if (r < 0)
        qcow2_alloc_put(q, at.host_offset, at.count);
    else
        r = change_header(q, req, node_size(q->node), node_size(q->node), (uint32_t)entries,
                          at.host_offset);
    if (r == 0) {
        qcow2_room_use(q, &room, entries, at.host_offset);
        qcow2_alloc_put_table(q, req, old, old_bytes >> q->cluster_bits);
    }
    qcow2_room_release(&room);
    return r;
}

/* What comes into sight reads as zeroes, whatever the last cluster, older mappings or a longer backing node hold there. */
static int co_fn clear_new(struct qcow2 *q, const struct request *req, uint64_t from, uint64_t to)
{
    uint64_t unit = qcow2_cluster_size(q);
    uint64_t whole = MIN(align_up(from, unit), to);
    uint64_t below = node_backing(q->node) ? node_size(edge_node(node_backing(q->node))) : 0;
    uint64_t covered = MIN(align_up(MAX(below, whole), unit), align_up(to, unit));
    int r;

    if (below > from && q->version < 3)
        return -EOPNOTSUPP; /* there are no zero clusters to hide it behind */
    r = qcow2_zero_part(q, req, from, whole - from);
    if (r == 0 && whole < to && covered > whole)
        r = qcow2_clear(q, req, whole >> q->unit_bits, covered >> q->unit_bits, QCOW2_ZERO_UNMAP);
    if (r == 0 && whole < to)
        r = qcow2_clear(q, req, MAX(covered, whole) >> q->unit_bits,
                        align_up(to, unit) >> q->unit_bits, QCOW2_FORGET);
    return r;
}

static int co_fn grow_disk(struct qcow2 *q, struct request *req, uint64_t size)
{
    uint64_t entries = qcow2_l1_entries_needed(size, q->cluster_bits, q->extended);
    uint64_t old = node_size(q->node);
    struct request flush = request_for(req, REQUEST_FLUSH, 0, 0);
    int r = 0;

    if (entries * QCOW2_ENTRY_LEN > QCOW2_L1_BYTES_MAX)
        return -EFBIG;
    if (entries > q->map.l1_size)
        r = move_l1(q, req, entries);
    if (r == 0)
        r = qcow2_data_grow(q, req, old, size);
    if (r < 0)
        return r;
    node_set_size(q->node, size);
    r = clear_new(q, req, old, size);
    if (r == 0 && q->data_raw)
        r = qcow2_map_ahead(q, req, old, size); /* DATA-3 */
    if (r == 0)
        r = qcow2_co_flush(q->node, &flush);
    if (r == 0)
        r = change_header(q, req, old, size, q->map.l1_size, q->map.l1_offset);
    if (r < 0)
        node_set_size(q->node, old);
    return r;
}

static int co_fn shrink_disk(struct qcow2 *q, const struct request *req, uint64_t size)
{
    uint64_t unit = qcow2_cluster_size(q);
    uint64_t old = node_size(q->node);
    int r = change_header(q, req, old, size, q->map.l1_size, q->map.l1_offset);

    if (r < 0)
        return r;
    node_set_size(q->node, size);
    (void)qcow2_clear(q, req, align_up(size, unit) >> q->unit_bits,
                      align_up(old, unit) >> q->unit_bits, QCOW2_FORGET);
    qcow2_data_shrink(q, req, size);
    return 0; /* what could not be given back stays, out of sight */
}

int qcow2_co_resize(struct node *node, struct request *req)
{
    struct qcow2 *q = node_state(node);
    struct request flush = request_for(req, REQUEST_FLUSH, 0, 0);
    uint64_t size = req->offset;
    int r;

    if (size & 511)
        return -EINVAL; /* the format's unit, as its users see it */
    if (size == node_size(node))
        return 0;
    r = qcow2_co_flush(node, &flush);
    if (r < 0)
        return r;
    qcow2_online_break(q, "the disk was resized");
    return size > node_size(node) ? grow_disk(q, req, size) : shrink_disk(q, req, size);
}
