/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Host clusters: who has them, in memory and on disk.
 *
 * Writers take clusters from a pool. The pool is filled, under alloc.lock, from what was freed, from clusters that the refcounts
 * call free, and by letting the file grow.
 *
 * ALLOC-1 What is fresh was never used, reads as zeroes, and is counted durably, in batches: a crash leaks what is left (Q4).
 * ALLOC-2 What is to be reused has refcount 1 at least in the image's blocks, written before it is handed out. Mappings to it are
 *         written after a device flush that covers that (FLUSH-1).
 * ALLOC-3 What was freed keeps its refcount until no mapping on disk points to it and no request that found one is on its way
 *         (Q1). Then it is reused, or its refcount becomes 0.
 * ALLOC-4 A cluster of compressed bytes is counted once for each guest cluster that has bytes in it, before these are mapped.
 */
#include "base/alloc.h"
#include "base/checked.h"
#include "base/endian.h"
#include "base/macros.h"
#include "formats/qcow2/qcow2.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

/* The file grows by so much at a time: at first, and at most. */
#define BATCH_FIRST (1 * MIB)
#define BATCH_MAX   (64 * MIB)
/* What is kept for reuse rather than counted down: at most so many bytes. */
#define REUSE_MAX (64 * MIB)
/* Clusters in a row that compressed bytes are packed into. */
#define PACK_CLUSTERS 16
/* Blocks that are looked through for free clusters before the file grows. */
#define SCAN_BLOCKS 4

/* ---- the pool ---- */

static struct qcow2_run *run_new(uint64_t first, uint64_t count)
{
    struct qcow2_run *run = try_new(struct qcow2_run);

    if (!run)
        return NULL;
    run->first = first;
    run->count = count;
    list_init(&run->link);
    return run;
}

/* Appends, or lengthens the last one. */
static void run_append(struct list *l, struct qcow2_run *run)
{
    struct qcow2_run *last = list_last(l, struct qcow2_run, link);

    if (last && last->first + last->count == run->first && last->ticket == run->ticket &&
        last->shared == run->shared && last->table == run->table) {
        last->count += run->count;
        free(run);
    } else {
        list_append(l, &run->link);
    }
}

/* Those in the lists that hold them by length: how many of one list are looked at. */
#define LOOK_AT 4

static unsigned reuse_list_of(uint64_t count)
{
    return MIN(63u - (unsigned)__builtin_clzll(count), QCOW2_REUSE_LISTS - 1u);
}

static void reuse_add_locked(struct qcow2 *q, struct qcow2_run *run)
{
    unsigned i = reuse_list_of(run->count);

    q->alloc.reuse_count += run->count;
    q->alloc.reuse_lists |= (uint64_t)1 << i;
    list_append(&q->alloc.reuse[i], &run->link);
}

static void reuse_remove_locked(struct qcow2 *q, struct qcow2_run *run)
{
    unsigned i = reuse_list_of(run->count);

    q->alloc.reuse_count -= run->count;
    list_remove(&run->link);
    if (list_empty(&q->alloc.reuse[i]))
        q->alloc.reuse_lists &= ~((uint64_t)1 << i);
}

/* One that is long enough, among the first few of the list where shorter ones are, too, or in those of longer ones. */
static struct qcow2_run *find_reuse_locked(const struct qcow2 *q, uint64_t want)
{
    unsigned i = reuse_list_of(want);
    uint64_t longer = i + 1 < 64 ? q->alloc.reuse_lists >> (i + 1) << (i + 1) : 0;
    struct qcow2_run *run;
    unsigned looked = 0;

    list_for_each (&q->alloc.reuse[i], run, link) {
        if (run->count >= want)
            return run;
        if (++looked == LOOK_AT)
            break;
    }
    if (!longer)
        return NULL;
    return list_first(&q->alloc.reuse[__builtin_ctzll(longer)], struct qcow2_run, link);
}

/* Of the longest ones. */
static struct qcow2_run *find_any_reuse_locked(const struct qcow2 *q)
{
    uint64_t lists = q->alloc.reuse_lists;

    if (!lists)
        return NULL;
    return list_first(&q->alloc.reuse[63 - __builtin_clzll(lists)], struct qcow2_run, link);
}

static bool take_reuse_locked(struct qcow2 *q, uint64_t want, bool less, struct qcow2_extent *ret)
{
    struct qcow2_run *run = less ? find_any_reuse_locked(q) : find_reuse_locked(q, want);
    uint64_t n;

    if (!run)
        return false;
    n = MIN(want, run->count);
    *ret = (struct qcow2_extent){.host_offset = run->first << q->cluster_bits, .count = n};
    reuse_remove_locked(q, run);
    run->first += n;
    run->count -= n;
    if (run->count)
        reuse_add_locked(q, run);
    else
        free(run);
    return true;
}

static bool take_fresh_locked(struct qcow2 *q, uint64_t want, struct qcow2_extent *ret)
{
    uint64_t n = MIN(want, q->alloc.fresh_end - q->alloc.fresh);

    *ret = (struct qcow2_extent){
        .host_offset = q->alloc.fresh << q->cluster_bits, .count = n, .fresh = q->alloc.grows};
    q->alloc.fresh += n;
    return n;
}

static bool take_from_pool(struct qcow2 *q, uint64_t want, struct qcow2_extent *ret)
{
    bool got;

    tiny_lock_acquire(&q->lock);
    got = take_reuse_locked(q, want, false, ret) || take_fresh_locked(q, want, ret) ||
          take_reuse_locked(q, want, true, ret);
    tiny_lock_release(&q->lock);
    return got;
}

static bool pool_is_empty(struct qcow2 *q)
{
    bool empty;

    tiny_lock_acquire(&q->lock);
    empty = !q->alloc.reuse_count && q->alloc.fresh == q->alloc.fresh_end;
    tiny_lock_release(&q->lock);
    return empty;
}

static void reuse(struct qcow2 *q, struct qcow2_run *run)
{
    run->ticket = 0;
    tiny_lock_acquire(&q->lock);
    reuse_add_locked(q, run);
    tiny_lock_release(&q->lock);
}

/* ONLINE-1: something may have pointed there. G9: the host may still write there. */
static void reuse_or_withhold(struct qcow2 *q, struct qcow2_run *run)
{
    tiny_lock_acquire(&q->lock);
    run->late = node_has_unresolved(edge_node(q->file));
    run->table = q->alloc.online;
    if (q->alloc.online || run->late)
        list_prepend(&q->alloc.graced, &run->link);
    else
        reuse_add_locked(q, run);
    tiny_lock_release(&q->lock);
}

void qcow2_alloc_put(struct qcow2 *q, uint64_t host_offset, uint64_t count)
{
    struct qcow2_run *run = run_new(host_offset >> q->cluster_bits, count);

    if (run) /* else they leak, as after a crash */
        reuse_or_withhold(q, run);
}

void qcow2_free_locked(struct qcow2 *q, struct qcow2_run *run)
{
    if (q->alloc.online)
        q->alloc.online->withheld += run->count;
    run_append(&q->alloc.freed, run);
}

/* ---- what was freed ---- */

/* The first one that neither readers nor the host may use any more. Those that wait for readers are in the order of their tickets. */
static struct qcow2_run *find_graced_locked(struct qcow2 *q, uint64_t passed)
{
    bool hosts = node_has_unresolved(edge_node(q->file));
    struct qcow2_run *run;

    list_for_each (&q->alloc.graced, run, link) {
        if (run->ticket > passed)
            break;
        if (!run->late || !hosts)
            return run;
    }
    return NULL;
}

static struct qcow2_run *next_graced(struct qcow2 *q)
{
    uint64_t passed = epoch_passed(node_epoch(q->node));
    struct qcow2_run *run;

    tiny_lock_acquire(&q->lock);
    run = find_graced_locked(q, passed);
    if (run)
        list_remove(&run->link);
    tiny_lock_release(&q->lock);
    return run;
}

static void put_back_graced(struct qcow2 *q, struct qcow2_run *run)
{
    tiny_lock_acquire(&q->lock);
    list_prepend(&q->alloc.graced, &run->link);
    tiny_lock_release(&q->lock);
}

/* A request that has to be sent back, or whose waiter has left, leaves to others what it was about. */
static bool is_sent_back(int r)
{
    return r == -ECANCELED || r == -ERESTART || r == -ETIMEDOUT;
}

/* Is it free now, and known to be? 0: others may have it, and it leaks. */
static int co_fn look_at_freed(struct qcow2 *q, const struct request *by,
                               const struct qcow2_run *run)
{
    uint64_t least;
    uint64_t most;
    int r = qcow2_count_range(q, by, run->first, run->count, &least, &most);

    if (r < 0)
        return r;
    if (!least)
        return qcow2_corrupt(q, by, run->first << q->cluster_bits, run->count << q->cluster_bits,
                             "a cluster that was in use has refcount 0");
    if (most > 1) {
        (void)qcow2_damaged(q, "a cluster that was mapped once has another refcount");
        return 0;
    }
    r = qcow2_guard_free(q, by, run->first, run->count);
    return r < 0 ? r : 1;
}

void qcow2_alloc_put_table_locked(struct qcow2 *q, const struct request *by, uint64_t host_offset,
                                  uint64_t count)
{
    const struct qcow2_run run = {.first = host_offset >> q->cluster_bits, .count = count};

    if (count && look_at_freed(q, by, &run) == 1)
        qcow2_alloc_put(q, host_offset, count);
}

void qcow2_alloc_put_table(struct qcow2 *q, const struct request *by, uint64_t host_offset,
                           uint64_t count)
{
    if (co_mutex_lock_until(&q->alloc.lock, LOOP_FOREVER) < 0)
        return;
    qcow2_alloc_put_table_locked(q, by, host_offset, count);
    co_mutex_unlock(&q->alloc.lock);
}

static bool keeps_for_reuse(struct qcow2 *q, const struct qcow2_run *run)
{
    bool keep;

    tiny_lock_acquire(&q->lock);
    keep = q->alloc.reuse_count + run->count <= REUSE_MAX >> q->cluster_bits;
    tiny_lock_release(&q->lock);
    return keep;
}

/* ALLOC-3, under alloc.lock. */
static int co_fn settle_own(struct qcow2 *q, const struct request *by, struct qcow2_run *run)
{
    struct request discard = request_for(by, REQUEST_DISCARD, run->first << q->cluster_bits,
                                         run->count << q->cluster_bits);
    int r = look_at_freed(q, by, run);

    if (r == 1 && q->passes_discards) {
        int sent = edge_co_request(q->file, &discard);

        if (is_sent_back(sent))
            r = sent; /* another error does not matter */
    }
    if (r == 1 && keeps_for_reuse(q, run)) {
        reuse(q, run);
        return 0;
    }
    if (r == 1) {
        q->alloc.scan = MIN(q->alloc.scan, run->first);
        r = qcow2_count_none(q, by, run);
    }
    if (is_sent_back(r))
        put_back_graced(q, run);
    else
        free(run);
    return r;
}

/* What others may use as well. If its count becomes 0 the scan finds it. */
static int co_fn settle_shared(struct qcow2 *q, const struct request *by, struct qcow2_run *run)
{
    int r;

    q->alloc.scan = MIN(q->alloc.scan, run->first);
    r = qcow2_count_down(q, by, run);
    if (is_sent_back(r))
        put_back_graced(q, run);
    else
        free(run); /* after an error: a leak */
    return r;
}

static int co_fn settle_locked(struct qcow2 *q, const struct request *by)
{
    struct qcow2_run *run;
    int r = 0;

    if (qcow2_online_withholds(q)) /* ONLINE-1 */
        return 0;
    while (r == 0 && (run = next_graced(q))) {
        if (!qcow2_online_release(q, run))
            continue;
        r = run->shared ? settle_shared(q, by, run) : settle_own(q, by, run);
    }
    return r;
}

int qcow2_alloc_settle(struct qcow2 *q, const struct request *by)
{
    bool any;
    int r;

    tiny_lock_acquire(&q->lock);
    any = !list_empty(&q->alloc.graced);
    tiny_lock_release(&q->lock);
    if (!any)
        return 0;
    r = co_mutex_lock_until(&q->alloc.lock, LOOP_FOREVER);
    if (r < 0)
        return r;
    r = settle_locked(q, by);
    co_mutex_unlock(&q->alloc.lock);
    return r;
}

/* ---- clusters that the refcounts call free ---- */

/* Takes the first run of free clusters at or after alloc.scan in its block. */
static int co_fn scan_block(struct qcow2 *q, const struct request *by, struct qcow2_refblock *block)
{
    struct qcow2_alloc *a = &q->alloc;
    uint64_t entries = qcow2_block_entries(q);
    uint64_t base = block->index * entries;
    uint64_t end = MIN(entries, a->end - base);
    uint64_t first = a->scan - base;
    struct qcow2_run *run;
    uint64_t n = 0;
    int r;

    while (first < end && qcow2_count_get(q, block->bytes, first))
        first++;
    while (first + n < end && n < a->batch && !qcow2_count_get(q, block->bytes, first + n))
        n++;
    a->scan = base + first + n;
    if (first == end)
        a->scan = base + entries;
    if (!n)
        return 0;
    r = qcow2_guard_free(q, by, base + first, n);
    if (r < 0)
        return r;
    run = run_new(base + first, n);
    r = run ? qcow2_recount(q, by, base + first, n, 0, 1) : -ENOMEM;
    if (r < 0) {
        free(run); /* a leak, if some of it was written */
        return r;
    }
    qcow2_online_counted(q, base + first, n);
    reuse(q, run);
    return 0;
}

static int co_fn scan(struct qcow2 *q, const struct request *by)
{
    struct qcow2_alloc *a = &q->alloc;
    int r = 0;

    for (unsigned i = 0; r == 0 && i < SCAN_BLOCKS && a->scan < a->end; i++) {
        uint64_t index = a->scan / qcow2_block_entries(q);
        struct qcow2_refblock *block;

        if (index >= a->table_size || !a->table[index]) {
            a->scan = (index + 1) * qcow2_block_entries(q); /* no refcounts: left alone */
            continue;
        }
        r = qcow2_block_get(q, by, index, &block);
        if (r == 0)
            r = scan_block(q, by, block);
        if (r == 0 && !pool_is_empty(q))
            break;
    }
    return r;
}

/* ---- for writers ---- */

/* The next batch is twice as large. */
static int co_fn grow_pool(struct qcow2 *q, const struct request *by)
{
    struct qcow2_extent got;
    int r = qcow2_grow(q, by, q->alloc.batch, 1, &got);

    if (r < 0)
        return r;
    q->alloc.batch = MAX(MIN(q->alloc.batch * 2, BATCH_MAX >> q->cluster_bits), (uint64_t)1);
    tiny_lock_acquire(&q->lock);
    q->alloc.fresh = got.host_offset >> q->cluster_bits; /* the last one was used up */
    q->alloc.fresh_end = q->alloc.fresh + got.count;
    tiny_lock_release(&q->lock);
    return 0;
}

/* Where the file cannot grow: all that is free is wanted. */
static int co_fn scan_all(struct qcow2 *q, const struct request *by)
{
    int r;

    do
        r = scan(q, by);
    while (r == 0 && pool_is_empty(q) && q->alloc.scan < q->alloc.end);
    return r;
}

/* Is anything freed that disk or readers may still remember, or is being written so? */
static bool any_freed(struct qcow2 *q)
{
    bool any;

    tiny_lock_acquire(&q->lock);
    any = !list_empty(&q->alloc.freed) || !list_empty(&q->alloc.graced) || q->flush.busy;
    tiny_lock_release(&q->lock);
    return any;
}

/* Where nothing else is free: what was freed since the last flush is made so. */
static int co_fn settle_now(struct qcow2 *q, const struct request *by)
{
    int r = qcow2_flush_mappings(q, by);

    if (r == 0)
        r = epoch_co_pass(node_epoch(q->node));
    return r < 0 ? r : settle_locked(q, by);
}

/* Where the file cannot grow, for the reason `full`. */
static int co_fn refill_full(struct qcow2 *q, const struct request *by, int full)
{
    int r = scan_all(q, by);

    if (r == 0 && pool_is_empty(q))
        qcow2_online_need(q); /* ONLINE-2 */
    if (r == 0 && pool_is_empty(q) && any_freed(q)) {
        r = settle_now(q, by);
        if (r == 0 && pool_is_empty(q))
            r = scan_all(q, by); /* what was shared, or more than is kept */
    }
    if (r == 0 && pool_is_empty(q) && qcow2_online_give_up(q))
        r = settle_locked(q, by);
    return r == 0 && pool_is_empty(q) ? full : r;
}

static int co_fn refill(struct qcow2 *q, const struct request *by)
{
    int r = 0;

    if (pool_is_empty(q))
        r = settle_locked(q, by);
    if (r == 0 && pool_is_empty(q))
        r = scan(q, by);
    if (r == 0 && pool_is_empty(q))
        r = grow_pool(q, by);
    return r == -ENOSPC || r == -EFBIG ? refill_full(q, by, r) : r;
}

int qcow2_alloc_get(struct qcow2 *q, const struct request *by, uint64_t want,
                    struct qcow2_extent *ret)
{
    int r = 0;

    edge_co_announce(q->file, EVENT_CLUSTER_ALLOC, by);
    while (r == 0 && !take_from_pool(q, want, ret)) {
        r = co_mutex_lock_until(&q->alloc.lock, LOOP_FOREVER);
        if (r < 0)
            break;
        r = refill(q, by);
        co_mutex_unlock(&q->alloc.lock);
    }
    return r;
}

/* ---- compressed bytes ---- */

void qcow2_alloc_drop_pack(struct qcow2 *q)
{
    uint64_t first = align_up(q->alloc.pack, qcow2_cluster_size(q));

    if (first < q->alloc.pack_end)
        qcow2_alloc_put(q, first, (q->alloc.pack_end - first) >> q->cluster_bits);
    q->alloc.pack = 0;
    q->alloc.pack_end = 0;
}

/* Other clusters in a row to pack into. Under alloc.lock. */
static int co_fn new_pack(struct qcow2 *q, const struct request *by)
{
    struct qcow2_extent got;
    int r = 0;

    qcow2_alloc_drop_pack(q);
    while (r == 0 && !take_from_pool(q, PACK_CLUSTERS, &got))
        r = refill(q, by);
    if (r < 0)
        return r;
    q->alloc.pack = got.host_offset;
    q->alloc.pack_end = got.host_offset + (got.count << q->cluster_bits);
    return 0;
}

/* ALLOC-4: the cluster in which the bytes begin has others in it, and is counted once more for these. */
static int co_fn pack_into(struct qcow2 *q, const struct request *by, size_t len,
                           uint64_t *ret_host)
{
    struct qcow2_alloc *a = &q->alloc;
    int r = 0;

    if (!is_aligned(a->pack, qcow2_cluster_size(q)) && a->pack + len <= a->pack_end) {
        r = qcow2_count_up(q, by, a->pack >> q->cluster_bits);
        if (r == 1)
            a->pack = align_up(a->pack, qcow2_cluster_size(q));
    }
    if (r >= 0 && a->pack + len > a->pack_end)
        r = new_pack(q, by);
    if (r < 0)
        return r;
    *ret_host = a->pack;
    a->pack += len;
    return 0;
}

int qcow2_alloc_packed(struct qcow2 *q, const struct request *by, size_t len, uint64_t *ret_host)
{
    int r;

    edge_co_announce(q->file, EVENT_CLUSTER_ALLOC_BYTES, by);
    r = co_mutex_lock_until(&q->alloc.lock, LOOP_FOREVER);
    if (r < 0)
        return r;
    r = pack_into(q, by, len, ret_host);
    co_mutex_unlock(&q->alloc.lock);
    return r;
}

int qcow2_alloc_get_row(struct qcow2 *q, const struct request *by, uint64_t count,
                        struct qcow2_extent *ret)
{
    int r = co_mutex_lock_until(&q->alloc.lock, LOOP_FOREVER);

    if (r < 0)
        return r;
    r = qcow2_grow(q, by, count, count, ret);
    co_mutex_unlock(&q->alloc.lock);
    return r;
}

/* ---- opening and closing ---- */

/* Of a file that does not grow: behind the last cluster that is counted. */
static int co_fn find_end(struct qcow2 *q, const struct request *by)
{
    uint64_t entries = qcow2_block_entries(q);

    for (uint64_t i = q->alloc.table_size; i-- > 0;) {
        struct qcow2_refblock *block;
        int r;

        if (!q->alloc.table[i])
            continue;
        r = qcow2_block_get(q, by, i, &block);
        if (r < 0)
            return r;
        for (uint64_t k = entries; k-- > 0;) {
            if (qcow2_count_get(q, block->bytes, k)) {
                q->alloc.end = i * entries + k + 1;
                return 0;
            }
        }
    }
    return 0;
}

void qcow2_alloc_clear(struct qcow2 *q)
{
    co_mutex_init(&q->alloc.lock);
    list_init(&q->alloc.blocks);
    for (unsigned i = 0; i < QCOW2_REUSE_LISTS; i++)
        list_init(&q->alloc.reuse[i]);
    list_init(&q->alloc.freed);
    list_init(&q->alloc.graced);
}

int qcow2_alloc_init(struct qcow2 *q, const struct request *by, uint64_t table_offset,
                     uint32_t table_clusters, struct error **err)
{
    struct qcow2_alloc *a = &q->alloc;
    uint64_t size = node_size(edge_node(q->file));
    int r;

    a->table_offset = table_offset;
    a->table_size = (uint32_t)(((uint64_t)table_clusters << q->cluster_bits) / QCOW2_ENTRY_LEN);
    a->table = try_new_n(uint64_t, a->table_size);
    a->grows = node_grows(edge_node(q->file));
    a->end = align_up(size, qcow2_cluster_size(q)) >> q->cluster_bits;
    a->batch = MAX(BATCH_FIRST >> q->cluster_bits, (uint64_t)4);
    r = a->table ? qcow2_read_refcount_table(q, by) : -ENOMEM;
    if (r == 0 && !a->grows)
        r = find_end(q, by);
    return r < 0 ? error_set(err, -r, "node '%s': cannot read the refcounts: %s",
                             node_name(q->node), strerror(-r))
                 : 0;
}

static int compare_runs(const void *a, const void *b)
{
    const struct qcow2_run *const *x = a;
    const struct qcow2_run *const *y = b;

    return ((*x)->first < (*y)->first) - ((*x)->first > (*y)->first);
}

/* Where the file may end, without what is free at its end. Without memory it stays as long. */
static uint64_t end_in_use(const struct qcow2 *q)
{
    const struct qcow2_alloc *a = &q->alloc;
    uint64_t end = a->fresh_end == a->end ? a->fresh : a->end;
    const struct qcow2_run **v;
    const struct qcow2_run *run;
    size_t n = 0;

    for (unsigned i = 0; i < QCOW2_REUSE_LISTS; i++) {
        list_for_each (&a->reuse[i], run, link)
            n++;
    }
    v = try_new_n(const struct qcow2_run *, n + 1);
    if (!v)
        return end;
    n = 0;
    for (unsigned i = 0; i < QCOW2_REUSE_LISTS; i++) {
        list_for_each (&a->reuse[i], run, link)
            v[n++] = run;
    }
    qsort(v, n, sizeof(*v), compare_runs);
    for (size_t i = 0; i < n && v[i]->first + v[i]->count == end; i++)
        end = v[i]->first;
    free(v);
    return end;
}

static int co_fn count_pool_none(struct qcow2 *q, const struct request *by)
{
    struct qcow2_alloc *a = &q->alloc;
    struct qcow2_run *run;
    int r = 0;

    if (a->fresh < a->fresh_end)
        r = qcow2_recount(q, by, a->fresh, a->fresh_end - a->fresh, 1, 0);
    for (unsigned i = 0; i < QCOW2_REUSE_LISTS; i++) {
        list_for_each (&a->reuse[i], run, link) {
            if (r == 0)
                r = qcow2_recount(q, by, run->first, run->count, 1, 0);
        }
    }
    return r;
}

/* What nobody uses any more is counted so; the end of the file, too, is given back. */
int qcow2_alloc_settle_all(struct qcow2 *q, const struct request *by)
{
    struct request shrink;
    uint64_t end;
    int r = epoch_co_pass(node_epoch(q->node));

    qcow2_alloc_drop_pack(q);
    if (r == 0)
        r = settle_locked(q, by);
    if (r == 0)
        r = count_pool_none(q, by);
    if (r == 0)
        r = qcow2_grow_settle(q, by);
    if (r == 0)
        r = qcow2_sync(q, by);
    if (r < 0 || !q->alloc.grows)
        return r;
    end = end_in_use(q);
    if (end == q->alloc.end && end >= q->alloc.tried_end)
        return 0;
    shrink = request_for(by, REQUEST_RESIZE, end << q->cluster_bits, 0);
    return edge_co_request(q->file, &shrink);
}

static void free_runs(struct list *l)
{
    struct qcow2_run *run;

    while (l->next && (run = list_first(l, struct qcow2_run, link))) {
        list_remove(&run->link);
        free(run);
    }
}

void qcow2_alloc_release(struct qcow2 *q)
{
    struct qcow2_alloc *a = &q->alloc;
    struct qcow2_refblock *block;

    while (a->blocks.next && (block = list_first(&a->blocks, struct qcow2_refblock, link))) {
        list_remove(&block->link);
        free(block);
    }
    for (unsigned i = 0; i < QCOW2_REUSE_LISTS; i++)
        free_runs(&a->reuse[i]);
    free_runs(&a->freed);
    free_runs(&a->graced);
    free(a->table);
}

int qcow2_alloc_reopen(struct qcow2 *q, const struct request *by, uint64_t table_offset,
                       uint32_t table_clusters, struct error **err)
{
    int r;

    qcow2_alloc_release(q);
    q->alloc = (struct qcow2_alloc){.grows = false};
    qcow2_alloc_clear(q);
    r = qcow2_alloc_init(q, by, table_offset, table_clusters, err);
    if (r < 0)
        q->alloc.table_size = 0; /* nothing of it can be relied on */
    return r;
}
