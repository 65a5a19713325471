/* SPDX-License-Identifier: Apache-2.0 */
/*
 * How changed mappings reach the disk: in cycles, one at a time, each of which takes a picture of all that has changed.
 *
 * FLUSH-1 The picture is taken before the first device flush of its cycle, so that this flush covers the data that the
 *         picture's entries point to, their refcounts, and zeroed tables.
 * FLUSH-2 That flush is left out if nothing in the picture needs it (Q4): entries that point to space which read as zeroes
 *         as their guest clusters did, and is durably counted, may reach the disk before the data. Of a data file it is that file's.
 * FLUSH-3 A picture that did not reach the disk is dirty again, together with what changed since.
 * FLUSH-4 What was freed before the picture was taken is forgotten by the disk when the cycle has succeeded (Q1).
 * FLUSH-5 A flush is covered by every cycle that begins after it came.
 * FLUSH-6 After a device flush that failed, mappings that it should have come before are not followed: the host may have dropped
 *         their data, and shows what the cluster held for another.
 */
#include "base/alloc.h"
#include "base/atomic.h"
#include "base/endian.h"
#include "base/macros.h"
#include "formats/qcow2/qcow2.h"
#include "loop/scope.h"

#include <errno.h>
#include <stdlib.h>

/* How many chunks are being written at a time. */
#define WRITERS 32

/* A writer cleans up when more than this share of the cache, or so many slices, are dirty. */
#define DIRTY_SHARE 4
#define DIRTY_MAX   256

/* Pool memory for some pieces. */
struct picture_memory {
    struct list link;
    struct iobuf *b;
    size_t used;
};

#define MEMORY_BYTES ((size_t)256 << 10)

/* A piece of a table as it shall be on the disk. */
struct picture_piece {
    struct qcow2_slice *slice; /* pinned; NULL: of the L1 table */
    unsigned chunk;            /* of the slice; or unit of the L1 table */
    uint64_t offset;
    struct picture_memory *memory;
    uint8_t *bytes; /* in there */
    size_t len;
};

struct picture {
    struct picture_piece *pieces;
    size_t count;
    size_t max;
    struct list memory; /* struct picture_memory */
    struct picture_memory *filling;
    bool ordered;
    bool tables_ordered; /* that of L1 is */
    struct list freed;   /* struct qcow2_run */

    /* Of the writers. */
    struct qcow2 *q;
    const struct request *by;
    size_t next;
    int result;
};

static size_t chunk_bytes(const struct qcow2 *q)
{
    return MIN((size_t)QCOW2_CHUNK_BYTES, qcow2_slice_bytes(q));
}

static size_t l1_units(const struct qcow2 *q)
{
    return ((size_t)q->map.l1_size * QCOW2_ENTRY_LEN + QCOW2_L1_UNIT - 1) / QCOW2_L1_UNIT;
}

static bool add_memory(struct picture *p)
{
    struct picture_memory *m = try_new(struct picture_memory);

    if (!m)
        return false;
    m->b = iobuf_new(MEMORY_BYTES);
    if (!m->b) {
        free(m);
        return false;
    }
    list_append(&p->memory, &m->link);
    return true;
}

/* Room for so many pieces, or fewer: then they are written in several pictures. */
static int make_room(struct picture *p, size_t pieces)
{
    size_t per_memory = MEMORY_BYTES / MAX(chunk_bytes(p->q), (size_t)QCOW2_L1_UNIT);

    p->pieces = try_new_n(struct picture_piece, pieces);
    if (!p->pieces)
        return -ENOMEM;
    while (p->max < pieces && add_memory(p))
        p->max += per_memory;
    p->max = MIN(p->max, pieces);
    return p->max ? 0 : -ENOMEM;
}

/* The memories are used one after the other. The piece's bytes are NULL if there is no room. */
static uint8_t *add_piece(struct picture *p, struct qcow2_slice *s, unsigned chunk, uint64_t offset,
                          size_t len)
{
    struct picture_memory *m = p->filling;
    uint8_t *bytes;

    if (p->count == p->max)
        return NULL;
    if (m->used + len > MEMORY_BYTES)
        m = p->filling = list_entry(m->link.next, struct picture_memory, link);
    bytes = m->b->data + m->used;
    m->used += len;
    p->pieces[p->count++] = (struct picture_piece){
        .slice = s, .chunk = chunk, .offset = offset, .memory = m, .bytes = bytes, .len = len};
    return bytes;
}

static void copy_entries(uint8_t *to, const uint64_t *from, size_t count)
{
    /* Relaxed: entries change under the lock that we hold. */
    for (size_t i = 0; i < count; i++)
        store_be64(to + i * QCOW2_ENTRY_LEN, atomic_get_relaxed(&from[i]));
}

/* Under q->lock: one dirty chunk after the other, as far as there is memory. */
static bool take_slice_locked(struct picture *p, struct qcow2_slice *s)
{
    size_t chunk = chunk_bytes(p->q);

    p->ordered |= s->ordered;
    for (unsigned i = 0; s->dirty; i++) {
        uint64_t offset;
        uint8_t *bytes;

        if (!(s->dirty & (uint32_t)1 << i))
            continue;
        offset = qcow2_slice_offset(p->q, s->index) + i * chunk;
        bytes = add_piece(p, s, i, offset, chunk);
        if (!bytes)
            return false;
        copy_entries(bytes, s->entries + i * chunk / QCOW2_ENTRY_LEN, chunk / QCOW2_ENTRY_LEN);
        if (p->q->extended)
            qcow2_bits_store(bytes, chunk);
        s->pins++;
        s->dirty &= ~((uint32_t)1 << i);
    }
    s->ordered = false;
    list_remove(&s->link);
    list_append(&p->q->map.clean, &s->link);
    p->q->map.dirty_count--;
    return true;
}

static bool take_l1_locked(struct picture *p)
{
    struct qcow2_map *map = &p->q->map;

    p->tables_ordered = map->l1_ordered;
    p->ordered |= map->l1_ordered;
    for (size_t unit = 0; map->l1_any && unit < l1_units(p->q); unit++) {
        uint64_t bit = (uint64_t)1 << unit % 64;
        size_t first = unit * (QCOW2_L1_UNIT / QCOW2_ENTRY_LEN);
        size_t count = MIN((size_t)map->l1_size - first, (size_t)QCOW2_L1_UNIT / QCOW2_ENTRY_LEN);
        uint8_t *bytes;

        if (!(map->l1_dirty[unit / 64] & bit))
            continue;
        bytes = add_piece(p, NULL, (unsigned)unit, map->l1_offset + unit * QCOW2_L1_UNIT,
                          count * QCOW2_ENTRY_LEN);
        if (!bytes)
            return false;
        copy_entries(bytes, map->l1 + first, count);
        map->l1_dirty[unit / 64] &= ~bit;
    }
    map->l1_ordered = false;
    map->l1_any = false;
    return true;
}

/* Under q->lock: how many pieces there would be at most. */
static size_t count_locked(const struct qcow2 *q)
{
    const struct qcow2_slice *s;
    size_t n = q->map.l1_any ? l1_units(q) : 0;

    list_for_each (&q->map.dirty, s, link)
        n += (size_t)__builtin_popcount(s->dirty);
    return n;
}

static bool take_all_locked(struct picture *p)
{
    struct qcow2_slice *s;

    while ((s = list_first(&p->q->map.dirty, struct qcow2_slice, link))) {
        if (!take_slice_locked(p, s))
            return false;
    }
    return take_l1_locked(p);
}

/* FLUSH-3 */
static void put_back_locked(struct picture *p)
{
    struct qcow2_map *map = &p->q->map;

    for (size_t i = 0; i < p->count; i++) {
        const struct picture_piece *piece = &p->pieces[i];
        struct qcow2_slice *s = piece->slice;

        if (!s) {
            map->l1_dirty[piece->chunk / 64] |= (uint64_t)1 << piece->chunk % 64;
            map->l1_any = true;
            map->l1_ordered |= p->ordered;
            continue;
        }
        if (!s->dirty) {
            list_remove(&s->link);
            list_append(&map->dirty, &s->link);
            map->dirty_count++;
        }
        s->dirty |= (uint32_t)1 << piece->chunk;
        s->ordered |= p->ordered;
    }
    list_splice(&p->q->alloc.freed, &p->freed);
}

/* ---- writing it ---- */

static void co_fn write_pieces(void *arg)
{
    struct picture *p = arg;

    while (p->result == 0 && p->next < p->count) {
        const struct picture_piece *piece = &p->pieces[p->next++];
        struct iobuf *b = piece->memory->b;
        int r;

        edge_co_announce(p->q->file, piece->slice ? EVENT_L2_UPDATE : EVENT_L1_UPDATE, p->by);
        r = qcow2_guard_write(p->q, p->by,
                              piece->slice ? QCOW2_GUARD_ACTIVE_L2 : QCOW2_GUARD_ACTIVE_L1,
                              piece->offset, piece->len);
        if (r == 0)
            r = qcow2_write_meta(p->q, p->by, piece->offset, b, (size_t)(piece->bytes - b->data),
                                 piece->len);
        if (r < 0 && p->result == 0)
            p->result = r;
    }
}

static int co_fn write_all(struct picture *p)
{
    struct co_scope scope;

    co_scope_init(&scope);
    for (size_t i = 1; i < MIN((size_t)WRITERS, p->count); i++) {
        if (co_scope_start(&scope, write_pieces, p) < 0)
            break; /* fewer do it as well */
    }
    write_pieces(p);
    co_scope_join(&scope);
    return p->result;
}

/* Does something in the image's own file have to be durable first? What L2 entries point to in a data file is so already. */
static bool needs_sync(const struct picture *p)
{
    return p->count && (qcow2_has_data_file(p->q) ? p->tables_ordered : p->ordered);
}

static int co_fn write_picture(struct picture *p)
{
    int r = qcow2_sync_data(p->q, p->by); /* DATA-2 */

    if (r == 0 && needs_sync(p))
        r = qcow2_sync(p->q, p->by);
    if (r == 0)
        r = write_all(p);
    return r < 0 ? r : qcow2_sync(p->q, p->by);
}

/* FLUSH-4: from now on only readers remember these. */
static void let_go_locked(struct picture *p, uint64_t ticket)
{
    struct qcow2_run *run;

    list_for_each (&p->freed, run, link)
        run->ticket = ticket;
    list_splice(&p->q->alloc.graced, &p->freed);
}

static void end_picture(struct picture *p, int r)
{
    bool freed = !list_empty(&p->freed);
    uint64_t ticket = r == 0 && freed ? epoch_ticket(node_epoch(p->q->node)) : 0;

    tiny_lock_acquire(&p->q->lock);
    if (r < 0)
        put_back_locked(p);
    else
        let_go_locked(p, ticket);
    for (size_t i = 0; i < p->count; i++) {
        if (p->pieces[i].slice)
            p->pieces[i].slice->pins--;
    }
    p->q->flush.busy = false;
    tiny_lock_release(&p->q->lock);
}

static void release_picture(struct picture *p)
{
    struct picture_memory *m;

    while ((m = list_first(&p->memory, struct picture_memory, link))) {
        list_remove(&m->link);
        iobuf_unref(m->b);
        free(m);
    }
    free(p->pieces);
}

/* Under the lock of cycles. */
static int co_fn run_cycle(struct qcow2 *q, const struct request *by)
{
    struct picture p = {.q = q, .by = by};
    bool complete;
    size_t pieces;
    uint64_t number;
    int r;

    list_init(&p.memory);
    list_init(&p.freed);
    tiny_lock_acquire(&q->lock);
    pieces =
        count_locked(q) + 64; /* what else changes until it is taken may need another picture */
    tiny_lock_release(&q->lock);
    r = make_room(&p, pieces);
    if (r < 0) {
        release_picture(&p);
        return r;
    }
    p.filling = list_entry(p.memory.next, struct picture_memory, link);
    tiny_lock_acquire(&q->lock);
    number = ++q->flush.begun; /* FLUSH-5 */
    q->flush.busy = true;
    complete = take_all_locked(&p);
    if (complete)
        list_splice(&p.freed, &q->alloc.freed);
    tiny_lock_release(&q->lock);
    r = write_picture(&p);
    end_picture(&p, r);
    release_picture(&p);
    if (r == 0 && !complete)
        return -EAGAIN;
    if (r == 0)
        q->flush.done = number;
    return r;
}

static bool anything_locked(const struct qcow2 *q)
{
    return !list_empty(&q->map.dirty) || q->map.l1_any || !list_empty(&q->alloc.freed);
}

/* All that was mapped before is on the disk when this returns 0. */
static int co_fn write_back(struct qcow2 *q, const struct request *by, uint64_t wanted)
{
    int r = co_mutex_lock_until(&q->flush.lock, LOOP_FOREVER);

    if (r < 0)
        return r;
    r = -EAGAIN;
    while (r == -EAGAIN && q->flush.done < wanted)
        r = run_cycle(q, by);
    if (q->flush.done >= wanted)
        r = 0;
    co_mutex_unlock(&q->flush.lock);
    return r;
}

int qcow2_flush_mappings(struct qcow2 *q, const struct request *by)
{
    uint64_t wanted;
    bool any;

    if (unlikely(atomic_get(&q->needs_reopen) || atomic_get(&q->corrupt)))
        return -EIO; /* who opens the image next may find another size; CORRUPT-1 */
    tiny_lock_acquire(&q->lock);
    wanted = q->flush.begun + 1;
    /* A cycle that is under way has taken what was there, and it is not yet durable. */
    any = anything_locked(q) || q->flush.busy;
    tiny_lock_release(&q->lock);
    return any ? write_back(q, by, wanted) : qcow2_sync_edge(q, q->data, by);
}

int qcow2_co_flush(struct node *node, struct request *req)
{
    struct qcow2 *q = node_state(node);
    int r;

    edge_co_announce(q->file, EVENT_FLUSH_TO_OS, req);
    r = qcow2_flush_mappings(q, req);
    return r < 0 ? r : qcow2_alloc_settle(q, req);
}

void qcow2_flush_if_full(struct qcow2 *q, const struct request *by)
{
    uint64_t wanted;
    bool full;

    tiny_lock_acquire(&q->lock);
    wanted = q->flush.begun + 1;
    full = q->map.dirty_count > DIRTY_MAX ||
           q->map.dirty_count * qcow2_slice_bytes(q) > q->map.cache_max / DIRTY_SHARE;
    tiny_lock_release(&q->lock);
    if (full)
        (void)write_back(q, by, wanted); /* what is not written stays dirty */
}
