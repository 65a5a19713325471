/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Encryption of disks in sectors of 512 bytes, each with the number of its sector as its IV.
 *
 * CIPHER-1 A loop has a context of its own in each cipher, which it alone touches: nothing on the way of a small request is locked
 *          or shared. Long runs are computed on other threads, each of which takes a context that nobody uses.
 * CIPHER-2 Keys are wiped when their cipher is freed, and never put into a message.
 */
#ifndef CAIRN_CRYPTO_SECTOR_CIPHER_H
#define CAIRN_CRYPTO_SECTOR_CIPHER_H

#include "base/context.h"
#include "base/error.h"
#include "crypto/hash.h"

#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

#define SECTOR_CIPHER_SECTOR  512
#define SECTOR_CIPHER_KEY_MAX 64

enum cipher_alg { CIPHER_AES_128, CIPHER_AES_192, CIPHER_AES_256, CIPHER_ALGS };

enum cipher_mode { CIPHER_XTS, CIPHER_CBC, CIPHER_MODES };

enum cipher_iv {
    CIPHER_IV_PLAIN,   /* 32 bits of the number */
    CIPHER_IV_PLAIN64, /* 64 bits */
    CIPHER_IV_ESSIV,   /* these, encrypted with the hash of the key */
    CIPHER_IVS,
};

struct cipher_spec {
    enum cipher_alg alg;
    enum cipher_mode mode;
    enum cipher_iv iv; /* ESSIV: always with sha256 */
};

/* As QEMU's options name them: "aes-256", "xts", "plain64". -ENOTSUP with what there is. */
const char *cipher_alg_name(enum cipher_alg alg);
const char *cipher_mode_name(enum cipher_mode mode);
const char *cipher_iv_name(enum cipher_iv iv);
int cipher_alg_from_name(const char *name, enum cipher_alg *ret, struct error **err);
int cipher_mode_from_name(const char *name, enum cipher_mode *ret, struct error **err);
int cipher_iv_from_name(const char *name, enum cipher_iv *ret, struct error **err);

/* Bytes: in XTS mode there are two keys. */
size_t cipher_key_len(const struct cipher_spec *spec);

struct sector_cipher;

/*
 * `key` has cipher_key_len() bytes, which are copied. May load parts of the library: for threads that may sleep. -EINVAL for keys
 * that XTS does not allow, -ENOMEM.
 */
int sector_cipher_new(struct sector_cipher **ret, const struct cipher_spec *spec,
                      const uint8_t *key);
/* Nobody uses it any more. Returns NULL. */
struct sector_cipher *sector_cipher_free(struct sector_cipher *c);

/*
 * Whole sectors of memory: `sector` is the number of the first one. Decrypting is done in place; encrypting leaves the source as it
 * is. What is long is done on other threads. -ENOMEM, -EIO.
 */
int co_fn sector_cipher_co_decrypt(struct sector_cipher *c, uint64_t sector,
                                   const struct iovec *iov, int iov_count);
int co_fn sector_cipher_co_encrypt(struct sector_cipher *c, uint64_t sector,
                                   const struct iovec *iov, int iov_count, uint8_t *ret);

/* The same on the calling thread, in place: for threads that may take their time. */
int sector_cipher_decrypt(struct sector_cipher *c, uint64_t sector, uint8_t *data, size_t len);
int sector_cipher_encrypt(struct sector_cipher *c, uint64_t sector, uint8_t *data, size_t len);

#endif
