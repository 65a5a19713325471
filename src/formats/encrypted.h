/* SPDX-License-Identifier: Apache-2.0 */
/* Data that lies encrypted in a file, for the formats that have it so. Nothing but ciphertext goes into the file. */
#ifndef CAIRN_FORMATS_ENCRYPTED_H
#define CAIRN_FORMATS_ENCRYPTED_H

#include "base/context.h"
#include "crypto/luks.h"
#include "crypto/sector-cipher.h"
#include "graph/node.h"
#include "graph/request.h"

#include <stdint.h>

/* How a file is encrypted. */
struct encrypted {
    struct edge *file;
    struct sector_cipher *cipher;
    uint64_t first; /* where sector 0 lies, a multiple of the sector */
};

/*
 * Reads the request's bytes from `host_offset` of the file on. Any offset and length; what is not whole sectors costs a copy. What lies
 * beyond the end of the file reads as zeroes.
 */
int co_fn encrypted_co_read(const struct encrypted *e, struct request *req, uint64_t host_offset);
/* Writes `len` bytes of the request, from byte `skip` of it on, to `host_offset`: whole sectors. */
int co_fn encrypted_co_write(const struct encrypted *e, const struct request *req, uint64_t skip,
                             uint64_t len, uint64_t host_offset);

/*
 * A store for LUKS headers: a range of a node's file, by requests done for `by`; or by requests that pass the gate of a backend of
 * the node, each for itself, so that none is on its way while passwords are being checked.
 */
struct encrypted_store {
    struct edge *file; /* NULL: it is the backend's node itself */
    uint64_t offset;
    struct backend *backend; /* NULL: they are done for `by` */
    const struct request *by;
};

/* `s` outlives the result. */
struct luks_store encrypted_store(struct encrypted_store *s, uint64_t len);

/* Makes a LUKS header at `offset` of what a backend leads to, which is large enough. */
int co_fn encrypted_co_format(struct backend *b, uint64_t offset, const struct luks_format *f,
                              const struct secret *password, struct error **err);

#endif
