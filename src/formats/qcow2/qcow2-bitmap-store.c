/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Writing bitmaps into the image: all that are persistent, when it is closed, and a directory without one of them when that is removed.
 * Everything is written to places that nothing points to, so that until the header changes there is nothing to take back (STORED-2).
 */
#include "base/alloc.h"
#include "base/atomic.h"
#include "base/checked.h"
#include "base/endian.h"
#include "base/log.h"
#include "base/macros.h"
#include "base/zeroes.h"
#include "bitmaps/dirty-bitmap.h"
#include "formats/qcow2/qcow2-bitmap.h"
#include "formats/qcow2/qcow2-header-bitmaps.h"

#include <assert.h>
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#define PIECE ((size_t)256 << 10)

/* A directory that is going to take the place of another one. */
struct storing {
    struct qcow2 *q;
    const struct request *by;
    struct error **err;

    struct qcow2_bitmap_space taken; /* clusters that are written */
    struct qcow2_bitmap_space freed; /* that the old directory will have used */
    uint8_t *directory;
    size_t len;
    size_t max;
    uint32_t count;
    uint64_t offset;
    struct qcow2_header_steps *steps;

    struct iobuf *data; /* PIECE, or a cluster */
};

/* Bits on their way to clusters that follow each other. */
struct data_run {
    uint64_t offset; /* in the file */
    uint64_t count;
};

/* What was done for a change that removes a bitmap, until it is committed or undone. */
struct qcow2_bitmap_removal {
    struct list link;
    char *name;
    struct qcow2_bitmaps before; /* its directory, owned */
    struct qcow2_bitmap_space taken;
    struct qcow2_bitmap_space freed;
    struct qcow2_header_steps *steps;
};

static int failed(struct storing *s, int r, const char *what)
{
    return r < 0 ? error_set(s->err, -r, "cannot %s: %s", what, strerror(-r)) : r;
}

static void storing_release(struct storing *s)
{
    qcow2_bitmap_space_release(&s->taken);
    qcow2_bitmap_space_release(&s->freed);
    iobuf_unref(s->data);
    free(s->directory);
    free(s->steps);
}

/* Clusters in a row, for so many bytes. */
static int co_fn take_row(struct storing *s, uint64_t bytes, struct qcow2_extent *ret)
{
    uint64_t count = align_up(bytes, qcow2_cluster_size(s->q)) >> s->q->cluster_bits;
    int r = count == 1 ? qcow2_alloc_get(s->q, s->by, 1, ret)
                       : qcow2_alloc_get_row(s->q, s->by, count, ret);

    if (r < 0)
        return r;
    r = qcow2_bitmap_space_add_range(&s->taken, s->q, ret->host_offset, bytes);
    if (r < 0)
        qcow2_alloc_put(s->q, ret->host_offset, ret->count);
    return r;
}

/* ---- the header ---- */

/* The old bytes again, the last step first (D3). */
static int co_fn undo_steps(struct qcow2 *q, const struct request *by,
                            const struct qcow2_header_steps *steps, unsigned count)
{
    int r = 0;

    qcow2_online_break(q, "a bitmap that the image stores has changed");
    while (r == 0 && count) {
        const struct qcow2_header_step *step = &steps->v[--count];
        struct iobuf *b = iobuf_new(step->len);

        if (b)
            memcpy(b->data, step->was, step->len);
        r = b ? qcow2_write_meta(q, by, step->at, b, 0, step->len) : -ENOMEM;
        if (r == 0)
            r = qcow2_sync(q, by);
        iobuf_unref(b);
    }
    if (r < 0) {
        atomic_set(&q->needs_reopen, true);
        log_warning("node '%s': what the header says of its bitmaps may have changed on disk, or "
                    "not: nothing is written to its tables any more until it is opened again",
                    node_name(q->node));
    }
    return r;
}

static int co_fn do_step(struct qcow2 *q, const struct request *by,
                         const struct qcow2_header_step *step)
{
    struct iobuf *b = iobuf_new(step->len);
    int r;

    if (!b)
        return -ENOMEM;
    memcpy(b->data, step->becomes, step->len);
    r = qcow2_write_meta(q, by, step->at, b, 0, step->len);
    if (r == 0)
        r = qcow2_sync(q, by);
    iobuf_unref(b);
    return r;
}

/* STORED-3. After an error nothing has changed, or the node needs to be opened again. */
static int co_fn do_steps(struct storing *s)
{
    qcow2_online_break(s->q, "a bitmap that the image stores has changed");
    for (unsigned i = 0; i < s->steps->count; i++) {
        int r = do_step(s->q, s->by, &s->steps->v[i]);

        if (r < 0) {
            (void)undo_steps(s->q, s->by, s->steps, i + 1);
            return failed(s, r, "write the header");
        }
    }
    return 0;
}

/* What there is to do for a header that points to `place`. */
static int co_fn plan_steps(struct storing *s, const struct qcow2_bitmaps_place *place)
{
    uint64_t file_size = node_size(edge_node(s->q->file));
    size_t len = (size_t)MIN(file_size, QCOW2_HEADER_BYTES_MAX);
    struct qcow2_header h = {0};
    struct iobuf *b = iobuf_new(len);
    int r;

    s->steps = try_new(struct qcow2_header_steps);
    r = b && s->steps ? qcow2_read_meta(s->q, s->by, 0, b, 0, len) : -ENOMEM;
    if (r < 0)
        r = failed(s, r, "read the header");
    else
        r = qcow2_header_parse_tolerant(&h, b->data, len, file_size, node_name(s->q->node), s->err);
    if (r == 0)
        r = qcow2_header_plan_bitmaps(&h, b->data,
                                      (size_t)MIN((uint64_t)len, qcow2_cluster_size(s->q)), place,
                                      s->steps, s->err);
    qcow2_header_release(&h);
    iobuf_unref(b);
    return r;
}

/* ---- bits ---- */

static int co_fn write_run(struct storing *s, struct data_run *run)
{
    size_t len = (size_t)(run->count << s->q->cluster_bits);

    run->count = 0;
    return len ? qcow2_write_meta(s->q, s->by, run->offset, s->data, 0, len) : 0;
}

/* A cluster of bits, which belongs to entry `index`. */
static int co_fn store_cluster(struct storing *s, const struct bitmap *bits, uint64_t index,
                               struct data_run *run, uint64_t *ret_entry)
{
    unsigned cluster_bits = s->q->cluster_bits;
    size_t cluster = (size_t)qcow2_cluster_size(s->q);
    struct qcow2_extent at;
    int r = take_row(s, cluster, &at);

    if (r < 0)
        return r;
    if (run->count && (at.host_offset != run->offset + (run->count << cluster_bits) ||
                       (run->count + 1) << cluster_bits > s->data->size))
        r = write_run(s, run);
    if (r < 0)
        return r;
    if (!run->count)
        run->offset = at.host_offset;
    bitmap_read(bits, index << (cluster_bits + 3), s->data->data + (run->count << cluster_bits),
                cluster);
    run->count++;
    *ret_entry = at.host_offset;
    return 0;
}

/*
 * Fills a table of zeroes, and writes the bits that it points to. The cost follows what is dirty (P5). The last entry is never "all
 * ones" if it stands for more than the disk has: QEMU would set what lies beyond.
 */
static int co_fn store_bits(struct storing *s, const struct bitmap *bits, uint8_t *table)
{
    uint64_t covers = bitmap_granularity(bits) << (s->q->cluster_bits + 3);
    uint64_t size = bitmap_size(bits);
    struct data_run run = {.count = 0};
    uint64_t offset;
    uint64_t len;
    int r = 0;

    for (uint64_t at = 0; bitmap_next_dirty(bits, at, size, &offset, &len);) {
        uint64_t index = offset / covers;
        uint64_t end = offset + len;
        uint64_t entry = QCOW2_BITMAP_TABLE_ONES;

        at = (index + 1) * covers;
        if (offset > index * covers || end < at)
            r = store_cluster(s, bits, index, &run, &entry);
        if (r < 0)
            break;
        store_be64(table + index * QCOW2_ENTRY_LEN, entry);
        for (; entry == QCOW2_BITMAP_TABLE_ONES && end - at >= covers; at += covers)
            store_be64(table + at / covers * QCOW2_ENTRY_LEN, entry);
    }
    return r == 0 ? write_run(s, &run) : r;
}

/* Where space reads as zeroes, what is zero is not written. */
static int co_fn write_sparse(struct storing *s, const struct qcow2_extent *at, struct iobuf *b,
                              size_t len)
{
    size_t step = MIN(PIECE, (size_t)qcow2_cluster_size(s->q));
    int r = 0;

    for (size_t from = 0; r == 0 && from < len; from += step) {
        size_t n = MIN(len - from, step);

        if (!at->fresh || !is_all_zeroes(b->data + from, n))
            r = qcow2_write_meta(s->q, s->by, at->host_offset + from, b, from, n);
    }
    return r;
}

/* Bits and table of one. */
static int co_fn store_bitmap(struct storing *s, const struct bitmap *bits,
                              struct qcow2_bitmap_entry *e)
{
    uint64_t size = bitmap_size(bits);
    struct qcow2_extent at = {.count = 0};
    struct iobuf *table;
    size_t len;
    int r;

    e->granularity_bits = (uint8_t)__builtin_ctzll(bitmap_granularity(bits));
    e->table_size = (uint32_t)MAX(
        qcow2_bitmap_table_entries(size, e->granularity_bits, s->q->cluster_bits), (uint64_t)1);
    if ((uint64_t)e->table_size << s->q->cluster_bits > QCOW2_BITMAP_BYTES_MAX)
        return -EFBIG; /* the disk has grown */
    len = (size_t)e->table_size * QCOW2_ENTRY_LEN;
    table = iobuf_new(len);
    if (!table)
        return -ENOMEM;
    memset(table->data, 0, len);
    r = take_row(s, len, &at);
    e->table_offset = at.host_offset;
    if (r == 0)
        r = store_bits(s, bits, table->data);
    if (r == 0)
        r = write_sparse(s, &at, table, len);
    iobuf_unref(table);
    return r;
}

/* ---- the directory ---- */

static const struct qcow2_bitmap_entry *find_entry(const struct qcow2_bitmap_entry *v,
                                                   uint32_t first, uint32_t count, const char *name)
{
    size_t len = strlen(name);

    for (uint32_t i = first; i < count; i++) {
        if (v[i].name_len == len && memcmp(v[i].name, name, len) == 0)
            return &v[i];
    }
    return NULL;
}

static int append_entry(struct storing *s, const struct qcow2_bitmap_entry *e)
{
    size_t len = (size_t)qcow2_bitmap_entry_len(e->name_len, e->extra_len);

    if (s->len + len > s->max) {
        size_t max = MAX(2 * s->max, s->len + len);
        uint8_t *larger = realloc(s->directory, max);

        if (!larger)
            return -ENOMEM;
        s->directory = larger;
        s->max = max;
    }
    s->len += qcow2_bitmap_entry_put(s->directory + s->len, e);
    s->count++;
    return 0;
}

static int co_fn write_directory(struct storing *s)
{
    struct qcow2_extent at = {.count = 0};
    int r;

    if (!s->count)
        return 0;
    if (s->count > QCOW2_BITMAPS_MAX || s->len > QCOW2_BITMAPS_DIRECTORY_MAX)
        return -EFBIG;
    r = take_row(s, s->len, &at);
    s->offset = at.host_offset;
    for (size_t from = 0; r == 0 && from < s->len; from += PIECE) {
        size_t n = MIN(s->len - from, PIECE);

        memcpy(s->data->data, s->directory + from, n);
        r = qcow2_write_meta(s->q, s->by, at.host_offset + from, s->data, 0, n);
    }
    return r;
}

/* The new directory takes the old one's place, on the disk (STORED-2, STORED-3). */
static int co_fn publish(struct storing *s)
{
    struct qcow2_bitmaps_place place = {.count = s->count, .directory_size = s->len};
    int r = write_directory(s);

    if (r == 0)
        r = qcow2_bitmap_space_settle(&s->freed, s->q, s->by);
    if (r == 0 && s->count)
        r = qcow2_sync(s->q, s->by);
    if (r < 0)
        return failed(s, r, "write the directory of bitmaps");
    place.directory_offset = s->offset;
    r = plan_steps(s, &place);
    if (r == 0)
        r = do_steps(s);
    if (r == 0)
        qcow2_guard_set_single(s->q, QCOW2_SINGLE_BITMAP_DIRECTORY, s->offset, s->len);
    return r;
}

/* Nothing points to what was written, but after a header that we are not sure of. */
static void put_back_taken(struct qcow2_bitmap_space *taken, struct qcow2 *q)
{
    if (atomic_get(&q->needs_reopen))
        qcow2_bitmap_space_release(taken);
    else
        qcow2_bitmap_space_give_back(taken, q);
}

static int storing_begin(struct storing *s)
{
    s->data = iobuf_new(MAX(PIECE, (size_t)qcow2_cluster_size(s->q)));
    return s->data ? 0 : -ENOMEM;
}

/* ---- closing ---- */

/* What the image has of it, or NULL; as it was (STORED-5), or with new bits. */
static int co_fn store_one(struct storing *s, struct dirty_bitmap *d,
                           const struct qcow2_bitmap_entry *old)
{
    const char *name = dirty_bitmap_name(d);
    struct qcow2_bitmap_entry e = {
        .type = QCOW2_BITMAP_TYPE_DIRTY,
        .name = name,
        .name_len = (uint16_t)strlen(name),
        .flags = dirty_bitmap_enabled(d) ? QCOW2_BITMAP_AUTO : 0,
    };
    int r;

    if (dirty_bitmap_inconsistent(d))
        return old ? append_entry(s, old) : 0;
    if (old && old->extra_len) {
        e.extra = old->extra;
        e.extra_len = old->extra_len;
        e.flags |= QCOW2_BITMAP_EXTRA_COMPATIBLE;
    }
    r = store_bitmap(s, dirty_bitmap_bits_to_store(d), &e);
    if (r == 0)
        r = append_entry(s, &e);
    if (r == 0 && old)
        r = qcow2_bitmap_space_add(&s->freed, s->q, s->by, old);
    return r;
}

/* Bitmaps come in the order of the directory, the new ones last: what was found for one is where the next one is looked for. */
static int co_fn store_all(struct storing *s, const struct qcow2_bitmap_entry *v, uint32_t count)
{
    struct dirty_bitmap *d = NULL;
    uint32_t next = 0;
    int r = 0;

    while (r == 0 && (d = dirty_bitmap_next_persistent(s->q->node, d))) {
        const struct qcow2_bitmap_entry *old = find_entry(v, next, count, dirty_bitmap_name(d));

        if (old)
            next = (uint32_t)(old - v) + 1;
        r = store_one(s, d, old);
        if (r < 0)
            return error_set(s->err, -r, "cannot store bitmap '%s': %s", dirty_bitmap_name(d),
                             strerror(-r));
    }
    return r;
}

static int co_fn store_anew(struct storing *s)
{
    const struct qcow2_bitmaps *b = s->q->bitmaps;
    struct qcow2_bitmap_entry *v = NULL;
    const char *problem = NULL;
    int r = storing_begin(s);

    if (r == 0 && b->directory)
        r = qcow2_bitmap_entries(b->directory, b->len, b->count, &v, &problem);
    if (r == 0 && v)
        r = qcow2_bitmap_space_add_range(&s->freed, s->q, b->offset, b->len);
    if (r == 0)
        r = store_all(s, v, v ? b->count : 0);
    else
        r = failed(s, r, "store the bitmaps");
    free(v);
    return r == 0 ? publish(s) : r;
}

int qcow2_bitmaps_co_store(struct qcow2 *q, const struct request *by, struct error **err)
{
    struct storing s = {.q = q, .by = by, .err = err};
    int r;

    if (!q->bitmaps->directory && !dirty_bitmap_next_persistent(q->node, NULL))
        return 0;
    r = store_anew(&s);
    if (r < 0) {
        put_back_taken(&s.taken, q);
    } else {
        qcow2_bitmap_space_give_back(&s.freed, q); /* STORED-4 */
        free(take(&q->bitmaps->directory));
    }
    storing_release(&s);
    return r;
}

/* ---- removing ---- */

static void removal_free(struct qcow2_bitmap_removal *gone)
{
    list_remove(&gone->link);
    qcow2_bitmap_space_release(&gone->taken);
    qcow2_bitmap_space_release(&gone->freed);
    free(gone->before.directory);
    free(gone->steps);
    free(gone->name);
    free(gone);
}

/* NULL: it failed, or the image never had it. */
static struct qcow2_bitmap_removal *find_removal(const struct qcow2 *q, const char *name)
{
    struct qcow2_bitmap_removal *gone;

    list_for_each (&q->bitmaps->removals, gone, link) {
        if (strcmp(gone->name, name) == 0)
            return gone;
    }
    return NULL;
}

/* All but one of the entries. */
static int co_fn store_others(struct storing *s, const struct qcow2_bitmap_entry *v,
                              const struct qcow2_bitmap_entry *gone)
{
    const struct qcow2_bitmaps *b = s->q->bitmaps;
    int r = qcow2_bitmap_space_add_range(&s->freed, s->q, b->offset, b->len);

    for (uint32_t i = 0; r == 0 && i < b->count; i++) {
        if (&v[i] != gone)
            r = append_entry(s, &v[i]);
    }
    if (r == 0)
        r = qcow2_bitmap_space_add(&s->freed, s->q, s->by, gone);
    if (r == 0)
        r = storing_begin(s);
    return r < 0 ? failed(s, r, "write the directory of bitmaps") : publish(s);
}

/* What was done stays known until the change has ended. */
static void note_removal(struct storing *s, struct qcow2_bitmap_removal *gone, const char *name)
{
    struct qcow2_bitmaps *b = s->q->bitmaps;

    gone->name = xstrdup(name);
    gone->before = *b;
    gone->taken = s->taken;
    gone->freed = s->freed;
    gone->steps = take(&s->steps);
    s->taken = s->freed = (struct qcow2_bitmap_space){.v = NULL};
    list_append(&b->removals, &gone->link);
    b->directory = s->count ? take(&s->directory) : NULL;
    b->len = s->len;
    b->count = s->count;
    b->offset = s->offset;
}

static int co_fn control_fn store_co_remove(struct node *node, struct pass *pass, const char *name,
                                            struct error **err)
{
    struct qcow2 *q = node_state(node);
    struct request by = {.kind = REQUEST_FLUSH, .pass = pass};
    struct storing s = {.q = q, .by = &by, .err = err};
    const struct qcow2_bitmaps *b = q->bitmaps;
    struct qcow2_bitmap_removal *gone = try_new(struct qcow2_bitmap_removal);
    const struct qcow2_bitmap_entry *e = NULL;
    struct qcow2_bitmap_entry *v = NULL;
    const char *problem;
    int r = gone ? 0 : -ENOMEM;

    if (r == 0 && b->directory)
        r = qcow2_bitmap_entries(b->directory, b->len, b->count, &v, &problem);
    if (r < 0) {
        free(gone);
        return error_set(err, -r, "no memory to remove bitmap '%s'", name);
    }
    list_init(&gone->link);
    if (v)
        e = find_entry(v, 0, b->count, name);
    if (e)
        r = store_others(&s, v, e);
    if (e && r == 0) {
        note_removal(&s, gone, name);
    } else {
        put_back_taken(&s.taken, q);
        free(gone);
    }
    free(v);
    storing_release(&s);
    return r < 0 ? error_wrap(err, r, "bitmap '%s' of node '%s' cannot be removed from the image",
                              name, node_name(node))
                 : 0;
}

static int co_fn control_fn store_co_remove_undo(struct node *node, struct pass *pass,
                                                 const char *name)
{
    struct qcow2 *q = node_state(node);
    struct request by = {.kind = REQUEST_FLUSH, .pass = pass};
    struct qcow2_bitmap_removal *gone = find_removal(q, name);
    int r;

    if (atomic_get(&q->needs_reopen))
        return -EIO;
    if (!gone)
        return 0;
    r = undo_steps(q, &by, gone->steps, gone->steps->count);
    free(q->bitmaps->directory);
    q->bitmaps->directory = take(&gone->before.directory);
    q->bitmaps->len = gone->before.len;
    q->bitmaps->count = gone->before.count;
    q->bitmaps->offset = gone->before.offset;
    qcow2_guard_set_single(q, QCOW2_SINGLE_BITMAP_DIRECTORY, gone->before.offset, gone->before.len);
    put_back_taken(&gone->taken, q);
    removal_free(gone);
    return r;
}

static void control_fn store_removed(struct node *node, const char *name)
{
    struct qcow2 *q = node_state(node);
    struct qcow2_bitmap_removal *gone = find_removal(q, name);

    if (!gone)
        return;
    qcow2_bitmap_space_give_back(&gone->freed, q); /* STORED-4 */
    removal_free(gone);
}

/* ---- new ones ---- */

static int co_fn control_fn store_co_check_new(struct node *node,
                                               const struct bitmap_store_new *new,
                                               struct error **err)
{
    struct qcow2 *q = node_state(node);
    struct pass pass = {0};
    struct request by = {.kind = REQUEST_FLUSH, .pass = &pass};
    struct storing s = {.q = q, .by = &by, .err = err};
    struct qcow2_bitmaps_place place = {.count = 1};
    unsigned bits = (unsigned)__builtin_ctzll(new->granularity);
    int r;

    if (!q->writable)
        return error_set(err, EROFS,
                         "dirty bitmap '%s' cannot be persistent: node '%s' is read-only",
                         new->name, node_name(node));
    if (q->version < 3)
        return error_set(err, EOPNOTSUPP,
                         "dirty bitmap '%s' cannot be persistent: the image of node '%s' has "
                         "version 2, bitmaps are stored since version 3",
                         new->name, node_name(node));
    if (new->count > QCOW2_BITMAPS_MAX ||
        new->count *(QCOW2_BITMAP_ENTRY_LEN_MIN + 7) + new->name_bytes >
            QCOW2_BITMAPS_DIRECTORY_MAX)
        return error_set(err, EFBIG,
                         "dirty bitmap '%s' cannot be persistent: %" PRIu64 " bitmaps are too many "
                         "for the image of node '%s'",
                         new->name, new->count, node_name(node));
    if (qcow2_bitmap_table_entries(node_size(node), bits, q->cluster_bits) << q->cluster_bits >
        QCOW2_BITMAP_BYTES_MAX)
        return error_set(err, EFBIG,
                         "dirty bitmap '%s' cannot be persistent: with granularity %" PRIu64
                         " it would be larger than %" PRIu64 " bytes",
                         new->name, new->granularity, QCOW2_BITMAP_BYTES_MAX);
    r = plan_steps(&s, &place);
    storing_release(&s);
    return r < 0 ? error_wrap(err, r, "dirty bitmap '%s' cannot be persistent: node '%s'",
                              new->name, node_name(node))
                 : 0;
}

const struct bitmap_store qcow2_bitmap_store = {
    .co_check_new = store_co_check_new,
    .co_remove = store_co_remove,
    .co_remove_undo = store_co_remove_undo,
    .removed = store_removed,
};

void qcow2_bitmaps_release(struct qcow2 *q)
{
    struct qcow2_bitmap_removal *gone;

    if (!q->bitmaps)
        return;
    while ((gone = list_first(&q->bitmaps->removals, struct qcow2_bitmap_removal, link)))
        removal_free(gone);
    free(q->bitmaps->directory);
    free(take(&q->bitmaps));
}
