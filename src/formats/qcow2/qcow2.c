/* SPDX-License-Identifier: Apache-2.0 */
/*
 * qcow2, versions 2 and 3: opening, closing, and metadata in the file. See qcow2.h for the rest.
 */
#include "formats/qcow2/qcow2.h"
#include "base/alloc.h"
#include "base/atomic.h"
#include "base/checked.h"
#include "base/endian.h"
#include "base/log.h"
#include "base/macros.h"
#include "formats/qcow2/check/qcow2-check.h"
#include "formats/qcow2/qcow2-bitmap.h"
#include "formats/qcow2/qcow2-header.h"
#include "graph/gate.h"
#include "graph/graph.h"
#include "graph/node-ref.h"
#include "qcow2-options.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

/* How often a metadata write looks whether the host has let go of the file. */
#define LOOK_NS (5 * NS_PER_MS)

/* Of the file, with result `r`. */
static int ended(struct qcow2 *q, int r)
{
    if (unlikely(q->closing) && r == 0)
        node_closing_goes_on(q->node);
    return r;
}

static int co_fn meta_request(struct qcow2 *q, const struct request *by, enum request_kind kind,
                              uint64_t offset, struct iobuf *b, size_t at, size_t len)
{
    struct request req = request_for(by, kind, offset, len);
    struct iovec iov = {b->data + at, len};

    req.iov = &iov;
    req.iov_count = 1;
    req.hold = b;
    return ended(q, edge_co_request(q->file, &req));
}

int qcow2_read_meta(struct qcow2 *q, const struct request *by, uint64_t offset, struct iobuf *b,
                    size_t at, size_t len)
{
    uint64_t size = node_size(edge_node(q->file));
    uint64_t inside = offset < size ? MIN((uint64_t)len, size - offset) : 0;

    memset(b->data + at + inside, 0, len - (size_t)inside); /* the file may end within a cluster */
    return inside ? meta_request(q, by, REQUEST_READ, offset, b, at, (size_t)inside) : 0;
}

/* G9: not into a file that an earlier write, which its waiter has left, may still change. */
static int co_fn write_resolved(struct qcow2 *q, const struct request *by, uint64_t offset,
                                struct iobuf *b, size_t at, size_t len)
{
    struct request wait = *by;
    int r = 0;

    while (r == 0 && unlikely(node_has_unresolved(edge_node(q->file))))
        r = co_park_until(&wait, loop_clock() + LOOK_NS);
    return r < 0 ? r : meta_request(q, by, REQUEST_WRITE, offset, b, at, len);
}

int qcow2_write_meta(struct qcow2 *q, const struct request *by, uint64_t offset, struct iobuf *b,
                     size_t at, size_t len)
{
    if (unlikely(atomic_get(&q->needs_reopen) || atomic_get(&q->corrupt)))
        return -EIO;
    return write_resolved(q, by, offset, b, at, len);
}

int qcow2_write_mark(struct qcow2 *q, const struct request *by, struct iobuf *b)
{
    return write_resolved(q, by, QCOW2_OFFSET_INCOMPATIBLE, b, 0, 8);
}

int qcow2_sync_edge(struct qcow2 *q, struct edge *e, const struct request *by)
{
    struct request req = request_for(by, REQUEST_FLUSH, 0, 0);
    int r;

    edge_co_announce(q->file, EVENT_FLUSH_TO_DISK, by);
    r = ended(q, edge_co_request(e, &req));
    if (unlikely(r < 0) && r != -ECANCELED && r != -ERESTART && r != -ETIMEDOUT)
        atomic_set(&q->sync_failed, true);
    return r;
}

int qcow2_sync(struct qcow2 *q, const struct request *by)
{
    return qcow2_sync_edge(q, q->file, by);
}

bool qcow2_is_cluster(const struct qcow2 *q, uint64_t host_offset)
{
    return is_aligned(host_offset, qcow2_cluster_size(q)) && host_offset &&
           host_offset < node_size(edge_node(q->file));
}

/* ---- opening ---- */

static int co_fn read_header(struct qcow2 *q, const struct request *by, struct qcow2_header *ret,
                             struct error **err)
{
    uint64_t size = node_size(edge_node(q->file));
    size_t len = (size_t)MIN(size, QCOW2_HEADER_BYTES_MAX);
    struct iobuf *b = iobuf_new(MAX(len, (size_t)1));
    int r;

    if (!b)
        return error_set(err, ENOMEM, "no memory");
    r = qcow2_read_meta(q, by, 0, b, 0, len);
    if (r < 0)
        r = error_set(err, -r, "node '%s': cannot read the header: %s", node_name(q->node),
                      strerror(-r));
    else
        r = qcow2_header_parse_tolerant(ret, b->data, len, size, node_name(q->node), err);
    iobuf_unref(b);
    return r;
}

/*
 * Q5: its refcounts were left to whoever opens it next. A corrupt image is not touched: check_supported() refuses it.
 */
static int co_fn repair_if_dirty(struct qcow2 *q, const struct request *by,
                                 struct qcow2_header *header, struct error **err)
{
    int r;

    if (!q->writable || !(header->incompatible & QCOW2_INCOMPATIBLE_DIRTY) ||
        header->incompatible & QCOW2_INCOMPATIBLE_CORRUPT)
        return 0;
    r = qcow2_header_check_supported(header, true, node_name(q->node), err);
    if (r < 0)
        return r;
    log_warning("node '%s': the image was not closed in order: repairing its refcounts",
                node_name(q->node));
    r = qcow2_co_repair_refcounts(q->file, by, node_name(q->node), err);
    if (r < 0)
        return r;
    qcow2_header_release(header);
    *header = (struct qcow2_header){0};
    return read_header(q, by, header, err);
}

/* What is not kept right any more must not be believed: the bits go before anything else is written. */
static int co_fn clear_autoclear(struct qcow2 *q, const struct request *by,
                                 const struct qcow2_header *header, struct error **err)
{
    uint64_t ours = qcow2_header_autoclear_kept() | qcow2_bitmaps_autoclear_kept(q) |
                    (q->data_raw ? QCOW2_AUTOCLEAR_RAW_DATA : 0);
    uint64_t kept = header->autoclear & ours;
    struct iobuf *b;
    int r;

    if (kept == header->autoclear)
        return 0;
    b = iobuf_new(8);
    if (!b)
        return error_set(err, ENOMEM, "no memory");
    store_be64(b->data, kept);
    r = qcow2_write_meta(q, by, QCOW2_OFFSET_AUTOCLEAR, b, 0, 8);
    iobuf_unref(b);
    if (r == 0)
        r = qcow2_sync(q, by);
    return r < 0 ? error_set(err, -r, "node '%s': cannot write the header: %s", node_name(q->node),
                             strerror(-r))
                 : 0;
}

/* The last cluster lies in the file as a whole, so that it can be written to. */
static int co_fn complete_last_cluster(struct qcow2 *q, const struct request *by,
                                       struct error **err)
{
    uint64_t size = node_size(edge_node(q->file));
    struct request grow = request_for(by, REQUEST_RESIZE, align_up(size, qcow2_cluster_size(q)), 0);
    int r;

    grow.flags = REQUEST_GROW;
    r = q->alloc.grows ? edge_co_request(q->file, &grow) : 0;
    return r < 0 ? error_set(err, -r, "node '%s': cannot make its file larger: %s",
                             node_name(q->node), strerror(-r))
                 : 0;
}

static int co_fn fit_data(struct qcow2 *q, const struct request *by, struct error **err)
{
    int r = qcow2_data_fit(q, by, node_size(q->node));

    return r < 0 ? error_set(err, -r,
                             "node '%s': its data file has %" PRIu64 " bytes, the disk %" PRIu64
                             ", and it cannot be made larger: %s",
                             node_name(q->node), node_size(edge_node(q->data)), node_size(q->node),
                             strerror(-r))
                 : 0;
}

static int want_backing(struct qcow2 *q, const struct qcow2_options *opt,
                        const struct qcow2_header *header, struct error **err)
{
    if (opt->backing || !header->backing_file)
        return 0;
    if (!header->backing_format)
        return error_set(err, EINVAL,
                         "node '%s': the image names backing file '%s' without its format, which "
                         "is never guessed: give `backing`, or set the format with qemu-img "
                         "rebase -u -F",
                         node_name(q->node), header->backing_file);
    node_want_backing(q->node, header->backing_file, header->backing_format);
    return 0;
}

static void init_empty(struct qcow2 *q, struct node *node)
{
    q->node = node;
    q->file = node_file(node);
    q->data = q->file;
    q->writable = !node_settings(node)->read_only;
    overlap_init(&q->ranges);
    co_mutex_init(&q->flush.lock);
    qcow2_alloc_clear(q);
    qcow2_guard_prepare(q);
}

static void set_geometry(struct qcow2 *q, const struct qcow2_header *header)
{
    q->version = header->version;
    q->cluster_bits = header->cluster_bits;
    q->extended = header->incompatible & QCOW2_INCOMPATIBLE_EXTENDED_L2;
    q->unit_bits = header->cluster_bits - (q->extended ? 5 : 0); /* QCOW2_SUBCLUSTERS */
    q->l2_bits = header->cluster_bits - (q->extended ? 4 : 3);
    q->slice_bits = q->l2_bits;
    while (qcow2_slice_bytes(q) > QCOW2_SLICE_BYTES_MAX)
        q->slice_bits--;
    q->refcount_order = header->refcount_order;
    q->compression_type = header->compression_type;
    q->names_backing = header->backing_file;
    q->bad_snapshots = header->snapshots_problem;
    node_set_size(q->node, header->size);
    if (q->crypt)
        node_set_alignment(q->node, LUKS_SECTOR, 1);
    node_set_preferred_alignment(q->node, node_preferred_alignment(edge_node(q->data)));
}

/* What the image holds now is not looked at. */
static int co_fn open_snapshot(struct qcow2 *q, const struct request *by,
                               const struct qcow2_options *opt, struct error **err)
{
    int r;

    if (q->writable)
        return error_set(err, EINVAL,
                         "node '%s': a snapshot can only be read: `snapshot` needs `read-only`",
                         node_name(q->node));
    r = qcow2_map_init(q, by, 0, 0, opt->l2_cache_size, err);
    return r < 0 ? r : qcow2_snapshot_show(q, by, opt->snapshot, err);
}

static int set_discarding(struct qcow2 *q, const struct qcow2_options *opt, struct error **err)
{
    q->passes_discards =
        opt->has_pass_discard_request ? opt->pass_discard_request : node_settings(q->node)->unmap;
    q->keeps_discarded = opt->discard_no_unref;
    if (q->keeps_discarded && q->version < 3)
        return error_set(err, EINVAL,
                         "node '%s': discard-no-unref needs an image of version 3, this one has %u",
                         node_name(q->node), q->version);
    return 0;
}

static int co_fn control_fn open_tables(struct qcow2 *q, const struct request *by,
                                        const struct qcow2_header *header,
                                        const struct qcow2_options *opt, struct error **err)
{
    int r;

    if (opt->snapshot)
        return open_snapshot(q, by, opt, err);
    r = qcow2_map_init(q, by, header->l1_size, header->l1_offset, opt->l2_cache_size, err);
    if (r == 0)
        r = qcow2_bitmaps_co_load(q, by, header, err);
    if (r < 0 || !q->writable)
        return r;
    r = qcow2_alloc_init(q, by, header->refcount_table_offset, header->refcount_table_clusters,
                         err);
    if (r == 0)
        r = qcow2_guard_init(q, by, header, opt, err);
    if (r == 0)
        r = clear_autoclear(q, by, header, err);
    if (r == 0)
        r = complete_last_cluster(q, by, err);
    if (r == 0)
        r = fit_data(q, by, err);
    return r < 0 ? r : qcow2_bitmaps_co_mark(q, by, err);
}

static void release(struct qcow2 *q)
{
    free(q->plain);
    qcow2_coders_release(q);
    qcow2_bitmaps_release(q);
    qcow2_map_release(q);
    qcow2_alloc_release(q);
    qcow2_guard_release(q);
    q->crypt = qcow2_crypt_close(q->crypt);
}

static int co_fn control_fn qcow2_co_open(struct node *node, const void *options,
                                          struct error **err)
{
    const struct qcow2_options *opt = options;
    struct qcow2 *q = node_state(node);
    struct qcow2_header header = {0};
    struct pass pass = {0};
    struct request by = {.pass = &pass};
    int r;

    init_empty(q, node);
    r = read_header(q, &by, &header, err);
    if (r == 0)
        r = repair_if_dirty(q, &by, &header, err);
    if (r == 0)
        r = qcow2_header_check_supported(&header, !q->writable, node_name(node), err);
    if (r == 0 && header.snapshots_problem)
        log_warning(
            "node '%s': the snapshots of the image cannot be used: %s, ignoring them; `cairn "
            "check -r all` drops them",
            node_name(node), header.snapshots_problem);
    if (r == 0)
        r = want_backing(q, opt, &header, err);
    if (r == 0)
        r = qcow2_data_open(q, &header, err);
    if (r == 0)
        r = qcow2_crypt_open(q, &by, &header, opt, err);
    if (r == 0) {
        set_geometry(q, &header);
        qcow2_crypt_protect(q);
        r = set_discarding(q, opt, err);
    }
    if (r == 0) {
        r = open_tables(q, &by, &header, opt, err);
    }
    qcow2_header_release(&header);
    if (r < 0)
        release(q);
    return r;
}

/* STORED-6. After an error those that the image lists are IN_USE in it. */
static void co_fn control_fn store_bitmaps(struct qcow2 *q, const struct request *by)
{
    AUTO(error_free) struct error *err = NULL;

    if (qcow2_bitmaps_co_store(q, by, &err) < 0)
        log_warning("node '%s': its bitmaps are not stored, and what the image has of them is not "
                    "valid: %s",
                    node_name(q->node), error_text(err));
}

static void co_fn control_fn qcow2_co_close(struct node *node)
{
    struct qcow2 *q = node_state(node);
    struct pass pass = {0};
    struct request by = {.kind = REQUEST_FLUSH, .pass = &pass};
    int r = 0;

    q->closing = true;
    qcow2_mark_if_corrupt(q, &by);
    if (q->writable && !q->corrupt) {
        r = qcow2_co_flush(node, &by);
        if (r == 0) {
            store_bitmaps(q, &by);
            r = qcow2_alloc_settle_all(q, &by);
        }
    }
    if (r < 0)
        log_warning("node '%s': cannot write all of the image's metadata: %s; as after a crash, "
                    "what was not flushed may be lost and space may leak",
                    node_name(node), strerror(-r));
    release(q);
}

static unsigned qcow2_unresolved(const struct node *node)
{
    const struct qcow2 *q = node_state(node);

    return q->writable &&
           (node_has_unresolved(edge_node(q->file)) || node_has_unresolved(edge_node(q->data)));
}

static const char *qcow2_filename(const struct node *node)
{
    const struct qcow2 *q = node_state(node);

    return node_filename(edge_node(q->file));
}

static uint64_t qcow2_allocated_bytes(const struct node *node)
{
    const struct qcow2 *q = node_state(node);
    uint64_t bytes = 0;
    uint64_t data = 0;

    (void)node_allocated_bytes(edge_node(q->file), &bytes);
    if (qcow2_has_data_file(q))
        (void)node_allocated_bytes(edge_node(q->data), &data);
    return bytes + data;
}

static bool qcow2_encrypted(const struct node *node)
{
    const struct qcow2 *q = node_state(node);

    return q->crypt;
}

static uint64_t qcow2_cluster_bytes(const struct node *node)
{
    return qcow2_cluster_size(node_state(node));
}

const struct driver qcow2_driver = {
    .name = "qcow2",
    .kind = DRIVER_FORMAT,
    .state_size = sizeof(struct qcow2),
    .options = &qcow2_options_type,
    .zeroes_fast = true,
    .compresses = true,
    .keeps_metadata = true,
    .bitmap_store = &qcow2_bitmap_store,
    .co_open = qcow2_co_open,
    .co_close = qcow2_co_close,
    .co_map = qcow2_co_map,
    .co_read_encoded = qcow2_co_read_encoded,
    .co_write = qcow2_co_write,
    .co_copy_in = qcow2_co_copy_in,
    .co_write_zeroes = qcow2_co_write_zeroes,
    .co_discard = qcow2_co_discard,
    .co_flush = qcow2_co_flush,
    .co_resize = qcow2_co_resize,
    .unresolved = qcow2_unresolved,
    .filename = qcow2_filename,
    .encrypted = qcow2_encrypted,
    .allocated_bytes = qcow2_allocated_bytes,
    .cluster_bytes = qcow2_cluster_bytes,
};
