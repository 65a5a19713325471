/* SPDX-License-Identifier: Apache-2.0 */
/* The graph: names, nodes with inline children, what they inherit, and reservations. */
#include "file-options.h"
#include "formats/list.h"
#include "graph-fixture.h"
#include "graph/change.h"
#include "loop/sim/sim.h"
#include "protocols/list.h"
#include "seeds.h"

#include <errno.h>
#include <stdio.h>

static const struct driver *const *const drivers[] = {protocol_drivers, format_drivers, NULL};
static const struct driver *const *const only_protocols[] = {protocol_drivers, NULL};

static void under_sim(co_entry_fn *body)
{
    TEST_SEEDS (seed) {
        struct sim_options o;

        sim_options_init(&o, seed);
        assert_int_equal(sim_run(&o, body, NULL), SIM_RETURNED);
    }
}

struct names {
    char text[512];
};

static void add_name(struct node *node, void *arg)
{
    struct names *n = arg;

    strcat(strcat(n->text, " "), node_name(node));
}

/* All nodes, the youngest first. */
static void must_have(struct graph *g, const char *names)
{
    struct names n = {.text = ""};

    graph_for_each_node(g, add_name, &n);
    assert_string_equal(n.text, names);
}

/* ---- adding ---- */

static void add_wrong_things(void *arg)
{
    struct graph *g = graph_new(drivers);

    (void)arg;
    must_add(g, "{'driver':'null-co','node-name':'n'}");
    must_refuse(EINVAL, "a node needs a node-name", g, "{'driver':'null-co'}");
    must_refuse(EEXIST, "there is a node 'n' already", g, "{'driver':'null-co','node-name':'n'}");
    must_refuse(ENOENT, "there is no node 'x'", g, "{'driver':'raw','node-name':'r','file':'x'}");
    must_refuse(EINVAL, "node 'r': force-share needs read-only", g,
                "{'driver':'raw','node-name':'r','file':'n','force-share':true}");
    /* A child's failure says whose child it is; and nothing stays. */
    must_refuse(ENOENT, "node 'r': child 'file': cannot open node", g,
                "{'driver':'raw','node-name':'r','file':{'driver':'file','filename':'/nowhere'}}");
    must_refuse(EINVAL, "end beyond", g,
                "{'driver':'raw','node-name':'r','size':2048,"
                "'file':{'driver':'null-co','node-name':'c','size':1024}}");
    must_refuse(EEXIST, "there is a node 'r' already", g,
                "{'driver':'raw','node-name':'r','file':{'driver':'null-co','node-name':'r'}}");
    must_have(g, " n");
    graph_co_free(g);

    g = graph_new(only_protocols);
    must_refuse(ENOTSUP, "driver 'raw' is not part of this program", g,
                "{'driver':'raw','node-name':'r','file':{'driver':'null-co'}}");
    must_have(g, "");
    graph_co_free(g);
}

static void test_graph__refuses_what_is_wrong_and_keeps_nothing_of_it(void **state)
{
    (void)state;
    under_sim(add_wrong_things);
}

/* Q3: requests go down by calls, so that what lies on top of each other is bounded. */
static void stack_up(void *arg)
{
    struct graph *g = graph_new(drivers);

    (void)arg;
    must_add(g, "{'driver':'null-co','node-name':'n0'}");
    for (unsigned i = 1; i < 64; i++)
        must_add(g, "{'driver':'raw','node-name':'n%u','file':'n%u'}", i, i - 1);
    must_refuse(EINVAL, "on top of more than 63 others", g,
                "{'driver':'raw','node-name':'n64','file':'n63'}");
    graph_co_free(g);
}

static void test_graph__depth_is_bounded(void **state)
{
    (void)state;
    on_both(stack_up, NULL);
}

static void inline_children(void *arg)
{
    struct graph *g = graph_new(drivers);
    struct error *err = NULL;

    (void)arg;
    must_add(g, "{'driver':'null-co','node-name':'n'}");
    must_add(g, "{'driver':'raw','node-name':'a','file':{'driver':'raw','node-name':'b',"
                "'file':{'driver':'null-co'}}}");
    must_add(g, "{'driver':'raw','node-name':'c','file':'n'}");
    must_have(g, " c #block000 b a n");
    assert_int_equal(graph_co_del(g, "b", &err), -EBUSY);
    must_say(err, "node 'b' is in use by node 'a'");
    error_free(&err);
    assert_int_equal(graph_co_del(g, "n", &err), -EBUSY);
    must_say(err, "node 'n' is in use by node 'c'");
    error_free(&err);
    assert_int_equal(graph_co_del(g, "nothing", &err), -ENOENT);
    must_say(err, "there is no node 'nothing'");
    error_free(&err);
    must_del(g, "a");
    must_have(g, " c n"); /* the inline ones went with it */
    must_del(g, "c");
    must_have(g, " n"); /* the named one did not */
    must_del(g, "n");
    must_have(g, "");
    graph_co_free(g);
}

static void test_graph__inline_children_come_and_go_with_their_parent(void **state)
{
    (void)state;
    under_sim(inline_children);
}

static void in_use(void *arg)
{
    struct graph *g = graph_new(drivers);
    struct error *err = NULL;
    struct backend *b;

    (void)arg;
    must_add(g, "{'driver':'null-co','node-name':'n'}");
    b = must_attach(g, "n", ACCESS_RW, "export 'e'");
    assert_int_equal(graph_co_del(g, "n", &err), -EBUSY);
    must_say(err, "node 'n' is in use by export 'e'");
    error_free(&err);
    backend_co_free(b);
    must_del(g, "n");
    must_refuse(ENOENT, "there is no node 'n'", g, "{'driver':'raw','node-name':'r','file':'n'}");
    graph_co_free(g);
}

static void test_graph__node_in_use_stays_and_its_user_is_named(void **state)
{
    (void)state;
    under_sim(in_use);
}

static void inherit(void *arg)
{
    struct graph *g = graph_new(drivers);
    const struct node_settings *s;

    (void)arg;
    must_add(g, "{'driver':'null-co','node-name':'n'}");
    must_add(g, "{'driver':'raw','node-name':'a','read-only':true,'auto-read-only':true,"
                "'force-share':true,'cache':{'direct':true,'no-flush':true},'discard':'unmap',"
                "'file':{'driver':'null-co','node-name':'b'}}");
    s = node_settings(graph_find(g, "b"));
    assert_true(s->read_only && s->auto_read_only && s->force_share && s->direct && s->no_flush &&
                s->unmap);
    /* Its own words are stronger, one by one. */
    must_add(
        g,
        "{'driver':'raw','node-name':'c','read-only':true,'cache':{'direct':true,'no-flush':true},"
        "'discard':'unmap','file':{'driver':'null-co','node-name':'d','read-only':false,"
        "'cache':{'no-flush':false},'discard':'ignore'}}");
    s = node_settings(graph_find(g, "d"));
    assert_true(!s->read_only && s->direct && !s->no_flush && !s->unmap);
    /* A child that was there before has nothing to do with it. */
    must_add(g, "{'driver':'raw','node-name':'e','read-only':true,'discard':'unmap','file':'n'}");
    s = node_settings(graph_find(g, "n"));
    assert_true(!s->read_only && !s->unmap);
    graph_co_free(g);
}

static void test_graph__inline_children_inherit_what_they_do_not_say(void **state)
{
    (void)state;
    under_sim(inherit);
}

/* D4: each allocation that prepare makes fails once. */
static void no_memory(void *arg)
{
    struct graph *g = graph_new(drivers);
    unsigned k;

    (void)arg;
    for (k = 1; k < 100; k++) {
        struct error *err = NULL;
        int r;

        alloc_fail_at(0);
        alloc_fail_at(k);
        r = add_node(
            g, &err,
            "{'driver':'raw','node-name':'a','file':{'driver':'null-co','node-name':'b'}}");
        alloc_fail_at(0);
        if (r == 0)
            break;
        assert_int_equal(r, -ENOMEM);
        error_free(&err);
        must_have(g, "");
    }
    assert_true(k > 1 && k < 100);
    must_have(g, " b a");
    graph_co_free(g);
}

static void test_graph__lack_of_memory_leaves_nothing_behind(void **state)
{
    (void)state;
    on_both(no_memory, NULL);
}

/* ---- children that may be declined ---- */

/* Goes under the name of `file`; where that has its path, it has a child that may be declined. */
static int lidded_co_open(struct node *node, const void *options, struct error **err)
{
    (void)options;
    (void)err;
    node_set_size(node, 4096);
    return 0;
}

static void lidded_co_close(struct node *node)
{
    (void)node;
}

static const struct schema_member lidded_members[] = {
    {
        .name = "lower",
        .type = &node_ref_or_null_type,
        .offset = offsetof(struct file_options, filename),
        .flag_offset = SCHEMA_NO_FLAG,
        .presence = SCHEMA_OPTIONAL,
        .indirect = true,
    },
};

static const struct schema_type lidded_type = {
    .name = "lidded",
    .kind = SCHEMA_STRUCT,
    .size = sizeof(struct file_options),
    .count = 1,
    .members = lidded_members,
};

static const struct driver lidded_driver = {
    .name = "file",
    .kind = DRIVER_FORMAT,
    .state_size = 1,
    .options = &lidded_type,
    .co_open = lidded_co_open,
    .co_close = lidded_co_close,
};

static void count_child(const struct node *parent, const struct edge *edge, struct access access,
                        void *arg)
{
    unsigned *count = arg;

    (void)parent;
    (void)edge;
    (void)access;
    ++*count;
}

/* How many children a node with this word on its child gets. */
static unsigned children_with(struct graph *g, struct node_ref_or_null *lower)
{
    struct node_options o = {.driver = NODE_DRIVER_FILE, .node_name = (char[]){"lid"}};
    struct error *err = NULL;
    unsigned count = 0;

    memcpy(&o.u.file.filename, &lower, sizeof(lower));
    if (graph_co_add(g, &o, &err) < 0)
        fail_msg("%s", error_text(err));
    node_for_each_child(graph_find(g, "lid"), count_child, &count);
    must_del(g, "lid");
    return count;
}

static void decline_children(void *arg)
{
    static const struct driver *const lidded[] = {&lidded_driver, NULL};
    static const struct driver *const *const both[] = {lidded, protocol_drivers, NULL};
    struct graph *g = graph_new(both);
    struct node_options inline_child = {.driver = NODE_DRIVER_NULL_CO, .u.null_co.size = 512};
    struct node_ref_or_null null = {.kind = NODE_REF_OR_NULL_NULL};
    struct node_ref_or_null empty = {.kind = NODE_REF_OR_NULL_NAME, .name = (char[]){""}};
    struct node_ref_or_null name = {.kind = NODE_REF_OR_NULL_NAME, .name = (char[]){"n"}};
    struct node_ref_or_null definition = {
        .kind = NODE_REF_OR_NULL_DEFINITION,
        .definition = &inline_child,
    };

    (void)arg;
    must_add(g, "{'driver':'null-co','node-name':'n'}");
    assert_int_equal(children_with(g, NULL), 0);
    assert_int_equal(children_with(g, &null), 0);
    assert_int_equal(children_with(g, &empty), 0);
    assert_int_equal(children_with(g, &name), 1);
    assert_int_equal(children_with(g, &definition), 1);
    must_have(g, " n");
    graph_co_free(g);
}

static void test_graph__child_is_made_unless_it_is_declined(void **state)
{
    (void)state;
    on_both(decline_children, NULL);
}

/* ---- reservations (G5) ---- */

struct deleter {
    struct graph *graph;
    const char *node;
    int result;
    char text[200];
    unsigned order;
    unsigned *next_order;
};

static void delete_node(void *arg)
{
    struct deleter *d = arg;
    struct error *err = NULL;

    d->result = 1;
    d->result = graph_co_del(d->graph, d->node, &err);
    if (err)
        (void)snprintf(d->text, sizeof(d->text), "%s", error_text(err));
    error_free(&err);
    if (d->next_order)
        d->order = (*d->next_order)++;
}

/* Something that takes long holds 'r', and so 'n' below it. */
static void hold(struct change *c, struct graph *g, const char *node)
{
    struct error *err = NULL;

    change_init(c, g, "work on '%s'", node);
    assert_int_equal(change_add_root(c, node, &err), 0);
    assert_int_equal(change_co_reserve(c, &err), 0);
}

static void held(void *arg)
{
    struct graph *g = graph_new(drivers);
    struct deleter busy = {.graph = g, .node = "r"};
    struct deleter free_one = {.graph = g, .node = "other"};
    struct change work;
    struct co_scope s;
    uint64_t began_ns;

    (void)arg;
    graph_set_change_deadline(g, 50 * NS_PER_MS);
    must_add(g, "{'driver':'null-co','node-name':'n'}");
    must_add(g, "{'driver':'null-co','node-name':'other'}");
    must_add(g, "{'driver':'raw','node-name':'r','file':'n'}");
    hold(&work, g, "r");
    assert_string_equal(node_reserved_by(graph_find(g, "n")), "work on 'r'");
    assert_null(node_reserved_by(graph_find(g, "other")));
    co_scope_init(&s);
    began_ns = loop_clock();
    assert_int_equal(co_scope_start(&s, delete_node, &busy), 0);
    delete_node(&free_one); /* disjoint: goes on at once */
    assert_int_equal(free_one.result, 0);
    assert_int_equal(busy.result, 1);
    co_scope_join(&s);
    assert_int_equal(busy.result, -EBUSY);
    assert_true(loop_clock() - began_ns >= 50 * NS_PER_MS);
    assert_non_null(strstr(busy.text, "held by work on 'r'"));
    must_refuse(EBUSY, "held by work on 'r'", g, "{'driver':'raw','node-name':'q','file':'n'}");
    change_end(&work);
    assert_null(node_reserved_by(graph_find(g, "n")));
    must_add(g, "{'driver':'raw','node-name':'q','file':'n'}");
    graph_co_free(g);
}

static void test_graph__overlapping_change_waits_and_is_told_who_holds_the_node(void **state)
{
    (void)state;
    under_sim(held);
}

struct holder {
    struct graph *graph;
    const char *node;
    unsigned order;
    unsigned *next_order;
};

static void hold_for_a_while(void *arg)
{
    struct holder *h = arg;
    struct change c;

    hold(&c, h->graph, h->node);
    h->order = (*h->next_order)++;
    co_sleep_until(loop_clock() + NS_PER_MS);
    change_end(&c);
}

static void fifo(void *arg)
{
    static const char *const nodes[] = {"r", "n", "r", "n", "n", "r"};
    struct holder holders[ARRAY_SIZE(nodes)];
    struct graph *g = graph_new(drivers);
    struct change first;
    struct co_scope s;
    unsigned order = 0;

    (void)arg;
    must_add(g, "{'driver':'null-co','node-name':'n'}");
    must_add(g, "{'driver':'raw','node-name':'r','file':'n'}");
    hold(&first, g, "n");
    co_scope_init(&s);
    for (unsigned i = 0; i < ARRAY_SIZE(nodes); i++) {
        holders[i] = (struct holder){.graph = g, .node = nodes[i], .next_order = &order};
        assert_int_equal(co_scope_start(&s, hold_for_a_while, &holders[i]), 0);
    }
    assert_int_equal(order, 0);
    change_end(&first);
    co_scope_join(&s);
    for (unsigned i = 0; i < ARRAY_SIZE(nodes); i++)
        assert_int_equal(holders[i].order, i);
    graph_co_free(g);
}

static void test_graph__overlapping_changes_are_served_in_order(void **state)
{
    (void)state;
    under_sim(fifo);
}

static void cancelled(void *arg)
{
    struct graph *g = graph_new(drivers);
    struct deleter d = {.graph = g, .node = "n"};
    struct change work;
    struct co_scope s;

    (void)arg;
    must_add(g, "{'driver':'null-co','node-name':'n'}");
    hold(&work, g, "n");
    co_scope_init(&s);
    assert_int_equal(co_scope_start(&s, delete_node, &d), 0);
    co_scope_cancel(&s);
    co_scope_join(&s);
    assert_int_equal(d.result, -ECANCELED);
    change_end(&work);
    must_del(g, "n");
    graph_co_free(g);
}

static void test_graph__cancelled_change_leaves_the_queue(void **state)
{
    (void)state;
    under_sim(cancelled);
}

/* The node goes while others wait for it. */
static void gone(void *arg)
{
    struct graph *g = graph_new(drivers);
    struct deleter d[3];
    struct change work;
    struct co_scope s;
    unsigned order = 0;

    (void)arg;
    must_add(g, "{'driver':'null-co','node-name':'n'}");
    hold(&work, g, "n");
    co_scope_init(&s);
    for (unsigned i = 0; i < ARRAY_SIZE(d); i++) {
        d[i] = (struct deleter){.graph = g, .node = "n", .next_order = &order};
        assert_int_equal(co_scope_start(&s, delete_node, &d[i]), 0);
    }
    change_end(&work);
    co_scope_join(&s);
    assert_int_equal(d[0].result, 0);
    assert_int_equal(d[1].result, -ENOENT);
    assert_int_equal(d[2].result, -ENOENT);
    graph_co_free(g);
}

static void test_graph__waiting_for_a_node_that_goes_ends(void **state)
{
    (void)state;
    under_sim(gone);
}
