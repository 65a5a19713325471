/* SPDX-License-Identifier: Apache-2.0 */
/*
 * External data files: guest clusters lie in a file of their own, each at its guest offset. They have no refcounts, and their place
 * is theirs for good: to allocate one is to say that it is there.
 *
 * DATA-1 Nothing is written to the data file beyond the end of the disk: what ends within a cluster ends there, too.
 * DATA-2 The data file is durable before mappings that need it (FLUSH-2), and before a guest's flush is answered.
 * DATA-3 With raw data, the file holds what the disk shows, at all times: what is mapped stays mapped, and zeroes and discards go to
 *        the file. All of the disk is mapped, by whoever makes the image or lets it grow.
 */
#include "base/macros.h"
#include "formats/qcow2/qcow2-header.h"
#include "formats/qcow2/qcow2.h"

#include <errno.h>

static uint64_t data_size(const struct qcow2 *q)
{
    return node_size(edge_node(q->data));
}

int qcow2_data_open(struct qcow2 *q, const struct qcow2_header *header, struct error **err)
{
    struct edge *given = node_child(q->node, QCOW2_DATA_CHILD);
    int r = 0;

    if (!qcow2_header_has_data_file(header))
        return given ? error_set(err, EINVAL,
                                 "node '%s': `data-file` is given, but the image has none",
                                 node_name(q->node))
                     : 0;
    if (!given && !header->data_file)
        return error_set(err, EINVAL,
                         "node '%s': the image has an external data file, but does not name it: "
                         "give `data-file`",
                         node_name(q->node));
    if (!given)
        r = node_co_attach_file(q->node, QCOW2_DATA_CHILD, header->data_file, err);
    if (r < 0)
        return r;
    q->data = node_child(q->node, QCOW2_DATA_CHILD);
    q->data_raw = qcow2_header_data_is_raw(header) && !node_backing(q->node);
    return 0;
}

static int co_fn change_size(struct qcow2 *q, const struct request *by, uint64_t size,
                             unsigned flags)
{
    struct request req = request_for(by, REQUEST_RESIZE, size, 0);

    req.flags = flags;
    return edge_co_request(q->data, &req);
}

int qcow2_data_fit(struct qcow2 *q, const struct request *by, uint64_t size)
{
    if (!qcow2_has_data_file(q) || data_size(q) >= size)
        return 0;
    if (!node_grows(edge_node(q->data)))
        return -ENOSPC;
    return change_size(q, by, size, REQUEST_GROW);
}

/* The disk grows: with raw data, what comes into sight is zero there. */
int qcow2_data_grow(struct qcow2 *q, const struct request *by, uint64_t from, uint64_t to)
{
    uint64_t end = qcow2_has_data_file(q) ? MIN(data_size(q), to) : 0;
    struct request zero = request_for(by, REQUEST_WRITE_ZEROES, from, end - MIN(end, from));
    int r = 0;

    zero.flags = REQUEST_MAY_UNMAP;
    if (q->data_raw && zero.len)
        r = edge_co_request(q->data, &zero);
    return r < 0 ? r : qcow2_data_fit(q, by, to);
}

/* The disk has shrunk. A device stays as it is. */
void qcow2_data_shrink(struct qcow2 *q, const struct request *by, uint64_t size)
{
    if (qcow2_has_data_file(q) && node_grows(edge_node(q->data)) && data_size(q) > size)
        (void)change_size(q, by, size, 0); /* what is left of it is out of sight */
}

int qcow2_sync_data(struct qcow2 *q, const struct request *by)
{
    return qcow2_has_data_file(q) ? qcow2_sync_edge(q, q->data, by) : 0;
}

int qcow2_data_discard(struct qcow2 *q, const struct request *by, uint64_t host_offset,
                       uint64_t len)
{
    uint64_t end = MIN(host_offset + len, data_size(q));
    struct request discard =
        request_for(by, REQUEST_DISCARD, host_offset, end - MIN(end, host_offset));

    return discard.len && q->passes_discards ? edge_co_request(q->data, &discard) : 0;
}

/* DATA-3. As writes in place (WRITE-1). */
static int co_fn pass_on_piece(struct qcow2 *q, const struct request *req, uint64_t offset,
                               uint64_t len, uint64_t *ret_len)
{
    struct epoch_slot *slot = epoch_slot_here(node_epoch(q->node));
    struct request piece = *req;
    struct mapping map;
    unsigned phase;
    int r;

    if (unlikely(!slot))
        return -ENOMEM;
    phase = epoch_enter(slot);
    r = qcow2_map_run(q, req, offset, len, false, &map);
    if (r == 0 && map.kind == MAPPING_DATA) {
        piece.offset = offset;
        piece.len = map.len;
        piece.flags &= ~(unsigned)REQUEST_FUA; /* the core flushes */
        r = edge_co_request(q->data, &piece);
    }
    epoch_leave(slot, phase);
    *ret_len = map.len;
    return r;
}

int qcow2_data_pass_on(struct qcow2 *q, const struct request *req)
{
    uint64_t done = 0;
    int r = 0;

    while (r == 0 && done < req->len) {
        uint64_t len = 0;

        r = pass_on_piece(q, req, req->offset + done, req->len - done, &len);
        done += len;
    }
    return r;
}
