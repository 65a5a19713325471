/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Negotiation: fixed newstyle, one option after the other, all of it under one deadline. What a client may make us keep is one
 * name; longer options are read away in pieces and refused.
 */
#include "base/alloc.h"
#include "base/endian.h"
#include "base/macros.h"
#include "exports/nbd/nbd-wire.h"
#include "exports/nbd/nbd.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* The longest option that has a meaning: two strings and a few numbers. */
#define OPTION_MAX (2 * NBD_MAX_STRING + 64)

struct option {
    uint32_t type;
    uint32_t len;
    uint8_t data[OPTION_MAX];
};

static int co_fn send_bytes(struct nbd_connection *c, const void *data, size_t len)
{
    struct iovec iov = {(void *)(uintptr_t)data, len};

    return socket_co_send(c->socket, &iov, 1, c->handshake_deadline_ns);
}

static int co_fn recv_bytes(struct nbd_connection *c, void *data, size_t len)
{
    return socket_co_recv_all(c->socket, data, len, c->handshake_deadline_ns);
}

static int co_fn send_reply(struct nbd_connection *c, uint32_t option, uint32_t type,
                            const void *data, size_t len)
{
    uint8_t head[20];
    struct iovec iov[2] = {{head, sizeof(head)}, {(void *)(uintptr_t)data, len}};

    store_be64(head, NBD_OPTION_REPLY_MAGIC);
    store_be32(head + 8, option);
    store_be32(head + 12, type);
    store_be32(head + 16, (uint32_t)len);
    return socket_co_send(c->socket, iov, len ? 2 : 1, c->handshake_deadline_ns);
}

static int co_fn send_error(struct nbd_connection *c, uint32_t option, uint32_t type,
                            const char *text)
{
    return send_reply(c, option, type, text, strlen(text));
}

unsigned nbd_transmission_flags(const struct nbd_connection *c, const struct nbd_export *export)
{
    unsigned flags =
        NBD_FLAG_HAS_FLAGS | NBD_FLAG_SEND_FLUSH | NBD_FLAG_SEND_FUA | NBD_FLAG_SEND_CACHE;

    if (c->server->max_connections != 1)
        flags |=
            NBD_FLAG_CAN_MULTI_CONN; /* a flush makes durable what was answered on any connection */
    if (export->writable)
        flags |= NBD_FLAG_SEND_TRIM | NBD_FLAG_SEND_WRITE_ZEROES | NBD_FLAG_SEND_FAST_ZERO;
    else
        flags |= NBD_FLAG_READ_ONLY;
    if (c->structured)
        flags |= NBD_FLAG_SEND_DF;
    return flags;
}

static int co_fn option_export_name(struct nbd_connection *c, const struct option *o)
{
    uint8_t reply[10 + 124] = {0};

    if (nbd_connection_co_bind(c, (const char *)o->data, o->len) < 0)
        return -ENOENT; /* this option has no way to say so */
    store_be64(reply, c->export->size);
    store_be16(reply + 8, (uint16_t)nbd_transmission_flags(c, c->export));
    return send_bytes(c, reply, c->no_zeroes ? 10 : sizeof(reply));
}

/* The names are copied on the control thread, then sent from here. */
struct listing {
    struct nbd_server *server;
    uint8_t *text; /* replies' data, one after the other: length of the data, data */
    size_t len;
    int result;
};

static void list_exports(void *arg)
{
    struct listing *l = arg;
    const struct nbd_export *e;
    size_t len = 0;
    uint8_t *p;

    list_for_each (&l->server->exports, e, link)
        len += e->closing ? 0 : 8 + strlen(e->name) + (e->description ? strlen(e->description) : 0);
    l->text = try_alloc(1, len);
    if (!l->text) {
        l->result = -ENOMEM;
        return;
    }
    l->len = len;
    p = l->text;
    list_for_each (&l->server->exports, e, link) {
        size_t name = strlen(e->name);
        size_t description = e->description ? strlen(e->description) : 0;

        if (e->closing)
            continue;
        store_be32(p, (uint32_t)(4 + name + description));
        store_be32(p + 4, (uint32_t)name);
        memcpy(p + 8, e->name, name);
        memcpy(p + 8 + name, e->description ? e->description : "", description);
        p += 8 + name + description;
    }
}

static int co_fn option_list(struct nbd_connection *c, const struct option *o)
{
    struct listing l = {.server = c->server};
    int r;

    if (o->len)
        return send_error(c, o->type, NBD_REP_ERR_INVALID, "the option takes no data");
    r = loop_co_call(c->server->control, list_exports, &l);
    if (r == 0)
        r = l.result;
    for (size_t at = 0; r == 0 && at < l.len; at += 4 + load_be32(l.text + at))
        r = send_reply(c, o->type, NBD_REP_SERVER, l.text + at + 4, load_be32(l.text + at));
    free(l.text);
    return r < 0 ? r : send_reply(c, o->type, NBD_REP_ACK, NULL, 0);
}

static int co_fn send_info_export(struct nbd_connection *c, uint32_t option)
{
    uint8_t data[12];

    store_be16(data, NBD_INFO_EXPORT);
    store_be64(data + 2, c->export->size);
    store_be16(data + 10, (uint16_t)nbd_transmission_flags(c, c->export));
    return send_reply(c, option, NBD_REP_INFO, data, sizeof(data));
}

static int co_fn send_info_text(struct nbd_connection *c, uint32_t option, unsigned info,
                                const char *text)
{
    uint8_t data[2 + NBD_MAX_STRING];
    size_t len = strlen(text);

    store_be16(data, (uint16_t)info);
    memcpy(data + 2, text, len);
    return send_reply(c, option, NBD_REP_INFO, data, 2 + len);
}

/* Any request is served; what is said is what is fast. */
static int co_fn send_info_block_size(struct nbd_connection *c, uint32_t option)
{
    uint8_t data[14];

    store_be16(data, NBD_INFO_BLOCK_SIZE);
    store_be32(data + 2, 1);
    store_be32(data + 6, MAX(4096u, c->export->alignment));
    store_be32(data + 10, NBD_MAX_PAYLOAD);
    return send_reply(c, option, NBD_REP_INFO, data, sizeof(data));
}

/* NBD_OPT_INFO and NBD_OPT_GO: name length, name, number of requests, requests. */
static int co_fn option_info(struct nbd_connection *c, const struct option *o, bool *ret_go)
{
    const uint8_t *p = o->data;
    uint32_t name_len = o->len >= 6 ? load_be32(p) : 0;
    unsigned count;
    bool want_name = false;
    int r;

    if (o->len < 6 || name_len > o->len - 6 || name_len > NBD_MAX_STRING)
        return send_error(c, o->type, NBD_REP_ERR_INVALID, "the name does not fit the option");
    count = load_be16(p + 4 + name_len);
    if (o->len != 6 + name_len + 2 * count)
        return send_error(c, o->type, NBD_REP_ERR_INVALID,
                          "the information requests do not fit the option");
    for (unsigned i = 0; i < count; i++)
        want_name |= load_be16(p + 6 + name_len + 2 * (size_t)i) == NBD_INFO_NAME;
    r = nbd_connection_co_bind(c, (const char *)p + 4, name_len);
    if (r == -ENOENT)
        return send_error(c, o->type, NBD_REP_ERR_UNKNOWN, "there is no export of this name");
    if (r < 0)
        return r;
    r = send_info_export(c, o->type);
    if (r == 0 && want_name)
        r = send_info_text(c, o->type, NBD_INFO_NAME, c->export->name);
    if (r == 0 && c->export->description)
        r = send_info_text(c, o->type, NBD_INFO_DESCRIPTION, c->export->description);
    if (r == 0)
        r = send_info_block_size(c, o->type);
    if (r == 0)
        r = send_reply(c, o->type, NBD_REP_ACK, NULL, 0);
    *ret_go = o->type == NBD_OPT_GO;
    if (r == 0 && !*ret_go)
        r = nbd_connection_co_unbind(c);
    return r;
}

/* The queries of an option, each with its length before it: true if all of them fit. */
static bool queries_fit(const struct option *o, uint32_t at, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++) {
        uint32_t len = o->len - at >= 4 ? load_be32(o->data + at) : 0;

        if (o->len - at < 4 || len > o->len - at - 4 || len > NBD_MAX_STRING)
            return false;
        at += 4 + len;
    }
    return at == o->len;
}

/* The contexts that the queries ask for: a bit for each. Without any query, a listing has them all. */
static uint64_t contexts_wanted(const struct nbd_export *export, const struct option *o,
                                uint32_t at, uint32_t count, bool listing)
{
    uint64_t wanted = 0;

    for (uint32_t i = 0; i < count; i++) {
        uint32_t len = load_be32(o->data + at);
        const char *query = (const char *)o->data + at + 4;

        for (unsigned id = 0; id < nbd_context_count(export); id++) {
            if (nbd_context_matches(export, id, query, len, listing))
                wanted |= (uint64_t)1 << id;
        }
        at += 4 + len;
    }
    if (listing && !count)
        wanted = UINT64_MAX >> (64 - nbd_context_count(export));
    return wanted;
}

static int co_fn send_contexts(struct nbd_connection *c, uint32_t option, uint64_t wanted)
{
    uint8_t reply[4 + NBD_MAX_STRING];
    int r = 0;

    for (unsigned id = 0; r == 0 && id < nbd_context_count(c->export); id++) {
        const char *name = nbd_context_name(c->export, id);

        if (!(wanted & (uint64_t)1 << id))
            continue;
        store_be32(reply, id);
        /* NOLINTNEXTLINE(bugprone-not-null-terminated-result): strings on the wire have a length */
        memcpy(reply + 4, name, strlen(name));
        r = send_reply(c, option, NBD_REP_META_CONTEXT, reply, 4 + strlen(name));
    }
    return r;
}

/* export name, number of queries, queries; each string with its length before it. */
static int co_fn option_meta_context(struct nbd_connection *c, const struct option *o)
{
    bool listing = o->type == NBD_OPT_LIST_META_CONTEXT;
    uint32_t name_len = o->len >= 8 ? load_be32(o->data) : 0;
    uint64_t wanted;
    uint32_t count;
    int r;

    if (!c->structured)
        return send_error(c, o->type, NBD_REP_ERR_INVALID,
                          "contexts need structured replies first");
    if (o->len < 8 || name_len > o->len - 8 || name_len > NBD_MAX_STRING)
        return send_error(c, o->type, NBD_REP_ERR_INVALID, "the name does not fit the option");
    count = load_be32(o->data + 4 + name_len);
    if (!queries_fit(o, 8 + name_len, count))
        return send_error(c, o->type, NBD_REP_ERR_INVALID, "the queries do not fit the option");
    r = nbd_connection_co_bind(c, (const char *)o->data + 4, name_len);
    if (r == -ENOENT)
        return send_error(c, o->type, NBD_REP_ERR_UNKNOWN, "there is no export of this name");
    if (r < 0)
        return r;
    wanted = contexts_wanted(c->export, o, 8 + name_len, count, listing);
    if (!listing) {
        c->contexts = wanted;
        c->contexts_serial = c->export->serial;
    }
    r = send_contexts(c, o->type, wanted);
    if (r == 0)
        r = nbd_connection_co_unbind(c);
    return r < 0 ? r : send_reply(c, o->type, NBD_REP_ACK, NULL, 0);
}

static int co_fn option_structured(struct nbd_connection *c, const struct option *o)
{
    if (o->len)
        return send_error(c, o->type, NBD_REP_ERR_INVALID, "the option takes no data");
    c->structured = true;
    return send_reply(c, o->type, NBD_REP_ACK, NULL, 0);
}

/* 1: transmission begins. 0: the next option. Negative: the connection is over. */
static int co_fn run_option(struct nbd_connection *c, const struct option *o)
{
    bool go = false;
    int r;

    if (o->type == NBD_OPT_SET_META_CONTEXT)
        c->contexts = 0; /* what was set before is replaced, even by a failure */
    switch (o->type) {
    case NBD_OPT_EXPORT_NAME:
        r = option_export_name(c, o);
        return r < 0 ? r : 1;
    case NBD_OPT_ABORT:
        (void)send_reply(c, o->type, NBD_REP_ACK, NULL, 0); /* the client may not wait for it */
        return -ESHUTDOWN;
    case NBD_OPT_LIST:
        return option_list(c, o);
    case NBD_OPT_STARTTLS:
        return send_error(c, o->type, NBD_REP_ERR_POLICY, "TLS is not configured");
    case NBD_OPT_INFO:
    case NBD_OPT_GO:
        r = option_info(c, o, &go);
        return r < 0 ? r : go;
    case NBD_OPT_STRUCTURED_REPLY:
        return option_structured(c, o);
    case NBD_OPT_LIST_META_CONTEXT:
    case NBD_OPT_SET_META_CONTEXT:
        return option_meta_context(c, o);
    default:
        return send_error(c, o->type, NBD_REP_ERR_UNSUP, "the option is not supported");
    }
}

/* Reads the data of an option away that is too long to mean anything. */
static int co_fn skip_option(struct nbd_connection *c, struct option *o)
{
    uint32_t left = o->len;

    if (o->type == NBD_OPT_SET_META_CONTEXT)
        c->contexts = 0; /* as in run_option() */
    if (o->len > NBD_MAX_PAYLOAD || o->type == NBD_OPT_EXPORT_NAME)
        return -EMSGSIZE;
    while (left) {
        uint32_t piece = MIN(left, (uint32_t)OPTION_MAX);
        int r = recv_bytes(c, o->data, piece);

        if (r < 0)
            return r;
        left -= piece;
    }
    return send_error(c, o->type, NBD_REP_ERR_TOO_BIG, "the option is too long");
}

static int co_fn next_option(struct nbd_connection *c, struct option *o)
{
    uint8_t head[16];
    int r = recv_bytes(c, head, sizeof(head));

    if (r < 0)
        return r;
    if (load_be64(head) != NBD_OPTION_MAGIC)
        return -EPROTO;
    o->type = load_be32(head + 8);
    o->len = load_be32(head + 12);
    if (o->len > OPTION_MAX)
        return skip_option(c, o);
    r = recv_bytes(c, o->data, o->len);
    return r < 0 ? r : run_option(c, o);
}

static int co_fn greet(struct nbd_connection *c)
{
    uint8_t hello[18];
    uint8_t answer[4];
    uint32_t flags;
    int r;

    store_be64(hello, NBD_MAGIC);
    store_be64(hello + 8, NBD_OPTION_MAGIC);
    store_be16(hello + 16, NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES);
    r = send_bytes(c, hello, sizeof(hello));
    if (r == 0)
        r = recv_bytes(c, answer, sizeof(answer));
    if (r < 0)
        return r;
    flags = load_be32(answer);
    if (flags & ~(NBD_FLAG_C_FIXED_NEWSTYLE | NBD_FLAG_C_NO_ZEROES))
        return -EPROTO;
    c->no_zeroes = flags & NBD_FLAG_C_NO_ZEROES;
    return flags & NBD_FLAG_C_FIXED_NEWSTYLE ? 0 : -EPROTO;
}

int nbd_co_handshake(struct nbd_connection *c)
{
    struct iobuf *b = iobuf_new(sizeof(struct option));
    int r = b ? 0 : -ENOMEM;

    c->handshake_deadline_ns = loop_clock() + NBD_HANDSHAKE_NS;
    if (r == 0)
        r = greet(c);
    while (r == 0)
        r = next_option(c, (struct option *)(void *)b->data);
    iobuf_unref(b);
    if (c->export && c->contexts_serial != c->export->serial)
        c->contexts = 0; /* contexts count for the export that they were set for */
    return MIN(r, 0);
}
