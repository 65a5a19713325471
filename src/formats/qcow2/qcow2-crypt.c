/* SPDX-License-Identifier: Apache-2.0 */
/* The key of an encrypted image, and its data. */
#include "formats/qcow2/qcow2-crypt.h"
#include "base/alloc.h"
#include "base/atomic.h"
#include "base/checked.h"
#include "formats/encrypted.h"
#include "formats/qcow2/qcow2-header.h"
#include "formats/qcow2/qcow2.h"
#include "graph/backend.h"
#include "qcow2-options.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>

struct qcow2_crypt {
    struct luks volume;
    struct encrypted data; /* constant, as what follows */
    uint64_t header_offset;
    uint64_t header_len;
};

extern const struct driver qcow2_driver;

/* What the options say fits what the image is. 1: it is encrypted. */
static int check_wanted(const struct qcow2 *q, const struct qcow2_header *header,
                        const struct qcow2_options *opt, struct error **err)
{
    const char *name = node_name(q->node);

    if (header->crypt_method == QCOW2_CRYPT_NONE && opt->encrypt)
        return error_set(err, EINVAL,
                         "node '%s': `encrypt` is given, but the image is not encrypted", name);
    if (header->crypt_method == QCOW2_CRYPT_NONE)
        return 0;
    if (!opt->encrypt)
        return error_set(err, EINVAL,
                         "node '%s': the image is encrypted: `encrypt.key-secret` is needed", name);
    if (q->data_raw)
        return error_set(
            err, ENOTSUP,
            "node '%s': the image is encrypted, and its data file raw: one excludes the "
            "other",
            name);
    if (header->size % LUKS_SECTOR)
        return error_set(
            err, EINVAL,
            "node '%s': the image is encrypted in sectors of %d bytes, but its disk has %" PRIu64
            " bytes",
            name, LUKS_SECTOR, header->size);
    return 1;
}

static int co_fn open_volume(struct qcow2 *q, const struct request *by, struct qcow2_crypt *crypt,
                             const char *secret, struct error **err)
{
    struct encrypted_store where = {.file = q->file, .offset = crypt->header_offset, .by = by};
    struct luks_store store = encrypted_store(&where, crypt->header_len);
    struct secret password;
    int r = node_get_secret(q->node, secret, &password, err);

    if (r < 0)
        return r;
    r = luks_co_open(&crypt->volume, &store, &password, err);
    secret_release(&password);
    if (r < 0)
        return error_wrap(err, r, "node '%s'", node_name(q->node));
    crypt->data = (struct encrypted){.file = q->data, .cipher = crypt->volume.cipher};
    return 0;
}

int qcow2_crypt_open(struct qcow2 *q, const struct request *by, const struct qcow2_header *header,
                     const struct qcow2_options *opt, struct error **err)
{
    struct qcow2_crypt *crypt;
    int r = check_wanted(q, header, opt, err);

    if (r <= 0)
        return r;
    crypt = try_new(struct qcow2_crypt);
    if (!crypt)
        return error_set(err, ENOMEM, "no memory");
    r = qcow2_header_encryption(header, node_size(edge_node(q->file)), &crypt->header_offset,
                                &crypt->header_len, err);
    if (r < 0)
        (void)error_wrap(err, r, "node '%s'", node_name(q->node));
    else
        r = open_volume(q, by, crypt, opt->encrypt->key_secret, err);
    if (r < 0) {
        free(crypt);
        return r;
    }
    q->crypt = crypt;
    return 0;
}

void qcow2_crypt_protect(struct qcow2 *q)
{
    if (q->crypt)
        qcow2_guard_set_single(q, QCOW2_SINGLE_LUKS_HEADER, q->crypt->header_offset,
                               q->crypt->header_len);
}

struct qcow2_crypt *qcow2_crypt_close(struct qcow2_crypt *crypt)
{
    if (crypt)
        luks_release(&crypt->volume);
    free(crypt);
    return NULL;
}

int qcow2_crypt_read(struct qcow2 *q, struct request *req, uint64_t host_offset)
{
    return encrypted_co_read(&q->crypt->data, req, host_offset);
}

int qcow2_crypt_write(struct qcow2 *q, const struct request *req, uint64_t skip, uint64_t len,
                      uint64_t host_offset)
{
    struct request write = *req;

    write.flags &= ~(unsigned)REQUEST_FUA;
    return encrypted_co_write(&q->crypt->data, &write, skip, len, host_offset);
}

int qcow2_co_amend_keys(struct backend *b, const struct luks_amend *a, struct error **err)
{
    struct node *node = backend_node(b);
    struct qcow2 *q = node_state(node);
    struct encrypted_store where = {.backend = b};
    struct luks_store store;
    int r;

    if (node_driver(node) != &qcow2_driver || !q->crypt)
        return error_set(err, ENOTSUP, "node '%s' is no encrypted qcow2 image", node_name(node));
    if (!q->writable)
        return error_set(err, EROFS, "node '%s' is read-only", node_name(node));
    if (atomic_get(&q->corrupt) || atomic_get(&q->needs_reopen))
        return error_set(err, EIO, "node '%s' takes no more changes of its metadata",
                         node_name(node));
    where.file = q->file;
    where.offset = q->crypt->header_offset;
    store = encrypted_store(&where, q->crypt->header_len);
    r = luks_co_amend(&q->crypt->volume, &store, a, err);
    return r < 0 ? error_wrap(err, r, "node '%s'", node_name(node)) : 0;
}
