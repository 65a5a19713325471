/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The simulated disk: what is durable, what is not yet, and what a power cut makes of it (S5).
 *
 * DISK-1 `live` is `durable` with all `changes` applied in order, but for what a failed sync has lost (inode_lose()).
 * DISK-2 A change leaves the list only into `durable`, and oldest first: in order, so that an older write never covers a
 *        newer one. A durable write waits in the list behind older ones that are not.
 * DISK-3 Changes of names in one directory become durable in order. One that concerns two directories takes the earlier ones
 *        of both with it.
 */
#include "loop/sim/sim-disk.h"
#include "base/alloc.h"
#include "base/macros.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* ---- content ---- */

static void change_free(struct sim_change *c)
{
    list_remove(&c->link);
    free(c->data);
    free(c);
}

static void change_apply(const struct sim_change *c, struct sim_store *s)
{
    switch (c->kind) {
    case CHANGE_WRITE:
        store_write(s, c->offset, c->data, c->len);
        break;
    case CHANGE_ZERO:
    case CHANGE_PUNCH:
        store_zero(s, c->offset, c->len, c->kind == CHANGE_ZERO);
        if (c->kind == CHANGE_ZERO)
            store_allocate(s, c->offset, c->len);
        break;
    case CHANGE_ALLOCATE:
        store_allocate(s, c->offset, c->len);
        s->size = MAX(s->size, c->offset + c->len);
        break;
    case CHANGE_RESIZE:
        store_resize(s, c->len);
        break;
    }
}

static void apply_part(const struct sim_change *c, struct sim_store *s, uint64_t from, uint64_t to)
{
    if (from >= to)
        return;
    if (c->kind == CHANGE_WRITE)
        store_write(s, from, c->data + (from - c->offset), to - from);
    else
        store_zero(s, from, to - from, c->kind == CHANGE_ZERO);
}

/* Some of its sectors: the first ones, or any. */
static void change_apply_torn(const struct sim_change *c, struct sim_store *s, struct prng *prng)
{
    uint64_t end = c->offset + c->len;
    uint64_t at = c->offset;

    if (c->kind == CHANGE_ALLOCATE || c->kind == CHANGE_RESIZE || !c->len) {
        if (prng_chance(prng, 500))
            change_apply(c, s);
        return;
    }
    if (c->kind != CHANGE_WRITE || prng_chance(prng, 500)) {
        uint64_t to = (c->offset + prng_below(prng, c->len)) / SECTOR * SECTOR;

        apply_part(c, s, c->offset, to);
        return;
    }
    while (at < end) {
        uint64_t next = MIN(end, (at / SECTOR + 1) * SECTOR);

        if (prng_chance(prng, 500))
            apply_part(c, s, at, next);
        at = next;
    }
}

void inode_change(struct sim_disk *d, struct sim_inode *inode, enum change_kind kind,
                  uint64_t offset, uint64_t len, uint8_t *data, bool durable)
{
    struct sim_change *c = xnew(struct sim_change);

    c->kind = kind;
    c->durable = durable;
    c->number = ++d->change_count;
    c->offset = offset;
    c->len = len;
    c->data = data;
    list_append(&inode->changes, &c->link);
    change_apply(c, &inode->live);
    inode_flush(inode, 0);
}

void inode_flush(struct sim_inode *inode, uint64_t upto)
{
    struct sim_change *c;

    while ((c = list_first(&inode->changes, struct sim_change, link)) &&
           (c->number <= upto || c->durable)) { /* DISK-2 */
        change_apply(c, &inode->durable);
        change_free(c);
    }
}

void inode_lose(struct sim_inode *inode, uint64_t upto, struct prng *prng)
{
    struct sim_change *c;
    bool evicted = prng_chance(prng, 500);

    while ((c = list_first(&inode->changes, struct sim_change, link)) &&
           (c->number <= upto || c->durable)) {
        if (c->durable || prng_chance(prng, 250))
            change_apply(c, &inode->durable);
        else if (prng_chance(prng, 333))
            change_apply_torn(c, &inode->durable, prng);
        change_free(c);
    }
    if (!evicted)
        return; /* the page cache still shows what is lost */
    store_copy(&inode->live, &inode->durable);
    list_for_each (&inode->changes, c, link)
        change_apply(c, &inode->live);
}

static struct sim_inode *inode_new(struct sim_disk *d)
{
    struct sim_inode *inode = xnew(struct sim_inode);

    inode->number = ++d->inode_count;
    list_init(&inode->changes);
    list_init(&inode->locks);
    list_append(&d->inodes, &inode->link);
    return inode;
}

static void inode_free(struct sim_inode *inode)
{
    struct sim_change *c;

    assert(!inode->opens && list_empty(&inode->locks));
    while ((c = list_first(&inode->changes, struct sim_change, link)))
        change_free(c);
    store_release(&inode->live);
    store_release(&inode->durable);
    list_remove(&inode->link);
    free(inode);
}

/* ---- names ---- */

static struct sim_name *name_find(struct list *names, const char *path)
{
    struct sim_name *n;

    list_for_each (names, n, link)
        if (strcmp(n->path, path) == 0)
            return n;
    return NULL;
}

static void name_drop(struct sim_name *n)
{
    if (!n)
        return;
    list_remove(&n->link);
    free(n->path);
    free(n);
}

static void name_put(struct list *names, const char *path, struct sim_inode *inode)
{
    struct sim_name *n = name_find(names, path);

    if (!n) {
        n = xnew(struct sim_name);
        n->path = xstrdup(path);
        list_append(names, &n->link);
    }
    n->inode = inode;
}

static void name_change_apply(const struct sim_name_change *c, struct list *names)
{
    if (c->kind == NAME_LINK) {
        name_put(names, c->path, c->inode);
        return;
    }
    name_drop(name_find(names, c->path));
    if (c->kind == NAME_RENAME)
        name_put(names, c->path2, c->inode);
}

static void name_change_free(struct sim_name_change *c)
{
    list_remove(&c->link);
    free(c->path);
    free(c->path2);
    free(c);
}

static void name_change(struct sim_disk *d, enum name_change_kind kind, const char *path,
                        const char *path2, struct sim_inode *inode)
{
    struct sim_name_change *c = xnew(struct sim_name_change);

    c->kind = kind;
    c->path = xstrdup(path);
    c->path2 = path2 ? xstrdup(path2) : NULL;
    c->inode = inode;
    list_append(&d->name_changes, &c->link);
    name_change_apply(c, &d->names);
}

static bool names_refer(const struct list *names, const struct sim_inode *inode)
{
    const struct sim_name *n;

    list_for_each (names, n, link)
        if (n->inode == inode)
            return true;
    return false;
}

/* Frees the inodes that nothing can bring back. */
static void disk_collect(struct sim_disk *d)
{
    struct sim_inode *inode;
    struct sim_inode *next;

    list_for_each_safe (&d->inodes, inode, next, link) {
        const struct sim_name_change *c;
        bool used =
            inode->opens || names_refer(&d->names, inode) || names_refer(&d->durable_names, inode);

        list_for_each (&d->name_changes, c, link)
            used |= c->inode == inode;
        if (!used)
            inode_free(inode);
    }
}

struct sim_inode *disk_lookup(struct sim_disk *d, const char *path)
{
    struct sim_name *n = name_find(&d->names, path);

    return n ? n->inode : NULL;
}

/* These hold nothing after a power cut. */
static bool on_tmpfs(const char *path)
{
    return strncmp(path, "/dev/shm/", 9) == 0 || strncmp(path, "/run/", 5) == 0;
}

struct sim_inode *disk_create(struct sim_disk *d, const char *path)
{
    struct sim_inode *inode = inode_new(d);

    inode->setup =
        (struct sim_file_setup){.memory_align = 512, .offset_align = 512, .tmpfs = on_tmpfs(path)};
    name_change(d, NAME_LINK, path, NULL, inode);
    return inode;
}

bool disk_has_dir(const struct sim_disk *d, const char *path)
{
    const struct sim_name *n;
    size_t len = strlen(path);

    list_for_each (&d->names, n, link)
        if (strncmp(n->path, path, len) == 0 && n->path[len] == '/')
            return true;
    return false;
}

int disk_unlink(struct sim_disk *d, const char *path)
{
    struct sim_inode *inode = disk_lookup(d, path);

    if (!inode)
        return -ENOENT;
    name_change(d, NAME_UNLINK, path, NULL, inode);
    return 0;
}

int disk_rename(struct sim_disk *d, const char *from, const char *to)
{
    struct sim_inode *inode = disk_lookup(d, from);

    if (!inode)
        return -ENOENT;
    if (strcmp(from, to) != 0)
        name_change(d, NAME_RENAME, from, to, inode);
    return 0;
}

static size_t dir_len(const char *path)
{
    const char *slash = strrchr(path, '/');

    return slash ? (size_t)(slash - path) : 0;
}

static bool in_dir(const char *path, const char *dir, size_t len)
{
    return path && dir_len(path) == len && strncmp(path, dir, len) == 0;
}

/* Directories, as the paths of files in them. */
struct dir_set {
    const char *paths[64];
    size_t count;
};

static bool dir_set_has(const struct dir_set *s, const char *path)
{
    for (size_t i = 0; i < s->count; i++)
        if (in_dir(path, s->paths[i], dir_len(s->paths[i])))
            return true;
    return false;
}

static void dir_set_add(struct dir_set *s, const char *path)
{
    if (!path || dir_set_has(s, path))
        return;
    assert(s->count < ARRAY_SIZE(s->paths));
    s->paths[s->count++] = path;
}

static bool is_directory(const struct sim_disk *d, const char *path)
{
    const struct sim_name *n;
    const struct sim_name_change *c;
    size_t len = strlen(path);

    list_for_each (&d->names, n, link)
        if (in_dir(n->path, path, len))
            return true;
    list_for_each (&d->name_changes, c, link)
        if (in_dir(c->path, path, len) || in_dir(c->path2, path, len))
            return true;
    return false;
}

/* DISK-3: newest first, to find what must come along; then oldest first. */
void disk_sync_dir(struct sim_disk *d, const char *path)
{
    struct dir_set dirs = {.count = 0};
    struct sim_name_change *c;
    struct sim_name_change *next;
    AUTO(free_ptr) char *inside = is_directory(d, path) ? xasprintf("%s/", path) : xstrdup(path);

    dir_set_add(&dirs, inside);
    for (struct list *l = d->name_changes.prev; l != &d->name_changes; l = l->prev) {
        c = list_entry(l, struct sim_name_change, link);
        c->chosen = dir_set_has(&dirs, c->path) || (c->path2 && dir_set_has(&dirs, c->path2));
        if (c->chosen) {
            dir_set_add(&dirs, c->path);
            dir_set_add(&dirs, c->path2);
        }
    }
    list_for_each_safe (&d->name_changes, c, next, link) {
        if (!c->chosen)
            continue;
        name_change_apply(c, &d->durable_names);
        name_change_free(c);
    }
    disk_collect(d);
}

/* ---- the power fails ---- */

enum cut_mood { CUT_LOSES_ALL, CUT_KEEPS_ALL, CUT_BY_CHANCE, CUT_MOODS = 4 };

static void inode_power_cut(struct sim_inode *inode, struct prng *prng)
{
    uint64_t mood = prng_below(prng, CUT_MOODS);
    struct sim_change *c;

    while ((c = list_first(&inode->changes, struct sim_change, link))) {
        uint64_t luck = prng_below(prng, 3);

        if (c->durable || mood == CUT_KEEPS_ALL || (mood >= CUT_BY_CHANCE && luck == 0))
            change_apply(c, &inode->durable);
        else if (mood >= CUT_BY_CHANCE && luck == 1)
            change_apply_torn(c, &inode->durable, prng);
        change_free(c);
    }
    store_copy(&inode->live, &inode->durable);
}

/* DISK-3: of each directory the first few. */
static void names_power_cut(struct sim_disk *d, struct prng *prng)
{
    uint64_t mood = prng_below(prng, CUT_MOODS);
    struct dir_set broken = {.count = 0};
    struct list gone = LIST_INIT(gone);
    struct sim_name_change *c;
    struct sim_name_change *next;
    struct sim_name *n;

    list_for_each_safe (&d->name_changes, c, next, link) {
        bool lost = dir_set_has(&broken, c->path) || (c->path2 && dir_set_has(&broken, c->path2));

        if (lost || mood == CUT_LOSES_ALL || (mood >= CUT_BY_CHANCE && prng_chance(prng, 400))) {
            dir_set_add(&broken, c->path);
            dir_set_add(&broken, c->path2);
            list_remove(&c->link); /* the set still points to its path */
            list_append(&gone, &c->link);
            continue;
        }
        name_change_apply(c, &d->durable_names);
        name_change_free(c);
    }
    while ((c = list_first(&gone, struct sim_name_change, link)))
        name_change_free(c);
    while ((n = list_first(&d->names, struct sim_name, link)))
        name_drop(n);
    list_for_each (&d->durable_names, n, link)
        name_put(&d->names, n->path, n->inode);
}

static void tmpfs_power_cut(struct sim_disk *d)
{
    struct sim_name *n;
    struct sim_name *next;

    list_for_each_safe (&d->durable_names, n, next, link)
        if (n->inode->setup.tmpfs)
            name_drop(n);
    list_for_each_safe (&d->names, n, next, link)
        if (n->inode->setup.tmpfs)
            name_drop(n);
}

void sim_disk_power_cut(struct sim_disk *d, uint64_t seed)
{
    struct prng prng = {.state = seed};
    struct sim_inode *inode;

    assert(list_empty(&d->files)); /* between runs */
    list_for_each (&d->inodes, inode, link)
        inode_power_cut(inode, &prng);
    names_power_cut(d, &prng);
    tmpfs_power_cut(d);
    disk_collect(d);
}

/* ---- the test's side ---- */

struct sim_disk *sim_disk_new(void)
{
    struct sim_disk *d = xnew(struct sim_disk);

    list_init(&d->inodes);
    list_init(&d->names);
    list_init(&d->durable_names);
    list_init(&d->name_changes);
    list_init(&d->files);
    return d;
}

struct sim_disk *sim_disk_free(struct sim_disk *d)
{
    struct sim_inode *inode;
    struct sim_name *n;
    struct sim_name_change *c;

    if (!d)
        return NULL;
    while ((n = list_first(&d->names, struct sim_name, link)))
        name_drop(n);
    while ((n = list_first(&d->durable_names, struct sim_name, link)))
        name_drop(n);
    while ((c = list_first(&d->name_changes, struct sim_name_change, link)))
        name_change_free(c);
    while ((inode = list_first(&d->inodes, struct sim_inode, link)))
        inode_free(inode);
    free(d);
    return NULL;
}

/* A file whose name is durable. */
static struct sim_inode *make(struct sim_disk *d, const char *path)
{
    struct sim_inode *inode = disk_lookup(d, path);

    if (!inode) {
        inode = disk_create(d, path);
        disk_sync_dir(d, path);
    }
    return inode;
}

void sim_disk_make(struct sim_disk *d, const char *path, const struct sim_file_setup *setup)
{
    struct sim_inode *inode = make(d, path);

    inode->setup = *setup;
    if (!setup->memory_align)
        inode->setup.memory_align = 512;
    if (!setup->offset_align)
        inode->setup.offset_align = 512;
    if (!setup->logical_block_size)
        inode->setup.logical_block_size = 512;
    inode->setup.tmpfs |= on_tmpfs(path);
    inode_change(d, inode, CHANGE_RESIZE, 0, setup->size, NULL, true);
    inode_flush(inode, UINT64_MAX);
}

int64_t sim_disk_size(struct sim_disk *d, const char *path)
{
    const struct sim_inode *inode = disk_lookup(d, path);

    return inode ? (int64_t)inode->live.size : -ENOENT;
}

int sim_disk_read(struct sim_disk *d, const char *path, uint64_t offset, void *buf, size_t len)
{
    const struct sim_inode *inode = disk_lookup(d, path);

    if (!inode)
        return -ENOENT;
    store_read(&inode->live, offset, buf, len);
    return 0;
}

void sim_disk_write(struct sim_disk *d, const char *path, uint64_t offset, const void *buf,
                    size_t len)
{
    struct sim_inode *inode = make(d, path);
    uint8_t *copy = xalloc(1, len + 1);

    memcpy(copy, buf, len);
    inode_change(d, inode, CHANGE_WRITE, offset, len, copy, true);
    inode_flush(inode, UINT64_MAX);
}

uint64_t sim_disk_ops(const struct sim_disk *d)
{
    return d->ops;
}
