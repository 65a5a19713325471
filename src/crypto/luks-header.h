/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The header of LUKS version 1: from hostile bytes (P6) to checked fields, and back. Everything here is pure.
 *
 * What a parsed header promises (each is an error otherwise):
 *   - texts end within their fields and are printable; the key has 1 to LUKS_KEY_MAX bytes;
 *   - the key slots' material lies behind the header, before the payload if there is one, and no two share a sector; that of an
 *     active slot lies within the file;
 *   - active slots have 1 to LUKS_ITERATIONS_MAX iterations, and all have LUKS_STRIPES stripes.
 * Whether we have such a cipher is told by luks_header_spec().
 */
#ifndef CAIRN_CRYPTO_LUKS_HEADER_H
#define CAIRN_CRYPTO_LUKS_HEADER_H

#include "base/error.h"
#include "crypto/hash.h"
#include "crypto/sector-cipher.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define LUKS_MAGIC     "LUKS\xba\xbe"
#define LUKS_MAGIC_LEN 6
#define LUKS_SECTOR    512
/* The header as it is read and written: whole sectors. */
#define LUKS_HEADER_BYTES 1024
#define LUKS_SLOTS        8
#define LUKS_STRIPES      4000
#define LUKS_DIGEST_LEN   20
#define LUKS_SALT_LEN     32
#define LUKS_KEY_MAX      64
#define LUKS_NAME_LEN     32
#define LUKS_UUID_LEN     40
#define LUKS_MATERIAL_MAX ((size_t)LUKS_KEY_MAX * LUKS_STRIPES)
/* The specification's lower bound, and ours above: a minute or so. */
#define LUKS_ITERATIONS_MIN 1000
#define LUKS_ITERATIONS_MAX (1u << 27)

struct luks_slot {
    bool active;
    uint32_t iterations;
    uint8_t salt[LUKS_SALT_LEN];
    uint32_t material_sector;
};

struct luks_header {
    char cipher[LUKS_NAME_LEN + 1]; /* "aes" */
    char mode[LUKS_NAME_LEN + 1];   /* "xts-plain64" */
    char hash[LUKS_NAME_LEN + 1];   /* "sha256" */
    char uuid[LUKS_UUID_LEN + 1];
    uint32_t payload_sector; /* where the disk begins; 0: it lies elsewhere */
    uint32_t key_len;        /* bytes */
    uint8_t digest[LUKS_DIGEST_LEN];
    uint8_t digest_salt[LUKS_SALT_LEN];
    uint32_t digest_iterations;
    struct luks_slot slots[LUKS_SLOTS];
};

/*
 * `bytes`: the first `len` bytes of the `area_len` bytes that header and slots lie in. -EINVAL: no LUKS header, or a damaged one;
 * -ENOTSUP: another version. What went wrong is said without a name before it.
 */
int luks_header_parse(struct luks_header *ret, const uint8_t *bytes, size_t len, uint64_t area_len,
                      struct error **err);
void luks_header_build(const struct luks_header *h, uint8_t ret[LUKS_HEADER_BYTES]);

/* Cipher, mode and hash; -ENOTSUP, naming it, for what is not there. */
int luks_header_spec(const struct luks_header *h, struct cipher_spec *ret, enum hash *ret_hash,
                     struct error **err);

/*
 * The parts of `mode` as QEMU's options have them, and the cipher with its length of key: "aes-256", "xts", "essiv", "sha256".
 * Parts that are not there are empty.
 */
struct luks_names {
    char cipher[LUKS_NAME_LEN + 16];
    char mode[LUKS_NAME_LEN + 1];
    char iv[LUKS_NAME_LEN + 1];
    char iv_hash[LUKS_NAME_LEN + 1];
};

void luks_header_names(const struct luks_header *h, struct luks_names *ret);

/* Bytes of a slot's material, and the sectors that it is given: pages. */
static inline size_t luks_material_len(uint32_t key_len)
{
    return (size_t)key_len * LUKS_STRIPES;
}

/*
 * Fills cipher, mode, hash, key_len and the places of slots and payload in: nothing else. -EINVAL for keys that do not
 * fill whole sectors when they are split.
 */
int luks_header_lay_out(struct luks_header *h, const struct cipher_spec *spec, enum hash hash,
                        struct error **err);

#endif
