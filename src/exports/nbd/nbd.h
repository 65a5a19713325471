/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The NBD server's parts and who touches them.
 *
 *   server, export          on the control thread
 *   connection              made on the control thread; then on its own I/O loop; freed on the control thread
 *   request                 on its connection's loop
 *
 * NBD-1 A connection is freed when its loop has said that it ended and no message to it is out.
 * NBD-2 An export lives while connections are bound to it: its removal waits for the last one.
 * NBD-3 Replies leave in batches: what a tick has finished goes out with one system call. Requests in flight, replies that are
 *       not sent among them, are bounded; at the bound the connection is not read.
 * NBD-4 Nobody is accepted before nbd_server_accept(), so that who comes finds the exports. The server is idle when the last
 *       connection has ended, if that one had come to an export.
 */
#ifndef CAIRN_EXPORTS_NBD_H
#define CAIRN_EXPORTS_NBD_H

#include "base/context.h"
#include "base/error.h"
#include "base/list.h"
#include "bitmaps/dirty-bitmap.h"
#include "graph/backend.h"
#include "loop/iobuf.h"
#include "loop/loop.h"
#include "loop/scope.h"
#include "loop/socket.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* What one connection may have in flight. */
#define NBD_MAX_REQUESTS 256
#define NBD_MAX_BYTES    ((size_t)64 << 20)

/* The most bitmaps of one export, one less with the depths: its contexts fit in a word. */
#define NBD_MAX_BITMAPS 63

/* How long a client may take to negotiate. */
#define NBD_HANDSHAKE_NS (10 * NS_PER_S)

/* Identifiers of contexts in block status replies: base:allocation, the depths if the export has them, the bitmaps. */
#define NBD_CONTEXT_ALLOCATION 0
#define NBD_CONTEXT_DEPTH      1

struct block_dirty_bitmap_or_str; /* generated */

/* A bitmap that clients can read. */
struct nbd_bitmap {
    char *context;
    struct dirty_bitmap *held;
    const struct bitmap *bits;
    struct backend *backend; /* keeps the node that has it */
};

/* Control thread. Constant while connections are bound, but for the counts. */
struct nbd_export {
    struct list link; /* in server->exports */
    char *name;
    char *description; /* or NULL */
    struct backend *backend;
    uint64_t size;      /* as it was at creation: an export does not tolerate resizing */
    unsigned alignment; /* as it was then; only a hint */
    bool writable;
    bool writethrough;
    bool allocation_depth;
    uint64_t serial; /* no other export of the process has it, ever */
    struct nbd_bitmap *bitmaps;
    unsigned bitmap_count;
    bool closing; /* takes no new clients */
    unsigned clients;
    struct co_wait *empty_wait;
};

/* The last connection has ended, and it was one that had come to an export. */
typedef void nbd_server_idle_fn(void *arg);

struct nbd_server {
    /* Constant while it runs. */
    struct socket *listener;
    struct loop *control;
    struct loop *const *loops;
    unsigned loop_count;
    unsigned max_connections; /* 0: no limit */

    /* Control thread. */
    struct co_scope scope;   /* the acceptor */
    struct list exports;     /* struct nbd_export */
    struct list connections; /* struct nbd_connection */
    unsigned connection_count;
    unsigned next_loop;
    bool accepting;
    struct co_wait *room_wait; /* the acceptor, at max_connections or before it may begin */
    struct co_wait *empty_wait;
    nbd_server_idle_fn *idle; /* or NULL */
    void *idle_arg;
};

struct nbd_request;

struct nbd_connection {
    /* Control thread. */
    struct list link; /* in server->connections */
    bool ended;
    bool shutdown_out;
    struct nbd_export *bound;

    /* Constant. */
    struct nbd_server *server;
    struct loop *loop;
    struct loop_message start;
    struct loop_message end;
    struct loop_message shutdown;

    /* All below: only on its loop. */
    struct socket *socket;
    struct co_scope scope;    /* the connection's own coroutine */
    struct co_scope requests; /* those of its requests */
    struct co_scope
        sending; /* and one that waits for the socket: it may start when all requests have ended */
    uint64_t handshake_deadline_ns;
    bool served; /* transmission began; the control thread looks when the end was told */

    /* Negotiated. */
    struct nbd_export *export; /* what stands in it besides counts is constant */
    struct backend *backend;
    bool no_zeroes;
    bool structured;
    uint64_t contexts;        /* a bit for each identifier that was chosen */
    uint64_t contexts_serial; /* of the export that they were chosen for */

    /* Receiving. */
    struct iobuf *rx;
    size_t rx_start;
    size_t rx_end;

    /* In flight (NBD-3). */
    unsigned request_count;
    size_t request_bytes; /* sum of their `cost` */
    struct co_wait *room;
    struct nbd_request *free_requests;

    /* Replies that are not sent yet, in the order of their completion. */
    struct nbd_request *tx_first;
    struct nbd_request **tx_last;
    size_t tx_bytes;
    size_t tx_skip;  /* bytes of tx_first that are sent */
    bool tx_sending; /* a coroutine waits for the socket */
    bool tx_broken;  /* the client is gone: replies are dropped */
    struct loop_hook tx_hook;
};

struct nbd_request {
    struct nbd_connection *connection;
    struct nbd_request *next; /* in free_requests or the reply queue */
    uint16_t type;
    uint16_t flags;
    uint64_t cookie;
    uint64_t offset;
    uint32_t len;
    uint32_t cost;     /* bytes of memory that it takes, about */
    struct iobuf *buf; /* what data lies in */
    uint8_t *data;     /* read, write: the payload. Block status: the descriptors */

    /* The reply: a head made here, and a payload. */
    uint8_t head[28];
    uint8_t head_len;
    const void *payload;
    size_t payload_len;
};

/* nbd-server.c: it listens, and accepts nobody before nbd_server_accept() */
int co_fn control_fn nbd_server_co_start(struct nbd_server **ret,
                                         const struct socket_address *address,
                                         unsigned max_connections, struct loop *const *loops,
                                         unsigned loop_count, struct error **err);
void nbd_server_accept(struct nbd_server *server);
/* Stops listening and disconnects all clients. The exports are gone. Returns NULL. */
struct nbd_server *co_fn control_fn nbd_server_co_stop(struct nbd_server *server);
/* NULL if there is none of this name, or it is closing. */
struct nbd_export *nbd_server_find(const struct nbd_server *server, const char *name, size_t len);
/* Ends the connections of its clients; requests in flight are carried out. */
void nbd_export_disconnect(struct nbd_server *server, const struct nbd_export *export);
/* Lets go of what is in flight for these, too: for requests that do not end. */
void nbd_export_abandon(struct nbd_server *server, const struct nbd_export *export);
/* Binds the connection to the export of this name, on the control thread from the connection's loop. -ENOENT, -ENOMEM. */
int co_fn nbd_connection_co_bind(struct nbd_connection *c, const char *name, size_t len);
/* Negative: no memory for it; the connection must end then, which lets go too. */
int co_fn nbd_connection_co_unbind(struct nbd_connection *c);

/* nbd-handshake.c: 0 when transmission may begin; negative: the connection is over. */
int co_fn nbd_co_handshake(struct nbd_connection *c);
unsigned nbd_transmission_flags(const struct nbd_connection *c, const struct nbd_export *export);

/* nbd-transmission.c: returns when the client has gone, or is to go, and all its requests have ended. */
void co_fn nbd_co_transmission(struct nbd_connection *c);

/* nbd-command.c */
/* How much memory the request will hold, about; from its head. */
uint32_t nbd_request_cost(const struct nbd_request *req);
/* Carries one request out and queues its reply. */
void co_fn nbd_request_run(void *request);

/* nbd-context.c */
/* Holds the bitmaps of the options; the export's backend stands. All or none. */
int co_fn control_fn nbd_export_co_attach_bitmaps(struct nbd_export *export, struct graph *graph,
                                                  const struct block_dirty_bitmap_or_str *options,
                                                  size_t count, const char *owner,
                                                  struct error **err);
/* No connection is bound any more. */
void co_fn control_fn nbd_export_co_release_bitmaps(struct nbd_export *export);
unsigned nbd_context_count(const struct nbd_export *export);
const char *nbd_context_name(const struct nbd_export *export, unsigned id);
/* Does a client's query ask for this context? `listing`: a query may name a whole namespace. */
bool nbd_context_matches(const struct nbd_export *export, unsigned id, const char *query,
                         size_t len, bool listing);
/* Makes the chunks of the reply, one for each context, as its payload. */
int co_fn nbd_co_block_status(struct nbd_request *req);
/* The memory that this takes at the most. */
uint32_t nbd_block_status_cost(const struct nbd_request *req);

/* nbd-reply.c */
/* 20 bytes. */
void nbd_chunk_head(uint8_t *out, unsigned flags, unsigned type, uint64_t cookie, size_t len);
void nbd_reply_init(struct nbd_connection *c);
/* Queues the answer; errnum as of the data path: 0 or negative. */
void nbd_reply_send(struct nbd_request *req, int result);
/* Sends what is queued, as far as it goes at once. */
void nbd_reply_flush(struct nbd_connection *c);
/* Gives a request back to its connection, and room to the reader. */
void nbd_request_free(struct nbd_request *req);

#endif
