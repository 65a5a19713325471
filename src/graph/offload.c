/* SPDX-License-Identifier: Apache-2.0 */
/* The way of a copy: into both gates, down from the source, down to the target. The design is in the header. */
#include "graph/offload.h"
#include "base/atomic.h"
#include "base/macros.h"
#include "graph/backend-internal.h"

#include <errno.h>

bool offload_comes_from(const struct offload *o, const struct node *node)
{
    for (const struct pass_frame *f = o->source; f; f = f->up) {
        if (f->edge->node == node || f->edge->parent == node)
            return true;
    }
    return false;
}

int offload_co_hand_over(const struct request *out, struct file *file)
{
    struct offload *o = out->offload;
    struct request in = {
        .kind = REQUEST_COPY_IN,
        .flags = o->flags,
        .offset = out->other,
        .len = out->len,
        .other = out->offset,
        .offload = o,
        .pass = &o->pass,
    };

    o->file = file;
    o->source = out->frame;
    return edge_co_request(o->target->root, &in);
}

int offload_co_take(const struct request *in, struct file *file)
{
    int64_t n = file_co_copy(file, in->offset, in->offload->file, in->other, in->len);

    if (n < 0)
        return (int)n;
    if ((uint64_t)n < in->len)
        return -EOPNOTSUPP; /* the source's file ends before its node does: that is zeroes */
    return in->flags & REQUEST_FUA ? file_co_sync(file) : 0;
}

static struct gate_slot *slot_here(struct backend *b)
{
    return gate_slot_here(&b->gate);
}

/* OFFLOAD-3. */
static int co_fn enter_both(struct backend *source, struct pass *pass, struct offload *o)
{
    for (;;) {
        int r = gate_enter(slot_here(o->target), &o->pass);

        if (r < 0)
            return r;
        if (likely(!slot_here(source)->closed))
            return gate_enter(slot_here(source), pass); /* at once */
        gate_leave(slot_here(o->target), &o->pass);
        r = gate_enter(slot_here(source), pass);
        if (r < 0)
            return r;
        gate_leave(slot_here(source), pass);
    }
}

/* What fails is read and written then, and counted there. */
static void account(struct backend *b, const struct pass *pass)
{
    struct stats *stats = b->stats[loop_index(loop_self())];
    bool writes = pass->kind == REQUEST_COPY_IN;
    uint64_t end = pass->offset + pass->len;

    stats_account(stats, writes ? STATS_WRITE : STATS_READ, pass->len, pass->arrived_ns, loop_now(),
                  0);
    if (writes && end > stats->highest_written)
        atomic_set_relaxed(&stats->highest_written, end); /* see stats.h */
}

int backend_co_copy(struct backend *source, uint64_t source_offset, struct backend *target,
                    uint64_t offset, uint64_t len, unsigned flags)
{
    struct offload o = {.target = target, .flags = flags};
    struct pass pass = {.kind = REQUEST_COPY_OUT, .offset = source_offset, .len = len};
    int r;

    if (len > BACKEND_MAX_DATA)
        return -EINVAL;
    o.pass.kind = REQUEST_COPY_IN;
    o.pass.offset = offset;
    o.pass.len = len;
    do {
        struct request out = {
            .kind = REQUEST_COPY_OUT,
            .offset = source_offset,
            .len = len,
            .other = offset,
            .offload = &o,
            .pass = &pass,
        };

        r = enter_both(source, &pass, &o);
        if (r < 0)
            return r;
        r = edge_co_request(source->root, &out);
        if (r == 0) {
            account(source, &pass);
            account(target, &o.pass);
        }
        gate_leave(slot_here(source), &pass);
        gate_leave(slot_here(target), &o.pass);
    } while (r == -ERESTART);
    return r;
}
