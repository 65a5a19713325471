/* SPDX-License-Identifier: Apache-2.0 */
/*
 * LUKS on-disk format 1.2.3. All integers are big endian:
 *
 *   0 magic | 6 version | 8 cipher | 40 mode | 72 hash | 104 payload sector | 108 key bytes | 112 digest | 132 its salt |
 *   164 its iterations | 168 UUID | 208 eight slots of 48 bytes: state, iterations, salt, sector of the material, stripes
 */
#include "crypto/luks-header.h"
#include "base/checked.h"
#include "base/endian.h"
#include "base/macros.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#define OFFSET_VERSION           6
#define OFFSET_CIPHER            8
#define OFFSET_MODE              40
#define OFFSET_HASH              72
#define OFFSET_PAYLOAD           104
#define OFFSET_KEY_LEN           108
#define OFFSET_DIGEST            112
#define OFFSET_DIGEST_SALT       132
#define OFFSET_DIGEST_ITERATIONS 164
#define OFFSET_UUID              168
#define OFFSET_SLOTS             208
#define SLOT_LEN                 48
#define SLOT_STATE               0
#define SLOT_ITERATIONS          4
#define SLOT_SALT                8
#define SLOT_MATERIAL            40
#define SLOT_STRIPES             44

#define SLOT_ACTIVE   UINT32_C(0x00ac71f3)
#define SLOT_INACTIVE UINT32_C(0x0000dead)

/* What is laid out here begins at pages of 4 KiB, as others do it. */
#define PAGE_SECTORS 8

static int read_text(const char *what, const uint8_t *bytes, size_t len, char *ret,
                     struct error **err)
{
    const uint8_t *end = memchr(bytes, '\0', len);

    if (!end)
        return error_set(err, EINVAL, "its %s does not end within %zu bytes", what, len);
    for (const uint8_t *p = bytes; p < end; p++) {
        if (*p < ' ' || *p > '~')
            return error_set(err, EINVAL, "its %s contains the byte 0x%02x", what, *p);
    }
    memcpy(ret, bytes, (size_t)(end - bytes) + 1);
    return 0;
}

static int read_slot(struct luks_slot *s, const uint8_t *b, unsigned i, struct error **err)
{
    uint32_t state = load_be32(b + SLOT_STATE);
    uint32_t stripes = load_be32(b + SLOT_STRIPES);

    if (state != SLOT_ACTIVE && state != SLOT_INACTIVE)
        return error_set(err, EINVAL,
                         "key slot %u has state 0x%08" PRIx32 ", expected 0x%08" PRIx32
                         " (active) or 0x%08" PRIx32,
                         i, state, SLOT_ACTIVE, SLOT_INACTIVE);
    s->active = state == SLOT_ACTIVE;
    s->iterations = load_be32(b + SLOT_ITERATIONS);
    s->material_sector = load_be32(b + SLOT_MATERIAL);
    memcpy(s->salt, b + SLOT_SALT, LUKS_SALT_LEN);
    if (s->active && (!s->iterations || s->iterations > LUKS_ITERATIONS_MAX))
        return error_set(err, EINVAL, "key slot %u has %" PRIu32 " iterations, expected 1 to %u", i,
                         s->iterations, LUKS_ITERATIONS_MAX);
    if (stripes != LUKS_STRIPES)
        return error_set(err, EINVAL, "key slot %u has %" PRIu32 " stripes, expected %d", i,
                         stripes, LUKS_STRIPES);
    return 0;
}

static int read_fields(struct luks_header *h, const uint8_t *b, struct error **err)
{
    int r;

    if ((r = read_text("cipher", b + OFFSET_CIPHER, LUKS_NAME_LEN, h->cipher, err)) < 0 ||
        (r = read_text("cipher mode", b + OFFSET_MODE, LUKS_NAME_LEN, h->mode, err)) < 0 ||
        (r = read_text("hash", b + OFFSET_HASH, LUKS_NAME_LEN, h->hash, err)) < 0 ||
        (r = read_text("UUID", b + OFFSET_UUID, LUKS_UUID_LEN, h->uuid, err)) < 0)
        return r;
    h->payload_sector = load_be32(b + OFFSET_PAYLOAD);
    h->key_len = load_be32(b + OFFSET_KEY_LEN);
    h->digest_iterations = load_be32(b + OFFSET_DIGEST_ITERATIONS);
    memcpy(h->digest, b + OFFSET_DIGEST, LUKS_DIGEST_LEN);
    memcpy(h->digest_salt, b + OFFSET_DIGEST_SALT, LUKS_SALT_LEN);
    if (!h->key_len || h->key_len > LUKS_KEY_MAX)
        return error_set(err, EINVAL, "its key has %" PRIu32 " bytes, expected 1 to %d", h->key_len,
                         LUKS_KEY_MAX);
    if (!h->digest_iterations || h->digest_iterations > LUKS_ITERATIONS_MAX)
        return error_set(err, EINVAL, "its digest has %" PRIu32 " iterations, expected 1 to %u",
                         h->digest_iterations, LUKS_ITERATIONS_MAX);
    for (unsigned i = 0; i < LUKS_SLOTS; i++) {
        r = read_slot(&h->slots[i], b + OFFSET_SLOTS + (size_t)i * SLOT_LEN, i, err);
        if (r < 0)
            return r;
    }
    return 0;
}

static uint64_t material_sectors(const struct luks_header *h)
{
    return align_up(luks_material_len(h->key_len), LUKS_SECTOR) / LUKS_SECTOR;
}

static int check_place(const struct luks_header *h, unsigned i, uint64_t area_len,
                       struct error **err)
{
    const struct luks_slot *s = &h->slots[i];
    uint64_t sectors = material_sectors(h);
    uint64_t end = s->material_sector + sectors;

    if (s->material_sector < LUKS_HEADER_BYTES / LUKS_SECTOR)
        return error_set(err, EINVAL,
                         "key slot %u has its material at sector %" PRIu32 ", within the header", i,
                         s->material_sector);
    if (h->payload_sector && end > h->payload_sector)
        return error_set(err, EINVAL,
                         "key slot %u has its material in %" PRIu64 " sectors from sector %" PRIu32
                         " on, but the disk begins at sector %" PRIu32,
                         i, sectors, s->material_sector, h->payload_sector);
    if (s->active && end > area_len / LUKS_SECTOR)
        return error_set(err, EINVAL,
                         "key slot %u has its material in %" PRIu64 " sectors from sector %" PRIu32
                         " on, but there are only %" PRIu64,
                         i, sectors, s->material_sector, area_len / LUKS_SECTOR);
    for (unsigned k = 0; k < i; k++) {
        if (ranges_overlap(s->material_sector, sectors, h->slots[k].material_sector, sectors))
            return error_set(err, EINVAL,
                             "key slots %u and %u overlap, at sectors %" PRIu32 " and %" PRIu32, k,
                             i, h->slots[k].material_sector, s->material_sector);
    }
    return 0;
}

int luks_header_parse(struct luks_header *ret, const uint8_t *bytes, size_t len, uint64_t area_len,
                      struct error **err)
{
    struct luks_header h = {.key_len = 0};
    uint16_t version;
    int r;

    if (len < LUKS_HEADER_BYTES || memcmp(bytes, LUKS_MAGIC, LUKS_MAGIC_LEN) != 0)
        return error_set(err, EINVAL, "it does not begin with a LUKS header");
    version = load_be16(bytes + OFFSET_VERSION);
    if (version != 1)
        return error_set(err, ENOTSUP, "LUKS version is %u, this program reads 1", version);
    r = read_fields(&h, bytes, err);
    for (unsigned i = 0; r == 0 && i < LUKS_SLOTS; i++)
        r = check_place(&h, i, area_len, err);
    if (r == 0)
        *ret = h;
    return r;
}

static void put_slot(const struct luks_slot *s, uint8_t *b)
{
    store_be32(b + SLOT_STATE, s->active ? SLOT_ACTIVE : SLOT_INACTIVE);
    store_be32(b + SLOT_ITERATIONS, s->iterations);
    memcpy(b + SLOT_SALT, s->salt, LUKS_SALT_LEN);
    store_be32(b + SLOT_MATERIAL, s->material_sector);
    store_be32(b + SLOT_STRIPES, LUKS_STRIPES);
}

void luks_header_build(const struct luks_header *h, uint8_t ret[LUKS_HEADER_BYTES])
{
    memset(ret, 0, LUKS_HEADER_BYTES);
    memcpy(ret, LUKS_MAGIC, LUKS_MAGIC_LEN);
    store_be16(ret + OFFSET_VERSION, 1);
    memcpy(ret + OFFSET_CIPHER, h->cipher, strlen(h->cipher));
    memcpy(ret + OFFSET_MODE, h->mode, strlen(h->mode));
    memcpy(ret + OFFSET_HASH, h->hash, strlen(h->hash));
    memcpy(ret + OFFSET_UUID, h->uuid, strlen(h->uuid));
    store_be32(ret + OFFSET_PAYLOAD, h->payload_sector);
    store_be32(ret + OFFSET_KEY_LEN, h->key_len);
    store_be32(ret + OFFSET_DIGEST_ITERATIONS, h->digest_iterations);
    memcpy(ret + OFFSET_DIGEST, h->digest, LUKS_DIGEST_LEN);
    memcpy(ret + OFFSET_DIGEST_SALT, h->digest_salt, LUKS_SALT_LEN);
    for (unsigned i = 0; i < LUKS_SLOTS; i++)
        put_slot(&h->slots[i], ret + OFFSET_SLOTS + (size_t)i * SLOT_LEN);
}

/* Copies what stands before any of `stops`. Returns what follows. */
static const char *cut(const char *from, const char *stops, char *ret)
{
    size_t len = strcspn(from, stops);

    memcpy(ret, from, len);
    ret[len] = '\0';
    return from + len + (from[len] != '\0');
}

void luks_header_names(const struct luks_header *h, struct luks_names *ret)
{
    const char *rest = cut(h->mode, "-", ret->mode);
    unsigned bits = h->key_len * 8;

    rest = cut(rest, ":", ret->iv);
    (void)cut(rest, "", ret->iv_hash);
    if (strcmp(ret->mode, "xts") == 0)
        bits /= 2;
    (void)snprintf(ret->cipher, sizeof(ret->cipher), "%s-%u", h->cipher, bits);
}

int luks_header_spec(const struct luks_header *h, struct cipher_spec *ret, enum hash *ret_hash,
                     struct error **err)
{
    struct luks_names n;
    int r;

    luks_header_names(h, &n);
    if ((r = cipher_alg_from_name(n.cipher, &ret->alg, err)) < 0 ||
        (r = cipher_mode_from_name(n.mode, &ret->mode, err)) < 0 ||
        (r = cipher_iv_from_name(n.iv, &ret->iv, err)) < 0 ||
        (r = hash_from_name(h->hash, ret_hash, err)) < 0)
        return r;
    if (ret->iv == CIPHER_IV_ESSIV && strcmp(n.iv_hash, "sha256") != 0)
        return error_set(err, ENOTSUP,
                         "IV generator essiv with hash '%s' is not supported: it is sha256",
                         n.iv_hash);
    if (luks_material_len(h->key_len) % LUKS_SECTOR)
        return error_set(err, ENOTSUP,
                         "a key of %" PRIu32 " bytes does not split into whole sectors",
                         h->key_len);
    return 0;
}

int luks_header_lay_out(struct luks_header *h, const struct cipher_spec *spec, enum hash hash,
                        struct error **err)
{
    bool essiv = spec->iv == CIPHER_IV_ESSIV;
    uint32_t sectors;

    h->key_len = (uint32_t)cipher_key_len(spec);
    if (luks_material_len(h->key_len) % LUKS_SECTOR)
        return error_set(
            err, ENOTSUP,
            "LUKS cannot have cipher %s with mode %s: its key does not split into whole "
            "sectors",
            cipher_alg_name(spec->alg), cipher_mode_name(spec->mode));
    (void)snprintf(h->cipher, sizeof(h->cipher), "aes");
    (void)snprintf(h->mode, sizeof(h->mode), "%s-%s%s", cipher_mode_name(spec->mode),
                   cipher_iv_name(spec->iv), essiv ? ":sha256" : "");
    (void)snprintf(h->hash, sizeof(h->hash), "%s", hash_name(hash));
    sectors = (uint32_t)align_up(material_sectors(h), PAGE_SECTORS);
    for (unsigned i = 0; i < LUKS_SLOTS; i++)
        h->slots[i].material_sector = PAGE_SECTORS + i * sectors;
    h->payload_sector = PAGE_SECTORS + LUKS_SLOTS * sectors;
    return 0;
}
