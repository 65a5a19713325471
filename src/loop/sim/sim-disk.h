/* SPDX-License-Identifier: Apache-2.0 */
/* The simulated disk: inodes with live and durable content, names with live and durable directories. */
#ifndef CAIRN_LOOP_SIM_DISK_H
#define CAIRN_LOOP_SIM_DISK_H

#include "base/list.h"
#include "base/prng.h"
#include "loop/sim/sim-store.h"
#include "loop/sim/sim.h"

#define SECTOR 512u /* what a power cut can tear a write at */

enum change_kind { CHANGE_WRITE, CHANGE_ZERO, CHANGE_PUNCH, CHANGE_ALLOCATE, CHANGE_RESIZE };

/* Something that happened to the live content and not yet to the durable. */
struct sim_change {
    struct list link; /* inode.changes, in order */
    enum change_kind kind;
    bool durable; /* survives a power cut, though older ones may not */
    uint64_t number;
    uint64_t offset;
    uint64_t len; /* CHANGE_RESIZE: the size */
    uint8_t *data;
};

struct sim_lock {
    struct list link;
    const void *owner;
    uint64_t start;
    uint64_t last; /* inclusive */
    bool exclusive;
};

struct sim_inode {
    struct list link;
    uint64_t number;
    unsigned opens;
    struct sim_file_setup setup;
    struct sim_store live;    /* what is read */
    struct sim_store durable; /* what a power cut leaves, before `changes` */
    struct list changes;
    struct list locks;
    uint64_t mtime_ns;
    uint64_t ctime_ns;
};

struct sim_name {
    struct list link;
    char *path;
    struct sim_inode *inode;
};

enum name_change_kind { NAME_LINK, NAME_UNLINK, NAME_RENAME };

struct sim_name_change {
    struct list link;
    enum name_change_kind kind;
    char *path;
    char *path2; /* NAME_RENAME: the new name */
    struct sim_inode *inode;
    bool chosen;
};

struct sim_disk {
    struct list inodes;
    struct list names;         /* as seen */
    struct list durable_names; /* as after a power cut, before name_changes */
    struct list name_changes;  /* in order */
    struct list files;         /* struct sim_file: open ones */
    uint64_t inode_count;
    uint64_t change_count;
    uint64_t ops;
};

struct sim_inode *disk_lookup(struct sim_disk *d, const char *path);
struct sim_inode *disk_create(struct sim_disk *d, const char *path);
/* There is a file below it, at any depth. */
bool disk_has_dir(const struct sim_disk *d, const char *path);
int disk_unlink(struct sim_disk *d, const char *path);
int disk_rename(struct sim_disk *d, const char *from, const char *to);
/* Of the directory of this path, or which it is. */
void disk_sync_dir(struct sim_disk *d, const char *path);

/* Takes `data` (CHANGE_WRITE). */
void inode_change(struct sim_disk *d, struct sim_inode *inode, enum change_kind kind,
                  uint64_t offset, uint64_t len, uint8_t *data, bool durable);
/* All changes up to this number are durable now. */
void inode_flush(struct sim_inode *inode, uint64_t upto);
/* They are not, and a part never will be. */
void inode_lose(struct sim_inode *inode, uint64_t upto, struct prng *prng);

#endif
