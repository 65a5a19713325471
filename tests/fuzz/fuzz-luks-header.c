/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The header of a hostile LUKS volume. The first four bytes of an input say, as a big-endian number of sectors, how long the file is.
 * What is accepted must keep the promises of luks-header.h, and is written again as it was read.
 */
#include "base/checked.h"
#include "base/endian.h"
#include "base/error.h"
#include "crypto/luks-header.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void must(bool condition)
{
    if (!condition)
        abort();
}

static void check_slots(const struct luks_header *h, uint64_t area_len)
{
    uint64_t len = luks_material_len(h->key_len);

    for (unsigned i = 0; i < LUKS_SLOTS; i++) {
        uint64_t at = (uint64_t)h->slots[i].material_sector * LUKS_SECTOR;

        must(at >= LUKS_HEADER_BYTES);
        must(!h->payload_sector || at + len <= (uint64_t)h->payload_sector * LUKS_SECTOR);
        if (h->slots[i].active) {
            must(range_within(at, len, area_len));
            must(h->slots[i].iterations >= 1 && h->slots[i].iterations <= LUKS_ITERATIONS_MAX);
        }
        for (unsigned k = 0; k < i; k++)
            must(
                !ranges_overlap(at, len, (uint64_t)h->slots[k].material_sector * LUKS_SECTOR, len));
    }
}

/* The unused bytes of texts, and those behind the slots, are not kept. */
static void check_again(const struct luks_header *h, uint64_t area_len)
{
    uint8_t bytes[LUKS_HEADER_BYTES];
    struct luks_header again;
    struct error *err = NULL;

    luks_header_build(h, bytes);
    must(luks_header_parse(&again, bytes, sizeof(bytes), area_len, &err) == 0);
    must(strcmp(again.cipher, h->cipher) == 0 && strcmp(again.mode, h->mode) == 0 &&
         strcmp(again.hash, h->hash) == 0 && strcmp(again.uuid, h->uuid) == 0);
    must(memcmp(again.digest, h->digest, sizeof(h->digest)) == 0);
    must(memcmp(again.slots, h->slots, sizeof(h->slots)) == 0);
    must(again.payload_sector == h->payload_sector && again.key_len == h->key_len);
}

static void check_spec(const struct luks_header *h)
{
    struct error *err = NULL;
    struct luks_names names;
    struct cipher_spec spec;
    enum hash hash;

    luks_header_names(h, &names);
    must(strlen(names.mode) + strlen(names.iv) + strlen(names.iv_hash) <= LUKS_NAME_LEN);
    if (luks_header_spec(h, &spec, &hash, &err) == 0) {
        must(cipher_key_len(&spec) == h->key_len);
        must(hash < HASHES && luks_material_len(h->key_len) % LUKS_SECTOR == 0);
    } else {
        must(err && !strchr(error_text(err), '\n'));
    }
    error_free(&err);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct error *err = NULL;
    struct luks_header h;
    uint64_t area_len;
    uint8_t *bytes;

    if (size < 4)
        return 0;
    area_len = (uint64_t)load_be32(data) * LUKS_SECTOR;
    bytes = malloc(size - 4 + (size == 4)); /* of its own, so that its end is seen */
    must(bytes != NULL);
    memcpy(bytes, data + 4, size - 4);
    memset(&h, 0, sizeof(h));
    if (luks_header_parse(&h, bytes, size - 4, area_len, &err) == 0) {
        must(!err);
        check_slots(&h, area_len);
        check_again(&h, area_len);
        check_spec(&h);
    } else {
        must(err && !strchr(error_text(err), '\n'));
    }
    error_free(&err);
    free(bytes);
    return 0;
}
