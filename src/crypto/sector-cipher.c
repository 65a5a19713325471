/* SPDX-License-Identifier: Apache-2.0 */
/* Sectors through OpenSSL's ciphers. */
#include "crypto/sector-cipher.h"
#include "base/alloc.h"
#include "base/endian.h"
#include "base/macros.h"
#include "loop/compute.h"
#include "loop/lock.h"
#include "loop/loop.h"

#include <assert.h>
#include <errno.h>
#include <openssl/crypto.h>
#include <stdlib.h>
#include <string.h>

#define SECTOR SECTOR_CIPHER_SECTOR
#define BLOCK  16

/* Runs of at least this length go to other threads: what takes longer than a hand-over, but no long part of a tick. */
#define COMPUTE_BYTES ((size_t)64 << 10)

/* ---- names ---- */

static const char *const alg_names[CIPHER_ALGS] = {"aes-128", "aes-192", "aes-256"};
static const char *const mode_names[CIPHER_MODES] = {"xts", "cbc"};
static const char *const iv_names[CIPHER_IVS] = {"plain", "plain64", "essiv"};

const char *cipher_alg_name(enum cipher_alg alg)
{
    return alg_names[alg];
}

const char *cipher_mode_name(enum cipher_mode mode)
{
    return mode_names[mode];
}

const char *cipher_iv_name(enum cipher_iv iv)
{
    return iv_names[iv];
}

static int find_name(const char *const *names, unsigned count, const char *name)
{
    for (unsigned i = 0; i < count; i++) {
        if (strcmp(names[i], name) == 0)
            return (int)i;
    }
    return -ENOENT;
}

int cipher_alg_from_name(const char *name, enum cipher_alg *ret, struct error **err)
{
    int i = find_name(alg_names, CIPHER_ALGS, name);

    if (i < 0)
        return error_set(err, ENOTSUP,
                         "cipher '%s' is not supported: it is one of aes-128, aes-192, aes-256",
                         name);
    *ret = (enum cipher_alg)i;
    return 0;
}

int cipher_mode_from_name(const char *name, enum cipher_mode *ret, struct error **err)
{
    int i = find_name(mode_names, CIPHER_MODES, name);

    if (i < 0)
        return error_set(err, ENOTSUP, "cipher mode '%s' is not supported: it is xts or cbc", name);
    *ret = (enum cipher_mode)i;
    return 0;
}

int cipher_iv_from_name(const char *name, enum cipher_iv *ret, struct error **err)
{
    int i = find_name(iv_names, CIPHER_IVS, name);

    if (i < 0)
        return error_set(err, ENOTSUP,
                         "IV generator '%s' is not supported: it is one of plain, plain64, essiv",
                         name);
    *ret = (enum cipher_iv)i;
    return 0;
}

static size_t aes_key_len(enum cipher_alg alg)
{
    static const size_t lens[CIPHER_ALGS] = {16, 24, 32};

    return lens[alg];
}

size_t cipher_key_len(const struct cipher_spec *spec)
{
    return aes_key_len(spec->alg) * (spec->mode == CIPHER_XTS ? 2 : 1);
}

/* ---- contexts ---- */

/* What one thread at a time works with. */
struct context {
    struct context *next;   /* in cipher.idle */
    EVP_CIPHER_CTX *way[2]; /* decrypting, encrypting */
    EVP_CIPHER_CTX *iv;     /* of ESSIV */
    EVP_CIPHER_CTX *tweak;  /* of XTS where the library has only the cipher of blocks */
};

struct sector_cipher {
    struct cipher_spec spec;           /* constant */
    struct context *first;             /* the others are copies of it; nobody works with it */
    struct context *of_loop[LOOP_MAX]; /* each one touched by its loop alone (CIPHER-1) */

    struct tiny_lock lock;
    struct context *idle; /* Protected by lock. */
};

static struct context *context_free(struct context *x)
{
    if (x) {
        EVP_CIPHER_CTX_free(x->way[0]); /* these wipe their keys (CIPHER-2) */
        EVP_CIPHER_CTX_free(x->way[1]);
        EVP_CIPHER_CTX_free(x->iv);
        EVP_CIPHER_CTX_free(x->tweak);
        free(x);
    }
    return NULL;
}

static EVP_CIPHER_CTX *keyed(const EVP_CIPHER *cipher, const uint8_t *key, bool encrypt)
{
    EVP_CIPHER_CTX *ctx = EVP_CIPHER_CTX_new();

    if (!ctx || EVP_CipherInit_ex(ctx, cipher, NULL, key, NULL, encrypt) != 1) {
        EVP_CIPHER_CTX_free(ctx);
        return NULL;
    }
    (void)EVP_CIPHER_CTX_set_padding(ctx, 0);
    return ctx;
}

static const EVP_CIPHER *block_cipher(enum cipher_alg alg)
{
    return alg == CIPHER_AES_128   ? EVP_aes_128_ecb()
           : alg == CIPHER_AES_192 ? EVP_aes_192_ecb()
                                   : EVP_aes_256_ecb();
}

static const EVP_CIPHER *cbc_cipher(enum cipher_alg alg)
{
    return alg == CIPHER_AES_128   ? EVP_aes_128_cbc()
           : alg == CIPHER_AES_192 ? EVP_aes_192_cbc()
                                   : EVP_aes_256_cbc();
}

/* NULL: the library has no such XTS. */
static const EVP_CIPHER *xts_cipher(enum cipher_alg alg)
{
    return alg == CIPHER_AES_128   ? EVP_aes_128_xts()
           : alg == CIPHER_AES_256 ? EVP_aes_256_xts()
                                   : NULL;
}

/* The key of ESSIV is the hash of all of the key. */
static EVP_CIPHER_CTX *essiv_context(const struct cipher_spec *spec, const uint8_t *key)
{
    uint8_t digest[HASH_LEN_MAX];
    EVP_CIPHER_CTX *ctx = NULL;

    if (EVP_Digest(key, cipher_key_len(spec), digest, NULL, EVP_sha256(), NULL) == 1)
        ctx = keyed(EVP_aes_256_ecb(), digest, true);
    OPENSSL_cleanse(digest, sizeof(digest));
    return ctx;
}

static struct context *context_new(const struct cipher_spec *spec, const uint8_t *key)
{
    const EVP_CIPHER *whole =
        spec->mode == CIPHER_XTS ? xts_cipher(spec->alg) : cbc_cipher(spec->alg);
    struct context *x = try_new(struct context);
    bool good = x;

    for (unsigned i = 0; good && i < 2; i++) {
        x->way[i] = keyed(whole ? whole : block_cipher(spec->alg), key, i == 1);
        good = x->way[i];
    }
    if (good && !whole) {
        x->tweak = keyed(block_cipher(spec->alg), key + aes_key_len(spec->alg), true);
        good = x->tweak;
    }
    if (good && spec->iv == CIPHER_IV_ESSIV) {
        x->iv = essiv_context(spec, key);
        good = x->iv;
    }
    return good ? x : context_free(x);
}

static bool copy_context(EVP_CIPHER_CTX **to, const EVP_CIPHER_CTX *from)
{
    if (!from)
        return true;
    *to = EVP_CIPHER_CTX_new();
    return *to && EVP_CIPHER_CTX_copy(*to, from) == 1;
}

static struct context *context_copy(const struct context *from)
{
    struct context *x = try_new(struct context);

    if (x && copy_context(&x->way[0], from->way[0]) && copy_context(&x->way[1], from->way[1]) &&
        copy_context(&x->iv, from->iv) && copy_context(&x->tweak, from->tweak))
        return x;
    return context_free(x);
}

int sector_cipher_new(struct sector_cipher **ret, const struct cipher_spec *spec,
                      const uint8_t *key)
{
    struct sector_cipher *c;

    /* The two keys of XTS must differ, or it is no XTS. */
    if (spec->mode == CIPHER_XTS &&
        CRYPTO_memcmp(key, key + aes_key_len(spec->alg), aes_key_len(spec->alg)) == 0)
        return -EINVAL;
    c = try_new(struct sector_cipher);
    if (!c)
        return -ENOMEM;
    c->spec = *spec;
    c->first = context_new(spec, key);
    if (!c->first) {
        free(c);
        return -ENOMEM;
    }
    *ret = c;
    return 0;
}

struct sector_cipher *sector_cipher_free(struct sector_cipher *c)
{
    if (!c)
        return NULL;
    for (unsigned i = 0; i < LOOP_MAX; i++)
        (void)context_free(c->of_loop[i]);
    while (c->idle) {
        struct context *next = c->idle->next;

        (void)context_free(c->idle);
        c->idle = next;
    }
    (void)context_free(c->first);
    free(c);
    return NULL;
}

/* CIPHER-1: for the thread of a loop. */
static struct context *context_of_loop(struct sector_cipher *c)
{
    struct context **at = &c->of_loop[loop_index(loop_self())];

    if (unlikely(!*at))
        *at = context_copy(c->first);
    return *at;
}

/* For other threads: one that nobody uses. */
static struct context *context_borrow(struct sector_cipher *c)
{
    struct context *x;

    tiny_lock_acquire(&c->lock);
    x = c->idle;
    if (x)
        c->idle = x->next;
    tiny_lock_release(&c->lock);
    return x ? x : context_copy(c->first);
}

static void context_return(struct sector_cipher *c, struct context *x)
{
    tiny_lock_acquire(&c->lock);
    x->next = c->idle;
    c->idle = x;
    tiny_lock_release(&c->lock);
}

/* ---- one sector ---- */

static bool run(EVP_CIPHER_CTX *ctx, const uint8_t *in, uint8_t *out, int len)
{
    int n = 0;

    return EVP_CipherUpdate(ctx, out, &n, in, len) == 1 && n == len;
}

static bool make_iv(const struct sector_cipher *c, struct context *x, uint64_t sector,
                    uint8_t iv[BLOCK])
{
    memset(iv, 0, BLOCK);
    store_le64(iv, c->spec.iv == CIPHER_IV_PLAIN ? (uint32_t)sector : sector);
    return c->spec.iv != CIPHER_IV_ESSIV || run(x->iv, iv, iv, BLOCK);
}

/* Times x in the field of XTS. */
static void multiply(uint8_t t[BLOCK])
{
    uint64_t low = load_le64(t);
    uint64_t high = load_le64(t + 8);
    uint64_t carry = high >> 63;

    store_le64(t + 8, high << 1 | low >> 63);
    store_le64(t, low << 1 ^ carry * 0x87);
}

static void add_tweaks(const uint8_t *tweaks, const uint8_t *in, uint8_t *out)
{
    for (size_t i = 0; i < SECTOR; i++)
        out[i] = in[i] ^ tweaks[i];
}

/* XTS of the cipher of blocks: IEEE 1619. */
static bool xts_by_blocks(struct context *x, bool encrypt, const uint8_t *iv, const uint8_t *in,
                          uint8_t *out)
{
    uint8_t tweaks[SECTOR];
    uint8_t t[BLOCK];

    if (!run(x->tweak, iv, t, BLOCK))
        return false;
    for (size_t at = 0; at < SECTOR; at += BLOCK) {
        memcpy(tweaks + at, t, BLOCK);
        multiply(t);
    }
    add_tweaks(tweaks, in, out);
    if (!run(x->way[encrypt], out, out, SECTOR))
        return false;
    add_tweaks(tweaks, out, out);
    return true;
}

static bool crypt_sector(const struct sector_cipher *c, struct context *x, bool encrypt,
                         uint64_t sector, const uint8_t *in, uint8_t *out)
{
    uint8_t iv[BLOCK];

    if (!make_iv(c, x, sector, iv))
        return false;
    if (x->tweak)
        return xts_by_blocks(x, encrypt, iv, in, out);
    return EVP_CipherInit_ex(x->way[encrypt], NULL, NULL, NULL, iv, -1) == 1 &&
           run(x->way[encrypt], in, out, SECTOR);
}

/* ---- many ---- */

/* A place in vectors. */
struct cursor {
    const struct iovec *iov; /* the next one that is not used up */
    size_t done;             /* bytes of it */
};

static uint8_t *cursor_at(struct cursor *c, size_t *ret_len)
{
    while (c->done == c->iov->iov_len) {
        c->iov++;
        c->done = 0;
    }
    *ret_len = c->iov->iov_len - c->done;
    return (uint8_t *)c->iov->iov_base + c->done;
}

/* Moves a sector that lies in several vectors to `flat`, or from there. */
static void cursor_copy(struct cursor *c, uint8_t *flat, bool to_flat)
{
    for (size_t at = 0; at < SECTOR;) {
        size_t len;
        uint8_t *p = cursor_at(c, &len);

        len = MIN(len, SECTOR - at);
        if (to_flat)
            memcpy(flat + at, p, len);
        else
            memcpy(p, flat + at, len);
        c->done += len;
        at += len;
    }
}

/* Work for one thread. */
struct crypting {
    struct sector_cipher *c;
    bool encrypt;
    uint64_t sector;
    struct cursor in;
    struct cursor out;
    size_t len;
    int result;
};

static bool crypt_next(struct crypting *w, struct context *x)
{
    uint8_t gathered[SECTOR];
    size_t in_len;
    size_t out_len;
    const uint8_t *in = cursor_at(&w->in, &in_len);
    uint8_t *out = cursor_at(&w->out, &out_len);
    bool good;

    if (likely(in_len >= SECTOR && out_len >= SECTOR)) {
        w->in.done += SECTOR;
        w->out.done += SECTOR;
        return crypt_sector(w->c, x, w->encrypt, w->sector++, in, out);
    }
    cursor_copy(&w->in, gathered, true);
    good = crypt_sector(w->c, x, w->encrypt, w->sector++, gathered, gathered);
    cursor_copy(&w->out, gathered, false);
    OPENSSL_cleanse(gathered, sizeof(gathered));
    return good;
}

static int crypt_all(struct crypting *w, struct context *x)
{
    for (size_t done = 0; done < w->len; done += SECTOR) {
        if (unlikely(!crypt_next(w, x)))
            return -EIO;
    }
    return 0;
}

static void crypt_elsewhere(void *arg)
{
    struct crypting *w = arg;
    struct context *x = context_borrow(w->c);

    w->result = x ? crypt_all(w, x) : -ENOMEM;
    if (x)
        context_return(w->c, x);
}

static int co_fn crypt_here_or_elsewhere(struct crypting *w)
{
    struct context *x;
    int r;

    if (w->len >= COMPUTE_BYTES) {
        r = loop_co_compute(crypt_elsewhere, w);
        return r < 0 ? r : w->result;
    }
    x = context_of_loop(w->c);
    return likely(x) ? crypt_all(w, x) : -ENOMEM;
}

static size_t length_of(const struct iovec *iov, int iov_count)
{
    size_t len = 0;

    for (int i = 0; i < iov_count; i++)
        len += iov[i].iov_len;
    assert(len % SECTOR == 0);
    return len;
}

int sector_cipher_co_decrypt(struct sector_cipher *c, uint64_t sector, const struct iovec *iov,
                             int iov_count)
{
    struct crypting w = {.c = c,
                         .sector = sector,
                         .in = {iov, 0},
                         .out = {iov, 0},
                         .len = length_of(iov, iov_count)};

    return crypt_here_or_elsewhere(&w);
}

int sector_cipher_co_encrypt(struct sector_cipher *c, uint64_t sector, const struct iovec *iov,
                             int iov_count, uint8_t *ret)
{
    struct iovec out = {ret, length_of(iov, iov_count)};
    struct crypting w = {.c = c,
                         .encrypt = true,
                         .sector = sector,
                         .in = {iov, 0},
                         .out = {&out, 0},
                         .len = out.iov_len};

    return crypt_here_or_elsewhere(&w);
}

static int crypt_flat(struct sector_cipher *c, bool encrypt, uint64_t sector, uint8_t *data,
                      size_t len)
{
    struct iovec iov = {data, len};
    struct crypting w = {.c = c,
                         .encrypt = encrypt,
                         .sector = sector,
                         .in = {&iov, 0},
                         .out = {&iov, 0},
                         .len = len};

    assert(len % SECTOR == 0);
    crypt_elsewhere(&w);
    return w.result;
}

int sector_cipher_decrypt(struct sector_cipher *c, uint64_t sector, uint8_t *data, size_t len)
{
    return crypt_flat(c, false, sector, data, len);
}

int sector_cipher_encrypt(struct sector_cipher *c, uint64_t sector, uint8_t *data, size_t len)
{
    return crypt_flat(c, true, sector, data, len);
}
