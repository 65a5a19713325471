/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Checking: counts all references to clusters of the file and compares them with the refcounts. A repair is a sequence of rounds,
 * each of which checks, mends one kind of damage, and leaves an image that is no worse (see docs/formats/qcow2.md).
 */
#include "base/alloc.h"
#include "base/checked.h"
#include "base/endian.h"
#include "formats/qcow2/check/qcow2-check-internal.h"
#include "graph/backend.h"
#include "loop/scope.h"

#include <errno.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#define LOADERS 16

/* ---- findings ---- */

static void __attribute__((format(printf, 2, 0)))
tell(struct check *x, const char *fmt, va_list args)
{
    char *line;

    if (x->quiet || !x->options->say)
        return;
    line = xvasprintf(fmt, args);
    x->options->say(x->options->arg, line);
    free(line);
}

void check_say(struct check *x, const char *fmt, ...)
{
    va_list args;

    va_start(args, fmt);
    tell(x, fmt, args);
    va_end(args);
}

void check_found(struct check *x, const char *fmt, ...)
{
    va_list args;

    x->r.corruptions++;
    va_start(args, fmt);
    tell(x, fmt, args);
    va_end(args);
}

int check_interrupted(const struct check *x)
{
    return x->options->interrupted && x->options->interrupted(x->options->arg) ? -EINTR : 0;
}

/* ---- references ---- */

/* The last cluster may be there in part. */
bool check_in_file(const struct check *x, uint64_t offset, uint64_t len)
{
    uint64_t size = check_known_size(x);
    uint64_t end;

    return checked_add(offset, len, &end) && (end <= size || end - size < x->cluster);
}

static bool there(struct check *x, uint64_t offset, uint64_t len)
{
    if (check_in_file(x, offset, len))
        return true;
    check_found(x,
                "ERROR: counting reference for region exceeding the end of the file by one cluster "
                "or more: offset 0x%" PRIx64 " size 0x%" PRIx64,
                offset, len);
    return false;
}

/* One cluster, which has a leaf then. */
static int refer_one(struct check *x, uint64_t cluster, uint64_t times, bool meta,
                     enum check_reference *ref)
{
    unsigned i = cluster & (QCOW2_LEAF - 1);
    struct qcow2_leaf *l;
    int r = qcow2_count_add(&x->counts, QCOW2_USED, cluster, times);

    if (r < 0)
        return r;
    l = qcow2_leaf_find(&x->counts, cluster);
    if (qcow2_leaf_bit(l, QCOW2_LEAF_META, i)) {
        qcow2_leaf_mark(l, QCOW2_LEAF_CLASH, i);
        *ref = CHECK_CLASH;
    }
    if (meta)
        qcow2_leaf_mark(l, QCOW2_LEAF_META, i);
    else if (qcow2_leaf_count(l, QCOW2_USED, i) > check_refcount_max(x))
        *ref = CHECK_CLASH; /* cannot be counted so often */
    return 0;
}

static int refer(struct check *x, uint64_t offset, uint64_t len, uint64_t times, bool meta,
                 enum check_reference *ret)
{
    int r = 0;

    *ret = CHECK_FINE;
    if (len == 0)
        return 0;
    *ret = CHECK_NOT_THERE;
    if (!there(x, offset, len))
        return 0;
    *ret = CHECK_FINE;
    for (uint64_t n = offset >> x->h.cluster_bits;
         n <= (offset + len - 1) >> x->h.cluster_bits && r == 0; n++)
        r = refer_one(x, n, times, meta, ret);
    return r;
}

int check_refer_meta(struct check *x, uint64_t offset, uint64_t len, uint64_t times,
                     enum check_reference *ret)
{
    return refer(x, offset, len, times, true, ret);
}

int check_refer_data(struct check *x, uint64_t offset, uint64_t len, uint64_t times,
                     enum check_reference *ret)
{
    return refer(x, offset, len, times, false, ret);
}

/* ---- the header ---- */

static void parse(struct check *x, const uint8_t *bytes, size_t len, int *r, struct error **err)
{
    error_free(err);
    *r = qcow2_header_parse(&x->h, bytes, len, check_known_size(x), x->name, err);
}

/* Finds another place for the refcount table, for the parser, so that the rest can be looked at. */
static bool parse_without_refcounts(struct check *x, uint8_t *bytes, size_t len, int *r,
                                    struct error **err)
{
    unsigned bits = load_be32(bytes + QCOW2_OFFSET_CLUSTER_BITS);
    uint64_t l1_end = load_be64(bytes + QCOW2_OFFSET_L1_OFFSET) +
                      (uint64_t)load_be32(bytes + QCOW2_OFFSET_L1_SIZE) * QCOW2_ENTRY_LEN;
    uint64_t cluster = (uint64_t)1 << MIN(bits, 21U);
    const uint64_t places[] = {cluster, align_up(l1_end, cluster), 2 * cluster};
    struct error *ignored = NULL;

    store_be32(bytes + QCOW2_OFFSET_REFCOUNT_TABLE_CLUSTERS, 1);
    for (unsigned i = 0; i < ARRAY_SIZE(places); i++) {
        store_be64(bytes + QCOW2_OFFSET_REFCOUNT_TABLE_OFFSET, places[i]);
        parse(x, bytes, len, r, &ignored);
        if (*r == 0)
            break;
    }
    if (*r == 0) {
        check_found(x, "ERROR refcount table: %s", error_text(*err));
        x->h.refcount_table_clusters = 0;
        x->bad_refcounts = true;
    }
    error_free(&ignored);
    return *r == 0;
}

/* What is broken is left out, one by one, until the rest makes sense. */
static int parse_in_parts(struct check *x, const uint8_t *bytes, size_t len, struct error **err)
{
    uint8_t *copy;
    struct error *why = NULL;
    int r;

    parse(x, bytes, len, &r, err);
    if (r == 0 || r == -ENOMEM || r == -ENOTSUP || len < QCOW2_HEADER_LENGTH_V3_MIN)
        return r;
    copy = try_alloc(len, 1);
    if (!copy)
        return -ENOMEM;
    memcpy(copy, bytes, len);
    copy[QCOW2_OFFSET_AUTOCLEAR + 7] &= (uint8_t)~QCOW2_AUTOCLEAR_BITMAPS;
    parse(x, copy, len, &r, &why);
    if (r == 0) {
        x->bad_bitmaps = true;
        check_found(x, "ERROR bitmaps: %s", error_text(*err));
    } else {
        memcpy(copy, bytes, len);
        store_be32(copy + QCOW2_OFFSET_SNAPSHOT_COUNT, 0);
        parse(x, copy, len, &r, &why);
        if (r == 0) {
            x->bad_snapshots = true;
            check_found(x, "ERROR snapshot table: %s", error_text(*err));
        }
    }
    if (r < 0) {
        memcpy(copy, bytes, len);
        (void)parse_without_refcounts(x, copy, len, &r, err);
    }
    free(copy);
    error_free(&why);
    if (r == 0)
        error_free(err);
    return r;
}

int check_read_header(struct check *x, struct error **err)
{
    size_t len = (size_t)MIN(x->file_size, QCOW2_HEADER_BYTES_MAX);
    uint8_t *bytes = try_alloc(len + 1, 1);
    uint64_t unknown;
    int r = bytes ? check_read_flat(x, 0, bytes, len) : -ENOMEM;

    if (r < 0)
        (void)error_set(err, -r, "cannot read the header: %s", strerror(-r));
    else
        r = parse_in_parts(x, bytes, len, err);
    free(bytes);
    if (r < 0)
        return r;
    unknown = x->h.incompatible & ~QCOW2_INCOMPATIBLE_KNOWN;
    if (unknown)
        return error_set(err, ENOTSUP, "incompatible features 0x%" PRIx64 " are not known",
                         unknown);
    x->cluster = qcow2_header_cluster_size(&x->h);
    x->clusters = (x->file_size + x->cluster - 1) >> x->h.cluster_bits;
    x->l2_entry = check_has_extended_l2(x) ? QCOW2_L2_EXTENDED_ENTRY_LEN : QCOW2_ENTRY_LEN;
    x->r.total_clusters = (x->h.size + x->cluster - 1) >> x->h.cluster_bits;
    return 0;
}

/* ---- refcounts ---- */

/* Counts beyond the end of the file are nobody's. */
static int store_counts(struct check *x, uint64_t first, const uint8_t *block)
{
    uint64_t end = MIN(first + check_block_entries(x), x->clusters + 1);
    uint64_t n = end > first ? end - first : 0;
    int r = 0;

    for (uint64_t i = 0; i < n && r == 0; i++) {
        uint64_t count =
            x->h.refcount_order == 4 ? load_be16(block + 2 * i) : check_refcount_get(x, block, i);
        struct qcow2_leaf *l;

        if (count == 0)
            continue;
        l = qcow2_leaf_find(&x->counts, first + i);
        if (likely(l && count <= UINT8_MAX && !l->wide[QCOW2_STORED]))
            l->narrow[QCOW2_STORED][(first + i) & (QCOW2_LEAF - 1)] = (uint8_t)count;
        else
            r = qcow2_count_add(&x->counts, QCOW2_STORED, first + i, count);
    }
    return r;
}

struct block_walk {
    struct check *x;
    uint64_t next;
    int result;
};

static int co_fn load_block(struct check *x, uint64_t index, struct iobuf *b)
{
    uint64_t first = index * check_block_entries(x);
    int r;

    if (x->table[index] == 0 || first > x->clusters)
        return 0;
    r = check_read(x, x->table[index], b, (size_t)x->cluster);
    if (r < 0) {
        x->r.check_errors++;
        check_say(x, "ERROR reading refcount block %" PRIu64 ": %s", index, strerror(-r));
        return 0;
    }
    return store_counts(x, first, b->data);
}

static void co_fn load_blocks(void *arg)
{
    struct block_walk *w = arg;
    struct iobuf *b = iobuf_new((size_t)w->x->cluster);
    int r = b ? 0 : -ENOMEM;

    while (r == 0 && w->result == 0 && w->next < w->x->table_size) {
        uint64_t index = w->next++;

        if (w->x->table[index] == 0)
            continue;
        r = check_interrupted(w->x);
        if (r == 0)
            r = load_block(w->x, index, b);
    }
    if (r < 0 && w->result == 0)
        w->result = r;
    iobuf_unref(b);
}

/* An entry of the table that can be followed, or 0. */
static uint64_t block_of_entry(struct check *x, uint64_t index, uint64_t entry)
{
    uint64_t offset = entry & QCOW2_REFCOUNT_TABLE_OFFSET_MASK;

    if (entry & QCOW2_REFCOUNT_TABLE_RESERVED_MASK) {
        x->bad_refcounts = true;
        check_found(x, "ERROR refcount table entry %" PRIu64 " has reserved bits set", index);
    }
    if (offset == 0)
        return 0;
    if (!check_is_aligned(x, offset)) {
        x->bad_refcounts = true;
        check_found(x,
                    "ERROR refcount block %" PRIu64
                    " is not cluster aligned; refcount table entry corrupted",
                    index);
        return 0;
    }
    if (offset >= check_known_size(x)) {
        x->bad_refcounts = true;
        check_found(x, "ERROR refcount block %" PRIu64 " is outside image", index);
        return 0;
    }
    return offset;
}

int check_load_table(struct check *x)
{
    int r;

    x->table_size = ((uint64_t)x->h.refcount_table_clusters << x->h.cluster_bits) / QCOW2_ENTRY_LEN;
    x->table = try_new_n(uint64_t, (size_t)x->table_size + 1);
    if (!x->table)
        return -ENOMEM;
    r = check_read_flat(x, x->h.refcount_table_offset, x->table,
                        (size_t)x->table_size * QCOW2_ENTRY_LEN);
    for (uint64_t i = 0; r == 0 && i < x->table_size; i++)
        x->table[i] = block_of_entry(x, i, load_be64(&x->table[i]));
    return r;
}

int check_load_blocks(struct check *x)
{
    unsigned loaders = x->online ? 1 : LOADERS; /* or their reads would wait for each other */
    struct block_walk w = {.x = x};
    struct co_scope s;

    co_scope_init(&s);
    for (unsigned i = 0; i < loaders && w.next < x->table_size; i++) {
        int r = co_scope_start(&s, load_blocks, &w);

        if (r < 0 && w.result == 0)
            w.result = r;
    }
    co_scope_join(&s);
    return w.result;
}

int check_refer_refcounts(struct check *x)
{
    enum check_reference ref;
    int r = check_refer_meta(x, x->h.refcount_table_offset,
                             (uint64_t)x->h.refcount_table_clusters << x->h.cluster_bits, 1, &ref);

    x->bad_refcounts |= ref != CHECK_FINE;
    for (uint64_t i = 0; i < x->table_size && r == 0; i++) {
        if (x->table[i] == 0)
            continue;
        r = check_refer_meta(x, x->table[i], x->cluster, 1, &ref);
        x->bad_refcounts |= ref != CHECK_FINE;
    }
    return r;
}

/* After all references are counted: blocks that are used for something else, or that came before. */
static int check_blocks_alone(struct check *x)
{
    int r = 0;

    for (uint64_t i = 0; i < x->table_size; i++) {
        if (x->table[i])
            qcow2_count_sub(&x->counts, QCOW2_USED, x->table[i] >> x->h.cluster_bits, 1);
    }
    for (uint64_t i = 0; i < x->table_size && r == 0; i++) {
        uint64_t cluster = x->table[i] >> x->h.cluster_bits;
        uint64_t uses;

        if (x->table[i] == 0)
            continue;
        r = qcow2_count_add(&x->counts, QCOW2_USED, cluster, 1);
        uses = qcow2_count(&x->counts, QCOW2_USED, cluster);
        if (uses == 1)
            continue;
        x->bad_refcounts = true;
        check_found(x, "ERROR refcount block %" PRIu64 " refcount=%" PRIu64, i, uses);
    }
    return r;
}

/* ---- comparing ---- */

static void compare_one(struct check *x, struct qcow2_leaf *l, unsigned i)
{
    uint64_t cluster = (l->index << QCOW2_LEAF_BITS) + i;
    uint64_t stored = qcow2_leaf_count(l, QCOW2_STORED, i);
    uint64_t used = qcow2_leaf_count(l, QCOW2_USED, i);

    if (stored < used) {
        x->low++;
        check_found(x, "ERROR cluster %" PRIu64 " refcount=%" PRIu64 " reference=%" PRIu64, cluster,
                    stored, used);
    } else if (stored > used && cluster < x->clusters) {
        x->r.leaks++;
        check_say(x, "Leaked cluster %" PRIu64 " refcount=%" PRIu64 " reference=%" PRIu64, cluster,
                  stored, used);
    } else if (qcow2_leaf_bit(l, QCOW2_LEAF_CLASH, i) && stored == used) {
        check_found(x, "ERROR cluster %" PRIu64 " holds metadata and is used otherwise as well",
                    cluster);
    }
}

static bool any_clash(const struct qcow2_leaf *l)
{
    uint64_t any = 0;

    for (unsigned i = 0; i < ARRAY_SIZE(l->bits[QCOW2_LEAF_CLASH]); i++)
        any |= l->bits[QCOW2_LEAF_CLASH][i];
    return any;
}

static void compare_leaf(struct check *x, struct qcow2_leaf *l)
{
    uint64_t first = l->index << QCOW2_LEAF_BITS;
    bool alike = !l->wide[QCOW2_USED] && !l->wide[QCOW2_STORED] && !any_clash(l) &&
                 memcmp(l->narrow[QCOW2_USED], l->narrow[QCOW2_STORED], QCOW2_LEAF) == 0;

    for (unsigned i = 0; i < QCOW2_LEAF && !alike; i++)
        compare_one(x, l, i);
    for (unsigned i = QCOW2_LEAF; i-- > 0;) {
        if (!qcow2_leaf_count(l, QCOW2_USED, i) && !qcow2_leaf_count(l, QCOW2_STORED, i))
            continue;
        x->r.image_end_offset = (first + i + 1) << x->h.cluster_bits;
        return;
    }
}

/* After all references are counted. */
int check_compare(struct check *x)
{
    struct qcow2_leaf **v;
    int r = check_blocks_alone(x);

    if (r < 0)
        return r;
    v = qcow2_counts_sorted(&x->counts);
    if (!v)
        return -ENOMEM;
    for (size_t i = 0; i < x->counts.leaf_count; i++)
        compare_leaf(x, v[i]);
    free(v);
    return 0;
}

/* ---- a round ---- */

void check_forget(struct check *x)
{
    qcow2_header_release(&x->h);
    qcow2_counts_release(&x->counts);
    free(x->table);
    free(x->l2);
    free(x->snapshots);
    free(x->snapshot_bytes);
    *x = (struct check){
        .options = x->options,
        .backend = x->backend,
        .edge = x->edge,
        .by = x->by,
        .name = x->name,
        .quiet = x->quiet,
        .online = x->online,
        .spare = x->spare,
        .spare_count = x->spare_count,
    };
}

int check_refer_early(struct check *x)
{
    enum check_reference ref;
    int r;

    if ((r = check_refer_meta(x, 0, x->cluster, 1, &ref)) < 0 ||
        (r = check_refer_meta(x, x->h.l1_offset, (uint64_t)x->h.l1_size * QCOW2_ENTRY_LEN, 1,
                              &ref)) < 0 ||
        (r = check_luks_header(x)) < 0 ||
        (r = check_l1(x, x->h.l1_offset, x->h.l1_size, true)) < 0 ||
        (r = check_refer_l2_tables(x)) < 0 || (r = check_snapshot_table(x)) < 0)
        return r;
    return check_bitmaps(x);
}

int check_failed(struct check *x, int r, struct error **err)
{
    if (r == -EINTR)
        return error_set(err, EINTR, "interrupted");
    if (r == -ENOMEM)
        return error_set(err, ENOMEM, "no memory: %" PRIu64 " bytes are in use, %" PRIu64 " may be",
                         x->counts.memory, x->options->memory_max);
    return error_set(err, -r, "cannot read the image: %s", strerror(-r));
}

int check_round(struct check *x, struct error **err)
{
    int r;

    check_forget(x);
    x->counts.memory_max = x->options->memory_max;
    x->file_size = check_file_size(x);
    r = check_read_header(x, err);
    if (r < 0)
        return r;
    if ((r = check_load_table(x)) < 0 || (r = check_load_blocks(x)) < 0 ||
        (r = check_refer_early(x)) < 0 || (r = check_refer_refcounts(x)) < 0 ||
        (r = check_l2_tables(x)) < 0 || (r = check_compare(x)) < 0)
        return check_failed(x, r, err);
    return 0;
}

/* ---- repairing ---- */

/* One kind of damage after the other; the later ones rely on what the earlier ones have mended. */
enum repair_step {
    STEP_BITMAPS,
    STEP_REBUILD, /* before anything is written to what may be a refcount block, too */
    STEP_ENTRIES,
    STEP_RAISE,
    STEP_COPIES,
    STEP_LEAKS,
    STEP_COPIED,
    STEPS,
};

/* How often one may come: what is not mended then will not be. */
#define STEP_TIMES 4

/* With refcounts that are right, flags are safe to mend: also where leaks alone shall be repaired, as the peer does it. */
static bool only_flags(const struct check *x)
{
    return x->bad_copied && x->r.corruptions == x->bad_copied && !x->r.leaks;
}

static bool step_needed(const struct check *x, enum repair_step step, uint64_t copies)
{
    bool all = x->options->repair == QCOW2_REPAIR_ALL;

    switch (step) {
    case STEP_BITMAPS:
        return all && x->bad_bitmaps;
    case STEP_ENTRIES:
        return all && x->bad_entries;
    case STEP_REBUILD:
        return all && x->bad_refcounts;
    case STEP_RAISE:
        return all && (x->low || copies > x->spare_count);
    case STEP_COPIES:
        return all && (copies || x->bad_snapshots);
    case STEP_LEAKS: /* what damaged tables point to is not known to be free */
        return x->r.leaks && !x->bad_entries && !x->bad_snapshots;
    case STEP_COPIED:
        return all ? x->bad_copied : only_flags(x);
    case STEPS:
        break;
    }
    return false;
}

static int co_fn repair_one(struct check *x, enum repair_step step, uint64_t copies,
                            struct error **err)
{
    switch (step) {
    case STEP_BITMAPS:
        return check_drop_bitmaps(x, err);
    case STEP_ENTRIES:
        return check_mend_entries(x, err);
    case STEP_REBUILD:
        return check_raise_refcounts(x, 0, err);
    case STEP_RAISE:
        return check_raise_refcounts(x, copies, err);
    case STEP_COPIES:
        return check_make_copies(x, err);
    case STEP_LEAKS:
        return check_lower_refcounts(x, err);
    case STEP_COPIED:
        return check_mend_copied(x, err);
    case STEPS:
        break;
    }
    return 0;
}

/* What is to be done next; STEPS if nothing is. */
static enum repair_step next_step(const struct check *x, unsigned *times, uint64_t copies)
{
    for (enum repair_step step = 0; step < STEPS; step++) {
        if (times[step] < STEP_TIMES && step_needed(x, step, copies)) {
            times[step]++;
            return step;
        }
    }
    return STEPS;
}

/* Mends one kind, looks again, and so on. Only the actions and what is left in the end are told. */
static int co_fn repair(struct check *x, struct error **err)
{
    struct qcow2_check_result first = x->r;
    unsigned times[STEPS] = {0};
    int r = 0;

    while (r == 0) {
        uint64_t copies = check_copies_need(x);
        enum repair_step step = next_step(x, times, copies);

        if (step == STEPS)
            break;
        x->quiet = false;
        r = repair_one(x, step, copies, err);
        x->quiet = true;
        if (r == 0)
            r = check_round(x, err);
        if (r == 0 && x->r.check_errors) /* what cannot be read cannot be known to be free */
            r = error_set(err, EIO, "cannot read all of the image's tables any more");
    }
    x->quiet = false;
    if (r == 0)
        r = check_round(x, err);
    if (r < 0)
        return r;
    x->r.corruptions_fixed = first.corruptions - MIN(first.corruptions, x->r.corruptions);
    x->r.leaks_fixed = first.leaks - MIN(first.leaks, x->r.leaks);
    return 0;
}

static int co_fn run(struct check *x, struct error **err)
{
    int r = check_round(x, err);
    bool sound;

    if (r < 0 || x->options->repair == QCOW2_REPAIR_NOTHING)
        return r;
    if (x->r.check_errors)
        return 0; /* as below: nothing is known to be free */
    if (x->r.leaks || only_flags(x) || (x->r.corruptions && x->options->repair == QCOW2_REPAIR_ALL))
        r = repair(x, err);
    sound = r == 0 && !x->r.corruptions && !x->r.check_errors;
    return sound ? check_clear_marks(x, err) : r;
}

int qcow2_co_check(struct backend *file, const struct qcow2_check_options *options,
                   struct qcow2_check_result *ret, struct error **err)
{
    struct check x = {.options = options, .backend = file, .name = backend_owner(file)};
    int r = run(&x, err);

    *ret = x.r;
    check_forget(&x);
    return r;
}

int qcow2_co_repair_refcounts(struct edge *file, const struct request *by, const char *node_name,
                              struct error **err)
{
    struct qcow2_check_options options = QCOW2_CHECK_OPTIONS_INIT;
    struct check x = {.options = &options, .edge = file, .by = by, .name = node_name};
    struct qcow2_check_result found;
    int r;

    options.repair = QCOW2_REPAIR_ALL;
    r = run(&x, err);
    found = x.r;
    check_forget(&x);
    if (r < 0)
        return error_wrap(err, r, "node '%s': the image is marked dirty, and cannot be repaired",
                          node_name);
    if (found.corruptions || found.check_errors)
        return error_set(err, EIO,
                         "node '%s': the image is marked dirty, and %" PRIu64
                         " of its errors cannot be repaired",
                         node_name, found.corruptions + found.check_errors);
    return 0;
}

int qcow2_co_change_refcount_width(struct edge *file, const struct request *by,
                                   const char *node_name, unsigned order, struct error **err)
{
    struct qcow2_check_options options = QCOW2_CHECK_OPTIONS_INIT;
    struct check x = {.options = &options, .edge = file, .by = by, .name = node_name};
    int r = check_round(&x, err);

    if (r == 0 && x.r.corruptions + x.r.check_errors)
        r = error_set(err, EINVAL,
                      "the image has %" PRIu64 " errors: repair it first, with cairn check -r all",
                      x.r.corruptions + x.r.check_errors);
    if (r == 0)
        r = check_change_width(&x, order, err);
    check_forget(&x);
    return r;
}
