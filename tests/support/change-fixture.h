/* SPDX-License-Identifier: Apache-2.0 */
/*
 * For tests of changes: two disks on a simulated machine, requests in the background, a change that looks and waits, and
 * operations that hang.
 *
 *     client     client
 *        |          |
 *       top         |        a filter; some have a backend of their own at the other disk
 *        |          |
 *       a          b         files
 */
#ifndef CAIRN_TESTS_CHANGE_FIXTURE_H
#define CAIRN_TESTS_CHANGE_FIXTURE_H

#include "graph-fixture.h"
#include "graph/change.h"
#include "loop/sim/sim.h"
#include "protocols/list.h"
#include "seeds.h"
#include "test-filter.h"

#include <stdio.h>

#define DISK_SIZE ((uint64_t)1 << 20)
#define BLOCK     ((uint64_t)4096)
#define DEADLINE  (2 * NS_PER_S)
#define SOON      (50 * NS_PER_MS) /* what nobody waits for takes less */
#define PATH_A    "/d/a.img"
#define PATH_B    "/d/b.img"

static const struct driver *const test_drivers[] = {&test_filter_driver, NULL};
static const struct driver *const *const drivers[] = {test_drivers, protocol_drivers, NULL};

/* ---- the world of a case ---- */

struct world {
    struct graph *graph;
    struct loop_thread *io;
    struct sim_disk *disk;
    struct co_scope scope;
    void (*body)(struct world *w);
};

static inline void add_disk(struct world *w, const char *name, const char *path)
{
    must_add(w->graph, "{'driver':'file','node-name':'%s','filename':'%s','locking':'on'}", name,
             path);
}

static inline void world_main(void *arg)
{
    struct world *w = arg;
    struct error *err = NULL;

    w->graph = graph_new(drivers);
    graph_set_change_deadline(w->graph, DEADLINE);
    check(loop_thread_start(&w->io, "io7", &err) == 0);
    co_scope_init(&w->scope);
    add_disk(w, "a", PATH_A);
    add_disk(w, "b", PATH_B);
    w->body(w);
    co_scope_join(&w->scope);
    (void)sim_unhang(NULL);
    check(co_sleep_until(loop_clock() + SOON) == 0);
    w->graph = graph_co_free(w->graph);
    w->io = loop_thread_stop(w->io);
}

static inline void everywhere(void (*body)(struct world *w))
{
    TEST_SEEDS (seed) {
        struct sim_file_setup setup = {.type = FILE_TYPE_REGULAR, .size = DISK_SIZE};
        struct world w = {.disk = sim_disk_new(), .body = body};
        struct sim_options o;

        sim_disk_make(w.disk, PATH_A, &setup);
        sim_disk_make(w.disk, PATH_B, &setup);
        sim_options_init(&o, seed);
        o.disk = w.disk;
        o.disk_max_ns = MIN(o.disk_max_ns, NS_PER_MS);
        o.inline_per_mille = 0; /* what is inline cannot hang */
        check(sim_run(&o, world_main, &w) == SIM_RETURNED);
        sim_disk_free(w.disk);
    }
}

/* ---- requests in the background ---- */

struct sent {
    struct backend *backend;
    enum request_kind kind;
    uint64_t offset;
    char fill;
    bool there; /* on the other loop */
    struct loop *loop;
    int result;
    bool done; /* atomic */
    uint64_t ended_ns;
};

/* From pool memory, as exports do (G8). */
static inline void sent_here(void *arg)
{
    struct sent *s = arg;
    struct iobuf *buf = iobuf_new(BLOCK);
    struct iovec iov = {buf->data, BLOCK};
    struct request req = {.kind = s->kind,
                          .offset = s->offset,
                          .len = BLOCK,
                          .iov = &iov,
                          .iov_count = 1,
                          .hold = buf};

    check(backend_attach(s->backend) == 0);
    memset(buf->data, s->fill, BLOCK);
    s->result = backend_co_request(s->backend, &req);
    s->ended_ns = loop_clock();
    iobuf_unref(buf);
    atomic_set(&s->done, true);
}

static inline void sent_main(void *arg)
{
    struct sent *s = arg;

    if (s->there)
        check(loop_co_call(s->loop, sent_here, s) == 0);
    else
        sent_here(s);
}

static inline void send_as(struct world *w, struct sent *s, struct backend *b,
                           enum request_kind kind, uint64_t offset, char fill)
{
    s->backend = b;
    s->kind = kind;
    s->offset = offset;
    s->fill = fill;
    s->loop = loop_thread_loop(w->io);
    s->done = false;
    check(co_scope_start(&w->scope, sent_main, s) == 0);
}

static inline void pause_for(uint64_t ns)
{
    check(co_sleep_until(loop_clock() + ns) == 0);
}

static inline void wait_done(struct sent *s)
{
    while (!atomic_get(&s->done))
        pause_for(NS_PER_MS);
}

static inline struct backend *client(struct world *w, const char *node, const char *owner)
{
    return must_attach(w->graph, node, ACCESS_RW, owner);
}

/* One block through a client of its own. */
static inline char content(struct world *w, const char *path, uint64_t offset)
{
    char c = 0;

    check(sim_disk_read(w->disk, path, offset, &c, 1) == 0);
    return c;
}

/* ---- a change that looks and waits ---- */

struct watch {
    struct change_action action;
    struct world *world;
    const char *root;
    const char *name;
    uint64_t persist_ns;
    const char *must_be_empty;     /* a filter, when it persists */
    struct sent *must_not_be_done; /* before it has committed */
    int result;
    char *text;
    bool persisted;
    bool committed;
    bool done;
    uint64_t committed_ns;
    uint64_t ended_ns;
    unsigned turn;
    unsigned *turns;
};

static inline bool is_empty(struct world *w, const char *filter)
{
    return atomic_get(&test_filter_of(graph_find(w->graph, filter))->inside) == 0;
}

static inline int watch_co_persist(struct change_action *a, struct error **err)
{
    struct watch *watch = container_of(a, struct watch, action);

    (void)err;
    watch->persisted = true;
    check(!watch->must_be_empty || is_empty(watch->world, watch->must_be_empty));
    if (watch->persist_ns && co_sleep_until(loop_clock() + watch->persist_ns) < 0)
        return error_set(err, ETIMEDOUT, "no more time to write");
    check(!watch->must_not_be_done || !atomic_get(&watch->must_not_be_done->done));
    return 0;
}

static inline void watch_commit(struct change_action *a)
{
    struct watch *watch = container_of(a, struct watch, action);

    watch->committed = true;
    watch->committed_ns = loop_clock();
    if (watch->turns)
        watch->turn = ++*watch->turns;
}

static const struct change_action_ops watch_ops = {
    .co_persist = watch_co_persist,
    .commit = watch_commit,
};

static inline void watch_main(void *arg)
{
    struct watch *watch = arg;
    AUTO(error_free) struct error *err = NULL;
    struct change c;

    change_init(&c, watch->world->graph, "%s", watch->name ? watch->name : "watching");
    check(change_add_root(&c, watch->root, &err) == 0);
    change_add_action(&c, &watch->action, &watch_ops);
    watch->result = change_co_run(&c, &err);
    if (watch->result < 0)
        watch->text = xstrdup(error_text(err));
    change_end(&c);
    watch->ended_ns = loop_clock();
    watch->done = true;
}

static inline void start_watch(struct world *w, struct watch *watch, const char *root)
{
    watch->world = w;
    watch->root = root;
    check(co_scope_start(&w->scope, watch_main, watch) == 0);
}

static inline void wait_watch(struct watch *watch)
{
    while (!watch->done)
        pause_for(NS_PER_MS);
}

static inline void must_contain(struct watch *watch, const char *text)
{
    if (!watch->text || !strstr(watch->text, text)) {
        fprintf(stderr, "'%s' does not say '%s'\n", watch->text ? watch->text : "", text);
        abort();
    }
}

/* ---- a disk that hangs ---- */

static inline void hang(struct sim_fault *f, const char *path, uint32_t ops)
{
    *f = (struct sim_fault){
        .name = path, .ops = ops, .kind = SIM_HANG, .at = 1, .times = UINT64_MAX};
    sim_fault_add(f);
}

static inline void release(struct sim_fault *f, const char *path)
{
    sim_fault_remove(f);
    check(sim_unhang(path) > 0);
}

/* Whether a node of the disk could be opened for writing now: nobody holds it so. */
static inline bool can_write(struct world *w, const char *path)
{
    AUTO(error_free) struct error *err = NULL;
    struct access alone = {.wants = ACCESS_READ | ACCESS_WRITE, .tolerates = ACCESS_READ};
    struct backend *b;
    int r;

    must_add(w->graph, "{'driver':'file','node-name':'probe','filename':'%s','locking':'on'}",
             path);
    r = backend_co_new(&b, w->graph, "probe", alone, "probe", &err);
    if (r == 0)
        backend_co_free(b);
    else
        check(r == -EAGAIN);
    must_del(w->graph, "probe");
    return r == 0;
}

#endif
