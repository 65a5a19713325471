/* SPDX-License-Identifier: Apache-2.0 */
/* Pages of a file, and tables of blocks. The images do not change, so that a page is right for ever. */
#include "formats/import.h"
#include "base/alloc.h"
#include "base/atomic.h"
#include "base/checked.h"
#include "base/log.h"
#include "graph/graph.h"
#include "loop/iobuf.h"

#include <errno.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

struct import_page {
    unsigned refs; /* Protected by import.lock. */
    struct edge *file;
    uint64_t offset;
    uint8_t bytes[IMPORT_PAGE_BYTES];
};

void import_init(struct import *im, struct node *node)
{
    im->node = node;
    node_set_preferred_alignment(node, node_preferred_alignment(edge_node(node_file(node))));
}

void import_release(struct import *im)
{
    for (size_t i = 0; i < IMPORT_PAGES; i++)
        free(im->pages[i]);
}

int import_damaged(struct import *im, const char *fmt, ...)
{
    va_list args;
    char *what;

    if (atomic_swap(&im->damage_told, true))
        return -EIO;
    va_start(args, fmt);
    what = xvasprintf(fmt, args);
    va_end(args);
    log_warning("node '%s': the image is damaged: %s; reads there fail", node_name(im->node), what);
    free(what);
    return -EIO;
}

static int co_fn read_into(const struct request *by, struct edge *file, uint64_t offset,
                           struct iobuf *b, size_t len)
{
    struct request req = request_for(by, REQUEST_READ, offset, len);
    struct iovec iov = {b->data, len};

    req.iov = &iov;
    req.iov_count = 1;
    req.hold = b;
    return edge_co_request(file, &req);
}

int import_co_read(struct import *im, const struct request *by, struct edge *file, uint64_t offset,
                   void *ret, size_t len)
{
    struct iobuf *b;
    int r;

    if (!range_within(offset, len, node_size(edge_node(file))))
        return -EIO;
    b = iobuf_new(len);
    r = b ? read_into(by, file, offset, b, len) : -ENOMEM;
    if (r == 0) {
        if (im->patch)
            im->patch(im->patch_arg, offset, b->data, len);
        memcpy(ret, b->data, len);
    }
    iobuf_unref(b);
    return r;
}

int import_co_read_named(struct import *im, const struct request *by, const char *what,
                         struct edge *file, uint64_t offset, void *ret, size_t len,
                         struct error **err)
{
    uint64_t size = node_size(edge_node(file));
    int r;

    if (!range_within(offset, len, size))
        return error_set(err, EINVAL,
                         "node '%s': the %s would lie at %llu, %zu bytes long, and the file ends "
                         "at %llu",
                         node_name(im->node), what, (unsigned long long)offset, len,
                         (unsigned long long)size);
    r = import_co_read(im, by, file, offset, ret, len);
    return r < 0 ? error_set(err, -r, "node '%s': cannot read the %s: %s", node_name(im->node),
                             what, strerror(-r))
                 : 0;
}

/* ---- pages ---- */

/* Files of one image have much in the same places, and other names as children. */
static size_t slot_of(const struct edge *file, uint64_t offset)
{
    uint64_t h = offset / IMPORT_PAGE_BYTES;

    for (const char *name = edge_name(file); *name; name++)
        h += (uint64_t)*name * 37;
    return (size_t)(h % IMPORT_PAGES);
}

static void put_locked(struct import_page *page)
{
    if (page && !--page->refs)
        free(page);
}

static struct import_page *find(struct import *im, const struct edge *file, uint64_t offset)
{
    struct import_page *page;

    tiny_lock_acquire(&im->lock);
    page = im->pages[slot_of(file, offset)];
    if (page && page->file == file && page->offset == offset)
        page->refs++;
    else
        page = NULL;
    tiny_lock_release(&im->lock);
    return page;
}

static void keep(struct import *im, struct import_page *page)
{
    struct import_page **slot = &im->pages[slot_of(page->file, page->offset)];

    tiny_lock_acquire(&im->lock);
    put_locked(*slot); /* IMPORT-1 */
    *slot = page;
    page->refs++;
    tiny_lock_release(&im->lock);
}

static int co_fn load(struct import *im, const struct request *by, struct import_page *page)
{
    uint64_t size = node_size(edge_node(page->file));
    size_t inside =
        page->offset < size ? (size_t)MIN((uint64_t)IMPORT_PAGE_BYTES, size - page->offset) : 0;
    struct iobuf *b = iobuf_new(IMPORT_PAGE_BYTES);
    int r = b ? 0 : -ENOMEM;

    if (r == 0 && inside)
        r = read_into(by, page->file, page->offset, b, inside);
    if (r == 0)
        memcpy(page->bytes, b->data, inside);
    if (r == 0 && im->patch)
        im->patch(im->patch_arg, page->offset, page->bytes, IMPORT_PAGE_BYTES);
    iobuf_unref(b);
    return r;
}

int import_page_get(struct import *im, const struct request *by, struct edge *file, uint64_t offset,
                    struct import_page **ret)
{
    uint64_t start = align_down(offset, IMPORT_PAGE_BYTES);
    struct import_page *page = find(im, file, start);
    int r;

    if (page) {
        *ret = page;
        return 0;
    }
    page = try_new(struct import_page);
    if (!page)
        return -ENOMEM;
    *page = (struct import_page){.refs = 1, .file = file, .offset = start};
    r = load(im, by, page);
    if (r < 0) {
        free(page);
        return r;
    }
    keep(im, page);
    *ret = page;
    return 0;
}

void import_page_put(struct import *im, struct import_page *page)
{
    tiny_lock_acquire(&im->lock);
    put_locked(page);
    tiny_lock_release(&im->lock);
}

const uint8_t *import_page_at(const struct import_page *page, uint64_t offset)
{
    if (offset < page->offset || offset - page->offset >= IMPORT_PAGE_BYTES)
        return NULL;
    return page->bytes + (offset - page->offset);
}

/* ---- blocks ---- */

static uint64_t entry_offset(const struct import_blocks *b, uint64_t block)
{
    return b->table + (block + (b->group ? block / b->group : 0)) * b->entry_bytes;
}

/* Does the next block go on where the mapped run, of `len` bytes so far, ends? */
static bool goes_on(const struct mapping *run, uint64_t len, const struct mapping *next)
{
    switch (run->kind == next->kind ? run->kind : MAPPING_ENCODED) {
    case MAPPING_DATA:
        return next->host_offset == run->host_offset + len;
    case MAPPING_ZERO:
    case MAPPING_BELOW:
        return true;
    case MAPPING_ENCODED:
        break; /* each block is decoded for itself */
    }
    return false;
}

int import_map_blocks(struct import *im, const struct import_blocks *b, const struct request *by,
                      uint64_t offset, uint64_t len, struct mapping *ret)
{
    uint64_t size = (uint64_t)1 << b->block_bits;
    uint64_t block = offset >> b->block_bits;
    uint64_t done = size - (offset & (size - 1));
    struct import_page *page;
    const uint8_t *at;
    int r = import_page_get(im, by, b->file, entry_offset(b, block), &page);

    *ret = (struct mapping){.kind = MAPPING_ZERO};
    if (r < 0)
        return r;
    at = import_page_at(page, entry_offset(b, block));
    r = at ? b->entry(im, b, block, at, ret) : -EIO;
    ret->host_offset += offset & (size - 1);
    while (r == 0 && done < len) {
        struct mapping next;

        block++;
        at = import_page_at(page, entry_offset(b, block));
        if (!at || b->entry(im, b, block, at, &next) < 0 || !goes_on(ret, done, &next))
            break; /* who wants that block is told */
        done += size;
    }
    import_page_put(im, page);
    ret->host = ret->kind == MAPPING_ZERO ? NULL : b->file;
    ret->holes = b->holes;
    ret->len = MIN(done, len);
    return r;
}

const char *import_filename(const struct node *node)
{
    return node_filename(edge_node(node_file(node)));
}

uint64_t import_allocated_bytes(const struct node *node)
{
    uint64_t bytes = 0;

    (void)node_allocated_bytes(edge_node(node_file(node)), &bytes);
    return bytes;
}
