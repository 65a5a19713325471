/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The bitmaps extension in the header of an image: which bytes are to be written, and in which order, to put another one there or to
 * take it away. Pure: no I/O, any thread.
 *
 * The steps are done one after the other, each durable before the next. Each one that changes what the header says lies in one
 * sector, so that the disk has all of it or nothing; after each one, and in the midst of it, the header is a sound one, which
 * says of the bitmaps what it said before, or what it shall say, or nothing (STORED-3).
 */
#ifndef CAIRN_FORMATS_QCOW2_HEADER_BITMAPS_H
#define CAIRN_FORMATS_QCOW2_HEADER_BITMAPS_H

#include "base/error.h"
#include "formats/qcow2/qcow2-header.h"

#include <stddef.h>
#include <stdint.h>

/* A step writes at most a backing file's name. */
#define QCOW2_HEADER_STEP_BYTES 1024
#define QCOW2_HEADER_STEPS      6

struct qcow2_header_step {
    size_t at; /* in the file */
    size_t len;
    uint8_t was[QCOW2_HEADER_STEP_BYTES];
    uint8_t becomes[QCOW2_HEADER_STEP_BYTES];
};

struct qcow2_header_steps {
    struct qcow2_header_step v[QCOW2_HEADER_STEPS];
    unsigned count;
};

/* What the extension says; count 0: there shall be none. */
struct qcow2_bitmaps_place {
    uint32_t count;
    uint64_t directory_size;
    uint64_t directory_offset;
};

/*
 * `bytes`: the first `len` bytes of the file, of which `h` was parsed; the smaller of the cluster size and QCOW2_HEADER_BYTES_MAX. Where
 * bitmaps go for good and their extension cannot be taken out safely, it stays, and counts for nothing. -ENOSPC: there is no room
 * for it.
 */
int qcow2_header_plan_bitmaps(const struct qcow2_header *h, const uint8_t *bytes, size_t len,
                              const struct qcow2_bitmaps_place *place,
                              struct qcow2_header_steps *ret, struct error **err);

#endif
