/* SPDX-License-Identifier: Apache-2.0 */
/*
 * luks: a disk that lies encrypted in its file, behind a LUKS header or with it in another node (docs/formats/luks.md). Requests are whole sectors; the core
 * does the rest. It has no discard and no cheap zeroes: both would show where nothing is.
 */
#include "formats/luks/luks-driver.h"
#include "base/checked.h"
#include "base/macros.h"
#include "formats/encrypted.h"
#include "graph/backend.h"
#include "graph/driver.h"
#include "graph/gate.h"
#include "luks-options.h"

#include <errno.h>
#include <inttypes.h>
#include <string.h>

struct luks_node {
    struct luks volume;
    /* Constant. */
    struct encrypted data;
    struct edge *header; /* what header and key slots lie in: the file, unless they are detached */
};

extern const struct driver luks_driver;

static void set_geometry(struct node *node, const struct luks_node *l)
{
    const struct node *file = edge_node(l->data.file);

    node_set_size(node, align_down(node_size(file) - l->data.first, LUKS_SECTOR));
    node_set_alignment(node, LUKS_SECTOR, 1);
    node_set_preferred_alignment(node, node_preferred_alignment(file));
}

static bool is_detached(const struct luks_node *l)
{
    return l->header != l->data.file;
}

static int co_fn open_volume(struct luks_node *l, const struct secret *password, struct error **err)
{
    struct pass pass = {0};
    struct request by = {.pass = &pass};
    struct encrypted_store where = {.file = l->header, .by = &by};
    uint64_t file_size = node_size(edge_node(l->data.file));
    struct luks_store store = encrypted_store(&where, node_size(edge_node(l->header)));
    int r = luks_co_open(&l->volume, &store, password, err);

    if (r < 0)
        return r;
    l->data.cipher = l->volume.cipher;
    l->data.first = (uint64_t)l->volume.header.payload_sector * LUKS_SECTOR;
    if (!l->data.first && !is_detached(l))
        r = error_set(err, EINVAL,
                      "the disk does not lie behind this header, but elsewhere: `header` is the "
                      "node of the header, and `file` that of the disk");
    else if (l->data.first > file_size)
        r = error_set(err, EINVAL,
                      "the disk begins at %" PRIu64 ", but node '%s' has only %" PRIu64 " bytes",
                      l->data.first, node_name(edge_node(l->data.file)), file_size);
    if (r < 0)
        luks_release(&l->volume);
    return r;
}

static int co_fn control_fn luks_co_open_node(struct node *node, const void *options,
                                              struct error **err)
{
    const struct luks_options *opt = options;
    struct luks_node *l = node_state(node);
    struct secret password;
    int r = node_get_secret(node, opt->key_secret, &password, err);

    if (r < 0)
        return r;
    l->data.file = node_file(node);
    l->header = opt->header ? node_child(node, "header") : l->data.file;
    if (opt->header && edge_node(l->header) == edge_node(l->data.file))
        r = error_set(err, EINVAL, "`header` and `file` are the same node");
    else
        r = open_volume(l, &password, err);
    secret_release(&password);
    if (r < 0)
        return error_wrap(err, r, "node '%s'", node_name(node));
    set_geometry(node, l);
    return 0;
}

static void co_fn control_fn luks_co_close(struct node *node)
{
    struct luks_node *l = node_state(node);

    luks_release(&l->volume);
}

static int co_fn luks_co_read(struct node *node, struct request *req)
{
    const struct luks_node *l = node_state(node);

    return encrypted_co_read(&l->data, req, req->offset + l->data.first);
}

static int co_fn luks_co_write(struct node *node, struct request *req)
{
    const struct luks_node *l = node_state(node);

    return encrypted_co_write(&l->data, req, 0, req->len, req->offset + l->data.first);
}

static int co_fn luks_co_flush(struct node *node, struct request *req)
{
    return edge_co_request(node_file(node), req);
}

/* What comes into sight decrypts to anything. */
static int co_fn luks_co_resize(struct node *node, struct request *req)
{
    const struct luks_node *l = node_state(node);
    uint64_t end;
    int r;

    if (!checked_add(align_up(req->offset, LUKS_SECTOR), l->data.first, &end))
        return -EFBIG;
    r = edge_co_request_at(l->data.file, req, end);
    if (r == 0)
        set_geometry(node, l);
    return r;
}

/* ---- besides requests ---- */

int luks_node_co_amend(struct backend *b, const struct luks_amend *a, struct error **err)
{
    struct node *node = backend_node(b);
    struct luks_node *l = node_state(node);
    struct encrypted_store where = {.backend = b};
    struct luks_store store;
    int r;

    if (node_driver(node) != &luks_driver)
        return error_set(err, ENOTSUP, "node '%s' is no LUKS volume", node_name(node));
    if (node_settings(node)->read_only)
        return error_set(err, EROFS, "node '%s' is read-only", node_name(node));
    where.file = l->header;
    store =
        encrypted_store(&where, is_detached(l) ? node_size(edge_node(l->header)) : l->data.first);
    r = luks_co_amend(&l->volume, &store, a, err);
    return r < 0 ? error_wrap(err, r, "node '%s'", node_name(node)) : 0;
}

static bool luks_encrypted(const struct node *node)
{
    (void)node;
    return true;
}

const struct driver luks_driver = {
    .name = "luks",
    .kind = DRIVER_FORMAT,
    .state_size = sizeof(struct luks_node),
    .options = &luks_options_type,
    .fua = true,
    .co_open = luks_co_open_node,
    .co_close = luks_co_close,
    .co_read = luks_co_read,
    .co_write = luks_co_write,
    .co_flush = luks_co_flush,
    .co_resize = luks_co_resize,
    .encrypted = luks_encrypted,
};
