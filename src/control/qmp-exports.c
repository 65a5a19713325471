/* SPDX-License-Identifier: Apache-2.0 */
/* Commands of exports and of the NBD server. */
#include "base/alloc.h"
#include "base/macros.h"
#include "control/address.h"
#include "control/control.h"
#include "schema-dispatch.h"

#include <errno.h>

int qmp_nbd_server_start(struct qmp_session *session, const struct nbd_server_start_options *args,
                         struct error **err)
{
    struct socket_address address = address_of_legacy(&args->addr);

    return exports_co_nbd_start(control_of(session)->exports, &address,
                                (unsigned)args->max_connections, err);
}

int qmp_nbd_server_stop(struct qmp_session *session, struct error **err)
{
    return exports_co_nbd_stop(control_of(session)->exports, err);
}

int qmp_block_export_add(struct qmp_session *session, const struct export_options *args,
                         struct error **err)
{
    return exports_co_add(control_of(session)->exports, args, err);
}

int qmp_block_export_del(struct qmp_session *session, const struct block_export_del_args *args,
                         struct error **err)
{
    return exports_del(control_of(session)->exports, args->id,
                       args->mode == EXPORT_REMOVE_MODE_HARD, err);
}

static void count_export(const struct export_picture *e, void *arg)
{
    (void)e;
    ++*(size_t *)arg;
}

static void add_export(const struct export_picture *e, void *arg)
{
    struct export_info_array *list = arg;

    list->items[list->count++] = (struct export_info){
        .id = xstrdup(e->id),
        .type = EXPORT_TYPE_NBD,
        .node_name = xstrdup(node_name(backend_node(e->backend))),
        .shutting_down = e->shutting_down,
        .writable = e->writable,
        .clients = e->clients,
        .address = e->address ? xstrdup(e->address) : NULL,
    };
}

int qmp_query_block_exports(struct qmp_session *session, struct export_info_array *ret,
                            struct error **err)
{
    const struct exports *exports = control_of(session)->exports;
    size_t count = 0;

    exports_for_each(exports, count_export, &count);
    ret->items = try_new_n(struct export_info, MAX(count, (size_t)1));
    if (!ret->items)
        return error_set(err, ENOMEM, "no memory for a list of %zu exports", count);
    exports_for_each(exports, add_export, ret);
    return 0;
}
