/* SPDX-License-Identifier: Apache-2.0 */
/*
 * vhdx: Microsoft's VHDX images, version 1, fixed and dynamic, for reading. Integers are little endian.
 *
 *     0         file type          64 KiB, 128 KiB   headers: the one with the higher number counts
 *     1 MiB on  log, metadata, table of blocks (BAT), blocks; 192 KiB and 256 KiB: the table that says where they are
 *
 * A writer that crashed leaves changes of metadata in the log. The file is not changed here: they are put over what is read.
 */
#ifndef CAIRN_FORMATS_VHDX_VHDX_INTERNAL_H
#define CAIRN_FORMATS_VHDX_VHDX_INTERNAL_H

#include "formats/import.h"

/* A longer log is refused if something must be replayed from it, and so are more changes. QEMU's and Hyper-V's have 1 MiB. */
#define VHDX_LOG_BYTES_MAX ((uint32_t)8 << 20)
#define VHDX_CHANGES_MAX   4096u

#define VHDX_LOG_SECTOR 4096u
#define VHDX_GUID_LEN   16

/* Bytes of the file that are others than it says. Changes do not overlap, and are in order. */
struct vhdx_change {
    uint64_t offset;
    uint64_t len;
    const uint8_t *data; /* NULL: zeroes */
};

struct vhdx_log {
    struct vhdx_change *changes;
    unsigned count;
    unsigned said;      /* also those that later ones have gone over */
    uint8_t *data;      /* what they point into */
    uint64_t file_size; /* what the file would have after the replay; 0: as it is */
};

struct vhdx {
    /* Set in open, then constant. */
    struct import import;
    struct import_blocks blocks;
    struct vhdx_log log;
    uint64_t file_size; /* after the replay */
};

/* Reads what the log has to say; nothing of the file is written. */
int co_fn vhdx_log_load(struct vhdx *v, const struct request *by, uint64_t offset, uint32_t len,
                        const uint8_t *guid, struct error **err);
void vhdx_log_release(struct vhdx_log *log);
/* The first change that ends after `offset`; NULL if there is none. */
const struct vhdx_change *vhdx_change_from(const struct vhdx_log *log, uint64_t offset);
/* An import_patch_fn. */
void vhdx_log_patch(void *log, uint64_t offset, uint8_t *bytes, size_t len);

/* The CRC-32C of a structure, whose own sum, at this place, counts as zeroes. */
uint32_t vhdx_sum(const uint8_t *bytes, size_t len, size_t at);

#endif
