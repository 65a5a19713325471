/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Metadata beside the active mappings: internal snapshots, bitmaps, the LUKS header. What is read is bounded by the size of the
 * file, as nothing that overlaps with other metadata is looked into.
 */
#include "base/alloc.h"
#include "base/checked.h"
#include "base/endian.h"
#include "formats/qcow2/check/qcow2-check-internal.h"
#include "formats/qcow2/qcow2-snapshot.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

/* ---- snapshots ---- */

/* The table up to `len` bytes is in memory; -ERANGE if the file, or the format, has not so much. */
static int co_fn need_snapshot_bytes(struct check *x, size_t len)
{
    uint64_t left = x->file_size - MIN(x->file_size, x->h.snapshots_offset);
    size_t max;
    uint8_t *bytes;
    int r;

    if (len <= x->snapshot_len)
        return 0;
    if (len > left || len > QCOW2_SNAPSHOTS_BYTES_MAX)
        return -ERANGE;
    max = (size_t)MIN((uint64_t)MAX(len, x->snapshot_len * 2 + 4096), left);
    bytes = realloc(x->snapshot_bytes, max);
    if (!bytes)
        return -ENOMEM;
    x->snapshot_bytes = bytes;
    r = check_read_flat(x, x->h.snapshots_offset + x->snapshot_len, bytes + x->snapshot_len,
                        max - x->snapshot_len);
    if (r == 0)
        x->snapshot_len = max;
    return r;
}

/* The entry at byte `at` of the table; 1 if it is one, 0 if it makes no sense. */
static int co_fn read_snapshot(struct check *x, size_t at, uint32_t number,
                               struct check_snapshot *ret)
{
    struct qcow2_snapshot s;
    int r;

    while ((r = qcow2_snapshot_parse(x->snapshot_bytes, x->snapshot_len, at, &s)) == -ERANGE) {
        r = need_snapshot_bytes(x, at + s.len);
        if (r < 0)
            return r == -ERANGE ? 0 : r;
    }
    if (r < 0)
        return 0;
    *ret = (struct check_snapshot){
        .at = at,
        .len = s.len,
        .l1_offset = s.l1_offset,
        .l1_size = s.l1_size,
        .incomplete = x->h.version >= 3 && !s.has_disk_size,
    };
    if (ret->incomplete) {
        x->bad_snapshots = true;
        check_found(x, "ERROR snapshot table entry %" PRIu32 " is incomplete", number);
    }
    return 1;
}

static int co_fn read_snapshot_table(struct check *x, size_t *ret_len)
{
    size_t at = 0;

    x->snapshots = try_new_n(struct check_snapshot, MAX(x->h.snapshot_count, 1U));
    if (!x->snapshots)
        return -ENOMEM;
    for (uint32_t i = 0; i < x->h.snapshot_count; i++) {
        int r = read_snapshot(x, at, i, &x->snapshots[i]);

        if (r < 0)
            return r;
        if (r == 0) {
            x->bad_snapshots = true;
            check_found(x,
                        "ERROR snapshot table entry %" PRIu32 " at offset 0x%" PRIx64
                        " is broken, and with it all that follow",
                        i, x->h.snapshots_offset + at);
            break;
        }
        x->snapshot_count++;
        *ret_len = at + x->snapshots[i].len;
        at = align_up(*ret_len, 8);
    }
    return 0;
}

static const char *snapshot_problem(const struct check *x, const struct check_snapshot *s)
{
    uint64_t len = (uint64_t)s->l1_size * QCOW2_ENTRY_LEN;

    if (!check_is_aligned(x, s->l1_offset))
        return "L1 table is not cluster aligned; snapshot table entry corrupted";
    if (len > QCOW2_L1_BYTES_MAX)
        return "L1 table is too large; snapshot table entry corrupted";
    if (len && !check_in_file(x, s->l1_offset, len))
        return "L1 table is outside the image; snapshot table entry corrupted";
    return NULL;
}

static int co_fn check_snapshot_l1(struct check *x, uint32_t number, struct check_snapshot *s)
{
    const char *problem = snapshot_problem(x, s);
    enum check_reference ref = CHECK_FINE;
    int r = 0;

    if (!problem && s->l1_size)
        r = check_refer_meta(x, s->l1_offset, (uint64_t)s->l1_size * QCOW2_ENTRY_LEN, 1, &ref);
    if (ref == CHECK_CLASH)
        problem = "L1 table overlaps with other metadata";
    if (problem) {
        s->bad = true;
        x->bad_snapshots = true;
        check_found(x,
                    "ERROR snapshot %" PRIu32 " l1_offset=0x%" PRIx64 " l1_size=0x%" PRIx32 ": %s",
                    number, s->l1_offset, s->l1_size, problem);
        return r;
    }
    return r < 0 ? r : check_l1(x, s->l1_offset, s->l1_size, false);
}

int check_snapshot_table(struct check *x)
{
    enum check_reference ref = CHECK_FINE;
    size_t len = 0;
    int r = 0;

    if (x->h.snapshot_count)
        r = read_snapshot_table(x, &len);
    if (r == 0 && len)
        r = check_refer_meta(x, x->h.snapshots_offset, len, 1, &ref);
    if (ref == CHECK_CLASH) {
        x->bad_snapshots = true;
        check_found(x, "ERROR snapshot table at offset 0x%" PRIx64 " overlaps with other metadata",
                    x->h.snapshots_offset);
    }
    for (uint32_t i = 0; i < x->snapshot_count && r == 0; i++)
        r = check_snapshot_l1(x, i, &x->snapshots[i]);
    return r == 0 ? check_refer_l2_tables(x) : r;
}

/* ---- bitmaps ---- */

#define BITMAP_TABLE_SIZE  8
#define BITMAP_FLAGS       12
#define BITMAP_TYPE        16
#define BITMAP_GRANULARITY 17
#define BITMAP_NAME_LEN    18
#define BITMAP_EXTRA_LEN   20

#define BITMAP_FLAGS_RESERVED UINT32_C(0xfffffff8)
#define BITMAP_TYPE_DIRTY     1
#define BITMAP_NAME_MAX       1023

#define BITMAP_ENTRY_ONES     UINT64_C(1)
#define BITMAP_ENTRY_RESERVED UINT64_C(0xff000000000001fe)

static void bad_bitmap(struct check *x, uint32_t number, const char *problem)
{
    x->bad_bitmaps = true;
    check_found(x, "ERROR bitmap %" PRIu32 ": %s", number, problem);
}

static int refer_bitmap_data(struct check *x, uint32_t number, uint64_t entry)
{
    uint64_t offset = entry & QCOW2_OFFSET_MASK;
    enum check_reference ref;
    int r;

    if ((entry & BITMAP_ENTRY_RESERVED) || (offset && (entry & BITMAP_ENTRY_ONES))) {
        bad_bitmap(x, number, "its table has an entry with reserved bits set");
        return 0;
    }
    if (offset == 0)
        return 0;
    if (!check_is_aligned(x, offset)) {
        bad_bitmap(x, number, "its table has an entry that is not cluster aligned");
        return 0;
    }
    r = check_refer_meta(x, offset, x->cluster, 1, &ref);
    if (ref == CHECK_NOT_THERE)
        x->bad_bitmaps = true; /* told */
    else if (ref == CHECK_CLASH)
        bad_bitmap(x, number, "its data overlaps with other metadata");
    return r;
}

static int co_fn check_bitmap_table(struct check *x, uint32_t number, uint64_t offset,
                                    uint64_t size)
{
    struct iobuf *b;
    enum check_reference ref;
    int r = check_refer_meta(x, offset, size * QCOW2_ENTRY_LEN, 1, &ref);

    if (ref == CHECK_NOT_THERE)
        x->bad_bitmaps = true; /* told */
    else if (ref == CHECK_CLASH)
        bad_bitmap(x, number, "its table overlaps with other metadata");
    if (r < 0 || ref != CHECK_FINE)
        return r;
    b = iobuf_new(CHECK_PIECE);
    if (!b)
        return -ENOMEM;
    for (uint64_t at = 0; at < size && r == 0; at += CHECK_PIECE / QCOW2_ENTRY_LEN) {
        uint64_t n = MIN(size - at, (uint64_t)CHECK_PIECE / QCOW2_ENTRY_LEN);

        r = check_interrupted(x);
        if (r == 0)
            r = check_read(x, offset + at * QCOW2_ENTRY_LEN, b, (size_t)n * QCOW2_ENTRY_LEN);
        for (uint64_t i = 0; i < n && r == 0; i++)
            r = refer_bitmap_data(x, number, load_be64(b->data + i * QCOW2_ENTRY_LEN));
    }
    iobuf_unref(b);
    return r;
}

static const char *bitmap_problem(const struct check *x, const uint8_t *e)
{
    uint16_t name = load_be16(e + BITMAP_NAME_LEN);

    if (load_be64(e) == 0 || !check_is_aligned(x, load_be64(e)))
        return "its table is not cluster aligned";
    if (load_be32(e + BITMAP_TABLE_SIZE) == 0)
        return "its table is empty";
    if (load_be32(e + BITMAP_FLAGS) & BITMAP_FLAGS_RESERVED)
        return "it has unknown flags";
    if (e[BITMAP_TYPE] != BITMAP_TYPE_DIRTY)
        return "it is of an unknown type";
    if (e[BITMAP_GRANULARITY] > 63)
        return "its granularity is too large";
    if (name == 0 || name > BITMAP_NAME_MAX)
        return "its name has a bad length";
    return NULL;
}

/* All entries of the directory, which has `len` bytes. */
static int co_fn check_bitmap_entries(struct check *x, const uint8_t *dir, size_t len)
{
    size_t at = 0;

    for (uint32_t i = 0; i < x->h.bitmap_count; i++) {
        const uint8_t *e = dir + at;
        const char *problem;
        uint64_t whole;
        int r;

        if (len - at < QCOW2_BITMAP_ENTRY_LEN_MIN) {
            bad_bitmap(x, i, "the directory ends before it");
            return 0;
        }
        whole = align_up((uint64_t)QCOW2_BITMAP_ENTRY_LEN_MIN + load_be16(e + BITMAP_NAME_LEN) +
                             load_be32(e + BITMAP_EXTRA_LEN),
                         8);
        problem = whole > len - at ? "the directory ends within it" : bitmap_problem(x, e);
        if (problem) {
            bad_bitmap(x, i, problem);
            return 0;
        }
        r = check_bitmap_table(x, i, load_be64(e), load_be32(e + BITMAP_TABLE_SIZE));
        if (r < 0)
            return r;
        at += (size_t)whole;
    }
    if (at != len)
        bad_bitmap(x, x->h.bitmap_count, "the directory has more than the header says");
    return 0;
}

int check_bitmaps(struct check *x)
{
    size_t len = (size_t)x->h.bitmap_directory_size;
    enum check_reference ref;
    uint8_t *dir;
    int r;

    if (!x->h.has_bitmaps)
        return 0;
    r = check_refer_meta(x, x->h.bitmap_directory_offset, len, 1, &ref);
    if (r < 0 || ref != CHECK_FINE) {
        x->bad_bitmaps = true;
        if (ref == CHECK_CLASH)
            check_found(x, "ERROR bitmap directory overlaps with other metadata");
        return r;
    }
    dir = try_alloc(len, 1);
    r = dir ? check_read_flat(x, x->h.bitmap_directory_offset, dir, len) : -ENOMEM;
    if (r == 0)
        r = check_bitmap_entries(x, dir, len);
    free(dir);
    return r;
}

/* ---- encryption ---- */

/* Offset and length, 8 bytes each. */
#define LUKS_EXTENSION_LEN 16

int check_luks_header(struct check *x)
{
    enum check_reference ref = CHECK_FINE;
    int r = 0;

    for (unsigned i = 0; i < x->h.extension_count && r == 0; i++) {
        const struct qcow2_extension *e = &x->h.extensions[i];

        if (e->type != QCOW2_EXTENSION_ENCRYPTION || x->h.crypt_method != QCOW2_CRYPT_LUKS)
            continue;
        if (e->len != LUKS_EXTENSION_LEN) {
            check_found(x,
                        "ERROR header extension for encryption has %" PRIu32 " bytes, expected %d",
                        e->len, LUKS_EXTENSION_LEN);
            continue;
        }
        if (!check_is_aligned(x, load_be64(e->data)))
            check_found(x, "ERROR LUKS header at offset 0x%" PRIx64 " is not cluster aligned",
                        load_be64(e->data));
        r = check_refer_meta(x, load_be64(e->data), load_be64(e->data + 8), 1, &ref);
        if (ref == CHECK_CLASH)
            check_found(x, "ERROR LUKS header at offset 0x%" PRIx64 " overlaps with other metadata",
                        load_be64(e->data));
    }
    return r;
}
