/* SPDX-License-Identifier: Apache-2.0 */
/* AFsplit and AFmerge of the LUKS1 specification. */
#include "crypto/luks-split.h"
#include "base/endian.h"
#include "base/macros.h"

#include <assert.h>
#include <errno.h>
#include <openssl/crypto.h>
#include <string.h>

/* Replaces each piece of the block, as long as a digest, by the digest of its number and itself. */
static int diffuse(EVP_MD_CTX *ctx, const EVP_MD *md, uint8_t *block, size_t len)
{
    size_t piece = (size_t)EVP_MD_get_size(md);
    uint32_t number = 0;

    for (size_t at = 0; at < len; at += piece, number++) {
        size_t n = MIN(piece, len - at);
        uint8_t digest[HASH_LEN_MAX];
        uint8_t be[4];

        store_be32(be, number);
        if (EVP_DigestInit_ex(ctx, md, NULL) != 1 || EVP_DigestUpdate(ctx, be, sizeof(be)) != 1 ||
            EVP_DigestUpdate(ctx, block + at, n) != 1 || EVP_DigestFinal_ex(ctx, digest, NULL) != 1)
            return -EINVAL;
        memcpy(block + at, digest, n);
        OPENSSL_cleanse(digest, sizeof(digest));
    }
    return 0;
}

static void add(uint8_t *to, const uint8_t *what, size_t len)
{
    for (size_t i = 0; i < len; i++)
        to[i] ^= what[i];
}

/* What all stripes but the last one come to. */
static int fold(enum hash hash, const uint8_t *stripes, size_t len, uint32_t count, uint8_t *ret)
{
    EVP_MD_CTX *ctx = EVP_MD_CTX_new();
    int r = ctx ? 0 : -ENOMEM;

    assert(len <= LUKS_SPLIT_KEY_MAX);
    memset(ret, 0, len);
    for (uint32_t i = 0; r == 0 && i + 1 < count; i++) {
        add(ret, stripes + (size_t)i * len, len);
        r = diffuse(ctx, hash_md(hash), ret, len);
    }
    EVP_MD_CTX_free(ctx);
    return r;
}

int luks_split(enum hash hash, const uint8_t *key, size_t len, uint8_t *stripes, uint32_t count)
{
    uint8_t *last = stripes + (size_t)(count - 1) * len;
    int r = fold(hash, stripes, len, count, last);

    if (r == 0)
        add(last, key, len);
    return r;
}

int luks_merge(enum hash hash, const uint8_t *stripes, size_t len, uint32_t count, uint8_t *ret)
{
    int r = fold(hash, stripes, len, count, ret);

    if (r == 0)
        add(ret, stripes + (size_t)(count - 1) * len, len);
    return r;
}
