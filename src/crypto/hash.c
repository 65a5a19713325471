/* SPDX-License-Identifier: Apache-2.0 */
/* The table of hash functions. */
#include "crypto/hash.h"

#include <errno.h>
#include <string.h>

static const struct {
    const char *name;
    const EVP_MD *(*md)(void);
    size_t len;
} hashes[HASHES] = {
    [HASH_SHA1] = {"sha1", EVP_sha1, 20},       [HASH_SHA224] = {"sha224", EVP_sha224, 28},
    [HASH_SHA256] = {"sha256", EVP_sha256, 32}, [HASH_SHA384] = {"sha384", EVP_sha384, 48},
    [HASH_SHA512] = {"sha512", EVP_sha512, 64}, [HASH_RIPEMD160] = {"ripemd160", EVP_ripemd160, 20},
};

const char *hash_name(enum hash h)
{
    return hashes[h].name;
}

int hash_from_name(const char *name, enum hash *ret, struct error **err)
{
    for (unsigned i = 0; i < HASHES; i++) {
        if (strcmp(hashes[i].name, name) == 0) {
            *ret = (enum hash)i;
            return 0;
        }
    }
    return error_set(
        err, ENOTSUP,
        "hash '%s' is not supported: it is one of sha1, sha224, sha256, sha384, sha512, "
        "ripemd160",
        name);
}

size_t hash_len(enum hash h)
{
    return hashes[h].len;
}

const EVP_MD *hash_md(enum hash h)
{
    return hashes[h].md();
}
