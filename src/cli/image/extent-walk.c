/* SPDX-License-Identifier: Apache-2.0 */
/* Extents in order. */
#include "cli/image/extent-walk.h"
#include "base/macros.h"

static const struct extent *known(struct extent_walk *w, uint64_t offset)
{
    if (!w->list.count || offset < w->v[w->next].offset)
        return NULL;
    while (w->next < w->list.count && offset >= w->v[w->next].offset + w->v[w->next].len)
        w->next++;
    if (w->next < w->list.count)
        return &w->v[w->next];
    w->next = 0;
    w->list.count = 0;
    return NULL;
}

int extent_walk_at(struct extent_walk *w, uint64_t offset, uint64_t len, struct extent *ret)
{
    uint64_t size = backend_size(w->backend);
    const struct extent *e = known(w, offset);
    struct request req = {
        .kind = REQUEST_EXTENTS,
        .offset = offset,
        .len = size - offset,
        .extents = &w->list,
    };

    if (offset >= size) {
        *ret = (struct extent){.offset = offset, .len = len, .flags = EXTENT_ZERO};
        return 0;
    }
    if (!e) {
        int r;

        w->list = (struct extents){.v = w->v, .max = ARRAY_SIZE(w->v)};
        w->next = 0;
        r = backend_co_request(w->backend, &req);
        if (r < 0) {
            w->list.count = 0;
            return r;
        }
        e = &w->v[0];
    }
    *ret = *e;
    ret->host_offset += offset - e->offset;
    ret->len = MIN(e->offset + e->len - offset, len);
    ret->offset = offset;
    return 0;
}
