/* SPDX-License-Identifier: Apache-2.0 */
/* vmdk: opening, and which extent a place belongs to. */
#include "formats/vmdk/vmdk.h"
#include "base/alloc.h"
#include "base/checked.h"
#include "base/endian.h"
#include "formats/vmdk/vmdk-internal.h"
#include "graph/gate.h"
#include "graph/graph.h"
#include "vmdk-options.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define SIGNATURE_LEN 4

const struct vmdk_extent *vmdk_extent_at(const struct vmdk *v, uint64_t offset)
{
    unsigned low = 0;
    unsigned high = v->count;

    while (high - low > 1) {
        unsigned middle = low + (high - low) / 2;

        if (v->extents[middle].start <= offset)
            low = middle;
        else
            high = middle;
    }
    return &v->extents[low];
}

static int co_fn vmdk_co_map(struct node *node, const struct request *req, uint64_t offset,
                             uint64_t len, struct mapping *ret)
{
    struct vmdk *v = node_state(node);
    const struct vmdk_extent *e = vmdk_extent_at(v, offset);
    uint64_t inside = offset - e->start;

    len = MIN(len, e->len - inside);
    switch (e->kind) {
    case VMDK_FLAT:
        *ret = (struct mapping){.kind = MAPPING_DATA,
                                .len = len,
                                .host_offset = e->file_start + inside,
                                .host = e->file,
                                .holes = true};
        return 0;
    case VMDK_ZERO:
        *ret = (struct mapping){.kind = MAPPING_ZERO, .len = len};
        return 0;
    case VMDK_SPARSE:
        break;
    }
    return vmdk_sparse_map(v, e, req, inside, len, ret);
}

/* ---- opening ---- */

/* The descriptor of an image in one file lies in it; of others it is the file. */
static int co_fn read_descriptor(struct vmdk *v, const struct request *by, uint64_t offset,
                                 uint64_t len, struct error **err)
{
    const char *name = node_name(v->import.node);
    struct edge *file = node_file(v->import.node);
    AUTO(free_ptr) uint8_t *text = NULL;
    int r;

    if (!len || len > VMDK_DESCRIPTOR_BYTES_MAX)
        return error_set(err, EINVAL,
                         "node '%s': a descriptor of %" PRIu64 " bytes, and not of 1 to %zu", name,
                         len, VMDK_DESCRIPTOR_BYTES_MAX);
    text = try_new_n(uint8_t, (size_t)len);
    if (!text)
        return error_set(err, ENOMEM, "no memory");
    r = import_co_read_named(&v->import, by, "descriptor", file, offset, text, (size_t)len, err);
    return r < 0 ? r : vmdk_descriptor_parse(&v->descriptor, text, (size_t)len, name, err);
}

static int co_fn open_one_file(struct vmdk *v, const struct request *by, struct error **err)
{
    const char *name = node_name(v->import.node);
    struct vmdk_extent *e = &v->extents[0];
    uint64_t capacity;
    uint64_t text;
    uint64_t text_len;
    int r;

    e->kind = VMDK_SPARSE;
    e->file = node_file(v->import.node);
    e->first_sector_known = true;
    r = vmdk_sparse_open(v, by, e, &capacity, &text, &text_len, err);
    if (r < 0)
        return r;
    if (!text)
        return error_set(err, EINVAL,
                         "node '%s': this is an extent of a larger image: open its descriptor",
                         name);
    if (text > e->file_size || text_len > e->file_size)
        return error_set(err, EINVAL,
                         "node '%s': a descriptor of %" PRIu64
                         " sectors cannot lie at sector %" PRIu64,
                         name, text_len, text);
    r = read_descriptor(v, by, text * VMDK_SECTOR, text_len * VMDK_SECTOR, err);
    if (r == 0 && (v->descriptor.count != 1 || v->descriptor.lines[0].kind != VMDK_SPARSE))
        r = error_set(err, ENOTSUP, "node '%s': the descriptor within the extent names other ones",
                      name);
    e->len = capacity * VMDK_SECTOR;
    return r;
}

/* Q6: a file in the descriptor's own directory. What may be opened there, grants say. */
static int check_name(const char *name, const char *node, struct error **err)
{
    if (strpbrk(name, "/\\:") || strcmp(name, "..") == 0 || strcmp(name, ".") == 0)
        return error_set(err, EACCES,
                         "node '%s': extent '%.200s' is not named as a file in the image's own "
                         "directory, and others are not opened",
                         node, name);
    return 0;
}

static int co_fn control_fn attach(struct vmdk *v, unsigned i, struct error **err)
{
    const char *name = v->descriptor.lines[i].name;
    char child[32];
    int r = check_name(name, node_name(v->import.node), err);

    (void)snprintf(child, sizeof(child), "extents.%u", i);
    if (r == 0)
        r = node_co_attach_file(v->import.node, child, name, err);
    if (r == 0)
        v->extents[i].file = node_child(v->import.node, child);
    return r;
}

/* Does its file have as much as the descriptor says? */
static int co_fn open_sparse(struct vmdk *v, const struct request *by, unsigned i,
                             struct error **err)
{
    const struct vmdk_line *line = &v->descriptor.lines[i];
    uint64_t capacity;
    uint64_t text;
    uint64_t text_len;
    int r = vmdk_sparse_open(v, by, &v->extents[i], &capacity, &text, &text_len, err);

    if (r == 0 && capacity < line->sectors)
        r = error_set(err, EINVAL,
                      "node '%s': it has %" PRIu64 " sectors, and the descriptor says %" PRIu64,
                      node_name(v->import.node), capacity, line->sectors);
    return r;
}

static int check_flat(const struct vmdk *v, const struct vmdk_extent *e, struct error **err)
{
    uint64_t size = node_size(edge_node(e->file));

    if (!range_within(e->file_start, e->len, size)) /* IMPORT-2 */
        return error_set(err, EINVAL,
                         "node '%s': %" PRIu64 " bytes cannot lie at %" PRIu64
                         " of a file of %" PRIu64,
                         node_name(v->import.node), e->len, e->file_start, size);
    return 0;
}

static int co_fn control_fn open_one_of_many(struct vmdk *v, const struct request *by, unsigned i,
                                             struct error **err)
{
    const struct vmdk_line *line = &v->descriptor.lines[i];
    struct vmdk_extent *e = &v->extents[i];
    int r;

    e->kind = line->kind;
    e->len = line->sectors * VMDK_SECTOR;
    e->file_start = line->first * VMDK_SECTOR;
    if (e->kind == VMDK_ZERO)
        return 0;
    r = attach(v, i, err);
    if (r < 0)
        return r;
    r = e->kind == VMDK_FLAT ? check_flat(v, e, err) : open_sparse(v, by, i, err);
    return r < 0 ? error_wrap(err, r, "extent '%.200s'", line->name) : 0;
}

static int co_fn control_fn open_extents(struct vmdk *v, const struct request *by,
                                         struct error **err)
{
    struct edge *file = node_file(v->import.node);
    uint64_t size = node_size(edge_node(file));
    uint8_t signature[SIGNATURE_LEN];
    int r = import_co_read_named(&v->import, by, "signature", file, 0, signature, sizeof(signature),
                                 err);

    if (r < 0)
        return r;
    v->one_file = memcmp(signature, "KDMV", 4) == 0 || memcmp(signature, "COWD", 4) == 0;
    if (!v->one_file)
        r = read_descriptor(v, by, 0, size, err);
    if (r < 0)
        return r;
    v->count = v->one_file ? 1 : v->descriptor.count;
    v->extents = try_new_n(struct vmdk_extent, v->count);
    if (!v->extents)
        return error_set(err, ENOMEM, "no memory");
    if (v->one_file)
        return open_one_file(v, by, err);
    for (unsigned i = 0; r == 0 && i < v->count; i++)
        r = open_one_of_many(v, by, i, err);
    return r;
}

static void release(struct vmdk *v)
{
    vmdk_grain_release(v);
    vmdk_descriptor_release(&v->descriptor);
    free(v->extents);
    import_release(&v->import);
}

static int co_fn control_fn vmdk_co_open(struct node *node, const void *options, struct error **err)
{
    struct vmdk *v = node_state(node);
    struct pass pass = {0};
    struct request by = {.pass = &pass};
    uint64_t size = 0;
    int r;

    (void)options;
    import_init(&v->import, node);
    r = open_extents(v, &by, err);
    for (unsigned i = 0; r == 0 && i < v->count; i++) {
        v->extents[i].start = size;
        size += v->extents[i].len;
        if (size > (uint64_t)NODE_SIZE_MAX)
            r = error_set(err, EINVAL, "node '%s': the disk would have more than %" PRIu64 " bytes",
                          node_name(node), (uint64_t)NODE_SIZE_MAX);
    }
    if (r < 0)
        release(v);
    else
        node_set_size(node, size);
    return r;
}

static void co_fn control_fn vmdk_co_close(struct node *node)
{
    release(node_state(node));
}

/* ---- what it is ---- */

const struct vmdk_descriptor *vmdk_descriptor(const struct node *node)
{
    const struct vmdk *v = node_state(node);

    return &v->descriptor;
}

bool vmdk_is_one_file(const struct node *node)
{
    const struct vmdk *v = node_state(node);

    return v->one_file;
}

uint64_t vmdk_grain_bytes(const struct node *node, unsigned extent, bool *ret_compressed)
{
    const struct vmdk *v = node_state(node);
    const struct vmdk_extent *e = &v->extents[extent];

    *ret_compressed = e->compressed;
    return e->kind == VMDK_SPARSE ? (uint64_t)1 << e->grain_bits : 0;
}

/* With all extents. */
static uint64_t vmdk_allocated_bytes(const struct node *node)
{
    const struct vmdk *v = node_state(node);
    uint64_t sum = import_allocated_bytes(node);

    for (unsigned i = 0; !v->one_file && i < v->count; i++) {
        uint64_t bytes = 0;

        if (v->extents[i].file)
            (void)node_allocated_bytes(edge_node(v->extents[i].file), &bytes);
        sum += bytes;
    }
    return sum;
}

static uint64_t vmdk_cluster_bytes(const struct node *node)
{
    bool compressed;

    return vmdk_grain_bytes(node, 0, &compressed);
}

const struct driver vmdk_driver = {
    .name = "vmdk",
    .kind = DRIVER_FORMAT,
    .state_size = sizeof(struct vmdk),
    .options = &vmdk_options_type,
    .keeps_metadata = true,
    .only_reads = true,
    .co_open = vmdk_co_open,
    .co_close = vmdk_co_close,
    .co_map = vmdk_co_map,
    .co_read_encoded = vmdk_co_read_encoded,
    .filename = import_filename,
    .allocated_bytes = vmdk_allocated_bytes,
    .cluster_bytes = vmdk_cluster_bytes,
};
