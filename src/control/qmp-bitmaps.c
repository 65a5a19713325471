/* SPDX-License-Identifier: Apache-2.0 */
/* What can be asked about dirty bitmaps. The commands that change them are in qmp-transaction.c. */
#include "base/alloc.h"
#include "base/macros.h"
#include "bitmaps/dirty-bitmap.h"
#include "control/control.h"
#include "control/describe-bitmaps.h"
#include "loop/co.h"
#include "schema-dispatch.h"

#include <errno.h>
#include <openssl/evp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* How many bits are hashed at a time, in bytes. */
#define HASH_STEP ((size_t)64 << 10)

static void hex(char *out, const uint8_t *bytes, size_t count)
{
    for (size_t i = 0; i < count; i++)
        snprintf(out + 2 * i, 3, "%02x", bytes[i]);
}

/* One step: the bitmap is looked up anew, since it may have gone meanwhile. Returns how many bytes of bits are left. */
static int64_t control_fn hash_step(EVP_MD_CTX *hash, struct graph *graph,
                                    struct dirty_bitmap_ref ref, uint64_t done, uint8_t *buf,
                                    struct error **err)
{
    const struct bitmap *bits;
    struct dirty_bitmap *d;
    uint64_t granules;
    uint64_t bytes;
    size_t step;
    int r = dirty_bitmap_find(graph, ref, &d, err);

    if (r < 0)
        return r;
    bits = dirty_bitmap_bits(d);
    granules = (bitmap_size(bits) + bitmap_granularity(bits) - 1) / bitmap_granularity(bits);
    bytes = MAX((granules + 63) / 64 * 8, (uint64_t)8);
    if (done >= bytes)
        return 0;
    step = (size_t)MIN(bytes - done, (uint64_t)HASH_STEP);
    bitmap_read(bits, done * 8, buf, step);
    if (EVP_DigestUpdate(hash, buf, step) != 1)
        return error_set(err, EIO, "libcrypto cannot hash");
    return (int64_t)(bytes - done - step);
}

static int co_fn control_fn hash_bitmap(EVP_MD_CTX *hash, struct graph *graph,
                                        struct dirty_bitmap_ref ref, uint8_t *ret_digest,
                                        struct error **err)
{
    AUTO(free_ptr) uint8_t *buf = try_alloc(1, HASH_STEP);
    uint64_t done = 0;
    int64_t left = 1;

    if (!buf)
        return error_set(err, ENOMEM, "no memory");
    if (EVP_DigestInit_ex(hash, EVP_sha256(), NULL) != 1)
        return error_set(err, EIO, "libcrypto has no SHA-256");
    while (left > 0) {
        left = hash_step(hash, graph, ref, done, buf, err);
        done += HASH_STEP;
        if (left > 0)
            co_yield ();
    }
    if (left < 0)
        return (int)left;
    return EVP_DigestFinal_ex(hash, ret_digest, NULL) == 1
               ? 0
               : error_set(err, EIO, "libcrypto cannot hash");
}

int qmp_x_debug_block_dirty_bitmap_sha256(struct qmp_session *session,
                                          const struct block_dirty_bitmap *args,
                                          struct block_dirty_bitmap_sha256 *ret, struct error **err)
{
    struct dirty_bitmap_ref ref = {.node = args->node, .name = args->name};
    uint8_t digest[EVP_MAX_MD_SIZE];
    EVP_MD_CTX *hash = EVP_MD_CTX_new();
    int r;

    if (!hash)
        return error_set(err, ENOMEM, "no memory");
    r = hash_bitmap(hash, control_of(session)->graph, ref, digest, err);
    EVP_MD_CTX_free(hash);
    if (r < 0)
        return r;
    ret->sha256 = xnew_n(char, 65);
    hex(ret->sha256, digest, 32);
    return 0;
}

static void add_description(const struct dirty_bitmap_picture *picture, void *arg)
{
    struct block_dirty_info_array *list = arg;
    struct block_dirty_info *info = &list->items[list->count++];

    info->name = xstrdup(picture->name);
    info->count = (int64_t)picture->count_bytes;
    info->granularity = picture->granularity;
    info->recording = picture->recording;
    info->busy = picture->busy;
    info->persistent = picture->persistent;
    info->has_inconsistent = picture->inconsistent; /* said only where it is */
    info->inconsistent = picture->inconsistent;
    info->generation = xnew_n(char, 2 * sizeof(picture->generation) + 1);
    hex(info->generation, picture->generation, sizeof(picture->generation));
    if (!picture->has_successor)
        return;
    info->successor_generation = xnew_n(char, 2 * sizeof(picture->successor_generation) + 1);
    hex(info->successor_generation, picture->successor_generation,
        sizeof(picture->successor_generation));
}

bool describe_bitmaps(const struct node *node, struct block_dirty_info_array *ret)
{
    unsigned count = dirty_bitmap_count(node);

    if (!count)
        return false;
    ret->items = xnew_n(struct block_dirty_info, count);
    dirty_bitmap_for_each(node, add_description, ret);
    return true;
}
