/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The simulator: tasks, virtual time, the engine's table.
 *
 * SIM-1 One task runs at a time, on its own stack; it leaves by task_leave() alone, back to the scheduler, which runs on the
 *       stack of sim_run().
 * SIM-2 Everything that could come out either way is decided by sim.prng, in an order that the seed alone determines:
 *       no addresses, no real time, no hash of either (S4).
 * SIM-3 Time passes a little with all that happens, so that who waits for the clock gets there, and jumps to the next event
 *       when nobody can run.
 * SIM-4 The simulator itself uses no atomics: it is never preempted, but in op_complete() and other calls into the loop.
 */
#include "loop/sim/sim.h"
#include "base/alloc.h"
#include "base/atomic.h"
#include "base/macros.h"
#include "loop/sim/sim-internal.h"

#include <assert.h>
#include <dlfcn.h>
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define TASK_STACK_BYTES ((size_t)1 << 20)
#define FIRST_NS         NS_PER_S /* the monotonic clock of a machine that has just booted */

/* Of the leak sanitizer; absent in other builds. */
__attribute__((weak)) void __lsan_disable(void);
__attribute__((weak)) void __lsan_enable(void);

static struct sim *current;
static uint64_t last_hash;
static char *last_report;

struct sim *sim_self(void)
{
    assert(current);
    return current;
}

uint64_t sim_now(void)
{
    return sim_self()->now_ns;
}

struct prng *sim_prng(void)
{
    return &sim_self()->prng;
}

const char *sim_report(void)
{
    return last_report ? last_report : "";
}

uint64_t sim_trace_hash(void)
{
    return current ? current->hash : last_hash;
}

bool sim_chance(unsigned per_mille)
{
    return per_mille && prng_chance(&sim_self()->prng, per_mille);
}

uint64_t sim_between(uint64_t low, uint64_t high)
{
    return high > low ? low + prng_below(&sim_self()->prng, high - low + 1) : low;
}

static uint64_t mix(uint64_t h, uint64_t v)
{
    h = (h ^ v) * 0x9fb21c651e98df25u;
    return h ^ (h >> 32);
}

void sim_trace(enum sim_trace_kind kind, uint64_t a, uint64_t b, uint64_t c)
{
    static const char *const names[] = {"switch", "submit", "effect", "complete", "cancel", "cut"};
    struct sim *sim = sim_self();

    sim->hash = mix(mix(mix(mix(sim->hash, kind), a), b), c);
    if (unlikely(sim->verbose))
        fprintf(stderr, "sim %" PRIu64 " %s %" PRIu64 " %" PRIu64 " %" PRId64 "\n", sim->now_ns,
                names[kind], a, b, (int64_t)c);
}

uint64_t sim_hash_bytes(uint64_t hash, const void *data, size_t len)
{
    const uint8_t *p = data;

    for (; len >= 8; p += 8, len -= 8) {
        uint64_t word;

        memcpy(&word, p, 8);
        hash = mix(hash, word);
    }
    for (; len; p++, len--)
        hash = mix(hash, *p);
    return hash;
}

void sim_options_init(struct sim_options *o, uint64_t seed)
{
    static const unsigned preempt[] = {0, 5, 30, 100, 300};
    static const unsigned some[] = {0, 0, 50, 300};
    static const unsigned inlined[] = {0, 200, 900};
    static const uint64_t slow[] = {20 * NS_PER_US, 200 * NS_PER_US, 5 * NS_PER_MS};
    struct prng p = {.state = seed ^ 0x51eed};

    *o = (struct sim_options){
        .seed = seed,
        .preempt_per_mille = preempt[prng_below(&p, ARRAY_SIZE(preempt))],
        .stall_per_mille = some[prng_below(&p, ARRAY_SIZE(some))] / 10,
        .stall_max_ns = 2 * NS_PER_MS,
        .shuffle_per_mille = some[prng_below(&p, ARRAY_SIZE(some))],
        .inline_per_mille = inlined[prng_below(&p, ARRAY_SIZE(inlined))],
        .short_per_mille = some[prng_below(&p, ARRAY_SIZE(some))],
        .cancel_per_mille = some[prng_below(&p, ARRAY_SIZE(some))] * 2,
        .writeback_per_mille = some[prng_below(&p, ARRAY_SIZE(some))],
        .disk_min_ns = 5 * NS_PER_US,
        .disk_max_ns = slow[prng_below(&p, ARRAY_SIZE(slow))],
        .net_min_ns = 5 * NS_PER_US,
        .net_max_ns = slow[prng_below(&p, ARRAY_SIZE(slow))],
        .max_steps = 50 * 1000 * 1000,
    };
}

/* ---- tasks ---- */

/* SIM-1 */
static void task_leave(struct sim *sim, enum sim_task_state state)
{
    struct sim_task *t = sim->running;

    t->state = state;
    t->self = loop_self();
    t->resume = t->self ? co_current_fiber(t->self) : &t->fiber;
    fiber_switch(t->resume, &sim->scheduler);
}

static void task_enter(struct sim *sim, struct sim_task *t)
{
    sim->running = t;
    t->state = TASK_RUNNABLE;
    loop_set_self(t->self);
    fiber_switch(&sim->scheduler, t->resume);
    loop_set_self(NULL);
    sim->running = NULL;
}

static bool on_stack_of(const struct fiber *f)
{
    const char *here = __builtin_frame_address(0);

    return here >= (const char *)f->stack && here < (const char *)f->stack + f->stack_size;
}

/* T1: at each atomic. */
static void sim_point(void *arg)
{
    struct sim *sim = arg;
    struct sim_task *t = sim->running;

    if (!t || !prng_chance(&sim->prng, sim->options.preempt_per_mille))
        return;
    /* A test that failed has left by longjmp: then this is no longer the task. */
    if (!on_stack_of(loop_self() ? co_current_fiber(loop_self()) : &t->fiber))
        return;
    if (sim_chance(sim->options.stall_per_mille))
        t->stalled_until_ns = sim->now_ns + sim_between(0, sim->options.stall_max_ns);
    sim->now_ns += sim_between(20, 500); /* SIM-3 */
    task_leave(sim, TASK_RUNNABLE);
}

struct main_call {
    co_entry_fn *fn;
    void *arg;
};

static void task_main(void *arg)
{
    struct sim_task *t = arg;

    (void)loop_thread_main(t->thread); /* sim_run() sees to loops that stay */
    task_leave(sim_self(), TASK_ENDED);
    abort(); /* nobody enters an ended task */
}

static struct main_call main_call;

static void main_task_main(void *arg)
{
    struct error *err = NULL;

    if (loop_run_on(&engine_sim, "main", arg, main_call.fn, main_call.arg, &err) < 0) {
        fprintf(stderr, "sim: %s\n", error_text(err));
        abort();
    }
    task_leave(sim_self(), TASK_ENDED);
    abort(); /* nobody enters an ended task */
}

static struct sim_task *task_new(const char *name, fiber_entry_fn *entry)
{
    struct sim *sim = sim_self();
    struct sim_task *t = xnew(struct sim_task);
    size_t page = (size_t)sysconf(_SC_PAGESIZE);

    t->number = sim->task_count++;
    (void)strncpy(t->name, name, sizeof(t->name) - 1);
    list_init(&t->done);
    t->map_size = page + TASK_STACK_BYTES;
    t->map = mmap(NULL, t->map_size, PROT_READ | PROT_WRITE,
                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
    if (t->map == MAP_FAILED || mprotect(t->map, page, PROT_NONE) < 0) {
        fprintf(stderr, "sim: no memory for the stack of '%s'\n", name);
        abort();
    }
    fiber_init(&t->fiber, (char *)t->map + page, TASK_STACK_BYTES, entry, t);
    t->resume = &t->fiber;
    list_append(&sim->tasks, &t->link);
    return t;
}

static void task_free(struct sim_task *t)
{
    list_remove(&t->link);
    fiber_release(&t->fiber);
    munmap(t->map, t->map_size);
    free(t);
}

static struct sim_task *task_of_loop(struct loop *loop)
{
    return loop->engine_state;
}

void sim_stall(struct loop *loop, uint64_t until_ns)
{
    task_of_loop(loop)->stalled_until_ns = until_ns;
}

/* ---- the scheduler ---- */

static bool task_waits_no_more(const struct sim *sim, const struct sim_task *t)
{
    switch (t->state) {
    case TASK_RUNNABLE:
        return true;
    case TASK_POLLING:
        return t->woken || !list_empty(&t->done) || t->deadline_ns <= sim->now_ns;
    case TASK_STARTING:
        return t->awaited->reported;
    case TASK_JOINING:
        return t->awaited->state == TASK_ENDED;
    case TASK_ENDED:
        break;
    }
    return false;
}

static struct sim_task *choose_task(struct sim *sim)
{
    struct sim_task *t;
    struct sim_task *ready = NULL;
    uint64_t n = 0;

    list_for_each (&sim->tasks, t, link)
        n += t->stalled_until_ns <= sim->now_ns && task_waits_no_more(sim, t);
    if (!n)
        return NULL;
    n = n > 1 ? prng_below(&sim->prng, n) : 0;
    list_for_each (&sim->tasks, t, link) {
        if (t->stalled_until_ns <= sim->now_ns && task_waits_no_more(sim, t) && n-- == 0) {
            ready = t;
            break;
        }
    }
    return ready;
}

/* When something can happen that cannot now. */
static uint64_t next_event_ns(const struct sim *sim)
{
    uint64_t when = sim->events.root ? sim->events.root->deadline_ns : LOOP_FOREVER;
    struct sim_task *t;

    if (sim->options.kill_at_ns)
        when = MIN(when, sim->options.kill_at_ns);
    list_for_each (&sim->tasks, t, link) {
        if (task_waits_no_more(sim, t))
            when = MIN(when, t->stalled_until_ns);
        else if (t->state == TASK_POLLING && t->deadline_ns != LOOP_FOREVER)
            when = MIN(when, MAX(t->deadline_ns, t->stalled_until_ns));
    }
    return when;
}

static void fire_events(struct sim *sim)
{
    struct timer *t;

    while ((t = sim->events.root) && t->deadline_ns <= sim->now_ns) {
        timer_heap_remove(&sim->events, t);
        t->fn(t);
    }
}

/* Where a function is, for addr2line: addresses differ from run to run. */
static void report_place(FILE *to, const char *what, uintptr_t address)
{
    Dl_info info;

    if (address && dladdr((const void *)address, &info) && info.dli_fbase)
        fprintf(to, "%s +0x%" PRIxPTR, what, address - (uintptr_t)info.dli_fbase);
}

static void report_coroutines(FILE *to, const struct loop *loop)
{
    struct co *co;

    list_for_each (&loop->all_cos, co, all_link) {
        if (!co->entry)
            continue;
        report_place(to, "\n    coroutine", (uintptr_t)co->entry);
        if (co->wait) {
            if (co->wait->cancel)
                report_place(to, " in a wait with cancel function", (uintptr_t)co->wait->cancel);
            else
                fprintf(to, " in a wait that cannot be cancelled");
            if (co->wait->timer.armed)
                fprintf(to, ", until %" PRIu64, co->wait->timer.deadline_ns);
        }
    }
}

static const char *state_name(enum sim_task_state state)
{
    switch (state) {
    case TASK_RUNNABLE:
        return "runs";
    case TASK_POLLING:
        return "sleeps";
    case TASK_STARTING:
        return "waits for a loop to start";
    case TASK_JOINING:
        return "waits for a loop to end";
    case TASK_ENDED:
        break;
    }
    return "has ended";
}

static const char *op_name(enum io_op_kind kind)
{
    static const char *const names[] = {
        "read",   "write",    "sync",      "punch",
        "zero",   "allocate", "truncate",  "extents",
        "stat",   "lock",     "lock test", "open",
        "close",  "rename",   "unlink",    "sync of directory",
        "listen", "accept",   "connect",   "recv",
        "send",
    };

    return (unsigned)kind < ARRAY_SIZE(names) ? names[kind] : "operation";
}

static void report(struct sim *sim, const char *what)
{
    size_t size;
    FILE *to;
    struct sim_task *t;
    struct sim_io *io;

    free(last_report);
    last_report = NULL;
    to = open_memstream(&last_report, &size);
    if (!to)
        abort();
    fprintf(to, "sim: seed %" PRIu64 ": %s at %" PRIu64 " ns", sim->options.seed, what,
            sim->now_ns);
    list_for_each (&sim->tasks, t, link) {
        fprintf(to, "\n  loop '%s' %s", t->name, state_name(t->state));
        if (t->awaited && (t->state == TASK_STARTING || t->state == TASK_JOINING))
            fprintf(to, ": '%s'", t->awaited->name);
        if (t->loop)
            report_coroutines(to, t->loop);
    }
    list_for_each (&sim->ios, io, link)
        fprintf(to, "\n  %s of '%s' on loop '%s'%s", op_name(io->op->kind), io->name,
                io->task->name, io->hung ? " hangs" : "");
    fprintf(to, "\n");
    fclose(to);
}

static void __attribute__((noreturn)) report_and_abort(struct sim *sim, const char *what)
{
    report(sim, what);
    fputs(last_report, stderr);
    fputs("  (find a place: addr2line -fpe <this program> <+0x...>)\n", stderr);
    abort();
}

/* Runs tasks until the main one has ended or the process must die. */
static enum sim_end schedule(struct sim *sim, const struct sim_task *main_task)
{
    for (;;) {
        struct sim_task *t;

        if (sim->options.kill_at_ns && sim->now_ns >= sim->options.kill_at_ns)
            sim->killed = true;
        if (sim->killed)
            return SIM_KILLED;
        if (main_task->state == TASK_ENDED)
            return SIM_RETURNED;
        fire_events(sim);
        t = choose_task(sim);
        if (t) {
            if (++sim->steps > sim->options.max_steps)
                report_and_abort(sim, "no end in sight");
            sim_trace(TRACE_SWITCH, t->number, sim->now_ns, 0);
            task_enter(sim, t);
            continue;
        }
        if (next_event_ns(sim) == LOOP_FOREVER) {
            if (!sim->options.may_end_early)
                report_and_abort(sim, "deadlock: nothing can run and nothing will happen");
            report(sim, "deadlock");
            return SIM_DEADLOCK;
        }
        sim->now_ns = next_event_ns(sim);
    }
}

/* ---- the run ---- */

/* What the kernel still held when its loop ended (G8) is given back, so that the memory is. */
static void finish_left_loops(struct sim *sim)
{
    struct sim_task *t;
    struct sim_task *next;

    list_for_each_safe (&sim->tasks, t, next, link) {
        struct loop *loop = t->loop;
        struct sim_io *io;
        struct sim_io *next_io;

        if (loop) {
            loop_set_self(loop);
            list_for_each_safe (&sim->ios, io, next_io, link) {
                if (io->task != t)
                    continue;
                assert(io->op->detached);
                sim_io_finish(io, -EIO);
            }
            while ((io = list_first(&t->done, struct sim_io, link))) {
                struct io_op *op = io->op;
                int64_t result = io->result;

                sim_io_free(io);
                op_complete(op, result);
            }
            (void)loop_free(loop);
        }
        task_free(t);
    }
}

static void abandon(struct sim *sim)
{
    struct sim_task *t;
    struct sim_task *next;
    struct sim_io *io;

    while ((io = list_first(&sim->ios, struct sim_io, link)))
        sim_io_free(io);
    list_for_each_safe (&sim->tasks, t, next, link) {
        while ((io = list_first(&t->done, struct sim_io, link))) {
            sim_io_free(io);
        }
        if (t->loop)
            loop_abandon(t->loop);
        task_free(t);
    }
}

static void sim_init(struct sim *sim, const struct sim_options *o)
{
    *sim = (struct sim){
        .options = *o,
        .prng = {.state = o->seed},
        .random_prng = {.state = ~o->seed},
        .now_ns = FIRST_NS,
        .hash = o->seed,
        .next_port = 49152,
        .disk = o->disk ? o->disk : sim_disk_new(),
        .verbose = getenv("CAIRN_SIM_TRACE") != NULL,
    };
    list_init(&sim->tasks);
    list_init(&sim->ios);
    list_init(&sim->faults);
    list_init(&sim->listeners);
    list_init(&sim->connections);
    for (size_t i = 0; i < o->fault_count; i++) {
        o->faults[i]->seen = o->faults[i]->fired = 0;
        list_append(&sim->faults, &o->faults[i]->link);
    }
}

static void check_all_stopped(struct sim *sim)
{
    struct sim_task *t;

    list_for_each (&sim->tasks, t, link)
        if (t->state != TASK_ENDED)
            report_and_abort(sim, "the main loop has ended before the others");
}

enum sim_end sim_run(const struct sim_options *o, co_entry_fn *main_fn, void *arg)
{
    static struct sim sim;
    struct sim_task *main_task;
    enum sim_end end;

    assert(o->may_end_early || (!o->kill_at_ns && !o->kill_at_op));
    if (current) /* a test left it by longjmp: its memory is lost, and the test has failed */
        loop_set_self(NULL);
    if (o->may_end_early && __lsan_disable)
        __lsan_disable();
    sim_init(&sim, o);
    current = &sim;
    main_call = (struct main_call){main_fn, arg};
    fiber_init_thread(&sim.scheduler);
    main_task = task_new("main", main_task_main);
    atomic_set_point_hook(sim_point, &sim);
    end = schedule(&sim, main_task);
    atomic_set_point_hook(NULL, NULL);
    if (end == SIM_RETURNED) {
        check_all_stopped(&sim);
        sim_file_settle();
        finish_left_loops(&sim);
    } else {
        sim_file_settle();
        abandon(&sim);
    }
    sim_file_close_all();
    sim_net_process_ended();
    loop_set_self(NULL);
    last_hash = sim.hash;
    current = NULL;
    if (!o->disk)
        sim_disk_free(sim.disk);
    if (o->may_end_early && __lsan_enable)
        __lsan_enable();
    return end;
}

void sim_kill(void)
{
    struct sim *sim = sim_self();

    assert(sim->options.may_end_early);
    sim->killed = true;
    task_leave(sim, TASK_RUNNABLE);
    abort(); /* the dead do not come back */
}

/* ---- operations ---- */

struct sim_io *sim_io_new(struct io_op *op, const char *name)
{
    struct sim *sim = sim_self();
    struct sim_io *io = xnew(struct sim_io);

    io->op = op;
    io->task = sim->running;
    io->number = ++sim->io_count;
    io->name = xstrdup(name);
    op->engine_ptr = io;
    list_append(&sim->ios, &io->link);
    sim_trace(TRACE_SUBMIT, io->number, op->kind, mix(op->offset, op->len));
    return io;
}

void sim_io_finish(struct sim_io *io, int64_t result)
{
    assert(!io->done);
    io->done = true;
    io->result = result;
    if (io->timer.armed)
        timer_heap_remove(&sim_self()->events, &io->timer);
    list_remove(&io->link);
    list_append(&io->task->done, &io->link);
    sim_trace(TRACE_EFFECT, io->number, io->op->kind, (uint64_t)result);
}

void sim_io_free(struct sim_io *io)
{
    if (io->timer.armed)
        timer_heap_remove(&sim_self()->events, &io->timer);
    list_remove(&io->link);
    free(io->name);
    free(io);
}

static void io_due(struct timer *t)
{
    struct sim_io *io = container_of(t, struct sim_io, timer);

    io->effect(io);
}

void sim_io_at(struct sim_io *io, uint64_t when_ns)
{
    io->timer.deadline_ns = when_ns;
    io->timer.fn = io_due;
    timer_heap_insert(&sim_self()->events, &io->timer);
}

/* ---- the engine's table ---- */

static int engine_start(struct loop *loop, struct error **err)
{
    struct sim_task *t = loop->engine_state;

    (void)err;
    t->loop = loop;
    loop->fiber.stack =
        t->fiber.stack; /* the thread has another, which ASan must not take for this one */
    loop->fiber.stack_size = t->fiber.stack_size;
    return 0;
}

static void engine_stop(struct loop *loop)
{
    task_of_loop(loop)->loop = NULL;
}

static void engine_poll(struct loop *loop, uint64_t deadline_ns)
{
    struct sim *sim = sim_self();
    struct sim_task *t = task_of_loop(loop);
    struct sim_io *io;

    sim->now_ns += sim_between(200, 3000); /* SIM-3 */
    sim_point(sim); /* between the loop's last look at its mailbox and its sleep */
    t->deadline_ns = deadline_ns;
    task_leave(sim, TASK_POLLING);
    t->woken = false;
    while ((io = list_first(&t->done, struct sim_io, link))) {
        struct io_op *op = io->op;
        int64_t result = io->result;

        sim_trace(TRACE_COMPLETE, io->number, t->number, (uint64_t)result);
        sim_io_free(io);
        op_complete(op, result);
    }
}

static void engine_wake(struct loop_mailbox *box)
{
    struct sim_task *t;

    list_for_each (&sim_self()->tasks, t, link)
        if (t->loop && t->loop->mailbox == box)
            t->woken = true;
}

static void engine_order_ready(struct loop *loop)
{
    struct list left = LIST_INIT(left);
    struct list *l;
    uint64_t n = 0;

    if (list_empty(&loop->ready) || loop->ready.next->next == &loop->ready ||
        !sim_chance(sim_self()->options.shuffle_per_mille))
        return;
    for (l = loop->ready.next; l != &loop->ready; l = l->next)
        n++;
    list_splice(&left, &loop->ready);
    for (; n; n--) {
        uint64_t skip = prng_below(sim_prng(), MIN(n, (uint64_t)16)); /* near ones: linear in all */

        for (l = left.next; skip; skip--)
            l = l->next;
        list_remove(l);
        list_append(&loop->ready, l);
    }
}

static bool op_is_of_network(const struct io_op *op)
{
    return op->socket || op->kind == IO_LISTEN || op->kind == IO_CONNECT;
}

static void engine_submit(struct io_op *op)
{
    if (op_is_of_network(op))
        sim_net_submit(op);
    else
        sim_file_submit(op);
}

static void engine_cancel(struct io_op *op)
{
    struct sim_io *io = op->engine_ptr;

    sim_trace(TRACE_CANCEL, io->number, io->done, 0);
    if (io->done)
        return;
    if (op_is_of_network(op))
        sim_net_cancel(io);
    else
        sim_file_cancel(io);
}

static uint64_t engine_clock(struct loop *loop)
{
    (void)loop;
    return sim_self()->now_ns += 20; /* SIM-3 */
}

static uint64_t engine_wall_clock(struct loop *loop)
{
    return SIM_WALL_OFFSET_NS + engine_clock(loop);
}

static void engine_random(struct loop *loop, void *ret_bytes, size_t len)
{
    uint8_t *p = ret_bytes;

    (void)loop;
    for (size_t i = 0; i < len; i++)
        p[i] = (uint8_t)(prng_next(&sim_self()->random_prng) >> 56);
}

static int engine_thread_start(struct loop_thread *t, struct error **err)
{
    struct sim *sim = sim_self();
    struct sim_task *task = task_new(t->name, task_main);

    task->thread = t;
    t->engine_data = task;
    sim->running->awaited = task;
    task_leave(sim, TASK_STARTING);
    if (t->start_result < 0)
        error_move(err, &t->start_error);
    return t->start_result;
}

static void engine_thread_report(struct loop_thread *t)
{
    ((struct sim_task *)t->engine_data)->reported = true;
}

static void engine_thread_join(struct loop_thread *t)
{
    struct sim *sim = sim_self();
    struct sim_task *task = t->engine_data;

    sim->running->awaited = task;
    task_leave(sim, TASK_JOINING);
    if (!task->loop) /* else the kernel still holds operations of it: see finish_left_loops() */
        task_free(task);
}

const struct engine engine_sim = {
    .name = "sim",
    .start = engine_start,
    .stop = engine_stop,
    .poll = engine_poll,
    .wake = engine_wake,
    .order_ready = engine_order_ready,
    .inline_rw = sim_file_inline_rw,
    .try_inline = sim_file_try_inline,
    .submit = engine_submit,
    .cancel = engine_cancel,
    .clock = engine_clock,
    .wall_clock = engine_wall_clock,
    .random = engine_random,
    .thread_start = engine_thread_start,
    .thread_report = engine_thread_report,
    .thread_join = engine_thread_join,
    .file_close = sim_file_close,
    .socket_try_send = sim_net_try_send,
    .socket_try_recv = sim_net_try_recv,
    .socket_shutdown = sim_net_shutdown,
    .socket_close = sim_net_close,
};
