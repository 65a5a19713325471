/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The log: a ring of entries, each of whole sectors of 4 KiB: a header, descriptors, and a sector for each descriptor that has
 * data. What must be replayed is the sequence of entries, each with the number after that of the one before, which ends in the
 * highest number and holds the entry that its last one calls its tail; from there on.
 *
 * The bytes of a sector that the log uses for itself, the first eight and the last four, stand in the descriptor.
 */
#include "base/alloc.h"
#include "base/checked.h"
#include "base/crc32c.h"
#include "base/endian.h"
#include "formats/vhdx/vhdx-internal.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#define ENTRY_HEADER_LEN 64
#define DESCRIPTOR_LEN   32
#define ENTRY_SUM_AT     4

/* Sums are computed over so many times the log's length at most: entries of a sound log hardly overlap. */
#define SUM_FACTOR 4

/* Where the fields of an entry lie, and those of a descriptor. */
enum {
    AT_LEN = 8,
    AT_TAIL = 12,
    AT_NUMBER = 16,
    AT_COUNT = 24,
    AT_GUID = 32,
    AT_FLUSHED = 48,
    AT_LAST = 56,

    AT_TRAILING = 4,
    AT_LEADING = 8, /* of zeroes: their length */
    AT_OFFSET = 16,
    AT_DESCRIPTOR_NUMBER = 24,
};

/* What begins in a sector of the log. */
struct entry {
    uint32_t len; /* 0: none that is sound */
    uint32_t tail;
    uint64_t number;
};

struct reading {
    const char *name;
    const uint8_t *guid;
    uint8_t *bytes; /* the log, and once more its begin: entries go round */
    uint32_t len;
    struct entry *entries; /* one for each sector */
    uint64_t summed;
};

static uint32_t sectors_of(const struct reading *x)
{
    return x->len / VHDX_LOG_SECTOR;
}

/* ---- entries ---- */

/* How much header and descriptors take. */
static uint64_t head_len(const uint8_t *e)
{
    return align_up(ENTRY_HEADER_LEN + (uint64_t)load_le32(e + AT_COUNT) * DESCRIPTOR_LEN,
                    VHDX_LOG_SECTOR);
}

/* Do the descriptors say what they should, and does each that needs it have its sector? */
static bool has_sound_descriptors(const uint8_t *e)
{
    uint64_t data = head_len(e);
    uint64_t number = load_le64(e + AT_NUMBER);

    if (data > load_le32(e + AT_LEN))
        return false;
    for (uint32_t i = 0; i < load_le32(e + AT_COUNT); i++) {
        const uint8_t *d = e + ENTRY_HEADER_LEN + (size_t)i * DESCRIPTOR_LEN;

        if (load_le64(d + AT_DESCRIPTOR_NUMBER) != number ||
            !is_aligned(load_le64(d + AT_OFFSET), VHDX_LOG_SECTOR))
            return false;
        if (memcmp(d, "zero", 4) == 0) {
            if (!is_aligned(load_le64(d + AT_LEADING), VHDX_LOG_SECTOR))
                return false;
            continue;
        }
        if (memcmp(d, "desc", 4) != 0 || data + VHDX_LOG_SECTOR > load_le32(e + AT_LEN) ||
            memcmp(e + data, "data", 4) != 0 || load_le32(e + data + 4) != number >> 32 ||
            load_le32(e + data + VHDX_LOG_SECTOR - 4) != (uint32_t)number)
            return false;
        data += VHDX_LOG_SECTOR;
    }
    return true;
}

static void look_at_sector(struct reading *x, uint32_t sector)
{
    const uint8_t *e = x->bytes + (size_t)sector * VHDX_LOG_SECTOR;
    uint32_t len = load_le32(e + AT_LEN);

    if (memcmp(e, "loge", 4) != 0 || memcmp(e + AT_GUID, x->guid, VHDX_GUID_LEN) != 0 || !len ||
        len > x->len || !is_aligned(len, VHDX_LOG_SECTOR) || !load_le64(e + AT_NUMBER) ||
        !is_aligned(load_le32(e + AT_TAIL), VHDX_LOG_SECTOR) || load_le32(e + AT_TAIL) >= x->len)
        return;
    x->summed += len;
    if (x->summed > (uint64_t)SUM_FACTOR * x->len ||
        vhdx_sum(e, len, ENTRY_SUM_AT) != load_le32(e + ENTRY_SUM_AT) || !has_sound_descriptors(e))
        return;
    x->entries[sector] = (struct entry){
        .len = len, .tail = load_le32(e + AT_TAIL), .number = load_le64(e + AT_NUMBER)};
}

static uint32_t next_sector(const struct reading *x, uint32_t sector)
{
    return (sector + x->entries[sector].len / VHDX_LOG_SECTOR) % sectors_of(x);
}

/*
 * The last entry of the sequence that begins in a sector, if its tail is in it; false if it is not. It ends at the latest where
 * it has gone round.
 */
static bool find_head(const struct reading *x, uint32_t first, uint32_t *ret)
{
    uint32_t at = first;
    uint64_t used = x->entries[first].len;
    bool has_tail;

    for (;;) {
        uint32_t next = next_sector(x, at);

        used += x->entries[next].len;
        if (!x->entries[next].len || x->entries[next].number != x->entries[at].number + 1 ||
            used > x->len)
            break;
        at = next;
    }
    has_tail = false;
    for (uint32_t s = first;; s = next_sector(x, s)) {
        has_tail |= s == x->entries[at].tail / VHDX_LOG_SECTOR;
        if (s == at)
            break;
    }
    *ret = at;
    return has_tail;
}

/* The sequence with the highest number: its last entry. */
static bool find_active(const struct reading *x, uint32_t *ret_head)
{
    bool found = false;

    for (uint32_t s = 0; s < sectors_of(x); s++) {
        uint32_t head;

        if (!x->entries[s].len || !find_head(x, s, &head))
            continue;
        if (!found || x->entries[head].number > x->entries[*ret_head].number)
            *ret_head = head;
        found = true;
    }
    return found;
}

/* ---- changes ---- */

const struct vhdx_change *vhdx_change_from(const struct vhdx_log *log, uint64_t offset)
{
    unsigned low = 0;
    unsigned high = log->count;

    while (low < high) {
        unsigned middle = low + (high - low) / 2;
        const struct vhdx_change *c = &log->changes[middle];

        if (c->offset + c->len > offset)
            high = middle;
        else
            low = middle + 1;
    }
    return low < log->count ? &log->changes[low] : NULL;
}

/* Makes room for `count` changes at a place. */
static int open_gap(struct vhdx_log *log, unsigned at, unsigned count)
{
    if (log->count + count > VHDX_CHANGES_MAX)
        return -E2BIG;
    memmove(&log->changes[at + count], &log->changes[at],
            (log->count - at) * sizeof(*log->changes));
    log->count += count;
    return 0;
}

static struct vhdx_change part(const struct vhdx_change *c, uint64_t from, uint64_t to)
{
    return (struct vhdx_change){
        .offset = from, .len = to - from, .data = c->data ? c->data + (from - c->offset) : NULL};
}

/* What an older one says there is gone: it is cut, or cut in two. */
static int clear_range(struct vhdx_log *log, uint64_t from, uint64_t to)
{
    const struct vhdx_change *found = vhdx_change_from(log, from);
    unsigned at = found ? (unsigned)(found - log->changes) : log->count;

    while (at < log->count && log->changes[at].offset < to) {
        struct vhdx_change old = log->changes[at];
        uint64_t end = old.offset + old.len;
        int r;

        if (old.offset < from && end > to) {
            r = open_gap(log, at, 1);
            if (r < 0)
                return r;
            log->changes[at] = part(&old, old.offset, from);
            log->changes[at + 1] = part(&old, to, end);
            return 0;
        }
        if (old.offset < from) {
            log->changes[at++] = part(&old, old.offset, from);
        } else if (end > to) {
            log->changes[at] = part(&old, to, end);
            return 0;
        } else {
            log->count--;
            memmove(&log->changes[at], &log->changes[at + 1],
                    (log->count - at) * sizeof(*log->changes));
        }
    }
    return 0;
}

static int add_change(struct vhdx_log *log, const struct vhdx_change *c)
{
    const struct vhdx_change *after;
    unsigned at;
    int r;

    if (log->said++ == VHDX_CHANGES_MAX)
        return -E2BIG; /* each takes time, too */
    r = clear_range(log, c->offset, c->offset + c->len);
    if (r < 0)
        return r;
    after = vhdx_change_from(log, c->offset);
    at = after ? (unsigned)(after - log->changes) : log->count;
    r = open_gap(log, at, 1);
    if (r == 0)
        log->changes[at] = *c;
    return r;
}

/* The entry's changes, in order; its sectors become what they stand for. */
static int replay_entry(struct vhdx_log *log, uint8_t *e)
{
    uint8_t *data = e + head_len(e);
    int r = 0;

    for (uint32_t i = 0; r == 0 && i < load_le32(e + AT_COUNT); i++) {
        const uint8_t *d = e + ENTRY_HEADER_LEN + (size_t)i * DESCRIPTOR_LEN;
        struct vhdx_change c = {.offset = load_le64(d + AT_OFFSET), .len = VHDX_LOG_SECTOR};

        if (memcmp(d, "zero", 4) == 0) {
            c.len = load_le64(d + AT_LEADING);
        } else {
            memcpy(data, d + AT_LEADING, 8);
            memcpy(data + VHDX_LOG_SECTOR - 4, d + AT_TRAILING, 4);
            c.data = data;
            data += VHDX_LOG_SECTOR;
        }
        if (!range_within(c.offset, c.len, (uint64_t)NODE_SIZE_MAX))
            return -EINVAL;
        if (c.len)
            r = add_change(log, &c);
    }
    return r;
}

/* From the tail to the head. */
static int replay(struct vhdx *v, struct reading *x, uint32_t head, struct error **err)
{
    uint8_t *e = x->bytes + (size_t)head * VHDX_LOG_SECTOR;
    uint32_t s = x->entries[head].tail / VHDX_LOG_SECTOR;
    int r = 0;

    if (load_le64(e + AT_FLUSHED) > v->file_size)
        return error_set(err, EINVAL,
                         "node '%s': the file has %" PRIu64
                         " bytes, and its log was written when it "
                         "had %" PRIu64 ": it was cut off",
                         x->name, v->file_size, load_le64(e + AT_FLUSHED));
    v->log.file_size = MIN(load_le64(e + AT_LAST), (uint64_t)NODE_SIZE_MAX);
    for (;;) {
        r = replay_entry(&v->log, x->bytes + (size_t)s * VHDX_LOG_SECTOR);
        if (r < 0 || s == head)
            break;
        s = next_sector(x, s);
    }
    if (r == -E2BIG)
        return error_set(err, E2BIG, "node '%s': the log has more than %u changes", x->name,
                         VHDX_CHANGES_MAX);
    return r < 0
               ? error_set(err, -r, "node '%s': the log has changes where no file reaches", x->name)
               : 0;
}

/* ---- reading it ---- */

static int co_fn read_ring(struct vhdx *v, const struct request *by, struct reading *x,
                           uint64_t offset, struct error **err)
{
    int r = import_co_read_named(&v->import, by, "log", node_file(v->import.node), offset, x->bytes,
                                 x->len, err);

    if (r == 0)
        memcpy(x->bytes + x->len, x->bytes, x->len);
    for (uint32_t s = 0; r == 0 && s < sectors_of(x); s++)
        look_at_sector(x, s);
    if (r == 0 && x->summed > (uint64_t)SUM_FACTOR * x->len) /* not all was looked at */
        r = error_set(err, EINVAL, "node '%s': the entries of the log overlap", x->name);
    return r;
}

int vhdx_log_load(struct vhdx *v, const struct request *by, uint64_t offset, uint32_t len,
                  const uint8_t *guid, struct error **err)
{
    struct reading x = {.name = node_name(v->import.node), .guid = guid, .len = len};
    uint32_t head = 0;
    int r;

    if (!len || len > VHDX_LOG_BYTES_MAX || !is_aligned(len, MIB) || !is_aligned(offset, MIB))
        return error_set(err, ENOTSUP,
                         "node '%s': a log of %" PRIu32 " bytes at %" PRIu64
                         " is to be replayed, and only whole MiB up to %u are: open the image once "
                         "with the program that wrote it",
                         x.name, len, offset, VHDX_LOG_BYTES_MAX);
    x.bytes = try_new_n(uint8_t, (size_t)2 * len);
    x.entries = try_new_n(struct entry, len / VHDX_LOG_SECTOR);
    v->log.changes = try_new_n(struct vhdx_change, VHDX_CHANGES_MAX);
    v->log.data = x.bytes;
    r = x.bytes && x.entries && v->log.changes ? read_ring(v, by, &x, offset, err)
                                               : error_set(err, ENOMEM, "no memory");
    if (r == 0 && !find_active(&x, &head))
        r = error_set(err, EINVAL,
                      "node '%s': the image was not closed in order, and its log holds nothing "
                      "sound to replay",
                      x.name);
    if (r == 0)
        r = replay(v, &x, head, err);
    free(x.entries);
    return r;
}

void vhdx_log_release(struct vhdx_log *log)
{
    free(log->changes);
    free(log->data);
}

void vhdx_log_patch(void *arg, uint64_t offset, uint8_t *bytes, size_t len)
{
    const struct vhdx_log *log = arg;
    const struct vhdx_change *end = log->changes + log->count;

    for (const struct vhdx_change *c = vhdx_change_from(log, offset);
         c && c < end && c->offset < offset + len; c++) {
        uint64_t from = MAX(c->offset, offset);
        uint64_t to = MIN(c->offset + c->len, offset + len);

        if (c->data)
            memcpy(bytes + (from - offset), c->data + (from - c->offset), (size_t)(to - from));
        else
            memset(bytes + (from - offset), 0, (size_t)(to - from));
    }
}
