/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Internal snapshots: made, applied, deleted, of an image that nobody else uses; and shown, of one that is only read.
 *
 * All of it works on the tables as they are on disk: what is in memory was flushed before, and is forgotten. References are counted
 * in memory first, so that what cannot be done is refused before anything is written.
 *
 * SNAP-1 Everything that a request changed is on the disk before the first write, and cached mappings are forgotten.
 * SNAP-2 COPIED flags are cleared, durably, before refcounts rise: a flag that is missing costs a copy, one too many costs data.
 * SNAP-3 Refcounts are raised, and new tables written, durably, before the header points to what needs them.
 * SNAP-4 The header changes in one write within one sector: from one sound image to another.
 * SNAP-5 Refcounts fall after the header has changed durably; flags are set after that is durable.
 * SNAP-6 An entry of the table is kept byte by byte, also what we do not know of it.
 */
#include "base/alloc.h"
#include "base/atomic.h"
#include "base/checked.h"
#include "base/endian.h"
#include "base/log.h"
#include "base/macros.h"
#include "formats/qcow2/qcow2-header.h"
#include "formats/qcow2/qcow2-snapshot-internal.h"
#include "graph/backend.h"
#include "graph/gate.h"
#include "graph/tracker.h"
#include "qcow2-options.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#define ID_LEN_MAX 20 /* of a number */
#define READ_AHEAD ((size_t)64 << 10)
#define MEMORY_MAX (4 * GIB) /* for counting */

extern const struct driver qcow2_driver;

/* ---- the snapshot table ---- */

/* At least `len` bytes of the table are in memory. */
static int co_fn need_table(struct snap *s, size_t len)
{
    uint64_t size = node_size(edge_node(s->q->file));
    uint64_t left = size - MIN(size, s->table_offset);
    uint8_t *bytes;
    size_t max;
    int r;

    if (len > left || len > QCOW2_SNAPSHOTS_BYTES_MAX)
        return -EINVAL;
    max = (size_t)MIN(left, (uint64_t)MAX(len, s->table_max * 2 + READ_AHEAD));
    bytes = realloc(s->table, max);
    if (!bytes)
        return -ENOMEM;
    s->table = bytes;
    r = snap_read_flat(s, s->table_offset + s->table_max, bytes + s->table_max, max - s->table_max);
    if (r == 0)
        s->table_max = max;
    return r;
}

static int co_fn read_entry(struct snap *s, size_t at, struct qcow2_snapshot *ret)
{
    int r;

    while ((r = qcow2_snapshot_parse(s->table, s->table_max, at, ret)) == -ERANGE) {
        r = need_table(s, at + ret->len);
        if (r < 0)
            return r;
    }
    return r;
}

static int co_fn read_entries(struct snap *s)
{
    size_t at = 0;

    for (uint32_t i = 0; i < s->count; i++) {
        int r = read_entry(s, at, &s->v[i]);

        if (r == -EINVAL)
            return error_set(s->err, EIO,
                             "entry %" PRIu32 " of the snapshot table is damaged: check the image",
                             i);
        if (r < 0)
            return snap_failed(s, r, "read the snapshot table");
        s->table_len = at + s->v[i].len;
        at = (size_t)align_up(s->table_len, 8);
    }
    at = 0;
    for (uint32_t i = 0; i < s->count; i++) { /* the memory may have moved */
        (void)qcow2_snapshot_parse(s->table, s->table_max, at, &s->v[i]);
        at = (size_t)align_up(at + s->v[i].len, 8);
    }
    return 0;
}

static int co_fn read_table(struct snap *s)
{
    int r;

    if (s->q->bad_snapshots)
        return error_set(s->err, EIO,
                         "the table of snapshots is broken: `cairn check -r all` drops it");
    r = snap_read_flat(s, 0, s->header, sizeof(s->header));
    if (r < 0)
        return snap_failed(s, r, "read the header");
    s->count = load_be32(s->header + QCOW2_OFFSET_SNAPSHOT_COUNT);
    s->table_offset = load_be64(s->header + QCOW2_OFFSET_SNAPSHOTS_OFFSET);
    if (s->count > QCOW2_SNAPSHOTS_MAX)
        return error_set(s->err, EIO, "the header has %" PRIu32 " snapshots, %d are allowed",
                         s->count, QCOW2_SNAPSHOTS_MAX);
    s->v = try_new_n(struct qcow2_snapshot, (size_t)s->count + 1);
    return s->v ? read_entries(s) : snap_failed(s, -ENOMEM, "read the snapshot table");
}

static bool is_text(const char *bytes, size_t len, const char *text)
{
    return strlen(text) == len && memcmp(bytes, text, len) == 0;
}

static const struct qcow2_snapshot *find_name(const struct snap *s, const char *name)
{
    for (uint32_t i = 0; i < s->count; i++) {
        if (is_text(s->v[i].name, s->v[i].name_len, name))
            return &s->v[i];
    }
    return NULL;
}

static const struct qcow2_snapshot *find_id(const struct snap *s, const char *id)
{
    for (uint32_t i = 0; i < s->count; i++) {
        if (is_text(s->v[i].id, s->v[i].id_len, id))
            return &s->v[i];
    }
    return NULL;
}

/* By ID, or, if none has this one, by name. */
static const struct qcow2_snapshot *find_any(const struct snap *s, const char *id_or_name)
{
    const struct qcow2_snapshot *sn = find_id(s, id_or_name);

    return sn ? sn : find_name(s, id_or_name);
}

/* One more than the largest number that is an ID. */
static uint64_t new_id(const struct snap *s)
{
    uint64_t max = 0;

    for (uint32_t i = 0; i < s->count; i++) {
        uint64_t id = 0;

        for (size_t k = 0; k < s->v[i].id_len && s->v[i].id[k] >= '0' && s->v[i].id[k] <= '9'; k++)
            id = MIN(id * 10 + (uint64_t)(s->v[i].id[k] - '0'), (uint64_t)1 << 32);
        max = MAX(max, id);
    }
    return max + 1;
}

/* SNAP-1. Nothing of the tables is in memory afterwards. */
static int co_fn quiesce(struct snap *s)
{
    struct qcow2 *q = s->q;
    struct request flush = request_for(s->by, REQUEST_FLUSH, 0, 0);
    int r = qcow2_co_flush(q->node, &flush);

    if (r == 0)
        r = epoch_co_pass(node_epoch(q->node));
    if (r == 0)
        r = qcow2_alloc_settle(q, s->by);
    if (r < 0)
        return snap_failed(s, r, "flush the image");
    qcow2_alloc_drop_pack(q);
    qcow2_map_forget(q);
    return 0;
}

/* ---- the header ---- */

static int co_fn put_header(struct snap *s, const uint8_t *header, size_t from, size_t to)
{
    int r = snap_write_flat(s, from, header + from, to - from);

    return r < 0 ? r : qcow2_sync(s->q, s->by);
}

/* D3: what failed may have happened all the same, so the old one is written again. */
int snap_change_header(struct snap *s, const uint8_t *header, size_t from, size_t to)
{
    int r = put_header(s, header, from, to);

    if (r == 0) {
        memcpy(s->header + from, header + from, to - from);
        return 0;
    }
    if (put_header(s, s->header, from, to) < 0) {
        atomic_set(&s->q->needs_reopen, true);
        return error_set(s->err, -r,
                         "cannot write the header: %s; it may have changed or not: check the image",
                         strerror(-r));
    }
    return snap_failed(s, r, "write the header");
}

static uint64_t clusters_of(const struct snap *s, uint64_t bytes)
{
    return align_up(bytes, qcow2_cluster_size(s->q)) >> s->q->cluster_bits;
}

int snap_alloc_row(struct snap *s, uint64_t bytes, struct qcow2_extent *ret)
{
    uint64_t count = clusters_of(s, bytes);
    int r = 0;

    *ret = (struct qcow2_extent){.count = 0};
    if (count == 1)
        r = qcow2_alloc_get(s->q, s->by, 1, ret);
    else if (count)
        r = qcow2_alloc_get_row(s->q, s->by, count, ret);
    return snap_failed(s, r, "find room for tables");
}

void snap_put_row(struct snap *s, const struct qcow2_extent *row)
{
    if (row->count && !atomic_get(&s->q->needs_reopen))
        qcow2_alloc_put(s->q, row->host_offset, row->count);
}

int snap_change_table(struct snap *s, uint32_t count, uint64_t offset)
{
    uint8_t header[QCOW2_HEADER_LENGTH_V2];
    int r;

    memcpy(header, s->header, sizeof(header));
    store_be32(header + QCOW2_OFFSET_SNAPSHOT_COUNT, count);
    store_be64(header + QCOW2_OFFSET_SNAPSHOTS_OFFSET, offset);
    r = snap_change_header(s, header, QCOW2_OFFSET_SNAPSHOT_COUNT,
                           QCOW2_OFFSET_SNAPSHOTS_OFFSET + 8);
    if (r < 0)
        return r;
    qcow2_guard_set_single(s->q, QCOW2_SINGLE_SNAPSHOT_TABLE, 0, 0); /* until snap_end() */
    qcow2_alloc_put_table(s->q, s->by, s->table_offset, clusters_of(s, s->table_len));
    return 0;
}

/* ---- creating ---- */

/* The entry of a new one; the caller's to free. */
static uint8_t *make_entry(const struct snap *s, const struct qcow2_snapshot_new *how,
                           uint64_t l1_offset, size_t *ret_len)
{
    AUTO(free_ptr) char *id = xasprintf("%" PRIu64, new_id(s));
    size_t id_len = strlen(id);
    size_t name_len = strlen(how->name);
    uint8_t *e;

    *ret_len = QCOW2_SNAPSHOT_LEN_MIN + QCOW2_SNAPSHOT_EXTRA_ALL + id_len + name_len;
    e = xalloc(1, *ret_len);
    store_be64(e + QCOW2_SNAPSHOT_L1_OFFSET, l1_offset);
    store_be32(e + QCOW2_SNAPSHOT_L1_SIZE, s->q->map.l1_size);
    store_be16(e + QCOW2_SNAPSHOT_ID_LEN, (uint16_t)id_len);
    store_be16(e + QCOW2_SNAPSHOT_NAME_LEN, (uint16_t)name_len);
    store_be32(e + QCOW2_SNAPSHOT_DATE_S, how->date_s);
    store_be32(e + QCOW2_SNAPSHOT_DATE_NS, how->date_ns);
    store_be32(e + QCOW2_SNAPSHOT_EXTRA_LEN, QCOW2_SNAPSHOT_EXTRA_ALL);
    store_be64(e + QCOW2_SNAPSHOT_LEN_MIN + QCOW2_SNAPSHOT_EXTRA_DISK_SIZE, node_size(s->q->node));
    memcpy(e + QCOW2_SNAPSHOT_LEN_MIN + QCOW2_SNAPSHOT_EXTRA_ALL, id, id_len);
    memcpy(e + QCOW2_SNAPSHOT_LEN_MIN + QCOW2_SNAPSHOT_EXTRA_ALL + id_len, how->name, name_len);
    return e;
}

/* Where the tables of a new one lie. */
struct new_tables {
    struct qcow2_extent l1;
    struct qcow2_extent table;
};

static int co_fn write_new(struct snap *s, const struct qcow2_snapshot_new *how,
                           const struct new_tables *t)
{
    size_t len;
    AUTO(free_ptr) uint8_t *entry = make_entry(s, how, t->l1.host_offset, &len);
    uint64_t offset = t->table.host_offset;
    int r = snap_write_l1(s, snap_active_l1(s->q), t->l1.host_offset, false);

    if (r == 0)
        r = snap_failed(s, snap_write_flat(s, offset, s->table, s->table_len), "write the table");
    if (r == 0)
        r = snap_failed(s, snap_write_flat(s, offset + align_up(s->table_len, 8), entry, len),
                        "write the table");
    return r;
}

static int co_fn create_in(struct snap *s, const struct qcow2_snapshot_new *how,
                           const struct qcow2_counts *uses, const struct new_tables *t)
{
    int r = write_new(s, how, t);

    if (r == 0)
        r = snap_clear_active_flags(s);
    if (r == 0)
        r = snap_change_counts(s, uses, SNAP_RAISE, false); /* SNAP-3 */
    return r == 0 ? snap_change_table(s, s->count + 1, t->table.host_offset) : r;
}

static int co_fn create_counted(struct snap *s, const struct qcow2_snapshot_new *how,
                                const struct qcow2_counts *uses)
{
    uint64_t bytes = align_up(s->table_len, 8) + QCOW2_SNAPSHOT_LEN_MIN + QCOW2_SNAPSHOT_EXTRA_ALL +
                     ID_LEN_MAX + strlen(how->name);
    struct new_tables t = {.l1.count = 0};
    int r;

    if (bytes > QCOW2_SNAPSHOTS_BYTES_MAX)
        return error_set(s->err, EFBIG, "the table of snapshots is full");
    r = snap_change_counts(s, uses, SNAP_RAISE, true);
    if (r == 0)
        r = snap_alloc_row(s, (uint64_t)s->q->map.l1_size * QCOW2_ENTRY_LEN, &t.l1);
    if (r == 0)
        r = snap_alloc_row(s, bytes, &t.table);
    if (r == 0)
        r = create_in(s, how, uses, &t);
    if (r < 0) {
        snap_put_row(s, &t.l1);
        snap_put_row(s, &t.table);
    }
    return r;
}

static int co_fn create(struct snap *s, const struct qcow2_snapshot_new *how)
{
    struct qcow2_counts uses = {.memory_max = MEMORY_MAX};
    int r;

    if (strlen(how->name) > QCOW2_SNAPSHOT_NAME_MAX)
        return error_set(s->err, EINVAL, "the name has %zu bytes, %d are allowed",
                         strlen(how->name), QCOW2_SNAPSHOT_NAME_MAX);
    if (s->count == QCOW2_SNAPSHOTS_MAX)
        return error_set(s->err, EFBIG, "the image has %d snapshots, and can have no more",
                         QCOW2_SNAPSHOTS_MAX);
    r = snap_tally_l1(s, &uses, snap_active_l1(s->q));
    if (r == 0)
        r = create_counted(s, how, &uses);
    qcow2_counts_release(&uses);
    return r;
}

/* ---- deleting ---- */

/* The table without one of them. */
static int co_fn write_without(struct snap *s, const struct qcow2_snapshot *gone,
                               struct qcow2_extent *ret)
{
    size_t after = (size_t)align_up(gone->at + gone->len, 8);
    size_t rest = s->table_len > after ? s->table_len - after : 0;
    int r = snap_alloc_row(s, gone->at + rest, ret);

    if (r < 0 || !ret->count)
        return r;
    r = snap_write_flat(s, ret->host_offset, s->table, gone->at);
    if (r == 0)
        r = snap_write_flat(s, ret->host_offset + gone->at, s->table + after, rest);
    if (r == 0)
        r = qcow2_sync(s->q, s->by);
    return snap_failed(s, r, "write the table");
}

static int co_fn delete_counted(struct snap *s, const struct qcow2_snapshot *gone,
                                const struct qcow2_counts *uses)
{
    struct qcow2_extent row = {.count = 0};
    int r = snap_change_counts(s, uses, SNAP_LOWER, true);

    if (r == 0)
        r = write_without(s, gone, &row);
    if (r == 0)
        r = snap_change_table(s, s->count - 1, row.count ? row.host_offset : 0);
    if (r < 0) {
        snap_put_row(s, &row);
        return r;
    }
    r = snap_change_counts(s, uses, SNAP_LOWER, false); /* SNAP-5 */
    if (r == 0)
        snap_give_back_free(s, uses);
    if (r == 0)
        r = snap_set_active_flags(s);
    return r < 0 ? error_wrap(s->err, r, "the snapshot is deleted, but its space leaks") : 0;
}

static int co_fn delete_named(struct snap *s, const char *name)
{
    struct qcow2_counts uses = {.memory_max = MEMORY_MAX};
    const struct qcow2_snapshot *gone = find_name(s, name);
    struct snap_l1 l1 = {.v = NULL};
    int r;

    if (!gone)
        return error_set(s->err, ENOENT, "snapshot not found");
    r = snap_read_l1(s, gone, gone->l1_size, &l1);
    if (r == 0)
        r = snap_tally_l1(s, &uses, l1);
    if (r == 0 && gone->l1_size)
        r = snap_tally(s, &uses, gone->l1_offset, (uint64_t)gone->l1_size * QCOW2_ENTRY_LEN);
    if (r == 0)
        r = delete_counted(s, gone, &uses);
    free(l1.v);
    qcow2_counts_release(&uses);
    return r;
}

/* ---- upgrading ---- */

int snap_complete_table(struct snap *s)
{
    AUTO(free_ptr)
    uint8_t *table = try_alloc(s->table_len + (size_t)s->count * QCOW2_SNAPSHOT_EXTRA_ALL + 1, 1);
    struct qcow2_extent row;
    bool complete = true;
    size_t len = 0;
    int r;

    for (uint32_t i = 0; i < s->count; i++)
        complete &= s->v[i].has_disk_size;
    if (complete)
        return 0;
    if (!table)
        return snap_failed(s, -ENOMEM, "make the table");
    for (uint32_t i = 0; i < s->count; i++) {
        size_t at = (size_t)align_up(len, 8);

        memset(table + len, 0, at - len);
        len = at + qcow2_snapshot_complete(s->table, &s->v[i], node_size(s->q->node), table + at);
    }
    if (len > QCOW2_SNAPSHOTS_BYTES_MAX)
        return error_set(s->err, EFBIG, "the table of snapshots is full");
    r = snap_alloc_row(s, len, &row);
    if (r < 0)
        return r;
    r = snap_failed(s, snap_write_flat(s, row.host_offset, table, len), "write the table");
    if (r == 0)
        r = snap_failed(s, qcow2_sync(s->q, s->by), "flush the table");
    if (r == 0)
        r = snap_change_table(s, s->count, row.host_offset);
    if (r < 0)
        snap_put_row(s, &row);
    return r;
}

/* ---- applying ---- */

struct application {
    struct snap_l1 l1; /* that will be the active one */
    uint64_t size;
    struct qcow2_room room;
    struct qcow2_counts more;
    struct qcow2_counts less;
    const char *done; /* what to say when only giving space back fails */
};

/* From one disk to the other: size and L1 table are one write. */
static int co_fn point_to_l1(struct snap *s, const struct application *a, uint64_t l1_offset)
{
    uint8_t header[QCOW2_HEADER_LENGTH_V2];

    memcpy(header, s->header, sizeof(header));
    store_be64(header + QCOW2_OFFSET_SIZE, a->size);
    store_be32(header + QCOW2_OFFSET_L1_SIZE, a->l1.count);
    store_be64(header + QCOW2_OFFSET_L1_OFFSET, l1_offset);
    return snap_change_header(s, header, QCOW2_OFFSET_SIZE, QCOW2_OFFSET_L1_OFFSET + 8);
}

static int co_fn write_applied(struct snap *s, struct application *a, uint64_t l1_offset)
{
    int r = snap_write_l1(s, a->l1, l1_offset, false);

    if (r == 0)
        r = snap_visit_tables(s, a->l1, snap_clear_in_l2,
                              NULL); /* SNAP-2: what others may have left set */
    if (r == 0)
        r = snap_failed(s, qcow2_sync(s->q, s->by), "flush the image");
    if (r == 0)
        r = snap_change_counts(s, &a->more, SNAP_RAISE, false);
    return r == 0 ? point_to_l1(s, a, l1_offset) : r;
}

static int co_fn apply_counted(struct snap *s, struct application *a)
{
    struct qcow2_extent row;
    int r = snap_change_counts(s, &a->more, SNAP_RAISE, true);

    if (r == 0)
        r = snap_change_counts(s, &a->less, SNAP_LOWER, true);
    if (r == 0 && !qcow2_room_make(s->q, &a->room, a->l1.count))
        r = snap_failed(s, -ENOMEM, "make tables");
    if (r == 0)
        r = snap_alloc_row(s, MAX((uint64_t)a->l1.count * QCOW2_ENTRY_LEN, (uint64_t)1), &row);
    if (r < 0)
        return r;
    r = write_applied(s, a, row.host_offset);
    if (r < 0) {
        snap_put_row(s, &row);
        return r;
    }
    memcpy(a->room.l1, a->l1.v, (size_t)a->l1.count * sizeof(*a->l1.v));
    qcow2_room_use(s->q, &a->room, a->l1.count, row.host_offset);
    node_set_size(s->q->node, a->size);
    r = snap_change_counts(s, &a->less, SNAP_LOWER, false); /* SNAP-5; nothing new is used once */
    if (r == 0)
        snap_give_back_free(s, &a->less);
    return r < 0 ? error_wrap(s->err, r, "%s, but space leaks", a->done) : 0;
}

/* What is used for the disk alone. */
static int co_fn tally_active(struct snap *s, struct qcow2_counts *c)
{
    uint64_t l1_bytes = (uint64_t)s->q->map.l1_size * QCOW2_ENTRY_LEN;
    int r = snap_tally_l1(s, c, snap_active_l1(s->q));

    return r == 0 && l1_bytes ? snap_tally(s, c, s->q->map.l1_offset, l1_bytes) : r;
}

/* The size of the disk, and what its L1 table says: the caller's to free. The state of a machine lies beyond. */
static int co_fn read_disk(struct snap *s, const struct qcow2_snapshot *sn, uint64_t *ret_size,
                           struct snap_l1 *ret_l1)
{
    uint64_t size = sn->has_disk_size ? sn->disk_size : node_size(s->q->node);
    uint64_t entries = qcow2_l1_entries_needed(size, s->q->cluster_bits, s->q->extended);

    if (size > INT64_MAX || entries * QCOW2_ENTRY_LEN > QCOW2_L1_BYTES_MAX)
        return snap_damaged(s, "a snapshot's disk cannot be as large as", size);
    *ret_size = size;
    return snap_read_l1(s, sn, (uint32_t)entries, ret_l1);
}

static int co_fn prepare_application(struct snap *s, const struct qcow2_snapshot *sn,
                                     struct application *a)
{
    int r;

    r = read_disk(s, sn, &a->size, &a->l1);
    if (r == 0)
        r = snap_tally_l1(s, &a->more, a->l1);
    return r == 0 ? tally_active(s, &a->less) : r;
}

static void release_application(struct application *a)
{
    qcow2_room_release(&a->room);
    free(a->l1.v);
    qcow2_counts_release(&a->more);
    qcow2_counts_release(&a->less);
}

static int co_fn apply(struct snap *s, const char *id_or_name, bool *ret_vm_state)
{
    struct application a = {.more = {.memory_max = MEMORY_MAX / 2},
                            .less = {.memory_max = MEMORY_MAX / 2},
                            .done = "the snapshot is applied"};
    const struct qcow2_snapshot *sn = find_any(s, id_or_name);
    int r;

    if (!sn)
        return error_set(s->err, ENOENT, "there is no snapshot with this ID or name");
    *ret_vm_state = sn->vm_state_size;
    r = prepare_application(s, sn, &a);
    if (r == 0)
        r = apply_counted(s, &a);
    release_application(&a);
    return r;
}

/* All of the data file, to the host, as far as it takes it. */
static void co_fn give_back_data(struct snap *s)
{
    for (uint64_t at = 0; at < node_size(s->q->node); at += GIB) /* G6 */
        (void)qcow2_data_discard(s->q, s->by, at, GIB);
}

/* A snapshot that has nothing is applied. */
static int co_fn empty(struct snap *s)
{
    struct application a = {.less = {.memory_max = MEMORY_MAX},
                            .size = node_size(s->q->node),
                            .done = "the image is empty"};
    int r;

    a.l1.count = s->q->map.l1_size;
    a.l1.v = try_new_n(uint64_t, (size_t)a.l1.count + 1);
    r = a.l1.v ? tally_active(s, &a.less) : snap_failed(s, -ENOMEM, "make tables");
    if (r == 0)
        r = apply_counted(s, &a);
    if (r == 0 && qcow2_has_data_file(s->q))
        give_back_data(s);
    release_application(&a);
    return r;
}

/* ---- showing ---- */

static bool is_called(const struct qcow2_snapshot *sn, const struct qcow2_snapshot_names *names)
{
    return (!names->id || is_text(sn->id, sn->id_len, names->id)) &&
           (!names->name || is_text(sn->name, sn->name_len, names->name));
}

static const struct qcow2_snapshot *find_ref(const struct snap *s,
                                             const struct qcow2_snapshot_ref *ref)
{
    if (ref->kind == QCOW2_SNAPSHOT_REF_ANY)
        return find_any(s, ref->any);
    for (uint32_t i = 0; i < s->count; i++) {
        if ((ref->names->id || ref->names->name) && is_called(&s->v[i], ref->names))
            return &s->v[i];
    }
    return NULL;
}

static int co_fn show(struct snap *s, const struct qcow2_snapshot *sn)
{
    struct qcow2_room room = {.l1 = NULL};
    struct snap_l1 l1 = {.v = NULL};
    uint64_t size;
    int r = read_disk(s, sn, &size, &l1);

    if (r == 0 && !qcow2_room_make(s->q, &room, l1.count))
        r = snap_failed(s, -ENOMEM, "make tables");
    if (r == 0) {
        memcpy(room.l1, l1.v, (size_t)l1.count * sizeof(*l1.v));
        qcow2_room_use(s->q, &room, l1.count, sn->l1_offset);
        node_set_size(s->q->node, size);
    }
    qcow2_room_release(&room);
    free(l1.v);
    return r;
}

/* ---- what all of them have in common ---- */

int snap_begin(struct snap *s, struct backend *b)
{
    struct node *node = backend_node(b);
    int r;

    if (node_driver(node) != &qcow2_driver)
        return error_set(s->err, ENOTSUP, "images of this format cannot be changed so");
    s->q = node_state(node);
    if (!s->q->writable)
        return error_set(s->err, EROFS, "the image is open for reading only");
    r = quiesce(s);
    return r < 0 ? r : read_table(s);
}

static int co_fn begin_with_snapshots(struct snap *s, struct backend *b)
{
    int r = snap_begin(s, b);

    if (r == 0 && qcow2_has_data_file(s->q))
        r = error_set(
            s->err, ENOTSUP,
            "images with an external data file have no snapshots: a data file cannot keep "
            "what was there before");
    return r;
}

static void release(struct snap *s)
{
    free(s->table);
    free(s->v);
}

/* Whatever became of it, tables may lie elsewhere. */
void snap_end(struct snap *s)
{
    if (s->q && s->q->writable)
        qcow2_guard_rebuild(s->q, s->by);
    release(s);
}

static int co_fn visit_l1(struct snap *s, const struct qcow2_snapshot *sn,
                          const struct qcow2_snapshot_visitor *v)
{
    struct snap_l1 l1 = {.v = NULL};
    int r = v->wants_l1 ? snap_read_l1(s, sn, sn->l1_size, &l1) : 0;

    if (r == 0)
        r = v->l1(v->arg, sn->l1_offset, l1.v, sn->l1_size);
    free(l1.v);
    return r;
}

int qcow2_snapshot_visit(struct qcow2 *q, const struct request *by,
                         const struct qcow2_snapshot_visitor *v, struct error **err)
{
    struct snap s = {.q = q, .by = by, .err = err};
    int r = read_table(&s);

    if (r == 0 && s.count)
        r = v->table(v->arg, s.table_offset, s.table_len, s.count);
    for (uint32_t i = 0; r == 0 && i < s.count; i++)
        r = visit_l1(&s, &s.v[i], v);
    release(&s);
    return r;
}

int qcow2_snapshot_show(struct qcow2 *q, const struct request *by,
                        const struct qcow2_snapshot_ref *which, struct error **err)
{
    struct snap s = {.q = q, .by = by, .err = err};
    const struct qcow2_snapshot *sn;
    int r = read_table(&s);

    if (r == 0) {
        sn = find_ref(&s, which);
        r = sn ? show(&s, sn) : error_set(err, ENOENT, "there is no such snapshot");
    }
    release(&s);
    return r < 0 ? error_wrap(err, r, "node '%s'", node_name(q->node)) : 0;
}

int qcow2_co_snapshot_create(struct backend *b, const struct qcow2_snapshot_new *how,
                             struct error **err)
{
    struct pass pass = {0};
    struct request by = {.kind = REQUEST_FLUSH, .pass = &pass};
    struct snap s = {.by = &by, .err = err};
    int r = begin_with_snapshots(&s, b);

    if (r == 0)
        r = create(&s, how);
    snap_end(&s);
    return r;
}

int qcow2_co_snapshot_apply(struct backend *b, const char *id_or_name, bool *ret_vm_state,
                            struct error **err)
{
    struct pass pass = {0};
    struct request by = {.kind = REQUEST_FLUSH, .pass = &pass};
    struct snap s = {.by = &by, .err = err};
    int r = begin_with_snapshots(&s, b);

    if (r == 0) {
        r = apply(&s, id_or_name, ret_vm_state);
        node_tell_changed(s.q->node, 0, node_size(s.q->node)); /* P2: all of it, perhaps */
    }
    snap_end(&s);
    return r;
}

int qcow2_co_empty(struct backend *b, struct error **err)
{
    struct pass pass = {0};
    struct request by = {.kind = REQUEST_FLUSH, .pass = &pass};
    struct snap s = {.by = &by, .err = err};
    int r = snap_begin(&s, b);

    if (r == 0)
        r = empty(&s);
    snap_end(&s);
    return r;
}

int qcow2_co_snapshot_delete(struct backend *b, const char *name, struct error **err)
{
    struct pass pass = {0};
    struct request by = {.kind = REQUEST_FLUSH, .pass = &pass};
    struct snap s = {.by = &by, .err = err};
    int r = begin_with_snapshots(&s, b);

    if (r == 0)
        r = delete_named(&s, name);
    snap_end(&s);
    return r;
}
