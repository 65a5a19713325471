/* SPDX-License-Identifier: Apache-2.0 */
/* Files: whole transfers out of an engine's partial ones, inline I/O within its budget (L2), and the rare operations. */
#include "loop/file.h"
#include "base/alloc.h"
#include "base/atomic.h"
#include "base/macros.h"
#include "loop/loop-internal.h"
#include "loop/op.h"
#include "loop/workers.h"

#include <assert.h>
#include <errno.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>

/* The most that one system call is asked to copy: what is left of it cannot be called off. */
#define COPY_STEP ((uint64_t)4 << 20)

struct file *file_ref(struct file *f)
{
    atomic_add(&f->refs, 1u);
    return f;
}

struct file *file_unref(struct file *f)
{
    if (!f)
        return NULL;
    if (atomic_sub(&f->refs, 1u) == 1) {
        f->engine->file_close(f);
        worker_pool_free(f->workers);
        free(f->path);
        free(f);
    }
    return NULL;
}

const char *file_path(const struct file *f)
{
    return f->path;
}

const struct file_info *file_info(const struct file *f)
{
    return &f->info;
}

unsigned file_detached(const struct file *f)
{
    return atomic_get(&f->detached);
}

int file_co_open(struct file **ret, const char *path, unsigned flags, unsigned mode,
                 struct error **err)
{
    struct file *f = xnew(struct file);
    struct io_op *op = op_new(IO_OPEN);
    int64_t r = -ENOMEM;

    f->engine = loop_self()->engine;
    f->refs = 1;
    f->fd = -1;
    f->flags = flags;
    f->path = xstrdup(path);
    f->workers = worker_pool_new(WORKERS_PER_FILE);
    file_sync_init(&f->sync);
    if (op) {
        op->file = f;
        op->len = mode;
        op->owns_memory = true;
        r = op_co_run(op, LOOP_FOREVER);
    }
    if (r < 0) {
        file_unref(f);
        return error_set(err, (int)-r, "cannot open file '%s': %s", path, strerror((int)-r));
    }
    *ret = f;
    return 0;
}

/* An operation on the file without memory of the caller's: it can be left at any time. */
static struct io_op *file_op(struct file *f, enum io_op_kind kind)
{
    struct io_op *op = op_new(kind);

    if (op) {
        op->file = f;
        op->owns_memory = true;
    }
    return op;
}

static int co_fn file_op_run(struct io_op *op)
{
    return op ? (int)op_co_run(op, LOOP_FOREVER) : -ENOMEM;
}

int file_co_stat(struct file *f, struct file_info *ret)
{
    struct io_op *op = file_op(f, IO_STAT);
    struct file_info *info = &f->info;
    int r;

    if (op)
        op->ret_info = info;
    r = file_op_run(op);
    if (r == 0)
        *ret = *info;
    return r;
}

int file_co_close(struct file *f)
{
    int r = file_op_run(file_op(f, IO_CLOSE));

    file_unref(f); /* whoever leaves the wait leaves the file to the operation */
    return r;
}

/* The part of a vector that is left after `done` bytes; *storage is used if it is cut within a piece. */
struct iov_rest {
    struct iovec *copy;
    const struct iovec *iov;
    int count;
};

static int iov_rest_init(struct iov_rest *rest, const struct iovec *iov, int count, size_t done)
{
    rest->copy = NULL;
    while (count && done >= iov->iov_len) {
        done -= iov->iov_len;
        iov++;
        count--;
    }
    if (done) {
        rest->copy = try_new_n(struct iovec, (size_t)count);
        if (!rest->copy)
            return -ENOMEM;
        memcpy(rest->copy, iov, (size_t)count * sizeof(*iov));
        rest->copy[0].iov_base = (char *)rest->copy[0].iov_base + done;
        rest->copy[0].iov_len -= done;
        iov = rest->copy;
    }
    rest->iov = iov;
    rest->count = count;
    return 0;
}

static size_t iov_bytes(const struct iovec *iov, int count)
{
    size_t sum = 0;

    for (int i = 0; i < count; i++)
        sum += iov[i].iov_len;
    return sum;
}

/* One transfer, perhaps short. */
static int64_t co_fn transfer_once(struct file *f, enum io_op_kind kind, uint64_t offset,
                                   const struct iovec *iov, int iov_count, bool durable,
                                   struct iobuf *hold)
{
    struct loop *loop = loop_self();
    struct io_op *op;
    int64_t r;

    if (!durable) {
        if (f->on_tmpfs && loop->now_ns - loop->tick_ns >= INLINE_TICK_NS)
            co_yield (); /* L2, ADR 0007: memory is copied here all the same, but others have their turn first */
        r = loop->engine->inline_rw(f, kind == IO_WRITE, offset, iov, iov_count);
        if (r != -EAGAIN) {
            loop->counters.inline_ops++;
            return r;
        }
    }
    op = op_new(kind);
    if (!op)
        return -ENOMEM;
    op->file = f;
    op->offset = offset;
    op->durable = durable;
    op->hold = hold;
    op->iov = iov;
    op->iov_count = iov_count;
    if (iov_count <= IO_OP_IOV) {
        memcpy(op->iov_copy, iov, (size_t)iov_count * sizeof(*iov));
        op->iov = op->iov_copy;
        op->owns_memory = hold != NULL;
    }
    if (durable)
        file_sync_begin(op);
    return op_co_run(op, LOOP_FOREVER);
}

/* A direct read that ends within a unit has met the end of the file, and cannot be continued there. */
static bool ends_within_unit(const struct file *f, size_t done)
{
    return (f->flags & FILE_DIRECT) && done % f->info.offset_align;
}

/* Goes on after short transfers until all is done or, reading, the file ends. */
static int64_t co_fn transfer(struct file *f, enum io_op_kind kind, uint64_t offset,
                              const struct iovec *iov, int iov_count, bool durable,
                              struct iobuf *hold)
{
    size_t total = iov_bytes(iov, iov_count);
    int64_t n = transfer_once(f, kind, offset, iov, iov_count, durable, hold);
    size_t done;

    if (likely(n == (int64_t)total) || n < 0)
        return n;
    done = (size_t)n;
    while (n > 0 && done < total && !(kind == IO_READ && ends_within_unit(f, done))) {
        struct iov_rest rest;

        if (iov_rest_init(&rest, iov, iov_count, done) < 0)
            return -ENOMEM;
        n = transfer_once(f, kind, offset + done, rest.iov, rest.count, durable, hold);
        free(rest.copy);
        if (n < 0)
            return n;
        done += (size_t)n;
    }
    return (int64_t)done;
}

int64_t file_co_read(struct file *f, uint64_t offset, const struct iovec *iov, int iov_count,
                     struct iobuf *hold)
{
    return transfer(f, IO_READ, offset, iov, iov_count, false, hold);
}

int file_co_write(struct file *f, uint64_t offset, const struct iovec *iov, int iov_count,
                  bool durable, struct iobuf *hold)
{
    int64_t n = transfer(f, IO_WRITE, offset, iov, iov_count, durable, hold);

    if (n < 0)
        return (int)n;
    return (size_t)n == iov_bytes(iov, iov_count) ? 0
                                                  : -EIO; /* a write of 0 bytes is no progress */
}

static int co_fn range_op(struct file *f, enum io_op_kind kind, uint64_t offset, uint64_t len)
{
    struct io_op *op = file_op(f, kind);

    if (op) {
        op->offset = offset;
        op->len = len;
    }
    return file_op_run(op);
}

int file_co_punch(struct file *f, uint64_t offset, uint64_t len)
{
    return range_op(f, IO_PUNCH, offset, len);
}

int file_co_discard(struct file *f, uint64_t offset, uint64_t len)
{
    struct io_op *op = file_op(f, IO_PUNCH);

    if (op) {
        op->offset = offset;
        op->len = len;
        op->any_content = true;
    }
    return file_op_run(op);
}

int file_co_zero(struct file *f, uint64_t offset, uint64_t len)
{
    return range_op(f, IO_ZERO, offset, len);
}

int file_co_allocate(struct file *f, uint64_t offset, uint64_t len)
{
    return range_op(f, IO_ALLOCATE, offset, len);
}

int file_co_truncate(struct file *f, uint64_t size)
{
    return range_op(f, IO_TRUNCATE, 0, size);
}

static bool means_not_between_these(int64_t r)
{
    return r == -EXDEV || r == -EINVAL || r == -EOPNOTSUPP || r == -ENOSYS;
}

/* One system call, which may copy less. */
static int64_t co_fn copy_once(struct file *f, uint64_t offset, struct file *source,
                               uint64_t source_offset, uint64_t len)
{
    struct io_op *op = file_op(f, IO_COPY);

    if (!op)
        return -ENOMEM;
    op->offset = offset;
    op->source = source;
    op->source_offset = source_offset;
    op->len = MIN(len, COPY_STEP);
    return op_co_run(op, LOOP_FOREVER);
}

int64_t file_co_copy(struct file *f, uint64_t offset, struct file *source, uint64_t source_offset,
                     uint64_t len)
{
    uint64_t done = 0;

    if (f->info.type != FILE_TYPE_REGULAR || source->info.type != FILE_TYPE_REGULAR)
        return -EXDEV;
    while (done < len) {
        int64_t n = copy_once(f, offset + done, source, source_offset + done, len - done);

        if (n < 0)
            return means_not_between_these(n) ? -EXDEV : n;
        if (n == 0)
            break;
        done += (uint64_t)n;
    }
    return (int64_t)done;
}

int file_co_extents(struct file *f, uint64_t offset, uint64_t len, struct file_extent *ret,
                    unsigned max)
{
    struct iobuf *hold = iobuf_new(max * sizeof(*ret));
    struct io_op *op = hold ? file_op(f, IO_EXTENTS) : NULL;
    int64_t n = -ENOMEM;

    if (op) {
        op->offset = offset;
        op->len = len;
        op->extents = (struct file_extent *)(void *)hold->data;
        op->extents_max = max;
        op->hold = hold;
        n = op_co_run(op, LOOP_FOREVER);
        if (n > 0)
            memcpy(ret, hold->data, (size_t)n * sizeof(*ret));
    }
    iobuf_unref(hold);
    return (int)n;
}

static int co_fn lock_op(struct file *f, enum io_op_kind kind, uint64_t start, uint64_t len,
                         enum file_lock lock)
{
    struct io_op *op = file_op(f, kind);

    if (op) {
        op->offset = start;
        op->len = len;
        op->lock = lock;
    }
    return file_op_run(op);
}

int file_co_lock(struct file *f, uint64_t start, uint64_t len, enum file_lock lock)
{
    return lock_op(f, IO_LOCK, start, len, lock);
}

int file_co_lock_test(struct file *f, uint64_t start, uint64_t len, enum file_lock lock)
{
    return lock_op(f, IO_LOCK_TEST, start, len, lock);
}

/* With paths of its own, so that it can be left when the host does not answer. path2 may be NULL. */
static int co_fn path_op(enum io_op_kind kind, const char *path, const char *path2)
{
    struct iobuf *hold;
    struct io_op *op;
    int64_t r = -ENOMEM;

    if (strlen(path) >= PATH_MAX || (path2 && strlen(path2) >= PATH_MAX))
        return -ENAMETOOLONG;
    hold = iobuf_new(2 * (size_t)PATH_MAX);
    op = hold ? op_new(kind) : NULL;
    if (op) {
        op->path = memcpy(hold->data, path, strlen(path) + 1);
        if (path2)
            op->path2 = memcpy(hold->data + PATH_MAX, path2, strlen(path2) + 1);
        op->hold = hold;
        op->owns_memory = true;
        r = op_co_run(op, LOOP_FOREVER);
    }
    iobuf_unref(hold);
    return (int)r;
}

int file_co_rename(const char *from, const char *to)
{
    return path_op(IO_RENAME, from, to);
}

int file_co_unlink(const char *path)
{
    return path_op(IO_UNLINK, path, NULL);
}

int file_co_sync_dir(const char *path)
{
    return path_op(IO_SYNC_DIR, path, NULL);
}

int file_co_resolve(const char *path, char **ret)
{
    struct iobuf *hold;
    struct io_op *op;
    size_t size = strlen(path) + 1;
    int64_t r = -ENOMEM;

    if (size > PATH_MAX)
        return -ENAMETOOLONG;
    hold = iobuf_new(2 * (size_t)PATH_MAX);
    op = hold ? op_new(IO_RESOLVE) : NULL;
    if (op) {
        memcpy(hold->data, path, size);
        op->path = (const char *)hold->data;
        op->ret_path = (char *)hold->data + PATH_MAX;
        op->hold = hold;
        op->owns_memory = true;
        r = op_co_run(op, LOOP_FOREVER);
    }
    if (r >= 0) {
        const char *found = (const char *)hold->data + PATH_MAX;
        size_t found_size = strlen(found) + 1;
        char *copy = try_new_n(char, found_size);

        if (copy)
            *ret = memcpy(copy, found, found_size);
        else
            r = -ENOMEM;
    }
    iobuf_unref(hold);
    return (int)r;
}
