/* SPDX-License-Identifier: Apache-2.0 */
/* The registry of exports: names, life, and the one NBD server. */
#include "exports/export.h"
#include "base/alloc.h"
#include "base/log.h"
#include "base/macros.h"
#include "exports/nbd/nbd-wire.h"
#include "exports/nbd/nbd.h"
#include "graph/change.h"
#include "schema-types.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

struct exports {
    struct graph *graph;
    struct loop **io_loops;
    unsigned io_loop_count;
    exports_deleted_fn *deleted;
    void *deleted_arg;
    struct list exports;    /* struct export, oldest first */
    uint64_t serial;        /* of the youngest */
    struct co_scope scope;  /* removals under way */
    struct nbd_server *nbd; /* or NULL */
    bool nbd_starting;
    bool nbd_stopping;
    unsigned adding;             /* exports_co_add() calls under way */
    struct co_wait *adding_wait; /* exports_co_nbd_stop()'s, until there are none */
};

/* Between the request for its removal and deleted() it is still listed, and its id taken. */
struct export
{
    struct exports *all;
    struct list link;
    char *id;
    struct backend *backend;
    struct nbd_export nbd;
    bool shutting_down;
};

struct exports *exports_new(struct graph *graph, struct loop *const *io_loops,
                            unsigned io_loop_count, exports_deleted_fn *deleted, void *arg)
{
    struct exports *all = xnew(struct exports);

    assert(io_loop_count);
    all->graph = graph;
    all->io_loops = xnew_n(struct loop *, io_loop_count);
    memcpy(all->io_loops, io_loops, io_loop_count * sizeof(struct loop *));
    all->io_loop_count = io_loop_count;
    all->deleted = deleted;
    all->deleted_arg = arg;
    list_init(&all->exports);
    co_scope_init(&all->scope);
    return all;
}

static struct export *find_export(const struct exports *all, const char *id)
{
    struct export *e;

    list_for_each (&all->exports, e, link) {
        if (strcmp(e->id, id) == 0)
            return e;
    }
    return NULL;
}

/* Also finds exports that are being removed: their clients still use the name. */
static bool nbd_name_taken(const struct nbd_server *server, const char *name)
{
    const struct nbd_export *e;

    list_for_each (&server->exports, e, link) {
        if (strcmp(e->name, name) == 0)
            return true;
    }
    return false;
}

static void export_free(struct export *e)
{
    list_remove(&e->nbd.link);
    list_remove(&e->link);
    free(e->nbd.name);
    free(e->nbd.description);
    free(e->id);
    free(e);
}

static int check_new(const struct exports *all, const struct export_options *o, const char *name,
                     struct error **err)
{
    if (find_export(all, o->id))
        return error_set(err, EEXIST, "there is an export '%s' already", o->id);
    if (!all->nbd || all->nbd_stopping)
        return error_set(err, EINVAL, "export '%s': no NBD server is running: start one first",
                         o->id);
    if (strlen(name) > NBD_MAX_STRING)
        return error_set(err, EINVAL, "export '%s': its name has %zu bytes, at most %u are allowed",
                         o->id, strlen(name), NBD_MAX_STRING);
    if (nbd_name_taken(all->nbd, name))
        return error_set(err, EEXIST, "the NBD server has an export named '%s' already", name);
    return 0;
}

int exports_co_add(struct exports *all, const struct export_options *o, struct error **err)
{
    const char *name = o->u.nbd.name ? o->u.nbd.name : o->node_name;
    AUTO(free_ptr) char *owner = xasprintf("export '%s'", o->id);
    struct access access = {.wants = ACCESS_READ, .tolerates = ACCESS_ALL & ~ACCESS_RESIZE};
    struct backend *backend;
    struct export *e;
    int r = check_new(all, o, name, err);

    if (r < 0)
        return r;
    if (o->writable)
        access.wants |= ACCESS_WRITE;
    all->adding++;
    e = xnew(struct export);
    e->all = all;
    e->id = xstrdup(o->id);
    e->nbd.name = xstrdup(name);
    e->nbd.description = o->u.nbd.description ? xstrdup(o->u.nbd.description) : NULL;
    e->nbd.writable = o->writable;
    e->nbd.writethrough = o->writethrough;
    e->nbd.allocation_depth = o->u.nbd.allocation_depth;
    e->nbd.serial = ++all->serial;
    e->nbd.closing = true; /* until the backend stands; the names are taken meanwhile */
    list_append(&all->exports, &e->link);
    list_append(&all->nbd->exports, &e->nbd.link);
    e->shutting_down = true;
    /* Yields: the server is still there afterwards, since it does not stop before this has ended. */
    r = backend_co_new(&backend, all->graph, o->node_name, access, owner, err);
    if (r == 0) {
        e->nbd.backend = backend;
        r = nbd_export_co_attach_bitmaps(&e->nbd, all->graph, o->u.nbd.bitmaps.items,
                                         o->u.nbd.bitmaps.count, owner, err);
        if (r < 0)
            backend_co_free(backend);
    }
    if (--all->adding == 0 && all->adding_wait)
        co_wait_end(all->adding_wait, 0);
    if (r < 0) {
        export_free(e);
        return error_wrap(err, r, "%s", owner);
    }
    e->backend = backend;
    e->nbd.size = backend_size(e->backend);
    e->nbd.alignment = backend_alignment(e->backend);
    e->nbd.closing = false;
    e->shutting_down = false;
    return 0;
}

static bool wait_cancel(struct co_wait *w)
{
    (void)w; /* only empty_wait points to it, and its waiter clears that */
    return true;
}

/* Until the last one has let go. -ETIMEDOUT. */
static int co_fn control_fn wait_for_clients(struct export *e, uint64_t deadline_ns)
{
    int r = 0;

    while (r == 0 && e->nbd.clients) {
        struct co_wait w;

        co_wait_init(&w, wait_cancel);
        e->nbd.empty_wait = &w;
        r = co_wait(&w, deadline_ns);
        e->nbd.empty_wait = NULL;
    }
    return e->nbd.clients ? r : 0;
}

/* Its clients are on their way out already; those whose requests do not end in time are not waited for (P4). */
static void co_fn control_fn export_co_remove(struct export *e)
{
    struct exports *all = e->all;
    char *id = xstrdup(e->id);

    co_shield_begin();
    while (wait_for_clients(e, loop_clock() + graph_change_deadline(all->graph)) < 0) {
        log_warning("export '%s': %u clients have requests that do not end, leaving these", id,
                    e->nbd.clients);
        nbd_export_abandon(all->nbd, &e->nbd);
    }
    co_shield_end();
    nbd_export_co_release_bitmaps(&e->nbd);
    e->backend = backend_co_free(e->backend);
    export_free(e);
    all->deleted(id, all->deleted_arg);
    free(id);
}

static void co_fn control_fn remove_main(void *arg)
{
    export_co_remove(arg);
}

/* It takes no new clients, and those that it has are to go. */
static void control_fn begin_removal(struct export *e)
{
    e->shutting_down = true;
    e->nbd.closing = true;
    nbd_export_disconnect(e->all->nbd, &e->nbd);
}

int exports_del(struct exports *all, const char *id, bool hard, struct error **err)
{
    struct export *e = find_export(all, id);
    int r;

    if (!e)
        return error_set(err, ENOENT, "there is no export '%s'", id);
    if (e->shutting_down)
        return error_set(err, EALREADY, "export '%s' is %s", id,
                         e->backend ? "being removed already" : "still being added");
    if (!hard && e->nbd.clients)
        return error_set(err, EBUSY, "export '%s' has %u clients: use mode=hard to disconnect them",
                         id, e->nbd.clients);
    begin_removal(e);
    r = co_scope_start(&all->scope, remove_main, e);
    if (r < 0) {
        e->shutting_down = false;
        e->nbd.closing = false;
        return error_set(err, -r, "export '%s': no memory for its removal", id);
    }
    return 0;
}

int exports_co_nbd_listen(struct exports *all, const struct socket_address *address,
                          unsigned max_connections, struct error **err)
{
    int r;

    if (all->nbd)
        return error_set(err, EEXIST, "the NBD server is running already, at %s",
                         socket_name(all->nbd->listener));
    if (all->nbd_starting)
        return error_set(err, EEXIST, "the NBD server is being started already");
    all->nbd_starting = true;
    r = nbd_server_co_start(&all->nbd, address, max_connections, all->io_loops, all->io_loop_count,
                            err);
    all->nbd_starting = false;
    return r;
}

void exports_nbd_accept(struct exports *all)
{
    nbd_server_accept(all->nbd);
}

int exports_co_nbd_start(struct exports *all, const struct socket_address *address,
                         unsigned max_connections, struct error **err)
{
    int r = exports_co_nbd_listen(all, address, max_connections, err);

    if (r == 0)
        exports_nbd_accept(all);
    return r;
}

void exports_nbd_on_idle(struct exports *all, exports_idle_fn *fn, void *arg)
{
    all->nbd->idle = fn;
    all->nbd->idle_arg = arg;
}

static void co_fn control_fn wait_for_additions(struct exports *all)
{
    struct co_wait w;

    if (!all->adding)
        return;
    co_wait_init(&w, NULL);
    all->adding_wait = &w;
    (void)co_wait(&w, LOOP_FOREVER); /* not cancellable; a change has a deadline */
    all->adding_wait = NULL;
}

static struct export *first_that_stays(const struct exports *all)
{
    struct export *e;

    list_for_each (&all->exports, e, link) {
        if (!e->shutting_down)
            return e;
    }
    return NULL;
}

int exports_co_nbd_stop(struct exports *all, struct error **err)
{
    struct export *e;

    if (!all->nbd || all->nbd_stopping)
        return error_set(err, ENOENT, "no NBD server is running");
    all->nbd_stopping = true; /* nothing is added from here on */
    wait_for_additions(all);
    while ((e = first_that_stays(all))) { /* it may be gone when its removal has begun */
        begin_removal(e);
        if (co_scope_start(&all->scope, remove_main, e) < 0)
            export_co_remove(e); /* there is no memory to do them all at once */
    }
    co_scope_join(&all->scope);
    all->nbd = nbd_server_co_stop(all->nbd);
    all->nbd_stopping = false;
    return 0;
}

struct exports *exports_co_free(struct exports *all)
{
    AUTO(error_free) struct error *ignored = NULL;

    if (all->nbd)
        (void)exports_co_nbd_stop(all, &ignored);
    assert(!all->nbd && list_empty(&all->exports));
    free(all->io_loops);
    free(all);
    return NULL;
}

void exports_for_each(const struct exports *all, exports_fn *fn, void *arg)
{
    const struct export *e;

    list_for_each (&all->exports, e, link) {
        struct export_picture picture = {
            .id = e->id,
            .backend = e->backend,
            .shutting_down = e->shutting_down,
            .writable = e->nbd.writable,
            .clients = e->nbd.clients,
            .address = all->nbd ? socket_name(all->nbd->listener) : NULL,
        };

        if (e->backend)
            fn(&picture, arg);
    }
}
