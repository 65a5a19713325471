/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Metadata contexts: base:allocation, the depths of a chain, and one for each dirty bitmap of an export. Which ones there are, what a client's query
 * asks for, and the answer to a block status request: a chunk for each context that the client has chosen.
 */
#include "base/alloc.h"
#include "base/endian.h"
#include "base/macros.h"
#include "exports/nbd/nbd-wire.h"
#include "exports/nbd/nbd.h"
#include "graph/driver.h"
#include "schema-types.h"

#include <assert.h>
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

/* The most descriptors in one answer, all contexts together. */
#define MAX_DESCRIPTORS ((unsigned)4096)

#define CHUNK_HEAD       24 /* of a block status chunk: with the context's identifier */
#define DESCRIPTOR_BYTES 8

#define ALLOCATION_CONTEXT "base:allocation"
#define DEPTH_CONTEXT      "qemu:allocation-depth"
#define BITMAP_CONTEXT     "qemu:dirty-bitmap:"

/* ---- the bitmaps of an export ---- */

/* The node that has the bitmap of an option. */
static const char *control_fn bitmap_node(struct graph *graph, const char *export_node,
                                          const struct block_dirty_bitmap_or_str *option)
{
    struct node *node;

    if (option->kind == BLOCK_DIRTY_BITMAP_OR_STR_EXTERNAL)
        return option->external->node;
    node = dirty_bitmap_find_below(graph_find(graph, export_node), option->local);
    return node ? node_name(node) : export_node; /* where looking for it fails, with a message */
}

static int check_bitmap(const struct nbd_export *export, const struct nbd_bitmap *b,
                        struct error **err)
{
    const char *name = dirty_bitmap_name(b->held);

    for (unsigned i = 0; i < export->bitmap_count; i++) {
        if (strcmp(export->bitmaps[i].context, b->context) == 0)
            return error_set(err, EEXIST,
                             "there are two dirty bitmaps '%s': clients could not "
                             "tell them apart",
                             name);
    }
    if (bitmap_size(b->bits) != backend_size(export->backend))
        return error_set(err, EINVAL,
                         "dirty bitmap '%s' covers %" PRIu64 " bytes, the disk has %" PRIu64, name,
                         bitmap_size(b->bits), backend_size(export->backend));
    if (!export->writable && dirty_bitmap_enabled(b->held) &&
        !node_settings(backend_node(export->backend))->read_only)
        return error_set(err, EINVAL,
                         "dirty bitmap '%s' is enabled: it may change while clients of a read-only "
                         "export read it; disable it",
                         name);
    return 0;
}

static void co_fn control_fn release_bitmap(struct nbd_bitmap *b)
{
    if (b->held)
        dirty_bitmap_release(b->held);
    b->backend = backend_co_free(b->backend);
    free(b->context);
}

static int co_fn control_fn attach_bitmap(struct nbd_export *export, struct graph *graph,
                                          struct dirty_bitmap_ref ref, const char *owner,
                                          struct error **err)
{
    /* Keeps the node, and its size. */
    struct access access = {.wants = 0, .tolerates = ACCESS_ALL & ~ACCESS_RESIZE};
    struct nbd_bitmap b = {.context = xasprintf(BITMAP_CONTEXT "%s", ref.name)};
    int r = backend_co_new(&b.backend, graph, ref.node, access, owner, err);

    if (r == 0)
        r = dirty_bitmap_co_hold(graph, ref, owner, &b.held, err);
    if (r == 0) {
        b.bits = dirty_bitmap_bits(b.held);
        r = check_bitmap(export, &b, err);
    }
    if (r < 0) {
        release_bitmap(&b);
        return r;
    }
    export->bitmaps[export->bitmap_count++] = b;
    return 0;
}

int nbd_export_co_attach_bitmaps(struct nbd_export *export, struct graph *graph,
                                 const struct block_dirty_bitmap_or_str *options, size_t count,
                                 const char *owner, struct error **err)
{
    const char *own_node = node_name(backend_node(export->backend));
    size_t max = NBD_MAX_BITMAPS - export->allocation_depth;
    int r = 0;

    if (!count)
        return 0;
    if (count > max)
        return error_set(err, E2BIG, "%zu dirty bitmaps are more than %zu", count, max);
    export->bitmaps = try_new_n(struct nbd_bitmap, count);
    if (!export->bitmaps)
        return error_set(err, ENOMEM, "no memory for %zu dirty bitmaps", count);
    for (size_t i = 0; r == 0 && i < count; i++) {
        const struct block_dirty_bitmap_or_str *o = &options[i];
        struct dirty_bitmap_ref ref = {
            .node = bitmap_node(graph, own_node, o),
            .name = o->kind == BLOCK_DIRTY_BITMAP_OR_STR_LOCAL ? o->local : o->external->name,
        };

        r = attach_bitmap(export, graph, ref, owner, err);
    }
    if (r < 0)
        nbd_export_co_release_bitmaps(export);
    return r;
}

void nbd_export_co_release_bitmaps(struct nbd_export *export)
{
    while (export->bitmap_count)
        release_bitmap(&export->bitmaps[--export->bitmap_count]);
    free(take(&export->bitmaps));
}

/* ---- negotiation ---- */

/* The identifier of the first bitmap. */
static unsigned first_bitmap(const struct nbd_export *export)
{
    return export->allocation_depth ? NBD_CONTEXT_DEPTH + 1 : NBD_CONTEXT_ALLOCATION + 1;
}

unsigned nbd_context_count(const struct nbd_export *export)
{
    return first_bitmap(export) + export->bitmap_count;
}

static bool is_bitmap(const struct nbd_export *export, unsigned id)
{
    return id >= first_bitmap(export);
}

const char *nbd_context_name(const struct nbd_export *export, unsigned id)
{
    if (is_bitmap(export, id))
        return export->bitmaps[id - first_bitmap(export)].context;
    return id == NBD_CONTEXT_DEPTH ? DEPTH_CONTEXT : ALLOCATION_CONTEXT;
}

static bool is(const char *query, size_t len, const char *text)
{
    return len == strlen(text) && memcmp(query, text, len) == 0;
}

bool nbd_context_matches(const struct nbd_export *export, unsigned id, const char *query,
                         size_t len, bool listing)
{
    if (is(query, len, nbd_context_name(export, id)))
        return true;
    if (!listing) /* a namespace, or a leaf without its name, only lists */
        return false;
    if (id == NBD_CONTEXT_ALLOCATION)
        return is(query, len, "base:");
    return is(query, len, "qemu:") || (is_bitmap(export, id) && is(query, len, BITMAP_CONTEXT));
}

/* ---- block status ---- */

static uint32_t allocation_state(unsigned flags)
{
    return (flags & EXTENT_DATA ? 0 : NBD_STATE_HOLE) | (flags & EXTENT_ZERO ? NBD_STATE_ZERO : 0);
}

/* One answer while it is made: chunks one after the other. */
struct status {
    struct nbd_request *req;
    unsigned max;  /* descriptors of one context */
    uint8_t *at;   /* where the next chunk begins */
    uint8_t *last; /* where the last one does */
    unsigned n;    /* descriptors of this chunk so far */
};

static uint8_t *descriptor(const struct status *s, unsigned i)
{
    return s->at + CHUNK_HEAD + (size_t)i * DESCRIPTOR_BYTES;
}

/* False: there are enough. What continues the last one becomes a part of it. */
static bool add_descriptor(struct status *s, uint64_t len, uint32_t state)
{
    uint8_t *before = s->n ? descriptor(s, s->n - 1) : NULL;

    if (before && load_be32(before + 4) == state) {
        store_be32(before, load_be32(before) + (uint32_t)len);
        return true;
    }
    if (s->n == s->max)
        return false;
    store_be32(descriptor(s, s->n), (uint32_t)len);
    store_be32(descriptor(s, s->n) + 4, state);
    s->n++;
    return true;
}

static void end_chunk(struct status *s, unsigned context)
{
    nbd_chunk_head(s->at, 0, NBD_REPLY_TYPE_BLOCK_STATUS, s->req->cookie,
                   4 + s->n * DESCRIPTOR_BYTES);
    store_be32(s->at + 20, context);
    s->last = s->at;
    s->at = descriptor(s, s->n);
    s->n = 0;
}

static void add_bitmap(struct status *s, const struct bitmap *bits)
{
    uint64_t pos = s->req->offset;
    uint64_t end = pos + s->req->len;
    uint64_t offset;
    uint64_t len;

    while (bitmap_next_dirty(bits, pos, end, &offset, &len)) {
        if (offset > pos && !add_descriptor(s, offset - pos, 0))
            return;
        if (!add_descriptor(s, len, NBD_STATE_DIRTY))
            return;
        pos = offset + len;
    }
    if (pos < end)
        (void)add_descriptor(s, end - pos, 0);
}

/* 1 is the topmost layer; 0: nothing is there in any of them. */
static uint32_t depth_state(const struct extent *e)
{
    return e->flags & EXTENT_ALLOCATED || e->below ? e->below + 1 : 0;
}

/* What the graph says of the range: the states of base:allocation, or the depths. */
static int co_fn add_extents(struct status *s, unsigned context)
{
    bool depths = context == NBD_CONTEXT_DEPTH;
    unsigned max = MAX(s->max, 2u); /* two show where the first one ends */
    struct iobuf *list = iobuf_new(max * sizeof(struct extent));
    struct extents extents = {.max = max, .layers = depths};
    struct request r = {
        .kind = REQUEST_EXTENTS,
        .offset = s->req->offset,
        .len = s->req->len,
        .extents = &extents,
    };
    int result;

    if (!list)
        return -ENOMEM;
    extents.v = (struct extent *)(void *)list->data;
    result = backend_co_request(s->req->connection->backend, &r);
    for (unsigned i = 0; result == 0 && i < extents.count; i++) {
        const struct extent *e = &extents.v[i];

        if (!add_descriptor(s, e->len, depths ? depth_state(e) : allocation_state(e->flags)))
            break;
    }
    if (result == 0 && !extents.count)
        result = -EIO;
    iobuf_unref(list);
    return result;
}

static unsigned descriptors_of(const struct nbd_request *req, unsigned chunks)
{
    return req->flags & NBD_CMD_FLAG_REQ_ONE ? 1 : MAX_DESCRIPTORS / chunks;
}

static size_t status_bytes(unsigned chunks, unsigned max)
{
    return (size_t)chunks * (CHUNK_HEAD + (size_t)max * DESCRIPTOR_BYTES);
}

uint32_t nbd_block_status_cost(const struct nbd_request *req)
{
    unsigned chunks = (unsigned)__builtin_popcountll(req->connection->contexts | 1);
    unsigned max = descriptors_of(req, chunks);

    return (uint32_t)(status_bytes(chunks, max) + (size_t)MAX(max, 2u) * sizeof(struct extent));
}

/* Bitmaps come first: after the wait for the graph the export may be gone. */
int nbd_co_block_status(struct nbd_request *req)
{
    const struct nbd_connection *c = req->connection;
    unsigned first = first_bitmap(c->export);
    unsigned chunks = (unsigned)__builtin_popcountll(c->contexts);
    struct status s = {.req = req, .max = descriptors_of(req, chunks)};
    int result = 0;

    req->buf = iobuf_new(status_bytes(chunks, s.max));
    if (!req->buf)
        return -ENOMEM;
    s.at = req->buf->data;
    for (unsigned i = 0; i < c->export->bitmap_count; i++) {
        if (c->contexts & (uint64_t)1 << (first + i)) {
            add_bitmap(&s, c->export->bitmaps[i].bits);
            end_chunk(&s, first + i);
        }
    }
    for (unsigned id = 0; result == 0 && id < first; id++) {
        if (c->contexts & (uint64_t)1 << id) {
            result = add_extents(&s, id);
            end_chunk(&s, id);
        }
    }
    assert(s.last); /* check() has seen that there is one */
    store_be16(s.last + 4, NBD_REPLY_FLAG_DONE);
    req->payload = req->buf->data;
    req->payload_len = (size_t)(s.at - req->buf->data);
    return result;
}
