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
    uint32_t iterations; /* at least 1 */
};

/*
 * A key of `len` bytes. Takes its time, on threads of its own; what processor time that was is in *ret_cpu_ns. -ECANCELED soon after
 * the waiter is cancelled (P4), -EINVAL if the library refuses, -ENOMEM, -EAGAIN.
 */
int co_fn pbkdf2_co_derive(const struct pbkdf2 *p, uint8_t *ret, size_t len, uint64_t *ret_cpu_ns);

/* How many iterations this machine does in a second of processor time, for keys of `len` bytes. */
int co_fn pbkdf2_co_rate(enum hash hash, size_t len, uint64_t *ret);

#endif
