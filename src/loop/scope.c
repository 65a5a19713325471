/* SPDX-License-Identifier: Apache-2.0 */
/* Scopes: joining, cancelling, and calls to another loop, which are a scope there. */
#include "loop/scope.h"
#include "base/macros.h"
#include "loop/loop-internal.h"

#include <assert.h>
#include <errno.h>

void co_scope_init(struct co_scope *s)
{
    list_init(&s->members);
    s->count = 0;
    s->cancelled = 0;
    s->joiner = NULL;
    s->on_empty = NULL;
    s->timer.armed = false;
}

static void scope_cancel(struct co_scope *s, int reason)
{
    struct co *co;

    if (s->cancelled)
        return;
    s->cancelled = reason;
    list_for_each (&s->members, co, scope_link) {
        struct co_wait *w = co->wait;

        if (w && w->cancel && !co->shield && w->cancel(w))
            co_wait_end(w, reason);
    }
}

void co_scope_cancel(struct co_scope *s)
{
    scope_cancel(s, -ECANCELED);
}

static void scope_timed_out(struct timer *t)
{
    scope_cancel(container_of(t, struct co_scope, timer), -ETIMEDOUT);
}

void co_scope_set_deadline(struct co_scope *s, uint64_t deadline_ns)
{
    loop_timer_disarm(&s->timer);
    if (deadline_ns != LOOP_FOREVER)
        loop_timer_arm(&s->timer, deadline_ns, scope_timed_out);
}

struct scope_join {
    struct co_wait wait;
    struct co_scope *scope;
};

/* Hands the cancellation down; the join itself goes on. */
static bool join_cancel(struct co_wait *w)
{
    co_scope_cancel(container_of(w, struct scope_join, wait)->scope);
    return false;
}

void co_scope_join(struct co_scope *s)
{
    struct scope_join join = {.scope = s};

    assert(!s->joiner);
    /* Again if another one was started after the last had ended and before this one ran. */
    while (s->count) {
        co_wait_init(&join.wait, join_cancel);
        s->joiner = &join.wait;
        co_wait(&join.wait, LOOP_FOREVER);
        s->joiner = NULL;
    }
    loop_timer_disarm(&s->timer);
}

/*
 * A call to another loop. The frame is the caller's; the remote loop gives it back by `done`, after its last touch. A cancel
 * message that is on its way must come back too before the frame may go.
 */
struct remote_call {
    struct co_wait wait;
    struct loop *from;
    struct loop *on;
    co_entry_fn *fn;
    void *arg;
    struct co_scope scope; /* touched on `on` only */
    struct loop_message start;
    struct loop_message done;
    struct loop_message cancel;
    int result;
    bool cancel_out; /* touched on `from` only, as `finished` */
    bool finished;
};

static void remote_end_if_back(struct remote_call *c)
{
    if (c->finished && !c->cancel_out)
        co_wait_end(&c->wait, c->result);
}

static void remote_finished(struct loop_message *m)
{
    struct remote_call *c = container_of(m, struct remote_call, done);

    c->finished = true;
    remote_end_if_back(c);
}

static void remote_cancel_returned(struct loop_message *m)
{
    struct remote_call *c = container_of(m, struct remote_call, cancel);

    c->cancel_out = false;
    remote_end_if_back(c);
}

static void remote_cancel_arrived(struct loop_message *m)
{
    struct remote_call *c = container_of(m, struct remote_call, cancel);

    co_scope_cancel(&c->scope);
    m->fn = remote_cancel_returned;
    loop_post(c->from, m);
}

static bool remote_call_cancel(struct co_wait *w)
{
    struct remote_call *c = container_of(w, struct remote_call, wait);

    if (!c->cancel_out && !c->finished && c->cancel.fn != remote_cancel_returned) {
        c->cancel_out = true;
        c->cancel.fn = remote_cancel_arrived;
        loop_post(c->on, &c->cancel);
    }
    return false;
}

static void remote_empty(struct co_scope *s)
{
    struct remote_call *c = container_of(s, struct remote_call, scope);

    c->done.fn = remote_finished;
    loop_post(c->from, &c->done);
}

static void remote_start(struct loop_message *m)
{
    struct remote_call *c = container_of(m, struct remote_call, start);
    int r;

    co_scope_init(&c->scope);
    c->scope.on_empty = remote_empty;
    r = co_scope_start(&c->scope, c->fn, c->arg);
    if (r == 0)
        return; /* fn may have ended, and the frame with it */
    c->result = r;
    remote_empty(&c->scope);
}

int loop_co_call(struct loop *on, co_entry_fn *fn, void *arg)
{
    struct remote_call c = {.from = loop_self(), .on = on, .fn = fn, .arg = arg};

    co_wait_init(&c.wait, remote_call_cancel);
    c.start.fn = remote_start;
    loop_post(on, &c.start);
    return co_wait(&c.wait, LOOP_FOREVER);
}
