/* SPDX-License-Identifier: Apache-2.0 */
/* Entries of the snapshot table: what one says, and one that says all that version 3 wants. */
#include "base/checked.h"
#include "base/endian.h"
#include "formats/qcow2/qcow2-format.h"
#include "formats/qcow2/qcow2-snapshot.h"

#include <errno.h>
#include <string.h>

static void parse_extra(struct qcow2_snapshot *s, const uint8_t *extra, uint32_t len)
{
    if (len >= QCOW2_SNAPSHOT_EXTRA_VM_STATE_SIZE + 8)
        s->vm_state_size = load_be64(extra + QCOW2_SNAPSHOT_EXTRA_VM_STATE_SIZE);
    s->has_disk_size = len >= QCOW2_SNAPSHOT_EXTRA_DISK_SIZE + 8;
    if (s->has_disk_size)
        s->disk_size = load_be64(extra + QCOW2_SNAPSHOT_EXTRA_DISK_SIZE);
    s->has_icount = len >= QCOW2_SNAPSHOT_EXTRA_ICOUNT + 8;
    if (s->has_icount)
        s->icount = load_be64(extra + QCOW2_SNAPSHOT_EXTRA_ICOUNT);
}

int qcow2_snapshot_parse(const uint8_t *table, size_t len, size_t at, struct qcow2_snapshot *ret)
{
    const uint8_t *e;
    const uint8_t *extra;
    uint32_t extra_len;

    *ret = (struct qcow2_snapshot){.at = at, .len = QCOW2_SNAPSHOT_LEN_MIN};
    if (!range_within(at, ret->len, len))
        return -ERANGE; /* there may be no table yet */
    e = table + at;
    extra = e + QCOW2_SNAPSHOT_LEN_MIN;
    extra_len = load_be32(e + QCOW2_SNAPSHOT_EXTRA_LEN);
    if (extra_len > QCOW2_SNAPSHOT_EXTRA_MAX)
        return -EINVAL;
    ret->id_len = load_be16(e + QCOW2_SNAPSHOT_ID_LEN);
    ret->name_len = load_be16(e + QCOW2_SNAPSHOT_NAME_LEN);
    if (ret->id_len > QCOW2_SNAPSHOT_TEXT_MAX || ret->name_len > QCOW2_SNAPSHOT_TEXT_MAX)
        return -EINVAL; /* or the table would reach over much else */
    ret->len += extra_len + ret->id_len + ret->name_len;
    if (!range_within(at, ret->len, len))
        return -ERANGE;
    ret->l1_offset = load_be64(e + QCOW2_SNAPSHOT_L1_OFFSET);
    ret->l1_size = load_be32(e + QCOW2_SNAPSHOT_L1_SIZE);
    ret->id = (const char *)extra + extra_len;
    ret->name = ret->id + ret->id_len;
    ret->date_s = load_be32(e + QCOW2_SNAPSHOT_DATE_S);
    ret->date_ns = load_be32(e + QCOW2_SNAPSHOT_DATE_NS);
    ret->vm_clock_ns = load_be64(e + QCOW2_SNAPSHOT_VM_CLOCK_NS);
    ret->vm_state_size = load_be32(e + QCOW2_SNAPSHOT_VM_STATE_SIZE);
    parse_extra(ret, extra, extra_len);
    return 0;
}

size_t qcow2_snapshot_complete(const uint8_t *table, const struct qcow2_snapshot *s,
                               uint64_t disk_size, uint8_t *ret)
{
    const uint8_t *e = table + s->at;
    uint32_t extra_len = load_be32(e + QCOW2_SNAPSHOT_EXTRA_LEN);
    uint32_t more = s->has_disk_size ? 0 : QCOW2_SNAPSHOT_EXTRA_V3 - extra_len;
    size_t text = QCOW2_SNAPSHOT_LEN_MIN + extra_len;
    uint8_t *extra = ret + QCOW2_SNAPSHOT_LEN_MIN;

    memcpy(ret, e, text);
    memcpy(ret + text + more, e + text, s->len - text);
    if (more) {
        store_be32(ret + QCOW2_SNAPSHOT_EXTRA_LEN, QCOW2_SNAPSHOT_EXTRA_V3);
        store_be64(extra + QCOW2_SNAPSHOT_EXTRA_VM_STATE_SIZE, s->vm_state_size);
        store_be64(extra + QCOW2_SNAPSHOT_EXTRA_DISK_SIZE, disk_size);
    }
    return s->len + more;
}
