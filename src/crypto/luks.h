/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Volumes encrypted as LUKS version 1 says: the header with its key slots, each of which holds the volume's key under a password of
 * its own. Where the header lies is the caller's business (struct luks_store); so is where the disk does.
 *
 * LUKS-1 A key slot is in use when its material is durable: the header says so after that, and its first sector, which has the
 *        states of slots 0 to 6, after the second one.
 * LUKS-2 A key slot is out of use, durably, before its material is wiped; its salt goes with its state.
 * LUKS-3 The volume's only key is never in a slot that is being written.
 */
#ifndef CAIRN_CRYPTO_LUKS_H
#define CAIRN_CRYPTO_LUKS_H

#include "base/context.h"
#include "base/error.h"
#include "crypto/luks-header.h"
#include "crypto/secret.h"
#include "loop/iobuf.h"
#include "loop/lock.h"

#include <stdbool.h>
#include <stdint.h>

/* Where header and slots lie, from offset 0 on. Reads beyond the end of what was written give zeroes. Operations may yield. */
struct luks_store {
    void *arg;
    uint64_t len; /* bytes that belong to it */
    int (*co_read)(void *arg, uint64_t offset, struct iobuf *b, size_t len);
    int (*co_write)(void *arg, uint64_t offset, struct iobuf *b, size_t len);
    int (*co_sync)(void *arg);
};

struct luks_format {
    struct cipher_spec spec;
    enum hash hash;
    uint64_t iter_ms; /* how long a password's check shall take */
    bool detached;    /* the header alone: the disk begins at the start of something else */
};

#define LUKS_FORMAT_INIT                                                                           \
    {                                                                                              \
        .spec = {CIPHER_AES_256, CIPHER_XTS, CIPHER_IV_PLAIN64}, .hash = HASH_SHA256,              \
        .iter_ms = 2000                                                                            \
    }

/* An open volume. */
struct luks {
    struct cipher_spec spec; /* constant, as what follows */
    enum hash hash;
    uint8_t key[LUKS_KEY_MAX];
    struct sector_cipher *cipher;

    struct co_mutex change;    /* one change of slots at a time */
    struct luks_header header; /* Protected by change. */
};

/*
 * Tries the password on all active slots. -EACCES if none opens; -EINVAL and -ENOTSUP for the header; -EIO, ... `ret` is all zeroes
 * before, and owned by the caller, who ends it by luks_release(), on success.
 */
int co_fn luks_co_open(struct luks *ret, const struct luks_store *store,
                       const struct secret *password, struct error **err);
/* Wipes the key. Also for one that is all zeroes. */
void luks_release(struct luks *l);

/* How many bytes header and slots take; -ENOTSUP for what cannot be. */
int luks_area_len(const struct luks_format *o, uint64_t *ret, struct error **err);
/* Makes a header with a new key, in slot 0. It is durable when this returns 0, and the header was written last. */
int co_fn luks_co_format(const struct luks_store *store, const struct luks_format *o,
                         const struct secret *password, struct error **err);

/* A change of key slots. */
struct luks_amend {
    bool activate;                   /* else slots go out of use */
    const struct secret *new_secret; /* NULL: not said, as the next two */
    const struct secret *old_secret;
    bool has_slot;
    unsigned slot;
    bool has_iter_ms;
    uint64_t iter_ms;
    bool force; /* also what may lose a password, or the volume */
};

/* -EINVAL for what makes no sense, -EPERM for what takes force, -ENOSPC without a free slot, -ENOENT, -EACCES, and I/O errors. */
int co_fn luks_co_amend(struct luks *l, const struct luks_store *store, const struct luks_amend *a,
                        struct error **err);

#endif
