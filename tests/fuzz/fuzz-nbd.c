/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Bytes of a hostile NBD client, to the whole server under sim: sockets, negotiation, requests to a file, the end.
 *
 * The first byte of an input says how far an honest client has come before these bytes are sent (its lowest two bits: not at
 * all, to transmission with simple or with structured replies) and in pieces of which length. What the server says must be
 * well-formed up to the point where the client's bytes ask for nonsense.
 */
#include "base/endian.h"
#include "base/macros.h"
#include "exports/export.h"
#include "exports/nbd/nbd-wire.h"
#include "formats/list.h"
#include "fuzz-sim.h"
#include "graph/graph.h"
#include "loop/co.h"
#include "loop/scope.h"
#include "protocols/list.h"
#include "schema-types.h"

#include <errno.h>
#include <stdint.h>
#include <string.h>

#define DISK_SIZE 65536

static const struct driver *const *const drivers[] = {protocol_drivers, format_drivers, NULL};

enum start { FROM_THE_START, SIMPLE, STRUCTURED, STARTS };

struct input {
    enum start start;
    size_t piece;
    const uint8_t *bytes;
    size_t len;
};

struct server {
    struct graph *graph;
    struct exports *exports;
    struct loop_thread *thread;
    unsigned deleted;
};

static void must(bool holds)
{
    if (!holds)
        abort();
}

static void count_deleted(const char *id, void *arg)
{
    struct server *s = arg;

    (void)id;
    s->deleted++;
}

static void co_fn control_fn add_disk(struct server *s)
{
    struct node_options node = {
        .driver = NODE_DRIVER_FILE,
        .node_name = (char *)(uintptr_t) "disk",
        .discard = DISCARD_MODE_UNMAP,
    };
    struct export_options e = {
        .type = EXPORT_TYPE_NBD,
        .id = (char *)(uintptr_t) "e",
        .node_name = (char *)(uintptr_t) "disk",
        .writable = true,
    };
    struct error *err = NULL;

    node.u.file.filename = (char *)(uintptr_t) "/disk/a";
    must(graph_co_add(s->graph, &node, &err) == 0);
    e.u.nbd.description = (char *)(uintptr_t) "a description";
    must(exports_co_add(s->exports, &e, &err) == 0);
}

static void co_fn control_fn server_begin(struct server *s, const struct socket_address *address)
{
    struct error *err = NULL;
    struct loop *loop;

    must(loop_thread_start(&s->thread, "io", &err) == 0);
    loop = loop_thread_loop(s->thread);
    s->graph = graph_new(drivers);
    s->exports = exports_new(s->graph, &loop, 1, count_deleted, s);
    must(exports_co_nbd_start(s->exports, address, 0, &err) == 0);
    add_disk(s);
}

static void co_fn control_fn server_end(struct server *s)
{
    s->exports = exports_co_free(s->exports);
    s->graph = graph_co_free(s->graph);
    must(s->deleted == 1);
    loop_thread_stop(s->thread);
}

static void co_fn send_honestly(struct socket *s, const void *data, size_t len)
{
    struct iovec iov = {(void *)(uintptr_t)data, len};

    must(socket_co_send(s, &iov, 1, LOOP_FOREVER) == 0);
}

static void co_fn skip(struct socket *s, size_t len)
{
    uint8_t bytes[256];

    must(len <= sizeof(bytes) && socket_co_recv_all(s, bytes, len, LOOP_FOREVER) == 0);
}

/* Reads the replies to one option, which succeeds. */
static void co_fn skip_replies(struct socket *s)
{
    uint8_t head[20];

    do {
        must(socket_co_recv_all(s, head, sizeof(head), LOOP_FOREVER) == 0);
        must(load_be64(head) == NBD_OPTION_REPLY_MAGIC && !(load_be32(head + 12) & 0x80000000u));
        skip(s, load_be32(head + 16));
    } while (load_be32(head + 12) != NBD_REP_ACK);
}

static void co_fn negotiate(struct socket *s, enum start start)
{
    static const uint8_t flags[] = {0, 0, 0, 3};
    static const uint8_t structured[] = "IHAVEOPT\0\0\0\x08\0\0\0\0";
    static const uint8_t context[] = "IHAVEOPT\0\0\0\x0a\0\0\0\x1f\0\0\0\x04"
                                     "disk\0\0\0\1\0\0\0\x0f"
                                     "base:allocation";
    static const uint8_t go[] = "IHAVEOPT\0\0\0\7\0\0\0\x0a\0\0\0\4disk\0\0";

    skip(s, 18);
    send_honestly(s, flags, sizeof(flags));
    if (start == STRUCTURED) {
        send_honestly(s, structured, sizeof(structured) - 1);
        skip_replies(s);
        send_honestly(s, context, sizeof(context) - 1);
        skip_replies(s);
    }
    send_honestly(s, go, sizeof(go) - 1);
    skip_replies(s);
}

struct reader {
    struct socket *socket;
    enum start start;
};

/* Structured replies can be read without knowing the requests: each chunk must be one that a client can take. */
static int co_fn read_chunk(struct socket *s)
{
    uint8_t head[20];
    uint8_t bytes[4096];
    uint32_t left;
    uint32_t type;
    int r = socket_co_recv_all(s, head, sizeof(head), LOOP_FOREVER);

    if (r < 0)
        return r;
    must(load_be32(head) == NBD_STRUCTURED_REPLY_MAGIC);
    must(load_be16(head + 4) == NBD_REPLY_FLAG_DONE);
    type = load_be16(head + 6);
    left = load_be32(head + 16);
    must((type == NBD_REPLY_TYPE_NONE && left == 0) ||
         (type == NBD_REPLY_TYPE_OFFSET_DATA && left > 8 && left <= 8 + DISK_SIZE) ||
         (type == NBD_REPLY_TYPE_BLOCK_STATUS && left >= 12 && left % 8 == 4) ||
         (type == NBD_REPLY_TYPE_ERROR && left == 6));
    while (left) {
        uint32_t n = MIN(left, (uint32_t)sizeof(bytes));

        r = socket_co_recv_all(s, bytes, n, LOOP_FOREVER);
        if (r < 0)
            return r;
        left -= n;
    }
    return 0;
}

static void co_fn read_all(void *arg)
{
    const struct reader *reader = arg;
    uint8_t bytes[4096];

    if (reader->start == STRUCTURED) {
        while (read_chunk(reader->socket) == 0)
            ;
    } else {
        while (socket_co_recv(reader->socket, bytes, sizeof(bytes), LOOP_FOREVER) > 0)
            ;
    }
}

static void co_fn send_input(struct socket *s, const struct input *in)
{
    size_t pos = 0;
    int r = 0;

    while (r == 0 && pos < in->len) {
        struct iovec iov = {(void *)(uintptr_t)(in->bytes + pos), MIN(in->piece, in->len - pos)};

        pos += iov.iov_len;
        r = socket_co_send(s, &iov, 1, LOOP_FOREVER); /* the server may have had enough */
        co_yield ();
    }
}

static void co_fn control_fn fuzz_main(void *arg)
{
    const struct input *in = arg;
    struct socket_address address = {.family = SOCKET_UNIX, .path = "/nbd"};
    struct server server = {.deleted = 0};
    struct error *err = NULL;
    struct reader reader = {.start = in->start};
    struct co_scope reading;

    server_begin(&server, &address);
    must(socket_co_connect(&reader.socket, &address, LOOP_FOREVER, &err) == 0);
    if (in->start != FROM_THE_START)
        negotiate(reader.socket, in->start);
    co_scope_init(&reading);
    must(co_scope_start(&reading, read_all, &reader) == 0);
    send_input(reader.socket, in);
    (void)co_sleep_until(loop_clock() + 20 * NS_PER_MS); /* what can be answered is */
    socket_shutdown(reader.socket);
    co_scope_join(&reading);
    reader.socket = socket_free(reader.socket);
    server_end(&server);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct sim_file_setup setup = {.type = FILE_TYPE_REGULAR, .size = DISK_SIZE};
    struct input in = {.piece = SIZE_MAX};
    struct sim_disk *disk;

    if (size == 0)
        return 0;
    in.start = (enum start)((data[0] & 3) % STARTS);
    if (data[0] >> 2)
        in.piece = data[0] >> 2;
    in.bytes = data + 1;
    in.len = size - 1;
    disk = sim_disk_new();
    sim_disk_make(disk, "/disk/a", &setup);
    fuzz_run(disk, fuzz_main, &in);
    return 0;
}
