/* SPDX-License-Identifier: Apache-2.0 */
/*
 * D4: whatever fails in a change, the graph is as before or as after it. For each kind of change k walks over every operation
 * on the disk and every allocation that can fail, for each way to fail: EIO, ENOSPC, ENOMEM, a hang, a power cut.
 *
 *     client        client
 *        |             |
 *       top           (header node: its own metadata, two slots and a checksum, as formats have them)
 *        |             |
 *       disk          meta          files
 */
#include "base/alloc.h"
#include "graph-fixture.h"
#include "graph/change.h"
#include "graph/node-internal.h"
#include "graph/reshape.h"
#include "loop/sim/sim.h"
#include "protocols/list.h"
#include "seeds.h"
#include "test-filter.h"

#include <stdio.h>

#define DISK      "/d/disk.img"
#define META      "/d/meta.img"
#define DISK_SIZE ((uint64_t)256 << 10)
#define BLOCK     ((uint64_t)4096)
#define DEADLINE  (2 * NS_PER_S)
#define SLACK     (200 * NS_PER_MS)
#define TABLE_AT  ((uint64_t)8192) /* what a new header points to */
#define MAGIC     0x6d6177u

static const struct driver *const test_drivers[] = {&test_filter_driver, NULL};
static const struct driver *const *const drivers[] = {test_drivers, protocol_drivers, NULL};

/* ---- an action with metadata ---- */

struct header {
    uint32_t magic;
    uint32_t state; /* 0: old, 1: new */
    uint32_t sum;
};

struct header_action {
    struct change_action action;
    struct backend *backend; /* at meta, for the access */
    void *room;
    bool committed;
};

static int meta_request(struct header_action *h, enum request_kind kind, uint64_t offset,
                        const void *data, size_t len)
{
    struct iobuf *buf = iobuf_new(BLOCK);
    struct iovec iov = {buf ? buf->data : NULL, BLOCK};
    struct request req = {
        .kind = kind,
        .offset = offset,
        .len = kind == REQUEST_FLUSH ? 0 : BLOCK,
        .iov = &iov,
        .iov_count = kind == REQUEST_FLUSH ? 0 : 1,
        .hold = buf,
        .pass = action_pass(&h->action),
    };
    int r;

    if (!buf)
        return -ENOMEM;
    memset(buf->data, 0, BLOCK);
    if (len)
        memcpy(buf->data, data, len);
    r = backend_co_request(h->backend, &req);
    iobuf_unref(buf);
    return r;
}

static int write_header(struct header_action *h, uint32_t state)
{
    struct header header = {.magic = MAGIC, .state = state, .sum = MAGIC ^ state};
    int r = meta_request(h, REQUEST_WRITE, 0, &header, sizeof(header));

    return r < 0 ? r : meta_request(h, REQUEST_FLUSH, 0, NULL, 0);
}

static int header_co_prepare(struct change_action *a, struct error **err)
{
    struct header_action *h = container_of(a, struct header_action, action);

    h->room = try_alloc(1, BLOCK);
    return h->room ? 0 : error_set(err, ENOMEM, "no memory");
}

/* D2: what the header points to is durable before it points there. */
static int header_co_persist(struct change_action *a, struct error **err)
{
    struct header_action *h = container_of(a, struct header_action, action);
    int r;

    memset(h->room, 'N', BLOCK);
    r = meta_request(h, REQUEST_WRITE, TABLE_AT, h->room, BLOCK);
    if (r == 0)
        r = meta_request(h, REQUEST_FLUSH, 0, NULL, 0);
    if (r == 0)
        r = write_header(h, 1);
    return r < 0 ? error_set(err, -r, "cannot write the header: %s", strerror(-r)) : 0;
}

static int header_co_undo(struct change_action *a, struct error **err)
{
    (void)err;
    return write_header(container_of(a, struct header_action, action), 0);
}

static void header_commit(struct change_action *a)
{
    container_of(a, struct header_action, action)->committed = true;
}

static void header_co_end(struct change_action *a)
{
    free(container_of(a, struct header_action, action)->room);
}

static const struct change_action_ops header_ops = {
    .co_prepare = header_co_prepare,
    .co_persist = header_co_persist,
    .co_undo = header_co_undo,
    .commit = header_commit,
    .co_abort = header_co_end,
    .co_finish = header_co_end,
};

/* ---- the changes ---- */

enum kind { REPLACE, RESIZE, GUARD, HEADER, BOTH, KINDS };

struct world {
    struct graph *graph;
    struct sim_disk *disk;
    struct backend *client;
    struct backend *meta;
    enum kind kind;
};

static int change_with_header(struct world *w, bool replace, bool *ret_committed,
                              struct error **err)
{
    struct header_action h = {.backend = w->meta};
    struct replace_action rp;
    struct change c;
    int r;

    change_init(&c, w->graph, "two at once");
    r = change_add_root(&c, "meta", err);
    if (r == 0)
        r = change_add_root(&c, "disk", err);
    if (r == 0)
        r = change_add_root(&c, "top", err);
    if (r == 0) {
        h.action.node = graph_find(w->graph, "meta");
        change_add_action(&c, &h.action, &header_ops);
        if (replace)
            replace_action_add(&c, &rp, graph_find(w->graph, "disk"), graph_find(w->graph, "top"));
        r = change_co_run(&c, err);
    }
    change_end(&c);
    *ret_committed = h.committed;
    check(h.committed == (r == 0));
    return r;
}

static int find_guarded(struct change_action *a, struct error **err);

static const struct change_action_ops find_ops = {.co_prepare = find_guarded};

/* As when bitmaps come and go (I5): two guards more and one less, of a node whose driver locks. */
struct guards {
    struct change_action find;
    struct guard_action each[3];
};

static int find_guarded(struct change_action *a, struct error **err)
{
    struct guards *guards = container_of(a, struct guards, find);

    for (unsigned i = 0; i < ARRAY_SIZE(guards->each); i++) {
        int r = graph_need(a->change->graph, "disk", &guards->each[i].node, err);

        if (r < 0)
            return r;
    }
    return 0;
}

static int change_guards(struct world *w, struct error **err)
{
    struct guards guards = {.find = {.node = NULL}};
    struct change c;
    int r;

    change_init(&c, w->graph, "guarding");
    r = change_add_root(&c, "disk", err);
    if (r == 0) {
        change_add_action(&c, &guards.find, &find_ops);
        for (unsigned i = 0; i < ARRAY_SIZE(guards.each); i++)
            guard_action_add(&c, &guards.each[i], i == 1 ? -1 : 1);
        r = change_co_run(&c, err);
    }
    change_end(&c);
    return r;
}

static int run_change(struct world *w, struct error **err)
{
    bool committed;

    switch (w->kind) {
    case REPLACE:
        return graph_co_replace(w->graph, "disk", "top", err);
    case RESIZE:
        return graph_co_resize(w->graph, "disk", DISK_SIZE * 2, err);
    case GUARD:
        return change_guards(w, err);
    case HEADER:
    case BOTH:
        return change_with_header(w, w->kind == BOTH, &committed, err);
    case KINDS:
        break;
    }
    return -EINVAL;
}

/* ---- what can be seen of a graph ---- */

struct text {
    char s[4096];
    size_t len;
};

static void say(struct text *t, const char *fmt, ...) PRINTF_LIKE(2, 3);

static void say(struct text *t, const char *fmt, ...)
{
    va_list args;

    va_start(args, fmt);
    t->len += (size_t)vsnprintf(t->s + t->len, sizeof(t->s) - t->len, fmt, args);
    va_end(args);
    check(t->len < sizeof(t->s));
}

static void say_edge(const struct node *parent, const struct edge *e, struct access access,
                     void *arg)
{
    (void)parent;
    check(!e->is_pending && !e->moving_to);
    say(arg, "  %s -> %s %u %u\n", edge_name(e), node_name(edge_node(e)), access.wants,
        access.tolerates);
}

static void say_node(struct node *node, void *arg)
{
    check(!node->reserved_by && list_empty(&node->arriving));
    say(arg, "%s size %llu refs %u wants %u tolerates %u guards %u\n", node->name,
        (unsigned long long)node->size, node->refs, node->access.wants, node->access.tolerates,
        node->guards);
    node_for_each_child(node, say_edge, arg);
}

static void say_backend(const struct backend *b, void *arg)
{
    struct gate_picture p;

    backend_gate_picture(b, &p);
    check(!backend_is_closed(b) && !p.inside && !p.queued);
    say(arg, "%s at %s\n", backend_owner(b), node_name(backend_node(b)));
}

static void say_all(struct world *w, struct text *t)
{
    t->len = 0;
    graph_for_each_node(w->graph, say_node, t);
    graph_for_each_backend(w->graph, say_backend, t);
}

/* Valid, and pointing to what is there: which state. */
static uint32_t header_state(struct sim_disk *d)
{
    struct header h;
    char table;

    check(sim_disk_read(d, META, 0, &h, sizeof(h)) == 0);
    check(h.magic == MAGIC && h.sum == (MAGIC ^ h.state));
    for (uint64_t i = 0; i < BLOCK && h.state; i++) {
        check(sim_disk_read(d, META, TABLE_AT + i, &table, 1) == 0);
        check(table == 'N');
    }
    return h.state;
}

/* ---- one fault ---- */

enum fault_way { FAULT_EIO, FAULT_ENOSPC, FAULT_HANG, FAULT_MEMORY, FAULT_WAYS };

struct attempt {
    struct world *world;
    enum fault_way way;
    unsigned k;
    bool struck; /* k was not past the end */
};

static struct sim_fault fault_of(const struct attempt *a)
{
    struct sim_fault f = {
        .ops = SIM_ANY_OP,
        .kind = a->way == FAULT_HANG ? SIM_HANG : SIM_ERROR,
        .error = a->way == FAULT_EIO ? EIO : ENOSPC,
        .at = a->k,
    };

    return f;
}

static void open_all(struct world *w)
{
    w->graph = graph_new(drivers);
    graph_set_change_deadline(w->graph, DEADLINE);
    must_add(w->graph, "{'driver':'file','node-name':'disk','filename':'%s','locking':'on'}", DISK);
    must_add(w->graph, "{'driver':'file','node-name':'meta','filename':'%s','locking':'on'}", META);
    must_add(w->graph, "{'driver':'raw','node-name':'top','file':'disk'}");
    w->client = must_attach(w->graph, "disk", ACCESS_RW, "client");
    w->meta = must_attach(w->graph, "meta", ACCESS_RW, "format");
}

static void close_all(struct world *w)
{
    w->client = backend_co_free(w->client);
    w->meta = backend_co_free(w->meta);
    w->graph = graph_co_free(w->graph);
}

/* Client data as it should be, and written to. */
static void check_io(struct world *w, char expected, char next)
{
    char data[512];

    check(read_at(w->client, BLOCK, sizeof(data), data) == 0);
    for (unsigned i = 0; i < sizeof(data); i++)
        check(data[i] == expected);
    memset(data, next, sizeof(data));
    check(write_at(w->client, BLOCK, sizeof(data), data) == 0);
}

static void check_after(struct attempt *a, int r, const struct text *before)
{
    struct world *w = a->world;
    bool needs_reopen =
        graph_find(w->graph, "meta")->needs_reopen || graph_find(w->graph, "disk")->needs_reopen;
    struct text after;

    say_all(w, &after);
    if (r < 0 && strcmp(before->s, after.s) != 0) {
        fprintf(stderr, "before:\n%safter:\n%s", before->s, after.s);
        abort();
    }
    check(r < 0 || strcmp(before->s, after.s) != 0 || w->kind == HEADER);
    if (!needs_reopen && w->kind >= HEADER)
        check(header_state(w->disk) == (r == 0));
    check_io(w, 'c', 'd');
    check_io(w, 'd', 'c');
}

/* The same again works, or says why it cannot. */
static void check_again(struct attempt *a, int r)
{
    AUTO(error_free) struct error *err = NULL;
    struct world *w = a->world;
    bool needs_reopen =
        graph_find(w->graph, "meta")->needs_reopen || graph_find(w->graph, "disk")->needs_reopen;

    if (r == 0)
        return;
    r = run_change(w, &err);
    if (needs_reopen)
        check(r == -EIO && strstr(error_text(err), "must be opened anew"));
    else
        check(r == 0);
}

static void attempt_main(void *arg)
{
    struct attempt *a = arg;
    struct world *w = a->world;
    struct sim_fault fault = fault_of(a);
    AUTO(error_free) struct error *err = NULL;
    struct text before;
    uint64_t began;
    int r;

    open_all(w);
    check_io(w, 'c', 'c');
    say_all(w, &before);
    began = loop_clock();
    if (a->way == FAULT_MEMORY)
        alloc_fail_at(a->k);
    else
        sim_fault_add(&fault);
    r = run_change(w, &err);
    if (a->way == FAULT_MEMORY) {
        a->struck = alloc_fail_at(0) >= a->k;
    } else {
        a->struck = fault.fired > 0;
        sim_fault_remove(&fault);
    }
    check(loop_clock() - began <= 2 * DEADLINE + SLACK);
    check(a->struck || r == 0);
    check(r == 0 || error_text(err)[0]);
    (void)sim_unhang(NULL);
    check(co_sleep_until(loop_clock() + SLACK) == 0);
    check_after(a, r, &before);
    check_again(a, r);
    close_all(w);
}

static void make_disk(struct sim_disk *d)
{
    struct sim_file_setup setup = {.type = FILE_TYPE_REGULAR, .size = DISK_SIZE};
    struct header h = {.magic = MAGIC, .state = 0, .sum = MAGIC};
    char data[512];

    sim_disk_make(d, DISK, &setup);
    sim_disk_make(d, META, &setup);
    memset(data, 'c', sizeof(data));
    sim_disk_write(d, DISK, BLOCK, data, sizeof(data));
    sim_disk_write(d, META, 0, &h, sizeof(h));
}

static void calm_options(struct sim_options *o, uint64_t seed, struct sim_disk *d)
{
    sim_options_init(o, seed);
    o->disk = d;
    o->disk_max_ns = MIN(o->disk_max_ns, NS_PER_MS);
    o->inline_per_mille = 0; /* what is inline cannot hang */
}

static void walk(enum kind kind, enum fault_way way, uint64_t seed)
{
    bool struck = true;

    for (unsigned k = 1; struck; k++) {
        struct sim_disk *d = sim_disk_new();
        struct world w = {.disk = d, .kind = kind};
        struct attempt a = {.world = &w, .way = way, .k = k};
        struct sim_options o;

        make_disk(d);
        calm_options(&o, seed, d);
        check(sim_run(&o, attempt_main, &a) == SIM_RETURNED);
        sim_disk_free(d);
        struck = a.struck;
        check(k < 200);
    }
}

static void walk_all(enum fault_way way)
{
    TEST_SEEDS (seed) {
        for (unsigned kind = 0; kind < KINDS; kind++)
            walk((enum kind)kind, way, seed);
    }
}

static void test_change_k_walk__eio(void **state)
{
    (void)state;
    walk_all(FAULT_EIO);
}

static void test_change_k_walk__enospc(void **state)
{
    (void)state;
    walk_all(FAULT_ENOSPC);
}

static void test_change_k_walk__hang(void **state)
{
    (void)state;
    walk_all(FAULT_HANG);
}

static void test_change_k_walk__enomem(void **state)
{
    (void)state;
    walk_all(FAULT_MEMORY);
}

/* ---- power cuts ---- */

struct cut {
    struct world *world;
    uint64_t ops_before; /* the change begins after so many */
};

static void cut_main(void *arg)
{
    struct cut *c = arg;
    AUTO(error_free) struct error *err = NULL;

    open_all(c->world);
    c->ops_before = sim_disk_ops(c->world->disk);
    check(run_change(c->world, &err) == 0);
    close_all(c->world);
}

static void reopen_main(void *arg)
{
    struct cut *c = arg;

    open_all(c->world);
    check_io(c->world, 'c', 'c');
    close_all(c->world);
}

static void test_change_k_walk__power_cut(void **state)
{
    (void)state;
    TEST_SEEDS (seed) {
        for (unsigned kind = 0; kind < KINDS; kind++) {
            enum sim_end end = SIM_KILLED;
            uint64_t first = 1;

            for (uint64_t k = 1; end == SIM_KILLED; k++) {
                struct sim_disk *d = sim_disk_new();
                struct world w = {.disk = d, .kind = (enum kind)kind};
                struct cut c = {.world = &w};
                struct sim_options o;

                make_disk(d);
                calm_options(&o, seed, d);
                o.may_end_early = true;
                o.kill_at_op = k == 1 ? 0 : first + k;
                end = sim_run(&o, cut_main, &c);
                if (k == 1) {
                    first = c.ops_before;
                    end = SIM_KILLED;
                }
                sim_disk_power_cut(d, seed * 1000 + k);
                (void)header_state(d); /* valid, old or new */
                calm_options(&o, seed, d);
                check(sim_run(&o, reopen_main, &c) == SIM_RETURNED);
                sim_disk_free(d);
            }
        }
    }
}
