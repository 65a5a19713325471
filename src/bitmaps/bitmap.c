/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The bitmap's tree. An entry of level 0 leads to a leaf, one of level n to an inner node whose entries are of level n - 1; the root is an
 * entry, too.
 *
 * Why nothing is lost while several are at it: an entry goes from empty to full or to a node, and from full to empty or to a
 * node, each time by CAS; from a node it goes nowhere unless drained. So who has found a node there sets its bits where
 * everybody looks, and who has found "full" found its bits set: what happens to them later comes after.
 *
 * Beyond the size the tree is clean, but for what is below an entry that is full because there was no memory.
 */
#include "bitmaps/bitmap.h"
#include "base/alloc.h"
#include "base/checked.h"
#include "base/endian.h"
#include "base/macros.h"
#include "bitmaps/bitmap-arena.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* Entries that are not the index of a node. */
#define EMPTY 0u
#define FULL  1u

#define LEAF_BITS  12 /* granules below an entry of level 0 */
#define INNER_BITS 7
#define LEVELS_MAX 6

/* An inner node whose entries are all FULL; all EMPTY is zero. */
#define FILL_FULL ((uint64_t)FULL << 32 | FULL)

struct bitmap {
    /* Change only while drained. */
    uint64_t size;
    uint64_t granules;
    unsigned granularity_bits;
    unsigned levels; /* that of the root */

    /* Atomic. */
    uint32_t root;
    uint32_t inexact;
    struct bitmap_node *top; /* where the root leads to, if it is known to be a node */
    struct bitmap_arena arena;
};

static unsigned level_bits(unsigned level)
{
    return LEAF_BITS + INNER_BITS * level;
}

static uint64_t span(unsigned level)
{
    return (uint64_t)1 << level_bits(level);
}

static uint64_t granules_of(uint64_t size, unsigned granularity_bits)
{
    uint64_t partial = size & (((uint64_t)1 << granularity_bits) - 1);

    return (size >> granularity_bits) + (partial ? 1 : 0);
}

static unsigned levels_for(uint64_t granules)
{
    unsigned levels = 0;

    while (span(levels) < granules)
        levels++;
    assert(levels <= LEVELS_MAX);
    return levels;
}

static bool is_node(uint32_t entry)
{
    return entry > FULL;
}

static struct bitmap_node *node_at(const struct bitmap *b, uint32_t entry)
{
    return bitmap_arena_node(&b->arena, entry);
}

/* A node that stands for what an empty or full entry of this level said. 0: no memory. */
static uint32_t node_like(struct bitmap *b, uint32_t entry, unsigned level)
{
    uint64_t full = level ? FILL_FULL : UINT64_MAX;

    return bitmap_arena_alloc(&b->arena, entry == FULL ? full : 0);
}

/* The last granule that is in the size, plus one, of those below an entry. */
static uint64_t end_of(const struct bitmap *b, uint64_t base, unsigned level)
{
    return MIN(base + span(level), b->granules);
}

struct bitmap *bitmap_new(uint64_t size, uint64_t granularity)
{
    struct bitmap *b;

    assert(size <= (uint64_t)1 << 63);
    assert(is_power_of_2(granularity) && granularity >= BITMAP_GRANULARITY_MIN &&
           granularity <= BITMAP_GRANULARITY_MAX);
    b = try_new(struct bitmap);
    if (!b)
        return NULL;
    b->size = size;
    b->granularity_bits = (unsigned)__builtin_ctzll(granularity);
    b->granules = granules_of(size, b->granularity_bits);
    b->levels = levels_for(b->granules);
    bitmap_arena_init(&b->arena);
    return b;
}

struct bitmap *bitmap_free(struct bitmap *b)
{
    if (b)
        bitmap_arena_reset(&b->arena);
    free(b);
    return NULL;
}

uint64_t bitmap_size(const struct bitmap *b)
{
    return b->size;
}

uint64_t bitmap_granularity(const struct bitmap *b)
{
    return (uint64_t)1 << b->granularity_bits;
}

/* ---- setting ---- */

/* Bits first .. last of a word. */
static uint64_t word_mask(uint64_t first, uint64_t last)
{
    return UINT64_MAX << first & UINT64_MAX >> (63 - last);
}

/* NOLINTNEXTLINE(readability-non-const-parameter): an atomic store is a write that the check does not see */
static inline void set_in_word(uint64_t *word, uint64_t mask)
{
    if ((atomic_get(word) & mask) != mask) /* BITMAP-3 */
        (void)atomic_or(word, mask);
}

/* Granules first .. last of a leaf. */
static void set_in_leaf(struct bitmap_node *leaf, uint64_t first, uint64_t last)
{
    uint64_t word = first / 64;

    if (likely(word == last / 64)) {
        set_in_word(&leaf->words[word], word_mask(first % 64, last % 64));
        return;
    }
    set_in_word(&leaf->words[word], word_mask(first % 64, 63));
    while (++word < last / 64)
        set_in_word(&leaf->words[word], UINT64_MAX);
    set_in_word(&leaf->words[word], word_mask(0, last % 64));
}

/*
 * Turns an entry that is not a node, `seen`, into one that says the same. Returns what stands there afterwards: that node, what
 * somebody else has put there, or `seen` again if there is no memory.
 */
/* NOLINTNEXTLINE(readability-non-const-parameter): an atomic store is a write that the check does not see */
static uint32_t make_node(struct bitmap *b, uint32_t *entry, unsigned level, uint32_t seen)
{
    uint32_t fresh = node_like(b, seen, level);

    if (!fresh)
        return seen;
    if (atomic_cas(entry, &seen, fresh))
        return fresh;
    bitmap_arena_free(&b->arena, fresh);
    return seen;
}

/* The entry is a node or full when this returns. `whole`: full is what is wanted. */
static uint32_t open_entry(struct bitmap *b, uint32_t *entry, unsigned level, bool whole)
{
    uint32_t seen = atomic_get(entry);

    while (seen == EMPTY) {
        if (!whole)
            seen = make_node(b, entry, level, EMPTY);
        if (seen != EMPTY)
            break;
        if (atomic_cas(entry, &seen, FULL)) { /* BITMAP-2 */
            if (!whole)
                (void)atomic_add(&b->inexact, 1);
            return FULL;
        }
    }
    return seen;
}

/* Granules first .. last below an entry, counted from its first one. */
static void set_below(struct bitmap *b, uint32_t *entry, unsigned level, uint64_t first,
                      uint64_t last)
{
    uint32_t seen = open_entry(b, entry, level, first == 0 && last == span(level) - 1);
    struct bitmap_node *node;
    unsigned bits;

    if (seen == FULL)
        return;
    node = node_at(b, seen);
    if (!level) {
        set_in_leaf(node, first, last);
        return;
    }
    bits = level_bits(level - 1);
    for (uint64_t i = first >> bits; i <= last >> bits; i++) {
        uint64_t base = i << bits;

        set_below(b, &node->entries[i], level - 1, first > base ? first - base : 0,
                  MIN(last - base, span(level - 1) - 1));
    }
}

static void set_slowly(struct bitmap *b, uint64_t first, uint64_t last)
{
    uint32_t root;

    set_below(b, &b->root, b->levels, first, last);
    root = atomic_get(&b->root);
    if (is_node(root))
        atomic_set(&b->top, node_at(b, root)); /* it stays there until drained */
}

/* The short way is for what is in one word of a leaf that is there. */
void bitmap_set(struct bitmap *b, uint64_t offset, uint64_t len)
{
    struct bitmap_node *node = atomic_get(&b->top);
    unsigned bits = level_bits(b->levels);
    uint64_t first;
    uint64_t last;

    if (unlikely(!len || offset >= b->size))
        return;
    first = offset >> b->granularity_bits;
    last = (offset + MIN(len, b->size - offset) - 1) >> b->granularity_bits;
    if (unlikely(!node || (first ^ last) / 64)) {
        set_slowly(b, first, last);
        return;
    }
    while (bits > LEAF_BITS) {
        uint32_t entry;

        bits -= INNER_BITS;
        entry = atomic_get(&node->entries[(first >> bits) % BITMAP_NODE_ENTRIES]);
        if (unlikely(!is_node(entry))) {
            if (entry == EMPTY)
                set_slowly(b, first, last);
            return;
        }
        node = node_at(b, entry);
    }
    set_in_word(&node->words[first / 64 % BITMAP_NODE_WORDS], word_mask(first % 64, last % 64));
}

/* ---- runs: finding and claiming ---- */

struct run {
    const struct bitmap *b;
    struct bitmap *taker; /* b; NULL: only looks */
    uint64_t pos;         /* the next granule */
    uint64_t end;         /* where it ends at the latest */
    uint64_t max;         /* how long it may be */
    uint64_t first;
    bool found;
    bool no_memory;
};

/* Granules from `start` to `stop` belong to it. */
static void run_add(struct run *run, uint64_t start, uint64_t stop)
{
    if (!run->found) {
        run->found = true;
        run->first = start;
        run->end = start + MIN(run->max, run->end - start);
    }
    run->pos = stop;
}

/* Where it must end if it goes on, or begins, at `start`. */
static uint64_t run_limit(const struct run *run, uint64_t start)
{
    return run->found ? run->end : start + MIN(run->max, run->end - start);
}

/* As far as this word goes. True: the run has ended, or the walk. */
/* NOLINTNEXTLINE(readability-non-const-parameter): an atomic store is a write that the check does not see */
static bool run_in_word(struct run *run, uint64_t *word)
{
    uint64_t seen = atomic_get(word);

    for (;;) {
        unsigned shift = run->pos % 64;
        uint64_t start = run->pos;
        uint64_t ones = seen >> shift;
        unsigned skip;
        uint64_t count;

        if (run->found && !(ones & 1))
            return true;
        if (!ones) {
            run->pos = MIN((start | 63) + 1, run->end);
            return run->pos == run->end;
        }
        skip = (unsigned)__builtin_ctzll(ones);
        start += skip;
        shift += skip;
        if (start >= run->end) {
            run->pos = run->end;
            return true;
        }
        ones >>= skip;
        count = ~ones ? (unsigned)__builtin_ctzll(~ones) : 64;
        count = MIN(count, run_limit(run, start) - start);
        /* C1: by CAS, so that all of it is taken, and by one. */
        if (run->taker && !atomic_cas(word, &seen, seen & ~word_mask(shift, shift + count - 1)))
            continue;
        run_add(run, start, start + count);
        return shift + count < 64 || run->pos == run->end;
    }
}

/* What is full from run->pos on. True: done with it; false: the entry has changed. */
static bool run_in_full(struct run *run, uint32_t *entry, unsigned level, uint64_t base)
{
    uint64_t stop = MIN(end_of(run->b, base, level), run_limit(run, run->pos));
    uint32_t seen = FULL;

    if (run->taker && (run->pos > base || stop < end_of(run->b, base, level))) {
        if (make_node(run->taker, entry, level, FULL) != FULL)
            return false;
        run->no_memory = true;
        return true;
    }
    if (run->taker && !atomic_cas(entry, &seen, EMPTY))
        return false;
    run_add(run, run->pos, stop);
    return true;
}

/* Walks what is below an entry, whose first granule is `base`, from run->pos on. True: the run has ended, or the walk. */
static bool run_below(struct run *run, uint32_t *entry, unsigned level, uint64_t base)
{
    uint32_t seen = atomic_get(entry);
    struct bitmap_node *node;
    bool ended = false;

    while (seen == FULL) {
        if (run_in_full(run, entry, level, base))
            return run->no_memory || run->pos == run->end;
        seen = atomic_get(entry);
    }
    if (seen == EMPTY && run->found)
        return true;
    if (seen == EMPTY) {
        run->pos = MIN(base + span(level), run->end);
        return run->pos == run->end;
    }
    node = node_at(run->b, seen);
    if (!level) {
        for (uint64_t i = (run->pos - base) / 64; i < BITMAP_NODE_WORDS && !ended; i++)
            ended = run_in_word(run, &node->words[i]);
        return ended;
    }
    for (uint64_t i = (run->pos - base) >> level_bits(level - 1); i < BITMAP_NODE_ENTRIES && !ended;
         i++)
        ended = run_below(run, &node->entries[i], level - 1, base + (i << level_bits(level - 1)));
    return ended;
}

static void run_find(struct run *run)
{
    struct bitmap *b = (struct bitmap *)(uintptr_t)run->b; /* looking changes nothing */

    if (run->pos < run->end)
        (void)run_below(run, &b->root, b->levels, 0);
}

int bitmap_claim(struct bitmap *b, uint64_t from, uint64_t max_bytes, uint64_t *ret_offset,
                 uint64_t *ret_len)
{
    struct run run = {
        .b = b,
        .taker = b,
        .pos = from >> b->granularity_bits,
        .end = b->granules,
        .max = MAX(max_bytes >> b->granularity_bits, (uint64_t)1),
    };

    run_find(&run);
    if (!run.found)
        return run.no_memory ? -ENOMEM : 0;
    *ret_offset = run.first << b->granularity_bits;
    *ret_len = MIN(run.pos << b->granularity_bits, b->size) - *ret_offset;
    return 1;
}

bool bitmap_next_dirty(const struct bitmap *b, uint64_t from, uint64_t end, uint64_t *ret_offset,
                       uint64_t *ret_len)
{
    struct run run = {
        .b = b,
        .pos = from >> b->granularity_bits,
        .max = UINT64_MAX,
    };

    end = MIN(end, b->size);
    if (from >= end)
        return false;
    run.end = granules_of(end, b->granularity_bits);
    run_find(&run);
    if (!run.found)
        return false;
    *ret_offset = MAX(run.first << b->granularity_bits, from);
    *ret_len = MIN(run.pos << b->granularity_bits, end) - *ret_offset;
    return true;
}

/* ---- the whole ---- */

static uint64_t count_below(const struct bitmap *b, const uint32_t *entry, unsigned level,
                            uint64_t base)
{
    uint32_t seen = atomic_get(entry);
    const struct bitmap_node *node;
    uint64_t count = 0;

    if (seen == EMPTY || base >= b->granules)
        return 0;
    if (seen == FULL)
        return end_of(b, base, level) - base;
    node = node_at(b, seen);
    for (unsigned i = 0; level && i < BITMAP_NODE_ENTRIES; i++)
        count += count_below(b, &node->entries[i], level - 1,
                             base + ((uint64_t)i << level_bits(level - 1)));
    for (uint64_t i = 0; !level && i < BITMAP_NODE_WORDS && base + i * 64 < b->granules; i++) {
        uint64_t left = MIN(b->granules - base - i * 64, (uint64_t)64);

        count +=
            (unsigned)__builtin_popcountll(atomic_get(&node->words[i]) & word_mask(0, left - 1));
    }
    return count;
}

uint64_t bitmap_count(const struct bitmap *b)
{
    return count_below(b, &b->root, b->levels, 0) << b->granularity_bits;
}

void bitmap_read(const struct bitmap *b, uint64_t first, void *buf, size_t bytes)
{
    uint8_t *out = buf;
    struct run run = {.b = b, .pos = first, .max = UINT64_MAX};
    uint64_t end = MIN(first + bytes * 8, b->granules);

    memset(out, 0, bytes);
    while (run.pos < end) {
        run.found = false;
        run.end = end;
        run_find(&run);
        if (!run.found)
            break;
        for (uint64_t i = run.first - first; i < run.pos - first; i++)
            out[i / 8] |= (uint8_t)(1u << i % 8);
    }
}

/* The granules of one word of a leaf. */
static void or_word(struct bitmap *b, uint64_t first, uint64_t mask)
{
    uint32_t *entry = &b->root;
    unsigned level = b->levels;

    for (;;) {
        uint32_t seen = open_entry(b, entry, level, false);
        struct bitmap_node *node;

        if (seen == FULL)
            return;
        node = node_at(b, seen);
        if (!level) {
            set_in_word(&node->words[first / 64 % BITMAP_NODE_WORDS], mask);
            return;
        }
        level--;
        entry = &node->entries[(first >> level_bits(level)) % BITMAP_NODE_ENTRIES];
    }
}

void bitmap_write(struct bitmap *b, uint64_t first, const void *buf, size_t bytes)
{
    const uint8_t *in = buf;

    assert(first % 64 == 0);
    for (size_t at = 0; at < bytes && first < b->granules; at += 8, first += 64) {
        uint8_t word[8] = {0};
        uint64_t bits;

        memcpy(word, in + at, MIN(bytes - at, sizeof(word)));
        bits = load_le64(word) & word_mask(0, MIN(b->granules - first, (uint64_t)64) - 1);
        if (bits)
            or_word(b, first, bits);
    }
}

void bitmap_clear(struct bitmap *b)
{
    bitmap_arena_reset(&b->arena);
    b->root = EMPTY;
    b->top = NULL;
    b->inexact = 0;
}

/* Drained. The nodes below an entry, and its own. */
static void free_below(struct bitmap *b, uint32_t entry, unsigned level)
{
    if (!is_node(entry))
        return;
    for (unsigned i = 0; level && i < BITMAP_NODE_ENTRIES; i++)
        free_below(b, node_at(b, entry)->entries[i], level - 1);
    bitmap_arena_free(&b->arena, entry);
}

/* Drained. Cleans what is below an entry, from granule `from` on, which is below it but not its first one. */
static void cut_below(struct bitmap *b, uint32_t *entry, unsigned level, uint64_t from)
{
    unsigned bits = level ? level_bits(level - 1) : 6;
    struct bitmap_node *node;
    uint64_t i = from >> bits;
    uint64_t rest = from & (((uint64_t)1 << bits) - 1);

    if (*entry == FULL)
        *entry = make_node(b, entry, level, FULL);
    if (*entry == FULL)
        (void)atomic_add(&b->inexact, 1);
    if (!is_node(*entry))
        return;
    node = node_at(b, *entry);
    if (!level) {
        if (rest)
            node->words[i++] &= word_mask(0, rest - 1);
        memset(&node->words[i], 0, (BITMAP_NODE_WORDS - i) * sizeof(uint64_t));
        return;
    }
    if (rest)
        cut_below(b, &node->entries[i++], level - 1, rest);
    for (; i < BITMAP_NODE_ENTRIES; i++) {
        free_below(b, node->entries[i], level - 1);
        node->entries[i] = EMPTY;
    }
}

/* Drained. One more level, above the root. */
static void add_level(struct bitmap *b)
{
    uint32_t fresh = b->root == EMPTY ? EMPTY : bitmap_arena_alloc(&b->arena, 0);

    if (fresh != EMPTY) {
        node_at(b, fresh)->entries[0] = b->root;
    } else if (b->root != EMPTY) {
        free_below(b, b->root, b->levels);
        fresh = FULL; /* BITMAP-2 */
        b->inexact++;
    }
    b->root = fresh;
    b->levels++;
}

void bitmap_resize(struct bitmap *b, uint64_t size)
{
    uint64_t granules = granules_of(size, b->granularity_bits);
    uint64_t kept = MIN(granules, b->granules);

    assert(size <= (uint64_t)1 << 63);
    b->top = NULL;
    if (!kept)
        bitmap_clear(b);
    else if (kept < span(b->levels))
        cut_below(b, &b->root, b->levels, kept);
    b->size = size;
    b->granules = granules;
    while (b->levels < levels_for(granules))
        add_level(b);
}

/* ---- merging ---- */

/* Both of the same shape. The granules beyond the size that src may have, in what is full, are no worse in dst. */
static void merge_below(struct bitmap *dst, uint32_t *to, const struct bitmap *src, uint32_t from,
                        unsigned level)
{
    const struct bitmap_node *from_node;
    struct bitmap_node *to_node;

    if (from == EMPTY || *to == FULL)
        return;
    if (from == FULL) {
        free_below(dst, *to, level);
        *to = FULL;
        return;
    }
    if (open_entry(dst, to, level, false) == FULL)
        return;
    from_node = node_at(src, from);
    to_node = node_at(dst, *to);
    if (!level) {
        for (unsigned i = 0; i < BITMAP_NODE_WORDS; i++) /* plain: in vectors */
            to_node->words[i] |= from_node->words[i];
        return;
    }
    for (unsigned i = 0; i < BITMAP_NODE_ENTRIES; i++)
        merge_below(dst, &to_node->entries[i], src, from_node->entries[i], level - 1);
}

static void merge_runs(struct bitmap *dst, const struct bitmap *src)
{
    uint64_t offset = 0;
    uint64_t len = 0;

    while (bitmap_next_dirty(src, offset + len, src->size, &offset, &len))
        bitmap_set(dst, offset, len);
}

int bitmap_merge(struct bitmap *dst, const struct bitmap *src)
{
    uint32_t before = dst->inexact;
    int r;

    if (dst == src)
        return 0;
    dst->top = NULL;
    if (dst->granularity_bits == src->granularity_bits && dst->size == src->size &&
        dst->levels == src->levels)
        merge_below(dst, &dst->root, src, src->root, src->levels);
    else
        merge_runs(dst, src);
    r = dst->inexact == before ? 0 : -ENOMEM;
    dst->inexact += src->inexact; /* it may be full beyond the size, too */
    return r;
}

/* ---- statistics and checks ---- */

void bitmap_get_stats(const struct bitmap *b, struct bitmap_stats *ret)
{
    ret->nodes = atomic_get(&b->arena.used);
    ret->memory_bytes = sizeof(*b) + bitmap_arena_memory(&b->arena);
    ret->inexact = atomic_get(&b->inexact);
}

/* Returns the number of nodes. */
static uint64_t check_below(const struct bitmap *b, uint32_t entry, unsigned level, uint64_t base,
                            uint8_t *seen)
{
    const struct bitmap_node *node;
    uint64_t count = 1;

    if (!is_node(entry))
        return 0;
    assert(entry >= BITMAP_ARENA_FIRST && entry < b->arena.next && !seen[entry]); /* BITMAP-1 */
    seen[entry] = 1;
    node = node_at(b, entry);
    for (unsigned i = 0; level && i < BITMAP_NODE_ENTRIES; i++) {
        uint64_t child = base + ((uint64_t)i << level_bits(level - 1));

        count += check_below(b, node->entries[i], level - 1, child, seen);
        assert(child < b->granules || b->inexact || node->entries[i] == EMPTY);
    }
    for (uint64_t i = 0; !level && i < BITMAP_NODE_WORDS; i++)
        assert(base + i * 64 < b->granules || b->inexact || !node->words[i]);
    return count;
}

void bitmap_check(const struct bitmap *b)
{
    uint8_t *seen = xnew_n(uint8_t, b->arena.next);
    uint64_t count = check_below(b, b->root, b->levels, 0, seen);

    assert(count == b->arena.used);
    assert(count + bitmap_arena_free_count(&b->arena) == b->arena.next - BITMAP_ARENA_FIRST);
    free(seen);
}
