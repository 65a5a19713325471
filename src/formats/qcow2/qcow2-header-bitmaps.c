/* SPDX-License-Identifier: Apache-2.0 */
/*
 * An extension that is there is changed in place: by one write where it lies in one sector, else with the autoclear bit, which
 * makes it count, cleared meanwhile. A new one is put behind the others: first its data and the new end mark, which lie behind
 * the old end mark, then its head over that mark. What the backing file's name takes of that place is moved before.
 */
#include "formats/qcow2/qcow2-header-bitmaps.h"
#include "base/checked.h"
#include "base/endian.h"
#include "base/macros.h"
#include "formats/qcow2/qcow2-header-write.h"

#include <assert.h>
#include <errno.h>
#include <string.h>

/* Head and data, which need no padding. */
#define EXTENSION_LEN ((size_t)QCOW2_EXTENSION_HEAD + QCOW2_BITMAPS_LEN)

struct plan {
    const struct qcow2_header *h;
    uint8_t bytes[QCOW2_HEADER_STEP_BYTES]; /* of the step that is being put together */
    const uint8_t *old;
    size_t len;
    struct qcow2_header_steps *steps;
};

static bool in_one_sector(size_t at, size_t len)
{
    return at / QCOW2_HEADER_SECTOR == (at + len - 1) / QCOW2_HEADER_SECTOR;
}

/* What an earlier step has written is what was there. */
static void add_step(struct plan *p, size_t at, const void *becomes, size_t len)
{
    struct qcow2_header_step *s = &p->steps->v[p->steps->count];

    assert(p->steps->count < QCOW2_HEADER_STEPS && len <= QCOW2_HEADER_STEP_BYTES);
    s->at = at;
    s->len = len;
    memcpy(s->was, p->old + at, len);
    for (unsigned i = 0; i < p->steps->count; i++) {
        const struct qcow2_header_step *before = &p->steps->v[i];

        if (before->at == at)
            memcpy(s->was, before->becomes, MIN(len, before->len));
    }
    memcpy(s->becomes, becomes, len);
    p->steps->count++;
}

static void set_autoclear(struct plan *p, bool set)
{
    uint64_t bits = p->h->autoclear & ~QCOW2_AUTOCLEAR_BITMAPS;
    uint8_t bytes[8];

    store_be64(bytes, bits | (set ? QCOW2_AUTOCLEAR_BITMAPS : 0));
    add_step(p, QCOW2_OFFSET_AUTOCLEAR, bytes, sizeof(bytes));
}

static size_t extensions_end(const struct qcow2_header *h)
{
    size_t at = h->header_length;

    for (unsigned i = 0; i < h->extension_count; i++)
        at += QCOW2_EXTENSION_HEAD + (size_t)align_up(h->extensions[i].len, QCOW2_EXTENSION_ALIGN);
    return at;
}

/* Where the bitmaps extension begins, and its length; 0: there is none. */
static size_t find_extension(const struct qcow2_header *h, uint32_t *ret_len)
{
    size_t at = h->header_length;

    for (unsigned i = 0; i < h->extension_count; i++) {
        *ret_len = h->extensions[i].len;
        if (h->extensions[i].type == QCOW2_EXTENSION_BITMAPS)
            return at;
        at += QCOW2_EXTENSION_HEAD + (size_t)align_up(*ret_len, QCOW2_EXTENSION_ALIGN);
    }
    return 0;
}

static void put_extension(uint8_t *to, const struct qcow2_bitmaps_place *place)
{
    uint8_t *data = to + QCOW2_EXTENSION_HEAD;

    memset(to, 0, EXTENSION_LEN);
    store_be32(to, QCOW2_EXTENSION_BITMAPS);
    store_be32(to + 4, QCOW2_BITMAPS_LEN);
    store_be32(data + QCOW2_BITMAPS_COUNT, place->count);
    store_be64(data + QCOW2_BITMAPS_DIRECTORY_SIZE, place->directory_size);
    store_be64(data + QCOW2_BITMAPS_DIRECTORY_OFFSET, place->directory_offset);
}

static int change_in_place(struct plan *p, size_t at, uint32_t len, struct error **err)
{
    bool counts = p->h->autoclear & QCOW2_AUTOCLEAR_BITMAPS;
    size_t data = at + QCOW2_EXTENSION_HEAD;

    if (len != QCOW2_BITMAPS_LEN)
        return error_set(err, ENOSPC, "the header has a bitmaps extension of %u bytes, expected %d",
                         (unsigned)len, QCOW2_BITMAPS_LEN);
    if (counts && !in_one_sector(data, QCOW2_BITMAPS_LEN)) {
        set_autoclear(p, false);
        counts = false;
    }
    add_step(p, data, p->bytes + QCOW2_EXTENSION_HEAD, QCOW2_BITMAPS_LEN);
    if (!counts)
        set_autoclear(p, true);
    return 0;
}

/* The backing file's name goes to where neither it nor the extension is. */
static bool move_name(struct plan *p, size_t end)
{
    size_t name = (size_t)load_be64(p->old + QCOW2_OFFSET_BACKING_FILE_OFFSET);
    size_t name_len = load_be32(p->old + QCOW2_OFFSET_BACKING_FILE_SIZE);
    size_t to = (size_t)align_up(MAX(end, name + name_len), 8);
    uint8_t reference[12];

    if (!p->h->backing_file || name >= end)
        return true;
    if (!range_within(to, name_len, p->len))
        return false;
    add_step(p, to, p->old + name, name_len);
    store_be64(reference, to);
    store_be32(reference + 8, (uint32_t)name_len);
    add_step(p, QCOW2_OFFSET_BACKING_FILE_OFFSET, reference, sizeof(reference));
    return true;
}

static int append(struct plan *p, struct error **err)
{
    size_t at = extensions_end(p->h);
    size_t end = at + EXTENSION_LEN + QCOW2_EXTENSION_HEAD;
    bool marked = range_within(at, QCOW2_EXTENSION_HEAD, p->len) &&
                  load_be32(p->old + at) == QCOW2_EXTENSION_END;

    if (p->h->backing_file)
        marked &= load_be64(p->old + QCOW2_OFFSET_BACKING_FILE_OFFSET) >= at + QCOW2_EXTENSION_HEAD;
    if (!marked || end > p->len || !move_name(p, end))
        return error_set(err, ENOSPC, "the header has no room for what tells of bitmaps");
    if (p->h->autoclear & QCOW2_AUTOCLEAR_BITMAPS)
        set_autoclear(p, false);
    memset(p->bytes + EXTENSION_LEN, 0, QCOW2_EXTENSION_HEAD);
    add_step(p, at + QCOW2_EXTENSION_HEAD, p->bytes + QCOW2_EXTENSION_HEAD,
             QCOW2_BITMAPS_LEN + QCOW2_EXTENSION_HEAD);
    add_step(p, at, p->bytes, QCOW2_EXTENSION_HEAD);
    set_autoclear(p, true);
    return 0;
}

/* Behind it there is the end, or what moves up within the sector. */
static void take_out(struct plan *p, size_t at, uint32_t len)
{
    size_t after = at + QCOW2_EXTENSION_HEAD + (size_t)align_up(len, QCOW2_EXTENSION_ALIGN);
    size_t end = extensions_end(p->h);
    size_t moves = end - after;

    if (moves && !in_one_sector(at, moves + QCOW2_EXTENSION_HEAD))
        return;
    memcpy(p->bytes, p->old + after, moves);
    memset(p->bytes + moves, 0, QCOW2_EXTENSION_HEAD);
    add_step(p, at, p->bytes, moves + QCOW2_EXTENSION_HEAD);
}

int qcow2_header_plan_bitmaps(const struct qcow2_header *h, const uint8_t *bytes, size_t len,
                              const struct qcow2_bitmaps_place *place,
                              struct qcow2_header_steps *ret, struct error **err)
{
    struct plan p = {.h = h, .old = bytes, .len = len, .steps = ret};
    uint32_t extension_len = 0;
    size_t at = find_extension(h, &extension_len);

    ret->count = 0;
    if (!place->count) {
        if (h->autoclear & QCOW2_AUTOCLEAR_BITMAPS)
            set_autoclear(&p, false);
        if (at)
            take_out(&p, at, extension_len);
        return 0;
    }
    put_extension(p.bytes, place);
    return at ? change_in_place(&p, at, extension_len, err) : append(&p, err);
}
