/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Backing chains in the graph (Q3): what their edges want, and that nothing which follows a chain does it by calls. Layers are of a
 * format of ours that keeps metadata; requests through chains are tested elsewhere.
 *
 *     client
 *        |
 *       l2 --- backing --- l1 --- backing --- l0
 *        |                  |                  |
 *       f2                 f1                 f0         files that guard their access
 */
#include "graph-fixture.h"
#include "graph/access-internal.h"
#include "graph/backend-internal.h"
#include "graph/change.h"
#include "graph/graph-internal.h"
#include "graph/reshape.h"
#include "loop/co.h"
#include "loop/sim/sim.h"
#include "null-co-options.h"
#include "raw-options.h"
#include "seeds.h"

#include <errno.h>
#include <stdio.h>

#define LAYERS   1000
#define NAME     32
#define DEADLINE (2 * NS_PER_S)

#define READER ((struct access){.wants = ACCESS_READ, .tolerates = ACCESS_ALL})
/* Wants that nobody changes what it reads. */
#define STRICT                                                                                     \
    ((struct access){.wants = ACCESS_READ, .tolerates = ACCESS_READ | ACCESS_WRITE_UNCHANGED})

/* ---- drivers ---- */

static unsigned told;            /* files that were told their access */
static uint64_t close_ns;        /* what the close of a layer takes */
static unsigned closing;         /* layers, with what is closed for their sake */
static const char *must_be_gone; /* when a layer closes: the one two above it */

static int file_co_open_driver(struct node *node, const void *options, struct error **err)
{
    (void)options;
    (void)err;
    node_set_size(node, 65536);
    return 0;
}

static void file_co_close_driver(struct node *node)
{
    (void)node;
}

static int file_driver_co_set_access(struct node *node, struct access access, struct error **err)
{
    (void)node;
    (void)access;
    (void)err;
    told++;
    return 0;
}

static const struct driver guard_driver = {
    .name = "null-co",
    .kind = DRIVER_PROTOCOL,
    .options = &null_co_options_type,
    .state_size = 1,
    .co_open = file_co_open_driver,
    .co_close = file_co_close_driver,
    .co_set_access = file_driver_co_set_access,
};

static int layer_co_open(struct node *node, const void *options, struct error **err)
{
    const struct raw_options *opt = options;
    const struct edge *file = node_file(node);

    if (opt) /* made by the graph: it has its file for itself before it looks at it */
        assert_int_equal(file->access.wants, ACCESS_READ | ACCESS_WRITE | ACCESS_RESIZE);
    if (opt && opt->offset)
        return error_set(err, EINVAL, "node '%s': no such header", node_name(node));
    node_set_size(node, node_size(edge_node(file)));
    return 0;
}

/* Not from within the close of what was above it. */
static void layer_co_close(struct node *node)
{
    char above[NAME];
    unsigned n;

    if (sscanf(node_name(node), "l%u", &n) == 1 && must_be_gone) {
        (void)snprintf(above, sizeof(above), "%s%u", must_be_gone, n + 2);
        assert_null(graph_find(node->graph, above));
    }
    closing++;
    assert_true(close_ns || closing == 1);
    if (close_ns)
        (void)co_sleep_until(loop_clock() + close_ns);
    else
        co_yield ();
    closing--;
}

static int layer_co_read(struct node *node, struct request *req)
{
    return edge_co_request(node_file(node), req);
}

static const struct driver layer_driver = {
    .name = "raw",
    .kind = DRIVER_FORMAT,
    .options = &raw_options_type,
    .state_size = 1,
    .keeps_metadata = true,
    .co_open = layer_co_open,
    .co_close = layer_co_close,
    .co_read = layer_co_read,
};

static const struct driver filter_driver = {
    .name = "throttle",
    .kind = DRIVER_FILTER,
    .state_size = 1,
    .co_open = layer_co_open,
    .co_close = file_co_close_driver,
};

static const struct driver *const test_drivers[] = {&guard_driver, &layer_driver, NULL};
static const struct driver *const *const drivers[] = {test_drivers, NULL};

/* ---- chains ---- */

static struct edge *must_add_backing(struct node *node, struct node *below)
{
    struct error *err = NULL;
    struct edge *e;

    below->refs++;
    e = edge_new(node, NULL, below, "backing");
    assert_int_equal(access_change(e, access_below(e), &err), 0);
    return e;
}

/* A node of this driver over a file or another node, laid over `backing` or over nothing. It is held by its maker. */
static void add_node_over(struct graph *g, const struct driver *driver, const char *name,
                          const char *file, const char *backing)
{
    struct error *err = NULL;
    struct change c;
    struct node *node;

    change_init(&c, g, "making of '%s'", name);
    assert_int_equal(change_add_root(&c, file, &err), 0);
    if (backing)
        assert_int_equal(change_add_root(&c, backing, &err), 0);
    assert_int_equal(change_co_reserve(&c, &err), 0);
    assert_int_equal(graph_co_add_filter(&c, driver, NULL, name, graph_find(g, file), &node, &err),
                     0);
    assert_int_equal(access_change(node->file, access_below(node->file), &err), 0);
    if (backing)
        (void)must_add_backing(node, graph_find(g, backing));
    change_end(&c);
}

/* Its maker lets go of it. */
static void let_go(struct graph *g, const char *name)
{
    struct error *err = NULL;
    struct change c;

    change_init(&c, g, "removal of '%s'", name);
    assert_int_equal(change_add_root(&c, name, &err), 0);
    assert_int_equal(change_co_reserve(&c, &err), 0);
    graph_find(g, name)->monitor_owned = false;
    graph_co_drop(graph_find(g, name));
    change_end(&c);
}

static const char *numbered(char *name, const char *prefix, unsigned n)
{
    (void)snprintf(name, NAME, "%s%u", prefix, n);
    return name;
}

/* Layer n over layer n-1; what is below it is held by it alone. */
static void add_layer(struct graph *g, unsigned n)
{
    char layer[NAME];
    char file[NAME];
    char below[NAME];

    must_add(g, "{'driver':'null-co','node-name':'f%u'}", n);
    add_node_over(g, &layer_driver, numbered(layer, "l", n), numbered(file, "f", n),
                  n ? numbered(below, "l", n - 1) : NULL);
    let_go(g, file);
    if (n)
        let_go(g, below);
}

static void count_node(struct node *node, void *arg)
{
    (void)node;
    ++*(unsigned *)arg;
}

static unsigned node_count(struct graph *g)
{
    unsigned n = 0;

    graph_for_each_node(g, count_node, &n);
    return n;
}

/* How many nodes a change of access would touch. */
static unsigned reach(struct edge *edge, struct access access)
{
    struct access_walk walk = {.number = 0};
    struct error *err = NULL;
    unsigned n;

    assert_int_equal(access_walk_edge(&walk, edge, access, &err), 0);
    n = walk.node_count;
    access_co_abort(&walk);
    return n;
}

static void must_conflict(struct graph *g, const char *node, struct access access, const char *text)
{
    struct error *err = NULL;
    struct backend *b;

    assert_int_equal(backend_co_new(&b, g, node, access, "job 'j'", &err), -EPERM);
    assert_string_equal(error_text(err), text);
    error_free(&err);
}

/* ---- what the edges want ---- */

static void must_be(const struct edge *e, unsigned wants, unsigned tolerates)
{
    assert_int_equal(e->access.wants, wants);
    assert_int_equal(e->access.tolerates, tolerates);
}

static void metadata(void *arg)
{
    const unsigned others = ACCESS_READ | ACCESS_WRITE_UNCHANGED;
    struct graph *g = graph_new(drivers);
    struct backend *b;
    struct node *l;

    (void)arg;
    /* As QEMU does: for writing also without users, alone also for reading. */
    add_layer(g, 0);
    l = graph_find(g, "l0");
    must_be(node_file(l), ACCESS_READ | ACCESS_WRITE | ACCESS_RESIZE, others);
    must_conflict(g, "f0", ACCESS_RW,
                  "job 'j' wants write access to node 'f0', which node 'l0' does not tolerate");
    must_conflict(g, "f0", (struct access){.wants = ACCESS_RESIZE, .tolerates = ACCESS_ALL},
                  "job 'j' wants resize access to node 'f0', which node 'l0' does not tolerate");
    must_conflict(
        g, "f0", (struct access){.wants = ACCESS_READ, .tolerates = ACCESS_READ},
        "node 'l0' wants write, resize access to node 'f0', which job 'j' does not tolerate");
    b = must_attach(g, "l0", (struct access){.wants = ACCESS_WRITE_UNCHANGED, .tolerates = 0},
                    "export 'e'");
    must_be(node_file(l), ACCESS_ALL, 0);
    backend_co_free(b);
    let_go(g, "l0");

    must_add(g, "{'driver':'null-co','node-name':'f0','read-only':true}");
    add_node_over(g, &layer_driver, "l0", "f0", NULL);
    l = graph_find(g, "l0");
    must_be(node_file(l), ACCESS_READ, others);
    must_conflict(g, "l0", ACCESS_RW, "node 'l0' is read-only");
    b = must_attach(g, "f0", READER, "export 'e'");
    backend_co_free(b);
    let_go(g, "l0");
    graph_co_free(g);
}

static void test_chain__metadata_has_its_file_for_itself(void **state)
{
    (void)state;
    on_both(metadata, NULL);
}

static void backing_edge(void *arg)
{
    const unsigned others = ACCESS_READ | ACCESS_WRITE_UNCHANGED;
    struct graph *g = graph_new(drivers);
    const struct edge *e;
    struct backend *b;

    (void)arg;
    add_layer(g, 0);
    add_layer(g, 1);
    e = node_backing(graph_find(g, "l1"));
    must_be(e, 0, ACCESS_ALL); /* nobody uses it */
    b = must_attach(g, "l1", READER, "export 'e'");
    must_be(e, ACCESS_READ, ACCESS_ALL);
    backend_co_free(b);
    must_be(e, 0, ACCESS_ALL);
    /* Who writes into a part of a cluster reads the rest from below, and nothing of it is written there. */
    b = must_attach(g, "l1", (struct access){.wants = ACCESS_WRITE | ACCESS_RESIZE, .tolerates = 0},
                    "export 'e'");
    must_be(e, ACCESS_READ, others);
    must_conflict(g, "l0", ACCESS_RW,
                  "job 'j' wants write access to node 'l0', which node 'l1' does not tolerate");
    backend_co_free(b);
    b = must_attach(g, "l1", STRICT, "export 'e'");
    must_be(e, ACCESS_READ, others);
    must_conflict(g, "l0", (struct access){.wants = ACCESS_RESIZE, .tolerates = ACCESS_ALL},
                  "job 'j' wants resize access to node 'l0', which node 'l1' does not tolerate");
    backend_co_free(b);
    b = must_attach(g, "l0", ACCESS_RW, "job 'j'");
    must_conflict(g, "l1", STRICT,
                  "job 'j' wants write access to node 'l0', which node 'l1' does "
                  "not tolerate");
    backend_co_free(b);
    let_go(g, "l1");
    graph_co_free(g);
}

static void test_chain__backing_is_read_and_changes_only_if_users_can_bear_it(void **state)
{
    (void)state;
    on_both(backing_edge, NULL);
}

static void file_is_not_backing(void *arg)
{
    struct graph *g = graph_new(drivers);
    struct edge *file;
    struct node *l;

    (void)arg;
    add_layer(g, 0);
    must_add(g, "{'driver':'null-co','node-name':'f'}");
    add_node_over(g, &layer_driver, "l", "f", "l0");
    l = graph_find(g, "l");
    file = node_file(l);
    assert_string_equal(edge_name(file), "file");
    assert_string_equal(edge_name(node_backing(l)), "backing");
    assert_true(node_backing(l)->backing && !file->backing);
    access_drop(file);
    edge_free(file)->refs--;
    assert_null(node_file(l)); /* not the one that is left */
    graph_find(g, "f")->refs++;
    file = edge_new(l, NULL, graph_find(g, "f"), "file");
    assert_ptr_equal(node_file(l), file);
    let_go(g, "l");
    let_go(g, "l0");
    must_del(g, "f");
    graph_co_free(g);
}

static void test_chain__file_is_never_the_backing_node(void **state)
{
    (void)state;
    on_both(file_is_not_backing, NULL);
}

/* The header is read with what it takes to read it, and that is given back if it is none. */
static void bad_header(void *arg)
{
    struct access alone = {.wants = ACCESS_WRITE, .tolerates = 0};
    struct graph *g = graph_new(drivers);

    (void)arg;
    must_add(g, "{'driver':'null-co','node-name':'f'}");
    must_refuse(EINVAL, "node 'l': no such header", g,
                "{'driver':'raw','node-name':'l','file':'f','offset':1}");
    backend_co_free(must_attach(g, "f", alone, "export 'e'"));
    graph_co_free(g);
}

static void test_chain__node_that_cannot_open_gives_back_its_file(void **state)
{
    (void)state;
    on_both(bad_header, NULL);
}

/* ---- long ones ---- */

static void thousand(void *arg)
{
    struct graph *g = graph_new(drivers);
    struct error *err = NULL;
    char name[NAME];
    struct change c;
    struct backend *b;
    struct backend *d;

    (void)arg;
    for (unsigned n = 0; n < LAYERS; n++) {
        told = 0;
        add_layer(g, n);
        assert_int_equal(told, 1); /* its own file */
    }
    assert_int_equal(node_count(g), 2 * LAYERS);
    assert_int_equal(node_depth_below(graph_find(g, numbered(name, "l", LAYERS - 1))), 2);
    assert_int_equal(node_depth_above(graph_find(g, "f0")), 2);

    /* The first one who reads goes all the way, the others do not; what is strict goes all the way again. */
    told = 0;
    b = must_attach(g, name, ACCESS_NONE, "export 'e'");
    assert_int_equal(reach(b->root, ACCESS_NONE), 1);
    assert_int_equal(reach(b->root, READER), LAYERS);
    assert_int_equal(access_change(b->root, ACCESS_RW, &err), 0);
    assert_int_equal(reach(b->root, READER), 1);
    d = must_attach(g, name, READER, "export 'd'");
    assert_int_equal(reach(d->root, STRICT), 1 + LAYERS - 1);
    assert_int_equal(told, 0); /* the files are held as before */
    backend_co_free(d);
    backend_co_free(b);
    b = must_attach(g, name, STRICT, "export 'e'");
    must_conflict(g, "l0", ACCESS_RW,
                  "job 'j' wants write access to node 'l0', which node 'l1' does not tolerate");

    /* A change at both ends, with the gate above closed meanwhile. */
    change_init(&c, g, "change");
    assert_int_equal(change_add_root(&c, "f0", &err), 0);
    assert_int_equal(change_add_root(&c, name, &err), 0);
    assert_int_equal(change_co_run(&c, &err), 0);
    assert_string_equal(node_reserved_by(graph_find(g, "l500")), "change");
    change_end(&c);
    assert_null(node_reserved_by(graph_find(g, "l500")));
    backend_co_free(b);

    must_be_gone = "l";
    let_go(g, name);
    must_be_gone = NULL;
    assert_int_equal(node_count(g), 0);
    graph_co_free(g);
}

static void test_chain__of_a_thousand_is_walked_and_closed_without_recursion(void **state)
{
    (void)state;
    on_both(thousand, NULL);
}

/* D4: the walk needs memory, and gives back what it has marked when there is none. */
static void no_memory(void *arg)
{
    struct graph *g = graph_new(drivers);
    struct error *err = NULL;
    struct backend *b;
    unsigned k;

    (void)arg;
    for (unsigned n = 0; n < 40; n++)
        add_layer(g, n);
    b = must_attach(g, "l39", ACCESS_NONE, "export 'e'");
    for (k = 1; k < 100; k++) {
        int r;

        alloc_fail_at(0);
        alloc_fail_at(k);
        r = access_change(b->root, STRICT, &err);
        alloc_fail_at(0);
        if (r == 0)
            break;
        assert_int_equal(r, -ENOMEM);
        must_say(err, "no memory");
        error_free(&err);
        assert_int_equal(b->root->access.wants, 0);
        assert_int_equal(node_backing(graph_find(g, "l1"))->access.wants, 0);
        assert_int_equal(reach(b->root, READER), 40); /* all are as they were */
    }
    assert_in_range(k, 4, 99);
    /* Who goes needs none. */
    alloc_fail_at(1);
    access_drop(b->root);
    alloc_fail_at(0);
    assert_int_equal(node_backing(graph_find(g, "l1"))->access.wants, 0);
    backend_co_free(b);
    let_go(g, "l39");
    graph_co_free(g);
}

static void test_chain__lack_of_memory_changes_nothing(void **state)
{
    (void)state;
    on_both(no_memory, NULL);
}

/* As many names as there are nodes. */
static void many_roots(void *arg)
{
    struct graph *g = graph_new(drivers);
    static char names[100][NAME];
    struct error *err = NULL;
    struct change c;
    unsigned failed = 0;

    (void)arg;
    change_init(&c, g, "change of many");
    for (unsigned n = 0; n < ARRAY_SIZE(names); n++) {
        must_add(g, "{'driver':'null-co','node-name':'f%u'}", n);
        alloc_fail_at(1);
        if (change_add_root(&c, numbered(names[n], "f", n), &err) < 0) {
            must_say(err, "change of many: no memory for the names of");
            error_free(&err);
            failed++;
            alloc_fail_at(0);
            assert_int_equal(change_add_root(&c, names[n], &err), 0);
        }
        alloc_fail_at(0);
    }
    assert_in_range(failed, 2, 10); /* it grows in steps */
    assert_int_equal(change_co_run(&c, &err), 0);
    for (unsigned n = 0; n < ARRAY_SIZE(names); n++)
        assert_string_equal(node_reserved_by(graph_find(g, names[n])), "change of many");
    change_end(&c);
    graph_co_free(g);
}

static void test_chain__change_may_begin_at_any_number_of_nodes(void **state)
{
    (void)state;
    on_both(many_roots, NULL);
}

/* Only what calls each other counts. */
static void depth(void *arg)
{
    struct graph *g = graph_new(drivers);
    char name[NAME];
    char below[NAME] = "f0";

    (void)arg;
    for (unsigned n = 0; n < 40; n++)
        add_layer(g, n);
    for (unsigned n = 0; n < 30; n++) { /* filters over the chain */
        add_node_over(g, &filter_driver, numbered(name, "over", n), n ? below : "l39", NULL);
        if (n)
            let_go(g, below);
        (void)snprintf(below, sizeof(below), "%s", name);
    }
    let_go(g, "l39");
    assert_int_equal(node_depth_below(graph_find(g, "over29")), 32);
    assert_int_equal(node_depth_above(graph_find(g, "f0")), 32);
    assert_int_equal(node_depth_above(graph_find(g, "l0")), 31);
    /* A filter between layers is called, and calls. */
    must_add(g, "{'driver':'null-co','node-name':'f'}");
    add_node_over(g, &layer_driver, "l", "f", "over29");
    assert_int_equal(node_depth_below(graph_find(g, "l")), 32);
    let_go(g, "l");
    let_go(g, "over29");
    must_del(g, "f");
    assert_int_equal(node_count(g), 0);
    graph_co_free(g);
}

static void test_chain__only_calls_make_depth(void **state)
{
    (void)state;
    on_both(depth, NULL);
}

/* ---- closing what does not close ---- */

static void count_orphan(const struct node *node, uint64_t age_ns, unsigned unresolved, void *arg)
{
    (void)node;
    (void)age_ns;
    (void)unresolved;
    ++*(unsigned *)arg;
}

static void slow_close(void *arg)
{
    struct graph *g = graph_new(drivers);
    unsigned orphans = 0;
    uint64_t began;

    (void)arg;
    graph_set_change_deadline(g, DEADLINE);
    for (unsigned n = 0; n < 10; n++)
        add_layer(g, n);
    close_ns = 5 * DEADLINE;
    began = loop_clock();
    let_go(g, "l9");
    assert_true(loop_clock() - began <= DEADLINE + NS_PER_S); /* one for all of them */
    assert_null(graph_find(g, "l9"));
    graph_for_each_orphan(g, count_orphan, &orphans);
    assert_int_equal(orphans, 1); /* it will let go of the others when it is closed */
    assert_non_null(graph_find(g, "l8"));
    for (unsigned n = 0; n < 10; n++)
        assert_int_equal(co_sleep_until(loop_clock() + close_ns), 0);
    assert_int_equal(node_count(g), 0);
    orphans = 0;
    graph_for_each_orphan(g, count_orphan, &orphans);
    assert_int_equal(orphans, 0);
    close_ns = 0;
    graph_co_free(g);
}

static void test_chain__that_does_not_close_is_left_at_one_deadline(void **state)
{
    (void)state;
    TEST_SEEDS (seed) {
        struct sim_options o;

        sim_options_init(&o, seed);
        assert_int_equal(sim_run(&o, slow_close, NULL), SIM_RETURNED);
    }
}
