/* SPDX-License-Identifier: Apache-2.0 */
/* The store of saved blocks. */
#include "copy/saved.h"
#include "base/alloc.h"
#include "base/checked.h"
#include "base/macros.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>

void saved_init(struct saved *s)
{
    *s = (struct saved){.memory_bytes = 0};
    list_init(&s->in_memory);
    list_init(&s->in_scratch);
    for (unsigned i = 0; i < SAVED_BUCKETS; i++)
        list_init(&s->buckets[i]);
    for (unsigned i = 0; i < SAVED_LENGTHS; i++)
        list_init(&s->holes[i]);
}

static void free_all(struct list *runs)
{
    struct saved_run *run;

    while ((run = list_first(runs, struct saved_run, bucket_link))) {
        assert(!run->users);
        list_remove(&run->bucket_link);
        list_remove(&run->age_link);
        free(run->data);
        free(run);
    }
}

void saved_release(struct saved *s)
{
    for (unsigned i = 0; i < SAVED_BUCKETS; i++)
        free_all(&s->buckets[i]);
    for (unsigned i = 0; i < SAVED_LENGTHS; i++)
        free_all(&s->holes[i]);
}

static struct list *bucket_of(struct saved *s, uint64_t offset)
{
    return &s->buckets[(offset / SAVED_REGION) % SAVED_BUCKETS];
}

struct saved_run *saved_run_new(uint64_t offset, uint64_t len)
{
    struct saved_run *run = try_new(struct saved_run);

    assert(offset / SAVED_REGION == (offset + len - 1) / SAVED_REGION);
    if (!run)
        return NULL;
    list_init(&run->bucket_link);
    list_init(&run->age_link);
    run->offset = offset;
    run->len = len;
    return run;
}

bool saved_take_memory(struct saved *s, struct saved_run *run, uint64_t max)
{
    bool fits;

    tiny_lock_acquire(&s->lock);
    fits = s->memory_bytes + run->len <= max;
    if (fits)
        s->memory_bytes += run->len;
    tiny_lock_release(&s->lock);
    if (!fits)
        return false;
    run->data = try_alloc(1, run->len);
    if (!run->data) {
        tiny_lock_acquire(&s->lock);
        s->memory_bytes -= run->len;
        tiny_lock_release(&s->lock);
    }
    return run->data != NULL;
}

/* ---- scratch space ---- */

static void hole_add_locked(struct saved *s, struct saved_run *hole)
{
    list_append(&s->holes[hole->scratch_len / SAVED_BLOCK - 1], &hole->bucket_link);
}

/* The shortest that is long enough; else NULL, and the longest. */
static struct saved_run *find_hole_locked(struct saved *s, uint64_t len,
                                          struct saved_run **ret_longest)
{
    struct saved_run *hole = NULL;

    for (uint64_t i = len / SAVED_BLOCK; i <= SAVED_LENGTHS && !hole; i++)
        hole = list_first(&s->holes[i - 1], struct saved_run, bucket_link);
    for (uint64_t i = len / SAVED_BLOCK; i > 1 && !hole; i--) {
        *ret_longest = list_first(&s->holes[i - 2], struct saved_run, bucket_link);
        if (*ret_longest)
            return NULL;
    }
    return hole;
}

/* Takes at most `len` bytes of it. Returns what is left to be freed: all of it, or nothing. */
static struct saved_run *use_hole_locked(struct saved *s, struct saved_run *hole, uint64_t len,
                                         struct saved_run *run)
{
    run->scratch_offset = hole->scratch_offset;
    run->scratch_len = MIN(len, hole->scratch_len);
    hole->scratch_offset += run->scratch_len;
    hole->scratch_len -= run->scratch_len;
    list_remove(&hole->bucket_link);
    if (!hole->scratch_len)
        return hole;
    hole_add_locked(s, hole);
    return NULL;
}

static void extend_locked(struct saved *s, uint64_t len, struct saved_run *run)
{
    run->scratch_offset = s->scratch_end;
    run->scratch_len = len;
    s->scratch_end += len;
}

int saved_take_scratch(struct saved *s, struct saved_run *run, uint64_t max)
{
    uint64_t len = align_up(run->len, SAVED_BLOCK);
    struct saved_run *longest = NULL;
    struct saved_run *used_up = NULL;
    struct saved_run *hole;
    uint64_t room;

    tiny_lock_acquire(&s->lock);
    hole = find_hole_locked(s, len, &longest);
    room = s->scratch_end < max ? align_down(max - s->scratch_end, SAVED_BLOCK) : 0;
    if (hole)
        used_up = use_hole_locked(s, hole, len, run);
    else if (room >= len || (room && (!longest || room >= longest->scratch_len)))
        extend_locked(s, MIN(len, room), run);
    else if (longest)
        used_up = use_hole_locked(s, longest, len, run);
    s->scratch_bytes += run->scratch_len;
    tiny_lock_release(&s->lock);
    free(used_up);
    if (!run->scratch_len)
        return -ENOSPC;
    run->len = MIN(run->len, run->scratch_len);
    return 0;
}

/* SAVED-2 */
static void begin_anew_locked(struct saved *s, struct list *out)
{
    for (unsigned i = 0; i < SAVED_LENGTHS; i++)
        list_splice(out, &s->holes[i]);
    s->scratch_end = 0;
}

/* Nobody uses it, and it is in no list. */
static void run_free(struct saved *s, struct saved_run *run)
{
    struct list unused = LIST_INIT(unused);

    if (!run->scratch_len) {
        free(run->data);
        free(run);
        return;
    }
    tiny_lock_acquire(&s->lock);
    s->scratch_bytes -= run->scratch_len;
    hole_add_locked(s, run);
    if (!s->scratch_bytes)
        begin_anew_locked(s, &unused);
    tiny_lock_release(&s->lock);
    free_all(&unused);
}

/* ---- the store ---- */

void saved_insert(struct saved *s, struct saved_run *run)
{
    tiny_lock_acquire(&s->lock);
    list_append(bucket_of(s, run->offset), &run->bucket_link);
    list_append(run->data ? &s->in_memory : &s->in_scratch, &run->age_link);
    tiny_lock_release(&s->lock);
}

struct saved_run *saved_get(struct saved *s, uint64_t offset)
{
    struct saved_run *found = NULL;
    struct saved_run *run;

    tiny_lock_acquire(&s->lock);
    list_for_each (bucket_of(s, offset), run, bucket_link) {
        if (offset >= run->offset && offset < run->offset + run->len) {
            run->users++;
            found = run;
            break;
        }
    }
    tiny_lock_release(&s->lock);
    return found;
}

void saved_put(struct saved *s, struct saved_run *run)
{
    bool last;

    tiny_lock_acquire(&s->lock);
    last = --run->users == 0 && run->removed;
    tiny_lock_release(&s->lock);
    if (last)
        run_free(s, run);
}

/* Takes the runs of one region that lie within the range out of the store, into `out`. */
static void take_region(struct saved *s, struct list *bucket, uint64_t offset, uint64_t len,
                        struct list *out)
{
    struct saved_run *run;
    struct saved_run *next;

    tiny_lock_acquire(&s->lock);
    list_for_each_safe (bucket, run, next, bucket_link) {
        if (run->offset < offset || run->offset + run->len > offset + len)
            continue;
        list_remove(&run->bucket_link);
        list_remove(&run->age_link);
        if (run->data)
            s->memory_bytes -= run->len;
        run->removed = true;
        if (!run->users)
            list_append(out, &run->bucket_link);
    }
    tiny_lock_release(&s->lock);
}

void saved_forget(struct saved *s, uint64_t offset, uint64_t len)
{
    struct list out = LIST_INIT(out);
    uint64_t regions = (offset + len - 1) / SAVED_REGION - offset / SAVED_REGION + 1;
    struct saved_run *run;

    for (uint64_t i = 0; i < MIN(regions, (uint64_t)SAVED_BUCKETS); i++)
        take_region(s, bucket_of(s, offset + i * SAVED_REGION), offset, len, &out);
    while ((run = list_first(&out, struct saved_run, bucket_link))) {
        list_remove(&run->bucket_link);
        run_free(s, run);
    }
}

bool saved_oldest(struct saved *s, uint64_t memory_above, uint64_t scratch_above,
                  uint64_t *ret_offset, uint64_t *ret_len)
{
    const struct saved_run *run = NULL;

    tiny_lock_acquire(&s->lock);
    if (s->memory_bytes > memory_above)
        run = list_first(&s->in_memory, struct saved_run, age_link);
    if (!run && s->scratch_bytes > scratch_above)
        run = list_first(&s->in_scratch, struct saved_run, age_link);
    if (run) {
        *ret_offset = run->offset;
        *ret_len = run->len;
    }
    tiny_lock_release(&s->lock);
    return run != NULL;
}
