/* SPDX-License-Identifier: Apache-2.0 */
/* Hostile VHDX images, with and without something to replay; see fuzz-import.h. */
#include "base/crc32c.h"
#include "fuzz-import.h"

/* Made once: they are large. */
static struct image_bytes make(uint8_t shape)
{
    static struct image_bytes sound[2];
    struct image_bytes *s = &sound[shape & 1];
    struct image_bytes copy;

    if (!s->bytes) {
        *s = vhdx_make(shape & 1);
        memset(s->bytes + VHDX_MAKE_DATA + 65536, 0, s->len - VHDX_MAKE_DATA - 65536);
    }
    copy = image_bytes_new(s->len, 1);
    memcpy(copy.bytes, s->bytes, s->len);
    return copy;
}

static void sum(uint8_t *bytes, size_t len)
{
    store_le32(bytes + 4, 0);
    store_le32(bytes + 4, crc32c(0, bytes, len));
}

static size_t place(const struct image_bytes *image, unsigned number)
{
    static const size_t places[] = {
        65536,
        131072,
        196608,
        VHDX_MAKE_METADATA,
        VHDX_MAKE_ITEMS,
        VHDX_MAKE_BAT,
        VHDX_MAKE_LOG + (size_t)252 * 4096,
        VHDX_MAKE_LOG + (size_t)254 * 4096,
        VHDX_MAKE_LOG,
    };

    (void)image;
    return places[number % ARRAY_SIZE(places)];
}

/* Of the entries that have a sound length. */
static void fix_log(struct image_bytes *image)
{
    for (size_t s = 0; s < 256; s++) {
        uint8_t *e = image->bytes + VHDX_MAKE_LOG + s * 4096;
        uint32_t len = load_le32(e + 8);

        if (memcmp(e, "loge", 4) == 0 && len && len <= (256 - s) * 4096 && len <= 65536)
            sum(e, len);
    }
}

static void fix(struct image_bytes *image)
{
    sum(image->bytes + 65536, 4096);
    sum(image->bytes + 131072, 4096);
    sum(image->bytes + 196608, 65536);
    fix_log(image);
}

const struct import_fuzzer import_fuzzer = {
    .driver = "vhdx", .make = make, .place = place, .fix = fix};
