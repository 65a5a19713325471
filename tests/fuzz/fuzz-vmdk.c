/* SPDX-License-Identifier: Apache-2.0 */
/* Hostile VMDK images; see fuzz-import.h. */
#include "fuzz-import.h"

static struct image_bytes make(uint8_t shape)
{
    return vmdk_make(shape % 3);
}

static size_t place(const struct image_bytes *image, unsigned number)
{
    static const size_t places[] = {0, VMDK_MAKE_TEXT, VMDK_MAKE_DIRECTORY, VMDK_MAKE_TABLES,
                                    VMDK_MAKE_GRAINS};

    number %= ARRAY_SIZE(places) + 1;
    return number < ARRAY_SIZE(places) ? places[number] : image->len - 1536;
}

const struct import_fuzzer import_fuzzer = {.driver = "vmdk", .make = make, .place = place};
