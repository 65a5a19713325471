/* SPDX-License-Identifier: Apache-2.0 */
/* The exports of a process: nodes that are served to clients, each through a backend of its own. Control thread only. */
#ifndef CAIRN_EXPORTS_EXPORT_H
#define CAIRN_EXPORTS_EXPORT_H

#include "base/context.h"
#include "base/error.h"
#include "graph/backend.h"
#include "graph/graph.h"
#include "loop/socket.h"

#include <stdbool.h>
#include <stdint.h>

struct exports;
struct export_options; /* generated: what block-export-add takes */
struct loop;

/* An export is gone and its id is free again. */
typedef void exports_deleted_fn(const char *id, void *arg);

/* `io_loops`: the loops that serve clients, at least one; the array is copied. */
struct exports *exports_new(struct graph *graph, struct loop *const *io_loops,
                            unsigned io_loop_count, exports_deleted_fn *deleted, void *arg);
/* Disconnects all clients, removes all exports, stops the NBD server. Returns NULL. */
struct exports *co_fn control_fn exports_co_free(struct exports *all);

/* -EEXIST for an id or a name that is taken, -EINVAL without a server, and what backend_co_new() says. */
int co_fn control_fn exports_co_add(struct exports *all, const struct export_options *options,
                                    struct error **err);
/*
 * Asks for removal, which is done when deleted() is called. Without `hard`: -EBUSY if clients use it. -ENOENT; -EALREADY when it
 * is being removed.
 */
int control_fn exports_del(struct exports *all, const char *id, bool hard, struct error **err);

/*
 * Starts the one NBD server. max_connections 0: no limit; more wait to be accepted. -EEXIST if there is one. What has listened
 * only has it accept nobody yet: who comes to be served must find the exports.
 */
int co_fn control_fn exports_co_nbd_listen(struct exports *all,
                                           const struct socket_address *address,
                                           unsigned max_connections, struct error **err);
void control_fn exports_nbd_accept(struct exports *all);
/* Both. */
int co_fn control_fn exports_co_nbd_start(struct exports *all, const struct socket_address *address,
                                          unsigned max_connections, struct error **err);
/* fn(arg) is called, on the control thread, when the last client has gone, if it had come as far as an export. */
typedef void exports_idle_fn(void *arg);
void control_fn exports_nbd_on_idle(struct exports *all, exports_idle_fn *fn, void *arg);
/* Disconnects its clients and removes its exports. -ENOENT if there is none. */
int co_fn control_fn exports_co_nbd_stop(struct exports *all, struct error **err);

/* For queries. Strings are borrowed until the next change. */
struct export_picture {
    const char *id;
    const struct backend *backend;
    bool shutting_down;
    bool writable;
    unsigned clients;
    const char *address; /* NULL if it is not served now */
};

typedef void exports_fn(const struct export_picture *e, void *arg);
void exports_for_each(const struct exports *all, exports_fn *fn, void *arg);

#endif
