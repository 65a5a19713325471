/* SPDX-License-Identifier: Apache-2.0 */
/* PBKDF2: keys from passwords, made slow on purpose, on threads of their own. */
#ifndef CAIRN_CRYPTO_PBKDF2_H
#define CAIRN_CRYPTO_PBKDF2_H

#include "base/context.h"
#include "base/error.h"
#include "crypto/hash.h"

#include <stddef.h>
#include <stdint.h>

struct pbkdf2 {
    enum hash hash;
    const uint8_t *password;
    size_t password_len;
    const uint8_t *salt;
    size_t salt_len;
    uint32_t iterations; /* at most INT32_MAX */
};

/* -EINVAL if the library refuses. Takes its time: for threads that may. */
int pbkdf2(const struct pbkdf2 *p, uint8_t *ret, size_t len);

/* How many iterations this machine does in a second of processor time, for keys of `len` bytes. */
int co_fn pbkdf2_co_rate(enum hash hash, size_t len, uint64_t *ret);

#endif
