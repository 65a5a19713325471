/* SPDX-License-Identifier: Apache-2.0 */
/* Slots, for luks.c and luks-amend.c alone. */
#ifndef CAIRN_CRYPTO_LUKS_INTERNAL_H
#define CAIRN_CRYPTO_LUKS_INTERNAL_H

#include "crypto/luks.h"

/* What slots are made of, besides the header. */
struct luks_volume {
    const struct luks_store *store;
    const struct cipher_spec *spec;
    enum hash hash;
};

/* Does the password open the slot? 1, and the key, or 0. */
int co_fn luks_slot_co_try(const struct luks_volume *v, const struct luks_header *h, unsigned slot,
                           const struct secret *password, uint8_t *ret_key, struct error **err);
/*
 * Puts the key into a slot that is not in use, durably, and fills in what the header says of it. `rate`: of PBKDF2, per second.
 */
int co_fn luks_slot_co_write(const struct luks_volume *v, struct luks_header *h, unsigned slot,
                             const struct secret *password, const uint8_t *key, uint64_t rate,
                             uint64_t iter_ms, struct error **err);
/* The two sectors of a header, each durable before the next. */
int co_fn luks_header_co_write(const struct luks_store *store, const struct luks_header *h,
                               bool last_first, struct error **err);
int co_fn luks_co_rate(enum hash hash, uint32_t key_len, uint64_t *ret, struct error **err);
int luks_io_error(int r, const char *what, struct error **err);

#endif
