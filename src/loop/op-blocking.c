/* SPDX-License-Identifier: Apache-2.0 */
/* Operations as plain system calls that may sleep: what worker threads do. */
#include "base/alloc.h"
#include "base/checked.h"
#include "base/macros.h"
#include "loop/loop-internal.h"
#include "loop/op.h"
#include "loop/real.h"

#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <linux/fs.h>
#include <linux/magic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/sysmacros.h>
#include <unistd.h>

/* Not in the C library's headers of all supported systems. */
#ifndef XFS_SUPER_MAGIC
#define XFS_SUPER_MAGIC 0x58465342
#endif

static int64_t ret_errno(int64_t r)
{
    return r < 0 ? -errno : r;
}

static uint64_t stat_ns(const struct statx_timestamp *t)
{
    return (uint64_t)t->tv_sec * NS_PER_S + t->tv_nsec;
}

static int block_device_info(int fd, struct file_info *info)
{
    uint64_t size;
    int logical;
    int read_only;

    if (ioctl(fd, BLKGETSIZE64, &size) < 0 || ioctl(fd, BLKSSZGET, &logical) < 0 ||
        ioctl(fd, BLKROGET, &read_only) < 0)
        return -errno;
    info->size = size;
    info->allocated_bytes = 0;
    info->logical_block_size = (unsigned)logical;
    info->read_only_device = read_only != 0;
    return 0;
}

/* What direct I/O asks of memory and offsets. Where the kernel does not say: a logical block, or a page, which always works. */
static void direct_alignment(const struct file *f, const struct statx *st, struct file_info *info)
{
    info->memory_align = 1;
    info->offset_align = 1;
    if (!(f->flags & FILE_DIRECT) || f->on_tmpfs)
        return;
    if ((st->stx_mask & STATX_DIOALIGN) && st->stx_dio_offset_align) {
        info->memory_align = st->stx_dio_mem_align;
        info->offset_align = st->stx_dio_offset_align;
    } else {
        info->offset_align = info->logical_block_size ? info->logical_block_size : 4096;
        info->memory_align = info->offset_align;
    }
}

static enum file_type type_of_mode(mode_t mode)
{
    if (S_ISREG(mode))
        return FILE_TYPE_REGULAR;
    if (S_ISBLK(mode))
        return FILE_TYPE_BLOCK;
    if (S_ISCHR(mode))
        return FILE_TYPE_CHARACTER;
    return S_ISDIR(mode) ? FILE_TYPE_DIRECTORY : FILE_TYPE_OTHER;
}

static int file_stat(const struct file *f, struct file_info *ret)
{
    struct statx st;
    struct file_info info = {0};

    if (statx(f->fd, "", AT_EMPTY_PATH, STATX_BASIC_STATS | STATX_DIOALIGN, &st) < 0)
        return -errno;
    info.type = type_of_mode(st.stx_mode);
    info.size = st.stx_size;
    info.allocated_bytes = st.stx_blocks * 512;
    info.device = makedev(st.stx_dev_major, st.stx_dev_minor);
    info.inode = st.stx_ino;
    info.mtime_ns = stat_ns(&st.stx_mtime);
    info.ctime_ns = stat_ns(&st.stx_ctime);
    if (info.type == FILE_TYPE_BLOCK) {
        int r = block_device_info(f->fd, &info);

        if (r < 0)
            return r;
    }
    direct_alignment(f, &st, &info);
    *ret = info;
    return 0;
}

/* Where the file lies decides how its I/O may be done (L1, L2). */
static int file_place(struct file *f)
{
    struct statfs fs;

    if (fstatfs(f->fd, &fs) < 0)
        return -errno;
    f->on_tmpfs = fs.f_type == TMPFS_MAGIC && f->info.type != FILE_TYPE_BLOCK;
    f->needs_async = f->info.type != FILE_TYPE_BLOCK && fs.f_type != TMPFS_MAGIC &&
                     fs.f_type != EXT4_SUPER_MAGIC && fs.f_type != XFS_SUPER_MAGIC &&
                     fs.f_type != BTRFS_SUPER_MAGIC;
    f->nowait = !f->on_tmpfs && !f->needs_async && !(f->flags & FILE_DIRECT);
    return 0;
}

static int file_open(struct io_op *op)
{
    struct file *f = op->file;
    int flags = O_CLOEXEC | O_NOCTTY | O_NONBLOCK;
    int r;

    flags |= !(f->flags & FILE_WRITE) ? O_RDONLY : f->flags & FILE_READ ? O_RDWR : O_WRONLY;
    flags |= f->flags & FILE_CREATE ? O_CREAT : 0;
    flags |= f->flags & FILE_EXCLUSIVE ? O_EXCL : 0;
    flags |= f->flags & FILE_TRUNCATE ? O_TRUNC : 0;
    flags |= f->flags & FILE_DIRECT ? O_DIRECT : 0;
    f->fd = open(f->path, flags, (mode_t)op->len);
    if (f->fd < 0)
        return -errno;
    /* O_NONBLOCK was for FIFOs and the like, which shall not hang the open. */
    (void)fcntl(f->fd, F_SETFL, flags & ~(O_NONBLOCK | O_CREAT | O_EXCL | O_TRUNC));
    r = file_stat(f, &f->info);
    if (r == 0)
        r = file_place(f);
    if (r == 0 && f->on_tmpfs)
        r = file_stat(f, &f->info); /* alignment depends on the place */
    if (r < 0) {
        close(f->fd);
        f->fd = -1;
    }
    return r;
}

static int64_t file_punch(const struct io_op *op)
{
    uint64_t range[2] = {op->offset, op->len};
    int r;

    /* What a discarded range of a device reads as is the device's choice. Punching zeroes it, or is refused. */
    if (op->any_content && op->file->info.type == FILE_TYPE_BLOCK)
        r = ioctl(op->file->fd, BLKDISCARD, range);
    else
        r = fallocate(op->file->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)op->offset,
                      (off_t)op->len);
    return ret_errno(r);
}

static int64_t file_zero(const struct io_op *op)
{
    uint64_t range[2] = {op->offset, op->len};
    int r;

    if (op->file->info.type == FILE_TYPE_BLOCK)
        r = ioctl(op->file->fd, BLKZEROOUT, range);
    else
        r = fallocate(op->file->fd, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, (off_t)op->offset,
                      (off_t)op->len);
    return ret_errno(r);
}

static int64_t file_copy(const struct io_op *op)
{
    off_t from = (off_t)op->source_offset;
    off_t to = (off_t)op->offset;

    return ret_errno(copy_file_range(op->source->fd, &from, op->file->fd, &to, (size_t)op->len, 0));
}

static int64_t file_extents(struct io_op *op)
{
    const struct file *f = op->file;
    uint64_t pos = op->offset;
    uint64_t end = op->offset + op->len;
    unsigned n = 0;

    while (pos < end && n < op->extents_max) {
        off_t data = lseek(f->fd, (off_t)pos, SEEK_DATA);
        off_t next;
        bool is_data;

        if (data < 0 && errno == ENXIO) {
            data = (off_t)end; /* a hole up to the end of the file, and beyond */
        } else if (data < 0) {
            return n ? (int64_t)n : -errno;
        }
        is_data = (uint64_t)data == pos;
        if (is_data) {
            next = lseek(f->fd, (off_t)pos, SEEK_HOLE);
            if (next < 0)
                return n ? (int64_t)n : -errno;
        } else {
            next = data;
        }
        if ((uint64_t)next <= pos)
            return n ? (int64_t)n
                     : -EIO; /* the file changed under us in a way that makes no progress */
        op->extents[n].offset = pos;
        op->extents[n].len = MIN((uint64_t)next, end) - pos;
        op->extents[n].data = is_data;
        pos += op->extents[n].len;
        n++;
    }
    return n;
}

static int64_t file_lock(const struct io_op *op)
{
    struct flock fl = {
        .l_type = (short)(op->lock == FILE_LOCK_NONE     ? F_UNLCK
                          : op->lock == FILE_LOCK_SHARED ? F_RDLCK
                                                         : F_WRLCK),
        .l_whence = SEEK_SET,
        .l_start = (off_t)op->offset,
        .l_len = (off_t)op->len,
    };
    int r = fcntl(op->file->fd, op->kind == IO_LOCK ? F_OFD_SETLK : F_OFD_GETLK, &fl);

    if (r < 0)
        return errno == EACCES ? -EAGAIN : -errno;
    return op->kind == IO_LOCK_TEST && fl.l_type != F_UNLCK ? -EAGAIN : 0;
}

static int64_t sync_directory(const char *path)
{
    AUTO(free_ptr) char *copy = NULL;
    struct stat st;
    int fd;
    int r;

    copy = strdup(path);
    if (!copy)
        return -ENOMEM;
    if (stat(path, &st) < 0 || !S_ISDIR(st.st_mode))
        fd = open(dirname(copy), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    else
        fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0)
        return -errno;
    r = fsync(fd) < 0 ? -errno : 0;
    close(fd);
    return r;
}

static int64_t resolve_path(const struct io_op *op)
{
    struct stat st;

    if (!realpath(op->path, op->ret_path) || lstat(op->ret_path, &st) < 0)
        return -errno;
    return (int64_t)type_of_mode(st.st_mode);
}

/* Whatever close() says, the descriptor is gone. */
static int64_t file_close(struct file *f)
{
    int fd = f->fd;

    f->fd = -1;
    return ret_errno(close(fd));
}

int64_t op_blocking(struct io_op *op)
{
    struct file *f = op->file;

    switch (op->kind) {
    case IO_READ:
        return ret_errno(preadv(f->fd, op->iov, op->iov_count, (off_t)op->offset));
    case IO_WRITE:
        return ret_errno(pwritev2(f->fd, op->iov, op->iov_count, (off_t)op->offset,
                                  op->durable ? RWF_DSYNC : 0));
    case IO_SYNC:
        return ret_errno(fdatasync(f->fd));
    case IO_PUNCH:
        return file_punch(op);
    case IO_ZERO:
        return file_zero(op);
    case IO_ALLOCATE:
        return ret_errno(fallocate(f->fd, 0, (off_t)op->offset, (off_t)op->len));
    case IO_COPY:
        return file_copy(op);
    case IO_TRUNCATE:
        return ret_errno(ftruncate(f->fd, (off_t)op->len));
    case IO_EXTENTS:
        return file_extents(op);
    case IO_STAT:
        return file_stat(f, op->ret_info);
    case IO_LOCK:
    case IO_LOCK_TEST:
        return file_lock(op);
    case IO_OPEN:
        return file_open(op);
    case IO_CLOSE:
        return file_close(f);
    case IO_RENAME:
        return ret_errno(rename(op->path, op->path2));
    case IO_UNLINK:
        return ret_errno(unlink(op->path));
    case IO_SYNC_DIR:
        return sync_directory(op->path);
    case IO_RESOLVE:
        return resolve_path(op);
    case IO_COMPUTE:
        op->compute(op->compute_arg);
        return 0;
    case IO_LISTEN:
        return real_listen(op);
    case IO_CONNECT:
        return real_resolve_and_connect(op);
    case IO_ACCEPT:
    case IO_RECV:
    case IO_SEND:
        break;
    }
    return -EINVAL;
}
