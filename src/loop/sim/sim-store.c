/* SPDX-License-Identifier: Apache-2.0 */
/* Sparse content: a sorted array of chunks of 1 MiB, each a table of pages. */
#include "loop/sim/sim-store.h"
#include "base/alloc.h"
#include "base/macros.h"

#include <stdlib.h>
#include <string.h>

#define PAGES_PER_CHUNK 256
#define CHUNK_BYTES     (STORE_PAGE * PAGES_PER_CHUNK)

struct store_page {
    uint8_t *data; /* NULL: reads as zeroes */
    bool allocated;
};

struct store_chunk {
    uint64_t index;
    struct store_page pages[PAGES_PER_CHUNK];
};

/* The place of the first chunk at or after the index. */
static size_t chunk_place(const struct sim_store *s, uint64_t index)
{
    size_t low = 0;
    size_t high = s->count;

    while (low < high) {
        size_t mid = (low + high) / 2;

        if (s->chunks[mid]->index < index)
            low = mid + 1;
        else
            high = mid;
    }
    return low;
}

static struct store_page *find_page(const struct sim_store *s, uint64_t page)
{
    size_t at = chunk_place(s, page / PAGES_PER_CHUNK);

    if (at == s->count || s->chunks[at]->index != page / PAGES_PER_CHUNK)
        return NULL;
    return &s->chunks[at]->pages[page % PAGES_PER_CHUNK];
}

static struct store_page *make_page(struct sim_store *s, uint64_t page)
{
    uint64_t index = page / PAGES_PER_CHUNK;
    size_t at = chunk_place(s, index);
    struct store_page *p;

    if (at == s->count || s->chunks[at]->index != index) {
        if (s->count == s->capacity) {
            struct store_chunk **grown = xnew_n(struct store_chunk *, s->capacity * 2 + 8);

            if (s->count)
                memcpy(grown, s->chunks, s->count * sizeof(*grown));
            free(s->chunks);
            s->chunks = grown;
            s->capacity = s->capacity * 2 + 8;
        }
        memmove(&s->chunks[at + 1], &s->chunks[at], (s->count - at) * sizeof(*s->chunks));
        s->chunks[at] = xnew(struct store_chunk);
        s->chunks[at]->index = index;
        s->count++;
    }
    p = &s->chunks[at]->pages[page % PAGES_PER_CHUNK];
    if (!p->allocated) {
        p->allocated = true;
        s->pages++;
    }
    return p;
}

static void drop_page(struct sim_store *s, struct store_page *p)
{
    free(p->data);
    p->data = NULL;
    s->pages -= p->allocated;
    p->allocated = false;
}

void store_release(struct sim_store *s)
{
    for (size_t i = 0; i < s->count; i++) {
        for (unsigned k = 0; k < PAGES_PER_CHUNK; k++)
            free(s->chunks[i]->pages[k].data);
        free(s->chunks[i]);
    }
    free(s->chunks);
    *s = (struct sim_store){0};
}

void store_copy(struct sim_store *to, const struct sim_store *from)
{
    store_release(to);
    for (size_t i = 0; i < from->count; i++) {
        for (unsigned k = 0; k < PAGES_PER_CHUNK; k++) {
            const struct store_page *p = &from->chunks[i]->pages[k];
            struct store_page *copy;

            if (!p->allocated)
                continue;
            copy = make_page(to, from->chunks[i]->index * PAGES_PER_CHUNK + k);
            if (p->data) {
                copy->data = xalloc(1, STORE_PAGE);
                memcpy(copy->data, p->data, STORE_PAGE);
            }
        }
    }
    to->size = from->size;
}

void store_read(const struct sim_store *s, uint64_t offset, void *buf, size_t len)
{
    uint8_t *to = buf;

    while (len) {
        size_t in_page = offset % STORE_PAGE;
        size_t here = MIN(len, STORE_PAGE - in_page);
        const struct store_page *p = find_page(s, offset / STORE_PAGE);

        if (p && p->data)
            memcpy(to, p->data + in_page, here);
        else
            memset(to, 0, here);
        to += here;
        offset += here;
        len -= here;
    }
}

void store_write(struct sim_store *s, uint64_t offset, const void *buf, size_t len)
{
    const uint8_t *from = buf;

    if (len)
        s->size = MAX(s->size, offset + len);
    while (len) {
        size_t in_page = offset % STORE_PAGE;
        size_t here = MIN(len, STORE_PAGE - in_page);
        struct store_page *p = make_page(s, offset / STORE_PAGE);

        if (!p->data)
            p->data = xalloc(1, STORE_PAGE);
        memcpy(p->data + in_page, from, here);
        from += here;
        offset += here;
        len -= here;
    }
}

/* Calls nothing for chunks that are not there: huge holes cost nothing. */
void store_zero(struct sim_store *s, uint64_t offset, uint64_t len, bool keep)
{
    uint64_t end = offset + len;

    for (size_t at = chunk_place(s, offset / CHUNK_BYTES); at < s->count; at++) {
        uint64_t base = s->chunks[at]->index * CHUNK_BYTES;

        if (base >= end)
            break;
        for (unsigned k = 0; k < PAGES_PER_CHUNK; k++) {
            struct store_page *p = &s->chunks[at]->pages[k];
            uint64_t first = base + k * STORE_PAGE;
            uint64_t from = MAX(first, offset);
            uint64_t to = MIN(first + STORE_PAGE, end);

            if (from >= to || !p->allocated)
                continue;
            if (to - from < STORE_PAGE) {
                if (p->data)
                    memset(p->data + (from - first), 0, to - from);
            } else if (keep) {
                free(p->data);
                p->data = NULL;
            } else {
                drop_page(s, p);
            }
        }
    }
}

void store_allocate(struct sim_store *s, uint64_t offset, uint64_t len)
{
    uint64_t end = offset + len;

    for (uint64_t page = offset / STORE_PAGE; page * STORE_PAGE < end; page++)
        (void)make_page(s, page);
}

void store_resize(struct sim_store *s, uint64_t size)
{
    if (size < s->size)
        store_zero(s, size, UINT64_MAX - size, false);
    s->size = size;
}

/* Data or not at this offset, and where that may end: at a page, or at the next chunk. */
static bool data_at(const struct sim_store *s, uint64_t offset, uint64_t *ret_next)
{
    size_t at = chunk_place(s, offset / CHUNK_BYTES);

    if (offset >= s->size) {
        *ret_next = UINT64_MAX;
        return false;
    }
    if (at == s->count || s->chunks[at]->index != offset / CHUNK_BYTES) {
        *ret_next = at == s->count ? s->size : MIN(s->size, s->chunks[at]->index * CHUNK_BYTES);
        return false;
    }
    *ret_next = MIN(s->size, (offset / STORE_PAGE + 1) * STORE_PAGE);
    return s->chunks[at]->pages[offset / STORE_PAGE % PAGES_PER_CHUNK].data != NULL;
}

unsigned store_extents(const struct sim_store *s, uint64_t offset, uint64_t len,
                       struct file_extent *ret, unsigned max)
{
    uint64_t end = offset + len;
    unsigned n = 0;

    while (offset < end) {
        uint64_t next;
        bool data = data_at(s, offset, &next);

        next = MIN(next, end);
        if (n && ret[n - 1].data == data) {
            ret[n - 1].len += next - offset;
        } else {
            if (n == max)
                break;
            ret[n++] = (struct file_extent){.offset = offset, .len = next - offset, .data = data};
        }
        offset = next;
    }
    return n;
}
