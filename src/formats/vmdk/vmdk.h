/* SPDX-License-Identifier: Apache-2.0 */
/*
 * vmdk: VMware's images, for reading. A disk is made of extents, one after the other: flat ones are bytes of a file, sparse
 * ones have grains that two levels of tables place, in a file that begins with a header. A text, the descriptor, names them; it
 * is the image's file, or lies within its only extent.
 *
 *     header, descriptor, grain directory -> grain tables -> grains
 *
 * Stream-optimised extents have compressed grains. Integers are little endian, and places are counted in sectors of 512 bytes.
 */
#ifndef CAIRN_FORMATS_VMDK_VMDK_H
#define CAIRN_FORMATS_VMDK_VMDK_H

#include "base/error.h"
#include "graph/node.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define VMDK_SECTOR 512u

/* More are refused: 2 TiB, if each has 2 GiB as the split formats have it. */
#define VMDK_EXTENTS_MAX 1024u
/* A longer descriptor is refused. */
#define VMDK_DESCRIPTOR_BYTES_MAX ((size_t)256 << 10)

enum vmdk_kind { VMDK_FLAT, VMDK_ZERO, VMDK_SPARSE };

/* A line of the descriptor. */
struct vmdk_line {
    enum vmdk_kind kind;
    const char *type; /* as it is written: "FLAT", "SPARSE", ... */
    uint64_t sectors;
    uint64_t first; /* FLAT: where it begins in its file, in sectors */
    char *name;     /* NULL: it has none */
};

struct vmdk_descriptor {
    uint32_t cid;
    uint32_t parent_cid;
    char *create_type;
    struct vmdk_line *lines;
    unsigned count;
};

/*
 * Reads a descriptor; `node` is named in errors. -EINVAL, -ENOTSUP for what is not read: differences to other images, devices,
 * names with a directory in them.
 */
int vmdk_descriptor_parse(struct vmdk_descriptor *ret, const uint8_t *text, size_t len,
                          const char *node, struct error **err);
void vmdk_descriptor_release(struct vmdk_descriptor *d);

/* Of an open node of this driver; borrowed. */
const struct vmdk_descriptor *vmdk_descriptor(const struct node *node);
/* Does the image lie in one file, together with its descriptor? */
bool vmdk_is_one_file(const struct node *node);
/* Of the extent of this number: the size of its grains, 0 if it has none, and whether they are compressed. */
uint64_t vmdk_grain_bytes(const struct node *node, unsigned extent, bool *ret_compressed);

#endif
