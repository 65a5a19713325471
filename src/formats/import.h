/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What formats that are only read have in common: pieces of the file that say where the disk lies, kept in bounded memory, and
 * tables of blocks. See docs/formats/import.md.
 *
 * IMPORT-1 Nothing that an image says is allocated: its tables stay in the file, and are read in pages when they are needed. A
 *          node keeps IMPORT_PAGES of them at most, and those that requests look into just now.
 * IMPORT-2 Each place that an image names is checked against its file before it is used. What lies beyond the end is damage.
 */
#ifndef CAIRN_FORMATS_IMPORT_H
#define CAIRN_FORMATS_IMPORT_H

#include "base/context.h"
#include "base/error.h"
#include "base/macros.h"
#include "graph/driver.h"
#include "loop/lock.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* 4 MiB for each node. */
#define IMPORT_PAGE_BYTES ((size_t)16384)
#define IMPORT_PAGES      256u

struct import_page;

/* What is to be seen instead of what the file holds: a log that was not written to its places. */
typedef void import_patch_fn(void *arg, uint64_t offset, uint8_t *bytes, size_t len);

struct import {
    /* Set in open, then constant. */
    struct node *node;
    import_patch_fn *patch; /* or NULL */
    void *patch_arg;

    bool damage_told; /* atomic */

    struct tiny_lock lock;
    struct import_page *pages[IMPORT_PAGES]; /* Protected by lock. */
};

void import_init(struct import *im, struct node *node);
void import_release(struct import *im);

/* Reads from a file of the node, past the cache. -EIO for what lies beyond its end. */
int co_fn import_co_read(struct import *im, const struct request *by, struct edge *file,
                         uint64_t offset, void *ret, size_t len);
/* The same for co_open; `what` is named in the error. */
int co_fn import_co_read_named(struct import *im, const struct request *by, const char *what,
                               struct edge *file, uint64_t offset, void *ret, size_t len,
                               struct error **err);

/* The page that an offset of a file lies in; given back by import_page_put(). What lies beyond the file's end is zeroes. */
int co_fn import_page_get(struct import *im, const struct request *by, struct edge *file,
                          uint64_t offset, struct import_page **ret);
void import_page_put(struct import *im, struct import_page *page);
/* Its bytes from there on; NULL if the offset lies in another page. */
const uint8_t *import_page_at(const struct import_page *page, uint64_t offset);

/* Warns, once for each node. Returns -EIO. */
int import_damaged(struct import *im, const char *fmt, ...) PRINTF_LIKE(2, 3);

/* Of a table that says where each block of the disk lies: what one entry says. `ret->len` is not set. */
struct import_blocks;
typedef int import_entry_fn(struct import *im, const struct import_blocks *b, uint64_t block,
                            const uint8_t *entry, struct mapping *ret);

struct import_blocks {
    struct edge *file;
    uint64_t table; /* where it lies there */
    unsigned entry_bytes;
    unsigned block_bits;
    bool holes;     /* blocks are there that were never written */
    uint64_t group; /* entries of so many blocks are followed by another one; 0: there are none */
    import_entry_fn *entry;
    const void *of; /* what `entry` wants to know */
};

/* For co_map: runs of blocks that say the same, or lie one after the other. */
int co_fn import_map_blocks(struct import *im, const struct import_blocks *b,
                            const struct request *by, uint64_t offset, uint64_t len,
                            struct mapping *ret);

/* For drivers' tables. */
const char *import_filename(const struct node *node);
uint64_t import_allocated_bytes(const struct node *node);

#endif
