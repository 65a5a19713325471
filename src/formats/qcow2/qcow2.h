/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The qcow2 driver, for src/formats/qcow2 alone. docs/formats/qcow2.md says in which order things reach the disk, and why.
 *
 *   qcow2.c           opening and closing
 *   qcow2-map.c       where guest clusters lie: L1, cached slices of L2 tables, co_map
 *   qcow2-subcluster.c   extended L2 entries
 *   qcow2-write.c     requests that write data: in place, copy-on-write
 *   qcow2-clear.c     zeroes and discard
 *   qcow2-alloc.c     host clusters: the pool that writers take from, what is freed
 *   qcow2-grow.c      how the file grows
 *   qcow2-data.c      external data files
 *   qcow2-preallocate.c   mapping what nobody has written to yet
 *   qcow2-refcount.c  refcounts on disk
 *   qcow2-flush.c     how changed mappings reach the disk
 *   qcow2-resize.c    the virtual size
 *   qcow2-crypt.c     encryption of guest data
 *   qcow2-guard.c     where metadata lies, so that nothing else is written there
 *   qcow2-corrupt.c   what happens when damage is found
 *   qcow2-bitmap*.c   dirty bitmaps that the image stores
 *   qcow2-online.c    what the allocator does while the image is checked
 *   qcow2-snapshot*.c internal snapshots, while nobody else is here
 *   qcow2-amend.c     version, width of refcounts and the like, as above
 *   qcow2-header.c, qcow2-create.c, qcow2-format.h   the header, empty images, what is on disk
 *
 * Lock order: a range of `ranges`, map.create, map.load, alloc.lock, flush.lock, guard.lock, then `lock`, which is never held
 * across a wait.
 */
#ifndef CAIRN_FORMATS_QCOW2_H
#define CAIRN_FORMATS_QCOW2_H

#include "base/context.h"
#include "base/list.h"
#include "formats/qcow2/qcow2-crypt.h"
#include "formats/qcow2/qcow2-format.h"
#include "formats/qcow2/qcow2-guard.h"
#include "formats/qcow2/qcow2-online.h"
#include "graph/driver.h"
#include "graph/epoch.h"
#include "graph/overlap.h"
#include "loop/lock.h"

#include <stdbool.h>
#include <stdint.h>

/* What is cached of an L2 table: all of it, or so many bytes. */
#define QCOW2_SLICE_BYTES_MAX (64 * KIB)
/* The unit in which changed mappings are written; a slice of fewer bytes is one unit. */
#define QCOW2_CHUNK_BYTES 4096

#define QCOW2_LOAD_LOCKS 16

/* A part of an L2 table, in memory. */
struct qcow2_slice {
    uint64_t index; /* constant: guest offset >> (cluster bits + slice bits) */

    /* Protected by qcow2.lock. */
    unsigned pins;      /* who will change entries, or writes them to the disk */
    uint32_t dirty;     /* chunks that differ from the disk */
    bool ordered;       /* some of that points to data that must be durable first */
    struct list link;   /* in map.clean, map.dirty or map.limbo */
    uint64_t ticket;    /* in limbo: freed when this grace has passed */
    uint64_t entries[]; /* atomic, changed under qcow2.lock; in the host's byte order */
};

struct qcow2_map {
    /* Constant while requests run. */
    uint64_t *l1; /* atomic entries, changed under qcow2.lock; in the host's byte order */
    uint32_t l1_size;
    uint64_t l1_offset;
    /* Atomic; set and cleared under qcow2.lock; readers are inside the node's epoch. */
    struct qcow2_slice **slices;
    /* Atomic hints: used since the last look of the one who evicts. Apart from the slices, since many fit into a cache line. */
    bool *used;
    uint64_t slice_count;
    uint64_t cache_max; /* bytes of slices */

    struct co_mutex load[QCOW2_LOAD_LOCKS]; /* one loader per slice, by index */
    struct co_mutex create;                 /* one maker of L2 tables */

    /* Protected by qcow2.lock. */
    struct list clean; /* struct qcow2_slice: the next one to look at for eviction is first */
    struct list dirty;
    struct list limbo; /* evicted; readers may still look at them */
    uint64_t cached;   /* bytes, without limbo */
    unsigned dirty_count;
    uint64_t *l1_dirty; /* a bit for each QCOW2_L1_UNIT of the table */
    bool l1_any;
    bool l1_ordered;
};

/* L1 entries are written so many bytes at a time. */
#define QCOW2_L1_UNIT 512

/* By their length; the last list has all that are longer. */
#define QCOW2_REUSE_LISTS 32

/* Clusters of the image file that follow each other. */
struct qcow2_run {
    struct list link;
    uint64_t first; /* number of a host cluster */
    uint64_t count;
    uint64_t ticket; /* of those that wait for their readers (Q1) */
    bool
        shared; /* of freed ones: others may use them as well; they are counted down, and no more */
    bool late;  /* of freed ones: the host may still write there for somebody who has left (G9) */
    bool table; /* of freed ones: it may have been one, of metadata (ONLINE-1) */
};

struct qcow2_refblock {
    struct list link; /* in alloc.blocks, the one that was not used for longest first */
    uint64_t index;   /* in the refcount table */
    uint8_t bytes[];  /* a cluster, as on disk */
};

struct qcow2_alloc {
    struct co_mutex lock;
    /* Protected by the lock above. */
    uint64_t *table; /* the refcount table: host offsets */
    uint32_t table_size;
    uint64_t table_offset;
    struct list blocks; /* struct qcow2_refblock, cached */
    unsigned block_count;
    uint64_t end;       /* clusters from this one on were never used */
    uint64_t tried_end; /* to here the disk may count some that were to be made ready, in vain */
    uint64_t scan;      /* those before this one are not free, or known */
    uint64_t batch;     /* how many clusters are made ready next time */
    bool grows;         /* the file does, with zeroes */

    /* Protected by the lock above: compressed bytes go to [pack, pack_end) of the file, whose clusters are counted once. */
    uint64_t pack;
    uint64_t pack_end;

    /* Protected by qcow2.lock: the pool (ALLOC-1, ALLOC-2). */
    uint64_t fresh;     /* never used, durably counted, reads as zeroes: from here... */
    uint64_t fresh_end; /* ...to here */
    /* struct qcow2_run: whatever is in them; those of 2^i clusters, and less than twice as many, are in list i. */
    struct list reuse[QCOW2_REUSE_LISTS];
    uint64_t reuse_lists; /* a bit for each that is not empty */
    uint64_t reuse_count; /* clusters */
    struct list freed;    /* struct qcow2_run: in no mapping; the disk may still say so */
    struct list graced;   /* neither on disk; readers may still use them */

    struct qcow2_online *online; /* Protected by both: a check is under way; or NULL */
};

struct qcow2_flush {
    struct co_mutex lock; /* one cycle at a time */
    uint64_t done;        /* Protected by the lock above: the last that succeeded */

    /* Protected by qcow2.lock. */
    uint64_t begun; /* cycles so far */
    bool busy;      /* one has taken its picture, which is not durable yet */
};

struct qcow2_bitmaps;

struct qcow2 {
    /* Set in open, then constant. */
    struct node *node;
    struct edge *file; /* metadata, and data if there is no other child for it */
    struct edge *data;
    bool data_raw; /* the data file holds what the disk shows (DATA-3) */
    unsigned version;
    unsigned cluster_bits;
    unsigned unit_bits;  /* a unit is what is mapped by itself: a cluster, or a subcluster */
    bool extended;       /* L2 entries have two words */
    unsigned l2_bits;    /* of the number of entries of an L2 table */
    unsigned slice_bits; /* of the number of entries of a slice */
    unsigned refcount_order;
    unsigned compression_type; /* enum qcow2_compression */
    bool names_backing;        /* the image does, whatever was opened as one */
    bool writable;
    bool bad_snapshots;        /* their table cannot be used, and is left alone */
    bool keeps_discarded;      /* clusters that are discarded keep their place */
    bool passes_discards;      /* space that is freed is given back to the host */
    struct qcow2_crypt *crypt; /* NULL: guest data lies there as it is */

    bool sync_failed;  /* atomic: what was not durable then may be gone (FLUSH-6) */
    bool broken_told;  /* atomic: damage has been told */
    bool corrupt;      /* atomic: no request succeeds any more (CORRUPT-1) */
    bool marked;       /* atomic: the image says so, or is being told to */
    bool needs_reopen; /* atomic; D3: the header may say otherwise than we do: no more metadata */
    bool closing;      /* set when nothing is in flight any more: what it does is watched (G7) */

    /* Protected by lock. */
    struct qcow2_plain *plain; /* what was decompressed last (COMPRESS-1) */
    uint64_t plain_turn;
    struct qcow2_coder *coders; /* that no thread uses now */
    uint64_t
        left_in_place;    /* times that a mapping left a place that stays its cluster's (WRITE-3) */
    uint64_t left_passed; /* readers from before so many of them are gone */

    struct overlap ranges; /* guest ranges whose mappings change (Q2) */
    struct tiny_lock lock;
    struct qcow2_map map;
    struct qcow2_alloc alloc;
    struct qcow2_flush flush;
    struct qcow2_guard guard;
    struct qcow2_bitmaps *bitmaps; /* qcow2-bitmap.h: what the image stores of dirty bitmaps */
};

static inline bool qcow2_has_data_file(const struct qcow2 *q)
{
    return q->data != q->file;
}

static inline uint64_t qcow2_cluster_size(const struct qcow2 *q)
{
    return (uint64_t)1 << q->cluster_bits;
}

static inline uint64_t qcow2_unit_size(const struct qcow2 *q)
{
    return (uint64_t)1 << q->unit_bits;
}

/* Of a unit of the disk, by number. */
static inline unsigned qcow2_unit_in_cluster(const struct qcow2 *q, uint64_t unit)
{
    return (unsigned)(unit & (((uint64_t)1 << (q->cluster_bits - q->unit_bits)) - 1));
}

/* ---- qcow2.c: metadata in the file, in the name of a request; all through pool memory, so that waiters may leave (G8) ---- */

int co_fn qcow2_read_meta(struct qcow2 *q, const struct request *by, uint64_t offset,
                          struct iobuf *b, size_t at, size_t len);
int co_fn qcow2_write_meta(struct qcow2 *q, const struct request *by, uint64_t offset,
                           struct iobuf *b, size_t at, size_t len);
int co_fn qcow2_sync(struct qcow2 *q, const struct request *by);
/* The same of any child. */
int co_fn qcow2_sync_edge(struct qcow2 *q, struct edge *e, const struct request *by);
/* The mark of a corrupt image, 8 bytes; the only write then. */
int co_fn qcow2_write_mark(struct qcow2 *q, const struct request *by, struct iobuf *b);
/* Does a table or cluster that something points to lie in the file, at a cluster's boundary? */
bool qcow2_is_cluster(const struct qcow2 *q, uint64_t host_offset);

/* ---- qcow2-corrupt.c ---- */

/* What is found makes no sense. -EIO, and it is told, once for each node. */
int qcow2_damaged(struct qcow2 *q, const char *fmt, ...) PRINTF_LIKE(2, 3);
/* What was to be written would have made it worse, at bytes of the file: marks the image. -EIO, from now on for all requests. */
int co_fn qcow2_corrupt(struct qcow2 *q, const struct request *by, uint64_t offset, uint64_t bytes,
                        const char *fmt, ...) PRINTF_LIKE(5, 6);
/* The mark of an image that has been found corrupt, if it is not there. */
void co_fn qcow2_mark_if_corrupt(struct qcow2 *q, const struct request *by);

/* ---- qcow2-map.c ---- */

int co_fn qcow2_map_init(struct qcow2 *q, const struct request *by, uint32_t l1_size,
                         uint64_t l1_offset, uint64_t cache_max, struct error **err);
void qcow2_map_release(struct qcow2 *q);
/* Nobody is inside the epoch, and nothing is dirty: all that was cached of the tables is forgotten. */
void qcow2_map_forget(struct qcow2 *q);

/* What is in memory of an L1 table of some size, with nothing in it. */
struct qcow2_room {
    uint64_t *l1;
    uint64_t *l1_dirty;
    struct qcow2_slice **slices;
    bool *used;
};

/* False without memory; qcow2_room_release() ends it in either case. */
bool qcow2_room_make(const struct qcow2 *q, struct qcow2_room *room, uint64_t entries);
void qcow2_room_release(struct qcow2_room *room);
/* Where nobody else is: it becomes the map's, and holds afterwards what the map had. */
void qcow2_room_use(struct qcow2 *q, struct qcow2_room *room, uint64_t entries, uint64_t l1_offset);

int co_fn qcow2_co_map(struct node *node, const struct request *req, uint64_t offset, uint64_t len,
                       struct mapping *ret);

/*
 * What co_map says. For writing: only what may be written to in place is data. Inside the node's epoch.
 */
int co_fn qcow2_map_run(struct qcow2 *q, const struct request *req, uint64_t offset, uint64_t len,
                        bool for_writing, struct mapping *ret);
/* The first guest cluster in [first, end) that has an L2 table; `end` if there is none. */
uint64_t qcow2_next_mapped(const struct qcow2 *q, uint64_t first, uint64_t end);

enum qcow2_entry_kind {
    QCOW2_ENTRY_BELOW,
    QCOW2_ENTRY_ZERO,
    QCOW2_ENTRY_DATA,
    QCOW2_ENTRY_COMPRESSED,
};

/* An L2 entry. Those of extended ones have bits for their subclusters: below those that hold data, above those that read as zeroes. */
struct qcow2_l2 {
    uint64_t entry;
    uint64_t bits;
};

#define QCOW2_SUBCLUSTERS 32
#define QCOW2_ALL_DATA    UINT64_C(0x00000000ffffffff)
#define QCOW2_ALL_ZERO    UINT64_C(0xffffffff00000000)

/* No host cluster: in a data file there is one at 0. */
#define QCOW2_NOWHERE UINT64_MAX

/*
 * What the L2 entry of a guest cluster says of one of its units. `ret_host`: the cluster, or QCOW2_NOWHERE (of data there is one;
 * compressed ones have none). -EIO for one that is damaged.
 */
int qcow2_entry_kind(struct qcow2 *q, uint64_t guest_cluster, struct qcow2_l2 e, unsigned unit,
                     enum qcow2_entry_kind *ret, uint64_t *ret_host);

/* In a data file the first cluster lies at 0, and its flag says that it is there. */
static inline bool qcow2_has_place(const struct qcow2 *q, uint64_t entry)
{
    return entry & QCOW2_L2_OFFSET_MASK || (qcow2_has_data_file(q) && entry & QCOW2_COPIED);
}

/* Can a guest cluster lie there? */
static inline bool qcow2_can_lie(const struct qcow2 *q, uint64_t guest_cluster, uint64_t host)
{
    if (unlikely(qcow2_has_data_file(q)))
        return host == guest_cluster << q->cluster_bits;
    return qcow2_is_cluster(q, host);
}

/*
 * The slice that a guest cluster is in, pinned, so that it stays. *ret is NULL if there is no L2 table; with `create` one is made
 * then. The caller holds the range.
 */
int co_fn qcow2_slice_pin(struct qcow2 *q, const struct request *by, uint64_t guest_cluster,
                          bool create, struct qcow2_slice **ret);
void qcow2_slice_unpin(struct qcow2 *q, struct qcow2_slice *s);

static inline uint64_t qcow2_slice_entries(const struct qcow2 *q)
{
    return (uint64_t)1 << q->slice_bits;
}

/* By guest cluster, of a pinned slice or inside the epoch. */
struct qcow2_l2 qcow2_entry(struct qcow2 *q, const struct qcow2_slice *s, uint64_t guest_cluster);
/* Under qcow2.lock. */
struct qcow2_l2 qcow2_entry_locked(const struct qcow2 *q, const struct qcow2_slice *s,
                                   uint64_t guest_cluster);
/* The same. `ordered`: what it points to must be durable before it is. */
void qcow2_entry_set_locked(struct qcow2 *q, struct qcow2_slice *s, uint64_t guest_cluster,
                            struct qcow2_l2 becomes, bool ordered);
/* Where a slice lies in the file; 0 if there is no L2 table. */
uint64_t qcow2_slice_offset(const struct qcow2 *q, uint64_t slice_index);
size_t qcow2_slice_bytes(const struct qcow2 *q);

/* ---- qcow2-subcluster.c: only where entries are extended ---- */

struct qcow2_l2 qcow2_entry_extended(struct qcow2 *q, const struct qcow2_slice *s,
                                     uint64_t guest_cluster);
/* The bits of compressed entries as they are in memory, and on disk (WRITE-5). */
void qcow2_bits_load(struct qcow2_slice *s, size_t words);
void qcow2_bits_store(uint8_t *bytes, size_t len);
/* Under qcow2.lock. */
void qcow2_entry_publish(uint64_t *words, struct qcow2_l2 becomes);
int qcow2_entry_kind_extended(struct qcow2 *q, uint64_t guest_cluster, struct qcow2_l2 e,
                              unsigned unit, enum qcow2_entry_kind *ret, uint64_t *ret_host);
/* How many units from this one on, which is of this kind, are alike. */
unsigned qcow2_unit_run(uint64_t bits, enum qcow2_entry_kind kind, unsigned unit);
/* As qcow2_map_run(), of what the slice covers. */
int qcow2_map_extended(struct qcow2 *q, const struct qcow2_slice *s, uint64_t offset, uint64_t len,
                       bool for_writing, struct mapping *ret);

/* ---- qcow2-compress.c ---- */

struct qcow2_plain;
struct qcow2_coder;

int co_fn qcow2_write_compressed(struct qcow2 *q, struct request *req);
/* An L2 entry, or, of an encrypted image, where data lies. */
int co_fn qcow2_co_read_encoded(struct node *node, struct request *req, uint64_t entry);
/* Where the bytes of a compressed cluster lie, to the end of their last sector. */
void qcow2_compressed_place(const struct qcow2 *q, uint64_t entry, uint64_t *ret_offset,
                            uint64_t *ret_len);
/* Under qcow2.lock: compressed bytes are being freed. */
void qcow2_plain_forget_locked(struct qcow2 *q);
void qcow2_coders_release(struct qcow2 *q);

/* ---- qcow2-refcount.c, all under alloc.lock ---- */

static inline uint64_t qcow2_block_entries(const struct qcow2 *q)
{
    return (qcow2_cluster_size(q) * 8) >> q->refcount_order;
}

/* Entry i of a block. */
uint64_t qcow2_count_get(const struct qcow2 *q, const uint8_t *bytes, uint64_t i);
void qcow2_count_set(const struct qcow2 *q, uint8_t *bytes, uint64_t i, uint64_t value);
/* An empty one; NULL without memory. */
struct qcow2_refblock *qcow2_block_new(struct qcow2 *q, uint64_t index);
/* From now on it is the cache's. */
void qcow2_block_cache(struct qcow2 *q, struct qcow2_refblock *block);
/* One that the table points to. It stays until the next call. */
int co_fn qcow2_block_get(struct qcow2 *q, const struct request *by, uint64_t index,
                          struct qcow2_refblock **ret);
/* Writes the part of a block, which lies at `offset`, that these entries are in. */
int co_fn qcow2_block_write(struct qcow2 *q, const struct request *by, uint64_t offset,
                            const struct qcow2_refblock *block, uint64_t first, uint64_t count);
/* The counts of clusters that have blocks, from `was` to `becomes`; what is otherwise is left, and told. */
int co_fn qcow2_recount(struct qcow2 *q, const struct request *by, uint64_t first, uint64_t count,
                        unsigned was, unsigned becomes);
/* One more for one cluster. 1: its count is as large as it can be. */
int co_fn qcow2_count_up(struct qcow2 *q, const struct request *by, uint64_t cluster);
/* One less for each; or from 1 to 0. The run becomes what is left to do when it fails. */
int co_fn qcow2_count_down(struct qcow2 *q, const struct request *by, struct qcow2_run *run);
int co_fn qcow2_count_none(struct qcow2 *q, const struct request *by, struct qcow2_run *run);
int co_fn qcow2_read_refcount_table(struct qcow2 *q, const struct request *by);
/* The lowest and the highest count of these. */
int co_fn qcow2_count_range(struct qcow2 *q, const struct request *by, uint64_t first,
                            uint64_t count, uint64_t *ret_least, uint64_t *ret_most);
/* How often a cluster is used, as the disk says. Takes alloc.lock. */
int co_fn qcow2_refcount(struct qcow2 *q, const struct request *by, uint64_t host_offset,
                         uint64_t *ret);

/* Clusters that follow each other, with refcount 1. */
struct qcow2_extent {
    uint64_t host_offset;
    uint64_t count;
    bool fresh; /* reads as zeroes, and the refcounts are durable */
};

/* ---- qcow2-grow.c ---- */

/*
 * Makes `wanted` clusters at the end of the file ready, or fewer, but not less than `least`. Under alloc.lock.
 */
int co_fn qcow2_grow(struct qcow2 *q, const struct request *by, uint64_t wanted, uint64_t least,
                     struct qcow2_extent *ret);
/* At the end, when the pool is empty: the disk counts nothing behind what is in use. */
int co_fn qcow2_grow_settle(struct qcow2 *q, const struct request *by);

/* ---- qcow2-alloc.c ---- */

/* Of zeroes. */
void qcow2_alloc_clear(struct qcow2 *q);
int co_fn qcow2_alloc_init(struct qcow2 *q, const struct request *by, uint64_t table_offset,
                           uint32_t table_clusters, struct error **err);
/* The same where nobody else is, after the refcounts have moved; the pool is forgotten, and counted no more. */
int co_fn qcow2_alloc_reopen(struct qcow2 *q, const struct request *by, uint64_t table_offset,
                             uint32_t table_clusters, struct error **err);
/* For closing: what was made ready and not used is given back on disk. */
int co_fn qcow2_alloc_settle_all(struct qcow2 *q, const struct request *by);
void qcow2_alloc_release(struct qcow2 *q);

/* At least one cluster, at most `want`. -ENOSPC, -EFBIG, ... */
int co_fn qcow2_alloc_get(struct qcow2 *q, const struct request *by, uint64_t want,
                          struct qcow2_extent *ret);
/* All of them, in a row. */
int co_fn qcow2_alloc_get_row(struct qcow2 *q, const struct request *by, uint64_t count,
                              struct qcow2_extent *ret);
/* So many bytes within clusters that others may share; less than a cluster. Counted before it returns. */
int co_fn qcow2_alloc_packed(struct qcow2 *q, const struct request *by, size_t len,
                             uint64_t *ret_host);
/* Those that come next begin in another cluster. Under alloc.lock, or where nothing else is in flight. */
void qcow2_alloc_drop_pack(struct qcow2 *q);
/* Back to the pool: what nothing ever pointed to. */
void qcow2_alloc_put(struct qcow2 *q, uint64_t host_offset, uint64_t count);
/* What was a table until now: after a look whether it is anything else, too. If it is, or after an error, it leaks. */
void co_fn qcow2_alloc_put_table(struct qcow2 *q, const struct request *by, uint64_t host_offset,
                                 uint64_t count);
/* The same under alloc.lock. */
void co_fn qcow2_alloc_put_table_locked(struct qcow2 *q, const struct request *by,
                                        uint64_t host_offset, uint64_t count);
/* Under qcow2.lock: what mappings in memory do not point to any more. */
void qcow2_free_locked(struct qcow2 *q, struct qcow2_run *run);
/* Takes up what can be taken up of that. */
int co_fn qcow2_alloc_settle(struct qcow2 *q, const struct request *by);

/* ---- qcow2-flush.c ---- */

/* The guest's flush: all that was written and mapped before it is durable. */
int co_fn qcow2_co_flush(struct node *node, struct request *req);
/* The same for a writer that finds much to be written; his own answer does not depend on it. */
void co_fn qcow2_flush_if_full(struct qcow2 *q, const struct request *by);
/* What qcow2_co_flush() does, but that what was freed is not taken up: also under alloc.lock. */
int co_fn qcow2_flush_mappings(struct qcow2 *q, const struct request *by);

/* ---- qcow2-write.c ---- */

int co_fn qcow2_co_write(struct node *node, struct request *req);
/* Of whole units, or into fresh space; -EOPNOTSUPP else. */
int co_fn qcow2_co_copy_in(struct node *node, struct request *req);

/*
 * A place for guest clusters that have none, in the image or in the data file; the caller holds their range. At most `count` of them.
 */
int co_fn qcow2_place_get(struct qcow2 *q, const struct request *by, uint64_t guest_cluster,
                          uint64_t count, struct qcow2_extent *ret);
/* Nothing ever pointed there. */
void qcow2_place_put(struct qcow2 *q, const struct qcow2_extent *at);
/* Bytes [from, to) of a request, as they are. */
int co_fn qcow2_write_plain(struct qcow2 *q, const struct request *req, uint64_t from, uint64_t to);
/* The range is held, the slice pinned: from now on the guest cluster is this, and what it had is freed. */
int qcow2_replace(struct qcow2 *q, struct qcow2_slice *s, uint64_t cluster,
                  struct qcow2_l2 becomes);
/* The host clusters that an entry uses, to be freed when it is gone: NULL if there are none, or they are in a data file. */
int qcow2_run_of(const struct qcow2 *q, uint64_t entry, enum qcow2_entry_kind kind, uint64_t host,
                 struct qcow2_run **ret);

/* ---- qcow2-clear.c ---- */

int co_fn qcow2_co_write_zeroes(struct node *node, struct request *req);
int co_fn qcow2_co_discard(struct node *node, struct request *req);

enum qcow2_clearing {
    QCOW2_DISCARD,    /* space is given back */
    QCOW2_ZERO,       /* reads as zeroes; space is kept */
    QCOW2_ZERO_UNMAP, /* reads as zeroes; space is given back */
    QCOW2_FORGET,     /* out of sight: as discard, whatever clusters keep then */
};

/* Units of the disk, by number. Not for version 2 what that cannot say. */
int co_fn qcow2_clear(struct qcow2 *q, const struct request *req, uint64_t first, uint64_t end,
                      enum qcow2_clearing how);
/* Zeroes into a part of a cluster: written, unless they are there already. */
int co_fn qcow2_zero_part(struct qcow2 *q, const struct request *req, uint64_t offset,
                          uint64_t len);

/* ---- qcow2-snapshot.c ---- */

struct qcow2_snapshot_ref; /* generated */

/* While the image opens, for reading: the map, which is empty yet, and the size become the snapshot's. -ENOENT, -EIO, ... */
int co_fn qcow2_snapshot_show(struct qcow2 *q, const struct request *by,
                              const struct qcow2_snapshot_ref *which, struct error **err);

/* ---- qcow2-data.c: where there is no data file, fit, grow, shrink and sync do nothing ---- */

#define QCOW2_DATA_CHILD "data-file"

struct qcow2_header;

/* Finds the data file, or opens what the image names. */
int co_fn control_fn qcow2_data_open(struct qcow2 *q, const struct qcow2_header *header,
                                     struct error **err);
/* For `size` bytes at least. -ENOSPC where it does not grow. */
int co_fn qcow2_data_fit(struct qcow2 *q, const struct request *by, uint64_t size);
/* With the disk, which grows. */
int co_fn qcow2_data_grow(struct qcow2 *q, const struct request *by, uint64_t from, uint64_t to);
void co_fn qcow2_data_shrink(struct qcow2 *q, const struct request *by, uint64_t size);
/* What the guest wrote is durable, if it is not in the image's own file. */
int co_fn qcow2_sync_data(struct qcow2 *q, const struct request *by);
/* Where guest data lay: given back to the host, if discards are passed on. Nobody else may come to use it meanwhile. */
int co_fn qcow2_data_discard(struct qcow2 *q, const struct request *by, uint64_t host_offset,
                             uint64_t len);
/* With raw data: zeroes and discards, which change no mapping. */
int co_fn qcow2_data_pass_on(struct qcow2 *q, const struct request *req);

/* ---- qcow2-preallocate.c ---- */

/* As qcow2_co_preallocate(), but for the flush. */
int co_fn qcow2_map_ahead(struct qcow2 *q, const struct request *by, uint64_t from, uint64_t to);

/* ---- qcow2-resize.c ---- */

int co_fn qcow2_co_resize(struct node *node, struct request *req);

#endif
