/* SPDX-License-Identifier: Apache-2.0 */
/*
 * File operations on the simulated disk. What an operation does, it does at one moment between submission and completion,
 * which the seed chooses: so operations overtake each other, as on a disk with a queue.
 */
#include "base/alloc.h"
#include "base/checked.h"
#include "base/macros.h"
#include "loop/sim/sim-disk.h"
#include "loop/sim/sim-internal.h"

#include <assert.h>
#include <errno.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>

/* One open, as the kernel's open file description: lives until it is closed and its last operation has ended. */
struct sim_file {
    struct list link;
    struct sim_inode *inode;
    unsigned flags;
    unsigned in_flight;
    bool closed;
    bool forgotten; /* by the struct file */
};

static struct sim_disk *disk(void)
{
    return sim_self()->disk;
}

static void drop_locks(struct sim_file *sf)
{
    struct sim_lock *l;
    struct sim_lock *next;

    list_for_each_safe (&sf->inode->locks, l, next, link) {
        if (l->owner != sf)
            continue;
        list_remove(&l->link);
        free(l);
    }
}

static void file_gone(struct sim_file *sf)
{
    if (!list_empty(&sf->link)) {
        drop_locks(sf);
        sf->inode->opens--;
        list_remove(&sf->link);
    }
    if (sf->forgotten)
        free(sf);
}

static void file_op_ended(struct sim_file *sf)
{
    assert(sf->in_flight);
    if (--sf->in_flight == 0 && sf->closed)
        file_gone(sf);
}

void sim_file_close(struct file *f)
{
    struct sim_file *sf = f->sim;

    if (!sf)
        return; /* it was never open */
    f->sim = NULL;
    sf->closed = true;
    sf->forgotten = true;
    if (!sf->in_flight)
        file_gone(sf);
}

void sim_file_close_all(void)
{
    struct sim_file *sf;

    while ((sf = list_first(&disk()->files, struct sim_file, link))) {
        sf->forgotten = true;
        file_gone(sf);
    }
}

/* ---- reading and writing ---- */

static size_t iov_total(const struct iovec *iov, int count)
{
    size_t sum = 0;

    for (int i = 0; i < count; i++)
        sum += iov[i].iov_len;
    return sum;
}

static bool aligned(const struct sim_file *sf, uint64_t offset, const struct iovec *iov, int count)
{
    const struct sim_file_setup *setup = &sf->inode->setup;

    if (!(sf->flags & FILE_DIRECT) || setup->tmpfs)
        return true;
    if (offset % setup->offset_align)
        return false;
    for (int i = 0; i < count; i++)
        if (iov[i].iov_len % setup->offset_align ||
            (uintptr_t)iov[i].iov_base % setup->memory_align)
            return false;
    return true;
}

/* A part of it, at least one byte, in whole blocks if it is direct. */
static size_t cut_short(const struct sim_file *sf, size_t len)
{
    size_t unit = sf->flags & FILE_DIRECT ? sf->inode->setup.offset_align : 1;

    if (len <= unit)
        return len;
    len = sim_between(1, len - 1);
    return len < unit ? unit : len - len % unit;
}

static int64_t do_read(struct sim_file *sf, uint64_t offset, const struct iovec *iov, int count,
                       bool be_short)
{
    const struct sim_store *s = &sf->inode->live;
    size_t total = iov_total(iov, count);
    size_t done = 0;

    if (!(sf->flags & FILE_READ))
        return -EBADF;
    if (!aligned(sf, offset, iov, count))
        return -EINVAL;
    if (offset >= s->size)
        return 0;
    total = MIN(total, s->size - offset);
    if (be_short)
        total = cut_short(sf, total);
    for (; done < total; iov++) {
        size_t here = MIN(iov->iov_len, total - done);

        store_read(s, offset + done, iov->iov_base, here);
        done += here;
    }
    return (int64_t)total;
}

static void touch(struct sim_inode *inode)
{
    inode->mtime_ns = inode->ctime_ns = SIM_WALL_OFFSET_NS + sim_self()->now_ns;
}

/* Some of what is unflushed becomes durable by itself. */
static void write_back(struct sim_inode *inode)
{
    const struct sim_change *first = list_first(&inode->changes, struct sim_change, link);

    if (first && sim_chance(sim_self()->options.writeback_per_mille))
        inode_flush(inode, sim_between(first->number, disk()->change_count));
}

static void write_bytes(struct sim_file *sf, uint64_t offset, const struct iovec *iov, size_t len,
                        bool durable)
{
    uint8_t *data = xalloc(1, len + 1);
    size_t done = 0;

    for (; done < len; iov++) {
        size_t here = MIN(iov->iov_len, len - done);

        memcpy(data + done, iov->iov_base, here);
        done += here;
    }
    sim_trace(TRACE_EFFECT, offset, len, sim_hash_bytes(0, data, len));
    inode_change(disk(), sf->inode, CHANGE_WRITE, offset, len, data, durable);
    touch(sf->inode);
    write_back(sf->inode);
}

/* `total` bytes, as far as faults let them. */
static int64_t struck_write(struct sim_file *sf, uint64_t offset, const struct iovec *iov,
                            size_t total, bool durable, const struct sim_strike *strike)
{
    if (strike->error) { /* nothing of it, or a part (G9) */
        if (total && sim_chance(500))
            write_bytes(sf, offset, iov, sim_between(0, total) / SECTOR * SECTOR, false);
        return strike->error;
    }
    if (strike->cut_short)
        total = cut_short(sf, total);
    write_bytes(sf, offset, iov, total, durable);
    return (int64_t)total;
}

static int64_t do_write(struct sim_file *sf, uint64_t offset, const struct iovec *iov, int count,
                        bool durable, const struct sim_strike *strike)
{
    size_t total = iov_total(iov, count);
    const struct sim_inode *inode = sf->inode;

    if (!(sf->flags & FILE_WRITE))
        return -EBADF;
    if (!aligned(sf, offset, iov, count))
        return -EINVAL;
    if (inode->setup.type == FILE_TYPE_BLOCK) {
        if (offset >= inode->live.size)
            return total ? -ENOSPC : 0;
        total = MIN(total, inode->live.size - offset);
    }
    return struck_write(sf, offset, iov, total, durable, strike);
}

/* As the kernel: within one file system, between regular files, and not within the same bytes. */
static int64_t check_copy(const struct sim_io *io)
{
    const struct sim_inode *to = io->file->inode;
    const struct sim_inode *from = io->source->inode;

    if (!(io->file->flags & FILE_WRITE) || !(io->source->flags & FILE_READ))
        return -EBADF;
    if (to->setup.type != FILE_TYPE_REGULAR || from->setup.type != FILE_TYPE_REGULAR)
        return -EINVAL;
    if (to == from &&
        ranges_overlap(io->op->offset, io->op->len, io->op->source_offset, io->op->len))
        return -EINVAL;
    if (to->setup.tmpfs != from->setup.tmpfs)
        return -EXDEV;
    return to->setup.no_copy || from->setup.no_copy ? -EOPNOTSUPP : 0;
}

static int64_t do_copy(const struct sim_io *io)
{
    const struct io_op *op = io->op;
    const struct sim_store *from;
    uint64_t len;
    int64_t r;
    struct iovec iov;

    assert(io->source); /* none is done inline */
    from = &io->source->inode->live;
    len = op->source_offset < from->size ? MIN(op->len, from->size - op->source_offset) : 0;
    r = check_copy(io);
    if (r < 0 || !len)
        return r;
    iov = (struct iovec){xalloc(1, len), len};
    store_read(from, op->source_offset, iov.iov_base, len);
    r = struck_write(io->file, op->offset, &iov, len, false, &io->strike);
    free(iov.iov_base);
    return r;
}

static int64_t do_sync(const struct sim_io *io)
{
    struct sim_inode *inode = io->file->inode;

    if (io->strike.sync_drops) {
        inode_lose(inode, io->mark, sim_prng());
        return -EIO;
    }
    if (io->strike.error)
        return io->strike.error;
    /* What was written while it was under way is perhaps durable too. */
    inode_flush(inode, sim_between(io->mark, disk()->change_count));
    return 0;
}

/* ---- space ---- */

static int64_t do_range(const struct sim_io *io, enum change_kind kind)
{
    struct sim_file *sf = io->file;
    struct sim_inode *inode = sf->inode;
    uint64_t end = io->op->offset + io->op->len;
    bool block = inode->setup.type == FILE_TYPE_BLOCK;

    if (!(sf->flags & FILE_WRITE))
        return -EBADF;
    if (!io->op->len || end < io->op->offset)
        return -EINVAL;
    if (kind == CHANGE_ALLOCATE ? block : inode->setup.no_punch)
        return -EOPNOTSUPP;
    if (block && end > inode->live.size)
        return -EINVAL;
    if (kind != CHANGE_ALLOCATE)
        end = MIN(end, inode->live.size); /* the size is kept */
    if (end > io->op->offset)
        inode_change(disk(), inode, kind, io->op->offset, end - io->op->offset, NULL, false);
    touch(inode);
    write_back(inode);
    return 0;
}

static int64_t do_truncate(const struct sim_io *io)
{
    struct sim_file *sf = io->file;

    if (!(sf->flags & FILE_WRITE) || sf->inode->setup.type == FILE_TYPE_BLOCK)
        return -EINVAL;
    inode_change(disk(), sf->inode, CHANGE_RESIZE, 0, io->op->len, NULL, false);
    touch(sf->inode);
    return 0;
}

static int64_t do_extents(const struct sim_io *io)
{
    const struct sim_inode *inode = io->file->inode;
    const struct io_op *op = io->op;

    if (inode->setup.type == FILE_TYPE_BLOCK && op->len && op->extents_max) {
        op->extents[0] = (struct file_extent){.offset = op->offset, .len = op->len, .data = true};
        return 1; /* a device does not tell */
    }
    return store_extents(&inode->live, op->offset, op->len, op->extents, op->extents_max);
}

static void fill_info(const struct sim_file *sf, struct file_info *ret)
{
    const struct sim_inode *inode = sf->inode;
    bool direct = (sf->flags & FILE_DIRECT) && !inode->setup.tmpfs;
    bool block = inode->setup.type == FILE_TYPE_BLOCK;

    *ret = (struct file_info){
        .type = inode->setup.type,
        .size = inode->live.size,
        .allocated_bytes = block ? 0 : inode->live.pages * STORE_PAGE,
        .device = inode->setup.tmpfs ? 2 : 1,
        .inode = inode->number,
        .mtime_ns = inode->mtime_ns,
        .ctime_ns = inode->ctime_ns,
        .memory_align = direct ? inode->setup.memory_align : 1,
        .offset_align = direct ? inode->setup.offset_align : 1,
        .logical_block_size = block ? inode->setup.logical_block_size : 0,
        .read_only_device = block && inode->setup.read_only,
    };
}

/* ---- open, close, locks ---- */

static int64_t do_open(const struct sim_io *io)
{
    struct file *f = io->op->file;
    struct sim_inode *inode = disk_lookup(disk(), f->path);
    struct sim_file *sf;

    if (inode && (f->flags & FILE_CREATE) && (f->flags & FILE_EXCLUSIVE))
        return -EEXIST;
    if (inode && (f->flags & FILE_WRITE) && inode->setup.read_only)
        return -EROFS;
    if (!inode && !(f->flags & FILE_CREATE))
        return -ENOENT;
    if (!inode) {
        inode = disk_create(disk(), f->path);
        touch(inode);
    } else if ((f->flags & FILE_TRUNCATE) && inode->setup.type == FILE_TYPE_REGULAR) {
        inode_change(disk(), inode, CHANGE_RESIZE, 0, 0, NULL, false);
        touch(inode);
    }
    sf = xnew(struct sim_file);
    sf->inode = inode;
    sf->flags = f->flags;
    inode->opens++;
    list_append(&disk()->files, &sf->link);
    f->sim = sf;
    f->on_tmpfs = inode->setup.tmpfs;
    f->nowait = !f->on_tmpfs && !(f->flags & FILE_DIRECT);
    fill_info(sf, &f->info);
    return 0;
}

static uint64_t lock_last(const struct io_op *op)
{
    return op->len ? op->offset + op->len - 1 : UINT64_MAX;
}

static bool lock_conflicts(const struct sim_file *sf, const struct io_op *op)
{
    const struct sim_lock *l;

    list_for_each (&sf->inode->locks, l, link)
        if (l->owner != sf && l->start <= lock_last(op) && l->last >= op->offset &&
            (l->exclusive || op->lock == FILE_LOCK_EXCLUSIVE))
            return true;
    return false;
}

static void lock_add(struct sim_file *sf, uint64_t start, uint64_t last, bool exclusive)
{
    struct sim_lock *l = xnew(struct sim_lock);

    *l = (struct sim_lock){.owner = sf, .start = start, .last = last, .exclusive = exclusive};
    list_append(&sf->inode->locks, &l->link);
}

/* Takes the range out of what this open holds. */
static void lock_clear(struct sim_file *sf, uint64_t start, uint64_t last)
{
    struct list old = LIST_INIT(old);
    struct sim_lock *l;

    list_splice(&old, &sf->inode->locks);
    while ((l = list_first(&old, struct sim_lock, link))) {
        list_remove(&l->link);
        if (l->owner != sf || l->start > last || l->last < start) {
            list_append(&sf->inode->locks, &l->link);
            continue;
        }
        if (l->start < start)
            lock_add(sf, l->start, start - 1, l->exclusive);
        if (l->last > last)
            lock_add(sf, last + 1, l->last, l->exclusive);
        free(l);
    }
}

static int64_t do_lock(const struct sim_io *io)
{
    const struct io_op *op = io->op;
    struct sim_file *sf = io->file;

    if (op->lock != FILE_LOCK_NONE && lock_conflicts(sf, op))
        return -EAGAIN;
    if (op->kind == IO_LOCK_TEST)
        return 0;
    lock_clear(sf, op->offset, lock_last(op));
    if (op->lock != FILE_LOCK_NONE)
        lock_add(sf, op->offset, lock_last(op), op->lock == FILE_LOCK_EXCLUSIVE);
    return 0;
}

/* ---- names ---- */

/* Here are no links, and the working directory is the root. */
static int normalize(const char *path, char ret[static PATH_MAX])
{
    size_t used = 0;

    while (*path) {
        size_t len = strcspn(path, "/");

        if (len > NAME_MAX || used + 1 + len >= PATH_MAX)
            return -ENAMETOOLONG;
        if (len == 2 && memcmp(path, "..", 2) == 0) {
            while (used && ret[--used] != '/')
                ;
        } else if (len && !(len == 1 && *path == '.')) {
            ret[used++] = '/';
            memcpy(ret + used, path, len);
            used += len;
        }
        path += len + (path[len] == '/');
    }
    ret[used] = '\0';
    return 0;
}

static int64_t do_resolve(const struct io_op *op)
{
    const struct sim_inode *inode;
    int r = normalize(op->path, op->ret_path);

    if (r < 0 || !*op->path)
        return r < 0 ? r : -ENOENT;
    inode = disk_lookup(disk(), op->ret_path);
    if (inode)
        return (int64_t)inode->setup.type;
    if (!disk_has_dir(disk(), op->ret_path))
        return -ENOENT;
    if (!*op->ret_path)
        memcpy(op->ret_path, "/", 2);
    return FILE_TYPE_DIRECTORY;
}

/* ---- from submission to completion ---- */

/* G8: memory that the kernel may touch is there until the operation has ended. */
static void check_memory(const struct io_op *op)
{
    if (!op->hold) {
        assert(!op->detached || (op->kind != IO_READ && op->kind != IO_WRITE)); /* G8 */
        return;
    }
    assert(op->hold->refs); /* G8 */
    for (int i = 0; i < op->iov_count; i++)
        assert((uint8_t *)op->iov[i].iov_base >= op->hold->data &&
               (uint8_t *)op->iov[i].iov_base + op->iov[i].iov_len <=
                   op->hold->data + op->hold->size); /* G8 */
}

static int64_t perform(struct sim_io *io)
{
    struct io_op *op = io->op;

    check_memory(op);
    if (io->strike.error && op->kind != IO_WRITE && op->kind != IO_COPY && op->kind != IO_CLOSE)
        return io->strike.error;
    switch (op->kind) {
    case IO_READ:
        return do_read(io->file, op->offset, op->iov, op->iov_count, io->strike.cut_short);
    case IO_WRITE:
        return do_write(io->file, op->offset, op->iov, op->iov_count, op->durable, &io->strike);
    case IO_SYNC:
        return do_sync(io);
    case IO_PUNCH:
        return do_range(io, CHANGE_PUNCH);
    case IO_ZERO:
        return do_range(io, CHANGE_ZERO);
    case IO_ALLOCATE:
        return do_range(io, CHANGE_ALLOCATE);
    case IO_COPY:
        return do_copy(io);
    case IO_TRUNCATE:
        return do_truncate(io);
    case IO_EXTENTS:
        return do_extents(io);
    case IO_STAT:
        fill_info(io->file, op->ret_info);
        return 0;
    case IO_LOCK:
    case IO_LOCK_TEST:
        return do_lock(io);
    case IO_OPEN:
        return do_open(io);
    case IO_CLOSE:
        io->file->closed = true;
        return io->strike.error;
    case IO_RENAME:
        return disk_rename(disk(), op->path, op->path2);
    case IO_UNLINK:
        return disk_unlink(disk(), op->path);
    case IO_SYNC_DIR:
        disk_sync_dir(disk(), op->path);
        return 0;
    case IO_RESOLVE:
        return do_resolve(op);
    case IO_COMPUTE: /* was done inline */
    case IO_LISTEN:
    case IO_ACCEPT:
    case IO_CONNECT:
    case IO_RECV:
    case IO_SEND:
        break;
    }
    return -EINVAL;
}

static void finish(struct sim_io *io, int64_t result)
{
    struct sim_file *sf = io->file;
    struct sim_file *source = io->source;

    sim_io_finish(io, result);
    if (sf)
        file_op_ended(sf);
    if (source)
        file_op_ended(source);
}

static void file_effect(struct sim_io *io)
{
    finish(io, perform(io));
}

/* What strikes a copy may be a fault of the file that it reads as well. */
static void strike_source(struct sim_strike *strike, const char *path)
{
    struct sim_strike more = sim_strike(IO_COPY, path);

    strike->error = strike->error ? strike->error : more.error;
    strike->cut_short |= more.cut_short;
    strike->hang |= more.hang;
    strike->delay_ns += more.delay_ns;
}

void sim_file_submit(struct io_op *op)
{
    struct sim *sim = sim_self();
    struct sim_io *io = sim_io_new(op, op->path ? op->path : op->file->path);

    sim->disk->ops++;
    io->file = op->file ? op->file->sim : NULL;
    io->source = op->source ? op->source->sim : NULL;
    if (io->file)
        io->file->in_flight++;
    if (io->source)
        io->source->in_flight++;
    io->mark = sim->disk->change_count;
    io->effect = file_effect;
    io->strike = sim_strike(op->kind, io->name);
    if (op->source)
        strike_source(&io->strike, op->source->path);
    io->hung = io->strike.hang;
    if (!io->hung)
        sim_io_at(io, sim->now_ns + io->strike.delay_ns +
                          sim_between(sim->options.disk_min_ns, sim->options.disk_max_ns));
    if (++sim->file_ops == sim->options.kill_at_op)
        sim_kill();
}

static bool kernel_cancels(enum io_op_kind kind)
{
    return kind == IO_READ || kind == IO_WRITE || kind == IO_SYNC || kind == IO_PUNCH ||
           kind == IO_ZERO || kind == IO_ALLOCATE;
}

void sim_file_cancel(struct sim_io *io)
{
    const struct io_op *op = io->op;

    if (io->hung || io->strike.late || !kernel_cancels(op->kind) ||
        !sim_chance(sim_self()->options.cancel_per_mille))
        return;
    if (op->kind == IO_WRITE && sim_chance(300)) { /* G9: it had begun */
        struct sim_strike begun = {.error = -ECANCELED};

        (void)do_write(io->file, op->offset, op->iov, op->iov_count, false, &begun);
    }
    finish(io, -ECANCELED);
}

static bool outlives_process(enum io_op_kind kind)
{
    return kind == IO_WRITE || kind == IO_SYNC || kind == IO_PUNCH || kind == IO_ZERO ||
           kind == IO_ALLOCATE || kind == IO_COPY || kind == IO_TRUNCATE || kind == IO_RENAME ||
           kind == IO_UNLINK || kind == IO_SYNC_DIR;
}

void sim_file_settle(void)
{
    struct sim_io *io;
    struct sim_io *next;

    list_for_each_safe (&sim_self()->ios, io, next, link)
        if (io->effect == file_effect && outlives_process(io->op->kind) && sim_chance(500))
            file_effect(io);
}

/* ---- inline (L2) ---- */

#define TMPFS_INLINE_PER_MILLE 900

static void spend(struct loop *loop, size_t bytes)
{
    struct sim *sim = sim_self();

    sim->now_ns += 500 + bytes / 8;
    loop->now_ns = sim->now_ns;
}

int64_t sim_file_inline_rw(struct file *f, bool write, uint64_t offset, const struct iovec *iov,
                           int iov_count)
{
    struct loop *loop = loop_self();
    struct sim_strike strike = {.error = 0};
    struct sim_file *sf = f->sim;
    struct iovec first;
    int64_t n;

    if (sim_fault_watches(write ? IO_WRITE : IO_READ, f->path))
        return -EAGAIN;
    if (f->on_tmpfs) {
        if (!sim_chance(TMPFS_INLINE_PER_MILLE))
            return -EAGAIN;
        if (iov->iov_len > INLINE_MAX_BYTES) {
            first = (struct iovec){iov->iov_base, INLINE_MAX_BYTES};
            iov = &first;
            iov_count = 1;
        }
    } else if (write || !f->nowait || iov_count != 1 || iov->iov_len > INLINE_MAX_BYTES ||
               loop->now_ns - loop->tick_ns >= INLINE_TICK_NS ||
               !sim_chance(sim_self()->options.inline_per_mille)) {
        return -EAGAIN;
    }
    strike.cut_short = sim_chance(sim_self()->options.short_per_mille);
    n = write ? do_write(sf, offset, iov, iov_count, false, &strike)
              : do_read(sf, offset, iov, iov_count, strike.cut_short);
    spend(loop, iov_total(iov, iov_count));
    return n;
}

static bool is_inline_on_tmpfs(enum io_op_kind kind)
{
    return kind == IO_SYNC || kind == IO_PUNCH || kind == IO_ZERO || kind == IO_TRUNCATE ||
           kind == IO_EXTENTS || kind == IO_STAT || kind == IO_LOCK || kind == IO_LOCK_TEST;
}

bool sim_file_try_inline(struct io_op *op)
{
    struct sim_io io = {.op = op};

    if (op->kind == IO_COMPUTE) {
        op->compute(op->compute_arg);
        return true;
    }
    if (!is_inline_on_tmpfs(op->kind) || !op->file->on_tmpfs ||
        sim_fault_watches(op->kind, op->file->path) || !sim_chance(TMPFS_INLINE_PER_MILLE))
        return false;
    io.file = op->file->sim;
    io.mark = disk()->change_count;
    op->result = perform(&io);
    spend(op->loop, 0);
    return true;
}
