/* SPDX-License-Identifier: Apache-2.0 */
/* The real schema: what clients of this kind send is taken, what is not supported is refused by name and with the reason. */
#include "schema-types.h"

#include "base/alloc.h"
#include "base/json-in.h"
#include "base/json-out.h"
#include "base/json-text.h"
#include "base/keyval.h"
#include "graph/node-ref.h"

static const struct schema_command *command(const char *name)
{
    for (size_t i = 0; i < schema_command_count; i++)
        if (strcmp(schema_commands[i].name, name) == 0)
            return &schema_commands[i];
    fail_msg("no command %s", name);
    return NULL;
}

static void parse(const char *name, const char *text, void *ret)
{
    AUTO(error_free) struct error *err = NULL;
    json_t *tree;
    int r = json_text_load(text, strlen(text), &tree, &err);

    if (r == 0) {
        r = json_in(command(name)->args, tree, JSON_IN_STRICT, "arguments", ret, &err);
        json_decref(tree);
    }
    if (r < 0)
        fail_msg("%s: %s", text, error_text(err));
}

static void assert_refused(const char *name, const char *text, const char *expected)
{
    AUTO(error_free) struct error *err = NULL;
    AUTO(free_ptr) void *args = malloc(command(name)->args->size);
    json_t *tree;

    if (json_text_load(text, strlen(text), &tree, &err) < 0)
        fail_msg("%s: %s", text, error_text(err));
    assert_true(json_in(command(name)->args, tree, JSON_IN_STRICT, "arguments", args, &err) < 0);
    assert_string_equal(error_text(err), expected);
    json_decref(tree);
}

static void test_schema__has_the_commands_of_this_version(void **state)
{
    static const char *const names[] = {
        "block-check",
        "block-dirty-bitmap-add",
        "block-dirty-bitmap-clear",
        "block-dirty-bitmap-disable",
        "block-dirty-bitmap-enable",
        "block-dirty-bitmap-merge",
        "block-dirty-bitmap-remove",
        "block-export-add",
        "block-export-del",
        "block-job-cancel",
        "block-job-complete",
        "block-job-dismiss",
        "block-job-finalize",
        "block-job-pause",
        "block-job-resume",
        "block-job-set-speed",
        "block_resize",
        "blockdev-add",
        "blockdev-backup",
        "blockdev-del",
        "job-cancel",
        "job-complete",
        "job-dismiss",
        "job-finalize",
        "job-pause",
        "job-resume",
        "nbd-server-start",
        "nbd-server-stop",
        "object-add",
        "object-del",
        "qmp_capabilities",
        "query-block",
        "query-block-checks",
        "query-block-exports",
        "query-block-jobs",
        "query-blockstats",
        "query-commands",
        "query-graph",
        "query-jobs",
        "query-named-block-nodes",
        "query-qmp-schema",
        "query-version",
        "quit",
        "transaction",
        "x-blockdev-amend",
        "x-debug-block-dirty-bitmap-sha256",
    };

    (void)state;
    assert_int_equal(schema_command_count, ARRAY_SIZE(names));
    for (size_t i = 0; i < ARRAY_SIZE(names); i++)
        assert_string_equal(schema_commands[i].name, names[i]);
}

static void test_schema__drivers_are_in_the_order_of_the_enum(void **state)
{
    (void)state;
    assert_string_equal(schema_drivers[NODE_DRIVER_FILE].name, "file");
    assert_ptr_equal(schema_drivers[NODE_DRIVER_FILE].options, &file_options_type);
    assert_ptr_equal(schema_drivers[NODE_DRIVER_HOST_DEVICE].options, &file_options_type);
    assert_string_equal(schema_drivers[NODE_DRIVER_NULL_CO].name, "null-co");
    assert_ptr_equal(schema_drivers[NODE_DRIVER_NULL_CO].options, &null_co_options_type);
    assert_int_equal(schema_drivers[NODE_DRIVER_RAW].kind, SCHEMA_DRIVER_FORMAT);
    assert_int_equal(schema_driver_count, node_driver_type.count);
}

static void test_schema__takes_a_nested_node(void **state)
{
    AUTO(node_options_release) struct node_options n;

    (void)state;
    parse(
        "blockdev-add",
        "{'driver': 'raw', 'node-name': 'd0', 'read-only': true, 'offset': 512, 'detect-zeroes': 'off', "
        "'discard': 'unmap', 'file': {'driver': 'file', 'filename': '/img/a', 'cache': {'direct': true}, "
        "'locking': 'off', 'auto-read-only': true}}",
        &n);
    assert_int_equal(n.driver, NODE_DRIVER_RAW);
    assert_string_equal(n.node_name, "d0");
    assert_true(n.has_read_only && n.read_only);
    assert_false(n.has_auto_read_only);
    assert_true(n.has_discard);
    assert_int_equal(n.discard, DISCARD_MODE_UNMAP);
    assert_null(n.cache);
    assert_int_equal(n.u.raw.offset, 512);
    assert_false(n.u.raw.has_size);
    assert_int_equal(n.u.raw.file.kind, NODE_REF_DEFINITION);
    assert_string_equal(n.u.raw.file.definition->u.file.filename, "/img/a");
    assert_int_equal(n.u.raw.file.definition->u.file.locking, FILE_LOCKING_OFF);
    assert_true(n.u.raw.file.definition->cache->has_direct &&
                n.u.raw.file.definition->cache->direct);
    assert_false(n.u.raw.file.definition->cache->has_no_flush);
}

static void test_schema__takes_a_node_from_the_command_line(void **state)
{
    AUTO(error_free) struct error *err = NULL;
    AUTO(node_options_release) struct node_options n;

    (void)state;
    assert_int_equal(
        keyval_in(
            &node_options_type,
            "raw,node-name=d0,file.driver=file,file.filename=a,,b,file.cache.direct=on,size=1G",
            "driver", &n, &err),
        0);
    assert_true(n.u.raw.has_size);
    assert_int_equal(n.u.raw.size, GIB);
    assert_string_equal(n.u.raw.file.definition->u.file.filename, "a,b");
    assert_true(n.u.raw.file.definition->cache->direct);
}

/* ---- a child that may be declined ---- */

struct layer {
    struct node_ref_or_null *backing;
};

static const struct schema_member layer_members[] = {
    {
        .name = "backing",
        .type = &node_ref_or_null_type,
        .offset = offsetof(struct layer, backing),
        .flag_offset = SCHEMA_NO_FLAG,
        .presence = SCHEMA_OPTIONAL,
        .indirect = true,
    },
};

static const struct schema_type layer_type = {
    .name = "layer",
    .kind = SCHEMA_STRUCT,
    .size = sizeof(struct layer),
    .count = 1,
    .members = layer_members,
};

/* As `key=value` or as JSON. */
static void read_layer(const char *text, struct layer *ret)
{
    AUTO(error_free) struct error *err = NULL;

    if (keyval_in(&layer_type, text, NULL, ret, &err) < 0)
        fail_msg("%s: %s", text, error_text(err));
}

static void test_schema__optional_child_is_absent_or_null_or_given(void **state)
{
    static const char *const nulls[] = {"{\"backing\": null}", "{\"backing\": \"\"}", "backing="};
    static const char *const names[] = {"{\"backing\": \"b\"}", "backing=b"};
    static const char *const definitions[] = {
        "{\"backing\": {\"driver\": \"null-co\", \"size\": 7}}",
        "backing.driver=null-co,backing.size=7",
    };
    struct layer l;

    (void)state;
    read_layer("{}", &l);
    assert_null(l.backing);
    for (size_t i = 0; i < ARRAY_SIZE(nulls); i++) {
        read_layer(nulls[i], &l);
        assert_true(node_ref_is_null(l.backing));
        schema_free(&layer_type, &l);
    }
    for (size_t i = 0; i < ARRAY_SIZE(names); i++) {
        read_layer(names[i], &l);
        assert_false(node_ref_is_null(l.backing));
        assert_int_equal(l.backing->kind, NODE_REF_OR_NULL_NAME);
        assert_string_equal(l.backing->name, "b");
        schema_free(&layer_type, &l);
    }
    for (size_t i = 0; i < ARRAY_SIZE(definitions); i++) {
        read_layer(definitions[i], &l);
        assert_false(node_ref_is_null(l.backing));
        assert_int_equal(l.backing->kind, NODE_REF_OR_NULL_DEFINITION);
        assert_int_equal(l.backing->definition->u.null_co.size, 7);
        schema_free(&layer_type, &l);
    }
}

static void test_schema__null_co_has_its_defaults(void **state)
{
    AUTO(node_options_release) struct node_options n;

    (void)state;
    parse("blockdev-add", "{\"driver\": \"null-co\", \"node-name\": \"n\"}", &n);
    assert_int_equal(n.u.null_co.size, GIB);
    assert_int_equal(n.u.null_co.latency_ns, 0);
    assert_false(n.u.null_co.read_zeroes);
}

static void test_schema__refuses_by_name_what_is_not_supported(void **state)
{
    (void)state;
    assert_refused(
        "blockdev-add", "{'driver': 'file', 'filename': 'a', 'aio': 'native'}",
        "arguments.aio: not accepted: the I/O engine is chosen for all nodes by cairnd's option --engine");
    assert_refused("blockdev-add", "{'driver': 'host_device', 'filename': 'a', 'pr-manager': 'x'}",
                   "arguments.pr-manager: not accepted: persistent reservations are not supported");
    assert_refused("blockdev-add", "{'driver': 'raw', 'file': 'f', 'filename': 'a'}",
                   "arguments.filename: unknown member (driver is 'raw')");
    assert_refused(
        "blockdev-add", "{'driver': 'bochs', 'file': 'f'}",
        "arguments.driver: 'bochs' is not one of: fault, file, host_device, luks, null-co, qcow2, raw, vdi, vhdx, vmdk, vpc");
    assert_refused("blockdev-add", "{'driver': 'raw', 'file': {'driver': 'file', 'filename': ''}}",
                   "arguments.file.filename: '' has 0 bytes, less than 1");
    assert_refused(
        "blockdev-add", "{'driver': 'raw', 'file': 'f', 'node-name': '#block1'}",
        "arguments.node-name: '#block1' is not well-formed: a letter, then letters, digits, '-', '.', '_'");
    assert_refused(
        "nbd-server-start", "{'addr': {'type': 'vsock', 'data': {'cid': '1', 'port': '2'}}}",
        "arguments.addr.type: 'vsock' is not accepted: sockets of type vsock are not supported: use inet or "
        "unix");
    assert_refused(
        "nbd-server-start", "{'addr': {'type': 'unix', 'data': {'path': 'a', 'abstract': true}}}",
        "arguments.addr.data.abstract: not accepted: abstract sockets are not supported: use a path");
    assert_refused("nbd-server-start", "{'addr': {'type': 'unix', 'path': 'a'}}",
                   "arguments.addr.path: unknown member (type is 'unix')");
    assert_refused("block-export-add",
                   "{'type': 'nbd', 'id': 'e', 'node-name': 'n', 'iothread': 'x'}",
                   "arguments.iothread: not accepted: every export is served by all I/O threads of "
                   "the daemon");
    assert_refused("block_resize", "{'node-name': 'n', 'size': -1}",
                   "arguments.size: -1 is less than 0 (bytes)");
    assert_refused("block_resize", "{'node-name': 'n', 'size': 9223372036854775808}",
                   "arguments.size: 9223372036854775808 is more than 9223372036854775807 (bytes)");
}

static void test_schema__exports_and_servers_parse(void **state)
{
    AUTO(error_free) struct error *err = NULL;
    AUTO(export_options_release) struct export_options e;
    AUTO(nbd_server_start_options_release) struct nbd_server_start_options s;
    AUTO(nbd_server_options_release) struct nbd_server_options o;

    (void)state;
    parse("block-export-add",
          "{'type': 'nbd', 'id': 'e0', 'node-name': 'd0', 'writable': true, 'name': 'x'}", &e);
    assert_true(e.writable);
    assert_false(e.writethrough);
    assert_string_equal(e.u.nbd.name, "x");
    assert_null(e.u.nbd.description);
    parse("nbd-server-start",
          "{'addr': {'type': 'inet', 'data': {'host': '::1', 'port': '10809'}}}", &s);
    assert_int_equal(s.addr.type, SERVER_ADDRESS_TYPE_INET);
    assert_string_equal(s.addr.u.inet.data.port, "10809");
    assert_int_equal(s.max_connections, 0);
    assert_int_equal(keyval_in(&nbd_server_options_type,
                               "addr.type=unix,addr.path=/run/n.sock,max-connections=2", NULL, &o,
                               &err),
                     0);
    assert_string_equal(o.addr.u.unix_.path, "/run/n.sock");
    assert_int_equal(o.max_connections, 2);
}

static void test_schema__events_carry_their_data(void **state)
{
    char id[] = "e0";
    json_t *event = event_block_export_deleted(&(struct block_export_deleted_event){.id = id});
    AUTO(free_ptr) char *text = json_text_dump(event, false);

    (void)state;
    assert_string_equal(text, "{\"event\": \"BLOCK_EXPORT_DELETED\", \"data\": {\"id\": \"e0\"}}");
    json_decref(event);
}

static void test_schema__stats_nest_and_keep_absent_members_out(void **state)
{
    AUTO(block_stats_release) struct block_stats s = {.stats.wr_highest_offset = UINT64_MAX};
    json_t *tree;

    (void)state;
    s.parent = xnew(struct block_stats);
    s.parent->node_name = xstrdup("f0");
    tree = json_out(&block_stats_type, &s);
    assert_null(json_object_get(tree, "node-name"));
    assert_string_equal(
        json_string_value(json_object_get(json_object_get(tree, "parent"), "node-name")), "f0");
    assert_null(json_object_get(json_object_get(tree, "stats"), "idle_time_ns"));
    assert_string_equal(
        json_big_integer(json_object_get(json_object_get(tree, "stats"), "wr_highest_offset")),
        "18446744073709551615");
    json_decref(tree);
}
