/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Where guest clusters lie. L1 is in memory; L2 tables are cached in slices, each behind a pointer that readers follow without
 * a lock, inside the node's epoch: a slice that is evicted is freed when they have left.
 */
#include "base/alloc.h"
#include "base/atomic.h"
#include "base/checked.h"
#include "base/endian.h"
#include "base/log.h"
#include "base/macros.h"
#include "formats/qcow2/qcow2.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

size_t qcow2_slice_bytes(const struct qcow2 *q)
{
    return (size_t)QCOW2_ENTRY_LEN << (q->slice_bits + q->extended);
}

static size_t slice_memory(const struct qcow2 *q)
{
    return sizeof(struct qcow2_slice) + qcow2_slice_bytes(q);
}

static uint32_t l1_index(const struct qcow2 *q, uint64_t slice_index)
{
    return (uint32_t)(slice_index >> (q->l2_bits - q->slice_bits));
}

static uint64_t l1_get(const struct qcow2 *q, uint64_t slice_index)
{
    /* Acquire: pairs with l1_set(); what the table holds was written before. */
    return atomic_get_acquire(&q->map.l1[l1_index(q, slice_index)]) & QCOW2_L1_OFFSET_MASK;
}

uint64_t qcow2_slice_offset(const struct qcow2 *q, uint64_t slice_index)
{
    uint64_t table = l1_get(q, slice_index);
    uint64_t in_table = slice_index & (((uint64_t)1 << (q->l2_bits - q->slice_bits)) - 1);

    return table ? table + in_table * qcow2_slice_bytes(q) : 0;
}

static int co_fn read_l1(struct qcow2 *q, const struct request *by)
{
    uint64_t bytes = (uint64_t)q->map.l1_size * QCOW2_ENTRY_LEN;
    struct iobuf *b = iobuf_new((size_t)MAX(bytes, (uint64_t)QCOW2_L1_UNIT));
    int r = b ? 0 : -ENOMEM;

    if (r == 0 && bytes)
        r = qcow2_read_meta(q, by, q->map.l1_offset, b, 0, (size_t)bytes);
    for (uint32_t i = 0; r == 0 && i < q->map.l1_size; i++)
        q->map.l1[i] = load_be64(b->data + (size_t)i * QCOW2_ENTRY_LEN);
    iobuf_unref(b);
    return r;
}

bool qcow2_room_make(const struct qcow2 *q, struct qcow2_room *room, uint64_t entries)
{
    size_t slices = (size_t)(entries << (q->l2_bits - q->slice_bits)) + 1;
    size_t units = (size_t)entries / (QCOW2_L1_UNIT / QCOW2_ENTRY_LEN) + 1;

    room->l1 = try_new_n(uint64_t, (size_t)entries + 1); /* a disk of no bytes has none */
    room->l1_dirty = try_new_n(uint64_t, units / 64 + 1);
    room->slices = try_new_n(struct qcow2_slice *, slices);
    room->used = try_new_n(bool, slices);
    return room->l1 && room->l1_dirty && room->slices && room->used;
}

void qcow2_room_release(struct qcow2_room *room)
{
    free(room->l1);
    free(room->l1_dirty);
    free(room->slices);
    free(room->used);
}

void qcow2_room_use(struct qcow2 *q, struct qcow2_room *room, uint64_t entries, uint64_t l1_offset)
{
    struct qcow2_map *map = &q->map;
    struct qcow2_room old = {map->l1, map->l1_dirty, map->slices, map->used};

    map->l1 = room->l1;
    map->l1_dirty = room->l1_dirty;
    map->slices = room->slices;
    map->used = room->used;
    map->l1_size = (uint32_t)entries;
    map->l1_offset = l1_offset;
    map->slice_count = entries << (q->l2_bits - q->slice_bits);
    qcow2_guard_set_single(q, QCOW2_SINGLE_ACTIVE_L1, l1_offset, entries * QCOW2_ENTRY_LEN);
    *room = old;
}

int qcow2_map_init(struct qcow2 *q, const struct request *by, uint32_t l1_size, uint64_t l1_offset,
                   uint64_t cache_max, struct error **err)
{
    struct qcow2_map *map = &q->map;
    struct qcow2_room room;
    int r;

    map->cache_max = cache_max;
    list_init(&map->clean);
    list_init(&map->dirty);
    list_init(&map->limbo);
    co_mutex_init(&map->create);
    for (size_t i = 0; i < QCOW2_LOAD_LOCKS; i++)
        co_mutex_init(&map->load[i]);
    if (!qcow2_room_make(q, &room, l1_size)) {
        qcow2_room_release(&room);
        return error_set(err, ENOMEM, "node '%s': no memory for an L1 table of %" PRIu32 " entries",
                         node_name(q->node), l1_size);
    }
    qcow2_room_use(q, &room, l1_size, l1_offset);
    r = read_l1(q, by);
    return r < 0 ? error_set(err, -r, "node '%s': cannot read the L1 table: %s", node_name(q->node),
                             strerror(-r))
                 : 0;
}

static void free_slices(struct list *l)
{
    struct qcow2_slice *s;
    struct qcow2_slice *tmp;

    if (!l->next)
        return; /* never opened */
    list_for_each_safe (l, s, tmp, link) {
        list_remove(&s->link);
        free(s);
    }
}

void qcow2_map_forget(struct qcow2 *q)
{
    struct qcow2_map *map = &q->map;

    for (uint64_t i = 0; i < map->slice_count; i++)
        atomic_set(&map->slices[i], NULL);
    free_slices(&map->clean);
    free_slices(&map->limbo);
    map->cached = 0;
    tiny_lock_acquire(&q->lock);
    qcow2_plain_forget_locked(q);
    tiny_lock_release(&q->lock);
}

void qcow2_map_release(struct qcow2 *q)
{
    struct qcow2_room room = {q->map.l1, q->map.l1_dirty, q->map.slices, q->map.used};

    free_slices(&q->map.clean);
    free_slices(&q->map.dirty);
    free_slices(&q->map.limbo);
    qcow2_room_release(&room);
}

/* ---- the cache ---- */

static struct co_mutex *load_lock(struct qcow2 *q, uint64_t slice_index)
{
    return &q->map.load[slice_index % QCOW2_LOAD_LOCKS];
}

static struct qcow2_slice *slice_find(const struct qcow2 *q, uint64_t slice_index)
{
    /* Acquire: pairs with slice_publish(). */
    return atomic_get_acquire(&q->map.slices[slice_index]);
}

static void touch(const struct qcow2 *q, uint64_t slice_index)
{
    /* Relaxed: a hint. It is read first, so that readers do not write the same line all the time. */
    if (!atomic_get_relaxed(&q->map.used[slice_index]))
        atomic_set_relaxed(&q->map.used[slice_index], true);
}

/* Those in limbo whose readers have left, and slices out of use until a share of the cache is free again. */
static unsigned evict_locked(struct qcow2 *q, uint64_t passed, struct list *ret_out,
                             struct list *ret_free)
{
    struct qcow2_map *map = &q->map;
    uint64_t goal = map->cache_max - map->cache_max / 16;
    struct qcow2_slice *s;
    struct qcow2_slice *tmp;
    unsigned out = 0;

    list_for_each_safe (&map->limbo, s, tmp, link) {
        if (s->ticket > passed)
            break; /* in order of their tickets */
        list_remove(&s->link);
        list_append(ret_free, &s->link);
    }
    if (map->cached <= map->cache_max)
        return 0;
    for (struct list *end = map->clean.prev; map->cached > goal && !list_empty(&map->clean);) {
        s = list_first(&map->clean, struct qcow2_slice, link);
        tmp = s;
        list_remove(&s->link);
        if (s->pins || atomic_get_relaxed(&map->used[s->index])) { /* a hint */
            atomic_set_relaxed(&map->used[s->index], false);
            list_append(&map->clean, &s->link);
        } else {
            atomic_set(&map->slices[s->index], NULL);
            map->cached -= qcow2_slice_bytes(q);
            list_append(ret_out, &s->link);
            out++;
        }
        if (&tmp->link == end)
            break; /* each was looked at once */
    }
    return out;
}

static void evict(struct qcow2 *q)
{
    struct list out;
    struct list gone;
    uint64_t passed = epoch_passed(node_epoch(q->node));
    uint64_t ticket;
    unsigned n;

    list_init(&out);
    list_init(&gone);
    tiny_lock_acquire(&q->lock);
    n = evict_locked(q, passed, &out, &gone);
    tiny_lock_release(&q->lock);
    free_slices(&gone);
    if (!n)
        return;
    ticket = epoch_ticket(node_epoch(q->node));
    tiny_lock_acquire(&q->lock);
    while (!list_empty(&out)) {
        struct qcow2_slice *s = list_first(&out, struct qcow2_slice, link);

        list_remove(&s->link);
        s->ticket = ticket;
        list_append(&q->map.limbo, &s->link);
    }
    tiny_lock_release(&q->lock);
}

static void slice_publish(struct qcow2 *q, struct qcow2_slice *s)
{
    tiny_lock_acquire(&q->lock);
    list_append(&q->map.clean, &s->link);
    q->map.cached += qcow2_slice_bytes(q);
    atomic_set(&q->map.slices[s->index], s);
    tiny_lock_release(&q->lock);
}

/* Reads a slice from the disk; *ret is NULL if there is no table. Under its load lock. */
static int co_fn slice_read(struct qcow2 *q, const struct request *by, uint64_t slice_index,
                            struct qcow2_slice **ret)
{
    uint64_t table = l1_get(q, slice_index);
    size_t bytes = qcow2_slice_bytes(q);
    struct qcow2_slice *s;
    struct iobuf *b;
    int r;

    *ret = NULL;
    if (!table)
        return 0;
    if (!qcow2_is_cluster(q, table))
        return qcow2_damaged(q, "L1 entry %" PRIu32 " points to %" PRIu64 ", where no table can be",
                             l1_index(q, slice_index), table);
    b = iobuf_new(bytes);
    s = try_alloc(1, slice_memory(q));
    r = b && s ? 0 : -ENOMEM;
    if (r == 0) {
        edge_co_announce(q->file, EVENT_L2_LOAD, by);
        r = qcow2_read_meta(q, by, qcow2_slice_offset(q, slice_index), b, 0, bytes);
    }
    if (r == 0) {
        s->index = slice_index;
        touch(q, slice_index); /* whoever wants to pin it finds it, even if all others are dirty */
        for (size_t i = 0; i < bytes / QCOW2_ENTRY_LEN; i++)
            s->entries[i] = load_be64(b->data + i * QCOW2_ENTRY_LEN);
        if (q->extended)
            qcow2_bits_load(s, bytes / QCOW2_ENTRY_LEN);
        list_init(&s->link);
        slice_publish(q, s);
        *ret = take(&s);
    }
    free(s);
    iobuf_unref(b);
    return r;
}

/* The slice as readers may use it, who are inside the epoch. */
static int co_fn slice_get(struct qcow2 *q, const struct request *by, uint64_t slice_index,
                           struct qcow2_slice **ret)
{
    int r;

    *ret = slice_find(q, slice_index);
    if (likely(*ret)) {
        touch(q, slice_index);
        return 0;
    }
    if (!l1_get(q, slice_index))
        return 0;
    r = co_mutex_lock_until(load_lock(q, slice_index), LOOP_FOREVER);
    if (r < 0)
        return r;
    *ret = slice_find(q, slice_index);
    if (!*ret)
        r = slice_read(q, by, slice_index, ret);
    co_mutex_unlock(load_lock(q, slice_index));
    evict(q);
    return r;
}

/* ---- what entries say ---- */

/* Of ordinary ones. */
static uint64_t entry_word(const struct qcow2 *q, const struct qcow2_slice *s,
                           uint64_t guest_cluster)
{
    /* Acquire: pairs with qcow2_entry_set_locked(); the data was written before. */
    return atomic_get_acquire(&s->entries[guest_cluster & (qcow2_slice_entries(q) - 1)]);
}

struct qcow2_l2 qcow2_entry(struct qcow2 *q, const struct qcow2_slice *s, uint64_t guest_cluster)
{
    if (q->extended)
        return qcow2_entry_extended(q, s, guest_cluster);
    return (struct qcow2_l2){.entry = entry_word(q, s, guest_cluster)};
}

struct qcow2_l2 qcow2_entry_locked(const struct qcow2 *q, const struct qcow2_slice *s,
                                   uint64_t guest_cluster)
{
    uint64_t index = guest_cluster & (qcow2_slice_entries(q) - 1);
    struct qcow2_l2 e = {.bits = 0};

    /* Relaxed: they change under the lock that we hold. */
    e.entry = atomic_get_relaxed(&s->entries[index << q->extended]);
    if (q->extended)
        e.bits = atomic_get_relaxed(&s->entries[(index << 1) + 1]);
    return e;
}

static int word_kind(struct qcow2 *q, uint64_t guest_cluster, uint64_t entry,
                     enum qcow2_entry_kind *ret, uint64_t *ret_host)
{
    uint64_t reserved = QCOW2_L2_RESERVED_MASK | (q->version < 3 ? QCOW2_L2_ZERO : 0);

    *ret_host = QCOW2_NOWHERE;
    if (likely((entry & ~QCOW2_L2_OFFSET_MASK) == QCOW2_COPIED && qcow2_has_place(q, entry))) {
        *ret = QCOW2_ENTRY_DATA;
    } else if (entry & QCOW2_L2_COMPRESSED) {
        *ret = QCOW2_ENTRY_COMPRESSED;
        if (qcow2_has_data_file(q))
            return qcow2_damaged(q, "it has compressed clusters beside an external data file");
        return 0;
    } else if (entry & reserved) {
        return qcow2_damaged(q, "an L2 entry has reserved bits set: %#" PRIx64, entry);
    } else if (entry & QCOW2_L2_ZERO) {
        *ret = QCOW2_ENTRY_ZERO;
    } else {
        *ret = qcow2_has_place(q, entry) ? QCOW2_ENTRY_DATA : QCOW2_ENTRY_BELOW;
    }
    if (!qcow2_has_place(q, entry))
        return 0;
    *ret_host = entry & QCOW2_L2_OFFSET_MASK;
    if (unlikely(!qcow2_can_lie(q, guest_cluster, *ret_host)))
        return qcow2_damaged(q,
                             "the L2 entry of guest cluster %" PRIu64 " points to %" PRIu64
                             ", where it cannot be",
                             guest_cluster, *ret_host);
    return 0;
}

int qcow2_entry_kind(struct qcow2 *q, uint64_t guest_cluster, struct qcow2_l2 e, unsigned unit,
                     enum qcow2_entry_kind *ret, uint64_t *ret_host)
{
    return q->extended ? qcow2_entry_kind_extended(q, guest_cluster, e, unit, ret, ret_host)
                       : word_kind(q, guest_cluster, e.entry, ret, ret_host);
}

/* Does the next cluster continue what the mapping says? */
static bool continues(struct qcow2 *q, const struct mapping *m, uint64_t guest_cluster,
                      uint64_t entry, bool for_writing)
{
    uint64_t copied = for_writing ? QCOW2_COPIED : entry & QCOW2_COPIED;
    enum qcow2_entry_kind kind = QCOW2_ENTRY_BELOW;
    uint64_t host;

    switch (m->kind) {
    case MAPPING_DATA:
        return entry == (((m->host_offset + m->len) | copied)) && /* no other bit is set */
               qcow2_can_lie(q, guest_cluster, entry & QCOW2_L2_OFFSET_MASK);
    case MAPPING_ZERO:
        return word_kind(q, guest_cluster, entry, &kind, &host) == 0 && kind == QCOW2_ENTRY_ZERO &&
               host == (m->host ? m->host_offset + m->len : QCOW2_NOWHERE);
    case MAPPING_BELOW:
        return !entry;
    case MAPPING_ENCODED:
        break;
    }
    return false;
}

/* There is no L2 table: nor for what follows, up to the next one. */
static uint64_t length_without_table(const struct qcow2 *q, uint64_t offset, uint64_t len)
{
    unsigned covered_bits = q->cluster_bits + q->l2_bits;
    uint64_t index = offset >> covered_bits;

    do {
        index++;
    } while (index << covered_bits < offset + len && index < q->map.l1_size &&
             !(atomic_get_acquire(&q->map.l1[index]) & QCOW2_L1_OFFSET_MASK)); /* as l1_get() */
    return MIN(len, (index << covered_bits) - offset);
}

static enum mapping_kind mapping_of(enum qcow2_entry_kind kind)
{
    static const enum mapping_kind kinds[] = {
        [QCOW2_ENTRY_BELOW] = MAPPING_BELOW,
        [QCOW2_ENTRY_ZERO] = MAPPING_ZERO,
        [QCOW2_ENTRY_DATA] = MAPPING_DATA,
        [QCOW2_ENTRY_COMPRESSED] = MAPPING_ENCODED,
    };

    return kinds[kind];
}

static int map_entry(struct qcow2 *q, uint64_t guest_cluster, uint64_t entry, uint64_t in_cluster,
                     struct mapping *ret)
{
    enum qcow2_entry_kind kind = QCOW2_ENTRY_BELOW;
    uint64_t host;
    int r = word_kind(q, guest_cluster, entry, &kind, &host);

    ret->kind = mapping_of(kind);
    ret->host = host != QCOW2_NOWHERE ? q->data : NULL;
    ret->host_offset = kind == QCOW2_ENTRY_COMPRESSED ? entry : host + in_cluster;
    ret->len = qcow2_cluster_size(q) - in_cluster;
    return r;
}

static uint32_t chunk_of(const struct qcow2 *q, uint64_t guest_cluster)
{
    uint64_t in_slice = guest_cluster & (qcow2_slice_entries(q) - 1);

    return (uint32_t)1 << ((in_slice * QCOW2_ENTRY_LEN << q->extended) / QCOW2_CHUNK_BYTES);
}

/* FLUSH-6 */
static bool may_be_lost(struct qcow2 *q, const struct qcow2_slice *s, uint64_t guest_cluster)
{
    bool may;

    tiny_lock_acquire(&q->lock);
    may = s->ordered && s->dirty & chunk_of(q, guest_cluster);
    tiny_lock_release(&q->lock);
    return may;
}

int qcow2_map_run(struct qcow2 *q, const struct request *req, uint64_t offset, uint64_t len,
                  bool for_writing, struct mapping *ret)
{
    uint64_t cluster = offset >> q->cluster_bits;
    uint64_t slice_end = (cluster | (qcow2_slice_entries(q) - 1)) + 1;
    uint64_t cluster_end = (cluster + 1) << q->cluster_bits;
    struct qcow2_slice *s;
    uint64_t entry;
    bool unsure;
    int r = unlikely(atomic_get(&q->corrupt)) ? -EIO : 0; /* CORRUPT-1 */

    if (r == 0)
        r = slice_get(q, req, cluster >> q->slice_bits, &s);
    if (unlikely(r < 0))
        return r;
    if (!s) {
        *ret = (struct mapping){.kind = MAPPING_BELOW, .len = length_without_table(q, offset, len)};
        return 0;
    }
    unsure = atomic_get(&q->sync_failed);
    if (unlikely(unsure) && may_be_lost(q, s, cluster))
        return -EIO;
    if (q->extended)
        return qcow2_map_extended(q, s, offset, unsure ? MIN(len, cluster_end - offset) : len,
                                  for_writing, ret);
    entry = entry_word(q, s, cluster);
    r = map_entry(q, cluster, entry, offset & (qcow2_cluster_size(q) - 1), ret);
    if (for_writing && !(entry & QCOW2_COPIED))
        ret->kind = MAPPING_BELOW;
    while (r == 0 && !unsure && ret->len < len && ++cluster < slice_end &&
           continues(q, ret, cluster, entry_word(q, s, cluster), for_writing))
        ret->len += qcow2_cluster_size(q);
    ret->len = MIN(ret->len, len);
    return r;
}

int qcow2_co_map(struct node *node, const struct request *req, uint64_t offset, uint64_t len,
                 struct mapping *ret)
{
    struct qcow2 *q = node_state(node);
    int r = qcow2_map_run(q, req, offset, len, false, ret);

    if (unlikely(q->crypt)) {
        ret->host = NULL;
        if (ret->kind == MAPPING_DATA)
            ret->kind =
                MAPPING_ENCODED; /* below bit 56, where compressed clusters have theirs set */
    }
    return r;
}

uint64_t qcow2_next_mapped(const struct qcow2 *q, uint64_t first, uint64_t end)
{
    uint64_t per_table = (uint64_t)1 << q->l2_bits;

    while (first < end && !l1_get(q, first >> q->slice_bits))
        first = (first | (per_table - 1)) + 1;
    return MIN(first, end);
}

/* ---- changing them ---- */

void qcow2_slice_unpin(struct qcow2 *q, struct qcow2_slice *s)
{
    tiny_lock_acquire(&q->lock);
    s->pins--;
    tiny_lock_release(&q->lock);
}

static struct qcow2_slice *pin_if_there(struct qcow2 *q, uint64_t slice_index)
{
    struct qcow2_slice *s;

    tiny_lock_acquire(&q->lock);
    s = slice_find(q, slice_index);
    if (s)
        s->pins++;
    tiny_lock_release(&q->lock);
    return s;
}

static void l1_set(struct qcow2 *q, uint32_t index, uint64_t table, bool ordered)
{
    uint32_t unit = index / (QCOW2_L1_UNIT / QCOW2_ENTRY_LEN);

    tiny_lock_acquire(&q->lock);
    atomic_set(&q->map.l1[index], table | QCOW2_COPIED);
    q->map.l1_dirty[unit / 64] |= (uint64_t)1 << unit % 64;
    q->map.l1_any = true;
    q->map.l1_ordered |= ordered;
    tiny_lock_release(&q->lock);
}

static int co_fn zero_table(struct qcow2 *q, const struct request *by, uint64_t offset)
{
    struct request zero = request_for(by, REQUEST_WRITE_ZEROES, offset, qcow2_cluster_size(q));

    return edge_co_request(q->file, &zero);
}

/* A table of unallocated clusters. Fresh space is one already. */
static int co_fn make_table(struct qcow2 *q, const struct request *by, uint64_t slice_index)
{
    struct qcow2_extent at;
    int r = qcow2_alloc_get(q, by, 1, &at);

    if (r < 0)
        return r;
    edge_co_announce(q->file, EVENT_L2_ALLOC_WRITE, by);
    if (!at.fresh)
        r = zero_table(q, by, at.host_offset);
    if (r == 0)
        r = qcow2_guard_add(q, QCOW2_GUARD_ACTIVE_L2, at.host_offset); /* GUARD-2 */
    if (r < 0) {
        qcow2_alloc_put(q, at.host_offset, 1);
        return r;
    }
    l1_set(q, l1_index(q, slice_index), at.host_offset, !at.fresh);
    return 0;
}

static int co_fn copy_table(struct qcow2 *q, const struct request *by, uint64_t from, uint64_t to)
{
    size_t bytes = (size_t)qcow2_cluster_size(q);
    struct iobuf *b = iobuf_new(bytes);
    int r = b ? 0 : -ENOMEM;

    if (r == 0) {
        edge_co_announce(q->file, EVENT_L2_ALLOC_COW_READ, by);
        r = qcow2_read_meta(q, by, from, b, 0, bytes);
    }
    if (r == 0) {
        edge_co_announce(q->file, EVENT_L2_ALLOC_WRITE, by);
        r = qcow2_write_meta(q, by, to, b, 0, bytes);
    }
    iobuf_unref(b);
    return r;
}

/*
 * A table that a snapshot uses, too, is never changed: it is what the disk holds of it, and so are its cached slices. The copy
 * has the same entries, and their clusters are counted for both already.
 */
static int co_fn unshare_table(struct qcow2 *q, const struct request *by, uint64_t slice_index)
{
    uint64_t old = l1_get(q, slice_index);
    struct qcow2_run *run = try_new(struct qcow2_run);
    struct qcow2_extent at;
    int r = run ? qcow2_alloc_get(q, by, 1, &at) : -ENOMEM;

    if (r < 0) {
        free(run);
        return r;
    }
    r = copy_table(q, by, old, at.host_offset);
    if (r == 0)
        r = qcow2_guard_add(q, QCOW2_GUARD_ACTIVE_L2, at.host_offset); /* GUARD-2 */
    if (r < 0) {
        free(run);
        qcow2_alloc_put(q, at.host_offset, 1);
        return r;
    }
    *run = (struct qcow2_run){
        .first = old >> q->cluster_bits, .count = 1, .shared = true, .table = true};
    list_init(&run->link);
    l1_set(q, l1_index(q, slice_index), at.host_offset, true);
    qcow2_guard_remove(q, QCOW2_GUARD_ACTIVE_L2, old);
    tiny_lock_acquire(&q->lock);
    qcow2_free_locked(q, run);
    tiny_lock_release(&q->lock);
    return 0;
}

/* Is there a table that entries may be changed in? */
static bool has_own_table(const struct qcow2 *q, uint64_t slice_index)
{
    /* Acquire: as l1_get(). */
    uint64_t entry = atomic_get_acquire(&q->map.l1[l1_index(q, slice_index)]);

    return (entry & QCOW2_L1_OFFSET_MASK) && (entry & QCOW2_COPIED);
}

/* With `create` there is one afterwards; in any case it is ours alone if there is one. */
static int co_fn need_table(struct qcow2 *q, const struct request *by, uint64_t slice_index,
                            bool create)
{
    int r;

    if (has_own_table(q, slice_index) || (!create && !l1_get(q, slice_index)))
        return 0;
    r = co_mutex_lock_until(&q->map.create, LOOP_FOREVER);
    if (r < 0)
        return r;
    if (!l1_get(q, slice_index))
        r = make_table(q, by, slice_index);
    else if (!has_own_table(q, slice_index))
        r = unshare_table(q, by, slice_index);
    co_mutex_unlock(&q->map.create);
    return r;
}

int qcow2_slice_pin(struct qcow2 *q, const struct request *by, uint64_t guest_cluster, bool create,
                    struct qcow2_slice **ret)
{
    uint64_t index = guest_cluster >> q->slice_bits;
    int r = unlikely(atomic_get(&q->corrupt)) ? -EIO : 0; /* CORRUPT-1 */

    if (r == 0)
        r = need_table(q, by, index, create);
    *ret = NULL;
    while (r == 0 && !*ret) {
        struct epoch_slot *slot = epoch_slot_here(node_epoch(q->node));
        struct qcow2_slice *s;
        unsigned phase;

        if (!slot)
            return -ENOMEM;
        phase = epoch_enter(slot);
        r = slice_get(q, by, index, &s);
        epoch_leave(slot, phase);
        if (r < 0 || !s)
            return r;
        *ret = pin_if_there(q, index); /* or it was evicted meanwhile */
    }
    return r;
}

void qcow2_entry_set_locked(struct qcow2 *q, struct qcow2_slice *s, uint64_t guest_cluster,
                            struct qcow2_l2 becomes, bool ordered)
{
    uint64_t index = guest_cluster & (qcow2_slice_entries(q) - 1);

    if (q->extended)
        qcow2_entry_publish(&s->entries[2 * index], becomes);
    else
        atomic_set_release(&s->entries[index], becomes.entry); /* pairs with entry_word() */
    if (!s->dirty) {
        list_remove(&s->link);
        list_append(&q->map.dirty, &s->link);
        q->map.dirty_count++;
    }
    s->dirty |= chunk_of(q, guest_cluster);
    s->ordered |= ordered;
}
