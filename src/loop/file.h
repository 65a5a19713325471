/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Files, as awaitable I/O. Nothing here sleeps on a disk in the loop's thread (L1): what the engine cannot do, and open,
 * stat, locks and the like always, is done by worker threads of which each file has its own few, so that a file that hangs
 * holds up nobody else.
 *
 * All calls return 0 or more, or a negative errno. Reads and writes are whole: short transfers are continued here, and
 * -ENOSPC, -EIO and the rest come when they come. Cancelled calls return at once when all memory that the kernel may touch
 * is held by `hold` (G8); the file then counts a detached operation until it ends.
 */
#ifndef CAIRN_LOOP_FILE_H
#define CAIRN_LOOP_FILE_H

#include "base/context.h"
#include "base/error.h"
#include "loop/iobuf.h"

#include <stdbool.h>
#include <stdint.h>
#include <sys/uio.h>

struct file;

enum file_flags {
    FILE_READ = 1 << 0,
    FILE_WRITE = 1 << 1,
    FILE_CREATE = 1 << 2,
    FILE_EXCLUSIVE = 1 << 3, /* with FILE_CREATE: fails if it exists */
    FILE_TRUNCATE = 1 << 4,
    FILE_DIRECT = 1 << 5, /* O_DIRECT: past the page cache */
};

enum file_type {
    FILE_TYPE_REGULAR,
    FILE_TYPE_BLOCK,
    FILE_TYPE_CHARACTER,
    FILE_TYPE_DIRECTORY,
    FILE_TYPE_OTHER,
};

struct file_info {
    enum file_type type;
    uint64_t size;            /* bytes; of a block device: its capacity */
    uint64_t allocated_bytes; /* on the host; 0 for devices */
    uint64_t device;
    uint64_t inode;
    uint64_t mtime_ns;
    uint64_t ctime_ns;
    unsigned memory_align;       /* bytes: what FILE_DIRECT I/O needs of addresses; 1 without */
    unsigned offset_align;       /* bytes: what it needs of offsets and lengths; 1 without */
    unsigned logical_block_size; /* bytes; of block devices, else 0 */
    bool read_only_device;
};

/*
 * Opens a file; -ENOENT, -EACCES, -EROFS, ... with a message that names the path. `mode` is for FILE_CREATE. The reference
 * that it returns is dropped by file_unref(), or file_co_close() if errors of close matter.
 */
int co_fn file_co_open(struct file **ret, const char *path, unsigned flags, unsigned mode,
                       struct error **err);
struct file *file_ref(struct file *f);
struct file *file_unref(struct file *f);
/*
 * Closes, off the loop's thread, and drops the reference, which is the last one that does I/O. When it returns, locks are
 * gone, unless detached operations still hold the file.
 */
int co_fn file_co_close(struct file *f);
const char *file_path(const struct file *f);
/* As of open, or of the last file_co_stat(). */
const struct file_info *file_info(const struct file *f);
int co_fn file_co_stat(struct file *f, struct file_info *ret);
/* Operations that their waiters have left and that have not ended (G7, G8). Any thread. */
unsigned file_detached(const struct file *f);

/*
 * Reads up to the end of the file: returns the number of bytes, less than asked for only there. `hold` is the pool buffer
 * that all of iov lies in, or NULL.
 */
int64_t co_fn file_co_read(struct file *f, uint64_t offset, const struct iovec *iov, int iov_count,
                           struct iobuf *hold);

/* Writes all of iov. `durable`: on stable storage when it returns, as a write and a sync of these bytes. */
int co_fn file_co_write(struct file *f, uint64_t offset, const struct iovec *iov, int iov_count,
                        bool durable, struct iobuf *hold);

/*
 * What was written before, and what is needed to read it back, is on stable storage. Those who ask at the same time share one
 * sync. A failure is final for the file: the kernel may have dropped what it could not write, and would tell it once only.
 */
int co_fn file_co_sync(struct file *f);

/* The range reads as zeroes and holds no space afterwards; -EOPNOTSUPP where the file system or device cannot. */
int co_fn file_co_punch(struct file *f, uint64_t offset, uint64_t len);
/* As above, but what the range reads as does not matter: of a device the cheapest way to say that its data is not needed. */
int co_fn file_co_discard(struct file *f, uint64_t offset, uint64_t len);
/* The range reads as zeroes and keeps its space; -EOPNOTSUPP as above. */
int co_fn file_co_zero(struct file *f, uint64_t offset, uint64_t len);
/* Allocates space for the range, growing the file when needed. */
int co_fn file_co_allocate(struct file *f, uint64_t offset, uint64_t len);
int co_fn file_co_truncate(struct file *f, uint64_t size);
/*
 * Copies from another file without the bytes passing through our memory, or moving at all where the file system can share them:
 * the number of bytes, less than asked for only where the other file ends. -EXDEV where the host does not do that between these
 * two files. After an error a first part may have been copied.
 */
int64_t co_fn file_co_copy(struct file *f, uint64_t offset, struct file *source,
                           uint64_t source_offset, uint64_t len);

struct file_extent {
    uint64_t offset;
    uint64_t len;
    bool data; /* else a hole, which reads as zeroes */
};

/*
 * Fills ret[0..max) with the extents of [offset, offset + len), in order and without gaps, in one call. Returns their
 * number; they may end before the range when there are more than max. What lies beyond the end of the file is a hole.
 */
int co_fn file_co_extents(struct file *f, uint64_t offset, uint64_t len, struct file_extent *ret,
                          unsigned max);

enum file_lock { FILE_LOCK_NONE, FILE_LOCK_SHARED, FILE_LOCK_EXCLUSIVE };

/*
 * Open-file-description locks on a byte range, never waiting: -EAGAIN when another holds a conflicting one. file_co_lock_test
 * says whether a lock could be taken, without taking it.
 */
int co_fn file_co_lock(struct file *f, uint64_t start, uint64_t len, enum file_lock lock);
int co_fn file_co_lock_test(struct file *f, uint64_t start, uint64_t len, enum file_lock lock);

/* Names: on the directory's side durable only after file_co_sync_dir(), which takes the path of the file or directory. */
int co_fn file_co_rename(const char *from, const char *to);
int co_fn file_co_unlink(const char *path);
int co_fn file_co_sync_dir(const char *path);

/*
 * Where a path leads: the absolute path without links, "." and "..", owned by the caller. Opens nothing, so that it is safe
 * for names of devices. Returns what is there, an enum file_type; -ENOENT, -ELOOP, -EACCES, ...
 */
int co_fn file_co_resolve(const char *path, char **ret);

#endif
