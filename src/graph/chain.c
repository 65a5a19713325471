/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Walking a backing chain (Q3). Each layer is asked inside its own epoch, which is left at once unless the data lies in that
 * layer's file; then it is left when the data has been read (Q2).
 *
 * CHAIN-1 The top is always asked. What lies deep below is found by a hint: the first layer that may hold a part of a region.
 *         Those above it, but for the top, have said "below" for all of the region.
 * CHAIN-2 A hint holds while the region's generation is the one that was read before the layers were asked. Whoever changes
 *         what a layer says raises it after it is published; each change of the graph raises all.
 * CHAIN-3 Hints belong to a loop, and so need no lock.
 */
#include "graph/chain.h"
#include "base/alloc.h"
#include "base/checked.h"
#include "base/macros.h"
#include "graph/graph-internal.h"
#include "graph/node-internal.h"

#include <errno.h>

/* A piece of a request that is longer than this many vectors is read in several. */
#define PIECE_IOV 16

/*
 * Hints are for regions of two sizes, and for what lies below so many layers; a loop has so many of each for each top. Small
 * ones serve where large ones do not lead far, since much of the region lies in layers above.
 */
#define HINT_DEPTH 3
#define HINTS      4096

static const unsigned region_bits[CHAIN_REGION_SIZES] = {16, 25};

struct hint {
    uint64_t region; /* and 1: all zero is none */
    uint64_t generation;
    struct edge *via;
};

struct chain_cache {
    struct hint hints[CHAIN_REGION_SIZES][HINTS];
};

enum found_kind {
    FOUND_DATA,    /* in a child of `layer` */
    FOUND_ENCODED, /* in its file, for its driver to read */
    FOUND_PLAIN,   /* `layer` is no format with a map: ask it */
    FOUND_ZERO,
};

/* Who answers for the bytes from one place on. */
struct found {
    enum found_kind kind;
    struct node *layer;
    struct edge *via; /* the edge to the layer; NULL: it is the top */
    uint64_t len;
    uint64_t host_offset; /* FOUND_DATA, FOUND_ENCODED */
    struct edge *host;    /* FOUND_DATA, and zeroes that a layer says, or NULL */
    bool holes;           /* FOUND_DATA */
    bool said;            /* FOUND_ZERO: by the layer, not for want of one */

    /* FOUND_DATA, FOUND_ENCODED: we are inside. */
    struct epoch_slot *slot;
    unsigned phase;
};

static void found_leave(struct found *f)
{
    if (f->slot)
        epoch_leave(f->slot, f->phase);
    f->slot = NULL;
}

/* Asks one layer. Stays inside if it is the one. */
static int co_fn ask(struct found *f, const struct request *req, uint64_t offset,
                     enum mapping_kind *ret)
{
    struct node *layer = f->layer;
    struct mapping map = {.kind = MAPPING_ZERO};
    int r;

    f->slot = epoch_slot_here(&layer->epoch);
    if (unlikely(!f->slot))
        return -ENOMEM;
    f->phase = epoch_enter(f->slot);
    r = layer->driver->co_map(layer, req, offset, f->len, &map);
    *ret = map.kind;
    if (r < 0 || (map.kind != MAPPING_DATA && map.kind != MAPPING_ENCODED))
        found_leave(f);
    f->len = map.len;
    f->host_offset = map.host_offset;
    f->host = map.host;
    f->holes = map.holes;
    return r;
}

static void descend(struct found *f)
{
    f->via = f->layer->backing;
    f->layer = f->via ? f->via->node : NULL;
}

/* From f->layer down; found_leave() gives back what it holds. */
static int co_fn find_from(struct found *f, const struct request *req, uint64_t offset)
{
    while (f->layer) {
        uint64_t size = node_size(f->layer);
        enum mapping_kind kind;
        int r;

        if (offset >= size)
            return 0; /* a backing node that is shorter */
        f->len = MIN(f->len, size - offset);
        if (!f->layer->driver->co_map) {
            f->kind = FOUND_PLAIN;
            return 0;
        }
        r = ask(f, req, offset, &kind);
        if (r < 0)
            return r;
        switch (kind) {
        case MAPPING_DATA:
            f->kind = FOUND_DATA;
            return 0;
        case MAPPING_ENCODED:
            f->kind = FOUND_ENCODED;
            return 0;
        case MAPPING_ZERO:
            f->said = true;
            return 0;
        case MAPPING_BELOW:
            break;
        }
        descend(f);
    }
    return 0;
}

/* ---- hints ---- */

static uint64_t *generation_of(struct graph *g, unsigned size, uint64_t region)
{
    return &g->chain_generations[size][region % CHAIN_GENERATIONS];
}

void chain_changed(struct node *node, uint64_t offset, uint64_t len)
{
    if (!atomic_get(&node->lies_below) || !len)
        return;
    for (unsigned size = 0; size < CHAIN_REGION_SIZES; size++) {
        uint64_t first = offset >> region_bits[size];
        uint64_t last = (offset + len - 1) >> region_bits[size];

        if (last - first >= CHAIN_GENERATIONS)
            last = first + CHAIN_GENERATIONS - 1; /* that is all of them */
        for (uint64_t region = first; region <= last; region++)
            (void)atomic_add(generation_of(node->graph, size, region), 1u);
    }
}

void chain_all_changed(struct graph *g)
{
    for (unsigned size = 0; size < CHAIN_REGION_SIZES; size++) {
        for (size_t i = 0; i < CHAIN_GENERATIONS; i++)
            (void)atomic_add(&g->chain_generations[size][i], 1u);
    }
}

static bool is_deep(const struct node *top)
{
    for (unsigned i = 0; i < HINT_DEPTH; i++) {
        if (!top->backing)
            return false;
        top = top->backing->node;
    }
    return true;
}

/* Does the layer say "below" for all of the region? */
static int co_fn is_empty_there(struct node *layer, const struct request *req, unsigned size,
                                uint64_t region)
{
    uint64_t bytes = (uint64_t)1 << region_bits[size];
    uint64_t start = region << region_bits[size];
    struct found f = {.layer = layer, .len = bytes};
    enum mapping_kind kind;
    int r;

    if (start + bytes > node_size(layer) || !layer->driver->co_map)
        return false;
    r = ask(&f, req, start, &kind);
    found_leave(&f);
    return r < 0 ? r : kind == MAPPING_BELOW && f.len == bytes;
}

/* Moves *via down to the first layer that may have something in the region: by its hint, which is made if need be. */
static int co_fn follow_hint(struct graph *g, struct chain_cache *cache, const struct request *req,
                             unsigned size, uint64_t offset, struct edge **via)
{
    uint64_t region = offset >> region_bits[size];
    uint64_t generation = atomic_get(generation_of(g, size, region));
    struct hint *h = &cache->hints[size][region % HINTS];
    struct edge *e = *via;
    int r = 1;

    if (h->region == (region << 1 | 1) && h->generation == generation) {
        *via = h->via;
        return 0;
    }
    while (r == 1) {
        r = is_empty_there(e->node, req, size, region);
        if (r == 1 && !e->node->backing)
            r = 0; /* the last one says so itself */
        if (r == 1)
            e = e->node->backing;
    }
    *via = e;
    if (r == 0)
        *h = (struct hint){.region = region << 1 | 1, .generation = generation, .via = e};
    return r;
}

/* From the layer below the top on: the first one that may have something there. */
static int co_fn skip(struct node *top, struct found *f, const struct request *req, uint64_t offset)
{
    struct epoch_slot *slot = epoch_slot_here(&top->epoch);
    struct edge *via = top->backing;
    int r = 0;

    if (!slot)
        return -ENOMEM;
    if (!slot->chain)
        slot->chain = try_new(struct chain_cache);
    if (!slot->chain)
        return 0; /* the long way is right as well */
    for (unsigned size = CHAIN_REGION_SIZES; r == 0 && size-- > 0 && is_deep(via->node);) {
        uint64_t bytes = (uint64_t)1 << region_bits[size];

        r = follow_hint(top->graph, slot->chain, req, size, offset, &via);
        f->len = MIN(f->len, align_down(offset, bytes) + bytes - offset);
    }
    f->via = via;
    f->layer = via->node;
    return r;
}

/* Who answers for what a node shows at `offset`, for `len` bytes at most? */
static int co_fn find(struct node *top, const struct request *req, uint64_t offset, uint64_t len,
                      struct found *f)
{
    enum mapping_kind kind;
    int r;

    *f = (struct found){.kind = FOUND_ZERO, .layer = top, .len = len};
    if (likely(!is_deep(top)))
        return find_from(f, req, offset);
    r = ask(f, req, offset, &kind);
    if (r < 0)
        return r;
    f->kind = kind == MAPPING_DATA      ? FOUND_DATA
              : kind == MAPPING_ENCODED ? FOUND_ENCODED
                                        : FOUND_ZERO;
    f->said = kind == MAPPING_ZERO;
    if (kind != MAPPING_BELOW)
        return 0;
    r = skip(top, f, req, offset);
    if (r == 0 && f->layer == top)
        descend(f);
    return r < 0 ? r : find_from(f, req, offset);
}

/* The same for what lies below a node. */
static int co_fn find_below(struct node *top, const struct request *req, uint64_t offset,
                            uint64_t len, struct found *f)
{
    int r = 0;

    *f = (struct found){.kind = FOUND_ZERO, .layer = top, .len = len};
    if (is_deep(top))
        r = skip(top, f, req, offset);
    if (r == 0 && f->layer == top)
        descend(f);
    return r < 0 ? r : find_from(f, req, offset);
}

/* The file may end within its last cluster: what it lacks there reads as zeroes. */
static int co_fn read_file(struct edge *file, struct request *req, uint64_t host_offset)
{
    uint64_t size = node_size(file->node);
    struct iovec iov[PIECE_IOV];
    struct request inside;

    if (likely(host_offset < size && req->len <= size - host_offset))
        return edge_co_request_at(file, req, host_offset);
    if (host_offset >= size) {
        request_zero_from(req, 0);
        return 0;
    }
    if (req->iov_count > PIECE_IOV)
        return -EINVAL; /* pieces are not longer */
    request_zero_from(req, size - host_offset);
    inside = *req;
    (void)request_slice(&inside, req, 0, size - host_offset, iov, PIECE_IOV);
    return edge_co_request_at(file, &inside, host_offset);
}

static int co_fn read_found(const struct found *f, struct request *req)
{
    switch (f->kind) {
    case FOUND_DATA:
        edge_co_announce(f->layer->file, EVENT_READ_AIO, req);
        return read_file(f->host, req, f->host_offset);
    case FOUND_ENCODED:
        return f->layer->driver->co_read_encoded(f->layer, req, f->host_offset);
    case FOUND_PLAIN:
        return edge_co_request(f->via, req);
    case FOUND_ZERO:
        request_zero_from(req, 0);
        break;
    }
    return 0;
}

/* Piece by piece. */
int chain_co_read(struct node *top, struct request *req)
{
    uint64_t done = 0;
    int r = 0;

    while (r == 0 && done < req->len) {
        struct found f;

        r = find(top, req, req->offset + done, req->len - done, &f);
        if (r < 0)
            return r;
        if (f.layer && f.layer != top)
            edge_co_announce(top->file, EVENT_READ_BACKING_AIO, req);
        if (f.len == req->len && req->iov_count <= PIECE_IOV) {
            r = read_found(&f, req);
        } else {
            struct iovec iov[PIECE_IOV];
            struct request piece = *req;

            f.len = request_slice(&piece, req, done, f.len, iov, PIECE_IOV);
            r = read_found(&f, &piece);
        }
        done += f.len;
        found_leave(&f);
    }
    return r;
}

/* Of what is there as it is; zeroes and what is encoded are no file's range. */
static int co_fn copy_found(const struct found *f, struct request *req)
{
    switch (f->kind) {
    case FOUND_DATA:
        edge_co_announce(f->layer->file, EVENT_READ_AIO, req);
        return range_within(f->host_offset, req->len, node_size(f->host->node))
                   ? edge_co_request_at(f->host, req, f->host_offset)
                   : -EOPNOTSUPP;
    case FOUND_PLAIN:
        return edge_co_request(f->via, req);
    case FOUND_ENCODED:
    case FOUND_ZERO:
        break;
    }
    return -EOPNOTSUPP;
}

int chain_co_copy_out(struct node *top, struct request *req)
{
    uint64_t done = 0;
    int r = 0;

    while (r == 0 && done < req->len) {
        struct request piece = *req;
        struct found f;

        r = find(top, req, req->offset + done, req->len - done, &f);
        if (r < 0)
            return r;
        (void)request_slice(&piece, req, done, f.len, NULL, 0);
        r = copy_found(&f, &piece);
        done += f.len;
        found_leave(&f);
    }
    return r;
}

/* A node without a map is asked for the extents of what it answers for; they come into the free part of the same array. */
static int co_fn plain_extents(const struct found *f, const struct request *req, uint64_t offset,
                               struct extents *ret)
{
    struct request sub = request_for(req, REQUEST_EXTENTS, offset, f->len);

    sub.extents = ret;
    return edge_co_request(f->via, &sub);
}

int chain_co_zero_below(struct node *node, const struct request *req, uint64_t offset, uint64_t len)
{
    bool zero = true;

    while (zero && len) {
        struct found f;
        int r = find_below(node, req, offset, len, &f);

        found_leave(&f);
        if (r < 0)
            return r;
        zero = f.kind == FOUND_ZERO;
        offset += f.len;
        len -= f.len;
    }
    return zero;
}

/* How many links lead from the top to one of its layers. */
static unsigned links_to(const struct node *top, const struct node *layer)
{
    unsigned links = 0;

    for (; top != layer; top = top->backing->node)
        links++;
    return links;
}

/* What a node below says, as the top shows it. */
static int co_fn add_plain(struct node *top, const struct found *f, const struct request *req)
{
    struct extents *ours = req->extents;
    struct extents below = {
        .v = ours->v + ours->count, .max = ours->max - ours->count, .layers = ours->layers};
    unsigned links = ours->layers ? links_to(top, f->layer) : 0;
    int r = plain_extents(f, req, req->offset, &below);

    for (unsigned i = 0; i < below.count && r == 0; i++) {
        struct extent e = below.v[i];

        if (e.flags & EXTENT_ALLOCATED || e.below)
            e.below += links;
        if (f->layer != top)
            e.flags &= ~(unsigned)EXTENT_ALLOCATED;
        (void)extents_add(ours,
                          &e); /* there is room: ours->v + ours->count is not past below.v + i */
    }
    return r;
}

/* Shortens it to what is all hole, or all data. */
static int co_fn look_for_holes(const struct found *f, const struct request *by, struct extent *e)
{
    uint64_t size = node_size(f->host->node);
    struct extent there;
    struct extents one = {.v = &there, .max = 1};
    struct request req = request_for(by, REQUEST_EXTENTS, f->host_offset, e->len);
    int r;

    if (!range_within(req.offset, req.len, size))
        return 0; /* the file ends there: it is as good to say data */
    req.extents = &one;
    r = edge_co_request(f->host, &req);
    if (r == 0 && one.count) {
        e->len = MIN(e->len, there.len);
        e->flags |= there.flags & EXTENT_ZERO;
    }
    return r;
}

int chain_co_extents(struct node *top, struct request *req)
{
    struct extent e = {.offset = req->offset};
    struct found f;
    int r = find(top, req, req->offset, req->len, &f);

    found_leave(&f);
    if (r < 0)
        return r;
    if (f.kind == FOUND_PLAIN)
        return add_plain(top, &f, req);
    e.len = f.len;
    e.flags = f.kind == FOUND_ZERO ? EXTENT_ZERO : EXTENT_DATA;
    if (f.layer == top && (f.kind != FOUND_ZERO || f.said))
        e.flags |= EXTENT_ALLOCATED;
    else if (req->extents->layers && (f.kind != FOUND_ZERO || f.said))
        e.below = links_to(top, f.layer);
    if (f.kind == FOUND_DATA || (f.kind == FOUND_ZERO && f.said && f.host)) {
        e.flags |= EXTENT_OFFSET_VALID;
        e.host = f.host->node;
        e.host_offset = f.host_offset;
        r = f.kind == FOUND_DATA && f.holes ? look_for_holes(&f, req, &e) : 0;
    }
    if (r < 0)
        return r;
    (void)extents_add(req->extents, &e); /* full is as good */
    return 0;
}
