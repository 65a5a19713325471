/* SPDX-License-Identifier: Apache-2.0 */
/* Hostile VDI images; see fuzz-import.h. */
#include "fuzz-import.h"

static struct image_bytes make(uint8_t shape)
{
    return vdi_make(shape & 1);
}

static size_t place(const struct image_bytes *image, unsigned number)
{
    static const size_t places[] = {0, 64, 340, 368, VDI_MAKE_MAP};

    (void)image;
    return places[number % ARRAY_SIZE(places)];
}

const struct import_fuzzer import_fuzzer = {.driver = "vdi", .make = make, .place = place};
