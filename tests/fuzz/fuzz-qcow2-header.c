/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The first bytes of a hostile qcow2 image. The first four bytes of an input say, as a big-endian number of 512-byte sectors,
 * how much longer the file is than what follows. What is accepted must keep the promises of qcow2-header.h.
 */
#include "base/checked.h"
#include "base/endian.h"
#include "base/error.h"
#include "formats/qcow2/qcow2-header.h"
#include "graph/node.h"

#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void must(bool condition)
{
    if (!condition)
        abort();
}

static void check_table(const struct qcow2_header *h, uint64_t file_size, uint64_t offset,
                        uint64_t len)
{
    must(range_within(offset, len, file_size));
    must(len == 0 || (offset >= qcow2_header_cluster_size(h) &&
                      is_aligned(offset, qcow2_header_cluster_size(h))));
}

static void check_promises(const struct qcow2_header *h, uint64_t file_size)
{
    uint64_t l1_len = (uint64_t)h->l1_size * QCOW2_ENTRY_LEN;
    uint64_t refcounts_len = (uint64_t)h->refcount_table_clusters << h->cluster_bits;

    must(h->version == 2 || h->version == 3);
    must(h->cluster_bits >= 9 && h->cluster_bits <= 21);
    must(h->refcount_order <= 6);
    must(h->size <= NODE_SIZE_MAX);
    must(l1_len <= QCOW2_L1_BYTES_MAX);
    must((uint64_t)h->l1_size << (2 * h->cluster_bits - 3) >= h->size);
    must(refcounts_len > 0 && refcounts_len <= QCOW2_REFCOUNT_TABLE_BYTES_MAX);
    check_table(h, file_size, h->refcount_table_offset, refcounts_len);
    if (l1_len) {
        check_table(h, file_size, h->l1_offset, l1_len);
        must(!ranges_overlap(h->l1_offset, l1_len, h->refcount_table_offset, refcounts_len));
    }
    if (h->snapshot_count)
        check_table(h, file_size, h->snapshots_offset,
                    (uint64_t)h->snapshot_count * QCOW2_SNAPSHOT_LEN_MIN);
    if (h->has_bitmaps)
        check_table(h, file_size, h->bitmap_directory_offset, h->bitmap_directory_size);
    must(!h->backing_file || (*h->backing_file && strlen(h->backing_file) <= 1023));
    must(!h->backing_format || *h->backing_format);
    must(h->header_length <= h->bytes_len && h->bytes_len <= QCOW2_HEADER_BYTES_MAX);
}

/* Reads all that was kept, so that the address sanitizer sees each byte. */
static void check_extensions(const struct qcow2_header *h, const uint8_t *bytes)
{
    must(memcmp(h->bytes, bytes, h->bytes_len) == 0);
    for (unsigned i = 0; i < h->extension_count; i++) {
        const struct qcow2_extension *e = &h->extensions[i];
        size_t offset = (size_t)(e->data - h->bytes);

        must(range_within(offset, e->len, h->bytes_len));
        must(memcmp(e->data, bytes + offset, e->len) == 0);
        must(load_be32(e->data - QCOW2_EXTENSION_HEAD) == e->type);
    }
}

/* Of an encrypted image; what is said then lies in the file. */
static void check_encryption(const struct qcow2_header *h, uint64_t file_size)
{
    struct error *err = NULL;
    uint64_t offset;
    uint64_t len;

    if (h->crypt_method == QCOW2_CRYPT_LUKS &&
        qcow2_header_encryption(h, file_size, &offset, &len, &err) == 0)
        check_table(h, file_size, offset, len);
    error_free(&err);
}

static void check_support(const struct qcow2_header *h)
{
    char name[QCOW2_FEATURE_NAME_LEN + 1];
    struct error *err = NULL;
    int writing = qcow2_header_check_supported(h, false, "n", &err);

    must((writing < 0) == (err != NULL));
    error_free(&err);
    if (qcow2_header_check_supported(h, true, "n", &err) < 0)
        must(writing < 0);
    else
        must((h->incompatible & ~QCOW2_INCOMPATIBLE_KNOWN) == 0);
    error_free(&err);
    for (unsigned bit = 0; bit < 64; bit++) {
        if (qcow2_header_feature_name(h, QCOW2_FEATURE_AUTOCLEAR, bit, name))
            must(*name && strlen(name) <= QCOW2_FEATURE_NAME_LEN);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct error *err = NULL;
    struct qcow2_header h;
    uint64_t file_size;
    uint8_t *bytes;

    if (size < 4)
        return 0;
    file_size = size - 4 + (uint64_t)load_be32(data) * 512;
    bytes = malloc(size - 4 + (size == 4)); /* of its own, so that its end is seen */
    must(bytes != NULL);
    memcpy(bytes, data + 4, size - 4);
    if (qcow2_header_parse(&h, bytes, size - 4, file_size, "n", &err) == 0) {
        must(!err);
        check_promises(&h, file_size);
        check_extensions(&h, bytes);
        check_support(&h);
        check_encryption(&h, file_size);
        qcow2_header_release(&h);
    } else {
        must(err && strncmp(error_text(err), "node 'n': ", 10) == 0);
        must(!strchr(error_text(err), '\n'));
    }
    error_free(&err);
    free(bytes);
    return 0;
}
