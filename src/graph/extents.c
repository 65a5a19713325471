/* SPDX-License-Identifier: Apache-2.0 */
/* Lists of extents. */
#include "graph/extents.h"

static bool continues(const struct extent *last, const struct extent *next)
{
    if (last->offset + last->len != next->offset || last->flags != next->flags ||
        last->below != next->below)
        return false;
    return !(last->flags & EXTENT_OFFSET_VALID) ||
           (last->host == next->host && last->host_offset + last->len == next->host_offset);
}

bool extents_add(struct extents *e, const struct extent *next)
{
    if (e->count && continues(&e->v[e->count - 1], next)) {
        e->v[e->count - 1].len += next->len;
        return true;
    }
    if (e->count == e->max)
        return false;
    e->v[e->count++] = *next;
    return true;
}

uint64_t extents_end(const struct extents *e, uint64_t from)
{
    return e->count ? e->v[e->count - 1].offset + e->v[e->count - 1].len : from;
}
