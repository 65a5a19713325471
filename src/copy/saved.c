/* SPDX-License-Identifier: Apache-2.0 */
/* The store of saved blocks. */
#include "copy/saved.h"
#include "base/alloc.h"
#include "base/macros.h"

#include <assert.h>
#include <stdlib.h>

void saved_init(struct saved *s)
{
    s->lock.held = 0;
    s->memory_bytes = 0;
    list_init(&s->in_memory);
    for (unsigned i = 0; i < SAVED_BUCKETS; i++)
        list_init(&s->buckets[i]);
}

static void run_free(struct saved_run *run)
{
    free(run->data);
    free(run);
}

void saved_release(struct saved *s)
{
    for (unsigned i = 0; i < SAVED_BUCKETS; i++) {
        struct saved_run *run;

        while ((run = list_first(&s->buckets[i], struct saved_run, bucket_link))) {
            assert(!run->users);
            list_remove(&run->bucket_link);
            run_free(run);
        }
    }
}

static struct list *bucket_of(struct saved *s, uint64_t offset)
{
    return &s->buckets[(offset / SAVED_REGION) % SAVED_BUCKETS];
}

struct saved_run *saved_run_new(uint64_t offset, uint64_t len, bool in_memory)
{
    struct saved_run *run = try_new(struct saved_run);

    assert(offset / SAVED_REGION == (offset + len - 1) / SAVED_REGION);
    if (!run)
        return NULL;
    list_init(&run->bucket_link);
    list_init(&run->age_link);
    run->offset = offset;
    run->len = len;
    if (in_memory) {
        run->data = try_alloc(1, len);
        if (!run->data) {
            free(run);
            return NULL;
        }
    }
    return run;
}

void saved_insert(struct saved *s, struct saved_run *run)
{
    tiny_lock_acquire(&s->lock);
    list_append(bucket_of(s, run->offset), &run->bucket_link);
    if (run->data)
        list_append(&s->in_memory, &run->age_link);
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
        run_free(run);
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
        run_free(run);
    }
}

bool saved_reserve(struct saved *s, uint64_t bytes, uint64_t max)
{
    bool fits;

    tiny_lock_acquire(&s->lock);
    fits = s->memory_bytes + bytes <= max;
    if (fits)
        s->memory_bytes += bytes;
    tiny_lock_release(&s->lock);
    return fits;
}

bool saved_oldest(struct saved *s, uint64_t above, uint64_t *ret_offset, uint64_t *ret_len)
{
    const struct saved_run *run = NULL;

    tiny_lock_acquire(&s->lock);
    if (s->memory_bytes > above)
        run = list_first(&s->in_memory, struct saved_run, age_link);
    if (run) {
        *ret_offset = run->offset;
        *ret_len = run->len;
    }
    tiny_lock_release(&s->lock);
    return run != NULL;
}
