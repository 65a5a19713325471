/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Encryption of guest data: a LUKS header within the image holds the key, and where a cluster lies in the file is part of how it is
 * encrypted. Metadata is not, nor is what was stored compressed. docs/formats/qcow2.md ("Encryption") says what follows.
 */
#ifndef CAIRN_FORMATS_QCOW2_CRYPT_H
#define CAIRN_FORMATS_QCOW2_CRYPT_H

#include "base/context.h"
#include "base/error.h"
#include "crypto/luks.h"

#include <stdint.h>

struct backend;
struct qcow2;
struct qcow2_crypt;
struct qcow2_header;
struct qcow2_options;
struct request;

/* In open, when the header can be used and the data file is there: q->crypt, if the image is encrypted. -EINVAL without a key, or with one too many. */
int co_fn qcow2_crypt_open(struct qcow2 *q, const struct request *by,
                           const struct qcow2_header *header, const struct qcow2_options *opt,
                           struct error **err);
/* When the size of clusters is known: nothing else is written where the LUKS header is. */
void qcow2_crypt_protect(struct qcow2 *q);
/* Returns NULL. */
struct qcow2_crypt *qcow2_crypt_close(struct qcow2_crypt *crypt);

/* Of an encrypted image. What a mapping says is data, any part of it. */
int co_fn qcow2_crypt_read(struct qcow2 *q, struct request *req, uint64_t host_offset);
/* `len` bytes of a request, from byte `skip` of it on: whole sectors. Not durable when it returns. */
int co_fn qcow2_crypt_write(struct qcow2 *q, const struct request *req, uint64_t skip, uint64_t len,
                            uint64_t host_offset);

/* On a backend of an encrypted qcow2 node that may write: changes key slots. -ENOTSUP for others, and as luks_co_amend(). */
int co_fn qcow2_co_amend_keys(struct backend *b, const struct luks_amend *a, struct error **err);

#endif
