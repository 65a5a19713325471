/* SPDX-License-Identifier: Apache-2.0 */
/* Socket addresses of the schema as those of the loop. */
#ifndef CAIRN_CONTROL_ADDRESS_H
#define CAIRN_CONTROL_ADDRESS_H

#include "loop/socket.h"

struct server_address;
struct server_address_legacy;

/* The strings of the result are those of the argument. */
struct socket_address address_of(const struct server_address *a);
struct socket_address address_of_legacy(const struct server_address_legacy *a);

#endif
