/* SPDX-License-Identifier: Apache-2.0 */
/* Decompressing deflate, in one piece. For worker threads: it takes long. */
#ifndef CAIRN_FORMATS_INFLATE_H
#define CAIRN_FORMATS_INFLATE_H

#include <stddef.h>
#include <stdint.h>

enum inflate_kind {
    INFLATE_BARE, /* without a header */
    INFLATE_ZLIB, /* with zlib's header, and its checksum if the stream's end fits in */
};

/*
 * Until the stream ends or the room is full; what follows is left alone. Returns how much it came to, -EIO if it is no such
 * stream or ends too early, -ENOMEM.
 */
int64_t inflate_some(enum inflate_kind kind, const uint8_t *in, size_t in_len, uint8_t *out,
                     size_t out_len);

#endif
