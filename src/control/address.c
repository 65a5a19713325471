/* SPDX-License-Identifier: Apache-2.0 */
/* Socket addresses of the schema as those of the loop. */
#include "control/address.h"
#include "schema-types.h"

static struct socket_address inet(const struct inet_address *a)
{
    return (struct socket_address){.family = SOCKET_INET, .host = a->host, .port = a->port};
}

static struct socket_address unix_path(const struct unix_address *a)
{
    return (struct socket_address){.family = SOCKET_UNIX, .path = a->path};
}

struct socket_address address_of(const struct server_address *a)
{
    switch (a->type) {
    case SERVER_ADDRESS_TYPE_INET:
        return inet(&a->u.inet);
    case SERVER_ADDRESS_TYPE_UNIX:
        break;
    }
    return unix_path(&a->u.unix_);
}

struct socket_address address_of_legacy(const struct server_address_legacy *a)
{
    switch (a->type) {
    case SERVER_ADDRESS_TYPE_INET:
        return inet(&a->u.inet.data);
    case SERVER_ADDRESS_TYPE_UNIX:
        break;
    }
    return unix_path(&a->u.unix_.data);
}
