/* SPDX-License-Identifier: Apache-2.0 */
/* Hostile VHD images; see fuzz-import.h. */
#include "fuzz-import.h"

static struct image_bytes make(uint8_t shape)
{
    return vpc_make(shape & 1);
}

static size_t place(const struct image_bytes *image, unsigned number)
{
    static const size_t places[] = {0, VPC_MAKE_HEADER, VPC_MAKE_TABLE, VPC_MAKE_DATA};

    number %= ARRAY_SIZE(places) + 1;
    return number < ARRAY_SIZE(places) ? places[number] : image->len - 512;
}

static void fix(struct image_bytes *image)
{
    vpc_sum(image->bytes, 512, 64);
    vpc_sum(image->bytes + image->len - 512, 512, 64);
    vpc_sum(image->bytes + VPC_MAKE_HEADER, 1024, 36);
}

const struct import_fuzzer import_fuzzer = {
    .driver = "vpc", .make = make, .place = place, .fix = fix};
