/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the core remembers of long chains (Q3, CHAIN-1 to CHAIN-3): it must forget it when a layer in between changes.
 *
 *     top -> l5 -> l4 -> l3 -> l2 -> l1 -> l0
 */
#include "check.h"
#include "formats/list.h"
#include "formats/qcow2/qcow2-create.h"
#include "graph-fixture.h"
#include "loop/sim/sim.h"
#include "protocols/list.h"

#include <stdio.h>

#define LAYERS 7u
#define TOP    (LAYERS - 1)
#define SIZE   MIB
#define BLOCK  4096u

static const struct driver *const *const drivers[] = {protocol_drivers, format_drivers, NULL};

static void create_layer(unsigned i)
{
    struct qcow2_create_options o = QCOW2_CREATE_OPTIONS_INIT;
    char below[16];
    char path[16];
    struct error *err = NULL;

    (void)snprintf(path, sizeof(path), "/disk/%u", i);
    (void)snprintf(below, sizeof(below), "%u", i ? i - 1 : 0);
    o.size = SIZE;
    o.backing_file = i ? below : NULL;
    o.backing_format = i ? "qcow2" : NULL;
    if (qcow2_co_create(path, &o, &err) < 0)
        fail_msg("%s", error_text(err));
}

static struct graph *open_chain(void)
{
    struct graph *g = graph_new(drivers);

    for (unsigned i = 0; i < LAYERS; i++) {
        create_layer(i);
        if (i)
            must_add(g,
                     "{'driver': 'qcow2', 'node-name': 'l%u', 'discard': 'unmap', 'backing': 'l%u',"
                     " 'file': {'driver': 'file', 'filename': '/disk/%u'}}",
                     i, i - 1, i);
        else
            must_add(g,
                     "{'driver': 'qcow2', 'node-name': 'l0', 'discard': 'unmap', 'backing': null,"
                     " 'file': {'driver': 'file', 'filename': '/disk/0'}}");
    }
    return g;
}

static void close_chain(struct graph *g)
{
    for (unsigned i = LAYERS; i-- > 0;) {
        char name[16];

        (void)snprintf(name, sizeof(name), "l%u", i);
        must_del(g, name);
    }
    check(!graph_co_free(g));
}

static struct backend *layer(struct graph *g, unsigned i)
{
    char name[16];

    (void)snprintf(name, sizeof(name), "l%u", i);
    return must_attach(g, name, ACCESS_RW, name);
}

static void write_block(struct backend *b, uint64_t offset, uint8_t value)
{
    uint8_t data[BLOCK];

    memset(data, value, sizeof(data));
    check(write_at(b, offset, sizeof(data), data) == 0);
}

static void expect(struct backend *b, uint64_t offset, uint8_t value)
{
    uint8_t data[BLOCK];

    check(read_at(b, offset, sizeof(data), data) == 0);
    for (unsigned i = 0; i < BLOCK; i++)
        assert_int_equal(data[i], value);
}

static void forgets_main(void *arg)
{
    struct graph *g = open_chain();
    struct backend *top = layer(g, TOP);
    struct backend *middle = layer(g, 3);
    struct backend *bottom = layer(g, 0);

    (void)arg;
    write_block(bottom, 0, 1);
    for (unsigned twice = 0; twice < 2; twice++)
        expect(top, 0, 1); /* the second time by what is remembered */
    expect(top, 8 * BLOCK, 0);
    write_block(middle, 0, 2); /* a layer that was passed over has something now */
    expect(top, 0, 2);
    expect(top, 0, 2);
    write_block(bottom, 0, 3);
    expect(top, 0, 2);
    check(send_request(middle, REQUEST_WRITE_ZEROES, REQUEST_MAY_UNMAP, 64 * KIB, 64 * KIB, NULL) ==
          0);
    write_block(bottom, 64 * KIB, 4);
    expect(top, 64 * KIB, 0);
    write_block(top, 128 * KIB, 5); /* the top itself is asked first */
    expect(top, 128 * KIB, 5);
    expect(top, 0, 2);
    (void)backend_co_free(bottom);
    (void)backend_co_free(middle);
    (void)backend_co_free(top);
    close_chain(g);
}

static void test_chain_hints__are_forgotten_when_a_layer_changes(void **state)
{
    struct sim_options o;

    (void)state;
    sim_options_init(&o, 1);
    check(sim_run(&o, forgets_main, NULL) == 0);
}

static void changes_main(void *arg)
{
    struct graph *g = open_chain();
    struct backend *top = layer(g, TOP);
    struct backend *bottom = layer(g, 0);
    struct error *err = NULL;

    (void)arg;
    write_block(bottom, 0, 1);
    write_block(bottom, SIZE - 64 * KIB, 1);
    expect(top, 0, 1);
    expect(top, SIZE - 64 * KIB, 1);
    check(graph_co_resize(g, "l2", SIZE / 2, &err) == 0); /* what lies beyond its end is hidden */
    expect(top, SIZE - 64 * KIB, 0);
    expect(top, 0, 1);
    (void)backend_co_free(bottom);
    (void)backend_co_free(top);
    close_chain(g);
}

static void test_chain_hints__are_forgotten_when_the_graph_changes(void **state)
{
    struct sim_options o;

    (void)state;
    sim_options_init(&o, 1);
    check(sim_run(&o, changes_main, NULL) == 0);
}
