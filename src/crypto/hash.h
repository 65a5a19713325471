/* SPDX-License-Identifier: Apache-2.0 */
/* Hash functions by the names that LUKS headers and QEMU's options have for them. */
#ifndef CAIRN_CRYPTO_HASH_H
#define CAIRN_CRYPTO_HASH_H

#include "base/error.h"

#include <openssl/evp.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum hash { HASH_SHA1, HASH_SHA224, HASH_SHA256, HASH_SHA384, HASH_SHA512, HASH_RIPEMD160, HASHES };

/* The longest digest, bytes. */
#define HASH_LEN_MAX 64

const char *hash_name(enum hash h);
/* -ENOTSUP, with a message that lists what there is. */
int hash_from_name(const char *name, enum hash *ret, struct error **err);
size_t hash_len(enum hash h);
const EVP_MD *hash_md(enum hash h);

#endif
