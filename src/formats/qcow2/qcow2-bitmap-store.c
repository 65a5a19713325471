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
#include "bitmaps/dirty-bitmap.h"
#include "formats/qcow2/qcow2-bitmap.h"
#include "formats/qcow2/qcow2-header-bitmaps.h"

#include <assert.h>
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

/* A directory that is going to take the place of another one. */
struct storing {
    struct qcow2 *q;
    const struct request *by;
    struct error **err;

    struct qcow2_bitmap_writer w;
    uint8_t *directory;
    size_t len;
    size_t max;
    uint32_t count;
    uint64_t offset;
    struct qcow2_header_steps *steps;
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
    qcow2_bitmap_writer_release(&s->w);
    free(s->directory);
    free(s->steps);
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
    r = qcow2_bitmap_take_row(&s->w, s->len, &at);
    s->offset = at.host_offset;
    for (size_t from = 0; r == 0 && from < s->len; from += QCOW2_BITMAP_PIECE) {
        size_t n = MIN(s->len - from, QCOW2_BITMAP_PIECE);

        memcpy(s->w.data->data, s->directory + from, n);
        r = qcow2_bitmap_write_bytes(&s->w, at.host_offset + from, s->w.data, 0, n);
    }
    return r;
}

/* The new directory takes the old one's place, on the disk (STORED-2, STORED-3). */
static int co_fn publish(struct storing *s)
{
    struct qcow2_bitmaps_place place = {.count = s->count, .directory_size = s->len};
    int r = write_directory(s);

    if (r == 0)
        r = qcow2_bitmap_space_settle(&s->w.freed, s->q, s->by);
    if (r == 0)
        qcow2_bitmap_space_subtract(&s->w.freed, &s->w.stays);
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
    r = qcow2_bitmap_write(&s->w, dirty_bitmap_bits_to_store(d), old, &e);
    return r < 0 ? r : append_entry(s, &e);
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
    int r = qcow2_bitmap_writer_init(&s->w, s->q, s->by);

    if (r == 0 && b->directory)
        r = qcow2_bitmap_entries(b->directory, b->len, b->count, &v, &problem);
    if (r == 0 && v)
        r = qcow2_bitmap_space_add_range(&s->w.freed, s->q, b->offset, b->len);
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
        put_back_taken(&s.w.taken, q);
    } else {
        qcow2_bitmap_space_give_back(&s.w.freed, q); /* STORED-4 */
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
    struct iobuf *table = NULL;
    int r = qcow2_bitmap_writer_init(&s->w, s->q, s->by);

    if (r == 0)
        r = qcow2_bitmap_space_add_range(&s->w.freed, s->q, b->offset, b->len);
    for (uint32_t i = 0; r == 0 && i < b->count; i++) {
        if (&v[i] != gone)
            r = append_entry(s, &v[i]);
    }
    if (r == 0)
        r = qcow2_bitmap_space_add(&s->w.freed, s->q, s->by, gone, &table);
    iobuf_unref(table);
    return r < 0 ? failed(s, r, "write the directory of bitmaps") : publish(s);
}

/* What was done stays known until the change has ended. */
static void note_removal(struct storing *s, struct qcow2_bitmap_removal *gone, const char *name)
{
    struct qcow2_bitmaps *b = s->q->bitmaps;

    gone->name = xstrdup(name);
    gone->before = *b;
    gone->taken = s->w.taken;
    gone->freed = s->w.freed;
    gone->steps = take(&s->steps);
    s->w.taken = s->w.freed = (struct qcow2_bitmap_space){.v = NULL};
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
        put_back_taken(&s.w.taken, q);
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
