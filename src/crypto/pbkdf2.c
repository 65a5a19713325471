/* SPDX-License-Identifier: Apache-2.0 */
/*
 * PBKDF2 (RFC 8018) over OpenSSL's hash functions, and how fast it is here. OpenSSL's own cannot be left before its end, and images
 * say how many iterations there are: here it is done in pieces, and whoever waits may go between two of them.
 */
#include "crypto/pbkdf2.h"
#include "base/endian.h"
#include "base/macros.h"
#include "loop/co.h"
#include "loop/compute.h"

#include <errno.h>
#include <openssl/crypto.h>
#include <stdbool.h>
#include <string.h>

/* Iterations of a piece: tens of milliseconds, a hundred on slow machines. */
#define PIECE ((uint32_t)1 << 16)

/* A measurement shorter than this says little; each one does four times what the one before did. */
#define MEASURE_NS    (40 * NS_PER_MS)
#define MEASURE_FIRST 2048
#define MEASURE_MAX   (1u << 27)

#define KEY_MAX 64

/* The longest unit that a hash function works on, bytes. */
#define HASH_BLOCK_MAX 128

struct derivation {
    const struct pbkdf2 *p;
    uint8_t *ret;
    size_t len;
    size_t at;      /* what of `ret` is done: whole digests */
    uint32_t done;  /* iterations of the one that follows */
    EVP_MD_CTX *in; /* HMAC's inner hash, and the outer one, when they have seen the password */
    EVP_MD_CTX *out;
    EVP_MD_CTX *work;
    uint8_t u[HASH_LEN_MAX];   /* the last iteration's */
    uint8_t sum[HASH_LEN_MAX]; /* of all of them */
    int result;
};

/* A hash that has seen the key of HMAC, each byte changed by `pad`. */
static bool begin_hash(EVP_MD_CTX *ctx, const EVP_MD *md, const uint8_t key[HASH_BLOCK_MAX],
                       uint8_t pad)
{
    size_t len = (size_t)EVP_MD_get_block_size(md);
    uint8_t padded[HASH_BLOCK_MAX];
    bool ok;

    for (size_t i = 0; i < len; i++)
        padded[i] = key[i] ^ pad;
    ok = EVP_DigestInit_ex(ctx, md, NULL) == 1 && EVP_DigestUpdate(ctx, padded, len) == 1;
    OPENSSL_cleanse(padded, sizeof(padded));
    return ok;
}

/* A password that is longer than the hash function's unit counts as its digest. */
static bool begin_hmac(struct derivation *d)
{
    const EVP_MD *md = hash_md(d->p->hash);
    uint8_t key[HASH_BLOCK_MAX] = {0};
    bool ok = true;

    if (d->p->password_len > (size_t)EVP_MD_get_block_size(md))
        ok = EVP_Digest(d->p->password, d->p->password_len, key, NULL, md, NULL) == 1;
    else if (d->p->password_len)
        memcpy(key, d->p->password, d->p->password_len);
    ok = ok && begin_hash(d->in, md, key, 0x36) && begin_hash(d->out, md, key, 0x5c);
    OPENSSL_cleanse(key, sizeof(key));
    return ok;
}

static int begin(struct derivation *d)
{
    d->in = EVP_MD_CTX_new();
    d->out = EVP_MD_CTX_new();
    d->work = EVP_MD_CTX_new();
    if (!d->in || !d->out || !d->work)
        return -ENOMEM;
    return begin_hmac(d) ? 0 : -EINVAL;
}

static void end(struct derivation *d)
{
    EVP_MD_CTX_free(d->in); /* these wipe what they have seen */
    EVP_MD_CTX_free(d->out);
    EVP_MD_CTX_free(d->work);
    OPENSSL_cleanse(d, sizeof(*d));
}

/* u = HMAC(password, text + more) */
static bool hmac(struct derivation *d, const uint8_t *text, size_t len, const uint8_t *more,
                 size_t more_len)
{
    return EVP_MD_CTX_copy_ex(d->work, d->in) == 1 && EVP_DigestUpdate(d->work, text, len) == 1 &&
           EVP_DigestUpdate(d->work, more, more_len) == 1 &&
           EVP_DigestFinal_ex(d->work, d->u, NULL) == 1 &&
           EVP_MD_CTX_copy_ex(d->work, d->out) == 1 &&
           EVP_DigestUpdate(d->work, d->u, hash_len(d->p->hash)) == 1 &&
           EVP_DigestFinal_ex(d->work, d->u, NULL) == 1;
}

static bool iterate(struct derivation *d)
{
    size_t len = hash_len(d->p->hash);
    uint8_t number[4];
    bool ok;

    store_be32(number, (uint32_t)(d->at / len) + 1);
    ok = d->done ? hmac(d, d->u, len, NULL, 0)
                 : hmac(d, d->p->salt, d->p->salt_len, number, sizeof(number));
    if (d->done++ == 0)
        memset(d->sum, 0, sizeof(d->sum));
    for (size_t i = 0; i < len; i++)
        d->sum[i] ^= d->u[i];
    return ok;
}

/* The next piece. */
static void derive(void *arg)
{
    struct derivation *d = arg;
    size_t len = hash_len(d->p->hash);

    d->result = d->work ? 0 : begin(d);
    if (d->result < 0)
        return;
    for (uint32_t i = 0; i < PIECE && d->at < d->len; i++) {
        if (!iterate(d)) {
            d->result = -EINVAL;
            return;
        }
        if (d->done == d->p->iterations) {
            memcpy(d->ret + d->at, d->sum, MIN(len, d->len - d->at));
            d->at += MIN(len, d->len - d->at);
            d->done = 0;
        }
    }
}

int pbkdf2_co_derive(const struct pbkdf2 *p, uint8_t *ret, size_t len, uint64_t *ret_cpu_ns)
{
    struct derivation d = {.p = p, .ret = ret, .len = len};
    int r = 0;

    *ret_cpu_ns = 0;
    while (r == 0 && d.at < len) {
        uint64_t ns = 0;

        r = loop_co_compute_long(derive, &d, &ns);
        if (r == 0)
            r = d.result;
        if (r == 0)
            r = co_cancelled();
        *ret_cpu_ns += ns;
    }
    end(&d);
    return r;
}

int pbkdf2_co_rate(enum hash hash, size_t len, uint64_t *ret)
{
    static const uint8_t nothing[32];
    struct pbkdf2 p = {
        .hash = hash,
        .password = nothing,
        .password_len = sizeof(nothing),
        .salt = nothing,
        .salt_len = sizeof(nothing),
        .iterations = MEASURE_FIRST,
    };
    uint8_t key[KEY_MAX];
    uint64_t ns = 0;
    int r;

    for (;;) {
        r = pbkdf2_co_derive(&p, key, MIN(len, sizeof(key)), &ns);
        if (r < 0 || ns >= MEASURE_NS || p.iterations >= MEASURE_MAX)
            break;
        p.iterations *= 4;
    }
    if (r == 0)
        *ret = (uint64_t)p.iterations * NS_PER_S / MAX(ns, (uint64_t)1);
    return r;
}
