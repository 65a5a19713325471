/* SPDX-License-Identifier: Apache-2.0 */
/* The content of a simulated file: sparse, with holes, allocated and written pages. */
#ifndef CAIRN_LOOP_SIM_STORE_H
#define CAIRN_LOOP_SIM_STORE_H

#include "loop/file.h"

#include <stddef.h>
#include <stdint.h>

#define STORE_PAGE ((uint64_t)4096)

struct store_chunk;

struct sim_store {
    struct store_chunk **chunks; /* by index, ascending */
    size_t count;
    size_t capacity;
    uint64_t size;
    uint64_t pages; /* allocated */
};

void store_release(struct sim_store *s);
void store_copy(struct sim_store *to, const struct sim_store *from);

/* Beyond the end and in holes: zeroes. */
void store_read(const struct sim_store *s, uint64_t offset, void *buf, size_t len);
/* Grows the store when needed. */
void store_write(struct sim_store *s, uint64_t offset, const void *buf, size_t len);
/* The range reads as zeroes; whole pages are given back unless `keep`. */
void store_zero(struct sim_store *s, uint64_t offset, uint64_t len, bool keep);
/* Allocates all pages of the range; the size stays. */
void store_allocate(struct sim_store *s, uint64_t offset, uint64_t len);
void store_resize(struct sim_store *s, uint64_t size);
/* As file_co_extents(). */
unsigned store_extents(const struct sim_store *s, uint64_t offset, uint64_t len,
                       struct file_extent *ret, unsigned max);

#endif
