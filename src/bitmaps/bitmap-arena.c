/* SPDX-License-Identifier: Apache-2.0 */
/* The nodes of a bitmap's tree: made and given back without locks. */
#include "bitmaps/bitmap-arena.h"
#include "base/alloc.h"
#include "base/macros.h"

#include <stdbool.h>
#include <stdlib.h>

_Static_assert(BITMAP_ARENA_FIRST == 1u << BITMAP_ARENA_FIRST_BITS, "the first segment");

/* How many there are, and also the first index. */
static size_t segment_nodes(unsigned number)
{
    return (size_t)BITMAP_ARENA_FIRST << number;
}

void bitmap_arena_init(struct bitmap_arena *a)
{
    *a = (struct bitmap_arena){.next = BITMAP_ARENA_FIRST};
}

void bitmap_arena_reset(struct bitmap_arena *a)
{
    for (unsigned i = 0; i < BITMAP_ARENA_SEGMENTS; i++)
        if (a->segments[i])
            free((void *)(a->segments[i] + segment_nodes(i) * BITMAP_NODE_BYTES));
    bitmap_arena_init(a);
}

static bool have_segment(struct bitmap_arena *a, uint32_t index)
{
    unsigned number = bitmap_arena_segment(index);
    uintptr_t expected = 0;
    struct bitmap_node *fresh;

    if (atomic_get(&a->segments[number]))
        return true;
    fresh = try_new_n(struct bitmap_node, segment_nodes(number));
    if (!fresh)
        return false;
    if (!atomic_cas(&a->segments[number], &expected,
                    (uintptr_t)fresh - segment_nodes(number) * BITMAP_NODE_BYTES))
        free(fresh); /* somebody else was faster */
    return true;
}

/* The index of a node that was never used; 0: no memory. */
static uint32_t take_new(struct bitmap_arena *a)
{
    uint32_t next = atomic_get(&a->next);

    do {
        if (next == UINT32_MAX || !have_segment(a, next))
            return 0;
    } while (!atomic_cas(&a->next, &next, next + 1));
    return next;
}

/* A head of the list of free nodes that no earlier one was equal to. */
static uint64_t free_head(uint64_t old, uint32_t index)
{
    return ((old >> 32) + 1) << 32 | index;
}

/* The index of a node that was given back; 0: there is none. */
static uint32_t take_free(struct bitmap_arena *a)
{
    uint64_t head = atomic_get(&a->free);
    uint32_t next;

    do {
        if (!(uint32_t)head)
            return 0;
        /* Relaxed: if the node was taken meanwhile, the head has changed and the value is not used. */
        next = atomic_get_relaxed(&bitmap_arena_node(a, (uint32_t)head)->entries[0]);
    } while (!atomic_cas(&a->free, &head, free_head(head, next)));
    return (uint32_t)head;
}

uint32_t bitmap_arena_alloc(struct bitmap_arena *a, uint64_t fill)
{
    uint32_t index = take_free(a);
    struct bitmap_node *node;

    if (!index)
        index = take_new(a);
    if (!index)
        return 0;
    node = bitmap_arena_node(a, index);
    /* Relaxed: nobody has the index yet. Atomic: somebody who has lost in take_free() may still look. */
    for (unsigned i = 0; i < BITMAP_NODE_WORDS; i++)
        atomic_set_relaxed(&node->words[i], fill);
    (void)atomic_add(&a->used, 1);
    return index;
}

void bitmap_arena_free(struct bitmap_arena *a, uint32_t index)
{
    struct bitmap_node *node = bitmap_arena_node(a, index);
    uint64_t head = atomic_get(&a->free);

    (void)atomic_sub(&a->used, 1);
    do {
        /* Relaxed: published by the CAS. */
        atomic_set_relaxed(&node->entries[0], (uint32_t)head);
    } while (!atomic_cas(&a->free, &head, free_head(head, index)));
}

uint64_t bitmap_arena_memory(const struct bitmap_arena *a)
{
    uint64_t bytes = 0;

    for (unsigned i = 0; i < BITMAP_ARENA_SEGMENTS; i++) {
        if (atomic_get(&a->segments[i]))
            bytes += segment_nodes(i) * sizeof(struct bitmap_node);
    }
    return bytes;
}

uint32_t bitmap_arena_free_count(const struct bitmap_arena *a)
{
    uint32_t count = 0;

    for (uint32_t i = (uint32_t)a->free; i; i = bitmap_arena_node(a, i)->entries[0])
        count++;
    return count;
}
