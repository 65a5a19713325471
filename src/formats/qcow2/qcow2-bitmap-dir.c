/* SPDX-License-Identifier: Apache-2.0 */
/* Entries of the bitmap directory, as the specification lays them out. */
#include "formats/qcow2/qcow2-bitmap-dir.h"
#include "base/checked.h"
#include "base/endian.h"
#include "base/macros.h"
#include "formats/qcow2/qcow2-format.h"

#include <string.h>

/* In an entry. */
#define AT_TABLE_OFFSET     0
#define AT_TABLE_SIZE       8
#define AT_FLAGS            12
#define AT_TYPE             16
#define AT_GRANULARITY_BITS 17
#define AT_NAME_LEN         18
#define AT_EXTRA_LEN        20

#define ALIGN 8

#define GRANULARITY_BITS_MIN 9
#define GRANULARITY_BITS_MAX 31

uint64_t qcow2_bitmap_entry_len(uint64_t name_len, uint64_t extra_len)
{
    return align_up(QCOW2_BITMAP_ENTRY_LEN_MIN + name_len + extra_len, ALIGN);
}

const char *qcow2_bitmap_entry_next(const uint8_t *directory, size_t len, size_t *at,
                                    struct qcow2_bitmap_entry *ret)
{
    const uint8_t *e = directory + *at;
    uint64_t whole;

    if (!range_within(*at, QCOW2_BITMAP_ENTRY_LEN_MIN, len))
        return "the directory ends before it";
    *ret = (struct qcow2_bitmap_entry){
        .table_offset = load_be64(e + AT_TABLE_OFFSET),
        .table_size = load_be32(e + AT_TABLE_SIZE),
        .flags = load_be32(e + AT_FLAGS),
        .type = e[AT_TYPE],
        .granularity_bits = e[AT_GRANULARITY_BITS],
        .name_len = load_be16(e + AT_NAME_LEN),
        .extra_len = load_be32(e + AT_EXTRA_LEN),
    };
    whole = qcow2_bitmap_entry_len(ret->name_len, ret->extra_len);
    if (!range_within(*at, whole, len))
        return "the directory ends within it";
    ret->extra = e + QCOW2_BITMAP_ENTRY_LEN_MIN;
    ret->name = (const char *)ret->extra + ret->extra_len;
    if (!ret->name_len || ret->name_len > QCOW2_BITMAP_NAME_MAX)
        return "its name has a bad length";
    if (memchr(ret->name, '\0', ret->name_len))
        return "its name contains a NUL byte";
    *at += (size_t)whole;
    return NULL;
}

size_t qcow2_bitmap_entry_put(uint8_t *to, const struct qcow2_bitmap_entry *e)
{
    size_t whole = (size_t)qcow2_bitmap_entry_len(e->name_len, e->extra_len);

    memset(to, 0, whole);
    store_be64(to + AT_TABLE_OFFSET, e->table_offset);
    store_be32(to + AT_TABLE_SIZE, e->table_size);
    store_be32(to + AT_FLAGS, e->flags);
    to[AT_TYPE] = e->type;
    to[AT_GRANULARITY_BITS] = e->granularity_bits;
    store_be16(to + AT_NAME_LEN, e->name_len);
    store_be32(to + AT_EXTRA_LEN, e->extra_len);
    to += QCOW2_BITMAP_ENTRY_LEN_MIN;
    if (e->extra_len)
        memcpy(to, e->extra, e->extra_len);
    memcpy(to + e->extra_len, e->name, e->name_len);
    return whole;
}

bool qcow2_bitmap_set_in_use(uint8_t *directory, size_t len)
{
    struct qcow2_bitmap_entry e;
    bool any = false;

    for (size_t at = 0, next = 0; at < len; at = next) {
        if (qcow2_bitmap_entry_next(directory, len, &next, &e))
            break; /* there is none like that */
        any |= !(e.flags & QCOW2_BITMAP_IN_USE);
        store_be32(directory + at + AT_FLAGS, e.flags | QCOW2_BITMAP_IN_USE);
    }
    return any;
}

uint64_t qcow2_bitmap_table_entries(uint64_t size, unsigned granularity_bits, unsigned cluster_bits)
{
    unsigned bits =
        granularity_bits + 3 + cluster_bits; /* an entry stands for so much, at most 2^55 */

    return (size >> bits) + ((size & (((uint64_t)1 << bits) - 1)) != 0);
}

const char *qcow2_bitmap_table_problem(uint64_t entry, unsigned cluster_bits, uint64_t file_size)
{
    uint64_t offset = entry & QCOW2_OFFSET_MASK;

    if ((entry & QCOW2_BITMAP_TABLE_RESERVED) || (offset && (entry & QCOW2_BITMAP_TABLE_ONES)))
        return "its table has an entry with reserved bits set";
    if (!is_aligned(offset, (uint64_t)1 << cluster_bits))
        return "its table has an entry that is not cluster aligned";
    if (offset >= file_size && offset)
        return "its table has an entry beyond the end of the file";
    return NULL;
}

const char *qcow2_bitmap_entry_problem(const struct qcow2_bitmap_entry *e, uint64_t disk_size,
                                       unsigned cluster_bits, uint64_t file_size)
{
    uint64_t wanted;

    if (e->flags & ~QCOW2_BITMAP_FLAGS_KNOWN)
        return "it has unknown flags";
    if (e->type != QCOW2_BITMAP_TYPE_DIRTY)
        return "it is of an unknown type";
    if (e->extra_len && !(e->flags & QCOW2_BITMAP_EXTRA_COMPATIBLE))
        return "it has extra data of a kind that is not known";
    if (e->granularity_bits < GRANULARITY_BITS_MIN || e->granularity_bits > GRANULARITY_BITS_MAX)
        return "its granularity is none that can be used";
    if (!e->table_size || e->table_size > QCOW2_BITMAP_TABLE_MAX ||
        (uint64_t)e->table_size << cluster_bits > QCOW2_BITMAP_BYTES_MAX)
        return "its table has a size that no bitmap has";
    wanted =
        MAX(qcow2_bitmap_table_entries(disk_size, e->granularity_bits, cluster_bits), (uint64_t)1);
    if (!(e->flags & QCOW2_BITMAP_IN_USE) && e->table_size != wanted)
        return "its table is not as large as the disk asks for";
    if (!e->table_offset || !is_aligned(e->table_offset, (uint64_t)1 << cluster_bits))
        return "its table is not cluster aligned";
    if (!range_within(e->table_offset, (uint64_t)e->table_size * QCOW2_ENTRY_LEN, file_size))
        return "its table is outside the file";
    return NULL;
}
