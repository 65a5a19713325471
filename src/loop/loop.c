/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The loop: ticks, messages, hooks, timers, threads.
 *
 * LOOP-1 Only the thread of a loop touches it; other threads touch its mailbox alone.
 * LOOP-2 A mailbox is a stack that senders push with CAS and the loop takes whole. The sender that finds it empty wakes the
 *        engine (an eventfd, readable until the loop has read it): a wake is never lost, and nobody asks whether the loop
 *        sleeps.
 */
#include "loop/loop.h"
#include "base/alloc.h"
#include "base/atomic.h"
#include "base/macros.h"
#include "loop/loop-internal.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

static _Thread_local struct loop *self;

/* One bit for each index in use, and one for each mailbox whose eventfd is open. */
static uint64_t used_indexes;
static struct loop_mailbox mailboxes[LOOP_MAX];
static uint64_t open_mailboxes;

struct loop *loop_self(void)
{
    return self;
}

void loop_set_self(struct loop *loop)
{
    self = loop;
}

unsigned loop_index(const struct loop *loop)
{
    return loop->index;
}

const char *loop_engine_name(const struct loop *loop)
{
    return loop->engine->name;
}

const char *loop_name(const struct loop *loop)
{
    return loop->name;
}

const struct loop_counters *loop_counters(const struct loop *loop)
{
    return &loop->counters;
}

uint64_t loop_now(void)
{
    return self->now_ns;
}

uint64_t loop_clock(void)
{
    self->now_ns = self->engine->clock(self);
    return self->now_ns;
}

uint64_t loop_wall_clock(void)
{
    return self->engine->wall_clock(self);
}

void loop_random(void *ret_bytes, size_t len)
{
    self->engine->random(self, ret_bytes, len);
}

static int index_take(unsigned *ret)
{
    uint64_t used = atomic_get(&used_indexes);

    do {
        if (used == UINT64_MAX)
            return -EMFILE;
        *ret = (unsigned)__builtin_ctzll(~used);
    } while (!atomic_cas(&used_indexes, &used, used | (uint64_t)1 << *ret));
    return 0;
}

static int mailbox_open(struct loop *loop, struct error **err)
{
    uint64_t bit = (uint64_t)1 << loop->index;

    if (atomic_get(&open_mailboxes) & bit)
        return 0;
    loop->mailbox->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (loop->mailbox->wake_fd < 0)
        return error_set(err, errno, "loop '%s': cannot make an eventfd: %s", loop->name,
                         strerror(errno));
    atomic_or(&open_mailboxes, bit);
    return 0;
}

int loop_new(struct loop **ret, const struct engine *engine, const char *name, void *engine_state,
             struct error **err)
{
    struct loop *loop = xnew(struct loop);
    int r;

    assert(!self);
    loop->engine = engine;
    loop->engine_state = engine_state;
    (void)strncpy(loop->name, name, sizeof(loop->name) - 1);
    list_init(&loop->ready);
    list_init(&loop->all_cos);
    list_init(&loop->hooks);
    r = index_take(&loop->index);
    if (r < 0) {
        free(loop);
        return error_set(err, EMFILE, "loop '%s': there are already %d loops", name, LOOP_MAX);
    }
    loop->mailbox = &mailboxes[loop->index];
    fiber_init_thread(&loop->fiber);
    self = loop;
    r = engine->eventfds ? mailbox_open(loop, err) : 0;
    if (r == 0)
        r = engine->start(loop, err);
    if (r < 0) {
        self = NULL;
        atomic_and(&used_indexes, ~((uint64_t)1 << loop->index));
        free(loop);
        return r;
    }
    loop->now_ns = engine->clock(loop);
    loop->tick_ns = loop->now_ns;
    *ret = loop;
    return 0;
}

bool loop_free(struct loop *loop)
{
    assert(loop == self && list_empty(&loop->ready) && !loop->current);
    self = NULL;
    if (loop->live_ops) {
        /* The kernel still holds some: what completes them must find the loop. It is left to the end of the process. */
        return false;
    }
    loop->engine->stop(loop);
    co_pool_release(loop);
    op_pool_release(loop);
    iobuf_pool_release(loop);
    fiber_release(&loop->fiber);
    atomic_and(&used_indexes, ~((uint64_t)1 << loop->index));
    free(loop);
    return true;
}

void loop_abandon(struct loop *loop)
{
    co_abandon_all(loop);
    op_pool_release(loop);
    iobuf_pool_release(loop);
    loop->mailbox->newest = NULL;
    atomic_and(&used_indexes, ~((uint64_t)1 << loop->index));
    free(loop);
}

void loop_post(struct loop *to, struct loop_message *m)
{
    struct loop_mailbox *box = to->mailbox;
    const struct engine *engine = to->engine;
    bool other = to != self;
    struct loop_message *head = atomic_get(&box->newest);

    do {
        m->next = head;
    } while (!atomic_cas(&box->newest, &head, m));
    /* From here on the loop may be gone, its mailbox not. */
    if (!head && other)
        engine->wake(box); /* LOOP-2 */
}

/* Delivers in the order of sending. */
static void deliver_messages(struct loop *loop)
{
    struct loop_mailbox *box = loop->mailbox;
    struct loop_message *newest = atomic_get(&box->newest) ? atomic_swap(&box->newest, NULL) : NULL;
    struct loop_message *first = NULL;

    while (newest) {
        struct loop_message *m = newest;

        newest = m->next;
        m->next = first;
        first = m;
    }
    while (first) {
        struct loop_message *m = first;

        first = m->next;
        m->fn(m);
    }
}

void loop_hook_init(struct loop_hook *h, loop_hook_fn *fn)
{
    list_init(&h->link);
    h->fn = fn;
}

void loop_hook_defer(struct loop_hook *h)
{
    if (list_empty(&h->link))
        list_append(&self->hooks, &h->link);
}

void loop_hook_cancel(struct loop_hook *h)
{
    list_remove(&h->link);
}

static void run_hooks(struct loop *loop)
{
    struct loop_hook *h;

    while ((h = list_first(&loop->hooks, struct loop_hook, link))) {
        list_remove(&h->link);
        h->fn(h);
    }
}

void loop_timer_arm(struct timer *t, uint64_t deadline_ns, timer_fn *fn)
{
    t->deadline_ns = deadline_ns;
    t->fn = fn;
    timer_heap_insert(&self->timers, t);
}

void loop_timer_disarm(struct timer *t)
{
    if (t->armed)
        timer_heap_remove(&self->timers, t);
}

static void fire_timers(struct loop *loop)
{
    struct timer *t;

    while ((t = loop->timers.root) && t->deadline_ns <= loop->now_ns) {
        timer_heap_remove(&loop->timers, t);
        t->fn(t);
    }
}

void loop_tick(struct loop *loop)
{
    uint64_t deadline = 0;

    loop->counters.ticks++;
    if (unlikely(loop->engine->order_ready))
        loop->engine->order_ready(loop);
    co_run_ready(loop);
    run_hooks(loop);
    if (!loop->stopping && list_empty(&loop->ready) && !atomic_get(&loop->mailbox->newest))
        deadline = loop->timers.root ? loop->timers.root->deadline_ns : LOOP_FOREVER;
    loop->engine->poll(loop, deadline);
    loop->now_ns = loop->engine->clock(loop);
    loop->tick_ns = loop->now_ns;
    deliver_messages(loop);
    fire_timers(loop);
}

void loop_run(struct loop *loop)
{
    while (!loop->stopping || !list_empty(&loop->ready))
        loop_tick(loop);
}

const struct engine *loop_engine_of(enum loop_engine engine)
{
    switch (engine) {
    case LOOP_ENGINE_AUTO:
    case LOOP_ENGINE_IO_URING:
        return &engine_io_uring;
    case LOOP_ENGINE_THREADS:
        return &engine_threads;
    case LOOP_ENGINE_SIM:
        break;
    }
    return NULL;
}

struct main_call {
    struct loop *loop;
    struct co_scope scope;
};

static void main_ended(struct co_scope *s)
{
    container_of(s, struct main_call, scope)->loop->stopping = true;
}

static int run_main_on(struct loop *loop, co_entry_fn *main_fn, void *arg, struct error **err)
{
    struct main_call call = {.loop = loop};
    int r;

    co_scope_init(&call.scope);
    call.scope.on_empty = main_ended;
    r = co_scope_start(&call.scope, main_fn, arg);
    if (r < 0) {
        loop->stopping = true;
        error_set(err, -r, "loop '%s': no memory for a coroutine", loop->name);
    }
    loop_run(loop);
    (void)loop_free(loop); /* this thread goes on */
    return r;
}

int loop_run_on(const struct engine *engine, const char *name, void *engine_state,
                co_entry_fn *main_fn, void *arg, struct error **err)
{
    struct loop *loop;
    int r = loop_new(&loop, engine, name, engine_state, err);

    return r < 0 ? r : run_main_on(loop, main_fn, arg, err);
}

int loop_run_main(enum loop_engine engine, const char *name, co_entry_fn *main_fn, void *arg,
                  struct error **err)
{
    struct loop *loop;
    int r;

    assert(engine != LOOP_ENGINE_SIM);
    r = loop_new(&loop, loop_engine_of(engine), name, NULL, err);
    if (r < 0 && engine == LOOP_ENGINE_AUTO) {
        error_free(err);
        r = loop_new(&loop, &engine_threads, name, NULL, err);
    }
    return r < 0 ? r : run_main_on(loop, main_fn, arg, err);
}

bool loop_thread_main(struct loop_thread *t)
{
    struct loop *loop;

    t->start_result = loop_new(&loop, t->engine, t->name, t->engine_data, &t->start_error);
    t->loop = t->start_result < 0 ? NULL : loop;
    t->engine->thread_report(t);
    if (t->start_result < 0)
        return true;
    loop_run(loop);
    return loop_free(loop);
}

int loop_thread_start(struct loop_thread **ret, const char *name, struct error **err)
{
    struct loop_thread *t = xnew(struct loop_thread);
    int r;

    t->engine = self->engine;
    (void)strncpy(t->name, name, sizeof(t->name) - 1);
    r = t->engine->thread_start(t, err);
    if (r < 0) {
        free(t);
        return r;
    }
    *ret = t;
    return 0;
}

struct loop *loop_thread_loop(struct loop_thread *t)
{
    return t->loop;
}

struct stop_message {
    struct loop_message message;
    struct loop *loop;
};

static void stop_arrived(struct loop_message *m)
{
    container_of(m, struct stop_message, message)->loop->stopping = true;
}

struct loop_thread *loop_thread_stop(struct loop_thread *t)
{
    struct stop_message stop = {.message.fn = stop_arrived};

    if (!t)
        return NULL;
    stop.loop = t->loop;
    loop_post(t->loop, &stop.message);
    t->engine->thread_join(t);
    free(t);
    return NULL;
}
