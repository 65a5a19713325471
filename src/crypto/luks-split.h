/* SPDX-License-Identifier: Apache-2.0 */
/*
 * LUKS' anti-forensic splitter: a key becomes many stripes of its length, all of which are needed to get it back, so that a small
 * part of them that is wiped is enough to lose it.
 */
#ifndef CAIRN_CRYPTO_LUKS_SPLIT_H
#define CAIRN_CRYPTO_LUKS_SPLIT_H

#include "crypto/hash.h"

#include <stddef.h>
#include <stdint.h>

/* As PBKDF2's callers. */
#define LUKS_SPLIT_KEY_MAX 64

/*
 * `stripes` stripes of `len` bytes each, of which all but the last one hold random bytes already. -EINVAL if the library refuses
 * the hash.
 */
int luks_split(enum hash hash, const uint8_t *key, size_t len, uint8_t *stripes, uint32_t count);
int luks_merge(enum hash hash, const uint8_t *stripes, size_t len, uint32_t count, uint8_t *ret);

#endif
