/* SPDX-License-Identifier: Apache-2.0 */
/* Another backing file, or version, in the header of an image: which bytes are to be written, and in which order. Pure: no I/O, any thread. */
#ifndef CAIRN_FORMATS_QCOW2_HEADER_WRITE_H
#define CAIRN_FORMATS_QCOW2_HEADER_WRITE_H

#include "base/error.h"
#include "formats/qcow2/qcow2-header.h"

#include <stddef.h>
#include <stdint.h>

/* A disk writes so much as a whole, or nothing of it. */
#define QCOW2_HEADER_SECTOR 512

/*
 * Fills `ret`, of `len` bytes, with what the start of the file becomes: `old`, its first `len` bytes, of which `header` was parsed,
 * with another backing file. `file` NULL: none; `format` NULL: it is not said. `len` is the smaller of the cluster size and
 * QCOW2_HEADER_BYTES_MAX.
 *
 * It is safe against a power cut (D2) to write what follows the first sector, to sync, then to write the first sector: the old
 * first sector with the new rest, in whole or in part, is the old header still. To keep that, the table of feature names, which
 * nobody needs, is left out where there is no room for it. -EINVAL or -ENOSPC if it does not fit.
 */
int qcow2_header_with_backing(const struct qcow2_header *header, const void *old, size_t len,
                              const char *file, const char *format, void *ret, struct error **err);

/* What else may be another one. */
struct qcow2_header_new {
    unsigned version;
    uint64_t compatible;   /* features; nothing in version 2 */
    const char *data_file; /* another name of the one that the image has; NULL: as it is */
    bool data_not_raw;     /* its data is not raw any more */
};

/*
 * As above, with the same backing file. In version 2 there are no bitmaps and no names of features. Whether the rest of the image is
 * as that version has it is not looked at.
 */
int qcow2_header_rewrite(const struct qcow2_header *header, const void *old, size_t len,
                         const struct qcow2_header_new *new, void *ret, struct error **err);

#endif
