/* SPDX-License-Identifier: Apache-2.0 */
/*
 * file, host_device: a regular file, a block or character device of the host.
 *
 * A failed sync is final: the kernel may have dropped the pages that it could not write, and the next sync would succeed
 * without them (I3). The loop's file remembers it: all later flushes fail as well, until the node is opened anew.
 */
#include "base/atomic.h"
#include "base/checked.h"
#include "base/macros.h"
#include "file-options.h"
#include "graph/driver.h"
#include "graph/offload.h"
#include "protocols/file/file-lock.h"

#include <errno.h>

/* Extents are asked for so many at a time. */
#define EXTENT_BATCH 64

struct host_file {
    /* Set in open, then constant. */
    struct file *file;
    bool is_device;

    /* What the host has refused once, so as not to ask again. Atomic; hints, each of them. */
    uint32_t no_punch;
    uint32_t no_zero;
    uint32_t no_discard;

    struct image_lock lock; /* Only touched on the control thread. */
};

/* What hosts say for "not here"; ioctls have words of their own. */
static bool means_unsupported(int r)
{
    return r == -EOPNOTSUPP || r == -ENOTTY || r == -ENOSYS || r == -ENODEV;
}

static bool means_read_only(int r)
{
    return r == -EACCES || r == -EPERM || r == -EROFS;
}

static int co_fn control_fn open_as(struct node *node, const char *path, bool read_only,
                                    struct error **err)
{
    struct host_file *h = node_state(node);
    unsigned flags = FILE_READ;
    int r;

    flags |= read_only ? 0 : FILE_WRITE;
    flags |= node_settings(node)->direct ? FILE_DIRECT : 0;
    r = file_co_open(&h->file, path, flags, 0, err);
    if (r == -EINVAL && (flags & FILE_DIRECT)) {
        error_free(err);
        return error_set(err, EINVAL, "file '%s': its file system does not support cache.direct",
                         path);
    }
    if (r == 0 && !read_only && file_info(h->file)->read_only_device) {
        h->file = file_unref(h->file);
        return error_set(err, EROFS, "device '%s' is read-only", path);
    }
    return r;
}

static int co_fn control_fn open_file(struct node *node, const char *path, struct error **err)
{
    const struct node_settings *settings = node_settings(node);
    AUTO(error_free) struct error *refusal = NULL;
    int r;

    if (settings->read_only)
        return open_as(node, path, true, err);
    r = open_as(node, path, false, &refusal);
    if (r == 0)
        return 0;
    if (settings->auto_read_only && means_read_only(r)) {
        r = open_as(node, path, true, err);
        if (r == 0)
            node_set_read_only(node);
        return r;
    }
    error_move(err, &refusal);
    return r;
}

static int check_type(const struct file *file, bool want_device, struct error **err)
{
    enum file_type type = file_info(file)->type;

    if (want_device && type != FILE_TYPE_BLOCK && type != FILE_TYPE_CHARACTER)
        return error_set(err, EINVAL, "'%s' is no device%s", file_path(file),
                         type == FILE_TYPE_REGULAR ? ": use driver 'file'" : "");
    if (!want_device && type != FILE_TYPE_REGULAR)
        return error_set(err, EINVAL, "'%s' is no regular file%s", file_path(file),
                         type == FILE_TYPE_BLOCK || type == FILE_TYPE_CHARACTER
                             ? ": use driver 'host_device'"
                             : "");
    return 0;
}

/* As users see it: whole units. What a file lacks in its last one reads as zeroes, and a write there makes it longer. */
static int set_geometry(struct node *node, const struct file *file, struct error **err)
{
    const struct file_info *info = file_info(file);
    unsigned device_unit = MAX(info->logical_block_size, info->memory_align);
    unsigned unit = MAX(info->offset_align, device_unit);

    if (info->size > (uint64_t)NODE_SIZE_MAX - unit)
        return error_set(err, EFBIG, "file '%s' is larger than %lld bytes", file_path(file),
                         (long long)NODE_SIZE_MAX);
    node_set_alignment(node, unit, info->memory_align);
    node_set_size(node, align_up(info->size, unit));
    return 0;
}

static int co_fn control_fn init_lock(struct node *node, enum file_locking locking,
                                      struct error **err)
{
    struct host_file *h = node_state(node);

    if (locking == FILE_LOCKING_OFF || node_settings(node)->force_share)
        return 0; /* h->lock is all zeroes: not used */
    return image_lock_co_init(&h->lock, h->file, locking == FILE_LOCKING_ON, err);
}

static int co_fn control_fn open_kind(struct node *node, const struct file_options *opt,
                                      bool want_device, struct error **err)
{
    struct host_file *h = node_state(node);
    int r = open_file(node, opt->filename, err);

    h->is_device = want_device;
    if (r == 0)
        r = check_type(h->file, want_device, err);
    if (r == 0)
        r = set_geometry(node, h->file, err);
    if (r == 0)
        r = init_lock(node, opt->locking, err);
    if (r == 0)
        return 0;
    if (h->file)
        (void)file_co_close(h->file); /* nothing was written */
    return error_wrap(err, r, "cannot open node '%s'", node_name(node));
}

static int co_fn control_fn file_driver_co_open(struct node *node, const void *options,
                                                struct error **err)
{
    return open_kind(node, options, false, err);
}

static int co_fn control_fn host_device_co_open(struct node *node, const void *options,
                                                struct error **err)
{
    return open_kind(node, options, true, err);
}

static void co_fn control_fn host_file_co_close(struct node *node)
{
    struct host_file *h = node_state(node);

    (void)file_co_close(h->file); /* who wants to know of errors has flushed */
}

static int co_fn control_fn host_file_co_set_access(struct node *node, struct access access,
                                                    struct error **err)
{
    struct host_file *h = node_state(node);

    return image_lock_co_set(&h->lock, access, err);
}

static int co_fn host_file_co_read(struct node *node, struct request *req)
{
    const struct host_file *h = node_state(node);
    int64_t n = file_co_read(h->file, req->offset, req->iov, req->iov_count, req->hold);

    if (unlikely(n < 0))
        return (int)n;
    if (unlikely((uint64_t)n < req->len))
        request_zero_from(req, (uint64_t)n); /* the file ends before the node does */
    return 0;
}

static int co_fn host_file_co_write(struct node *node, struct request *req)
{
    const struct host_file *h = node_state(node);

    return file_co_write(h->file, req->offset, req->iov, req->iov_count, req->flags & REQUEST_FUA,
                         req->hold);
}

typedef int range_fn(struct file *f, uint64_t offset, uint64_t len);

/* Asks the host unless it has refused before; its refusal comes back as -EOPNOTSUPP. */
/* NOLINTNEXTLINE(readability-non-const-parameter): an atomic store is a write that the check does not see */
static int co_fn try_range(struct host_file *h, uint32_t *refused, range_fn *fn,
                           const struct request *req)
{
    int r;

    if (atomic_get_relaxed(refused)) /* a hint: at worst the host is asked once more */
        return -EOPNOTSUPP;
    r = fn(h->file, req->offset, req->len);
    if (!means_unsupported(r))
        return r;
    atomic_set_relaxed(refused, 1u); /* as above */
    return -EOPNOTSUPP;
}

/*
 * A punched range has no space, so that it is right only where that is allowed. A device's zeroing may be the kernel writing
 * zeroes, which is no answer to who wants it fast or not at all.
 */
static int co_fn zero_range(struct host_file *h, const struct request *req)
{
    int r = -EOPNOTSUPP;

    if (req->flags & REQUEST_MAY_UNMAP)
        r = try_range(h, &h->no_punch, file_co_punch, req);
    if (r == -EOPNOTSUPP && !(h->is_device && (req->flags & REQUEST_NO_FALLBACK)))
        r = try_range(h, &h->no_zero, file_co_zero, req);
    return r;
}

static int co_fn host_file_co_write_zeroes(struct node *node, struct request *req)
{
    struct host_file *h = node_state(node);
    int r = zero_range(h, req);

    return r == 0 && (req->flags & REQUEST_FUA) ? file_co_sync(h->file) : r;
}

static int co_fn host_file_co_discard(struct node *node, struct request *req)
{
    struct host_file *h = node_state(node);

    return try_range(h, &h->no_discard, file_co_discard, req);
}

static int co_fn host_file_co_copy_out(struct node *node, struct request *req)
{
    const struct host_file *h = node_state(node);

    return offload_co_hand_over(req, h->file);
}

static int co_fn host_file_co_copy_in(struct node *node, struct request *req)
{
    const struct host_file *h = node_state(node);

    return offload_co_take(req, h->file);
}

static int co_fn host_file_co_flush(struct node *node, struct request *req)
{
    const struct host_file *h = node_state(node);

    (void)req;
    return file_co_sync(h->file);
}

static bool add_extent(struct node *node, struct request *req, uint64_t offset, uint64_t len,
                       bool data)
{
    struct extent e = {
        .offset = offset,
        .len = len,
        .flags = EXTENT_ALLOCATED | EXTENT_OFFSET_VALID | (data ? EXTENT_DATA : EXTENT_ZERO),
        .host = node,
        .host_offset = offset,
    };

    return extents_add(req->extents, &e);
}

static int co_fn host_file_co_extents(struct node *node, struct request *req)
{
    struct host_file *h = node_state(node);
    struct file_extent found[EXTENT_BATCH];
    int n = h->is_device ? 0 : file_co_extents(h->file, req->offset, req->len, found, EXTENT_BATCH);

    if (n == -ECANCELED || n == -ETIMEDOUT)
        return n;
    if (n <= 0) /* a host that does not know: data is never wrong */
        (void)add_extent(node, req, req->offset, req->len, true);
    for (int i = 0; i < n; i++) {
        if (!add_extent(node, req, found[i].offset, found[i].len, found[i].data))
            break;
    }
    return 0;
}

/* A device has the size that it has; one that has grown or shrunk is taken as it is now. */
static int co_fn device_resize(struct node *node, uint64_t size)
{
    struct host_file *h = node_state(node);
    struct file_info info;
    int r = file_co_stat(h->file, &info);

    if (r == 0 && size != info.size)
        r = -EOPNOTSUPP;
    if (r == 0)
        node_set_size(node, size);
    return r;
}

static int co_fn host_file_co_resize(struct node *node, struct request *req)
{
    struct host_file *h = node_state(node);
    int r;

    if (h->is_device)
        return device_resize(node, req->offset);
    r = file_co_truncate(h->file, req->offset);
    if (r == 0)
        node_set_size(node, align_up(req->offset, node_alignment(node)));
    return r;
}

static bool file_grows(const struct node *node)
{
    (void)node;
    return true;
}

static const char *host_file_filename(const struct node *node)
{
    const struct host_file *h = node_state(node);

    return file_path(h->file);
}

static uint64_t host_file_allocated_bytes(const struct node *node)
{
    const struct host_file *h = node_state(node);

    return file_info(h->file)->allocated_bytes;
}

/* What the host still holds of requests that were cut off (G7). */
static unsigned host_file_unresolved(const struct node *node)
{
    const struct host_file *h = node_state(node);

    return file_detached(h->file);
}

const struct driver file_driver = {
    .name = "file",
    .kind = DRIVER_PROTOCOL,
    .state_size = sizeof(struct host_file),
    .options = &file_options_type,
    .fua = true,
    .co_open = file_driver_co_open,
    .co_close = host_file_co_close,
    .co_read = host_file_co_read,
    .co_write = host_file_co_write,
    .co_write_zeroes = host_file_co_write_zeroes,
    .co_discard = host_file_co_discard,
    .co_copy_out = host_file_co_copy_out,
    .co_copy_in = host_file_co_copy_in,
    .co_flush = host_file_co_flush,
    .co_extents = host_file_co_extents,
    .co_resize = host_file_co_resize,
    .co_set_access = host_file_co_set_access,
    .grows = file_grows,
    .unresolved = host_file_unresolved,
    .filename = host_file_filename,
    .allocated_bytes = host_file_allocated_bytes,
};

const struct driver host_device_driver = {
    .name = "host_device",
    .kind = DRIVER_PROTOCOL,
    .state_size = sizeof(struct host_file),
    .options = &file_options_type,
    .fua = true,
    .co_open = host_device_co_open,
    .co_close = host_file_co_close,
    .co_read = host_file_co_read,
    .co_write = host_file_co_write,
    .co_write_zeroes = host_file_co_write_zeroes,
    .co_discard = host_file_co_discard,
    .co_flush = host_file_co_flush,
    .co_extents = host_file_co_extents,
    .co_resize = host_file_co_resize,
    .co_set_access = host_file_co_set_access,
    .unresolved = host_file_unresolved,
    .filename = host_file_filename,
    .allocated_bytes = host_file_allocated_bytes,
};
